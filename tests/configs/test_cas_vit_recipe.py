"""The configs of CAS-ViT hold the numbers of the authors' commands and files."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.runner import Runner

import vizoo
from vizoo.backbones.base import override
from vizoo.registry import resolve
from vizoo.train.datasets import Digits
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/rcvit")]
# Epochs, warm-up, images per update; rate at the start, at its peak and at the end; drop path.
FROM_SCRATCH = (300, 20, 2048, (0.0, 6e-3, 1e-6), 0.1)
FINE_TUNED = (30, 20, 1024, (0.0, 5e-5, 5e-5), 0.0)


def test_every_variant_has_a_config() -> None:
    assert [name.removeprefix("imagenet/") for name in NAMES] == vizoo.list_models(family="cas_vit")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config = load_config(name)
    epochs, warmup, images, rates, drop_path = FINE_TUNED if name.endswith("384") else FROM_SCRATCH
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (epochs, warmup)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert batch == images
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx(rates)
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad is None
    assert [hook.decay for hook in config.custom_hooks] == [0.9995]
    assert (config.model.mixup, config.model.label_smoothing) == (None, 0.1)
    crop = config.train_dataloader.dataset.transform
    assert (crop.auto_augment, crop.color_jitter, crop.erase_prob) == ("rand-m9-mstd0.5-inc1", 0.4, 0.0)
    assert config.model.backbone.drop_path_rate == drop_path
    assert config.model.backbone.pretrained == name.endswith("384")


@pytest.mark.parametrize("name", ["imagenet/rcvit_xs", "imagenet/rcvit_xs_384"])
def test_batches_have_the_sizes_of_the_authors_sampler(name: str) -> None:
    config = load_config(name, ["batch_size=8", "workers=0"]).train_dataloader
    config.dataset = {"type": Digits, "transform": config.dataset.transform}
    batches = Runner.build_dataloader(config, seed=0).batch_sampler
    # By the formula of the official sampler, for 8 processes of 8 images.
    expected = {160: 16, 192: 8, 224: 8, 256: 8, 288: 8, 320: 8}
    if name.endswith("384"):
        expected = {160: 48, 192: 32, 256: 16, 288: 16, 320: 8, 384: 8}
    assert dict(zip(batches.sizes, batches.counts, strict=True)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, found = load_config(name), resolve(name.removeprefix("imagenet/"))
    assert found.weights is not None
    with torch.device("meta"):
        model = vizoo.create_model(**{**config.model.backbone, "pretrained": False})
    rate = config.model.backbone.drop_path_rate
    assert model.config == override(found.variant.config, {"distillation": False, "drop_path_rate": rate})
    crop, view = config.train_dataloader.dataset.transform, config.val_dataloader.dataset.transform
    expected = (found.weights.crop_mode, found.weights.crop_pct)
    assert (crop.size, view.size, view.crop_mode, view.crop_pct) == (*[model.config.img_size] * 2, *expected)
    stated = re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())
    assert stated is not None
    assert float(stated[1]) == found.weights.metrics["top1"]


def test_convolutions_are_decayed_but_no_norm() -> None:
    with torch.device("meta"):
        model = vizoo.create_model("rcvit_xs")
    groups = {g["weight_decay"]: set(g["param_names"]) for g in parameter_groups(model, lr=1.0, weight_decay=0.05)}
    block = "network.0.0."
    assert {f"{block}attn.qkv.weight", f"{block}attn.oper_q.0.block.3.weight", "head.weight"} <= groups[0.05]
    assert {f"{block}norm1.weight", f"{block}attn.dwc.bias", "norm.bias"} <= groups[0.0]


@pytest.mark.parametrize("name", ["coco/retinanet_light_1x", "coco/mask_rcnn_light_1x", "ade20k/semantic_fpn_40k"])
def test_detectors_and_segmenters_drop_nothing(name: str) -> None:
    config = load_config(name, ["model.backbone.name=rcvit_m"])
    assert config.model.backbone.drop_path_rate == 0.0
    rate = config.optim_wrapper.optimizer.lr * config.train_dataloader.batch_size * 8 / 16
    assert (rate, config.optim_wrapper.optimizer.weight_decay) == (2e-4, 1e-4)
