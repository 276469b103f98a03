"""Opens a released diffusers pipeline, `WanPipeline` or `LattePipeline`, as if it were a run of `sora train`.

So `sora sample` shows what a base model makes before it is trained. Text cleaning, null prompt, steps, guidance and
default size are those of the pipeline; objective and shift are those of its scheduler.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sora_train.codec import CodecConfig
from sora_train.codec.conventions import cleaning_of, null_prompt_of
from sora_train.codec.files import damaged_file_errors, find_text_encoder, find_vae, read_config
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.manifest import Counts, LatentFormat, Manifest
from sora_train.model.convert import config_from_diffusers
from sora_train.recipe import Recipe
from sora_train.train.weights import EXPORT_INFO, EXPORTED

PARTS = {
    "transformer": "transformer/config.json",
    "VAE": "vae/config.json",
    "text encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler/scheduler_config.json",
}
FAMILIES = {"WanTransformer3DModel": "wan", "LatteTransformer3DModel": "latte", "LatteT2V": "latte"}
MAX_TOKENS = {"wan": 512, "latte": 120}
SAMPLING = {"wan": {"steps": 50, "guidance": 5.0}, "latte": {"steps": 50, "guidance": 7.5}}
"""Defaults of the pipelines' `__call__`."""
GIVEN = 0.5  # above 0: whether, not how often, a released model was trained with a given first frame
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def is_released(folder: Path) -> bool:
    """Whether a folder has a diffusers pipeline that sora_train did not write."""
    own = any((folder / name).exists() for name in (EXPORT_INFO, EXPORTED, "recipe.yaml"))
    return not own and any((folder / name).is_file() for name in ("model_index.json", PARTS["transformer"]))


def read_released(folder: Path) -> tuple[Recipe, Manifest]:
    """Recipe and manifest that describe a released pipeline. Raises UserError for parts that are missing or unknown."""
    check_class(folder)
    if missing := [f"{part} ({file})" for part, file in PARTS.items() if not (folder / file).exists()]:
        raise UserError(
            f"{folder} is a pipeline without {', '.join(missing)}. Fetch the whole repository, for instance with `sora "
            "download`",
            code="run",
        )
    config = read_config(folder / "transformer")
    if (family := FAMILIES.get(config.get("_class_name", ""))) is None:
        raise UserError(
            f"{folder}/transformer holds a {config.get('_class_name')}; `sora sample` reads {', '.join(FAMILIES)}",
            code="unsupported",
        )
    try:
        model = asdict(config_from_diffusers(config))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/transformer can't be read: {error}", code="weights") from None
    scheduler = read_json(folder / PARTS["scheduler"])
    diffusion, sampler = flow_of(scheduler) if family == "wan" else ddpm_of(scheduler)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    recipe = Recipe.model_validate(
        {
            "name": "released",
            "codec": {
                "vae": str(folder),
                "text": str(folder),
                "text_precision": precision,
                **text_conventions(folder, family),
            },
            "model": model,
            "diffusion": diffusion,
            "conditioning": {"frames": 1, "probability": GIVEN if takes_image(folder) else 0.0},
            "train": {"precision": precision},
            "validation": {"sampler": sampler, **SAMPLING[family]},
        }
    )
    return recipe, manifest_of(recipe, family)


def text_conventions(folder: Path, family: str) -> dict[str, Any]:
    """The keys of `codec` by which the pipeline reads prompts."""
    return {
        "caption_cleaning": cleaning_of(CodecConfig(), str(folder)),
        "null_prompt": null_prompt_of(CodecConfig(), str(folder)),
        "max_tokens": MAX_TOKENS[family],
    }


def check_class(folder: Path) -> None:
    """Raises UserError for a pipeline that needs other networks, such as an image encoder or two transformers."""
    if not (folder / "model_index.json").is_file():
        return
    index = read_json(folder / "model_index.json")
    name, known = index.get("_class_name"), ["WanPipeline", "LattePipeline"]
    known += ["WanImageToVideoPipeline"] if index.get("expand_timesteps") is True else []
    if name not in known:
        why = " It needs an image encoder." if name == "WanImageToVideoPipeline" else ""
        raise UserError(
            f"{folder} is a {name}; `sora sample` reads a WanPipeline, a LattePipeline, or a WanImageToVideoPipeline "
            f"with expand_timesteps.{why}",
            code="unsupported",
        )
    if (index.get("transformer_2") or [None])[0]:
        raise UserError(
            f"{folder} has two transformers, for high and low noise; only pipelines with one are supported",
            code="unsupported",
        )


def takes_image(folder: Path) -> bool:
    """Whether a pipeline's model continues a given first frame: Wan 2.2's TI2V, by its `expand_timesteps`."""
    index = folder / "model_index.json"
    return index.is_file() and read_json(index).get("expand_timesteps") is True


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is damaged."""
    with damaged_file_errors(str(file)):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


def flow_of(scheduler: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The `diffusion` section and the sampler of a flow's scheduler."""
    name = scheduler.get("_class_name")
    if name == "UniPCMultistepScheduler" and scheduler.get("prediction_type") == "flow_prediction":
        changed = {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero", "use_flow_sigmas": True}
        if other := [key for key, value in changed.items() if scheduler.get(key, value) != value]:
            log.warning(f"the pipeline's scheduler sets {', '.join(other)}, and sampler unipc uses {changed}")
        return {"kind": "flow", "shift": scheduler.get("flow_shift", 1.0)}, "unipc"
    if name == "FlowMatchEulerDiscreteScheduler" and not scheduler.get("use_dynamic_shifting"):
        return {"kind": "flow", "shift": scheduler.get("shift", 1.0)}, "euler"
    raise UserError(
        f"the pipeline's scheduler is {name} with prediction_type {scheduler.get('prediction_type')}; Wan needs "
        "UniPCMultistepScheduler with flow_prediction, or FlowMatchEulerDiscreteScheduler",
        code="unsupported",
    )


def ddpm_of(scheduler: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The `diffusion` section and the sampler of a DDPM's scheduler: DDIM over its betas."""
    schedule = {"linear": "linear", "squaredcos_cap_v2": "cosine"}.get(scheduler.get("beta_schedule", "linear"))
    prediction = PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
    if schedule is None or prediction is None or scheduler.get("trained_betas") is not None:
        raise UserError(
            f"the pipeline's scheduler has beta_schedule {scheduler.get('beta_schedule')} and prediction_type "
            f"{scheduler.get('prediction_type')}; linear or squaredcos_cap_v2 and {', '.join(PREDICTIONS)} can be read",
            code="unsupported",
        )
    if (spacing := scheduler.get("timestep_spacing", "leading")) != "trailing":
        log.info(
            f"the pipeline's scheduler spaces its steps as `{spacing}`, and sampler ddim as `trailing`, which begins "
            "with noise alone: videos differ slightly from the pipeline's"
        )
    diffusion: dict[str, Any] = {"kind": "ddpm", "beta_schedule": schedule, "prediction": prediction}
    if schedule == "linear":
        diffusion |= {"beta_start": scheduler.get("beta_start", 1e-4), "beta_end": scheduler.get("beta_end", 0.02)}
    return diffusion | {"zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False)}, "ddim"


def manifest_of(recipe: Recipe, family: str) -> Manifest:
    """The manifest of a pipeline, with the size that it was released for. It has no clips, and no hashes to compare."""
    vae, text, codec = find_vae(recipe.codec.vae), find_text_encoder(recipe.codec.text), recipe.codec
    if vae.channels != recipe.model.in_channels:
        raise UserError(
            f"{vae.place} is a VAE of {vae.channels} channels, and the transformer takes {recipe.model.in_channels}: "
            "they are not of one pipeline. Fetch the whole pipeline again",
            code="weights",
        )
    frames, height, width, fps = 16, vae.factor * recipe.model.sample_size, vae.factor * recipe.model.sample_size, 8.0
    if family == "wan":  # Wan 2.2's VAE compresses twice as much, for twice the size
        frames, height, width, fps = (121, 704, 1280, 24.0) if vae.factor == 16 else (81, 480, 832, 16.0)
    return Manifest(
        encoding_hash="",
        vae=vae.facts(codec, hash=""),
        text=text.facts(codec, hash=""),
        latents=LatentFormat(moments=vae.moments),
        frames=frames,
        fps=fps,
        height=height,
        width=width,
        buckets={},
        empty_text="",
        empty_tokens=0,
        counts=Counts(asked=0, written=0, quarantined=0, filtered=0),
        reasons={},
    )
