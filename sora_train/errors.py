"""Errors that the user can fix, of which the command line prints the message alone, and text for one line."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

Code = Literal[
    "recipe", "media", "shards", "clips", "weights", "codec", "lora", "download", "run", "checkpoint", "resume",
    "exists", "locked", "not_writable", "paths", "storage", "package", "memory", "ray", "cluster", "preflight",
    "workers", "diverged", "compile", "deepspeed", "unsupported", "evaluation",
]  # fmt: skip
"""The kinds of errors. docs/operations.md says what each means and what to do."""


class UserError(ValueError):
    """A file, a folder, a machine or a service is wrong. The message says what, where, and what to do.

    `code` names the kind of error and stays while wording changes: tests and scripts match it.
    """

    def __init__(self, message: str, *, code: Code) -> None:
        super().__init__(message)
        self.code: Code = code

    def __reduce__(self) -> tuple[Any, ...]:  # a pickled exception is otherwise made of its message alone
        return functools.partial(type(self), code=self.code), self.args, self.__dict__


class RecipeError(UserError):
    """The recipe or a flag is wrong. The message names the key, its value, and the choices."""

    def __init__(self, message: str, *, code: Code = "recipe") -> None:
        super().__init__(message, code=code)


class Stopped(Exception):  # noqa: N818  not a failure
    """The run was asked to stop and did. The same command resumes it. The message says at which step."""


def one_line(text: str) -> str:
    """Text on one line: white space becomes a blank; control, format (bidi) and surrogate characters are removed."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(character for character in spaced if unicodedata.category(character)[0] != "C").strip()


def first_of(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list; a thousand may fail alike."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def error_line(error: BaseException) -> str:
    """An error's class and message on one line of at most 300 characters."""
    return f"{type(error).__name__}: {one_line(str(error))}"[:300]
