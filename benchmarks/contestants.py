"""Who takes part in the benchmark of models: this library, and what one would pick instead."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import vizoo
from vizoo.benchmark import Measurement, Step, Timing, choose_device, make_step

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


@dataclass(frozen=True)
class Case:
    """What all contestants are given."""

    model: str
    mode: str
    batch_size: int
    img_size: tuple[int, int]
    threads: int


@dataclass(frozen=True)
class Job:
    """One contestant in one case."""

    case: Case
    library: str
    execution: str

    def __str__(self) -> str:
        case = self.case
        where = f"{case.model}, {case.mode}, batch {case.batch_size}, {case.threads} threads"
        return f"{where}, {self.library} {self.execution}"


Found = tuple[Job, dict[str, Any]]
"""A contestant in a case, and its row of the result."""


@dataclass(frozen=True)
class Contestant:
    """One library's version of a design, and how it is run."""

    library: str
    execution: str
    build: Callable[[], nn.Module]
    operators: Literal["reference"] | None = None


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


def ready_step(case: Case, entry: Contestant, device: torch.device, options: argparse.Namespace) -> Step:
    """A step of a contestant: built, compiled, warmed up."""
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
    return step


def on_operators(step: Step, implementation: Literal["reference"] | None) -> Step:
    """The step on one implementation of all operators, if one is given."""
    if implementation is None:
        return step

    def forced() -> object:
        with vizoo.ops.use(implementation):
            return step()

    return forced


def row(
    job: Job, options: argparse.Namespace, timing: Timing | None = None, peak: int | None = None, error: str = ""
) -> dict[str, Any]:
    case, figures = job.case, {"error": error}
    if timing is not None:
        figures |= {
            "steps": len(timing.seconds),
            "images_per_second": case.batch_size / timing.median,
            "milliseconds": timing.median * 1e3,
            "spread": timing.spread,
            "peak_memory": None if job.execution == "graphs" else peak,  # what graphs hold is allocated before a step
        }
    found = Measurement(
        model=case.model,
        mode=case.mode,  # type: ignore[arg-type]
        execution=job.execution,  # type: ignore[arg-type]
        device=str(choose_device(options.device)),
        threads=case.threads,
        dtype=options.dtype,
        batch_size=case.batch_size,
        img_size=case.img_size,
        **figures,
    )
    seconds = [] if timing is None else [round(second, 6) for second in timing.seconds]
    return {"library": job.library, **found.as_dict(), "seconds": seconds}


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
