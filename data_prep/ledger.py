"""What earlier runs found out: which clips each source was cut into, and why some of them are not in the shards.

`sources.parquet` and `quarantine.parquet` beside the shards, each written whole. Losing them costs time, never a clip:
a source without a record is opened again, and those of its clips that the shards hold are left alone.
"""

from __future__ import annotations

import io
from collections.abc import Container
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.reasons import PERMANENT
from sora_train.schema import QUARANTINE_SCHEMA
from sora_train.storage import atomic_write, resolve, storage_errors

SETTINGS_KEY = b"settings_hash"
SOURCES_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("source_size", pa.int64()),
        ("source_version", pa.string()),
        ("sample_ids", pa.list_(pa.string())),
        ("remarks", pa.list_(pa.string())),
    ]
)


@dataclass(slots=True)
class SourceRecord:
    """A source that was gone through to its end: the file as it was, the ids of all clips asked of it, and remarks.

    Remarks are names of `reasons.REMARKS`.
    """

    source: str
    size: int
    version: str
    sample_ids: list[str]
    remarks: list[str] = field(default_factory=list)


@dataclass
class SavedProgress:
    """Records by `row_id`, and rows of the quarantine by `sample_id`."""

    records: dict[str, SourceRecord] = field(default_factory=dict)
    failures: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str, settings_hash: str) -> SavedProgress:
        """What runs with the same settings wrote; empty where there is nothing, or nothing that can be read."""
        sources, failures = (_read(folder, name, settings_hash) for name in ("sources", "quarantine"))
        records = {
            row["row_id"]: SourceRecord(
                row["source"], row["source_size"], row["source_version"], row["sample_ids"], row.get("remarks") or []
            )
            for row in sources
        }
        return cls(records, {row["sample_id"]: row for row in failures})

    def permanent_failure(self, sample_id: str, held: Container[str]) -> dict | None:
        """The failure of a clip, where trying again would find the same."""
        failure = self.failures.get(sample_id)
        if failure is None or failure["reason"] not in PERMANENT:
            return None
        return failure if not failure["duplicate_of"] or failure["duplicate_of"] in held else None


def save_progress(folder: str, settings_hash: str, records: dict[str, SourceRecord], failures: list[dict]) -> None:
    """Writes both files; the quarantine first, since a record says that the failures of its source are known."""
    _write(folder, "quarantine", failures, QUARANTINE_SCHEMA, settings_hash)
    rows = [
        {"row_id": row_id, "source": record.source, "source_size": record.size, "source_version": record.version,
         "sample_ids": record.sample_ids, "remarks": record.remarks}
        for row_id, record in records.items()
    ]  # fmt: skip
    _write(folder, "sources", rows, SOURCES_SCHEMA, settings_hash)


def _read(folder: str, name: str, settings_hash: str) -> list[dict]:
    system, path = resolve(folder)
    file = f"{path}/{name}.parquet"
    with storage_errors(file, "read", system):
        if system.get_file_info(file).type != fs.FileType.File:
            return []
        # Not `pq.read_table`, nor bytes of Python's: its threads may still hold them when a refused command ends, and
        # to let go of them while the interpreter shuts down aborts the process.
        with system.open_input_file(file) as opened:
            try:
                table = pq.ParquetFile(opened, pre_buffer=False).read(use_threads=False)
            except (pa.ArrowInvalid, OSError):
                table = None  # damaged
    if table is None or (table.schema.metadata or {}).get(SETTINGS_KEY, b"").decode() != settings_hash:
        return []
    return table.to_pylist()


def _write(folder: str, name: str, rows: list[dict], schema: pa.Schema, settings_hash: str) -> None:
    system, path = resolve(folder)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata({SETTINGS_KEY: settings_hash.encode()})), sink)
    atomic_write(system, f"{path}/{name}.parquet", sink.getvalue())
