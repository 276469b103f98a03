"""DDPM's schedules, predictions and DDIM against their equations and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from sora_train.diffusion import DiffusionConfig, Sampling, ddpm, make_objective, sample

SCHEDULES = {"linear": ddpm.linear_betas(1e-4, 0.02), "cosine": ddpm.cosine_betas()}
TEXT = (torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def configured(schedule: str, prediction: str, zero_snr: bool = False, **keys: float) -> DiffusionConfig:
    return DiffusionConfig("ddpm", beta_schedule=schedule, prediction=prediction, zero_terminal_snr=zero_snr, **keys)


def theirs(schedule: str, prediction: str, zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        rescale_betas_zero_snr=zero_snr,
        prediction_type=DIFFUSERS[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
    )


def test_ddpm_times_are_uniform_over_the_steps():
    draw, g = make_objective(DiffusionConfig("ddpm")).draw_time, torch.Generator().manual_seed(0)
    t = torch.stack([draw(g, (1, 4, 4, 4)) for _ in range(20000)])
    assert (t.min(), t.max()) == (0, 999)
    assert t.mean().item() == pytest.approx(499.5, abs=6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_betas_and_alphas_are_those_of_diffusers_but_for_its_rounding(schedule, zero_snr):
    found = make_objective(configured(schedule, "v", zero_snr)).schedule
    wanted = theirs(schedule, "v", zero_snr)
    assert torch.allclose(found.betas, wanted.betas, rtol=2e-3, atol=1e-6)
    assert torch.allclose(found.alphas_cumprod, wanted.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_the_cosine_schedule_leaves_the_squared_cosine_of_the_data():
    alphas = make_objective(configured("cosine", "v")).schedule.alphas_cumprod
    for t in (0, 1, 250, 500, 998):
        f = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in (0, t + 1)]
        assert alphas[t].item() == pytest.approx(f[1] / f[0], rel=1e-6)
    assert ddpm.cosine_betas().max() == ddpm.cosine_betas()[-1] == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_makes_the_last_step_pure_noise(schedule):
    before = SCHEDULES[schedule]
    after = ddpm.zero_terminal_snr(before)
    assert torch.allclose(after.float(), rescale_zero_terminal_snr(before).float(), rtol=1e-6)  # theirs, in float64
    objective = make_objective(configured(schedule, "v", True))
    assert objective.schedule.alphas_cumprod[-1] == objective.schedule.snr[-1] == 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-9)
    assert all(values.isfinite().all() for values in vars(objective.schedule).values())
    noise = torch.randn(1, 1, 4, 2, 2)
    assert torch.equal(objective.add_noise(torch.randn(1, 1, 4, 2, 2), noise, torch.tensor([999.0]))[0], noise)


@pytest.mark.parametrize("prediction", DIFFUSERS)
def test_data_are_mixed_and_targets_made_as_by_diffusers(prediction):
    x, noise, t = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4), torch.tensor([0.0, 500.0, 999.0])
    scheduler = theirs("linear", prediction)
    x_t, target = make_objective(configured("linear", prediction)).add_noise(x, noise, t)
    assert torch.allclose(x_t, scheduler.add_noise(x, noise, t.long()), atol=1e-6)
    wanted = {"epsilon": noise, "sample": x, "v": scheduler.get_velocity(x, noise, t.long())}[prediction]
    assert torch.allclose(target, wanted, atol=1e-6)


@pytest.mark.parametrize("prediction", DIFFUSERS)
def test_a_target_turned_round_is_the_data(prediction):
    x, noise, alpha = torch.randn(64, 1, 2, 4, 4), torch.randn(64, 1, 2, 4, 4), torch.linspace(0.01, 0.9999, 64)
    target = ddpm.target(prediction, x, noise, alpha)
    assert torch.allclose(
        ddpm.to_sample(prediction, target, ddpm.add_noise(x, noise, alpha[:, None]), alpha), x, atol=1e-5
    )


@pytest.mark.parametrize("prediction", DIFFUSERS)
def test_min_snr_weights_the_error_in_the_data_up_to_gamma(prediction):
    plain, weighted = (make_objective(configured("linear", prediction, min_snr_gamma=g)) for g in (0.0, 5.0))
    x, noise, wrong = torch.randn(3, 1000, 1, 2, 2, 2, dtype=torch.float64).float()
    t = torch.arange(1000.0)
    text = (torch.ones(1000, 3, 2), torch.ones(1000, 3, dtype=torch.bool))
    alphas = torch.cumprod(1 - SCHEDULES["linear"], 0)
    snr = alphas / (1 - alphas)
    in_data = {"epsilon": 1 / snr, "v": 1 / (snr + 1), "sample": 1}[prediction]  # squared error in the data / its own
    found, unweighted = (made.loss(lambda *_: wrong, x, noise, t, *text).double() for made in (weighted, plain))
    assert torch.allclose(found, unweighted * in_data * snr.clamp(max=5), rtol=1e-5)


@pytest.mark.parametrize(("prediction", "last"), [("epsilon", 1), ("v", 0), ("sample", 0)])
def test_min_snr_is_finite_where_nothing_is_left_of_the_data(prediction, last):
    snr = make_objective(configured("cosine", "v", True)).schedule.snr
    weights = ddpm.min_snr_weights(snr, 5.0, prediction)
    assert weights.isfinite().all()
    assert weights[-1] == last


@pytest.mark.parametrize(
    ("schedule", "prediction", "zero_snr"),
    [("linear", "epsilon", False), ("linear", "v", True), ("cosine", "v", False), ("cosine", "sample", True)],
)
@pytest.mark.parametrize("steps", [20, 1000])
def test_ddim_steps_are_those_of_diffusers_where_they_divide_1000(schedule, prediction, zero_snr, steps, best):
    torch.manual_seed(0)
    objective, noise = make_objective(configured(schedule, prediction, zero_snr)), torch.randn(1, 1, 4, 8, 8)
    model = best(objective, 0.7, 0.4)
    found = sample(model, objective, noise, *TEXT, *TEXT, Sampling(steps=steps, guidance=1.0))
    scheduler, x = theirs(schedule, prediction, zero_snr), noise
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t[None].float(), *TEXT), t, x).prev_sample
    assert torch.allclose(found, x, atol=1e-4)


@pytest.mark.parametrize("steps", [7, 30, 300, 600, 1000, 1500])
def test_ddim_ends_at_the_data_for_any_number_of_steps(steps, best):
    # diffusers' steps end elsewhere than the next one starts if they don't divide 1000: a mean of 0.51 after 600
    torch.manual_seed(0)
    objective, noise = make_objective(DiffusionConfig("ddpm")), torch.randn(1, 4, 4, 64, 64)
    made = sample(best(objective, 0.7, 0.4), objective, noise, *TEXT, *TEXT, Sampling(steps=steps, guidance=1.0))
    assert made.mean().item() == pytest.approx(0.7, abs=0.01)
    assert made.std().item() == pytest.approx(0.4, abs=0.01 + 1.5 / steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_slightly_wrong_epsilon_makes_slightly_wrong_samples(schedule, best):
    torch.manual_seed(0)
    objective, noise = make_objective(configured(schedule, "epsilon")), torch.randn(1, 4, 4, 64, 64)
    model = best(objective, 0.7, 0.4)
    good, off = (
        sample(lambda *a, by=by: by * model(*a), objective, noise, *TEXT, *TEXT, Sampling(steps=20, guidance=1.0))
        for by in (1.0, 1.01)
    )
    assert (good - off).square().mean().sqrt() < 0.1
