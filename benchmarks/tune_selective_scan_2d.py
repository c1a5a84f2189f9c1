"""Finds the launch parameters of `ops/selective_scan_2d/tiles.py` by trying many on the GPU at hand.

python benchmarks/tune_selective_scan_2d.py [--shapes 0 1 2 3] [--states 1] [--tokens 16 32]

For each number of tokens of a tile, which all kernels share, the kernels are swept one after the other, each with the
best of those before it: states and outputs, and walks, their alternative for one state, with the time of forward;
gradients with that of forward and backward. Which of the alternatives `tiles.walked` takes is printed first.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from vizoo.ops import ROW_AND_COLUMN_ROUTES
from vizoo.ops.selective_scan_2d import launch, tiles
from vizoo.ops.selective_scan_2d.tiles import Tile

SHAPES = [
    (128, 56, 56, 96, 6),
    (128, 28, 28, 192, 12),
    (128, 14, 14, 384, 24),
    (128, 7, 7, 768, 48),
    (2, 200, 334, 96, 6),
]
"""Images, rows, columns, channels, and the rank of the projection of steps."""
CHANNELS = (32, 64, 128)
PER_SM = (8, 16, 32, 64, 128)


def inputs(shape: tuple[int, ...], states: int) -> tuple[object, ...]:
    """Arguments of the launch, in bfloat16, with steps of about 0.02."""
    images, H, W, d, rank = shape
    K = len(ROW_AND_COLUMN_ROUTES)
    projected = torch.randn(images, H, W, K, rank + 2 * states, device="cuda", dtype=torch.bfloat16)
    delta, B, C = projected.split([rank, states, states], -1)
    x = torch.randn(images, H, W, d, device="cuda", dtype=torch.bfloat16)
    A = -torch.arange(1, states + 1, device="cuda").float().expand(K, d, states).contiguous()
    weight = (torch.rand(K, d, rank, device="cuda", dtype=torch.bfloat16) - 0.5) / rank**0.5
    bias, D = torch.full((K, d), -4.0, device="cuda"), torch.ones(K, d, device="cuda")
    codes = [route.code for route in ROW_AND_COLUMN_ROUTES]
    return x, delta, A, B, C, D, weight, bias, None, codes, True, True, torch.float32


def sweep(name: str, run: Callable[[], object], tokens: int, d: int) -> float:
    """Prints the best launch parameters of one kernel with their times, and sets the best."""
    results = []
    for channels, per_sm in itertools.product(CHANNELS, PER_SM if name != "walks" else (4,)):
        if -(-d // channels) * channels * 3 > 4 * d:  # more than a third of the channels beyond the last one
            continue
        tile = Tile(tokens, channels, per_sm)
        setattr(tiles, name, lambda d, tile=tile: tile)
        try:
            results.append((do_bench(run, warmup=10, rep=40, return_mode="median"), tile))
        except OutOfResources as error:
            print(f"  {tile}: {error}", flush=True)
    results.sort()
    print(f"\n{name}, {tokens} tokens, {len(results)} tried", flush=True)
    for time, tile in results[:4]:
        print(f"  {time:.4f} ms  {tile}", flush=True)
    setattr(tiles, name, lambda d: results[0][1])
    return results[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help=f"places in {SHAPES}")
    parser.add_argument("--states", type=int, default=1, help="states of a channel")
    parser.add_argument("--tokens", nargs="*", type=int, default=[16, 32], help="tokens of a tile")
    options = parser.parse_args()
    default = {name: getattr(tiles, name) for name in ("states", "outputs", "walks", "gradients", "walked")}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for shape in (SHAPES[place] for place in options.shapes):
        arguments = inputs(shape, options.states)
        incoming = torch.randn(shape[:4], device="cuda")

        def forward(arguments=arguments) -> tuple[torch.Tensor, torch.Tensor]:
            return launch.forward(*arguments)

        def both(arguments=arguments, incoming=incoming, forward=forward) -> object:
            return launch.backward(incoming, forward()[1], *arguments)

        for name, function in default.items():
            setattr(tiles, name, function)
        chosen = tiles.walked(shape[0] * -(-shape[3] // tiles.walks(shape[3]).channels), options.states, sms)
        print(f"\n{shape}, {'walks' if chosen else 'states and outputs'}, at present: forward ", end="")
        print(f"{do_bench(forward, return_mode='median'):.4f} ms, ", end="")
        print(f"with backward {do_bench(both, return_mode='median'):.4f} ms")
        for tokens in options.tokens:
            for name, function in default.items():
                setattr(tiles, name, function)
            runs = {"states": forward, "outputs": forward, "walks": forward, "gradients": both}
            for name in runs if options.states == 1 else ("states", "outputs", "gradients"):
                walked = chosen if name == "gradients" else name == "walks"
                tiles.walked = lambda *_, walked=walked: walked
                sweep(name, runs[name], tokens, shape[3])


if __name__ == "__main__":
    main()
