"""What every operator's kernels ask of the machine, and the short way to them in eager mode."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

TRITON_INSTALLED = find_spec("triton") is not None


def device_reasons(device: torch.device) -> list[str]:
    """Why kernels cannot run on a device; empty when they can. On a CPU only the interpreter runs them."""
    if not TRITON_INSTALLED:
        return ["triton is not installed"]
    if device.type == "cpu" and interpreted():
        return []
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"the kernels need an NVIDIA GPU, the input is on {device.type}"]
    if torch.compiler.is_compiling():  # compilers warn of a cached function
        major = torch.cuda.get_device_properties(device).major
    else:
        major = _major(device)
    return [] if major >= 8 else [f"the kernels need compute capability 8.0, this GPU has {major}.x"]


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on a CPU, so that nothing compiles them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _major(device: torch.device) -> int:
    """Compute capability of a GPU before the point. Asking the driver at each call would take microseconds."""
    return torch.cuda.get_device_properties(device).major


def unwatched(*tensors: Tensor) -> bool:
    """Whether a kernel may be launched on tensors without telling torch's dispatcher.

    Going through a registered operator costs tens of microseconds a call, more than most kernels run. It is needed
    only for those who look on or step in: tracers, dispatch modes, function transforms, tensors of other classes.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and all(type(tensor) is Tensor or type(tensor) is Parameter for tensor in tensors)
    )


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton, which is imported for that."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@lru_cache
def exact_products() -> str:
    """What to ask of Triton for exact products of float32 in kernels whose threads hold many rows of a tile.

    Three products of tf32 on matrix units; but Triton 3.2, that of torch 2.6, ends the process over them, and those up
    to 3.5 have not been tried. They get the slow way.
    """
    return "tf32x3" if triton_version() >= (3, 6) else "ieee"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current GPU, where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for a CPU, where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
