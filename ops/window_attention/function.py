"""Window attention as a torch operator: registration, fake tensors, gradients, and what the kernels support.

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

MAX_POSITIONS = 1024
MAX_CHANNELS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> list[str]:
    """Why the kernels cannot take these arguments; empty when they can."""
    del bias, cosine_scale, padding, shift, scale  # any will do
    reasons = gpu.device_reasons(qkv.device)
    if qkv.dtype not in DTYPES:
        reasons.append(f"the kernels compute in float16, bfloat16 and float32, the input is {qkv.dtype}")
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        reasons.append("the interpreter has no bfloat16")
    if known(window[0] * window[1] > MAX_POSITIONS):
        reasons.append(f"a window may have {MAX_POSITIONS} positions, this has {window[0]} x {window[1]}")
    _, H, W, _, heads, d = qkv.shape
    if known(d > MAX_CHANNELS):
        reasons.append(f"a head may have {MAX_CHANNELS} channels, this has {d}")
    if known(3 * H * W * heads * d >= 2**31):
        reasons.append("one image of qkv may have 2**31 - 1 numbers, this has more")
    return reasons


def window_attention_triton(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.window_attention` defines with the fused kernels."""
    tensors = [tensor for tensor in (qkv, bias, cosine_scale, padding) if tensor is not None]
    if not gpu.unwatched(*tensors):
        return _forward(qkv, bias, cosine_scale, padding, window, shift, scale)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Eager.apply(qkv, bias, cosine_scale, padding, window, shift, scale)
    return _launch_forward(qkv, bias, cosine_scale, padding, window, shift, scale)[0]


# Triton is imported where a kernel is launched, so that importing the operators does not need it.


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    from . import launch

    return launch.forward(*arguments)


def _launch_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    from . import launch

    return launch.backward(*arguments)


def _run_forward(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of each query where the backward kernels need it (else empty)."""
    out, lse = _launch_forward(qkv, bias, cosine_scale, padding, window, shift, scale)
    return out, qkv.new_empty(0, dtype=torch.float32) if lse is None else lse


def _forward_like(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, H, W, _, heads, d = qkv.shape
    whole = tiles.is_whole(window[0] * window[1], d, qkv.element_size())
    return qkv.new_empty(B, H, W, heads, d), qkv.new_empty((0,) if whole else (B, heads, H, W), dtype=torch.float32)


def _run_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    bias_gradient: bool,
    padding_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, cosine_scale and padding; empty where not asked for."""
    gradients = _launch_backward(
        grad_out, qkv, bias, cosine_scale, padding, out, lse, window, shift, scale, bias_gradient, padding_gradient
    )
    grad_qkv, *others = (qkv.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return grad_qkv, others[0], others[1], others[2]


def _backward_like(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    bias_gradient: bool,
    padding_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        if tensor is None or not wanted:
            return qkv.new_empty(0)
        return tensor.new_empty(tensor.shape)

    grad_qkv = qkv.new_empty(qkv.shape)
    return grad_qkv, like(bias, bias_gradient), like(cosine_scale, True), like(padding, padding_gradient)


_forward = kernel_operator(
    "vizoo::window_attention",
    "(Tensor qkv, Tensor? bias, Tensor? cosine_scale, Tensor? padding, SymInt[] window, SymInt[] shift,"
    " float scale) -> (Tensor, Tensor)",
    _run_forward,
    _forward_like,
)
_backward = kernel_operator(
    "vizoo::window_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor? bias, Tensor? cosine_scale, Tensor? padding, Tensor? out,"
    " Tensor? lse, SymInt[] window, SymInt[] shift, float scale, bool bias_gradient, bool padding_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _backward_like,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    qkv, bias, cosine_scale, padding, ctx.window, ctx.shift, ctx.scale = inputs
    out, lse = output
    whole = lse is None or lse.ndim == 1  # the backward kernels for whole windows recompute everything
    ctx.save_for_backward(qkv, bias, cosine_scale, padding, None if whole else out, None if whole else lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    _, bias_gradient, cosine_gradient, padding_gradient, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    # Where gradients are to be differentiated again, the registered operator is there to say that it cannot.
    direct = not torch.is_grad_enabled() and gpu.unwatched(grad_out, *(x for x in saved if x is not None))
    qkv, bias, cosine, padding = (_launch_backward if direct else _backward)(
        grad_out, *saved, ctx.window, ctx.shift, ctx.scale, bias_gradient, padding_gradient
    )
    return (
        qkv,
        bias if bias_gradient else None,
        cosine if cosine_gradient else None,
        padding if padding_gradient else None,
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


_Eager = direct_function(_launch_forward, _setup_context, _gradients)


def _products(qkv: Sequence[int], window: Sequence[int]) -> int:
    """Operations of one matrix product over the logits of all windows."""
    B, H, W, _, heads, d = qkv
    n = window[0] * window[1]
    return 2 * B * (-(-H // window[0])) * (-(-W // window[1])) * heads * n * n * d


def _forward_flops(
    qkv: Sequence[int], bias: Any, cosine_scale: Any, padding: Any, window: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * _products(qkv, window)


def _backward_flops(
    grad_out: Any,
    qkv: Sequence[int],
    bias: Any,
    cosine_scale: Any,
    padding: Any,
    out: Any,
    lse: Any,
    window: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 5 * _products(qkv, window)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.vizoo.window_attention: _forward_flops,
    torch.ops.vizoo.window_attention_backward: _backward_flops,
}
"""Operations of each operator from the shapes of its arguments, as `FlopCounterMode(custom_mapping=...)` takes them."""
