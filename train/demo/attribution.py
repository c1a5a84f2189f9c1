"""Where a classifier looks, and whether that can be believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vizoo.backbones.base import Backbone

Images = Sequence[NDArray[np.uint8]]


def look(model: Backbone, images: Tensor, labels: Tensor, stage: int = 0) -> Tensor:
    """Places whose features in one stage spoke for a class.

    HiResCAM (Draelos and Carin 2020, arXiv 2011.08891): activation times gradient of the logit, summed over channels,
    positive part. Unlike Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) it does not average gradients over places,
    so it can be used in an early stage, whose map is fine enough to show strokes.

    Args:
        model: A classifier; its parameters get no gradients.
        images: Normalised images (B, C, H, W).
        labels: The class to explain in each image (B,).
        stage: Index of the stage.

    Returns:
        Heat (B, H, W) in 0..1; the hottest place of each image is 1 unless no place spoke for the class.

    Raises:
        ValueError: There is no such stage.
    """
    if not 0 <= stage < len(model.stages):
        raise ValueError(f"stage must lie in 0..{len(model.stages) - 1}, got {stage}")
    with torch.enable_grad():
        kept = _stages(model, model.stem(images), 0, stage + 1).detach().requires_grad_()
        last = _stages(model, kept, stage + 1, len(model.stages))
        logits = model.forward_head(model.normalize(last))
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), kept)
    heat = (kept.detach() * gradient).sum(-1 if model.layout == "NHWC" else 1).clamp(min=0)
    heat = F.interpolate(heat[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def _stages(model: Backbone, x: Tensor, start: int, stop: int) -> Tensor:
    for index in range(start, stop):
        x = model.stage(index, model.downsample(index, x) if index > 0 else x)
    return x


def hiding_test(
    accuracy: Callable[[Images], float], images: Images, heat: Sequence[NDArray[np.floating]], share: float, seed: int
) -> tuple[float, float]:
    """What hiding the hottest pixels costs, against hiding as many at random.

    Only pixels that are not black already count, so that both hide the same amount of ink.

    Args:
        accuracy: Accuracy of the model on gray images (H, W), in the order of `images`.
        images: The images.
        heat: One map per image, at the images' size.
        share: Share of each image's ink that is hidden.
        seed: Seed of the random choice.

    Returns:
        Accuracy with the hottest ink hidden, and with ink hidden at random (mean of three draws).
    """
    generator = np.random.default_rng(seed)
    hottest = accuracy([hide(image, h, share) for image, h in zip(images, heat, strict=True)])
    draws = [accuracy([hide(image, generator.random(image.shape), share) for image in images]) for _ in range(3)]
    return hottest, float(np.mean(draws))


def hide(image: NDArray[np.uint8], rank: NDArray[np.floating], share: float) -> NDArray[np.uint8]:
    """The image (H, W) with that share of its pixels that are not black blackened, those of highest rank first."""
    inked = np.flatnonzero(image)
    count = round(share * len(inked))
    chosen = inked[np.argsort(-rank.reshape(-1)[inked], kind="stable")[:count]]
    hidden = image.copy()
    hidden.reshape(-1)[chosen] = 0
    return hidden
