"""The selective scan in plain torch: the definition, and what runs on a CPU.

Letters: L tokens, N states of each channel, d channels of a group, G groups, Q = CHUNK tokens of a chunk; "..." are any
leading axes, batch and groups for instance. With step Δ_t, token by token,

    h_t = exp(Δ_t A) h_(t-1) + Δ_t u_t B_t        y_t = C_t · h_t

No loop runs over all tokens. All chunks are walked side by side, first from zero for what each adds by its end; that is
a scan again, Q times shorter, whose steps are the sums of the chunks' steps; then from the states it gives. Steps are
only ever added up, and exponents are those of the definition: nothing overflows that does not by definition.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

CHUNK = 16
DEPTH = 3
"""Scans of scans at most, for traces leave the number of tokens free: their recursion has to end somewhere."""
WORKING_SET = 2**22
"""States computed at a time, about: caches and memory hold them, and with gradients off nothing else is kept."""


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    return_state: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes what `vizoo.ops.selective_scan` defines; the last state is empty unless it is to be returned."""
    wide = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[1]

    def grouped(tensor: Tensor, axis: int) -> Tensor:
        """Channels cut into groups, (..., G, d, X), and their last axis before them, (..., G, X, d)."""
        return tensor.to(wide).unflatten(axis, (groups, tensor.shape[axis] // groups)).transpose(-1, -2)

    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)[:, None]
    if softplus:
        step = F.softplus(step)
    y, last = scan_sequences(
        grouped(u, 1),
        grouped(step, 1),
        grouped(A, 0),
        B.to(wide).transpose(-1, -2),
        C.to(wide).transpose(-1, -2),
        initial_state=None if initial_state is None else grouped(initial_state, 1),
        reverse=reverse,
    )
    out = y.transpose(-1, -2).flatten(1, 2)
    if D is not None:
        out = out + D.to(wide)[:, None] * u.to(wide)
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(dtype), last.transpose(-1, -2).flatten(1, 2) if return_state else last.new_empty(0)


def scan_sequences(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scans sequences whose channels lie last. All tensors have one dtype, and leading axes that broadcast.

    Args:
        u: Input, (..., L, d).
        step: Δ, with bias and softplus where there are any, (..., L, d).
        A: Rate of each state, (..., N, d).
        B: Input map, (..., L, N).
        C: Output map, (..., L, N).
        initial_state: State before the first token, (..., N, d); zero unless given.
        reverse: Scan from the last token to the first.

    Returns:
        y, (..., L, d), without skip and gate; and the state after the last token scanned, (..., N, d).
    """
    N, d = A.shape[-2:]
    lead = torch.broadcast_shapes(u.shape[:-2], step.shape[:-2], A.shape[:-2], B.shape[:-2], C.shape[:-2])
    state = u.new_zeros(*lead, N, d) if initial_state is None else initial_state.expand(*lead, N, d)
    outputs = []
    for part in _segments(u.shape[-2], state, reverse):
        u_part, step_part, B_part, C_part = (
            tensor if part is None else tensor[..., part, :] for tensor in (u, step, B, C)
        )
        states, state = _states_of(u_part, step_part, A, B_part, state, reverse)
        outputs.append(_read(states, C_part))
    if len(outputs) == 1:
        return outputs[0], state
    return torch.cat(outputs[::-1] if reverse else outputs, -2), state


def _segments(length: int, state: Tensor, reverse: bool) -> Iterable[slice | None]:
    """Parts of a sequence to scan one after the other; None for all of it. Traces hold the sequence in one."""
    if torch.compiler.is_compiling():
        return [None]
    tokens = max(CHUNK**2, WORKING_SET // max(1, state.numel()) // CHUNK**2 * CHUNK**2)
    if length <= tokens:
        return [None]
    begins = range(0, length, tokens)
    return [slice(begin, begin + tokens) for begin in (reversed(begins) if reverse else begins)]


def _read(states: Tensor, C: Tensor) -> Tensor:
    """C · h of each token."""
    if states.shape[-2] == 1:
        return states.squeeze(-2) * C
    with without_autocast(states.device):
        return (C[..., None, :] @ states).squeeze(-2)


def _states_of(u: Tensor, step: Tensor, A: Tensor, B: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """States at each token, (..., L, N, d), and after the last token scanned, (..., N, d)."""
    length = u.shape[-2]
    if not known(length <= CHUNK):
        u, step, B = _filled(u, -2), _filled(step, -2), _filled(B, -2)
    states = _scan(step, A, (step * u)[..., None, :] * B[..., None], state, reverse, DEPTH)
    # Tokens filled in at the end change no state.
    return states[..., :length, :, :], states[..., 0 if reverse else -1, :, :]


def _filled(tensor: Tensor, axis: int) -> Tensor:
    """Zeros up to a whole number of chunks. Tokens whose step is zero leave the state as it is."""
    missing = -tensor.shape[axis] % CHUNK
    return tensor if known(missing == 0) else F.pad(tensor, (0, 0) * (-1 - axis) + (0, missing))


def _scan(step: Tensor, A: Tensor, drive: Tensor, state: Tensor, reverse: bool, depth: int) -> Tensor:
    """States (..., L, N, d) of h_t = exp(step_t A) h_(t-1) + drive_t, drive being (..., L, N, d)."""
    if known(drive.shape[-3] <= CHUNK):
        return torch.stack(_walk(_decay(step, A[..., None, :, :]), drive, state, reverse), -3)
    if depth == 0:
        return _pairs(step, A, drive, state, reverse)
    length = drive.shape[-3]
    chunks = (-(-length // CHUNK), CHUNK)
    step, drive = _filled(step, -2).unflatten(-2, chunks), _filled(drive, -3).unflatten(-3, chunks)
    decay = _decay(step, A[..., None, None, :, :])
    added = _walk(decay, drive, None, reverse)[0 if reverse else -1]
    ends = _scan(step.sum(-2), A, added, state, reverse, depth - 1)
    starts = _moved(ends, state, reverse)
    return torch.stack(_walk(decay, drive, starts, reverse), -3).flatten(-4, -3)[..., :length, :, :]


def _pairs(step: Tensor, A: Tensor, drive: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """What `_scan` computes, by what each token leaves at each later one: for few tokens."""
    if reverse:
        return _pairs(step.flip(-2), A, drive.flip(-3), state, False).flip(-3)
    drive = torch.cat((state[..., None, :, :], drive), -3)
    until = F.pad(step.cumsum(-2), (0, 0, 1, 0))
    earlier = torch.ones(drive.shape[-3], drive.shape[-3], dtype=torch.bool, device=drive.device).tril()[..., None]
    between = torch.where(earlier, until[..., :, None, :] - until[..., None, :, :], 0.0)
    left = torch.where(earlier[..., None], _decay(between, A[..., None, None, :, :]), 0.0)
    return (left * drive[..., None, :, :, :]).sum(-3)[..., 1:, :, :]


def _decay(step: Tensor, A: Tensor) -> Tensor:
    return torch.exp(step[..., None, :] * A)


def _walk(decay: Tensor, drive: Tensor, state: Tensor | None, reverse: bool) -> list[Tensor]:
    """The states at the tokens of axis -3, all that lies around them side by side."""
    tokens = list(zip(decay.unbind(-3), drive.unbind(-3), strict=True))
    states = []
    for a, b in reversed(tokens) if reverse else tokens:
        state = b if state is None else torch.addcmul(b, a, state)
        states.append(state)
    return states[::-1] if reverse else states


def _moved(ends: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """The state at the start of each chunk from those at their ends."""
    first = state[..., None, :, :]
    if reverse:
        return torch.cat((ends, first), -3)[..., 1:, :, :]
    return torch.cat((first, ends), -3)[..., :-1, :, :]
