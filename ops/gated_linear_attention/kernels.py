"""Triton kernels of gated linear attention.

Letters: N tokens, in chunks of `length` tokens that a program walks through in tiles of ROWS; HEADS heads of DK
channels of keys and DV of values; a state is DK x DV, of each of DIRECTIONS directions. `states` walks through tiles
and keeps the state that each of them finds, or (GRADIENT) the gradient of that which it leaves; `scan` joins chunks
that were walked from nothing; `outputs` and `gradients` take tiles, all at once, both directions of one together.

Where tokens are compared, their place counts, which runs against the rows of a tile on the way back. Log decays are
those of base 2. Their sums are products with zeros and ones, each of just those that it is the sum of.

Tokens of a tile see each other in one step if little fades within it: queries are taken back to its start, where keys
are brought, too, by exponents of the other sign. Otherwise they do so through halves: at level l, in blocks of 2^(l+1)
tokens, each one of the right half sees those of the left half; what lies between two tokens splits at the middle of the
block that has them in different halves, and no exponent is positive, so that no decay is too strong.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING: tl.constexpr = tl.constexpr(-160.0)
"""2 to its power is zero in float32."""

LITTLE: tl.constexpr = tl.constexpr(-64.0)
"""What may fade within a tile for one step; 2 to either power of it leaves room for what it multiplies."""

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, start, tokens, pitch, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Vectors of ROWS tokens, zeros beyond the last one."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = (start + row < tokens)[:, None]
    if WIDTH != BLOCK:
        real = real & (lane < WIDTH)[None, :]
    pointer += tl.cast(start, tl.int64) * pitch
    return tl.load(pointer + row[:, None] * pitch + lane[None, :], mask=real, other=0.0)


@triton.jit
def _put(pointer, value, start, tokens, pitch, WIDTH: tl.constexpr):
    """Writes vectors of a tile."""
    row, lane = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    real = (start + row < tokens)[:, None] & (lane < WIDTH)[None, :]
    pointer += tl.cast(start, tl.int64) * pitch
    tl.store(pointer + row[:, None] * pitch + lane[None, :], value.to(pointer.dtype.element_ty), mask=real)


@triton.jit
def _within_state(DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Offset of each number of a state, and whether it exists."""
    row, column = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_V)[None, :]
    return row * DV + column, (row < DK) & (column < DV)


@triton.jit
def _state(pointer, index, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    offset, real = _within_state(DK, DV, BLOCK_K, BLOCK_V)
    return tl.load(pointer + tl.cast(index, tl.int64) * (DK * DV) + offset, mask=real, other=0.0)


@triton.jit
def _put_state(pointer, value, index, DK: tl.constexpr, DV: tl.constexpr):
    offset, real = _within_state(DK, DV, value.shape[0], value.shape[1])
    pointer += tl.cast(index, tl.int64) * (DK * DV)
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=real)


@triton.jit
def _log2_beyond_one(e):
    """log2(1 + e) for e from 0 to 1 to 2e-7: enough in exponents, where errors count as they are."""
    series = -0.00930901217 * e + 0.0520584031
    series = series * e - 0.137520394
    series = series * e + 0.241863985
    series = series * e - 0.347300725
    series = series * e + 0.478683611
    series = series * e - 0.721165796
    series = series * e + 1.44268988
    return series * e


@triton.jit
def _log_decay(
    decay,
    start,
    tokens,
    pitch,
    inverse,
    DK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Log decays of a tile to base 2, zero beyond the last token, and the slope of natural ones.

    They are bounded, so that no sum is infinite.
    """
    value = _tile(decay, start, tokens, pitch, DK, BLOCK_K, ROWS).to(tl.float32)
    slope, result = 1.0, value * LOG2_E
    if NORMALIZED:
        factor = tl.cast(inverse, tl.float32)
        e = tl.exp2(-tl.abs(result))
        slope = factor * tl.where(value > 0, e, 1.0) / (1.0 + e)
        result = factor * (tl.minimum(result, 0.0) - _log2_beyond_one(e))
        result = tl.where((start + tl.arange(0, ROWS) < tokens)[:, None], result, 0.0)
    return tl.maximum(result, NOTHING), slope


@triton.jit
def _places(backwards, ROWS: tl.constexpr):
    """Place of each row of a tile in the walk through it."""
    row = tl.arange(0, ROWS)
    return row + backwards * (ROWS - 1 - 2 * row)


@triton.jit
def _until(place):
    """Ones for tokens that come up to each one, and itself."""
    return tl.where(place[:, None] >= place[None, :], 1.0, 0.0)


@triton.jit
def _after(place):
    """Ones for tokens that come after each one."""
    return tl.where(place[:, None] < place[None, :], 1.0, 0.0)


@triton.jit
def _step(place, level):
    """Ones for tokens whose decays lie between each one and the middle of its block, and which pairs of tokens this
    level joins."""
    own, other = place[:, None], place[None, :]
    apart = (own ^ other) >> level
    between = (apart == 0) & ((own >= other) == (((own >> level) & 1) == 1))
    return tl.where(between, 1.0, 0.0), (apart == 1) & (own > other)


@triton.jit
def _product(a, b, OPERAND: tl.constexpr):
    if tl.float32 == OPERAND:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    return tl.dot(a.to(OPERAND), b.to(OPERAND))


@triton.jit
def _sums(ones, value, OPERAND: tl.constexpr):
    """Sums over rows, of those that have ones. In half precision value comes in two parts of eight bits and more."""
    if tl.float32 == OPERAND:
        return tl.dot(ones, value, input_precision="tf32x3")
    # Cut off, not rounded: a logical operation, where a conversion takes as long as an exponential.
    high = (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    low = (value - high).to(OPERAND)
    return tl.dot(ones.to(OPERAND), low, tl.dot(ones.to(OPERAND), high.to(OPERAND)))


@triton.jit
def _either(second, one, other):
    if second == 1:
        one = other
    return one


@triton.jit(do_not_specialize=["tokens", "chunks", "length"])
def states(
    left,
    right,
    decay,
    reverse_decay,
    starts,
    kept,
    ends,
    decays,
    tokens,
    chunks,
    length,
    scale,
    inverse,
    left_batch,
    left_token,
    left_head,
    right_batch,
    right_token,
    right_head,
    decay_batch,
    decay_token,
    decay_head,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Walks through a chunk with a state, from `starts` or from nothing: keys are left, values right.

    Keeps, where asked for, the state that each tile finds, (batch, tiles, DIRECTIONS, HEADS, DK, DV), the state at the
    end of the chunk, (batch, chunks, DIRECTIONS, HEADS, DK, DV), and what the chunk leaves of a state, without DV. The
    gradient of the state is walked the other way, with queries and the gradient of the output.
    """
    program = tl.program_id(0)
    head, direction = tl.cast(program % HEADS, tl.int64), program // HEADS % DIRECTIONS
    chunk = program // (HEADS * DIRECTIONS) % chunks
    image = tl.cast(program // (HEADS * DIRECTIONS) // chunks, tl.int64)
    backwards = direction + REVERSE
    down = (backwards + GRADIENT) % 2
    place = _places(backwards, ROWS)
    if DIRECTIONS == 2:
        decay = _either(direction, decay, reverse_decay)
    left += image * left_batch + head * left_head
    right += image * right_batch + head * right_head
    decay += image * decay_batch + head * decay_head
    begin = chunk * length
    count = (tl.minimum(begin + length, tokens) - begin + ROWS - 1) // ROWS
    tiles = (tokens + ROWS - 1) // ROWS
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if starts is not None:
        state = _state(starts, program, DK, DV, BLOCK_K, BLOCK_V)
    time = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(count):
        tile = step + down * (count - 1 - 2 * step)
        start = begin + tile * ROWS
        if kept is not None:
            index = (image * tiles + begin // ROWS + tile) * (HEADS * DIRECTIONS) + direction * HEADS + head
            _put_state(kept, state, index, DK, DV)
        a, _ = _log_decay(decay, start, tokens, decay_token, inverse, DK, BLOCK_K, ROWS, NORMALIZED)
        x = _tile(left, start, tokens, left_token, DK, BLOCK_K, ROWS).to(tl.float32)
        y = _tile(right, start, tokens, right_token, DV, BLOCK_V, ROWS)
        if GRADIENT:
            x *= tl.exp2(_sums(_until(place), a, OPERAND)) * tl.cast(scale, tl.float32)
        else:
            x *= tl.exp2(_sums(_after(place), a, OPERAND))
        change = tl.sum(a, 0)
        time += change
        state = state * tl.exp2(change)[:, None] + _product(tl.trans(x), y, OPERAND)
    if ends is not None:
        _put_state(ends, state, program, DK, DV)
    if decays is not None:
        lane = tl.arange(0, BLOCK_K)
        tl.store(decays + tl.cast(program, tl.int64) * DK + lane, tl.exp2(time), mask=lane < DK)


@triton.jit(do_not_specialize=["chunks"])
def scan(
    parts,
    decays,
    initial,
    last,
    chunks,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Puts in the place of what each chunk adds to a state the state that it finds (or its gradients: GRADIENT)."""
    BLOCKS: tl.constexpr = (DK * DV + BLOCK - 1) // BLOCK
    walk = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    own, image = walk % (HEADS * DIRECTIONS), walk // (HEADS * DIRECTIONS)
    down = (own // HEADS + REVERSE + GRADIENT) % 2
    lane = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    real = lane < DK * DV
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + walk * (DK * DV) + lane, mask=real, other=0.0)
    for step in range(chunks):
        chunk = step + down * (chunks - 1 - 2 * step)
        index = (image * chunks + chunk) * (HEADS * DIRECTIONS) + own
        added = tl.load(parts + index * (DK * DV) + lane, mask=real, other=0.0)
        left = tl.load(decays + index * DK + lane // DV, mask=real, other=0.0)
        tl.store(parts + index * (DK * DV) + lane, state, mask=real)
        state = left * state + added
    tl.store(last + walk * (DK * DV) + lane, state, mask=real)


@triton.jit
def _in_one_step(query, key, value, a, change, place, state, OPERAND: tl.constexpr):
    """What tokens of a tile within which little fades read in the state that it finds, and see of each other, and the
    state that it leaves."""
    pairs = place[:, None] >= place[None, :]
    time = tl.maximum(_sums(tl.where(pairs, 1.0, 0.0), a, OPERAND), LITTLE)
    queries, keys = (query * tl.exp2(time)).to(OPERAND), (key * tl.exp2(-time)).to(OPERAND)
    scores = tl.where(pairs, _product(queries, tl.trans(keys), OPERAND), 0.0)
    result = _product(queries, state, OPERAND) + _product(scores, value, OPERAND)
    return result, (state + _product(tl.trans(keys), value, OPERAND)) * tl.exp2(change)[:, None]


@triton.jit
def _by_halves(query, key, value, a, change, place, state, LEVELS: tl.constexpr, OPERAND: tl.constexpr):
    """The same where more may fade."""
    own = place[:, None] == place[None, :]
    scores = tl.where(own, _product(query, tl.trans(key), OPERAND), 0.0)
    for level in range(LEVELS):
        between, pairs = _step(place, level)
        left = tl.exp2(_sums(between, a, OPERAND))
        scores = tl.where(pairs, _product(query * left, tl.trans(key * left), OPERAND), scores)
    queries = query * tl.exp2(_sums(_until(place), a, OPERAND))
    result = _product(queries, state, OPERAND) + _product(scores, value, OPERAND)
    keys = key * tl.exp2(_sums(_after(place), a, OPERAND))
    return result, state * tl.exp2(change)[:, None] + _product(tl.trans(keys), value, OPERAND)


@triton.jit
def _walk(
    q,
    k,
    v,
    decay,
    reverse_decay,
    starts,
    part,
    out,
    ends,
    index,
    tokens,
    begin,
    count,
    scale,
    inverse,
    q_token,
    k_token,
    v_token,
    decay_token,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
    STRONG: tl.constexpr,
):
    """The walks of `outputs`, one after the other; returns what faded at most within a tile."""
    pitch: tl.constexpr = HEADS * DV
    least = tl.zeros((BLOCK_K,), tl.float32)
    for direction in tl.static_range(DIRECTIONS):
        source = decay if direction == 0 else reverse_decay
        backwards = (direction + REVERSE) % 2
        place = _places(backwards, ROWS)
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        if starts is not None:
            state = _state(starts, index + direction * HEADS, DK, DV, BLOCK_K, BLOCK_V)
        for step in tl.range(count, num_stages=STAGES):
            start = begin + (step + backwards * (count - 1 - 2 * step)) * ROWS
            a, _ = _log_decay(source, start, tokens, decay_token, inverse, DK, BLOCK_K, ROWS, NORMALIZED)
            change = tl.sum(a, 0)
            query = _tile(q, start, tokens, q_token, DK, BLOCK_K, ROWS).to(tl.float32)
            key = _tile(k, start, tokens, k_token, DK, BLOCK_K, ROWS).to(tl.float32)
            value = _tile(v, start, tokens, v_token, DV, BLOCK_V, ROWS)
            if STRONG:
                result, state = _by_halves(query, key, value, a, change, place, state, LEVELS, OPERAND)
            else:
                result, state = _in_one_step(query, key, value, a, change, place, state, OPERAND)
                least = tl.minimum(least, change)
            if direction == 1:
                result += _tile(part, start, tokens, pitch, DV, BLOCK_V, ROWS)
            if direction == DIRECTIONS - 1:
                _put(out, result * tl.cast(scale, tl.float32), start, tokens, pitch, DV)
            else:
                _put(part, result, start, tokens, pitch, DV)
        if ends is not None:
            _put_state(ends, state, index + direction * HEADS, DK, DV)
        tl.debug_barrier()  # what some threads wrote others read
    return tl.min(least, 0)


@triton.jit(do_not_specialize=["tokens", "chunks", "length"])
def outputs(
    q,
    k,
    v,
    decay,
    reverse_decay,
    starts,
    part,
    out,
    ends,
    tokens,
    chunks,
    length,
    scale,
    inverse,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    decay_batch,
    decay_token,
    decay_head,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walks through a chunk with a state, from `starts` or from nothing, and makes the output: what tokens read in the
    state that their tile finds, and what they see of each other.

    Both directions come one after the other: the first one leaves its share in `part`, in float32. The walks take
    tiles in one step, and once more by halves if that was too much for one of them.
    """
    program = tl.program_id(0)
    head, chunk = tl.cast(program % HEADS, tl.int64), program // HEADS % chunks
    image = tl.cast(program // HEADS // chunks, tl.int64)
    q += image * q_batch + head * q_head
    k += image * k_batch + head * k_head
    v += image * v_batch + head * v_head
    decay += image * decay_batch + head * decay_head
    out += image * tokens * (HEADS * DV) + head * DV
    if DIRECTIONS == 2:
        reverse_decay += image * decay_batch + head * decay_head
        part += image * tokens * (HEADS * DV) + head * DV
    begin = chunk * length
    count = (tl.minimum(begin + length, tokens) - begin + ROWS - 1) // ROWS
    index = (image * chunks + chunk) * (DIRECTIONS * HEADS) + head
    least = _walk(
        q, k, v, decay, reverse_decay, starts, part, out, ends, index, tokens, begin, count, scale, inverse,
        q_token, k_token, v_token, decay_token, HEADS, DK, DV, BLOCK_K, BLOCK_V, ROWS, LEVELS, DIRECTIONS, REVERSE,
        NORMALIZED, OPERAND, STAGES, STRONG=False,
    )  # fmt: skip
    if least < LITTLE:
        _walk(
            q, k, v, decay, reverse_decay, starts, part, out, ends, index, tokens, begin, count, scale, inverse,
            q_token, k_token, v_token, decay_token, HEADS, DK, DV, BLOCK_K, BLOCK_V, ROWS, LEVELS, DIRECTIONS, REVERSE,
            NORMALIZED, OPERAND, 1, STRONG=True,
        )  # fmt: skip


@triton.jit
def _gradients(
    grad_out,
    q,
    k,
    v,
    decay,
    reverse_decay,
    kept,
    grad_kept,
    grad_q,
    grad_k,
    grad_v,
    grad_decay,
    grad_reverse_decay,
    index,
    start,
    tokens,
    scale,
    inverse,
    q_token,
    k_token,
    v_token,
    decay_token,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
    STRONG: tl.constexpr,
):
    """What `gradients` does, in one step or (STRONG) by halves; returns what faded at most within the tile."""
    pitch_k: tl.constexpr = HEADS * DK
    pitch_v: tl.constexpr = HEADS * DV
    factor = tl.cast(scale, tl.float32)
    query = _tile(q, start, tokens, q_token, DK, BLOCK_K, ROWS).to(tl.float32)
    key = _tile(k, start, tokens, k_token, DK, BLOCK_K, ROWS).to(tl.float32)
    value = _tile(v, start, tokens, v_token, DV, BLOCK_V, ROWS)
    grad = _tile(grad_out, start, tokens, pitch_v, DV, BLOCK_V, ROWS)
    by_score = _product(grad, tl.trans(value), OPERAND) * factor
    by_query = tl.zeros((ROWS, BLOCK_K), tl.float32)
    by_key = tl.zeros((ROWS, BLOCK_K), tl.float32)
    by_value = tl.zeros((ROWS, BLOCK_V), tl.float32)
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    least = 0.0
    for direction in tl.static_range(DIRECTIONS):
        source = decay if direction == 0 else reverse_decay
        place = _places((direction + REVERSE) % 2, ROWS)
        until, pairs = _until(place), place[:, None] >= place[None, :]
        a, slope = _log_decay(source, start, tokens, decay_token, inverse, DK, BLOCK_K, ROWS, NORMALIZED)
        change = tl.sum(a, 0)
        least = tl.minimum(least, tl.min(change, 0))
        state = _state(kept, index + direction * HEADS, DK, DV, BLOCK_K, BLOCK_V)
        grad_state = _state(grad_kept, index + direction * HEADS, DK, DV, BLOCK_K, BLOCK_V)
        # What passes through the tile, what it reads, and what it adds.
        through = tl.exp2(change) * tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
        read = _product(grad, tl.trans(state), OPERAND) * factor
        time = _sums(until, a, OPERAND)
        left = tl.exp2(time)
        if STRONG:
            brought = tl.exp2(_sums(_after(place), a, OPERAND))
        else:
            brought = tl.exp2(change[None, :] - time)
        added = _product(value, tl.trans(grad_state), OPERAND) * brought
        by_value += _product(key * brought, grad_state, OPERAND)
        by_key += added
        by_decay = through[None, :] + _sums(tl.trans(_after(place)), key * added, OPERAND)
        if STRONG:
            by_query += read * left
            by_decay += _sums(tl.trans(until), query * left * read, OPERAND)
            own = place[:, None] == place[None, :]
            each = tl.where(own, by_score, 0.0)
            by_query += _product(each, key, OPERAND)
            by_key += _product(each, query, OPERAND)
            scores += tl.where(own, _product(query, tl.trans(key), OPERAND), 0.0)
            for level in range(LEVELS):
                between, joined = _step(place, level)
                near = tl.exp2(_sums(between, a, OPERAND))
                queries, keys = (query * near).to(OPERAND), (key * near).to(OPERAND)
                scores += tl.where(joined, _product(queries, tl.trans(keys), OPERAND), 0.0)
                each = tl.where(joined, by_score, 0.0)
                part = _product(each, keys, OPERAND)
                by_query += part * near
                moved = queries.to(tl.float32) * part
                part = _product(tl.trans(each), queries, OPERAND)
                by_key += part * near
                moved += keys.to(tl.float32) * part
                by_decay += _sums(tl.trans(between), moved, OPERAND)
        else:
            back = tl.exp2(-tl.maximum(time, LITTLE))
            # Rounded once for all uses: then pairs that are not to change a decay cancel in what follows.
            queries, keys = (query * left).to(OPERAND), (key * back).to(OPERAND)
            scores += tl.where(pairs, _product(queries, tl.trans(keys), OPERAND), 0.0)
            each = tl.where(pairs, by_score, 0.0).to(OPERAND)
            part = read + _product(each, keys, OPERAND)
            by_query += part * left
            moved = queries.to(tl.float32) * part
            part = _product(tl.trans(each), queries, OPERAND)
            by_key += part * back
            moved -= keys.to(tl.float32) * part
            by_decay += _sums(tl.trans(until), moved, OPERAND)
        _put(grad_decay if direction == 0 else grad_reverse_decay, by_decay * slope, start, tokens, pitch_k, DK)
    by_value += _product(tl.trans(scores), grad, OPERAND) * factor
    _put(grad_q, by_query, start, tokens, pitch_k, DK)
    _put(grad_k, by_key, start, tokens, pitch_k, DK)
    _put(grad_v, by_value, start, tokens, pitch_v, DV)
    return least


@triton.jit(do_not_specialize=["tokens"])
def gradients(
    grad_out,
    q,
    k,
    v,
    decay,
    reverse_decay,
    kept,
    grad_kept,
    grad_q,
    grad_k,
    grad_v,
    grad_decay,
    grad_reverse_decay,
    tokens,
    scale,
    inverse,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    decay_batch,
    decay_token,
    decay_head,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Gradients of a tile, from the states that it finds and the gradients of those that it leaves."""
    program = tl.program_id(0)
    tiles = (tokens + ROWS - 1) // ROWS
    head, image = tl.cast(program % HEADS, tl.int64), tl.cast(program // HEADS // tiles, tl.int64)
    tile = program // HEADS % tiles
    keys, values = image * tokens * (HEADS * DK) + head * DK, image * tokens * (HEADS * DV) + head * DV
    index = (image * tiles + tile) * (HEADS * DIRECTIONS) + head
    q += image * q_batch + head * q_head
    k += image * k_batch + head * k_head
    v += image * v_batch + head * v_head
    decay += image * decay_batch + head * decay_head
    grad_decay += keys
    if DIRECTIONS == 2:
        reverse_decay += image * decay_batch + head * decay_head
        grad_reverse_decay += keys
    least = _gradients(
        grad_out + values, q, k, v, decay, reverse_decay, kept, grad_kept, grad_q + keys, grad_k + keys,
        grad_v + values, grad_decay, grad_reverse_decay, index, tile * ROWS, tokens, scale, inverse,
        q_token, k_token, v_token, decay_token, HEADS, DK, DV, BLOCK_K, BLOCK_V, ROWS, LEVELS, DIRECTIONS, REVERSE,
        NORMALIZED, OPERAND, STRONG=False,
    )  # fmt: skip
    if least < LITTLE:
        _gradients(
            grad_out + values, q, k, v, decay, reverse_decay, kept, grad_kept, grad_q + keys, grad_k + keys,
            grad_v + values, grad_decay, grad_reverse_decay, index, tile * ROWS, tokens, scale, inverse,
            q_token, k_token, v_token, decay_token, HEADS, DK, DV, BLOCK_K, BLOCK_V, ROWS, LEVELS, DIRECTIONS, REVERSE,
            NORMALIZED, OPERAND, STRONG=True,
        )  # fmt: skip
