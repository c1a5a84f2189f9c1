from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import FlowConservation, KernelSum, MeanSubtraction, gpu, linear_attention
from vizoo.ops.linear_attention import function, tiles

Tensors = dict[str, Tensor]
RULES = [MeanSubtraction(), KernelSum(), KernelSum(floor=2.0), FlowConservation()]


@dataclass(frozen=True)
class Case:
    """Sizes of an input, the rule, and what is given besides: `grid` asks for kernels of each image.

    With `packed` all three come in one tensor.
    """

    batch: int
    N: int
    heads: int
    d: int
    e: int = 0
    rule: Any = RULES[0]
    temperature: bool = False
    position: bool = False
    grid: tuple[int, int] | None = None
    packed: bool = False

    def __str__(self) -> str:
        parts = [type(self.rule).__name__, f"b{self.batch}n{self.N}h{self.heads}d{self.d}e{self.e or self.d}"]
        parts += ["floor"] if getattr(self.rule, "floor", None) else []
        parts += [name for name in ("temperature", "position", "grid", "packed") if getattr(self, name)]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        tokens, e = (self.batch, self.N, self.heads), self.e or self.d
        tensors = {"q": draw(*tokens, self.d), "k": draw(*tokens, self.d) + 0.2, "v": draw(*tokens, e) + 0.5}
        if self.packed:
            tensors = {"qkv": torch.stack(list(tensors.values()), 2)}
        if self.temperature:
            tensors["temperature"] = draw(self.heads)
        if self.position:
            tensors["key_position"] = draw(self.N, self.heads, self.d)
        if self.grid:
            tensors["local_kernels"] = draw(self.batch, self.heads, e, 3, 3)
        return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}

    def call(self, implementation: Any = None) -> Callable[[Tensors], Tensor]:
        def run(tensors: Tensors) -> Tensor:
            if self.packed:
                tensors = {"q": tensors["qkv"], "k": None, "v": None} | tensors
                tensors.pop("qkv")
            return linear_attention(**tensors, rule=self.rule, grid=self.grid, implementation=implementation)

        return run

    def definition(self) -> Callable[[Tensors], Tensor]:
        def run(tensors: Tensors) -> Tensor:
            if not self.packed:
                return by_hand(self, **tensors)
            qkv, *others = tensors
            return by_hand(self, *tensors[qkv].unbind(2), **{name: tensors[name] for name in others})

        return run


def by_hand(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None = None,
    key_position: Tensor | None = None,
    local_kernels: Tensor | None = None,
) -> Tensor:
    """With the weight of every token for every other one."""
    k = k if key_position is None else k + key_position
    weights = torch.stack([torch.stack([_weights(q[b, :, h], k[b, :, h], case.rule) for h in range(case.heads)])
                           for b in range(case.batch)])  # fmt: skip
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    if temperature is not None:
        out = out * temperature[:, None]
    if local_kernels is not None and case.grid is not None:
        out = out + _local(case, v, local_kernels)
    return out


def _weights(q: Tensor, k: Tensor, rule: Any) -> Tensor:
    """(queries, keys) of one head, as the papers write them."""
    N, d = q.shape
    if isinstance(rule, MeanSubtraction):
        scores = q @ k.T * ((d**-0.5 if rule.scale is None else rule.scale) / N)
        return scores - scores.mean(1, keepdim=True) + 1 / N
    if isinstance(rule, KernelSum):
        scores = q.relu() @ k.relu().T
        total = scores.sum(1, keepdim=True)
        return scores / (total + rule.epsilon if rule.floor is None else total.clamp(min=rule.floor))
    e, q, k = rule.epsilon, q.sigmoid(), k.sigmoid()
    incoming = torch.stack([1 / ((q[i] + e).dot(sum(k) + e) + e) for i in range(N)])
    outgoing = torch.stack([1 / ((k[j] + e).dot(sum(q) + e) + e) for j in range(N)])
    conserved_sink = torch.stack([(q[i] + e).dot(sum(k[j] * outgoing[j] for j in range(N)) + e) + e for i in range(N)])
    conserved_source = torch.stack(
        [(k[j] + e).dot(sum(q[i] * incoming[i] for i in range(N)) + e) + e for j in range(N)]
    )
    competition = N * conserved_source.clamp(-1, 1).softmax(0)
    return (conserved_sink.sigmoid() * incoming)[:, None] * (q @ k.T) * competition


def _local(case: Case, v: Tensor, kernels: Tensor) -> Tensor:
    """Pixel by pixel."""
    H, W = case.grid
    out, leading = torch.zeros_like(v), case.N - H * W
    for y in range(H):
        for x in range(W):
            for row in range(max(0, y - 1), min(H, y + 2)):
                for column in range(max(0, x - 1), min(W, x + 2)):
                    taps = kernels[..., row - y + 1, column - x + 1]
                    out[:, leading + y * W + x] += taps * v[:, leading + row * W + column]
    return out


PLAIN = [Case(2, 13, 2, 3, 5), Case(1, 1, 1, 4), Case(1, 13, 2, 3, temperature=True, position=True, grid=(4, 3)),
         Case(2, 6, 2, 2, grid=(1, 6)), Case(1, 7, 2, 2, grid=(7, 1), position=True, packed=True)]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_reference_is_the_definition(case: Case, rule: Any) -> None:
    case = replace(case, rule=rule)
    tensors = case.tensors(torch.float64)
    out = case.call("reference")(tensors)
    torch.testing.assert_close(out, case.definition()(tensors))
    assert out.is_contiguous()
    assert out.dtype == torch.float64


@pytest.mark.parametrize("rule", [*RULES, MeanSubtraction(scale=3.0), FlowConservation(epsilon=0.3)], ids=str)
def test_reference_gradients(rule: Any, checks: Any) -> None:
    case = Case(1, 5, 2, 2, 3, rule=rule, temperature=True, position=True, grid=(2, 2))
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


MEAN, SUM, FLOORED, FLOW = RULES
ALL = {"temperature": True, "position": True}
KERNEL = [
    Case(2, 35, 2, 16),
    Case(1, 23, 2, 24, 16, **ALL, grid=(4, 5)),
    Case(2, 35, 1, 16, 24, rule=SUM),
    Case(1, 37, 2, 8, rule=FLOORED, **ALL, grid=(6, 6), packed=True),
    Case(1, 35, 2, 24, 16, rule=FLOW),
    Case(2, 9, 1, 16, rule=FLOW, **ALL, grid=(1, 7), packed=True),
]
LARGE = [
    Case(4, 784, 4, 32, packed=True),
    Case(2, 197, 6, 32, **ALL, grid=(14, 14)),
    Case(1, 3136, 2, 64, rule=SUM, position=True),
    Case(8, 196, 8, 32, rule=FLOORED, temperature=True),
    Case(70, 49, 4, 64, grid=(7, 7)),
    Case(2, 3136, 12, 8, rule=FLOW),
    Case(24, 196, 12, 32, rule=FLOW),
]


def hold_to_reference(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which computes in float32 for every dtype
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    hold_to_reference(case, dtype, device, checks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in LARGE), *((LARGE[place], torch.float32) for place in (0, 2, 5))],
    ids=str,
)
def test_kernels_on_sizes_of_models(case: Case, dtype: torch.dtype, checks: Any) -> None:
    hold_to_reference(case, dtype, torch.device("cuda"), checks)


@pytest.mark.parametrize(
    "case",
    [Case(1, 75, 2, 16), Case(2, 50, 1, 24, rule=FLOORED, **ALL), Case(1, 67, 1, 16, rule=FLOW, grid=(6, 11))],
    ids=str,
)
def test_tokens_are_cut_in_chunks(
    case: Case, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("collect", "outputs", "query_gradients", "key_gradients"):
        monkeypatch.setattr(tiles, name, lambda *sizes: tiles.Tile(16, 4))
    monkeypatch.setattr(tiles, "chunk", lambda *sizes: 32)
    monkeypatch.setattr(tiles, "STRETCH", 32)
    hold_to_reference(case, torch.float16, device, checks)


@pytest.mark.parametrize("tokens", [1, 49, 196, 3136, 66800])
@pytest.mark.parametrize("pairs", [1, 6, 24, 263, 264, 3072])
def test_chunks_fill_the_machine(tokens: int, pairs: int) -> None:
    length = tiles.chunk(tokens, pairs, 64, 132)
    chunks = -(-tokens // length)
    assert length % 64 == 0
    assert chunks == 1 or pairs < 264
    assert pairs * chunks <= 2 * 4 * 132 or chunks == 1
    assert pairs * chunks >= 2 * 132 or length < 2 * 4 * 64


@pytest.mark.parametrize("rule", [MEAN, FLOORED, FLOW], ids=str)
def test_kernels_take_any_strides(rule: Any, device: torch.device, checks: Any) -> None:
    packed = rule is FLOORED
    case = Case(2, 9, 2, 16, 16 if packed else 8, rule=rule, **ALL, grid=(2, 4), packed=packed)
    tensors = case.tensors(torch.float16, device)
    incoming = torch.randn(2, 9, 2, case.e, device=device).half()
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_parts_of_one_projection(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of it are read where they lie, and what holds them all gives the same, the gradient in one piece."""
    case = Case(2, 9, 2, 16, rule=SUM, position=True, packed=True)
    tensors = case.tensors(torch.float16, device)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("a copy"))
    results = []
    for packed in (True, False):
        leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
        qkv, position = leaves.values()
        given = leaves if packed else dict(zip("qkv", qkv.unbind(2), strict=True)) | {"key_position": position}
        out = replace(case, packed=packed).call("triton")(given)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [MEAN, SUM, FLOW], ids=str)
@pytest.mark.parametrize("power", [-8, 6])
def test_what_lies_between_exceeds_half_precision(rule: Any, power: int, device: torch.device) -> None:
    """Sums over tokens and their gradients leave the range of float16, though in- and outputs do not."""
    case = Case(1, 150, 1, 16, rule=rule)
    tensors = case.tensors(torch.float16, device)
    if rule is not FLOW:  # a sigmoid would leave nothing of them
        tensors["k"] = tensors["k"] * 2.0**power
    tensors["v"] = tensors["v"] * (2.0**power if rule is FLOW else 2.0**-power if rule is MEAN else 2.0**7)
    results = []
    for implementation, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = {name: each.to(dtype).requires_grad_() for name, each in tensors.items()}
        out = case.call(implementation)(leaves)
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).half().to(device)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), incoming.to(dtype))])
    for found, exact in zip(*results, strict=True):
        assert found.isfinite().all()
        floor = 2.0**-25 * exact.numel() ** 0.5  # half of the least number that float16 has
        assert (found.double() - exact).norm() <= 2e-3 * exact.norm() + floor


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("rule", [SUM, FLOORED], ids=str)
def test_queries_and_keys_without_a_positive_channel(rule: Any, implementation: Any, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 5, 1, 16, device=device) for _ in range(3))
    q[:, 2], leaves = -q[:, 2].abs(), []
    for keys in (k, -k.abs()):
        leaves = [each.clone().requires_grad_() for each in (q, keys, v)]
        out = linear_attention(*leaves, rule, implementation=implementation)
        assert not out[:, 2].any()
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert not out.any()


@pytest.mark.parametrize("rule", [MEAN, SUM, FLOW], ids=str)
def test_images_and_heads_do_not_mix(rule: Any, device: torch.device) -> None:
    case = Case(2, 20, 2, 16, rule=rule)
    tensors = case.tensors(torch.float32, device)
    tensors["v"][0, 7, 1] = float("nan")
    leaves = {name: each.requires_grad_() for name, each in tensors.items()}
    out = case.call("triton")(leaves)
    assert out[1].isfinite().all()
    assert out[:, :, 0].isfinite().all()
    assert out[0, :, 1].isnan().all()
    gradients = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for gradient in gradients:
        assert gradient[1].isfinite().all()
        assert gradient[:, :, 0].isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, device: torch.device) -> None:
    """Parameters may be float32 beside half precision; autocast leaves all as they are."""
    case = Case(1, 10, 2, 16, **ALL, grid=(3, 3))
    tensors = case.tensors(torch.float32, device)
    mixed = {name: each.half() if name in ("q", "k", "v") else each for name, each in tensors.items()}
    leaves = {name: each.requires_grad_() for name, each in mixed.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out = case.call(implementation)(leaves)
    assert out.dtype == torch.float16
    exact = case.call("reference")({name: each.detach().double() for name, each in mixed.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [each.dtype for each in mixed.values()]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
@pytest.mark.parametrize("rule", [MEAN, FLOW], ids=str)
def test_empty_input(rule: Any, sizes: tuple[int, int], implementation: Any, device: torch.device) -> None:
    case = Case(*sizes, 2, 16, 8, rule=rule, **ALL)
    tensors = {name: each.requires_grad_() for name, each in case.tensors(torch.float16, device).items()}
    out = case.call(implementation)(tensors)
    assert (out.shape, out.dtype) == ((*sizes, 2, 8), torch.float16)
    out.sum().backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in tensors.values())


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    return lambda tensors: torch.ops.vizoo.linear_attention(*arguments(case, tensors))[0]


def arguments(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    names = ("qkv" if case.packed else "q", "k", "v", "temperature", "key_position", "local_kernels")
    return (*map(tensors.get, names), *(case.grid or (0, 0)), *function._numbers(case.rule, case.d))


REGISTERED = [
    Case(1, 9, 2, 16, 8, **ALL, grid=(2, 4)),
    Case(1, 9, 2, 8, rule=SUM, packed=True),
    Case(1, 9, 1, 16, rule=FLOW),
]


@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_the_short_way_equals_the_registered_operator(case: Case, device: torch.device, checks: Any) -> None:
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(1, 9, case.heads, case.e or case.d, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("wanted", [None, ("k", "qkv"), ()], ids=str)
@pytest.mark.parametrize("case", REGISTERED, ids=str)
def test_operator_is_registered_well(case: Case, wanted: tuple[str, ...] | None, device: torch.device) -> None:
    tensors = case.tensors(torch.float32, device)
    for name, tensor in tensors.items():
        tensor.requires_grad_(wanted is None or name in wanted)
    torch.library.opcheck(function._forward, arguments(case, tensors))


def test_second_derivative_is_refused(device: torch.device) -> None:
    case = REGISTERED[1]
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    for call, message in ((case.call("triton"), "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["qkv"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    case = REGISTERED[0]
    tensors = case.tensors(torch.float32, device)
    call = lambda *values: case.call("triton")(dict(zip(tensors, values, strict=True)))  # noqa: E731
    graph = make_fx(call)(*tensors.values())
    assert "torch.ops.vizoo.linear_attention" in graph.code
    torch.testing.assert_close(graph(*tensors.values()), call(*tensors.values()), rtol=0, atol=0)


class Block(nn.Module):
    """A mixer with one projection of queries, keys and values, and all that can be added."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule
        self.project, self.kernels = nn.Linear(16, 48), nn.Linear(16, 16 * 9)
        self.temperature = nn.Parameter(torch.rand(2) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.project(x).view(B, H * W, 3, 2, 8)
        kernels = self.kernels(x.mean((1, 2))).view(B, 2, 8, 3, 3)
        return linear_attention(
            qkv, None, None, self.rule, temperature=self.temperature, local_kernels=kernels, grid=(H, W)
        )


SIZES = [(2, 5, 7), (1, 3, 3), (3, 6, 4), (1, 1, 8)]


@pytest.mark.parametrize("rule", [MEAN, FLOORED, FLOW], ids=str)
def test_exports_with_free_sizes(rule: Any) -> None:
    block = Block(rule).eval()
    free = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate(("batch", "rows", "columns"))}
    exported = torch.export.export(block, (torch.randn(2, 5, 7, 16),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 16)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize(("implementation", "rule"), [("reference", FLOW), ("triton", MEAN)], ids=str)
def test_compiles_without_graph_breaks(implementation: Any, rule: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(rule).to(device)
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
def test_compilers_get_the_kernels() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block(MEAN).cuda(), torch.randn(2, 8, 9, 16, device="cuda")
    with ops.use("triton"):
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
        assert "vizoo.linear_attention" in graphs[0]
        out, expected = torch.compile(block, fullgraph=True)(x), block(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)


def test_operations_are_counted(device: torch.device) -> None:
    for case, products in ((Case(1, 20, 2, 16, 8), 6), (Case(1, 20, 2, 16, 8, rule=FLOW), 8)):
        leaves = {name: each.requires_grad_() for name, each in case.tensors(torch.float32, device).items()}
        with FlopCounterMode(display=False, custom_mapping=function.FLOPS) as counter:
            case.call("triton")(leaves).sum().backward()
        assert counter.get_total_flops() == products * 2 * 20 * 2 * 16 * 8


Q, V = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 3)
EVERYTHING = {"q": Q, "k": Q, "v": V, "rule": MEAN}
KERNELS = torch.randn(1, 2, 3, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, r"rule must be one of MeanSubtraction\(\), KernelSum\(\), FlowConservation\(\), got 'softmax'",
         {"rule": "softmax"}),
        (TypeError, r"rule must be one of .*, got <class .*KernelSum'>", {"rule": KernelSum}),
        (TypeError, r"q must be floating point, got torch\.int64", {"q": Q.long()}),
        (TypeError, r"temperature must be floating point, got torch\.bool", {"temperature": torch.ones(2).bool()}),
        (ValueError, r"v must be on the device of q, cpu, got meta", {"v": V.to("meta")}),
        (ValueError, r"q must have the shape \(B, N, heads, d\) with a head .* at least, got \(5, 2, 4\)", {"q": Q[0]}),
        (ValueError, r"q must have the shape .*, got \(1, 5, 0, 4\)", {"q": Q[:, :, :0]}),
        (ValueError, r"v must have the shape \(B, N, heads, e\) with a channel .*, got \(1, 5, 2, 0\)",
         {"v": V[..., :0]}),
        (ValueError, r"k and v come together, or both in q: v is given alone", {"k": None}),
        (ValueError, r"k and v come together, or both in q: k is given alone", {"v": None}),
        (ValueError, r"q without k and v must have the shape \(B, N, 3, heads, d\) .*, got \(1, 5, 2, 4\)",
         {"k": None, "v": None}),
        (ValueError, r"k must have the shape of q, \(B, N, heads, d\) = \(1, 5, 2, 4\), got \(1, 4, 2, 4\)",
         {"k": Q[:, 1:]}),
        (ValueError, r"v must have the shape \(B, N, heads, e\) = \(1, 5, 2, 3\), got \(1, 5, 1, 3\)",
         {"v": V[:, :, :1]}),
        (ValueError, r"temperature must have the shape \(heads,\) = \(2,\), got \(2, 1\)",
         {"temperature": torch.ones(2, 1)}),
        (ValueError, r"key_position must have the shape \(N, heads, d\) = \(5, 2, 4\), got \(1, 5, 8\)",
         {"key_position": torch.ones(1, 5, 8)}),
        (ValueError, r"local_kernels must have the shape \(B, heads, e, 3, 3\) = .*, got \(1, 2, 3, 5, 5\)",
         {"local_kernels": torch.ones(1, 2, 3, 5, 5), "grid": (1, 5)}),
        (ValueError, r"local_kernels and grid come together: local_kernels is given, grid is not",
         {"local_kernels": KERNELS}),
        (ValueError, r"local_kernels and grid come together: grid is given, local_kernels is not", {"grid": (1, 5)}),
        (ValueError, r"grid must be \(H, W\) with no more than the 5 tokens there are, got \(2, 3\)",
         {"local_kernels": KERNELS, "grid": (2, 3)}),
        (ValueError, r"grid must be \(H, W\) .*, got \(0, 3\)", {"local_kernels": KERNELS, "grid": (0, 3)}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        linear_attention(**EVERYTHING | given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KernelSum(epsilon=0.0), r"epsilon must be positive, got 0\.0"),
        (lambda: KernelSum(floor=-1.0), r"floor must be positive, got -1\.0"),
        (lambda: FlowConservation(epsilon=float("nan")), r"epsilon must be positive, got nan"),
    ],
)
def test_rules_check_their_numbers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("message", "sizes", "dtypes"),
    [
        (r"of one dtype, .*, these are torch\.float64, torch\.float64, torch\.float64", (1, 5, 1, 16),
         [torch.float64] * 3),
        (r"these are torch\.float16, torch\.float16, torch\.float32", (1, 5, 1, 16),
         [torch.float16, torch.float16, torch.float32]),
        (r"a head may have 64 channels, these have 65, 65, 65", (1, 5, 1, 65), [torch.float32] * 3),
    ],
)  # fmt: skip
def test_refusals(message: str, sizes: tuple[int, ...], dtypes: list[torch.dtype], device: torch.device) -> None:
    q, k, v = (torch.randn(sizes, device=device).to(dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, MEAN, implementation="triton")
    (reason,) = ops.explain(linear_attention, q, k, v, MEAN)["triton"]
    assert re.search(message, reason)


def test_vectors_too_many_or_too_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device_reasons", lambda device: [])
    q = torch.empty(2**16, 2**14, 2, 16, device="meta")
    (reason,) = function.unsupported_reasons(q, q, q)
    assert reason == "images, tokens and heads may make 2**31 - 1 vectors, these make more"
    q = torch.empty(1, 2, 2**19, 16, device="meta")
    (reason,) = function.unsupported_reasons(q, q, q)
    assert reason == "tokens may lie 4194304 numbers apart in memory, these lie further"
    bfloat = torch.empty(1, 2, 2, 16, dtype=torch.bfloat16)
    assert function.unsupported_reasons(bfloat, bfloat, bfloat) == ["the interpreter has no bfloat16"]
