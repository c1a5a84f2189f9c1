"""MobileMamba: small networks whose mixers scan some channels, convolve others, and let the rest pass.

Paper: He et al., "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network", CVPR 2025, arXiv 2411.15941.
Official code: lewandofskee/MobileMamba at 0980f48 (MIT), `model/mobilemamba/mobilemamba.py`.

What differs from the official code, and why:

- Maps stay (B, H, W, C), the layout of the shared operators; the official code holds them (B, C, H, W). Point-wise
  convolutions are linear layers. Depthwise convolutions sum in float32 under autocast.
- The wavelet transform is sums and differences of pixels; the official code convolves by constant filters, which its
  checkpoints hold and loading ignores. So it ignores the counts of batches that batch norms save.
- The two routes of a scan are added up for each image. The official code for CPUs mixes the images of a batch there;
  its GPU code, by which the weights were trained, does not.

Any size runs and compiles. Exports with free sizes take images from 129 pixels a side: below, a map of stride 64 or its
wavelets have one position, which `torch.export` takes for a case of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import ROW_ROUTES
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
    make_classifier,
)
from .fusing import fold_neighbours
from .layers import BatchNorm, DropPath, as_linear, crop, zero_pad
from .vmamba import SS2D, DepthwiseConv, ForwardType

STRIDE = 16
"""Stride of the stem; every further stage halves the map."""
KERNELS = (3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class MobilemambaConfig:
    """Configuration of a MobileMamba.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        global_ratios: Share of each stage's channels that are scanned, rounded to a multiple of 16.
        local_ratios: Share of each stage's channels that are convolved.
        kernels: Side of the filters of each stage's mixers.
        ssm_ratio: Channels inside a scan over those it is given.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 192
    embed_dims: tuple[int, ...] = (144, 272, 368)
    depths: tuple[int, ...] = (1, 2, 2)
    global_ratios: tuple[float, ...] = (0.8, 0.7, 0.6)
    local_ratios: tuple[float, ...] = (0.2, 0.2, 0.3)
    kernels: tuple[int, ...] = (7, 5, 3)
    ssm_ratio: float = 2.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        names = ("embed_dims", "depths", "global_ratios", "local_ratios", "kernels")
        lists = {name: getattr(self, name) for name in names}
        for name, values in lists.items():
            if len(values) != len(self.embed_dims) or not values:
                raise ValueError(
                    f"{name} needs one entry per stage, got {values} for {len(self.embed_dims)} stages "
                    f"(embed_dims {self.embed_dims})"
                )
        if min(*self.embed_dims, *self.depths) < 1 or self.ssm_ratio <= 0:
            raise ValueError(
                "embed_dims, depths and ssm_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.ssm_ratio}"
            )
        if self.embed_dims[0] % 8:
            raise ValueError(
                f"embed_dims must begin with a multiple of 8, an eighth of which the stem begins with; got "
                f"{self.embed_dims[0]}, nearest valid: {max(8, round(self.embed_dims[0] / 8) * 8)}"
            )
        if not set(self.kernels) <= set(KERNELS):
            raise ValueError(f"kernels must be among {KERNELS}, got {self.kernels}")
        check_size_and_rate(self.img_size, self.drop_path_rate)
        for stage in range(len(self.embed_dims)):
            self._check_split(stage)

    def _check_split(self, stage: int) -> None:
        scanned, convolved, rest = self.split(stage)
        if min(self.global_ratios[stage], self.local_ratios[stage]) < 0 or min(convolved, rest) < 0 or scanned < 16:
            raise ValueError(
                f"global_ratios and local_ratios must leave 16 to all channels of a stage to scan, got "
                f"{self.global_ratios[stage]} and {self.local_ratios[stage]}: {scanned} of {self.embed_dims[stage]}"
            )

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def split(self, stage: int) -> tuple[int, int, int]:
        """Channels of a stage that are scanned, convolved, and left as they are."""
        channels = self.embed_dims[stage]
        scanned = (int(self.global_ratios[stage] * channels) + 8) // 16 * 16
        convolved = min(int(self.local_ratios[stage] * channels), channels - scanned)
        return scanned, convolved, channels - scanned - convolved


class StridedConv(nn.Conv2d):
    """A 3 x 3 convolution of a map whose channels lie last, at stride 2."""

    def __init__(self, channels: int, out_channels: int, groups: int = 1) -> None:
        super().__init__(channels, out_channels, 3, 2, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, channels) to (B, ceil(H/2), ceil(W/2), out_channels)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBN(nn.Module):
    """A convolution without bias, and a batch norm of what it gives.

    Args:
        conv: Takes and gives maps (B, H, W, C).
        channels: Of its output.
        scale: Initial factor of the norm; 0 lets a residual branch begin as nothing.
    """

    def __init__(self, conv: nn.Module, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.c = conv
        self.bn = BatchNorm(channels)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the map that the convolution gives."""
        return normalize_map(self.bn, self.c(x))

    def fuse_(self) -> None:
        """Fold the norm into the convolution."""
        fold_neighbours(self, ["c", "bn"])


def normalize_map(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm of a map (B, H, W, C)."""
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pointwise(channels: int, out_channels: int, scale: float = 1.0) -> ConvBN:
    """A point-wise convolution and its norm."""
    return ConvBN(nn.Linear(channels, out_channels, bias=False), out_channels, scale)


class Residual(nn.Module):
    """Add what a module makes of a map to the map."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return x + self.m(x)


def convolution(channels: int, scale: float) -> Residual:
    """A depthwise 3 x 3 convolution on a residual branch."""
    return Residual(ConvBN(DepthwiseConv(channels), channels, scale))


class FeedForward(nn.Module):
    """Two point-wise convolutions around a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw1 = pointwise(channels, 2 * channels)
        self.pw2 = pointwise(2 * channels, channels, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.pw2(F.relu(self.pw1(x)))


class BidirectionalSS2D(SS2D):
    """VMamba's scan along the rows, both ways, behind batch norms and with a gate."""

    def __init__(self, channels: int, ratio: float) -> None:
        kind = ForwardType(scan="v0", gate=True)
        super().__init__(channels, int(ratio * channels), 1, kind, ROW_ROUTES, conv_bias=True)
        for parameter in (self.dt_projs_weight, self.dt_projs_bias):
            nn.init.uniform_(parameter, 0.0, 0.1)
        nn.init.zeros_(self.A_logs)

    def make_projection(self, channels: int, out_channels: int) -> nn.Module:
        """A point-wise convolution and its norm; see `Mixer`."""
        return pointwise(channels, out_channels)


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar wavelet, (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 4C); odd sides are padded.

    The four coefficients of a channel lie together, half of the sum of a cell's pixels first, then of the differences
    of its rows, of its columns, and of both.
    """
    height, width = x.shape[1:3]
    x = zero_pad(x, 0, 0, 0, (width + 1) // 2 * 2 - width, 0, (height + 1) // 2 * 2 - height)
    upper, lower = x[:, 0::2], x[:, 1::2]  # a view in cells would ask a compiler whether 2 divides the sides
    added, taken = upper + lower, upper - lower
    left, right = (torch.stack((added[:, :, i::2], taken[:, :, i::2]), -1) for i in range(2))  # (B, h, w, C, 2)
    return 0.5 * torch.stack((left + right, left - right), -2).flatten(-3)


def inverse_haar(x: Tensor) -> Tensor:
    """What `haar` was given, with its padding: (B, h, w, 4C) to (B, 2h, 2w, C)."""
    even, odd = x.unflatten(-1, (-1, 2, 2)).unbind(-2)  # (B, h, w, C, 2)
    mean, difference = torch.stack((even + odd, even - odd), 3).unbind(-1)  # (B, h, w, 2, C)
    return 0.5 * torch.stack((mean + difference, mean - difference), 2).flatten(3, 4).flatten(1, 2)


class GlobalOp(nn.Module):
    """A scan, and beside it a depthwise convolution of the map's wavelet transform."""

    def __init__(self, channels: int, kernel: int, ssm_ratio: float) -> None:
        super().__init__()
        self.global_atten = BidirectionalSS2D(channels, ssm_ratio)
        self.base_scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.wavelet_conv = DepthwiseConv(4 * channels, kernel)
        self.wavelet_scale = nn.Parameter(torch.full((1, 4 * channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x.contiguous()  # a part of the channels, which two projections read
        filtered = inverse_haar(self.wavelet_scale.flatten() * self.wavelet_conv(haar(x)))
        return self.base_scale.flatten() * self.global_atten(x) + crop(filtered, x.shape[1], x.shape[2])


class LocalOp(nn.Module):
    """A depthwise convolution and a factor of each channel, both normed."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.dwconv3x3 = DepthwiseConv(channels, kernel)
        self.bn1 = BatchNorm(channels)
        self.dwconv1x1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.bn2 = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.bn1(self.dwconv3x3(x).permute(0, 3, 1, 2)).relu()
        return self.bn2(self.dwconv1x1(x)).permute(0, 2, 3, 1)

    def fuse_(self) -> None:
        """Fold each norm into the convolution in front of it."""
        fold_neighbours(self, ["dwconv3x3", "bn1"])
        fold_neighbours(self, ["dwconv1x1", "bn2"])


class Mixer(nn.Module):
    """Scans some channels, convolves others, leaves the rest as they are, and mixes all (paper, section 3.2)."""

    def __init__(self, config: MobilemambaConfig, stage: int) -> None:
        super().__init__()
        channels, kernel = config.embed_dims[stage], config.kernels[stage]
        self.parts = config.split(stage)
        self.global_op = GlobalOp(self.parts[0], kernel, config.ssm_ratio)
        self.local_op = LocalOp(self.parts[1], kernel) if self.parts[1] else None
        self.proj = pointwise(channels, channels, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        scanned, convolved, rest = x.split(self.parts, -1)
        outputs = [self.global_op(scanned)]
        if self.local_op is not None:
            outputs.append(self.local_op(convolved))
        return self.proj(torch.cat([*outputs, rest], -1).relu())


class MobilemambaBlock(nn.Module):
    """A mixer between convolutions and feed-forward networks, all on residual branches, and a residual around all.

    The map is counted twice, since the chain adds to it, too.
    """

    def __init__(self, config: MobilemambaConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.embed_dims[stage]
        self.dw0 = convolution(channels, 0.0)
        self.ffn0 = Residual(FeedForward(channels))
        self.mixer = Residual(Mixer(config, stage))
        self.dw1 = convolution(channels, 0.0)
        self.ffn1 = Residual(FeedForward(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


class SqueezeExcite(nn.Module):
    """Scale each channel by what a small network makes of the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(8, (channels // 4 + 4) // 8 * 8)
        reduced += 8 if reduced < 0.9 * (channels // 4) else 0
        self.fc1 = nn.Linear(channels, reduced)
        self.fc2 = nn.Linear(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        scale = self.fc2(F.relu(self.fc1(x.mean((1, 2))))).sigmoid()
        return x * scale[:, None, None]


class PatchMerging(nn.Module):
    """Halve the map by a depthwise convolution of four times as many channels."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv1 = pointwise(channels, hidden)
        self.conv2 = ConvBN(StridedConv(hidden, hidden, groups=hidden), hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = pointwise(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), C')."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.conv3(self.se(x))


def make_stem(in_chans: int, channels: int) -> nn.Sequential:
    """Image (B, H, W, in_chans) to the first stage's map (B, H / 16, W / 16, channels)."""
    widths = [in_chans, channels // 8, channels // 4, channels // 2, channels]
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [ConvBN(StridedConv(width, following), following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_downsample(channels: int, out_channels: int) -> list[nn.Module]:
    """Three modules between two stages, (B, H, W, channels) to (B, H / 2, W / 2, out_channels)."""
    before, behind = (
        nn.Sequential(convolution(width, 1.0), Residual(FeedForward(width))) for width in (channels, out_channels)
    )
    return [before, PatchMerging(channels, out_channels), behind]


class Mobilemamba(Backbone):
    """MobileMamba; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    classifier_name = "head.l"
    stem_name = "patch_embed.0.c"

    def __init__(self, config: MobilemambaConfig, **kwargs: Any) -> None:
        stages = [Stage(f"blocks{i + 1}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        self.patch_embed = make_stem(self.in_chans, config.embed_dims[0])
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for index in range(self.built_stages):
            modules = make_downsample(*config.embed_dims[index - 1 : index + 1]) if index else []
            modules += [MobilemambaBlock(config, index, rate) for rate in rates[index]]
            self.add_module(self.stages[index].name, nn.ModuleList(modules))
        if not self.features_only:
            classifier = make_classifier(self.num_features, self.num_classes)
            self.head = nn.ModuleDict({"bn": BatchNorm(self.num_features), "l": classifier})

    def _modules_of(self, index: int) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self, self.stages[index].name))

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(list(self._modules_of(index))[3 if index else 0 :], x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """What stage `index` begins with; see `Backbone`."""
        for module in list(self._modules_of(index))[:3]:
            x = module(x)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Nothing: the final norm acts on the pooled vector; see `pool`."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Mean over positions, then the final norm; (B, num_features)."""
        return self.head["bn"](super().pool(x)[..., None, None]).flatten(1)

    def fuse_final_norm_(self) -> None:
        """Into the classifier; see `Backbone`."""
        if not self.features_only:
            fold_neighbours(self, ["head.bn", "head.l"])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the block behind it."""
        if coarse:
            stages = range(len(self.stages))  # their names count from 1
            return {"stem": r"^patch_embed\.", "blocks": [(rf"^blocks{i + 1}\.", (i,)) for i in stages]}
        return {
            "stem": r"^patch_embed\.",
            "blocks": [(r"^blocks([2-9])\.[0-2]\.", (3,)), (r"^blocks(\d+)\.(\d+)\.", None)],
        }


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^patch_embed\.",
    renames=(
        (r"\.mixer\.m\.attn\.proj\.1\.", ".mixer.m.proj."),
        (r"\.mixer\.m\.attn\.(global_op|local_op)\.(base_scale|wavelet_scale)(?:\.0)?\.weight$", r".mixer.m.\1.\2"),
        (r"\.mixer\.m\.attn\.global_op\.wavelet_convs\.0\.", ".mixer.m.global_op.wavelet_conv."),
        (r"\.mixer\.m\.attn\.", ".mixer.m."),
    ),
    ignored=(r"\.num_batches_tracked$", r"\.i?wt_filter$"),
    reorders=(
        (r"\.(?:pw1|pw2|conv1|conv3|in_proj|out_proj|proj\.1)\.c\.weight$", as_linear),
        (r"\.se\.fc[12]\.weight$", as_linear),
    ),
)

DRIVE = "https://drive.google.com/file/d"


def _weights(size: int, params: float, mmacs: float, *files: tuple[str, float]) -> dict[str, Weights]:
    """The authors' two files of a design: trained for 300 epochs, and for 1000 with a teacher."""
    tags = {"in1k": "", "in1k_distilled": "trained for 1000 epochs, distilled from TResNet-L"}
    return {
        tag: Weights(
            url="",
            manual=f"Save the file behind {DRIVE}/{file}/view",
            license="MIT",
            repository="lewandofskee/MobileMamba",
            commit="0980f48a23d232e0f2e86e740eccab038c8fd760",
            input_size=(3, size, size),
            num_classes=1000,
            metrics={"top1": top1},
            params=round(params * 1e6),
            macs=mmacs * 1e6,
            note=note,
        )
        for (tag, note), (file, top1) in zip(tags.items(), files, strict=True)
    }


_B: dict[str, Any] = {"embed_dims": (200, 376, 448), "depths": (2, 3, 2), "drop_path_rate": 0.03}

VARIANTS = {
    "mobilemamba_t2": Variant(
        config=MobilemambaConfig(),
        # By the table of the authors' page; its section on tests says 73.638 of the first.
        weights=_weights(
            192,
            8.8,
            255,
            ("1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-", 71.5),
            ("14UUeEeN62a1jo5qit-m0yChQnNU8JWQG", 76.9),
        ),
    ),
    "mobilemamba_t4": Variant(
        config=MobilemambaConfig(embed_dims=(176, 368, 448)),
        weights=_weights(
            192,
            14.2,
            413,
            ("17-5Q93_cEhBYMDzWTq4sDcc4_c_ezwpd", 76.1),
            ("12e1RKJEYDWVjOZuQLycjOUkA5PqCUnwu", 78.9),
        ),
    ),
    "mobilemamba_s6": Variant(
        config=MobilemambaConfig(img_size=224, embed_dims=(192, 384, 448)),
        weights=_weights(
            224,
            15.0,
            652,
            ("13en_zNB2wuHmnHKZMUQDe4KizlaTCHbP", 78.0),
            ("1ujVeWpoICjioRF0aB7PD1fadM4PGFRfl", 80.7),
        ),
    ),
    "mobilemamba_b1": Variant(
        config=MobilemambaConfig(img_size=256, **_B),
        weights=_weights(
            256,
            17.1,
            1080,
            ("1ODO1XM2luMfczbDLJxHrEl-ie7yUscAC", 79.9),
            ("15rBhYky_f7jNSknXujuwQESaIkiTBAR1", 82.2),
        ),
    ),
    "mobilemamba_b2": Variant(
        config=MobilemambaConfig(img_size=384, **_B),
        weights=_weights(
            384,
            17.1,
            2427,
            ("1tJJZqeP09D_IAKKFuQtJQOYm4eNGjr1r", 81.6),
            ("1KuleL6Fi84zkjIhkRFbR4lqGa2iu6bOp", 83.3),
        ),
    ),
    "mobilemamba_b4": Variant(
        config=MobilemambaConfig(img_size=512, **_B),
        weights=_weights(
            512,
            17.1,
            4313,
            ("1MiGLHSldK2JpbQEe-7VlmFsaCdugDnYR", 82.5),
            ("1KevdesGm8Pb4fEbgZ5JY4FMy9IQgYbiZ", 83.6),
        ),
    ),
}

FAMILY = Family(
    name="mobilemamba",
    model=Mobilemamba,
    config=MobilemambaConfig,
    variants=VARIANTS,
    mixer="selective scan",
    paper="MobileMamba: Lightweight Multi-Receptive Visual Mamba Network, CVPR 2025, arXiv 2411.15941",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "embed_dims": (40, 56, 72), "depths": (1, 1, 1)},
)
