"""The selective scan in plain torch: the definition, and what runs on a CPU.

Letters: L tokens, N states of each channel, d channels of a group, G groups, Q = CHUNK tokens of a chunk; "..." are any
leading axes, batch and groups for instance. With step Δ_t, token by token,

    h_t = exp(Δ_t A) h_(t-1) + Δ_t u_t B_t        y_t = C_t · h_t

No loop runs over all tokens. All chunks are walked side by side, first from zero for what each adds by its end; that is
a scan again, Q times shorter, whose steps are the sums of the chunks' steps; then from the states it gives. Steps are
only ever added up, and exponents are those of the definition: nothing overflows that does not by definition.
Compilers get the same in few operations, which they fuse: what each token leaves at each later one of its chunk. Where
the number of tokens is free, chunks cannot be cut without rules for it: then each token takes in the 1, 2, 4 .. before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops.tracing import known, without_autocast

CHUNK = 16
TRACED_CHUNKS = (8, 16)
"""Those of compilers: of tokens, of chunks, and all that remain are one."""
MOST_DOUBLINGS = 20
"""Where the number of tokens is free, it may be up to 2 to this power, a million."""
WORKING_SET = 2**22
"""States computed at a time on a CPU, about: its caches hold them. Without gradients no others are kept."""


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
    most = WORKING_SET if state.device.type == "cpu" else 16 * WORKING_SET  # a GPU wants more at a time
    tokens = max(CHUNK**2, most // max(1, state.numel()) // CHUNK**2 * CHUNK**2)
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
    if torch.compiler.is_compiling():
        drive = (step * u)[..., None, :] * B[..., None]
        doublings, fixed = _doublings(length)
        if fixed:
            states = _scan_traced(step, A, drive, state, reverse, TRACED_CHUNKS)
        else:
            states = _scan_free(step, A, drive, state, reverse, doublings)
    else:
        if length > CHUNK:
            u, step, B = (_filled(tensor, -2, CHUNK) for tensor in (u, step, B))
        states = _scan(step, A, (step * u)[..., None, :] * B[..., None], state, reverse)
    # Tokens filled in at the end change no state.
    return states[..., :length, :, :], states[..., 0 if reverse else -1, :, :]


def _filled(tensor: Tensor, axis: int, chunk: int) -> Tensor:
    """Zeros up to a whole number of chunks. Tokens whose step is zero leave the state as it is."""
    length = tensor.shape[axis]
    missing = (length + chunk - 1) // chunk * chunk - length
    return tensor if known(missing == 0) else F.pad(tensor, (0, 0) * (-1 - axis) + (0, missing))


def _chunks(step: Tensor, drive: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The axis of tokens cut in two, chunks and tokens of a chunk."""
    sizes = (drive.shape[-3] + chunk - 1) // chunk, chunk
    return _filled(step, -2, chunk).unflatten(-2, sizes), _filled(drive, -3, chunk).unflatten(-3, sizes)


def _scan(step: Tensor, A: Tensor, drive: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """States (..., L, N, d) of h_t = exp(step_t A) h_(t-1) + drive_t, drive being (..., L, N, d)."""
    length = drive.shape[-3]
    if length <= CHUNK:
        return torch.stack(_walk(_decay(step, A[..., None, :, :]), drive, state, reverse), -3)
    step, drive = _chunks(step, drive, CHUNK)
    decay = _decay(step, A[..., None, None, :, :])
    added = _walk(decay, drive, None, reverse)[0 if reverse else -1]
    ends = _scan(step.sum(-2), A, added, state, reverse)
    states = _walk(decay, drive, _moved(ends, state, reverse), reverse)
    return torch.stack(states, -3).flatten(-4, -3)[..., :length, :, :]


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


def _doublings(length: int) -> tuple[int, bool]:
    """How often 1 is to be doubled to reach a length, and whether that is all: whether the length is fixed."""
    for count in range(MOST_DOUBLINGS + 1):
        if known(length <= 2**count):
            return count, count == 0 or known(length > 2 ** (count - 1))
    return MOST_DOUBLINGS, known(length > 2**MOST_DOUBLINGS)


def _scan_free(step: Tensor, A: Tensor, drive: Tensor, state: Tensor, reverse: bool, doublings: int) -> Tensor:
    """What `_scan` computes, without any size but those of its inputs."""
    decay = _decay(step, A[..., None, :, :])
    states, through = drive, decay
    for distance in (2**count for count in range(doublings)):
        states = torch.addcmul(states, through, _shifted(states, distance, reverse, 0.0))
        through = through * _shifted(through, distance, reverse, 1.0)
    return torch.addcmul(states, through, state[..., None, :, :])


def _shifted(tensor: Tensor, distance: int, reverse: bool, value: float) -> Tensor:
    """What lies so many tokens before each, (..., L, N, d)."""
    if reverse:
        return F.pad(tensor, (0, 0, 0, 0, 0, distance), value=value)[..., distance:, :, :]
    return F.pad(tensor, (0, 0, 0, 0, distance, 0), value=value)[..., :-distance, :, :]


def _scan_traced(
    step: Tensor, A: Tensor, drive: Tensor, state: Tensor, reverse: bool, chunks: tuple[int, ...]
) -> Tensor:
    """What `_scan` computes, for compilers. Chunks of `chunks` tokens, and of what remains when there are no more."""
    length = drive.shape[-3]
    if not chunks:
        return _pairs(step, A, drive, state[..., None, :, :], reverse)
    step, drive = _chunks(step, drive, chunks[0])
    rates = A[..., None, :, :]
    until = (step.cumsum(-2) if reverse else step.flip(-2).cumsum(-2).flip(-2)) - step
    added = (_decay(until, rates[..., None, :, :]) * drive).sum(-3)
    ends = _scan_traced(step.sum(-2), A, added, state, reverse, chunks[1:])
    starts = _moved(ends, state, reverse)[..., None, :, :]
    return _pairs(step, rates, drive, starts, reverse).flatten(-4, -3)[..., :length, :, :]


def _pairs(step: Tensor, A: Tensor, drive: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """States from what each token leaves at each later one, and the start, (..., 1, N, d), at all."""
    since = step.flip(-2).cumsum(-2).flip(-2) if reverse else step.cumsum(-2)
    later = torch.ones(step.shape[-2], step.shape[-2], dtype=torch.bool, device=step.device)
    later = (later.triu() if reverse else later.tril())[..., None]
    between = torch.where(later, since[..., :, None, :] - since[..., None, :, :], 0.0)
    left = torch.where(later[..., None], _decay(between, A[..., None, None, :, :]), 0.0)
    return (left * drive[..., None, :, :, :]).sum(-3) + _decay(since, A[..., None, :, :]) * start
