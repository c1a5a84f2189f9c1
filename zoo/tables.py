"""Rows about models and their weights, for the command line and the README.

No model is built for them: the figures are the published ones. Counting takes a few tenths of a second per model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vizoo.backbones.base import Family, Variant
from vizoo.weights.record import Weights

from .registry import families, list_models, resolve, variants


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, or one checkpoint of a model.

    Attributes:
        name: `variant`, or `variant.tag` for a checkpoint.
        family: Its family.
        mixer: Kind of token mixer.
        params: Millions of parameters, as published; None where nobody counted.
        gmacs: 10^9 multiply-accumulate operations for one image of `size`, as published.
        size: Height and width of the image.
        metrics: What the authors report for the (default) checkpoint.
        weights: Tags of the checkpoints, the default one first.
        license: Licence of the (default) checkpoint; empty where there is none.
    """

    name: str
    family: str
    mixer: str
    params: float | None
    gmacs: float | None
    size: tuple[int, int]
    metrics: dict[str, float]
    weights: tuple[str, ...]
    license: str

    @property
    def top1(self) -> float | None:
        """Reported ImageNet-1K top-1 accuracy in percent."""
        return self.metrics.get("top1")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def model_rows(names: Iterable[str]) -> list[Row]:
    """One row per variant."""
    return [_model_row(name, *variants()[name]) for name in names]


def weight_rows(names: Iterable[str]) -> list[Row]:
    """One row per checkpoint; `names` as `list_models(pretrained=True)` returns them."""
    rows = []
    for name in names:
        found = resolve(name)
        assert found.weights is not None
        rows.append(_row(name, found.family, found.variant, found.weights, (found.tag or "",)))
    return rows


def _model_row(name: str, family: Family, variant: Variant) -> Row:
    return _row(name, family, variant, next(iter(variant.weights.values()), None), tuple(variant.weights))


def _row(name: str, family: Family, variant: Variant, record: Weights | None, tags: tuple[str, ...]) -> Row:
    side = variant.config.img_size
    own_params, own_macs = (record.params, record.macs) if record else (None, None)
    return Row(
        name=name,
        family=family.name,
        mixer=family.mixer,
        params=variant.params if variant.params is not None else _scaled(own_params, 1e6),
        gmacs=variant.gmacs if variant.gmacs is not None else _scaled(own_macs, 1e9),
        size=(side, side) if isinstance(side, int) else tuple(side),
        metrics=dict(record.metrics) if record else {},
        weights=tags,
        license=record.license if record else "",
    )


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def rounded(value: float | None) -> str:
    """A published size: one decimal, none for a whole number, since papers round."""
    return figure(value).removesuffix(".0")


def side(size: tuple[int, int]) -> str:
    """`224` for a square image, else `224x320`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def reported(metrics: dict[str, float]) -> str:
    """Reported metrics in one phrase; top-1 alone without its name."""
    if "top1" in metrics:
        return figure(metrics["top1"])
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items()) or "-"


def markdown_table() -> str:
    """The README's table of models, by family."""
    lines = [
        "| model | params (M) | GMACs | image | top-1 (%) | weights | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in families():
        for row in sorted(model_rows(list_models(family=family)), key=lambda r: (r.params or 0, r.gmacs or 0, r.name)):
            cells = (
                f"`{row.name}`",
                rounded(row.params),
                rounded(row.gmacs),
                side(row.size),
                reported(row.metrics),
                ", ".join(f"`{tag}`" for tag in row.weights) or "-",
                row.license or "-",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_tables(results: Path) -> str:
    """Images per second and peak memory, and those of the peers over ours, from each `*_models.json` in a folder."""
    files = sorted(results.glob("*_models.json"))
    return "\n\n".join(_speed_table(json.loads(path.read_text(encoding="utf-8"))) for path in files) or "Nothing yet."


def _speed_table(result: Mapping[str, Any]) -> str:
    facts, rows = result["environment"], result["rows"]
    where = (
        f"{facts['device']}, {rows[0]['dtype']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date'][:10]}"
    )
    peers = sorted({row["library"] for row in rows} - {"vizoo"})
    heads = ["model", "mode", "run", "size", "batch", "CPU threads", "images/s", "peak GiB"]
    heads += [head for peer in peers for head in (f"times {peer}", "its memory")]
    lines = [f"{where}:", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    ratios = {(*_case(ratio), ratio["peer"]): ratio for ratio in result["ratios"]}
    for row in rows:
        if row["library"] == "vizoo":
            model, *others = case = _case(row)
            peak = _scaled(row["peak_memory"], 2**30)
            cells = [f"`{model}`", *others, figure(row["images_per_second"]), figure(peak, 2)]
            for peer in peers:
                ratio = ratios.get((*case, peer), {})
                cells += [figure(ratio.get("ratio"), 2), figure(ratio.get("memory_ratio"), 2)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _case(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What was run, as the cells of a table."""
    height, width = row["img_size"]
    return (
        row["model"],
        row["mode"],
        row["execution"],
        side((height, width)),
        str(row["batch_size"]),
        str(row["threads"]),
    )


def markers(name: str) -> tuple[str, str]:
    """The comments in a document between which a generated part stands."""
    return f"<!-- {name}: written by `python -m vizoo.tables README.md` -->", f"<!-- end of {name} -->"


def renewed(text: str, results: Path) -> str:
    """A document with its generated parts made anew.

    Args:
        text: The document; it holds the markers of `models` and of `speed`.
        results: Folder of the measurements.

    Raises:
        ValueError: The document lacks markers, or has them in the wrong order.
    """
    for name, part in (("models", markdown_table()), ("speed", speed_tables(results))):
        opening, closing = markers(name)
        head, begin, rest = text.partition(opening)
        _, end, tail = rest.partition(closing)
        if not (begin and end):
            raise ValueError(f"the document must hold the markers {opening!r} and {closing!r}, in this order")
        text = f"{head}{opening}\n{part}\n{closing}{tail}"
    return text


def _main(arguments: list[str]) -> None:
    for path in map(Path, arguments):
        results = path.resolve().parent / "benchmarks" / "results"
        path.write_text(renewed(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    import sys

    _main(sys.argv[1:])
