"""Loading a network does not import torchao."""

import importlib.util
import sys

import pytest

from sora_train.codec.imports import without_torchao


def test_torchao_is_hidden_while_networks_are_loaded_and_found_afterwards(monkeypatch):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    with without_torchao(), without_torchao():
        assert importlib.util.find_spec("torchao") is None
    assert importlib.util.find_spec("torchao") is not None


def test_a_torchao_that_is_in_use_stays():
    used = sys.modules.setdefault("torchao", sys)
    try:
        with without_torchao():
            assert sys.modules["torchao"] is used
    finally:
        if used is sys:
            del sys.modules["torchao"]
