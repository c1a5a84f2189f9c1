"""The record of a run: JSON lines, TensorBoard, the lines a person sees, and the check that the loss is a number."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from .checkpoint import write_atomically
from .finite import FirstBad
from .progress import ProgressLine, duration

LOG = "log.jsonl"
CONFUSION = "confusion.json"
PER_CLASS = "per_class.json"

_UNDEFINED = -1.0
"""What COCO's tools give where there is nothing to compute a figure from."""
_PER_LINE = 6


def read_log(work_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, one history even if it was interrupted.

    What an interrupted process logged after the checkpoint that the run was resumed from is left out, as is a line
    that was cut off.

    Args:
        work_dir: Folder of the run.

    Returns:
        Records with `kind` (`start`, `resume`, `train`, `val`), `epoch`, `iter` and figures, oldest first.

    Raises:
        FileNotFoundError: The folder has no log.
    """
    path = Path(work_dir) / LOG
    if not path.is_file():
        raise FileNotFoundError(f"{work_dir} holds no run: there is no {LOG} in it")
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["kind"] == "resume":
            records = [r for r in records if r["iter"] <= record["iter"]]
        records.append(record)
    return records


@HOOKS.register_module()
class RunLog(Hook):
    """Logs a run and stops it when the loss is no longer finite; the batch that made it so is saved.

    Losses stay on the device until a window of them is complete, so the host waits for the device once per window and
    at the end of an epoch, never per step. In a distributed run the figures are means over the processes.

    Args:
        interval: Iterations per window.
        quiet: Show nothing.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50, quiet: bool = False) -> None:
        if interval < 1:
            raise ValueError(f"interval must be 1 or more, got {interval}")
        self.interval = interval
        self.line = ProgressLine(quiet=quiet or not is_main_process())
        self._losses: list[Tensor] = []
        self._images = 0
        self._since = self._started = self._paused = 0.0
        self._first_iter = self._latest = 0
        self._last: dict[str, Any] = {}
        self._epoch: list[Tensor] = []
        self._bad = FirstBad()

    def before_train(self, runner: Runner) -> None:
        """Note where the run starts, and what the data sets left out."""
        self._started = time.perf_counter()
        self._first_iter = runner.iter
        kind = "resume" if runner.iter else "start"
        parameters = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
        images, batches = len(runner.train_dataloader.dataset), len(runner.train_dataloader)
        facts = {"seed": runner.seed, "parameters": parameters, "images": images, "batches": batches}
        self._write(runner, kind, runner.epoch, facts | {"epochs": runner.max_epochs, "processes": get_world_size()})
        self._say(
            runner,
            f"{'resumed at epoch ' + str(runner.epoch + 1) if runner.iter else 'training'}: {parameters / 1e6:.2f} M "
            f"parameters, {images} images, {_length(runner)}, seed {runner.seed}",
        )
        self._report(runner, "training", runner.train_dataloader)
        if runner.val_loop is not None:
            self._report(runner, "validation", runner.val_dataloader)

    def before_train_epoch(self, runner: Runner) -> None:
        """Start the epoch's bar."""
        self._since = time.perf_counter()
        self._epoch = []
        self._begin_bar(runner)

    def _begin_bar(self, runner: Runner) -> None:
        batches = len(runner.train_dataloader)
        seen = runner.iter - runner.epoch * batches
        self.line.begin(f"epoch {runner.epoch + 1}/{runner.max_epochs}", batches, seen)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep the loss; close the window when it is full."""
        self._losses.append(outputs["loss"].detach())
        self._latest = runner.iter + 1
        self._bad.look(self._latest, data_batch, outputs)
        self._images += len(data_batch.get("inputs", data_batch.get("images", ()))) * get_world_size()
        ends = batch_idx + 1 == len(runner.train_dataloader) or runner.iter + 1 == runner.max_iters
        if ends or (runner.iter + 1) % self.interval == 0:
            self._close_window(runner)
        self.line.step(_summary(self._last))

    def after_train_epoch(self, runner: Runner) -> None:
        """Say how the epoch went."""
        self.line.end()
        if self._epoch:
            whole = self._last | {"loss": torch.cat(self._epoch).double().mean().item()}
            self._say(runner, f"epoch {runner.epoch + 1}/{runner.max_epochs}  {_summary(whole)}")

    def before_val_epoch(self, runner: Runner) -> None:
        """Start the validation's bar."""
        self.before_whole_checkpoint(runner)
        self._paused = time.perf_counter()
        self.line.begin("validating", len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        """Start the test's bar, after what the data set left out."""
        self._report(runner, "test", runner.test_dataloader)
        self.line.begin("testing", len(runner.test_dataloader))

    def before_whole_checkpoint(self, runner: Runner) -> None:
        """Look at the losses of an unfinished window before they are saved; `Checkpoints` calls it in every process."""
        if self._losses:
            self._window(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the bar."""
        self.line.step()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the bar."""
        self.line.step()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Log and show the figures."""
        self.line.end()
        self._figures(runner, "val", runner.epoch, metrics or {}, runner.val_loop.evaluator)
        # In a run of iterations the epoch may go on.
        self._since += time.perf_counter() - self._paused
        if runner.iter - runner.epoch * len(runner.train_dataloader) > 0 and runner.iter < runner.max_iters:
            self._begin_bar(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Show the figures."""
        self.line.end()
        self._figures(runner, "test", 0, metrics or {}, runner.test_loop.evaluator)

    def after_run(self, runner: Runner) -> None:
        """Close the bar and TensorBoard's file."""
        self.line.end()
        runner.visualizer.close()

    def _window(self, runner: Runner) -> Tensor:
        """Losses of the window, means over the processes; all of them raise together if one is not a number."""
        losses = torch.stack(self._losses).float()
        all_reduce(losses, "mean")
        values = losses.cpu()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            iteration = self._latest + 1 - len(values) + int(bad[0])
            raise FloatingPointError(
                f"the loss is {values[bad[0]].item()} at iteration {iteration} (epoch {runner.epoch + 1}): no weights "
                f"of it were saved; {self._bad.save(runner.work_dir, iteration)}. Look at the batch, or resume from "
                "the last checkpoint with a lower learning rate, tighter clipping or dtype=float32"
            )
        return values

    def _close_window(self, runner: Runner) -> None:
        values = self._window(runner)
        now = time.perf_counter()
        norm = getattr(runner.optim_wrapper, "grad_norm", None)
        left = runner.max_iters - runner.iter - 1
        self._last = {
            "loss": values.double().mean().item(),
            "batches": len(values),
            "lr": max(group["lr"] for group in runner.optim_wrapper.optimizer.param_groups),
            "grad_norm": None if norm is None else float(norm),
            "images_per_second": self._images / max(now - self._since, 1e-9),
            "eta": (now - self._started) / (runner.iter + 1 - self._first_iter) * left,
        }
        self._epoch.append(values)
        self._losses, self._images, self._since = [], 0, now
        self._write(runner, "train", runner.epoch + 1, self._last, runner.iter + 1)

    def _figures(self, runner: Runner, kind: str, epoch: int, metrics: dict[str, float], evaluator: Any) -> None:
        if kind == "val":
            self._write(runner, kind, epoch, metrics)
        self._save_classes(runner, kind, epoch, evaluator)
        start = f"{'  ' if kind == 'val' else ''}{kind}  "
        for line in _lines(metrics):
            self._say(runner, start + line)

    def _save_classes(self, runner: Runner, kind: str, epoch: int, evaluator: Any) -> None:
        """Keep what metrics know class by class: a confusion matrix, a row per class."""
        if not is_main_process():
            return
        for metric in evaluator.metrics:
            classes = list((metric.dataset_meta or {}).get("classes", []))
            found: dict[str, Any] = {"kind": kind, "epoch": epoch, "classes": classes}
            if getattr(metric, "confusion", None) is not None:
                _write_json(runner, CONFUSION, {**found, "matrix": metric.confusion.tolist()})
            if getattr(metric, "per_class", None):
                rows = [{name: _defined(value) for name, value in row.items()} for row in metric.per_class]
                _write_json(runner, PER_CLASS, {**found, "rows": rows})

    def _report(self, runner: Runner, what: str, dataloader: Any) -> None:
        """Say what a data set holds and what it left out, where it can tell."""
        report = getattr(dataloader.dataset, "report", None)
        if callable(report):
            self._say(runner, f"{what} set: {report()}")

    def _write(
        self, runner: Runner, kind: str, epoch: int, figures: dict[str, Any], iteration: int | None = None
    ) -> None:
        if not is_main_process():
            return
        iteration = runner.iter if iteration is None else iteration
        record = {"kind": kind, "epoch": epoch, "iter": iteration, **figures, "time": time.time()}
        with open(Path(runner.work_dir) / LOG, "a") as file:
            file.write(json.dumps(record) + "\n")
        scalars = {f"{kind}/{name}": v for name, v in figures.items() if isinstance(v, float) and v != _UNDEFINED}
        if kind in ("train", "val") and all(math.isfinite(value) for value in scalars.values()):
            runner.visualizer.add_scalars(scalars, step=iteration)

    def _say(self, runner: Runner, text: str) -> None:
        self.line.say(text)
        runner.logger.info(text)


def _length(runner: Runner) -> str:
    """How long the run is, as a person says it."""
    batches = len(runner.train_dataloader)
    if batches * runner.max_epochs == runner.max_iters:
        return f"{batches} batches x {runner.max_epochs} epochs"
    return f"{runner.max_iters} batches, {batches} an epoch"


def _lines(metrics: dict[str, float]) -> list[str]:
    """The figures, a few a line; a dash for those that nothing could be computed from."""
    shown = [f"{name} {_figure(name, value)}" for name, value in metrics.items()]
    return ["  ".join(shown[start : start + _PER_LINE]) for start in range(0, len(shown), _PER_LINE)]


def _figure(name: str, value: float) -> str:
    if _defined(value) is None:
        return "-"
    return f"{value:.4f}" if name == "loss" else f"{value:.2f} %"


def _defined(value: Any) -> Any:
    """None in place of a number that says that there is none."""
    return None if isinstance(value, float) and (value == _UNDEFINED or math.isnan(value)) else value


def _write_json(runner: Runner, name: str, content: dict[str, Any]) -> None:
    write_atomically(Path(runner.work_dir) / name, json.dumps(content).encode())


def _summary(figures: dict[str, Any]) -> str:
    """The figures of a window, as a person reads them."""
    if not figures:
        return ""
    speed = figures["images_per_second"]
    return (
        f"loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  {speed:.{0 if speed >= 10 else 1}f} img/s  "
        f"eta {duration(figures['eta'])}"
    )
