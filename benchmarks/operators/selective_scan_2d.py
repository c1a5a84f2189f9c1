"""Scans along four routes of a map in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import ROW_AND_COLUMN_ROUTES, Route, selective_scan, selective_scan_2d

from .measuring import Case, Tensors, compiling

SHAPES = {
    "vssm1_tiny stage 1": (128, 56, 56, 96, 6),
    "vssm1_tiny stage 2": (128, 28, 28, 192, 12),
    "vssm1_tiny stage 3": (128, 14, 14, 384, 24),
    "vssm1_tiny stage 4": (128, 7, 7, 768, 48),
    "vssm1_tiny stage 1, 800x1333": (2, 200, 334, 96, 6),
    "vssm1_tiny stage 1, one image": (1, 56, 56, 96, 6),
}
"""Maps that are scanned along four routes, one state a channel: where they stand in a model, their sizes, and the rank
of the projection of steps."""


def case(name: str) -> Case:
    """The operator beside the chain of copies, our own selective scan, and a merge."""
    shape = SHAPES[name]
    tensors = inputs(*shape)
    x, projected = tensors["x"].nbytes, sum(tensors[part].nbytes for part in ("delta", "B", "C"))
    return Case(
        facts={"shape": shape},
        tensors=tensors,
        ours=ours,
        expected=chain,
        peers={"chain eager": chain},
        compiled={"chain compiled": compiling(chain)},
        forward_bytes=3 * x + projected,  # the output is float32
        # Backward reads the maps and the incoming gradient, and writes the maps' gradients.
        both_bytes=7 * x + 3 * projected,
    )


def ours(tensors: Tensors) -> Tensor:
    return selective_scan_2d(**tensors, implementation="triton")


def chain(tensors: Tensors) -> Tensor:
    return copied_routes(**tensors)


def inputs(images: int, H: int, W: int, d: int, rank: int) -> Tensors:
    """A map, parts of one projection of it, and parameters with steps of about 0.02, as VMamba starts with."""
    K = len(ROW_AND_COLUMN_ROUTES)
    projected = torch.randn(images, H, W, K, rank + 2, device="cuda", dtype=torch.bfloat16)
    delta, B, C = projected.split([rank, 1, 1], -1)
    tensors = {
        "x": torch.randn(images, H, W, d, device="cuda", dtype=torch.bfloat16),
        "delta": delta,
        "A": -torch.ones(K, d, 1, device="cuda"),
        "B": B,
        "C": C,
        "D": torch.ones(K, d, device="cuda"),
        "delta_weight": (torch.rand(K, d, rank, device="cuda", dtype=torch.bfloat16) - 0.5) / rank**0.5,
        "delta_bias": torch.full((K, d), -4.0, device="cuda"),
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def copied_routes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_weight: Tensor, delta_bias: Tensor
) -> Tensor:
    """What a model does without the operator: copy the four routes, scan them at once, put them back and add."""
    _, H, W, d = x.shape

    def routed(tensor: Tensor, route: Route) -> Tensor:
        lines = (tensor.transpose(1, 2) if route.columns else tensor).flatten(1, 2)
        return (lines.flip(1) if route.reverse else lines).mT

    def each(tensor: Tensor) -> Tensor:
        return torch.stack([routed(tensor[:, :, :, k], route) for k, route in enumerate(ROW_AND_COLUMN_ROUTES)], 1)

    u = torch.stack([routed(x, route) for route in ROW_AND_COLUMN_ROUTES], 1).flatten(1, 2)
    steps = (delta_weight @ each(delta)).flatten(1, 2)
    y = selective_scan(
        u, steps, A.flatten(0, 1), each(B), each(C), D.flatten(),
        delta_bias=delta_bias.flatten(), softplus=True, dtype=torch.float32, implementation="triton",
    ).unflatten(1, (-1, d))  # fmt: skip
    rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
    return rows.mT.unflatten(1, (H, W)) + columns.mT.unflatten(1, (W, H)).transpose(1, 2)
