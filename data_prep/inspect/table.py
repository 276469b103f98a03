"""What a folder of shards holds and what was left out, without touching a latent: `sora inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.reasons import REMARKS
from data_prep.shards import manifest_or_none
from sora_train.errors import UserError, one_line
from sora_train.manifest import Manifest
from sora_train.schema import bucket_of, shard_files
from sora_train.storage import in_bytes, resolve, storage_errors

COLUMNS = ["captions", "tokens", "start_s", "end_s"]
AT_ONCE = 8  # shards that are read at a time: on remote storage each is a wait
MOST_LOST = 200  # rows of the quarantine that are kept of each reason, to be shown
KINDS = ("quarantined", "filtered")


@dataclass
class Lengths:
    """How often each value occurs among the clips: a whole distribution in little memory."""

    seconds: Counter[float] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # of a clip
    words: Counter[int] = field(default_factory=Counter)  # of a caption
    tokens: Counter[int] = field(default_factory=Counter)  # of a caption, as the text encoder got it

    def add(self, other: Lengths) -> None:
        for name, counter in vars(other).items():
            getattr(self, name).update(counter)


@dataclass
class Inventory:
    """All that counting finds out. `lost` holds the first MOST_LOST rows of the quarantine for each reason."""

    folder: str
    manifest: Manifest | None
    rows: dict[str, int] = field(default_factory=dict)  # of each shard's file
    size: int = 0  # bytes of all shards
    buckets: Counter[str] = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (kind, reason)
    lost: dict[tuple[str, str], list[dict]] = field(default_factory=dict)


def inspect(folder: str) -> dict:
    """What `sora inspect --json` prints; see `counts_of`. Raises UserError as `take_inventory` does."""
    return counts_of(take_inventory(folder))


def take_inventory(folder: str) -> Inventory:
    """Counts a folder's clips and its quarantine, shard by shard, by the few columns that say how long things are.

    Raises UserError where the folder holds neither shards nor a quarantine, or something that can't be read.
    """
    system, path = resolve(folder)
    with storage_errors(folder, "read"):
        if system.get_file_info(path).type == fs.FileType.File:
            raise UserError(f"{folder} is a file; name the folder of the shards (data.output)")
        files, manifest = shard_files(folder), manifest_or_none(folder)
    inventory = Inventory(folder, manifest)
    inventory.buckets.update(dict.fromkeys(manifest.buckets if manifest else (), 0))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for file, (rows, size, lengths) in zip(
            files, pool.map(lambda file: lengths_of(system, file), files), strict=True
        ):
            inventory.rows[file] = rows
            inventory.size += size
            inventory.buckets[bucket_of(file)] += rows
            inventory.lengths.add(lengths)
    has_quarantine = read_quarantine(inventory, system, f"{path}/quarantine.parquet")
    if not files and not has_quarantine:
        inner = f"; its shards are in {folder}/shards" if shard_files(f"{folder}/shards") else ""
        raise UserError(f"{folder} holds no shards{inner or '; encode clips into it with `sora prep RECIPE`'}")
    for bucket in inventory.buckets:
        if not re.fullmatch(r"\d+x\d+x\d+", bucket):
            raise UserError(f"{folder}/bucket={bucket} is no bucket FRAMESxHEIGHTxWIDTH; move its files elsewhere")
    return inventory


def lengths_of(system: fs.FileSystem, file: str) -> tuple[int, int, Lengths]:
    """Rows of a shard, its bytes, and its lengths. Raises UserError where it can't be read."""
    found = Lengths()
    try:
        with system.open_input_file(file) as opened:
            parquet = pq.ParquetFile(opened)
            for batch in parquet.iter_batches(columns=COLUMNS, use_threads=False):
                captions, tokens = batch.column("captions"), batch.column("tokens")
                split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.list_flatten(captions)))
                seconds = pc.subtract(batch.column("end_s"), batch.column("start_s"))
                found.seconds.update(values(pc.round(seconds, 6)))  # 4.5 - 3.5 and 2.1 - 1.1 are one length
                found.captions.update(values(pc.list_value_length(captions)))
                found.words.update(values(pc.list_value_length(split)))
                found.tokens.update(values(pc.list_flatten(tokens)))
            return parquet.metadata.num_rows, opened.size(), found
    except (pa.ArrowException, OSError, KeyError) as error:
        raise unreadable(file, error) from None


def values(array: pa.Array) -> list:
    """What stands in a column, where something does."""
    return array.drop_null().to_pylist()


def unreadable(file: str, error: Exception) -> UserError:
    """What a shard that is broken, or no shard, is reported as."""
    return UserError(f"shard {file} can't be read ({error}); delete it and run `sora prep` again")


def read_quarantine(inventory: Inventory, system: fs.FileSystem, file: str) -> bool:
    """Counts what the quarantine names; whether there is one. Raises UserError where it can't be read."""
    if system.get_file_info(file).type != fs.FileType.File:
        return False
    columns = ["source", "start_s", "end_s", "stage", "kind", "reason", "message"]
    try:
        with system.open_input_file(file) as opened:
            for batch in pq.ParquetFile(opened).iter_batches(columns=columns):
                for row in batch.to_pylist():
                    key = (row["kind"], row["reason"])
                    inventory.kinds[row["kind"]] += 1
                    inventory.reasons[key] += 1
                    kept = inventory.lost.setdefault(key, [])
                    if len(kept) < MOST_LOST:
                        kept.append(row)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{file} can't be read ({error}); delete it and run `sora prep` again") from None
    return True


def counts_of(inventory: Inventory) -> dict:
    """Counts by name, in clips unless the name says otherwise.

    `asked` = `written` + `quarantined` + `filtered`; `settled` is false where no run came to its end over these shards.
    `captions_at_limit` is the share of captions with as many tokens as the text encoder takes: all but a few are cut.
    """
    lengths, manifest, written = inventory.lengths, inventory.manifest, sum(inventory.rows.values())
    lost = {kind: inventory.kinds[kind] for kind in KINDS}
    captions, most = lengths.tokens.total(), manifest.text.max_tokens if manifest else 0
    at_limit = sum(count for tokens, count in lengths.tokens.items() if tokens >= most) / max(1, captions)
    return {
        "asked": written + sum(lost.values()),
        "written": written,
        **lost,
        "buckets": {name: inventory.buckets[name] for name in sorted(inventory.buckets, key=by_numbers)},
        "seconds": round(sum(value * count for value, count in lengths.seconds.items()), 3),
        "clip_seconds": spread(lengths.seconds),
        "captions": captions,
        "captions_of_a_clip": spread(lengths.captions),
        "caption_words": spread(lengths.words),
        "caption_tokens": spread(lengths.tokens),
        "max_tokens": most or None,
        "captions_at_limit": round(at_limit, 6) if most else None,
        "bytes": inventory.size,
        "shards": len(inventory.rows),
        "remarks": manifest.remarks if manifest else {},
        "settled": manifest is not None and sum(lost.values()) + written == manifest.counts.asked,
        "reasons": {
            kind: {
                reason: {"clips": count, "example": example(inventory.lost[which, reason][0])}
                for (which, reason), count in sorted(inventory.reasons.items())
                if which == kind
            }
            for kind in KINDS
        },
    }


def by_numbers(bucket: str) -> tuple[int, ...]:
    """Sorts 8x64x64 before 16x64x64."""
    return tuple(int(number) for number in bucket.split("x"))


def spread(counter: Counter) -> dict[str, float] | None:
    """Smallest, median and largest of values that occur so often; None where there are none."""
    values, total = sorted(counter), counter.total()
    if not total:
        return None

    def at(place: int) -> float:
        for value in values:
            place -= counter[value]
            if place < 0:
                return value
        raise IndexError(place)

    return {"min": values[0], "median": (at((total - 1) // 2) + at(total // 2)) / 2, "max": values[-1]}


def example(row: dict) -> str:
    """`clips/a.mp4: what was wrong with it`, made harmless for a terminal."""
    return one_line(f"{row['source']}: {row['message']}"[:300])


def check_shards(folder: str) -> None:
    """Reads all there is in the shards. Raises UserError that names those whose bytes are not what was written."""
    system, _ = resolve(folder)
    damaged: list[str] = []
    for file in shard_files(folder):
        try:
            with system.open_input_file(file) as opened:
                parquet = pq.ParquetFile(opened, page_checksum_verification=True)
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            damaged.append(f"{file} ({' '.join(str(error).split())})")
    if damaged:
        raise UserError(f"damaged: {'; '.join(damaged)}. Delete these files and run `sora prep` again")


def format_table(counts: dict) -> str:
    """The same for people."""
    return "\n".join(table_lines(counts))


def table_lines(counts: dict) -> Iterator[str]:
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
        for name in ("clip_seconds", "captions_of_a_clip", "caption_words", "caption_tokens"):
            low, median, high = (f"{counts[name][key]:,.6g}" for key in ("min", "median", "max"))
            yield f"{name.replace('_', ' '):<24}{low:>12}{median:>10}{high:>10}{notes.get(name, '')}"
        yield f"\n{'on disk':<24}{in_bytes(counts['bytes']):>12} in {counts['shards']:,} shards"
    for kind in KINDS:
        if counts["reasons"][kind]:
            yield f"\n{kind}"
            for reason, lost in counts["reasons"][kind].items():
                yield f"  {reason:<22}{lost['clips']:>12,}  {lost['example']}"
    if counts["remarks"]:
        yield "\nremarks (sources)"
        for kind, sources in counts["remarks"].items():
            yield f"  {kind:<22}{sources:>12,}  {REMARKS.get(kind, '')}"
    if not counts["settled"]:
        yield (
            "\nthese are not the clips that manifest.json counts: a run is under way or was stopped, or a shard is "
            "gone; `sora prep` makes what is missing"
        )
