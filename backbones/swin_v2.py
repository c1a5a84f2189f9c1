"""Swin Transformer V2: norms at the end of each branch, cosine attention, and a bias that an MLP draws from offsets.

Paper: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", CVPR 2022, arXiv 2111.09883.
Official code: microsoft/Swin-Transformer at f82860b (MIT), `models/swin_transformer_v2.py`.

What differs from the official code, and why:

- Maps that windows do not divide are padded with zeros before the block, as Swin V1's dense version does behind its
  norm; the official code refuses them. Padded keys are zero vectors (keys have no bias), so their cosine is 0.
- The bias exists for any window, so the window of a stage is the smaller one of the configured side and the map's
  smaller side, judged at run time. This is the official model built for that very image size.
- Logit scale, bias MLP and normalisation stay in float32 under autocast; half precision is a known cause of divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import window_attention
from vizoo.ops.tracing import without_autocast
from vizoo.weights.record import Weights

from .base import Family, Variant, init_linear
from .layers import LayerNorm, larger, smaller
from .swin import (
    OFFICIAL_LAYOUT,
    TIMM_LAYOUT,
    Swin,
    SwinBlock,
    SwinConfig,
    classifier_weights,
    gather_cells,
    look_up_bias,
    relative_position_index,
    shift_of,
)

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class SwinV2Config(SwinConfig):
    """Configuration of a Swin Transformer V2; see `SwinConfig` for the other fields.

    Attributes:
        pretrained_windows: Window per stage that the weights were first trained with, which scales the coordinates of
            the bias MLP; 0 means the stage's present window. A wrong value changes results without any error.
    """

    img_size: int | tuple[int, int] = 256
    window_size: int = 8
    pretrained_windows: tuple[int, ...] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.pretrained_windows) != len(self.depths) or any(p < 0 or p == 1 for p in self.pretrained_windows):
            raise ValueError(
                "pretrained_windows needs one entry per stage, each 0 or at least 2, "
                f"got {self.pretrained_windows} for {len(self.depths)} stages"
            )


def log_coordinates(window: int, pretrained: int, device: torch.device) -> Tensor:
    """Log-spaced relative offsets, the input of the bias MLP (paper, section 3.3).

    Returns:
        ((2 window - 1)^2, 2) float32, vertical component first; +-1 at the pretraining window's border.
    """
    offset = torch.arange(1 - window, window, device=device, dtype=torch.float32)
    reach = pretrained - 1 if pretrained else larger(window - 1, 1)  # a window of one position has offset 0 only
    t: Tensor = offset * 8.0 / reach
    t = torch.sign(t) * torch.log2(t.abs() + 1) / 3.0
    side = 2 * window - 1
    return torch.stack([t[:, None].expand(side, side), t[None, :].expand(side, side)], dim=-1).flatten(0, 1)


class CosineWindowAttention(nn.Module):
    """Window attention on cosine similarities, with a learned temperature per head and a bias for any window."""

    def __init__(self, channels: int, heads: int, window_size: int, pretrained: int) -> None:
        super().__init__()
        self.heads = heads
        self.window_size = window_size
        self.pretrained = pretrained
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def bias(self, window: int) -> Tensor:
        """Relative position bias (heads, window^2, window^2), between 0 and 16."""
        device = self.logit_scale.device
        table = 16 * torch.sigmoid(self.cpb_mlp(log_coordinates(window, self.pretrained, device)))
        return look_up_bias(table, relative_position_index(window, device))

    def forward(self, x: Tensor, shifted: bool) -> Tensor:
        """(B, H, W, C) to the same shape; `shifted` moves the windows by half a window where the map allows it."""
        batch, height, width, channels = x.shape
        window = smaller(self.window_size, smaller(height, width))
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        with without_autocast(x.device):
            bias = self.bias(window)
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().flatten()
        out = window_attention(
            qkv.view(batch, height, width, 3, self.heads, channels // self.heads),
            bias,
            window=window,
            shift=shift_of(window, height, width) if shifted else 0,
            cosine_scale=scale,
            padding=qkv_bias.view(3, self.heads, -1),
        )
        return self.proj(out.flatten(3))


class SwinV2Block(SwinBlock):
    """Block with the norm at the end of each residual branch."""

    def make_attention(self, config: Any, stage: int) -> nn.Module:
        """The attention of a block in this stage."""
        return CosineWindowAttention(
            config.channels[stage], config.num_heads[stage], config.window_size, config.pretrained_windows[stage]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.norm1(self.attn(x, self.shifted)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMergingV2(nn.Module):
    """Halve the map and double its channels, with the norm behind the projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = LayerNorm(2 * channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.norm(self.reduction(gather_cells(x)))


class SwinV2(Swin):
    """Swin Transformer V2; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    no_decay = r"logit_scale$|cpb_mlp"
    block = SwinV2Block
    merging = PatchMergingV2

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_linear(module)
        elif isinstance(module, SwinV2Block):  # every residual branch starts at zero
            for norm in (module.norm1, module.norm2):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)


_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE: dict[str, Any] = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_FROM_192: dict[str, Any] = {"pretrained_windows": (12, 12, 12, 6)}


def _weights(name: str, size: int, num_classes: int = 1000, **facts: Any) -> Weights:
    return classifier_weights(f"v2.0.0/{name}", size, num_classes, **facts)


def _variant(
    name: str, size: int, window: int, tag: str = "in1k", *, top1: float, params: float, gmacs: float, **design: Any
) -> Variant:
    record = _weights(name, size, metrics={"top1": top1}, params=int(params * 1e6), macs=gmacs * 1e9)
    return Variant(config=SwinV2Config(img_size=size, window_size=window, **design), weights={tag: record})


def _pretrained(name: str, **design: Any) -> Variant:
    record = _weights(name, 192, 21841)
    return Variant(
        config=SwinV2Config(img_size=192, window_size=12, **design), weights={"in22k": record}, num_classes=21841
    )


_FT = "in22k_ft_in1k"
_ROWS: tuple[tuple[str, int, int, str, float, float, float, dict[str, Any]], ...] = (
    ("swinv2_tiny_patch4_window8_256", 256, 8, "in1k", 81.8, 28, 5.9, {}),
    ("swinv2_small_patch4_window8_256", 256, 8, "in1k", 83.7, 50, 11.5, _SMALL),
    ("swinv2_base_patch4_window8_256", 256, 8, "in1k", 84.2, 88, 20.3, _BASE),
    ("swinv2_tiny_patch4_window16_256", 256, 16, "in1k", 82.8, 28, 6.6, {}),
    ("swinv2_small_patch4_window16_256", 256, 16, "in1k", 84.1, 50, 12.6, _SMALL),
    ("swinv2_base_patch4_window16_256", 256, 16, "in1k", 84.6, 88, 21.8, _BASE),
    ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft", 256, 16, _FT, 86.2, 88, 21.8, {**_BASE, **_FROM_192}),
    ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", 384, 24, _FT, 87.1, 88, 54.7, {**_BASE, **_FROM_192}),
    ("swinv2_large_patch4_window12to16_192to256_22kto1k_ft", 256, 16, _FT, 86.9, 197, 47.5, {**_LARGE, **_FROM_192}),
    ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft", 384, 24, _FT, 87.6, 197, 115.4, {**_LARGE, **_FROM_192}),
)

VARIANTS = {
    **{
        name: _variant(name, size, window, tag, top1=top1, params=params, gmacs=gmacs, **design)
        for name, size, window, tag, top1, params, gmacs, design in _ROWS
    },
    "swinv2_base_patch4_window12_192_22k": _pretrained("swinv2_base_patch4_window12_192_22k", **_BASE),
    "swinv2_large_patch4_window12_192_22k": _pretrained("swinv2_large_patch4_window12_192_22k", **_LARGE),
}

FAMILY = Family(
    name="swin_v2",
    model=SwinV2,
    config=SwinV2Config,
    variants=VARIANTS,
    mixer="window attention",
    paper="Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, arXiv 2111.09883",
    layouts=(OFFICIAL_LAYOUT, TIMM_LAYOUT),
    tiny={"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
)
