"""What the parts of the GPU check share: sizes by device, shards of noise, a training run, a limit of memory."""

import base64
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from sora_train import manifest, schema
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.model import ModelConfig
from sora_train.train.config import TrainConfig
from sora_train.train.known_errors import known_errors
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir


@dataclass(frozen=True)
class Size:
    """A model and its clips: on a CPU as small as can be, on a GPU large enough that its kernels are the real ones."""

    model: ModelConfig
    frames: int
    side: int
    """Of latents."""
    tokens: int
    """Of the longest caption."""
    clips: int


def size_of(device: torch.device) -> Size:
    if device.type == "cpu":
        return Size(ModelConfig(width=32, depth=2, heads=2, text_width=16, sample_size=4), 2, 4, 40, 40)
    return Size(ModelConfig(width=1152, depth=8, heads=16, text_width=256, sample_size=32), 8, 32, 120, 120)


def join(device: torch.device) -> None:
    """One rank: NCCL on a GPU, gloo on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def make_shards(folder: Path, size: Size) -> ShardSet:
    """Clips of noise, whose captions have 1, 2, 3, … tokens up to the longest."""
    rng = np.random.default_rng(0)
    frames, side, width = size.frames, size.side, size.model.text_width
    pixels = 8 * side
    rows = [
        schema.encode_row(
            sample_id=f"{i:04x}", source=f"{i}.mp4", source_size=1, source_version="1", content_hash="", start_s=0.0,
            end_s=1.0, captions=[f"clip {i}"], latents=rng.standard_normal((1, frames, 4, side, side)),
            text=[rng.standard_normal((1 + i % size.tokens, width))],
        )
        for i in range(size.clips)
    ]  # fmt: skip
    bucket = schema.bucket_name(frames, pixels, pixels)
    (folder / f"bucket={bucket}").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=schema.SHARD_SCHEMA)
    pq.write_table(table, folder / f"bucket={bucket}" / "part.parquet", row_group_size=8)
    manifest.Manifest(
        encoding_hash="noise",
        vae=manifest.VaeFacts(name="builtin", hash="", channels=4, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4),
        text=manifest.TextFacts(name="builtin", hash="", width=width, max_tokens=size.tokens),
        latents=manifest.LatentFormat(moments=1),
        frames=frames, fps=8.0, height=pixels, width=pixels, buckets={bucket: size.clips},
        empty_text=base64.b64encode(np.zeros((1, width), np.float16).tobytes()).decode(), empty_tokens=1,
        counts=manifest.Counts(asked=size.clips, written=size.clips, quarantined=0, filtered=0), reasons={},
    ).save(str(folder))  # fmt: skip
    return ShardSet(str(folder))


def run(
    device: torch.device, shards: ShardSet, out: Path, resume: Path | None = None, model: ModelConfig | None = None,
    **settings: object,
) -> list[dict]:  # fmt: skip
    """Trains as a worker does, and returns the lines of metrics.jsonl, one a step."""
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, object] = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
        "caption_dropout": 0.0,
        "guard_spike": 0,
        "learning_rate": 3e-3 if device.type == "cpu" else 3e-4,  # so that a few steps move the loss
    }
    config = TrainConfig.model_validate(steps | settings)
    with known_errors(config, device):
        train(config, model or size_of(device).model, DiffusionConfig(), shards, device=device, run_dir=RunDir(out),
              resume=resume)  # fmt: skip
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def only(device: torch.device, more: int) -> Iterator[None]:
    """Lets this process have so many bytes more than it has now: of the GPU's memory, or of address space."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(device) + more) / whole, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of a difference, relative to that of b."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
