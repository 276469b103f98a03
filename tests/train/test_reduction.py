"""How exactly gradients are added up over micro-batches and ranks, against float64 sums of what the ranks computed."""

from itertools import product
from pathlib import Path

import pytest
from reading import distance, parts
from safetensors.torch import load_file

WORLD = 3  # no power of two: a division in bfloat16 shows
SETTINGS = {
    "steps": 1,
    "batch_size": 6,
    "micro_batch_size": 1,
    "precision": "bf16",
    "betas": (0.0, 0.999),  # AdamW's first moment is then the gradient
    "gradient_clip": 0.0,
}
WAYS = [*product((1, 2, 3), ("fp32", "bf16"))]


@pytest.fixture(scope="module")
def errors(start, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    """Relative error of the gradient by ZeRO stage and train.reduce_dtype."""
    root = tmp_path_factory.mktemp("reduction")
    tasks = [
        {"out": str(root / f"{stage}_{dtype}"), "act": "reduce"}
        | {"train": SETTINGS | {"zero_stage": stage, "reduce_dtype": dtype}}
        for stage, dtype in WAYS
    ]
    codes, output = start(WORLD, tiny_shards, tasks)()
    assert not any(codes), "\n".join(output)
    found: dict[tuple[int, str], float] = {}
    for stage, dtype in WAYS:
        folder = root / f"{stage}_{dtype}"
        exact = {name: tensor.flatten() for name, tensor in load_file(folder / "exact.safetensors").items()}
        found[stage, dtype] = distance(parts(folder, "exp_avg"), exact)
    print({f"stage {stage}, {dtype}": f"{error:.2e}" for (stage, dtype), error in found.items()})
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_summed_in_float32_by_default(errors: dict, stage: int):
    assert errors[stage, "fp32"] < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_reduction_in_bf16_is_a_choice_with_bf16_error(errors: dict, stage: int):
    assert 1e-4 < errors[stage, "bf16"] < 1e-2
