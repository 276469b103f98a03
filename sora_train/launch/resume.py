"""Resuming a run: which keys and clips may differ from its last start, and what changed."""

from __future__ import annotations

from pathlib import Path

from sora_train.errors import UserError
from sora_train.launch.clips import CLIPS, Clips, check_clips
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.settings import build, flatten, read_yaml
from sora_train.train import checkpoint
from sora_train.train.loop import learning_rate

FIXED_KEYS = (
    "model.",
    "diffusion.",
    "conditioning.",
    "lora.",
    "data.fps",
    "data.crop",
    "data.flip",
    "data.holdout_fraction",
    "data.image_ratio",
    "train.batch_size",
    "train.balance",
    "train.betas",
    "train.ema_decay",
    "train.caption_dropout",
    "train.seed",
)
"""Keys that must not change on resume, because they decide what is learned. Others affect results only through
rounding, may be tuned (learning rate, clipping), or are compared by the shards' encoding. `tests/launch/test_checks.py`
lists those that are free."""

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
"""Keys that decide which clips exist, not how they are encoded. They may change with `--new-data`."""

FREE_KEYS = ("model.init_from", "model.preset", "lora.init_from")
"""Exceptions: the keys that the preset stands for are compared."""
PATHS = ("train.output", "train.profile", "cluster.address")
UNREPORTED_KEYS = ("name", "data.", "prep.", "codec.", "tracking.", *PATHS, *FREE_KEYS)
"""Keys of paths and display. A change of any other key, and of `CLIP_KEYS`, is written as an event of the run."""


def check_resume(
    run: Path, recipe: Recipe, manifest: Manifest, clips: Clips | None = None, new_data: bool = False
) -> int | None:
    """The step of the newest complete checkpoint, or None.

    UserError if the run was started with an incompatible recipe, or on other clips without `new_data`.
    """
    found = checkpoint.complete_checkpoints(run / "checkpoints")
    if not found:
        return None
    for name in ("recipe.yaml", "manifest.json"):
        if not (run / name).is_file():
            raise UserError(f"{run / name} is missing. Copy {name} from the newest checkpoint to it", code="resume")
    fixed = FIXED_KEYS if new_data else FIXED_KEYS + CLIP_KEYS
    changed = [change for change in changed_keys(run, recipe, fixed) if not change.startswith(FREE_KEYS)]
    changed += changed_arithmetic(run, recipe)
    cuts_only = bool(changed) and all(change.startswith(CLIP_KEYS) for change in changed)
    trained = Manifest.load(str(run))
    if recipe.codec.null_prompt not in ("auto", before := saved_null_prompt(run)):
        changed.append(f"codec.null_prompt was {before} and is {recipe.codec.null_prompt}")
    if trained.encoding_hash != manifest.encoding_hash:
        changed.append(f"the shards' encoding was {trained.encoding_hash[:12]} and is {manifest.encoding_hash[:12]}")
    elif trained.buckets != manifest.buckets and not (run / CLIPS).is_file():
        changed.append(
            f"the shards' clips were {trained.buckets} and are {manifest.buckets} (an earlier version started the run "
            f"without recording them; a new run can start from its weights: --name NEW --model.init_from {run})"
        )
    if changed:
        go_on = ", add --new-data to resume on the clips that these keys give" if cuts_only else ""
        raise UserError(
            f"{run} was started with another recipe: {'; '.join(changed)}. Set the keys back to resume{go_on}, or give "
            "this run another name (--name)",
            code="resume",
        )
    if clips is not None:
        check_clips(run, recipe.data.output, clips, new_data)
    return found[-1][0]


def saved_recipe(run: Path) -> Recipe:
    """The recipe that a run last started with."""
    return build(Recipe, read_yaml(run / "recipe.yaml"), {}, str(run / "recipe.yaml"))


def saved_null_prompt(run: Path) -> str:
    """The null prompt that a run was trained with. Runs older than the key `codec.null_prompt` used `eos`."""
    stated = saved_recipe(run).codec.null_prompt
    return "eos" if stated == "auto" else stated


def changed_arithmetic(run: Path, recipe: Recipe) -> list[str]:
    """Names a change of arithmetic that is more than rounding: from or to fp32, and in bf16 from or to ZeRO stage 0.

    bf16 and fp8 may replace each other: weights, moments and checkpoints are the same.
    """
    before, after = saved_recipe(run).train, recipe.train
    if before.half != after.half:
        return [f"train.precision was {before.precision} and is {after.precision}"]
    then, now = before.zero_stage, after.zero_stage
    if not after.half or bool(then) == bool(now):
        return []
    return [
        f"train.zero_stage was {then} and is {now}: in bf16, stage 0 computes with float32 weights under autocast, the "
        "other stages with bfloat16 weights"
    ]


def changed_keys(run: Path, recipe: Recipe, of: tuple[str, ...] = ("",)) -> list[str]:
    """Describes each key that starts with one of `of` and differs from the run's last start."""
    before, now = (dict(flatten(r.model_dump(mode="json"))) for r in (saved_recipe(run), recipe))
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.startswith(of)
    ]


def describe_changes(run: Path, recipe: Recipe, step: int) -> str:
    """The keys that changed since the run last started, and any jump of the learning rate at `step`; "" if none."""
    changed = changed_keys(run, recipe)
    found = [change for change in changed if change.startswith(CLIP_KEYS) or not change.startswith(UNREPORTED_KEYS)]
    before, now = (learning_rate(r.train, step - 1) for r in (saved_recipe(run), recipe))
    if abs(now - before) > 0.2 * before:
        after = learning_rate(recipe.train, step)
        found.append(f"the learning rate is {before:.3g} at step {step} and {after:.3g} at step {step + 1}")
    return "; ".join(found)
