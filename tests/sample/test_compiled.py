"""Blocks are compiled for long work on GPUs alone, and compiled ones make the same videos."""

import subprocess
import sys
from dataclasses import replace
from shutil import which

import pytest
import torch

from sora_train.diffusion import Sampling
from sora_train.model.flops import forward_flops
from sora_train.sample import load_run
from sora_train.sample.compiled import WORTH_FLOPS, compile_if_worth
from sora_train.sample.generate import sampling_flops


def test_only_long_work_on_a_gpu_is_compiled(make_run):
    run = load_run(make_run(), device="cpu")
    compile_if_worth(run, 100 * WORTH_FLOPS)
    assert not run.compiled  # on a CPU
    run = replace(run, device=torch.device("cuda"))
    eager = [block.forward for block in run.model.blocks]
    compile_if_worth(run, 0.9 * WORTH_FLOPS)
    assert not run.compiled
    assert [block.forward for block in run.model.blocks] == eager
    compile_if_worth(run, WORTH_FLOPS)
    assert run.compiled
    assert not {id(block.forward) for block in run.model.blocks} & {id(forward) for forward in eager}


def test_the_work_of_a_video_is_that_of_its_passes(make_run):
    run = load_run(make_run(), device="cpu")
    one = forward_flops(run.model.config, 3, 8, 16, run.manifest.text.max_tokens)
    ways = [(Sampling(steps=5, guidance=1), 5), (Sampling(steps=5), 10), (Sampling(steps=5, sampler="heun"), 20)]
    for how, passes in ways:
        assert sampling_flops(run, how, (3, 4, 8, 16)) == passes * one


PROGRAM = """
import sys
import numpy as np, torch, torch._dynamo
from sora_train.diffusion import Sampling
from sora_train.sample import generate, load_run
from sora_train.sample.compiled import compile_for_inference
torch.set_num_threads(1)
prompts, how = ["a red circle"] * 3, Sampling(steps=2, guidance=3.0, guidance_interval=(0, 900))
run = load_run(sys.argv[1], device="cpu")
eager = generate(run, prompts, [0, 1, 2], how).astype(int)
torch._dynamo.config.recompile_limit = 2  # the third shape runs as it is
compile_for_inference(run.model)
assert np.abs(generate(run, prompts, [0, 1, 2], how).astype(int) - eager).max() <= 1
assert np.abs(generate(run, prompts[:1], [0], how).astype(int) - eager[:1]).max() <= 1
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the CPU by a C++ compiler, and there is none")
def test_compiled_blocks_make_the_same_videos(make_run):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(make_run())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 2 <= int(done.stdout.split()[-1]) <= 4
