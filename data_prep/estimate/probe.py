"""What every source is cut into, by its header alone: a few here in threads, a million of them on Ray Data.

Of a large remote file only both ends are fetched, where containers keep their headers.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa
from pyarrow import fs

from data_prep.ray_pipeline import quiet_ray_data
from data_prep.reasons import ClipError
from data_prep.sources import SourceRow, data_root
from data_prep.stages import local_copy
from data_prep.video.decode_process import Decoder
from data_prep.workers import available_cpus
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.log import log
from sora_train.storage import resolve

HERE, HERE_REMOTE = 2000, 200  # files up to which no Ray is started for them
END_BYTES = 2**22  # fetched of a remote file's beginning and end
WHOLE_BYTES = 2**25  # remote files up to this size are fetched whole
BLOCK_FILES = 64  # that travel to an actor together


@dataclass(frozen=True)
class Look:
    """One file: how many clips of which bucket it gives, its display size and length; or the reason why none."""

    clips: dict[str, int] = field(default_factory=dict)
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    still: bool = False
    reason: str = ""
    message: str = ""


class Opener:
    """Opens headers through a decoder's child process."""

    def __init__(self, root: str, data: DataConfig, selection: SelectionConfig):
        self.system, _ = resolve(root)
        self.decoder = Decoder(data, selection)

    def look(self, path: str, size: int) -> Look:
        """What the file at a path of the root's filesystem is cut into."""
        try:
            gif = path.lower().endswith(".gif")  # its length is in no header
            if isinstance(self.system, fs.LocalFileSystem) or size <= WHOLE_BYTES or gif:
                return self._whole(path)
            try:
                with ends_of(self.system, path, size) as ends:
                    return self._cut(ends)
            except ClipError as error:
                if error.reason in ("too_long", "too_small"):
                    raise
                return self._whole(path)  # perhaps only what lies between was wanting
        except ClipError as error:
            return Look(reason=error.reason, message=error.message)

    def _whole(self, path: str) -> Look:
        with local_copy(self.system, path) as local:
            return self._cut(local)

    def _cut(self, path: str) -> Look:
        cut = self.decoder.plan_clips(path, headers_only=True)
        clips = Counter(span.bucket.name for span in cut.spans)
        return Look(dict(clips), cut.width, cut.height, cut.seconds, cut.still)


class OpenHeaders:
    """The actor: a table of `path` and `size` to one of `path` and `look`, a Look as JSON."""

    def __init__(self, root: str, data: DataConfig, selection: SelectionConfig):
        self.opener = Opener(root, data, selection)

    def __call__(self, table: pa.Table) -> pa.Table:
        files = table.to_pylist()
        looks = [json.dumps(asdict(self.opener.look(file["path"], file["size"]))) for file in files]
        return pa.Table.from_pydict({"path": [file["path"] for file in files], "look": looks})


@contextmanager
def ends_of(system: fs.FileSystem, path: str, size: int) -> Iterator[str]:
    """A temporary file of the same size with only the beginning and the end in it. ClipError `fetch_failed`."""
    with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as local:
        try:
            with system.open_input_file(path) as remote:
                local.write(remote.read(END_BYTES))
                remote.seek(max(0, size - END_BYTES))
                local.seek(max(0, size - END_BYTES))
                local.write(remote.read())
                local.flush()
        except OSError as error:
            raise ClipError("fetch_failed", f"can't be fetched: {error}") from None
        yield local.name


def is_large(rows: list[SourceRow], data: DataConfig) -> bool:
    """Whether opening the rows' files is work for Ray."""
    local = isinstance(resolve(data_root(data))[0], fs.LocalFileSystem)
    return len({row.path for row in rows if not row.reason}) > (HERE if local else HERE_REMOTE)


def survey(
    rows: list[SourceRow], data: DataConfig, selection: SelectionConfig, cluster: str = "auto"
) -> dict[str, Look]:
    """A Look for the path of every row that has a file; says every 5 s how far it is."""
    files = {row.path: row.size for row in rows if not row.reason}
    if not files:
        return {}
    looks: dict[str, Look] = {}
    said = began = time.monotonic()
    for path, look in (on_ray if is_large(rows, data) else here)(files, data, selection, cluster):
        looks[path] = look
        if (now := time.monotonic()) - said >= 5:
            said, left = now, (len(files) - len(looks)) * (now - began) / len(looks)
            log.info(f"plan: {len(looks)} of {len(files)} files opened, about {left:.0f} s left")
    return looks


def here(
    files: dict[str, int], data: DataConfig, selection: SelectionConfig, cluster: str = ""
) -> Iterator[tuple[str, Look]]:
    """Looks, in threads of this process with a decoder each."""
    openers = [
        Opener(data_root(data), data, selection) for _ in range(max(1, min(8, available_cpus(), len(files) // 8)))
    ]
    free: SimpleQueue[Opener] = SimpleQueue()

    def look(file: tuple[str, int]) -> tuple[str, Look]:
        opener = free.get()
        try:
            return file[0], opener.look(*file)
        finally:
            free.put(opener)

    for opener in openers:
        free.put(opener)
    pool = ThreadPoolExecutor(len(openers))
    try:
        yield from pool.map(look, files.items())
    finally:
        pool.shutdown(cancel_futures=True)
        for opener in openers:
            opener.decoder.close()


def on_ray(
    files: dict[str, int], data: DataConfig, selection: SelectionConfig, cluster: str
) -> Iterator[tuple[str, Look]]:
    """Looks, by actors on all of the cluster's cores."""
    import ray
    from ray.data import ActorPoolStrategy

    from sora_train.ray_cluster.connection import connect

    with connect(cluster, log_to_driver=False):
        quiet_ray_data()
        paths = list(files)
        parts = [paths[start : start + BLOCK_FILES] for start in range(0, len(paths), BLOCK_FILES)]
        tables: list[pa.Table | bytes] = [
            pa.Table.from_pydict({"path": part, "size": [files[path] for path in part]}) for part in parts
        ]
        actors = max(1, int(ray.cluster_resources().get("CPU", 1) - 0.5))
        opened = ray.data.from_arrow(tables).map_batches(
            OpenHeaders,
            fn_constructor_kwargs={"root": data_root(data), "data": data, "selection": selection},
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(actors, len(tables))),
            num_cpus=0.5,
        )
        for table in opened.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            for row in table.to_pylist():
                yield row["path"], Look(**json.loads(row["look"]))
