"""Errors that the user can mend. The command line prints their message and nothing else."""


class UserError(ValueError):
    """Something outside the code is wrong: a file, a folder, a place. The message says what, where, and what to do."""


class RecipeError(UserError):
    """The recipe or a flag is wrong. The message names the key, what it got, and the choices."""


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """The run was asked to end and did; the same command goes on. The message says where it stands."""
