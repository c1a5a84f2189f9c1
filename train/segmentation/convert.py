"""Published checkpoints of whole segmenters: official Swin, mmsegmentation, LITv2, and our own."""

from __future__ import annotations

from vizoo.checkpoint import CheckpointMismatch, LoadReport
from vizoo.train.dense_checkpoint import Source, load_backbone, load_part, merge_reports, read_source, split_roots

from .segmenter import Segmenter

PARTS = ("neck", "decode_head", "auxiliary_head")


def load_segmenter_checkpoint(model: Segmenter, source: Source) -> LoadReport:
    """Load a whole segmenter's checkpoint, strictly.

    The backbone is translated by its family's layouts, heads and neck have the published names. A classifier for
    another number of classes keeps its initial values, and the report says so. A checkpoint's auxiliary head is
    dropped where the model has none.

    Args:
        model: A model with the checkpoint's backbone and heads.
        source: A path, an http(s) address, a weights record, or a state dict, in a container or not.

    Returns:
        What was loaded, adapted, dropped and left.

    Raises:
        CheckpointMismatch: Parts or keys are missing, unexpected or of another shape.
        FileNotFoundError: There is no such file.
        vizoo.weights.store.WeightsError: The download failed, or the file cannot be read as a checkpoint.
    """
    state, title = read_source(source)
    parts = split_roots(state)
    own = {root: module for root in PARTS if (module := getattr(model, root)) is not None}
    dropped = [root for root in parts if root == "auxiliary_head" and root not in own]
    _require_parts({*parts} - {*dropped}, {"backbone", *own}, title)
    reports = {
        root: load_part(module, parts[root], prefix=f"{root} of {title}", classifiers=("conv_seg",))
        for root, module in own.items()
    }
    reports["backbone"] = load_backbone(model.backbone, parts["backbone"])
    if reports["backbone"].fresh:  # a classifier's checkpoint may lack them, a segmenter's may not
        raise CheckpointMismatch(f"{title} lacks parts of the backbone: {', '.join(reports['backbone'].fresh)}")
    return merge_reports(title, reports, dropped)


def _require_parts(have: set[str], want: set[str], title: str) -> None:
    if have != want:
        raise CheckpointMismatch(
            f"{title} has the parts {', '.join(sorted(have))}, this segmenter {', '.join(sorted(want))}: "
            "build the model with the checkpoint's neck and heads"
        )
