"""The entry points: train by a config, test a checkpoint. `vizoo train` and `vizoo test` call these."""

from __future__ import annotations

import atexit
import copy
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import broadcast_object_list
from mmengine.registry import MODELS
from torch import nn

import vizoo
from vizoo.checkpoint import LoadReport

from .checkpoint import BEST, POINTER, latest_checkpoint, unwrap, write_atomically
from .classification import ImageClassifier
from .log import LOG
from .settings import config_title, differences, load_config
from .trainer import CONFIG, Trainer, pick_device

RUNS = "runs"


def train(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    work_dir: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    seed: int | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Train by a config. Under torchrun every process calls this.

    Args:
        config: Name of a config (`imagenet/swin_tiny_patch4_window7_224`), or path of one.
        overrides: `key=value` settings that change single values.
        work_dir: Folder for checkpoints and logs; None takes the next free `runs/<config>/<number>`, or the latest
            such folder to resume in.
        resume: Continue the run in that folder from its last whole checkpoint, exactly.
        force: Start anew in a folder that holds a run; that run is moved aside, never deleted.
        seed: Seed of everything random; None keeps the config's.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`; None keeps the config's.
        quiet: Show nothing.

    Returns:
        The folder: `config.py`, `log.jsonl`, `confusion.json`, `per_class.json`, `best.pth`, `epoch_<n>.pth` or
        `iter_<n>.pth`, TensorBoard's files.

    Raises:
        ValueError: Unknown config, bad values, nothing to resume, or resume together with force.
        KeyError: A setting that the config does not have.
        FileExistsError: The folder holds a run, and neither resume nor force is given.
        FileNotFoundError: The data set is not there.
        FloatingPointError: The loss is no longer finite; the batch is saved in the folder.
    """
    if resume and force:
        raise ValueError("resume continues the run, force starts anew: give one of them")
    settings = load_config(config, overrides)
    _put(settings, seed=seed, device=device, quiet=quiet)
    _join_processes(settings.get("device", "auto"))
    folder = _agreed(lambda: _claim(Path(work_dir) if work_dir else None, config_title(config), resume, force))
    settings.work_dir = str(folder)
    start = _resume_point(folder) if resume else None
    with _runner(settings, start) as runner, _plain_errors():
        if runner.rank == 0:
            _save_config(runner, folder, settings)
        runner.train()
    return folder


def evaluate(
    config: str | Path,
    checkpoint: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    work_dir: str | Path | None = None,
    device: str | None = None,
    fuse: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Evaluate a checkpoint on a config's validation set.

    Args:
        config: As for `train`; a run's own `config.py` too.
        checkpoint: A checkpoint that training wrote, or a published one: of a classifier any that
            `vizoo.load_checkpoint` reads, of a detector or segmenter that of the whole model, in either official
            layout. None takes the official weights of a classifier.
        overrides: `key=value` settings.
        work_dir: Folder for the log, `confusion.json` and `per_class.json`; None takes the next free
            `runs/test/<config>/<number>`.
        device: As for `train`.
        fuse: Fuse the backbone once its weights are loaded; see `vizoo.Backbone.fuse`.
        quiet: Show nothing.

    Returns:
        The metric's figures, in percent: `top1`, `top5` and `loss` (which is none) of a classifier; `box_AP`,
        `box_AP50`, ... and, with masks, `mask_AP`, ... of a detector, -1 where there is no such object; `mIoU`, `mAcc`
        and `aAcc` of a segmenter.

    Raises:
        ValueError: As for `train`; and a checkpoint that holds another model, or other classes, than the config's.
        FileNotFoundError: The checkpoint or the data set is not there.
        TypeError: A model to fuse whose backbone is none of the zoo's.
    """
    settings = load_config(config, overrides)
    _put(settings, device=device, quiet=quiet)
    for name in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        settings[name] = None
    settings.test_dataloader, settings.val_dataloader = settings.val_dataloader, None
    settings.test_evaluator, settings.val_evaluator = settings.val_evaluator, None
    settings.test_cfg, settings.val_cfg = {}, None
    settings.custom_hooks, settings.load_from, settings.resume = [], None, False
    settings.default_hooks.checkpoint = None
    settings.default_hooks.param_scheduler = None
    if checkpoint is None and not issubclass(MODELS.get(settings.model.type), ImageClassifier):
        raise ValueError(
            "only classifiers have official weights to take by default: name a checkpoint of the whole model"
        )
    settings.model.backbone.pretrained = checkpoint is None
    _join_processes(settings.get("device", "auto"))
    folder = _agreed(lambda: _claim(Path(work_dir) if work_dir else None, f"test/{config_title(config)}", False, False))
    settings.work_dir = str(folder)
    with _runner(settings) as runner, _plain_errors():
        if checkpoint is not None:
            _load_weights(runner.model, checkpoint)
        if fuse:
            fuse_backbone(runner.model)
        return {name: float(value) for name, value in runner.test().items()}


def fuse_backbone(model: nn.Module) -> None:
    """Fold, in place, what the backbone of a loaded model needs no layer for in evaluation; see `vizoo.Backbone.fuse`.

    Raises:
        TypeError: The backbone is none of the zoo's.
    """
    backbone = getattr(unwrap(model), "backbone", None)
    if not isinstance(backbone, vizoo.Backbone):
        raise TypeError(f"only a vizoo.Backbone can be fused, got {type(backbone).__name__}")
    backbone.eval().fuse()


class Loadable(Protocol):
    """What a model must have to be tested: a way to read whole checkpoints."""

    def load_checkpoint(self, source: str | Path) -> LoadReport:
        """Load every parameter, or raise."""


def _load_weights(model: Any, checkpoint: str | Path) -> None:
    """Fill a whole model, heads included; anything left at its initial values is an error."""
    loadable: Loadable = unwrap(model)  # type: ignore[assignment]
    if not callable(getattr(loadable, "load_checkpoint", None)):
        raise TypeError(f"{type(loadable).__name__} cannot be tested: it has no method load_checkpoint(source)")
    report = loadable.load_checkpoint(checkpoint)
    if report.fresh or report.adapted:
        what = "; ".join(f"{key} ({how})" for key, how in report.adapted.items()) or ", ".join(report.fresh)
        raise ValueError(f"{checkpoint} does not hold the model of this config, so testing it says nothing: {what}")


def _put(settings: Config, **values: Any) -> None:
    """Settings that the entry points take as arguments; None leaves the config's."""
    if values.get("seed") is not None:
        settings.randomness = {**settings.get("randomness", {}), "seed": values["seed"]}
    if values.get("device") is not None:
        settings.device = values["device"]
    if values.get("quiet"):
        settings.default_hooks.logger.quiet = True
    pick_device(settings.get("device", "auto"))


def _join_processes(device: str) -> None:
    """Join the process group of a torchrun job: NCCL between GPUs, gloo otherwise; nothing for a single process.

    The group stays until the process ends: its store cannot serve a second one, and a script may train, then evaluate.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ or dist.is_initialized():
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _agreed(decide: Any) -> Path:
    """What the first process decides, in every process; its error, too."""
    outcome: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = str(decide())
        except Exception as error:  # raised again below, in every process
            outcome[1] = error
    if dist.is_initialized():
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return Path(outcome[0])


def _claim(work_dir: Path | None, title: str, resume: bool, force: bool) -> Path:
    """The folder of the run, made ready: no file of another run is ever overwritten."""
    if work_dir is None:
        parent = Path(RUNS) / title
        return _latest_run(parent) if resume else _next_free(parent)
    if resume:
        if not holds_run(work_dir):
            raise ValueError(f"there is no run to resume in {work_dir}")
        return work_dir
    if holds_run(work_dir):
        if not force:
            raise FileExistsError(
                f"{work_dir} holds a run: resume it, choose another folder, or force a new start there"
            )
        aside = next(
            p for i in itertools.count(1) if not (p := work_dir.with_name(f"{work_dir.name}.old-{i}")).exists()
        )
        work_dir.rename(aside)
    work_dir.mkdir(parents=True, exist_ok=True)
    return work_dir


def holds_run(folder: Path) -> bool:
    """Whether a folder holds the files of a run."""
    return any((folder / name).exists() for name in (CONFIG, LOG, POINTER, BEST)) or any(folder.glob("*.pth"))


def _numbered(parent: Path) -> list[int]:
    found = parent.iterdir() if parent.is_dir() else ()
    return sorted(int(path.name) for path in found if re.fullmatch(r"\d{3,}", path.name))


def _next_free(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(max(_numbered(parent), default=0) + 1):
        folder = parent / f"{number:03}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another process took it between the look and the claim
        return folder
    raise AssertionError("unreachable: count() is endless")


def _latest_run(parent: Path) -> Path:
    for number in reversed(_numbered(parent)):
        folder = parent / f"{number:03}"
        if holds_run(folder):
            return folder
    raise ValueError(f"there is no run to resume in {parent}: train first, or name the folder of the run")


def _resume_point(folder: Path) -> Path:
    found = latest_checkpoint(folder)
    if found is None:
        raise ValueError(f"{folder} has no whole checkpoint to resume from; start anew in another folder")
    return found


def _save_config(runner: Trainer, folder: Path, settings: Config) -> None:
    """Keep the resolved config with the run, and say which settings a resumed run has changed."""
    saved = folder / CONFIG
    if saved.is_file():
        for line in differences(load_config(saved), settings):
            if not line.startswith("work_dir:"):
                runner.logger.warning(f"resumed with another setting: {line}")
    write_atomically(saved, settings.pretty_text.encode())


@contextmanager
def _runner(settings: Config, resume_from: Path | None = None) -> Iterator[Trainer]:
    """A Trainer, and its log files closed afterwards."""
    settings = copy.deepcopy(settings)
    # mmengine keeps loggers and hubs by name for the life of the process: no two runs may share one.
    settings.experiment_name = f"{Path(settings.work_dir).name}-{uuid4().hex[:8]}"
    settings.launcher = "pytorch" if dist.is_initialized() else "none"
    if resume_from is not None:
        settings.resume, settings.load_from = True, str(resume_from)
        settings.model.backbone.pretrained = False
    with _plain_errors():
        runner = Trainer.from_cfg(settings)
    try:
        yield runner
    finally:
        runner.visualizer.close()
        for handler in list(runner.logger.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.close()
                runner.logger.removeHandler(handler)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors as they were raised: mmengine re-raises each one with the class it was building in front."""
    try:
        yield
    except Exception as error:
        inner = error
        while inner.__context__ is not None and str(inner).endswith(str(inner.__context__)) and str(inner.__context__):
            context = inner.__context__
            if not isinstance(context, Exception):
                break
            inner = context
        if inner is error:
            raise
        raise inner from None
