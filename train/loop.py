"""The training loop: mmengine's, with one random stream per epoch and a start in the middle of one."""

from __future__ import annotations

import random
import sys
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from .checkpoint import restore_rng, rng_state
from .hooks import average_buffers


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed Python's, numpy's and torch's generators for one epoch of one process.

    Data loaders draw the seeds of their workers from torch's generator, so workers differ from each other, from epoch
    to epoch and from process to process, and an epoch draws the same whether or not the run was interrupted before it.
    """
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 -- timm's augmentations draw from the global generator
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def init_worker(worker_id: int) -> None:
    """Leave a data loader's worker with torch's own seeding, and OpenCV with one thread.

    mmengine's default would give a worker the same seed in every epoch.
    """
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def batch_size_of(dataloader: Any) -> int:
    """Images in a batch of one process; a loader that is given batches of indices keeps the number in their sampler."""
    return int(getattr(dataloader.batch_sampler, "batch_size", dataloader.batch_size))


def _classes(dataset: Any) -> list[str] | None:
    """Class names that a data set states; None where it states none."""
    stated = getattr(dataset, "metainfo", {}).get("classes")
    return None if stated is None else list(stated)


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop that resumes exactly.

    Each epoch has its own random stream. A run resumed inside an epoch loads the batches it has already seen without
    training on them (their augmentations advance the workers' streams), then restores the generators and goes on.
    An epoch ends with an update, whatever the number of accumulated batches, so no gradient is carried into the next.

    Args:
        runner: The Runner.
        dataloader: The training data loader, or its config.
        max_epochs: Epochs to train.
        val_begin: First epoch after which to validate.
        val_interval: Validate after every so many epochs, and after the last.

    Raises:
        ValueError: No epochs, or a data loader without a batch.
    """

    resumed_rng: dict[str, Any] | None = None

    def __init__(
        self, runner: Any, dataloader: Any, max_epochs: int, val_begin: int = 1, val_interval: int = 1
    ) -> None:
        if max_epochs < 1:
            raise ValueError(f"train_cfg.max_epochs must be 1 or more, got {max_epochs}")
        super().__init__(runner, dataloader, max_epochs, val_begin, val_interval)
        if len(self.dataloader) == 0:
            raise ValueError(
                f"the training set has {len(self.dataloader.dataset)} images, fewer than one batch of "
                f"{batch_size_of(self.dataloader)}: set train_dataloader.batch_size to less"
            )

    def run(self) -> nn.Module:
        """Train, after a look at whether data and model fit together."""
        self._check_classes()
        return super().run()

    def _check_classes(self) -> None:
        """Raise where the sets have other classes than each other or than the model."""
        mine = _classes(self.dataloader.dataset)
        model = getattr(self.runner.model, "module", self.runner.model)
        # A classifier's classes are its backbone's; the backbone of a detector or segmenter has none.
        owner = "model" if hasattr(model, "num_classes") else "model.backbone"
        outputs = getattr(model if owner == "model" else getattr(model, "backbone", None), "num_classes", None)
        if mine is not None and outputs is not None and len(mine) != outputs:
            raise ValueError(
                f"the training set has {len(mine)} classes, the model {outputs}: set {owner}.num_classes={len(mine)}"
            )
        theirs = _classes(self.runner.val_dataloader.dataset) if self.runner.val_loop is not None else None
        if mine is not None and theirs is not None and mine != theirs:
            differing = sorted(set(mine) ^ set(theirs))[:10] or ["(their order)"]
            raise ValueError(f"training and validation set have different classes: {', '.join(differing)}")

    def run_epoch(self) -> None:
        """Train on every batch of the epoch that the run has not seen yet."""
        runner = self.runner
        runner.call_hook("before_train_epoch")
        runner.model.train()
        seed_epoch(runner.seed, self._epoch, runner.rank)
        seen = self._batches_seen()
        self._count_updates(seen)
        batches = iter(self.dataloader)
        for _ in range(seen):
            next(batches)
        if seen and self.resumed_rng is not None:
            restore_rng(self.resumed_rng)
        self.resumed_rng = None
        for index, batch in enumerate(islice(batches, self._max_iters - self._iter), start=seen):
            self.run_iter(index, batch)
        average_buffers(runner)
        runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _count_updates(self, seen: int) -> None:
        """Let the last update of the epoch take the batches that are left."""
        self.runner.optim_wrapper.initialize_count_status(self.runner.model, seen, len(self.dataloader))

    def _batches_seen(self) -> int:
        """Batches of the present epoch that a resumed run has behind it."""
        seen = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= seen <= len(self.dataloader):
            raise ValueError(
                f"the checkpoint stands at iteration {self._iter} in epoch {self._epoch + 1}, but an epoch has "
                f"{len(self.dataloader)} batches now: resume with the data, batch size and processes it was made with"
            )
        return seen


@LOOPS.register_module()
class IterLoop(EpochLoop):
    """`EpochLoop` for a number of iterations: the data are passed over as often as these take, the last time in part.

    Validation may come inside a pass; it leaves the random numbers of training as they are. Accumulated batches go on
    from one pass to the next; the last update takes what is left.

    Args:
        runner: The Runner.
        dataloader: The training data loader, or its config.
        max_iters: Batches to train on.
        val_begin: First iteration after which to validate.
        val_interval: Validate after every so many iterations, and after the last.

    Raises:
        ValueError: No iterations, or a data loader without a batch.
    """

    def __init__(
        self, runner: Any, dataloader: Any, max_iters: int, val_begin: int = 1, val_interval: int = 1000
    ) -> None:
        if max_iters < 1:
            raise ValueError(f"train_cfg.max_iters must be 1 or more, got {max_iters}")
        super().__init__(runner, dataloader, 1, val_begin, val_interval)
        self._max_epochs = -(-max_iters // len(self.dataloader))
        self._max_iters = max_iters

    def run(self) -> nn.Module:
        """Train, after a look at whether data and model fit together."""
        self._check_classes()
        self.runner.call_hook("before_train")
        while self._iter < self._max_iters and not self.stop_training:
            self.run_epoch()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on a batch; validate where the iteration says so."""
        super().run_iter(idx, data_batch)
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        if due and self._iter >= self.val_begin and self.runner.val_loop is not None:
            self._validate()

    def _validate(self) -> None:
        # A run resumed from a checkpoint of this iteration does not validate again: its numbers must be the same.
        state = rng_state()
        average_buffers(self.runner)
        self.runner.val_loop.run()
        self.runner.model.train()
        restore_rng(state)

    def _count_updates(self, seen: int) -> None:
        """Nothing: mmengine's Runner starts counting once for the whole run."""
