"""torch.compile, block by block, applied to a model after activation checkpointing."""

from collections.abc import Callable

from sora_train.model import Transformer


def compile_blocks(model: Transformer, shapes: int) -> None:
    """Compiles each kind of block when it first sees a shape; blocks of one kind share the graph.

    `shapes` is how many inputs there are that differ in the clip's shape, the caption's padded length or whether
    gradients are taken. More than `max_graphs` graphs are an error, since a step that compiles takes a hundred times as
    long. Modules' hooks, such as ZeRO-3's, stay outside of the graphs.
    """
    import torch._dynamo  # takes a second

    limit = max_graphs(model, shapes)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = limit
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def max_graphs(model: Transformer, shapes: int) -> int:
    """Most graphs of `compile_blocks`: one for each kind of block and shape, and one for `skipped_blocks.py`."""
    return 2 * shapes + 1 if model.config.factorised else shapes


class ShapeLog:
    """Announces each new input shape of a compiled model, since compiling it takes long."""

    def __init__(self, log_event: Callable[[str, int, str], None], most: int) -> None:
        """Calls log_event("compiling", step, text). `most` is the number of pairs of a bucket and a text length."""
        self.log_event, self.most, self.seen = log_event, most, set[tuple[str, int]]()

    def see(self, step: int, bucket: str, tokens: int) -> None:
        """To be called before a forward pass of clips of `bucket` with captions padded to `tokens`."""
        if (bucket, tokens) not in self.seen:
            self.seen.add((bucket, tokens))
            count = f"shape {len(self.seen)} of at most {self.most}"
            self.log_event("compiling", step, f"{bucket}, captions of up to {tokens} tokens ({count})")
