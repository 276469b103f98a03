"""What a resumed run does otherwise than before: said before it starts, and written down as events."""

from __future__ import annotations

from pathlib import Path

from sora_train.launch.resume import UNREPORTED_KEYS, changed_keys, saved_recipe
from sora_train.recipe import Recipe
from sora_train.train.config import TrainConfig
from sora_train.train.loop import learning_rate


def describe_changes(run: Path, recipe: Recipe, at: int) -> str:
    """The keys that differ from when the run last started, and how the learning rate jumps at step `at`; "" if none."""
    found = [change for change in changed_keys(run, recipe) if not change.startswith(UNREPORTED_KEYS)]
    if found and (jump := learning_rate_jump(saved_recipe(run).train, recipe.train, at)):
        found.append(jump)
    return "; ".join(found)


def learning_rate_jump(then: TrainConfig, now: TrainConfig, at: int) -> str:
    """Both learning rates where step `at` + 1 does not follow the schedule so far, and what would avoid a rise."""
    before, after = learning_rate(then, at - 1), learning_rate(now, at)
    expected = learning_rate(then, at) if at < then.steps else before
    if abs(after - expected) <= 1e-6 * expected:
        return ""
    said = f"the learning rate is {before:.3g} at step {at} and {after:.3g} at step {at + 1}"
    if after > 1.5 * before and at >= now.warmup_steps:
        said += f" (--train.learning_rate {now.learning_rate * before / after:.3g} would avoid the jump)"
    return said
