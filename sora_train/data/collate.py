"""Collates clips to the tensors of a micro-batch, with everything random that training adds.

What is drawn for a clip depends on (seed, step, sample_id) alone, not on the rank or on the other clips. So another
split of a global batch changes nothing, and a resumed run draws what the unbroken one would have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sora_train.data.order import stable_hash
from sora_train.diffusion import Objective
from sora_train.manifest import Manifest
from sora_train.schema import Clips

PAD_TOKENS = 32
"""Captions are padded to a multiple of this number of tokens, because a compiled model compiles every length."""


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward and backward pass, float32 except the text, and the clips that they were made of."""

    latents: Float[Tensor, "b f c h w"]
    """Normalised per channel: about mean 0, standard deviation 1."""
    noise: Float[Tensor, "b f c h w"]
    t: Float[Tensor, "b"]
    """Diffusion times, as the objective draws them."""
    text: Float[Tensor, "b l e"]
    """Caption embeddings in the shards' float16, padded with zeros to one of `padded_lengths`. The device gets half the
    bytes of float32, and converts them exactly, or rounds them to bfloat16 as it would round float32."""
    text_mask: Bool[Tensor, "b l"]
    """True for real tokens."""
    weight: Float[Tensor, "b"]
    """1 for a clip, 0 for padding, which repeats a clip."""
    dropped: Bool[Tensor, "b"]
    """True where the null prompt replaced the caption."""
    sample_ids: tuple[str | None, ...]
    """None for padding."""
    given: Int[Tensor, "b"] | None = None
    """How many first latent frames of each clip are given. None if none ever are (`conditioning.probability` 0)."""

    @property
    def tokens(self) -> float:
        """Caption tokens of its clips, without padding tokens and padding clips."""
        return float((self.text_mask.sum(1) * self.weight).sum())

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Copies it to a device, asynchronously from pinned memory, on the current stream."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """Copies it to pinned memory, which a GPU reads asynchronously."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Has the allocator keep the memory until the stream has used it."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random about one clip at one step."""

    latents: Float[Tensor, "f c h w"]
    noise: Float[Tensor, "f c h w"]
    t: Float[Tensor, ""]
    caption: int
    """Which of the clip's captions."""
    dropped: bool
    """Whether the null prompt replaces it."""
    given: int
    """How many first frames are given."""


def collate(
    clips: Clips,
    padding: int,
    *,
    manifest: Manifest,
    objective: Objective,
    seed: int,
    step: int,
    caption_dropout: float,
    null_prompt: str = "eos",
) -> MicroBatch:
    """The micro-batch of these clips at a step; the last `padding` clips are repeats and get weight 0.

    A dropped caption becomes the null prompt: as many tokens as the caption (`padded`), or one (`eos`).
    """
    rows = len(clips.sample_ids)
    draws = [draw_training_noise(clips, row, objective, seed, step, caption_dropout) for row in range(rows)]
    null = manifest.null_embedding(null_prompt)
    drawn_text = [clips.text[row][drawn.caption] for row, drawn in enumerate(draws)]
    captions = [
        null[: len(caption)] if drawn.dropped else caption for caption, drawn in zip(drawn_text, draws, strict=True)
    ]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (manifest.vae.mean, manifest.vae.std))
    embeddings = [torch.from_numpy(caption.astype(np.float16)) for caption in captions]  # a copy; torch warns of views
    text, text_mask = pad_text(embeddings, manifest.text.max_tokens)
    return MicroBatch(
        latents=(torch.stack([drawn.latents for drawn in draws]) - mean) / std,
        noise=torch.stack([drawn.noise for drawn in draws]),
        t=torch.stack([drawn.t for drawn in draws]),
        text=text,
        text_mask=text_mask,
        weight=(torch.arange(rows) < rows - padding).float(),
        dropped=torch.tensor([drawn.dropped for drawn in draws]),
        sample_ids=tuple(None if row >= rows - padding else clips.sample_ids[row] for row in range(rows)),
        given=torch.tensor([drawn.given for drawn in draws]) if objective.conditioning.frame_times else None,
    )


def draw_training_noise(
    clips: Clips, row: int, objective: Objective, seed: int, step: int, caption_dropout: float
) -> TrainingNoise:
    """Draws dropout, caption, noise, latents, time and given frames of a clip at a step, always in this order."""
    # PyTorch's CPU generator uses the lower 32 bits of a seed: two clips in 4 billion draw alike.
    generator = torch.Generator().manual_seed(stable_hash(seed, step, clips.sample_ids[row]))
    dropout, choice = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    moments = torch.from_numpy(clips.latents[row].astype(np.float32))
    f, c, h, w = moments.shape[1:]
    noise = torch.randn((f, c, h, w), generator=generator)
    return TrainingNoise(
        latents=draw_posterior(moments, generator),
        noise=noise,
        t=objective.draw_time(generator, (f, c, h, w)),
        caption=int(choice * len(clips.captions[row])),
        dropped=dropout < caption_dropout,
        given=objective.conditioning.draw(generator, f),  # last, so that without it the other draws are the same
    )


def draw_posterior(moments: Float[Tensor, "m f c h w"], generator: torch.Generator) -> Float[Tensor, "f c h w"]:
    """Samples the VAE's posterior if its log-variance is stored with the mean; else returns the stored latents."""
    if len(moments) == 1:
        return moments[0]
    mean, logvar = moments
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn(mean.shape, generator=generator)


def pad_text(
    embeddings: list[Float[Tensor, "_ e"]], max_tokens: int | None = None
) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"]]:
    """Pads embeddings with zeros to one of a few lengths; also returns the mask of real tokens.

    The length is the smallest of `padded_lengths(max_tokens)` that holds the longest caption; without `max_tokens`, the
    next multiple of `PAD_TOKENS`. So a compiled model sees few shapes. The mask makes padding neutral, up to rounding.
    """
    lengths = torch.tensor([len(embedding) for embedding in embeddings])
    longest = int(lengths.max())
    padded = -(-longest // PAD_TOKENS) * PAD_TOKENS
    if max_tokens is not None:
        padded = max(longest, min(padded, max_tokens))
    text = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    text = torch.nn.functional.pad(text, (0, 0, 0, padded - longest))
    return text, torch.arange(padded) < lengths[:, None]


def padded_lengths(max_tokens: int) -> list[int]:
    """All lengths that `pad_text` gives: multiples of `PAD_TOKENS`, and `max_tokens` itself."""
    return [*range(PAD_TOKENS, max_tokens, PAD_TOKENS), max_tokens]
