"""Loading whole detectors: official checkpoints of both layouts, and our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vizoo.checkpoint import CheckpointMismatch, LoadReport
from vizoo.train.dense_checkpoint import (
    CONTAINERS,
    Source,
    load_backbone,
    load_part,
    merge_reports,
    read_source,
    split_roots,
)

from .adapter import NAMES, VitAdapter
from .detector import Detector


def load_detector_checkpoint(model: Detector, source: Source) -> LoadReport:
    """Load a whole detector, strictly: every parameter must be found, and nothing may be left over.

    The backbone's part is read in any layout that its family knows, the neck and heads in the official one or ours.

    Args:
        model: The detector.
        source: A path, an http(s) address, a weights record, or a state dict; `state_dict` containers and a leading
            `module.` are taken off.

    Returns:
        What was loaded, and what was adapted.

    Raises:
        CheckpointMismatch: Something is missing, left over or of another shape; at most ten keys of each are named.
        FileNotFoundError: There is no such file.
        vizoo.weights.errors.WeightsError: The file cannot be fetched or read.
    """
    entries, title = read_source(source)
    entries = _open(entries)
    own = {key for key in model.state_dict() if not key.startswith("backbone.")}  # some backbones' names are official
    if own & set(entries):
        report = load_part(model, entries)
        report.source, report.layout = title, "vizoo"
        return report
    parts = split_roots(entries)
    if "backbone" not in parts:
        raise CheckpointMismatch(f"{title} holds no backbone, only {', '.join(parts)}; it is no whole detector")
    heads = {
        f"{root}.{key}": value for root, part in parts.items() if root != "backbone" for key, value in part.items()
    }
    if model.adapter is not None:
        heads |= _take_adapter(parts["backbone"], model.adapter)
    reports = {"heads": load_part(_heads(model), heads, model.official_keys, prefix=f"{title} (neck and heads)")}
    reports["backbone"] = load_backbone(model.backbone, parts["backbone"])
    if reports["backbone"].fresh:
        raise CheckpointMismatch(f"{title} lacks parts of the backbone: {', '.join(reports['backbone'].fresh)}")
    return merge_reports(title, reports)


def _take_adapter(backbone: dict[str, Tensor], adapter: VitAdapter) -> dict[str, Tensor]:
    """Move an adapter's entries out of the backbone's; those of maps that this one does not make are left out."""
    found = {name: backbone.pop(name) for name in list(backbone) if NAMES.match(name)}
    return {f"adapter.{name}": value for name, value in found.items() if not adapter.is_unused(name)}


def _open(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict inside containers, without the prefix of a distributed run."""
    for container in CONTAINERS:
        if isinstance(entries.get(container), Mapping):
            return _open(entries[container])
    return {key.removeprefix("module."): value for key, value in entries.items()}


def _heads(model: Detector) -> nn.ModuleDict:
    """Everything with weights beside the backbone."""
    return nn.ModuleDict(
        {name: child for name, child in model.named_children() if name != "backbone" and child.state_dict()}
    )
