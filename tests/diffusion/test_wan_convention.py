"""Flow matching as Wan has it, compared with diffusers' schedulers: times, noisy latents, targets and UniPC's steps."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from sora_train.diffusion import DiffusionConfig, Sampling, flow, make_objective, sample

SHAPE = (3, 16, 4, 6)
TEXT = (torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # scheduler_config.json of the released Wan
shifts = pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])


def drawn(model, shift: float, noise: Tensor, sampler: str, steps: int) -> Tensor:
    objective = make_objective(DiffusionConfig(shift=shift))
    text = [tensor.expand(len(noise), *tensor.shape[1:]) for tensor in TEXT]
    return sample(model, objective, noise, *text, *TEXT, Sampling(sampler=sampler, steps=steps, guidance=1))  # pyright: ignore[reportArgumentType]


def curved(x: Tensor, told: Tensor, *_: Tensor) -> Tensor:
    """A velocity field that no solver order integrates exactly, and that depends on the time passed to it."""
    return torch.sin(2 * x) + told[:, None, None, None, None] / 500


@shifts
def test_noisy_latents_targets_and_told_times_are_those_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)  # all 1000 training times
    objective = make_objective(DiffusionConfig(times="uniform", shift=shift))
    u = torch.tensor([0.001, 0.25, 0.5, 0.8, 1.0])
    t = flow.shift_time(u, shift)
    x, noise = torch.randn(2, 5, *SHAPE)
    told = scheduler.timesteps[1000 - (1000 * u).round().long()]
    assert torch.allclose(objective.model_time(t), told, rtol=1e-5)
    x_t, target = objective.add_noise(x, noise, t)
    assert torch.allclose(x_t, scheduler.scale_noise(x, told, noise), atol=1e-5)
    for row, sigma in enumerate(t[:-1].tolist()):  # a last step from there, by a perfect prediction, ends on the data
        unipc = UniPCMultistepScheduler(**WAN)
        unipc.set_timesteps(sigmas=np.array([sigma]))
        made = unipc.step(target[row : row + 1], unipc.timesteps[0], x_t[row : row + 1]).prev_sample
        assert torch.allclose(made, x[row : row + 1], atol=1e-5)


@shifts
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_eulers_steps_are_those_of_diffusers_over_the_same_times(steps, shift):
    noise = torch.randn(2, *SHAPE)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Without `sigmas`, diffusers shifts the last time twice, and ends with a step that is much smaller than the others.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(curved(x, t.expand(2)), t, x).prev_sample
    assert torch.allclose(drawn(curved, shift, noise, "euler", steps), x, atol=1e-5)


@shifts
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_unipcs_steps_are_those_of_the_released_scheduler(steps, shift):
    """The loop of WanPipeline, over the scheduler that Wan is released with."""
    noise, told = torch.randn(2, *SHAPE), list[float]()
    scheduler = UniPCMultistepScheduler(**WAN, flow_shift=shift, solver_order=2, solver_type="bh2")
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(curved(x, t.expand(2)), t, x, return_dict=False)[0]

    def model(x, t, *rest):
        told.append(t[0].item())
        return curved(x, t)

    assert torch.equal(drawn(model, shift, noise, "unipc", steps), x)
    assert told == scheduler.timesteps.tolist()


def test_unipcs_times_are_the_shifted_ones_rounded_down():
    for shift in (1.0, 3.0, 5.0):
        scheduler = UniPCMultistepScheduler(**WAN, flow_shift=shift)
        scheduler.set_timesteps(30)
        ours = flow.shift_time(torch.linspace(1, 0.001, 31)[:-1], shift)
        assert torch.allclose(scheduler.sigmas[:-1], ours, atol=1e-5)
        assert (1000 * ours - scheduler.timesteps).abs().max() < 1.01


def test_unipc_needs_fewer_steps_than_euler(best):
    objective, noise = make_objective(DiffusionConfig(shift=3.0)), torch.randn(1, *SHAPE)
    exact = 0.7 + 0.4 * noise  # where the flow of Gaussian data ends
    model = best(objective, 0.7, 0.4)
    unipc, euler = ((drawn(model, 3.0, noise, name, 20) - exact).square().mean().sqrt() for name in ("unipc", "euler"))
    assert unipc < 0.5 * euler  # what is left comes of the rounded times
