"""Where the time of a compiled step goes: its kernels by name, their sum, the wall time of a step, and its peak memory.

python benchmarks/profile_step.py swin_tiny_patch4_window7_224
python benchmarks/profile_step.py davit_tiny --mode inference --library timm
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

import vizoo
from contestants import TIMM, from_timm
from kernel_times import kernels
from vizoo.benchmark import Step, make_step


def wall(step: Step, count: int) -> float:
    """Milliseconds of a step, many launched without waiting."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of the zoo")
    parser.add_argument("--library", choices=["vizoo", "timm"], default="vizoo")
    parser.add_argument("--mode", choices=["training", "inference"], default="training")
    parser.add_argument("--execution", choices=["eager", "compiled", "graphs"], default="compiled")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--first", type=int, default=40, help="kernels to show")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are profiled on a CUDA GPU, and there is none")
    warnings.simplefilter("ignore")  # the peer's own
    sides = vizoo.describe(options.model).img_size
    own = options.library == "vizoo"
    model = vizoo.create_model(options.model) if own else from_timm(TIMM[options.model], sides, False)
    device, shape = torch.device("cuda"), (options.batch_size, 3, *sides)
    settings = {"execution": options.execution, "shape": shape, "device": device, "dtype": "bfloat16"}
    step = make_step(model.to(device), options.mode, **settings)
    wall(step, 4)
    milliseconds = wall(step, 10)
    found = kernels(step, device)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"wall {milliseconds:.2f} ms, kernels {sum(k.milliseconds for k in found):.2f} ms, peak {peak:.2f} GiB")
    print(*found[: options.first], sep="\n")


if __name__ == "__main__":
    main()
