"""Balanced steps: how many clips of each bucket make a step, so steps of all buckets take about equally long.

`train.batch_size` is the step of the costliest bucket. Cheaper ones take more clips, by the model's FLOPs for a clip:
these decide what is learned, so they depend on the recipe alone, not on the number of workers. The micro-batch is what
fits: it grows with the inverse of a clip's activations, less than the clips of a step where attention dominates. So
buckets differ in the number of micro-batches too.
"""

import math
from collections.abc import Mapping

from sora_train.data.shards import ShardSet
from sora_train.lora.config import LoraConfig
from sora_train.lora.flops import training_flops
from sora_train.model import ModelConfig
from sora_train.schema import bucket_size
from sora_train.train.config import TrainConfig

TEXT_SHARE = 4
"""So many caption tokens count as one video token in the activations: `sora_train.plan` finds 5 or more in all modes
of activation checkpointing and all presets."""


def bucket_configs(
    config: TrainConfig,
    model: ModelConfig,
    lora: LoraConfig,
    latents: Mapping[str, tuple[int, int, int]],
    text_tokens: int,
    *,
    frame_times: bool,
    world: int,
    shared: int = 1,
) -> dict[str, TrainConfig]:
    """The settings of each bucket's steps on `world` workers, or groups of `shared` workers that share each clip.

    `batch_size` and `micro_batch_size` are the bucket's own. `latents` has the axes f h w of a clip, `text_tokens` is
    the length of the longest caption.
    """
    if not config.balance:
        return dict.fromkeys(latents, config)  # with padding in each micro-batch as the recipe has it
    text = model.text_tokens or text_tokens
    flops = {name: training_flops(model, lora, *shape, text, frame_times) for name, shape in latents.items()}
    room = {name: TEXT_SHARE * tokens_of_rank(model, *shape, shared) + text for name, shape in latents.items()}
    costliest = max(flops, key=flops.__getitem__)
    found: dict[str, TrainConfig] = {}
    for name in latents:
        more = (flops[costliest] / flops[name]) ** config.balance
        clips = math.floor(config.batch_size * more * (1 + 1e-12))  # a whole number stays one whatever the rounding
        fitting = max(1, config.micro_batch_size * room[costliest] // room[name])
        of_rank = -(-clips // world)
        micro = -(-of_rank // -(-of_rank // fitting))  # as few micro-batches as fit, of equal size
        found[name] = config.model_copy(update={"batch_size": clips, "micro_batch_size": micro})
    return found


def tokens_of_rank(model: ModelConfig, f: int, h: int, w: int, shared: int) -> int:
    """Tokens of a clip that one of `shared` ranks holds: whole frames in factorised attention, else places."""
    places = (h // model.patch) * (w // model.patch)
    return -(-f // shared) * places if model.factorised else f * -(-places // shared)


def shard_configs(
    config: TrainConfig,
    model: ModelConfig,
    lora: LoraConfig,
    shards: ShardSet,
    *,
    frame_times: bool,
    world: int,
    shared: int = 1,
) -> dict[str, TrainConfig]:
    """`bucket_configs` of the buckets that a split has."""
    manifest = shards.manifest
    shapes = {name: manifest.vae.latent_shape(*bucket_size(name)) for name in shards.rows}
    latents = {name: (f, h, w) for name, (f, _, h, w) in shapes.items()}
    text = manifest.text.max_tokens
    return bucket_configs(config, model, lora, latents, text, frame_times=frame_times, world=world, shared=shared)
