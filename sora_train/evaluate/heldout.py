"""Loss on held-out clips in ten bins of diffusion time, with fixed noise.

Noise, posterior draw, caption, given first frames and time within a bin depend only on (SEED, sample_id). Every clip
gets one time in each bin. So the losses of two checkpoints differ only through their weights, whatever the batch size,
and a bin's loss does not depend on a random draw of times. Given frames are left out, as in training.

The losses are plain mean squared errors of the objective's target (L_simple of Ho et al. 2020, eq. 14), without
min-SNR weights or L_vlb. Times are spread evenly, not drawn as in training. So `holdout_loss` is not a training loss.
It is comparable only between runs with the same objective and the same VAE.
"""

import contextlib
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
from sora_train.diffusion.conditioning import mean_of_clips
from sora_train.model import ModelConfig
from sora_train.model.flops import forward_flops
from sora_train.sample import Run
from sora_train.sample.generate import PLACES_AT_ONCE
from sora_train.schema import bucket_size
from sora_train.storage import atomic_write_text

BINS = 10
SEED = 0
CHOSEN = "heldout.json"
"""File in a run's folder with the ids of the clips of each metric.
They are in the order in which they were chosen."""


class ClipRef(NamedTuple):
    """Location of a clip in the split: its bucket and its row there."""

    bucket: str
    row: int
    sample_id: str


def ranked(shards: ShardSet, buckets: tuple[str, ...] | None = None) -> list[ClipRef]:
    """All clips of a split (of these buckets), sorted by a hash of their ids.

    So adding shards changes few of the first clips.
    """
    names = [name for name in shards.rows if buckets is None or name in buckets]
    everything = [
        ClipRef(name, row, sample_id) for name in names for row, sample_id in enumerate(shards.all_sample_ids(name))
    ]
    return sorted(everything, key=lambda place: stable_hash("chosen", place.sample_id))


def choose_clips(
    run: Run, shards: ShardSet, count: int, buckets: tuple[str, ...] | None, figure: str, remark: Callable[[str], None]
) -> list[ClipRef]:
    """Chooses at most `count` held-out clips for the metric named `figure`.

    Clips that an earlier measurement of the run used come first, then others by `ranked`. So clips that are added to
    the shards change nothing. If earlier clips are gone, others replace them, and `remark` receives a message. The
    result is in shard order, so neighbours are read together.
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
    names = list(dict.fromkeys([*kept, *there]))[: max(count, len(kept))]
    if names != before and (run.folder / "checkpoints").is_dir():  # a run's folder, not an export
        with contextlib.suppress(OSError):  # of a read-only run the choice stays the same until clips are added
            atomic_write_text(run.folder / CHOSEN, json.dumps(stored | {figure: names}, indent=1))
    return sorted((there[name] for name in names[:count]), key=lambda place: (place.bucket, place.row))


def read_chosen(run: Run) -> dict[str, list[str]]:
    """The chosen ids by metric. Empty if the file is missing or unreadable; clips are then chosen again."""
    try:
        stored = json.loads((run.folder / CHOSEN).read_text(encoding="utf-8"))
        return {str(figure): [str(name) for name in names] for figure, names in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


@torch.inference_mode()
def held_out_loss(
    model: Model,
    objective: Objective,
    shards: ShardSet,
    places: list[ClipRef],
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Measures the loss of each bin, and their mean `holdout_loss`.

    The bins are `holdout_loss_0` (nearest to data) to `holdout_loss_9` (nearest to noise), each a mean over the clips.
    `progress(done, clips)` is called after each batch.
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
            x_t, target = objective.add_noise(made.latents, made.noise, t, made.given)
            times = objective.frame_times(t, made.given, x_t.shape[1])
            predicted = model(x_t, times, made.text, made.text_mask).float()
            errors = (predicted[:, :, : target.shape[2]] - target).square()  # without a learned variance
            sums[number] += mean_of_clips(errors, made.given).double().sum().cpu()
        done += len(batch)
        if progress is not None:
            progress(done, len(places))
    means = (sums / len(places)).tolist()
    return {"holdout_loss": sum(means) / BINS} | {f"holdout_loss_{i}": mean for i, mean in enumerate(means)}


def held_out_flops(config: ModelConfig, shards: ShardSet, places: list[ClipRef]) -> int:
    """FLOPs of `held_out_loss` with captions of the most tokens."""
    vae, tokens = shards.manifest.vae, shards.manifest.text.max_tokens
    shapes = [vae.latent_shape(*bucket_size(place.bucket)) for place in places]
    return BINS * sum(forward_flops(config, f, h, w, tokens) for f, _, h, w in shapes)


def batches(places: list[ClipRef], shards: ShardSet, batch_size: int | None) -> Iterator[list[ClipRef]]:
    """Splits `places` into batches of one bucket each.

    Without `batch_size`, a batch has at most PLACES_AT_ONCE latent positions (but at least one clip), a limit
    that fits in memory.
    """
    for bucket in dict.fromkeys(place.bucket for place in places):
        mine = [place for place in places if place.bucket == bucket]
        f, _, h, w = shards.manifest.vae.latent_shape(*bucket_size(bucket))
        size = batch_size or max(1, PLACES_AT_ONCE // (f * h * w))
        yield from (mine[start : start + size] for start in range(0, len(mine), size))


def time_in(objective: Objective, number: int, within: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Diffusion times in one of ten bins, at the fraction `within` of its width.

    The unit is the objective's: 0 to 1 for flow, steps for DDPM.
    """
    t = (number + within.clamp(max=1 - 2**-20)) / BINS
    return torch.floor(t * ddpm.STEPS) if objective.config.kind == "ddpm" else t
