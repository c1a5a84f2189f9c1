"""Allocates what the channel attention kernels write and launches them. Imports triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops

from . import kernels, tiles
from .function import FLOPS

register_flops(FLOPS)


def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and the weights between channels in float32, (B, groups, d, d)."""
    qkv = qkv.contiguous()
    B, N, _, groups, d = qkv.shape
    out = qkv.new_empty((B, N, groups, d))
    if not qkv.numel():
        return out, qkv.new_zeros((B, groups, d, d), dtype=torch.float32)
    with gpu.on(qkv.device):
        weights = _summed(qkv, None, None, scale)
        _each_position(kernels.forward, qkv, qkv, weights, out)
    return out, weights


def backward(grad_out: Tensor, qkv: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Gradient of qkv."""
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel():
        with gpu.on(qkv.device):
            grad_logits = _summed(qkv, grad_out, weights, scale)
            _each_position(kernels.backward, qkv, grad_out, qkv, weights, grad_logits, grad_qkv)
    return grad_qkv


def _summed(qkv: Tensor, grad_out: Tensor | None, weights: Tensor | None, scale: float) -> Tensor:
    """The weights; given them and the gradient of the output, the gradient of the logits before they are scaled."""
    B, N, _, groups, d = qkv.shape
    pairs, tile = B * groups, tiles.products(int(d), qkv.element_size())
    length = tiles.chunk(N, pairs, tile.rows, gpu.multiprocessors(qkv.device))
    chunks = -(-N // length)
    result = qkv.new_empty((B, groups, d, d), dtype=torch.float32)
    parts = result if chunks == 1 else qkv.new_empty((pairs, chunks, d, d), dtype=torch.float32)
    gradient = grad_out is not None
    launchable(kernels.products)[(pairs * chunks,)](
        qkv, grad_out, weights, parts, N, chunks, length, scale,
        GRADIENT=gradient, WHOLE=chunks == 1, num_stages=tile.stages, **_constants(qkv, tile),
    )  # fmt: skip
    if chunks > 1:
        launchable(kernels.combine)[(pairs * d,)](
            parts, weights, result, chunks, scale,
            D=d, BLOCK_D=tile.channels, PARTS=tiles.PARTS, GRADIENT=gradient, num_warps=1,
        )  # fmt: skip
    return result


def _each_position(kernel: Any, qkv: Tensor, *tensors: Tensor) -> None:
    B, N, _, groups, d = qkv.shape
    tile = tiles.positions(int(d), qkv.element_size())
    count = -(-N // tile.rows)
    launchable(kernel)[(B * groups * count,)](*tensors, N, count, **_constants(qkv, tile))


def _constants(qkv: Tensor, tile: tiles.Tile) -> dict[str, Any]:
    return {
        "GROUPS": qkv.shape[3],
        "D": qkv.shape[4],
        "BLOCK_D": tile.channels,
        "ROWS": tile.rows,
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "tf32",  # halves have but one precision
        "num_warps": tile.warps,
    }
