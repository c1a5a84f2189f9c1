"""Published checkpoints of whole detectors and segmenters: a record each, and the model that each one belongs to.

Importing this module is cheap: the modules of the models are imported when one is built.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vizoo
from vizoo.backbones.base import nearest
from vizoo.checkpoint import CheckpointMismatch
from vizoo.weights.record import Weights
from vizoo.weights.store import download

if TYPE_CHECKING:
    from mmengine.model import BaseModel

DETECT, SEGMENT = TASKS = ("detect", "segment")

_SWIN = "https://github.com/SwinTransformer/storage/releases/download"
_MMDETECTION = "https://download.openmmlab.com/mmdetection/v2.0/swin"
_PLAINMAMBA = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main"
_SWIN_DETECTION = {
    "repository": "SwinTransformer/Swin-Transformer-Object-Detection",
    "commit": "c7b20110addde0f74b1fbf812b403d16a59a87a9",
}
_SWIN_SEGMENTATION = {
    "repository": "SwinTransformer/Swin-Transformer-Semantic-Segmentation",
    "commit": "87e6f90577435c94f3e92c7db1d36edc234d91f6",
}

_PLAINMAMBA_ORIGIN = {
    "repository": "ChenhongyiYang/PlainMamba",
    "commit": "0975a1d0d8bca50e7b85cf15e53de2a383ae12a0",
    "note": "The authors' count of parameters leaves out those that belong to no layer.",
}


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """A published checkpoint of a whole detector or segmenter.

    Attributes:
        name: `architecture.backbone.schedule`; the backbone is a variant of the zoo.
        task: `detect` or `segment`.
        model: Class of the model, by its name as `type`, and its arguments; of the backbone's only what differs.
        weights: The file, its origin and licence, and the published results. `labels` names the data set.
    """

    name: str
    task: str
    model: Mapping[str, Any]
    weights: Weights

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.name.split(".")[1]

    def build(self) -> BaseModel:
        """The model with initial weights, in training mode."""
        from .dense_models import build_model

        backbone = {**self.model.get("backbone", {}), "name": self.backbone}
        return build_model({**self.model, "backbone": backbone}, self.task)

    def load(self, file: str | Path) -> BaseModel:
        """The model with the weights of a file, which must fit strictly.

        Raises:
            CheckpointMismatch: The file is another model's.
            FileNotFoundError: There is no such file.
            vizoo.weights.errors.WeightsError: The file cannot be read.
        """
        from .dense_models import load_whole

        model = self.build()
        try:
            load_whole(model, file)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"the file does not hold {self.name}: {error}") from error
        return model


def _swin_coco(
    architecture: str, model: str, size: str, schedule: str, params: int, gmacs: int, box_ap: float, mask_ap: float
) -> DenseWeights:
    backbone = f"swin_{size}_patch4_window7"
    path = f"v1.0.3/{architecture}_{backbone}_1x" if schedule == "1x" else f"v1.0.2/{architecture}_{backbone}"
    return DenseWeights(
        name=f"{architecture}.{backbone}_224.coco_{schedule}",
        task=DETECT,
        model={"type": model},
        weights=_coco(f"{_SWIN}/{path}.pth", params, box_ap, mask_ap, macs=gmacs * 1e9, **_SWIN_DETECTION),
    )


def _mmdetection(schedule: str, path: str, box_ap: float, mask_ap: float) -> DenseWeights:
    return DenseWeights(
        name=f"mask_rcnn.swin_tiny_patch4_window7_224.{schedule}",
        task=DETECT,
        # Version 3 drops proposals without an extent, which the Swin authors' code keeps.
        model={"type": "MaskRCNN", "rpn": {"drop_empty": True}},
        weights=_coco(
            f"{_MMDETECTION}/{path}",
            47_794_602,
            box_ap,
            mask_ap,
            repository="open-mmlab/mmdetection",
            commit="v3.3.0",
            note="Trained by mmdetection's own code, whose names and order of merged channels are translated.",
        ),
    )


def _plainmamba_coco(architecture: str, size: str, params: int, box_ap: float, mask_ap: float | None) -> DenseWeights:
    model: dict[str, Any] = {"backbone": {"output_norms": False}, "adapter": {"type": "VitAdapter"}}
    if architecture == "mask_rcnn":
        model |= {"type": "MaskRCNN", "neck": {"type": "Pyramid", "norm": True}}
        model |= {"box": {"convs": (256,) * 4, "hidden": (1024,)}}
    else:
        model |= {"type": "RetinaNet", "neck": {"type": "Pyramid", "norm": True, "extra_on_output": True}}
        model["adapter"]["out_indices"] = (1, 2, 3)
    url = f"{_PLAINMAMBA}/detection/{architecture.replace('_', '')}/{size}_1x.pth"
    return DenseWeights(
        name=f"{architecture}.plainmamba_{size}.coco_1x",
        task=DETECT,
        model=model,
        weights=_coco(url, params, box_ap, mask_ap, **_PLAINMAMBA_ORIGIN),
    )


def _coco(url: str, params: int, box_ap: float, mask_ap: float | None, **origin: Any) -> Weights:
    return Weights(
        url=url,
        license="Apache-2.0",
        container="state_dict",
        input_size=(3, 800, 1280),
        interpolation="bilinear",
        num_classes=80,
        labels="coco",
        metrics={"box_ap": box_ap} | ({} if mask_ap is None else {"mask_ap": mask_ap}),
        params=params,
        **origin,
    )


def _upernet(size: str, params: int, gmacs: int, miou: float, miou_ms_flip: float) -> DenseWeights:
    backbone = f"swin_{size}_patch4_window7"
    return DenseWeights(
        name=f"upernet.{backbone}_224.ade20k_160k",
        task=SEGMENT,
        model={
            "type": "Segmenter",
            "decode_head": {"type": "UPerHead"},
            "auxiliary_head": {"type": "FCNHead"},
            "num_classes": 150,
        },
        weights=_ade20k(
            f"{_SWIN}/v1.0.1/upernet_{backbone}_512x512.pth",
            params,
            gmacs,
            {"miou": miou, "miou_ms_flip": miou_ms_flip},
            **_SWIN_SEGMENTATION,
        ),
    )


def _plainmamba_ade20k(size: str, params: int, miou: float) -> DenseWeights:
    return DenseWeights(
        name=f"upernet.plainmamba_{size}.ade20k_160k",
        task=SEGMENT,
        model={
            "type": "Segmenter",
            "decode_head": {"type": "UPerHead"},
            "auxiliary_head": {"type": "FCNHead", "in_index": 3},
            "num_classes": 150,
        },
        weights=_ade20k(
            f"{_PLAINMAMBA}/segmentation/{size}_upernet.pth", params, None, {"miou": miou}, **_PLAINMAMBA_ORIGIN
        ),
    )


def _ade20k(url: str, params: int, gmacs: int | None, metrics: dict[str, float], **origin: Any) -> Weights:
    return Weights(
        url=url,
        license="Apache-2.0",
        container="state_dict",
        input_size=(3, 512, 2048),
        interpolation="bilinear",
        num_classes=150,
        labels="ade20k",
        metrics=metrics,
        params=params,
        macs=None if gmacs is None else gmacs * 1e9,
        **origin,
    )


_TABLE = (
    _swin_coco("mask_rcnn", "MaskRCNN", "tiny", "1x", 47_794_602, 267, 43.7, 39.8),
    _swin_coco("mask_rcnn", "MaskRCNN", "tiny", "3x", 47_794_602, 267, 46.0, 41.6),
    _swin_coco("mask_rcnn", "MaskRCNN", "small", "3x", 69_112_506, 359, 48.5, 43.3),
    _swin_coco("cascade_mask_rcnn", "CascadeMaskRCNN", "tiny", "1x", 85_629_804, 745, 48.1, 41.7),
    _swin_coco("cascade_mask_rcnn", "CascadeMaskRCNN", "tiny", "3x", 85_629_804, 745, 50.4, 43.7),
    _swin_coco("cascade_mask_rcnn", "CascadeMaskRCNN", "small", "3x", 106_947_708, 838, 51.9, 45.0),
    _swin_coco("cascade_mask_rcnn", "CascadeMaskRCNN", "base", "3x", 144_977_002, 982, 51.9, 45.0),
    _mmdetection(
        "mmdet_coco_1x",
        "mask_rcnn_swin-t-p4-w7_fpn_1x_coco/mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth",
        42.7,
        39.3,
    ),
    _mmdetection(
        "mmdet_coco_3x",
        "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/"
        "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth",
        46.0,
        41.6,
    ),
    _upernet("tiny", 59_941_862, 945, 44.51, 45.81),
    _upernet("small", 81_259_766, 1038, 47.64, 49.47),
    _upernet("base", 121_279_716, 1188, 48.13, 49.72),
    DenseWeights(
        name="semantic_fpn.litv2_s.ade20k_80k",
        task=SEGMENT,
        model={
            "type": "Segmenter",
            "neck": {"type": "FPN"},
            "decode_head": {"type": "SemanticFPNHead"},
            "num_classes": 150,
        },
        weights=_ade20k(
            "https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_s_fpn_r50_512x512_80k_ade20k.pth",
            31_449_486,
            41,
            {"miou": 44.3},
            repository="ziplab/LITv2",
            commit="7501c8662991cad6db780b61fac0886b56a76588",
        ),
    ),
    _plainmamba_coco("mask_rcnn", "l1", 31_212_128, 44.1, 39.1),
    _plainmamba_coco("mask_rcnn", "l2", 53_202_496, 46.0, 40.6),
    _plainmamba_coco("mask_rcnn", "l3", 79_781_520, 46.8, 41.2),
    _plainmamba_coco("retinanet", "l1", 19_199_844, 41.7, None),
    _plainmamba_coco("retinanet", "l2", 40_685_636, 43.9, None),
    _plainmamba_coco("retinanet", "l3", 67_030_932, 44.8, None),
    _plainmamba_ade20k("l1", 35_455_596, 44.1),
    _plainmamba_ade20k("l2", 55_874_156, 46.8),
    _plainmamba_ade20k("l3", 81_292_908, 49.1),
)


def list_dense(
    pattern: str = "*", *, task: str | None = None, family: str | None = None, mixer: str | None = None
) -> list[DenseWeights]:
    """Published detectors and segmenters whose backbone the zoo has.

    Args:
        pattern: Shell pattern of names; matches anywhere in the name when it has no wildcard.
        task: `detect` or `segment`; None for both.
        family: Only backbones of this family.
        mixer: Only backbones with this kind of token mixer.

    Raises:
        ValueError: An unknown task, family or mixer.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"unknown task {task!r}; {nearest(str(task), TASKS)}")
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    backbones = set(vizoo.list_models(family=family, mixer=mixer))
    return [
        record
        for record in _TABLE
        if record.backbone in backbones and task in (None, record.task) and fnmatch.fnmatch(record.name, glob)
    ]


def is_dense(name: str) -> bool:
    """Whether a name begins as those of whole detectors and segmenters do."""
    return name.split(".")[0] in {record.name.split(".")[0] for record in _TABLE}


def find_dense(name: str, task: str | None = None) -> DenseWeights:
    """The record of a name.

    Args:
        name: `architecture.backbone.schedule`, as `list_dense` gives it.
        task: What the model is wanted for; None for anything.

    Raises:
        ValueError: There is no such name, or its model is for the other task.
    """
    known = {record.name: record for record in list_dense()}
    if name not in known:
        raise ValueError(f"unknown weights {name!r} of a whole model; {nearest(name, known)}")
    record = known[name]
    if task not in (None, record.task):
        raise ValueError(f"{name} is a model to {record.task}, not to {task}: pass --task {record.task}")
    return record


def resolve_dense(name: str, *, accept_license: bool = False) -> Path:
    """The checked file of a name, downloaded where the cache lacks it.

    Raises:
        ValueError: There is no such name.
        vizoo.weights.errors.WeightsError: The file cannot be had.
    """
    return download(find_dense(name).weights, accept_license=accept_license)
