"""SLAB: transformers whose LayerNorm gives way to a batch norm that folds away, with linear attention in early stages.

Paper: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", ICML 2024, arXiv 2405.11582. Official code: xinghaochen/SLAB at f58db00 (no licence file; the headers of
files derived from Swin name MIT).

Two parts, of which the models named `*_prepbn` have the first alone: norms that train as LayerNorm and are deployed as
numbers of the layers beside them (`progressive_norm`), and linear attention whose feature map is a ReLU, beside a 5 x 5
convolution of the values. `fuse()` folds the norms. Both stand in the frames of DeiT, PVT, Swin and CSwin.

What differs from the official code, and why:

- Any image size runs. The positions of keys, a learned table, belong to one grid of tokens: where attention is over the
  whole map they are resized like the frame's own table of positions; Swin's frame attends inside windows of the table's
  size, as the authors' dense code does, which pads a map and shifts the windows of every second block.
- A folded patch embedding keeps the term alpha * bias of its convolution, which the authors' merging code drops, so
  their merged model is another one wherever that bias is not zero. The final norm stays as it is unless
  `fuse(keep_norm=False)` is asked for, and then goes into the classifier; the authors push it through the last stage.
- Gradient checkpointing does not count a step of the norms' schedule twice; see `ProgressiveNorm`.
- Under autocast the sums of linear attention are float32 in every frame; in PVT's and CSwin's the official code leaves
  them in half precision.
- What is in the checkpoints and never computed with is kept, but not trained: with linear attention the class token of
  DeiT's frame, and `scale` of CSwin's branches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import KernelSum, depthwise_conv, linear_attention
from vizoo.ops.tracing import known
from vizoo.weights.record import NOT_STATED, Weights

from .base import Backbone, CheckpointLayout, Family, Variant
from .hosts import (
    CswinConfig,
    CswinHost,
    DeitConfig,
    DeitHost,
    MakeNorm,
    PvtConfig,
    PvtHost,
    ReducedAttention,
    ShiftedWindowAttention,
    SwinHost,
    TokenAttention,
    same_grid,
    square_grid,
    stripe_branches,
)
from .layers import convolve, is_plain, resize_grid
from .progressive_norm import ProgressiveNorm, RepBN, check_steps
from .swin import SwinConfig, shift_of

Mode = Literal["bicubic", "bilinear"]


# Configurations.


@dataclass(frozen=True, kw_only=True)
class SlabFields:
    """What the configurations of all frames have.

    Attributes:
        norm_steps: Training steps until LayerNorm has no share left; 0 for the batch norm alone from the start on.
        norm_warmup: Steps with LayerNorm alone before these.
        linear_stages: The first so many stages mix tokens by linear attention, the others by softmax.
    """

    norm_steps: int = 300_000
    norm_warmup: int = 0
    linear_stages: int = 0

    def check_fields(self, stages: int) -> None:
        """Raise where a schedule has no steps, or more stages are linear than there are."""
        check_steps(1, norm_steps=self.norm_steps, norm_warmup=self.norm_warmup)
        if not 0 <= self.linear_stages <= stages:
            raise ValueError(f"linear_stages must lie in 0..{stages}, the number of stages, got {self.linear_stages}")


@dataclass(frozen=True, kw_only=True)
class SlabDeitConfig(SlabFields, DeitConfig):
    """Configuration in DeiT's frame: the fields of `DeitConfig` and of `SlabFields`."""

    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(len(self.depths))
        if self.linear_stages and self.class_token:
            raise ValueError(
                "linear attention takes the patches of a whole map, which a class token is not: with "
                f"linear_stages={self.linear_stages} set class_token=False"
            )


@dataclass(frozen=True, kw_only=True)
class SlabPvtConfig(SlabFields, PvtConfig):
    """Configuration in PVT's frame: the fields of `PvtConfig` and of `SlabFields`, and one of its own.

    Attributes:
        reductions: Side of the patches that give softmax attention a key each, per stage; linear attention needs none.
    """

    reductions: tuple[int, ...] = (8, 4, 2, 1)
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(len(self.depths))
        if len(self.reductions) != len(self.depths):
            raise ValueError(
                f"reductions need one entry per stage, got {self.reductions} for {len(self.depths)} stages"
            )
        # The smallest image has 32 pixels a side.
        most = [max(1, 8 // 2**i) for i in range(len(self.depths))]
        if any(not 1 <= side <= limit for side, limit in zip(self.reductions, most, strict=True)):
            raise ValueError(f"reductions must lie in 1 to {tuple(most)}, got {self.reductions}")


@dataclass(frozen=True, kw_only=True)
class SlabSwinConfig(SlabFields, SwinConfig):
    """Configuration in Swin's frame: the fields of `SwinConfig` and of `SlabFields`, and one of its own.

    Attributes:
        linear_window: Side of the window of linear attention, as `window_size` is of softmax attention. Where it does
            not cover the map it is shifted as Swin's is.
    """

    linear_window: int = 56

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(len(self.depths))
        if self.linear_window < 2:
            raise ValueError(f"linear_window must be at least 2, got {self.linear_window}")

    @property
    def windows(self) -> tuple[int, ...]:
        """Window side per stage, or the map's smaller side at `img_size` where that is smaller."""
        sides = [self.linear_window if i < self.linear_stages else self.window_size for i in range(len(self.depths))]
        strides = [self.patch_size * 2**i for i in range(len(self.depths))]
        return tuple(
            min(window, *(-(-side // stride) for side in self.image_sides))
            for window, stride in zip(sides, strides, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class SlabCswinConfig(SlabFields, CswinConfig):
    """Configuration in CSwin's frame: the fields of `CswinConfig` and of `SlabFields`, and one of its own.

    Attributes:
        unused_scale: Have the parameter `scale` of linear attention that official checkpoints have, though nothing is
            computed with it. It is not trained.
    """

    unused_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(len(self.depths))

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map at `img_size`."""
        height, width = self.image_sides
        return -(-height // (4 * 2**stage)), -(-width // (4 * 2**stage))


# Linear attention.


class LinearMixer(nn.Module):
    """Linear attention between the tokens of a map, beside a convolution of the values that all heads share.

    With q and k after a ReLU and P, learned, added to k before it, out_i = q_i (sum over j of k_j v_j^T) /
    (q_i . (sum over j of k_j) + 1e-6) + the 5 x 5 convolution of v at i.

    Args:
        channels: Channels of the map.
        heads: Attention heads.
        grid: Rows and columns of the table P.
        mode: How P is resized to another map.
    """

    def __init__(self, channels: int, heads: int, grid: tuple[int, int], mode: Mode = "bicubic") -> None:
        super().__init__()
        self.heads, self.grid, self.mode = heads, grid, mode
        self.positional_encoding = nn.Parameter(torch.zeros(1, grid[0] * grid[1], channels))
        self.dwc = nn.Conv2d(channels // heads, channels // heads, 5, padding=2, groups=channels // heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Maps (B, H, W, C) to what is projected, of the same shape."""
        return self.attend(q, k, v) + self.convolve(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention alone, (B, H, W, C)."""
        queries, keys, values = (each.flatten(1, 2).unflatten(-1, (self.heads, -1)) for each in (q, k, v))
        positions = self.positions(*v.shape[1:3])[0].unflatten(-1, (self.heads, -1))
        return linear_attention(queries, keys, values, KernelSum(), key_position=positions).view(v.shape)

    def positions(self, rows: int, columns: int) -> Tensor:
        """P for a map of this size, (1, rows * columns, C)."""
        if same_grid(self.grid, (rows, columns)):
            return self.positional_encoding
        return resize_grid(self.positional_encoding, self.grid, (rows, columns), self.mode)

    def convolve(self, v: Tensor) -> Tensor:
        """The convolution of the values, (B, H, W, C)."""
        if is_plain(self.dwc):
            return depthwise_conv(v, *self.filters())
        heads = v.unflatten(-1, (self.heads, -1)).permute(0, 3, 4, 1, 2)  # (B, heads, d, H, W)
        return self.dwc(heads.flatten(0, 1)).unflatten(0, heads.shape[:2]).permute(0, 3, 4, 1, 2).flatten(3)

    def filters(self) -> tuple[Tensor, Tensor]:
        """Filters (C, 1, 5, 5) and biases (C,) of all heads."""
        return self.dwc.weight.repeat(self.heads, 1, 1, 1), cast(Tensor, self.dwc.bias).repeat(self.heads)


def project(layer: nn.Linear, x: Tensor, *sizes: int) -> Sequence[Tensor]:
    """Parts of what a linear layer gives, of so many channels each, the last of which lies together in memory."""
    if not is_plain(layer):
        return layer(x).split(sizes, -1)
    *others, last = sizes
    weights, biases = layer.weight.split((sum(others), last)), layer.bias.split((sum(others), last))
    first, second = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return *first.split(others, -1), second


class LinearTokenAttention(LinearMixer):
    """Linear attention in DeiT's frame."""

    def __init__(self, channels: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(channels, heads, grid)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, rows * columns, C) to the same shape."""
        parts = project(self.qkv, x, *3 * (x.shape[-1],))
        q, k, v = (part.unflatten(1, grid) for part in parts)
        return self.proj(self.mix(q, k, v).flatten(1, 2))


class LinearMapAttention(LinearMixer):
    """Linear attention in PVT's frame."""

    reads = ("q", "kv")

    def __init__(self, channels: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(channels, heads, grid, "bilinear")
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        k, v = project(self.kv, x, *2 * (x.shape[-1],))
        return self.proj(self.mix(self.q(x), k, v))


class LinearBranch(LinearMixer):
    """Linear attention in CSwin's frame, to whose convolution another of 3 x 3 is added."""

    def __init__(self, channels: int, heads: int, grid: tuple[int, int], unused_scale: bool) -> None:
        super().__init__(channels, heads, grid)
        if unused_scale:
            self.scale = nn.Parameter(torch.zeros(1, 1, channels), requires_grad=False)
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, qkv: Tensor, x: Tensor) -> Tensor:
        """(B, H, W, 3, C) to (B, H, W, C)."""
        del x
        return self.mix(*qkv.unbind(3))

    def convolve(self, v: Tensor) -> Tensor:
        """Both convolutions of the values, where possible as one, (B, H, W, C)."""
        if not (is_plain(self.dwc) and is_plain(self.get_v)):
            return super().convolve(v) + convolve(self.get_v, v)
        weight, bias = self.filters()
        return depthwise_conv(v, weight + F.pad(self.get_v.weight, (1, 1, 1, 1)), bias + cast(Tensor, self.get_v.bias))


# Attention inside windows. A map is padded with zeros in front of the projection, which makes its bias of them. A norm
# that is folded into the projection changes that bias, so the one that padded positions have is kept.


class WindowPlaces(NamedTuple):
    """Where the positions of the windows of a map come from, (windows * side^2,), and where its pixels go, (H * W,).

    A position whose source is not `inside` the map is padded.
    """

    source: Tensor
    inside: Tensor
    target: Tensor


def window_places(height: int, width: int, side: int, shift: int, device: torch.device) -> WindowPlaces:
    """Places of the windows of a map that is padded at the bottom and right, then rolled by minus `shift`.

    Index arithmetic, so that it also traces with a symbolic height, width and shift; then with a window to spare.
    """
    down, across = (height + side - 1) // side, (width + side - 1) // side
    count = down * across
    spare = not (known(count == 1) or known(count > 1))  # whether it is 1 would be a guard
    window = torch.arange(count + spare, device=device).clamp(max=count - 1)[:, None]
    place = torch.arange(side * side, device=device)
    y = (window // across * side + place // side + shift) % (down * side)
    x = (window % across * side + place % side + shift) % (across * side)
    source = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    row = (torch.arange(height, device=device) - shift)[:, None] % (down * side)
    column = (torch.arange(width, device=device) - shift) % (across * side)
    target = (row // side * across + column // side) * side**2 + row % side * side + column % side
    return WindowPlaces(source.flatten(), ((y < height) & (x < width)).flatten(), target.flatten())


class LinearWindowAttention(LinearMixer):
    """Linear attention inside the windows of a map, in Swin's frame."""

    padding_bias: Tensor | None

    def __init__(self, channels: int, heads: int, window: int, shifted: bool, always_shift: bool) -> None:
        super().__init__(channels, heads, (window, window))
        self.window, self.shifted, self.always_shift = window, shifted, always_shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.register_buffer("padding_bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width, channels = x.shape[1:]
        side = self.window
        if same_grid((height, width), (side, side)):
            return self.proj(self.mix(*project(self.qkv, x, *3 * (channels,))))
        places = window_places(height, width, side, self.shift(height, width), x.device)
        tokens = self.qkv(x).flatten(1, 2).index_select(1, places.source)
        tokens = torch.where(places.inside[:, None], tokens, self.padding().to(tokens.dtype))
        windows = x.shape[0] * (places.source.shape[0] // side**2)
        out = self.mix(*tokens.view(windows, side, side, 3 * channels).chunk(3, -1))
        out = out.view(x.shape[0], places.source.shape[0], channels)
        return self.proj(out.index_select(1, places.target).view(x.shape))

    def shift(self, height: int, width: int) -> int:
        """How far windows are moved on a map of this size."""
        if not self.shifted:
            return 0
        return self.window // 2 if self.always_shift else shift_of(self.window, height, width)

    def padding(self) -> Tensor:
        """Query, key and value of a padded position, (3C,)."""
        return self.qkv.bias if self.padding_bias is None else self.padding_bias

    def fuse_(self) -> None:
        """Keep what padded positions are made of."""
        if self.padding_bias is None:
            self.padding_bias = self.qkv.bias.detach().clone()


class SoftmaxWindowAttention(ShiftedWindowAttention):
    """Swin's attention."""

    padding_bias: Tensor | None

    def __init__(self, config: SwinConfig, stage: int, shifted: bool) -> None:
        super().__init__(config, stage, shifted)
        self.register_buffer("padding_bias", None)

    def padding(self) -> Tensor:
        """Query, key and value of a padded position, (3, heads, d)."""
        return super().padding() if self.padding_bias is None else self.padding_bias.view(3, self.heads, -1)

    def fuse_(self) -> None:
        """Keep what padded positions are made of."""
        if self.padding_bias is None:
            self.padding_bias = self.qkv.bias.detach().clone()


# Models.


def norm_builder(config: SlabFields, layer_norm_eps: float | None = None) -> MakeNorm:
    """What builds the norms of a model; LayerNorm's eps is the frame's, unless it is given."""

    def build(channels: int, *, keep_float32: bool = False, eps: float = 1e-5) -> nn.Module:
        if config.norm_steps == 0:
            return RepBN(channels, keep_float32)
        return ProgressiveNorm(
            channels, config.norm_steps, config.norm_warmup, layer_norm_eps or eps, keep_float32=keep_float32
        )

    return build


class Slab(Backbone):
    """What the models of all frames have: checkpoints of either spelling of the norms, and tables of any size."""

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Spell the norms as this model does, and resize tables of positions; see `Backbone`."""
        done = super().adapt_checkpoint(state)
        spell = take_progressive_norms if self.config.norm_steps else take_batch_norms
        own = self.state_dict()
        for key in spell(state, own, done):
            if self.features_only and key not in own:  # of a part that was not built
                del state[key]
        return done | self._resize_tables(state)

    def _resize_tables(self, state: dict[str, Tensor]) -> dict[str, str]:
        done = {}
        for path, mixer in self.named_modules():
            name = f"{path}.positional_encoding"
            if not isinstance(mixer, LinearMixer) or name not in state:
                continue
            old = square_grid(state[name].shape[1])
            if old is not None and old != mixer.grid:
                state[name] = resize_grid(state[name], old, mixer.grid, mixer.mode)
                done[name] = f"positions of {old[0]} x {old[1]} to {mixer.grid[0]} x {mixer.grid[1]}, {mixer.mode}"
        return done


# Official checkpoints name what a batch norm has `<norm>.alpha` and `<norm>.bn.*`, in a progressive norm
# `<norm>.norm2.alpha` and `<norm>.norm2.bn.*`, beside LayerNorm's `<norm>.norm1.*` and counters.


def wrapped_norms(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the progressive norms in a checkpoint, each with the dot behind it."""
    paths = [key.removesuffix("norm2.alpha") for key in state if key.endswith("norm2.alpha")]
    return [path for path in paths if f"{path}norm1.weight" in state]  # else it is the second norm of a block


def take_batch_norms(state: dict[str, Tensor], own: Mapping[str, Tensor], done: dict[str, str]) -> list[str]:
    """Leave of progressive norms in a checkpoint their batch norms alone; gives the names that are new."""
    del own
    renamed = []
    for path in wrapped_norms(state):
        for key in [key for key in state if key.startswith(path)]:
            value, name = state.pop(key), key.removeprefix(path)
            if name.startswith("norm2."):
                renamed.append(path + name.removeprefix("norm2."))
                state[renamed[-1]] = value
    if renamed:
        done["norms"] = "the batch norms of progressive norms"
    return renamed


def take_progressive_norms(state: dict[str, Tensor], own: Mapping[str, Tensor], done: dict[str, str]) -> list[str]:
    """Make progressive norms of batch norms, at the end of their schedule; gives the names that are new."""
    renamed = []
    if not wrapped_norms(state):
        for key in list(state):
            found = re.fullmatch(r"(.+\.)(alpha|bn\.\w+)", key)
            if found:
                renamed.append(f"{found[1]}norm2.{found[2]}")
                state[renamed[-1]] = state.pop(key)
    if renamed:
        done["norms"] = "batch norms, to which a LayerNorm without a share was added"
        missing = [key for key in own if re.search(r"(?:^|\.)norm1\.(?:weight|bias)$", key) and key not in state]
        state |= {key: own[key] for key in missing}
    counters = [key for key in own if COUNTER.search(key) and key not in state]
    state |= {key: own[key] if key.endswith("total_step") else torch.zeros_like(own[key]) for key in counters}
    if counters:
        done["iter"] = "not in the checkpoint, so the norms are at the end of their schedule"
    return renamed


COUNTER = re.compile(r"(?:^|\.)(?:warm|iter|total_step)$")


class SlabDeit(Slab, DeitHost):
    """SLAB-DeiT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: SlabDeitConfig, **kwargs: Any) -> None:
        def mixer(stage: int, block: int) -> nn.Module:
            del block
            if stage < config.linear_stages:
                return LinearTokenAttention(config.embed_dim, config.num_heads, config.grid(config.image_sides))
            return TokenAttention(config.embed_dim, config.num_heads)

        super().__init__(config, mixer, norm_builder(config), **kwargs)
        if not config.class_token:  # of no use, but in checkpoints
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim), requires_grad=False)


class SlabPvt(Slab, PvtHost):
    """SLAB-PVT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    no_decay = r"$^"

    def __init__(self, config: SlabPvtConfig, **kwargs: Any) -> None:
        norm = norm_builder(config, layer_norm_eps=1e-6)

        def mixer(stage: int, block: int) -> nn.Module:
            del block
            channels, heads = config.embed_dims[stage], config.num_heads[stage]
            if stage < config.linear_stages:
                return LinearMapAttention(channels, heads, config.grid(stage))
            return ReducedAttention(channels, heads, config.reductions[stage], norm)

        super().__init__(config, mixer, norm, **kwargs)


class SlabSwin(Slab, SwinHost):
    """SLAB-Swin; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: SlabSwinConfig, **kwargs: Any) -> None:
        def mixer(stage: int, block: int) -> nn.Module:
            if stage >= config.linear_stages:
                return SoftmaxWindowAttention(config, stage, shifted=block % 2 == 1)
            return LinearWindowAttention(
                config.channels[stage],
                config.num_heads[stage],
                config.windows[stage],
                shifted=block % 2 == 1,
                always_shift=config.output_norms,
            )

        super().__init__(config, mixer, norm_builder(config), **kwargs)


class SlabCswin(Slab, CswinHost):
    """SLAB-CSwin; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: SlabCswinConfig, **kwargs: Any) -> None:
        def branches(stage: int, block: int) -> list[nn.Module]:
            del block
            if stage >= config.linear_stages:
                return stripe_branches(config, stage)
            channels, heads = config.channels[stage], config.num_heads[stage]
            return [LinearBranch(channels, heads, config.grid(stage), config.unused_scale)]

        super().__init__(config, branches, norm_builder(config), **kwargs)


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"(?:^|\.)norm1\.(?:norm2\.)?alpha$",
    ignored=(r"relative_position_index$", r"attn_mask$", r"num_batches_tracked$"),
)

RELEASE = "https://github.com/xinghaochen/SLAB/releases/download/ckpts"


def _variant(config: Any, file: str, top1: float) -> Variant:
    record = Weights(
        url=f"{RELEASE}/{file}.pth",
        license=NOT_STATED,
        repository="xinghaochen/SLAB",
        commit="f58db00b9db3959b5de03986f454aa5ff064279a",
        container="model",
        input_size=(3, 224, 224),
        num_classes=1000,
        metrics={"top1": top1},
    )
    return Variant(config=config, weights={"in1k": record})


_DEIT_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}
_PVT_SMALL: dict[str, Any] = {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1}
_PVT_MEDIUM: dict[str, Any] = {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
_LINEAR_DEIT: dict[str, Any] = {"class_token": False, "linear_stages": 4, "norm_steps": 60_000}
_LINEAR_SWIN: dict[str, Any] = {"linear_stages": 2, "norm_steps": 60_000}
_LINEAR_CSWIN: dict[str, Any] = {"linear_stages": 2, "norm_steps": 120_000}
_SWIN_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2), **_LINEAR_SWIN}

# The authors print no sizes. Those of designs without weights were counted, LayerNorms included.
DEIT_VARIANTS = {
    "deit_tiny_prepbn": _variant(SlabDeitConfig(norm_steps=0), "deit_tiny_prepbn", 73.6),
    "deit_small_prepbn": _variant(SlabDeitConfig(**_DEIT_SMALL), "deit_small_prepbn", 80.2),
    "slab_deit_tiny": _variant(SlabDeitConfig(**_LINEAR_DEIT), "slab_deit_tiny", 74.3),
    "slab_deit_small": _variant(SlabDeitConfig(**_DEIT_SMALL, **_LINEAR_DEIT), "slab_deit_small", 80.0),
}
PVT_VARIANTS = {
    "slab_pvt_tiny": _variant(SlabPvtConfig(linear_stages=4), "slab_pvt_tiny", 76.5),
    "slab_pvt_small": Variant(config=SlabPvtConfig(**_PVT_SMALL, linear_stages=4), params=21.7),
    "slab_pvt_medium": Variant(config=SlabPvtConfig(**_PVT_MEDIUM, linear_stages=4), params=37.3),
    "pvt_tiny_prepbn": _variant(SlabPvtConfig(), "pvt_tiny_prepbn", 76.0),
    "pvt_small_prepbn": _variant(SlabPvtConfig(**_PVT_SMALL), "pvt_small_prepbn", 80.1),
    "pvt_medium_prepbn": _variant(SlabPvtConfig(**_PVT_MEDIUM), "pvt_medium_prepbn", 81.7),
}
SWIN_VARIANTS = {
    "slab_swin_tiny": _variant(SlabSwinConfig(**_LINEAR_SWIN, drop_path_rate=0.2), "slab_swin_tiny", 81.8),
    "slab_swin_small": _variant(SlabSwinConfig(**_SWIN_DEEP, drop_path_rate=0.3), "slab_swin_small", 83.6),
    "slab_swin_base": Variant(
        config=SlabSwinConfig(**_SWIN_DEEP, embed_dim=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5), params=89.0
    ),
    "swin_tiny_prepbn": _variant(SlabSwinConfig(norm_steps=0, drop_path_rate=0.1), "swin_tiny_prepbn", 81.4),
}
CSWIN_VARIANTS = {
    "slab_cswin_tiny": _variant(SlabCswinConfig(**_LINEAR_CSWIN, drop_path_rate=0.1), "slab_cswin_tiny", 82.8),
    "slab_cswin_small": Variant(
        config=SlabCswinConfig(**_LINEAR_CSWIN, depths=(2, 4, 32, 2), drop_path_rate=0.3), params=35.5
    ),
}


def _family(name: str, model: type[Slab], config: type, variants: Mapping[str, Variant], tiny: Any) -> Family:
    return Family(
        name=name,
        model=model,
        config=config,
        variants=variants,
        mixer="linear attention",
        paper="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
        "Normalization, ICML 2024, arXiv 2405.11582",
        layouts=(OFFICIAL_LAYOUT,),
        bias_tables=r"relative_position_bias_table$",
        tiny={"img_size": 64, "depths": (1, 1, 1, 1), "norm_steps": 0, **tiny},
    )


_HEADS: dict[str, Any] = {"num_heads": (1, 2, 2, 4), "linear_stages": 2}

FAMILIES = (
    _family("slab_deit", SlabDeit, SlabDeitConfig, DEIT_VARIANTS, {"patch_size": 8, "embed_dim": 16, "num_heads": 2}),
    _family(
        "slab_pvt",
        SlabPvt,
        SlabPvtConfig,
        PVT_VARIANTS,
        {**_HEADS, "embed_dims": (16, 16, 32, 32), "mlp_ratios": (2, 2, 2, 2), "reductions": (1, 1, 1, 1)},
    ),
    _family(
        "slab_swin",
        SlabSwin,
        SlabSwinConfig,
        SWIN_VARIANTS,
        {**_HEADS, "embed_dim": 16, "depths": (2, 1, 1, 1), "window_size": 4, "linear_window": 8},
    ),
    _family(
        "slab_cswin",
        SlabCswin,
        SlabCswinConfig,
        CSWIN_VARIANTS,
        {**_HEADS, "num_heads": (1, 2, 4, 4), "embed_dim": 16, "unused_scale": False},
    ),
)
