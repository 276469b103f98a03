"""What a model will be shown, as one page: `sora inspect --html`. Clips are decoded back from their latents.

Each stands beside its captions and, where the source is still there, above the source's own frames; PSNR between the
two says what the VAE loses. The page holds everything, fetches nothing, and escapes everything.
"""

from __future__ import annotations

import datetime
import statistics
from collections import Counter
from importlib import resources

import yaml
from jinja2 import Environment, StrictUndefined
from pyarrow import fs

from data_prep.inspect.previews import sheets_of
from data_prep.inspect.table import KINDS, MOST_LOST, Inventory, counts_of, take_inventory
from sora_train.errors import UserError, one_line
from sora_train.manifest import Manifest
from sora_train.report import style_sheet
from sora_train.schema import bucket_size
from sora_train.storage import atomic_write, in_bytes, resolve, storage_errors

BARS = 40


def write_page(folder: str, out: str, clips: int = 12, root: str = "", models: str = "") -> str:
    """Writes the page to the path or URI `out` and returns it; `clips` of each bucket are decoded, evenly drawn.

    `root` is where the sources are, if not where they were; `models` the folder of downloaded networks. Raises
    UserError where the shards, their VAE or `out` is no good; a source that can't be had is a remark on the page.
    """
    system, path = resolve(out)
    with storage_errors(out, "written"):
        if system.get_file_info(path).type == fs.FileType.Directory:
            raise UserError(f"--html: {out} is a folder; name a file, such as {out.rstrip('/')}/inspect.html")
    inventory = take_inventory(folder)
    manifest = inventory.manifest or (Manifest.load(folder) if inventory.rows else None)  # it says what is wrong
    sheets = list(sheets_of(inventory, manifest, clips, root, models)) if manifest else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["decibels"] = decibels
    template = resources.files("data_prep.inspect").joinpath("gallery.html").read_text(encoding="utf-8")
    html = environment.from_string(template).render(**contents(inventory, manifest, sheets))
    atomic_write(system, path, html.encode("utf-8", "replace"))
    return out


def contents(inventory: Inventory, manifest: Manifest | None, sheets: list[dict]) -> dict:
    """The template's variables."""
    counts = counts_of(inventory)
    seconds, limit = counts["seconds"], counts["captions_at_limit"]
    note = f"{limit:.1%} are at the limit of {counts['max_tokens']}" if limit else ""
    facts = [(f"{counts[name]:,}", name) for name in ("asked", "written", *KINDS)]
    facts.append((f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s", "of video"))
    facts.append((in_bytes(counts["bytes"]), f"in {counts['shards']:,} shards"))
    measured = [clip["psnr"] for sheet in sheets for clip in sheet["clips"] if clip["psnr"] is not None]
    if measured:
        facts.append((decibels(statistics.median(measured)), f"median PSNR of {len(measured)} clips"))
    charts = [
        chart("Tokens of a caption", inventory.lengths.tokens, note),
        chart("Seconds of a clip", inventory.lengths.seconds),
        chart("Captions of a clip", inventory.lengths.captions),
    ]
    first = [row | {"rank": rank} for rows in inventory.lost.values() for rank, row in enumerate(rows)]
    shown = sorted(first, key=lambda row: row["rank"])[:MOST_LOST]  # of every reason some
    shown.sort(key=lambda row: (row["kind"] != KINDS[0], row["reason"]))
    return {
        "name": one_line(inventory.folder),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": style_sheet(),  # the style sheet of a run's report: both pages look alike
        "counts": counts,
        "facts": facts,
        "made_by": made_by(manifest) if manifest else [],
        "settings": yaml.safe_dump(manifest.settings, sort_keys=False, allow_unicode=True) if manifest else "",
        "buckets": bucket_rows(counts["buckets"], manifest) if manifest else [],
        "charts": [one for one in charts if one and (one["note"] or one["low"] < one["high"])],
        "sheets": sheets,
        "lost": [{key: one_line(str(value)[:400]) for key, value in row.items()} for row in shown],
        "more_lost": inventory.kinds.total() - len(shown),
    }


def made_by(manifest: Manifest) -> list[tuple[str, str]]:
    """What a shard set came from, in words."""
    vae, text, moments = manifest.vae, manifest.text, manifest.latents.moments
    squeezed = f"{vae.factor} x {vae.factor} pixels" + (f" x {vae.time_factor} frames" if vae.time_factor > 1 else "")
    stored = "mean and log-variance of the posterior" if moments == 2 else "one value each, no posterior"
    return [
        ("VAE", f"{vae.name}, {vae.precision}, {vae.channels} channels for {squeezed}"),
        ("VAE hash", vae.hash),
        ("latents", f"{manifest.latents.dtype}, {stored}"),
        ("text encoder", f"{text.name}, {text.precision}, width {text.width}, at most {text.max_tokens} tokens"),
        ("text encoder hash", text.hash),
        ("encoding hash", manifest.encoding_hash),
        ("frames per second", f"{manifest.fps:g}"),
    ]


def bucket_rows(buckets: dict[str, int], manifest: Manifest) -> list[dict]:
    """Each bucket's shape, and its clips as a share of the fullest one's."""
    rows = []
    for name, count in buckets.items():
        frames, height, width = bucket_size(name)
        side = 26 / max(height, width)
        rows.append(
            {
                "name": name,
                "clips": count,
                "share": 100 * count / max(1, *buckets.values()),
                "frames": frames,
                "seconds": f"{frames / manifest.fps:.3g} s" if frames > 1 else "still",
                "box": (round(width * side), round(height * side)),
            }
        )
    return rows


def chart(title: str, counter: Counter, note: str = "") -> dict | None:
    """A histogram of values that occur so often: bars of equal width, those of whole numbers whole."""
    if not counter:
        return None
    low, high = min(counter), max(counter)
    whole = all(isinstance(value, int) for value in counter)
    step = -(-(high - low + 1) // BARS) if whole else (high - low) / BARS or 1.0
    counts: Counter[int] = Counter()
    for value, count in counter.items():
        counts[min(int((value - low) / step), BARS - 1)] += count
    bars = []
    for i in range(int((high - low) / step) + 1 if whole else BARS):
        start, end = low + i * step, low + (i + 1) * step - (1 if whole else 0)
        label = f"{start:.4g}" if start == end else f"{start:.4g} to {end:.4g}"
        bars.append({"label": f"{label}: {counts[i]:,}", "height": 100 * counts[i] / max(counts.values())})
    return {"title": title, "low": low, "high": high, "note": note, "bars": bars, "most": max(counts.values())}


def decibels(psnr: float) -> str:
    return "identical" if psnr == float("inf") else f"{psnr:.1f} dB"
