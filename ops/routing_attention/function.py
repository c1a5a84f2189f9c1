"""Routing attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernel runs. Whoever traces or intercepts operators gets the registered
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

from . import tiles
from .reference import key_region_size

MAX_CHANNELS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    *,
    region_size: tuple[int, int],
    scale: float,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del region_size, scale  # any will do
    reasons = gpu.device_reasons(query.device)
    used = [tensor.dtype for tensor in (query, route_weights) if tensor is not None]
    if any(dtype not in DTYPES for dtype in used):
        names = ", ".join(map(str, used))
        reasons.append(f"the kernels know float16, bfloat16 and float32, the input is {names}")
    if query.device.type == "cpu" and torch.bfloat16 in used:
        reasons.append("the interpreter has no bfloat16")
    maps = [tensor for tensor in (query, key, value) if tensor is not None]
    widest = query if value is None or known(query.shape[-1] >= value.shape[-1]) else value
    if known(widest.shape[-1] > MAX_CHANNELS):
        reasons.append(f"a head may have {MAX_CHANNELS} channels, this has {widest.shape[-1]}")
    if any(known(tensor.shape[1:].numel() >= 2**31) for tensor in maps):
        reasons.append("one image may have 2**31 - 1 numbers, this has more")
    if known(routes.shape[1:].numel() >= 2**31):
        reasons.append("one image may have 2**31 - 1 routes, this has more")
    return reasons


def routing_attention_triton(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    *,
    region_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.routing_attention` defines with the fused kernels."""
    tensors = [tensor for tensor in (query, key, value, routes, route_weights) if tensor is not None]
    if not gpu.unwatched(*tensors):
        return _forward(query, key, value, routes, route_weights, region_size, scale)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(query, key, value, routes, route_weights, region_size, scale)
    return _launch_forward(query, key, value, routes, route_weights, region_size, scale)[0]


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def _forward_like(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of each query."""
    B, H, W, *_, heads, d = query.shape
    e = d if value is None else value.shape[-1]
    return query.new_empty(B, H, W, heads, e), query.new_empty((B, heads, H, W), dtype=torch.float32)


def _run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    region_size: Sequence[int],
    scale: float,
    weights_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and route_weights; empty where there is no such tensor, or not asked for."""
    gradients = _launch_backward(
        grad_out, query, key, value, routes, route_weights, out, lse, region_size, scale, weights_gradient
    )
    grad_query, *others = (query.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return grad_query, others[0], others[1], others[2]


def _backward_like(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    region_size: Sequence[int],
    scale: float,
    weights_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return query.new_empty(query.shape), like(key), like(value), like(route_weights if weights_gradient else None)


_forward = kernel_operator(
    "vizoo::routing_attention",
    "(Tensor query, Tensor? key, Tensor? value, Tensor routes, Tensor? route_weights, SymInt[] region_size,"
    " float scale) -> (Tensor, Tensor)",
    _launch_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::routing_attention_backward",
    "(Tensor grad_out, Tensor query, Tensor? key, Tensor? value, Tensor routes, Tensor? route_weights, Tensor? out,"
    " Tensor lse, SymInt[] region_size, float scale, bool weights_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, routes, weights, ctx.region_size, ctx.scale = inputs
    out, lse = output
    kept = out if _needs_output(query, key, value, routes, ctx.region_size) else None
    ctx.save_for_backward(query, key, value, routes, weights, kept, lse)
    ctx.set_materialize_grads(False)


def _needs_output(
    query: Tensor, key: Tensor | None, value: Tensor | None, routes: Tensor, region_size: Sequence[int]
) -> bool:
    """Whether the backward kernels read the output of the forward one."""
    rows, cols = key_region_size(query, query if key is None else key, (region_size[0], region_size[1]))
    widest = max(query.shape[-1], query.shape[-1] if value is None else value.shape[-1])
    return not tiles.in_one_step(routes.shape[-1] * rows * cols, widest, query.element_size())


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad
    saved = ctx.saved_tensors
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(x for x in saved if x is not None))
    gradients = (_launch_backward if direct else _backward)(grad_out, *saved, ctx.region_size, ctx.scale, wanted[4])
    query, key, value, weights = (
        gradient if asked else None for gradient, asked in zip(gradients, (*wanted[:3], wanted[4]), strict=True)
    )
    return query, key, value, None, weights, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _products(
    query: Sequence[int], key: Sequence[int] | None, value: Sequence[int] | None, routes: Sequence[int]
) -> tuple[int, int]:
    """Operations of one product over all logits along the channels of keys, and of one along those of values."""
    B, H, W, *_, heads, d = query
    regions, k = routes[-2:]
    below, beside = (H, W) if key is None else key[1:3]
    logits = B * heads * H * W * k * below * beside // regions
    return 2 * logits * d, 2 * logits * (d if value is None else value[-1])


def _forward_flops(query: Any, key: Any, value: Any, routes: Any, *args: Any, **kwargs: Any) -> int:
    return sum(_products(query, key, value, routes))


def _backward_flops(grad_out: Any, query: Any, key: Any, value: Any, routes: Any, *args: Any, **kwargs: Any) -> int:
    along_keys, along_values = _products(query, key, value, routes)
    return 3 * along_keys + 2 * along_values


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.routing_attention: _forward_flops,
    torch.ops.vizoo.routing_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
