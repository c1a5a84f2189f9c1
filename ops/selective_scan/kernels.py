"""Triton kernels of the selective scan. A program walks along a sequence with a block of channels of one group.

It takes T tokens at a time, and one state after the other. A program is one warp whose lanes are channels: a thread has
all tokens of a tile for its channel, so that scanning is arithmetic within a thread, and asks nobody.
What flows from tile to tile is the state, forward, and a_t λ_t backward, λ being the gradient of the state. Forward a
thread has room for 16 states; others, and what flows backward, wait in memory until their turn comes.

`forward_rows`, for one state and tokens together in memory, instead lays a tile over threads as it lies in memory: a
thread has a few tokens of a long row. Long sequences are cut into splits for several programs; `split_ends` and
`split_starts` find where each begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _then(a1, b1, a2, b2):
    """First h -> a1 h + b1, then a2, b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _then_soon(a1, b1, a2, b2):
    """The same, one instruction after b1: compilers might as well multiply a2 b1 and add the product in b2 to it."""
    return a1 * a2, tl.fma(a2, b1, b2)


@triton.jit
def _then_seen(a1, b1, k1, l1, a2, b2, k2, l2):
    """The same, that also tells k h + l of what the last of them sees."""
    return a1 * a2, a2 * b1 + b2, k2 * a1, k2 * b1 + l2


@triton.jit
def _then_back(a1, e1, f1, a2, e2, f2):
    """Gradient λ = e x + f of the state at a token, with x flowing into a run of tokens from beyond; a λ flows out."""
    through = e2 * a1
    return a2, through * e1, through * f1 + f2


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
def _turned(x, LOG_T: tl.constexpr, TURN: tl.constexpr):
    return _flipped(x, LOG_T) if TURN else x


@triton.jit
def _picked(x, here, AXIS: tl.constexpr):
    """The one number of an axis that is here. Adding integers, compilers see that all others are zero."""
    return tl.sum(tl.where(here, x.to(tl.int32, bitcast=True), 0), AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _states(decay, drive, state, LOG_T: tl.constexpr, REVERSE: tl.constexpr):
    """State (T, C) at each token of a tile, and after it."""
    token = tl.arange(0, 2**LOG_T)[:, None]
    drive = tl.where(token == (2**LOG_T - 1 if REVERSE else 0), drive + decay * state[None, :], drive)
    _, h = tl.associative_scan((_turned(decay, LOG_T, REVERSE), _turned(drive, LOG_T, REVERSE)), 0, _then_soon)
    return _turned(h, LOG_T, REVERSE), _picked(h, token == 2**LOG_T - 1, 0)


@triton.jit
def _states_seen(decay, drive, state, LOG_T: tl.constexpr, REVERSE: tl.constexpr):
    """State (T, C) at each token of a tile, and before it."""
    token = tl.arange(0, 2**LOG_T)[:, None]
    drive = tl.where(token == (2**LOG_T - 1 if REVERSE else 0), drive + decay * state[None, :], drive)
    nothing = tl.full(drive.shape, -(2**31), tl.int32).to(tl.float32, bitcast=True)  # -0.0, for x + 0.0 may not be x
    seen = tl.where(token == 0, state[None, :], nothing)
    one = tl.full(drive.shape, 1.0, tl.float32)
    decay, drive = _turned(decay, LOG_T, REVERSE), _turned(drive, LOG_T, REVERSE)
    _, h, _, seen = tl.associative_scan((decay, drive, one, seen), 0, _then_seen)
    return _turned(h, LOG_T, REVERSE), _turned(seen, LOG_T, REVERSE)


@triton.jit
def _adjoints(decay, direct, flow, LOG_T: tl.constexpr, REVERSE: tl.constexpr):
    """Gradient of the state at each token of a tile, (T, C), and what flows out to the token before it."""
    token = tl.arange(0, 2**LOG_T)[:, None]
    direct = tl.where(token == (0 if REVERSE else 2**LOG_T - 1), direct + flow[None, :], direct)
    one = tl.full(decay.shape, 1.0, tl.float32)
    decay, direct = _turned(decay, LOG_T, not REVERSE), _turned(direct, LOG_T, not REVERSE)
    _, _, grad = tl.associative_scan((decay, one, direct), 0, _then_back)
    return _turned(grad, LOG_T, not REVERSE), _picked(decay * grad, token == 2**LOG_T - 1, 0)


@triton.jit
def _states_across(decay, drive, state, T: tl.constexpr, REVERSE: tl.constexpr):
    """State at each token of a tile whose tokens lie over threads."""
    first = tl.arange(0, T)[:, None] == (T - 1 if REVERSE else 0)
    drive = tl.where(first, drive + decay * state[None, :], drive)
    _, h = tl.associative_scan((decay, drive), 0, _then, reverse=REVERSE)
    return h


@triton.jit
def _over_channels(x, n, total, PRECISION: tl.constexpr):
    """Adds sums over channels of (T, C) to column n of a total: tensor cores spare threads the exchange."""
    sums = tl.dot(x, tl.full((x.shape[1], total.shape[1]), 1.0, tl.float32), input_precision=PRECISION)
    return tl.where(tl.arange(0, total.shape[1])[None, :] == n, total + sums, total)


@triton.jit
def _softplus(v):
    """max(v, 0) + log(1 + t), t = exp(-|v|), by a polynomial for log(1 + t) / t that is off by 2e-7 at most.

    The logarithm itself takes longer than the rest of a token. Beyond v = 20 this is v to the last digit.
    """
    t = tl.exp2(-tl.abs(v) * LOG2E)
    p = 0.04408963769674301 - 0.008539210073649883 * t
    p = 0.17745241522789001 - t * (0.10768172144889832 - t * p)
    p = 0.33275479078292847 - t * (0.24495463073253632 - t * p)
    p = 0.9999998211860657 - t * (0.4999740421772003 - t * p)
    return tl.maximum(v, 0.0) + t * p


@triton.jit
def _sigmoid(v):
    t = tl.exp2(-tl.abs(v) * LOG2E)
    return tl.where(v < 0.0, t, 1.0) / (1.0 + t)


@triton.jit
def _step(v, bias, real, SOFTPLUS: tl.constexpr):
    """Steps of a tile, zero where there is nothing, and what they were before softplus."""
    v += bias[None, :]
    step = _softplus(v) if SOFTPLUS else v
    return tl.where(real, step, 0.0), v


@triton.jit
def _held(x):
    """The same tile (T, C), each thread holding all tokens of its channels.

    Whoever splits a tensor needs both halves in a thread. Splitting tokens into even and odd, then into early and late
    ones, no layout is left that a load could have but the one in question.
    """
    HALF: tl.constexpr = x.shape[0] // 2
    even, odd = tl.split(tl.permute(tl.reshape(x, (HALF, 2, x.shape[1])), (0, 2, 1)))
    x = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), x.shape)
    early, late = tl.split(tl.permute(tl.reshape(x, (2, HALF, x.shape[1])), (1, 2, 0)))
    return tl.reshape(tl.permute(tl.join(early, late), (2, 0, 1)), x.shape)


@triton.jit
def _held_rows(x):
    """The same tile (N, C), each thread holding all rows of its columns; there may be one row."""
    return x if x.shape[0] == 1 else _held(x)


@triton.jit
def _side_by_side(b, c):
    """Two maps of some states (N, T) as one, (N, 2 T), in which they take turns, each thread holding all rows.

    So a warp has as many numbers of a state as it has threads, or as many again.
    """
    both = tl.join(b.to(tl.float32), c.to(tl.float32))
    return _held(tl.reshape(both, (b.shape[0], 2 * b.shape[1])))


@triton.jit
def _apart(row):
    """Both maps of a state, (T, 1), from a row in which they take turns. All threads are given all of them."""
    b, c = tl.split(tl.reshape(row, (row.shape[0] // 2, 2)))
    return b[:, None], c[:, None]


@triton.jit
def _tile(pointer, offset, real):
    return _held(tl.load(pointer + offset, mask=real, other=0.0)).to(tl.float32)


@triton.jit
def _spread(pointer, offset, real):
    """A tile that lies over threads as it does in memory."""
    return tl.load(pointer + offset, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _offsets(batch, channel, stride_b, stride_c, stride_t, T: tl.constexpr):
    """Of the first tile of the block's channels, (T, C)."""
    rows = batch.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    return (tl.arange(0, T) * stride_t)[:, None] + rows[None, :]


@triton.jit
def _map(pointer, T: tl.constexpr):
    """B or C of one state at the tokens of a tile, (T, 1). All threads read the same, many tokens at once."""
    return tl.load(pointer + tl.arange(0, T)).to(tl.float32)[:, None]


@triton.jit
def _vector(pointer, channel, mine):
    """Numbers of the block's channels, (C,); zeros if there are none."""
    if pointer is None:
        vector = tl.zeros(channel.shape, tl.float32)
    else:
        vector = tl.load(pointer + channel, mask=mine, other=0.0).to(tl.float32)
    return vector


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


@triton.jit(do_not_specialize=["L"])
def lay_out(
    B, C, to_B, to_C, L, padded, B_b, B_g, B_n, B_t, C_b, C_g, C_n, C_t,
    GROUPS: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copies maps so that tokens lie together, (batch, groups, N, padded), zero beyond the sequence."""
    blocks = tl.cdiv(padded, T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * T + tl.arange(0, T)).to(tl.int64)[:, None]
    n = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    there, inside = (token < L) & (n < N), (token < padded) & (n < N)
    place = row * (N * padded) + n * padded + token
    B += row // GROUPS * B_b + row % GROUPS * B_g
    C += row // GROUPS * C_b + row % GROUPS * C_g
    tl.store(to_B + place, tl.load(B + (n * B_n + token * B_t), mask=there, other=0.0), mask=inside)
    tl.store(to_C + place, tl.load(C + (n * C_n + token * C_t), mask=there, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def forward(
    u, delta, A, B, C, D, z, bias, start, out, last, states, L, tiles, tiles_each, splits,
    u_b, u_c, u_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, out_b, out_c, out_t,
    padded,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG_T: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Output; the state before each tile in the order of the scan, (batch, tiles, N, channels), and the last of all.

    B and C are (batch, groups, N, padded), whole tiles, zero beyond the sequence. A is (N, channels).

    States are taken BLOCK_N at a time, 1 or at least 4. If those are all they stay in registers, else they wait where
    the states before tiles are kept, or without KEEP at one place for each split, (batch, splits, N, channels). Such is
    `start`, the state before each split; the last is (batch, N, channels). What is None is zero, or not written.
    """
    batch, split, group, _block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    T: tl.constexpr = 2**LOG_T
    CHANNELS: tl.constexpr = GROUPS * EACH
    ROW: tl.constexpr = N * CHANNELS
    STAY: tl.constexpr = N <= BLOCK_N
    WRITE: tl.constexpr = KEEP or N > BLOCK_N
    L = _multiple(L, ALIGN)
    u += _offsets(batch, channel, _multiple(u_b, ALIGN), _multiple(u_c, ALIGN), u_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    out += _offsets(batch, channel, _multiple(out_b, ALIGN), _multiple(out_c, ALIGN), out_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    skip, bias = _vector(D, channel, mine), _vector(bias, channel, mine)
    row = (batch * splits + split).to(tl.int64)
    if start is not None:
        start += row * ROW
    if WRITE:
        states += (batch.to(tl.int64) * tiles + split * tiles_each if KEEP else row) * ROW
    if last is not None:
        last += batch.to(tl.int64) * ROW
    n, token = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, T)
    at = n * CHANNELS + channel[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    rate = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for some in range(0, N, BLOCK_N):
        inside = (some + n < N) & mine[None, :]
        if start is not None:
            state = _held_rows(tl.load(start + some * CHANNELS + at, mask=inside, other=0.0))
        if WRITE:
            tl.store(states + some * CHANNELS + at, state, mask=inside)
        if STAY:
            rate = _held_rows(tl.load(A + at, mask=inside, other=0.0)).to(tl.float32) * LOG2E
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    tile = tiles - 1 - split * tiles_each if REVERSE else split * tiles_each
    first = tile.to(tl.int64) * T
    maps = (batch * GROUPS + group).to(tl.int64) * (N * padded)
    B += maps
    C += maps
    map_at = n * padded + token[None, :]
    there = (token < L - tile * T)[:, None] & mine[None, :]
    v = tl.load(delta + first * delta_t, mask=there, other=0.0)
    x = tl.load(u + first * u_t, mask=there, other=0.0)
    if N > 1:
        b_some = tl.load(B + first + map_at, mask=n < N, other=0.0)
        c_some = tl.load(C + first + map_at, mask=n < N, other=0.0)
    for i in range(count):
        first = tile.to(tl.int64) * T
        real = (token < L - tile * T)[:, None] & mine[None, :]
        step, _v = _step(_held(v).to(tl.float32), bias, real, SOFTPLUS)
        now = _held(x).to(tl.float32)
        tile += -1 if REVERSE else 1
        onward = tile.to(tl.int64) * T
        there = (token < L - tile * T)[:, None] & mine[None, :] & (i + 1 < count)
        v = tl.load(delta + onward * delta_t, mask=there, other=0.0)
        x = tl.load(u + onward * u_t, mask=there, other=0.0)
        y = skip[None, :] * now
        taken = step * now
        if not STAY:
            tl.debug_barrier()  # what is read has been written by whom it may concern
        for some in range(0, N, BLOCK_N):
            inside = (some + n < N) & mine[None, :]
            if N > 1:
                maps_some = _side_by_side(b_some, c_some)
                # Of the states after these, or of the first ones in the next tile
                after = tl.where(some + BLOCK_N < N, some + BLOCK_N, 0)
                wanted = (after + n < N) & ((after > 0) | (i + 1 < count))
                ahead = tl.where(after > 0, first, onward) + after * padded
                b_some = tl.load(B + ahead + map_at, mask=wanted, other=0.0)
                c_some = tl.load(C + ahead + map_at, mask=wanted, other=0.0)
            if not STAY:
                state = _held_rows(tl.load(states + some * CHANNELS + at, mask=inside, other=0.0))
                rate = _held_rows(tl.load(A + some * CHANNELS + at, mask=inside, other=0.0)).to(tl.float32) * LOG2E
            for k in tl.static_range(BLOCK_N if N > BLOCK_N else N):
                here = n == k
                if N > 1:
                    b, c = _apart(_picked(maps_some, here, 0))
                else:
                    b, c = _map(B + first, T), _map(C + first, T)
                decay = tl.exp2(step * _picked(rate, here, 0)[None, :])
                h, end = _states(decay, taken * b, _picked(state, here, 0), LOG_T, REVERSE)
                y += h * c
                state = tl.where(here, end[None, :], state)
            if WRITE:
                place = states + (some * CHANNELS + (ROW if KEEP else 0))
                tl.store(place + at, state, mask=inside & (i + 1 < count))
            if last is not None:
                final = inside & (split == splits - 1) & (i + 1 == count)
                tl.store(last + some * CHANNELS + at, state, mask=final)
        if KEEP:
            states += ROW
        if z is not None:
            gate = _tile(z, first * z_t, real)
            y *= gate * _sigmoid(gate)
        tl.store(out + first * out_t, y.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def forward_rows(
    u, delta, A, B, C, D, z, bias, start, out, last, states, L, tiles, tiles_each, splits,
    u_b, u_c, u_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, out_b, out_c, out_t,
    padded,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, LOG_T: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, LOG_ROWS: tl.constexpr,
):  # fmt: skip
    """What `forward` does, for one state and tokens together in memory, with rows of so many tiles at a time."""
    batch, split, group, _block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    SHORT: tl.constexpr = 2**LOG_T
    TILES: tl.constexpr = 2**LOG_ROWS
    T: tl.constexpr = SHORT * TILES
    CHANNELS: tl.constexpr = GROUPS * EACH
    token = tl.arange(0, T)
    L = _multiple(L, ALIGN)
    u += _offsets(batch, channel, _multiple(u_b, ALIGN), _multiple(u_c, ALIGN), u_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    out += _offsets(batch, channel, _multiple(out_b, ALIGN), _multiple(out_c, ALIGN), out_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    maps = (batch * GROUPS + group).to(tl.int64) * padded + token[:, None]
    rate = _vector(A, channel, mine) * LOG2E
    skip, bias = _vector(D, channel, mine), _vector(bias, channel, mine)
    state = tl.zeros((BLOCK_C,), tl.float32)
    if start is not None:
        state = _vector(start + (batch * splits + split).to(tl.int64) * CHANNELS, channel, mine)
    begin = split * tiles_each
    end = tl.minimum(begin + tiles_each, tiles)
    if states is not None:
        states += batch.to(tl.int64) * tiles * CHANNELS
        tl.store(states + begin.to(tl.int64) * CHANNELS + channel, state, mask=mine)
    for tile in range(begin, end, TILES):
        at = (tiles - tile - TILES if REVERSE else tile) * SHORT
        first = at.to(tl.int64)
        real = ((at + token >= 0) & (at + token < L))[:, None] & mine[None, :]
        step, _v = _step(_spread(delta, first * delta_t, real), bias, real, SOFTPLUS)
        x = _spread(u, first * u_t, real)
        # Each thread reads what its channels need of maps, as it reads u.
        b = _spread(tl.broadcast_to(B + maps, (T, BLOCK_C)), first, real)
        c = _spread(tl.broadcast_to(C + maps, (T, BLOCK_C)), first, real)
        h = _states_across(tl.exp2(step * rate[None, :]), step * x * b, state, T, REVERSE)
        state = _picked(h, token[:, None] == (0 if REVERSE else T - 1), 0)
        if states is not None:
            order = tl.arange(0, SHORT)[None, :, None]
            kept = _picked(tl.reshape(h, (TILES, SHORT, BLOCK_C)), order == (0 if REVERSE else SHORT - 1), 1)
            after = tl.arange(0, TILES)
            after = tile + (TILES - after if REVERSE else after + 1)
            place = states + (after.to(tl.int64) * CHANNELS)[:, None] + channel[None, :]
            tl.store(place, kept, mask=(after < end)[:, None] & mine[None, :])
        y = h * c + skip[None, :] * x
        if z is not None:
            gate = _spread(z, first * z_t, real)
            y *= gate * _sigmoid(gate)
        tl.store(out + first * out_t, y.to(out.dtype.element_ty), mask=real)
    if last is not None:
        tl.store(last + batch.to(tl.int64) * CHANNELS + channel, state, mask=mine & (split == splits - 1))


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def backward(
    grad, u, delta, A, B, C, D, z, bias, states, flows, waiting,
    grad_u, grad_delta, grad_z, parts_B, parts_C, parts_A, parts_D, parts_bias, grad_start,
    L, tiles, tiles_each, splits,
    g_b, g_c, g_t, u_b, u_c, u_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, out_b, out_c, out_t,
    padded, part, part_b, part_g, part_n, part_t,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr,
    LOG_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of u, delta and z; each block's part of those of B and C, each program's of those of A, D and bias.

    `flows` holds what flows into each split from the one behind it, (batch, splits, N, channels), `waiting`, alike, is
    where it waits between tiles, and `grad_start`, (batch, N, channels), takes what flows out in the end. Parts of A
    are (batch, splits, N, channels), of D and bias (batch, splits, channels). A is (N, channels).
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
    maps = (batch * GROUPS + group).to(tl.int64) * (N * padded)
    n_there = tl.arange(0, BLOCK_N) < N
    map_places = (tl.arange(0, T) * part_t)[:, None] + (tl.arange(0, BLOCK_N) * part_n)[None, :]
    map_places += block.to(tl.int64) * part + batch.to(tl.int64) * part_b + group.to(tl.int64) * part_g
    skip, bias = _vector(D, channel, mine), _vector(bias, channel, mine)
    row = (batch * splits + split).to(tl.int64)
    waiting += row * (N * CHANNELS)
    parts_A += row * (N * CHANNELS)
    for n in range(N):
        flow = tl.zeros((BLOCK_C,), tl.float32)
        if flows is not None:
            flow = _vector(flows + row * (N * CHANNELS) + n * CHANNELS, channel, mine)
        tl.store(waiting + n * CHANNELS + channel, flow, mask=mine)
        tl.store(parts_A + n * CHANNELS + channel, tl.zeros((BLOCK_C,), tl.float32), mask=mine)
    by_D, by_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    states += (batch.to(tl.int64) * tiles + split * tiles_each + count - 1) * (N * CHANNELS)
    tile = split * tiles_each + count - 1
    if REVERSE:
        tile = tiles - 1 - tile
    if UNROLL > 1:
        n_some = tl.arange(0, UNROLL)[:, None]
        map_at = tile.to(tl.int64) * T + maps + n_some * padded + tl.arange(0, T)[None, :]
        at = n_some * CHANNELS + channel.to(tl.int64)[None, :]
        next_b, next_c = tl.load(B + map_at), tl.load(C + map_at)
        next_states = tl.load(states + at, mask=mine[None, :], other=0.0)
    for i in range(count):
        first = tile.to(tl.int64) * T
        there = tl.arange(0, T) < L - tile * T
        real = there[:, None] & mine[None, :]
        step, v = _step(_tile(delta, first * delta_t, real), bias, real, SOFTPLUS)
        x = _tile(u, first * u_t, real)
        by_out = _tile(grad, first * g_t, real)
        by_y = by_out
        if z is not None:
            gate = _tile(z, first * z_t, real)
            by_y *= gate * _sigmoid(gate)
            y = skip[None, :] * x
        taken = step * x
        by_taken, by_step = tl.zeros((T, BLOCK_C), tl.float32), tl.zeros((T, BLOCK_C), tl.float32)
        by_B, by_C = tl.zeros((T, BLOCK_N), tl.float32), tl.zeros((T, BLOCK_N), tl.float32)
        tl.debug_barrier()  # what is read has been written by whom it may concern
        for some in range(0, N, UNROLL):
            if UNROLL > 1:
                maps_some, states_some = _side_by_side(next_b, next_c), _held(next_states)
                # Of the states after these, or of the first ones in the next tile
                turn = some + UNROLL >= N
                on = tl.where(turn, -some, UNROLL)
                map_at += on * padded + tl.where(turn, T if REVERSE else -T, 0)
                at += on * CHANNELS - tl.where(turn, N * CHANNELS, 0)
                wanted = (i + 1 < count) | (some + UNROLL < N)
                next_b = tl.load(B + map_at, mask=wanted & (n_some < UNROLL), other=0.0)
                next_c = tl.load(C + map_at, mask=wanted & (n_some < UNROLL), other=0.0)
                next_states = tl.load(states + at, mask=wanted & mine[None, :], other=0.0)
            for k in tl.static_range(UNROLL):
                n = some + k
                rate = _vector(A + n * CHANNELS, channel, mine)
                if UNROLL > 1:
                    b, c = _apart(_picked(maps_some, n_some == k, 0))
                    state = _picked(states_some, n_some == k, 0)
                else:
                    b = _map(B + maps + (n * padded + first), T)
                    c = _map(C + maps + (n * padded + first), T)
                    state = _vector(states + n * CHANNELS, channel, mine)
                flow = _vector(waiting + n * CHANNELS, channel, mine)
                by_rate = _vector(parts_A + n * CHANNELS, channel, mine)
                decay = tl.exp2(step * (rate * LOG2E)[None, :])
                h, seen = _states_seen(decay, taken * b, state, LOG_T, REVERSE)
                if z is not None:
                    y += h * c
                by_C = _over_channels(h * by_y, n, by_C, PRECISION)
                by_h, flow = _adjoints(decay, by_y * c, flow, LOG_T, REVERSE)
                by_B = _over_channels(by_h * taken, n, by_B, PRECISION)
                by_taken += by_h * b
                by_exponent = by_h * (decay * seen)
                by_step += by_exponent * rate[None, :]
                by_rate += tl.sum(by_exponent * step, 0)
                tl.store(waiting + n * CHANNELS + channel, flow, mask=mine)
                tl.store(parts_A + n * CHANNELS + channel, by_rate, mask=mine)
                if grad_start is not None:
                    begin = grad_start + batch.to(tl.int64) * (N * CHANNELS) + n * CHANNELS
                    tl.store(begin + channel, flow, mask=mine & (split == 0) & (i + 1 == count))
        if z is not None:
            open = _sigmoid(gate)
            by_z = by_out * y * open * (1.0 + gate * (1.0 - open))
            tl.store(grad_z + places + first * out_t, by_z.to(grad_z.dtype.element_ty), mask=real)
        if N > 1:  # read again what would have taken room from states
            x = _tile(u, first * u_t, real)
            v = _tile(delta, first * delta_t, real) + bias[None, :]
        by_step += by_taken * x
        if SOFTPLUS:
            by_step *= _sigmoid(v)
        by_step = tl.where(real, by_step, 0.0)
        by_x = step * by_taken + skip[None, :] * by_y
        tl.store(grad_u + places + first * out_t, by_x.to(grad_u.dtype.element_ty), mask=real)
        tl.store(grad_delta + places + first * out_t, by_step.to(grad_delta.dtype.element_ty), mask=real)
        inside = there[:, None] & n_there[None, :]
        tl.store(parts_B + map_places + first * part_t, by_B, mask=inside)
        tl.store(parts_C + map_places + first * part_t, by_C, mask=inside)
        by_D += tl.sum(by_y * x, 0)
        by_bias += tl.sum(by_step, 0)
        tile += 1 if REVERSE else -1
        if UNROLL == 1:
            states -= N * CHANNELS
    if D is not None:
        tl.store(parts_D + row * CHANNELS + channel, by_D, mask=mine)
    if parts_bias is not None:
        tl.store(parts_bias + row * CHANNELS + channel, by_bias, mask=mine)


@triton.jit(do_not_specialize=["tiles", "tiles_each", "splits"])
def split_ends(
    x, delta, A, M, z, bias, ends, sums, L, tiles, tiles_each, splits,
    x_b, x_c, x_t, delta_b, delta_c, delta_t, z_b, z_c, z_t, padded,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG_T: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each split adds to what flows through it, (batch, splits, N, channels), and the sum of its steps.

    Forward, x is u and M is B; backward, x is the gradient of the output and M is C. States are taken as by `forward`.
    """
    batch, split, group, _block, channel, mine = _place(splits, BLOCKS, GROUPS, EACH, BLOCK_C)
    T: tl.constexpr = 2**LOG_T
    CHANNELS: tl.constexpr = GROUPS * EACH
    FROM_LAST: tl.constexpr = REVERSE == BACKWARD
    STAY: tl.constexpr = N <= BLOCK_N
    PAIRS: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 1 else 1
    L = _multiple(L, ALIGN)
    x += _offsets(batch, channel, _multiple(x_b, ALIGN), _multiple(x_c, ALIGN), x_t, T)
    delta += _offsets(batch, channel, _multiple(delta_b, ALIGN), _multiple(delta_c, ALIGN), delta_t, T)
    if z is not None:
        z += _offsets(batch, channel, _multiple(z_b, ALIGN), _multiple(z_c, ALIGN), z_t, T)
    bias = _vector(bias, channel, mine)
    row = (batch * splits + split).to(tl.int64)
    ends += row * (N * CHANNELS)
    n, token, even = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, T), tl.arange(0, PAIRS)[:, None] * 2
    at = n * CHANNELS + channel[None, :]
    rate = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    end = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if STAY:
        rate = _held_rows(tl.load(A + at, mask=(n < N) & mine[None, :], other=0.0)).to(tl.float32) * LOG2E
    else:
        for some in range(0, N, BLOCK_N):
            tl.store(ends + some * CHANNELS + at, end, mask=(some + n < N) & mine[None, :])
    steps = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.minimum(tiles_each, tiles - split * tiles_each)
    tile = split * tiles_each + (count - 1 if BACKWARD else 0)
    if REVERSE:
        tile = tiles - 1 - tile
    first = tile.to(tl.int64) * T
    M += (batch * GROUPS + group).to(tl.int64) * (N * padded)
    map_at = even * padded + token[None, :]
    there = (token < L - tile * T)[:, None] & mine[None, :]
    next_v = tl.load(delta + first * delta_t, mask=there, other=0.0)
    next_x = tl.load(x + first * x_t, mask=there, other=0.0)
    if N > 1:
        m_even = tl.load(M + first + map_at, mask=even < N, other=0.0)
        m_odd = tl.load(M + (first + padded) + map_at, mask=even + 1 < N, other=0.0)
    for i in range(count):
        first = tile.to(tl.int64) * T
        real = (token < L - tile * T)[:, None] & mine[None, :]
        step, _v = _step(_held(next_v).to(tl.float32), bias, real, SOFTPLUS)
        added = _held(next_x).to(tl.float32)
        tile += 1 if FROM_LAST else -1
        onward = tile.to(tl.int64) * T
        there = (token < L - tile * T)[:, None] & mine[None, :] & (i + 1 < count)
        next_v = tl.load(delta + onward * delta_t, mask=there, other=0.0)
        next_x = tl.load(x + onward * x_t, mask=there, other=0.0)
        if z is not None:
            gate = _tile(z, first * z_t, real)
            added *= gate * _sigmoid(gate)
        # From each token to where the tile is left
        behind = _turned(tl.cumsum(_turned(step, LOG_T, FROM_LAST), 0), LOG_T, FROM_LAST)
        if not BACKWARD:
            behind -= step
            added *= step
        through = tl.sum(step, 0)
        steps += through
        if not STAY:
            tl.debug_barrier()  # what is read has been written by whom it may concern
        for some in range(0, N, BLOCK_N):
            inside = (some + n < N) & mine[None, :]
            if N > 1:
                pairs = _side_by_side(m_even, m_odd)
                after = tl.where(some + BLOCK_N < N, some + BLOCK_N, 0)
                follows = (after > 0) | (i + 1 < count)
                ahead = tl.where(after > 0, first, onward) + after * padded
                m_even = tl.load(M + ahead + map_at, mask=(after + even < N) & follows, other=0.0)
                m_odd = tl.load(M + (ahead + padded) + map_at, mask=(after + even + 1 < N) & follows, other=0.0)
            if not STAY:
                end = _held_rows(tl.load(ends + some * CHANNELS + at, mask=inside, other=0.0))
                rate = _held_rows(tl.load(A + some * CHANNELS + at, mask=inside, other=0.0)).to(tl.float32) * LOG2E
            for k in tl.static_range(BLOCK_N if N > BLOCK_N else N):
                here = n == k
                if N == 1:
                    m = _map(M + first, T)
                else:
                    m, other = _apart(_picked(pairs, even == k // 2 * 2, 0))
                    if k % 2 == 1:
                        m = other
                rate_k = _picked(rate, here, 0)
                new = tl.sum(tl.exp2(behind * rate_k[None, :]) * (added * m), 0)
                new += tl.exp2(through * rate_k) * _picked(end, here, 0)
                end = tl.where(here, new[None, :], end)
            if not STAY:
                tl.store(ends + some * CHANNELS + at, end, mask=inside)
    if STAY:
        tl.store(ends + at, end, mask=(n < N) & mine[None, :])
    tl.store(sums + row * CHANNELS + channel, steps, mask=mine)


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
    rate = _vector(A + n * CHANNELS, channel, mine)[None, :] * LOG2E
    flow = tl.zeros((BLOCK_C,), tl.float32)
    if start is not None:
        flow = _vector(start + (batch * N + n) * CHANNELS, channel, mine)
    entry = batch * splits + (splits - 1 if BACKWARD else 0)
    tl.store(starts + (entry * N + n) * CHANNELS + channel, flow, mask=mine)
    count = tl.cdiv(splits, T)
    for i in range(count):
        split = (count - 1 - i if BACKWARD else i) * T + tl.arange(0, T)
        real = (split < splits)[:, None] & mine[None, :]
        row = batch * splits + split
        steps = tl.load(sums + row[:, None] * CHANNELS + channel[None, :], mask=real, other=0.0)
        added = tl.load(ends + (row * N + n)[:, None] * CHANNELS + channel[None, :], mask=real, other=0.0)
        h = _states_across(tl.exp2(steps * rate), added, flow, T, BACKWARD)
        flow = _picked(h, tl.arange(0, T)[:, None] == (0 if BACKWARD else T - 1), 0)
        into = split - 1 if BACKWARD else split + 1
        place = ((batch * splits + into) * N + n)[:, None] * CHANNELS + channel[None, :]
        tl.store(starts + place, h, mask=real & ((into >= 0) & (into < splits))[:, None])
