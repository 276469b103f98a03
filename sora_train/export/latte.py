"""What an export as diffusers' `LattePipeline` holds, and how its card says to use it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sora_train.codec.files import VaeFiles, find_vae, read_config
from sora_train.codec.text import load_tokenizer
from sora_train.codec.vae import load_vae
from sora_train.diffusion.sampler import make_solver, trailing, usable_steps
from sora_train.export.fold import fold_latent_norm
from sora_train.manifest import Manifest
from sora_train.model.convert import to_diffusers
from sora_train.model.convert_latte import FULL_LATTE
from sora_train.recipe import Recipe
from sora_train.sample.load import Run


def refusals(recipe: Recipe, manifest: Manifest) -> list[str]:
    """All reasons why a LattePipeline can't hold a run; [] if it can.

    Each names the key, its value, and what the pipeline takes.
    """
    found = [
        f"model.{key} is {have}, and diffusers' Latte has only {value}"
        for key, value in FULL_LATTE.items()
        if (have := getattr(recipe.model, key)) != value
    ]
    frames = latent_frames(manifest)
    if recipe.model.sample_frames not in (0, frames):
        found.append(f"model.sample_frames is {recipe.model.sample_frames}, and diffusers' Latte takes 0 or {frames}")
    if recipe.diffusion.kind != "ddpm":
        found.append(f"diffusion.kind is {recipe.diffusion.kind}, and its scheduler takes steps of ddpm alone")
    elif recipe.diffusion.prediction != "epsilon":
        found.append(f"diffusion.prediction is {recipe.diffusion.prediction}, and released Lattes predict epsilon")
    files = find_vae(recipe.codec.vae, recipe.codec.models)
    if manifest.vae.time_factor != 1:
        found.append(f"the VAE makes {manifest.vae.time_factor} frames one, and the pipeline decodes frame by frame")
    elif files.kind != "AutoencoderKL" and not is_scalar(files):
        found.append(
            f"latents are normalised per channel (mean {list(files.mean)}, std {list(files.std)}), and an {files.kind} "
            "has no 1 x 1 convolutions that could take that up"
        )
    return found


def latent_frames(manifest: Manifest) -> int:
    """Latent frames of the most common clip shape, which is the default of samples."""
    return manifest.vae.latent_shape(manifest.frames, manifest.height, manifest.width)[0]


def is_scalar(files: VaeFiles) -> bool:
    """Whether one factor (`scaling_factor`) normalises all of a VAE's latents."""
    return not any(files.mean) and len(set(files.std)) == 1


def write_parts(run: Run, folder: Path) -> dict[str, list[str]]:
    """Writes transformer, VAE and scheduler; returns their entries in model_index.json."""
    to_diffusers(run.model, folder / "transformer", latent_frames(run.manifest), pad_variance=True)
    kind = write_vae(run, folder / "vae")
    make_solver(run.objective, order=1).save_pretrained(folder / "scheduler")
    if run.recipe.codec.null_prompt == "eos":
        pad_with_eos(folder / "tokenizer")
    return {
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "vae": ["diffusers", kind],
    }


def write_vae(run: Run, folder: Path) -> str:
    """Writes the run's VAE in float32 with its normalisation folded in.

    Returns the name of its class.
    """
    vae = load_vae(run.recipe.codec.vae, models=run.recipe.codec.models)
    run.check_vae(vae.hash)
    files, model = vae.files, vae.model.to(memory_format=torch.contiguous_format)
    if not is_scalar(files):
        fold_latent_norm(model, files.mean, files.std)
    elif read_config(files.place).get("latents_mean") is not None:
        model.register_to_config(scaling_factor=1 / files.std[0], latents_mean=None, latents_std=None)
    model.save_pretrained(folder)
    return files.kind


def pad_with_eos(tokenizer: Path) -> None:
    """Makes the tokenizer in a folder pad with its `</s>`, for models that learned `codec.null_prompt: eos`.

    For the pass without a prompt, LattePipeline pads "". Padding attends only to the `</s>` before it, so every padding
    token has the embedding of `</s>`, and attention over equal tokens equals attention over one.
    """
    eos = load_tokenizer(tokenizer).eos_token
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        place = tokenizer / name
        if place.is_file() or name == "tokenizer_config.json":
            settings = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
            place.write_text(json.dumps(settings | {"pad_token": eos}, indent=2) + "\n", encoding="utf-8")


def how_to_use(run: Run, prompt: str) -> str:
    """The code that makes a video with diffusers, and its limits."""
    manifest, sampling = run.manifest, run.recipe.validation
    still = "\n    enable_temporal_attentions=False," if manifest.frames == 1 else ""
    usable = usable_steps(run.objective)
    wrong = [str(n) for n in range(1, 201) if n <= usable and trailing_of_diffusers(usable, n) != trailing(usable, n)]
    but = f" (but {', '.join(wrong)}, where diffusers' spacing makes one too many)" if wrong else ""
    shape = f"""{still}
    video_length={manifest.frames},
    height={manifest.height},
    width={manifest.width},
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance:g},
    decode_chunk_size={manifest.frames},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "sample.mp4", fps={round(manifest.fps)})"""
    lower = run.recipe.codec.caption_cleaning == "lower"
    given = "- The pipeline takes no image.\n" if run.recipe.conditioning.probability else ""
    return f"""```python
import torch
from diffusers import LattePipeline
from diffusers.utils import export_to_video

pipe = LattePipeline.from_pretrained(".")  # this folder
{call_by_prompt(prompt) if lower else call_by_embeddings(run, prompt)}{shape}
```

{about_prompts(run)}
- `video_length` is fixed: diffusers' Latte takes only the number of frames that it was made for.
- The scheduler is DDIM, written as DPM-Solver++ of first order, which is the same and right at any number of steps up
  to {usable}{but}. For the solver of second order:
  `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)`.
- Mean and spread of the latents are folded into the VAE's first and last 1 x 1 convolutions, so that it makes and takes
  latents as the transformer has them.
{given}"""


def call_by_prompt(prompt: str) -> str:
    """A pipeline call with a prompt, for `codec.caption_cleaning: lower`."""
    return f"""frames = pipe(
    {prompt},
    clean_caption=False,"""


def call_by_embeddings(run: Run, prompt: str) -> str:
    """A pipeline call with embeddings, for captions that training did not clean.

    The pipeline would change a prompt to lower case.
    """
    return f"""

@torch.no_grad()
def embed(text, **how):
    tokens = pipe.tokenizer(text, truncation=True, return_tensors="pt", **how).to(pipe.text_encoder.device)
    return pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


prompt = embed({prompt}, max_length={run.recipe.codec.max_tokens})
frames = pipe(
    prompt_embeds=prompt,
    negative_prompt=None,
    negative_prompt_embeds=embed("", padding="max_length", max_length=prompt.shape[1]),
    mask_feature=False,"""


def about_prompts(run: Run) -> str:
    """Differences between how the pipeline and the training read prompts."""
    codec, lines = run.recipe.codec, list[str]()
    if codec.caption_cleaning == "lower":
        lines.append(
            "- `pipe(prompt)` makes the prompt lower case and strips it, as was done to the captions in training. "
            "`clean_caption=False` leaves\n  it at that; otherwise, if `bs4` and `ftfy` are installed, it also removes "
            "links, file names and more."
        )
    else:
        lines.append(
            "- The model read captions as they were written, and `pipe(prompt)` makes the prompt lower case. So it is "
            "embedded outside\n  of the pipeline here. For a prompt in lower case `pipe(prompt)` gives the same."
        )
    if codec.null_prompt == "padded":
        lines.append('- Without a prompt the model is given "" with padding, as LattePipeline does it.')
    else:
        lines.append(
            "- The tokenizer pads with `</s>`, so that the pipeline's empty prompt is what the model learned: the "
            "embedding of `</s>`,\n  repeated; attention over equal tokens is attention over one."
        )
    if codec.max_tokens != 120:
        lines.append(f"- `pipe(prompt)` reads 120 tokens; captions were cut at {codec.max_tokens} in training.")
    lines.append("- Give one prompt at a time: of a list, the pipeline has the model read the padding of each too.")
    return "\n".join(lines)


def trailing_of_diffusers(usable: int, steps: int) -> list[int]:
    """Time steps of diffusers' schedulers with trailing spacing.

    At some step counts their rounding makes one too many.
    """
    import numpy as np

    return (np.arange(usable, 0, -usable / steps).round().astype(np.int64) - 1).tolist()
