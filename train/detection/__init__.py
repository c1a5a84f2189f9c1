"""Object detection and instance segmentation on a pyramid of any backbone.

The models compute what mmdetection 2.11 and 3.3 compute, on torchvision's parts. To read the code, begin with

1. `models`: the four detectors, each a few lines over
2. `detector`: what they share: batches, losses, predictions at the original size;
3. `neck`: the feature pyramid, and one of a plain backbone's last map; `adapter`: maps beside a plain backbone;
4. `proposals`, on `anchors`: the first stage;
5. `roi_heads`, on `heads`, `pooling`, `sampling` and `masks`: the second stage, and `cascade`: three of them;
6. `retinanet`: the single stage;
7. `boxes`: deltas, assignment, suppression, used by all of them;
8. `convert`, on `layouts`: official checkpoints;
9. `data`, `transforms`, `sampler` and `metrics`: COCO's images and annotations in, its figures out.

Boxes are x1, y1, x2, y2 in pixels, labels run from 0, and background, where there is one, is the last class. Where
torchvision computes something else than the official code, an argument says so and has the official value by default.
"""

from .convert import load_detector_checkpoint
from .detector import Detector
from .models import CascadeMaskRCNN, FasterRCNN, MaskRCNN, RetinaNet

__all__ = ["CascadeMaskRCNN", "Detector", "FasterRCNN", "MaskRCNN", "RetinaNet", "load_detector_checkpoint"]
