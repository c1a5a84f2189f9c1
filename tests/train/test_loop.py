"""The loop as a whole: it learns, repeats itself, resumes exactly, accumulates, and stops clearly when it must."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.train.checkpoint import latest_checkpoint, read_checkpoint
from vizoo.train.classification import ImageClassifier
from vizoo.train.log import read_log
from vizoo.train.loop import seed_epoch
from vizoo.train.progress import ProgressLine, duration
from vizoo.train.run import evaluate, holds_run, train
from vizoo.train.trainer import pick_device

Run = Callable[..., Path]
TINY = {
    "name": "swin_tiny_patch4_window7_224",
    "num_classes": 4,
    "img_size": 32,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_size": 4,
}


def losses(folder: Path) -> dict[int, float]:
    return {r["iter"]: r["loss"] for r in read_log(folder) if r["kind"] == "train"}


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(folder / name)
    return {**checkpoint["state_dict"], **{f"raw.{k}": v for k, v in checkpoint["ema_state_dict"].items()}}


def test_overfits_one_batch() -> None:
    model = ImageClassifier(TINY, label_smoothing=0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(images, labels, mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_classifier_modes() -> None:
    model = ImageClassifier(TINY, label_smoothing=0.1).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 3])
    logits = model(images)
    assert logits.shape == (3, 4)
    (sample,) = model(images, labels, mode="predict")
    torch.testing.assert_close(sample["logits"], logits)
    assert sample["label"] is labels
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(model(images, labels, mode="loss")["loss"], expected)


def test_mixup_is_for_training_only() -> None:
    def swap(inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, nn.functional.one_hot((label + 1) % 4, 4).float()

    model = ImageClassifier({**TINY, "drop_path_rate": 0.0}, mixup=swap)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    logits = model(images)
    loss = model(images, labels, mode="loss")["loss"]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, (labels + 1) % 4))
    loss = model.eval()(images, labels, mode="loss")["loss"]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))


def test_classifier_refuses_what_it_cannot_take() -> None:
    model = ImageClassifier(TINY)
    with pytest.raises(ValueError, match=r"takes 3 channels, the images have 1: set model\.backbone\.in_chans=1"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), got shape \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="mode must be one of loss, predict, tensor, got 'train'"):
        model(torch.randn(1, 3, 32, 32), mode="train")
    with pytest.raises(ValueError, match="needs the labels"):
        model(torch.randn(1, 3, 32, 32), mode="loss")
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        ImageClassifier(TINY, label_smoothing=1.0)


def test_same_seed_same_run(small_run: Run) -> None:
    first = losses(small_run("a", "train_cfg.max_epochs=2"))
    assert len(first) == 10
    assert losses(small_run("b", "train_cfg.max_epochs=2")) == first
    assert losses(small_run("c", "train_cfg.max_epochs=2", seed=1)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly(small_run: Run, tmp_path: Path, workers: int) -> None:
    """At the end of an epoch and inside one; with mixup, drop path, average, schedule, accumulation."""
    settings = (
        f"train_dataloader.num_workers={workers}",
        "optim_wrapper.accumulative_counts=2",
        "default_hooks.checkpoint.iters=4",
        "default_hooks.checkpoint.keep=99",
    )
    whole = small_run("whole", *settings)
    assert len(losses(whole)) == 15
    for point in ("epoch_1.pth", "iter_4.pth", "iter_9.pth"):
        cut = tmp_path / point.removesuffix(".pth")
        cut.mkdir()
        shutil.copy(whole / point, cut)
        (cut / "last_checkpoint").write_text(point)
        (cut / "log.jsonl").write_text((whole / "log.jsonl").read_text())
        small_run(cut.name, *settings, resume=True)
        assert losses(cut) == losses(whole)
        assert [r["kind"] for r in read_log(cut)].count("resume") == 1
        expected, found = weights(whole, "epoch_3.pth"), weights(cut, "epoch_3.pth")
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_epochs_draw_their_own_numbers() -> None:
    drawn = []
    for epoch, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        seed_epoch(7, epoch, rank)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_epochs_see_different_noise(small_config: Path, workers: int) -> None:
    from mmengine.runner import Runner

    from vizoo.train.settings import load_config

    config = load_config(small_config, [f"train_dataloader.num_workers={workers}"]).train_dataloader
    config.sampler.shuffle = False
    loader = Runner.build_dataloader(config, seed=0)
    seen = []
    for epoch in range(2):
        seed_epoch(0, epoch)
        seen += [
            (batch["inputs"] - loader.dataset.base[8 * i : 8 * i + 8]).mean().item() for i, batch in enumerate(loader)
        ]
    assert len({round(value, 4) for value in seen}) == len(seen)


def test_accumulated_batches_equal_a_large_one(small_run: Run) -> None:
    plain = ("model.mixup=None", "model.backbone.drop_path_rate=0.0", "train_dataloader.dataset.noise=0.0")
    plain += (
        "optim_wrapper.optimizer.type=torch.optim.SGD",
        "optim_wrapper.optimizer.lr=0.1",
        "train_cfg.max_epochs=2",
    )
    large = small_run("large", *plain, "train_dataloader.batch_size=20")
    parts = small_run("parts", *plain, "train_dataloader.batch_size=5", "optim_wrapper.accumulative_counts=4")
    expected, found = weights(large, "epoch_2.pth"), weights(parts, "epoch_2.pth")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6)


def test_an_epoch_ends_with_an_update(small_run: Run) -> None:
    folder = small_run("a", "optim_wrapper.accumulative_counts=2", "train_cfg.max_epochs=2")
    steps = {float(s["step"]) for s in read_checkpoint(folder / "epoch_2.pth")["optimizer"]["state"].values()}
    assert steps == {6.0}, "5 batches in pairs are 3 updates per epoch"


def test_learning_rate_scales_with_the_global_batch(small_run: Run) -> None:
    settings = ("auto_scale_lr.enable=true", "param_scheduler=None", "train_cfg.max_epochs=1")
    rate = read_log(small_run("a", *settings, "optim_wrapper.accumulative_counts=2"))[1]["lr"]
    assert rate == pytest.approx(1e-3 * 8 * 2 / 8)


def test_loss_that_is_no_number_stops_the_run(small_run: Run, tmp_path: Path) -> None:
    """Whether the window is full or a checkpoint is due first, the error names the very iteration."""
    settings = ("train_dataloader.dataset.poison=0", "train_dataloader.sampler.shuffle=false")
    expected = (
        r"the loss is nan at iteration 1 \(epoch 1\): no weights of it were saved; its batch is in .*/bad_batch_1\.pt\."
    )
    with pytest.raises(FloatingPointError, match=expected):
        small_run("a", *settings, "default_hooks.logger.interval=3")
    with pytest.raises(FloatingPointError, match=expected):
        small_run("b", *settings, "default_hooks.logger.interval=50", "default_hooks.checkpoint.iters=2")
    assert latest_checkpoint(tmp_path / "a") is None
    assert latest_checkpoint(tmp_path / "b") is None
    for name in "ab":
        kept = torch.load(tmp_path / name / "bad_batch_1.pt", weights_only=True)
        assert math.isnan(kept["losses"]["loss"])
        assert kept["batch"]["inputs"][0].isnan().all()
        assert kept["batch"]["inputs"].shape == (8, 3, 32, 32)


def test_learns_and_is_tested(small_run: Run, small_config: Path, tmp_path: Path) -> None:
    settings = ("train_dataloader.dataset.noise=0.0", "optim_wrapper.optimizer.lr=1e-2", "model.mixup=None")
    folder = small_run("a", *settings, "train_cfg.max_epochs=8")
    best = max((r for r in read_log(folder) if r["kind"] == "val"), key=lambda r: r["top1"])
    assert best["top1"] > 60
    found = evaluate(folder / "config.py", folder / "best.pth", work_dir=tmp_path / "t", quiet=True)
    assert found["top1"] == pytest.approx(best["top1"])
    assert (tmp_path / "t" / "confusion.json").is_file()
    model = vizoo.create_model(**{**TINY, "embed_dim": 8}, checkpoint_path=folder / "best.pth")
    assert model.num_classes == 4
    other = ["model.backbone.num_classes=5"]
    with pytest.raises(ValueError, match="does not hold the model of this config"):
        evaluate(small_config, folder / "best.pth", other, work_dir=tmp_path / "u", quiet=True)


def test_compiled_run_equals_eager(small_run: Run) -> None:
    settings = ("train_cfg.max_epochs=1", "optim_wrapper.paramwise_cfg.layer_decay=1.0")
    eager = losses(small_run("eager", *settings))
    compiled = losses(small_run("compiled", *settings, "compile={'backend': 'eager'}"))
    for iteration, loss in eager.items():
        assert compiled[iteration] == pytest.approx(loss, abs=1e-5)


def test_a_run_is_never_overwritten(small_run: Run, tmp_path: Path) -> None:
    folder = small_run("a", "train_cfg.max_epochs=1")
    with pytest.raises(FileExistsError, match="holds a run: resume it, choose another folder, or force"):
        small_run("a")
    small_run("a", "train_cfg.max_epochs=1", force=True)
    assert holds_run(folder)
    assert holds_run(tmp_path / "a.old-1")
    with pytest.raises(ValueError, match="give one of them"):
        small_run("a", resume=True, force=True)


def test_runs_are_numbered(small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run to resume in runs/small"):
        train(small_config, resume=True, quiet=True)
    settings = ["train_cfg.max_epochs=1"]
    assert train(small_config, settings, quiet=True) == Path("runs/small/001")
    assert train(small_config, settings, quiet=True) == Path("runs/small/002")
    assert train(small_config, ["train_cfg.max_epochs=2"], resume=True, quiet=True) == Path("runs/small/002")
    assert {r["epoch"] for r in read_log("runs/small/002") if r["kind"] == "train"} == {1, 2}


def test_resume_needs_the_same_batches(small_run: Run, tmp_path: Path) -> None:
    small_run("a", "train_cfg.max_epochs=1")
    with pytest.raises(ValueError, match="resume with the data, batch size and processes it was made with"):
        small_run("a", "train_dataloader.batch_size=4", resume=True)
    with pytest.raises(ValueError, match="no run to resume in"):
        small_run("nothing", resume=True)


def test_data_that_does_not_fit(small_run: Run) -> None:
    with pytest.raises(ValueError, match=r"40 images, fewer than one batch of 64: set train_dataloader\.batch_size"):
        small_run("a", "train_dataloader.batch_size=64")
    with pytest.raises(ValueError, match=r"has 5 classes, the model 4: set model\.backbone\.num_classes=5"):
        small_run("b", "train_dataloader.dataset.classes=5")
    with pytest.raises(ValueError, match="different classes: tint 3"):
        small_run("c", "val_dataloader.dataset.classes=3")
    with pytest.raises(ValueError, match=r"^train_cfg.max_epochs must be 1 or more, got 0$"):
        small_run("d", "train_cfg.max_epochs=0")


def test_wrong_override_is_named(small_run: Run) -> None:
    with pytest.raises(TypeError, match=r"^SwinConfig has no field 'depth'; did you mean 'depths'"):
        small_run("a", "model.backbone.depth=3")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:<n>, got 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="device cuda:99 is not there"):
        pick_device("cuda:99")


def test_plain_lines_where_there_is_no_terminal(
    small_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config, ["train_cfg.max_epochs=1"], work_dir=tmp_path / "a")
    shown = capsys.readouterr().out
    assert "epoch 1/1  loss" in shown
    assert "img/s" in shown
    assert "val  top1" in shown
    assert "\x1b" not in shown


def test_bar_on_a_terminal() -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    line = ProgressLine(Console(file=out, force_terminal=True, width=100))
    line.begin("epoch 1/2", 3)
    for i in range(3):
        line.step(f"loss {i}")
    line.say("epoch 1/2  loss 2")
    line.end()
    assert "epoch 1/2" in out.getvalue()
    assert "loss" in out.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_log_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no log\.jsonl"):
        read_log(tmp_path)


def test_torn_line_and_replayed_iterations_are_left_out(tmp_path: Path) -> None:
    lines = ['{"kind": "train", "iter": 1}', '{"kind": "train", "iter": 2}', '{"kind": "resume", "iter": 1}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"kind": "train", "iter": 2}', '{"kind": "tr']))
    assert [(r["kind"], r["iter"]) for r in read_log(tmp_path)] == [("train", 1), ("resume", 1), ("train", 2)]


def test_logged_figures(small_run: Run) -> None:
    folder = small_run("a", "train_cfg.max_epochs=1")
    records = read_log(folder)
    assert records[0]["kind"] == "start"
    assert records[0]["parameters"] > 0
    assert {"loss", "lr", "grad_norm", "images_per_second", "eta"} <= records[1].keys()
    assert math.isclose(sum(map(sum, __import__("json").loads((folder / "confusion.json").read_text())["matrix"])), 21)
    assert list(folder.rglob("events.out.tfevents.*"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trains_and_resumes_on_a_gpu(small_run: Run, dtype: str) -> None:
    settings = (f"optim_wrapper.dtype={dtype}", "train_dataloader.dataset.noise=0.0", "lr=1e-2")
    folder = small_run("a", *settings, "epochs=4", device="cuda")
    small_run("a", *settings, "epochs=8", device="cuda", resume=True)
    found = [r["loss"] for r in read_log(folder) if r["kind"] == "train"]
    assert found[-1] < found[0]
    assert all(value.device.type == "cpu" for value in read_checkpoint(folder / "epoch_8.pth")["state_dict"].values())
