"""Batches of several sizes and the loss against the average: in the data set, in the model, in a run, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.dataset import DefaultSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.classification import ImageClassifier
from vizoo.train.datasets import Digits, SizedIndex
from vizoo.train.hooks import EMA
from vizoo.train.hooks_mesa import Mesa
from vizoo.train.log import read_log
from vizoo.train.run import train
from vizoo.train.samplers import MultiScaleBatches
from vizoo.train.transforms import RecipeTrainTransform

# Some 50 digits for training, in 8 batches an epoch.
SCALES = """
from vizoo.train.datasets import Digits
from vizoo.train.hooks_mesa import Mesa
from vizoo.train.samplers import MultiScaleBatches
from vizoo.train.transforms import RecipeTrainTransform

transform = dict(type=RecipeTrainTransform, size=32)
scales = dict(type=MultiScaleBatches, sizes=(32, 48), base=48)
train_dataloader.update(
    batch_size=4, drop_last=False, batch_sampler=scales, dataset=dict(type=Digits, held_out=0.97, transform=transform)
)
val_dataloader.update(dataset=dict(type=Digits, split="val", held_out=0.01, transform=transform))
model.update(mixup=None)
model["backbone"].update(num_classes=10)
custom_hooks.append(dict(type=Mesa, weight=1.5, start=0.25))
"""


@pytest.fixture(scope="module")
def scales_config(small_config: Path) -> Path:
    """Path of a config with both."""
    path = small_config.with_name("scales.py")
    path.write_text(small_config.read_text() + SCALES)
    return path


class Toy(nn.Module):
    """A linear classifier of the mean colour; in training it counts in another unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3))) * (10 if self.training else 1)


def runner_with(model: nn.Module, *hooks: Any) -> SimpleNamespace:
    """What a hook sees of a run of 8 iterations."""
    return SimpleNamespace(model=model, hooks=hooks, iter=0, max_iters=8)


def test_a_sized_index_gives_the_image_at_that_size() -> None:
    data = Digits(transform=RecipeTrainTransform(size=32))
    assert data[SizedIndex(3, 48)]["inputs"].shape == (3, 48, 48)
    assert data[SizedIndex(3, 48)]["label"] == data[3]["label"]
    assert data[3]["inputs"].shape == (3, 32, 32)
    torch.manual_seed(0)
    other = RecipeTrainTransform(size=48, auto_augment=None, hflip=0.0, erase_prob=0.0, color_jitter=None, scale=(1, 1))
    mine = RecipeTrainTransform(size=32, auto_augment=None, hflip=0.0, erase_prob=0.0, color_jitter=None, scale=(1, 1))
    assert mine.at(48) is mine.at(48)
    image = data.image(3)
    torch.testing.assert_close(mine.at(48)(image), other(image))


def test_rand_augment_moves_by_the_size() -> None:
    transform = RecipeTrainTransform(size=32)
    constants = [t.steps[2].ops[0].hparams["translate_const"] for t in (transform, transform.at(320))]
    assert constants == [14, 144]


def test_a_transform_of_one_size_is_refused() -> None:
    data = Digits(transform=lambda image: torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"need a transform with a method `at\(size\)`, such as Recipe.*, got function"):
        data[SizedIndex(0, 32)]


def test_workers_that_stay_follow_the_epochs() -> None:
    data = Digits(transform=RecipeTrainTransform(size=32, auto_augment=None), held_out=0.97)
    batches = MultiScaleBatches(DefaultSampler(data, seed=0), 4, (32, 48), 48)
    loader = DataLoader(data, batch_sampler=batches, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        planned = [(len(batch), batch[0].size) for batch in batches]
        seen.append([(len(batch["inputs"]), batch["inputs"].shape[-1]) for batch in loader])
        assert seen[-1] == planned
    assert len({tuple(epoch) for epoch in seen}) > 1


def test_the_loss_is_that_against_the_average_of_mixed_images() -> None:
    def flip(inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.flip(0), torch.full((len(label), 4), 0.25)

    model, average, mesa = ImageClassifier(Toy(), mixup=flip), EMA(), Mesa(weight=2.0, start=0.5)
    runner = runner_with(model, average, mesa)
    average.before_run(runner)
    nn.init.normal_(model.backbone.layer.weight)
    mesa.before_train(runner)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    runner.iter = 3
    mesa.before_train_iter(runner, 3)
    assert model(images, labels, mode="loss").keys() == {"loss"}
    runner.iter = 4
    mesa.before_train_iter(runner, 4)
    losses = model(images, labels, mode="loss")
    logits, taught = model.backbone(images.flip(0)), average.ema_model.module.backbone.eval()(images.flip(0))
    expected = -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["further_loss"], 2 * expected)
    torch.testing.assert_close(losses["label_loss"], -logits.log_softmax(1).mean())
    sum(losses.values()).backward()
    assert all(p.grad is None for p in average.ema_model.parameters())
    assert model.eval()(images, labels, mode="loss").keys() == {"loss"}
    assert model.state_dict().keys() == ImageClassifier(Toy()).state_dict().keys()
    mesa.after_train(runner)
    assert model.further_loss is None


def test_mesa_refuses() -> None:
    with pytest.raises(ValueError, match="weight must be positive, got 0: leave the hook out"):
        Mesa(weight=0)
    with pytest.raises(ValueError, match=r"start must lie in \[0, 1\), got 1"):
        Mesa(start=1)
    with pytest.raises(ValueError, match="needs a moving average of the weights beside it"):
        Mesa().before_train(runner_with(ImageClassifier(Toy()), Mesa()))
    with pytest.raises(TypeError, match="is for an ImageClassifier, got Toy"):
        Mesa().before_train(runner_with(Toy(), EMA()))


def test_a_run_with_both_resumes_exactly(scales_config: Path, tmp_path: Path) -> None:
    """Before the loss begins, and after, inside epochs."""

    def run(name: str, *settings: str, **options: Any) -> Path:
        return train(scales_config, ["train_cfg.max_epochs=2", *settings], work_dir=tmp_path / name, **options)

    def found(folder: Path) -> tuple[dict[int, float], dict[str, Tensor]]:
        checkpoint = read_checkpoint(folder / "epoch_2.pth")
        raw = {f"raw.{key}": value for key, value in checkpoint["ema_state_dict"].items()}
        losses = {r["iter"]: r["loss"] for r in read_log(folder) if r["kind"] == "train"}
        return losses, checkpoint["state_dict"] | raw

    saving = ("default_hooks.checkpoint.iters=4", "default_hooks.checkpoint.keep=99")
    whole = run("whole", *saving, quiet=True)
    losses, weights = found(whole)
    assert len(losses) == 16
    for point in ("iter_4.pth", "iter_12.pth"):
        cut = tmp_path / point.removesuffix(".pth")
        cut.mkdir()
        shutil.copy(whole / point, cut)
        (cut / "log.jsonl").write_text((whole / "log.jsonl").read_text())
        again, resumed = found(run(cut.name, *saving, quiet=True, resume=True))
        assert again == losses
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    without, _ = found(run("without", "custom_hooks=[{'type': 'EMA', 'decay': 0.9}]", quiet=True))
    begun = [iteration for iteration in losses if losses[iteration] > without[iteration] + 0.5]
    assert begun == list(range(5, 17)), "a quarter of 16 iterations is over before the fifth"
