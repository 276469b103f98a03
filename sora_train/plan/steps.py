"""The steps of each bucket: clips, micro-batches, FLOPs and memory, as `train.balance` makes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from sora_train.codec.files import find_vae
from sora_train.codec.hub import downloaded_folder
from sora_train.errors import UserError
from sora_train.plan.activations import Sizes, activations
from sora_train.plan.estimate import step_flops
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes
from sora_train.train.balance import bucket_configs
from sora_train.train.config import TrainConfig

UNLIKE = 1.5
"""From this ratio of step times on the table advises `train.balance`."""


def configs_of(recipe: Recipe, buckets: dict[str, Sizes], world: int) -> dict[str, TrainConfig]:
    """The settings of each bucket's steps on `world` ranks, with its own `batch_size` and `micro_batch_size`."""
    latents = {name: (sizes.f, sizes.h, sizes.w) for name, sizes in buckets.items()}
    text, timed = max(sizes.l for sizes in buckets.values()), recipe.conditioning.frame_times
    shared = recipe.cluster.sequence_parallel
    return bucket_configs(
        recipe.train, recipe.model, recipe.lora, latents, text, frame_times=timed, world=world // shared, shared=shared
    )


def mean_step_flops(recipe: Recipe, buckets: dict[str, Sizes], clips: list[int], world: int) -> float:
    """FLOPs of a step on all workers, padding included, averaged over the steps that these clips fill."""
    own = configs_of(recipe, buckets, world)
    steps = {name: count / own[name].batch_size for name, count in zip(buckets, clips, strict=True)}
    flops = (
        steps[name] * step_flops(recipe.model, own[name], sizes, world, recipe.lora) for name, sizes in buckets.items()
    )
    return sum(flops) / (sum(steps.values()) or 1)


def step_table(recipe: Recipe, buckets: dict[str, Sizes], world: int) -> list[str]:
    """A row for each bucket if there are several, and warnings of ranks that idle."""
    idle = idle_ranks(recipe, buckets)
    if len(buckets) < 2:
        return idle
    own, lines = configs_of(recipe, buckets, world), list[str]()
    flops = {name: step_flops(recipe.model, own[name], sizes, world, recipe.lora) for name, sizes in buckets.items()}
    longest, shortest = max(flops.values()), min(flops.values())
    header = "tokens", "clips/step", "micro-batch", "time", "activations"
    lines.append(f"{'steps of each bucket':<24}" + "".join(f"{word:>13}" for word in header))
    for name, sizes in buckets.items():
        train = own[name]
        held = activations(recipe.model, train, replace(sizes, b=train.micro_batch_size), recipe.lora).total
        cells = f"{sizes.tokens(recipe.model):,}", f"{train.batch_size:,}", f"{train.micro_batch_size:,}"
        lines.append(
            f"{name:<24}"
            + "".join(f"{cell:>13}" for cell in (*cells, f"{100 * flops[name] / longest:.3g} %", in_bytes(held)))
        )
    lines.append(
        "time: FLOPs of a step, padding included, as a share of the longest step's; activations: of a micro-batch"
    )
    if longest > UNLIKE * shortest and not recipe.train.balance:
        lines.append(
            f"the longest step takes {longest / shortest:,.1f} times as long as the shortest; train.balance evens them"
        )
    return lines + idle


def idle_ranks(recipe: Recipe, buckets: dict[str, Sizes]) -> list[str]:
    """A warning for every bucket whose clips are too short or small for the ranks that share them."""
    model, shared, found = recipe.model, recipe.cluster.sequence_parallel, list[str]()
    choices = [n for n in range(shared, 0, -1) if recipe.cluster.most % n == 0 and model.shares_clips_by(n)]
    for name, sizes in buckets.items():
        places = (sizes.h // model.patch) * (sizes.w // model.patch)
        axes = {"latent frames": sizes.f, "places": places} if model.factorised else {"places": places}
        for axis, length in axes.items():
            if (busy := busy_ranks(length, shared)) < shared:
                best = next(n for n in choices if busy_ranks(length, n) == n)
                blocks = ("spatial" if axis == "latent frames" else "temporal") if model.factorised else "all"
                found.append(
                    f"warning: clips of {name} have {length} {axis}, so {shared - busy} of the {shared} workers that "
                    f"share one idle in {blocks} blocks; with cluster.sequence_parallel {best} none would"
                )
    return found


def busy_ranks(length: int, shared: int) -> int:
    """How many of the ranks that share an axis have a part: each as many as the first, the last fewer or none."""
    return -(-length // -(-length // shared))


def small_bucket_warnings(recipe: Recipe, clips: Mapping[str, int], buckets: dict[str, Sizes]) -> list[str]:
    """A warning for every bucket with fewer training clips than a step takes."""
    own = configs_of(recipe, buckets, recipe.cluster.most)
    keys = "train.batch_size or train.balance" if recipe.train.balance else "train.batch_size"
    return [
        f"the bucket {name} has {count} training clip{'s' * (count > 1)}, fewer than the {own[name].batch_size} of a "
        "step: its steps average over fewer clips, so each of these weighs more than a clip of another bucket. Add "
        f"clips of this shape, remove it from data.buckets, or lower {keys}"
        for name, count in clips.items()
        if 0 < count < own[name].batch_size
    ]


def vae_factors(recipe: Recipe) -> tuple[tuple[int, int], str]:
    """Pixels on a side and frames of a latent, and where they are known from. Downloads nothing."""
    name, models = recipe.codec.vae, recipe.codec.models
    hub = name.partition("@")[0]
    try:
        if name == "builtin" or os.path.isdir(name) or (models and downloaded_folder(models, hub).is_dir()):
            vae = find_vae(name, models)
            return (vae.factor, vae.time_factor), f"codec.vae {name}"
    except UserError:
        pass  # training reports what is wrong with it
    space, time = recipe.model.vae_factors
    kind = f"compresses time by {time}" if time > 1 else "keeps frames"
    return (space, time), f"a VAE with factor {space} that {kind}, since {name} is not available here"
