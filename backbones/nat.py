"""NAT and DiNAT: a pyramid whose attention sees the nearest positions of every position, dilated in every other block.

Papers: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; Hassani and Shi, "Dilated
Neighborhood Attention Transformer", 2022, arXiv 2209.15001. Official code: SHI-Labs/Neighborhood-Attention-Transformer
at d334f5b (MIT), `classification/nat.py` and `dinat.py`; for dense tasks `detection/` and `segmentation/`.

What differs from the official code, and why:

- One class serves NAT and DiNAT, classification and dense tasks. Only dilations tell NAT and DiNAT apart; checkpoints
  do not hold them, so they come from the variant, and dense recipes pass others (`dilations`).
- A map that is smaller than a dilated neighborhood is padded behind the block's first norm, at the bottom and right, as
  by the operator that these models were trained with (NATTEN 0.14); later releases of it refuse such maps. What is
  padded is attended like anything else.
- The operator is the library's own: no released NATTEN has the position bias any more that all these weights need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from vizoo.ops import neighborhood_attention
from vizoo.weights.record import Weights

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
    init_linear,
    make_classifier,
)
from .layers import DropPath, LayerNorm, Mlp, crop, larger, zero_pad

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""

Dilations = int | tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class NatConfig:
    """Configuration of a NAT or DiNAT.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dim: Channels of the first stage; doubled at every further one.
        depths: Blocks per stage.
        num_heads: Attention heads per stage; they divide the stage's channels.
        kernel_size: Side of the neighborhood, in positions; odd.
        dilations: Distance of neighboring positions: one number, or one entry per stage, each a number or a tuple that
            the blocks of the stage take in turn, from its beginning again where it ends.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        layer_scale: First value of the learned factors of each residual branch; None builds none.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: Dilations = 1
    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    drop_path_rate: float = 0.2
    output_norms: bool = False

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ValueError(f"depths and num_heads need one entry per stage, got {self.depths} and {self.num_heads}")
        if min(self.depths) < 1 or self.embed_dim < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "depths, embed_dim and mlp_ratio must be positive, got "
                f"{self.depths}, {self.embed_dim}, {self.mlp_ratio}"
            )
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim must be even, for the stem halves it, got {self.embed_dim}")
        if self.layer_scale is not None and self.layer_scale <= 0:
            raise ValueError(f"layer_scale must be positive, or None for none, got {self.layer_scale}")
        check_kernel(self.kernel_size)
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.channels, self.num_heads)
        block_dilations(self.dilations, self.depths)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


def check_kernel(kernel_size: int) -> None:
    """A neighborhood has a middle.

    Raises:
        ValueError: The side is even or below 3; names the nearest that is not.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and at least 3, got {kernel_size}; nearest valid: {max(3, kernel_size + 1)}"
        )


def block_dilations(dilations: Dilations, depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Dilation of every block, per stage.

    Args:
        dilations: As in `NatConfig`.
        depths: Blocks per stage.

    Raises:
        ValueError: Not one entry per stage, no dilation or more of them than blocks in an entry, or one below 1.
    """
    entries = (dilations,) * len(depths) if isinstance(dilations, int) else dilations
    if len(entries) != len(depths):
        raise ValueError(f"dilations needs one number, or one entry per stage ({len(depths)}), got {dilations}")
    patterns = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in entries]
    for pattern, depth in zip(patterns, depths, strict=True):
        if not 1 <= len(pattern) <= depth:
            raise ValueError(
                f"dilations of a stage of {depth} blocks must be a number or 1 to {depth} of them, got {pattern}"
            )
        if min(pattern) < 1:
            raise ValueError(f"dilations must be at least 1, got {pattern}")
    return tuple(tuple(islice(cycle(p), depth)) for p, depth in zip(patterns, depths, strict=True))


class NeighborhoodAttention(nn.Module):
    """Multi-head attention to the kernel_size x kernel_size nearest positions, with a bias per head and offset.

    Args:
        channels: Channels of the map.
        heads: Attention heads.
        kernel_size: Side of the neighborhood.
        dilation: Distance of neighboring positions.
    """

    def __init__(self, channels: int, heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width, channels = x.shape[1:]
        reach = self.kernel_size * self.dilation
        x = zero_pad(x, 0, 0, 0, larger(width, reach) - width, 0, larger(height, reach) - height)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, channels // self.heads))
        out = neighborhood_attention(qkv, kernel_size=self.kernel_size, dilation=self.dilation, bias=self.rpb)
        return self.proj(crop(out.flatten(3), height, width))

    def extra_repr(self) -> str:
        """Neighborhood, for printing."""
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}"


class NatBlock(nn.Module):
    """Pre-norm block: attention and an MLP, each on a residual branch, which learned factors may scale."""

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self, channels: int, attention: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = attention
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        for name in ("gamma1", "gamma2"):
            factors = None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
            self.register_parameter(name, factors)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))


def scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """The map (..., C) times factors (C,), if there are any."""
    return x if factors is None else factors * x


class Stem(nn.Module):
    """Two convolutions of stride 2 with nothing between them, then a norm."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, channels // 2, 3, 2, padding=1), nn.Conv2d(channels // 2, channels, 3, 2, padding=1)
        )
        self.norm = LayerNorm(channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/4), ceil(W/4), C)."""
        x = x.contiguous(memory_format=torch.channels_last)  # so the map comes as (B, H, W, C)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Halve the map and double its channels by an overlapping convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1, bias=False)
        self.norm = LayerNorm(2 * channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    """Blocks of one resolution, and the convolution that leads to the next one."""

    downsample: nn.Module

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample


class Nat(Backbone):
    """NAT or DiNAT; see the module's docstring for the papers and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"\.rpb$"
    stem_name = "patch_embed.proj.0"

    def __init__(self, config: NatConfig, **kwargs: Any) -> None:
        stages = [Stage(f"levels.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.patch_embed = Stem(self.in_chans, config.embed_dim)
        self.levels = nn.ModuleList(self._make_level(i, rates[i]) for i in range(self.built_stages))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(init_module)

    def _make_level(self, index: int, rates: Sequence[float]) -> Level:
        is_last = index == self.built_stages - 1
        blocks = make_blocks(self.config, index, rates)
        return Level(blocks, None if is_last else Downsample(self.config.channels[index]))

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(Level, self.levels[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Convolution in front of stage `index`; see `Backbone`."""
        return cast(Level, self.levels[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^levels\.(\d+)", None)]}
        downsample = [(rf"^levels\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*downsample, (r"^levels\.(\d+)\.blocks\.(\d+)", None)]}


def make_blocks(config: NatConfig, stage: int, rates: Sequence[float]) -> list[NatBlock]:
    """The blocks of a stage, whose drop path rates are given."""
    channels, heads = config.channels[stage], config.num_heads[stage]
    dilations = block_dilations(config.dilations, config.depths)[stage]
    return [
        NatBlock(
            channels,
            NeighborhoodAttention(channels, heads, config.kernel_size, dilation),
            config.mlp_ratio,
            rate,
            config.layer_scale,
        )
        for dilation, rate in zip(dilations, rates, strict=True)
    ]


def init_module(module: nn.Module) -> None:
    """First values of one module of these models; convolutions keep PyTorch's own."""
    if isinstance(module, nn.Linear):
        init_linear(module)
    elif isinstance(getattr(module, "rpb", None), nn.Parameter):
        nn.init.normal_(cast(Tensor, module.rpb), std=0.02)  # published: truncated at 100 standard deviations


OFFICIAL_LAYOUT = CheckpointLayout(name="official", marker=r"^levels\.\d+\.blocks\.")

FILES = "https://shi-labs.com/projects"


def classifier_weights(
    path: str,
    size: int = 224,
    num_classes: int = 1000,
    *,
    top1: float | None = None,
    params: float | None = None,
    gmacs: float | None = None,
    **facts: Any,
) -> Weights:
    """Record of one of the authors' checkpoints; `params` in millions. At 384 the authors evaluate without a margin."""
    return Weights(
        url=f"{FILES}/{path}.pth",
        license="MIT",
        repository="SHI-Labs/Neighborhood-Attention-Transformer",
        commit="d334f5bb0bd73cad05e5aeaf7c14cce3876a9650",
        input_size=(3, size, size),
        crop_pct=1.0 if size == 384 else 0.875,
        num_classes=num_classes,
        labels="imagenet-1k" if num_classes == 1000 else "imagenet-22k",
        metrics={} if top1 is None else {"top1": top1},
        params=None if params is None else int(params * 1e6),
        macs=None if gmacs is None else gmacs * 1e9,
        **facts,
    )


_TINY: dict[str, Any] = {"depths": (3, 4, 18, 5)}
_SMALL: dict[str, Any] = {
    **_TINY,
    "embed_dim": 96,
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.3,
}
_BASE: dict[str, Any] = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE: dict[str, Any] = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_SCALED: dict[str, Any] = {"layer_scale": 1e-5}
_DILATED: dict[str, Any] = {"dilations": ((1, 8), (1, 4), (1, 2), 1)}
_AT_384: dict[str, Any] = {"img_size": 384, "dilations": ((1, 13), (1, 6), (1, 3), 1)}
_AT_384_BY_11: dict[str, Any] = {"img_size": 384, "kernel_size": 11, **_DILATED}

_NAT, _1K, _22K = "nat/checkpoints/CLS", "dinat/checkpoints/imagenet1k", "dinat/checkpoints/imagenet22k"
_FT = "in22k_ft_in1k"


def _variant(design: dict[str, Any], path: str, tag: str, top1: float, params: float, gmacs: float) -> Variant:
    config = NatConfig(**design)
    record = classifier_weights(path, config.image_sides[0], top1=top1, params=params, gmacs=gmacs)
    return Variant(config=config, weights={tag: record})


def _pretrained(design: dict[str, Any], path: str, **facts: Any) -> Variant:
    config = NatConfig(**{**design, "drop_path_rate": 0.2})
    return Variant(config=config, weights={"in22k": classifier_weights(path, 224, 21841, **facts)}, num_classes=21841)


# The authors print 200 million parameters for 200.9.
VARIANTS = {
    "nat_mini": _variant({}, f"{_NAT}/nat_mini", "in1k", 81.8, 20, 2.7),
    "nat_tiny": _variant(_TINY, f"{_NAT}/nat_tiny", "in1k", 83.2, 28, 4.3),
    "nat_small": _variant({**_SMALL, **_SCALED}, f"{_NAT}/nat_small", "in1k", 83.7, 51, 7.8),
    "nat_base": _variant({**_BASE, **_SCALED}, f"{_NAT}/nat_base", "in1k", 84.3, 90, 13.7),
    "dinat_mini": _variant(_DILATED, f"{_1K}/dinat_mini_in1k_224", "in1k", 81.8, 20, 2.7),
    "dinat_tiny": _variant({**_TINY, **_DILATED}, f"{_1K}/dinat_tiny_in1k_224", "in1k", 82.7, 28, 4.3),
    "dinat_small": _variant({**_SMALL, **_DILATED}, f"{_1K}/dinat_small_in1k_224", "in1k", 83.8, 51, 7.8),
    "dinat_base": _variant({**_BASE, **_DILATED, **_SCALED}, f"{_1K}/dinat_base_in1k_224", "in1k", 84.4, 90, 13.7),
    "dinat_large": _variant({**_LARGE, **_DILATED}, f"{_1K}/dinat_large_in22k_in1k_224", _FT, 86.6, 201, 30.6),
    "dinat_large_384": _variant({**_LARGE, **_AT_384}, f"{_1K}/dinat_large_in22k_in1k_384", _FT, 87.4, 201, 89.7),
    "dinat_large_384_11x11": _variant(
        {**_LARGE, **_AT_384_BY_11}, f"{_1K}/dinat_large_in22k_in1k_384_11x11", _FT, 87.5, 201, 92.4
    ),
    "dinat_large_21k": _pretrained({**_LARGE, **_DILATED}, f"{_22K}/dinat_large_in22k_224"),
    "dinat_large_21k_11x11": _pretrained(
        {**_LARGE, **_DILATED, "kernel_size": 11},
        f"{_22K}/dinat_large_in22k_224_11x11interp",
        note="the weights of dinat_large_21k, their bias tables interpolated",
    ),
}

FAMILY = Family(
    name="nat",
    model=Nat,
    config=NatConfig,
    variants=VARIANTS,
    mixer="neighborhood attention",
    paper="Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; Dilated Neighborhood Attention "
    "Transformer, 2022, arXiv 2209.15001",
    layouts=(OFFICIAL_LAYOUT,),
    bias_tables=r"\.rpb$",
    # Dilated neighborhoods, which fit into some of the maps in tests and not into others.
    tiny={
        "img_size": 64,
        "kernel_size": 3,
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 4),
        "dilations": (3, 1, (1, 2), 1),
    },
)
