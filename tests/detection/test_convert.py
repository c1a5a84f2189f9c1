"""Whole checkpoints: both official layouts, our own, any container, and nothing that does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo import CheckpointMismatch
from vizoo.backbones.swin import gather_cells, merging_order
from vizoo.train.detection import (
    CascadeMaskRCNN,
    Detector,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    load_detector_checkpoint,
)

Make = Callable[..., Detector]
State = dict[str, Tensor]
FIXTURES = {
    MaskRCNN: "mask_rcnn_swin_tiny",
    CascadeMaskRCNN: "cascade_mask_rcnn_swin_tiny",
    RetinaNet: "retinanet_swin_tiny",
}
# As deep as the official heads, so that all their names occur.
DEEP: dict[type[Detector], dict[str, Any]] = {
    MaskRCNN: {"mask": {"hidden": (8,) * 4}},
    CascadeMaskRCNN: {"box": {"hidden": (16,), "convs": (8,) * 4}, "mask": {"hidden": (8,) * 4}},
    RetinaNet: {},
}
every = pytest.mark.parametrize("kind", FIXTURES, ids=lambda kind: kind.__name__)


@pytest.fixture
def official(make: Make, dense_fixture: Callable[[str], dict[str, Any]]) -> Callable[..., tuple[Detector, State]]:
    """A small detector, and other weights for it under the official names."""

    def build(kind: type[Detector]) -> tuple[Detector, State]:
        model, source = (make(kind, **DEEP[kind]).state_dict() for _ in range(2))
        assert not torch.equal(model["neck.inner_blocks.0.0.weight"], source["neck.inner_blocks.0.0.weight"])
        state = {key: value for key, value in source.items() if key.startswith("backbone.")}
        for key, _, _ in dense_fixture(FIXTURES[kind])["state_dict"]:
            if not key.startswith("backbone."):
                state[key] = source[ours(kind, key)]
        assert len(state) == len(source)
        return make(kind, **DEEP[kind]), state

    return build


def ours(kind: type[Detector], key: str) -> str:
    for pattern, replacement in kind.official_keys:
        key = re.sub(pattern, replacement, key)
    return key


def as_mmdetection3(state: State) -> State:
    """The backbone's names and order of merged channels in mmdetection's own Swin."""
    renames = (
        (r"^backbone\.layers\.", "backbone.stages."),
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    )
    found = {}
    for key, value in state.items():
        if ".downsample." in key:
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key) if key.startswith("backbone.") else key
        found[key] = value
    return found


def check(kind: type[Detector], model: Detector, state: State) -> None:
    """The model holds exactly this official state."""
    own = model.state_dict()
    assert len(own) == len(state)
    for key, value in state.items():
        assert torch.equal(own[ours(kind, key)], value), key


@every
def test_official_names(kind: type[Detector], official: Callable[..., tuple[Detector, State]]) -> None:
    model, state = official(kind)
    report = load_detector_checkpoint(model, state)
    check(kind, model, state)
    assert report.loaded == len(state)
    assert report.layout == "official"
    assert not report.fresh
    assert not report.dropped


@every
def test_mmdetection_3_names(kind: type[Detector], official: Callable[..., tuple[Detector, State]]) -> None:
    model, state = official(kind)
    report = load_detector_checkpoint(model, as_mmdetection3(state))
    check(kind, model, state)
    assert "mmdetection" in report.layout


def test_merged_channels_of_mmdetection() -> None:
    """mmdetection unfolds 2 x 2 cells, which puts the channel first."""
    x, weight = torch.randn(2, 5, 6, 8), torch.randn(10, 20)
    theirs = F.linear(F.unfold(x, 2, stride=2).transpose(1, 2), weight)
    cells = gather_cells(x.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(F.linear(cells, merging_order(weight)), theirs)


def test_files_containers_and_wrappers(official: Callable[..., tuple[Detector, State]], tmp_path: Path) -> None:
    model, state = official(MaskRCNN)
    wrapped = {f"module.{key}": value for key, value in state.items()}
    wrapped["module.backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    file = tmp_path / "epoch_36.pth"
    torch.save({"meta": {"epoch": 36}, "optimizer": {"lr": 1e-4}, "state_dict": wrapped}, file)
    report = load_detector_checkpoint(model, file)
    check(MaskRCNN, model, state)
    assert report.source == "epoch_36.pth"
    assert report.ignored == ["backbone.layers.0.blocks.0.attn.relative_position_index"]
    assert f"{len(state)} tensors loaded" in str(report)
    other, _ = official(MaskRCNN)
    load_detector_checkpoint(other, {"meta": {}, "state_dict": wrapped})
    check(MaskRCNN, other, state)


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, CascadeMaskRCNN, RetinaNet], ids=lambda kind: kind.__name__)
def test_our_own_checkpoints(kind: type[Detector], make: Make) -> None:
    model, source = make(kind), make(kind).state_dict()
    report = load_detector_checkpoint(model, {"state_dict": source, "message_hub": {}})
    assert report.layout == "vizoo"
    assert report.loaded == len(source)
    assert all(torch.equal(source[key], value) for key, value in model.state_dict().items())


def test_nothing_may_be_missing_left_over_or_of_another_shape(official: Callable[..., tuple[Detector, State]]) -> None:
    model, state = official(MaskRCNN)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def refused(changed: State, match: str) -> None:
        with pytest.raises(CheckpointMismatch, match=match):
            load_detector_checkpoint(model, changed)

    without = {key: value for key, value in state.items() if key != "rpn_head.rpn_cls.bias"}
    refused(without, r"1 missing: rpn\.head\.cls_logits\.bias")
    refused({**state, "roi_head.mask_iou_head.fc.weight": torch.zeros(1)}, r"1 unexpected: roi_head\.mask_iou_head")
    refused({**state, "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 64)}, r"\(81, 64\) instead of \(4, 64\)")
    refused({**state, "decoder.weight": torch.zeros(1)}, r"1 do not: decoder\.weight")
    heads = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    refused(heads, "holds no backbone, only neck, rpn_head, roi_head")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    refused({**state, "backbone.layers.9.weight": torch.zeros(1)}, r"1 unexpected: layers\.9\.weight")


def test_output_norms_must_be_in_the_checkpoint(official: Callable[..., tuple[Detector, State]]) -> None:
    model, state = official(MaskRCNN)
    state = {key: value for key, value in state.items() if not re.match(r"backbone\.norm\d", key)}
    with pytest.raises(CheckpointMismatch, match=r"lacks parts of the backbone: norm0\.weight"):
        load_detector_checkpoint(model, state)


def test_the_norm_of_an_unused_stage_is_dropped(official: Callable[..., tuple[Detector, State]]) -> None:
    """Where RetinaNet starts at the second of four outputs, checkpoints hold a norm of the first."""
    model, state = official(RetinaNet)
    norm = {f"backbone.norm0.{name}": torch.zeros(16) for name in ("weight", "bias")}
    assert load_detector_checkpoint(model, {**state, **norm}).dropped == list(norm)
    check(RetinaNet, model, state)


def test_another_detector_is_refused(make: Make, official: Callable[..., tuple[Detector, State]]) -> None:
    _, state = official(CascadeMaskRCNN)
    with pytest.raises(CheckpointMismatch, match=r"missing: .*box\.head\.features"):
        load_detector_checkpoint(make(MaskRCNN), state)


def test_counters_may_be_absent(official: Callable[..., tuple[Detector, State]]) -> None:
    model, state = official(CascadeMaskRCNN)
    load_detector_checkpoint(model, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    assert torch.equal(
        model.state_dict()["box.stages.1.head.features.3.1.running_var"],
        state["roi_head.bbox_head.1.shared_convs.3.bn.running_var"],
    )


def test_missing_files(make: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_detector_checkpoint(make(FasterRCNN), tmp_path / "nowhere.pth")
