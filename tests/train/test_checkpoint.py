"""The last complete checkpoint is always there: errors while saving, a full disk, kill -9 at any moment."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vizoo.train.checkpoint import (
    Checkpoints,
    PlainCheckpoint,
    latest_checkpoint,
    read_checkpoint,
    require_finite,
    restore_rng,
    rng_state,
    write_atomically,
)
from vizoo.train.log import read_log

Run = Callable[..., Path]


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.bin"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        import builtins

        real = builtins.open

        def failing_open(*args: Any, **kwargs: Any) -> Any:
            file = real(*args, **kwargs)

            class Full:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *error: Any) -> None:
                    file.close()

                def write(self, data: bytes) -> None:
                    file.write(data[:1])
                    full()

            return Full()

        monkeypatch.setattr(builtins, "open", failing_open)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(
        OSError, match=r"cannot write .*a\.bin: No space left on device; what was there before is unt"
    ) as e:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_saving_that_fails_half_way_keeps_the_run(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save dies in the third checkpoint; the second is whole, announced, and resumed from."""
    whole = small_run("whole")
    real, calls = torch.save, []

    def dying_save(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if "optimizer" in obj and obj["meta"]["epoch"] == 3:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(obj, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(OSError, match="No space left"):
        small_run("cut")
    monkeypatch.undo()
    found = latest_checkpoint(tmp_path / "cut")
    assert found is not None
    assert found.name == "epoch_2.pth"
    folder = small_run("cut", resume=True)
    assert read_log(folder)[-1]["loss"] == read_log(whole)[-1]["loss"]


def test_contents_are_plain(small_run: Run) -> None:
    folder = small_run("a", "train_cfg.max_epochs=1", "optim_wrapper.dtype=float16")
    for name in ("epoch_1.pth", "best.pth"):
        found = torch.load(folder / name, weights_only=True)
        assert {"meta", "state_dict", "message_hub"} <= found.keys()
    assert "optimizer" not in found
    assert found["meta"]["score"] == pytest.approx(read_log(folder)[-1]["top1"])


def test_plain_checkpoint_serves_any_mmengine_runner() -> None:
    from mmengine.logging import HistoryBuffer

    checkpoint = {
        "message_hub": {
            "log_scalars": {"train/loss": HistoryBuffer([1.0], [1])},
            "runtime_info": {"lr": np.float64(0.5), "name": "x"},
            "resumed_keys": {"train/loss": True},
        }
    }
    PlainCheckpoint().before_save_checkpoint(None, checkpoint)  # type: ignore[arg-type]
    assert checkpoint["message_hub"] == {
        "log_scalars": {},
        "runtime_info": {"lr": 0.5, "name": "x"},
        "resumed_keys": {},
    }


def test_keeps_the_last_few_and_the_best(small_run: Run) -> None:
    folder = small_run("a", "train_cfg.max_epochs=4", "default_hooks.checkpoint.keep=2")
    assert {p.name for p in folder.glob("*.pth")} == {"epoch_3.pth", "epoch_4.pth", "best.pth"}
    assert (folder / "last_checkpoint").read_text() == "epoch_4.pth"
    best = max(r["top1"] for r in read_log(folder) if r["kind"] == "val")
    assert read_checkpoint(folder / "best.pth")["meta"]["score"] == best


def test_a_resumed_run_does_not_forget_its_best(small_run: Run) -> None:
    folder = small_run("a", "train_cfg.max_epochs=1")
    checkpoint = torch.load(folder / "best.pth", weights_only=True)
    checkpoint["meta"]["score"] = 100.0
    torch.save(checkpoint, folder / "best.pth")
    small_run("a", "train_cfg.max_epochs=2", resume=True)
    assert read_checkpoint(folder / "best.pth")["meta"] == checkpoint["meta"]


def test_the_figure_to_be_best_at_must_exist(small_run: Run) -> None:
    with pytest.raises(ValueError, match="no validation figure 'accuracy'; valid: loss, top1"):
        small_run("a", "train_cfg.max_epochs=1", "default_hooks.checkpoint.best=accuracy")


def test_wrong_intervals() -> None:
    with pytest.raises(ValueError, match="keep 1 or more; got 1, 0, 0"):
        Checkpoints(keep=0)


def write_checkpoint(folder: Path, number: int) -> None:
    """What `Checkpoints` does for one checkpoint, on a run whose whole state is its number."""
    from mmengine.runner.checkpoint import save_checkpoint

    class FakeRunner:
        work_dir = str(folder)

        def save_checkpoint(self, out_dir: str, name: str, meta: dict[str, int], **options: Any) -> None:
            state = {"meta": meta, "state_dict": {"w": torch.full((200_000,), float(number))}}
            save_checkpoint(state, f"{out_dir}/{name}", backend_args=options["backend_args"])

    Checkpoints(keep=2)._save(FakeRunner(), f"iter_{number}.pth", epoch=0, iteration=number)


def keep_saving(folder: Path, first: int) -> None:
    for number in range(first, first + 10_000):
        write_checkpoint(folder, number)


def test_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    rng, newest = random.Random(0), 0
    write_checkpoint(tmp_path, 0)
    for _ in range(25):
        process = multiprocessing.get_context("fork").Process(target=keep_saving, args=(tmp_path, newest + 1))
        process.start()
        pointer = (tmp_path / "last_checkpoint").read_text()
        while (tmp_path / "last_checkpoint").read_text() == pointer:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = latest_checkpoint(tmp_path)
        assert found is not None
        announced = tmp_path / (tmp_path / "last_checkpoint").read_text()
        assert found == announced, "the announced checkpoint is there and whole"
        state = read_checkpoint(found)
        assert state["meta"]["iter"] >= newest
        assert (state["state_dict"]["w"] == state["meta"]["iter"]).all()
        newest = state["meta"]["iter"]
    assert newest >= 25


def test_a_killed_run_goes_on_as_if_nothing_had_happened(small_config: Path, small_run: Run, tmp_path: Path) -> None:
    settings = ("train_cfg.max_epochs=9", "default_hooks.checkpoint.iters=1")
    code = (
        "import sys; from vizoo.train.run import *; train(sys.argv[1], sys.argv[3:], work_dir=sys.argv[2], quiet=True)"
    )
    folder = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-c", code, str(small_config), str(folder), *settings])
    while latest_checkpoint(folder) is None or len(read_log(folder)) < 8:
        time.sleep(0.02)
        assert process.poll() is None, "the run must not end by itself"
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = latest_checkpoint(folder)
    assert reached is not None
    small_run("cut", *settings, resume=True)
    small_run("whole", *settings[:1])
    cut, whole = (read_log(tmp_path / name) for name in ("cut", "whole"))
    assert [r["loss"] for r in cut if r["kind"] == "train"] == [r["loss"] for r in whole if r["kind"] == "train"]


def test_latest_falls_back_to_a_whole_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, number)
        time.sleep(0.01)
    (tmp_path / "iter_3.pth").write_bytes((tmp_path / "iter_3.pth").read_bytes()[:1000])
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_2.pth"
    (tmp_path / "last_checkpoint").write_text("iter_99.pth")
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_2.pth"


def test_a_moved_run_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 1)
    (tmp_path / "a").rename(tmp_path / "b")
    assert latest_checkpoint(tmp_path / "b") == tmp_path / "b" / "iter_1.pth"


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("broken_in",))


def test_reading_refuses_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"meta": Evil(), "state_dict": {}}, protocol=2))
    torch.save({"meta": Evil(), "state_dict": {}}, tmp_path / "evil2.pth")
    (tmp_path / "empty.pth").touch()
    for name in ("evil", "evil2", "empty"):
        with pytest.raises(ValueError, match="is not a whole checkpoint of tensors and plain values"):
            read_checkpoint(tmp_path / f"{name}.pth")
    assert not (tmp_path / "broken_in").exists()
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds weights only"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_checkpoint_of_another_model(small_run: Run) -> None:
    small_run("a", "train_cfg.max_epochs=1")
    with pytest.raises(ValueError, match=r"epoch_1\.pth is of another model than this config builds"):
        small_run("a", "model.backbone.embed_dim=16", resume=True)


def test_generators_come_back(tmp_path: Path) -> None:
    random.gauss(0, 1)
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist()  # noqa: NPY002
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.gauss(0, 1), random.random()) == expected[:2]
    assert np.random.randn(3).tolist() == expected[2]  # noqa: NPY002
    assert torch.randn(3).tolist() == expected[3]


def test_weights_that_are_no_numbers() -> None:
    model = nn.Linear(2, 2)
    require_finite(model, "now")
    model.bias.data[0] = float("inf")
    with pytest.raises(FloatingPointError, match="bias is no longer finite after iteration 3: nothing was saved"):
        require_finite(model, "after iteration 3")


def test_what_a_killed_process_left_is_swept(small_run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".epoch_1.pth.123.part").write_bytes(b"x")
    folder = small_run("a", "train_cfg.max_epochs=1")
    assert not list(folder.glob(".*.part"))
