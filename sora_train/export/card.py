"""The model card of an export: what the model is, its data, and how to use it."""

from __future__ import annotations

from pathlib import Path

from sora_train.diffusion.sampler import trailing, usable_steps
from sora_train.errors import one_line
from sora_train.sample.load import EXPORTED, ExportNote, Run
from sora_train.schema import bucket_size

PLACEHOLDER = "a short description of a video"


def write_card(run: Run, folder: Path, note: ExportNote) -> None:
    """Writes README.md, with the front matter that model hubs read."""
    parts = [front_matter(note), about(run, note), pipeline_use(run) if note.kind == "pipeline" else weights_use()]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def front_matter(note: ExportNote) -> str:
    """The model card's YAML front matter."""
    library = ["library_name: diffusers"] if note.kind == "pipeline" else []
    return "\n".join(["---", "license: unknown", "pipeline_tag: text-to-video", *library, "tags: [latte]", "---", ""])


def about(run: Run, note: ExportNote) -> str:
    """The model's size, objective, weights and training data, in words."""
    recipe, manifest = run.recipe, run.manifest
    count = sum(parameter.numel() for parameter in run.model.parameters())
    factorised = recipe.model.attention == "factorised"
    blocks = "spatial and temporal blocks in turns" if factorised else "full space-time attention"
    flow = recipe.diffusion.kind == "flow"
    learned = "rectified flow" if flow else f"DDPM, predicting {recipe.diffusion.prediction}"
    which = "averaged (EMA)" if note.weights == "ema" else "trained (not averaged)"
    step = f"step {note.step}" if note.step >= 0 else "an unnamed step"
    trained = trained_on(run)
    shapes = ", ".join(f"{name} ({rows} clips)" for name, rows in trained.items())
    shapes = shapes or f"{manifest.frames}x{manifest.height}x{manifest.width}"
    return f"""# {recipe.name}

A text-to-video diffusion transformer of the Latte family ([arXiv 2401.03048](https://arxiv.org/abs/2401.03048)), made
with sora_train: {count:,} parameters, {blocks}, {learned}.
These are the {which} weights of {step}.

- **Trained on** {sum(trained.values()) or manifest.counts.written} clips, frames x height x width: {shapes};
  {manifest.fps:g} frames a second{held_out(run)}. What they show is for whoever trained it to say.
- **Licence** unknown: state yours here and in the lines above, with that of the clips, the VAE and the text encoder.
- `recipe.yaml` has every setting of the training, `manifest.json` how its clips were encoded.
"""


def trained_on(run: Run) -> dict[str, int]:
    """Number of training clips in each bucket.

    Excludes held-out clips, and images if data.image_ratio is 0.
    """
    manifest, ratio = run.manifest, run.recipe.data.image_ratio
    counts = {name: rows - manifest.held_out.get(name, 0) for name, rows in manifest.buckets.items()}
    return {name: rows for name, rows in counts.items() if rows and (ratio != 0 or bucket_size(name)[0] > 1)}


def held_out(run: Run) -> str:
    """The number of held-out clips, in words."""
    if count := sum(run.manifest.held_out.values()):
        return f"; {count} more were held out"
    share = run.recipe.data.holdout_fraction  # the manifest of an older run has no counts
    return f"; of these about {share:.0%} were held out" if share else ""


def prompt_of(run: Run) -> str:
    """An example prompt as a Python literal.

    It is on one line, so it can't end the string or the code block.
    """
    prompts = run.recipe.validation.prompts
    return repr(one_line(prompts[0])[:200] if prompts else PLACEHOLDER)


def weights_use() -> str:
    """How to use an export of weights alone."""
    return f"""## Use

`{EXPORTED}` goes with sora_train, which reads this folder as it would a run:

```sh
sora sample . --prompt "{PLACEHOLDER}"
```

VAE and text encoder are not in it: `codec.vae` and `codec.text` in `recipe.yaml` say where they are, and may be changed
to where you have the same.
"""


def pipeline_use(run: Run) -> str:
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
    return f"""## Use

```python
import torch
from diffusers import LattePipeline
from diffusers.utils import export_to_video

pipe = LattePipeline.from_pretrained(".")  # this folder
{call_by_prompt(run) if lower else call_by_embeddings(run)}{shape}
```

{about_prompts(run)}
- `video_length` is fixed: diffusers' Latte takes only the number of frames that it was made for.
- The scheduler is DDIM, written as DPM-Solver++ of first order, which is the same and right at any number of steps up
  to {usable}{but}. For the solver of second order:
  `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)`.
- Mean and spread of the latents are folded into the VAE's first and last 1 x 1 convolutions, so that it makes and takes
  latents as the transformer has them.
- With sora_train: `sora sample . --prompt "{PLACEHOLDER}"`.
"""


def call_by_prompt(run: Run) -> str:
    """A pipeline call with a prompt, for `codec.caption_cleaning: lower`."""
    return f"""frames = pipe(
    {prompt_of(run)},
    clean_caption=False,"""


def call_by_embeddings(run: Run) -> str:
    """A pipeline call with embeddings, for captions that training did not clean.

    The pipeline would change a prompt to lower case.
    """
    return f"""

@torch.no_grad()
def embed(text, **how):
    tokens = pipe.tokenizer(text, truncation=True, return_tensors="pt", **how).to(pipe.text_encoder.device)
    return pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


prompt = embed({prompt_of(run)}, max_length={run.recipe.codec.max_tokens})
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
