"""The zoo in timm, and through it in segmentation-models-pytorch: the real libraries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vizoo
from vizoo.registry import families, resolve, variants
from vizoo.weights.errors import UnverifiedWeightsWarning
from vizoo.weights.store import import_file

FAMILIES = sorted(families())
# The families whose maps have the strides that decoders count on.
PYRAMIDS = [
    f
    for f in FAMILIES
    if [s.stride for s in vizoo.describe(next(iter(families()[f].variants))).stages] == [4, 8, 16, 32]
]
SWIN = "swin_tiny_patch4_window7_224"


def first(family: str) -> str:
    """A variant of the family."""
    return next(iter(families()[family].variants))


def tiny(family: str) -> dict[str, Any]:
    """Overrides that make it run in milliseconds."""
    return dict(families()[family].tiny)


def reached(module: nn.Module) -> set[str]:
    """Names of the parameters that a backward pass has come to; a gradient may be zero in a new model."""
    return {name for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.fixture
def timm() -> Any:
    """timm, knowing the zoo."""
    module = pytest.importorskip("timm")
    vizoo.register_timm()
    return module


@pytest.fixture
def timm_tiny(timm: Any, tiny_model: str, official_file: Path) -> Iterator[str]:
    """timm's name of the tiny model, whose weights lie in the cache; forgotten by timm behind the test."""
    import_file(resolve(tiny_model).variant.weights["plain"], official_file)
    vizoo.register_timm()
    yield f"vizoo_{tiny_model}"
    forget(f"vizoo_{tiny_model}")


def forget(name: str) -> None:
    """Take a model out of timm's registry, which has no public way to do so."""
    from timm.models import _registry

    from vizoo import timm_bridge

    _registry._model_entrypoints.pop(name)
    for table in (_registry._model_to_module, _registry._model_default_cfgs, _registry._model_with_tags):
        table.pop(name, None)
    for names in (*_registry._module_to_models.values(), _registry._model_has_pretrained):
        names.discard(name)
    timm_bridge.__all__.remove(name)


def test_timm_knows_every_variant_however_often_it_is_told(timm: Any) -> None:
    expected = sorted(f"vizoo_{name}" for name in variants())
    assert vizoo.register_timm() == vizoo.register_timm() == expected
    assert sorted(timm.list_models("vizoo_*")) == expected
    from vizoo import timm_bridge

    assert set(expected) < set(timm_bridge.__all__)
    assert all(hasattr(timm_bridge, name) for name in timm_bridge.__all__)


def test_timm_knows_the_published_weights(timm: Any) -> None:
    pretrained = timm.list_models("vizoo_swin*", pretrained=True)
    assert f"vizoo_{SWIN}.in1k" in pretrained
    record = resolve(f"{SWIN}.in1k").weights
    cfg = timm.get_pretrained_cfg(f"vizoo_{SWIN}")
    assert (cfg.tag, cfg.url, cfg.crop_pct, cfg.mean) == ("in1k", record.url, record.crop_pct, record.mean)
    without = next(name for name, (_, variant) in variants().items() if not variant.weights)
    assert f"vizoo_{without}" not in timm.list_models("vizoo_*", pretrained=True)
    assert timm.get_pretrained_cfg(f"vizoo_{without}").input_size[0] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_builds_the_model_itself(timm: Any, family: str) -> None:
    name = first(family)
    options = {**tiny(family), "drop_path_rate": 0.3}
    built = timm.create_model(f"vizoo_{name}", num_classes=7, in_chans=4, **options)
    assert type(built) is families()[family].model
    assert built.config == vizoo.create_model(name, **options).config
    assert built(torch.randn(2, 4, 64, 64)).shape == (2, 7)
    assert timm.data.resolve_model_data_config(built)["input_size"] == (4, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_features(timm: Any, family: str) -> None:
    model = timm.create_model(f"vizoo_{first(family)}", features_only=True, **tiny(family)).eval()
    x = torch.randn(2, 3, 70, 101)
    maps = model(x)
    for y, channels, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert y.shape == (2, channels, -(-70 // stride), -(-101 // stride))
    assert len(maps) == len(model.model.stages)
    torch.testing.assert_close(maps, model.model.features(x))


def test_timm_features_of_some_stages(timm: Any) -> None:
    chosen = timm.create_model(f"vizoo_{SWIN}", features_only=True, out_indices=(0, -2), **tiny("swin"))
    assert chosen.out_indices == (0, 2)
    assert chosen.feature_info.module_name() == ["layers.0", "layers.2"]
    assert chosen.feature_info.channels(3) == 128  # by index, whether the stage is built or not
    assert len(chosen.model.layers) == 3
    last = timm.create_model(f"vizoo_{SWIN}", features_only=True, out_indices=2, **tiny("swin"))
    assert last.feature_info.get_dicts(["reduction"]) == [{"reduction": 16}, {"reduction": 32}]


def test_timm_features_train_with_recomputation(timm: Any) -> None:
    model = timm.create_model(f"vizoo_{SWIN}", features_only=True, **tiny("swin"))
    model.set_grad_checkpointing()
    assert model.model.grad_checkpointing
    sum(y.square().mean() for y in model(torch.randn(1, 3, 64, 64))).backward()
    assert reached(model) == {name for name, _ in model.named_parameters()}


def test_timm_wraps_a_variant_that_is_dense_by_itself(timm: Any) -> None:
    dense = timm.create_model("vizoo_swin_tiny_window7_dense", **tiny("swin"))
    assert dense.feature_info.reduction() == [4, 8, 16, 32]
    assert [y.shape[1] for y in dense(torch.randn(1, 3, 64, 64))] == dense.feature_info.channels()


def test_timms_own_wrapper_takes_a_model(timm: Any) -> None:
    features = pytest.importorskip("timm.models._features")
    model = vizoo.create_model(SWIN, num_classes=0, **tiny("swin")).eval()
    wrapped, x = features.FeatureGetterNet(model, out_indices=(1, 2)), torch.randn(1, 3, 64, 64)
    assert wrapped.feature_info.channels() == [32, 64]
    torch.testing.assert_close(wrapped(x), model.features(x, (1, 2)))


def test_timm_pooling(timm: Any) -> None:
    x = torch.randn(1, 3, 64, 64)
    plain = timm.create_model(f"vizoo_{SWIN}", num_classes=0, global_pool="", **tiny("swin"))
    assert plain(x).shape == (1, 2, 2, 128)
    pooled = timm.create_model(f"vizoo_{SWIN}", num_classes=0, global_pool="avg", **tiny("swin"))
    assert pooled(x).shape == (1, 128)


def test_timm_loads_weights_by_our_own_download(timm: Any, timm_tiny: str, official_file: Path) -> None:
    state = torch.load(official_file, weights_only=True)["model"]
    for name in (timm_tiny, f"{timm_tiny}.plain"):
        with pytest.warns(UnverifiedWeightsWarning):
            model = timm.create_model(name, pretrained=True)
        with pytest.warns(UnverifiedWeightsWarning):
            features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0,))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        key = "patch_embed.proj.weight"
        assert torch.equal(features.model.state_dict()[key], state[key])


def test_timm_loads_a_file_in_place_of_the_weights(timm: Any, official_file: Path) -> None:
    # The tiny model's file, read as weights of a variant that timm knows without it.
    from vizoo.backbones.swin import SwinConfig

    shape = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    overlay = {"file": str(official_file)}
    model = timm.create_model(f"vizoo_{SWIN}", pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    assert model.config == SwinConfig(**shape)
    state = torch.load(official_file, weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_dir": "weights"}, ValueError, "set VIZOO_HOME|set that instead of cache_dir"),
        ({"drop_rate": 0.1}, ValueError, "drop_rate must be 0, got 0.1"),
        ({"output_stride": 16}, ValueError, "cannot be dilated: output_stride must be 32, got 16"),
        ({"global_pool": "max"}, ValueError, "global_pool must be 'avg' or ''"),
        ({"global_pool": ""}, ValueError, "goes with num_classes=0, got 1000"),
        ({"pretrained_cfg": {"url": "x"}}, ValueError, r"must be a tag of the weights of swin_tiny\w* \(in1k, "),
        ({"pretrained_cfg_overlay": {"file": "x"}}, ValueError, r"dict\(file=...\), with pretrained=True"),
        ({"pretrained": True, "pretrained_cfg_overlay": {"mean": 0}}, ValueError, r"must be dict\(file=...\)"),
        ({"features_only": True, "num_classes": 3}, ValueError, "has no classifier, got num_classes=3"),
        ({"windw_size": 4}, TypeError, "no field 'windw_size'; did you mean 'window_size'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_timm_arguments_without_a_meaning_are_refused(
    timm: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        timm.create_model(f"vizoo_{SWIN}", **{**tiny("swin"), **options})


def test_timm_arguments_that_ask_for_nothing_are_taken(timm: Any) -> None:
    model = timm.create_model(f"vizoo_{SWIN}", drop_rate=0.0, output_stride=32, exportable=True, **tiny("swin"))
    assert model.num_classes == 1000


def test_an_unknown_tag_is_refused(timm: Any) -> None:
    with pytest.raises(ValueError, match=f"{SWIN} has no weights tagged 'in2k'; did you mean"):
        timm.create_model(f"vizoo_{SWIN}.in2k")


# Every family once, and every decoder once.
DECODERS = [*(("unet", family) for family in PYRAMIDS), ("fpn", "swin"), ("upernet", "davit"), ("segformer", "swin")]


@pytest.mark.parametrize(("decoder", "family"), DECODERS)
def test_decoders_of_segmentation_models_train(timm: Any, decoder: str, family: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with small_variants(family) as name:
        model = smp.create_model(decoder, encoder_name=f"tu-vizoo_{name}", encoder_weights=None, classes=5)
    y = model(torch.randn(2, 3, 64, 96))
    assert y.shape == (2, 5, 64, 96)
    y.square().mean().backward()
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} <= reached(model)


@contextlib.contextmanager
def small_variants(family: str) -> Iterator[str]:
    """The decoders build encoders without arguments, so the variant itself is made tiny meanwhile."""
    name = first(family)
    owner, variant = variants()[name]
    small = dataclasses.replace(variant, config=dataclasses.replace(variant.config, **tiny(family)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants(), name, (owner, small))
        yield name


def test_segmentation_models_know_the_preprocessing(timm: Any) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    params = smp.encoders.get_preprocessing_params(f"tu-vizoo_{SWIN}")
    assert tuple(params["mean"]) == resolve(SWIN).weights.mean
