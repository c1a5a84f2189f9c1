"""Allocates what the window attention kernels write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops

from . import kernels, tiles
from .function import FLOPS

register_flops(FLOPS)


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        cosine_scale: Tensor | None,
        padding: Tensor | None,
        window: Sequence[int],
        shift: Sequence[int],
        scale: float,
    ) -> None:
        self.qkv, self.bias = qkv.contiguous(), _packed(bias)
        self.cosine_scale, self.padding = _packed(cosine_scale), _packed(padding)
        self.inputs = self.qkv, self.bias, self.cosine_scale, self.padding
        # Kernels are compiled for these, so a tracer has to settle on them; the map may stay of any size.
        self.window, self.shift = tuple(map(int, window)), tuple(map(int, shift))
        self.images, H, W, _, *sizes = qkv.shape
        self.heads, self.d = map(int, sizes)
        self.itemsize = qkv.element_size()
        self.down, self.across = -(-H // self.window[0]), -(-W // self.window[1])
        self.windows = self.images * self.down * self.across
        self.positions = self.window[0] * self.window[1]
        self.padded = self.down * self.window[0] > H or self.across * self.window[1] > W
        self.is_whole = tiles.is_whole(self.positions, self.d, self.itemsize)
        self.sizes = scale, H, W, self.down, self.across

    def constants(self, tile: tiles.Tile) -> dict[str, Any]:
        return {
            "HEADS": self.heads,
            "D": self.d,
            "BLOCK_D": tiles.power_of_two(self.d),
            "WH": self.window[0],
            "WW": self.window[1],
            "SH": self.shift[0],
            "SW": self.shift[1],
            "COSINE": self.cosine_scale is not None,
            "PADDED": self.padded and self.padding is not None,
            "PRECISION": "tf32x3" if self.qkv.dtype == torch.float32 else "tf32",  # halves have but one precision
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Output, and for large windows the log-sum-exp of each query."""
    call = _Call(qkv, bias, cosine_scale, padding, window, shift, scale)
    images, H, W, _, heads, d = qkv.shape
    out = qkv.new_empty((images, H, W, heads, d))
    lse = None if call.is_whole else qkv.new_empty((images, heads, H, W), dtype=torch.float32)
    if out.numel():
        with gpu.on(qkv.device):
            if lse is None:
                _whole_forward(call, out)
            else:
                _tiled_forward(call, out, lse)
    return out, lse


def _whole_forward(call: _Call, out: Tensor) -> None:
    tile = tiles.whole(call.positions, call.d, call.itemsize, backward=False)
    rounds = _rounds(call, tile, parts=False)
    launchable(kernels.whole_forward)[(call.heads, _class_programs(call, rounds))](
        *call.inputs, out, *call.sizes, call.images, rounds,
        BLOCK=tile.queries, HAS_BIAS=call.bias is not None, **call.constants(tile),
    )  # fmt: skip


def _tiled_forward(call: _Call, out: Tensor, lse: Tensor) -> None:
    tile = tiles.tiled(call.d, call.itemsize)
    launchable(kernels.tiled_forward)[(call.windows * call.heads, -(-call.positions // tile.queries))](
        *call.inputs, out, lse, *call.sizes,
        BLOCK_M=tile.queries, BLOCK_N=tile.keys, HAS_BIAS=call.bias is not None, **call.constants(tile),
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cosine_scale: Tensor | None,
    padding: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    bias_gradient: bool,
    padding_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of qkv, bias, cosine_scale and padding; None where not asked for.

    Programs write their sums of what all windows share side by side, and torch adds them up: one order, no atomics.
    """
    call = _Call(qkv, bias, cosine_scale, padding, window, shift, scale)
    grad_qkv = torch.empty_like(call.qkv)
    bias_parts = cosine_parts = padding_parts = None
    if qkv.numel():
        grad_out = grad_out.contiguous()
        padding_gradient_parts = padding_gradient and call.padded
        with gpu.on(qkv.device):
            if out is None or lse is None:
                parts = _whole_backward(call, grad_out, grad_qkv, bias_gradient, padding_gradient_parts)
            else:
                parts = _tiled_backward(call, grad_out, out, lse, grad_qkv, bias_gradient, padding_gradient_parts)
        bias_parts, cosine_parts, padding_parts = parts
    return (
        grad_qkv,
        _total(bias_parts, bias if bias_gradient else None),
        _total(cosine_parts, cosine_scale),
        _total(padding_parts, padding if padding_gradient else None),
    )


Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def _whole_backward(
    call: _Call, grad_out: Tensor, grad_qkv: Tensor, bias_gradient: bool, padding_gradient: bool
) -> Parts:
    tile = tiles.whole(call.positions, call.d, call.itemsize, backward=True)
    rounds = _rounds(call, tile, parts=bias_gradient)
    programs = _class_programs(call, rounds)
    bias_parts, cosine_parts, padding_parts = _parts(call, programs, programs, bias_gradient, padding_gradient)
    launchable(kernels.whole_backward)[(call.heads, programs)](
        grad_out, *call.inputs, grad_qkv, bias_parts, cosine_parts, padding_parts,
        *call.sizes, call.images, rounds,
        BLOCK=tile.queries, HAS_BIAS=call.bias is not None, BIAS_GRADIENT=bias_gradient,
        PADDING_GRADIENT=padding_gradient, **call.constants(tile),
    )  # fmt: skip
    return bias_parts, cosine_parts, padding_parts


def _tiled_backward(
    call: _Call,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
    bias_gradient: bool,
    padding_gradient: bool,
) -> Parts:
    tile = tiles.tiled(call.d, call.itemsize)
    across_queries, across_keys = -(-call.positions // tile.queries), -(-call.positions // tile.keys)
    heads, programs = call.heads, -(-call.windows // _rounds(call, tile, parts=True))
    bias_parts, cosine_parts, _ = _parts(call, programs, call.windows * across_queries, bias_gradient, False)
    _, _, padding_parts = _parts(call, 0, call.windows * across_keys, False, padding_gradient)
    delta = torch.empty_like(lse)
    constants = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, **call.constants(tile)}
    has_bias = call.bias is not None
    launchable(kernels.tiled_backward_queries)[(call.windows * heads, across_queries)](
        grad_out, *call.inputs, out, lse, delta, grad_qkv, cosine_parts, *call.sizes,
        HAS_BIAS=has_bias, **constants,
    )  # fmt: skip
    launchable(kernels.tiled_backward_keys)[(call.windows * heads, across_keys)](
        grad_out, *call.inputs, lse, delta, grad_qkv, padding_parts, *call.sizes,
        HAS_BIAS=has_bias, PADDING_GRADIENT=padding_gradient, **constants,
    )  # fmt: skip
    if bias_gradient:
        launchable(kernels.tiled_backward_bias)[(heads * across_queries * across_keys, programs)](
            grad_out, *call.inputs, lse, delta, bias_parts, *call.sizes, call.windows, **constants
        )
    return bias_parts, cosine_parts, padding_parts


def _parts(call: _Call, bias: int, rest: int, bias_gradient: bool, padding_gradient: bool) -> Parts:
    """Room for so many parts of the gradient of the bias, and of the gradients of the cosine scale and padding."""
    heads, d = call.heads, call.d

    def empty(*shape: int) -> Tensor:
        return call.qkv.new_empty(shape, dtype=torch.float32)

    return (
        empty(bias, heads, call.positions, call.positions) if bias_gradient else None,
        None if call.cosine_scale is None else empty(rest, heads),
        empty(rest, 2, heads, d) if padding_gradient else None,
    )


def _total(parts: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Sum of the parts in the shape of the tensor they are the gradient of; keys and values come after queries."""
    if like is None:
        return None
    if parts is None:
        return torch.zeros_like(like)
    total = parts.sum(0)
    if total.shape != like.shape:
        total = torch.cat((total.new_zeros((1, *total.shape[1:])), total))
    return total.to(like.dtype)


def _rounds(call: _Call, tile: tiles.Tile, parts: bool) -> int:
    """Windows that one program of a kernel takes in turn.

    Where each program leaves a part of the bias gradient, all parts stay below 4 % of what the call reads and writes,
    or there is one program for each multiprocessor.
    """
    heads, processors = call.heads, gpu.multiprocessors(call.qkv.device)
    most = processors * tile.per_sm // heads
    if parts:
        traffic = 8 * call.qkv.numel() * call.itemsize // 3  # qkv, its gradient, the output and its gradient
        most = min(most, max(processors // heads, traffic // (25 * 4 * heads * call.positions**2)))
    return -(-call.windows // max(1, most))


def _class_programs(call: _Call, rounds: int) -> int:
    """Programs for each head when windows are dealt out by class: see `kernels._class_share`."""
    rows, cols = int(call.shift[0] > 0), int(call.shift[1] > 0)
    classes = [(down, across) for down in (call.down - rows, rows) for across in (call.across - cols, cols)]
    return sum(-(-call.images * down * across // rounds) for down, across in classes)


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
