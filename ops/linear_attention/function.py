"""Linear attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

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

from .rules import FlowConservation, KernelSum, MeanSubtraction, Rule

MAX_CHANNELS = 64
MAX_PITCH = 2**22
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MEAN, SUM, FLOW = range(3)
"""Rules as the kernels know them."""


def unsupported_reasons(q: Tensor, k: Tensor | None, v: Tensor | None, **options: Any) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del options  # any will do
    reasons = gpu.device_reasons(q.device)
    tensors = [q] if k is None or v is None else [q, k, v]
    dtypes = [each.dtype for each in tensors]
    if q.dtype not in DTYPES or len(set(dtypes)) > 1:
        names = ", ".join(map(str, dtypes))
        reasons.append(f"the kernels take q, k and v of one dtype, float16, bfloat16 or float32, these are {names}")
    if q.device.type == "cpu" and torch.bfloat16 in dtypes:
        reasons.append("the interpreter has no bfloat16")
    if any(known(each.shape[-1] > MAX_CHANNELS) for each in tensors):
        widths = ", ".join(str(each.shape[-1]) for each in tensors)
        reasons.append(f"a head may have {MAX_CHANNELS} channels, these have {widths}")
    if any(known(each.stride(1) > MAX_PITCH) for each in tensors):
        reasons.append(f"tokens may lie {MAX_PITCH} numbers apart in memory, these lie further")
    if known(q.shape[0] * q.shape[1] * q.shape[-2] >= 2**31):
        reasons.append("images, tokens and heads may make 2**31 - 1 vectors, these make more")
    return reasons


def linear_attention_triton(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rule: Rule,
    temperature: Tensor | None,
    key_position: Tensor | None,
    local_kernels: Tensor | None,
    grid: tuple[int, int] | None,
) -> Tensor:
    """Computes what `vizoo.ops.linear_attention` defines with the fused kernels."""
    tensors = (q, k, v, temperature, key_position, local_kernels)
    options = (*((0, 0) if grid is None else grid), *_numbers(rule, q.shape[-1]))
    given = [tensor for tensor in tensors if tensor is not None]
    if not gpu.unwatched(*given):
        return _forward(*tensors, *options)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Eager.apply(*tensors, *options)
    return _launch_forward(*tensors, *options)[0]


def _numbers(rule: Rule, d: int) -> tuple[int, float, bool]:
    """Which rule, the number it has, and whether that is a floor."""
    if isinstance(rule, MeanSubtraction):
        return MEAN, d**-0.5 if rule.scale is None else rule.scale, False
    if isinstance(rule, KernelSum):
        return (SUM, rule.epsilon, False) if rule.floor is None else (SUM, rule.floor, True)
    assert isinstance(rule, FlowConservation)
    return FLOW, rule.epsilon, False


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def sizes(d: int, e: int, rule: int) -> tuple[int, int, int]:
    """Numbers that the sums of a head are, and their gradients, and vectors of d numbers that its flows are."""
    behind = {MEAN: d + e, SUM: d, FLOW: 1}[rule]
    return d * e + behind, d * e + (e if rule == MEAN else d), 4 if rule == FLOW else 0


def output_shape(q: Tensor, v: Tensor | None) -> tuple[int, int, int, int]:
    """(B, N, heads, e)."""
    return q.shape[0], q.shape[1], q.shape[-2], q.shape[-1] if v is None else v.shape[3]


def _forward_like(
    q: Tensor, k: Any, v: Tensor | None, temperature: Any, position: Any, local: Any, H: int, W: int, rule: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, heads, e = output_shape(q, v)
    d = q.shape[-1]
    size, vectors = sizes(d, e, rule)[::2]
    return (
        q.new_empty((B, N, heads, e)),
        q.new_empty((B, heads, size), dtype=torch.float32),
        q.new_empty((B, heads, vectors, d), dtype=torch.float32),
    )


def _run_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of all inputs; empty where there is no such input."""
    gradients = _launch_backward(grad_out, *arguments)
    return [grad_out.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _backward_like(grad_out: Tensor, sums: Any, flows: Any, *inputs: Any) -> list[Tensor]:
    return [grad_out.new_empty(0) if each is None else each.new_empty(each.shape) for each in inputs[:6]]


_INPUTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? temperature, Tensor? key_position, Tensor? local_kernels,"
    " SymInt H, SymInt W, int rule, float number, bool floored"
)
_forward = kernel_operator(
    "vizoo::linear_attention", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)", _launch_forward, _forward_like
)
_backward = kernel_operator(
    "vizoo::linear_attention_backward",
    f"(Tensor grad_out, Tensor sums, Tensor flows, {_INPUTS}) -> Tensor[]",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.set_materialize_grads(False)  # nobody has one for the sums


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, sums, flows = ctx.saved_tensors
    given = [each for each in inputs if each is not None]
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, sums, flows, *given)
    run = _launch_backward if direct else _backward
    gradients = run(grad_out, sums, flows, *inputs, *ctx.options)
    kept = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*kept, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _product(q: Sequence[int], v: Sequence[int] | None) -> int:
    """Operations of one product of all tokens with the matrix of their head."""
    B, N, *_, heads, d = q
    return 2 * B * N * heads * d * (d if v is None else v[3])


def _forward_flops(q: Sequence[int], k: Any, v: Sequence[int] | None, *args: Any, **kwargs: Any) -> int:
    return 2 * _product(q, v)


def _backward_flops(
    grad_out: Any, sums: Any, flows: Any, q: Sequence[int], k: Any, v: Sequence[int] | None, temperature: Any,
    position: Any, local: Any, H: int, W: int, rule: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return (6 if rule == FLOW else 4) * _product(q, v)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.linear_attention: _forward_flops,
    torch.ops.vizoo.linear_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
