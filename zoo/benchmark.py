"""Measures speed and memory of models with torch alone: images per second, and the most memory a step takes.

One step is a whole one: `model(images)` under `inference_mode`, or forward, loss, backward and an AdamW update. Steps
are warmed up, then timed one by one; the median counts, and half the interquartile range beside it says how far to
trust it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.backbones.base import Backbone, nearest

from .create import create_model
from .environment import device_name

Mode = Literal["inference", "training"]
Execution = Literal["eager", "compiled", "graphs"]
"""`graphs`: compiled, and replayed as CUDA graphs, which spares the host its launches (torch's `reduce-overhead`)."""
Step = Callable[[], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROW = 4
"""Calls that a GPU gets at a time when a step is timed."""


@dataclass(frozen=True)
class Timing:
    """Seconds that each timed step took, in the order of time."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median; 0 for fewer than two steps."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one model did in one mode.

    Attributes:
        model: Its name.
        mode: `inference` or `training`.
        execution: `eager`, `compiled` or `graphs`.
        device: Name of the hardware.
        threads: CPU threads torch may use.
        dtype: Type computed in; anything but float32 by autocast.
        batch_size: Images per step.
        img_size: Height and width of an image.
        steps: Timed steps.
        images_per_second: Batch size over the median step; NaN where it failed.
        milliseconds: Median step; NaN where it failed.
        spread: Half the interquartile range over the median.
        peak_memory: Bytes at the step's highest point beyond what was in use before the model was built: on a GPU as
            torch's allocator counts, on the CPU as the process grew; None where that cannot be told.
        error: Why it failed; empty if it did not.
        fused: Whether the model was fused before.
    """

    model: str
    mode: Mode
    execution: Execution
    device: str
    threads: int
    dtype: str
    batch_size: int
    img_size: tuple[int, int]
    steps: int = 0
    images_per_second: float = math.nan
    milliseconds: float = math.nan
    spread: float = 0.0
    peak_memory: int | None = None
    error: str = ""
    fused: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and CSV; NaN, which JSON lacks, becomes None."""
        values = asdict(self)
        values["img_size"] = list(self.img_size)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def benchmark(
    model: str | nn.Module,
    *,
    mode: Mode = "inference",
    compiled: bool = False,
    fuse: bool = False,
    batch_size: int = 8,
    img_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    steps: int = 12,
    warmup: int = 4,
) -> Measurement:
    """Measure one model.

    Args:
        model: A name of the zoo, or any module that takes images (B, 3, H, W).
        mode: Measure `inference` or `training` steps.
        compiled: Measure `torch.compile(model)`.
        fuse: Fuse the model first, in place; see `Backbone.fuse`.
        batch_size: Images per step.
        img_size: Side of the images; None takes the model's own (224 for a module without `default_cfg`).
        device: Where to run; None takes a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`, the latter two by autocast; None takes bfloat16 on a GPU, else
            float32.
        steps: Timed steps.
        warmup: Steps before them; compiling happens there.

    Returns:
        The measurement. A model that cannot be compiled or runs out of memory gives one whose `error` says so.

    Raises:
        ValueError: Unknown name, dtype or device, a number below 1, or a fused model to be trained.
        TypeError: A module to fuse that is no Backbone.
    """
    _require_positive(batch_size=batch_size, steps=steps, warmup=warmup)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'inference' or 'training', got {mode!r}")
    if fuse and mode == "training":
        raise ValueError("a fused model cannot be trained: measure mode='inference', or leave fuse out")
    place = choose_device(device)
    dtype = choose_dtype(dtype, place)
    memory = PeakMemory(place)
    built = _build(model, img_size).to(place)
    if fuse:
        _fuse(built)
    sides = (img_size, img_size) if img_size else _default_sides(built)
    facts: dict[str, Any] = {
        "model": model if isinstance(model, str) else type(model).__name__,
        "mode": mode,
        "execution": "compiled" if compiled else "eager",
        "device": device_name(place),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "batch_size": batch_size,
        "img_size": sides,
        "fused": fuse,
    }
    try:
        shape = (batch_size, 3, *sides)
        step = make_step(built, mode, execution=facts["execution"], shape=shape, device=place, dtype=dtype)
        timing = time_steps({"": step}, place, steps=steps, warmup=warmup)[""]
        peak = memory.of(step)
    except (RuntimeError, MemoryError) as error:  # out of memory, or no compiler on this machine
        return Measurement(**facts, error=_first_line(error))
    finally:
        _forget_compiled(compiled)
    return Measurement(
        **facts,
        steps=steps,
        images_per_second=batch_size / timing.median,
        milliseconds=timing.median * 1e3,
        spread=timing.spread,
        peak_memory=peak,
    )


def make_step(
    model: nn.Module,
    mode: Mode,
    *,
    execution: Execution,
    shape: Sequence[int],
    device: torch.device,
    dtype: str,
) -> Step:
    """A function that does one whole step of a model on one fixed random batch.

    Args:
        model: Any module that takes images, on the device already; left in eval or training mode.
        mode: `inference` or `training`.
        execution: Run the model as it is, compiled, or compiled into CUDA graphs.
        shape: Shape of the batch (B, C, H, W).
        device: Where the model is.
        dtype: A key of `DTYPES`.
    """
    model.train(mode == "training")
    images = torch.randn(*shape, device=device)
    forward: Any = model
    if execution != "eager":
        forward = torch.compile(model, mode="reduce-overhead" if execution == "graphs" else None)
    context = _autocast(device, dtype)
    if mode == "inference":
        return lambda: _infer(forward, images, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    targets = torch.arange(shape[0], device=device)
    return lambda: _train(forward, images, targets, optimizer, context)


def _infer(forward: Callable[[Tensor], Any], images: Tensor, context: Callable[[], Any]) -> None:
    with torch.inference_mode(), context():
        forward(images)


def _train(
    forward: Callable[[Tensor], Any],
    images: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    context: Callable[[], Any],
) -> None:
    with context():
        loss = _loss(forward(images), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _loss(outputs: Any, targets: Tensor) -> Tensor:
    """Cross entropy of logits; a mean of squares for maps, which have no labels here."""
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return F.cross_entropy(outputs.float(), targets % outputs.shape[1])
    maps = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.stack([y.float().square().mean() for y in maps]).sum()


def _autocast(device: torch.device, dtype: str) -> Callable[[], Any]:
    enabled = dtype != "float32"
    kind = DTYPES[dtype] if enabled else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=kind, enabled=enabled)


def time_steps(
    steppers: Mapping[str, Step], device: torch.device, *, steps: int = 12, warmup: int = 4
) -> dict[str, Timing]:
    """Time several functions in turn, so that a drift of the machine's speed meets all of them alike.

    Args:
        steppers: What to time, by name.
        device: Where they run; on a GPU its own events measure.
        steps: How often each is timed.
        warmup: Calls of each before that.

    A GPU gets `ROW` calls at a time, of which the mean counts: the next is being launched while one runs, as in any
    loop of training or inference. What Python takes shows only where it takes longer than the GPU.
    """
    for stepper in steppers.values():
        for _ in range(warmup):
            stepper()
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(steps):
        for name, stepper in steppers.items():
            seconds[name].append(_time_once(stepper, device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time_once(stepper: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(ROW):
            stepper()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / ROW
    begin = time.perf_counter()
    stepper()
    return time.perf_counter() - begin


class PeakMemory:
    """The most memory a step takes, counted from what was in use when this object was made.

    On a GPU torch's allocator counts. On the CPU the kernel does: the process's peak resident size is reset before the
    step (Linux alone offers that), and what the C library still held of earlier models is given back at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        gc.collect()
        if device.type == "cuda":
            self.before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            _trim_heap()
            self.before = (_status_kib("VmRSS") or 0) * 1024

    def of(self, step: Step) -> int | None:
        """Bytes at the highest point of one step; None where the system does not tell."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.before
        if self.device.type != "cpu" or not _reset_peak_resident():
            return None
        step()
        peak = _status_kib("VmHWM")
        return None if peak is None else max(0, peak * 1024 - self.before)


def _trim_heap() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _reset_peak_resident() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_kib(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; None takes a GPU if there is one, else the CPU.

    Raises:
        ValueError: There is no such device here; names those there are.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    if device is None:
        return torch.device("cuda" if gpus else "mps" if mps else "cpu")
    available = ["cpu", *(["cuda"] if gpus else []), *gpus, *mps]
    if str(device) not in available:
        raise ValueError(f"there is no device {str(device)!r} here; {nearest(str(device), available)}")
    return torch.device(device)


def choose_dtype(dtype: str | None, device: torch.device) -> str:
    """The name of the type to compute in; None takes bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: There is no such type; names the nearest.
    """
    if dtype is None:
        return "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    return dtype


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use this many threads on the CPU, and the former number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build(model: str | nn.Module, img_size: int | None) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    overrides: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    return create_model(model, **overrides)


def _fuse(model: nn.Module) -> None:
    if not isinstance(model, Backbone):
        raise TypeError(f"only a vizoo.Backbone can be fused, got {type(model).__name__}")
    model.eval().fuse()


def _default_sides(model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "default_cfg", None) or {}
    height, width = config.get("input_size", (3, 224, 224))[1:]
    return height, width


def _forget_compiled(compiled: bool) -> None:
    """Compiled code of one model would count towards the recompilation limit of the next."""
    if compiled:
        torch._dynamo.reset()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
