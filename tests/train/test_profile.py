"""Profiles: what a trace's table adds up to, and that profiling changes no number."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig
from sora_train.errors import UserError
from sora_train.model import ModelConfig
from sora_train.train.config import TrainConfig
from sora_train.train.loop import train
from sora_train.train.profile import breakdown, part_of
from sora_train.train.run_dir import RunDir

MODEL = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)


def event(category: str, name: str, start: float, length: float, track: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "pid": 0, "tid": track}


def written(path: Path, *events: dict) -> Path:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, file)
    return path


def test_a_gpus_parts_and_gaps_add_up_to_the_time_from_first_to_last_kernel(tmp_path: Path):
    trace = written(
        tmp_path / "trace.json.gz",
        event("cpu_op", "aten::mm", 0, 9000),
        event("gpu_user_annotation", "Optimizer.step#AdamW.step", 1000, 9000),
        event("kernel", "nvjet_hsh_128x256", 1000, 2000),
        event("kernel", "nvjet_hsh_128x256", 4000, 1000),
        event("kernel", "triton_poi_fused_addmm_gelu_0", 5000, 500),
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32", 4500, 1500, track=2),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 9000, 1000),
    )
    found = breakdown(trace)
    assert (found.device, found.total_ms, found.gaps_ms) == ("GPU", 9.0, 4.0)
    assert found.parts() == {
        "products": (3.0, 2),
        "communication": (1.5, 1),
        "copies": (1.0, 1),
        "pointwise": (0.5, 1),
        "gaps": (4.0, 0),
    }
    assert found.text(2).splitlines()[3].split() == ["1.500", "33.3%", "1.0", "products"]


def test_time_of_an_operation_excludes_that_of_inner_ones(tmp_path: Path):
    trace = written(
        tmp_path / "trace.json.gz",
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::addmm", 10, 70),
        event("cpu_op", "aten::copy_", 20, 30),
        event("cpu_op", "aten::gelu", 100, 20),
        event("cpu_op", "aten::gelu", 50, 20, track=2),
    )
    found = breakdown(trace)
    assert {k.name: k.ms for k in found.kernels} == pytest.approx(
        {"aten::linear": 0.03, "aten::addmm": 0.04, "aten::copy_": 0.03, "aten::gelu": 0.04}
    )
    assert found.gaps_ms == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_2_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, cutlass::bfloat16_t>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("aten::mm", "products"),
        ("void at::native::(anonymous)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("triton_red_fused__scaled_dot_product_flash_attention_addmm_native_layer_norm_3", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl(TensorIteratorBase&)>", "pointwise"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(at::TensorIteratorBase&)>", "copies"),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_their_names(name: str, part: str):
    assert part_of(name) == part


def test_a_trace_without_operations_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="Profile at least one step"):
        breakdown(written(tmp_path / "trace.json.gz"))


def losses(shards: Path, out: Path, **changes: object) -> list[float]:
    out.mkdir(exist_ok=True)
    config = TrainConfig(steps=4, batch_size=4, micro_batch_size=2, log_every=1, **changes)  # pyright: ignore[reportArgumentType]
    torch.set_num_threads(1)
    device = torch.device("cpu")
    assert not train(config, MODEL, DiffusionConfig(), ShardSet(str(shards)), device=device, run_dir=RunDir(out))
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("profile", "found"), [((2, 2), "steps 2 to 3"), ((4, 5), "steps 4 to 4")])
def test_profiled_steps_leave_a_trace_and_a_table_and_the_same_losses(
    tiny_shards: Path, tmp_path: Path, profile: tuple[int, int], found: str
):
    plain = losses(tiny_shards, tmp_path / "plain")
    assert losses(tiny_shards, tmp_path / "profiled", profile=profile) == plain
    folder = tmp_path / "profiled/profile"
    parts = breakdown(folder / "trace.json.gz").parts()
    assert {"products", "attention", "pointwise", "optimizer", "gaps"} <= parts.keys()
    steps = int(found[-1]) - int(found[6]) + 1
    assert parts["optimizer"][1] % steps == 0
    assert all(math.isfinite(ms) and ms >= 0 for ms, _ in parts.values())
    assert f"on the CPU, mean of {steps}" in (folder / "table.txt").read_text()
    events = [json.loads(line) for line in (tmp_path / "profiled/events.jsonl").read_text().splitlines()]
    assert [event["reason"].partition(":")[0] for event in events if event["event"] == "profiled"] == [found]


def test_a_profile_that_can_not_be_written_does_not_end_training(tiny_shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profile").write_text("a file")
    assert len(losses(tiny_shards, run, profile=(2, 1))) == 4
    assert "steps 2 to 2: not written: " in (run / "events.jsonl").read_text()
