"""The configs of L2ViT and Flowformer hold the numbers of the authors' commands and files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import vizoo
from vizoo.backbones.base import override
from vizoo.registry import resolve
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if re.match(r"imagenet/(l2vit|flowformer)_", name)]
# GPUs, images per update, epochs, warm-up; rates at the start, at their peak and at the end; decay, clip, decay of the
# average, drop path.
SCRATCH: tuple[Any, ...] = (8, 4096, 300, 20, (0.0, 4e-3, 1e-6), 0.05, None, 0.9999)
TUNED: tuple[Any, ...] = (8, 1024, 30, 5, (4e-8, 4e-5, 4e-7), 1e-8, None, 0.9999, 0.2)
OFFICIAL = {
    "flowformer_cv": (6, 768, 300, 5, (1e-6, 7.5e-4, 1e-5), 0.05, 1.0, None, 0.2),
    "l2vit_tiny": (*SCRATCH, 0.1),
    "l2vit_small": (*SCRATCH, 0.2),
    "l2vit_base": (*SCRATCH, 0.3),
    "l2vit_base_22k": (8, 1024, 90, 5, (1e-6, 1e-3, 1e-5), 0.05, None, None, 0.2),
    "l2vit_base_22kto1k": TUNED,
    "l2vit_base_384_22kto1k": TUNED,
}
# Which published checkpoint a config is to give.
RESULTS = {
    "l2vit_base_22k": "l2vit_base.in22k",
    "l2vit_base_22kto1k": "l2vit_base.in22k_ft_in1k",
    "l2vit_base_384_22kto1k": "l2vit_base_384.in22k_ft_in1k",
}


def test_every_checkpoint_has_a_config() -> None:
    assert sorted(NAMES) == sorted(f"imagenet/{name}" for name in OFFICIAL)
    released = {
        f"{name}.{tag}"
        for family in ("l2vit", "flowformer")
        for name in vizoo.list_models(family=family)
        for tag in resolve(name).variant.weights
    }
    assert {RESULTS.get(name, f"{name}.in1k") for name in OFFICIAL} == released


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    gpus, images, epochs, warmup, rates, decay, clip, average, drop_path = OFFICIAL[name.removeprefix("imagenet/")]
    config = load_config(name)
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.warmup) == (epochs, warmup)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * gpus
    assert batch == images
    assert f"--nproc-per-node {gpus} " in config_path(name).read_text()
    peak = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert (peak * schedule.start_ratio, peak, peak * schedule.min_ratio) == pytest.approx(rates)
    assert config.optim_wrapper.optimizer.weight_decay == decay
    assert (config.optim_wrapper.clip_grad or {}).get("max_norm") == clip
    assert [hook.decay for hook in config.custom_hooks] == ([] if average is None else [average])
    assert config.optim_wrapper.dtype == ("bfloat16" if "flowformer" in name else "float32")
    assert config.train_dataloader.dataset.transform.erase_prob == (0.0 if "flowformer" in name else 0.25)
    assert config.model.backbone.drop_path_rate == drop_path


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, short = load_config(name), name.removeprefix("imagenet/")
    found = resolve(RESULTS.get(short, short))
    record = found.weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**{**config.model.backbone, "pretrained": False})
    assert model.config == override(found.variant.config, {"drop_path_rate": model.config.drop_path_rate})
    assert model.num_classes == record.num_classes
    view = config.val_dataloader.dataset.transform
    assert (view.size, view.crop_mode, view.crop_pct) == (model.config.img_size, record.crop_mode, record.crop_pct)
    assert config.train_dataloader.dataset.transform.size == model.config.img_size
    assert config.model.backbone.pretrained == ("22kto1k" in name)
    if record.metrics:
        assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "own", "spared"),
    [
        ("l2vit_tiny", "layers.0.1.attn.temperature", "layers.0.1.local_mp.bn.weight"),
        ("flowformer_cv", "patch_embed.0.proj.weight", "pos_embed"),
    ],
)
def test_what_is_decayed_is_what_the_authors_decay(name: str, own: str, spared: str) -> None:
    with torch.device("meta"):
        model = vizoo.create_model(name)
    groups = {g["weight_decay"]: set(g["param_names"]) for g in parameter_groups(model, lr=1.0, weight_decay=0.05)}
    assert own in groups[0.05]
    assert spared in groups[0.0]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("coco/retinanet_1x", (0.1, 0.1, 0.2)),
        ("coco/mask_rcnn_1x", (0.1, 0.1, 0.2)),
        ("coco/mask_rcnn_3x", (0.2, 0.2, 0.3)),
        ("ade20k/upernet_160k", (0.3, 0.3, 0.3)),
    ],
)
def test_dense_recipes_take_the_published_drop_path(name: str, rates: tuple[float, ...]) -> None:
    for size, rate in zip(("tiny", "small", "base"), rates, strict=True):
        config = load_config(name, [f"model.backbone.name=l2vit_{size}"])
        assert config.model.backbone.drop_path_rate == rate
