"""Finds the launch parameters of `ops/routing_attention/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_routing_attention.py [--quick] [--dtypes bfloat16 float32] [--shapes 0 1 2] [--kind routed dense]

The kernels that walk over routes are swept one after the other, forward, gradient of queries, gradient of keys, each
with the best of those before it; then, where a map is small enough, the kernels that hold it at once. What `is_dense`
should choose shows when both kinds are swept for a shape.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.testing import do_bench

from vizoo.ops import region_routes
from vizoo.ops.routing_attention import launch, tiles
from vizoo.ops.routing_attention.function import _needs_output
from vizoo.ops.routing_attention.tiles import Tile

SIDES = (16, 32, 64, 128)
QUICK_SIDES = (16, 64)
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
Runs = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """A map whose sides are cut into as many regions each, k of which every region attends to."""

    name: str
    batch: int
    map: tuple[int, int]
    heads: int
    regions: int
    k: int
    d: int = 32

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        return -(-self.map[0] // self.regions), -(-self.map[1] // self.regions)

    @property
    def keys(self) -> int:
        """Keys of a query."""
        return self.k * self.region[0] * self.region[1]


SHAPES = [
    Shape("biformer_tiny stage 1", 128, (56, 56), 2, 7, 1),
    Shape("biformer_tiny stage 2", 128, (28, 28), 4, 7, 4),
    Shape("biformer_tiny stage 3", 128, (14, 14), 8, 7, 16),
    Shape("biformer_base stage 3", 128, (14, 14), 12, 7, 16),
    Shape("biformer_small stage 1, 512", 4, (128, 128), 2, 8, 1),
    Shape("biformer_small stage 3, 512", 4, (32, 32), 8, 8, 16),
    Shape("biformer_small stage 1, 800x1344", 2, (208, 336), 2, 16, 1),
    Shape("biformer_small stage 3, 800x1344", 2, (64, 96), 8, 16, 16),
]


def runs(shape: Shape, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], object], int]:
    """Forward, backward without autograd around it, and the bytes of a quarter of what forward must move."""
    qkv = torch.randn(shape.batch, *shape.map, 3, shape.heads, shape.d, device="cuda", dtype=dtype)
    routes = region_routes(qkv, region_size=shape.region, topk=shape.k)
    arguments = qkv, None, None, routes, None
    sizes = shape.region, shape.d**-0.5
    out, lse = launch.forward(*arguments, *sizes)
    kept = out if _needs_output(*arguments[:4], shape.region) else None
    incoming = torch.randn_like(out)
    return (
        lambda: launch.forward(*arguments, *sizes)[0],
        lambda: launch.backward(incoming, *arguments, kept, lse, *sizes, False),
        out.nbytes,
    )


def sweep(
    title: str, name: str, run: Callable[[], object], trials: Iterable[Tile], floor: float, **given: bool
) -> None:
    """Prints the best launch parameters of one kernel and their times; sets the best.

    Args:
        title: What is measured.
        name: Function of `tiles` that chooses for the kernel.
        run: What is timed.
        trials: Launch parameters to try.
        floor: Time in ms that the least traffic takes.
        given: What the function must be asked for to answer with the trial; else it answers as before.
    """
    before, results = getattr(tiles, name), []

    def answer(tile: Tile) -> Callable[..., Tile]:
        def chosen(*args: object, **kwargs: bool) -> Tile:
            return tile if all(kwargs[key] == value for key, value in given.items()) else before(*args, **kwargs)

        return chosen

    for tile in trials:
        setattr(tiles, name, answer(tile))
        try:
            results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), tile))
        except Exception as error:  # too much shared memory, or a shape the compiler refuses: say so and go on
            print(f"  {tile}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    setattr(tiles, name, before)
    results.sort(key=lambda result: result[0])
    print(f"\n{title}, floor {floor:.4f} ms, {len(results)} tried", flush=True)
    for time, tile in results[:6]:
        print(f"  {time:.4f} ms  {floor / time:6.1%}  {tile}", flush=True)
    if results:
        setattr(tiles, name, answer(results[0][1]))


def choices(sides: Iterable[int], keys: Iterable[int], quick: bool) -> Iterator[Tile]:
    """Tiles of 256 to 16384 logits, 4 to 64 of them a thread."""
    warps, stages = ((1, 4, 8), (1, 2)) if quick else (WARPS, STAGES)
    for tile in itertools.starmap(Tile, itertools.product(sides, keys, warps, stages)):
        if 4 <= tile.queries * tile.keys // (32 * tile.warps) <= 64:
            yield tile


def tune_routed(title: str, shape: Shape, itemsize: int, run: Runs, floors: tuple[float, float], quick: bool) -> None:
    """The kernels that walk over routes."""
    sides = QUICK_SIDES if quick else SIDES
    region = tiles.power_of_two(shape.region[0] * shape.region[1])
    queries = [side for side in sides if side <= region]
    keys = [side for side in sides if side <= tiles.power_of_two(shape.keys)]
    whole = tiles.in_one_step(shape.keys, shape.d, itemsize)
    tiles.DENSE_REGIONS = 0
    sweep(f"routed forward, {title}", "routed", run[0], choices(queries, keys, quick), floors[0], backward=False)
    all_keys = [tiles.power_of_two(shape.keys)] if whole else keys
    sweep(f"routed backward by queries, {title}", "routed", run[1], choices(queries, all_keys, quick), floors[1],
          backward=True)  # fmt: skip
    sweep(f"routed backward by keys, {title}", "routed_keys", run[1], choices(sides, queries, quick), floors[1])


def tune_dense(title: str, shape: Shape, run: Runs, floors: tuple[float, float], quick: bool) -> None:
    """The kernels that hold all keys of a small map."""
    tiles.DENSE_REGIONS = 64
    keys = tiles.power_of_two(shape.regions**2 * shape.region[0] * shape.region[1])
    for place, name in enumerate(("forward", "backward")):
        trials = choices((16, 32, 64), [keys], quick)
        sweep(f"dense {name}, {title}", "dense", run[place], trials, floors[place], backward=bool(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try fewer")
    parser.add_argument("--dtypes", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--shapes", nargs="*", type=int, default=range(3), help="places in the list of shapes")
    parser.add_argument("--kind", nargs="*", choices=["routed", "dense"], default=["routed", "dense"])
    parser.add_argument("--bandwidth", type=float, default=3.0, help="of a copy, in TB/s")
    options = parser.parse_args()
    defaults = {name: getattr(tiles, name) for name in ("routed", "routed_keys", "dense", "DENSE_REGIONS")}
    for dtype, shape in itertools.product(options.dtypes, (SHAPES[place] for place in options.shapes)):
        for name, value in defaults.items():
            setattr(tiles, name, value)
        kind = getattr(torch, dtype)
        forward, backward, part = runs(shape, kind)
        floors = 4 * part / options.bandwidth / 1e9, 7 * part / options.bandwidth / 1e9
        print(f"\n{dtype}, {shape}, at present: forward {do_bench(forward, return_mode='median'):.4f} ms, ", end="")
        print(f"backward {do_bench(backward, return_mode='median'):.4f} ms", flush=True)
        region = shape.region[0] * shape.region[1]
        dense = tiles.is_dense(shape.regions**2, region, region, shape.k, shape.d, kind.itemsize)
        title = f"{dtype}, {shape.name}"
        if "routed" in options.kind:
            tune_routed(title, shape, kind.itemsize, (forward, backward), floors, options.quick)
        if "dense" in options.kind and dense:
            tune_dense(title, shape, (forward, backward), floors, options.quick)


if __name__ == "__main__":
    main()
