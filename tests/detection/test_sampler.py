"""Batches of images of like shape: every index once, equal counts, the same again after a resume."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import DataLoader, Dataset, Subset

from vizoo.train.detection.sampler import AspectBatches


class Shapes(Dataset[int]):
    """Indices with sizes: every third is tall."""

    def __init__(self, count: int) -> None:
        self.sizes = np.array([(20, 10) if index % 3 == 0 else (10, 20) for index in range(count)])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> int:
        return index


class Share(DefaultSampler):
    """What mmengine's sampler gives one of several processes."""

    def __init__(self, dataset: Any, rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        super().__init__(dataset, shuffle=shuffle, seed=3)
        self.rank, self.world_size = rank, world
        self.num_samples = -(-len(dataset) // world)
        self.total_size = self.num_samples * world


def batches(count: int, size: int, epoch: int = 0, rank: int = 0, world: int = 1, **options: Any) -> list[list[int]]:
    sampler = Share(Shapes(count), rank, world)
    sampler.set_epoch(epoch)
    made = AspectBatches(sampler, size, **options)
    found = list(made)
    assert len(found) == len(made)
    return found


def mixed(found: list[list[int]]) -> int:
    return sum(len({index % 3 == 0 for index in batch}) > 1 for batch in found)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 13, 30, 31])
def test_every_index_once_and_one_mixed_batch_at_most(count: int, size: int) -> None:
    found = batches(count, size, drop_last=False)
    assert sorted(index for batch in found for index in batch) == list(range(count))
    assert mixed(found) <= 1
    full = batches(count, size)
    assert len(full) == count // size
    assert all(len(batch) == size for batch in full)
    assert full == found[: len(full)]


def test_order_follows_the_sampler() -> None:
    sampler = Share(Shapes(30), shuffle=False)
    assert list(AspectBatches(sampler, 2))[:4] == [[1, 2], [0, 3], [4, 5], [7, 8]]


def test_epochs_differ_and_repeat() -> None:
    assert batches(40, 2, epoch=1) == batches(40, 2, epoch=1)
    assert batches(40, 2, epoch=1) != batches(40, 2, epoch=2)


def test_processes_get_equally_many_batches_and_together_all_images() -> None:
    parts = [batches(41, 3, rank=rank, world=4, drop_last=False) for rank in range(4)]
    assert {len(part) for part in parts} == {4}
    seen = Counter(index for part in parts for batch in part for index in batch)
    assert set(seen) == set(range(41))
    assert sum(seen.values()) == 44, "the sampler repeats three"


def test_an_interrupted_epoch_goes_on_with_the_batches_not_seen() -> None:
    """The training loop draws the seen batches again and leaves them, so a loader must give the same ones."""

    def loader() -> Any:
        sampler = Share(Shapes(24))
        made = DataLoader(Shapes(24), batch_sampler=AspectBatches(sampler, 2))
        made.batch_sampler.sampler.set_epoch(5)
        return iter(made)

    whole = torch.stack(list(loader()))
    resumed = loader()
    for _ in range(4):
        next(resumed)
    assert torch.equal(torch.stack(list(resumed)), whole[4:])


def test_mmengine_builds_it_and_subsets_work() -> None:
    data = Subset(Shapes(30), list(range(0, 30, 2)))
    sampler = DefaultSampler(data, shuffle=False, seed=0)
    config = {"type": AspectBatches, "drop_last": False}
    made = DATA_SAMPLERS.build(config, default_args={"sampler": sampler, "batch_size": 2})
    found = [[2 * index for index in batch] for batch in made]
    assert mixed(found) <= 1
    assert len(found) == 8


def test_refusals() -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        AspectBatches(Share(Shapes(3)), 0)
    with pytest.raises(TypeError, match=r"needs a data set with `sizes` .*, list has none"):
        AspectBatches(DefaultSampler([1, 2], seed=0), 2)
