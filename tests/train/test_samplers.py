"""Samplers: who sees which image how often and at which size, and that an epoch can be dealt out anew."""

from __future__ import annotations

from collections import Counter

import pytest
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import SequentialSampler

from vizoo.train.datasets import SizedIndex
from vizoo.train.samplers import MultiScaleBatches, RepeatedAugmentation


def dealt(count: int, processes: int, repeats: int = 3, epoch: int = 0) -> list[list[int]]:
    """What each process reads."""
    found = []
    for rank in range(processes):
        sampler = RepeatedAugmentation(range(count), repeats, seed=5)
        sampler.rank, sampler.world_size = rank, processes
        sampler.num_samples = -(-count // processes)
        sampler.total_size = sampler.num_samples * processes
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


def test_an_epoch_shows_a_third_of_the_images_three_times() -> None:
    (read,) = dealt(300, 1)
    assert len(read) == 300
    assert set(Counter(read).values()) == {3}
    assert all(len(set(read[i : i + 3])) == 1 for i in range(0, 300, 3))


def test_the_copies_of_an_image_meet_in_one_update_of_all_processes() -> None:
    processes = dealt(96, 3)
    for update in zip(*processes, strict=True):
        assert len(set(update)) == 1
    assert len({image for read in processes for image in read}) == 32


def test_epochs_differ_and_the_same_epoch_does_not() -> None:
    assert dealt(60, 2, epoch=3) == dealt(60, 2, epoch=3)
    assert dealt(60, 2, epoch=3) != dealt(60, 2, epoch=4)


def test_a_set_smaller_than_the_processes_gives_each_one_an_image() -> None:
    assert dealt(1, 8) == [[0]] * 8


def test_a_config_builds_it() -> None:
    built = DATA_SAMPLERS.build({"type": RepeatedAugmentation, "dataset": range(9), "seed": 1, "repeats": 2})
    assert isinstance(built, RepeatedAugmentation)
    assert built.repeats == 2


def test_fewer_repeats_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        RepeatedAugmentation(range(3), 0)


def scaled(
    count: int, processes: int, *, base: int | None = 64, epoch: int = 0, seed: int = 5
) -> list[list[list[SizedIndex]]]:
    """Batches of each process."""
    found = []
    for rank in range(processes):
        sampler = DefaultSampler(range(count), seed=seed)
        sampler.rank, sampler.world_size = rank, processes
        sampler.num_samples = -(-count // processes)
        sampler.total_size = sampler.num_samples * processes
        sampler.set_epoch(epoch)
        batches = MultiScaleBatches(sampler, 4, (32, 64, 96), base)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


def shapes(batches: list[list[SizedIndex]]) -> list[tuple[int, int]]:
    """Images and size of each batch."""
    assert all(len({entry.size for entry in batch}) == 1 for batch in batches)
    return [(len(batch), batch[0].size) for batch in batches]


def test_each_size_has_as_many_batches_and_small_ones_hold_more() -> None:
    (batches,) = scaled(260, 1)
    assert Counter(shapes(batches)) == {(16, 32): 10, (4, 64): 11, (4, 96): 11}
    images = [entry.sample for batch in batches for entry in batch]
    assert len(images) == len(set(images)) == 248
    (batches,) = scaled(260, 1, base=None)
    assert Counter(shapes(batches)) == {(4, 32): 21, (4, 64): 22, (4, 96): 22}


def test_processes_have_other_images_of_the_same_sizes() -> None:
    first, second = scaled(250, 2)
    assert shapes(first) == shapes(second)
    assert not {e.sample for batch in first for e in batch} & {e.sample for batch in second for e in batch}


def test_sizes_differ_by_seed_and_epoch_but_the_number_of_batches_does_not() -> None:
    drawn = [scaled(200, 1, epoch=3)[0], scaled(200, 1, epoch=4)[0], scaled(200, 1, epoch=3, seed=6)[0]]
    assert scaled(200, 1, epoch=3)[0] == drawn[0]
    assert len({tuple(shapes(batches)) for batches in drawn}) == 3
    assert len({len(batches) for batches in drawn}) == 1


def test_scaled_batches_refuse_what_they_cannot_deal_out() -> None:
    sampler = DefaultSampler(range(9))
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        MultiScaleBatches(sampler, 0, (32,))
    with pytest.raises(ValueError, match=r"sizes must be different positive numbers, got \(32, 32\)"):
        MultiScaleBatches(sampler, 1, (32, 32))
    with pytest.raises(TypeError, match="which SequentialSampler does not have: take DefaultSampler"):
        MultiScaleBatches(SequentialSampler(range(9)), 1, (32,))
