"""Hooks that fit mmengine's loop to our contracts: moving average, schedules per update, no waiting for the device."""

from __future__ import annotations

from typing import Any

from mmengine.dist import all_reduce_params, is_distributed
from mmengine.hooks import EMAHook, ParamSchedulerHook, RuntimeInfoHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

_AVERAGED = ("running_mean", "running_var")


def just_updated(runner: Runner) -> bool:
    """Whether the training step that has just run changed the parameters (False while gradients accumulate)."""
    return bool(runner.optim_wrapper.should_update())


def average_buffers(runner: Runner) -> None:
    """Give every process the mean of all processes' batch norm statistics, before they are read or saved.

    Each process normalises by its own images and keeps its own statistics, unless the norms are joined (`sync_bn`).
    """
    if not is_distributed():
        return
    averages = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
    for model in (runner.model, *averages):
        all_reduce_params(_statistics(model), op="mean")


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm))
    return [norm.get_buffer(name) for norm in norms if norm.track_running_stats for name in _AVERAGED]


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
