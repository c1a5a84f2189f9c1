"""Gated linear attention in bfloat16, gates included."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import gated_linear_attention

from .measuring import Case, Tensors, Way, compiling

SHAPES = {
    "vig_small": (128, 14 * 14, 6, 32, 64, True),
    "vig_tiny": (128, 14 * 14, 3, 32, 64, True),
    "vig_small at 896, 4 heads": (64, 56 * 56, 4, 32, 64, True),
    "vig_h_tiny stage 1": (128, 56 * 56, 3, 16, 32, True),
    "vig_h_tiny stage 2": (128, 28 * 28, 6, 16, 32, True),
    "vig_h_tiny stage 3": (128, 14 * 14, 12, 16, 32, True),
    "65,536 tokens, one direction": (1, 65536, 8, 64, 64, False),
}
"""Gated linear attention: batch, tokens, heads, channels of keys and of values, and whether in both directions."""
GATES = ("decay", "reverse_decay")


def case(name: str) -> Case:
    """The operator beside its definition, and calls of another library."""
    batch, N, heads, dk, dv, both = SHAPES[name]
    widths = {"q": dk, "k": dk, "v": dv, "decay": dk} | ({"reverse_decay": dk} if both else {})
    tensors = {
        key: torch.randn(batch, N, heads, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for key, width in widths.items()
    }
    peers: dict[str, Way] = {}
    own_tensors: dict[str, Tensors] = {}
    small = batch * N * heads <= 2**18  # the definition keeps dozens of numbers for each that comes in
    if small:
        peers["torch eager"] = plain
    if (peer := chunk_gla_calls()) is not None:
        title = f"fla, {2 if both else 1} x chunk_gla"
        peers[title], own_tensors[title] = peer, log_decays(tensors)
    given, out = sum(tensor.nbytes for tensor in tensors.values()), tensors["v"].nbytes
    return Case(
        facts={"shape": (batch, N, heads, dk, dv), "both": both},
        tensors=tensors,
        ours=ours,
        expected=plain,
        peers=peers,
        compiled={"torch compiled": compiling(plain)} if small else {},
        forward_bytes=given + out,
        both_bytes=3 * given + 2 * out,  # backward reads inputs and the incoming gradient, and writes those of inputs
        own_tensors=own_tensors,
    )


def ours(tensors: Tensors) -> Tensor:
    return gated_linear_attention(**tensors, normalizer=16.0, implementation="triton")


def plain(tensors: Tensors) -> Tensor:
    return gated_linear_attention(**tensors, normalizer=16.0, implementation="reference")


def log_decays(tensors: Tensors) -> Tensors:
    """The same inputs with log decays in the place of gates."""
    logs = {key: F.logsigmoid(each) / 16 if key in GATES else each for key, each in tensors.items()}
    return {key: each.detach().requires_grad_() for key, each in logs.items()}


@cache
def chunk_gla_calls() -> Way | None:
    """One call of flash-linear-attention's kernels for each direction, or None where it is not installed.

    They are given log decays. What a user does besides is left out: those from gates, and flips for the way back.
    """
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        print("flash-linear-attention is not installed, so it is left out", flush=True)
        return None

    def run(tensors: Tensors) -> Tensor:
        q, k, v, *decays = tensors.values()
        outs = [chunk_gla(q, k, v, decay)[0] for decay in decays]
        return outs[0] if len(outs) == 1 else outs[0] + outs[1]

    return run
