"""Whether scans stay finite in half precision: 1,000 updates on random images by each model's own ImageNet recipe.

    python benchmarks/stability.py --output benchmarks/results
    python benchmarks/stability.py --models vim_tiny --dtypes float16
    python benchmarks/stability.py --together --limit 300

Optimiser, clipping and drop path are the config's; the rate is the full one of the recipe's 1,024 images, which is much
for the batches here, after a tenth of the updates. The result file holds the loss of each update and the length of all
parameters together; it is written a tenth of the updates after the other, so that an interrupted run keeps what it has.
With --together all run side by side, each in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn import functional as F

import vizoo
from result_files import RESULTS, save
from side_by_side import Ended, crew
from vizoo.environment import environment
from vizoo.train.optim import GroupedOptimizer
from vizoo.train.settings import load_config

IMAGES = 1024
"""Of a recipe's update, by which its rate is scaled; and how many random ones there are."""


Job = tuple[str, str]
"""A model and the dtype of autocast."""


def run(name: str, dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains one model; its losses, and the length of its parameters, so far after each tenth of the updates."""
    torch.manual_seed(0)
    settings = load_config(f"imagenet/{name}")
    backbone = settings.model.backbone
    model = vizoo.create_model(name, drop_path_rate=backbone.get("drop_path_rate")).to(options.device).train()
    wrapper = settings.optim_wrapper
    wrapper.dtype = dtype
    wrapper.optimizer.lr *= IMAGES / settings.auto_scale_lr.base_batch_size
    options_of_groups = wrapper.pop("paramwise_cfg", None)
    wrapper.pop("constructor", None)
    updates = GroupedOptimizer(wrapper, options_of_groups)(model)
    rates = [group["lr"] for group in updates.param_groups]
    images = torch.randn(IMAGES, 3, options.size, options.size, device=options.device)
    labels = torch.randint(1000, (IMAGES,), device=options.device)
    losses, norms = [], []
    for step in range(options.updates):
        for group, rate in zip(updates.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / (options.updates / 10))
        chosen = torch.arange(options.batch_size, device=options.device) + step * options.batch_size
        chosen %= IMAGES
        with updates.optim_context(model):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        updates.update_params(loss)
        losses.append(loss.detach().float())
        norms.append(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
        if len(losses) == options.updates or len(losses) % max(1, options.updates // 10) == 0:
            yield {**started(name, dtype, options), **progress(model, updates, losses, norms)}


def started(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is known of a run before it begins, and holds if it comes to nothing."""
    return {
        "model": name,
        "dtype": dtype,
        "batch_size": options.batch_size,
        "size": options.size,
        "updates": options.updates,
        "updates_done": 0,
        "error": "",
        "finite": None,
        "loss_scale": None,
        "losses": [],
        "norms_of_parameters": [],
    }


def progress(model: nn.Module, updates: OptimWrapper, losses: list[Tensor], norms: list[Tensor]) -> dict[str, Any]:
    finite = all(p.isfinite().all() for p in model.parameters()) and bool(torch.stack(losses).isfinite().all())
    scaler = getattr(updates, "scaler", None)
    return {
        "updates_done": len(losses),
        "finite": finite,
        "loss_scale": scaler.get_scale() if scaler is not None and scaler.is_enabled() else None,
        "losses": [round(value, 4) for value in torch.stack(losses).tolist()],
        "norms_of_parameters": [round(value, 3) for value in torch.stack(norms).tolist()],
    }


def run_in_turn(jobs: list[Job], options: argparse.Namespace) -> Iterator[tuple[Job, dict[str, Any]]]:
    for job in jobs:
        yield from ((job, row) for row in run(*job, options))


def run_together(jobs: list[Job], options: argparse.Namespace) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The rows so far of processes side by side; of those that fail or are too slow the last one says why."""
    until = None if options.limit is None else time.monotonic() + options.limit
    rows = {job: started(*job, options) for job in jobs}
    with crew() as found:
        for job in jobs:
            found.start(job, report, job, options)
        while (news := found.news(until)) is not None:
            job, message = news
            if not isinstance(message, Ended):
                rows[job] |= message
            elif rows[job]["updates_done"] == options.updates or rows[job]["error"]:
                continue
            else:
                rows[job]["error"] = str(message)
            yield job, rows[job]
        for job in list(found.processes):
            rows[job]["error"] = f"not done within {options.limit:g} seconds"
            yield job, rows[job]


def report(connection: Connection, job: Job, options: argparse.Namespace) -> None:
    """What the process of one run does."""
    try:
        for row in run(*job, options):
            connection.send(row)
    except Exception as error:  # whatever it is, the others go on
        connection.send({"error": f"{type(error).__name__}: {error}"})


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for row in rows:
        axes.plot(row["losses"], label=f"{row['model']} ({row['dtype']})", linewidth=0.7)
    axes.set(xlabel="updates", ylabel="training loss on random images")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vssm1_tiny_0230s", "vim_tiny", "vssd_tiny"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--together", action="store_true", help="all at once, in processes of their own")
    parser.add_argument("--limit", type=float, help="with --together: seconds until all have to be done")
    options = parser.parse_args()
    if options.limit is not None and not options.together:
        parser.error("--limit ends processes, which there are with --together only")
    jobs = list(itertools.product(options.models, options.dtypes))
    kind = "stability" if options.models == parser.get_default("models") else f"stability-{'-'.join(options.models)}"
    facts, rows = environment(torch.device(options.device)), {}
    for job, row in (run_together if options.together else run_in_turn)(jobs, options):
        rows[job] = row
        path = save(kind, facts, {"rows": [rows[job] for job in jobs if job in rows]}, options.output)
        if row["error"] or row["updates_done"] == options.updates:
            shown = {key: value for key, value in row.items() if not isinstance(value, list)}
            print(shown, row["losses"][:: max(1, options.updates // 10)], flush=True)
    picture([rows[job] for job in jobs], path.with_suffix(".svg"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
