"""What all benches share: alternating measurements, statistics, tables and records."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from sora_train import __version__
from sora_train.errors import UserError, error_line
from sora_train.log import progress
from sora_train.provenance import git_commit, package_versions, usable_cores
from sora_train.section import Section
from sora_train.terminal import print_result

T = TypeVar("T")
Row = dict[str, Any]

PACKAGES = ("torch", "einops", "safetensors", "diffusers", "numpy", "pyarrow", "ray", "deepspeed")


@dataclass(frozen=True)
class Table:
    """One comparison: rows of named values, notes, and the failures of variants that have no row."""

    what: str
    """The bench and its part, such as `train: workers`."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def interleave(
    calls: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Calls each in turn, A B A B …, so changes in the machine's speed affect all alike.

    Returns the results by name, without those of the warm-up, and the errors by name. A call that raises is not
    called again and has no results.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            if name in errors:
                continue
            try:
                result = call()
            except Exception as error:  # one variant's failure must not stop the others
                errors[name] = error_line(error)
                continue
            if turn >= warm_up:
                results[name].append(result)
    return {name: values for name, values in results.items() if name not in errors}, errors


def drop_from_cache(files: Iterable[str | Path]) -> None:
    """Has files read from disk the next time, not from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and count."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


class BenchOptions(Section):
    """What and how long to measure."""

    out: str = "runs/bench.jsonl"
    """File to append the results to, one JSON object per line."""


def provenance(words: Sequence[str]) -> Row:
    """Command, commit, versions, hardware and date."""
    return {
        "command": " ".join(["sora bench", *words]),
        "commit": git_commit(),
        "versions": {"sora_train": __version__, "python": platform.python_version(), **package_versions(PACKAGES)},
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware() -> Row:
    """Processor, cores of this process, memory, and the GPUs that torch sees."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def append(tables: Sequence[Table], about: Row, out: str | Path) -> None:
    """Appends one JSON line per table. UserError if the file can't be written."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            for table in tables:
                record = {"what": table.what, "rows": table.rows, "notes": table.notes, "failed": table.failed, **about}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        why = f"{error.strerror or error}. Choose another file with --out"
        raise UserError(f"cannot write {path}: {why}", code="not_writable") from None


def finish(tables: Sequence[Table], words: Sequence[str], out: str | Path) -> int:
    """Prints the tables as Markdown and appends them to `out`. Returns the exit status: 1 if anything failed."""
    about = provenance(words)
    machine, packages = about["hardware"], ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    origin = (
        f"commit {about['commit'] or 'unknown'}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB, {', '.join(machine['gpus']) or 'no GPU'}"
    )
    print_result("\n\n".join([*map(markdown, tables), f"`{about['command']}`, {origin}; {packages}"]))
    append(tables, about, out)
    return int(any(table.failed for table in tables))


def markdown(table: Table) -> str:
    """A table as aligned Markdown with its notes. Columns that no row has are left out."""
    names = list(dict.fromkeys(name for row in table.rows for name, value in row.items() if value is not None))
    cells = [names, *([cell_text(row.get(name)) for name in names] for row in table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in cells]
    lines[1:1] = [f"|{'|'.join('-' * (w + 2) for w in widths)}|"]
    notes = [f"- {note}" for note in table.notes] + [f"- failed: {line}" for line in table.failed]
    return "\n".join([f"### {table.what}", "", *(lines if names else []), *([""] if notes else []), *notes])


def cell_text(value: Any) -> str:
    """A value with three or four digits; of a spread the median (minimum – maximum)."""
    if isinstance(value, dict):
        low, high = cell_text(value["low"]), cell_text(value["high"])
        return f"{cell_text(value['median'])} ({low} – {high})" if value["n"] > 1 else cell_text(value["median"])
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def log(line: str) -> None:
    """Prints progress to stderr; stdout holds the tables."""
    progress(f"bench: {line}")
