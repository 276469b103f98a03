"""Where several runs differ: their recipes and environments, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from sora_train.errors import one_line
from sora_train.settings import flatten

MOST_KEYS = 2000  # of a recipe; one has two hundred


def differing(trees: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each tree), where these are not all the same; a dash where a tree lacks the key."""
    flat = [dict(islice(leaves(tree), MOST_KEYS)) for tree in trees]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name, "–") for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def leaves(tree: dict) -> Iterator[tuple[str, str]]:
    """Every leaf of nested mappings with its dotted key, as text for a page."""
    for name, value in flatten(tree):
        yield one_line(name[:200]), one_line(str(value)[:2000])
