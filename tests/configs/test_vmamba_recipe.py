"""The configs of VMamba and MobileMamba hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import resolve
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, list_configs, load_config

VMAMBA, MOBILEMAMBA = (vizoo.list_models(family=family) for family in ("vmamba", "mobilemamba"))
NAMES = [f"imagenet/{name}" for name in (*VMAMBA, *MOBILEMAMBA)]


def test_every_variant_has_a_config() -> None:
    assert set(NAMES) <= set(list_configs())


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (300, 20)
    mobile = "mobilemamba" in name
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    peak = 1.5e-3 if mobile else 1e-3
    assert batch == 1024
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx(
        (peak / 1000, peak, peak / 100)
    )
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    decays = [hook.decay for hook in config.get("custom_hooks") or [] if hook.type.endswith("EMA")]
    assert decays == ([] if name.endswith("dp01") else [0.9998 if mobile else 0.9999])
    filters = config.train_dataloader.dataset.transform.interpolation
    assert filters == ("random" if mobile else "bicubic")


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, record = load_config(name), resolve(name.removeprefix("imagenet/")).weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**config.model.backbone)
    assert model.config == resolve(name.removeprefix("imagenet/")).variant.config
    view = config.val_dataloader.dataset.transform
    assert config.train_dataloader.dataset.transform.size == view.size
    assert (view.size, view.crop_mode, view.crop_pct) == (model.config.img_size, record.crop_mode, record.crop_pct)
    assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]


def test_projections_and_rates_of_scans_are_decayed_but_no_vector() -> None:
    with torch.device("meta"):
        model = vizoo.create_model("vssm1_tiny_0230s")
    groups = {g["weight_decay"]: set(g["param_names"]) for g in parameter_groups(model, lr=1.0, weight_decay=0.05)}
    scan = "layers.0.blocks.0.op."
    for name in ("A_logs", "x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        assert scan + name in groups[0.05]
    assert {scan + "Ds", scan + "out_norm.weight", "patch_embed.2.weight"} <= groups[0.0]
