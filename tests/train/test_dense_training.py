"""A detector and a segmenter train by the published recipes on generated shapes, resume exactly, and are tested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.finite import FirstBad
from vizoo.train.log import read_log
from vizoo.train.run import evaluate, train

Runs = dict[str, tuple[Path, str]]
Start = Callable[..., Path]
LAST = {"detector": "epoch_2.pth", "segmenter": "iter_7.pth"}
KINDS = ("detector", "segmenter")


@pytest.fixture
def start(dense_runs: Runs, tmp_path: Path) -> Start:
    """Train: `start("detector", "folder", "key=value", ..., resume=True)` returns the folder."""

    def run(kind: str, folder: str, *settings: str, **options: Any) -> Path:
        config, data = dense_runs[kind]
        return train(config, [data, *settings], work_dir=tmp_path / folder, quiet=True, **options)

    return run


@pytest.fixture(scope="module")
def whole(dense_runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an uninterrupted run of each."""
    root = tmp_path_factory.mktemp("whole")
    return {kind: train(c, [data], work_dir=root / kind, quiet=True) for kind, (c, data) in dense_runs.items()}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_log(folder) if record["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    return {record["iter"]: record["loss"] for record in records(folder, "train")}


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_exactly_inside_an_epoch(whole: dict[str, Path], start: Start, tmp_path: Path, kind: str) -> None:
    """At iteration 3 of 5 an epoch; for the segmenter that is where it has been validated."""
    point = "iter_3.pth"
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(whole[kind] / point, cut)
    (cut / "last_checkpoint").write_text(point)
    (cut / "log.jsonl").write_text((whole[kind] / "log.jsonl").read_text())
    start(kind, "cut", resume=True)
    assert losses(cut) == losses(whole[kind])
    expected, found = (read_checkpoint(folder / LAST[kind])["state_dict"] for folder in (whole[kind], cut))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_lengths_of_the_runs(whole: dict[str, Path]) -> None:
    assert list(losses(whole["detector"])) == list(range(1, 11))
    assert [r["iter"] for r in records(whole["detector"], "val")] == [5, 10]
    assert list(losses(whole["segmenter"])) == list(range(1, 8)), "one pass over the data and a part of a second"
    assert [r["iter"] for r in records(whole["segmenter"], "val")] == [3, 6, 7]
    names = {kind: {path.name for path in folder.glob("*_*.pth")} for kind, folder in whole.items()}
    assert names["detector"] == {"iter_3.pth", "iter_6.pth", "iter_9.pth", "epoch_1.pth", "epoch_2.pth"}
    assert names["segmenter"] == {"iter_3.pth", "iter_6.pth", "iter_7.pth"}


def test_rates_follow_the_images_per_update_and_the_schedule(whole: dict[str, Path]) -> None:
    """2 images are an eighth of the recipe's 16, whether or not a sampler makes the batches."""
    rate = 8e-3 / 8
    found = {kind: {r["iter"]: r["lr"] for r in records(folder, "train")} for kind, folder in whole.items()}
    assert found["detector"][4] == pytest.approx(rate)
    assert found["detector"][6] == pytest.approx(rate / 10)
    assert found["segmenter"][5] == pytest.approx(rate * (1 - 4 / 7))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_figures_of_its_run(
    whole: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole[kind]
    loud = ["default_hooks.logger.quiet=false"]
    found = evaluate(folder / "config.py", folder / LAST[kind], loud, work_dir=tmp_path / "test")
    last = records(folder, "val")[-1]
    figure = {"detector": "mask_AP", "segmenter": "mIoU"}[kind]
    assert figure in found
    assert found == pytest.approx({name: last[name] for name in found})
    best = max(records(folder, "val"), key=lambda r: r[{"detector": "box_AP", "segmenter": "mIoU"}[kind]])
    assert read_checkpoint(folder / "best.pth")["meta"]["iter"] == best["iter"]
    shown = capsys.readouterr().out
    assert f"test  {next(iter(found))} {next(iter(found.values())):.2f} %" in shown
    for place in (folder, tmp_path / "test"):
        rows = json.loads((place / "per_class.json").read_text())["rows"]
        assert len(rows) == {"detector": 6, "segmenter": 7}[kind]
    if kind == "detector":
        assert found["box_AP_large"] == -1
        assert "box_AP_large -" in shown, "no object is so large"
        assert "test set: instances_val.json: 5 images" in shown


def test_what_data_sets_leave_out_is_logged_once(whole: dict[str, Path]) -> None:
    (text,) = (path.read_text() for path in whole["detector"].rglob("*.log"))
    assert text.count("training set: instances_train.json: 10 images") == 1
    assert text.count("validation set: instances_val.json: 5 images") == 1


def test_learns(start: Start) -> None:
    """A segmenter over 25 iterations, with batches accumulated from one pass over the data to the next."""
    settings = ("optim_wrapper.accumulative_counts=2", "iters=25", "train_cfg.val_interval=25", "lr=2e-2")
    folder = start("segmenter", "a", *settings)
    found = list(losses(folder).values())
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    steps = {float(s["step"]) for s in read_checkpoint(folder / "iter_25.pth")["optimizer"]["state"].values()}
    assert steps == {13.0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_loss_is_no_number_is_saved(start: Start, tmp_path: Path, kind: str) -> None:
    settings = ("lr=1e30", "optim_wrapper.clip_grad=None", "param_scheduler=None", "default_hooks.logger.interval=50")
    with pytest.raises(FloatingPointError, match=r"no weights of it were saved; its batch is in .*\.pt \(.*\.jpg, "):
        start(kind, "a", *settings)
    (path,) = (tmp_path / "a").glob("bad_batch_*.pt")
    kept = torch.load(path, weights_only=True)
    assert f"bad_batch_{kept['iteration']}.pt" == path.name
    assert not all(torch.isfinite(torch.tensor(list(kept["losses"].values()))))
    assert [image.dtype for image in kept["batch"]["images"]] == [torch.uint8] * 2
    assert kept["paths"] == [target["path"] for target in kept["batch"]["targets"]]
    assert ("masks" if kind == "detector" else "map") in kept["batch"]["targets"][0]
    assert not list((tmp_path / "a").glob("iter_*.pth"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_tested(dense_runs: Runs, whole: dict[str, Path], kind: str, tmp_path: Path) -> None:
    config, data = dense_runs[kind]
    with pytest.raises(ValueError, match=r"only classifiers have official weights .*: name a checkpoint of the whole"):
        evaluate(config, None, [data], work_dir=tmp_path / "a", quiet=True)
    other = [data, "num_classes=5"]
    with pytest.raises(ValueError, match=r"does not (fit|hold)"):
        evaluate(config, whole[kind] / LAST[kind], other, work_dir=tmp_path / "b", quiet=True)
    wrong = {"detector": "segmenter", "segmenter": "detector"}[kind]
    with pytest.raises(ValueError, match=r"parts|keys of a whole|does not fit"):
        evaluate(config, whole[wrong] / LAST[wrong], [data], work_dir=tmp_path / "c", quiet=True)


def test_iterations_that_are_none(start: Start) -> None:
    with pytest.raises(ValueError, match=r"^train_cfg\.max_iters must be 1 or more, got 0$"):
        start("segmenter", "a", "iters=0")


def test_a_set_smaller_than_a_batch(start: Start) -> None:
    with pytest.raises(ValueError, match=r"10 images, fewer than one batch of 64: set train_dataloader\.batch_size"):
        start("detector", "a", "batch_size=64")


def test_sets_and_models_must_have_the_same_classes(start: Start) -> None:
    with pytest.raises(ValueError, match=r"has 6 classes, the model 80: set model\.num_classes=6"):
        start("detector", "a", "num_classes=80")


@pytest.mark.gpu
def test_a_bad_batch_is_found_on_a_gpu_without_waiting(tmp_path: Path) -> None:
    bad = FirstBad()
    for iteration, loss in enumerate((1.0, float("inf"), float("nan")), start=1):
        images = [torch.full((3, 4, 4), iteration, dtype=torch.uint8)]
        bad.look(iteration, {"images": images}, {"loss": torch.tensor(loss, device="cuda")})
    assert bad.save(tmp_path, 2) == f"its batch is in {tmp_path / 'bad_batch_2.pt'}"
    assert int(torch.load(tmp_path / "bad_batch_2.pt", weights_only=True)["batch"]["images"][0].max()) == 2
