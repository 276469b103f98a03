"""What stands behind stdout and stderr never decides what a command does: real processes, real pipes and devices."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

SORA = [sys.executable, "-m", "sora_train.cli"]
WORK = (
    "import sys; from pathlib import Path; from sora_train.terminal import print_result, protect_streams\n"
    "protect_streams()\n"
    "for i in range(3000): print('… ä', i, flush=True); print('… ä', i, file=sys.stderr, flush=True)\n"
    "Path(sys.argv[1]).write_text('done')"
)


def works(done: Path, shell: str, **options) -> bool:
    """Whether a process that prints much comes to its end."""
    command = f'"{sys.executable}" -c "$WORK" "{done}" {shell}'
    subprocess.run(["bash", "-c", command], env={**os.environ, "WORK": WORK, **options}, timeout=60, check=False)
    return done.exists()


@pytest.mark.parametrize(
    "shell",
    ["2>&1 | head -1 >/dev/null", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>/dev/null", "2>&1 | cat > /dev/null"],
)
def test_a_stream_that_is_gone_or_full_ends_no_work(tmp_path: Path, shell: str):
    assert works(tmp_path / "done", shell)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_that_lacks_a_character_ends_no_work(tmp_path: Path, encoding: str):
    assert works(tmp_path / "done", f"> {tmp_path}/out 2>&1", PYTHONIOENCODING=encoding)
    assert rb"\u2026 " in (tmp_path / "out").read_bytes()


def test_a_file_opened_later_never_replaces_a_closed_stdout(tmp_path: Path):
    program = (
        "import os, sys; from sora_train.terminal import protect_streams\n"
        "protect_streams(); file = open(sys.argv[1], 'w'); os.write(1, b'printed'); file.write('content')"
    )
    subprocess.run(["bash", "-c", f'"$0" -c "$1" {tmp_path}/file >&-', sys.executable, program], check=True)
    assert (tmp_path / "file").read_text() == "content"


def test_a_result_that_stdout_can_not_take_is_an_error():
    done = subprocess.run(["bash", "-c", '"$@" > /dev/full', "_", *SORA, "--help"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "sora --help: stdout can't be written: No space left on device. Free the disk, or send the output elsewhere "
        "(error code: not_writable)\n"
    )
    done = subprocess.run(["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "_", *SORA, "--help"], check=True)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "SHARDS"], ["inspect", "SHARDS", "--json"]])
def test_a_result_for_a_closed_stdout_is_an_error(tiny_shards: Path, words: list[str]):
    command = [*SORA, *(str(tiny_shards) if word == "SHARDS" else word for word in words)]
    done = subprocess.run(["bash", "-c", '"$@" >&-', "_", *command], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"sora {words[0]}: stdout can't be written: it is closed. Send the output elsewhere "
        "(error code: not_writable)\n"
    )


@pytest.mark.parametrize(("before", "code"), [("", -signal.SIGTERM), ("trap '' HUP;", 0)])
def test_a_hangup_ends_a_command_as_sigterm_does_unless_ignored(before: str, code: int):
    """`nohup` ignores the signal before it starts a command, as `trap ''` does."""
    program = (
        "import os, signal, time; from sora_train.terminal import protect_streams\n"
        "protect_streams(); os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.1)"
    )
    shell = f'{before} exec "$0" -c "$1"'
    command = ["bash", "-c", shell, sys.executable, program]
    default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the test run itself may be under `nohup`
    assert subprocess.run(command, preexec_fn=default).returncode == code
