"""What only ViG and ViG-H have: attention from both ends, blended with a convolution; checkpoints fetched by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.vig import GatedLinearAttention, GatedMlp, PatchEmbed, VigBlock
from vizoo.registry import families, resolve
from vizoo.weights.errors import ManualDownloadError
from vizoo.weights.reader import read_state_dict
from vizoo.weights.store import download, import_file

NAMES = [*families()["vig"].variants, *families()["vig_h"].variants]


def tiny(name: str = "vig_h_tiny", **options: Any) -> vizoo.Backbone:
    """A small model with weights that make every branch matter."""
    model = vizoo.create_model(name, **{"num_classes": 5, **resolve(name).family.tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def mixer(**options: bool) -> GatedLinearAttention:
    """Two heads of 3 keys and 6 values."""
    module = GatedLinearAttention(12, 2, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def root_mean_square_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_definition(module: GatedLinearAttention, x: Tensor) -> Tensor:
    """What the mixer makes of one map (H, W, 12), head by head and token by token."""
    local = F.conv2d(x.permute(2, 0, 1)[None], module.in_proj[0].weight, padding=1, groups=12)
    local = module.in_proj[1](local[0]).flatten(1).T
    q, k, v = module.qkv_proj(local).split((6, 6, 12), -1)
    gates = torch.sigmoid(module.gk_proj[1](module.gk_proj[0](local))) ** (1 / 16)
    blend = torch.sigmoid(module.g_proj(local))
    y = torch.empty_like(local)
    tokens = range(len(local))
    for head in range(2):
        keys, values = slice(3 * head, 3 * head + 3), slice(6 * head, 6 * head + 6)
        out = torch.zeros(len(local), 6)
        for decays, order in zip(gates.chunk(2, -1), (tokens, reversed(tokens)), strict=True):
            state = torch.zeros(3, 6)
            for t in order:
                state = decays[t, keys, None] * state + torch.outer(k[t, keys], v[t, values])
                out[t] += 3**-0.5 * q[t, keys] @ state / 2
        far = root_mean_square_norm(out, module.g_norm.weight)
        near = root_mean_square_norm(local[:, values], module.l_norm.weight)
        y[:, values] = blend[:, values] * far + (1 - blend[:, values]) * near
    return module.o_proj(F.silu(y) if module.activate_output else y).view(x.shape)


@pytest.mark.parametrize("options", [{}, {"activate_local": True, "activate_output": True}], ids=str)
@torch.no_grad()
def test_mixer_by_definition(options: dict[str, bool]) -> None:
    module, x = mixer(**options), torch.randn(2, 3, 5, 12)
    want = torch.stack([by_definition(module, each) for each in x])
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qkv_proj", "gk_proj.0", "gk_proj.1", "g_proj", "o_proj"])
@torch.no_grad()
def test_hooks_on_projections_are_called(name: str) -> None:
    module, x, calls = mixer(), torch.randn(2, 3, 4, 12), []
    want = module(x)
    module.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(module(x), want)
    assert calls == [name]


@torch.no_grad()
def test_projections_in_one_product_get_the_gradients_of_several() -> None:
    module, x = mixer(), torch.randn(2, 3, 4, 12)
    found = []
    for hook in (None, lambda *_: None):
        if hook is not None:
            module.g_proj.register_forward_hook(hook)
        with torch.enable_grad():
            found.append(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))
    torch.testing.assert_close(*found)


def test_hidden_channels_of_the_mlp_are_rounded_up() -> None:
    assert [GatedMlp(c, 256).fc2.in_features for c in (192, 384, 768)] == [512, 1024, 2048]
    assert [GatedMlp(c, 32).fc2.in_features for c in (96, 128, 256)] == [256, 352, 704]


@torch.no_grad()
def test_stem_pads_to_multiples_of_8_alone() -> None:
    stem, x = PatchEmbed(3, 8), torch.randn(1, 3, 33, 56)
    got = stem(x)
    assert got.shape == (1, 3, 4, 8)
    torch.testing.assert_close(got, stem(F.pad(x, (0, 0, 0, 7))))
    first, norm, activation, second, last = stem.proj
    whole = F.pad(x, (0, 0, 0, 7))
    inner = activation(norm(first(whole).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    assert inner.shape[2:] == (5, 7)  # halved by a convolution that pads
    torch.testing.assert_close(got, last(second(inner).permute(0, 2, 3, 1)))


@torch.no_grad()
def test_positions_of_another_image_size() -> None:
    model, x = tiny("vig_tiny"), torch.randn(1, 3, 96, 80)
    other = tiny("vig_tiny", img_size=(96, 80))
    report = vizoo.load_checkpoint(other, model.state_dict())
    assert report.adapted == {"pos_embed": "positions of 4 x 4 to 6 x 5 patches, bicubic"}
    torch.testing.assert_close(other(x), model(x))
    table = torch.zeros(1, 7, 16)
    with pytest.raises(ValueError, match="pos_embed"):
        vizoo.load_checkpoint(other, {**model.state_dict(), "pos_embed": table})


def test_dense_version_normalises_outputs_but_not_what_goes_on() -> None:
    whole, dense = tiny(), tiny(num_classes=None, output_norms=True, out_indices=(1, 3))
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


def test_weights_of_earlier_code_and_as_convolutions() -> None:
    model, other = tiny(), tiny()
    earlier = {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        "classifier.norm.": "norm.",
        "classifier.head.": "head.",
        ".blocks.0.norm.": ".blocks.0.ln_1.",
        ".blocks.0.op.": ".blocks.0.self_attention.",
    }
    state = {}
    for key, value in model.state_dict().items():
        for new, old in earlier.items():
            key = key.replace(new, old)
        is_linear = value.ndim == 2 and not key.startswith("head.")
        state[key] = value[..., None, None] if is_linear else value
    report = vizoo.load_checkpoint(other, state)
    assert (report.layout, report.loaded) == ("official", len(state))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vig_tiny", "vig_h_tiny"])
def test_maps_stay_contiguous_between_blocks(name: str) -> None:
    model, seen = tiny(name), []
    for module in model.modules():
        if isinstance(module, VigBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    maps = model.features(torch.randn(2, 3, 64, 96))
    assert len(seen) == 2 * sum(model.config.depths)
    assert all(x.is_contiguous() for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("name", ["vig_tiny", "vig_h_tiny"])
def test_initialisation_is_the_official_one(name: str) -> None:
    model = vizoo.create_model(name, depths=(2, 1, 1, 1))
    block = next(module for module in model.modules() if isinstance(module, VigBlock))
    # Uniform by Xavier, in the pyramid for the convolution alone.
    for layer in (block.op.qkv_proj, block.op.o_proj):
        want = 2**-2.5 * (2 / sum(layer.weight.shape)) ** 0.5 if name == "vig_tiny" else 0.02
        assert layer.weight.std().item() == pytest.approx(want, rel=0.05)
    filters = block.op.in_proj[0].weight
    assert filters.std().item() == pytest.approx(2**-2.5 * (2 / (9 + 9 * len(filters))) ** 0.5, rel=0.1)
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((layer.bias == 0).all() for layer in (block.op.gk_proj[1], block.op.g_proj))


@pytest.mark.parametrize("name", ["vig_tiny", "vig_h_tiny"])
def test_drop_path_rises_from_block_to_block(name: str) -> None:
    model = tiny(name, depths=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [module.drop_path.rate for module in model.modules() if isinstance(module, VigBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_that_this_is_not_vision_gnn(name: str) -> None:
    card = vizoo.describe(name)
    assert "not Vision GNN" in card.paper
    assert "not Vision GNN" in card.weights["in1k"].note


def test_weights_are_fetched_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path / "cache"))
    record = resolve("vig_h_small").weights
    assert record is not None
    with pytest.raises(
        ManualDownloadError, match=r"Save the file of ViG-H-S from .*hustvl/ViG.* run `vizoo weights im"
    ):
        download(record)
    raw, averaged = {"classifier.head.bias": torch.zeros(2)}, {"classifier.head.bias": torch.ones(2)}
    for content, want in (({"model": raw, "model_ema": averaged}, averaged), ({"model": raw}, raw)):
        torch.save(content, tmp_path / "any name.pth")
        path = import_file(record, tmp_path / "any name.pth")
        assert torch.equal(
            *(state["classifier.head.bias"] for state in (want, read_state_dict(path, record.container)))
        )


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("vig_tiny", {"depths": ()}, r"depths must name a stage at least, of a block or more each, got \(\)"),
        ("vig_tiny", {"embed_dim": 191}, "embed_dim must be even and positive, got 191; nearest valid: 192"),
        (
            "vig_tiny",
            {"num_heads": 5},
            "num_heads must divide half the channels, .* got 5 heads for 96; nearest valid: 4",
        ),
        ("vig_tiny", {"img_size": 16}, "img_size must be at least 32 on both sides, got 16"),
        (
            "vig_h_tiny",
            {"depths": (1, 1)},
            r"embed_dims, depths and num_heads need one entry per stage, got .*\(1, 1\)",
        ),
        ("vig_h_tiny", {"depths": (2, 0, 5, 2)}, r"depths must name a stage at least, .* got \(2, 0, 5, 2\)"),
        ("vig_h_tiny", {"embed_dims": (97, 192, 384, 768)}, "embed_dims must be even and positive, got 97; .* 98"),
        ("vig_h_tiny", {"num_heads": (3, 7, 12, 24)}, "got 7 heads for 96; nearest valid: 6"),
        ("vig_h_tiny", {"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configurations(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model(name, **override)
