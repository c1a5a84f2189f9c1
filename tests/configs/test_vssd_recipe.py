"""The configs of VSSD hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.registry import HOOKS

import vizoo
from vizoo.registry import resolve
from vizoo.train.hooks_mesa import Mesa
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, differences, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/vssd_") and not name.endswith("_mesa")]
MESA = {"tiny": 1.0, "small": 1.5, "base": 2.0}
# Rates for 512 images at start, peak and end.
RATES = dict.fromkeys(("micro", "tiny"), (5e-7, 5e-4, 5e-6)) | dict.fromkeys(("small", "base"), (5e-7, 3e-4, 3e-6))
DROP_PATH = {"micro": 0.1, "tiny": 0.2, "small": 0.4, "base": 0.6}


def test_every_variant_has_a_config() -> None:
    assert [name.removeprefix("imagenet/") for name in NAMES] == vizoo.list_models(family="vssd")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config, size = load_config(name), name.rpartition("_")[2]
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (300, 20)
    assert (config.train_dataloader.batch_size, config.auto_scale_lr.base_batch_size) == (128, 512)
    rate = config.optim_wrapper.optimizer.lr
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx(RATES[size])
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert [hook.decay for hook in config.custom_hooks] == [0.9999]
    assert config.model.backbone.drop_path_rate == DROP_PATH[size]


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


@pytest.mark.parametrize("size", MESA)
def test_mesa_is_all_that_its_recipes_add(size: str) -> None:
    plain, config = load_config(f"imagenet/vssd_{size}"), load_config(f"imagenet/vssd_{size}_mesa")
    average, mesa = config.custom_hooks
    assert average == plain.custom_hooks[0]
    assert HOOKS.get(mesa.pop("type")) is Mesa
    assert mesa == {"weight": MESA[size], "start": 0.25}
    config.custom_hooks = plain.custom_hooks
    assert differences(plain, config) == []
    record = resolve(f"vssd_{size}.in1k_mesa").weights
    stated = re.search(r"Expected: ([\d.]+) %", config_path(f"imagenet/vssd_{size}_mesa").read_text())
    assert stated is not None
    assert record is not None
    assert float(stated[1]) == record.metrics["top1"]


def test_matrices_are_decayed_but_no_parameter_of_a_head() -> None:
    with torch.device("meta"):
        model = vizoo.create_model("vssd_micro")
    groups = {g["weight_decay"]: set(g["param_names"]) for g in parameter_groups(model, lr=1.0, weight_decay=0.05)}
    mixer = "layers.0.blocks.0.attn."
    assert {mixer + "in_proj.weight", mixer + "conv2d.weight", "layers.0.downsample.reduce.weight"} <= groups[0.05]
    assert {mixer + "A_log", mixer + "D", mixer + "dt_bias", "patch_embed.conv1.norm.weight"} <= groups[0.0]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("coco/mask_rcnn_1x", {"micro": 0.1, "tiny": 0.2, "small": 0.4}),
        ("coco/mask_rcnn_3x", {"micro": 0.1, "tiny": 0.2}),
        ("ade20k/upernet_160k", {"tiny": 0.2, "small": 0.4}),
    ],
)
def test_dense_recipes_take_the_published_drop_path(name: str, rates: dict[str, float]) -> None:
    for size, rate in rates.items():
        config = load_config(name, [f"model.backbone.name=vssd_{size}"])
        assert config.model.backbone.drop_path_rate == rate
