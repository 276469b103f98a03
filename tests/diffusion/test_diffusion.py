"""Diffusion against closed forms: on Gaussian data the best prediction is known."""

import pytest
import torch
from diffusers import DDIMScheduler

from sora_train.diffusion import DiffusionConfig, make_objective, sample

NULL = (torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
FLOW, DDPM = DiffusionConfig(kind="flow"), DiffusionConfig(kind="ddpm")


def text(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(b, 3, 2), torch.ones(b, 3, dtype=torch.bool)


def best_flow(mean: float, std: float):
    """E[noise - x | x_t] for x ~ N(mean, std^2) and x_t = (1 - t) x + t noise."""

    def model(x_t, told, text, mask):
        t = (told / 1000)[:, None, None, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = (x_t - (1 - t) * mean) / variance
        return t * residual - (mean + (1 - t) * std**2 * residual)

    return model


def best_ddpm(mean: float, std: float):
    """E[noise | x_t] for x ~ N(mean, std^2) and x_t = sqrt(a) x + sqrt(1 - a) noise."""

    def model(x_t, told, text, mask):
        a = make_objective(DDPM).alphas[told.long()][:, None, None, None, None]
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


@pytest.mark.parametrize(("config", "best"), [(FLOW, best_flow), (DDPM, best_ddpm)])
def test_sampling_with_the_best_model_gives_the_data_distribution(config, best):
    torch.manual_seed(0)
    noise = torch.randn(16, 4, 4, 16, 16)
    made = sample(best(0.7, 0.4), make_objective(config), noise, *text(16), *NULL, steps=200, guidance=1.0)
    assert made.mean().item() == pytest.approx(0.7, abs=0.01)
    assert made.std().item() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(("config", "best"), [(FLOW, best_flow), (DDPM, best_ddpm)])
def test_no_prediction_beats_the_best_one(config, best):
    torch.manual_seed(0)
    objective, g = make_objective(config), torch.Generator().manual_seed(0)
    x, noise = 0.7 + 0.4 * torch.randn(512, 1, 4, 4, 4), torch.randn(512, 1, 4, 4, 4)
    t = torch.stack([objective.draw_time(g) for _ in range(512)])
    good = objective.loss(best(0.7, 0.4), x, noise, t, *text(512)).mean()
    for wrong in (best(0.6, 0.4), best(0.7, 0.5)):
        assert objective.loss(wrong, x, noise, t, *text(512)).mean() > good


def test_a_perfect_prediction_costs_nothing():
    x, noise, t = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    assert not make_objective(FLOW).loss(lambda *_: noise - x, x, noise, t, *text(3)).any()


def test_flow_times_are_logit_normal_and_shifted():
    draw, g = (
        make_objective(DiffusionConfig(time_mean=1.0, time_std=0.5, shift=3.0)).draw_time,
        torch.Generator().manual_seed(0),
    )
    t = torch.stack([draw(g) for _ in range(20000)])
    unshifted = t / (3 - 2 * t)
    normal = torch.logit(unshifted)
    assert normal.mean().item() == pytest.approx(1.0, abs=0.02)
    assert normal.std().item() == pytest.approx(0.5, abs=0.02)


def test_ddpm_times_are_uniform_over_the_steps():
    draw, g = make_objective(DDPM).draw_time, torch.Generator().manual_seed(0)
    t = torch.stack([draw(g) for _ in range(20000)])
    assert (t.min(), t.max()) == (0, 999)
    assert t.mean().item() == pytest.approx(499.5, abs=6)


def test_ddpm_mixes_as_diffusers_scheduler_does():
    objective = make_objective(DDPM)
    x, noise, t = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4), torch.tensor([0.0, 500.0, 999.0])
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").add_noise(x, noise, t.long())
    assert torch.allclose(objective.mix(x, noise, t)[0], theirs, atol=1e-6)


def test_guidance_goes_past_the_caption_away_from_the_empty_prompt():
    def model(x, t, text, mask):  # predicts the mean of the embeddings it may read
        return torch.zeros_like(x) + ((text[..., 0] * mask).sum(1) / mask.sum(1))[:, None, None, None, None]

    noise = torch.zeros(2, 1, 4, 2, 2)
    for guidance, wanted in ((1.0, -1.0), (4.0, -4.0)):  # the velocity is 1 with text and 0 without
        made = sample(model, make_objective(FLOW), noise, *text(2), *NULL, steps=4, guidance=guidance)
        assert torch.allclose(made, torch.full_like(made, wanted))


def test_progress_is_told_after_every_step():
    told: list[tuple[int, int]] = []
    noise = torch.randn(1, 1, 4, 2, 2)
    objective = make_objective(FLOW)
    sample(
        best_flow(0.0, 1.0), objective, noise, *text(1), *NULL, 5, 1.0, lambda done, steps: told.append((done, steps))
    )
    assert told == [(i, 5) for i in range(1, 6)]
