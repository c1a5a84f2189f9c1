"""Every config of a detector or segmenter, as checkpoints keep it, is enough to build its model and transform again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.predict import config_value
from vizoo.train.dense_models import _stored_transform, build_model
from vizoo.train.dense_weights import DETECT, SEGMENT
from vizoo.train.settings import list_configs, load_config

FILE = Path("best.pth")
TASKS = {
    **{name: DETECT for name in list_configs() if name.startswith("coco/") or name == "demo/shapes_detect"},
    **{
        name: SEGMENT
        for name in list_configs()
        if name.startswith(("ade20k/", "cityscapes/")) or name == "demo/shapes_segment"
    },
}


def test_there_are_configs_of_both_tasks() -> None:
    assert set(TASKS.values()) == {DETECT, SEGMENT}


@pytest.mark.parametrize("name", TASKS)
def test_a_model_from_the_text_of_its_config(name: str) -> None:
    config = load_config(name)
    text = config.pretty_text
    with torch.device("meta"):
        model: Any = build_model(config_value(text, "model"), TASKS[name])
    assert type(model).__name__ == config.model.type.rpartition(".")[2]
    assert model.num_classes == config.model.num_classes
    transform = _stored_transform(FILE, {"cfg": text}, TASKS[name])
    stated = config.val_dataloader.dataset.transform
    assert type(transform).__name__ == stated.type.rpartition(".")[2]
    for key in ("short", "long", "scale"):
        if key in stated:
            assert getattr(transform, key) in (stated[key], (stated[key],))


@pytest.mark.parametrize(
    "cfg",
    [
        "",
        "import os",
        "val_dataloader = 3",
        "val_dataloader = dict(",
        "val_dataloader = os.system('x')",
        "val_dataloader = dict(dataset=3)",
        "val_dataloader = dict(dataset=dict(transform=None))",
    ],
)
def test_texts_that_say_nothing(cfg: str) -> None:
    assert _stored_transform(FILE, {"cfg": cfg}, DETECT) is None
