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


def whole_choices(kind: str, sizes: Sides, kernel: Sides, d: int, quick: bool) -> Iterator[Tile]:
    """Tiles of 16 and 32 queries whose keys fit a block, or two; only the best by the estimate if quick."""
    for volume in (16, 32):
        found: dict[Tile, float] = {}
        for tile in boxes(volume):
            for keys, more in tiles.covers(tiles.reach(tile, sizes, kernel)):
                forward = kind == "whole forward" and volume == 32
                turns = forward and tiles.turnable(tile, sizes, kernel, keys + more)
                choice = Tile(tile, (1, 1, 1), warps=2, stages=3, keys=keys, more=more, turns=turns)
                if keys + more <= 160 and not (more and not forward):
                    waste = tiles._waste(tile, sizes, turns)
                    found[choice] = waste * (keys + more) * (1 + tiles.KEY_COST * d / volume)
        best = sorted(found, key=lambda choice: (found[choice], max(choice.tile)))
        for choice in best[:1] if quick else best:
            keys = choice.keys + choice.more
            yield from (replace(choice, **launch) for launch in whole_launches(kind, volume, keys, quick))


def whole_launches(kind: str, volume: int, keys: int, quick: bool) -> Iterator[dict[str, Any]]:
    """In the forward pass a warp has 16 queries, in the backward pass warps divide the keys.

    Registers bound to 200 let five programs of two warps run at a time; to 168, six; to 128, eight, or four of four
    warps.
    """
    if kind == "whole queries":
        if quick and volume == 16:
            places = ((3, 0), (4, 0), (4, 128), (8, 128))
            yield from ({"warps": 4, "per_sm": per_sm, "registers": registers} for per_sm, registers in places)
        elif not quick:
            choices = itertools.product((2, 4, 8), (1, 2, 3), (2, 3, 4, 6, 8), (0, 128))
            names = "warps", "stages", "per_sm", "registers"
            yield from (dict(zip(names, choice, strict=True)) for choice in choices)
        return
    if quick and volume == 32:
        bounds = ((8, 0), (8, 128)) if keys <= 64 else ((4, 0), (5, 200), (10, 200), (6, 168))
        for stages, (per_sm, registers) in itertools.product((2, 3), bounds):
            yield {"warps": 2, "per_sm": per_sm, "stages": stages, "registers": registers}
    elif not quick:
        stacks, most = (1,) if volume == 32 else (2, 4), 128 if keys <= 64 else 200
        for stack, stages, per_sm in itertools.product(stacks, (1, 2, 3, 4), (2, 3, 4, 5, 6, 8)):
            chosen = {"warps": stack * volume // 16, "per_sm": per_sm, "stages": stages, "stack": stack}
            yield from ({**chosen, "registers": registers} for registers in ((0, most) if stack == 1 else (0,)))


def tiled_choices(kind: str, sizes: Sides, kernel: Sides, d: int, quick: bool) -> Iterator[Tile]:
    """Tiles and blocks whose estimate is within half of the best of their volume."""
    narrow = quick and kind == "keys"
    volumes = (
        itertools.product((32,), (32, 64)) if narrow else ((64, 64),) if quick else itertools.product(PLACES, PLACES)
    )
    for queries, keys in volumes:
        shapes = {
            shape: tiles._cost(*shape, sizes, kernel, d) for shape in itertools.product(boxes(queries), boxes(keys))
        }
        best = min(shapes.values())
        near = sorted(
            (shape for shape in shapes if shapes[shape] <= 1.5 * best), key=lambda shape: (shapes[shape], -shape[1][2])
        )
        for tile, block in near[: 1 if narrow else 3]:
            for warps, stages in itertools.product((1,) if narrow else (4,) if quick else (1, 2, 4, 8), (1, 2, 3)):
                if warps <= max(1, queries // 16):
                    choice = Tile(tile, block, warps, stages)
                    yield from (replace(choice, per_sm=n) for n in ((2, 4, 8) if kind == "bias" else (4,)))
                    if kind == "keys" and warps == 1:  # twelve programs at a time instead of eight
                        yield replace(choice, registers=168)


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
    choices = whole_choices(kind, sizes, side, d, quick) if whole else tiled_choices(kind, sizes, side, d, quick)
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
