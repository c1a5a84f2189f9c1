"""The configs of NAT, DiNAT, DiNAT_s and the isotropic models hold the numbers of the authors' files."""

from __future__ import annotations

import re

import pytest
import torch

import vizoo
from vizoo.backbones.base import override
from vizoo.backbones.nat import NeighborhoodAttention
from vizoo.dense import create_dense
from vizoo.registry import resolve
from vizoo.train.classification import ImageClassifier
from vizoo.train.optim import AutocastOptimWrapper, parameter_groups
from vizoo.train.schedules import WarmupPolyLR
from vizoo.train.settings import config_path, list_configs, load_config

VARIANTS = vizoo.list_models(mixer="neighborhood attention")
NAMES = [name for name in list_configs() if name.removeprefix("imagenet/") in VARIANTS]
FINE_TUNED = [name for name in NAMES if "_large" in name]
SCRATCH = [name for name in NAMES if name not in FINE_TUNED]
WEIGHT_DECAY = {"dinat_large_384": 1e-10, "dinat_large_384_11x11": 1e-10, "dinat_s_large_384": 1e-5}


def test_every_variant_but_those_of_imagenet_22k_has_a_config() -> None:
    assert [name.removeprefix("imagenet/") for name in NAMES] == [n for n in VARIANTS if "21k" not in n]


@pytest.mark.parametrize("name", SCRATCH)
def test_training_from_scratch_has_the_published_numbers(name: str) -> None:
    config = load_config(name)
    (schedule,) = config.param_scheduler
    slow = "isotropic_base" in name or name.endswith("vitrpb_base")
    assert (config.train_cfg.max_epochs, schedule.end, schedule.warmup) == (310, 300, 50 if slow else 20)
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert batch == 1024
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx((1e-6, 1e-3, 5e-6))
    assert config.optim_wrapper.optimizer.weight_decay == 0.05
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert [hook.decay for hook in config.custom_hooks] == ([0.9998] if slow else [])
    assert (config.model.mixup.mixup_alpha, config.model.mixup.cutmix_alpha) == (0.8, 1.0)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_has_the_published_numbers(name: str) -> None:
    config = load_config(name)
    assert config.train_cfg.max_epochs == 30
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * 8
    assert batch == config.auto_scale_lr.base_batch_size == 512
    assert config.optim_wrapper.optimizer.lr == 5e-5
    decay = WEIGHT_DECAY.get(name.removeprefix("imagenet/"), 1e-4)
    assert config.optim_wrapper.optimizer.weight_decay == decay
    assert config.model.mixup is None
    assert config.optim_wrapper.dtype == "float32"
    assert config.model.backbone.pretrained
    assert resolve(config.model.backbone.name).tag == "in22k"


def test_the_rate_of_fine_tuning_falls_in_a_line() -> None:
    (settings,) = load_config("imagenet/dinat_large").param_scheduler
    options = {key: value for key, value in settings.items() if key != "type"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wrapper = AutocastOptimWrapper(optimizer=optimizer, dtype="float32", accumulative_counts=1)
    found = WarmupPolyLR(wrapper, end=1000, **options)
    shares = [found.factor(step, **found.shape) for step in (0, 250, 500, 1000)]
    assert shares == pytest.approx([1.0, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_model_images_and_expectation_are_the_published_ones(name: str) -> None:
    config, found = load_config(name), resolve(name.removeprefix("imagenet/"))
    assert found.weights is not None
    with torch.device("meta"):
        model = vizoo.create_model(**{**config.model.backbone, "pretrained": False})
    assert model.config == override(found.variant.config, {"drop_path_rate": config.model.backbone.drop_path_rate})
    assert model.config.drop_path_rate == found.variant.config.drop_path_rate
    assert model.num_classes == 1000
    crop, view = config.train_dataloader.dataset.transform, config.val_dataloader.dataset.transform
    assert crop.size == view.size == model.config.img_size
    assert (view.crop_mode, view.crop_pct) == (found.weights.crop_mode, found.weights.crop_pct)
    assert crop.interpolation == "random"
    text = config_path(name).read_text()
    assert float(re.search(r"Expected: ([\d.]+) %", text)[1]) == found.weights.metrics["top1"]  # type: ignore[index]


@pytest.mark.parametrize("name", ["imagenet/nat_small", "imagenet/dinat_s_tiny", "imagenet/vitrpb_small"])
def test_tables_and_vectors_are_not_decayed(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        model = ImageClassifier(config.model.backbone)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.05, **config.optim_wrapper.paramwise_cfg)
    spared = {n for group in groups for n in group["param_names"] if group["weight_decay"] == 0.0}
    assert spared == {n for n, p in model.named_parameters() if p.ndim == 1 or n.endswith(".rpb")}


COCO = ([1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1])
LEVEL_2 = [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]


@pytest.mark.parametrize(
    ("recipe", "name", "rate", "dilations"),
    [
        ("coco/mask_rcnn_3x", "dinat_tiny", 0.2, COCO),
        ("coco/cascade_mask_rcnn_3x", "dinat_large_21k", 0.6, COCO),
        ("coco/cascade_mask_rcnn_3x", "dinat_s_tiny", 0.3, ([1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3])),
        ("coco/retinanet_1x", "nat_tiny", None, None),
        ("coco/mask_rcnn_3x", "nat_small", 0.35, None),
        ("ade20k/upernet_160k", "nat_mini", 0.2, None),
        ("ade20k/upernet_160k", "dinat_mini", 0.2, ([1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1])),
        ("ade20k/upernet_160k", "dinat_s_tiny", 0.3, ([1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2])),
        ("ade20k/upernet_160k", "dinat_large_21k", 0.3, ([1, 20, 1], [1, 5, 1, 10], LEVEL_2, [1, 2, 1, 2, 1])),
        ("ade20k/upernet_160k", "dinat_s_large_21k", 0.3, ([1, 20], [1, 10], LEVEL_2, [1, 2])),
        ("ade20k/mlp_160k", "dinat_isotropic_small", None, None),
    ],
)
def test_dense_recipes_have_the_published_drop_path_and_dilations(
    recipe: str, name: str, rate: float | None, dilations: tuple[list[int], ...] | None
) -> None:
    backbone = load_config(recipe, [f"model.backbone.name={name}"]).model.backbone
    assert backbone.get("drop_path_rate") == rate
    with torch.device("meta"):
        model = create_dense(**{**backbone, "pretrained": False})
    found = [module.dilation for module in model.modules() if isinstance(module, NeighborhoodAttention)]
    if dilations is None:
        assert "dilations" not in backbone
    else:
        assert found == [dilation for stage in dilations for dilation in stage]
    chosen = load_config(recipe, ["model.backbone.dilations=1", f"model.backbone.name={name}"]).model.backbone
    assert chosen.dilations == 1
