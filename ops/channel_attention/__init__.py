"""Channel attention: attention between the channels of a group, over all positions of an image (DaViT)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vizoo.ops import dispatch

from .function import channel_attention_triton, unsupported_reasons
from .reference import channel_attention_reference

__all__ = ["channel_attention"]


def channel_attention(
    qkv: Tensor, *, scale: float | None = None, implementation: dispatch.ImplementationName | None = None
) -> Tensor:
    """Attention between the channels of a group, each of which is one token seen over all positions of the image.

    In an image and group, A = softmax(`scale` * k^T v), a d x d matrix: the channels of k are its rows, those of v,
    over which the softmax runs, its columns. The output of a position is A q: channels of q play the part of the
    values. Logits are sums over positions; they and the softmax are float32, for float64 input float64, also under
    autocast.

    Args:
        qkv: Queries, keys and values as one projection leaves them, (B, N, 3, groups, d) for N positions.
        scale: Factor of the logits, d ** -0.5 unless given.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The mixed channels, (B, N, groups, d), in the dtype of `qkv`. Differentiable.

    Raises:
        TypeError: `qkv` is not floating point.
        ValueError: `qkv` has another shape, or a forced implementation cannot run.
    """
    return dispatch.call(_OPERATOR, implementation, qkv.device, _prepare(qkv, scale=scale))


def _prepare(qkv: Tensor, *, scale: float | None = None) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults."""
    if not qkv.is_floating_point():
        raise TypeError(f"qkv must be floating point, got {qkv.dtype}")
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(
            f"qkv must have the shape (B, N, 3, groups, d) with a group and a channel at least, got {tuple(qkv.shape)}"
        )
    return {"qkv": qkv, "scale": qkv.shape[-1] ** -0.5 if scale is None else scale}


_OPERATOR = dispatch.Operator(
    name="channel_attention",
    prepare=_prepare,
    reference=channel_attention_reference,
    triton=channel_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(channel_attention, _OPERATOR)
