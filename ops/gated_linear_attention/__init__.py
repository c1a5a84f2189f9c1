"""Gated linear attention: a matrix-valued state whose rows fade at rates of their own, in either direction or both."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import gated_linear_attention_triton, unsupported_reasons
from .reference import gated_linear_attention_reference

__all__ = ["gated_linear_attention"]


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalizer: float | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor: ...


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalizer: float | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    implementation: dispatch.ImplementationName | None = None,
) -> tuple[Tensor, Tensor]: ...


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalizer: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixes tokens through a state of dk x dv numbers for each head, whose rows fade at rates that tokens choose.

    With the log decays a_t, for each head, from the first token to the last

        S_t = diag(exp(a_t)) S_(t-1) + k_t v_t^T        o_t = scale * q_t^T S_t

    as in "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635). With
    `reverse_decay` the tokens are walked from the last to the first as well, with these decays and a state of its own,
    and both outputs are added, as in "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention"
    (arXiv 2405.18425): a token sees all others once and itself twice. A decay is applied before its own token is
    added, in either direction.

    Decays, states and sums are float32, for float64 input float64. No decay is too strong: -inf forgets all. Autocast
    changes nothing here. Any strides will do, also of parts of one projection; nothing is copied for them.

    Args:
        q: Queries, (B, N, heads, dk).
        k: Keys, of the shape of `q`.
        v: Values, (B, N, heads, dv).
        decay: Log decays, at most 0, of the shape of `q`; with `normalizer` gate logits.
        reverse_decay: Those of the way back, of the shape of `q`, if both directions are wanted.
        scale: Factor of the output, dk^-0.5 unless given. For the mean of both directions pass half of it.
        reverse: Walk from the last token to the first only; equals flipped inputs and a flipped output.
        normalizer: If given, the decays hold gate logits x, and log decays are logsigmoid(x) / normalizer.
        initial_state: State before the first token walked, (B, heads, dk, dv); zero unless given. One direction only.
        return_state: Whether to return the state after the last token walked, too. One direction only.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The output, (B, N, heads, dv), contiguous, in the dtype of `q`; with `return_state` also the last state,
        (B, heads, dk, dv), in float32 or wider. Differentiable in every tensor given, through both.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape, device or option does not fit, or a forced implementation cannot run.
    """
    arguments = _prepare(
        q, k, v, decay, reverse_decay, scale=scale, reverse=reverse, normalizer=normalizer,
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    out, state = dispatch.call(_OPERATOR, implementation, q.device, arguments)
    return (out, state) if return_state else out


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalizer: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    tensors = {
        "q": q, "k": k, "v": v, "decay": decay, "reverse_decay": reverse_decay, "initial_state": initial_state,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_kind(name, tensor, q)
    if q.ndim != 4 or known(q.shape[2] == 0) or known(q.shape[3] == 0):
        raise ValueError(
            f"q must have the shape (B, N, heads, dk) with a head and a channel at least, got {tuple(q.shape)}"
        )
    batch, tokens, heads, dk = q.shape
    if v.ndim != 4 or _differs(v.shape[:3], (batch, tokens, heads)) or known(v.shape[3] == 0):
        raise ValueError(
            f"v must have the shape (B, N, heads, dv) = ({batch}, {tokens}, {heads}, dv) with a channel at least,"
            f" got {tuple(v.shape)}"
        )
    shapes = {name: ("(B, N, heads, dk)", tuple(q.shape)) for name in ("k", "decay", "reverse_decay")}
    shapes["initial_state"] = "(B, heads, dk, dv)", (batch, heads, dk, v.shape[3])
    for name, (legend, shape) in shapes.items():
        tensor = tensors[name]
        if tensor is not None and _differs(tensor.shape, shape):
            raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    _check_options(reverse_decay is not None, reverse, normalizer, initial_state is not None, return_state)
    return {
        **tensors, "scale": dk**-0.5 if scale is None else scale, "reverse": reverse, "normalizer": normalizer,
        "return_state": return_state,
    }  # fmt: skip


def _check_kind(name: str, tensor: Tensor, q: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def _check_options(both: bool, reverse: bool, normalizer: float | None, start: bool, end: bool) -> None:
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, or None for log decays, got {normalizer}")
    if both and reverse:
        raise ValueError("reverse=True walks back only, reverse_decay asks for both directions: give one of them")
    if both and (start or end):
        name = "initial_state" if start else "return_state"
        raise ValueError(f"{name} belongs to one direction: leave it out, or call without reverse_decay")


def _differs(found: torch.Size, expected: tuple[int, ...]) -> bool:
    return len(found) != len(expected) or any(known(a != b) for a, b in zip(found, expected, strict=True))


_OPERATOR = dispatch.Operator(
    name="gated_linear_attention",
    prepare=_prepare,
    reference=gated_linear_attention_reference,
    triton=gated_linear_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(gated_linear_attention, _OPERATOR)
