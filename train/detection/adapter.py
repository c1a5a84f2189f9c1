"""An adapter that makes a pyramid beside a plain backbone, and lets the two exchange what they know.

Paper: Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023, arXiv 2205.08534; its attention: Zhu
et al., "Deformable DETR", ICLR 2021, arXiv 2010.04159. PlainMamba's detectors have it. Parameters are named as theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

import vizoo
from vizoo.backbones.base import Backbone, FeatureInfo, init_linear
from vizoo.backbones.layers import DropPath, LayerNorm

Shapes = Sequence[tuple[int, int]]

STRIDES = (4, 8, 16, 32)
NAMES = re.compile(r"^(?:spm|interactions|level_embed|up|ad_norm[1-4])\b")
"""The adapter's parameters in official checkpoints, which have them among the backbone's."""
_FINEST = re.compile(r"^(?:spm\.fc1|up|ad_norm1)\.")


@MODELS.register_module()
class VitAdapter(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from an image and the stages of a plain backbone.

    A few convolutions look at the image. Before each stage the backbone's map takes from their maps, behind it gives to
    them, both by deformable attention; at the end its last map is added to each.

    Args:
        backbone: The plain backbone; it is not kept, but handed to `forward`.
        channels: Channels of the first convolutions.
        num_heads: Heads of the attentions; None takes 6, or 8 where 6 do not divide the backbone's channels, as
            published.
        points: Positions that a head looks at, on each map.
        ffn_ratio: Hidden channels of an exchange's MLP over the backbone's channels.
        out_indices: Which of the four maps to return.

    Raises:
        ValueError: The backbone is not plain, its stages hold more than a map, the heads do not divide its channels,
            or there is no such map.
    """

    def __init__(
        self,
        backbone: vizoo.Backbone,
        channels: int = 64,
        num_heads: int | None = None,
        points: int = 4,
        ffn_ratio: float = 0.25,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        super().__init__()
        _check_plain(backbone)
        if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(4))):
            raise ValueError(f"out_indices must name some of the maps 0 to 3 in order, got {tuple(out_indices)}")
        width, count = backbone.stages[0].channels, len(backbone.stages)
        heads = num_heads or (8 if width % 6 else 6)
        if width % heads:
            raise ValueError(f"num_heads must divide the backbone's {width} channels, got {heads}")
        self.width, self.out_indices = width, tuple(out_indices)
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.spm = SpatialPrior(backbone.in_chans, channels, width, self.has_finest)
        drop_path = backbone.config.drop_path_rate
        self.interactions = nn.ModuleList(
            Interaction(width, heads, points, ffn_ratio, drop_path, 3 if i == count - 1 else 1) for i in range(count)
        )
        if self.has_finest:
            self.up = nn.ConvTranspose2d(width, width, 2, 2)
        for index in self.out_indices:
            self.add_module(f"ad_norm{index + 1}", nn.BatchNorm2d(width))
        self.apply(_init_module)

    @property
    def has_finest(self) -> bool:
        """Whether the map of stride 4 is returned, and computed."""
        return 0 in self.out_indices

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and stride of each map, as backbones say them."""
        return FeatureInfo(
            {"num_chs": self.width, "reduction": STRIDES[i], "module": f"ad_norm{i + 1}"} for i in self.out_indices
        )

    def is_unused(self, name: str) -> bool:
        """Whether an official checkpoint's parameter belongs to a map that is not returned."""
        return not self.has_finest and bool(_FINEST.match(name))

    def forward(self, backbone: vizoo.Backbone, images: Tensor) -> list[Tensor]:
        """The maps (B, C, H / stride, W / stride) that were asked for, finest first, of images (B, 3, H, W)."""
        finest, *maps = self.spm(images)
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat(
            [x.flatten(2).mT + level for x, level in zip(maps, self.level_embed, strict=True)],
            1,
        )
        x = backbone.stem(images)
        for index, interaction in enumerate(cast(Iterable[Interaction], self.interactions)):
            x = interaction.inject(x, tokens, shapes)
            x = backbone.stage(index, x)
            tokens = interaction.extract(tokens, shapes, x)
        parts = tokens.split([rows * columns for rows, columns in shapes], 1)
        found = [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        if finest is not None:
            height, width = finest.shape[2:]
            finest = finest + self.up(found[0])[:, :, :height, :width]
        return self._finish([finest, *found], x.permute(0, 3, 1, 2))

    def _finish(self, maps: Sequence[Tensor | None], last: Tensor) -> list[Tensor]:
        """Add the backbone's last map to each, and norm them."""
        found = []
        for index in self.out_indices:
            x = maps[index]
            assert x is not None  # the finest is there where it is asked for
            resized = F.interpolate(last, x.shape[2:], mode="bilinear", align_corners=False)
            found.append(self.get_submodule(f"ad_norm{index + 1}")(x + resized))
        return found


def _check_plain(backbone: vizoo.Backbone) -> None:
    stages = {stage[1:] for stage in backbone.stages}
    if stages != {(backbone.stages[0].channels, 16)} or backbone.built_stages < len(backbone.stages):
        raise ValueError(
            "an adapter goes with all stages of a plain backbone, each of stride 16, got strides "
            f"{[stage.stride for stage in backbone.stages]}, {backbone.built_stages} of them built"
        )
    if type(backbone).to_map is not Backbone.to_map or backbone.layout != "NHWC":
        raise ValueError(f"an adapter needs stages that hold maps, those of {type(backbone).__name__} hold tokens")


class SpatialPrior(nn.Module):
    """Convolutions from an image to maps of strides 4 (where it is wanted), 8, 16 and 32."""

    def __init__(self, in_chans: int, channels: int, width: int, finest: bool) -> None:
        super().__init__()
        first = (*_conv(in_chans, channels, 2), *_conv(channels, channels, 1), *_conv(channels, channels, 1))
        self.stem = nn.Sequential(*first, nn.MaxPool2d(3, 2, 1))
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        for i in range(1, 4):
            self.add_module(f"conv{i + 1}", nn.Sequential(*_conv(widths[i - 1], widths[i], 2)))
        for i in range(0 if finest else 1, 4):
            self.add_module(f"fc{i + 1}", nn.Conv2d(widths[i], width, 1))
        self.finest = finest

    def forward(self, x: Tensor) -> list[Tensor | None]:
        """Images (B, in_chans, H, W) to four maps (B, width, h, w), the first None where it is not wanted."""
        x = self.stem(x)
        found: list[Tensor | None] = [self.get_submodule("fc1")(x) if self.finest else None]
        for i in (2, 3, 4):
            x = self.get_submodule(f"conv{i}")(x)
            found.append(self.get_submodule(f"fc{i}")(x))
        return found


def _conv(in_channels: int, channels: int, stride: int) -> Iterable[nn.Module]:
    return (
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Interaction(nn.Module):
    """What the backbone's map and the adapter's tokens exchange around one stage."""

    def __init__(
        self, width: int, heads: int, points: int, ffn_ratio: float, drop_path: float, extractors: int
    ) -> None:
        super().__init__()
        self.injector = Injector(width, heads, points)
        self.extractor = Extractor(width, heads, points, ffn_ratio, drop_path)
        self.extra_extractors = nn.ModuleList(
            Extractor(width, heads, points, ffn_ratio, drop_path) for _ in range(extractors - 1)
        )

    def inject(self, x: Tensor, tokens: Tensor, shapes: Shapes) -> Tensor:
        """The backbone's map (B, H, W, C) with what it takes from the tokens (B, S, C) of maps of these shapes."""
        places = pixel_centres([(x.shape[1], x.shape[2])], x.device)
        return self.injector(x.flatten(1, 2), places, tokens, shapes).unflatten(1, x.shape[1:3])

    def extract(self, tokens: Tensor, shapes: Shapes, x: Tensor) -> Tensor:
        """The tokens with what they take from the backbone's map."""
        places = pixel_centres(shapes, x.device)
        for extractor in (self.extractor, *self.extra_extractors):
            tokens = extractor(tokens, places, shapes, x)
        return tokens


class Injector(nn.Module):
    """Attention of the backbone's tokens to the adapter's three maps; at first it adds nothing."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.attn = DeformableAttention(width, heads, 3, points)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, places: Tensor, tokens: Tensor, shapes: Shapes) -> Tensor:
        """(B, N, C) at `places` (N, 2) to the same shape."""
        return x + self.gamma * self.attn(self.query_norm(x), places, self.feat_norm(tokens), shapes)


class Extractor(nn.Module):
    """Attention of the adapter's tokens to the backbone's map, and an MLP with a convolution."""

    def __init__(self, width: int, heads: int, points: int, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.attn = DeformableAttention(width, heads, 1, points)
        self.ffn = ConvMlp(width, int(width * ffn_ratio))
        self.ffn_norm = LayerNorm(width, eps=1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, places: Tensor, shapes: Shapes, x: Tensor) -> Tensor:
        """(B, S, C) of maps of these shapes to the same shape."""
        features = self.feat_norm(x.flatten(1, 2))
        tokens = tokens + self.attn(self.query_norm(tokens), places, features, [(x.shape[1], x.shape[2])])
        return tokens + self.drop_path(self.ffn(self.ffn_norm(tokens), shapes))


class ConvMlp(nn.Module):
    """MLP with a depthwise convolution of each map in front of its activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        """(B, S, C) of maps of these shapes to the same shape."""
        parts = self.fc1(tokens).split([rows * columns for rows, columns in shapes], 1)
        convolve = self.dwconv["dwconv"]
        maps = [convolve(part.mT.unflatten(2, shape)) for part, shape in zip(parts, shapes, strict=True)]
        return self.fc2(F.gelu(torch.cat([x.flatten(2).mT for x in maps], 1)))


class DeformableAttention(nn.Module):
    """Each query looks at a few positions of each map, which it chooses itself relative to its own place.

    Args:
        width: Channels.
        heads: Heads.
        levels: Maps.
        points: Positions for each head and map.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Heads look in as many directions, each further away by one pixel with every point, all with equal weight."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ways = torch.stack((angles.cos(), angles.sin()), -1)
        ways = ways / ways.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = ways[:, None, None] * steps[:, None]
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, places: Tensor, features: Tensor, shapes: Shapes) -> Tensor:
        """What queries (B, N, C) see of the tokens (B, S, C) of maps; places (N, 2) are shares of width and height."""
        split = (self.heads, self.levels, self.points)
        value = self.value_proj(features).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*split, 2))
        weights = self.attention_weights(query).float().unflatten(-1, (self.heads, -1)).softmax(-1)
        sides = torch.tensor([[columns, rows] for rows, columns in shapes], device=query.device)
        positions = places[:, None, None, None] + offsets / sides[:, None]
        return self.output_proj(sample_maps(value, shapes, positions, weights.unflatten(-1, split[1:])))


def sample_maps(value: Tensor, shapes: Shapes, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values between pixels, in float32; zero outside of a map.

    Args:
        value: Tokens of the maps, (B, S, heads, D).
        shapes: Rows and columns of each map.
        positions: Shares of width and height, (B, N, heads, levels, points, 2).
        weights: (B, N, heads, levels, points).

    Returns:
        (B, N, heads * D), in the dtype of `value`.
    """
    total = None
    for level, tokens in enumerate(value.float().split([rows * columns for rows, columns in shapes], 1)):
        image = tokens.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[level])
        grid = (2 * positions[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        found = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (found * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        total = part if total is None else total + part
    assert total is not None  # there is a map
    return total.unflatten(0, (len(value), -1)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def pixel_centres(shapes: Shapes, device: torch.device) -> Tensor:
    """Centres of the pixels of maps, one map after the other, as shares of width and height; (pixels, 2), x first."""
    found = []
    for rows, columns in shapes:
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        found.append(torch.stack((x.repeat(rows), y.repeat_interleave(columns)), -1))
    return torch.cat(found)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, DeformableAttention):  # its parts have been drawn before
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        init_linear(module)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
