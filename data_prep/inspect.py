"""What a folder of shards holds, by its footers and its quarantine: `sora inspect`."""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from sora_train.errors import UserError
from sora_train.places import read_bytes, resolve
from sora_train.schema import bucket_of, shard_files


def inspect(folder: str) -> dict:
    """`rows`, `written`, `quarantined`, `filtered`, `buckets` (rows of each), `reasons` (clips of each).

    Raises UserError where the folder holds neither shards nor a quarantine.
    """
    system, path = resolve(folder)
    buckets: Counter[str] = Counter()
    if system.get_file_info(path).type == fs.FileType.File:
        raise UserError(f"{folder} is a file; name the folder of the shards (data.output)")
    for file in shard_files(folder):
        try:
            with system.open_input_file(file) as opened:
                buckets[bucket_of(file)] += pq.read_metadata(opened).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"shard {file} can't be read ({error}); delete it and run `sora prep` again") from None
    content = read_bytes(system, f"{path}/quarantine.parquet")
    if content is None and not buckets:
        inner = f"; its shards are in {folder}/shards" if shard_files(f"{folder}/shards") else ""
        raise UserError(f"{folder} holds no shards{inner or '; encode clips into it with `sora prep RECIPE`'}")
    lost = (
        pq.read_table(io.BytesIO(content), columns=["kind", "reason"]).to_pydict()
        if content
        else {"kind": [], "reason": []}
    )
    kinds, written = Counter(lost["kind"]), sum(buckets.values())
    return {
        "rows": written + kinds["quarantined"] + kinds["filtered"],
        "written": written,
        "quarantined": kinds["quarantined"],
        "filtered": kinds["filtered"],
        "buckets": dict(sorted(buckets.items())),
        "reasons": dict(sorted(Counter(lost["reason"]).items())),
    }


def format_table(counts: dict) -> str:
    """The same for people."""
    lines = [f"{name:<24}{counts[name]:>10}" for name in ("rows", "written", "quarantined", "filtered")]
    for title in ("buckets", "reasons"):
        lines += (
            ["", title, *(f"  {name:<22}{count:>10}" for name, count in counts[title].items())] if counts[title] else []
        )
    return "\n".join(lines)
