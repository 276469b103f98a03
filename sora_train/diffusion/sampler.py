"""From noise to latents: the same few lines for every model, since a model is a callable."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from sora_train.diffusion import ddpm, flow
from sora_train.diffusion.objective import Model, Objective

Denoiser = Callable[[Tensor, Tensor], Tensor]


def guided(
    model: Model,
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "1 m e"],
    null_mask: Bool[Tensor, "1 m"],
    guidance: float,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): null + guidance x (text - null), in one batch.

    A guidance of 1 leaves the empty prompt out, and half the work.
    """
    if guidance == 1:
        return lambda x, t: model(x, t, text, text_mask)
    length, b = max(text.shape[1], null_text.shape[1]), len(text)
    both = [(text, text_mask), (null_text.expand(b, -1, -1), null_mask.expand(b, -1))]
    texts = torch.cat([pad(embedding, (0, 0, 0, length - embedding.shape[1])) for embedding, _ in both])
    masks = torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in both])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), texts, masks).float().chunk(2)
        return without + guidance * (with_text - without)

    return denoise


@torch.no_grad()
def sample(
    model: Model,
    objective: Objective,
    noise: Float[Tensor, "b f c h w"],
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "1 m e"],
    null_mask: Bool[Tensor, "1 m"],
    steps: int,
    guidance: float,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b f c h w"]:
    """Normalised latents for a batch of prompts: Euler for flow models, DDIM (diffusers') for DDPM.

    `progress(done, steps)` is called after every step.
    """
    denoise = guided(model, text, text_mask, null_text, null_mask, guidance)
    run = _ddim if objective.config.kind == "ddpm" else _euler
    return run(denoise, objective, noise.float(), steps, progress or (lambda done, steps: None))


def _euler(
    denoise: Denoiser, objective: Objective, x: Tensor, steps: int, progress: Callable[[int, int], None]
) -> Tensor:
    times = flow.shifted(torch.linspace(1, 0, steps + 1, device=x.device), objective.config.shift)
    for i, (t, after) in enumerate(pairwise(times)):
        x = x + (after - t) * denoise(x, (1000 * t).expand(len(x))).float()
        progress(i + 1, steps)
    return x


def _ddim(
    denoise: Denoiser, objective: Objective, x: Tensor, steps: int, progress: Callable[[int, int], None]
) -> Tensor:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # only here: all else runs on torch alone

    scheduler: Any = DDIMScheduler(
        num_train_timesteps=ddpm.STEPS,
        beta_start=objective.config.beta_start,
        beta_end=objective.config.beta_end,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        epsilon = denoise(x, t.float().to(x.device).expand(len(x))).float()[:, :, : x.shape[2]]
        x = scheduler.step(epsilon, int(t), x).prev_sample
        progress(i + 1, steps)
    return x
