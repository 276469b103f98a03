"""Metrics, events, schedule, tracking: what needs no process group."""

import math
import time
from pathlib import Path

import pytest

from sora_train.train.checkpoint import Snapshot
from sora_train.train.config import TrainConfig
from sora_train.train.ema import decay_at
from sora_train.train.loop import accumulation, learning_rate
from sora_train.train.metrics import JsonLines, duration, log_line
from sora_train.train.run_dir import RunDir
from sora_train.train.state import State


def test_the_schedule_is_linear_warm_up_and_a_cosine_to_a_hundredth():
    config = TrainConfig(steps=111, warmup_steps=10, learning_rate=2.0, schedule="cosine")
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert rates[110] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert learning_rate(TrainConfig(learning_rate=3e-4), 0) == 3e-4
    assert learning_rate(TrainConfig(steps=1, schedule="cosine", learning_rate=1.0), 0) == 1.0


@pytest.mark.parametrize(
    ("batch", "micro", "world", "count"), [(16, 8, 2, 1), (16, 4, 1, 4), (16, 4, 3, 2), (5, 4, 2, 1)]
)
def test_every_rank_takes_equally_many_micro_batches(batch: int, micro: int, world: int, count: int):
    assert accumulation(TrainConfig(batch_size=batch, micro_batch_size=micro), world) == count


def test_the_ema_decay_warms_up():
    assert [decay_at(0.99, step) for step in (0, 10, 10**6)] == [0.1, 0.55, 0.99]
    assert decay_at(0.0, 0) == 0


def test_metrics_are_truncated_to_a_step_and_keep_every_digit(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        lines.write({"step": step, "loss": math.pi / step})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # a crash in mid-write
    lines.truncate(2)
    assert lines.read() == [{"step": 1, "loss": math.pi}, {"step": 2, "loss": math.pi / 2}]
    lines.write({"step": 3, "loss": 0.1})
    assert [record["step"] for record in lines.read()] == [1, 2, 3]


def test_cutting_back_drops_a_torn_last_line_alone(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 2')
    lines.truncate(10)
    assert lines.path.read_bytes() == b'{"step": 1}\n'


def test_log_lines_of_a_run_are_aligned():
    record = {
        "step": 7,
        "loss": 0.5,
        "lr": 1e-4,
        "grad_norm": 0.25,
        "step_s": 0.5,
        "samples_per_s": 32.0,
        "data_wait_share": 0.01,
    }
    first, later = log_line(record, 1000), log_line(record | {"step": 990, "grad_norm": 10.5}, 1000)
    assert first.index("loss") == later.index("loss")
    assert first.index("s/step") == later.index("s/step")
    assert first.endswith("8 min 16 s left")
    assert [duration(s) for s in (0.0, 59.6, 3661.0)] == ["0 s", "1 min 00 s", "1 h 01 min"]


def test_a_line_after_a_torn_one_is_whole(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 2, "lo')  # the writer was killed
    lines.write({"step": 3})
    assert [record["step"] for record in lines.read()] == [1, 3]


def test_the_stall_of_a_checkpoint_includes_the_report_to_ray(tmp_path: Path):
    run_dir = RunDir(tmp_path, report=lambda step, metrics, folder, wait: time.sleep(0.3))
    run_dir.save_async(lambda: Snapshot(State(), 0, 1, 1, {}, {}, {}, "token"))
    run_dir.wait()
    run_dir.log_metrics({"step": 0})
    (record,) = run_dir.metrics.read()
    assert record["checkpoint_stall_s"] >= 0.3
    assert record["checkpoint_s"] > 0
