"""Models of this library beside what one would pick instead, timm and torchvision, in one run.

They run as they are, compiled, or as CUDA graphs. All contestants for one shape are built first, then timed in turn,
step by step, so that a drift of the machine meets them alike. With --together they compile side by side, and each is
timed alone; what one would take instead of several models is measured once. Results go to benchmarks/results/ with
hardware, driver, versions and commit, losses too.

    python benchmarks/models.py                                    # this machine's GPU, or its CPU
    python benchmarks/models.py --device cpu --threads 1 2 --batch-size 1 8 --modes inference --executions eager
    python benchmarks/models.py --batch-size 128 --models swin_tiny_patch4_window7_224 swin_base_patch4_window7_224
    python benchmarks/models.py --models vim_tiny vssd_tiny nat_tiny --peers timm --together 6 --limit 300 --profile
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

import vizoo
from contest import measure_together
from contestants import INSTEAD, Case, Contestant, Found, Job, contestants, first_line, ready_step, release, row
from kernel_times import PROFILED, longest
from result_files import RESULTS, save
from speed_report import ratios, report
from vizoo.benchmark import (
    DTYPES,
    ROW,
    Execution,
    PeakMemory,
    Step,
    choose_device,
    choose_dtype,
    threads,
    time_steps,
)
from vizoo.environment import environment

DEFAULT_MODELS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256")


def measure_in_turn(cases: dict[Case, list[Contestant]], options: argparse.Namespace) -> Iterator[Found]:
    """One row per contestant of each case. Whoever fails gets a row that says why."""
    device = choose_device(options.device)
    for case, entries in cases.items():
        with threads(case.threads):
            yield from measure(case, entries, device, options)


def measure(
    case: Case, entries: list[Contestant], device: torch.device, options: argparse.Namespace
) -> Iterator[Found]:
    """The rows of one case, whose contestants are timed step by step in turn."""
    steps: dict[Job, Step] = {}
    failures: dict[Job, str] = {}
    peaks: dict[Job, int | None] = {}
    jobs = [Job(case, entry.library, entry.execution) for entry in entries]
    for job, entry in zip(jobs, entries, strict=True):
        memory = PeakMemory(device)
        try:
            step = ready_step(case, entry, device, options)
            peaks[job] = memory.of(step)
            steps[job] = step
        except (RuntimeError, MemoryError) as error:
            failures[job] = first_line(error)
    timings = time_steps(steps, device, steps=options.steps, warmup=1)
    for job in jobs:
        found = row(job, options, timings.get(job), peaks.get(job), failures.get(job, ""))
        if options.profile and job.library == "vizoo" and job in steps:
            found["kernels"] = longest(steps[job], device)
        yield job, found
    steps.clear()
    torch._dynamo.reset()
    release(device)


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
    parser.add_argument("--together", type=int, help="contestants that get ready at once, in processes of their own")
    parser.add_argument("--limit", type=float, help="with --together: seconds until all are ready, and of each turn")
    parser.add_argument("--profile", action="store_true", help=f"list the {PROFILED} longest kernels of our models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result file")
    options = parser.parse_args()
    if options.limit is not None and options.together is None:
        parser.error("--limit ends processes, which there are with --together only")
    if options.together is not None and options.together < 1:
        parser.error(f"--together must be at least 1, got {options.together}")
    return options


def cases_of(options: argparse.Namespace, batches: list[int]) -> dict[Case, list[Contestant]]:
    """All cases, and who takes part."""
    found = {}
    for name, count in itertools.product(options.models, options.threads or [torch.get_num_threads()]):
        side = options.img_size or vizoo.describe(name).img_size
        entries = contestants(name, side, options.peers, options.executions, options.features)
        for mode, batch in itertools.product(options.modes, batches):
            found[Case(name, mode, batch, side, count)] = entries
    return found


def main() -> None:
    options = arguments()
    device = choose_device(options.device)
    options.dtype = choose_dtype(options.dtype, device)
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    settings["calls_at_a_time"] = str(ROW)
    facts, kind = environment(device), "features" if options.features else "models"
    warnings.simplefilter("ignore")  # the peers' own
    cases = cases_of(options, options.batch_size or ([128] if device.type == "cuda" else [1, 8]))
    in_turn = options.together is None
    rows: dict[Job, dict[str, Any]] = {}
    profiles: dict[Job, list[str]] = {}
    for job, found in (measure_in_turn if in_turn else measure_together)(cases, options):
        profiles |= {job: found.pop("kernels")} if "kernels" in found else {}
        rows[job] = found
        print(f"{job}: {found['error'] or format(found['images_per_second'], ',.1f') + ' images/s'}", flush=True)
        # After each, so that an interrupted run keeps what it measured.
        ordered = [rows[job] for job in sorted(rows, key=lambda job: list(cases).index(job.case))]
        results = {"settings": settings, "ratios": ratios(ordered, in_turn), "rows": ordered}
        path = save(kind, facts, results, options.output)
        if profiles:
            text = "\n\n".join(f"{job}\n" + "\n".join(longest) for job, longest in profiles.items())
            path.with_name(f"{path.stem}_kernels.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{report(ratios(ordered, in_turn))}\n\n{path}")


if __name__ == "__main__":
    main()
