"""VSSD: a pyramid whose blocks mix tokens through one state that all of them write and all of them read.

Paper: Shi et al., "VSSD: Vision Mamba with Non-Causal State Space Duality", 2024, arXiv 2407.18559. Official code:
YuHengsss/VSSD at 87b753b (no licence stated), `classification/models/mamba2.py`; for dense tasks
`detection/model.py`.

Three stages mix by Mamba-2's state space duality without an order: decays weigh what a token adds to the state, instead
of what it forgets. The last stage has plain attention. Stem, downsampling and blocks follow MLLA (arXiv 2405.16605).

What differs from the official code, and why:

- One class serves classification and dense tasks, at any size: the official classifier follows the map's sides by
  rounding down where its convolutions round up, and so takes multiples of 32 only; its dense version rounds up.
- Maps stay (B, H, W, C), the layout of the shared operators, where the official code goes between tokens and
  (B, C, H, W). Point-wise convolutions between stages are linear layers. Depthwise convolutions that keep the map's
  size sum in float32 under autocast.
- Outputs of the state grow with the number of tokens, beyond what float16 can hold; there the state and what is read
  from it are float32 up to the norm. The official code rounds them.
- The counts of batches that official batch norms save are ignored: nothing depends on them.

Of the authors' options, `positive_decay`, `causal` and `mixers` have a place here; maps B and C for groups of heads and
the two directions of half the heads each, which no released model uses, have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import state_space_dual
from vizoo.weights.record import NOT_STATED, Weights

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
    nearest,
)
from .fusing import fold_neighbours
from .layers import BatchNorm, DropPath, LayerNorm, Mlp, as_linear, convolve, is_plain
from .vmamba import initial_step_bias

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""

Mixer = Literal["ssd", "attention"]
MIXERS: tuple[Mixer, ...] = get_args(Mixer)


@dataclass(frozen=True, kw_only=True)
class VssdConfig:
    """Configuration of a VSSD.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mixers: What each stage's blocks mix tokens by: `ssd` or `attention`.
        d_state: States of a head's channels, in the stages with `ssd`.
        expand: Channels inside such a mixer over the block's channels.
        positive_decay: Weigh what a token adds by the size of its decay; else by the decay, which is negative.
        causal: Let a token see only those in front of it, as Mamba-2 does; then `positive_decay` does not matter.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 4, 8, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mixers: tuple[Mixer, ...] = ("ssd", "ssd", "ssd", "attention")
    d_state: int = 64
    expand: float = 2.0
    positive_decay: bool = True
    causal: bool = False
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    output_norms: bool = False

    def __post_init__(self) -> None:
        stages = len(self.embed_dims)
        for name in ("embed_dims", "depths", "num_heads", "mixers"):
            values = getattr(self, name)
            if len(values) != stages or not values:
                raise ValueError(
                    f"{name} needs one entry per stage, got {values} for {stages} stages (embed_dims {self.embed_dims})"
                )
        if min(*self.embed_dims, *self.depths, self.d_state) < 1 or min(self.expand, self.mlp_ratio) <= 0:
            raise ValueError(
                "embed_dims, depths, d_state, expand and mlp_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.d_state}, {self.expand}, {self.mlp_ratio}"
            )
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise ValueError(f"mixers holds 'ssd' or 'attention', got {mixer!r}; {nearest(str(mixer), MIXERS)}")
        if self.embed_dims[0] % 2:
            raise ValueError(
                "embed_dims must begin with an even number, half of which the stem begins with; got "
                f"{self.embed_dims[0]}, nearest valid: {self.embed_dims[0] + 1}"
            )
        check_heads([self.inner(stage) for stage in range(stages)], self.num_heads)
        check_size_and_rate(self.img_size, self.drop_path_rate)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def inner(self, stage: int) -> int:
        """Channels that the heads of a stage share among them."""
        channels = self.embed_dims[stage]
        return int(self.expand * channels) if self.mixers[stage] == "ssd" else channels


class StateSpaceDuality(nn.Module):
    """Mixes tokens through a state for each head, to which all add and which all read (paper, section 3.2)."""

    def __init__(self, config: VssdConfig, stage: int) -> None:
        super().__init__()
        channels, heads = config.embed_dims[stage], config.num_heads[stage]
        self.inner, self.states = config.inner(stage), config.d_state
        self.positive_decay, self.causal = config.positive_decay, config.causal
        mixed = self.inner + 2 * self.states
        self.parts = (self.inner, mixed, heads)
        self.in_proj = nn.Linear(channels, sum(self.parts), bias=False)
        self.conv2d = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.dt_bias = nn.Parameter(initial_step_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = LayerNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        z, mixed, dt = self.project(x)
        mixed = convolve(self.conv2d, mixed, activation="silu").flatten(1, 2)
        if mixed.dtype == torch.float16:  # whose range ends before what all tokens add up to
            mixed = mixed.float()
        rate = self.A_log.float().exp()
        y = state_space_dual(
            mixed,  # input and both maps, side by side
            dt.flatten(1, 2),
            -rate if self.positive_decay or self.causal else rate,
            D=self.D,
            dt_bias=self.dt_bias,
            softplus=True,
            states=self.states,
            causal=self.causal,
        )
        y = self.norm(y.view(z.shape)).to(z.dtype)
        return self.out_proj(y * z)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Gate, what is convolved, and steps, each (B, H, W, ...)."""
        if is_plain(self.in_proj):  # by three products: what is convolved must lie together, and so need not be copied
            return [F.linear(x, weight) for weight in self.in_proj.weight.split(self.parts)]
        return self.in_proj(x).split(self.parts, -1)


class Attention(nn.Module):
    """Multi-head attention over the whole map."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        qkv = self.to_qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(x.shape))


class VssdBlock(nn.Module):
    """A mixer and an MLP, in front of each a depthwise convolution that tells positions apart."""

    def __init__(self, config: VssdConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.embed_dims[stage]
        self.cpe1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = LayerNorm(channels)
        self.attn = (
            StateSpaceDuality(config, stage)
            if config.mixers[stage] == "ssd"
            else Attention(channels, config.num_heads[stage])
        )
        self.cpe2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = convolve(self.cpe1, x, residual=True)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = convolve(self.cpe2, x, residual=True)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvNorm(nn.Module):
    """A convolution without bias, and a batch norm of what it gives."""

    def __init__(self, channels: int, out_channels: int, side: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, side, stride, padding=side // 2, bias=False)
        self.norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        return self.norm(self.conv(x))

    def fuse_(self) -> None:
        """Fold the norm into the convolution."""
        fold_neighbours(self, ["conv", "norm"])


class Stem(nn.Module):
    """Image to the first stage's map, by five convolutions."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        half, wide = channels // 2, 4 * channels
        self.conv1 = ConvNorm(in_chans, half, stride=2)
        self.conv2 = nn.ModuleList([ConvNorm(half, half), ConvNorm(half, half)])
        self.conv3 = nn.ModuleList([ConvNorm(half, wide, stride=2), ConvNorm(wide, channels, side=1)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H / 4), ceil(W / 4), channels)."""
        x = F.relu(self.conv1(x))
        x = x + self.conv2[1](F.relu(self.conv2[0](x)))
        return self.conv3[1](F.relu(self.conv3[0](x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Halve the map by a depthwise convolution of eight times as many channels."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        wide = 8 * channels
        self.expand = nn.Linear(channels, wide)
        self.conv = nn.Conv2d(wide, wide, 3, 2, padding=1, groups=wide)
        self.reduce = nn.Linear(wide, out_channels)
        self.norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, channels) to (B, ceil(H / 2), ceil(W / 2), out_channels)."""
        x = F.relu(self.expand(x)).permute(0, 3, 1, 2)
        x = self.reduce(F.relu(self.conv(x)).permute(0, 2, 3, 1))
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fuse_(self) -> None:
        """Fold the norm into the linear layer in front of it."""
        fold_neighbours(self, ["reduce", "norm"])


class VssdStage(nn.Module):
    """Blocks of one resolution, and the downsampling that leads to the next one."""

    def __init__(self, config: VssdConfig, stage: int, rates: Sequence[float], following: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VssdBlock(config, stage, rate) for rate in rates)
        self.blocks.apply(_init_module)
        if following is not None:
            self.downsample = Downsample(config.embed_dims[stage], following)


def _init_module(module: nn.Module) -> None:
    """Convolutions, and the linear layers that are point-wise convolutions, keep PyTorch's own initialisation."""
    if isinstance(module, nn.Linear):
        init_linear(module)


class Vssd(Backbone):
    """VSSD; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    output_norm_name = "outnorm{}"
    stem_name = "patch_embed.conv1.conv"

    def __init__(self, config: VssdConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        widths = [*config.embed_dims[: self.built_stages], None]
        self.patch_embed = Stem(self.in_chans, config.embed_dims[0])
        self.layers = nn.ModuleList(
            VssdStage(config, i, rates[i], following) for i, (_, following) in enumerate(pairwise(widths))
        )
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))  # so the map comes as (B, H, W, C)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(VssdStage, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """The end of the stage before; see `Backbone`."""
        return cast(VssdStage, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        ends = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*ends, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^patch_embed\.",
    renames=(
        (r"\.downsample\.conv\.0\.conv\.", ".downsample.expand."),
        (r"\.downsample\.conv\.1\.conv\.", ".downsample.conv."),
        (r"\.downsample\.conv\.2\.conv\.", ".downsample.reduce."),
        (r"\.downsample\.conv\.2\.norm\.", ".downsample.norm."),
    ),
    ignored=(r"\.num_batches_tracked$",),
    reorders=((r"\.downsample\.conv\.[02]\.conv\.weight$", as_linear),),
)

HUB = "https://huggingface.co/YuhengSSS/VSSD/resolve/main"
# Of files whose name says so the authors' measured weights are averages, saved beside the raw ones.
AVERAGED = ("model_ema", "model")


def _weights(size: str, params: float, top1: float, mesa: float | None = None) -> dict[str, Weights]:
    """The best weights of a plain run and, where there was one, the last of a run with MESA."""
    shared: dict[str, Any] = {
        "license": NOT_STATED,
        "repository": "YuHengsss/VSSD",
        "commit": "87b753b356dd0cd176a6356fdb82fa536d8435eb",
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "params": round(params * 1e6),
    }
    averaged = mesa is not None
    found = {
        "in1k": Weights(
            url=f"{HUB}/vssd_{size}_best{'_ema' if averaged else ''}.pth",
            container=AVERAGED if averaged else None,
            metrics={"top1": top1},
            **shared,
        )
    }
    if mesa is not None:
        found["in1k_mesa"] = Weights(
            url=f"{HUB}/vssd_{size}_e300_with_mesa.pth",
            metrics={"top1": mesa},
            note="trained with MESA, a loss against what the average of the weights predicts",
            **shared,
        )
    return found


_DEEP: dict[str, Any] = {"depths": (3, 4, 21, 5)}

# The published operations hold about half of those of the mixers; see the test of them.
VARIANTS = {
    "vssd_micro": Variant(
        # The authors' file says 0.1; their code reads another entry of it and may have used 0.2.
        config=VssdConfig(embed_dims=(48, 96, 192, 384), depths=(2, 2, 8, 4), d_state=48, drop_path_rate=0.1),
        weights=_weights("micro", 13.5, 82.5),
        gmacs=2.3,
    ),
    "vssd_tiny": Variant(config=VssdConfig(), weights=_weights("tiny", 24.3, 83.6, 84.1), gmacs=4.5),
    "vssd_small": Variant(
        config=VssdConfig(**_DEEP, drop_path_rate=0.4), weights=_weights("small", 40.1, 84.1, 84.5), gmacs=7.4
    ),
    "vssd_base": Variant(
        config=VssdConfig(**_DEEP, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), drop_path_rate=0.6),
        weights=_weights("base", 88.8, 84.7, 85.4),
        gmacs=16.1,
    ),
}

FAMILY = Family(
    name="vssd",
    model=Vssd,
    config=VssdConfig,
    variants=VARIANTS,
    mixer="state space duality",
    paper="VSSD: Vision Mamba with Non-Causal State Space Duality, 2024, arXiv 2407.18559",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={
        "img_size": 64,
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 4, 4),
        "d_state": 8,
    },
)
