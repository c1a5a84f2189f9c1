"""What the official detectors compute is what these compute, loaded through the path that real checkpoints take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from vizoo import LoadReport
from vizoo.train.detection import CascadeMaskRCNN, Detector, MaskRCNN, RetinaNet, load_detector_checkpoint
from vizoo.train.detection.masks import paste_soft

COPIES = Path(__file__).resolve().parents[1] / "parity_dense"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "parity_dense"
NAME = "swin_tiny_patch4_window7_224"
MODELS: dict[str, Callable[[], Detector]] = {
    "mask_rcnn_swin_tiny": lambda: MaskRCNN({"name": NAME}),
    "cascade_mask_rcnn_swin_tiny": lambda: CascadeMaskRCNN({"name": NAME}),
    "retinanet_swin_tiny": lambda: RetinaNet({"name": NAME, "out_indices": (1, 2, 3)}),
    "mask_rcnn_swin_tiny_mmdet3": lambda: MaskRCNN({"name": NAME}, rpn={"drop_empty": True}),
}


class Loaded(NamedTuple):
    fixture: dict[str, Any]
    model: Detector
    report: LoadReport
    state: dict[str, Tensor]


def device() -> str:
    return "cuda" if os.environ.get("VIZOO_TEST_DEVICE") == "cuda" else "cpu"


@pytest.fixture(scope="module", params=MODELS)
def loaded(
    request: pytest.FixtureRequest, parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]]
) -> Loaded:
    fixture = dense_fixture(request.param)
    state = parity.fill_state_dict(fixture)
    model = MODELS[request.param]().eval()
    report = load_detector_checkpoint(model, state)
    return Loaded(fixture, model.to(device()), report, state)


def test_every_official_entry_is_loaded(loaded: Loaded) -> None:
    fixture, model, report, state = loaded
    assert not report.fresh
    assert not report.dropped
    assert not report.adapted
    assert report.ignored == []  # index tables are no part of a filled state
    counters = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    assert report.loaded == len(state) + len(counters) == len(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == fixture["n_params"]


@torch.no_grad()
def test_official_outputs(loaded: Loaded, parity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default, with 10 bits of mantissa
    for case in loaded.fixture["goldens"]:
        given = case["input"]
        batch = parity.image(given["shape"], given["seed"]).to(device())
        got = outputs(loaded.model, batch, given)
        assert set(case["outputs"]) <= set(got)
        for name in case["outputs"]:
            parity.check(case, name, got[name].cpu())


def outputs(model: Detector, batch: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    """All that the fixtures name."""
    size, original = tuple(given["img_shape"]), tuple(given["ori_shape"])
    stages = model.backbone(batch)
    maps = model.neck(stages)
    got = {f"stage{i}": m for i, m in enumerate(stages, 5 - len(stages))}
    got |= {f"fpn{i}": m for i, m in enumerate(maps)}
    found = model.detect(batch, [size], [original])[0]
    got |= {f"det_{name}": found[name] for name in ("boxes", "scores", "labels")}
    if isinstance(model, RetinaNet):
        return got | dense_outputs(model, maps)
    got["det_mask_area"] = found["masks"].flatten(1).sum(dim=1)
    got |= proposal_outputs(cast(MaskRCNN, model), maps, size)
    if "rois" in given:
        rois = torch.tensor(given["rois"], device=batch.device)
        heads = cascade_outputs if isinstance(model, CascadeMaskRCNN) else box_outputs
        got |= heads(cast(Any, model), maps, rois[:, 1:], size)
    return got


def dense_outputs(model: RetinaNet, maps: list[Tensor]) -> dict[str, Tensor]:
    got = {f"anchors{i}": level for i, level in enumerate(model.head.anchors(maps))}
    for i, level in enumerate(maps):
        sides = level.shape[-2:]
        logits, deltas = model.head([level])
        got[f"retina_cls{i}"] = logits.view(1, *sides, -1).permute(0, 3, 1, 2)
        got[f"retina_reg{i}"] = deltas.view(1, *sides, -1).permute(0, 3, 1, 2)
    return got


def proposal_outputs(model: MaskRCNN, maps: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    objectness, deltas = model.rpn.head(maps)
    got = {f"rpn_cls{i}": level for i, level in enumerate(objectness)}
    got |= {f"rpn_reg{i}": level for i, level in enumerate(deltas)}
    got |= {f"anchors{i}": level for i, level in enumerate(model.rpn.anchor_generator(maps))}
    boxes, scores = model.rpn.propose(model.rpn.score(maps), [size])
    return {**got, "proposals": torch.cat([boxes[0], scores[0][:, None]], dim=1)}


def box_outputs(model: MaskRCNN, maps: list[Tensor], rois: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    pooled, large = model.box.pooler(maps[:4], [rois]), model.mask.pooler(maps[:4], [rois])
    logits, deltas = model.box.head(pooled)
    masks = model.mask.heads[0](large)
    kept = [i for i in range(len(rois)) if i != 8]  # roi 8 has no width
    every = torch.arange(model.num_classes, device=rois.device).repeat(len(rois))
    decoded = model.box.refine(deltas.view(-1, 4).repeat(1, 80), every, rois.repeat_interleave(80, dim=0), size)
    return {
        "roi_feat7": pooled,
        "roi_level": model.box.pooler.levels(rois),
        "box_cls": logits,
        "box_reg": deltas,
        "box_decoded": decoded.view(len(rois), -1),
        "roi_feat14": large,
        "mask_logits": masks,
        "pasted_class3": paste_soft(masks[kept, 3].sigmoid(), rois[kept], 256, 320),
    }


def cascade_outputs(
    model: CascadeMaskRCNN, maps: list[Tensor], rois: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    got = {}
    large = model.mask.pooler(maps[:4], [rois])
    for i, stage in enumerate(model.box.branches):
        logits, deltas = stage(maps[:4], [rois])
        got |= {f"box_cls_s{i}": logits, f"box_reg_s{i}": deltas, f"mask_logits_s{i}": model.mask.heads[i](large)}
        rois = model.box.refine(i, logits, deltas, [rois], [size])[0]
        got[f"rois_after_s{i}"] = torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1)
    return got


def test_every_detector_has_a_fixture_and_a_copy() -> None:
    names = {path.stem for path in COPIES.glob("*.json")}
    assert set(MODELS) <= names


@pytest.mark.skipif(not SHARED.is_dir(), reason="the original fixtures are not beside this checkout")
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_the_originals(name: str) -> None:
    assert (COPIES / f"{name}.json").read_bytes() == (SHARED / f"{name}.json").read_bytes()
