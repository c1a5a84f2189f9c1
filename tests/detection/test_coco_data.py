"""COCO files in all their forms, what is dropped, what is refused, and what reaches a model."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from pycocotools import mask as official
from torch.utils.data import DataLoader

from vizoo.train.detection.annotations import load_annotations
from vizoo.train.detection.data import CocoDetection, collate
from vizoo.train.detection.transforms import CopyPaste, DetectionTransform, JitterTransform, ResizeCropTransform
from vizoo.train.shapes import write_coco

# pycocotools' compiled part is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
Write = Callable[..., CocoDetection]


def record(number: int, **changes: Any) -> dict[str, Any]:
    """An annotation of a square in image 7."""
    plain = {"id": number, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    return plain | {"segmentation": SQUARE} | changes


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of one image, 60 x 40 pixels, with id 7, and open it."""

    def made(*annotations: dict[str, Any], file: dict[str, Any] | None = None, **options: Any) -> CocoDetection:
        document = {
            "images": [{"id": 7, "file_name": "x.png", "height": 40, "width": 60}],
            "annotations": list(annotations),
            "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 44, "name": "bottle"}],
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(document | (file or {})))
        if not (tmp_path / "x.png").exists():
            Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / "x.png")
        settings = {"transform": DetectionTransform(), "masks": True, **options}
        return CocoDetection(tmp_path, path, **settings)

    return made


# -- contents ------------------------------------------------------------------------------------------------------


def test_labels_follow_ascending_category_ids(write: Write) -> None:
    data = write(record(1), record(2, category_id=90), record(3, category_id=44))
    assert data.classes == ["car", "bottle", "brush"]
    assert data.category_ids.tolist() == [3, 44, 90]
    assert data.metainfo == {"classes": ("car", "bottle", "brush"), "category_ids": (3, 44, 90)}
    assert data[0]["target"]["labels"].tolist() == [0, 2, 1]


def test_an_item_has_what_models_take(write: Write) -> None:
    item = write(record(1), record(2, bbox=[1.5, 2.5, 3, 4]))[0]
    assert item["image"].dtype == torch.uint8
    assert item["image"].shape == (3, 40, 60)
    assert item["image"][:, 0, 0].tolist() == [1, 2, 3]
    target = item["target"]
    assert set(target) == {"boxes", "labels", "masks", "image_id", "original_size", "path"}
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[10, 10, 30, 30], [1.5, 2.5, 4.5, 6.5]]
    assert target["labels"].dtype == torch.int64
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].shape == (2, 40, 60)
    assert (target["image_id"], target["original_size"]) == (7, (40, 60))
    assert target["path"].endswith("x.png")


def test_masks_are_read_on_demand_only(write: Write) -> None:
    data = write(record(1, segmentation="nonsense"), masks=False)
    assert "masks" not in data[0]["target"]


def test_batches_are_lists(write: Write) -> None:
    data = write(record(1))
    batch = next(iter(DataLoader(data, batch_size=1, collate_fn=collate)))
    assert set(batch) == {"images", "targets"}
    assert [image.shape for image in batch["images"]] == [(3, 40, 60)]
    assert batch["targets"][0]["image_id"] == 7


def test_polygons_are_rasterised_as_by_coco(write: Write) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygons = [np.round(rng.uniform(-5, 60, 2 * int(rng.integers(3, 9))), 2).tolist() for _ in range(2)]
        mask = write(record(1, segmentation=polygons, bbox=[0, 0, 60, 40])).sample(0).masks
        expected = official.decode(official.merge(official.frPyObjects(polygons, 40, 60)))
        assert mask is not None
        assert np.array_equal(mask, expected[None]) or not expected.any()


def test_run_length_codes_of_both_forms(write: Write) -> None:
    rng = np.random.default_rng(1)
    for density in (0.02, 0.5, 0.98, 1.0):
        pixels = np.asfortranarray(rng.random((40, 60)) < density).astype(np.uint8, order="F")
        code = official.encode(pixels)
        text = {"size": [40, 60], "counts": code["counts"].decode()}
        flat = pixels.T.ravel()
        ends = np.flatnonzero(np.diff(flat)) + 1
        lead = [0, 0] if flat[0] else [0]
        plain = {"size": [40, 60], "counts": np.diff([*lead, *ends.tolist(), flat.size]).tolist()}
        for form in (text, plain):
            masks = write(record(1, segmentation=form)).sample(0).masks
            assert masks is not None
            assert np.array_equal(masks[0], pixels)


def test_boxes_partly_outside_are_clipped(write: Write) -> None:
    data = write(record(1, bbox=[-5, 30, 20, 20]), record(2, bbox=[50, -4, 30, 9]))
    assert data.annotations.boxes.tolist() == [[0, 30, 15, 40], [50, 0, 60, 5]]


def test_what_is_dropped_is_counted(write: Write) -> None:
    data = write(
        record(1),
        record(2, iscrowd=1),
        record(3, area=0),
        record(4, bbox=[10, 10, 0.5, 20]),
        record(5, bbox=[61, 10, 5, 5]),
        record(6, bbox=[-20, -20, 20, 20]),
        record(7, segmentation=[]),
        record(8, segmentation=[[1, 1, 2, 2]]),
    )
    assert data.annotations.ids.tolist() == [1]
    assert data.annotations.dropped == {"crowd": 1, "area": 1, "small": 1, "outside": 2, "mask": 2}
    assert data.report() == (
        "instances.json: 1 images, 1 objects, 3 classes; objects dropped: 1 crowds, 1 areas of 0, "
        "1 boxes narrower or lower than 1 pixel, 2 outside the image, 2 without a mask"
    )


def test_a_missing_area_is_that_of_the_box(write: Write) -> None:
    plain = record(1)
    del plain["area"]
    assert len(write(plain).annotations.ids) == 1


def images(*sizes: tuple[int, int]) -> dict[str, Any]:
    listed = [{"id": n, "file_name": "x.png", "height": h, "width": w} for n, (h, w) in enumerate(sizes)]
    return {"images": listed}


def test_images_that_training_cannot_use(write: Write) -> None:
    file = images((40, 60), (31, 100), (32, 32))
    found = [record(1, image_id=0), record(2, image_id=1)]
    data = write(*found, file=file)
    assert data.annotations.image_ids.tolist() == [0]
    assert data.report().endswith("images left out: 1 below 32 pixels, 1 without objects")
    assert write(*found, file=file, keep_empty=True).annotations.image_ids.tolist() == [0, 2]
    assert write(*found, file=file, min_side=16).annotations.image_ids.tolist() == [0, 1]
    assert write(*found, file=file, training=False).annotations.image_ids.tolist() == [0, 1, 2]


def test_images_without_objects_give_empty_targets(write: Write) -> None:
    target = write(file={"annotations": []}, training=False)[0]["target"]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 40, 60)


def test_objects_may_come_in_any_order(write: Write) -> None:
    file = images((40, 60), (40, 60))
    data = write(record(4, image_id=1), record(2, image_id=0), record(9, image_id=1), file=file)
    assert data.annotations.ids.tolist() == [2, 4, 9]
    assert data.annotations.first.tolist() == [0, 1, 3]
    assert len(data[0]["target"]["labels"]) == 1
    assert len(data[1]["target"]["labels"]) == 2


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_images_of_any_mode_become_rgb(write: Write, tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (60, 40), (90, 90, 90)).convert(mode).save(tmp_path / f"y.{suffix}")
    file = {"images": [{"id": 7, "file_name": f"y.{suffix}", "height": 40, "width": 60}]}
    image = write(record(1), file=file)[0]["image"]
    assert image.shape == (3, 40, 60)
    assert abs(image.float().mean() - 90) < 3


def test_the_exif_orientation_is_not_applied(write: Write, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40)).save(tmp_path / "x.png", exif=exif)
    assert write(record(1))[0]["image"].shape == (3, 40, 60)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 8}, r"instances.json: annotation 1 is of image 8, which the file does not list"),
        ({"category_id": 4}, r"annotation 1 of image 7 \(x.png\): category 4 is none of the file's 3 categories"),
        ({"bbox": [1, 2, 3]}, "annotation 1 needs whole numbers image_id"),
        ({"bbox": None}, "annotation 1 needs whole numbers image_id"),
        ({"bbox": [1, 2, float("nan"), 3]}, r"annotation 1 of image 7 \(x.png\): the box .* is not finite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "annotation 1 .*malformed: a polygon has 7 coordinates, an odd"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("inf")]]}, "annotation 1 .*coordinate that is not finite"),
        ({"segmentation": [[1, 2, 3, "4", 5, 6]]}, r"annotation 1 of image 7 \(x.png\): .*malformed"),
        ({"segmentation": "x"}, "annotation 1 .*expected a list of polygons or a run-length code, got x"),
        ({"segmentation": {"counts": [2400]}}, "annotation 1 .*malformed: 'size'"),
        (
            {"segmentation": {"size": [60, 40], "counts": [2400]}},
            r"annotation 1 .*the mask is \(60, 40\) \(height, width\), the image \(40, 60\)",
        ),
        (
            {"segmentation": {"size": [40, 60], "counts": [2300]}},
            "annotation 1 .*the runs sum up to 2300 pixels, the image has 2400",
        ),
        ({"segmentation": {"size": [40, 60], "counts": "abc"}}, "annotation 1 .*the runs sum up to"),
    ],
)
def test_malformed_annotations_are_named(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(record(1, **changes))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"annotations": None}, "is no COCO file of instances: it lacks the list 'annotations'"),
        ({"images": [{"id": 7, "file_name": "x.png", "height": 40}]}, "an image needs id, file_name, height and width"),
        (images((40, 0)), r"image 0 \(x.png\) is 0 x 40; each side must be 1 or more"),
        ({"images": images((4, 4))["images"] * 2}, "two images have the id 0"),
        ({"categories": [{"id": 1}]}, "every category needs a whole number `id` and a `name`"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "2 categories with 1 different ids"),
        ({"annotations": []}, "no image is left to use: .*1 without objects"),
    ],
)
def test_malformed_files_are_refused(write: Write, file: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(file=file)


def test_missing_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images of .*instances.json are not in .* is a/y.jpg"):
        write(record(1), file={"images": [{"id": 7, "file_name": "a/y.jpg", "height": 40, "width": 60}]})
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*instance.json; .*instances.json"):
        CocoDetection(tmp_path, tmp_path / "instance.json", transform=DetectionTransform())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere of images"):
        CocoDetection(tmp_path / "nowhere", tmp_path / "instances.json", transform=DetectionTransform(), training=False)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut.json is not whole JSON"):
        CocoDetection(tmp_path, tmp_path / "cut.json", transform=DetectionTransform())
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list.json is no COCO file of instances"):
        CocoDetection(tmp_path, tmp_path / "list.json", transform=DetectionTransform())


def test_corrupt_images_and_images_of_another_size(write: Write, tmp_path: Path) -> None:
    data = write(record(1))
    (tmp_path / "x.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"image 7 of .*instances.json cannot be read: .*x.png is not an image"):
        data[0]
    Image.new("RGB", (40, 60)).save(tmp_path / "x.png")
    message = r"image 7 of .*instances.json is 60 x 40 by that file, but .*x.png is 40 x 60 .*EXIF"
    with pytest.raises(ValueError, match=message):
        data[0]


def fail(sample: Any) -> Any:
    raise KeyError("oops")


def test_a_failing_transform_is_told_with_the_image(write: Write) -> None:
    data = write(record(1), transform=fail)
    with pytest.raises(RuntimeError, match=r"the transform failed on image 7 \(.*x.png\): KeyError: 'oops'"):
        data[0]


def test_pasting_needs_masks(write: Write) -> None:
    with pytest.raises(ValueError, match="copy-paste needs masks: set masks=True"):
        write(record(1), masks=False, paste=CopyPaste())


# -- as a run uses it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of a data set of 12 images."""
    folder = tmp_path_factory.mktemp("shapes")
    return {"images": folder / "train", "annotations": write_coco(folder, 12, size=64)}


def drawn(data: CocoDetection, seed: int, workers: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=collate)
    return [batch for _ in range(2) for batch in loader]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p["images"], q["images"], strict=True)]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_workers_draw_by_the_seed_and_differ_between_epochs(shapes: dict[str, Any]) -> None:
    transform = ResizeCropTransform(short=(40, 48, 56), long=100, crop_short=(50, 60), crop=(30, 50))
    data = CocoDetection(**shapes, transform=transform, masks=True)
    first = drawn(data, 1, workers=2)
    assert same(first, drawn(data, 1, workers=2))
    assert not same(first, drawn(data, 2, workers=2))
    assert not same(first[:6], first[6:])


def test_pasting_takes_objects_of_other_images(shapes: dict[str, Any]) -> None:
    transform = JitterTransform(size=64, ratio=(1.0, 1.0), hflip=0.0)
    plain = CocoDetection(**shapes, transform=transform, masks=True)
    pasted = CocoDetection(**shapes, transform=transform, masks=True, paste={"type": CopyPaste, "prob": 1.0})
    counts = [(len(plain[i]["target"]["labels"]), pasted[i]["target"]) for i in range(len(plain))]
    assert sum(len(target["labels"]) > before for before, target in counts) > 6
    for _, target in counts:
        assert target["masks"].sum(0).max() == 1
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])


def test_configs_and_pickles(shapes: dict[str, Any]) -> None:
    DATASETS.register_module(name="coco_under_test", module=CocoDetection, force=True)
    config = {"type": ResizeCropTransform, "short": 48, "long": 80}
    data = DATASETS.build({"type": "coco_under_test", **shapes, "transform": config, "masks": True})
    copy = pickle.loads(pickle.dumps(data))
    assert same([collate([data_item(data)])], [collate([data_item(copy)])])


def data_item(data: CocoDetection) -> Any:
    torch.manual_seed(3)
    return data[3]


def test_nothing_but_arrays_is_kept_per_object(shapes: dict[str, Any]) -> None:
    """Lists of Python objects would be copied into every worker as their reference counts change."""
    found = load_annotations(shapes["annotations"], masks=True, training=True, keep_empty=False, min_side=32)
    assert found.segments is not None
    fields = {**vars(found), **vars(found.segments)}
    kept = {name for name, value in fields.items() if isinstance(value, (list, tuple, dict, set))}
    assert kept == {"classes", "dropped", "left_out"}
    assert re.fullmatch(r"instances_train.json: 12 images, \d+ objects, 6 classes.*", found.report())
