"""Allocates what the selective scan's kernels write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import bound, launchable, register_flops
from vizoo.ops.tracing import known

from . import kernels, tiles
from .function import FLOPS, empty_like, empty_map_like
from .tiles import Tile

register_flops(FLOPS)

MAX_STRIDE = 2**20
"""Between neighbouring tokens: offsets within a tile have 32 bits."""


@dataclass(frozen=True)
class Grid:
    """How a scan is cut for programs, and what all kernels are told of its sizes.

    Attributes:
        batch: Sequences.
        length: Tokens of each.
        tiles: Tiles of each.
        tiles_each: Tiles of a split.
        splits: Splits of a sequence.
        each: Channels of a group.
        constants: What all kernels are compiled for.
    """

    batch: int
    length: int
    tiles: int
    tiles_each: int
    splits: int
    each: int
    constants: dict[str, Any]

    def blocks(self, tile: Tile) -> int:
        """Blocks of channels of a group."""
        return -(-self.each // tile.channels)

    def programs(self, tile: Tile) -> tuple[int]:
        """As many as there are splits of blocks of channels."""
        return (self.batch * self.splits * self.constants["GROUPS"] * self.blocks(tile),)

    def launch(self, kernel: Any, tile: Tile, *arguments: Any, **constants: Any) -> None:
        """Runs a kernel in one stage, for what compilers would load ahead of products is nothing here."""
        launchable(kernel)[self.programs(tile)](
            *arguments, **self.constants, **constants, BLOCKS=self.blocks(tile), BLOCK_C=tile.channels,
            num_warps=tile.warps, num_stages=1, **bound(tile.registers),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What kernels take for `L, tiles, tiles_each, splits`."""
        return self.length, self.tiles, self.tiles_each, self.splits


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    reverse: bool,
    return_state: bool,
    keep: bool,
    tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output; last state, empty unless asked for; states at the starts of tiles, empty unless they are to be kept."""
    u, delta, z = _near(u), _near(delta), None if z is None else _near(z)
    out = empty_like(u, dtype)
    batch, channels, length = u.shape
    states = int(A.shape[1])
    last = u.new_empty((batch, states, channels) if return_state else (0, 0, 0), dtype=torch.float32)
    in_rows = tiles.in_rows(states, known(u.stride(2) == 1), length)
    row = tiles.row(length) if in_rows else tokens
    tile = tiles.rows(int(channels) // int(B.shape[1]), row) if in_rows else tiles.forward(states)
    grid = _grid(tile, row // tokens, u, B, tokens, softplus, reverse, (u, delta, z, out))
    kept = u.new_empty((batch, grid.tiles, states, channels) if keep else 0, dtype=torch.float32)
    A, D, bias, start = A.t().contiguous(), _contiguous(D), _contiguous(bias), _row(initial_state)
    if not out.numel():
        return out, last.transpose(1, 2), kept
    with gpu.on(u.device):
        B, C = _maps(B, C, tokens)
        if grid.splits > 1:
            start = _split_starts(grid, start, A, (u, delta, B, None, bias), backward=False)
        inputs = (u, delta, A, B, C, D, z, bias, start, out, last if return_state else None)
        sizes = (*grid.sizes, *_strides(u, delta, z, out), B.shape[3])
        if in_rows:
            rows = _log2(row // tokens)
            grid.launch(kernels.forward_rows, tile, *inputs, kept if keep else None, *sizes, LOG_ROWS=rows)
        else:
            waiting = kept if keep or tile.unroll >= states else kept.new_empty((batch, grid.splits, states, channels))
            grid.launch(kernels.forward, tile, *inputs, waiting, *sizes, N=states, BLOCK_N=tile.unroll, KEEP=keep)
    return out, last.transpose(1, 2), kept


def backward(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial_state: Tensor | None,
    kept: Tensor,
    softplus: bool,
    reverse: bool,
    tokens: int,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors from `u` to `initial_state`; empty for those that are None.

    Programs write their sums side by side, and torch adds them up: one order, no atomics.
    """
    grad_out = torch.zeros_like(u) if grad_out is None else _near(grad_out)
    u, delta, z = _near(u), _near(delta), None if z is None else _near(z)
    grad_u, grad_delta = empty_like(u), empty_like(u, delta.dtype)
    grad_z = None if z is None else empty_like(u, z.dtype)
    states = int(A.shape[1])
    tile = tiles.backward(states)
    grid = _grid(tile, 1, u, B, tokens, softplus, reverse, (u, delta, z, grad_out, grad_u))
    parts = _Parts(u, A, B, grid, tile, D is not None, bias is not None, initial_state is not None)
    if u.numel():
        rates, skip, shift, flows = A.t().contiguous(), _contiguous(D), _contiguous(bias), _row(grad_last)
        half = all(tensor.dtype == torch.bfloat16 for tensor in (u, B, C))
        with gpu.on(u.device):
            laid_B, laid_C = _maps(B, C, tokens)
            if grid.splits > 1:
                flows = _split_starts(grid, flows, rates, (grad_out, delta, laid_C, z, shift), backward=True)
            grid.launch(
                kernels.backward, tile,
                grad_out, u, delta, rates, laid_B, laid_C, skip, z, shift, kept, flows, torch.empty_like(parts.A),
                grad_u, grad_delta, grad_z, parts.B, parts.C, parts.A, parts.D, parts.bias, parts.start,
                *grid.sizes, *_strides(grad_out, u, delta, z, grad_u), laid_B.shape[3], *parts.B.stride(),
                N=states, UNROLL=tile.unroll, BLOCK_N=max(16, 1 << (states - 1).bit_length()),
                PRECISION="tf32" if half else gpu.exact_products(),
            )  # fmt: skip
    return (
        grad_u, grad_delta, parts.A.sum((0, 1)).t().contiguous().to(A.dtype),
        _map_total(parts.B).to(B.dtype), _map_total(parts.C).to(C.dtype), _total(parts.D, D, u),
        u.new_empty(0) if grad_z is None else grad_z, _total(parts.bias, bias, u),
        u.new_empty(0) if parts.start is None or initial_state is None
        else parts.start.transpose(1, 2).to(initial_state.dtype),
    )  # fmt: skip


class _Parts:
    """Memory for sums of programs, whose totals are the gradients of what several programs read."""

    def __init__(
        self, u: Tensor, A: Tensor, B: Tensor, grid: Grid, tile: Tile, D: bool, bias: bool, start: bool
    ) -> None:
        batch, channels, _ = u.shape
        states = A.shape[1]
        # One memory order for both, so that programs have to know of one.
        self.B, self.C = (empty_map_like(B, grid.blocks(tile)) for _ in range(2))
        self.A = A.new_empty((batch, grid.splits, states, channels), dtype=torch.float32)
        self.D, self.bias = (
            A.new_empty((batch, grid.splits, channels), dtype=torch.float32) if there else None for there in (D, bias)
        )
        self.start = A.new_empty((batch, states, channels), dtype=torch.float32) if start else None


def _total(parts: Tensor | None, parameter: Tensor | None, u: Tensor) -> Tensor:
    """Gradient of a parameter of each channel; empty if there is none."""
    if parts is None or parameter is None:
        return u.new_empty(0)
    return parts.sum((0, 1)).to(parameter.dtype)


def _map_total(parts: Tensor) -> Tensor:
    """Gradient of a map, (B, G, N, L), laid out as its parts are."""
    if known(parts.stride(4) == 1):
        return parts.sum(0)
    return parts.permute(0, 1, 4, 2, 3).sum(0).permute(0, 2, 3, 1)


def _grid(
    tile: Tile, row: int, u: Tensor, B: Tensor, tokens: int, softplus: bool, reverse: bool,
    sequences: Sequence[Tensor | None],
) -> Grid:  # fmt: skip
    """Splits have whole rows of so many tiles."""
    batch, channels, length = u.shape
    groups = int(B.shape[1])  # kernels are compiled for the number: a tracer has to settle on it
    each = int(channels) // groups
    count = -(-length // tokens)
    splits = 1
    if isinstance(batch, int) and isinstance(length, int) and batch:
        programs = batch * groups * -(-each // tile.channels)
        splits = tiles.splits(tile, programs, count, gpu.multiprocessors(u.device))
    tiles_each = -(-count // (splits * row)) * row
    constants = {
        "GROUPS": groups, "EACH": each, "LOG_T": _log2(tokens), "ALIGN": _alignment(sequences),
        "SOFTPLUS": softplus, "REVERSE": reverse,
    }  # fmt: skip
    return Grid(batch, length, count, tiles_each, -(-count // tiles_each), each, constants)


def _log2(size: int) -> int:
    return size.bit_length() - 1


def _split_starts(
    grid: Grid,
    start: Tensor | None,
    A: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    backward: bool,
) -> Tensor:
    """What flows into each split, (batch, splits, N, channels): a pass over all of them, and one over their sums."""
    x, delta, M, z, bias = tensors
    states, channels = (int(size) for size in A.shape)
    tile = tiles.ends(states)
    ends = x.new_empty((grid.batch, grid.splits, states, channels), dtype=torch.float32)
    sums = x.new_empty((grid.batch, grid.splits, channels), dtype=torch.float32)
    grid.launch(
        kernels.split_ends, tile, x, delta, A, M, z, bias, ends, sums, *grid.sizes, *_strides(x, delta, z), M.shape[3],
        N=states, BLOCK_N=tile.unroll, BACKWARD=backward,
    )  # fmt: skip
    starts, block = torch.empty_like(ends), 32
    launchable(kernels.split_starts)[(grid.batch * -(-channels // block) * states,)](
        ends, sums, A, start, starts, grid.splits,
        CHANNELS=channels, N=states, LOG_T=6, BLOCK_C=block, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return starts


def _near(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in one piece where its numbers lie further apart than offsets reach."""
    return tensor if all(not known(stride > MAX_STRIDE) for stride in tensor.stride()[-1:]) else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride())]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _row(state: Tensor | None) -> Tensor | None:
    """A state (B, D, N) as kernels keep it, (B, N, D) in float32."""
    return None if state is None else state.transpose(1, 2).to(torch.float32).contiguous()


def _maps(B: Tensor, C: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """B and C with tokens together, in whole tiles, zero beyond the sequence; themselves if they are so."""
    batch, groups, states, length = B.shape
    if known(length % tokens == 0) and B.is_contiguous() and C.is_contiguous():
        return B, C
    padded, block = -(-length // tokens) * tokens, 64
    laid_B, laid_C = (m.new_empty((batch, groups, states, padded)) for m in (B, C))
    launchable(kernels.lay_out)[(batch * groups * -(-padded // block),)](
        B, C, laid_B, laid_C, length, padded, *B.stride(), *C.stride(),
        GROUPS=int(groups), N=int(states), T=block, BLOCK_N=1 << (int(states) - 1).bit_length(), num_warps=4,
    )  # fmt: skip
    return laid_B, laid_C


def _alignment(sequences: Sequence[Tensor | None]) -> int:
    """A power of two that divides all distances between rows of tokens, where tokens lie together; else 1.

    Compilers find out about 16 by themselves.
    """
    tensors = [tensor for tensor in sequences if tensor is not None]
    if not all(known(tensor.stride(-1) == 1) for tensor in tensors):
        return 1
    numbers = [tensors[0].shape[-1], *(stride for tensor in tensors for stride in tensor.stride()[:-1])]
    for align in (8, 4, 2):
        if all(known(number % align == 0) for number in numbers):
            return align
    return 1
