"""The clips in the shards, each with its place there as one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.shard_index import OTHER_ENCODING, drop_rows, stored_clips
from data_prep.spool import Partitions, first_rows, id_hashes, to_ids
from sora_train.data.opening import rows_of
from sora_train.index import shard_places
from sora_train.schema import bucket_of, list_shards
from sora_train.shard_list import list_known
from sora_train.storage import resolve

ROW_BITS = 32


@dataclass(frozen=True)
class StoredClips:
    """The clips in the shards. `read` yields them with some columns of `index.CLIPS`, and their `place`.

    A clip's place is an integer: its shard's number in `shards`, which are sorted, and its row there.
    """

    shards: list[str]
    """Paths relative to the folder."""
    read: Callable[[Sequence[str]], Iterator[pa.Table]]

    def shard_of(self, place: int) -> str:
        """The path of a clip's shard."""
        return self.shards[place >> ROW_BITS]


NO_CLIPS = StoredClips([], lambda columns: iter([]))


def read_stored(folder: str, encoding_hash: str, difference: str = OTHER_ENCODING) -> StoredClips:
    """The clips in the shards of a folder. Reading them raises UserError as `stored_clips`."""
    _, root = resolve(folder)
    shards = [info.path[len(root) + 1 :] for info in list_shards(folder)]
    names = pa.array(shards, pa.string())

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        wanted = [*columns, *({"shard", "row"} - set(columns))]
        for table in stored_clips(folder, encoding_hash, difference, wanted):
            numbers = shard_places(table, names).to_numpy(zero_copy_only=False).astype(np.int64)
            yield table.append_column("place", pa.array((numbers << ROW_BITS) + table["row"].to_numpy()))

    return StoredClips(shards, read)


def count_clips(folder: str) -> Counter[str]:
    """The number of clips in each bucket, without those that are dropped. The index must know all shards."""
    known, _ = list_known(folder)
    found = Counter[str]()
    dropped = known["dropped"].to_pylist()
    for shard, rows, gone in zip(known["shard"].to_pylist(), rows_of(known).tolist(), dropped, strict=True):
        found[bucket_of(str(shard))] += rows - len(gone or [])
    return found


def drop_repeats(folder: str, encoding_hash: str) -> int:
    """Drops clips that an earlier shard has too. Returns their number."""
    stored, parts = read_stored(folder, encoding_hash), Partitions.of(count_clips(folder).total())
    for table in stored.read(["sample_id"]):
        ids = to_ids(table["sample_id"])
        parts.add("clips", id_hashes(ids), pa.table([ids, table["place"]], ["sample", "place"]))
    found = [np.empty(0, np.int64)]
    for part in parts:
        if table := parts.read("clips", part):
            table = table.sort_by("place")
            found.append(table["place"].to_numpy()[first_rows(table["sample"]) != np.arange(len(table))])
    places = np.concatenate(found)
    if len(places):
        drop_clips(folder, stored, places)
    return len(places)


def drop_clips(folder: str, stored: StoredClips, places: NDArray[np.int64]) -> None:
    """Drops clips in the index, which must describe their shards."""
    places = np.unique(places)
    shards, starts = np.unique(places >> ROW_BITS, return_index=True)
    rows = np.split(places & (1 << ROW_BITS) - 1, starts[1:])
    drop_rows(folder, {stored.shards[shard]: some.tolist() for shard, some in zip(shards, rows, strict=True)})
