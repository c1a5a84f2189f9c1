"""The configs of SLAB hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.registry import families, resolve
from vizoo.train.settings import config_path, list_configs, load_config

VARIANTS = [name for frame in ("deit", "pvt", "swin", "cswin") for name in families()[f"slab_{frame}"].variants]
NAMES = [name for name in list_configs() if name.removeprefix("imagenet/") in VARIANTS]
# By frame: epochs, of all but CSwin's with ten that collect statistics; warm-up; rates for 512 images at start, peak
# and end.
NUMBERS = {
    "deit": (310, 20, (5e-7, 5e-4, 5e-6)),
    "swin": (310, 20, (5e-7, 5e-4, 5e-6)),
    "pvt": (320, 5, (1e-6, 5e-4, 1e-5)),
    "cswin": (310, 20, (1e-6, 5e-4, 1e-5)),
}
BATCH = {
    "pvt_small_prepbn": 64, "slab_pvt_small": 64, "slab_pvt_medium": 64, "slab_swin_base": 64, "slab_cswin_tiny": 256,
}  # fmt: skip
DROP_PATH = {
    "pvt_small": 0.1, "pvt_medium": 0.3, "slab_swin_tiny": 0.2, "slab_swin_small": 0.3, "slab_swin_base": 0.5,
    "swin_tiny_prepbn": 0.1, "slab_cswin_tiny": 0.1, "slab_cswin_small": 0.3,
}  # fmt: skip


def test_every_variant_has_a_config() -> None:
    assert sorted(name.removeprefix("imagenet/") for name in NAMES) == sorted(VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config, design = load_config(name), name.removeprefix("imagenet/")
    frame = re.search("deit|pvt|cswin|swin", design)[0]  # type: ignore[index]
    epochs, warmup, rates = NUMBERS[frame]
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.end, schedule.warmup) == (epochs, 300, warmup)
    rate = config.optim_wrapper.optimizer.lr
    assert config.auto_scale_lr.base_batch_size == 512
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx(rates)
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    clip = config.optim_wrapper.clip_grad
    assert (clip and clip.max_norm) == {"deit": 5.0, "swin": 5.0}.get(frame, 1.0 if "medium" in design else None)
    assert config.train_dataloader.batch_size == BATCH.get(design, 128)
    found = [rate for part, rate in DROP_PATH.items() if part in design]
    assert config.model.backbone.drop_path_rate == (found[0] if found else 0.0)
    kinds = [hook.type.rpartition(".")[2] for hook in config.custom_hooks]
    plain = design in ("deit_tiny_prepbn", "swin_tiny_prepbn")
    assert kinds == ["EMA"] * (frame == "cswin") + ["NormSchedule"] * (not plain) + ["CollectStatistics"] * (
        frame != "cswin"
    )


@pytest.mark.parametrize("name", NAMES)
def test_model_schedule_and_expectation_are_the_published_ones(name: str) -> None:
    config, design = load_config(name), name.removeprefix("imagenet/")
    variant, text = resolve(design).variant, config_path(name).read_text()
    with torch.device("meta"):
        model = vizoo.create_model(**config.model.backbone)
    assert model.config == variant.config
    view = config.val_dataloader.dataset.transform
    assert (view.size, view.crop_mode, view.crop_pct) == (224, "center", 0.875)
    expected = re.search(r"Expected: ([\d.]+) %", text)
    assert (float(expected[1]) if expected else None) == (
        variant.weights["in1k"].metrics["top1"] if variant.weights else None
    )
    steps = re.search(r"over the first ([\d,]+) updates", text)
    assert (int(steps[1].replace(",", "")) if steps else 0) == variant.config.norm_steps
    updates = config.train_cfg.max_epochs * (1_281_167 // (8 * config.train_dataloader.batch_size))
    assert variant.config.norm_steps < updates, "LayerNorm is to have no share at the end"


@pytest.mark.parametrize(("name", "rate"), [("slab_swin_tiny", 0.1), ("slab_swin_small", 0.2)])
def test_detectors_take_the_published_drop_path(name: str, rate: float) -> None:
    config = load_config("coco/mask_rcnn_1x", [f"model.backbone.name={name}"])
    assert config.model.backbone.drop_path_rate == rate
