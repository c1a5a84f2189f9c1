"""The configs of detectors and segmenters hold the published numbers, build, and take any backbone by its name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, MODELS, PARAM_SCHEDULERS
from mmengine.registry import OPTIMIZERS as OPTIMIZERS_REGISTRY
from torch import nn

from vizoo.backbones.swin import FAMILY
from vizoo.train.optim import AutocastOptimWrapper, parameter_groups
from vizoo.train.schedules import ShapedLR
from vizoo.train.settings import list_configs, load_config, walk
from vizoo.train.transforms import build_transform

# Plain backbones have recipes and tests of their own.
NAMES = [n for n in list_configs() if n.split("/")[0] in ("coco", "ade20k", "cityscapes") and "_plain_" not in n]
DETECTORS = [name for name in NAMES if name.startswith("coco")]
SEGMENTERS = [name for name in NAMES if not name.startswith("coco")]
UPDATES_PER_EPOCH = 7330  # 117266 images with objects by 16

# Base rate, decay, what is not decayed, drop path of Swin-T.
NORMS = ("absolute_pos_embed", "relative_position_bias_table", "rpb", "norm")
OPTIMIZERS = {
    "coco/faster_rcnn_1x": (1e-4, 0.05, NORMS, 0.1),
    "coco/mask_rcnn_1x": (1e-4, 0.05, NORMS, 0.1),
    "coco/mask_rcnn_3x": (1e-4, 0.05, NORMS, 0.2),
    "coco/mask_rcnn_light_1x": (1e-4, 1e-4, (), None),
    "coco/cascade_mask_rcnn_1x": (1e-4, 0.05, NORMS, 0.0),
    "coco/cascade_mask_rcnn_3x": (1e-4, 0.05, NORMS, 0.2),
    "coco/retinanet_1x": (0.01, 1e-4, (), 0.2),
    "coco/retinanet_light_1x": (1e-4, 1e-4, (), None),
    "ade20k/upernet_160k": (6e-5, 0.01, NORMS, 0.3),
    "ade20k/semantic_fpn_80k": (1e-4, 1e-4, (), 0.2),
    "ade20k/semantic_fpn_40k": (1e-4, 1e-4, (), None),
    "ade20k/mlp_160k": (6e-5, 0.01, NORMS, None),
    "cityscapes/upernet_80k": (6e-5, 0.01, NORMS, 0.3),
}
LIGHT = ("coco/mask_rcnn_light_1x", "coco/retinanet_light_1x", "ade20k/semantic_fpn_40k")  # 32 images, twice the rate
# Share of the rate by the number of updates done.
E = UPDATES_PER_EPOCH
ONE_X = {0: 1e-3, 250: 0.5005, 500: 1, 8 * E - 1: 1, 8 * E: 0.1, 11 * E - 1: 0.1, 11 * E: 0.01, 12 * E - 1: 0.01}
THREE_X = {0: 1e-3, 27 * E - 1: 1, 27 * E: 0.1, 33 * E: 0.01, 36 * E - 1: 0.01}
POLY = {0: 1e-6, 750: 0.5000005 * (1 - 750 / 160_000), 1500: 1 - 1500 / 160_000, 80_000: 0.5, 159_999: 1 / 160_000}
SHARES = {
    "1x": ONE_X,
    "3x": THREE_X,
    "160k": POLY,
    "semantic_fpn_80k": {0: 1, 40_000: 0.01 + 0.99 * 0.5**0.9, 80_000: 0.01},
    "semantic_fpn_40k": {0: 1, 20_000: 0.5**0.9, 40_000: 0},
    "upernet_80k": {0: 1e-6, 1500: 1 - 1500 / 80_000, 40_000: 0.5},
}


def tiny(config: Config, classes: int = 3) -> nn.Module:
    """The config's model on a Swin that has hardly any weights."""
    options = config.model.to_dict()
    options["backbone"] |= {**FAMILY.tiny, "pretrained": False}
    if "RCNN" in options["type"]:
        options |= {"rpn": {"train_kept": 30, "test_kept": 10}, "box": {"samples": 30}}
    return MODELS.build({**options, "num_classes": classes})


def schedule(config: Config, **options: Any) -> ShapedLR:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    wrapper = AutocastOptimWrapper(optimizer=optimizer, dtype="float32", accumulative_counts=1)
    (settings,) = config.param_scheduler
    end = config.train_cfg.max_epochs if settings.by_epoch else config.train_cfg.max_iters
    defaults = {"optimizer": wrapper, "epoch_length": UPDATES_PER_EPOCH}
    return PARAM_SCHEDULERS.build({**settings, "end": end, **options}, default_args=defaults)


def test_the_names() -> None:
    assert set(NAMES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_is_the_published_one(name: str) -> None:
    config = load_config(name)
    rate, decay, spared, drop_path = OPTIMIZERS[name]
    assert config.optim_wrapper.optimizer.lr == rate
    assert config.optim_wrapper.optimizer.weight_decay == decay
    assert config.optim_wrapper.clip_grad is None
    assert config.auto_scale_lr.base_batch_size == 16
    assert config.train_dataloader.batch_size * 8 == (32 if name in LIGHT else 16)
    assert config.model.backbone.get("drop_path_rate") == drop_path
    assert config.model.backbone.pretrained
    assert tuple(config.optim_wrapper.paramwise_cfg.not_decayed) == spared
    with torch.device("meta"):
        model = tiny(config)
    groups = parameter_groups(model, lr=rate, weight_decay=decay, **config.optim_wrapper.paramwise_cfg)
    kinds = {group["weight_decay"]: group["param_names"] for group in groups}
    optimizer = OPTIMIZERS_REGISTRY.build({**config.optim_wrapper.optimizer, "params": groups})
    is_sgd = name == "coco/retinanet_1x"
    assert type(optimizer).__name__ == ("SGD" if is_sgd else "AdamW")
    first = optimizer.param_groups[0]
    assert first.get("betas", first.get("momentum")) == (0.9 if is_sgd else (0.9, 0.999))
    assert set(kinds) == ({0.0, decay} if spared else {decay})
    assert all(name.startswith("backbone.") and re.search("norm|table", name) for name in kinds.get(0.0, ()))
    assert sum(len(names) for names in kinds.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_schedule_is_the_published_one(name: str) -> None:
    config = load_config(name)
    shares = next(shares for end, shares in SHARES.items() if name.endswith(end))
    found = schedule(config)
    assert {step: found.factor(step, **found.shape) for step in shares} == pytest.approx(shares, rel=1e-9)
    length = config.train_cfg.get("max_epochs") or config.train_cfg.max_iters
    assert length == {"1x": 12, "3x": 36, "160k": 160_000, "80k": 80_000, "40k": 40_000}[name.rpartition("_")[2]]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_train_and_predict(name: str) -> None:
    config = load_config(name)
    model = tiny(config)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 10:50, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1]), "masks": masks}
    losses = model([image, image], [target, target], mode="loss")
    assert all("loss" in key for key in losses)
    model.eval()
    (found,) = model([image], [{"original_size": (128, 192), "image_id": 5}], mode="predict")
    wants_masks = "mask" in name
    assert ("masks" in found) == wants_masks == config.val_evaluator[0].masks == config.train_dataloader.dataset.masks
    sampler = DATA_SAMPLERS.get(config.train_dataloader.batch_sampler.type)
    assert sampler.__name__ == "AspectBatches"
    assert config.default_hooks.checkpoint.best == "box_AP"
    train, test = (build_transform(p.dataset.transform) for p in (config.train_dataloader, config.val_dataloader))
    assert (train.hflip, train.long, test.hflip, test.long, test.short) == (0.5, 1333, 0.0, 1333, (800,))
    if "retinanet" in name or name in LIGHT:
        assert (type(train).__name__, train.short) == ("ResizeTransform", (800,))
    else:
        assert (train.short[0], train.short[-1], len(train.short)) == (480, 800, 11)
        assert (train.crop_short, train.crop, train.crop_prob) == ((400, 500, 600), (384, 600), 0.5)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_train_and_predict(name: str) -> None:
    config = load_config(name, ["model.pad_size=(64, 64)"])
    model = tiny(config)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    target = {"map": torch.randint(0, 3, (64, 64))}
    losses = model([image, image], [target, target], mode="loss")
    assert ("loss_aux" in losses) == ("upernet" in name)
    (found,) = model.eval()([image], [{"original_size": (128, 192)}], mode="predict")
    assert found["label_map"].shape == (128, 192)
    interval = config.train_cfg.max_iters // 10
    saved = config.default_hooks.checkpoint
    assert (config.train_cfg.val_interval, saved.iters, saved.epochs, saved.best) == (interval, interval, 0, "mIoU")
    assert config.sync_bn == "torch"
    train, test = (part.dataset.transform for part in (config.train_dataloader, config.val_dataloader))
    assert tuple(train.scale) == tuple(test.scale) == ((2048, 1024) if "cityscapes" in name else (2048, 512))
    built = build_transform(train)
    crop = (512, 1024) if "cityscapes" in name else (512, 512)
    assert (built.ratio, built.crop, built.max_share, built.retries, built.hflip) == ((0.5, 2.0), crop, 0.75, 10, 0.5)
    assert (built.distort.brightness, built.distort.contrast, built.distort.hue) == (32, (0.5, 1.5), 18)
    assert build_transform(test).scale == tuple(test.scale)


@pytest.mark.parametrize(
    ("name", "backbone", "rate"),
    [
        ("coco/mask_rcnn_3x", "swin_small_patch4_window7_224", 0.2),
        ("coco/cascade_mask_rcnn_3x", "swin_base_patch4_window7_224.in22k", 0.3),
        ("coco/mask_rcnn_1x", "swin_small_patch4_window7_224", None),
        ("coco/mask_rcnn_1x", "swinv2_tiny_patch4_window8_256", None),
        ("ade20k/upernet_160k", "davit_tiny", None),
        ("ade20k/upernet_160k", "swin_base_patch4_window7_224", 0.3),
    ],
)
def test_drop_path_follows_the_name(name: str, backbone: str, rate: float | None) -> None:
    assert load_config(name, [f"model.backbone.name={backbone}"]).model.backbone.get("drop_path_rate") == rate
    chosen = load_config(name, ["model.backbone.drop_path_rate=0.4", f"model.backbone.name={backbone}"])
    assert chosen.model.backbone.drop_path_rate == 0.4


def test_another_family_builds() -> None:
    config = load_config("coco/mask_rcnn_1x", ["model.backbone.name=davit_tiny", "model.backbone.pretrained=false"])
    with torch.device("meta"):
        model = MODELS.build(config.model.to_dict())
    assert type(model.backbone).__name__ == "Davit"


@pytest.mark.parametrize("name", NAMES)
def test_short_names_reach_every_place(name: str) -> None:
    settings = ["data_root=/sets/mine/", "num_classes=7", "batch_size=4", "workers=1", "lr=1e-3"]
    length = "epochs" if name in DETECTORS else "iters"
    config = load_config(name, [*settings, f"{length}=40"])
    texts = [value for _, value in walk(config) if isinstance(value, str)]
    assert not [text for text in texts if text.startswith("data/")]
    if name in DETECTORS:
        files = {config.val_dataloader.dataset.annotations, config.val_evaluator[0].annotations}
        assert files == {"/sets/mine/annotations/instances_val2017.json"}
        assert config.train_dataloader.dataset["images"] == "/sets/mine/train2017"
    else:
        assert config.train_dataloader.dataset.root == config.val_dataloader.dataset.root == "/sets/mine"
    assert config.model.num_classes == 7
    assert "num_classes" not in config.model.backbone
    assert config.train_dataloader.batch_size == 4
    assert "batch_size" not in config.val_dataloader, "one image at a time"
    assert config.train_dataloader.num_workers == config.val_dataloader.num_workers == 1
    assert config.train_cfg.get("max_epochs", config.train_cfg.get("max_iters")) == 40
