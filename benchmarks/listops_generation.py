"""Seconds and memory to generate ListOps data and to read it, and what came out.

    python benchmarks/listops_generation.py --preset paper --workers 2

Memory is an upper bound on what all processes held at once: the peak of this process plus, for each worker, the peak of
the largest one. Linux only (elsewhere peaks come in other units). The data goes to a temporary folder unless `--output`
names one; a full-size run needs 0.8 GB there.
"""

import argparse
import resource
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np

from subquad.tasks.base import DataPreset
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.listops import generate, read_listops

_PRESETS = Path(__file__).parents[1] / "subquad" / "presets" / "listops"


def _peak_bytes(workers: int) -> int:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * (own + (workers if workers > 1 else 0) * largest_worker)


def _describe(data: ClassificationData) -> None:
    lengths = data.train.lengths
    shares = np.bincount(data.train.labels, minlength=data.num_labels) / len(data.train)
    guess = data.guess()
    quantiles = np.percentile(lengths, [0, 10, 25, 50, 75, 90, 100]).round().astype(int).tolist()
    print(f"examples           {len(data.train)} / {len(data.validation)} / {len(data.test)}, hash {data.data_hash}")
    print(f"tokens per example mean {lengths.mean():.1f}; 0, 10, 25, 50, 75, 90, 100 %: {quantiles}")
    print(f"labels in train    {' '.join(f'{share:.4f}' for share in shares)}")
    print(f"majority class     {guess.answer}: {shares.max():.4f} of train, {guess.test:.4f} of test")


def _measure(directory: Path, preset: DataPreset, seed: int, workers: int) -> None:
    start = time.perf_counter()
    manifest = generate(directory, preset, seed=seed, workers=workers)
    seconds = time.perf_counter() - start
    memory, disk = _peak_bytes(workers) / 1e6, sum(entry.bytes for entry in manifest.files) / 1e6
    print(f"generate           {seconds:.1f} s, {memory:.0f} MB of memory, {disk:.0f} MB on disk")
    for what in ("read, parsing", "read again"):
        start = time.perf_counter()
        data = read_listops(directory, preset.max_length)
        seconds = time.perf_counter() - start
        print(f"{what:18} {seconds:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB of memory")
    _describe(data)


def main() -> None:
    """Run the measurement that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", choices=sorted(path.stem for path in _PRESETS.glob("*.toml")))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    table = tomllib.loads((_PRESETS / f"{arguments.preset}.toml").read_text(encoding="utf-8"))
    preset = DataPreset.from_table(arguments.preset, table["data"])
    with tempfile.TemporaryDirectory() as temporary:
        _measure(arguments.output or Path(temporary), preset, arguments.seed, arguments.workers)


if __name__ == "__main__":
    main()
