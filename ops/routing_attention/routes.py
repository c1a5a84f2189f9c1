"""Which regions of a map matter to which: the mean vectors of regions, their affinities, and the largest of these.

Letters: B images; R regions of a map, `down` rows of them and `across` in a row; h heads of d channels.

Routing decides by comparison, so rounding changes which regions are taken. Sums are float32, and their products
float64: the one precision that neither autocast nor a setting for float32 products lowers.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

Pair = tuple[int, int]


def region_affinity(
    query: Tensor,
    key: Tensor | None = None,
    *,
    region_size: int | Pair,
    scale: float = 1.0,
    per_head: bool = False,
) -> Tensor:
    """Products of the mean query of each region with the mean key of each.

    The map is cut into regions from the top left, row after row; those at the right and at the bottom may be cut short
    by its border, and then their means are over what they hold. Autocast changes nothing here.

    Args:
        query: Queries, (B, H, W, heads, d), or without `key` queries, keys and values as one projection leaves them,
            (B, H, W, 3, heads, d). A map of descriptors made otherwise goes with regions of one position.
        key: Keys, (B, H, W, heads, d).
        region_size: Side of a region in positions, or (rows, columns).
        scale: Factor of the products.
        per_head: Whether each head has affinities of its own; else all channels of all heads count together.

    Returns:
        By query region and key region, (B, regions, regions) or (B, heads, regions, regions), in float32, of float64
        input in float64. Differentiable in `query` and `key`.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape or a region size breaks a rule above.
    """
    q, k = _checked(query, key)
    size = checked_size(region_size)
    with without_autocast(query.device):
        if key is None:  # one reduction for both
            means = region_means(query[:, :, :, :2], size)  # (B, R, 2, h, d)
            q, k = means[:, :, 0], means[:, :, 1]
        else:
            q, k = region_means(q, size), region_means(k, size)
        q, k = (x.transpose(1, 2) if per_head else x.flatten(2) for x in (q, k))
        wide = q.dtype if q.device.type == "mps" else torch.float64  # Apple's GPUs have none, nor a lowered float32
        affinity = q.to(wide) @ k.to(wide).mT
        return (affinity if scale == 1.0 else scale * affinity).to(q.dtype)


def region_routes(
    query: Tensor,
    key: Tensor | None = None,
    *,
    region_size: int | Pair,
    topk: int,
    per_head: bool = False,
) -> Tensor:
    """Chooses, for each region of queries, the regions of keys with the largest affinity.

    A map that has fewer regions than `topk` has all of them taken: small images need no other model. No gradient flows
    through a choice; for weights that are to have one, take `region_affinity(...).topk(...)`.

    Args:
        query: Queries, (B, H, W, heads, d), or without `key` queries, keys and values as one projection leaves them,
            (B, H, W, 3, heads, d).
        key: Keys, (B, H, W, heads, d).
        region_size: Side of a region in positions, or (rows, columns).
        topk: Regions to choose.
        per_head: Whether each head chooses for itself; else all choose together.

    Returns:
        Numbers of regions in no certain order, (B, regions, k) or (B, heads, regions, k) in int64 with
        k = min(topk, regions). Regions are counted from the top left, row after row.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape, a region size or `topk` breaks a rule above.
    """
    if known(topk < 1):
        raise ValueError(f"topk must be at least 1, got {topk}")
    with torch.no_grad():
        affinity = region_affinity(query, key, region_size=region_size, per_head=per_head)
        return affinity.topk(_smaller(topk, affinity.shape[-1]), sorted=False).indices


def region_means(x: Tensor, region_size: Pair) -> Tensor:
    """Mean of each region, over what lies on the map: (B, H, W, ...) -> (B, regions, ...), in float32 at least."""
    B, H, W = x.shape[:3]
    rows, cols = region_size
    down, across = grid(H, W, region_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = padded_to_regions(x, region_size)
    if are_symbolic(region_size):
        y, column = positions((down, across), region_size, x.device)
        count = ((y < H) & (column < W)).sum(1)
        return whole[:, y, column].sum(2, dtype=wide) / count.to(wide).view(-1, *(1 for _ in x.shape[3:]))
    cut = whole.view(B, down, rows, across, cols, *x.shape[3:])
    if whole is x:
        return cut.mean((2, 4), dtype=wide).flatten(1, 2)
    count = _extent(H, rows, down, x)[:, None] * _extent(W, cols, across, x)
    return (cut.sum((2, 4), dtype=wide) / count.to(wide).view(down, across, *(1 for _ in x.shape[3:]))).flatten(1, 2)


def grid(H: int, W: int, region_size: Pair) -> Pair:
    """Regions of a map: how many down, and how many across."""
    # Of all ways to round up, the one that gives a plain number where so many regions of a symbolic size are the map.
    return -(-H // region_size[0]), -(-W // region_size[1])


def are_symbolic(region_size: Pair) -> bool:
    """Whether regions have a size that only a run of an exported program will know.

    A view that cuts such regions, or puts them together, would settle how that size compares with their number.
    """
    return any(isinstance(side, torch.SymInt) for side in region_size)


def positions(regions: Pair, region_size: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each position on the map, by region and by position in it, (R, T)."""
    (down, across), (rows, cols) = regions, region_size
    region = torch.arange(down * across, device=device)[:, None]
    inner = torch.arange(rows * cols, device=device)
    return region // across * rows + inner // cols, region % across * cols + inner % cols


def padded_to_regions(x: Tensor, region_size: Pair) -> Tensor:
    """The map with zeros at its bottom and right up to whole regions; itself if it is surely whole."""
    H, W = x.shape[1:3]
    down, across = grid(H, W, region_size)
    bottom, right = down * region_size[0] - H, across * region_size[1] - W
    if known(bottom == 0) and known(right == 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, right, 0, bottom))


def checked_size(region_size: int | Pair) -> Pair:
    """Rows and columns of a region."""
    if isinstance(region_size, (int, torch.SymInt)):
        region_size = region_size, region_size
    if len(region_size) != 2:
        raise ValueError(f"region_size must be one number or (rows, columns), got {region_size!r}")
    for axis, side in zip(("rows", "columns"), region_size, strict=True):
        if known(side < 1):
            raise ValueError(f"region_size must be at least 1 a side, got {side} {axis}")
    return region_size[0], region_size[1]


def checked_query(query: Tensor, packed: bool) -> None:
    """Refuses what is no map of queries, or of queries, keys and values together."""
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {query.dtype}")
    if packed and (query.ndim != 6 or known(query.shape[3] != 3)):
        raise ValueError(f"query without key must have the shape (B, H, W, 3, heads, d), got {tuple(query.shape)}")
    if not packed and query.ndim != 5:
        raise ValueError(f"query must have the shape (B, H, W, heads, d), got {tuple(query.shape)}")
    if any(known(size < 1) for size in query.shape[1:]):
        raise ValueError(f"query must have a row, a column, a head and a channel at least, got {tuple(query.shape)}")


def _checked(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    checked_query(query, packed=key is None)
    if key is None:
        return query[:, :, :, 0], query[:, :, :, 1]
    if not key.is_floating_point():
        raise TypeError(f"key must be floating point, got {key.dtype}")
    if key.ndim != 5 or any(known(a != b) for a, b in zip(key.shape, query.shape, strict=True)):
        raise ValueError(f"key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}")
    return query, key


def _extent(size: int, region: int, count: int, like: Tensor) -> Tensor:
    """How many positions of an axis each region holds."""
    start = torch.arange(count, device=like.device) * region
    return (size - start).clamp(max=region)


def _smaller(a: int, b: int) -> int:
    """`min` that decides nothing where sizes are symbolic."""
    # Dynamo makes a symbolic min of the plain one, and in older torch breaks the graph at the other.
    return min(a, b) if torch.compiler.is_dynamo_compiling() else cast(int, torch.sym_min(a, b))
