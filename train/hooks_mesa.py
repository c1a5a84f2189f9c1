"""MESA: a loss against what the moving average of the weights predicts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from .checkpoint import unwrap
from .classification import ImageClassifier
from .hooks import EMA


@HOOKS.register_module()
class Mesa(Hook):
    """Lets a classifier also learn what the moving average of its weights predicts, which keeps it in flat minima.

    Source: Du et al., Sharpness-aware training for free, NeurIPS 2022, arXiv 2205.14083. The loss is that of VSSD's
    training code: cross-entropy of the logits against the softmax of the average's, on the same mixed images, the
    average in evaluation mode. It costs a forward pass more for each batch.

    In a config: `custom_hooks = [dict(type=EMA, decay=0.9999), dict(type=Mesa, weight=1.0)]`. To resume, nothing is
    needed but the average, which checkpoints hold.

    Args:
        weight: Factor of this loss.
        start: Share of the run after which it begins.

    Raises:
        ValueError: A weight that is not positive, or a start outside [0, 1).
    """

    _model: ImageClassifier
    _average: nn.Module

    def __init__(self, weight: float = 1.0, start: float = 0.25) -> None:
        if weight <= 0:
            raise ValueError(f"weight must be positive, got {weight}: leave the hook out for none")
        if not 0 <= start < 1:
            raise ValueError(f"start must lie in [0, 1), got {start}")
        self.weight, self.start = weight, start

    def before_train(self, runner: Runner) -> None:
        """Find the average.

        Raises:
            TypeError: The model is no ImageClassifier.
            ValueError: There is no average.
        """
        model = unwrap(runner.model)
        if not isinstance(model, ImageClassifier):
            raise TypeError(f"Mesa is for an ImageClassifier, got {type(model).__name__}")
        averages = [hook for hook in runner.hooks if isinstance(hook, EMA)]
        if not averages:
            raise ValueError(
                "Mesa needs a moving average of the weights beside it: add dict(type=EMA, decay=0.9999) to custom_hooks"
            )
        self._model, self._average = model, averages[0].ema_model.module.backbone.eval()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Add the loss once the run has come so far."""
        if runner.iter >= self.start * runner.max_iters:
            self._model.further_loss = self._loss

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self._model.further_loss = None

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._average(inputs).float().softmax(-1)
        return self.weight * F.cross_entropy(logits.float(), target)
