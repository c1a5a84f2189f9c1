"""Allocates what the depthwise convolution kernels write and launches them. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops

from . import kernels, tiles
from .function import FLOPS

register_flops(FLOPS)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, silu: bool) -> Tensor:
    """The convolved map."""
    return _convolved(x.contiguous(), weight, bias, residual, silu=silu)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    silu: bool,
    x_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty where not asked for.

    One kernel makes all of them for 3 x 3 filters. Elsewhere that of x is a convolution, too. Behind an activation the
    gradient of the sums comes first: they are computed again, and never written.
    """
    x, grad_out, kernel = x.contiguous(), grad_out.contiguous(), weight.shape[-1]
    if silu:
        grad_out = _convolved(x, weight, bias, residual, grad_out=grad_out)
    none = weight.new_empty(0), weight.new_empty(0) if bias is None else bias.new_empty(0)
    if not parameter_gradient:
        return _convolved(grad_out, weight, None, residual, flip=True), *none
    if not x.numel():
        return (
            torch.empty_like(x) if x_gradient else x.new_empty(0),
            torch.zeros_like(weight, memory_format=torch.contiguous_format),
            none[1] if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format),
        )
    if kernel == 3:
        grad_x, parts = _both(grad_out, x, weight, residual, x_gradient)
    else:
        parts = _weight_parts(grad_out, x, weight.shape[0], kernel)
        grad_x = x.new_empty(0)
        if x_gradient:
            grad_x = _convolved(grad_out, weight, None, residual, flip=True)
    numbers = weight.numel()
    total = parts.sum(0)
    grad_weight = total[:numbers].view(weight.shape).to(weight.dtype, copy=True)  # not a view of what bias shares
    return grad_x, grad_weight, none[1] if bias is None else total[numbers:].to(bias.dtype, copy=True)


def _tiles(x: Tensor, tile: tiles.Tile) -> int:
    """In how many tiles of pixels a map is cut."""
    B, H, W, _ = x.shape
    return -(-(B * H) // tile.rows) * -(-W // tile.columns)


def _strips(x: Tensor, tile: tiles.Tile) -> tuple[int, int]:
    """In how many strips a map is cut, and how many rows the longest has."""
    B, H, W, _ = x.shape
    high = -(-H // tile.rows)
    return high * -(-(B * -(-W // 2)) // (tile.columns // 2)), -(-H // high)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    flip: bool = False,
    silu: bool = False,
    grad_out: Tensor | None = None,
) -> Tensor:
    """The convolved map, or SiLU of it; with `grad_out`, the gradient of that SiLU, that of the convolved map."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    B, H, W, _ = x.shape
    C, kernel = int(weight.shape[0]), int(weight.shape[-1])  # compiled in: a tracer has to settle on them
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    with gpu.on(x.device):
        if kernel == 3:
            tile = tiles.forward_three(C, x.element_size())
            count, steps = _strips(x, tile)
            launchable(kernels.forward_three)[(count * -(-C // tile.channels),)](
                x, weight, bias, grad_out, out, B, H, W, steps,
                C=C, BLOCK_C=tile.channels, PAIRS=tile.columns // 2,
                RESIDUAL=residual, FLIP=flip, SILU=silu, num_warps=tile.warps,
            )  # fmt: skip
        else:
            tile = tiles.forward(C, x.element_size())
            launchable(kernels.forward)[(_tiles(x, tile) * -(-C // tile.channels),)](
                x, weight, bias, grad_out, out, B * H, H, W,
                C=C, BLOCK_C=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns,
                KERNEL=kernel, RESIDUAL=residual, FLIP=flip, SILU=silu, num_warps=tile.warps,
            )  # fmt: skip
    return out


def _both(grad_out: Tensor, x: Tensor, weight: Tensor, residual: bool, x_gradient: bool) -> tuple[Tensor, Tensor]:
    """Gradient of x (empty where not asked for), and programs' sums for weight and bias side by side.

    Torch adds the sums up: one order, no atomics.
    """
    B, H, W, _ = x.shape
    C = int(weight.shape[0])
    tile = tiles.backward(C, x.element_size())
    (count, steps), blocks = _strips(x, tile), -(-C // tile.channels)
    programs = min(count, max(1, tile.per_sm * gpu.multiprocessors(x.device) // blocks))
    grad_x = torch.empty_like(x) if x_gradient else x.new_empty(0)
    parts = x.new_empty((programs, 10 * C), dtype=torch.float32)
    with gpu.on(x.device):
        launchable(kernels.backward)[(programs * blocks,)](
            grad_out, x, weight.contiguous(), grad_x, parts, B, H, W, steps,
            C=C, BLOCK_C=tile.channels, PAIRS=tile.columns // 2,
            RESIDUAL=residual, X_GRADIENT=x_gradient, num_warps=tile.warps,
        )  # fmt: skip
    return grad_x, parts


def _weight_parts(grad_out: Tensor, x: Tensor, C: int, kernel: int) -> Tensor:
    """Programs' sums for weight and bias side by side."""
    B, H, W, _ = x.shape
    tile = tiles.weight_gradient(C, x.element_size())
    count = _tiles(x, tile)
    # Programs that share tiles have three taps and a block of channels each.
    each = -(-C // tile.channels) * kernel * -(-kernel // 3)
    programs = min(count, max(1, tile.per_sm * gpu.multiprocessors(x.device) // each))
    parts = x.new_empty((programs, (kernel * kernel + 1) * C), dtype=torch.float32)
    with gpu.on(x.device):
        launchable(kernels.weight_gradient)[(programs * each,)](
            grad_out, x, parts, B * H, H, W,
            C=C, BLOCK_C=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, KERNEL=kernel, num_warps=tile.warps,
        )  # fmt: skip
    return parts
