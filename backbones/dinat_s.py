"""DiNAT_s: Swin's pyramid with neighborhood attention in place of windows, dilated where Swin shifts.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv 2209.15001. Official code:
SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT), `classification/dinats.py`; for dense tasks `detection/`
and `segmentation/`.

What differs from the official code, and why: as for NAT and DiNAT, see `nat.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .base import CheckpointLayout, Family, Variant
from .nat import Dilations, NatConfig, classifier_weights, init_module, make_blocks
from .swin import PatchMerging, Swin, SwinStage


@dataclass(frozen=True, kw_only=True)
class DinatSConfig(NatConfig):
    """Configuration of a DiNAT_s; see `NatConfig` for the other fields.

    Attributes:
        patch_size: Kernel and stride of the stem's convolution; stage i has stride patch_size * 2^i.
    """

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    dilations: Dilations = ((1, 8), (1, 4), (1, 2), 1)
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be positive, got {self.patch_size}")


class DinatS(Swin):
    """DiNAT_s; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    no_decay = r"\.rpb$"

    def _make_stage(self, index: int, rates: Sequence[float]) -> SwinStage:
        is_last = index == self.built_stages - 1
        merging = None if is_last else PatchMerging(self.config.channels[index])
        return SwinStage(make_blocks(self.config, index, rates), merging)

    def _init_module(self, module: nn.Module) -> None:
        init_module(module)


OFFICIAL_LAYOUT = CheckpointLayout(name="official", marker=r"^layers\.\d+\.blocks\.")

_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE: dict[str, Any] = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE: dict[str, Any] = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_AT_384: dict[str, Any] = {"img_size": 384, "dilations": ((1, 13), (1, 6), (1, 3), 1)}

_1K, _22K = "dinat/checkpoints/imagenet1k", "dinat/checkpoints/imagenet22k"
_FT = "in22k_ft_in1k"


def _variant(design: dict[str, Any], path: str, tag: str, top1: float, params: float, gmacs: float) -> Variant:
    config = DinatSConfig(**design)
    record = classifier_weights(
        f"{_1K}/{path}",
        config.image_sides[0],
        top1=top1,
        params=params,
        gmacs=gmacs,
        note=f"the authors' code names this file; their README has {path.replace('_in1k_', '_1k_')}.pth",
    )
    return Variant(config=config, weights={tag: record})


VARIANTS = {
    "dinat_s_tiny": _variant({}, "dinat_s_tiny_in1k_224", "in1k", 81.8, 28, 4.5),
    "dinat_s_small": _variant(_SMALL, "dinat_s_small_in1k_224", "in1k", 83.5, 50, 8.7),
    "dinat_s_base": _variant(_BASE, "dinat_s_base_in1k_224", "in1k", 83.8, 88, 15.4),
    "dinat_s_large": _variant(_LARGE, "dinat_s_large_in1k_224", _FT, 86.5, 197, 34.5),
    "dinat_s_large_384": _variant({**_LARGE, **_AT_384}, "dinat_s_large_in1k_384", _FT, 87.4, 197, 101.5),
    "dinat_s_large_21k": Variant(
        config=DinatSConfig(**{**_LARGE, "drop_path_rate": 0.2}),
        weights={"in22k": classifier_weights(f"{_22K}/dinat_s_large_in22k_224", 224, 21841)},
        num_classes=21841,
    ),
}

FAMILY = Family(
    name="dinat_s",
    model=DinatS,
    config=DinatSConfig,
    variants=VARIANTS,
    mixer="neighborhood attention",
    paper="Dilated Neighborhood Attention Transformer, 2022, arXiv 2209.15001",
    layouts=(OFFICIAL_LAYOUT,),
    bias_tables=r"\.rpb$",
    tiny={
        "img_size": 64,
        "kernel_size": 3,
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 4),
        "dilations": (3, 1, (1, 2), 1),
    },
)
