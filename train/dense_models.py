"""Detectors and segmenters from plain values: from a table, or from what a checkpoint of `vizoo train` says of itself.

A checkpoint may come from anyone, so nothing in it is run: its config is read as literals, and only vizoo's own
classes are built from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from PIL import Image

from vizoo.backbones.base import nearest
from vizoo.checkpoint import CheckpointMismatch, LoadReport
from vizoo.images import load_image
from vizoo.predict import OnError, config_value, stored_meta
from vizoo.weights.store import download

from .dense_weights import DETECT, DenseWeights, find_dense

PACKAGE = "vizoo.train."
_NOT_LOADED = ("pretrained", "checkpoint_path", "type")


@dataclass(frozen=True)
class Loaded:
    """A model ready to predict, and what is known of its classes.

    Attributes:
        model: In eval mode, on its device.
        transform: The transform that it was validated with; None where that is not known.
        classes: A name per label.
        category_ids: COCO's id per label; None where it has none.
    """

    model: BaseModel
    transform: Any
    classes: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None


def build_model(config: Mapping[str, Any], task: str) -> BaseModel:
    """A model from its arguments and the name of its class, `type`; the arguments may name further parts of vizoo.

    Weights of the backbone are not loaded: those of the whole model follow.

    Raises:
        ValueError: A class that is no such model or part.
    """
    known, kind = _models(task), _leaf(config.get("type"))
    if kind not in known:
        raise ValueError(f"{kind} is no model to {task}: {', '.join(known)} {'is' if len(known) == 1 else 'are'}")
    options = {key: value for key, value in config.items() if key != "data_preprocessor"}
    backbone = dict(options.get("backbone") or {})
    options["backbone"] = {key: value for key, value in backbone.items() if key not in _NOT_LOADED}
    return _build(options, {**known, **_parts(task)})


def load_whole(model: BaseModel, file: str | Path) -> LoadReport:
    """Load a checkpoint into a detector or segmenter, with nothing missing, left over or newly initialised.

    Raises:
        CheckpointMismatch: It is another model's, or has other classes.
        FileNotFoundError: There is no such file.
        vizoo.weights.errors.WeightsError: It cannot be read.
    """
    report: LoadReport = model.load_checkpoint(file)
    if report.fresh:
        what = "; ".join(f"{key}: {how}" for key, how in report.adapted.items())
        raise CheckpointMismatch(f"{Path(file).name} has other classes than the model ({what})")
    return report


def load_dense(
    task: str, name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> Loaded:
    """A model with published weights, or with those of a checkpoint.

    Args:
        task: `detect` or `segment`.
        name: A published model, as `vizoo list --task` shows them.
        checkpoint: A file of `vizoo train`; with a name, any file of that model's weights.
        device: Where to run.

    Raises:
        ValueError: Neither is given, the name is unknown, or the checkpoint does not say which model it is of.
        FileNotFoundError: There is no such checkpoint.
        CheckpointMismatch: The checkpoint is another model's.
        vizoo.weights.errors.WeightsError: The weights cannot be had or read.
    """
    if name is None and checkpoint is None:
        raise ValueError("pass a checkpoint (--checkpoint), or the name of published weights (--weights)")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {checkpoint}")
    if name is not None:
        found = _published(find_dense(name, task), checkpoint)
    else:
        assert checkpoint is not None
        found = _stored(Path(checkpoint), task)
    found.model.to(device).eval()
    return found


def _published(record: DenseWeights, checkpoint: str | Path | None) -> Loaded:
    model = record.load(download(record.weights) if checkpoint is None else checkpoint)
    if record.task == DETECT:
        from .detection.classes import COCO, COCO_IDS

        return Loaded(model, None, COCO, COCO_IDS)
    from .segmentation.classes import ADE20K

    return Loaded(model, None, ADE20K)


def _stored(path: Path, task: str) -> Loaded:
    meta = stored_meta(path)
    config = _config_value(meta, "model")
    if not config:
        raise ValueError(
            f"{path} does not say which model it is of, as checkpoints of `vizoo train` do: name its model, too "
            f"(--weights; `vizoo list --task {task}` shows the names)"
        )
    model = build_model(config, task)
    load_whole(model, path)
    return Loaded(model, _stored_transform(path, meta, task), *_stored_classes(meta, int(model.num_classes)))


def _stored_classes(meta: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Names and COCO's ids of the labels; numbers where the names do not fit the model."""
    stated = meta.get("dataset_meta") or {}
    names, ids = (stated.get(key) for key in ("classes", "category_ids"))
    if names is None or len(names) != count:
        return tuple(f"class {i}" for i in range(count)), None
    return tuple(map(str, names)), None if ids is None or len(ids) != count else tuple(map(int, ids))


def _stored_transform(path: Path, meta: Mapping[str, Any], task: str) -> Any:
    """The transform of the validation set; None where there is none, or one of the user's own."""
    dataset = _config_value(meta, "val_dataloader").get("dataset")
    config = dataset.get("transform") if isinstance(dataset, Mapping) else None
    if not isinstance(config, Mapping):
        return None
    try:
        return _build(config, _transforms(task))
    except ValueError:
        warnings.warn(
            f"{path.name} was validated with {config.get('type')}, which cannot be built from a checkpoint: images "
            "are resized as published models want them",
            stacklevel=2,
        )
        return None


def _config_value(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        return dict(config_value(str(meta.get("cfg", "")), name))
    except (SyntaxError, ValueError, LookupError, TypeError):
        return {}


def _build(config: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """The object that a config describes; its inner parts stay configs, since the object completes and builds them."""
    options = _with_classes(config, known)
    return options.pop("type")(**options)


def _with_classes(value: Any, known: Mapping[str, Any]) -> Any:
    """The same values with classes, all of them known ones, in place of their names."""
    if isinstance(value, Mapping):
        return {
            key: _class(item, known) if key == "type" else _with_classes(item, known) for key, item in value.items()
        }
    return value


def _class(name: Any, known: Mapping[str, Any]) -> Any:
    if _leaf(name) not in known or ("." in name and not name.startswith(PACKAGE)):
        raise ValueError(f"{name} is no part that vizoo builds from a checkpoint; {nearest(_leaf(name), known)}")
    return known[_leaf(name)]


def _leaf(kind: Any) -> str:
    return str(kind).rpartition(".")[2]


def _models(task: str) -> dict[str, Any]:
    if task == DETECT:
        from .detection import models

        return _by_name(models.FasterRCNN, models.MaskRCNN, models.CascadeMaskRCNN, models.RetinaNet)
    from .segmentation.segmenter import Segmenter

    return _by_name(Segmenter)


def _parts(task: str) -> dict[str, Any]:
    """What a model's config may name."""
    if task == DETECT:
        from .detection import adapter, neck

        return _by_name(neck.Pyramid, neck.SimplePyramid, adapter.VitAdapter)
    from .segmentation import heads, inference, rescale

    found = _by_name(heads.FPN, heads.UPerHead, heads.SemanticFPNHead, heads.MLPHead, heads.FCNHead, rescale.Rescale)
    return found | _by_name(inference.Whole, inference.Sliding, inference.MultiScale)


def _transforms(task: str) -> dict[str, Any]:
    """Transforms of validation sets."""
    if task == DETECT:
        from .detection import transforms

        return _by_name(transforms.DetectionTransform, transforms.ResizeTransform)
    from .segmentation.transforms import ResizeTransform

    return _by_name(ResizeTransform)


def _by_name(*kinds: type) -> dict[str, Any]:
    return {kind.__name__: kind for kind in kinds}


# Images for any of them.


def read_images(
    paths: Iterable[str | Path], size: int, on_error: OnError | None
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """Images, upright and in batches; one that cannot be read is handed to `on_error`, or raises without it."""
    read: list[tuple[Path, Image.Image]] = []
    for path in map(Path, paths):
        try:
            read.append((path, load_image(path)))
        except (OSError, ValueError) as error:
            if on_error is None:
                raise
            on_error(path, error)
        if len(read) == size:
            yield _unzipped(read)
            read = []
    if read:
        yield _unzipped(read)


def _unzipped(read: list[tuple[Path, Image.Image]]) -> tuple[list[Path], list[Image.Image]]:
    return [path for path, _ in read], [image for _, image in read]
