"""The Triton kernels of attention within short groups, against torch's attention in float64.

They run on a GPU or, without one, in Triton's interpreter. The interpreter is chosen when Triton is imported, so the
first test here runs the others in a process of their own.
"""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_train.bench.attention import run_tile
from sora_train.kernels import short_attention as kernels
from sora_train.kernels.short_attention import fits_short_attention, short_attention, why_no_short_attention
from sora_train.model import Latte, ModelConfig
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.metrics import Events
from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, Calls, run_interpreted, same

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
runs = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="no GPU: the first test here runs it interpreted")
SMALL = ModelConfig(width=32, depth=2, heads=4, text_width=12, sample_size=8)
MODELS = [SMALL, replace(SMALL, positions="rotary", cross_attention_in="every")]


@pytest.mark.skipif(INTERPRETED, reason="it starts the process that runs the others")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_of_these_hold_in_tritons_interpreter(which: str):
    run_interpreted(__file__, which)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("s", "k"), [(16, 72), (64, 128)])
def test_both_kernels_compile_for_hopper_with_wide_accesses(s: int, k: int, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sora_train.kernels.short_attention_triton import short_attention_backward, short_attention_forward

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (short_attention_forward, short_attention_backward):
        names = kernel.arg_names
        constants = {"S": s, "M": 16, "K": k, "SCALE": 0.1, "BLOCK_S": s, "BLOCK_K": 128}
        kinds = {name: "*bf16" if name.endswith("_ptr") else "constexpr" for name in names} | {"tokens": "i32"}
        source = ASTSource(
            kernel, kinds, {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
        )  # fmt: skip
        made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": s // 16, "enable_fp_fusion": True})
        code = made.asm["ptx"]
        assert "mma" in code
        assert "atom" not in code
        assert code.count("ld.global") == code.count("ld.global.v4.b32") > 0
        assert len(made.asm["cubin"]) > 0


def exact(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = rearrange(qkv.double(), "g s (three m k) -> three g m s k", three=3, m=heads)
    return rearrange(torch.nn.functional.scaled_dot_product_attention(q, k, v), "g m s k -> g s (m k)")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("g", "s", "m", "k"),
    [(5, 16, 3, 72), (7, 3, 2, 32), (3, 5, 1, 33), (2, 64, 1, 128), (3, 33, 2, 64), (1, 1, 2, 24), (2, 17, 1, 127)],
)
def test_outputs_and_gradients_are_those_of_attention_in_float64(g: int, s: int, m: int, k: int, dtype: torch.dtype):
    if dtype == torch.float32 and not INTERPRETED:
        pytest.skip("on a GPU, torch's attention does it: fits_short_attention")
    qkv = noise(g, s, 3 * m * k, dtype=dtype).requires_grad_()
    grad = noise(g, s, m * k, dtype=dtype, seed=1)
    wide = qkv.detach().double().requires_grad_()
    (y := short_attention(qkv, m)).backward(grad)
    (expected := exact(wide, m)).backward(grad.double())
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert y.dtype == qkv.grad.dtype == dtype
    for found, right in ((y, expected), (qkv.grad, wide.grad)):
        assert (found - right).abs().max() < bound * right.abs().max()
    assert torch.equal(short_attention(qkv, m), y)
    assert torch.equal(torch.autograd.grad(short_attention(qkv, m), qkv, grad)[0], qkv.grad)


@pytest.mark.skipif(not INTERPRETED, reason="in float64, which GPUs have no tensor cores for")
def test_gradients_are_those_of_finite_differences():
    qkv = noise(2, 3, 3 * 2 * 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: short_attention(x, 2), qkv)


@runs
@pytest.mark.gpu
def test_inputs_may_be_strided_and_have_any_leading_axes():
    qkv = noise(5, 2, 3, 3 * 2 * 32, dtype=torch.float32).transpose(0, 2)
    y = short_attention(qkv, 2)
    assert y.shape == (3, 2, 5, 64)
    assert torch.equal(y.flatten(0, 1), short_attention(qkv.reshape(6, 5, 192), 2))
    assert short_attention(qkv[:0], 2).shape == (0, 2, 5, 64)


@runs
@pytest.mark.gpu
def test_a_tile_of_several_groups_has_the_same_result():
    qkv = noise(9, 5, 3 * 2 * 32, dtype=torch.bfloat16)
    expected = short_attention(qkv, 2).float()
    for tile in ((16, 2), (32, 1), (64, 4)):
        assert (run_tile(qkv, 2, tile)[0].float() - expected).abs().max() < 1e-2 * expected.abs().max()


@runs
@pytest.mark.gpu
def test_the_operator_keeps_torchs_rules_for_operators():
    qkv = noise(2, 5, 3 * 2 * 16, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.sora_train.short_attention, (qkv, 2), test_utils=("test_schema", "test_faketensor"))


def test_the_kernels_are_for_bf16_short_groups_and_narrow_heads_on_a_gpu(monkeypatch):
    monkeypatch.setattr("sora_train.kernels.short_attention.why_no_short_attention", lambda *_: "")

    def fits(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, s: int = 64, k: int = 128) -> bool:
        with FakeTensorMode():  # has shapes and devices that this machine need not have
            return fits_short_attention(torch.empty(2, s, 3 * 2 * k, dtype=dtype, device=device), 2)

    assert fits()
    assert not any([fits("cpu"), fits(dtype=torch.float32), fits(s=65), fits(k=129)])


@pytest.fixture
def launches(monkeypatch):
    """Replaces what launches a kernel; nothing is known of the kernels before and after."""

    def replace_launch(launch) -> None:
        monkeypatch.setattr(kernels, "launch", launch)

    monkeypatch.setattr(kernels, "refused", [])
    why_no_short_attention.cache_clear()
    yield replace_launch
    why_no_short_attention.cache_clear()


def no_launch(kernel, tensors, heads) -> None:
    raise OSError("PTX of another version")


def half_launch(kernel, tensors, heads) -> None:
    """Leaves out the gradients; the output is that of attention."""
    qkv, *_, made = tensors
    made.copy_(kernels.torch_attention(qkv, heads) if len(tensors) == 2 else torch.zeros_like(made))


def empty_launch(kernel, tensors, heads) -> None:
    tensors[-1].fill_(float("nan"))


WRONG = [
    (no_launch, "OSError: PTX of another version"),
    (half_launch, "3 heads of 72: 1 of"),
    (empty_launch, ": nan of"),
]


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("s", [1, 16, 33, 64])
def test_right_kernels_pass_the_check(s: int, launches):
    assert why_no_short_attention(torch.device(DEVICE), s, 3, 72) == ""


@runs
@pytest.mark.gpu
@pytest.mark.parametrize(("launch", "why"), WRONG)
def test_wrong_kernels_fail_the_check(launch, why: str, launches):
    launches(launch)
    assert why in why_no_short_attention(torch.device(DEVICE), 16, 3, 72)


@pytest.fixture
def outcomes(request, monkeypatch):
    """A model and its outcome on a clip: output, gradients. Under `short`, with the kernels."""
    torch.manual_seed(0)
    model = Latte(request.param).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, mask = noise(2, 5, 12, dtype=torch.float32), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    inputs = noise(2, 3, 4, 8, 8, dtype=torch.float32), torch.tensor([3.0, 900.0], device=DEVICE), text, mask

    def outcome(model: Latte, short=True) -> list[Tensor]:
        fits = short if callable(short) else lambda qkv, heads: short
        monkeypatch.setattr("sora_train.model.layers.fits_short_attention", fits)
        model.zero_grad()
        y = model(*inputs)
        y.square().mean().backward()
        return [y.detach().clone(), *(p.grad.clone() for p in model.parameters())]

    return model, outcome


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("outcomes", MODELS, indirect=True)
def test_a_model_is_the_same_with_the_kernels(outcomes):
    model, outcome = outcomes
    with Calls("short_attention") as calls:
        found = outcome(model)
    assert calls.count == 2
    assert same(found, outcome(model, short=False), 1e-4)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("outcomes", MODELS[:1], indirect=True)
def test_selective_checkpointing_saves_the_kernels_output(outcomes):
    model, outcome = outcomes
    expected = outcome(model)
    for mode, runs_of_two in (("selective", 2), ("full", 4)):
        checkpointed = deepcopy(model)
        apply_activation_checkpointing(checkpointed, mode)
        with Calls("short_attention") as calls:
            found = outcome(checkpointed)
        assert calls.count == runs_of_two, mode
        # on a GPU, sums of torch's own kernels may have another order the second time
        assert same(found, expected, 0.0 if INTERPRETED else 1e-5), mode


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("outcomes", MODELS[:1], indirect=True)
@pytest.mark.parametrize("launch", [None, no_launch, half_launch])
def test_the_first_block_checks_the_kernels_once_and_the_model_never_fails(
    outcomes, launch, launches, monkeypatch, capsys
):
    model, outcome = outcomes
    expected = outcome(model, short=False)
    if launch:
        launches(launch)
    apply_activation_checkpointing(model, "selective")  # a dispatch mode, which is not to see the check
    with Calls("short_attention") as calls:
        found = outcome(model, short=lambda qkv, heads: kernels.is_right(qkv.device, qkv.shape[-2], heads, 8))
    assert calls.count == (0 if launch else 2)
    assert same(found, expected, 1e-4)
    assert capsys.readouterr().err.count("runs without sora_train's kernels: groups of 16 tokens") == bool(launch)


RANK = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from sora_train.kernels import short_attention as kernels
from sora_train.model.attention_shapes import AttentionShape
from sora_train.train.attention import try_kernels_on_all_ranks
from sora_train.train.run_dir import RunDir
rank, wrong, store, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
def fail(*_):
    raise OSError("PTX of another version")
kernels.launch = fail if rank == wrong else kernels.launch
groups = [AttentionShape("temporal", 2, s, s, 2, 16) for s in (16, 1, 3)]
try_kernels_on_all_ranks(groups, RunDir(Path(out)), torch.device("cpu"))
print(*kernels.refused, flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.skipif(not INTERPRETED, reason="two ranks, of which one has a wrong kernel, in the interpreter")
@pytest.mark.parametrize(
    ("wrong", "said"), [(-1, ""), (1, "on rank 1 groups of 1 tokens: OSError: PTX of another version")]
)
def test_all_ranks_use_the_kernels_or_none_does(wrong: int, said: str, tmp_path):
    words = [str(wrong), str(tmp_path / "store"), str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *words], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [said, said]
    events = [event["reason"] for event in Events(tmp_path).lines.read() if event["event"] == "no_kernels"]
    assert events == ([f"{said}. All ranks use torch's attention, which is slower"] if said else [])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="the checks of shapes can't be compiled")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("outcomes", MODELS[1:], indirect=True)
def test_compiled_blocks_have_the_kernels_in_one_graph(outcomes, mode):
    model, outcome = outcomes
    expected = outcome(model)
    apply_activation_checkpointing(model, mode)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert same(outcome(model), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="make check-gpu resumes on a GPU")
@pytest.mark.parametrize("stage", [0, 3])
def test_training_with_the_kernels_resumes_bit_for_bit(stage: int, monkeypatch, tmp_path):
    from tests.gpu.setting import join, make_shards, run, size_of

    monkeypatch.setattr("sora_train.model.layers.fits_short_attention", lambda qkv, heads: True)
    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        join(device)
    shards = make_shards(tmp_path / "shards", size_of(device))
    settings = {"zero_stage": stage, "precision": "bf16", "activation_checkpointing": "selective", "steps": 4}
    with Calls("short_attention") as calls:
        whole = run(device, shards, tmp_path / "whole", checkpoint_every=2, **settings)
    assert calls.count == 2 * 2 * 4  # blocks, micro-batches, steps
    rest = run(device, shards, tmp_path / "rest", tmp_path / "whole/checkpoints/step_00000002", **settings)
    assert [line["loss"] for line in rest] == [line["loss"] for line in whole[2:]]
