"""The first batch whose loss is not a number, found without waiting for the device, and kept for a look at it."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_rank
from torch import Tensor

from .checkpoint import write_atomically

_SHOWN = 4


class _Step(NamedTuple):
    """A training step whose loss may not be known yet."""

    iteration: int
    batch: Mapping[str, Any]
    losses: dict[str, Tensor]
    finite: Tensor
    ready: torch.cuda.Event | None


class FirstBad:
    """Looks at every loss and keeps the first batch that gave one which is not finite.

    A GPU runs behind the host, so a step is settled once the device has come past it; until then its batch is held,
    which are a few batches at most.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Step] = deque()
        self._found: _Step | None = None

    def look(self, iteration: int, batch: Mapping[str, Any], losses: Mapping[str, Any]) -> None:
        """Note a step: its number from 1, its batch, and its losses by name, the sum of which is `loss`."""
        if self._found is not None:
            return
        found = {name: value.detach() for name, value in losses.items() if isinstance(value, Tensor)}
        finite = torch.isfinite(found["loss"]).to("cpu", non_blocking=True)
        ready = None
        if found["loss"].is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._waiting.append(_Step(iteration, batch, found, finite, ready))
        self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0].ready is None or self._waiting[0].ready.query()):
            step = self._waiting.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            if not step.finite:
                self._found = step
                self._waiting.clear()

    def save(self, folder: str | Path, iteration: int) -> str:
        """Write the batch of this process if its loss at `iteration` was not finite.

        Later ones do not count: one bad update spoils the weights of all processes.

        The file `bad_batch_<iteration>.pt` holds `iteration`, `losses` by name, `paths` of the images and `batch`, the
        very tensors; `torch.load(path, weights_only=True)` reads it.

        Returns:
            Where it is, for a message; or that it was another process's.
        """
        self._settle(wait=True)
        if self._found is None or self._found.iteration != iteration:
            return "its batch was another process's, which saves it"
        step = self._found
        rank = f"_process_{get_rank()}" if get_rank() else ""
        path = Path(folder) / f"bad_batch_{step.iteration}{rank}.pt"
        paths = _paths(step.batch)
        losses = {name: float(value.float().mean()) for name, value in step.losses.items()}
        out = io.BytesIO()
        torch.save({"iteration": step.iteration, "losses": losses, "paths": paths, "batch": dict(step.batch)}, out)
        write_atomically(path, out.getvalue())
        shown = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
        return f"its batch is in {path}" + (f" ({shown})" if paths else "")


def _paths(batch: Mapping[str, Any]) -> list[str]:
    """Files of the images, where their targets name them."""
    targets = batch.get("targets", ())
    return [str(target["path"]) for target in targets if isinstance(target, Mapping) and "path" in target]
