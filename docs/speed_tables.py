"""The tables of `docs/speed.md`, from the figures that the benchmarks wrote to `results/speed/<machine>/`.

Machines never share a table: a section for each, with a table for each benchmark that has been run there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subquad.records.units import percent, seconds, size, times

Figures = Mapping[str, Any]
"""A file of figures, as `benchmarks/sampling.py` writes it."""


def speed_sections(folder: Path) -> str:
    """Markdown: every machine, in the order of their names."""
    machines = sorted({path.parent for path in folder.glob("*/*.json") if path.stem in TABLES})
    return "\n".join(map(_machine, machines))


def _machine(folder: Path) -> str:
    files = {name: folder / f"{name}.json" for name in TABLES}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.exists()}
    here = [figures["environment"] for figures in found.values()]
    lines = [f"## {here[0]['accelerator'] or here[0]['cpu']}, {here[0]['threads']} threads", "", _software(here), ""]
    for name, figures in found.items():
        lines += [f"`{figures['command']}`{_sgemm(figures)}", "", *TABLES[name](figures), ""]
    return "\n".join(lines)


def _software(environments: Sequence[Mapping[str, Any]]) -> str:
    versions = sorted({f"torch {each['torch']}" for each in environments})
    commits = sorted({str(each["commit"]) for each in environments})
    return f"{', '.join(versions)}; commit {', '.join(commits)}."


def _sgemm(figures: Figures) -> str:
    rate = figures.get("sgemm_flops_per_second")
    return ":" if rate is None else f", with sgemm at {rate / 1e9:.0f} GFLOP/s:"


def _table(headings: str, rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    head = [heading.strip() for heading in headings.split("|")]
    rule = ["---", *(["--:"] * (len(head) - 1))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _attention(figures: Figures) -> list[str]:
    rows = [
        (
            f"{row['name']} (against {row['against']})",
            f"{row['length']:,}",
            seconds(row["seconds"]["median"]),
            seconds(row["dense_seconds"]["median"]),
            f"{times(row['speed_up']['ratio'])} ({row['speed_up']['lowest']:.3g}–{row['speed_up']['highest']:.3g})",
            percent(row["of_sgemm"], 0),
            f"{row['kept']:.2f}",
        )
        for row in figures["rows"]
    ]
    return _table("method | tokens | its time | dense | times as fast | of sgemm | kept", rows)


def _attention_free(figures: Figures) -> list[str]:
    rows = [
        (
            row["name"],
            f"{figures['length']:,}",
            seconds(row["seconds"]["median"]),
            row["against"],
            seconds(row["its_seconds"]["median"]),
            f"{times(row['ratio']['ratio'])} ({row['ratio']['lowest']:.3g}–{row['ratio']['highest']:.3g})",
        )
        for row in figures["rows"]
    ]
    return _table("method | tokens | its time | against | time of that | ratio", rows)


def _scaling(figures: Figures) -> list[str]:
    lengths = [point["length"] for point in figures["scaling"][0]["points"]]
    rows = []
    for method in figures["scaling"]:
        points = method["points"]
        per_token = [f"{1e6 * point['seconds']['median'] / point['length']:.3g} µs" for point in points]
        peaks = [point["peak_bytes"] for point in points]
        rows.append((method["name"], *per_token, "–" if peaks[-1] is None else size(peaks[-1])))
    return _table(f"method | {' | '.join(f'{length:,}' for length in lengths)} | peak at the last", rows)


TABLES: Mapping[str, Callable[[Figures], list[str]]] = {
    "pattern_attention": _attention,
    "mechanism_attention": _attention,
    "attention_free": _attention_free,
    "pattern_scaling": _scaling,
    "mechanism_scaling": _scaling,
}
"""Name of a file -> its table, in the order of the page."""
