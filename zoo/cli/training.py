"""`vizoo train`, `test`, `configs` and `demo`: thin covers of `vizoo.train`, imported only when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import note, print_json, print_table, say

ConfigName = Annotated[
    str, typer.Argument(help="Name of a config (see `vizoo configs`), or path of one.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the config; may be repeated."),
]
_REPORT = Path("demo-report")
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1; the config's by default.")]


def train_command(
    config: ConfigName,
    settings: Settings = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; the next free runs/CONFIG/NUMBER by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last whole checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew in a folder that holds a run, which is moved aside.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; the config's by default.")] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a model by a config.

    Prints the folder of the run at the end: resolved config, checkpoints (the best one as best.pth), log as JSON lines,
    TensorBoard files. A resumed run continues exactly where it was. On several GPUs or machines, start this command
    by torchrun.

    Examples:
        vizoo train imagenet/swin_tiny_patch4_window7_224 --set data_root=imagenet
        vizoo train my_config.py -s optim_wrapper.optimizer.lr=5e-4 --work-dir runs/mine
        vizoo train my_config.py --work-dir runs/mine --resume
        torchrun --nproc-per-node 8 -m vizoo train imagenet/swin_tiny_patch4_window7_224
    """
    from vizoo.train.run import train

    folder = train(
        config,
        settings or (),
        work_dir=work_dir,
        resume=resume,
        force=force,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    say(str(folder))


def evaluate_command(
    config: ConfigName,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint file, its address, or a name of `vizoo list --task`. Detectors and segmenters need one; "
            "classifiers take the official weights by default.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    work_dir: Annotated[Path | None, typer.Option(help="Folder for the log and the confusion matrix.")] = None,
    device: Device = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms and branches of the backbone once its weights are loaded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Evaluate a checkpoint on a config's validation set.

    Examples:
        vizoo test runs/mine/config.py runs/mine/best.pth
        vizoo test imagenet/swin_tiny_patch4_window7_224 --set data_root=imagenet --json
        vizoo test my_coco.py mask_rcnn.swin_tiny_patch4_window7_224.coco_3x
    """
    from vizoo.train.dense_weights import is_dense, resolve_dense
    from vizoo.train.run import evaluate

    if checkpoint is not None and not Path(checkpoint).exists() and is_dense(checkpoint):
        checkpoint = str(resolve_dense(checkpoint))
    figures = evaluate(
        config, checkpoint, settings or (), work_dir=work_dir, device=device, fuse=fuse, quiet=quiet or as_json
    )
    if as_json:
        print_json(figures)
        return
    print_table({"figure": "left", "value": "right"}, [(name, f"{value:.4g}") for name, value in figures.items()])


def configs_command(
    pattern: Annotated[str, typer.Argument(help="Part of a name.")] = "",
) -> None:
    """List the configs that come with vizoo, as `vizoo train` takes them."""
    from vizoo.backbones.base import nearest
    from vizoo.train.settings import config_path, list_configs

    known = list_configs()
    names = [name for name in known if pattern in name]
    if not names:
        raise ValueError(f"no config matches {pattern!r}; {nearest(pattern, known)}")
    print_table({"config": "left", "what it is": "left"}, [(name, _summary(config_path(name))) for name in names])
    note(f"{len(names)} configs")


def _summary(path: Path) -> str:
    """First line of a config's docstring."""
    import ast

    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the runs.")] = _REPORT,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="`digits`, `detect` or `segment`; may be repeated.")
    ] = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; the config's by default.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train three small models, and write a report for the browser.

    One reads handwritten digits, one finds shapes, one labels pixels. Needs neither a network nor a GPU; about six
    minutes of one CPU core. The report, one file, is report.html in the folder. A setting holds for every task, with a
    task in front (detect.train_cfg.max_epochs=8) for that one.

    Example:
        vizoo demo --output demo-report
        vizoo demo --only digits
    """
    from vizoo.train.demo import TASKS, run

    run(output, tasks=tuple(only or TASKS), seed=seed, settings=settings or (), show=show, quiet=quiet)
