"""A run's config and its machine in words, for a person who wants to know how a model was made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config

from vizoo.environment import environment


def design_in_words(backbone: Mapping[str, Any]) -> str:
    """How a model differs from the zoo's of that name, from the arguments it was built with."""
    changes = ", ".join(f"{key}={value}" for key, value in backbone.items() if key not in ("pretrained", "num_classes"))
    return f"No special model: the zoo's own, with values that suit images of a few pixels: {changes}."


def recipe_in_words(name: str, config: Config) -> list[tuple[str, str]]:
    """Name and value of what made up a classifier's training, from its resolved config."""
    optimizer = dict(config.optim_wrapper.optimizer)
    averages = [hook.decay for hook in config.custom_hooks if str(hook.type).endswith("EMA")]
    data, held = config.train_dataloader, config.val_dataloader.dataset
    return [
        ("Config", name),
        ("Model", config.model.backbone.name),
        (
            "Data",
            f"1,797 scans of 8 x 8 pixels (UCI, in scikit-learn), {held.get('held_out', 0.2):.0%} of each class "
            "held out by a fixed seed",
        ),
        ("Augmentation", "; ".join(map(_arguments, data.dataset.transform.transforms))),
        ("Optimiser", _arguments(optimizer)),
        ("Batch and epochs", f"{data.batch_size} images, {config.train_cfg.max_epochs} epochs"),
        ("Label smoothing", f"{config.model.get('label_smoothing', 0):g}"),
        ("Moving average", f"{averages[0]:g} per update" if averages else "none"),
        ("Precision", str(config.optim_wrapper.get("dtype", "float32"))),
    ]


def _arguments(spec: Mapping[str, Any]) -> str:
    name = str(spec["type"]).rpartition(".")[2]
    values = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "type")
    return f"{name} {values}"


def machine_in_words() -> list[tuple[str, str]]:
    """Name and value of what a reader needs to judge the speed, and to repeat the run."""
    facts = environment(torch.device("cpu"))
    named = {
        "Processor": facts["device"],
        "Cores": os.cpu_count(),
        "Threads": facts["threads"],
        "System": facts["system"],
        "Python": facts["python"],
        "torch": facts["torch"],
        "mmengine": facts["mmengine"],
        "vizoo": facts["vizoo"],
        "Commit": facts["commit"],
        "Date": facts["date"],
    }
    return [(name, str(value)) for name, value in named.items() if value]
