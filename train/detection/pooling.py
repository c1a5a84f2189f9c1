"""Fixed-size features of boxes, from the level of a pyramid that suits each box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


class RoIPooler(nn.Module):
    """RoIAlign over a pyramid, as mmdetection's SingleRoIExtractor.

    torchvision's MultiScaleRoIAlign cannot stand in: it shifts by half a pixel, samples a bin twice, and infers the
    strides from the first image that it sees.

    Args:
        output_size: Side of the pooled map.
        strides: Input pixels per position of each level, finest first.
        sampling_ratio: Samples per bin and axis; 0 takes the box's share, ceil(box side / `output_size`).
        aligned: Count pixels from their centres.
        finest_size: Boxes smaller than twice this (square root of the area, in pixels) come from the finest level.
    """

    def __init__(
        self,
        output_size: int,
        strides: Sequence[int],
        *,
        sampling_ratio: int = 0,
        aligned: bool = True,
        finest_size: float = 56.0,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.finest_size = finest_size

    def levels(self, boxes: Tensor) -> Tensor:
        """Index (n,) of the level that each box (n, 4) is pooled from."""
        sides = boxes[:, 2:] - boxes[:, :2]
        scale = sides.prod(dim=1).clamp(min=0).sqrt() / self.finest_size
        return (scale + 1e-6).log2().floor().clamp(0, len(self.strides) - 1).long()

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Features (n, C, output_size, output_size), always float32.

        Args:
            maps: One (B, C, H, W) map per level; further ones are not read.
            boxes: Boxes (n_i, 4) of each image, in input pixels; n is their sum.
        """
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(list(boxes))], dim=1).float()
        levels = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.output_size, self.output_size, dtype=torch.float32)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=False)):
            chosen = torch.where(levels == level)[0]
            pooled = pooled.index_put((chosen,), self._pool(features.float(), rois[chosen], stride))
        return pooled

    def _pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(features, rois, self.output_size, 1 / stride, self.sampling_ratio, self.aligned)
