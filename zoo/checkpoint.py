"""Loading checkpoints into models: official, timm or our own layout, strictly, with every adaptation reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vizoo.backbones.base import Backbone, CheckpointLayout, Family
from vizoo.weights.adapt import adapt_input_channels, resize_bias_image, resize_bias_table, select_classes
from vizoo.weights.reader import read_state_dict
from vizoo.weights.record import Weights
from vizoo.weights.store import download

from .labels import subset_rows
from .registry import family_of

_SHOWN = 10
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
_PLAIN = CheckpointLayout(name="vizoo", marker="")


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the model it was loaded into."""


@dataclass
class LoadReport:
    """What loading a checkpoint did.

    Attributes:
        source: Where the checkpoint came from.
        layout: Whose parameter names it had.
        loaded: Number of tensors taken over.
        ignored: Official entries that the model computes itself.
        dropped: Entries of parts that this model was built without (classifier, late stages).
        adapted: Parameters that were resized, and how.
        fresh: Parameters that keep their initial values.
    """

    source: str
    layout: str
    loaded: int = 0
    ignored: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded} tensors loaded ({self.layout} layout)"]
        for title, keys in (("ignored, computed by the model", self.ignored), ("dropped, not built", self.dropped)):
            if keys:
                lines.append(f"  {title}: {_some(keys)}")
        lines += [f"  adapted: {key} ({how})" for key, how in self.adapted.items()]
        if self.fresh:
            lines.append(f"  newly initialised: {_some(self.fresh)}")
        return "\n".join(lines)


def _some(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load_checkpoint(model: Backbone, source: str | Path | Weights | Mapping[str, Tensor]) -> LoadReport:
    """Load a checkpoint into a model.

    Names are translated from the layout they are found in. Only what the model was made to differ in is adapted: other
    input channels, other windows (bias tables, bicubic), other classes (the classifier then keeps its initial values,
    or takes the ImageNet-1K rows of an ImageNet-22K one). Everything else must fit.

    Args:
        model: A model of the zoo, or any `Backbone`.
        source: A path, an http(s) address, a weights record, or a state dict.

    Returns:
        What was loaded, adapted, dropped and left.

    Raises:
        CheckpointMismatch: Keys are missing, unexpected or of another shape; at most ten of each are named.
        FileNotFoundError: There is no such file.
        vizoo.weights.store.WeightsError: The download failed, or the file cannot be read as a checkpoint.
    """
    state, title, labels = _read(source)
    family = family_of(model)
    layout = family.layout_of(state) if family else _PLAIN
    report = LoadReport(source=title, layout=layout.name)
    state = _translate(_unwrap(state, model), layout, report)
    target = model.state_dict()
    _drop_unbuilt(state, target, model, report)
    _adapt(state, target, model, family, labels, report)
    _keep_fresh(state, target, model, report)
    _require_fit(state, target, model, title)
    model.load_state_dict(state, strict=True)
    report.loaded = len(target) - len(report.fresh)
    return report


def _read(source: str | Path | Weights | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str]:
    """State dict, title and label set of a source."""
    if isinstance(source, Weights):
        path = download(source)
        return read_state_dict(path, source.container, source.prefix), source.filename, source.labels
    if isinstance(source, Mapping):
        return dict(source), "state dict", ""
    if str(source).startswith(("http://", "https://", "hf://")):
        record = Weights(
            url=str(source),
            license="as at its source",
            repository="",
            commit="",
            input_size=(3, 224, 224),
            num_classes=0,
        )
        return read_state_dict(download(record)), record.filename, ""
    return read_state_dict(Path(source)), Path(source).name, ""


def _unwrap(state: dict[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Strip the prefix of a wrapper (DDP, compile, training) where no key of the model is found without it."""
    own = set(model.state_dict())
    for prefix in _WRAPPERS:
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inner and not own & set(state):
            return _unwrap(inner, model)
    return state


def _translate(state: dict[str, Tensor], layout: CheckpointLayout, report: LoadReport) -> dict[str, Tensor]:
    translated: dict[str, Tensor] = {}
    for key, value in state.items():
        name = layout.translate(key)
        if name is None:
            report.ignored.append(key)
        elif name in translated:
            raise CheckpointMismatch(
                f"{report.source}: two entries are named {name} in the {layout.name} layout, one is {key}"
            )
        else:
            translated[name] = layout.reorder(key, value)
    return translated


def _drop_unbuilt(state: dict[str, Tensor], target: Mapping[str, Tensor], model: Backbone, report: LoadReport) -> None:
    """Remove what the whole model has and this one was built without."""
    if model.num_classes > 0 and not model.features_only:
        return
    make: Callable[..., Backbone] = type(model)
    with torch.device("meta"):
        whole = set(make(model.config, num_classes=1).state_dict())
        if model.features_only:
            whole |= set(make(model.config, features_only=True).state_dict())
    for key in [key for key in state if key in whole and key not in target]:
        report.dropped.append(key)
        del state[key]


def _adapt(
    state: dict[str, Tensor],
    target: Mapping[str, Tensor],
    model: Backbone,
    family: Family | None,
    labels: str,
    report: LoadReport,
) -> None:
    """Resize what differs because the model was made with other channels, windows or classes."""
    report.adapted |= model.adapt_checkpoint(state)
    stem = f"{model.stem_name}.weight"
    for key in [k for k in state if k in target and state[k].shape != target[k].shape]:
        have, want = state[key], target[key]
        if (
            key == stem
            and have.ndim == want.ndim
            and have.shape[0] == want.shape[0]
            and have.shape[2:] == want.shape[2:]
        ):
            state[key] = adapt_input_channels(have, want.shape[1])
            report.adapted[key] = f"{have.shape[1]} to {want.shape[1]} input channels"
        elif family and family.bias_tables and re.search(family.bias_tables, key):
            _adapt_bias_table(state, key, want, report)
    _adapt_classifier(state, target, model, labels, report)


def _adapt_bias_table(state: dict[str, Tensor], key: str, want: Tensor, report: LoadReport) -> None:
    """Resize a table (offsets, heads) or (heads, rows, columns); with other heads it stays, which then does not fit."""
    have = state[key]
    if have.ndim == want.ndim == 3 and have.shape[0] == want.shape[0]:
        state[key] = resize_bias_image(have, want.shape[1:])
    elif have.ndim == want.ndim == 2 and have.shape[1] == want.shape[1]:
        state[key] = resize_bias_table(have, want.shape[0])
    else:
        return
    heads = want.shape[0] if want.ndim == 3 else want.shape[1]
    sizes = (have.numel() // heads, want.numel() // heads)
    report.adapted[key] = f"bias table of {sizes[0]} to {sizes[1]} offsets, bicubic"


def _adapt_classifier(
    state: dict[str, Tensor], target: Mapping[str, Tensor], model: Backbone, labels: str, report: LoadReport
) -> None:
    for name in model.classifier_names:
        _adapt_classes(name, state, target, labels, report)


def _adapt_classes(
    name: str, state: dict[str, Tensor], target: Mapping[str, Tensor], labels: str, report: LoadReport
) -> None:
    weight, bias = f"{name}.weight", f"{name}.bias"
    if not {weight, bias} <= state.keys() & target.keys() or state[weight].shape == target[weight].shape:
        return
    if state[weight].shape[1:] != target[weight].shape[1:]:
        return
    have, want = state[weight].shape[0], target[weight].shape[0]
    if labels == "imagenet-22k" and want == 1000:
        rows = subset_rows("imagenet-22k", "imagenet-1k")
        state[weight], state[bias] = select_classes(state[weight], rows), select_classes(state[bias], rows)
        report.adapted[name] = "the 1000 ImageNet-1K rows of the ImageNet-22K classifier"
        return
    for key in (weight, bias):
        del state[key]
        state[key] = target[key]
        report.fresh.append(key)
    report.adapted[name] = f"{have} to {want} classes: newly initialised"


def _keep_fresh(state: dict[str, Tensor], target: Mapping[str, Tensor], model: Backbone, report: LoadReport) -> None:
    """The norms of a dense version start fresh when the checkpoint is a classifier's."""
    norms = tuple(model.output_norm_name.format(i) + "." for i in range(len(model.stages)))
    if not model.features_only or any(key.startswith(norms) for key in state):
        return
    for key in target:
        if key.startswith(norms):
            state[key] = target[key]
            report.fresh.append(key)


def _require_fit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], model: Backbone, title: str) -> None:
    problems = []
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(target[k].shape)}"
        for k in state
        if k in target and state[k].shape != target[k].shape
    ]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            problems.append(f"{len(keys)} {what}: {_some(keys)}")
    if problems:
        raise CheckpointMismatch(f"{title} does not fit this {type(model).__name__}; {'; '.join(problems)}")
