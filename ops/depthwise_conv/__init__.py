"""Depthwise convolution of a map whose channels lie together."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from vizoo.ops import dispatch

from .function import depthwise_conv_triton, unsupported_reasons
from .reference import depthwise_conv_reference

__all__ = ["depthwise_conv"]

SIZES = (3, 5, 7)
Activation = Literal["silu"]


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = False,
    activation: Activation | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Convolves each channel of a map with a k x k filter of its own, zeros around the map, one output a pixel.

    Sums and activation are float32, for float64 input float64, and are rounded once, at the end. Autocast changes
    nothing here.

    Args:
        x: Map, (B, H, W, C).
        weight: Filters as `nn.Conv2d` with a group for each channel keeps them, (C, 1, k, k), k being 3, 5 or 7.
        bias: Added to each channel, (C,).
        residual: Add `x` to the output, as conditional position encodings do.
        activation: `"silu"`: give silu(s) of these sums s, not s. Nothing more is kept for the backward pass, which
            computes them again.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The convolved map, (B, H, W, C), in the dtype of `x`. Differentiable in every tensor given.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape or device does not fit, the activation is unknown, or a forced implementation cannot run.
    """
    arguments = _prepare(x, weight, bias, residual=residual, activation=activation)
    return dispatch.call(_OPERATOR, implementation, x.device, arguments)


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = False,
    activation: Activation | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have the shape (B, H, W, C) with a row, a column and a channel at least, got {tuple(x.shape)}"
        )
    channels = x.shape[-1]
    if weight.ndim != 4 or tuple(weight.shape[:2]) != (channels, 1):
        raise ValueError(f"weight must have the shape (C, 1, k, k) with C = {channels}, got {tuple(weight.shape)}")
    size = weight.shape[-1]
    if size not in SIZES or weight.shape[-2] != size:
        raise ValueError(f"filters must be 3 x 3, 5 x 5 or 7 x 7, got {weight.shape[-2]} x {size}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have the shape (C,) = ({channels},), got {tuple(bias.shape)}")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be 'silu', or None for none, got {activation!r}; nearest valid: 'silu'")
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, "activation": activation}


_OPERATOR = dispatch.Operator(
    name="depthwise_conv",
    prepare=_prepare,
    reference=depthwise_conv_reference,
    triton=depthwise_conv_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(depthwise_conv, _OPERATOR)
