"""Every family keeps the contract of `vizoo.backbones.base`, at a tiny size, for images that nothing divides."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm

import vizoo
from vizoo.registry import families

FAMILIES = sorted(families())
# Tracing takes most of the time of all tests. One family for each mixer is exported in all its stages and compiled with
# gradients, of which operators have tests of their own; others in the stages that hold all of their modules.
TRACED_WHOLE = set({family.mixer: name for name, family in families().items()}.values())
SIZES = [(32, 32), (37, 61), (64, 96), (101, 33)]


def tiny(family: str, **options: Any) -> vizoo.Backbone:
    """A small model of a family, with weights that make every branch matter."""
    chosen = families()[family]
    name = next(iter(chosen.variants))
    model = vizoo.create_model(name, **{"num_classes": 5, **chosen.tiny, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def image(*size: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_have_the_declared_shapes(family: str, size: tuple[int, int]) -> None:
    model = tiny(family)
    maps = model.features(image(*size))
    for stage, y in zip(model.stages, maps, strict=True):
        assert y.shape == (2, stage.channels, -(-size[0] // stage.stride), -(-size[1] // stage.stride))
    assert model(image(*size)).shape == (2, 5)


def test_eval_is_deterministic_and_leaves_the_model_unchanged(family: str) -> None:
    model, x = tiny(family, drop_path_rate=0.5), image(37, 61)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name


def test_images_do_not_influence_each_other(family: str) -> None:
    model, x = tiny(family), image(37, 61, batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = tiny(family, drop_path_rate=0.0).train()  # a branch may be dropped for a whole batch
    x = image(64, 96)
    # Behind the last block a class token alone is classified: what only patches read is for maps.
    (model(x).square().mean() + model.features(x)[-1].square().mean()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_drop_path_acts_in_training_only(family: str) -> None:
    model, x = tiny(family, drop_path_rate=0.9), image(64, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def outputs(model: vizoo.Backbone, x: Tensor) -> list[Tensor]:
    tokens = model.forward_features(x)
    return [*model.features(x), tokens, model.forward_head(tokens, pre_logits=True), model(x)]


def assert_alike(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@torch.no_grad()
def test_fusing_changes_no_output(family: str) -> None:
    model, x = tiny(family), image(37, 61)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(std=0.5)
            norm.running_var.uniform_(0.5, 2)
    pyramid = tiny(family, num_classes=None, features_only=True, out_indices=(0, 1))
    vizoo.load_checkpoint(pyramid, model.state_dict())
    want, state = outputs(model, x), model.state_dict()
    assert model.fuse() is model
    assert_alike(outputs(model, x), want)
    fused = {key: value.clone() for key, value in model.state_dict().items()}
    again = model.fuse().state_dict()
    assert again.keys() == fused.keys()
    assert all(torch.equal(again[key], value) for key, value in fused.items())
    assert sum(value.numel() for value in fused.values()) <= sum(value.numel() for value in state.values())
    assert_alike(pyramid.fuse()(x), want[:2])
    assert_alike([model.fuse(keep_norm=False)(x)], want[-1:])
    assert [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)] == []
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


def test_fusing_is_for_evaluation(family: str) -> None:
    model = tiny(family)
    with pytest.raises(RuntimeError, match=r"call eval\(\) first; in training mode: "):
        model.train().fuse()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_has_no_nan(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(image(64, 48))
    out.float().square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model, x = tiny(family, drop_path_rate=0.0).train(), image(64, 64)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for want, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_other_channels_and_no_classes(family: str) -> None:
    model = tiny(family, in_chans=1, num_classes=0)
    assert model(image(40, 40, channels=1)).shape == (2, model.num_features)
    with pytest.raises(ValueError, match=r"expected 1 channels on axis 1 \(B, C, H, W\), got shape \(2, 3, 40, 40\)"):
        model(image(40, 40))


def test_reset_classifier(family: str) -> None:
    model = tiny(family)
    model.reset_classifier(7)
    assert model(image(40, 40)).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(image(40, 40, batch=1)[:0]), model.forward_features(image(40, 40, batch=1)[:0]))
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool must be 'avg' or ''"):
        model.reset_classifier(3, global_pool="max")


def test_head_and_features_make_up_the_forward_pass(family: str) -> None:
    model, x = tiny(family), image(64, 96)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens), model(x))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)


def test_forward_intermediates(family: str) -> None:
    model, x = tiny(family), image(64, 96)
    final, maps = model.forward_intermediates(x, indices=[0, -1])
    want = model.features(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(maps, [want[0], want[-1]])
    (nhwc,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(nhwc, model._to_nhwc(model.to_map(final, x.shape[2:])))
    early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [want[1]])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match="stop_early leaves no final features"):
        model.forward_intermediates(x, stop_early=True)
    pyramid = tiny(family, num_classes=None, features_only=True, out_indices=(0, 1))
    (second,) = pyramid.forward_intermediates(x, 1, intermediates_only=True)
    torch.testing.assert_close(second, pyramid.features(x)[1])
    with pytest.raises(ValueError, match="features_only=True has no final norm: pass intermediates_only=True"):
        pyramid.forward_intermediates(x)


def test_features_only(family: str) -> None:
    whole = tiny(family)
    model = tiny(family, num_classes=None, features_only=True, out_indices=(0, 1))
    report = vizoo.load_checkpoint(model, whole.state_dict())
    x = image(37, 61)
    torch.testing.assert_close(model.eval()(x), whole.features(x, [0, 1]))
    assert model.feature_info.channels() == [s.channels for s in whole.stages[:2]]
    assert model.feature_info.reduction() == [s.stride for s in whole.stages[:2]]
    assert all(model.get_submodule(name) is not None for name in model.feature_info.module_name())
    assert set(report.dropped) == set(whole.state_dict()) - set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    with pytest.raises(ValueError, match="has no classifier"):
        model.reset_classifier(3)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((0, 9), r"stage index 9 is out of range: this model has stages 0\.\.{last}$"),
        ((), "stage indices must be distinct and at least one"),
        ((0, -1, "last"), "stage indices must be distinct"),
        (9, r"the number of stages must lie in 1\.\.{count}, got 9"),
    ],
)
def test_wrong_stage_indices(family: str, indices: Any, message: str) -> None:
    count = len(tiny(family).stages)
    message = message.format(last=count - 1, count=count)
    if isinstance(indices, tuple):
        indices = tuple(count - 1 if index == "last" else index for index in indices)
    with pytest.raises(ValueError, match=message):
        tiny(family, num_classes=None, features_only=True, out_indices=indices)
    with pytest.raises(ValueError, match=message):
        tiny(family).features(image(32, 32), indices)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"expected images \(B, 3, H, W\), got 3 axes: \(3, 64, 64\)"),
        ((1, 3, 31, 64), "H and W must be at least 32, got 31 x 64"),
        ((1, 4, 64, 64), r"expected 3 channels on axis 1 \(B, C, H, W\), got shape \(1, 4, 64, 64\)"),
        ((1, 64, 64, 3), r"expected 3 channels on axis 1"),
    ],
)
def test_wrong_images(family: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(family)(torch.zeros(shape))


def test_layers_are_grouped_for_decay(family: str) -> None:
    from timm.models import group_parameters

    model = tiny(family)
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse))
        grouped = [name for layer in layers.values() for name in layer]
        assert sorted(grouped) == sorted(names)
        assert len(layers) == (len(model.stages) if coarse else sum(model.config.depths)) + 2  # stem and head


def test_default_cfg_has_timms_keys(family: str) -> None:
    cfg = tiny(family, in_chans=2).default_cfg
    assert cfg["input_size"] == (2, 64, 64)
    assert cfg["num_classes"] == 5
    for key in ("mean", "std", "crop_pct", "interpolation", "pool_size", "first_conv", "classifier", "url"):
        assert key in cfg


def test_pickle_and_copy(family: str) -> None:
    model, x = tiny(family), image(40, 40)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


def test_state_dict_loads_through_our_own_path(family: str) -> None:
    model, other, x = tiny(family), tiny(family), image(64, 64)
    report = vizoo.load_checkpoint(other, model.state_dict())
    assert torch.equal(model(x), other(x))
    assert report.loaded == len(model.state_dict())


def alike(model: vizoo.Backbone) -> bool:
    """Whether all stages are the same, so that two blocks show what any number would; tracing takes time for each."""
    return len({(stage.stride, stage.channels) for stage in model.stages}) == 1


def leading(model: vizoo.Backbone) -> tuple[int, ...]:
    """The first stages, two at least, that hold modules of every class there is in any stage."""
    kinds = [{type(module) for module in model.get_submodule(stage.name).modules()} for stage in model.stages]
    count = next(i for i in range(2, len(kinds) + 1) if set().union(*kinds[:i]) == set().union(*kinds))
    return tuple(range(count))


def run_exported(model: nn.Module, least: int, batches: int = 64, most: int = 512) -> Callable[[Tensor], Tensor]:
    sides = {2: Dim("H", min=least, max=most), 3: Dim("W", min=least, max=most)}
    example = image(max(64, least), max(64, least) + 32)
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("B", max=batches), **sides},)).module()


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="older torch cannot follow sizes through padding")
def test_export_with_free_batch_and_size(family: str) -> None:
    model = tiny(family)
    # Export takes every side of one position for a case of its own: a map of stride 64 halved once more needs 129.
    least = 33 if model.stages[-1].stride <= 32 else 2 * model.stages[-1].stride + 1
    if alike(model):
        model = tiny(family, depths=(1, 1))
    elif family not in TRACED_WHOLE:
        model = tiny(family, num_classes=None, features_only=True, out_indices=leading(model))
    with vizoo.ops.use("reference"):
        exported = run_exported(model, least)
    for batch, size in ((1, (33, 45)), (3, (224, 224)), (2, (235, 317)), (1, (40, 100))):
        x = image(*(max(least, side) for side in size), batch=batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and nothing kept; a failure leaves the next test alone."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_as_one_graph(family: str) -> None:
    model, x = tiny(family), image(64, 96)
    if alike(model):
        model = tiny(family, depths=(1, 1))
    else:  # further stages of known size are traced as the first ones; free sizes, with the classifier, by export
        model = tiny(family, num_classes=None, features_only=True, out_indices=leading(model))
    gradients = family in TRACED_WHOLE
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager" if gradients else "eager")
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_free_batch_and_size(family: str) -> None:
    # Two stages have every kind of module. Symbolic sizes make each further one slow to trace, and gradients still
    # slower: those of operators are traced in their own tests.
    model = tiny(family, num_classes=None, features_only=True, out_indices=(0, 1))

    def bounded(x: Tensor) -> tuple[Tensor, ...]:
        torch._check(x.shape[2] <= 512)  # numbers, since the compiler frees variables; without a bound, scans are
        torch._check(x.shape[3] <= 512)  # traced in steps enough for any length
        return model(x)

    compiled = torch.compile(bounded, fullgraph=True, dynamic=True, backend="eager")
    # The first size's graph serves the second: as torch's convolutions ask, both have 16 windows or more, or neither.
    once = torch.__version__ >= (2, 9)  # older torch turns what is known of sizes into guards
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=once):
        for batch, size in ((4, (64, 96)), (3, (37, 101))):
            x = image(*size, batch=batch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
