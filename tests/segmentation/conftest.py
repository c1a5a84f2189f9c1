"""A tiny backbone, a batch that can be learnt, and the fixtures of published segmenters."""

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
from vizoo.train.segmentation.segmenter import Segmenter

HERE = Path(__file__).resolve().parent
COPIES = HERE.parent / "parity_dense"
SHARED = HERE.parents[2] / "shared" / "parity_dense"

Batch = dict[str, Any]
COLOURS = torch.tensor([[0, 0, 0], [180, 0, 0], [0, 180, 0], [0, 0, 180], [180, 180, 0]])


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """The module that fills parameters and compares outputs."""
    spec = importlib.util.spec_from_file_location("vizoo_parity_segmentation", HERE.parent / "parity" / "parity.py")
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


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Arguments of a Swin that runs in milliseconds, without random depth."""
    return {"name": "swin_tiny_patch4_window7_224", **FAMILY.tiny, "drop_path_rate": 0.0}


@pytest.fixture
def make(tiny: dict[str, Any]) -> Callable[..., Segmenter]:
    """Builds a segmenter of five classes on that Swin: `make(dict(type=UPerHead, channels=16), ...)`."""

    def build(decode_head: Any, **options: Any) -> Segmenter:
        return Segmenter(**{"backbone": tiny, "decode_head": decode_head, "num_classes": 5, **options})

    return build


@pytest.fixture
def batch() -> Batch:
    """Four images of 64 pixels with a rectangle of one of four classes on background, and some ignored pixels."""
    images, targets = [], []
    for i in range(4):
        label = torch.zeros(64, 64, dtype=torch.uint8)
        top, left = 4 * i, 8 + 4 * i
        label[top : top + 32, left : left + 24] = i + 1
        images.append((torch.randint(0, 60, (3, 64, 64)) + COLOURS[label.long()].movedim(2, 0)).to(torch.uint8))
        label[-4:] = 255
        targets.append({"map": label, "original_size": (64, 64), "path": f"{i}.png"})
    return {"images": images, "targets": targets}


@pytest.fixture
def shapes() -> Callable[[dict[str, Any], str], dict[str, list[int]]]:
    """Shapes of a fixture's tensors below a part, `shapes(fixture, "decode_head")`."""

    def found(fixture: dict[str, Any], root: str) -> dict[str, list[int]]:
        start = f"{root}."
        return {key[len(start) :]: shape for key, shape, _ in fixture["state_dict"] if key.startswith(start)}

    return found


@pytest.fixture
def pyramid() -> Callable[..., list[Tensor]]:
    """Maps of 8, 16, 32 and 64 channels for an image of a size: `pyramid(height, width, images=2)`."""

    def maps(height: int, width: int, images: int = 2) -> list[Tensor]:
        return [torch.randn(images, 8 * 2**i, -(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2))) for i in range(4)]

    return maps
