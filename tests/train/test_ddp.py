"""Two processes by torchrun over gloo: the weights of one process with the same global batch, and exact figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vizoo.train.checkpoint import read_checkpoint
from vizoo.train.log import read_log

Run = Callable[..., Path]

SETTINGS = (
    "model.mixup=None",
    "model.backbone.drop_path_rate=0.0",
    "train_dataloader.dataset.noise=0.0",
    "train_cfg.max_epochs=2",
    "custom_hooks=[]",
)


SCRIPT = """
import sys
from vizoo.train.run import train
train(sys.argv[1], sys.argv[3:], work_dir=sys.argv[2], quiet=True)
"""


def torchrun(config: Path, folder: Path, *settings: str, processes: int = 2) -> None:
    script = config.with_name("launch.py")
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(script),
    ]
    # A session of its own, so that a launch that hangs can be ended with all its workers.
    process = subprocess.Popen(
        [*command, str(config), str(folder), *settings], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torch.optim.AdamW"])
def test_equals_one_process(small_config: Path, small_run: Run, tmp_path: Path, optimizer: str) -> None:
    settings = (*SETTINGS, f"optim_wrapper.optimizer.type={optimizer}", "auto_scale_lr.enable=true")
    one = small_run("one", *settings, "train_dataloader.batch_size=8")
    two = tmp_path / "two"
    torchrun(small_config, two, *settings, "train_dataloader.batch_size=4", "val_dataloader.batch_size=4")
    expected, found = (read_checkpoint(folder / "epoch_2.pth") for folder in (one, two))
    assert expected["meta"]["iter"] == found["meta"]["iter"] == 10
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, atol=1e-6, rtol=1e-6)
    records = [{(r["kind"], r["iter"]): r for r in read_log(folder)} for folder in (one, two)]
    assert records[0].keys() == records[1].keys(), "one process writes the log"
    for key, record in records[0].items():
        for figure in {"loss", "lr", "top1"} & record.keys():
            assert records[1][key][figure] == pytest.approx(record[figure], abs=1e-5), f"{figure} of {key}"
    assert len(found["rng"]) == 2
    assert not torch.equal(found["rng"][0]["torch"], found["rng"][1]["torch"]), "processes draw different numbers"
