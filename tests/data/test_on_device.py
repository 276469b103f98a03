"""Micro-batches on their way to the device."""

import pytest
import torch

from sora_train.data.collate import MicroBatch
from sora_train.data.loader import on_device


def micro_batch(value: float) -> MicroBatch:
    full = torch.full((2, 3, 4, 8, 8), value)
    return MicroBatch(
        latents=full,
        noise=full + 0.5,
        t=torch.full((2,), value),
        text=torch.full((2, 5, 8), value),
        text_mask=torch.ones(2, 5, dtype=torch.bool),
        weight=torch.ones(2),
        dropped=torch.zeros(2, dtype=torch.bool),
        sample_ids=("a", None),
    )


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_micro_batches_arrive_in_order(kind: str, count: int):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    made = [micro_batch(float(i)) for i in range(count)]
    pinned = [micro.pinned() for micro in made] if kind == "cuda" else made
    sums = []
    for micro in on_device(pinned, torch.device(kind)):
        assert micro.latents.device.type == kind
        sums.append([(micro.latents * 2).sum(), micro.noise.sum(), micro.text.sum()])  # while the next one is copied
        assert micro.sample_ids == ("a", None)
    expected = [[(micro.latents * 2).sum(), micro.noise.sum(), micro.text.sum()] for micro in made]
    assert [[float(value) for value in each] for each in sums] == [[float(v) for v in each] for each in expected]
