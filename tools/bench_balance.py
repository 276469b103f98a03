"""Measures the time of a training step of three buckets of unlike cost, with `train.balance` 0 and 1.

    python tools/bench_balance.py [--rounds 3] [--steps 4] [--out FILE.json]

Trains Latte, joint attention and Wan of width 128 by `sora_train.train.loop.train` on shards of noise, in one process
and one thread. Each bucket has `--steps` full steps an epoch, of which the first does not count. Both settings take
turns. Seconds of CPU are printed too, since those of the clock also count what else the machine does.
"""

import argparse
import base64
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sora_train.data.order import batch
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.lora.config import NO_LORA
from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts
from sora_train.model import ModelConfig
from sora_train.schema import SHARD_SCHEMA, encode_row
from sora_train.train.balance import bucket_configs, shard_configs
from sora_train.train.config import TrainConfig
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir

LATENTS = {"1x128x128": (1, 16, 16), "8x128x128": (8, 16, 16), "16x128x192": (16, 16, 24)}
TOKENS, TEXT_WIDTH = 24, 64
LATTE = ModelConfig(width=128, depth=4, heads=4, text_width=TEXT_WIDTH, sample_size=16)
WAN = ModelConfig(family="wan", width=128, depth=4, heads=4, text_width=TEXT_WIDTH, sample_size=32, feed_forward=512)
MODELS = {"Latte, factorised": LATTE, "Latte, joint": replace(LATTE, attention="joint"), "Wan": WAN}
TRAIN = TrainConfig(batch_size=4, micro_batch_size=2, log_every=1, checkpoint_every=10**9, zero_stage=1, balance=1)


def write_shards(folder: Path, clips: dict[str, int]) -> None:
    """Shards of noise: so many clips of each bucket, with captions of `TOKENS` tokens."""
    random = np.random.default_rng(0)
    for name, count in clips.items():
        f, h, w = LATENTS[name]
        rows = [
            encode_row(
                sample_id=f"{name}-{i}", source=f"{name}-{i}", source_size=1, source_version="1", content_hash="",
                start_s=0.0, end_s=1.0, captions=["noise"], latents=random.standard_normal((1, f, 4, h, w)),
                text=[random.standard_normal((TOKENS, TEXT_WIDTH))],
            )
            for i in range(count)
        ]  # fmt: skip
        (folder / f"bucket={name}").mkdir(parents=True)
        table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
        pq.write_table(table, folder / f"bucket={name}/part.parquet", row_group_size=32, write_page_checksum=True)
    Manifest(
        encoding_hash="noise",
        vae=VaeFacts(name="none", hash="none", channels=4, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4),
        text=TextFacts(name="none", hash="none", width=TEXT_WIDTH, max_tokens=TOKENS),
        latents=LatentFormat(moments=1), frames=16, fps=8.0, height=128, width=128, buckets=clips,
        empty_text=base64.b64encode(np.zeros((1, TEXT_WIDTH), np.float16).tobytes()).decode(), empty_tokens=1,
        counts=Counts(asked=1, written=1, quarantined=0, filtered=0), reasons={},
    ).save(str(folder))  # fmt: skip


class TimedRunDir(RunDir):
    """A run's folder that also notes the CPU time at each step."""

    cpu = 0.0

    def log_metrics(self, record: dict[str, Any]) -> None:
        before, self.cpu = self.cpu, time.process_time()
        super().log_metrics({**record, "cpu_s": self.cpu - before})


def step_times(shards: ShardSet, model: ModelConfig, config: TrainConfig) -> dict[str, list[tuple[float, float]]]:
    """Trains for an epoch. The seconds of each step of each bucket, without its first, by the clock and of CPU."""
    own = shard_configs(config, model, NO_LORA, shards, frame_times=False, world=1)
    order = shards.sample_order({name: it.batch_size for name, it in own.items()}, config.seed)
    config = config.model_copy(update={"steps": order.steps_per_epoch})
    with tempfile.TemporaryDirectory() as folder:
        train(config, model, DiffusionConfig(), shards, device=torch.device("cpu"), run_dir=TimedRunDir(Path(folder)))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LATENTS}
    for k, line in enumerate(lines):
        found[batch(order, k).bucket].append((line["step_s"], line["cpu_s"]))
    return {name: seconds[1:] for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for kind, model in MODELS.items():
        for _ in range(options.rounds):
            for balance in (0.0, 1.0):
                config = TRAIN.model_copy(update={"balance": balance})
                own = bucket_configs(config, model, NO_LORA, LATENTS, TOKENS, frame_times=False, world=1)
                with tempfile.TemporaryDirectory() as folder:
                    write_shards(Path(folder), {name: options.steps * it.batch_size for name, it in own.items()})
                    seconds = step_times(ShardSet(folder), model, config)
                sizes = {name: (it.batch_size, it.micro_batch_size) for name, it in own.items()}
                means = {
                    name: [statistics.fmean(column) for column in zip(*each, strict=True)]
                    for name, each in seconds.items()
                }
                clock, cpu = ([mean[i] for mean in means.values()] for i in (0, 1))
                row = {"model": kind, "balance": balance, "clips, micro-batch": sizes, "seconds": means}
                row |= {"clock": max(clock) / min(clock), "cpu": max(cpu) / min(cpu)}
                results.append({**row, "steps": seconds})
                print(json.dumps(row), flush=True)
                if options.out:
                    Path(options.out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
