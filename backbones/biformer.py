"""BiFormer: a pyramid whose regions attend to the few regions that matter to them, chosen by content.

Paper: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810.
Official code: rayleizhu/BiFormer at 1697bbb (MIT), `models/biformer.py`, `biformer_stl.py` and `biformer_stl_nchw.py`
with `ops/bra_legacy.py` and `ops/bra_nchw.py`; for dense tasks `models_mm/biformer_mm.py`.

The authors wrote the attention twice. Where regions divide the map both compute the same; elsewhere `refactored` tells
them apart:

- The first form cuts every map into n_win x n_win regions. A map that they do not divide is padded with zeros at the
  bottom and right in front of the projection, as by the authors' `auto_pad`: a padded position is an ordinary one, made
  of the projection's bias, which counts in the mean of its region, is a key, and is seen by the convolution of values.
- The refactored form has regions of floor(H / n_win) x floor(W / n_win) positions, and as many as cover the map: a few
  more than n_win a side where they do not divide it. Means are over what lies on the map; positions beyond it are
  keys with logit 0 and value 0.

What differs from the official code, and why:

- One class serves classification and dense tasks, all three layouts, and any size. Where the official code fails, the
  nearest thing that makes sense is done: the first form always pads; a region has one position at least, though the
  map has fewer than n_win a side; a region attends to all regions where there are fewer than its top k; and a pooling
  of keys and values is no larger than the region.
- Maps stay (B, H, W, C), the layout of the shared operators; point-wise convolutions are linear layers. Region means
  and affinities are float32 under autocast, too: rounded ones choose other regions. Convolutions of position and of
  values sum in float32.
- What switches the kind of attention by codes in the official `topk` (0, -1, -2) has names here.
- The counts of batches that official batch norms save are ignored: nothing depends on them.

The Swin-like layout (`swin_layout`) rounds odd sides down, as the official code does: its maps have floor(H / stride)
rows where others of the zoo have ceil(H / stride). A program exported with free sizes and traced on a large image holds
for images with a side above 16 * n_win, so that no region of the third stage is a single position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import region_affinity, region_routes, routing_attention
from vizoo.ops.tracing import without_autocast
from vizoo.weights.record import Weights

from .base import (
    Backbone,
    CheckpointLayout,
    Family,
    Stage,
    Variant,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    init_linear,
    make_classifier,
    nearest,
)
from .fusing import fold_neighbours
from .layers import (
    BatchNorm,
    DropPath,
    LayerNorm,
    Mlp,
    as_linear,
    convolve,
    crop,
    larger,
    smaller,
    zero_pad,
)

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""
EPS = 1e-6

Mixer = Literal["attention", "attention_without_lepe", "convolution"]
Pooling = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]
MIXERS: tuple[Mixer, ...] = get_args(Mixer)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LEPE_SIDES = (0, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class BiformerConfig:
    """Configuration of a BiFormer.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        n_win: Regions per side of a map, for all stages or for each; no parameter depends on it. Published are 7 for
            images of 224, 8 for crops of 512 (ADE20K), 16 for COCO.
        topk: What a stage's blocks mix positions by. A number: routing, each region attending to so many. `attention`:
            that of the whole map; `attention_without_lepe`: likewise, without the convolution; `convolution`: a
            depthwise one of 5 x 5.
        head_dim: Channels of a head where there is routing; query and key channels of the stage over it are its heads.
        plain_heads: Heads of the attention of the whole map, whatever the width.
        qk_dims: Channels of queries and keys per stage where there is routing; those of the stage unless given.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        mlp_dwconv: Convolve the hidden map of the MLP, 3 x 3 and depthwise.
        side_dwconv: Side of the depthwise convolution of values beside the attention (LEPE); 0 for none.
        pos_embed: Begin each block by a depthwise 3 x 3 convolution on a residual branch.
        pre_norm: Norms in front of attention and MLP; else behind the sum.
        layer_scale_init_value: Initial factor of the residual branches; 0 or less for none.
        param_routing: A linear layer for the mean queries and keys of regions; needs `diff_routing`.
        diff_routing: Let gradients flow through the affinities of regions; needs `soft_routing`.
        soft_routing: Multiply routed keys and values by the softmax over the affinities that were chosen.
        kv_downsample_mode: Pooling of keys and values inside a region. `ada_avgpool` and `ada_maxpool` leave
            `kv_per_wins` a side, `avgpool` and `maxpool` shrink by `kv_downsample_ratios`.
        kv_per_wins: Keys per side of a region, per stage.
        kv_downsample_ratios: Positions per side that become one key, per stage.
        output_projection: End the routed attention by a linear layer.
        refactored: The second form of the attention; see the module's docstring.
        swin_layout: Swin's stem and downsampling, of patches that do not overlap, with batch norms.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    n_win: int | tuple[int, ...] = 7
    topk: tuple[int | Mixer, ...] = (1, 4, 16, "attention")
    head_dim: int = 32
    plain_heads: int = 8
    qk_dims: tuple[int, ...] | None = None
    mlp_ratio: float = 3.0
    mlp_dwconv: bool = False
    side_dwconv: int = 5
    pos_embed: bool = True
    pre_norm: bool = True
    layer_scale_init_value: float = 0.0
    param_routing: bool = False
    diff_routing: bool = False
    soft_routing: bool = False
    kv_downsample_mode: Pooling = "identity"
    kv_per_wins: tuple[int, ...] = (2, 2, 1, 1)
    kv_downsample_ratios: tuple[int, ...] = (4, 2, 1, 1)
    output_projection: bool = True
    refactored: bool = False
    swin_layout: bool = False
    drop_path_rate: float = 0.1
    output_norms: bool = False

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_routing()
        check_size_and_rate(self.img_size, self.drop_path_rate)
        for stage, channels in enumerate(self.embed_dims):
            if isinstance(self.topk[stage], int):
                self._check_heads(stage, channels)
            elif self.topk[stage] != "convolution" and channels % self.plain_heads:
                raise ValueError(
                    f"plain_heads must divide the channels of a stage with plain attention, got {self.plain_heads} "
                    f"heads for {channels} channels; nearest valid: {_nearest_divisor(self.plain_heads, channels)}"
                )

    def _check_stages(self) -> None:
        stages = len(self.embed_dims)
        lists = {name: getattr(self, name) for name in ("embed_dims", "depths", "topk")}
        lists |= {name: getattr(self, name) for name in ("qk_dims", "n_win") if isinstance(getattr(self, name), tuple)}
        if self.kv_downsample_mode != "identity":
            name = "kv_per_wins" if self.kv_downsample_mode.startswith("ada_") else "kv_downsample_ratios"
            lists[name] = getattr(self, name)
        for name, values in lists.items():
            if len(values) != stages or not values:
                raise ValueError(
                    f"{name} needs one entry per stage, got {values} for {stages} stages (embed_dims {self.embed_dims})"
                )
            if any(isinstance(value, int) and value < 1 for value in values):
                raise ValueError(f"{name} must be positive, got {values}")
        for name in ("n_win", "head_dim", "plain_heads", "mlp_ratio"):
            value = getattr(self, name)
            if not isinstance(value, tuple) and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for entry in self.topk:
            if not isinstance(entry, int) and entry not in MIXERS:
                raise ValueError(
                    f"topk holds numbers of regions, or the names of other mixers, got {entry!r}; "
                    f"{nearest(str(entry), MIXERS)}"
                )

    def _check_routing(self) -> None:
        if self.side_dwconv not in LEPE_SIDES:
            raise ValueError(f"side_dwconv must be one of {LEPE_SIDES}, got {self.side_dwconv}")
        if self.kv_downsample_mode not in POOLINGS:
            raise ValueError(
                f"unknown kv_downsample_mode {self.kv_downsample_mode!r}; {nearest(self.kv_downsample_mode, POOLINGS)}"
            )
        if self.param_routing and not self.diff_routing:
            raise ValueError("param_routing learns by the gradient of the routing: set diff_routing=True with it")
        if self.diff_routing and not self.soft_routing:
            raise ValueError("diff_routing needs weights to flow through: set soft_routing=True with it")
        if not self.refactored:
            return
        plain = {"soft_routing": False, "kv_downsample_mode": "identity", "output_projection": True, "qk_dims": None}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"the refactored attention has no {name}: leave it at {value!r}, or set refactored=False, "
                    f"got {getattr(self, name)!r}"
                )

    def _check_heads(self, stage: int, channels: int) -> None:
        keys = self.key_channels(stage)
        if keys % self.head_dim or channels % (keys // self.head_dim):
            raise ValueError(
                f"head_dim must divide the query channels of a routed stage into heads that divide its channels, got "
                f"head_dim {self.head_dim} for {keys} query channels of {channels}; nearest valid: "
                f"{min(_head_dims(keys, channels), key=lambda n: abs(n - self.head_dim))}"
            )

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def regions(self, stage: int) -> int:
        """Regions per side of a stage's map."""
        return self.n_win[stage] if isinstance(self.n_win, tuple) else self.n_win

    def key_channels(self, stage: int) -> int:
        """Channels of a stage's queries, and of its keys, where there is routing."""
        return self.qk_dims[stage] if self.qk_dims else self.embed_dims[stage]


def _nearest_divisor(wanted: int, number: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))


def _head_dims(keys: int, channels: int) -> list[int]:
    return [n for n in range(1, keys + 1) if keys % n == 0 and channels % (keys // n) == 0]


def depthwise(channels: int, side: int) -> nn.Conv2d | None:
    """A depthwise convolution that keeps the size of the map; None for side 0."""
    return nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels) if side else None


def pool_regions(x: Tensor, regions: int, mode: Pooling, size: int) -> Tensor:
    """Pool inside each region of a map: (B, H, W, ...) to (B, regions * p, regions * p', ...).

    Args:
        x: The map, which regions x regions regions divide.
        regions: Regions per side.
        mode: How.
        size: Positions that stay per side of a region, or (`avgpool`, `maxpool`) that become one.
    """
    batch, height, width = x.shape[:3]
    rows, columns = height // regions, width // regions
    x, channels = x.flatten(3), x.shape[3:]
    cells = x.view(batch, regions, rows, regions, columns, x.shape[3]).permute(0, 1, 3, 5, 2, 4)
    cells = cells.reshape(batch * regions**2, x.shape[3], rows, columns)
    if mode.startswith("ada_"):
        pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if mode == "ada_avgpool" else F.adaptive_max_pool2d
        cells = pool(cells, size)
    else:
        pool = F.avg_pool2d if mode == "avgpool" else F.max_pool2d
        cells = pool(cells, (smaller(size, rows), smaller(size, columns)))
    cells = cells.view(batch, regions, regions, *cells.shape[1:]).permute(0, 1, 4, 2, 5, 3)
    return cells.flatten(3, 4).flatten(1, 2).unflatten(-1, channels)


class RoutingAttention(nn.Module):
    """Bi-level routing attention: regions choose regions by their mean queries and keys, positions attend to those."""

    def __init__(self, config: BiformerConfig, stage: int, topk: int) -> None:
        super().__init__()
        channels, keys = config.embed_dims[stage], config.key_channels(stage)
        self.regions, self.topk, self.heads = config.regions(stage), topk, keys // config.head_dim
        self.parts = (keys, keys, channels)
        # Of all channels, not of a head's: so all published weights were trained.
        self.scale = keys**-0.5
        self.refactored, self.soft, self.differentiable = config.refactored, config.soft_routing, config.diff_routing
        self.pooling: Pooling = config.kv_downsample_mode
        sizes = config.kv_per_wins if self.pooling.startswith("ada_") else config.kv_downsample_ratios
        self.pool_size = 1 if self.pooling == "identity" else sizes[stage]
        self.qkv = nn.Linear(channels, sum(self.parts))
        self.lepe = depthwise(channels, config.side_dwconv)
        self.router = nn.Linear(keys, keys) if config.param_routing else None
        self.proj = nn.Linear(channels, channels) if config.output_projection else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        _, height, width, channels = x.shape
        x, region_size = self.cut(x)
        qkv = self.qkv(x)
        out = self.attend(qkv, region_size).flatten(3)
        if self.lepe is not None:
            out = out + convolve(self.lepe, qkv[..., -channels:])
        return self.proj(crop(out, height, width))

    def cut(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The map, padded where this form of the attention pads it, and rows and columns of its regions."""
        height, width = x.shape[1:3]
        if self.refactored:
            return x, (larger(1, height // self.regions), larger(1, width // self.regions))
        rows, columns = (height + self.regions - 1) // self.regions, (width + self.regions - 1) // self.regions
        x = zero_pad(x, 0, 0, 0, columns * self.regions - width, 0, rows * self.regions - height)
        return x, (rows, columns)

    def attend(self, qkv: Tensor, region_size: tuple[int, int]) -> Tensor:
        """Projected map (B, H, W, 2 keys + C) to attended values (B, H, W, heads, C / heads)."""
        if not self.soft and self.pooling == "identity" and len(set(self.parts)) == 1:
            qkv = qkv.unflatten(-1, (3, self.heads, -1))
            routes = region_routes(qkv, region_size=region_size, topk=self.topk)
            return routing_attention(qkv, routes=routes, region_size=region_size, scale=self.scale)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.parts, -1))
        routes, weights = self.route(q, k, region_size)
        if self.pooling != "identity":
            k, v = (pool_regions(x, self.regions, self.pooling, self.pool_size) for x in (k, v))
        return routing_attention(
            q, k, v, routes=routes, region_size=region_size, scale=self.scale, route_weights=weights
        )

    def route(self, q: Tensor, k: Tensor, region_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Routes of each region and, where routing is soft, their weights, both (B, regions, k)."""
        if not self.soft:
            return region_routes(q, k, region_size=region_size, topk=self.topk), None
        if not self.differentiable:
            q, k = q.detach(), k.detach()
        if self.router is not None:
            q, k = self.describe(q, self.router), self.describe(k, self.router)
            region_size = (1, 1)
        affinity = region_affinity(q, k, region_size=region_size, scale=self.scale)
        chosen = affinity.topk(min(self.topk, self.regions**2))
        return chosen.indices, chosen.values.softmax(-1)

    def describe(self, x: Tensor, router: nn.Linear) -> Tensor:
        """Means of regions, (B, H, W, heads, d) to (B, regions, regions, heads, d), behind the routing's own layer."""
        height, width, heads = x.shape[1:4]
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.flatten(3).unflatten(2, (self.regions, width // self.regions))
        means = x.unflatten(1, (self.regions, height // self.regions)).mean((2, 4), dtype=wide)
        with without_autocast(x.device):
            return F.linear(means, router.weight.to(wide), router.bias.to(wide)).unflatten(-1, (heads, -1))


class Attention(nn.Module):
    """Multi-head attention over the whole map, with a depthwise convolution beside it.

    The convolution is of the input, in the refactored form of the values.
    """

    def __init__(self, config: BiformerConfig, stage: int, lepe: int) -> None:
        super().__init__()
        channels = config.embed_dims[stage]
        self.heads, self.refactored = config.plain_heads, config.refactored
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.lepe = depthwise(channels, lepe)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.view(batch, height * width, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + convolve(self.lepe, qkv[..., -channels:] if self.refactored else x)
        return self.proj(out)


class ConvolutionMixer(nn.Module):
    """A depthwise 5 x 5 convolution between two linear layers, in the place of an attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.proj(convolve(self.conv, self.value(x)))


class ConvolvedMlp(Mlp):
    """An MLP whose hidden map a depthwise 3 x 3 convolution passes over, in front of the GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, channels) to the same shape."""
        return self.contract(convolve(self.dwconv, self.fc1(x)))


def make_mixer(config: BiformerConfig, stage: int) -> nn.Module:
    """What mixes positions in the blocks of a stage."""
    kind = config.topk[stage]
    if isinstance(kind, int):
        return RoutingAttention(config, stage, kind)
    if kind == "convolution":
        return ConvolutionMixer(config.embed_dims[stage])
    return Attention(config, stage, config.side_dwconv if kind == "attention" else 0)


class BiformerBlock(nn.Module):
    """A convolution that tells positions apart, a mixer and an MLP, each on a residual branch."""

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(self, config: BiformerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.embed_dims[stage]
        self.pre_norm = config.pre_norm
        self.pos_embed = depthwise(channels, 3 if config.pos_embed else 0)
        self.norm1 = LayerNorm(channels, eps=EPS)
        self.attn = make_mixer(config, stage)
        self.norm2 = LayerNorm(channels, eps=EPS)
        self.mlp = (ConvolvedMlp if config.mlp_dwconv else Mlp)(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)
        for name in ("gamma1", "gamma2"):
            scale = config.layer_scale_init_value
            self.register_parameter(name, nn.Parameter(torch.full((channels,), scale)) if scale > 0 else None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        if self.pos_embed is not None:
            x = convolve(self.pos_embed, x, residual=True)
        if self.pre_norm:
            x = x + self.branch(self.attn(self.norm1(x)), self.gamma1)
            return x + self.branch(self.mlp(self.norm2(x)), self.gamma2)
        x = self.norm1(x + self.branch(self.attn(x), self.gamma1))
        return self.norm2(x + self.branch(self.mlp(x), self.gamma2))

    def branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """What a residual branch adds."""
        return self.drop_path(x if scale is None else scale * x)


def make_stem(config: BiformerConfig, in_chans: int) -> nn.Sequential:
    """Image (B, in_chans, H, W) to the first stage's map (B, C, H / 4, W / 4)."""
    channels = config.embed_dims[0]
    if config.swin_layout:
        return nn.Sequential(nn.Conv2d(in_chans, channels, STRIDE, STRIDE), BatchNorm(channels))
    return nn.Sequential(
        nn.Conv2d(in_chans, channels // 2, 3, 2, padding=1),
        BatchNorm(channels // 2),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, 3, 2, padding=1),
        BatchNorm(channels),
    )


def make_downsample(config: BiformerConfig, channels: int, out_channels: int) -> nn.Sequential:
    """Map (B, channels, H, W) to (B, out_channels, H / 2, W / 2)."""
    if config.swin_layout:
        return nn.Sequential(BatchNorm(channels), nn.Conv2d(channels, out_channels, 2, 2))
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, 2, padding=1), BatchNorm(out_channels))


class Biformer(Backbone):
    """BiFormer; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    stem_name = "downsample_layers.0.0"

    def __init__(self, config: BiformerConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)[: self.built_stages]
        widths = config.embed_dims[: self.built_stages]
        steps = [make_downsample(config, c, c_next) for c, c_next in pairwise(widths)]
        self.downsample_layers = nn.ModuleList([make_stem(config, self.in_chans), *steps])
        self.layers = nn.ModuleList(
            nn.ModuleList(BiformerBlock(config, i, rate) for rate in rates[i]) for i in range(self.built_stages)
        )
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = BatchNorm(self.num_features)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(self._init_module)

    def _init_module(self, module: nn.Module) -> None:
        """Convolutions, and the linear layers that are point-wise convolutions, keep PyTorch's own initialisation."""
        if isinstance(module, nn.Linear) and not self.config.refactored:
            init_linear(module)
        elif isinstance(module, ConvolutionMixer):
            module.value.reset_parameters()
            module.proj.reset_parameters()

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        x = x.contiguous(memory_format=torch.channels_last)  # so the map comes as (B, H, W, C)
        return self.downsample_layers[0](x).permute(0, 2, 3, 1)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(nn.ModuleList, self.layers[index]), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Convolution and norm in front of stage `index`; see `Backbone`."""
        return self.downsample_layers[index](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fuse_final_norm_(self) -> None:
        """Into the classifier, since the mean over positions lets it pass; see `Backbone`."""
        if not self.features_only:
            fold_neighbours(self, ["norm", "head"])

    def make_output_norm(self, channels: int) -> nn.Module:
        """A norm of the dense version; see `Backbone`."""
        return LayerNorm(channels, eps=EPS, keep_float32=True)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the block behind it."""
        downsample = r"^downsample_layers\.([1-9]\d*)"
        if coarse:
            return {"stem": r"^downsample_layers\.0\.", "blocks": [(downsample, None), (r"^layers\.(\d+)", None)]}
        return {
            "stem": r"^downsample_layers\.0\.",
            "blocks": [(downsample, (0,)), (r"^layers\.(\d+)\.(\d+)", None)],
        }


BLOCK = r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\."

OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^downsample_layers\.",
    renames=(
        (BLOCK + r"attn\.(?:qkv\.qkv|qkv_linear)\.", r"layers.\1.\2.attn.qkv."),
        (BLOCK + r"attn\.(?:wo|output_linear)\.", r"layers.\1.\2.attn.proj."),
        (BLOCK + r"attn\.router\.emb\.", r"layers.\1.\2.attn.router."),
        (BLOCK + r"attn\.1\.", r"layers.\1.\2.attn.value."),
        (BLOCK + r"attn\.2\.", r"layers.\1.\2.attn.conv."),
        (BLOCK + r"attn\.3\.", r"layers.\1.\2.attn.proj."),
        (BLOCK + r"mlp\.0\.", r"layers.\1.\2.mlp.fc1."),
        (BLOCK + r"mlp\.1\.dwconv\.", r"layers.\1.\2.mlp.dwconv."),
        (BLOCK + r"mlp\.[23]\.", r"layers.\1.\2.mlp.fc2."),  # the authors' layouts number it differently
        (BLOCK, r"layers.\1.\2."),
        (r"^extra_norms\.(\d+)\.", r"norm\1."),
    ),
    ignored=(r"num_batches_tracked$",),
    reorders=((BLOCK + r"(?:attn\.(?:qkv_linear|output_linear|qkv|proj|1|3)|mlp\.[02])\.weight$", as_linear),),
)

SHARES = "https://api.onedrive.com/v1.0/shares"


def _weights(share: str, top1: float, params: int, gmacs: float) -> dict[str, Weights]:
    record = Weights(
        url="/".join((SHARES, share, "root", "content")),
        license="MIT",
        repository="rayleizhu/BiFormer",
        commit="1697bbbeafb8680524898f1dcaac10defd0604be",
        container="model",
        input_size=(3, 224, 224),
        num_classes=1000,
        metrics={"top1": top1},
        params=params,
        macs=gmacs * 1e9,
    )
    return {"in1k": record}


_SMALL: dict[str, Any] = {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
_BASE: dict[str, Any] = {**_SMALL, "embed_dims": (96, 192, 384, 768), "drop_path_rate": 0.4}
_STL: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768),
    "depths": (2, 2, 6, 2),
    "mlp_ratio": 4.0,
    "pos_embed": False,
    "swin_layout": True,
}

VARIANTS = {
    "biformer_tiny": Variant(
        config=BiformerConfig(), weights=_weights("s!AkBbczdRlZvChHEOoGkgwgQzEDlM", 81.4, 13_100_000, 2.2)
    ),
    "biformer_small": Variant(
        config=BiformerConfig(**_SMALL), weights=_weights("s!AkBbczdRlZvChHDyM-x9KWRBZ832", 83.8, 25_500_000, 4.5)
    ),
    "biformer_base": Variant(
        config=BiformerConfig(**_BASE), weights=_weights("s!AkBbczdRlZvChHI_XPhoadjaNxtO", 84.3, 56_800_000, 9.8)
    ),
    "biformer_stl": Variant(
        config=BiformerConfig(**_STL), weights=_weights("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", 82.7, 28_400_000, 4.6)
    ),
    "biformer_stl_nchw": Variant(
        config=BiformerConfig(**_STL, refactored=True),
        weights=_weights("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", 82.7, 28_400_000, 4.6),
    ),
    # The dense version for crops of ADE20K; the authors have released no backbone of it alone.
    "biformer_small_seg": Variant(
        config=BiformerConfig(**{**_SMALL, "img_size": 512, "n_win": 8, "output_norms": True}),
        num_classes=0,
        params=25.0,
    ),
    # The authors' options, which no released model uses.
    "biformer_tiny_opt_soft": Variant(
        config=BiformerConfig(param_routing=True, diff_routing=True, soft_routing=True), params=13.7
    ),
    "biformer_tiny_opt_pool": Variant(
        config=BiformerConfig(
            kv_downsample_mode="ada_avgpool", layer_scale_init_value=1e-6, mlp_dwconv=True, pre_norm=False
        ),
        params=13.3,
    ),
}

FAMILY = Family(
    name="biformer",
    model=Biformer,
    config=BiformerConfig,
    variants=VARIANTS,
    mixer="bi-level routing attention",
    paper="BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv 2303.08810",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={
        "img_size": 64,
        "n_win": 2,
        "embed_dims": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
        "topk": (1, 2, 3, "attention"),
        "head_dim": 16,
        "drop_path_rate": 0.0,
    },
)
