"""Finds the launch parameters of `ops/selective_scan/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_selective_scan.py [--quick] [--shapes 0 1 2] [--passes forward backward]

The number of tokens is that of both passes: for each, the forward pass is swept as it is in inference, and the backward
pass after a forward pass that keeps states for it. The best of both together is what `tokens` should return.
With --flat or --held, tiles of one state are laid out that way whatever lies together in memory.
"""

from __future__ import annotations

import argparse
import itertools
import runpy
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from vizoo.ops.selective_scan import launch, tiles
from vizoo.ops.selective_scan.tiles import Tile

# The shapes of the benchmark beside this file, which is a script and not a module of the package.
SCANS, scan_inputs = itemgetter("SCANS", "scan_inputs")(runpy.run_path(str(Path(__file__).with_name("ops.py"))))
FLAT_TOKENS, HELD_TOKENS = (128, 256, 512, 1024), (8, 16, 32)
CHANNELS, WARPS = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8)


def runs(tensors: dict[str, Tensor], tokens: int) -> dict[str, Callable[[], Any]]:
    """The forward pass as in inference, and the backward pass, without autograd around them."""
    u, delta, A, B, C, D, bias = (tensor.detach() for tensor in tensors.values())
    inputs = u, delta, A, B, C, D, None, bias, None

    def forward(keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return launch.forward(*inputs, True, False, False, keep, tokens, u.dtype)

    out, _, states = forward(keep=True)
    incoming = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return launch.backward(incoming, None, *inputs, states, True, False, tokens)

    return {"forward": forward, "backward": backward}


def choices(tokens: int, states: int, each: int, flat: bool, backward: bool, quick: bool) -> Iterator[Tile]:
    """Tiles worth trying: 4 to 128 numbers a thread, few channels beyond those of a group."""
    column = tokens << (states - 1).bit_length()
    dots = (False, True) if backward and not flat else (False,)
    for channels, warps, dot in itertools.product(CHANNELS, WARPS[::2] if quick else WARPS, dots):
        padded = -(-each // channels) * channels
        numbers = column * channels // (32 * warps)
        if 4 <= numbers <= (64 if backward else 128) and 2 * padded <= 3 * each and not (dot and channels < 16):
            yield Tile(channels, warps, dot)


def sweep(name: str, tensors: dict[str, Tensor], tokens: int, flat: bool, passes: list[str], quick: bool) -> None:
    """Prints the best tiles of the passes at one shape, and leaves those in force that were."""
    run = runs(tensors, tokens)
    (channels, states), groups = tensors["A"].shape, tensors["B"].shape[1]
    for which in passes:
        before, results = getattr(tiles, which), []
        default = before(tokens, states, channels // groups, flat)
        for tile in {default, *choices(tokens, states, channels // groups, flat, which == "backward", quick)}:
            setattr(tiles, which, lambda *sizes, tile=tile: tile)
            try:
                results.append((do_bench(run[which], warmup=10, rep=40, return_mode="median"), tile))
            except Exception as error:  # too much shared memory, or too many registers: say so and go on
                print(f"  {tile}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        setattr(tiles, which, before)
        print(f"\n{which}, {name}, {tokens} tokens, {'flat' if flat else 'held'}, {len(results)} tried", flush=True)
        for time, tile in sorted(results)[:5]:
            print(f"  {time:.4f} ms  {tile}{'  the present one' if tile == default else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try fewer")
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SCANS)), help=f"places in {list(SCANS)}")
    parser.add_argument("--passes", nargs="*", choices=["forward", "backward"], default=["forward", "backward"])
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--flat", action="store_true", help="lay tiles of one state out as rows of tokens")
    layout.add_argument("--held", action="store_true", help="let a thread have all tokens of a tile")
    options = parser.parse_args()
    if options.flat or options.held:
        tiles.flat = lambda states, tokens_together: options.flat and states == 1
    for name, shape in (list(SCANS.items())[place] for place in options.shapes):
        flat = tiles.flat(shape[4], not shape[5])
        tensors = scan_inputs(*shape)
        for tokens in FLAT_TOKENS if flat else HELD_TOKENS:
            sweep(name, tensors, tokens, flat, options.passes, options.quick)


if __name__ == "__main__":
    main()
