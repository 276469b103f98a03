"""The engine: what its options change, and what none of them may."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reading import KINDS, at_step, checkpoint_at, distance, losses, parts, records, without_key_biases
from safetensors.torch import load_file

from sora_train.errors import UserError
from sora_train.model import ModelConfig, build
from sora_train.train.config import TrainConfig
from sora_train.train.engine import Engine

LAST, HELD = 6, 3
SETTINGS = {
    "steps": LAST,
    "batch_size": 4,
    "micro_batch_size": 1,  # two a step on each of two ranks
    "learning_rate": 1e-4,
    "log_every": 1,
    "checkpoint_every": HELD,
    "ema_decay": 0.9,
}
RAW = {
    "zero_optimization": {"reduce_bucket_size": "5e3", "overlap_comm": "true", "reduce_scatter": "false"},
    "wall_clock_breakdown": "false",
    "steps_per_print": 1000,
}
RAW_3 = {"zero_optimization": {"sub_group_size": 2000, "stage3_param_persistence_threshold": 100}}
OFFLOADS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
REFUSING = [(1, "none", "bf16"), *((*how, "fp32") for how in OFFLOADS)]
DECAY = 0.25


@pytest.fixture(scope="module")
def runs(start, alive: str, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by name: plainS of each stage, and others as the tests say; two ranks each."""
    root = tmp_path_factory.mktemp("runs")

    def task(out: str, stage: int, resume: str | None = None, act: str | None = None, **changes) -> dict:
        train = SETTINGS | {"zero_stage": stage} | changes
        from_ = resume and str(checkpoint_at(root / resume, HELD))
        made = {"out": str(root / out), "train": train, "resume": from_, "init_from": alive}
        return made | ({"act": act} if act else {})

    def tasks(stage: int) -> list[dict]:
        made = [task(f"plain{stage}", stage)]
        for offload in (offload for s, offload in OFFLOADS if s == stage):
            made += [task(f"{offload}{stage}", stage, offload=offload)]
            made += [task(f"to_{offload}{stage}", stage, f"plain{stage}", offload=offload)]
            made += [task(f"from_{offload}{stage}", stage, f"{offload}{stage}")]
        if stage:
            made += [task(f"converted{stage}", stage, f"plain{stage}", act="convert")]
            raw = RAW_3 if stage == 3 else RAW
            made += [task(f"raw{stage}", stage, deepspeed=raw), task(f"told{stage}", stage, act="tell", deepspeed=raw)]
        for s, offload, precision in REFUSING:
            if s == stage:
                name = f"refused_{stage}_{offload}_{precision}"
                made += [task(name, stage, act="refuse_a_step", offload=offload, precision=precision)]
        made += [task(f"bf16_{stage}_{micro}", stage, precision="bf16", micro_batch_size=micro) for micro in (1, 2)]
        made += [task(f"{mode}{stage}", stage, activation_checkpointing=mode) for mode in ("selective", "full")]
        decaying = {"weight_decay": DECAY, "learning_rate": 0.5, "precision": "bf16" if stage == 1 else "fp32"}
        return [*made, task(f"decayed{stage}", stage, f"plain{stage}", "step_without_gradient", **decaying)]

    ends = [start(2, tiny_shards, tasks(0) + tasks(3)), start(2, tiny_shards, tasks(1) + tasks(2))]
    for end in ends:
        codes, output = end()
        assert not any(codes), "\n".join(output)
    return root


def agree(run: Path, other: Path) -> None:
    """Losses and all that a checkpoint holds agree, to rounding."""
    expected = {step: loss for step, loss in losses(other).items() if step in losses(run)}
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    for kind in KINDS:
        assert distance(*(without_key_biases(at_step(folder, LAST, kind)) for folder in (run, other))) < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoint_parts_equal_deepspeeds_own_conversion(runs: Path, stage: int):
    theirs = {name: w.flatten() for name, w in load_file(runs / f"converted{stage}/theirs.safetensors").items()}
    assert distance(at_step(runs / f"plain{stage}", HELD), theirs) == 0


@pytest.mark.parametrize(("stage", "offload"), OFFLOADS)
def test_what_waits_in_the_cpus_memory_trains_as_what_does_not(runs: Path, stage: int, offload: str):
    agree(runs / f"{offload}{stage}", runs / f"plain{stage}")


@pytest.mark.parametrize("way", ["to", "from"])
@pytest.mark.parametrize(("stage", "offload"), OFFLOADS)
def test_a_checkpoint_goes_to_offload_and_back(runs: Path, way: str, stage: int, offload: str):
    agree(runs / f"{way}_{offload}{stage}", runs / f"plain{stage}")


@pytest.mark.parametrize(("stage", "offload", "precision"), REFUSING)
def test_a_refused_step_leaves_no_trace_with_offload_or_in_bf16(runs: Path, stage: int, offload: str, precision: str):
    folder = runs / f"refused_{stage}_{offload}_{precision}"
    for kind in KINDS:
        for made, wanted in (("refused", "before"), ("then", "alone")):
            tensors, expected = parts(folder / made, kind), parts(folder / wanted, kind)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert distance(parts(folder / "then"), parts(folder / "before")) > 0


@pytest.mark.parametrize("stage", range(4))
def test_matrices_decay_and_biases_and_tables_do_not(runs: Path, stage: int):
    """With gradients of zero, AdamW makes w - lr wd w - lr m / (sqrt(v) + eps) of w, by moments that only shrink."""
    before, after = runs / f"decayed{stage}/before", runs / f"decayed{stage}/after"
    weights, m, v, decayed = (parts(before, kind).copy() for kind in ("weights", "exp_avg", "exp_avg_sq", "weights"))
    b1, b2 = 0.9, 0.999
    steps = HELD + 1
    for name, w in weights.items():
        table = name.split(".")[-1].startswith("table")
        rate = 0.5 * DECAY if name.endswith("weight") and not table else 0.0
        first, second = b1 * m[name].double() / (1 - b1**steps), b2 * v[name].double() / (1 - b2**steps)
        decayed[name] = w.double() * (1 - rate) - 0.5 * first / (second.sqrt() + 1e-8)
    assert distance(parts(after), decayed) < 1e-6
    assert any(name.endswith("table") for name in weights)


@pytest.mark.parametrize(("stage", "mode"), [*product(range(4), ["selective", "full"])])
def test_activations_that_are_computed_again_change_nothing(runs: Path, stage: int, mode: str):
    agree(runs / f"{mode}{stage}", runs / f"plain{stage}")


@pytest.mark.parametrize("stage", range(4))
def test_two_bf16_micro_batches_equal_one_of_twice_the_size(runs: Path, stage: int):
    two, one, exact = runs / f"bf16_{stage}_1", runs / f"bf16_{stage}_2", runs / f"plain{stage}"
    for other in (one, exact):
        assert losses(two) == pytest.approx(losses(other), rel=1e-2)
        norms = [[record["grad_norm"] for record in records(run)] for run in (two, other)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert distance(at_step(two, LAST), at_step(one, LAST)) < 1e-2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_raw_keys_reach_deepspeed_and_leave_the_numbers(runs: Path, stage: int):
    agree(runs / f"raw{stage}", runs / f"plain{stage}")
    told = json.loads((runs / f"told{stage}/told.json").read_text())
    assert told["stage"] == stage
    if stage == 3:
        assert (told["sub_group_size"], told["param_persistence_threshold"]) == (2000, 100)
        assert told["sub_groups"] > 2
    else:
        assert (told["reduce_bucket_size"], told["overlap_comm"], told["reduce_scatter"]) == (5000, True, False)
        assert (told["wall_clock_breakdown"], told["steps_per_print"]) == (False, 1000)


def test_copies_of_partitions_begin_and_resume_as_the_partitions(start, tiny_shards: Path, tmp_path: Path):
    hpz = {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}  # at most one engine in a process
    settings = SETTINGS | {"zero_stage": 3}
    plain = {"out": str(tmp_path / "plain"), "train": settings}
    begun = {"out": str(tmp_path / "begun"), "train": settings | hpz}
    resumed = begun | {"out": str(tmp_path / "resumed"), "resume": str(checkpoint_at(tmp_path / "plain", HELD))}
    ends = [start(2, tiny_shards, tasks) for tasks in ([plain, resumed], [begun])]
    for end in ends:
        codes, output = end()
        assert not any(codes), "\n".join(output)
    for name in ("begun", "resumed"):
        agree(tmp_path / name, tmp_path / "plain")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_that_compiles_nothing_does_not_load_the_compiler(runs: Path, stage: int):
    assert json.loads((runs / f"told{stage}/told.json").read_text())["loaded_inductor"] is False


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"reduce_bucket_size": "many"}, "reduce_bucket_size Input should be a valid integer"),
        ({"reduce_bukket_size": 5}, "reduce_bukket_size Extra inputs are not permitted"),
    ],
)
def test_a_value_that_deepspeed_does_not_take_is_one_message(raw: dict, says: str):
    if not dist.is_initialized():  # one for this whole process: DeepSpeed keeps the first that it sees
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = TrainConfig(zero_stage=2, deepspeed={"zero_optimization": raw})
    with pytest.raises(UserError) as caught:
        Engine(torch.nn.Linear(4, 4), config, accumulation=1, device=torch.device("cpu"))
    assert str(caught.value).startswith("DeepSpeed rejects train.deepspeed: ")
    assert says in str(caught.value)


def test_text_in_float16_is_rounded_as_its_float32_would_be():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    text = bits[bits.isfinite()]
    assert torch.equal(text.bfloat16(), text.float().bfloat16())


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16"), (1, "fp32")])
def test_an_engine_computes_the_same_from_text_in_float16(stage: int, precision: str):
    if not dist.is_initialized():  # all tests of a process share one: DeepSpeed keeps the first
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = TrainConfig(zero_stage=stage, precision=precision, batch_size=2, micro_batch_size=2)
    torch.manual_seed(0)
    model = build(ModelConfig(width=16, depth=2, heads=2, text_width=8, sample_size=4, pooled_text=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    engine = Engine(model, config, accumulation=1, device=torch.device("cpu"))
    x, t, text = torch.randn(2, 2, 4, 4, 4), torch.tensor([3.0, 900.0]), torch.randn(2, 5, 8).half()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        assert torch.equal(engine(x, t, text, mask), engine(x, t, text.float(), mask))
