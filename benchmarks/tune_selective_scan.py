"""Finds the launch parameters of `ops/selective_scan/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_selective_scan.py [--shapes 0 1 2] [--passes forward backward] [--rows | --held] [--tokens 16 32]
python benchmarks/tune_selective_scan.py --quick

The number of tokens is that of both passes: for each, the forward pass is swept as it is in inference, and the backward
pass after a forward pass that keeps states for it. Tiles of one state with tokens together in memory are swept both
ways, in rows and held, unless one is asked for. `--quick` times the forward pass of four shapes in a few ways: 196
tokens in rows and held, and 16 states with several bounds of registers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from operators.selective_scan import SHAPES, inputs
from vizoo.ops.selective_scan import launch, tiles
from vizoo.ops.selective_scan.tiles import Tile

LENGTHS = (128, 256, 512)
"""Of rows."""
QUICK_ROWS = [Tile(4, 4), Tile(2, 2), Tile(8, 8), Tile(8, 4), Tile(4, 2), Tile(16, 8)]
QUICK_HELD = [
    Tile(32, 1, 16), Tile(32, 1, 16, 168), Tile(32, 1, 16, 224), Tile(32, 1, 16, 255), Tile(32, 1, 8, 168),
]  # fmt: skip
QUICK_SHAPES = ["vmamba v0 stage 1, 16 states", "vim_tiny, 16 states", "vim_tiny at 1248, 16 states"]
"""Of 16 states."""


def runs(tensors: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """The forward pass as in inference, and the backward pass, without autograd around them."""
    u, delta, A, B, C, D, bias = (tensor.detach() for tensor in tensors.values())
    given = u, delta, A, B, C, D, None, bias, None

    def forward(keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return launch.forward(*given, True, False, False, keep, tiles.TOKENS, u.dtype)

    out, _, states = forward(keep=True)
    incoming = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return launch.backward(incoming, None, *given, states, True, False, tiles.TOKENS)

    return {"forward": forward, "backward": backward}


def held(states: int, which: str) -> Iterator[Tile]:
    """A channel a lane; one or two channels a thread."""
    unrolls = [unroll for unroll in (1, 2, 4, 8, 16) if unroll <= states and states % unroll == 0]
    bounds = [0]
    if which == "forward":
        unrolls, bounds = [1] if states == 1 else [4, 8, 16], [0, 128, 168, 200, 224, 255]
    for channels, warps, unroll, bound in itertools.product((32, 64, 128), (1, 2, 4), unrolls, bounds):
        if 32 * warps <= channels <= 64 * warps:
            yield Tile(channels, warps, unroll, bound)


def rows(each: int) -> Iterator[Tile]:
    """4 to 32 numbers a thread."""
    for channels, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if channels < 2 * each and 4 <= tiles.LONGEST * channels // (32 * warps) <= 32:
            yield Tile(channels, warps)


def sweep(title: str, run: Callable[[], Any], choice: str, candidates: Iterable[Tile], default: Tile) -> None:
    """Prints the best tiles of a pass, and leaves those in force that were."""
    before, results = getattr(tiles, choice), []
    for tile in {default, *candidates}:
        setattr(tiles, choice, lambda *sizes, tile=tile: tile)
        try:
            results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), tile))
        except Exception as error:  # too much shared memory, or too many registers: say so and go on
            print(f"  {tile}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    setattr(tiles, choice, before)
    print(f"\n{title}, {len(results)} tried", flush=True)
    for time, tile in sorted(results)[:5]:
        print(f"  {time:.4f} ms  {tile}{'  the present one' if tile == default else ''}", flush=True)


def sweep_rows(name: str, tensors: dict[str, Tensor], each: int) -> None:
    """Forward passes in rows of several lengths."""
    before = tiles.LONGEST, tiles.in_rows, tiles.row
    tiles.in_rows, tiles.row = lambda *sizes: True, lambda length: tiles.LONGEST
    for tiles.LONGEST in LENGTHS:
        run, default = runs(tensors)["forward"], tiles.rows(each, tiles.LONGEST)
        sweep(f"forward, {name}, rows of {tiles.LONGEST} tokens", run, "rows", rows(each), default)
    tiles.LONGEST, tiles.in_rows, tiles.row = before


def sweep_held(name: str, tensors: dict[str, Tensor], states: int, tokens: list[int], passes: list[str]) -> None:
    """Passes whose threads hold all tokens of a tile."""
    before = tiles.TOKENS, tiles.in_rows
    tiles.in_rows = lambda *sizes: False
    for tiles.TOKENS in tokens:
        for which, run in runs(tensors).items():
            if which in passes:
                title = f"{which}, {name}, {tiles.TOKENS} tokens"
                sweep(title, run, which, held(states, which), getattr(tiles, which)(states))
    tiles.TOKENS, tiles.in_rows = before


def sweep_quickly() -> None:
    """Few candidates for the forward passes that are furthest from their floors."""
    name, before = "vmamba_tiny stage 3", tiles.in_rows
    _, _, each, length, _, _ = SHAPES[name]
    run, default = runs(inputs(*SHAPES[name]))["forward"], tiles.rows(each, tiles.row(length))
    tiles.in_rows = lambda *sizes: True
    sweep(f"forward, {name}, in rows", run, "rows", QUICK_ROWS, default)
    tiles.in_rows = lambda *sizes: False
    sweep(f"forward, {name}, held", run, "forward", [], tiles.forward(1))
    tiles.in_rows = before
    for name in QUICK_SHAPES:
        run = runs(inputs(*SHAPES[name]))["forward"]
        sweep(f"forward, {name}", run, "forward", QUICK_HELD, tiles.forward(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help=f"places in {list(SHAPES)}")
    parser.add_argument("--passes", nargs="*", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[16], help="of a tile that threads hold")
    parser.add_argument("--quick", action="store_true", help="four shapes, forward, few candidates; nothing else")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--rows", action="store_true", help="only tiles that are rows of tokens")
    layout.add_argument("--held", action="store_true", help="only tiles that threads hold")
    options = parser.parse_args()
    if options.quick:
        sweep_quickly()
        return
    for name, shape in (list(SHAPES.items())[place] for place in options.shapes):
        tensors = inputs(*shape)
        _, _, each, _, states, channels_last = shape
        if states == 1 and not channels_last and "forward" in options.passes and not options.held:
            sweep_rows(name, tensors, each)
        if not options.rows:
            sweep_held(name, tensors, states, options.tokens, options.passes)


if __name__ == "__main__":
    main()
