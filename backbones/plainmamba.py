"""PlainMamba: a plain backbone whose blocks scan the map along four snake-like routes.

Paper: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024, arXiv 2403.17695.
Official code: ChenhongyiYang/PlainMamba at 0975a1d (Apache-2.0).

What differs from the official code, and why:

- Routes are index arithmetic inside one operator, which also projects the steps and adds up the routes. Nothing is
  gathered, and the sum stays in float32.
- As in the official code, and in its weights, routes carry pixels only: step t of a route combines the pixel it has
  come to with the step and the maps of the t-th pixel in raster order. The steps' bias is added twice.
- Maps stay (B, H, W, C) between blocks.
- Four stages of equal size, so that features can be taken from several depths: those after which the authors' dense
  code takes them. With `output_norms` their maps are normalised as there, the last one by the classifier's norm.
- Tokens can be pruned, as in "Exploring Token Pruning in Vision State Space Models" (NeurIPS 2024, arXiv 2409.18962),
  whose code has this for Vim alone; what it leaves open is decided as in `vim.py`. On each route a pruned pixel keeps
  its place: it adds nothing to a state, which decays over it by the step that zero features give, softplus of twice
  the bias. Steps and maps are taken from the kept pixels in raster order, as unpruned routes take them from all.
  Pruned pixels keep their last value, for feature maps and for the mean that is classified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import selective_scan
from vizoo.ops.selective_scan_2d import CONTINUOUS_ROUTES, selective_scan_2d
from vizoo.ops.tracing import known
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
from .layers import BatchNorm, DropPath, LayerNorm, convolve, pad_to_multiple, resize_grid
from .vim import check_pruning, most_important, rates, walk_pruned

STRIDE = 16
"""Stride of the stem, and of every stage."""
STEM_CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class PlainMambaConfig:
    """Configuration of a PlainMamba.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position table; any other
            size runs as well.
        embed_dim: Channels.
        depths: Blocks per stage; all stages are alike, so only their sum and where features are taken depends on it.
        stem_depth: 3 x 3 convolutions of the stem.
        conv_layers: Numbers of the blocks behind which a depthwise convolution follows.
        expand: Channels of the scans over the block's channels.
        state_dim: States of each channel of a scan.
        conv_size: Side of the convolution in front of a scan.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map and no classifier.
        prune_after: Prune tokens after so many blocks, counted from 1. Nothing by default.
        keep_ratio: Share of the tokens that each pruning keeps.
    """

    img_size: int | tuple[int, int] = 224
    embed_dim: int = 192
    depths: tuple[int, ...] = (6, 6, 6, 6)
    stem_depth: int = 2
    conv_layers: tuple[int, ...] = ()
    expand: int = 2
    state_dim: int = 16
    conv_size: int = 7
    drop_path_rate: float = 0.2
    output_norms: bool = False
    prune_after: tuple[int, ...] = ()
    keep_ratio: float = 0.8

    def __post_init__(self) -> None:
        if not self.depths or min(*self.depths, self.embed_dim, self.expand, self.state_dim) < 1 or self.stem_depth < 0:
            raise ValueError(
                "depths, embed_dim, expand and state_dim must be positive and stem_depth not negative, got "
                f"{self.depths}, {self.embed_dim}, {self.expand}, {self.state_dim} and {self.stem_depth}"
            )
        if self.conv_size not in (3, 5, 7):
            raise ValueError(f"conv_size must be 3, 5 or 7, got {self.conv_size}")
        if any(not 0 <= block < sum(self.depths) for block in self.conv_layers):
            raise ValueError(f"conv_layers must name blocks 0 to {sum(self.depths) - 1}, got {self.conv_layers}")
        check_pruning(self.prune_after, self.keep_ratio, sum(self.depths))
        if self.conv_layers and self.prune_after and max(self.conv_layers) >= min(self.prune_after):
            raise ValueError(
                f"conv_layers convolve whole maps and must lie in front of pruning after block "
                f"{min(self.prune_after)}, got {self.conv_layers}"
            )
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


class PatchEmbed(nn.Module):
    """Stem: convolutions at half resolution, then patches of 8 x 8 positions."""

    def __init__(self, in_chans: int, channels: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, STEM_CHANNELS, 7, 2, padding=3, bias=False), BatchNorm(STEM_CHANNELS), nn.ReLU()
        )
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += (
                nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1, bias=False),
                BatchNorm(STEM_CHANNELS),
                nn.ReLU(),
            )
        self.convs = nn.Sequential(*layers)
        self.projection = nn.Conv2d(STEM_CHANNELS, channels, STRIDE // 2, STRIDE // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/16), ceil(W/16), C)."""
        x = self.convs(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.projection(pad_to_multiple(x, STRIDE // 2)).permute(0, 2, 3, 1)


class SnakeMamba(nn.Module):
    """Mamba's mixer with a convolution of the map, and one set of parameters for four continuous routes.

    Args:
        channels: Channels of the map.
        expand: Channels of the scans over these.
        states: States of each channel.
        conv_size: Side of the convolution.
    """

    def __init__(self, channels: int, expand: int, states: int, conv_size: int) -> None:
        super().__init__()
        inner, self.states, self.rank = expand * channels, states, math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, conv_size, padding=conv_size // 2, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(0.02 * torch.randn(5, states))
        self.out_proj = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.out_proj(self.scan(x))

    def scan(self, x: Tensor) -> Tensor:
        """What is projected to the output, (B, H, W, expand * C)."""
        x, z = self.in_proj(x).chunk(2, -1)
        x = convolve(self.conv2d, x, activation="silu")
        low_rank, B, C = self.x_proj(x).split((self.rank, self.states, self.states), -1)
        y = selective_scan_2d(
            x, low_rank[..., None, :], rates(self.A_log)[None], B[..., None, :], C[..., None, :], self.D[None],
            delta_weight=self.dt_proj.weight[None].to(low_rank.dtype),  # as autocast has it for layers
            delta_bias=2 * self.dt_proj.bias[None],  # once by the projection, once by the scan
            routes=CONTINUOUS_ROUTES,
            routed_parameters=False,
            direction_B=self.direction_Bs,
        )  # fmt: skip
        return (y * F.silu(z)).to(x.dtype)

    def scan_kept(self, x: Tensor, pixel: Tensor, sides: tuple[int, int]) -> Tensor:
        """`scan` of what is left of a map, (B, L, C) to (B, L, expand * C); see the module's docstring.

        Args:
            x: Normalised tokens.
            pixel: Number of each in the map, counted row after row, ascending, (B, L).
            sides: Rows and columns of the map.
        """
        x, z = self.in_proj(x).chunk(2, -1)
        index = pixel[..., None].expand_as(x)
        whole = x.new_zeros(len(x), sides[0] * sides[1], x.shape[-1]).scatter(1, index, x)
        u = convolve(self.conv2d, whole.unflatten(1, sides), activation="silu").flatten(1, 2).gather(1, index)
        low_rank, B, C = self.x_proj(u).split((self.rank, self.states, self.states), -1)
        bias = 2 * self.dt_proj.bias.float()
        step = F.softplus(F.linear(low_rank, self.dt_proj.weight).float() + bias)
        u = u.float()
        y = len(CONTINUOUS_ROUTES) * self.D * u
        for route in CONTINUOUS_ROUTES:
            place, order = route.pixels(*sides, x.device).argsort()[pixel].sort(1)
            turn = order[..., None].expand_as(u)
            longer = step + F.pad(place.diff() - 1, (1, 0))[..., None] * F.softplus(bias)
            turned_B = B + self.direction_Bs[route.directions(*sides, x.device)[place]]
            driven = u.gather(1, turn) * (step / longer)
            out = selective_scan(driven.mT, longer.mT, rates(self.A_log), turned_B.mT, C.mT)
            y = y.scatter_add(1, turn, out.mT)
        return (y * F.silu(z.float())).to(x.dtype)


class PlainMambaBlock(nn.Module):
    """Norm and mixer on a residual branch, in some blocks with a convolution behind the sum."""

    dw: nn.Sequential | None

    def __init__(self, config: PlainMambaConfig, drop_path: float, convolve: bool) -> None:
        super().__init__()
        channels = config.embed_dim
        self.norm = LayerNorm(channels)
        self.mamba = SnakeMamba(channels, config.expand, config.state_dim, config.conv_size)
        self.drop_path = DropPath(drop_path)
        convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.dw = nn.Sequential(convolution, BatchNorm(channels), nn.GELU()) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.mamba(self.norm(x)))
        return x if self.dw is None else self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def sparse(self, x: Tensor, pixel: Tensor | None, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The same of what is left of a map, (B, L, C), and the importance of each token, (B, L)."""
        normed = self.norm(x)
        if pixel is None:
            y = self.mamba.scan(normed.unflatten(1, sides)).flatten(1, 2)
        else:
            y = self.mamba.scan_kept(normed, pixel, sides)
        x = x + self.drop_path(self.mamba.out_proj(y))
        if self.dw is not None:
            x = self.dw(x.mT.unflatten(2, sides)).flatten(2).mT
        return x, y.detach().float().clamp(min=0).mean(-1)


class PlainMamba(Backbone):
    """PlainMamba; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"(^pos_embed|\.A_log|\.direction_Bs)$"
    classifier_name = "head.fc"
    stem_name = "patch_embed.stem.0"

    def __init__(self, config: PlainMambaConfig, **kwargs: Any) -> None:
        ends = [sum(config.depths[: i + 1]) for i in range(len(config.depths))]
        stages = [Stage(f"layers.{end - 1}", config.embed_dim, STRIDE) for end in ends]
        super().__init__(config, stages, **kwargs)
        self.ends = ends
        (drops,) = drop_path_rates(config.drop_path_rate, [sum(config.depths)])
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.stem_depth)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(config.map_sides), config.embed_dim))
        self.layers = nn.ModuleList(
            PlainMambaBlock(config, rate, i in config.conv_layers)
            for i, rate in enumerate(drops[: ends[self.built_stages - 1]])
        )
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.ln1 = LayerNorm(self.num_features, eps=1e-6, keep_float32=True)
            self.head = nn.ModuleDict({"fc": make_classifier(self.num_features, self.num_classes)})
        self.apply(self._init_module)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # convolutions keep PyTorch's own initialisation
            init_linear(module)

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
        return self.run_blocks([self.layers[i] for i in self._blocks(index)], x)

    def _blocks(self, stage: int) -> range:
        """Numbers of the blocks of a stage."""
        return range(self.ends[stage] - self.config.depths[stage], self.ends[stage])

    def _walk(self, x: Tensor, wanted: Sequence[int]) -> list[tuple[int, Tensor]]:
        if not self.config.prune_after:
            return super()._walk(x, wanted)
        self._check_input(x)
        x = self.stem(x)
        sides = x.shape[1], x.shape[2]
        blocks = [partial(cast(PlainMambaBlock, block).sparse, sides=sides) for block in self.layers]
        walk = walk_pruned(self, blocks, x.flatten(1, 2), [self.ends[i] for i in wanted], self._kept)
        return [(index, y.unflatten(1, sides)) for index, y in zip(wanted, walk, strict=True)]

    def _kept(self, importance: Tensor, position: Tensor | None) -> Tensor:
        """Which tokens stay, ascending, (B, L')."""
        del position
        return most_important(importance, math.ceil(importance.shape[1] * self.config.keep_ratio))

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Nothing: all stages have one resolution."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.ln1(x)

    def make_output_norm(self, channels: int) -> nn.Module:
        """A norm of the dense version; see `Backbone`."""
        return LayerNorm(channels, eps=1e-6, keep_float32=True)

    def add_output_norms(self) -> None:
        """A norm for each output but the last stage's, which has the classifier's; see `Backbone`."""
        last = len(self.stages) - 1
        for index in self.out_indices:
            name = "ln1" if index == last else self.output_norm_name.format(index)
            self.add_module(name, self.make_output_norm(self.num_features))

    def _output_norm(self, index: int) -> nn.Module:
        is_last = index == len(self.stages) - 1
        return getattr(self, "ln1", nn.Identity()) if is_last else super()._output_norm(index)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize the position table; name the norms of dense checkpoints by stage, not by block; see `Backbone`."""
        done: dict[str, str] = {}
        for stage, end in enumerate(self.ends):
            for leaf in ("weight", "bias"):
                official, ours = f"norm_layer{end - 1}.{leaf}", f"{self.output_norm_name.format(stage)}.{leaf}"
                if official in state:
                    state[ours] = state.pop(official)
                    done[ours] = f"named {official} there"
        table, grid = state.get("pos_embed"), self.config.map_sides
        if table is not None and table.shape[1] != math.prod(grid):
            side = math.isqrt(table.shape[1])
            if side**2 == table.shape[1]:
                state["pos_embed"] = resize_grid(table, (side, side), grid)
                done["pos_embed"] = f"positions of {side} x {side} to {grid[0]} x {grid[1]} patches, bicubic"
        return done

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, or per stage."""
        stem = r"^(?:patch_embed|pos_embed)"
        if not coarse:
            return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None)]}
        blocks = ["|".join(map(str, self._blocks(i))) for i in range(len(self.stages))]
        return {"stem": stem, "blocks": [(rf"^layers\.(?:{numbers})\.", (i,)) for i, numbers in enumerate(blocks)]}


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^backbone\.layers\.\d+\.mamba\.",
    renames=((r"^backbone\.", ""),),
    ignored=(r"num_batches_tracked$",),
)


def _weights(name: str, top1: float, top5: float, params: float) -> dict[str, Weights]:
    record = Weights(
        url=f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/{name}.pth",
        container="state_dict",
        license="Apache-2.0",
        repository="ChenhongyiYang/PlainMamba",
        commit="0975a1d0d8bca50e7b85cf15e53de2a383ae12a0",
        input_size=(3, 224, 224),
        num_classes=1000,
        crop_pct=0.875,
        metrics={"top1": top1, "top5": top5},
        params=round(params * 1e6),
    )
    return {"in1k": record}


_L1: dict[str, Any] = {"embed_dim": 192, "stem_depth": 1, "conv_layers": (0,)}
_L2: dict[str, Any] = {"embed_dim": 384}
_L3: dict[str, Any] = {"embed_dim": 448, "depths": (9, 9, 9, 9), "drop_path_rate": 0.4}

VARIANTS = {
    "plainmamba_l1": Variant(config=PlainMambaConfig(**_L1), weights=_weights("l1", 77.9, 94.0, 7.3)),
    "plainmamba_l2": Variant(config=PlainMambaConfig(**_L2), weights=_weights("l2", 81.6, 95.6, 25.7)),
    "plainmamba_l3": Variant(config=PlainMambaConfig(**_L3), weights=_weights("l3", 82.3, 95.9, 50.5)),
}

FAMILY = Family(
    name="plainmamba",
    model=PlainMamba,
    config=PlainMambaConfig,
    variants=VARIANTS,
    mixer="selective scan",
    paper="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition, BMVC 2024, arXiv 2403.17695",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "state_dim": 4, "conv_size": 3},
)
