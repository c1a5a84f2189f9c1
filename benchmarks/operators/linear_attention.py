"""Linear attention in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import FlowConservation, KernelSum, MeanSubtraction, linear_attention

from .measuring import Case, Tensors, compiling

SHAPES = {
    "4 heads, 49 tokens": (128, 49, 4, 32, MeanSubtraction(), None),
    "4 heads, 196 tokens": (128, 196, 4, 32, MeanSubtraction(), None),
    "4 heads, 784 tokens": (128, 784, 4, 32, MeanSubtraction(), None),
    "4 heads, 3,136 tokens": (128, 3136, 4, 32, MeanSubtraction(), None),
    "4 heads, 3,136 tokens, sums": (128, 3136, 4, 32, KernelSum(), None),
    "inline_swin_tiny stage 1": (128, 56 * 56, 3, 32, MeanSubtraction(), (56, 56)),
    "inline_swin_tiny stage 3": (128, 14 * 14, 12, 32, MeanSubtraction(), (14, 14)),
    "l2vit_tiny stage 2": (128, 28 * 28, 6, 32, KernelSum(floor=100.0), None),
    "flowformer stage 1": (128, 56 * 56, 12, 8, FlowConservation(), None),
    "flowformer stage 3": (128, 14 * 14, 12, 32, FlowConservation(), None),
    "4 heads, 65,536 tokens": (1, 65536, 4, 32, MeanSubtraction(), None),
}
"""Linear attention: images, tokens, heads, channels of a head, the rule, and the map for kernels of each image."""


def case(name: str) -> Case:
    """The operator beside its definition in plain torch, and softmax attention of the same tensors."""
    batch, N, heads, d, rule, grid = SHAPES[name]
    options = {"rule": rule, "grid": grid}

    def ours(tensors: Tensors) -> Tensor:
        return attended(tensors, options | {"implementation": "triton"})

    def plain(tensors: Tensors) -> Tensor:
        return attended(tensors, options | {"implementation": "reference"})

    tensors = {"qkv": torch.randn(batch, N, 3, heads, d, device="cuda", dtype=torch.bfloat16)}
    tensors["qkv"][:, :, 1:] += 0.5  # of keys without a mean little would be left to compare
    if grid is not None:
        tensors["local_kernels"] = torch.randn(batch, heads, d, 3, 3, device="cuda", dtype=torch.bfloat16)
    part = tensors["qkv"].nbytes / 3
    return Case(
        facts={"shape": (batch, N, heads, d), "rule": str(rule), "grid": grid},
        tensors={key: tensor.requires_grad_() for key, tensor in tensors.items()},
        ours=ours,
        expected=plain,
        peers={"torch eager": plain, "sdpa eager": softmax},
        compiled={"torch compiled": compiling(plain)},
        forward_bytes=4 * part,
        both_bytes=(4 + 7) * part,  # backward reads qkv and the incoming gradient, and writes that of qkv
    )


def attended(tensors: Tensors, options: dict[str, Any]) -> Tensor:
    return linear_attention(tensors["qkv"], None, None, local_kernels=tensors.get("local_kernels"), **options)


def softmax(tensors: Tensors) -> Tensor:
    return F.scaled_dot_product_attention(*tensors["qkv"].permute(2, 0, 3, 1, 4)).transpose(1, 2)
