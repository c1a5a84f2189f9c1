from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo import ops
from vizoo.ops import state_space_dual
from vizoo.ops.state_space_dual import reference

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of an input, and what is given besides. `D` counts the axes of D, `packed` puts maps and input together."""

    batch: int
    L: int
    heads: int
    P: int
    N: int
    groups: int = 1
    causal: bool = True
    D: int = 1
    packed: bool = False
    softplus: bool = True
    limit: tuple[float, float] | None = None
    gate: bool = False
    state: bool = False

    def __str__(self) -> str:
        parts = [f"b{self.batch}l{self.L}h{self.heads}p{self.P}n{self.N}g{self.groups}D{self.D}"]
        parts += [name for name in ("causal", "packed", "softplus", "limit", "gate", "state") if getattr(self, name)]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        """Inputs; those that models keep in float32 are float32 at least."""
        generator = torch.Generator().manual_seed(1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        maps = (self.batch, self.L, self.groups, self.N)
        half = {"x": draw(self.batch, self.L, self.heads, self.P), "B": draw(*maps), "C": draw(*maps)}
        half["dt"] = draw(self.batch, self.L, self.heads) - (1 if self.softplus else 0)
        if not self.softplus:
            half["dt"] = half["dt"].abs() / 4
        if self.packed:
            half["x"] = torch.cat([half["x"].flatten(2), half.pop("B").flatten(2), half.pop("C").flatten(2)], -1)
        if self.gate:
            half["z"] = draw(self.batch, self.L, self.heads, self.P)
        wide = {"A": -draw(self.heads).exp()}
        if self.D:
            wide["D"] = draw(self.heads, self.P) if self.D == 2 else draw(self.heads)
        if self.softplus:
            wide["dt_bias"] = draw(self.heads)
        if self.state:
            wide["initial_state"] = draw(self.batch, self.heads, self.P, self.N)
        widest = torch.promote_types(dtype, torch.float32)
        tensors = {name: tensor.to(dtype) for name, tensor in half.items()}
        tensors |= {name: tensor.to(widest) for name, tensor in wide.items()}
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def call(self, implementation: Any = None) -> Callable[[Tensors], Tensor]:
        """The output; where there is an initial state, with the last one behind it, all in one tensor."""

        def run(tensors: Tensors) -> Tensor:
            out = state_space_dual(
                **tensors, causal=self.causal, softplus=self.softplus, dt_limit=self.limit,
                states=self.N if self.packed else None, return_state=self.state, implementation=implementation,
            )  # fmt: skip
            return torch.cat([each.flatten() for each in out]) if isinstance(out, tuple) else out

        return run

    def definition(self) -> Callable[[Tensors], Tensor]:
        return lambda tensors: by_hand(self, **tensors)


def by_hand(
    case: Case,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Token by token."""
    if B is None or C is None:
        inner = case.heads * case.P
        x, B, C = x[..., :inner], x[..., None, inner : -case.N], x[..., None, -case.N :]
        x = x.reshape(case.batch, case.L, case.heads, case.P)
    B, C = (each.repeat_interleave(case.heads // case.groups, 2) for each in (B, C))
    step = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(step) if case.softplus else step
    step = step if case.limit is None else step.clip(*case.limit)
    state = x.new_zeros(case.batch, case.heads, case.P, case.N) if initial_state is None else initial_state
    arrivals = torch.einsum("blhp,blhn->blhpn", x, B)
    states = []
    for t in range(case.L):
        if case.causal:
            decay = (step[:, t] * A).exp()[:, :, None, None]
            state = decay * state + step[:, t, :, None, None] * arrivals[:, t]
        else:
            state = state - (step[:, t] * A)[:, :, None, None] * arrivals[:, t]
        states.append(state)
    seen = torch.stack(states if case.causal else [state] * case.L, 1)
    y = torch.einsum("blhpn,blhn->blhp", seen, C)
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None])
    y = y if z is None else y * F.silu(z)
    return torch.cat([y.flatten(), state.flatten()]) if case.state else y


SMALL = [
    Case(2, 35, 3, 16, 16),
    Case(1, 1, 1, 16, 16, D=0),
    Case(1, 70, 2, 24, 32, groups=2, D=2),
    Case(2, 16, 4, 16, 8, groups=2, state=True),
    Case(1, 33, 1, 64, 48, packed=True),
    Case(2, 9, 2, 4, 4, packed=True, limit=(0.2, 0.9), state=True),
    Case(1, 130, 1, 16, 16, softplus=False, D=2),
]
SMALL += [replace(case, causal=False) for case in SMALL]
OPTIONS = [Case(1, 17, 2, 4, 4, gate=True, limit=(0.3, float("inf"))), Case(1, 17, 2, 4, 4, causal=False, D=0)]


@pytest.mark.parametrize("case", [*SMALL, *OPTIONS], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    out = case.call("reference")(tensors)
    torch.testing.assert_close(out, case.definition()(tensors))
    assert out.is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 2, 3, D=2, gate=True, state=True),
        Case(1, 3, 2, 1, 2, groups=2, softplus=False, limit=(0.1, 0.3)),
        Case(1, 3, 2, 2, 1, packed=True, limit=(0.1, 3.0)),
    ],
    ids=str,
)
def test_reference_gradients(case: Case, causal: bool, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 2)
    case = replace(case, causal=causal)
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


def test_chunks_and_segments_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 77, 2, 3, 5, state=True)
    tensors = case.tensors(torch.float64)
    expected = case.call("reference")(tensors)
    for name, length in (("CHUNK", 1), ("CHUNK", 10), ("CHUNK", 77), ("SEGMENT", 7), ("SEGMENT", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, length)
            torch.testing.assert_close(case.call("reference")(tensors), expected)


@pytest.mark.parametrize("case", [Case(2, 40, 4, 3, 5, groups=2), Case(1, 100, 2, 4, 4, D=2, gate=True)], ids=str)
def test_is_a_selective_scan_with_one_rate_a_head(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    channels, bias = case.heads * case.P, tensors["dt_bias"].repeat_interleave(case.P)
    D = tensors["D"].flatten() if case.D == 2 else tensors["D"].repeat_interleave(case.P)
    out = ops.selective_scan(
        tensors["x"].flatten(2).mT, tensors["dt"].repeat_interleave(case.P, 2).mT,
        tensors["A"].repeat_interleave(case.P)[:, None].expand(channels, case.N),
        tensors["B"].permute(0, 2, 3, 1), tensors["C"].permute(0, 2, 3, 1), D, delta_bias=bias, softplus=True,
        z=tensors["z"].flatten(2).mT if case.gate else None,
    )  # fmt: skip
    torch.testing.assert_close(out.mT.view_as(tensors["x"]), case.call("reference")(tensors))


def test_tokens_have_no_order_without_causality() -> None:
    case = Case(2, 50, 2, 3, 5, causal=False)
    tensors, order = case.tensors(torch.float64), torch.randperm(50)
    permuted = {name: each[:, order] if each.ndim > 2 else each for name, each in tensors.items()}
    torch.testing.assert_close(case.call("reference")(permuted), case.call("reference")(tensors)[:, order])


def test_a_token_sees_none_after_it() -> None:
    case = Case(1, 90, 2, 3, 5)
    tensors = case.tensors(torch.float64)
    leaf = tensors["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(case.call("reference")(tensors)[:, 70].sum(), leaf)
    assert not gradient[:, 71:].any()
    assert gradient[:, :71].all()


def test_a_sequence_may_be_cut_in_two() -> None:
    case = Case(2, 83, 2, 3, 5, softplus=False)
    tensors = case.tensors(torch.float64)
    halves = [{k: v[:, part] if v.ndim > 2 else v for k, v in tensors.items()} for part in (slice(40), slice(40, None))]
    first, state = state_space_dual(**halves[0], return_state=True)
    second = state_space_dual(**halves[1], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), case.call("reference")(tensors))


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e3, 1e30])
def test_rates_may_be_extreme(rate: float) -> None:
    """Without decay it is linear attention without a softmax; with nothing but decay each token sees only itself."""
    case = Case(1, 150, 2, 4, 3, D=0, softplus=False)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float64).items()}
    tensors["dt"] = tensors["dt"] + 0.1
    tensors["A"] = torch.full((2,), -rate, dtype=torch.float64, requires_grad=True)
    out = case.call("reference")(tensors)
    scores = torch.einsum("btgn,bsgn->bts", tensors["C"], tensors["B"])
    mask = torch.ones(150, 150).tril() if rate < 1 else torch.eye(150)
    expected = torch.einsum("bts,bsh,bshp->bthp", scores * mask, tensors["dt"], tensors["x"])
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sum(), [tensors[name] for name in ("x", "A", "B", "C")])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("causal", [True, False])
def test_steps_are_softplus_of_any_size(causal: bool) -> None:
    case = Case(1, 6, 1, 2, 2, causal=causal)
    tensors = case.tensors(torch.float64)
    tensors["dt"] = torch.tensor([-700.0, -20, 0, 19.9, 20.1, 700]).double().view(1, 6, 1).requires_grad_()
    out = case.call("reference")(tensors)
    expected = case.definition()(tensors)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), tensors["dt"]) for each in (out, expected)))


class Block(nn.Module):
    """A mixer of VSSD, but for its norm and projections of the output."""

    def __init__(self, causal: bool, packed: bool = False) -> None:
        super().__init__()
        self.causal, self.packed = causal, packed
        self.project = nn.Linear(16, 32 + 2 * 8 + 2)
        self.log_rate, self.skip, self.bias = (nn.Parameter(torch.randn(2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        inputs, dt = self.project(x).split([48, 2], -1)
        options: dict[str, Any] = {"states": 8}
        if not self.packed:
            inputs, B, C = inputs.split([32, 8, 8], -1)
            inputs, options = inputs.unflatten(-1, (2, 16)), {"B": B.unsqueeze(2), "C": C.unsqueeze(2)}
        return state_space_dual(
            inputs, dt, -self.log_rate.exp(), D=self.skip, causal=self.causal, dt_bias=self.bias, softplus=True,
            **options,
        )  # fmt: skip


SIZES = [(2, 70), (1, 5), (3, 64), (1, 1)]


@pytest.mark.parametrize("causal", [True, False])
def test_exports_with_free_sizes(causal: bool) -> None:
    block = Block(causal).eval()
    free = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    exported = torch.export.export(block, (torch.randn(2, 70, 16),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 16)
        torch.testing.assert_close(exported(x), block(x))


X, DT, A = torch.randn(1, 5, 4, 6), torch.randn(1, 5, 4), -torch.ones(4)
MAPS = torch.randn(1, 5, 2, 3)
PACKED = torch.randn(1, 5, 30)
EVERYTHING = {"x": X, "dt": DT, "A": A, "B": MAPS, "C": MAPS}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x must be floating point, got torch\.int64", {"x": X.long()}),
        (TypeError, r"dt must be floating point, got torch\.int64", {"dt": DT.long()}),
        (ValueError, r"B must be on the device of x, cpu, got meta", {"B": MAPS.to("meta")}),
        (ValueError, r"A must have the shape \(H,\) with a head at least, got \(0,\)", {"A": A[:0]}),
        (ValueError, r"A must have the shape \(H,\) .*, got \(4, 1\)", {"A": A[:, None]}),
        (ValueError, r"x must have the shape \(batch, L, H, P\) with H = 4 .*, got \(1, 5, 24\)", {"x": X.flatten(2)}),
        (ValueError, r"with H = 3 as A has, .* got \(1, 5, 4, 6\)", {"A": A[:3]}),
        (ValueError, r"a channel at least, got \(1, 5, 4, 0\)", {"x": X[..., :0]}),
        (ValueError, r"B and C come together: C is given, B is not", {"B": None}),
        (ValueError, r"B and C come together: B is given, C is not", {"C": None}),
        (ValueError, r"B must have the shape \(batch, L, G, N\) = \(1, 5, G, N\), got \(1, 4, 2, 3\)",
         {"B": MAPS[:, 1:]}),
        (ValueError, r"B must have the shape .*, got \(1, 5, 2, 0\)", {"B": MAPS[..., :0]}),
        (ValueError, r"C must have the shape of B, \(1, 5, 2, 3\), got \(1, 5, 1, 3\)", {"C": MAPS[:, :, :1]}),
        (ValueError, r"groups of B must divide the 4 heads, got 3; the next number that does is 2",
         {"B": torch.randn(1, 5, 3, 3), "C": torch.randn(1, 5, 3, 3)}),
        (ValueError, r"states must be those of B, 3, or be left out, got 4", {"states": 4}),
        (ValueError, r"without B and C, x holds them, too, and states must say how many",
         {"x": PACKED, "B": None, "C": None}),
        (ValueError, r"x without B and C must have .* H = 4 and states = 2, got \(1, 5, 30\)",
         {"x": PACKED, "B": None, "C": None, "states": 2}),
        (ValueError, r"H = 4 and states = 15, got \(1, 5, 30\)",
         {"x": PACKED, "B": None, "C": None, "states": 15}),
        (ValueError, r"dt must have the shape \(batch, L, H\) = \(1, 5, 4\), got \(1, 5, 3\)", {"dt": DT[..., 1:]}),
        (ValueError, r"z must have the shape \(batch, L, H, P\) = \(1, 5, 4, 6\), got \(1, 5, 24\)",
         {"z": X.flatten(2)}),
        (ValueError, r"dt_bias must have the shape \(H,\) = \(4,\), got \(3,\)", {"dt_bias": A[1:]}),
        (ValueError, r"D must have the shape \(H,\) = \(4,\), got \(3,\)", {"D": A[1:]}),
        (ValueError, r"D must have the shape \(H, P\) = \(4, 6\), got \(4, 1\)", {"D": A[:, None]}),
        (ValueError, r"initial_state must have the shape \(batch, H, P, N\) = \(1, 4, 6, 3\), got \(1, 4, 3, 6\)",
         {"initial_state": torch.randn(1, 4, 3, 6)}),
        (ValueError, r"dt_limit must be \(least, largest\) with least < largest, got \(1.0, 0.5\)",
         {"dt_limit": (1.0, 0.5)}),
    ],
)  # fmt: skip
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        state_space_dual(**{**EVERYTHING, **arguments})
