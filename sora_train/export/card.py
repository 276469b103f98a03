"""The model card of an export: what the model is, its data, and how to use it.

How to use a pipeline is in the module of its class, `latte.py` or `wan.py`.
"""

from __future__ import annotations

from pathlib import Path

from sora_train.errors import one_line
from sora_train.export.pipeline import pipeline_module
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.sample.export_note import ExportNote
from sora_train.sample.load import Run
from sora_train.schema import bucket_size
from sora_train.train.weights import EXPORTED

PLACEHOLDER = "a short description of a video"


def write_card(run: Run, folder: Path, note: ExportNote) -> None:
    """Writes README.md, with the front matter that model hubs read."""
    parts = [
        front_matter(run, note),
        about(run, note),
        pipeline_use(run) if note.kind == "pipeline" else weights_use(run),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def front_matter(run: Run, note: ExportNote) -> str:
    """The model card's YAML front matter."""
    library = ["library_name: diffusers"] if note.kind == "pipeline" else []
    tasks = tasks_of(run)
    tags = f"tags: [{', '.join([run.recipe.model.family, *tasks[1:]])}]"
    return "\n".join(["---", "license: unknown", f"pipeline_tag: {tasks[0]}", *library, tags, "---", ""])


def tasks_of(run: Run) -> list[str]:
    """The tasks that the model was trained for, as model hubs name them."""
    probability = run.recipe.conditioning.probability
    from_text, from_image = ["text-to-video"] * (probability < 1), ["image-to-video"] * (probability > 0)
    return [*from_text, *from_image]


def about(run: Run, note: ExportNote) -> str:
    """The model's size, objective, weights and training data, in words."""
    recipe, manifest = run.recipe, run.manifest
    count = sum(parameter.numel() for parameter in run.model.parameters())
    family, paper, blocks = "Wan", "2503.20314", "full space-time attention"
    if recipe.model.family == "latte":
        family, paper = "Latte", "2401.03048"
        blocks = "spatial and temporal blocks in turns" if recipe.model.attention == "factorised" else blocks
    flow = recipe.diffusion.kind == "flow"
    learned = "rectified flow" if flow else f"DDPM, predicting {recipe.diffusion.prediction}"
    which = "averaged (EMA)" if note.weights == "ema" else "trained (not averaged)"
    step = f"step {note.step}" if note.step >= 0 else "an unnamed step"
    trained, tasks = trained_on(recipe, manifest), " and ".join(tasks_of(run))
    shapes = ", ".join(f"{name} ({rows} clips)" for name, rows in trained.items())
    shapes = shapes or f"{manifest.frames}x{manifest.height}x{manifest.width}"
    return f"""# {recipe.name}

A diffusion transformer of the {family} family ([arXiv {paper}](https://arxiv.org/abs/{paper})) for {tasks}, made
with sora_train: {count:,} parameters, {blocks}, {learned}.
These are the {which} weights of {step}.

- **Trained on** {clip_count(recipe, manifest)} clips, frames x height x width: {shapes};
  {manifest.fps:g} frames a second{held_out(recipe, manifest)}. What they show is for whoever trained
  it to say.{merged_into(run)}
- **Licence** unknown: state yours here and in the lines above, with that of the clips, the VAE and the text encoder.
- `recipe.yaml` has every setting of the training, `manifest.json` how its clips were encoded.
"""


def clip_count(recipe: Recipe, manifest: Manifest) -> int:
    """The number of clips that a run was trained on."""
    return sum(trained_on(recipe, manifest).values()) or manifest.counts.written


def merged_into(run: Run) -> str:
    """The base of a run that trained adapters, which are added to it here; empty for others."""
    lora, base = run.recipe.lora, one_line(run.recipe.model.init_from)
    return f"\n- **Base** `{base}`: adapters (LoRA) of rank {lora.rank} are added to its weights." if lora.rank else ""


def trained_on(recipe: Recipe, manifest: Manifest) -> dict[str, int]:
    """Number of training clips in each bucket.

    Excludes held-out clips, and images if data.image_ratio is 0.
    """
    ratio = recipe.data.image_ratio
    counts = {name: rows - manifest.held_out.get(name, 0) for name, rows in manifest.buckets.items()}
    return {name: rows for name, rows in counts.items() if rows and (ratio != 0 or bucket_size(name)[0] > 1)}


def held_out(recipe: Recipe, manifest: Manifest) -> str:
    """The number of held-out clips, in words."""
    if count := sum(manifest.held_out.values()):
        return f"; {count} more were held out"
    share = recipe.data.holdout_fraction  # the manifest of an older run has no counts
    return f"; of these about {share:.0%} were held out" if share else ""


def prompt_of(recipe: Recipe) -> str:
    """An example prompt as a Python literal.

    It is on one line, so it can't end the string or the code block.
    """
    prompts = recipe.validation.prompts
    return repr(one_line(prompts[0])[:200] if prompts else PLACEHOLDER)


def weights_use(run: Run) -> str:
    """How to use an export of weights alone."""
    return f"""## Use

`{EXPORTED}` goes with sora_train, which reads this folder as it would a run:

```sh
{sample_command(run)}
```

VAE and text encoder are not in it: `codec.vae` and `codec.text` in `recipe.yaml` say where they are, and may be changed
to where you have the same.
"""


def pipeline_use(run: Run) -> str:
    """How to make a video with diffusers, and what to know about it."""
    use = pipeline_module(run.recipe.model.family).how_to_use(run, prompt_of(run.recipe))
    return f"""## Use

{use}- With sora_train: `{sample_command(run)}`.
"""


def sample_command(run: Run) -> str:
    """The command that samples the folder."""
    image = " --image first.png" if run.recipe.conditioning.probability else ""
    return f'sora sample . --prompt "{PLACEHOLDER}"{image}'
