"""Neighborhood attention: each query attends to the nearest positions of its map, on 1 to 3 axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import neighborhood_attention_triton, unsupported_reasons
from .reference import is_concrete, neighborhood_attention_reference

__all__ = ["neighborhood_attention"]


def neighborhood_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Attention of each query to a window of positions around its own.

    Along an axis of dilation d, a query attends within its group, the positions that differ from its own by a multiple
    of d. With p its place in the group, it sees the `kernel_size` positions from p - kernel_size // 2 on; at the border
    the window is moved inward, never cut. With a stride s, the queries p // s * s up to + s - 1 share the window of the
    one s // 2 after the first. On a causal axis the window ends at the query itself and is cut where the group starts;
    with a stride it starts where that of the last query of the s starts. The window of a map is the product of those of
    its axes, and softmax(`scale` * q k^T + `bias`) over it weighs the values. The softmax is computed in float32, for
    float64 input in float64.

    Args:
        query: Queries, (B, *space, heads, d) for a space of 1 to 3 axes; without `key` and `value` all three as one
            projection leaves them, (B, *space, 3, heads, d).
        key: Keys, (B, *space, heads_kv, d), where heads_kv divides heads: head i takes keys and values of head
            i * heads_kv // heads.
        value: Values, (B, *space, heads_kv, d_v).
        kernel_size: Keys of a window, of all axes or for each.
        dilation: Distance of neighbours; kernel_size * dilation may not exceed the axis.
        stride: Queries that share a window; 1 <= stride <= kernel_size.
        causal: Whether a query sees only what comes before it and itself.
        bias: Added to the logits, (heads, 2 * kernel_size - 1 for each axis), by the offset of the key's place in its
            group from that of the query, plus kernel_size - 1.
        scale: Factor of the dot products, d ** -0.5 unless given.
        extra_key: Keys that all queries see besides, without a bias, (B, L, heads_kv, d).
        extra_value: Their values, (B, L, heads_kv, d_v).
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The attended values, (B, *space, heads, d_v), in the dtype of `query`. Differentiable in every tensor given.

    Raises:
        TypeError: `query` is not floating point.
        ValueError: A shape, kernel size, dilation or stride breaks a rule above, or a forced implementation cannot run.
    """
    arguments = _prepare(
        query, key, value, kernel_size=kernel_size, dilation=dilation, stride=stride, causal=causal,
        bias=bias, scale=scale, extra_key=extra_key, extra_value=extra_value,
    )  # fmt: skip
    return dispatch.call(_OPERATOR, implementation, query.device, arguments)


def _prepare(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    _check_pair("key", key, "value", value)
    _check_pair("extra_key", extra_key, "extra_value", extra_value)
    space, d = _check_query(query, key is None)
    sizes = _check_sizes(space, kernel_size, dilation, stride, causal)
    if key is not None and value is not None:
        _check_keys(query, key, value)
    if extra_key is not None and extra_value is not None:
        _check_extra(query, key, value, extra_key, extra_value)
    spans = tuple(2 * size - 1 for size in sizes["kernel_size"])
    _check("bias", bias, (query.shape[-2], *spans), "(heads, 2 * kernel_size - 1 for each axis)", query)
    return {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "extra_key": extra_key,
        "extra_value": extra_value,
        **sizes,
        "scale": d**-0.5 if scale is None else scale,
    }


def _check_pair(name: str, tensor: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (tensor is None) != (other is None):
        missing, given = (name, other_name) if tensor is None else (other_name, name)
        raise ValueError(f"{name} and {other_name} come together: {given} is given, {missing} is not")


def _check_query(query: Tensor, packed: bool) -> tuple[tuple[int, ...], int]:
    """The axes of the map, and the channels of a head."""
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {query.dtype}")
    shape = tuple(query.shape)
    space = shape[1 : -3 if packed else -2]
    if not 1 <= len(space) <= 3 or (packed and known(shape[-3] != 3)):
        legend = "(B, *space, 3, heads, d)" if packed else "(B, *space, heads, d)"
        without = " without key and value" if packed else ""
        raise ValueError(f"query{without} must have the shape {legend} with 1 to 3 axes of space, got {shape}")
    return space, shape[-1]


def _check_sizes(
    space: tuple[int, ...],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    causal: bool | Sequence[bool],
) -> dict[str, tuple[Any, ...]]:
    """What is given for all axes or for each, written out for each."""
    sizes = {
        name: _per_axis(name, given, len(space))
        for name, given in (
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("stride", stride),
            ("causal", causal),
        )
    }
    for axis, (L, K, d, s, _) in enumerate(zip(space, *sizes.values(), strict=True)):
        if is_concrete(L, K, d, s) and 1 <= s <= K <= K * d <= L:
            continue  # the short way: asking as tracing must takes longer than all else here
        if known(K < 1) or known(d < 1):
            raise ValueError(f"kernel_size and dilation must be at least 1, got {K} and {d} for axis {axis} of space")
        if known(s < 1) or known(s > K):
            raise ValueError(f"stride must satisfy 1 <= stride <= kernel_size, got {s} of {K} for axis {axis} of space")
        if known(K * d > L):
            raise ValueError(
                f"kernel_size * dilation may not exceed the map: {K} * {d} > {L} on axis {axis} of space; "
                f"{_nearest(L, K)}"
            )
    return sizes


def _nearest(L: int, K: int) -> str:
    """What an axis too short for its windows allows."""
    if L < K:
        return f"pad it to {K}, or take a kernel_size of at most {L}"
    return f"the largest dilation here is {L // K}"


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if isinstance(value, (int, torch.SymInt)):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name} must be one for all axes or one for each of {axes}, got {value!r}")
    return tuple(value)


def _check_keys(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Keys and values lie on the map of the queries; their heads divide those of the queries."""
    heads_kv = key.shape[-2] if key.ndim > 1 else 0
    around, legend = tuple(query.shape[:-2]), "of the queries with heads_kv heads"
    _check("key", key, (*around, heads_kv, query.shape[-1]), legend, query)
    _check("value", value, (*around, heads_kv, value.shape[-1]), legend, query)
    if known(heads_kv == 0) or known(query.shape[-2] % heads_kv != 0):
        heads = query.shape[-2]
        raise ValueError(f"heads of the queries must be a multiple of those of the keys, got {heads} and {heads_kv}")


def _check_extra(
    query: Tensor, key: Tensor | None, value: Tensor | None, extra_key: Tensor, extra_value: Tensor
) -> None:
    length = extra_key.shape[1] if extra_key.ndim > 1 else 0
    heads_kv = query.shape[-2] if key is None else key.shape[-2]
    d_v = query.shape[-1] if value is None else value.shape[-1]
    _check("extra_key", extra_key, (query.shape[0], length, heads_kv, query.shape[-1]), "(B, L, heads_kv, d)", query)
    _check("extra_value", extra_value, (query.shape[0], length, heads_kv, d_v), "(B, L, heads_kv, d_v)", query)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], legend: str, query: Tensor) -> None:
    if tensor is None:
        return
    if tensor.ndim != len(shape) or any(known(a != b) for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


_OPERATOR = dispatch.Operator(
    name="neighborhood_attention",
    prepare=_prepare,
    reference=neighborhood_attention_reference,
    triton=neighborhood_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(neighborhood_attention, _OPERATOR)
