"""Turns docstrings into help: paragraphs flow, examples keep their lines. And options that several commands have."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import TypeVar

import typer
from rich.markup import escape

Function = TypeVar("Function", bound=Callable[..., None])


class Task(str, enum.Enum):
    """What a model is for."""

    classify = "classify"
    detect = "detect"
    segment = "segment"


def command(app: typer.Typer, name: str, *, panel: str | None = None) -> Callable[[Function], Function]:
    """Add a function to an application as a command, with its docstring as help."""

    def add(function: Function) -> Function:
        app.command(name, help=help_text(function), rich_help_panel=panel)(function)
        return function

    return add


def help_text(function: Callable[..., None]) -> str:
    """A docstring as typer's rich help wants it."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(map(_paragraph, paragraphs))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if lines[0].rstrip() in ("Example:", "Examples:"):
        # The control character keeps the lines of its paragraph apart.
        return "\n".join(
            ["\b", f"[bold]{lines[0].rstrip()}[/bold]", *("  " + escape(line.strip()) for line in lines[1:])]
        )
    return " ".join(escape(text).split())
