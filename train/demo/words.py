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


def recipe_in_words(name: str, config: Config, data: str) -> list[tuple[str, str]]:
    """Name and value of what made up a training, from its resolved config; `data` says what was learnt from."""
    model, loader = config.model, config.train_dataloader
    averages = [hook.decay for hook in config.custom_hooks if str(hook.type).endswith("EMA")]
    facts = [
        ("Config", name),
        ("Model", _model(model)),
        ("Data", data),
        ("Augmentation", _augmentation(loader.dataset.transform)),
        ("Optimiser", _arguments(dict(config.optim_wrapper.optimizer))),
        ("Batch and epochs", f"{loader.batch_size} images, {config.train_cfg.max_epochs} epochs"),
        ("Moving average", f"{averages[0]:g} per update" if averages else "none"),
        ("Precision", str(config.optim_wrapper.get("dtype", "float32"))),
    ]
    if "label_smoothing" in model:
        facts.insert(-2, ("Label smoothing", f"{model.label_smoothing:g}"))
    return facts


def digits_in_words(config: Config) -> str:
    """Where the digits of a run come from."""
    share = config.val_dataloader.dataset.get("held_out", 0.2)
    return f"1,797 scans of 8 x 8 pixels (UCI, in scikit-learn), {share:.0%} of each class held out by a fixed seed"


def shapes_in_words(config: Config) -> str:
    """Where the shapes of a run come from."""
    held = config.val_dataloader.dataset
    train, val = held.scenes
    return (
        f"{train} scenes to train on and {val} held out, {held.size} pixels, seed {held.seed}: six classes of shapes "
        "over other photographs each (scikit-image, scikit-learn)"
    )


def _model(model: Mapping[str, Any]) -> str:
    """The backbone, and what is built on it."""
    backbone, kind = str(model["backbone"]["name"]), _name(model)
    if kind == "ImageClassifier":
        return backbone
    heads = [_name(model[head]) for head in ("decode_head", "auxiliary_head") if model.get(head)]
    return f"{' and '.join(heads) or kind} on {backbone}"


def _augmentation(transform: Mapping[str, Any]) -> str:
    steps = transform.get("transforms")
    return "; ".join(map(_arguments, steps)) if steps else _arguments(transform)


def _name(spec: Mapping[str, Any]) -> str:
    return str(spec["type"]).rpartition(".")[2]


def _arguments(spec: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "type")
    return f"{_name(spec)} {values}"


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
