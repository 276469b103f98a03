"""`sora export --lora`: the adapters of a run, and their model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_train.errors import one_line
from sora_train.export.card import PLACEHOLDER, clip_count, held_out, prompt_of
from sora_train.export.pipeline import refusals
from sora_train.lora.files import DIFFUSERS_FILE, Adapter
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.sample.export_note import Weights, read_note
from sora_train.sample.load import find_checkpoint, read_recipe
from sora_train.sample.lora import read_base, trained_adapter

WAN = f"""With diffusers:

```python
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained(BASE)  # the base's folder or hub id
pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")  # this folder
"""
LATTE = f"""With diffusers, whose LattePipeline has no `load_lora_weights`. These lines put the adapters in, by peft:

```python
import json
import torch
from diffusers import LattePipeline
from diffusers.utils import export_to_video
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open

pipe = LattePipeline.from_pretrained(BASE)  # the base's folder or hub id
with safe_open("{DIFFUSERS_FILE}", "pt") as file:
    settings = json.loads(file.metadata()["lora_adapter_metadata"])
    weights = {{key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}}
settings = {{key.removeprefix("transformer."): value for key, value in settings.items()}}
inject_adapter_in_model(LoraConfig(**settings), pipe.transformer)
set_peft_model_state_dict(pipe.transformer, weights)
"""


@dataclass(frozen=True)
class AdaptedRun:
    """A checkpoint of a run that trained adapters, without the base."""

    checkpoint: Path
    recipe: Recipe
    manifest: Manifest
    adapter: Adapter
    weights: Weights


def find_adapted(path: str | Path, weights: Weights) -> AdaptedRun | None:
    """The adapters of a run or a checkpoint; None for a whole model. Raises UserError as `load_run` does."""
    if read_note(Path(path).expanduser()) is not None:
        return None
    folder, checkpoint = find_checkpoint(path, weights)
    recipe, manifest = read_recipe(folder, checkpoint)
    if not recipe.lora.rank:
        return None
    return AdaptedRun(checkpoint, recipe, manifest, trained_adapter(checkpoint, recipe, weights), weights)


def write_lora_card(run: AdaptedRun, folder: Path, files: Sequence[Path]) -> None:
    """Writes README.md, with the front matter that model hubs read."""
    recipe = run.recipe
    base = read_base(run.checkpoint)
    count = sum(tensor.numel() for tensor in run.adapter.tensors.values())
    which = "averaged (EMA)" if run.weights == "ema" else "trained (not averaged)"
    hashed = f", sha256 `{base['base'][:16]}…`" if base.get("base") else ""
    text = f"""---
license: unknown
pipeline_tag: text-to-video
library_name: diffusers
tags: [{recipe.model.family}, lora]
---

# {recipe.name}

Adapters (LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), made with sora_train: rank {recipe.lora.rank},
alpha {recipe.lora.alpha or recipe.lora.rank:g}, {count:,} parameters on {", ".join(recipe.lora.targets)}.
These are the {which} weights of `{run.checkpoint.name}`.

- **Base** `{one_line(recipe.model.init_from)}`{hashed}. The adapters fit these weights alone.
- **Trained on** {clip_count(recipe, run.manifest)} clips{held_out(recipe, run.manifest)}. What they show is for whoever
  trained it to say.
- **Licence** unknown: state yours here and in the lines above, with that of the clips and the base.
- `recipe.yaml` has every setting of the training, `manifest.json` how its clips were encoded.

## Use

{use(run)}{for_comfyui(files)}- With sora_train: `sora sample BASE --lora . --prompt "{PLACEHOLDER}"`.
  `--lora .:0.8` multiplies the adapters by 0.8.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def use(run: AdaptedRun) -> str:
    """The code that puts the adapters into diffusers' pipeline and makes a video; empty if none holds the base."""
    if refusals(run.recipe, run.manifest):
        return ""
    manifest, sampling = run.manifest, run.recipe.validation
    frames = "num_frames" if run.recipe.model.family == "wan" else "video_length"
    return f"""{WAN if run.recipe.model.family == "wan" else LATTE}frames = pipe(
    {prompt_of(run.recipe)},
    {frames}={manifest.frames},
    height={manifest.height},
    width={manifest.width},
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance:g},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "sample.mp4", fps={round(manifest.fps)})
```

"""


def for_comfyui(files: Sequence[Path]) -> str:
    """A line about the file with ComfyUI's names, if any."""
    found = [file.name for file in files if file.name != DIFFUSERS_FILE]
    return f"- With ComfyUI: `{found[0]}` has its names; copy it to `models/loras`.\n" if found else ""
