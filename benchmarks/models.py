"""Models of this library beside what one would pick instead, timm and torchvision, in one run.

They run as they are, compiled, or as CUDA graphs. All contestants for one shape are built first, then timed in turn,
step by step, so that a drift of the machine meets them alike. Results go to benchmarks/results/ with hardware, driver,
versions and commit, losses too.

    python benchmarks/models.py                                    # this machine's GPU, or its CPU
    python benchmarks/models.py --device cpu --threads 1 2 --batch-size 1 8 --modes inference --executions eager
    python benchmarks/models.py --batch-size 128 --models swin_tiny_patch4_window7_224 swin_base_patch4_window7_224
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

import vizoo
from result_files import RESULTS, save
from vizoo.benchmark import (
    DTYPES,
    Execution,
    Measurement,
    PeakMemory,
    Step,
    Timing,
    choose_device,
    choose_dtype,
    make_step,
    threads,
    time_steps,
)
from vizoo.environment import environment

# The same design under the names that the others give it.
TIMM = {
    "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224": "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224": "swin_base_patch4_window7_224",
    "swin_large_patch4_window7_224": "swin_large_patch4_window7_224",
    "swin_base_patch4_window12_384": "swin_base_patch4_window12_384",
    "swin_large_patch4_window12_384": "swin_large_patch4_window12_384",
    "swinv2_tiny_patch4_window8_256": "swinv2_tiny_window8_256",
    "swinv2_small_patch4_window8_256": "swinv2_small_window8_256",
    "swinv2_base_patch4_window8_256": "swinv2_base_window8_256",
    "swinv2_tiny_patch4_window16_256": "swinv2_tiny_window16_256",
    "swinv2_small_patch4_window16_256": "swinv2_small_window16_256",
    "swinv2_base_patch4_window16_256": "swinv2_base_window16_256",
}
TIMM |= {name: name for name in ("davit_tiny", "davit_small", "davit_base")}
TORCHVISION = {
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "swinv2_tiny_patch4_window8_256": "swin_v2_t",
    "swinv2_small_patch4_window8_256": "swin_v2_s",
    "swinv2_base_patch4_window8_256": "swin_v2_b",
}
INSTEAD = {
    "timm swin_tiny": "swin_tiny_patch4_window7_224",
    "timm deit_tiny": "deit_tiny_patch16_224",
    "timm deit_small": "deit_small_patch16_224",
}
"""What one would take instead of designs that no other library has."""
DEFAULT_MODELS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256")


@dataclass(frozen=True)
class Contestant:
    """One library's version of a design, and how it is run."""

    library: str
    execution: str
    build: Callable[[], nn.Module]
    operators: Literal["reference"] | None = None


@dataclass(frozen=True)
class Case:
    """What all contestants are given."""

    model: str
    mode: str
    batch_size: int
    img_size: tuple[int, int]
    threads: int


def contestants(
    name: str, img_size: tuple[int, int], libraries: list[str], executions: list[str], pyramid: bool
) -> list[Contestant]:
    """All that run a design; a library that lacks it is left out."""
    builders: dict[str, Callable[[], nn.Module]] = {
        "vizoo": lambda: vizoo.create_model(name, img_size=img_size, features_only=pyramid)
    }
    if name in TIMM:
        builders["timm"] = lambda: from_timm(TIMM[name], img_size, pyramid)
    if name in TORCHVISION and not pyramid:
        builders["torchvision"] = lambda: from_torchvision(TORCHVISION[name])
    for peer, design in INSTEAD.items():
        builders[peer] = lambda design=design: from_timm(design, img_size, pyramid)  # type: ignore[misc]
    builders["plain torch"] = builders["vizoo"]  # this library without its kernels
    chosen = [library for library in builders if library == "vizoo" or library in libraries]
    return [
        Contestant(library, execution, builders[library], "reference" if library == "plain torch" else None)
        for library in chosen
        for execution in executions
    ]


def from_timm(name: str, img_size: tuple[int, int], pyramid: bool) -> nn.Module:
    import timm

    size = {"img_size": img_size} if name.startswith(("swin", "deit")) else {}  # timm's other families take any
    return timm.create_model(name, features_only=pyramid, **size)


def from_torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name)


def measure(
    case: Case, entries: list[Contestant], device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per contestant. Whoever fails gets a row that says why."""
    steps: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    for entry in entries:
        key = f"{entry.library} {entry.execution}"
        memory = PeakMemory(device)
        try:
            step = make_step(
                entry.build().to(device),
                case.mode,  # type: ignore[arg-type]
                execution=entry.execution,  # type: ignore[arg-type]
                shape=(case.batch_size, 3, *case.img_size),
                device=device,
                dtype=options.dtype,
            )
            step = on_operators(step, entry.operators)
            for _ in range(options.warmup):
                step()
            peaks[key] = memory.of(step)
            steps[key] = step
        except (RuntimeError, MemoryError) as error:
            failures[key] = str(error).strip().splitlines()[0]
    timings = time_steps(steps, device, steps=options.steps, warmup=1)
    for entry in entries:
        key = f"{entry.library} {entry.execution}"
        yield row(case, entry, options.dtype, device, timings.get(key), peaks.get(key), failures.get(key, ""))
    steps.clear()
    forget(device)


def on_operators(step: Step, implementation: Literal["reference"] | None) -> Step:
    """The step on one implementation of all operators, if one is given."""
    if implementation is None:
        return step

    def forced() -> object:
        with vizoo.ops.use(implementation):
            return step()

    return forced


def row(
    case: Case, entry: Contestant, dtype: str, device: torch.device, timing: Timing | None, peak: int | None, error: str
) -> dict[str, Any]:
    figures: dict[str, Any] = {"error": error}
    if timing is not None:
        figures = {
            "steps": len(timing.seconds),
            "images_per_second": case.batch_size / timing.median,
            "milliseconds": timing.median * 1e3,
            "spread": timing.spread,
            "peak_memory": peak,
        }
    found = Measurement(
        model=case.model,
        mode=case.mode,  # type: ignore[arg-type]
        execution=entry.execution,  # type: ignore[arg-type]
        device=str(device),
        threads=case.threads,
        dtype=dtype,
        batch_size=case.batch_size,
        img_size=case.img_size,
        **figures,
    )
    seconds = [] if timing is None else [round(second, 6) for second in timing.seconds]
    return {"library": entry.library, **found.as_dict(), "seconds": seconds}


def forget(device: torch.device) -> None:
    """Free what the contestants of one case held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster vizoo is than each peer run the same way: the median over steps taken side by side."""
    shape = ("model", "mode", "execution", "batch_size", "img_size", "threads")
    found = []
    own = {tuple(map(str, (r[k] for k in shape))): r for r in rows if r["library"] == "vizoo"}
    for peer in (r for r in rows if r["library"] != "vizoo" and r["seconds"]):
        mine = own[tuple(map(str, (peer[k] for k in shape)))]
        if not mine["seconds"]:
            continue
        pairs = [theirs / ours for ours, theirs in zip(mine["seconds"], peer["seconds"], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else (pairs * 3)
        found.append(
            {
                **{key: mine[key] for key in shape},
                "peer": peer["library"],
                "ratio": round(statistics.median(pairs), 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "memory_ratio": memory_ratio(mine, peer),
            }
        )
    return found


def memory_ratio(mine: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """The peer's peak memory over ours."""
    if not mine["peak_memory"] or not peer["peak_memory"]:
        return None
    return round(peer["peak_memory"] / mine["peak_memory"], 3)


def report(found: list[dict[str, Any]]) -> str:
    """The ratios as a Markdown table."""
    lines = [
        "| model | mode | execution | batch | size | threads | peer | times faster (quartiles) | memory, peer / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        size = "x".join(map(str, r["img_size"]))
        low, high = r["quartiles"]
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['execution']} | {r['batch_size']} | {size} | {r['threads']} "
            f"| {r['peer']} | {r['ratio']:.2f} ({low:.2f} to {high:.2f}) | {r['memory_ratio'] or '-'} |"
        )
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    figure = row["error"] or f"{row['images_per_second']:,.1f} images/s"
    entry = f"{row['library']} {row['execution']}"
    return f"{row['model']}, {row['mode']}, batch {row['batch_size']}, {row['threads']} threads, {entry}: {figure}"


def sides(text: str) -> tuple[int, int]:
    """Height and width of `224` or `800x1344`."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS), help="names of the zoo")
    peers = ["timm", "torchvision", *INSTEAD, "plain torch"]
    parser.add_argument("--peers", nargs="*", default=peers[:2], choices=peers)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    executions = get_args(Execution)
    parser.add_argument("--executions", nargs="+", default=["eager", "compiled"], choices=executions)
    parser.add_argument("--batch-size", nargs="+", type=int, help="default: 128 on a GPU, 1 and 8 on a CPU")
    parser.add_argument("--img-size", type=sides, help="side of the images, or 800x1344; default: each model's own")
    parser.add_argument("--features", action="store_true", help="measure the pyramid of maps that a detector takes")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default: bfloat16 by autocast on a GPU, float32 on a CPU"
    )
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = choose_device(options.device)
    options.dtype = choose_dtype(options.dtype, device)
    batches = options.batch_size or ([128] if device.type == "cuda" else [1, 8])
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    facts, kind = environment(device), "features" if options.features else "models"
    rows: list[dict[str, Any]] = []
    warnings.simplefilter("ignore")  # the peers' own
    for name, count in itertools.product(options.models, options.threads or [torch.get_num_threads()]):
        side = options.img_size or vizoo.describe(name).img_size
        entries = contestants(name, side, options.peers, options.executions, options.features)
        for mode, batch in itertools.product(options.modes, batches):
            with threads(count):
                for found in measure(Case(name, mode, batch, side, count), entries, device, options):
                    rows.append(found)
                    print(line(found), flush=True)
            # After each case, so that an interrupted run keeps what it measured.
            results = {"settings": settings, "ratios": ratios(rows), "rows": rows}
            path = save(kind, facts, results, options.output)
    print(f"\n{report(ratios(rows))}\n\n{path}")


if __name__ == "__main__":
    main()
