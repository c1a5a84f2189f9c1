"""Finds the launch parameters of `ops/neighborhood_attention/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_neighborhood_attention.py [--quick] [--shapes 0 1 2] [--kinds keys bias ...]

Each kernel is swept with the others as they are, those of the forward pass by its time, the others by that of the
backward pass; the `whole` kinds are the kernels whose blocks hold all keys. Beside each time stands what the estimate
in `tiles.py` says, which should rank them alike.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from operators.measuring import copy_bandwidth
from operators.neighborhood_attention import SHAPES
from vizoo.ops.neighborhood_attention import launch, tiles
from vizoo.ops.neighborhood_attention.tiles import Sides, Tile

KINDS = ("whole forward", "whole queries", "forward", "queries", "keys", "bias")
PLACES = (16, 32, 64, 128)
Runs = dict[str, Callable[[], Any]]


def runs(batch: int, space: tuple[int, int], heads: int, d: int, kernel: int, dilation: int) -> Runs:
    """The forward and the backward pass of one shape, without autograd around them."""
    query = torch.randn(batch, *space, 3, heads, d, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device="cuda")
    sizes: tuple[Any, ...] = (kernel,) * 2, (dilation,) * 2, (1, 1), (False, False), d**-0.5
    out, lse = launch.forward(query, None, None, bias, *sizes)
    incoming = torch.randn_like(out)

    def backward() -> tuple[Tensor | None, ...]:
        return launch.backward(incoming, query, None, None, bias, out, lse, *sizes, True)

    return {"forward": lambda: launch.forward(query, None, None, bias, *sizes), "backward": backward}


def boxes(volume: int) -> Iterator[Sides]:
    """Flat boxes of a volume whose sides are powers of two."""
    return ((1, 1 << i, volume >> i) for i in range(volume.bit_length()))


def whole_choices(kind: str, sizes: Sides, kernel: Sides, quick: bool) -> Iterator[Tile]:
    """Tiles of 16 and 32 queries whose windows fit a block."""
    for volume, stages in itertools.product((16, 32), (1, 2, 3)):
        for tile in boxes(volume):
            reach = (min(side + more - 1, size) for side, more, size in zip(tile, kernel, sizes, strict=True))
            block = _sides(1 << (n - 1).bit_length() for n in reach)
            if 16 <= math.prod(block) <= 128:
                launches = whole_launches(kind, volume, quick)
                yield from (Tile(tile, block, stages=stages, **launch) for launch in launches)


def whole_launches(kind: str, volume: int, quick: bool) -> Iterator[dict[str, Any]]:
    """In the forward pass a warp has 16 queries, in the backward pass warps divide the keys."""
    if kind == "whole queries":
        choices = itertools.product((2, 4, 8), (2, 3, 4) if quick else (1, 2, 3, 4, 6, 8))
        yield from ({"warps": warps, "per_sm": per_sm} for warps, per_sm in choices)
        return
    stacks = (1,) if volume == 32 else (2, 4)
    for stack, near, per_sm in itertools.product(stacks, (False, True), (2, 4) if quick else (2, 3, 4, 6, 8)):
        if stack > 1 or not near:
            yield {"warps": stack * volume // 16, "per_sm": per_sm, "stack": stack, "near": near}


def tiled_choices(kind: str, sizes: Sides, kernel: Sides, d: int, quick: bool) -> Iterator[Tile]:
    """Tiles and blocks whose estimate is within half of the best of their volume."""
    for queries, keys in itertools.product((64,) if quick else PLACES, (64,) if quick else PLACES):
        shapes = {
            shape: tiles._cost(*shape, sizes, kernel, d) for shape in itertools.product(boxes(queries), boxes(keys))
        }
        best = min(shapes.values())
        near = sorted((shape for shape in shapes if shapes[shape] <= 1.5 * best), key=lambda shape: shapes[shape])
        for tile, block in near[:3]:
            for warps, stages in itertools.product((4,) if quick else (1, 2, 4, 8), (1, 2, 3)):
                if warps <= max(1, queries // 16):
                    choice = Tile(tile, block, warps, stages)
                    yield from (replace(choice, per_sm=n) for n in ((2, 4, 8) if kind == "bias" else (4,)))


def _sides(values: Iterator[int]) -> Sides:
    z, y, x = values
    return z, y, x


def tried(run: Callable[[], Any], tile: Tile) -> Iterator[tuple[float, Tile]]:
    try:
        yield do_bench(run, warmup=10, rep=40, return_mode="median"), tile
    except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
        print(f"  {tile}: {type(error).__name__}: {str(error)[:100]}", flush=True)


def sweep(kind: str, shape: tuple[Any, ...], floor: float, quick: bool) -> None:
    """Prints the best launch parameters of one kernel at one shape, and leaves those in force that were."""
    _, space, _, d, kernel, dilation = shape
    sizes, side = _sides(iter((1, *(-(-length // dilation) for length in space)))), (1, kernel, kernel)
    run = runs(*shape)["forward" if kind.endswith("forward") else "backward"]
    before_whole, before_tiled = tiles.whole, tiles.tiled
    whole, pass_over = kind.startswith("whole"), kind.removeprefix("whole ")
    choices = whole_choices(kind, sizes, side, quick) if whole else tiled_choices(kind, sizes, side, d, quick)
    results: list[tuple[float, Tile]] = []
    for tile in choices:

        def tiled(other: str, *arguments: Any, tile: Tile = tile) -> Tile:
            return tile if other == kind else before_tiled(other, *arguments)

        def in_one(other: str, *arguments: Any, tile: Tile = tile) -> Tile | None:
            if other == pass_over:
                return tile if whole else None
            # The kernel for the bias alone runs only beside that for tiles of queries.
            return None if (kind, other) == ("bias", "queries") else before_whole(other, *arguments)

        tiles.tiled, tiles.whole = tiled, in_one
        results += tried(run, tile)
    tiles.whole, tiles.tiled = before_whole, before_tiled
    print(f"\n{kind}, {shape}, floor {floor:.4f} ms, {len(results)} tried", flush=True)
    for time, tile in sorted(results, key=itemgetter(0))[:8]:
        estimate = tiles._cost(tile.tile, tile.block, sizes, side, d)
        print(f"  {time:.4f} ms  {floor / time:6.1%}  estimate {estimate:6.0f}  {tile}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try fewer")
    parser.add_argument("--shapes", nargs="*", type=int, help=f"places in {list(SHAPES)}; default: all")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    shapes = list(SHAPES.values())
    for index in options.shapes if options.shapes is not None else range(len(shapes)):
        batch, space, heads, d, *_ = shape = shapes[index]
        part = 2 * batch * math.prod(space) * heads * d
        for kind in options.kinds:
            sweep(kind, shape, (4 if kind.endswith("forward") else 7) * part / bandwidth * 1e3, options.quick)


if __name__ == "__main__":
    main()
