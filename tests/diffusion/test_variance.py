"""The learned variance against Bayes, scipy, and the closed forms of Gaussian data."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sora_train.diffusion import DiffusionConfig, make_objective, variance

CONFIGS = {
    "epsilon": DiffusionConfig("ddpm"),
    "epsilon cosine": DiffusionConfig("ddpm", beta_schedule="cosine"),
    "v zero SNR": DiffusionConfig("ddpm", prediction="v", zero_terminal_snr=True),
    "sample": DiffusionConfig("ddpm", prediction="sample"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
EVERY_STEP = torch.arange(1000.0)


def text(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(b, 3, 2), torch.ones(b, 3, dtype=torch.bool)


def standard(*shape: int) -> torch.Tensor:
    """Normal numbers whose mean and variance are exact in each sample."""
    x = torch.randn(shape)
    return (x - x.mean(dim=(1, 2, 3, 4), keepdim=True)) / x.std(dim=(1, 2, 3, 4), keepdim=True, correction=0)


def best_v(objective, std: float) -> torch.Tensor:
    """Per step, v of the variance that x_t-1 has given x_t, for data of this standard deviation: what is best."""
    s = {name: values.double() for name, values in vars(objective.schedule).items()}
    of_data = (
        std**2 * (1 - s["alphas_cumprod"]) / (s["alphas_cumprod"] * std**2 + 1 - s["alphas_cumprod"])
    )  # Var[x | x_t]
    given_data = s["posterior_log_variance"].exp()
    given_data[0] = 0  # x_-1 is x
    variance = (given_data + s["posterior_coef_x0"] ** 2 * of_data).log()
    v = 2 * (variance - s["posterior_log_variance"]) / (s["log_beta"] - s["posterior_log_variance"]) - 1
    return v.nan_to_num(0, 0, 0).float()[:, None, None, None, None]  # where the range is a point, any v


@every_config
@pytest.mark.parametrize("t", [1, 2, 300, 998])
def test_the_posterior_is_what_bayes_finds_on_a_grid(config, t):
    schedule, x, x_t = make_objective(config).schedule, 0.8, -0.5
    beta, before = schedule.betas[t].item(), schedule.alphas_cumprod[t - 1].item()
    grid = np.linspace(-8, 8, 2_000_001)  # x_t-1
    log = stats.norm(math.sqrt(before) * x, math.sqrt(1 - before)).logpdf(grid)  # q(x_t-1 | x)
    log += stats.norm(math.sqrt(1 - beta) * grid, math.sqrt(beta)).logpdf(x_t)  # q(x_t | x_t-1)
    density = np.exp(log - log.max())
    mean = np.average(grid, weights=density)
    of_grid = np.average((grid - mean) ** 2, weights=density)
    ones = torch.ones(1, 1, 1, 1, 1)
    found = variance.posterior_mean(schedule, x * ones, x_t * ones, torch.tensor([float(t)]))
    assert found.item() == pytest.approx(mean, rel=2e-3, abs=2e-4)
    assert schedule.posterior_log_variance[t].exp().item() == pytest.approx(of_grid, rel=2e-3)


def test_v_leads_from_the_posteriors_variance_to_beta():
    schedule, ones = make_objective(CONFIGS["epsilon"]).schedule, torch.ones(1000, 1, 1, 1, 1)
    low, high, middle = (
        variance.learned_log_variance(schedule, v * ones, EVERY_STEP).exp().flatten() for v in (-1, 1, 0)
    )
    alphas, betas = schedule.alphas_cumprod.double(), schedule.betas.double()
    assert torch.allclose(high.double(), betas)
    assert torch.allclose(low[1:].double(), betas[1:] * (1 - alphas[:-1]) / (1 - alphas[1:]), rtol=1e-3)
    assert low[0] == low[1]
    assert torch.allclose(middle, (low * high).sqrt())


def test_kl_is_that_of_torch():
    mean, other_mean, log, other_log = torch.randn(4, 1000)
    mine = variance.kl(mean, log, other_mean, other_log)
    first, second = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mean, log), (other_mean, other_log)))
    assert torch.allclose(mine, torch.distributions.kl_divergence(first, second), rtol=1e-4, atol=1e-5)


def test_the_discretised_likelihood_is_scipys_mass_of_the_bin():
    torch.manual_seed(0)
    x, mean, log = 1.6 * torch.rand(3000) - 0.8, 1.6 * torch.rand(3000) - 0.8, -12 * torch.rand(3000)
    x[:500], x[500:1000] = -1 - torch.rand(500), 1 + torch.rand(500)
    mean[::2] = x[::2] + 0.01 * torch.randn(1500)
    normal = stats.norm(mean.double(), (0.5 * log.double()).exp())
    low, high = x.double().numpy() - 1 / 255, x.double().numpy() + 1 / 255
    wanted = np.where(x > 0.999, normal.logsf(low), normal.logcdf(high))
    inner = np.abs(x.numpy()) < 0.999
    # Differences of probabilities hold up to 8 standard deviations in float64; in the left tail's logarithms, anywhere.
    flip = low + high > 2 * mean.double().numpy()
    a = np.where(flip, normal.logsf(low), normal.logcdf(high))
    b = np.where(flip, normal.logsf(high), normal.logcdf(low))
    wanted[inner] = (a + np.log(-np.expm1(b - a)))[inner]
    found = variance.log_likelihood(x, mean, log).double().numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


def test_the_probabilities_of_all_bins_add_up_to_one():
    x = torch.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.3), (-0.97, 0.05), (0.0, 2.0), (2.0, 0.1)):
        total = variance.log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std))).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-4)


@every_config
def test_the_bound_of_the_best_model_is_the_entropy_of_the_data(config, best):
    torch.manual_seed(0)
    std, objective = 0.2, make_objective(config, True)
    x, noise = std * standard(1, 1, 1, 48, 48).expand(1000, -1, -1, -1, -1), standard(1000, 1, 1, 48, 48)
    v, model = best_v(objective, std), best(objective, 0.0, std)
    assert v.abs().max() <= 1

    def both(x_t, *rest):
        return torch.cat([model(x_t, *rest), v.expand_as(x_t)], dim=2)

    # eq. 16: what the bound adds to the simple loss, over all steps, is 1000 x weight x the mean of its terms
    plain, hybrid = (
        objective.loss(model, x, noise, EVERY_STEP, *text(1000)).double()
        for objective, model in ((make_objective(config), model), (objective, both))
    )
    bits = ((hybrid - plain).mean() / 0.001).item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) - math.log2(2 / 255)
    assert bits == pytest.approx(entropy, abs=0.03)


@every_config
def test_the_bound_is_least_at_the_best_variance(config, best):
    torch.manual_seed(0)
    # Later steps leave the variance next to nothing to choose; in the first the width of a bin counts too.
    std, objective, t = 0.2, make_objective(config, True), torch.arange(1.0, 10.0)
    x, noise = std * torch.randn(9, 1, 1, 128, 128), torch.randn(9, 1, 1, 128, 128)
    x_t, _ = objective.add_noise(x, noise, t)
    near = objective.schedule.alphas_cumprod[1:10, None, None, None, None]
    predicted = near.sqrt() * std**2 * x_t / (near * std**2 + 1 - near)  # E[x | x_t]
    v = best_v(objective, std)[1:10]
    good, less, more = (
        variance.bound(objective.schedule, x, x_t, predicted, (v + by).expand_as(x), t) for by in (0.0, -0.5, 0.5)
    )
    assert (good < less).all()
    assert (good < more).all()


@every_config
def test_the_bound_moves_the_variance_and_never_the_mean(config):
    torch.manual_seed(0)
    objective = make_objective(config, True)
    x, noise = torch.randn(1000, 1, 2, 3, 3), torch.randn(1000, 1, 2, 3, 3)
    output = torch.randn(1000, 1, 4, 3, 3, requires_grad=True)
    hybrid = objective.loss(lambda *_: output, x, noise, EVERY_STEP, *text(1000)).sum()
    (gradient,) = torch.autograd.grad(hybrid, output)
    plain = make_objective(config)
    simple = plain.loss(lambda *_: output[:, :, :2], x, noise, EVERY_STEP, *text(1000)).sum()
    (of_simple,) = torch.autograd.grad(simple, output)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[:, :, :2], of_simple[:, :, :2])
    assert gradient[:900, :, 2:].flatten(1).any(dim=1).all()


def test_a_weight_of_zero_is_the_simple_loss():
    objective = make_objective(DiffusionConfig("ddpm", vlb_weight=0.0), True)
    x, noise, t = torch.randn(4, 1, 2, 3, 3), torch.randn(4, 1, 2, 3, 3), torch.tensor([0.0, 1.0, 500.0, 999.0])
    output = torch.randn(4, 1, 4, 3, 3)
    simple = make_objective(CONFIGS["epsilon"]).loss(lambda *_: output[:, :, :2], x, noise, t, *text(4))
    assert torch.equal(objective.loss(lambda *_: output, x, noise, t, *text(4)), simple)


def test_a_flow_has_no_variance_to_learn():
    with pytest.raises(ValueError, match="model.learned_variance needs diffusion.kind ddpm"):
        make_objective(DiffusionConfig(), True)
