"""`gelu_linear` with its own backward pass, whose kernel is a registered operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import kernel_operator

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Why the kernel cannot take these arguments; empty when it can."""
    del weight, bias  # any will do: only matrix products read them
    reasons = gpu.device_reasons(x.device)
    if x.dtype not in DTYPES:
        reasons.append(f"the kernel knows float16, bfloat16 and float32, the input is {x.dtype}")
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        reasons.append("the interpreter has no bfloat16")
    return reasons


def gelu_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes what `vizoo.ops.gelu_linear` defines, and keeps the GELU's input alone."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if not (wanted and torch.is_grad_enabled()):
        return F.linear(F.gelu(x), weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # inside an autograd function nothing would be converted
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _GeluLinear.apply(x, weight, bias)


def _launch_backward(grad_hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    from . import launch  # imports triton, which importing the operators does not need

    return launch.backward(grad_hidden, x)


def _backward_like(grad_hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_backward = kernel_operator(
    "vizoo::gelu_backward", "(Tensor grad_hidden, Tensor x) -> (Tensor, Tensor)", _launch_backward, _backward_like
)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_gradient, weight_gradient, bias_gradient = ctx.needs_input_grad
        rows = grad_out.reshape(-1, weight.shape[0])
        grad_x = grad_weight = None
        if x_gradient or weight_gradient:
            grad_hidden = grad_out @ weight
            # With gradients on, somebody wants a second derivative: the registered operator refuses it.
            direct = not torch.is_grad_enabled() and gpu.unwatched(grad_hidden, x)
            hidden, grad_x = (_launch_backward if direct else _backward)(grad_hidden, x)
            grad_weight = rows.t() @ hidden.view(-1, weight.shape[1]) if weight_gradient else None
        return grad_x if x_gradient else None, grad_weight, rows.sum(0) if bias_gradient else None
