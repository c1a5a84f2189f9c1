"""What the pages of a run are made from: plain values and arrays, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Course:
    """What there is to tell of any run, whatever the task.

    Attributes:
        config: Name of the config.
        model: Name of the backbone in the zoo.
        design: How the backbone differs from the one of that name, in words.
        parameters: Number of parameters.
        classes: Names.
        seed: Seed of everything random.
        goal: What the headline figure is to reach, in percent.
        figures: Figures in percent on the held-out images, as the evaluation gave them.
        history: Records as `vizoo.train.log.read_log` returns them.
        recipe: How the model was trained: name and value.
    """

    config: str
    model: str
    design: str
    parameters: int
    classes: Sequence[str]
    seed: int
    goal: float
    figures: Mapping[str, float]
    history: Sequence[dict[str, Any]]
    recipe: Sequence[tuple[str, str]]

    @property
    def headline(self) -> float:
        """The figure that the goal is set for."""
        raise NotImplementedError(f"{type(self).__name__} must state its headline figure")

    @property
    def met(self) -> bool:
        """Whether the goal was reached."""
        return self.headline >= self.goal

    @property
    def training_seconds(self) -> float:
        """Seconds from the first to the last record of the run."""
        times = [record["time"] for record in self.history]
        return max(times) - min(times)

    @property
    def start(self) -> dict[str, Any]:
        """The first record of the run: images, batches, epochs."""
        return next(record for record in self.history if record["kind"] == "start")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A held-out gray image (H, W), its class, and what the model says (classes,)."""

    image: NDArray[np.uint8]
    label: int
    probabilities: NDArray[np.floating]

    @property
    def answer(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())

    @property
    def is_right(self) -> bool:
        """Whether the answer is the image's class."""
        return self.answer == self.label


@dataclass(frozen=True, kw_only=True)
class Gaze:
    """Where the model looked in some images, and what hiding those places does.

    Attributes:
        examples: The images.
        heat: One map (H, W) in 0..1 per image, at the images' size.
        share: Share of each image that was hidden.
        hidden_hot: Accuracy in percent with the hottest places hidden.
        hidden_random: Accuracy in percent with places hidden at random.
    """

    examples: Sequence[Example]
    heat: Sequence[NDArray[np.floating]]
    share: float
    hidden_hot: float
    hidden_random: float


@dataclass(frozen=True)
class Speed:
    """Images per second at one batch size, and the relative spread of the measurement."""

    name: str
    batch: int
    images_per_second: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Findings(Course):
    """All that the page of a classifier tells.

    Attributes:
        subject: What the images show, in the plural.
        macs: Multiply-adds for one image.
        confusion: Counts, row = true class.
        examples: All held-out images.
        gaze: Where the model looked.
        plane: Places (N, 2) of the held-out images' features.
        speeds: Measured speeds.
        machine: Where: name and value.
    """

    subject: str
    macs: int
    confusion: Sequence[Sequence[int]]
    examples: Sequence[Example]
    gaze: Gaze
    plane: NDArray[np.floating]
    speeds: Sequence[Speed]
    machine: Sequence[tuple[str, str]]

    @property
    def headline(self) -> float:
        """The accuracy."""
        return self.figures["top1"]

    @property
    def accuracy(self) -> float:
        """Accuracy in percent on the held-out images."""
        return self.headline

    @property
    def wrong(self) -> int:
        """Held-out images answered wrongly."""
        return sum(map(sum, self.confusion)) - sum(row[i] for i, row in enumerate(self.confusion))


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of one image.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels (n, 4).
        labels: (n,).
        masks: (n, H, W), true inside.
        scores: (n,); None where they are the truth.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]
    masks: NDArray[np.bool_]
    scores: NDArray[np.floating] | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A held-out image (H, W, 3), the objects on it, and those that the model found."""

    image: NDArray[np.uint8]
    truth: Objects
    found: Objects


@dataclass(frozen=True)
class Tally:
    """Objects that are there, of them found, and detections of what is not there."""

    objects: int
    found: int
    invented: int


@dataclass(frozen=True, kw_only=True)
class DetectionFindings(Course):
    """All that the page of a detector tells.

    Attributes:
        per_class: Rows as `vizoo.train.detection.metrics.CocoAP.per_class`, None for a class without objects.
        images: Held-out images.
        score: Least score of what is shown and counted.
        tally: What was found in all held-out images.
        scenes: Held-out images drawn at random.
    """

    per_class: Sequence[Mapping[str, Any]]
    images: int
    score: float
    tally: Tally
    scenes: Sequence[Scene]

    @property
    def headline(self) -> float:
        """Average precision of boxes at an IoU of one half."""
        return self.figures["box_AP50"]


@dataclass(frozen=True, kw_only=True)
class LabelledScene:
    """A held-out image (H, W, 3), its label map (H, W) and the model's."""

    image: NDArray[np.uint8]
    truth: NDArray[np.integer]
    found: NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class SegmentationFindings(Course):
    """All that the page of a segmenter tells.

    Attributes:
        confusion: Pixels, row = true class.
        images: Held-out images.
        scenes: Held-out images drawn at random.
    """

    confusion: Sequence[Sequence[int]]
    images: int
    scenes: Sequence[LabelledScene]

    @property
    def headline(self) -> float:
        """Mean intersection over union."""
        return self.figures["mIoU"]

    @property
    def ious(self) -> list[float]:
        """Intersection over union of each class in percent."""
        counts = np.asarray(self.confusion, dtype=np.int64)
        right = counts.diagonal()
        return (100 * right / np.maximum(counts.sum(0) + counts.sum(1) - right, 1)).tolist()
