"""Processes that work side by side and tell their parent how far they are.

A process may do anything to itself: fail, run out of memory, be killed. The parent learns of it as of any other news.
All end with the parent, whatever ends that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")
Work = Callable[..., None]
"""A function of a module that takes the connection to the parent, and whatever the parent gave."""


@dataclass(frozen=True)
class Ended:
    """The last news of a process."""

    code: int | None

    def __str__(self) -> str:
        if self.code is not None and self.code < 0:
            return f"its process was ended by {signal.Signals(-self.code).name}"
        return f"its process ended with code {self.code}"


class Crew:
    """Processes by name, and the news of them."""

    def __init__(self) -> None:
        self.processes: dict[Any, Any] = {}
        self.connections: dict[Any, Connection] = {}

    def start(self, name: Any, work: Work, *arguments: Any) -> None:
        """Let a process of this name work."""
        ours, theirs = CONTEXT.Pipe()
        self.processes[name] = CONTEXT.Process(target=_run, args=(work, theirs, os.getpid(), arguments))
        self.connections[name] = ours
        self.processes[name].start()
        theirs.close()

    def tell(self, name: Any, message: Any) -> None:
        """Send a message to a process; one that is over is told nothing, of which there will be news."""
        with suppress(OSError):
            self.connections[name].send(message)

    def news(self, until: float | None = None) -> tuple[Any, Any] | None:
        """The name of a process and what it says, or that it ended; None when none is left or the time is over.

        Args:
            until: A time of `time.monotonic`; None waits as long as it takes.
        """
        names = {connection: name for name, connection in self.connections.items()}
        rest = None if until is None else max(0.0, until - time.monotonic())
        for connection in wait(list(names), rest) if names else ():
            name = names[connection]  # type: ignore[index]
            try:
                return name, self.connections[name].recv()
            except (EOFError, OSError):
                return name, Ended(self.end(name, patience=10.0))
        return None

    def end(self, name: Any, patience: float = 0.0) -> int | None:
        """End a process and all that it started, after so many seconds in which it may end by itself; its code."""
        process = self.processes.pop(name)
        self.connections.pop(name).close()
        process.join(patience)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # none is left, or it had no time to make a group
            process.kill()
        process.join()
        return process.exitcode


@contextmanager
def crew() -> Iterator[Crew]:
    """A crew that ends with the block, also when this process is told to end."""
    found = Crew()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield found
    finally:
        for name in list(found.processes):
            found.end(name)
        signal.signal(signal.SIGTERM, before)


def _run(work: Work, connection: Connection, parent: int, arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # a group of its own: what compiles for it ends with it, and Ctrl-C is the parent's business
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    work(connection, *arguments)


def _follow(parent: int) -> None:
    """End this process when its parent is gone without having said so."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
