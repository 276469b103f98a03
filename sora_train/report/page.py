"""The page itself: what was read, put into the template. Everything is escaped; captions are anybody's text."""

from __future__ import annotations

import base64
import datetime
import re
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sora_train.report.charts import line_chart
from sora_train.report.read import RunRecord, Samples, is_number, read_run, series
from sora_train.video import one_line

INLINE_FILE, INLINE_ALL = 2**20, 24 * 2**20  # bytes; larger files are linked to, relative to the page
MOST_STEPS = 12  # of validations that are shown, first and last included
MOST_CLIPS = 96
TITLES = {
    "loss": "Training loss",
    "holdout_loss": "Held-out loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_s": "Clips per second",
    "tokens_per_s": "Tokens per second",
    "step_s": "Seconds per step",
    "data_wait_share": "Share of time spent waiting for data",
}
SKIPPED = {"step", "time", "epoch", "samples_seen"}


def write_report(run_folder: str | Path) -> Path:
    """Writes `report.html` into a run's folder and returns its path. Raises UserError for a folder that is no run."""
    record = read_run(run_folder)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    source = resources.files("sora_train.report").joinpath("page.html").read_text(encoding="utf-8")
    page = record.folder / "report.html"
    html = environment.from_string(source).render(**contents(record))
    page.write_text(html, encoding="utf-8", errors="replace")
    return page


def contents(record: RunRecord) -> dict:
    """The template's variables."""
    settings = _settings(record.recipe)
    embed = Inliner(record.folder)
    by_step = [samples for samples in record.samples if samples.step is not None]
    last = ([samples for samples in record.samples if samples.name == "final"] or by_step)[-1:]
    rest = [samples for samples in record.samples if samples not in last]
    return {
        "name": one_line(str(settings.get("name") or record.folder.absolute().name)),
        "facts": facts(record, settings),
        "latest": shown(last[0], embed) if last else None,
        "others": [shown(samples, embed) for samples in spread(rest)],
        "charts": charts(record),
        "obedience": obedience_rows(record.obedience),
        "events": [event_row(event) for event in record.events],
        "recipe": record.recipe,
        "environment": {key: str(value) for key, value in (record.environment or {}).items()},
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Inliner:
    """Turns files into `data:` addresses until the page's budget is spent, and into relative links after that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = INLINE_ALL

    def address(self, path: Path, kind: str) -> str:
        size = path.stat().st_size
        if size > min(INLINE_FILE, self.left):
            return quote(path.relative_to(self.folder).as_posix())
        self.left -= size
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def facts(record: RunRecord, settings: dict) -> list[tuple[str, str]]:
    """The few figures at the top, as far as they are known."""
    loss = series(record.metrics, "loss")
    steps, workers = _value(settings, "train", "steps"), _value(settings, "cluster", "workers")
    found = [("step", f"{loss[-1][0] if loss else 0:,.0f} of {f'{steps:,}' if is_number(steps) else '?'}")]
    if loss:
        found.append(("last loss", f"{loss[-1][1]:.4f}"))
    if record.obedience and is_number(record.obedience.get("all")):
        found.append(("captions obeyed in full", f"{record.obedience['all']:.0%}"))
    found.append(("workers", str(workers or 1)))
    return [*found, ("resumed", f"{len(resumes(record))} x")] if resumes(record) else found


def resumes(record: RunRecord) -> list[dict]:
    """The events that say that training went on from a checkpoint."""
    return [event for event in record.events if event.get("event") == "resume"]


def charts(record: RunRecord) -> list[Markup]:
    """A curve of every metric that has at least one value; the known ones first, loss large."""
    keys = [*TITLES, *sorted({key for entry in record.metrics for key in entry} - set(TITLES) - SKIPPED)]
    marks = [event["step"] for event in resumes(record) if is_number(event.get("step"))]
    drawn = []
    for key in keys[:40]:
        if points := series(record.metrics, key):
            title = TITLES.get(key, one_line(key)[:60])
            drawn.append(Markup(line_chart(points, title, marks, large=key == "loss")))
    return drawn


def shown(samples: Samples, embed: Inliner) -> dict:
    """One folder of samples for the template."""
    title = f"step {samples.step:,}" if samples.step is not None else samples.name
    return {
        "title": title,
        "sheet": embed.address(samples.sheet, "image/png") if samples.sheet else None,
        "clips": [(embed.address(c.path, "video/mp4"), one_line(c.prompt[:400])) for c in samples.clips[:MOST_CLIPS]],
        "left_out": max(0, len(samples.clips) - MOST_CLIPS),
    }


def spread(samples: list[Samples]) -> list[Samples]:
    """At most MOST_STEPS of them, evenly spread, newest first."""
    count = len(samples)
    chosen = range(count) if count <= MOST_STEPS else [i * (count - 1) // (MOST_STEPS - 1) for i in range(MOST_STEPS)]
    return [samples[i] for i in chosen][::-1]


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
        return [*shares, str(row.get("clips", "–"))]

    return [(title, cells(row)) for title, row in rows if isinstance(row, dict)]


def event_row(event: dict) -> tuple[str, str, str, str]:
    """Time, step, what, and the rest of an event in words."""
    time = event.get("time", "")
    if is_number(time) and 0 < time < 1e11:
        time = datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    rest = [f"{key}: {value}" for key, value in event.items() if key not in ("time", "step", "event")]
    return str(time), str(event.get("step", "")), str(event.get("event", "")), ", ".join(rest)[:2000]


def _settings(recipe: str) -> dict:
    """The recipe's values for the page's top; a recipe that can't be read is still shown as text."""
    try:
        settings = yaml.safe_load(re.sub(r"[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ufffd\U00010000-\U0010ffff]", "", recipe))
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _value(settings: dict, section: str, key: str) -> object:
    inside = settings.get(section)
    return inside.get(key) if isinstance(inside, dict) else None
