"""Two processes by torchrun over gloo: the weights of one process with the same global batch, an exact resume, and all
three tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.log import read_log
from vizoo.train.run import evaluate

Run = Callable[..., Path]

# One launch trains all runs, since starting Python twice takes longer than training.
SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
from vizoo.train.run import evaluate, train

config, jobs = sys.argv[1], json.loads(sys.argv[2])
for folder, settings in jobs["runs"].items():
    train(config, settings, work_dir=folder, quiet=True)
cut, settings = jobs["cut"], jobs["runs"][jobs["whole"]]
if os.environ["RANK"] == "0":
    Path(cut).mkdir()
    shutil.copy(Path(jobs["whole"]) / jobs["point"], cut)
train(config, settings, work_dir=cut, quiet=True, resume=True)
found = evaluate(Path(cut) / "config.py", Path(cut) / "best.pth", work_dir=jobs["test"], quiet=True)
if os.environ["RANK"] == "0":
    Path(jobs["test"], "figures.json").write_text(json.dumps(found))
try:
    train(config, jobs["poisoned"], work_dir=jobs["bad"], quiet=True)
except FloatingPointError as error:
    Path(jobs["bad"], f"error_{os.environ['RANK']}.txt").write_text(str(error))
"""
PLAIN = (
    "model.mixup=None",
    "model.backbone.drop_path_rate=0.0",
    "train_dataloader.dataset.noise=0.0",
    "train_cfg.max_epochs=2",
    "custom_hooks=[]",
    "auto_scale_lr.enable=true",
)
HALF = ("train_dataloader.batch_size=4", "val_dataloader.batch_size=4")
OPTIMIZERS = ("SGD", "AdamW")
POINT = "iter_7.pth"
# Image 1 is the second process's, and a checkpoint is due long before the window of losses ends.
POISON = (
    "train_dataloader.dataset.poison=1",
    "train_dataloader.sampler.shuffle=false",
    "default_hooks.logger.interval=50",
    "default_hooks.checkpoint.iters=2",
)


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends its workers; killed, it would leave them behind
        process.communicate()
        raise
    assert process.returncode == 0, errors[-3000:]


def optimized(name: str) -> tuple[str, ...]:
    return (*PLAIN, f"optim_wrapper.optimizer.type=torch.optim.{name}")


@pytest.fixture(scope="module")
def launched(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one launch of two processes: `SGD`, `AdamW`, `whole`, and `cut`, which goes on inside an epoch."""
    root = tmp_path_factory.mktemp("ddp")
    folders = {name: root / name for name in (*OPTIMIZERS, "whole", "cut", "test", "bad")}
    runs: dict[str, Any] = {str(folders[name]): [*optimized(name), *HALF] for name in OPTIMIZERS}
    settings = [*HALF, "default_hooks.checkpoint.iters=7", "default_hooks.checkpoint.keep=99"]
    runs[str(folders["whole"])] = [*settings, "train_dataloader.num_workers=1"]
    jobs = {"runs": runs, **{name: str(folders[name]) for name in ("whole", "cut", "test", "bad")}}
    jobs["poisoned"] = [*PLAIN, *HALF, *POISON]
    script = root / "launch.py"
    script.write_text(SCRIPT)
    torchrun(str(script), str(small_config), json.dumps({**jobs, "point": POINT}))
    return folders


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_one_process(small_run: Run, launched: dict[str, Path], optimizer: str) -> None:
    one, two = small_run("one", *optimized(optimizer)), launched[optimizer]
    expected, found = (read_checkpoint(folder / "epoch_2.pth") for folder in (one, two))
    assert expected["meta"]["iter"] == found["meta"]["iter"] == 10
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, atol=1e-6, rtol=1e-6)
    records = [{(r["kind"], r["iter"]): r for r in read_log(folder)} for folder in (one, two)]
    assert records[0].keys() == records[1].keys(), "one process writes the log"
    for key, record in records[0].items():
        for figure in {"loss", "lr", "top1"} & record.keys():
            assert records[1][key][figure] == pytest.approx(record[figure], abs=1e-5), f"{figure} of {key}"


def test_processes_draw_different_numbers(launched: dict[str, Path]) -> None:
    first, second = read_checkpoint(launched["whole"] / POINT)["rng"]
    assert not torch.equal(first["torch"], second["torch"])


def test_resumes_exactly_inside_an_epoch(launched: dict[str, Path]) -> None:
    """Every process continues with its own random numbers."""
    whole, cut = (read_checkpoint(launched[name] / "epoch_3.pth") for name in ("whole", "cut"))
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(value, cut[part][name]) for name, value in whole[part].items())
    assert any(r["kind"] == "resume" and r["iter"] == 7 for r in read_log(launched["cut"]))


def test_all_stop_at_a_loss_that_is_no_number(launched: dict[str, Path]) -> None:
    """The process whose batch it was saves it."""
    first, second = ((launched["bad"] / f"error_{rank}.txt").read_text() for rank in range(2))
    assert "the loss is nan at iteration 1 " in first
    assert "its batch was another process's, which saves it" in first
    path = launched["bad"] / "bad_batch_1_process_1.pt"
    assert f"its batch is in {path}" in second
    assert torch.load(path, weights_only=True)["batch"]["inputs"][0].isnan().all()
    assert not list(launched["bad"].glob("iter_*.pth"))


def test_evaluation_by_two_processes(launched: dict[str, Path]) -> None:
    """21 images do not divide by two: the repeated one is not counted."""
    figures = json.loads((launched["test"] / "figures.json").read_text())
    best = max((r for r in read_log(launched["cut"]) if r["kind"] == "val"), key=lambda r: r["top1"])
    assert figures["top1"] == pytest.approx(best["top1"])
    assert sum(map(sum, json.loads((launched["test"] / "confusion.json").read_text())["matrix"])) == 21


# Each process leaves what it has at the end, so that they can be compared.
DENSE = """
import json, os, sys
import torch
from vizoo.train import run
from vizoo.train.checkpoint import unwrap

ends = []
leave = run.Trainer.train
run.Trainer.train = lambda self: (leave(self), ends.append(unwrap(self.model).state_dict()))[0]
for folder, (config, settings) in json.loads(sys.argv[1]).items():
    run.train(config, settings, work_dir=folder, quiet=True)
    torch.save(ends.pop(), os.path.join(folder, f"end_{os.environ['RANK']}.pt"))
"""


@pytest.fixture(scope="module")
def dense_launched(dense_runs: dict[str, tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector and a segmenter trained by two processes of one launch: 10 scenes are 2 batches of 2 for each."""
    root = tmp_path_factory.mktemp("dense_ddp")
    (root / "launch.py").write_text(DENSE)
    length = {"detector": "epochs=2", "segmenter": "iters=3"}
    jobs = {str(root / kind): (str(config), [data, length[kind]]) for kind, (config, data) in dense_runs.items()}
    torchrun(str(root / "launch.py"), json.dumps(jobs))
    return root


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_dense_models_are_the_same_in_all_processes(dense_launched: Path, kind: str) -> None:
    """Parameters are, since gradients are averaged; statistics of batch norms, since they are, too."""
    ends = [torch.load(dense_launched / kind / f"end_{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    moved = [name for name, value in ends[0].items() if name.endswith("running_mean") and value.abs().max() > 0]
    assert bool(moved) == (kind == "segmenter")
    assert (
        len([r for r in read_log(dense_launched / kind) if r["kind"] == "train"])
        == {"detector": 4, "segmenter": 3}[kind]
    )


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_dense_figures_of_two_processes_are_those_of_one(dense_launched: Path, kind: str, tmp_path: Path) -> None:
    """5 images do not divide by two, and the last one's statistics are the saved ones."""
    folder = dense_launched / kind
    (newest,) = {(folder / "last_checkpoint").read_text().strip()}
    found = evaluate(folder / "config.py", folder / newest, work_dir=tmp_path / "test", quiet=True)
    last = [r for r in read_log(folder) if r["kind"] == "val"][-1]
    assert found == pytest.approx({name: last[name] for name in found}, abs=1e-6)
