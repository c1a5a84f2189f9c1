"""Swin Transformer: a pyramid of blocks whose attention stays inside windows that shift from block to block.

Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
arXiv 2103.14030. Official code: microsoft/Swin-Transformer at f82860b (MIT), for dense tasks
SwinTransformer/Swin-Transformer-Object-Detection at c7b2011 (backbone file MIT).

What differs from the official code, and why:

- One class serves classification and dense tasks. A map that windows do not divide is padded behind the block's first
  norm, as the official dense version does; padded positions are ordinary keys made of the projection's bias.
- A stage whose map's smaller side does not exceed its window is not shifted, judged at run time. This gives the
  official classifier at the size it was built for. The dense version (`output_norms`) always shifts, as the official
  one does; the two differ only on maps that one window covers.
- Shift masks and index tables are computed, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import window_attention
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
from .layers import DropPath, LayerNorm, Mlp, larger, pad_to_multiple, smaller, zero_pad


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Configuration of a Swin Transformer.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for. It fixes each stage's window and the default
            preprocessing; any other size runs as well.
        patch_size: Kernel and stride of the stem's convolution; stage i has stride patch_size * 2^i.
        embed_dim: Channels of the first stage; doubled at every further one.
        depths: Blocks per stage.
        num_heads: Attention heads per stage; they divide the stage's channels.
        window_size: Side of the attention window; a stage whose map is smaller at `img_size` takes that side instead.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1
    output_norms: bool = False

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ValueError(f"depths and num_heads need one entry per stage, got {self.depths} and {self.num_heads}")
        if min(self.depths) < 1 or self.embed_dim < 1 or self.patch_size < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "depths, embed_dim, patch_size and mlp_ratio must be positive, got "
                f"{self.depths}, {self.embed_dim}, {self.patch_size}, {self.mlp_ratio}"
            )
        if self.window_size < 2:
            raise ValueError(f"window_size must be at least 2, got {self.window_size}")
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.channels, self.num_heads)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    @property
    def windows(self) -> tuple[int, ...]:
        """Window side per stage: `window_size`, or the map's smaller side at `img_size` where that is smaller."""
        strides = [self.patch_size * 2**i for i in range(len(self.depths))]
        return tuple(min(self.window_size, *(-(-side // s) for side in self.image_sides)) for s in strides)


def relative_position_index(window: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window.

    Returns:
        (window^2, window^2) int64; row = (dy + window - 1) * (2 window - 1) + dx + window - 1 with (dy, dx) the query's
        position minus the key's.
    """
    side = torch.arange(window, device=device)
    y, x = side.repeat_interleave(window), side.repeat(window)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """Bias (heads, N, N) of all (query, key) pairs, from a table ((2 window - 1)^2, heads) and the rows of it."""
    # Gathering is several times faster than indexing, and so is its gradient, which need not sort.
    rows = index.flatten().expand(table.shape[1], -1)
    return table.t().gather(1, rows).view(-1, *index.shape)


def shift_of(window: int, height: int, width: int) -> int:
    """Half a window, or 0 where the map's smaller side does not exceed the window.

    Written without a branch, so that an exported program holds for maps on both sides of the rule.
    """
    exceeds = smaller(1, larger(0, smaller(height, width) - window))
    return exceeds * (window // 2)


class WindowAttention(nn.Module):
    """Multi-head attention inside the windows of a map, with a learned bias per head and relative offset."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int, always_shift: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.always_shift = always_shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def bias(self) -> Tensor:
        """Relative position bias (heads, window^2, window^2)."""
        return look_up_bias(self.relative_position_bias_table, self.relative_position_index)

    def shift(self, height: int, width: int) -> int:
        """How far a shifted block moves its windows on a map of this size."""
        return self.window // 2 if self.always_shift else shift_of(self.window, height, width)

    def padding(self) -> Tensor:
        """Query, key and value of a padded position, (3, heads, d): the map is padded with zeros behind the norm."""
        return self.qkv.bias.view(3, self.heads, -1)

    def forward(self, x: Tensor, shifted: bool) -> Tensor:
        """(B, H, W, C) to the same shape; `shifted` moves the windows by half a window, where `shift_of` allows it."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height, width, 3, self.heads, channels // self.heads)
        out = window_attention(
            qkv,
            self.bias(),
            window=self.window,
            shift=self.shift(height, width) if shifted else 0,
            padding=self.padding(),
        )
        return self.proj(out.flatten(3))


class SwinBlock(nn.Module):
    """Pre-norm block: window attention and an MLP, each on a residual branch."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        channels = config.channels[stage]
        self.shifted = shifted
        self.norm1 = LayerNorm(channels)
        self.attn = self.make_attention(config, stage)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def make_attention(self, config: SwinConfig, stage: int) -> nn.Module:
        """The attention of a block in this stage."""
        return WindowAttention(
            config.channels[stage], config.num_heads[stage], config.windows[stage], always_shift=config.output_norms
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), self.shifted))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def gather_cells(x: Tensor) -> Tensor:
    """Pixels of each 2 x 2 cell along channels, by columns: (B, H, W, C) to (B, H/2, W/2, 4C); odd sides are padded."""
    batch, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = zero_pad(x, 0, 0, 0, 2 * columns - width, 0, 2 * rows - height)
    x = x.view(batch, rows, 2, columns, 2, channels)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, rows, columns, 4 * channels)


class PatchMerging(nn.Module):
    """Halve the map and double its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.reduction(self.norm(gather_cells(x)))


def cut_patches(x: Tensor, size: int) -> Tensor:
    """Pixels of each patch, ordered as a convolution weighs them: (B, C, H, W) to (B, H/size, W/size, C size^2)."""
    batch, channels, height, width = x.shape
    rows, columns = height // size, width // size
    x = x.reshape(batch, channels, rows, size, columns, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * size * size)


class PatchEmbed(nn.Module):
    """Stem: one token per patch, normalised."""

    def __init__(self, in_chans: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, channels, patch_size, patch_size)
        self.norm = LayerNorm(channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/patch), ceil(W/patch), C)."""
        # A convolution whose stride is its kernel is a linear layer on patches, which gives the map in our layout.
        patches = cut_patches(pad_to_multiple(x, self.patch_size), self.patch_size)
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class SwinStage(nn.Module):
    """Blocks of one resolution, and the merging that leads to the next one."""

    downsample: nn.Module

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample


class Swin(Backbone):
    """Swin Transformer; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"relative_position_bias_table$"
    stem_name = "patch_embed.proj"
    block: ClassVar[type[SwinBlock]] = SwinBlock
    merging: ClassVar[type[nn.Module]] = PatchMerging

    def __init__(self, config: SwinConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, config.patch_size * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.patch_size)
        self.layers = nn.ModuleList(self._make_stage(i, rates[i]) for i in range(self.built_stages))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(self._init_module)

    def _make_stage(self, index: int, rates: Sequence[float]) -> SwinStage:
        blocks = [self.block(self.config, index, j % 2 == 1, rate) for j, rate in enumerate(rates)]
        is_last = index == self.built_stages - 1
        return SwinStage(blocks, None if is_last else self.merging(self.config.channels[index]))

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_linear(module)
        elif isinstance(module, WindowAttention):
            nn.init.normal_(module.relative_position_bias_table, std=0.02)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(SwinStage, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Patch merging in front of stage `index`; see `Backbone`."""
        return cast(SwinStage, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; patch merging goes with the last block before it.

        The final norm goes with the classifier, as in the authors' fine-tuning code (timm puts it with the last block).
        """
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        merging = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*merging, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


TIMM_LAYOUT = CheckpointLayout(
    name="timm",
    marker=r"^head\.fc\.|^layers\.3\.downsample\.",
    renames=(
        (r"^layers\.1\.downsample\.", "layers.0.downsample."),
        (r"^layers\.2\.downsample\.", "layers.1.downsample."),
        (r"^layers\.3\.downsample\.", "layers.2.downsample."),
        (r"^head\.fc\.", "head."),
    ),
    ignored=(r"relative_position_index$", r"relative_coords_table$", r"attn_mask$", r"k_bias$"),
)

OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^layers\.0\.downsample\.",
    ignored=(r"relative_position_index$", r"relative_coords_table$", r"attn_mask$"),
)


def merging_order(value: Tensor) -> Tensor:
    """Patch merging of mmdetection, whose last axis goes by (channel, row, column), in our order of 2 x 2 cells."""
    cells = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return cells[..., [0, 2, 1, 3], :].flatten(-2)


MMDET_LAYOUT = CheckpointLayout(
    name="mmdetection",
    marker=r"^stages\.\d+\.blocks\.\d+\.attn\.w_msa\.",
    renames=(
        (r"^stages\.(\d+\.blocks\.\d+\.attn)\.w_msa\.", r"layers.\1."),
        (r"^stages\.(\d+\.blocks\.\d+)\.ffn\.layers\.0\.0\.", r"layers.\1.mlp.fc1."),
        (r"^stages\.(\d+\.blocks\.\d+)\.ffn\.layers\.1\.", r"layers.\1.mlp.fc2."),
        (r"^stages\.", "layers."),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
    ),
    ignored=(r"relative_position_index$",),
    reorders=((r"\.downsample\.(reduction|norm)\.", merging_order),),
)

RELEASES = "https://github.com/SwinTransformer/storage/releases/download"
COMMIT = "f82860bfb5225915aca09c3227159ee9e1df874d"
SQUASH: dict[str, Any] = {"crop_mode": "squash", "crop_pct": 1.0}


def classifier_weights(path: str, size: int, num_classes: int = 1000, **facts: Any) -> Weights:
    """Record of a checkpoint from the official releases; at 384 the authors evaluate without a crop."""
    return Weights(
        url=f"{RELEASES}/{path}.pth",
        license="MIT",
        repository="microsoft/Swin-Transformer",
        commit=COMMIT,
        container="model",
        input_size=(3, size, size),
        num_classes=num_classes,
        labels="imagenet-1k" if num_classes == 1000 else "imagenet-22k",
        **(SQUASH if size == 384 else {}),
        **facts,
    )


def _from_22k(name: str, finetuned: str, size: int, **facts: Any) -> dict[str, Weights]:
    """The two checkpoints of a design pretrained on ImageNet-22K: fine-tuned on ImageNet-1K, and as pretrained."""
    return {
        "in22k_ft_in1k": classifier_weights(f"{name}_{finetuned}", size, **facts),
        "in22k": classifier_weights(f"{name}_22k", size, 21841, macs=facts.get("macs")),
    }


def _dense_weights(path: str, **facts: Any) -> Weights:
    return Weights(
        url=f"{RELEASES}/{path}.pth",
        license="Apache-2.0",  # of the authors' repositories for dense tasks
        container="state_dict",
        prefix="backbone.",
        num_classes=0,
        labels="",
        **facts,
    )


_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE: dict[str, Any] = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_AT_384: dict[str, Any] = {"img_size": 384, "window_size": 12}


def _top(top1: float, top5: float | None = None) -> dict[str, float]:
    return {"top1": top1} if top5 is None else {"top1": top1, "top5": top5}


VARIANTS = {
    "swin_tiny_patch4_window7_224": Variant(
        config=SwinConfig(),
        weights={
            "in1k": classifier_weights(
                "v1.0.0/swin_tiny_patch4_window7_224", 224, metrics=_top(81.2, 95.5), params=28_000_000, macs=4.5e9
            ),
            **_from_22k(
                "v1.0.8/swin_tiny_patch4_window7_224",
                "22kto1k_finetune",
                224,
                metrics=_top(80.9, 96.0),
                params=28_000_000,
                macs=4.5e9,
            ),
        },
    ),
    "swin_small_patch4_window7_224": Variant(
        config=SwinConfig(**_SMALL),
        weights={
            "in1k": classifier_weights(
                "v1.0.0/swin_small_patch4_window7_224", 224, metrics=_top(83.2), params=50_000_000, macs=8.7e9
            ),
            **_from_22k(
                "v1.0.8/swin_small_patch4_window7_224",
                "22kto1k_finetune",
                224,
                metrics=_top(83.2),
                params=50_000_000,
                macs=8.7e9,
            ),
        },
    ),
    "swin_base_patch4_window7_224": Variant(
        config=SwinConfig(**_BASE),
        weights={
            "in1k": classifier_weights(
                "v1.0.0/swin_base_patch4_window7_224", 224, metrics=_top(83.5), params=88_000_000, macs=15.4e9
            ),
            **_from_22k(
                "v1.0.0/swin_base_patch4_window7_224",
                "22kto1k",
                224,
                metrics=_top(85.2),
                params=88_000_000,
                macs=15.4e9,
            ),
        },
    ),
    "swin_base_patch4_window12_384": Variant(
        config=SwinConfig(**_BASE, **_AT_384),
        weights={
            "in1k": classifier_weights(
                "v1.0.0/swin_base_patch4_window12_384", 384, metrics=_top(84.5), params=88_000_000, macs=47.1e9
            ),
            **_from_22k(
                "v1.0.0/swin_base_patch4_window12_384",
                "22kto1k",
                384,
                metrics=_top(86.4),
                params=88_000_000,
                macs=47.1e9,
            ),
        },
    ),
    "swin_tiny_c24_patch4_window8_256": Variant(
        config=SwinConfig(img_size=256, window_size=8, num_heads=(4, 8, 16, 32)),
        weights={
            "in1k": classifier_weights(
                "v1.0.5/swin_tiny_c24_patch4_window8_256", 256, metrics=_top(81.6, 95.7), params=28_000_000, macs=5.9e9
            ),
        },
    ),
    "swin_large_patch4_window7_224": Variant(
        config=SwinConfig(**_LARGE),
        weights=_from_22k(
            "v1.0.0/swin_large_patch4_window7_224", "22kto1k", 224, metrics=_top(86.3), params=197_000_000, macs=34.5e9
        ),
    ),
    "swin_large_patch4_window12_384": Variant(
        config=SwinConfig(**_LARGE, **_AT_384),
        weights=_from_22k(
            "v1.0.0/swin_large_patch4_window12_384",
            "22kto1k",
            384,
            metrics=_top(87.3),
            params=197_000_000,
            macs=103.9e9,
        ),
    ),
    "swin_tiny_window7_dense": Variant(
        config=SwinConfig(output_norms=True),
        num_classes=0,
        weights={
            "mask_rcnn_coco": _dense_weights(
                "v1.0.2/mask_rcnn_swin_tiny_patch4_window7",
                repository="SwinTransformer/Swin-Transformer-Object-Detection",
                commit="c7b20110addde0f74b1fbf812b403d16a59a87a9",
                input_size=(3, 800, 1333),
                metrics={"box_ap": 46.0, "mask_ap": 41.6},
                note="backbone of a whole Mask R-CNN, trained 36 epochs on COCO",
            ),
            "upernet_ade20k": _dense_weights(
                "v1.0.1/upernet_swin_tiny_patch4_window7_512x512",
                repository="SwinTransformer/Swin-Transformer-Semantic-Segmentation",
                commit="",
                input_size=(3, 512, 512),
                metrics={"miou": 44.51},
                note="backbone of a whole UPerNet, trained 160k iterations on ADE20K",
            ),
        },
    ),
}

FAMILY = Family(
    name="swin",
    model=Swin,
    config=SwinConfig,
    variants=VARIANTS,
    mixer="window attention",
    paper="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030",
    layouts=(OFFICIAL_LAYOUT, TIMM_LAYOUT, MMDET_LAYOUT),
    tiny={"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
    bias_tables=r"relative_position_bias_table$",
)
