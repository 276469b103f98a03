"""Flags of a bench from a dataclass: its fields are the flags, the sentence below a field is its help.

By argparse and not as the other verbs' flags are read: pydantic and tyro are not there on a bare machine.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from sora_train.bench.core import read_records
from sora_train.errors import RecipeError, UserError

O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class Common:
    """What every bench takes."""

    out: str = "runs/bench.jsonl"
    """File to which what was measured is appended, a JSON object a line."""
    report: str = ""
    """Write an HTML page with plots of the newest record of each kind in the file of `--out`."""
    markdown: str = ""
    """Write the tables of this command as Markdown, with command, commit and hardware."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message.replace('argument ', '')}; `{self.prog} --help` explains the flags")


def parse(options: type[O], words: Sequence[str], prog: str, description: str) -> tuple[O, list[str]]:
    """The options in a command's words, and the other words. Prints the help and exits where they ask for it.

    Raises RecipeError for a value that a flag does not take, and UserError where what will be measured could not be
    kept.
    """
    parser = Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints, sentences = typing.get_type_hints(options), explained(options)
    for field in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        tail = f" (default: {shown})" if shown not in ("", False) else ""
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        parser.add_argument(
            *sorted(names, reverse=True),
            dest=field.name,
            default=field.default,
            help=(sentences.get(field.name, "") + tail).replace("%", "%%"),
            **kind_of(hints[field.name], field.name),
        )
    values, rest = parser.parse_known_args(list(words))
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}
    made = options(**found)
    if isinstance(made, Common):
        others = {"report": made.report, "markdown": made.markdown}
        check_places(made.out, {name: place for name, place in others.items() if place})
    return made, rest


def check_places(out: str, others: dict[str, str]) -> None:
    """UserError where files can't be written, or the one that is appended to is damaged; nothing was measured then."""
    for name, place in {"out": out, **others}.items():
        path = Path(place).expanduser()
        try:
            if name == "out":
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
                raise OSError("it is a folder" if path.is_dir() else "no such folder, or it is not writable")
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{path} can't be written: {why}; name another file with --{name}") from None
    if Path(out).expanduser().exists():
        read_records(out)


def kind_of(hint: Any, name: str) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if hint is bool:
        return {"action": "store_true"}
    metavar = name.upper()
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", **kind_of(typing.get_args(hint)[0], name)}
    if typing.get_origin(hint) is Literal:
        return {"choices": list(typing.get_args(hint))}
    return {"type": at_least_0 if hint is int else hint, "metavar": metavar}


def at_least_0(word: str) -> int:
    """A whole number that is not negative."""
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of 0 or more")
    return int(word)


def explained(options: type) -> dict[str, str]:
    """The sentences below a dataclass's fields, its parents' too."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                    found[name] = " ".join(sentence.split())
    return found


def refuse(rest: Sequence[str], prog: str) -> None:
    """RecipeError for words that no flag took."""
    if rest:
        raise RecipeError(f"{' '.join(rest)} is no flag of it; `{prog} --help` explains the flags")
