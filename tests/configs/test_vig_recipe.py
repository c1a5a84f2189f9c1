"""The configs of ViG and ViG-H hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import resolve
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/vig_")]
RATES = {
    "vig_tiny": 1e-3,
    "vig_small": 5e-4,
    "vig_base": 1e-3,
    "vig_h_tiny": 8e-4,
    "vig_h_small": 5e-4,
    "vig_h_base": 5e-4,
}
"""For 512 images, at the peak."""


def test_every_variant_has_a_config() -> None:
    variants = [*vizoo.list_models(family="vig"), *vizoo.list_models(family="vig_h")]
    assert sorted(name.removeprefix("imagenet/") for name in NAMES) == sorted(variants)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config, variant = load_config(name), name.removeprefix("imagenet/")
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (300, 20)
    processes = 16 if "--nnodes 2" in config_path(name).read_text() else 8
    assert (config.train_dataloader.batch_size * processes, config.auto_scale_lr.base_batch_size) == (1024, 512)
    rate = config.optim_wrapper.optimizer.lr
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx((5e-7, RATES[variant], 5e-6))
    assert config.optim_wrapper.optimizer.weight_decay == (0.1 if variant == "vig_small" else 0.05)
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.optim_wrapper.dtype == ("bfloat16" if "_h_" in variant else "float32")
    assert [hook.decay for hook in config.custom_hooks] == [0.9999]


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, record = load_config(name), resolve(name.removeprefix("imagenet/")).weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**config.model.backbone)
    assert model.config == resolve(name.removeprefix("imagenet/")).variant.config
    view = config.val_dataloader.dataset.transform
    assert (view.size, view.crop_mode, view.crop_pct) == (model.config.img_size, record.crop_mode, record.crop_pct)
    assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]


def test_matrices_and_positions_are_decayed_but_no_vector() -> None:
    with torch.device("meta"):
        model = vizoo.create_model("vig_tiny")
    groups = {g["weight_decay"]: set(g["param_names"]) for g in parameter_groups(model, lr=1.0, weight_decay=0.05)}
    mixer = "blocks.0.op."
    assert {mixer + "in_proj.0.weight", mixer + "gk_proj.0.weight", "pos_embed"} <= groups[0.05]
    assert {mixer + "g_norm.weight", mixer + "g_proj.bias", "blocks.0.norm.weight"} <= groups[0.0]
