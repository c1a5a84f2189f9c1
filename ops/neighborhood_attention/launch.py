"""Allocates what the neighborhood attention kernels write and launches them. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import bound, launchable, recording, register_flops
from vizoo.ops.tracing import known

from . import kernels, tiles
from .function import FLOPS

register_flops(FLOPS)

LISTS_AHEAD = gpu.triton_version() > (3, 2)
"""Whether loops may fetch lists of matrices ahead: Triton 3.2 crashes compiling that for compute capability 9.0."""


@cache
def _misread() -> bool:
    """Whether torch's compilers take any assembly for something that may write every tensor, as those of 2.6 do."""
    from torch._higher_order_ops.triton_kernel_wrap import Op

    return "is_pure" not in Op.__dataclass_fields__


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        bias: Tensor | None,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        causal: Sequence[bool],
        scale: float,
    ) -> None:
        self.packed = key is None
        self.bias = None if bias is None else bias.float().contiguous()
        self.inputs = (*(None if x is None else x.contiguous() for x in (query, key, value)), self.bias)
        self.images, *space = query.shape[: -3 if self.packed else -2]
        # Kernels are compiled for these, so a tracer has to settle on them; the map may stay of any size.
        self.heads, self.d = map(int, query.shape[-2:])
        self.kernel, self.stride = _three(map(int, kernel_size)), _three(map(int, stride))
        self.causal = _three(map(int, causal), 0)
        self.space, self.dilation = _three(space), _three(dilation)
        self.sizes = _three(-(-L // d) for L, d in zip(self.space, self.dilation, strict=True))
        self.scale = scale
        self.dtype, self.itemsize, self.device = query.dtype, query.element_size(), query.device

    def tile(self, kind: tiles.Kind) -> tiles.Tile:
        return tiles.tiled(kind, self._fixed(), self.kernel, self.d, self.itemsize)

    def whole(self, kind: tiles.Kind) -> tiles.Tile | None:
        """How to launch a kernel whose blocks hold all keys; None where that cannot be."""
        plain = all(side == 1 for side in self.stride)  # a stride lets windows reach further
        return tiles.whole(kind, self._fixed(), self.kernel, self.d, self.itemsize) if plain else None

    def _fixed(self) -> tiles.Sides:
        return _three(size if type(size) is int else tiles.UNKNOWN for size in self.sizes)

    def tile_counts(self, tile: tiles.Tile) -> tuple[int, int, int]:
        """Tiles of all groups along each axis; those of a stack count as one."""
        sides = tile.tile[0], tile.tile[1] * tile.stack, tile.tile[2]
        each = zip(self.sizes, self.dilation, sides, strict=True)
        return _three(dilation * -(-size // side) for size, dilation, side in each)

    def numbers(self, counts: Sequence[int]) -> tuple[Any, ...]:
        """What kernels take as arguments of any value."""
        return self.scale, *self.space, *self.dilation, math.prod(counts), *counts[1:]

    def constants(self, tile: tiles.Tile) -> dict[str, Any]:
        """What kernels are compiled for."""
        (KZ, KY, KX), (SZ, SY, SX), (CAUSAL_Z, CAUSAL_Y, CAUSAL_X) = self.kernel, self.stride, self.causal
        (TZ, TY, TX), (CZ, CY, CX) = tile.tile, tile.block
        block = {"CZ": CZ, "CY": CY, "CX": CX} if tile.keys == 0 else {"KEYS": tile.keys}
        return {
            "HEADS": self.heads, "D": self.d, "BLOCK_D": tiles.power_of_two(self.d),
            "KZ": KZ, "KY": KY, "KX": KX,
            "SZ": SZ, "SY": SY, "SX": SX,
            "CAUSAL_Z": CAUSAL_Z, "CAUSAL_Y": CAUSAL_Y, "CAUSAL_X": CAUSAL_X,
            "PACKED": self.packed,
            "HAS_BIAS": self.bias is not None,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",  # halves have but one precision
            "ASSEMBLY": not gpu.interpreted() and not (recording() and _misread()),
            "TZ": TZ, "TY": TY, "TX": TX,
            **block,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of each query."""
    call = _Call(query, key, value, bias, kernel_size, dilation, stride, causal, scale)
    space = query.shape[1 : 1 + len(kernel_size)]
    out = query.new_empty((call.images, *space, call.heads, call.d))
    lse = query.new_empty((call.images, call.heads, *space), dtype=torch.float32)
    if out.numel():
        with gpu.on(query.device):
            whole = call.whole("forward")
            if whole is None:
                _for_tiles(call, "forward", kernels.forward, *call.inputs, out, lse)
            else:
                if whole.stack > 1 and not LISTS_AHEAD:
                    whole = replace(whole, stages=1)
                counts, grid = _shared(call, whole)
                _launch(
                    kernels.whole_forward, grid, whole, *call.inputs, out, lse, *call.numbers(counts), call.images,
                    MORE=whole.more, STACK=whole.stack, TURNS=whole.turns, DIVIDES=1e-6 < scale < 1e6,
                    **call.constants(whole),
                )  # fmt: skip
    return out, lse


def _for_tiles(call: _Call, kind: tiles.Kind, kernel: Any, *tensors: Tensor | None) -> None:
    """Launches a kernel whose programs have one tile of one image and head each."""
    tile = call.tile(kind)
    counts = call.tile_counts(tile)
    programs = call.images * call.heads * math.prod(counts)
    _launch(kernel, (programs,), tile, *tensors, *call.numbers(counts), **call.constants(tile))


def _launch(kernel: Any, grid: tuple[int, ...], tile: tiles.Tile, *arguments: Any, **constants: Any) -> None:
    launchable(kernel)[grid](*arguments, **constants, **bound(tile.registers))


def _shared(call: _Call, tile: tiles.Tile) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Tiles along each axis, and programs: tiles of all heads, and shares of the images."""
    counts = call.tile_counts(tile)
    programs = call.heads * math.prod(counts)
    places = gpu.multiprocessors(call.device) * tile.per_sm
    shares = -(-places // programs)
    if type(shares) is int and type(call.images) is int:
        # Those of a last row whose tiles are half as high and twice as wide: every other one has nothing to do.
        wide = call.dilation[2] * -(-call.sizes[2] // (2 * tile.tile[2]))
        idle = counts[0] * call.dilation[1] * (counts[2] - wide) if tile.turns else 0
        shares = tiles.shares(programs - call.heads * idle, call.images, places)
    return counts, (programs, shares)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and bias; None where there is no such input, or nobody asked."""
    call = _Call(query, key, value, bias, kernel_size, dilation, stride, causal, scale)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (None if x is None else x.new_empty(x.shape) for x in (key, value))
    grad_bias = bias.new_empty(bias.shape) if bias_gradient and bias is not None else None
    if not out.numel() and grad_bias is not None:
        grad_bias.zero_()
    if out.numel():
        grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
        with gpu.on(query.device):
            tensors = grad_out, *call.inputs, out, lse, delta, grad_query
            whole = call.whole("queries")
            summed = whole is not None and not known(call.images < tiles.FEWEST_IMAGES)
            if whole is None:
                _for_tiles(call, "queries", kernels.backward_queries, *tensors)
            else:
                _whole_queries(call, whole, tensors, grad_bias if summed else None)
            keys = (grad_query, None) if call.packed else (grad_key, grad_value)
            _for_tiles(call, "keys", kernels.backward_keys, grad_out, *call.inputs, lse, delta, *keys)
            if grad_bias is not None and not summed:
                _bias_gradient(call, grad_out, lse, delta, grad_bias)
    return grad_query, grad_key, grad_value, grad_bias


def _whole_queries(call: _Call, tile: tiles.Tile, tensors: tuple[Tensor | None, ...], grad_bias: Tensor | None) -> None:
    """The gradients of the queries, and of the bias from the same products: its shares are added up in one order."""
    counts, grid = _shared(call, tile)
    parts = None
    if grad_bias is not None:
        block = tile.keys, math.prod(tile.tile)
        parts = grad_bias.new_empty((grid[1], call.heads, math.prod(counts), *block), dtype=torch.float32)
    constants = call.constants(tile)
    _launch(
        kernels.whole_backward_queries, grid, tile, *tensors, parts, *call.numbers(counts), call.images,
        BIAS_GRADIENT=parts is not None, **constants,
    )  # fmt: skip
    if grad_bias is None or parts is None:
        return
    wanted = "KEYS", *(f"{name}{axis}" for name in ("K", "CAUSAL_", "T") for axis in "ZYX")
    entries = math.prod(2 * side - 1 for side in call.kernel)
    launchable(kernels.whole_fold_bias)[(entries, call.heads)](
        parts.sum(0), grad_bias, *call.numbers(counts)[1:], AT_ONCE=16, **{name: constants[name] for name in wanted}
    )


def _bias_gradient(call: _Call, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_bias: Tensor) -> None:
    """Sums over shares of all tiles and images, written side by side and added up in one order: no atomics."""
    tile = call.tile("bias")
    counts = call.tile_counts(tile)
    begin, blocks = zip(*(_reach(call, tile, axis) for axis in range(3)), strict=True)
    pairs = call.heads * math.prod(blocks)
    columns, rows = _shares(math.prod(counts), gpu.multiprocessors(grad_out.device) * tile.per_sm // pairs)
    block = math.prod(tile.tile), math.prod(tile.block)
    parts = lse.new_empty((columns * rows, call.heads, math.prod(blocks), *block))
    grid = {**_by_axis("FROM_", begin), "ROWS": blocks[1], "COLUMNS": blocks[2]}
    _launch(
        kernels.backward_bias, (pairs, columns * rows), tile,
        grad_out, *call.inputs, lse, delta, parts, *call.numbers(counts), call.images, columns,
        **grid, **call.constants(tile),
    )  # fmt: skip
    total = parts.sum(0)
    entries = math.prod(2 * side - 1 for side in call.kernel)
    launchable(kernels.fold_bias)[(entries, call.heads)](
        total, grad_bias, PLANES=blocks[0], **grid,
        **_by_axis("K", call.kernel), **_by_axis("T", tile.tile), **_by_axis("C", tile.block),
    )  # fmt: skip


def _shares(tiles: int, programs: int) -> tuple[int, int]:
    """Into how many shares tiles and images are dealt for about so many programs: tiles first, their images if few."""
    if type(tiles) is not int or tiles >= programs:
        return max(1, programs), 1
    return tiles, programs // tiles


def _reach(call: _Call, tile: tiles.Tile, axis: int) -> tuple[int, int]:
    """Where, relative to a tile, the first key stands that any tile sees, and the blocks from there to the last."""
    K, T, C, size = call.kernel[axis], tile.tile[axis], tile.block[axis], call.sizes[axis]
    low, high = 1 - K, T + K - 2
    if call.stride[axis] == 1 and not call.causal[axis]:
        high = max(T - 1 + (K - 1 - K // 2), K - 1)
        if type(size) is int and type(call.space[axis]) is int:
            # Windows start at most this far before a last tile; groups come in two sizes.
            last = min((n - 1) % T + 1 for n in (size, call.space[axis] // call.dilation[axis]))
            low = min(-(K // 2), last - K)
            if size <= T:
                low, high = 0, size - 1
    return low, -(-(high - low + 1) // C)


def _three(values: Any, rest: int = 1) -> tuple[Any, Any, Any]:
    """Values of 1 to 3 axes for (planes, rows, columns); the only axis is that of rows."""
    values = tuple(values)
    if len(values) == 1:
        return rest, values[0], rest
    return values if len(values) == 3 else (rest, *values)


def _by_axis(prefix: str, values: Sequence[int]) -> dict[str, int]:
    return {prefix + axis: value for axis, value in zip("ZYX", values, strict=True)}
