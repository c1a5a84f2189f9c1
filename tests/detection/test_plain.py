"""Detectors on plain backbones: the simple pyramid, the adapter, official names, and their recipes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

import vizoo
from vizoo.dense import create_dense
from vizoo.registry import resolve
from vizoo.train.detection import CascadeMaskRCNN, Detector, MaskRCNN, RetinaNet
from vizoo.train.detection.adapter import DeformableAttention, VitAdapter, pixel_centres, sample_maps
from vizoo.train.detection.heads import BoxHead
from vizoo.train.detection.neck import Pyramid, SimplePyramid
from vizoo.train.optim import parameter_groups
from vizoo.train.settings import load_config

Batch = dict[str, Any]
SMALL = {"rpn": {"train_per_level": 50, "train_kept": 30, "test_kept": 10, "depth": 2}, "mask": {"hidden": (16,)}}


def plain(name: str, **options: Any) -> dict[str, Any]:
    """Arguments of a plain backbone that runs in milliseconds."""
    return {"name": name, **resolve(name).family.tiny, "drop_path_rate": 0.0, **options}


def mamba(**options: Any) -> dict[str, Any]:
    return plain("plainmamba_l2", embed_dim=24, output_norms=False, **options)


def mask_rcnn() -> Detector:
    box = {"convs": (16,) * 4, "hidden": (16,), "samples": 30}
    adapter = {"type": VitAdapter, "channels": 8}
    neck = {"type": Pyramid, "norm": True}
    options = {"num_classes": 3, "channels": 16, "norm_eval": False}
    return MaskRCNN(mamba(), adapter=adapter, neck=neck, box=box, **SMALL, **options)


def retinanet() -> Detector:
    adapter = {"type": VitAdapter, "channels": 8, "out_indices": (1, 2, 3)}
    neck = {"type": Pyramid, "norm": True, "extra_on_output": True}
    return RetinaNet(mamba(), adapter=adapter, neck=neck, num_classes=3, channels=256, norm_eval=False)


def cascade() -> Detector:
    box = {"convs": (16, 16), "hidden": (16,), "samples": 30, "norm": "layer", "giou_weight": 0.0}
    rpn, mask = SMALL["rpn"], {**SMALL["mask"], "norm": "layer"}
    backbone = plain("vim_tiny", class_token=False, patch_size=16, stride=16, out_indices=(3,))
    options: dict[str, Any] = {"num_classes": 3, "channels": 16, "pad_size": (128, 160)}
    return CascadeMaskRCNN(backbone, neck={"type": SimplePyramid}, rpn=rpn, box=box, mask=mask, **options)


@pytest.mark.parametrize("build", [mask_rcnn, retinanet, cascade])
def test_every_parameter_learns_and_predictions_come(build: Any, batch: Batch) -> None:
    model = build().train()
    sum(model(**batch, mode="loss").values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = model.eval()(batch["images"])
    sides = (128, 160) if build is cascade else (96, 96)
    strides = (8, 16, 32, 64, 128) if build is retinanet else (4, 8, 16, 32, 64)
    assert model.neck.strides == strides
    assert [tuple(x.shape[2:]) for x in maps] == [tuple(-(-side // s) for side in sides) for s in strides]
    assert len(model(**batch, mode="predict")) == 2


@pytest.mark.parametrize("build", [mask_rcnn, cascade])
def test_autocast_stays_close_to_float32(build: Any, batch: Batch) -> None:
    model = build().eval()
    with torch.no_grad():
        exact = model(batch["images"])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(batch["images"])
    for one, other in zip(exact, rounded, strict=True):
        assert (other.float() - one).abs().mean() < 0.05 * one.abs().mean()


def test_simple_pyramid() -> None:
    backbone = create_dense(**plain("vig_tiny", out_indices=(1, 3)))
    neck = SimplePyramid(backbone, 16, extra_convs=True, strides=(8, 16, 32))
    x = torch.randn(2, backbone.feature_info.channels()[-1], 4, 6)
    assert [tuple(y.shape) for y in neck([x * 0, x])] == [
        (2, 16, *s) for s in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
    ]
    assert neck.strides == (8, 16, 32, 64, 128)
    same = neck.simfp_4
    first = F.layer_norm(F.conv2d(x, same[0].weight).movedim(1, -1), (16,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(same[0](x), first)
    names = {name for name, _ in SimplePyramid(backbone, 16).named_parameters()}
    assert {"simfp_2.0.weight", "simfp_2.1.bias", "simfp_2.3.weight", "simfp_2.4.norm.weight"} <= names
    assert {"simfp_3.0.bias", "simfp_3.2.weight", "simfp_4.1.norm.bias", "simfp_5.1.weight"} <= names
    with pytest.raises(ValueError, match="strides must be 16, that of the map, times or over 1, 2 or 4, got 2"):
        SimplePyramid(backbone, 16, strides=(2, 4))


def test_sampling_reads_pixels_and_what_lies_between() -> None:
    shapes = [(2, 3), (4, 1)]
    value = torch.randn(1, 10, 2, 4, dtype=torch.float32)
    places = pixel_centres(shapes, value.device)
    assert places[1].tolist() == pytest.approx([0.5, 0.25])
    positions = places[:6].view(1, 6, 1, 1, 1, 2).expand(1, 6, 2, 2, 1, 2)
    weights = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2, 1).expand(1, 6, 2, 2, 1)
    torch.testing.assert_close(sample_maps(value, shapes, positions, weights), value[:, :6].flatten(2))
    between = positions + torch.tensor([1 / 6, 0.0])  # half a pixel to the right, at the border half of it is outside
    found = sample_maps(value, shapes, between, weights).view(1, 2, 3, 2, 4)
    grid = F.pad(value[:, :6].view(1, 2, 3, 2, 4), (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(found, (grid[:, :, :-1] + grid[:, :, 1:]) / 2)


def test_attention_starts_in_rings() -> None:
    attention = DeformableAttention(16, 4, 2, 3)
    attention.reset_parameters()
    offsets = attention.sampling_offsets.bias.view(4, 2, 3, 2)
    assert torch.equal(offsets[0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]).expand(2, 3, 2))
    torch.testing.assert_close(offsets[1, 0, 1], torch.tensor([0.0, 2.0]))
    assert not attention.attention_weights.weight.any()


def test_an_adapter_takes_nothing_at_first_and_any_size() -> None:
    """What it adds to the backbone's map starts with a factor of zero, so the backbone gives what it gives alone."""
    backbone = create_dense(**mamba()).eval()
    adapter = VitAdapter(backbone, channels=8).eval()
    seen: list[Tensor] = []
    adapter.interactions[-1].extractor.register_forward_hook(lambda _, args, out: seen.append(args[3]))
    images = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        maps = adapter(backbone, images)
        alone = backbone(images)[-1]
    torch.testing.assert_close(seen[0].permute(0, 3, 1, 2), alone)
    assert [tuple(x.shape[2:]) for x in maps] == [(18, 25), (9, 13), (5, 7), (3, 4)]


def to_official(name: str) -> str:
    """The name that a parameter of a detector with an adapter has in its authors' checkpoints."""
    pairs = (
        (r"^adapter\.", "backbone."),
        (r"^neck\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"^neck\.inner_blocks\.(\d)\.1\.", r"neck.lateral_convs.\1.bn."),
        (r"^neck\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"^neck\.layer_blocks\.(\d)\.1\.", r"neck.fpn_convs.\1.bn."),
        (r"^neck\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
        (r"^neck\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
        (r"^neck\.extra_blocks\.p6_norm\.", "neck.fpn_convs.3.bn."),
        (r"^neck\.extra_blocks\.p7_norm\.", "neck.fpn_convs.4.bn."),
        (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"^box\.head\.features\.([0-3])\.0\.", r"roi_head.bbox_head.shared_convs.\1.conv."),
        (r"^box\.head\.features\.([0-3])\.1\.", r"roi_head.bbox_head.shared_convs.\1.bn."),
        (r"^box\.head\.features\.5\.", "roi_head.bbox_head.shared_fcs.0."),
        (r"^box\.head\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"^box\.head\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
        (r"^mask\.heads\.0\.features\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
        (r"^mask\.heads\.0\.predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
        (r"^mask\.heads\.0\.predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
        (r"^head\.head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
        (r"^head\.head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
        (r"^head\.head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"^head\.head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    )
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_official_checkpoints_load_whole(kind: str) -> None:
    def build() -> Detector:
        rpn = {**SMALL["rpn"], "depth": 1}
        if kind == "retinanet":
            return retinanet()
        box = {"convs": (16,) * 4, "hidden": (16,)}
        neck = {"type": Pyramid, "norm": True}
        adapter = {"type": VitAdapter, "channels": 8}
        return MaskRCNN(mamba(), adapter=adapter, neck=neck, rpn=rpn, box=box, mask={"hidden": (16,)}, channels=16)

    source, model = build(), build()
    state = {to_official(key): value.clone() for key, value in source.state_dict().items()}
    if kind == "retinanet":  # theirs hold the map of stride 4, too, which nothing reads
        extra = VitAdapter(source.backbone, channels=8).state_dict()
        state |= {f"backbone.{k}": v for k, v in extra.items() if k.startswith(("up.", "ad_norm1.", "spm.fc1."))}
        assert "backbone.up.weight" in state
    assert {"backbone.level_embed", "backbone.interactions.0.extractor.ffn.dwconv.dwconv.weight"} <= set(state)
    assert {"backbone.interactions.3.extra_extractors.1.attn.value_proj.weight", "backbone.spm.stem.4.bias"} <= set(
        state
    )
    model.load_checkpoint({"state_dict": state})
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"all stages of a plain backbone, each of stride 16, got strides \[4, 8, 16"):
        VitAdapter(create_dense(**plain("swin_tiny_patch4_window7_224")))
    with pytest.raises(ValueError, match=r"stride 16, got strides \[16, 16, 16, 16\], 2 of them built"):
        VitAdapter(create_dense(**mamba(out_indices=(1,))))
    with pytest.raises(ValueError, match="needs stages that hold maps, those of Vim hold tokens"):
        VitAdapter(create_dense(**plain("vim_tiny", patch_size=16, stride=16)))
    with pytest.raises(ValueError, match="num_heads must divide the backbone's 24 channels, got 5"):
        VitAdapter(create_dense(**mamba()), num_heads=5)
    with pytest.raises(ValueError, match=r"maps 0 to 3 in order, got \(3, 1\)"):
        VitAdapter(create_dense(**mamba()), out_indices=(3, 1))
    with pytest.raises(ValueError, match="norm must be one of batch, layer, got 'layr'; did you mean 'layer'"):
        BoxHead(8, 3, norm="layr")
    with pytest.raises(ValueError, match="for a plain backbone a SimplePyramid or VitAdapter"):
        Pyramid(create_dense(**mamba()))


def built(name: str) -> tuple[Any, Any, dict[str, float], dict[str, float]]:
    """A config, its model, and the decay and rate of each parameter."""
    config = load_config(name)
    options = config.model.to_dict()
    with torch.device("meta"):
        model = MODELS.build({**options, "backbone": {**options["backbone"], "pretrained": False}})
    decay = config.optim_wrapper.optimizer.weight_decay
    groups = parameter_groups(model, lr=1.0, weight_decay=decay, **config.optim_wrapper.paramwise_cfg)
    decays, rates = ({n: g[key] for g in groups for n in g["param_names"]} for key in ("weight_decay", "lr"))
    return config, model, decays, rates


@pytest.mark.parametrize("name", ["mask_rcnn_plain_1x", "retinanet_plain_1x"])
def test_the_recipes_of_plainmamba(name: str) -> None:
    config, model, decays, rates = built(f"coco/{name}")
    assert (config.optim_wrapper.optimizer.lr, config.train_cfg.max_epochs) == (1e-4, 12)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    assert config.model.backbone.drop_path_rate == model.adapter.interactions[0].extractor.drop_path.rate == 0.1
    assert (config.optim_wrapper.clip_grad is None) == (name == "mask_rcnn_plain_1x")
    assert set(rates.values()) == {1.0}
    free = {re.sub(r".*\.", "", key) for key, decay in decays.items() if not decay}
    assert free == {"pos_embed", "level_embed", "A_log", "D", "direction_Bs", "weight", "bias"}
    assert decays["backbone.layers.3.mamba.in_proj.weight"] == decays["adapter.spm.stem.1.weight"] == 0.05
    assert decays["adapter.ad_norm2.weight"] == decays["adapter.level_embed"] == 0
    for size, rate in (("l2", 0.2), ("l3", 0.3)):
        other = load_config(f"coco/{name}", [f"model.backbone.name=plainmamba_{size}"])
        assert other.model.backbone.drop_path_rate == rate
    with torch.device("meta"):
        large = VitAdapter(vizoo.create_model("plainmamba_l3", features_only=True))
    assert (model.adapter.interactions[0].injector.attn.heads, large.interactions[0].injector.attn.heads) == (6, 8)


def test_the_recipe_of_vim() -> None:
    config, model, decays, rates = built("coco/cascade_mask_rcnn_plain_100e")
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.1)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    assert (config.train_cfg.max_epochs, tuple(config.param_scheduler[0].milestones)) == (100, (89, 96))
    assert config.model.backbone.drop_path_rate == 0.1
    assert model.backbone.pos_embed.shape == (1, 64 * 64, 192)
    assert rates["backbone.layers.23.norm.weight"] == pytest.approx(0.837)
    assert rates["backbone.pos_embed"] == pytest.approx(0.837**25)
    assert rates["neck.simfp_2.0.weight"] == rates["box.stages.0.head.cls_score.weight"] == 1
    spared = {key for key, decay in decays.items() if not decay}
    assert {"backbone.pos_embed", "neck.simfp_2.4.norm.weight", "box.stages.2.head.features.3.1.weight"} <= spared
    assert "mask.heads.0.features.0.1.bias" in spared
    assert decays["box.stages.2.head.features.3.0.weight"] == decays["backbone.layers.0.mixer.D"] == 0.1
