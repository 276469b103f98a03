"""Errors that the user can fix, of which the command line prints the message alone, and text for one line."""

import re
import unicodedata


class UserError(ValueError):
    """A file, a folder, a machine or a service is wrong. The message says what, where, and what to do.

    `code` is a short name of the kind of error, which stays while wording changes: tests and scripts match it.
    """

    code = "failed"

    def __init__(self, message: str = "", code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class RecipeError(UserError):
    """The recipe or a flag is wrong. The message names the key, its value, and the choices."""

    code = "recipe"


class Stopped(Exception):  # noqa: N818  not a failure
    """The run was asked to stop and did. The same command resumes it. The message says at which step."""


def one_line(text: str) -> str:
    """Text on one line: white space becomes a blank; control, format (bidi) and surrogate characters are removed."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(character for character in spaced if unicodedata.category(character)[0] != "C").strip()


def error_line(error: BaseException) -> str:
    """An error's class and message on one line of at most 300 characters."""
    return f"{type(error).__name__}: {one_line(str(error))}"[:300]
