"""Triton kernels of the selective scan over routes of a map.

Letters: T tokens of a tile, C channels of a block, N states, K routes, r numbers from which a step is projected.

A program is one warp whose lanes are channels: a thread holds all tokens of a tile for its channel, so that scanning is
arithmetic within a thread. Tiles are cut from a route's order, the same for both ways along it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _combine(a1, b1, a2, b2):
    """h -> a1 h + b1, and then h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _combine_before(a1, b1, l1, k1, a2, b2, l2, k2):
    """The same, that also tells k h + l of the last map, which sees the state before it."""
    return a2 * a1, a2 * b1 + b2, k2 * b1 + l2, k2 * a1


@triton.jit
def _softplus(v):
    """log(1 + e^v) to the precision of float32, and e^-|v|. A polynomial is cheaper than the logarithm."""
    z = tl.exp2(-tl.abs(v) * LOG2E)
    p = 0.0051058258 * z - 0.0289919564
    p = p * z + 0.0773807384
    p = p * z - 0.135906002
    p = p * z + 0.190713096
    p = p * z - 0.248339455
    p = p * z + 0.333179343
    p = p * z - 0.499994357
    p = p * z + 0.999999965
    return tl.maximum(v, 0.0) + z * p, z


@triton.jit
def _divided(t, length):
    """t // length; exact where length * t < 2**32."""
    length = tl.cast(length, tl.uint32)
    reciprocal = tl.cast(0xFFFFFFFF, tl.uint32) // length + 1  # 0 for a length of 1
    return tl.where(length == 1, t, tl.umulhi(tl.cast(t, tl.uint32), reciprocal).to(tl.int32))


@triton.jit
def _pixel(t, H, W, columns, continuous):
    """Number of the t-th pixel of an order, counted row after row."""
    length = tl.where(columns, H, W)
    line = _divided(t, length)
    place = t - line * length
    place = tl.where(continuous & (line % 2 == 1), length - 1 - place, place)
    return tl.where(columns, place * W + line, line * W + place)


@triton.jit
def _direction(t, L, H, W, columns, reverse):
    """Direction by which a continuous route comes to the t-th pixel of its order: 0 start, right, left, up, down."""
    length = tl.where(columns, H, W)
    line = _divided(t, length)
    place = t - line * length
    turned = line % 2 == 1
    along = tl.where(turned != reverse, 1, 0)
    along = tl.where(columns, 4 - along, 1 + along)
    onward = tl.where(columns, 1, 4) + tl.where(reverse, tl.where(columns, 1, -1), 0)
    turning = place == tl.where(reverse, length - 1, 0)
    start = t == tl.where(reverse, L - 1, 0)
    return tl.where(start, 0, tl.where(turning, onward, along))


@triton.jit
def _last(tile, token, LAST: tl.constexpr):
    """One row of a tile. Adding integers, compilers see that all others are zero."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(token[:, None] == LAST, bits, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _tile(pointer, row, pitch, channel, real, d):
    """Numbers of a tile of tokens and channels in float32."""
    where = row[:, None] * pitch + channel[None, :]
    return tl.load(pointer + where, mask=real[:, None] & (channel < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, channel, d):
    return tl.load(pointer + channel, mask=channel < d, other=0.0).to(tl.float32)


@triton.jit
def _projection(weight, k, channel, d, R: tl.constexpr, RP: tl.constexpr):
    """Weights of the steps of one route, (RP, C)."""
    column = tl.arange(0, RP)
    where = (k * d + channel)[None, :] * R + column[:, None]
    return tl.load(weight + where, mask=(channel < d)[None, :] & (column < R)[:, None], other=0.0)


@triton.jit
def _low(delta, row, pitch, real, R: tl.constexpr, RP: tl.constexpr):
    """What the steps of a tile are projected from, (T, RP)."""
    column = tl.arange(0, RP)
    return tl.load(
        delta + row[:, None] * pitch + column[None, :], mask=real[:, None] & (column < R)[None, :], other=0.0
    )


@triton.jit
def _product(a, b, acc):
    """acc + a b, exact to float32's precision unless both are half."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def _steps(
    delta, projection, bias, row, pitch, channel, real, d,
    T: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Steps of a tile, and e^-|v| and the sign of v, from which softplus has its derivative."""
    if projection is None:
        v = _tile(delta, row, pitch, channel, real, d)
    else:
        v = _product(_low(delta, row, pitch, real, R, RP), projection, tl.zeros((T, C), tl.float32))
    if bias is not None:
        v += bias[None, :]
    if SOFTPLUS:
        steps, z = _softplus(v)
        return steps, z, v >= 0
    return v, v, v >= 0


@triton.jit
def _drive_map(B, direction_B, n, row, pitch, real, t, L, H, W, columns, reverse, N: tl.constexpr):
    """B of a tile for one state, with what the directions of the route add."""
    values = tl.load(B + row * pitch + n, mask=real, other=0.0).to(tl.float32)
    if direction_B is not None:
        direction = _direction(t, L, H, W, columns, reverse)
        values += tl.load(direction_B + direction * N + n, mask=real, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "segments", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def states(
    x, delta, weight, bias, A, B, direction_B, total_steps, ends, out,
    H, W, d, tiles, segments,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    CODES: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
    ADJOINT: tl.constexpr, AGGREGATE: tl.constexpr,
):  # fmt: skip
    """State of each route before each of its tiles, (B, K, tiles, N, d), or with ADJOINT that of its gradient.

    The gradient's state runs against the route and is driven by C and the gradient of the output (in the places of B
    and x). A sequence is cut into segments, one a program; with AGGREGATE each program scans its segment from zero and
    leaves what the later ones need, (B, K, segments, N, d): the sum of its steps, and the state at its end.
    """
    blocks = tl.cdiv(d, C)
    program = tl.program_id(0)
    channel = program % blocks * C + tl.arange(0, C)
    program = program // blocks
    n = program % N
    k = program // N % K
    program = program // (N * K)
    segment = program % segments
    image = (program // segments).to(tl.int64)
    code = (CODES >> (3 * k)) & 7
    columns, reverse, continuous = code & 1 != 0, code & 2 != 0, code & 4 != 0
    backwards = reverse != ADJOINT
    L = H * W
    x += image * x_image
    delta += image * delta_image + k * delta_route
    B += image * B_image + k * B_route
    projection = None
    if weight is not None:
        projection = _projection(weight, k, channel, d, R, RP)
    shift = None
    if bias is not None:
        shift = _vector(bias + k * d, channel, d)
    rate = _vector(A + (k * d) * N + n, channel * N, d * N) * LOG2E
    each = tl.cdiv(tiles, segments)
    before = (image * K + k) * segments * N + n
    h = tl.zeros((C,), tl.float32)
    if not AGGREGATE:
        for s in range(segment):
            where = (before + s * N) * d
            h = tl.exp2(rate * _vector(total_steps + where, channel, d)) * h + _vector(ends + where, channel, d)
    token = tl.arange(0, T)
    place = tl.where(backwards, T - 1 - token, token)
    sums = tl.zeros((C,), tl.float32)
    for i in range(segment * each, tl.minimum(segment * each + each, tiles)):
        tile = tl.where(backwards, tiles - 1 - i, i)
        t = tile * T + place
        real = t < L
        pixel = _pixel(t, H, W, columns, continuous)
        row = pixel
        if not ROUTED:
            row = tl.where(reverse, L - 1 - t, t)
        if not AGGREGATE:
            where = (((image * K + k) * tiles + tile) * N + n) * d
            tl.store(out + where + channel, h, mask=channel < d)
        steps, _, _ = _steps(delta, projection, shift, row, delta_pixel, channel, real, d, T, C, R, RP, SOFTPLUS)
        values = _tile(x, pixel, x_pixel, channel, real, d)
        map = _drive_map(B, direction_B, n, row, B_pixel, real, t, L, H, W, columns, reverse, N)
        decay = tl.exp2(steps * rate[None, :])
        drive = (decay if ADJOINT else steps) * values * map[:, None]
        drive = tl.where(token[:, None] == 0, decay * h[None, :] + drive, drive)
        _, h_all = tl.associative_scan((decay, drive), 0, _combine)
        h = _last(h_all, token, T - 1)
        if AGGREGATE:
            sums += tl.sum(steps, 0)
    if AGGREGATE:
        where = (before + segment * N) * d + channel
        tl.store(total_steps + where, sums, mask=channel < d)
        tl.store(ends + where, h, mask=channel < d)


@triton.jit
def _scanned(decay, drive, state, token, LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """States at each token of a tile from the one before it."""
    first = token[:, None] == (LAST if BACKWARDS else 0)
    drive = tl.where(first, decay * state[None, :] + drive, drive)
    _, h = tl.associative_scan((decay, drive), 0, _combine, reverse=BACKWARDS)
    return h


@triton.jit
def _route_output(
    values, delta, projection, shift, A, B, Cm, direction_B, states, t, pixel, real, channel, token, image, tile,
    L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, COLUMNS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """What one route gives at each token of a tile, without the skip."""
    row = pixel
    if not ROUTED:
        row = L - 1 - t if BACKWARDS else t
    steps, _, _ = _steps(delta, projection, shift, row, delta_pixel, channel, real, d, T, C, R, RP, SOFTPLUS)
    driven = steps * values
    out = tl.zeros((T, C), tl.float32)
    states += ((image * K + k) * tiles + tile) * N * d
    for n in range(N):
        rate = _vector(A + k * d * N + n, channel * N, d * N) * LOG2E
        map = _drive_map(B, direction_B, n, row, B_pixel, real, t, L, H, W, COLUMNS, BACKWARDS, N)
        read = tl.load(Cm + row * C_pixel + n, mask=real, other=0.0).to(tl.float32)
        state = _vector(states + n * d, channel, d)
        h = _scanned(tl.exp2(steps * rate[None, :]), driven * map[:, None], state, token, T - 1, BACKWARDS)
        out += h * read[:, None]
    return out


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route", "C_image", "C_pixel", "C_route",
])  # fmt: skip
def outputs(
    x, delta, weight, bias, A, B, Cm, D, direction_B, states, earlier, out,
    H, W, d, tiles, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route, C_image, C_pixel, C_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Adds what a route (FORTH) and its reverse (BACK) give to what earlier launches gave; -1 is no route.

    Programs take the tiles of all images in turn: the states before them are known.
    """
    blocks = tl.cdiv(d, C)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    L = H * W
    token = tl.arange(0, T)
    forth_projection, back_projection, forth_shift, back_shift = None, None, None, None
    if weight is not None:
        if FORTH >= 0:
            forth_projection = _projection(weight, FORTH, channel, d, R, RP)
        if BACK >= 0:
            back_projection = _projection(weight, BACK, channel, d, R, RP)
    if bias is not None:
        if FORTH >= 0:
            forth_shift = _vector(bias + FORTH * d, channel, d)
        if BACK >= 0:
            back_shift = _vector(bias + BACK * d, channel, d)
    skip = tl.zeros((C,), tl.float32)
    if D is not None:
        if FORTH >= 0:
            skip += _vector(D + FORTH * d, channel, d)
        if BACK >= 0:
            skip += _vector(D + BACK * d, channel, d)
    each = tl.cdiv(images * tiles, programs)
    for i in range(program * each, tl.minimum(program * each + each, images * tiles)):
        image = (i // tiles).to(tl.int64)
        tile = i % tiles
        t = tile * T + token
        real = t < L
        pixel = t
        if COLUMNS or CONTINUOUS:
            pixel = _pixel(t, H, W, COLUMNS, CONTINUOUS)
        values = _tile(x + image * x_image, pixel, x_pixel, channel, real, d)
        y = skip[None, :] * values
        if earlier is not None:
            y += _tile(earlier + image * L * d, pixel, d, channel, real, d)
        if FORTH >= 0:
            y += _route_output(
                values, delta + image * delta_image + FORTH * delta_route, forth_projection, forth_shift, A,
                B + image * B_image + FORTH * B_route, Cm + image * C_image + FORTH * C_route, direction_B, states,
                t, pixel, real, channel, token, image, tile, L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel,
                FORTH, K, N, R, RP, T, C, SOFTPLUS, ROUTED, COLUMNS, False,
            )  # fmt: skip
        if BACK >= 0:
            y += _route_output(
                values, delta + image * delta_image + BACK * delta_route, back_projection, back_shift, A,
                B + image * B_image + BACK * B_route, Cm + image * C_image + BACK * C_route, direction_B, states,
                t, pixel, real, channel, token, image, tile, L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel,
                BACK, K, N, R, RP, T, C, SOFTPLUS, ROUTED, COLUMNS, True,
            )  # fmt: skip
        where = image * L * d + pixel[:, None] * d + channel[None, :]
        tl.store(out + where, y.to(out.dtype.element_ty), mask=real[:, None] & (channel < d)[None, :])


@triton.jit
def _before(decay, drive, driver, state, token, LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """driver_t plus the state before each token of a tile, where drive = decay * driver is what a token adds."""
    first = token[:, None] == (LAST if BACKWARDS else 0)
    drive = tl.where(first, decay * state[None, :] + drive, drive)
    driver = tl.where(first, driver + state[None, :], driver)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    _, _, sums, _ = tl.associative_scan((decay, drive, driver, ones), 0, _combine_before, reverse=BACKWARDS)
    return sums


@triton.jit
def _route_gradients(
    values, grads, grad_x, rates, delta, weight, projection, shift, A, B, Cm, direction_B, states, adjoints,
    token_parts, grad_delta, parameters, t, pixel, real, channel, token, image, tile,
    L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
    COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr, TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one route's gradients of a tile to those of x, of the rates and of the projection of steps.

    Sums over channels, of the gradients of what steps are projected from, of B and of C, are columns of one matrix.
    """
    row = pixel
    if not ROUTED:
        row = L - 1 - t if BACKWARDS else t
    steps, z, positive = _steps(delta, projection, shift, row, delta_pixel, channel, real, d, T, C, R, RP, SOFTPLUS)
    column, place = tl.arange(0, MP), tl.arange(0, NP)
    sums = tl.zeros((T, MP), tl.float32)
    through, by_steps = tl.zeros((T, C), tl.float32), tl.zeros((T, C), tl.float32)
    where = ((image * K + k) * tiles + tile) * N * d
    for n in range(N):
        rate = _vector(A + k * d * N + n, channel * N, d * N)
        map = _drive_map(B, direction_B, n, row, B_pixel, real, t, L, H, W, COLUMNS, BACKWARDS, N)[:, None]
        read = tl.load(Cm + row * C_pixel + n, mask=real, other=0.0).to(tl.float32)[:, None]
        decay = tl.exp2(steps * (rate * LOG2E)[None, :])
        drive = steps * values * map
        h = _scanned(decay, drive, _vector(states + where + n * d, channel, d), token, T - 1, BACKWARDS)
        driver = read * grads
        adjoint = _vector(adjoints + where + n * d, channel, d)
        adjoint = _before(decay, decay * driver, driver, adjoint, token, T - 1, not BACKWARDS)
        kept = h - drive
        through += adjoint * map
        by_steps += adjoint * (rate[None, :] * kept + map * values)
        rates += tl.where(place[:, None] == n, tl.sum(adjoint * steps * kept, 0)[None, :], 0.0)
        into = tl.where(column[None, :] == R + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
        sums = tl.dot(adjoint * steps * values, into, sums, input_precision=TOKEN_PRECISION)
        into = tl.where(column[None, :] == R + N + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
        sums = tl.dot(h * grads, into, sums, input_precision=TOKEN_PRECISION)
    if SOFTPLUS:
        by_steps *= tl.where(positive, 1.0, z) / (1.0 + z)
    right = tl.where(column[None, :] == R, 1.0, 0.0) + tl.zeros((T, MP), tl.float32)
    if weight is None:
        spots = row[:, None] * (K * d) + channel[None, :]
        mask = real[:, None] & (channel < d)[None, :]
        tl.store(grad_delta + k * d + spots, by_steps.to(grad_delta.dtype.element_ty), mask=mask)
    else:
        spots = (k * d + channel)[:, None] * R + column[None, :]
        wide = tl.load(weight + spots, mask=(channel < d)[:, None] & (column < R)[None, :], other=0.0).to(tl.float32)
        sums = tl.dot(by_steps, wide, sums, input_precision=TOKEN_PRECISION)
        right += _low(delta, row, delta_pixel, real, R, MP).to(tl.float32)
    M: tl.constexpr = R + 2 * N
    spots = row[:, None] * (K * M) + k * M + column[None, :]
    tl.store(token_parts + spots, sums, mask=real[:, None] & (column < M)[None, :])
    parameters = tl.dot(tl.trans(by_steps), right, parameters, input_precision=WEIGHT_PRECISION)
    return grad_x + steps * through, rates, parameters


@triton.jit
def _store_parameters(
    parts, parameters, rates, skip, channel, d, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """A program's sums for one route: those of the projection and of its bias, of the rates, and of the skip."""
    P: tl.constexpr = R + N + 2
    column, n = tl.arange(0, MP), tl.arange(0, NP)
    inside = channel < d
    spots = channel[:, None] * P + column[None, :]
    tl.store(parts + spots, parameters, mask=inside[:, None] & (column <= R)[None, :])
    spots = channel[None, :] * P + R + 1 + n[:, None]
    tl.store(parts + spots, rates, mask=inside[None, :] & (n < N)[:, None])
    tl.store(parts + channel * P + R + 1 + N, skip, mask=inside)


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route", "C_image", "C_pixel", "C_route",
])  # fmt: skip
def gradients(
    grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints, earlier,
    grad_x, grad_delta, token_parts, parameter_parts,
    H, W, d, tiles, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route, C_image, C_pixel, C_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
    TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through a route and its reverse: that of x, and parts of those of all else.

    Of sums over channels each block leaves its part, (blocks, B, L, K, r + 2 N), and of sums over tokens each program,
    (programs, K, d, r + N + 2).
    """
    blocks = tl.cdiv(d, C)
    block = tl.program_id(0) % blocks
    channel = block * C + tl.arange(0, C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    L = H * W
    token = tl.arange(0, T)
    forth_projection, back_projection, forth_shift, back_shift = None, None, None, None
    if weight is not None:
        if FORTH >= 0:
            forth_projection = _projection(weight, FORTH, channel, d, R, RP)
        if BACK >= 0:
            back_projection = _projection(weight, BACK, channel, d, R, RP)
    if bias is not None:
        if FORTH >= 0:
            forth_shift = _vector(bias + FORTH * d, channel, d)
        if BACK >= 0:
            back_shift = _vector(bias + BACK * d, channel, d)
    skip = tl.zeros((C,), tl.float32)
    if D is not None:
        if FORTH >= 0:
            skip += _vector(D + FORTH * d, channel, d)
        if BACK >= 0:
            skip += _vector(D + BACK * d, channel, d)
    by_skip = tl.zeros((C,), tl.float32)
    forth_rates, back_rates = tl.zeros((NP, C), tl.float32), tl.zeros((NP, C), tl.float32)
    forth_parameters, back_parameters = tl.zeros((C, MP), tl.float32), tl.zeros((C, MP), tl.float32)
    M: tl.constexpr = R + 2 * N
    each = tl.cdiv(images * tiles, programs)
    for i in range(program * each, tl.minimum(program * each + each, images * tiles)):
        image = (i // tiles).to(tl.int64)
        tile = i % tiles
        t = tile * T + token
        real = t < L
        pixel = t
        if COLUMNS or CONTINUOUS:
            pixel = _pixel(t, H, W, COLUMNS, CONTINUOUS)
        values = _tile(x + image * x_image, pixel, x_pixel, channel, real, d)
        grads = _tile(grad_out + image * L * d, pixel, d, channel, real, d)
        by_skip += tl.sum(values * grads, 0)
        total = skip[None, :] * grads
        if earlier is not None:
            total += _tile(earlier + image * L * d, pixel, d, channel, real, d)
        own_parts = token_parts + (block * images + image) * L * (K * M)
        own_delta = grad_delta
        if weight is None:
            own_delta += image * L * (K * d)
        if FORTH >= 0:
            total, forth_rates, forth_parameters = _route_gradients(
                values, grads, total, forth_rates, delta + image * delta_image + FORTH * delta_route, weight,
                forth_projection, forth_shift, A, B + image * B_image + FORTH * B_route,
                Cm + image * C_image + FORTH * C_route, direction_B, states, adjoints, own_parts, own_delta,
                forth_parameters, t, pixel, real, channel, token, image, tile,
                L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel, FORTH, K, N, NP, R, RP, MP, T, C,
                SOFTPLUS, ROUTED, COLUMNS, False, TOKEN_PRECISION, WEIGHT_PRECISION,
            )  # fmt: skip
        if BACK >= 0:
            total, back_rates, back_parameters = _route_gradients(
                values, grads, total, back_rates, delta + image * delta_image + BACK * delta_route, weight,
                back_projection, back_shift, A, B + image * B_image + BACK * B_route,
                Cm + image * C_image + BACK * C_route, direction_B, states, adjoints, own_parts, own_delta,
                back_parameters, t, pixel, real, channel, token, image, tile,
                L, H, W, d, tiles, delta_pixel, B_pixel, C_pixel, BACK, K, N, NP, R, RP, MP, T, C,
                SOFTPLUS, ROUTED, COLUMNS, True, TOKEN_PRECISION, WEIGHT_PRECISION,
            )  # fmt: skip
        where = image * L * d + pixel[:, None] * d + channel[None, :]
        tl.store(grad_x + where, total.to(grad_x.dtype.element_ty), mask=real[:, None] & (channel < d)[None, :])
    P: tl.constexpr = R + N + 2
    parts = parameter_parts + program.to(tl.int64) * K * d * P
    if FORTH >= 0:
        _store_parameters(parts + FORTH * d * P, forth_parameters, forth_rates, by_skip, channel, d, N, NP, R, MP)
    if BACK >= 0:
        _store_parameters(parts + BACK * d * P, back_parameters, back_rates, by_skip, channel, d, N, NP, R, MP)
