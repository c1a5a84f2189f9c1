"""Allocates what the kernel writes and launches it. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable

from . import kernels

BLOCK = 1024
"""Numbers of a program: 8 of each thread, which fill one load of half precision."""


def backward(grad_hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x), and the gradient of x."""
    x, grad_hidden = x.contiguous(), grad_hidden.contiguous()
    hidden, grad_x = torch.empty_like(x), torch.empty_like(x)
    numbers = x.numel()
    if numbers:
        with gpu.on(x.device):
            launchable(kernels.backward)[(-(-numbers // BLOCK),)](
                grad_hidden, x, hidden, grad_x, numbers, BLOCK=BLOCK, num_warps=4
            )
    return hidden, grad_x
