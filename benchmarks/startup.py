"""What a user waits for before the first image: import, list of models, building one, the command line's help.

Everything is measured in fresh processes, several times in turn; the median counts. `import vizoo` is what comes on top
of `import torch`.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from result_files import RESULTS, save
from vizoo.environment import environment

MODEL = "swin_tiny_patch4_window7_224"
# Each prints seconds; the limits are those that the library promises.
PROGRAMS = {
    "import torch": ("import torch", None),
    "import vizoo, beyond torch": ("import torch; start(); import vizoo", 1.0),
    "list_models, first call": ("import vizoo; start(); vizoo.list_models()", 0.05),
    f"create {MODEL}": (f"import vizoo; vizoo.list_models(); start(); vizoo.create_model({MODEL!r})", 0.5),
    "vizoo --help": ("import vizoo.cli; vizoo.cli.main(['--help'])", 2.5),
}
CLOCK = """
import io, sys, time
begin = [time.perf_counter()]
def start():
    begin[0] = time.perf_counter()
out, sys.stdout = sys.stdout, io.StringIO()
{program}
print(time.perf_counter() - begin[0], file=out)
"""


def seconds(program: str) -> float:
    """Seconds that a program took by its own clock, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CLOCK.format(program=program)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result file")
    options = parser.parse_args()
    runs: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.repeats):
        for name, (program, _) in PROGRAMS.items():
            runs[name].append(seconds(program))
    rows = [
        {"what": name, "seconds": round(statistics.median(runs[name]), 4), "limit": limit, "runs": runs[name]}
        for name, (_, limit) in PROGRAMS.items()
    ]
    print("| what | seconds | limit |\n|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['seconds']:.3f} | {row['limit'] or '-'} |")
    print(f"\n{save('startup', environment(torch.device('cpu')), {'rows': rows}, options.output)}")


if __name__ == "__main__":
    main()
