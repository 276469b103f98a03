"""The base of a recipe's sections, and of a command's options: frozen, with docstrings that `--help` shows."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Section(BaseModel):
    """A section of a recipe; unknown keys are errors. A config stands next to the code that it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass whose fields have the docstrings below them as descriptions."""
    cls.__pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclass(frozen=True)(cls)
