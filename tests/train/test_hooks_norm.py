"""Progressive norms count updates and survive a resume; unfit runs say so; last epochs collect statistics alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vizoo.backbones.progressive_norm import ProgressiveNorm
from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.hooks_norm import CollectStatistics, NormSchedule
from vizoo.train.run import train

EXTRA = """
from vizoo.train.hooks_norm import NormSchedule

custom_hooks.append(dict(type=NormSchedule, steps=8))
model["backbone"].update(name="slab_swin_tiny", linear_window=4, linear_stages=1)
"""


def runner(
    *norms: nn.Module, iteration: int = 0, iterations: int = 100, accumulated: int = 1
) -> tuple[Any, list[str], list[str]]:
    """What the hook reads of a Runner, and the notes and warnings it is given."""
    notes: list[str] = []
    warnings: list[str] = []
    found = SimpleNamespace(
        model=nn.Sequential(*norms),
        iter=iteration,
        max_iters=iterations,
        train_loop=None,
        train_dataloader=SimpleNamespace(batch_sampler=None, batch_size=16),
        optim_wrapper=SimpleNamespace(_accumulative_counts=accumulated),
        logger=SimpleNamespace(info=notes.append, warning=warnings.append),
    )
    return found, notes, warnings


def counters(folder: Path, name: str) -> set[tuple[int, int]]:
    """(iter, total_step) of all norms, in the average and in the raw weights."""
    checkpoint = read_checkpoint(folder / name)
    found = set()
    for state in (checkpoint["state_dict"], checkpoint["ema_state_dict"]):
        paths = [key.removesuffix("total_step") for key in state if key.endswith("total_step")]
        assert paths
        found |= {(int(state[f"{path}iter"]), int(state[f"{path}total_step"])) for path in paths}
    return found


@pytest.fixture
def norm_run(small_config: Path, tmp_path: Path) -> Callable[..., Path]:
    config = small_config.with_name("norms.py")
    config.write_text(small_config.read_text() + EXTRA)

    def run(name: str, *settings: str, **options: Any) -> Path:
        return train(config, settings, work_dir=tmp_path / name, quiet=True, **options)

    return run


@pytest.mark.parametrize(("batches", "left"), [(1, (3, 0)), (2, (5, 2))])
def test_counts_updates_and_resumes(norm_run: Callable[..., Path], tmp_path: Path, batches: int, left: Any) -> None:
    settings = (
        f"optim_wrapper.accumulative_counts={batches}",
        "train_cfg.max_epochs=2",
        "default_hooks.checkpoint.iters=4",
    )
    settings += ("default_hooks.checkpoint.keep=99",)
    whole = norm_run("whole", *settings)
    for epoch, steps in enumerate(left, 1):
        assert counters(whole, f"epoch_{epoch}.pth") == {(steps, 8)}
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(whole / "iter_4.pth", cut)
    (cut / "last_checkpoint").write_text("iter_4.pth")
    norm_run("cut", *settings, resume=True)
    expected, found = (read_checkpoint(folder / "epoch_2.pth")["ema_state_dict"] for folder in (whole, cut))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_sets_the_steps() -> None:
    norm = ProgressiveNorm(4, steps=300, warmup=10)
    for options, steps in (({}, 300), ({"steps": 50}, 50), ({"share": 0.8}, 80)):
        NormSchedule(**options).before_train(runner(norm)[0])
        assert (int(norm.total_step), int(norm.iter), int(norm.warm)) == (steps, steps, 10)
        NormSchedule(**options).before_train(runner(norm, iteration=30)[0])
        assert (int(norm.total_step), int(norm.iter), int(norm.warm)) == (steps, steps - 20, 0)


def test_what_is_finished_stays_so() -> None:
    norm = ProgressiveNorm(4, steps=30)
    norm.set_schedule(30, done=30)
    run, notes, warnings = runner(norm, accumulated=2)
    hook = NormSchedule(steps=50)
    hook.before_train(run)
    hook.before_train_iter(run, 0)
    assert (int(norm.total_step), int(norm.iter)) == (30, 0)
    assert "LayerNorm has no share in this run" in notes[0]
    assert not warnings


def test_warns_of_a_run_that_is_too_short() -> None:
    run, _, warnings = runner(ProgressiveNorm(4, steps=160))
    NormSchedule().before_train(run)
    assert len(warnings) == 1
    assert "this run has 100 updates, and LayerNorm fades over 160: at the end it still has 38% of" in warnings[0]
    run, _, warnings = runner(ProgressiveNorm(4, steps=160))
    NormSchedule(share=1.0).before_train(run)
    assert not warnings


def test_warns_of_small_batches_when_gradients_accumulate() -> None:
    run, notes, warnings = runner(ProgressiveNorm(4, steps=25), accumulated=4)
    NormSchedule().before_train(run)
    assert "fades over 25 updates; this run has 25" in notes[0]
    assert len(warnings) == 1
    assert "from one batch of 16 images, not from all 64 of an update" in warnings[0]


def test_refuses_what_makes_no_schedule() -> None:
    with pytest.raises(ValueError, match=r"give steps or share, not both; got 5 and 0\.5"):
        NormSchedule(steps=5, share=0.5)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        NormSchedule(steps=0)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 1\.5"):
        NormSchedule(share=1.5)
    with pytest.raises(ValueError, match="needs a model with progressive norms, and this has none"):
        NormSchedule().before_train(runner(nn.LayerNorm(4))[0])


def test_last_epochs_collect_statistics_alone(small_config: Path, tmp_path: Path) -> None:
    config = small_config.with_name("statistics.py")
    text = small_config.read_text() + EXTRA.replace("NormSchedule, steps=8", "CollectStatistics, epochs=1")
    config.write_text(text.replace("import NormSchedule", "import CollectStatistics"))
    settings = ("train_cfg.max_epochs=2", "default_hooks.checkpoint.keep=99", "model.backbone.norm_steps=0")
    folder = train(config, settings, work_dir=tmp_path / "run", quiet=True)
    before, after = (read_checkpoint(folder / f"epoch_{i}.pth")["ema_state_dict"] for i in (1, 2))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed - {"steps"} == {key for key in before if "running_" in key}  # the average counts on


def test_collecting_refuses_what_leaves_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="epochs must be 1 or more, got 0"):
        CollectStatistics(epochs=0)
    with pytest.raises(ValueError, match="a run of 3 epochs has none left to train in if the last 10 collect"):
        CollectStatistics().before_train(SimpleNamespace(max_epochs=3))
