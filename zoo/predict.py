"""Classify images with a model: preprocessing from the model's own record, batches, names and probabilities.

classifier = vizoo.predict.load_classifier("swin_tiny_patch4_window7_224")
for prediction in classifier.predict(vizoo.predict.find_images(["photos"])):
    print(prediction.path, prediction.classes[0], prediction.probabilities[0])
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vizoo.backbones.base import Backbone, nearest
from vizoo.weights.reader import read_state_dict

from .checkpoint import load_checkpoint
from .create import create_model
from .registry import resolve

_PREPROCESS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")

OnError = Callable[[Path, Exception], None]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first.

    Attributes:
        path: The image file.
        classes: Names.
        indices: Places in the classifier's output.
        probabilities: Softmax of the logits, over all classes.
    """

    path: Path
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass
class Classifier:
    """A model with all it needs to read an image file and to name what it sees.

    Attributes:
        model: The model.
        class_names: A name per output.
        preprocess: timm's keys (input_size, mean, std, crop_pct, crop_mode, interpolation).
    """

    model: Backbone
    class_names: Sequence[str]
    preprocess: Mapping[str, Any]

    def predict(
        self,
        images: Iterable[str | Path],
        *,
        top: int = 5,
        batch_size: int = 16,
        on_error: OnError | None = None,
    ) -> Iterator[Prediction]:
        """Classify image files, one prediction each, in their order.

        Args:
            images: Files.
            top: How many classes to report; at most as many as there are.
            batch_size: Images per forward pass.
            on_error: Called with a file that cannot be read, which is then left out; None raises.

        Raises:
            ValueError: `top` or `batch_size` below 1, or an image that cannot be read.
            FileNotFoundError: There is no such file.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for paths, batch in _batches(self._read(images, on_error), batch_size):
            probabilities = self._probabilities(batch)
            best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
            for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
                names = tuple(self.class_names[i] for i in indices)
                yield Prediction(path, names, tuple(indices), tuple(values))

    def _read(self, images: Iterable[str | Path], on_error: OnError | None) -> Iterator[tuple[Path, Tensor]]:
        from .images import load_image
        from .preprocess import eval_transform

        transform = eval_transform(dict(self.preprocess))
        for path in map(Path, images):
            try:
                yield path, transform(load_image(path))
            except (OSError, ValueError) as error:  # noqa: PERF203 -- decoding costs far more than a try
                if on_error is None:
                    raise
                on_error(path, error)

    def _probabilities(self, batch: Tensor) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                logits = self.model(batch.to(next(self.model.parameters()).device))
        finally:
            self.model.train(was_training)
        return logits.float().softmax(dim=1).cpu()


def _batches(images: Iterable[tuple[Path, Tensor]], size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Stack neighbours of one shape, at most `size` of them."""
    paths: list[Path] = []
    tensors: list[Tensor] = []
    for path, image in images:
        if tensors and (len(tensors) == size or image.shape != tensors[0].shape):
            yield paths, torch.stack(tensors)
            paths, tensors = [], []
        paths.append(path)
        tensors.append(image)
    if tensors:
        yield paths, torch.stack(tensors)


def load_classifier(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    fuse: bool = False,
    **overrides: Any,
) -> Classifier:
    """A classifier with official weights, or with those of a checkpoint file.

    A checkpoint of `vizoo train` says which model it is of, how it is preprocessed and what its classes are called.

    Args:
        name: A model of the zoo; may be left out where the checkpoint says it.
        checkpoint: A checkpoint file; None takes the official weights.
        device: Where to run.
        fuse: Fold batch norms and parallel branches once the weights are loaded; see `Backbone.fuse`.
        **overrides: Further arguments of `create_model`; they win over the checkpoint's.

    Raises:
        ValueError: No model is named anywhere, the name is unknown, or the model has no classifier.
        FileNotFoundError: There is no such checkpoint.
        CheckpointMismatch: The checkpoint is another model's.
        vizoo.weights.errors.WeightsError: The weights cannot be had or read.
    """
    if checkpoint is None:
        if name is None:
            raise ValueError("name a model, or pass a checkpoint that says which model it is of")
        model = create_model(name, pretrained=True, **overrides)
        meta: dict[str, Any] = {}
    else:
        model, meta = _from_checkpoint(name, Path(checkpoint), overrides)
    if model.num_classes == 0:
        raise ValueError(f"{name or type(model).__name__} has no classifier, so it cannot name what it sees")
    model.to(device).eval()
    if fuse:
        model.fuse()
    return Classifier(model, _class_names(model, meta), _preprocess(model, meta))


def _from_checkpoint(name: str | None, path: Path, overrides: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}{_neighbour(path)}")
    meta = stored_meta(path)
    stored = _stored_model(meta)
    stored_name = stored.pop("name", None)
    if name is None and stored_name is None:
        raise ValueError(f"{path} does not say which model it is of; name it (--model)")
    if name not in (None, stored_name) and stored_name is not None:
        stored = {}
    arguments = {**stored, **overrides}
    if "num_classes" not in arguments:
        arguments["num_classes"] = _stored_classes(path, name or stored_name)
    model = create_model(name or stored_name, **arguments)
    load_checkpoint(model, path)
    return model, meta


def _stored_classes(path: Path, name: str) -> int:
    """Outputs of the classifier in a checkpoint, so that it keeps its own classes; 0 where it holds none."""
    family = resolve(name).family
    state = {key.removeprefix("backbone."): value for key, value in read_state_dict(path).items()}
    layout = family.layout_of(state)
    heads = [
        value.shape[0]
        for key, value in state.items()
        if layout.translate(key) == f"{family.model.classifier_name}.bias"
    ]
    return heads[0] if heads else 0


def _stored_model(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` in the config that `vizoo train` keeps in a checkpoint; empty if there are none."""
    try:
        arguments = dict(config_value(str(meta.get("cfg", "")), "model")["backbone"])
    except (SyntaxError, ValueError, LookupError, TypeError):
        return {}
    return {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path", "type")}


def config_value(text: str, name: str) -> Any:
    """One value of a resolved config, without running it: it comes from a file that anyone may have written.

    Raises:
        SyntaxError: The text is not Python.
        LookupError: It does not assign that name.
        ValueError: The value is not made of literals and `dict(...)`.
    """
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return _value(node.value)
    raise LookupError(f"the config does not set {name!r}")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {
            _value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None
        }
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    return ast.literal_eval(node)


def stored_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of `vizoo train` says of itself; empty for any other file. Runs no code of the file."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return {}
    meta = contents.get("meta") if isinstance(contents, Mapping) else None
    return dict(meta) if isinstance(meta, Mapping) else {}


def _class_names(model: Backbone, meta: Mapping[str, Any]) -> Sequence[str]:
    """Names from the checkpoint, else from the weights' label set; numbers where neither fits the classifier."""
    from .labels import class_names, synsets

    names = (meta.get("dataset_meta") or {}).get("classes")
    if names is None and model.default_cfg["labels"] and not meta:
        names = class_names(model.default_cfg["labels"])
    if names is None or len(names) != model.num_classes:
        return tuple(f"class {i}" for i in range(model.num_classes))
    if list(names) == synsets("imagenet-1k"):  # ImageNet's folders are named by numbers
        names = class_names("imagenet-1k")
    return tuple(names)


def _preprocess(model: Backbone, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint was validated with, else what the weights were published with."""
    own = {key: model.default_cfg[key] for key in _PREPROCESS}
    try:
        stored = dict(config_value(str(meta.get("cfg", "")), "val_dataloader")["dataset"]["transform"])
    except (SyntaxError, ValueError, LookupError, TypeError):
        return own
    if not str(stored.get("type", "")).endswith("EvalTransform"):
        return own
    if "size" in stored:
        size = stored["size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        own["input_size"] = (stored.get("channels", model.in_chans), *sides)
    return {**own, **{key: value for key, value in stored.items() if key in own}}


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files among files and folders; a folder gives all those below it, sorted.

    Raises:
        FileNotFoundError: A path does not exist, or a folder holds no image.
    """
    from . import images

    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no image or folder at {path}{_neighbour(path)}")
        found += images.find_images(path)
    return found


def _neighbour(path: Path) -> str:
    """A hint that names similar files in the same folder; empty where there are none."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    return f"; {hint}" if hint.startswith("did you mean") else ""
