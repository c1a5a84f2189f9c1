"""What is known of a model: its design, its size as counted here, and its published checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vizoo.backbones.base import Backbone, Stage
from vizoo.weights.record import Weights

from .registry import resolve


@dataclass(frozen=True)
class Card:
    """Description of one variant.

    Attributes:
        name: The variant.
        family: Its family.
        mixer: Kind of token mixer.
        paper: Title, venue and arXiv number.
        config: The family's configuration.
        stages: Name, channels and stride of each stage.
        img_size: Height and width the counts are for.
        params: Parameters of the default model.
        macs: Multiply-accumulate operations of matrix products and convolutions for one image.
        num_classes: Classes of the default model.
        weights: Published checkpoints by tag; the first is the default.
    """

    name: str
    family: str
    mixer: str
    paper: str
    config: Any
    stages: tuple[Stage, ...]
    img_size: tuple[int, int]
    params: int
    macs: int
    num_classes: int
    weights: Mapping[str, Weights]

    @property
    def default_weights(self) -> Weights | None:
        """The checkpoint that `pretrained=True` takes."""
        return next(iter(self.weights.values()), None)


@functools.cache
def describe(name: str) -> Card:
    """Describe a variant; parameters and operations are counted on the meta device, without allocating the model.

    Raises:
        ValueError: There is no such variant; names the nearest.
    """
    found = resolve(name)
    variant, family = found.variant, found.family
    with torch.device("meta"):
        model = family.build(
            variant.config,
            num_classes=variant.num_classes,
            features_only=getattr(variant.config, "output_norms", False),
        ).eval()
    height, width = model.default_cfg["input_size"][1:]
    return Card(
        name=found.name,
        family=family.name,
        mixer=family.mixer,
        paper=family.paper,
        config=variant.config,
        stages=model.stages,
        img_size=(height, width),
        params=count_params(model),
        macs=count_macs(model, height, width),
        num_classes=variant.num_classes,
        weights=variant.weights,
    )


def count_params(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: Backbone, height: int, width: int) -> int:
    """Multiply-accumulate operations of matrix products and convolutions for one image, on the model's own device.

    Softmax, norms, activations and additions are not counted, as is the field's custom.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    image = torch.empty(1, model.in_chans, height, width, device=device)
    # The fused attention of a CPU is not counted; its plain form does the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2
