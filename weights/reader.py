"""Reading a checkpoint file into a state dict without ever running code from it.

A `torch.save` file is a pickle, which may name any function to be called while it is read. torch's own reader
(`weights_only=True`) refuses all but the few that build tensors. Official files often keep their training
configuration beside the weights, as objects of yacs, argparse, mmengine and the like, and would be refused for that.
Objects of those packages are replaced, by name, with inert stand-ins: nothing of the package is imported, nothing of
it runs, and the reader stays torch's. All else stays refused, unless the user converts a file explicitly
(`convert_trusted`).
"""

from __future__ import annotations

import pickle
import pickletools
import re
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError, UnsafeCheckpointError

CONTAINERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "params",
    "model_ema",
    "state_dict_ema",
    "net_E",
)

# Packages whose objects are training configuration or logs, never weights.
HARMLESS = {"addict", "argparse", "datetime", "easydict", "fvcore", "mmcv", "mmengine", "ml_collections", "numpy"}
HARMLESS |= {"omegaconf", "pathlib", "yacs"}
# What those objects use while they are rebuilt.
BUILTINS = ("dict", "float", "getattr", "int", "list", "object", "slice", "str", "tuple")
HELPERS = {"collections.defaultdict", "copyreg._reconstructor", *(f"builtins.{name}" for name in BUILTINS)}
# Classes derived from dict: torch fills only a plain one, so that is what stands in.
DICT_LIKE = ("AttrDict", "CfgNode", "ConfigDict", "Dict", "EasyDict", "defaultdict")

# Names that torch itself rebuilds tensors from; only used to word a refusal.
_TENSOR_PARTS = re.compile(
    r"torch\.(\w+|_utils\.\w+|_tensor\.\w+|storage\.\w+|nn\.parameter\.\w+|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
_PROTOCOL_MARK = b"\x80"
_ZIP_MARK = b"PK\x03\x04"
_safe_globals_lock = threading.Lock()  # torch keeps its list of allowed names in one global


def read_state_dict(
    path: str | Path, container: str | tuple[str, ...] | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or `torch.save` file, on the CPU.

    Args:
        path: The file. Its format is told by its content, not by its name.
        container: Key of the state dict inside the file. Several, or None for `CONTAINERS`, find it: the first that
            holds tensors, else the file itself. A safetensors file has none, so the argument does not matter there.
        prefix: Keeps only the keys below this prefix, and removes it from them.

    Returns:
        Name to tensor, in the order of the file. Entries that are not tensors are left out: they cannot be weights.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint, is damaged, or lacks the container, the prefix or any tensor.
        UnsafeCheckpointError: If the file asks for code to be run.
    """
    path = Path(path)
    contents = _load(path)
    return _below(_tensors(_open_container(contents, container, path), path), prefix, path)


def check_file(path: str | Path) -> None:
    """Check that a file is a complete checkpoint, including one that would be refused as unsafe.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is truncated, damaged or something else, such as a web page.
    """
    try:
        _load(Path(path))
    except UnsafeCheckpointError:
        return


def convert_trusted(source: str | Path, target: str | Path, container: str | tuple[str, ...] | None = None) -> None:
    """Convert a pickle to safetensors by running whatever the pickle asks for. Only for a file from a trusted author.

    Args:
        source: A file that `read_state_dict` refuses as unsafe.
        target: The safetensors file to write, which is then read without any trust.
        container: Key of the state dict inside the file, as in `read_state_dict`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read, for instance because a package it uses is not installed.
    """
    source = Path(source)
    if _is_safetensors(source):
        contents: Any = _load(source)
    else:
        _check_shape(source)
        with _worded(source):
            contents = torch.load(source, map_location="cpu", weights_only=False)
    state = _tensors(_open_container(contents, container, source), source)
    # safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, target)


def _load(path: Path) -> Any:
    """Everything that the file holds, with inert stand-ins for harmless objects."""
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is a damaged or truncated safetensors file ({error}); fetch it again"
            ) from error
    _check_shape(path)
    with _worded(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            with _standing_in({name for name in _globals(path) if _is_harmless(name)}):
                return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _worded(path: Path) -> Iterator[None]:
    """Turn what `torch.load` raises into errors that a user can act on."""
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = sorted(name for name in _globals(path) if not (_is_harmless(name) or _TENSOR_PARTS.fullmatch(name)))
        if not refused:
            raise CheckpointError(f"{path} is a damaged checkpoint ({_first_line(error)}); fetch it again") from error
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors: reading it would need {_some(refused)}, which could run arbitrary code. "
            "It was refused and nothing of it was executed. If you trust its author, convert it once with "
            "`vizoo weights import NAME FILE --trust`"
        ) from error
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} holds objects of {error.name!r}; install that package to convert it") from error
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise CheckpointError(f"{path} is a damaged checkpoint ({_first_line(error)}); fetch it again") from error


def _is_safetensors(path: Path) -> bool:
    """By suffix, or by its start: 8 bytes of header length, then the JSON header."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _check_shape(path: Path) -> None:
    """Tell a pickle or zip from anything else before torch sees it, since torch's own errors do not."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if start.startswith(_ZIP_MARK):
        if not zipfile.is_zipfile(path):  # the directory of a zip stands at its end
            raise CheckpointError(f"{path} is truncated: its end is missing; fetch it again")
    elif not start.startswith(_PROTOCOL_MARK):
        kind = "a web page" if start.lstrip().startswith(b"<") else f"something else, starting with {start[:12]!r}"
        raise CheckpointError(f"{path} is not a checkpoint (torch.save or safetensors) but {kind}")


def _open_container(contents: Any, container: str | tuple[str, ...] | None, path: Path) -> Mapping[str, Any]:
    """The state dict inside the file: the one under `container`, or the one found when that is no single name."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} must hold a dict of tensors, it holds a {type(contents).__name__}")
    if not isinstance(container, str) or _is_safetensors(path):
        names = container if isinstance(container, tuple) else CONTAINERS
        return next((contents[name] for name in names if _has_tensors(contents.get(name))), contents)
    if container not in contents:
        close = get_close_matches(container, map(str, contents), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise CheckpointError(f"{path} has no container {container!r}; it holds {_some(contents)}{hint}")
    found = contents[container]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: container {container!r} must be a dict of tensors, not {type(found).__name__}")
    return found


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _tensors(entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    state = {str(name): value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors where the weights should be, only {_some(entries)}")
    return state


def _below(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    below = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not below:
        raise CheckpointError(f"{path} has no key below {prefix!r}; its keys are {_some(state)}")
    return below


class _Inert:
    """Takes the place of a harmless object: accepts any arguments and state, keeps none and does nothing."""

    def __new__(cls, *args: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _InertDict:
    """Takes the place of a class derived from dict. torch's reader stores items into a plain dict only."""

    def __new__(cls, *args: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


@contextmanager
def _standing_in(names: set[str]) -> Iterator[None]:
    """Let torch read objects of these names, as stand-ins."""
    stand_ins = [(_InertDict if name.rsplit(".", 1)[-1] in DICT_LIKE else _Inert, name) for name in sorted(names)]
    with _safe_globals_lock, torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
        yield


def _globals(path: Path) -> set[str]:
    """Names of all classes and functions in a pickle, found without executing it; empty where it cannot be parsed."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:  # the older format: three short pickles, then the contents
                return {name for _ in range(4) for name in _globals_of_pickle(file)}
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.split("/")[-1] == "data.pkl")
            with archive.open(entry) as file:
                return set(_globals_of_pickle(file))
    except (ValueError, StopIteration, zipfile.BadZipFile):
        return set()


def _globals_of_pickle(file: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and argument is not None:
            module, name = argument.split(" ", 1)  # Python 2's names, which protocol 2 uses
            yield ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def _is_harmless(name: str) -> bool:
    return name in HELPERS or name.split(".")[0] in HARMLESS


def _some(names: Iterable[object]) -> str:
    """At most ten names, quoted, for a message."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
