"""Routes over a map: in which order a scan reads its pixels. A route is an index map and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

START, RIGHT, LEFT, UP, DOWN = range(5)
"""Directions of the step by which a route came to a pixel; the first pixel has none."""

COLUMNS, REVERSE, CONTINUOUS = 1, 2, 4
"""Bits of a route's code, as operators of torch and kernels take it."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """An order of the pixels of a map.

    Attributes:
        columns: Go down the columns from left to right, instead of along the rows from top to bottom.
        reverse: From the last pixel of that order to the first.
        continuous: Turn at the end of each row or column, as a snake does, so that neighbours follow one another.
    """

    columns: bool = False
    reverse: bool = False
    continuous: bool = False

    @classmethod
    def of(cls, code: int) -> Route:
        """The route of a code."""
        return cls(columns=code & COLUMNS != 0, reverse=code & REVERSE != 0, continuous=code & CONTINUOUS != 0)

    @property
    def code(self) -> int:
        """The route as a number."""
        return COLUMNS * self.columns + REVERSE * self.reverse + CONTINUOUS * self.continuous

    def pixels(self, H: int, W: int, device: torch.device | str | None = None) -> Tensor:
        """Number of the pixel at each step, counted row after row, (H * W,)."""
        step = torch.arange(H * W, device=device)
        length = H if self.columns else W
        line, place = step // length, step % length
        if self.continuous:
            place = torch.where(line % 2 == 1, length - 1 - place, place)
        order = place * W + line if self.columns else line * W + place
        return order.flip(0) if self.reverse else order

    def directions(self, H: int, W: int, device: torch.device | str | None = None) -> Tensor:
        """Direction of the step to each pixel of the route, (H * W,): `START`, `RIGHT`, `LEFT`, `UP` or `DOWN`."""
        pixels = self.pixels(H, W, device)
        row, column = (pixels // W).diff(), (pixels % W).diff()
        vertical = torch.where(row < 0, UP, DOWN)
        taken = torch.where(column > 0, RIGHT, torch.where(column < 0, LEFT, vertical))
        return torch.cat((pixels.new_full((1,), START), taken))


ROW_ROUTES = (Route(), Route(reverse=True))
"""Along the rows, both ways."""

ROW_AND_COLUMN_ROUTES = (Route(), Route(columns=True), Route(reverse=True), Route(columns=True, reverse=True))
"""Along rows and columns, then both the other way: the order of VMamba's weights."""

CONTINUOUS_ROUTES = (
    Route(continuous=True),
    Route(continuous=True, reverse=True),
    Route(columns=True, continuous=True),
    Route(columns=True, continuous=True, reverse=True),
)
"""Along rows and back, along columns and back, turning at each end: the order of PlainMamba."""
