"""Repeated augmentation: who sees which image how often, and that an epoch can be dealt out anew."""

from __future__ import annotations

from collections import Counter

import pytest
from mmengine.registry import DATA_SAMPLERS

from vizoo.train.samplers import RepeatedAugmentation


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
