"""Compiled blocks for sampling and held-out losses: on GPUs, for work that outweighs compiling."""

from __future__ import annotations

from sora_train.log import log
from sora_train.model import Transformer
from sora_train.sample.load import Run

WORTH_FLOPS = 2e16
"""About a minute of an H200 without compiling, of which compiled blocks save about ten seconds; so long a shape
compiles."""


def compile_if_worth(run: Run, flops: int | float) -> None:
    """Compiles a run's blocks if it is on a GPU and is about to compute this many FLOPs.

    Depends on the work alone, so that validations of a run all compute alike.
    """
    if not run.compiled and run.device.type == "cuda" and flops >= WORTH_FLOPS:
        log.info("compiling the model's blocks")
        compile_for_inference(run.model)
        run.compiled = True


def compile_for_inference(model: Transformer) -> None:
    """Compiles each kind of block once for each shape. What can't be compiled, or is one shape too many, runs as it is.

    Batches differ in their number of clips and in whether they are guided, so training's limit on graphs does not hold.
    """
    import torch._dynamo  # takes a second

    torch._dynamo.config.suppress_errors = True
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
