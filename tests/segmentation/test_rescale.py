"""The neck of plain backbones: strides 4 to 32, the official names, and segmenters on every plain family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from vizoo.registry import resolve
from vizoo.train.optim import parameter_groups
from vizoo.train.segmentation.heads import FCNHead, UPerHead
from vizoo.train.segmentation.rescale import Rescale
from vizoo.train.segmentation.segmenter import Segmenter
from vizoo.train.settings import load_config

CONFIG = "ade20k/upernet_plain_60k"


def plain(name: str, **options: Any) -> dict[str, Any]:
    """Arguments of a plain backbone that runs in milliseconds."""
    return {"name": name, **resolve(name).family.tiny, "drop_path_rate": 0.0, **options}


def test_strides_and_names_are_the_published_ones() -> None:
    neck = Rescale([8, 8, 8, 8])
    found = neck([torch.randn(2, 8, 6, 4)] * 4)
    assert [tuple(x.shape) for x in found] == [(2, 8, 24, 16), (2, 8, 12, 8), (2, 8, 6, 4), (2, 8, 3, 2)]
    assert neck.out_channels == (8, 8, 8, 8)
    assert {name for name, _ in neck.named_parameters()} == {
        f"fpn1.{layer}.{leaf}" for layer in (0, 1, 3) for leaf in ("weight", "bias")
    } | {"fpn2.0.weight", "fpn2.0.bias"}
    assert isinstance(neck.fpn1[1], nn.BatchNorm2d), "mmengine makes it synchronous on several GPUs"


def test_a_single_map_and_other_factors() -> None:
    neck = Rescale([4], factors=(2, 1, 0.5, 0.25))
    x = torch.randn(1, 4, 8, 8)
    finest, same, half, quarter = neck([x])
    assert torch.equal(same, x)
    assert torch.equal(half, nn.functional.max_pool2d(x, 2))
    assert torch.equal(quarter, nn.functional.max_pool2d(x, 4))
    assert (finest.shape[2:], neck.out_channels) == ((16, 16), (4,) * 4)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"one for each of its factors \(4.0, 2.0, 1.0, 0.5\), got 3"):
        Rescale([8, 8, 8])
    with pytest.raises(ValueError, match=r"factors must be 4, 2, 1, 0\.5 or 0\.25, got 3"):
        Rescale([8], factors=(3,))


@pytest.mark.parametrize(
    ("name", "options"),
    [("vim_tiny", {"class_token": False}), ("plainmamba_l2", {}), ("vig_tiny", {}), ("inline_deit_tiny", {})],
)
def test_segmenters_on_plain_backbones(name: str, options: dict[str, Any]) -> None:
    backbone = plain(name, **options)
    model = Segmenter(
        backbone,
        {"type": UPerHead, "channels": 8},
        {"type": FCNHead, "channels": 8},
        {"type": Rescale},
        num_classes=3,
    )
    stride = model.backbone.feature_info.reduction()[0]
    maps = model.maps(torch.randn(2, 3, 64, 96))
    assert [x.shape[2] * stride / 64 for x in maps] == [4, 2, 1, 0.5]
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)] * 2
    losses = model(images, [{"map": torch.randint(0, 3, (64, 96))}] * 2, mode="loss")
    (losses["loss_decode"] + losses["loss_aux"]).backward()
    assert all(p.grad is not None for p in model.parameters()), "several GPUs need a gradient of every parameter"


def test_the_recipe_is_the_published_one() -> None:
    config = load_config(CONFIG)
    assert (config.train_cfg.max_iters, config.train_dataloader.batch_size * 4) == (60_000, 32)
    assert config.auto_scale_lr.base_batch_size == 32
    (schedule,) = config.param_scheduler
    assert (schedule.warmup, schedule.start_ratio, schedule.power, schedule.min_ratio) == (1500, 1e-6, 1.0, 0.0)
    assert config.optim_wrapper.optimizer.lr == 2e-4
    assert config.optim_wrapper.optimizer.weight_decay == 0.1
    inference = config.model.inference
    assert (tuple(inference.crop), tuple(inference.stride)) == ((512, 512), (341, 341))
    assert config.model.backbone.drop_path_rate == 0.1
    with torch.device("meta"):
        model = MODELS.build({**config.model.to_dict(), "backbone": {**config.model.backbone, "pretrained": False}})
    assert model.backbone.pos_embed.shape == (1, 32 * 32, 192)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, **config.optim_wrapper.paramwise_cfg)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["neck.fpn1.0.weight"] == rates["decode_head.conv_seg.weight"] == 1
    assert rates["backbone.layers.23.norm.weight"] == pytest.approx(0.92)
    assert rates["backbone.layers.0.norm.weight"] == pytest.approx(0.92**24)
    assert rates["backbone.pos_embed"] == pytest.approx(0.92**25)
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays["backbone.pos_embed"] == decays["backbone.layers.3.mixer.D"] == decays["neck.fpn1.1.weight"] == 0
    assert decays["backbone.layers.3.mixer.A_log"] == decays["neck.fpn2.0.weight"] == 0.1


def test_plainmamba_spares_what_its_authors_spare(tmp_path: Path) -> None:
    config = load_config("ade20k/upernet_160k", ["model.backbone.name=plainmamba_l1"])
    spared = tuple(config.optim_wrapper.paramwise_cfg.not_decayed)
    config.dump(tmp_path / "saved.py")
    assert tuple(load_config(tmp_path / "saved.py").optim_wrapper.paramwise_cfg.not_decayed) == spared
    assert spared[-4:] == (".pos_embed", ".A_log", ".D", ".direction_Bs")
    with torch.device("meta"):
        backbone = {**config.model.backbone, "pretrained": False}
        model = MODELS.build({**config.model.to_dict(), "backbone": backbone})
    groups = parameter_groups(model, lr=1.0, weight_decay=0.01, not_decayed=spared)
    decays = {name.removeprefix("backbone."): g["weight_decay"] for g in groups for name in g["param_names"]}
    free = {name for name, decay in decays.items() if not decay}
    assert {"pos_embed", "layers.5.mamba.A_log", "layers.5.mamba.D", "layers.5.mamba.direction_Bs"} <= free
    assert {name.rpartition(".")[2] for name in free} == {"pos_embed", "A_log", "D", "direction_Bs", "weight", "bias"}
    assert all("norm" in name for name in free if name.endswith(("weight", "bias")))


def test_other_families_and_recipes_keep_their_rule() -> None:
    assert len(load_config("ade20k/upernet_160k").optim_wrapper.paramwise_cfg.not_decayed) == 4
    vmamba = load_config("ade20k/upernet_160k", ["model.backbone.name=vssm1_tiny_0230s"])
    assert ".A_log" not in vmamba.optim_wrapper.paramwise_cfg.not_decayed
    everything = load_config("ade20k/semantic_fpn_40k", ["model.backbone.name=plainmamba_l1"])
    assert tuple(everything.optim_wrapper.paramwise_cfg.not_decayed) == ()
