"""Selective scans in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import selective_scan

from .measuring import Case, Tensors, compiling

SHAPES = {
    "vmamba_tiny stage 1": (128, 4, 96, 56 * 56, 1, False),
    "vmamba_tiny stage 2": (128, 4, 192, 28 * 28, 1, False),
    "vmamba_tiny stage 3": (128, 4, 384, 14 * 14, 1, False),
    "vmamba_tiny stage 1, channels last": (128, 4, 96, 56 * 56, 1, True),
    "vmamba_tiny stage 3, channels last": (128, 4, 384, 14 * 14, 1, True),
    "vmamba v0 stage 1, 16 states": (32, 4, 192, 56 * 56, 16, False),
    "vim_tiny, 16 states": (128, 1, 384, 14 * 14 + 1, 16, True),
    "vim_tiny at 1248, 16 states": (8, 1, 384, 78 * 78 + 1, 16, True),
    "262,144 tokens, 16 states": (1, 1, 384, 262144, 16, True),
}
"""Selective scans: batch, groups, channels of a group, tokens, states; whether channels lie together in memory."""


def case(name: str) -> Case:
    """The operator beside its definition in chunks of plain torch, where its states fit."""
    shape = SHAPES[name]
    tensors, one_state = inputs(*shape), shape[4] == 1
    sequence, maps = tensors["u"].nbytes, tensors["B"].nbytes + tensors["C"].nbytes
    return Case(
        facts={"shape": shape[:5], "channels_last": shape[5]},
        tensors=tensors,
        ours=ours,
        expected=plain,
        peers={"torch eager": plain} if one_state else {},
        compiled={"torch compiled": compiling(plain)} if one_state else {},
        forward_bytes=3 * sequence + maps,
        # Backward reads u, delta, the maps and the incoming gradient, and writes four gradients.
        both_bytes=8 * sequence + 3 * maps,
    )


def ours(tensors: Tensors) -> Tensor:
    return selective_scan(**tensors, softplus=True, implementation="triton")


def plain(tensors: Tensors) -> Tensor:
    return selective_scan(**tensors, softplus=True, implementation="reference")


def inputs(batch: int, groups: int, each: int, L: int, N: int, channels_last: bool) -> Tensors:
    """Random tensors that ask for gradients, with the dtypes they have under autocast."""

    def drawn(*lead: int) -> Tensor:
        if channels_last:
            return torch.randn(batch, L, *lead, device="cuda", dtype=torch.bfloat16).movedim(1, -1)
        return torch.randn(batch, *lead, L, device="cuda", dtype=torch.bfloat16)

    channels = groups * each
    tensors = {
        "u": drawn(channels),
        "delta": drawn(channels),
        "A": -torch.exp(torch.randn(channels, N, device="cuda")),
        "B": drawn(groups, N),
        "C": drawn(groups, N),
        "D": torch.randn(channels, device="cuda"),
        "delta_bias": torch.randn(channels, device="cuda") - 3,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}
