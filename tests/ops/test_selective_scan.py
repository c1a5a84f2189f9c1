from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vizoo.ops import selective_scan
from vizoo.ops.selective_scan import reference, tiles

Tensors = dict[str, Tensor]
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """Sizes of a scan, which of the tensors that may be left out it has, and its options."""

    batch: int
    channels: int
    length: int
    states: int = 1
    groups: int = 1
    given: tuple[str, ...] = ("D", "delta_bias")
    softplus: bool = True
    reverse: bool = False
    tokens_first: bool = False
    """Whether sequences lie in memory as (B, L, D), the way projections leave them."""

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)
        b, d, L, N = self.batch, self.channels, self.length, self.states
        sizes = {
            "u": (b, d, L), "delta": (b, d, L), "A": (d, N), "B": (b, self.groups, N, L), "C": (b, self.groups, N, L),
            "D": (d,), "z": (b, d, L), "delta_bias": (d,), "initial_state": (b, d, N),
        }  # fmt: skip
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        drawn["A"] = -torch.exp(drawn["A"])
        if not self.softplus:
            drawn["delta"], drawn["delta_bias"] = drawn["delta"].abs(), drawn["delta_bias"].abs()
        kept = {name: tensor for name, tensor in drawn.items() if name not in OPTIONAL or name in self.given}
        moved = {name: tensor.to(dtype).to(device) for name, tensor in kept.items()}
        return {name: self._laid_out(tensor) for name, tensor in moved.items()}

    def _laid_out(self, tensor: Tensor) -> Tensor:
        if not self.tokens_first or tensor.ndim < 3 or tensor.shape[-1] != self.length:
            return tensor
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)

    def options(self) -> dict[str, Any]:
        return {"softplus": self.softplus, "reverse": self.reverse}

    def call(self, implementation: Any) -> Callable[[Tensors], Tensor]:
        """Output and last state in one row, so that gradients come through both."""

        def run(tensors: Tensors) -> Tensor:
            out, last = selective_scan(**tensors, **self.options(), return_state=True, implementation=implementation)
            return torch.cat((out.flatten(), last.to(out.dtype).flatten()))

        return run


def by_hand(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Token by token, group by group."""
    batch, channels, length = u.shape
    each = channels // B.shape[1]
    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    out: list[Tensor] = [u[..., 0]] * length
    for t in reversed(range(length)) if reverse else range(length):
        v = delta[..., t] if delta_bias is None else delta[..., t] + delta_bias
        step = torch.where(v > 20, v, torch.log1p(torch.exp(v.clamp(max=20)))) if softplus else v
        B_t, C_t = (m[..., t].repeat_interleave(each, 1) for m in (B, C))
        h = torch.exp(step[..., None] * A) * h + (step * u[..., t])[..., None] * B_t
        y = (h * C_t).sum(-1)
        if D is not None:
            y = y + D * u[..., t]
        out[t] = y if z is None else y * z[..., t] / (1 + torch.exp(-z[..., t]))
    return torch.stack(out, -1), h


EVERYTHING = ("D", "z", "delta_bias", "initial_state")
SMALL = [
    Case(2, 6, 19, states=3, groups=2),
    Case(1, 4, 1, given=()),
    Case(1, 3, 16, states=2, given=("z",), softplus=False),
    Case(2, 4, 33, states=4, groups=4, given=EVERYTHING, reverse=True),
    Case(1, 5, 40, given=EVERYTHING, tokens_first=True),
    Case(2, 6, 21, states=16, groups=2, given=EVERYTHING, tokens_first=True, reverse=True),
]


@pytest.mark.parametrize("case", [*SMALL, Case(1, 2, 300, states=2), Case(1, 2, 530, reverse=True)], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    found = selective_scan(**tensors, **case.options(), return_state=True)
    for value, expected in zip(found, by_hand(**tensors, **case.options()), strict=True):
        torch.testing.assert_close(value, expected)


GOLDEN = {
    "u": [[1, -1, 0.5, 2], [0, 0.5, -2, 1]],
    "delta": [[0, 0.5, -1, 1], [-0.5, 0, 0.25, -2]],
    "B": [[[0.5, -1, 1, 0], [1, 0.5, -0.5, 2]]],
    "C": [[[1, 0, 0.5, -1], [-0.5, 1, 1, 0.5]]],
    "A": [[-1, -2], [-0.5, -3]],
    "D": [0.5, -1],
    "z": [[1, 0, -1, 2], [0.5, -0.5, 3, 0]],
    "delta_bias": [-1, 0.5],
}
GOLDEN_RESULTS = {
    "out": [[0.3655292893, 0, -0.1108006147, 3.6776084011], [0, 0.0484159577, 5.3442531531, 0]],
    "last": [[0.2834520554, 2.7422226865], [-2.3053492123, 1.0285092949]],
    "u": [[0.273754, 0.414977, -0.260243, 2.101841], [-0.142406, -0.645551, -2.857722, 0]],
    "delta": [[-0.078791, -0.294094, 0.000826, 2.038004], [0, -0.266576, 0.087035, 0]],
    "A": [[-0.452316, -0.020160], [-0.448122, 0.026125]],
    "B": [[[0.054641, 0.818112, -3.313295, -2.442088], [-0.119096, -0.028052, -6.500817, 1.221044]]],
    "C": [[[0.114506, 0.091938, -7.438530, 0.499327], [0.229013, -0.045969, 3.304508, 4.830683]]],
    "D": [4.119776, -5.809830],
    "z": [[0.463835, -0.307832, 0.029799, 2.277186], [0, -0.066695, 2.034874, 0.909802]],
    "delta_bias": [1.665946, -0.179542],
}
"""Computed apart from this library; of the output's sum the gradients."""


def batched(name: str, value: Any) -> Tensor:
    tensor = torch.tensor(value, dtype=torch.float64)
    return tensor if name in ("A", "D", "delta_bias") else tensor[None]


def test_golden_values() -> None:
    leaves = {name: batched(name, value).requires_grad_() for name, value in GOLDEN.items()}
    out, last = selective_scan(**leaves, softplus=True, return_state=True)
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    found = {"out": out, "last": last, **dict(zip(leaves, gradients, strict=True))}
    for name, value in GOLDEN_RESULTS.items():
        torch.testing.assert_close(found[name], batched(name, value), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [2, 7, 64])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 4, 50, states=2, groups=2, given=EVERYTHING, reverse=True)
    tensors = case.tensors(torch.float64)
    expected = case.call("reference")(tensors)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    torch.testing.assert_close(case.call("reference")(tensors), expected)
    monkeypatch.setattr(reference, "WORKING_SET", 1)  # a few chunks at a time
    torch.testing.assert_close(case.call("reference")(tensors), expected)
    monkeypatch.setattr(reference, "DEPTH", 1)
    monkeypatch.setattr(reference, "WORKING_SET", 10**9)
    torch.testing.assert_close(case.call("reference")(tensors), expected)


@pytest.mark.parametrize("case", [Case(1, 4, 19, states=2, groups=2, given=EVERYTHING)], ids=str)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("reverse", [False, True])
def test_reversed_is_flipped(reverse: bool) -> None:
    case = Case(1, 4, 37, states=2, groups=2, given=EVERYTHING, reverse=reverse)
    tensors = case.tensors(torch.float64)
    out, last = selective_scan(**tensors, **case.options(), return_state=True)
    flipped = {name: t.flip(-1) if t.shape[-1] == case.length else t for name, t in tensors.items()}
    again, last_again = selective_scan(**flipped, softplus=True, reverse=not reverse, return_state=True)
    torch.testing.assert_close(again.flip(-1), out)
    torch.testing.assert_close(last_again, last)


@pytest.mark.parametrize("reverse", [False, True])
def test_state_carries_on(reverse: bool) -> None:
    """A sequence in two parts is the whole."""
    tensors = Case(2, 4, 50, states=3, given=("z",)).tensors(torch.float64)
    parts = [{n: t[..., part] if t.shape[-1] == 50 else t for n, t in tensors.items()}
             for part in (slice(0, 23), slice(23, 50))]  # fmt: skip
    outs, state = [], None
    for part in reversed(parts) if reverse else parts:
        out, state = selective_scan(**part, softplus=True, reverse=reverse, initial_state=state, return_state=True)
        outs.append(out)
    expected, last = selective_scan(**tensors, softplus=True, reverse=reverse, return_state=True)
    torch.testing.assert_close(torch.cat(outs[::-1] if reverse else outs, -1), expected)
    torch.testing.assert_close(state, last)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the interpreter gets through in time: few tokens, and channels of which the last are not there."""
    monkeypatch.setattr(tiles, "tokens", lambda length, flat: 8)
    monkeypatch.setattr(tiles, "forward", lambda *sizes: tiles.Tile(4, warps=1))
    monkeypatch.setattr(tiles, "backward", lambda *sizes: tiles.Tile(2, warps=1))


DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_on_small_tiles(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    plain = case.call("reference")
    checks.factor_two(case.call("triton"), plain, plain, case.tensors(dtype, device))
