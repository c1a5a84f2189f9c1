"""Neighborhood attention with a bias in float32 and all else in bfloat16, beside ways that have no bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vizoo.ops import neighborhood_attention

from .measuring import Case, Tensors, Way, check

SHAPES = {
    "nat_tiny stage 1": (128, (56, 56), 2, 32, 7, 1),
    "nat_tiny stage 2": (128, (28, 28), 4, 32, 7, 1),
    "nat_tiny stage 3": (128, (14, 14), 8, 32, 7, 1),
    "dinat_tiny stage 1, dilation 8": (128, (56, 56), 2, 32, 7, 8),
    "dinat_tiny stage 2, dilation 4": (128, (28, 28), 4, 32, 7, 4),
    "dinat_tiny stage 3, dilation 2": (128, (14, 14), 8, 32, 7, 2),
    "128 x 128, windows of 13": (2, (128, 128), 8, 64, 13, 1),
    "256 x 256, windows of 13": (1, (256, 256), 8, 64, 13, 1),
}
"""Inputs of neighborhood attention: batch, map, heads, channels of a head, kernel size and dilation."""


def case(name: str) -> Case:
    """The operator beside attention to all tokens, gathering the neighbors, and FlexAttention with the same windows."""
    batch, space, heads, d, kernel, dilation = SHAPES[name]
    query = torch.randn(batch, *space, 3, heads, d, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device="cuda")
    tensors = {"query": query.requires_grad_(), "bias": bias.requires_grad_()}
    sizes = {"kernel_size": kernel, "dilation": dilation}

    def ours(tensors: Tensors) -> Tensor:
        return neighborhood_attention(**tensors, **sizes, implementation="triton")

    def plain(tensors: Tensors) -> Tensor:
        return neighborhood_attention(**tensors, **sizes, implementation="reference")

    def flex() -> Way:
        way, unbiased = flex_neighborhoods(space, kernel, dilation), {"query": query}
        with torch.no_grad():
            check(way(unbiased).float(), ours(unbiased).float())
        return way

    part = query.nbytes / 3
    fits = space[0] <= 128  # beyond, gathering and FlexAttention ask for more memory than there is
    return Case(
        facts={"shape": tuple(query.shape), **sizes},
        tensors=tensors,
        ours=ours,
        expected=plain if fits else None,
        peers={"sdpa dense": dense} | ({"torch gather": plain} if fits else {}),
        compiled={"flex compiled": flex} if fits else {},
        forward_bytes=4 * part,
        both_bytes=(4 + 7) * part,  # backward reads the packed projection and the incoming gradient, writes that of it
    )


def dense(tensors: Tensors) -> Tensor:
    q, k, v = tensors["query"].flatten(1, 2).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flex_neighborhoods(space: tuple[int, int], kernel: int, dilation: int) -> Way:
    """FlexAttention with the same windows, over tokens row by row; it has no bias, which costs it time at best."""

    def near(i: Tensor, j: Tensor, length: int) -> Tensor:
        group = i % dilation
        size = (length - group + dilation - 1) // dilation
        start = torch.minimum((i // dilation - kernel // 2).clamp(min=0), size - kernel)
        return (j % dilation == group) & (j // dilation >= start) & (j // dilation < start + kernel)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        W = space[1]
        return near(i // W, j // W, space[0]) & near(i % W, j % W, W)

    n = space[0] * space[1]
    blocks = create_block_mask(mask, None, None, n, n, device="cuda")  # compiled, it takes minutes for 16,384 tokens
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(tensors: Tensors) -> Tensor:
        q, k, v = tensors["query"].flatten(1, 2).permute(2, 0, 3, 1, 4)
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2).unflatten(1, space)

    return run
