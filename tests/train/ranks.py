"""One of several gloo ranks that train in this process what they are told: what `conftest.start` runs.

A task is {"out": folder, "train": {…}} with, as needed, "resume": a checkpoint, "init_from": a folder, "shards": other
shards than the others', "model": keys of the model, "conditioning": keys of that section, "act": instead of training, a
function of `acts.py` or `sharing.py`, "sequence_parallel": ranks that share each clip, "largest": bytes that a file of
rank 1 may have from then on, as if its disk were full, "noticed": a step at which a checkpoint is wanted at once. With
"refused": true the task is to end in a UserError: its message goes to refused_RANK.txt in `out`, and the next task
begins, on the same group.
"""

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import acts
import sharing
import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.diffusion import ConditioningConfig, DiffusionConfig
from sora_train.errors import UserError
from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig
from sora_train.train.config import TrainConfig
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir

WAN = {"family": "wan", "sample_size": 32, "feed_forward": 40}
"""Changes of MODEL."""
MODEL = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)


def run(
    shards: str,
    out: Path,
    settings: dict,
    resume: str | None = None,
    init_from: str = "",
    noticed: int | None = None,
    conditioning: dict | None = None,
    lora: dict | None = None,
    sequence_parallel: int = 1,
    **model: Any,
) -> None:
    """Trains, and leaves every checkpoint and a line for every step in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    train(
        TrainConfig(**settings),
        replace(MODEL, init_from=init_from, **model),
        DiffusionConfig(),
        ShardSet(shards),
        device=torch.device("cpu"),
        run_dir=RunDir(out, preemption_requested=lambda step: step == noticed),
        resume=Path(resume) if resume else None,
        conditioning=ConditioningConfig(**(conditioning or {})),
        lora=LoraConfig(**lora or {}),
        sequence_parallel=sequence_parallel,
    )


def main(rank: int, world: int, store: Path, shards: str, tasks: list[dict], log: Path) -> None:
    """What one rank does, with what it prints in `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    for task in tasks:
        out = Path(task["out"])
        if "largest" in task and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest"],) * 2)
        try:
            if "act" in task:
                model = replace(MODEL, **task.get("model", {}))
                getattr(sharing if task["act"] == "share" else acts, task["act"])(
                    model, out, task["train"], task.get("resume")
                )
                continue
            rest = (
                task.get("resume"),
                task.get("init_from", ""),
                task.get("noticed"),
                task.get("conditioning"),
                task.get("lora"),
                task.get("sequence_parallel", 1),
            )
            run(task.get("shards", shards), out, task["train"], *rest, **task.get("model", {}))
        except UserError as error:
            if not task.get("refused"):
                raise
            (out / f"refused_{rank}.txt").write_text(str(error))
    dist.barrier()
    # Past Python's teardown: once in some tens of times a thread of gloo's lets go of a tensor then, which aborts.
    os._exit(0)
