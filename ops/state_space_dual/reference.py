"""State space duality in plain torch: the definition, and what runs on a CPU.

Letters: L tokens, H heads of P channels, G groups of r heads, N states; c chunks of Q tokens. The clock of a token is
the sum of Δ A up to and with it, so that a state decays by exp(clock[t] - clock[s]) from token s to token t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

CHUNK = 64
"""Tokens that see each other by one matrix product."""

SEGMENT = 2**13
"""Tokens whose chunks are worked out at once; the product of all chunks with each other bounds it."""

THRESHOLD = 20.0
"""Beyond it, softplus is the identity."""


def state_space_dual_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    causal: bool,
    softplus: bool,
    dt_limit: tuple[float, float] | None,
    states: int,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Computes what `vizoo.ops.state_space_dual` defines: the output and the last state."""
    del return_state  # there always is one
    if B is None or C is None:
        x, B, C = unpacked(x, A.shape[0], states)
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        step = _steps(dt.to(wide), dt_bias, softplus, dt_limit)
        inputs = x.to(wide)
        run = _causal if causal else _global
        before = None if initial_state is None else initial_state.to(wide)
        y, state = run(inputs, step, A.to(wide), B.to(wide), C.to(wide), before)
        if D is not None:
            y = y + inputs * (D if D.ndim == 2 else D[:, None]).to(wide)
        if z is not None:
            y = y * F.silu(z.to(wide))
        return y.to(x.dtype).contiguous(), state


def unpacked(x: Tensor, heads: int, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the three parts of what one projection made, (batch, L, H * P + 2 * N)."""
    inner = x.shape[-1] - 2 * states
    values, B, C = x.split([inner, states, states], -1)
    return values.unflatten(-1, (heads, inner // heads)), B.unsqueeze(2), C.unsqueeze(2)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] | None) -> Tensor:
    """Δ, (batch, L, H)."""
    step = dt if bias is None else dt + bias.to(dt.dtype)
    if softplus:
        step = F.softplus(step, threshold=THRESHOLD)
    return step if limit is None else step.clamp(*limit)


def _global(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every token reads the one sum over all: two products, in which the heads of a group stand side by side."""
    heads, groups, P = x.shape[2], B.shape[2], x.shape[3]
    weighted = (x * (step * -A)[..., None]).unflatten(2, (groups, heads // groups)).flatten(3)  # (batch, L, G, r * P)
    state = B.permute(0, 2, 3, 1) @ weighted.transpose(1, 2)  # (batch, G, N, r * P)
    if initial_state is not None:
        state = state + initial_state.unflatten(1, (groups, heads // groups)).permute(0, 1, 4, 2, 3).flatten(3)
    y = (C.transpose(1, 2) @ state).transpose(1, 2).unflatten(3, (heads // groups, P)).flatten(2, 3)
    return y, state.unflatten(3, (heads // groups, P)).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _causal(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Takes long sequences in segments, so that memory grows with their length alone."""
    if not known(x.shape[1] > SEGMENT):
        return _segment(x, step, A, B, C, initial_state)
    outs, state = [], initial_state
    for parts in zip(*(each.split(SEGMENT, 1) for each in (x, step, B, C)), strict=True):
        out, state = _segment(parts[0], parts[1], A, parts[2], parts[3], state)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


def _segment(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Products within chunks, and of each token with the state that its chunk began with."""
    heads, groups, table = x.shape[2], B.shape[2], _table(x.shape[1], x.device)
    step = _chunked(step, table) * (table < x.shape[1]).T[..., None]  # none beyond the end: no decay, nothing added
    inputs = _by_group(_chunked(x, table) * step[..., None], groups)  # (batch, G, r, c, Q, P)
    B, C = (_by_group(_chunked(each, table), groups) for each in (B, C))  # (batch, G, 1, c, Q, N)
    # Differences are taken of these sums, which float32 would round too coarsely.
    clock = _by_group((step * A).double().cumsum(2)[..., None], groups).squeeze(-1)  # (batch, G, r, c, Q)
    marks = F.pad(clock[..., -1].cumsum(-1), (1, 0))  # (batch, G, r, c + 1): the start, and the end of each chunk

    left = (clock[..., -1:] - clock).exp().to(x.dtype)  # of a token at the end of its chunk
    arrivals = (inputs * left[..., None]).mT @ B  # (batch, G, r, c, P, N)
    first = torch.zeros_like(arrivals[..., :1, :, :])
    if initial_state is not None:
        first = initial_state.unflatten(1, (groups, heads // groups)).unsqueeze(3)
    arrivals = torch.cat([first, arrivals], 3)
    entering = (_decay(marks, x.dtype) @ arrivals.flatten(4)).unflatten(4, arrivals.shape[4:])
    read = clock.exp().to(x.dtype)[..., None] * (C @ entering[..., :-1, :, :].mT)
    y = ((C @ B.mT) * _decay(clock, x.dtype)) @ inputs + read
    y = y.flatten(1, 2).permute(0, 2, 3, 1, 4).flatten(1, 2)
    return y.index_select(1, torch.arange(x.shape[1], device=x.device)), entering[..., -1, :, :].flatten(1, 2)


def _table(L: int, device: torch.device) -> Tensor:
    """Position of each token of each chunk, (Q, c). A chunk to spare if tracing cannot tell whether there are many."""
    count = (L + CHUNK - 1) // CHUNK
    count = count if known(count <= 1) or known(count > 1) else count + 1
    return torch.arange(CHUNK, device=device)[:, None] + CHUNK * torch.arange(count, device=device)


def _chunked(x: Tensor, table: Tensor) -> Tensor:
    """(batch, L, ...) -> (batch, c, Q, ...), what lies beyond the end repeating the last token."""
    index = table.clamp(max=x.shape[1] - 1).flatten()
    return x.index_select(1, index).unflatten(1, (CHUNK, -1)).transpose(1, 2)  # chunks last: split without a guard


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(batch, c, Q, H, ...) -> (batch, G, H / G, c, Q, ...)."""
    return x.permute(0, 3, 1, 2, 4).unflatten(1, (groups, -1))


def _decay(clock: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(clock[t] - clock[s]) where s <= t, else 0: (..., T) -> (..., T, T)."""
    difference = clock[..., :, None] - clock[..., None, :]
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=clock.device).triu(1)
    return difference.masked_fill(later, float("-inf")).to(dtype).exp()
