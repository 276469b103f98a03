"""What becomes of a bench's tables: printed, appended as JSON lines, and if asked written as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sora_train.bench.core import Row, Table, append, markdown, provenance
from sora_train.bench.options import Common
from sora_train.errors import UserError


def finish(tables: Sequence[Table], options: Common, words: Sequence[str]) -> int:
    """Says and keeps what was measured; returns 1 where something failed, else 0.

    Raises UserError where a file can't be written.
    """
    about = provenance(words)
    print("\n\n".join(map(markdown, tables)), flush=True)
    append(tables, about, options.out)
    if options.markdown:
        write_markdown(tables, about, options.markdown)
    if options.report:
        from sora_train.bench.page import write_page  # needs matplotlib and jinja2

        write_page(options.out, options.report)
    return int(any(table.failed for table in tables))


def write_markdown(tables: Sequence[Table], about: Row, path: str) -> None:
    """The tables under where they come from."""
    text = f"`{about['command']}`{origin(about)}\n\n" + "\n\n".join(map(markdown, tables)) + "\n"
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}; name another with --markdown") from None


def origin(about: Row) -> str:
    """Commit, date, hardware and versions in two lines, to stand behind the command."""
    machine = about["hardware"]
    gpus = ", ".join(machine.get("gpus", []))
    where = f"{machine['cores']} cores of {machine['cpu']}, {machine.get('memory_gb', '?')} GB" + (
        f"; {gpus}, CUDA {machine.get('cuda')}" if gpus else "; no GPU"
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f", commit {about['commit'] or 'unknown'}, {about['date']}; {where}\n\n{versions}"
