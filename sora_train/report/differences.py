"""Where several runs differ: their recipes and environments, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from sora_train.video import one_line

MOST_KEYS = 2000  # of a recipe; one has two hundred


def differing(trees: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each tree), where these are not all the same; a dash where a tree lacks the key."""
    flat = [dict(islice(flatten(tree), MOST_KEYS)) for tree in trees]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name, "–") for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def flatten(tree: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every leaf of nested mappings with its dotted key; lists and what lies deep are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{one_line(str(key)[:200])}"
        if isinstance(value, dict) and value and depth < 6:
            yield from flatten(value, f"{name}.", depth + 1)
        else:
            yield name, one_line(str(value)[:2000])
