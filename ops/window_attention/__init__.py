"""Shifted-window attention: Swin's, with any map, window and shift, with dot products or cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import unsupported_reasons, window_attention_triton
from .reference import window_attention_reference

__all__ = ["window_attention"]


def window_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = (0, 0),
    scale: float | None = None,
    cosine_scale: Tensor | None = None,
    padding: Tensor | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Attention inside the windows of a map, whose grid may be shifted.

    The map is padded at the bottom and right to whole windows with `padding`, rolled by minus `shift` and cut into
    windows. In a window, softmax(logits) weighs the values, where logits = `scale` * q k^T (or `cosine_scale` *
    cos(q, k)) + `bias` + mask; the mask is -100 for two positions that only the roll made neighbours. The result is
    rolled back and cropped. Padded positions are keys like all others. The softmax is computed in float32, for float64
    input in float64.

    Args:
        qkv: Queries, keys and values as one projection leaves them, (B, H, W, 3, heads, d).
        bias: Added to the logits, (heads, N, N) by query and key, for the N = rows * columns positions of a
            window in row-major order.
        window: Side of the window, or (rows, columns).
        shift: How far the grid is moved down and right, or (rows, columns); 0 <= shift < window.
        scale: Factor of the dot products, d ** -0.5 unless given.
        cosine_scale: Factor of the cosines for each head, (heads,). Cosine attention then replaces the dot products;
            vectors are divided by max(their norm, 1e-12).
        padding: Query, key and value of the positions beyond H or W, (3, heads, d); zeros unless given.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The attended values, (B, H, W, heads, d), in the dtype of `qkv`. Differentiable in every tensor given.

    Raises:
        TypeError: `qkv` is not floating point.
        ValueError: A shape, window or shift breaks a rule above, both scales are given, or a forced implementation
            cannot run.
    """
    arguments = _prepare(qkv, bias, window=window, shift=shift, scale=scale, cosine_scale=cosine_scale, padding=padding)
    return dispatch.call(_OPERATOR, implementation, qkv.device, arguments)


def _prepare(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = (0, 0),
    scale: float | None = None,
    cosine_scale: Tensor | None = None,
    padding: Tensor | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    if not qkv.is_floating_point():
        raise TypeError(f"qkv must be floating point, got {qkv.dtype}")
    if qkv.ndim != 6 or known(qkv.shape[3] != 3):
        raise ValueError(f"qkv must have the shape (B, H, W, 3, heads, d), got {tuple(qkv.shape)}")
    if scale is not None and cosine_scale is not None:
        raise ValueError("scale is for dot products and cosine_scale for cosines: give one of them, got both")
    heads, d = qkv.shape[4:]
    rows, cols = _pair("window", window)
    pair = _pair("shift", shift)
    for axis, side, step in (("rows", rows, pair[0]), ("columns", cols, pair[1])):
        if known(side < 1):
            raise ValueError(f"window must be at least 1 a side, got {side} {axis}")
        if known(step < 0) or known(step >= side):
            raise ValueError(f"shift must satisfy 0 <= shift < window, got shift {step} for {side} {axis}")
    n = rows * cols
    _check_tensor("bias", bias, (heads, n, n), "(heads, N, N) with N positions in a window", qkv.device)
    _check_tensor("cosine_scale", cosine_scale, (heads,), "(heads,)", qkv.device)
    _check_tensor("padding", padding, (3, heads, d), "(3, heads, d)", qkv.device)
    return {
        "qkv": qkv,
        "bias": bias,
        "cosine_scale": cosine_scale,
        "padding": padding,
        "window": (rows, cols),
        "shift": pair,
        "scale": d**-0.5 if scale is None else scale,
    }


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one number or (rows, columns), got {value!r}")
    return value[0], value[1]


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], legend: str, device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.ndim != len(shape) or any(known(a != b) for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of qkv, {device}, got {tensor.device}")


_OPERATOR = dispatch.Operator(
    name="window_attention",
    prepare=_prepare,
    reference=window_attention_reference,
    triton=window_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(window_attention, _OPERATOR)
