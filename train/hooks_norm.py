"""Hooks for models that end with batch norms: LayerNorm gives way to them, and last epochs collect their statistics."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from vizoo.backbones.progressive_norm import ProgressiveNorm

from .hooks import just_updated
from .loop import EpochLoop, IterLoop, batch_size_of


@HOOKS.register_module()
class NormSchedule(Hook):
    """Lets LayerNorm give way to batch norm over a number of updates, and says so where a run cannot do that well.

    The norms count their own training steps. This hook sets over how many of them LayerNorm fades, and sees that a step
    is an update, whatever the number of accumulated batches. How far the schedule is follows from the run's updates, so
    a resumed run goes on where it was. A model whose weights come from the end of a schedule (official ones do) stays
    there.

    Args:
        steps: Updates until LayerNorm has no share left, a warm-up of the model's not counted. None keeps the model's
            number, `norm_steps` of its configuration.
        share: The same as a share of the run's updates; 0.8 trains the last fifth with batch norm alone.

    Raises:
        ValueError: Both numbers, no steps, or a share outside (0, 1].
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, steps: int | None = None, share: float | None = None) -> None:
        if steps is not None and share is not None:
            raise ValueError(f"give steps or share, not both; got {steps} and {share}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.steps, self.share = steps, share
        self._norms: list[tuple[ProgressiveNorm, int]] = []  # with their steps
        self._done = 0

    def before_train(self, runner: Runner) -> None:
        """Set every norm to where the run stands.

        Raises:
            ValueError: The model has no progressive norm.
        """
        norms = [module for module in runner.model.modules() if isinstance(module, ProgressiveNorm)]
        if not norms:
            raise ValueError(
                "NormSchedule needs a model with progressive norms, and this has none: leave the hook out, or give "
                "model.backbone.norm_steps, if it is a SLAB"
            )
        if all(norm.finished for norm in norms):
            runner.logger.info("the norms are at the end of their schedule: LayerNorm has no share in this run")
            return
        total, self._done = _updates(runner, runner.max_iters), _updates(runner, runner.iter)
        steps = self.steps if self.share is None else max(1, round(self.share * total))
        self._norms = [(norm, int(norm.total_step) if steps is None else steps) for norm in norms]
        self._set()
        self._report(runner, total)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Take back what earlier batches of the same update have counted."""
        if _accumulated(runner) > 1:
            self._set()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count an update."""
        self._done += just_updated(runner)

    def _set(self) -> None:
        for norm, steps in self._norms:
            norm.set_schedule(steps, self._done)

    def _report(self, runner: Runner, total: int) -> None:
        norm, steps = max(self._norms, key=lambda each: each[1])
        last = norm.warmup + steps
        runner.logger.info(f"LayerNorm fades over {steps} updates; this run has {total}")
        if last > total:
            left = min(1.0, (last - total) / steps)
            runner.logger.warning(
                f"this run has {total} updates, and LayerNorm fades over {last}: at the end it still has {left:.0%} of "
                "each norm's output, which evaluation leaves out. Train longer, or set NormSchedule's share"
            )
        batches = _accumulated(runner)
        if batches > 1:
            images = batch_size_of(runner.train_dataloader)
            runner.logger.warning(
                f"gradients accumulate over {batches} batches: the norms' schedule counts updates, but a batch norm "
                f"takes its statistics from one batch of {images} images, not from all {images * batches} of an update"
            )


@HOOKS.register_module()
class CollectStatistics(Hook):
    """Trains nothing in the last epochs of a run: they collect the statistics of the batch norms.

    Dropped branches and mixed images shift what batch norms see while a model trains, and their statistics trail its
    weights. So the authors of SLAB let ten epochs follow in which weights stay as they are, and the model is in eval
    mode but for its batch norms. A schedule of rates has to end before them. An average of the weights would go on
    towards the last ones; leave this out beside one.

    Args:
        epochs: How many epochs, the last of the run.

    Raises:
        ValueError: None of them.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, epochs: int = 10) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {epochs}")
        self.epochs = epochs

    def before_train(self, runner: Runner) -> None:
        """Look whether epochs are left to train in.

        Raises:
            ValueError: There are none.
        """
        if self.epochs >= runner.max_epochs:
            raise ValueError(
                f"a run of {runner.max_epochs} epochs has none left to train in if the last {self.epochs} collect "
                "statistics: set train_cfg.max_epochs to more, or CollectStatistics' epochs to fewer"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Make an update change nothing but statistics."""
        if runner.epoch < runner.max_epochs - self.epochs:
            return
        runner.model.eval()
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = 0.0


def _accumulated(runner: Runner) -> int:
    """Batches per update."""
    return int(getattr(runner.optim_wrapper, "_accumulative_counts", 1))


def _updates(runner: Runner, iterations: int) -> int:
    """Updates in so many iterations, the last of which ends with one."""
    batches, loop = _accumulated(runner), runner.train_loop
    if isinstance(loop, IterLoop) or not isinstance(loop, EpochLoop):
        return -(-iterations // batches)
    epochs, rest = divmod(iterations, len(loop.dataloader))  # an epoch ends with an update
    return epochs * -(-len(loop.dataloader) // batches) - (-rest // batches)
