"""Layer normalisation that reads one dtype and writes another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vizoo.ops import dispatch

from .function import layer_norm_triton, unsupported_reasons
from .reference import layer_norm_reference

__all__ = ["layer_norm"]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Normalises the channels of each position: (x - mean) / sqrt(variance + `eps`) * `weight` + `bias`.

    Mean and variance are those of the last axis, computed in float32, for float64 input in float64. A half precision
    `dtype` rounds once, at the end: what a linear layer under autocast would convert anyway is written ready for it.
    Autocast itself changes nothing here. Compilers get the reference, which they fuse with its neighbours.

    Args:
        x: Input, (..., C).
        weight: Factor of each channel, (C,).
        bias: Added to each channel, (C,).
        eps: Added to the variance.
        dtype: Of the output; that of `x` unless given.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The normalised tensor, (..., C). Differentiable in every tensor given.

    Raises:
        TypeError: `x` or `dtype` is not floating point.
        ValueError: A shape or device does not fit, or a forced implementation cannot run.
    """
    arguments = _prepare(x, weight, bias, eps=eps, dtype=dtype)
    return dispatch.call(_OPERATOR, implementation, x.device, arguments)


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if dtype is None:
        dtype = x.dtype
    elif not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if x.ndim == 0:
        raise ValueError("x must have the shape (..., C), got a number without axes")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have the shape (C,) = {tuple(x.shape[-1:])}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    return {"x": x, "weight": weight, "bias": bias, "eps": eps, "dtype": dtype}


_OPERATOR = dispatch.Operator(
    name="layer_norm",
    prepare=_prepare,
    reference=layer_norm_reference,
    triton=layer_norm_triton,
    unsupported=unsupported_reasons,
    compilers_fuse_reference=True,
)
dispatch.register(layer_norm, _OPERATOR)
