"""The generated sets: one geometry for boxes, masks and maps, repeatable, read back by the real loaders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vizoo.train import shapes
from vizoo.train.detection.data import CocoDetection
from vizoo.train.detection.transforms import DetectionTransform
from vizoo.train.segmentation.data import ADE20K
from vizoo.train.segmentation.transforms import ResizeTransform
from vizoo.train.shapes import CLASSES, MAP_CLASSES, make_scene, write_ade, write_coco


def test_boxes_masks_and_map_show_the_same_objects() -> None:
    for index in range(60):
        scene = make_scene(index, size=96)
        height, width = scene.map.shape
        assert scene.image.shape == (height, width, 3)
        assert max(height, width) == 96
        assert len(scene.labels) >= 1
        assert scene.masks.sum(0).max() == 1, "a pixel belongs to one object at most"
        assert np.array_equal(scene.masks.any(0), scene.map > 0)
        for box, label, mask in zip(scene.boxes.astype(int), scene.labels, scene.masks, strict=True):
            x1, y1, x2, y2 = box
            assert set(np.unique(scene.map[mask > 0])) == {label + 1}
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum()
            assert inside.any(0)[[0, -1]].all()
            assert inside.any(1)[[0, -1]].all()


def test_scenes_depend_on_seed_split_index_and_size_only() -> None:
    first, again = make_scene(5), make_scene(5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    others = [make_scene(6), make_scene(5, seed=1), make_scene(5, split="val")]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_sets_are_varied() -> None:
    scenes = [make_scene(index, size=64) for index in range(300)]
    labels = np.concatenate([scene.labels for scene in scenes])
    shares = np.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert shares.min() > 0.5 / len(CLASSES)
    assert {scene.map.shape for scene in scenes} == {(64, 64), (48, 64), (64, 48)}
    hidden = sum(polygon is None for scene in scenes for polygon in scene.polygons)
    assert 0.2 < hidden / len(labels) < 0.8
    assert 3 <= sum(scene.crowd.any() for scene in scenes) <= 30


def test_training_and_held_out_scenes_share_no_photograph() -> None:
    assert not set(shapes._PHOTOS["train"]) & set(shapes._PHOTOS["val"])
    for split, names in shapes._PHOTOS.items():
        photos = shapes._photos(split)
        assert len(photos) == len(names)
        assert all(photo.dtype == np.uint8 and photo.shape[2] == 3 and photo.std() > 5 for photo in photos)


def test_the_coco_loader_reads_the_same_scenes(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 60, size=80, seed=4, split="val")
    data = CocoDetection(tmp_path / "val", path, transform=DetectionTransform(), masks=True, training=False)
    assert data.classes == list(CLASSES)
    assert len(data) == 60
    crowds = 0
    for index in range(60):
        scene, sample = make_scene(index, size=80, seed=4, split="val"), data.sample(index)
        plain = ~scene.crowd
        crowds += int(scene.crowd.sum())
        assert sample.masks is not None
        assert np.array_equal(sample.masks, scene.masks[plain]), "the very pixels, from polygons and from codes"
        assert np.array_equal(sample.boxes, scene.boxes[plain])
        assert np.array_equal(sample.labels, scene.labels[plain])
        assert np.abs(sample.image.astype(int) - scene.image).mean() < 8, "JPEG"
    assert crowds
    assert f"{crowds} crowds" in data.report()


def test_all_forms_of_outlines_are_written(tmp_path: Path) -> None:
    document = json.loads(write_coco(tmp_path, 80, size=64).read_text())
    found = [record["segmentation"] for record in document["annotations"]]
    assert sum(isinstance(form, list) for form in found) > 20
    codes = [form["counts"] for form in found if isinstance(form, dict)]
    assert {type(code) for code in codes} == {str, list}
    assert sum(record["iscrowd"] for record in document["annotations"]) >= 1


def test_the_ade_loader_reads_the_same_scenes(tmp_path: Path) -> None:
    for split, part in (("train", "training"), ("val", "validation")):
        write_ade(tmp_path, 5, size=64, split=split)
        data = ADE20K(tmp_path, part, transform=ResizeTransform(scale=(64, 64)), classes=MAP_CLASSES)
        assert len(data) == 5
        for index in range(5):
            expected = make_scene(index, size=64, split=split).map
            assert np.array_equal(data[index]["target"]["map"].numpy(), expected)


def test_no_part_of_a_file_is_left_and_files_are_the_same_again(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_coco(tmp_path / folder, 3, size=64)
    a, b = ({p.relative_to(tmp_path / f): p.read_bytes() for p in (tmp_path / f).rglob("*.*")} for f in "ab")
    assert a == b
    assert len(a) == 4
    assert not [path for path in a if ".part" in path.name]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'test' of the shapes"):
        make_scene(0, split="test")
    with pytest.raises(ValueError, match="size must be 32 pixels or more, got 16"):
        make_scene(0, size=16)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        write_coco(tmp_path, 0)
    with pytest.raises(ValueError, match="count must be 1 or more, got -1"):
        write_ade(tmp_path, -1)
