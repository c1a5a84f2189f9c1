"""CAS-ViT: convolutional networks whose tokens compare queries and keys by adding what gates let pass of them.

Paper: Zhang et al., "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile
Applications", arXiv 2408.03703. Official code: Tianfang-Zhang/CAS-ViT at 041d2d6 (MIT), where the models are called
RCViT, `classification/model/rcvit.py`; for dense tasks `detection/model/rcvit.py`.

What differs from the official code, and why:

- One class serves classification and dense tasks. The norms of the dense version are numbered by stage.
- With two classifiers the official model returns the outputs of both while training. This one does after
  `set_distilled_training()`, as timm's models do, and else their mean, as in evaluation: losses then need not know.
- The official trainer builds models with one classifier, the published numbers of parameters count two, and which of
  both the files hold is not known. Either is read: one classifier becomes two equal ones, two become their mean.
- Queries, keys and values come of three convolutions by parts of one weight, so that none is cut out of a wider map.
- On a GPU depthwise convolutions sum in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import depthwise_conv
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
from .fusing import fold_neighbours, is_layer, mean_layer
from .layers import BatchNorm, DropPath, is_plain

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""


@dataclass(frozen=True, kw_only=True)
class CasVitConfig:
    """Configuration of a CAS-ViT.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        distillation: Build a second classifier, to be trained by a teacher; logits are the mean of both.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (48, 56, 112, 220)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1
    distillation: bool = True
    output_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) > 0:
            raise ValueError(f"embed_dims and depths need one entry per stage, got {self.embed_dims} and {self.depths}")
        if min(*self.embed_dims, *self.depths) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                f"embed_dims, depths and mlp_ratio must be positive, got {self.embed_dims}, {self.depths}, "
                f"{self.mlp_ratio}"
            )
        if self.embed_dims[0] % 2:
            raise ValueError(
                f"embed_dims must begin with an even number, half of which the stem begins with; got "
                f"{self.embed_dims[0]}, nearest valid: {self.embed_dims[0] + 1}"
            )
        check_size_and_rate(self.img_size, self.drop_path_rate)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)


class DepthwiseConv(nn.Conv2d):
    """A depthwise 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not x.is_cuda:  # exports for phones keep torch's own convolution
            return super().forward(x)
        return depthwise_conv(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class SpatialGate(nn.Module):
    """Weigh positions, all channels of one alike, by what its neighbourhood says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            DepthwiseConv(channels), BatchNorm(channels), nn.ReLU(), nn.Conv2d(channels, 1, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        # Squeezed, since exports with free sizes would ask in which order a map of one channel lies in memory.
        return x * self.block(x).squeeze(1).sigmoid()[:, None]


class ChannelGate(nn.Module):
    """Weigh channels by what the mean over positions says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x * self.block(x)


class AdditiveMixer(nn.Module):
    """Add gated queries and keys, look around, and weigh values by the outcome (paper, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.oper_q = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.oper_k = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.dwc = DepthwiseConv(channels)
        self.proj = DepthwiseConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        q, k, v = self.project(x)
        return self.proj(self.dwc(self.oper_q(q) + self.oper_k(k)) * v)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, (B, C, H, W) each."""
        if not is_plain(self.qkv):
            return self.qkv(x).chunk(3, 1)
        weights, bias = self.qkv.weight.chunk(3), self.qkv.bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.conv2d(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


class LocalIntegration(nn.Module):
    """Mix channels, then neighbours, then channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            BatchNorm(channels),
            DepthwiseConv(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return self.network(x)


class Mlp(nn.Module):
    """Two point-wise convolutions around an exact (erf) GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class CasVitBlock(nn.Module):
    """Local integration, which is never dropped, a mixer and an MLP, each on a residual branch."""

    def __init__(self, channels: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.local_perception = LocalIntegration(channels)
        self.norm1 = BatchNorm(channels)
        self.attn = AdditiveMixer(channels)
        self.norm2 = BatchNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        x = x + self.local_perception(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fuse_(self) -> None:
        """Fold both norms into the convolutions that read them."""
        fold_neighbours(self, ["norm1", "attn.qkv"])
        fold_neighbours(self, ["norm2", "mlp.fc1"])


class Embedding(nn.Module):
    """Halve the map by a convolution and a norm."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out_channels, 3, 2, padding=1)
        self.norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', ceil(H/2), ceil(W/2))."""
        return self.norm(self.proj(x))

    def fuse_(self) -> None:
        """Fold the norm into the convolution."""
        fold_neighbours(self, ["proj", "norm"])


def make_stem(in_chans: int, channels: int) -> nn.Sequential:
    """Image (B, in_chans, H, W) to the first stage's map (B, C, ceil(H/4), ceil(W/4))."""
    return nn.Sequential(
        nn.Conv2d(in_chans, channels // 2, 3, 2, padding=1),
        BatchNorm(channels // 2),
        nn.ReLU(),
        nn.Conv2d(channels // 2, channels, 3, 2, padding=1),
        BatchNorm(channels),
        nn.ReLU(),
    )


class CasVit(Backbone):
    """CAS-ViT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NCHW"
    output_norm_name = "outnorm{}"
    stem_name = "patch_embed.0"
    dist_head: nn.Module | None

    def __init__(self, config: CasVitConfig, **kwargs: Any) -> None:
        stages = [Stage(f"network.{2 * i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.patch_embed = make_stem(self.in_chans, config.embed_dims[0])
        self.network = nn.ModuleList()  # stages, with embeddings between them
        for index, channels in enumerate(config.embed_dims[: self.built_stages]):
            if index:
                self.network.append(Embedding(config.embed_dims[index - 1], channels))
            blocks = (CasVitBlock(channels, config.mlp_ratio, rate) for rate in rates[index])
            self.network.append(nn.ModuleList(blocks))
        if config.output_norms:
            self.add_output_norms()
        self.distilled_training = False
        self.dist_head = None
        if not self.features_only:
            self.norm = BatchNorm(self.num_features)
            self.head = make_classifier(self.num_features, self.num_classes)
            if config.distillation:
                self.dist_head = make_classifier(self.num_features, self.num_classes)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(nn.ModuleList, self.network[2 * index]), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Embedding in front of stage `index`; see `Backbone`."""
        return self.network[2 * index - 1](x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def make_output_norm(self, channels: int) -> nn.Module:
        """A norm of the dense version; see `Backbone`."""
        return BatchNorm(channels)

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """The classifier and, where there is one, the one that a teacher trains."""
        return ("head",) if self.dist_head is None else ("head", "dist_head")

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the model return the outputs of both classifiers while training, as timm's models do.

        Raises:
            ValueError: The model has one classifier, or none.
        """
        if enable and self.dist_head is None:
            raise ValueError("training by a teacher needs a second classifier: build the model with distillation=True")
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Pool and classify what `forward_features` returned; see `Backbone`.

        Returns:
            The mean of the outputs of both classifiers, or while training after `set_distilled_training()` the pair.
        """
        pooled = super().forward_head(x, pre_logits=True)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.dist_head is None:
            return logits
        distilled = self.dist_head(pooled)
        return (logits, distilled) if self.distilled_training and self.training else (logits + distilled) / 2

    def fuse_(self) -> None:
        """Make one classifier of two; see `Backbone.fuse`."""
        heads = [self.get_submodule(name) for name in self.classifier_names if not self.features_only]
        if len(heads) == 2 and all(is_layer(head) for head in heads):
            self.head = mean_layer(cast(list[nn.Linear], heads))
            self.dist_head = None
            self.distilled_training = False

    def fuse_final_norm_(self) -> None:
        """Into the classifier, since the mean over positions lets it pass; see `Backbone`."""
        if not self.features_only and self.dist_head is None:
            fold_neighbours(self, ["norm", "head"])

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Fit one classifier to two, or two to one, which leaves the logits as they are; see `Backbone`."""
        done = {}
        for leaf in ("weight", "bias"):
            one, other = f"head.{leaf}", f"dist_head.{leaf}"
            if one in state and other not in state and self.dist_head is not None:
                state[other] = state[one]
                done[other] = "as in the checkpoint's only classifier"
            elif one in state and other in state and self.dist_head is None and not self.features_only:
                state[one] = (state[one] + state.pop(other)) / 2
                done[one] = "the mean of two classifiers"
        return done

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; an embedding goes with the block behind it."""
        behind = () if coarse else (0,)
        blocks = r"^network\.(\d+)\." if coarse else r"^network\.(\d+)\.(\d+)\."
        embeddings = [(rf"^network\.{i - 1}\.", (i, *behind)) for i in range(2, 2 * len(self.stages), 2)]
        return {"stem": r"^patch_embed\.", "blocks": [*embeddings, (blocks, None)]}


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^patch_embed\.",
    # Norms of the dense version, numbered there as their stages in `network`.
    renames=tuple((rf"^norm{2 * i}\.", f"outnorm{i}.") for i in range(4)),
    ignored=(r"\.num_batches_tracked$",),
)

DRIVE = "https://drive.google.com/file/d"


def _variants(
    name: str, embed_dims: tuple[int, ...], depths: tuple[int, ...], params: float, *files: tuple[str, float]
) -> dict[str, Variant]:
    """A design at 224 and fine-tuned at 384: the authors link two files to it without saying which is which."""
    found = {}
    for size, (file, top1) in zip((224, 384), files, strict=True):
        record = Weights(
            url="",
            manual=f"Save the file behind {DRIVE}/{file}/view",
            license="MIT",
            repository="Tianfang-Zhang/CAS-ViT",
            commit="041d2d688046ace52a6cec0bc5fd9e3876fdb930",
            container=("model", "model_ema"),
            input_size=(3, size, size),
            crop_pct=0.875 if size == 224 else 1.0,
            crop_mode="center" if size == 224 else "squash",
            num_classes=1000,
            metrics={"top1": top1},
            params=round(params * 1e6),
            note=f"the {'first' if size == 224 else 'second'} of two links, taken to be the one of this size",
        )
        config = CasVitConfig(img_size=size, embed_dims=embed_dims, depths=depths)
        found[name if size == 224 else f"{name}_{size}"] = Variant(config=config, weights={"in1k": record})
    return found


VARIANTS = {
    **_variants(
        "rcvit_xs",
        (48, 56, 112, 220),
        (2, 2, 4, 2),
        3.20,
        ("16wKcwF6QMW5w_lyPYnDKjMNuoxQDfrLK", 78.3),
        ("1kwRPtJ4FdmNeTm2MsiFN7N2DJpou3Pgl", 78.7),
    ),
    **_variants(
        "rcvit_s",
        (48, 64, 128, 256),
        (3, 3, 6, 3),
        5.76,
        ("1facFRq8s8oelYUtK1fj3fcfdoWoKDBQQ", 80.9),
        ("1UagCihMWmNCmYGC1DV5euAvA5TONI818", 81.1),
    ),
    **_variants(
        "rcvit_m",
        (64, 96, 192, 384),
        (3, 3, 6, 3),
        12.42,
        ("13sQpSEf0h_uuh0jRy9V0yIW6ZsbDpVGy", 82.8),
        ("1pTwKKRLPA7vBfk_KTgJ4J1Jq3ttkh3O2", 83.0),
    ),
    **_variants(
        "rcvit_t",
        (96, 128, 256, 512),
        (3, 3, 6, 3),
        21.76,
        ("1NqoIUPbwBC91RTjTUvubAbOfGqo1VYT0", 83.9),
        ("1N5Y81Vcyf2ox41TC3wlRBxgQPYaEndTW", 84.1),
    ),
}

FAMILY = Family(
    name="cas_vit",
    model=CasVit,
    config=CasVitConfig,
    variants=VARIANTS,
    mixer="additive attention",
    paper=(
        "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile Applications, "
        "arXiv 2408.03703"
    ),
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "embed_dims": (12, 16, 20, 24), "depths": (1, 1, 1, 1)},
)
