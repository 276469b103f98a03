"""Whether a run may be resumed by a recipe: which keys and clips may differ from when it last started."""

from __future__ import annotations

from pathlib import Path

from sora_train.errors import UserError
from sora_train.launch.clips import CLIPS, Clips, check_clips
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.settings import build, flatten, read_yaml
from sora_train.train import checkpoint

RESUMABLE_KEYS = (
    "name",
    "data.captions",
    "data.root",
    "data.output",  # the shards' own manifest is compared
    "data.max_bad_fraction",
    "data.timeout_s",
    "data.file_column",
    "data.caption_column",
    "prep.",
    "codec.",  # likewise, and `null_prompt` by itself
    "model.init_from",
    "model.preset",  # the keys that it stands for are compared
    "train.output",
    "train.steps",
    "train.micro_batch_size",
    "train.zero_stage",
    "train.log_every",
    "train.log_samples",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_by",
    "train.offload",
    "train.shard_cache_gb",
    "train.activation_checkpointing",
    "train.compile",
    "train.guard_",
    "train.deepspeed",
    "validation.",
    "cluster.",
    "tracking.",
)
"""What a resumed run may have otherwise than it began with: nothing of it changes what is learned, but for rounding."""

TUNABLE_KEYS = (
    "train.learning_rate",
    "train.warmup_steps",
    "train.schedule",
    "train.gradient_clip",
    "train.weight_decay",
    "train.reduce_dtype",
)
"""What it may have otherwise too, from the resumed step on, since people steer by it."""

CLIP_KEYS = (
    "data.frames",
    "data.height",
    "data.width",
    "data.buckets",
    "data.start_s",
    "data.stride_s",
    "data.clips_per_video",
    "data.max_enlarge",
    "selection.",
)
"""Keys that decide which clips there are, and not how one is encoded: they may change with `--new-data`."""

UNREPORTED_KEYS = (
    "name",
    "data.captions",
    "data.root",
    "data.output",
    "data.file_column",
    "data.caption_column",
    "prep.",
    "codec.",
    "model.init_from",
    "model.preset",
    "train.output",
    "cluster.address",
    "tracking.",
)
"""Keys that say where things are or how they are shown; a change of any other is an event of the run."""


def check_resume(
    run: Path, recipe: Recipe, manifest: Manifest, clips: Clips | None = None, new_data: bool = False
) -> int | None:
    """The step of the newest whole checkpoint, if any. UserError if another recipe made it, or if its clips are others
    than these and nobody agreed to that (`new_data`).
    """
    found = checkpoint.whole(run / "checkpoints")
    if not found:
        return None
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run / 'recipe.yaml'} is missing: put a copy of its newest checkpoint's there")
    free = RESUMABLE_KEYS + TUNABLE_KEYS + (CLIP_KEYS if new_data else ())
    changed = [change for change in changed_keys(run, recipe) if not change.startswith(free)]
    changed += changed_arithmetic(run, recipe)
    cuts_only = bool(changed) and all(change.startswith(CLIP_KEYS) for change in changed)
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run / 'manifest.json'} is missing: put a copy of its shards' there")
    trained = Manifest.load(str(run))
    if recipe.codec.null_prompt not in ("auto", before := saved_null_prompt(run)):
        changed.append(f"codec.null_prompt was {before} and is {recipe.codec.null_prompt}")
    if trained.encoding_hash != manifest.encoding_hash:
        changed.append(f"the shards' encoding was {trained.encoding_hash[:12]} and is {manifest.encoding_hash[:12]}")
    elif trained.buckets != manifest.buckets and not (run / CLIPS).is_file():
        changed.append(
            f"the shards' clips were {trained.buckets} and are {manifest.buckets} (an earlier version began the run "
            f"and did not record which; a new run can start from its weights: --name NEW --model.init_from {run})"
        )
    if changed:
        go_on = ", or add --new-data to go on with the clips that these keys give" if cuts_only else ""
        raise UserError(
            f"{run} was begun with another recipe: {'; '.join(changed)}. Give this one another name (--name){go_on}, "
            "or set them back to go on"
        )
    if clips is not None:
        check_clips(run, recipe.data.output, clips, new_data)
    return found[-1][0]


def saved_recipe(run: Path) -> Recipe:
    """The recipe that a run last started with."""
    return build(Recipe, read_yaml(run / "recipe.yaml"), {}, str(run / "recipe.yaml"))


def saved_null_prompt(run: Path) -> str:
    """The null prompt that a run learned; one of before `codec.null_prompt` learned `eos`."""
    stated = saved_recipe(run).codec.null_prompt
    return "eos" if stated == "auto" else stated


def changed_arithmetic(run: Path, recipe: Recipe) -> list[str]:
    """A phrase if the run goes between stage 0 and the others in bf16, which is more than rounding; else nothing."""
    then, now = saved_recipe(run).train.zero_stage, recipe.train.zero_stage
    if recipe.train.precision == "fp32" or bool(then) == bool(now):
        return []
    return [
        f"train.zero_stage was {then} and is {now}: in bf16, stage 0 computes with float32 weights under autocast, the "
        "other stages with bfloat16 weights"
    ]


def changed_keys(run: Path, recipe: Recipe, of: tuple[str, ...] = ("",)) -> list[str]:
    """Keys that begin with any of `of` and are otherwise than when the run last started, a phrase each."""
    before, now = (dict(flatten(r.model_dump(mode="json"))) for r in (saved_recipe(run), recipe))
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.startswith(of)
    ]
