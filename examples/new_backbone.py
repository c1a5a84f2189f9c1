"""A new backbone in one file: four methods, and the whole surface (features, heads, timm's methods) is there.

As `backbones/pool_mixer.py` this file would join the zoo as it stands: the registry finds families by looking.
docs/adding-a-backbone.md goes through it step by step.

python examples/new_backbone.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.base import Backbone, CheckpointLayout, Family, Stage, Variant, make_classifier
from vizoo.backbones.layers import Mlp, pad_to_multiple


@dataclass(frozen=True, kw_only=True)
class PoolMixerConfig:
    """Configuration of a PoolMixer.

    Attributes:
        img_size: Image side the model is meant for; any other runs as well.
        channels: Channels per stage.
        depths: Blocks per stage.
        pool: Side of the neighbourhood that a position is compared with; odd.
    """

    img_size: int = 224
    channels: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (1, 1, 2, 1)
    pool: int = 3

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.depths):
            raise ValueError(f"channels and depths need one entry per stage, got {self.channels} and {self.depths}")
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}; nearest valid: {self.pool + 1}")


class PoolBlock(nn.Module):
    """Mixes tokens by the difference from their neighbourhood's mean, then channels by an MLP."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.pool = nn.AvgPool2d(pool, stride=1, padding=pool // 2, count_include_pad=False)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        y = self.norm1(x)
        x = x + self.pool(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) - y
        return x + self.mlp(self.norm2(x))


class PoolMixer(Backbone):
    """A pyramid of pooling blocks; each stage starts with a convolution that reduces the map."""

    stem_name = "reduce.0"

    def __init__(self, config: PoolMixerConfig, **kwargs: Any) -> None:
        stages = [Stage(f"blocks.{i}", c, 4 * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        inputs = (self.in_chans, *config.channels)
        steps = [4] + [2] * (len(config.channels) - 1)
        built = range(self.built_stages)
        self.reduce = nn.ModuleList(nn.Conv2d(inputs[i], config.channels[i], steps[i], steps[i]) for i in built)
        self.blocks = nn.ModuleList(
            nn.ModuleList(PoolBlock(config.channels[i], config.pool) for _ in range(config.depths[i])) for i in built
        )
        if not self.features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = make_classifier(self.num_features, self.num_classes)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first stage's map (B, H, W, C)."""
        return self.reduce[0](pad_to_multiple(x, 4)).permute(0, 2, 3, 1)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Halve the map in front of a stage; an odd side is padded first, hence the ceil in the contract."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.reduce[index](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage."""
        return self.run_blocks(self.blocks[index], x)

    def normalize(self, x: Tensor) -> Tensor:
        """Norm in front of the pooling."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block."""
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        return {"stem": r"^reduce\.0", "blocks": [(blocks, None), (r"^reduce\.(\d+)", None), (r"^norm", (99999,))]}


FAMILY = Family(
    name="pool_mixer",
    model=PoolMixer,
    config=PoolMixerConfig,
    variants={"pool_mixer_tiny": Variant(config=PoolMixerConfig())},
    mixer="pooling",
    paper="an example, after the token mixer of MetaFormer (CVPR 2022, arXiv 2111.11418)",
    layouts=(CheckpointLayout(name="official", marker=r"^reduce\.0\."),),
    tiny={"img_size": 64, "channels": (8, 16), "depths": (1, 1)},
)


def main() -> None:
    """Show what came for free."""
    model = PoolMixer(PoolMixerConfig(), num_classes=10).eval()
    image = torch.randn(2, 3, 75, 130)
    print("logits", tuple(model(image).shape))
    for stage, feature_map in zip(model.stages, model.features(image), strict=True):
        print(f"stage {stage.name}, stride {stage.stride}: {tuple(feature_map.shape)}")
    model.reset_classifier(3)
    report = vizoo.load_checkpoint(model, PoolMixer(PoolMixerConfig(), num_classes=3).state_dict())
    print(report)


if __name__ == "__main__":
    main()
