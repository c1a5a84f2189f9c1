"""Linear attention: tokens of a head add to one matrix and read it, so that the cost grows with their number alone."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import linear_attention_triton, unsupported_reasons
from .reference import linear_attention_reference
from .rules import FlowConservation, KernelSum, MeanSubtraction, Rule

__all__ = ["FlowConservation", "KernelSum", "MeanSubtraction", "linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rule: Rule,
    *,
    temperature: Tensor | None = None,
    key_position: Tensor | None = None,
    local_kernels: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Lets every token attend to all others through a d x e matrix for each head, without a softmax over scores.

    Weights are the scores of queries and keys by a rule, `MeanSubtraction`, `KernelSum` or `FlowConservation`, whose
    docstrings have the formulas: nothing of size N x N is needed, since (q k^T) v = q (k^T v). Sums are float32, for
    float64 input float64, and are rounded once, at the end. Autocast changes nothing here.

    Args:
        q: Queries, (B, N, heads, d); with None for `k` and `v` all three as one projection leaves them,
            (B, N, 3, heads, d), and their gradient is one tensor, too. Views of a projection are read where they lie,
            but torch copies their gradients when it puts them together.
        k: Keys, of the shape of `q`.
        v: Values, (B, N, heads, e).
        rule: How scores become weights.
        temperature: Multiplies the output of each head, (heads,).
        key_position: Added to the keys of all images, before any feature map, (N, heads, d).
        local_kernels: Filters of each image for each channel of its values, (B, heads, e, 3, 3). The last H * W tokens
            are a map, whose cross-correlation with them, zeros around it, is added to the output of these tokens.
            Tokens before them, such as a class token, get none.
        grid: (H, W) of that map.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The output, (B, N, heads, e), contiguous and in the dtype of `q`. Differentiable in every tensor given.

    Raises:
        TypeError: A tensor is not floating point, or the rule is none.
        ValueError: A shape, device or grid does not fit, or a forced implementation cannot run.
    """
    arguments = _prepare(
        q, k, v, rule, temperature=temperature, key_position=key_position, local_kernels=local_kernels, grid=grid
    )
    return dispatch.call(_OPERATOR, implementation, q.device, arguments)


def _prepare(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rule: Rule,
    *,
    temperature: Tensor | None = None,
    key_position: Tensor | None = None,
    local_kernels: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Checks the public arguments. A symbolic size is refused only if surely wrong."""
    _check_rule(rule)
    tensors = {
        "q": q, "k": k, "v": v, "temperature": temperature, "key_position": key_position,
        "local_kernels": local_kernels,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_kind(name, tensor, q)
    B, N, heads, d, e = _check_sizes(q, k, v)
    shapes = {
        "k": ("of q, (B, N, heads, d)", (B, N, heads, d)),
        "v": ("(B, N, heads, e)", (B, N, heads, e)),
        "temperature": ("(heads,)", (heads,)),
        "key_position": ("(N, heads, d)", (N, heads, d)),
        "local_kernels": ("(B, heads, e, 3, 3)", (B, heads, e, 3, 3)),
    }
    for name, (legend, shape) in shapes.items():
        tensor = tensors[name]
        if tensor is not None and _differs(tensor.shape, shape):
            raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    _check_grid(N, local_kernels, grid)
    return {**tensors, "rule": rule, "grid": grid}


def _check_rule(rule: object) -> None:
    kinds = get_args(Rule)
    if not isinstance(rule, kinds):
        names = ", ".join(f"{kind.__name__}()" for kind in kinds)
        raise TypeError(f"rule must be one of {names}, got {rule!r}")


def _check_kind(name: str, tensor: Tensor, q: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def _check_sizes(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[int, int, int, int, int]:
    """B, N, heads, d and e."""
    if k is None or v is None:
        if k is not None or v is not None:
            raise ValueError(f"k and v come together, or both in q: {'k' if v is None else 'v'} is given alone")
        if q.ndim != 5 or known(q.shape[2] != 3) or known(q.shape[3] == 0) or known(q.shape[4] == 0):
            raise ValueError(
                "q without k and v must have the shape (B, N, 3, heads, d) with a head and a channel at least,"
                f" got {tuple(q.shape)}"
            )
        return q.shape[0], q.shape[1], q.shape[3], q.shape[4], q.shape[4]
    if q.ndim != 4 or known(q.shape[2] == 0) or known(q.shape[3] == 0):
        raise ValueError(
            f"q must have the shape (B, N, heads, d) with a head and a channel at least, got {tuple(q.shape)}"
        )
    if v.ndim != 4 or known(v.shape[3] == 0):
        raise ValueError(f"v must have the shape (B, N, heads, e) with a channel at least, got {tuple(v.shape)}")
    return *q.shape, v.shape[3]


def _check_grid(N: int, local_kernels: Tensor | None, grid: tuple[int, int] | None) -> None:
    if (local_kernels is None) != (grid is None):
        missing, given = ("grid", "local_kernels") if grid is None else ("local_kernels", "grid")
        raise ValueError(f"local_kernels and grid come together: {given} is given, {missing} is not")
    if grid is not None and (known(grid[0] < 1) or known(grid[1] < 1) or known(grid[0] * grid[1] > N)):
        raise ValueError(f"grid must be (H, W) with no more than the {N} tokens there are, got {tuple(grid)}")


def _differs(found: torch.Size, expected: tuple[int, ...]) -> bool:
    return len(found) != len(expected) or any(known(a != b) for a, b in zip(found, expected, strict=True))


_OPERATOR = dispatch.Operator(
    name="linear_attention",
    prepare=_prepare,
    reference=linear_attention_reference,
    triton=linear_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(linear_attention, _OPERATOR)
