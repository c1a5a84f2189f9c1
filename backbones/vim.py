"""Vim, Vision Mamba: a plain backbone of bidirectional Mamba blocks, its class token in the middle of the sequence.

Paper: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML
2024, arXiv 2401.09417. Official code: hustvl/Vim at dd0358a (Apache-2.0). Token pruning: Zhan et al., "Exploring Token
Pruning in Vision State Space Models", NeurIPS 2024, arXiv 2409.18962.

What differs from the official code, and why:

- Any image size runs; the official code takes one. Images are padded at the bottom and right until the last patch is
  whole, and the position table is resized without the class token's row, which lies in its middle.
- The residual stream is one tensor in float32, to which every block adds its branch, instead of a pair that the next
  block adds up. The sums are the same.
- Neither map nor parameters are reversed for the backward direction: its convolution looks ahead, its scan runs back.
- Four stages of equal size, so that features can be taken from several depths: those after which the authors' dense
  code takes them. Their maps hold the residual stream, which that code offers as an option; by default it takes the
  branch of one block alone.
- With a stride below the patch size, a position of a feature map takes the mean of the patches that cover it: patches
  overlap, so there is one row and column of them less than positions.
- Pruned tokens keep their place in time. What the paper's code leaves open is decided so that pruning equals running
  the whole sequence with the pruned tokens' features at zero: such a token adds nothing to a state, which decays over
  its place by the step that zero features give, softplus(bias), and the convolution finds zeros there. The class token
  keeps its place, too; the paper's code moves it to the middle of the kept ones. Importance is taken from both
  directions together. A pruned token keeps its last value for the feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vizoo.ops import selective_scan
from vizoo.ops.tracing import known
from vizoo.weights.record import Weights

from .base import (
    MIN_SIDE,
    Backbone,
    CheckpointLayout,
    Family,
    Stage,
    Variant,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    make_classifier,
)
from .layers import DropPath, pad_to_multiple, resize_grid


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Configuration of a Vim.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position table; any other
            size runs as well.
        patch_size: Side of a patch, a multiple of `stride` and at most twice as large.
        stride: Pixels from patch to patch, and stride of every stage.
        embed_dim: Channels.
        depths: Blocks per stage; all stages are alike, so only their sum and where features are taken depends on it.
        expand: Channels of the scans over the block's channels.
        state_dim: States of each channel of a scan.
        conv_size: Tokens that the convolution in front of a scan sees.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        class_token: Classify by a token in the middle of the sequence. Without it, as in the authors' dense code,
            by the mean of all tokens.
        prune_after: Prune tokens after so many blocks, counted from 1; (5, 10, 15) as published for Vim-S. Nothing by
            default.
        keep_ratio: Share of the tokens that each pruning keeps.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depths: tuple[int, ...] = (6, 6, 6, 6)
    expand: int = 2
    state_dim: int = 16
    conv_size: int = 4
    drop_path_rate: float = 0.0
    class_token: bool = True
    prune_after: tuple[int, ...] = ()
    keep_ratio: float = 0.8

    def __post_init__(self) -> None:
        if not self.depths or min(*self.depths, self.embed_dim, self.expand, self.state_dim, self.conv_size) < 1:
            raise ValueError(
                "depths, embed_dim, expand, state_dim and conv_size must be positive, got "
                f"{self.depths}, {self.embed_dim}, {self.expand}, {self.state_dim}, {self.conv_size}"
            )
        if self.stride < 1 or self.patch_size not in (self.stride, 2 * self.stride) or self.patch_size > MIN_SIDE:
            raise ValueError(
                f"patch_size must be the stride or twice the stride, and at most {MIN_SIDE}, got patches of "
                f"{self.patch_size} pixels at stride {self.stride}"
            )
        check_pruning(self.prune_after, self.keep_ratio, sum(self.depths))
        check_size_and_rate(self.img_size, self.drop_path_rate)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def grid(self, sides: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of these sides."""
        missing = self.patch_size // self.stride - 1
        rows, columns = ((side + self.stride - 1) // self.stride - missing for side in sides)
        return rows, columns


def check_pruning(prune_after: Sequence[int], keep_ratio: float, blocks: int) -> None:
    """What a configuration with token pruning must hold.

    Raises:
        ValueError: A block does not exist, or nothing or more than everything is kept.
    """
    if any(not 1 <= block <= blocks for block in prune_after):
        raise ValueError(f"prune_after must name blocks 1 to {blocks}, got {tuple(prune_after)}")
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")


class RMSNorm(nn.RMSNorm):
    """Root mean square norm in float32, of a float32 stream, which gives what the linear layer behind it reads.

    Args:
        channels: Length of the last axis.
        keep_float32: Give float32 under autocast; for a norm that no linear layer follows.
        eps: Added to the mean square.
    """

    weight: nn.Parameter

    def __init__(self, channels: int, keep_float32: bool = False, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self._dtype(x))

    def _dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        if device == "meta" or self.keep_float32 or not torch.is_autocast_enabled(device):
            return self.weight.dtype
        return torch.get_autocast_dtype(device)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False) -> Tensor:
    """Depthwise convolution of a sequence over each token and those before it, or with `reverse` those behind it.

    Args:
        x: Tokens, (B, L, C).
        weight: Filters, the token itself last, (C, 1, K).
        bias: Added to each channel, (C,).
        reverse: Look ahead; equals the convolution of the flipped sequence, flipped back.

    Returns:
        (B, L, C), summed in float32, for float64 input in float64.
    """
    length, size = x.shape[1], weight.shape[-1]
    taps = weight.squeeze(1).T.to(torch.promote_types(weight.dtype, torch.float32))
    taps = taps.flip(0) if reverse else taps
    padded = F.pad(x, (0, 0, 0, size - 1) if reverse else (0, 0, size - 1, 0))
    # Not by cuDNN, whose kernel for this takes longer than the scan; compilers make one loop of it.
    y = padded[:, :length] * taps[0]
    for place in range(1, size):
        y = y + padded[:, place : place + length] * taps[place]
    return (y if bias is None else y + bias).to(x.dtype)


def sparse_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, reverse: bool = False
) -> Tensor:
    """`causal_conv` of a sequence of which only some tokens are left, the others being zeros.

    Args:
        x: Tokens left, (B, L', C).
        weight: Filters, the token itself last, (C, 1, K).
        bias: Added to each channel, (C,).
        position: Place of each token in the whole sequence, ascending, (B, L').
        reverse: Look ahead.

    Returns:
        (B, L', C).
    """
    if reverse:
        return sparse_causal_conv(x.flip(1), weight, bias, -position.flip(1)).flip(1)
    taps = weight.squeeze(1).T.flip(0)  # by distance
    size = len(taps)
    y = x * taps[0] if bias is None else x * taps[0] + bias
    taps = torch.cat((taps, torch.zeros_like(taps[:1])))  # what is too far away
    for back in range(1, min(size, x.shape[1])):
        distance = (position[:, back:] - position[:, :-back]).clamp(max=size)
        y = y + F.pad(taps[distance] * x[:, :-back], (0, 0, back, 0))
    return y


class Direction(NamedTuple):
    """What one direction of a mixer has of its own."""

    conv: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    reverse: bool


class BidirectionalMamba(nn.Module):
    """Mamba's mixer in both directions of a sequence, which share the outer projections and the gate.

    Args:
        channels: Channels of the tokens.
        expand: Channels of the scans over these.
        states: States of each channel.
        conv_size: Tokens that the convolution sees.
        depth: Blocks of the model; the last projection starts smaller by its root.
    """

    def __init__(self, channels: int, expand: int, states: int, conv_size: int, depth: int) -> None:
        super().__init__()
        inner, self.states, self.rank = expand * channels, states, math.ceil(channels / 16)
        numbers = self.rank + 2 * states
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_size, groups=inner)
        self.x_proj = nn.Linear(inner, numbers, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, states)), nn.Parameter(torch.ones(inner))
        self.conv1d_b = nn.Conv1d(inner, inner, conv_size, groups=inner)
        self.x_proj_b = nn.Linear(inner, numbers, bias=False)
        self.dt_proj_b = nn.Linear(self.rank, inner)
        self.A_b_log, self.D_b = nn.Parameter(torch.empty(inner, states)), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self._init_parameters(depth)

    def _init_parameters(self, depth: int) -> None:
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)
            for rates in (self.A_log, self.A_b_log):
                rates.copy_(torch.arange(1, self.states + 1).log().expand_as(rates))
        init_step_projection(self.dt_proj)
        init_step_projection(self.dt_proj_b)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same shape."""
        return self.out_proj(self.scan(x))

    def scan(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """What is projected to the output: the mean of both directions.

        Args:
            x: Normalised tokens, (B, L, C).
            position: Place of each token in the whole sequence, ascending, (B, L); None if none is missing.

        Returns:
            (B, L, expand * C).
        """
        x, z = self.in_proj(x).chunk(2, -1)
        ahead = Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, False)
        back = Direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, True)
        if position is None:
            return (self._scan(x, z, ahead) + self._scan(x, z, back)) / 2
        return (self._scan_kept(x, z, ahead, position) + self._scan_kept(x, z, back, position)) / 2

    def _scan(self, x: Tensor, z: Tensor, way: Direction) -> Tensor:
        u = F.silu(causal_conv(x, way.conv.weight, way.conv.bias, way.reverse))
        step, B, C = self._project(u, way)
        y = selective_scan(
            u.mT, step.mT, rates(way.A_log), B.mT, C.mT, way.D,
            z=z.mT, delta_bias=way.dt_proj.bias, softplus=True, reverse=way.reverse,
        )  # fmt: skip
        return y.mT

    def _project(self, u: Tensor, way: Direction) -> tuple[Tensor, Tensor, Tensor]:
        """Step before its bias, input and output map of each token."""
        low_rank, B, C = way.x_proj(u).split((self.rank, self.states, self.states), -1)
        return F.linear(low_rank, way.dt_proj.weight), B, C

    def _scan_kept(self, x: Tensor, z: Tensor, way: Direction, position: Tensor) -> Tensor:
        """`_scan` of what is left of a sequence, as if the other tokens were there with features of zero.

        Over them a state decays by the step that zero features give. It is added to the step of the next token, whose
        input is scaled to undo what that changes.
        """
        u = F.silu(sparse_causal_conv(x, way.conv.weight, way.conv.bias, position, way.reverse)).float()
        step, B, C = self._project(u.to(x.dtype), way)
        bias = way.dt_proj.bias.float()
        step = F.softplus(step.float() + bias)
        gap = F.pad(position.diff() - 1, (0, 1) if way.reverse else (1, 0))
        longer = step + gap[..., None] * F.softplus(bias)
        y = selective_scan((u * (step / longer)).mT, longer.mT, rates(way.A_log), B.mT, C.mT, reverse=way.reverse).mT
        return ((y + way.D * u) * F.silu(z.float())).to(x.dtype)


def rates(A_log: Tensor) -> Tensor:
    """Rates of the states from their logarithms, in float32 or wider."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def init_step_projection(linear: nn.Linear, shortest: float = 1e-3, longest: float = 0.1) -> None:
    """Weights uniform in +-rank^-0.5; a bias whose softplus spreads log-uniformly between two steps."""
    bound = linear.in_features**-0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    with torch.no_grad():
        span = math.log(longest / shortest)
        step = (torch.rand_like(linear.bias) * span + math.log(shortest)).exp().clamp(min=1e-4)
        linear.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class VimBlock(nn.Module):
    """Norm and mixer on a residual branch of a float32 stream."""

    def __init__(self, config: VimConfig, drop_path: float) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(
            config.embed_dim, config.expand, config.state_dim, config.conv_size, sum(config.depths)
        )
        self.norm = RMSNorm(config.embed_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same shape."""
        return x + self.drop_path(self.mixer(self.norm(x)))

    def sparse(self, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of what is left of a sequence, and the importance of each token, (B, L)."""
        y = self.mixer.scan(self.norm(x), position)
        return x + self.drop_path(self.mixer.out_proj(y)), y.detach().float().clamp(min=0).mean(-1)


class PatchEmbed(nn.Module):
    """Stem: one token per patch; patches may overlap."""

    def __init__(self, in_chans: int, channels: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, channels, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to a map (B, rows, columns, C)."""
        return self.proj(pad_to_multiple(x, self.proj.stride[0])).permute(0, 2, 3, 1)


class Vim(Backbone):
    """Vim; see the module's docstring for the paper and for what differs from the official code.

    Between stages, and from `forward_features`, comes the sequence (B, L, C) with its class token at (L - 1) // 2.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"^(pos_embed|cls_token)$"
    stem_name = "patch_embed.proj"

    def __init__(self, config: VimConfig, **kwargs: Any) -> None:
        ends = [sum(config.depths[: i + 1]) for i in range(len(config.depths))]
        stages = [Stage(f"layers.{end - 1}", config.embed_dim, config.stride) for end in ends]
        super().__init__(config, stages, **kwargs)
        self.ends = ends
        (rates,) = drop_path_rates(config.drop_path_rate, [sum(config.depths)])
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.patch_size, config.stride)
        tokens = math.prod(config.grid(config.image_sides)) + config.class_token
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.embed_dim))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.layers = nn.ModuleList(VimBlock(config, rate) for rate in rates[: ends[self.built_stages - 1]])
        if not self.features_only:
            self.norm_f = RMSNorm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        self._init_parameters()

    def _init_parameters(self) -> None:
        for name in ("pos_embed", "cls_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=0.02)
        filters = self.patch_embed.proj
        nn.init.normal_(filters.weight, std=filters.weight[0].numel() ** -0.5)
        assert filters.bias is not None  # it has one
        nn.init.zeros_(filters.bias)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens (B, L, C) with the class token in their middle."""
        patches = self.patch_embed(x)
        tokens = patches.flatten(1, 2)
        if self.config.class_token:
            token = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = _with_middle(tokens, token)
        tokens = tokens + self.positions(*patches.shape[1:3])
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position table (1, L, C) for a grid of patches."""
        grid = self.config.grid(self.config.image_sides)
        if known(rows == grid[0]) and known(columns == grid[1]):
            return self.pos_embed
        return resize_positions(self.pos_embed, grid, (rows, columns))

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
        blocks = [cast(VimBlock, block).sparse for block in self.layers]
        kept = partial(self._kept, middle=(x.shape[1] - 1) // 2)
        walk = walk_pruned(self, blocks, x, [self.ends[i] for i in wanted], kept)
        return list(zip(wanted, walk, strict=True))

    def _kept(self, importance: Tensor, position: Tensor | None, middle: int) -> Tensor:
        """Which tokens stay, ascending, (B, L'); the class token always does, and L' is odd as published."""
        tokens = importance.shape[1]
        if not self.config.class_token:
            return most_important(importance, math.ceil(tokens * self.config.keep_ratio))
        place = torch.arange(tokens, device=importance.device) if position is None else position
        count = min(math.ceil((tokens - 1) * self.config.keep_ratio) // 2 * 2 + 1, tokens)
        return most_important(importance.masked_fill(place == middle, float("inf")), count)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Nothing: all stages have one resolution."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm_f(x)

    def pool(self, x: Tensor) -> Tensor:
        """The class token, or without one the mean of all tokens; (B, num_features)."""
        return x[:, (x.shape[1] - 1) // 2] if self.config.class_token else x.mean(1)

    def to_map(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """Tokens without the class token as a map; see `Backbone`."""
        x = _without_middle(x) if self.config.class_token else x
        x = x.unflatten(1, self.config.grid(sides)).to(self.pos_embed.dtype)
        if self.config.patch_size == self.config.stride:
            return x
        # Two patches cover a position on each axis, at the borders one.
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, stride=1, padding=1, count_include_pad=False)
        return x.permute(0, 2, 3, 1)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize the position table, and leave out the class token where the model has none; see `Backbone`."""
        done: dict[str, str] = {}
        if not self.config.class_token and state.pop("cls_token", None) is not None:
            done["cls_token"] = "left out, this model has none"
            state["pos_embed"] = _without_middle(state["pos_embed"])
        table, grid = state.get("pos_embed"), self.config.grid(self.config.image_sides)
        if table is not None and table.shape[1] != self.pos_embed.shape[1]:
            side = math.isqrt(table.shape[1])  # of a square grid; a class token does not make it larger
            if side**2 + self.config.class_token == table.shape[1]:
                state["pos_embed"] = resize_positions(table, (side, side), grid)
                done["pos_embed"] = f"positions of {side} x {side} to {grid[0]} x {grid[1]} patches, bicubic"
        return done

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, or per stage."""
        stem = r"^(?:patch_embed|pos_embed|cls_token)"
        if not coarse:
            return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None)]}
        blocks = ["|".join(map(str, self._blocks(i))) for i in range(len(self.stages))]
        return {"stem": stem, "blocks": [(rf"^layers\.(?:{numbers})\.", (i,)) for i, numbers in enumerate(blocks)]}


def most_important(importance: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most important tokens of each image, ascending, (B, count)."""
    return importance.topk(count, sorted=False).indices.sort(1).values


def walk_pruned(
    model: Backbone,
    blocks: Sequence[Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]],
    x: Tensor,
    ends: Sequence[int],
    kept: Callable[[Tensor, Tensor | None], Tensor],
) -> list[Tensor]:
    """Run blocks on fewer and fewer tokens.

    Args:
        model: The model, whose configuration says after which blocks to prune.
        blocks: From tokens left (B, L', C) and their places (B, L') to the same tokens and their importance (B, L').
        x: All tokens, (B, L, C).
        ends: Numbers of blocks after which sequences are wanted, ascending.
        kept: From importance and places to the numbers of the tokens that stay, (B, L'').

    Returns:
        For each end all tokens, (B, L, C), pruned ones as they were last.
    """
    whole, position, found = x, None, []
    for number, block in enumerate(blocks[: ends[-1]], 1):
        if model.grad_checkpointing and torch.is_grad_enabled():
            x, importance = checkpoint(block, x, position, use_reentrant=False)
        else:
            x, importance = block(x, position)
        if number in ends or number in model.config.prune_after:
            whole = x if position is None else whole.scatter(1, position[..., None].expand_as(x), x)
        if number in ends:
            found.append(whole)
        if number in model.config.prune_after:
            left = kept(importance, position)
            position = left if position is None else position.gather(1, left)
            x = x.gather(1, left[..., None].expand(-1, -1, x.shape[-1]))
    return found


def _with_middle(tokens: Tensor, token: Tensor) -> Tensor:
    middle = tokens.shape[1] // 2
    return torch.cat((tokens[:, :middle], token, tokens[:, middle:]), 1)


def _without_middle(tokens: Tensor) -> Tensor:
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), 1)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table to another grid of patches, bicubic; a class token's row in its middle stays as it is.

    Args:
        table: (1, rows * columns, C), or with a class token a row more.
        old: Its rows and columns of patches.
        new: Those wanted.

    Returns:
        (1, L, C) in the dtype of `table`.
    """
    if table.shape[1] > old[0] * old[1]:
        middle = (table.shape[1] - 1) // 2
        return _with_middle(resize_positions(_without_middle(table), old, new), table[:, middle : middle + 1])
    return resize_grid(table, old, new)


OFFICIAL_LAYOUT = CheckpointLayout(name="official", marker=r"^layers\.\d+\.mixer\.A_b_log$")


def _weights(size: str, file: str, top1: float, top5: float, params: float) -> dict[str, Weights]:
    record = Weights(
        url=f"https://huggingface.co/hustvl/Vim-{size}-midclstok/resolve/main/{file}.pth",
        container="model",
        license="Apache-2.0",
        repository="hustvl/Vim",
        commit="dd0358ad1e42701f22afbefa0717cc8825cf9f45",
        input_size=(3, 224, 224),
        num_classes=1000,
        crop_pct=0.875,
        metrics={"top1": top1, "top5": top5},
        params=round(params * 1e6),
        note="the authors link the page; users of it name the file so, which was not verified here",
    )
    return {"in1k": record}


_SMALL: dict[str, Any] = {"embed_dim": 384, "drop_path_rate": 0.05}
_BASE: dict[str, Any] = {"embed_dim": 768, "drop_path_rate": 0.1}
_FINE: dict[str, Any] = {"stride": 8, "drop_path_rate": 0.0}

VARIANTS = {
    "vim_tiny": Variant(config=VimConfig(), weights=_weights("tiny", "vim_t_midclstok_76p1acc", 76.1, 93.0, 7)),
    "vim_tiny_stride8": Variant(
        config=VimConfig(**_FINE), weights=_weights("tiny", "vim_t_midclstok_ft_78p3acc", 78.3, 94.2, 7)
    ),
    "vim_small": Variant(
        config=VimConfig(**_SMALL), weights=_weights("small", "vim_s_midclstok_80p5acc", 80.5, 95.1, 26)
    ),
    "vim_small_stride8": Variant(
        config=VimConfig(**{**_SMALL, **_FINE}), weights=_weights("small", "vim_s_midclstok_ft_81p6acc", 81.6, 95.4, 26)
    ),
    "vim_base": Variant(config=VimConfig(**_BASE), weights=_weights("base", "vim_b_midclstok_81p9acc", 81.9, 95.8, 98)),
    # Another size, not square; without weights of its own.
    "vim_tiny_256x320": Variant(config=VimConfig(img_size=(256, 320)), params=7.17),
}

FAMILY = Family(
    name="vim",
    model=Vim,
    config=VimConfig,
    variants=VARIANTS,
    mixer="selective scan",
    paper="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024, "
    "arXiv 2401.09417",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "patch_size": 8, "stride": 8, "embed_dim": 16, "depths": (1, 1, 1, 1), "state_dim": 4},
)
