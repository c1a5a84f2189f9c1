from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import gpu, selective_scan
from vizoo.ops.selective_scan import function, reference, tiles
from vizoo.ops.selective_scan.function import FLOPS

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
    Case(1, 4, 21, states=2, groups=4, given=EVERYTHING, reverse=True),
    Case(1, 5, 40, given=EVERYTHING, tokens_first=True),
    Case(2, 3, 17, states=5, given=EVERYTHING, tokens_first=True, reverse=True),
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
    "y": [[0.5, -0.6156634910, 0.4119879123, 2.0876592879], [0, -0.2564807540, 1.8701092834, 1.8196038597]],
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
    y = selective_scan(**{**leaves, "z": None}, softplus=True)
    found = {"y": y, "out": out, "last": last, **dict(zip(leaves, gradients, strict=True))}
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


@pytest.mark.parametrize("chunks", [(), (4,), (3, 5), (8, 16)])
@pytest.mark.parametrize("case", SMALL[2:5], ids=str)
def test_compilers_compute_the_same(case: Case, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.tensors(torch.float64)
    expected = case.call("reference")(tensors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(reference, "TRACED_CHUNKS", chunks)
    torch.testing.assert_close(case.call("reference")(tensors), expected)
    monkeypatch.setattr(reference, "_doublings", lambda length: (6, False))
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
def small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are short, and tiles that the interpreter gets through in time, with channels that are not there."""
    monkeypatch.setattr(tiles, "LONGEST", 16 if device.type == "cpu" else 32)
    monkeypatch.setattr(tiles, "rows", lambda each, row: tiles.Tile(4, warps=1))
    if device.type == "cpu":
        monkeypatch.setattr(tiles, "TOKENS", 8)
        for kernel in ("forward", "ends"):
            monkeypatch.setattr(tiles, kernel, lambda states: tiles.Tile(4, warps=1, unroll=1 if states == 1 else 4))
        monkeypatch.setattr(tiles, "backward", lambda states: tiles.Tile(2, warps=1, unroll=2 - states % 2))


small = pytest.mark.usefixtures("small_tiles")
TILED = [*SMALL, Case(1, 6, 21, groups=2, given=EVERYTHING), Case(1, 3, 9, reverse=True)]
LARGE = [
    Case(4, 384, 3136, groups=4),
    Case(4, 384, 3136, groups=4, tokens_first=True),
    Case(2, 1536, 196, groups=4, reverse=True),
    Case(2, 768, 784, states=16, groups=4),
    Case(2, 384, 197, states=16, given=EVERYTHING, tokens_first=True, reverse=True),
    Case(2, 100, 333, states=64, groups=2, given=EVERYTHING),
    Case(3, 36, 1001, states=5, groups=3, given=("z",)),
    Case(1, 24, 70001, states=2, given=EVERYTHING),
    Case(1, 24, 262144, given=EVERYTHING, reverse=True),
    Case(1, 24, 100003, tokens_first=True),
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*TILED, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@small
@pytest.mark.parametrize("case", TILED, ids=str)
def test_kernels_on_small_tiles(case: Case, device: torch.device, checks: Any) -> None:
    plain = case.call("reference")
    checks.factor_two(case.call("triton"), plain, plain, case.tensors(torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [SMALL[0], *[pytest.param(c, marks=pytest.mark.gpu, id=str(c)) for c in LARGE]], ids=str
)
def test_kernels(
    case: Case, dtype: torch.dtype, device: torch.device, checks: Any, request: pytest.FixtureRequest
) -> None:
    if device.type == "cpu":
        request.getfixturevalue("small_tiles")
    plain = case.call("reference")
    checks.factor_two(case.call("triton"), plain, plain, case.tensors(dtype, device))


@small
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", [1, 3])
def test_splits_join(
    states: int, reverse: bool, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence of 5 tiles for 3 programs, of which the last has one."""
    monkeypatch.setattr(tiles, "splits", lambda *_: 3)
    case = Case(1, 3, 37, states=states, given=EVERYTHING, reverse=reverse)
    plain = case.call("reference")
    checks.factor_two(case.call("triton"), plain, plain, case.tensors(torch.float32, device))


@small
@pytest.mark.parametrize("reverse", [False, True])
def test_many_splits_join(reverse: bool, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are joined at a time."""
    tokens = 2 if device.type == "cpu" else tiles.TOKENS
    monkeypatch.setattr(tiles, "TOKENS", tokens)
    monkeypatch.setattr(tiles, "splits", lambda tile, programs, count, multiprocessors: count)
    case = Case(1, 1, 70 * tokens - 1, states=2, reverse=reverse)
    plain = case.call("reference")
    checks.factor_two(case.call("triton"), plain, plain, case.tensors(torch.float32, device))


@pytest.mark.parametrize(
    ("warps", "count", "expected"), [(528, 999, 1), (5000, 9, 1), (12, 16384, 88), (1, 40, 5), (1, 7, 1)]
)
def test_only_few_long_sequences_are_split(warps: int, count: int, expected: int) -> None:
    assert tiles.splits(tiles.backward(1), warps, count, 132) == expected


@pytest.mark.parametrize("states", [1, 2, 16, 33, 64])
def test_tiles_fit(states: int) -> None:
    for tile in (tiles.forward(states), tiles.backward(states), tiles.ends(states)):
        assert tile.channels == 32 * tile.warps  # lanes that are channels hold all tokens of theirs
        assert tile.unroll & (tile.unroll - 1) == 0 or states % tile.unroll == 0


@pytest.mark.parametrize(("length", "row"), [(97, 128), (128, 128), (129, 256), (196, 256), (3136, 256)])
@pytest.mark.parametrize("each", [1, 3, 96, 1000])
def test_rows_fit(each: int, length: int, row: int) -> None:
    assert tiles.in_rows(1, True, length)
    assert tiles.row(length) == row
    tile = tiles.rows(each, row)
    assert tile.channels < 2 * each
    assert tile.channels * row == 8 * 32 * tile.warps or tile.channels * row < 8 * 32


@pytest.mark.parametrize(("states", "tokens_together", "length"), [(1, True, 96), (1, False, 3136), (2, True, 3136)])
def test_other_sequences_are_held(states: int, tokens_together: bool, length: int) -> None:
    assert not tiles.in_rows(states, tokens_together, length)


@small
@pytest.mark.parametrize("states", [1, 2])
def test_kernels_take_any_strides(states: int, device: torch.device, checks: Any) -> None:
    case = Case(2, 4, 11, states=states, groups=2, given=EVERYTHING)
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(2, 4, 11, device=device)
    call = lambda leaves: selective_scan(**leaves, softplus=True, implementation="triton")  # noqa: E731
    expected = checks.values_and_gradients(call, tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = call(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name])


@small
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_tokens_apart_stay_apart(implementation: Any, device: torch.device) -> None:
    """Projections leave channels together: gradients and, of the kernels, outputs lie as what they belong to."""
    tensors = Case(2, 4, 9, states=2, tokens_first=True).tensors(torch.float32, device)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = selective_scan(**leaves, implementation=implementation)
    if implementation == "triton":
        assert out.transpose(1, 2).is_contiguous()
        by_u, by_B = torch.autograd.grad(out.sum(), [leaves["u"], leaves["B"]])
        assert by_u.transpose(1, 2).is_contiguous()
        assert by_B.permute(0, 3, 1, 2).is_contiguous()
    torch.testing.assert_close(out, by_hand(**tensors)[0], rtol=1e-5, atol=1e-5)


@small
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, device: torch.device) -> None:
    """Parameters stay in float32 though sequences are half; the output may be wider; autocast changes nothing."""
    case = Case(1, 4, 11, states=2, given=EVERYTHING)
    tensors = case.tensors(torch.float32, device)
    halves = {name: t.half() if name in ("u", "delta", "B", "C", "z") else t for name, t in tensors.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in halves.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out, last = selective_scan(
            **leaves, softplus=True, return_state=True, dtype=torch.float32, implementation=implementation
        )
    assert (out.dtype, last.dtype) == (torch.float32, torch.float32)
    expected, _ = by_hand(**{name: t.double() for name, t in halves.items()}, softplus=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out.square().sum() + last.sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in halves.values()]
    assert all(gradient.isfinite().all() for gradient in gradients)


@small
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_any_step_is_stable(implementation: Any, device: torch.device) -> None:
    """Steps so long that nothing is left of the state, and so short that all of it is; softplus far beyond 20."""
    case = Case(1, 6, 20, states=2, given=("D", "initial_state"))
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    with torch.no_grad():
        leaves["delta"].copy_(torch.tensor([-200.0, -30.0, 19.9, 20.1, 1e4, 1e8], device=device)[:, None])
        leaves["u"].div_(leaves["delta"].clamp(min=1))
    out, last = selective_scan(**leaves, softplus=True, return_state=True, implementation=implementation)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    expected, last_expected = by_hand(**wide, softplus=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.double(), last_expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    exact = torch.autograd.grad(expected.sum(), list(wide.values()))
    for name, gradient, value in zip(leaves, gradients, exact, strict=True):
        assert gradient.isfinite().all(), name
        if name != "delta":  # where steps are long, differences of large numbers
            torch.testing.assert_close(gradient.double(), value, rtol=1e-3, atol=1e-4, msg=name)


@small
@pytest.mark.parametrize("wanted", ["u", "A", "C", "z", "initial_state"])
def test_gradients_nobody_asked_for(wanted: str, device: torch.device) -> None:
    case = Case(1, 3, 10, states=2, given=EVERYTHING)
    tensors = case.tensors(torch.float32, device)
    everything = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    selective_scan(**everything, softplus=True, implementation="triton").square().sum().backward()
    tensors[wanted].requires_grad_()
    selective_scan(**tensors, softplus=True, implementation="triton").square().sum().backward()
    for name, tensor in tensors.items():
        if name == wanted:
            torch.testing.assert_close(tensor.grad, everything[name].grad, rtol=0, atol=0)
        else:
            assert tensor.grad is None


@small
def test_gradient_of_the_last_state_alone(device: torch.device, checks: Any) -> None:
    case = Case(1, 3, 19, states=2, given=EVERYTHING)

    def last(implementation: Any) -> Callable[[Tensors], Tensor]:
        return lambda tensors: selective_scan(
            **tensors, softplus=True, return_state=True, implementation=implementation
        )[1]

    checks.factor_two(last("triton"), last("reference"), last("reference"), case.tensors(torch.float32, device))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_empty_batch(implementation: Any, device: torch.device) -> None:
    case = Case(0, 6, 30, states=2, groups=2, given=EVERYTHING)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float16, device).items()}
    out, last = selective_scan(**leaves, return_state=True, implementation=implementation)
    (out.sum() + last.sum()).backward()
    assert (out.shape, out.dtype, last.shape) == ((0, 6, 30), torch.float16, (0, 6, 2))
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves.values())


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def positional(case: Case, tensors: Tensors, return_state: bool = False) -> tuple[Any, ...]:
    """Arguments of the registered operator."""
    inputs = (tensors.get(name) for name in NAMES)
    return *inputs, case.softplus, case.reverse, return_state, True, tiles.TOKENS, tensors["u"].dtype


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    return lambda leaves: torch.ops.vizoo.selective_scan(*positional(case, leaves))[0]


@small
def test_second_derivative_is_refused(device: torch.device) -> None:
    case = Case(1, 2, 3)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    short = lambda leaves: selective_scan(**leaves, softplus=True, implementation="triton")  # noqa: E731
    for call, message in ((short, "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["u"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


@small
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(
    "case", [Case(2, 4, 9, groups=2, given=()), Case(1, 4, 9, states=2, given=EVERYTHING, tokens_first=True)], ids=str
)
def test_operator_is_registered_well(case: Case, device: torch.device) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    torch.library.opcheck(function._forward, positional(case, leaves, return_state=True))


@small
@pytest.mark.parametrize("given", [(), EVERYTHING], ids=str)
def test_the_short_way_equals_the_registered_operator(
    given: tuple[str, ...], device: torch.device, checks: Any
) -> None:
    case = Case(1, 4, 11, states=2, given=given, tokens_first=True)
    tensors, incoming = case.tensors(torch.float32, device), torch.randn(1, 4, 11, device=device)
    call = lambda leaves: selective_scan(**leaves, softplus=True, implementation="triton")  # noqa: E731
    short = checks.values_and_gradients(call, tensors, incoming)
    long = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(call(tensors), long["output"], rtol=0, atol=0)


@small
def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    tensors = list(Case(1, 2, 9, given=()).tensors(torch.float32, device).values())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *args: selective_scan(*args, implementation="triton"))
    graph = traced(*tensors)
    assert "torch.ops.vizoo.selective_scan" in graph.code
    torch.testing.assert_close(graph(*tensors), selective_scan(*tensors, implementation="triton"), rtol=0, atol=0)


class Block(nn.Module):
    """Scans in both directions, each with projections of its own."""

    def __init__(self, states: int = 2) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4 + 2 * states)
        self.rates = nn.Parameter(-torch.rand(4, states) - 0.1)
        self.states = states

    def forward(self, x: Tensor) -> Tensor:
        u = x.transpose(1, 2)
        delta, B, C = self.project(x).transpose(1, 2).split((4, self.states, self.states), 1)
        forth, state = selective_scan(u, delta, self.rates, B, C, softplus=True, return_state=True)
        back = selective_scan(u, delta, self.rates, B, C, z=u, softplus=True, reverse=True, initial_state=state)
        return (forth + back).transpose(1, 2)


SIZES = [(2, 18), (4, 40), (3, 7)]


def test_exports_with_free_sizes() -> None:
    block = Block().eval()
    free = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    exported = torch.export.export(block, (torch.randn(2, 18, 4),), dynamic_shapes=(free,)).module()
    for size in (*SIZES, (1, 1), (1, 3000)):
        x = torch.randn(*size, 4)
        torch.testing.assert_close(exported(x), block(x), rtol=1e-4, atol=1e-5)


@small
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(1).to(device)

    def bounded(x: Tensor) -> Tensor:
        torch._check(x.shape[1] <= 128)  # the reference is traced in steps enough for any length that is allowed;
        return block(x)  # export, above, has all of them

    compiled = torch.compile(bounded, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES:
            x = torch.randn(*size, 4, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
            torch.testing.assert_close(gradients, wanted)


@pytest.mark.gpu
def test_compilers_get_the_kernels() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block().cuda(), torch.randn(2, 50, 4, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert "vizoo.selective_scan" in graphs[0]
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-5)


@small
def test_operations_are_counted(device: torch.device) -> None:
    case = Case(2, 3, 10, states=2)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        selective_scan(**leaves, implementation="triton").sum().backward()
    assert counter.get_total_flops() == 3 * 9 * 2 * 3 * 10 * 2


INPUTS = Case(2, 6, 10, states=3, groups=2, given=EVERYTHING).tensors(torch.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"u must be floating point, got torch\.int64", {"u": INPUTS["u"].long()}),
        (TypeError, r"delta_bias must be floating point, got torch\.int8", {"delta_bias": INPUTS["D"].to(torch.int8)}),
        (TypeError, r"dtype must be floating point, got torch\.int32", {"dtype": torch.int32}),
        (ValueError, r"z must be on the device of u, cpu, got meta", {"z": INPUTS["z"].to("meta")}),
        (ValueError, r"u must have the shape \(B, D, L\) .*, got \(6, 10\)", {"u": INPUTS["u"][0]}),
        (ValueError, r"with a channel and a token at least, got \(2, 6, 0\)", {"u": INPUTS["u"][..., :0]}),
        (ValueError, r"A must have the shape \(D, N\) = \(6, N\) .*, got \(5, 3\)", {"A": INPUTS["A"][1:]}),
        (ValueError, r"with a state at least, got \(6, 0\)", {"A": INPUTS["A"][:, :0]}),
        (
            ValueError,
            r"B must have .* \(2, G, 3, 10\) or \(B, N, L\) = \(2, 3, 10\), got \(2, 2, 2, 10\)",
            {"B": INPUTS["B"][:, :, 1:]},
        ),
        (ValueError, r"B must have the shape .*, got \(2, 10\)", {"B": INPUTS["B"][:, 0, 0]}),
        (ValueError, r"C must have the shape of B, \(2, 2, 3, 10\), got \(2, 1, 3, 10\)", {"C": INPUTS["C"][:, :1]}),
        (
            ValueError,
            r"groups of B must divide the 6 channels, got 4; the next number that does is 3",
            {name: INPUTS[name].repeat(1, 2, 1, 1) for name in "BC"},
        ),
        (ValueError, r"delta must have the shape \(B, D, L\) = \(2, 6, 10\), got \(2, 6, 9\)",
         {"delta": INPUTS["delta"][..., 1:]}),
        (ValueError, r"z must have the shape \(B, D, L\) = \(2, 6, 10\), got \(2, 6\)", {"z": INPUTS["z"][..., 0]}),
        (ValueError, r"D must have the shape \(D,\) = \(6,\), got \(5,\)", {"D": INPUTS["D"][1:]}),
        (
            ValueError,
            r"initial_state must have the shape \(B, D, N\) = \(2, 6, 3\), got \(2, 3, 6\)",
            {"initial_state": INPUTS["initial_state"].transpose(1, 2)},
        ),
    ],
)  # fmt: skip
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**{**INPUTS, **arguments})


def test_one_group_needs_no_axis() -> None:
    tensors = Case(2, 4, 10, states=3).tensors(torch.float64)
    expected = selective_scan(**tensors)
    tensors |= {name: tensors[name][:, 0] for name in "BC"}
    torch.testing.assert_close(selective_scan(**tensors), expected)


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(**changed: Tensor) -> str:
        return "; ".join(ops.explain(selective_scan, **{**INPUTS, **changed})["triton"])

    known = "the kernels know float16, bfloat16 and float32, these are torch.float32, torch.float64"
    assert known in reasons(A=INPUTS["A"].double())
    assert "the interpreter has no bfloat16" in reasons(z=INPUTS["z"].bfloat16())
    one = torch.zeros(1)
    wide = {"A": one.expand(6, 65), "B": one.expand(2, 2, 65, 10), "C": one.expand(2, 2, 65, 10)}
    assert "a channel may have 64 states, this has 65" in reasons(**wide, initial_state=one.expand(2, 6, 65))
    long = {name: one.expand(2, 6, 2**23 + 1) for name in ("u", "delta", "z")}
    long |= {name: one.expand(2, 2, 3, 2**23 + 1) for name in "BC"}
    assert "a sequence may have 8388608 tokens, this has 8388609" in reasons(**long)
    assert ops.explain(selective_scan, **INPUTS)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"selective_scan: implementation 'triton' cannot run: .* need an NVIDIA GPU"):
        selective_scan(**INPUTS, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(selective_scan, **INPUTS)["triton"] == ["triton is not installed"]
