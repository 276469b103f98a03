"""`sora bench data`: our reader of shards beside raw reads of the same bytes and others' readers; no Ray but if asked.

And the order of samples over 10⁹ rows: what it takes to make a plan, and to know any batch of it.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from pyarrow import fs

from sora_train.bench import readers
from sora_train.bench.core import Row, Table, fs_type, interleave, say, seconds, spread
from sora_train.bench.model import size_of
from sora_train.bench.options import Common, parse
from sora_train.bench.output import finish
from sora_train.bench.shards import make_shards
from sora_train.data.order import Bucket, Plan, batch
from sora_train.errors import RecipeError, UserError
from sora_train.manifest import Manifest
from sora_train.schema import shard_files
from sora_train.storage import resolve

ABOUT = (
    "Reads shards once through, in turns, by our reader (in training's shuffled order, then as the loop gets it), raw "
    "and by others, from the system's memory and from the disk; and draws batches out of 10^9 rows. SHARDS is a "
    "folder of `sora prep`; without one, noise of real sizes is written into a temporary folder.\n\n"
    "For instance: sora bench data runs/quickstart/shards --s3"
)


@dataclass(frozen=True)
class Options(Common):
    """What to read, and by what."""

    rows: int = 512
    """Clips that are made where no SHARDS are given."""
    shape: str = "16x256x256"
    """Their frames, height and width in pixels; latents are 4 channels of an eighth of the sides, float16."""
    text_width: int = 4096
    """Width of their text embeddings (T5-XXL)."""
    text_tokens: int = 120
    """Most tokens of their captions; they have a quarter to all of them."""
    batch: int = 16
    """Clips of a batch."""
    rounds: int = 5
    """Turns of each reader."""
    order_rows: int = 10**9
    """Rows that the order of samples is drawn over; 0 leaves this out."""
    s3: bool = False
    """Read from an S3 server on loopback as well (moto must be installed)."""
    ray: bool = False
    """Have ray.data read as well, local files; it starts Ray."""
    tmp: str = ""
    """Folder for what is made; the system's temporary one if not given."""


def bench(options: Options, folder: str | None) -> list[Table]:
    """Two tables: readers, and the order of samples. UserError where the folder holds no shards."""
    if not options.rounds or not options.rows or not options.batch:
        raise RecipeError("--rounds, --rows and --batch take 1 or more")
    shape = size_of(options.shape)
    with tempfile.TemporaryDirectory(dir=options.tmp or None) as made:
        if folder is None:
            say(f"writing {options.rows} clips of {options.shape}")
            folder = make_shards(f"{made}/shards", options.rows, shape, options.text_width, options.text_tokens)
        tables = [of_readers(options, folder)]
    return [*tables, of_order(options)] if options.order_rows else tables


def of_readers(options: Options, folder: str) -> Table:
    """Rates of all readers, in places and states of the system's memory."""
    Manifest.load(folder)
    system, _ = resolve(folder)
    files = shard_files(folder)
    size = sum(info.size for info in system.get_file_info(files))
    if not files:
        raise UserError(f"{folder} holds no shards; make some with `sora prep RECIPE`")
    found: dict[str, readers.Reader] = {
        "raw": readers.raw, "raw, kept": readers.raw_kept, "ours: reader": readers.ours, "ours: loader": readers.loader,
        "pyarrow": readers.pyarrow,
    }  # fmt: skip
    notes = [f"{len(files)} files of {size / 1e6:,.1f} MB in all, {fs_type(folder)}; batches of {options.batch}"]
    if find_spec("datasets") is not None:
        found["datasets"] = readers.hugging_face
    else:
        notes.append("datasets is not installed")
    rows: list[Row] = []
    failed: list[str] = []
    with started_ray() if options.ray else nullcontext():
        if options.ray:
            found["ray.data"] = readers.ray_data
        local = isinstance(system, fs.LocalFileSystem)
        rows += taken(options, folder, size, found, "warm" if local else "remote", lambda: None, failed)
        if local and readers.can_forget():
            left: list[float] = []
            rows += taken(options, folder, size, found, "cold", lambda: left.append(readers.forget(folder)), failed)
            if max(left, default=0) > 0.02:
                notes.append(f"cold: the system kept up to {max(left):.0%} of the bytes, so it was not wholly cold")
        elif local:
            notes.append("cold: this system can't be told to forget files")
        if local and options.s3:
            with readers.on_s3(folder) as remote:
                # Ray's workers began without the server's address; datasets would want a library for S3
                far = {name: reader for name, reader in found.items() if name not in ("datasets", "ray.data")}
                rows += taken(options, remote, size, far, "S3 on loopback", lambda: None, failed)
    notes.append("of raw: raw seconds over the reader's, by turns; GB/s: bytes of the files over seconds, opening too")
    notes.append("raw: into one place of 8 MB, over and over; raw, kept: into new memory, as who hands clips out must")
    return Table("data: readers", rows, notes, failed)


def taken(
    options: Options, folder: str, size: int, found: dict[str, readers.Reader], where: str,
    before: Callable[[], object], failed: list[str],
) -> list[Row]:  # fmt: skip
    """Rows of one place; `before` is done before every turn of a reader."""
    counts: dict[str, int] = {}

    def turn(name: str, reader: readers.Reader) -> float:
        gc.collect()  # what the reader before held would make this one ask the system for new memory
        before()
        return seconds(lambda: counts.update({name: reader(folder, options.batch)}))

    say(f"reading, {where}")
    times, broken = interleave({name: partial(turn, name, r) for name, r in found.items()}, options.rounds)
    failed += [f"{where}: {name}: {why}" for name, why in broken.items()]
    raw, kept, clips = times.get("raw"), times.get("raw, kept"), max(counts.values(), default=0)
    rows: list[Row] = []
    for name, each in times.items():
        if counts[name] not in (0, clips):
            failed.append(f"{where}: {name} read {counts[name]} of {clips} clips, so its times are void")
            continue
        rows.append(
            {
                "from": where,
                "reader": name,
                "seconds": spread(each),
                "clips_per_s": clips / statistics.median(each),
                "gb_per_s": size / statistics.median(each) / 1e9,
                "of raw": spread([a / b for a, b in zip(raw, each, strict=True)]) if raw else None,
                "of raw, kept": spread([a / b for a, b in zip(kept, each, strict=True)]) if kept else None,
            }
        )
    return rows


def of_order(options: Options) -> Table:
    """Time and memory of a plan and of its batches, wherever in the run they are."""
    plan = Plan((Bucket("16x256x256", options.order_rows),), options.batch, seed=0)
    numbers = [plan.steps_per_epoch * k // 7 + 1 for k in range(1, 50)]  # in seven epochs
    drawn = [seconds(partial(batch, plan, number)) for number in numbers]
    tracemalloc.start()
    again = Plan((Bucket("16x256x256", options.order_rows),), options.batch, seed=0)
    for number in numbers:
        batch(again, number)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    made = [seconds(lambda: Plan((Bucket("x", options.order_rows),), options.batch, seed=0)) for _ in range(9)]
    row = {
        "rows": f"{options.order_rows:,}",
        "batch": options.batch,
        "plan_us": spread([1e6 * one for one in made]),
        "batch_us": spread([1e6 * one for one in drawn]),
        "memory_kb": most / 1e3,
    }
    return Table("data: order of samples", [row], ["microseconds; memory: the most that Python held meanwhile"])


@contextmanager
def started_ray() -> Iterator[None]:
    """A local Ray of its own. UserError where it is not installed."""
    if find_spec("ray") is None:
        raise UserError("--ray: Ray is not installed")
    import ray

    from data_prep.ray_pipeline import quiet_ray_data

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def main(words: Sequence[str], prog: str = "sora bench data") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, f"{prog} [SHARDS]", ABOUT)
    if len(rest) > 1 or any(word.startswith("-") for word in rest):
        raise RecipeError(f"takes one folder of shards and flags, but got {' '.join(rest)}; `{prog} --help`")
    return finish(bench(options, rest[0] if rest else None), options, ["data", *words])
