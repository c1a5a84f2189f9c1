"""What the official segmenters compute is what ours compute, loaded through the path that real checkpoints take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.train.segmentation.convert import load_segmenter_checkpoint
from vizoo.train.segmentation.heads import FPN, FCNHead, SemanticFPNHead, UPerHead
from vizoo.train.segmentation.inference import Sliding, Whole
from vizoo.train.segmentation.segmenter import Segmenter

COPIES = Path(__file__).resolve().parents[1] / "parity_dense"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "parity_dense"

DESIGNS: dict[str, dict[str, Any]] = {
    "upernet_swin_tiny": {
        "backbone": {"name": "swin_tiny_patch4_window7_224"},
        "decode_head": {"type": UPerHead},
        "auxiliary_head": {"type": FCNHead},
    },
    "semantic_fpn": {
        "backbone": {"name": "litv2_s"},
        "neck": {"type": FPN},
        "decode_head": {"type": SemanticFPNHead},
    },
}


def build(name: str) -> Segmenter:
    if DESIGNS[name]["backbone"]["name"] not in vizoo.list_models():
        pytest.skip(f"the zoo does not have {DESIGNS[name]['backbone']['name']} yet")
    return Segmenter(**DESIGNS[name], num_classes=150).eval()


def watch(module: nn.Module, found: dict[str, Tensor], name: str) -> None:
    """Keep what a module gives the first time; a hook that returns something would replace the output."""

    def keep(_: nn.Module, args: Any, out: Tensor) -> None:
        found.setdefault(name, out)

    module.register_forward_hook(keep)


def watch_input(module: nn.Module, found: dict[str, Tensor], name: str) -> None:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, args[0])

    module.register_forward_pre_hook(keep)


@torch.no_grad()
def outputs(model: Segmenter, x: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that a fixture names, by names."""
    found: dict[str, Tensor] = {f"stage{i}": y for i, y in enumerate(model.backbone(x), 1)}
    watch_input(model.decode_head.conv_seg, found, "before_conv_seg")
    if isinstance(model.decode_head, UPerHead):
        watch(model.decode_head.bottleneck, found, "ppm_bottleneck")
    maps = model.maps(x)
    if model.neck is not None:
        found |= {f"fpn{i}": y for i, y in enumerate(maps)}
    found["decode_logits"] = model.decode_head(maps)
    if model.auxiliary_head is not None:
        found["aux_logits"] = model.auxiliary_head(maps)
    found["logits"] = Whole().at_input_size(model.logits, x)
    found["logits_ori"] = Whole()(model.logits, x, tuple(case["input"]["ori_shape"]))
    slide = case["input"]["slide"]
    mode = Sliding(crop=tuple(slide["crop_size"]), stride=tuple(slide["stride"]))
    found["slide_logits"] = mode.at_input_size(model.logits, x)
    return found


@pytest.mark.parametrize("name", DESIGNS)
def test_official_outputs(
    name: str, parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture, model = dense_fixture(name), build(name)
    report = load_segmenter_checkpoint(model, {"state_dict": parity.fill_state_dict(fixture), "meta": {}})
    assert sum(p.numel() for p in model.parameters()) == fixture["n_params"]
    assert not report.fresh
    assert not report.dropped
    for case in fixture["goldens"]:
        found = outputs(model, parity.image(case["input"]["shape"], case["input"]["seed"]), case)
        for output in case["outputs"]:
            parity.check(case, output, found[output])


def test_neck_and_head_of_semantic_fpn_take_the_official_tensors(
    parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]]
) -> None:
    """Through a whole model; the zoo's own backbone of that fixture is still to come."""
    fixture = dense_fixture("semantic_fpn")
    state = {k: v for k, v in parity.fill_state_dict(fixture).items() if not k.startswith("backbone.")}
    model = Segmenter(
        **{**DESIGNS["semantic_fpn"], "backbone": {"name": "swin_tiny_patch4_window7_224"}}, num_classes=150
    )
    backbone = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    report = load_segmenter_checkpoint(model, state | backbone)
    counters = sum(key.endswith("num_batches_tracked") for key in model.decode_head.state_dict())
    assert report.loaded == len(state) + len(backbone) + counters
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_copies_are_the_originals() -> None:
    if not SHARED.is_dir():
        pytest.skip("the original fixtures are not beside this checkout; the copies under tests/parity_dense are used")
    for name in DESIGNS:
        assert (COPIES / f"{name}.json").read_bytes() == (SHARED / f"{name}.json").read_bytes()
