"""Attention to routed regions, whose choice is given, in bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import region_routes, routing_attention

from .measuring import Case, Tensors, compiling

SHAPES = {
    "biformer_tiny stage 1": (128, 56, 2, 7, 1),
    "biformer_tiny stage 2": (128, 28, 4, 7, 4),
    "biformer_tiny stage 3": (128, 14, 8, 7, 16),
    "biformer_base stage 1": (128, 56, 3, 7, 1),
    "biformer_base stage 2": (128, 28, 6, 7, 4),
    "biformer_base stage 3": (128, 14, 12, 7, 16),
    "biformer_small stage 3, 512": (4, 32, 8, 8, 16),
    "256 x 256 in 8 x 8 regions": (1, 256, 2, 8, 4),
}
"""Inputs of routing attention: where they stand in a model; batch, side of the map, heads of 32 channels, regions on a
side of the map, and how many of them each region attends to."""


def case(name: str) -> Case:
    """The operator beside copying the regions."""
    batch, side, heads, regions, k = SHAPES[name]
    size = side // regions
    qkv = torch.randn(batch, side, side, 3, heads, 32, device="cuda", dtype=torch.bfloat16)
    routes = region_routes(qkv, region_size=size, topk=k)

    def ours(tensors: Tensors) -> Tensor:
        return routing_attention(tensors["qkv"], routes=routes, region_size=size, implementation="triton")

    def gathered(tensors: Tensors) -> Tensor:
        return gathered_sdpa(tensors["qkv"], routes, regions)

    part = qkv.nbytes / 3
    return Case(
        facts={"shape": (batch, side, heads, regions, k)},
        tensors={"qkv": qkv.requires_grad_()},
        ours=ours,
        expected=gathered,
        peers={"gather eager": gathered},
        compiled={"gather compiled": compiling(gathered)},
        forward_bytes=4 * part,
        both_bytes=(4 + 7) * part,  # backward reads qkv and the incoming gradient, and writes that of qkv
    )


def gathered_sdpa(qkv: Tensor, routes: Tensor, regions: int) -> Tensor:
    """What a model does without the operator: cut the map into regions, copy the routed keys and values, attend."""
    B, H, W, _, h, d = qkv.shape
    rows, cols = H // regions, W // regions
    cut = qkv.view(B, regions, rows, regions, cols, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = cut.reshape(3, B * regions**2, h, rows * cols, d)
    taken = (routes + torch.arange(B, device=qkv.device)[:, None, None] * regions**2).flatten(0, 1)  # (B * regions, k)
    k, v = (x[taken].transpose(1, 2).flatten(2, 3) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v).view(B, regions, regions, h, rows, cols, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, h, d)
