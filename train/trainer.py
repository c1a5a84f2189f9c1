"""mmengine's Runner with the adapters that a CPU, several processes and exact resume need."""

from __future__ import annotations

import logging
import os
import platform
import re
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.model import (
    MMDistributedDataParallel,
    convert_sync_batchnorm,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from .checkpoint import read_checkpoint, unwrap
from .loop import batch_size_of

CONFIG = "config.py"
_SHOWN = 5


def pick_device(name: str = "auto") -> torch.device:
    """The device a run computes on.

    Args:
        name: `auto` (this process's GPU where there is one), `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        ValueError: A device that this machine or this torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device


def _is_ours(record: logging.LogRecord) -> bool:
    """Drop the deprecation notes that mmengine's own saving provokes."""
    return not re.match(r'"(FileClient|HardDiskBackend)" ', str(record.msg))


@RUNNERS.register_module()
class Trainer(Runner):
    """The Runner of every run.

    Beside mmengine's, the config has `device` (see `pick_device`), `compile` (False, True, or options of
    `torch.compile` for the backbone) and `find_unused_parameters`. mmengine's `sync_bn="torch"` joins the batch norms
    of several processes on GPUs; a single process, or one on a CPU, which torch's joined norms do not run on, keeps
    its own.
    """

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """mmengine's logger, which writes everything to the run's file and only warnings to the terminal."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        logger.addFilter(_is_ours)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)
        return logger

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        self.logger.info(
            f"python {platform.python_version()}, torch {torch.__version__}, GPU {gpu}, {self.world_size} processes, "
            f"seed {self.seed}\n{self.cfg.pretty_text}"
        )

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """The model on its device, in DDP where there are several processes."""
        if is_model_wrapper(model):
            return model
        device = pick_device(self.cfg.get("device", "auto"))
        model = model.to(device)
        if not self.distributed:
            return revert_sync_batchnorm(model)
        if self.cfg.get("sync_bn") and device.type == "cuda":
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        options = {"broadcast_buffers": False, "find_unused_parameters": self.cfg.get("find_unused_parameters", False)}
        ids = [device.index] if device.type == "cuda" else None
        return MMDistributedDataParallel(module=model, device_ids=ids, **options, **(model_wrapper_cfg or {}))

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """Scale every group's learning rate by global batch / `base_batch_size`; accumulated batches count."""
        if not auto_scale_lr or not auto_scale_lr.get("enable", False):
            return
        images = (
            batch_size_of(self.train_dataloader) * self.world_size * getattr(optim_wrapper, "_accumulative_counts", 1)
        )
        ratio = images / auto_scale_lr["base_batch_size"]
        for group in optim_wrapper.optimizer.param_groups:
            group["lr"] *= ratio
        self.logger.info(
            f"learning rates times {ratio:g}: {images} images per update, {auto_scale_lr['base_batch_size']} base"
        )

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = True, revise_keys: Any = ()
    ) -> dict[str, Any]:
        """Load a checkpoint of a run into the model, strictly.

        Args:
            filename: The file.
            map_location: Not used: tensors come by the CPU.
            strict: Require all parameters and no others.
            revise_keys: Not used: names are those of the model.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or of another model.
        """
        checkpoint = read_checkpoint(filename)
        model = unwrap(self.model)
        try:
            self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
            model.load_state_dict(checkpoint["state_dict"], strict=strict)
        except RuntimeError as error:
            problems = [line.strip() for line in str(error).split("\n")[1:]]
            shown = " ".join(problems[:_SHOWN]) + (
                f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            )
            raise ValueError(f"{filename} is of another model than this config builds. {shown}") from error
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def dump_config(self) -> None:
        """Nothing: `vizoo.train.run` saves the config as it was resolved, before it is told to resume."""

    def _maybe_compile(self, target: str) -> None:
        options = self.cfg.get("compile", False)
        if options is False or options is None:
            return
        model = unwrap(self.model)
        backbone = getattr(model, "adapter", None) or model.get_submodule("backbone")  # an adapter runs the stages
        backbone.compile(**({} if options is True else dict(options)))
        self.logger.info("the backbone is compiled at its first batch")
