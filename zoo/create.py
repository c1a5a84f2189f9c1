"""From a name to a model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vizoo.backbones.base import Backbone, override

from .checkpoint import load_checkpoint
from .registry import Resolved, resolve


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    checkpoint_path: str | Path | None = None,
    **overrides: Any,
) -> Backbone:
    """Build a backbone.

    Args:
        name: `variant` or `variant.tag`, as `vizoo.list_models()` prints them.
        pretrained: Load the tag's official weights (the variant's default tag if none is named).
        num_classes: Outputs of the classifier, 0 for pooled features; None takes the weights' own, 1000 without.
        in_chans: Channels of the input image; a pretrained stem is adapted.
        features_only: `model(x)` returns a list of feature maps (B, C, H / stride, W / stride).
        out_indices: Stages returned with `features_only`; None returns all.
        drop_path_rate: Stochastic depth of the last block; None keeps the variant's.
        checkpoint_path: A checkpoint file to load instead of the official weights.
        **overrides: Fields of the family's configuration, such as `img_size` or `window_size`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: Unknown name or tag, or values that cannot go together.
        TypeError: An override that the configuration does not have; names the nearest.
    """
    found = resolve(name)
    if pretrained and checkpoint_path is not None:
        raise ValueError("pretrained=True and checkpoint_path exclude each other; pass one of them")
    if pretrained and found.weights is None:
        raise ValueError(f"no weights are published for {found.name}; pass checkpoint_path, or pretrained=False")
    if drop_path_rate is not None:
        overrides["drop_path_rate"] = drop_path_rate
    config = override(found.variant.config, _known(overrides))
    is_dense = features_only or getattr(config, "output_norms", False)
    if is_dense and num_classes:
        raise ValueError(f"a model that returns feature maps has no classifier, got num_classes={num_classes}")
    model = found.family.build(
        config,
        num_classes=_classes(found, num_classes, pretrained),
        in_chans=in_chans,
        features_only=is_dense,
        out_indices=out_indices,
    )
    model.weights_record = found.weights
    if pretrained and found.weights is not None:
        load_checkpoint(model, found.weights)
    elif checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


_ARGUMENTS = (
    "num_classes",
    "in_chans",
    "features_only",
    "out_indices",
    "drop_path_rate",
    "checkpoint_path",
    "pretrained",
)


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, unless one is a misspelt argument of `create_model` itself."""
    for name in overrides:
        close = difflib.get_close_matches(name, _ARGUMENTS, n=1, cutoff=0.85)
        if close and name != close[0]:
            raise TypeError(f"create_model() has no argument {name!r}; did you mean {close[0]!r}?")
    return overrides


def _classes(found: Resolved, num_classes: int | None, pretrained: bool) -> int:
    if num_classes is not None:
        return num_classes
    if found.weights is not None and (pretrained or found.explicit_tag):
        return found.weights.num_classes
    return found.variant.num_classes
