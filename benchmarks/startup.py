"""Seconds until the command line answers, and what importing the library costs: medians of fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 11
COMMANDS = {
    "subquad --help": ["-m", "subquad", "--help"],
    "import subquad": ["-c", "import subquad"],
    "python alone": ["-c", ""],
}


def main() -> None:
    """Print a line for each command; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            samples[name].append(time.perf_counter() - start)
    for name, seconds in samples.items():
        print(f"{name:<16} median {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
