"""`vizoo predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vizoo.benchmark import choose_device
from vizoo.predict import Classifier, Prediction, find_images, load_classifier
from vizoo.registry import resolve
from vizoo.weights.store import download

from .output import note, print_json, print_table


def predict_command(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model, `variant` or `variant.tag`.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="A checkpoint file, not the official weights.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to report per image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; a GPU if there is one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 16,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Use weights although they state no licence.")
    ] = False,
) -> None:
    """Say what is in images: the most probable classes, by name.

    The official weights are downloaded once and kept (see `vizoo weights`). A checkpoint of `vizoo train` knows its
    model, its preprocessing and its classes, so that --model can be left out. An image that cannot be read is named
    on standard error and left out; the exit code is then 1.

    Examples:
        vizoo predict cat.jpg --model swin_tiny_patch4_window7_224
        vizoo predict photos/ more/dog.png -m swinv2_tiny_patch4_window8_256 --top 3 --json
        vizoo predict digit.png --checkpoint runs/digits/best.pth
    """
    files = find_images(images)
    place = choose_device(device)
    if model is not None and checkpoint is None and accept_license:
        _accept(model)
    classifier = load_classifier(model, checkpoint=checkpoint, device=place)
    if len(files) == 1:
        predictions = list(classifier.predict(files, top=top))
        _show(predictions, as_json)
        return
    failed: list[Path] = []
    _show(_predict_all(classifier, files, failed, top=top, batch_size=batch_size), as_json)
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} images could not be read")


def _accept(model: str) -> None:
    record = resolve(model).weights
    if record is not None:
        download(record, accept_license=True)


def _predict_all(
    classifier: Classifier, files: list[Path], failed: list[Path], *, top: int, batch_size: int
) -> list[Prediction]:
    def report(path: Path, error: Exception) -> None:
        failed.append(path)
        text = " ".join(str(error).split())
        note(f"error: {text if str(path) in text else f'{path}: {text}'}")

    return list(classifier.predict(files, top=top, batch_size=batch_size, on_error=report))


def _show(predictions: list[Prediction], as_json: bool) -> None:
    if as_json:
        print_json([_as_dict(prediction) for prediction in predictions])
        return
    rows = [
        (str(prediction.path) if rank == 0 else "", name, f"{probability:.2%}")
        for prediction in predictions
        for rank, (name, probability) in enumerate(zip(prediction.classes, prediction.probabilities, strict=True))
    ]
    if rows:
        print_table({"image": "left", "class": "left", "probability": "right"}, rows)


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    entries = zip(prediction.classes, prediction.indices, prediction.probabilities, strict=True)
    return {
        "path": str(prediction.path),
        "predictions": [
            {"class": name, "index": index, "probability": probability} for name, index, probability in entries
        ],
    }
