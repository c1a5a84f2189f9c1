"""Finds the launch parameters of `ops/layer_norm/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_layer_norm.py [--channels 96 192 384 768 1536] [--mebibytes 147]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from triton.testing import do_bench

from vizoo.ops.layer_norm import launch, tiles
from vizoo.ops.layer_norm.tiles import Tile

NUMBERS = (1024, 2048, 4096, 8192)
WARPS = (1, 2, 4, 8)
PER_SM = (2, 4, 8, 16)


def choices(channels: int, backward: bool) -> Iterator[Tile]:
    block = tiles.forward(channels).channels
    for numbers, warps, per_sm in itertools.product(NUMBERS, WARPS, PER_SM if backward else (0,)):
        if block <= numbers and 4 <= numbers // (32 * warps) <= 64:
            yield Tile(numbers // block, block, warps, per_sm)


def sweep(name: str, run: Callable[[], object], channels: int, least: float) -> None:
    """Prints the best launch parameters of one kernel, their times, and the bytes moved each second."""
    trials = []
    for tile in choices(channels, name == "backward"):
        setattr(tiles, name, lambda channels, tile=tile: tile)
        trials.append((do_bench(run, warmup=10, rep=50, return_mode="median"), tile))
    print(f"\n{name}, {channels} channels, {len(trials)} tried", flush=True)
    for time, tile in sorted(trials)[:8]:
        print(f"  {time:.4f} ms  {least / time / 1e9:.2f} TB/s  {tile}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs="*", type=int, default=[96, 192, 384, 768, 1536])
    parser.add_argument("--mebibytes", type=int, default=147, help="size of the input")
    options = parser.parse_args()
    default = {name: getattr(tiles, name) for name in ("forward", "backward")}
    for channels in options.channels:
        for name, function in default.items():
            setattr(tiles, name, function)
            print(f"{name}, {channels} channels, at present: {function(channels)}")
        x = torch.randn((options.mebibytes << 20) // (4 * channels), channels, device="cuda")
        weight, bias = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
        incoming = torch.randn_like(x, dtype=torch.bfloat16)

        def forward(x=x, weight=weight, bias=bias) -> object:
            return launch.forward(x, weight, bias, 1e-5, torch.bfloat16)

        def backward(x=x, weight=weight, bias=bias, incoming=incoming) -> object:
            return launch.backward(incoming, x, weight, bias, 1e-5, True, True)

        sweep("forward", forward, channels, 1.5 * x.nbytes)
        sweep("backward", backward, channels, 2.5 * x.nbytes)


if __name__ == "__main__":
    main()
