"""Reads a run's offline wandb files with wandb's own protobufs; wandb's own reader exists only in Go.

The files are logs in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind 7 bytes of
wandb's own. They are written in blocks of 32 KB, so a killed process loses its last rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, OWN = 32768, 7, 7
WHOLE, LAST = 1, 4  # kinds of parts that end a record


def rows(run: Path) -> Iterator[dict[str, Any]]:
    """Rows of history of all of a run's offline files, in order of time; nested keys are joined by a dot."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(data: bytes) -> Iterator[bytes]:
    """The complete records of a file; one that was cut short is ignored."""
    at, parts = OWN, b""
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:  # a block's last bytes that hold no header are empty
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        parts, at = parts + data[at : at + length], at + length
        if kind in (WHOLE, LAST) and at <= len(data):
            yield parts
            parts = b""
