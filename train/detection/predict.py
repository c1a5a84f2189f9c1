"""Find objects in image files with a detector.

detector = load_detector("mask_rcnn.swin_tiny_patch4_window7_224.coco_3x")
for found in detector.predict(["street.jpg"]):
    print(found.path, [detector.classes[label] for label in found.labels.tolist()])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vizoo.predict import OnError
from vizoo.train.dense_models import load_dense, read_images
from vizoo.train.dense_weights import DETECT
from vizoo.train.drawing import draw_objects

from .detector import Detector
from .metrics import encode_masks
from .samples import Sample
from .transforms import ResizeTransform

THRESHOLD = 0.3


@dataclass(frozen=True)
class FoundObjects:
    """The objects of one image, the surest first.

    Attributes:
        path: The image file.
        image: The image, upright: its EXIF orientation is applied.
        boxes: x1, y1, x2, y2 in the image's pixels (n, 4).
        scores: (n,).
        labels: Places in the detector's classes (n,).
        masks: The objects' pixels (n, height, width), bool; None where the model finds none.
    """

    path: Path
    image: Image.Image
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


@dataclass
class ImageDetector:
    """A detector with all it needs to read an image file and to name what it finds.

    Attributes:
        model: The model.
        classes: A name per label.
        category_ids: A category id per label, for COCO's results.
        transform: Gives images their size.
    """

    model: Detector
    classes: Sequence[str]
    category_ids: Sequence[int]
    transform: Callable[[Sample], Sample]

    def predict(
        self,
        images: Iterable[str | Path],
        *,
        threshold: float = THRESHOLD,
        batch_size: int = 1,
        on_error: OnError | None = None,
    ) -> Iterator[FoundObjects]:
        """Find the objects of image files, in the order of the files.

        Args:
            images: Files.
            threshold: Report what has a higher score. The model's own threshold, 0.05, is set to this.
            batch_size: Images per forward pass.
            on_error: Called with a file that cannot be read, which is then left out; None raises.

        Raises:
            ValueError: A threshold outside [0, 1), a batch size below 1, or an image that cannot be read.
            FileNotFoundError: There is no such file.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for paths, read in read_images(images, batch_size, on_error):
            for path, image, found in zip(paths, read, self._detect(read, threshold), strict=True):
                boxes, scores, labels = (found[name].cpu() for name in ("boxes", "scores", "labels"))
                masks = found["masks"].cpu() if "masks" in found else None
                yield FoundObjects(path, image, boxes, scores, labels, masks)

    @torch.inference_mode()
    def _detect(self, images: Sequence[Image.Image], threshold: float) -> list[dict[str, Any]]:
        # Set in the model, since the masks of a hundred unlikely objects in a large photograph fill gigabytes.
        for module in self.model.modules():
            if hasattr(module, "score_threshold"):
                module.score_threshold = threshold
        self.model.eval()
        device = next(self.model.parameters()).device
        tensors = [self._tensor(image).to(device) for image in images]
        sizes = [{"original_size": (image.height, image.width)} for image in images]
        found: list[dict[str, Any]] = self.model(tensors, sizes, mode="predict")
        return found

    def _tensor(self, image: Image.Image) -> Tensor:
        sample = Sample(np.asarray(image), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        return torch.from_numpy(self.transform(sample).image.transpose(2, 0, 1).copy())

    def draw(self, found: FoundObjects) -> Image.Image:
        """The image with boxes, masks, names and scores."""
        masks = None if found.masks is None else found.masks.numpy()
        return draw_objects(
            found.image, found.boxes.numpy(), found.scores.numpy(), found.labels.numpy(), masks, self.classes
        )

    def categories(self) -> list[dict[str, Any]]:
        """COCO's list of categories."""
        return [{"id": number, "name": name} for number, name in zip(self.category_ids, self.classes, strict=True)]

    def records(self, found: FoundObjects, image_id: int) -> list[dict[str, Any]]:
        """COCO's results of one image: `bbox` as x, y, width, height, and masks as compressed run-length codes.

        With `area` and `iscrowd`, so that they can stand as annotations, too.
        """
        corners = found.boxes.double()
        sides = corners[:, 2:] - corners[:, :2]
        boxes = torch.cat([corners[:, :2], sides], dim=1).tolist()
        areas = (sides.prod(dim=1) if found.masks is None else found.masks.flatten(1).sum(dim=1)).tolist()
        # One at a time: a hundred masks of a large photograph fill gigabytes, and would be copied twice.
        codes = None if found.masks is None else [encode_masks(mask[None])[0] for mask in found.masks.numpy()]
        records = []
        for place, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
            record = {"image_id": image_id, "category_id": self.category_ids[label], "bbox": boxes[place]}
            record |= {"score": score, "area": areas[place], "iscrowd": 0}
            if codes is not None:
                record["segmentation"] = codes[place]
            records.append(record)
        return records


def load_detector(
    name: str | None = None, *, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> ImageDetector:
    """A detector with published weights, or with those of a checkpoint file.

    A checkpoint of `vizoo train` says which model it is of, how its images are resized and what its classes are
    called. Categories without ids of their own count from 1.

    Args:
        name: Published weights, such as `mask_rcnn.swin_tiny_patch4_window7_224.coco_3x`.
        checkpoint: A file of `vizoo train`; with a name, any file with weights of that model.
        device: Where to run.

    Raises:
        ValueError: Neither is given, the name is unknown, or the checkpoint does not say which detector it is of.
        FileNotFoundError: There is no such checkpoint.
        CheckpointMismatch: The checkpoint is another model's.
        vizoo.weights.errors.WeightsError: The weights cannot be had or read.
    """
    found = load_dense(DETECT, name, checkpoint, device)
    ids = found.category_ids or tuple(range(1, len(found.classes) + 1))
    return ImageDetector(cast(Detector, found.model), found.classes, ids, found.transform or ResizeTransform())
