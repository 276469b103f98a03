"""Drills with bad files and disks: NaN clips, damaged shards and checkpoints, a full disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

from sora_train.data.shards import ShardSet
from sora_train.schema import shard_files
from sora_train.train.checkpoint import complete_checkpoints, read_state
from tests.drills import damage
from tests.drills.commands import end
from tests.drills.history import account, events, losses
from tests.drills.stage import (
    BATCH,
    CLIPS,
    EVERY,
    HALF,
    SEED,
    STEPS,
    Row,
    Stage,
    check_newest,
    check_refusal,
    compare_runs,
    verdict,
)


def poisoned_clip(stage: Stage) -> Row:
    """One clip is NaN: the steps with it, one per epoch, are skipped and named."""
    clips = ShardSet(str(stage.shards))
    bad = set(clips.sample_ids(*clips.rows, [0]))
    return guarded(stage, "a clip of NaN", bad, left_out=[])


def poisoned_stretch(stage: Stage) -> Row:
    """Three consecutive batches are NaN: the run rolls back one checkpoint and skips the batches since."""
    first = EVERY + 2  # counted from 0, so that two good steps after the checkpoint of step 6 are undone too
    bad = damage.stretch(stage.shards, BATCH, SEED, STEPS, first=first, length=3)
    return guarded(stage, "three batches of NaN in a row", bad, left_out=list(range(EVERY, first + 3)))


def guarded(stage: Stage, fault: str, bad: set[str], left_out: list[int]) -> Row:
    """A run on shards in which these clips are NaN. It equals the undisturbed one until the guard acts."""
    name = f"poisoned-{len(bad)}"
    shards = damage.poisoned(stage.shards, stage.root / f"shards-{name}", bad)
    command = stage.train(name, "--data.output", str(shards), "--train.guard_max_consecutive", "3")
    code, run = end(command), command.run
    state, skips, wrong = read_state(complete_checkpoints(run / "checkpoints")[-1][1]) or {}, events(run, "skipped"), []
    wrong += [f"{clip} is not named" for clip in bad if not any(clip in event["reason"] for event in skips)]
    wrong += [] if all(loss < 10 for loss in losses(run).values()) else ["it does not end healthy"]
    wrong += [] if state["skipped"] == left_out else [f"the batches {state['skipped']} are left out, not {left_out}"]
    count, named = STEPS - state["updates"], account(run, stage.shards).named
    remark = (
        f"{count} steps skipped, {state['rollbacks']} rollbacks, {len(left_out)} batches left out, {named} clips named"
    )
    if not left_out and count != STEPS * BATCH // CLIPS:
        wrong.append(f"{count} steps are skipped, not one an epoch")
    until = min([*(event["step"] - 1 for event in skips), *left_out])
    return compare_runs(stage, fault, run, [code], want=[0], until=until, wrong=wrong, remark=remark)


def shard_truncated(stage: Stage) -> Row:
    return bad_shard(stage, "a data shard cut short", "shard-truncated", damage.cut_short)


def shard_flipped(stage: Stage) -> Row:
    return bad_shard(stage, "a flipped byte in a data shard", "shard-flipped", damage.flip_in_latents)


def bad_shard(stage: Stage, fault: str, name: str, harm: Callable[[Path], None]) -> Row:
    """A half run resumes with a damaged shard, gives up, and resumes once the shard is restored."""
    run, shards = stage.half(name), stage.root / name
    shutil.copytree(stage.shards, shards)
    shard = Path(shard_files(str(shards))[0])
    harm(shard)
    command = stage.train(name, "--data.output", str(shards))
    code = end(command)
    wrong = check_refusal(command, code, str(shard), "sora prep") + check_newest(run, HALF)
    again = end(stage.train(name))
    return compare_runs(stage, fault, run, [code, again], want=[1, 0], wrong=wrong)


def checkpoint_truncated(stage: Stage) -> Row:
    """The newest checkpoint is incomplete: the run resumes from the previous one."""
    run = stage.half("checkpoint-truncated")
    damage.cut_short(newest_part(run))
    code = end(stage.train("checkpoint-truncated"))
    resumed = [event["step"] for event in events(run, "resume")]
    wrong = [] if resumed == [HALF - EVERY] else [f"resumed from {resumed}, not {HALF - EVERY}"]
    return compare_runs(stage, "a checkpoint's part cut short", run, [code], want=[0], wrong=wrong)


def checkpoint_flipped(stage: Stage) -> Row:
    """A checkpoint with a wrong checksum is refused; once removed, the run resumes from the previous one."""
    run = stage.half("checkpoint-flipped")
    part = newest_part(run)
    damage.flip(part, part.stat().st_size - 1000)  # in a tensor: these follow the header
    command = stage.train("checkpoint-flipped")
    code = end(command)
    wrong = check_refusal(command, code, str(part), f"remove {part.parent}")
    shutil.rmtree(part.parent)
    wrong += check_newest(run, HALF - EVERY)
    again = end(stage.train("checkpoint-flipped"))
    return compare_runs(stage, "a flipped byte in a checkpoint's part", run, [code, again], want=[1, 0], wrong=wrong)


def newest_part(run: Path) -> Path:
    return sorted(complete_checkpoints(run / "checkpoints")[-1][1].glob("part_*"))[-1]


def disk_full(stage: Stage) -> Row:
    """The disk is full at the second checkpoint; once there is space the same command resumes."""
    fault, disk = "a full disk during a checkpoint", stage.root / "small-disk"
    try:
        with damage.small_disk(disk):
            run = stage.half("disk-full", disk)
            before = damage.used(disk)
            size = sum(file.stat().st_size for file in complete_checkpoints(run / "checkpoints")[-1][1].iterdir())
            room = before + size + size // 2
            damage.remount(disk, f"size={room}")
            command = stage.train("disk-full", "--no-preflight", output=disk)  # which would refuse to start
            code = end(command)
            wrong = check_refusal(command, code, "can't be written", "Make room") + check_newest(run, HALF + EVERY)
            drafts = [path.name for path in run.glob("checkpoints/*/.unfinished-*")]
            wrong += [f"left behind: {drafts}"] if drafts else []
            damage.remount(disk, "size=256m")
            again = end(stage.train("disk-full", output=disk))
            return compare_runs(stage, fault, run, [code, again], want=[1, 0], wrong=wrong)
    except PermissionError as error:
        return Row(fault, 0, verdict=f"skipped: {error}")


def folder_unwritable(stage: Stage) -> Row:
    """The run's folder is on a disk that became read-only, or is a file."""
    wrong, exits = [], []
    blocked = stage.root / "a-file"
    blocked.write_text("no folder")
    command = stage.train("blocked", output=blocked)
    exits.append(end(command))
    wrong += check_refusal(command, exits[-1], "can't be written", "--train.output")
    remark = "a file in its place, and a read-only disk"
    try:
        with damage.small_disk(disk := stage.root / "read-only-disk"):
            run = stage.half("read-only", disk)
            damage.remount(disk, "ro")
            command = stage.train("read-only", output=disk)
            exits.append(end(command))
            wrong += check_refusal(command, exits[-1], "can't be written", "--train.output") + check_newest(run, HALF)
    except PermissionError as error:
        remark = f"a file in its place; read-only disk skipped: {error}"
    return Row(
        "an unwritable run folder", len(exits), ", ".join(map(str, exits)), 0, 0, 0, "—", *verdict(wrong, remark)
    )
