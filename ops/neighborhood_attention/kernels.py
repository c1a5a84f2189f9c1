"""Triton kernels of neighborhood attention. Nothing is unfolded, gathered or masked in memory: keys are read in place.

Letters: Z, Y, X are the sizes of the axes of a map (1 where there is no such axis), with dilations DZ, DY, DX, kernel
sizes KZ, KY, KX and strides SZ, SY, SX; a head has D channels. Small letters with _z, _y, _x are values of one axis.

Places along an axis are counted within a group, the positions that differ by multiples of the dilation: place p of
group g stands at p * dilation + g, and the group has `size` places. A program owns one head and one tile of
TZ x TY x TX places of one group of each axis, and walks over blocks of CZ x CY x CX places that its windows reach (the
union of windows along each axis; nothing else is visited). Both are flattened to the rows and columns of a matrix
product. Places past the end of a group read its last one: as keys nobody sees them, as queries they see nobody.

Logits are natural, softmax takes powers of two. A number that is no constant is made float32 first: compilers pass it
in float64, which would spread.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SIGNS = tl.constexpr(-(2**31) + 2**15)
"""Those of both halves of a number."""
LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts. Finite, so that masked logits, minus infinity, have weight zero from the start."""


@triton.jit
def _axis(tile, length, dilation, T):
    """Group of a tile, its first place, and the size of the group. Tiles of all groups stand side by side."""
    group = tile % dilation
    return group, tile // dilation * T, (length - group + dilation - 1) // dilation


@triton.jit
def _window(p, size, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First key that queries p see, and the one after the last."""
    first = p
    if S > 1:
        first = p // S * S
    if CAUSAL:
        return tl.maximum(tl.minimum(first + (S - 1), size - 1) - (K - 1), 0), p + 1
    start = tl.minimum(tl.maximum(tl.minimum(first + S // 2, size - 1) - K // 2, 0), size - K)
    return start, start + K


@triton.jit
def _union(first, size, T, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First key that any query of a tile sees, and the one after the last: windows move with their queries."""
    start, _ = _window(first, size, K, S, CAUSAL)
    _, end = _window(tl.minimum(first + T, size) - 1, size, K, S, CAUSAL)
    return start, end


@triton.jit
def _seers(first, size, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First query that sees any key of a tile, and the one after the last: `_window` solved for p."""
    last = tl.minimum(first + T, size) - 1
    if CAUSAL:
        return first, tl.where(last + K >= size, size, tl.minimum((last + K) // S * S, size))
    LEFT: tl.constexpr = K // 2 - S // 2
    begin = (tl.maximum(first - (K - 1) + LEFT, 0) + S - 1) // S * S
    begin = tl.where(first < K, 0, begin)
    end = tl.minimum((last + LEFT) // S * S + S, size)
    return begin, tl.where(last >= size - K, size, end)


@triton.jit
def _split(n, BY: tl.constexpr, BX: tl.constexpr):
    """Place on each axis of row or column n of a flattened block."""
    return n // (BY * BX), n // BX % BY, n % BX


@triton.jit
def _pixel(z, y, x, end_z, end_y, end_x, g_z, g_y, g_x, Y, X, DZ, DY, DX):
    """Index on the map of places of a group; of the nearest for those past the end, of the group or of what is met.

    What one instruction loads of a pixel again and again it fetches once.
    """
    z = tl.maximum(tl.minimum(z, end_z - 1), 0)
    y = tl.maximum(tl.minimum(y, end_y - 1), 0)
    x = tl.maximum(tl.minimum(x, end_x - 1), 0)
    return ((z * DZ + g_z) * Y + y * DY + g_y) * X + x * DX + g_x


@triton.jit
def _places(pointer, pixel, PITCH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the channels of each pixel lie, and their numbers, for pixels in a list or in a list of lists."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    if len(pixel.shape) == 2:
        channel = channel[None, :, :]
    return pointer + tl.expand_dims(pixel, -1) * PITCH + channel, channel


@triton.jit
def _vectors(pointer, pixel, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads a vector of D channels for each pixel."""
    pointers, channel = _places(pointer, pixel, PITCH, BLOCK_D)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=channel < D, other=0.0)


@triton.jit
def _put_vectors(pointer, value, pixel, real, PITCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, channel = _places(pointer, pixel, PITCH, BLOCK_D)
    value = value.to(pointer.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(pointers, value, mask=tl.expand_dims(real, -1))
    else:
        tl.store(pointers, value, mask=tl.expand_dims(real, -1) & (channel < D))


@triton.jit
def _sees(p, j, size, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether queries p see keys j along an axis; one of them is a column, the other a row."""
    start, end = _window(p, size, K, S, CAUSAL)
    start = tl.where(p < size, start, 2**30)
    if CAUSAL:
        return (j >= start) & (j < end)
    return (j - start).to(tl.uint32) < K  # one comparison for both ends


@triton.jit
def _visible(
    p_z, p_y, p_x,
    j_z, j_y, j_x,
    size_z, size_y, size_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    TEST_Z: tl.constexpr, TEST_Y: tl.constexpr, TEST_X: tl.constexpr,
):  # fmt: skip
    """Whether queries p see keys j. An axis along which tile and block are one place wide needs no test."""
    visible = (p_z * 0 + j_z * 0) == 0
    if TEST_Z:
        visible &= _sees(p_z, j_z, size_z, KZ, SZ, CAUSAL_Z)
    if TEST_Y:
        visible &= _sees(p_y, j_y, size_y, KY, SY, CAUSAL_Y)
    if TEST_X:
        visible &= _sees(p_x, j_x, size_x, KX, SX, CAUSAL_X)
    return visible


@triton.jit
def _entry(z, y, x, KY: tl.constexpr, KX: tl.constexpr):
    """Index in the bias of a head of an offset, counted from that of offset zero; linear."""
    return ((z * (2 * KY - 1) + y) * (2 * KX - 1) + x).to(tl.int64)


@triton.jit
def _bias_of(bias, head, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr):
    """Where the bias of a head has its entry of offset zero."""
    SIZE: tl.constexpr = (2 * KZ - 1) * (2 * KY - 1) * (2 * KX - 1)
    return bias + head * SIZE + SIZE // 2


@triton.jit
def _added(column, row, visible, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What is added to logits: the bias at pointers column + row, minus infinity for keys out of sight.

    The column moves from block to block and the row is constant, so that compilers put it into the address of the
    load. A load by `tl.load` would come in the layout of loads, pass through shared memory to that of products, and be
    taken for one to prefetch: twice the instructions for the loop. Written as an operation on elements, which the
    interpreter does not know, it comes where it is used.
    """
    if HAS_BIAS:
        pointers = tl.expand_dims(column, -1) + tl.expand_dims(row, -2)
        if ASSEMBLY:
            added = tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0xff800000; @p ld.global.nc.f32 $0, [$1]; }",
                "=f,l,r",
                [pointers.to(tl.int64), visible.to(tl.int32)],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            added = tl.load(pointers, mask=visible, other=float("-inf"))
    else:
        added = tl.where(visible, 0.0, float("-inf"))
    return added


@triton.jit
def _over(n, w):
    """n // w by a product, exact where n * w stays below 2 ** 16: places of a box against a side of it."""
    return (n * ((w + 65535) // w)) >> 16


@triton.jit
def _ends(p, first, size, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last key that queries p see, counted from the first of their tile; none past the end of the group."""
    start, end = _window(p, size, K, S, CAUSAL)
    return tl.where(p < size, start - first, 16384), end - 1 - first


@triton.jit
def _met(
    bias, p_z, p_y, p_x,
    c_z, c_y, c_x, end_z, end_y, end_x,
    size_z, size_y, size_x, g_z, g_y, g_x,
    Y, X, DZ, DY, DX,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr, KEYS_DOWN: tl.constexpr, FLAT: tl.constexpr,
    FIRST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Pixels of keys of a box from the FIRST on, and what is added to their logits; keys are columns, or rows if
    KEYS_DOWN. Behind the last of the box all have its pixel, and nobody sees them.

    Each pair takes a few instructions: places in the box have a half of a number for each of two axes, of which that of
    a difference is negative where a key is out of sight.
    """
    n = FIRST + tl.arange(0, KEYS)
    if len(p_z.shape) == 2:
        n = n[None, :]
    QUERY: tl.constexpr = -2 if KEYS_DOWN else -1  # which axis of a product is not that of the queries
    KEY: tl.constexpr = -1 if KEYS_DOWN else -2
    wide, high = end_x - c_x, end_y - c_y
    row = _over(n, wide)
    n_z, n_y, n_x = row * 0, row, n - row * wide
    if not FLAT:
        n_z = _over(row, high)
        n_y -= n_z * high
    in_box = n < (end_z - c_z) * high * wide
    near_y, near_x = tl.where(in_box, c_y + n_y, end_y - 1), tl.where(in_box, c_x + n_x, end_x - 1)
    pixel = _pixel(c_z + n_z, near_y, near_x, end_z, end_y, end_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    start_y, last_y = _ends(p_y, c_y, size_y, KY, SY, CAUSAL_Y)
    start_x, last_x = _ends(p_x, c_x, size_x, KX, SX, CAUSAL_X)
    key = tl.expand_dims(n_y * 65536 + n_x, KEY)
    behind = key - tl.expand_dims(start_y * 65536 + start_x, QUERY)
    ahead = tl.expand_dims(last_y * 65536 + last_x, QUERY) - key
    if not FLAT:
        start_z, last_z = _ends(p_z, c_z, size_z, KZ, SZ, CAUSAL_Z)
        key_z = tl.expand_dims(n_z, KEY)
        behind |= key_z - tl.expand_dims(start_z, QUERY)
        ahead |= tl.expand_dims(last_z, QUERY) - key_z
    hidden = (behind | ahead) & SIGNS
    if not HAS_BIAS:
        added = tl.where(hidden == 0, 0.0, float("-inf"))
    else:
        pointers = tl.expand_dims(bias + _entry(c_z - p_z, c_y - p_y, c_x - p_x, KY, KX), QUERY)
        entry = tl.expand_dims(_entry(n_z, n_y, n_x, KY, KX).to(tl.int32), KEY)
        if ASSEMBLY:  # as in `_added`
            added = tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b64 a; setp.eq.s32 p, $3, 0; mad.wide.s32 a, $2, 4, $1; "
                "mov.b32 $0, 0xff800000; @p ld.global.nc.f32 $0, [a]; }",
                "=f,l,r,r",
                [pointers.to(tl.int64), entry, hidden],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            added = tl.load(pointers + entry, mask=hidden == 0, other=float("-inf"))
    return pixel, added


@triton.jit
def _log2(x, ASSEMBLY: tl.constexpr):
    """Of sums from 1 on, by one instruction for some forty that mind the smallest numbers."""
    if ASSEMBLY:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def _turned(x):
    """A matrix, or each of a list, with rows and columns exchanged."""
    if len(x.shape) == 3:
        turned = tl.permute(x, (0, 2, 1))
    else:
        turned = tl.trans(x)
    return turned


@triton.jit
def _next(
    c_z, c_y, c_x, start_y, start_x, end_y, end_x, CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr
):  # fmt: skip
    """First places of the next block."""
    c_x += CX
    row_ends = c_x >= end_x
    c_x = tl.where(row_ends, start_x, c_x)
    c_y += tl.where(row_ends, CY, 0)
    plane_ends = c_y >= end_y
    c_y = tl.where(plane_ends, start_y, c_y)
    return c_z + tl.where(plane_ends, CZ, 0), c_y, c_x


@triton.jit
def _program(tiles, down, across, HEADS: tl.constexpr):
    """Image, head and tile along each axis of a program. Heads of one tile lie side by side in memory."""
    program = tl.program_id(0)
    tile = program // HEADS % tiles
    image = (program // HEADS // tiles).to(tl.int64)
    return image, program % HEADS, tile // (down * across), tile // across % down, tile % across


@triton.jit(do_not_specialize=["tiles", "down", "across"])
def forward(
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    out,  # (B, Z, Y, X, HEADS, D)
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of queries against blocks of the keys that they see."""
    BLOCK_M: tl.constexpr = TZ * TY * TX
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    image, head, tile_z, tile_y, tile_x = _program(tiles, down, across, HEADS)
    g_z, first_z, size_z = _axis(tile_z, Z, DZ, TZ)
    g_y, first_y, size_y = _axis(tile_y, Y, DY, TY)
    g_x, first_x, size_x = _axis(tile_x, X, DX, TX)
    if (first_z >= size_z) | (first_y >= size_y) | (first_x >= size_x):
        return
    m_z, m_y, m_x = _split(tl.arange(0, BLOCK_M), TY, TX)
    p_z, p_y, p_x = first_z + m_z, first_y + m_y, first_x + m_x
    real = (p_z < size_z) & (p_y < size_y) & (p_x < size_x)
    pixel_q = _pixel(p_z, p_y, p_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    inward = image * Z * Y * X * PITCH + head * D
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    query = _vectors(q + inward, pixel_q, PITCH, D, BLOCK_D)
    factor = tl.cast(scale, tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    n_z, n_y, n_x = _split(tl.arange(0, CZ * CY * CX), CY, CX)
    entry_k = _entry(n_z, n_y, n_x, KY, KX)
    start_z, end_z = _union(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
    start_y, end_y = _union(first_y, size_y, TY, KY, SY, CAUSAL_Y)
    start_x, end_x = _union(first_x, size_x, TX, KX, SX, CAUSAL_X)
    blocks = tl.cdiv(end_z - start_z, CZ) * tl.cdiv(end_y - start_y, CY) * tl.cdiv(end_x - start_x, CX)
    c_z, c_y, c_x = start_z, start_y, start_x
    if HAS_BIAS:
        bias = _bias_of(bias, head, KZ, KY, KX) + _entry(c_z - p_z, c_y - p_y, c_x - p_x, KY, KX)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        j_z, j_y, j_x = c_z + n_z, c_y + n_y, c_x + n_x
        pixel = _pixel(j_z, j_y, j_x, end_z, end_y, end_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
        keys = _vectors(k + inward, pixel, PITCH, D, BLOCK_D)
        values = _vectors(v + inward, pixel, PITCH, D, BLOCK_D)
        visible = _visible(
            p_z[:, None], p_y[:, None], p_x[:, None], j_z[None, :], j_y[None, :], j_x[None, :],
            size_z, size_y, size_x, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X,
            TZ * CZ > 1, TY * CY > 1, TX * CX > 1,
        )  # fmt: skip
        added = _added(bias, entry_k, visible, HAS_BIAS, ASSEMBLY)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor + added
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits * LOG2E - (higher * LOG2E)[:, None])
        decay = tl.exp2((highest - higher) * LOG2E)
        total = total * decay + tl.sum(p, 1)
        value = tl.dot(p.to(values.dtype), values, value * decay[:, None], input_precision=PRECISION)
        highest = higher
        before = _entry(c_z, c_y, c_x, KY, KX)
        c_z, c_y, c_x = _next(c_z, c_y, c_x, start_y, start_x, end_y, end_x, CZ, CY, CX)
        if HAS_BIAS:
            bias += _entry(c_z, c_y, c_x, KY, KX) - before
    total = tl.where(real, total, 1.0)
    target = out + image * Z * Y * X * (HEADS * D) + head * D
    _put_vectors(target, value * (1.0 / total)[:, None], pixel_q, real, HEADS * D, D, BLOCK_D)
    statistics = lse + (image * HEADS + head) * Z * Y * X
    tl.store(statistics + pixel_q, highest * LOG2E + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["tiles", "down", "across", "images"])
def whole_forward(
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    out,  # (B, Z, Y, X, HEADS, D)
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    images,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    KEYS: tl.constexpr,
    MORE: tl.constexpr, STAGES: tl.constexpr, STACK: tl.constexpr, DIVIDES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Program (stack, head; share): STACK tiles of queries, one below the other, image after image.

    Each tile meets one block of all keys that it sees, in a product of its own. Of a stack a warp has one tile, without
    a part in the others' softmax; the blocks overlap, but for the caches. What is added to the logits is the same for
    all images: it is looked up once, and stays in registers.

    The keys of a tile are a box of any sides, and stand one behind the other, row after row, in a block of KEYS and one
    of MORE: 10 x 14 keys are 128 and 16 columns, four of which nobody sees.

    If it TURNS, a tile in the last rows of a group is half as high and twice as wide when that is enough: 8 x 4 queries
    leave 4 rows of 28 to tiles of 4 x 8.

    A product that starts at what is added, divided by the scale, has the logits for one multiplication, which is that
    to powers of two. With DIVIDES the scale is positive, and of usual size.
    """
    BLOCK_M: tl.constexpr = TZ * TY * TX
    LAST: tl.constexpr = 2 if STACK > 1 else 1
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    g_z, first_z, size_z = _axis(tile // (down * across), Z, DZ, TZ)
    g_y, first_y, size_y = _axis(tile // across % down, Y, DY, TY * STACK)
    if TURNS:
        wide = size_y - first_y <= TY // 2
        high_y, wide_x = tl.where(wide, TY // 2, TY), tl.where(wide, 2 * TX, TX)
    else:
        high_y, wide_x = TY, TX
    g_x, first_x, size_x = _axis(tile % across, X, DX, wide_x)
    if (first_z >= size_z) | (first_y >= size_y) | (first_x >= size_x) | (tl.program_id(1) >= images):
        return
    m = tl.arange(0, BLOCK_M)
    if STACK > 1:  # a list of tiles; else all that follows is one rank lower
        m = m[None, :]
        first_y += tl.arange(0, STACK)[:, None] * TY
    m_z, m_y, m_x = _split(m, TY, TX)
    if TURNS:
        _, wide_m_y, wide_m_x = _split(m, TY // 2, 2 * TX)
        m_y, m_x = tl.where(wide, wide_m_y, m_y), tl.where(wide, wide_m_x, m_x)
    p_z, p_y, p_x = first_z + m_z, first_y + m_y, first_x + m_x
    real = (p_z < size_z) & (p_y < size_y) & (p_x < size_x)
    pixel_q = _pixel(p_z, p_y, p_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    # Behind the end of its group is its last query, again and again: one that saw nobody would divide zero by zero.
    p_z, p_y, p_x = tl.minimum(p_z, size_z - 1), tl.minimum(p_y, size_y - 1), tl.minimum(p_x, size_x - 1)
    c_z, end_z = _union(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
    c_y, end_y = _union(first_y, size_y, high_y, KY, SY, CAUSAL_Y)
    c_x, end_x = _union(first_x, size_x, wide_x, KX, SX, CAUSAL_X)
    if HAS_BIAS:
        bias = _bias_of(bias, head, KZ, KY, KX)
    pixel_k, added = _met(
        bias, p_z, p_y, p_x, c_z, c_y, c_x, end_z, end_y, end_x, size_z, size_y, size_x, g_z, g_y, g_x,
        Y, X, DZ, DY, DX, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X, HAS_BIAS, ASSEMBLY, False,
        TZ * KZ == 1, 0, KEYS,
    )  # fmt: skip
    if MORE:
        pixel_more, added_more = _met(
            bias, p_z, p_y, p_x, c_z, c_y, c_x, end_z, end_y, end_x, size_z, size_y, size_x, g_z, g_y, g_x,
            Y, X, DZ, DY, DX, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X, HAS_BIAS, ASSEMBLY, False,
            TZ * KZ == 1, KEYS, MORE,
        )  # fmt: skip
    unit = LOG2E * tl.cast(scale, tl.float32)
    if DIVIDES:
        added *= LOG2E / unit
        if MORE:
            added_more *= LOG2E / unit
    else:
        factor, unit = tl.cast(scale, tl.float32), tl.cast(LOG2E, tl.float32)
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    for number in tl.range(tl.program_id(1), images, tl.num_programs(1), num_stages=STAGES):
        image = tl.cast(number, tl.int64)
        inward = image * Z * Y * X * PITCH + head * D
        query = _vectors(q + inward, pixel_q, PITCH, D, BLOCK_D)
        keys = _vectors(k + inward, pixel_k, PITCH, D, BLOCK_D)
        values = _vectors(v + inward, pixel_k, PITCH, D, BLOCK_D)
        if DIVIDES:
            logits = tl.dot(query, _turned(keys), added, input_precision=PRECISION)
        else:
            logits = tl.dot(query, _turned(keys), input_precision=PRECISION) * factor + added
        highest = tl.max(logits, LAST)
        if MORE:
            keys_more = _vectors(k + inward, pixel_more, PITCH, D, BLOCK_D)
            values_more = _vectors(v + inward, pixel_more, PITCH, D, BLOCK_D)
            if DIVIDES:
                logits_more = tl.dot(query, _turned(keys_more), added_more, input_precision=PRECISION)
            else:
                logits_more = tl.dot(query, _turned(keys_more), input_precision=PRECISION) * factor + added_more
            highest = tl.maximum(highest, tl.max(logits_more, LAST))
        highest *= unit
        p = tl.exp2(logits * unit - tl.expand_dims(highest, -1))
        total = tl.sum(p, LAST)
        value = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        if MORE:
            p_more = tl.exp2(logits_more * unit - tl.expand_dims(highest, -1))
            total += tl.sum(p_more, LAST)
            value = tl.dot(p_more.to(values.dtype), values_more, value, input_precision=PRECISION)
        total = _log2(total, ASSEMBLY)
        value *= tl.expand_dims(tl.exp2(-total), -1)
        target = out + image * Z * Y * X * (HEADS * D) + head * D
        _put_vectors(target, value, pixel_q, real, HEADS * D, D, BLOCK_D)
        statistics = lse + (image * HEADS + head) * Z * Y * X
        tl.store(statistics + pixel_q, highest + total, mask=real)


@triton.jit(do_not_specialize=["tiles", "down", "across", "images"])
def whole_backward_queries(
    grad_out,  # (B, Z, Y, X, HEADS, D)
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    out,  # (B, Z, Y, X, HEADS, D)
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    delta,  # (B, HEADS, Z, Y, X) float32, written here: sum of out * grad_out
    grad_q,  # like q
    parts,  # (shares, HEADS, tiles, BLOCK_N, BLOCK_M) float32, of BIAS_GRADIENT
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    images,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Program (tile, head; share): the gradient of a tile of queries whose keys fit one block, image after image.

    What is added to logits stays in registers, as in `whole_forward`, and so does the sum over images of the gradient
    of the logits, from which `whole_fold_bias` makes that of the bias. Keys are the rows of the products, which warps
    divide among them: nothing is reduced over keys but in the last product.
    """
    BLOCK_M: tl.constexpr = TZ * TY * TX
    BLOCK_N: tl.constexpr = KEYS
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    g_z, first_z, size_z = _axis(tile // (down * across), Z, DZ, TZ)
    g_y, first_y, size_y = _axis(tile // across % down, Y, DY, TY)
    g_x, first_x, size_x = _axis(tile % across, X, DX, TX)
    if (first_z >= size_z) | (first_y >= size_y) | (first_x >= size_x):
        return
    m_z, m_y, m_x = _split(tl.arange(0, BLOCK_M), TY, TX)
    p_z, p_y, p_x = first_z + m_z, first_y + m_y, first_x + m_x
    real = (p_z < size_z) & (p_y < size_y) & (p_x < size_x)
    pixel_q = _pixel(p_z, p_y, p_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    c_z, end_z = _union(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
    c_y, end_y = _union(first_y, size_y, TY, KY, SY, CAUSAL_Y)
    c_x, end_x = _union(first_x, size_x, TX, KX, SX, CAUSAL_X)
    if HAS_BIAS:
        bias = _bias_of(bias, head, KZ, KY, KX)
    pixel_k, added = _met(
        bias, p_z, p_y, p_x, c_z, c_y, c_x, end_z, end_y, end_x, size_z, size_y, size_x, g_z, g_y, g_x,
        Y, X, DZ, DY, DX, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X, HAS_BIAS, ASSEMBLY, True,
        TZ * KZ == 1, 0, KEYS,
    )  # fmt: skip
    factor = tl.cast(scale, tl.float32)
    if BIAS_GRADIENT:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    for number in tl.range(tl.program_id(1), images, tl.num_programs(1), num_stages=STAGES):
        image = tl.cast(number, tl.int64)
        inward = image * Z * Y * X * PITCH + head * D
        outward = image * Z * Y * X * (HEADS * D) + head * D
        statistics = (image * HEADS + head) * Z * Y * X + pixel_q
        incoming = _vectors(grad_out + outward, pixel_q, HEADS * D, D, BLOCK_D)
        result = _vectors(out + outward, pixel_q, HEADS * D, D, BLOCK_D)
        query = _vectors(q + inward, pixel_q, PITCH, D, BLOCK_D)
        keys = _vectors(k + inward, pixel_k, PITCH, D, BLOCK_D)
        values = _vectors(v + inward, pixel_k, PITCH, D, BLOCK_D)
        lse_q = tl.load(lse + statistics)
        delta_q = tl.sum(result.to(tl.float32) * incoming.to(tl.float32), 1)
        tl.store(delta + statistics, delta_q, mask=real)
        logits = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * factor + added
        p = tl.exp2(logits * LOG2E - lse_q[None, :])
        dp = tl.dot(values, tl.trans(incoming), input_precision=PRECISION)
        ds = p * (dp - delta_q[None, :])
        if BIAS_GRADIENT:
            total += ds
        gradient = tl.dot(tl.trans(ds.to(keys.dtype)), keys, input_precision=PRECISION) * factor
        _put_vectors(grad_q + inward, gradient, pixel_q, real, PITCH, D, BLOCK_D)
    if BIAS_GRADIENT:
        place = (tl.program_id(1) * HEADS + head) * tiles + tile
        rows = place.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(parts + rows[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], total)


@triton.jit(do_not_specialize=["tiles", "down", "across"])
def whole_fold_bias(
    total,  # (HEADS, tiles, BLOCK_N, BLOCK_M) float32
    grad_bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1)
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (entry of the bias, head): the sum over all queries of all tiles; each has one key at that offset."""
    BLOCK_M: tl.constexpr = TZ * TY * TX
    entry, head = tl.program_id(0), tl.program_id(1)
    offset_z, offset_y, offset_x = _split(entry, 2 * KY - 1, 2 * KX - 1)
    m = tl.arange(0, BLOCK_M)[None, :]
    m_z, m_y, m_x = _split(m, TY, TX)
    value = tl.zeros((AT_ONCE, BLOCK_M), tl.float32)
    for begin in tl.range(0, tiles, AT_ONCE, num_stages=1):
        tile = begin + tl.arange(0, AT_ONCE)[:, None]
        _, first_z, size_z = _axis(tile // (down * across), Z, DZ, TZ)
        _, first_y, size_y = _axis(tile // across % down, Y, DY, TY)
        _, first_x, size_x = _axis(tile % across, X, DX, TX)
        c_z, end_z = _union(first_z, size_z, TZ, KZ, 1, CAUSAL_Z)
        c_y, end_y = _union(first_y, size_y, TY, KY, 1, CAUSAL_Y)
        c_x, end_x = _union(first_x, size_x, TX, KX, 1, CAUSAL_X)
        n_z = first_z + m_z + offset_z - (KZ - 1) - c_z
        n_y = first_y + m_y + offset_y - (KY - 1) - c_y
        n_x = first_x + m_x + offset_x - (KX - 1) - c_x
        # Tiles behind the end of a shorter group have written nothing.
        inside = (tile < tiles) & (first_z < size_z) & (first_y < size_y) & (first_x < size_x)
        inside &= (n_z >= 0) & (n_y >= 0) & (n_x >= 0)
        inside &= (n_z < end_z - c_z) & (n_y < end_y - c_y) & (n_x < end_x - c_x)
        n = (n_z * (end_y - c_y) + n_y) * (end_x - c_x) + n_x
        row = ((head * tiles + tile) * KEYS + n).to(tl.int64)
        value += tl.load(total + row * BLOCK_M + m, mask=inside, other=0.0)
    tl.store(grad_bias + head * tl.num_programs(0) + entry, tl.sum(tl.sum(value, 1), 0).to(grad_bias.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles", "down", "across"])
def backward_queries(
    grad_out,  # (B, Z, Y, X, HEADS, D)
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    out,  # (B, Z, Y, X, HEADS, D)
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    delta,  # (B, HEADS, Z, Y, X) float32, written here: sum of out * grad_out
    grad_q,  # like q
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, from blocks of the keys that they see."""
    BLOCK_M: tl.constexpr = TZ * TY * TX
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    image, head, tile_z, tile_y, tile_x = _program(tiles, down, across, HEADS)
    g_z, first_z, size_z = _axis(tile_z, Z, DZ, TZ)
    g_y, first_y, size_y = _axis(tile_y, Y, DY, TY)
    g_x, first_x, size_x = _axis(tile_x, X, DX, TX)
    if (first_z >= size_z) | (first_y >= size_y) | (first_x >= size_x):
        return
    m_z, m_y, m_x = _split(tl.arange(0, BLOCK_M), TY, TX)
    p_z, p_y, p_x = first_z + m_z, first_y + m_y, first_x + m_x
    real = (p_z < size_z) & (p_y < size_y) & (p_x < size_x)
    pixel_q = _pixel(p_z, p_y, p_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    inward = image * Z * Y * X * PITCH + head * D
    outward = image * Z * Y * X * (HEADS * D) + head * D
    statistics = (image * HEADS + head) * Z * Y * X + pixel_q
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    query = _vectors(q + inward, pixel_q, PITCH, D, BLOCK_D)
    incoming = _vectors(grad_out + outward, pixel_q, HEADS * D, D, BLOCK_D)
    result = _vectors(out + outward, pixel_q, HEADS * D, D, BLOCK_D)
    lse_q = tl.load(lse + statistics)
    delta_q = tl.sum(result.to(tl.float32) * incoming.to(tl.float32), 1)
    tl.store(delta + statistics, delta_q, mask=real)
    factor = tl.cast(scale, tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    n_z, n_y, n_x = _split(tl.arange(0, CZ * CY * CX), CY, CX)
    entry_k = _entry(n_z, n_y, n_x, KY, KX)
    start_z, end_z = _union(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
    start_y, end_y = _union(first_y, size_y, TY, KY, SY, CAUSAL_Y)
    start_x, end_x = _union(first_x, size_x, TX, KX, SX, CAUSAL_X)
    blocks = tl.cdiv(end_z - start_z, CZ) * tl.cdiv(end_y - start_y, CY) * tl.cdiv(end_x - start_x, CX)
    c_z, c_y, c_x = start_z, start_y, start_x
    if HAS_BIAS:
        bias = _bias_of(bias, head, KZ, KY, KX) + _entry(c_z - p_z, c_y - p_y, c_x - p_x, KY, KX)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        j_z, j_y, j_x = c_z + n_z, c_y + n_y, c_x + n_x
        pixel = _pixel(j_z, j_y, j_x, end_z, end_y, end_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
        keys = _vectors(k + inward, pixel, PITCH, D, BLOCK_D)
        values = _vectors(v + inward, pixel, PITCH, D, BLOCK_D)
        visible = _visible(
            p_z[:, None], p_y[:, None], p_x[:, None], j_z[None, :], j_y[None, :], j_x[None, :],
            size_z, size_y, size_x, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X,
            TZ * CZ > 1, TY * CY > 1, TX * CX > 1,
        )  # fmt: skip
        added = _added(bias, entry_k, visible, HAS_BIAS, ASSEMBLY)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor + added
        p = tl.exp2(logits * LOG2E - lse_q[:, None])
        ds = p * (tl.dot(incoming, tl.trans(values), input_precision=PRECISION) - delta_q[:, None])
        gradient = tl.dot(ds.to(keys.dtype), keys, gradient, input_precision=PRECISION)
        before = _entry(c_z, c_y, c_x, KY, KX)
        c_z, c_y, c_x = _next(c_z, c_y, c_x, start_y, start_x, end_y, end_x, CZ, CY, CX)
        if HAS_BIAS:
            bias += _entry(c_z, c_y, c_x, KY, KX) - before
    _put_vectors(grad_q + inward, gradient * factor, pixel_q, real, PITCH, D, BLOCK_D)


@triton.jit(do_not_specialize=["tiles", "down", "across"])
def backward_keys(
    grad_out,  # (B, Z, Y, X, HEADS, D)
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    delta,  # (B, HEADS, Z, Y, X) float32
    grad_k,  # like k; if PACKED like q
    grad_v,  # like v; unused if PACKED
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, from blocks of the queries that see them."""
    BLOCK_N: tl.constexpr = TZ * TY * TX
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    image, head, tile_z, tile_y, tile_x = _program(tiles, down, across, HEADS)
    g_z, first_z, size_z = _axis(tile_z, Z, DZ, TZ)
    g_y, first_y, size_y = _axis(tile_y, Y, DY, TY)
    g_x, first_x, size_x = _axis(tile_x, X, DX, TX)
    if (first_z >= size_z) | (first_y >= size_y) | (first_x >= size_x):
        return
    n_z, n_y, n_x = _split(tl.arange(0, BLOCK_N), TY, TX)
    j_z, j_y, j_x = first_z + n_z, first_y + n_y, first_x + n_x
    real = (j_z < size_z) & (j_y < size_y) & (j_x < size_x)
    pixel_k = _pixel(j_z, j_y, j_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
    inward = image * Z * Y * X * PITCH + head * D
    outward = image * Z * Y * X * (HEADS * D) + head * D
    statistics = (image * HEADS + head) * Z * Y * X
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
        grad_v = grad_k + 2 * HEADS * D
        grad_k += HEADS * D
    keys = _vectors(k + inward, pixel_k, PITCH, D, BLOCK_D)
    values = _vectors(v + inward, pixel_k, PITCH, D, BLOCK_D)
    factor = tl.cast(scale, tl.float32)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    m_z, m_y, m_x = _split(tl.arange(0, CZ * CY * CX), CY, CX)
    entry_k = _entry(n_z, n_y, n_x, KY, KX)
    start_z, end_z = _seers(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
    start_y, end_y = _seers(first_y, size_y, TY, KY, SY, CAUSAL_Y)
    start_x, end_x = _seers(first_x, size_x, TX, KX, SX, CAUSAL_X)
    # With strides there may be keys that nobody sees.
    rows, columns = tl.maximum(end_y - start_y, 0), tl.maximum(end_x - start_x, 0)
    blocks = tl.cdiv(tl.maximum(end_z - start_z, 0), CZ) * tl.cdiv(rows, CY) * tl.cdiv(columns, CX)
    c_z, c_y, c_x = start_z, start_y, start_x
    if HAS_BIAS:
        bias = _bias_of(bias, head, KZ, KY, KX)
        bias += _entry(first_z - c_z - m_z, first_y - c_y - m_y, first_x - c_x - m_x, KY, KX)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        p_z, p_y, p_x = c_z + m_z, c_y + m_y, c_x + m_x
        pixel = _pixel(p_z, p_y, p_x, end_z, end_y, end_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
        query = _vectors(q + inward, pixel, PITCH, D, BLOCK_D)
        incoming = _vectors(grad_out + outward, pixel, HEADS * D, D, BLOCK_D)
        lse_q = tl.load(lse + statistics + pixel)
        delta_q = tl.load(delta + statistics + pixel)
        visible = _visible(
            p_z[:, None], p_y[:, None], p_x[:, None], j_z[None, :], j_y[None, :], j_x[None, :],
            size_z, size_y, size_x, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X,
            TZ * CZ > 1, TY * CY > 1, TX * CX > 1,
        )  # fmt: skip
        added = _added(bias, entry_k, visible, HAS_BIAS, ASSEMBLY)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor + added
        p = tl.exp2(logits * LOG2E - lse_q[:, None])
        dv = tl.dot(tl.trans(p.to(incoming.dtype)), incoming, dv, input_precision=PRECISION)
        less = tl.broadcast_to(-delta_q[:, None], p.shape)
        ds = p * tl.dot(incoming, tl.trans(values), less, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(query.dtype)), query, dk, input_precision=PRECISION)
        before = _entry(c_z, c_y, c_x, KY, KX)
        c_z, c_y, c_x = _next(c_z, c_y, c_x, start_y, start_x, end_y, end_x, CZ, CY, CX)
        if HAS_BIAS:
            bias -= _entry(c_z, c_y, c_x, KY, KX) - before
    _put_vectors(grad_k + inward, dk * factor, pixel_k, real, PITCH, D, BLOCK_D)
    _put_vectors(grad_v + inward, dv, pixel_k, real, PITCH, D, BLOCK_D)


@triton.jit(do_not_specialize=["tiles", "down", "across", "images", "columns"])
def backward_bias(
    grad_out,  # (B, Z, Y, X, HEADS, D)
    q,  # (B, Z, Y, X, HEADS, D), or (B, Z, Y, X, 3, HEADS, D) if PACKED
    k,
    v,
    bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1) float32
    lse,  # (B, HEADS, Z, Y, X) float32, base 2
    delta,  # (B, HEADS, Z, Y, X) float32
    parts,  # (shares, HEADS, blocks, BLOCK_M, BLOCK_N) float32
    scale,
    Z, Y, X,
    DZ, DY, DX,
    tiles, down, across,
    images,
    columns,
    HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    STAGES: tl.constexpr,
    FROM_Z: tl.constexpr, FROM_Y: tl.constexpr, FROM_X: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (head, block; share): sum over tiles and images of the gradient of their logits with one block of keys.

    The block stands at the same place relative to each tile, FROM plus a multiple of its sides from the tile's first
    place, so that an element of the sum always belongs to the same entry of the bias. Shares take every `columns`-th
    tile, and of its images an equal part.
    """
    BLOCK_M: tl.constexpr = TZ * TY * TX
    BLOCK_N: tl.constexpr = CZ * CY * CX
    PITCH: tl.constexpr = (3 if PACKED else 1) * HEADS * D
    head = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS
    m_z, m_y, m_x = _split(tl.arange(0, BLOCK_M), TY, TX)
    n_z, n_y, n_x = _split(tl.arange(0, BLOCK_N), CY, CX)
    from_z = FROM_Z + block // (ROWS * COLUMNS) * CZ
    from_y = FROM_Y + block // COLUMNS % ROWS * CY
    from_x = FROM_X + block % COLUMNS * CX
    if PACKED:
        k = q + HEADS * D
        v = q + 2 * HEADS * D
    bias = _bias_of(bias, head, KZ, KY, KX) + _entry(from_z - m_z, from_y - m_y, from_x - m_x, KY, KX)
    entry_k = _entry(n_z, n_y, n_x, KY, KX)
    factor = tl.cast(scale, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(tl.program_id(1) % columns, tiles, columns, num_stages=1):
        g_z, first_z, size_z = _axis(tile // (down * across), Z, DZ, TZ)
        g_y, first_y, size_y = _axis(tile // across % down, Y, DY, TY)
        g_x, first_x, size_x = _axis(tile % across, X, DX, TX)
        c_z, c_y, c_x = first_z + from_z, first_y + from_y, first_x + from_x
        start_z, end_z = _union(first_z, size_z, TZ, KZ, SZ, CAUSAL_Z)
        start_y, end_y = _union(first_y, size_y, TY, KY, SY, CAUSAL_Y)
        start_x, end_x = _union(first_x, size_x, TX, KX, SX, CAUSAL_X)
        on_map = (first_z < size_z) & (first_y < size_y) & (first_x < size_x)
        met = (c_z < end_z) & (c_y < end_y) & (c_x < end_x)
        met &= (c_z + CZ > start_z) & (c_y + CY > start_y) & (c_x + CX > start_x)
        p_z, p_y, p_x = first_z + m_z, first_y + m_y, first_x + m_x
        j_z, j_y, j_x = c_z + n_z, c_y + n_y, c_x + n_x
        pixel_q = _pixel(p_z, p_y, p_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
        pixel_k = _pixel(j_z, j_y, j_x, size_z, size_y, size_x, g_z, g_y, g_x, Y, X, DZ, DY, DX)
        visible = _visible(
            p_z[:, None], p_y[:, None], p_x[:, None], j_z[None, :], j_y[None, :], j_x[None, :],
            size_z, size_y, size_x, KZ, KY, KX, SZ, SY, SX, CAUSAL_Z, CAUSAL_Y, CAUSAL_X, True, True, True,
        )  # fmt: skip
        added = _added(bias, entry_k, visible, True, ASSEMBLY)
        # Tiles that do not meet the block have no images.
        end = tl.where(on_map & met, images, 0)
        for number in tl.range(tl.program_id(1) // columns, end, tl.num_programs(1) // columns, num_stages=STAGES):
            image = tl.cast(number, tl.int64)
            inward = image * Z * Y * X * PITCH + head * D
            outward = image * Z * Y * X * (HEADS * D) + head * D
            statistics = (image * HEADS + head) * Z * Y * X + pixel_q
            query = _vectors(q + inward, pixel_q, PITCH, D, BLOCK_D)
            incoming = _vectors(grad_out + outward, pixel_q, HEADS * D, D, BLOCK_D)
            keys = _vectors(k + inward, pixel_k, PITCH, D, BLOCK_D)
            values = _vectors(v + inward, pixel_k, PITCH, D, BLOCK_D)
            lse_q = tl.load(lse + statistics)
            delta_q = tl.load(delta + statistics)
            logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor + added
            p = tl.exp2(logits * LOG2E - lse_q[:, None])
            total += p * (tl.dot(incoming, tl.trans(values), input_precision=PRECISION) - delta_q[:, None])
    place = (tl.program_id(1) * HEADS + head) * (tl.num_programs(0) // HEADS) + block
    rows = place.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(parts + rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], total)


@triton.jit
def fold_bias(
    total,  # (HEADS, blocks, BLOCK_M, BLOCK_N) float32
    grad_bias,  # (HEADS, 2 KZ - 1, 2 KY - 1, 2 KX - 1)
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    FROM_Z: tl.constexpr, FROM_Y: tl.constexpr, FROM_X: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (entry of the bias, head): the sum over the queries of a tile; each has one key at that offset."""
    BLOCK_M: tl.constexpr = TZ * TY * TX
    BLOCK_N: tl.constexpr = CZ * CY * CX
    entry, head = tl.program_id(0), tl.program_id(1)
    offset_z, offset_y, offset_x = _split(entry, 2 * KY - 1, 2 * KX - 1)
    m = tl.arange(0, BLOCK_M)
    m_z, m_y, m_x = _split(m, TY, TX)
    j_z = m_z + offset_z - (KZ - 1 + FROM_Z)
    j_y = m_y + offset_y - (KY - 1 + FROM_Y)
    j_x = m_x + offset_x - (KX - 1 + FROM_X)
    inside = (j_z >= 0) & (j_y >= 0) & (j_x >= 0)
    inside &= (j_z < PLANES * CZ) & (j_y < ROWS * CY) & (j_x < COLUMNS * CX)
    block = (j_z // CZ * ROWS + j_y // CY) * COLUMNS + j_x // CX
    n = (j_z % CZ * CY + j_y % CY) * CX + j_x % CX
    pointers = total + ((head * (PLANES * ROWS * COLUMNS) + block) * BLOCK_M + m) * BLOCK_N + n
    value = tl.sum(tl.load(pointers, mask=inside, other=0.0), 0)
    tl.store(grad_bias + head * tl.num_programs(0) + entry, value.to(grad_bias.dtype.element_ty))
