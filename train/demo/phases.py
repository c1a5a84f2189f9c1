"""What took how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vizoo.train.progress import ProgressLine, duration


@dataclass
class Clock:
    """Names and seconds of phases, each told on a line when it ends."""

    line: ProgressLine
    start: float = field(default_factory=time.perf_counter)
    phases: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        begin = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - begin))
        self.line.say(f"{name}: {duration(self.phases[-1][1])}")

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
