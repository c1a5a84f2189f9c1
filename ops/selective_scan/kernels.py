"""Triton kernels of the selective scan. A program walks along a sequence with a block of channels of one group.

It holds T tokens x BLOCK_N states x BLOCK_C channels at a time. Tokens come first, so that where states and channels
are enough for all threads, each thread has all tokens of a tile and scans them without the others. With one state that
axis is left out: tiles are T x BLOCK_C, laid out over threads as they lie in memory.
What flows from tile to tile is the state, forward, and a_t λ_t backward, λ being the gradient of the state.
Long sequences are cut into splits for several programs; `split_ends` and `split_starts` find where each begins.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _then(a1, b1, a2, b2):
    """First h -> a1 h + b1, then a2, b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _then_back(a1, e1, f1, a2, e2, f2):
    """Gradient λ = e x + f of the state at a token, with x flowing into a run of tokens from beyond; a λ flows out."""
    through = e2 * a1
    return a2, through * e1, through * f1 + f2


@triton.jit
def _with_states(x, BLOCK_N: tl.constexpr):
    """(T, BLOCK_C) beside an axis of states."""
    return x if BLOCK_N == 1 else x[:, None, :]


@triton.jit
def _with_channels(x, BLOCK_N: tl.constexpr):
    """(T, BLOCK_N) beside an axis of channels."""
    return x if BLOCK_N == 1 else x[:, :, None]


@triton.jit
def _with_tokens(x, BLOCK_N: tl.constexpr):
    """(BLOCK_N, BLOCK_C) beside an axis of tokens."""
    return x if BLOCK_N == 1 else x[None, :, :]


@triton.jit
def _over_states(x, BLOCK_N: tl.constexpr):
    return x if BLOCK_N == 1 else tl.sum(x, 1)


@triton.jit
def _over_channels(x, BLOCK_N: tl.constexpr):
    """Sums (T, BLOCK_N)."""
    return tl.sum(x, 1, keep_dims=True) if BLOCK_N == 1 else tl.sum(x, 2)


@triton.jit
def _over_tokens(x, BLOCK_N: tl.constexpr):
    """Sums over tokens where a thread has them all; else they are left for the end."""
    return x if BLOCK_N == 1 else tl.sum(x, 0, keep_dims=True)


@triton.jit
def _at_token(x, place, T: tl.constexpr, BLOCK_N: tl.constexpr):
    """What belongs to one token of a tile."""
    token = tl.arange(0, T)[:, None] if BLOCK_N == 1 else tl.arange(0, T)[:, None, None]
    return tl.sum(tl.where(token == place, x, 0.0), 0, keep_dims=True)


@triton.jit
def _add_at_token(x, y, place, T: tl.constexpr, BLOCK_N: tl.constexpr):
    token = tl.arange(0, T)[:, None] if BLOCK_N == 1 else tl.arange(0, T)[:, None, None]
    return tl.where(token == place, x + y, x)


@triton.jit
def _states(decay, drive, state, T: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr):
    """State at each token of a tile, and after it."""
    FIRST: tl.constexpr = T - 1 if REVERSE else 0
    _, h = tl.associative_scan(
        (decay, _add_at_token(drive, decay * state, FIRST, T, BLOCK_N)), 0, _then, reverse=REVERSE
    )
    return h, _at_token(h, T - 1 - FIRST, T, BLOCK_N)


@triton.jit
def _adjoints(decay, direct, flow, T: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr):
    """Gradient of the state at each token of a tile, and what flows out to the token before it."""
    FIRST: tl.constexpr = T - 1 if REVERSE else 0
    direct = _add_at_token(direct, flow, T - 1 - FIRST, T, BLOCK_N)
    _, _, gradient = tl.associative_scan(
        (decay, tl.full(decay.shape, 1.0, tl.float32), direct), 0, _then_back, reverse=not REVERSE
    )
    return gradient, _at_token(decay * gradient, FIRST, T, BLOCK_N)


@triton.jit
def _softplus(v):
    e = tl.exp(tl.minimum(v, 20.0))
    small = e * (1.0 - e * (0.5 - e * (0.33333334 - e * (0.25 - e * 0.2))))  # the logarithm has no digits left there
    return tl.where(v > 20.0, v, tl.where(e < 0.0625, small, tl.log(1.0 + e)))


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _step(delta, bias, offset, real, SOFTPLUS: tl.constexpr):
    """Steps of a tile, zero where there is nothing, and what they were before softplus."""
    v = tl.load(delta + offset, mask=real, other=0.0).to(tl.float32) + bias
    step = _softplus(v) if SOFTPLUS else v
    return tl.where(real, step, 0.0), v


@triton.jit
def _offsets(batch, channel, stride_b, stride_c, stride_t, T: tl.constexpr):
    """Of the first tile of the block's channels, (T, BLOCK_C)."""
    rows = batch.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    return (tl.arange(0, T) * stride_t)[:, None] + rows[None, :]


@triton.jit
def _map_offsets(batch, group, stride_b, stride_g, stride_n, stride_t, T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the first tile of the group's map, (T, BLOCK_N)."""
    inner = (tl.arange(0, T) * stride_t)[:, None] + (tl.arange(0, BLOCK_N) * stride_n)[None, :]
    return batch.to(tl.int64) * stride_b + group.to(tl.int64) * stride_g + inner


@triton.jit
def _state_offsets(row, channel, CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one row of states (N, CHANNELS)."""
    places = (tl.arange(0, BLOCK_N) * CHANNELS)[:, None] + channel[None, :]
    return _with_tokens(row.to(tl.int64) * (N * CHANNELS) + places, BLOCK_N)


@triton.jit
def _vector(pointer, channel, mine):
    """Parameters of the block's channels, (1, BLOCK_C); zeros if there are none."""
    if pointer is None:
        return tl.zeros((1, channel.shape[0]), tl.float32)
    return tl.load(pointer + channel, mask=mine, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rates(A, channel, mine, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A (CHANNELS, N), beside an axis of tokens."""
    n = tl.arange(0, BLOCK_N)
    rate = tl.load(A + channel[None, :] * N + n[:, None], mask=(n < N)[:, None] & mine[None, :], other=0.0)
    return _with_tokens(rate.to(tl.float32), BLOCK_N)


@triton.jit
def _kept_states(mine, N: tl.constexpr, BLOCK_N: tl.constexpr):
    return _with_tokens((tl.arange(0, BLOCK_N) < N)[:, None] & mine[None, :], BLOCK_N)


@triton.jit
def _place(splits, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's image, split and group, its channels, and which of them are in the group."""
    program = tl.program_id(0)
    block, group = program % BLOCKS, program // BLOCKS % GROUPS
    rest = program // (BLOCKS * GROUPS)
    within = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return rest // splits, rest % splits, group, block, group * EACH + within, within < EACH


@triton.jit
def _multiple(stride, ALIGN: tl.constexpr):
    """The same number; compilers learn that ALIGN divides it, and read as much at once."""
    return stride if ALIGN == 1 else stride // ALIGN * ALIGN


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def forward(
    u, delta, A, B, C, D, z, bias, start, out, last, states, L, tiles, tiles_each, splits,
    u_b, u_c, u_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, out_b, out_c, out_t,
    B_b, B_g, B_n, B_t, C_b, C_g, C_n, C_t,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Output; the state at the start of each tile, (batch, tiles, N, channels), and the last, (batch, N, channels).

    `start` holds the state before each split, (batch, splits, N, channels). What is None is zero, or not written.
    """
    batch, split, group, _, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    CHANNELS: tl.constexpr = GROUPS * EACH
    L = _multiple(L, ALIGN)
    u += _offsets(batch, channel, _multiple(u_b, ALIGN), _multiple(u_c, ALIGN), u_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    out += _offsets(batch, channel, _multiple(out_b, ALIGN), _multiple(out_c, ALIGN), out_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    B += _map_offsets(batch, group, _multiple(B_b, ALIGN), _multiple(B_g, ALIGN), B_n, B_t, T, BLOCK_N)
    C += _map_offsets(batch, group, _multiple(C_b, ALIGN), _multiple(C_g, ALIGN), C_n, C_t, T, BLOCK_N)
    rate = _rates(A, channel, mine, N, BLOCK_N) * 1.4426950408889634
    skip, bias = _vector(D, channel, mine), _vector(bias, channel, mine)
    kept = _kept_states(mine, N, BLOCK_N)
    state = rate * 0.0
    if start is not None:
        place = _state_offsets(batch * splits + split, channel, CHANNELS, N, BLOCK_N)
        state = tl.load(start + place, mask=kept, other=0.0)
    for i in range(tl.minimum(tiles_each, tiles - split * tiles_each)):
        tile = split * tiles_each + i
        if REVERSE:
            tile = tiles - 1 - tile
        if states is not None:
            tl.store(states + _state_offsets(batch * tiles + tile, channel, CHANNELS, N, BLOCK_N), state, mask=kept)
        first = tile.to(tl.int64) * T
        token = first + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        step, _ = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        x = tl.load(u + first * u_t, mask=real, other=0.0).to(tl.float32)
        b = tl.load(B + first * B_t, mask=there, other=0.0).to(tl.float32)
        c = tl.load(C + first * C_t, mask=there, other=0.0).to(tl.float32)
        decay = tl.exp2(_with_states(step, BLOCK_N) * rate)
        drive = _with_states(step * x, BLOCK_N) * _with_channels(b, BLOCK_N)
        h, state = _states(decay, drive, state, T, BLOCK_N, REVERSE)
        y = _over_states(h * _with_channels(c, BLOCK_N), BLOCK_N) + skip * x
        if z is not None:
            gate = tl.load(z + first * z_t, mask=real, other=0.0).to(tl.float32)
            y *= gate * _sigmoid(gate)
        tl.store(out + first * out_t, y.to(out.dtype.element_ty), mask=real)
    if last is not None:
        place = last + _state_offsets(batch, channel, CHANNELS, N, BLOCK_N)
        tl.store(place, state, mask=kept & (split == splits - 1))


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def backward(
    grad, u, delta, A, B, C, D, z, bias, states, flows,
    grad_u, grad_delta, grad_z, parts_B, parts_C, parts_A, parts_D, parts_bias, grad_start,
    L, tiles, tiles_each, splits,
    g_b, g_c, g_t, u_b, u_c, u_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, out_b, out_c, out_t,
    B_b, B_g, B_n, B_t, C_b, C_g, C_n, C_t, part, part_b, part_g, part_n, part_t,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of u, delta and z; each block's part of those of B and C, each program's of those of A, D and bias.

    `flows` holds what flows into each split from the one behind it, (batch, splits, N, channels), `grad_start`, of
    the shape of a state, what flows out in the end. Parts of A are (batch, splits, N, channels), of D and bias
    (batch, splits, channels).
    """
    batch, split, group, block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    CHANNELS: tl.constexpr = GROUPS * EACH
    L = _multiple(L, ALIGN)
    grad += _offsets(batch, channel, _multiple(g_b, ALIGN), _multiple(g_c, ALIGN), g_t, T)
    u += _offsets(batch, channel, _multiple(u_b, ALIGN), _multiple(u_c, ALIGN), u_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    places = _offsets(batch, channel, _multiple(out_b, ALIGN), _multiple(out_c, ALIGN), out_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    B += _map_offsets(batch, group, _multiple(B_b, ALIGN), _multiple(B_g, ALIGN), B_n, B_t, T, BLOCK_N)
    C += _map_offsets(batch, group, _multiple(C_b, ALIGN), _multiple(C_g, ALIGN), C_n, C_t, T, BLOCK_N)
    map_places = _map_offsets(batch, group, part_b, part_g, part_n, part_t, T, BLOCK_N) + block.to(tl.int64) * part
    A_rate = _rates(A, channel, mine, N, BLOCK_N)
    rate = A_rate * 1.4426950408889634
    skip, bias = _vector(D, channel, mine), _vector(bias, channel, mine)
    kept = _kept_states(mine, N, BLOCK_N)
    row = batch * splits + split
    flow = rate * 0.0
    if flows is not None:
        flow = tl.load(flows + _state_offsets(row, channel, CHANNELS, N, BLOCK_N), mask=kept, other=0.0)
    SUMS: tl.constexpr = T if BLOCK_N == 1 else 1
    by_D, by_bias = tl.zeros((SUMS, BLOCK_C), tl.float32), tl.zeros((SUMS, BLOCK_C), tl.float32)
    by_A = by_D if BLOCK_N == 1 else rate * 0.0
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    for i in range(count):
        tile = split * tiles_each + count - 1 - i
        if REVERSE:
            tile = tiles - 1 - tile
        first = tile.to(tl.int64) * T
        token = first + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        state = tl.load(
            states + _state_offsets(batch * tiles + tile, channel, CHANNELS, N, BLOCK_N), mask=kept, other=0.0
        )
        step, v = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        x = tl.load(u + first * u_t, mask=real, other=0.0).to(tl.float32)
        b = tl.load(B + first * B_t, mask=there, other=0.0).to(tl.float32)
        c = tl.load(C + first * C_t, mask=there, other=0.0).to(tl.float32)
        by_y = tl.load(grad + first * g_t, mask=real, other=0.0).to(tl.float32)
        decay = tl.exp2(_with_states(step, BLOCK_N) * rate)
        drive = _with_states(step * x, BLOCK_N) * _with_channels(b, BLOCK_N)
        h, _ = _states(decay, drive, state, T, BLOCK_N, REVERSE)
        if z is not None:
            gate = tl.load(z + first * z_t, mask=real, other=0.0).to(tl.float32)
            open = _sigmoid(gate)
            y = _over_states(h * _with_channels(c, BLOCK_N), BLOCK_N) + skip * x
            by_z = by_y * y * open * (1.0 + gate * (1.0 - open))
            tl.store(grad_z + places + first * out_t, by_z.to(grad_z.dtype.element_ty), mask=real)
            by_y *= gate * open
        direct = _with_states(by_y, BLOCK_N) * _with_channels(c, BLOCK_N)
        by_h, flow = _adjoints(decay, direct, flow, T, BLOCK_N, REVERSE)
        # Of the decayed state before: what has come in is known, and taken off again.
        by_decay = by_h * (h - drive)
        by_drive = _over_states(by_h * _with_channels(b, BLOCK_N), BLOCK_N)
        by_step = _over_states(by_decay * A_rate, BLOCK_N) + by_drive * x
        if SOFTPLUS:
            by_step *= tl.where(v > 20.0, 1.0, _sigmoid(v))
        by_step = tl.where(real, by_step, 0.0)
        by_x = step * by_drive + skip * by_y
        tl.store(grad_u + places + first * out_t, by_x.to(grad_u.dtype.element_ty), mask=real)
        tl.store(grad_delta + places + first * out_t, by_step.to(grad_delta.dtype.element_ty), mask=real)
        by_b = _over_channels(by_h * _with_states(step * x, BLOCK_N), BLOCK_N)
        by_c = _over_channels(h * _with_states(by_y, BLOCK_N), BLOCK_N)
        tl.store(parts_B + map_places + first * part_t, by_b, mask=there)
        tl.store(parts_C + map_places + first * part_t, by_c, mask=there)
        by_A += _over_tokens(by_decay * _with_states(step, BLOCK_N), BLOCK_N)
        by_D += _over_tokens(by_y * x, BLOCK_N)
        by_bias += _over_tokens(by_step, BLOCK_N)
    by_A = tl.sum(by_A, 0, keep_dims=True)
    tl.store(parts_A + _state_offsets(row, channel, CHANNELS, N, BLOCK_N), by_A, mask=kept)
    vector = row.to(tl.int64) * CHANNELS + channel
    if D is not None:
        tl.store(parts_D + vector, tl.sum(by_D, 0), mask=mine)
    if parts_bias is not None:
        tl.store(parts_bias + vector, tl.sum(by_bias, 0), mask=mine)
    if grad_start is not None:
        place = grad_start + _state_offsets(batch, channel, CHANNELS, N, BLOCK_N)
        tl.store(place, flow, mask=kept & (split == 0))


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def split_ends(
    x, delta, A, M, z, bias, ends, sums, L, tiles, tiles_each, splits,
    x_b, x_c, x_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, M_b, M_g, M_n, M_t,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
    T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each split adds to what flows through it, (batch, splits, N, channels), and the sum of its steps.

    Forward, x is u and M is B; backward, x is the gradient of the output and M is C.
    """
    batch, split, group, _, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    CHANNELS: tl.constexpr = GROUPS * EACH
    TOWARDS_FIRST: tl.constexpr = REVERSE != BACKWARD
    L = _multiple(L, ALIGN)
    x += _offsets(batch, channel, _multiple(x_b, ALIGN), _multiple(x_c, ALIGN), x_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    M += _map_offsets(batch, group, _multiple(M_b, ALIGN), _multiple(M_g, ALIGN), M_n, M_t, T, BLOCK_N)
    rate = _rates(A, channel, mine, N, BLOCK_N) * 1.4426950408889634
    bias = _vector(bias, channel, mine)
    end, steps = rate * 0.0, tl.zeros((1, BLOCK_C), tl.float32)
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    for i in range(count):
        tile = split * tiles_each + (count - 1 - i if BACKWARD else i)
        if REVERSE:
            tile = tiles - 1 - tile
        first = tile.to(tl.int64) * T
        token = first + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        step, _ = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        added = tl.load(x + first * x_t, mask=real, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + first * z_t, mask=real, other=0.0).to(tl.float32)
            added *= gate * _sigmoid(gate)
        m = tl.load(M + first * M_t, mask=there, other=0.0).to(tl.float32)
        behind = tl.cumsum(step, 0, reverse=not TOWARDS_FIRST)  # from each token to where the tile is left
        if not BACKWARD:
            behind -= step
            added *= step
        left = tl.exp2(_with_states(behind, BLOCK_N) * rate)
        through = tl.sum(step, 0, keep_dims=True)
        new = tl.sum(left * _with_states(added, BLOCK_N) * _with_channels(m, BLOCK_N), 0, keep_dims=True)
        end = tl.exp2(_with_states(through, BLOCK_N) * rate) * end + new
        steps += through
    row = batch * splits + split
    tl.store(ends + _state_offsets(row, channel, CHANNELS, N, BLOCK_N), end, mask=_kept_states(mine, N, BLOCK_N))
    tl.store(sums + row.to(tl.int64) * CHANNELS + channel[None, :], steps, mask=mine[None, :])


@triton.jit(do_not_specialize=["splits"])
def split_starts(
    ends, sums, A, start, splits,
    CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Replaces what each split adds by what flows into it; into the first flows `start`, (batch, N, channels)."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    batch, _, _, _, channel, mine = _place(1, BLOCKS, 1, CHANNELS, BLOCK_C)
    rate = _rates(A, channel, mine, N, BLOCK_N) * 1.4426950408889634
    kept = _kept_states(mine, N, BLOCK_N)
    flow = rate * 0.0
    if start is not None:
        flow = tl.load(start + _state_offsets(batch, channel, CHANNELS, N, BLOCK_N), mask=kept, other=0.0)
    for i in range(splits):
        row = batch * splits + (splits - 1 - i if BACKWARD else i)
        place = ends + _state_offsets(row, channel, CHANNELS, N, BLOCK_N)
        end = tl.load(place, mask=kept, other=0.0)
        steps = tl.load(sums + row.to(tl.int64) * CHANNELS + channel, mask=mine, other=0.0)[None, :]
        tl.store(place, flow, mask=kept)
        flow = tl.exp2(_with_states(steps, BLOCK_N) * rate) * flow + end
