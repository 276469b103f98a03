"""The choice between torch's norms and our kernels, on a device and by times that are made up."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.model import ModelConfig, build
from sora_train.train import norms
from sora_train.train.config import TrainConfig
from sora_train.train.norms import OURS, TORCH, choose_norms
from sora_train.train.run_dir import RunDir

MODEL = ModelConfig(width=32, depth=2, heads=4, text_width=12, sample_size=8)


@pytest.fixture
def chosen(tiny_shards: Path, tmp_path: Path, monkeypatch):
    """Whether blocks use the kernels after the choice, and the run's events."""

    def choose(
        times: dict[str, float], why: str = "", device: str = "cuda", **settings
    ) -> tuple[list[bool], list[str]]:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made Up")
        monkeypatch.setattr(norms, "why_no_norms", lambda *_: why)
        monkeypatch.setattr(norms, "measure", lambda *_, **__: times)
        model, shards, run_dir = build(MODEL), ShardSet(str(tiny_shards)), RunDir(tmp_path)
        config = TrainConfig(**{"precision": "bf16", "zero_stage": 1} | settings)
        by_bucket = dict.fromkeys(shards.rows, config)
        choose_norms(model, by_bucket, shards, run_dir, torch.device(device), compiled=True)
        return [block.fused for block in model.blocks], [each["reason"] for each in run_dir.events.lines.read()]

    return choose


def test_blocks_use_the_kernels_if_they_are_faster_and_a_resume_keeps_the_choice(chosen):
    fused, events = chosen({TORCH: 2.0, OURS: 1.0})
    assert fused == [True, True]
    figures = f"Seconds of one, forward and backward: {TORCH} 2, {OURS} 1"
    assert events == [f"{OURS} on NVIDIA Made Up with torch {torch.__version__}. {figures}"]
    assert chosen({TORCH: 1.0, OURS: 2.0})[0] == [True, True]


@pytest.mark.parametrize("times", [{TORCH: 1.0, OURS: 0.99}, {TORCH: 1.0, OURS: 2.0}, {}])
def test_blocks_use_torch_if_the_kernels_are_not_faster_or_fail(chosen, times: dict[str, float]):
    assert chosen(times)[0] == [False, False]


def test_blocks_use_torch_if_the_kernels_are_wrong_and_an_event_says_why(chosen):
    assert chosen({}, "norms of width 32: 1 of the largest value off torch's norm") == (
        [False, False],
        ["on rank 0 norms of width 32: 1 of the largest value off torch's norm. All ranks use torch's norms"],
    )


@pytest.mark.parametrize("why", ["", "norms of width 32: there is no kernel"])
def test_the_events_of_a_resumed_run_have_its_step(chosen, why: str, tmp_path: Path):
    RunDir(tmp_path).metrics.write({"step": 7})
    chosen({TORCH: 2.0, OURS: 1.0}, why)
    assert [event["step"] for event in RunDir(tmp_path).events.lines.read()] == [7]


@pytest.mark.parametrize("setting", [{"device": "cpu"}, {"precision": "fp32"}, {"zero_stage": 0}])
def test_nothing_is_chosen_where_the_kernels_never_fit(chosen, setting: dict):
    assert chosen({TORCH: 2.0, OURS: 1.0}, **setting) == ([False, False], [])
