"""Simulates checkpoints of a thousand ranks on one machine, and prints files, bytes and seconds for each rank.

    python -m tests.drills.many_ranks [--world 1024] [--readers 1024 64 1] [--stages 1 3] [--width 96] [--out FILE.md]

Parameters have the names and the depth of Latte XL; `--width` sets their size (1152 is XL itself). The parts are
written by the project's own `Snapshot`, one after another, and read by its own `load_checkpoint` on ranks that are
threads. What a rank has loaded is compared bit for bit. Seconds are those of this process, which runs all ranks.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from sora_train.model import ModelConfig, build
from sora_train.model.config import PRESETS
from sora_train.train import checkpoint
from sora_train.train.load_checkpoint import read_share, share_of_parts
from tests.drills.simulated import Shapes, Whole, counted_opens, load_in_threads, random_weights, write_part

T = TypeVar("T")
MOST_THREADS = 64
"""Ranks that are run at a time; of more, a sample reads its shares one after another, without the exchange."""


def shapes_of(width: int) -> Shapes:
    """Shapes of Latte XL's parameters at another width."""
    config = replace(ModelConfig(**PRESETS["XL"]), width=width)
    with torch.device("meta"):
        return {name: p.shape for name, p in build(config).named_parameters()}


def timed(act: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    made = act()
    return time.perf_counter() - began, made


def forget() -> None:
    """Makes the next check of a checkpoint open its files, as a new process would."""
    checkpoint.flaw_of_opened.cache_clear()


def simulate(folder: Path, whole: Whole, shapes: Shapes, stage: int, world: int, readers: list[int]) -> list[str]:
    """Rows of the table for one ZeRO stage."""
    writes = [timed(lambda: write_part(folder, whole, shapes, stage, r, world))[0] for r in range(world)]  # noqa: B023
    sizes = [path.stat().st_size for path in folder.glob("part_*")]
    rows = [f"write | {world} | 1 | {max(sizes) / 1e6:.2f} | {statistics.median(writes[1:]):.4f} | {sum(writes):.1f}"]
    forget()
    with counted_opens() as opened:
        first, found = timed(lambda: checkpoint.read_state(folder))
    about = found or {}
    again, _ = timed(lambda: checkpoint.read_state(folder))
    rows.append(f"check, one process | 1 | {sum(map(len, opened.values()))} | - | {first:.3f} | {first:.3f}")
    rows.append(f"check again | 1 | 0 | - | {again:.4f} | {again:.4f}")
    for count in readers:
        if count <= MOST_THREADS:
            took, names = timed(lambda: load_in_threads(folder, whole, shapes, stage, count))  # noqa: B023
            parts = {who: [n for n in held if n[:4] == "part"] for who, held in names.items() if who[:4] == "rank"}
            most = max(map(len, parts.values()))
            rows.append(f"load, all bits compared | {count} | {most} | {most * max(sizes) / 1e6:.2f} | - | {took:.1f}")
            continue
        share = share_of_parts(world, 0, count)
        seconds = [
            timed(lambda: read_share(folder, about, share_of_parts(world, r, count), {}, shapes))[0]  # noqa: B023
            for r in range(0, count, max(1, count // 64))
        ]
        median = statistics.median(seconds)
        rows.append(
            f"load, without exchange | {count} | {len(share)} | {len(share) * max(sizes) / 1e6:.2f} | {median:.4f} | -"
        )
    return [f"| ZeRO {stage} | {row} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=1024)
    parser.add_argument("--readers", type=int, nargs="+", default=[1024, 128, 64, 8, 1])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = shapes_of(options.width)
    whole = random_weights(shapes)
    count = sum(len(tensor) for tensor in whole.values()) // len(checkpoint.KINDS)
    lines = [
        f"{options.world} parts, {len(shapes)} parameters with {count:,} elements, {16 * count / 1e9:.3g} GB",
        "",
        "| stage | what | ranks | files a rank | MB a rank | s a rank | s in all |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for stage in options.stages:
        folder = Path(tempfile.mkdtemp()) / checkpoint.name_of(7)
        try:
            rows = simulate(folder, whole, shapes, stage, options.world, options.readers)
        finally:
            shutil.rmtree(folder.parent)
        lines += rows
        print("\n".join(rows), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
