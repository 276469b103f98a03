"""The choice of torch's backends of attention: by made and by real times, the same on all ranks."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.model import ModelConfig
from sora_train.model.attention_shapes import AttentionShape
from sora_train.train import attention
from sora_train.train.attention import FLASH3, OWN, choose_attention, fastest, may_try_kernels, measure, use
from sora_train.train.config import TrainConfig
from sora_train.train.metrics import Events
from sora_train.train.run_dir import RunDir

SPATIAL, TEXT = AttentionShape("spatial", 2, 8, 8, 2, 16), AttentionShape("text", 2, 16, 5, 2, 16, masked=True)
CPU, CHOICES = torch.device("cpu"), [OWN, "no cuDNN", "no flash"]


@pytest.fixture(autouse=True)
def torchs_own():
    yield
    use(OWN)


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ({OWN: 1.0, "no cuDNN": 0.9, "no flash": 1.1}, "no cuDNN"),
        ({OWN: 1.0, "no cuDNN": 0.98}, OWN),  # within what a measurement is off
        ({OWN: 1.0, "no cuDNN": 0.9, FLASH3: 0.6}, FLASH3),
        ({OWN: 1.0}, OWN),
    ],
)
def test_the_fastest_is_chosen_if_it_is_clearly_faster(times: dict[str, float], choice: str):
    assert fastest(times) == choice


def test_a_start_that_ended_while_it_tried_kernels_is_repeated_without(tmp_path: Path, monkeypatch):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(attention, "refused", refused := [])
    run_dir, gpu = RunDir(tmp_path), torch.device("cuda")
    assert not may_try_kernels(run_dir, CPU)
    assert (may_try_kernels(run_dir, gpu), refused) == (True, [])
    assert (may_try_kernels(run_dir, gpu), refused) == (False, ["a start ended while it tried kernels"])
    assert [event["event"] for event in run_dir.events.lines.read()] == ["no_kernels"]


def test_every_choice_is_measured():
    times = measure({SPATIAL: 3.0, TEXT: 1.0}, CHOICES, CPU)
    assert list(times) == CHOICES
    assert all(taken > 0 for taken in times.values())


@pytest.mark.parametrize(
    ("factor", "why"), [(1.1, "another result"), (float("nan"), "another result"), (None, "there is no kernel")]
)
def test_a_choice_that_fails_or_is_wrong_is_left_out(factor: float | None, why: str, monkeypatch, capsys):
    right = AttentionShape.run

    def run(one, inputs, mask):
        if torch.backends.cuda.flash_sdp_enabled():
            return right(one, inputs, mask)
        if factor is None:
            raise RuntimeError("there is no kernel")
        return factor * right(one, inputs, mask)

    monkeypatch.setattr(AttentionShape, "run", run)
    assert list(measure({SPATIAL: 3.0}, CHOICES, CPU)) == [OWN, "no cuDNN"]
    assert why in capsys.readouterr().err


def test_measuring_leaves_the_random_numbers_of_training_alone():
    before = torch.get_rng_state()
    measure({SPATIAL: 1.0, TEXT: 1.0}, CHOICES, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_choice_switches_backends_off_and_on_again():
    def on() -> tuple[bool, bool]:
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    assert on() == (True, True)
    use("no cuDNN")
    assert on() == (False, True)
    use("no cuDNN, no flash")
    assert on() == (False, False)
    use(OWN)
    assert on() == (True, True)


def test_nothing_is_measured_on_a_cpu(tiny_shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(attention, "use", lambda choice: pytest.fail("a choice was made"))
    shards, config = ShardSet(str(tiny_shards)), TrainConfig(precision="bf16")
    choose_attention(dict.fromkeys(shards.rows, config), ModelConfig(), shards, RunDir(tmp_path), CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [None, "a package"])
def test_flash_attention_3_that_is_absent_or_broken_is_no_choice(found: str | None, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: found)  # it is not there, or can't be imported
    assert attention.why_no_flash3()
    assert torch.backends.cuda.cudnn_sdp_enabled()


RANK = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from sora_train.model.attention_shapes import AttentionShape
from sora_train.train import attention
from sora_train.train.run_dir import RunDir
rank, store, out, own, other = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
torch.cuda.get_device_name = lambda device: "NVIDIA Made Up"
def measure(weights, choices, device):
    assert rank == 0 and attention.FLASH3 not in choices  # rank 1 lacks it
    return {attention.OWN: float(own), "no flash": float(other)}
attention.measure = measure
attention.why_no_flash3 = lambda: "it is not installed" if rank else ""
weights = {AttentionShape("joint", 1, 8, 8, 2, 16): 1.0}
print(attention.choose_on_rank_0(weights, RunDir(Path(out)), torch.device("cpu")), flush=True)
dist.barrier()
os._exit(0)
"""


def chosen(folder: Path, own: float, other: float) -> list[str]:
    """The choices of two ranks, with these times on rank 0."""
    words = [str(folder / f"store {own}"), str(folder), str(own), str(other)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *words], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [rank.communicate(timeout=120)[0].strip() for rank in ranks]


def test_all_ranks_take_the_choice_of_rank_0_and_a_resume_keeps_it(tmp_path: Path):
    assert chosen(tmp_path, 2.0, 1.0) == ["no flash"] * 2
    assert chosen(tmp_path, 1.0, 2.0) == ["no flash"] * 2  # though torch's own order is now faster
    (event,) = Events(tmp_path).lines.read()
    where = f"NVIDIA Made Up with torch {torch.__version__}"
    figures = f"Seconds for an epoch of the clips: {OWN} 2, no flash 1"
    assert event["reason"] == f"no flash on {where}. {figures}"


COMPILED = """
import torch
from torch._dynamo.utils import counters
from sora_train.train.attention import use
x = torch.randn(2, 3, 16, 32, requires_grad=True)
for choice in ("torch's order", "no flash", "no flash"):
    torch._dynamo.reset()
    counters.clear()
    use(choice)
    if choice != "torch's order":
        torch.compiler.config.cache_key_tag = choice
    run = torch.compile(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), fullgraph=True)
    with torch.profiler.profile() as trace:
        run(x).sum().backward()
    print(any("flash" in event.key for event in trace.key_averages()), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler")
def test_compiled_code_follows_the_choice_with_a_cache_key_of_its_own(tmp_path: Path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["True 0", "False 0", "False 1"], done.stderr[-2000:]
