"""Isotropic NAT, DiNAT and ViT-rpb: blocks of one resolution, with local, dilated or global attention.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv 2209.15001. Official code:
SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT), `classification/isotropic.py`.

What differs from the official code, and why:

- Any image size runs; the official code takes 224 only. Images are padded to whole patches, small maps to the dilated
  neighborhood as in `nat.py`. Global attention on a map of another size takes its bias from the table resized to that
  map, as if the checkpoint had been loaded into a model made for it.
- The index of ViT-rpb's bias table is computed, never stored. Like the tables of neighborhood attention, and unlike
  Swin's, it goes by the key's position minus the query's.
- Four stages of equal size, so that features can be taken from several depths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import window_attention
from vizoo.ops.tracing import known

from .base import (
    Backbone,
    CheckpointLayout,
    Family,
    Stage,
    Variant,
    check_heads,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    make_classifier,
)
from .layers import LayerNorm
from .nat import NatBlock, NeighborhoodAttention, check_kernel, classifier_weights, init_module
from .swin import PatchEmbed


@dataclass(frozen=True, kw_only=True)
class NatIsotropicConfig:
    """Configuration of an isotropic model.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the bias tables of global
            attention; any other size runs as well.
        patch_size: Kernel and stride of the stem's convolution, and stride of every stage.
        embed_dim: Channels.
        depths: Blocks per stage; all stages are alike, so only their sum and where features are taken depends on it.
        num_heads: Attention heads; they divide the channels.
        kernel_size: Side of the neighborhood, in positions, odd; None for global attention.
        dilations: Distance of neighboring positions: a number, or a tuple that the blocks take in turn.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 384
    depths: tuple[int, ...] = (3, 3, 3, 3)
    num_heads: int = 12
    kernel_size: int | None = 7
    dilations: int | tuple[int, ...] = 1
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        if not self.depths or min(*self.depths, self.embed_dim, self.patch_size) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "depths, embed_dim, patch_size and mlp_ratio must be positive, got "
                f"{self.depths}, {self.embed_dim}, {self.patch_size}, {self.mlp_ratio}"
            )
        pattern = self.dilation_pattern
        if not 1 <= len(pattern) <= sum(self.depths) or min(pattern) < 1:
            raise ValueError(
                f"dilations must be a positive number or 1 to {sum(self.depths)} of them, got {self.dilations}"
            )
        if self.kernel_size is not None:
            check_kernel(self.kernel_size)
        elif max(pattern) > 1:
            raise ValueError(f"dilations need a kernel_size; global attention has none, got {self.dilations}")
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads((self.embed_dim,), (self.num_heads,))

    @property
    def dilation_pattern(self) -> tuple[int, ...]:
        """Dilations that the blocks take in turn."""
        return (self.dilations,) if isinstance(self.dilations, int) else tuple(self.dilations)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def map_sides(self) -> tuple[int, int]:
        """Rows and columns of patches of that image."""
        height, width = self.image_sides
        return -(-height // self.patch_size), -(-width // self.patch_size)


def relative_position_index(rows: int, columns: int, device: torch.device) -> Tensor:
    """Entry of the flattened bias table for every (query, key) pair of a map.

    Returns:
        (N, N) int64 for N = rows * columns positions; entry = (dy + rows - 1) * (2 columns - 1) + dx + columns - 1 with
        (dy, dx) the key's position minus the query's.
    """
    position = torch.arange(rows * columns, device=device)
    y, x = position // columns, position % columns
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


class GlobalAttention(nn.Module):
    """Multi-head attention between all positions of a map, with a bias per head and offset.

    Args:
        channels: Channels of the map.
        heads: Attention heads.
        sides: Rows and columns of the map that the bias table is for.
    """

    def __init__(self, channels: int, heads: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * sides[0] - 1, 2 * sides[1] - 1))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def bias(self, rows: int, columns: int) -> Tensor:
        """Position bias (heads, N, N) of a map of N = rows * columns positions."""
        table: Tensor = self.rpb
        size = (2 * rows - 1, 2 * columns - 1)
        if not all(known(have == want) for have, want in zip(table.shape[1:], size, strict=True)):
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
        index = relative_position_index(rows, columns, table.device)
        return table.flatten(1).gather(1, index.flatten().expand(self.heads, -1)).view(self.heads, *index.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width, channels = x.shape[1:]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, channels // self.heads))
        # One window that covers the map.
        out = window_attention(qkv, self.bias(height, width), window=(height, width))
        return self.proj(out.flatten(3))


class NatIsotropic(Backbone):
    """Isotropic NAT, DiNAT or ViT-rpb; see the module's docstring for the paper and for what differs.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"\.rpb$"
    stem_name = "patch_embed.proj"

    def __init__(self, config: NatIsotropicConfig, **kwargs: Any) -> None:
        ends = [sum(config.depths[: i + 1]) for i in range(len(config.depths))]
        stages = [Stage(f"layers.{end - 1}", config.embed_dim, config.patch_size) for end in ends]
        super().__init__(config, stages, **kwargs)
        self.ends = ends
        (rates,) = drop_path_rates(config.drop_path_rate, [sum(config.depths)])
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.patch_size)
        built = ends[self.built_stages - 1]
        self.layers = nn.ModuleList(self._make_block(i, rate) for i, rate in enumerate(rates[:built]))
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(init_module)

    def _make_block(self, index: int, rate: float) -> NatBlock:
        config, pattern = self.config, self.config.dilation_pattern
        attention: nn.Module
        if config.kernel_size is None:
            attention = GlobalAttention(config.embed_dim, config.num_heads, config.map_sides)
        else:
            dilation = pattern[index % len(pattern)]
            attention = NeighborhoodAttention(config.embed_dim, config.num_heads, config.kernel_size, dilation)
        return NatBlock(config.embed_dim, attention, config.mlp_ratio, rate)

    def _blocks(self, stage: int) -> range:
        """Numbers of the blocks of a stage."""
        return range(self.ends[stage] - self.config.depths[stage], self.ends[stage])

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """A part of the blocks; see `Backbone`."""
        return self.run_blocks([self.layers[i] for i in self._blocks(index)], x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Nothing: all stages have one resolution."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, or per stage."""
        if not coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        blocks = ["|".join(map(str, self._blocks(i))) for i in range(len(self.stages))]
        return {
            "stem": r"^patch_embed",
            "blocks": [(rf"^layers\.(?:{numbers})\.", (i,)) for i, numbers in enumerate(blocks)],
        }


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official", marker=r"^layers\.\d+\.attn\.rpb$", ignored=(r"relative_position_index$",)
)

_BASE: dict[str, Any] = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}
_DILATED: dict[str, Any] = {"dilations": (1, 2)}
_GLOBAL: dict[str, Any] = {"kernel_size": None}


def _variant(name: str, top1: float, params: float, gmacs: float, **design: Any) -> Variant:
    path = f"dinat/checkpoints/isotropic/{name}_in1k_224"
    record = classifier_weights(path, top1=top1, params=params, gmacs=gmacs)
    return Variant(config=NatIsotropicConfig(**design), weights={"in1k": record})


# The authors print 86 million parameters for the 86.6 of vitrpb_base.
_ROWS: tuple[tuple[str, float, float, float, dict[str, Any]], ...] = (
    ("dinat_isotropic_small", 80.8, 22, 4.3, _DILATED),
    ("dinat_isotropic_base", 82.1, 86, 16.9, {**_BASE, **_DILATED}),
    ("nat_isotropic_small", 80.0, 22, 4.3, {}),
    ("nat_isotropic_base", 81.6, 86, 16.9, _BASE),
    ("vitrpb_small", 81.2, 22, 4.6, _GLOBAL),
    ("vitrpb_base", 82.5, 86.6, 17.5, {**_BASE, **_GLOBAL}),
)

VARIANTS = {name: _variant(name, top1, params, gmacs, **design) for name, top1, params, gmacs, design in _ROWS}

FAMILY = Family(
    name="nat_isotropic",
    model=NatIsotropic,
    config=NatIsotropicConfig,
    variants=VARIANTS,
    mixer="neighborhood attention",
    paper="Dilated Neighborhood Attention Transformer, 2022, arXiv 2209.15001",
    layouts=(OFFICIAL_LAYOUT,),
    bias_tables=r"\.rpb$",
    tiny={"img_size": 64, "patch_size": 8, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": 2},
)
