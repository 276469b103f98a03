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
import torch.distributed as dist
from safetensors.torch import load_file

from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.errors import UserError
from sora_train.model import ModelConfig, build
from sora_train.model.convert import to_diffusers
from sora_train.train.compile import Compilation, graph_count, is_wanted, why_not_compiled
from sora_train.train.config import TrainConfig
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir

needs_compiler = pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler")
SHORTEST, LONGEST, STEPS = 5, 120, 100
GRAPHS = 5  # a spatial block for each of 32, 64, 96 and 120 tokens; a temporal one sees no caption
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
shards, out, steps, mode, compiled, given, base, resume = sys.argv[1:]
torch.set_num_threads(1)
config = TrainConfig(steps=int(steps), learning_rate=1e-3, batch_size=1, micro_batch_size=1, log_every=1,
                     checkpoint_every=3, zero_stage=0, activation_checkpointing=mode,
                     compile=compiled, caption_dropout=0.0)
model = ModelConfig(width=16, depth=4, heads=2, text_width=8, sample_size=4, init_from=base)
Path(out).mkdir()
train(config, model, DiffusionConfig(), ShardSet(shards), device=torch.device("cpu"), run_dir=RunDir(Path(out)),
      resume=Path(resume) if resume else None,
      conditioning=ConditioningConfig(probability=float(given)), lora=LoraConfig(rank=4 if base else 0))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.fixture(scope="module")
def captions(write_noise_shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 116 clips, whose captions have 5 to 120 tokens."""
    return write_noise_shards(tmp_path_factory.mktemp("captions"), list(range(SHORTEST, LONGEST + 1)), 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen base of adapters. None of its weights is zero, or they would have no gradient."""
    torch.manual_seed(5)
    model = build(ModelConfig(width=16, depth=4, heads=2, text_width=8, sample_size=4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("base")
    to_diffusers(model, folder)
    return folder


def trained(
    captions: Path,
    out: Path,
    mode: str,
    compiled: str,
    given: float = 0.0,
    base: str = "",
    *,
    steps: int = STEPS,
    resume: str = "",
) -> tuple[dict[int, float], int]:
    """Losses by step, and how many graphs were compiled. A process of its own: jaxtyping's checks can't be compiled."""
    # Not the user's cache: a compilation that was killed leaves a cut-off library there, which torch then loads.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(captions.parent / "inductor")}
    words = (str(captions), str(out), str(steps), mode, compiled, str(given), base, resume)
    command = [sys.executable, "-c", PROGRAM, *words]
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
@needs_compiler
@pytest.mark.parametrize(("mode", "given"), [("none", 0.0), ("selective", 0.0), ("full", 0.0), ("selective", 0.5)])
def test_a_hundred_caption_lengths_compile_to_the_stated_number_of_graphs(
    captions: Path, eager: dict, tmp_path: Path, mode: str, given: float
):
    losses, graphs = trained(captions, tmp_path / "run", mode, "yes", given)
    assert losses == pytest.approx(eager[given], rel=1e-5)
    assert abs(losses[1] - losses[STEPS]) > 1e-3
    assert len(losses) == STEPS
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    said = [event["reason"] for event in events if event["event"] == "compiling"]
    lengths = (32, 64, 96, 120)
    assert sorted(said) == sorted(
        f"2x32x32, captions of up to {length} tokens; at most {GRAPHS} graphs in all" for length in lengths
    )
    assert graphs == GRAPHS
    assert not [event for event in events if event["event"] == "not_compiled"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_compiler
def test_adapters_compile_to_as_few_graphs(captions: Path, base: Path, tmp_path: Path):
    plain, _ = trained(captions, tmp_path / "plain", "none", "no", 0.0, str(base))
    losses, graphs = trained(captions, tmp_path / "compiled", "selective", "yes", 0.0, str(base))
    assert losses == pytest.approx(plain, rel=1e-5)
    assert graphs == GRAPHS


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_compiler
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit_if_compiled(captions: Path, tmp_path: Path):
    trained(captions, tmp_path / "whole", "selective", "yes", 0.5, steps=6)
    saved = tmp_path / "whole/checkpoints"
    trained(captions, tmp_path / "rest", "selective", "yes", 0.5, steps=6, resume=str(saved / "step_00000003"))
    name = "step_00000006/part_00000_of_00001.safetensors"
    whole, rest = load_file(saved / name), load_file(tmp_path / "rest/checkpoints" / name)
    assert whole.keys() == rest.keys()
    assert all(torch.equal(whole[key], rest[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "buckets", "graphs"),
    [
        ({}, ["16x256x256"], 4 + 1),
        ({}, ["16x256x256", "16x256x512", "16x512x256"], 2 * (4 + 1)),  # the last two have as many tokens
        ({}, ["16x256x256", "1x256x256"], 4 + 1 + 4 + 1),
        ({"cross_attention_in": "every"}, ["16x256x256", "1x256x256"], 4 + 4 + 4 + 1),
        ({"attention": "joint"}, ["16x256x256", "1x256x256"], 4 + 4),
        ({"family": "wan"}, ["17x256x256", "1x256x256"], 4 + 4),
    ],
)
def test_the_number_of_graphs_is_stated(changes: dict, buckets: list[str], graphs: int):
    assert graph_count(ModelConfig(**changes), buckets, 120) == graphs


@pytest.mark.parametrize(
    ("given", "read"), [(True, "yes"), (False, "no"), ("true", "yes"), ("off", "no"), ("auto", "auto")]
)
def test_the_truth_values_of_older_recipes_are_read(given: object, read: str):
    assert TrainConfig.model_validate({"compile": given}).compile == read


def test_auto_compiles_on_gpus_only():
    wanted = {(choice, kind): is_wanted(choice, torch.device(kind))
              for choice in ("auto", "yes", "no") for kind in ("cpu", "cuda")}  # fmt: skip
    assert {key for key, value in wanted.items() if value} == {("auto", "cuda"), ("yes", "cpu"), ("yes", "cuda")}


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not_compiled(torch.device("cpu")) == "there is no C compiler (no-such-compiler)"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert why_not_compiled(torch.device("cuda")) == "there is no C compiler (no-such-compiler)"


def test_yes_without_a_compiler_is_one_message(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = TrainConfig(steps=1, compile="yes")
    model = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)
    shards, run_dir = ShardSet(str(tiny_shards)), RunDir(tmp_path)
    with pytest.raises(UserError, match="on rank 0 there is no C compiler .*, or set train.compile to no"):
        train(config, model, DiffusionConfig(), shards, device=torch.device("cpu"), run_dir=run_dir)


def test_auto_without_a_compiler_is_an_event_at_the_last_logged_step(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CC", "no-such-compiler")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run_dir = RunDir(tmp_path)
    run_dir.log_metrics({"step": 7})
    config, shards = TrainConfig(compile="auto"), ShardSet(str(tiny_shards))
    assert not Compilation(config, ModelConfig(), shards, run_dir, torch.device("cuda")).on
    (event,) = run_dir.events.lines.read()
    assert (event["event"], event["step"]) == ("not_compiled", 7)


FALLS_BACK = """
import os, sys
import torch
from sora_train.model import ModelConfig, build
from sora_train.train.compile import compile_blocks
torch.manual_seed(0)
model = build(ModelConfig(width=16, depth=2, heads=2, text_width=8, sample_size=4))
for p in model.parameters():
    p.data.add_(0.05 * torch.randn_like(p))
x, t, text = torch.randn(1, 2, 4, 4, 4), torch.full((1,), 500.0), torch.randn(1, 9, 8)
lengths = 3, 5, 7, 9, 4, 6, 8
def outputs():
    return [model(x, t, text[:, :n], torch.ones(1, n, dtype=torch.bool)) for n in lengths]
plain = outputs()
said = []
compile_blocks(model, 1, said.append)
for _ in range(2):
    for found, expected in zip(outputs(), plain):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
print(len(said), *said)
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "says"), [("c++", "1 the blocks need more than 5 graphs"), ("false", "1 InductorError: ")]
)
def test_what_can_not_be_compiled_runs_without(tmp_path: Path, compiler: str, says: str):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": which(compiler)}
    done = subprocess.run([sys.executable, "-c", FALLS_BACK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(says)


DAMAGED = """
import torch
from sora_train.errors import UserError
from sora_train.train.config import TrainConfig
from sora_train.train.known_errors import known_errors
try:
    with known_errors(TrainConfig(), torch.device("cpu")):
        torch.compile(lambda x: torch.nn.functional.silu(x) * x)(torch.ones(3))
    print("compiled")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@needs_compiler
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
