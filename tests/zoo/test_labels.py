from __future__ import annotations

import hashlib

import pytest

from vizoo import labels
from vizoo.labels import class_names, subset_rows, synsets

# The first rows of Swin's published map, those around its two irregular places, the teddy bear, and the last.
PUBLISHED = {
    0: 359,
    1: 368,
    2: 460,
    717: 9204,
    718: 9212,
    849: 11137,
    850: 5564,
    851: 11168,
    981: 14965,
    982: 15732,
    999: 21817,
}


def test_lengths_and_uniqueness() -> None:
    for name, length in (("digits", 10), ("imagenet-1k", 1000), ("imagenet-22k", 21841)):
        assert len(class_names(name)) == length
    assert len(set(synsets("imagenet-22k"))) == 21841


def test_readable_names() -> None:
    names = class_names("imagenet-1k")
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[850] == "teddy, teddy bear"
    assert class_names("digits")[7] == "seven"


def test_imagenet_22k_is_microsofts_order_and_not_the_sorted_one() -> None:
    order = synsets("imagenet-22k")
    # The two synsets without images gave their places to the last two of the 21843 named ones.
    assert (order[9205], order[15027]) == ("n15102455", "n15102894")
    rest = order[:9205] + order[9206:15027] + order[15028:]
    assert rest == sorted(rest)
    assert {"n03931044", "n09859684"}.isdisjoint(order)


def test_rows_of_the_1k_classes_are_those_of_the_published_map() -> None:
    rows = subset_rows("imagenet-22k", "imagenet-1k")
    assert len(rows) == len(set(rows)) == 1000
    assert {i: rows[i] for i in PUBLISHED} == PUBLISHED
    text = "".join(f"{row}\n" for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("844b5d131d31b69f")


def test_rows_carry_the_same_synset_but_for_the_teddy_bear() -> None:
    large, small = synsets("imagenet-22k"), synsets("imagenet-1k")
    rows = subset_rows("imagenet-22k", "imagenet-1k")
    assert [i for i in range(1000) if large[rows[i]] != small[i]] == [850]
    assert class_names("imagenet-22k")[rows[850]].endswith("teddy")
    assert subset_rows("imagenet-1k", "imagenet-1k") == list(range(1000))


def test_the_caller_may_change_the_list() -> None:
    synsets("imagenet-1k").clear()
    class_names("digits").clear()
    assert len(synsets("imagenet-1k")) == 1000
    assert len(class_names("digits")) == 10


def test_an_unknown_label_set_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown label set 'imagenet1k'; did you mean 'imagenet-1k'"):
        class_names("imagenet1k")


def test_a_set_without_synsets() -> None:
    with pytest.raises(ValueError, match="'digits' has no WordNet synsets"):
        subset_rows("digits", "imagenet-1k")


def test_a_target_that_is_no_subset() -> None:
    with pytest.raises(ValueError, match=r"imagenet-1k lacks 208\d\d classes of imagenet-22k, the first is n00004475"):
        subset_rows("imagenet-1k", "imagenet-22k")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        labels._read("imagenet_synsets.txt")
