"""Names of the neck's and heads' parameters in official checkpoints, as (pattern, replacement) to our names.

Both official layouts, SwinTransformer/Swin-Transformer-Object-Detection's (mmdetection 2.11) and mmdetection 3.3's,
name these parts alike; they differ in the backbone, whose names `backbones/` knows. Only names change: our heads keep
the official order of classes.
"""

from __future__ import annotations

_NECK = (
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"neck.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"neck.layer_blocks.\1.0."),
    # Some have batch norms.
    (r"^neck\.lateral_convs\.(\d+)\.bn\.", r"neck.inner_blocks.\1.1."),
    (r"^neck\.fpn_convs\.(\d+)\.bn\.", r"neck.layer_blocks.\1.1."),
)

_PROPOSALS = (
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
)

_MASK = (
    (r"^(mask\.heads\.\d+)\.convs\.(\d+)\.conv\.", r"\1.features.\2.0."),
    (r"^(mask\.heads\.\d+)\.upsample\.", r"\1.predictor.conv5_mask."),
    (r"^(mask\.heads\.\d+)\.conv_logits\.", r"\1.predictor.mask_fcn_logits."),
)

TWO_STAGE = (
    *_NECK,
    *_PROPOSALS,
    # A flattening stands in front of the first linear layer, a ReLU behind each.
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "box.head.features.1."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "box.head.features.3."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "box.head.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "box.head.bbox_pred."),
    (r"^roi_head\.mask_head\.", "mask.heads.0."),
    *_MASK,
)

# Boxes behind four convolutions and a flattening.
TWO_STAGE_CONVS = (
    (r"^roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\.", r"box.head.features.\1.0."),
    (r"^roi_head\.bbox_head\.shared_convs\.(\d+)\.bn\.", r"box.head.features.\1.1."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "box.head.features.5."),
    *TWO_STAGE,
)

CASCADE = (
    *_NECK,
    *_PROPOSALS,
    (r"^roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.", r"box.stages.\1.head.features.\2.0."),
    (r"^roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.", r"box.stages.\1.head.features.\2.1."),
    # Behind four convolutions and a flattening.
    (r"^roi_head\.bbox_head\.(\d+)\.shared_fcs\.0\.", r"box.stages.\1.head.features.5."),
    (r"^roi_head\.bbox_head\.(\d+)\.fc_cls\.", r"box.stages.\1.head.cls_score."),
    (r"^roi_head\.bbox_head\.(\d+)\.fc_reg\.", r"box.stages.\1.head.bbox_pred."),
    (r"^roi_head\.mask_head\.(\d+)\.", r"mask.heads.\1."),
    *_MASK,
)

RETINANET = (
    (r"^neck\.fpn_convs\.3\.conv\.", "neck.extra_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "neck.extra_blocks.p7."),
    (r"^neck\.fpn_convs\.3\.bn\.", "neck.extra_blocks.p6_norm."),
    (r"^neck\.fpn_convs\.4\.bn\.", "neck.extra_blocks.p7_norm."),
    *_NECK,
    (r"^bbox_head\.cls_convs\.(\d+)\.conv\.", r"head.head.classification_head.conv.\1.0."),
    (r"^bbox_head\.reg_convs\.(\d+)\.conv\.", r"head.head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "head.head.classification_head.cls_logits."),
    (r"^bbox_head\.retina_reg\.", "head.head.regression_head.bbox_reg."),
)
