"""Where the time of a step goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from vizoo.benchmark import Step

STEPS = 3
PROFILED = 30
"""Kernels that a list of the longest holds."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel of the device, or one operator of the CPU, adds to a step."""

    name: str
    milliseconds: float
    launches: float

    def __str__(self) -> str:
        return f"{self.milliseconds:8.3f} ms {self.launches:6.1f}x  {self.name[:140]}"


def kernels(step: Step, device: torch.device) -> list[Kernel]:
    """The kernels of a step, longest first; on a CPU torch's operators, without what they call."""
    on_gpu = device.type == "cuda"
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    for event in found.events():
        if not on_gpu or event.device_type.name == "CUDA":
            times[event.name] += (event.device_time if on_gpu else event.self_cpu_time_total) / STEPS / 1e3
            launches[event.name] += 1
    return [Kernel(name, spent, launches[name] / STEPS) for name, spent in times.most_common()]


def longest(step: Step, device: torch.device) -> list[str]:
    """Lines about the kernels that take the most time, and one about all of them."""
    found = kernels(step, device)
    total = Kernel("all kernels", sum(each.milliseconds for each in found), sum(each.launches for each in found))
    return [str(each) for each in (total, *found[:PROFILED])]
