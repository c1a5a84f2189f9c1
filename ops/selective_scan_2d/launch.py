"""Allocates what the kernels of the selective scan over routes write and launches them. Imports triton."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vizoo.ops import gpu
from vizoo.ops.registration import launchable, register_flops
from vizoo.ops.tracing import known

from . import kernels, tiles
from .function import FLOPS, Arguments
from .routes import COLUMNS, CONTINUOUS, REVERSE, Route

register_flops(FLOPS)

DIRECTIONS = 5


class _Map(NamedTuple):
    """A map as kernels read it: its pixels at equal distances, the numbers of a pixel (and route) side by side."""

    data: Tensor
    image: int
    pixel: int
    route: int = 0

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.image, self.pixel, self.route) if self.data.ndim == 5 else (self.image, self.pixel)


def _pitched(tensor: Tensor) -> _Map:
    """The tensor itself where kernels can read it, else a copy."""
    row, pixel, *route, last = tensor.stride()[1:]
    side_by_side = known(last == 1) or known(tensor.shape[-1] == 1)
    if side_by_side and known(row == tensor.shape[2] * pixel):
        return _Map(tensor, tensor.stride(0), pixel, *route)
    return _packed(tensor)


def _packed(tensor: Tensor) -> _Map:
    """All numbers of the tensor side by side."""
    _, H, W, *_, n = tensor.shape
    pixel = n * tensor.shape[3] if tensor.ndim == 5 else n
    return _Map(tensor.contiguous(), H * W * pixel, pixel, *((n,) if tensor.ndim == 5 else ()))


class _Call:
    """What all kernels of one call share, worked out once."""

    def __init__(self, arguments: Arguments) -> None:
        x, delta, A, B, C, D, weight, bias, direction_B, codes, softplus, routed, _ = arguments
        self.codes = [int(code) for code in codes]
        self.x, self.delta = _pitched(x), _pitched(delta)
        self.B, self.C = _pitched(B), _pitched(C)
        if not all(known(b == c) for b, c in zip(self.B.strides, self.C.strides, strict=True)):
            self.B, self.C = _packed(B), _packed(C)
        self.A, self.D, self.weight, self.bias, self.direction_B = (
            None if tensor is None else tensor.contiguous() for tensor in (A, D, weight, bias, direction_B)
        )
        self.images, self.H, self.W, self.d = x.shape
        self.N, self.K = int(A.shape[-1]), len(self.codes)
        self.R = 0 if weight is None else int(weight.shape[-1])
        self.summed = self.R if tiles.summed_within(self.R, self.N) else 0
        self.states = tiles.states(int(self.d))
        self.tiles = tiles.count(self.H, self.W, self.states.tokens)
        self.constants = {
            "K": self.K,
            "N": self.N,
            "R": self.R,
            "RP": tiles.power_of_two(max(1, self.R)),
            "T": self.states.tokens,
            "WHOLE_TILES": int(self.H) * int(self.W) % self.states.tokens == 0,
            "SOFTPLUS": softplus,
            "ROUTED": routed,
            "num_warps": 1,
            "num_stages": 1,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.H, self.W, self.d, self.tiles

    def blocks(self, tile: tiles.Tile) -> int:
        return -(-self.d // tile.channels)

    def block(self, tile: tiles.Tile) -> dict[str, Any]:
        """Channels of a block, and whether such blocks are all there is."""
        return {"C": tile.channels, "WHOLE": int(self.d) % tile.channels == 0}

    def programs(self, tile: tiles.Tile) -> int:
        """Programs for each block of channels, of the kernels that take tiles in turn."""
        enough = tile.per_sm * gpu.multiprocessors(self.x.data.device) // self.blocks(tile)
        return min(self.images * self.tiles, max(1, enough))

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """Launches: a route, its reverse (-1 where there is none), and the code of their order."""
        for order in dict.fromkeys(code & ~REVERSE for code in self.codes):
            forth = [k for k, code in enumerate(self.codes) if code == order]
            back = [k for k, code in enumerate(self.codes) if code == order | REVERSE]
            for a, b in zip_longest(forth, back, fillvalue=-1):
                yield a, b, order


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The merged map, and the states before tiles."""
    call, dtype = _Call(arguments), arguments[-1]
    x = call.x.data
    out = x.new_empty(x.shape, dtype=dtype)
    tile = tiles.walks(int(call.d))
    if tiles.walked(call.images * call.blocks(tile), call.N, gpu.multiprocessors(x.device)):
        return out, _walks(call, tile, out)
    with gpu.on(x.device):
        states = _states(call, call.x, call.B, call.direction_B, adjoint=False)
        groups = list(call.groups())
        # Halves would be rounded once for each launch.
        between = out if dtype == torch.float32 or len(groups) == 1 else torch.empty_like(out, dtype=torch.float32)
        for place, group in enumerate(groups):
            into = out if place == len(groups) - 1 else between
            _outputs(call, states, between if place else None, into, group)
    return out, states


def _walks(call: _Call, tile: tiles.Tile, out: Tensor) -> Tensor:
    """Writes the merged map, and gives the states before tiles."""
    states = out.new_empty((call.images, call.K, call.tiles, call.N, call.d), dtype=torch.float32)
    between = None
    if out.dtype != torch.float32 and call.K > 1:
        between = torch.empty_like(out, dtype=torch.float32)
    codes = sum(code << 3 * k for k, code in enumerate(call.codes))
    constants = {name: value for name, value in call.constants.items() if name != "N"}
    with gpu.on(out.device):
        launchable(kernels.walks)[(call.images * call.blocks(tile),)](
            call.x.data, call.delta.data, call.weight, call.bias, call.A, call.B.data, call.C.data, call.D,
            call.direction_B, states, between, out,
            *call.sizes, *call.x.strides, *call.delta.strides, *call.B.strides,
            CODES=codes, **call.block(tile), **constants,
        )  # fmt: skip
    return states


def _states(call: _Call, x: _Map, B: _Map, direction_B: Tensor | None, adjoint: bool) -> Tensor:
    """States before tiles, (B, K, tiles, N, d), or with `adjoint` those of their gradients."""
    device, tile = x.data.device, call.states
    out = x.data.new_empty((call.images, call.K, call.tiles, call.N, call.d), dtype=torch.float32)
    if not call.images:
        return out
    sequences = call.images * call.K * call.N * call.blocks(tile)
    segments = tiles.segments(sequences, call.tiles, tile.per_sm * gpu.multiprocessors(device))
    ends: tuple[Tensor | None, Tensor | None] = None, None
    if segments > 1:
        shape = (call.images, call.K, segments, call.N, call.d)
        ends = x.data.new_empty(shape, dtype=torch.float32), x.data.new_empty(shape, dtype=torch.float32)
    codes = sum(code << 3 * k for k, code in enumerate(call.codes))
    for aggregate in (True, False) if segments > 1 else (False,):
        launchable(kernels.states)[(sequences * segments,)](
            x.data, call.delta.data, call.weight, call.bias, call.A, B.data, direction_B, *ends, out,
            *call.sizes, segments, *x.strides, *call.delta.strides, *B.strides,
            CODES=codes, ADJOINT=adjoint, AGGREGATE=aggregate,
            **call.block(tile), **call.constants,
        )  # fmt: skip
    return out


def _outputs(call: _Call, states: Tensor, earlier: Tensor | None, out: Tensor, group: tuple[int, int, int]) -> None:
    tile = tiles.outputs(int(call.d))
    if not call.images:
        return
    forth, back, order = group
    launchable(kernels.outputs)[(call.programs(tile) * call.blocks(tile),)](
        call.x.data, call.delta.data, call.weight, call.bias, call.A, call.B.data, call.C.data, call.D,
        call.direction_B, states, earlier, out,
        *call.sizes, call.images, *call.x.strides, *call.delta.strides, *call.B.strides,
        FORTH=forth, BACK=back, COLUMNS=order & COLUMNS != 0, CONTINUOUS=order & CONTINUOUS != 0,
        **call.block(tile), **call.constants,
    )  # fmt: skip


def backward(grad_out: Tensor, states: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of all tensors in their order; empty for those that there are not."""
    call = _Call(arguments)
    x, grad_out = call.x.data, grad_out.contiguous()
    tile = tiles.gradients(int(call.d))
    programs, blocks, M = call.programs(tile), call.blocks(tile), call.summed + 2 * call.N
    pixels = (call.images, call.H, call.W)
    grad_x = x.new_empty(x.shape)
    grad_delta, delta = None, arguments[1]
    if call.weight is None:
        grad_delta = delta.new_empty((*pixels, call.K, call.d))
    elif not call.summed:
        grad_delta = delta.new_empty((call.K, *pixels, call.d), dtype=_factors(delta, call.weight))
    token_parts = x.new_empty((blocks, *pixels, call.K, M), dtype=torch.float32)
    parameter_parts = x.new_empty((programs, call.K, call.d, call.summed + call.N + 2), dtype=torch.float32)
    with gpu.on(x.device):
        adjoints = _states(call, _pitched(grad_out), call.C, None, adjoint=True)
        groups = list(call.groups())
        # Halves would be rounded once for each route.
        half = x.dtype != torch.float32
        sums = torch.empty_like(grad_x, dtype=torch.float32) if half else grad_x
        for place, group in enumerate(groups):
            last = half and place == len(groups) - 1
            _gradients(
                call, tile, grad_out, states, adjoints, sums if place else None, sums if last else None,
                grad_x if last else sums, grad_delta, token_parts, parameter_parts, group,
            )  # fmt: skip
    return _assembled(call, arguments, grad_x, grad_delta, token_parts.sum(0), parameter_parts.sum(0))


def _gradients(
    call: _Call,
    tile: tiles.Tile,
    grad_out: Tensor,
    states: Tensor,
    adjoints: Tensor,
    earlier: Tensor | None,
    between: Tensor | None,
    grad_x: Tensor,
    grad_delta: Tensor | None,
    token_parts: Tensor,
    parameter_parts: Tensor,
    group: tuple[int, int, int],
) -> None:
    if not call.images:
        return
    forth, back, order = group
    weight = call.weight

    def precision(*tensors: Tensor | None) -> str:
        """Factors cut to 11 bits, which no rounding is, are exact enough for a bfloat16 but not for a float16."""
        exact = any(tensor is not None and tensor.dtype != torch.bfloat16 for tensor in tensors)
        return gpu.exact_products() if exact else "tf32"

    launchable(kernels.gradients)[(call.programs(tile) * call.blocks(tile),)](
        grad_out, call.x.data, call.delta.data, weight, call.bias, call.A, call.B.data, call.C.data, call.D,
        call.direction_B, states, adjoints, earlier, between, grad_x, grad_delta, token_parts, parameter_parts,
        *call.sizes, call.images, *call.x.strides, *call.delta.strides, *call.B.strides,
        FORTH=forth, BACK=back, COLUMNS=order & COLUMNS != 0, CONTINUOUS=order & CONTINUOUS != 0,
        NP=tiles.power_of_two(call.N, 1), S=call.summed, MP=tiles.power_of_two(call.summed + 2 * call.N),
        **call.block(tile), TOKEN_PRECISION=precision(call.delta.data, call.B.data, call.C.data),
        WEIGHT_PRECISION=precision(weight), **call.constants,
    )  # fmt: skip


def _assembled(
    call: _Call,
    arguments: Arguments,
    grad_x: Tensor,
    grad_delta: Tensor | None,
    tokens: Tensor,
    parameters: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients in the order and dtypes of their tensors from sums over channels, and from those over tokens."""
    _, delta, A, B, C, D, weight, bias, direction_B, *_ = arguments
    S, N = call.summed, call.N

    def part(tensor: Tensor | None, total: Tensor) -> Tensor:
        return grad_x.new_empty(0) if tensor is None else total.to(tensor.dtype, copy=True)

    by_weight = parameters[..., :S]
    if grad_delta is None:
        by_delta = part(delta, tokens[..., :S])
    elif weight is None:
        by_delta = grad_delta
    else:
        by_delta, by_weight = _projected(grad_delta, delta, weight)
    by_direction = None if direction_B is None else _by_direction(call, tokens[..., S : S + N], arguments[-2])
    return (
        grad_x,
        by_delta,
        part(A, parameters[..., S + 1 : S + 1 + N]),
        part(B, tokens[..., S : S + N]),
        part(C, tokens[..., S + N :]),
        part(D, parameters[..., S + 1 + N]),
        part(weight, by_weight),
        part(bias, parameters[..., S]),
        part(direction_B, tokens if by_direction is None else by_direction),
    )


def _factors(delta: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype in which gradients of steps are multiplied: only bfloat16 has the range for them, and only it is exact
    enough if all else is."""
    return torch.bfloat16 if delta.dtype == weight.dtype == torch.bfloat16 else torch.float32


def _projected(grad_steps: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what steps are projected from, and of the weights, (K, d, R), from those of steps, (K, B, H, W, d).

    The sum over tokens is taken image by image, which gives matrix units more to do at a time.
    """
    K, images, H, W, d = grad_steps.shape
    R = weight.shape[-1]
    numbers = delta.to(grad_steps.dtype).permute(3, 0, 1, 2, 4).reshape(K * images, H * W, R)
    by_delta = torch.bmm(grad_steps.flatten(1, 3), weight.to(grad_steps.dtype)).view(K, images, H, W, R)
    by_weight = torch.bmm(grad_steps.view(K * images, H * W, d).mT, numbers).view(K, images, d, R)
    by_delta = delta.new_empty(delta.shape).copy_(by_delta.permute(1, 2, 3, 0, 4))
    return by_delta, by_weight.sum(1, dtype=torch.float32)


def _by_direction(call: _Call, grad_B: Tensor, routed: bool) -> Tensor:
    """Gradient of B, (B, H, W, K, N), summed by the directions of the steps: (5, N)."""
    grad_B = grad_B.sum(0).flatten(0, 1)  # (L, K, N)
    total = grad_B.new_zeros(DIRECTIONS, call.N)
    for k, code in enumerate(call.codes):
        route = Route.of(code)
        direction = route.directions(call.H, call.W, grad_B.device)
        if routed:
            direction = direction[route.pixels(call.H, call.W, grad_B.device).argsort()]
        chosen = direction == torch.arange(DIRECTIONS, device=grad_B.device)[:, None]
        total = total + chosen.to(grad_B.dtype) @ grad_B[:, k]
    return total
