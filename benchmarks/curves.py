"""Loss curves of every detector and segmenter over 300 updates on the generated sets, Swin-T from scratch.

    python benchmarks/curves.py --output benchmarks/results
    torchrun --nproc-per-node 2 benchmarks/curves.py --only cascade_mask_rcnn    # one run on two GPUs

Each run is `vizoo train` with a config of a few lines over `demo/shapes_detect` or `demo/shapes_segment`. The result
file holds losses, figures on the held-out scenes, times and precision; a picture of the curves lies beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from result_files import RESULTS, save
from vizoo.environment import environment
from vizoo.train.log import read_log
from vizoo.train.run import train


@dataclass(frozen=True)
class Run:
    """A model to train: what it imports and changes in the demo's config, and the precision of autocast."""

    base: str
    lines: str
    dtype: str


def _detector(name: str, change: str, dtype: str) -> Run:
    return Run("shapes_detect", f"from vizoo.train.detection import {name} as Model\n{change}", dtype)


def _segmenter(heads: str, change: str, dtype: str) -> Run:
    return Run("shapes_segment", f"from vizoo.train.segmentation.heads import {heads}\n{change}", dtype)


NO_MASKS = (
    "model.pop('mask', None)\nscenes.update(masks=False)\nval_evaluator[0].update(masks=False)\n"
    "train_dataloader['dataset'].update(masks=False)\nval_dataloader['dataset'].update(masks=False)\n"
)
RUNS = {
    "faster_rcnn": _detector("FasterRCNN", "model.update(type=Model)\n" + NO_MASKS, "bfloat16"),
    "mask_rcnn": _detector("MaskRCNN", "model.update(type=Model)\n", "float16"),
    "cascade_mask_rcnn": _detector(
        "CascadeMaskRCNN",
        "model.update(type=Model)\nmodel.pop('box')\nmodel.pop('mask')\nsync_bn = 'torch'\n",
        "bfloat16",
    ),
    "retinanet": _detector(
        "RetinaNet",
        "model.update(type=Model)\nmodel['backbone'].update(out_indices=(1, 2, 3))\n"
        "for part in ('rpn', 'box'):\n    model.pop(part)\n" + NO_MASKS,
        "bfloat16",
    ),
    "upernet": _segmenter(
        "FCNHead, UPerHead",
        "model.update(decode_head=dict(type=UPerHead, channels=512),\n"
        "             auxiliary_head=dict(type=FCNHead, channels=256), auxiliary_weight=0.4)\nsync_bn = 'torch'\n",
        "float16",
    ),
    "semantic_fpn": _segmenter(
        "FPN, SemanticFPNHead",
        "model.update(neck=dict(type=FPN, channels=256), decode_head=dict(type=SemanticFPNHead, channels=128),\n"
        "             auxiliary_head=None)\n",
        "bfloat16",
    ),
    "mlp": _segmenter(
        "MLPHead", "model.update(decode_head=dict(type=MLPHead, channels=256), auxiliary_head=None)\n", "bfloat16"
    ),
}
CONFIG = """from mmengine.config import read_base
{imports}
with read_base():
    from vizoo.configs.demo.{base} import *

model.update(channels=256) if "channels" in model else None
model["backbone"] = dict(name="swin_tiny_patch4_window7_224", pretrained=False, drop_path_rate=0.1)
{change}"""


def written(run: Run, folder: Path, name: str) -> Path:
    """The config of a run, as a user would write it."""
    imports, _, change = run.lines.partition("\n")
    path = folder / f"{name}.py"
    path.write_text(CONFIG.format(imports=imports, base=run.base, change=change))
    return path


def settings(run: Run, options: argparse.Namespace) -> list[str]:
    """What every run has: as many updates as asked for in four epochs, and scenes of one size."""
    batch = 8 if run.base == "shapes_detect" else 16
    scenes = f"({batch * options.updates // 4}, 100)"
    own = [f"{split}_dataloader.dataset.{key}={value}" for split in ("train", "val")
           for key, value in (("scenes", scenes), ("size", options.size))]  # fmt: skip
    root = Path(options.data) / run.base
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [*own, f"data_root={root}", f"device={device}", f"optim_wrapper.dtype={run.dtype}", "lr=5e-4",
            f"batch_size={batch}", "workers=3", "epochs=4", "default_hooks.logger.interval=5"]  # fmt: skip


def trained_run(name: str, options: argparse.Namespace, folder: Path) -> Path:
    """Trains one model; its folder."""
    run = RUNS[name]
    return train(written(run, folder, name), settings(run, options), work_dir=folder / name, quiet=True)


def row(name: str, options: argparse.Namespace, trained: Path) -> dict[str, Any]:
    """Losses and figures of a run."""
    records = read_log(trained)
    losses = [(r["iter"], round(r["loss"], 4)) for r in records if r["kind"] == "train"]
    figures = next(r for r in reversed(records) if r["kind"] == "val")
    return {
        "model": name,
        "dtype": RUNS[name].dtype,
        "size": options.size,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seconds": round(records[-1]["time"] - records[0]["time"], 1),
        "losses": losses,
        "last": figures,
    }


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves, each over its first loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for row in rows:
        updates, losses = zip(*row["losses"], strict=True)
        axes.plot(updates, [loss / losses[0] for loss in losses], label=f"{row['model']} ({row['dtype']})", linewidth=1)
    axes.set(xlabel="updates", ylabel="training loss / first one logged", ylim=(0, 1.1))
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--size", type=int, default=256, help="side of the scenes in pixels")
    parser.add_argument("--data", default="data/curves", help="where generated scenes are, or are written to")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:  # under torchrun the first process's is the run's
            trained = trained_run(name, options, Path(folder))
            if int(os.environ.get("RANK", "0")) == 0:
                rows.append(row(name, options, trained))
                print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    if rows:
        path = save(f"curves-{'-'.join(options.only)}", facts, {"rows": rows}, options.output)
        picture(rows, path.with_suffix(".svg"))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
