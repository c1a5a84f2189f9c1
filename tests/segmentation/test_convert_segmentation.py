"""Checkpoints of whole segmenters: containers, parts, other classes, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vizoo.checkpoint import CheckpointMismatch
from vizoo.train.dense_checkpoint import load_part, split_roots
from vizoo.train.segmentation.convert import load_segmenter_checkpoint
from vizoo.train.segmentation.heads import FPN, FCNHead, MLPHead, SemanticFPNHead, UPerHead
from vizoo.train.segmentation.segmenter import Segmenter

UPERNET: dict[str, Any] = {
    "decode_head": {"type": UPerHead, "channels": 8},
    "auxiliary_head": {"type": FCNHead, "channels": 8},
}
SEMANTIC: dict[str, Any] = {
    "decode_head": {"type": SemanticFPNHead, "channels": 8},
    "neck": {"type": FPN, "channels": 8},
}
Make = Callable[..., Segmenter]


def randomized(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: torch.randn_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}


def test_every_tensor_of_a_published_checkpoint(dense_fixture: Callable[[str], dict[str, Any]]) -> None:
    """Counters and index tables included, which fixtures do not fill."""
    fixture = dense_fixture("upernet_swin_tiny")
    state = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, shape, dtype in fixture["state_dict"]}
    heads = {"decode_head": {"type": UPerHead}, "auxiliary_head": {"type": FCNHead}}
    model = Segmenter({"name": "swin_tiny_patch4_window7_224"}, **heads, num_classes=150)
    report = load_segmenter_checkpoint(model, {"meta": {"epoch": 1}, "state_dict": state, "optimizer": {"state": {}}})
    assert report.layout == "official"
    assert set(report.ignored) == {key for key in state if key.endswith("relative_position_index")}
    assert report.loaded == len(model.state_dict()) == len(state) - len(report.ignored)
    assert not report.fresh


@pytest.mark.parametrize("design", [UPERNET, SEMANTIC])
def test_our_own_checkpoints(make: Make, design: dict[str, Any], tmp_path: Path) -> None:
    state, model = randomized(make(**design)), make(**design)
    torch.save({"state_dict": state, "meta": {"iter": 3}}, tmp_path / "iter_3.pth")
    report = load_segmenter_checkpoint(model, tmp_path / "iter_3.pth")
    assert report.loaded == len(state)
    assert str(report).startswith("iter_3.pth: ")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "amp": {}}])
def test_containers_and_distributed_runs(make: Make, wrap: Any) -> None:
    state, model = randomized(make(**UPERNET)), make(**UPERNET)
    load_segmenter_checkpoint(model, wrap({f"module.{key}": value for key, value in state.items()}))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_auxiliary_head_that_was_not_built_is_dropped(make: Make) -> None:
    state = randomized(make(**UPERNET))
    report = load_segmenter_checkpoint(make(UPERNET["decode_head"]), state)
    assert report.dropped == ["auxiliary_head.*"]
    assert "dropped, not built: auxiliary_head.*" in str(report)


def test_other_classes_start_anew(make: Make) -> None:
    state, model = randomized(make(**UPERNET)), make(**UPERNET, num_classes=7)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_segmenter_checkpoint(model, state)
    fresh = {f"{root}.conv_seg.{kind}" for root in UPERNET for kind in ("weight", "bias")}
    assert set(report.fresh) == fresh
    assert report.adapted == {f"{root}.conv_seg": "5 to 7 classes: newly initialised" for root in UPERNET}
    assert report.loaded == len(state) - 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, first[name] if name in fresh else state[name]), name


def in_mmsegmentations_names(key: str, value: Tensor) -> tuple[str, Tensor]:
    """A tensor as mmsegmentation's own Swin names it; there, merging reads channels by (channel, row, column)."""
    if not key.startswith("backbone."):
        return key, value
    if ".downsample." in key:
        value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
    for ours, theirs in (
        (".layers.", ".stages."),
        (".attn.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        ("patch_embed.proj.", "patch_embed.projection."),
    ):
        key = key.replace(ours, theirs)
    return key, value


def test_mmsegmentations_names(make: Make) -> None:
    state, model = randomized(make(**UPERNET)), make(**UPERNET)
    theirs = dict(in_mmsegmentations_names(*item) for item in state.items())
    assert "backbone.stages.0.blocks.0.ffn.layers.0.0.weight" in theirs
    report = load_segmenter_checkpoint(model, {"state_dict": theirs})
    assert report.loaded == len(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "auxiliary_head."), "has the parts backbone, decode_head, this segmenter auxiliary_head"),
        (lambda s: without(s, "backbone."), "has the parts auxiliary_head, decode_head, this segmenter"),
        (lambda s: s | {"neck.x": torch.ones(1)}, "auxiliary_head, backbone, decode_head, neck, this segmenter"),
        (lambda s: without(s, "decode_head.bottleneck.conv"), "does not fit this UPerHead; 1 missing: bottleneck.conv"),
        (
            lambda s: s | {"decode_head.x": torch.ones(1)},
            "decode_head of state dict does not fit this UPerHead; 1 unexpected: x",
        ),
        (
            lambda s: s | {"auxiliary_head.conv_seg.bias": torch.ones(2, 2)},
            r"this FCNHead; 1 of another shape: conv_seg.bias \(2, 2\) instead of \(5,\)",
        ),
        (lambda s: without(s, "backbone.norm0.weight"), "does not fit this Swin; 1 missing: norm0.weight"),
        (lambda s: without(s, "backbone.norm"), "lacks parts of the backbone: norm0.weight, norm0.bias, norm1"),
        (lambda s: s | {"head.weight": torch.ones(1)}, "start with one of backbone, neck.* 1 do not: head.weight"),
        (lambda s: {}, "there are none at all"),
    ],
)
def test_checkpoints_that_do_not_fit(make: Make, change: Any, message: str) -> None:
    model = make(**UPERNET)
    with pytest.raises(CheckpointMismatch, match=message):
        load_segmenter_checkpoint(model, change(randomized(model)))


def without(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(start)}


def test_a_file_that_is_not_there(make: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_segmenter_checkpoint(make(**UPERNET), tmp_path / "none.pth")


def test_other_heads_are_refused(make: Make) -> None:
    with pytest.raises(CheckpointMismatch, match="decode_head of state dict does not fit this MLPHead"):
        load_segmenter_checkpoint(make({"type": MLPHead, "channels": 8}), randomized(make(UPERNET["decode_head"])))


def test_parts() -> None:
    one = torch.ones(1)
    state = {"module.backbone.a.b": one, "roi_head.bbox_head.0.c": one, "bbox_head.c": one, "rpn_head.d": one}
    expected = {"backbone": {"a.b": one}, "roi_head": {"bbox_head.0.c": one}, "bbox_head": {"c": one}}
    assert split_roots({"state_dict": state}) == expected | {"rpn_head": {"d": one}}


def test_a_part_is_renamed() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    state = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)}
    report = load_part(module, state, renames=[("^fc", "0")], prefix="head")
    assert report.loaded == 2
    assert module[0].weight.eq(1).all()
    with pytest.raises(CheckpointMismatch, match=r"head: two entries are named 0\.bias, one is fd\.bias"):
        load_part(module, state | {"fd.bias": torch.ones(3)}, renames=[("^f.", "0")], prefix="head")
