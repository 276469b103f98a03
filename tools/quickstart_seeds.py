"""How much the quickstart's results vary with the training seed.

Trains with three seeds on the quickstart's shards and measures 192 clips of each. Run `python -m
tools.quickstart_seeds` (`make bench-quickstart`) after `make quickstart`, or `python -m tools.quickstart_seeds image`
after `make quickstart-image`, with 144 clips of each. Each run takes as long as the quickstart's training. Finished
runs are not repeated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sora_train.launch.trainer import launch_training
from sora_train.quickstart import image
from sora_train.quickstart.measure import measure_samples
from sora_train.quickstart.run import find_recipe, sample
from sora_train.recipe import Recipe, load_recipe

TRAINING_SEEDS = (0, 1, 2)
SAMPLE_SEEDS = (0, 1, 2, 3)
NAMES = ("colour", "direction", "shape", "all")


def trained(path: str, seed: int) -> tuple[Recipe, Path]:
    """The recipe and the run of a training seed."""
    overrides = {
        "name": f"{Path(path).stem}-seed-{seed}",
        "train.seed": seed,
        "validation.every": 0,
        "tracking.wandb": "off",
    }
    recipe = load_recipe(find_recipe(path), overrides)
    return recipe, launch_training(recipe)


def main(with_image: bool) -> None:
    rows = []
    for seed in TRAINING_SEEDS:
        recipe, run = trained(image.RECIPE if with_image else "jobs/quickstart.yaml", seed)
        if with_image:
            shares = image.measure(run, image.sample(run))
        else:
            shares = measure_samples(Path(recipe.data.captions).parent, run, sample(run, SAMPLE_SEEDS))
        rows.append({"seed": seed, **shares})
    extra = ["lowest PSNR, dB"] * with_image
    heads = ["training seed", "clips", *(f"{name} seen / held out" for name in NAMES), *extra]
    print("\n| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        cells = [f"{row['seen'][name]:.3f} / {row['held_out'][name]:.3f}" for name in NAMES]
        lowest = [f"{row['psnr_lowest']:.1f}"] * with_image
        print("| " + " | ".join([str(row["seed"]), str(row["clips"]), *cells, *lowest]) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main("image" in sys.argv[1:])
