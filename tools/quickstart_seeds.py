"""How much the quickstart's results vary with the training seed.

Trains with three seeds on the quickstart's shards and measures 192 clips of each. Run `python -m
tools.quickstart_seeds` (`make bench-quickstart`) after `make quickstart`. Each run takes as long as the
quickstart's training. Finished runs are not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path

from sora_train.launch.trainer import launch_training
from sora_train.quickstart.measure import measure_samples
from sora_train.quickstart.run import find_recipe, sample
from sora_train.recipe import load_recipe

TRAINING_SEEDS = (0, 1, 2)
SAMPLE_SEEDS = (0, 1, 2, 3)
NAMES = ("colour", "direction", "shape", "all")


def main() -> None:
    rows = []
    for seed in TRAINING_SEEDS:
        overrides = {
            "name": f"quickstart-seed-{seed}",
            "train.seed": seed,
            "validation.every": 0,
            "tracking.wandb": "off",
        }
        recipe = load_recipe(find_recipe("jobs/quickstart.yaml"), overrides)
        run = launch_training(recipe)
        shares = measure_samples(Path(recipe.data.captions).parent, run, sample(run, SAMPLE_SEEDS))
        rows.append({"seed": seed, "clips": shares["clips"], "seen": shares["seen"], "held_out": shares["held_out"]})
    print("\n| training seed | clips | " + " | ".join(f"{name} seen / held out" for name in NAMES) + " |")
    print("|" + "---|" * (2 + len(NAMES)))
    for row in rows:
        cells = [f"{row['seen'][name]:.3f} / {row['held_out'][name]:.3f}" for name in NAMES]
        print(f"| {row['seed']} | {row['clips']} | " + " | ".join(cells) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
