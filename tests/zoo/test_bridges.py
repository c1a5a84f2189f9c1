"""What the bridges to other libraries share, and the one to torchvision, by its own detectors."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.dense import create_dense, freeze
from vizoo.registry import families, resolve
from vizoo.weights.errors import UnverifiedWeightsWarning
from vizoo.weights.store import import_file

FAMILIES = sorted(families())
# The families whose maps have the strides that detectors and decoders count on.
PYRAMIDS = [
    f
    for f in FAMILIES
    if [s.stride for s in vizoo.describe(next(iter(families()[f].variants))).stages] == [4, 8, 16, 32]
]
SWIN = "swin_tiny_patch4_window7_224"


def first(family: str) -> str:
    """A variant of the family."""
    return next(iter(families()[family].variants))


def tiny(family: str) -> dict[str, Any]:
    """Overrides that make it run in milliseconds."""
    return dict(families()[family].tiny)


def reached(module: nn.Module) -> set[str]:
    """Names of the parameters that a backward pass has come to; a gradient may be zero in a new model."""
    return {name for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_takes_the_stem_and_the_first_stage(family: str) -> None:
    model = create_dense(first(family), **tiny(family))
    stem, *stages = [f"{model.stem_name.rpartition('.')[0]}.", *(f"{stage.name}." for stage in model.stages)]
    modules = freeze(model, 1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    early = {name for name, _ in model.named_parameters() if name.startswith((stem, stages[0]))}
    late = {name for name, _ in model.named_parameters() if name.startswith(tuple(stages[1:]))}
    assert early
    assert early <= frozen
    assert not frozen & late
    own = set(model.parameters(recurse=False))  # tokens and position tables, in no module that has a mode
    held = {parameter for module in modules for parameter in module.parameters()}
    assert held == {parameter for parameter in model.parameters() if not parameter.requires_grad} - own


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_nothing_and_the_stem_alone(family: str) -> None:
    model = create_dense(first(family), **tiny(family))
    assert freeze(model, -1) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze(model, 0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert f"{model.stem_name}.weight" in frozen
    assert not any(name.startswith(f"{model.stages[0].name}.") for name in frozen)


def test_freezing_more_stages_than_there_are() -> None:
    model = create_dense(SWIN, **tiny("swin"))
    for count in (-2, 5):
        with pytest.raises(ValueError, match=rf"frozen_stages must lie in -1\.\.4 .* got {count}"):
            freeze(model, count)


def test_a_dense_backbone_has_the_norms_of_the_dense_code_unless_told_otherwise() -> None:
    assert isinstance(create_dense(SWIN, **tiny("swin")).get_submodule("norm0"), nn.Module)
    assert not hasattr(create_dense(SWIN, output_norms=False, **tiny("swin")), "norm0")


@pytest.mark.parametrize(
    ("call", "library"),
    [("as_torchvision_backbone", "torchvision"), ("register_timm", "timm"), ("register_mmengine", "mmengine")],
)
def test_a_missing_library_is_named(call: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"vizoo.{library}_bridge", raising=False)
    for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [SWIN] if call == "as_torchvision_backbone" else []
    with pytest.raises(ImportError, match=rf"vizoo\.{call}\(\) needs {library}>=.*pip install"):
        getattr(vizoo, call)(*arguments)


# torchvision.


@pytest.fixture
def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sides with two objects each."""
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    targets = []
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    return images, targets


def detector(kind: str, family: str) -> nn.Module:
    """A torchvision detector on a tiny backbone, made as torchvision's documentation makes one."""
    detection = pytest.importorskip("torchvision.models.detection")
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    sizes = {"min_size": 64, "max_size": 96}
    if kind in ("FasterRCNN", "MaskRCNN"):
        backbone = vizoo.as_torchvision_backbone(first(family), fpn_channels=32, **tiny(family))
        return getattr(detection, kind)(backbone, num_classes=3, **sizes)
    backbone = vizoo.as_torchvision_backbone(
        first(family), out_indices=(1, 2, 3), fpn_channels=32, extra_blocks=LastLevelP6P7(32, 32), **tiny(family)
    )
    ratios, edges = ((1.0,), (8, 16, 32, 64, 128)) if kind == "FCOS" else ((0.5, 1.0, 2.0), (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(tuple((edge,) for edge in edges), (ratios,) * 5)
    return getattr(detection, kind)(backbone, num_classes=3, anchor_generator=anchors, **sizes)


# Every family once, and every detector once.
DETECTORS = [
    *(("FasterRCNN", family) for family in PYRAMIDS),
    ("MaskRCNN", "swin"),
    ("RetinaNet", "swin"),
    ("FCOS", "davit"),
]


@pytest.mark.parametrize(("kind", "family"), DETECTORS)
def test_torchvision_detectors_train_and_predict(kind: str, family: str, scene: Any) -> None:
    images, targets = scene
    model = detector(kind, family)
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    body = {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}
    assert body <= reached(model)
    assert model.get_parameter(f"backbone.body.{model.backbone.body.stem_name}.weight").grad.abs().sum() > 0
    with torch.inference_mode():
        found = model.eval()(images)
    assert [set(one) >= {"boxes", "scores", "labels"} for one in found] == [True, True]


def test_the_pyramid_has_the_maps_that_torchvision_expects() -> None:
    pytest.importorskip("torchvision")
    model = vizoo.as_torchvision_backbone(SWIN, out_indices=(1, 3), fpn_channels=24, **tiny("swin")).eval()
    maps = model(torch.randn(2, 3, 70, 100))
    assert {name: tuple(y.shape) for name, y in maps.items()} == {
        "0": (2, 24, 9, 13),
        "1": (2, 24, 3, 4),
        "pool": (2, 24, 2, 2),
    }
    assert model.out_channels == 24


def test_a_torchvision_backbone_survives_pickling() -> None:
    pytest.importorskip("torchvision")
    model = vizoo.as_torchvision_backbone(SWIN, **tiny("swin")).eval()
    copy, x = pickle.loads(pickle.dumps(model)), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(copy(x), model(x))


def test_wrong_arguments_of_a_torchvision_backbone() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="fpn_channels must be 1 or more, got 0"):
        vizoo.as_torchvision_backbone(SWIN, fpn_channels=0, **tiny("swin"))
    with pytest.raises(TypeError, match="SwinConfig has no field 'window'; did you mean 'window_size'"):
        vizoo.as_torchvision_backbone(SWIN, window=4)
    with pytest.raises(ValueError, match="unknown model 'swin_tinny"):
        vizoo.as_torchvision_backbone("swin_tinny")


def test_a_pretrained_torchvision_backbone_holds_the_weights(tiny_model: str, official_file: Path) -> None:
    pytest.importorskip("torchvision")
    import_file(resolve(tiny_model).variant.weights["plain"], official_file)
    with pytest.warns(UnverifiedWeightsWarning):
        model: Any = vizoo.as_torchvision_backbone(tiny_model, pretrained=True)
    state = torch.load(official_file, weights_only=True)["model"]
    assert torch.equal(model.body.patch_embed.proj.weight, state["patch_embed.proj.weight"])
