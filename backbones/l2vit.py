"""L2ViT: a pyramid of softmax attention inside windows and, by turns, linear attention over the whole image.

Paper: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv 2501.16182. Official code:
ChuanyangZheng/L2ViT at fad0341 (MIT), `classification/models/l2vit.py`; for dense tasks
`object_detection/mmdet/models/backbones/l2vit.py`.

Linear attention has two repairs here: its denominator has a lower bound, and two depthwise convolutions behind it
gather again what it spreads over the whole image. Blocks with windows are those of DaViT.

What differs from the official code, and why:

- One class serves classification and dense tasks.
- Maps stay (B, H, W, C), the layout of the shared operators, where the official code goes between tokens and
  (B, C, H, W). Under autocast the depthwise convolutions sum in float32.
- The sums of linear attention over all tokens are float32 in any precision. The official training is in float32, and
  its code would overflow in float16.
- The counts of batches that official batch norms save are ignored: nothing depends on them.

Of the authors' options those that their released models use have a place here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import KernelSum, linear_attention
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
from .davit import DavitBlock, Downsample, PositionEncoding, SpatialAttention
from .fusing import is_affine, scale_and_shift
from .layers import BatchNorm, DropPath, LayerNorm, Mlp, convolve, zero_pad

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""

FLOOR = 100.0
"""The least denominator of linear attention, whatever the number of tokens."""


@dataclass(frozen=True, kw_only=True)
class L2vitConfig:
    """Configuration of an L2ViT.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage; the first, third, ... of a stage have windows, the others linear attention.
        num_heads: Heads per stage, which divide the stage's channels.
        window_size: Side of the attention window.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1
    output_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.num_heads) > 0:
            raise ValueError(
                "embed_dims, depths and num_heads need one entry per stage, "
                f"got {self.embed_dims}, {self.depths} and {self.num_heads}"
            )
        if min(*self.embed_dims, *self.depths) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "embed_dims, depths and mlp_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.mlp_ratio}"
            )
        if self.embed_dims[0] % 2:
            raise ValueError(
                "embed_dims must begin with an even number, half of which the stem begins with; got "
                f"{self.embed_dims[0]}, nearest valid: {self.embed_dims[0] + 1}"
            )
        if self.window_size < 2:
            raise ValueError(f"window_size must be at least 2, got {self.window_size}")
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.embed_dims, self.num_heads)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)


class LinearAttention(nn.Module):
    """Linear attention of rectified queries and keys over the whole map (paper, section 3.2).

    Weights of a query sum to its head's temperature, or to less where the bound of the denominator acts.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), (channels // heads) ** -0.5))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.heads, channels // self.heads)
        out = linear_attention(qkv, None, None, KernelSum(floor=FLOOR), temperature=self.temperature.flatten())
        return self.proj(out.view(x.shape))


class ChannelAffine(nn.Module):
    """A factor and a summand for each channel: a batch norm that no layer beside it can take over, in evaluation."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, in the dtype and order of memory of `x`."""
        scale, shift = (values.to(x.dtype)[:, None, None] for values in (self.weight, self.bias))
        return torch.addcmul(shift, x, scale)


class LocalConcentration(nn.Module):
    """Two depthwise 7 x 7 convolutions, which give linear attention a focus (paper, section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.bn: nn.Module = BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = F.gelu(convolve(self.conv1, x))
        return convolve(self.conv2, self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def fuse_(self) -> None:
        """Reduce the norm to its arithmetic; the convolution behind it pads with zeros, so cannot take it over."""
        if isinstance(self.bn, nn.BatchNorm2d) and is_affine(self.bn):
            like = self.bn.weight
            scale, shift = (values.to(like.dtype) for values in scale_and_shift(self.bn))
            self.bn = ChannelAffine(scale, shift).requires_grad_(like.requires_grad).eval()


class GlobalBlock(nn.Module):
    """Linear attention, local concentration and MLP on residual branches, behind a position encoding."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([PositionEncoding(channels)])
        self.norm1 = LayerNorm(channels)
        self.attn = LinearAttention(channels, heads)
        self.norm3 = LayerNorm(channels)
        self.local_mp = LocalConcentration(channels)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Image to the first stage's map by two convolutions, normalised."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, padding=1),
            BatchNorm(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, 2, padding=1),
            BatchNorm(channels),
        )
        self.norm = LayerNorm(channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/4), ceil(W/4), C)."""
        height, width = x.shape[2:]
        # Multiples of the stride as sums with a positive summand, which a batch norm of a symbolic map asks for.
        padded = [(side - 1) // STRIDE * STRIDE + STRIDE for side in (height, width)]
        x = zero_pad(x, 0, padded[1] - width, 0, padded[0] - height)
        x = x.contiguous(memory_format=torch.channels_last)  # so the map comes as (B, H, W, C)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class L2vit(Backbone):
    """L2ViT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    stem_name = "downsample_layers.0.proj.0"

    def __init__(self, config: L2vitConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        widths = config.embed_dims[: self.built_stages]
        embeds = [Downsample(c, c_next) for c, c_next in pairwise(widths)]
        self.downsample_layers = nn.ModuleList([Stem(self.in_chans, widths[0]), *embeds])
        self.layers = nn.ModuleList(self._make_stage(i, rates[i]) for i in range(self.built_stages))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(_init_module)

    def _make_stage(self, index: int, rates: Sequence[float]) -> nn.ModuleList:
        config = self.config
        channels, heads, ratio = config.embed_dims[index], config.num_heads[index], config.mlp_ratio
        blocks = nn.ModuleList()
        for number, rate in enumerate(rates):
            if number % 2:
                blocks.append(GlobalBlock(channels, heads, ratio, rate))
            else:
                windows = SpatialAttention(channels, heads, config.window_size)
                blocks.append(DavitBlock(channels, windows, ratio, rate))
        return blocks

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        return self.downsample_layers[0](x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(nn.ModuleList, self.layers[index]), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Norm and convolution in front of stage `index`; see `Backbone`."""
        return self.downsample_layers[index](x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the block behind it."""
        stem, downsample = r"^downsample_layers\.0\.", r"^downsample_layers\.([1-9]\d*)"
        if coarse:
            return {"stem": stem, "blocks": [(downsample, None), (r"^layers\.(\d+)", None)]}
        return {"stem": stem, "blocks": [(downsample, (0,)), (r"^layers\.(\d+)\.(\d+)", None)]}


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init_linear(module)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, module.bias))


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^stages\.\d+\.\d+\.local_mp\.",
    renames=((r"^downsample_layers\.0\.proj\.proj\.", "downsample_layers.0.proj."), (r"^stages\.", "layers.")),
    ignored=(r"\.num_batches_tracked$",),
)

RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
# Of files whose name says so the measured weights are averages; the authors' trainer saves those beside the raw ones.
AVERAGED = ("model_ema", "model")


def _weights(file: str, params: float | None, size: int = 224, classes: int = 1000, **facts: Any) -> Weights:
    return Weights(
        url=f"{RELEASE}/L2ViT-{file}.pth",
        container=AVERAGED if file.endswith("ema") else "model",
        license="MIT",
        repository="ChuanyangZheng/L2ViT",
        commit="fad0341cf0c31464482d0550fb3127001b4b921b",
        input_size=(3, size, size),
        num_classes=classes,
        crop_pct=1.0 if size == 384 else 0.875,
        crop_mode="squash" if size == 384 else "center",
        params=None if params is None else round(params * 1e6),
        **facts,
    )


_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.2}
_BASE: dict[str, Any] = {**_SMALL, "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}

# The authors state the drop path of L2ViT-B alone.
VARIANTS = {
    "l2vit_tiny": Variant(
        config=L2vitConfig(),
        weights={"in1k": _weights("Tiny-checkpoint-best-ema", 29, metrics={"top1": 83.1}, macs=4.7e9)},
    ),
    "l2vit_small": Variant(
        config=L2vitConfig(**_SMALL),
        weights={"in1k": _weights("Small-checkpoint-best-ema", 50, metrics={"top1": 84.1}, macs=9.0e9)},
    ),
    "l2vit_base": Variant(
        config=L2vitConfig(**{**_BASE, "drop_path_rate": 0.3}),
        weights={
            "in1k": _weights("Base-checkpoint-best-ema", 89, metrics={"top1": 84.4, "top5": 96.9}, macs=15.9e9),
            "in22k_ft_in1k": _weights(
                "Base-22k21k-finetune-224-checkpoint-best", 89, metrics={"top1": 86.0}, macs=15.9e9
            ),
            "in22k": _weights(
                "Base-22k-pretrain-checkpoint-best",
                None,
                classes=21841,
                labels="",
                note="the order of the classes is the authors' own; their repository maps it to ImageNet-1K's only",
            ),
        },
    ),
    "l2vit_base_384": Variant(
        config=L2vitConfig(**_BASE, img_size=384, window_size=12),
        weights={
            "in22k_ft_in1k": _weights(
                "Base-22k21k-finetune-384-checkpoint-best", 89, size=384, metrics={"top1": 87.0}, macs=47.5e9
            )
        },
    ),
}

FAMILY = Family(
    name="l2vit",
    model=L2vit,
    config=L2vitConfig,
    variants=VARIANTS,
    mixer="linear attention",
    paper="The Linear Attention Resurrection in Vision Transformer, 2025, arXiv 2501.16182",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={
        "img_size": 64,
        "window_size": 4,
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 1, 1, 2),
        "num_heads": (1, 2, 2, 4),
    },
)
