"""Finished shards on storage: which clips they hold, how more are written, how outdated rows are taken out."""

from __future__ import annotations

import io
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.reasons import LASTING
from sora_train.errors import UserError
from sora_train.places import read_bytes, resolve, write_whole
from sora_train.schema import ENCODING_KEY, QUARANTINE_SCHEMA, ROW_GROUP, SHARD_SCHEMA, Manifest, shard_files

SHARD_ROWS = 8 * ROW_GROUP
PATIENCE_S = 60.0  # then a shard is written though it isn't full: so much work can be lost, not more


def finished_clips(folder: str, encoding_hash: str) -> dict[str, dict[str, tuple[str, int, str]]]:
    """Per shard, the `sample_id`s it holds with source, size and version of the file.

    Raises UserError for a shard of another encoding, or one that can't be read.
    """
    system, _ = resolve(folder)
    clips = {}
    for file in shard_files(folder):
        try:
            with system.open_input_file(file) as opened:
                table = pq.read_table(opened, columns=["sample_id", "source", "source_size", "source_version"])
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"data.output: shard {file} can't be read ({error}); delete it and run the same again"
            ) from None
        if (table.schema.metadata or {}).get(ENCODING_KEY, b"").decode() != encoding_hash:
            raise UserError(
                f"data.output: {folder} holds shards of another encoding ({file.rpartition('/')[2]}): other frames, "
                "fps, size, VAE, text encoder, or code version. Encodings never mix: set data.output to another "
                "folder, or delete this one to encode anew"
            )
        columns = [table.column(name).to_pylist() for name in table.column_names]
        clips[file] = {sample: (source, size, version) for sample, source, size, version in zip(*columns, strict=True)}
    return clips


def take_out(folder: str, file: str, sample_ids: set[str]) -> None:
    """Writes a shard again without these clips, or deletes it where nothing is left."""
    system, _ = resolve(folder)
    with system.open_input_file(file) as opened:
        table = pq.read_table(opened)
    keep = [sample not in sample_ids for sample in table.column("sample_id").to_pylist()]
    if any(keep):
        _write(system, file, table.filter(pa.array(keep)))
    else:
        system.delete_file(file)


def sweep(folder: str) -> None:
    """Deletes what a killed run left unfinished."""
    system, path = resolve(folder)
    for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True)):
        if info.type == fs.FileType.File and info.base_name.startswith(".unfinished-"):
            system.delete_file(info.path)


class ShardWriter:
    """Gathers rows of one bucket and writes them as shards, each whole or not at all."""

    def __init__(self, folder: str, bucket: str, encoding_hash: str):
        self.system, path = resolve(folder)
        self.folder = f"{path}/bucket={bucket}"
        self.schema = SHARD_SCHEMA.with_metadata({ENCODING_KEY: encoding_hash.encode()})
        names = [file.rpartition("/")[2] for file in shard_files(folder)]
        self.next = 1 + max((int(name.split("-")[1]) for name in names if name.startswith("part-")), default=-1)
        self.rows: list[pa.Table] = []
        self.count = 0
        self.written_at = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        """Takes rows of SHARD_SCHEMA; writes a shard when enough came together, always of whole row groups."""
        self.rows.append(rows)
        self.count += len(rows)
        while self.count >= SHARD_ROWS:
            self._write_first(SHARD_ROWS)
        if self.count >= ROW_GROUP and time.monotonic() - self.written_at > PATIENCE_S:
            self._write_first(self.count - self.count % ROW_GROUP)

    def close(self) -> None:
        """Writes what is left."""
        if self.count:
            self._write_first(self.count)

    def _write_first(self, count: int) -> None:
        table = pa.concat_tables(self.rows)
        name = f"part-{self.next:06d}-{uuid.uuid4().hex[:8]}.parquet"
        _write(self.system, f"{self.folder}/{name}", table.slice(0, count).cast(self.schema))
        self.rows, self.count = [table.slice(count)], len(table) - count
        self.next += 1
        self.written_at = time.monotonic()


def write_quarantine(folder: str, rows: list[dict], encoding_hash: str) -> None:
    """Writes `quarantine.parquet`: every clip that was asked for and isn't in the shards, with its reason."""
    system, path = resolve(folder)
    sink = io.BytesIO()
    schema = QUARANTINE_SCHEMA.with_metadata({ENCODING_KEY: encoding_hash.encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    write_whole(system, f"{path}/quarantine.parquet", sink.getvalue())


def known_failures(folder: str, encoding_hash: str) -> dict[tuple[str, int, str], tuple[str, str]]:
    """Reason and message of clips that can't be made of their files, by (sample_id, size, version) of the file.

    Empty for a quarantine of another encoding, or one that can't be read: then they are tried again.
    """
    system, path = resolve(folder)
    content = read_bytes(system, f"{path}/quarantine.parquet")
    try:
        table = pq.read_table(io.BytesIO(content)) if content else None
    except pa.ArrowInvalid:
        table = None
    if table is None or (table.schema.metadata or {}).get(ENCODING_KEY, b"").decode() != encoding_hash:
        return {}
    return {
        (row["sample_id"], row["source_size"], row["source_version"]): (row["reason"], row["message"])
        for row in table.to_pylist()
        if row["reason"] in LASTING
    }


def manifest_or_none(folder: str) -> Manifest | None:
    """The manifest of a shard set, or None where there is none that this version can read."""
    try:
        return Manifest.load(folder)
    except UserError:
        return None


def _write(system: fs.FileSystem, path: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    # Latents are noise to a compressor, and uncompressed pages can be read where they lie in a memory map. Checksums,
    # since nothing else would tell a flipped byte among latents from a latent.
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    write_whole(system, path, sink.getvalue())
