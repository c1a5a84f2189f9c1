"""A linear layer behind a GELU that keeps one hidden map for its backward pass, not two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vizoo.ops import dispatch

from .function import gelu_linear_triton, unsupported_reasons
from .reference import gelu_linear_reference

__all__ = ["gelu_linear"]


def gelu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """The second half of an MLP: `weight` @ gelu(x) + `bias`, with the exact (erf) GELU.

    The same arithmetic as `F.linear(F.gelu(x), weight, bias)`, under autocast too. What differs is memory: the GELU's
    output, as large as the widest map of a block, is computed again in the backward pass, in the kernel that reads its
    input anyway.

    Args:
        x: Input of the GELU, (..., C).
        weight: Weight of the linear layer, (D, C).
        bias: Its bias, (D,), or None.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        (..., D). Differentiable in every tensor given.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape or device does not fit, or a forced implementation cannot run.
    """
    return dispatch.call(_OPERATOR, implementation, x.device, _prepare(x, weight, bias))


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    """Checks the public arguments."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if x.ndim == 0:
        raise ValueError("x must have the shape (..., C), got a number without axes")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have the shape (D, C) with C = {x.shape[-1]}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape (D,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    return {"x": x, "weight": weight, "bias": bias}


_OPERATOR = dispatch.Operator(
    name="gelu_linear",
    prepare=_prepare,
    reference=gelu_linear_reference,
    triton=gelu_linear_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(gelu_linear, _OPERATOR)
