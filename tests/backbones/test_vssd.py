"""What only VSSD has: a state that all tokens share, its range in half precision, its options and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.vssd import Attention, StateSpaceDuality, VssdBlock, VssdConfig
from vizoo.registry import families, resolve
from vizoo.weights.reader import read_state_dict

NAMES = sorted(families()["vssd"].variants)


def tiny(name: str = "vssd_tiny", **options: Any) -> vizoo.Backbone:
    """A small VSSD with weights that make every branch matter."""
    model = vizoo.create_model(name, **{"num_classes": 5, **families()["vssd"].tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def mixer(**options: Any) -> StateSpaceDuality:
    """Two heads of 6 channels and 5 states."""
    config = VssdConfig(embed_dims=(6,), depths=(1,), num_heads=(2,), mixers=("ssd",), d_state=5, **options)
    module = StateSpaceDuality(config, 0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def by_definition(module: StateSpaceDuality, x: Tensor) -> Tensor:
    """What the mixer makes of one map (H, W, 6), head by head and token by token."""
    z, mixed, dt = module.in_proj(x).split((12, 12 + 10, 2), -1)
    mixed = F.silu(module.conv2d(mixed.permute(2, 0, 1)[None])[0].permute(1, 2, 0)).flatten(0, 1)
    values, B, C = mixed.split((12, 5, 5), -1)
    step, rate = F.softplus(dt.flatten(0, 1) + module.dt_bias), module.A_log.exp()
    y = torch.empty_like(values)
    for head in range(2):
        own = slice(6 * head, 6 * head + 6)
        state, states = torch.zeros(5, 6), []
        for token, channels in enumerate(values[:, own]):
            delta = step[token, head]
            added = torch.outer(B[token], channels)
            if module.causal:
                state = torch.exp(-delta * rate[head]) * state + delta * added
            else:
                state = state + (delta if module.positive_decay else -delta) * rate[head] * added
            states.append(state)
        for token, channels in enumerate(values[:, own]):
            seen = states[token] if module.causal else states[-1]
            y[token, own] = C[token] @ seen + module.D[head] * channels
    return module.out_proj(module.norm(y) * z.flatten(0, 1)).view(x.shape)


@pytest.mark.parametrize(
    "options", [{}, {"positive_decay": False}, {"causal": True}, {"causal": True, "positive_decay": False}], ids=str
)
@torch.no_grad()
def test_mixer_by_definition(options: dict[str, Any]) -> None:
    module, x = mixer(**options), torch.randn(2, 3, 4, 6)
    want = torch.stack([by_definition(module, each) for each in x])
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_on_the_projection_are_called() -> None:
    module, x = mixer(), torch.randn(2, 3, 4, 6)
    want, seen = module(x), []
    module.in_proj.register_forward_hook(lambda _, inputs, out: seen.append(out.shape))
    torch.testing.assert_close(module(x), want)
    assert seen == [(2, 3, 4, 12 + 12 + 10 + 2)]


@torch.no_grad()
def test_attention_by_definition() -> None:
    module, x = Attention(8, 2), torch.randn(2, 3, 5, 8)
    q, k, v = (part.unflatten(-1, (2, 4)) for part in module.to_qkv(x).flatten(1, 2).split(8, -1))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 4**-0.5).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    torch.testing.assert_close(module(x), module.to_out(out))


@torch.no_grad()
def test_shortcuts_hold_what_the_convolutions_give() -> None:
    block, x = tiny().layers[0].blocks[0], torch.randn(2, 5, 6, 16)

    def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    first = convolved(block.cpe1, x)
    second = convolved(block.cpe2, first + block.attn(block.norm1(first)))
    torch.testing.assert_close(block(x), second + block.mlp(block.norm2(second)))


@pytest.mark.parametrize("autocast", [True, False])
def test_states_beyond_the_range_of_float16(autocast: bool) -> None:
    module = mixer()
    nn.init.constant_(module.A_log, 14.0)  # a factor of a million
    x = torch.randn(1, 8, 8, 6).half()
    want = module(x.float())
    half = module if autocast else mixer().half()
    half.load_state_dict(module.state_dict())
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        got = half(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    got.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_published_operations_hold_half_of_the_mixers(name: str) -> None:
    # The state is written by one product and read by another; published figures are met with one of both.
    card, config = vizoo.describe(name), resolve(name).variant.config
    halves = sum(
        depth * (56 >> stage) ** 2 * config.inner(stage) * config.d_state
        for stage, depth in enumerate((*config.depths[:3],))
    )
    assert card.macs - halves == pytest.approx(resolve(name).variant.gmacs * 1e9, rel=0.01)


def test_any_stage_may_attend_or_share_a_state() -> None:
    model = tiny(mixers=("attention", "ssd", "attention", "ssd"))
    kinds = [type(stage.blocks[0].attn) for stage in model.layers]
    assert kinds == [Attention, StateSpaceDuality, Attention, StateSpaceDuality]
    assert torch.isfinite(model(torch.randn(1, 3, 45, 77))).all()


def test_maps_stay_contiguous_between_blocks() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        if isinstance(module, VssdBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_dense_version_normalises_outputs_but_not_what_goes_on() -> None:
    whole, dense = tiny(), tiny(num_classes=None, output_norms=True, features_only=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["outnorm1.bias", "outnorm1.weight", "outnorm3.bias", "outnorm3.weight"]
    for index, factor in ((1, 3.0), (3, 1.0)):
        norm = dense.get_submodule(f"outnorm{index}")
        nn.init.constant_(norm.weight, factor)
        nn.init.zeros_(norm.bias)
    x = torch.randn(1, 3, 70, 50)
    for factor, got, plain in zip((3.0, 1.0), dense(x), whole.features(x, (1, 3)), strict=True):
        want = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, factor * want)


def test_initialisation_is_the_official_one() -> None:
    model = vizoo.create_model("vssd_tiny", depths=(2, 1, 1, 1))
    mixers = [module for module in model.modules() if isinstance(module, StateSpaceDuality)]
    steps = F.softplus(torch.cat([module.dt_bias for module in mixers]))
    rates = torch.cat([module.A_log.exp() for module in mixers])
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert rates.min() >= 0.99
    assert rates.max() <= 16.01
    assert all((module.D == 1).all() for module in mixers)
    assert mixers[0].in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Of a convolution: uniform, within +-1 / sqrt(64).
    assert model.layers[0].downsample.expand.weight.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.05)


def test_drop_path_rises_from_block_to_block() -> None:
    model = tiny(depths=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, VssdBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_averaged_weights_are_preferred_where_the_file_is_named_so(tmp_path: Path) -> None:
    record = resolve("vssd_small").weights
    assert record is not None
    assert record.filename == "vssd_small_best_ema.pth"
    raw, averaged = {"head.bias": torch.zeros(2)}, {"head.bias": torch.ones(2)}
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / record.filename)
    assert read_state_dict(tmp_path / record.filename, record.container)["head.bias"].sum() == 2
    mesa = resolve("vssd_small.in1k_mesa").weights
    assert mesa is not None
    assert read_state_dict(tmp_path / record.filename, mesa.container)["head.bias"].sum() == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, r"depths needs one entry per stage, got \(1, 1\) for 4 stages"),
        ({"mixers": ("ssd",)}, r"mixers needs one entry per stage, got \('ssd',\)"),
        ({"d_state": 0}, "embed_dims, depths, d_state, expand and mlp_ratio must be positive"),
        (
            {"mixers": ("ssd", "ssd", "ssd", "attend")},
            "mixers holds 'ssd' or 'attention', got 'attend'; did you mean 'att",
        ),
        ({"embed_dims": (63, 128, 256, 512)}, "embed_dims must begin with an even number, .* nearest valid: 64"),
        ({"num_heads": (2, 3, 8, 16)}, "num_heads must divide the stage's channels, got 3 heads for 256 channels"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"img_size": (224, 16)}, r"img_size must be at least 32 on both sides, got \(224, 16\)"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("vssd_tiny", **override)
