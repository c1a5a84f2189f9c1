from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from vizoo.train.mixup import Mixup

LABELS = torch.tensor([1, 0, 2, 3])
LOGITS = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.0, 0.3, -0.2, 1.0]])


def images(batch: int = 4, side: int = 8) -> torch.Tensor:
    """Image i holds the value i everywhere."""
    return torch.arange(float(batch)).view(-1, 1, 1, 1).expand(-1, 3, side, side).clone()


def fix_lam(monkeypatch: pytest.MonkeyPatch, lam: float) -> None:
    monkeypatch.setattr(np.random, "beta", lambda *args, **kwargs: lam)


def test_mixup_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_lam(monkeypatch, 0.7)
    mixed, target = Mixup(4, cutmix_alpha=0.0)(images(), LABELS)
    expected = torch.tensor([0.7 * i + 0.3 * (3 - i) for i in range(4)])
    assert torch.allclose(mixed, expected.view(-1, 1, 1, 1), atol=1e-6)
    # Label 1 mixed with 3, smoothing 0.1, four classes: the number of the published definition.
    assert torch.allclose(target[0], torch.tensor([0.025, 0.655, 0.025, 0.295]), atol=1e-6)
    assert torch.allclose(target.sum(1), torch.ones(4), atol=1e-6)
    assert target.dtype == torch.float32


def test_cutmix_share_is_the_boxs_area(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_lam(monkeypatch, 0.6)
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002 -- timm draws from the global generator
        mixed, target = Mixup(4, mixup_alpha=0.0, label_smoothing=0.0)(images(side=9), LABELS)
        share = (mixed[0, 0] == 0).float().mean()
        assert target[0, 1] == pytest.approx(float(share), abs=1e-6)
        assert target[0, 3] == pytest.approx(float(1 - share), abs=1e-6)
        assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}


def test_both_methods_take_turns() -> None:
    np.random.seed(0)  # noqa: NPY002
    mix, cut = Mixup(4), 0
    for _ in range(400):
        mixed, _ = mix(images(side=32), LABELS)
        cut += bool((mixed[0] == 0).any() or (mixed[0] == 3).any())
    assert cut / 400 == pytest.approx(0.5, abs=0.08)


def test_pairs_share_a_draw_and_elements_do_not() -> None:
    np.random.seed(0)  # noqa: NPY002
    _, pair = Mixup(4, cutmix_alpha=0.0, mode="pair", label_smoothing=0.0)(images(), LABELS)
    assert pair[0, 1] == pytest.approx(float(pair[3, 3]))
    assert float(pair[0, 1]) != pytest.approx(float(pair[1, 0]))
    _, elem = Mixup(4, cutmix_alpha=0.0, mode="elem", label_smoothing=0.0)(images(), LABELS)
    assert len({round(float(elem[i, LABELS[i]]), 6) for i in range(4)}) == 4


def test_cutmix_by_its_sides() -> None:
    np.random.seed(0)  # noqa: NPY002
    mix = Mixup(4, mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_minmax=(0.25, 0.75), label_smoothing=0.0)
    shares = [float(mix(images(side=16), LABELS)[1][0, 3]) for _ in range(100)]
    assert 0.25**2 <= min(shares) < max(shares) <= 0.75**2


def test_turned_off_targets_stay_soft_and_smoothed() -> None:
    mix = Mixup(4)
    assert mix.enabled
    mix.enabled = False
    mixed, target = mix(images(), LABELS)
    assert torch.equal(mixed, images())
    assert torch.allclose(target, F.one_hot(LABELS, 4) * 0.9 + 0.025, atol=1e-6)


def test_losses_of_the_sheet() -> None:
    labels = torch.tensor([1, 3])
    smooth = 0.1 / 4 + 0.9 * F.one_hot(labels, 4)
    for loss in (
        F.cross_entropy(LOGITS, labels, label_smoothing=0.1),
        F.cross_entropy(LOGITS, smooth),
        LabelSmoothingCrossEntropy(0.1)(LOGITS, labels),
        SoftTargetCrossEntropy()(LOGITS, smooth),
    ):
        assert float(loss) == pytest.approx(0.738953, abs=1e-6)
    assert float(BinaryCrossEntropy(0.1)(LOGITS, labels)) == pytest.approx(0.674554, abs=1e-6)
    assert float(BinaryCrossEntropy(0.0)(LOGITS, labels)) == pytest.approx(0.648304, abs=1e-6)
    assert float(BinaryCrossEntropy(0.0, sum_classes=True)(LOGITS, labels)) == pytest.approx(2.593216, abs=1e-6)


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, 0.735804), (0.1, 0.573304)])
def test_binary_losses_of_mixed_targets(monkeypatch: pytest.MonkeyPatch, smoothing: float, expected: float) -> None:
    fix_lam(monkeypatch, 0.7)
    mix = Mixup(4, cutmix_alpha=0.0, label_smoothing=smoothing)
    _, target = mix(images(2), torch.tensor([1, 3]))
    loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(LOGITS, target)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_the_mixed_loss_is_the_mix_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_lam(monkeypatch, 0.7)
    labels = torch.tensor([1, 3])
    _, target = Mixup(4, cutmix_alpha=0.0)(images(2), labels)
    own, other = (F.cross_entropy(LOGITS, y, label_smoothing=0.1) for y in (labels, labels.flip(0)))
    assert float(F.cross_entropy(LOGITS, target)) == pytest.approx(float(0.7 * own + 0.3 * other), abs=1e-6)


def test_an_odd_batch_and_wrong_labels() -> None:
    with pytest.raises(ValueError, match="must be even, got 3: set an even batch_size and drop_last=True"):
        Mixup(4)(images(3), LABELS[:3])
    with pytest.raises(ValueError, match=r"labels must be \(4,\), one per image, got \(2,\)"):
        Mixup(4)(images(), LABELS[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"mode": "batches"}, "unknown mode 'batches'; did you mean 'batch'"),
        ({"mixup_alpha": -1.0}, "alphas must be 0 or more, got mixup_alpha=-1.0"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "are both 0: for label smoothing alone"),
        ({"cutmix_minmax": (0.5, 0.2)}, r"cutmix_minmax must be \(low, high\)"),
        ({"prob": 2.0}, r"prob must lie in \[0, 1\], got 2.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixup(**({"num_classes": 4} | arguments))


def test_built_from_a_config_and_pickled() -> None:
    mix = MODELS.build({"type": Mixup, "num_classes": 4, "mode": "pair"})
    assert isinstance(pickle.loads(pickle.dumps(mix)), Mixup)
