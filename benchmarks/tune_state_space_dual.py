"""Finds the launch parameters of `ops/state_space_dual/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_state_space_dual.py [--quick] [--shapes 0 1 2] [--kinds collect outputs gradients]

Each kernel is swept with the others as they are, `collect` and `outputs` by the time of the forward pass, `gradients`
by that of the backward pass. Without an order two more things are tried: whether one program takes a whole sequence
(`whole`), and for how many tiles it keeps the one state (`stretch`); and into how long chunks sequences are cut
(`chunk`), which both forms have.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from operators.measuring import copy_bandwidth
from operators.state_space_dual import SHAPES
from vizoo.ops.state_space_dual import launch, tiles
from vizoo.ops.state_space_dual.tiles import Tile

KINDS = ("collect", "outputs", "gradients", "whole", "stretch", "chunk")
ROWS, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)
Runs = dict[str, Callable[[], Any]]


def runs(batch: int, L: int, heads: int, P: int, N: int, causal: bool) -> Runs:
    """The forward and the backward pass of one shape, without autograd around them."""
    x = torch.randn(batch, L, heads * P + 2 * N, device="cuda", dtype=torch.bfloat16)
    dt = torch.randn(batch, L, heads, device="cuda", dtype=torch.bfloat16) - 3
    A, D, bias = -torch.rand(heads, device="cuda"), torch.randn(heads, device="cuda"), torch.randn(heads, device="cuda")
    arguments: tuple[Any, ...] = x, dt, A, None, None, D, bias, None, N, causal, True, None
    out, state = launch.forward(*arguments)
    incoming = torch.randn_like(out)

    def backward() -> tuple[Tensor | None, ...]:
        return launch.backward(incoming, None, state, *arguments)

    return {"forward": lambda: launch.forward(*arguments), "backward": backward}


def choices(kind: str, tokens: int, causal: bool, quick: bool) -> Iterator[Any]:
    """What to try for one of `KINDS`."""
    if kind in ("collect", "outputs", "gradients"):
        for rows, warps, stages in itertools.product(ROWS[1:3] if quick else ROWS, WARPS, STAGES[::2]):
            yield Tile(rows, warps, stages)
    elif kind == "chunk":
        yield from (64 * n for n in (1, 2, 4, 8, 16, 32, 64, 128) if 64 * n < 2 * tokens)
    elif not causal:
        yield from (False, True) if kind == "whole" else (64 * n for n in (1, 2, 4, 8, 16))


def sweep(kind: str, shape: tuple[Any, ...], floor: float, quick: bool) -> None:
    """Prints the best values of one parameter at one shape, and leaves that in force that was."""
    run = runs(*shape)["backward" if kind == "gradients" else "forward"]
    before, results = getattr(tiles, kind), []
    for choice in choices(kind, shape[1], shape[-1], quick):
        setattr(tiles, kind, lambda *sizes, choice=choice: choice)
        try:
            results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), choice))
        except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
            print(f"  {choice}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    setattr(tiles, kind, before)
    if results:
        print(f"\n{kind}, {shape}, floor {floor:.4f} ms, {len(results)} tried", flush=True)
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
        batch, L, heads, P, N, _ = shape
        packed, out = 2 * batch * L * (heads * P + 2 * N), 2 * batch * L * heads * P
        floors = {"forward": (packed + out) / bandwidth * 1e3, "backward": (2 * packed + out) / bandwidth * 1e3}
        times = {key: do_bench(run, return_mode="median") for key, run in runs(*shape).items()}
        print(f"\n{name}, {shape}, at present: ", end="")
        print(", ".join(f"{key} {time:.4f} ms (floor {floors[key]:.4f})" for key, time in times.items()), flush=True)
        for kind in options.kinds:
            sweep(kind, shape, floors["backward" if kind == "gradients" else "forward"], options.quick)


if __name__ == "__main__":
    main()
