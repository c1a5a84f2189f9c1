"""Triton kernels of the selective scan over routes of a map.

Letters: T tokens of a tile, C channels of a block, N states, K routes, R numbers from which a step is projected.

A program is one warp whose lanes are channels: a thread holds all tokens of a tile for its channels, so that scanning
is arithmetic within a thread. An order of the pixels is one sequence, cut into tiles, of which the last may be short
unless WHOLE_TILES. Both ways along an order share its tiles. Tokens beyond the end repeat the last one, but their B and
C are zero: whatever comes from the end meets them with a state of zero, which they leave as it is, and whatever else
reaches them goes nowhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vizoo.ops.gpu import triton_version

LOG2E = tl.constexpr(1.4426950408889634)
FLIPS_ROWS = tl.constexpr(triton_version() >= (3, 6))
"""Whether Triton flips along any axis: that of torch 2.6 knows the last one only."""


@triton.jit
def _combine(a1, b1, a2, b2):
    """h -> a1 h + b1, and then h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _combine_before(a1, b1, l1, k1, a2, b2, l2, k2):
    """The same, that also tells k h + l of the last map, which sees the state before it."""
    return a2 * a1, a2 * b1 + b2, k2 * b1 + l2, k2 * a1


@triton.jit
def _flipped(x):
    """A tile (T, C) with its last token first."""
    if FLIPS_ROWS:
        x = tl.flip(x, 0)
    else:
        x = tl.trans(tl.flip(tl.trans(x), 1))
    return x


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
def _spread(values):
    """One number for each token, loaded once. Without the scan, which changes nothing, each thread would load all."""
    return tl.associative_scan(values, 0, _later)


@triton.jit
def _places(
    tile, token, H, W, columns, continuous, backwards,
    T: tl.constexpr, WHOLE_TILES: tl.constexpr, STRAIGHT: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Where the tokens of a tile lie.

    Returns:
        Their pixels and those of their parameters, which of them there are, and their lines (rows or columns) and
        places in these: all (T,). Only pixels are known to all threads at once. STRAIGHT: rows, one after the other.
    """
    step = tile * T + token
    if WHOLE_TILES:
        real = tl.full((T,), 1, tl.int1)
    else:
        real = step < H * W
        step = tl.minimum(step, H * W - 1)
    length = tl.where(columns, H, W)
    line = (step.to(tl.uint32) // length.to(tl.uint32)).to(tl.int32)
    place = step - line * length
    if STRAIGHT:
        # The shift gives zero. It hides that the stride is always the same, or else all multiples of it would be kept
        # in registers, one for each token, where a multiplication is as cheap as an addition.
        pixel = tile * T + token * (1 + (tile >> 31))
        if not WHOLE_TILES:
            pixel = tl.minimum(pixel, H * W - 1)
    else:
        turned = tl.where(continuous & (line % 2 == 1), length - 1 - place, place)
        pixel = _spread(tl.where(columns, turned * W + line, line * W + turned))
    row = pixel
    if not ROUTED:
        row = tl.where(backwards, H * W - 1 - step, step)
    return pixel, row, real, line, place


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
def _spots(pointer, offset, channel):
    """Where the numbers of a tile are: a token's offset in 32 bits, so that an address is one instruction."""
    return (pointer + channel)[None, :] + offset[:, None]


@triton.jit
def _tile(pointer, offset, channel, d, WHOLE: tl.constexpr):
    """Numbers of a tile of tokens and channels."""
    mask = _mask(tl.full(offset.shape, 1, tl.int1), channel, d, WHOLE)
    return tl.load(_spots(pointer, offset, channel), mask=mask, other=0.0)


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
def _sources(delta, offset, channel, d, R: tl.constexpr, RP: tl.constexpr, WHOLE: tl.constexpr):
    """What the steps of a tile are made from: (T, RP) numbers to project, or (T, C) steps if R is 0."""
    if R == 0:
        numbers = _tile(delta, offset, channel, d, WHOLE)
    else:
        column = tl.arange(0, RP)
        numbers = tl.load(_spots(delta, offset, column), mask=(column < R)[None, :], other=0.0)
    return numbers


@triton.jit
def _product(a, b, acc):
    """acc + a b, exact to float32's precision unless both are half."""
    if a.dtype == tl.float32:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision="tf32x3")
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _steps(sources, projection, bias, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr):
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
    return steps, v


@triton.jit
def _drive(B, direction_B, n, offset, real, line, place, H, W, columns, backwards, N: tl.constexpr):
    """B of a tile for one state, with what the directions of the route add; to be spread."""
    values = tl.load(B + offset + n, mask=real, other=0.0).to(tl.float32)
    if direction_B is not None:
        direction = _direction(line, place, H, W, columns, backwards)
        values += tl.load(direction_B + direction * N + n, mask=real, other=0.0).to(tl.float32)
    return values


@triton.jit
def _read(
    x, delta, B, direction_B, n, tile, token, channel, H, W, d, x_pixel, delta_pixel, B_pixel,
    columns, continuous, backwards,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_TILES: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """x, sources of the steps, and B of a tile, the last to be spread."""
    pixel, row, real, line, place = _places(
        tile, token, H, W, columns, continuous, backwards, T, WHOLE_TILES, False, ROUTED
    )
    values = _tile(x, pixel * x_pixel, channel, d, WHOLE)
    sources = _sources(delta, row * delta_pixel, channel, d, R, RP, WHOLE)
    drive = _drive(B, direction_B, n, row * B_pixel, real, line, place, H, W, columns, backwards, N)
    return values, sources, drive


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "segments", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def states(
    x, delta, weight, bias, A, B, direction_B, total_steps, ends, out,
    H, W, d, tiles, segments,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    CODES: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, WHOLE: tl.constexpr, WHOLE_TILES: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
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
    columns, backwards, continuous = code & 1 != 0, code & 2 != 0, code & 4 != 0
    against = backwards != ADJOINT
    x += image * x_image
    delta += image * delta_image + k * delta_route
    B += image * B_image + k * B_route
    projection, shift, _ = _constants(weight, bias, None, k, channel, d, R, RP)
    rate = _vector(A + (k * d) * N + n, channel * N, d * N) * LOG2E
    before = (image * K + k) * segments * N + n
    out += ((image * K + k) * tiles * N + n) * d
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
    values, sources, drives = _read(
        x, delta, B, direction_B, n, tl.minimum(tl.maximum(tile, 0), tiles - 1), token, channel, H, W, d,
        x_pixel, delta_pixel, B_pixel, columns, continuous, backwards, N, R, RP, T, WHOLE, WHOLE_TILES, ROUTED,
    )  # fmt: skip
    for _ in range(begin, end):
        # The next tile is asked for before this one is scanned: there are too few programs to wait in turn.
        next_tile = tl.minimum(tl.maximum(tile + onward, 0), tiles - 1)
        next_values, next_sources, next_drives = _read(
            x, delta, B, direction_B, n, next_tile, token, channel, H, W, d, x_pixel, delta_pixel, B_pixel,
            columns, continuous, backwards, N, R, RP, T, WHOLE, WHOLE_TILES, ROUTED,
        )  # fmt: skip
        if not AGGREGATE:
            tl.store(out + tile.to(tl.int64) * (N * d) + channel, h, mask=channel < d)
        steps = _steps(sources, projection, shift, R, T, C, SOFTPLUS)[0]
        decay = tl.exp2(steps * rate[None, :])
        drive = (decay if ADJOINT else steps) * values.to(tl.float32) * _spread(drives)[:, None]
        drive = tl.where(order[:, None] == 0, decay * h[None, :] + drive, drive)
        h = _last(tl.associative_scan((decay, drive), 0, _combine)[1], order, T - 1)
        if AGGREGATE:
            sums += tl.sum(steps, 0)
        tile += onward
        values, sources, drives = next_values, next_sources, next_drives
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
        h = _flipped(tl.associative_scan((_flipped(decay), _flipped(drive)), 0, _combine)[1])
    else:
        h = tl.associative_scan((decay, drive), 0, _combine)[1]
    return h


@triton.jit
def _given(
    B, Cm, direction_B, states, n, row, real, line, place, channel, H, W, d, B_pixel,
    N: tl.constexpr, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """B and C of a tile for one state, to be spread, and the state before the tile."""
    drives = _drive(B, direction_B, n, row * B_pixel, real, line, place, H, W, COLUMNS, BACKWARDS, N)
    reads = tl.load(Cm + row * B_pixel + n, mask=real, other=0.0).to(tl.float32)
    return drives, reads, _vector(states + n * d, channel, d)


@triton.jit
def _route_output(
    y, values, sources, drives, reads, state, row, real, line, place, projection, shift, A, B, Cm, direction_B, states,
    channel, H, W, d, B_pixel,
    k: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, SOFTPLUS: tl.constexpr,
    COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Adds what one route gives at each token of a tile, without the skip; given is what belongs to its first state."""
    token = tl.arange(0, T)
    steps = _steps(sources, projection, shift, R, T, C, SOFTPLUS)[0]
    driven = steps * values
    for n in range(N):
        rate = _vector(A + k * d * N + n, channel * N, d * N) * LOG2E
        map, read, before = _spread(drives), _spread(reads), state
        if N > 1:
            drives, reads, state = _given(
                B, Cm, direction_B, states, tl.minimum(n + 1, N - 1), row, real, line, place, channel,
                H, W, d, B_pixel, N, COLUMNS, BACKWARDS,
            )  # fmt: skip
        h = _scanned(tl.exp2(steps * rate[None, :]), driven * map[:, None], before, token, T - 1, BACKWARDS)
        y += h * read[:, None]
    return y


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def outputs(
    x, delta, weight, bias, A, B, Cm, D, direction_B, states, earlier, out,
    H, W, d, tiles, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_TILES: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Adds what a route (FORTH) and its reverse (BACK) give to what earlier launches gave; -1 is no route.

    Programs share the tiles of all images: the states before them are known.
    """
    blocks = tl.cdiv(d, C)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    token = tl.arange(0, T)
    STRAIGHT: tl.constexpr = not COLUMNS and not CONTINUOUS
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
        pixel, row, real, line, place = _places(
            tile, token, H, W, COLUMNS, CONTINUOUS, False, T, WHOLE_TILES, STRAIGHT, ROUTED
        )
        back_row = row
        if not ROUTED:
            back_row = H * W - 1 - row
        values = _tile(x + image * x_image, pixel * x_pixel, channel, d, WHOLE).to(tl.float32)
        whole = image * (H * W) * d
        source, inputs, reads = delta + image * delta_image, B + image * B_image, Cm + image * B_image
        # All that a tile needs is asked for at once.
        if FORTH >= 0:
            before_forth = states + ((image * K + FORTH) * tiles + tile) * N * d
            from_forth = _sources(source + FORTH * delta_route, row * delta_pixel, channel, d, R, RP, WHOLE)
            forth_drives, forth_reads, forth_state = _given(
                inputs + FORTH * B_route, reads + FORTH * B_route, direction_B, before_forth, 0,
                row, real, line, place, channel, H, W, d, B_pixel, N, COLUMNS, False,
            )  # fmt: skip
        if BACK >= 0:
            before_back = states + ((image * K + BACK) * tiles + tile) * N * d
            from_back = _sources(source + BACK * delta_route, back_row * delta_pixel, channel, d, R, RP, WHOLE)
            back_drives, back_reads, back_state = _given(
                inputs + BACK * B_route, reads + BACK * B_route, direction_B, before_back, 0,
                back_row, real, line, place, channel, H, W, d, B_pixel, N, COLUMNS, True,
            )  # fmt: skip
        y = skip[None, :] * values
        if earlier is not None:
            y += _tile(earlier + whole, pixel * d, channel, d, WHOLE)
        if FORTH >= 0:
            y = _route_output(
                y, values, from_forth, forth_drives, forth_reads, forth_state, row, real, line, place,
                forth_projection, forth_shift, A, inputs + FORTH * B_route, reads + FORTH * B_route, direction_B,
                before_forth, channel, H, W, d, B_pixel, FORTH, N, R, T, C, SOFTPLUS, COLUMNS, False,
            )  # fmt: skip
        if BACK >= 0:
            y = _route_output(
                y, values, from_back, back_drives, back_reads, back_state, back_row, real, line, place,
                back_projection, back_shift, A, inputs + BACK * B_route, reads + BACK * B_route, direction_B,
                before_back, channel, H, W, d, B_pixel, BACK, N, R, T, C, SOFTPLUS, COLUMNS, True,
            )  # fmt: skip
        mask = _mask(real, channel, d, WHOLE)
        tl.store(_spots(out + whole, pixel * d, channel), y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    x, delta, B, Cm, direction_B, states, earlier, out, projection, shift, skip, rate, channel,
    H, W, d, tiles, x_pixel, delta_pixel, B_pixel,
    R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_TILES: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """One route of one state through an image: leaves states before tiles, and adds its outputs to an earlier map."""
    COLUMNS: tl.constexpr = CODE & 1 != 0
    BACKWARDS: tl.constexpr = CODE & 2 != 0
    CONTINUOUS: tl.constexpr = CODE & 4 != 0
    STRAIGHT: tl.constexpr = not COLUMNS and not CONTINUOUS
    token = tl.arange(0, T)
    h = tl.zeros((C,), tl.float32)
    for i in range(tiles):
        tile = i
        if BACKWARDS:
            tile = tiles - 1 - i
        pixel, row, real, line, place = _places(
            tile, token, H, W, COLUMNS, CONTINUOUS, BACKWARDS, T, WHOLE_TILES, STRAIGHT, ROUTED
        )
        values = _tile(x, pixel * x_pixel, channel, d, WHOLE).to(tl.float32)
        sources = _sources(delta, row * delta_pixel, channel, d, R, RP, WHOLE)
        y = skip[None, :] * values
        if earlier is not None:
            y += _tile(earlier, pixel * d, channel, d, WHOLE)
        drives = _drive(B, direction_B, 0, row * B_pixel, real, line, place, H, W, COLUMNS, BACKWARDS, 1)
        reads = tl.load(Cm + row * B_pixel, mask=real, other=0.0).to(tl.float32)
        tl.store(states + tile * d + channel, h, mask=channel < d)
        steps = _steps(sources, projection, shift, R, T, C, SOFTPLUS)[0]
        at = _scanned(
            tl.exp2(steps * rate[None, :]), steps * values * _spread(drives)[:, None], h, token, T - 1, BACKWARDS
        )  # fmt: skip
        h = _last(at, token, 0 if BACKWARDS else T - 1)
        y += at * _spread(reads)[:, None]
        mask = _mask(real, channel, d, WHOLE)
        tl.store(_spots(out, pixel * d, channel), y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def walks(
    x, delta, weight, bias, A, B, Cm, D, direction_B, states, between, out,
    H, W, d, tiles,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    CODES: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_TILES: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """All routes of one state through an image, one after the other, in one program for each block of channels.

    It computes each step once, where `states` and `outputs` do twice, and what it reads again, x and the map of the
    routes before (`between`, or None if that is `out`), is still near.
    """
    blocks = tl.cdiv(d, C)
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    whole = image * (H * W) * d
    middle = out
    if between is not None:
        middle = between
    for k in tl.static_range(K):
        projection, shift, skip = _constants(weight, bias, D, k, channel, d, R, RP)
        _walk(
            x + image * x_image, delta + image * delta_image + k * delta_route, B + image * B_image + k * B_route,
            Cm + image * B_image + k * B_route, direction_B, states + (image * K + k) * tiles * d,
            middle + whole if k > 0 else None, out + whole if k == K - 1 else middle + whole,
            projection, shift, skip, _vector(A + k * d, channel, d) * LOG2E, channel,
            H, W, d, tiles, x_pixel, delta_pixel, B_pixel,
            R, RP, T, C, WHOLE, WHOLE_TILES, SOFTPLUS, ROUTED, (CODES >> (3 * k)) & 7,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _before(decay, drive, driver, state, token, LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """driver_t plus the state before each token of a tile, where drive = decay * driver is what a token adds."""
    first = token[:, None] == (LAST if BACKWARDS else 0)
    drive = tl.where(first, decay * state[None, :] + drive, drive)
    driver = tl.where(first, driver + state[None, :], driver)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    if BACKWARDS:
        decay, drive, driver = _flipped(decay), _flipped(drive), _flipped(driver)
        sums = _flipped(tl.associative_scan((decay, drive, driver, ones), 0, _combine_before)[2])
    else:
        sums = tl.associative_scan((decay, drive, driver, ones), 0, _combine_before)[2]
    return sums


@triton.jit
def _route_gradients(
    grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints, earlier, grad_x, grad_delta,
    token_parts, parameter_parts, block, channel, begin, end,
    H, W, d, tiles, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    S: tl.constexpr, MP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_TILES: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, COLUMNS: tl.constexpr,
    CONTINUOUS: tl.constexpr, BACKWARDS: tl.constexpr,
    TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some tiles through one route: adds that of x to an earlier one, and leaves parts of all others.

    Sums over channels, of the gradients of what steps are projected from (S columns: R, or none where steps' own
    gradients are wanted), of B and of C, are columns of one matrix.
    """
    token, column, place = tl.arange(0, T), tl.arange(0, MP), tl.arange(0, NP)
    M: tl.constexpr = S + 2 * N
    P: tl.constexpr = S + N + 2
    STRAIGHT: tl.constexpr = not COLUMNS and not CONTINUOUS
    FINE: tl.constexpr = delta.dtype.element_ty == tl.float32
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
        pixel, row, real, line, spot = _places(
            tile, token, H, W, COLUMNS, CONTINUOUS, BACKWARDS, T, WHOLE_TILES, STRAIGHT, ROUTED
        )
        whole, mask = image * (H * W) * d, _mask(real, channel, d, WHOLE)
        values = _tile(x + image * x_image, pixel * x_pixel, channel, d, WHOLE).to(tl.float32)
        grads = _tile(grad_out + whole, pixel * d, channel, d, WHOLE).to(tl.float32)
        if not WHOLE_TILES:
            grads = tl.where(real[:, None], grads, 0.0)
        source = delta + image * delta_image
        sources = _sources(source, row * delta_pixel, channel, d, R, RP, WHOLE)
        where = ((image * K + k) * tiles + tile) * N * d
        drives, reads, state = _given(
            B + image * B_image, Cm + image * B_image, direction_B, states + where, 0, row, real, line, spot, channel,
            H, W, d, B_pixel, N, COLUMNS, BACKWARDS,
        )  # fmt: skip
        adjoint_state = _vector(adjoints + where, channel, d)
        by_skip += tl.sum(values * grads, 0)
        steps, v = _steps(sources, projection, shift, R, T, C, SOFTPLUS)
        sums = tl.zeros((T, MP), tl.float32)
        total, by_steps = skip[None, :] * grads, tl.zeros((T, C), tl.float32)
        for n in range(N):
            rate = _vector(A + k * d * N + n, channel * N, d * N)
            map, read = _spread(drives)[:, None], _spread(reads)[:, None]
            before, adjoint_before = state, adjoint_state
            if N > 1:
                following = tl.minimum(n + 1, N - 1)
                drives, reads, state = _given(
                    B + image * B_image, Cm + image * B_image, direction_B, states + where, following,
                    row, real, line, spot, channel, H, W, d, B_pixel, N, COLUMNS, BACKWARDS,
                )  # fmt: skip
                adjoint_state = _vector(adjoints + where + following * d, channel, d)
            decay = tl.exp2(steps * (rate * LOG2E)[None, :])
            drive = steps * values * map
            h = _scanned(decay, drive, before, token, T - 1, BACKWARDS)
            driver = read * grads
            adjoint = _before(decay, decay * driver, driver, adjoint_before, token, T - 1, not BACKWARDS)
            kept = tl.where(decay > 0.0, h - drive, 0.0)  # a rounding would remain, which long steps make large
            total += adjoint * steps * map
            by_steps += adjoint * (rate[None, :] * kept + map * values)
            rates += tl.where(place[:, None] == n, tl.sum(adjoint * steps * kept, 0)[None, :], 0.0)
            into = tl.where(column[None, :] == S + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
            sums = tl.dot(adjoint * steps * values, into, sums, input_precision=TOKEN_PRECISION)
            into = tl.where(column[None, :] == S + N + n, 1.0, 0.0) + tl.zeros((C, MP), tl.float32)
            sums = tl.dot(h * grads, into, sums, input_precision=TOKEN_PRECISION)
        if SOFTPLUS and FINE:
            by_steps *= tl.exp2((v - steps) * LOG2E)  # the sigmoid of v
        elif SOFTPLUS:
            by_steps *= 1.0 - tl.exp2(-steps * LOG2E)  # the same, to a few digits less where steps are small
        if earlier is not None:
            total += _tile(earlier + whole, pixel * d, channel, d, WHOLE)
        tl.store(_spots(grad_x + whole, pixel * d, channel), total.to(grad_x.dtype.element_ty), mask=mask)
        by_bias += tl.sum(by_steps, 0)
        if S == 0:
            if weight is None:
                target, pitch = grad_delta + whole * K + k * d, K * d
            else:
                target, pitch = grad_delta + (image + k * images) * (H * W) * d, d
            tl.store(_spots(target, row * pitch, channel), by_steps.to(grad_delta.dtype.element_ty), mask=mask)
        else:
            sums = tl.dot(by_steps, wide, sums, input_precision=TOKEN_PRECISION)
            right = _sources(source, row * delta_pixel, channel, d, R, MP, WHOLE).to(tl.float32)
            parameters = tl.dot(tl.trans(by_steps), right, parameters, input_precision=WEIGHT_PRECISION)
        target = token_parts + (block * images + image) * (H * W) * (K * M) + k * M
        tl.store(_spots(target, row * (K * M), column), sums, mask=real[:, None] & (column < M)[None, :])
    parts = parameter_parts + k * d * P
    inside = channel < d
    if S > 0:
        spots = channel[:, None] * P + column[None, :]
        tl.store(parts + spots, parameters, mask=inside[:, None] & (column < S)[None, :])
    tl.store(parts + channel * P + S, by_bias, mask=inside)
    spots = channel[None, :] * P + S + 1 + place[:, None]
    tl.store(parts + spots, rates, mask=inside[None, :] & (place < N)[:, None])
    tl.store(parts + channel * P + S + 1 + N, by_skip, mask=inside)


@triton.jit(do_not_specialize=[
    "H", "W", "d", "tiles", "images", "x_image", "x_pixel", "delta_image", "delta_pixel", "delta_route",
    "B_image", "B_pixel", "B_route",
])  # fmt: skip
def gradients(
    grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints, earlier,
    between, grad_x, grad_delta, token_parts, parameter_parts,
    H, W, d, tiles, images,
    x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
    FORTH: tl.constexpr, BACK: tl.constexpr, COLUMNS: tl.constexpr, CONTINUOUS: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    MP: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE_TILES: tl.constexpr, ROUTED: tl.constexpr, TOKEN_PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr,
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
            block, channel, begin, end, H, W, d, tiles, images,
            x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
            FORTH, K, N, NP, R, RP, S, MP, T, C, WHOLE, WHOLE_TILES, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, False,
            TOKEN_PRECISION, WEIGHT_PRECISION,
        )  # fmt: skip
    if FORTH >= 0 and BACK >= 0:
        tl.debug_barrier()
    if BACK >= 0:
        _route_gradients(
            grad_out, x, delta, weight, bias, A, B, Cm, D, direction_B, states, adjoints,
            middle if FORTH >= 0 else earlier, grad_x, grad_delta, token_parts, parts,
            block, channel, begin, end, H, W, d, tiles, images,
            x_image, x_pixel, delta_image, delta_pixel, delta_route, B_image, B_pixel, B_route,
            BACK, K, N, NP, R, RP, S, MP, T, C, WHOLE, WHOLE_TILES, SOFTPLUS, ROUTED, COLUMNS, CONTINUOUS, True,
            TOKEN_PRECISION, WEIGHT_PRECISION,
        )  # fmt: skip
