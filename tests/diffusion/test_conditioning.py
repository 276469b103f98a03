"""Given first frames: clean, told as time 0, outside of the loss; and every sampler and guidance shows them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sora_train.diffusion import ConditioningConfig, DiffusionConfig, Objective, Sampling, make_objective, sample
from sora_train.diffusion.guidance import FirstFrames, guided
from sora_train.diffusion.sampler import SAMPLERS

NULL = (torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
FLOW = DiffusionConfig(shift=2.0)
DDPM = DiffusionConfig(kind="ddpm")
V = DiffusionConfig(kind="ddpm", prediction="v", zero_terminal_snr=True)
OBJECTIVES = {
    "flow": make_objective(FLOW),
    "epsilon": make_objective(DDPM),
    "sample": make_objective(replace(DDPM, prediction="sample")),
    "v min-SNR": make_objective(replace(V, min_snr_gamma=5.0)),
    "learned variance": make_objective(DDPM, learned_variance=True),
}
GIVEN = torch.tensor([1, 0, 2, 1])
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
every_sampler = pytest.mark.parametrize(
    ("config", "sampler"),
    [(FLOW, name) for name in SAMPLERS["flow"]] + [(config, name) for config in (DDPM, V) for name in SAMPLERS["ddpm"]],
)


def text(b: int) -> tuple[Tensor, Tensor]:
    return torch.ones(b, 3, 2), torch.ones(b, 3, dtype=torch.bool)


def clips(objective: Objective) -> tuple[Tensor, ...]:
    """Latents, noise and times of four clips of three frames; one of the times is 0."""
    torch.manual_seed(0)
    shares = torch.tensor([0.0, 0.3, 0.5, 0.9])
    t = shares if objective.config.kind == "flow" else (999 * shares).floor()
    return torch.randn(4, 3, 2, 4, 4), torch.randn(4, 3, 2, 4, 4), t


def output_of(objective: Objective) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 4 if objective.learned_variance else 2, 4, 4, requires_grad=True)


@every_objective
def test_given_frames_are_clean_and_told_as_time_0(objective):
    (x, noise, t), seen = clips(objective), []

    def model(*inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return output_of(objective)

    objective.loss(model, x, noise, t, *text(4), GIVEN)
    objective.loss(model, x, noise, t, *text(4))
    (x_t, told, *_), (plain, told_plain, *_) = seen
    for i, k in enumerate(GIVEN):
        assert torch.equal(x_t[i, :k], x[i, :k])
        assert torch.equal(x_t[i, k:], plain[i, k:])
        assert not told[i, :k].any()
        assert (told[i, k:] == told_plain[i]).all()


@every_objective
def test_no_gradient_reaches_what_is_predicted_of_given_frames(objective):
    output = output_of(objective)
    losses = objective.loss(lambda *_: output, *clips(objective), *text(4), GIVEN)
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    for i, k in enumerate(GIVEN):
        assert not gradient[i, :k].any()
        assert gradient[i, k:].flatten(1).any(dim=1).all()


@every_objective
def test_a_clips_loss_is_that_of_its_other_frames_alone(objective):
    (x, noise, t), output = clips(objective), output_of(objective).detach()
    found = objective.loss(lambda *_: output, x, noise, t, *text(4), GIVEN)
    for i, k in enumerate(GIVEN):
        alone = output[i : i + 1, k:]
        expected = objective.loss(lambda *_, y=alone: y, x[i, None, k:], noise[i, None, k:], t[i, None], *text(1))
        torch.testing.assert_close(found[i], expected[0], rtol=1e-5, atol=1e-7)


def test_a_clip_without_given_frames_costs_the_same_beside_clips_with():
    objective = OBJECTIVES["flow"]
    (x, noise, t), output = clips(objective), output_of(objective).detach()
    plain = objective.loss(lambda *_: output, x, noise, t, *text(4))
    beside = objective.loss(lambda *_: output, x, noise, t, *text(4), torch.zeros_like(GIVEN))
    torch.testing.assert_close(plain, beside)


def follower(objective: Objective):
    """The best model of clips whose frames are all alike: it repeats the first frame if that is told as clean.

    Otherwise it predicts a clip of zeros.
    """

    def model(x_t: Tensor, told: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        times = told if told.ndim == 2 else told[:, None].expand(x_t.shape[:2])
        data = torch.where((times[:, :1] == 0)[..., None, None, None], x_t[:, :1], 0).expand_as(x_t)
        times = times[:, -1, None, None, None, None]
        if objective.config.kind == "flow":
            return (x_t - data) / (times / 1000)
        alpha = objective.schedule.alphas_cumprod[times.long()]
        noise = (x_t - alpha.sqrt() * data) / (1 - alpha).sqrt()
        return noise if objective.config.prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * data

    return model


@every_sampler
@pytest.mark.parametrize("how", [{"guidance": 1}, {"guidance": 3}, {"guidance": 3, "guidance_rescale": 1}])
def test_every_sampler_shows_the_model_the_given_frames_at_every_step(config, sampler, how):
    objective, g = make_objective(config), torch.Generator().manual_seed(0)
    noise, given = torch.randn(2, 4, 2, 4, 4, generator=g), torch.randn(2, 1, 2, 4, 4, generator=g)
    settings = Sampling(sampler=sampler, steps=6, **how)
    made = sample(follower(objective), objective, noise, *text(2), *NULL, settings, given=given)
    assert torch.equal(made[:, :1], given)
    near = 0.02 if sampler == "unipc" else 1e-3  # its times are rounded to whole numbers
    torch.testing.assert_close(made, given.expand_as(made), rtol=near, atol=near)
    without = sample(follower(objective), objective, noise, *text(2), *NULL, settings)
    torch.testing.assert_close(without, torch.zeros_like(made), rtol=near, atol=near)


@every_sampler
def test_guidance_without_the_frames_goes_away_from_a_pass_that_has_them_noisy(config, sampler):
    objective, g = make_objective(config), torch.Generator().manual_seed(0)
    noise, given = torch.randn(1, 3, 2, 4, 4, generator=g), torch.randn(1, 1, 2, 4, 4, generator=g)
    settings = Sampling(sampler=sampler, steps=4, guidance=2, guidance_without="text_and_frames")
    model, seen = follower(objective), []

    def spy(x_t: Tensor, told: Tensor, *texts: Tensor) -> Tensor:
        seen.append((x_t, told))
        return model(x_t, told, *texts)

    made = sample(spy, objective, noise, *text(1), *NULL, settings, given=given)
    for x_t, told in seen:
        assert torch.equal(x_t[:1, :1], given)
        assert told[0].tolist() == [0, told[1, 1], told[1, 1]]
        assert (told[1] == told[1, 1]).all()
        own = told[1, :1] / (1000 if config.kind == "flow" else 1)
        torch.testing.assert_close(x_t[1:, :1], objective.add_noise(given, noise[:, :1], own)[0])
        assert torch.equal(x_t[0, 1:], x_t[1, 1:])
    assert torch.equal(made[:, :1], given)
    # the pass without predicts zeros, so guidance goes to twice the frame
    torch.testing.assert_close(made[:, 1:], 2 * given.expand(-1, 2, -1, -1, -1), rtol=1e-2, atol=1e-2)


def test_rescaling_does_not_count_what_is_predicted_of_given_frames():
    torch.manual_seed(0)
    x, given = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 1, 2, 4, 4)
    seen = []
    for predicted in (0.0, 100.0):

        def model(x_t: Tensor, told: Tensor, texts: Tensor, mask: Tensor, predicted: float = predicted) -> Tensor:
            output = x_t * (1 + texts[:, :1, :1, None, None])
            return torch.cat([predicted * torch.randn_like(output[:, :1]), output[:, 1:]], dim=1)

        denoise = guided(model, *text(2), *NULL, 4.0, rescale=1.0, first=FirstFrames(given))
        seen.append(denoise(x, 500.0)[:, 1:])
    torch.testing.assert_close(*seen)
    torch.testing.assert_close(seen[0], 2 * x[:, 1:])  # the pass with text, whose standard deviation is kept


def test_given_frames_that_leave_nothing_to_sample_are_refused():
    objective, noise = make_objective(FLOW), torch.zeros(1, 2, 2, 4, 4)
    with pytest.raises(ValueError, match="2 latent frames are given of a clip of 2"):
        sample(follower(objective), objective, noise, *text(1), *NULL, Sampling(steps=1), given=noise)


@pytest.mark.parametrize(
    ("keys", "says"), [({"frames": 0}, "frames is 0"), ({"probability": 1.5}, "is 1.5; it must be within 0 to 1")]
)
def test_settings_that_mean_nothing_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        ConditioningConfig(**keys)
