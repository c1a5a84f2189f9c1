"""The demo's classifier: small images of handwritten digits, and everything its chapter tells."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vizoo.benchmark import Mode, benchmark
from vizoo.card import count_macs
from vizoo.predict import Classifier, load_classifier
from vizoo.preprocess import eval_transform
from vizoo.train.datasets import Digits
from vizoo.train.log import CONFUSION, read_log
from vizoo.train.run import evaluate
from vizoo.train.settings import load_config
from vizoo.train.trainer import CONFIG as SAVED_CONFIG

from .attribution import hiding_test, look
from .findings import Example, Findings, Gaze, Speed
from .phases import Clock
from .words import design_in_words, digits_in_words, machine_in_words, recipe_in_words

CONFIG = "demo/digits"
HELD_OUT = "held-out"
HIDDEN_SHARE = 0.2


def digits_findings(folder: Path, checkpoint: Path, goal: float, clock: Clock, quiet: bool) -> Findings:
    """Everything the chapter tells, from the folder of a finished run.

    Args:
        folder: The run.
        checkpoint: Its last checkpoint.
        goal: Accuracy in percent to reach on the held-out digits.
        clock: Told how long things take.
        quiet: Show nothing.
    """
    config = load_config(folder / SAVED_CONFIG)
    with clock.phase("digits, evaluation"):
        figures = evaluate(folder / SAVED_CONFIG, checkpoint, work_dir=folder / "test", quiet=quiet)
        confusion = json.loads((folder / "test" / CONFUSION).read_text())["matrix"]
    classifier = load_classifier(checkpoint=checkpoint)
    with clock.phase("digits, prediction"):
        examples = _predict(classifier, _held_out(config), folder / HELD_OUT)
    with clock.phase("digits, explanation"):
        gaze = _gaze(classifier, examples, seed=config.randomness.seed)
        plane = _plane(classifier, examples, seed=config.randomness.seed)
    with clock.phase("digits, speed"):
        speeds = _speeds(classifier, config.train_dataloader.batch_size)
    backbone = dict(config.model.backbone)
    return Findings(
        config=CONFIG,
        model=backbone.pop("name"),
        design=design_in_words(backbone),
        subject="digits",
        parameters=sum(p.numel() for p in classifier.model.parameters()),
        macs=count_macs(classifier.model, *classifier.preprocess["input_size"][1:]),
        classes=[str(digit) for digit in range(len(confusion))],
        seed=config.randomness.seed,
        goal=goal,
        figures=figures,
        history=read_log(folder),
        confusion=confusion,
        examples=examples,
        gaze=gaze,
        plane=plane,
        speeds=speeds,
        recipe=recipe_in_words(CONFIG, config, digits_in_words(config)),
        machine=machine_in_words(),
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
