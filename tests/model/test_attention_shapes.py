"""The shapes of attention that are measured are those that a model's forward pass has."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sora_train.model import ModelConfig, build
from sora_train.model.attention_shapes import attention_shapes

LATTE = {"width": 32, "depth": 4, "heads": 2, "text_width": 12, "sample_size": 8}


class Calls(TorchFunctionMode):
    """Counts calls of attention by the shapes of queries and keys, and by whether there is a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, _, *mask = args
            self.found[tuple(q.shape), tuple(k.shape), bool(mask or kwargs)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "keys",
    [LATTE, LATTE | {"cross_attention_in": "every"}, LATTE | {"attention": "joint"},
     {"family": "wan", "width": 24, "depth": 3, "heads": 2, "text_width": 12, "feed_forward": 40}],
)  # fmt: skip
@pytest.mark.parametrize("f", [1, 3])
def test_the_shapes_are_those_of_a_forward_pass(keys: dict, f: int):
    model, (b, l) = build(ModelConfig(**keys)), (2, 5)  # noqa: E741
    text, mask = torch.randn(b, l, 12), torch.ones(b, l, dtype=torch.bool)
    with Calls() as calls, torch.no_grad():
        model(torch.randn(b, f, 4, 8, 6), torch.full((b,), 500.0), text, mask)
    stated = Counter()
    for one in attention_shapes(model.config, (f, 8, 6), b, l):
        if one.kind != "temporal" or f > 1:  # training alone runs these blocks for images
            stated[(one.g, one.m, one.s, one.k), (one.g, one.m, one.l, one.k), one.masked] += one.blocks
    if model.config.factorised and model.config.cross_attention_in == "every" and f == 1:
        (text_one,) = (key for key in stated if key[2])
        stated[text_one] -= model.config.depth // 2
    assert stated == calls.found
