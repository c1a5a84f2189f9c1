"""Triton kernels of linear attention, by rule: MEAN subtraction, kernel SUM, FLOW conservation.

Letters: N tokens, of which a program takes a chunk of `length` and walks through it in tiles of ROWS; HEADS heads of D
channels of queries and keys and E of values. The sums of a head are a D x E matrix, and behind it those of keys and of
values (MEAN), of keys (SUM), or of weights, one number (FLOW). The flows of a head are four vectors: sums of keys, of
queries, and of both over their flows.

Queries and keys are what the rule makes of them: themselves, after ReLU, or after a sigmoid. Where one projection left
all three side by side (PACKED), k and v are the same tensor as q, and begin where its queries end.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEAN: tl.constexpr = tl.constexpr(0)
SUM: tl.constexpr = tl.constexpr(1)
FLOW: tl.constexpr = tl.constexpr(2)


@triton.jit
def _share(chunks, HEADS: tl.constexpr):
    """Head, chunk and image of this program; heads of the same tokens run side by side."""
    program = tl.program_id(0)
    return program % HEADS, program // HEADS % chunks, tl.cast(program // HEADS // chunks, tl.int64)


@triton.jit
def _at(pointer, image, head, batch, stride, place, HEADS: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr):
    """Where the vectors of a head begin, in q, k or v (place 0, 1 or 2); `stride` None stands for adjacent heads."""
    pointer += image * batch
    if PACKED:
        pointer += place * (HEADS * D)
    if stride is None:
        pointer += head * D
    else:
        pointer += head * stride
    return pointer


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
def _matrix(pointer, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    row, lane = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_E)[None, :]
    return tl.load(pointer + row * E + lane, mask=(row < D) & (lane < E), other=0.0)


@triton.jit
def _put_matrix(pointer, value, D: tl.constexpr, E: tl.constexpr):
    row, lane = tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    tl.store(pointer + row * E + lane, value, mask=(row < D) & (lane < E))


@triton.jit
def _vector(pointer, added, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A vector and a number added to each channel it has."""
    lane = tl.arange(0, BLOCK)
    return tl.where(lane < WIDTH, tl.load(pointer + lane, mask=lane < WIDTH, other=0.0) + added, 0.0)


@triton.jit
def _put_vector(pointer, value, WIDTH: tl.constexpr):
    lane = tl.arange(0, value.shape[0])
    tl.store(pointer + lane, value, mask=lane < WIDTH)


@triton.jit
def _shifted(value, added, WIDTH: tl.constexpr):
    """The same for a vector that is no memory yet."""
    return tl.where(tl.arange(0, value.shape[0]) < WIDTH, value + added, 0.0)


@triton.jit
def _split(value, dtype: tl.constexpr):
    """A float32 factor of a product in two parts of a dtype, and the unit to multiply the product by.

    A state is a sum over many tokens, and all of its digits count. For the range of float16 it is divided by a unit.
    """
    unit = 1.0
    if dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(value), 1), 0)
        unit = tl.where(largest > 1e-30, largest * (1.0 / 32768), 1.0)
        value = value / unit
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype), unit


@triton.jit
def _times(a, high, low, unit, PRECISION: tl.constexpr):
    """Product of a tile, in float32 or the dtype of the input, with what `_split` made."""
    if a.dtype == high.dtype:
        value = tl.dot(a, high, input_precision=PRECISION)
        if a.dtype != tl.float32:
            value = tl.dot(a, low, value)
        value = value * unit
    else:
        main, rest, share = _split(a, high.dtype)
        value = tl.dot(rest, high, tl.dot(main, low, tl.dot(main, high))) * (unit * share)
    return value


@triton.jit
def _added(total, left, right, PRECISION: tl.constexpr):
    """A matrix and what the tokens of a tile add to it, left^T right; the left one may be float32."""
    if left.dtype == right.dtype:
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    else:
        high, low, unit = _split(left, right.dtype)
        total += tl.dot(tl.trans(low), right, tl.dot(tl.trans(high), right)) * unit
    return total


@triton.jit
def _features(x, start, last, D: tl.constexpr, RULE: tl.constexpr):
    """What the rule makes of queries or keys. Of a sigmoid zeros would come out one half."""
    if RULE == SUM:
        x = tl.where(x < 0, 0.0, x).to(x.dtype)
    if RULE == FLOW:
        real = (start + tl.arange(0, x.shape[0]) < last)[:, None] & (tl.arange(0, x.shape[1]) < D)[None, :]
        x = tl.where(real, tl.sigmoid(x.to(tl.float32)), 0.0)
    return x


@triton.jit
def _queries(
    q, start, last, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    return _features(_tile(q, start, last, stride, D, BLOCK_D, ROWS), start, last, D, RULE)


@triton.jit
def _keys(
    k,
    position,
    start,
    last,
    stride,
    position_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
):
    key = _tile(k, start, last, stride, D, BLOCK_D, ROWS)
    if position is not None:
        key = key.to(tl.float32) + _tile(position, start, last, position_stride, D, BLOCK_D, ROWS).to(tl.float32)
    return _features(key, start, last, D, RULE)


@triton.jit
def _flow(ends, others, epsilon):
    """What passes each end, from or to all the others: (ROWS,)."""
    return tl.sum((ends + epsilon) * others[None, :], 1) + epsilon


@triton.jit
def _weight(flow, real):
    """What a key competes with, before it is over the sum of that of all keys."""
    return tl.where(real, tl.exp(tl.minimum(tl.maximum(flow, -1.0), 1.0)), 0.0)


@triton.jit
def _flows(
    q,
    k,
    position,
    keys,
    queries,
    begin,
    last,
    q_token,
    k_token,
    position_token,
    epsilon,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Sums of keys and of queries; the second time, given these, by the reciprocal flow of each."""
    key_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    query_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, last, ROWS):
        query = _queries(q, start, last, q_token, D, BLOCK_D, ROWS, FLOW)
        key = _keys(k, position, start, last, k_token, position_token, D, BLOCK_D, ROWS, FLOW)
        if SECOND:
            query = query / _flow(query, keys, epsilon)[:, None]
            key = key / _flow(key, queries, epsilon)[:, None]
        key_sum += key
        query_sum += query
    return tl.sum(key_sum, 0), tl.sum(query_sum, 0)


@triton.jit
def _summed(
    k,
    v,
    position,
    conserved,
    begin,
    last,
    k_token,
    v_token,
    position_token,
    epsilon,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over tokens: the matrix, keys, values, and weights. `conserved` is the fourth flow."""
    matrix = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    keys, values = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_E), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, last, ROWS):
        key = _keys(k, position, start, last, k_token, position_token, D, BLOCK_D, ROWS, RULE)
        value = _tile(v, start, last, v_token, E, BLOCK_E, ROWS)
        if RULE == FLOW:
            weight = _weight(_flow(key, conserved, epsilon), start + tl.arange(0, ROWS) < last)
            weights += weight
            key = key * weight[:, None]
        else:
            keys += key.to(tl.float32)
        if RULE == MEAN:
            values += value.to(tl.float32)
        matrix = _added(matrix, key, value, PRECISION)
    return matrix, tl.sum(keys, 0), tl.sum(values, 0), tl.sum(weights, 0)


@triton.jit
def _put_sums(sums, matrix, keys, values, weights, D: tl.constexpr, E: tl.constexpr, RULE: tl.constexpr):
    _put_matrix(sums, matrix, D, E)
    if RULE == FLOW:
        tl.store(sums + D * E, weights)
    else:
        _put_vector(sums + D * E, keys, D)
    if RULE == MEAN:
        _put_vector(sums + D * E + D, values, E)


@triton.jit
def _state(matrix, keys, values, weights, count, scale, RULE: tl.constexpr):
    """What queries are multiplied by, of the sums over so many tokens."""
    if RULE == MEAN:
        matrix = (matrix / count - (keys / count)[:, None] * (values / count)[None, :]) * scale
    if RULE == FLOW:
        matrix = matrix * (count / weights)
    return matrix


@triton.jit
def _denominator(total, constant, FLOORED: tl.constexpr):
    return tl.maximum(total, constant) if FLOORED else total + constant


@triton.jit(do_not_specialize=["N", "chunks", "length"])
def collect(
    q,
    k,
    v,
    position,
    first,
    flows,
    parts,
    N,
    chunks,
    length,
    constant,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    position_token,
    position_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds to the first flows (STEP 0), the last ones (1), or the sums (2): (B, chunks, HEADS, ...)."""
    SIZE: tl.constexpr = D * E + (D + E if RULE == MEAN else (D if RULE == SUM else 1))
    head, chunk, image = _share(chunks, HEADS)
    pair, program = image * HEADS + head, tl.cast(tl.program_id(0), tl.int64)
    begin = chunk * length
    last = tl.minimum(begin + length, N)
    epsilon = tl.cast(constant, tl.float32)
    k = _at(k, image, head, k_batch, k_head, 1, HEADS, D, PACKED)
    if position is not None:
        position += head * position_head
    if STEP == 2:
        v = _at(v, image, head, v_batch, v_head, 2, HEADS, E, PACKED)
        conserved = 0.0
        if RULE == FLOW:
            conserved = _vector(flows + pair * (4 * D) + 3 * D, epsilon, D, BLOCK_D)
        matrix, keys, values, weights = _summed(
            k, v, position, conserved, begin, last, k_token, v_token, position_token, epsilon,
            D, E, BLOCK_D, BLOCK_E, ROWS, RULE, PRECISION,
        )  # fmt: skip
        _put_sums(parts + program * SIZE, matrix, keys, values, weights, D, E, RULE)
    else:
        q = _at(q, image, head, q_batch, q_head, 0, HEADS, D, PACKED)
        keys, queries = 0.0, 0.0
        if STEP == 1:
            keys = _vector(first + pair * (2 * D), epsilon, D, BLOCK_D)
            queries = _vector(first + pair * (2 * D) + D, epsilon, D, BLOCK_D)
        key_sum, query_sum = _flows(
            q, k, position, keys, queries, begin, last, q_token, k_token, position_token, epsilon,
            D, BLOCK_D, ROWS, STEP == 1,
        )  # fmt: skip
        _put_vector(parts + program * (2 * D), key_sum, D)
        _put_vector(parts + program * (2 * D) + D, query_sum, D)


@triton.jit
def _place(start, N, H, W, ROWS: tl.constexpr):
    """Row and column of tokens in the map that the last H * W of them are; a row far off for those before it."""
    place = start + tl.arange(0, ROWS) - (N - H * W)
    return tl.where(place >= 0, place // W, -8), place % W


@triton.jit
def _neighbor(
    pointer, start, stride, y, x, down, right, H, W, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """Vectors of the tokens so many rows down and columns to the right; zeros outside of the map."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    real = (y >= 0) & (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
    real = real[:, None] & (lane < E)[None, :]
    pointer += (tl.cast(start, tl.int64) + (down * W + right)) * stride
    return tl.load(pointer + row[:, None] * stride + lane[None, :], mask=real, other=0.0).to(tl.float32)


@triton.jit
def _tap(local, tap, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Weights of one of nine neighbors, of a head's (E, 9)."""
    lane = tl.arange(0, BLOCK_E)
    return tl.load(local + lane * 9 + tap, mask=lane < E, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N", "chunks", "length", "H", "W"])
def outputs(
    q,
    k,
    v,
    position,
    temperature,
    local,
    sums,
    flows,
    out,
    N,
    chunks,
    length,
    constant,
    H,
    W,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    position_token,
    position_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    FLOORED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output of a chunk, from the sums and flows of its head. With WHOLE a head is one chunk and makes them itself."""
    SIZE: tl.constexpr = D * E + (D + E if RULE == MEAN else (D if RULE == SUM else 1))
    head, chunk, image = _share(chunks, HEADS)
    pair = image * HEADS + head
    begin = chunk * length
    last = tl.minimum(begin + length, N)
    number, count = tl.cast(constant, tl.float32), tl.cast(N, tl.float32)
    q = _at(q, image, head, q_batch, q_head, 0, HEADS, D, PACKED)
    v = _at(v, image, head, v_batch, v_head, 2, HEADS, E, PACKED)
    sums += pair * SIZE
    sinks, conserved, weights, values = 0.0, 0.0, 0.0, 0.0
    if RULE == FLOW:
        flows += pair * (4 * D)
    if WHOLE:
        k = _at(k, image, head, k_batch, k_head, 1, HEADS, D, PACKED)
        if position is not None:
            position += head * position_head
        if RULE == FLOW:
            keys, queries = _flows(
                q, k, position, 0.0, 0.0, 0, N, q_token, k_token, position_token, number, D, BLOCK_D, ROWS, False
            )
            _put_vector(flows, keys, D)
            _put_vector(flows + D, queries, D)
            sinks = _shifted(keys, number, D)
            keys, queries = _flows(
                q, k, position, sinks, _shifted(queries, number, D), 0, N, q_token, k_token, position_token, number,
                D, BLOCK_D, ROWS, True,
            )  # fmt: skip
            _put_vector(flows + 2 * D, keys, D)
            _put_vector(flows + 3 * D, queries, D)
            conserved = _shifted(keys, number, D)
            queries = _shifted(queries, number, D)
        else:
            queries = 0.0
        matrix, keys, values, weights = _summed(
            k, v, position, queries, 0, N, k_token, v_token, position_token, number,
            D, E, BLOCK_D, BLOCK_E, ROWS, RULE, PRECISION,
        )  # fmt: skip
        _put_sums(sums, matrix, keys, values, weights, D, E, RULE)
    else:
        matrix = _matrix(sums, D, E, BLOCK_D, BLOCK_E)
        if RULE == FLOW:
            weights = tl.load(sums + D * E)
            sinks = _vector(flows, number, D, BLOCK_D)
            conserved = _vector(flows + 2 * D, number, D, BLOCK_D)
        keys = _vector(sums + D * E, 0.0, D, BLOCK_D)
        if RULE == MEAN:
            values = _vector(sums + D * E + D, 0.0, E, BLOCK_E)
    high, low, unit = _split(_state(matrix, keys, values, weights, count, number, RULE), q.dtype.element_ty)
    out += image * N * (HEADS * E) + head * E
    factor = 1.0
    if temperature is not None:
        factor = tl.load(temperature + head).to(tl.float32)
    for start in range(begin, last, ROWS):
        query = _queries(q, start, last, q_token, D, BLOCK_D, ROWS, RULE)
        y = _times(query, high, low, unit, PRECISION)
        if RULE == MEAN:
            y += (values / count)[None, :]
        if RULE == SUM:
            total = tl.sum(query.to(tl.float32) * keys[None, :], 1)
            y = y / _denominator(total, number, FLOORED)[:, None]
        if RULE == FLOW:
            y = y * (tl.sigmoid(_flow(query, conserved, number)) / _flow(query, sinks, number))[:, None]
        y *= factor
        if local is not None:
            # Summed up by itself: what is loaded lies otherwise in registers than a product does.
            row, column = _place(start, N, H, W, ROWS)
            around = tl.zeros((ROWS, BLOCK_E), tl.float32)
            for tap in tl.static_range(9):
                near = _neighbor(
                    v, start, v_token, row, column, tap // 3 - 1, tap % 3 - 1, H, W, E, BLOCK_E, ROWS
                )  # fmt: skip
                around += near * _tap(local + pair * (9 * E), tap, E, BLOCK_E)
            y += around
        _put(out, y, start, last, HEADS * E, E)


@triton.jit(do_not_specialize=["N", "chunks", "length"])
def query_gradients(
    grad_out,
    q,
    temperature,
    sums,
    flows,
    grad_flows,
    grad_q,
    parts,
    N,
    chunks,
    length,
    constant,
    q_batch,
    q_token,
    q_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    FLOORED: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a chunk of queries, and what they add to that of the state and a vector: (B, chunks, HEADS, ...).

    The vector is the value of all tokens (MEAN), the sum of keys (SUM), or the third flow (FLOW). For flows there are
    two steps: STEP 0 makes the parts, and STEP 1 the gradient and parts of that of the first flow, given those of the
    fourth and second. All but the gradient of queries is left to be multiplied by the temperature.
    """
    SIZE: tl.constexpr = D * E + (D + E if RULE == MEAN else (D if RULE == SUM else 1))
    LATER: tl.constexpr = STEP == 1
    head, chunk, image = _share(chunks, HEADS)
    pair, program = image * HEADS + head, tl.cast(tl.program_id(0), tl.int64)
    begin = chunk * length
    last = tl.minimum(begin + length, N)
    number, count = tl.cast(constant, tl.float32), tl.cast(N, tl.float32)
    q = _at(q, image, head, q_batch, q_head, 0, HEADS, D, PACKED)
    grad_out += image * N * (HEADS * E) + head * E
    GRAD: tl.constexpr = HEADS * D * (3 if PACKED else 1)
    grad_q += image * N * GRAD + head * D
    sums += pair * SIZE
    keys, values, weights = _vector(sums + D * E, 0.0, D, BLOCK_D), 0.0, 0.0
    if RULE == MEAN:
        values = _vector(sums + D * E + D, 0.0, E, BLOCK_E)
    if RULE == FLOW:
        flows += pair * (4 * D)
        weights = tl.load(sums + D * E)
        keys = _vector(flows, number, D, BLOCK_D)
        conserved = _vector(flows + 2 * D, number, D, BLOCK_D)
        if LATER:
            grad_fourth = _vector(grad_flows + pair * (2 * D), 0.0, D, BLOCK_D)
            grad_second = _vector(grad_flows + pair * (2 * D) + D, 0.0, D, BLOCK_D)
    state = _state(_matrix(sums, D, E, BLOCK_D, BLOCK_E), keys, values, weights, count, number, RULE)
    high, low, unit = _split(tl.trans(state), q.dtype.element_ty)
    factor = 1.0
    if temperature is not None:
        factor = tl.load(temperature + head).to(tl.float32)
    matrix = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    by_value, by_key = tl.zeros((ROWS, BLOCK_E), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, last, ROWS):
        query = _queries(q, start, last, q_token, D, BLOCK_D, ROWS, RULE)
        g = _tile(grad_out, start, last, HEADS * E, E, BLOCK_E, ROWS)
        slope = _times(g, high, low, unit, PRECISION)
        if RULE == MEAN:
            matrix = _added(matrix, query, g, PRECISION)
            by_value += g.to(tl.float32)
        if RULE == SUM:
            wide = query.to(tl.float32)
            total = tl.sum(wide * keys[None, :], 1)
            over = _denominator(total, number, FLOORED)
            by_total = tl.sum(wide * slope, 1) / over
            if FLOORED:
                by_total = tl.where(total >= number, by_total, 0.0)
            share = wide / over[:, None]
            slope = tl.where(wide > 0, (slope - by_total[:, None] * keys[None, :]) / over[:, None], 0.0)
            by_key -= by_total[:, None] * share
            matrix = _added(matrix, share, g, PRECISION)
        if RULE == FLOW:
            incoming = 1.0 / _flow(query, keys, number)
            gate = tl.sigmoid(_flow(query, conserved, number))
            reached = tl.sum(query * slope, 1)
            by_sink = incoming * reached * gate * (1.0 - gate)
            if LATER:
                by_flow = gate * reached + tl.sum(query * grad_fourth[None, :], 1)
                by_flow = -by_flow * incoming * incoming
                by_key += by_flow[:, None] * (query + number)
                slope = (gate * incoming)[:, None] * slope + by_sink[:, None] * conserved[None, :]
                slope += incoming[:, None] * grad_fourth[None, :] + by_flow[:, None] * keys[None, :]
                slope = (slope + grad_second[None, :]) * query * (1.0 - query)
            else:
                by_key += by_sink[:, None] * (query + number)
                matrix = _added(matrix, query * (gate * incoming)[:, None], g, PRECISION)
        if RULE != FLOW or LATER:
            _put(grad_q, slope * factor, start, last, GRAD, D)
    if LATER:
        _put_vector(parts + program * D, tl.sum(by_key, 0), D)
    else:
        parts += program * (D * E + (E if RULE == MEAN else D))
        _put_matrix(parts, matrix, D, E)
        if RULE == MEAN:
            _put_vector(parts + D * E, tl.sum(by_value, 0), E)
        else:
            _put_vector(parts + D * E, tl.sum(by_key, 0), D)


@triton.jit
def _three(
    grad_out,
    local,
    value,
    total,
    sum0,
    sum1,
    sum2,
    start,
    stride,
    y,
    x,
    H,
    W,
    ROW: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Takes a row of three taps into the gradients of values and of the kernels."""
    g0 = _neighbor(grad_out, start, stride, y, x, 1 - ROW, 1, H, W, E, BLOCK_E, ROWS)
    g1 = _neighbor(grad_out, start, stride, y, x, 1 - ROW, 0, H, W, E, BLOCK_E, ROWS)
    g2 = _neighbor(grad_out, start, stride, y, x, 1 - ROW, -1, H, W, E, BLOCK_E, ROWS)
    total += g0 * _tap(local, 3 * ROW, E, BLOCK_E)
    total += g1 * _tap(local, 3 * ROW + 1, E, BLOCK_E)
    total += g2 * _tap(local, 3 * ROW + 2, E, BLOCK_E)
    return total, sum0 + value * g0, sum1 + value * g1, sum2 + value * g2


@triton.jit
def _put_tap(parts, values, tap, E: tl.constexpr):
    lane = tl.arange(0, values.shape[1])
    tl.store(parts + lane * 9 + tap, tl.sum(values, 0), mask=lane < E)


@triton.jit(do_not_specialize=["N", "chunks", "length", "H", "W"])
def key_gradients(
    grad_out,
    k,
    v,
    position,
    temperature,
    local,
    sums,
    flows,
    grad_sums,
    grad_flows,
    grad_k,
    grad_v,
    parts,
    N,
    chunks,
    length,
    constant,
    H,
    W,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    position_token,
    position_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a chunk of keys and values, and its part of that of local kernels: (B, chunks, HEADS, E, 9).

    `grad_sums` holds what `query_gradients` summed up. For flows there are two steps: STEP 0 makes only the parts of
    the gradients of the fourth and second flow, (B, chunks, HEADS, 2, D); STEP 1 the gradients, given that of the first
    flow.
    """
    SIZE: tl.constexpr = D * E + (D + E if RULE == MEAN else (D if RULE == SUM else 1))
    EARLY: tl.constexpr = (RULE == FLOW) and (STEP == 0)
    head, chunk, image = _share(chunks, HEADS)
    pair, program = image * HEADS + head, tl.cast(tl.program_id(0), tl.int64)
    begin = chunk * length
    last = tl.minimum(begin + length, N)
    number, count = tl.cast(constant, tl.float32), tl.cast(N, tl.float32)
    k = _at(k, image, head, k_batch, k_head, 1, HEADS, D, PACKED)
    v = _at(v, image, head, v_batch, v_head, 2, HEADS, E, PACKED)
    if position is not None:
        position += head * position_head
    grad_out += image * N * (HEADS * E) + head * E
    GRAD_K: tl.constexpr = HEADS * D * (3 if PACKED else 1)
    GRAD_V: tl.constexpr = HEADS * E * (3 if PACKED else 1)
    if PACKED:
        grad_v = grad_k + 2 * HEADS * E
        grad_k += HEADS * D
    grad_k += image * N * GRAD_K + head * D
    grad_v += image * N * GRAD_V + head * E
    sums += pair * SIZE
    grad_sums += pair * (D * E + (E if RULE == MEAN else D))
    matrix = _matrix(grad_sums, D, E, BLOCK_D, BLOCK_E)
    if RULE == MEAN:
        matrix = matrix * (number / count)
        by_keys = -tl.sum(matrix * (_vector(sums + D * E + D, 0.0, E, BLOCK_E) / count)[None, :], 1)
        by_values = -tl.sum(matrix * (_vector(sums + D * E, 0.0, D, BLOCK_D) / count)[:, None], 0)
        by_values += _vector(grad_sums + D * E, 0.0, E, BLOCK_E) / count
    if RULE == SUM:
        by_keys = _vector(grad_sums + D * E, 0.0, D, BLOCK_D)
    if RULE == FLOW:
        flows += pair * (4 * D)
        weights = tl.load(sums + D * E)
        mean = tl.sum(tl.sum(matrix * _matrix(sums, D, E, BLOCK_D, BLOCK_E), 1), 0) / weights
        queries = _vector(flows + D, number, D, BLOCK_D)
        conserved = _vector(flows + 3 * D, number, D, BLOCK_D)
        grad_third = _vector(grad_sums + D * E, 0.0, D, BLOCK_D)
        if not EARLY:
            by_keys = _vector(grad_flows + pair * D, 0.0, D, BLOCK_D)
    high, low, unit = _split(matrix, k.dtype.element_ty)
    turned, turned_low, turned_unit = _split(tl.trans(matrix), k.dtype.element_ty)
    factor = 1.0
    if temperature is not None:
        factor = tl.load(temperature + head).to(tl.float32)
    none = tl.zeros((ROWS, BLOCK_E), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = none, none, none, none, none, none, none, none, none
    grad_fourth, grad_second = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, last, ROWS):
        key = _keys(k, position, start, last, k_token, position_token, D, BLOCK_D, ROWS, RULE)
        value = _tile(v, start, last, v_token, E, BLOCK_E, ROWS)
        slope = _times(value, turned, turned_low, turned_unit, PRECISION)
        if RULE == FLOW:
            outgoing = 1.0 / _flow(key, queries, number)
            flow = _flow(key, conserved, number)
            weight = _weight(flow, start + tl.arange(0, ROWS) < last) * (count / weights)
            by_source = weight * (tl.sum(key * slope, 1) - mean)
            by_source = tl.where((flow >= -1.0) & (flow <= 1.0), by_source, 0.0)
            by_flow = -outgoing * outgoing * tl.sum(key * grad_third[None, :], 1)
            if EARLY:
                grad_fourth += by_source[:, None] * (key + number)
                grad_second += by_flow[:, None] * (key + number)
            else:
                slope = weight[:, None] * slope + by_source[:, None] * conserved[None, :]
                slope += outgoing[:, None] * grad_third[None, :] + by_flow[:, None] * queries[None, :]
                slope = (slope + by_keys[None, :]) * key * (1.0 - key)
        if RULE == MEAN:
            slope += by_keys[None, :]
        if RULE == SUM:
            slope = tl.where(key > 0, slope + by_keys[None, :], 0.0)
        if not EARLY:
            _put(grad_k, slope * factor, start, last, GRAD_K, D)
            total = _times(key, high, low, unit, PRECISION)
            if RULE == FLOW:
                total = total * weight[:, None]
            if RULE == MEAN:
                total += by_values[None, :]
            total *= factor
            if local is not None:
                y, x = _place(start, N, H, W, ROWS)
                here, taps = value.to(tl.float32), local + pair * (9 * E)
                around, s0, s1, s2 = _three(
                    grad_out, taps, here, none, s0, s1, s2, start, HEADS * E, y, x, H, W, 0, E, BLOCK_E, ROWS
                )
                around, s3, s4, s5 = _three(
                    grad_out, taps, here, around, s3, s4, s5, start, HEADS * E, y, x, H, W, 1, E, BLOCK_E, ROWS
                )
                around, s6, s7, s8 = _three(
                    grad_out, taps, here, around, s6, s7, s8, start, HEADS * E, y, x, H, W, 2, E, BLOCK_E, ROWS
                )
                total += around
            _put(grad_v, total, start, last, GRAD_V, E)
    if EARLY:
        _put_vector(parts + program * (2 * D), tl.sum(grad_fourth, 0), D)
        _put_vector(parts + program * (2 * D) + D, tl.sum(grad_second, 0), D)
    elif local is not None:
        parts += program * (9 * E)
        _put_tap(parts, s0, 0, E)
        _put_tap(parts, s1, 1, E)
        _put_tap(parts, s2, 2, E)
        _put_tap(parts, s3, 3, E)
        _put_tap(parts, s4, 4, E)
        _put_tap(parts, s5, 5, E)
        _put_tap(parts, s6, 6, E)
        _put_tap(parts, s7, 7, E)
        _put_tap(parts, s8, 8, E)
