"""Checkpoints that are always whole: atomic writing, plain contents, exact resume.

A checkpoint is written beside its final place, synced and renamed, and only then announced and older ones removed, so
at any moment (kill -9, power cut, full disk) the last complete one is there. Its contents are tensors and plain
Python values: `torch.load(path, weights_only=True)` reads it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from .hooks import average_buffers, just_updated

POINTER = "last_checkpoint"
BEST = "best.pth"
_NUMBERED = re.compile(r"(epoch|iter)_(\d+)\.pth")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Put a file in place whole or not at all.

    Args:
        path: The file; what it held before stays until the new content is on the disk.
        data: Its new content.

    Raises:
        OSError: It could not be written (no space left, no permission); the old content is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
        raise OSError(error.errno, reason) from error
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@register_backend("vizoo_atomic", force=True)
class AtomicBackend(LocalBackend):
    """mmengine's local files, written atomically."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file whole or not at all."""
        write_atomically(filepath, obj)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU, read without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, holds pickled objects, or is no training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        first = str(error).split("\n", 1)[0]
        raise ValueError(f"{path} is not a whole checkpoint of tensors and plain values: {first}") from error
    if not isinstance(found, dict) or not {"meta", "state_dict"} <= found.keys():
        raise ValueError(f"{path} holds weights only; a run can be resumed from a checkpoint that training wrote")
    return found


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none.

    The pointer file is believed first. Without it, or if the file it names is damaged, numbered checkpoints are tried
    from the newest.
    """
    work_dir = Path(work_dir)
    numbered = [path for path in work_dir.glob("*.pth") if _NUMBERED.fullmatch(path.name)]
    candidates = sorted(numbered, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    pointer = work_dir / POINTER
    if pointer.is_file():
        candidates.insert(0, work_dir / Path(pointer.read_text().strip()).name)
    for path in candidates:
        with contextlib.suppress(ValueError, FileNotFoundError):
            read_checkpoint(path)
            return path
    return None


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators in this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 -- augmentations draw from it
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the generators of this process into a state that `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@HOOKS.register_module()
class PlainCheckpoint(Hook):
    """Keeps the checkpoints of mmengine's Runner free of pickled classes, so that `weights_only=True` loads them."""

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace mmengine's history buffers and numpy scalars by plain values."""
        hub = checkpoint["message_hub"]
        info = {k: v.item() if hasattr(v, "item") else v for k, v in hub["runtime_info"].items()}
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": info, "resumed_keys": {}}


@HOOKS.register_module()
class Checkpoints(PlainCheckpoint):
    """Saves the run every so often, and the best one by a validation figure.

    Args:
        epochs: Save after every so many epochs, and after the last; 0 only after the last, or not at all with `iters`.
        iters: Save after every so many iterations, once the update that they are part of is made; 0 never. Without
            `epochs`, after the last as well.
        keep: Numbered checkpoints to keep; older ones go after the new one is complete.
        best: Validation figure whose best model is kept as `best.pth`; None keeps none.
        greater: Whether more of that figure is better.

    Raises:
        ValueError: A negative interval, or `keep` below 1.
    """

    priority = "VERY_LOW"

    def __init__(
        self, epochs: int = 1, iters: int = 0, keep: int = 2, best: str | None = "top1", greater: bool = True
    ) -> None:
        if epochs < 0 or iters < 0 or keep < 1:
            raise ValueError(f"epochs and iters must be 0 or more, keep 1 or more; got {epochs}, {iters}, {keep}")
        self.epochs, self.iters, self.keep = epochs, iters, keep
        self.best, self.greater = best, greater
        self.best_score: float | None = None
        self._rng: list[dict[str, Any]] = []
        self._due = False

    def before_train(self, runner: Runner) -> None:
        """Sweep what a killed process left, and find the best score so far of a resumed run."""
        if is_main_process():
            for part in Path(runner.work_dir).glob(".*.part"):
                part.unlink(missing_ok=True)
        path = Path(runner.work_dir) / BEST
        if runner.iter > 0 and path.is_file():
            self.best_score = read_checkpoint(path)["meta"].get("score")

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Hand the generators' states to the loop, which knows when to restore them."""
        states = checkpoint.get("rng", [])
        if not runner._resume or not states:
            return
        if len(states) == runner.world_size:
            runner.train_loop.resumed_rng = states[runner.rank]
        else:
            runner.logger.warning(
                f"the checkpoint was written by {len(states)} processes, this run has {runner.world_size}: "
                "it continues with other random numbers than the uninterrupted run"
            )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save where the iteration says so; between two updates there are gradients that no checkpoint holds."""
        done = runner.iter + 1
        last = not self.epochs and done == runner.max_iters
        self._due |= self.iters > 0 and (done % self.iters == 0 or last)
        if self._due and just_updated(runner):
            self._due = False
            runner.call_hook("before_whole_checkpoint")
            self._save(runner, f"iter_{done}.pth", epoch=runner.epoch, iteration=done)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save where the epoch says so."""
        number = runner.epoch + 1
        last = number == runner.max_epochs
        if (self.epochs and (number % self.epochs == 0 or last)) or (last and not self.iters):
            whole = runner.iter // len(runner.train_dataloader)  # the last pass of a run of iterations may be cut
            self._save(runner, f"epoch_{number}.pth", epoch=whole, iteration=runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Save the model if no earlier one did better."""
        if self.best is None or not metrics or runner.train_loop is None:
            return
        if self.best not in metrics:
            raise ValueError(f"there is no validation figure {self.best!r}; valid: {', '.join(sorted(metrics))}")
        score = float(metrics[self.best])
        sign = 1 if self.greater else -1
        if self.best_score is None or sign * score > sign * self.best_score:
            self.best_score = score
            meta = {"epoch": runner.epoch, "iter": runner.iter, "score": score, "figure": self.best}
            self._write(runner, BEST, meta, whole=False)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the generators' states, and refuse weights that are not numbers."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint["rng"] = self._rng
        require_finite(runner.model, f"after iteration {runner.iter}")

    def _save(self, runner: Runner, name: str, *, epoch: int, iteration: int) -> None:
        average_buffers(runner)
        # Every process takes part: generators differ between them.
        self._rng = all_gather_object(rng_state())
        self._write(runner, name, {"epoch": epoch, "iter": iteration}, whole=True)
        if is_main_process():
            write_atomically(Path(runner.work_dir) / POINTER, name.encode())
            self._remove_old(Path(runner.work_dir), name)

    def _write(self, runner: Runner, name: str, meta: dict[str, Any], whole: bool) -> None:
        runner.save_checkpoint(
            runner.work_dir,
            name,
            save_optimizer=whole,
            save_param_scheduler=whole,
            meta=meta,
            backend_args={"backend": "vizoo_atomic"},
        )

    def _remove_old(self, work_dir: Path, newest: str) -> None:
        found = [path for path in work_dir.glob("*.pth") if _NUMBERED.fullmatch(path.name) and path.name != newest]
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in found[self.keep - 1 :]:
            path.unlink(missing_ok=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, or the model."""
    inner = model.module if is_model_wrapper(model) else model
    assert isinstance(inner, nn.Module)
    return inner


def require_finite(model: nn.Module, when: str) -> None:
    """Raise where a parameter of a model is infinite or not a number.

    Raises:
        FloatingPointError: Names the first such parameter; nothing was saved.
    """
    for name, parameter in unwrap(model).named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(
                f"{name} is no longer finite {when}: nothing was saved, earlier checkpoints are whole"
            )
