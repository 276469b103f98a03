"""Training collects garbage at its own steps."""

import gc
from pathlib import Path

import pytest
import torch

from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.model import ModelConfig
from sora_train.train import loop
from sora_train.train.config import TrainConfig
from sora_train.train.run_dir import RunDir


class Counting(RunDir):
    """Counts the objects that the collector looks after, at each step."""

    def poll_requests(self, step: int) -> tuple[bool, bool]:
        self.objects = {**getattr(self, "objects", {}), step: len(gc.get_objects())}
        return super().poll_requests(step)


def test_memory_stays_bounded_while_the_collector_is_off(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "COLLECT_EVERY", 5)
    # Torch's selective checkpointing leaves cycles of objects at every step.
    config = TrainConfig(steps=12, batch_size=1, micro_batch_size=1, activation_checkpointing="selective")
    model = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)
    shards, run_dir = ShardSet(str(tiny_shards)), Counting(tmp_path)
    torch.set_num_threads(1)
    loop.train(config, model, DiffusionConfig(), shards, device=torch.device("cpu"), run_dir=run_dir)
    garbage = run_dir.objects[5] - run_dir.objects[2]
    assert garbage > 300
    assert run_dir.objects[12] - run_dir.objects[7] < garbage / 3
    assert gc.isenabled()
