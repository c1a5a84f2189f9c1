"""Depthwise convolution in plain torch: the definition, and what runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import without_autocast


def depthwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: bool, activation: str | None
) -> Tensor:
    """Computes what `vizoo.ops.depthwise_conv` defines."""
    wide = torch.promote_types(x.dtype, torch.float32)
    image = x.to(wide).permute(0, 3, 1, 2)  # channels last in memory: torch convolves it as it lies
    with without_autocast(x.device):
        out = F.conv2d(
            image,
            weight.to(wide),
            None if bias is None else bias.to(wide),
            padding=weight.shape[-1] // 2,
            groups=weight.shape[0],
        )
    if residual:
        out = out + image
    if activation == "silu":
        out = F.silu(out)
    return out.permute(0, 2, 3, 1).to(x.dtype).contiguous()
