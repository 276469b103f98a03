"""torch.compile, block by block, applied to a model after activation checkpointing."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.data.collate import padded_lengths
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError, error_line
from sora_train.kernels.tools import why_no_compiler, why_no_triton
from sora_train.log import log
from sora_train.model import ModelConfig, Transformer
from sora_train.schema import bucket_size
from sora_train.train.config import TrainConfig
from sora_train.train.run_dir import RunDir


def compile_blocks(model: Transformer, shapes: int, failed: Callable[[str], object] | None = None) -> None:
    """Compiles each kind of block when it first sees a shape; blocks of one kind share the graph.

    `shapes` is how many inputs there are that differ in the clip's shape, the caption's padded length or whether
    gradients are taken. Many more graphs are not compiled, since that takes a hundred times as long as a step; such
    inputs run without. If torch can't compile, all run without and `failed` gets the reason once; the error is raised
    if there is no `failed`. Modules' hooks, such as ZeRO-3's, stay outside of the graphs.
    """
    import torch._dynamo  # takes a second
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    # Twice two kinds of blocks, and one for `skipped_blocks.py`. Strides may differ between a kind's blocks.
    limit = 4 * shapes + 1
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = limit
    reasons: list[str] = []

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(forward, fullgraph=True, dynamic=False)

        def compiled_forward(*args: Any) -> Any:
            if broken:
                return forward(*args)
            try:
                return fast(*args)
            except FailOnRecompileLimitHit:  # what is compiled already stays so
                why = f"the blocks need more than {limit} graphs, so inputs of other shapes run without torch.compile"
            except TorchDynamoException as error:
                if failed is None:
                    raise
                broken.append(why := error_line(error))
            if not reasons:
                reasons.append(why)
                (failed or log.warning)(why)
            return forward(*args)

        return compiled_forward

    broken: list[str] = []
    for block in model.blocks:
        forward = compiled(block.forward)
        block.forward = without_text(forward) if getattr(block, "text_attention", block) is None else forward


def without_text(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block that ignores the caption, called with one token: one graph fits captions of any length."""
    blank: list[Tensor] = []

    def forward_without_text(x: Tensor, modulation: Tensor, text: Tensor, text_mask: Tensor, *rope: Any) -> Any:
        if not blank:
            blank.extend((text.new_zeros(1, 1, text.shape[-1]), text_mask.new_ones(1, 1)))
        return forward(x, modulation, *blank, *rope)

    return forward_without_text


def graph_count(config: ModelConfig, buckets: Iterable[str], max_tokens: int) -> int:
    """Graphs that training needs.

    One for each kind of block, number of frames, pixels of a frame, and padded caption length if the blocks see the
    caption. Images skip the temporal blocks, which then run on one token of zeros (`skipped_blocks.py`): one more.
    """
    sizes = {(frames, height * width) for frames, height, width in map(bucket_size, buckets)}
    lengths, images = len(padded_lengths(max_tokens)), sum(frames == 1 for frames, _ in sizes)
    if not config.factorised:
        return len(sizes) * lengths
    temporal = lengths if config.cross_attention_in == "every" else 1
    return len(sizes) * lengths + (len(sizes) - images) * temporal + (images > 0)


def why_no_tools(kind: str) -> str:
    """Why torch can't build code for a kind of device, `cpu` or `cuda`, on this machine, or an empty string."""
    return why_no_compiler("CXX", "g++") if kind == "cpu" else why_no_triton()


def check_compile(config: TrainConfig, why: str) -> None:
    """UserError if `train.compile` is `yes` and there is a reason why it can't be done."""
    if why and config.compile == "yes":
        raise UserError(
            f"train.compile is yes, but {why}. Install it there, or set train.compile to no", code="compile"
        )


def why_not_compiled(device: torch.device) -> str:
    """Why torch can't compile for a device of this machine, or an empty string."""
    if why := why_no_tools(device.type):
        return why
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return f"triton needs compute capability 7.0, which {torch.cuda.get_device_name(device)} does not have"
    return ""


def is_wanted(choice: str, device: torch.device) -> bool:
    """Whether `train.compile` asks to compile on a device: `auto` does on GPUs."""
    return choice == "yes" or (choice == "auto" and device.type == "cuda")


def first_reason(reason: str) -> str:
    """The first rank's reason that is not empty, with the rank, on every rank; or an empty string. Collective."""
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((f"on rank {rank} {reason}" for rank, reason in enumerate(reasons) if reason), "")


class Compilation:
    """Whether this run compiles, and the announcements of what takes long."""

    def __init__(
        self, config: TrainConfig, model: ModelConfig, shards: ShardSet, run_dir: RunDir, device: torch.device
    ) -> None:
        """`auto` compiles on GPUs, if all ranks can. Collective. UserError if `yes` can't be done."""
        max_tokens = shards.manifest.text.max_tokens
        self.run_dir, self.graphs = run_dir, graph_count(model, shards.rows, max_tokens)
        self.shapes = len(shards.rows) * len(padded_lengths(max_tokens))
        self.seen = set[tuple[str, int]]()
        self.auto, self.on = config.compile == "auto", is_wanted(config.compile, device)
        if not self.on:
            return
        why = first_reason(why_not_compiled(device))
        check_compile(config, why)
        self.on = not why
        if why and dist.get_rank() == 0:
            self.failed(why)

    def apply(self, model: Transformer) -> None:
        """Compiles the model's blocks, if the run does."""
        if self.on:
            compile_blocks(model, self.shapes, self.failed if self.auto else None)

    def failed(self, why: str) -> None:
        """Records that blocks run without compilation."""
        step, remedy = self.run_dir.metrics.last_step(), "Steps are slower; train.compile no skips the attempt"
        self.run_dir.events.write("not_compiled", step, f"{why}. {remedy}")

    def announce(self, step: int, bucket: str, tokens: int) -> None:
        """Writes an event before the first step of a shape, since it takes long. Ranks may meet it at other steps."""
        if not self.on or (bucket, tokens) in self.seen:
            return
        self.seen.add((bucket, tokens))
        reason = f"{bucket}, captions of up to {tokens} tokens; at most {self.graphs} graphs in all"
        attempt: list[str] = []  # what other ranks announced
        for event in self.run_dir.events.lines.read():
            attempt = [] if event["event"] in ("start", "resume") else [*attempt, event["reason"]]
        if reason not in attempt:
            self.run_dir.events.write("compiling", step, reason)
