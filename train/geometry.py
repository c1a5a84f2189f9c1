"""Sizes and draws that the transforms of detection and segmentation share."""

from __future__ import annotations

import torch


def fit(height: int, width: int, long: float, short: float) -> tuple[int, int]:
    """Largest size of the same shape with a long side up to `long` and a short side up to `short`.

    Rounded half up, as the published models were tested with, and at least one pixel.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def uniform(low: float, high: float) -> float:
    """A number of [low, high), from torch's generator."""
    return low + (high - low) * float(torch.rand(()))


def integer(low: int, high: int) -> int:
    """A whole number of low..high, both included, from torch's generator."""
    return int(torch.randint(low, high + 1, ()))
