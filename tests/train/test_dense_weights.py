"""The table of published detectors and segmenters: names, facts, and models of the published sizes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import vizoo
from vizoo.train import dense_weights
from vizoo.train.dense_weights import TASKS, find_dense, is_dense, list_dense, resolve_dense

TINY = "swin_tiny_patch4_window7_224"
# Rounded to millions by the authors.
PUBLISHED = {
    f"mask_rcnn.{TINY}.coco_1x": (48, {"box_ap": 43.7, "mask_ap": 39.8}),
    f"mask_rcnn.{TINY}.coco_3x": (48, {"box_ap": 46.0, "mask_ap": 41.6}),
    "mask_rcnn.swin_small_patch4_window7_224.coco_3x": (69, {"box_ap": 48.5, "mask_ap": 43.3}),
    f"cascade_mask_rcnn.{TINY}.coco_1x": (86, {"box_ap": 48.1, "mask_ap": 41.7}),
    f"cascade_mask_rcnn.{TINY}.coco_3x": (86, {"box_ap": 50.4, "mask_ap": 43.7}),
    "cascade_mask_rcnn.swin_small_patch4_window7_224.coco_3x": (107, {"box_ap": 51.9, "mask_ap": 45.0}),
    "cascade_mask_rcnn.swin_base_patch4_window7_224.coco_3x": (145, {"box_ap": 51.9, "mask_ap": 45.0}),
    f"mask_rcnn.{TINY}.mmdet_coco_1x": (48, {"box_ap": 42.7, "mask_ap": 39.3}),
    f"mask_rcnn.{TINY}.mmdet_coco_3x": (48, {"box_ap": 46.0, "mask_ap": 41.6}),
    f"upernet.{TINY}.ade20k_160k": (60, {"miou": 44.51, "miou_ms_flip": 45.81}),
    "upernet.swin_small_patch4_window7_224.ade20k_160k": (81, {"miou": 47.64, "miou_ms_flip": 49.47}),
    "upernet.swin_base_patch4_window7_224.ade20k_160k": (121, {"miou": 48.13, "miou_ms_flip": 49.72}),
    "semantic_fpn.litv2_s.ade20k_80k": (31, {"miou": 44.3}),
}
# Whole millions, without the parameters that belong to no layer.
PLAINMAMBA = {
    "mask_rcnn.plainmamba_l1.coco_1x": (31, {"box_ap": 44.1, "mask_ap": 39.1}),
    "mask_rcnn.plainmamba_l2.coco_1x": (53, {"box_ap": 46.0, "mask_ap": 40.6}),
    "mask_rcnn.plainmamba_l3.coco_1x": (79, {"box_ap": 46.8, "mask_ap": 41.2}),
    "retinanet.plainmamba_l1.coco_1x": (19, {"box_ap": 41.7}),
    "retinanet.plainmamba_l2.coco_1x": (40, {"box_ap": 43.9}),
    "retinanet.plainmamba_l3.coco_1x": (67, {"box_ap": 44.8}),
    "upernet.plainmamba_l1.ade20k_160k": (35, {"miou": 44.1}),
    "upernet.plainmamba_l2.ade20k_160k": (55, {"miou": 46.8}),
    "upernet.plainmamba_l3.ade20k_160k": (81, {"miou": 49.1}),
}


def test_the_table_is_what_was_published() -> None:
    found = {r.name: (round((r.weights.params or 0) / 1e6), dict(r.weights.metrics)) for r in dense_weights._TABLE}
    assert {name: values for name, values in found.items() if name in PUBLISHED} == PUBLISHED
    assert {name: values[1] for name, values in found.items() if name not in PUBLISHED} == {
        name: metrics for name, (_, metrics) in PLAINMAMBA.items()
    }
    for name, (millions, _) in PLAINMAMBA.items():
        assert found[name][0] - millions in (0, 1)
    assert len({record.weights.url for record in dense_weights._TABLE}) == len(found)
    for record in dense_weights._TABLE:
        assert record.weights.license == "Apache-2.0"
        assert record.weights.container == "state_dict"
        assert record.weights.repository
        assert record.weights.commit
        assert record.weights.num_classes == {"coco": 80, "ade20k": 150}[record.weights.labels]


def test_only_models_that_can_be_built_are_listed() -> None:
    listed = {record.name for record in list_dense()}
    assert listed == {name for name in (*PUBLISHED, *PLAINMAMBA) if name.split(".")[1] in vizoo.list_models()}


@pytest.mark.parametrize("name", [record.name for record in list_dense()])
def test_models_have_the_stated_size(name: str) -> None:
    record = find_dense(name)
    with torch.device("meta"):
        model = record.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == record.weights.params
    assert model.num_classes == record.weights.num_classes


def test_filters() -> None:
    assert {task: {r.task for r in list_dense(task=task)} for task in TASKS} == {task: {task} for task in TASKS}
    assert [r.name for r in list_dense("upernet.*base*")] == ["upernet.swin_base_patch4_window7_224.ade20k_160k"]
    assert len(list_dense("*swin*coco_1x")) == 3
    assert list_dense(family="davit") == []
    assert list_dense(family="swin") == list_dense(mixer="window attention")
    assert {record.name for record in list_dense(family="plainmamba")} == set(PLAINMAMBA)
    with pytest.raises(ValueError, match="unknown task 'detct'; did you mean 'detect'"):
        list_dense(task="detct")


def test_names() -> None:
    assert is_dense(f"mask_rcnn.{TINY}.anything")
    assert not is_dense(f"{TINY}.in1k")
    with pytest.raises(ValueError, match=rf"unknown weights 'mask_rcnn\.{TINY}\.coco_4x' .*; did you mean 'mask_rcnn"):
        find_dense(f"mask_rcnn.{TINY}.coco_4x")
    with pytest.raises(ValueError, match="is a model to segment, not to detect: pass --task segment"):
        find_dense(f"upernet.{TINY}.ade20k_160k", "detect")


def test_a_name_without_a_file_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    name = f"cascade_mask_rcnn.{TINY}.coco_3x"
    with pytest.raises(RuntimeError, match=f"offline mode is on .*{re.escape(find_dense(name).weights.url)}"):
        resolve_dense(name)


def test_the_table_alone_is_quick_to_import() -> None:
    heavy = ("mmengine", "cv2", "torchvision")
    code = f"import sys, vizoo.train.dense_weights; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
