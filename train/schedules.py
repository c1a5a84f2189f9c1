"""Learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim import BaseOptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from torch.optim import Optimizer


def warmup_cosine(step: int, *, warmup: int, total: int, start_ratio: float, min_ratio: float) -> float:
    """Share of the full learning rate at an update: a line up from `start_ratio`, then half a cosine to `min_ratio`.

    The cosine counts from the end of the warm-up (timm's `warmup_prefix`), as in the official Swin recipe, whose
    script however applies each value one update later.

    Args:
        step: Updates done so far.
        warmup: Updates of the warm-up.
        total: Updates of the whole run, warm-up included.
        start_ratio: Share at update 0.
        min_ratio: Share at update `total` and after it.

    Returns:
        The factor for the learning rate.
    """
    if step < warmup:
        return start_ratio + (1 - start_ratio) * step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """`warmup_cosine` for every parameter group, each scaled from its own rate.

    Start and minimum are ratios, so layer-wise rates keep their proportions. The value follows from the step alone:
    nothing accumulates rounding, and a resumed run continues exactly.

    Args:
        optimizer: Optimiser or optim wrapper.
        warmup: Length of the warm-up, in epochs (updates when `by_epoch=False`).
        end: Length of the whole run in the same unit; the Runner fills it in.
        start_ratio: Share of the learning rate at the first update.
        min_ratio: Share of the learning rate at the end.
        by_epoch: Change the rate once per epoch. The recipes change it per update: they say
            `by_epoch=True, convert_to_iter_based=True`, which converts the lengths once the data loader is known.
        last_step: Step to continue from without a state; -1 starts.

    Raises:
        ValueError: A warm-up that is negative or not shorter than the run, or ratios outside [0, 1].
    """

    def __init__(
        self,
        optimizer: BaseOptimWrapper | Optimizer,
        *,
        warmup: float,
        end: float,
        start_ratio: float = 1e-3,
        min_ratio: float = 1e-2,
        by_epoch: bool = True,
        last_step: int = -1,
    ) -> None:
        if not 0 <= warmup < end:
            unit = "epochs" if by_epoch else "updates"
            raise ValueError(
                f"the warm-up ({warmup} {unit}) must be shorter than the run ({end} {unit}) and not negative: "
                "set param_scheduler.0.warmup or train_cfg.max_epochs"
            )
        for name, ratio in (("start_ratio", start_ratio), ("min_ratio", min_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {ratio}")
        self.shape = {"warmup": warmup, "total": end, "start_ratio": start_ratio, "min_ratio": min_ratio}
        super().__init__(optimizer, "lr", by_epoch=by_epoch, last_step=last_step)

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer: BaseOptimWrapper | Optimizer,
        *,
        epoch_length: int,
        warmup: float,
        end: float,
        by_epoch: bool = True,
        **options: Any,
    ) -> WarmupCosineLR:
        """The same schedule counted in updates; mmengine calls this for `convert_to_iter_based=True`.

        Args:
            optimizer: Optimiser or optim wrapper.
            epoch_length: Batches per epoch.
            warmup: Epochs of the warm-up; may be a fraction.
            end: Epochs of the run.
            by_epoch: Must be True.
            **options: Passed on.
        """
        if not by_epoch:
            raise ValueError("convert_to_iter_based=True converts epochs: it needs by_epoch=True")
        accumulated = getattr(optimizer, "_accumulative_counts", 1)
        updates = -(-epoch_length // accumulated)
        return cls(optimizer, warmup=round(warmup * updates), end=end * updates, by_epoch=False, **options)

    def _get_value(self) -> list[float]:
        factor = warmup_cosine(self.last_step, **self.shape)  # type: ignore[arg-type]
        return [base * factor for base in self.base_values]
