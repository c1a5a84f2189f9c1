"""A tiny backbone, batches that detectors can learn, and the fixtures of published detectors."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vizoo.backbones.swin import FAMILY
from vizoo.train.detection import CascadeMaskRCNN, Detector, FasterRCNN, MaskRCNN, RetinaNet

HERE = Path(__file__).resolve().parent
COPIES = HERE.parent / "parity_dense"
SHARED = HERE.parents[2] / "shared" / "parity_dense"

Batch = dict[str, Any]

# Small objects in small images, narrow heads, few classes.
CLASSES = 3
RPN = {"anchor_scale": 4.0, "train_per_level": 200, "train_kept": 200, "test_kept": 100}
BOX = {"hidden": (64, 64), "samples": 128}
MASK = {"hidden": (32, 32)}
ARGUMENTS: dict[type[Detector], dict[str, Any]] = {
    FasterRCNN: {"rpn": RPN, "box": BOX},
    MaskRCNN: {"rpn": RPN, "box": BOX, "mask": MASK},
    CascadeMaskRCNN: {"rpn": RPN, "box": {"hidden": (64,), "convs": (32, 32), "samples": 128}, "mask": MASK},
    RetinaNet: {"head": {"anchor_scale": 3.0}},
}


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """The module that fills parameters and compares outputs."""
    spec = importlib.util.spec_from_file_location("vizoo_parity_detection", HERE.parent / "parity" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dense_fixture() -> Callable[[str], dict[str, Any]]:
    """Reads a fixture by name: the original where it lies beside the checkout, else the copy."""
    root = SHARED if SHARED.is_dir() and not os.environ.get("VIZOO_PARITY_COPIES") else COPIES
    return lambda name: json.loads((root / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Arguments of a Swin that runs in milliseconds, without random depth."""
    return {"name": "swin_tiny_patch4_window7_224", **FAMILY.tiny, "drop_path_rate": 0.0}


@pytest.fixture(scope="session")
def make(tiny: dict[str, Any]) -> Callable[..., Detector]:
    """Builds a small detector on that Swin: `make(MaskRCNN, frozen_stages=1)`."""

    def build(model: type[Detector], **options: Any) -> Detector:
        backbone = {**tiny, **({"out_indices": (1, 2, 3)} if model is RetinaNet else {})}
        common = {"backbone": backbone, "num_classes": CLASSES, "channels": 32}
        return model(**{**common, **ARGUMENTS[model], **options})

    return build


def scene(index: int, side: int = 96) -> tuple[Tensor, dict[str, Any]]:
    """An image with a rectangle and an ellipse of two of three colours on noise, and its objects."""
    drawn = torch.Generator().manual_seed(index)
    image = torch.randint(90, 130, (3, side, side), generator=drawn, dtype=torch.uint8)
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None, :]
    boxes, masks, labels = [], [], []
    for number, (x, y) in enumerate(((4, 6), (44, 40))):
        shift = 4 * index
        x1, y1, x2, y2 = x + shift, y, x + shift + 34, y + 28 + 8 * number
        mask = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
        if number:
            mask &= ((columns + 0.5 - (x1 + x2) / 2) / 17) ** 2 + ((rows + 0.5 - (y1 + y2) / 2) / 18) ** 2 < 1
        label = (index + number) % CLASSES
        image[label][mask] = 250
        boxes.append([float(x1), float(y1), float(x2), float(y2)])
        masks.append(mask.to(torch.uint8))
        labels.append(label)
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "masks": torch.stack(masks)}
    return image, {**target, "image_id": index, "original_size": (side, side), "path": f"{index}.png"}


@pytest.fixture
def batch() -> Batch:
    """Two images of 96 pixels with two objects each."""
    images, targets = zip(*(scene(i) for i in range(2)), strict=True)
    return {"images": list(images), "targets": list(targets)}


@pytest.fixture
def empty(batch: Batch) -> Batch:
    """The same images, of which the first holds nothing and the second only boxes without extent."""
    nothing = {
        **batch["targets"][0],
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 96, 96, dtype=torch.uint8),
    }
    flat = {**batch["targets"][1], "boxes": torch.tensor([[5.0, 5.0, 5.0, 40.0], [9.0, 9.0, 30.0, 9.0]])}
    return {"images": batch["images"], "targets": [nothing, flat]}
