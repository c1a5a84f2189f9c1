from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vizoo import ops
from vizoo.ops import depthwise_conv, gpu
from vizoo.ops.depthwise_conv import function, tiles
from vizoo.ops.depthwise_conv.function import FLOPS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of a map and of its filters, whether there is a bias, whether the map is added, and the activation."""

    shape: tuple[int, int, int, int]
    kernel: int = 3
    bias: bool = True
    residual: bool = False
    activation: Literal["silu"] | None = None

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
        generator = torch.Generator().manual_seed(1)
        channels = self.shape[-1]
        sizes = {"x": self.shape, "weight": (channels, 1, self.kernel, self.kernel), "bias": (channels,)}
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        if not self.bias:
            del drawn["bias"]
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}

    def call(self, implementation: Any) -> Callable[[Tensors], Tensor]:
        options: dict[str, Any] = {"residual": self.residual, "activation": self.activation}
        return lambda tensors: depthwise_conv(**tensors, **options, implementation=implementation)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: bool = False) -> Tensor:
    """Each tap adds a shifted copy of the map."""
    _, H, W, _ = x.shape
    k = weight.shape[-1]
    around = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    out = x if residual else torch.zeros_like(x)
    for row in range(k):
        for column in range(k):
            out = out + around[:, row : row + H, column : column + W] * weight[:, 0, row, column]
    return out if bias is None else out + bias


SMALL = [
    Case((2, 5, 6, 24)),
    Case((1, 4, 8, 32), residual=True),
    Case((3, 3, 7, 16), bias=False),
    Case((1, 1, 1, 3)),
    Case((1, 2, 11, 40), residual=True, bias=False),
    Case((1, 9, 1, 20)),
    Case((2, 4, 3, 12), kernel=5),
    Case((1, 3, 2, 20), kernel=5, residual=True, bias=False),
    Case((1, 5, 6, 8), kernel=7, residual=True),
    Case((1, 2, 3, 5), kernel=7),
    Case((2, 5, 6, 24), activation="silu"),
    Case((1, 4, 7, 16), residual=True, bias=False, activation="silu"),
    Case((2, 4, 3, 12), kernel=5, activation="silu"),
    Case((1, 5, 6, 8), kernel=7, residual=True, bias=False, activation="silu"),
]
LARGE = [
    Case((8, 56, 56, 96), residual=True),
    Case((3, 28, 29, 192)),
    Case((128, 7, 7, 768), residual=True),
    Case((2, 13, 14, 384), kernel=5),
    Case((2, 31, 30, 64), kernel=7),
    Case((1, 200, 334, 96), bias=False),
    Case((4, 9, 10, 1001), kernel=5, residual=True),
    Case((8, 56, 56, 256), activation="silu"),
    Case((128, 14, 14, 640), activation="silu"),
    Case((3, 27, 14, 192), kernel=7, activation="silu"),
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
KERNEL = [*SMALL, *[pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    out = case.call("reference")(tensors)
    sums = by_hand(**tensors, residual=case.residual)
    torch.testing.assert_close(out, sums if case.activation is None else sums * sums.sigmoid())
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "case", [Case((2, 3, 4, 2), residual=True, activation="silu"), Case((1, 2, 3, 2), kernel=5)], ids=str
)
def test_reference_gradients(case: Case, checks: Any) -> None:
    checks.gradients(case.call("reference"), case.tensors(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    reference = case.call("reference")  # which keeps sums in float32 for every dtype
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(dtype, device))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", [Case((2, 5, 5, 24), residual=True), Case((2, 5, 5, 8), kernel=5)], ids=str)
def test_programs_take_tiles_in_turn(
    case: Case, activation: Any, device: torch.device, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and strips that end in the midst of an image and of the channels; programs that get several of them."""
    for name in ("forward", "forward_three"):
        monkeypatch.setattr(tiles, name, lambda *sizes: tiles.Tile(4, 4, 16, warps=4))
    monkeypatch.setattr(tiles, "backward", lambda *sizes: tiles.Tile(4, 4, 16, warps=4, per_sm=2))
    monkeypatch.setattr(tiles, "weight_gradient", lambda *sizes: tiles.Tile(4, 4, 16, warps=4, per_sm=7))
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 3)
    case = replace(case, activation=activation)
    reference = case.call("reference")
    checks.factor_two(case.call("triton"), reference, reference, case.tensors(torch.float32, device))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 24, 96, 100, 192, 1001])
def test_tiles_fit_the_channels(channels: int, itemsize: int) -> None:
    for choose in (tiles.forward, tiles.forward_three, tiles.backward, tiles.weight_gradient):
        tile = choose(channels, itemsize)
        assert all(size & (size - 1) == 0 for size in tile[:3])
        if choose in (tiles.forward, tiles.weight_gradient):
            assert tile.rows <= 16
            assert tile.rows <= tile.columns <= 2 * tile.rows
        assert 16 <= tile.channels <= 64
        assert tile.channels <= max(16, 2 * channels)
        assert tile.rows * tile.columns * tile.channels >= 32 * tile.warps


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_kernels_take_any_strides(kernel: int, activation: Any, device: torch.device, checks: Any) -> None:
    case = Case((1, 4, 5, 12), kernel=kernel, activation=activation)
    tensors = case.tensors(torch.float32, device)
    incoming = torch.randn(case.shape, device=device)
    expected = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in tensors.items()}
    out = case.call("triton")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("half", ["x", "parameters"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_dtypes_mix(implementation: Any, half: str, kernel: int, device: torch.device) -> None:
    """Parameters may stay in float32 though maps are half, and the reverse; autocast leaves both as they are."""
    mixed = Case((1, 4, 3, 12), kernel=kernel).tensors(torch.float32, device)
    mixed = {name: t.half() if (name == "x") == (half == "x") else t for name, t in mixed.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in mixed.items()}
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        out = depthwise_conv(**leaves, residual=True, implementation=implementation)
    assert out.dtype == leaves["x"].dtype
    exact = by_hand(**{name: tensor.double() for name, tensor in mixed.items()}, residual=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3 if half == "x" else 0, atol=1e-5)
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in mixed.values()]


@pytest.mark.parametrize(("kernel", "activation"), [(3, None), (5, None), (3, "silu")])
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")], ids=str)
def test_gradients_nobody_asked_for_are_not_computed(
    wanted: tuple[str, ...], kernel: int, activation: Any, device: torch.device
) -> None:
    case = Case((1, 3, 4, 12), kernel=kernel, residual=True, activation=activation)
    tensors = case.tensors(torch.float32, device)
    everything = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    case.call("triton")(everything).square().sum().backward()
    for name in wanted:
        tensors[name].requires_grad_()
    case.call("triton")(tensors).square().sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:  # without parameters' gradients another kernel makes that of x, whose sums round otherwise
            torch.testing.assert_close(tensor.grad, everything[name].grad)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("kernel", [3, 5])
def test_infinity_stays_where_the_filter_reaches(kernel: int, device: torch.device) -> None:
    """Neither images nor the ends of rows leak into what lies next to them in memory."""
    case = Case((2, 6, 5, 16), kernel=kernel)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    reach = kernel // 2
    touched = torch.zeros(2, 6, 5, dtype=torch.bool, device=device)
    touched[0, 5 - reach :, 4 - reach :] = True
    x = leaves["x"].detach().clone()
    x[0, 5, 4] = float("inf")
    out = depthwise_conv(x, leaves["weight"], implementation="triton")
    assert torch.equal(out.isfinite().all(-1), ~touched)
    incoming = torch.randn_like(x)
    incoming[0, 5, 4] = float("inf")
    by_x, by_weight = torch.autograd.grad(case.call("triton")(leaves), [leaves["x"], leaves["weight"]], incoming)
    assert torch.equal(by_x.isfinite().all(-1), ~touched)
    # From the last pixel no tap reaches down or to the right: only zeros lie there.
    inside = torch.zeros(kernel, kernel, dtype=torch.bool, device=device)
    inside[: reach + 1, : reach + 1] = True
    assert torch.equal(by_weight.isfinite(), (~inside).expand_as(by_weight))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_empty_batch(implementation: Any, kernel: int, device: torch.device) -> None:
    case = Case((0, 4, 5, 24), kernel=kernel, residual=True, activation="silu")
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float16, device).items()}
    out = case.call(implementation)(leaves)
    out.sum().backward()
    assert (out.shape, out.dtype) == (case.shape, torch.float16)
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves.values())


def registered(case: Case) -> Callable[[Tensors], Tensor]:
    return lambda leaves: torch.ops.vizoo.depthwise_conv(
        leaves["x"], leaves["weight"], leaves.get("bias"), case.residual, case.activation == "silu"
    )


@pytest.mark.parametrize("activation", [None, "silu"])
def test_second_derivative_is_refused(activation: Any, device: torch.device) -> None:
    case = Case((1, 2, 3, 8), activation=activation)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32, device).items()}
    for call, message in ((case.call("triton"), "once_differentiable"), (registered(case), "autograd formula")):
        (gradient,) = torch.autograd.grad(call(leaves).square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ("x", "weight")], ids=str)
@pytest.mark.parametrize(("kernel", "silu"), [(3, False), (5, False), (3, True)])
def test_operator_is_registered_well(wanted: tuple[str, ...], kernel: int, silu: bool, device: torch.device) -> None:
    tensors = Case((1, 2, 3, 8), kernel=kernel).tensors(torch.float32, device)
    for name in wanted:
        tensors[name].requires_grad_()
    bias = None if wanted == ("x", "weight") else tensors["bias"]
    torch.library.opcheck(function._forward, (tensors["x"], tensors["weight"], bias, True, silu))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_short_way_equals_the_registered_operator(
    bias: bool, activation: Any, device: torch.device, checks: Any
) -> None:
    case = Case((1, 4, 5, 24), bias=bias, residual=True, activation=activation)
    tensors, incoming = case.tensors(torch.float32, device), torch.randn(case.shape, device=device)
    short = checks.values_and_gradients(case.call("triton"), tensors, incoming)
    long = checks.values_and_gradients(registered(case), tensors, incoming)
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call("triton")(tensors), long["output"], rtol=0, atol=0)


def test_whoever_looks_on_sees_the_registered_operator(device: torch.device) -> None:
    tensors = list(Case((1, 3, 4, 8)).tensors(torch.float32, device).values())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *args: depthwise_conv(*args, implementation="triton"))
    graph = traced(*tensors)
    assert "torch.ops.vizoo.depthwise_conv" in graph.code
    torch.testing.assert_close(graph(*tensors), depthwise_conv(*tensors, implementation="triton"), rtol=0, atol=0)


class Block(nn.Module):
    def __init__(self, kernel: int = 3, activation: Any = None) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(24, 24, kernel, padding=kernel // 2, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        return depthwise_conv(x.sin(), weight, bias, residual=True, activation=self.activation).cos()


SIZES = [(2, 4, 5), (1, 4, 4), (3, 1, 7)]


def test_exports_with_free_sizes() -> None:
    block = Block().eval()
    free = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("batch", "height", "width"))}
    exported = torch.export.export(block, (torch.randn(2, 4, 5, 24),), dynamic_shapes=(free,)).module()
    for size in (*SIZES, (1, 1, 1)):
        x = torch.randn(*size, 24)
        torch.testing.assert_close(exported(x), block(x))


@pytest.mark.parametrize(
    ("implementation", "kernel", "activation"),
    [
        ("reference", 3, None),
        ("triton", 3, None),
        ("triton", 3, "silu"),
        pytest.param("triton", 5, None, marks=pytest.mark.gpu),
    ],
)
def test_compiles_without_graph_breaks(implementation: Any, kernel: int, activation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    block = Block(kernel, activation).to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in SIZES:
            x = torch.randn(*size, 24, device=device)
            out, expected = compiled(x), block(x)
            torch.testing.assert_close(out, expected)
            gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
            torch.testing.assert_close(gradients, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "silu"])
def test_compilers_get_the_kernels(activation: Any) -> None:
    torch.compiler.reset()
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    block, x = Block(activation=activation).cuda(), torch.randn(2, 8, 9, 24, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert "vizoo.depthwise_conv" in graphs[0]
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",)], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_operations_are_counted(wanted: tuple[str, ...], activation: Any, device: torch.device) -> None:
    case = Case((2, 2, 3, 16), kernel=5, activation=activation)
    tensors = case.tensors(torch.float32, device)
    for name in wanted:
        tensors[name].requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        case.call("triton")(tensors).sum().backward()
    convolutions = 1 + ("x" in wanted) + ("weight" in wanted) + (activation is not None)
    assert counter.get_total_flops() == convolutions * 2 * 2 * 2 * 3 * 16 * 25


X = torch.randn(2, 4, 5, 8)
WEIGHT, BIAS = torch.randn(8, 1, 3, 3), torch.randn(8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x must be floating point, got torch\.int64", {"x": X.long()}),
        (TypeError, r"weight must be floating point, got torch\.int8", {"weight": WEIGHT.to(torch.int8)}),
        (TypeError, r"bias must be floating point, got torch\.int64", {"bias": BIAS.long()}),
        (ValueError, r"x must have the shape \(B, H, W, C\) .*, got \(4, 5, 8\)", {"x": X[0]}),
        (ValueError, r"a row, a column and a channel at least, got \(2, 0, 5, 8\)", {"x": X[:, :0]}),
        (
            ValueError,
            r"weight must have the shape \(C, 1, k, k\) with C = 8, got \(7, 1, 3, 3\)",
            {"weight": WEIGHT[1:]},
        ),
        (ValueError, r"weight must have .* with C = 8, got \(8, 2, 3, 3\)", {"weight": WEIGHT.expand(8, 2, 3, 3)}),
        (ValueError, r"weight must have .* with C = 8, got \(8, 3, 3\)", {"weight": WEIGHT[:, 0]}),
        (ValueError, r"filters must be 3 x 3, 5 x 5 or 7 x 7, got 3 x 2", {"weight": WEIGHT[..., :2]}),
        (ValueError, r"filters must be 3 x 3, 5 x 5 or 7 x 7, got 2 x 3", {"weight": WEIGHT[:, :, :2]}),
        (ValueError, r"filters must be 3 x 3, 5 x 5 or 7 x 7, got 1 x 1", {"weight": WEIGHT[..., :1, :1]}),
        (ValueError, r"bias must have the shape \(C,\) = \(8,\), got \(7,\)", {"bias": BIAS[1:]}),
        (
            ValueError,
            r"activation must be 'silu', or None .*, got 'relu'; nearest valid: 'silu'",
            {"activation": "relu"},
        ),
        (ValueError, r"bias must be on the device of x, cpu, got meta", {"bias": BIAS.to("meta")}),
        (ValueError, r"weight must be on the device of x, cpu, got meta", {"weight": WEIGHT.to("meta")}),
    ],
)
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        depthwise_conv(**{"x": X, "weight": WEIGHT, "bias": BIAS, **arguments})


def test_explains_what_the_kernels_cannot_take() -> None:
    def reasons(x: Tensor, weight: Tensor = WEIGHT) -> str:
        return "; ".join(ops.explain(depthwise_conv, x, weight.to(x.device))["triton"])

    assert "float16, bfloat16 and float32, these are torch.float64, torch.float32" in reasons(X.double())
    assert "these are torch.float32, torch.float64" in reasons(X, WEIGHT.double())
    one = torch.zeros(1, device="meta")
    assert "a row of a map may have 67108864 numbers, this has 67108872" in reasons(one.expand(1, 1, 2**23 + 1, 8))
    assert "there may be 2147483647 pixels, these are 2147483648" in reasons(one.expand(2**11, 2**10, 2**10, 8))
    assert "the interpreter has no bfloat16" in reasons(X.bfloat16())
    assert ops.explain(depthwise_conv, X, WEIGHT, BIAS)["reference"] == []


def test_device_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"depthwise_conv: implementation 'triton' cannot run: .* need an NVIDIA GPU"):
        depthwise_conv(X, WEIGHT, implementation="triton")
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    assert ops.explain(depthwise_conv, X, WEIGHT)["triton"] == ["triton is not installed"]
