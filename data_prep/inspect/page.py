"""`sora inspect --html`: one page with counts, histograms and previews. It fetches nothing and escapes everything."""

from __future__ import annotations

import datetime
import statistics
from importlib import resources
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from pyarrow import fs

from data_prep.inspect.previews import previews
from data_prep.inspect.table import KINDS, Inventory, counts_of, read_inventory
from sora_train.errors import UserError, one_line
from sora_train.manifest import Manifest
from sora_train.report import style_sheet
from sora_train.storage import atomic_write, draft_name, in_bytes, resolve, storage_errors, why_not_writable


def check_page(out: str) -> None:
    """Raises UserError if the page can't be written to the path or URI `out`. Leaves nothing behind."""
    system, path = resolve(out)
    with storage_errors(out, "written"):
        if system.get_file_info(path).type == fs.FileType.Directory:
            raise UserError(
                f"--html: {out} is a folder. Name a file, such as {out.rstrip('/')}/inspect.html", code="not_writable"
            )
        if not isinstance(system, fs.LocalFileSystem):
            draft = f"{path.rpartition('/')[0]}/{draft_name('page')}"
            system.open_output_stream(draft).close()
            system.delete_file(draft)
        elif why := why_not_writable(Path(path).parent):
            raise UserError(f"--html: {out} can't be written: {why}. Name another file", code="not_writable")


def write_page(folder: str, out: str, clips: int = 12, root: str = "", models: str = "") -> str:
    """Writes the page to the path or URI `out` and returns it, with `clips` evenly spaced clips of each bucket.

    `root` is the folder of the sources if they have moved, `models` that of downloaded models. Raises UserError if the
    shards, their VAE or `out` are unusable. A source that can't be read becomes a remark on the page.
    """
    check_page(out)
    inventory = read_inventory(folder)
    manifest = inventory.manifest or (Manifest.load(folder) if inventory.rows else None)  # load raises UserError
    shown = list(previews(inventory, manifest, clips, root, models)) if manifest else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = resources.files("data_prep.inspect").joinpath("page.html").read_text(encoding="utf-8")
    html = environment.from_string(template).render(**template_variables(inventory, manifest, shown))
    atomic_write(*resolve(out), html.encode("utf-8", "replace"))
    return out


def template_variables(inventory: Inventory, manifest: Manifest | None, shown: list[dict]) -> dict:
    """All that page.html shows."""
    counts = counts_of(inventory)
    seconds = counts["seconds"]
    facts = [(f"{counts[name]:,}", name) for name in ("asked", "written", *KINDS)]
    facts.append((f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s", "of video"))
    facts.append((in_bytes(counts["bytes"]), f"in {counts['shards']:,} shards"))
    measured = [clip["psnr"] for bucket in shown for clip in bucket["clips"] if clip["psnr"] is not None]
    if measured:
        facts.append((f"{statistics.median(measured):.1f} dB", f"median PSNR of {len(measured)} clips"))
    dropped = [row for _, rows in sorted(inventory.examples.items(), reverse=True) for row in rows]
    made_by = manifest.model_dump(mode="json", exclude={"empty_text", "buckets", "counts"}) if manifest else {}
    return {
        "name": one_line(inventory.folder),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": style_sheet(),
        "counts": counts,
        "facts": facts,
        "made_by": yaml.safe_dump(made_by, sort_keys=False, allow_unicode=True),
        "sheets": shown,
        "lost": [{key: one_line(str(value)[:400]) for key, value in row.items()} for row in dropped],
        "more_lost": inventory.reasons.total() - len(dropped),
    }
