"""Depthwise convolution as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator would take longer than the kernel runs. Whoever traces or intercepts operators gets the registered
one. Both share their gradient formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import direct_function, kernel_operator
from vizoo.ops.tracing import known

MAX_ROW = 2**26
"""Numbers in a row of a map: offsets within a tile, a few rows high, have 32 bits."""
MAX_PIXELS = 2**31 - 1
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))


def unsupported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: bool, activation: str | None
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del residual, activation  # any will do
    reasons = gpu.device_reasons(x.device)
    used = [tensor.dtype for tensor in (x, weight, bias) if tensor is not None]
    if not DTYPES.issuperset(used):
        reasons.append(f"the kernels know float16, bfloat16 and float32, these are {', '.join(map(str, used))}")
    if x.device.type == "cpu" and torch.bfloat16 in used:
        reasons.append("the interpreter has no bfloat16")
    B, H, W, C = x.shape
    if known(W * C > MAX_ROW):
        reasons.append(f"a row of a map may have {MAX_ROW} numbers, this has {W * C}")
    if known(B * H * W > MAX_PIXELS):
        reasons.append(f"there may be {MAX_PIXELS} pixels, these are {B * H * W}")
    return reasons


def depthwise_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: bool, activation: str | None
) -> Tensor:
    """Computes what `vizoo.ops.depthwise_conv` defines with the fused kernels."""
    tensors, silu = (x, weight) if bias is None else (x, weight, bias), activation == "silu"
    if not gpu.unwatched(*tensors):
        return _forward(x, weight, bias, residual, silu)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(x, weight, bias, residual, silu)
    return _launch_forward(x, weight, bias, residual, silu)


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, silu: bool) -> Tensor:
    from . import launch

    return launch.forward(x, weight, bias, residual, silu)


def _launch_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    silu: bool,
    x_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import launch

    return launch.backward(grad_out, x, weight, bias, residual, silu, x_gradient, parameter_gradient)


def _forward_like(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _backward_like(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    silu: bool,
    x_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if x_gradient else (0,))
    grad_weight = weight.new_empty(weight.shape if parameter_gradient else (0,))
    if bias is None:
        return grad_x, grad_weight, weight.new_empty(0)
    return grad_x, grad_weight, bias.new_empty(bias.shape if parameter_gradient else (0,))


_forward = kernel_operator(
    "vizoo::depthwise_conv",
    "(Tensor x, Tensor weight, Tensor? bias, bool residual, bool silu) -> Tensor",
    _launch_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::depthwise_conv_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, bool residual, bool silu,"
    " bool x_gradient, bool parameter_gradient) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.residual, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x_gradient, weight_gradient, bias_gradient, *_ = ctx.needs_input_grad
    x, weight, bias = ctx.saved_tensors
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *tensors)
    run = _launch_backward if direct else _backward
    parameter_gradient = weight_gradient or bias_gradient
    x, weight, bias = run(grad_out, x, weight, bias, ctx.residual, ctx.silu, x_gradient, parameter_gradient)
    return (
        x if x_gradient else None,
        weight if weight_gradient else None,
        bias if bias_gradient else None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _forward_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    B, H, W, C = x
    return 2 * B * H * W * C * weight[-1] ** 2


def _backward_flops(
    grad_out: Any,
    x: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    residual: bool,
    silu: bool,
    x_gradient: bool,
    parameter_gradient: bool,
    **kwargs: Any,
) -> int:
    return (silu + x_gradient + parameter_gradient) * _forward_flops(x, weight)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.depthwise_conv: _forward_flops,
    torch.ops.vizoo.depthwise_conv_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
