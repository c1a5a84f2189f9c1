"""Name every pixel of image files with a segmenter.

segmenter = load_segmenter("upernet.swin_tiny_patch4_window7_224.ade20k_160k")
for found in segmenter.predict(["street.jpg"]):
    print(found.path, [segmenter.classes[label] for label in np.unique(found.labels)])
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vizoo.predict import OnError
from vizoo.train.dense_models import load_dense, read_images
from vizoo.train.dense_weights import SEGMENT
from vizoo.train.drawing import draw_map

from .classes import IGNORE, palette
from .segmenter import Segmenter
from .transforms import ResizeTransform, Sample


@dataclass(frozen=True)
class LabelledImage:
    """The class of each pixel of one image.

    Attributes:
        path: The image file.
        image: The image, upright: its EXIF orientation is applied.
        labels: Places in the segmenter's classes (height, width), uint8.
    """

    path: Path
    image: Image.Image
    labels: np.ndarray

    def shares(self) -> dict[int, float]:
        """Share of the pixels of each class that is there, the largest first."""
        counts = np.bincount(self.labels.ravel())
        order = np.argsort(-counts, kind="stable")
        return {int(label): float(counts[label] / self.labels.size) for label in order if counts[label]}


@dataclass
class ImageSegmenter:
    """A segmenter with all it needs to read an image file and to name what it sees.

    Attributes:
        model: The model.
        classes: A name per label.
        transform: Gives images their size.

    Raises:
        ValueError: More classes than the values of an 8-bit image, of which one stands for no label.
    """

    model: Segmenter
    classes: Sequence[str]
    transform: Callable[[Sample], Sample]

    def __post_init__(self) -> None:
        if len(self.classes) > IGNORE:
            raise ValueError(f"label maps are 8-bit images, for up to {IGNORE} classes, got {len(self.classes)}")

    def predict(
        self, images: Iterable[str | Path], *, batch_size: int = 1, on_error: OnError | None = None
    ) -> Iterator[LabelledImage]:
        """Label the pixels of image files, in the order of the files.

        Args:
            images: Files.
            batch_size: Images that are read at a time; those of one size go through the model together.
            on_error: Called with a file that cannot be read, which is then left out; None raises.

        Raises:
            ValueError: A batch size below 1, or an image that cannot be read.
            FileNotFoundError: There is no such file.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for paths, read in read_images(images, batch_size, on_error):
            for path, image, labels in zip(paths, read, self._label(read), strict=True):
                yield LabelledImage(path, image, labels.cpu().numpy().astype(np.uint8))

    @torch.inference_mode()
    def _label(self, images: Sequence[Image.Image]) -> list[Tensor]:
        self.model.eval()
        device = next(self.model.parameters()).device
        tensors = [self._tensor(image).to(device) for image in images]
        sizes = [{"original_size": (image.height, image.width)} for image in images]
        return [found["label_map"] for found in self.model(tensors, sizes, mode="predict")]

    def _tensor(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(image)
        sample = self.transform(Sample(pixels, np.zeros(pixels.shape[:2], np.uint8)))
        return torch.from_numpy(sample.image.transpose(2, 0, 1).copy())

    def draw(self, found: LabelledImage) -> Image.Image:
        """The image with the classes' colours laid over it, and a legend below."""
        return draw_map(found.image, found.labels, self.classes)


def label_png(labels: np.ndarray, classes: Sequence[str]) -> bytes:
    """A PNG file whose pixel values are the labels (height, width), uint8, shown in the classes' colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette(classes).ravel().tolist())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def load_segmenter(
    name: str | None = None, *, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> ImageSegmenter:
    """A segmenter with published weights, or with those of a checkpoint file.

    A checkpoint of `vizoo train` says which model it is of, how its images are resized, how they are read (whole, in
    windows, at several scales) and what its classes are called.

    Args:
        name: Published weights, such as `upernet.swin_tiny_patch4_window7_224.ade20k_160k`.
        checkpoint: A file of `vizoo train`; with a name, any file with weights of that model.
        device: Where to run.

    Raises:
        ValueError: Neither is given, the name is unknown, or the checkpoint does not say which segmenter it is of.
        FileNotFoundError: There is no such checkpoint.
        CheckpointMismatch: The checkpoint is another model's.
        vizoo.weights.errors.WeightsError: The weights cannot be had or read.
    """
    found = load_dense(SEGMENT, name, checkpoint, device)
    return ImageSegmenter(cast(Segmenter, found.model), found.classes, found.transform or ResizeTransform())
