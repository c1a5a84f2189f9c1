"""What only SLAB has: norms that change while they train and fold away, linear attention, two spellings of norms."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vizoo
from vizoo.backbones.progressive_norm import ProgressiveNorm, RepBN, TokenBatchNorm
from vizoo.backbones.slab import LinearBranch, LinearMapAttention, LinearMixer, LinearWindowAttention, window_places
from vizoo.registry import families

HOSTS = {
    "slab_deit": {"class_token": False, "linear_stages": 4},
    "slab_pvt": {"reductions": (8, 4, 2, 1)},
    "slab_swin": {},
    "slab_cswin": {"unused_scale": True},
}
"""Overrides beside those of the contract's tests, for branches that these do not run."""


def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)


def tiny(host: str, **options: Any) -> Any:
    """A small model with progressive norms, in which every branch matters."""
    family = families()[host]
    chosen = {"num_classes": 5, **family.tiny, "norm_steps": 10, **HOSTS[host], **options}
    model = vizoo.create_model(next(iter(family.variants)), **chosen).eval()
    randomize(model)
    return model


# Norms.


def test_norm_against_its_definition() -> None:
    norm, x = RepBN(6), 3 * torch.randn(2, 4, 5, 6) + 1
    nn.init.constant_(norm.alpha, 0.3)
    nn.init.normal_(norm.bn.weight)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
    want = (x - mean) / (var + 1e-5).sqrt() * norm.bn.weight + norm.bn.bias + 0.3 * x
    torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.bn.running_var, 0.9 + 0.1 * x.var((0, 1, 2)))
    norm.eval()
    want = norm.bn(x.flatten(0, 2)).view(x.shape) + 0.3 * x
    torch.testing.assert_close(norm(x), want)
    scale, shift = norm.scale_and_shift()
    torch.testing.assert_close((x * scale + shift).float(), want)


def test_layer_norm_gives_way_over_the_steps() -> None:
    norm, x = ProgressiveNorm(6, steps=4).train(), torch.randn(2, 7, 6)
    batch_norm = copy.deepcopy(norm.norm2)
    for share in (1, 0.75, 0.5, 0.25, 0, 0):
        assert int(norm.iter) == 4 * share
        torch.testing.assert_close(norm(x), share * norm.norm1(x) + (1 - share) * batch_norm(x))
    assert norm.finished
    torch.testing.assert_close(norm.norm2.bn.running_mean, batch_norm.bn.running_mean)
    assert torch.equal(norm.eval()(x), norm.norm2(x))


def test_warm_up_is_layer_norm_alone() -> None:
    norm, x = ProgressiveNorm(6, steps=4, warmup=2).train(), torch.randn(2, 7, 6)
    for left in (1, 0):
        assert torch.equal(norm(x), norm.norm1(x))
        assert (int(norm.warm), int(norm.iter)) == (left, 4)
    assert torch.equal(norm.norm2.bn.running_mean, torch.zeros(6))
    norm(x)
    assert int(norm.iter) == 3
    norm.set_schedule(steps=8, done=1)
    assert (int(norm.warm), int(norm.iter), int(norm.total_step)) == (1, 8, 8)


def test_recomputation_repeats_its_step() -> None:
    norm, x = ProgressiveNorm(6, steps=4).train(), torch.randn(2, 7, 6)
    norm(x)
    twin = copy.deepcopy(norm)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(x).square().sum().backward()
    checkpoint(twin, y, use_reentrant=False).square().sum().backward()
    assert int(norm.iter) == int(twin.iter) == 2
    assert torch.equal(x.grad, y.grad)


def test_compiled_norm_counts() -> None:
    norm, x = ProgressiveNorm(6, steps=4).train(), torch.randn(2, 7, 6)
    want = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), want(x))
    assert int(norm.iter) == 1
    torch._dynamo.reset()


def test_half_precision_keeps_small_shares() -> None:
    norm, x = ProgressiveNorm(6, steps=1000).train(), torch.randn(2, 7, 6)
    norm.set_schedule(1000, done=999)
    want = copy.deepcopy(norm)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want.bfloat16())


def test_norm_refuses_what_makes_no_schedule() -> None:
    with pytest.raises(ValueError, match="a norm needs 1 step or more to turn into another, got 0"):
        ProgressiveNorm(6, steps=0)
    with pytest.raises(ValueError, match="warmup must be 0 or more, got -2"):
        ProgressiveNorm(6, steps=5, warmup=-2)
    with pytest.raises(ValueError, match="done must be 0 or more, got -1"):
        ProgressiveNorm(6, steps=5).set_schedule(5, done=-1)
    with pytest.raises(ValueError, match=r"tokens must have the shape \(N, C\), got \(2, 3, 6\)"):
        TokenBatchNorm(6)(torch.zeros(2, 3, 6))


# Attention.


def by_definition(mixer: LinearMixer, qkv: Tensor, positions: Tensor) -> Tensor:
    """Weights of all pairs, and one convolution after the other, of a map (H, W, 3C)."""
    (height, width), heads = qkv.shape[:2], mixer.heads
    q, k, v = qkv.flatten(0, 1).chunk(3, -1)  # (N, C)
    k = k + positions
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(0, 1) for each in (q, k, v))  # (heads, N, d)
    scores = q.relu() @ k.relu().mT
    out = scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)
    local = [mixer.dwc(each.T.unflatten(1, (height, width))) for each in v]  # (d, H, W)
    return (out.transpose(0, 1).flatten(1) + torch.cat(local).flatten(1).T).unflatten(0, (height, width))


def test_linear_attention_of_a_map() -> None:
    mixer, x = LinearMapAttention(12, 3, (4, 6)), torch.randn(2, 4, 6, 12)
    randomize(mixer)
    qkv = torch.cat((mixer.q(x), mixer.kv(x)), -1)
    want = torch.stack([by_definition(mixer, each, mixer.positional_encoding[0]) for each in qkv])
    torch.testing.assert_close(mixer(x), mixer.proj(want))
    handle = mixer.dwc.register_forward_hook(lambda *_: None)  # whoever watches a layer sees it called
    torch.testing.assert_close(mixer(x), mixer.proj(want))
    handle.remove()


def test_convolutions_of_a_branch_are_one() -> None:
    branch, qkv = LinearBranch(12, 3, (4, 6), unused_scale=True), torch.randn(2, 4, 6, 3, 12)
    randomize(branch)
    v = qkv[:, :, :, 2].permute(0, 3, 1, 2)
    want = LinearMixer.convolve(branch, qkv[:, :, :, 2]) + branch.get_v(v).permute(0, 2, 3, 1)
    torch.testing.assert_close(branch.convolve(qkv[:, :, :, 2]), want)
    handle = branch.get_v.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(branch.convolve(qkv[:, :, :, 2]), want)
    handle.remove()


@pytest.mark.parametrize(
    ("size", "always", "shift"), [((4, 4), False, 0), ((3, 9), False, 0), ((5, 9), False, 2), ((3, 4), True, 2)]
)
def test_windows_are_padded_and_rolled(size: tuple[int, int], always: bool, shift: int) -> None:
    mixer, x = LinearWindowAttention(12, 3, 4, shifted=True, always_shift=always), torch.randn(1, *size, 12)
    randomize(mixer)
    rows, columns = (-(-side // 4) * 4 for side in size)
    padded = F.pad(x, (0, 0, 0, columns - size[1], 0, rows - size[0]))  # zeros behind the norm
    qkv = mixer.qkv(padded).roll((-shift, -shift), (1, 2))[0]
    want = torch.zeros(rows, columns, 12)
    for y in range(0, rows, 4):
        for z in range(0, columns, 4):
            want[y : y + 4, z : z + 4] = by_definition(mixer, qkv[y : y + 4, z : z + 4], mixer.positional_encoding[0])
    want = want.roll((shift, shift), (0, 1))[None, : size[0], : size[1]]
    torch.testing.assert_close(mixer(x), mixer.proj(want))


def test_places_of_windows_lead_there_and_back() -> None:
    places = window_places(5, 6, 4, 3, torch.device("cpu"))
    assert places.source[places.target].tolist() == list(range(30))
    assert int(places.inside.sum()) == 30


# Models.


def test_linear_attention_of_tokens_at_any_size_and_in_one_graph() -> None:
    model = tiny("slab_deit")  # the contract's tests run softmax in this frame
    for size in ((32, 32), (37, 61)):
        x = torch.randn(2, 3, *size)
        maps = model.features(x)
        assert [y.shape[2:] for y in maps] == [tuple(-(-s // stage.stride) for s in size) for stage in model.stages]
        torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_reduction_leaves_out_what_fills_no_patch() -> None:
    model, x = tiny("slab_pvt", linear_stages=0), torch.randn(2, 16, 24, 16)
    attention = model.block1[0].attn
    assert attention.sr.stride == (8, 8)
    torch.testing.assert_close(attention.reduce(x[:, :15, :22]), attention.reduce(x[:, :8, :16]))
    assert attention.reduce(x).shape == (2, 6, 16)
    assert model(torch.randn(2, 3, 33, 50)).shape == (2, 5)


@pytest.mark.parametrize("host", HOSTS)
def test_training_counts_once_and_reaches_every_parameter(host: str) -> None:
    model, x = tiny(host, drop_path_rate=0.0).train(), torch.randn(2, 3, 64, 64)
    model(x)  # at the first step the batch norm has no share
    model(x).square().mean().backward()
    without = {
        name for name, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    }
    assert without == set()
    norms = [module for module in model.modules() if isinstance(module, ProgressiveNorm)]
    assert {int(norm.iter) for norm in norms} == {8}
    model.set_grad_checkpointing()
    model(x).sum().backward()
    assert {int(norm.iter) for norm in norms} == {7}


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_fusing_leaves_no_norm(host: str) -> None:
    model, twin = tiny(host), tiny(host)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 37, 61)
    logits, tokens, maps = model(x), model.forward_features(x), model.features(x)
    scale = logits.abs().max()
    model.fuse()
    assert (model(x) - logits).abs().max() <= 1e-5 * scale
    assert (model.forward_features(x) - tokens).abs().max() <= 1e-5 * tokens.abs().max()
    for got, want in zip(model.features(x), maps, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    kept = [name for name, module in model.named_modules() if isinstance(module, (RepBN, ProgressiveNorm))]
    assert kept in (["norm", "norm.norm2"], [])  # PVT's has no final norm
    twin.fuse(keep_norm=False)
    assert (twin(x) - logits).abs().max() <= 1e-5 * scale
    assert not [module for module in twin.modules() if isinstance(module, (RepBN, ProgressiveNorm, nn.LayerNorm))]
    other = tiny(host).fuse(keep_norm=False)
    assert not vizoo.load_checkpoint(other, twin.state_dict()).adapted
    assert torch.equal(other(x), twin(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["slab_swin_tiny", "pvt_tiny_prepbn"])
def test_a_fused_model_gives_the_official_logits(parity: ModuleType, name: str) -> None:
    fixture = parity.load(name)
    model = vizoo.create_model(name).eval()
    vizoo.load_checkpoint(model, parity.fill_state_dict(fixture))
    model.fuse(keep_norm=False)
    case = fixture["goldens"][0]
    parity.check(case, "logits", model(parity.image(case["input"]["shape"], case["input"]["seed"])))


def test_either_spelling_of_the_norms_is_loaded() -> None:
    x = torch.randn(1, 3, 64, 64)
    for host in HOSTS:
        wrapped, plain = tiny(host), tiny(host, norm_steps=0)
        report = vizoo.load_checkpoint(plain, wrapped.state_dict())
        assert report.adapted["norms"] == "the batch norms of progressive norms"
        assert torch.equal(plain(x), wrapped(x))
        other = tiny(host)
        report = vizoo.load_checkpoint(other, plain.state_dict())
        assert "to which a LayerNorm without a share was added" in report.adapted["norms"]
        assert torch.equal(other(x), wrapped(x))
        assert all(module.finished for module in other.modules() if isinstance(module, ProgressiveNorm))


@pytest.mark.parametrize("steps", [0, 10])
def test_either_spelling_fits_a_pyramid(steps: int) -> None:
    whole = tiny("slab_swin", norm_steps=10 - steps)
    pyramid = tiny("slab_swin", norm_steps=steps, num_classes=None, features_only=True, out_indices=(0,))
    vizoo.load_checkpoint(pyramid, whole.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(pyramid(x), whole.features(x, [0]))


def test_a_checkpoint_goes_on_where_it_was_and_without_counters_is_finished() -> None:
    model, other = tiny("slab_swin").train(), tiny("slab_swin")
    model(torch.randn(2, 3, 64, 64))
    state = model.state_dict()
    vizoo.load_checkpoint(other, state)
    assert int(other.norm.iter) == 9
    bare = {key: value for key, value in state.items() if value.is_floating_point()}
    report = vizoo.load_checkpoint(other, bare)
    assert report.adapted["iter"] == "not in the checkpoint, so the norms are at the end of their schedule"
    assert int(other.norm.iter) == 0


def test_tables_of_positions_are_resized() -> None:
    small, large = tiny("slab_pvt"), tiny("slab_pvt", img_size=96)
    report = vizoo.load_checkpoint(large, small.state_dict())
    assert report.adapted["block1.0.attn.positional_encoding"] == "positions of 16 x 16 to 24 x 24, bilinear"
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("slab_swin_tiny", {"linear_stages": 5}, r"linear_stages must lie in 0\.\.4, the number of stages, got 5"),
        ("slab_swin_tiny", {"linear_window": 1}, "linear_window must be at least 2, got 1"),
        ("slab_swin_tiny", {"norm_steps": -1}, "norm_steps must be 0 or more, got -1"),
        ("slab_cswin_tiny", {"norm_warmup": -1}, "norm_warmup must be 0 or more, got -1"),
        ("slab_deit_tiny", {"class_token": True}, "with linear_stages=4 set class_token=False"),
        (
            "pvt_tiny_prepbn",
            {"reductions": (8, 4)},
            r"reductions need one entry per stage, got \(8, 4\) for 4 stages",
        ),
        ("pvt_tiny_prepbn", {"reductions": (8, 8, 2, 1)}, r"must lie in 1 to \(8, 4, 2, 1\), got \(8, 8, 2, 1\)"),
    ],
)
def test_impossible_configurations(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model(name, **override)


@torch.no_grad()
def test_a_dense_version_shifts_on_every_map_and_folds() -> None:
    dense = {"num_classes": None, "features_only": True, "output_norms": True, "depths": (2, 1, 2, 1)}
    model, x = tiny("slab_swin", **dense), torch.randn(1, 3, 45, 70)
    assert [block.attn.shift(8, 8) for block in model.layers[0].blocks] == [0, 4]
    assert [block.attn.shift(8, 8) for block in tiny("slab_swin").layers[0].blocks] == [0, 0]
    maps = model(x)
    for got, want in zip(model.fuse()(x), maps, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    kept = {type(module) for module in model.modules() if isinstance(module, (RepBN, ProgressiveNorm, nn.LayerNorm))}
    assert kept == {vizoo.backbones.layers.LayerNorm}  # of the outputs


def test_windows_follow_the_kind_of_attention() -> None:
    windows = {name: vizoo.describe(name).config.windows for name in ("slab_swin_tiny", "swin_tiny_prepbn")}
    assert windows == {"slab_swin_tiny": (56, 28, 7, 7), "swin_tiny_prepbn": (7, 7, 7, 7)}
