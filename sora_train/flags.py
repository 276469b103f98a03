"""Flags of the command line: `--section.key value`, typed by the keys they set, and their help.

The grammar is that of the recipe: a flag is a dotted key, lists take several words, an entry of a mapping is a key of
its own. Neither tyro, typer nor argparse reads it; argparse lays out the help.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from typing import Any, Union

from pydantic import TypeAdapter

from sora_train.errors import RecipeError
from sora_train.settings import keys, new_name, suggest

TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def parse_flags(words: Sequence[str], *sections: type) -> tuple[dict[str, object], list[str]]:
    """Splits a command's words into dotted overrides (`--section.key value …`) and the words that belong to no flag.

    Dashes and underscores in a key are the same, and `--key=value` is allowed. A list takes every word up to the next
    flag, and more if its flag is repeated; a key that is one number or several (`cluster.workers`) takes every number,
    also as `[20, 3]`; a truth value needs no word to be true. A word with a blank in it, such as a prompt, is never a
    flag. Raises RecipeError for a key of none of the sections and for a missing value.
    """
    known = {key: hint for section in sections for key, hint in keys(section)}
    overrides: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not _is_flag(word):
            rest.append(word)
            continue
        key, has_value, value = word[2:].partition("=")
        key, hint = _look_up(key, known)
        takes_many = typing.get_origin(hint) in (tuple, list)
        takes_numbers = not takes_many and any(typing.get_origin(form) is tuple for form in typing.get_args(hint))
        values = [value] if has_value else []
        while not has_value and queue and not _is_flag(queue[0]):
            if values and not takes_many and not (takes_numbers and queue[0].replace(".", "", 1).isdigit()):
                break
            if hint is bool and queue[0].lower() not in TRUTHS:
                break
            values.append(queue.pop(0))
        if takes_numbers and len(values) == 1 and values[0].startswith("["):  # as in a recipe
            values = [number.strip() for number in values[0].strip("[]").split(",")]
        if hint is bool and not values:
            values = ["true"]
        if not values and not takes_many:
            remedy = f": --{key}=VALUE, if it begins with --" if queue else ""
            raise RecipeError(f"--{key} needs a value{remedy}")
        if typing.get_origin(hint) is typing.Literal:  # pydantic takes 3 for a choice of numbers, but not "3"
            choices = {str(choice): choice for choice in typing.get_args(hint)}
            values = [choices.get(value, value) for value in values]
        if takes_many:
            overrides[key] = [*overrides.get(key, []), *values]
        else:
            overrides[key] = values if len(values) > 1 else values[0]
    return overrides, rest


def _is_flag(word: str) -> bool:
    """Whether a word is `--key` or `--key=value`. A text that begins with -- has a blank in it."""
    return word.startswith("--") and not any(map(str.isspace, word.partition("=")[0]))


def _look_up(key: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """A flag's key, with its present name, and its type. Raises RecipeError if there is no such key."""
    key = new_name(key.replace("-", "_"))
    hint = _type_of(key, known)
    if hint is None:
        if typing.get_origin(known.get(key)) is dict:
            raise RecipeError(f"--{key} takes keys of its own, such as --{key}.KEY VALUE")
        raise RecipeError(f"--{key} is no known key; {suggest(key, list(known))}")
    return key, hint


def _type_of(key: str, known: Mapping[str, Any]) -> Any:
    """The type of a dotted key; for an entry of a mapping (`validation.resources.GPU`) the type of its values, which
    may be mappings again where that is `Any` (`train.deepspeed.zero_optimization.overlap_comm`).
    """
    if key in known:
        return None if typing.get_origin(known[key]) is dict else known[key]
    section, _, last = key.rpartition(".")
    hint = known.get(section)
    if typing.get_origin(hint) is dict and last:
        return typing.get_args(hint)[1]
    return Any if section and _type_of(section, known) is Any else None


def help_text(usage: str, paragraphs: Sequence[str], sections: Sequence[object], only: Sequence[str] = ()) -> str:
    """The help of a command: its paragraphs, then every flag of `sections` with its sentence and its value there.

    `only` names the sections and keys that are shown of the last section, which is the recipe; all if it is empty.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    parser = argparse.ArgumentParser(
        usage=usage,
        description="\n\n".join(textwrap.fill(text, width) for text in paragraphs if text),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        add_help=False,
    )
    groups = {"": parser.add_argument_group("options")}
    for section in sections:
        for key, hint in keys(type(section)):
            if only and section is sections[-1] and not any(f"{key}.".startswith(f"{name}.") for name in only):
                continue
            name = key.rpartition(".")[0]
            if name not in groups:
                groups[name] = parser.add_argument_group(f"{name} options", _about(section, name))
            flag = f"--{key}.KEY" if typing.get_origin(hint) is dict else f"--{key}"
            groups[name].add_argument(flag, metavar=_type_word(hint), help=_sentence(section, key))
    for short, long, says in (
        ("-h", "--help", "Show this help; after a recipe's name, with the values of that recipe."),
        ("-v", "--verbose", "Show debug messages, with time and module."),
        ("-q", "--quiet", "Show warnings and results only."),
    ):
        groups[""].add_argument(short, long, action="store_true", help=says)
    return parser.format_help().rstrip()


def _about(section: object, name: str) -> str | None:
    """What a section within a section is, from its docstring."""
    return type(reduce(getattr, name.split("."), section)).__doc__


def _sentence(section: object, key: str) -> str:
    """A key's sentence and its value."""
    *outer, name = key.split(".")
    owner = reduce(getattr, outer, section)
    about = _descriptions(type(owner)).get(name, "")
    value = getattr(owner, name)
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    default = f"(default: {value})" if value not in (None, "", {}) else ""
    return " ".join(f"{about} {default}".split()).replace("%", "%%")


@cache
def _descriptions(section: type) -> dict[str, str]:
    """The sentence of each key of a section that has one."""
    properties = TypeAdapter(section).json_schema()["properties"]
    return {name: about["description"] for name, about in properties.items() if "description" in about}


def _type_word(hint: Any) -> str:
    """What the help calls a type: INT, FLOAT, TEXT, the choices, or several of these."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is typing.Annotated:
        return _type_word(inner[0])
    if origin in (tuple, list):
        return f"{_type_word(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(_type_word, inner))
    if origin in (Union, types.UnionType):
        return "|".join(_type_word(form) for form in inner if form is not type(None))
    if origin is dict:
        return "VALUE"
    return {bool: "[yes|no]", int: "INT", float: "FLOAT"}.get(hint, "TEXT")
