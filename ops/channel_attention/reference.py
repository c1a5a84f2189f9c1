"""Channel attention in plain torch: the definition, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops.tracing import without_autocast


def channel_attention_reference(qkv: Tensor, *, scale: float) -> Tensor:
    """Computes what `vizoo.ops.channel_attention` defines."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, groups, N, d)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv.device):
        logits = k.to(wide).transpose(-2, -1) @ v.to(wide) * scale
        weights = logits.softmax(dim=-1).to(q.dtype)
        return (q @ weights.transpose(-2, -1)).transpose(1, 2)
