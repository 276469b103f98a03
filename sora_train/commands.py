"""The verbs of `sora`: what each takes, what it does, an example, and the flags of those that take no recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Extent = Annotated[int, Field(ge=1, le=2**16)]
"""Frames, or pixels on a side: so few that their product still has a name in torch."""

VERBS = {
    "download": ("RECIPE", "Fetches the recipe's VAE and text encoder to a folder that all nodes share (--to DIR)."),
    "prep": (
        "RECIPE",
        "Encodes videos and captions into Parquet shards; again, only what is missing. --plan: what it would cost.",
    ),
    "inspect": ("SHARDS", "Counts what shards hold, and what was left out and why; --html OUT shows the clips."),
    "preflight": (
        "RECIPE",
        "Checks cluster, storage, shards, memory and network before a run. --plan: memory and hours, no cluster.",
    ),
    "train": (
        "RECIPE",
        "Trains on shards; run again, it goes on from the newest checkpoint. --fresh: from step 0.",
    ),
    "sample": ("RUN", "Makes videos of your prompts with a run's newest checkpoint, a checkpoint, or an export."),
    "export": ("RUN OUT", "Writes a run's model as a LattePipeline of diffusers, or --weights_only."),
    "eval": ("RUN", "Measures a model: held-out loss, Fréchet video distance, similarity of samples to their prompts."),
    "demo": ("", "Does it all on clips of moving shapes, in minutes: prep, train, sample, judge, report."),
    "bench": ("WHAT", "Measures model, data, prep, train, checkpoint, validate or all beside what they could be."),
    "report": ("RUN …", "Writes one HTML page: curves, playing samples, events; of several runs, side by side."),
}
MORE = {
    "report": "The page holds everything, videos too, and opens from disk. Each validation writes its run's anew.",
    "preflight": "Exit status 1 where a check failed; each says what to do. --plan prints bytes of a GPU by ZeRO stage "
    "and workers, the largest micro-batch, FLOPs and hours; for it --memory 80 (10⁹ bytes of a GPU), --gpu H100 and "
    "--mfu 0.35 (share of its FLOP/s that is reached) say for which GPU.",
    "train": "SIGTERM, Ctrl-C, a closed terminal, or a file named `leave` in the run's folder has it make a checkpoint "
    "and end with exit status 75: the same command goes on. A second signal ends it at once. --fresh begins at step 0, "
    "and only with --overwrite where the folder holds a run: what that run wrote is removed, but no shards. --new-data "
    "goes on though `sora prep` added or removed clips since: optimizer, EMA and step stay, and an epoch of the clips "
    "that are there now begins. --no-preflight leaves out the quick part of `sora preflight`: disk, GPU memory; of "
    "several nodes versions, code, storage and clocks.",
    "sample": "A file is named after its prompt and seed. Made again with the same settings it is replaced; with other "
    "settings, or of a prompt that differs only in case or punctuation, it gets another name (-2, -3, …). samples.json "
    "says what made each.",
    "export": "OUT is a new folder. `LattePipeline.from_pretrained(OUT)` reads it, as its README.md shows, and so do "
    "`sora sample OUT` and `model.init_from: OUT`. A pipeline holds factorised models of DDPM that predict epsilon "
    "and have nothing that diffusers' Latte lacks: what is in the way is named, all at once; --weights_only holds any.",
    "eval": "Compares with the clips that data.holdout_fraction kept from training. Prints a table, or JSON with "
    "--json, and writes eval.json. Of the quickstart's clips the judge also says how many samples show their captions.",
}
"""What the help of a verb says beyond its sentence."""
READS = {
    "prep": ("name", "data", "selection", "prep", "codec", "cluster.address", "model.patch", "train.batch_size",
             "train.steps"),
    "download": ("codec", "model.init_from"),
}  # fmt: skip
"""Sections and keys that the help of a verb shows, where it is not the whole recipe."""
EXAMPLES = {
    "eval": "runs/quickstart --json",
    "preflight": "jobs/quickstart.yaml --plan",
    "download": "jobs/real_clips.yaml --to /shared/models",
    "prep": "jobs/real_clips.yaml --data.captions my/captions.csv --data.root my/videos",
    "inspect": "runs/quickstart/shards --json",
    "train": "jobs/quickstart.yaml --name again --train.steps 40",
    "sample": 'runs/quickstart --prompt "a blue square moving up"',
    "export": "runs/my_run my_model",
    "demo": "",
    "bench": "train jobs/quickstart.yaml --workers 1 2",
    "report": "runs/quickstart runs/again --out both.html",
}


@dataclass(frozen=True)
class DownloadOptions:
    """Where to."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}

    to: str = ""
    """Folder that all nodes share, for `codec.models`."""


@dataclass(frozen=True)
class PrepOptions:
    """Whether to encode."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}

    plan: bool = False
    """Open headers only, and print what encoding would give and cost."""


@dataclass(frozen=True)
class PreflightOptions:
    """Which checks, and of which GPU."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}

    plan: bool = False
    """Print memory, FLOPs and hours by the recipe alone, without a cluster."""
    gpu: str | None = None
    """With --plan: the GPU whose data sheet the hours are computed from, such as `A100`; H100 if not given."""
    memory: PositiveFloat | None = None
    """With --plan: 10⁹ bytes of a GPU that training may use; those of the H100 or A100 if not given."""
    mfu: PositiveFloat | None = None
    """With --plan: share of the GPU's FLOP/s that training reaches; 0.35 if not given."""


@dataclass(frozen=True)
class TrainOptions:
    """How to begin."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}

    fresh: bool = False
    """Begin at step 0, not at the newest checkpoint."""
    overwrite: bool = False
    """With --fresh: remove what an earlier run wrote into the run's folder."""
    new_data: bool = False
    """Go on with a run whose shards have other clips now; its order of clips begins anew with them."""
    no_preflight: bool = False
    """Leave out the quick part of `sora preflight`."""


@dataclass(frozen=True)
class InspectOptions:
    """How to show the counts."""

    json: bool = False
    """Print one JSON object instead of a table."""
    check: bool = False
    """Read every byte of the shards against its checksum, and name what is damaged."""
    html: str | None = None
    """Write one HTML page with clips decoded from their latents, distributions, and what was left out."""
    clips: PositiveInt = 12
    """How many clips of each bucket the page shows."""
    root: str = ""
    """Folder of the source videos, where it is no longer the one they were encoded from."""


@dataclass(frozen=True)
class SampleOptions:
    """What to sample, and how. What is not given is as the run's `validation` has it, the size as it was trained."""

    prompt: tuple[str, ...] = ()
    """What the video shows; several make several videos."""
    prompts: str | None = None
    """Text file with a prompt on each line, in UTF-8; no CSV."""
    seed: tuple[int, ...] = (0,)
    """Fixes the noise that a video begins as; several make several videos of each prompt."""
    sampler: Literal["auto", "ddim", "dpm++", "ddpm", "euler", "heun"] | None = None
    """Flow models take `euler` or `heun`, DDPM's `ddim`, `dpm++` or `ddpm`; `auto` is the first of them."""
    steps: PositiveInt | None = None
    """Sampler steps."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Diffusion times, 0 (data) to 1000 (noise), between which guidance is on, such as `100 900`."""
    guidance_rescale: NonNegativeFloat | None = None
    """How far guided predictions are brought back to the spread of those without guidance, 0 to 1."""
    negative: str | None = None
    """What guidance leads away from, instead of the empty prompt."""
    frames: Extent | None = None
    """Frames of a video."""
    height: Extent | None = None
    """Height in pixels."""
    width: Extent | None = None
    """Width in pixels."""
    format: tuple[Literal["mp4", "gif", "png"], ...] = ("mp4", "gif")
    """Files to write of each video, one or several; png is a strip of its frames."""
    weights: Literal["ema", "raw"] | None = None
    """The averaged weights (ema, unless it is an export of raw ones), or those that were trained (raw)."""
    out: str | None = None
    """Folder for the videos; `samples/prompts` in the run's folder if not given."""


@dataclass(frozen=True)
class ExportOptions:
    """What the folder is to hold."""

    weights_only: bool = False
    """One safetensors file that `sora sample` reads, instead of a whole pipeline of diffusers; for any run."""
    weights: Literal["ema", "raw"] | None = None
    """The averaged weights (ema), or those that were trained (raw)."""


@dataclass(frozen=True)
class EvalOptions:
    """What to measure, and against what."""

    i3d: str | None = None
    """I3D's weights (Kinetics-400), safetensors: with them the Fréchet video distance is measured; else only where the
    run's own `validation.fvd` says so. It follows the original TensorFlow code and compares with clips decoded from
    their latents: the values do not compare with those that StyleGAN-V or Latte published."""
    clip: str | None = None
    """CLIP for the similarity, a folder or a hub id; the run's own `validation.clip` if not given."""
    fvd_clips: Annotated[int, Field(ge=2)] | None = None
    """Clips that FVD is of; the run's own `validation.fvd_clips` if not given."""
    holdout_clips: NonNegativeInt | None = None
    """Held-out clips whose loss is measured; the run's own `validation.holdout_clips` if not given."""
    shards: str | None = None
    """Folder of the shards that the run was trained on, where it is no longer the recipe's `data.output`."""
    json: bool = False
    """Print one JSON object instead of a table."""
    weights: Literal["ema", "raw"] | None = None
    """The averaged weights (ema), or those that were trained (raw)."""
    out: str | None = None
    """File for the JSON; `eval.json` in the run's folder if not given."""


@dataclass(frozen=True)
class ReportOptions:
    """Where the page goes."""

    out: str | None = None
    """File for the page; report.html in the run's folder if not given, or for several runs in the current one."""


def usage() -> str:
    """The verbs with a sentence each, and an example."""
    verbs = "\n".join(f"  {f'{verb} {what}':17}  {sentence}" for verb, (what, sentence) in VERBS.items())
    return f"""\
usage: sora VERB RECIPE [--section.key value …]

Trains text-to-video diffusion transformers: a folder of videos and a CSV of captions go in, a model comes out.
A recipe is a YAML file; any of its keys is a flag too.

{verbs}

  sora demo
  sora train {EXAMPLES["train"]}
  sora sample {EXAMPLES["sample"]}

sora VERB --help shows every key with its meaning; sora VERB RECIPE --help, what that recipe sets."""
