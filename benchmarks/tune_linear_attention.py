"""Finds the launch parameters of `ops/linear_attention/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_linear_attention.py [--quick] [--shapes 3 4 5] [--kinds outputs collect ...]

Each kernel is swept with the others as they are: `outputs` and `collect` by the time of the forward pass,
`query_gradients` and `key_gradients` by that of the backward pass. `collect` runs only where tokens are cut in chunks,
and is swept with chunks forced. `chunk` tries into how long ones they are cut, up to all tokens, which one program then
takes as a whole; it rules the forward and the backward pass, and is swept by both together. `STRETCH`, for how many
tokens a program reads what others have summed, is swept with chunks forced, too.
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

from operators.linear_attention import SHAPES
from operators.measuring import copy_bandwidth
from vizoo.ops.linear_attention import function, launch, tiles
from vizoo.ops.linear_attention.tiles import Tile

KINDS = ("outputs", "query_gradients", "key_gradients", "chunk", "collect", "STRETCH")
PASSES = {"query_gradients": "backward", "key_gradients": "backward", "chunk": "both"}
ROWS, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)
Runs = dict[str, Callable[[], Any]]


def runs(batch: int, N: int, heads: int, d: int, rule: Any, grid: tuple[int, int] | None) -> Runs:
    """The forward and the backward pass of one shape, and both, without autograd around them."""
    qkv = torch.randn(batch, N, 3, heads, d, device="cuda", dtype=torch.bfloat16)
    local = None if grid is None else torch.randn(batch, heads, d, 3, 3, device="cuda", dtype=torch.bfloat16)
    arguments = (qkv, None, None, None, None, local, *(grid or (0, 0)), *function._numbers(rule, d))
    out, sums, flows = launch.forward(*arguments)
    incoming = torch.randn_like(out)

    def forward() -> tuple[Tensor, ...]:
        return launch.forward(*arguments)

    def backward() -> tuple[Tensor | None, ...]:
        return launch.backward(incoming, sums, flows, *arguments)

    return {"forward": forward, "backward": backward, "both": lambda: (forward(), backward())}


def choices(kind: str, tokens: int, quick: bool) -> Iterator[Any]:
    """What to try for one of `KINDS`."""
    if kind == "STRETCH":
        yield from (n for n in (64, 128, 256, 512, 1024, 2048) if n < 2 * tokens)
    elif kind == "chunk":
        yield from (n for n in (64, 128, 256, 512, 1024, 2048, 4096, 2**20) if n < 2 * tokens or n == 2**20)
    else:
        for rows, warps, stages in itertools.product(ROWS[1:] if quick else ROWS, WARPS, STAGES[1::2]):
            yield Tile(rows, warps, stages)


def sweep(kind: str, run: Callable[[], Any], title: str, tokens: int, quick: bool) -> None:
    """Prints the best values of one parameter at one shape, and leaves those in force that were."""
    before = {name: getattr(tiles, name) for name in (kind, "chunk")}
    if kind in ("collect", "STRETCH"):
        tiles.chunk = lambda *sizes: max(256, tokens // 8 // 64 * 64)
    results = []
    for choice in choices(kind, tokens, quick):
        setattr(tiles, kind, choice if kind == "STRETCH" else lambda *sizes, choice=choice: choice)
        try:
            results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), choice))
        except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
            print(f"  {choice}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    for name, value in before.items():
        setattr(tiles, name, value)
    if results:
        print(f"\n{kind}, {title}, {len(results)} tried", flush=True)
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
        batch, N, heads, d, *_ = shape
        part = 2 * batch * N * heads * d
        floors = {key: parts * part / bandwidth * 1e3 for key, parts in (("forward", 4), ("backward", 7), ("both", 11))}
        each = runs(*shape)
        print(f"\n{name}, {shape}, at present: ", end="")
        times = {key: do_bench(run, return_mode="median") for key, run in each.items()}
        print(", ".join(f"{key} {time:.4f} ms (floor {floors[key]:.4f})" for key, time in times.items()), flush=True)
        for kind in options.kinds:
            which = PASSES.get(kind, "forward")
            sweep(kind, each[which], f"{name}, floor {floors[which]:.4f} ms", N, options.quick)


if __name__ == "__main__":
    main()
