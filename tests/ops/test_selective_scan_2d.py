from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo import ops
from vizoo.ops import selective_scan_2d
from vizoo.ops.selective_scan_2d import CONTINUOUS_ROUTES, ROW_AND_COLUMN_ROUTES, ROW_ROUTES, Route

Tensors = dict[str, Tensor]
ROWS, COLUMNS = Route(), Route(columns=True)
OPTIONAL = {"D", "delta_weight", "delta_bias", "direction_B"}


@dataclass(frozen=True)
class Case:
    """Sizes of a scan of a map, its routes, and which of the optional tensors it has."""

    shape: tuple[int, int, int, int]
    routes: tuple[Route, ...] = ROW_AND_COLUMN_ROUTES
    states: int = 1
    rank: int = 3
    shared: bool = False
    without: frozenset[str] = frozenset()
    softplus: bool = True
    routed: bool = True
    seed: int = 1

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)
        B, H, W, d = self.shape
        K, N = 1 if self.shared else len(self.routes), self.states
        sizes = {
            "x": self.shape,
            "delta": (B, H, W, K, d if "delta_weight" in self.without else self.rank),
            "A": (K, d, N),
            "B": (B, H, W, K, N),
            "C": (B, H, W, K, N),
            "D": (K, d),
            "delta_weight": (K, d, self.rank),
            "delta_bias": (K, d),
            "direction_B": (5, N),
        }
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        drawn["A"] = -drawn["A"].exp()
        if not self.softplus:
            drawn["delta"] = drawn["delta"].abs() / 3
            drawn["delta_weight"], drawn["delta_bias"] = drawn["delta_weight"].abs(), drawn["delta_bias"].abs()
        absent = self.without if all(route.continuous for route in self.routes) else self.without | {"direction_B"}
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items() if name not in absent}

    def call(self, implementation: Any, **options: Any) -> Callable[[Tensors], Tensor]:
        settings = {"softplus": self.softplus, "routes": self.routes, "routed_parameters": self.routed, **options}
        return lambda tensors: selective_scan_2d(**tensors, **settings, implementation=implementation)


def path(route: Route, H: int, W: int) -> list[tuple[int, int]]:
    """The pixels of a route, walked step by step."""
    lines, length = (W, H) if route.columns else (H, W)
    places = []
    for line in range(lines):
        steps = range(length)
        if route.continuous and line % 2:
            steps = range(length - 1, -1, -1)
        places += [(step, line) if route.columns else (line, step) for step in steps]
    return places[::-1] if route.reverse else places


def direction(places: list[tuple[int, int]], t: int) -> int:
    """0 at the start, then 1 right, 2 left, 3 up, 4 down."""
    if t == 0:
        return 0
    (row, column), (before, beside) = places[t], places[t - 1]
    return {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}[row - before, column - beside]


def by_hand(case: Case, tensors: Tensors) -> Tensor:
    """One image, route, pixel and channel vector after the other."""
    x, get = tensors["x"], tensors.get
    images, H, W, d = x.shape
    out = torch.zeros_like(x)
    for b in range(images):
        for k, route in enumerate(case.routes):
            places, p, state = path(route, H, W), 0 if case.shared else k, x.new_zeros(d, case.states)
            for t, place in enumerate(places):
                at = (b, *place) if case.routed else (b, t // W, t % W)
                step = tensors["delta"][at][p]
                if get("delta_weight") is not None:
                    step = tensors["delta_weight"][p] @ step
                if get("delta_bias") is not None:
                    step = step + tensors["delta_bias"][p]
                step = F.softplus(step) if case.softplus else step
                drive = tensors["B"][at][p]
                if get("direction_B") is not None:
                    drive = drive + tensors["direction_B"][direction(places, t)]
                u = x[(b, *place)]
                state = torch.exp(step[:, None] * tensors["A"][p]) * state + (step * u)[:, None] * drive
                y = state @ tensors["C"][at][p]
                if get("D") is not None:
                    y = y + tensors["D"][p] * u
                out[(b, *place)] += y
    return out


PLAIN = frozenset({"D", "delta_weight", "delta_bias", "direction_B"})
SMALL = [
    Case((2, 5, 6, 8)),
    Case((1, 3, 3, 5), states=4, rank=5),
    Case((1, 1, 7, 4), ROW_AND_COLUMN_ROUTES),
    Case((1, 7, 1, 4), ROW_AND_COLUMN_ROUTES, states=2),
    Case((1, 1, 1, 3)),
    Case((2, 4, 5, 6), ROW_ROUTES, without=PLAIN),
    Case((1, 5, 4, 6), (COLUMNS, ROWS, ROWS), without=frozenset({"D"}), softplus=False),
    Case((1, 5, 4, 6), CONTINUOUS_ROUTES, states=2),
    Case((2, 4, 5, 6), CONTINUOUS_ROUTES, states=3, shared=True, routed=False),
    Case((1, 3, 1, 2), CONTINUOUS_ROUTES, shared=True, routed=False),
    Case((1, 1, 4, 2), CONTINUOUS_ROUTES, shared=True, without=frozenset({"direction_B"})),
    Case((1, 3, 4, 4), ROW_AND_COLUMN_ROUTES, routed=False, without=frozenset({"delta_weight"})),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(case.call("reference")(tensors), by_hand(case, tensors))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 3, 2), rank=2),
        Case((2, 3, 2, 2), CONTINUOUS_ROUTES[1:3], states=2, rank=1, shared=True, routed=False),
    ],
    ids=str,
)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))
