from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import gpu, state_space_dual
from vizoo.ops.state_space_dual import function, reference, tiles
from vizoo.ops.state_space_dual.function import FLOPS

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
        """Inputs; those that models keep in float32 are float32 at least.

        But for bfloat16: kernels keep states in 16 bits there, and gradients of float32 would show more.
        """
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
        widest = dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
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
    Case(8, 1, 4, 16, 16, D=0),
    Case(1, 70, 4, 24, 32, groups=2, D=2),
    Case(2, 16, 4, 16, 8, groups=2, state=True),
    Case(1, 33, 3, 64, 48, packed=True),
    Case(2, 9, 2, 4, 4, packed=True, limit=(0.2, 0.9), state=True),
    Case(1, 130, 3, 16, 16, softplus=False, D=2),
]
SMALL += [replace(case, causal=False) for case in SMALL]
LARGE = [
    Case(4, 784, 4, 64, 64, packed=True),
    Case(2, 3136, 2, 48, 48, packed=True),
    Case(16, 196, 8, 64, 64, D=2),
    Case(1, 4001, 6, 64, 128, groups=2, state=True),
    Case(1, 1000, 3, 128, 64, softplus=False),
    Case(1, 16700, 2, 32, 16, packed=True, limit=(0.01, 2.0)),
]
LARGE += [replace(case, causal=False) for case in LARGE]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which computes in float32 for every dtype
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(2, 75, 2, 20, 16, state=True), Case(1, 49, 2, 16, 24, packed=True), Case(1, 64, 4, 16, 16, groups=2, D=2)],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_sequences_are_cut_in_chunks(
    case: Case, causal: bool, dtype: torch.dtype, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("collect", "outputs", "gradients"):
        monkeypatch.setattr(tiles, name, lambda *sizes: tiles.Tile(16, 4))
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 32)
    monkeypatch.setattr(tiles, "stretch", lambda rows: 16)
    monkeypatch.setattr(tiles, "whole", lambda *sizes: False)
    monkeypatch.setattr(tiles, "SCANNED", 128)
    case = replace(case, causal=causal)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_program_takes_a_whole_sequence(
    dtype: torch.dtype, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "whole", lambda *sizes: True)
    case = Case(2, 75, 2, 20, 16, causal=False, state=True)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("tokens", [1, 49, 196, 3136, 66800])
@pytest.mark.parametrize("pairs", [1, 6, 24, 263, 264, 3072])
def test_chunks_fill_the_machine(tokens: int, pairs: int) -> None:
    length = tiles.chunk(tokens, pairs, 64, 132)
    chunks = -(-tokens // length)
    assert length % 64 == 0
    assert chunks == 1 or pairs < 264
    assert pairs * chunks <= 2 * 4 * 132 or chunks == 1
    assert pairs * chunks >= 2 * 132 or length < 2 * 4 * 64


@pytest.mark.parametrize("causal", [True, False])
def test_clocks_keep_small_differences(causal: bool, device: torch.device, checks: Any) -> None:
    """Tokens that hardly decay stand behind such that nearly everything does."""
    case = Case(1, 64, 4, 16, 16, softplus=False, causal=causal)
    tensors = case.tensors(torch.float32, device)
    tensors["dt"] = torch.where(torch.arange(64, device=device)[:, None] % 8 < 2, 30.0, 1e-3) * (1 + tensors["dt"])
    tensors["A"] = -torch.ones(4, device=device)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, tensors)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "powers",
    [(7, 7, -12, -7), (-10, -10, 12, 6), (-10, -10, 6, 12), (8, 8, -10, -12), (-8, 8, 8, -8), (8, -8, -8, 8)],
    ids=str,
)
def test_what_lies_between_exceeds_half_precision(powers: tuple[int, ...], causal: bool, device: torch.device) -> None:
    """States, products of tokens and their gradients leave the range of float16, though in- and outputs do not."""
    case = Case(1, 150, 3, 16, 16, causal=causal, D=0, softplus=False)
    tensors = case.tensors(torch.float16, device)
    for name, power in zip(("x", "B", "C"), powers, strict=False):
        tensors[name] = tensors[name] * 2.0**power
    results = []
    for implementation, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = {name: each.to(dtype).requires_grad_() for name, each in tensors.items() if name != "A"}
        out = case.call(implementation)(leaves | {"A": tensors["A"].to(dtype)})
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).half().to(device)
        incoming = (incoming * 2.0 ** powers[3]).to(dtype)
        results.append([out, *torch.autograd.grad(out, [leaves[name] for name in ("x", "B", "C")], incoming)])
    for found, exact in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found.double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_take_any_strides(dtype: torch.dtype, causal: bool, device: torch.device, checks: Any) -> None:
    case = Case(2, 19, 4, 16, 12, groups=2, causal=causal, D=2)
    tensors = case.tensors(dtype, device)
    incoming = torch.randn(2, 19, 4, 16, device=device).to(dtype)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_of_one_projection(
    dtype: torch.dtype, causal: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of it are read where they lie, and what holds them all gives the same, gradients in one piece."""
    case = Case(2, 19, 3, 16, 24, causal=causal, packed=True)
    tensors = case.tensors(dtype, device)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("a copy"))
    results = []
    for packed in (True, False):
        leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
        arguments = dict(leaves)
        if not packed:
            arguments["x"], arguments["B"], arguments["C"] = reference.unpacked(leaves["x"], 3, 24)
        out = replace(case, packed=packed).call("triton")(arguments)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", [Case(1, 20, 2, 16, 16, gate=True), Case(1, 20, 2, 16, 16, gate=True, state=True)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_with_a_gate(dtype: torch.dtype, case: Case, causal: bool, device: torch.device, checks: Any) -> None:
    case = replace(case, causal=causal, limit=(0.3, float("inf")))
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("causal", [True, False])
def test_dtypes_mix(implementation: Any, causal: bool, device: torch.device) -> None:
    """Steps may stay in float32 and parameters may be half, whatever the maps are; autocast leaves all as they are."""
    case = Case(1, 20, 2, 16, 16, causal=causal)
    tensors = case.tensors(torch.float32, device)
    mixed = {name: each.half() if name != "dt" else each for name, each in tensors.items()}
    leaves = {name: each.requires_grad_() for name, each in mixed.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out = case.call(implementation)(leaves)
    assert out.dtype == torch.float16
    exact = case.call("reference")({name: each.detach().double() for name, each in mixed.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [each.dtype for each in mixed.values()]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_states_alone_have_gradients(implementation: Any, causal: bool, device: torch.device) -> None:
    case = Case(1, 20, 2, 16, 16, causal=causal, state=True)
    results = []
    for dtype, way in ((torch.float32, implementation), (torch.float64, "reference")):
        leaves = {name: each.to(dtype).requires_grad_() for name, each in case.tensors(dtype, device).items()}
        _, state = state_space_dual(**leaves, causal=causal, softplus=True, return_state=True, implementation=way)
        wanted = [leaves[name] for name in ("x", "B", "dt", "A", "initial_state")]
        results.append([state, *torch.autograd.grad(state.square().sum(), wanted)])
    assert results[0][0].dtype == torch.float32
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_and_heads_do_not_mix(causal: bool, device: torch.device) -> None:
    case = Case(2, 20, 2, 16, 16, causal=causal)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float32, device).items()}
    x = tensors["x"].detach().clone()
    x[0, 7, 1] = float("nan")
    out = case.call("triton")(tensors | {"x": x})
    assert out[1].isfinite().all()
    assert out[:, :, 0].isfinite().all()
    assert not out[0, 7:, 1].isfinite().any()
    incoming = torch.zeros_like(out)
    incoming[0, 7, 1] = float("nan")
    (gradient,) = torch.autograd.grad(case.call("triton")(tensors), tensors["x"], incoming)
    assert gradient[1].isfinite().all()
    assert gradient[:, :, 0].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_empty_input(implementation: Any, sizes: tuple[int, int], causal: bool, device: torch.device) -> None:
    case = Case(*sizes, 2, 16, 8, causal=causal, state=True, D=2)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float16, device).items()}
    out, state = state_space_dual(
        **tensors, causal=causal, softplus=True, return_state=True, implementation=implementation
    )
    assert (out.shape, out.dtype) == ((*sizes, 2, 16), torch.float16)
    torch.testing.assert_close(state, tensors["initial_state"])
    (out.sum() + state.sum()).backward()
    for name, each in tensors.items():
        expected = torch.ones_like(each) if name == "initial_state" else torch.zeros_like(each)
        torch.testing.assert_close(each.grad, expected, rtol=0, atol=0)


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    def run(tensors: Tensors) -> Tensor:
        names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
        limit = None if case.limit is None else list(case.limit)
        return torch.ops.vizoo.state_space_dual(
            *map(tensors.get, names), case.N, case.causal, case.softplus, limit
        )[0]  # fmt: skip

    return run


REGISTERED = [
    Case(1, 19, 2, 16, 8, packed=True, limit=(0.1, 1.0)),
    Case(1, 9, 4, 16, 8, groups=2, D=2, softplus=False),
    Case(1, 9, 2, 16, 8, causal=False),
    Case(1, 9, 2, 16, 8, packed=True, causal=False, D=0),
]


@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_the_short_way_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, case.L, case.heads, case.P, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("wanted", [("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"), ("B",), ()],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("case", [replace(each, state=True, softplus=True) for each in REGISTERED[:3]], ids=str)
def test_operator_is_registered_well(case: Case, wanted: tuple[str, ...], device: torch.device) -> None:
    tensors = case.tensors(torch.float32, device)
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    for name in wanted:
        if name in tensors:
            tensors[name].requires_grad_()
    limit = None if case.limit is None else list(case.limit)
    arguments = (*map(tensors.get, names), case.N, case.causal, True, limit)
    torch.library.opcheck(function._forward, arguments)


def test_second_derivative_is_refused(device: torch.device) -> None:
    case = Case(1, 5, 1, 16, 16, causal=False)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    for call, message in ((case.call("triton"), "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    case = REGISTERED[2]
    tensors = case.tensors(torch.float32, device)
    call = lambda *values: case.call("triton")(dict(zip(tensors, values, strict=True)))  # noqa: E731
    graph = make_fx(call)(*tensors.values())
    assert "torch.ops.vizoo.state_space_dual" in graph.code
    torch.testing.assert_close(graph(*tensors.values()), call(*tensors.values()), rtol=0, atol=0)


def test_results_repeat(device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 64)
    for causal in (True, False):
        case = Case(1, 150, 2, 16, 16, causal=causal)
        tensors = case.tensors(torch.float16, device)
        incoming = torch.randn(1, 150, 2, 16, device=device)
        first, second = (checks.values_and_gradients(case.call("triton"), tensors, incoming) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name])


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("implementation", "packed"), [("reference", False), ("triton", True)])
def test_compiles_without_graph_breaks(implementation: Any, packed: bool, causal: bool, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(causal, packed).to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[: 2 if implementation == "triton" else 1]:  # the reference is exported above, and is slow
            x = torch.randn(*size, 16, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
            torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_compilers_get_the_kernels(causal: bool) -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block(causal, packed=True).cuda(), torch.randn(2, 72, 16, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert "vizoo.state_space_dual" in graphs[0]
    out, expected = torch.compile(block, fullgraph=True)(x), block(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)


def test_operations_are_counted(device: torch.device) -> None:
    def count(case: Case, implementation: str) -> int:
        leaves = {name: each.requires_grad_() for name, each in case.tensors(torch.float32, device).items()}
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            case.call(implementation)(leaves).sum().backward()
        return counter.get_total_flops()

    case = Case(1, 64, 4, 16, 8, groups=2, causal=False)
    by_state, inputs, maps = 2 * 64 * 4 * 16 * 8, 2 * 64 * 64 * 4 * 16, 2 * 64 * 64 * 8
    assert count(case, "reference") == count(case, "triton") == 6 * by_state
    packed = replace(case, groups=1, packed=True)
    assert count(packed, "triton") == 6 * by_state
    assert count(replace(case, causal=True), "triton") == 7 * by_state + 3 * inputs + (3 * 4 + 2) * maps
    assert count(replace(packed, causal=True), "triton") == 7 * by_state + 3 * inputs + (3 * 4 + 1) * maps


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


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(**changed: Tensor) -> str:
        arguments = {**EVERYTHING, **changed}
        return "; ".join(ops.explain(state_space_dual, **arguments)["triton"])

    assert "float16, bfloat16 and float32, x and dt are torch.float64, torch.float32" in reasons(x=X.double())
    assert "x and dt are torch.float32, torch.float64" in reasons(dt=DT.double())
    assert "one dtype, not torch.float32, torch.float16, torch.float32" in reasons(B=MAPS.half())
    assert "the interpreter has no bfloat16" in reasons(dt=DT.bfloat16())
    wide = torch.zeros(1, 5, 4, 129)
    assert "a head may have 128 channels and 128 states, this has 129 and 3" in reasons(x=wide)
    assert "this has 6 and 129" in reasons(B=wide, C=wide)
    assert "may exceed 64, not both: 128 and 65" in reasons(x=wide[..., 1:], B=wide[..., :65], C=wide[..., :65])
    one = torch.zeros(1)
    far = torch.empty_strided((1, 1, 4, 6), (0, 2**22 + 1, 6, 1))
    assert "tokens may lie 4194304 numbers apart" in reasons(x=far, dt=DT[:, :1], B=MAPS[:, :1], C=MAPS[:, :1])
    many = {"x": one.expand(2**13, 2**16, 4, 6), "dt": one.expand(2**13, 2**16, 4)}
    maps = one.expand(2**13, 2**16, 2, 3)
    assert "may make 2**31 - 1 vectors, these make more" in reasons(**many, B=maps, C=maps)
    assert ops.explain(state_space_dual, **EVERYTHING) == {"reference": [], "triton": []}
    packed = ops.explain(state_space_dual, torch.zeros(1, 5, 4 * 129 + 6), DT, A, states=3)
    assert "this has 129 and 3" in packed["triton"][0]


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"state_space_dual: implementation 'triton' cannot run: .* need an NVIDIA"):
        state_space_dual(**EVERYTHING, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(state_space_dual, **EVERYTHING)["triton"] == ["triton is not installed"]
