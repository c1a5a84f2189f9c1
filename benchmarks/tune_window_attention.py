"""Finds the launch parameters of `ops/window_attention/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_window_attention.py [--quick] [--shapes 0 1 2]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.testing import do_bench

from operators.measuring import copy_bandwidth
from operators.window_attention import SHAPES, Shape, inputs
from vizoo.ops.window_attention import function, tiles
from vizoo.ops.window_attention.tiles import Tile

WHOLE_FORWARD = list(itertools.product((2, 4, 8), (1, 2, 3, 4), (2, 3, 4, 6, 8, 16)))
WHOLE_BACKWARD = list(itertools.product((2, 4, 8), (1, 2, 3), (1, 2, 3, 4, 6, 8)))
Trial = tuple[Tile, float]
"""Launch parameters, and the time in ms."""

TILED = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))


def runs(shape: Shape) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """The forward and the backward operator of one shape, without autograd around them."""
    tensors = {name: tensor.detach() for name, tensor in inputs(shape).items()}
    shared = tensors["qkv"], tensors["bias"], tensors.get("cosine_scale"), tensors["padding"]
    sizes = (shape.window,) * 2, (shape.shift,) * 2, shape.d**-0.5
    out, lse = function._forward(*shared, *sizes)
    kept = (out, lse) if lse.ndim > 1 else (None, None)
    incoming = torch.randn_like(out)
    return lambda: function._forward(*shared, *sizes), lambda: function._backward(
        incoming, *shared, *kept, *sizes, True, True
    )


def whole_tiles(shape: Shape, choices: list[tuple[int, int, int]]) -> Iterator[Tile]:
    side = tiles.power_of_two(shape.window**2)
    for warps, stages, per_sm in choices:
        yield Tile(side, side, warps, stages, per_sm)


def sweep(title: str, shape: Shape, part: float, bandwidth: float, trials: Iterator[Trial]) -> None:
    """Prints the best of the trials, and how near they come to moving `part` times the bytes of qkv."""
    floor = part * shape_bytes(shape) / bandwidth * 1e3
    ranked = sorted(trials, key=lambda trial: trial[1])
    print(f"\n{title}: {shape.name}, floor {floor:.4f} ms, {len(ranked)} tried", flush=True)
    for tile, time in ranked[:8]:
        print(f"  {time:.4f} ms  {floor / time:6.1%}  {tile}", flush=True)


def tried(run: Callable[[], object], tile: Tile) -> Iterator[Trial]:
    try:
        yield tile, do_bench(run, warmup=10, rep=50, return_mode="median")
    except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
        print(f"  {tile}: {type(error).__name__}: {str(error)[:120]}", flush=True)


def tune_whole(shape: Shape, bandwidth: float, quick: bool) -> None:
    forward, backward = runs(shape)
    every = 5 if quick else 1  # no axis has a multiple of 5 choices, so all are met

    def trials(run: Callable[[], object], choices: list[tuple[int, int, int]]) -> Iterator[Trial]:
        for tile in whole_tiles(shape, choices[::every]):
            tiles.whole = lambda *args, tile=tile, **kwargs: tile
            yield from tried(run, tile)

    sweep("whole forward", shape, 4 / 3, bandwidth, trials(forward, WHOLE_FORWARD))
    sweep("whole backward", shape, 7 / 3, bandwidth, trials(backward, WHOLE_BACKWARD))


def tune_tiled(shape: Shape, bandwidth: float, quick: bool) -> None:
    forward, backward = runs(shape)
    every = 5 if quick else 1  # no axis has a multiple of 5 choices, so all are met

    def trials(run: Callable[[], object]) -> Iterator[Trial]:
        for queries, keys, warps, stages in TILED[::every]:
            tile = Tile(queries, keys, warps, stages, per_sm=4)
            tiles.tiled = lambda *args, tile=tile, **kwargs: tile
            yield from tried(run, tile)

    sweep("tiled forward", shape, 4 / 3, bandwidth, trials(forward))
    sweep("tiled backward", shape, 7 / 3, bandwidth, trials(backward))


def shape_bytes(shape: Shape) -> int:
    return shape.batch * shape.map[0] * shape.map[1] * 3 * shape.heads * shape.d * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try a fifth of the choices")
    parser.add_argument("--shapes", nargs="*", type=int, help=f"places in {list(SHAPES)}; default: all")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    shapes = list(SHAPES.values())
    for index in options.shapes if options.shapes is not None else range(len(SHAPES)):
        shape = shapes[index]
        tune = tune_whole if tiles.is_whole(shape.window**2, shape.d, 2) else tune_tiled
        tune(shape, bandwidth, options.quick)


if __name__ == "__main__":
    main()
