"""Triton kernels of the selective scan. A program walks along a sequence with a block of channels of one group.

It holds T tokens x BLOCK_N states x BLOCK_C channels at a time. Tokens come first, so that where states and channels
are enough for all threads, each thread has all tokens of a tile and scans them without the others. FLAT tiles, for one
state, are T x BLOCK_C, and spread over threads as they lie in memory: a thread has a few tokens in a row.
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
def _with_states(x, FLAT: tl.constexpr):
    """(T, BLOCK_C) beside an axis of states."""
    return x if FLAT else x[:, None, :]


@triton.jit
def _with_channels(x, FLAT: tl.constexpr):
    """(T, BLOCK_N) beside an axis of channels; where that of states is missing, it has been loaded for each channel."""
    return x if FLAT else x[:, :, None]


@triton.jit
def _with_tokens(x, FLAT: tl.constexpr):
    """(BLOCK_N, BLOCK_C) beside an axis of tokens."""
    return x if FLAT else x[None, :, :]


@triton.jit
def _over_states(x, FLAT: tl.constexpr):
    return x if FLAT else tl.sum(x, 1)


@triton.jit
def _over_tokens(x, FLAT: tl.constexpr):
    """Sums, (BLOCK_N, BLOCK_C)."""
    return tl.sum(x, 0, keep_dims=True) if FLAT else tl.sum(x, 0)


@triton.jit
def _over_channels(x, FLAT: tl.constexpr, DOT: tl.constexpr):
    """Sums, (T, BLOCK_N); on tensor cores if DOT, for which numbers are cut to tf32."""
    if DOT:
        rows = tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))
        total = tl.dot(rows, tl.full((x.shape[2], 16), 1.0 / 16, tl.float32), input_precision="tf32")
        total = tl.reshape(tl.sum(total, 1), (x.shape[0], x.shape[1]))
    elif FLAT:
        total = tl.sum(x, 1, keep_dims=True)
    else:
        total = tl.sum(x, 2)
    return total


@triton.jit
def _tokens(T: tl.constexpr, FLAT: tl.constexpr):
    token = tl.arange(0, T)
    return token[:, None] if FLAT else token[:, None, None]


@triton.jit
def _flipped(x, LOG_T: tl.constexpr):
    """Tokens the other way round, by swapping halves, quarters and so on: where a thread has them all, registers get
    other names and nothing is computed. (Scans that go backward move everything between threads to flip it.)
    """
    bits = x.to(tl.int32, bitcast=True)
    for i in tl.static_range(LOG_T):
        bits = tl.reshape(bits, (2**i, 2, x.numel // 2 ** (i + 1)))
        bits ^= tl.xor_sum(bits, 1, keep_dims=True)
    return tl.reshape(bits, x.shape).to(tl.float32, bitcast=True)


@triton.jit
def _states(decay, drive, state, LOG_T: tl.constexpr, FLAT: tl.constexpr, REVERSE: tl.constexpr):
    """State at each token of a tile, and after it."""
    LAST: tl.constexpr = 2**LOG_T - 1
    token = _tokens(LAST + 1, FLAT)
    drive = tl.where(token == (LAST if REVERSE else 0), drive + decay * _with_tokens(state, FLAT), drive)
    if REVERSE and not FLAT:
        _, h = tl.associative_scan((_flipped(decay, LOG_T), _flipped(drive, LOG_T)), 0, _then)
        h = _flipped(h, LOG_T)
    else:
        _, h = tl.associative_scan((decay, drive), 0, _then, reverse=REVERSE)
    return h, _over_tokens(tl.where(token == (0 if REVERSE else LAST), h, 0.0), FLAT)


@triton.jit
def _adjoints(decay, direct, flow, LOG_T: tl.constexpr, FLAT: tl.constexpr, REVERSE: tl.constexpr):
    """Gradient of the state at each token of a tile, and what flows out to the token before it."""
    LAST: tl.constexpr = 2**LOG_T - 1
    token = _tokens(LAST + 1, FLAT)
    direct = tl.where(token == (0 if REVERSE else LAST), direct + _with_tokens(flow, FLAT), direct)
    one = tl.full(decay.shape, 1.0, tl.float32)
    if REVERSE or FLAT:
        _, _, grad = tl.associative_scan((decay, one, direct), 0, _then_back, reverse=not REVERSE)
    else:
        flipped = (_flipped(decay, LOG_T), one, _flipped(direct, LOG_T))
        _, _, grad = tl.associative_scan(flipped, 0, _then_back)
        grad = _flipped(grad, LOG_T)
    return grad, _over_tokens(tl.where(token == (LAST if REVERSE else 0), decay * grad, 0.0), FLAT)


@triton.jit
def _softplus(v):
    """max(v, 0) + log(1 + t), t = exp(-|v|), by a polynomial for log(1 + t) / t that is off by 2e-7 at most.

    The logarithm itself takes longer than the rest of a token. Beyond v = 20 this is v to the last digit.
    """
    t = tl.exp(-tl.abs(v))
    p = 0.04408963769674301 - 0.008539210073649883 * t
    p = 0.17745241522789001 - t * (0.10768172144889832 - t * p)
    p = 0.33275479078292847 - t * (0.24495463073253632 - t * p)
    p = 0.9999998211860657 - t * (0.4999740421772003 - t * p)
    return tl.maximum(v, 0.0) + t * p


@triton.jit
def _sigmoid(v):
    t = tl.exp(-tl.abs(v))
    return tl.where(v < 0.0, t, 1.0) / (1.0 + t)


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
def _load_map(pointer, real, there, FLAT: tl.constexpr):
    """A tile of B or C in float32. In flat tiles each thread reads what its channels need, as it reads u."""
    if FLAT:
        tile = tl.load(tl.broadcast_to(pointer, real.shape), mask=real, other=0.0)
    elif there.shape[1] == 1:
        # As many places as threads of a warp, so that each token is read by one of them, not all of them by each.
        reader = tl.arange(0, 32)[None, :]
        tile = tl.load(tl.broadcast_to(pointer, (there.shape[0], 32)), mask=there & (reader == 0), other=0.0)
        tile = tl.sum(tile.to(tl.float32), 1, keep_dims=True)
    else:
        tile = tl.load(pointer, mask=there, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _state_offsets(row, channel, CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one row of states (N, CHANNELS)."""
    places = (tl.arange(0, BLOCK_N) * CHANNELS)[:, None] + channel[None, :]
    return row.to(tl.int64) * (N * CHANNELS) + places


@triton.jit
def _vector(pointer, channel, mine):
    """Parameters of the block's channels, (1, BLOCK_C); zeros if there are none."""
    if pointer is None:
        vector = tl.zeros(channel.shape, tl.float32)
    else:
        vector = tl.load(pointer + channel, mask=mine, other=0.0).to(tl.float32)
    return vector[None, :]


@triton.jit
def _rates(A, channel, mine, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A (CHANNELS, N) of the block, (BLOCK_N, BLOCK_C)."""
    n = tl.arange(0, BLOCK_N)
    rate = tl.load(A + channel[None, :] * N + n[:, None], mask=(n < N)[:, None] & mine[None, :], other=0.0)
    return rate.to(tl.float32)


@triton.jit
def _kept_states(mine, N: tl.constexpr, BLOCK_N: tl.constexpr):
    return (tl.arange(0, BLOCK_N) < N)[:, None] & mine[None, :]


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
    LOG_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Output; the state at the start of each tile, (batch, tiles, N, channels), and the last, (batch, N, channels).

    `start` holds the state before each split, (batch, splits, N, channels). What is None is zero, or not written.
    """
    batch, split, group, _block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    T: tl.constexpr = 2**LOG_T
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
        token = tile * T + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        step, _v = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        x = tl.load(u + first * u_t, mask=real, other=0.0).to(tl.float32)
        b = _load_map(B + first * B_t, real, there, FLAT)
        c = _load_map(C + first * C_t, real, there, FLAT)
        decay = tl.exp2(_with_states(step, FLAT) * _with_tokens(rate, FLAT))
        drive = _with_states(step * x, FLAT) * _with_channels(b, FLAT)
        h, state = _states(decay, drive, state, LOG_T, FLAT, REVERSE)
        y = _over_states(h * _with_channels(c, FLAT), FLAT) + skip * x
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
    LOG_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of u, delta and z; each block's part of those of B and C, each program's of those of A, D and bias.

    `flows` holds what flows into each split from the one behind it, (batch, splits, N, channels), `grad_start`, of
    the shape of a state, what flows out in the end. Parts of A are (batch, splits, N, channels), of D and bias
    (batch, splits, channels).
    """
    batch, split, group, block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    T: tl.constexpr = 2**LOG_T
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
    by_A = tl.zeros((T if FLAT else BLOCK_N, BLOCK_C), tl.float32)
    by_D, by_bias = tl.zeros((T, BLOCK_C), tl.float32), tl.zeros((T, BLOCK_C), tl.float32)
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    for i in range(count):
        tile = split * tiles_each + count - 1 - i
        if REVERSE:
            tile = tiles - 1 - tile
        first = tile.to(tl.int64) * T
        token = tile * T + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        state = tl.load(
            states + _state_offsets(batch * tiles + tile, channel, CHANNELS, N, BLOCK_N), mask=kept, other=0.0
        )
        step, v = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        x = tl.load(u + first * u_t, mask=real, other=0.0).to(tl.float32)
        b = _load_map(B + first * B_t, real, there, FLAT)
        c = _load_map(C + first * C_t, real, there, FLAT)
        by_y = tl.load(grad + first * g_t, mask=real, other=0.0).to(tl.float32)
        decay = tl.exp2(_with_states(step, FLAT) * _with_tokens(rate, FLAT))
        drive = _with_states(step * x, FLAT) * _with_channels(b, FLAT)
        h, _state = _states(decay, drive, state, LOG_T, FLAT, REVERSE)
        if z is not None:
            gate = tl.load(z + first * z_t, mask=real, other=0.0).to(tl.float32)
            open = _sigmoid(gate)
            y = _over_states(h * _with_channels(c, FLAT), FLAT) + skip * x
            by_z = by_y * y * open * (1.0 + gate * (1.0 - open))
            tl.store(grad_z + places + first * out_t, by_z.to(grad_z.dtype.element_ty), mask=real)
            by_y *= gate * open
        direct = _with_states(by_y, FLAT) * _with_channels(c, FLAT)
        by_h, flow = _adjoints(decay, direct, flow, LOG_T, FLAT, REVERSE)
        # Of the decayed state before: what has come in is known, and taken off again. Of a state of which nothing is
        # left, a rounding would remain, which long steps make large.
        by_decay = by_h * tl.where(decay > 0.0, h - drive, 0.0)
        by_drive = _over_states(by_h * _with_channels(b, FLAT), FLAT)
        by_step = _over_states(by_decay * _with_tokens(A_rate, FLAT), FLAT) + by_drive * x
        if SOFTPLUS:
            by_step *= _sigmoid(v)
        by_step = tl.where(real, by_step, 0.0)
        by_x = step * by_drive + skip * by_y
        tl.store(grad_u + places + first * out_t, by_x.to(grad_u.dtype.element_ty), mask=real)
        tl.store(grad_delta + places + first * out_t, by_step.to(grad_delta.dtype.element_ty), mask=real)
        by_b = _over_channels(by_h * _with_states(step * x, FLAT), FLAT, DOT)
        by_c = _over_channels(h * _with_states(by_y, FLAT), FLAT, DOT)
        tl.store(parts_B + map_places + first * part_t, by_b, mask=there)
        tl.store(parts_C + map_places + first * part_t, by_c, mask=there)
        by_rate = by_decay * _with_states(step, FLAT)
        by_A += by_rate if FLAT else tl.sum(by_rate, 0)  # flat tiles add their tokens up in the end
        by_D += by_y * x
        by_bias += by_step
    if FLAT:
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
    LOG_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each split adds to what flows through it, (batch, splits, N, channels), and the sum of its steps.

    Forward, x is u and M is B; backward, x is the gradient of the output and M is C.
    """
    batch, split, group, _block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    T: tl.constexpr = 2**LOG_T
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
        token = tile * T + tl.arange(0, T)
        real = (token < L)[:, None] & mine[None, :]
        there = (token < L)[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
        step, _v = _step(delta, bias, first * delta_t, real, SOFTPLUS)
        added = tl.load(x + first * x_t, mask=real, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + first * z_t, mask=real, other=0.0).to(tl.float32)
            added *= gate * _sigmoid(gate)
        m = _load_map(M + first * M_t, real, there, FLAT)
        behind = tl.cumsum(step, 0, reverse=not TOWARDS_FIRST)  # from each token to where the tile is left
        if not BACKWARD:
            behind -= step
            added *= step
        left = tl.exp2(_with_states(behind, FLAT) * _with_tokens(rate, FLAT))
        through = tl.sum(step, 0)[None, :]
        new = _over_tokens(left * _with_states(added, FLAT) * _with_channels(m, FLAT), FLAT)
        end = tl.exp2(through * rate) * end + new
        steps += through
    row = batch * splits + split
    tl.store(ends + _state_offsets(row, channel, CHANNELS, N, BLOCK_N), end, mask=_kept_states(mine, N, BLOCK_N))
    tl.store(sums + row.to(tl.int64) * CHANNELS + channel[None, :], steps, mask=mine[None, :])


@triton.jit(do_not_specialize=["splits"])
def split_starts(
    ends, sums, A, start, starts, splits,
    CHANNELS: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What flows into each split, of the shape of `ends`; into the first one flows `start`, (batch, N, channels).

    A program has one state of a block of channels, and takes splits for tokens.
    """
    T: tl.constexpr = 2**LOG_T
    program = tl.program_id(0)
    n, rest = program % N, program // N
    blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    channel, batch = rest % blocks * BLOCK_C + tl.arange(0, BLOCK_C), (rest // blocks).to(tl.int64)
    mine = channel < CHANNELS
    rate = tl.load(A + channel * N + n, mask=mine, other=0.0).to(tl.float32)[None, :] * 1.4426950408889634
    flow = rate * 0.0
    if start is not None:
        flow = tl.load(start + (batch * N + n) * CHANNELS + channel, mask=mine, other=0.0)[None, :]
    entry = batch * splits + (splits - 1 if BACKWARD else 0)
    tl.store(starts + (entry * N + n) * CHANNELS + channel[None, :], flow, mask=mine[None, :])
    count = tl.cdiv(splits, T)
    for i in range(count):
        split = (count - 1 - i if BACKWARD else i) * T + tl.arange(0, T)
        real = (split < splits)[:, None] & mine[None, :]
        row = batch * splits + split
        steps = tl.load(sums + row[:, None] * CHANNELS + channel[None, :], mask=real, other=0.0)
        added = tl.load(ends + (row * N + n)[:, None] * CHANNELS + channel[None, :], mask=real, other=0.0)
        h, flow = _states(tl.exp2(steps * rate), added, flow, LOG_T, True, BACKWARD)
        into = split - 1 if BACKWARD else split + 1
        place = ((batch * splits + into) * N + n)[:, None] * CHANNELS + channel[None, :]
        tl.store(starts + place, h, mask=real & ((into >= 0) & (into < splits))[:, None])
