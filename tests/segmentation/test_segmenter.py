"""The segmenter: it learns a batch, its loss is the published one, its predictions have the original size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn

import vizoo
from vizoo.train.optim import AutocastOptimWrapper
from vizoo.train.segmentation.heads import FPN, FCNHead, MLPHead, SemanticFPNHead, UPerHead
from vizoo.train.segmentation.inference import MultiScale, Sliding, Whole
from vizoo.train.segmentation.metrics import MeanIoU
from vizoo.train.segmentation.segmenter import Segmenter

Make = Callable[..., Segmenter]
Batch = dict[str, Any]

MODELS_BY_NAME: dict[str, dict[str, Any]] = {
    "upernet": {
        "decode_head": {"type": UPerHead, "channels": 32},
        "auxiliary_head": {"type": FCNHead, "channels": 32},
    },
    "semantic_fpn": {"decode_head": {"type": SemanticFPNHead, "channels": 32}, "neck": {"type": FPN, "channels": 32}},
    "mlp": {"decode_head": {"type": MLPHead, "channels": 32}},
}


class Learnt(nn.Module):
    """Logits that are its only parameter, so that a loss can be computed by hand."""

    def __init__(self, shape: Sequence[int] = (2, 5, 16, 16)) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(*shape))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.logits


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def two(batch: Batch) -> Batch:
    return {key: value[:2] for key, value in batch.items()}


def first_step(model: Segmenter, batch: Batch) -> dict[str, Tensor]:
    losses = model.train()(**batch, mode="loss")
    sum(value for key, value in losses.items() if "loss" in key).backward()
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS_BY_NAME)
def test_learns_a_batch(name: str, make: Make, batch: Batch) -> None:
    model = make(**MODELS_BY_NAME[name])
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=2e-3))
    model.train()
    for _ in range(200):
        log = model.train_step(batch, optimizer)
    assert log["loss"].item() < 0.3
    metric = MeanIoU(5)
    metric.process(None, model.eval().val_step(batch))
    assert metric.evaluate(4)["mIoU"] > 90


def test_what_a_training_step_logs(make: Make, batch: Batch) -> None:
    found = first_step(make(**MODELS_BY_NAME["upernet"]), batch)
    assert found.keys() == {"loss_decode", "loss_aux", "acc_seg"}
    assert all(value.ndim == 0 for value in found.values())
    assert first_step(make(**MODELS_BY_NAME["mlp"]), batch).keys() == {"loss_decode", "acc_seg"}


@pytest.mark.parametrize("ignore_in_mean", [True, False])
def test_loss_is_cross_entropy_at_the_size_of_the_labels(make: Make, batch: Batch, ignore_in_mean: bool) -> None:
    batch = two(batch)
    head, auxiliary = Learnt(), Learnt((2, 5, 4, 4))
    model = make(head, auxiliary_head=auxiliary, ignore_in_mean=ignore_in_mean)
    found = model(**batch, mode="loss")
    label = torch.stack([target["map"] for target in batch["targets"]]).long()
    labelled = label != 255
    for key, logits, weight in (("loss_decode", head.logits, 1.0), ("loss_aux", auxiliary.logits, 0.4)):
        mean = F.cross_entropy(upsample(logits, (64, 64)), label, ignore_index=255)
        share = labelled.double().mean() if ignore_in_mean else 1.0
        assert found[key].item() == pytest.approx(weight * mean.item() * float(share), rel=1e-5)
    right = (upsample(head.logits, (64, 64)).argmax(1) == label)[labelled]
    assert found["acc_seg"].item() == pytest.approx(100 * right.double().mean().item(), rel=1e-5)


def test_images_are_normalised_then_padded_and_padding_is_ignored(make: Make, batch: Batch) -> None:
    batch = two(batch)
    batch["images"][1] = batch["images"][1][:, :40, :48]
    batch["targets"][1]["map"] = batch["targets"][1]["map"][:40, :48]
    head = Learnt()
    model = make(head, ignore_in_mean=False)
    label = torch.full((2, 64, 64), 255)
    for row, target in zip(label, batch["targets"], strict=True):
        height, width = target["map"].shape
        row[:height, :width] = target["map"]
    found = model(**batch, mode="loss")["loss_decode"]
    expected = F.cross_entropy(upsample(head.logits, (64, 64)), label, ignore_index=255)
    assert found.item() == pytest.approx(expected.item())
    x = model.batcher(batch["images"])
    channel = (batch["images"][1][2].float() - 103.53) / 57.375
    torch.testing.assert_close(x[1, 2, :40, :48], channel)
    assert not x[1, :, 40:].any()
    assert not x[1, :, :, 48:].any()


def test_batches_are_padded_to_the_crop(make: Make, batch: Batch) -> None:
    seen: list[Tensor] = []
    model = make(Learnt((2, 5, 24, 20)), pad_size=(96, 80))
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**two(batch), mode="loss")
    model(**two(batch), mode="predict")
    assert [tuple(x.shape) for x in seen] == [(2, 3, 96, 80), (2, 3, 64, 64)], "training pads, predicting does not"


@pytest.mark.parametrize("ignore_in_mean", [True, False])
def test_nothing_labelled_gives_no_loss_and_no_gradient(make: Make, batch: Batch, ignore_in_mean: bool) -> None:
    for target in batch["targets"]:
        target["map"] = torch.full_like(target["map"], 255)
    model = make(**MODELS_BY_NAME["upernet"], ignore_in_mean=ignore_in_mean)
    found = first_step(model, batch)
    assert {key: value.item() for key, value in found.items()} == {"loss_decode": 0, "loss_aux": 0, "acc_seg": 0}
    assert all(torch.isfinite(g).all() and not g.any() for g in gradients(model).values())


def test_predictions_have_the_original_size(make: Make, batch: Batch) -> None:
    model = make(**MODELS_BY_NAME["mlp"]).eval()
    sizes = [(101, 50), (64, 64), (33, 200), (64, 64)]
    for target, size in zip(batch["targets"], sizes, strict=True):
        target["original_size"] = size
    found = model(**batch, mode="predict")
    for sample, target, image, size in zip(found, batch["targets"], batch["images"], sizes, strict=True):
        assert sample["label_map"].shape == size
        assert sample["label_map"].dtype == torch.int64
        assert sample["target"] is target["map"]
        assert sample["path"] == target["path"]
        with torch.no_grad():
            logits = upsample(upsample(model([image]), image.shape[1:]), size)
        assert torch.equal(sample["label_map"], logits.argmax(1)[0])


def test_images_of_one_size_are_predicted_together(make: Make, batch: Batch) -> None:
    model = make(**MODELS_BY_NAME["mlp"]).eval()
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    together = model(**batch, mode="predict")
    alone = [model([image], mode="predict")[0] for image in batch["images"]]
    assert seen == [4, 1, 1, 1, 1]
    same = [(a["label_map"] == b["label_map"]).float().mean() for a, b in zip(together, alone, strict=True)]
    assert min(same) > 0.999, "sums may round in another order"
    assert alone[0]["target"] is None


def test_inference_modes_by_config(make: Make, batch: Batch) -> None:
    sliding = {"type": Sliding, "crop": (32, 32), "stride": (16, 16)}
    model = make(**MODELS_BY_NAME["mlp"], inference=sliding).eval()
    assert model.inference == Sliding((32, 32), (16, 16))
    x = model.batcher(batch["images"])
    with torch.no_grad():
        expected = Sliding((32, 32), (16, 16))(model.logits, x, (64, 64)).argmax(1)
    assert torch.equal(torch.stack([s["label_map"] for s in model(**batch, mode="predict")]), expected)
    model.inference = MultiScale(ratios=(1.0, 1.5), inner=Whole())
    assert model(**batch, mode="predict")[0]["label_map"].shape == (64, 64)


def test_frozen_stages_neither_learn_nor_drop(make: Make, tiny: dict[str, Any], batch: Batch) -> None:
    model = make(**MODELS_BY_NAME["mlp"], backbone={**tiny, "drop_path_rate": 0.5}, frozen_stages=2)
    first_step(model, batch)
    learning = set(gradients(model.backbone))
    assert not any(name.startswith(("patch_embed.", "layers.0.", "layers.1.")) for name in learning)
    expected = {n for n, _ in model.backbone.named_parameters() if n.startswith(("layers.2.", "layers.3.", "norm"))}
    assert learning == expected
    for _ in range(2):
        model.eval().train()
        assert not model.backbone.patch_embed.training
        assert not any(module.training for stage in model.backbone.layers[:2] for module in stage.modules())
        assert all(module.training for stage in model.backbone.layers[2:] for module in stage.blocks)
        assert model.decode_head.training


def test_recomputed_blocks_give_the_same_gradients(make: Make, batch: Batch) -> None:
    plain, recomputed = (make(**MODELS_BY_NAME["mlp"], grad_checkpointing=flag) for flag in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, recomputed):
        torch.manual_seed(0)
        first_step(model, batch)
        found.append(gradients(model))
    assert recomputed.backbone.grad_checkpointing
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("name", MODELS_BY_NAME)
def test_learns_in_bfloat16(name: str, make: Make, batch: Batch) -> None:
    model = make(**MODELS_BY_NAME[name])
    optimizer = AutocastOptimWrapper(dtype="bfloat16", optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3))
    optimizer.initialize_count_status(model, 0, 30)
    losses = [model.train().train_step(batch, optimizer)["loss"].item() for _ in range(30)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.7 * losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(**batch, mode="predict")[0]["label_map"].shape == (64, 64)


def test_weights_of_the_heads_lie_as_the_maps_do(make: Make) -> None:
    for name, parameter in make(**MODELS_BY_NAME["semantic_fpn"]).named_parameters():
        if parameter.ndim == 4 and not name.startswith("backbone."):
            assert parameter.is_contiguous(memory_format=torch.channels_last), name


def test_joined_batch_norms_keep_their_names(make: Make, batch: Batch) -> None:
    """The Runner's `sync_bn` converts the model of a distributed run, a single process converts it back."""
    model = make(**MODELS_BY_NAME["upernet"])
    names = model.state_dict().keys()
    joined = convert_sync_batchnorm(model, "torch")
    assert isinstance(joined.decode_head.bottleneck.bn, nn.SyncBatchNorm)
    assert joined.state_dict().keys() == names
    single = revert_sync_batchnorm(joined)
    assert torch.isfinite(first_step(single, batch)["loss_decode"])
    with pytest.raises(ValueError, match="at least 2 images a batch"):
        single(batch["images"][:1])


def test_backbones_with_norms_of_their_maps(make: Make, tiny: dict[str, Any]) -> None:
    model = make(**MODELS_BY_NAME["mlp"])
    assert {"norm0.weight", "norm3.bias"} <= model.backbone.state_dict().keys()
    assert model.backbone.features_only
    ready = vizoo.create_model(**tiny, features_only=True)
    assert make(**MODELS_BY_NAME["mlp"], backbone=ready).backbone is ready


def test_other_families(make: Make, batch: Batch) -> None:
    from vizoo.backbones.davit import FAMILY

    model = make(**MODELS_BY_NAME["semantic_fpn"], backbone={"name": "davit_tiny", **FAMILY.tiny}, frozen_stages=1)
    assert torch.isfinite(first_step(model, batch)["loss_decode"])


def test_configs_may_name_their_classes() -> None:
    config = {"type": "Segmenter", "num_classes": 5, "decode_head": {"type": "MLPHead", "channels": 8}}
    backbone = {"name": "swin_tiny_patch4_window7_224", "depths": (1, 1, 1, 1)}
    with torch.device("meta"):
        assert isinstance(MODELS.build({**config, "backbone": backbone}).decode_head, MLPHead)


def test_a_checkpoint_has_no_keys_beside_the_published(make: Make) -> None:
    model = make(**MODELS_BY_NAME["upernet"])
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "decode_head", "auxiliary_head"}


def floats(batch: Batch) -> dict[str, Any]:
    return {**batch, "images": [image.float() for image in batch["images"]]}


def cropped(batch: Batch) -> dict[str, Any]:
    return {**batch, "images": [image[:, :40] for image in batch["images"]]}


@pytest.mark.parametrize(
    ("change", "mode", "message"),
    [
        (lambda b: b, "train", "mode must be one of loss, predict, tensor, got 'train'"),
        (lambda b: {"images": b["images"]}, "loss", "needs the label maps of the batch, got targets=None"),
        (lambda b: {"images": []}, "tensor", "at least one image, got none"),
        (floats, "predict", r"images must be uint8 \(3, H, W\), got torch.float32"),
        (lambda b: {"images": torch.stack(b["images"])[None]}, "tensor", r"images must be uint8 \(3, H, W\)"),
        (cropped, "loss", r"height and width of its image in training, got \(64, 64\) for an image \(3, 40, 64\)"),
    ],
)
def test_impossible_batches(make: Make, batch: Batch, change: Any, mode: str, message: str) -> None:
    model = make(**MODELS_BY_NAME["mlp"])
    with pytest.raises(ValueError, match=message):
        model(**change(batch), mode=mode)


def test_impossible_segmenters(make: Make, tiny: dict[str, Any]) -> None:
    head = MODELS_BY_NAME["mlp"]
    with pytest.raises(ValueError, match="decode_head has 7 classes, the segmenter 5"):
        make(MLPHead((16, 32, 64, 128), 7))
    with pytest.raises(TypeError, match="auxiliary_head must be a module or a config with its class as type, got int"):
        make(**head, auxiliary_head=3)
    with pytest.raises(ValueError, match=r"frozen_stages must lie in -1\.\.4"):
        make(**head, frozen_stages=5)
    with pytest.raises(ValueError, match="build it with features_only=True"):
        make(**head, backbone=vizoo.create_model(**tiny))
    with pytest.raises(TypeError, match=r"arguments of vizoo.create_model or a vizoo.Backbone, got str"):
        make(**head, backbone="swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="config needs a name, got only img_size"):
        make(**head, backbone={"img_size": 64})
