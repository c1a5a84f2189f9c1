"""Parameter groups against timm's, precision, clipping, accumulation, and the moving average."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vizoo
from vizoo.train.classification import ImageClassifier
from vizoo.train.hooks import EMA
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer, parameter_groups
from vizoo.train.segmentation.heads import UPerHead
from vizoo.train.segmentation.segmenter import Segmenter

TINY = {"num_classes": 4, "img_size": 32, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256"


def tiny(name: str) -> vizoo.Backbone:
    windows = {"pretrained_windows": (0, 0)} if name == V2 else {}
    return vizoo.create_model(name, **TINY, **windows)


def by_name(groups: list[dict[str, Any]], field: str) -> dict[str, float]:
    return {name: group[field] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("name", [V1, V2])
def test_groups_equal_timms_with_the_rate_written_in(name: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = tiny(name)
    groups = parameter_groups(model, lr=2.0, weight_decay=0.05, layer_decay=0.75)
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75)
    names = {id(p): n for n, p in model.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in theirs for p in g["params"]}
    decays = {names[id(p)]: g["weight_decay"] for g in theirs for p in g["params"]}
    assert by_name(groups, "lr") == pytest.approx({n: 2.0 * s for n, s in scales.items()})
    assert by_name(groups, "weight_decay") == decays
    assert len(set(scales.values())) > 3


def test_groups_of_the_wrapper_are_those_of_its_backbone() -> None:
    model = vizoo.create_model(V1, **TINY)
    inner = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    outer = parameter_groups(ImageClassifier(model), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    for field in ("lr", "weight_decay"):
        assert by_name(outer, field) == {f"backbone.{n}": v for n, v in by_name(inner, field).items()}


def test_what_is_not_decayed() -> None:
    decays = by_name(parameter_groups(vizoo.create_model(V1, **TINY), lr=1.0, weight_decay=0.05), "weight_decay")
    spared = {name.rsplit(".", 1)[-1] for name, decay in decays.items() if decay == 0}
    assert spared == {"bias", "weight", "relative_position_bias_table"}
    assert all("norm" in n for n, decay in decays.items() if decay == 0 and n.endswith("weight"))
    second = by_name(parameter_groups(tiny(V2), lr=1.0, weight_decay=0.05), "weight_decay")
    assert all(decay == 0 for n, decay in second.items() if "logit_scale" in n or "cpb_mlp" in n)


def test_names_of_inner_modules_and_frozen_parameters() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.frozen = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
            self.frozen.requires_grad_(False)

        def no_weight_decay(self) -> set[str]:
            return {"table"}

    groups = parameter_groups(nn.ModuleDict({"a": Table(), "b": nn.Linear(2, 2)}), lr=1.0, weight_decay=0.1)
    assert by_name(groups, "weight_decay") == {"a.table": 0.0, "b.weight": 0.1, "b.bias": 0.0}


PUBLISHED = ("absolute_pos_embed", "relative_position_bias_table", "norm")


def test_the_rule_of_published_detectors() -> None:
    """Norms and tables of the backbone are spared; biases and the heads' batch norms are decayed."""
    backbone = {"name": V1, **{key: value for key, value in TINY.items() if key != "num_classes"}}
    model = Segmenter(backbone, {"type": UPerHead, "channels": 8}, num_classes=3)
    decays = by_name(parameter_groups(model, lr=1.0, weight_decay=0.05, not_decayed=PUBLISHED), "weight_decay")
    spared = {name for name, decay in decays.items() if decay == 0}
    assert all(name.startswith("backbone.") for name in spared)
    kinds = {re.sub(r"\d+", "0", name.removeprefix("backbone.")) for name in spared}
    assert {re.sub(r".*\.", "", kind) for kind in kinds} == {"weight", "bias", "relative_position_bias_table"}
    assert {"norm0.weight", "patch_embed.norm.bias"} <= kinds
    for name in ("backbone.layers.0.blocks.0.attn.qkv.bias", "decode_head.bottleneck.bn.weight"):
        assert decays[name] == 0.05
    everything = parameter_groups(model, lr=1.0, weight_decay=0.05, not_decayed=())
    assert [group["weight_decay"] for group in everything] == [0.05]


def test_layer_decay_of_a_backbone_below_heads() -> None:
    backbone = {"name": V1, **{key: value for key, value in TINY.items() if key != "num_classes"}}
    model = Segmenter(backbone, {"type": UPerHead, "channels": 8}, num_classes=3)
    rates = by_name(parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5), "lr")
    assert {rate for name, rate in rates.items() if not name.startswith("backbone.")} == {1.0}
    stem, block = rates["backbone.patch_embed.proj.weight"], rates["backbone.layers.1.blocks.1.mlp.fc1.weight"]
    assert stem == pytest.approx(block / 8), "three blocks lie behind the stem"
    assert block < rates["backbone.norm1.weight"] <= 1.0


def test_layer_decay_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\], got 1.5"):
        parameter_groups(nn.Linear(2, 2), lr=1.0, weight_decay=0.0, layer_decay=1.5)
    with pytest.raises(ValueError, match="Linear has no group_matcher"):
        parameter_groups(nn.Linear(2, 2), lr=1.0, weight_decay=0.0, layer_decay=0.9)
    with pytest.raises(TypeError, match="no key 'layer_decy'; did you mean 'layer_decay'"):
        GroupedOptimizer({"optimizer": {"type": "SGD", "lr": 1.0}}, {"layer_decy": 0.9})
    with pytest.raises(ValueError, match="needs a learning rate"):
        GroupedOptimizer({"optimizer": {"type": "SGD"}})


def wrapper(model: nn.Module, **options: Any) -> AutocastOptimWrapper:
    return AutocastOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision_of_the_forward_pass(dtype: str) -> None:
    model = nn.Linear(4, 4)
    optim = wrapper(model, dtype=dtype)
    with optim.optim_context(model):
        out = model(torch.randn(2, 4))
    assert out.dtype == getattr(torch, dtype)
    assert optim.scaler.is_enabled() == (dtype == "float16")
    before = model.weight.detach().clone()
    optim.update_params(out.float().square().mean())
    assert model.weight.dtype == torch.float32
    assert not torch.equal(before, model.weight)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'bf16'"):
        wrapper(nn.Linear(2, 2), dtype="bf16")


def test_clips_what_the_scaler_has_unscaled() -> None:
    model = nn.Linear(4, 1, bias=False)
    optim = wrapper(model, dtype="float16", clip_grad={"max_norm": 1.0})
    before = model.weight.detach().clone()
    optim.update_params((model(torch.ones(1, 4)) * 100).sum())
    assert optim.grad_norm is not None
    assert optim.grad_norm.item() == pytest.approx(200.0)
    moved = (before - model.weight).detach().norm().item()
    assert moved == pytest.approx(0.1, rel=1e-4), "a gradient of norm 1 after clipping, times the rate"


def test_an_overflowing_update_is_left_out() -> None:
    model = nn.Linear(2, 1, bias=False)
    optim = wrapper(model, dtype="float16")
    before = model.weight.detach().clone()
    optim.update_params(model(torch.full((1, 2), 3e38)).sum() * 10)
    assert torch.equal(before, model.weight)
    assert optim.scaler.get_scale() == 32768.0


def test_order_is_unscale_clip_step_average(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    optim = wrapper(model, dtype="float16", clip_grad={"max_norm": 1.0}, accumulative_counts=2)
    calls: list[str] = []

    def spy(target: Any, name: str, label: str) -> None:
        original = getattr(target, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, called)

    average = EMA(decay=0.9)

    class FakeRunner:
        def __init__(self) -> None:
            self.model, self.optim_wrapper, self.iter, self.epoch = model, optim, 0, 0

    runner = FakeRunner()
    average.before_run(runner)
    spy(optim.scaler, "unscale_", "unscale")
    spy(optim, "clip_func", "clip")
    spy(optim.optimizer, "step", "step")
    spy(average.ema_model, "update_parameters", "average")
    for index in range(2):
        optim.update_params(model(torch.ones(1, 2)).sum())
        average.after_train_iter(runner, index)
        assert calls == ([] if index == 0 else ["unscale", "clip", "step", "average"])


def test_state_is_plain_and_comes_back(tmp_path: Any) -> None:
    model = nn.Linear(2, 2)
    optim = wrapper(model, dtype="float16", init_scale=8.0)
    optim.update_params(model(torch.ones(1, 2)).sum())
    torch.save(optim.state_dict(), tmp_path / "state.pt")
    other = wrapper(model, dtype="float16")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.scaler.get_scale() == 8.0
    wrapper(model, dtype="float32").load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


def averages(decay: float, warmup: int, values: list[float]) -> list[float]:
    class Optim:
        def should_update(self) -> bool:
            return True

    class FakeRunner:
        iter = epoch = 0
        optim_wrapper = Optim()
        model = Weight()

    runner, hook, found = FakeRunner(), EMA(decay, warmup), []
    hook.before_run(runner)
    for index, value in enumerate(values):
        runner.model.value.data.fill_(value)
        hook.after_train_iter(runner, index)
        found.append(hook.ema_model.module.value.item())
    return found


def test_average_follows_its_definition() -> None:
    expected, values = [], [1.0, 3.0, -2.0, 5.0]
    for value in values:
        expected.append(value if not expected else 0.9 * expected[-1] + 0.1 * value)
    assert averages(0.9, 0, values) == pytest.approx(expected, abs=1e-6)


def test_average_equals_timms() -> None:
    from timm.utils import ModelEmaV3

    model = Weight()
    theirs = ModelEmaV3(model, decay=0.99, foreach=False)
    found = []
    for step, value in enumerate([1.0, 3.0, -2.0, 5.0]):
        model.value.data.fill_(value)
        theirs.update(model, step=step + 1)
        found.append(theirs.module.value.item())
    assert averages(0.99, 0, [1.0, 3.0, -2.0, 5.0]) == pytest.approx(found, abs=1e-6)


def test_average_warms_up() -> None:
    values = [1.0, 2.0, 3.0]
    second = 2 / 11 * 1.0 + 9 / 11 * 2.0
    assert averages(0.9999, 10, values)[1] == pytest.approx(second, abs=1e-6)
    assert averages(0.9999, 10, values)[2] == pytest.approx(3 / 12 * second + 9 / 12 * 3.0, abs=1e-6)


def test_average_refuses_odd_values() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0.5, 1\), got 0.0001"):
        EMA(0.0001)
    with pytest.raises(ValueError, match="warmup must be 0 or more, got -1"):
        EMA(0.9, -1)


def test_recipe_numbers_of_layer_decay() -> None:
    """A chain of 14 layers at 0.75: embeddings 0.0237573, the first block 0.0316764, the head 1."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(14))

        def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
            return {"stem": r"^layers\.0\.", "blocks": r"^layers\.(\d+)"}

    rates = by_name(parameter_groups(Chain(), lr=1.0, weight_decay=0.0, layer_decay=0.75), "lr")
    assert rates["layers.0.weight"] == pytest.approx(0.0237573, abs=1e-6)
    assert rates["layers.1.weight"] == pytest.approx(0.0316764, abs=1e-6)
    assert rates["layers.13.weight"] == 1.0


def test_gradients_accumulate_to_the_mean() -> None:
    data = torch.randn(4, 3)

    def trained(count: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optim = wrapper(model, dtype="float32", accumulative_counts=count)
        for part in data.chunk(count):
            optim.update_params(model(part).square().mean())
        return model.weight.detach()

    torch.testing.assert_close(trained(4), trained(1))
