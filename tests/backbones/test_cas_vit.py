"""What only CAS-ViT has: gates instead of products of tokens, two classifiers, and what all of it folds to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.backbones.cas_vit import AdditiveMixer, CasVitBlock
from vizoo.registry import families


def tiny(**options: Any) -> vizoo.Backbone:
    """A small model in evaluation whose norms do something."""
    model = vizoo.create_model("rcvit_xs", **{"num_classes": 5, **families()["cas_vit"].tiny, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


@torch.no_grad()
def test_mixer_adds_what_gates_let_pass() -> None:
    channels = 6
    mixer, x = AdditiveMixer(channels).eval(), torch.randn(2, channels, 4, 5)
    q, k, v = F.conv2d(x, mixer.qkv.weight).split(channels, 1)
    total = torch.zeros_like(x)
    for gates, z in ((mixer.oper_q, q), (mixer.oper_k, k)):
        near, norm, _, squeeze = gates[0].block
        hidden = norm(F.conv2d(z, near.weight, near.bias, padding=1, groups=channels)).relu()
        z = z * torch.einsum("bchw,c->bhw", hidden, squeeze.weight.flatten()).sigmoid()[:, None]
        weights = z.mean((2, 3)) @ gates[1].block[1].weight.flatten(1).T
        total += z * weights.sigmoid()[:, :, None, None]
    around, out = (
        lambda y, conv=conv: F.conv2d(y, conv.weight, conv.bias, padding=1, groups=channels)
        for conv in (mixer.dwc, mixer.proj)
    )
    torch.testing.assert_close(mixer(x), out(around(total) * v))


def test_a_watched_projection_is_called() -> None:
    mixer, x, seen = AdditiveMixer(4).eval(), torch.randn(1, 4, 3, 3), []
    want = mixer(x)
    mixer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(mixer(x), want)
    assert seen == [(1, 12, 3, 3)]


def test_local_integration_is_never_dropped() -> None:
    block, x = CasVitBlock(4, 2.0, drop_path=0.999).train(), torch.randn(3, 4, 5, 5)
    torch.manual_seed(0)
    torch.testing.assert_close(block(x), x + block.local_perception(x))


def test_maps_lie_as_convolutions_read_them() -> None:
    for y in tiny().features(torch.randn(2, 3, 64, 96)):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_two_classifiers() -> None:
    model, x = tiny(), torch.randn(2, 3, 40, 40)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    pair = model.head(pooled), model.dist_head(pooled)
    torch.testing.assert_close(model(x), sum(pair) / 2)
    model.set_distilled_training()
    torch.testing.assert_close(model(x), sum(pair) / 2)
    model.train()
    assert [out.shape for out in model(x)] == [(2, 5), (2, 5)]
    model.set_distilled_training(False)
    assert model(x).shape == (2, 5)
    assert model.default_cfg["classifier"] == ("head", "dist_head")
    model.reset_classifier(3)
    assert (model.head.out_features, model.dist_head.out_features) == (3, 3)


def test_one_classifier() -> None:
    model = tiny(distillation=False)
    assert not any("dist_head" in key for key in model.state_dict())
    assert model.default_cfg["classifier"] == "head"
    model.set_distilled_training(False)
    with pytest.raises(ValueError, match="needs a second classifier: build the model with distillation=True"):
        model.set_distilled_training()


@pytest.mark.parametrize("distillation", [True, False])
def test_checkpoints_of_either_kind_give_the_same_logits(distillation: bool) -> None:
    source, model, x = tiny(distillation=distillation), tiny(distillation=not distillation), torch.randn(1, 3, 40, 40)
    report = vizoo.load_checkpoint(model, source.state_dict())
    torch.testing.assert_close(model(x), source(x))
    names = {"head.weight", "head.bias"} if distillation else {"dist_head.weight", "dist_head.bias"}
    assert set(report.adapted) == names


def test_other_classes_renew_both_classifiers() -> None:
    report = vizoo.load_checkpoint(tiny(num_classes=7), tiny().state_dict())
    assert set(report.fresh) == {"head.weight", "head.bias", "dist_head.weight", "dist_head.bias"}
    assert report.adapted == dict.fromkeys(("head", "dist_head"), "5 to 7 classes: newly initialised")


def test_dense_version_reads_official_names() -> None:
    model = tiny(num_classes=None, output_norms=True)
    official: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        stage = key.removeprefix("outnorm")
        official[f"norm{2 * int(stage[0])}{stage[1:]}" if stage != key else key] = value
    assert {"norm0.weight", "norm2.weight", "norm4.bias", "norm6.running_var"} <= official.keys()
    other, x = tiny(num_classes=None, output_norms=True), torch.randn(1, 3, 45, 70)
    vizoo.load_checkpoint(other, official)
    assert all(torch.equal(a, b) for a, b in zip(other(x), model(x), strict=True))
    for y, stage, index in zip(model(x), model.features(x), range(4), strict=True):
        torch.testing.assert_close(y, model.get_submodule(f"outnorm{index}")(stage))


@torch.no_grad()
def test_folded_whole() -> None:
    model, x = tiny(), torch.randn(2, 3, 45, 70)
    want = model(x)
    model.fuse(keep_norm=False)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "BatchNorm" not in kinds
    assert model.classifier_names == ("head",)
    other = tiny().fuse(keep_norm=False)
    assert vizoo.load_checkpoint(other, model.state_dict()).adapted == {}
    assert torch.equal(other(x), model(x))
    model.set_distilled_training(False)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), want, rtol=1e-5, atol=1e-5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@torch.no_grad()
def test_a_watched_classifier_stays_one_of_two() -> None:
    model, x = tiny(), torch.randn(1, 3, 40, 40)
    model.head.register_forward_hook(lambda module, inputs, output: None)
    want = model(x)
    model.fuse(keep_norm=False)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert model.classifier_names == ("head", "dist_head")
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_weights_to_be_fetched_by_hand_name_the_way(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZOO_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fetched by hand .*drive\.google\.com/file/d/1kwRPtJ4FdmN"):
        vizoo.create_model("rcvit_xs_384", pretrained=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1)}, r"embed_dims and depths need one entry per stage, got \(48, 56, 112, 220\) and \(1, 1\)"),
        ({"mlp_ratio": 0.0}, "embed_dims, depths and mlp_ratio must be positive"),
        ({"embed_dims": (47, 56, 112, 220)}, "embed_dims must begin with an even number.*got 47, nearest valid: 48"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configurations(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vizoo.create_model("rcvit_xs", **override)
