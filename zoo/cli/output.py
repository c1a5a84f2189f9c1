"""What commands print: tables for people, JSON and CSV for programs, and messages beside the output."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNBOUNDED = 10_000  # columns; a table must not be cut off where no terminal limits it


class _Console(Console):
    """rich's console, which leaves a reader that went away to `vizoo.cli.main`."""

    def on_broken_pipe(self) -> None:
        """Raise again what rich would answer by ending the process with the code of a failure."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output; neither colours nor a limit of width where it is not a terminal."""
    return _Console(width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False)


def say(text: str) -> None:
    """Print one line of plain text."""
    console().print(escape(text), soft_wrap=True)


def note(text: str) -> None:
    """Print one line to standard error, where it does not mix with results."""
    print(text, file=sys.stderr)


class Failures:
    """Names each image that cannot be read on standard error, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path, error: Exception) -> None:
        """One image that cannot be read."""
        self.count += 1
        text = " ".join(str(error).split())
        note(f"error: {text if str(path) in text else f'{path}: {text}'}")

    def check(self, files: int) -> None:
        """Raise if there was any among so many files.

        Raises:
            ValueError: There was.
        """
        if self.count:
            raise ValueError(f"{self.count} of {files} images could not be read")


def print_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table.

    Args:
        columns: Heading to justification, `left` or `right`; left ones are folded rather than cut off.
        rows: Cells.
        title: Printed above; empty for none.
    """
    table = Table(box=box.SIMPLE_HEAD, title=escape(title) or None, title_justify="left", pad_edge=False)
    for heading, justify in columns.items():
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write("\n")


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as CSV, with a heading."""
    if rows:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
