"""Bi-level routing attention: each region of a map attends to the few regions that a table of routes names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vizoo.ops import dispatch
from vizoo.ops.tracing import known

from .function import routing_attention_triton, unsupported_reasons
from .reference import routing_attention_reference
from .routes import Pair, checked_query, checked_size, grid, region_affinity, region_routes

__all__ = ["region_affinity", "region_routes", "routing_attention"]


def routing_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    routes: Tensor,
    region_size: int | Pair,
    scale: float | None = None,
    route_weights: Tensor | None = None,
    implementation: dispatch.ImplementationName | None = None,
) -> Tensor:
    """Attention of each region of a map to the regions that are routed to it.

    The map is cut into regions from the top left, row after row. The queries of a region see all positions of its k
    routed regions, and no others: softmax(`scale` * q k^T) weighs their values. Regions at the right and at the bottom
    may reach beyond the map; positions there are keys with logit 0 and value 0. The softmax is computed in float32,
    for float64 input in float64. Autocast changes nothing here.

    Args:
        query: Queries, (B, H, W, heads, d); without `key` and `value` all three as one projection leaves them,
            (B, H, W, 3, heads, d), and their gradient is one tensor, too.
        key: Keys, (B, H, W, heads, d). The map of keys and values may be another than that of the queries, pooled for
            instance, if the same number of regions divides it.
        value: Values, (B, H, W, heads, e), on the map of the keys.
        routes: For each region of queries the regions of keys that it sees, (B, regions, k) or, for each head,
            (B, heads, regions, k), in int64; k different numbers below the number of regions each.
        region_size: Side of a region of queries in positions, or (rows, columns).
        scale: Factor of the dot products, d ** -0.5 unless given.
        route_weights: Factor of the keys and of the values of each route, of the shape of `routes`; 1 unless given.
        implementation: `"reference"` or `"triton"` to force one; it never falls back to the other.

    Returns:
        The attended values, (B, H, W, heads, e), in the dtype of `query`. Differentiable in every tensor given but
        `routes`.

    Raises:
        TypeError: `routes` is not int64, another tensor is not floating point, or those of the map differ in dtype.
        ValueError: A shape or device breaks a rule above, or a forced implementation cannot run.
    """
    arguments = _prepare(
        query, key, value, routes=routes, region_size=region_size, scale=scale, route_weights=route_weights
    )
    return dispatch.call(_OPERATOR, implementation, query.device, arguments)


def _prepare(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    routes: Tensor,
    region_size: int | Pair,
    scale: float | None = None,
    route_weights: Tensor | None = None,
) -> dict[str, Any]:
    """Checks the public arguments and writes out their defaults. A symbolic size is refused only if surely wrong."""
    if (key is None) != (value is None):
        raise ValueError(f"key and value go together: got {'value' if key is None else 'key'} alone")
    checked_query(query, packed=key is None)
    size = checked_size(region_size)
    down, across = grid(query.shape[1], query.shape[2], size)
    if key is not None and value is not None:
        _check_map("key", key, query, (query.shape[0], *key.shape[1:3], *query.shape[3:]))
        _check_map("value", value, query, (*key.shape[:4], *value.shape[4:]))
        _check_grid(query, key, (down, across))
    _check_routes(routes, query, down * across)
    if route_weights is not None:
        _check_weights(route_weights, routes)
    return {
        "query": query,
        "key": key,
        "value": value,
        "routes": routes,
        "route_weights": route_weights,
        "region_size": size,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
    }


def _check_map(name: str, tensor: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if tensor.ndim != 5 or _differs(tensor.shape, shape):
        legend = "(B, H, W, heads, d)" if name == "key" else "(B, H, W, heads, e) on the map of the keys"
        raise ValueError(f"{name} must have the shape {legend} = {shape}, got {tuple(tensor.shape)}")
    _check_device(name, tensor, query)


def _check_grid(query: Tensor, key: Tensor, regions: Pair) -> None:
    if not _differs(query.shape[1:3], key.shape[1:3]):
        return
    for axis, place in (("rows", 0), ("columns", 1)):
        size, count = key.shape[1 + place], regions[place]
        if known(size % count != 0) or known(size < count):
            raise ValueError(
                f"a map of keys must be that of the queries or divide into as many regions: got {size} {axis} for"
                f" {count} regions; the nearest are {max(1, size // count) * count} and {(size // count + 1) * count}"
            )


def _check_routes(routes: Tensor, query: Tensor, regions: int) -> None:
    if routes.dtype != torch.int64:
        raise TypeError(f"routes must be int64, got {routes.dtype}")
    B, heads = query.shape[0], query.shape[-2]
    shape = (B, regions) if routes.ndim == 3 else (B, heads, regions)
    if routes.ndim not in (3, 4) or _differs(routes.shape[:-1], shape) or known(routes.shape[-1] < 1):
        raise ValueError(
            f"routes must have the shape (B, regions, k) = ({B}, {regions}, k) or (B, heads, regions, k) ="
            f" ({B}, {heads}, {regions}, k) with k at least 1, got {tuple(routes.shape)}"
        )
    _check_device("routes", routes, query)


def _check_weights(weights: Tensor, routes: Tensor) -> None:
    if not weights.is_floating_point():
        raise TypeError(f"route_weights must be floating point, got {weights.dtype}")
    if weights.ndim != routes.ndim or _differs(weights.shape, routes.shape):
        raise ValueError(
            f"route_weights must have the shape of routes, {tuple(routes.shape)}, got {tuple(weights.shape)}"
        )
    _check_device("route_weights", weights, routes)


def _differs(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return any(known(a != b) for a, b in zip(shape, expected, strict=True))


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of query, {other.device}, got {tensor.device}")


_OPERATOR = dispatch.Operator(
    name="routing_attention",
    prepare=_prepare,
    reference=routing_attention_reference,
    triton=routing_attention_triton,
    unsupported=unsupported_reasons,
)
dispatch.register(routing_attention, _OPERATOR)
