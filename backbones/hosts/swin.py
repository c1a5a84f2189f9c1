"""Swin's frame: four stages with merging of patches between them. See the package."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..base import (
    Backbone,
    Stage,
    drop_path_rates,
    make_classifier,
)
from ..layers import LayerNorm
from ..swin import SwinConfig, SwinStage, WindowAttention, gather_cells
from .parts import Block, MakeMixer, MakeNorm, PatchEmbed, fold_norm, init_host


class PatchMerging(nn.Module):
    """Halve the map and double its channels."""

    def __init__(self, channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm = norm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.reduction(self.norm(gather_cells(x)))

    def fuse_(self) -> None:
        """Fold the norm into the linear layer behind it."""
        fold_norm(self, "norm", [self.reduction])


class SwinHost(Backbone):
    """Swin's frame: a pyramid whose maps are halved by merging 2 x 2 patches.

    Args:
        config: The design.
        mixer: Builds the mixer of a block.
        norm: Builds a norm.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"relative_position_bias_table$"
    stem_name = "patch_embed.proj"

    def __init__(self, config: SwinConfig, mixer: MakeMixer, norm: MakeNorm = LayerNorm, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, config.patch_size * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        embed_norm = norm(config.embed_dim, keep_float32=True)
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.patch_size, embed_norm)
        self.layers = nn.ModuleList()
        for i, channels in enumerate(config.channels[: self.built_stages]):
            hidden = int(channels * config.mlp_ratio)
            blocks = [Block(channels, mixer(i, j), hidden, rate, norm) for j, rate in enumerate(rates[i])]
            merging = PatchMerging(channels, norm) if i < self.built_stages - 1 else None
            self.layers.append(SwinStage(blocks, merging))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = norm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        init_host(self, self.no_decay)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(SwinStage, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Patch merging in front of stage `index`; see `Backbone`."""
        return cast(SwinStage, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def fuse_final_norm_(self) -> None:
        """Fold the final norm into the classifier: the mean over positions commutes with it."""
        fold_norm(self, "norm", [self.get_classifier()])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; patch merging goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        merging = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*merging, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


class ShiftedWindowAttention(WindowAttention):
    """Swin's attention of one block, which knows whether its windows are shifted; see `WindowAttention`."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool) -> None:
        super().__init__(
            config.channels[stage], config.num_heads[stage], config.windows[stage], always_shift=config.output_norms
        )
        self.shifted = shifted

    def forward(self, x: Tensor, shifted: bool | None = None) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return super().forward(x, self.shifted if shifted is None else shifted)
