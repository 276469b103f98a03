"""Metrics of a checkpoint: held-out loss, FVD, CLIP similarity.

Validation and `sora eval` call `measure`. A metric that fails is skipped and reported; the others are still measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from sora_train.data.collate import draw_training_noise
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.evaluate.fvd import ENOUGH_CLIPS, frechet_distance
from sora_train.evaluate.heldout import SEED, ClipRef, batches, choose_clips, held_out_flops, held_out_loss
from sora_train.evaluate.i3d import I3D, I3D_FRAMES, features, load_i3d
from sora_train.evaluate.similarity import load_clip, similarity
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.recipe import ValidationConfig
from sora_train.sample import Run, generate_each
from sora_train.sample.compiled import compile_if_worth
from sora_train.schema import bucket_name, bucket_size
from sora_train.storage import atomic_file

Figures = dict[str, float | int]
Progress = Callable[[str, int, int], None]
"""Progress callback: (task, items done, items in total)."""
Video = tuple[str, np.ndarray]
"""A prompt and the frames sampled from it, uint8 `F H W 3`."""

REFERENCE = "fvd_reference.safetensors"
"""File in a run's folder with the I3D features of the held-out clips.
All validations of a run share it, so the features are computed once."""


def measure(
    run: Run,
    config: ValidationConfig,
    shards_folder: str | Path,
    videos: Iterable[Video] | None = None,
    progress: Progress | None = None,
    remark: Callable[[str], None] = log.warning,
) -> Figures:
    """Measures the metrics that `config` names.

    The keys are `holdout_loss`, `holdout_loss_0` to `_9` and `holdout_clips`; `fvd` and `fvd_clips`; `similarity`.
    Similarity is measured on `videos` if given, otherwise on new samples of `config.prompts`. `remark` receives the
    reason for each metric that can't be measured.
    """
    report, folder = progress or (lambda what, done, of: None), str(shards_folder)
    parts: list[tuple[str, object, Callable[[], Figures]]] = [
        ("held-out loss", config.holdout_clips, lambda: _held_out(run, config, folder, report, remark)),
        ("similarity", config.clip, lambda: _similarity(run, config, videos, report)),
        ("FVD", config.fvd, lambda: _fvd(run, config, folder, report, remark)),
    ]
    found: Figures = {}
    for name, wanted, part in parts:
        try:
            found |= part() if wanted else {}
        except UserError as error:
            remark(f"{name}: {error}")
    return found


def check_shards(run: Run, folder: str) -> None:
    """Raises UserError if a folder does not hold the shards of a run's training."""
    found = Manifest.load(folder).encoding_hash
    if found != run.manifest.encoding_hash:
        raise UserError(
            f"the shards in {folder} have the encoding {found}, {run.checkpoint} was trained on "
            f"{run.manifest.encoding_hash}. Name the shards that it was trained on",
            code="shards",
        )


def open_held_out(run: Run, folder: str) -> ShardSet:
    """Opens the held-out split of the shards that a run was trained on.

    Raises UserError if no clips were held out, or if the folder holds other shards.
    """
    check_shards(run, folder)
    if not run.recipe.data.holdout_fraction:
        what = "data.holdout_fraction is 0, so no clip was held out. Train a run with another value, such as 0.02"
        raise UserError(what, code="evaluation")
    return ShardSet(folder, run.recipe.data.holdout_fraction, "holdout")


def _held_out(
    run: Run, config: ValidationConfig, folder: str, report: Progress, remark: Callable[[str], None]
) -> Figures:
    shards = open_held_out(run, folder)
    # Images are skipped if training did not use them.
    names = tuple(name for name in shards.rows if bucket_size(name)[0] > 1 or run.recipe.data.image_ratio != 0)
    refs = choose_clips(run, shards, config.holdout_clips, names, "held-out loss", remark)
    if not refs:
        raise UserError(
            "only images were held out, and data.image_ratio 0 leaves them out of training", code="evaluation"
        )
    compile_if_worth(run, held_out_flops(run.model.config, shards, refs))
    progress = partial(report, "held-out loss")
    loss = held_out_loss(run.predict, run.objective, shards, refs, run.device, progress=progress)
    return {**loss, "holdout_clips": len(refs)}


def _similarity(run: Run, config: ValidationConfig, videos: Iterable[Video] | None, report: Progress) -> Figures:
    if videos is None and not config.prompts:
        raise UserError("validation.prompts is empty, so there are no prompts to sample", code="evaluation")
    clip = load_clip(config.clip, run.device, run.recipe.codec.models)
    if videos is None:
        seeds, progress = [config.seed] * len(config.prompts), partial(report, "samples of the prompts, step")
        videos = zip(config.prompts, generate_each(run, config.prompts, seeds, config, progress=progress), strict=True)
    scores = [similarity(clip, prompt, video) for prompt, video in videos]
    if not scores:
        raise UserError("there are no samples to score", code="evaluation")
    return {"similarity": float(np.mean(scores))}


def _fvd(run: Run, config: ValidationConfig, folder: str, report: Progress, remark: Callable[[str], None]) -> Figures:
    if not config.i3d:
        raise UserError("validation.i3d is empty; name the safetensors of I3D's weights", code="evaluation")
    manifest = run.manifest
    check_frames(run)
    bucket = bucket_name(manifest.frames, manifest.height, manifest.width)  # the shape of samples
    shards = open_held_out(run, folder)
    refs = choose_clips(run, shards, config.fvd_clips, (bucket,), f"FVD of {bucket}", remark)
    if len(refs) < 2:
        raise UserError(
            f"{len(refs)} of the held-out clips are of {bucket}, the shape of samples; at least two are needed",
            code="evaluation",
        )
    i3d = load_i3d(config.i3d, run.device)
    real = reference(run, i3d, shards, refs, partial(report, "I3D of held-out clips"))
    prompts, embeddings = captions_of(run, shards, refs)
    seeds = range(config.seed, config.seed + len(prompts))
    progress = partial(report, "samples of held-out captions, step")
    given = None
    if run.recipe.conditioning.probability == 1:  # then the model was never trained without given frames
        given = [latents[: run.recipe.conditioning.frames] for latents in clip_latents(shards, refs)]
    made = generate_each(run, prompts, seeds, config, embeddings, progress=progress, given=given)
    if len(refs) < ENOUGH_CLIPS:
        remark(
            f"FVD is of {len(refs)} clips: with fewer than {ENOUGH_CLIPS} it depends more on their number than on "
            "the model, and compares only with FVD of as many"
        )
    return {"fvd": frechet_distance(real, features(i3d, made)), "fvd_clips": len(refs)}


def check_frames(run: Run) -> None:
    """Raises UserError if a run's clips are too short for I3D."""
    if run.manifest.frames < I3D_FRAMES:
        raise UserError(
            f"the run's clips have {run.manifest.frames} frames and I3D needs {I3D_FRAMES}; train one with data.frames "
            f"{I3D_FRAMES} or more",
            code="unsupported",
        )


def captions_of(run: Run, shards: ShardSet, refs: list[ClipRef]) -> tuple[list[str], list[Float[Tensor, "_ e"]]]:
    """A caption of each clip and its embedding from the shard.

    The caption is the one that the held-out loss of the clip uses.
    """
    prompts: list[str] = []
    embeddings: list[Tensor] = []
    for batch in batches(refs, shards, None):
        clips = shards.read(batch[0].bucket, [ref.row for ref in batch])
        for row in range(len(batch)):
            which = draw_training_noise(clips, row, run.objective, SEED, 0, caption_dropout=0.0).caption
            prompts.append(clips.captions[row][which])
            embeddings.append(torch.from_numpy(clips.text[row][which].astype(np.float32)))
    return prompts, embeddings


def clip_latents(shards: ShardSet, refs: list[ClipRef]) -> Iterator[Float[Tensor, "f c h w"]]:
    """Normalised latents of held-out clips: the means of their posteriors, with the shards' statistics.

    The scale of an export's raw latents may differ from that of the shards: denormalise these with the statistics of
    its own VAE before decoding.
    """
    facts = shards.manifest.vae
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    for batch in batches(refs, shards, None):
        clips = shards.read(batch[0].bucket, [ref.row for ref in batch])
        for row in range(len(batch)):
            yield (torch.from_numpy(clips.latents[row, 0].astype(np.float32)) - mean) / std


def real_videos(
    run: Run, shards: ShardSet, refs: list[ClipRef], progress: Callable[[int, int], None]
) -> Iterator[np.ndarray]:
    """Decodes held-out clips from their latents with the run's VAE: uint8 `F H W 3`. Shards hold no pixels."""
    for done, latents in enumerate(clip_latents(shards, refs)):
        yield run.vae.decode(run.vae.denormalise(latents[None]))[0].numpy()
        progress(done + 1, len(refs))


def reference(
    run: Run, i3d: I3D, shards: ShardSet, refs: list[ClipRef], progress: Callable[[int, int], None]
) -> Float[np.ndarray, "n 400"]:
    """I3D features of held-out clips, cached in the run's folder.

    The cache key covers everything that the features depend on.
    """
    ids = [ref.sample_id for ref in refs]
    key = hashlib.sha256(json.dumps([shards.manifest.encoding_hash, i3d.hash, ids]).encode()).hexdigest()
    file = run.folder / REFERENCE
    try:
        with safe_open(file, "np") as stored:
            if (stored.metadata() or {}).get("of") == key:
                return stored.get_tensor("features")
    except (OSError, SafetensorError):
        pass  # missing or damaged: it is computed again
    found = features(i3d, real_videos(run, shards, refs, progress))
    if (run.folder / "checkpoints").is_dir():  # a run's folder, not an export
        try:
            with atomic_file(file) as draft:
                save_file({"features": found}, draft, {"of": key})
        except (OSError, SafetensorError) as error:
            log.warning(f"{file} can't be written ({error}): the features will be made again next time")
    return found
