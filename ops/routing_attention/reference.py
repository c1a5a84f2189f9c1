"""Routing attention in plain torch: the definition, and what runs on a CPU.

Letters: B images; R regions of a map, T positions of a region (of the keys' map it may be fewer); h heads of d
channels, of values e; k routes of a query region.

The keys of a query region are gathered, so there are k copies of keys and values for a moment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

from .routes import Pair, are_symbolic, grid, padded_to_regions, positions

MANY_KEYS = 512
"""From so many keys a query on, logits are kept out of memory on a CPU, too; for fewer that is the slower way."""


def routing_attention_reference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    *,
    region_size: Pair,
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.routing_attention` defines: gathers the routed regions and attends to them."""
    q, k, v = query.unbind(3) if key is None or value is None else (query, key, value)
    B, H, W, h, _ = q.shape
    down, across = grid(H, W, region_size)
    kept = key_region_size(q, k, region_size)
    with without_autocast(query.device):
        q, k, v = _regions(q, region_size), _regions(k, kept), _regions(v, kept)  # (B, h, R, T, d)
        k, v = _gather(k, routes, route_weights), _gather(v, routes, route_weights)  # (B, h, R, k * T, d)
        out = _attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), scale)  # (B, h * R, T, e)
    return _map(out.view(B, h, down * across, *out.shape[2:]), (H, W), region_size)


def key_region_size(query: Tensor, key: Tensor, region_size: Pair) -> Pair:
    """Rows and columns that a region has on the map of the keys, which is cut into as many as that of the queries."""
    (H, W), (below, beside) = query.shape[1:3], key.shape[1:3]
    if known(below == H) and known(beside == W):
        return region_size
    down, across = grid(H, W, region_size)
    return below // down, beside // across


def _regions(x: Tensor, region_size: Pair) -> Tensor:
    """Regions of a map, zeros where they reach beyond it: (B, H, W, h, d) -> (B, h, R, T, d)."""
    B, H, W, h, d = x.shape
    rows, cols = region_size
    down, across = grid(H, W, region_size)
    x = padded_to_regions(x, region_size)
    if are_symbolic(region_size):
        y, column = positions((down, across), region_size, x.device)
        return x[:, y, column].permute(0, 3, 1, 2, 4)
    x = x.view(B, down, rows, across, cols, h, d)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(B, h, down * across, rows * cols, d)


def _map(x: Tensor, size: Pair, region_size: Pair) -> Tensor:
    """The map of which these are the regions: (B, h, R, T, e) -> (B, H, W, h, e)."""
    B, h, _, _, e = x.shape
    (H, W), (rows, cols) = size, region_size
    down, across = grid(H, W, region_size)
    if are_symbolic(region_size):
        y, column = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
        found = x[:, :, y // rows * across + column // cols, y % rows * cols + column % cols]
        return found.permute(0, 2, 3, 1, 4)
    x = x.view(B, h, down, across, rows, cols, e).permute(0, 2, 4, 3, 5, 1, 6)
    return x.reshape(B, down * rows, across * cols, h, e)[:, :H, :W]


def _gather(x: Tensor, routes: Tensor, weights: Tensor | None) -> Tensor:
    """The routed regions, one after the other, times their weights: (B, h, R, T, d) -> (B, h, R, k * T, d)."""
    B, h, R, T, d = x.shape
    routes = _by_head(routes, h)
    first = torch.arange(B * h, device=x.device).view(B, h, 1, 1) * R
    taken = x.reshape(B * h * R, T, d).index_select(0, (first + routes).flatten()).view(*routes.shape, T, d)
    if weights is not None:
        taken = taken * _by_head(weights, h).to(x.dtype)[..., None, None]
    return taken.flatten(3, 4)


def _by_head(table: Tensor, h: int) -> Tensor:
    """Routes or their weights for each head: (B, R, k) or (B, h, R, k) -> (B, h, R, k)."""
    return table[:, None].expand(-1, h, -1, -1) if table.ndim == 3 else table


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and known(k.shape[2] < MANY_KEYS):
        return (q * scale @ k.mT).softmax(-1) @ v  # torch's fused attention is slower on little
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
