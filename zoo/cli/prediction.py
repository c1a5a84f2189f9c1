"""`vizoo predict`: classification here, detection and segmentation in `dense`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vizoo.benchmark import choose_device
from vizoo.predict import Prediction, find_images, load_classifier
from vizoo.registry import resolve
from vizoo.weights.store import download

from .dense import Job, detect, segment
from .help import Task
from .output import Failures, print_json, print_table


def predict_command(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    task: Annotated[Task, typer.Option("--task", "-t", help="What to predict.")] = Task.classify,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="classify: a model, `variant` or `variant.tag`.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", help="detect, segment: a name of `vizoo list --task`.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="A checkpoint file, not the official weights.", show_default=False),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="classify: classes to report per image, 5 by default.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="detect: least score of an object, 0.3 by default.", min=0, max=1)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="detect, segment: folder of the results, ./predictions by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite results that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; a GPU if there is one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass; 16 by default, 1 to detect or segment.")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms and branches of the backbone once its weights are loaded.")
    ] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Use weights although they state no licence.")
    ] = False,
) -> None:
    """Say what is in images: their classes, their objects, or the class of every pixel.

    The official weights are downloaded once and kept (see `vizoo weights`). A checkpoint of `vizoo train` knows its
    model, its preprocessing and its classes, so that nothing but --checkpoint is needed. An image that cannot be read
    is named on standard error and left out; the exit code is then 1.

    `--task classify` prints the most probable classes. `--task detect` draws boxes, masks and names into
    OUTPUT/drawn, and writes OUTPUT/detections.json: COCO's lists of images, annotations (boxes, scores, run-length
    codes of the masks) and categories. `--task segment` draws the classes' colours with a legend into OUTPUT/drawn,
    and writes label maps into OUTPUT/labels, whose pixel values count the lines of OUTPUT/classes.txt from 0.
    Coordinates are those of the upright image. Nothing that is there is overwritten without --force.

    Examples:
        vizoo predict cat.jpg --model swin_tiny_patch4_window7_224
        vizoo predict photos/ more/dog.png -m swinv2_tiny_patch4_window8_256 --top 3 --json
        vizoo predict digit.png --checkpoint runs/digits/best.pth
        vizoo predict street.jpg --task detect --weights mask_rcnn.swin_tiny_patch4_window7_224.coco_3x
        vizoo predict photos/ --task segment --checkpoint runs/rooms/best.pth --output rooms
    """
    if task is not Task.classify:
        _refuse(task, model=model, top=top, threshold=threshold if task is Task.segment else None)
        job = Job(
            images=images,
            weights=weights,
            checkpoint=checkpoint,
            output=output or Path("predictions"),
            force=force,
            as_json=as_json,
            device=device,
            batch_size=batch_size or 1,
            fuse=fuse,
        )
        if task is Task.detect:
            detect(job, threshold)
        else:
            segment(job)
        return
    _refuse(task, weights=weights, threshold=threshold, output=output, force=force or None)
    top = top or 5
    files = find_images(images)
    place = choose_device(device)
    if model is not None and checkpoint is None and accept_license:
        _accept(model)
    classifier = load_classifier(model, checkpoint=checkpoint, device=place, fuse=fuse)
    if len(files) == 1:
        predictions = list(classifier.predict(files, top=top))
        _show(predictions, as_json)
        return
    failed = Failures()
    _show(list(classifier.predict(files, top=top, batch_size=batch_size or 16, on_error=failed)), as_json)
    failed.check(len(files))


def _refuse(task: Task, **options: object) -> None:
    """Raise for options that say nothing about the task."""
    for name, value in options.items():
        if value is not None:
            tasks = [other for other, own in _OPTIONS.items() if name in own]
            raise ValueError(f"--{name} is for --task {' or '.join(tasks)}, not for --task {task.value}")


_OPTIONS = {
    "classify": ("model", "top"),
    "detect": ("weights", "threshold", "output", "force"),
    "segment": ("weights", "output", "force"),
}


def _accept(model: str) -> None:
    record = resolve(model).weights
    if record is not None:
        download(record, accept_license=True)


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
