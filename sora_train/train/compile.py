"""torch.compile, block by block, applied to a model after activation checkpointing."""

from sora_train.model import Transformer


def compile_blocks(model: Transformer, shapes: int) -> None:
    """Compiles each kind of block when it first sees a shape; blocks of one kind share the graph.

    `shapes` is how many inputs there are that differ in the clip's shape, the caption's padded length or whether
    gradients are taken. More graphs than these need are an error, since a step that compiles takes a hundred times as
    long. Modules' hooks, such as ZeRO-3's, stay outside of the graphs.
    """
    import torch._dynamo  # takes a second

    # One graph for each kind of block and shape, and one for `skipped_blocks.py`.
    limit = 2 * shapes + 1 if model.config.factorised else shapes
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = limit
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
