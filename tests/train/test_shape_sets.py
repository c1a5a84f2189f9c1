"""Generated sets are written once, whole, and are never taken for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vizoo.train import shape_sets
from vizoo.train.detection.transforms import DetectionTransform
from vizoo.train.segmentation.transforms import ResizeTransform
from vizoo.train.shape_sets import ShapesDetection, ShapesSegmentation, annotation_file, ensure_set
from vizoo.train.shapes import CLASSES, MAP_CLASSES, write_ade, write_coco

SMALL: dict[str, Any] = {"scenes": (3, 2), "size": 48}


def test_detection_writes_itself_on_first_use(tmp_path: Path) -> None:
    root = tmp_path / "data" / "shapes"
    train = ShapesDetection(root, **SMALL, transform=DetectionTransform())
    held = ShapesDetection(root, "val", **SMALL, transform=DetectionTransform())
    assert (len(train), len(held)) == (3, 2)
    assert train.classes == list(CLASSES)
    assert "masks" in train[0]["target"]
    assert len(json.loads(annotation_file(root).read_text())["images"]) == 2


def test_segmentation_writes_itself_on_first_use(tmp_path: Path) -> None:
    train = ShapesSegmentation(tmp_path / "shapes", **SMALL, transform=ResizeTransform(scale=(48, 48)))
    held = ShapesSegmentation(tmp_path / "shapes", "val", **SMALL, transform=ResizeTransform(scale=(48, 48)))
    assert (len(train), len(held)) == (3, 2)
    assert train.classes == list(MAP_CLASSES)
    assert 0 in held[0]["target"]["map"], "the background is a class"


def test_a_set_is_written_once(tmp_path: Path) -> None:
    folder = ensure_set(tmp_path / "shapes", write_coco, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ensure_set(tmp_path / "shapes", write_coco, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_an_interrupted_set_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(*args: Any, split: str, **options: Any) -> Path:
        if split == "val":
            raise KeyboardInterrupt
        return write_coco(*args, split=split, **options)

    with pytest.raises(KeyboardInterrupt):
        ensure_set(tmp_path / "shapes", interrupted, **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert ensure_set(tmp_path, write_coco, **SMALL) == tmp_path
    assert annotation_file(tmp_path).is_file()


def test_a_set_that_another_process_wrote_first_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_set(tmp_path / "shapes", write_ade, **SMALL)
    monkeypatch.setattr(shape_sets.os, "getpid", lambda: 1)
    shape_sets._write_set(tmp_path / "shapes", write_ade, {"scenes": [3, 2], "size": 48, "seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"], "its own part is gone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 64}, r"holds shapes of .*'size': 48.*, not shapes of .*'size': 64.*choose another folder"),
        ({"scenes": (3, 4)}, r"holds shapes of .*\[3, 2\]"),
        ({"seed": 1}, "not shapes of .*'seed': 1"),
        ({"write": write_ade}, "holds shapes of .*'coco'.*, not shapes of .*'ade'"),
        ({"scenes": (3,)}, r"scenes must be the number of training and of held-out scenes, got \(3,\)"),
    ],
)
def test_another_set_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    ensure_set(tmp_path / "shapes", write_coco, **SMALL)
    with pytest.raises(ValueError, match=message):
        ensure_set(tmp_path / "shapes", **{"write": write_coco, **SMALL, **change})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="holds something else, not shapes of"):
        ensure_set(tmp_path, write_coco, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("kind", [ShapesDetection, ShapesSegmentation])
def test_an_unknown_split_is_refused(tmp_path: Path, kind: type) -> None:
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        kind(tmp_path / "shapes", "test", **SMALL, transform=DetectionTransform())
