"""Samplers against closed forms of Gaussian data, whose best model and whose reverse steps are known; and guidance."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from sora_train.diffusion import DiffusionConfig, Sampling, ddpm, flow, make_objective, sample, variance
from sora_train.diffusion.guidance import guided, rescaled
from sora_train.diffusion.sampler import SAMPLERS, trailing
from sora_train.errors import RecipeError
from sora_train.settings import build

MEAN, STD = 0.7, 0.4
NULL = (torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
FLOW, DDPM = DiffusionConfig(kind="flow"), DiffusionConfig(kind="ddpm")
ZERO_SNR = DiffusionConfig(kind="ddpm", prediction="v", zero_terminal_snr=True)


def text(b: int) -> tuple[Tensor, Tensor]:
    return torch.ones(b, 3, 2), torch.ones(b, 3, dtype=torch.bool)


def drawn(model, objective, noise, *settings, **more):
    how = Sampling(**dict(zip(Sampling.model_fields, settings, strict=False)))
    return sample(model, objective, noise, *text(len(noise)), *NULL, how, **more)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def end_of_the_line(config: DiffusionConfig, noise: Tensor) -> Tensor:
    """Where the flow of probability takes noise, for Gaussian data: (x_t - mean_t) / std_t stays as it is."""
    if config.kind == "flow":
        near, far = 0.0, 1.0
    else:
        alpha = make_objective(config).schedule.alphas_cumprod[-1].item()
        near, far = math.sqrt(alpha), math.sqrt(1 - alpha)
    return MEAN + STD * (noise - near * MEAN) / math.hypot(near * STD, far)


@pytest.mark.parametrize(
    ("config", "sampler", "order"),
    [
        (FLOW, "euler", 1),
        (FLOW, "heun", 2),
        (DiffusionConfig(shift=3.0), "heun", 2),
        (DDPM, "ddim", 1),
        (DDPM, "dpm++", 2),
        (ZERO_SNR, "dpm++", 2),
    ],
)
def test_half_the_step_divides_the_error_by_two_to_the_order(config, sampler, order, best):
    objective, noise = make_objective(config), torch.randn(1, 2, 4, 4, 4, generator=generators(0)[0])
    model, exact = best(objective, MEAN, STD), end_of_the_line(config, noise)
    errors = [(drawn(model, objective, noise, sampler, n, 1.0) - exact).square().mean().sqrt() for n in (50, 100, 200)]
    # Steps of dpm++ are even in DDPM's own count and not in what the solver's order speaks of: a little less than 4.
    ratios = [more / less for more, less in pairwise(errors)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios) if order == 1 else all(ratio > 2.8 for ratio in ratios)
    assert errors[-1] < (0.01 if order == 1 else 0.0005)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_heuns_steps_are_those_of_diffusers_over_the_same_times(steps, shift):
    def model(x, told, *_):  # nothing that any order of steps would solve
        return torch.sin(3 * x) + told[:, None, None, None, None] / 500

    noise = torch.randn(2, 1, 4, 4, 4)
    found = drawn(model, make_objective(DiffusionConfig(shift=shift)), noise, "heun", steps, 1.0)
    times = flow.shift_time(torch.linspace(1, 0, steps + 1), shift)
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    # Its own times end at 0.001, and are shifted twice.
    scheduler.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    scheduler.timesteps = 1000 * torch.cat([times[:1], times[1:-1].repeat_interleave(2)])
    scheduler.set_begin_index(0)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
    assert torch.allclose(found, x, atol=1e-5)


@pytest.mark.parametrize("config", [DDPM, ZERO_SNR, DiffusionConfig(kind="ddpm", beta_schedule="cosine")])
@pytest.mark.parametrize("steps", [10, 30])
def test_ddpm_is_exact_with_the_best_variance_and_ends_on_the_mean(config, steps, best):
    objective = make_objective(config, learned_variance=True)
    mean_of = best(objective, MEAN, STD)
    alphas = objective.schedule.alphas_cumprod.double()
    usable = int((alphas >= 4e-5).sum()) if config.prediction == "epsilon" else 1000
    times = trailing(usable, steps)
    of_data = {t: STD**2 * (1 - alphas[t]) / (alphas[t] * STD**2 + 1 - alphas[t]) for t in times}  # Var[x | x_t]

    def model(x_t, told, *_):
        t = int(told[0])
        v = torch.zeros(())
        if t != times[-1]:
            after = alphas[times[times.index(t) + 1]]
            beta = 1 - alphas[t] / after
            low = beta * (1 - after) / (1 - alphas[t])  # Var[x_s | x_t, x]
            wanted = low + (after.sqrt() * beta / (1 - alphas[t])) ** 2 * of_data[t]
            v = 2 * (wanted / low).log() / (beta / low).log() - 1
        return torch.cat([mean_of(x_t, told, None, None), torch.full_like(x_t, v.item())], dim=2)

    made = drawn(model, objective, torch.randn(4, 4, 4, 32, 32), "ddpm", steps, 1.0, generators=generators(0, 1, 2, 3))
    assert made.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert made.std().item() == pytest.approx(math.sqrt(STD**2 - of_data[times[-1]]), rel=0.01)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("config", [DDPM, ZERO_SNR])
def test_a_thousand_steps_of_ddpm_are_its_equations(config, learned, best):
    objective, noise = make_objective(config, learned_variance=learned), torch.randn(2, 1, 4, 2, 2)
    plain = best(objective, MEAN, STD)

    def model(x, *rest):
        v = torch.sin(5 * x)
        return torch.cat([plain(x, *rest), v], dim=2) if learned else plain(x, *rest)

    found = drawn(model, objective, noise, "ddpm", 1000, 1.0, generators=generators(3, 4))
    schedule, own, x = objective.schedule, generators(3, 4), noise
    for step in range(999, -1, -1):
        t = torch.full((2,), float(step))
        output = model(x, t, None, None)
        data = ddpm.to_sample(config.prediction, output[:, :, :4], x, schedule.alphas_cumprod[t.long()])
        log = variance.learned_log_variance(schedule, output[:, :, 4:], t) if learned else None
        spread = (log if log is not None else schedule.posterior_log_variance[step]) / 2
        drawn_now = torch.stack([torch.randn(4, 1, 2, 2, generator=each) for each in own]) if step else 0
        x = variance.posterior_mean(schedule, data, x, t)
        x = x + torch.exp(torch.as_tensor(spread)) * (drawn_now.transpose(1, 2) if step else 0)
    assert torch.allclose(found, x, atol=2e-3)


def test_a_clip_of_ddpm_depends_on_its_generator_and_not_on_its_batch(best):
    objective = make_objective(DDPM)
    model, noise = best(objective, MEAN, STD), torch.randn(3, 2, 4, 4, 4)
    together = drawn(model, objective, noise, "ddpm", 7, 1.0, generators=generators(5, 6, 7))
    alone = drawn(model, objective, noise[1:2], "ddpm", 7, 1.0, generators=generators(6))
    other = drawn(model, objective, noise[1:2], "ddpm", 7, 1.0, generators=generators(8))
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(alone, other, atol=0.01)


@pytest.mark.parametrize("usable", [1000, 996])
def test_times_are_even_and_equal_diffusers_where_those_are_whole(usable):
    agree = 0
    for steps in range(1, usable + 1):
        times = trailing(usable, steps)
        assert times[0] == usable - 1
        assert len(times) == steps
        assert all(a > b >= 0 for a, b in pairwise(times))
        theirs = np.arange(usable, 0, -(usable / steps)).round().astype(int) - 1
        assert times == theirs.tolist() or [*times, -1] == theirs.tolist()
        agree += times == theirs.tolist()
    assert 0.9 * usable - 10 < agree < usable


def test_outside_of_its_interval_guidance_is_off_and_costs_nothing():
    passes = []

    def model(x, told, texts, mask):
        passes.append((round(told[0].item()), len(x)))
        return x * texts[:, :1, :1, None, None]

    noise, objective = torch.randn(2, 1, 4, 2, 2), make_objective(FLOW)
    within = drawn(model, objective, noise, "euler", 4, 3.0, (250.0, 750.0))
    assert passes == [(1000, 2), (750, 4), (500, 4), (250, 4)]
    none = drawn(model, objective, noise, "euler", 4, 1.0)
    assert torch.equal(none, drawn(model, objective, noise, "euler", 4, 3.0, (0.0, 0.0)))
    everywhere = drawn(model, objective, noise, "euler", 4, 3.0)
    assert not torch.equal(within, none)
    assert not torch.equal(within, everywhere)
    # dx/dt = x with the text, 0 without, so 3 x where guided: each step multiplies by 1 - 0.25 x 3, or x 1
    assert torch.allclose(within, noise * 0.75 * 0.25**3)


def test_rescaling_gives_each_clip_the_texts_standard_deviation():
    torch.manual_seed(0)
    with_text, output = torch.randn(3, 2, 4, 8, 8), 5 * torch.randn(3, 2, 4, 8, 8) + 1
    whole = rescaled(output, with_text, 1.0)
    assert torch.allclose(whole.std(dim=(1, 2, 3, 4)), with_text.std(dim=(1, 2, 3, 4)), rtol=1e-5)
    assert torch.allclose(rescaled(output, with_text, 0.7), 0.7 * whole + 0.3 * output, atol=1e-5)
    still = torch.full_like(output, 2.0)
    assert torch.equal(rescaled(still, with_text, 1.0), still)
    text_and_null = (*text(3), *NULL)

    def model(x, t, texts, mask):
        return x * (1 + texts[:, :1, :1, None, None])

    t = torch.randn(3, 2, 4, 8, 8)
    plain = guided(model, *text_and_null, 4.0)(t, 500.0)
    back = guided(model, *text_and_null, 4.0, rescale=1.0)(t, 500.0)
    assert torch.allclose(plain, 5 * t, atol=1e-5)  # 1 + 4 x (2 - 1)
    assert torch.allclose(back, 2 * t, atol=1e-5)


def test_guidance_leaves_the_variance_to_the_pass_with_text():
    def model(x, t, texts, mask):
        heard = texts[:, :1, :1, None, None].expand_as(x)  # 1 with text, 0 without
        return torch.cat([heard, 10 + heard], dim=2)

    output = guided(model, *text(2), *NULL, 3.0)(torch.zeros(2, 1, 4, 2, 2), 500.0)
    assert torch.equal(output[:, :, :4], torch.full((2, 1, 4, 2, 2), 3.0))
    assert torch.equal(output[:, :, 4:], torch.full((2, 1, 4, 2, 2), 11.0))


@pytest.mark.parametrize(("kind", "wrong"), [("flow", "ddim"), ("flow", "ddpm"), ("ddpm", "heun"), ("ddpm", "euler")])
def test_a_sampler_that_does_not_fit_is_refused_with_those_that_do(kind, wrong, best):
    objective, noise = make_objective(DiffusionConfig(kind=kind)), torch.randn(1, 1, 4, 2, 2)
    with pytest.raises(RecipeError, match=f"{wrong} does not fit diffusion.kind {kind}; use {SAMPLERS[kind][0]}, "):
        drawn(best(objective, MEAN, STD), objective, noise, wrong, 2, 1.0)


def test_auto_is_the_first_that_fits(best):
    noise = torch.randn(1, 1, 4, 2, 2)
    for config, name in ((FLOW, "euler"), (DDPM, "ddim")):
        objective = make_objective(config)
        model = best(objective, MEAN, STD)
        auto, named = (drawn(model, objective, noise, which, 3, 1.0) for which in ("auto", name))
        assert torch.equal(auto, named)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0; it should be greater than 0"),
        ({"guidance": -1.0}, "guidance is -1.0; it should be greater than or equal to 0"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance_interval": (800.0, 200.0)}, "guidance_interval is .*; it must rise"),
        ({"guidance_interval": (0.0, 1001.0)}, "must rise within 0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it should be less than or equal to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, says):
    with pytest.raises(RecipeError, match=says):
        build(Sampling, settings, {}, "validation")
