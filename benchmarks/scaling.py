"""How training scales over GPUs: Mask R-CNN on Swin-T, the same number of images on each.

    torchrun --nproc-per-node 1 benchmarks/scaling.py
    torchrun --nproc-per-node 2 benchmarks/scaling.py    # images/s of both, over twice those of one, is the scaling

A step is forward, loss, backward with the exchange of gradients, and the update, under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dense import SWIN, objects, placed
from result_files import RESULTS, save
from vizoo.benchmark import time_steps
from vizoo.environment import environment
from vizoo.train.detection import MaskRCNN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], help="height and width")
    parser.add_argument("--batch-size", type=int, default=4, help="images of each process")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(rank)
    draw = torch.Generator().manual_seed(rank)
    height, width = options.size
    images = [
        torch.randint(256, (3, height, width), dtype=torch.uint8, generator=draw).to(device)
        for _ in range(options.batch_size)
    ]
    targets = [
        {**placed(objects(height, width, draw), device), "original_size": (height, width), "image_id": i}
        for i in range(options.batch_size)
    ]
    model = DistributedDataParallel(MaskRCNN(backbone={"name": SWIN, "pretrained": False}).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(images, targets, mode="loss")
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = time_steps({"": step}, device, steps=options.steps, warmup=3)[""]
    if rank == 0:
        rate = processes * options.batch_size / timing.median
        print(f"{processes} processes: {rate:.1f} images/s, spread {timing.spread:.1%}")
        facts = environment(device)
        row = {
            "model": f"Mask R-CNN {SWIN}",
            "processes": processes,
            "batch_size": options.batch_size,
            "img_size": options.size,
            "images_per_second": rate,
            "spread": timing.spread,
        }
        save(f"scaling-{processes}", facts, {"rows": [row]}, options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
