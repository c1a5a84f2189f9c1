"""State space duality as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernels run. Whoever traces or intercepts operators gets the registered
one, and so does who wants the last state. Both share their gradient formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import direct_function, kernel_operator
from vizoo.ops.tracing import known, without_autocast

from . import tiles

MAX_SIDE = 128
MAX_SMALLER_SIDE = 64
MAX_PITCH = 2**22
LARGEST = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    states: int,
    **options: Any,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del D, z, dt_bias, initial_state, options  # any will do
    reasons = gpu.device_reasons(x.device)
    maps = (x, x) if B is None or C is None else (B, C)
    dtypes = [x.dtype, *(each.dtype for each in maps)]
    if x.dtype not in DTYPES or dt.dtype not in DTYPES:
        reasons.append(f"the kernels know float16, bfloat16 and float32, x and dt are {x.dtype}, {dt.dtype}")
    if x.device.type == "cpu" and torch.bfloat16 in (*dtypes, dt.dtype):
        reasons.append("the interpreter has no bfloat16")
    if len(set(dtypes)) > 1:
        reasons.append(f"the kernels take x, B and C of one dtype, not {', '.join(map(str, dtypes))}")
    P = x.shape[3] if B is not None else (x.shape[2] - 2 * states) // A.shape[0]
    if known(P > MAX_SIDE) or known(states > MAX_SIDE):
        reasons.append(f"a head may have {MAX_SIDE} channels and {MAX_SIDE} states, this has {P} and {states}")
    elif known(P > MAX_SMALLER_SIDE) and known(states > MAX_SMALLER_SIDE):
        reasons.append(f"channels or states of a head may exceed {MAX_SMALLER_SIDE}, not both: {P} and {states}")
    if any(known(each.stride(1) > MAX_PITCH) for each in (x, dt, *maps)):
        reasons.append(f"tokens may lie {MAX_PITCH} numbers apart in memory, these lie further")
    if known(x.shape[0] * x.shape[1] * A.shape[0] >= 2**31):
        reasons.append("batch, tokens and heads may make 2**31 - 1 vectors, these make more")
    return reasons


def state_space_dual_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    causal: bool,
    softplus: bool,
    dt_limit: tuple[float, float] | None,
    states: int,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes what `vizoo.ops.state_space_dual` defines with the fused kernels; the state only where asked for."""
    limit = None if dt_limit is None else [max(-LARGEST, dt_limit[0]), min(LARGEST, dt_limit[1])]
    options = (states, causal, softplus, limit)
    if z is None:
        return _run((x, dt, A, B, C, D, dt_bias, initial_state), options, return_state)
    # No vision model gates here. In float32, what is gated has not been rounded yet, nor has its gradient.
    maps = (each if each is None else each.float() for each in (B, C))
    out, state = _run((x.float(), dt, A, *maps, D, dt_bias, initial_state), options, return_state)
    with without_autocast(x.device):
        return (out * F.silu(z.float())).to(x.dtype), state


def _run(
    tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Without a gate."""
    given = [tensor for tensor in tensors if tensor is not None]
    if return_state or not gpu.unwatched(*given):
        return _forward(*tensors, *options)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Eager.apply(*tensors, *options), None
    return _launch_forward(*tensors, *options)[0], None


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def output_shape(x: Tensor, A: Tensor, B: Tensor | None, states: int) -> tuple[int, int, int, int]:
    """(batch, L, H, P)."""
    batch, L, heads = x.shape[0], x.shape[1], A.shape[0]
    return batch, L, heads, (x.shape[2] - 2 * states) // heads if B is None else x.shape[3]


def _forward_like(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor | None, C: Any, D: Any, bias: Any, initial: Any, states: int, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, L, heads, P = output_shape(x, A, B, states)
    return x.new_empty((batch, L, heads, P)), x.new_empty((batch, heads, P, states), dtype=torch.float32)


def _run_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of all inputs; empty where there is no such input."""
    gradients = _launch_backward(grad_out, *arguments)
    return [grad_out.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _backward_like(grad_out: Tensor, grad_state: Any, state: Any, *inputs: Any) -> list[Tensor]:
    return [grad_out.new_empty(0) if each is None else each.new_empty(each.shape) for each in inputs[:8]]


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor? B, Tensor? C, Tensor? D, Tensor? dt_bias, Tensor? initial_state,"
    " SymInt states, bool causal, bool softplus, float[]? dt_limit"
)
_forward = kernel_operator(
    "vizoo::state_space_dual", f"({_INPUTS}) -> (Tensor, Tensor)", _launch_forward, _forward_like
)
_backward = kernel_operator(
    "vizoo::state_space_dual_backward",
    f"(Tensor grad_out, Tensor? grad_state, Tensor state, {_INPUTS}) -> Tensor[]",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None = None) -> tuple[Tensor | None, ...]:
    *inputs, state = ctx.saved_tensors
    if grad_out is None:
        grad_out = inputs[0].new_zeros(output_shape(inputs[0], inputs[2], inputs[3], ctx.options[0]))
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(each for each in inputs if each is not None))
    run = _launch_backward if direct else _backward
    gradients = run(grad_out, grad_state, state, *inputs, *ctx.options)
    kept = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*kept, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _operations(x: Sequence[int], A: Sequence[int], B: Sequence[int] | None, states: int) -> tuple[int, int, int, int]:
    """Operations of products: of all tokens with the state of their head; in the tiles of the causal form, of tokens'
    inputs with each other, of their maps for every head, and of their maps for every group."""
    tokens, (heads,) = x[0] * x[1], A
    inner = x[2] - 2 * states if B is None else x[2] * x[3]
    groups = 1 if B is None else B[2]
    pairs = 2 * tokens * tiles.ROWS
    return 2 * tokens * inner * states, pairs * inner, pairs * states * heads, pairs * states * groups


def _forward_flops(
    x: Sequence[int], dt: Any, A: Sequence[int], B: Any, C: Any, D: Any, bias: Any, initial: Any, states: int,
    causal: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    by_state, inputs, maps, _ = _operations(x, A, B, states)
    return 2 * by_state + (inputs + maps if causal else 0)


def _backward_flops(
    grad_out: Any, grad_state: Any, state: Any, x: Sequence[int], dt: Any, A: Sequence[int], B: Any, C: Any, D: Any,
    bias: Any, initial: Any, states: int, causal: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    by_state, inputs, maps, shared = _operations(x, A, B, states)
    return 5 * by_state + 2 * inputs + 2 * maps + shared if causal else 4 * by_state


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.state_space_dual: _forward_flops,
    torch.ops.vizoo.state_space_dual_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
