"""ViG: tokens mixed by gated linear attention from both ends; a plain backbone, and a pyramid, ViG-H.

Paper: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", AAAI 2025, arXiv
2405.18425. Official code: hustvl/ViG at dfb9d32 (MIT), `classification/models/vig.py` and `vig_h.py`. This is not
Vision GNN (arXiv 2206.00272), whose models go by the same name.

Both architectures share their mixer and the form of their blocks. ViG has one resolution, a position table and root
mean square norms; ViG-H has VMamba's frame of four resolutions, layer norms and no positions.

What differs from the official code, and why:

- The mean of both directions is taken in training and evaluation. The official plain model halves it once more in
  evaluation; a norm follows, so that this moves logits by some 3e-6 of their size.
- What is projected from the convolved map, queries, keys, values and both kinds of gates, is one matrix product.
- Maps stay (B, H, W, C), the layout of the shared operators, in ViG-H, too.
- The plain stem pads an image whose sides 8 does not divide, at the bottom and right; the official one drops the rest.
- The plain model has four stages of equal size, so that features can be taken from several depths. The authors' dense
  code is not in their repository; the norms of outputs are those that ViG-H has for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import gated_linear_attention
from vizoo.ops.tracing import known, without_autocast
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
)
from .layers import DropPath, LayerNorm, as_linear, is_plain, pad_to_multiple, resize_grid, round_up
from .nat import Level
from .vim import RMSNorm
from .vmamba import DepthwiseConv, to_nchw, to_nhwc

STRIDE = 16
"""Stride of the plain stem, and of all plain stages."""
STRIDE_H = 4
"""Stride of the stem of a pyramid; every further stage halves the map."""
GATE_RANK = 16
"""Channels that the gates of the decay are projected from."""
GATE_NORMALIZER = 16.0
"""What the logarithm of a gate is divided by: decays are mild."""
EPS = 1e-6
"""Added to mean squares by root mean square norms."""


@dataclass(frozen=True, kw_only=True)
class VigConfig:
    """Configuration of a plain ViG.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position table; any other
            size runs as well.
        embed_dim: Channels.
        depths: Blocks per stage; all stages are alike, so only their sum and where features are taken depends on it.
        num_heads: Heads of each mixer; they divide half the channels, which keys have.
        activate_local: Let the convolved map, which everything is projected from, pass a SiLU.
        activate_output: Let what is projected to a mixer's output pass a SiLU.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 224
    embed_dim: int = 384
    depths: tuple[int, ...] = (3, 3, 3, 3)
    num_heads: int = 6
    activate_local: bool = False
    activate_output: bool = False
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        _check_depths(self.depths)
        _check_width("embed_dim", self.embed_dim, self.num_heads)
        check_size_and_rate(self.img_size, self.drop_path_rate)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def map_sides(self) -> tuple[int, int]:
        """Rows and columns of the map of that image."""
        height, width = self.image_sides
        return -(-height // STRIDE), -(-width // STRIDE)


@dataclass(frozen=True, kw_only=True)
class VigHConfig:
    """Configuration of a ViG-H.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage; they divide half the stage's channels, which keys have.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 5, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    drop_path_rate: float = 0.2
    output_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.num_heads):
            raise ValueError(
                "embed_dims, depths and num_heads need one entry per stage, got "
                f"{self.embed_dims}, {self.depths} and {self.num_heads}"
            )
        _check_depths(self.depths)
        for width, heads in zip(self.embed_dims, self.num_heads, strict=True):
            _check_width("embed_dims", width, heads)
        check_size_and_rate(self.img_size, self.drop_path_rate)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)


def _check_depths(depths: Sequence[int]) -> None:
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must name a stage at least, of a block or more each, got {tuple(depths)}")


def _check_width(name: str, width: int, heads: int) -> None:
    """Stems begin with half the channels, and keys have half of them, which heads share."""
    if width < 2 or width % 2:
        raise ValueError(f"{name} must be even and positive, got {width}; nearest valid: {max(2, width + 1)}")
    if heads < 1 or width // 2 % heads:
        fitting = [n for n in range(1, width // 2 + 1) if width // 2 % n == 0]
        raise ValueError(
            f"num_heads must divide half the channels, which keys have, got {heads} heads for {width // 2}; "
            f"nearest valid: {min(fitting, key=lambda n: abs(n - heads))}"
        )


class GatedLinearAttention(nn.Module):
    """Mixes the tokens of a map in raster order from both ends, blended with what a convolution gives (section 3).

    Args:
        channels: Channels of the map.
        heads: Heads, of half as many channels in keys as in values.
        activate_local: Let the convolved map pass a SiLU.
        activate_output: Let what is projected to the output pass a SiLU.
    """

    def __init__(self, channels: int, heads: int, activate_local: bool = False, activate_output: bool = False) -> None:
        super().__init__()
        self.heads, self.keys, self.activate_output = heads, channels // 2, activate_output
        activation = nn.SiLU() if activate_local else nn.Identity()
        self.in_proj = nn.Sequential(DepthwiseConv(channels), activation)  # numbered as in the official code
        self.qkv_proj = nn.Linear(channels, 2 * self.keys + channels, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(channels, GATE_RANK, bias=False), nn.Linear(GATE_RANK, 2 * self.keys))
        self.g_proj = nn.Linear(channels, channels)
        self.g_norm = nn.RMSNorm(channels // heads, EPS)  # one vector for all heads
        self.l_norm = nn.RMSNorm(channels // heads, EPS)
        self.o_proj = nn.Linear(channels, channels, bias=False)
        self.apply(_init_narrowly)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        local = self.in_proj(x).flatten(1, 2)
        mixed, decays, gate = self.project(local)
        q, k, v = (self.split_heads(part) for part in mixed.split((self.keys, self.keys, local.shape[-1]), -1))
        forward, backward = (self.split_heads(part) for part in decays.chunk(2, -1))
        out = gated_linear_attention(
            q, k, v, forward, backward, scale=0.5 * q.shape[-1] ** -0.5, normalizer=GATE_NORMALIZER
        )
        y = torch.lerp(
            norm_heads(self.split_heads(local), self.l_norm),
            norm_heads(out, self.g_norm),
            self.split_heads(gate).sigmoid(),
        ).flatten(2)
        return self.o_proj(F.silu(y) if self.activate_output else y).view(x.shape)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side, logits of both decays, and of the blend, each (B, N, ...)."""
        layers = (self.qkv_proj, cast(nn.Linear, self.gk_proj[0]), self.g_proj)
        if all(map(is_plain, layers)):  # one product: the map is read once, and its gradients need not be added up
            weight = torch.cat([layer.weight for layer in layers])
            bias = F.pad(self.g_proj.bias, (len(weight) - self.g_proj.out_features, 0))
            mixed, low_rank, gate = F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)
        else:
            mixed, low_rank, gate = (layer(x) for layer in layers)
        # As a matrix, whose rows may lie apart; of anything else torch would make a copy.
        decays = self.gk_proj[1](low_rank.flatten(0, 1)).unflatten(0, x.shape[:2])
        return mixed, decays, gate

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, channels) to (B, N, heads, channels / heads), a view."""
        return x.unflatten(-1, (self.heads, -1))


def norm_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Root mean square norm of each head's channels, (B, N, heads, d), computed in float32, in the dtype of `x`."""
    with without_autocast(x.device):  # which would convert the whole input, and the output back
        return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


class GatedMlp(nn.Module):
    """An MLP whose hidden channels a second half of them gates: W (silu(a) * b).

    Args:
        channels: Of the map.
        multiple: What hidden channels, 8/3 times as many, are rounded up to a multiple of.
    """

    def __init__(self, channels: int, multiple: int) -> None:
        super().__init__()
        hidden = round_up(8 * channels // 3, multiple)
        self.fc1 = nn.Linear(channels, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(a) * b)


class VigBlock(nn.Module):
    """Pre-norm block: a mixer and an MLP, each on a residual branch.

    Args:
        mixer: Of the map.
        mlp: Of each position.
        norm: Makes the norm in front of each.
        drop_path: Stochastic depth.
    """

    def __init__(self, mixer: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], drop_path: float) -> None:
        super().__init__()
        self.norm, self.op = norm(), mixer
        self.norm2, self.mlp = norm(), mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """The plain stem: two convolutions, patches of 9 x 9 pixels and then of 3 x 3 of these, that overlap."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, channels // 2, 9, STRIDE // 2, padding=1),
            LayerNorm(channels // 2),
            nn.SiLU(),
            nn.Conv2d(channels // 2, channels, 3, 2, padding=1),
            LayerNorm(channels, keep_float32=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/16), ceil(W/16), C)."""
        first, norm, activation, second, last = self.proj
        x = pad_to_multiple(x, STRIDE // 2).contiguous(memory_format=torch.channels_last)
        x = activation(norm(first(x).permute(0, 2, 3, 1)))
        return last(second(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def make_stem(in_chans: int, channels: int) -> nn.Sequential:
    """The stem of a pyramid, (B, in_chans, H, W) to (B, ceil(H/4), ceil(W/4), C); numbered as in the official code."""
    return nn.Sequential(
        nn.Conv2d(in_chans, channels // 2, 3, 2, padding=1),
        to_nhwc(),
        LayerNorm(channels // 2),
        to_nchw(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, 3, 2, padding=1),
        to_nhwc(),
        LayerNorm(channels, keep_float32=True),
    )


def make_downsample(channels: int, following: int) -> nn.Sequential:
    """Map (B, H, W, channels) to (B, ceil(H/2), ceil(W/2), following)."""
    conv = nn.Conv2d(channels, following, 3, 2, padding=1)
    return nn.Sequential(to_nchw(), conv, to_nhwc(), LayerNorm(following, keep_float32=True))


def _init_narrowly(module: nn.Module) -> None:
    """Xavier's uniform weights times 2^-2.5, and no bias: how mixers begin."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):  # convolutions keep what they have
        init_linear(module)


class Vig(Backbone):
    """Plain ViG; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    stem_name = "patch_embed.proj.0"

    def __init__(self, config: VigConfig, **kwargs: Any) -> None:
        ends = [sum(config.depths[: i + 1]) for i in range(len(config.depths))]
        stages = [Stage(f"blocks.{end - 1}", config.embed_dim, STRIDE) for end in ends]
        super().__init__(config, stages, **kwargs)
        self.ends = ends
        (rates,) = drop_path_rates(config.drop_path_rate, [sum(config.depths)])
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(config.map_sides), config.embed_dim))
        self.blocks = nn.ModuleList(self._make_block(rate) for rate in rates[: ends[self.built_stages - 1]])
        if not self.features_only:
            self.norm = RMSNorm(self.num_features, eps=EPS, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)

    def _make_block(self, drop_path: float) -> VigBlock:
        config = self.config
        mixer = GatedLinearAttention(config.embed_dim, config.num_heads, config.activate_local, config.activate_output)
        mlp = GatedMlp(config.embed_dim, multiple=256).apply(_init_module)
        return VigBlock(mixer, mlp, partial(RMSNorm, config.embed_dim, eps=EPS), drop_path)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        x = self.patch_embed(x)
        return x + self.positions(x.shape[1], x.shape[2])

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position table as a map (1, H, W, C)."""
        table: Tensor = self.pos_embed
        sides = self.config.map_sides
        if not (known(rows == sides[0]) and known(columns == sides[1])):
            table = resize_grid(table, sides, (rows, columns))
        return table.unflatten(1, (rows, columns))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """A part of the blocks; see `Backbone`."""
        return self.run_blocks([self.blocks[i] for i in self._blocks(index)], x)

    def _blocks(self, stage: int) -> range:
        """Numbers of the blocks of a stage."""
        return range(self.ends[stage] - self.config.depths[stage], self.ends[stage])

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Nothing: all stages have one resolution."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize the position table; see `Backbone`."""
        table, grid = state.get("pos_embed"), self.config.map_sides
        if table is None or table.shape[1] == math.prod(grid):
            return {}
        side = math.isqrt(table.shape[1])
        if side**2 != table.shape[1]:
            return {}
        state["pos_embed"] = resize_grid(table, (side, side), grid)
        return {"pos_embed": f"positions of {side} x {side} to {grid[0]} x {grid[1]} patches, bicubic"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, or per stage."""
        stem = r"^(?:patch_embed|pos_embed)"
        if not coarse:
            return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None)]}
        blocks = ["|".join(map(str, self._blocks(i))) for i in range(len(self.stages))]
        return {"stem": stem, "blocks": [(rf"^blocks\.(?:{numbers})\.", (i,)) for i, numbers in enumerate(blocks)]}


class VigH(Backbone):
    """ViG-H; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    output_norm_name = "outnorm{}"
    classifier_name = "classifier.head"
    stem_name = "patch_embed.0"

    def __init__(self, config: VigHConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, STRIDE_H * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.patch_embed = make_stem(self.in_chans, config.embed_dims[0])
        self.layers = nn.ModuleList(self._make_stage(i, rates[i]) for i in range(self.built_stages))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            head = make_classifier(self.num_features, self.num_classes)
            self.classifier = nn.ModuleDict({"norm": LayerNorm(self.num_features, keep_float32=True), "head": head})
        self.apply(_init_module)

    def _make_stage(self, index: int, rates: Sequence[float]) -> Level:
        channels, heads = self.config.embed_dims[index], self.config.num_heads[index]
        blocks = [
            VigBlock(
                GatedLinearAttention(channels, heads),
                GatedMlp(channels, multiple=32),
                partial(LayerNorm, channels),
                rate,
            )
            for rate in rates
        ]
        is_last = index == self.built_stages - 1
        return Level(blocks, None if is_last else make_downsample(channels, self.config.embed_dims[index + 1]))

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))  # so the map comes as (B, H, W, C)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(Level, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """The end of the stage before; see `Backbone`."""
        return cast(Level, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.classifier["norm"](x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        ends = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*ends, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


# Blocks of both architectures have the names of ViG-H here.
OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^blocks\.\d+\.attn_norm\.",
    renames=(
        (r"\.attn_norm\.", ".norm."),
        (r"\.attn\.", ".op."),
        (r"\.mlp_norm\.", ".norm2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
)

OFFICIAL_LAYOUT_H = CheckpointLayout(
    name="official",
    marker=r"^patch_embed\.",
    # Names of weights that earlier versions of the official code saved; some had point-wise convolutions.
    renames=(
        (r"^patch_embed\.proj\.", "patch_embed.0."),
        (r"^patch_embed\.norm\.", "patch_embed.2."),
        (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
        (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
        (r"^norm\.", "classifier.norm."),
        (r"^head\.", "classifier.head."),
    ),
    reorders=((r"\.(?:qkv_proj|gk_proj\.\d|g_proj|o_proj|fc1|fc2)\.weight$", as_linear),),
)

PAGE = "https://huggingface.co/hustvl/ViG/tree/main"
PAPER = (
    "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention, AAAI 2025, arXiv 2405.18425; not "
    "Vision GNN, which is called ViG as well"
)


def _weights(title: str, top1: float, params: float) -> dict[str, Weights]:
    record = Weights(
        url="",
        manual=f"Save the file of {title} from {PAGE} (the authors name this page for all six, but no files)",
        # The averaged weights, which the authors measure; in some files they are all there is.
        container=("model_ema", "model"),
        license="MIT",
        repository="hustvl/ViG",
        commit="dfb9d3212cac06b18cd4bf2a0eed56e107c4fb2a",
        input_size=(3, 224, 224),
        num_classes=1000,
        metrics={"top1": top1},
        params=round(params * 1e6),
        note="not tried: name, digest and content of the file are unknown here; not Vision GNN, also called ViG",
    )
    return {"in1k": record}


VARIANTS = {
    "vig_tiny": Variant(
        config=VigConfig(embed_dim=192, num_heads=3, activate_local=True, activate_output=True),
        weights=_weights("ViG-T", 77.2, 6),
    ),
    "vig_small": Variant(config=VigConfig(drop_path_rate=0.2), weights=_weights("ViG-S", 81.7, 23)),
    "vig_base": Variant(
        config=VigConfig(embed_dim=768, num_heads=12, drop_path_rate=0.5), weights=_weights("ViG-B", 82.6, 89)
    ),
}

_DEEP: dict[str, Any] = {"depths": (2, 2, 17, 2)}
_WIDE: dict[str, Any] = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}

VARIANTS_H = {
    "vig_h_tiny": Variant(config=VigHConfig(), weights=_weights("ViG-H-T", 82.8, 29)),
    "vig_h_small": Variant(config=VigHConfig(**_DEEP, drop_path_rate=0.3), weights=_weights("ViG-H-S", 83.8, 50)),
    "vig_h_base": Variant(
        config=VigHConfig(**_DEEP, **_WIDE, drop_path_rate=0.6), weights=_weights("ViG-H-B", 84.2, 89)
    ),
}

FAMILIES = (
    Family(
        name="vig",
        model=Vig,
        config=VigConfig,
        variants=VARIANTS,
        mixer="gated linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT,),
        tiny={"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": 2},
    ),
    Family(
        name="vig_h",
        model=VigH,
        config=VigHConfig,
        variants=VARIANTS_H,
        mixer="gated linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT_H,),
        tiny={"img_size": 64, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)},
    ),
)
