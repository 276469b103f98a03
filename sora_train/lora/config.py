"""The recipe's `lora` section."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, model_validator

from sora_train.section import Section

Target = Literal["to_q", "to_k", "to_v", "to_out", "ff"]


class LoraConfig(Section):
    """Low-rank adapters: trains small matrices next to frozen weights."""

    rank: NonNegativeInt = 0
    """Rank of the adapters, such as 16. 0: no adapters, all weights are trained."""
    alpha: NonNegativeFloat = 0.0
    """Adapters are multiplied by `alpha / rank`. 0: `alpha` is the rank, so by 1."""
    targets: tuple[Target, ...] = ("to_q", "to_k", "to_v", "to_out")
    """Layers of every block that get adapters, by their names in diffusers.
    `to_q`, `to_k`, `to_v` and `to_out` are those of self- and cross-attention, `ff` is both layers of the
    feed-forward."""
    base_precision: Literal["auto", "int8"] = "auto"
    """Number format of the frozen weights of the blocks.
    `auto` is that of `train.precision`. `int8` has one scale for each row and takes half the memory of bf16; the error
    of outputs is smaller than that of bf16. Sampling and export use the original weights."""
    init_from: str = ""
    """Initial adapters of a new run: a file of adapters of the same rank. Empty: they start as zero change."""

    @model_validator(mode="after")
    def is_complete(self) -> "LoraConfig":
        """Refuses keys without a rank, and targets that are none or stand twice."""
        if wrong := [key for key in self.model_fields_set - {"rank"} if not self.rank and self.changes(key)]:
            raise ValueError(
                f"lora.rank is 0, which trains all weights, and {', '.join(f'lora.{key}' for key in sorted(wrong))} "
                "would have no effect. Set lora.rank, such as 16, or remove these keys"
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets is {list(self.targets)}; name at least one layer, and each one once")
        return self

    def __hash__(self) -> int:
        return hash((self.rank, self.alpha, self.targets, self.base_precision, self.init_from))

    def changes(self, key: str) -> bool:
        """Whether a key differs from its default, which a saved recipe states too."""
        return getattr(self, key) != type(self).model_fields[key].default

    @property
    def scale(self) -> float:
        """The factor of the adapters' product: alpha / rank."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


NO_LORA = LoraConfig()
"""Trains all weights."""
