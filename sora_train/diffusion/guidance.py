"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): away from a null prompt, toward the text.

Optionally only within an interval of the diffusion time (Kynkaanniemi et al. 2024, arXiv 2404.07724), and rescaled
against over-exposure at high guidance (Lin et al. 2023, arXiv 2305.08891, section 3.4).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from sora_train.diffusion.objective import Model

Denoiser = Callable[[Tensor, float], Tensor]
"""Takes noisy latents and their time, 0 (data) to 1000 (noise); returns the guided output."""


def guided(
    model: Model,
    text: Float[Tensor, "b l e"],
    text_mask: Bool[Tensor, "b l"],
    null_text: Float[Tensor, "#b i e"],
    null_mask: Bool[Tensor, "#b i"],
    guidance: float | int,
    interval: tuple[float | int, float | int] = (0, 1000),
    rescale: float | int = 0,
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
        c = x.shape[2]
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            return model(x, torch.full((b,), t, device=x.device), text, text_mask).float()
        output = model(torch.cat([x, x]), torch.full((2 * b,), t, device=x.device), texts, masks).float()
        with_text, without = output[:, :, :c].chunk(2)
        toward_text = without + guidance * (with_text - without)
        if rescale:
            toward_text = rescaled(toward_text, with_text, rescale)
        return torch.cat([toward_text, output[:b, :, c:]], dim=2)

    return denoise


def rescaled(
    output: Float[Tensor, "b f c h w"], with_text: Float[Tensor, "b f c h w"], share: float | int
) -> Float[Tensor, "b f c h w"]:
    """Rescales a guided prediction toward the standard deviation of the text's prediction, for each clip.

    `share` is phi of Lin et al. 2023, eq. 15 and 16. A prediction with standard deviation 0 is unchanged.
    """
    own, wanted = (x.std(dim=(1, 2, 3, 4), keepdim=True) for x in (output, with_text))
    factor = torch.where(own > 0, wanted / own, 1.0)  # eq. 15
    return share * factor * output + (1 - share) * output  # eq. 16
