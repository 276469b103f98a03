"""What all benches share: alternating measurements, statistics, flags, tables and records.

Standard library only, so that `bench.model` runs on a bare machine; torch is used only if it is already imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sora_train import __version__
from sora_train.errors import RecipeError, UserError, error_line
from sora_train.log import progress
from sora_train.provenance import git_commit, package_versions, usable_cores

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


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, including its work on the GPU."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Waits for the GPU if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and count."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


class Flags(argparse.ArgumentParser):
    """The flags of a bench. `--a-b` and `--a_b` are the same flag; an error is a RecipeError of one line."""

    def __init__(self, prog: str, about: str) -> None:
        super().__init__(prog=prog, description=about, allow_abbrev=False)
        self.flag("out", "runs/bench.jsonl", "file to append the results to, one JSON object per line")

    def flag(self, name: str, default: Any, about: str, **how: Any) -> None:
        """Adds a flag. Its type is that of the default; integers are at least 1 unless the default is 0."""
        first = default[0] if isinstance(default, list) else default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        if default is False:
            how["action"] = "store_true"
        else:
            how.setdefault("type", whole_number(min(first, 1)) if isinstance(first, int) else type(first))
            how |= {"nargs": "+"} if isinstance(default, list) else {}
            if "choices" not in how:
                how["metavar"] = name.upper()
        tail = f" (default: {shown})" if shown not in ("", False) else ""
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*names, dest=name, default=default, help=(about + tail).replace("%", "%%"), **how)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message.replace('argument ', '')}. `{self.prog} --help` explains the flags")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of the flags. RecipeError for any other word, UserError if --out can't be written."""
        values, rest = self.parse_with_rest(words)
        if rest:
            self.error(f"unknown: {' '.join(rest)}")
        return values

    def parse_with_rest(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The values of the flags, and the other words."""
        values, rest = self.parse_known_args(list(words))
        append([], {}, values.out)  # an error here costs less than one after the measurement
        return values, rest


def whole_number(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `least`."""

    def parse(word: str) -> int:
        if not word.isdigit() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of {least} or more")
        return int(word)

    return parse


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
    found: Row = {"cpu": cpu_name(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"}
    if "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another file with --out") from None


def finish(tables: Sequence[Table], words: Sequence[str], out: str | Path) -> int:
    """Prints the tables as Markdown and appends them to `out`. Returns the exit status: 1 if anything failed."""
    about = provenance(words)
    machine, packages = about["hardware"], ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    gpus = ", ".join(machine.get("gpus", [])) or "no GPU"
    memory = machine.get("memory_gb", "?")
    origin = f"commit {about['commit'] or 'unknown'}, {machine['cores']} cores of {machine['cpu']}, {memory} GB, {gpus}"
    print("\n\n".join([*map(markdown, tables), f"`{about['command']}`, {origin}; {packages}"]), flush=True)
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
