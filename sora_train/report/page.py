"""Renders the page from a template. All text is escaped, since captions are untrusted."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sora_train.errors import UserError, one_line
from sora_train.log import log
from sora_train.report.charts import RUNS
from sora_train.report.curves import chart_groups
from sora_train.report.events import all_rows, problems, state_of
from sora_train.report.media import MAX_CLIPS, MediaIndex, given_address, make_grid, sheet_address
from sora_train.report.read import RunRecord, is_number, read_run
from sora_train.settings import flatten
from sora_train.storage import atomic_file

MAX_FLAWS = 20  # more would hide the rest of the page
MAX_KEYS = 2000  # of a recipe, which has two hundred
FACTS = (
    ("loss", "training loss", ".4f"),
    ("holdout_loss", "held-out loss", ".4f"),
    ("fvd", "FVD", ",.0f"),
    ("similarity", "similarity to the prompt", ".3f"),
    ("samples_per_s", "clips per second", ",.1f"),
)


def write_report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Writes one page about a run, or one that compares several, and returns its path.

    The path is `out`, or RUN/report.html, or for several runs report.html in the current folder. Writing is atomic.
    Files that could not be read are named on the page and on stderr. UserError if a folder is not a run, or if the
    page can't be written.
    """
    if not runs:
        raise UserError("no run to report on. Name the folder that `sora train` made (train.output/name)", code="run")
    records = with_unique_names([read_run(run) for run in runs])
    for run in records:
        for line in unreadable(run, run.folder):
            log.warning(line)
    beside = records[0].folder if len(records) == 1 else Path()
    page = Path(out).expanduser() if out is not None else beside / "report.html"
    if page.is_dir():
        where = f"such as {page / 'report.html'}"
        raise UserError(f"{page} is a folder. Name a file for the page, {where}", code="not_writable")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    media = MediaIndex(page)
    parts = environment.from_string(asset("page.html")).generate(**contents(records, media))
    try:
        with atomic_file(page) as draft, draft.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(parts)
    except OSError as error:
        why = f"({error.strerror or error}). Choose another file with --out"
        raise UserError(f"{page} can't be written {why}", code="not_writable") from error
    return page


def contents(records: Sequence[RunRecord], media: MediaIndex) -> dict:
    """The template's variables."""
    grid = make_grid(records, media)
    only = records[0] if len(records) == 1 else None
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    others = [(run, samples) for run in records for samples in run.samples if samples.step is None]
    latest = [[samples for samples in run.samples if samples.step is not None][-1:] for run in records]
    return {
        "title": only.name if only else " · ".join(run.name for run in records)[:300],
        "only": only,
        "runs": [run_entry(run, RUNS[i % len(RUNS)]) for i, run in enumerate(records)],
        "grid": grid,
        "folders": [
            {
                "title": samples.title if only else f"{run.name}: {samples.title}",
                "sheet": sheet_address(samples.sheet),
                "clips": [
                    (media.add(clip), clip.prompt, given_address(clip.given)) for clip in samples.clips[:MAX_CLIPS]
                ],
                "left_out": max(0, len(samples.clips) - MAX_CLIPS),
            }
            for run, samples in others[:12]
        ],
        "sheets": [
            (run.name, samples.title, address)
            for run, found in zip(records, latest, strict=True)
            for samples in found
            if (address := sheet_address(samples.sheet))
        ],
        "obedience": [(run.name, obedience_rows(run.obedience)) for run in records if run.obedience],
        "groups": chart_groups(records),
        "recipe_differs": [] if only else differences([run.settings for run in records]),
        "environment_differs": [] if only else differences([run.environment for run in records]),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "media": media,
        "style": Markup(style_sheet()),
        "script": Markup(script),
        "policy": f"default-src 'none'; img-src data:; media-src blob: 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }


def run_entry(run: RunRecord, colour: str) -> dict:
    """What the page says about one run."""
    loss = run.curves.get("loss")
    unknown = None if run.folder / "metrics.jsonl" in run.flaws else 0
    step, steps = int(loss[-1, 0]) if loss is not None else unknown, run.setting("train", "steps")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "colour": colour,
        "state": state_of(run.events, complete=run.folder / "events.jsonl" not in run.flaws),
        "done": min(1.0, step / steps) if step is not None and is_number(steps) and steps > 0 else None,
        "flaws": unreadable(run, Path()),
        "facts": facts(run, step, steps),
        "problems": problems(run.events),
        "events": all_rows(run.events),
        "events_in_all": len(run.events),
        "recipe": run.recipe,
        "environment": list(leaves(run.environment)),
    }


def facts(run: RunRecord, step: int | None, steps: object) -> list[tuple[str, str]]:
    """The few values at the top, as far as they are known."""
    found = [] if step is None else [("step", f"{step:,} of {steps:,}" if is_number(steps) else f"{step:,}")]
    found += [(title, format(run.curves[key][-1, 1], form)) for key, title, form in FACTS if key in run.curves]
    if run.obedience and is_number(run.obedience.get("all")):
        found.append(("captions fully followed", f"{run.obedience['all']:.0%}"))
    workers = run.setting("cluster", "workers")
    if workers is not None:
        words = " to ".join(map(str, workers)) if isinstance(workers, list) else str(workers)
        found.append(("worker" if words == "1" else "workers", words))
    return [(what, one_line(value)[:60]) for what, value in found]


def unreadable(run: RunRecord, root: Path) -> list[str]:
    """One line for each file of a run that could not be read, with its path from `root`, at most `MAX_FLAWS`."""
    lines = [f"not readable: {root / path.relative_to(run.folder)} ({why})" for path, why in sorted(run.flaws.items())]
    more = [f"not readable: {len(lines) - MAX_FLAWS:,} more files"] if len(lines) > MAX_FLAWS else []
    return [*map(one_line, lines[:MAX_FLAWS]), *more]


def obedience_rows(obedience: dict) -> list[tuple[str, list[str]]]:
    """Rows of prompt-following accuracy: captions, shares of colour, direction, shape and all, number of clips."""

    def cells(row: dict) -> list[str]:
        shares = [row.get(name) for name in ("colour", "direction", "shape", "all")]
        return [*(f"{share:.0%}" if is_number(share) else "–" for share in shares), str(row.get("clips", "–"))[:20]]

    rows = {"seen in training": obedience.get("seen"), "held out": obedience.get("held_out"), "together": obedience}
    return [(title, cells(row)) for title, row in rows.items() if isinstance(row, dict)]


def with_unique_names(records: list[RunRecord]) -> list[RunRecord]:
    """The runs with unique names: equal ones become their folders', or get a number."""
    for name_of in (lambda run, i: run.folder.absolute().name, lambda run, i: f"{run.name} ({i + 1})"):
        names = [run.name for run in records]
        records = [replace(run, name=one_line(name_of(run, i))) if names.count(run.name) > 1 else run
                   for i, run in enumerate(records)]  # fmt: skip
    return records


def differences(trees: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """The dotted keys whose values are not the same in all trees, with the values; a dash where a key is missing."""
    flat = [dict(islice(leaves(tree), MAX_KEYS)) for tree in trees]
    rows = [
        (name, [one.get(name, "–") for one in flat]) for name in dict.fromkeys(name for one in flat for name in one)
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def leaves(tree: dict) -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested mappings as text of limited length."""
    for name, value in flatten(tree):
        yield one_line(name[:200]), one_line(str(value)[:2000])


def style_sheet() -> str:
    """CSS that the run report and `sora inspect --html` share."""
    return asset("page.css")


def asset(name: str) -> str:
    """The text of a file in this package."""
    return resources.files("sora_train.report").joinpath(name).read_text(encoding="utf-8")
