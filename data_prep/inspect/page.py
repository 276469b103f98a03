"""`sora inspect --html`: one page with counts, histograms and previews. It fetches nothing and escapes everything."""

from __future__ import annotations

import datetime
import statistics
from collections import Counter
from importlib import resources

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from pyarrow import fs

from data_prep.inspect.previews import previews
from data_prep.inspect.table import KINDS, MAX_EXAMPLES, Inventory, counts_of, read_inventory
from sora_train.errors import UserError, one_line
from sora_train.manifest import Manifest
from sora_train.report import style_sheet
from sora_train.schema import bucket_size
from sora_train.storage import atomic_write, in_bytes, resolve, storage_errors

BARS = 40
CHARTS = {
    "caption_tokens": "Tokens of a caption",
    "clip_seconds": "Seconds of a clip",
    "captions_of_a_clip": "Captions of a clip",
}


def write_page(folder: str, out: str, clips: int = 12, root: str = "", models: str = "") -> str:
    """Writes the page to the path or URI `out` and returns it, with `clips` evenly spaced clips of each bucket.

    `root` is the folder of the sources if they have moved, `models` that of downloaded models. Raises UserError if the
    shards, their VAE or `out` are unusable. A source that can't be read becomes a remark on the page.
    """
    system, path = resolve(out)
    with storage_errors(out, "written"):
        if system.get_file_info(path).type == fs.FileType.Directory:
            raise UserError(f"--html: {out} is a folder. Name a file, such as {out.rstrip('/')}/inspect.html")
    inventory = read_inventory(folder)
    manifest = inventory.manifest or (Manifest.load(folder) if inventory.rows else None)  # load raises UserError
    shown = list(previews(inventory, manifest, clips, root, models)) if manifest else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["decibels"] = decibels
    template = resources.files("data_prep.inspect").joinpath("page.html").read_text(encoding="utf-8")
    html = environment.from_string(template).render(**template_variables(inventory, manifest, shown))
    atomic_write(system, path, html.encode("utf-8", "replace"))
    return out


def template_variables(inventory: Inventory, manifest: Manifest | None, shown: list[dict]) -> dict:
    """All that page.html shows."""
    counts = counts_of(inventory)
    seconds, limit = counts["seconds"], counts["captions_at_limit"]
    facts = [(f"{counts[name]:,}", name) for name in ("asked", "written", *KINDS)]
    facts.append((f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s", "of video"))
    facts.append((in_bytes(counts["bytes"]), f"in {counts['shards']:,} shards"))
    measured = [clip["psnr"] for bucket in shown for clip in bucket["clips"] if clip["psnr"] is not None]
    if measured:
        facts.append((decibels(statistics.median(measured)), f"median PSNR of {len(measured)} clips"))
    notes = {"caption_tokens": f"{limit:.1%} are at the limit of {counts['max_tokens']}"} if limit else {}
    charts = [histogram(title, inventory.lengths[name], notes.get(name, "")) for name, title in CHARTS.items()]
    dropped = dropped_examples(inventory)
    return {
        "name": one_line(inventory.folder),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": style_sheet(),
        "counts": counts,
        "facts": facts,
        "made_by": provenance(manifest) if manifest else [],
        "settings": yaml.safe_dump(manifest.settings, sort_keys=False, allow_unicode=True) if manifest else "",
        "buckets": bucket_rows(counts["buckets"], manifest) if manifest else [],
        "charts": [chart for chart in charts if chart and (chart["note"] or chart["low"] < chart["high"])],
        "sheets": shown,
        "lost": dropped,
        "more_lost": inventory.reasons.total() - len(dropped),
    }


def dropped_examples(inventory: Inventory) -> list[dict]:
    """Up to MAX_EXAMPLES quarantine rows, some of every reason."""
    ranked = [(rank, row) for rows in inventory.examples.values() for rank, row in enumerate(rows)]
    rows = [row for _, row in sorted(ranked, key=lambda item: item[0])[:MAX_EXAMPLES]]
    rows.sort(key=lambda row: (row["kind"] != KINDS[0], row["reason"]))
    return [{key: one_line(str(value)[:400]) for key, value in row.items()} for row in rows]


def provenance(manifest: Manifest) -> list[tuple[str, str]]:
    """The VAE, text encoder and formats of a shard set, in words."""
    vae, text, moments = manifest.vae, manifest.text, manifest.latents.moments
    patch = f"{vae.factor} x {vae.factor} pixels" + (f" x {vae.time_factor} frames" if vae.time_factor > 1 else "")
    stored = "mean and log-variance of the posterior" if moments == 2 else "one value each, no posterior"
    return [
        ("VAE", f"{vae.name}, {vae.precision}, {vae.channels} channels for {patch}"),
        ("VAE hash", vae.hash),
        ("latents", f"{manifest.latents.dtype}, {stored}"),
        ("text encoder", f"{text.name}, {text.precision}, width {text.width}, at most {text.max_tokens} tokens"),
        ("text encoder hash", text.hash),
        ("encoding hash", manifest.encoding_hash),
        ("frames per second", f"{manifest.fps:g}"),
    ]


def bucket_rows(buckets: dict[str, int], manifest: Manifest) -> list[dict]:
    """Each bucket's shape, and its clips as a percentage of the largest bucket's."""
    rows = []
    for name, count in buckets.items():
        frames, height, width = bucket_size(name)
        side = 26 / max(height, width)
        rows.append(
            {
                "name": name,
                "clips": count,
                "share": 100 * count / max(1, *buckets.values()),
                "seconds": f"{frames / manifest.fps:.3g} s" if frames > 1 else "still",
                "box": (round(width * side), round(height * side)),
            }
        )
    return rows


def histogram(title: str, counter: Counter, note: str = "") -> dict | None:
    """Bars of equal width; of integers, each bar covers the same number of them."""
    if not counter:
        return None
    low, high = min(counter), max(counter)
    whole = all(isinstance(value, int) for value in counter)
    step = -(-(high - low + 1) // BARS) if whole else (high - low) / BARS or 1.0
    bars = int((high - low) / step) + 1 if whole else BARS
    places = [min(int((value - low) / step), bars - 1) for value in counter]
    counts = np.bincount(places, weights=list(counter.values()), minlength=bars).astype(int)
    drawn = []
    for i, count in enumerate(counts):
        start, end = low + i * step, low + (i + 1) * step - whole
        label = f"{start:.4g}" if start == end else f"{start:.4g} to {end:.4g}"
        drawn.append({"label": f"{label}: {count:,}", "height": 100 * count / counts.max()})
    return {"title": title, "low": low, "high": high, "note": note, "bars": drawn, "most": counts.max()}


def decibels(psnr: float) -> str:
    """PSNR as text."""
    return "identical" if psnr == float("inf") else f"{psnr:.1f} dB"
