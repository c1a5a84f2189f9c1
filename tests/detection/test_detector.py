"""The contract of all detectors: modes, predictions, freezing, precision, batches without objects, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor

import vizoo
from vizoo.registry import resolve
from vizoo.train.detection import CascadeMaskRCNN, Detector, FasterRCNN, MaskRCNN, RetinaNet
from vizoo.train.optim import AutocastOptimWrapper

Batch = dict[str, Any]
Make = Callable[..., Detector]
KINDS = (FasterRCNN, MaskRCNN, CascadeMaskRCNN, RetinaNet)
SECOND = {"loss_classifier", "loss_box_reg", "loss_mask"}
KEYS = {
    FasterRCNN: {"loss_rpn_objectness", "loss_rpn_box", "loss_classifier", "loss_box_reg"},
    MaskRCNN: {"loss_rpn_objectness", "loss_rpn_box", *SECOND},
    CascadeMaskRCNN: {
        "loss_rpn_objectness",
        "loss_rpn_box",
        *(f"stage{i}_{key}" for i in (1, 2, 3) for key in SECOND),
    },
    RetinaNet: {"loss_classifier", "loss_box_reg"},
}

every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@every
def test_losses_have_names_and_gradients(kind: type[Detector], make: Make, batch: Batch) -> None:
    model = make(kind).train()
    losses = model(**batch, mode="loss")
    assert set(losses) == KEYS[kind]
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every
def test_batches_without_objects(kind: type[Detector], make: Make, empty: Batch) -> None:
    model = make(kind).train()
    losses = model(**empty, mode="loss")
    assert set(losses) == KEYS[kind]
    assert all(value.isfinite() for value in losses.values())
    for name, value in losses.items():
        if "box" in name or "mask" in name:
            assert value == 0
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # DDP needs every one


@every
def test_autocast_keeps_losses_in_float32(kind: type[Detector], make: Make, batch: Batch) -> None:
    model = make(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**batch, mode="loss")
        found = model.eval()(**batch, mode="predict")
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(prediction["boxes"].dtype == torch.float32 for prediction in found)


@every
def test_predictions(kind: type[Detector], make: Make, batch: Batch) -> None:
    model = make(kind).eval()
    targets = [{"image_id": 7, "original_size": (192, 48)}, {"image_id": 9, "original_size": (40, 60)}]
    images = [batch["images"][0], batch["images"][1][:, :80, :90].contiguous()]
    weight = model.head.head.classification_head.cls_logits if isinstance(model, RetinaNet) else None
    if weight is not None:
        torch.nn.init.zeros_(weight.bias)  # from the prior of 0.01 nothing would be found
    with torch.no_grad():
        found = model(images, targets, mode="predict")
    for prediction, target in zip(found, targets, strict=True):
        height, width = target["original_size"]
        count = len(prediction["scores"])
        assert 0 < count <= 100
        assert prediction["boxes"].shape == (count, 4)
        assert prediction["boxes"].min() >= 0
        assert (prediction["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert (prediction["scores"].diff() <= 0).all()
        assert prediction["scores"].min() > 0.05
        assert prediction["labels"].dtype == torch.int64
        assert prediction["labels"].max() < 3
        assert prediction["image_id"] == target["image_id"]
        assert prediction["original_size"] == (height, width)
        assert ("masks" in prediction) == kind.needs_masks
        if kind.needs_masks:
            assert prediction["masks"].dtype == torch.bool
            assert prediction["masks"].shape == (count, height, width)


@every
def test_an_image_does_not_depend_on_its_neighbours(kind: type[Detector], make: Make, batch: Batch) -> None:
    model = make(kind).eval()
    with torch.no_grad():
        both, alone = model(batch["images"], mode="predict"), model(batch["images"][1:], mode="predict")
    torch.testing.assert_close(both[1]["scores"], alone[0]["scores"])
    torch.testing.assert_close(both[1]["boxes"], alone[0]["boxes"], atol=1e-3, rtol=1e-4)


def test_nothing_found(make: Make, batch: Batch) -> None:
    model = make(MaskRCNN, box={"hidden": (64, 64), "score_threshold": 0.99}).eval()
    with torch.no_grad():
        found = model(**batch, mode="predict")
    assert [p["boxes"].shape for p in found] == [(0, 4)] * 2
    assert [p["masks"].shape for p in found] == [(0, 96, 96)] * 2
    cascade = make(CascadeMaskRCNN, box={"hidden": (64,), "convs": (32,), "score_threshold": 0.99}).eval()
    with torch.no_grad():
        assert [len(p["masks"]) for p in cascade(**batch, mode="predict")] == [0, 0]


def test_scores_do_not_depend_on_the_original_size(make: Make, batch: Batch) -> None:
    model = make(MaskRCNN).eval()
    with torch.no_grad():
        same = model(batch["images"], mode="predict")
        large = model(batch["images"], [{"original_size": (192, 288)}] * 2, mode="predict")
    for one, other in zip(same, large, strict=True):
        assert torch.equal(one["scores"], other["scores"])
        torch.testing.assert_close(other["boxes"], one["boxes"] * torch.tensor([3.0, 2.0, 3.0, 2.0]))


def test_tensor_mode_gives_the_pyramid(make: Make, batch: Batch) -> None:
    maps = make(MaskRCNN)(batch["images"])
    assert [tuple(m.shape) for m in maps] == [(2, 32, s, s) for s in (24, 12, 6, 3, 2)]
    maps = make(RetinaNet)(batch["images"])
    assert [tuple(m.shape) for m in maps] == [(2, 32, s, s) for s in (12, 6, 3, 2, 1)]


def test_images_are_normalised_and_padded(make: Make) -> None:
    model = make(FasterRCNN)
    bytes_ = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    batch = model.batcher([bytes_, torch.zeros(3, 33, 40, dtype=torch.uint8)])
    assert batch.shape == (2, 3, 64, 96)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (bytes_.float() - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(batch[0, :, :50, :70], expected)
    assert not batch[0, :, 50:].any()
    assert not batch[0, :, :, 70:].any()


def test_frozen_stages(make: Make, batch: Batch) -> None:
    model = make(FasterRCNN, frozen_stages=2).train()
    total(model(**batch, mode="loss")).backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith("backbone.") and _is_early(name, 2)
    }
    assert any(name.startswith("backbone.layers.1.") for name in frozen)
    assert not model.backbone.get_submodule("layers.1").training
    assert not model.backbone.get_submodule("patch_embed").training
    assert model.backbone.get_submodule("layers.2").training
    assert model.eval().train().backbone.get_submodule("layers.2").training


def _is_early(name: str, count: int) -> bool:
    return "patch_embed" in name or any(f"layers.{i}." in name for i in range(count))


@pytest.mark.parametrize("norm_eval", [True, False])
def test_batch_norms_of_the_backbone_can_keep_their_statistics(norm_eval: bool, make: Make, batch: Batch) -> None:
    backbone = {"name": "biformer_tiny", **resolve("biformer_tiny").family.tiny}
    model = make(FasterRCNN, backbone=backbone, norm_eval=norm_eval).train()
    norm = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    total(model(**batch, mode="loss")).backward()
    assert norm.training is not norm_eval
    assert torch.equal(norm.running_mean, before) is norm_eval
    assert norm.weight.grad is not None


def test_nothing_is_frozen_by_default(make: Make) -> None:
    assert all(p.requires_grad for p in make(MaskRCNN).parameters())


def test_gradient_checkpointing_changes_nothing(make: Make, batch: Batch) -> None:
    plain = make(MaskRCNN).train()
    saving = make(MaskRCNN, grad_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    assert saving.backbone.grad_checkpointing
    for model in (plain, saving):
        torch.manual_seed(0)
        total(model(**batch, mode="loss")).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_output_norms_are_built_and_a_built_backbone_is_taken(tiny: dict[str, Any], make: Make) -> None:
    assert hasattr(make(MaskRCNN).backbone, "norm0")
    backbone = vizoo.create_model(**tiny, features_only=True)
    assert FasterRCNN(backbone).backbone is backbone


def test_mmengine_builds_them_by_name(tiny: dict[str, Any], batch: Batch) -> None:
    config = {"type": "CascadeMaskRCNN", "backbone": tiny, "num_classes": 3, "channels": 16}
    config |= {"box": {"hidden": (16,), "convs": (16,)}, "mask": {"hidden": (16, 16)}}
    model = MODELS.build(copy.deepcopy(config))
    assert isinstance(model, CascadeMaskRCNN)
    data = model.data_preprocessor(batch, True)
    assert set(model(**data, mode="loss")) == KEYS[CascadeMaskRCNN]


@every
def test_a_step_of_mmengine(kind: type[Detector], make: Make, batch: Batch) -> None:
    model = make(kind).train()
    before = model.neck.inner_blocks[0][0].weight.clone()
    wrapper = AutocastOptimWrapper("bfloat16", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    log = model.train_step(batch, wrapper)
    assert set(log) == {"loss", *KEYS[kind]}
    torch.testing.assert_close(log["loss"], total({key: log[key] for key in KEYS[kind]}))
    assert not torch.equal(before, model.neck.inner_blocks[0][0].weight)
    assert len(model.eval().val_step(batch)) == 2


def test_eval_is_deterministic_and_keeps_the_model(make: Make, batch: Batch) -> None:
    model = make(MaskRCNN).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        one, other = (model(**batch, mode="predict") for _ in range(2))
    assert torch.equal(one[0]["boxes"], other[0]["boxes"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_modes_and_targets_are_checked(make: Make, batch: Batch) -> None:
    model = make(MaskRCNN)
    images, targets = batch["images"], batch["targets"]
    with pytest.raises(ValueError, match="mode must be one of loss, predict, tensor, got 'train'"):
        model(images, targets, mode="train")
    with pytest.raises(ValueError, match="needs one target per image, got none for 2 images"):
        model(images, mode="loss")
    with pytest.raises(ValueError, match="needs one target per image, got 1 for 2 images"):
        model(images, targets[:1], mode="loss")
    with pytest.raises(ValueError, match="target 1 has 2 boxes but 1 labels"):
        model(images, [targets[0], {**targets[1], "labels": torch.tensor([0])}], mode="loss")
    with pytest.raises(ValueError, match=r"labels must lie in 0..2 .* target 0 has 1..3"):
        model(images, [{**targets[0], "labels": torch.tensor([1, 3])}, targets[1]], mode="loss")
    with pytest.raises(ValueError, match=r"needs masks \(2, 96, 96\), .* target 0 has no masks"):
        model(images, [{k: v for k, v in targets[0].items() if k != "masks"}, targets[1]], mode="loss")
    with pytest.raises(ValueError, match=r"target 1 has masks \(2, 48, 96\)"):
        model(images, [targets[0], {**targets[1], "masks": targets[1]["masks"][:, :48]}], mode="loss")


def test_images_are_checked(make: Make, batch: Batch) -> None:
    model = make(FasterRCNN)
    with pytest.raises(ValueError, match=r"uint8 tensors \(3, H, W\), RGB; got torch.float32 \(3, 96, 96\)"):
        model([batch["images"][0].float()])
    with pytest.raises(ValueError, match=r"got torch.uint8 \(1, 96, 96\)"):
        model([batch["images"][0][:1]])
    with pytest.raises(ValueError, match=r"must be a list of at least one tensor .* got Tensor"):
        model(torch.stack(batch["images"]))
    with pytest.raises(ValueError, match="must be a list of at least one tensor"):
        model([])


def test_arguments_are_checked(make: Make, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_classes counts .* got 0"):
        make(FasterRCNN, num_classes=0)
    with pytest.raises(TypeError, match="anchor_scales"):
        make(FasterRCNN, rpn={"anchor_scales": 8})
    with pytest.raises(ValueError, match=r"frozen_stages must lie in -1..4"):
        make(FasterRCNN, frozen_stages=5)
    with pytest.raises(ValueError, match="one loss weight per stage, got 2 for 3"):
        make(CascadeMaskRCNN, stage_loss_weights=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"strides double .* got strides \[4, 16\]"):
        FasterRCNN({**tiny, "out_indices": (0, 2)})
