"""Neighborhood attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernel runs. Whoever traces or intercepts operators gets the registered
one. Both share their gradient formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import direct_function, kernel_operator
from vizoo.ops.tracing import known

MAX_CHANNELS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    *,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del bias, extra_value, kernel_size, dilation, stride, causal, scale  # any will do
    reasons = gpu.device_reasons(query.device)
    if query.dtype not in DTYPES:
        reasons.append(f"the kernels compute in float16, bfloat16 and float32, the input is {query.dtype}")
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        reasons.append("the interpreter has no bfloat16")
    heads, d = query.shape[-2:]
    if known(d > MAX_CHANNELS):
        reasons.append(f"a head may have {MAX_CHANNELS} channels, this has {d}")
    if known(math.prod(query.shape[1:]) * (3 if key is not None else 1) >= 2**31):
        reasons.append("queries, keys and values of one image may have 2**31 - 1 numbers, these have more")
    if extra_key is not None:
        reasons.append("the kernels know no extra keys")
    if key is not None and value is not None:
        if key.dtype != query.dtype or value.dtype != query.dtype:
            reasons.append(f"the kernels take one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
        if known(key.shape[-2] != heads):
            reasons.append(f"the kernels take as many heads of keys as of queries, not {key.shape[-2]} and {heads}")
        if known(value.shape[-1] != d):
            reasons.append(f"the kernels take values as wide as keys, not {value.shape[-1]} and {d} channels")
    return reasons


def neighborhood_attention_triton(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    *,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.neighborhood_attention` defines with the fused kernels."""
    del extra_key, extra_value  # there are none: `unsupported_reasons` says so
    arguments = query, key, value, bias, kernel_size, dilation, stride, causal, scale
    tensors = [tensor for tensor in arguments[:4] if tensor is not None]
    if not gpu.unwatched(*tensors):
        return _forward(*arguments)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(*arguments)
    return _launch_forward(*arguments)[0]


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def _forward_like(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, kernel_size: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    B, space, (heads, d) = query.shape[0], query.shape[1 : 1 + len(kernel_size)], query.shape[-2:]
    return query.new_empty(B, *space, heads, d), query.new_empty((B, heads, *space), dtype=torch.float32)


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; empty where there is no such input, or nobody asked."""
    query = arguments[1]
    gradients = _launch_backward(*arguments)
    first, second, third, fourth = (query.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return first, second, third, fourth


def _backward_like(
    grad_out: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(query), like(key), like(value), like(bias if rest[-1] else None)


_forward = kernel_operator(
    "vizoo::neighborhood_attention",
    "(Tensor query, Tensor? key, Tensor? value, Tensor? bias, SymInt[] kernel_size, SymInt[] dilation,"
    " SymInt[] stride, bool[] causal, float scale) -> (Tensor, Tensor)",
    _launch_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::neighborhood_attention_backward",
    "(Tensor grad_out, Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor out, Tensor lse,"
    " SymInt[] kernel_size, SymInt[] dilation, SymInt[] stride, bool[] causal, float scale, bool bias_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    bias_gradient = ctx.needs_input_grad[3]
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(x for x in saved if x is not None))
    gradients = (_launch_backward if direct else _backward)(
        grad_out, *saved, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale, bias_gradient
    )
    wanted = (True, saved[1] is not None, saved[2] is not None, bias_gradient)
    kept = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (*kept, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _products(query: Sequence[int], kernel_size: Sequence[int]) -> int:
    """Operations of one matrix product over the logits of all windows; `query` with its axis of heads and channels."""
    B, *space = query[: 1 + len(kernel_size)]
    heads, d = query[-2:]
    return 2 * B * math.prod(space) * heads * math.prod(kernel_size) * d


def _forward_flops(
    query: Sequence[int], key: Any, value: Any, bias: Any, kernel_size: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * _products(query, kernel_size)


def _backward_flops(
    grad_out: Any,
    query: Sequence[int],
    key: Any,
    value: Any,
    bias: Any,
    out: Any,
    lse: Any,
    kernel_size: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 5 * _products(query, kernel_size)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.neighborhood_attention: _forward_flops,
    torch.ops.vizoo.neighborhood_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
