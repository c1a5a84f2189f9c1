"""Layer normalisation before a linear layer under autocast: float32 comes in, bfloat16 is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import layer_norm

from .measuring import Case, Tensors, compiling

SHAPES = {
    "swin_tiny stage 1": (128, 56, 56, 96),
    "swin_tiny stage 2": (128, 28, 28, 192),
    "swin_tiny stage 3": (128, 14, 14, 384),
    "swin_tiny stage 4": (128, 7, 7, 768),
    "swin_tiny merging 1": (128, 28, 28, 384),
    "swin_large stage 4": (128, 7, 7, 1536),
    "swin_tiny stage 3, one image": (1, 14, 14, 384),
}
"""Inputs of layer normalisation: where they stand in a model, and their sizes."""


def case(name: str) -> Case:
    """The norm beside torch's, whose result a cast makes narrow."""
    shape = SHAPES[name]
    sizes = {"x": shape, "weight": shape[-1:], "bias": shape[-1:]}
    tensors = {key: torch.randn(size, device="cuda").requires_grad_() for key, size in sizes.items()}
    x = tensors["x"].nbytes
    return Case(
        facts={"shape": shape},
        tensors=tensors,
        ours=ours,
        expected=plain,
        peers={"torch eager": plain},
        compiled={"torch compiled": compiling(plain)},
        forward_bytes=x * 3 // 2,
        both_bytes=x * 8 // 2,  # backward reads x and the incoming gradient, and writes that of x
    )


def ours(tensors: Tensors) -> Tensor:
    return layer_norm(**tensors, dtype=torch.bfloat16, implementation="triton")


def plain(tensors: Tensors) -> Tensor:
    return F.layer_norm(tensors["x"], tensors["x"].shape[-1:], tensors["weight"], tensors["bias"]).bfloat16()
