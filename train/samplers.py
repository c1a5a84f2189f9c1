"""In what order, and how often, a data set is read."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class RepeatedAugmentation(DefaultSampler):
    """Shows some images several times in an epoch, each time augmented anew, and the others not at all.

    Source: Hoffer et al., Augment your batch, CVPR 2020, arXiv 1901.09335; Berman et al., MultiGrain, 2019, arXiv
    1902.05509; as DeiT deals them out: the copies of an image stand side by side in the order of all processes
    together, so that they meet in one update, and an epoch is as long as the data set.

    In a config: `sampler=dict(type=RepeatedAugmentation)` in place of `DefaultSampler`.

    Args:
        dataset: What is read.
        repeats: How often an image is shown.
        seed: Of the order, which is another one in each epoch; None takes one that all processes agree on.

    Raises:
        ValueError: Fewer repeats than 1.
    """

    def __init__(self, dataset: Sized, repeats: int = 3, *, seed: int | None = None) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {repeats}")
        super().__init__(dataset, shuffle=True, seed=seed)
        self.repeats = repeats

    def __iter__(self) -> Iterator[Any]:
        count = len(self.dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        places = torch.arange(self.rank, self.total_size, self.world_size)
        return iter(order[places // self.repeats % count].tolist())
