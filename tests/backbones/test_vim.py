"""What only Vim has: a class token in the middle, convolutions and scans both ways, overlapping patches, pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.vim import (
    VimBlock,
    causal_conv,
    init_step_projection,
    rates,
    resize_positions,
    sparse_causal_conv,
)
from vizoo.ops import selective_scan
from vizoo.registry import families


def tiny(**options: Any) -> vizoo.Backbone:
    """A small Vim with weights that make every branch matter."""
    model = vizoo.create_model("vim_tiny", **{"num_classes": 5, **families()["vim"].tiny, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def some_of(length: int, kept: int, batch: int = 2) -> Tensor:
    """Ascending places, other ones for each image, first and last among those left out."""
    places = [1 + torch.randperm(length - 2)[:kept] for _ in range(batch)]
    return torch.stack(places).sort(1).values


def test_causal_convolution_against_its_definition() -> None:
    x, weight, bias = torch.randn(2, 7, 6), torch.randn(6, 1, 4), torch.randn(6)
    want = torch.stack(
        [bias + sum(weight[:, 0, 3 - back] * x[:, t - back] for back in range(min(t, 3) + 1)) for t in range(7)], 1
    )
    torch.testing.assert_close(causal_conv(x, weight, bias), want)
    torch.testing.assert_close(causal_conv(x, weight, bias, reverse=True), causal_conv(x.flip(1), weight, bias).flip(1))


@pytest.mark.parametrize("reverse", [False, True])
def test_sparse_convolution_finds_zeros_where_tokens_are_missing(reverse: bool) -> None:
    x, weight, bias, position = torch.randn(2, 8, 6), torch.randn(6, 1, 4), torch.randn(6), some_of(20, 8)
    index = position[..., None].expand_as(x)
    whole = causal_conv(torch.zeros(2, 20, 6).scatter(1, index, x), weight, bias, reverse)
    torch.testing.assert_close(sparse_causal_conv(x, weight, bias, position, reverse), whole.gather(1, index))


def masked(block: VimBlock, x: Tensor, mask: Tensor) -> Tensor:
    """A block on a whole sequence in which pruned tokens have features of zero, (B, L, C)."""
    mixer = block.mixer
    x = x * mask
    inner, z = mixer.in_proj(block.norm(x)).chunk(2, -1)
    y = torch.zeros(())
    for suffix, logs, skip in (("", mixer.A_log, mixer.D), ("_b", mixer.A_b_log, mixer.D_b)):
        conv, x_proj, dt_proj = (getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        u = F.silu(causal_conv(inner, conv.weight, conv.bias, reverse=bool(suffix))) * mask
        low_rank, B, C = x_proj(u).split((mixer.rank, mixer.states, mixer.states), -1)
        y = (
            y
            + selective_scan(
                u.mT, dt_proj(low_rank).mT, rates(logs), B.mT, C.mT, skip, z=z.mT, softplus=True, reverse=bool(suffix)
            ).mT
        )
    return (x + mixer.out_proj(y / 2)) * mask


def test_pruned_blocks_equal_the_masked_sequence() -> None:
    model = tiny(embed_dim=32)
    x, position = torch.randn(2, 23, 32), some_of(23, 9)
    index = position[..., None].expand(-1, -1, 32)
    mask = torch.zeros(2, 23, 1).scatter(1, position[..., None], 1.0)
    whole, left = x, x.gather(1, index)
    for block in model.layers:
        whole = masked(block, whole, mask)
        left, _ = block.sparse(left, position)
        torch.testing.assert_close(left, whole.gather(1, index), rtol=1e-4, atol=1e-5)


def test_nothing_pruned_is_the_plain_block() -> None:
    model, x = tiny(), torch.randn(2, 3, 64, 40)
    same = tiny(prune_after=(1, 2, 3), keep_ratio=1.0)
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same.features(x), model.features(x), rtol=1e-4, atol=1e-5)


def test_pruning_keeps_class_token_and_map() -> None:
    model, x = tiny(prune_after=(1, 3), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    seen: list[int] = []
    for block in model.layers:
        block.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model(x)
    assert seen == [65, 33, 33, 17]  # odd numbers with the class token
    first, *_, last = model.features(x)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.features(x)[0], first)
    unmoved = (last == first).all(1).flatten(1).sum(1)
    assert (unmoved == 64 - 32).all()  # the others went through at least one more block
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_importance_is_the_clipped_mean_of_what_is_scanned() -> None:
    block, x = tiny().layers[0], torch.randn(2, 9, 16)
    _, importance = block.sparse(x, None)
    torch.testing.assert_close(importance, block.mixer.scan(block.norm(x)).relu().mean(-1))


def test_pruning_without_a_class_token() -> None:
    model = tiny(class_token=False, prune_after=(2,), keep_ratio=0.3)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 64, 16)
    assert model(torch.randn(2, 3, 64, 40)).shape == (2, 5)


def test_pruned_models_checkpoint_their_blocks() -> None:
    model, x = tiny(prune_after=(1,)).train(), torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for want, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, want)


@pytest.mark.parametrize("patches", [(2, 2), (3, 3)], ids=str)
def test_the_class_token_stands_in_the_middle(patches: tuple[int, int]) -> None:
    model = tiny(img_size=64)
    x = torch.randn(1, 3, patches[0] * 16, patches[1] * 16)
    other = tiny(img_size=64)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.cls_token += 1
    changed = (model.stem(x) != other.stem(x)).any(-1).nonzero()[:, 1]
    tokens = 4 * patches[0] * patches[1]
    assert changed.tolist() == [tokens // 2]
    tokens_out = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(tokens_out[:, tokens // 2]))


def test_positions_of_another_grid() -> None:
    table = torch.randn(1, 4 * 4 + 1, 8)
    new = resize_positions(table, (4, 4), (6, 5))
    assert torch.equal(new[:, 15], table[:, 8])
    patches = torch.cat((table[:, :8], table[:, 9:]), 1).view(1, 4, 4, 8).permute(0, 3, 1, 2)
    want = F.interpolate(patches, size=(6, 5), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(torch.cat((new[:, :15], new[:, 16:]), 1), want)


def test_checkpoints_of_another_grid_are_resized() -> None:
    model = tiny(img_size=64)
    finer = tiny(img_size=96, patch_size=16, stride=8)
    state = {**model.state_dict(), "patch_embed.proj.weight": torch.zeros(16, 3, 16, 16)}
    report = vizoo.load_checkpoint(finer, state)
    assert report.adapted == {"pos_embed": "positions of 8 x 8 to 11 x 11 patches, bicubic"}
    torch.testing.assert_close(finer.pos_embed.data, resize_positions(model.pos_embed.data, (8, 8), (11, 11)))
    assert torch.equal(finer.pos_embed[:, 60], model.pos_embed[:, 32])
    with pytest.raises(ValueError, match=r"pos_embed \(1, 64, 16\) instead of \(1, 122, 16\)"):
        vizoo.load_checkpoint(finer, {**state, "pos_embed": torch.zeros(1, 64, 16)})


def test_a_model_without_class_token_takes_a_checkpoint_with_one() -> None:
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    plain = tiny(class_token=False)
    report = vizoo.load_checkpoint(plain, model.state_dict())
    assert report.adapted == {"cls_token": "left out, this model has none"}
    middle = model.pos_embed.shape[1] // 2
    assert torch.equal(plain.pos_embed[:, middle], model.pos_embed[:, middle + 1])
    tokens = plain.forward_features(x)
    assert tokens.shape == (1, 64, 16)
    torch.testing.assert_close(plain(x), plain.head(tokens.mean(1)))


@pytest.mark.parametrize("size", [(64, 64), (50, 75)], ids=str)
def test_positions_of_overlapping_patches_take_their_mean(size: tuple[int, int]) -> None:
    model, x = tiny(patch_size=16, stride=8), torch.randn(1, 3, *size)
    rows, columns = (-(-side // 8) - 1 for side in size)
    tokens = model.stem(x)
    middle = (tokens.shape[1] - 1) // 2
    patches = torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), 1).view(rows, columns, 16)
    got = model.to_map(tokens, size)
    assert got.shape == (1, rows + 1, columns + 1, 16)
    torch.testing.assert_close(got[0, 0, 0], patches[0, 0])
    torch.testing.assert_close(got[0, 1, 2], patches[0:2, 1:3].mean((0, 1)))
    torch.testing.assert_close(got[0, rows, 1], patches[-1, 0:2].mean(0))


def test_the_stream_is_float32_in_a_half_precision_model() -> None:
    model = tiny().bfloat16()
    seen: list[torch.dtype] = []
    for block in model.layers:
        block.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
    x = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert {y.dtype for y in model.features(x)} == {torch.bfloat16}
    assert set(seen) == {torch.float32}


def test_steps_start_between_a_thousandth_and_a_tenth() -> None:
    linear = nn.Linear(12, 4096)
    init_step_projection(linear)
    steps = F.softplus(linear.bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert 0.3 < (steps < 1e-2).float().mean() < 0.7  # evenly over the decades
    assert linear.weight.abs().max() <= 12**-0.5


def test_drop_path_rises_from_block_to_block() -> None:
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3).layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_only_positions_and_class_token_are_named_as_not_decayed() -> None:
    assert tiny().no_weight_decay() == {"pos_embed", "cls_token"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (6, 0)}, "depths, embed_dim, expand, state_dim and conv_size must be positive"),
        (
            {"patch_size": 16, "stride": 4},
            "patch_size must be the stride or twice the stride.*got patches of 16 pixels",
        ),
        ({"patch_size": 64, "stride": 64}, "and at most 32, got patches of 64"),
        ({"prune_after": (5, 25)}, r"prune_after must name blocks 1 to 24, got \(5, 25\)"),
        ({"keep_ratio": 0.0}, r"keep_ratio must lie in \(0, 1\], got 0.0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("vim_tiny", **override)
