"""`vizoo list` and `vizoo describe`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

import vizoo
from vizoo.backbones.base import nearest
from vizoo.registry import resolve
from vizoo.tables import Row, model_rows, reported, rounded, side, weight_rows
from vizoo.weights.record import Weights

from .help import Task
from .output import note, print_json, print_table, say

_COLUMNS = {
    "model": "left",
    "params (M)": "right",
    "GMACs": "right",
    "size": "right",
    "top-1 (%)": "right",
    "weights": "left",
    "licence": "left",
}
_DENSE_COLUMNS = {
    "weights": "left",
    "params (M)": "right",
    "GMACs": "right",
    "size": "right",
    "reported (%)": "left",
    "licence": "left",
}


def list_command(
    pattern: Annotated[
        str, typer.Argument(help="Shell pattern such as 'swin*224'; without a wildcard it matches anywhere.")
    ] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family, such as swin.")] = None,
    mixer: Annotated[
        str | None, typer.Option(help="Only this kind of token mixer, such as 'window attention'.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="One line per published checkpoint.")] = False,
    task: Annotated[
        Task, typer.Option("--task", "-t", help="Whole models with published weights: detectors or segmenters.")
    ] = Task.classify,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models of the zoo.

    Parameters and operations are those published for the size in the table; `vizoo describe` counts them. Top-1 is the
    authors' figure on ImageNet-1K for the default weights, the first ones named. With --task detect or segment, the
    whole detectors or segmenters with published weights, and the authors' figures on COCO or ADE20K.

    Examples:
        vizoo list
        vizoo list 'swin*384'
        vizoo list --family swin_v2 --weights
        vizoo list tiny --json
        vizoo list --task detect
    """
    if task is not Task.classify:
        _list_dense(pattern, family, mixer, task.value, as_json)
        return
    names = vizoo.list_models(pattern, family=family, mixer=mixer, pretrained=weights)
    rows = weight_rows(names) if weights else model_rows(names)
    if not rows:
        raise ValueError(_nothing(pattern, family, mixer, weights))
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    print_table(_COLUMNS, [_cells(row) for row in rows])
    note(f"{len(rows)} {'checkpoints' if weights else 'models'}")


def _list_dense(pattern: str, family: str | None, mixer: str | None, task: str, as_json: bool) -> None:
    from vizoo.train.dense_weights import list_dense

    rows = [
        _dense_row(found.name, found.backbone, found.weights)
        for found in list_dense(pattern, task=task, family=family, mixer=mixer)
    ]
    if not rows:
        known = [found.name for found in list_dense(task=task)]
        raise ValueError(f"no model to {task} matches {pattern!r}; {nearest(pattern.strip('*?'), known)}")
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    print_table(_DENSE_COLUMNS, [_dense_cells(row) for row in rows])
    note(f"{len(rows)} models to {task}")


def _dense_row(name: str, backbone: str, record: Weights) -> Row:
    """A whole model as the row of a table."""
    family = resolve(backbone).family
    return Row(
        name=name,
        family=family.name,
        mixer=family.mixer,
        params=None if record.params is None else record.params / 1e6,
        gmacs=None if record.macs is None else record.macs / 1e9,
        size=record.input_size[1:],
        metrics=dict(record.metrics),
        weights=(name.rpartition(".")[2],),
        license=record.license,
    )


def _dense_cells(row: Row) -> tuple[str, ...]:
    return row.name, rounded(row.params), rounded(row.gmacs), side(row.size), reported(row.metrics), row.license


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        rounded(row.params),
        rounded(row.gmacs),
        side(row.size),
        reported(row.metrics),
        ", ".join(row.weights) or "-",
        row.license or "-",
    )


def _nothing(pattern: str, family: str | None, mixer: str | None, weights: bool) -> str:
    filters = [f"--{name} {value!r}" for name, value in (("family", family), ("mixer", mixer)) if value]
    what = " ".join([f"{'weights match' if weights else 'model matches'} {pattern!r}", *filters])
    hint = nearest(pattern.strip("*?"), vizoo.list_models(family=family, mixer=mixer))
    return f"no {what}; {hint}"


def describe_command(
    name: Annotated[
        str,
        typer.Argument(
            help="A model, `variant` or `variant.tag`, or a name of `vizoo list --task`.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a model: design, stages, counted size, and the published weights with their licence and preprocessing.

    Examples:
        vizoo describe swin_tiny_patch4_window7_224
        vizoo describe swin_base_patch4_window7_224.in22k --json
        vizoo describe mask_rcnn.swin_tiny_patch4_window7_224.coco_3x
    """
    from vizoo.train.dense_weights import is_dense

    if is_dense(name):
        _describe_dense(name, as_json)
        return
    card = vizoo.describe(name)
    if as_json:
        print_json(_card_as_dict(card))
        return
    print_table(
        {card.name: "left", "": "left"},
        [
            ("family", card.family),
            ("mixer", card.mixer),
            ("paper", card.paper),
            ("parameters", f"{card.params / 1e6:.2f} M, counted"),
            ("operations", f"{card.macs / 1e9:.2f} GMACs at {_times(card.img_size)}, counted"),
            ("classes", str(card.num_classes)),
        ],
    )
    config = dataclasses.asdict(card.config)
    print_table({"configuration": "left", "value": "left"}, [(key, str(value)) for key, value in config.items()])
    print_table(
        {"stage": "left", "channels": "right", "stride": "right"},
        [(stage.name, str(stage.channels), str(stage.stride)) for stage in card.stages],
    )
    _print_weights(name.partition(".")[2], card)


def _describe_dense(name: str, as_json: bool) -> None:
    from vizoo.train.dense_weights import find_dense

    found = find_dense(name)
    if as_json:
        print_json({"name": name, **dataclasses.asdict(found), "backbone": found.backbone})
        return
    record = found.weights
    cells = [("task", found.task), ("model", str(found.model["type"])), ("backbone", found.backbone)]
    if record.params is not None:
        cells.append(("parameters", f"{record.params / 1e6:.2f} M"))
    if record.macs is not None:
        cells.append(("operations", f"{record.macs / 1e9:g} GMACs at {_times(record.input_size[1:])}, as published"))
    # Images keep their shape and are not cropped, whatever the record of a classifier would say here.
    cells += [cell for cell in _weights_cells(record) if cell[0] != "input"]
    print_table({name: "left", "": "left"}, cells)


def _times(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _print_weights(tag: str, card: vizoo.Card) -> None:
    chosen = {key: record for key, record in card.weights.items() if tag in ("", key)} or card.weights
    if not chosen:
        say("no weights are published")
    for index, (key, record) in enumerate(chosen.items()):
        default = " (default)" if index == 0 and chosen.keys() == card.weights.keys() else ""
        print_table({f"weights {key}{default}": "left", "": "left"}, _weights_cells(record))


def _weights_cells(record: Weights) -> list[tuple[str, str]]:
    resize = "whole image" if record.crop_mode == "squash" else f"center crop of {record.crop_pct:g}"
    cells = [
        ("url", record.url or "none"),
        ("by hand", record.manual),
        ("sha256", record.sha256 or "not published: the file is unverified"),
        ("licence", record.license),
        ("source", f"{record.repository} {record.commit[:7]}".strip()),
        ("reported", ", ".join(f"{key} {value:g}" for key, value in record.metrics.items()) or "-"),
        ("classes", f"{record.num_classes}{f' ({record.labels})' if record.labels else ''}"),
        ("input", f"{_times(record.input_size[1:])}, {resize}, {record.interpolation}"),
        ("mean, std", f"{record.mean}, {record.std}"),
        ("note", record.note),
    ]
    return [(key, value) for key, value in cells if value]


def _card_as_dict(card: vizoo.Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "family": card.family,
        "mixer": card.mixer,
        "paper": card.paper,
        "config": dataclasses.asdict(card.config),
        "stages": [stage._asdict() for stage in card.stages],
        "img_size": card.img_size,
        "params": card.params,
        "macs": card.macs,
        "num_classes": card.num_classes,
        "weights": {tag: dataclasses.asdict(record) for tag, record in card.weights.items()},
    }
