"""What is measured is what is reported; how fast anything is, is no test."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo import environment
from vizoo.benchmark import (
    Measurement,
    PeakMemory,
    Timing,
    benchmark,
    choose_device,
    choose_dtype,
    make_step,
    threads,
    time_steps,
)

CPU = torch.device("cpu")
QUICK = {"device": "cpu", "batch_size": 2, "steps": 3, "warmup": 1}


def test_timing_is_a_median_with_its_spread() -> None:
    timing = Timing((3.0, 1.0, 2.0, 4.0, 100.0))
    assert timing.median == 3
    assert timing.spread == pytest.approx((4 - 2) / 2 / 3)
    assert Timing((1.0,)).spread == 0


def test_steps_are_warmed_up_and_timed_in_turn() -> None:
    calls: list[str] = []
    found = time_steps({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, steps=3, warmup=2)
    assert "".join(calls) == "aabb" + "ababab"
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 3, "b": 3}


class Recorder(nn.Module):
    """Remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.seen: list[tuple[bool, bool, torch.dtype, tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(x.mean((2, 3)))
        self.seen.append((self.training, torch.is_grad_enabled(), out.dtype, tuple(x.shape)))
        return out


@pytest.mark.parametrize(("mode", "trains"), [("inference", False), ("training", True)])
def test_a_step_is_a_whole_one(mode: str, trains: bool) -> None:
    model = Recorder()
    before = model.head.weight.clone()
    found = benchmark(model, mode=mode, img_size=40, **QUICK)  # type: ignore[arg-type]
    assert set(model.seen) == {(trains, trains, torch.float32, (2, 3, 40, 40))}
    assert len(model.seen) >= QUICK["steps"] + QUICK["warmup"]
    assert torch.equal(before, model.head.weight) is not trains
    assert found.error == ""
    assert (found.model, found.mode, found.execution, found.img_size) == ("Recorder", mode, "eager", (40, 40))
    assert found.images_per_second == pytest.approx(2 / (found.milliseconds / 1e3))
    assert found.steps == 3
    assert found.threads == torch.get_num_threads()


def test_lower_precision_runs_by_autocast() -> None:
    model = Recorder()
    assert benchmark(model, dtype="bfloat16", **QUICK).dtype == "bfloat16"  # type: ignore[arg-type]
    assert {dtype for _, _, dtype, _ in model.seen} == {torch.bfloat16}


def test_compiled_runs_the_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiled, backend="eager"))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    found = benchmark(model, compiled=True, img_size=32, **QUICK)  # type: ignore[arg-type]
    assert (found.execution, found.error) == ("compiled", "")
    assert found.images_per_second > 0


def test_a_model_of_the_zoo_takes_its_own_size_or_another(tiny_model: str) -> None:
    assert benchmark(tiny_model, **QUICK).img_size == (32, 32)  # type: ignore[arg-type]
    assert benchmark(tiny_model, img_size=48, **QUICK).img_size == (48, 48)  # type: ignore[arg-type]


def test_maps_can_be_trained_on(tiny_model: str) -> None:
    model = vizoo.create_model(tiny_model, features_only=True)
    step = make_step(model, "training", execution="eager", shape=(1, 3, 32, 32), device=CPU, dtype="float32")
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_failure_is_a_measurement_that_says_so() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory\nand a long story")

    found = benchmark(Broken(), **QUICK)  # type: ignore[arg-type]
    assert found.error == "out of memory"
    assert math.isnan(found.images_per_second)
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["images_per_second"] is None
    assert values["img_size"] == [224, 224]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_peak_memory_is_what_a_step_takes() -> None:
    memory = PeakMemory(CPU)
    kept: list[Tensor] = []
    if memory.of(lambda: None) is None:
        pytest.skip("this kernel does not let a process reset its peak")
    taken = memory.of(lambda: torch.ones(64 << 20, dtype=torch.uint8))
    assert taken is not None
    assert 63 << 20 <= taken < 200 << 20  # the kernel counts pages in batches
    kept.append(torch.ones(32 << 20, dtype=torch.uint8))
    resting = memory.of(lambda: None)
    assert resting is not None
    assert resting >= 31 << 20  # what the model holds counts, what an earlier step freed does not
    assert resting < taken + (40 << 20)  # the allocator may keep what was freed, the kernel counts in pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"mode": "train"}, "mode must be 'inference' or 'training', got 'train'"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ({"device": "gpu"}, "there is no device 'gpu' here; .*'cpu'"),
        ({"model": "swin_tny"}, "unknown model 'swin_tny'"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    arguments = {"model": Recorder(), **QUICK, **options}
    with pytest.raises(ValueError, match=message):
        benchmark(**arguments)  # type: ignore[arg-type]


def test_defaults_follow_the_device() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else choose_device(None).type)
    assert choose_dtype(None, CPU) == "float32"
    assert choose_dtype(None, torch.device("cuda")) == "bfloat16"


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_environment_says_where_and_what(root: Path) -> None:
    found = environment.environment(CPU)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["vizoo"] == vizoo.__version__
    assert found["device"] == environment.cpu_name() != ""
    assert found["driver"] is None
    if (root / ".git").exists():
        assert len(found["commit"].rstrip("+")) == 12
    json.dumps(found)


def test_missing_programs_are_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.driver_version() is None
    assert environment.commit() is None


@pytest.mark.gpu
def test_on_a_gpu(tiny_model: str) -> None:
    found = benchmark(tiny_model, mode="training", batch_size=4, steps=2, warmup=1)
    assert isinstance(found, Measurement)
    assert (found.error, found.dtype) == ("", "bfloat16")
    assert found.peak_memory is not None
    assert found.peak_memory > 4 * 3 * 32 * 32 * 4
