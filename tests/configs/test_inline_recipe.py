"""The configs of InLine hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.backbones.base import override
from vizoo.registry import resolve
from vizoo.train.classification import ImageClassifier
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import config_path, list_configs, load_config

NAMES = [name for name in list_configs() if name.startswith("imagenet/inline_")]
SCRATCH = [name for name in NAMES if not name.endswith("_384")]
# By frame: epochs, warm-up, rates for 512 images at start, peak and end, decay of the average of weights.
NUMBERS = {
    "deit": (300, 20, (5e-7, 5e-4, 5e-6), []),
    "swin": (300, 20, (5e-7, 5e-4, 5e-6), []),
    "pvt": (310, 5, (1e-6, 5e-4, 1e-5), []),
    "cswin": (310, 20, (1e-6, 5e-4, 1e-5), [0.9999]),
}
CLIPS = {"deit": 5.0, "swin": 5.0, "pvt_medium": 1.0, "pvt_large": 1.0}
DROP_PATH = {
    "deit": 0.1, "pvt_tiny": 0.1, "pvt_small": 0.1, "pvt_medium": 0.3, "pvt_large": 0.3, "swin_tiny": 0.2,
    "swin_small": 0.3, "swin_base": 0.5, "cswin_tiny": 0.2, "cswin_small": 0.4, "cswin_base": 0.5,
}  # fmt: skip


def frame_and_design(name: str) -> tuple[str, str]:
    design = name.removeprefix("imagenet/inline_")
    return design.partition("_")[0], design


def test_every_variant_has_a_config() -> None:
    assert [name.removeprefix("imagenet/") for name in SCRATCH] == vizoo.list_models("inline_*")


@pytest.mark.parametrize("name", SCRATCH)
def test_training_from_scratch_has_the_published_numbers(name: str) -> None:
    config = load_config(name)
    frame, design = frame_and_design(name)
    epochs, warmup, rates, averages = NUMBERS[frame]
    (schedule,) = config.param_scheduler
    assert (config.train_cfg.max_epochs, schedule.get("end", epochs), schedule.warmup) == (epochs, 300, warmup)
    rate = config.optim_wrapper.optimizer.lr
    assert config.auto_scale_lr.base_batch_size == 512
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx(rates)
    assert config.optim_wrapper.optimizer.weight_decay == (0.1 if design == "cswin_base" else 0.05)
    clip, wanted = config.optim_wrapper.clip_grad, CLIPS.get(frame, CLIPS.get(design))
    assert (clip and clip.max_norm) == wanted
    assert [hook.decay for hook in config.get("custom_hooks", [])] == averages
    assert config.model.backbone.drop_path_rate == DROP_PATH.get(frame, DROP_PATH.get(design))


@pytest.mark.parametrize("name", SCRATCH)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, record = load_config(name), resolve(name.removeprefix("imagenet/")).weights
    assert record is not None
    with torch.device("meta"):
        model = vizoo.create_model(**config.model.backbone)
    assert model.config == resolve(name.removeprefix("imagenet/")).variant.config
    view = config.val_dataloader.dataset.transform
    assert config.train_dataloader.dataset.transform.size == view.size == model.config.img_size
    assert (view.crop_mode, view.crop_pct) == (record.crop_mode, record.crop_pct)
    assert float(re.search(r"Expected: ([\d.]+) %", config_path(name).read_text())[1]) == record.metrics["top1"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "change", "epochs", "rate"),
    [
        ("inline_swin_base", {"window_size": 12, "drop_path_rate": 0.5}, 30, 2e-5),
        ("inline_cswin_base", {"split_size": 12, "drop_path_rate": 0.7}, 20, 5e-6),
    ],
)
def test_fine_tuning_at_384_has_the_published_numbers(
    name: str, change: dict[str, float], epochs: int, rate: float
) -> None:
    config = load_config(f"imagenet/{name}_384")
    with torch.device("meta"):
        model = vizoo.create_model(**{**config.model.backbone, "pretrained": False})
    assert model.config == override(resolve(name).variant.config, {"img_size": 384, **change})
    assert config.model.backbone.pretrained
    assert (config.train_cfg.max_epochs, config.optim_wrapper.optimizer.lr) == (epochs, rate)
    assert config.val_dataloader.dataset.transform.size == config.train_dataloader.dataset.transform.size == 384


@pytest.mark.parametrize("name", ["imagenet/inline_pvt_tiny", "imagenet/inline_swin_base", "imagenet/inline_deit_tiny"])
def test_tables_and_vectors_are_not_decayed(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        model = ImageClassifier(config.model.backbone)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.05, **config.optim_wrapper.paramwise_cfg)
    spared = {n for group in groups for n in group["param_names"] if group["weight_decay"] == 0.0}
    tables = r"pos_embed\d?$|cls_token$|relative_position_bias_table$"
    assert spared == {n for n, p in model.named_parameters() if p.ndim == 1 or re.search(tables, n)}
