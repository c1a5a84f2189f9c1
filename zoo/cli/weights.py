"""`vizoo weights`: what is published, what the cache holds, and how to fill it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vizoo
from vizoo.registry import resolve
from vizoo.weights.cache import cache_dir, is_cached, path_of, verify
from vizoo.weights.record import Weights
from vizoo.weights.store import download, import_file

from .help import command
from .output import note, print_json, print_table, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="VIZOO_HOME chooses the folder of the cache, VIZOO_OFFLINE=1 forbids downloads, "
    "VIZOO_ACCEPT_UNSTATED_LICENSES=1 accepts weights that state no licence.",
)

Name = Annotated[
    str,
    typer.Argument(help="A model, `variant` or `variant.tag`, or a name of `vizoo list --task`.", show_default=False),
]
Accept = Annotated[bool, typer.Option("--accept-license", help="Accept weights that state no licence.")]


@app.callback()
def weights_command() -> None:
    """List, download, verify and import published checkpoints."""


@command(app, "list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern; without a wildcard it matches anywhere.")] = "*",
    cached: Annotated[bool, typer.Option("--cached", help="Only what the cache holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List published checkpoints of backbones, detectors and segmenters, and which of them the cache holds.

    Examples:
        vizoo weights list
        vizoo weights list 'swin_base*' --json
        vizoo weights list mask_rcnn
        vizoo weights list --cached
    """
    records = _records(pattern)
    if not records:
        raise ValueError(f"no weights match {pattern!r}; `vizoo weights list` shows all")
    found = [(name, record) for name, record in records.items() if not cached or is_cached(record)]
    if as_json:
        print_json([_as_dict(name, record) for name, record in found])
        return
    columns = {"weights": "left", "licence": "left", "sha256": "left", "cached": "left", "url": "left"}
    print_table(columns, [_cells(name, record) for name, record in found])
    note(f"{len(found)} checkpoints; the cache is {cache_dir()}")


def _cells(name: str, record: Weights) -> tuple[str, ...]:
    known, cached = ("yes" if value else "no" for value in (record.sha256, is_cached(record)))
    return name, record.license, known, cached, record.url or "by hand"


def _as_dict(name: str, record: Weights) -> dict[str, object]:
    return {
        "name": name,
        "url": record.url,
        "sha256": record.sha256,
        "license": record.license,
        "cached": is_cached(record),
        "path": str(path_of(record)),
    }


@command(app, "download")
def download_command(
    names: Annotated[list[str], typer.Argument(help="Models, `variant` or `variant.tag`.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Download although the cached file is fine.")] = False,
    accept_license: Accept = False,
) -> None:
    """Download checkpoints into the cache, checked, and print where they are.

    Example:
        vizoo weights download swin_tiny_patch4_window7_224 swin_base_patch4_window7_224.in22k
    """
    records = [_record(name) for name in names]
    for record in records:
        say(str(download(record, force=force, accept_license=accept_license)))


@command(app, "verify")
def verify_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models; everything in the cache by default.", show_default=False)
    ] = None,
) -> None:
    """Hash cached files and compare them with what is published. Changes nothing; exit code 1 if one is not fine.

    Examples:
        vizoo weights verify
        vizoo weights verify swin_tiny_patch4_window7_224
    """
    chosen = names or [name for name, record in _records().items() if path_of(record).exists()]
    if not chosen:
        note(f"the cache {cache_dir()} holds no weights")
        return
    found = [(name, verify(_record(name))) for name in chosen]
    columns = {"weights": "left", "state": "left", "what was found": "left"}
    print_table(columns, [(name, result.state, result.detail) for name, result in found])
    bad = [name for name, result in found if not result.ok]
    if bad:
        raise ValueError(f"{len(bad)} of {len(found)} files cannot be used: {', '.join(bad)}")


@command(app, "import")
def import_command(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file that was fetched by hand.", show_default=False)],
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Convert it by running what code it asks for. Trusted authors only."),
    ] = False,
    accept_license: Accept = False,
) -> None:
    """Put a file that was fetched by hand into the cache, after the checks of a download.

    A file of a whole detector or segmenter must also load into its model, with nothing missing or left over.

    Examples:
        vizoo weights import swin_tiny_patch4_window7_224 ~/Downloads/swin_tiny_patch4_window7_224.pth
        vizoo weights import mask_rcnn.swin_tiny_patch4_window7_224.coco_3x mask_rcnn_swin_tiny_patch4_window7.pth
    """
    from vizoo.train.dense_weights import find_dense, is_dense

    check = find_dense(name).load if is_dense(name) else None
    say(str(import_file(_record(name), file, trust=trust, accept_license=accept_license, check=check)))


@command(app, "path")
def path_command(
    name: Annotated[
        str | None, typer.Argument(help="A model; the folder of the cache by default.", show_default=False)
    ] = None,
) -> None:
    """Print where the cache keeps a checkpoint, whether it is there or not.

    Example:
        ls -l $(vizoo weights path swin_tiny_patch4_window7_224)
    """
    say(str(cache_dir() if name is None else path_of(_record(name))))


def _records(pattern: str = "*") -> dict[str, Weights]:
    """Everything that is published, by name: checkpoints of backbones, then of whole models."""
    from vizoo.train.dense_weights import list_dense

    found = {name: _record(name) for name in vizoo.list_models(pattern, pretrained=True)}
    return found | {record.name: record.weights for record in list_dense(pattern)}


def _record(name: str) -> Weights:
    from vizoo.train.dense_weights import find_dense, is_dense

    if is_dense(name):
        return find_dense(name).weights
    record = resolve(name).weights
    if record is None:
        raise ValueError(f"no weights are published for {name}; `vizoo list --weights` shows those there are")
    return record
