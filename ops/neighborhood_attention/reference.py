"""Neighborhood attention in plain torch: the definition, and what runs on a CPU.

Letters: B images; an axis of L positions has windows of K keys, a dilation and a stride; h heads of d channels. Place i
of an axis belongs to group i mod dilation, where it has the place p = i // dilation. Queries of a group are taken in
blocks of T, n blocks along the axis; the windows of a block lie within S keys.

Blocks of queries against the keys that any of them sees, with the others masked, are matrix products: keys are copied
a few times instead of once for each query. All else is index arithmetic along single axes, so that it also traces with
symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known

BLOCK = {1: 32, 2: 8, 3: 4}
"""Queries of a block along each axis, by number of axes."""


class Axis(NamedTuple):
    """Tables of one axis.

    Attributes:
        queries: Position of each query of each block, (n, T); places beyond the end of a group repeat its last one.
        keys: Position of each key of each block, (n, S), likewise.
        visible: Whether a query sees a key, (n, T, S).
        offset: Index in the bias, group offset key minus query plus K - 1, (n, T, S).
        place: Where in the blocks, one after the other, a position is query, (L,).
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor
    offset: Tensor
    place: Tensor


def neighborhood_attention_reference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    *,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """Computes what `vizoo.ops.neighborhood_attention` defines."""
    if key is None or value is None:
        query, key, value = query.unbind(-3)
    h = query.shape[-2]
    # The meta device counts operations: query by query, they are those of the definition.
    block = 1 if query.device.type == "meta" else BLOCK[len(kernel_size)]
    axes = [
        (_cached_axis if is_concrete(*sizes) else _axis)(*sizes, block, query.device)
        for sizes in zip(query.shape[1:-2], kernel_size, dilation, stride, causal, strict=True)
    ]
    q = _blocks(query * scale, [axis.queries for axis in axes])
    k = _with_extra(_blocks(key, [axis.keys for axis in axes]), extra_key, h)
    v = _with_extra(_blocks(value, [axis.keys for axis in axes]), extra_value, h)
    added = _added(axes, bias, kernel_size, q.dtype)
    if extra_key is not None:
        added = F.pad(added, (0, extra_key.shape[1]))
    return _unblocked(_attend(q, k, v, added), axes)


def _attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """softmax(q k^T + added) v of all blocks, (B, h, n, T, d); `added` is (h or 1, n, T, S)."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        return (q @ k.transpose(-2, -1) + added).softmax(-1) @ v
    mask = added.expand(q.shape[1], *added.shape[1:]).flatten(0, 1)
    flat = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
    out = F.scaled_dot_product_attention(flat[0], flat[1], flat[2], attn_mask=mask, scale=1.0)
    return out.view(*q.shape[:-1], v.shape[-1])


def _added(axes: Sequence[Axis], bias: Tensor | None, kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The bias, and minus infinity for keys that a query does not see: (h or 1, n, T, S) over all axes."""
    visible = reduce(torch.logical_and, [_spread(axis.visible, i, len(axes)) for i, axis in enumerate(axes)])
    blocks = [math.prod(visible.shape[i : i + len(axes)]) for i in range(0, visible.ndim, len(axes))]
    visible = visible.reshape(1, *blocks)
    if bias is None:
        values = torch.zeros((), dtype=dtype, device=visible.device)
    else:
        index = _spread(axes[0].offset, 0, len(axes))
        for i, axis in enumerate(axes[1:], 1):
            index = index * (2 * kernel_size[i] - 1) + _spread(axis.offset, i, len(axes))
        values = bias.to(dtype).flatten(1).index_select(1, index.flatten()).view(bias.shape[0], *blocks)
    return torch.where(visible, values, float("-inf"))


def _spread(table: Tensor, axis: int, axes: int) -> Tensor:
    """Puts a table (n, T, S) of one axis among those of others: (n, n, ..., T, T, ..., S, S, ...)."""
    shape = [1] * (3 * axes)
    shape[axis], shape[axes + axis], shape[2 * axes + axis] = table.shape
    return table.view(shape)


def _blocks(x: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Gathers vectors (B, *space, h, d) by tables (n, T) of positions of each axis: (B, h, n, T, d) over all axes."""
    count = len(tables)
    for axis in range(count, 0, -1):
        table = tables[axis - 1].T  # the number of blocks comes last: tracing can split it off without a guard
        x = x.index_select(axis, table.flatten()).unflatten(axis, (table.shape[0], -1))
    x = x.permute(0, 2 * count + 1, *range(2, 2 * count + 1, 2), *range(1, 2 * count, 2), 2 * count + 2)
    return x.flatten(2 + count, 1 + 2 * count).flatten(2, 1 + count)


def _unblocked(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Puts blocks of queries (B, h, n, T, d) back to where they stand: (B, *space, h, d)."""
    B, h, d, count = x.shape[0], x.shape[1], x.shape[-1], len(axes)
    sizes = [axis.queries.shape for axis in axes]
    x = x.reshape(B, h, *(size[0] for size in sizes), *(size[1] for size in sizes), d)
    pairs = (place for axis in range(count) for place in (2 + axis, 2 + count + axis))
    x = x.permute(0, *pairs, 1, 2 * count + 2)
    for i, axis in enumerate(axes, 1):
        x = x.flatten(i, i + 1).index_select(i, axis.place)  # a reshape of all would guard symbolic sizes
    return x


def _with_extra(x: Tensor, extra: Tensor | None, h: int) -> Tensor:
    """Keys or values of blocks (B, h_kv, n, S, d), then those that all queries see (B, L, h_kv, d), for h heads."""
    if extra is not None:
        shared = extra.transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[2], -1, -1)
        x = torch.cat((x, shared.to(x.dtype)), 3)
    return x if known(x.shape[1] == h) else x.repeat_interleave(h // x.shape[1], 1)


def _axis(L: int, K: int, dilation: int, stride: int, causal: bool, block: int, device: torch.device) -> Axis:
    """Tables of an axis. With symbolic sizes blocks are not fitted to the groups, which would take a guard."""
    longest = _ceil(L, dilation)
    count = _ceil(longest, block)
    if is_concrete(L, K, dilation, stride):
        block = _ceil(longest, count)
        span = min(K + _ceil(block - 1, stride) * stride, longest)
    else:
        # One to spare: tracing guards a size that might be 1, and one that divides without a remainder.
        count = count + 1
        span = K + _ceil(block - 1, stride) * stride
    number = torch.arange(dilation * count, device=device)[:, None]
    group = number // count
    size = (L - group + dilation - 1) // dilation
    p = torch.minimum(number % count * block + torch.arange(block, device=device), size - 1)
    start, end = _window(p, size, K, stride, causal)
    j = start[:, :1] + torch.arange(span, device=device)
    seen = j[:, None]
    i = torch.arange(L, device=device)
    return Axis(
        queries=p * dilation + group,
        keys=torch.minimum(j, size - 1) * dilation + group,
        visible=(seen >= start[:, :, None]) & (seen < end[:, :, None]),
        offset=(seen - p[:, :, None] + (K - 1)).clamp(0, 2 * K - 2),
        place=i % dilation * (count * block) + i // dilation,
    )


def _window(p: Tensor, size: Tensor, K: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """First key of queries p of groups of so many positions, and the one after their last."""
    first = p // stride * stride
    if causal:
        return (torch.minimum(first + stride - 1, size - 1) - K + 1).clamp(min=0), p + 1
    leader = torch.minimum(first + stride // 2, size - 1)
    start = torch.minimum((leader - K // 2).clamp(min=0), size - K)
    return start, start + K


@lru_cache(maxsize=256)  # a model has a few for each stage; made anew they take a tenth of a small image's time
def _cached_axis(L: int, K: int, dilation: int, stride: int, causal: bool, block: int, device: torch.device) -> Axis:
    with torch.inference_mode(False):  # tensors made in inference mode could not serve a later training step
        return _axis(L, K, dilation, stride, causal, block, device)


def is_concrete(*sizes: int) -> bool:
    """Whether sizes are plain numbers outside of any trace."""
    return not torch.compiler.is_compiling() and all(type(size) in (int, bool) for size in sizes)


def _ceil(size: int, by: int) -> int:
    return (size + by - 1) // by
