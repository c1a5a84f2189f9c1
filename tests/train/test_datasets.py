from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

from vizoo.preprocess import EvalTransform
from vizoo.train.datasets import Digits, ImageFolder
from vizoo.train.transforms import RecipeTrainTransform

PLAIN = EvalTransform(size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def write(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 12), (colour, colour, colour)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, of 1, 2 and 3 training images, and one image of each for validation."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(label + 1):
            write(tmp_path / "train" / name / f"{i}.png", colour=100 * label + i)
        write(tmp_path / "val" / name / "0.png", colour=255)
    return tmp_path


def folder(root: Path, split: str = "train", **arguments: Any) -> ImageFolder:
    return ImageFolder(root, split, transform=PLAIN, **arguments)


# -- folders -------------------------------------------------------------------------------------------------------


def test_items_and_order(root: Path) -> None:
    data = folder(root)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.metainfo == {"classes": ("ant", "bee", "cat")}
    assert [item["label"] for item in (data[i] for i in range(len(data)))] == [0, 1, 1, 2, 2, 2]
    assert data.path(4) == root / "train" / "cat" / "1.png"
    assert data.image(4).size == (9, 12)
    assert data[4]["inputs"].shape == (3, 8, 8)
    assert torch.equal(data[4]["inputs"], torch.full((3, 8, 8), 201 / 255))


def test_batches(root: Path) -> None:
    batch = next(iter(DataLoader(folder(root), batch_size=6)))
    assert set(batch) == {"inputs", "label"}
    assert batch["inputs"].shape == (6, 3, 8, 8)
    assert batch["label"].tolist() == [0, 1, 1, 2, 2, 2]
    assert batch["label"].dtype == torch.long


def test_deep_hidden_other_and_oddly_named_files(root: Path) -> None:
    deep = write(root / "train" / "ant" / "more" / "ä ☃.PNG".lower())
    write(root / "train" / "bee" / "._0.png")
    (root / "train" / "bee" / "list.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "readme.txt").write_text("no class")
    data = folder(root)
    assert len(data) == 7
    assert data.path(1) == deep
    assert data.classes == ["ant", "bee", "cat"]


def test_class_folders_may_lie_in_the_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ImageFolder(root / "train", "", transform=PLAIN)) == 6
    monkeypatch.chdir(root / "train")
    data = ImageFolder(".", "", transform=PLAIN)
    assert data[5]["label"] == 2
    assert len(ImageFolder(os.curdir, "../val", transform=PLAIN)) == 3


def test_missing_folders(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*trian; did you mean 'train'"):
        folder(root, "trian")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone"):
        folder(root / "gone")


def test_empty_folders(root: Path) -> None:
    (root / "test").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"test holds no class folder; the layout is root/split/class/image\.jpg"
    ):
        folder(root, "test")
    (root / "train" / "bat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the class folder .*bat holds no image; known suffixes: \.bmp"):
        folder(root)


def test_classes_are_compared_with_the_training_set(root: Path) -> None:
    assert folder(root, "val", reference="train").classes == ["ant", "bee", "cat"]
    (root / "val" / "bee").rename(root / "val" / "wasp")
    with pytest.raises(ValueError, match="val lacks 1 of the 3 expected classes: bee"):
        folder(root, "val", reference="train")
    write(root / "val" / "bee" / "0.png")
    with pytest.raises(ValueError, match="val has 1 classes that are not expected: wasp"):
        folder(root, "val", reference="train")
    assert folder(root, "val").classes == ["ant", "bee", "cat", "wasp"]


def test_expected_classes_set_the_labels(root: Path) -> None:
    data = folder(root, "val", classes=("cat", "ant", "bee"))
    assert [data.path(i).parent.name for i in range(3)] == ["cat", "ant", "bee"]
    assert data.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"lacks 12 of the 15 expected classes: x0, x1, x10, .*, x7, \.\.\."):
        folder(root, classes=["ant", "bee", "cat", *(f"x{i}" for i in range(12))])
    with pytest.raises(ValueError, match="name one class twice"):
        folder(root, classes=["ant", "ant"])
    with pytest.raises(ValueError, match="`classes` or `reference`, not both"):
        folder(root, classes=["ant"], reference="train")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(root: Path, workers: int) -> None:
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:-25])
    with pytest.raises(ValueError, match=r"bee/1\.png is corrupt or truncated"):
        list(DataLoader(folder(root), num_workers=workers))


def test_a_file_deleted_meanwhile_and_a_huge_one(root: Path) -> None:
    data = folder(root, max_pixels=100)
    with pytest.raises(ValueError, match=r"ant/0\.png is too large: 9 x 12 = 108 pixels"):
        data[0]
    data.path(0).unlink()
    with pytest.raises(FileNotFoundError, match=r"ant/0\.png"):
        data[0]


def test_a_failing_transform_names_the_image(root: Path) -> None:
    def fail(image: Image.Image) -> torch.Tensor:
        raise KeyError("no such colour")

    with pytest.raises(RuntimeError, match=r"transform failed on .*ant/0\.png: KeyError: 'no such colour'"):
        ImageFolder(root, transform=fail)[0]
    with pytest.raises(RuntimeError, match="transform failed on digit 0: KeyError"):
        Digits(transform=fail)[0]


def test_built_from_a_config_and_pickled(root: Path) -> None:
    transform = {"type": RecipeTrainTransform, "size": 8}
    data = DATASETS.build({"type": ImageFolder, "root": str(root), "split": "train", "transform": transform})
    assert data[5]["inputs"].shape == (3, 8, 8)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.path(5) == data.path(5)


def test_a_split_needs_little_memory(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / "train" / "ant" / f"{i:04}.png")
    data = folder(tmp_path)
    assert data.files.dtype.kind == "S"
    assert data.files.nbytes == 200 * len("ant/0000.png")


# -- digits --------------------------------------------------------------------------------------------------------


def test_digits_split() -> None:
    train, held_out = Digits(transform=PLAIN), Digits("val", transform=PLAIN)
    assert (len(train), len(held_out)) == (1438, 359)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    share = np.bincount(held_out.labels) / np.bincount(np.concatenate([train.labels, held_out.labels]))
    assert np.abs(share - 0.2).max() < 0.005
    assert train.classes == list(train.metainfo["classes"])
    assert train.classes[3] == "three"


def test_digits_seed_and_share() -> None:
    again, other = (Digits("val", transform=PLAIN, seed=seed) for seed in (0, 1))
    assert np.array_equal(again.indices, Digits("val", transform=PLAIN).indices)
    assert not np.array_equal(again.indices, other.indices)
    assert len(Digits("val", transform=PLAIN, held_out=0.5)) == pytest.approx(898, abs=5)


def test_digits_are_scaled_to_eight_bits() -> None:
    from sklearn.datasets import load_digits

    data = Digits(transform=PLAIN)
    assert data.pixels.min() == 0
    assert data.pixels.max() == 255
    original = load_digits().images[data.indices[7]]
    assert np.abs(np.asarray(data.image(7), dtype=float)[..., 0] * 16 / 255 - original).max() < 0.04
    assert data.labels[7] == load_digits().target[data.indices[7]]


def test_digits_items() -> None:
    batch = next(iter(DataLoader(Digits(transform=PLAIN), batch_size=4)))
    assert batch["inputs"].shape == (4, 3, 8, 8)
    assert batch["label"].dtype == torch.long
    gray = Digits(mode="L", transform=EvalTransform(size=8, crop_pct=1.0, mean=(0.5,), std=(0.5,), channels=1))
    assert gray.image(0).mode == "L"
    assert gray[0]["inputs"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Digits("vall", transform=PLAIN), "unknown split 'vall' of the digits; did you mean 'val'"),
        (lambda: Digits(transform=PLAIN, mode="CMYK"), "mode must be 'RGB' or 'L', got 'CMYK'"),
        (lambda: Digits(transform=PLAIN, held_out=1.0), "held_out must lie between 0 and 1, got 1.0"),
    ],
)
def test_digits_refuse(build: Callable[[], Digits], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
