"""What an export as diffusers' `WanPipeline` holds, and how its card says to use it."""

from __future__ import annotations

import shutil
from pathlib import Path

from sora_train.codec.files import find_vae, read_config
from sora_train.diffusion import resolve_sampler
from sora_train.diffusion.sampler import make_unipc
from sora_train.manifest import Manifest
from sora_train.model.convert import to_diffusers
from sora_train.recipe import Recipe
from sora_train.sample.load import Run


def refusals(recipe: Recipe, manifest: Manifest) -> list[str]:
    """All reasons why a WanPipeline can't hold a run; [] if it can."""
    found = list[str]()
    if recipe.diffusion.kind != "flow":
        found.append(f"diffusion.kind is {recipe.diffusion.kind}, and its scheduler takes steps of flow alone")
    if (kind := find_vae(recipe.codec.vae, recipe.codec.models).kind) != "AutoencoderKLWan":
        found.append(f"the VAE is an {kind}, and the pipeline decodes with an AutoencoderKLWan")
    if recipe.codec.null_prompt == "padded":
        found.append("codec.null_prompt is padded, and the pipeline's negative prompt is that of eos")
    return found


def write_parts(run: Run, folder: Path) -> dict[str, list[str | None] | bool | None]:
    """Writes transformer, VAE and scheduler; returns their entries in model_index.json, and the pipeline's settings."""
    to_diffusers(run.model, folder / "transformer")
    residual = copy_vae(run, folder / "vae")
    make_unipc(shift_of(run)).save_pretrained(folder / "scheduler")
    return {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": None,
        "expand_timesteps": residual,  # Wan 2.2: the time of each token, which for text to video is that of the clip
    }


def copy_vae(run: Run, folder: Path) -> bool:
    """Copies the VAE's files. Returns whether it is the residual one of Wan 2.2."""
    files = find_vae(run.recipe.codec.vae, run.recipe.codec.models)
    run.check_vae(files.hash)
    folder.mkdir()
    for file in (*files.files, *files.place.glob("*.safetensors.index.json")):
        shutil.copyfile(file, folder / file.name)
    return bool(read_config(files.place).get("is_residual"))


def shift_of(run: Run) -> float:
    """The flow's shift at the default size of samples; the scheduler has one for all sizes."""
    manifest = run.manifest
    return run.objective.shift(manifest.vae.latent_shape(manifest.frames, manifest.height, manifest.width))


def how_to_use(run: Run, prompt: str) -> str:
    """The code that makes a video with diffusers, and what to know about it."""
    manifest, sampling = run.manifest, run.recipe.validation
    negative = f"\n    negative_prompt={sampling.negative!r}," if sampling.negative else ""
    lines = [
        '- It needs `accelerate`. On a GPU: `WanPipeline.from_pretrained(".", torch_dtype=torch.bfloat16).to("cuda")`.',
        about_scheduler(run),
        about_prompts(run),
    ]
    if sampling.guidance_interval != (0.0, 1000.0) or sampling.guidance_rescale:
        lines.append("- Validation samples used a guidance interval or rescale, which the pipeline does not have.")
    return f"""```python
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained(".")  # this folder
frames = pipe(
    {prompt},{negative}
    num_frames={manifest.frames},
    height={manifest.height},
    width={manifest.width},
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance:g},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "sample.mp4", fps={round(manifest.fps)})
```

{chr(10).join(line for line in lines if line)}
"""


def about_scheduler(run: Run) -> str:
    """The scheduler's shift, and how `sora sample` takes the same steps."""
    other = resolve_sampler(run.recipe.validation.sampler, "flow") != "unipc"
    same = "; `sora sample . --sampler unipc` takes the same steps" if other else ""
    line = f"- The scheduler is UniPC with `flow_shift` {shift_of(run):g}{same}."
    if run.recipe.diffusion.shift_tokens:
        line += " The model was trained with a\n  shift that depends on the size: for other sizes set another one."
    return line


def about_prompts(run: Run) -> str:
    """Differences between how the pipeline and the training read prompts."""
    codec, lines = run.recipe.codec, list[str]()
    if codec.caption_cleaning == "lower":
        lines.append("- The model read captions in lower case: write prompts in lower case.")
    elif codec.caption_cleaning == "none":
        lines.append(
            "- `pipe(prompt)` replaces HTML entities and runs of white space, which captions were not cleaned of in "
            "training."
        )
    if codec.max_tokens != 512:
        lines.append(f"- `pipe(prompt)` reads 512 tokens; captions were cut at {codec.max_tokens} in training.")
    return "\n".join(lines)
