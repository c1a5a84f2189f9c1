"""Every published variant: its size against what the authors print, its records, and its name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vizoo
from vizoo.registry import families, resolve, variants

NAMES = sorted(variants())


@pytest.mark.parametrize("name", NAMES)
def test_size_against_the_published_figures(name: str) -> None:
    card = vizoo.describe(name)
    record = card.default_weights
    variant = resolve(name).variant
    params = record.params if record else variant.params and variant.params * 1e6
    macs = record.macs if record else variant.gmacs and variant.gmacs * 1e9
    if params:
        assert abs(card.params - params) <= 0.6e6, f"{card.params:,} parameters, published {params:,}"
    if macs:
        assert card.macs == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_complete(name: str) -> None:
    found = resolve(name)
    assert found.variant.weights or found.variant.params, f"{name} has neither weights nor a size: why is it a variant?"
    for tag, record in found.variant.weights.items():
        assert record.url.startswith(("https://", "hf://")) or (record.manual and not record.url), tag
        assert record.license, tag
        assert record.repository, tag
        if record.num_classes:
            assert record.labels or "classes" in record.note, tag  # an order that nobody knows has no name
            assert record.input_size[1:] == found.variant.config.image_sides
        with torch.device("meta"):
            model = vizoo.create_model(f"{name}.{tag}")
        assert model.num_classes == record.num_classes


@pytest.mark.parametrize("name", NAMES)
def test_no_url_is_published_twice(name: str) -> None:
    urls = [w.url or w.manual for n, (_, v) in variants().items() for w in v.weights.values() if n == name]
    others = {w.url or w.manual for n, (_, v) in variants().items() for w in v.weights.values() if n != name}
    assert not others & set(urls)
    assert len(set(urls)) == len(urls)


def test_list_models() -> None:
    assert vizoo.list_models("swin_tiny*224") == ["swin_tiny_patch4_window7_224"]
    assert vizoo.list_models("window12to24") == [n for n in NAMES if "window12to24" in n]
    assert vizoo.list_models(family="swin") == sorted(families()["swin"].variants)
    assert "swin_base_patch4_window7_224.in22k" in vizoo.list_models("swin_base*", pretrained=True)
    assert vizoo.list_models(mixer="window attention") == NAMES or len(families()) > 2
    with pytest.raises(ValueError, match="unknown family 'swim'; did you mean 'swin'"):
        vizoo.list_models(family="swim")
    with pytest.raises(ValueError, match="unknown mixer 'window'; did you mean 'window attention'"):
        vizoo.list_models(mixer="window")


def test_names_and_tags() -> None:
    with pytest.raises(
        ValueError, match="unknown model 'swin_tini_patch4_window7_224'; did you mean 'swin_tiny_patch4"
    ):
        vizoo.create_model("swin_tini_patch4_window7_224")
    with pytest.raises(
        ValueError, match=r"swin_tiny_patch4_window7_224 has no weights tagged 'in21k'; did you mean 'in1k' or 'in22k'"
    ):
        vizoo.create_model("swin_tiny_patch4_window7_224.in21k")
    official = resolve("swin_base_patch4_window7_224_22kto1k")
    assert (official.name, official.tag) == ("swin_base_patch4_window7_224", "in22k_ft_in1k")


def test_arguments_of_create_model() -> None:
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(TypeError, match="SwinConfig has no field 'window'; did you mean 'window_size'"):
        vizoo.create_model(name, window=12)
    with pytest.raises(TypeError, match=r"create_model\(\) has no argument 'num_class'; did you mean 'num_classes'"):
        vizoo.create_model(name, num_class=10)
    with pytest.raises(
        ValueError, match="num_heads must divide the stage's channels, got 5 heads for 96 channels; nearest"
    ):
        vizoo.create_model(name, num_heads=(5, 6, 12, 24))
    with pytest.raises(ValueError, match="pretrained=True and checkpoint_path exclude each other"):
        vizoo.create_model(name, pretrained=True, checkpoint_path="x.pth")
    with pytest.raises(ValueError, match="out_indices goes with features_only=True"):
        vizoo.create_model(name, out_indices=(0,))
    with pytest.raises(ValueError, match="has no classifier, got num_classes=7"):
        vizoo.create_model(name, features_only=True, num_classes=7)
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        vizoo.create_model(name, num_classes=-1)
    with pytest.raises(ValueError, match="in_chans must be 1 or more, got 0"):
        vizoo.create_model(name, in_chans=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (2, 2)}, "depths and num_heads need one entry per stage"),
        ({"depths": (0, 1, 1, 1)}, "must be positive"),
        ({"window_size": 1}, "window_size must be at least 2, got 1"),
        (
            {"num_heads": (0, 6, 12, 24)},
            "num_heads must divide the stage.s channels, got 0 heads for 96 channels; nearest",
        ),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": 16}, "img_size must be at least 32 on both sides, got 16"),
    ],
)
def test_impossible_configurations(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("swin_tiny_patch4_window7_224", **override)
    with pytest.raises(ValueError, match="pretrained_windows needs one entry per stage"):
        vizoo.create_model("swinv2_tiny_patch4_window8_256", pretrained_windows=(1, 0, 0, 0))


def test_configurations_are_frozen_values() -> None:
    for name in NAMES:
        config = resolve(name).variant.config
        assert dataclasses.is_dataclass(config)
        assert hash(config) == hash(dataclasses.replace(config))
