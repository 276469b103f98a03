"""What an export as diffusers' `WanPipeline` holds, and how its card says to use it.

`WanImageToVideoPipeline` opens the same folder if the model was trained to continue given frames.
"""

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
        # Wan 2.2, and models that continue an image: the time of each token, which from text alone is that of the clip.
        "expand_timesteps": residual or takes_image(run.recipe),
    }


def copy_vae(run: Run, folder: Path) -> bool:
    """Copies the VAE's files. Returns whether it is the residual one of Wan 2.2."""
    files = find_vae(run.recipe.codec.vae, run.recipe.codec.models)
    run.check_vae(files.hash)
    folder.mkdir()
    for file in (*files.files, *files.place.glob("*.safetensors.index.json")):
        shutil.copyfile(file, folder / file.name)
    return bool(read_config(files.place).get("is_residual"))


def takes_image(recipe: Recipe) -> bool:
    """Whether `WanImageToVideoPipeline` can give the model a first frame. It counts tokens as if `patch` were 2."""
    return recipe.conditioning.probability > 0 and recipe.model.patch == 2


def shift_of(run: Run) -> float:
    """The flow's shift at the default size of samples; the scheduler has one for all sizes."""
    manifest = run.manifest
    return run.objective.shift(manifest.vae.latent_shape(manifest.frames, manifest.height, manifest.width))


def how_to_use(run: Run, prompt: str) -> str:
    """The code that makes a video with diffusers, and what to know about it."""
    recipe, sampling = run.recipe, run.recipe.validation
    lines = [
        '- It needs `accelerate`. On a GPU: `WanPipeline.from_pretrained(".", torch_dtype=torch.bfloat16).to("cuda")`.',
        about_scheduler(run),
        about_prompts(run),
    ]
    if sampling.guidance_interval != (0.0, 1000.0) or sampling.guidance_rescale:
        lines.append("- Validation samples used a guidance interval or rescale, which the pipeline does not have.")
    parts = [text_to_video(run, prompt)] if recipe.conditioning.probability < 1 else []
    if recipe.conditioning.probability:
        parts += [image_to_video(run, prompt)] if takes_image(recipe) else []
        lines += about_given_frames(recipe)
    notes = "\n".join(line for line in lines if line)
    return "\n".join([*parts, f"{notes}\n"])


def text_to_video(run: Run, prompt: str) -> str:
    """The code that makes a video from a prompt."""
    return f"""```python
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained(".")  # this folder
frames = pipe(
    {prompt},{call_settings(run)}
```
"""


def image_to_video(run: Run, prompt: str) -> str:
    """The code that makes a video that begins with an image."""
    size = run.manifest.width, run.manifest.height
    return f"""From an image, which the pipeline would stretch to the video's shape:

```python
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video, load_image
from PIL import ImageOps

pipe = WanImageToVideoPipeline.from_pretrained(".")  # this folder; needs `pip install ftfy`
image = ImageOps.fit(load_image("first.png"), {size})
frames = pipe(
    image,
    {prompt},{call_settings(run)}
```
"""


def call_settings(run: Run) -> str:
    """The rest of a pipeline's call, with the settings of validation."""
    manifest, sampling = run.manifest, run.recipe.validation
    negative = f"\n    negative_prompt={sampling.negative!r}," if sampling.negative else ""
    return f"""{negative}
    num_frames={manifest.frames},
    height={manifest.height},
    width={manifest.width},
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance:g},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "sample.mp4", fps={round(manifest.fps)})"""


def about_given_frames(recipe: Recipe) -> list[str]:
    """What to know about videos that begin with given frames."""
    conditioning, lines = recipe.conditioning, list[str]()
    if not takes_image(recipe):
        lines.append(f"- `WanImageToVideoPipeline` can't give it an image: model.patch is {recipe.model.patch}, not 2.")
    elif conditioning.frames > 1:
        lines.append(
            f"- The pipeline gives one latent frame, and the model was trained with {conditioning.frames}: to continue "
            "a video, use\n  `sora sample . --video start.mp4 --prompt TEXT`."
        )
    if conditioning.probability == 1:
        lines.append("- It always had given frames in training, so it makes no videos from text alone.")
    if recipe.validation.guidance_without == "text_and_frames":
        lines.append("- Validation samples used guidance_without: text_and_frames, which the pipeline does not have.")
    return lines


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
