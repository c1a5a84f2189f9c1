"""Contestants that compile side by side, in processes of their own, and are timed alone.

Compiling takes minutes, timing seconds. A process builds, compiles and warms up, frees the memory that it does not
need, says that it is ready, and waits. When all are ready, have failed, or are too late, one after the other is timed.
What a compiler chooses by trying on the device, it tries beside the others' work; none is favored by that.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from contestants import INSTEAD, Case, Contestant, Found, Job, contestants, first_line, ready_step, release, row
from kernel_times import longest
from side_by_side import Crew, Ended, crew
from vizoo.benchmark import PeakMemory, choose_device, time_steps

READY, GO = "ready", "go"
SHORT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""What errors say, of torch, of CUDA and of its libraries, when there is too little memory."""


def measure_together(cases: dict[Case, list[Contestant]], options: argparse.Namespace) -> Iterator[Found]:
    """The same rows from processes that compile side by side; each is timed when no other does anything."""
    jobs = once([Job(case, entry.library, entry.execution) for case, entries in cases.items() for entry in entries])
    # Each process has compilers of its own, and they share the cores.
    compilers = max(2, 2 * (os.cpu_count() or 1) // min(options.together, len(jobs)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compilers))
    with crew() as found:
        ready = []
        for job, message in prepared(found, jobs, options):
            if message == READY:
                ready.append(job)
                print(f"ready: {job}", flush=True)
            else:
                yield job, message if isinstance(message, dict) else row(job, options, error=str(message))
        for job in sorted(ready, key=jobs.index):
            message = turn(found, job, options.limit)
            yield job, message if isinstance(message, dict) else row(job, options, error=str(message))


def once(jobs: list[Job]) -> list[Job]:
    """The jobs, but what one would take instead of several models only beside the first of them."""
    first = {(replace(job.case, model=""), job.library, job.execution): job for job in reversed(jobs)}
    return [job for job in jobs if job.library not in INSTEAD or job in first.values()]


def prepared(found: Crew, jobs: list[Job], options: argparse.Namespace) -> Iterator[tuple[Job, Any]]:
    """What becomes of each until it waits for its turn: `READY`, the row of a failure, or why there is none."""
    until = None if options.limit is None else time.monotonic() + options.limit
    waiting, busy = list(jobs), []
    while waiting or busy:
        while waiting and len(busy) < options.together:
            busy.append(waiting.pop(0))
            found.start(busy[-1], take_part, busy[-1], options)
        news = found.news(until)
        if news is None:
            break
        job, message = news
        if job in busy:  # or it was ready and ended since, which its turn tells
            busy.remove(job)
            if message != READY and not isinstance(message, Ended):
                found.end(job, patience=10)
            yield job, message
    for job in busy:
        found.end(job)
    for job in [*busy, *waiting]:
        yield job, f"not ready within {options.limit:g} seconds"


def turn(found: Crew, job: Job, limit: float | None) -> Any:
    """The row of a contestant that was ready, or why there is none."""
    if job not in found.processes:
        return "its process ended while it waited for its turn"
    found.tell(job, GO)
    until = None if limit is None else time.monotonic() + limit
    while (news := found.news(until)) is not None:
        if news[0] == job:
            if not isinstance(news[1], Ended):
                found.end(job, patience=10)  # its memory is free before the next one starts
            return news[1]
    found.end(job)
    return f"its turn took longer than {limit:g} seconds"


def take_part(connection: Connection, job: Job, options: argparse.Namespace) -> None:
    """What the process of one contestant does: it gets ready, waits for its turn, and is measured."""
    warnings.simplefilter("ignore")  # the peers' own
    torch.set_num_threads(job.case.threads)
    try:
        connection.send(measured_alone(connection, job, options))
    except Exception as error:  # whatever it is, the others go on
        connection.send(row(job, options, error=first_line(error)))


def measured_alone(connection: Connection, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    device, case = choose_device(options.device), job.case
    entries = contestants(case.model, case.img_size, [job.library], [job.execution], options.features)
    (entry,) = (entry for entry in entries if entry.library == job.library)
    memory, step = PeakMemory(device), None
    try:
        step = ready_step(case, entry, device, options)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SHORT_OF_MEMORY):
            raise
        print(f"too little memory beside others, once more alone: {job}", flush=True)
    release(device)
    connection.send(READY)
    connection.recv()
    step = step or ready_step(case, entry, device, options)
    peak = memory.of(step)
    timing = time_steps({"": step}, device, steps=options.steps, warmup=1)[""]
    found = row(job, options, timing, peak)
    if options.profile and job.library == "vizoo":
        found["kernels"] = longest(step, device)
    return found
