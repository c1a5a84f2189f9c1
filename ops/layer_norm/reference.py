"""Layer normalisation in plain torch: the definition, what runs on a CPU, and what a compiler fuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Computes what `vizoo.ops.layer_norm` defines."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype)
