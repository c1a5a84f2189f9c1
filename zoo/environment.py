"""Where something was measured: hardware, driver, versions and commit. Every result file begins with it."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vizoo

LIBRARIES = ("torch", "triton", "timm", "torchvision", "mmengine")


def environment(device: torch.device) -> dict[str, Any]:
    """Facts about this machine, this installation and this moment, as plain values."""
    return {
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "vizoo": vizoo.__version__,
        **{name: _version(name) for name in LIBRARIES},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def cpu_name() -> str:
    """Model name of the processor; `CPU` where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name and name != "unknown"), "CPU")


def driver_version() -> str | None:
    """Version of the GPU's driver; None where its tool is missing."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """Commit of the checkout this runs from, with `+` for uncommitted changes; None for an installed package."""
    root = Path(vizoo.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return found + ("+" if changed else "") if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line that a program prints; None where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
