from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import gpu, layer_norm
from vizoo.ops.layer_norm import function, tiles

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of an input, dtype of the output (that of the input unless given), and what is added to the variance."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    eps: float = 1e-5

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)
        sizes = {"x": self.shape, "weight": self.shape[-1:], "bias": self.shape[-1:]}
        drawn = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
        drawn["x"] = 2 * drawn["x"] + 3  # a mean that matters
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}

    def call(self, implementation: Any) -> Callable[[Tensors], Tensor]:
        def run(tensors: Tensors) -> Tensor:
            dtype = None if tensors["x"].dtype == torch.float64 else self.dtype
            return layer_norm(**tensors, eps=self.eps, dtype=dtype, implementation=implementation)

        return run

    def plain(self, tensors: Tensors) -> Tensor:
        """What a user would write, in the dtype of the input."""
        x, weight, bias = tensors.values()
        out = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), self.eps)
        return out if self.dtype is None else out.to(self.dtype)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred * (variance + eps) ** -0.5 * weight + bias


SMALL = [
    Case((3, 5, 24)),
    Case((7, 16), eps=1e-2),
    Case((1, 100)),
    Case((33,)),
    Case((130, 3)),
    Case((2, 3)),
    Case((5, 257), torch.float16),
    Case((3, 96), torch.float32),
    Case((2, 2100)),
]
LARGE = [
    Case((2, 56, 56, 96), torch.bfloat16),
    Case((3, 28, 29, 192), torch.bfloat16),
    Case((3, 14, 13, 384), torch.float16),
    Case((50, 768), torch.float32),
    Case((7, 1000)),
    Case((5, 8192)),
    Case((100001, 8)),
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    torch.testing.assert_close(case.call("reference")(tensors), by_hand(**tensors, eps=case.eps))


def test_reference_gradients(checks: Any) -> None:
    case = Case((2, 3, 5), eps=1e-3)
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), case.tensors(dtype, device))


@pytest.mark.parametrize("case", [Case((70, 24)), Case((9, 300), torch.float16)], ids=str)
def test_programs_take_rows_in_turn(
    case: Case, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "backward", lambda channels: tiles.Tile(2, 512, warps=4, per_sm=1))
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 3)
    checks.factor_two(case.call("triton"), case.plain, case.call("reference"), case.tensors(torch.float32, device))


def test_kernels_take_any_strides(device: torch.device, checks: Any) -> None:
    case = Case((3, 4, 5, 24))
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.shape, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, device: torch.device) -> None:
    """Under autocast the residual is float32 or half, parameters are float32, and the next layer wants halves."""
    case = Case((6, 40))
    tensors = case.tensors(torch.float32, device)
    mixed = {name: tensor.half() if name == "x" else tensor for name, tensor in tensors.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in mixed.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        half = layer_norm(**leaves, implementation=implementation)
        single = layer_norm(**leaves, dtype=torch.float32, implementation=implementation)
    assert (half.dtype, single.dtype) == (torch.float16, torch.float32)
    exact = by_hand(*(tensor.double() for tensor in mixed.values()), eps=1e-5)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=4e-3)
    gradients = torch.autograd.grad(half.float().square().sum() + single.square().sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")], ids=str)
def test_gradients_nobody_asked_for_are_not_computed(wanted: tuple[str, ...], device: torch.device) -> None:
    case = Case((6, 40))
    tensors = case.tensors(torch.float32, device)
    everything = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    case.call("triton")(everything).square().sum().backward()
    for name in wanted:
        tensors[name].requires_grad_()
    case.call("triton")(tensors).square().sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, everything[name].grad, rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_large_means_and_constant_rows_stay_finite(device: torch.device) -> None:
    x = torch.randn(4, 50, device=device) + 1e4
    x[1] = 7.0
    x.requires_grad_()
    weight, bias = torch.ones(50, device=device), torch.zeros(50, device=device)
    out = layer_norm(x, weight, bias, implementation="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    exact = by_hand(x.detach().double(), weight.double(), bias.double(), 1e-5)
    assert (out - exact).abs().max() < 1e-2  # numbers near 10,000 are 1e-3 apart, and so is their mean
    assert (out[1] - bias).abs().max() < 1e-3  # the mean of equal numbers rounds, and is divided by sqrt(eps)
    assert gradient.isfinite().all()


def test_a_single_channel_is_its_own_mean(device: torch.device) -> None:
    leaves = {name: t.requires_grad_() for name, t in Case((2, 1)).tensors(torch.float32, device).items()}
    out = layer_norm(**leaves, implementation="triton")
    (gradient,) = torch.autograd.grad(out.sum(), leaves["x"])
    torch.testing.assert_close(out, leaves["bias"].expand(2, 1))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (4, 0)])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_empty_input(implementation: Any, shape: tuple[int, ...], device: torch.device) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in Case(shape).tensors(torch.float32, device).items()}
    out = layer_norm(**leaves, dtype=torch.float16, implementation=implementation)
    out.sum().backward()
    assert (out.shape, out.dtype) == (shape, torch.float16)
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves.values())


def test_second_derivative_is_refused(device: torch.device) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in Case((3, 24)).tensors(torch.float32, device).items()}
    out = layer_norm(**leaves, implementation="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(registered(leaves, torch.float32).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        gradient.sum().backward()


def registered(leaves: Tensors, dtype: torch.dtype) -> Tensor:
    return torch.ops.vizoo.layer_norm(leaves["x"], leaves["weight"], leaves["bias"], 1e-5, dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operator_is_registered_well(wanted: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors = Case((3, 4, 24)).tensors(torch.float32, device)
    for name in wanted:
        tensors[name].requires_grad_()
    torch.library.opcheck(function._forward, (*tensors.values(), 1e-5, dtype))


def test_the_short_way_equals_the_registered_operator(device: torch.device, checks: Any) -> None:
    case = Case((9, 40), torch.float16)
    tensors, incoming = case.tensors(torch.float32, device), torch.randn(9, 40, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(lambda leaves: registered(leaves, torch.float16), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


class Marked(torch.Tensor):
    """Stands for the tensors of other libraries, that act on each operator."""


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    tensors = list(Case((3, 24)).tensors(torch.float32, device).values())
    assert gpu.unwatched(*tensors, nn.Parameter(tensors[0]))
    assert not gpu.unwatched(tensors[0].as_subclass(Marked))
    with FlopCounterMode(display=False):
        assert not gpu.unwatched(*tensors)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, *rest: layer_norm(x, *rest, implementation="triton"))
    assert "torch.ops.vizoo.layer_norm" in traced(*tensors).code
    torch.func.vmap(lambda x: x if not gpu.unwatched(x) else pytest.fail("launched inside vmap"))(tensors[0])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(-1, 1, 24)), nn.Parameter(torch.linspace(0, 2, 24))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.sin(), self.weight, self.bias, dtype=torch.float16).float().cos()


SIZES = [(2, 8, 9), (1, 4, 4), (3, 1, 7)]


def test_exports_with_free_sizes() -> None:
    block = Block().eval()
    free = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("batch", "height", "width"))}
    exported = torch.export.export(block, (torch.randn(2, 8, 9, 24),), dynamic_shapes=(free,)).module()
    for size in SIZES:
        x = torch.randn(*size, 24)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES:
            x = torch.randn(*size, 24, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradient = torch.autograd.grad(out.square().sum(), list(block.parameters()))
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), list(block.parameters())))


@pytest.mark.gpu
def test_compilers_get_the_reference() -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block().cuda(), torch.randn(2, 3, 24, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert "vizoo" not in graphs[0]
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-3, atol=1e-3)


ROW = torch.randn(2, 8)
ONE = torch.ones(8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x must be floating point, got torch\.int64", {"x": ROW.long()}),
        (TypeError, r"dtype must be floating point, got torch\.int8", {"dtype": torch.int8}),
        (ValueError, r"x must have the shape \(\.\.\., C\), got a number", {"x": torch.tensor(1.0)}),
        (ValueError, r"weight must have the shape \(C,\) = \(8,\), got \(7,\)", {"weight": ONE[1:]}),
        (ValueError, r"bias must have the shape \(C,\) = \(8,\), got \(1, 8\)", {"bias": ONE[None]}),
        (ValueError, r"bias must be on the device of x, cpu, got meta", {"bias": ONE.to("meta")}),
    ],
)
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        layer_norm(**{"x": ROW, "weight": ONE, "bias": ONE, **arguments})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(x: Tensor, weight: Tensor, **options: Any) -> str:
        return "; ".join(ops.explain(layer_norm, x, weight, weight, **options)["triton"])

    assert "float16, bfloat16 and float32, these are torch.float64" in reasons(ROW.double(), ONE)
    assert "float16, bfloat16 and float32, these are torch.float32, torch.float64" in reasons(ROW, ONE.double())
    assert "these are torch.float32, torch.float32, torch.float32, torch.float64" in reasons(
        ROW, ONE, dtype=torch.float64
    )
    assert "a row may have 8192 channels, this has 8193" in reasons(torch.zeros(1, 8193), torch.zeros(8193))
    many = torch.zeros(1, 2, device="meta").expand(2**30 + 1, 2)
    assert "there may be 1073741824 rows, these are 1073741825" in reasons(many, torch.zeros(2, device="meta"))
    assert "the interpreter has no bfloat16" in reasons(ROW, ONE, dtype=torch.bfloat16)
    assert ops.explain(layer_norm, ROW, ONE, ONE)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"layer_norm: implementation 'triton' cannot run: .* need an NVIDIA GPU"):
        layer_norm(ROW, ONE, ONE, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(layer_norm, ROW, ONE, ONE)["triton"] == ["triton is not installed"]
