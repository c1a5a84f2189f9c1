"""Detectors and segmenters of this library beside torchvision's, training and inference, in one run.

Mask R-CNN on Swin-T against torchvision's Mask R-CNN v2 on ResNet-50, both on 800 x 1333 with the same random objects;
UPerNet on Swin-T at crops of 512. Everything eager, under bfloat16 autocast, AdamW. A step is a whole one: loss,
backward and update, or detections with masks at the images' size.

    python benchmarks/dense.py
    python benchmarks/dense.py --size 320 400 --crop 64 --batch-size 1 1 --steps 2 --dtype float32   # a try on a CPU
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from result_files import RESULTS, save
from vizoo.benchmark import DTYPES, PeakMemory, Step, choose_device, choose_dtype, time_steps
from vizoo.environment import environment

SWIN = "swin_tiny_patch4_window7_224"
OBJECTS = 8


def objects(height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A target of rectangles with their masks."""
    corner = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
    extent = (0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=generator)) * torch.tensor([width, height])
    boxes = torch.cat([corner, corner + extent], dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(80, (OBJECTS,), generator=generator), "masks": masks}


def placed(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}


def own_detector(images: list[Tensor], targets: list[dict[str, Any]]) -> tuple[nn.Module, Callable[..., Any]]:
    from vizoo.train.detection import MaskRCNN

    model = MaskRCNN(backbone={"name": SWIN, "pretrained": False})
    height, width = images[0].shape[1:]
    facts = [{**target, "original_size": (height, width), "image_id": i} for i, target in enumerate(targets)]
    return model, lambda mode: model(images, facts, mode=mode)


def torchvision_detector(images: list[Tensor], targets: list[dict[str, Any]]) -> tuple[nn.Module, Callable[..., Any]]:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
    floats = [image.float() / 255 for image in images]
    shifted = [{**target, "labels": target["labels"] + 1} for target in targets]  # background is its class 0
    return model, lambda mode: model(floats, shifted) if mode == "loss" else model(floats)


def own_segmenter(images: list[Tensor], targets: list[dict[str, Any]]) -> tuple[nn.Module, Callable[..., Any]]:
    from vizoo.train.segmentation.heads import FCNHead, UPerHead
    from vizoo.train.segmentation.segmenter import Segmenter

    model = Segmenter(
        backbone={"name": SWIN, "pretrained": False},
        num_classes=150,
        decode_head={"type": UPerHead},
        auxiliary_head={"type": FCNHead, "in_index": 2},
    )
    height, width = images[0].shape[1:]
    facts = [{**target, "original_size": (height, width), "path": str(i)} for i, target in enumerate(targets)]
    return model, lambda mode: model(images, facts, mode=mode)


def steps(
    build: Callable[..., Any], images: list[Tensor], targets: list[dict[str, Any]], device: torch.device, dtype: str
) -> dict[str, Step]:
    """A training step and an inference step of one model."""
    torch.manual_seed(0)
    model, call = build(images, targets)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")

    def train() -> None:
        model.train()
        with autocast():
            losses = call("loss")
        sum(value for name, value in losses.items() if "acc" not in name).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast():
            call("predict")

    return {"training": train, "inference": infer}


def measure(
    title: str,
    builders: dict[str, Callable[..., Any]],
    images: list[Tensor],
    targets: list[dict[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of one case. Models take turns step by step."""
    device = options.device
    rows, made, peaks = [], {}, {}
    for name, build in builders.items():
        for mode, step in steps(build, images, targets, device, options.dtype).items():
            memory = PeakMemory(device)
            step()
            step()
            peaks[name, mode] = memory.of(step)
            made[f"{name} {mode}"] = step
    for mode in ("training", "inference"):
        chosen = {key: step for key, step in made.items() if key.endswith(mode)}
        for key, timing in time_steps(chosen, device, steps=options.steps, warmup=2).items():
            name = key.removesuffix(f" {mode}")
            rows.append(
                {
                    "case": title,
                    "model": name,
                    "mode": mode,
                    "batch_size": len(images),
                    "img_size": list(images[0].shape[1:]),
                    "dtype": options.dtype,
                    "milliseconds": timing.median * 1e3,
                    "images_per_second": len(images) / timing.median,
                    "spread": timing.spread,
                    "peak_memory": peaks[name, mode],
                }
            )
            print(f"{title}, {mode}, {name}: {rows[-1]['images_per_second']:.1f} images/s", flush=True)
    made.clear()
    gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], help="height and width for detection")
    parser.add_argument("--crop", type=int, default=512, help="side for segmentation")
    parser.add_argument("--batch-size", type=int, nargs=2, default=[4, 16], help="images for detection, segmentation")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    options.device = choose_device(options.device)
    options.dtype = choose_dtype(options.dtype, options.device)
    facts, draw = environment(options.device), torch.Generator().manual_seed(0)
    detection, segmentation = options.batch_size
    height, width = options.size

    def pictures(count: int, *sides: int) -> list[Tensor]:
        return [torch.randint(256, (3, *sides), dtype=torch.uint8, generator=draw).to(options.device)] * count

    boxes = [placed(objects(height, width, draw), options.device) for _ in range(detection)]
    maps = torch.randint(150, (options.crop, options.crop), dtype=torch.uint8, generator=draw).to(options.device)
    rows = measure(
        "detection",
        {
            "vizoo Mask R-CNN Swin-T": own_detector,
            "torchvision Mask R-CNN v2 R50": torchvision_detector,
        },
        pictures(detection, height, width),
        boxes,
        options,
    )
    rows += measure(
        "segmentation",
        {"vizoo UPerNet Swin-T": own_segmenter},
        pictures(segmentation, options.crop, options.crop),
        [{"map": maps}] * segmentation,
        options,
    )
    print(f"wrote {save('dense', facts, {'rows': rows}, options.output)}")


if __name__ == "__main__":
    main()
