"""Allocates what the routing attention kernels write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops
from vizoo.ops.tracing import known

from . import kernels, tiles
from .function import FLOPS
from .reference import key_region_size
from .routes import grid

register_flops(FLOPS)

SCANNED = 1024
"""Routes that are read at once when their table is inverted."""


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        routes: Tensor,
        weights: Tensor | None,
        region_size: Sequence[int],
        scale: float,
    ) -> None:
        self.packed = key is None or value is None
        self.q, self.pitch_q = _pitched(query)
        k, self.pitch_k = (None, self.pitch_q) if key is None else _pitched(key)
        v, self.pitch_v = (None, self.pitch_q) if value is None else _pitched(value)
        self.inputs = self.q, k, v
        self.routes, self.weights = routes.contiguous(), None if weights is None else weights.contiguous()
        # Kernels are compiled for these, so a tracer has to settle on them; the map may stay of any size.
        self.heads, self.d = map(int, query.shape[-2:])
        self.e = self.d if value is None else int(value.shape[-1])
        self.slots = int(routes.shape[-1])
        self.images, H, W = query.shape[:3]
        KH, KW = query.shape[1:3] if key is None else key.shape[1:3]
        rows, cols = region_size
        krows, kcols = key_region_size(query, query if key is None else key, (rows, cols))
        down, across = grid(H, W, (rows, cols))
        self.regions, self.region, self.key_region = down * across, rows * cols, krows * kcols
        self.sizes = scale, H, W, KH, KW, down, across, rows, cols, krows, kcols
        self.small = known(self.region <= tiles.SMALL_REGION) and known(self.key_region <= tiles.SMALL_REGION)
        self.numbers = max(self.d, self.e), query.element_size()

    @property
    def dense(self) -> bool:
        return self.weights is None and tiles.is_dense(
            self.regions, self.region, self.key_region, self.slots, *self.numbers
        )

    @property
    def in_one_step(self) -> bool:
        return tiles.in_one_step(self.slots * self.key_region, *self.numbers)

    def constants(self, tile: tiles.Tile) -> dict[str, Any]:
        region = map(int, self.sizes[-4:]) if self.small else (0, 0, 0, 0)
        return {
            "HEADS": self.heads,
            "D": self.d,
            "E": self.e,
            "BLOCK_D": tiles.power_of_two(self.d),
            "BLOCK_E": tiles.power_of_two(self.e),
            "PACKED": self.packed,
            "PITCH_Q": self.pitch_q,
            "PITCH_K": self.pitch_k,
            "PITCH_V": self.pitch_v,
            **dict(zip(("ROWS", "COLS", "KROWS", "KCOLS"), region, strict=True)),
            "SLOTS": self.slots,
            "PER_HEAD": self.routes.ndim == 4,
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",  # halves have but one precision
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }

    def routed_tile(self, backward: bool) -> tiles.Tile:
        length = int(self.region) if self.small else None
        keys = int(self.slots * self.key_region) if self.in_one_step else None
        return tiles.routed(length, keys, *self.numbers, backward=backward)


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of each query."""
    call = _Call(query, key, value, routes, route_weights, region_size, scale)
    images, H, W = query.shape[:3]
    out = query.new_empty((images, H, W, call.heads, call.e))
    lse = query.new_empty((images, call.heads, H, W), dtype=torch.float32)
    if out.numel():
        with gpu.on(query.device):
            (_dense_forward if call.dense else _routed_forward)(call, out, lse)
    return out, lse


def _dense_forward(call: _Call, out: Tensor, lse: Tensor) -> None:
    tile = tiles.dense(int(call.regions * call.key_region), call.numbers[0], backward=False)
    programs, queries = call.images * call.heads, call.sizes[1] * call.sizes[2]
    # As many programs share an image as give each multiprocessor two. A plain `min` would settle a free batch size.
    share = torch.sym_min(
        -(-queries // tile.queries), torch.sym_max(1, 2 * gpu.multiprocessors(out.device) // programs)
    )
    launchable(kernels.dense_forward)[(programs, share)](
        *call.inputs, call.routes, out, lse, *call.sizes,
        BLOCK_SLOTS=tiles.power_of_two(call.slots), **call.constants(tile),
    )  # fmt: skip


def _routed_forward(call: _Call, out: Tensor, lse: Tensor) -> None:
    tile = call.routed_tile(backward=False)
    programs = call.images * call.regions * call.heads * -(-call.region // tile.queries)
    launchable(kernels.routed_forward)[(programs,)](
        *call.inputs, call.routes, call.weights, out, lse, *call.sizes,
        WEIGHTED=call.weights is not None, **call.constants(tile),
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    routes: Tensor,
    route_weights: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    region_size: Sequence[int],
    scale: float,
    weights_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and route_weights; None where there is no such tensor, or not asked for."""
    call = _Call(query, key, value, routes, route_weights, region_size, scale)
    gradients = [None if tensor is None else tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    parts = None
    if grad_out.numel():
        grad_out = grad_out.contiguous()
        with gpu.on(query.device):
            if call.dense:
                _dense_backward(call, grad_out, lse, gradients)
            else:
                parts = _routed_backward(call, grad_out, out, lse, gradients, weights_gradient)
    grad_query, grad_key, grad_value = gradients
    assert grad_query is not None
    return grad_query, grad_key, grad_value, _weights_gradient(call, parts, route_weights if weights_gradient else None)


def _dense_backward(call: _Call, grad_out: Tensor, lse: Tensor, gradients: list[Tensor | None]) -> None:
    tile = tiles.dense(int(call.regions * call.key_region), call.numbers[0], backward=True)
    launchable(kernels.dense_backward)[(call.images * call.heads,)](
        grad_out, *call.inputs, call.routes, lse, *gradients, *call.sizes,
        BLOCK_SLOTS=tiles.power_of_two(call.slots), **call.constants(tile),
    )  # fmt: skip


def _routed_backward(
    call: _Call,
    grad_out: Tensor,
    out: Tensor | None,
    lse: Tensor,
    gradients: list[Tensor | None],
    weights_gradient: bool,
) -> Tensor | None:
    """Programs' parts of the gradient of the route weights, (B, regions, heads, tiles, k), where asked for."""
    tile, delta, parts = call.routed_tile(backward=True), torch.empty_like(lse), None
    blocks, weighted = -(-call.region // tile.queries), call.weights is not None
    if weights_gradient:
        shape = call.images, call.regions, call.heads, blocks, call.slots
        parts = call.q.new_empty(shape, dtype=torch.float32)
    launchable(kernels.routed_backward_queries)[(call.images * call.regions * call.heads * blocks,)](
        grad_out, *call.inputs, call.routes, call.weights, out, lse, delta, gradients[0], parts, *call.sizes,
        WEIGHTED=weighted, WHOLE=out is None, BLOCK_SLOTS=tiles.power_of_two(call.slots),
        WEIGHTS_GRADIENT=weights_gradient, **call.constants(tile),
    )  # fmt: skip
    starts, sources = _inverted(call)
    tile = tiles.routed_keys(int(call.key_region) if call.small else None, *call.numbers)
    blocks = -(-call.key_region // tile.keys)
    grad_key, grad_value = (gradients[0], None) if call.packed else gradients[1:]
    launchable(kernels.routed_backward_keys)[(call.images * call.regions * call.heads * blocks,)](
        grad_out, *call.inputs, starts, sources, call.weights, lse, delta, grad_key, grad_value, *call.sizes,
        WEIGHTED=weighted, **call.constants(tile),
    )  # fmt: skip
    return parts


def _inverted(call: _Call) -> tuple[Tensor, Tensor]:
    """For each region of keys, the numbers of the routes that lead to it: where they begin, and all of them."""
    tables = call.routes.shape[:-2]
    starts = call.routes.new_empty((*tables, call.regions + 1), dtype=torch.int32)
    sources = call.routes.new_empty((*tables, call.regions * call.slots), dtype=torch.int32)
    launchable(kernels.invert_routes)[(tables.numel() * call.regions,)](
        call.routes, starts, sources, call.regions, SLOTS=call.slots, BLOCK=SCANNED, num_warps=4
    )
    return starts, sources


def _weights_gradient(call: _Call, parts: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Sum of the parts in the shape of the weights. Torch adds them up: one order, no atomics."""
    if weights is None:
        return None
    if parts is None:
        return torch.zeros_like(weights)
    total = parts.sum(3).transpose(1, 2) if weights.ndim == 4 else parts.sum((2, 3))
    return total.to(weights.dtype).contiguous()


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """The map, and how far apart its positions lie in memory; a copy unless they lie evenly and the heads together.

    Offsets in an image have 32 bits.
    """
    if x.ndim == 5:
        images, H, W, heads, d = x.shape
        pitch = x.stride(2)
        even = (
            known(x.stride(4) == 1)
            and (known(heads == 1) or known(x.stride(3) == d))
            and (known(H == 1) or known(x.stride(1) == W * pitch))
            and (known(images == 1) or known(x.stride(0) == H * W * pitch))
        )
        if even and not known(W == 1) and not known(H * W * pitch >= 2**31):
            return x, int(pitch)
    x = x.contiguous()
    return x, int(x.shape[3:].numel())
