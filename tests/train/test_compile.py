"""Training with `train.compile`: few graphs whatever the captions' lengths, and every kind of checkpointing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

from sora_train.model import ModelConfig, build
from sora_train.model.convert import to_diffusers

LENGTHS = 100
PROGRAM = """
import sys
from pathlib import Path
import torch, torch._dynamo
from sora_train.data.shards import ShardSet
from sora_train.diffusion import ConditioningConfig, DiffusionConfig
from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig
from sora_train.train.config import TrainConfig
from sora_train.train.run_dir import RunDir
from sora_train.train.loop import train
shards, out, mode, compiled, given, base = sys.argv[1:]
torch.set_num_threads(1)
config = TrainConfig(steps=100, learning_rate=1e-3, batch_size=1, micro_batch_size=1, log_every=1,
                     checkpoint_every=1000, zero_stage=0, activation_checkpointing=mode,
                     compile=compiled == "yes", caption_dropout=0.0)
model = ModelConfig(width=16, depth=2, heads=2, text_width=8, sample_size=4, init_from=base)
Path(out).mkdir()
train(config, model, DiffusionConfig(), ShardSet(shards), device=torch.device("cpu"), run_dir=RunDir(Path(out)),
      conditioning=ConditioningConfig(probability=float(given)), lora=LoraConfig(rank=4 if base else 0))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.fixture(scope="module")
def captions(write_noise_shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 clips, whose captions have 1 to 100 tokens."""
    return write_noise_shards(tmp_path_factory.mktemp("captions"), list(range(1, LENGTHS + 1)), 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen base of adapters. None of its weights is zero, or they would have no gradient."""
    torch.manual_seed(5)
    model = build(ModelConfig(width=16, depth=2, heads=2, text_width=8, sample_size=4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("base")
    to_diffusers(model, folder)
    return folder


def trained(
    captions: Path, out: Path, mode: str, compiled: str, given: float, base: str = ""
) -> tuple[dict[int, float], int]:
    """Losses by step, and how many graphs were compiled. A process of its own: jaxtyping's checks can't be compiled."""
    # Not the user's cache: a compilation that was killed leaves a cut-off library there, which torch then loads.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(captions.parent / "inductor")}
    command = [sys.executable, "-c", PROGRAM, str(captions), str(out), mode, compiled, str(given), base]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1100, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}, int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def eager(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[int, float]]:
    """Losses without compilation, by the probability that the first frame is given."""
    root = tmp_path_factory.mktemp("eager")
    return {given: trained(captions, root / str(given), "none", "no", given)[0] for given in (0.0, 0.5)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler, and there is none")
@pytest.mark.parametrize(("mode", "given"), [("none", 0.0), ("selective", 0.0), ("full", 0.0), ("selective", 0.5)])
def test_a_hundred_caption_lengths_compile_to_few_graphs(
    captions: Path, eager: dict, tmp_path: Path, mode: str, given: float
):
    losses, graphs = trained(captions, tmp_path / "run", mode, "yes", given)
    assert losses == pytest.approx(eager[given], rel=1e-5)
    assert abs(losses[1] - losses[LENGTHS]) > 1e-3
    assert len(losses) == LENGTHS
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    said = [event["reason"] for event in events if event["event"] == "compiling"]
    assert sorted(said) == sorted(
        f"2x32x32, captions of up to {length} tokens (shape {i + 1} of at most 4)"
        for i, length in enumerate(int(reason.split()[5]) for reason in said)
    )
    assert {int(reason.split()[5]) for reason in said} == {32, 64, 96, 100}
    assert len(said) < graphs <= 2 * len(said) + 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler, and there is none")
def test_adapters_compile_to_as_few_graphs(captions: Path, base: Path, tmp_path: Path):
    plain, _ = trained(captions, tmp_path / "plain", "none", "no", 0.0, str(base))
    losses, graphs = trained(captions, tmp_path / "compiled", "selective", "yes", 0.0, str(base))
    assert losses == pytest.approx(plain, rel=1e-5)
    assert 4 < graphs <= 9


DAMAGED = """
import torch
from sora_train.errors import UserError
from sora_train.train.config import TrainConfig
from sora_train.train.known_errors import known_errors
try:
    with known_errors(TrainConfig(compile=True), torch.device("cpu")):
        torch.compile(lambda x: torch.nn.functional.silu(x) * x)(torch.ones(3))
    print("compiled")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler, and there is none")
def test_an_incomplete_compiled_library_is_an_error_with_the_cache(tmp_path: Path):
    def said() -> str:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", DAMAGED]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert said() == "compiled\n"
    (library,) = (tmp_path / "cache").rglob("*.main.so")
    library.write_bytes(b"")
    assert f"{library}: file too short" in (message := said())
    assert f"Remove the folder {tmp_path / 'cache'} there and run the same command again" in message
    shutil.rmtree(tmp_path / "cache")
    assert said() == "compiled\n"
