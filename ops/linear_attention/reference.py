"""Linear attention in plain torch: the definition, and what runs on a CPU.

Letters: B images, N tokens, h heads of d channels of queries and keys and e channels of values. A state is the d x e
matrix of a head that all its tokens add to and read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import without_autocast

from .rules import FlowConservation, KernelSum, MeanSubtraction, Rule


def linear_attention_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rule: Rule,
    temperature: Tensor | None,
    key_position: Tensor | None,
    local_kernels: Tensor | None,
    grid: tuple[int, int] | None,
) -> Tensor:
    """Computes what `vizoo.ops.linear_attention` defines."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if k is None or v is None:
        q, k, v = q.unbind(2)
    with without_autocast(q.device):
        queries, keys, values = (each.to(wide).transpose(1, 2) for each in (q, k, v))  # (B, h, N, d or e)
        if key_position is not None:
            keys = keys + key_position.to(wide).transpose(0, 1)
        out = _attended(queries, keys, values, rule)
        if temperature is not None:
            out = out * temperature.to(wide)[:, None, None]
        out = out.transpose(1, 2)  # (B, N, h, e)
        if local_kernels is not None and grid is not None:
            out = _with_local(out, v.to(wide), local_kernels.to(wide), grid)
        return out.to(dtype).contiguous()


def _attended(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """(B, h, N, e)."""
    if isinstance(rule, MeanSubtraction):
        return _mean_subtraction(q, k, v, rule)
    if isinstance(rule, KernelSum):
        return _kernel_sum(q, k, v, rule)
    return _flow_conservation(q, k, v, rule)


def _mean_subtraction(q: Tensor, k: Tensor, v: Tensor, rule: MeanSubtraction) -> Tensor:
    """The mean of scores is a score of the mean key, so that what is subtracted goes into the state."""
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    key, value = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    state = (k.mT @ v) / k.shape[2] - key.mT @ value
    return q @ (state * scale) + value


def _kernel_sum(q: Tensor, k: Tensor, v: Tensor, rule: KernelSum) -> Tensor:
    q, k = q.relu(), k.relu()
    total = q @ k.sum(2)[..., None]
    return (q @ (k.mT @ v)) / (total + rule.epsilon if rule.floor is None else total.clamp(min=rule.floor))


def _flow_conservation(q: Tensor, k: Tensor, v: Tensor, rule: FlowConservation) -> Tensor:
    e, q, k = rule.epsilon, q.sigmoid(), k.sigmoid()
    sinks, sources = q + e, k + e
    incoming = _reciprocal_flow(sinks, k, e)
    outgoing = _reciprocal_flow(sources, q, e)
    allocation = _flow(sinks, k * outgoing, e).sigmoid()
    competition = _flow(sources, q * incoming, e).clamp(-1.0, 1.0).softmax(2) * k.shape[2]
    return (q @ (k.mT @ (v * competition))) * (incoming * allocation)


def _flow(ends: Tensor, others: Tensor, epsilon: float) -> Tensor:
    """What passes each end from or to all the others, (B, h, N, 1)."""
    return ends @ (others.sum(2)[..., None] + epsilon) + epsilon


def _reciprocal_flow(ends: Tensor, others: Tensor, epsilon: float) -> Tensor:
    return 1.0 / _flow(ends, others, epsilon)


def _with_local(out: Tensor, v: Tensor, kernels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adds the convolution of a map by kernels of each image: a product and a sum for each of the nine neighbors.

    A grouped convolution would have a group for each channel of each image, and settle a trace on one batch size.
    """
    H, W = grid
    leading = out.shape[1] - H * W
    image = F.pad(v[:, leading:].unflatten(1, (H, W)), (0, 0, 0, 0, 1, 1, 1, 1))
    taps = kernels.flatten(3).permute(3, 0, 1, 2).contiguous()[:, :, None, None]  # (9, B, 1, 1, h, e)
    total = out[:, leading:].unflatten(1, (H, W))
    for tap in range(9):
        row, column = tap // 3, tap % 3
        total = torch.addcmul(total, image[:, row : row + H, column : column + W], taps[tap])
    return torch.cat([out[:, :leading], total.flatten(1, 2)], 1)
