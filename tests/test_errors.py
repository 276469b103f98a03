"""Errors for the user, and their codes."""

import pickle
import re
from pathlib import Path
from typing import get_args

import pytest

from sora_train.errors import Code, RecipeError, UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("error", [UserError("the disk is full", code="not_writable"), RecipeError("no such key")])
def test_an_error_survives_the_way_between_processes(error: UserError) -> None:
    error.add_note("on rank 3")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.code, arrived.__notes__) == (str(error), error.code, ["on rank 3"])


def test_the_docs_list_every_code_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## Exit and error codes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(get_args(Code))


def test_every_code_is_in_use() -> None:
    source = "".join(file.read_text() for name in ("sora_train", "data_prep") for file in (ROOT / name).rglob("*.py"))
    assert not [
        code for code in get_args(Code) if not re.search(rf'code(: Code)? ?= ?(".*" if .* else )?"{code}"', source)
    ]
