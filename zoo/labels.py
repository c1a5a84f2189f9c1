"""Names of the classes behind a classifier's outputs, and the rows that two classifiers have in common."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vizoo.backbones.base import nearest

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABEL_SETS = ("digits", "imagenet-1k", "imagenet-22k")

# 21843 synsets have a name, 21841 of them images. Microsoft's lists put the last two into the two places without.
IMAGENET_22K_CLASSES = 21841
WITHOUT_IMAGES = (9205, 15027)

# The teddy bear is the one class of ImageNet-1K that ImageNet-22K lacks; the published map takes another sense of
# the word, the chemise, in its place.
STAND_INS = {"n04399382": "n03013580"}


def class_names(label_set: str) -> list[str]:
    """Readable names, one for each output of a classifier, in the order of its outputs.

    Args:
        label_set: `imagenet-1k` (1000 classes), `imagenet-22k` (the 21841 of the official 22K checkpoints) or `digits`.

    Raises:
        ValueError: An unknown label set.
    """
    if label_set == "digits":
        return list(DIGITS)
    names = _lemmas()
    return [names[synset] for synset in synsets(label_set)]


def synsets(label_set: str) -> list[str]:
    """WordNet numbers (`n01440764`) of an ImageNet label set, in the order of a classifier's outputs.

    Raises:
        ValueError: An unknown label set, or one that is not made of WordNet synsets.
    """
    if label_set not in LABEL_SETS:
        raise ValueError(f"unknown label set {label_set!r}; {nearest(label_set, LABEL_SETS)}")
    if label_set == "digits":
        raise ValueError("the label set 'digits' has no WordNet synsets; 'imagenet-1k' and 'imagenet-22k' have")
    return list(_imagenet_1k() if label_set == "imagenet-1k" else _imagenet_22k())


def subset_rows(source: str, target: str) -> list[int]:
    """Rows of a classifier over `source` that are the classes of `target`, in the order of `target`.

    From `imagenet-22k` to `imagenet-1k` these are the rows of the published map: exact for 999 classes, a stand-in for
    the teddy bear, which the larger set lacks.

    Raises:
        ValueError: An unknown label set, or a target with classes that the source lacks.
    """
    position = {synset: row for row, synset in enumerate(synsets(source))}
    wanted = [synset if synset in position else STAND_INS.get(synset, synset) for synset in synsets(target)]
    missing = [synset for synset in wanted if synset not in position]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} classes of {target}, the first is {missing[0]}")
    return [position[synset] for synset in wanted]


def _read(name: str) -> list[str]:
    """Lines of a file that timm ships, read without the seconds that importing timm takes."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        raise ModuleNotFoundError(
            "the names of ImageNet's classes come with timm, which is not installed: pip install timm"
        )
    return (Path(timm.origin).parent / "data" / "_info" / name).read_text("utf-8").splitlines()


@cache
def _imagenet_1k() -> tuple[str, ...]:
    return tuple(_read("imagenet_synsets.txt"))


@cache
def _imagenet_22k() -> tuple[str, ...]:
    """The order of Microsoft's 21841-class heads, which is not the sorted one that timm assumes for them."""
    named = _read("imagenet21k_goog_synsets.txt")
    order, rest = named[:IMAGENET_22K_CLASSES], named[IMAGENET_22K_CLASSES:]
    for place, synset in zip(WITHOUT_IMAGES, rest, strict=True):
        order[place] = synset
    return tuple(order)


@cache
def _lemmas() -> dict[str, str]:
    lines = [line.partition("\t") for line in _read("imagenet_synset_to_lemma.txt")]
    return {synset: lemma for synset, _, lemma in lines}
