"""Hooks that fit mmengine's loop to our contracts: moving average, schedules per update, no waiting for the device."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, ParamSchedulerHook, RuntimeInfoHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


def just_updated(runner: Runner) -> bool:
    """Whether the training step that has just run changed the parameters (False while gradients accumulate)."""
    return bool(runner.optim_wrapper.should_update())


@HOOKS.register_module()
class EMA(EMAHook):
    """A moving average of the weights, updated after each update; it is what is validated and saved.

    The first update copies the model. Buffers are copied. In a checkpoint `state_dict` holds the average, the raw
    weights are under `ema_state_dict`.

    Args:
        decay: Share of the average that an update keeps, below 1 (published: 0.9999 to 0.99996).
        warmup: Ramp the decay up as (1 + t) / (`warmup` + t) over updates t; 0 uses `decay` at once.

    Raises:
        ValueError: A decay outside [0.5, 1), or a negative warm-up.
    """

    def __init__(self, decay: float = 0.9999, warmup: int = 0) -> None:
        if not 0.5 <= decay < 1:
            raise ValueError(f"decay must lie in [0.5, 1), got {decay}")
        if warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {warmup}")
        super().__init__(ema_type="ExponentialMovingAverage", strict_load=True, momentum=1 - decay)
        self.decay, self.warmup = decay, warmup

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Average after an update, not after every accumulated batch."""
        if not just_updated(runner):
            return
        if self.warmup:
            steps = int(self.ema_model.steps)
            self.ema_model.momentum = 1 - min(self.decay, (1 + steps) / (self.warmup + steps))
        super().after_train_iter(runner, batch_idx, data_batch, outputs)


@HOOKS.register_module()
class UpdateScheduler(ParamSchedulerHook):
    """Advances schedules once per update, so that accumulated batches do not shorten them."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance the schedules that count updates."""
        if just_updated(runner):
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


@HOOKS.register_module()
class RunInfo(RuntimeInfoHook):
    """mmengine's record of where the run stands, without its copy of every loss to the host."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Nothing: `vizoo.train.log.RunLog` reads the losses, one window at a time."""
