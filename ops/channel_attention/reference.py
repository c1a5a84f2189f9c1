"""Channel attention in plain torch: the definition, and what runs on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def channel_attention_reference(qkv: Tensor, *, scale: float) -> Tensor:
    """Computes what `vizoo.ops.channel_attention` defines."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, groups, N, d)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with _without_autocast(qkv.device):
        logits = k.to(wide).transpose(-2, -1) @ v.to(wide) * scale
        weights = logits.softmax(dim=-1).to(q.dtype)
        return (q @ weights.transpose(-2, -1)).transpose(1, 2)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Sums over positions are beyond the range of half precision."""
    if device.type == "meta":  # on which sizes are counted; it knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
