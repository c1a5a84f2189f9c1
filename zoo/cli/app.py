"""The application: its commands, and how whatever goes wrong becomes one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import vizoo

from . import bench, models, prediction, training, weights
from .help import command
from .output import note, say

app = typer.Typer(
    name="vizoo",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `vizoo list`, then `vizoo describe NAME` and `vizoo predict IMAGE --model NAME`; "
    "`vizoo demo` trains three small models in minutes. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
)
FIND, RUN, TRAIN = "Find a model", "Use a model", "Train a model"
command(app, "list", panel=FIND)(models.list_command)
command(app, "describe", panel=FIND)(models.describe_command)
app.add_typer(weights.app, name="weights", rich_help_panel=FIND)
command(app, "predict", panel=RUN)(prediction.predict_command)
command(app, "benchmark", panel=RUN)(bench.benchmark_command)
command(app, "train", panel=TRAIN)(training.train_command)
command(app, "test", panel=TRAIN)(training.evaluate_command)
command(app, "configs", panel=TRAIN)(training.configs_command)
command(app, "demo", panel=TRAIN)(training.demo_command)


# What the library raises on purpose. Anything else is a bug of its own, and says so.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError)


def _print_version(value: bool) -> None:
    if value:
        say(f"vizoo {vizoo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from. Works behind the command as well.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Efficient vision backbones: find, run, measure and train them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind `vizoo`; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a failure, 2 for wrong usage, 130 for an interrupt, 141 for a reader that went away.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, debug = _take_debug(words)
    with warnings.catch_warnings():
        warnings.showwarning = _OneLineWarnings()
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # deprecations and the like are for developers
            warnings.simplefilter("always", UserWarning)
        try:
            code = app(words, prog_name="vizoo", standalone_mode=False)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            _leave_quietly()
            return 141
        except Exception as error:
            if debug and not hasattr(error, "format_message"):
                raise
            return _report(error)
    return code if isinstance(code, int) else 0


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, wherever it stands in front of a `--`, and whether it was there."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _report(error: Exception) -> int:
    """Say what went wrong in one line; returns the exit code."""
    describe = getattr(error, "format_message", None)  # a usage error
    if describe is not None:
        message = _one_line(describe())
        if message:  # without any words the help has been printed instead
            note(f"error: {message}{_usage_hint(error)}")
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":  # a question that was not answered
        return 130
    expected = isinstance(error, _EXPECTED) or (isinstance(error, KeyError) and " " in _message(error))
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (this looks like a bug of vizoo; --debug shows where)"
    note(f"error: {kind}{_one_line(_message(error))}{hint}")
    return 1


def _message(error: Exception) -> str:
    """The text of an error; a system error's without its number, a missing key's without the quotes Python adds."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    return text.replace("accept_license=True", "--accept-license")  # what Python calls an argument is an option here


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context is not None else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _leave_quietly() -> None:
    """Python flushes standard output when it ends, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _OneLineWarnings:
    """Shows each warning once, as one line without the place in the code."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> None:
        text = _one_line(str(message))
        if text not in self.seen:
            self.seen.add(text)
            note(f"warning: {text}")
