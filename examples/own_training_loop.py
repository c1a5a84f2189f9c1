"""A backbone in a training loop of one's own: plain torch, with timm's layer-wise learning rates.

Small steps for the layers near the image and none of the weight decay where it harms: both follow from what every
model says of itself, `group_matcher()` and `no_weight_decay()`.

python examples/own_training_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import param_groups_layer_decay

import vizoo

EPOCHS, BATCH = 3, 32

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8)
images = F.interpolate(images, size=32, mode="bilinear").sub(0.5).div(0.5)
labels = torch.from_numpy(digits.target)
order = torch.randperm(len(images))
held_out, train = order[:360], order[360:]

model = vizoo.create_model(
    "swin_tiny_patch4_window7_224",
    in_chans=1,
    num_classes=10,
    img_size=32,
    patch_size=4,
    embed_dim=64,
    depths=(1, 1),
    num_heads=(2, 4),
    window_size=4,
)
groups = param_groups_layer_decay(
    model, weight_decay=0.05, layer_decay=0.9, no_weight_decay_list=list(model.no_weight_decay())
)
optimizer = torch.optim.AdamW(groups, lr=2e-3)
for group in optimizer.param_groups:
    group["lr"] *= group["lr_scale"]

for epoch in range(EPOCHS):
    model.train()
    for batch in train[torch.randperm(len(train))].split(BATCH):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, held-out accuracy {accuracy:.1%}")
