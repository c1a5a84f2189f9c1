"""A conditional position encoding: a map and its convolution, under autocast with parameters in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import depthwise_conv

from .measuring import Case, Tensors, compiling

SHAPES = {
    **{
        f"davit_tiny stage {stage}, {name}": ((128, side, side, channels), dtype, 3)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
        for stage, side, channels in ((1, 56, 96), (2, 28, 192), (3, 14, 384), (4, 7, 768))
    },
    "davit_tiny stage 1, 800x1333": ((2, 200, 334, 96), torch.bfloat16, 3),
    "biformer_tiny stage 1": ((128, 56, 56, 64), torch.bfloat16, 5),
}
"""Inputs of depthwise convolution: where they stand in a model, their sizes and dtype, and the side of the filters."""


def case(name: str) -> Case:
    """The operator beside torch's convolution of the same memory."""
    shape, dtype, kernel = SHAPES[name]
    tensors = {
        "x": torch.randn(shape, device="cuda", dtype=dtype),
        "weight": torch.randn(shape[-1], 1, kernel, kernel, device="cuda") / kernel,
        "bias": torch.randn(shape[-1], device="cuda"),
    }
    x = tensors["x"].nbytes
    return Case(
        facts={"shape": shape, "kernel": kernel, "dtype": str(dtype).removeprefix("torch.")},
        tensors={key: tensor.requires_grad_() for key, tensor in tensors.items()},
        ours=ours,
        expected=plain,
        peers={"torch eager": plain},
        compiled={"torch compiled": compiling(plain)},
        forward_bytes=2 * x,
        both_bytes=(2 + 3) * x,  # backward reads x and the incoming gradient, and writes that of x
    )


def ours(tensors: Tensors) -> Tensor:
    return depthwise_conv(**tensors, residual=True, implementation="triton")


def plain(tensors: Tensors) -> Tensor:
    x, weight, bias = tensors["x"].permute(0, 3, 1, 2), tensors["weight"], tensors["bias"]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    out = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return (x + out).permute(0, 2, 3, 1)
