"""From noise to latents: the same few lines for every model, since a model is a callable.

Flow models take Euler steps; DDPM's take DDIM's (Song et al. 2020, arXiv 2010.02502; by diffusers) over steps spaced as
"trailing" in Lin et al. 2023 (arXiv 2305.08891, table 2): from the last, which is noise, to the data.
"""

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

LEAST_ALPHA = 4e-5  # just below what the linear schedule leaves of the data at its last step


def guided(
    model: Model,
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "1 m e"],
    null_mask: Bool[Tensor, "1 m"],
    guidance: float,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): null + guidance x (text - null), in one batch.

    A guidance of 1 leaves the empty prompt out, and half the work. A learned variance, the second half of the
    channels, is left out: neither sampler asks for it.
    """
    if guidance == 1:
        return lambda x, t: model(x, t, text, text_mask).float()[:, :, : x.shape[2]]
    length, b = max(text.shape[1], null_text.shape[1]), len(text)
    both = [(text, text_mask), (null_text.expand(b, -1, -1), null_mask.expand(b, -1))]
    texts = torch.cat([pad(embedding, (0, 0, 0, length - embedding.shape[1])) for embedding, _ in both])
    masks = torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in both])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), texts, masks).float().chunk(2)
        return (without + guidance * (with_text - without))[:, :, : x.shape[2]]

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
    """Normalised latents for a batch of prompts: Euler for flow models, DDIM for DDPM.

    `progress(done, steps)` is called after every step. DDPM has no more than 1000 of them.
    """
    denoise = guided(model, text, text_mask, null_text, null_mask, guidance)
    run = _ddim if objective.config.kind == "ddpm" else _euler
    return run(denoise, objective, noise.float(), steps, progress or (lambda done, steps: None))


def _euler(
    denoise: Denoiser, objective: Objective, x: Tensor, steps: int, progress: Callable[[int, int], None]
) -> Tensor:
    _, f, c, h, w = x.shape
    times = flow.shifted(torch.linspace(1, 0, steps + 1, device=x.device), objective.shift((f, c, h, w)))
    for i, (t, after) in enumerate(pairwise(times)):
        x = x + (after - t) * denoise(x, (1000 * t).expand(len(x)))
        progress(i + 1, steps)
    return x


def _ddim(
    denoise: Denoiser, objective: Objective, x: Tensor, steps: int, progress: Callable[[int, int], None]
) -> Tensor:
    # Of first order, DPM-Solver++ is DDIM (Lu et al. 2022, arXiv 2211.01095, section 4.1). diffusers' own DDIMScheduler
    # is wrong where the steps don't divide 1000; this one takes any times. Imported here: all else runs on torch alone.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    alphas, prediction = objective.schedule.alphas, objective.config.prediction
    # Data read off epsilon carry its error divided by sqrt(alpha), which nothing bounds in latents.
    usable = int((alphas >= LEAST_ALPHA).sum()) if prediction == "epsilon" else ddpm.STEPS
    steps = min(steps, usable)
    times = [-(-usable * left // steps) - 1 for left in range(steps, 0, -1)]  # evenly, from the last usable step on
    betas: Any = objective.schedule.betas.clamp(max=1 - 2**-24)  # at 1 it would divide by zero
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=ddpm.STEPS,
        trained_betas=betas.tolist(),
        prediction_type="v_prediction" if prediction == "v" else prediction,
        solver_order=1,
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=times)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, t.float().to(x.device).expand(len(x))), t, x).prev_sample
        progress(i + 1, steps)
    return x
