"""Detection and segmentation for `vizoo predict`: thin covers of `vizoo.train`, imported only when one of them runs."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vizoo.benchmark import choose_device
from vizoo.predict import find_images

from .output import Failures, note, print_json, print_table

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

DRAWN, LABELS = Path("drawn"), Path("labels")
DETECTIONS, CLASSES = Path("detections.json"), Path("classes.txt")
_SHOWN = 6


@dataclass(kw_only=True)
class Job:
    """Images to predict, and where the results go.

    Attributes:
        images: Files and folders.
        weights: Name of published weights.
        checkpoint: A checkpoint file.
        output: Folder of the results.
        force: Overwrite results that are there.
        as_json: Print JSON in place of a table.
        device: Where to run.
        batch_size: Images per forward pass.
        fuse: Fuse the backbone.
        failed: What could not be read.
    """

    images: list[Path]
    weights: str | None
    checkpoint: Path | None
    output: Path
    force: bool
    as_json: bool
    device: str | None
    batch_size: int
    fuse: bool = False
    failed: Failures = field(default_factory=Failures)

    def source(self) -> dict[str, Any]:
        """Arguments of `load_detector` and `load_segmenter`."""
        return {"name": self.weights, "checkpoint": self.checkpoint, "device": choose_device(self.device)}

    def prepare(self, model: nn.Module) -> None:
        """Fuse the backbone of a loaded model, where that is asked for."""
        if self.fuse:
            from vizoo.train.run import fuse_backbone

            fuse_backbone(model)

    def options(self, files: dict[Path, Path]) -> dict[str, Any]:
        """Arguments of `predict`; a single image that cannot be read is an error like any other."""
        return {"batch_size": self.batch_size, "on_error": self.failed if len(files) > 1 else None}

    def claim(self, shared: Path, *folders: Path) -> dict[Path, Path]:
        """Each image with the name of its results, none of which is there yet.

        Args:
            shared: A file for all images.
            *folders: Folders that get a file for each image.

        Raises:
            FileNotFoundError: An image or folder of images is not there.
            FileExistsError: A result is there, without `force`.
        """
        files = result_names(self.images)
        results = [shared, *(folder / name for folder in folders for name in files.values())]
        taken = [name for name in results if (self.output / name).exists()]
        if taken and not self.force:
            raise FileExistsError(
                f"{len(taken)} of {len(results)} results are there already, the first is {self.output / taken[0]}: "
                "choose another --output, or overwrite them with --force"
            )
        return files

    def write(self, name: Path, contents: bytes | Image.Image) -> str:
        """Put a result in place, whole or not at all; returns its path."""
        from vizoo.train.checkpoint import write_atomically

        write_atomically(self.output / name, contents if isinstance(contents, bytes) else _png(contents))
        return str(self.output / name)

    def finish(self, document: Any, rows: Sequence[tuple[str, ...]], what: str, files: int) -> None:
        """Print what was done, and fail where an image could not be read."""
        if self.as_json:
            print_json(document)
        elif rows:
            print_table({"image": "left", "drawing": "left", what: "left"}, rows)
        note(f"results are in {self.output}")
        self.failed.check(files)


def detect(job: Job, threshold: float | None) -> None:
    """Find objects: drawings, and one file with everything as COCO writes it."""
    files = job.claim(DETECTIONS, DRAWN)
    from vizoo.train.detection.predict import THRESHOLD, load_detector

    detector = load_detector(**job.source())
    job.prepare(detector.model)
    document: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": detector.categories()}
    rows = []
    least = THRESHOLD if threshold is None else threshold
    for number, found in enumerate(detector.predict(files, threshold=least, **job.options(files)), 1):
        drawing = job.write(DRAWN / files[found.path], detector.draw(found))
        width, height = found.image.size
        entry = {"id": number, "file_name": str(found.path), "width": width, "height": height, "drawing": drawing}
        document["images"].append(entry)
        for record in detector.records(found, number):
            document["annotations"].append({"id": len(document["annotations"]) + 1, **record})
        counts = Counter(detector.classes[label] for label in found.labels.tolist())
        rows.append((str(found.path), drawing, _joined(f"{count} {name}" for name, count in counts.most_common())))
    job.write(DETECTIONS, json.dumps(document, ensure_ascii=False, allow_nan=False).encode())
    job.finish(document, rows, "objects", len(files))


def segment(job: Job) -> None:
    """Name every pixel: drawings, label maps, and the names of the labels."""
    files = job.claim(CLASSES, DRAWN, LABELS)
    from vizoo.train.segmentation.predict import label_png, load_segmenter

    segmenter = load_segmenter(**job.source())
    job.prepare(segmenter.model)
    document, rows = [], []
    for found in segmenter.predict(files, **job.options(files)):
        name = files[found.path]
        drawing = job.write(DRAWN / name, segmenter.draw(found))
        labels = job.write(LABELS / name, label_png(found.labels, segmenter.classes))
        shares = {segmenter.classes[label]: share for label, share in found.shares().items()}
        document.append({"path": str(found.path), "drawing": drawing, "labels": labels, "classes": shares})
        rows.append((str(found.path), drawing, _joined(f"{share:.1%} {name}" for name, share in shares.items())))
    job.write(CLASSES, "".join(f"{name}\n" for name in segmenter.classes).encode())
    job.finish(document, rows, "classes", len(files))


def result_names(images: Iterable[Path]) -> dict[Path, Path]:
    """A name for the results of each image: its place in the folder it was found in, as PNG, and a number if taken."""
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for file, place in _placed(images):
        if file in names:
            continue
        name, number = place.with_suffix(".png"), 1
        while str(name).lower() in taken:
            number += 1
            name = place.with_name(f"{place.stem}-{number}.png")
        taken.add(str(name).lower())
        names[file] = name
    return names


def _placed(images: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    for path in images:
        for file in find_images([path]):
            yield file, file.relative_to(path) if path.is_dir() else Path(file.name)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # the default takes seconds for a photograph
    return file.getvalue()


def _joined(parts: Iterable[str]) -> str:
    found = list(parts)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "") or "-"
