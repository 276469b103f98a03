"""Samplers: from noise to latents, for any model, since a model is a callable.

Flow models take Euler's or Heun's steps (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without noise), or those of
diffusers' UniPC (Zhao et al. 2023, arXiv 2302.04867), with which Wan is released. DDPM's take those of diffusers'
schedulers: DDIM (Song et al. 2020, arXiv 2010.02502), DPM-Solver++ of second order (Lu et al. 2022, arXiv 2211.01095),
or DDPM's own, which draw noise (Ho et al. 2020, arXiv 2006.11239, algorithm 2); over steps spaced as "trailing" in Lin
et al. 2023 (arXiv 2305.08891, table 2): from the last, which is noise, to the data.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sora_train.diffusion import ddpm, flow
from sora_train.diffusion.guidance import Denoiser, FirstFrames, guided
from sora_train.diffusion.objective import Model, Objective
from sora_train.errors import RecipeError
from sora_train.sampling import Sampler, Sampling

Progress = Callable[[int, int], None]
"""Called with (steps done, all steps)."""

SAMPLERS: dict[str, tuple[Sampler, ...]] = {
    "flow": ("euler", "heun", "unipc"),
    "ddpm": ("ddim", "dpm++", "ddpm"),
}
"""Samplers by `diffusion.kind`; the first is what `auto` takes."""
LEAST_ALPHA = 4e-5  # just below what the linear schedule leaves of the data at its last step


def resolve_sampler(sampler: str, kind: str) -> str:
    """The sampler, with `auto` resolved for a `diffusion.kind`. Raises RecipeError if it does not fit that kind."""
    if sampler == "auto":
        return SAMPLERS[kind][0]
    if sampler not in SAMPLERS[kind]:
        raise RecipeError(
            f"sampler {sampler} does not fit diffusion.kind {kind}; use {', '.join(SAMPLERS[kind])}, or auto, which is "
            f"{SAMPLERS[kind][0]} there"
        )
    return sampler


@torch.no_grad()
def sample(
    model: Model,
    objective: Objective,
    noise: Float[Tensor, "b f c h w"],
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "#b i e"],
    null_mask: Bool[Tensor, "#b i"],
    how: Sampling,
    generators: Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
    given: Float[Tensor, "b k c h w"] | None = None,
) -> Float[Tensor, "b f c h w"]:
    """Normalised latents for a batch of prompts.

    With `given`, latents begin with these frames, as in diffusers' WanImageToVideoPipeline with `expand_timesteps`: at
    every step the model sees them clean, with time 0. Raises ValueError if no frame is left to sample.

    `ddpm` draws noise for each clip from its own generator, so a clip does not depend on its batch; without generators
    from torch's. `progress(done, steps)` is called after every step. Raises RecipeError if the sampler does not fit.
    """
    x = noise.float()
    first = None if given is None else _first_frames(objective, given.to(x), x, how)
    denoise = guided(
        model, text, text_mask, null_text, null_mask, how.guidance, how.guidance_interval, how.guidance_rescale, first
    )
    made = _sample(denoise, objective, x, how, generators, progress if progress is not None else _quiet)
    return made if first is None else first.put_into(made)


def _first_frames(objective: Objective, given: Tensor, noise: Tensor, how: Sampling) -> FirstFrames:
    k, f = given.shape[1], noise.shape[1]
    if k >= f:
        raise ValueError(f"{k} latent frames are given of a clip of {f}; at least one must be left to sample")

    def add_noise(t: float) -> Tensor:
        own = torch.full((len(given),), t if objective.config.kind == "ddpm" else t / 1000, device=given.device)
        return objective.add_noise(given, noise[:, :k], own)[0]

    return FirstFrames(given, add_noise if how.guidance_without == "text_and_frames" else None)


def _sample(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    how: Sampling,
    generators: Sequence[torch.Generator] | None,
    tell: Progress,
) -> Tensor:
    name = resolve_sampler(how.sampler, objective.config.kind)
    if name == "ddpm":
        return _ancestral(denoise, objective, x, how.steps, list(generators) if generators is not None else None, tell)
    if name in ("ddim", "dpm++"):
        return _solver(denoise, objective, x, how.steps, 2 if name == "dpm++" else 1, tell)
    if name == "unipc":
        return _unipc(denoise, objective, x, how.steps, tell)
    if name in ("euler", "heun"):
        return _flow(denoise, objective, x, how.steps, name == "heun", tell)
    raise NotImplementedError(f"sampler {name}")


def _quiet(done: int, steps: int) -> None:
    pass


def _flow(denoise: Denoiser, objective: Objective, x: Tensor, steps: int, heun: bool, progress: Progress) -> Tensor:
    _, f, c, h, w = x.shape
    times = flow.shift_time(torch.linspace(1, 0, steps + 1), objective.shift((f, c, h, w)))
    for i, (t, after) in enumerate(pairwise(map(float, times))):
        v = denoise(x, 1000 * t)
        guess = x + (after - t) * v
        # The last step is Euler's, since the model was never trained at time 0. This keeps the order of the error.
        x = x + (after - t) * (v + denoise(guess, 1000 * after)) / 2 if heun and after > 0 else guess
        progress(i + 1, steps)
    return x


def make_unipc(shift: float) -> Any:
    """UniPC of second order as a scheduler of diffusers, with the settings of the released Wan."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _unipc(denoise: Denoiser, objective: Objective, x: Tensor, steps: int, progress: Progress) -> Tensor:
    _, f, c, h, w = x.shape
    scheduler = make_unipc(objective.shift((f, c, h, w)))
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # its times are whole numbers, and with many steps some are equal
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, float(t)), t, x).prev_sample
        progress(i + 1, steps)
    return x


def usable_steps(objective: Objective) -> int:
    """How many of DDPM's steps sampling can use, counted from the data.

    The data by a predicted epsilon has its error divided by sqrt(alpha), which is unbounded in latents.
    """
    enough = int((objective.schedule.alphas_cumprod >= LEAST_ALPHA).sum())
    return enough if objective.config.prediction == "epsilon" else ddpm.STEPS


def trailing(usable: int, steps: int) -> list[int]:
    """Evenly spaced steps from the last usable one down: diffusers' "trailing".

    Rounded as numpy's `arange`, except for counts (61 of 1000, …) for which that makes one step too many, -1.
    """
    stride = (usable - usable / steps) - usable
    return [round(usable + i * stride) - 1 for i in range(steps)]


def make_solver(objective: Objective, order: int) -> Any:
    """DPM-Solver++ as a scheduler of diffusers.

    Of first order it is DDIM (Lu et al. 2022, section 4.1), and it takes any times; diffusers' own DDIMScheduler is
    wrong if the steps don't divide 1000. The last step, of first order, ends on the data (`final_sigmas_type`): the
    other choice leaves the noise of step 0 in the latents.
    """
    # Imported here, because only these samplers need diffusers.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    usable, prediction = usable_steps(objective), objective.config.prediction
    betas: Any = objective.schedule.betas[:usable].clamp(max=1 - 2**-24)  # at 1 it would divide by zero
    return DPMSolverMultistepScheduler(
        num_train_timesteps=usable,
        trained_betas=betas.tolist(),
        prediction_type="v_prediction" if prediction == "v" else prediction,
        solver_order=order,
        lower_order_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )


def _solver(denoise: Denoiser, objective: Objective, x: Tensor, steps: int, order: int, progress: Progress) -> Tensor:
    usable, c = usable_steps(objective), x.shape[2]
    scheduler = make_solver(objective, order)
    scheduler.set_timesteps(timesteps=trailing(usable, min(steps, usable)))
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, float(t))[:, :, :c], t, x).prev_sample
        progress(i + 1, len(scheduler.timesteps))
    return x


def _ancestral(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    generators: list[torch.Generator] | None,
    progress: Progress,
) -> Tensor:
    """DDPM's ancestral steps, with the learned variance if any, else the posterior's (Ho et al., eq. 7).

    If steps are further apart than one, the variance is that of the shorter chain (Nichol and Dhariwal 2021, arXiv
    2102.09672, section 4).
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    usable, prediction = usable_steps(objective), objective.config.prediction
    betas: Any = objective.schedule.betas[:usable]
    scheduler: Any = DDPMScheduler(
        num_train_timesteps=usable,
        trained_betas=betas.tolist(),
        prediction_type="v_prediction" if prediction == "v" else prediction,
        variance_type="learned_range" if objective.learned_variance else "fixed_small",
        clip_sample=False,
    )
    scheduler.set_timesteps(timesteps=trailing(usable, min(steps, usable)))
    for i, t in enumerate(scheduler.timesteps):
        # The scheduler splits off the variance on axis 1.
        output, noisy = (rearrange(y, "b f c h w -> b c f h w") for y in (denoise(x, float(t)), x))
        made = scheduler.step(output, t, noisy, generator=generators)
        # The last step ends on the data. Unless t is 0, diffusers would add noise of a learned variance.
        last = i + 1 == len(scheduler.timesteps)
        x = rearrange(made.pred_original_sample if last else made.prev_sample, "b c f h w -> b f c h w")
        progress(i + 1, len(scheduler.timesteps))
    return x
