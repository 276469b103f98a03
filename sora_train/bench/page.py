"""The page of `sora bench --report`: records as bars and tables; one file, nothing fetched, no scripts."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.bench.core import Row, columns, read_records, written
from sora_train.bench.output import origin
from sora_train.errors import UserError
from sora_train.report.charts import INK, RUNS, Colours, for_page
from sora_train.report.page import asset

DRAWN = ("step_s", "clips_per_s", "gb_per_s", "of raw", "times diffusers", "memory_gb", "rss_gb", "stall_s", "whole_s",
         "resume_s", "seconds", "seconds_a_clip", "steps_per_s", "of bare", "data_wait", "mfu")  # fmt: skip
"""Figures that are drawn, where a record has them."""
TITLES = {
    "step_s": "seconds of a step", "clips_per_s": "clips a second", "gb_per_s": "GB a second",
    "of raw": "of raw reads", "memory_gb": "memory, GB", "rss_gb": "growth of the process, GB",
    "stall_s": "seconds that training stops", "whole_s": "seconds until whole on disk", "resume_s": "seconds to resume",
    "seconds_a_clip": "seconds of a clip", "steps_per_s": "steps a second", "of bare": "of the bare loop's time",
    "data_wait": "share of waiting for data",
}  # fmt: skip
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
<title>sora bench</title><style>{{ style }}
.bars { display: grid; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.chart h3 { margin: 0 0 .5rem; }
.scroll { overflow-x: auto; } td, th { white-space: nowrap; padding: .15rem .6rem .15rem 0; text-align: left; }
</style></head><body>
<h1>sora bench</h1>
<p>The newest record of each kind, {{ records | length }} of {{ count }} in {{ path }}. Bars are medians, lines go from
the lowest to the highest.</p>
{% for record in records %}
<h2>{{ record.what }}</h2>
<div class="bars">{% for title, drawing in record.drawings %}
<div class="chart"><h3>{{ title }}</h3>{{ drawing }}</div>{% endfor %}</div>
{% if record.names %}<div class="scroll"><table>
<tr>{% for name in record.names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in record.cells %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
<ul class="faint">{% for note in record.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% if record.failed %}<ul class="flaws">{% for line in record.failed %}<li>failed: {{ line }}</li>{% endfor %}</ul>
{% endif %}
<p class="faint"><code>{{ record.command }}</code>{{ record.origin }}</p>
{% endfor %}
</body></html>
"""


def write_page(records: str | Path, page: str | Path) -> Path:
    """Writes a page of the newest record of each kind in a file. UserError where either can't be read or written."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    found = read_records(records)
    newest = {record["what"]: record for record in found}  # the last one of a kind stays
    shown = [
        {
            "what": record["what"],
            "drawings": [(title, Markup(svg)) for title, svg in drawings(record["rows"], f"r{i}")],
            "names": columns(record["rows"]),
            "cells": [[written(row.get(name)) for name in columns(record["rows"])] for row in record["rows"]],
            "notes": record.get("notes", []),
            "failed": record.get("failed", []),
            "command": record["command"],
            "origin": origin(record),
        }
        for i, record in enumerate(newest.values())
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    style = Markup(asset("page.css"))
    text = environment.from_string(PAGE).render(records=shown, style=style, path=str(records), count=len(found))
    place = Path(page).expanduser()
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{place} can't be written: {error.strerror or error}; name another with --report") from None
    return place


def drawings(rows: Sequence[Row], name: str) -> list[tuple[str, str]]:
    """Title and SVG of each figure of a record that is worth drawing."""
    labels = labels_of(rows)
    found: list[tuple[str, str]] = []
    for key in DRAWN:
        there = [(label, row[key]) for label, row in zip(labels, rows, strict=True) if row.get(key) is not None]
        if len(there) > 1:
            found.append((TITLES.get(key, key), bars(there, f"{name}{key}")))
    return found


def labels_of(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart: their words, but for those that all have alike."""
    words = [name for name in columns(rows) if all(isinstance(row.get(name), str | int | None) for row in rows)]
    telling = [name for name in words if len({str(row.get(name)) for row in rows}) > 1] or words[:1]
    return [", ".join(str(row[name]) for name in telling if row.get(name) is not None) for row in rows]


def bars(values: Sequence[tuple[str, Any]], name: str) -> str:
    """Bars that lie, as an SVG element; ids inside are made from `name`."""
    from matplotlib import rc_context  # here: importing it takes a second
    from matplotlib.figure import Figure

    colours = Colours()
    ink = colours.of(INK)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}
    with rc_context({**settings, "text.color": ink, "axes.edgecolor": ink, "xtick.labelcolor": colours.of("faint"),
                     "ytick.labelcolor": ink}):  # fmt: skip
        height = 0.34 * len(values) + 0.4
        figure = Figure(figsize=(5.4, height))
        axes = figure.add_axes((0.4, 0.3 / height, 0.48, 1 - 0.35 / height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        for i, (_, value) in enumerate(values):
            middle = value["median"] if isinstance(value, dict) else float(value)
            high = value["high"] if isinstance(value, dict) else middle
            axes.barh(i, middle, color=colours.of(RUNS[i % len(RUNS)]), height=0.62)
            if isinstance(value, dict) and value["n"] > 1:
                axes.plot([value["low"], high], [i, i], color=ink, linewidth=1)
            axes.annotate(written(middle), (max(high, middle), i), (4, 0), textcoords="offset points", va="center",
                          color=ink)  # fmt: skip
        # A first turn that took far longer must not flatten the rest.
        middles = [value["median"] if isinstance(value, dict) else float(value) for _, value in values]
        highs = [value["high"] if isinstance(value, dict) else float(value) for _, value in values]
        limit = min(max(highs), 3 * max(max(middles), statistics.median(highs)))
        axes.set_xlim(min(0.0, *middles), limit * 1.02 or 1.0)
        axes.set_yticks(range(len(values)), [shortened(label) for label, _ in values])
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return colours.back(for_page(buffer.getvalue(), name))


def shortened(label: str) -> str:
    """As much of a label as has room beside a bar."""
    return label if len(label) <= 34 else label[:33] + "…"
