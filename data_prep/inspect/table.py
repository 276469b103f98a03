"""`sora inspect`: counts clips and dropped rows of a shard folder, without reading latents."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.reasons import REMARKS
from data_prep.shards import manifest_or_none
from sora_train.data.opening import check_columns
from sora_train.errors import UserError, one_line
from sora_train.manifest import Manifest
from sora_train.schema import bucket_of, bucket_size, shard_files
from sora_train.shard_list import dropped_rows, without_rows
from sora_train.storage import in_bytes, resolve, storage_errors

COLUMNS = ["captions", "tokens", "start_s", "end_s"]
QUARANTINE_COLUMNS = ["source", "start_s", "end_s", "stage", "kind", "reason", "message"]
LENGTHS = ("clip_seconds", "captions_of_a_clip", "caption_words", "caption_tokens")
READ_AT_ONCE = 8  # shards in parallel, since remote storage takes long to answer
MAX_EXAMPLES = 20  # rows of the quarantine for each reason
KINDS = ("quarantined", "filtered")


@dataclass
class Inventory:
    """All counts of a shard folder. `lengths` has the values of LENGTHS."""

    folder: str
    manifest: Manifest | None
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each shard file, without dropped ones."""
    dropped: dict[str, np.ndarray] = field(default_factory=dict)
    """Rows of shard files that the index drops."""
    size: int = 0
    """Bytes of all shards."""
    buckets: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Clips by (kind, reason)."""
    examples: defaultdict[tuple[str, str], list[dict]] = field(default_factory=lambda: defaultdict(list))
    """The first MAX_EXAMPLES quarantine rows for each of `reasons`."""


def inspect(folder: str) -> dict:
    """What `sora inspect --json` prints; see `counts_of`. Raises UserError as `read_inventory` does."""
    return counts_of(read_inventory(folder))


def read_inventory(folder: str) -> Inventory:
    """Counts a folder's clips and its quarantine.

    Raises UserError if the folder has neither shards nor a quarantine, or one that can't be read.
    """
    system, path = resolve(folder)
    with storage_errors(folder, "read"):
        if system.get_file_info(path).type == fs.FileType.File:
            raise UserError(f"{folder} is a file. Name the folder of the shards (data.output)", code="shards")
        files, manifest = shard_files(folder), manifest_or_none(folder)
    inventory = Inventory(folder, manifest, dropped=dropped_rows(folder))
    inventory.buckets.update(dict.fromkeys(manifest.buckets if manifest else (), 0))
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        read = list(pool.map(lambda file: _read_lengths(system, file, inventory.dropped.get(file)), files))
    for file, (rows, size, _) in zip(files, read, strict=True):
        inventory.rows[file] = rows
        inventory.size += size
        inventory.buckets[bucket_of(file)] += rows
    for name, arrays in zip(LENGTHS, zip(*(lengths for _, _, lengths in read), strict=True), strict=bool(read)):
        inventory.lengths[name] = np.concatenate(arrays)
    has_quarantine = _read_quarantine(inventory, system, f"{path}/quarantine.parquet")
    if not files and not has_quarantine:
        inner = f". Its shards are in {folder}/shards" if shard_files(f"{folder}/shards") else ""
        raise UserError(
            f"{folder} holds no shards{inner or '. Encode clips into it with `sora prep RECIPE`'}", code="shards"
        )
    for bucket in inventory.buckets:
        if not re.fullmatch(r"\d+x\d+x\d+", bucket):
            raise UserError(
                f"{folder}/bucket={bucket} is not a bucket FRAMESxHEIGHTxWIDTH. Move its files elsewhere", code="shards"
            )
    return inventory


def _read_lengths(system: fs.FileSystem, file: str, dropped: np.ndarray | None) -> tuple[int, int, list[np.ndarray]]:
    """Rows of a shard without dropped ones, its bytes, and the values of LENGTHS."""
    with opened_parquet(system, file) as (parquet, size):
        check_columns(file, parquet.schema_arrow)
        table = without_rows(parquet.read(columns=COLUMNS, use_threads=False), dropped)
        captions = table.column("captions")
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.list_flatten(captions)))
        lengths = (
            pc.round(pc.subtract(table.column("end_s"), table.column("start_s")), 6),  # 4.5 - 3.5 is 2.1 - 1.1
            pc.list_value_length(captions),
            pc.list_value_length(words),
            pc.list_flatten(table.column("tokens")),
        )
        return len(table), size, [column.drop_null().to_numpy() for column in lengths]


@contextmanager
def opened_parquet(system: fs.FileSystem, file: str) -> Iterator[tuple[pq.ParquetFile, int]]:
    """An opened Parquet file and its bytes. Raises UserError if it can't be read, also inside the block."""
    try:
        with system.open_input_file(file) as opened:
            yield pq.ParquetFile(opened), opened.size()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{file} can't be read ({error}). Delete it and run `sora prep` again", code="shards") from None


def _read_quarantine(inventory: Inventory, system: fs.FileSystem, file: str) -> bool:
    """Counts the rows of the quarantine; False if there is none."""
    if system.get_file_info(file).type != fs.FileType.File:
        return False
    with opened_parquet(system, file) as (parquet, _):
        for batch in parquet.iter_batches(columns=QUARANTINE_COLUMNS):
            for row in batch.to_pylist():
                key = (row["kind"], row["reason"])
                inventory.reasons[key] += 1
                if inventory.reasons[key] <= MAX_EXAMPLES:
                    inventory.examples[key].append(row)
    return True


def counts_of(inventory: Inventory) -> dict:
    """Counts by name, in clips unless the name says otherwise.

    `asked` = `written` + `quarantined` + `filtered`. `settled` is false if no run has finished over these shards.
    `dropped` clips are in the shards, but no longer count.
    `captions_at_limit` is the share of captions with as many tokens as the text encoder takes; most are truncated.
    """
    lengths = {name: inventory.lengths.get(name, np.zeros(0)) for name in LENGTHS}
    manifest, tokens, written = inventory.manifest, lengths["caption_tokens"], sum(inventory.rows.values())
    left_out = {kind: sum(n for (which, _), n in inventory.reasons.items() if which == kind) for kind in KINDS}
    max_tokens = manifest.text.max_tokens if manifest else 0
    at_limit = float((tokens >= max_tokens).mean()) if len(tokens) else 0.0
    return {
        "asked": written + sum(left_out.values()),
        "written": written,
        **left_out,
        "buckets": {name: inventory.buckets[name] for name in sorted(inventory.buckets, key=bucket_size)},
        "seconds": round(float(lengths["clip_seconds"].sum()), 3),
        "captions": len(tokens),
        **{name: min_median_max(values) for name, values in lengths.items()},
        "max_tokens": max_tokens or None,
        "captions_at_limit": round(at_limit, 6) if max_tokens else None,
        "bytes": inventory.size,
        "shards": len(inventory.rows),
        "dropped": sum(map(len, inventory.dropped.values())),
        "remarks": manifest.remarks if manifest else {},
        "settled": manifest is not None and sum(left_out.values()) + written == manifest.counts.asked,
        "reasons": {
            kind: {
                reason: {"clips": n, "example": _example(inventory.examples[which, reason][0])}
                for (which, reason), n in sorted(inventory.reasons.items())
                if which == kind
            }
            for kind in KINDS
        },
    }


def min_median_max(values: np.ndarray) -> dict[str, float] | None:
    """Statistics of values; None if there are no values."""
    if not len(values):
        return None
    return {"min": values.min().item(), "median": float(np.median(values)), "max": values.max().item()}


def _example(row: dict) -> str:
    """`clips/a.mp4: what was wrong with it`, safe to print."""
    return one_line(f"{row['source']}: {row['message']}"[:300])


def format_table(counts: dict) -> str:
    """The counts as text."""
    return "\n".join(_table_lines(counts))


def _table_lines(counts: dict) -> Iterator[str]:
    for name in ("asked", "written", *KINDS):
        yield f"{name:<24}{counts[name]:>12,}"
    if counts["buckets"]:
        yield "\nbuckets"
        for bucket, rows in counts["buckets"].items():
            yield f"  {bucket:<22}{rows:>12,}{'' if rows else '  empty'}"
    if counts["written"]:
        yield f"\n{'':<24}{'min':>12}{'median':>10}{'max':>10}"
        limit = counts["captions_at_limit"]
        notes = {"clip_seconds": f"  {counts['seconds'] / 3600:,.2f} h in total"}
        if limit is not None:
            notes["caption_tokens"] = f"  {limit:.1%} of the captions at the limit of {counts['max_tokens']}"
        for name in LENGTHS:
            low, median, high = (f"{counts[name][key]:,.6g}" for key in ("min", "median", "max"))
            yield f"{name.replace('_', ' '):<24}{low:>12}{median:>10}{high:>10}{notes.get(name, '')}"
        yield f"\n{'on disk':<24}{in_bytes(counts['bytes']):>12} in {counts['shards']:,} shards"
        if counts["dropped"]:
            yield f"{'dropped':<24}{counts['dropped']:>12,} clips more are in the shards and no longer count"
    for kind in KINDS:
        if counts["reasons"][kind]:
            yield f"\n{kind}"
            for reason, row in counts["reasons"][kind].items():
                yield f"  {reason:<22}{row['clips']:>12,}  {row['example']}"
    if counts["remarks"]:
        yield "\nremarks (sources)"
        for kind, sources in counts["remarks"].items():
            yield f"  {kind:<22}{sources:>12,}  {REMARKS.get(kind, '')}"
    if not counts["settled"]:
        yield (
            "\nthese are not the clips that manifest.json counts: a run is under way or was stopped, a shard is "
            "missing, or the index, which says what no longer counts. Run `sora prep`: it restores both"
        )
