"""Triton kernels of state space duality: the causal form (CAUSAL), and the one without an order.

Letters: L tokens, in chunks of `length` tokens, that a program walks through in tiles of ROWS; HEADS heads of P
channels, GROUP of them with the same maps of N states; a state is P x N. `collect` sums what the tokens of a chunk add
to a state, `scan` turns these sums into the states that chunks begin with, `outputs` has tokens read them, and
`gradients` makes the gradients of a tile.

In the causal form the tokens of a tile see each other by a product of their maps, and what came before by the state
that the tile begins with. The clock of a token is the sum of Δ A in its tile, up to and with its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING: tl.constexpr = tl.constexpr(-128.0)
"""exp of it is zero in float32."""


@triton.jit
def _tile(pointer, start, last, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Vectors of ROWS tokens, zeros beyond the last one."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = (start + row < last)[:, None]
    if WIDTH != BLOCK:
        real = real & (lane < WIDTH)[None, :]
    pointer += tl.cast(start, tl.int64) * stride
    return tl.load(pointer + row[:, None] * stride + lane[None, :], mask=real, other=0.0)


@triton.jit
def _put(pointer, value, start, last, stride, WIDTH: tl.constexpr):
    """Writes vectors of a tile."""
    row, lane = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    real = (start + row < last)[:, None] & (lane < WIDTH)[None, :]
    pointer += tl.cast(start, tl.int64) * stride
    tl.store(pointer + row[:, None] * stride + lane[None, :], value.to(pointer.dtype.element_ty), mask=real)


@triton.jit
def _within_state(P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offset of each number of a state, and whether it exists."""
    row, column = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return row * N + column, (row < P) & (column < N)


@triton.jit
def _state(pointer, index, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    offset, real = _within_state(P, N, BLOCK_P, BLOCK_N)
    return tl.load(pointer + tl.cast(index, tl.int64) * (P * N) + offset, mask=real, other=0.0)


@triton.jit
def _put_state(pointer, value, index, P: tl.constexpr, N: tl.constexpr):
    offset, real = _within_state(P, N, value.shape[0], value.shape[1])
    tl.store(pointer + tl.cast(index, tl.int64) * (P * N) + offset, value, mask=real)


@triton.jit
def _softplus(v):
    """log(1 + exp(v)), and its slope. Dividing as 2 atanh(e / (2 + e)) keeps what 1 + e would round away."""
    e = tl.exp(-tl.abs(v))
    t = e / (2.0 + e)
    q = t * t
    series = q * (1.0 / 17) + 1.0 / 15
    series = series * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    series = series * q + 1.0
    return tl.maximum(v, 0.0) + 2.0 * t * series, tl.where(v > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _steps(
    dt, bias, head, start, last, stride, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, ROWS: tl.constexpr
):
    """Δ of a tile, zero beyond the last token, and its derivative by dt."""
    row = tl.arange(0, ROWS)
    real = start + row < last
    dt += tl.cast(start, tl.int64) * stride
    value = tl.load(dt + row * stride, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + head).to(tl.float32)
    slope = tl.full((ROWS,), 1.0, tl.float32)
    if SOFTPLUS:
        value, slope = _softplus(value)
    if LIMITED:
        least, most = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
        slope = tl.where((value >= least) & (value <= most), slope, 0.0)
        value = tl.minimum(tl.maximum(value, least), most)
    return tl.where(real, value, 0.0), slope


@triton.jit
def _clock(step, rate):
    """Clock of each token of a tile and of its end, each in two parts.

    Sums would lose the small differences that neighbours have. So the first parts are multiples of one number coarse
    enough for their sums to be exact, and the second ones what that leaves out.
    """
    change = tl.maximum(step * rate, NOTHING)
    coarse = 2.0 * tl.sum(change, 0)
    high = (change + coarse) - coarse
    low = change - high
    return tl.cumsum(high, 0), tl.cumsum(low, 0), tl.sum(high, 0), tl.sum(low, 0)


@triton.jit
def _unit(value, dtype: tl.constexpr):
    """What numbers are divided by so that they fit into float16 with as many digits as it has; 1 for other dtypes."""
    if dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(value), 1), 0)
        return tl.where(largest > 1e-30, largest * (1.0 / 32768), 1.0)
    return 1.0


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """A factor of a product in its dtype, and its unit."""
    unit = _unit(value, dtype)
    if dtype == tl.float16:
        value = value / unit
    return value.to(dtype), unit


@triton.jit
def _split(value, dtype: tl.constexpr):
    """The same, with what the rounding lost: a state is a sum over many tokens, and all of it counts."""
    unit = _unit(value, dtype)
    if dtype == tl.float16:
        value = value / unit
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype), unit


@triton.jit
def _times(a, high, low, unit, PRECISION: tl.constexpr):
    """Product of a with what `_split` made."""
    value = tl.dot(a, high, input_precision=PRECISION)
    if a.dtype != tl.float32:
        value = tl.dot(a, low, value)
    return value * unit


@triton.jit
def _added(total, left, right, weight, PRECISION: tl.constexpr):
    """A sum and what tokens with weights add to it, left^T right."""
    high, low, unit = _split(right.to(tl.float32) * weight[:, None], right.dtype)
    if right.dtype == tl.float16:
        return total + tl.dot(tl.trans(left), low, tl.dot(tl.trans(left), high)) * unit
    total = tl.dot(tl.trans(left), high, total, input_precision=PRECISION)
    if right.dtype != tl.float32:
        total = tl.dot(tl.trans(left), low, total)
    return total


@triton.jit
def _collected(
    total,
    left,
    right,
    dt,
    bias,
    rate,
    head,
    begin,
    last,
    left_token,
    right_token,
    dt_token,
    low,
    high,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to a state, or to its gradient, what the tokens of a chunk do; also returns the decay over the chunk."""
    time = 0.0
    for distance in range(0, last - begin, ROWS):
        start = begin + distance
        if CAUSAL and GRADIENT:  # from the last tile to the first
            start = begin + (last - begin - 1) // ROWS * ROWS - distance
        a = _tile(left, start, last, left_token, P, BLOCK_P, ROWS)
        b = _tile(right, start, last, right_token, N, BLOCK_N, ROWS)
        if CAUSAL or not GRADIENT:
            step, _ = _steps(dt, bias, head, start, last, dt_token, low, high, SOFTPLUS, LIMITED, ROWS)
            if CAUSAL:
                clock, rest, end, end_rest = _clock(step, rate)
                time += end + end_rest
                total *= tl.exp(end + end_rest)
                if GRADIENT:
                    weight = tl.exp(clock + rest)
                else:
                    weight = tl.exp((end - clock) + (end_rest - rest)) * step
            else:
                weight = -rate * step
            total = _added(total, a, b, weight, PRECISION)
        else:
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    return total, tl.exp(time)


@triton.jit(do_not_specialize=["L", "chunks", "length"])
def collect(
    left,
    right,
    dt,
    A,
    bias,
    parts,
    decays,
    L,
    chunks,
    length,
    low,
    high,
    left_batch,
    left_token,
    left_head,
    right_batch,
    right_token,
    right_group,
    dt_batch,
    dt_token,
    RIGHT_AT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds to a state, (batch, chunks, HEADS, P, N), and what it leaves of it, (batch, chunks, HEADS).

    Of the state itself x and B are left and right; of its gradient the gradient of the output and C.
    """
    program = tl.program_id(0)
    head, chunk, image = program % HEADS, program // HEADS % chunks, tl.cast(program // HEADS // chunks, tl.int64)
    begin = chunk * length
    total, decay = _collected(
        tl.zeros((BLOCK_P, BLOCK_N), tl.float32), left + image * left_batch + head * left_head,
        right + image * right_batch + head // GROUP * right_group + RIGHT_AT, dt + image * dt_batch + head, bias,
        tl.load(A + head).to(tl.float32), head, begin, tl.minimum(begin + length, L), left_token, right_token, dt_token,
        low, high, P, N, BLOCK_P, BLOCK_N, ROWS, CAUSAL, GRADIENT, SOFTPLUS, LIMITED, PRECISION,
    )  # fmt: skip
    _put_state(parts, total, program, P, N)
    if CAUSAL and not GRADIENT:
        tl.store(decays + program, decay)


@triton.jit(do_not_specialize=["chunks"])
def scan(
    parts,
    decays,
    initial,
    last,
    chunks,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Puts in the place of what each chunk adds the state before it (with REVERSE, the gradient of that after it)."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pair = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    image, head = pair // HEADS, pair % HEADS
    lane = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + pair * SIZE + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    for step in range(chunks):
        place = (image * chunks + (chunks - 1 - step if REVERSE else step)) * HEADS + head
        added = tl.load(parts + place * SIZE + lane, mask=lane < SIZE, other=0.0)
        tl.store(parts + place * SIZE + lane, state, mask=lane < SIZE)
        state = tl.load(decays + place) * state + added
    tl.store(last + pair * SIZE + lane, state, mask=lane < SIZE)


@triton.jit
def _decay(clock, rest, ROWS: tl.constexpr):
    """What is left at a token of what another one added, zero if that comes later: (ROWS, ROWS)."""
    row = tl.arange(0, ROWS)
    difference = (clock[:, None] - clock[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(row[:, None] >= row[None, :], difference, float("-inf")))


@triton.jit
def _skip(D, head, SKIP: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The factor of the skip connection, of a head (SKIP = 1) or of each channel (2), for a tile: (1, 1 or BLOCK_P)."""
    lane = tl.arange(0, BLOCK_P)
    if SKIP == 1:
        lane = lane * 0
        return tl.load(D + head + lane).to(tl.float32)[None, :]
    return tl.load(D + head * P + lane, mask=lane < P, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["L", "chunks", "length"])
def outputs(
    x,
    dt,
    A,
    B,
    C,
    D,
    bias,
    states,
    out,
    last_states,
    L,
    chunks,
    length,
    low,
    high,
    x_batch,
    x_token,
    x_head,
    map_batch,
    map_token,
    map_group,
    dt_batch,
    dt_token,
    B_AT: tl.constexpr,
    C_AT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output of a chunk, from the state it begins with or, without an order, the one state.

    A sequence that is one chunk (WHOLE) makes its state itself, from the initial one if there is any.
    """
    program = tl.program_id(0)
    head, chunk, image = program % HEADS, program // HEADS % chunks, tl.cast(program // HEADS // chunks, tl.int64)
    begin = chunk * length
    last = tl.minimum(begin + length, L)
    rate = tl.load(A + head).to(tl.float32)
    x += image * x_batch + head * x_head
    group = image * map_batch + head // GROUP * map_group
    B += group + B_AT
    C += group + C_AT
    dt += image * dt_batch + head
    out += image * L * (HEADS * P) + head * P
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if states is not None:
        state = _state(states, program if CAUSAL else image * HEADS + head, P, N, BLOCK_P, BLOCK_N).to(tl.float32)
    if not CAUSAL:
        if WHOLE:
            state, _ = _collected(
                state, x, B, dt, bias, rate, head, begin, last, x_token, map_token, dt_token, low, high,
                P, N, BLOCK_P, BLOCK_N, ROWS, False, False, SOFTPLUS, LIMITED, PRECISION,
            )  # fmt: skip
        main, rest, unit = _split(tl.trans(state), x.dtype.element_ty)
    for start in range(begin, last, ROWS):
        c = _tile(C, start, last, map_token, N, BLOCK_N, ROWS)
        v = _tile(x, start, last, x_token, P, BLOCK_P, ROWS)
        if CAUSAL:
            b = _tile(B, start, last, map_token, N, BLOCK_N, ROWS)
            step, _ = _steps(dt, bias, head, start, last, dt_token, low, high, SOFTPLUS, LIMITED, ROWS)
            clock, clock_rest, end, end_rest = _clock(step, rate)
            main, rest, unit = _split(tl.trans(state), v.dtype)
            y = _times(c, main, rest, unit, PRECISION) * tl.exp(clock + clock_rest)[:, None]
            seen = tl.dot(c, tl.trans(b), input_precision=PRECISION) * _decay(clock, clock_rest, ROWS) * step[None, :]
            seen, unit = _rounded(seen, v.dtype)
            y += tl.dot(seen, v, input_precision=PRECISION) * unit
            weight = tl.exp((end - clock) + (end_rest - clock_rest)) * step
            state = _added(state * tl.exp(end + end_rest), v, b, weight, PRECISION)
        else:
            y = _times(c, main, rest, unit, PRECISION)
        if SKIP:
            y += _skip(D, head, SKIP, P, BLOCK_P) * v.to(tl.float32)
        _put(out, y, start, last, HEADS * P, P)
    if WHOLE:
        _put_state(last_states, state, program, P, N)


@triton.jit(do_not_specialize=["L", "tiles"])
def gradients(
    grad_out,
    x,
    dt,
    A,
    B,
    C,
    D,
    bias,
    states,
    grad_states,
    grad_x,
    grad_dt,
    grad_B,
    grad_C,
    parts,
    L,
    tiles,
    low,
    high,
    x_batch,
    x_token,
    x_head,
    map_batch,
    map_token,
    map_group,
    dt_batch,
    dt_token,
    B_AT: tl.constexpr,
    C_AT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile for all heads of a group, which share those of B and C, and the tile's parts of those of A,
    bias and D, (batch, tiles, HEADS, 2 and as many as a head has in D).

    Given are the states, and gradients of states, that the tile reads and adds to.
    """
    GROUPS: tl.constexpr = HEADS // GROUP
    X_PITCH: tl.constexpr = HEADS * P + 2 * N if PACKED else HEADS * P
    MAP_PITCH: tl.constexpr = X_PITCH if PACKED else GROUPS * N
    COLUMNS: tl.constexpr = 2 + (P if SKIP == 2 else SKIP)
    program = tl.program_id(0)
    group, tile, image = program % GROUPS, program // GROUPS % tiles, tl.cast(program // GROUPS // tiles, tl.int64)
    start = tile * ROWS
    row = tl.arange(0, ROWS)
    if PACKED:
        grad_B = grad_x + HEADS * P
        grad_C = grad_B + N
    B += image * map_batch + group * map_group + B_AT
    C += image * map_batch + group * map_group + C_AT
    b = _tile(B, start, L, map_token, N, BLOCK_N, ROWS)
    c = _tile(C, start, L, map_token, N, BLOCK_N, ROWS)
    db, dc = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    if CAUSAL:
        cb = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    for member in range(GROUP):
        head = group * GROUP + member
        rate = tl.load(A + head).to(tl.float32)
        v = _tile(x + image * x_batch + head * x_head, start, L, x_token, P, BLOCK_P, ROWS)
        g = _tile(grad_out + image * L * (HEADS * P) + head * P, start, L, HEADS * P, P, BLOCK_P, ROWS)
        step, slope = _steps(
            dt + image * dt_batch + head, bias, head, start, L, dt_token, low, high, SOFTPLUS, LIMITED, ROWS
        )
        index = (image * tiles + tile) * HEADS + head
        place = index if CAUSAL else image * HEADS + head
        wide, real = v.to(tl.float32), start + row < L
        if CAUSAL:
            clock, rest, end, end_rest = _clock(step, rate)
            left = tl.exp((end - clock) + (end_rest - rest))
            into = left * step
        else:
            into = -rate * step

        main, lost, unit = _split(_state(grad_states, place, P, N, BLOCK_P, BLOCK_N), v.dtype)
        by_state = _times(b, tl.trans(main), tl.trans(lost), unit, PRECISION)
        dstep = tl.sum(wide * by_state, 1)
        dx = into[:, None] * by_state
        if CAUSAL:  # what later tokens of the tile see of each one
            decay = _decay(clock, rest, ROWS)
            seen, scale = _rounded(cb * decay, v.dtype)
            dx += tl.dot(tl.trans(seen), g, input_precision=PRECISION) * (scale * step)[:, None]
        sums = parts + index * COLUMNS
        if SKIP:
            grad = g.to(tl.float32)
            dx += _skip(D, head, SKIP, P, BLOCK_P) * grad
            by_channel = tl.sum(grad * wide, 0)
            if SKIP == 1:
                tl.store(sums + 2, tl.sum(by_channel, 0))
            else:
                lane = tl.arange(0, BLOCK_P)
                tl.store(sums + 2 + lane, by_channel, mask=lane < P)
        _put(grad_x + image * L * X_PITCH + head * P, dx, start, L, X_PITCH, P)

        if CAUSAL:
            each = tl.dot(g, tl.trans(v), input_precision=PRECISION) * decay
            pair = each * cb
            added = into * dstep
            dstep = left * dstep + tl.sum(pair, 0)
            # A change of the rate at t changes what reaches t and later tokens of those before it. Each such pair is
            # added; differences of sums over all would drown in the pairs that lie on one side.
            upper = tl.where(row[:, None] <= row[None, :], 1.0, 0.0).to(v.dtype)  # older Triton cannot convert a truth
            pair = tl.where(row[:, None] > row[None, :], pair * step[None, :], 0.0)
            main_pair, lost_pair, scale = _split(pair, v.dtype)
            crossing = _times(upper, main_pair, lost_pair, scale, PRECISION)
            dchange = tl.sum(tl.where(row[:, None] > row[None, :], crossing + added[None, :], 0.0), 1)
            each, scale = _rounded(each * step[None, :], v.dtype)
            db += tl.dot(tl.trans(each), c, input_precision=PRECISION) * scale
            dc += tl.dot(each, b, input_precision=PRECISION) * scale
        db += into[:, None] * _times(v, main, lost, unit, PRECISION)
        state = _state(states, place, P, N, BLOCK_P, BLOCK_N)
        main, lost, unit = _split(state, v.dtype)
        read = _times(g, main, lost, unit, PRECISION)
        if CAUSAL:
            read *= tl.exp(clock + rest)[:, None]
            later = tl.sum(c.to(tl.float32) * read, 1)
            grad_state = _state(grad_states, place, P, N, BLOCK_P, BLOCK_N)
            through = tl.exp(end + end_rest) * tl.sum(tl.sum(state * grad_state, 1), 0)
            dchange += tl.cumsum(later, 0, reverse=True) + through
            dchange = tl.where(real, dchange, 0.0)
            dstep = (dstep + rate * dchange) * slope
        else:
            dchange = -dstep
            dstep = rate * dchange * slope
        dc += read
        tl.store(grad_dt + (image * L + start + row) * HEADS + head, dstep.to(grad_dt.dtype.element_ty), mask=real)
        tl.store(sums, tl.sum(step * dchange, 0))
        tl.store(sums + 1, tl.sum(tl.where(real, dstep, 0.0), 0))
    _put(grad_B + image * L * MAP_PITCH + group * N, db, start, L, MAP_PITCH, N)
    _put(grad_C + image * L * MAP_PITCH + group * N, dc, start, L, MAP_PITCH, N)
