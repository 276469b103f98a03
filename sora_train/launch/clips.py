"""Records the clips a run trains on in its folder, so it never resumes on other clips unnoticed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sora_train.data.opening import Split
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.recipe import Recipe
from sora_train.storage import atomic_file

CLIPS = "clips.parquet"
"""In a run's folder: a row for each clip of its shards, including held-out ones."""
COLUMNS = ["sample_id", "source", "content_hash", "start_s"]
MAX_NAMES = 5
"""How many sources a message names."""


@dataclass(frozen=True)
class Clips:
    """The clips of a shard folder (COLUMNS, `bucket`, `held_out`), and the training split's fingerprint."""

    table: pa.Table
    fingerprint: str

    def save(self, run: Path) -> None:
        table = self.table.replace_schema_metadata({"fingerprint": self.fingerprint})
        with atomic_file(run / CLIPS) as draft:
            pq.write_table(table, draft, compression="zstd")

    def counts(self, held_out: bool) -> dict[str, int]:
        """Number of a split's clips by bucket."""
        found: Any = self._table_of(held_out)["bucket"].value_counts()
        return {row["values"]: row["counts"] for row in found.to_pylist()}

    def sources(self, held_out: bool) -> dict[str, str]:
        """Sources of a split's clips by `sample_id`."""
        return {row["sample_id"]: row["source"] for row in self._of(held_out)}

    def contents(self, held_out: bool) -> dict[tuple[str, float], str]:
        """Sources of a split's clips by content hash and start, which do not depend on file names."""
        return {(row["content_hash"] or row["sample_id"], row["start_s"]): row["source"] for row in self._of(held_out)}

    def _of(self, held_out: bool) -> list[dict[str, Any]]:
        return self._table_of(held_out).to_pylist()

    def _table_of(self, held_out: bool) -> pa.Table:
        column = self.table["held_out"]
        return self.table.filter(column if held_out else pc.invert(column))


def read_clips(recipe: Recipe) -> Clips:
    """Reads a few columns of all clips in the recipe's shards."""
    train = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    splits: list[tuple[Split, ShardSet]] = [("train", train)]
    if recipe.data.holdout_fraction:
        with contextlib.suppress(UserError):  # none is held out
            held_out = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "holdout", listed=train.listed)
            splits.append(("holdout", held_out))
    tables: list[pa.Table] = []
    for split, shards in splits:
        for bucket in shards.rows:
            table = shards.columns(bucket, COLUMNS)
            table = table.append_column("bucket", pa.repeat(bucket, len(table)))
            tables.append(table.append_column("held_out", pa.repeat(split == "holdout", len(table))))
    return Clips(pa.concat_tables(tables), train.fingerprint)


def saved_clips(run: Path) -> Clips | None:
    """The clips that a run was last trained on, or None if it has no record. UserError if that is damaged."""
    place = run / CLIPS
    if not place.is_file():
        return None
    try:
        table = pq.read_table(place)
        return Clips(table, (table.schema.metadata or {})[b"fingerprint"].decode())
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{place}, the record of the clips that the run was trained on, is damaged ({error!r}). Restore it from a "
            "copy, or start a new run (--name)",
            code="clips",
        ) from None


def describe_difference(before: Clips, now: Clips) -> str:
    """Describes which training clips were added and removed."""
    was, are = before.sources(held_out=False), now.sources(held_out=False)
    added = [source for sample, source in are.items() if sample not in was]
    removed = [source for sample, source in was.items() if sample not in are]
    parts = [f"{what}: {name_clips(of)}" for what, of in (("added", added), ("removed", removed)) if of]
    if not parts:
        return "the shards hold the same clips in another order"
    return f"{', '.join(parts)}; {len(was)} training clips before, {len(are)} now"


def name_clips(sources: list[str]) -> str:
    """`3 clips (a.mp4, b.mp4)`."""
    distinct = list(dict.fromkeys(sources))
    names = ", ".join(distinct[:MAX_NAMES]) + (", …" if len(distinct) > MAX_NAMES else "")
    return f"{len(sources)} clip{'s' if len(sources) > 1 else ''} ({names})"


def check_holdout_moves(before: Clips, now: Clips) -> None:
    """UserError if training clips would become held-out clips or vice versa, as renamed files may."""
    for held_out, then, here in ((False, "trained on", "held out"), (True, "held out", "trained on")):
        was, there = before.contents(held_out), before.contents(not held_out)
        here_now = now.contents(not held_out).items()
        if moved := [source for content, source in here_now if content in was and content not in there]:
            raise UserError(
                f"{name_clips(moved)} that the run has {then} would be {here} now: the file name decides, and it "
                "changed. Give the files their former names, or remove them, and run `sora prep` again",
                code="clips",
            )


def check_clips(run: Path, shards: str, now: Clips, new_data: bool) -> str:
    """Describes which clips were added and removed since the run last started; "" if they are the same.

    UserError if they differ, unless `new_data`.
    """
    before = saved_clips(run)
    if before is None or before.fingerprint == now.fingerprint:
        return ""
    changes = describe_difference(before, now)
    if not new_data:
        raise UserError(
            f"{shards} holds other clips than {run} was trained on: {changes}. To resume with its optimizer and step "
            "on the present clips, add --new-data. To start a new run at step 0 from its weights: --name NEW "
            f"--model.init_from {run}. To resume as before, restore the previous clips",
            code="clips",
        )
    check_holdout_moves(before, now)
    return changes
