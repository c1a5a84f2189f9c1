"""Detectors on image files: published weights and checkpoints that say what they are, results, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as rle

from vizoo import CheckpointMismatch
from vizoo.cli import main
from vizoo.images import load_image
from vizoo.train.dense_weights import find_dense, resolve_dense
from vizoo.train.detection import Detector, MaskRCNN, RetinaNet
from vizoo.train.detection.classes import COCO, COCO_IDS
from vizoo.train.detection.predict import FoundObjects, ImageDetector, load_detector
from vizoo.train.detection.transforms import ResizeTransform
from vizoo.weights.cache import path_of

# pycocotools' compiled part is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

Make = Callable[..., Detector]
NAME = "mask_rcnn.swin_tiny_patch4_window7_224.coco_3x"
RESIZE = {"type": "vizoo.train.detection.transforms.ResizeTransform", "short": 64, "long": 96}


@pytest.fixture
def save(make: Make, tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint as `vizoo train` does: `save(transform=..., **changes of the model)`."""

    def written(transform: dict[str, Any] | None = RESIZE, meta: dict[str, Any] | None = None, **changes: Any) -> Path:
        model = {
            "type": "vizoo.train.detection.models.MaskRCNN",
            "backbone": {**tiny, "pretrained": True},
            "num_classes": 3,
            "channels": 32,
            "box": {"hidden": (64, 64)},
            "mask": {"hidden": [32, 32]},
            **changes,
        }
        config = Config({"model": model, "val_dataloader": {"dataset": {"transform": transform}}})
        torch.manual_seed(1)
        kept = make(MaskRCNN, rpn={}, box=model["box"], mask=model["mask"])
        path = tmp_path / "best.pth"
        stated = {"classes": ("ant", "bee", "cat"), "category_ids": (3, 44, 90)} if meta is None else meta
        contents = {"meta": {"cfg": config.pretty_text, "dataset_meta": stated}, "state_dict": kept.state_dict()}
        torch.save(contents, path)
        return path

    return written


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(path)
    return path


# -- checkpoints of vizoo train --------------------------------------------------------------------------------------


def test_a_checkpoint_says_all_that_predicting_takes(save: Callable[..., Path], photo: Path) -> None:
    detector = load_detector(checkpoint=save())
    assert isinstance(detector.model, MaskRCNN)
    assert not detector.model.training
    assert (detector.classes, detector.category_ids) == (("ant", "bee", "cat"), (3, 44, 90))
    (found,) = detector.predict([photo], threshold=0.0)
    assert 0 < len(found.boxes) <= 100
    assert found.masks is not None
    assert found.masks.shape == (len(found.boxes), 90, 140)
    assert found.masks.dtype is torch.bool
    assert (found.boxes[:, 2:] <= torch.tensor([140, 90])).all()
    assert found.scores.diff().le(0).all()
    assert detector._tensor(found.image).shape == (3, 62, 96)
    assert detector.draw(found).size == (140, 90)


def test_the_predictions_are_the_models_own(save: Callable[..., Path], photo: Path) -> None:
    detector = load_detector(checkpoint=save(transform={"type": "DetectionTransform"}))
    (found,) = detector.predict([photo], threshold=0.05)
    image = torch.from_numpy(np.array(load_image(photo))).permute(2, 0, 1)
    with torch.no_grad():
        expected = detector.model([image], mode="predict")[0]
    for name in ("boxes", "scores", "labels", "masks"):
        torch.testing.assert_close(getattr(found, name), expected[name])


def test_a_threshold_keeps_what_is_above_it(save: Callable[..., Path], photo: Path) -> None:
    detector = load_detector(checkpoint=save())
    (every,) = detector.predict([photo], threshold=0.0)
    least = float(every.scores.median())
    (some,) = detector.predict([photo], threshold=least)
    torch.testing.assert_close(some.scores, every.scores[every.scores > least])
    (none,) = detector.predict([photo], threshold=0.99)
    assert len(none.boxes) == len(detector.records(none, 1)) == 0
    detector.draw(none)


def test_batches_give_what_single_images_give(save: Callable[..., Path], photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    load_image(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    detector = load_detector(checkpoint=save())
    single, both = ([*detector.predict([photo, other], threshold=0.0, batch_size=size)] for size in (1, 2))
    assert [found.path for found in both] == [photo, other]
    for one, two in zip(single, both, strict=True):
        torch.testing.assert_close(one.boxes, two.boxes, rtol=1e-3, atol=1e-2)


def test_classes_that_do_not_fit_become_numbers(save: Callable[..., Path]) -> None:
    detector = load_detector(checkpoint=save(meta={"classes": ("a", "b")}))
    assert detector.classes == ("class 0", "class 1", "class 2")
    assert detector.categories() == [{"id": i + 1, "name": f"class {i}"} for i in range(3)]


def test_results_are_cocos(save: Callable[..., Path], photo: Path) -> None:
    detector = load_detector(checkpoint=save())
    (found,) = detector.predict([photo], threshold=0.0)
    records = json.loads(json.dumps(detector.records(found, 7)))
    assert len(records) == len(found.boxes)
    masks = found.masks
    assert masks is not None
    for record, box, score, label, mask in zip(records, found.boxes, found.scores, found.labels, masks, strict=True):
        x, y, width, height = record["bbox"]
        torch.testing.assert_close(torch.tensor([x, y, x + width, y + height]), box)
        assert record["score"] == pytest.approx(float(score))
        assert record["category_id"] == (3, 44, 90)[label]
        assert record["image_id"] == 7
        assert (rle.decode(record["segmentation"]) == mask.numpy()).all()
        assert record["area"] == mask.sum()


def test_without_masks_areas_are_those_of_boxes(save: Callable[..., Path]) -> None:
    detector = load_detector(checkpoint=save())
    boxes, one = torch.tensor([[1.0, 2.0, 5.0, 12.0]]), torch.ones(1)
    found = FoundObjects(Path("x.png"), Image.new("RGB", (20, 20)), boxes, one, one.long(), None)
    (record,) = detector.records(found, 1)
    assert "segmentation" not in record
    assert (record["bbox"], record["area"]) == ([1.0, 2.0, 4.0, 10.0], 40.0)
    detector.draw(found)


def test_images_are_read_upright_and_bad_ones_left_out(save: Callable[..., Path], photo: Path, tmp_path: Path) -> None:
    turned, bad = tmp_path / "turned.jpg", tmp_path / "bad.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    load_image(photo).save(turned, exif=exif)
    bad.write_bytes(b"nonsense")
    detector = load_detector(checkpoint=save())
    failed: list[Path] = []
    found = [*detector.predict([bad, turned], on_error=lambda path, error: failed.append(path))]
    assert [(f.path, f.image.size) for f in found] == [(turned, (90, 140))]
    assert failed == [bad]
    with pytest.raises(ValueError, match=r"bad\.png is not an image"):
        next(detector.predict([bad]))


def test_a_transform_of_the_users_own_is_replaced_with_a_warning(save: Callable[..., Path], photo: Path) -> None:
    path = save(transform={"type": "mine.Resize", "size": 3})
    with pytest.warns(UserWarning, match=r"best\.pth was validated with mine\.Resize, which cannot be built"):
        detector = load_detector(checkpoint=path)
    assert detector._tensor(load_image(photo)).shape == (3, 800, 1244)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "vizoo.train.segmentation.segmenter.Segmenter"}, "Segmenter is no model to detect: FasterRCNN, Mask"),
        ({"type": "os.system"}, "system is no model to detect"),
        ({"type": "somewhere.MaskRCNN"}, r"somewhere\.MaskRCNN is no part that vizoo builds from a checkpoint"),
        ({"rpn": {"type": "os.system"}}, r"os\.system is no part that vizoo builds from a checkpoint"),
    ],
)
def test_nothing_but_detectors_is_built(save: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_detector(checkpoint=save(**changes))


def test_what_cannot_be_loaded(save: Callable[..., Path], tmp_path: Path, photo: Path) -> None:
    with pytest.raises(ValueError, match=r"pass a checkpoint \(--checkpoint\), or the name"):
        load_detector()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*none\.pth"):
        load_detector(checkpoint=tmp_path / "none.pth")
    with pytest.raises(CheckpointMismatch, match=r"\(4, 64\) instead of \(6, 64\)"):
        load_detector(checkpoint=save(num_classes=5))
    path = save()
    torch.save({"state_dict": torch.load(path, weights_only=True)["state_dict"]}, path)
    with pytest.raises(ValueError, match=r"best\.pth does not say which model it is of.*--weights"):
        load_detector(checkpoint=path)


def test_bad_options(save: Callable[..., Path], photo: Path) -> None:
    detector = load_detector(checkpoint=save())
    for threshold in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\), got"):
            next(detector.predict([photo], threshold=threshold))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(detector.predict([photo], batch_size=0))


# -- published weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(
    parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file as the authors publish them."""
    path = tmp_path_factory.mktemp("published") / "mask_rcnn_swin_tiny_patch4_window7.pth"
    torch.save({"meta": {}, "state_dict": parity.fill_state_dict(dense_fixture("mask_rcnn_swin_tiny"))}, path)
    return path


@pytest.mark.filterwarnings("ignore:.* is unverified")
def test_imported_weights_give_the_official_detections(
    published: Path, parity: ModuleType, dense_fixture: Callable[[str], dict[str, Any]], photo: Path
) -> None:
    assert main(["weights", "import", NAME, str(published)]) == 0
    detector = load_detector(NAME)
    assert (detector.classes, detector.category_ids) == (COCO, COCO_IDS)
    assert resolve_dense(NAME).read_bytes() == published.read_bytes()
    (case,) = dense_fixture("mask_rcnn_swin_tiny")["goldens"]
    given = case["input"]
    with torch.no_grad():
        batch = parity.image(given["shape"], given["seed"])
        found = detector.model.detect(batch, [tuple(given["img_shape"])], [tuple(given["ori_shape"])])[0]
    for name in ("boxes", "scores", "labels"):
        parity.check(case, f"det_{name}", found[name])
    parity.check(case, "det_mask_area", found["masks"].flatten(1).sum(dim=1))


def test_a_file_of_another_model_is_not_imported(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = NAME.replace("tiny", "small")
    assert main(["weights", "import", name, str(published)]) == 1
    assert f"error: the file does not hold {name}: " in capsys.readouterr().err
    assert not path_of(find_dense(name).weights).exists()


def test_coco_has_80_classes_with_their_ids() -> None:
    ids = dict(zip(COCO, COCO_IDS, strict=True))
    assert len(ids) == 80
    known = {"person": 1, "stop sign": 13, "dining table": 67, "toilet": 70, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known


def test_a_detector_without_masks(make: Make, photo: Path) -> None:
    transform = ResizeTransform(short=64, long=96)
    (found,) = ImageDetector(make(RetinaNet), ("a", "b", "c"), (1, 2, 3), transform).predict([photo], threshold=0.0)
    assert found.masks is None
    assert len(found.boxes)
