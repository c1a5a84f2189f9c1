"""Folders, ADE20K and Cityscapes in their layouts, label tables, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vizoo.train.segmentation import classes
from vizoo.train.segmentation.classes import palette
from vizoo.train.segmentation.data import ADE20K, Cityscapes, SegmentationFolder, collate
from vizoo.train.segmentation.transforms import ResizeTransform, ScaleCropTransform

PLAIN = ResizeTransform(scale=(6, 4))


def put(path: Path, values: Any, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, np.uint8)
    image = Image.frombytes(mode, values.shape[::-1], values.tobytes())
    if mode == "P":
        image.putpalette([9, 200, 30] * 256)
    image.save(path)
    return path


def photo(path: Path, height: int = 4, width: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (1, 2, 3)).save(path)
    return path


LABELS = np.arange(24).reshape(4, 6) % 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images with labels 0 to 2, one in a folder deeper."""
    photo(tmp_path / "images" / "b.jpg")
    photo(tmp_path / "images" / "deep" / "a.png")
    put(tmp_path / "maps" / "b.png", LABELS)
    put(tmp_path / "maps" / "deep" / "a.png", LABELS[::-1])
    return tmp_path


def folder(root: Path, **options: Any) -> SegmentationFolder:
    settings = {"transform": PLAIN, "classes": ("x", "y", "z"), **options}
    return SegmentationFolder(root / "images", root / "maps", **settings)


# -- folders -------------------------------------------------------------------------------------------------------


def test_items(root: Path) -> None:
    data = folder(root)
    assert len(data) == 2
    assert data.metainfo == {"classes": ("x", "y", "z")}
    assert data.path(0) == root / "images" / "b.jpg"
    assert data.map_path(1) == root / "maps" / "deep" / "a.png"
    item = data[0]
    assert item["image"].dtype == torch.uint8
    assert item["image"].shape == (3, 4, 6)
    assert set(item["target"]) == {"map", "original_size", "path"}
    assert item["target"]["map"].dtype == torch.uint8
    assert item["target"]["map"].numpy().tolist() == LABELS.tolist()
    assert item["target"]["original_size"] == (4, 6)
    assert item["target"]["path"] == str(root / "images" / "b.jpg")


def test_batches_are_lists(root: Path) -> None:
    batch = next(iter(DataLoader(folder(root), batch_size=2, collate_fn=collate)))
    assert set(batch) == {"images", "targets"}
    assert len(batch["images"]) == len(batch["targets"]) == 2


def test_pixels_without_a_label(root: Path) -> None:
    put(root / "maps" / "b.png", np.where(LABELS == 1, 255, LABELS))
    assert folder(root)[0]["target"]["map"].numpy().tolist() == np.where(LABELS == 1, 255, LABELS).tolist()
    put(root / "maps" / "b.png", np.where(LABELS == 1, 9, LABELS))
    assert folder(root, ignore=9)[0]["target"]["map"].numpy().tolist() == np.where(LABELS == 1, 255, LABELS).tolist()


def test_palette_images_give_their_indices(root: Path) -> None:
    put(root / "maps" / "b.png", LABELS, mode="P")
    assert folder(root)[0]["target"]["map"].numpy().tolist() == LABELS.tolist()


def test_names_from_a_file_and_other_ends_of_names(root: Path) -> None:
    (root / "names.txt").write_text("sky\n\n green grass \nsea\n", encoding="utf-8")
    assert folder(root, classes=root / "names.txt").classes == ["sky", "green grass", "sea"]
    photo(root / "images" / "c_rgb.jpg")
    put(root / "maps" / "c_seg.png", LABELS)
    data = folder(root, image_end="_rgb.jpg", map_end="_seg.png")
    assert [data.path(0).name, data.map_path(0).name] == ["c_rgb.jpg", "c_seg.png"]
    assert len(data) == 1


def test_the_exif_orientation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6, 4)).save(root / "images" / "b.jpg", exif=exif)
    assert folder(root)[0]["image"].shape == (3, 4, 6)


def test_the_map_of_a_test_keeps_its_size(root: Path) -> None:
    item = folder(root, transform={"type": ResizeTransform, "scale": (12, 12)})[0]
    assert item["image"].shape == (3, 8, 12)
    assert item["target"]["map"].shape == (4, 6)


def test_pickles_and_arrays(root: Path) -> None:
    data = folder(root)
    assert not [name for name, value in vars(data).items() if isinstance(value, list) and name != "classes"]
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["target"]["map"], data[1]["target"]["map"])


def test_workers_follow_the_seed(root: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        data = folder(root, transform=ScaleCropTransform(scale=(60, 40), crop=32))
        loader = DataLoader(data, num_workers=2, collate_fn=collate)
        return [batch["images"][0] for _ in range(2) for batch in loader]

    def same(a: list[Any], b: list[Any]) -> bool:
        return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first = drawn(0)
    assert same(first, drawn(0))
    assert not same(first, drawn(1))
    assert not same(first[:2], first[2:])


# -- ADE20K and Cityscapes -----------------------------------------------------------------------------------------


def test_ade20k(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "validation" / "ADE_val_00000001.jpg")
    values = np.zeros((4, 6))
    values[0] = (0, 1, 2, 149, 150, 255)
    put(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", values)
    data = ADE20K(tmp_path, "validation", transform=PLAIN)
    assert len(data.classes) == 150
    assert (data.classes[0], data.classes[12], data.classes[149]) == ("wall", "person", "flag")
    labels = data[0]["target"]["map"]
    assert labels[0].tolist() == [255, 0, 1, 148, 149, 255]
    assert labels[1:].eq(255).all()
    put(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", values * 0 + 151)
    with pytest.raises(ValueError, match=r"ADE_val_00000001.png holds the value 151, .* of the 150 classes: 24 of 24"):
        data[0]


def test_ade20ks_layout_with_other_classes(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "training" / "x.jpg")
    put(tmp_path / "annotations" / "training" / "x.png", LABELS)
    data = ADE20K(tmp_path, transform=PLAIN, classes=("a", "b"))
    assert data[0]["target"]["map"].numpy().tolist() == np.where(LABELS == 0, 255, LABELS - 1).tolist()
    with pytest.raises(ValueError, match="holds the value 2, which is no label of the 1 classes"):
        ADE20K(tmp_path, transform=PLAIN, classes=("a",))[0]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*validation; .*training"):
        ADE20K(tmp_path, "validation", transform=PLAIN)


def test_cityscapes(tmp_path: Path) -> None:
    photo(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    gt = tmp_path / "gtFine" / "val" / "ulm"
    values = np.zeros((4, 6))
    values[0] = (0, 7, 8, 33, 29, 24)
    put(gt / "ulm_000000_000019_gtFine_labelIds.png", values)
    put(gt / "ulm_000000_000019_gtFine_instanceIds.png", values)
    put(gt / "ulm_000000_000019_gtFine_color.png", values)
    data = Cityscapes(tmp_path, "val", transform=PLAIN)
    assert len(data) == 1
    assert data[0]["target"]["map"][0].tolist() == [255, 0, 1, 18, 255, 11]
    put(gt / "ulm_000000_000019_gtFine_labelIds.png", values + 10)
    with pytest.raises(
        ValueError, match=r"labelIds.png holds the value 43, which is no label of the 19 classes: 3 of 24"
    ):
        data[0]


def test_names_and_colours() -> None:
    assert len(set(classes.ADE20K)) == 150
    assert all(name == name.strip() and name for name in classes.ADE20K)
    assert classes.ADE20K[56:60] == ("pool table", "pillow", "screen door", "stairway")
    assert len(classes.CITYSCAPES) == len(classes.CITYSCAPES_IDS) == 19
    assert palette(classes.CITYSCAPES)[[0, 13, 18]].tolist() == [[128, 64, 128], [0, 0, 142], [119, 11, 32]]
    colours = palette(classes.ADE20K)
    assert colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    assert np.array_equal(palette(classes.ADE20K[:7]), colours[:7])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_images_without_a_label_image(root: Path) -> None:
    photo(root / "images" / "c.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 images of .*images have no label image in .*: c.jpg needs c.png"
    ):
        folder(root)


def test_missing_and_empty_folders(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*image; .*images"):
        SegmentationFolder(root / "image", root / "maps", transform=PLAIN, classes=["a"])
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no image$"):
        SegmentationFolder(root / "empty", root / "maps", transform=PLAIN, classes=["a"])
    with pytest.raises(FileNotFoundError, match=r"images holds no image \*_rgb.png"):
        folder(root, image_end="_rgb.png")


def test_classes_that_cannot_be(root: Path) -> None:
    with pytest.raises(ValueError, match="names that differ, at least one, got 0"):
        folder(root, classes=[])
    with pytest.raises(ValueError, match="names that differ, at least one, got 3: a, b, a"):
        folder(root, classes=["a", "b", "a"])
    with pytest.raises(ValueError, match="there can be 255 classes, since 255 stands for no label, got 256"):
        folder(root, classes=[str(number) for number in range(256)])
    with pytest.raises(ValueError, match="ignore must be a value of an 8-bit image, 0 to 255, got 256"):
        folder(root, ignore=256)
    with pytest.raises(FileNotFoundError, match=r"no file of class names .*names.txt"):
        folder(root, classes=root / "names.txt")


def test_labels_that_are_no_class(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"b.png holds the value 2, which is no label of the 2 classes: 8 of 24 pixels"
    ):
        folder(root, classes=("x", "y"))[0]


def test_sizes_that_differ(root: Path) -> None:
    photo(root / "images" / "b.jpg", 6, 4)
    with pytest.raises(ValueError, match=r"b.jpg is 4 x 6 pixels, its label image .*b.png is 6 x 4"):
        folder(root)[0]


def test_coloured_and_corrupt_label_images(root: Path) -> None:
    photo(root / "maps" / "b.png")
    with pytest.raises(ValueError, match=r"the label image .*b.png is of mode RGB; labels are the values"):
        folder(root)[0]
    (root / "maps" / "b.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the label image .*b.png cannot be read: UnidentifiedImageError"):
        folder(root)[0]
    (root / "images" / "b.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"b.jpg is not an image"):
        folder(root)[0]


def fail(sample: Any) -> Any:
    raise KeyError("oops")


def test_a_failing_transform_is_told_with_the_image(root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the transform failed on .*b.jpg: KeyError: 'oops'"):
        folder(root, transform=fail)[0]
