"""What only InLine has: its mixers by their definition, which blocks are whose, and the frames it shares with SLAB."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.hosts import ReducedAttention, ShiftedWindowAttention, StripeAttention
from vizoo.backbones.inline import CswinBranch, Filters, InlineAttention, MapAttention, PvtAttention
from vizoo.registry import families


def tiny(frame: str, **options: Any) -> vizoo.Backbone:
    name, family = f"inline_{frame}_tiny", families()[f"inline_{frame}"]
    model = vizoo.create_model(name, **{"num_classes": 5, **family.tiny, **options}).eval()
    return with_weights_that_matter(model)


def with_weights_that_matter(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def weigh(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The global part by its N x N weights: scores less their mean plus 1/N; (B, N, C) each."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 / q.shape[2]
    weights = scores - scores.mean(-1, keepdim=True) + 1 / q.shape[2]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    return (weights @ v).transpose(1, 2).flatten(2)


def convolve_each(v: Tensor, filters: Tensor) -> Tensor:
    """Each image of (B, H, W, C) convolved by its own filters (B, C, 3, 3)."""
    pairs = zip(v.permute(0, 3, 1, 2), filters, strict=True)
    images = [F.conv2d(x[None], w[:, None], padding=1, groups=len(w)) for x, w in pairs]
    return torch.cat(images).permute(0, 2, 3, 1)


def predict(filters: Filters, mean: Tensor) -> Tensor:
    """Filters (B, C, 3, 3) by torch's own grouped convolutions of a signal of length one."""
    return filters[2](F.gelu(filters[0](mean[..., None]))).view(*mean.shape, 3, 3)


def test_mixer_is_the_papers() -> None:
    mixer, x = with_weights_that_matter(MapAttention(12, 3)), torch.randn(2, 5, 4, 12)
    q, k, v = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)
    local = convolve_each(v.view(x.shape), predict(mixer.residual, x.mean((1, 2))))
    torch.testing.assert_close(mixer(x), mixer.proj(weigh(q, k, v, 3).view(x.shape) + local))


def test_class_token_is_attended_to_but_not_convolved() -> None:
    mixer, x = with_weights_that_matter(InlineAttention(12, 3)), torch.randn(2, 1 + 3 * 5, 12)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    local = convolve_each(v[:, 1:].unflatten(1, (3, 5)), predict(mixer.residual, x.mean(1))).flatten(1, 2)
    want = weigh(q, k, v, 3) + F.pad(local, (0, 0, 1, 0))
    torch.testing.assert_close(mixer(x, (3, 5)), mixer.proj(want))


def test_mixer_of_pvt_differs_in_its_projections_alone() -> None:
    one, other, x = with_weights_that_matter(MapAttention(12, 3)), PvtAttention(12, 3), torch.randn(2, 5, 4, 12)
    state = one.state_dict()
    for part in ("weight", "bias"):
        state[f"q.{part}"], state[f"kv.{part}"] = state.pop(f"qkv.{part}").split((12, 24))
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), one(x))


def test_branch_of_cswin_adds_the_fixed_convolution_and_looks_in_front_of_the_norm() -> None:
    branch, x, qkv = with_weights_that_matter(CswinBranch(12, 3)), torch.randn(2, 5, 4, 12), torch.randn(2, 5, 4, 3, 12)
    q, k, v = qkv.flatten(1, 2).unbind(2)
    local = convolve_each(v.view(x.shape), predict(branch.residual, x.mean((1, 2))))
    fixed = branch.get_v(v.view(x.shape).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(branch(qkv, x), weigh(q, k, v, 3).view(x.shape) + local + fixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", [(7, 7), (6, 10), (3, 2)], ids=str)
def test_stripes_keep_to_themselves(sides: tuple[int, int]) -> None:
    mixer, qkv = with_weights_that_matter(StripeAttention(8, 2, columns=3)), torch.randn(2, *sides, 3, 8)
    parts = []
    for start in range(0, sides[1], 3):
        stripe = qkv[:, :, start : start + 3]
        stripe = F.pad(stripe, (0, 0, 0, 0, 0, 3 - stripe.shape[2]))  # zeros are keys like all others
        q, k, v = stripe.flatten(1, 2).unflatten(-1, (2, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, sides[0], 3, 8)
        parts.append(out + mixer.get_v(stripe[:, :, :, 2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    want = torch.cat(parts, 2)[:, :, : sides[1]]
    torch.testing.assert_close(mixer(qkv, qkv[:, :, :, 0]), want)
    turned = StripeAttention(8, 2, rows=3)
    turned.load_state_dict({key: value.mT if value.ndim == 4 else value for key, value in mixer.state_dict().items()})
    torch.testing.assert_close(turned(qkv.transpose(1, 2), qkv[:, :, :, 0].transpose(1, 2)), want.transpose(1, 2))


def test_reduction_leaves_out_what_fills_no_patch() -> None:
    mixer = with_weights_that_matter(ReducedAttention(8, 2, 2, nn.LayerNorm))
    x = torch.randn(2, 5, 7, 8)
    patches = mixer.norm(mixer.sr(x.permute(0, 3, 1, 2)).flatten(2).mT)
    q, (k, v) = mixer.q(x.flatten(1, 2)), mixer.kv(patches).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    want = mixer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
    assert patches.shape[1] == 2 * 3
    torch.testing.assert_close(mixer(x), want)


def test_first_blocks_of_a_stage_are_inlines_and_the_others_swins() -> None:
    with torch.device("meta"):
        model = vizoo.create_model("inline_swin_base")
    kinds = [[type(block.attn) for block in layer.blocks] for layer in model.layers]
    swins = [ShiftedWindowAttention]
    assert kinds == [[MapAttention] * 2, [MapAttention] * 2, [MapAttention] * 2 + swins * 16, swins * 2]
    assert [block.attn.shifted for block in model.layers[2].blocks[2:]] == [False, True] * 8
    assert [block.attn.window for block in model.layers[3].blocks] == [7, 7]


@pytest.mark.parametrize("frame", ["swin", "cswin"])
def test_dense_version_normalises_each_output(frame: str) -> None:
    whole = tiny(frame)
    dense = tiny(frame, num_classes=None, output_norms=True, features_only=True, out_indices=(1, 3))
    report = vizoo.load_checkpoint(dense, whole.state_dict())
    assert sorted(report.fresh) == ["norm1.bias", "norm1.weight", "norm3.bias", "norm3.weight"]
    x = torch.randn(1, 3, 80, 112)  # dense versions shift windows also where one covers the map, which none does here
    for index, got in zip((1, 3), dense(x), strict=True):
        norm = getattr(dense, f"norm{index}")
        want = F.layer_norm(whole.features(x)[index].permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias)
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("frame", "mode"), [("deit", "bicubic"), ("pvt", "bilinear")])
def test_positions_are_resized_on_loading_as_while_running(frame: str, mode: str) -> None:
    model, larger, x = tiny(frame), tiny(frame, img_size=(96, 80)), torch.randn(1, 3, 96, 80)
    report = vizoo.load_checkpoint(larger, model.state_dict())
    assert {text.rpartition(", ")[2] for text in report.adapted.values()} == {mode}
    torch.testing.assert_close(larger(x), model(x))
    plain = model.pos_embed[:, 1:] if frame == "deit" else model.pos_embed1
    side = 8 if frame == "deit" else 16
    image = F.interpolate(plain.mT.unflatten(2, (side, side)), (10, 12), mode=mode)
    got = model.positions(10, 12)[:, 1:] if frame == "deit" else model.positions(0, 10, 12).flatten(1, 2)
    torch.testing.assert_close(got, image.flatten(2).mT)


def test_pvt_takes_images_whose_later_stages_are_as_large_as_its_first_was() -> None:
    model, x = tiny("pvt"), torch.randn(1, 3, 128, 128)  # the official code fails
    assert [y.shape[-1] for y in model.features(x)] == [32, 16, 8, 4]
    want = F.interpolate(model.pos_embed2.mT.unflatten(2, (8, 8)), (16, 16), mode="bilinear")
    torch.testing.assert_close(model.positions(1, 16, 16), want.permute(0, 2, 3, 1))


def test_positions_of_no_square_are_refused() -> None:
    model = tiny("deit")
    with pytest.raises(ValueError, match="pos_embed"):
        vizoo.load_checkpoint(tiny("deit"), {**model.state_dict(), "pos_embed": torch.zeros(1, 1 + 12, 16)})


def test_stages_of_deit_take_the_models_own_grid_unless_told() -> None:
    model, x = tiny("deit"), torch.randn(1, 3, 64, 64)
    tokens = model.stage(0, model.stem(x))
    torch.testing.assert_close(model.to_map(tokens, (64, 64)).permute(0, 3, 1, 2), model.features(x, (0,))[0])


@pytest.mark.parametrize(
    ("frame", "override", "message"),
    [
        (
            "swin",
            {"inline_blocks": (2, 2, 7, 0)},
            r"how many of its blocks.*at most \(2, 2, 6, 2\), got \(2, 2, 7, 0\)",
        ),
        ("cswin", {"inline_blocks": (2, 4)}, r"how many of its blocks.*at most \(2, 4, 18, 1\), got \(2, 4\)"),
        ("cswin", {"num_heads": (1, 2, 1, 4)}, "num_heads must be even in stage 2, got 1"),
        ("cswin", {"depths": (2, 4)}, "depths, num_heads need one entry per stage, got"),
        ("cswin", {"split_size": 0}, "depths, embed_dim, split_size, mlp_ratio must be positive, got"),
        ("pvt", {"mlp_ratios": (8, 8)}, "embed_dims, depths, num_heads, mlp_ratios need one entry per stage, got"),
        ("pvt", {"depths": (2, 0, 2, 2)}, "embed_dims, depths, num_heads, mlp_ratios must be positive, got"),
        ("pvt", {"num_heads": (3, 4, 10, 16)}, "got 3 heads for 64 channels; nearest valid"),
        ("deit", {"depths": ()}, "depths, embed_dim, patch_size, mlp_ratio must be positive, got"),
        ("deit", {"img_size": 16}, "img_size must be at least 32"),
    ],
)
def test_impossible_configurations(frame: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model(f"inline_{frame}_tiny", **override)
