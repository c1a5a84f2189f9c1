"""The command line, `vizoo`: one module per group of commands, put together in `app`."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
