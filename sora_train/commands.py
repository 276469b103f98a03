"""The commands of `sora`: arguments, help text and examples."""

from __future__ import annotations

from dataclasses import dataclass

from sora_train.options import (
    DemoOptions,
    DownloadOptions,
    EvalOptions,
    ExportOptions,
    InspectOptions,
    PreflightOptions,
    PrepOptions,
    ReportOptions,
    SampleOptions,
    TrainOptions,
)


@dataclass(frozen=True)
class Command:
    """One command of `sora`."""

    takes: str
    """Its arguments besides flags, such as RECIPE."""
    does: str
    """One sentence for the list of commands."""
    example: str
    options: type = object
    """Flags that are not keys of a recipe."""
    more: str = ""
    """Further text of its help."""
    reads: tuple[str, ...] = ()
    """Sections and keys of the recipe that its help shows; all if empty."""


COMMANDS = {
    "download": Command(
        "RECIPE",
        "Downloads the recipe's VAE, text encoder and initial weights to a folder that all nodes share (--to DIR).",
        "jobs/real_clips.yaml --to /shared/models",
        DownloadOptions,
        reads=("codec", "model.init_from"),
    ),
    "prep": Command(
        "RECIPE",
        "Encodes videos and captions into Parquet shards, only what is missing. --plan: what it would cost.",
        "jobs/real_clips.yaml --data.captions my/captions.csv --data.root my/videos",
        PrepOptions,
        reads=(
            "name",
            "data",
            "selection",
            "prep",
            "codec",
            "cluster.address",
            "model.patch",
            "train.batch_size",
            "train.steps",
        ),
    ),
    "inspect": Command(
        "SHARDS",
        "Counts the clips in shards, and those that were skipped by reason; --html OUT shows clips.",
        "runs/quickstart/shards --json",
        InspectOptions,
    ),
    "preflight": Command(
        "RECIPE",
        "Checks cluster, storage, shards, memory and network before a run. --plan: memory, hours, goodput, no cluster.",
        "jobs/quickstart.yaml --plan",
        PreflightOptions,
        "Exits with 1 if a check failed; each failure says what to do. --plan prints the bytes of a GPU by ZeRO stage "
        "and workers, the largest micro-batch, FLOPs and hours, and exits with 1 if the recipe does not fit. --memory "
        "80 (10⁹ bytes of a GPU), --gpu H100 and --mfu 0.35 (the share of its FLOP/s that training reaches) choose the "
        "GPU. It also forecasts, for cluster.workers GPUs of which one fails every --mtbf hours, the goodput, the best "
        "train.checkpoint_every and the traffic to storage. Seconds of steps, checkpoints and restarts are those of "
        "earlier runs in train.output, else of `sora bench checkpoint --out TRAIN.OUTPUT/bench.jsonl`, else assumed.",
    ),
    "train": Command(
        "RECIPE",
        "Trains on shards and resumes from the newest checkpoint. --fresh: starts at step 0.",
        "jobs/quickstart.yaml --name again --train.steps 40",
        TrainOptions,
        "SIGTERM, Ctrl-C, a closed terminal, or a file named `leave` in the run's folder stops a run: it saves a "
        "checkpoint and exits with 75, and the same command resumes. A second signal stops it at once. --fresh starts "
        "at step 0; if the folder holds a run, it also needs --overwrite, which removes what that run wrote except "
        "shards. --new-data resumes although `sora prep` added or removed clips since: optimizer, EMA and step stay, "
        "and a new epoch of the present clips begins. --no-preflight skips the quick part of `sora preflight`: disk, "
        "memory and what workers need; on several nodes also versions, code and storage.",
    ),
    "sample": Command(
        "RUN",
        "Makes videos of prompts with a run, a checkpoint, an export, or a released pipeline. --lora FILE: adapters.",
        'runs/quickstart --prompt "a blue square moving up"',
        SampleOptions,
        "A file is named after its prompt and seed. The same settings replace it; other settings, or a prompt that "
        "differs only in case or punctuation, get another name (-2, -3, …). samples.json says what made each file. "
        "--image first.png and --video start.mp4 need a model that was trained with conditioning.probability above 0, "
        "or a released pipeline with expand_timesteps (Wan2.2-TI2V). The new video begins with the given frames: the "
        "image, or the last 1 + (conditioning.frames - 1) x the VAE's time factor frames of the video. They are also "
        "written as a PNG, as they were fitted. RUN "
        "may also be the folder of a released WanPipeline or LattePipeline, to see what a base model makes: steps, "
        "guidance, scheduler and size are then those of the pipeline.",
    ),
    "export": Command(
        "RUN OUT",
        "Writes a run's model as a diffusers pipeline, or --weights_only. Of a LoRA run: --lora or --merge.",
        "runs/my_run my_model",
        ExportOptions,
        "OUT is a new folder. `LattePipeline.from_pretrained(OUT)` or WanPipeline's reads it, as its README.md shows, "
        "and so do `sora sample OUT` and `model.init_from: OUT`. A LattePipeline holds factorised DDPM models that "
        "predict epsilon and use nothing that diffusers' Latte lacks; a WanPipeline holds Wan's with flow and its VAE, "
        "and WanImageToVideoPipeline opens the same folder if the model was trained with conditioning. Every "
        "obstacle is named at once. --weights_only works for any. A run that trained "
        "adapters (lora.rank) needs --lora or --merge.",
    ),
    "eval": Command(
        "RUN",
        "Measures a model: held-out loss, Fréchet video distance, similarity of samples to their prompts.",
        "runs/quickstart --json",
        EvalOptions,
        "Compares with the clips that data.holdout_fraction excludes from training. Prints a table, or JSON with "
        "--json, and writes eval.json. For a run with conditioning.probability above 0 it measures given first frames: "
        "how well samples keep them (PSNR), and how much they change the frames after them. For the quickstart's clips "
        "it also measures how many samples show their captions.",
    ),
    "demo": Command(
        "", "Runs everything on clips of moving shapes, in minutes: prep, train, sample, report.", "", DemoOptions
    ),
    "bench": Command(
        "WHAT",
        "Measures the speed of model, data, prep, train, checkpoint or validate.",
        "train jobs/quickstart.yaml --workers 1 2",
    ),
    "report": Command(
        "RUN …",
        "Writes one HTML page: curves, playing samples, events; several runs side by side.",
        "runs/quickstart runs/again --out both.html",
        ReportOptions,
        "The page contains everything, videos too, and opens from disk. Each validation rewrites its run's page.",
    ),
}


def usage() -> str:
    """The text of `sora --help`."""
    commands = "\n".join(f"  {f'{name} {command.takes}':17}  {command.does}" for name, command in COMMANDS.items())
    return f"""\
usage: sora COMMAND RECIPE [--section.key value …]

Trains text-to-video diffusion transformers: a folder of videos and a CSV of captions go in, a model comes out.
A recipe is a YAML file. Each of its keys is also a flag. --quiet shows warnings and results only, --verbose more.

{commands}

  sora demo
  sora train {COMMANDS["train"].example}
  sora sample {COMMANDS["sample"].example}

sora COMMAND --help explains every flag; sora COMMAND RECIPE --help shows what that recipe sets."""
