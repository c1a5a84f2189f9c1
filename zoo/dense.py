"""Backbones as dense models want them: feature maps, a norm per map, the first stages frozen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vizoo.backbones.base import Backbone

from .create import create_model
from .registry import resolve


def create_dense(
    name: str, *, pretrained: bool = False, out_indices: Sequence[int] | None = None, **overrides: Any
) -> Backbone:
    """`create_model` with `features_only`, and with `output_norms` unless the caller says otherwise.

    Args:
        name: `variant` or `variant.tag`.
        pretrained: Load the tag's official weights.
        out_indices: Stages whose maps are returned; None returns all.
        **overrides: Further arguments of `create_model`.
    """
    fields = {field.name for field in dataclasses.fields(resolve(name).variant.config)}
    if "output_norms" in fields:  # not every family's dense code has them
        overrides.setdefault("output_norms", True)
    return create_model(name, pretrained, features_only=True, out_indices=out_indices, **overrides)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms of a backbone, for the caller to keep in eval mode where batches are small."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def freeze(model: Backbone, frozen_stages: int) -> list[nn.Module]:
    """Take the gradients from the stem and the first stages.

    Args:
        model: The backbone.
        frozen_stages: -1 for nothing, 0 for the stem, k for the stem and the first k stages.

    Returns:
        The frozen modules, for the caller to keep in eval mode.

    Raises:
        ValueError: There are not so many stages.
    """
    if not -1 <= frozen_stages <= model.built_stages:
        raise ValueError(
            f"frozen_stages must lie in -1..{model.built_stages} (-1: nothing, 0: the stem, k: k stages as well), "
            f"got {frozen_stages}"
        )
    groups = model.group_matcher(coarse=True)
    blocks = groups["blocks"] if isinstance(groups["blocks"], list) else [(groups["blocks"], None)]

    def is_frozen(path: str) -> bool:
        if re.match(groups["stem"], path):
            return frozen_stages >= 0
        found = next(((m.groups(), ends) for pattern, ends in blocks if (m := re.match(pattern, path))), None)
        return found is not None and int((*found[0], *(found[1] or ()))[0]) < frozen_stages

    for name, parameter in model.named_parameters():
        if is_frozen(name):
            parameter.requires_grad_(False)
    return [module for name, module in model.named_modules() if is_frozen(f"{name}.")]
