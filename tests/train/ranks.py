"""One of several gloo ranks that train in this process what they are told. A script: spawned by the tests beside it.

python ranks.py RANK WORLD STORE SHARDS TASKS

TASKS is JSON, a list of {"out": folder, "train": {…}, "resume": folder or null, "init_from": folder or ""}.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.model import ModelConfig
from sora_train.train import checkpoint
from sora_train.train.config import TrainConfig
from sora_train.train.loop import train
from sora_train.train.metrics import JsonLines

MODEL = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)


def run(shards: str, out: str, settings: dict, resume: str | None = None, init_from: str = "") -> None:
    """Trains, and leaves every checkpoint and a line for every step in `out`."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train(
        TrainConfig(**settings),
        replace(MODEL, init_from=init_from),
        DiffusionConfig(),
        ShardSet(shards),
        device=torch.device("cpu"),
        log=JsonLines(folder / "metrics.jsonl").write,
        keep=lambda step, write: write(folder / checkpoint.name_of(step)),
        resume=Path(resume) if resume else None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, store, shards, tasks = sys.argv[1:]
    dist.init_process_group("gloo", store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world))
    for task in json.loads(tasks):
        run(shards, task["out"], task["train"], task.get("resume"), task.get("init_from", ""))
    dist.barrier()
    # Past Python's teardown: once in some tens of times a thread of gloo's lets go of a tensor then, which aborts.
    os._exit(0)
