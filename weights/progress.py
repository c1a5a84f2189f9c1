"""A progress bar on a terminal, silence anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .fetch import Report


@contextmanager
def progress_bar(name: str, *, enabled: bool) -> Iterator[Report]:
    """Show a download while the context lasts, if standard error is a terminal.

    Args:
        name: What is being downloaded.
        enabled: False for silence.

    Yields:
        The function to report the bytes present and the bytes in all to.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # slow to import, and only needed here
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
