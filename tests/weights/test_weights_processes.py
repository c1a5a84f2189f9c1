"""More than one process at the same file, and processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vizoo.weights.record import Weights
from vizoo.weights.store import download, path_of, verify

SCRIPT = """
import sys
from vizoo.weights.record import Weights
from vizoo.weights.store import download

record = Weights(
    url=sys.argv[1], sha256=sys.argv[2], license="MIT", repository="o/n", commit="", input_size=(3, 8, 8), num_classes=1
)
print("ready", flush=True)
sys.stdin.readline()
print(download(record))
"""


def start(record: Weights) -> subprocess.Popen[str]:
    """A process that waits for a line, then downloads."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, record.url, str(record.sha256)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VIZOO_TIMEOUT": "30"},
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_download_once(server: Any, answer: Any, record: Weights, data: bytes) -> None:
    server.answers = [answer(cut=len(data) // 2, stall=True)]
    processes = [start(record) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        go(process)
    wait_until(lambda: bool(server.requests))
    time.sleep(0.3)  # the other one has reached the lock by now; if not, the test is weaker but not wrong
    server.released.set()  # the first answer breaks off in the middle, and is resumed
    for process in processes:
        assert process.communicate(timeout=60)[0].strip() == str(path_of(record))
        assert process.returncode == 0
    assert server.ranges == [None, f"bytes={len(data) // 2}-"]
    assert verify(record).state == "verified"


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a matter of POSIX")
def test_killed_download_is_resumed(
    server: Any, answer: Any, record: Weights, data: bytes, part_of: Callable[[Weights], Path]
) -> None:
    server.answers = [answer(cut=1000, stall=True)]
    process = start(record)
    go(process)
    wait_until(lambda: part_of(record).exists() and part_of(record).stat().st_size == 1000)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not path_of(record).exists()
    assert download(record).read_bytes() == data  # its lock died with it
    assert server.ranges == [None, "bytes=1000-"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute in vain"
        time.sleep(0.02)
