"""Configs: finding them by name, changing single values with checks, and telling two apart."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config import config as mmengine_config

from vizoo.backbones.base import nearest

SHORTHANDS = {
    "data_root": ("train_dataloader.dataset.root", "val_dataloader.dataset.root"),
    "num_classes": ("model.num_classes", "model.backbone.num_classes", "model.mixup.num_classes"),
    "batch_size": ("train_dataloader.batch_size", "val_dataloader.batch_size"),
    "workers": ("train_dataloader.num_workers", "val_dataloader.num_workers"),
    "epochs": ("train_cfg.max_epochs",),
    "iters": ("train_cfg.max_iters",),
    "lr": ("optim_wrapper.optimizer.lr",),
}
"""Short names for what is set most, some of it in two places; parts that a config leaves out are passed over."""
DATA_ROOT = "data_root"
"""Where a config states it at its top, every text that is or lies below it follows when it is set."""
BY_NAME = {"drop_path": "drop_path_rate", "dilations": "dilations", "n_win": "n_win"}
"""Tables at the top of a config that takes any backbone: values of an argument by the beginning of its name."""
SPARED = "not_decayed"
"""A table like those, of what is not decayed beside what a config names already, if it names anything."""
FREE = ("model.backbone",)
"""Below these, keys may be new: `vizoo.create_model` checks them itself, and names the nearest."""


def list_configs() -> list[str]:
    """Names of the configs that come with vizoo, such as `imagenet/swin_tiny_patch4_window7_224`."""
    root = Path(str(files("vizoo.configs")))
    found = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in found if not any(part.startswith("_") for part in name.split("/")))


def config_path(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: A path to a Python file, or a name as `list_configs` gives it; the folder may be left out of a name.

    Raises:
        ValueError: No such config; names the nearest.
        FileNotFoundError: A path to a file that is not there.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"there is no config file {path}")
        return path
    known = list_configs()
    matches = [known_name for known_name in known if known_name == str(name) or known_name.split("/")[-1] == str(name)]
    if len(matches) != 1:
        raise ValueError(f"unknown config {str(name)!r}; {nearest(str(name), known)}")
    return Path(str(files("vizoo.configs"))) / f"{matches[0]}.py"


def config_title(name: str | Path) -> str:
    """Short name of a config for folders: `imagenet/swin_tiny_patch4_window7_224`, or the stem of a file."""
    path = config_path(name).resolve()
    root = Path(str(files("vizoo.configs"))).resolve()
    return path.relative_to(root).with_suffix("").as_posix() if path.is_relative_to(root) else path.stem


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config, with single values changed.

    Args:
        name: As for `config_path`.
        overrides: `key=value` pairs; keys are dotted (`optim_wrapper.optimizer.lr=1e-4`, list entries by number), or
            one of `SHORTHANDS`.

    Returns:
        Plain values only: classes are named by their import path.

    Raises:
        ValueError: Unknown config, malformed pair, or a value of another type than the one it replaces.
        KeyError: A key that the config does not have; names the nearest.
        FileNotFoundError: A path to a file that is not there.
    """
    path = config_path(name)
    with _bases_found():
        lazy = Config.fromfile(str(path), lazy_import=True) if _is_lazy(path) else Config.fromfile(str(path))
    config = Config(lazy.to_dict(), filename=str(path))
    for pair in overrides:
        key, found, text = pair.partition("=")
        if not found or not key.strip():
            raise ValueError(f"a setting must be written key=value, got {pair!r}")
        if key.strip() == DATA_ROOT and DATA_ROOT in config:
            _move_data(config, text.strip())
            continue
        for place in _places(config, key.strip()):
            set_value(config, place, _parse(text.strip()))
    _fill_by_name(config)
    return config


def _move_data(config: Config, root: str) -> None:
    """Replace the data's folder at the beginning of every text that begins with it."""
    old = config[DATA_ROOT]
    for key, value in list(walk(config)):
        if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
            set_value(config, key, root.rstrip("/") + value[len(old) :])


def _fill_by_name(config: Config) -> None:
    """Give the backbone what the config's tables have for its name, unless it states that itself."""
    backbone = config.get("model", {}).get("backbone", {})
    for title, setting in BY_NAME.items():
        table = config.get(title)
        if table and setting not in backbone and (start := _fitting(table, backbone["name"])):
            backbone[setting] = table[start]
    table, options = config.get(SPARED), config.get("optim_wrapper", {}).get("paramwise_cfg", {})
    if table and options.get(SPARED) and (start := _fitting(table, backbone["name"])):
        options[SPARED] = tuple(dict.fromkeys((*options[SPARED], *table[start])))  # a saved config has them


def _fitting(table: Iterable[str], name: str) -> str:
    """The longest beginning of a name that a table has; nothing if it has none."""
    return max((start for start in table if re.match(rf"{re.escape(start)}(_|\.|$)", name)), key=len, default="")


def _places(config: Config, key: str) -> Sequence[str]:
    """The keys that a setting changes."""
    known = {name for name, _ in walk(config)}
    return [place for place in SHORTHANDS.get(key, ()) if place in known] or [key]


@contextmanager
def _bases_found() -> Iterator[None]:
    """Let `with read_base():` import configs of packages.

    mmengine asks pkg_resources where a package lies, which setuptools no longer has, and which an editable install of a
    package that maps its folders would answer wrongly.
    """
    original = mmengine_config.get_installed_path
    mmengine_config.get_installed_path = _package_folder
    try:
        yield
    finally:
        mmengine_config.get_installed_path = original


def _package_folder(package: str) -> str:
    if package == "vizoo":
        return str(Path(str(files("vizoo.configs"))).parent)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"a config is based on one of the package {package!r}, which is not installed")
    return str(Path(spec.origin).parent)


def _is_lazy(path: Path) -> bool:
    """Whether a config imports what it names; the resolved configs saved with runs do not."""
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(path.read_text())))


def _parse(text: str) -> Any:
    """A Python literal where the text is one, else the text; `true`, `false` and `null` too."""
    spoken = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in spoken:
        return spoken[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_value(config: Config, key: str, value: Any) -> None:
    """Replace one value of a config.

    Raises:
        KeyError: The key does not exist; names the nearest.
        ValueError: The new value is of another type.
    """
    *parents, leaf = key.split(".")
    place: Any = config
    for part in parents:
        place = _child(place, part, key, config)
    if ".".join(parents) in FREE and isinstance(place, dict) and leaf not in place:
        place[leaf] = value
        return
    old = _child(place, leaf, key, config)
    new = _checked(key, old, value)
    if isinstance(place, list):
        place[int(leaf)] = new
    elif isinstance(place, tuple):
        raise ValueError(f"{key} is one entry of a tuple: set the whole tuple {'.'.join(parents)}")
    else:
        place[leaf] = new


def _child(place: Any, part: str, key: str, config: Config) -> Any:
    if isinstance(place, list | tuple) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict | Config) and part in place:
        return place[part]
    raise KeyError(f"the config has no key {key!r}; {_hint(key, [name for name, _ in walk(config)])}")


def _hint(key: str, known: list[str]) -> str:
    """The nearest keys; a right last part counts, wherever it stands."""
    leaf = key.rsplit(".", 1)[-1]
    same = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    short = difflib.get_close_matches(key, list(SHORTHANDS), n=1, cutoff=0.6)
    found = list(dict.fromkeys(short + same[:2] + close))[:3]
    return (
        f"did you mean {' or '.join(map(repr, found))}?" if found else nearest(key, [n for n in known if "." not in n])
    )


def _checked(key: str, old: Any, value: Any) -> Any:
    """The value in the type of the one it replaces."""
    if old is None or value is None or (isinstance(old, bool) and isinstance(value, bool | dict)):
        return value
    if isinstance(old, bool) or isinstance(value, bool):
        if isinstance(old, bool) == isinstance(value, bool):
            return value
    elif isinstance(old, float) and isinstance(value, int):
        return float(value)
    elif isinstance(old, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(old, list | tuple) and isinstance(value, list | tuple):
        return type(old)(value)
    elif isinstance(value, type(old)) or (isinstance(old, dict) and isinstance(value, dict)):
        return value
    raise ValueError(f"{key} is {_kind(old)} ({old!r}), so it cannot become {_kind(value)} ({value!r})")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a dict"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def walk(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config with its value, inner ones too."""
    if isinstance(value, dict | Config):
        entries = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(str(i), v) for i, v in enumerate(value)]
    else:
        return
    for name, child in entries:
        key = f"{prefix}.{name}" if prefix else name
        yield key, child
        yield from walk(child, key)


def differences(old: Config, new: Config) -> list[str]:
    """One line per value that differs between two configs, as `key: old -> new`."""
    before, after = ({k: v for k, v in walk(c) if not isinstance(v, dict | list | tuple)} for c in (old, new))
    missing = "(none)"
    keys = [k for k in {**before, **after} if before.get(k, missing) != after.get(k, missing)]
    return [f"{k}: {before.get(k, missing)} -> {after.get(k, missing)}" for k in keys]
