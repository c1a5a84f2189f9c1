"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

_REFRESH_SECONDS = 0.1


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """A progress bar with text behind it; where the output is no terminal, only `say` prints.

    It is refreshed by the caller's steps and has no thread: data loaders fork.

    Args:
        console: Where to print; None takes the standard output.
        quiet: Print nothing at all.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._drawn = 0.0

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Show a bar in place of the present one."""
        self.end()
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
            self._task = self._progress.add_task(title, total=total, completed=done, text="")
            self._progress.start()

    def step(self, text: str = "", advance: int = 1) -> None:
        """Move the bar, and change the text behind it unless that is empty."""
        if self._progress is None or self._task is None:
            return
        if text:
            self._progress.update(self._task, text=text)
        self._progress.update(self._task, advance=advance)
        if time.perf_counter() - self._drawn > _REFRESH_SECONDS:
            self._progress.refresh()
            self._drawn = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def end(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
