"""The DaViT configs hold the numbers of the authors' commands."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import resolve
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/davit")]


def test_every_released_variant_has_a_config() -> None:
    released = [name for name in vizoo.list_models(family="davit") if resolve(name).weights]
    assert [name.removeprefix("imagenet/") for name in NAMES] == released


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.end, schedule.warmup) == (310, 300, 5)  # ten epochs of cool-down
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert batch == 1024
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx((1e-6, 1e-3, 1e-5))
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad.max_norm == 1.0
    assert config.model.backbone.drop_path_rate == 0.1
    assert config.custom_hooks == [], "the official recipe averages no weights"


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, record = load_config(name), resolve(name.removeprefix("imagenet/")).weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**config.model.backbone)
    view = config.val_dataloader.dataset.transform
    assert (view.size, view.crop_mode, view.crop_pct) == (model.config.img_size, record.crop_mode, record.crop_pct)
    assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]
