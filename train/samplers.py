"""In what order, and how often, a data set is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from .datasets import SizedIndex

_MULTIPLE = 8


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


@DATA_SAMPLERS.register_module()
class MultiScaleBatches(Sampler[list[SizedIndex]]):
    """Gives each batch a size of its own, the same in all processes; the data set's transform takes it by `at(size)`.

    Source: Mehta and Rastegari, MobileViT, ICLR 2022, arXiv 2110.02178. Which images, and whose, the sampler inside
    says; sizes are drawn by its seed and epoch, so that the same epoch gives the same batches, as resuming inside one
    needs. The published samplers draw each size independently. Here each is drawn as often as the others, in random
    order, so that all epochs have the same number of batches although these differ in length; an epoch leaves out the
    few images that are too few for a further batch.

    In a config: `batch_sampler=dict(type=MultiScaleBatches, sizes=(160, 192, 224), base=224)` beside `batch_size` and
    `sampler`, and no `drop_last`.

    Args:
        sampler: Gives the indices; mmengine's `DefaultSampler` or one like it.
        batch_size: Images in a batch, on each process.
        sizes: Sides of the square images, in pixels.
        base: Batches of smaller images than this side hold more, a multiple of 8, of as many pixels as `batch_size`
            images of it; larger ones do not hold fewer. None: all hold `batch_size`.

    Raises:
        ValueError: A batch size below 1, or sizes that are none, not positive or not different.
        TypeError: The sampler has no seed and epoch.
    """

    def __init__(self, sampler: Any, batch_size: int, sizes: Sequence[int], base: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes must be different positive numbers, got {tuple(sizes)}")
        if not (hasattr(sampler, "seed") and hasattr(sampler, "epoch")):
            raise TypeError(
                f"sizes are drawn by the sampler's seed and epoch, which {type(sampler).__name__} does not have: take "
                "DefaultSampler or RepeatedAugmentation"
            )
        self.sampler, self.batch_size = sampler, batch_size
        # The first ones, of the fewest images, make up the last incomplete round of an epoch.
        self.sizes = sorted(sizes, reverse=True)
        self.counts = [_count(size, batch_size, base) for size in self.sizes]

    def __len__(self) -> int:
        rounds, left = divmod(len(self.sampler), sum(self.counts))
        further = np.cumsum(self.counts) <= left
        return rounds * len(self.sizes) + int(further.sum())

    def __iter__(self) -> Iterator[list[SizedIndex]]:
        indices = iter(self.sampler)
        order = np.random.default_rng([self.sampler.seed, self.sampler.epoch]).permutation(len(self))
        for place in order % len(self.sizes):
            size = self.sizes[place]
            yield [SizedIndex(index, size) for index in islice(indices, self.counts[place])]


def _count(size: int, batch_size: int, base: int | None) -> int:
    """Images in a batch of a size."""
    if base is None or size >= base:
        return batch_size
    images = batch_size * base**2 / size**2
    return max(batch_size, int(images + _MULTIPLE / 2) // _MULTIPLE * _MULTIPLE)
