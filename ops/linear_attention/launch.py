"""Allocates what the kernels of linear attention write and launches them. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops
from vizoo.ops.tracing import known

from . import kernels, tiles
from .function import FLOPS, FLOW, MEAN, output_shape, sizes

register_flops(FLOPS)


class _Call:
    """What all kernels of one call share, worked out once: small models in eager mode are bound by the host."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        temperature: Tensor | None,
        position: Tensor | None,
        local: Tensor | None,
        H: int,
        W: int,
        rule: int,
        number: float,
        floored: bool,
    ) -> None:
        # Kernels are compiled for these, so a tracer has to settle on them; batch and tokens may stay of any number.
        self.B, self.N, *each = output_shape(q, v)
        self.heads, self.e = (int(size) for size in each)
        self.d, self.packed, self.rule, self.number = int(q.shape[-1]), v is None, rule, number
        if k is None or v is None:
            self.q = self.k = self.v = q if _is_dense(q, self.heads * self.d) else q.contiguous()
            self.strides = [(*self.q.stride()[:2], None)] * 3
        else:
            self.q, self.k, self.v = _dense(q), _dense(k), _dense(v)
            self.strides = [_strides(each) for each in (self.q, self.k, self.v)]
        self.temperature = None if temperature is None else temperature.contiguous()
        self.local = None if local is None else local.contiguous()
        self.position = None if position is None else _dense(position)
        self.position_strides = (0, 0) if self.position is None else self.position.stride()[:2]
        self.map = (H, W)
        self.size, self.grad_size, self.vectors = sizes(self.d, self.e, rule)
        self.pairs = self.B * self.heads
        self.processors = gpu.multiprocessors(q.device)
        self.itemsize = q.element_size()
        self.floored = {"FLOORED": floored}
        self.constants = {
            "HEADS": self.heads,
            "D": self.d,
            "E": self.e,
            "BLOCK_D": tiles.power_of_two(self.d),
            "BLOCK_E": tiles.power_of_two(self.e),
            "RULE": rule,
            "PACKED": self.packed,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",  # halves have but one precision
        }

    def chunks(self, tile: tiles.Tile) -> tuple[int, int]:
        """Number and length of the chunks that tokens are cut in."""
        length = tiles.chunk(self.N, self.pairs, tile.rows, self.processors)
        return -(-self.N // length), length

    def new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)


def forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    temperature: Tensor | None,
    position: Tensor | None,
    local: Tensor | None,
    H: int,
    W: int,
    rule: int,
    number: float,
    floored: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output; and in float32 the sums of each head, (B, heads, numbers), and its flows, (B, heads, vectors, d)."""
    call = _Call(q, k, v, temperature, position, local, H, W, rule, number, floored)
    out = q.new_empty((call.B, call.N, call.heads, call.e))
    flows = call.new(call.B, call.heads, call.vectors, call.d)
    if not out.numel():
        return out, torch.zeros_like(call.new(call.B, call.heads, call.size)), torch.zeros_like(flows)
    tile = tiles.outputs(call.d, call.e, call.itemsize, local is not None)
    with gpu.on(q.device):
        whole = call.chunks(tile)[0] == 1
        if whole:
            sums = call.new(call.B, call.heads, call.size)
            chunks, length = 1, call.N
        else:
            if rule == FLOW:
                first = _collected(call, 0)
                flows = torch.cat([first, _collected(call, 1, first=first)], 2)
            sums = _collected(call, 2, flows=flows)
            length = tiles.STRETCH
            chunks = -(-call.N // length)
        launchable(kernels.outputs)[(call.pairs * chunks,)](
            call.q, call.k, call.v, call.position, call.temperature, call.local, sums, flows, out,
            call.N, chunks, length, number, *call.map, *call.strides[0], *call.strides[1], *call.strides[2],
            *call.position_strides, ROWS=tile.rows, WHOLE=whole, **call.floored, **call.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, sums, flows


def backward(
    grad_out: Tensor,
    sums: Tensor,
    flows: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    temperature: Tensor | None,
    position: Tensor | None,
    local: Tensor | None,
    H: int,
    W: int,
    rule: int,
    number: float,
    floored: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs but for the options; None where there is no such input."""
    call = _Call(q, k, v, temperature, position, local, H, W, rule, number, floored)
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (None if each is None else each.new_empty(each.shape) for each in (k, v))
    if not grad_out.numel():
        others = (None if each is None else torch.zeros_like(each) for each in (temperature, position, local))
        return grad_q, grad_k, grad_v, *others
    grad_out = grad_out.contiguous()
    given, written = (grad_out, sums, flows), (grad_q if grad_k is None else grad_k, grad_v)
    grad_flows = None
    with gpu.on(q.device):
        grad_sums = _queried(call, 0, *given, None, grad_q)
        if rule == FLOW:
            grad_flows = _queried(call, 1, *given, _keyed(call, 0, *given, grad_sums, None, *written), grad_q)
        grad_local = _keyed(call, 1, *given, grad_sums, grad_flows, *written)
    by_position = grad_q[:, :, 1] if grad_k is None else grad_k
    return (
        grad_q,
        grad_k,
        grad_v,
        None if temperature is None else _by_temperature(call, sums, grad_sums).to(temperature.dtype),
        None if position is None else by_position.sum(0, dtype=torch.float32).to(position.dtype),
        None if local is None or grad_local is None else grad_local.view(local.shape).to(local.dtype),
    )


def _dense(x: Tensor) -> Tensor:
    """With numbers of the last axis side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_dense(qkv: Tensor, width: int) -> bool:
    """Whether all numbers of a token lie side by side."""
    return qkv.stride()[2:] == (width, qkv.shape[-1], 1)


def _strides(x: Tensor) -> tuple[int, int, int | None]:
    """Of images, tokens and heads; None for heads side by side: then a compiler knows how their vectors are aligned."""
    batch, token, head, _ = x.stride()
    return batch, token, None if known(head == x.shape[-1]) else head


def _total(parts: Tensor) -> Tensor:
    """The sum over chunks, by torch: one order, no atomics."""
    return parts.squeeze(1) if parts.shape[1] == 1 else parts.sum(1)


def _collected(call: _Call, step: int, first: Tensor | None = None, flows: Tensor | None = None) -> Tensor:
    """The first two flows (step 0), the last two (1), or the sums (2)."""
    tile = tiles.collect(call.d, call.e, call.itemsize)
    chunks, length = call.chunks(tile)
    shape = (call.size,) if step == 2 else (2, call.d)
    parts = call.new(call.B, chunks, call.heads, *shape)
    launchable(kernels.collect)[(call.pairs * chunks,)](
        call.q, call.k, call.v, call.position, first, flows, parts, call.N, chunks, length, call.number,
        *call.strides[0], *call.strides[1], *call.strides[2], *call.position_strides,
        ROWS=tile.rows, STEP=step, **call.constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _total(parts)


def _queried(
    call: _Call,
    step: int,
    grad_out: Tensor,
    sums: Tensor,
    flows: Tensor,
    grad_flows: Tensor | None,
    grad_q: Tensor,
) -> Tensor:
    """The gradient of the sums, or of the first flow (step 1 of flows). Writes that of queries, for flows in step 1."""
    tile = tiles.query_gradients(call.d, call.e, call.itemsize, call.rule == MEAN)
    chunks, length = call.chunks(tile)
    parts = call.new(call.B, chunks, call.heads, call.d if step else call.grad_size)
    launchable(kernels.query_gradients)[(call.pairs * chunks,)](
        grad_out, call.q, call.temperature, sums, flows, grad_flows, grad_q, parts, call.N, chunks, length, call.number,
        *call.strides[0], ROWS=tile.rows, STEP=step, **call.floored, **call.constants,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _total(parts)


def _keyed(
    call: _Call,
    step: int,
    grad_out: Tensor,
    sums: Tensor,
    flows: Tensor,
    grad_sums: Tensor,
    grad_flows: Tensor | None,
    grad_k: Tensor,
    grad_v: Tensor | None,
) -> Tensor | None:
    """The gradients of the fourth and second flow (step 0), or of local kernels. Writes those of keys and values.

    Without `grad_v` the first of both is that of queries, keys and values in one.
    """
    local = None if step == 0 else call.local
    tile = tiles.key_gradients(call.d, call.e, call.itemsize, call.rule == FLOW, local is not None)
    chunks, length = call.chunks(tile)
    parts = None
    if step == 0:
        parts = call.new(call.B, chunks, call.heads, 2, call.d)
    elif local is not None:
        parts = call.new(call.B, chunks, call.heads, 9 * call.e)
    launchable(kernels.key_gradients)[(call.pairs * chunks,)](
        grad_out, call.k, call.v, call.position, call.temperature, local, sums, flows, grad_sums, grad_flows,
        grad_k, grad_v, parts, call.N, chunks, length, call.number, *call.map,
        *call.strides[1], *call.strides[2], *call.position_strides,
        ROWS=tile.rows, STEP=step, **call.constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return None if parts is None else _total(parts)


def _by_temperature(call: _Call, sums: Tensor, grad_sums: Tensor) -> Tensor:
    """The output without temperature is linear in the state, and in the mean value: so is what temperature gets."""
    product, d, e = call.d * call.e, call.d, call.e
    state, behind = sums[..., :product].unflatten(-1, (d, e)), sums[..., product:]
    slope, slopes_behind = grad_sums[..., :product].unflatten(-1, (d, e)), grad_sums[..., product:]
    if call.rule == MEAN:
        keys, values = behind[..., :d] / call.N, behind[..., d:] / call.N
        state = (state / call.N - keys[..., :, None] * values[..., None, :]) * call.number
        return (slope * state).sum((0, 2, 3)) + (slopes_behind * values).sum((0, 2))
    if call.rule == FLOW:
        state = state * (call.N / behind[..., None])
    return (slope * state).sum((0, 2, 3))
