"""Which held-out clips a run's figures are of: chosen once and stored with the run, so that figures compare."""

from __future__ import annotations

import json
from collections.abc import Callable

from sora_train.data.shards import ShardSet
from sora_train.evaluate.heldout import Place, ranked
from sora_train.sample import Run
from sora_train.storage import atomic_write_text

CHOSEN = "heldout.json"
"""In a run's folder: ids of the clips that each figure is of, in the order in which they were chosen."""


def choose_again(
    run: Run,
    shards: ShardSet,
    count: int,
    buckets: tuple[str, ...] | None,
    figure: str,
    remark: Callable[[str], None],
) -> list[Place]:
    """At most `count` held-out clips: those that this figure of the run was of before, then others by `ranked`.

    So clips that are added to the shards change nothing. If chosen ones are gone, others take their place, and a remark
    says so. In the order of the shards, so that neighbours are read together.
    """
    stored = read_chosen(run)
    before = stored.get(figure, [])
    there = {place.sample_id: place for place in ranked(shards, buckets)}
    kept = [name for name in before if name in there]
    if gone := len([name for name in before[:count] if name not in there]):
        remark(
            f"{figure}: {gone} of the {len(before[:count])} clips that it was measured on are no longer held out in "
            f"{shards.folder}. Others take their place: values from before and after don't compare"
        )
    others = [name for name in there if name not in set(kept)]
    names = [*kept, *others][: max(count, len(kept))]
    if names != before:
        write_chosen(run, stored | {figure: names})
    return sorted((there[name] for name in names[:count]), key=lambda place: (place.bucket, place.row))


def read_chosen(run: Run) -> dict[str, list[str]]:
    """Ids by figure; nothing if there is no such file or it can't be read: clips are then chosen anew."""
    try:
        stored = json.loads((run.folder / CHOSEN).read_text(encoding="utf-8"))
        return {str(figure): [str(name) for name in names] for figure, names in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_chosen(run: Run, chosen: dict[str, list[str]]) -> None:
    """Stores the ids in a run's own folder, not in an export's."""
    if (run.folder / "checkpoints").is_dir():
        try:
            atomic_write_text(run.folder / CHOSEN, json.dumps(chosen, indent=1))
        except OSError:  # such as a run that only its owner may write: its choice is the same until clips are added
            return
