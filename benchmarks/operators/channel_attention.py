"""Channel attention in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import channel_attention

from .measuring import Case, Tensors, compiling

SHAPES = {
    "davit_tiny stage 1": (128, 56 * 56, 3, 3, 32),
    "davit_tiny stage 2": (128, 28 * 28, 3, 6, 32),
    "davit_tiny stage 3": (128, 14 * 14, 3, 12, 32),
    "davit_tiny stage 4": (128, 7 * 7, 3, 24, 32),
    "davit_tiny stage 1, 800x1333": (2, 200 * 334, 3, 3, 32),
}
"""Inputs of channel attention: where they stand in a model, and their sizes."""


def case(name: str) -> Case:
    """The operator beside its definition in plain torch."""
    shape = SHAPES[name]
    # Logits are sums over positions: about as wide for every size.
    qkv = torch.randn(shape, device="cuda") * shape[1] ** -0.25
    tensors = {"qkv": qkv.bfloat16().requires_grad_()}
    part = tensors["qkv"].nbytes / 3
    return Case(
        facts={"shape": shape},
        tensors=tensors,
        ours=ours,
        expected=plain,
        peers={"torch eager": plain},
        compiled={"torch compiled": compiling(plain)},
        forward_bytes=4 * part,
        both_bytes=(4 + 7) * part,  # backward reads qkv and the incoming gradient, and writes that of qkv
    )


def ours(tensors: Tensors) -> Tensor:
    return channel_attention(tensors["qkv"], implementation="triton")


def plain(tensors: Tensors) -> Tensor:
    return channel_attention(tensors["qkv"], implementation="reference")
