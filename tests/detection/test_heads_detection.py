"""The parts of the two stages: proposals, samples, heads, losses, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou, roi_align

from vizoo.train.detection.boxes import IGNORED, NEGATIVE
from vizoo.train.detection.heads import BoxHead, MaskHead
from vizoo.train.detection.masks import mask_targets, paste, paste_soft
from vizoo.train.detection.proposals import ProposalNetwork, Scored
from vizoo.train.detection.roi_heads import BoxBranch, MaskBranch
from vizoo.train.detection.sampling import RoISampler, Samples

STRIDES = (4, 8, 16, 32)
ALL = 10**6


def target(*boxes: tuple[float, float, float, float], labels: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def pyramid(batch: int = 2, side: int = 64, channels: int = 8) -> list[Tensor]:
    return [torch.randn(batch, channels, side // s, side // s) for s in (*STRIDES, 64)]


# Proposals.


def test_proposals_are_counted_by_mode_and_lie_inside_the_image() -> None:
    network = ProposalNetwork(8, (*STRIDES, 64), train_kept=50, test_kept=20)
    torch.nn.init.normal_(network.head.bbox_pred.weight, std=0.3)
    sizes = [(60, 50), (64, 64)]
    for training, kept in ((True, 50), (False, 20)):
        boxes, losses = network.train(training)(pyramid(), sizes)
        assert losses == {}
        for found, (height, width) in zip(boxes, sizes, strict=True):
            assert found.shape == (kept, 4)
            assert not found.requires_grad
            assert found.min() >= 0
            assert found[:, 2].max() <= width
            assert found[:, 3].max() <= height


def scored(boxes: Tensor) -> Scored:
    return Scored(torch.zeros(1, len(boxes)), torch.zeros(len(boxes), 4), boxes, [len(boxes)])


def test_empty_proposals_are_dropped_on_request() -> None:
    boxes = torch.tensor([[10.0, 10, 20, 20], [70.0, 10, 90, 20], [5.0, 40, 6, 40.0]])  # the second is clipped to 0
    for drop, count in ((False, 3), (True, 1)):
        network = ProposalNetwork(8, STRIDES, drop_empty=drop, nms=1.0)
        assert len(network.propose(scored(boxes), [(64, 64)])[0][0]) == count


def test_losses_of_the_first_stage() -> None:
    """All anchors are drawn, so the sums can be written down."""
    network = ProposalNetwork(8, (*STRIDES, 64), anchor_scale=4.0, samples=ALL)
    targets = [target((4, 4, 30, 40), (20, 8, 60, 30)), target()]
    found = network.score(pyramid())
    losses = network.losses(found, [(64, 64)] * 2, targets)
    owners = [network.proposal_matcher.assign(t["boxes"], found.anchors) for t in targets]
    assert (owners[1] == NEGATIVE).all()
    owner = torch.stack(owners)
    counted = owner != IGNORED
    entropy = F.binary_cross_entropy_with_logits(found.objectness, (owner >= 0).float(), reduction="none")
    torch.testing.assert_close(losses["loss_rpn_objectness"], entropy[counted].mean())
    positive = owners[0] >= 0
    assert positive.any()
    goal = network.box_coder.encode_single(targets[0]["boxes"][owners[0][positive]], found.anchors[positive])
    distance = (found.deltas.view(2, -1, 4)[0, positive] - goal).abs()
    torch.testing.assert_close(losses["loss_rpn_box"], distance.sum() / counted.sum())
    network.box_beta = 1 / 9
    smooth = torch.where(distance < 1 / 9, 4.5 * distance**2, distance - 1 / 18)
    torch.testing.assert_close(
        network.losses(found, [(64, 64)] * 2, targets)["loss_rpn_box"], smooth.sum() / counted.sum()
    )


def test_anchors_outside_the_image_are_left_out_where_the_border_says_so() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [-1.0, 0, 9, 10], [50.0, 50, 60, 64], [52.0, 40, 63, 63]])
    objects = torch.tensor([[0.0, 0, 10, 10]])
    for border, expected in (
        (None, [0, 0, NEGATIVE, NEGATIVE]),
        (0.0, [0, IGNORED, IGNORED, NEGATIVE]),
        (1.0, [0, 0, NEGATIVE, NEGATIVE]),
    ):
        network = ProposalNetwork(8, STRIDES, allowed_border=border)
        assert network._assign(anchors, (64, 64), objects).tolist() == expected


def test_half_of_the_drawn_anchors_are_positive_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ProposalNetwork(8, (*STRIDES, 64), anchor_scale=4.0, samples=16, positive_iou=0.3, negative_iou=0.3)
    drawn: list[Any] = []
    draw = network.fg_bg_sampler
    monkeypatch.setattr(network, "fg_bg_sampler", lambda labels: drawn.append(draw(labels)) or drawn[-1])
    network.losses(network.score(pyramid(1)), [(64, 64)], [target((4, 4, 30, 40))])
    positive, negative = drawn[0]
    assert positive[0].sum() == negative[0].sum() == 8


# Samples.


def test_samples_hold_the_objects_and_a_quarter_positives() -> None:
    objects = target((0, 0, 20, 20), (30, 30, 60, 60), labels=(2, 0))
    near = objects["boxes"][[0, 1] * 20] + torch.rand(40, 4)
    far = torch.tensor([[0.0, 40, 10, 60]]).repeat(60, 1) + torch.rand(60, 4)
    samples = RoISampler(3, count=40)(torch.cat([near, far]), objects)
    assert len(samples.boxes) == 40
    assert samples.positive.sum() == 10
    assert torch.equal(samples.labels < 3, samples.positive)
    assert (samples.labels[~samples.positive] == 3).all()
    assert torch.equal(samples.truth[samples.positive], objects["boxes"][samples.objects[samples.positive]])
    assert torch.equal(samples.labels[samples.positive], objects["labels"][samples.objects[samples.positive]])


def test_samples_know_which_boxes_are_objects() -> None:
    objects = target((0, 0, 20, 20), labels=(1,))
    proposals = torch.tensor([[0.0, 0, 20, 20], [0.0, 40, 10, 60]])
    samples = RoISampler(3, count=ALL)(proposals, objects)
    assert samples.is_object.tolist() == [True, False, False]
    assert samples.labels.tolist() == [1, 1, 3]


@pytest.mark.parametrize("proposals", [torch.zeros(0, 4), torch.rand(5, 2).repeat(1, 2) + torch.tensor([0, 0, 9, 9])])
def test_samples_without_objects_or_proposals(proposals: Tensor) -> None:
    samples = RoISampler(3)(proposals, target())
    assert len(samples.boxes) == len(proposals)
    assert not samples.positive.any()
    assert len(RoISampler(3)(proposals[:0], target((0, 0, 9, 9), labels=(0,))).boxes) == 1


# Heads and their losses.


def test_official_initialisation() -> None:
    head = BoxHead(64, 80, hidden=(256, 256))
    assert head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    bound = (6 / (64 * 49 + 256)) ** 0.5  # Xavier
    assert bound * 0.99 < head.features[1].weight.abs().max() <= bound
    for module in (head, MaskHead(64, 80)):
        assert all(not p.any() for name, p in module.named_parameters() if name.endswith("bias"))
    mask = MaskHead(256, 80)
    assert mask.features[0][0].weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


def sampled(boxes: Tensor, labels: list[int], truth: Tensor) -> Samples:
    label = torch.tensor(labels)
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    return Samples(boxes, label, zeros, truth, zeros.bool(), label < 3)


@pytest.fixture
def given() -> tuple[Tensor, Tensor, list[Samples]]:
    """Logits, deltas and two images' samples: three boxes with one positive, two boxes with one positive."""
    boxes = torch.tensor([[0.0, 0, 10, 12], [5.0, 5, 30, 20], [8.0, 2, 20, 40], [1.0, 1, 20, 20], [4.0, 4, 9, 9]])
    truth = boxes + torch.tensor([[1.0, 0, 2, -1], [0, 0, 0, 0], [0, 0, 0, 0], [-1, 2, 3, 1], [0, 0, 0, 0]])
    samples = [sampled(boxes[:3], [1, 3, 3], truth[:3]), sampled(boxes[3:], [2, 3], truth[3:])]
    return torch.randn(5, 4), torch.randn(5, 12), samples


def test_losses_of_the_second_stage(given: tuple[Tensor, Tensor, list[Samples]]) -> None:
    logits, deltas, samples = given
    branch = BoxBranch(8, STRIDES, 3, hidden=(16,))
    losses = branch.losses(logits, deltas, samples)
    labels = torch.tensor([1, 3, 3, 2, 3])
    torch.testing.assert_close(losses["loss_classifier"], F.cross_entropy(logits, labels))
    distance = torch.zeros(())
    for row, sample, index, label in ((0, samples[0], 0, 1), (3, samples[1], 0, 2)):
        goal = branch.coder.encode_single(sample.truth[index, None], sample.boxes[index, None])[0]
        distance += (deltas[row, 4 * label : 4 * label + 4] - goal).abs().sum()
    torch.testing.assert_close(losses["loss_box_reg"], distance / 5)


def test_generalised_iou_loss(given: tuple[Tensor, Tensor, list[Samples]]) -> None:
    logits, deltas, samples = given
    branch = BoxBranch(8, STRIDES, 3, hidden=(16,), giou_weight=10.0)
    loss = branch.losses(logits, deltas, samples)["loss_box_reg"]
    boxes = torch.stack([samples[0].boxes[0], samples[1].boxes[0]])
    truth = torch.stack([samples[0].truth[0], samples[1].truth[0]])
    decoded = branch.decode(deltas[[0, 3]], boxes)[[0, 1], [1, 2]]
    expected = 10 * (1 - generalized_box_iou(decoded, truth).diagonal()).sum() / 5
    torch.testing.assert_close(loss, expected)


def test_detections_of_every_class_are_selected() -> None:
    branch = BoxBranch(8, STRIDES, 2, hidden=(16,), score_threshold=0.2, max_detections=3)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.45, 0.15, 0.4]]))
    boxes = torch.tensor([[0.0, 0, 10, 10], [20.0, 20, 30, 30], [40.0, 40, 60, 60]])
    deltas = torch.zeros(3, 8)
    deltas[0, 4] = 10.0  # one width to the right, for class 1
    found = branch.select(logits, deltas, [boxes], [(50, 50)])[0]
    torch.testing.assert_close(found.scores, torch.tensor([0.5, 0.45, 0.3]))
    assert found.labels.tolist() == [0, 0, 1]
    expected = torch.tensor([[0.0, 0, 10, 10], [40.0, 40, 50, 50], [10.0, 0, 20, 10]])
    torch.testing.assert_close(found.boxes, expected)


# Masks.


def grid_sampled(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Pasting as the official code writes it."""
    x = (torch.arange(width) + 0.5 - boxes[:, 0, None]) / (boxes[:, 2] - boxes[:, 0])[:, None] * 2 - 1
    y = (torch.arange(height) + 0.5 - boxes[:, 1, None]) / (boxes[:, 3] - boxes[:, 1])[:, None] * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def test_masks_are_pasted_as_officially() -> None:
    masks = torch.rand(4, 28, 28)
    boxes = torch.tensor(
        [[3.3, 4.7, 40.2, 30.9], [-10.5, -8.2, 70.0, 60.0], [10.0, 10.0, 11.5, 35.0], [50.1, 2, 90, 9]]
    )
    expected = grid_sampled(masks, boxes, 48, 64)
    torch.testing.assert_close(paste_soft(masks, boxes, 48, 64), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(paste(masks, boxes, (48, 64)), expected >= 0.5)
    assert torch.equal(paste(masks, boxes, (48, 64), threshold=0.2), expected >= 0.2)


def test_pasting_in_parts_gives_the_same() -> None:
    masks = torch.rand(7, 28, 28)
    boxes = torch.rand(7, 4).cumsum(dim=1) * 20
    whole = paste(masks, boxes, (40, 50))
    for pixels in (1, 40 * 50 * 3):
        assert torch.equal(paste(masks, boxes, (40, 50), working_pixels=pixels), whole)


def test_pasting_holds_few_pixels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 masks of 2000 x 3000 pixels are 480 MB in float32; no more than 64 MiB are made at once."""
    import vizoo.train.detection.masks as module

    largest = []

    def counted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
        largest.append(len(masks) * height * width)
        return torch.zeros(len(masks), height, width)

    monkeypatch.setattr(module, "paste_soft", counted)
    paste(torch.rand(20, 28, 28), torch.rand(20, 4), (2000, 3000))
    assert sum(largest) == 20 * 2000 * 3000
    assert max(largest) <= 2**24


def test_a_box_without_extent_covers_nothing_and_no_box_is_no_mask() -> None:
    boxes = torch.tensor([[5.5, 5.0, 5.5, 9.0]])
    assert not paste(torch.ones(1, 28, 28), boxes, (20, 20))[0, :, 6:].any()
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (20, 30)).shape == (0, 20, 30)


def test_pasting_is_exact_under_autocast() -> None:
    masks, boxes = torch.rand(3, 28, 28), torch.tensor([[3.3, 4.7, 40.2, 30.9]]).repeat(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = paste_soft(masks, boxes, 48, 64)
    assert torch.equal(inside, paste_soft(masks, boxes, 48, 64))


def test_mask_targets() -> None:
    masks = torch.zeros(3, 40, 60, dtype=torch.uint8)
    masks[0, 10:30, 20:40] = 1
    masks[2, 5:33, 7:48] = torch.randint(0, 2, (28, 41), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 0, 50, 40], [20.0, 10, 40, 30], [3.3, 4.4, 80.0, 39.9]])
    found = mask_targets(masks, torch.tensor([0, 0, 2]), boxes, 28)
    assert found.dtype == torch.float32
    assert torch.equal(found[1], torch.ones(28, 28))
    assert found[0].sum() == 14 * 14  # half of each side
    rois = [boxes[2:].clamp(max=60.0)]  # the image is 60 wide
    soft = roi_align(masks[2].float()[None, None], rois, 28, 1.0, 0, True)[0, 0]
    assert torch.equal(found[2], (soft >= 0.5).float())
    assert mask_targets(masks, torch.zeros(0, dtype=torch.int64), boxes[:0], 28).shape == (0, 28, 28)


@pytest.mark.parametrize(("threshold", "columns"), [(0.5, 13), (0.95, 12)])
def test_mask_loss_is_the_mean_over_positive_boxes_of_their_class(threshold: float, columns: int) -> None:
    branch = MaskBranch(8, STRIDES, 3, hidden=(8, 8), target_threshold=threshold)
    samples = RoISampler(3, count=ALL)(torch.tensor([[0.0, 40, 30, 60]]), target((4, 4, 30, 40), labels=(1,)))
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, :60, :16] = 1  # 12 of the box's 26 columns; the centre of the 13th of 28 cells is covered to 0.89
    maps = pyramid(1)[:4]
    loss = branch.loss(maps, [samples], [{"masks": masks}])["loss_mask"]
    logits = branch.heads[0](branch.pooler(maps, [samples.boxes[:1]]))[0, 1]
    wanted = torch.zeros(28, 28)
    wanted[:, :columns] = 1
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, wanted))
