"""The BiFormer configs hold the numbers of the authors' commands."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import resolve
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/biformer")]
DROP_PATH = {"tiny": 0.1, "small": 0.15, "base": 0.4, "stl": 0.1}
# Of BiFormer-S and BiFormer-B; None where the authors have trained none.
DENSE = {
    "coco/mask_rcnn_1x": (0.2, 0.3),
    "coco/retinanet_1x": (0.2, 0.3),
    "ade20k/semantic_fpn_80k": (0.15, 0.3),
    "ade20k/upernet_160k": (0.3, 0.4),
    "coco/mask_rcnn_3x": (None, None),
}


def test_every_released_variant_has_a_config() -> None:
    released = [name for name in vizoo.list_models(family="biformer") if resolve(name).weights]
    assert [name.removeprefix("imagenet/") for name in NAMES] == released


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (300, 5)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert batch == 1024
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx((1e-6, 1e-3, 1e-5))
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad is None
    (average,) = config.custom_hooks
    assert (average.type.rpartition(".")[2], average.decay) == ("EMA", 0.99996)
    assert config.model.backbone.drop_path_rate == DROP_PATH[name.split("_")[1]]


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


@pytest.mark.parametrize("name", DENSE)
def test_detectors_and_segmenters_take_the_published_drop_path(name: str) -> None:
    backbones = (
        load_config(name, [f"model.backbone.name=biformer_{size}"]).model.backbone for size in ("small", "base")
    )
    assert tuple(backbone.get("drop_path_rate") for backbone in backbones) == DENSE[name]
