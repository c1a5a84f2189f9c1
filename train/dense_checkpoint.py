"""Whole checkpoints of detectors and segmenters in OpenMMLab's layout: open, split into parts, load each strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import vizoo
from vizoo.checkpoint import CheckpointMismatch, LoadReport
from vizoo.weights.reader import read_state_dict
from vizoo.weights.record import Weights
from vizoo.weights.store import download

ROOTS = ("backbone", "neck", "rpn_head", "roi_head", "bbox_head", "decode_head", "auxiliary_head")
CONTAINERS = ("state_dict", "model")

Source = str | Path | Weights | Mapping[str, Any]
_SHOWN = 10
_COUNTER = "num_batches_tracked"


def read_source(source: Source) -> tuple[dict[str, Any], str]:
    """The entries of a checkpoint, and how to call it in messages.

    Args:
        source: A path, an http(s) address, a weights record, or a state dict, in a container or not.

    Raises:
        FileNotFoundError: There is no such file.
        vizoo.weights.store.WeightsError: The download failed, or the file cannot be read as a checkpoint.
    """
    if isinstance(source, Weights):
        return read_state_dict(download(source)), source.filename
    if isinstance(source, Mapping):
        return dict(source), "state dict"
    if str(source).startswith(("http://", "https://", "hf://")):
        record = Weights(
            url=str(source), license="as at its source", repository="", commit="", input_size=(3, 0, 0), num_classes=0
        )
        return read_state_dict(download(record)), record.filename
    return read_state_dict(Path(source)), Path(source).name


def split_roots(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part of the model they belong to, without the part's name.

    Args:
        state: A state dict whose keys start with one of `ROOTS`; in a container `state_dict` or `model`, and below
            `module.` of a distributed run, where it is found so.

    Returns:
        `{"backbone": {"patch_embed.proj.weight": ...}, ...}`, with the parts that the checkpoint has.

    Raises:
        CheckpointMismatch: A key belongs to none of the parts.
    """
    for container in CONTAINERS:
        if isinstance(state.get(container), Mapping):
            return split_roots(state[container])
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in state.items():
        root, _, name = key.removeprefix("module.").partition(".")
        if root in ROOTS and name:
            parts.setdefault(root, {})[name] = value
        else:
            strange.append(key)
    if strange or not parts:
        raise CheckpointMismatch(
            f"keys of a whole detector or segmenter start with one of {', '.join(ROOTS)}; "
            f"{len(strange)} do not: {_some(strange) or 'there are none at all'}"
        )
    return parts


def load_part(
    module: nn.Module,
    state: Mapping[str, Tensor],
    renames: Sequence[tuple[str, str]] = (),
    prefix: str = "",
    classifiers: Sequence[str] = (),
) -> LoadReport:
    """Load one part of a checkpoint into its module, strictly.

    Args:
        module: The part.
        state: Its tensors, as `split_roots` gives them.
        renames: (pattern, replacement) pairs from the checkpoint's names to the module's; all that match are applied,
            in order.
        prefix: The part's name in messages and in the report.
        classifiers: Layers that keep their initial values where the checkpoint has another number of classes.

    Returns:
        What was loaded and left. Batch counters that the checkpoint lacks stay as they are, which nothing depends on.

    Raises:
        CheckpointMismatch: Keys are missing, unexpected or of another shape; at most ten of each are named.
    """
    target = module.state_dict()
    report = LoadReport(source=prefix or type(module).__name__, layout="official")
    found = _rename(state, renames, report.source)
    for key in target:
        if key.endswith(_COUNTER):
            found.setdefault(key, target[key])
    _keep_classifiers(found, target, classifiers, report)
    _require_fit(found, target, report.source, type(module).__name__)
    module.load_state_dict(found, strict=True)
    report.loaded = len(target) - len(report.fresh)
    return report


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Load the backbone's part: a model of the zoo by its family's layouts, any other by its own names."""
    if isinstance(backbone, vizoo.Backbone):
        return vizoo.load_checkpoint(backbone, state)
    return load_part(backbone, state, prefix="backbone")


def merge_reports(source: str, parts: Mapping[str, LoadReport], dropped: Sequence[str] = ()) -> LoadReport:
    """One report of a whole model, its keys below the names of their parts.

    Args:
        source: Where the checkpoint came from.
        parts: Report of each part by name.
        dropped: Parts of the checkpoint that the model was built without.
    """
    layouts = list(dict.fromkeys(part.layout for part in parts.values()))
    whole = LoadReport(source=source, layout=" and ".join(layouts), dropped=[f"{root}.*" for root in dropped])
    for root, part in parts.items():
        whole.loaded += part.loaded
        for name in ("ignored", "dropped", "fresh"):
            getattr(whole, name).extend(f"{root}.{key}" for key in getattr(part, name))
        whole.adapted.update({f"{root}.{key}": how for key, how in part.adapted.items()})
    return whole


def _rename(state: Mapping[str, Tensor], renames: Sequence[tuple[str, str]], title: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise CheckpointMismatch(f"{title}: two entries are named {name}, one is {key}")
        found[name] = value
    return found


def _keep_classifiers(
    state: dict[str, Tensor], target: Mapping[str, Tensor], classifiers: Sequence[str], report: LoadReport
) -> None:
    """Leave out classifiers whose first axis, the classes, is all that differs."""
    for name in classifiers:
        own = [key for key in target if key.startswith(f"{name}.")]
        if not own or not all(key in state and state[key].shape[1:] == target[key].shape[1:] for key in own):
            continue
        have, want = len(state[own[0]]), len(target[own[0]])
        if have != want:
            report.adapted[name] = f"{have} to {want} classes: newly initialised"
            report.fresh.extend(own)
            state.update({key: target[key] for key in own})


def _require_fit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], title: str, model: str) -> None:
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(target[key].shape)}"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in found.items() if keys]
    if problems:
        raise CheckpointMismatch(f"{title} does not fit this {model}; {'; '.join(problems)}")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
