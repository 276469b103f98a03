"""What every bench shares: taking turns, medians and spreads, records with where they come from, tables.

Standard library alone; torch only where it is there already.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

from sora_train import __version__
from sora_train.errors import UserError

T = TypeVar("T")
Row = dict[str, Any]

PACKAGES = ("torch", "einops", "safetensors", "diffusers", "numpy", "pyarrow", "ray", "deepspeed", "datasets")


@dataclass(frozen=True)
class Table:
    """One comparison: rows of figures by name, what they don't say of themselves, and what did not work."""

    what: str
    """The bench and the part of it, such as `train: parts of a step`."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def interleave(
    acts: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Calls each in turn, A B A B …, so that a machine whose speed wanders is as kind to one as to the other.

    Returns what each gave, warm-up rounds left out, and why some were given up: one that raises is not called again.
    """
    found: dict[str, list[T]] = {name: [] for name in acts}
    broken: dict[str, str] = {}
    for turn in range(warm_up + rounds):
        for name, act in acts.items():
            if name in broken:
                continue
            try:
                given = act()
            except Exception as error:  # a contender that fails must not take the others with it
                broken[name] = one_line(error)
                continue
            if turn >= warm_up:
                found[name].append(given)
    return {name: values for name, values in found.items() if name not in broken}, broken


def seconds(act: Callable[[], object]) -> float:
    """How long a call takes; what it gave the GPU to do counts too."""
    settle()
    began = time.perf_counter()
    act()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    """Waits for the GPU, where this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, and how many there were."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def one_line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def provenance(words: Sequence[str]) -> Row:
    """Where figures come from: command, commit, versions, hardware, date."""
    return {
        "command": " ".join(["sora bench", *words]),
        "commit": commit(),
        "versions": {"sora_train": __version__, "python": platform.python_version(), **versions()},
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide how fast things are, as far as they are there."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The code's commit, with `-dirty` where files differ from it; empty where it is no git checkout."""

    def git(*words: str) -> str:
        where = Path(__file__).parents[2]
        done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def hardware() -> Row:
    """Processor, cores of this process, memory, and GPUs where torch is loaded and sees some."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: Row = {"cpu": cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fs_type(folder: str) -> str:
    """The kind of file system that a local folder lies on, as far as Linux tells."""
    path, best = os.path.realpath(folder), ("", "unknown file system")
    try:
        with open("/proc/mounts") as mounts:
            for line in mounts:
                _, at, kind, *_ = line.split()
                inside = path == at or path.startswith(at.rstrip("/") + "/")
                if inside and len(at) >= len(best[0]):
                    best = at, kind
    except OSError:
        pass
    return best[1]


def append(tables: Sequence[Table], about: Row, out: str | Path) -> None:
    """A JSON line for each table. UserError where the file can't be written."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for table in tables:
                record = {"what": table.what, "rows": table.rows, "notes": table.notes, "failed": table.failed, **about}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}; name another file with --out") from None


def read_records(path: str | Path) -> list[Row]:
    """The records of a file, oldest first. UserError where it can't be read, or a line is none."""
    records: list[Row] = []
    try:
        lines = Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}; name another file with --out") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not {"what", "rows", "command"} <= record.keys():
            raise UserError(
                f"{path}, line {number}, is no record of `sora bench`, or was cut short: delete that line, or name "
                "another file with --out"
            )
        records.append(cast(Row, record))
    return records


def columns(rows: Sequence[Row]) -> list[str]:
    """Every name of a figure that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def written(value: Any) -> str:
    """A figure for people: three or four digits, a median with its lowest and highest."""
    if isinstance(value, dict):
        low, high = written(value["low"]), written(value["high"])
        return f"{written(value['median'])} ({low} – {high})" if value["n"] > 1 else written(value["median"])
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(table: Table) -> str:
    """A table as Markdown that reads well as it stands, notes below it."""
    names = columns(table.rows)
    cells = [names, *([written(row.get(name)) for name in names] for row in table.rows)]
    wide = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, wide, strict=True))} |" for line in cells]
    lines[1:1] = [f"|{'|'.join('-' * (w + 2) for w in wide)}|"]
    notes = [f"- {note}" for note in table.notes] + [f"- failed: {line}" for line in table.failed]
    return "\n".join([f"### {table.what}", "", *(lines if names else []), *([""] if notes else []), *notes])


def say(line: str) -> None:
    """Progress, to stderr: stdout holds the tables."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
