"""Prompts and seeds in, frames out.

A clip's noise is drawn on the CPU from its seed alone, so it depends neither on the clips beside it nor on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.codec.text import TextEncoder, pad_text
from sora_train.diffusion import sample
from sora_train.errors import UserError
from sora_train.generate.run import Run
from sora_train.video import one_line

PLACES_AT_ONCE = 2**15  # latent places (f h w) of one sampling batch: 64 clips of the quickstart, 2 of 16 x 256 x 256

Progress = Callable[[int, int], None]
"""Takes sampler steps done, and steps in all."""


def generate(
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Videos uint8 `b F H W 3`, one for each prompt and its seed. Steps and guidance default to `validation`'s."""
    return np.stack(list(generate_each(run, prompts, seeds, steps, guidance, negative, progress)))


def generate_each(
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    progress: Progress | None = None,
    embeddings: Sequence[Float[Tensor, "_ e"]] | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but one by one, so that memory holds a batch. Given embeddings, no text encoder is loaded."""
    if not prompts or len(prompts) != len(seeds) or len(prompts) != len(prompts if embeddings is None else embeddings):
        raise ValueError(f"expected a seed (and an embedding) for each prompt, got {len(seeds)} for {len(prompts)}")
    steps = run.recipe.validation.steps if steps is None else steps
    guidance = run.recipe.validation.guidance if guidance is None else guidance
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1")
    vae = run.vae  # first: should it not be there, that is better known before the sampling
    texts = embed(run, prompts) if embeddings is None else list(embeddings)
    empty = torch.from_numpy(run.manifest.empty_embedding().astype(np.float32))
    null_text, null_mask = pad_text(embed(run, [negative]) if negative else [empty])
    shape = latent_shape(run)
    size = max(1, PLACES_AT_ONCE // (shape[0] * shape[2] * shape[3]))
    batches = [slice(start, start + size) for start in range(0, len(prompts), size)]
    for i, batch in enumerate(batches):

        def report(done: int, of: int, before: int = i) -> None:
            if progress is not None:
                progress(before * of + done, len(batches) * of)

        text, mask = pad_text(texts[batch])
        latents = sample(
            run.model,
            run.objective,
            torch.stack([noise(seed, shape) for seed in seeds[batch]]).to(run.device),
            *(tensor.to(run.device) for tensor in (text, mask, null_text, null_mask)),
            steps=steps,
            guidance=guidance,
            progress=report,
        )
        yield from vae.decode(vae.denormalise(latents)).numpy()


def latent_shape(run: Run) -> tuple[int, int, int, int]:
    """Axes `f c h w` of one clip's latents."""
    manifest = run.manifest
    return manifest.vae.latent_shape(manifest.frames, manifest.height, manifest.width)


def noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "f c h w"]:
    """The noise that a seed stands for, on the CPU so that every device starts from the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embed(run: Run, prompts: Sequence[str]) -> list[Float[Tensor, "_ e"]]:
    """Embeddings of the prompts; a prompt that is too long is cut, and what is lost is said on stderr."""
    for prompt in dict.fromkeys(prompts):
        if lost := cut_off(run.text_encoder, prompt):
            shown = lost if len(lost) <= 200 else f"{lost[:200].rstrip()}… ({len(lost)} characters)"
            limit = f"codec.max_tokens {run.text_encoder.max_tokens}"
            print(f"warning: the prompt is longer than {limit}; not used: {shown!r}", file=sys.stderr, flush=True)
    return run.text_encoder.encode(list(prompts))


def cut_off(encoder: TextEncoder, prompt: str) -> str:
    """The end of a prompt that does not fit into the encoder's `max_tokens`, of which the last is `</s>`."""
    ids = encoder.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= encoder.max_tokens:
        return ""
    return one_line(str(encoder.tokenizer.decode(ids[encoder.max_tokens - 1 :], skip_special_tokens=True)))
