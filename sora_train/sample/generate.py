"""Samples videos from prompts and seeds.

A clip's noise, initial and added by the sampler `ddpm`, is drawn on the CPU from its seed alone. It depends neither on
other clips in the batch nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.codec.memory import is_out_of_memory
from sora_train.codec.text import cut_null
from sora_train.data.collate import pad_text
from sora_train.diffusion import Sampling, resolve_sampler, sample
from sora_train.errors import RecipeError, UserError, one_line
from sora_train.latent_shape import shape_errors
from sora_train.log import log
from sora_train.model.flops import forward_flops
from sora_train.sample.compiled import compile_if_worth
from sora_train.sample.load import Run

PLACES_AT_ONCE = 2**15  # latent places (f h w) of one sampling batch: 64 clips of the quickstart, 2 of 16 x 256 x 256

Progress = Callable[[int, int], None]
"""Called with the number of sampler steps done and in all."""


def generate(
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling | None = None,
    shape: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Videos uint8 `b F H W 3`, one for each prompt and its seed; see `generate_each`."""
    return np.stack(list(generate_each(run, prompts, seeds, how, shape=shape, progress=progress)))


def generate_each(
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling | None = None,
    embeddings: Sequence[Float[Tensor, "_ e"]] | None = None,
    negative: Float[Tensor, "_ e"] | None = None,
    shape: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
    given: Sequence[Float[Tensor, "_ c h w"] | None] | None = None,
) -> Iterator[np.ndarray]:
    """Yields videos uint8 `F H W 3`; memory holds one batch of them.

    `how` defaults to the recipe's `validation`, `shape` (frames, height, width) to that of training. With `embeddings`
    of the prompts, and `negative` (by `encode_null`) of the negative prompt, no text encoder is loaded. `given` has the
    first latent frames of each video, normalised; None: that video has none. Raises UserError for a sampler or shape
    that the model does not support, or that memory does not hold.
    """
    counts = {len(prompts), len(seeds), *(len(each) for each in (embeddings, given) if each is not None)}
    if not prompts or len(counts) > 1:
        raise ValueError(
            f"expected a seed (embedding, given frames) for each prompt, got {len(seeds)} for {len(prompts)}"
        )
    how = run.recipe.validation if how is None else how
    resolve_sampler(how.sampler, run.objective.config.kind)
    latents_of = sample_shape(run, shape)
    vae = run.vae  # first, so that a missing VAE is found before sampling
    null_prompt = run.recipe.codec.null_prompt
    if negative is None:
        if how.negative or embeddings is None:
            check_prompt(run, how.negative)
            negative = run.text_encoder.encode_null(how.negative, null_prompt)
        else:  # in float16, as the embeddings of captions in shards
            negative = torch.from_numpy(run.manifest.null_embedding(null_prompt).astype(np.float32))
    most = run.manifest.text.max_tokens
    size = max(1, PLACES_AT_ONCE // (latents_of[0] * latents_of[2] * latents_of[3]))
    batches = list(batches_of(given or [None] * len(prompts), size))
    compile_if_worth(run, len(prompts) * sampling_flops(run, how, latents_of))
    for i, batch in enumerate(batches):

        def report(done: int, of: int, before: int = i) -> None:
            if progress is not None:
                progress(before * of + done, len(batches) * of)

        texts = embed(run, prompts[batch]) if embeddings is None else list(embeddings[batch])
        text, mask = pad_text(texts, most)
        null_text, null_mask = pad_text([cut_null(negative, null_prompt, len(prompt)) for prompt in texts], most)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        try:
            latents = sample(
                run.predict,
                run.objective,
                torch.stack([torch.randn(latents_of, generator=generator) for generator in generators]).to(run.device),
                *(tensor.to(run.device) for tensor in (text, mask, null_text, null_mask)),
                how=how,
                generators=generators,
                progress=report,
                given=first_frames(given, batch),
            )
            check_finite(run, latents, prompts[batch])
            videos = vae.decode(vae.denormalise(latents)).numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            asked = shape or (run.manifest.frames, run.manifest.height, run.manifest.width)
            raise UserError(
                f"out of memory on {run.device} with {len(generators)} of {' x '.join(map(str, asked))} (frames x "
                "height x width) at once; ask for fewer frames or a smaller size: --frames, --height, --width",
                code="memory",
            ) from None
        yield from videos


def sampling_flops(run: Run, how: Sampling, latents: tuple[int, int, int, int]) -> int:
    """FLOPs of one video of latents `f c h w` whose caption has the most tokens, and whose steps are all guided."""
    f, _, h, w = latents
    passes = how.steps * (1 if how.guidance == 1 else 2) * (2 if how.sampler == "heun" else 1)
    return passes * forward_flops(run.model.config, f, h, w, run.manifest.text.max_tokens)


def batches_of(given: Sequence[Tensor | None], size: int) -> Iterator[slice]:
    """Batches of at most `size` videos, in order. The videos of one have equally many given frames."""
    end = 0
    for _, same in groupby(given, key=lambda frames: 0 if frames is None else len(frames)):
        start, end = end, end + len(list(same))
        yield from (slice(begin, min(begin + size, end)) for begin in range(start, end, size))


def first_frames(given: Sequence[Tensor | None] | None, batch: slice) -> Float[Tensor, "b k c h w"] | None:
    """The given frames of a batch that `batches_of` made, if any."""
    frames = [each for each in (given or [])[batch] if each is not None and len(each)]
    return torch.stack(frames) if frames else None


def check_finite(run: Run, latents: Float[Tensor, "b f c h w"], prompts: Sequence[str]) -> None:
    """Raises UserError if a sample is not finite, which would give a black video."""
    bad = [prompt for prompt, clip in zip(prompts, latents, strict=True) if not clip.isfinite().all()]
    if bad:
        weights = all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
        why = "the weights are finite, so the sampler diverged: try other steps, a lower guidance or another sampler"
        raise UserError(
            f"the sample of {one_line(bad[0])[:200]!r} from {run.checkpoint} is not finite"
            + (f" ({len(bad)} of {len(latents)} at once)" if len(bad) > 1 else "")
            + f"; {why if weights else 'its weights are not finite: use an earlier checkpoint'}",
            code="diverged",
        )


def sample_shape(run: Run, shape: tuple[int, int, int] | None = None) -> tuple[int, int, int, int]:
    """Axes `f c h w` of the latents of one clip of `shape`, frames, height and width; None is as it was trained.

    Positions in space and time interpolate or go on counting, so that the model takes any shape that divides into
    frames of the VAE and patches of the model. RecipeError, with the nearest that do, for others.
    """
    manifest, vae = run.manifest, run.manifest.vae
    shape = shape or (manifest.frames, manifest.height, manifest.width)
    if wrong := shape_errors(shape, vae.factor, vae.time_factor, run.recipe.model.patch):
        raise RecipeError("; ".join(wrong))
    return vae.latent_shape(*shape)


def embed(run: Run, prompts: Sequence[str]) -> list[Float[Tensor, "_ e"]]:
    """Embeddings of the prompts, each of which is checked."""
    distinct = list(dict.fromkeys(prompts))
    for prompt in distinct:
        check_prompt(run, prompt)
    found = dict(zip(distinct, run.text_encoder.encode(distinct), strict=True))
    return [found[prompt] for prompt in prompts]


def check_prompt(run: Run, prompt: str) -> None:
    """Says on stderr what is cut from a prompt that is too long.

    Raises UserError for one that is no text: a terminal gives bytes that are no UTF-8 as lone surrogates.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RecipeError(f"the prompt {ascii(prompt)[:200]} has bytes that are no UTF-8; write it in UTF-8")
    if lost := run.text_encoder.cut_off(prompt):
        limit = f"codec.max_tokens {run.text_encoder.max_tokens}"
        log.warning(f"the prompt is longer than {limit}; not used: {lost!r}")
