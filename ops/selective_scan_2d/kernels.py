"""Triton kernels of the selective scan over routes of a map.

Letters: T tokens of a tile, C channels of a block, N states, K routes, R numbers from which a step is projected.

A program is one warp whose lanes are channels: a thread holds all tokens of a tile for its channels, so that scanning
is arithmetic within a thread. An order cuts the map into lines, rows one after the other being one line; lines are cut
into tiles, of which the last of a line may be short. Both ways along an order share its tiles. Tokens beyond a line
have steps of zero, with which a state passes them unchanged.
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
def _later(a, b):
    return b


@triton.jit
def _softplus(v):
    """log(1 + e^v) to the precision of float32. A polynomial is cheaper than the logarithm."""
    z = tl.exp2(-tl.abs(v) * LOG2E)
    p = 0.0051058258 * z - 0.0289919564
    p = p * z + 0.0773807384
    p = p * z - 0.135906002
    p = p * z + 0.190713096
    p = p * z - 0.248339455
    p = p * z + 0.333179343
    p = p * z - 0.499994357
    p = p * z + 0.999999965
    return tl.maximum(v, 0.0) + z * p


@triton.jit
def _lines(H, W, columns, continuous, T: tl.constexpr):
    """How an order cuts the map: the length of a line, and the tiles of a line."""
    length = tl.where(columns, H, tl.where(continuous, W, H * W))
    return length, tl.cdiv(length, T)


@triton.jit
def _places(
    tile, token, H, W, columns, continuous, backwards,
    T: tl.constexpr, CONTINUOUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Where a tile lies.

    Returns:
        Pixel of its first token, and the distance to the next; the same for its parameters; which tokens there are,
        (T,); and the line and the place in it.
    """
    length, pieces = _lines(H, W, columns, continuous, T)
    along, across = tl.where(columns, W, 1), tl.where(columns, 1, W)
    line = (tile.to(tl.uint32) // pieces.to(tl.uint32)).to(tl.int32)
    first = (tile - line * pieces) * T
    # The shift gives zero. It hides that the stride is always the same, or else all multiples of it would be kept in
    # registers, one for each token, where a multiplication is as cheap as an addition.
    pixel, stride = line * across + first * along, along + (line >> 31)
    if CONTINUOUS:
        turned = continuous & (line % 2 == 1)
        pixel = tl.where(turned, line * across + (length - 1 - first) * along, pixel)
        stride = tl.where(turned, -along, along)
    row, row_stride = pixel, stride
    if not ROUTED:
        step = line * length + first
        row = tl.where(backwards, H * W - 1 - step, step)
        row_stride = tl.where(backwards, -1, 1)
    return pixel, stride, row, row_stride, first + token < length, line, first


@triton.jit
def _direction(line, place, H, W, columns, backwards):
    """Direction by which a continuous route comes to a place of a line: 0 start, then right, left, up, down."""
    length, lines = tl.where(columns, H, W), tl.where(columns, W, H)
    turned = line % 2 == 1
    against = tl.where(turned != backwards, 1, 0)
    along = tl.where(columns, 4 - against, 1 + against)
    onward = tl.where(columns, tl.where(backwards, 2, 1), tl.where(backwards, 3, 4))
    begin = tl.where(backwards, length - 1, 0)
    start = (line == tl.where(backwards, lines - 1, 0)) & (place == begin)
    return tl.where(start, 0, tl.where(place == begin, onward, along))


@triton.jit
def _last(tile, token, LAST: tl.constexpr):
    """One row of a tile. Adding integers, compilers see that all others are zero."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(token[:, None] == LAST, bits, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _mask(real, channel, d, WHOLE: tl.constexpr):
    """Which numbers of a tile there are; all channels are if blocks divide them."""
    mask = tl.broadcast_to(real[:, None], (real.shape[0], channel.shape[0]))
    if not WHOLE:
        mask = mask & (channel < d)[None, :]
    return mask


@triton.jit
def _spots(start, stride, token, channel):
    """Where the numbers of a tile are in an image: 32 bits, so that a thread keeps few addresses."""
    return (start + channel)[None, :] + (token * stride)[:, None]


@triton.jit
def _tile(pointer, start, stride, token, channel, real, d, WHOLE: tl.constexpr):
    """Numbers of a tile of tokens and channels."""
    where = _spots(start, stride, token, channel)
    return tl.load(pointer + where, mask=_mask(real, channel, d, WHOLE), other=0.0)


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
def _constants(weight, bias, D, k, channel, d, R: tl.constexpr, RP: tl.constexpr):
    """Weights and bias of the steps of a route, and its skip. Without weights (R is 0) the first is not to be used."""
    projection, shift, skip = channel, channel * 0.0, channel * 0.0
    if weight is not None:
        projection = _projection(weight, k, channel, d, R, RP)
    if bias is not None:
        shift = _vector(bias + k * d, channel, d)
    if D is not None:
        skip = _vector(D + k * d, channel, d)
    return projection, shift, skip


@triton.jit
def _sources(delta, start, stride, token, channel, real, d, R: tl.constexpr, RP: tl.constexpr, WHOLE: tl.constexpr):
    """What the steps of a tile are made from: (T, RP) numbers to project, or (T, C) steps if R is 0."""
    if R == 0:
        numbers = _tile(delta, start, stride, token, channel, real, d, WHOLE)
    else:
        column = tl.arange(0, RP)
        mask = real[:, None] & (column < R)[None, :]
        numbers = tl.load(delta + _spots(start, stride, token, column), mask=mask, other=0.0)
    return numbers


@triton.jit
def _product(a, b, acc):
    """acc + a b, exact to float32's precision unless both are half."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _steps(sources, projection, bias, real, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Steps of a tile, and what softplus was taken of.

    A product leaves tokens in many threads. A scan that changes nothing brings those of a channel together, once, so
    that all that follows stays in a thread.
    """
    v = tl.zeros((T, C), tl.float32) + bias[None, :]
    if R == 0:
        v += sources.to(tl.float32)
    else:
        v = tl.associative_scan(_product(sources, projection, v), 0, _later)
    steps = v
    if SOFTPLUS:
        steps = _softplus(v)
    return tl.where(real[:, None], steps, 0.0), v


@triton.jit
def _spread(values):
    """One number for each token, loaded once. Without the scan, which changes nothing, each thread would load all."""
    return tl.associative_scan(values, 0, _later)


@triton.jit
def _drive_map(B, direction_B, n, offset, real, token, line, first, H, W, columns, backwards, N: tl.constexpr):
    """B of a tile for one state, with what the directions of the route add."""
    values = tl.load(B + offset + n, mask=real, other=0.0).to(tl.float32)
    if direction_B is not None:
        direction = _direction(line, first + token, H, W, columns, backwards)
        values += tl.load(direction_B + direction * N + n, mask=real, other=0.0).to(tl.float32)
    return _spread(values)


@triton.jit
def _read(
    x, delta, B, direction_B, n, tile, token, channel, H, W, d, x_pixel, delta_pixel, B_pixel,
    columns, continuous, backwards,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
    CONTINUOUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """x, sources of the steps, and B of a tile, and which of its tokens there are."""
    pixel, stride, row, row_stride, real, line, first = _places(
        tile, token, H, W, columns, continuous, backwards, T, CONTINUOUS, ROUTED
    )
    values = _tile(x, pixel * x_pixel, stride * x_pixel, token, channel, real, d, WHOLE)
    sources = _sources(delta, row * delta_pixel, row_stride * delta_pixel, token, channel, real, d, R, RP, WHOLE)
    offset = row * B_pixel + token * (row_stride * B_pixel)
    map = _drive_map(B, direction_B, n, offset, real, token, line, first, H, W, columns, backwards, N)
    return values.to(tl.float32), sources, map, real


@triton.jit(do_not_specialize=[
    "H", "W", "d", "stored", "segments", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def states(
    x, delta, weight, bias, A, B, direction_B, total_steps, ends, out,
    H, W, d, stored, segments,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    CODES: tl.constexpr, CONTINUOUS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTED: tl.constexpr, ADJOINT: tl.constexpr, AGGREGATE: tl.constexpr,
):  # fmt: skip
    """State of each route before each of its tiles, (B, K, stored, N, d), or with ADJOINT that of its gradient.

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
    columns, backwards, continuous = code & 1 != 0, code & 2 != 0, code & 4 != 0
    against = backwards != ADJOINT
    length, pieces = _lines(H, W, columns, continuous, T)
    tiles = H * W // length * pieces
    x += image * x_image
    delta += image * delta_image + k * delta_route
    B += image * B_image + k * B_route
    projection, shift, _ = _constants(weight, bias, None, k, channel, d, R, RP)
    rate = _vector(A + (k * d) * N + n, channel * N, d * N) * LOG2E
    before = (image * K + k) * segments * N + n
    out += ((image * K + k) * stored * N + n) * d
    h = tl.zeros((C,), tl.float32)
    if total_steps is not None:
        for s in range(0 if AGGREGATE else segment):
            where = (before + s * N) * d
            h = tl.exp2(rate * _vector(total_steps + where, channel, d)) * h + _vector(ends + where, channel, d)
    order = tl.arange(0, T)
    sums = tl.zeros((C,), tl.float32)
    each = tl.cdiv(tiles, segments)
    begin, end = segment * each, tl.minimum(segment * each + each, tiles)
    tile = tl.where(against, tiles - 1 - begin, begin)
    onward = tl.where(against, -1, 1)
    token = tl.where(against, T - 1 - order, order)
    for _ in range(begin, end):
        values, sources, map, real = _read(
            x, delta, B, direction_B, n, tile, token, channel, H, W, d, x_pixel, delta_pixel, B_pixel,
            columns, continuous, backwards, N, R, RP, T, WHOLE, CONTINUOUS, ROUTED,
        )  # fmt: skip
        if not AGGREGATE:
            tl.store(out + tile.to(tl.int64) * (N * d) + channel, h, mask=channel < d)
        steps = _steps(sources, projection, shift, real, R, T, C, SOFTPLUS)[0]
        decay = tl.exp2(steps * rate[None, :])
        drive = (decay if ADJOINT else steps) * values * map[:, None]
        drive = tl.where(order[:, None] == 0, decay * h[None, :] + drive, drive)
        h = _last(tl.associative_scan((decay, drive), 0, _combine)[1], order, T - 1)
        if AGGREGATE:
            sums += tl.sum(steps, 0)
        tile += onward
    if not AGGREGATE and segment == segments - 1:
        for unused in range(tiles, stored):  # another order has more tiles
            tl.store(out + unused * N * d + channel, tl.zeros((C,), tl.float32), mask=channel < d)
    if AGGREGATE:
        where = (before + segment * N) * d + channel
        tl.store(total_steps + where, sums, mask=channel < d)
        tl.store(ends + where, h, mask=channel < d)


@triton.jit
def _scanned(decay, drive, state, token, LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """States at each token of a tile from the one before it.

    Within a thread, turning a tile over is but another name for its registers; a scan told to run in reverse would
    exchange them between threads.
    """
    first = token[:, None] == (LAST if BACKWARDS else 0)
    drive = tl.where(first, decay * state[None, :] + drive, drive)
    if BACKWARDS:
        h = tl.flip(tl.associative_scan((tl.flip(decay, 0), tl.flip(drive, 0)), 0, _combine)[1], 0)
    else:
        h = tl.associative_scan((decay, drive), 0, _combine)[1]
    return h


@triton.jit
def _route_output(
    y, values, delta, projection, shift, A, B, Cm, direction_B, states, tile, token, channel, image,
    H, W, d, stored, delta_pixel, B_pixel,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, COLUMNS: tl.constexpr,
    CONTINUOUS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Adds what one route gives at each token of a tile, without the skip."""
    place = _places(tile, token, H, W, COLUMNS, CONTINUOUS, BACKWARDS, T, CONTINUOUS, ROUTED)
    row, stride, real, line, first = place[2], place[3], place[4], place[5], place[6]
    sources = _sources(delta, row * delta_pixel, stride * delta_pixel, token, channel, real, d, R, RP, WHOLE)
    steps = _steps(sources, projection, shift, real, R, T, C, SOFTPLUS)[0]
    driven = steps * values
    offset = row * B_pixel + token * (stride * B_pixel)
    states += ((image * K + k) * stored + tile) * N * d
    for n in range(N):
        rate = _vector(A + k * d * N + n, channel * N, d * N) * LOG2E
        map = _drive_map(B, direction_B, n, offset, real, token, line, first, H, W, COLUMNS, BACKWARDS, N)
        read = _spread(tl.load(Cm + offset + n, mask=real, other=0.0).to(tl.float32))
        state = _vector(states + n * d, channel, d)
        h = _scanned(tl.exp2(steps * rate[None, :]), driven * map[:, None], state, token, T - 1, BACKWARDS)
        y += h * read[:, None]
    return y


@triton.jit(do_not_specialize=[
    "H", "W", "d", "stored", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def outputs(
    x, delta, weight, bias, A, B, Cm, D, direction_B, states, earlier, out,
    H, W, d, stored, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Adds what a route (FORTH) and its reverse (BACK) give to what earlier launches gave; -1 is no route.

    Programs share the tiles of all images: the states before them are known.
    """
    blocks = tl.cdiv(d, C)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    length, pieces = _lines(H, W, COLUMNS, CONTINUOUS, T)
    tiles = H * W // length * pieces
    token = tl.arange(0, T)
    skip = tl.zeros((C,), tl.float32)
    if FORTH >= 0:
        forth_projection, forth_shift, forth_skip = _constants(weight, bias, D, FORTH, channel, d, R, RP)
        skip += forth_skip
    if BACK >= 0:
        back_projection, back_shift, back_skip = _constants(weight, bias, D, BACK, channel, d, R, RP)
        skip += back_skip
    each = tl.cdiv(images * tiles, programs)
    for i in range(program * each, tl.minimum(program * each + each, images * tiles)):
        image = (i // tiles).to(tl.int64)
        tile = i % tiles
        place = _places(tile, token, H, W, COLUMNS, CONTINUOUS, False, T, CONTINUOUS, True)
        pixel, stride, real = place[0], place[1], place[4]
        values = _tile(x + image * x_image, pixel * x_pixel, stride * x_pixel, token, channel, real, d, WHOLE)
        values = values.to(tl.float32)
        y = skip[None, :] * values
        whole = image * (H * W) * d
        if earlier is not None:
            y += _tile(earlier + whole, pixel * d, stride * d, token, channel, real, d, WHOLE)
        if FORTH >= 0:
            y = _route_output(
                y, values, delta + image * delta_image + FORTH * delta_route, forth_projection, forth_shift, A,
                B + image * B_image + FORTH * B_route, Cm + image * B_image + FORTH * B_route, direction_B, states,
                tile, token, channel, image, H, W, d, stored, delta_pixel, B_pixel,
                FORTH, K, N, R, RP, T, C, WHOLE, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, False,
            )  # fmt: skip
        if BACK >= 0:
            y = _route_output(
                y, values, delta + image * delta_image + BACK * delta_route, back_projection, back_shift, A,
                B + image * B_image + BACK * B_route, Cm + image * B_image + BACK * B_route, direction_B, states,
                tile, token, channel, image, H, W, d, stored, delta_pixel, B_pixel,
                BACK, K, N, R, RP, T, C, WHOLE, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, True,
            )  # fmt: skip
        where = _spots(pixel * d, stride * d, token, channel)
        tl.store(out + whole + where, y.to(out.dtype.element_ty), mask=_mask(real, channel, d, WHOLE))


@triton.jit
def _before(decay, drive, driver, state, token, LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """driver_t plus the state before each token of a tile, where drive = decay * driver is what a token adds."""
    first = token[:, None] == (LAST if BACKWARDS else 0)
    drive = tl.where(first, decay * state[None, :] + drive, drive)
    driver = tl.where(first, driver + state[None, :], driver)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    if BACKWARDS:
        turned = (tl.flip(decay, 0), tl.flip(drive, 0), tl.flip(driver, 0), ones)
        sums = tl.flip(tl.associative_scan(turned, 0, _combine_before)[2], 0)
    else:
        sums = tl.associative_scan((decay, drive, driver, ones), 0, _combine_before)[2]
    return sums


@triton.jit
def _route_gradients(
    grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints, earlier, grad_x, grad_delta,
    token_parts, parameter_parts, block, channel, begin, end, tiles,
    H, W, d, stored, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    S: tl.constexpr, MP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTED: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr, BACKWARDS: tl.constexpr,
    TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some tiles through one route: adds that of x to an earlier one, and leaves parts of all others.

    Sums over channels, of the gradients of what steps are projected from (S columns: R, or none where steps' own
    gradients are wanted), of B and of C, are columns of one matrix.
    """
    token, column, place = tl.arange(0, T), tl.arange(0, MP), tl.arange(0, NP)
    M: tl.constexpr = S + 2 * N
    P: tl.constexpr = S + N + 2
    projection, shift, skip = _constants(weight, bias, D, k, channel, d, R, RP)
    if S > 0:
        wide = weight + (k * d + channel)[:, None] * R + column[None, :]
        wide = tl.load(wide, mask=(channel < d)[:, None] & (column < R)[None, :], other=0.0).to(tl.float32)
    delta += k * delta_route
    B += k * B_route
    Cm += k * B_route
    rates = tl.zeros((NP, C), tl.float32)
    by_skip, by_bias = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    if S > 0:
        parameters = tl.zeros((C, MP), tl.float32)
    for i in range(begin, end):
        image = (i // tiles).to(tl.int64)
        tile = i % tiles
        pixel, stride, row, row_stride, real, line, first = _places(
            tile, token, H, W, COLUMNS, CONTINUOUS, BACKWARDS, T, CONTINUOUS, ROUTED
        )
        values = _tile(x + image * x_image, pixel * x_pixel, stride * x_pixel, token, channel, real, d, WHOLE)
        values = values.to(tl.float32)
        whole, spots = image * (H * W) * d, _spots(pixel * d, stride * d, token, channel)
        mask = _mask(real, channel, d, WHOLE)
        grads = tl.load(grad_out + whole + spots, mask=mask, other=0.0).to(tl.float32)
        by_skip += tl.sum(values * grads, 0)
        source, start, onward = delta + image * delta_image, row * delta_pixel, row_stride * delta_pixel
        sources = _sources(source, start, onward, token, channel, real, d, R, RP, WHOLE)
        steps, v = _steps(sources, projection, shift, real, R, T, C, SOFTPLUS)
        sums = tl.zeros((T, MP), tl.float32)
        through, by_steps = tl.zeros((T, C), tl.float32), tl.zeros((T, C), tl.float32)
        where = ((image * K + k) * stored + tile) * N * d
        offset = row * B_pixel + token * (row_stride * B_pixel)
        for n in range(N):
            rate = _vector(A + k * d * N + n, channel * N, d * N)
            map = _drive_map(
                B + image * B_image, direction_B, n, offset, real, token, line, first, H, W, COLUMNS, BACKWARDS, N,
            )[:, None]  # fmt: skip
            read = _spread(tl.load(Cm + image * B_image + offset + n, mask=real, other=0.0).to(tl.float32))[:, None]
            decay = tl.exp2(steps * (rate * LOG2E)[None, :])
            drive = steps * values * map
            h = _scanned(decay, drive, _vector(states + where + n * d, channel, d), token, T - 1, BACKWARDS)
            driver = read * grads
            adjoint = _vector(adjoints + where + n * d, channel, d)
            adjoint = _before(decay, decay * driver, driver, adjoint, token, T - 1, not BACKWARDS)
            kept = tl.where(decay > 0.0, h - drive, 0.0)  # a rounding would remain, which long steps make large
            through += adjoint * map
            by_steps += adjoint * (rate[None, :] * kept + map * values)
            rates += tl.where(place[:, None] == n, tl.sum(adjoint * steps * kept, 0)[None, :], 0.0)
            into = tl.where(column[None, :] == S + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
            sums = tl.dot(adjoint * steps * values, into, sums, input_precision=TOKEN_PRECISION)
            into = tl.where(column[None, :] == S + N + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
            sums = tl.dot(h * grads, into, sums, input_precision=TOKEN_PRECISION)
        if SOFTPLUS:
            by_steps *= tl.exp2((v - steps) * LOG2E)  # the sigmoid of v
        by_steps = tl.where(real[:, None], by_steps, 0.0)
        total = skip[None, :] * grads + steps * through
        if earlier is not None:
            total += tl.load(earlier + whole + spots, mask=mask, other=0.0)
        tl.store(grad_x + whole + spots, total.to(grad_x.dtype.element_ty), mask=mask)
        if S == 0:
            by_bias += tl.sum(by_steps, 0)
            if weight is None:
                target, pitch = grad_delta + whole * K + k * d, K * d
            else:
                target, pitch = grad_delta + ((k * images).to(tl.int64) + image) * (H * W) * d, d
            spots = _spots(row * pitch, row_stride * pitch, token, channel)
            tl.store(target + spots, by_steps.to(grad_delta.dtype.element_ty), mask=mask)
        else:
            right = tl.where(column[None, :] == S, 1.0, 0.0) + tl.zeros((T, MP), tl.float32)
            sums = tl.dot(by_steps, wide, sums, input_precision=TOKEN_PRECISION)
            right += _sources(source, start, onward, token, channel, real, d, R, MP, WHOLE).to(tl.float32)
            parameters = tl.dot(tl.trans(by_steps), right, parameters, input_precision=WEIGHT_PRECISION)
        spots = _spots(row * (K * M) + k * M, row_stride * (K * M), token, column)
        tl.store(
            token_parts + (block * images + image) * (H * W) * (K * M) + spots,
            sums,
            mask=real[:, None] & (column < M)[None, :],
        )
    parts = parameter_parts + k * d * P
    inside = channel < d
    if S == 0:
        tl.store(parts + channel * P, by_bias, mask=inside)
    else:
        spots = channel[:, None] * P + column[None, :]
        tl.store(parts + spots, parameters, mask=inside[:, None] & (column <= S)[None, :])
    spots = channel[None, :] * P + S + 1 + place[:, None]
    tl.store(parts + spots, rates, mask=inside[None, :] & (place < N)[:, None])
    tl.store(parts + channel * P + S + 1 + N, by_skip, mask=inside)


@triton.jit(do_not_specialize=[
    "H", "W", "d", "stored", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def gradients(
    grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints, earlier,
    between, grad_x, grad_delta, token_parts, parameter_parts,
    H, W, d, stored, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    MP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTED: tl.constexpr, TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients through a route and its reverse: that of x, and parts of those of all else.

    Of sums over channels each block leaves its part, (blocks, B, L, K, S + 2 N), and of sums over tokens each program,
    (programs, K, d, S + N + 2). Where S is 0, gradients of the steps go to `grad_delta`: (B, L, K, d), or (K, B, L, d)
    if they were projected. A program takes its tiles by one route and then by the other, which finds them in the
    cache: the sums of both do not fit into registers. What it has of x's gradient `between` them, and between launches,
    is float32; None if that gradient itself is.
    """
    blocks = tl.cdiv(d, C)
    block = tl.program_id(0) % blocks
    channel = block * C + tl.arange(0, C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    length, pieces = _lines(H, W, COLUMNS, CONTINUOUS, T)
    tiles = H * W // length * pieces
    each = tl.cdiv(images * tiles, programs)
    begin, end = program * each, tl.minimum(program * each + each, images * tiles)
    parts = parameter_parts + program.to(tl.int64) * (K * (S + N + 2)) * d
    middle = grad_x
    if between is not None:
        middle = between
    if FORTH >= 0:
        _route_gradients(
            grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints,
            earlier, middle if BACK >= 0 else grad_x, grad_delta, token_parts, parts,
            block, channel, begin, end, tiles, H, W, d, stored, images,
            x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
            FORTH, K, N, NP, R, RP, S, MP, T, C, WHOLE, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, False,
            TOKEN_PRECISION, WEIGHT_PRECISION,
        )  # fmt: skip
    if FORTH >= 0 and BACK >= 0:
        tl.debug_barrier()
    if BACK >= 0:
        _route_gradients(
            grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints,
            middle if FORTH >= 0 else earlier, grad_x, grad_delta, token_parts, parts,
            block, channel, begin, end, tiles, H, W, d, stored, images,
            x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
            BACK, K, N, NP, R, RP, S, MP, T, C, WHOLE, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, True,
            TOKEN_PRECISION, WEIGHT_PRECISION,
        )  # fmt: skip
