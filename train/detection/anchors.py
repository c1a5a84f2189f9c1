"""Reference boxes at every position of every map: the anchors that proposals and RetinaNet start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

RATIOS = (0.5, 1.0, 2.0)


class Anchors(AnchorGenerator):
    """torchvision's anchors with the numbers of mmdetection 2.11 and 3.3.

    Strides are constants: torchvision divides the padded image's side by the map's, which gives 61 instead of 64 for a
    side of 800. Centres lie on multiples of the stride; positions go by rows, then columns, then ratios, then sizes.

    Args:
        strides: Input pixels per position of each map, finest first.
        sizes: Square roots of the anchors' areas in pixels, per map.
        ratios: Heights over widths.
        rounded: Round widths and heights to whole pixels, as torchvision does.

    Raises:
        ValueError: Not one group of sizes per stride.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float] = RATIOS,
        *,
        rounded: bool = False,
    ) -> None:
        if len(strides) != len(sizes):
            raise ValueError(f"anchors need one group of sizes per stride, got {len(sizes)} for {len(strides)} strides")
        self.rounded = rounded
        super().__init__(tuple(tuple(group) for group in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    @classmethod
    def by_scale(
        cls, strides: Sequence[int], scale: float, octaves: int = 1, ratios: Sequence[float] = RATIOS
    ) -> Anchors:
        """Sizes scale * stride * 2^(i / octaves), i = 0..octaves - 1; (8, 1) for proposals, (4, 3) for RetinaNet."""
        return cls(strides, [[scale * s * 2 ** (i / octaves) for i in range(octaves)] for s in strides], ratios)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors (ratios * sizes, 4) around the origin."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths = (sizes[None, :] / roots[:, None]).flatten()
        heights = (sizes[None, :] * roots[:, None]).flatten()
        corners = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
        return corners.round() if self.rounded else corners

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (rows * columns * per position, 4) of each map, float32, the same for every image of a batch."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        return self.grid_anchors([list(m.shape[-2:]) for m in maps], [[s, s] for s in self.strides])
