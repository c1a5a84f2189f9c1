"""Finds the launch parameters of `ops/gated_linear_attention/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_gated_linear_attention.py [--quick] [--shapes 0 2 6] [--kinds outputs gradients states chunk]

Each kernel is swept with the others as they are: `outputs` by the time of the forward pass, `gradients` by that of the
backward pass, `states` and `chunk`, how long the chunks are that sequences are cut in, by that of either. The rows of
`outputs` and `gradients` are those of the walks of `states` in their pass, too. `--quick` tries only what is likely, in
device time of a CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from operators.gated_linear_attention import SHAPES
from operators.measuring import copy_bandwidth
from vizoo.ops.gated_linear_attention import launch, tiles
from vizoo.ops.gated_linear_attention.tiles import Tile

KINDS = ("outputs", "gradients", "states", "chunk")
ROWS, WARPS, STAGES, REGISTERS = (16, 32, 64), (1, 2, 4, 8), (1, 2, 3), (0, 80, 96, 128, 168)
LIKELY = {
    "outputs": [
        Tile(32, 2, 2, 168), Tile(32, 2, 1, 168), Tile(32, 2, 3, 168), Tile(32, 2, 2), Tile(16, 2, 2, 168),
        Tile(16, 2, 3, 128), Tile(32, 4, 2, 80), Tile(32, 4, 2, 96), Tile(32, 4, 2, 128), Tile(32, 4, 2),
        Tile(64, 4, 2),
    ],
    "gradients": [
        Tile(16, 2, 1, 168), Tile(16, 2, 1, 200), Tile(16, 2), Tile(16, 4, 1, 96), Tile(16, 4, 1, 128), Tile(16, 4),
        Tile(32, 4), Tile(32, 8, 1, 128),
    ],
    "states": [
        Tile(0, 2, 3, 80), Tile(0, 2, 3), Tile(0, 2, 2), Tile(0, 2, 2, 64), Tile(0, 1, 3), Tile(0, 4, 3), Tile(0, 4, 2),
    ],
}  # fmt: skip
Runs = dict[str, Callable[[], Any]]


def runs(batch: int, N: int, heads: int, dk: int, dv: int, both: bool) -> Runs:
    """The forward and the backward pass of one shape, without autograd around them."""

    def draw(width: int) -> Tensor:
        return torch.randn(batch, N, heads, width, device="cuda", dtype=torch.bfloat16)

    arguments: tuple[Any, ...] = draw(dk), draw(dk), draw(dv), draw(dk), draw(dk) if both else None
    arguments += None, dk**-0.5, False, 16.0
    incoming = draw(dv)
    return {
        "forward": lambda: launch.forward(*arguments),
        "backward": lambda: launch.backward(incoming, None, *arguments),
    }


def choices(kind: str, tokens: int, quick: bool) -> Iterator[Any]:
    """What to try for one of `KINDS`; for `states` the rows are not its own."""
    if kind == "chunk":
        lengths = (64 * n for n in (1, 2, 4, 8, 16, 32, 64, 128) if 64 * n < 2 * tokens)
        yield from (length for length in lengths if not quick or length >= min(512, tokens))
    elif quick:
        yield from LIKELY[kind]
    else:
        rows = ROWS[:1] if kind == "states" else ROWS
        stages = STAGES[:1] if kind == "gradients" else STAGES
        yield from (Tile(*each) for each in itertools.product(rows, WARPS, stages, REGISTERS))


def chooser(kind: str, choice: Any) -> Callable[..., Any]:
    """What stands in for a function of `tiles`."""
    if kind == "states":
        return lambda dk, dv, half, rows: choice._replace(rows=rows)
    return lambda *sizes: choice


def passes(kind: str) -> tuple[str, ...]:
    """By whose time one of `KINDS` is judged."""
    return {"outputs": ("forward",), "gradients": ("backward",)}.get(kind, ("forward", "backward"))


def timed(run: Callable[[], Any], quick: bool) -> float:
    """Milliseconds; without the host's part if only little is tried, as walks of short sequences are quick."""
    return do_bench_cudagraph(run, rep=20) if quick else do_bench(run, warmup=10, rep=40, return_mode="median")


def sweep(kind: str, shape: tuple[Any, ...], name: str, floor: float, quick: bool) -> None:
    """Prints the best values of one parameter at one shape, and leaves that in force that was."""
    run, before, results = runs(*shape)[name], getattr(tiles, kind), []
    for choice in choices(kind, shape[1], quick):
        setattr(tiles, kind, chooser(kind, choice))
        try:
            results.append((timed(run, quick), choice))
        except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
            print(f"  {choice}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    setattr(tiles, kind, before)
    if results:
        print(f"\n{kind}, {name}, {shape}, floor {floor:.4f} ms, {len(results)} tried", flush=True)
    for time, choice in sorted(results, key=itemgetter(0))[:6]:
        print(f"  {time:.4f} ms  {choice}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try fewer")
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help=f"places in {list(SHAPES)}")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    for place in options.shapes:
        name, shape = list(SHAPES.items())[place]
        batch, N, heads, dk, dv, both = shape
        given, out = 2 * batch * N * heads * ((4 if both else 3) * dk + dv), 2 * batch * N * heads * dv
        floors = {"forward": (given + out) / bandwidth * 1e3, "backward": (2 * given + out) / bandwidth * 1e3}
        times = {key: timed(run, options.quick) for key, run in runs(*shape).items()}
        print(f"\n{name}, {shape}, at present: ", end="")
        print(", ".join(f"{key} {time:.4f} ms (floor {floors[key]:.4f})" for key, time in times.items()), flush=True)
        for kind in options.kinds:
            for each in passes(kind):
                sweep(kind, shape, each, floors[each], options.quick)


if __name__ == "__main__":
    main()
