"""The configs of Vim and PlainMamba hold the numbers of the authors' commands and files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import resolve
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if re.match(r"imagenet/(vim|plainmamba)_", name)]
SCRATCH = [name for name in NAMES if "stride8" not in name]
FINE_TUNED = [name for name in NAMES if "stride8" in name]
# GPUs, images per update, warm-up, rates at start, peak and end, decay, clip, decay of the average, drop path.
VIM = (1e-6, 1e-3, 1e-5)
OFFICIAL = {
    "vim_tiny": (8, 1024, 5, VIM, 0.1, None, 0.99996, 0.0),
    "vim_small": (8, 512, 5, VIM, 0.05, None, 0.99996, 0.05),
    "vim_base": (8, 1024, 5, VIM, 0.05, None, 0.99996, 0.1),
    "plainmamba_l1": (8, 2048, 15, (2e-6, 2e-3, 2e-5), 0.05, 5.0, None, 0.2),
    "plainmamba_l2": (8, 2048, 20, (2e-6, 2e-3, 2e-5), 0.05, 1.0, 0.9999, 0.2),
    "plainmamba_l3": (4, 1024, 20, (1e-6, 1e-3, 1e-5), 0.05, 1.0, 0.9999, 0.4),
}


def test_every_released_variant_has_a_config() -> None:
    released = [n for family in ("plainmamba", "vim") for n in vizoo.list_models(family=family) if resolve(n).weights]
    assert [name.removeprefix("imagenet/") for name in NAMES] == released


@pytest.mark.parametrize("name", SCRATCH)
def test_training_from_scratch_has_the_published_numbers(name: str) -> None:
    gpus, images, warmup, rates, decay, clip, average, drop_path = OFFICIAL[name.removeprefix("imagenet/")]
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (300, warmup)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * gpus
    assert batch == images
    assert f"--nproc-per-node {gpus} " in config_path(name).read_text()
    peak = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert (peak * schedule.start_ratio, peak, peak * schedule.min_ratio) == pytest.approx(rates)
    assert config.optim_wrapper.optimizer.weight_decay == decay
    assert (config.optim_wrapper.clip_grad or {}).get("max_norm") == clip
    assert [hook.decay for hook in config.custom_hooks] == ([] if average is None else [average])
    assert config.model.backbone.drop_path_rate == drop_path
    assert config.optim_wrapper.dtype == ("bfloat16" if name.endswith("l1") else "float32")


@pytest.mark.parametrize("name", FINE_TUNED)
def test_finer_patches_are_fine_tuned_at_a_constant_rate(name: str) -> None:
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.start_ratio, schedule.min_ratio) == (30, 1.0, 1.0)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert (batch, rate) == (1024, pytest.approx(1e-5))
    assert config.optim_wrapper.optimizer.weight_decay == 1e-8
    assert config.optim_wrapper.clip_grad is None
    assert config.model.backbone.pretrained
    assert resolve(config.model.backbone.name).variant.config.stride == 16


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, record = load_config(name), resolve(name.removeprefix("imagenet/")).weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**{**config.model.backbone, "pretrained": False})
    assert model.config == resolve(name.removeprefix("imagenet/")).variant.config
    view, crop = config.val_dataloader.dataset.transform, config.train_dataloader.dataset.transform
    assert (view.size, view.crop_mode, view.crop_pct) == (model.config.img_size, record.crop_mode, record.crop_pct)
    assert (crop.auto_augment, crop.erase_prob) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]


@pytest.mark.parametrize(("size", "rate"), [("l1", 0.1), ("l2", 0.2), ("l3", 0.3)])
def test_segmenters_take_the_published_drop_path(size: str, rate: float) -> None:
    config = load_config("ade20k/upernet_160k", [f"model.backbone.name=plainmamba_{size}"])
    assert config.model.backbone.drop_path_rate == rate
