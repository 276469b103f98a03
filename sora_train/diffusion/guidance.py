"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): away from a null prompt, toward the text.

With given first frames, the pass that guidance leads away from has them too, or has them noisy like the rest.

Optionally only within an interval of the diffusion time (Kynkaanniemi et al. 2024, arXiv 2404.07724), and rescaled
against over-exposure at high guidance (Lin et al. 2023, arXiv 2305.08891, section 3.4).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from sora_train.diffusion.objective import Model

Denoiser = Callable[[Tensor, float], Tensor]
"""Takes noisy latents and their time, 0 (data) to 1000 (noise); returns the guided output."""


@dataclass(frozen=True)
class FirstFrames:
    """First frames that are given. The model sees them in place of the sampler's, whatever these are."""

    clean: Float[Tensor, "b k c h w"]
    add_noise: Callable[[float], Float[Tensor, "b k c h w"]] | None = None
    """Makes them as noisy as the rest at a time, for the pass without them; None: that pass has them too."""

    def put_into(self, x: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b f c h w"]:
        """Clips that begin with them."""
        return torch.cat([self.clean, x[:, self.clean.shape[1] :]], dim=1)


def guided(
    model: Model,
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "#b i e"],
    null_mask: Bool[Tensor, "#b i"],
    guidance: float | int,
    interval: tuple[float | int, float | int] = (0, 1000),
    rescale: float | int = 0,
    first: FirstFrames | None = None,
) -> Denoiser:
    """null + guidance x (text - null) (eq. 6), both in one batch, at times within the interval, ends included.

    A guidance of 1, and times outside of the interval, skip the null prompt and half the work. A learned variance, the
    second half of the channels, is not guided but that of the text: a guided one would leave the range in which it was
    learned. (Latte's own code does the same. diffusers' LattePipeline guides both halves if its scheduler reads a
    variance; the scheduler that Latte was released with does not.)
    """
    length, b = max(text.shape[1], null_text.shape[1]), len(text)
    both = [(text, text_mask), (null_text.expand(b, -1, -1), null_mask.expand(b, -1))]
    texts = torch.cat([pad(embedding, (0, 0, 0, length - embedding.shape[1])) for embedding, _ in both])
    masks = torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in both])

    def denoise(x: Tensor, t: float) -> Tensor:
        c, k = x.shape[2], 0 if first is None else first.clean.shape[1]
        inputs, times = with_frames(x, t, first)
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            return model(inputs, times, text, text_mask).float()
        other_inputs, other_times = without_frames(x, t, first)
        output = model(torch.cat([inputs, other_inputs]), torch.cat([times, other_times]), texts, masks).float()
        with_text, without = output[:, :, :c].chunk(2)
        toward_text = without + guidance * (with_text - without)
        if rescale:
            toward_text = rescaled(toward_text, with_text, rescale, k)
        return torch.cat([toward_text, output[:b, :, c:]], dim=2)

    return denoise


def with_frames(
    x: Float[Tensor, "b f c h w"], t: float, first: FirstFrames | None
) -> tuple[Float[Tensor, "b f c h w"], Float[Tensor, "b *f"]]:
    """What the model sees: the latents, and their time; of each frame, 0 for the given ones, if any."""
    if first is None:
        return x, torch.full((len(x),), t, device=x.device)
    times = torch.full(x.shape[:2], t, device=x.device)
    times[:, : first.clean.shape[1]] = 0
    return first.put_into(x), times


def without_frames(
    x: Float[Tensor, "b f c h w"], t: float, first: FirstFrames | None
) -> tuple[Float[Tensor, "b f c h w"], Float[Tensor, "b *f"]]:
    """The same for the pass that guidance leads away from: its first frames may be as noisy as the rest."""
    if first is None or first.add_noise is None:
        return with_frames(x, t, first)
    noisy = FirstFrames(first.add_noise(t))
    return noisy.put_into(x), torch.full(x.shape[:2], t, device=x.device)


def rescaled(
    output: Float[Tensor, "b f c h w"], with_text: Float[Tensor, "b f c h w"], share: float | int, given: int = 0
) -> Float[Tensor, "b f c h w"]:
    """Rescales a guided prediction toward the standard deviation of the text's prediction, for each clip.

    `share` is phi of Lin et al. 2023, eq. 15 and 16. A prediction with standard deviation 0 is unchanged. The first
    `given` frames do not count: what the model predicts there was never trained.
    """
    own, wanted = (x[:, given:].std(dim=(1, 2, 3, 4), keepdim=True) for x in (output, with_text))
    factor = torch.where(own > 0, wanted / own, 1.0)  # eq. 15
    return share * factor * output + (1 - share) * output  # eq. 16
