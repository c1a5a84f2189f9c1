"""The demo: train a small backbone on real handwritten digits, and tell how it went as one HTML page.

It takes the roads a user takes: `train` and `test` on the config `demo/digits`, and for unseen images the classifier
behind `vizoo predict`, on image files.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vizoo.benchmark import Mode, benchmark, threads
from vizoo.card import count_macs
from vizoo.predict import Classifier, load_classifier
from vizoo.preprocess import eval_transform

from .attribution import hiding_test, look
from .checkpoint import latest_checkpoint, write_atomically
from .classifier_page import classification_page
from .datasets import Digits
from .findings import Example, Findings, Gaze, Speed
from .log import CONFUSION, read_log
from .progress import ProgressLine, duration
from .report import render
from .run import evaluate, train
from .settings import load_config
from .trainer import CONFIG as SAVED_CONFIG
from .words import design_in_words, machine_in_words, recipe_in_words

CONFIG = "demo/digits"
GOAL = 97.0
REPORT = "report.html"
HELD_OUT = "held-out"
HIDDEN_SHARE = 0.2


class GoalMissed(RuntimeError):
    """The trained model is less accurate than the demo promises; the report was written and says so."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        report: The page.
        run: Folder of the run: config, log, checkpoints, and the held-out images as files.
        accuracy: Accuracy in percent on the held-out digits.
        seconds: Seconds it took, all in all.
    """

    report: Path
    run: Path
    accuracy: float
    seconds: float


@dataclass
class _Clock:
    """Names and seconds of the demo's phases."""

    line: ProgressLine
    start: float = field(default_factory=time.perf_counter)
    phases: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - begin))
        self.line.say(f"{name}: {duration(self.phases[-1][1])}")

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


def run(
    output: str | Path,
    *,
    seed: int | None = None,
    settings: Sequence[str] = (),
    goal: float = GOAL,
    show: bool = False,
    quiet: bool = False,
) -> DemoResult:
    """Train, evaluate, predict, measure, and write the report.

    Args:
        output: Folder. Every call makes a run of its own below `runs/` in it, with its report; `report.html` in the
            folder is a copy of the newest. Nothing else in the folder is touched.
        seed: Seed of everything random; None keeps the config's.
        settings: `key=value` changes of the config.
        goal: Accuracy in percent to reach on the held-out digits.
        show: Open the report in a browser.
        quiet: Show nothing.

    Returns:
        Where the report is, and the main figures.

    Raises:
        GoalMissed: The model is less accurate than `goal`; the report is there all the same.
        ValueError: Bad settings.
    """
    clock = _Clock(ProgressLine(quiet=quiet))
    folder = _new_folder(Path(output) / "runs")
    # So small a model gains little by more threads, and loses a lot by waiting for them on a busy machine.
    with threads(1):
        with clock.phase("training"):
            train(CONFIG, settings, work_dir=folder, seed=seed, quiet=quiet)
        found = _find_out(folder, goal, clock, quiet)
    report = Path(output) / REPORT
    page = render(classification_page(found)).encode()
    for path in (folder / REPORT, report):
        write_atomically(path, page)
    clock.line.say(f"{found.accuracy:.2f} % of {len(found.examples)} held-out digits, {duration(clock.total)} in all")
    clock.line.say(f"report: {report}")
    if show:
        webbrowser.open(report.resolve().as_uri())
    if not found.met:
        raise GoalMissed(f"the demo reached {found.accuracy:.2f} % instead of {goal:g} %; {report} shows what happened")
    return DemoResult(report, folder, found.accuracy, clock.total)


def _new_folder(parent: Path) -> Path:
    """The next free number below a folder, taken."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    for number in itertools.count(max(taken, default=0) + 1):
        folder = parent / f"{number:03}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable: count() is endless")


def _find_out(folder: Path, goal: float, clock: _Clock, quiet: bool) -> Findings:
    """Everything the page tells, from the folder of a finished run."""
    config = load_config(folder / SAVED_CONFIG)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None, "training ends with a checkpoint"
    with clock.phase("evaluation"):
        figures = evaluate(folder / SAVED_CONFIG, checkpoint, work_dir=folder / "test", quiet=quiet)
        confusion = json.loads((folder / "test" / CONFUSION).read_text())["matrix"]
    classifier = load_classifier(checkpoint=checkpoint)
    with clock.phase("prediction"):
        examples = _predict(classifier, _held_out(config), folder / HELD_OUT)
    with clock.phase("explanation"):
        gaze = _gaze(classifier, examples, seed=config.randomness.seed)
        plane = _plane(classifier, examples, seed=config.randomness.seed)
    with clock.phase("speed"):
        speeds = _speeds(classifier, config.train_dataloader.batch_size)
    backbone = dict(config.model.backbone)
    return Findings(
        model=backbone.pop("name"),
        design=design_in_words(backbone),
        subject="digits",
        parameters=sum(p.numel() for p in classifier.model.parameters()),
        macs=count_macs(classifier.model, *classifier.preprocess["input_size"][1:]),
        classes=[str(digit) for digit in range(len(confusion))],
        seed=config.randomness.seed,
        goal=goal,
        accuracy=figures["top1"],
        history=read_log(folder),
        confusion=confusion,
        examples=examples,
        gaze=gaze,
        plane=plane,
        speeds=speeds,
        phases=clock.phases,
        recipe=recipe_in_words(CONFIG, config),
        machine=machine_in_words(),
        commands=_commands(folder, checkpoint),
    )


def _held_out(config: Config) -> Digits:
    """The validation set of the run, by the arguments of its config."""
    arguments = dict(config.val_dataloader.dataset)
    arguments.pop("type")
    return Digits(**arguments)


def _predict(classifier: Classifier, digits: Digits, folder: Path) -> list[Example]:
    """Write the held-out digits as image files, and classify the files."""
    folder.mkdir()
    paths = [
        folder / f"{index:04}_{digits.classes[label]}.png"
        for index, label in zip(digits.indices, digits.labels, strict=True)
    ]
    for path, pixels in zip(paths, digits.pixels, strict=True):
        Image.fromarray(pixels).save(path)
    examples = []
    predictions = classifier.predict(paths, top=len(digits.classes), batch_size=64)
    for pixels, label, prediction in zip(digits.pixels, digits.labels, predictions, strict=True):
        probabilities = np.zeros(len(digits.classes))
        probabilities[list(prediction.indices)] = prediction.probabilities
        examples.append(Example(image=pixels, label=int(label), probabilities=probabilities))
    return examples


def _inputs(classifier: Classifier, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    transform = eval_transform(classifier.preprocess)
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def _gaze(classifier: Classifier, examples: Sequence[Example], seed: int) -> Gaze:
    """Where the model looks in one digit of each class and in those it got wrong, and the test over all of them."""
    images, labels = [e.image for e in examples], np.array([e.label for e in examples])
    heat = look(classifier.model, _inputs(classifier, images), torch.tensor([e.answer for e in examples]))
    pooled = torch.nn.functional.adaptive_avg_pool2d(heat[:, None], images[0].shape)[:, 0].numpy()

    def accuracy(changed: Sequence[NDArray[np.uint8]]) -> float:
        with torch.inference_mode():
            answers = classifier.model(_inputs(classifier, changed)).argmax(1).numpy()
        return 100 * float((answers == labels).mean())

    hot, at_random = hiding_test(accuracy, images, list(pooled), HIDDEN_SHARE, seed)
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    chosen += [i for i, e in enumerate(examples) if not e.is_right and i not in chosen][:2]
    size = heat.shape[1:]
    shown = [replace(examples[i], image=_enlarged(images[i], size)) for i in chosen]
    return Gaze(
        examples=shown,
        heat=[heat[i].numpy() for i in chosen],
        share=HIDDEN_SHARE,
        hidden_hot=hot,
        hidden_random=at_random,
    )


def _enlarged(image: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _plane(classifier: Classifier, examples: Sequence[Example], seed: int) -> NDArray[np.floating]:
    """The features in front of the classifier, in two dimensions.

    A large perplexity and little exaggeration keep the shape of each class; the defaults draw every class as a dot.
    """
    from sklearn.manifold import TSNE

    model = classifier.model
    with torch.inference_mode():
        maps = model.forward_features(_inputs(classifier, [e.image for e in examples]))
        features = model.forward_head(maps, pre_logits=True).numpy()
    return TSNE(
        perplexity=min(80, len(examples) // 4), early_exaggeration=2, init="pca", random_state=seed
    ).fit_transform(features)


def _speeds(classifier: Classifier, batch: int) -> list[Speed]:
    """Images per second of single images and of batches; of training too."""
    modes: tuple[tuple[Mode, int, int], ...] = (("inference", 1, 40), ("inference", batch, 12), ("training", batch, 8))
    speeds = []
    for mode, size, steps in modes:
        # A copy: measuring training steps changes weights.
        model = copy.deepcopy(classifier.model)
        done = benchmark(model, mode=mode, batch_size=size, device="cpu", dtype="float32", steps=steps, warmup=2)
        speeds.append(Speed(mode, size, done.images_per_second, done.spread))
    return speeds


def _commands(folder: Path, checkpoint: Path) -> list[tuple[str, str]]:
    model = "swin_tiny_patch4_window7_224"
    own = {"train_dataloader.dataset.root": "FOLDER", "val_dataloader.dataset.root": "FOLDER"}
    own |= {"model.backbone.num_classes": "N", "model.mixup.num_classes": "N"}
    longer = {"model.backbone.embed_dim": "48", "train_cfg.max_epochs": "60"}
    ask = f"vizoo predict {folder / HELD_OUT} --checkpoint {checkpoint}"
    return [
        ("Ask this model about its held-out digits, or a file of yours", ask),
        ("Evaluate it again", f"vizoo test {folder / SAVED_CONFIG} {checkpoint}"),
        ("Train a wider one for longer", f"vizoo train {CONFIG} {_set(longer)}"),
        ("See the models of the zoo, and one of them closely", f"vizoo list\nvizoo describe {model}"),
        ("Let a pretrained one name what is on a picture", f"vizoo predict photo.jpg --model {model}"),
        (
            "Train on N classes of your own: FOLDER/train/CLASS/, FOLDER/val/CLASS/",
            f"vizoo train imagenet/{model} {_set(own)}",
        ),
    ]


def _set(values: Mapping[str, str]) -> str:
    return " ".join(f"--set {key}={value}" for key, value in values.items())
