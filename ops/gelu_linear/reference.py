"""The operator in plain torch: the definition, and what runs on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes what `vizoo.ops.gelu_linear` defines."""
    return F.linear(F.gelu(x), weight, bias)
