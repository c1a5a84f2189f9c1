"""Name what is in an image, step by step; `vizoo predict` does the same in one command.

python examples/classify.py photo.jpg
python examples/classify.py photo.jpg --model swin_base_patch4_window7_224.in22k --download
"""

from __future__ import annotations

import argparse

import torch

import vizoo
from vizoo.images import load_image
from vizoo.labels import class_names
from vizoo.preprocess import eval_transform
from vizoo.registry import resolve
from vizoo.weights.store import is_cached

parser = argparse.ArgumentParser(description="Name what is in an image.")
parser.add_argument("image")
parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
parser.add_argument("--download", action="store_true", help="fetch the official weights where the cache lacks them")
options = parser.parse_args()

record = resolve(options.model).weights
pretrained = record is not None and (options.download or is_cached(record))
if pretrained:
    print(f"{options.model}, official weights")
else:
    print(f"{options.model}, random weights: the names below mean nothing; --download fetches the official weights")

torch.manual_seed(0)
model = vizoo.create_model(options.model, pretrained=pretrained).eval()
transform = eval_transform(model.default_cfg)  # the size, crop and normalisation these weights were measured with
with torch.inference_mode():
    probabilities = model(transform(load_image(options.image))[None]).softmax(dim=1)[0]

names = class_names(model.default_cfg["labels"])
for probability, index in zip(*probabilities.topk(5), strict=True):
    print(f"{probability:7.2%}  {names[index]}")
