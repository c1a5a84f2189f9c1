"""`vizoo benchmark`."""

from __future__ import annotations

import enum
import itertools
from typing import Annotated

import typer

from vizoo.benchmark import Measurement, Mode, benchmark, choose_device, choose_dtype
from vizoo.environment import device_name
from vizoo.registry import resolve

from .output import note, print_csv, print_json, print_table

_COLUMNS = {
    "model": "left",
    "mode": "left",
    "execution": "left",
    "batch": "right",
    "size": "right",
    "images/s": "right",
    "ms/step": "right",
    "spread": "right",
    "peak MiB": "right",
}


class ModeChoice(str, enum.Enum):
    """What to measure."""

    inference = "inference"
    training = "training"
    both = "both"


class ExecutionChoice(str, enum.Enum):
    """How to run it."""

    eager = "eager"
    compiled = "compiled"
    both = "both"


class Format(str, enum.Enum):
    """What to print."""

    table = "table"
    json = "json"
    csv = "csv"


def benchmark_command(
    names: Annotated[list[str], typer.Argument(help="Models of the zoo.", show_default=False)],
    mode: Annotated[ModeChoice, typer.Option(help="What to measure.")] = ModeChoice.inference,
    execution: Annotated[
        ExecutionChoice, typer.Option(help="Plain, under torch.compile, or both.")
    ] = ExecutionChoice.eager,
    fuse: Annotated[bool, typer.Option("--fuse", help="Fold batch norms and branches first; inference only.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 8,
    img_size: Annotated[int | None, typer.Option(min=32, help="Side of the images, if not the model's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (autocast); bfloat16 on a GPU, else float32.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; their median counts.")] = 12,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 4,
    output: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.table,
) -> None:
    """Measure images per second and peak memory of models, on this machine.

    A step is a whole one: forward under inference mode, or forward, cross-entropy, backward and an AdamW update. Spread
    is half the interquartile range of the steps' times over their median. Peak memory is what torch allocated on a
    GPU, and on the CPU what the process grew by (Linux; nothing elsewhere). A model that cannot run in a mode gets a
    line that says why; the exit code is then 1.

    Examples:
        vizoo benchmark swin_tiny_patch4_window7_224
        vizoo benchmark swin_tiny_patch4_window7_224 swin_small_patch4_window7_224 --mode both --batch-size 128
        vizoo benchmark rcvit_xs --fuse
        vizoo benchmark swinv2_tiny_patch4_window8_256 --execution both --format csv > speed.csv
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    for name in names:
        resolve(name)
    if fuse and mode is not ModeChoice.inference:
        raise ValueError(f"a fused model cannot be trained: --fuse is for --mode inference, not {mode.value}")
    modes: list[Mode] = ["inference", "training"] if mode is ModeChoice.both else [mode.value]
    executions = ["eager", "compiled"] if execution is ExecutionChoice.both else [execution.value]
    rows: list[Measurement] = []
    for name, run_mode, how in itertools.product(names, modes, executions):
        row = benchmark(
            name,
            mode=run_mode,
            compiled=how == "compiled",
            fuse=fuse,
            batch_size=batch_size,
            img_size=img_size,
            device=place,
            dtype=kind,
            steps=steps,
            warmup=warmup,
        )
        if row.error:
            note(f"error: {name}, {run_mode}, {how}: {row.error}")
        rows.append(row)
    _show(rows, output, f"{device_name(place)}, {kind}, {rows[0].threads} CPU threads")
    failures = sum(bool(row.error) for row in rows)
    if failures:
        raise RuntimeError(f"{failures} of {len(rows)} measurements failed")


def _show(rows: list[Measurement], output: Format, title: str) -> None:
    if output is Format.json:
        print_json([row.as_dict() for row in rows])
    elif output is Format.csv:
        print_csv([{**row.as_dict(), "img_size": "x".join(map(str, row.img_size))} for row in rows])
    else:
        print_table(_COLUMNS, [_cells(row) for row in rows], title=title)


def _cells(row: Measurement) -> tuple[str, ...]:
    execution = f"{row.execution}, fused" if row.fused else row.execution
    head = (row.model, row.mode, execution, str(row.batch_size), "x".join(map(str, row.img_size)))
    if row.error:
        return (*head, "failed", "-", "-", "-")
    peak = "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f}"
    return (*head, f"{row.images_per_second:,.1f}", f"{row.milliseconds:,.2f}", f"{row.spread:.1%}", peak)
