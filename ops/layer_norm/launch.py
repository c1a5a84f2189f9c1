"""Allocates what the layer normalisation kernels write and launches them. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable

from . import kernels, tiles


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Rows normalised, scaled and moved, in `dtype`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    numbers, channels = x.numel(), int(x.shape[-1])
    if numbers:
        rows, tile = numbers // channels, tiles.forward(channels)
        with gpu.on(x.device):
            launchable(kernels.forward)[(-(-rows // tile.rows),)](
                x, weight.contiguous(), bias.contiguous(), out, rows, eps,
                C=channels, BLOCK_C=tile.channels, ROWS=tile.rows, num_warps=tile.warps,
            )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty where not asked for.

    Programs write their sums over rows side by side, and torch adds them up: one order, no atomics.
    """
    x = x.contiguous()
    grad_x = torch.empty_like(x) if x_gradient else x.new_empty(0)
    if not x.numel():
        zeros = [torch.zeros_like(p) if parameter_gradient else p.new_empty(0) for p in (weight, bias)]
        return grad_x, zeros[0], zeros[1]
    channels = int(x.shape[-1])
    rows, tile = x.numel() // channels, tiles.backward(channels)
    programs = min(-(-rows // tile.rows), tile.per_sm * gpu.multiprocessors(x.device))
    parts = x.new_empty((2, programs, channels) if parameter_gradient else 0, dtype=torch.float32)
    with gpu.on(x.device):
        launchable(kernels.backward)[(programs,)](
            grad_out.contiguous(), x, weight.contiguous(), grad_x, parts, rows, eps,
            C=channels, BLOCK_C=tile.channels, ROWS=tile.rows, X_GRADIENT=x_gradient,
            PARAMETER_GRADIENT=parameter_gradient, num_warps=tile.warps,
        )  # fmt: skip
    if not parameter_gradient:
        return grad_x, weight.new_empty(0), bias.new_empty(0)
    return grad_x, parts[0].sum(0).to(weight.dtype), parts[1].sum(0).to(bias.dtype)
