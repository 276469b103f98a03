"""Loss on clips that training never sees, in ten bins of diffusion time, with noise that is always the same.

Noise, posterior draw, caption and place within a bin hang on (SEED, sample_id) alone, and every clip gets one time in
each bin. So the figures of two checkpoints differ by their weights alone, whatever the batch size, and a bin's figure
is no matter of which times were drawn. They are plain mean squared errors of what the objective predicts (L_simple of
Ho et al. 2020, eq. 14), without min-SNR weights or L_vlb, and with times spread evenly, not as training draws them: so
`holdout_loss` is no training loss, and compares only between runs of one objective and one VAE.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.data.collate import collate
from sora_train.data.order import stable_hash
from sora_train.data.shards import ShardSet
from sora_train.diffusion import Model, Objective, ddpm
from sora_train.sample import Run
from sora_train.sample.generate import PLACES_AT_ONCE
from sora_train.schema import bucket_size
from sora_train.storage import atomic_write_text

BINS = 10
SEED = 0
CHOSEN = "heldout.json"
"""In a run's folder: ids of the clips that each figure is of, in the order in which they were chosen."""


class ClipRef(NamedTuple):
    """Where a clip of the split is: its bucket, its number there."""

    bucket: str
    row: int
    sample_id: str


def choose(shards: ShardSet, count: int, buckets: tuple[str, ...] | None = None) -> list[ClipRef]:
    """The first `count` clips of a split by `ranked`, in the order of the shards: neighbours are read together."""
    return sorted(ranked(shards, buckets)[:count], key=lambda place: (place.bucket, place.row))


def ranked(shards: ShardSet, buckets: tuple[str, ...] | None = None) -> list[ClipRef]:
    """All clips of a split (of these buckets) by a hash of their ids: more shards change few of the first."""
    names = [name for name in shards.rows if buckets is None or name in buckets]
    everything = [
        ClipRef(name, row, sample_id) for name in names for row, sample_id in enumerate(shards.all_sample_ids(name))
    ]
    return sorted(everything, key=lambda place: stable_hash("chosen", place.sample_id))


def choose_clips(
    run: Run,
    shards: ShardSet,
    count: int,
    buckets: tuple[str, ...] | None,
    figure: str,
    remark: Callable[[str], None],
) -> list[ClipRef]:
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


def held_out_loss(
    model: Model,
    objective: Objective,
    shards: ShardSet,
    places: list[ClipRef],
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """`holdout_loss`, and `holdout_loss_0` (next to the data) to `holdout_loss_9` (next to noise), which it is the mean
    of: a mean over the clips each. `progress(done, clips)` is called after each batch.
    """
    sums, done = torch.zeros(BINS, dtype=torch.float64), 0
    for batch in batches(places, shards, batch_size):
        clips = shards.read(batch[0].bucket, [place.row for place in batch])
        made = collate(
            clips, 0, manifest=shards.manifest, objective=objective, seed=SEED, step=0, caption_dropout=0.0
        ).to(device)
        within = torch.tensor([stable_hash(SEED, place.sample_id, "time") / 2**64 for place in batch])
        for number in range(BINS):
            t = time_in(objective, number, within).to(device)
            errors = squared_error(model, objective, made.latents, made.noise, t, made.text, made.text_mask)
            sums[number] += errors.double().sum().cpu()
        done += len(batch)
        if progress is not None:
            progress(done, len(places))
    means = (sums / len(places)).tolist()
    return {"holdout_loss": sum(means) / BINS} | {f"holdout_loss_{i}": mean for i, mean in enumerate(means)}


def batches(places: list[ClipRef], shards: ShardSet, batch_size: int | None) -> Iterator[list[ClipRef]]:
    """The places cut into batches of one bucket each; without a size, as many as memory surely holds."""
    for bucket in dict.fromkeys(place.bucket for place in places):
        mine = [place for place in places if place.bucket == bucket]
        f, _, h, w = shards.manifest.vae.latent_shape(*bucket_size(bucket))
        size = batch_size or max(1, PLACES_AT_ONCE // (f * h * w))
        yield from (mine[start : start + size] for start in range(0, len(mine), size))


def time_in(objective: Objective, number: int, within: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Times in a bin of ten, `within` 0 to 1 of it, as the objective counts them: 0 to 1, or DDPM's steps."""
    t = (number + within.clamp(max=1 - 2**-20)) / BINS
    return torch.floor(t * ddpm.STEPS) if objective.config.kind == "ddpm" else t


@torch.inference_mode()
def squared_error(
    model: Model,
    objective: Objective,
    x: Float[Tensor, "b f c h w"],
    noise: Float[Tensor, "b f c h w"],
    t: Float[Tensor, "b"],
    text: Tensor,
    text_mask: Tensor,
) -> Float[Tensor, "b"]:
    """Mean squared error of each clip's prediction at its time, unweighted; a learned variance is left aside."""
    x_t, target = objective.add_noise(x, noise, t)
    predicted = model(x_t, objective.model_time(t), text, text_mask).float()[:, :, : x.shape[2]]
    return (predicted - target).square().mean(dim=(1, 2, 3, 4))
