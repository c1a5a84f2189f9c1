"""Whether scans stay finite in half precision: 1,000 updates on random images by each model's own ImageNet recipe.

    python benchmarks/stability.py --output benchmarks/results
    python benchmarks/stability.py --models vim_tiny --dtypes float16

Optimiser, clipping and drop path are the config's; the rate is the full one of the recipe's 1,024 images, which is much
for the batches here, after a tenth of the updates. The result file holds the loss of each update and the length of all
parameters together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import vizoo
from result_files import RESULTS, save
from vizoo.environment import environment
from vizoo.train.optim import GroupedOptimizer
from vizoo.train.settings import load_config

IMAGES = 1024
"""Of a recipe's update, by which its rate is scaled; and how many random ones there are."""


def run(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model; its losses, and the length of its parameters."""
    torch.manual_seed(0)
    settings = load_config(f"imagenet/{name}")
    backbone = settings.model.backbone
    model = vizoo.create_model(name, drop_path_rate=backbone.get("drop_path_rate")).to(options.device).train()
    wrapper = settings.optim_wrapper
    wrapper.dtype = dtype
    wrapper.optimizer.lr *= IMAGES / settings.auto_scale_lr.base_batch_size
    options_of_groups = wrapper.pop("paramwise_cfg", None)
    wrapper.pop("constructor", None)
    updates = GroupedOptimizer(wrapper, options_of_groups)(model)
    rates = [group["lr"] for group in updates.param_groups]
    images = torch.randn(IMAGES, 3, options.size, options.size, device=options.device)
    labels = torch.randint(1000, (IMAGES,), device=options.device)
    losses, norms = [], []
    for step in range(options.updates):
        for group, rate in zip(updates.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / (options.updates / 10))
        chosen = torch.arange(options.batch_size, device=options.device) + step * options.batch_size
        chosen %= IMAGES
        with updates.optim_context(model):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        updates.update_params(loss)
        losses.append(loss.detach().float())
        norms.append(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
    values, lengths = torch.stack(losses).tolist(), torch.stack(norms).tolist()
    finite = all(p.isfinite().all() for p in model.parameters()) and bool(torch.stack(losses).isfinite().all())
    scale = float(updates.loss_scaler.get_scale()) if hasattr(updates, "loss_scaler") else None
    return {
        "model": name,
        "dtype": dtype,
        "batch_size": options.batch_size,
        "size": options.size,
        "updates": options.updates,
        "finite": finite,
        "loss_scale": scale,
        "losses": [round(value, 4) for value in values],
        "norms_of_parameters": [round(value, 3) for value in lengths],
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for row in rows:
        axes.plot(row["losses"], label=f"{row['model']} ({row['dtype']})", linewidth=0.7)
    axes.set(xlabel="updates", ylabel="training loss on random images")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vssm1_tiny_0230s", "vim_tiny", "vssd_tiny"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for dtype in options.dtypes:
            rows.append(run(name, dtype, options))
            shown = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
            print(shown, rows[-1]["losses"][:: max(1, options.updates // 10)], flush=True)
    kind = "stability" if options.models == parser.get_default("models") else f"stability-{'-'.join(options.models)}"
    path = save(kind, environment(torch.device(options.device)), {"rows": rows}, options.output)
    picture(rows, path.with_suffix(".svg"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
