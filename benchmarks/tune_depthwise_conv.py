"""Finds the launch parameters of `ops/depthwise_conv/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_depthwise_conv.py [--quick] [--dtypes bfloat16 float32] [--shapes 0 1 2 3] [--kernel 3]

Forward is swept alone, and then, with the best found, forward and backward together. Kernels for 3 x 3 filters take
strips; larger ones have tiles, and a kernel for the gradient of the weights in the place of that for both gradients.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.testing import do_bench

from vizoo.ops.depthwise_conv import launch, tiles
from vizoo.ops.depthwise_conv.tiles import Tile

SHAPES = [(128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768)]
PIXELS = ((2, 2), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16), (16, 4), (16, 8), (16, 16))
QUICK_PIXELS = ((2, 4), (4, 4), (4, 8), (8, 8), (16, 8))
CHANNELS = (16, 32, 64, 128)
WARPS = (2, 4, 8)
PER_SM = (2, 4, 8)
STRIP_ROWS = (4, 8, 16, 32, 64)
STRIP_COLUMNS = (4, 8, 16, 32)
WARPS_PER_SM = (8, 12, 16, 24)


def strips(channels: int, quick: bool, looping: bool) -> Iterator[Tile]:
    """Strips worth trying: 4 or 8 numbers of a row to a thread; as many programs as fit, about, where they loop."""
    rows, columns = ((8, 16, 32), (8, 16)) if quick else (STRIP_ROWS, STRIP_COLUMNS)
    for width, across, warps in itertools.product((32, 64), columns, (2, 4) if quick else (1, 2, 4, 8)):
        numbers = across * width // (32 * warps)
        if numbers not in (4, 8) or 4 * (-(-channels // width) * width) > 5 * channels:
            continue
        resident = ((12, 20) if quick else WARPS_PER_SM) if looping else (0,)
        for height, together in itertools.product(rows, resident):
            yield Tile(height, across, width, warps, together // warps)


def choices(channels: int, quick: bool, looping: bool) -> Iterator[Tile]:
    """Tiles worth trying: few channels beyond the last one; 4 to 32 numbers a thread, 16 where sums are kept."""
    per_sm = ((4,) if quick else PER_SM) if looping else (0,)
    for (rows, columns), width, warps, count in itertools.product(
        QUICK_PIXELS if quick else PIXELS, CHANNELS, (4, 8) if quick else WARPS, per_sm
    ):
        padded = -(-channels // width) * width
        if 4 <= rows * columns * width // (32 * warps) <= (16 if looping else 32) and 4 * padded <= 5 * channels:
            yield Tile(rows, columns, width, warps, count)


def sweep(title: str, name: str, run: Callable[[], object], trials: Iterator[Tile], least: float) -> None:
    """Prints the best launch parameters of one kernel, their times, and the bytes moved each second; sets the best."""
    results = []
    for tile in trials:
        setattr(tiles, name, lambda channels, itemsize, tile=tile: tile)
        results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), tile))
    results.sort()
    print(f"\n{title}, {len(results)} tried", flush=True)
    for time, tile in results[:6]:
        print(f"  {time:.4f} ms  {least / time / 1e9:.2f} TB/s  {tile}", flush=True)
    setattr(tiles, name, lambda channels, itemsize: results[0][1])


def runs(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: int
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """Forward, and forward with backward, without autograd around them."""
    x = torch.randn(shape, device="cuda", dtype=dtype)
    weight, bias = torch.randn(shape[-1], 1, kernel, kernel, device="cuda"), torch.randn(shape[-1], device="cuda")
    incoming = torch.randn_like(x)

    def forward() -> Tensor:
        return launch.forward(x, weight, bias, True, False)

    def both() -> tuple[Tensor, ...]:
        return forward(), *launch.backward(incoming, x, weight, bias, True, False, True, True)

    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try fewer")
    parser.add_argument("--dtypes", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help=f"places in {SHAPES}")
    parser.add_argument("--kernel", type=int, choices=[3, 5, 7], default=3, help="side of the filters")
    options = parser.parse_args()
    names, trials = ("forward", "weight_gradient"), choices
    if options.kernel == 3:
        names, trials = ("forward_three", "backward"), strips
    default = {name: getattr(tiles, name) for name in names}
    for dtype, shape in itertools.product(options.dtypes, (SHAPES[place] for place in options.shapes)):
        kind = getattr(torch, dtype)
        map_bytes, channels = torch.Size(shape).numel() * kind.itemsize, shape[-1]
        forward, both = runs(shape, kind, options.kernel)
        for name, function in default.items():
            setattr(tiles, name, function)
        print(f"\n{dtype}, {shape}, at present: forward {do_bench(forward, return_mode='median'):.4f} ms, ", end="")
        print(f"with backward {do_bench(both, return_mode='median'):.4f} ms")
        for name, function in default.items():
            print(f"  {name}: {function(channels, kind.itemsize)}", flush=True)
        title = f"{dtype}, {shape}, {options.kernel} x {options.kernel}"
        sweep(f"forward, {title}", names[0], forward, trials(channels, options.quick, False), 2 * map_bytes)
        sweep(f"with backward, {title}", names[1], both, trials(channels, options.quick, True), 5 * map_bytes)


if __name__ == "__main__":
    main()
