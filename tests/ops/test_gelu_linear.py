from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo import ops
from vizoo.backbones.layers import Mlp
from vizoo.ops import gelu_linear, gpu
from vizoo.ops.gelu_linear import function

Tensors = dict[str, Tensor]

SHAPES = [((2, 3, 5, 24), 8), ((7, 16), 1), ((40,), 3), ((1, 1500), 2)]
LARGE = [((2, 56, 56, 384), 96), ((3, 14, 13, 1536), 384)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SIZES = [*SHAPES, *[pytest.param(shape, out, marks=pytest.mark.gpu) for shape, out in LARGE]]


def tensors(shape: tuple[int, ...], out: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        "x": 2 * torch.randn(*shape, generator=generator),
        "weight": torch.randn(out, shape[-1], generator=generator) * shape[-1] ** -0.5,
        "bias": torch.randn(out, generator=generator),
    }
    return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (0.5 * x * (1 + torch.erf(x * 0.5**0.5))) @ weight.T + bias


def kernel(leaves: Tensors) -> Tensor:
    return gelu_linear(**leaves, implementation="triton")


def reference(leaves: Tensors) -> Tensor:
    return gelu_linear(**leaves, implementation="reference")


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_reference_is_the_definition(shape: tuple[int, ...], out: int) -> None:
    leaves = tensors(shape, out, torch.float64)
    torch.testing.assert_close(reference(leaves), by_hand(**leaves))


def test_reference_gradients(checks: Any) -> None:
    checks.gradients(reference, tensors((2, 3, 5), 4, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "out"), SIZES)
def test_kernel(shape: tuple[int, ...], out: int, dtype: torch.dtype, device: torch.device, checks: Any) -> None:
    checks.factor_two(kernel, lambda t: F.linear(F.gelu(t["x"]), t["weight"], t["bias"]), reference,
                      tensors(shape, out, dtype, device))  # fmt: skip


def test_kernel_takes_any_strides_and_no_bias(device: torch.device, checks: Any) -> None:
    plain = tensors((3, 4, 24), 8, torch.float32, device)
    del plain["bias"]
    incoming = torch.randn(3, 4, 8, device=device)
    expected = checks.values_and_gradients(kernel, plain, incoming)
    leaves = {name: checks.scattered(tensor).requires_grad_() for name, tensor in plain.items()}
    out = kernel(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), checks.scattered(incoming))
    for name, value in zip(("output", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(value, expected[name])


def test_gradients_far_from_zero(device: torch.device) -> None:
    x = torch.tensor([[-60.0, -9.0, 0.0, 9.0, 60.0]], device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(gelu_linear(x, torch.eye(5, device=device), implementation="triton").sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids=str)
def test_gradients_nobody_asked_for_are_not_given(wanted: tuple[str, ...], device: torch.device) -> None:
    leaves, everything = (tensors((6, 24), 5, torch.float32, device) for _ in range(2))
    kernel({name: tensor.requires_grad_() for name, tensor in everything.items()}).square().sum().backward()
    for name in wanted:
        leaves[name].requires_grad_()
    kernel(leaves).square().sum().backward()
    for name, tensor in leaves.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, everything[name].grad)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    leaves = {name: t.requires_grad_() for name, t in tensors(shape, 5, torch.float32, device).items()}
    out = kernel(leaves)
    out.sum().backward()
    assert out.shape == (*shape[:-1], 5)
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves.values())


def test_keeps_one_hidden_map(device: torch.device) -> None:
    leaves = {name: t.requires_grad_() for name, t in tensors((50, 64), 4, torch.float32, device).items()}

    def kept(run: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(leaves)
        return sum(size == 50 * 64 for size in sizes.values())

    assert (kept(kernel), kept(reference)) == (1, 2)


def test_autocast(device: torch.device) -> None:
    leaves = {name: t.requires_grad_() for name, t in tensors((6, 40), 3, torch.float32, device).items()}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16
    with torch.autocast(device.type, dtype=dtype):
        out, expected = kernel(leaves), reference(leaves)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    for got, want in zip(gradients, torch.autograd.grad(expected.float().square().sum(), list(leaves.values())),
                         strict=True):  # fmt: skip
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


def test_second_derivative_is_refused(device: torch.device) -> None:
    leaves = {name: t.requires_grad_() for name, t in tensors((3, 24), 4, torch.float32, device).items()}
    (gradient,) = torch.autograd.grad(kernel(leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        gradient.sum().backward()


def test_operator_is_registered_well(device: torch.device) -> None:
    x = torch.randn(3, 4, 24, device=device)
    torch.library.opcheck(function._backward, (torch.randn_like(x), x))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_graph_breaks(implementation: Any, device: torch.device) -> None:
    torch.compiler.reset()
    mlp = Mlp(8, 24).to(device)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use(implementation):
        for size in [(2, 8, 9), (1, 4, 4), (3, 1, 7)]:
            x = torch.randn(*size, 8, device=device)
            out, expected = compiled(x), mlp(x)
            torch.testing.assert_close(out, expected)
            gradient = torch.autograd.grad(out.square().sum(), list(mlp.parameters()))
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), list(mlp.parameters())))


class Shouting(nn.Linear):
    """Stands for an adapter that takes a layer's place."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_mlp_calls_a_layer_that_somebody_changed() -> None:
    mlp, x = Mlp(8, 24), torch.randn(5, 8)
    expected = mlp(x)
    seen: list[Tensor] = []
    handle = mlp.fc2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(seen[0], F.gelu(mlp.fc1(x)))
    handle.remove()
    other = Shouting(24, 8)
    other.load_state_dict(mlp.fc2.state_dict())
    mlp.fc2 = other
    torch.testing.assert_close(mlp(x), -expected)


X, W, B = torch.randn(2, 8), torch.ones(3, 8), torch.ones(3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x must be floating point, got torch\.int64", {"x": X.long()}),
        (ValueError, r"x must have the shape \(\.\.\., C\), got a number", {"x": torch.tensor(1.0)}),
        (ValueError, r"weight must have the shape \(D, C\) with C = 8, got \(3, 7\)", {"weight": W[:, 1:]}),
        (ValueError, r"bias must have the shape \(D,\) = \(3,\), got \(2,\)", {"bias": B[1:]}),
        (ValueError, r"bias must be on the device of x, cpu, got meta", {"bias": B.to("meta")}),
    ],
)
def test_refuses_what_breaks_a_rule(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        gelu_linear(**{"x": X, "weight": W, "bias": B, **arguments})


def test_explains_what_the_kernel_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float16, bfloat16 and float32, the input is torch.float64" in "".join(
        ops.explain(gelu_linear, X.double(), W, B)["triton"]
    )
    assert "no bfloat16" in "".join(ops.explain(gelu_linear, X.bfloat16(), W, B)["triton"])
    monkeypatch.setattr(gpu, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match=r"gelu_linear: implementation 'triton' cannot run: triton is not installed"):
        gelu_linear(X, W, B, implementation="triton")
