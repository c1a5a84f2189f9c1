"""Configs by name, single values with checks, differences."""

from __future__ import annotations

from pathlib import Path

import pytest

from vizoo.train.settings import config_path, config_title, differences, list_configs, load_config

SWIN = "imagenet/swin_tiny_patch4_window7_224"


def test_names() -> None:
    known = list_configs()
    assert SWIN in known
    assert "demo/digits" in known
    assert not [name for name in known if "_recipe" in name or "_runtime" in name or "__init__" in name]
    assert config_path("digits") == config_path("demo/digits")
    assert config_title("digits") == "demo/digits"
    assert config_title(config_path(SWIN)) == SWIN


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown config 'imagenet/swin_tny_patch4_window7_224'; did you mean 'imagenet/swin"
    ):
        load_config("imagenet/swin_tny_patch4_window7_224")
    with pytest.raises(FileNotFoundError, match=r"there is no config file .*none\.py"):
        load_config(tmp_path / "none.py")


def test_values_are_set_in_their_own_type() -> None:
    settings = [
        "optim_wrapper.optimizer.lr=1",
        "train_cfg.max_epochs=2.0",
        "optim_wrapper.optimizer.betas=[0.9, 0.95]",
        "randomness.deterministic=true",
        "train_dataloader.dataset.root=/some/where",
        "param_scheduler.0.warmup=3",
        "model.mixup=null",
        "compile={'backend': 'eager'}",
    ]
    config = load_config(SWIN, settings)
    assert config.optim_wrapper.optimizer.lr == 1.0
    assert isinstance(config.optim_wrapper.optimizer.lr, float)
    assert config.train_cfg.max_epochs == 2
    assert isinstance(config.train_cfg.max_epochs, int)
    assert config.optim_wrapper.optimizer.betas == (0.9, 0.95)
    assert config.randomness.deterministic is True
    assert config.train_dataloader.dataset.root == "/some/where"
    assert config.param_scheduler[0].warmup == 3
    assert config.model.mixup is None
    assert config.compile == {"backend": "eager"}


def test_shorthands() -> None:
    settings = ["data_root=/data", "num_classes=37", "batch_size=4", "workers=1", "epochs=30", "lr=1e-4"]
    config = load_config(SWIN, [*settings, "model.mixup=null", "num_classes=38"])
    assert config.train_dataloader.dataset.root == config.val_dataloader.dataset.root == "/data"
    assert config.model.backbone.num_classes == 38
    assert config.train_dataloader.batch_size == config.val_dataloader.batch_size == 4
    assert config.train_dataloader.num_workers == config.val_dataloader.num_workers == 1
    assert (config.train_cfg.max_epochs, config.optim_wrapper.optimizer.lr) == (30, 1e-4)
    assert load_config(SWIN, ["num_classes=37"]).model.mixup.num_classes == 37
    with pytest.raises(KeyError, match="no key 'data_root'"):
        load_config("demo/digits", ["data_root=/data"])


def test_backbone_takes_any_override() -> None:
    assert load_config(SWIN, ["model.backbone.window_size=14"]).model.backbone.window_size == 14


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "optim_wrapper.optimiser.lr=1",
            r"no key 'optim_wrapper.optimiser.lr'; did you mean 'optim_wrapper.optimizer.lr'",
        ),
        ("weight_decay=1", r"no key 'weight_decay'; did you mean 'optim_wrapper.optimizer.weight_decay'"),
        ("epoch=1", r"no key 'epoch'; did you mean 'epochs'"),
        ("max_epochs=1", r"no key 'max_epochs'; did you mean 'epochs' or 'train_cfg.max_epochs'"),
        ("param_scheduler.1.warmup=1", r"no key 'param_scheduler.1.warmup'; did you mean 'param_scheduler.0.warmup'"),
        ("modle=1", r"no key 'modle'; did you mean 'model'"),
        ("xyzzy=1", r"no key 'xyzzy'; valid: auto_scale_lr, compile"),
    ],
)
def test_unknown_keys(setting: str, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        load_config(SWIN, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train_cfg.max_epochs=many",
            r"train_cfg.max_epochs is a whole number \(300\), so it cannot become a text \('many'\)",
        ),
        ("train_cfg.max_epochs=1.5", r"is a whole number \(300\), so it cannot become a number \(1.5\)"),
        ("optim_wrapper.optimizer.lr=true", r"is a number \(0.0005\), so it cannot become true or false"),
        ("train_dataloader.drop_last=1", r"is true or false \(True\), so it cannot become a whole number"),
        ("optim_wrapper=3", r"optim_wrapper is a dict"),
        ("optim_wrapper.optimizer.betas.0=0.5", "is one entry of a tuple: set the whole tuple"),
        ("seed", "must be written key=value, got 'seed'"),
        ("=3", "must be written key=value, got '=3'"),
    ],
)
def test_wrong_values(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(SWIN, [setting])


def test_saved_configs_load_again(tmp_path: Path) -> None:
    config = load_config(SWIN, ["optim_wrapper.optimizer.lr=0.25"])
    (tmp_path / "config.py").write_text(config.pretty_text)
    again = load_config(tmp_path / "config.py")
    assert differences(config, again) == []
    assert again.optim_wrapper.optimizer.type == "torch.optim.AdamW"


def test_a_config_of_ones_own_is_based_on_one_that_comes_along(tmp_path: Path) -> None:
    lines = ["from mmengine.config import read_base", "from vizoo.train.hooks import EMA", "with read_base():"]
    lines += [
        f"    from vizoo.configs.{SWIN.replace('/', '.')} import *",
        "custom_hooks = [dict(type=EMA, decay=0.99)]",
    ]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "train_cfg.update(max_epochs=7)"]))
    config = load_config(tmp_path / "mine.py")
    assert config.custom_hooks == [{"type": "vizoo.train.hooks.EMA", "decay": 0.99}]
    assert config.train_cfg.max_epochs == 7
    assert load_config(SWIN).train_cfg.max_epochs == 300
    (tmp_path / "lost.py").write_text("\n".join([lines[0], lines[2], "    from no_such_package.configs import *"]))
    with pytest.raises(ValueError, match="package 'no_such_package', which is not installed"):
        load_config(tmp_path / "lost.py")


def test_differences() -> None:
    first, second = load_config(SWIN), load_config(SWIN, ["train_cfg.max_epochs=9", "model.backbone.depths=(1, 1)"])
    assert sorted(differences(first, second)) == [
        "model.backbone.depths.0: (none) -> 1",
        "model.backbone.depths.1: (none) -> 1",
        "train_cfg.max_epochs: 300 -> 9",
    ]
