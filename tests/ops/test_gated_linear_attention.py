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
from vizoo.ops import gated_linear_attention, gpu
from vizoo.ops.gated_linear_attention import function, reference, tiles
from vizoo.ops.gated_linear_attention.function import FLOPS

Tensors = dict[str, Tensor]
INPUTS = ("q", "k", "v", "decay", "reverse_decay", "initial_state")


@dataclass(frozen=True)
class Case:
    """Sizes of an input, and its options. `strong` has a tenth of all decays leave nothing, or next to nothing."""

    batch: int
    N: int
    heads: int
    dk: int
    dv: int
    both: bool = False
    reverse: bool = False
    normalizer: float | None = None
    state: bool = False
    strong: bool = False

    def __str__(self) -> str:
        parts = [f"b{self.batch}n{self.N}h{self.heads}k{self.dk}v{self.dv}"]
        parts += [name for name in ("both", "reverse", "normalizer", "state", "strong") if getattr(self, name)]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        vectors = (self.batch, self.N, self.heads)
        tensors = {"q": draw(*vectors, self.dk), "k": draw(*vectors, self.dk), "v": draw(*vectors, self.dv)}
        for name in ("decay", "reverse_decay")[: 1 + self.both]:
            tensors[name] = draw(*vectors, self.dk)
            if self.normalizer is None:
                tensors[name] = -tensors[name].exp() / 20
            if self.strong:
                chance = torch.rand(*vectors, self.dk, generator=generator)
                tensors[name] = tensors[name].masked_fill(chance < 0.1, -70).masked_fill(chance < 0.05, -3e4)
        tensors = {name: each.to(dtype) for name, each in tensors.items()}
        if self.state:
            widest = torch.promote_types(dtype, torch.float32)
            tensors["initial_state"] = draw(self.batch, self.heads, self.dk, self.dv).to(widest)
        return {name: each.to(device) for name, each in tensors.items()}

    def call(self, implementation: Any = None) -> Callable[[Tensors], Tensor]:
        """The output; where there is an initial state, with the last one behind it, all in one tensor."""

        def run(tensors: Tensors) -> Tensor:
            out = gated_linear_attention(
                **tensors, reverse=self.reverse, normalizer=self.normalizer, return_state=self.state,
                implementation=implementation,
            )  # fmt: skip
            return torch.cat([each.flatten() for each in out]) if isinstance(out, tuple) else out

        return run

    def log_decays(self, gate: Tensor) -> Tensor:
        return gate if self.normalizer is None else F.logsigmoid(gate) / self.normalizer


def walked(
    case: Case, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse: bool, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: output and last state."""
    decay = case.log_decays(gate).exp()
    state = q.new_zeros(case.batch, case.heads, case.dk, case.dv) if start is None else start
    outs = {}
    for t in reversed(range(case.N)) if reverse else range(case.N):
        state = decay[:, t, :, :, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs[t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state) * case.dk**-0.5
    return torch.stack([outs[t] for t in range(case.N)], 1), state


def by_hand(case: Case) -> Callable[[Tensors], Tensor]:
    def run(tensors: Tensors) -> Tensor:
        q, k, v = (tensors[name] for name in "qkv")
        out, state = walked(case, q, k, v, tensors["decay"], case.reverse, tensors.get("initial_state"))
        if case.both:
            out = out + walked(case, q, k, v, tensors["reverse_decay"], True)[0]
        return torch.cat([out.flatten(), state.flatten()]) if case.state else out

    return run


def in_dtype(case: Case) -> Callable[[Tensors], Tensor]:
    """Plain torch in chunks whose products have factors in the dtype of the input, for decays that are not strong."""

    def directed(*vectors: Tensor) -> Tensor:
        outs, state, dtype = [], None, vectors[0].dtype
        for q, k, v, gate in zip(*(each.transpose(1, 2).split(64, 2) for each in vectors), strict=True):
            clock = case.log_decays(gate.float()).cumsum(2)
            end = clock[:, :, -1:]
            query, key = (q * clock.exp()).to(dtype), (k * (-clock).exp()).to(dtype)
            out = (query @ key.mT).tril() @ v
            if state is not None:
                out = out + query @ state.to(dtype)
            added = ((k * (end - clock).exp()).to(dtype).mT @ v).float()
            state = added if state is None else state * end.mT.exp() + added
            outs.append(out)
        return torch.cat(outs, 2).transpose(1, 2) * case.dk**-0.5

    def run(tensors: Tensors) -> Tensor:
        q, k, v = (tensors[name] for name in "qkv")
        forwards = [q, k, v, tensors["decay"]]
        out = directed(*(each.flip(1) for each in forwards)).flip(1) if case.reverse else directed(*forwards)
        if case.both:
            out = out + directed(*(each.flip(1) for each in (q, k, v, tensors["reverse_decay"]))).flip(1)
        return out

    return run


SMALL = [
    Case(2, 37, 1, 16, 16, both=True, normalizer=16.0),
    Case(1, 70, 1, 20, 9, reverse=True, state=True),
    Case(1, 1, 2, 3, 5, both=True),
    Case(1, 50, 1, 16, 32, both=True, strong=True),
    Case(1, 70, 1, 5, 16, state=True, strong=True),
]
WIDE = [torch.float32, torch.float16]
KERNEL = [
    *[(case, torch.float32) for case in SMALL],
    *[(case, torch.float16) for case in SMALL[:2]],
    *[
        pytest.param(case, dtype, marks=pytest.mark.gpu)
        for case, dtype in (
            (Case(8, 196, 6, 32, 64, both=True, normalizer=16.0), torch.bfloat16),
            (Case(2, 3136, 3, 16, 32, both=True, normalizer=16.0), torch.bfloat16),
            (Case(1, 4001, 8, 64, 64), torch.bfloat16),
            (Case(2, 300, 2, 128, 48, reverse=True), torch.bfloat16),
            (Case(2, 785, 3, 32, 64, both=True, normalizer=16.0), torch.float32),
            (Case(1, 1000, 2, 64, 64, state=True), torch.float16),
        )
    ],
]


@pytest.mark.parametrize("case", [*SMALL, Case(2, 33, 2, 4, 3, reverse=True), Case(1, 64, 1, 2, 2, normalizer=2.0)],
                         ids=str)  # fmt: skip
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    out = case.call("reference")(tensors)
    torch.testing.assert_close(out, by_hand(case)(tensors))
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 6, 2, 2, 3, both=True, normalizer=2.0),
        Case(2, 5, 1, 2, 1, state=True),
        Case(1, 5, 1, 1, 2, reverse=True, state=True),
    ],
    ids=str,
)
def test_reference_gradients(case: Case, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 4)
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


def test_chunks_and_segments_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 77, 2, 3, 5, state=True)
    tensors = case.tensors(torch.float64)
    expected = case.call("reference")(tensors)
    for name, length in (("CHUNK", 1), ("CHUNK", 8), ("CHUNK", 128), ("SEGMENT", 7), ("SEGMENT", 64)):
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, length)
            torch.testing.assert_close(case.call("reference")(tensors), expected)


def test_is_state_space_duality_where_all_channels_fade_alike() -> None:
    case = Case(2, 75, 2, 5, 3)
    tensors = case.tensors(torch.float64)
    steps = tensors["decay"][..., 0].neg()
    tensors["decay"] = -steps[..., None].expand_as(tensors["q"])
    out = ops.state_space_dual(
        tensors["v"] / steps[..., None], steps, -torch.ones(2, dtype=torch.float64), tensors["k"], tensors["q"]
    )
    torch.testing.assert_close(case.call()(tensors), out * 5**-0.5)


def test_both_directions_are_the_sum_of_two() -> None:
    case = Case(1, 40, 2, 3, 5, both=True, normalizer=16.0)
    tensors = case.tensors(torch.float64)
    back = tensors | {"decay": tensors["reverse_decay"]}
    del back["reverse_decay"]
    one = replace(case, both=False).call()({name: tensors[name] for name in INPUTS[:4]})
    torch.testing.assert_close(case.call()(tensors), one + replace(case, both=False, reverse=True).call()(back))
    flipped = replace(case, both=False).call()({name: each.flip(1) for name, each in back.items()})
    torch.testing.assert_close(case.call()(tensors), one + flipped.flip(1))


def test_scale_may_be_given() -> None:
    case = Case(1, 9, 1, 4, 4)
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(gated_linear_attention(**tensors, scale=0.25), case.call()(tensors) / 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_may_be_cut_in_two(reverse: bool) -> None:
    tensors = Case(2, 83, 2, 3, 5).tensors(torch.float64)
    parts = [{name: each[:, part] for name, each in tensors.items()} for part in (slice(40), slice(40, None))]
    order = parts[::-1] if reverse else parts
    first, state = gated_linear_attention(**order[0], reverse=reverse, return_state=True)
    second = gated_linear_attention(**order[1], reverse=reverse, initial_state=state)
    outs = [second, first] if reverse else [first, second]
    torch.testing.assert_close(torch.cat(outs, 1), gated_linear_attention(**tensors, reverse=reverse))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("rate", [0.0, -1e30, float("-inf")])
def test_decays_may_be_extreme(rate: float, implementation: Any, device: torch.device) -> None:
    """Without decay it is linear attention without a softmax; with nothing but decay each token sees only itself."""
    case = Case(1, 50, 2, 4, 3, both=True)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float32, device).items()}
    gates = {name: torch.full_like(tensors[name], rate) for name in ("decay", "reverse_decay")}
    tensors |= {name: each.requires_grad_() for name, each in gates.items()}
    out = case.call(implementation)(tensors)
    scores = torch.einsum("bthk,bshk->bhts", tensors["q"], tensors["k"]) / 2
    twice = torch.eye(50, device=device)
    seen = twice + (torch.ones_like(twice) if rate == 0 else twice)
    expected = torch.einsum("bhts,bshv->bthv", scores * seen, tensors["v"])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(out.sum(), list(tensors.values()))
    wanted = torch.autograd.grad(expected.sum(), [tensors[name] for name in "qkv"])
    torch.testing.assert_close(gradients[:3], wanted, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("case", "dtype"), KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which computes in float32 for every dtype
    plain = in_dtype(case) if dtype == torch.bfloat16 else reference
    checks.factor_two(case.call("triton"), plain, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("case", [Case(1, 75, 1, 20, 16, both=True), Case(1, 75, 1, 16, 24, reverse=True, state=True)],
                         ids=str)  # fmt: skip
def test_sequences_are_cut_in_chunks(
    case: Case, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 32)
    monkeypatch.setattr(tiles, "outputs", lambda *sizes: tiles.Tile(16, 1))
    monkeypatch.setattr(tiles, "SCANNED", 128)
    checks.factor_two(*(case.call(way) for way in ("triton", "reference", "reference")),
                      case.tensors(torch.float32, device))  # fmt: skip


def test_factors_may_be_half(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 takes, run in float16, which the interpreter knows."""
    from vizoo.ops.gated_linear_attention import launch

    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels are compiled for it, in bfloat16")
    monkeypatch.setattr(launch, "OPERANDS", {torch.float16: launch.tl.float16})
    case = Case(1, 75, 2, 16, 16, both=True, normalizer=16.0)
    checks.factor_two(case.call("triton"), in_dtype(case), case.call("reference"), case.tensors(torch.float16))


@pytest.mark.parametrize("tokens", [1, 49, 196, 3136, 66800])
@pytest.mark.parametrize("walks", [1, 6, 24, 263, 264, 3072])
def test_chunks_fill_the_machine(tokens: int, walks: int) -> None:
    length = tiles.chunk(tokens, walks, 32, 132)
    chunks = -(-tokens // length)
    assert length % 32 == 0
    assert chunks == 1 or walks < 264
    assert walks * chunks <= 2 * 4 * 132 or chunks == 1
    assert walks * chunks >= 2 * 132 or length < 2 * 4 * 32


def test_kernels_take_any_strides(device: torch.device, checks: Any) -> None:
    case = Case(2, 19, 2, 16, 12)
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(2, 19, 2, 12, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_parts_of_projections_are_read_where_they_lie(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 19, 2, 16, 32, both=True, normalizer=16.0)
    tensors = case.tensors(torch.float16, device)
    projected = torch.cat([tensors[name].flatten(2) for name in "qkv"], -1)
    gates = torch.cat([tensors[name].flatten(2) for name in ("decay", "reverse_decay")], -1)
    parts = [*projected.split([32, 32, 64], -1), *gates.chunk(2, -1)]
    views = {name: part.unflatten(-1, (2, -1)) for name, part in zip(tensors, parts, strict=True)}
    expected = case.call("triton")(tensors)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("a copy"))
    torch.testing.assert_close(case.call("triton")(views), expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, device: torch.device) -> None:
    """Decays may stay in float32; autocast leaves all as they are."""
    case = Case(1, 20, 1, 16, 16)
    mixed = {name: each if name == "decay" else each.half() for name, each in case.tensors(torch.float32).items()}
    leaves = {name: each.to(device).requires_grad_() for name, each in mixed.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out = case.call(implementation)(leaves)
    assert out.dtype == torch.float16
    exact = by_hand(case)({name: each.detach().double() for name, each in leaves.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [each.dtype for each in leaves.values()]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_states_alone_have_gradients(implementation: Any, device: torch.device) -> None:
    case = Case(1, 20, 1, 16, 16, state=True)
    results = []
    for dtype, way in ((torch.float32, implementation), (torch.float64, "reference")):
        leaves = {name: each.to(dtype).requires_grad_() for name, each in case.tensors(dtype, device).items()}
        _, state = gated_linear_attention(**leaves, return_state=True, implementation=way)
        wanted = [leaves[name] for name in ("k", "v", "decay", "initial_state")]
        results.append([state, *torch.autograd.grad(state.square().sum(), wanted)])
    assert results[0][0].dtype == torch.float32
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_sequences_and_heads_do_not_mix(device: torch.device) -> None:
    case = Case(2, 20, 2, 16, 16, both=True)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float32, device).items()}
    v = tensors["v"].detach().clone()
    v[0, 7, 1] = float("nan")
    out = case.call("triton")(tensors | {"v": v})
    assert out[1].isfinite().all()
    assert out[:, :, 0].isfinite().all()
    assert not out[0, :, 1].isfinite().any()
    incoming = torch.zeros_like(out)
    incoming[0, 7, 1] = float("nan")
    (gradient,) = torch.autograd.grad(case.call("triton")(tensors), tensors["q"], incoming)
    assert gradient[1].isfinite().all()
    assert gradient[:, :, 0].isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_empty_input(implementation: Any, sizes: tuple[int, int]) -> None:
    case = Case(*sizes, 2, 16, 8, state=True)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float16).items()}
    out, state = gated_linear_attention(**tensors, return_state=True, implementation=interpreted(implementation))
    assert (out.shape, out.dtype) == ((*sizes, 2, 8), torch.float16)
    torch.testing.assert_close(state, tensors["initial_state"])
    (out.sum() + state.sum()).backward()
    for name, each in tensors.items():
        expected = torch.ones_like(each) if name == "initial_state" else torch.zeros_like(each)
        torch.testing.assert_close(each.grad, expected, rtol=0, atol=0)
    both = Case(*sizes, 2, 16, 8, both=True)
    assert both.call(interpreted(implementation))(both.tensors(torch.float32)).shape == (*sizes, 2, 8)


def interpreted(implementation: Any) -> Any:
    """Where there is a GPU, the kernels are compiled for it, and tests on the CPU have no interpreter."""
    return "reference" if torch.cuda.is_available() else implementation


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    def run(tensors: Tensors) -> Tensor:
        options = case.dk**-0.5, case.reverse, case.normalizer
        out, state = torch.ops.vizoo.gated_linear_attention(*map(tensors.get, INPUTS), *options)
        return torch.cat([out.flatten(), state.flatten()]) if case.state else out

    return run


REGISTERED = [Case(1, 19, 1, 16, 8, both=True, normalizer=16.0), Case(1, 9, 2, 16, 8, reverse=True)]


@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_the_short_way_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.batch, case.N, case.heads, case.dv, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case(1, 9, 1, 16, 8, both=True), INPUTS[:5]),
        (Case(1, 9, 1, 16, 8, normalizer=2.0, state=True), INPUTS),
        (Case(1, 9, 1, 16, 8), ("v",)),
        (Case(1, 9, 1, 16, 8), ()),
    ],
    ids=str,
)
def test_operator_is_registered_well(case: Case, wanted: tuple[str, ...]) -> None:
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels are compiled for it, and registration is the same")
    tensors = case.tensors(torch.float32)
    for name in wanted:
        if name in tensors:
            tensors[name].requires_grad_()
    options = 0.25, False, case.normalizer
    torch.library.opcheck(function._forward, (*map(tensors.get, INPUTS), *options))


def test_second_derivative_is_refused(device: torch.device) -> None:
    case = Case(1, 5, 1, 16, 16)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    for call, message in ((case.call("triton"), "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["q"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    case = REGISTERED[0]
    tensors = case.tensors(torch.float32, device)
    call = lambda *values: case.call("triton")(dict(zip(tensors, values, strict=True)))  # noqa: E731
    graph = make_fx(call)(*tensors.values())
    assert "torch.ops.vizoo.gated_linear_attention" in graph.code
    torch.testing.assert_close(graph(*tensors.values()), call(*tensors.values()), rtol=0, atol=0)


def test_results_repeat(device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 32)
    case = Case(1, 50, 1, 16, 16, both=True)
    tensors = case.tensors(torch.float16, device)
    incoming = torch.randn(1, 50, 1, 16, device=device)
    first, second = (checks.values_and_gradients(case.call("triton"), tensors, incoming) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


class Block(nn.Module):
    """A mixer of ViG, but for its convolution, norms and projection of the output."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.qkv, self.gates = nn.Linear(8, 64), nn.Linear(8, 16 * (1 + both))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, -1)) for each in self.qkv(x).split([16, 16, 32], -1))
        gates = (each.unflatten(-1, (2, -1)) for each in self.gates(x).split(16, -1))
        return gated_linear_attention(q, k, v, *gates, normalizer=16.0)


SIZES = [(2, 70), (1, 5), (3, 64), (1, 1)]


def test_exports_with_free_sizes() -> None:
    block = Block().eval()
    free = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    exported = torch.export.export(block, (torch.randn(2, 70, 8),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 8)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(both=implementation == "triton").to(device)  # the reference walks twice for both
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES[: 2 if implementation == "triton" else 1]:  # the reference is exported above, and is slow
            x = torch.randn(*size, 8, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
            torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_compilers_get_the_kernels() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block().cuda(), torch.randn(2, 72, 8, device="cuda")
    with ops.use("triton"):
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
        assert "vizoo.gated_linear_attention" in graphs[0]
        out, expected = torch.compile(block, fullgraph=True)(x), block(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)


def test_operations_are_counted() -> None:
    def count(case: Case) -> int:
        leaves = {name: each.requires_grad_() for name, each in case.tensors(torch.float32).items()}
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            registered(case)(leaves).sum().backward()
        return counter.get_total_flops()

    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels are compiled for it, and operations are the same")
    by_state, keys, values = 2 * 64 * 16 * 8, 2 * 64 * 32 * 16, 2 * 64 * 32 * 8
    assert count(Case(1, 64, 1, 16, 8)) == 7 * by_state + 4 * keys + 3 * values
    assert count(Case(1, 64, 1, 16, 8, both=True)) == 2 * (7 * by_state + 4 * keys) + 3 * values


Q, V = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 3)
EVERYTHING = {"q": Q, "k": Q, "v": V, "decay": -Q.abs()}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"q must be floating point, got torch\.int64", {"q": Q.long()}),
        (TypeError, r"decay must be floating point, got torch\.int64", {"decay": Q.long()}),
        (ValueError, r"k must be on the device of q, cpu, got meta", {"k": Q.to("meta")}),
        (ValueError, r"q must have the shape \(B, N, heads, dk\) .*, got \(1, 5, 8\)", {"q": Q.flatten(2)}),
        (ValueError, r"with a head and a channel at least, got \(1, 5, 2, 0\)", {"q": Q[..., :0]}),
        (ValueError, r"v must have the shape \(B, N, heads, dv\) = \(1, 5, 2, dv\) .*, got \(1, 4, 2, 3\)",
         {"v": V[:, 1:]}),
        (ValueError, r"v must have the shape .* a channel at least, got \(1, 5, 2, 0\)", {"v": V[..., :0]}),
        (ValueError, r"k must have the shape \(B, N, heads, dk\) = \(1, 5, 2, 4\), got \(1, 5, 2, 3\)",
         {"k": Q[..., 1:]}),
        (ValueError, r"decay must have the shape .*, got \(1, 5, 2, 1\)", {"decay": Q[..., :1]}),
        (ValueError, r"reverse_decay must have the shape .*, got \(1, 5, 1, 4\)", {"reverse_decay": Q[:, :, :1]}),
        (ValueError, r"initial_state must have the shape \(B, heads, dk, dv\) = \(1, 2, 4, 3\), got \(1, 2, 3, 4\)",
         {"initial_state": torch.zeros(1, 2, 3, 4)}),
        (ValueError, r"normalizer must be positive, or None for log decays, got 0", {"normalizer": 0}),
        (ValueError, r"reverse=True walks back only, reverse_decay asks for both directions: give one of them",
         {"reverse": True, "reverse_decay": -Q.abs()}),
        (ValueError, r"initial_state belongs to one direction: leave it out, or call without reverse_decay",
         {"initial_state": torch.zeros(1, 2, 4, 3), "reverse_decay": -Q.abs()}),
        (ValueError, r"return_state belongs to one direction", {"return_state": True, "reverse_decay": -Q.abs()}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        gated_linear_attention(**EVERYTHING | arguments)


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        (r"the kernels know float16, bfloat16 and float32, q and the decays are torch\.float64, torch\.float64",
         {name: each.double() for name, each in EVERYTHING.items()}),
        (r"take q, k and v of one dtype, not torch\.float16, torch\.float32, torch\.float32", {"q": Q.half()}),
        (r"take decays of one dtype, not torch\.float32 and torch\.float16", {"reverse_decay": Q.half()}),
        (r"the interpreter has no bfloat16", {"decay": Q.bfloat16()}),
        (r"keys and values of torch\.float32 may have 64 channels, these have 4 and 65",
         {"v": torch.randn(1, 5, 2, 65)}),
        (r"keys and values of torch\.bfloat16 may have 128 channels, these have 4 and 129",
         {**dict.fromkeys("qk", Q.bfloat16()), "v": torch.randn(1, 5, 2, 129).bfloat16()}),
        (r"channels of keys or of values may exceed 64, not both: 96 and 128",
         {**dict.fromkeys(("q", "k", "decay"), torch.randn(1, 5, 2, 96).bfloat16()),
          "v": torch.randn(1, 5, 2, 128).bfloat16()}),
        (r"tokens may lie 4194304 numbers apart in memory, these lie further",
         {name: each.new_empty_strided(each.shape, (1, 2**22 + 1, 4, 1), device="meta")
          for name, each in EVERYTHING.items()}),
        (r"batch, tokens and heads may make 2\*\*30 - 1 vectors, these make more",
         {name: each.expand(2**27, -1, -1, -1) for name, each in EVERYTHING.items()}),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_take(reason: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device_reasons", lambda device: [])
    with pytest.raises(ValueError, match=rf"'triton' cannot run: .*{reason}"):
        gated_linear_attention(**EVERYTHING | arguments, implementation="triton")
