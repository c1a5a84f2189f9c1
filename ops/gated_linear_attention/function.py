"""Gated linear attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

A call in eager mode goes straight to the launch, with an autograd function where gradients are wanted: passing the
registered operator can take longer than the kernels run. Whoever traces or intercepts operators gets the registered
one, and so does who wants the last state. Both share their gradient formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import direct_function, kernel_operator
from vizoo.ops.tracing import known

MAX_SIDE = 128
"""Channels of keys or values, in bfloat16."""
MAX_SMALLER_SIDE = 64
"""Channels of the other ones, and of both in dtypes whose products have float32 factors."""
MAX_PITCH = 2**22
ROWS = 32
"""Tokens of a tile for who counts operations; those of the kernels depend on sizes."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None,
    *,
    initial_state: Tensor | None,
    **options: Any,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del initial_state, options  # any will do
    reasons = gpu.device_reasons(q.device)
    decays = (decay,) if reverse_decay is None else (decay, reverse_decay)
    dtypes = [each.dtype for each in (q, k, v)]
    if any(each.dtype not in DTYPES for each in (q, *decays)):
        names = ", ".join(str(each.dtype) for each in (q, *decays))
        reasons.append(f"the kernels know float16, bfloat16 and float32, q and the decays are {names}")
    if q.device.type == "cpu" and any(each.dtype == torch.bfloat16 for each in (q, k, v, *decays)):
        reasons.append("the interpreter has no bfloat16")
    if len(set(dtypes)) > 1:
        reasons.append(f"the kernels take q, k and v of one dtype, not {', '.join(map(str, dtypes))}")
    if len({each.dtype for each in decays}) > 1:
        reasons.append(f"the kernels take decays of one dtype, not {' and '.join(str(each.dtype) for each in decays)}")
    dk, dv = q.shape[3], v.shape[3]
    most = MAX_SIDE if q.dtype == torch.bfloat16 else MAX_SMALLER_SIDE
    if known(dk > most) or known(dv > most):
        reasons.append(f"keys and values of {q.dtype} may have {most} channels, these have {dk} and {dv}")
    elif known(dk > MAX_SMALLER_SIDE) and known(dv > MAX_SMALLER_SIDE):
        reasons.append(f"channels of keys or of values may exceed {MAX_SMALLER_SIDE}, not both: {dk} and {dv}")
    if any(known(each.stride(1) > MAX_PITCH) for each in (q, k, v, *decays)):
        reasons.append(f"tokens may lie {MAX_PITCH} numbers apart in memory, these lie further")
    if known(q.shape[0] * q.shape[1] * q.shape[2] >= 2**30):
        reasons.append("batch, tokens and heads may make 2**30 - 1 vectors, these make more")
    return reasons


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None,
    *,
    scale: float,
    reverse: bool,
    normalizer: float | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Computes what `vizoo.ops.gated_linear_attention` defines with the fused kernels."""
    arguments = (q, k, v, decay, reverse_decay, initial_state, scale, reverse, normalizer)
    given = [tensor for tensor in arguments[:6] if isinstance(tensor, Tensor)]
    if return_state or not gpu.unwatched(*given):
        return _forward(*arguments)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Eager.apply(*arguments), q.new_empty(0)
    return _launch_forward(*arguments)


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def _forward_like(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, reverse_decay: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch, _, heads, dk = q.shape
    state = (batch, heads, dk, v.shape[3]) if reverse_decay is None else (0,)
    return q.new_empty(v.shape), q.new_empty(state, dtype=torch.float32)


def _run_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of all inputs; empty where there is no such input."""
    return [arguments[0].new_empty(0) if each is None else each for each in _launch_backward(*arguments)]


def _backward_like(grad_out: Tensor, grad_state: Any, *inputs: Any) -> list[Tensor]:
    return [grad_out.new_empty(0) if each is None else each.new_empty(each.shape) for each in inputs[:6]]


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? reverse_decay, Tensor? initial_state, float scale,"
    " bool reverse, float? normalizer"
)
_forward = kernel_operator(
    "vizoo::gated_linear_attention", f"({_INPUTS}) -> (Tensor, Tensor)", _launch_forward, _forward_like
)
_backward = kernel_operator(
    "vizoo::gated_linear_attention_backward",
    f"(Tensor grad_out, Tensor? grad_state, {_INPUTS}) -> Tensor[]",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None = None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if inputs[4] is not None:
        grad_state = None  # of a tensor without numbers
    if grad_out is None:
        grad_out = inputs[0].new_zeros(inputs[2].shape)
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(each for each in inputs if each is not None))
    run = _launch_backward if direct else _backward
    gradients = run(grad_out, grad_state, *inputs, *ctx.options)
    kept = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*kept, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _operations(q: Sequence[int], v: Sequence[int], reverse_decay: Any) -> tuple[int, int, int]:
    """Operations of products: of tokens with states, of tokens' keys in their tile and of their values. Those that only
    add decays up, or make up for rounding, are left out."""
    directions = 1 if reverse_decay is None else 2
    vectors = 2 * q[0] * q[1] * q[2]
    return directions * vectors * q[3] * v[3], directions * vectors * ROWS * q[3], vectors * ROWS * v[3]


def _forward_flops(
    q: Sequence[int], k: Any, v: Sequence[int], decay: Any, reverse_decay: Any, *args: Any, **kwargs: Any
) -> int:
    by_state, keys, values = _operations(q, v, reverse_decay)
    return 2 * by_state + keys + values


def _backward_flops(
    grad_out: Any, grad_state: Any, q: Sequence[int], k: Any, v: Sequence[int], decay: Any, reverse_decay: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    by_state, keys, values = _operations(q, v, reverse_decay)
    return 5 * by_state + 3 * keys + 2 * values


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.gated_linear_attention: _forward_flops,
    torch.ops.vizoo.gated_linear_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
