"""The options of each command of `sora`: flags that are not keys of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, create_model

from sora_train.sampling import Sampling
from sora_train.section import Section, options

Extent = Annotated[int, Field(ge=1, le=2**16)]
"""Frames, or pixels on a side. The product of three such numbers still fits a tensor's size."""


@options
class DownloadOptions:
    """Destination of the download."""

    to: str = ""
    """Folder that all nodes share, for `codec.models`."""


@options
class PrepOptions:
    """Whether to encode, or only to print a plan or to compact the shards."""

    plan: bool = False
    """Open only the headers of files, and print what encoding would produce and cost."""
    compact: bool = False
    """Encode nothing; write shards with many dropped clips again, and merge small ones."""


@options
class PreflightOptions:
    """Which checks to run, and for which GPU."""

    plan: bool = False
    """Print memory, FLOPs and hours from the recipe alone, without a cluster."""
    gpu: str | None = None
    """With --plan: GPU whose data sheet gives the speed for the hours, such as `A100`. H100 if not given."""
    memory: PositiveFloat | None = None
    """With --plan: GPU memory that training may use, in 10⁹ bytes. That of the H100 or A100 if not given."""
    mfu: PositiveFloat | None = None
    """With --plan: share of the GPU's FLOP/s that training reaches. 0.35 if not given."""
    mtbf: PositiveFloat | None = None
    """With --plan: mean hours between failures of all GPUs together. By a published rate if not given."""


@options
class TrainOptions:
    """How to start."""

    fresh: bool = False
    """Start at step 0 instead of the newest checkpoint."""
    overwrite: bool = False
    """With --fresh: remove what an earlier run wrote into the run's folder."""
    new_data: bool = False
    """Resume a run whose shards have other clips now. A new epoch of these clips begins."""
    no_preflight: bool = False
    """Skip the quick part of `sora preflight`."""


@options
class DemoOptions:
    """Which demo."""

    image: bool = False
    """Learn videos that continue a given first frame; the caption says only where its shape moves."""
    lora: bool = False
    """Teach the model of `sora demo` a seventh colour from 60 clips, with adapters."""


@options
class InspectOptions:
    """What to show, and how."""

    json: bool = False
    """Print one JSON object instead of a table."""
    check: bool = False
    """Verify the checksums of all bytes in the shards and their index, compare the two, and name what is damaged."""
    html: str | None = None
    """Write one HTML page: clips decoded from their latents, distributions, and skipped clips."""
    clips: PositiveInt = 12
    """Clips of each bucket on the page."""
    root: str = ""
    """Folder of the source videos, if they were moved after encoding."""
    models: str = ""
    """Folder that `sora download` filled, if the networks came from one (codec.models)."""


_optional: Any = {
    name: (Optional[field.rebuild_annotation()], Field(default=None, description=field.description))  # noqa: UP045
    for name, field in Sampling.model_fields.items()
}
SamplingFlags = create_model("SamplingFlags", __base__=Section, **_optional)
"""The keys of `Sampling` as flags; None if not given."""


class SampleOptions(SamplingFlags):
    """What to sample and how.

    Defaults are the run's `validation` section and the size of its training clips.
    """

    prompt: tuple[str, ...] = ()
    """What the video shows. Several prompts make several videos."""
    prompts: str | None = None
    """UTF-8 text file with one prompt per line, not a CSV."""
    image: tuple[str, ...] = ()
    """Image that the video begins with, cropped and resized as in prep. One for all prompts, or one for each."""
    video: tuple[str, ...] = ()
    """Video whose last frames the new video begins with. One for all prompts, or one for each."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the initial noise. Several seeds make several videos of each prompt."""
    frames: Extent | None = None
    """Frames of a video."""
    height: Extent | None = None
    """Height in pixels."""
    width: Extent | None = None
    """Width in pixels."""
    format: tuple[Literal["mp4", "gif", "png"], ...] = ("mp4", "gif")
    """File types to write for each video, one or several. `png` is a strip of its frames."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged weights (`ema`) or weights as trained (`raw`). If not given: `ema`, or `raw` for an export of raw
    weights."""
    lora: tuple[str, ...] = ()
    """Adapters (LoRA) to add to the model, one or several, each FILE or FILE:WEIGHT, such as style.safetensors:0.8.
    Names of diffusers, peft, ComfyUI and kohya are read, and folders of `sora export --lora`."""
    out: str | None = None
    """Folder for the videos. `samples/prompts` in the run's folder if not given."""


@options
class ExportOptions:
    """What the folder contains."""

    weights_only: bool = False
    """Write one safetensors file that `sora sample` reads instead of a diffusers pipeline. Works for any run."""
    lora: bool = False
    """Of a run with `lora.rank`: write the adapters alone, for diffusers' `load_lora_weights`, ComfyUI and `sora
    sample --lora`."""
    merge: bool = False
    """Of a run with `lora.rank`: write the base with the adapters added."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged weights (`ema`) or weights as trained (`raw`)."""


@options
class EvalOptions:
    """What to measure, and with which data."""

    i3d: str | None = None
    """I3D weights (Kinetics-400, safetensors) for the Fréchet video distance. If not given, it is measured only if the
    run's `validation.fvd` is set. I3D follows the original TensorFlow code, and the reference clips are decoded from
    their latents: the values are not comparable with those that StyleGAN-V or Latte published."""
    clip: str | None = None
    """CLIP for the similarity, a folder or a hub id. The run's `validation.clip` if not given."""
    fvd_clips: Annotated[int, Field(ge=2)] | None = None
    """Number of clips for FVD. The run's `validation.fvd_clips` if not given."""
    holdout_clips: NonNegativeInt | None = None
    """Number of held-out clips for the loss. The run's `validation.holdout_clips` if not given."""
    given_clips: NonNegativeInt | None = None
    """Number of held-out clips whose first frames are given to samples, for a run trained with conditioning. 8 if not
    given; 0: off. Each clip is sampled with and without them."""
    shards: str | None = None
    """Folder of the shards that the run was trained on, if it is no longer the recipe's `data.output`."""
    json: bool = False
    """Print one JSON object instead of a table."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged weights (`ema`) or weights as trained (`raw`)."""
    out: str | None = None
    """JSON file to write. `eval.json` in the run's folder if not given."""


@options
class ReportOptions:
    """Where to write the page."""

    out: str | None = None
    """HTML file to write. If not given: report.html in the run's folder, or in the current folder for several runs."""
