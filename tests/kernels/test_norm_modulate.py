"""The Triton kernels of gated residual, norm and modulation, against torch in float64.

They run on a GPU or, without one, in Triton's interpreter, in a process that the first test starts.
"""

import re
import subprocess
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import layer_norm

from sora_train.kernels import norm_modulate as kernels
from sora_train.kernels.norm_modulate import fits_norm_modulate, norm_modulate
from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig, build
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.adapted import adapt
from sora_train.train.norms import OURS, TORCH, fuse_norms, measure, passes, why_no_norms
from sora_train.train.skipped_blocks import add_zero_gradients
from tests.kernels.interpreter import DEVICE, INTERPRETED, ON_GPU, Calls, run_interpreted, same

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
runs = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="no GPU: the first test here runs it interpreted")
KINDS = ["norm", "added", "gated"]
SMALL = ModelConfig(width=32, depth=2, heads=4, text_width=12, sample_size=8)
MODELS = [
    SMALL, replace(SMALL, attention="joint", positions="rotary"),
    ModelConfig(family="wan", width=48, heads=2, depth=2, in_channels=4, text_width=12),
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="it starts the process that runs the others")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_of_these_hold_in_tritons_interpreter(which: str):
    run_interpreted(__file__, which)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("d", "block"), [(384, 512), (1152, 2048), (3072, 4096)])
def test_both_kernels_compile_for_hopper_and_spill_nothing(d: int, block: int, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sora_train.kernels.norm_modulate_triton import norm_modulate_backward, norm_modulate_forward

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    strides = {"xb", "xg", "xs", "hb", "hg", "hs", "mb", "ms", "mk"}
    for kernel in (norm_modulate_forward, norm_modulate_backward):
        names, constants = kernel.arg_names, {"D": d, "BLOCK": block, "GATED": True}
        kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names}
        kinds |= dict.fromkeys(constants, "constexpr") | {
            name: kind
            for name, kind in (("stats_ptr", "*fp32"), ("sums_ptr", "*fp32"), ("eps", "fp32"))
            if name in names
        }
        values = {(names.index(name),): value for name, value in constants.items()}
        wide = (i for i, name in enumerate(names) if name.endswith("_ptr") or name in strides)
        source = ASTSource(kernel, kinds, values, {(i,): [["tt.divisibility", 16]] for i in wide})
        options = {"num_warps": block // 256, "enable_fp_fusion": True}
        made = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        assert "atom" not in made.asm["ptx"]
        assert "cp.async" in made.asm["ptx"]  # the next rows are loaded while one is calculated
        (tmp_path / "cubin").write_bytes(made.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used).groups()
        assert (stack, local) == ("0", "0")
        assert int(registers) <= 128  # 16 warps of a multiprocessor fit


def plain(x: Tensor, modulation: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *gate, shift, scale = modulation.unbind(3)
    if y is not None:
        x = x + (gate[0] * y if gate else y)
    return x, layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def arguments(kind: str, b: int, g: int, s: int, d: int, per: str, dtype: torch.dtype) -> list[Tensor]:
    """x, modulation and y. The modulation is part of a larger tensor, as in a block."""
    rows = {"clip": (1, 1), "group": (g, 1), "place": (1, s)}[per]
    modulation = noise(b, *rows, 6, d, dtype=dtype, seed=1)[..., 2 if kind == "gated" else 3 : 5, :]
    x, y = (noise(b, g, s, d, dtype=dtype, seed=seed) for seed in (2, 3))
    return [x, modulation] if kind == "norm" else [x, modulation, y]


def results(calculate, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients."""
    grads = [noise(*inputs[0].shape, dtype=inputs[0].dtype, seed=seed).to(dtype) for seed in (4, 5)]
    return passes(calculate, [x.to(dtype) for x in inputs], grads)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("b", "g", "s", "d", "per"),
    [
        (1, 3, 7, 384, "clip"),
        (2, 5, 3, 24, "group"),
        (3, 2, 9, 72, "place"),
        (2, 1, 37, 40, "clip"),
        (1, 1, 1, 1152, "clip"),
    ],
)
def test_outputs_and_gradients_are_those_of_float64(b, g, s, d, per, kind: str, dtype: torch.dtype):
    inputs = arguments(kind, b, g, s, d, per, dtype)
    found, exact = results(norm_modulate, inputs, dtype), results(plain, inputs, torch.float64)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, right in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert (a - right).abs().max() < bound * right.abs().max()
    assert all(torch.equal(a, again) for a, again in zip(found, results(norm_modulate, inputs, dtype), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="in float64, which is for this test alone")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str):
    inputs = [
        x if x is None else x.detach().requires_grad_() for x in arguments(kind, 2, 1, 3, 5, "clip", torch.float64)
    ]
    assert torch.autograd.gradcheck(norm_modulate, inputs, fast_mode=True)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("per", ["clip", "group", "place"])
def test_tokens_and_modulation_may_have_any_strides(per: str):
    inputs = arguments("gated", 2, 5, 3, 32, per, torch.float32)
    x, modulation, y = inputs
    strided = [turned(x), modulation.movedim(3, 0).contiguous().movedim(0, 3), turned(y)]
    found, expected = (results(norm_modulate, each, torch.float32) for each in (strided, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert norm_modulate(*strided)[0].stride() == strided[0].stride()
    assert norm_modulate(*(each[:0] for each in inputs))[1].shape == (0, 5, 3, 32)


def turned(x: Tensor) -> Tensor:
    """The same with another order in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@runs
@pytest.mark.gpu
def test_the_operators_keep_torchs_rules_for_operators():
    x, modulation, y = arguments("gated", 2, 3, 2, 16, "clip", torch.float32)
    operators, tests = torch.ops.sora_train, ("test_schema", "test_faketensor")
    for inputs in ((x, y, modulation), (x, None, modulation[..., 1:, :])):
        _, h, stats = operators.norm_modulate(*inputs, 1e-6)
        torch.library.opcheck(operators.norm_modulate, (*inputs, 1e-6), test_utils=tests)
        torch.library.opcheck(operators.norm_modulate_backward, (x, h, *inputs, stats), test_utils=tests)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS[::2])
def test_right_kernels_pass_the_check(model: ModelConfig):
    assert why_no_norms(torch.device(DEVICE), model, 9) == ""


def no_launch(kernel, *_) -> None:
    raise OSError("PTX of another version")


def half_launch(kernel, taken, modulation, made, *_) -> None:
    """Leaves the gradients of the modulation out."""
    right_launch(kernel, taken, modulation, made, *_)
    if len(made) == 4:
        made[-1].zero_()


right_launch = kernels.launch


@runs
@pytest.mark.gpu
@pytest.mark.parametrize(("launch", "why"), [(no_launch, "OSError: PTX of another version"), (half_launch, "32: 1 of")])
def test_wrong_kernels_fail_the_check(launch, why: str, monkeypatch):
    monkeypatch.setattr(kernels, "launch", launch)
    assert why in why_no_norms(torch.device(DEVICE), SMALL, 9)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS[::2])
def test_both_ways_are_measured(model: ModelConfig):
    times = measure(torch.device(DEVICE), model, 2, 3, compiled=False)
    assert list(times) == [TORCH, OURS]
    assert all(taken > 0 for taken in times.values())


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_saved_than_the_memory_plan_counts(kind: str):
    inputs = [x.detach().requires_grad_() for x in arguments(kind, 2, 3, 5, 64, "clip", torch.bfloat16)]

    def saved(calculate) -> int:
        storages = dict[int, int]()

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            kept = calculate(*inputs)
        assert kept
        return sum(storages.values())

    assert saved(norm_modulate) <= saved(plain)


def test_the_kernels_are_for_bf16_on_a_gpu_and_one_modulation_axis():
    def fits(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, rows=(1, 1), d: int = 4096) -> bool:
        with FakeTensorMode():  # has shapes and devices that this machine need not have
            x, modulation = torch.empty(2, 3, 4, d, dtype=dtype, device=device), torch.empty(2, *rows, 2, d)
            return fits_norm_modulate(x, modulation)

    assert all([fits(), fits(rows=(3, 1)), fits(rows=(1, 4))])
    assert not any([fits("cpu"), fits(dtype=torch.float32), fits(rows=(3, 4)), fits(d=4097)])


@pytest.fixture
def outcomes(request, monkeypatch):
    """A model and its outcome: output, gradients. Under `fits`, with the kernels."""
    torch.manual_seed(0)
    config = request.param
    model = build(config).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, mask = noise(2, 5, 12, dtype=torch.float32), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)

    def outcome(model, fits: bool = True, t=(3.0, 900.0), frames: int = 3) -> list[Tensor]:
        for module in ("layers", "wan"):
            monkeypatch.setattr(f"sora_train.model.{module}.fits_norm_modulate", lambda x, modulation: True)
        for block in model.blocks:
            block.fused = fits
        model.zero_grad()
        x = noise(2, frames, 4, 8, 8, dtype=torch.float32)
        y = model(x, torch.tensor(t, device=DEVICE), text, mask)
        y.square().mean().backward()
        return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    return model, outcome


@runs
@pytest.mark.gpu
@pytest.mark.parametrize(
    "outcomes", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow), MODELS[2]], indirect=True
)
@pytest.mark.parametrize("t", [(3.0, 900.0), ((0.0, 3.0, 50.0), (7.0, 0.0, 900.0))])
def test_a_model_is_the_same_with_the_kernels(outcomes, t):
    model, outcome = outcomes
    with Calls("norm_modulate") as calls:
        found = outcome(model, t=t)
    assert calls.count == 2 * (3 if model.config.family == "wan" else 2)
    assert same(found, outcome(model, fits=False, t=t), 1e-4)


@runs
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("outcomes", MODELS[2:], indirect=True)
def test_adapters_learn_the_same(outcomes):
    model, outcome = outcomes
    adapt(model, LoraConfig(rank=2), half=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    assert same(outcome(model), outcome(model, fits=False), 1e-4)


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("outcomes", MODELS[:1], indirect=True)
def test_images_give_the_blocks_that_they_skip_gradients_of_zero(outcomes):
    model, outcome = outcomes
    add_zero_gradients(model)
    found = outcome(model, frames=1)
    assert same(found, outcome(model, fits=False, frames=1), 1e-4)
    assert not any(p.grad.any() for p in model.blocks[1].parameters())


@runs
@pytest.mark.gpu
@pytest.mark.parametrize("outcomes", MODELS[:1], indirect=True)
@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_checkpointing_changes_nothing(outcomes, mode: str):
    model, outcome = outcomes
    expected, checkpointed = outcome(model), deepcopy(model)
    apply_activation_checkpointing(checkpointed, mode)
    # on a GPU, sums of torch's own kernels may have another order the second time
    assert same(outcome(checkpointed), expected, 0.0 if INTERPRETED else 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="the checks of shapes can't be compiled")
@pytest.mark.parametrize(
    ("outcomes", "mode"),
    [(SMALL, "none"), (SMALL, "selective"), (MODELS[1], "full"), (MODELS[2], "selective")],
    indirect=["outcomes"],
)
def test_compiled_blocks_have_the_kernels_in_one_graph(outcomes, mode: str):
    model, outcome = outcomes
    expected = outcome(model)
    apply_activation_checkpointing(model, mode)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert same(outcome(model), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="make check-gpu resumes on a GPU")
@pytest.mark.parametrize("stage", [1, 3])
def test_training_with_the_kernels_resumes_bit_for_bit(stage: int, monkeypatch, tmp_path):
    from tests.gpu.setting import join, make_shards, run, size_of

    monkeypatch.setattr("sora_train.model.layers.fits_norm_modulate", lambda x, modulation: x.dtype == torch.bfloat16)
    monkeypatch.setattr("sora_train.train.loop.choose_norms", lambda model, *_, **__: fuse_norms(model))
    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        join(device)
    shards = make_shards(tmp_path / "shards", size_of(device))
    settings = {"zero_stage": stage, "precision": "bf16", "activation_checkpointing": "selective", "steps": 4}
    with Calls("norm_modulate") as calls:
        whole = run(device, shards, tmp_path / "whole", checkpoint_every=2, **settings)
    assert calls.count >= 2 * 2 * 2 * 4  # norms, blocks, micro-batches, steps
    rest = run(device, shards, tmp_path / "rest", tmp_path / "whole/checkpoints/step_00000002", **settings)
    assert [line["loss"] for line in rest] == [line["loss"] for line in whole[2:]]
