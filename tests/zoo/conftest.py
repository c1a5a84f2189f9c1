"""A tiny model in the registry with weights of every kind of availability, images, and a training checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vizoo
from vizoo.backbones import swin
from vizoo.backbones.base import Variant
from vizoo.registry import _official_files, variants
from vizoo.weights.record import NOT_STATED, Weights

TINY = "swin_test_tiny"
DESIGN: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
PLAIN = Weights(
    url="http://127.0.0.1:9/tiny.pth",
    license="MIT",
    repository="nobody/nothing",
    commit="",
    container="model",
    input_size=(3, 32, 32),
    num_classes=1000,
    metrics={"top1": 12.5},
)
RECORDS = {
    "plain": PLAIN,
    "unlicensed": dataclasses.replace(PLAIN, url="http://127.0.0.1:9/unlicensed.pth", license=NOT_STATED),
    "manual": dataclasses.replace(PLAIN, url="", manual="Fetch it from the authors' page"),
}


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a variant that is in the registry while the test lasts."""
    monkeypatch.setitem(swin.VARIANTS, TINY, Variant(config=swin.SwinConfig(**DESIGN), weights=RECORDS))
    for cached in (variants, _official_files, vizoo.describe):
        cached.cache_clear()
    yield TINY
    monkeypatch.undo()
    for cached in (variants, _official_files, vizoo.describe):
        cached.cache_clear()


def spread_weights(model: vizoo.Backbone) -> vizoo.Backbone:
    """Weights large enough that predictions differ from image to image."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def official_file(tiny_model: str, tmp_path: Path) -> Path:
    """A checkpoint file such as the authors of the tiny model would publish."""
    path = tmp_path / "tiny.pth"
    torch.save({"model": spread_weights(vizoo.create_model(tiny_model)).state_dict()}, path)
    return path


CONFIG = f"""
model = dict(
    backbone=dict(name='swin_tiny_patch4_window7_224', num_classes=3, pretrained=True,
                  {", ".join(f"{key}={value!r}" for key, value in DESIGN.items())}),
    type='vizoo.train.classification.ImageClassifier')
val_dataloader = dict(dataset=dict(
    transform=dict(crop_pct=1.0, crop_mode='squash', mean=[0.5, 0.5, 0.5], size=48,
                   type='vizoo.preprocess.EvalTransform')))
"""


@pytest.fixture
def trained_file(tmp_path: Path) -> Path:
    """A checkpoint as `vizoo train` writes it."""
    model = spread_weights(vizoo.create_model("swin_tiny_patch4_window7_224", num_classes=3, **DESIGN))
    path = tmp_path / "best.pth"
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    meta = {"cfg": CONFIG, "dataset_meta": {"classes": ["ant", "bee", "cat"]}, "epoch": 3}
    torch.save({"meta": meta, "state_dict": state}, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images of different shapes, one of them deeper down, and a text."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 60, 3)), ("b.jpg", (33, 20, 3)), ("deeper/c.png", (64, 64, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder
