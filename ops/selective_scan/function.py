"""The selective scan as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernel runs. Whoever traces or intercepts operators gets the registered
one, and so does who asks for the last state. Both share their gradient formula.
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

MAX_STATES = 64
MAX_TOKENS = 2**23
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))


def unsupported_reasons(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    return_state: bool,
    dtype: torch.dtype,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del softplus, reverse, return_state  # any will do
    reasons = gpu.device_reasons(u.device)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    used = [*(tensor.dtype for tensor in tensors if tensor is not None), dtype]
    if not DTYPES.issuperset(used):
        names = ", ".join(sorted(set(map(str, used))))
        reasons.append(f"the kernels know float16, bfloat16 and float32, these are {names}")
    if u.device.type == "cpu" and torch.bfloat16 in used:
        reasons.append("the interpreter has no bfloat16")
    if known(A.shape[1] > MAX_STATES):
        reasons.append(f"a channel may have {MAX_STATES} states, this has {A.shape[1]}")
    if known(u.shape[2] > MAX_TOKENS):
        reasons.append(f"a sequence may have {MAX_TOKENS} tokens, this has {u.shape[2]}")
    return reasons


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    return_state: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes what `vizoo.ops.selective_scan` defines with the fused kernels."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    tensors = [tensor for tensor in inputs if tensor is not None]
    differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    arguments = (*inputs, softplus, reverse, return_state, differentiate, tiles.TOKENS, dtype)
    if not gpu.unwatched(*tensors) or (differentiate and return_state):
        out, last, _ = _forward(*arguments)
        return out, last
    if differentiate:
        return _Eager.apply(*arguments), u.new_empty(0)
    out, last, _ = _launch_forward(*arguments)
    return out, last


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from . import launch

    return launch.backward(*arguments)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a sequence (B, D, L): channels lie together if they do in `tensor`, else tokens."""
    batch, channels, length = tensor.shape
    if known(tensor.stride(1) == 1):
        return tensor.new_empty((batch, length, channels), dtype=dtype).transpose(1, 2)
    return tensor.new_empty((batch, channels, length), dtype=dtype)


def _forward_like(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    reverse: bool,
    return_state: bool,
    keep: bool,
    tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of tiles if they are to be kept for the backward pass."""
    batch, channels, length = u.shape
    states = A.shape[1]
    last = u.new_empty((batch, states, channels) if return_state else (0, 0, 0), dtype=torch.float32)
    return (
        empty_like(u, dtype),
        last.transpose(1, 2),
        u.new_empty((batch, -(-length // tokens), states, channels) if keep else 0, dtype=torch.float32),
    )


def _backward_like(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    softplus: bool,
    reverse: bool,
    tokens: int,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    by_B, by_C = empty_map_like(B, 1)[0], empty_map_like(B, 1)[0]
    start = None if initial_state is None else initial_state.new_empty(initial_state.transpose(1, 2).shape)
    return (
        empty_like(u), empty_like(u, delta.dtype), like(A), by_B.to(B.dtype), by_C.to(C.dtype), like(D),
        like(z) if z is None else empty_like(u, z.dtype), like(delta_bias),
        like(start) if start is None else start.transpose(1, 2),
    )  # fmt: skip


def empty_map_like(tensor: Tensor, copies: int) -> Tensor:
    """Memory for maps (copies, B, G, N, L) in float32: tokens lie together if they do in `tensor`, else states."""
    batch, groups, states, length = tensor.shape
    if known(tensor.stride(3) == 1):
        return tensor.new_empty((copies, batch, groups, states, length), dtype=torch.float32)
    return tensor.new_empty((copies, batch, length, groups, states), dtype=torch.float32).permute(0, 1, 3, 4, 2)


_forward = kernel_operator(
    "vizoo::selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial_state, bool softplus, bool reverse, bool return_state, bool keep, int tokens, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::selective_scan_backward",
    "(Tensor? grad_out, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? delta_bias, Tensor? initial_state, Tensor states, bool softplus, bool reverse, int tokens)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.reverse, ctx.return_state, _, ctx.tokens, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None = None, _: Any = None) -> tuple[Any, ...]:
    none = (None,) * 15
    if not ctx.return_state:
        grad_last = None  # of a tensor without numbers
    if grad_out is None and grad_last is None:
        return none
    saved = ctx.saved_tensors
    looked_at = [tensor for tensor in (grad_out, grad_last, *saved) if tensor is not None]
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(*looked_at)
    run = _launch_backward if direct else _backward
    gradients = run(grad_out, grad_last, *saved, ctx.softplus, ctx.reverse, ctx.tokens)
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if asked else None for gradient, asked in wanted), *none[9:])


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _forward_flops(u: Sequence[int], delta: Any, A: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Nine for each token, channel and state, as is the custom; what runs once a channel is left out."""
    batch, channels, length = u
    return 9 * batch * channels * length * A[1]


def _backward_flops(grad_out: Any, grad_last: Any, u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _forward_flops(u, delta, A)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.selective_scan: _forward_flops,
    torch.ops.vizoo.selective_scan_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
