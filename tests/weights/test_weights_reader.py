from __future__ import annotations

import argparse
import builtins
import os
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vizoo.weights.errors import CheckpointError, UnsafeCheckpointError
from vizoo.weights.reader import check_file, convert_trusted, read_state_dict

State = dict[str, torch.Tensor]


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def same(found: State, wanted: State) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def saved(path: Path, contents: object, *, zipped: bool = True) -> Path:
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that pickles like yacs.config, which the official Swin code keeps in its checkpoints."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [None, "model"])
def test_reads_what_was_saved(tmp_path: Path, state: State, zipped: bool, container: str | None) -> None:
    path = saved(tmp_path / "a.pth", {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}}, zipped=zipped)
    assert same(read_state_dict(path, container), state)


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "net", "params", "model_ema"])
def test_finds_the_usual_containers(tmp_path: Path, state: State, name: str) -> None:
    assert same(read_state_dict(saved(tmp_path / "a.pth", {"epoch": 3, name: state})), state)


def test_plain_weights_come_before_averaged_ones(tmp_path: Path, state: State) -> None:
    averaged = {name: value + 1 for name, value in state.items()}
    path = saved(tmp_path / "a.pth", {"model_ema": averaged, "model": state})
    assert same(read_state_dict(path), state)
    assert same(read_state_dict(path, "model_ema"), averaged)


def test_several_containers_are_tried_in_order(tmp_path: Path, state: State) -> None:
    averaged, order = {name: value + 1 for name, value in state.items()}, ("model_ema", "model")
    both = saved(tmp_path / "both.pth", {"model": state, "model_ema": averaged})
    assert same(read_state_dict(both, order), averaged)
    for name, contents in {"plain": {"model": state, "model_ema": None}, "bare": state}.items():
        assert same(read_state_dict(saved(tmp_path / f"{name}.pth", contents), order), state)


def test_reads_a_file_that_is_the_state_dict(tmp_path: Path, state: State) -> None:
    assert same(read_state_dict(saved(tmp_path / "a.pth", OrderedDict(state))), state)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_reads_safetensors_whatever_they_are_called(tmp_path: Path, state: State, name: str) -> None:
    save_file(state, tmp_path / name)
    found = read_state_dict(tmp_path / name, "model")
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in state.items()}


def test_keeps_only_what_is_below_the_prefix(tmp_path: Path, state: State) -> None:
    whole = {f"backbone.{name}": value for name, value in state.items()} | {"neck.weight": torch.zeros(1)}
    path = saved(tmp_path / "a.pth", {"state_dict": whole})
    assert same(read_state_dict(path, "state_dict", "backbone."), state)
    with pytest.raises(CheckpointError, match=r"no key below 'encoder\.'; its keys are 'backbone.stem.weight'"):
        read_state_dict(path, "state_dict", "encoder.")


def test_leaves_out_what_is_no_tensor(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {"model": {**state, "version": 2}})
    assert same(read_state_dict(path), state)


def test_parameters_come_out_as_tensors(tmp_path: Path) -> None:
    found = read_state_dict(saved(tmp_path / "a.pth", {"w": torch.nn.Parameter(torch.ones(2))}))
    assert type(found["w"]) is torch.Tensor
    assert not found["w"].requires_grad


@pytest.mark.parametrize("zipped", [True, False])
def test_official_swin_layout_loads_without_yacs(
    tmp_path: Path, state: State, yacs: types.ModuleType, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    config = yacs.CfgNode({"MODEL": {"NAME": "swin", "DEPTHS": [2, 2]}, "TAG": "x"})
    path = saved(tmp_path / "a.pth", {"model": state, "config": config, "epoch": 299}, zipped=zipped)
    monkeypatch.setitem(sys.modules, "yacs.config", None)  # importing it would raise
    assert same(read_state_dict(path, "model"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_beside_the_weights_are_left_out(tmp_path: Path, state: State, zipped: bool) -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    counts["seen"] += 1
    extras = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(names=["a"])),
        "best": np.float64(81.2),
        "history": np.arange(4),
        "output": Path("runs"),
        "counts": counts,
    }
    path = saved(tmp_path / "a.pth", {"model": state, **extras}, zipped=zipped)
    assert same(read_state_dict(path, "model"), state)


def test_mmengine_checkpoint_loads(tmp_path: Path, state: State) -> None:
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    hub = {"log_scalars": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}}
    path = saved(tmp_path / "a.pth", {"state_dict": state, "message_hub": hub, "cfg": ConfigDict(a={"b": 1})})
    assert same(read_state_dict(path), state)


def test_stand_ins_do_not_outlive_the_reading(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {"model": state, "args": argparse.Namespace(lr=0.1)})
    before = set(torch.serialization.get_safe_globals())
    read_state_dict(path)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, f"{os.name}.system"), (builtins.exec, "builtins.exec"), (torch.hub.load, "torch.hub.load")],
)
def test_malicious_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, state: State, function: Callable[..., Any], name: str, zipped: bool
) -> None:
    trace = tmp_path / "trace"
    command = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w').close()"
    contents = {"model": state, "args": argparse.Namespace(x=1), "evil": Calls(function, command)}
    path = saved(tmp_path / "a.pth", contents, zipped=zipped)
    with pytest.raises(UnsafeCheckpointError, match=f"would need '{name}', which could run arbitrary code") as caught:
        read_state_dict(path)
    assert "refused and nothing of it was executed" in str(caught.value)
    assert "vizoo weights import NAME FILE --trust" in str(caught.value)
    assert not trace.exists()
    check_file(path)  # refused, but whole


def test_function_of_a_harmless_package_does_not_run_either(tmp_path: Path, state: State) -> None:
    """numpy has functions that run code; a pickle that calls one gets a stand-in, which does nothing."""
    from numpy.testing._private.utils import runstring

    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    path = saved(tmp_path / "a.pth", {"model": state, "evil": Calls(runstring, code, {})})
    assert same(read_state_dict(path), state)
    assert not trace.exists()


def test_getattr_of_a_pickle_reaches_nothing(tmp_path: Path, state: State) -> None:
    evil = Calls(getattr, Calls(getattr, np.ndarray, "__class__"), "__subclasses__")
    path = saved(tmp_path / "a.pth", {"model": state, "evil": evil})
    assert same(read_state_dict(path), state)


def test_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(tmp_path: Path, state: State, zipped: bool) -> None:
    path = saved(tmp_path / "a.pth", {"model": state}, zipped=zipped)
    whole = path.read_bytes()
    for keep in (len(whole) - 1000, 600, 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"a\.pth is (truncated|a damaged checkpoint).*fetch it again"):
            read_state_dict(path)
        with pytest.raises(CheckpointError, match="fetch it again"):
            check_file(path)


def test_truncated_safetensors(tmp_path: Path, state: State) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated safetensors file"):
        read_state_dict(path)


def test_flipped_bytes_in_the_pickle(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {"model": state}, zipped=False)
    garbled = bytearray(path.read_bytes())
    garbled[150:200] = b"\xff" * 50
    path.write_bytes(garbled)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "not a checkpoint .* but a web page"),
        (b"version https://git-lfs", r"not a checkpoint .* starting with b'version http'"),
        (b"\x80\x02garbage", "damaged checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        read_state_dict(tmp_path / "a.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_state_dict(tmp_path / "absent.pth")


def test_missing_container_names_what_is_there(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {"models": state, "epoch": 1})
    with pytest.raises(
        CheckpointError, match="no container 'model'; it holds 'models', 'epoch'; did you mean 'models'"
    ):
        read_state_dict(path, "model")


@pytest.mark.parametrize(
    ("contents", "container", "message"),
    [
        ({"model": 3}, "model", "container 'model' must be a dict of tensors, not int"),
        ({"model": {"lr": 0.1}}, "model", "holds no tensors where the weights should be, only 'lr'"),
        ({"epoch": 3}, None, "holds no tensors where the weights should be, only 'epoch'"),
        ([1, 2], None, "must hold a dict of tensors, it holds a list"),
        ({str(i): i for i in range(15)}, "model", "'9' and 5 more"),
    ],
)
def test_no_tensors(tmp_path: Path, contents: object, container: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(saved(tmp_path / "a.pth", contents), container)


def test_trusted_conversion_reads_without_trust(tmp_path: Path, state: State) -> None:
    tied = {**state, "tied": state["stem.weight"], "turned": state["stem.weight"].T}
    path = saved(tmp_path / "a.pth", {"model": tied, "odd": Calls(types.SimpleNamespace)})
    with pytest.raises(UnsafeCheckpointError, match="SimpleNamespace"):
        read_state_dict(path)
    convert_trusted(path, tmp_path / "b.safetensors", "model")
    found = read_state_dict(tmp_path / "b.safetensors", "model")
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in tied.items()}


def test_trusted_conversion_names_the_missing_package(
    tmp_path: Path, state: State, yacs: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.pth", {"model": state, "config": yacs.CfgNode({"a": 1})})
    monkeypatch.delitem(sys.modules, "yacs.config")
    with pytest.raises(CheckpointError, match=r"holds objects of 'yacs.*install that package"):
        convert_trusted(path, tmp_path / "b.safetensors")


def test_trusted_conversion_of_safetensors(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "a.safetensors")
    convert_trusted(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert read_state_dict(tmp_path / "b.safetensors").keys() == state.keys()
