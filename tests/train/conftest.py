"""What the tests of training share: several gloo ranks that train in processes of their own."""

import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

End = Callable[[], tuple[list[int], list[str]]]
"""Waits for the ranks of one start; gives their exit codes and what each printed."""
Start = Callable[[int, Path, list[dict]], End]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(world, shards, tasks) starts that many ranks with the tasks of `ranks.py`, and returns at once an `End`.

    Several groups may run at a time. What still runs after 200 s is killed, and shows as exit code -9.
    """
    root, numbers = tmp_path_factory.mktemp("ranks"), itertools.count()
    context = multiprocessing.get_context("forkserver")  # which imports torch and DeepSpeed once, for all ranks
    context.set_forkserver_preload(["ranks", "deepspeed", "torch._dynamo", "pyarrow.parquet"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.ensure_running()
    started: list[multiprocessing.process.BaseProcess] = []

    def begin(world: int, shards: Path, tasks: list[dict]) -> End:
        import ranks

        group = root / str(next(numbers))
        group.mkdir()
        logs = [group / f"rank{rank}.log" for rank in range(world)]
        given = world, group / "store", str(shards), tasks
        processes = [context.Process(target=ranks.main, args=(rank, *given, log)) for rank, log in enumerate(logs)]
        for process in processes:
            process.start()
        started.extend(processes)

        def end() -> tuple[list[int], list[str]]:
            for process in processes:
                process.join(timeout=200)
                if process.is_alive():
                    process.kill()
                    process.join()
            return [process.exitcode for process in processes], [log.read_text(errors="replace") for log in logs]

        return end

    yield begin
    for process in started:
        if process.is_alive():
            process.kill()


@pytest.fixture(scope="session")
def alive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of weights to start from, none of which is zero: from the first step on, all matter to the loss."""
    import ranks
    import torch

    from sora_train.model import Latte
    from sora_train.model.convert import to_diffusers

    torch.manual_seed(5)
    model = Latte(ranks.MODEL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("alive")
    to_diffusers(model, folder)
    return str(folder)


@pytest.fixture(scope="session")
def poisoned() -> Callable[[Path, Path, Sequence[int], float], Path]:
    """Writes a copy of shards of one bucket in which the latents of some rows are multiplied."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(shards: Path, folder: Path, rows: Sequence[int], factor: float) -> Path:
        shutil.copytree(shards, folder)
        before = 0
        for file in sorted(folder.glob("bucket=*/*.parquet")):
            table = pq.ParquetFile(file).read()
            clips = table.to_pylist()
            for row, clip in enumerate(clips, before):
                if row in rows:
                    latents = np.frombuffer(clip["latents"], np.float16)
                    clip["latents"] = (latents * np.float16(factor)).tobytes()
            before += len(clips)
            pq.write_table(pa.Table.from_pylist(clips, schema=table.schema), file, row_group_size=8)
        return folder

    return write
