"""VMamba: a pyramid whose blocks scan the map along rows and columns, both ways, by selective state spaces.

Paper: Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv 2401.10166. Official code:
MzeroMiko/VMamba at 2ed52ea (MIT), `classification/models/vmamba.py`; for dense tasks `detection/model.py`.

The authors released two generations. The first ("vanilla", `vssmtiny_dp01` and so on) has Swin's stem and downsampling,
blocks of a scan alone, Mamba's gate and 16 states a channel; the second has convolutions that overlap, an MLP beside
each scan, no gate and one state a channel. Their code can do more, by the suffixes of `forward_type`; no weights of
that were released.

What differs from the official code, and why:

- One class serves classification and dense tasks.
- Maps stay (B, H, W, C), the layout of the shared operators; the official second generation holds them (B, C, H, W),
  which changes no number. Point-wise convolutions are linear layers.
- No scanned copy of a map is made: what a route's input is projected to at each pixel is projected from the map as it
  lies, for all routes by one matrix product. Depthwise convolutions sum in float32 under autocast; so do projections of
  steps, whose results the official second generation rounds to half precision.
- The first generation's stem pads an image that patches do not divide; the official one drops the rest.
- The official forward types that differ in nothing but which kernel computes them are one here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import ROW_AND_COLUMN_ROUTES, Route, depthwise_conv, selective_scan_2d, state_space_dual
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
from .layers import DropPath, LayerNorm, Mlp, as_linear, convolve, pad_to_multiple
from .swin import PatchMerging

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""

FORWARD, BACKWARD = Route(), Route(reverse=True)
ROUTES: dict[str, tuple[Route, ...]] = {
    **dict.fromkeys(("v0", "v01", "v02", "v03", "v04", "v05", "v2", "v3"), ROW_AND_COLUMN_ROUTES),
    "v051d": (FORWARD,) * 4,
    "v052d": (FORWARD, FORWARD, BACKWARD, BACKWARD),
    "v052dc": ROW_AND_COLUMN_ROUTES,
    "m0": ROW_AND_COLUMN_ROUTES,
}
"""What the authors' names of a scan stand for; four sets of parameters in each."""
NORMS = ("none", "dwconv3", "cnorm", "softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class ForwardType:
    """What an official `forward_type` says of a mixer.

    Attributes:
        scan: The scan, a key of `ROUTES`.
        gate: Multiply the output by a second half of the input's projection.
        gate_activation: Let that half pass a SiLU.
        norm: What the output passes: a layer norm (empty), or one of `NORMS`.
        activation: Let the output pass a GELU behind that.
    """

    scan: str
    gate: bool = True
    gate_activation: bool = True
    norm: str = ""
    activation: bool = False

    @classmethod
    def parse(cls, text: str) -> ForwardType:
        """Reads the authors' form: the scan, then any of `_no32`, `_noz`, `_nozact`, `_oact` and `_on<norm>`.

        Raises:
            ValueError: There is no such scan or suffix.
        """
        scan, *suffixes = text.split("_")
        if scan not in ROUTES:
            raise ValueError(f"forward_type {text!r} begins with no known scan; {nearest(scan, ROUTES)}")
        known = ("no32", "noz", "nozact", "oact", *(f"on{norm}" for norm in NORMS))
        for suffix in suffixes:
            if suffix not in known:
                raise ValueError(f"forward_type {text!r} has an unknown suffix {suffix!r}; {nearest(suffix, known)}")
        norms = [suffix.removeprefix("on") for suffix in suffixes if suffix.removeprefix("on") in NORMS]
        if len(norms) > 1:
            raise ValueError(f"forward_type {text!r} names {len(norms)} norms of the output, one at most can be")
        return cls(
            scan=scan,
            gate="noz" not in suffixes,
            gate_activation="nozact" not in suffixes,
            norm="".join(norms),
            activation="oact" in suffixes,
        )


@dataclass(frozen=True, kw_only=True)
class VmambaConfig:
    """Configuration of a VMamba.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        d_state: States of each channel of a scan.
        ssm_ratio: Channels that are scanned over the block's channels.
        forward_type: How, in the authors' terms: `v05_noz` for four routes without a gate, `v0` with one; see
            `ForwardType`. `m0` mixes by state space duality (Mamba-2), by as many heads as the rank of the steps.
        conv_bias: Give the depthwise convolution in front of the scan a bias.
        mlp_ratio: Hidden channels of the MLP over the block's channels; 0 for blocks without one.
        overlap: Stem and downsampling by 3 x 3 convolutions; else Swin's, of patches that do not overlap.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    d_state: int = 1
    ssm_ratio: float = 1.0
    forward_type: str = "v05_noz"
    conv_bias: bool = False
    mlp_ratio: float = 4.0
    overlap: bool = True
    drop_path_rate: float = 0.2
    output_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) > 0:
            raise ValueError(f"embed_dims and depths need one entry per stage, got {self.embed_dims} and {self.depths}")
        if min(*self.embed_dims, *self.depths, self.d_state) < 1 or self.ssm_ratio <= 0:
            raise ValueError(
                "embed_dims, depths, d_state and ssm_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.d_state}, {self.ssm_ratio}"
            )
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be positive, or 0 for blocks without an MLP, got {self.mlp_ratio}")
        if self.overlap and self.embed_dims[0] % 2:
            raise ValueError(
                "embed_dims must begin with an even number, half of which the stem begins with; got "
                f"{self.embed_dims[0]}, nearest valid: {self.embed_dims[0] + 1}"
            )
        self._check_swin_widths()
        self._check_heads()
        check_size_and_rate(self.img_size, self.drop_path_rate)

    def _check_swin_widths(self) -> None:
        for width, following in pairwise(self.embed_dims):
            if not self.overlap and following != 2 * width:
                raise ValueError(
                    f"Swin's downsampling doubles channels: behind {width} come {2 * width}, got embed_dims "
                    f"{self.embed_dims}; overlap=True allows others"
                )

    def _check_heads(self) -> None:
        for width in self.embed_dims:
            inner, heads = self.inner(width), step_rank(width)
            if self.forward.scan == "m0" and inner % heads:
                raise ValueError(
                    f"the {heads} heads of m0 must divide the scanned channels, got {inner} for a stage "
                    f"of {width} channels; nearest valid ssm_ratio: {max(1, round(inner / heads)) * heads / width:g}"
                )

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def forward(self) -> ForwardType:
        """What `forward_type` says."""
        return ForwardType.parse(self.forward_type)

    def inner(self, channels: int) -> int:
        """Channels that a block of so many scans."""
        return int(self.ssm_ratio * channels)


def step_rank(channels: int) -> int:
    """Numbers that steps are projected from at each pixel, for a block of so many channels."""
    return math.ceil(channels / 16)


class Permute(nn.Module):
    """Reorder the axes of a tensor."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Any tensor with as many axes."""
        return x.permute(self.axes)


def to_nchw() -> nn.Module:
    """(B, H, W, C) to (B, C, H, W)."""
    return Permute(0, 3, 1, 2)


def to_nhwc() -> nn.Module:
    """(B, C, H, W) to (B, H, W, C)."""
    return Permute(0, 2, 3, 1)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of a map whose channels lie last."""

    def __init__(self, channels: int, side: int = 3, bias: bool = False) -> None:
        super().__init__(channels, channels, side, padding=side // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return depthwise_conv(x, self.weight, self.bias)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return x.flatten(1, 2).softmax(1).view(x.shape)


def make_output_norm(name: str, channels: int) -> nn.Module:
    """What the output of a scan passes, (B, H, W, C) to the same shape."""
    if name == "dwconv3":
        return nn.Sequential(nn.Identity(), DepthwiseConv(channels))  # numbered as in the official code
    if name == "cnorm":
        return nn.Sequential(LayerNorm(channels, keep_float32=True), nn.Identity(), DepthwiseConv(channels))
    others = {"none": nn.Identity, "softmax": SpatialSoftmax, "sigmoid": nn.Sigmoid}
    return others[name]() if name else LayerNorm(channels)


class Mixer(nn.Module):
    """What all mixers share: a projection, a convolution, a scan along routes, a norm, a gate and a projection.

    Args:
        channels: Of the map that is mixed.
        inner: Channels that are scanned.
        states: States of each of them.
        kind: Gate, norm and activation.
        routes: Orders of the pixels; each has parameters of its own.
        conv_bias: Give the convolution a bias.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        states: int,
        kind: ForwardType,
        routes: Sequence[Route] = ROW_AND_COLUMN_ROUTES,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.rank, self.states, self.routes = inner, step_rank(channels), states, tuple(routes)
        self.gate, self.gate_activation, self.activation = kind.gate, kind.gate_activation, kind.activation
        self.in_proj = self.make_projection(channels, inner * (1 + kind.gate))
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(len(routes), self.rank + 2 * states, inner))
        self.out_norm = make_output_norm(kind.norm, inner)
        self.out_proj = self.make_projection(inner, channels)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # as torch begins a linear layer

    def make_projection(self, channels: int, out_channels: int) -> nn.Module:
        """The layer in front of a mixer, and that behind it; (B, H, W, channels) to (B, H, W, out_channels)."""
        return nn.Linear(channels, out_channels, bias=False)

    def scan(self, x: Tensor) -> Tensor:
        """Mixes positions, (B, H, W, d) to the same shape."""
        raise NotImplementedError(f"{type(self).__name__} must implement scan()")

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.in_proj(x)
        x, z = x.chunk(2, -1) if self.gate else (x, None)
        x = convolve(self.conv2d, x, activation="silu")
        # The scan gives float32, since half precision cannot hold its sums.
        y = self.out_norm(self.scan(x)).to(x.dtype)
        if self.activation:
            y = F.gelu(y)
        if z is not None:
            y = y * (F.silu(z) if self.gate_activation else z)
        return self.out_proj(y)

    def project(self, x: Tensor, sets: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """What steps are projected from, and the maps B and C: (B, H, W, d) to (B, H, W, K, rank or states).

        Routes only order pixels, so the map as it lies is projected once for all of them.
        """
        weight = self.x_proj_weight[sets]
        projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        delta, B, C = projected.split((self.rank, self.states, self.states), -1)
        return delta, B, C


class SS2D(Mixer):
    """Selective scan of a map along routes, each with its own parameters (paper, section 4.2)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sets = len(self.routes)
        self.dt_projs_weight = nn.Parameter(torch.empty(sets, self.inner, self.rank))
        self.dt_projs_bias = nn.Parameter(initial_step_bias(sets, self.inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, self.states + 1).log().repeat(sets * self.inner, 1))
        self.Ds = nn.Parameter(torch.ones(sets * self.inner))
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)

    def scan(self, x: Tensor) -> Tensor:
        """Along all routes, added up at each pixel; see `Mixer`."""
        return self.scan_along(x, self.routes)

    def scan_along(self, x: Tensor, routes: Sequence[Route], sets: slice = slice(None)) -> Tensor:
        """The routes given with the sets of parameters given."""
        delta, B, C = self.project(x, sets)
        return selective_scan_2d(
            x,
            delta,
            -torch.exp(self.A_logs.float()).unflatten(0, (-1, self.inner))[sets],
            B,
            C,
            self.Ds.unflatten(0, (-1, self.inner))[sets],
            delta_weight=self.dt_projs_weight[sets].to(delta.dtype),  # as autocast has it for layers
            delta_bias=self.dt_projs_bias[sets],
            routes=routes,
        )


class CascadedSS2D(SS2D):
    """Rows first, then columns of what the rows gave, each row and column a sequence of its own.

    The official code adds what a reversed scan gives to the pixel at the other end of its line, and so does this.
    """

    def scan(self, x: Tensor) -> Tensor:
        """Both axes; see `Mixer`."""
        x = self.scan_rows(F.layer_norm(x, x.shape[-1:]), 0)
        return self.scan_rows(F.layer_norm(x, x.shape[-1:]).transpose(1, 2), 2).transpose(1, 2)

    def scan_rows(self, x: Tensor, first: int) -> Tensor:
        """Both ways along the rows, (B, H, W, d) to the same shape, by two sets of parameters."""
        rows = x.flatten(0, 1)[:, None]
        forward = self.scan_along(rows, (FORWARD,), slice(first, first + 1))
        backward = self.scan_along(rows, (BACKWARD,), slice(first + 1, first + 2))
        return (forward + backward.flip(2)).view(x.shape)


class DualSS2D(Mixer):
    """State space duality (Mamba-2) along routes; its heads are as many as the rank of the steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        heads = (len(self.routes), self.rank)
        self.dt_projs_bias = nn.Parameter(0.1 * torch.rand(heads))
        self.A_logs = nn.Parameter(torch.zeros(heads))
        self.Ds = nn.Parameter(torch.ones(*heads, self.inner // self.rank))

    def scan(self, x: Tensor) -> Tensor:
        """Along all routes, added up at each pixel; see `Mixer`."""
        height, width = x.shape[1:3]
        delta, B, C = (m.flatten(1, 2) for m in self.project(x))
        orders = [route.pixels(height, width, x.device) for route in self.routes]
        tokens, steps, B, C = (
            torch.stack([m[:, order] for m, order in zip(maps, orders, strict=True)], 2)
            for maps in ([x.flatten(1, 2)] * len(orders), delta.unbind(2), B.unbind(2), C.unbind(2))
        )
        y = state_space_dual(
            tokens.unflatten(-1, (self.rank, -1)).flatten(2, 3),
            steps.flatten(2),
            -torch.exp(self.A_logs.float()).flatten(),
            B,
            C,
            self.Ds.flatten(0, 1),
            dt_bias=self.dt_projs_bias.flatten(),
            softplus=True,
        ).view(tokens.shape)
        merged = sum(part[:, order.argsort()] for part, order in zip(y.unbind(2), orders, strict=True))
        return cast(Tensor, merged).view(x.shape)


def initial_step_bias(*shape: int) -> Tensor:
    """Biases whose softplus, the first steps, lies evenly in the logarithm between 0.001 and 0.1."""
    step = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


def make_mixer(config: VmambaConfig, channels: int) -> Mixer:
    """What mixes positions in a block of so many channels."""
    kind = config.forward
    mixer = {"m0": DualSS2D, "v052dc": CascadedSS2D}.get(kind.scan, SS2D)
    return mixer(channels, config.inner(channels), config.d_state, kind, ROUTES[kind.scan], config.conv_bias)


class VmambaBlock(nn.Module):
    """A scan and, in the second generation, an MLP, each on a residual branch."""

    def __init__(self, config: VmambaConfig, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.op = make_mixer(config, channels)
        self.has_mlp = config.mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = LayerNorm(channels)
            self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.has_mlp else x


class VmambaStage(nn.Module):
    """Blocks of one resolution, and the downsampling that leads to the next one."""

    def __init__(self, config: VmambaConfig, channels: int, rates: Sequence[float], following: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VmambaBlock(config, channels, rate) for rate in rates)
        if following is not None:
            self.downsample = make_downsample(config, channels, following)


def make_stem(config: VmambaConfig, in_chans: int) -> nn.Sequential:
    """Image (B, in_chans, H, W) to the first stage's map (B, H / 4, W / 4, C)."""
    channels = config.embed_dims[0]
    norm = LayerNorm(channels, keep_float32=True)
    if not config.overlap:
        return nn.Sequential(nn.Conv2d(in_chans, channels, STRIDE, STRIDE), to_nhwc(), norm)
    return nn.Sequential(
        nn.Conv2d(in_chans, channels // 2, 3, 2, padding=1),
        to_nhwc(),
        LayerNorm(channels // 2),
        to_nchw(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, 3, 2, padding=1),
        to_nhwc(),
        norm,
    )


def make_downsample(config: VmambaConfig, channels: int, following: int) -> nn.Module:
    """Map (B, H, W, channels) to (B, H / 2, W / 2, following)."""
    if not config.overlap:
        return PatchMerging(channels)
    conv = nn.Conv2d(channels, following, 3, 2, padding=1)
    return nn.Sequential(to_nchw(), conv, to_nhwc(), LayerNorm(following, keep_float32=True))


class Vmamba(Backbone):
    """VMamba; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    output_norm_name = "outnorm{}"
    classifier_name = "classifier.head"
    stem_name = "patch_embed.0"

    def __init__(self, config: VmambaConfig, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        widths = [*config.embed_dims[: self.built_stages], None]
        self.patch_embed = make_stem(config, self.in_chans)
        self.layers = nn.ModuleList(
            VmambaStage(config, cast(int, width), rates[i], following)
            for i, (width, following) in enumerate(pairwise(widths))
        )
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            head = make_classifier(self.num_features, self.num_classes)
            self.classifier = nn.ModuleDict({"norm": LayerNorm(self.num_features, keep_float32=True), "head": head})
        self.apply(self._init_module)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # convolutions keep PyTorch's own initialisation
            init_linear(module)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        if not self.config.overlap:
            x = pad_to_multiple(x, STRIDE)
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))  # so the map comes as (B, H, W, C)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(VmambaStage, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """The end of the stage before; see `Backbone`."""
        return cast(VmambaStage, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.classifier["norm"](x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        ends = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*ends, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^patch_embed\.",
    # Names of weights that earlier versions of the official code saved.
    renames=(
        (r"^patch_embed\.proj\.", "patch_embed.0."),
        (r"^patch_embed\.norm\.", "patch_embed.2."),
        (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
        (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
        (r"^norm\.", "classifier.norm."),
        (r"^head\.", "classifier.head."),
    ),
    reorders=((r"\.(?:in_proj|out_proj|fc1|fc2)\.weight$", as_linear),),
)

RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"


def _weights(file: str, top1: float, params: float, gmacs: float, note: str = "") -> dict[str, Weights]:
    record = Weights(
        url=f"{RELEASES}/{file}",
        license="MIT",
        repository="MzeroMiko/VMamba",
        commit="2ed52ead062a51a64521ed3871d52914bf532876",
        container="model",
        input_size=(3, 224, 224),
        num_classes=1000,
        metrics={"top1": top1},
        params=round(params * 1e6),
        macs=gmacs * 1e9,
        note=note,
    )
    return {"in1k": record}


_S: dict[str, Any] = {"depths": (2, 2, 20, 2), "drop_path_rate": 0.3}
_BASE: dict[str, Any] = {"embed_dims": (128, 256, 512, 1024)}
_WIDE: dict[str, Any] = {"ssm_ratio": 2.0, "depths": (2, 2, 5, 2)}
_WIDE_S: dict[str, Any] = {"ssm_ratio": 2.0, "depths": (2, 2, 15, 2), "drop_path_rate": 0.3}
_VANILLA: dict[str, Any] = {
    "ssm_ratio": 2.0,
    "d_state": 16,
    "forward_type": "v0",
    "conv_bias": True,
    "mlp_ratio": 0.0,
    "overlap": False,
    "depths": (2, 2, 9, 2),
}
_VANILLA_S: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 27, 2), "drop_path_rate": 0.3}

VARIANTS = {
    "vssm1_tiny_0230s": Variant(
        config=VmambaConfig(), weights=_weights("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6, 30.2, 4.9)
    ),
    "vssm1_small_0229s": Variant(
        config=VmambaConfig(**_S), weights=_weights("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 83.3, 49.0, 8.6)
    ),
    "vssm1_base_0229s": Variant(
        config=VmambaConfig(**{**_S, **_BASE, "drop_path_rate": 0.5}),
        weights=_weights("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, 86.6, 15.2),
    ),
    "vssm_tiny_0230": Variant(
        config=VmambaConfig(**_WIDE), weights=_weights("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, 30.7, 4.9)
    ),
    "vssm_small_0229": Variant(
        config=VmambaConfig(**_WIDE_S),
        weights=_weights("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6, 50.1, 8.7),
    ),
    "vssm_base_0229": Variant(
        config=VmambaConfig(**{**_WIDE_S, **_BASE, "drop_path_rate": 0.6}),
        weights=_weights("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9, 88.6, 15.4),
    ),
    "vssmtiny_dp01": Variant(
        config=VmambaConfig(**_VANILLA),
        weights=_weights(
            "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
            82.2,
            22.9,
            5.6,
            "by its name trained with a drop path of 0.1, by the authors' configuration of 0.2",
        ),
    ),
    "vssmsmall_dp03": Variant(
        config=VmambaConfig(**_VANILLA_S),
        weights=_weights("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, 44.4, 11.2),
    ),
    "vssmbase_dp06": Variant(
        config=VmambaConfig(**{**_VANILLA_S, **_BASE, "drop_path_rate": 0.6}),
        weights=_weights("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7, 76.3, 18.0),
    ),
}

FAMILY = Family(
    name="vmamba",
    model=Vmamba,
    config=VmambaConfig,
    variants=VARIANTS,
    mixer="selective scan",
    paper="VMamba: Visual State Space Model, NeurIPS 2024, arXiv 2401.10166",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "embed_dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1)},
)
