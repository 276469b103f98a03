"""What `--help` shows of a recipe and of a verb's own options, as one object for tyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, TypeAdapter, create_model

from sora_train.settings import is_section, own_keys


def shown(recipe: object, options: object, only: Sequence[str]) -> object:
    """The verb's options, then the recipe's keys with their values: all, or `only` these sections and keys."""
    return _part(recipe, only, _fields(options, ()))


def _part(section: object, only: Sequence[str], first: dict[str, Any]) -> object:
    kind = type(section)
    made = create_model(kind.__name__, **first, **_fields(section, only))
    made.__doc__ = kind.__doc__
    return made()


def _fields(section: object, only: Sequence[str]) -> dict[str, Any]:
    """The fields of a model like the section, their defaults its values, their descriptions its sentences."""
    about = TypeAdapter(type(section)).json_schema()["properties"]
    fields: dict[str, Any] = {}
    for name, hint in own_keys(type(section)).items():
        inner = [key.partition(".")[2] for key in only if key.partition(".")[0] == name]
        if only and not inner:
            continue
        value = getattr(section, name)
        if is_section(hint):
            value = _part(value, [key for key in inner if key], {})
            hint = type(value)
        fields[name] = (hint, Field(default=value, description=about[name].get("description")))
    return fields
