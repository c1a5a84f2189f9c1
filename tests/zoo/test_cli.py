"""The command line: what each command prints, and the one line that each mistake gets."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vizoo
from vizoo.cli import main
from vizoo.labels import class_names
from vizoo.registry import resolve
from vizoo.train.dense_weights import list_dense
from vizoo.weights.cache import path_of

COMMANDS = ("list", "describe", "predict", "train", "test", "benchmark", "weights", "demo", "configs")
WEIGHTS_COMMANDS = ("list", "download", "verify", "import", "path")
SWIN = "swin_tiny_patch4_window7_224"


@dataclass(frozen=True)
class Run:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with `error:`, which must be the last on standard error."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


Vizoo = Callable[..., Run]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Vizoo:
    def call(*words: object) -> Run:
        code = main([str(word) for word in words])
        return Run(code, *capsys.readouterr())

    return call


def fails(result: Run, pattern: str, code: int = 1) -> None:
    assert result.code == code, result
    assert re.search(pattern, result.error), result.error


# The application.


def test_help_names_every_command(run: Vizoo) -> None:
    result = run("--help")
    assert result.code == 0
    for name in COMMANDS:
        assert re.search(rf"^│ {name} ", result.out, re.MULTILINE), name


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + [["weights", name] for name in WEIGHTS_COMMANDS])
def test_every_command_has_help_with_an_example(run: Vizoo, words: list[str]) -> None:
    result = run(*words, "--help")
    assert result.code == 0
    assert "Usage: vizoo " + " ".join(words) in result.out
    if words not in (["weights"], ["configs"]):
        assert re.search(rf"Examples?: *\n.*vizoo {' '.join(words)}", result.out, re.DOTALL)


def test_version(run: Vizoo) -> None:
    assert run("--version") == Run(0, f"vizoo {vizoo.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["lst"], r"No such command 'lst'\. Did you mean 'list'\? \(see `vizoo --help`\)"),
        (["list", "--famly", "swin"], r"No such option: --famly.*--family"),
        (["describe"], "Missing argument"),
        (["predict"], "Missing argument"),
        (["predict", "x.png", "--top", "0"], r"--top.*(range x>=1|greater than or equal to 1)"),
        (["predict", "x.png", "--top", "many"], "--top.*valid int"),
        (["benchmark", SWIN, "--mode", "trainng"], "'trainng' is not one of 'inference', 'training', 'both'"),
        (["benchmark", SWIN, "--img-size", "31"], r"--img-size.*(range x>=32|greater than or equal to 32)"),
        (["weights", "downlod"], "No such command 'downlod'"),
        (["train"], "Missing argument"),
    ],
)
def test_wrong_usage(run: Vizoo, words: list[str], pattern: str) -> None:
    fails(run(*words), pattern, code=2)


@pytest.mark.parametrize("words", [[], ["weights"]])
def test_no_command_prints_the_help(run: Vizoo, words: list[str]) -> None:
    result = run(*words)
    assert result.code == 2
    assert "Usage: vizoo" in result.out + result.err
    assert "error:" not in result.err


def test_debug_shows_the_traceback_wherever_it_stands(run: Vizoo) -> None:
    for words in (["--debug", "describe", "swin"], ["describe", "--debug", "swin"], ["describe", "swin", "--debug"]):
        with pytest.raises(ValueError, match="unknown model 'swin'"):
            run(*words)
    fails(run("describe", "--", "--debug"), "unknown model '--debug'")


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vizoo", *words], capture_output=True, text=True, **options)


def test_a_process_of_its_own_fails_in_one_line_or_with_a_traceback() -> None:
    plain, debug = process("describe", "swin_tin"), process("describe", "swin_tin", "--debug")
    assert plain.returncode == debug.returncode == 1
    assert plain.stdout == ""
    assert re.fullmatch(r"error: unknown model 'swin_tin'; .+\n", plain.stderr)
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.splitlines()[-1].startswith("ValueError: unknown model 'swin_tin'")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys, vizoo.cli; sys.stdin.readline(); sys.exit(vizoo.cli.main(['list']))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.stdin.write("go\n")
        child.stdin.close()
        assert child.stderr.read() == ""
        assert child.wait(timeout=60) == 141


def test_interrupt(run: Vizoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vizoo, "list_models", interrupt)
    assert run("list").code == 130


def test_an_unforeseen_error_says_that_it_is_a_bug(run: Vizoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("that\ncannot be")

    monkeypatch.setattr(vizoo, "list_models", fail)
    fails(run("list"), r"^AssertionError: that cannot be \(this looks like a bug of vizoo; --debug shows where\)$")


# list and describe.


def test_list_shows_every_model_whole(run: Vizoo) -> None:
    result = run("list")
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "…" not in result.out
    for name in vizoo.list_models():
        assert re.search(rf"^ {name} ", result.out, re.MULTILINE), name
    (row,) = [line for line in result.out.splitlines() if line.startswith(f" {SWIN} ")]
    assert re.search(r" 28 +4\.5 +224 +81\.2 +in1k, in22k_ft_in1k, in22k +MIT", row)
    assert result.err == f"{len(vizoo.list_models())} models\n"


def test_list_filters(run: Vizoo) -> None:
    result = run("list", "*384*", "--family", "swin", "--json")
    names = [row["name"] for row in json.loads(result.out)]
    assert names == vizoo.list_models("*384*", family="swin")
    assert names
    rows = json.loads(run("list", SWIN, "--weights", "--json").out)
    assert {row["name"] for row in rows} == {f"{SWIN}.{tag}" for tag in resolve(SWIN).variant.weights}
    assert {row["name"]: row["metrics"].get("top1") for row in rows}[f"{SWIN}.in22k_ft_in1k"] == 80.9


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["swin_tyny_patch4_window7_224"], r"no model matches 'swin_tyny.*'; did you mean 'swin_tiny_patch4_window7"),
        (["nothing", "--family", "swin"], "no model matches 'nothing' --family 'swin'; valid: swin_base"),
        (["nothing", "--weights"], "no weights match 'nothing'"),
        (["--family", "swim"], "unknown family 'swim'; did you mean 'swin'"),
        (["--mixer", "window"], "unknown mixer 'window'; .*'window attention'"),
    ],
)
def test_list_of_nothing_is_an_error(run: Vizoo, words: list[str], pattern: str) -> None:
    fails(run("list", *words), pattern)


def test_describe(run: Vizoo) -> None:
    result = run("describe", SWIN)
    assert result.code == 0
    card = vizoo.describe(SWIN)
    for text in (f"{card.params / 1e6:.2f} M", f"{card.macs / 1e9:.2f} GMACs", "(2, 2, 6, 2)", "layers.3", "MIT"):
        assert text in result.out
    assert all(record.url in result.out for record in card.weights.values())
    one = run("describe", f"{SWIN}.in22k").out
    assert "21841 (imagenet-22k)" in one
    assert card.weights["in1k"].url not in one


def test_describe_as_json(run: Vizoo) -> None:
    card = json.loads(run("describe", SWIN, "--json").out)
    assert card["params"] == 28_288_354
    assert [stage["stride"] for stage in card["stages"]] == [4, 8, 16, 32]
    assert card["config"]["window_size"] == 7
    assert card["weights"]["in1k"]["metrics"]["top1"] == 81.2


def test_describe_of_unknown_names(run: Vizoo) -> None:
    fails(
        run("describe", "swin_tiny_patch4_window7_244"), r"unknown model .*; did you mean 'swin_tiny_patch4_window7_2"
    )
    fails(run("describe", f"{SWIN}.in22"), r"has no weights tagged 'in22'; did you mean 'in22k'")


# predict.


@pytest.fixture
def installed(tiny_model: str, official_file: Path, run: Vizoo) -> str:
    """The tiny model, with its weights in the cache."""
    assert run("weights", "import", tiny_model, official_file).code == 0
    return tiny_model


def test_predict_with_official_weights(run: Vizoo, installed: str, photos: Path) -> None:
    result = run("predict", photos / "a.png", "--model", installed)
    assert result.code == 0
    found = re.findall(r"^ (?:\S+a\.png)? +(\S.*?) +(\d+\.\d\d)% $", result.out, re.MULTILINE)
    assert len(found) == 5
    assert {name for name, _ in found} <= set(class_names("imagenet-1k"))
    assert re.fullmatch(r"warning: tiny\.pth is unverified: .*\n", result.err)


def test_predict_a_folder_as_json(run: Vizoo, installed: str, photos: Path) -> None:
    found = json.loads(run("predict", photos, "-m", installed, "--json", "--top", 2, "--batch-size", 2).out)
    assert [Path(entry["path"]).name for entry in found] == ["a.png", "b.jpg", "c.png"]
    for entry in found:
        first, second = entry["predictions"]
        assert first["probability"] >= second["probability"] > 0
        assert class_names("imagenet-1k")[first["index"]] == first["class"]


def test_predict_by_a_trained_checkpoint_alone(run: Vizoo, trained_file: Path, photos: Path) -> None:
    result = run("predict", photos / "a.png", "--checkpoint", trained_file, "--json")
    (found,) = json.loads(result.out)
    assert {entry["class"] for entry in found["predictions"]} == {"ant", "bee", "cat"}
    assert result.err == ""


def test_a_bad_image_among_others_costs_only_itself(run: Vizoo, trained_file: Path, photos: Path) -> None:
    (photos / "b.jpg").write_bytes(b"nonsense")
    result = run("predict", photos, "-c", trained_file, "--json")
    assert result.code == 1
    assert [Path(entry["path"]).name for entry in json.loads(result.out)] == ["a.png", "c.png"]
    first, last = result.err.splitlines()
    assert first.startswith("error: ")
    assert "b.jpg is not an image" in first
    assert last == "error: 1 of 3 images could not be read"


def test_predict_mistakes(
    run: Vizoo, installed: str, trained_file: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photos / "a.png"
    fails(run("predict", image), "name a model, or pass a checkpoint")
    fails(run("predict", photos / "aa.png", "-m", installed), r"no image or folder at .*aa\.png; did you mean 'a\.png'")
    fails(run("predict", photos / "notes.txt", "-m", installed), r"notes\.txt is not an image")
    fails(run("predict", image, "-m", installed + "x"), f"unknown model .*; did you mean '{installed}'")
    fails(run("predict", image, "-m", installed, "--device", "cud"), "no device 'cud' here; did you mean 'c")
    fails(run("predict", image, "-c", photos / "none.pth"), r"there is no checkpoint at .*none\.pth")
    fails(run("predict", image, "-c", trained_file, "-m", installed, "--debug=no"), "--debug", code=2)
    fails(run("predict", image, "-m", "swin_tiny_window7_dense", "-c", trained_file), "checkpoint|classifier")
    fails(
        run("predict", image, "-m", SWIN, "-c", _official(trained_file)), "does not fit this Swin; .* of another shape"
    )
    _truncate(trained_file)
    fails(run("predict", image, "-m", SWIN, "-c", trained_file), r"best\.pth is truncated")
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    fails(run("predict", image, "-m", SWIN), r"offline mode is on .*github\.com.*vizoo weights import")


def _official(trained: Path) -> Path:
    """The weights of a trained checkpoint without what it says of itself."""
    path = trained.with_name("bare.pth")
    torch.save({"state_dict": torch.load(trained, weights_only=True)["state_dict"]}, path)
    return path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_weights_without_a_licence_need_consent(run: Vizoo, tiny_model: str, official_file: Path, photos: Path) -> None:
    name = f"{tiny_model}.unlicensed"
    record = resolve(name).weights
    assert record is not None
    fails(run("predict", photos / "a.png", "-m", name), "states no licence .* --accept-license")
    fails(run("weights", "download", name), "states no licence")
    fails(run("weights", "import", name, official_file), "states no licence")
    assert not path_of(record).exists()
    path = path_of(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(official_file.read_bytes())
    assert run("predict", photos / "a.png", "-m", name, "--accept-license").code == 0
    assert run("predict", photos / "a.png", "-m", name).code == 0


# benchmark.


QUICK = ("--batch-size", 2, "--steps", 2, "--warmup", 1, "--device", "cpu")


def test_benchmark_table(run: Vizoo, tiny_model: str) -> None:
    result = run("benchmark", tiny_model, "--mode", "both", *QUICK)
    assert result.code == 0
    assert re.search(rf"{tiny_model} +inference +eager +2 +32x32 +[\d,.]+ +[\d,.]+ +[\d.]+%", result.out)
    assert re.search(rf"{tiny_model} +training +eager +2 +32x32 +[\d,.]+ ", result.out)


def test_benchmark_for_programs(run: Vizoo, tiny_model: str) -> None:
    (row,) = json.loads(run("benchmark", tiny_model, "--format", "json", "--img-size", 64, *QUICK).out)
    assert row["img_size"] == [64, 64]
    assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
    (row,) = csv.DictReader(io.StringIO(run("benchmark", tiny_model, "--format", "csv", *QUICK).out))
    assert (row["model"], row["img_size"], row["dtype"]) == (tiny_model, "32x32", "float32")


def test_benchmark_mistakes(run: Vizoo, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(run("benchmark", tiny_model, "swin_tny", *QUICK), "unknown model 'swin_tny'")
    fails(run("benchmark", tiny_model, "--dtype", "float23", *QUICK), "unknown dtype 'float23'; did you mean 'float")

    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = run("benchmark", tiny_model, "--execution", "both", "--format", "json", *QUICK)
    assert result.code == 1
    assert [row["error"] for row in json.loads(result.out)] == ["", "no compiler here"]
    assert result.err.splitlines() == [
        f"error: {tiny_model}, inference, compiled: no compiler here",
        "error: 1 of 2 measurements failed",
    ]


# weights.


def test_weights_list_and_path(run: Vizoo, installed: str, own_home: Path) -> None:
    found = {entry["name"]: entry for entry in json.loads(run("weights", "list", "--json").out)}
    whole = {record.name for record in list_dense()}
    assert found.keys() == {*vizoo.list_models(pretrained=True), *whole}
    assert [name for name, entry in found.items() if entry["cached"]] == [f"{installed}.plain"]
    result = run("weights", "list", "--cached")
    assert re.search(rf"^ {installed}\.plain +MIT +no +yes +http://127\.0\.0\.1:9/tiny\.pth", result.out, re.MULTILINE)
    assert result.err == f"1 checkpoints; the cache is {own_home}\n"
    path = run("weights", "path", installed).out.strip()
    assert Path(path).is_file()
    assert path == found[f"{installed}.plain"]["path"]
    assert run("weights", "path").out.strip() == str(own_home)


def test_weights_verify(run: Vizoo, installed: str) -> None:
    result = run("weights", "verify")
    assert result.code == 0
    assert re.search(rf"{installed}\.plain +unverified ", result.out)
    path = Path(run("weights", "path", installed).out.strip())
    path.write_bytes(path.read_bytes()[:-10] + b"0123456789")
    result = run("weights", "verify", installed)
    assert re.search(rf"{installed} +damaged ", result.out)
    fails(result, f"1 of 1 files cannot be used: {installed}")


def test_weights_verify_of_an_empty_cache(run: Vizoo, tiny_model: str, own_home: Path) -> None:
    assert run("weights", "verify") == Run(0, "", f"the cache {own_home} holds no weights\n")
    fails(run("weights", "verify", tiny_model), f"1 of 1 files cannot be used: {tiny_model}")


def test_weights_download_keeps_what_is_there(run: Vizoo, installed: str) -> None:
    result = run("weights", "download", installed)
    assert result.code == 0
    assert result.out == run("weights", "path", installed).out


def test_weights_mistakes(
    run: Vizoo, tiny_model: str, official_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(run("weights", "list", "nothing"), "no weights match 'nothing'; `vizoo weights list` shows all")
    fails(run("weights", "path", "swin_tny"), "unknown model 'swin_tny'")
    fails(run("weights", "import", tiny_model, tmp_path / "none.pth"), r"no file to import at .*none\.pth")
    (tmp_path / "page.pth").write_text("<html>sign in first</html>")
    fails(run("weights", "import", tiny_model, tmp_path / "page.pth"), "not a checkpoint .* but a web page")
    fails(run("weights", "download", f"{tiny_model}.manual"), "by hand .* Fetch it from the authors' page")
    monkeypatch.setenv("VIZOO_OFFLINE", "1")
    fails(run("weights", "download", tiny_model), "offline mode is on")
    _truncate(official_file)
    fails(run("weights", "import", tiny_model, official_file), "is truncated")
    assert not list(tmp_path.rglob("weights/**/tiny.pth"))


def test_a_model_without_weights_says_so(run: Vizoo, monkeypatch: pytest.MonkeyPatch, tiny_model: str) -> None:
    found = resolve(tiny_model)
    monkeypatch.setattr(type(found), "weights", None)
    fails(run("weights", "path", tiny_model), f"no weights are published for {tiny_model}")


# train, test and configs.


TINTS = '''
import numpy as np
import torch

class Tints(torch.utils.data.Dataset):
    """Which channel is bright?"""
    metainfo = {"classes": ["red", "green", "blue"]}

    def __init__(self, count=12):
        noise = np.random.default_rng(0).normal(0, 0.3, (count, 3, 32, 32)).astype("float32")
        self.images = torch.from_numpy(noise)
        for index, image in enumerate(self.images):
            image[index % 3] += 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"inputs": self.images[index], "label": index % 3}
'''

CONFIG = '''
"""A run of a second."""
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.hooks import DistSamplerSeedHook
from mmengine.visualization import TensorboardVisBackend, Visualizer
from cli_tints import Tints
from torch.optim import AdamW

from vizoo.train.checkpoint import Checkpoints
from vizoo.train.classification import ImageClassifier
from vizoo.train.hooks import RunInfo, UpdateScheduler
from vizoo.train.log import RunLog
from vizoo.train.loop import EpochLoop
from vizoo.train.metrics import Accuracy
from vizoo.train.optim import AutocastOptimWrapper, GroupedOptimizer
from vizoo.train.schedules import WarmupCosineLR

design = dict(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
model = dict(
    type=ImageClassifier,
    backbone=dict(name="swin_tiny_patch4_window7_224", pretrained=False, num_classes=3, **design),
)
loader = dict(batch_size=4, dataset=dict(type=Tints, count=12), collate_fn=dict(type=default_collate), num_workers=0)
train_dataloader = dict(sampler=dict(type=DefaultSampler, shuffle=True), **loader)
val_dataloader = dict(sampler=dict(type=DefaultSampler, shuffle=False), **loader)
val_evaluator = [dict(type=Accuracy)]
train_cfg = dict(type=EpochLoop, max_epochs=1, val_interval=1)
val_cfg = dict()
optim_wrapper = dict(
    type=AutocastOptimWrapper, dtype="float32", constructor=GroupedOptimizer, optimizer=dict(type=AdamW, lr=1e-3)
)
param_scheduler = [dict(type=WarmupCosineLR, warmup=0.5, by_epoch=True, convert_to_iter_based=True)]
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    runtime_info=dict(type=RunInfo), timer=None, sampler_seed=dict(type=DistSamplerSeedHook),
    logger=dict(type=RunLog, interval=1, quiet=False), param_scheduler=dict(type=UpdateScheduler),
    checkpoint=dict(type=Checkpoints, epochs=1, iters=0, keep=2, best="top1"),
)
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
randomness = dict(seed=0)
device = "cpu"
'''


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "cli_tints.py").write_text(TINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tints.py"
    path.write_text(CONFIG)
    return path


def test_train_test_and_predict(run: Vizoo, config: Path, photos: Path, tmp_path: Path) -> None:
    trained = run("train", config, "--set", "train_cfg.max_epochs=2", "--seed", 7, "--quiet")
    assert trained.code == 0, trained
    folder = tmp_path / trained.out.strip()
    assert (folder / "best.pth").is_file()
    saved = torch.load(folder / "epoch_2.pth", weights_only=True)
    assert saved["meta"]["epoch"] == 2
    tested = run("test", folder / "config.py", folder / "best.pth", "--json")
    assert tested.code == 0, tested
    assert 0 <= json.loads(tested.out)["top1"] <= 100
    table = run("test", folder / "config.py", folder / "best.pth", "--quiet", "--work-dir", tmp_path / "tested")
    assert re.search(r"top1 +\d", table.out)
    (found,) = json.loads(run("predict", photos / "a.png", "-c", folder / "best.pth", "--json").out)
    assert {entry["class"] for entry in found["predictions"]} == {"red", "green", "blue"}


def test_train_mistakes(run: Vizoo, config: Path, tmp_path: Path) -> None:
    fails(run("train", "no_such_config"), "unknown config 'no_such_config'; ")
    fails(run("train", tmp_path / "tint.py"), r"there is no config file .*tint\.py")
    fails(run("train", config, "-s", "optim_wrapper.optimizer.rl=1"), r"no key 'optim_wrapper\.optimizer\.rl'; did you")
    fails(run("train", config, "-s", "train_cfg.max_epochs"), "must be written key=value")
    fails(run("train", config, "-s", "train_cfg.max_epochs=many"), "max_epochs is a whole number")
    fails(run("train", config, "--resume", "--force"), "give one of them")
    fails(run("train", config, "--resume", "--work-dir", tmp_path / "none"), "no run to resume in")
    fails(run("train", config, "--device", "cuda:99"), "cuda:99")
    fails(run("test", config, tmp_path / "none.pth", "--quiet"), r"none\.pth")
    fails(
        run("train", config, "-s", "model.backbone.depht=(1,)", "--quiet"),
        "has no field 'depht'; did you mean 'depths'",
    )


def test_configs(run: Vizoo) -> None:
    from vizoo.train.settings import list_configs

    result = run("configs")
    assert result.code == 0
    for name in list_configs():
        assert re.search(rf"^ {name} +\S", result.out, re.MULTILINE), name
    fails(run("configs", "no_such"), "no config matches 'no_such'; ")
