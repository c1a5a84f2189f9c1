"""What a classifier's page is made from: plain values and arrays, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
class Findings:
    """All that the page of a classifier tells.

    Attributes:
        model: Name of the model in the zoo.
        design: How the model differs from the one of that name, in words.
        subject: What the images show, in the plural.
        parameters: Number of parameters.
        macs: Multiply-adds for one image.
        classes: Names.
        seed: Seed of everything random.
        goal: Accuracy in percent that the run is to reach.
        accuracy: Accuracy in percent on the held-out images.
        history: Records as `vizoo.train.log.read_log` returns them.
        confusion: Counts, row = true class.
        examples: All held-out images.
        gaze: Where the model looked.
        plane: Places (N, 2) of the held-out images' features.
        speeds: Measured speeds.
        phases: What took how many seconds.
        recipe: How the model was trained: name and value.
        machine: Where: name and value.
        commands: What one may want to do next, and the command.
    """

    model: str
    design: str
    subject: str
    parameters: int
    macs: int
    classes: Sequence[str]
    seed: int
    goal: float
    accuracy: float
    history: Sequence[dict[str, Any]]
    confusion: Sequence[Sequence[int]]
    examples: Sequence[Example]
    gaze: Gaze
    plane: NDArray[np.floating]
    speeds: Sequence[Speed]
    phases: Sequence[tuple[str, float]]
    recipe: Sequence[tuple[str, str]]
    machine: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]

    @property
    def met(self) -> bool:
        """Whether the goal was reached."""
        return self.accuracy >= self.goal

    @property
    def wrong(self) -> int:
        """Held-out images answered wrongly."""
        return sum(map(sum, self.confusion)) - sum(row[i] for i, row in enumerate(self.confusion))

    @property
    def training_seconds(self) -> float:
        """Seconds from the first to the last record of the run."""
        times = [record["time"] for record in self.history]
        return max(times) - min(times)

    @property
    def start(self) -> dict[str, Any]:
        """The first record of the run: images, batches, epochs."""
        return next(record for record in self.history if record["kind"] == "start")
