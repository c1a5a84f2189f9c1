"""State space duality in bfloat16, with an order of tokens and without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import state_space_dual

from .measuring import Case, Tensors, compiling

SHAPES = {
    "vssd_tiny stage 1": (128, 56 * 56, 2, 64, 64, False),
    "vssd_tiny stage 2": (128, 28 * 28, 4, 64, 64, False),
    "vssd_tiny stage 3": (128, 14 * 14, 8, 64, 64, False),
    "vssd_micro stage 1": (128, 56 * 56, 2, 48, 48, False),
    "vssd_base stage 2": (128, 28 * 28, 6, 64, 64, False),
    "vssd_tiny stage 1, 800x1333": (2, 200 * 334, 2, 64, 64, False),
    "vssd_tiny stage 1, causal": (128, 56 * 56, 2, 64, 64, True),
    "vssd_tiny stage 3, causal": (128, 14 * 14, 8, 64, 64, True),
    "mamba2 of 1,024, 65,536 tokens": (1, 65536, 32, 64, 128, True),
}
"""State space duality: batch, tokens, heads, channels and states of a head, and whether tokens have an order."""


def case(name: str) -> Case:
    """The operator beside two einsums or, where tokens have an order, its definition in chunks."""
    batch, L, heads, P, N, causal = SHAPES[name]
    tensors = {
        "x": torch.randn(batch, L, heads * P + 2 * N, device="cuda", dtype=torch.bfloat16),
        "dt": torch.randn(batch, L, heads, device="cuda", dtype=torch.bfloat16) - 3,
        "A": -torch.rand(heads, device="cuda"),
        "D": torch.randn(heads, device="cuda"),
        "dt_bias": torch.randn(heads, device="cuda"),
    }
    options: dict[str, Any] = {"causal": causal, "softplus": True, "states": N}

    def ours(tensors: Tensors) -> Tensor:
        return state_space_dual(**tensors, **options, implementation="triton")

    def plain(tensors: Tensors) -> Tensor:
        if not causal:
            return einsum_dual(tensors, N)
        return state_space_dual(**tensors, **options, implementation="reference")

    packed, out = tensors["x"].nbytes + tensors["dt"].nbytes, tensors["x"].nbytes * heads * P // (heads * P + 2 * N)
    return Case(
        facts={"shape": (batch, L, heads, P, N), "causal": causal},
        tensors={key: tensor.requires_grad_() for key, tensor in tensors.items()},
        ours=ours,
        expected=plain,
        peers={"torch eager": plain},
        compiled={"torch compiled": compiling(plain)},
        forward_bytes=packed + out,
        both_bytes=3 * packed + 2 * out,  # backward reads inputs and the incoming gradient, and writes those of inputs
    )


def einsum_dual(tensors: Tensors, states: int) -> Tensor:
    """What a model does without the operator, and without an order: two contractions, in the dtype of autocast."""
    heads = tensors["A"].shape[0]
    x, B, C = tensors["x"].split([tensors["x"].shape[-1] - 2 * states, states, states], -1)
    x = x.unflatten(-1, (heads, -1))
    weights = F.softplus(tensors["dt"].float() + tensors["dt_bias"]) * -tensors["A"]
    state = torch.einsum("bln,blhp->bhnp", B, x * weights[..., None].to(x.dtype))
    return torch.einsum("bln,bhnp->blhp", C, state) + x * tensors["D"][:, None].to(x.dtype)
