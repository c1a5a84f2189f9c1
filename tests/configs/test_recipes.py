"""Every config loads, builds, says what it must say, and holds the numbers of the official recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import vizoo
from vizoo.backbones.base import override
from vizoo.registry import families
from vizoo.train.classification import ImageClassifier
from vizoo.train.log import read_log
from vizoo.train.optim import parameter_groups
from vizoo.train.run import train
from vizoo.train.settings import config_path, list_configs, load_config
from vizoo.train.transforms import build_transform

IMAGENET = [name for name in list_configs() if re.match("imagenet/swin.*_patch4_", name)]
SECTIONS = ("Command", "Hardware", "Time", "Expected", "Status")
PROCESSES = 8

# Official drop path rates: from scratch, pretrained on ImageNet-22K, fine-tuned.
DROP_PATH = {
    "_recipe_300e": {"tiny": 0.2, "small": 0.3, "base": 0.5},
    "_recipe_22k": {"tiny": 0.1, "small": 0.2, "base": 0.2, "large": 0.2},
    "_recipe_finetune": {"tiny": 0.1, "small": 0.2, "base": 0.2, "large": 0.2},
}
# Per recipe: epochs, warm-up, images per update; learning rate at the start, at its peak and at the end; weight decay.
NUMBERS = {
    "_recipe_300e": (300, 20, 1024, (1e-6, 1e-3, 1e-5), 0.05),
    "_recipe_22k": (90, 5, 4096, (1e-6, 1e-3, 1e-5), 0.05),
    "_recipe_finetune": (30, 5, 1024, (4e-8, 4e-5, 4e-7), 1e-8),
}


def recipe(name: str) -> str:
    return re.search(r"_recipe_\w+", config_path(name).read_text())[0]  # type: ignore[index]


def size(name: str) -> str:
    return re.search(r"tiny|small|base|large", name)[0]  # type: ignore[index]


def meta_backbone(config: Config) -> vizoo.Backbone:
    with torch.device("meta"):
        return vizoo.create_model(**{**config.model.backbone, "pretrained": False})


def test_every_variant_has_a_config() -> None:
    built = {meta_backbone(load_config(name)).config for name in IMAGENET}
    variants = {**families()["swin"].variants, **families()["swin_v2"].variants}

    def design(config: Any) -> Any:
        return type(config), *(
            getattr(config, f) for f in ("embed_dim", "depths", "num_heads", "window_size", "img_size")
        )

    designs = {design(config) for config in built}
    missing = [n for n, v in variants.items() if design(v.config) not in designs and not v.config.output_norms]
    assert missing == []
    assert len(IMAGENET) == 27


@pytest.mark.parametrize("name", list_configs())
def test_docstring(name: str) -> None:
    text = config_path(name).read_text().split('"""')[1]
    title, _, rest = text.partition("\n\n")
    assert title.endswith(".")
    found = dict(re.findall(r"^(\w+): (.+)$", rest, flags=re.MULTILINE))
    assert [section for section in SECTIONS if section not in found] == []
    assert found["Command"].endswith(f"train {name}")


@pytest.mark.parametrize("name", IMAGENET)
def test_numbers_are_the_official_recipes(name: str) -> None:
    config, kind = load_config(name), recipe(name)
    epochs, warmup, images, (start, peak, end), decay = NUMBERS[kind]
    assert config.train_cfg.max_epochs == epochs
    (schedule,) = config.param_scheduler
    assert schedule.warmup == warmup
    batch = config.train_dataloader.batch_size * config.optim_wrapper.accumulative_counts * PROCESSES
    assert batch == images
    rate = config.optim_wrapper.optimizer.lr * batch / config.auto_scale_lr.base_batch_size
    assert config.auto_scale_lr.enable
    assert (rate * schedule.start_ratio, rate, rate * schedule.min_ratio) == pytest.approx((start, peak, end))
    is_second_22k = "swinv2" in name and kind == "_recipe_22k"
    assert config.optim_wrapper.optimizer.weight_decay == (0.1 if is_second_22k else decay)
    assert config.optim_wrapper.optimizer.betas == (0.9, 0.999)
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.custom_hooks == [], "the official recipe averages no weights"
    expected = 0.5 if name.endswith("swin_base_patch4_window12_384") else DROP_PATH[kind][size(name)]
    assert config.model.backbone.drop_path_rate == expected


@pytest.mark.parametrize("name", IMAGENET)
def test_augmentation_is_the_official_recipes(name: str) -> None:
    config = load_config(name)
    mixup, crop = config.model.mixup, config.train_dataloader.dataset.transform
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert mixup.label_smoothing == 0.1
    assert crop.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (crop.color_jitter, crop.erase_prob, crop.erase_mode, crop.interpolation) == (0.4, 0.25, "pixel", "bicubic")
    assert config.train_dataloader.drop_last
    assert config.train_dataloader.batch_size % 2 == 0


@pytest.mark.parametrize("name", IMAGENET)
def test_model_and_images_fit(name: str) -> None:
    """The design is a published variant's, with its image size; evaluation resizes as the authors did."""
    config = load_config(name)
    model = meta_backbone(config)
    assert model.num_classes == config.model.mixup.num_classes == (21841 if recipe(name) == "_recipe_22k" else 1000)
    side = model.config.img_size
    crop, view = config.train_dataloader.dataset.transform, config.val_dataloader.dataset.transform
    assert crop.size == view.size == side
    assert (view.crop_mode, view.crop_pct) == (("squash", 1.0) if side == 384 else ("center", 0.875))
    variant = re.sub(r"_22kto1k$|_22k$", "", name.removeprefix("imagenet/"))
    variants = {**families()["swin"].variants, **families()["swin_v2"].variants}
    published = variants.get(variant) or variants[name.removeprefix("imagenet/")]
    assert model.config == override(published.config, {"drop_path_rate": config.model.backbone.drop_path_rate})
    assert config.model.backbone.pretrained == (recipe(name) == "_recipe_finetune")


@pytest.mark.parametrize("name", IMAGENET)
def test_expected_accuracy_is_the_published_one(name: str) -> None:
    text = config_path(name).read_text()
    if recipe(name) == "_recipe_22k":
        return
    stated = float(re.search(r"Expected: ([\d.]+) %", text)[1])  # type: ignore[index]
    variants = {**families()["swin"].variants, **families()["swin_v2"].variants}
    variant, tag = name.removeprefix("imagenet/"), "in1k"
    if variant not in variants:
        variant, tag = variant.removesuffix("_22kto1k"), "in22k_ft_in1k"
    records = variants[variant].weights
    assert stated == records.get(tag, next(iter(records.values()))).metrics["top1"]


@pytest.mark.parametrize("name", [*IMAGENET, "demo/digits"])
def test_parts_build(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        backbone = {**config.model.backbone, "pretrained": False, "depths": (1, 1, 1, 1)[: len(_depths(config))]}
        model = ImageClassifier(backbone, mixup=config.model.mixup, label_smoothing=config.model.label_smoothing)
    decay = config.optim_wrapper.optimizer.weight_decay
    groups = parameter_groups(model, lr=1.0, weight_decay=decay, **config.optim_wrapper.paramwise_cfg)
    assert {group["weight_decay"] for group in groups} == {0.0, decay}
    side = meta_backbone(config).config.img_size
    image = Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8))
    for part in (config.train_dataloader, config.val_dataloader):
        assert build_transform(part.dataset.transform)(image).shape == (3, side, side)


def _depths(config: Config) -> Any:
    return meta_backbone(config).config.depths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of two classes, and two of each to validate, in ImageNet's layout."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            place = root / split / label
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(place / f"{index}.jpg")
    return root


def small(root: Path) -> list[str]:
    settings = [f"{part}_dataloader.dataset.root={root}" for part in ("train", "val")]
    settings += [f"{part}_dataloader.dataset.transform.size=32" for part in ("train", "val")]
    settings += [f"{part}_dataloader.num_workers=0" for part in ("train", "val")]
    settings += [f"{part}_dataloader.pin_memory=false" for part in ("train", "val")]
    settings += ["model.backbone.depths=(1, 1)", "model.backbone.num_heads=(1, 2)", "model.backbone.embed_dim=8"]
    settings += ["model.backbone.img_size=32", "model.backbone.num_classes=2", "model.mixup.num_classes=2"]
    return [*settings, "train_dataloader.batch_size=4", "train_cfg.max_epochs=2", "param_scheduler.0.warmup=1"]


def test_the_recipe_runs_on_a_folder_and_repeats_itself(folder: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        run = train(
            "imagenet/swin_tiny_patch4_window7_224", small(folder), work_dir=tmp_path / name, quiet=True, device="cpu"
        )
        losses.append([r["loss"] for r in read_log(run) if r["kind"] == "train"])
        assert (run / "best.pth").is_file()
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_data_set_that_is_not_there_is_one_clear_message(folder: Path, tmp_path: Path) -> None:
    name = "imagenet/swin_tiny_patch4_window7_224"
    with pytest.raises(FileNotFoundError, match=r"^there is no folder "):
        train(name, small(folder / "none"), work_dir=tmp_path / "a", quiet=True, device="cpu")
    wrong = [*small(folder), "model.backbone.num_classes=3", "model.mixup.num_classes=3"]
    with pytest.raises(ValueError, match=r"has 2 classes, the model 3: set model\.backbone\.num_classes=2"):
        train(name, wrong, work_dir=tmp_path / "b", quiet=True, device="cpu")


def test_a_class_missing_in_val_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "dog")
    with pytest.raises(ValueError, match="lacks 1 of the 2 expected classes: dog"):
        train(
            "swin_tiny_patch4_window7_224", small(tmp_path / "data"), work_dir=tmp_path / "a", quiet=True, device="cpu"
        )
