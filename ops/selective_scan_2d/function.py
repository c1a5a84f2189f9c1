"""The selective scan over routes as a torch operator: registration, fake tensors, gradients, what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernels run. Whoever traces or intercepts operators gets the registered
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
from .routes import Route

Arguments = Sequence[Any]
"""x, delta, A, B, C, D, delta_weight, delta_bias, direction_B; codes of routes, softplus, routed_parameters, dtype."""

TENSORS = 9
MAX_ROUTES = 10
MAX_COLUMNS = 128
"""Numbers of a token and route whose gradients are sums over channels: what its steps are projected from, B and C."""
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))


def unsupported_reasons(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_weight: Tensor | None,
    delta_bias: Tensor | None,
    direction_B: Tensor | None,
    *,
    softplus: bool,
    routes: tuple[Route, ...],
    routed_parameters: bool,
    dtype: torch.dtype,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del softplus, routed_parameters  # any will do
    reasons = gpu.device_reasons(x.device)
    tensors = [t for t in (x, delta, A, B, C, D, delta_weight, delta_bias, direction_B) if t is not None]
    used = {*(tensor.dtype for tensor in tensors), dtype}
    if not DTYPES.issuperset(used):
        names = ", ".join(sorted(map(str, used)))
        reasons.append(f"the kernels know float16, bfloat16 and float32, these are {names}")
    if x.device.type == "cpu" and torch.bfloat16 in used:
        reasons.append("the interpreter has no bfloat16")
    if len(routes) > MAX_ROUTES:
        reasons.append(f"there may be {MAX_ROUTES} routes, these are {len(routes)}")
    columns = 2 * A.shape[-1] + (0 if delta_weight is None else delta_weight.shape[-1])
    if known(columns > MAX_COLUMNS):
        reasons.append(f"twice the states and what steps are projected from may be {MAX_COLUMNS}, this is {columns}")
    _, H, W, _ = x.shape
    if known(H * W * H >= 2**32) or known(H * W * W >= 2**32):
        reasons.append(f"pixels times the longer side may be 2**32 - 1, this map is {H} x {W}")
    if any(known(tensor.shape[1] * tensor.stride(1) >= 2**31) for tensor in (x, delta, B, C)):
        reasons.append("one image may span 2**31 - 1 numbers, this spans more")
    return reasons


def selective_scan_2d_triton(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_weight: Tensor | None,
    delta_bias: Tensor | None,
    direction_B: Tensor | None,
    *,
    softplus: bool,
    routes: tuple[Route, ...],
    routed_parameters: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Computes what `vizoo.ops.selective_scan_2d` defines with the fused kernels."""
    tensors = (x, delta, A, B, C, D, delta_weight, delta_bias, direction_B)
    settings = ([route.code for route in routes], softplus, routed_parameters, dtype)
    given = [tensor for tensor in tensors if tensor is not None]
    if not gpu.unwatched(*given):
        return _forward(*tensors, *settings)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Eager.apply(*tensors, *settings)
    return _launch_forward(*tensors, *settings)[0]


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from . import launch

    return launch.backward(*arguments)


def _forward_like(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_weight: Tensor | None,
    delta_bias: Tensor | None,
    direction_B: Tensor | None,
    routes: Sequence[int],
    softplus: bool,
    routed_parameters: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output, and the states before tiles."""
    images, H, W, d = x.shape
    count = tiles.count(H, W, tiles.states(int(d)).tokens)
    states = x.new_empty((images, len(routes), count, A.shape[-1], d), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), states


def _backward_like(grad_out: Tensor, states: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x = arguments[0]
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in arguments[:TENSORS])


_INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_weight, Tensor? delta_bias,"
    " Tensor? direction_B, int[] routes, bool softplus, bool routed_parameters, ScalarType dtype"
)
_forward = kernel_operator(
    "vizoo::selective_scan_2d", f"({_INPUTS}) -> (Tensor, Tensor)", _launch_forward, _forward_like
)
_backward = kernel_operator(
    "vizoo::selective_scan_2d_backward",
    f"(Tensor grad_out, Tensor states, {_INPUTS}) -> ({', '.join(['Tensor'] * TENSORS)})",
    _launch_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[TENSORS:]
    ctx.save_for_backward(output[1], *inputs[:TENSORS])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (TENSORS + len(ctx.settings))
    states, *tensors = ctx.saved_tensors
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(t for t in tensors if t is not None))
    gradients = (_launch_backward if direct else _backward)(grad_out, states, *tensors, *ctx.settings)
    wanted = zip(gradients, ctx.needs_input_grad[:TENSORS], strict=True)
    return *(gradient if asked else None for gradient, asked in wanted), *(None for _ in ctx.settings)


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _forward_flops(x: Sequence[int], delta: Any, A: Sequence[int], *arguments: Any, **kwargs: Any) -> int:
    """Twice 9 for each token, channel, state and route, as papers count; and the projection of the steps."""
    images, H, W, d = x
    K, _, N = A
    weight = arguments[3]
    return 2 * images * H * W * d * K * (9 * N + (0 if weight is None else weight[-1]))


def _backward_flops(grad_out: Any, states: Any, *arguments: Any, **kwargs: Any) -> int:
    return 2 * _forward_flops(*arguments)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.selective_scan_2d: _forward_flops,
    torch.ops.vizoo.selective_scan_2d_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
