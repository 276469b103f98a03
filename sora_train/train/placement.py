"""Initial values for a model on the meta device: one parameter at a time, which ZeRO-3 distributes at once.

So a rank starts with its share and one whole parameter, not with the whole model. Rank 0 alone reads files. Random
values are drawn in the order of the model's constructor, which visits parameters more than once, so each rank draws
all of them and saves its share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from sora_train.errors import UserError

T = TypeVar("T")
aten = torch.ops.aten
FILLS: set[Any] = {aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar}
"""Operations of initialisation that write all elements of a tensor."""


@dataclass(frozen=True)
class Weights:
    """Initial values of parameters on the meta device. The others become zeros, which a checkpoint replaces."""

    read: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """By name. Rank 0 alone reads them: DeepSpeed broadcasts its parameters."""
    drawn: dict[Tensor, Tensor] = field(default_factory=dict)
    """By parameter: this rank's share of random values, flat."""


class DrawnShares(TorchDispatchMode):
    """Draws on the CPU what a model like `model` is initialised with, on the meta device, and saves a rank's share.

    That is its ZeRO-3 partition of each parameter among `world` ranks. With a world of 1, rank 0 saves all and the
    others, to whom DeepSpeed broadcasts them, nothing.
    """

    def __init__(self, model: nn.Module, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world, self.shares = rank, world, dict[Tensor, Tensor]()
        # two allocations, which return to the system at once; many smaller ones would leave gaps in the heap
        self.room = torch.empty(sum(self.share(p)[1] for p in model.parameters()), device="cpu")
        self.scratch = torch.empty(max(p.numel() for p in model.parameters()), device="cpu")

    def share(self, whole: Tensor) -> tuple[int, int]:
        """The first element of a parameter that is the rank's, and how many are."""
        size = -(-whole.numel() // self.world)
        return size * self.rank, max(0, min(size, whole.numel() - size * self.rank))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == aten.randn.default:  # tables, which are small
            return func(*args, **kwargs | {"device": "cpu"})
        if not (func._schema.is_mutable and args[0].is_meta):
            return func(*args, **kwargs)
        if func not in FILLS:
            raise NotImplementedError(f"initial weights by {func} are not drawn")
        part, *rest = args
        values = func(self.scratch[: part.numel()].view(part.shape), *rest, **kwargs).view(-1)
        whole = part if part._base is None else part._base
        (offset, count), begin = self.share(whole), part.storage_offset()
        if whole not in self.shares:
            self.shares[whole], self.room = self.room[:count], self.room[count:]
        first, last = max(begin, offset), min(begin + len(values), offset + count)
        if first < last:
            self.shares[whole][first - offset : last - offset] = values[first - begin : last - begin]
        return part


@torch.no_grad()
def place(
    model: nn.Module, weights: Weights, device: torch.device, *, half: bool, zero3: dict[str, Any] | None
) -> None:
    """Puts every parameter with its values on the device, in bfloat16 if `half`. Collective.

    With `zero3`, DeepSpeed's configuration, each is distributed over the ranks before the next. Values that only rank 0
    has are broadcast by DeepSpeed, then or in `initialize`. A UserError of reading is raised on every rank.
    """
    import deepspeed

    first: Any = None
    for name, parameter in model.named_parameters():
        p: Any = parameter  # with DeepSpeed's own attributes
        dtype = torch.bfloat16 if half and p.is_floating_point() else p.dtype
        share = weights.drawn.pop(p, None)
        if p.is_meta:
            values = torch.zeros(p.shape, dtype=dtype, device=device)
            if name in weights.read:
                share = None
                found = together(weights.read[name] if dist.get_rank() == 0 else _nothing, device)
                values.copy_(values if found is None else found)
            elif share is not None and not zero3:
                values.view(-1)[: len(share)] = share
            swap_tensors(p, nn.Parameter(values, requires_grad=p.requires_grad))
        else:
            p.data = p.data.to(device, dtype)
        if zero3 and first is None:
            first = p
            deepspeed.zero.Init(module=nn.ParameterList([p]), config_dict_or_path=zero3)
        elif zero3:
            first.convert_to_zero_parameters([p])
        if zero3 and share is not None:
            p.ds_tensor[: len(share)] = share
            p.ds_secondary_tensor = None  # a copy that `zero_hpz_partition_size` makes


def _nothing() -> None:
    """Reads nothing, for the ranks other than 0."""


def together(act: Callable[[], T], device: torch.device) -> T:
    """What `act` returns on this rank. A UserError of one rank is raised on all: else they would wait for it.

    Collective.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    result, problem = None, None
    try:
        result = act()
    except UserError as error:
        problem = error
    failed = torch.tensor(world if problem is None else rank, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MIN)
    if failed < world:
        problems = [problem]
        dist.broadcast_object_list(problems, src=int(failed))
        raise cast(UserError, problems[0])
    return cast(T, result)
