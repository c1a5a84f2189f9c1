"""Outlines of objects in COCO's forms: polygons, and run-length codes, compressed or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle


class Segments:
    """Outlines of objects as flat arrays; `mask` makes the pixels of one.

    An object is a union of polygons, or runs of pixels: lengths of alternating runs of 0 and 1, column by column.

    Args:
        parts: For each object a list of polygons [x1, y1, x2, y2, ...], or an array of run lengths.
    """

    def __init__(self, parts: Sequence[list[list[float]] | np.ndarray]) -> None:
        polygons = [[] if isinstance(part, np.ndarray) else part for part in parts]
        runs = [part if isinstance(part, np.ndarray) else np.zeros(0, np.int32) for part in parts]
        flat = list(chain.from_iterable(polygons))
        # Doubles, since COCO's rasteriser rounds at fifths of a pixel, where floats fall on the other side.
        self.points = np.fromiter(chain.from_iterable(flat), np.float64)
        self.point_ends = _offsets(flat)
        self.polygon_ends = _offsets(polygons)
        self.runs = np.concatenate(runs) if runs else np.zeros(0, np.int32)
        self.run_ends = _offsets(runs)

    def mask(self, index: int, height: int, width: int) -> np.ndarray:
        """Pixels of one object (height, width), uint8, as COCO's own rasteriser sets them."""
        runs = self.runs[self.run_ends[index] : self.run_ends[index + 1]]
        if len(runs):
            return np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs).reshape(width, height).T
        ends = self.point_ends[self.polygon_ends[index] : self.polygon_ends[index + 1] + 1]
        polygons = [self.points[start:end].tolist() for start, end in pairwise(ends)]
        mask: np.ndarray = rle.decode(rle.merge(rle.frPyObjects(polygons, height, width)))
        return mask


def read_polygons(segmentation: Any) -> list[list[float]] | None:
    """The polygons that enclose an area; None where there is none.

    Raises:
        ValueError: An odd number of coordinates, or one that is not a finite number.
    """
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(f"expected a list of polygons or a run-length code, got {str(segmentation)[:60]}")
    for polygon in segmentation:
        if len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} coordinates, an odd number")
        if not math.isfinite(sum(polygon)):
            raise ValueError("a polygon has a coordinate that is not finite")
    # COCO's rasteriser would take four numbers for a box.
    return [polygon for polygon in segmentation if len(polygon) >= 6] or None


def read_runs(code: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Run lengths of a run-length code, compressed (a string) or not (a list).

    Raises:
        ValueError: The code is of another image size, or its runs do not fill the image.
    """
    if tuple(code["size"]) != (height, width):
        raise ValueError(f"the mask is {tuple(code['size'])} (height, width), the image {(height, width)}")
    counts = code["counts"]
    runs = _decompress(counts) if isinstance(counts, (str, bytes)) else [int(count) for count in counts]
    if sum(runs) != height * width or min(runs, default=-1) < 0:
        raise ValueError(f"the runs sum up to {sum(runs)} pixels, the image has {height * width}")
    return np.array(runs, np.int32)


def _decompress(code: str | bytes) -> list[int]:
    """COCO's text: 5 bits a letter, lowest first; from the fourth run on, differences to the run but one before."""
    runs: list[int] = []
    value = shift = 0
    for byte in code.encode() if isinstance(code, str) else code:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


def _offsets(parts: Sequence[Any]) -> np.ndarray:
    """Start of each part in their concatenation, and the end of the last."""
    return np.cumsum([0, *map(len, parts)]).astype(np.int64)
