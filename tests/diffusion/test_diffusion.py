"""Objectives and samplers against closed forms: on Gaussian data the best prediction is known."""

import itertools
import math

import pytest
import torch
from scipy import stats

from sora_train.diffusion import DiffusionConfig, Sampling, make_objective, sample

NULL = (torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
SHAPE = (2, 4, 8, 8)
FLOW, DDPM = DiffusionConfig(kind="flow"), DiffusionConfig(kind="ddpm")
ALL = {
    "flow": FLOW,
    "flow uniform": DiffusionConfig(times="uniform"),
    "flow shifted": DiffusionConfig(shift=1.5, shift_tokens=512),
    "epsilon": DDPM,
    "epsilon cosine": DiffusionConfig(kind="ddpm", beta_schedule="cosine"),
    "v": DiffusionConfig(kind="ddpm", prediction="v"),
    "v zero SNR": DiffusionConfig(kind="ddpm", prediction="v", zero_terminal_snr=True),
    "v cosine min-SNR": DiffusionConfig(kind="ddpm", prediction="v", beta_schedule="cosine", min_snr_gamma=5.0),
    "sample cosine zero SNR": DiffusionConfig(
        kind="ddpm", prediction="sample", beta_schedule="cosine", zero_terminal_snr=True
    ),
}
every_config = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


def text(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(b, 3, 2), torch.ones(b, 3, dtype=torch.bool)


@every_config
def test_sampling_with_the_best_model_gives_the_data_distribution(config, best):
    torch.manual_seed(0)
    noise, objective = torch.randn(16, 4, 4, 16, 16), make_objective(config)
    made = sample(best(objective, 0.7, 0.4), objective, noise, *text(16), *NULL, Sampling(steps=200, guidance=1.0))
    assert made.mean().item() == pytest.approx(0.7, abs=0.01)
    assert made.std().item() == pytest.approx(0.4, abs=0.01)


@every_config
def test_no_prediction_beats_the_best_one(config, best):
    torch.manual_seed(0)
    objective, g = make_objective(config), torch.Generator().manual_seed(0)
    x, noise = 0.7 + 0.4 * torch.randn(512, 1, 4, 4, 4), torch.randn(512, 1, 4, 4, 4)
    t = torch.stack([objective.draw_time(g, (1, 4, 4, 4)) for _ in range(512)])
    good = objective.loss(best(objective, 0.7, 0.4), x, noise, t, *text(512)).mean()
    for wrong in (best(objective, 0.6, 0.4), best(objective, 0.7, 0.5)):
        assert objective.loss(wrong, x, noise, t, *text(512)).mean() > good


@pytest.mark.parametrize("config", [FLOW, DDPM])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_arithmetic_is_float32_whatever_comes_in(config, learned_variance):
    if learned_variance and config.kind == "flow":
        return
    torch.manual_seed(0)
    objective = make_objective(config, learned_variance)
    x, noise = torch.randn(64, *SHAPE).bfloat16(), torch.randn(64, *SHAPE).bfloat16()
    t = torch.stack([objective.draw_time(torch.Generator().manual_seed(i), SHAPE) for i in range(64)])
    output = torch.randn(64, 2, 8 if learned_variance else 4, 8, 8).bfloat16()
    seen = []
    half = objective.loss(lambda x_t, *_: seen.append(x_t) or output, x, noise, t, *text(64))
    full = objective.loss(lambda *_: output.float(), x.float(), noise.float(), t, *text(64))
    assert torch.equal(half, full)
    assert {seen[0].dtype, half.dtype} == {torch.float32}


@pytest.mark.parametrize(("config", "far"), [(FLOW, 1.0), (DDPM, 999.0)])
def test_the_model_is_told_a_time_from_0_to_1000(config, far):
    told = make_objective(config).model_time(torch.tensor([0.0, far]))
    assert told[0] == 0
    assert 999 <= told[1] <= 1000


def test_a_perfect_prediction_costs_nothing():
    x, noise, t = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    assert not make_objective(FLOW).loss(lambda *_: noise - x, x, noise, t, *text(3)).any()


def test_a_model_of_another_number_of_channels_is_refused():
    x, t = torch.zeros(1, 1, 4, 2, 2), torch.zeros(1)
    with pytest.raises(ValueError, match="8 channels for latents of 4. Expected 4"):
        make_objective(DDPM).loss(lambda *_: torch.zeros(1, 1, 8, 2, 2), x, x, t, *text(1))


@pytest.mark.parametrize(
    ("config", "unshifted"),
    [
        (DiffusionConfig(time_mean=1.0, time_std=0.5, shift=3.0), lambda t: stats.norm(1.0, 0.5).cdf(torch.logit(t))),
        (DiffusionConfig(times="uniform", shift=3.0), lambda t: t.numpy()),
    ],
    ids=["logit-normal", "uniform"],
)
def test_flow_times_have_the_asked_distribution_and_are_shifted(config, unshifted):
    draw, g = make_objective(config).draw_time, torch.Generator().manual_seed(0)
    t = torch.stack([draw(g, SHAPE) for _ in range(5000)])
    assert stats.kstest(unshifted(t / (3 - 2 * t)), "uniform").pvalue > 0.01


def test_the_shift_grows_with_the_root_of_the_latent_positions():
    plain, g = make_objective(DiffusionConfig(times="uniform")), torch.Generator()
    objective = make_objective(DiffusionConfig(times="uniform", shift=1.5, shift_tokens=2 * 8 * 8))
    for shape, ratio in (((2, 4, 8, 8), 1), ((2, 4, 16, 16), 2), ((1, 4, 4, 8), 0.5), ((16, 4, 8, 16), 4)):
        s = 1.5 * ratio
        u, t = plain.draw_time(g.manual_seed(1), shape), objective.draw_time(g.manual_seed(1), shape)
        assert t.item() == pytest.approx(s * u.item() / (1 + (s - 1) * u.item()))  # Esser et al. 2024, eq. 23
        told: list[float] = []

        def model(x, t, text, mask, told=told):
            told.append(t.item())
            return torch.zeros_like(x)

        sample(model, objective, torch.zeros(1, *shape), *text(1), *NULL, Sampling(steps=4, guidance=1.0))
        assert told == pytest.approx([1000 * s * u / (1 + (s - 1) * u) for u in (1, 0.75, 0.5, 0.25)])


def test_a_root_shift_keeps_the_uncertainty_of_the_mean_latent():
    # The argument of Esser et al., section 5.3.2: n positions of the same value c show it as t / (1 - t) / sqrt(n).
    objective, t = make_objective(DiffusionConfig(shift_tokens=100)), 0.3
    s = objective.shift((4, 1, 10, 10))
    moved = s * t / (1 + (s - 1) * t)
    assert moved / (1 - moved) / math.sqrt(400) == pytest.approx(t / (1 - t) / math.sqrt(100))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kind": "ddpm", "shift": 3.0}, "diffusion.shift 3.0 is read only if diffusion.kind is flow"),
        ({"prediction": "v"}, "diffusion.prediction v is read only if diffusion.kind is ddpm"),
        ({"min_snr_gamma": 5.0}, "leave min_snr_gamma at 0.0"),
        ({"times": "uniform", "time_mean": 1.0}, "only if diffusion.times is logit_normal"),
        ({"kind": "ddpm", "beta_schedule": "cosine", "beta_end": 0.03}, "only if diffusion.beta_schedule is linear"),
        ({"kind": "ddpm", "zero_terminal_snr": True}, "needs diffusion.prediction v or sample"),
        ({"kind": "ddpm", "vlb_weight": -1.0}, "diffusion.vlb_weight is -1.0; it must be at least 0"),
        ({"shift_tokens": -1}, "diffusion.shift_tokens is -1; it must be at least 0"),
        ({"shift": 0.0}, "must be above 0"),
    ],
)
def test_keys_that_nothing_reads_or_that_conflict_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        DiffusionConfig(**keys)


def test_guidance_goes_past_the_caption_away_from_the_empty_prompt():
    def model(x, t, text, mask):  # predicts the mean of the embeddings it may read
        return torch.zeros_like(x) + ((text[..., 0] * mask).sum(1) / mask.sum(1))[:, None, None, None, None]

    noise = torch.zeros(2, 1, 4, 2, 2)
    for guidance, wanted in ((1.0, -1.0), (4.0, -4.0)):  # the velocity is 1 with text and 0 without
        made = sample(model, make_objective(FLOW), noise, *text(2), *NULL, Sampling(steps=4, guidance=guidance))
        assert torch.allclose(made, torch.full_like(made, wanted))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_learned_variance_changes_nothing_about_the_samples(best, guidance):
    torch.manual_seed(0)
    plain, learned, noise = make_objective(DDPM), make_objective(DDPM, True), torch.randn(2, 1, 4, 4, 4)
    model = best(plain, 0.7, 0.4)

    def both(x, *rest):
        return torch.cat([model(x, *rest), torch.full_like(x, torch.nan)], dim=2)

    made = [
        sample(each, objective, noise, *text(2), *NULL, Sampling(steps=5, guidance=guidance))
        for each, objective in ((model, plain), (both, learned))
    ]
    assert torch.equal(*made)


def test_progress_is_told_after_every_step(best):
    noise = torch.randn(1, 1, 4, 2, 2)
    for config, steps in itertools.product((FLOW, DDPM), (1, 7)):
        told: list[tuple[int, int]] = []
        objective = make_objective(config)

        def progress(done: int, of: int, told=told) -> None:
            told.append((done, of))

        sample(
            best(objective, 0.0, 1.0),
            objective,
            noise,
            *text(1),
            *NULL,
            Sampling(steps=steps, guidance=1),
            progress=progress,
        )
        assert told == [(i, steps) for i in range(1, steps + 1)]
