"""Learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
        return _line(step, warmup, start_ratio)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2


def warmup_steps(step: int, *, warmup: int, milestones: Sequence[int], gamma: float, start_ratio: float) -> float:
    """Share of the full learning rate at an update: a line up from `start_ratio`, times `gamma` past each milestone.

    Args:
        step: Updates done so far.
        warmup: Updates of the warm-up, which is multiplied onto the steps.
        milestones: Updates after which the rate falls.
        gamma: Factor at each of them.
        start_ratio: Share at update 0.

    Returns:
        The factor for the learning rate.
    """
    return _line(step, warmup, start_ratio) * gamma ** sum(step >= milestone for milestone in milestones)


def warmup_poly(step: int, *, warmup: int, total: int, power: float, start_ratio: float, min_ratio: float) -> float:
    """Share of the full learning rate at an update: a power of what is left of the run, the warm-up multiplied onto it.

    Args:
        step: Updates done so far.
        warmup: Updates of the warm-up.
        total: Updates of the whole run, warm-up included.
        power: Exponent; 1 falls in a line.
        start_ratio: Factor of the warm-up at update 0.
        min_ratio: Share at update `total` and after it.

    Returns:
        The factor for the learning rate.
    """
    left = max(0.0, 1 - step / total) ** power
    return _line(step, warmup, start_ratio) * (min_ratio + (1 - min_ratio) * left)


def _line(step: int, warmup: int, start_ratio: float) -> float:
    """From `start_ratio` at update 0 up to 1 after the warm-up."""
    return 1.0 if step >= warmup else start_ratio + (1 - start_ratio) * step / warmup


class ShapedLR(_ParamScheduler):
    """Every parameter group's own rate times a factor that is a function of the update and of the numbers in `shape`.

    Ratios keep the proportions of layer-wise rates. The value follows from the step alone: nothing accumulates
    rounding, and a resumed run continues exactly.

    Args:
        optimizer: Optimiser or optim wrapper.
        shape: Arguments of `factor` beside the step, plain values.
        by_epoch: Change the rate once per epoch.
        last_step: Step to continue from without a state; -1 starts.
    """

    factor: ClassVar[Callable[..., float]]

    def __init__(
        self, optimizer: BaseOptimWrapper | Optimizer, shape: dict[str, Any], *, by_epoch: bool, last_step: int
    ) -> None:
        self.shape = shape
        super().__init__(optimizer, "lr", by_epoch=by_epoch, last_step=last_step)

    def _get_value(self) -> list[float]:
        factor = self.factor(self.last_step, **self.shape)
        return [base * factor for base in self.base_values]


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(ShapedLR):
    """`warmup_cosine` for every parameter group, each scaled from its own rate.

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

    factor = staticmethod(warmup_cosine)

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
        _check_warmup(warmup, end, "epochs" if by_epoch else "updates")
        _check_ratios(start_ratio=start_ratio, min_ratio=min_ratio)
        shape = {"warmup": warmup, "total": end, "start_ratio": start_ratio, "min_ratio": min_ratio}
        super().__init__(optimizer, shape, by_epoch=by_epoch, last_step=last_step)

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
        updates = _updates_per_epoch(optimizer, epoch_length, by_epoch)
        return cls(optimizer, warmup=round(warmup * updates), end=end * updates, by_epoch=False, **options)


@PARAM_SCHEDULERS.register_module()
class WarmupStepLR(ShapedLR):
    """`warmup_steps` for every parameter group, each scaled from its own rate.

    In a config: `milestones` in epochs, `by_epoch=True, convert_to_iter_based=True`.

    Args:
        optimizer: Optimiser or optim wrapper.
        milestones: Updates after which the rate falls.
        end: Updates of the whole run; the Runner fills it in.
        gamma: Factor at each milestone.
        warmup: Updates of the warm-up, in epoch-based configs too.
        start_ratio: Share of the learning rate at the first update.
        by_epoch: Must be False, since a warm-up is shorter than an epoch; `build_iter_from_epoch` converts epochs.
        last_step: Step to continue from without a state; -1 starts.

    Raises:
        ValueError: A warm-up that is negative or not shorter than the run, milestones that do not ascend from above 0,
            ratios outside [0, 1], or epochs that are not converted.
    """

    factor = staticmethod(warmup_steps)

    def __init__(
        self,
        optimizer: BaseOptimWrapper | Optimizer,
        *,
        milestones: Sequence[int],
        end: int,
        gamma: float = 0.1,
        warmup: int = 0,
        start_ratio: float = 1e-3,
        by_epoch: bool = False,
        last_step: int = -1,
    ) -> None:
        if by_epoch:
            raise ValueError("WarmupStepLR counts updates: add convert_to_iter_based=True, or set by_epoch=False")
        if list(milestones) != sorted({m for m in milestones if m > 0}):
            raise ValueError(f"milestones must ascend and be above 0, got {list(milestones)}")
        _check_warmup(warmup, end, "updates")
        _check_ratios(gamma=gamma, start_ratio=start_ratio)
        shape = {"warmup": warmup, "milestones": list(milestones), "gamma": gamma, "start_ratio": start_ratio}
        super().__init__(optimizer, shape, by_epoch=False, last_step=last_step)

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer: BaseOptimWrapper | Optimizer,
        *,
        epoch_length: int,
        milestones: Sequence[int],
        end: int,
        by_epoch: bool = True,
        **options: Any,
    ) -> WarmupStepLR:
        """The schedule with its milestones in epochs; mmengine calls this for `convert_to_iter_based=True`.

        Args:
            optimizer: Optimiser or optim wrapper.
            epoch_length: Batches per epoch.
            milestones: Epochs after which the rate falls.
            end: Epochs of the run.
            by_epoch: Must be True.
            **options: Passed on; the warm-up is in updates already.
        """
        updates = _updates_per_epoch(optimizer, epoch_length, by_epoch)
        return cls(optimizer, milestones=[m * updates for m in milestones], end=end * updates, **options)


@PARAM_SCHEDULERS.register_module()
class WarmupPolyLR(ShapedLR):
    """`warmup_poly` for every parameter group, each scaled from its own rate; for runs counted in iterations.

    In a config: `by_epoch=False`, so that the Runner fills in the iterations of the run.

    Args:
        optimizer: Optimiser or optim wrapper.
        end: Iterations of the whole run, which are fewer updates where batches accumulate; the Runner fills it in.
        power: Exponent; 1 falls in a line.
        warmup: Updates of the warm-up.
        start_ratio: Factor of the warm-up at the first update.
        min_ratio: Share of the learning rate at the end.
        by_epoch: Must be False.
        last_step: Step to continue from without a state; -1 starts.

    Raises:
        ValueError: A warm-up that is negative or not shorter than the run, a power that is not positive, ratios outside
            [0, 1], or epochs.
    """

    factor = staticmethod(warmup_poly)

    def __init__(
        self,
        optimizer: BaseOptimWrapper | Optimizer,
        *,
        end: int,
        power: float = 1.0,
        warmup: int = 0,
        start_ratio: float = 1e-6,
        min_ratio: float = 0.0,
        by_epoch: bool = False,
        last_step: int = -1,
    ) -> None:
        if by_epoch:
            raise ValueError("WarmupPolyLR counts iterations: set by_epoch=False")
        if power <= 0:
            raise ValueError(f"power must be above 0, got {power}")
        total = -(-end // _accumulated(optimizer))
        _check_warmup(warmup, total, "updates")
        _check_ratios(start_ratio=start_ratio, min_ratio=min_ratio)
        shape = {"warmup": warmup, "total": total, "power": power, "start_ratio": start_ratio, "min_ratio": min_ratio}
        super().__init__(optimizer, shape, by_epoch=False, last_step=last_step)


def _accumulated(optimizer: BaseOptimWrapper | Optimizer) -> int:
    """Batches per update."""
    return int(getattr(optimizer, "_accumulative_counts", 1))


def _updates_per_epoch(optimizer: BaseOptimWrapper | Optimizer, epoch_length: int, by_epoch: bool) -> int:
    if not by_epoch:
        raise ValueError("convert_to_iter_based=True converts epochs: it needs by_epoch=True")
    return -(-epoch_length // _accumulated(optimizer))


def _check_warmup(warmup: float, end: float, unit: str) -> None:
    if not 0 <= warmup < end:
        raise ValueError(
            f"the warm-up ({warmup} {unit}) must be shorter than the run ({end} {unit}) and not negative: "
            "set param_scheduler.0.warmup, or train longer"
        )


def _check_ratios(**ratios: float) -> None:
    for name, ratio in ratios.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {ratio}")
