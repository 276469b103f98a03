"""The page itself: what was read, put into the template. Everything is escaped; captions are anybody's text."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sora_train.errors import UserError, one_line
from sora_train.log import log
from sora_train.report import events as happened
from sora_train.report.charts import RUNS
from sora_train.report.curves import chart_groups
from sora_train.report.differences import differing, leaves
from sora_train.report.media import MOST_CLIPS, Shelf, make_grid, sheet_address
from sora_train.report.read import RunRecord, is_number, read_run
from sora_train.storage import atomic_file

MOST_FLAWS = 20  # files of a run; more would hide the rest of the page


def write_report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Writes one page about a run, or one that compares several, and returns its path.

    Into `out`; else into RUN/report.html, or for several into report.html in the current folder. A page is there whole
    or not at all, also when two processes write it. It says, as stderr does, which files were not readable. Raises
    UserError for a folder that is no run, and where the page can't be written.
    """
    if not runs:
        raise UserError("no run to report on; name the folder that `sora train` made (train.output/name)")
    records = with_names([read_run(run) for run in runs])
    for run in records:
        for line in not_readable(run, run.folder):
            log.warning(line)
    beside = records[0].folder if len(records) == 1 else Path()
    page = Path(out).expanduser() if out is not None else beside / "report.html"
    if page.is_dir():
        raise UserError(f"{page} is a folder; name a file for the page, such as {page / 'report.html'}")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    shelf = Shelf(page)
    parts = environment.from_string(asset("page.html")).generate(**contents(records, shelf))
    try:
        with atomic_file(page) as draft, draft.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(parts)
    except OSError as error:
        raise UserError(f"{page} can't be written ({error.strerror or error}); name another file with --out") from error
    return page


def contents(records: Sequence[RunRecord], shelf: Shelf) -> dict:
    """The template's variables."""
    grid = make_grid(records, shelf)
    only = records[0] if len(records) == 1 else None
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    others = [(run, samples) for run in records for samples in run.samples if samples.step is None]
    latest = [[samples for samples in run.samples if samples.step is not None][-1:] for run in records]
    return {
        "title": only.name if only else " · ".join(run.name for run in records)[:300],
        "only": only,
        "runs": [one_run(run, RUNS[i % len(RUNS)]) for i, run in enumerate(records)],
        "grid": grid,
        "folders": [
            {
                "title": samples.title if only else f"{run.name}: {samples.title}",
                "sheet": sheet_address(samples.sheet),
                "clips": [(shelf.put(clip), clip.prompt) for clip in samples.clips[:MOST_CLIPS]],
                "left_out": max(0, len(samples.clips) - MOST_CLIPS),
            }
            for run, samples in others[:12]
        ],
        "sheets": [
            (run.name, samples.title, address)
            for run, found in zip(records, latest, strict=True)
            for samples in found
            if (address := sheet_address(samples.sheet))
        ],
        "shape": shape_of(records[0]),
        "obedience": [(run.name, obedience_rows(run.obedience)) for run in records if run.obedience],
        "groups": chart_groups(records),
        "recipe_differs": [] if only else differing([run.settings for run in records]),
        "environment_differs": [] if only else differing([run.environment for run in records]),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "shelf": shelf,
        "style": Markup(style_sheet()),
        "script": Markup(script),
        "policy": f"default-src 'none'; img-src data:; media-src blob: 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }


def one_run(run: RunRecord, colour: str) -> dict:
    """What the page says of one run in words and figures."""
    loss = run.curves.get("loss")
    none_yet = None if run.folder / "metrics.jsonl" in run.flaws else 0  # steps that can't be read are not none
    step, steps = int(loss[-1, 0]) if loss is not None else none_yet, run.setting("train", "steps")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "colour": colour,
        "state": happened.state_of(run.events, whole=run.folder / "events.jsonl" not in run.flaws),
        "done": min(1.0, step / steps) if step is not None and is_number(steps) and steps > 0 else None,
        "flaws": not_readable(run, Path()),
        "facts": facts(run, step, steps),
        "trouble": happened.trouble(run.events),
        "events": happened.all_rows(run.events),
        "events_in_all": len(run.events),
        "recipe": run.recipe,
        "environment": list(leaves(run.environment)),
    }


def facts(run: RunRecord, step: int | None, steps: object) -> list[tuple[str, str]]:
    """The few figures at the top, as far as they are known."""
    found = []
    if step is not None:
        found.append(("step", f"{step:,} of {steps:,}" if is_number(steps) else f"{step:,}"))
    for key, title, form in (
        ("loss", "training loss", ".4f"),
        ("holdout_loss", "held-out loss", ".4f"),
        ("fvd", "FVD", ",.0f"),
        ("similarity", "likeness to the prompt", ".3f"),
        ("samples_per_s", "clips per second", ",.1f"),
    ):
        if key in run.curves:
            found.append((title, format(run.curves[key][-1, 1], form)))
    if run.obedience and is_number(run.obedience.get("all")):
        found.append(("captions obeyed in full", f"{run.obedience['all']:.0%}"))
    workers = run.setting("cluster", "workers")
    if workers is not None:
        words = " to ".join(map(str, workers)) if isinstance(workers, list) else str(workers)
        found.append(("worker" if words == "1" else "workers", words))
    return [(what, one_line(value)[:60]) for what, value in found]


def not_readable(run: RunRecord, where: Path) -> list[str]:
    """A line for every file of a run that could not be read, named from `where` on; of very many, the first few."""
    lines = [f"not readable: {where / path.relative_to(run.folder)} ({why})" for path, why in sorted(run.flaws.items())]
    more = len(lines) - MOST_FLAWS
    return [one_line(line) for line in lines[:MOST_FLAWS]] + (
        [f"not readable: {more:,} more files"] if more > 0 else []
    )


def shape_of(run: RunRecord) -> str:
    """Width / height of a run's videos, so that the page keeps room for them: CSS for `aspect-ratio`."""
    height, width = run.setting("data", "height"), run.setting("data", "width")
    fits = is_number(height) and is_number(width) and 0.1 < width / max(height, 1e-9) < 10
    return f"{width:.0f} / {height:.0f}" if fits else "1 / 1"


def obedience_rows(obedience: dict | None) -> list[tuple[str, list[str]]]:
    """Rows of (which captions, shares of colour, direction, shape, all, and the number of clips)."""
    if not obedience:
        return []
    rows = [
        ("seen in training", obedience.get("seen")),
        ("held out", obedience.get("held_out")),
        ("together", obedience),
    ]
    names = ("colour", "direction", "shape", "all")

    def cells(row: dict) -> list[str]:
        shares = [f"{row[name]:.0%}" if is_number(row.get(name)) else "–" for name in names]
        return [*shares, str(row.get("clips", "–"))[:20]]

    return [(title, cells(row)) for title, row in rows if isinstance(row, dict)]


def with_names(records: list[RunRecord]) -> list[RunRecord]:
    """The runs under names that tell them apart: those that share one get their folder's, then a number."""
    for name_of in (lambda run, i: run.folder.absolute().name, lambda run, i: f"{run.name} ({i + 1})"):
        names = [run.name for run in records]
        if len(set(names)) == len(names):
            break
        records = [
            replace(run, name=one_line(name_of(run, i))) if names.count(run.name) > 1 else run
            for i, run in enumerate(records)
        ]
    return records


def style_sheet() -> str:
    """CSS that the run report and `sora inspect --html` share."""
    return asset("page.css")


def asset(name: str) -> str:
    """The text of a file in this package."""
    return resources.files("sora_train.report").joinpath(name).read_text(encoding="utf-8")
