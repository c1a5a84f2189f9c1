"""Layer normalisation as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator would take longer than the kernel runs. Whoever traces or intercepts operators gets the registered
one. Both share their gradient formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import direct_function, kernel_operator

MAX_CHANNELS = 8192
MAX_ROWS = 2**30
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del eps  # any will do
    reasons = gpu.device_reasons(x.device)
    used = x.dtype, weight.dtype, bias.dtype, dtype
    if not DTYPES.issuperset(used):
        reasons.append(f"the kernels know float16, bfloat16 and float32, these are {', '.join(map(str, used))}")
    if x.device.type == "cpu" and torch.bfloat16 in used:
        reasons.append("the interpreter has no bfloat16")
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        reasons.append(f"a row may have {MAX_CHANNELS} channels, this has {channels}")
    elif x.numel() > MAX_ROWS * channels:
        reasons.append(f"there may be {MAX_ROWS} rows, these are {x.numel() // channels}")
    return reasons


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes what `vizoo.ops.layer_norm` defines with the fused kernels."""
    if not gpu.unwatched(x, weight, bias):
        return _forward(x, weight, bias, eps, dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Eager.apply(x, weight, bias, eps, dtype)
    return _launch_forward(x, weight, bias, eps, dtype)


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    from . import launch

    return launch.forward(x, weight, bias, eps, dtype)


def _launch_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_gradient: bool, parameter_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import launch

    return launch.backward(grad_out, x, weight, bias, eps, x_gradient, parameter_gradient)


def _forward_like(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _backward_like(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_gradient: bool, parameter_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if x_gradient else (0,)),
        weight.new_empty(weight.shape if parameter_gradient else (0,)),
        bias.new_empty(bias.shape if parameter_gradient else (0,)),
    )


_forward = kernel_operator(
    "vizoo::layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    _launch_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, float eps, bool x_gradient,"
    " bool parameter_gradient) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x_gradient, weight_gradient, bias_gradient, *_ = ctx.needs_input_grad
    x, weight, bias = ctx.saved_tensors
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, x, weight, bias)
    run = _launch_backward if direct else _backward
    x, weight, bias = run(grad_out, x, weight, bias, ctx.eps, x_gradient, weight_gradient or bias_gradient)
    return (
        x if x_gradient else None,
        weight if weight_gradient else None,
        bias if bias_gradient else None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)
