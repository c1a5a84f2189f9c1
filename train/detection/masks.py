"""Masks between a box's small map and the image: targets for training, and pasting of what was predicted."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

WORKING_PIXELS = 2**24
"""Pixels of float32 canvas that pasting holds at once: 64 MiB."""


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, size: int, *, threshold: float = 0.5) -> Tensor:
    """What a mask head must give for boxes: their objects' masks, cut out and resized, as mmdetection.

    Args:
        masks: Masks of an image's objects (m, H, W), uint8 or bool.
        objects: Object of each box (n,).
        boxes: Boxes (n, 4); clipped to the image here.
        size: Side of the head's maps.
        threshold: Share of a cell that an object must cover; torchvision keeps the share itself.

    Returns:
        (n, size, size) float32 zeros and ones.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, size, size)
    height, width = masks.shape[-2:]
    used, index = objects.unique(return_inverse=True)
    limit = boxes.new_tensor([width, height, width, height])
    rois = torch.cat([index[:, None].to(boxes), boxes.clamp(min=0).minimum(limit)], dim=1)
    with torch.autocast(boxes.device.type, enabled=False):
        cut = roi_align(masks[used].float()[:, None], rois, size, 1.0, 0, True)
    return (cut[:, 0] >= threshold).float()


def paste_soft(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Paint maps into their boxes on a canvas, bilinearly, by the centres of its pixels; 0 outside.

    Args:
        masks: Maps (n, S, S).
        boxes: Boxes (n, 4), not rounded.
        height: Rows of the canvas.
        width: Columns of the canvas.

    Returns:
        (n, height, width) float32.
    """
    with torch.autocast(masks.device.type, enabled=False):
        rows = _weights(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
        columns = _weights(boxes[:, 0], boxes[:, 2], width, masks.shape[2])
        return rows @ masks.float() @ columns.transpose(1, 2)


def paste(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5, working_pixels: int = WORKING_PIXELS
) -> Tensor:
    """The pixels that pasted maps cover; works on as few at a time as memory asks for.

    Args:
        masks: Probabilities (n, S, S).
        boxes: Boxes (n, 4) in the canvas's pixels, not rounded.
        size: Height and width of the canvas.
        threshold: Least probability of a covered pixel.
        working_pixels: Pixels in float32 held at once.

    Returns:
        (n, height, width) bool.
    """
    height, width = size
    covered = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    step = max(1, working_pixels // max(1, height * width))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        torch.ge(paste_soft(masks[part], boxes[part], height, width), threshold, out=covered[part])
    return covered


def _weights(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
    """Share (n, pixels, cells) of each cell in the value of each pixel along one axis."""
    centres = torch.arange(pixels, device=low.device) + 0.5
    # A box without extent covers no centre; the least width keeps 0 / 0 out.
    extent = (high - low).clamp(min=1e-6)
    position = (centres[None, :] - low[:, None]) / extent[:, None] * cells - 0.5
    distance = position[:, :, None] - torch.arange(cells, device=low.device)
    return (1 - distance.abs()).clamp(min=0)
