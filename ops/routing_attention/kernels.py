"""Triton kernels of routing attention. Nothing is partitioned, padded or gathered: regions are read where they lie.

Letters: H, W height and width of the map of the queries, KH, KW of the map of the keys and values. A region has
`rows` x `cols` positions there and `krows` x `kcols` here; `across` regions make a row of regions, `down` rows a map.
D channels of a key and E of a value for each of HEADS heads; SLOTS routes of a region of queries.

The keys of a region of queries are counted through its routes, n = slot * krows * kcols + place; the queries of a
region of keys through the list of the routes that lead to it. Positions beyond a map are vectors of zeros: logit 0 and
value 0 as keys, and queries that nobody asked for. A route to a region that does not exist leads beyond the map, too.
Logits are kept in base 2, for exp2 is what the hardware has.
A number that is no constant is made float32 first: compilers pass it in float64, which would spread.

Two families of kernels: `routed_*` walk over the routes, for any map; `dense_*` hold all keys of a small map at once,
and cross out what is not routed, which for small regions is less work than reading and padding them one by one.

In `PACKED` calls `q` holds queries, keys and values, and `grad_q` their gradients. Sizes of regions are constants where
ROWS, COLS, KROWS and KCOLS are not 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, pixel, real, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One vector of D channels for each pixel, PITCH numbers after the last; zeros where it is not real."""
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + pixel[:, None] * PITCH + channel[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers, mask=real[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, value, pixel, real, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + pixel[:, None] * PITCH + channel[None, :]
    value = value.to(pointer.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(pointers, value, mask=real[:, None])
    else:
        tl.store(pointers, value, mask=real[:, None] & (channel < D)[None, :])


@triton.jit
def _pixels(t, down, across, H, W, rows, cols):
    """Index on the map of positions t of the region in row `down`, column `across`, and whether they lie on it."""
    y = down * rows + t // cols
    x = across * cols + t % cols
    return y * W + x, (t < rows * cols) & (y < H) & (x < W)


@triton.jit
def _routed(
    start,
    table,
    KH,
    KW,
    krows,
    kcols,
    across,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Pixels of the keys from number `start` on, whether they lie on the map, and their slots.

    UNIFORM: all of them are of one region.
    """
    area = krows * kcols
    n = start + tl.arange(0, BLOCK_N)
    slot = n // area
    if UNIFORM:
        region = tl.load(table + start // area).to(tl.int32)
    else:
        region = tl.load(table + slot, mask=slot < SLOTS, other=-1).to(tl.int32)
    pixel, real = _pixels(n % area, region // across, region % across, KH, KW, krows, kcols)
    return pixel, real & (region >= 0) & (slot < SLOTS), slot


@triton.jit
def _place(program, tiles, regions, HEADS: tl.constexpr):
    """Image, region, head and tile of a program: those of one region run side by side."""
    tile = program % tiles
    head = program // tiles % HEADS
    place = program // tiles // HEADS
    return place // regions, place % regions, head, tile


@triton.jit
def _table(image, head, region, regions, HEADS: tl.constexpr, PER_HEAD: tl.constexpr):
    """Row of the route table of a region of queries."""
    if PER_HEAD:
        return (image.to(tl.int64) * HEADS + head) * regions + region
    return image.to(tl.int64) * regions + region


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "down", "across", "rows", "cols", "krows", "kcols"])
def routed_forward(
    q,  # (B, H, W, HEADS, D)
    k,  # (B, KH, KW, HEADS, D)
    v,  # (B, KH, KW, HEADS, E)
    routes,  # (B, [HEADS,] regions, SLOTS) int64
    weights,  # likewise
    out,  # (B, H, W, HEADS, E)
    lse,  # (B, HEADS, H, W) float32, base 2
    scale,
    H,
    W,
    KH,
    KW,
    down,
    across,
    rows,
    cols,
    krows,
    kcols,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH_Q: tl.constexpr,
    PITCH_K: tl.constexpr,
    PITCH_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KROWS: tl.constexpr,
    KCOLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (image, region, head, tile): a tile of the queries of a region against all keys routed to it."""
    EXACT: tl.constexpr = KROWS > 0 and SLOTS * KROWS * KCOLS % BLOCK_N == 0
    UNIFORM: tl.constexpr = KROWS > 0 and KROWS * KCOLS % BLOCK_N == 0
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    if ROWS > 0:
        rows, cols, krows, kcols = ROWS, COLS, KROWS, KCOLS
    image, region, head, tile = _place(tl.program_id(0), tl.cdiv(rows * cols, BLOCK_M), down * across, HEADS)
    row = _table(image, head, region, down * across, HEADS, PER_HEAD) * SLOTS
    image = image.to(tl.int64)
    q += image * H * W * PITCH_Q + head * D
    k += image * KH * KW * PITCH_K + head * D
    v += image * KH * KW * PITCH_V + head * E
    factor = tl.cast(scale, tl.float32) * LOG2E
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_q, real_q = _pixels(t, region // across, region % across, H, W, rows, cols)
    queries = _load_rows(q, pixel_q, real_q, PITCH_Q, D, BLOCK_D)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in tl.range(0, SLOTS * krows * kcols, BLOCK_N, num_stages=STAGES):
        pixel, real, slot = _routed(start, routes + row, KH, KW, krows, kcols, across, SLOTS, BLOCK_N, UNIFORM)
        keys = _load_rows(k, pixel, real, PITCH_K, D, BLOCK_D)
        values = _load_rows(v, pixel, real, PITCH_V, E, BLOCK_E)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor
        if WEIGHTED:
            weight = tl.load(weights + row + slot, mask=slot < SLOTS, other=0.0).to(tl.float32)
            logits *= weight[None, :]
        if not EXACT:
            logits = tl.where((slot < SLOTS)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        decay = tl.exp2(highest - higher)
        p = tl.exp2(logits - higher[:, None])
        total = total * decay + tl.sum(p, 1)
        if WEIGHTED:
            p *= weight[None, :]
        value = tl.dot(p.to(values.dtype), values, value * decay[:, None], input_precision=PRECISION)
        highest = higher
    target = out + image * H * W * (HEADS * E) + head * E
    _store_rows(target, value * (1.0 / total)[:, None], pixel_q, real_q, HEADS * E, E, BLOCK_E)
    tl.store(lse + (image * HEADS + head) * H * W + pixel_q, highest + tl.log2(total), mask=real_q)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "down", "across", "rows", "cols", "krows", "kcols"])
def routed_backward_queries(
    grad_out,  # (B, H, W, HEADS, E)
    q,  # (B, H, W, HEADS, D)
    k,  # (B, KH, KW, HEADS, D)
    v,  # (B, KH, KW, HEADS, E)
    routes,  # (B, [HEADS,] regions, SLOTS) int64
    weights,  # likewise
    out,  # (B, H, W, HEADS, E), unless WHOLE
    lse,  # (B, HEADS, H, W) float32, base 2
    delta,  # (B, HEADS, H, W) float32, written here: sum of out * grad_out
    grad_q,  # (B, H, W, HEADS, D)
    grad_weights,  # (B, regions, HEADS, tiles, SLOTS) float32
    scale,
    H,
    W,
    KH,
    KW,
    down,
    across,
    rows,
    cols,
    krows,
    kcols,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH_Q: tl.constexpr,
    PITCH_K: tl.constexpr,
    PITCH_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KROWS: tl.constexpr,
    KCOLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    WEIGHTS_GRADIENT: tl.constexpr,
):
    """Program (image, region, head, tile): the gradient of a tile of the queries of a region.

    WHOLE: one step of the loop takes all keys, so that the sum of out * grad_out can be had without the output.
    """
    EXACT: tl.constexpr = KROWS > 0 and SLOTS * KROWS * KCOLS % BLOCK_N == 0
    UNIFORM: tl.constexpr = KROWS > 0 and KROWS * KCOLS % BLOCK_N == 0
    PITCH_G: tl.constexpr = PITCH_Q if PACKED else HEADS * D
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    if ROWS > 0:
        rows, cols, krows, kcols = ROWS, COLS, KROWS, KCOLS
    image, region, head, tile = _place(tl.program_id(0), tl.cdiv(rows * cols, BLOCK_M), down * across, HEADS)
    row = _table(image, head, region, down * across, HEADS, PER_HEAD) * SLOTS
    image = image.to(tl.int64)
    q += image * H * W * PITCH_Q + head * D
    k += image * KH * KW * PITCH_K + head * D
    v += image * KH * KW * PITCH_V + head * E
    natural = tl.cast(scale, tl.float32)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_q, real_q = _pixels(t, region // across, region % across, H, W, rows, cols)
    queries = _load_rows(q, pixel_q, real_q, PITCH_Q, D, BLOCK_D)
    outward = image * H * W * (HEADS * E) + head * E
    incoming = _load_rows(grad_out + outward, pixel_q, real_q, HEADS * E, E, BLOCK_E)
    statistics = (image * HEADS + head) * H * W + pixel_q
    lse_q = tl.load(lse + statistics, mask=real_q, other=float("inf"))
    if not WHOLE:
        found = _load_rows(out + outward, pixel_q, real_q, HEADS * E, E, BLOCK_E)
        delta_q = tl.sum(found.to(tl.float32) * incoming.to(tl.float32), 1)
        tl.store(delta + statistics, delta_q, mask=real_q)
    slots = tl.arange(0, BLOCK_SLOTS)
    weights_sum = tl.zeros((BLOCK_SLOTS,), tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, SLOTS * krows * kcols, BLOCK_N, num_stages=STAGES):
        pixel, real, slot = _routed(start, routes + row, KH, KW, krows, kcols, across, SLOTS, BLOCK_N, UNIFORM)
        keys = _load_rows(k, pixel, real, PITCH_K, D, BLOCK_D)
        values = _load_rows(v, pixel, real, PITCH_V, E, BLOCK_E)
        product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * natural
        logits = product * LOG2E
        dp = tl.dot(incoming, tl.trans(values), input_precision=PRECISION)
        plain_dp = dp
        if WEIGHTED:
            weight = tl.load(weights + row + slot, mask=slot < SLOTS, other=0.0).to(tl.float32)
            logits *= weight[None, :]
            dp *= weight[None, :]
        if not EXACT:
            logits = tl.where((slot < SLOTS)[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse_q[:, None])
        if WHOLE:
            delta_q = tl.sum(p * dp, 1)
            tl.store(delta + statistics, delta_q, mask=real_q)
        ds = p * (dp - delta_q[:, None])
        if WEIGHTS_GRADIENT:
            by_key = tl.sum(ds * product + p * plain_dp, 0)
            of_slot = slots[:, None] == slot[None, :]
            weights_sum += tl.sum(tl.where(of_slot, by_key[None, :], 0.0), 1)
        if WEIGHTED:
            ds *= weight[None, :]
        gradient = tl.dot(ds.to(keys.dtype), keys, gradient, input_precision=PRECISION)
    target = grad_q + image * H * W * PITCH_G + head * D
    _store_rows(target, gradient * natural, pixel_q, real_q, PITCH_G, D, BLOCK_D)
    if WEIGHTS_GRADIENT:
        tl.store(grad_weights + tl.program_id(0).to(tl.int64) * SLOTS + slots, weights_sum, mask=slots < SLOTS)


@triton.jit(do_not_specialize=["regions"])
def invert_routes(
    routes,  # (tables, regions, SLOTS) int64
    starts,  # (tables, regions + 1) int32, written here: where in `sources` the routes to each region begin
    sources,  # (tables, regions * SLOTS) int32, written here: numbers of routes, ordered by where they lead
    regions,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (table, region): lists the routes that lead to a region, in the order of the table."""
    table = (tl.program_id(0) // regions).to(tl.int64)
    region = tl.program_id(0) % regions
    total = regions * SLOTS
    routes += table * total
    sources += table * total
    below = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, total, BLOCK):
        number = start + tl.arange(0, BLOCK)
        target = tl.load(routes + number, mask=number < total, other=regions)
        below += (target < region).to(tl.int32)
    first = tl.sum(below, 0)
    tl.store(starts + table * (regions + 1) + region, first)
    for start in range(0, total, BLOCK):
        number = start + tl.arange(0, BLOCK)
        target = tl.load(routes + number, mask=number < total, other=regions)
        hit = (target == region).to(tl.int32)
        tl.store(sources + first + tl.cumsum(hit, 0) - 1, number, mask=hit == 1)
        first += tl.sum(hit, 0)
    if region == regions - 1:
        tl.store(starts + table * (regions + 1) + regions, first)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "down", "across", "rows", "cols", "krows", "kcols"])
def routed_backward_keys(
    grad_out,  # (B, H, W, HEADS, E)
    q,  # (B, H, W, HEADS, D)
    k,  # (B, KH, KW, HEADS, D)
    v,  # (B, KH, KW, HEADS, E)
    starts,  # (B, [HEADS,] regions + 1) int32
    sources,  # (B, [HEADS,] regions * SLOTS) int32
    weights,  # (B, [HEADS,] regions, SLOTS)
    lse,  # (B, HEADS, H, W) float32, base 2
    delta,  # (B, HEADS, H, W) float32
    grad_k,  # (B, KH, KW, HEADS, D), where PACKED (B, H, W, 3, HEADS, D)
    grad_v,  # (B, KH, KW, HEADS, E)
    scale,
    H,
    W,
    KH,
    KW,
    down,
    across,
    rows,
    cols,
    krows,
    kcols,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH_Q: tl.constexpr,
    PITCH_K: tl.constexpr,
    PITCH_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KROWS: tl.constexpr,
    KCOLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (image, region, head, tile): the gradient of a tile of the keys and values of a region.

    Tiles of logits stand keys by queries here, so that both gradients are products without a transposition.
    """
    PITCH_GK: tl.constexpr = PITCH_K if PACKED else HEADS * D
    PITCH_GV: tl.constexpr = PITCH_V if PACKED else HEADS * E
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
        grad_v = grad_k + 2 * HEADS * D
        grad_k += HEADS * D
    if ROWS > 0:
        rows, cols, krows, kcols = ROWS, COLS, KROWS, KCOLS
    regions = down * across
    area = rows * cols
    image, region, head, tile = _place(tl.program_id(0), tl.cdiv(krows * kcols, BLOCK_N), regions, HEADS)
    table = _table(image, head, 0, 1, HEADS, PER_HEAD)
    image = image.to(tl.int64)
    q += image * H * W * PITCH_Q + head * D
    k += image * KH * KW * PITCH_K + head * D
    v += image * KH * KW * PITCH_V + head * E
    grad_out += image * H * W * (HEADS * E) + head * E
    lse += (image * HEADS + head) * H * W
    delta += (image * HEADS + head) * H * W
    natural = tl.cast(scale, tl.float32)
    t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_k, real_k = _pixels(t, region // across, region % across, KH, KW, krows, kcols)
    keys = _load_rows(k, pixel_k, real_k, PITCH_K, D, BLOCK_D)
    values = _load_rows(v, pixel_k, real_k, PITCH_V, E, BLOCK_E)
    first = tl.load(starts + table * (regions + 1) + region)
    count = tl.load(starts + table * (regions + 1) + region + 1) - first
    sources += table * regions * SLOTS + first
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in tl.range(0, count * area, BLOCK_M, num_stages=STAGES):
        m = start + tl.arange(0, BLOCK_M)
        among = m < count * area
        source = tl.load(sources + m // area, mask=among, other=0)
        asking = source // SLOTS
        pixel, real = _pixels(m % area, asking // across, asking % across, H, W, rows, cols)
        real = real & among
        queries = _load_rows(q, pixel, real, PITCH_Q, D, BLOCK_D)
        incoming = _load_rows(grad_out, pixel, real, HEADS * E, E, BLOCK_E)
        lse_q = tl.load(lse + pixel, mask=real, other=float("inf"))
        delta_q = tl.load(delta + pixel, mask=real, other=0.0)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (natural * LOG2E)
        dp = tl.dot(values, tl.trans(incoming), input_precision=PRECISION)
        if WEIGHTED:
            weight = tl.load(weights + table * regions * SLOTS + source, mask=among, other=0.0).to(tl.float32)
            logits *= weight[None, :]
            dp *= weight[None, :]
        p = tl.exp2(logits - lse_q[None, :])
        ds = p * (dp - delta_q[None, :])
        if WEIGHTED:
            p *= weight[None, :]
            ds *= weight[None, :]
        dv = tl.dot(p.to(incoming.dtype), incoming, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    _store_rows(grad_k + image * KH * KW * PITCH_GK + head * D, dk * natural, pixel_k, real_k, PITCH_GK, D, BLOCK_D)
    _store_rows(grad_v + image * KH * KW * PITCH_GV + head * E, dv, pixel_k, real_k, PITCH_GV, E, BLOCK_E)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _routed_bits(routes, region, real, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """For each query, whose region is given, a bit for each region routed to it; all of them if it is not real."""
    slot = tl.arange(0, BLOCK_SLOTS)
    inside = real[:, None] & (slot < SLOTS)[None, :]
    target = tl.load(routes + region[:, None] * SLOTS + slot[None, :], mask=inside, other=0)
    bits = tl.where(inside, tl.full(target.shape, 1, tl.int64) << target, 0)
    return tl.where(real, tl.reduce(bits, 1, _either), -1)


@triton.jit
def _all_keys(KH, KW, down, across, krows, kcols, BLOCK_N: tl.constexpr):
    """All positions of a map of keys filled up to whole regions: pixel, whether it is real, and the bit of its region.

    No bit where there is no position.
    """
    n = tl.arange(0, BLOCK_N)
    width = across * kcols
    y, x = n // width, n % width
    region = y // krows * across + x // kcols
    bit = tl.where(y < down * krows, tl.full((BLOCK_N,), 1, tl.int64) << region.to(tl.int64), 0)
    return y * KW + x, (y < KH) & (x < KW), bit


@triton.jit
def _some_queries(tile, H, W, rows, cols, across, BLOCK_M: tl.constexpr):
    """Pixels of a tile of queries, whether they are real, and their regions."""
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return pixel, pixel < H * W, pixel // W // rows * across + pixel % W // cols


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "down", "across", "rows", "cols", "krows", "kcols"])
def dense_forward(
    q,  # (B, H, W, HEADS, D)
    k,  # (B, KH, KW, HEADS, D)
    v,  # (B, KH, KW, HEADS, E)
    routes,  # (B, [HEADS,] regions, SLOTS) int64
    out,  # (B, H, W, HEADS, E)
    lse,  # (B, HEADS, H, W) float32, base 2
    scale,
    H,
    W,
    KH,
    KW,
    down,
    across,
    rows,
    cols,
    krows,
    kcols,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH_Q: tl.constexpr,
    PITCH_K: tl.constexpr,
    PITCH_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KROWS: tl.constexpr,
    KCOLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Program (image and head, i): every so many tiles of the queries of an image, against all its keys.

    Tiles of logits stand keys by queries, for then a thread has the bits of few keys to keep, and keys stay in place.
    """
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    if ROWS > 0:
        rows, cols, krows, kcols = ROWS, COLS, KROWS, KCOLS
    head = tl.program_id(0) % HEADS
    image = tl.program_id(0) // HEADS
    routes += _table(image, head, 0, down * across, HEADS, PER_HEAD) * SLOTS
    image = image.to(tl.int64)
    q += image * H * W * PITCH_Q + head * D
    k += image * KH * KW * PITCH_K + head * D
    v += image * KH * KW * PITCH_V + head * E
    out += image * H * W * (HEADS * E) + head * E
    lse += (image * HEADS + head) * H * W
    factor = tl.cast(scale, tl.float32) * LOG2E
    pixel_k, real_k, bit = _all_keys(KH, KW, down, across, krows, kcols, BLOCK_N)
    keys = _load_rows(k, pixel_k, real_k, PITCH_K, D, BLOCK_D)
    values = _load_rows(v, pixel_k, real_k, PITCH_V, E, BLOCK_E)
    for tile in tl.range(tl.program_id(1), tl.cdiv(H * W, BLOCK_M), tl.num_programs(1), num_stages=STAGES):
        pixel, real, region = _some_queries(tile, H, W, rows, cols, across, BLOCK_M)
        routed = _routed_bits(routes, region, real, SLOTS, BLOCK_SLOTS)
        queries = _load_rows(q, pixel, real, PITCH_Q, D, BLOCK_D)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * factor
        logits = tl.where((bit[:, None] & routed[None, :]) != 0, logits, float("-inf"))
        highest = tl.max(logits, 0)
        p = tl.exp2(logits - highest[None, :])
        total = tl.sum(p, 0)
        p = (p * (1.0 / total)[None, :]).to(values.dtype)
        value = tl.dot(tl.trans(p), values, input_precision=PRECISION)
        _store_rows(out, value, pixel, real, HEADS * E, E, BLOCK_E)
        tl.store(lse + pixel, highest + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "down", "across", "rows", "cols", "krows", "kcols"])
def dense_backward(
    grad_out,  # (B, H, W, HEADS, E)
    q,  # (B, H, W, HEADS, D)
    k,  # (B, KH, KW, HEADS, D)
    v,  # (B, KH, KW, HEADS, E)
    routes,  # (B, [HEADS,] regions, SLOTS) int64
    lse,  # (B, HEADS, H, W) float32, base 2
    grad_q,  # (B, H, W, HEADS, D), where PACKED (B, H, W, 3, HEADS, D)
    grad_k,  # (B, KH, KW, HEADS, D)
    grad_v,  # (B, KH, KW, HEADS, E)
    scale,
    H,
    W,
    KH,
    KW,
    down,
    across,
    rows,
    cols,
    krows,
    kcols,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr,
    PITCH_Q: tl.constexpr,
    PITCH_K: tl.constexpr,
    PITCH_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KROWS: tl.constexpr,
    KCOLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Program (image and head): all gradients. Tiles of logits stand keys by queries."""
    PITCH_GQ: tl.constexpr = PITCH_Q if PACKED else HEADS * D
    PITCH_GK: tl.constexpr = PITCH_K if PACKED else HEADS * D
    PITCH_GV: tl.constexpr = PITCH_V if PACKED else HEADS * E
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
        grad_k = grad_q + HEADS * D
        grad_v = grad_q + 2 * HEADS * D
    if ROWS > 0:
        rows, cols, krows, kcols = ROWS, COLS, KROWS, KCOLS
    head = tl.program_id(0) % HEADS
    image = tl.program_id(0) // HEADS
    routes += _table(image, head, 0, down * across, HEADS, PER_HEAD) * SLOTS
    image = image.to(tl.int64)
    q += image * H * W * PITCH_Q + head * D
    k += image * KH * KW * PITCH_K + head * D
    v += image * KH * KW * PITCH_V + head * E
    grad_q += image * H * W * PITCH_GQ + head * D
    grad_out += image * H * W * (HEADS * E) + head * E
    lse += (image * HEADS + head) * H * W
    natural = tl.cast(scale, tl.float32)
    pixel_k, real_k, bit = _all_keys(KH, KW, down, across, krows, kcols, BLOCK_N)
    keys = _load_rows(k, pixel_k, real_k, PITCH_K, D, BLOCK_D)
    values = _load_rows(v, pixel_k, real_k, PITCH_V, E, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for tile in tl.range(0, tl.cdiv(H * W, BLOCK_M), num_stages=STAGES):
        pixel, real, region = _some_queries(tile, H, W, rows, cols, across, BLOCK_M)
        routed = _routed_bits(routes, region, real, SLOTS, BLOCK_SLOTS)
        queries = _load_rows(q, pixel, real, PITCH_Q, D, BLOCK_D)
        incoming = _load_rows(grad_out, pixel, real, HEADS * E, E, BLOCK_E)
        lse_q = tl.load(lse + pixel, mask=real, other=float("inf"))
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (natural * LOG2E)
        dp = tl.dot(values, tl.trans(incoming), input_precision=PRECISION)
        p = tl.where((bit[:, None] & routed[None, :]) != 0, tl.exp2(logits - lse_q[None, :]), 0.0)
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(queries.dtype)
        dv = tl.dot(p.to(incoming.dtype), incoming, dv, input_precision=PRECISION)
        dk = tl.dot(ds, queries, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds), keys, input_precision=PRECISION) * natural
        _store_rows(grad_q, dq, pixel, real, PITCH_GQ, D, BLOCK_D)
    _store_rows(grad_k + image * KH * KW * PITCH_GK + head * D, dk * natural, pixel_k, real_k, PITCH_GK, D, BLOCK_D)
    _store_rows(grad_v + image * KH * KW * PITCH_GV + head * E, dv, pixel_k, real_k, PITCH_GV, E, BLOCK_E)
