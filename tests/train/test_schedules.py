"""Schedules: the published numbers, timm's scheduler, and mmengine's own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vizoo.train.schedules import ShapedLR, WarmupCosineLR, WarmupPolyLR, WarmupStepLR, warmup_cosine


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def walk(schedule: ShapedLR, sgd: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    """Rates of each group at updates 0 .. steps - 1."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        schedule.step()
    return found


def rates(warmup: int, total: int, base: float, start: float, minimum: float) -> list[float]:
    shape = {"warmup": warmup, "total": total, "start_ratio": start / base, "min_ratio": minimum / base}
    return [base * warmup_cosine(step, **shape) for step in range(total + 3)]


def test_published_numbers() -> None:
    """Base 1e-3, warm-up 2 from 1e-6, 10 more to 1e-5; then it stays."""
    found = rates(2, 12, 1e-3, 1e-6, 1e-5)
    assert found[:5] == pytest.approx([1e-6, 5.005e-4, 1e-3, 9.75773e-4, 9.05463e-4], abs=1e-8)
    assert found[12:] == pytest.approx([1e-5] * 3)


@pytest.mark.parametrize(("warmup", "total"), [(20, 300), (5, 30), (0, 7), (3, 5)])
def test_equals_timm(warmup: int, total: int) -> None:
    from timm.scheduler import CosineLRScheduler

    sgd = optimizer(1e-3)
    theirs = CosineLRScheduler(
        sgd, total - warmup, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
    )
    expected = []
    for step in range(total + 1):
        theirs.step_update(step)
        expected.append(sgd.param_groups[0]["lr"])
    assert rates(warmup, total, 1e-3, 1e-6, 1e-5)[: total + 1] == pytest.approx(expected, rel=1e-6)


def test_equals_mmengines_pair() -> None:
    from mmengine.optim import CosineAnnealingLR, LinearLR

    warmup, total, base = 20, 300, 1e-3
    sgd = optimizer(base)
    pair = [
        LinearLR(sgd, start_factor=1e-3, begin=0, end=warmup + 1, by_epoch=False),
        CosineAnnealingLR(sgd, T_max=total - warmup, eta_min_ratio=1e-2, begin=warmup, end=total + 1, by_epoch=False),
    ]
    expected = []
    for _ in range(total):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        for schedule in pair:
            schedule.step()
    assert rates(warmup, total, base, 1e-6, 1e-5)[:total] == pytest.approx(expected, rel=1e-6)


def by_mmengine(sgd: torch.optim.Optimizer, schedules: list[Any], steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        for schedule in schedules:
            schedule.step()
    return found


def test_steps_of_the_detectors() -> None:
    """500 updates up from 0.001 of 1e-4; a tenth after epochs 8 and 11 of 12."""
    sgd = optimizer(1e-4)
    schedule = WarmupStepLR.build_iter_from_epoch(sgd, epoch_length=100, milestones=[8, 11], end=12, warmup=500)
    found = [rates[0] for rates in walk(schedule, sgd, 1200)]
    assert found[0] == pytest.approx(1e-7)
    assert found[250] == pytest.approx(1e-7 + 0.999e-4 / 2)
    assert set(found[500:800]) == {1e-4}
    assert found[799:801] + found[1099:1101] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])


def test_steps_equal_mmengines() -> None:
    from mmengine.optim import LinearLR, MultiStepLR

    sgd, other = optimizer(0.02), optimizer(0.02)
    theirs = [
        LinearLR(other, start_factor=0.001, begin=0, end=6, by_epoch=False),
        MultiStepLR(other, milestones=[8, 11], gamma=0.1, by_epoch=False),
    ]
    ours = WarmupStepLR(sgd, milestones=[8, 11], end=12, warmup=5)
    assert [r[0] for r in walk(ours, sgd, 12)] == pytest.approx(by_mmengine(other, theirs, 12), rel=1e-9)


def test_poly_of_the_segmenters() -> None:
    """1500 updates up from 1e-6, multiplied onto a line from 6e-5 to 0 over 160000."""
    sgd = optimizer(6e-5)
    shape = WarmupPolyLR(sgd, end=160_000, power=1.0, warmup=1500, start_ratio=1e-6).shape
    found = [6e-5 * WarmupPolyLR.factor(step, **shape) for step in (0, 750, 1500, 80_000, 160_000, 160_001)]
    half = (1e-6 + (1 - 1e-6) / 2) * 6e-5 * (1 - 750 / 160_000)
    assert found == pytest.approx([6e-11, half, 6e-5 * (1 - 1500 / 160_000), 3e-5, 0.0, 0.0])


def test_poly_equals_mmengines() -> None:
    from mmengine.optim import PolyLR

    sgd, other = optimizer(1e-4), optimizer(1e-4)
    # Theirs reaches the minimum with the last update, ours and that of the published runs would one update later.
    theirs = [PolyLR(other, power=0.9, eta_min=1e-6, begin=0, end=51, by_epoch=False)]
    ours = WarmupPolyLR(sgd, end=50, power=0.9, min_ratio=0.01)
    assert [r[0] for r in walk(ours, sgd, 50)] == pytest.approx(by_mmengine(other, theirs, 50), rel=1e-9)


def test_groups_keep_their_proportions() -> None:
    sgd = optimizer(1e-3, 1e-4)
    schedule = WarmupCosineLR(sgd, warmup=3, end=10, start_ratio=0.0, min_ratio=0.01, by_epoch=False)
    found = walk(schedule, sgd, 12)
    assert [pair[1] for pair in found] == pytest.approx([pair[0] / 10 for pair in found])
    assert found[0] == [0.0, 0.0]
    assert found[3] == pytest.approx([1e-3, 1e-4])
    assert found[-1] == pytest.approx([1e-5, 1e-6])


def test_epochs_become_updates() -> None:
    sgd = optimizer(1.0)
    schedule = WarmupCosineLR.build_iter_from_epoch(sgd, epoch_length=7, warmup=1.5, end=4)
    assert schedule.shape == {"warmup": 10, "total": 28, "start_ratio": 1e-3, "min_ratio": 1e-2}
    assert not schedule.by_epoch


def test_accumulated_batches_are_one_update() -> None:
    from vizoo.train.optim import AutocastOptimWrapper

    optim = AutocastOptimWrapper(optimizer=optimizer(1.0), accumulative_counts=4)
    schedule = WarmupCosineLR.build_iter_from_epoch(optim, epoch_length=7, warmup=1, end=3)
    assert (schedule.shape["warmup"], schedule.shape["total"]) == (2, 6)
    steps = WarmupStepLR.build_iter_from_epoch(optim, epoch_length=7, milestones=[1, 2], end=3)
    assert steps.shape["milestones"] == [2, 4]
    assert WarmupPolyLR(optim, end=21).shape["total"] == 6


SCHEDULES: list[tuple[type[ShapedLR], dict[str, Any]]] = [
    (WarmupCosineLR, {}),
    (WarmupStepLR, {"milestones": [4, 7]}),
    (WarmupPolyLR, {"power": 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), SCHEDULES)
def test_continues_from_its_state(kind: type[ShapedLR], options: dict[str, Any]) -> None:
    options = {"warmup": 3, "end": 10, "by_epoch": False, **options}
    sgd = optimizer(1e-3)
    schedule = kind(sgd, **options)
    expected = walk(schedule, sgd, 10)
    assert len({rates[0] for rates in expected}) > 4
    sgd = optimizer(1e-3)
    schedule = kind(sgd, **options)
    walk(schedule, sgd, 5)
    state, groups = schedule.state_dict(), sgd.state_dict()
    sgd = optimizer(1e-3)
    schedule = kind(sgd, **options)
    sgd.load_state_dict(groups)
    schedule.load_state_dict(state)
    assert walk(schedule, sgd, 5) == expected[5:]


def test_refuses_what_makes_no_schedule() -> None:
    with pytest.raises(ValueError, match=r"warm-up \(20 epochs\) must be shorter than the run \(10 epochs\)"):
        WarmupCosineLR(optimizer(1.0), warmup=20, end=10)
    with pytest.raises(ValueError, match=r"min_ratio must lie in \[0, 1\], got 2"):
        WarmupCosineLR(optimizer(1.0), warmup=1, end=10, min_ratio=2)
    with pytest.raises(ValueError, match="it needs by_epoch=True"):
        WarmupCosineLR.build_iter_from_epoch(optimizer(1.0), epoch_length=1, warmup=1, end=2, by_epoch=False)
    with pytest.raises(ValueError, match=r"warm-up \(500 updates\) must be shorter than the run \(100 updates\)"):
        WarmupStepLR(optimizer(1.0), milestones=[8], end=100, warmup=500)
    with pytest.raises(ValueError, match=r"milestones must ascend and be above 0, got \[11, 8\]"):
        WarmupStepLR(optimizer(1.0), milestones=[11, 8], end=12)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 10"):
        WarmupStepLR(optimizer(1.0), milestones=[8], end=12, gamma=10)
    with pytest.raises(ValueError, match="WarmupStepLR counts updates: add convert_to_iter_based=True"):
        WarmupStepLR(optimizer(1.0), milestones=[8], end=12, by_epoch=True)
    with pytest.raises(ValueError, match="WarmupPolyLR counts iterations: set by_epoch=False"):
        WarmupPolyLR(optimizer(1.0), end=12, by_epoch=True)
    with pytest.raises(ValueError, match="power must be above 0, got 0"):
        WarmupPolyLR(optimizer(1.0), end=12, power=0)
