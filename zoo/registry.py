"""The names of the zoo: collects every family in `vizoo.backbones` on first use, and finds variants and weights."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import PurePosixPath

import vizoo.backbones
from vizoo.backbones.base import Backbone, Family, Variant, nearest
from vizoo.weights.record import Weights

_NOT_FAMILIES = ("base", "fusing", "hosts", "layers", "progressive_norm")


@dataclass(frozen=True)
class Resolved:
    """What a model name stands for; `tag` is None where the name gave none and no weights are published."""

    family: Family
    name: str
    variant: Variant
    tag: str | None
    explicit_tag: bool

    @property
    def weights(self) -> Weights | None:
        """The checkpoint that the name stands for."""
        return self.variant.weights[self.tag] if self.tag else None


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name.

    Raises:
        RuntimeError: A family file has no FAMILY, nor FAMILIES, or two families publish the same variant.
    """
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(vizoo.backbones.__path__):
        if module.name in _NOT_FAMILIES:
            continue
        file = importlib.import_module(f"vizoo.backbones.{module.name}")
        for family in getattr(file, "FAMILIES", (getattr(file, "FAMILY", None),)):
            if not isinstance(family, Family):
                raise RuntimeError(
                    f"backbones/{module.name}.py must end in FAMILY = Family(...), or in FAMILIES, several of them"
                )
            found[family.name] = family
    return found


@functools.cache
def variants() -> dict[str, tuple[Family, Variant]]:
    """Every variant by name, with its family."""
    found: dict[str, tuple[Family, Variant]] = {}
    for family in families().values():
        for name, variant in family.variants.items():
            if name in found:
                raise RuntimeError(f"variant {name!r} is published by both {found[name][0].name} and {family.name}")
            found[name] = (family, variant)
    return found


@functools.cache
def _official_files() -> dict[str, tuple[str, str]]:
    """(variant, tag) by the stem of the official checkpoint's file name, where it isn't a variant's own name.

    Files to be fetched by hand have no name, and on some hosts, as on the Hugging Face hub, all
    files have the same.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, (_, variant) in variants().items():
        for tag, record in variant.weights.items():
            if record.url and not record.url.startswith("hf://"):
                found.setdefault(PurePosixPath(record.filename).stem, []).append((name, tag))
    return {stem: places[0] for stem, places in found.items() if len(places) == 1}


def resolve(name: str) -> Resolved:
    """Find what `variant`, `variant.tag` or the name of an official checkpoint file stands for.

    Raises:
        ValueError: There is no such variant or tag; names the nearest.
    """
    base, _, tag = name.partition(".")
    if base not in variants() and name in _official_files():
        base, tag = _official_files()[name]
    if base not in variants():
        raise ValueError(f"unknown model {name!r}; {nearest(base, variants())}")
    family, variant = variants()[base]
    if tag and tag not in variant.weights:
        hint = nearest(tag, variant.weights) if variant.weights else "none are published"
        raise ValueError(f"{base} has no weights tagged {tag!r}; {hint}")
    return Resolved(family, base, variant, tag or variant.default_tag, bool(tag))


def list_models(
    pattern: str = "*", *, family: str | None = None, mixer: str | None = None, pretrained: bool = False
) -> list[str]:
    """Names of the zoo's variants, sorted.

    Args:
        pattern: Shell pattern, `swin*224`; matches anywhere in the name when it has no wildcard.
        family: Only variants of this family.
        mixer: Only variants with this kind of token mixer.
        pretrained: List `variant.tag` for every published checkpoint instead of variants.

    Raises:
        ValueError: Unknown family or mixer; names the nearest.
    """
    mixers = {f.mixer for f in families().values()}
    if family is not None and family not in families():
        raise ValueError(f"unknown family {family!r}; {nearest(family, families())}")
    if mixer is not None and mixer not in mixers:
        raise ValueError(f"unknown mixer {mixer!r}; {nearest(mixer, mixers)}")
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = {
        name: variant
        for name, (f, variant) in variants().items()
        if family in (None, f.name) and mixer in (None, f.mixer)
    }
    if pretrained:
        names = [f"{name}.{tag}" for name, variant in chosen.items() for tag in variant.weights]
        return sorted(n for n in names if fnmatch.fnmatch(n, glob) or fnmatch.fnmatch(n.partition(".")[0], glob))
    return sorted(fnmatch.filter(chosen, glob))


def family_of(model: Backbone) -> Family | None:
    """The family whose class built this model; None for a class of the user's own."""
    return next((f for f in families().values() if f.model is type(model)), None)
