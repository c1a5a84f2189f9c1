"""Mixup and CutMix on batches that are already on the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vizoo.backbones.base import nearest

MODES = ("batch", "pair", "elem")


class Mixup:
    """Mix each image of a batch, and its target, with its mirror partner in the batch: timm's definition.

    Image i is mixed with image B - 1 - i, so batches must be even: use `drop_last`. The defaults are those of the
    ImageNet recipes. Draws from numpy's global generator.

    Args:
        num_classes: Columns of the targets.
        mixup_alpha: Parameter of the Beta distribution of mixup's share; 0 for no mixup.
        cutmix_alpha: Parameter of the Beta distribution of CutMix's share; 0 for no CutMix.
        cutmix_minmax: Range of the sides of CutMix's box, as shares of the image; it then replaces `cutmix_alpha`.
        prob: Probability of mixing at all.
        switch_prob: Probability of CutMix where both are on.
        mode: One draw per `batch`, per `pair` of images, or per image (`elem`).
        label_smoothing: Share of the targets spread over all classes. The loss must not smooth again.

    Attributes:
        enabled: Whether to mix; targets are soft and smoothed either way.

    Raises:
        ValueError: Both methods off, an unknown mode, or a number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        label_smoothing: float = 0.1,
    ) -> None:
        from timm.data.mixup import Mixup as TimmMixup

        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; {nearest(mode, MODES)}")
        _check_strength(mixup_alpha, cutmix_alpha, cutmix_minmax)
        for name, value in {"prob": prob, "switch_prob": switch_prob, "label_smoothing": label_smoothing}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self._mix = TimmMixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            cutmix_minmax=None if cutmix_minmax is None else list(cutmix_minmax),
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    @property
    def enabled(self) -> bool:
        """Whether images are mixed; recipes turn it off for the last epochs."""
        return self._mix.mixup_enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._mix.mixup_enabled = value

    def __call__(self, inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch, writing into `inputs`.

        Args:
            inputs: Images (B, C, H, W), floating point, B even.
            label: Class of each image (B,).

        Returns:
            The mixed images, and soft targets (B, num_classes) in float32.

        Raises:
            ValueError: An odd batch, or as many labels as there are not images.
        """
        if len(inputs) % 2:
            raise ValueError(
                f"mixup pairs the images of a batch, so their number must be even, got {len(inputs)}: "
                "set an even batch_size and drop_last=True for the training data"
            )
        if label.shape != inputs.shape[:1]:
            raise ValueError(f"labels must be ({len(inputs)},), one per image, got {tuple(label.shape)}")
        return self._mix(inputs, label)


def _check_strength(mixup_alpha: float, cutmix_alpha: float, minmax: Sequence[float] | None) -> None:
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(f"alphas must be 0 or more, got mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}")
    if minmax is not None and not (len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1):
        raise ValueError(f"cutmix_minmax must be (low, high) with 0 < low < high <= 1, got {minmax!r}")
    if not mixup_alpha and not cutmix_alpha and minmax is None:
        raise ValueError("mixup_alpha and cutmix_alpha are both 0: for label smoothing alone use the model's own")
