"""Measures operators beside what torch offers for the same job, on one GPU, in one run.

    python benchmarks/ops.py [--first 4] [--eager] [--output benchmarks/results]
    python benchmarks/ops.py --only window_attention --shapes 3 4

Times are medians of events on the device, with the L2 cache flushed before each run: `_ms` of calls from Python as a
user makes them, `_device_ms` of the same calls captured in a CUDA graph, without the launches. The least bytes of an
operator are its inputs read once and its outputs written once; `_share` is the time they take at the bandwidth that a
large copy reached in this run, over `_device_ms`. Extra memory is the peak beyond inputs, outputs and gradients.

Shapes, inputs and peers stand in `operators/`, a file for each operator.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from operators import NAMES
from operators.measuring import copy_bandwidth, environment, line


def rows(name: str, options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The figures of one operator, shape by shape."""
    operator = import_module(f"operators.{name}")
    uses = list(operator.SHAPES)[: options.first]
    for use in uses if options.shapes is None else (uses[place] for place in options.shapes):
        for row in operator.case(use).rows(options.eager, options.peers, bandwidth):
            yield {"op": name, "name": use, **row}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, help="measure one operator")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--first", type=int, help="measure only so many shapes of each operator")
    some.add_argument("--shapes", nargs="+", type=int, help="measure these shapes of --only, by their places from 0 on")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled peers")
    parser.add_argument("--peers", nargs="*", help="measure only these ways beside ours, by names as in the results")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    options = parser.parse_args()
    if options.shapes is not None:
        if options.only is None:
            parser.error("--shapes are places among the shapes of one operator: name it with --only")
        uses = dict(enumerate(import_module(f"operators.{options.only}").SHAPES))
        if unknown := [place for place in options.shapes if place not in uses]:
            parser.error(f"{options.only} has no shapes at places {unknown}; it has {uses}")
    return options


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("operators are measured on a CUDA GPU, and there is none")
    bandwidth = copy_bandwidth()
    result = {**environment(), "copy_bytes_per_second": bandwidth, "rows": []}
    print({key: value for key, value in result.items() if key != "rows"}, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    parts = [torch.cuda.get_device_name().lower().replace(" ", "-")]
    parts += [options.only] if options.only else []
    parts += ["-".join(map(str, options.shapes))] if options.shapes else []
    path = options.output / f"ops-{'_'.join(parts)}.json"
    for name in [options.only] if options.only else NAMES:
        for row in rows(name, options, bandwidth):
            result["rows"].append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")  # each time: an interrupted run keeps what it has
            print(line(row), flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
