"""Channel attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator would take longer than the kernels run. Whoever traces or intercepts operators gets the registered
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

MAX_CHANNELS = 64
MAX_NUMBERS = 2**31 - 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(qkv: Tensor, *, scale: float) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del scale  # any will do
    reasons = gpu.device_reasons(qkv.device)
    B, N, _, groups, d = qkv.shape
    if qkv.dtype not in DTYPES:
        reasons.append(f"the kernels know float16, bfloat16 and float32, the input is {qkv.dtype}")
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        reasons.append("the interpreter has no bfloat16")
    if known(d > MAX_CHANNELS):
        reasons.append(f"a group may have {MAX_CHANNELS} channels, this has {d}")
    if known(3 * N * groups * d > MAX_NUMBERS):
        reasons.append("one image of qkv may have 2**31 - 1 numbers, this has more")
    if known(B * N * groups > MAX_NUMBERS):
        reasons.append("the output may have 2**31 - 1 vectors of a group, this has more")
    return reasons


def channel_attention_triton(qkv: Tensor, *, scale: float) -> Tensor:
    """Computes what `vizoo.ops.channel_attention` defines with the fused kernels."""
    if not gpu.unwatched(qkv):
        return _forward(qkv, scale)[0]
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Eager.apply(qkv, scale)
    return _launch_forward(qkv, scale)[0]


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(qkv, scale)


def _launch_backward(grad_out: Tensor, qkv: Tensor, weights: Tensor, scale: float) -> Tensor:
    from . import launch

    return launch.backward(grad_out, qkv, weights, scale)


def _forward_like(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, N, _, groups, d = qkv.shape
    return qkv.new_empty(B, N, groups, d), qkv.new_empty((B, groups, d, d), dtype=torch.float32)


def _backward_like(grad_out: Tensor, qkv: Tensor, weights: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


_forward = kernel_operator(
    "vizoo::channel_attention", "(Tensor qkv, float scale) -> (Tensor, Tensor)", _launch_forward, _forward_like
)
_backward = kernel_operator(
    "vizoo::channel_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor weights, float scale) -> Tensor",
    _launch_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, output[1])
    ctx.set_materialize_grads(False)  # nobody has one for the weights


def _gradient(ctx: Any, grad_out: Tensor) -> Tensor:
    qkv, weights = ctx.saved_tensors
    # With gradients on, somebody wants a second derivative: the registered operator refuses it.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, qkv, weights)
    run = _launch_backward if direct else _backward
    return run(grad_out, qkv, weights, ctx.scale)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, grad_out), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _product(qkv: Sequence[int]) -> int:
    """Operations of one product of all positions' vectors with a matrix, or with each other."""
    B, N, _, groups, d = qkv
    return 2 * B * N * groups * d * d


def _forward_flops(qkv: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _product(qkv)


def _backward_flops(grad_out: Any, qkv: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 4 * _product(qkv)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.channel_attention: _forward_flops,
    torch.ops.vizoo.channel_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
