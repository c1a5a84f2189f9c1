"""Gated linear attention in plain torch: the definition, and what runs on a CPU.

Letters: N tokens, c chunks of Q = CHUNK tokens. With s the scale and a_t the log decays, token by token,

    S_t = diag(exp(a_t)) S_(t-1) + k_t v_t^T        o_t = s q_t^T S_t

Tokens of a chunk see each other through halves: in blocks of 2, 4, .. Q tokens, each one of the right half sees those
of the left half. What lies between two tokens splits at the middle of the one block that has them in different halves,
so that either factor exp(sum of a) is at most one, and no sum is ever subtracted from another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

CHUNK = 32
"""Tokens that see each other by matrix products; a power of two."""

SEGMENT = 2**12
"""Tokens whose chunks are worked out at once; the product of all chunks with each other bounds it."""

NOTHING = -1000.0
"""exp of it is zero, even in float64."""


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    reverse_decay: Tensor | None,
    *,
    scale: float,
    reverse: bool,
    normalizer: float | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Computes what `vizoo.ops.gated_linear_attention` defines: the output and the last state of the last direction."""
    del return_state  # there always is one
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "meta":
        return _counted(q, k.to(q.dtype), v.to(q.dtype), wide, 1 if reverse_decay is None else 2)
    with without_autocast(q.device):
        tensors = q.to(wide) * scale, k.to(wide), v.to(wide)
        state = None if initial_state is None else initial_state.to(wide)
        out, state = _directed(*tensors, log_decay(decay.to(wide), normalizer), state, reverse)
        if reverse_decay is not None:
            out = out + _directed(*tensors, log_decay(reverse_decay.to(wide), normalizer), None, True)[0]
        return out.to(q.dtype).contiguous(), state


def _counted(q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype, directions: int) -> tuple[Tensor, Tensor]:
    """The same shapes on the meta device, which counts the products of the definition, not those of chunks."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    for _ in range(directions):
        state = k.mT @ v
        out = q @ state
    return out.transpose(1, 2).contiguous(), state.to(wide)


def log_decay(decay: Tensor, normalizer: float | None) -> Tensor:
    """The log decay itself, or from gate logits; bounded where nothing is left anyway, so that sums stay finite."""
    if normalizer is not None:
        decay = F.logsigmoid(decay) / normalizer
    return decay.clamp(min=NOTHING)


def _directed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Output and last state of one direction; long sequences in segments, so that memory grows with length alone."""
    if reverse:
        q, k, v, decay = (each.flip(1) for each in (q, k, v, decay))
        out, state = _directed(q, k, v, decay, state, False)
        return out.flip(1), state
    if not known(q.shape[1] > SEGMENT):
        return _segment(q, k, v, decay, state)
    outs = []
    for parts in zip(*(each.split(SEGMENT, 1) for each in (q, k, v, decay)), strict=True):
        out, state = _segment(parts[0], parts[1], parts[2], parts[3], state)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


def _segment(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products within chunks, and of each token with the state that its chunk begins with."""
    tokens, table = q.shape[1], _table(q.shape[1], q.device)
    real = (table < tokens).T[..., None]  # beyond the end nothing decays, and nothing is added
    q, k, v, decay = (_chunked(each, table) for each in (q, k, v, decay))
    k, decay = k * real, decay * real
    ranges, pairs = _halves(q.dtype, q.device)
    left = (ranges[:, None] @ decay.unsqueeze(2)).exp()  # (batch, heads, levels + 2, c, Q, dk)
    since_start, until_end, within = left[:, :, -2], left[:, :, -1], left[:, :, :-2]
    scores = ((q.unsqueeze(2) * within) @ (k.unsqueeze(2) * within).mT * pairs[:, None]).sum(2)
    scores = scores + torch.diag_embed((q * k).sum(-1))
    entering, last = _entering((k * until_end).mT @ v, decay.sum(-2), state)
    out = scores @ v + (q * since_start) @ entering
    out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return out.index_select(1, torch.arange(tokens, device=q.device)), last


def _table(tokens: int, device: torch.device) -> Tensor:
    """Position of each token of each chunk, (Q, c). A chunk to spare if tracing cannot tell whether there are many."""
    count = (tokens + CHUNK - 1) // CHUNK
    count = count if known(count <= 1) or known(count > 1) else count + 1
    return torch.arange(CHUNK, device=device)[:, None] + CHUNK * torch.arange(count, device=device)


def _chunked(x: Tensor, table: Tensor) -> Tensor:
    """(batch, N, heads, d) -> (batch, heads, c, Q, d), what lies beyond the end repeating the last token."""
    index = table.clamp(max=x.shape[1] - 1).flatten()
    chunks = x.index_select(1, index).unflatten(1, (CHUNK, -1))  # chunks last: split without a guard
    return chunks.permute(0, 3, 2, 1, 4)


def _halves(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which decays lie between a token and the middle of its block at each level, then between it and start and end of
    the chunk, (levels + 2, Q, Q); and which pairs of tokens each level joins, (levels, Q, Q)."""
    token, other = torch.arange(CHUNK, device=device)[:, None], torch.arange(CHUNK, device=device)
    half = 2 ** torch.arange((CHUNK - 1).bit_length(), device=device)[:, None, None]
    same = token // (2 * half) == other // (2 * half)
    right, other_right = token // half % 2 == 1, other // half % 2 == 1
    before, after = other <= token, other > token
    between = same & (right == other_right) & torch.where(right, before, after)
    ranges = torch.cat([between, before[None], after[None]])
    return ranges.to(dtype), (same & right & ~other_right).to(dtype)


def _entering(added: Tensor, change: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States that chunks begin with, (batch, heads, c, dk, dv), and the one after the last.

    Of chunks, what each adds, (batch, heads, c, dk, dv), and the sum of its log decays, (batch, heads, c, dk).
    """
    first = torch.zeros_like(added.sum(2, keepdim=True)) if state is None else state.unsqueeze(2)
    arrivals = torch.cat([first, added], 2).transpose(2, 3)  # (batch, heads, dk, c + 1, dv)
    # Differences are taken of these sums, which float32 would round too coarsely.
    clock = F.pad(change.double().cumsum(2), (0, 0, 1, 0)).mT  # (batch, heads, dk, c + 1)
    difference = clock[..., :, None] - clock[..., None, :]
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=clock.device).triu(1)
    left = difference.masked_fill(later, float("-inf")).to(added.dtype).exp()
    states = (left @ arrivals).transpose(2, 3)
    return states[:, :, :-1], states[:, :, -1]
