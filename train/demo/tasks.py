"""The demo: train a small model of each task, and tell how it went as one HTML page.

It takes the roads a user takes: `train` and `evaluate` on the configs `demo/digits`, `demo/shapes_detect` and
`demo/shapes_segment`, and for unseen digits the classifier behind `vizoo predict`, on image files.
"""

from __future__ import annotations

import itertools
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vizoo.backbones.base import nearest
from vizoo.benchmark import threads
from vizoo.train.checkpoint import latest_checkpoint, write_atomically
from vizoo.train.progress import ProgressLine, duration
from vizoo.train.run import train
from vizoo.train.trainer import CONFIG as SAVED_CONFIG

from . import digits, shapes
from .findings import Course
from .page import demo_page
from .phases import Clock
from .report import render
from .words import machine_in_words

REPORT = "report.html"
DATA = "data"


class GoalMissed(RuntimeError):
    """A trained model is less accurate than the demo promises; the report was written and says so."""


@dataclass(frozen=True)
class Task:
    """A part of the demo.

    Attributes:
        config: What to train.
        goal: What its headline figure is to reach, in percent.
        figure: What that figure is.
        find_out: From the run's folder, its last checkpoint, the goal, a clock and `quiet` to what the page tells.
    """

    config: str
    goal: float
    figure: str
    find_out: Callable[[Path, Path, float, Clock, bool], Course]
    generated: bool = True

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.config.rpartition("/")[2]


TASKS = {
    "digits": Task(digits.CONFIG, 97.0, "accuracy", digits.digits_findings, generated=False),
    "detect": Task(shapes.DETECT, 50.0, "box AP50", shapes.detection_findings),
    "segment": Task(shapes.SEGMENT, 60.0, "mIoU", shapes.segmentation_findings),
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        report: The page.
        run: Folder of the call; the run of each task is a folder in it.
        figures: Headline figure of each task, in percent, on held-out images.
        seconds: Seconds it took, all in all.
    """

    report: Path
    run: Path
    figures: Mapping[str, float]
    seconds: float


def run(
    output: str | Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int | None = None,
    settings: Sequence[str] = (),
    goals: Mapping[str, float] | None = None,
    show: bool = False,
    quiet: bool = False,
) -> DemoResult:
    """Train, evaluate, predict, measure, and write the report.

    Args:
        output: Folder. Every call makes a folder of its own below `runs/` in it, with a run for each task and the
            report; `report.html` in the folder is a copy of the newest. Generated images are written once, below
            `data/`. Nothing else in the folder is touched.
        tasks: Which of `TASKS`, in this order.
        seed: Seed of everything random; None keeps the configs'.
        settings: `key=value` changes of the configs of all tasks; `<task>.key=value` of one.
        goals: Headline figure in percent that a task is to reach, in place of its own goal.
        show: Open the report in a browser.
        quiet: Show nothing.

    Returns:
        Where the report is, and the headline figures.

    Raises:
        GoalMissed: A model is less accurate than its goal; the report is there all the same.
        ValueError: No or unknown tasks, or bad settings.
        KeyError: A setting that a task's config does not have.
    """
    _check_tasks(tasks, goals or {})
    clock = Clock(ProgressLine(quiet=quiet))
    folder = _new_folder(Path(output) / "runs")
    found: dict[str, Course] = {}
    # So small a model gains little by more threads, and loses a lot by waiting for them on a busy machine.
    with threads(1):
        for name in tasks:
            task = TASKS[name]
            place = [f"data_root={Path(output) / DATA / task.folder}"] if task.generated else []
            with clock.phase(f"{name}, training"):
                train(
                    task.config,
                    place + _settings_of(name, settings),
                    work_dir=folder / task.folder,
                    seed=seed,
                    quiet=quiet,
                )
            goal = (goals or {}).get(name, task.goal)
            found[name] = task.find_out(folder / task.folder, _last(folder / task.folder), goal, clock, quiet)
            clock.line.say(f"{name}: {task.figure} {found[name].headline:.2f} %, goal {goal:g} %")
    report = _write_report(Path(output), folder, found, clock)
    if show:
        webbrowser.open(report.resolve().as_uri())
    _require_goals(found, report)
    return DemoResult(report, folder, {name: one.headline for name, one in found.items()}, clock.total)


def _check_tasks(tasks: Sequence[str], goals: Mapping[str, float]) -> None:
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(
            f"tasks must name one or more of {', '.join(TASKS)}, each once; got {', '.join(tasks) or 'none'}"
        )
    for name in (*tasks, *goals):
        if name not in TASKS:
            raise ValueError(f"the demo has no task {name!r}; {nearest(name, TASKS)}")


def _settings_of(name: str, settings: Sequence[str]) -> list[str]:
    """The settings of one task: those for all, and its own without its name."""
    own = []
    for setting in settings:
        first, found, rest = setting.partition(".")
        if not found or first not in TASKS:
            own.append(setting)
        elif first == name:
            own.append(rest)
    return own


def _last(folder: Path) -> Path:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None, "training ends with a checkpoint"
    return checkpoint


def _write_report(output: Path, folder: Path, found: Mapping[str, Course], clock: Clock) -> Path:
    report = output / REPORT
    page = demo_page(list(found.values()), clock.phases, machine_in_words(), _commands(output, folder, list(found)))
    content = render(page).encode()
    for path in (folder / REPORT, report):
        write_atomically(path, content)
    clock.line.say(f"{duration(clock.total)} in all, report: {report}")
    return report


def _require_goals(found: Mapping[str, Course], report: Path) -> None:
    missed = [
        f"{TASKS[name].figure} {one.headline:.2f} % instead of {one.goal:g} %"
        for name, one in found.items()
        if not one.met
    ]
    if missed:
        raise GoalMissed(f"the demo reached {', '.join(missed)}; {report} shows what happened")


def _new_folder(parent: Path) -> Path:
    """The next free number below a folder, taken."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    for number in itertools.count(max(taken, default=0) + 1):
        folder = parent / f"{number:03}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable: count() is endless")


def _commands(output: Path, folder: Path, tasks: Sequence[str]) -> list[tuple[str, str]]:
    """What one may want to do next, and the command."""
    model = "swin_tiny_patch4_window7_224"
    own = {"train_dataloader.dataset.root": "FOLDER", "val_dataloader.dataset.root": "FOLDER"}
    own |= {"model.backbone.num_classes": "N", "model.mixup.num_classes": "N"}
    runs = {name: folder / TASKS[name].folder for name in tasks}
    ask = [_ask(name, path, output / DATA / TASKS[name].folder) for name, path in runs.items()]
    again = "\n".join(f"vizoo test {path / SAVED_CONFIG} {_last(path)}" for path in runs.values())
    longer = "\n".join(f"vizoo train {TASKS[name].config} --set train_cfg.max_epochs={_longer(name)}" for name in runs)
    return [
        ("Ask the models about held-out images, or files of yours", "\n".join(ask)),
        ("Evaluate again", again),
        ("Train for longer", longer),
        ("See the models of the zoo, and one of them closely", f"vizoo list\nvizoo describe {model}"),
        ("Let a pretrained one name what is on a picture", f"vizoo predict photo.jpg --model {model}"),
        (
            "Train on N classes of your own: FOLDER/train/CLASS/, FOLDER/val/CLASS/",
            f"vizoo train imagenet/{model} {_set(own)}",
        ),
    ]


def _ask(name: str, run_folder: Path, data: Path) -> str:
    """The command that predicts the held-out images of a task."""
    if name == "digits":
        return f"vizoo predict {run_folder / digits.HELD_OUT} --checkpoint {_last(run_folder)}"
    images = data / {"detect": "val", "segment": "images/validation"}[name]
    return (
        f"vizoo predict {images} --task {name} --checkpoint {_last(run_folder)} --output {run_folder / 'predictions'}"
    )


def _longer(name: str) -> int:
    return {"digits": 60, "detect": 12, "segment": 40}[name]


def _set(values: Mapping[str, str]) -> str:
    return " ".join(f"--set {key}={value}" for key, value in values.items())
