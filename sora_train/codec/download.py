"""`sora download`: the frozen networks of a recipe, from the hub into one folder that every machine can read.

Each repository gets a folder, `DIR/owner--name`, with the repository's own paths and a `sora_download.json` that names
the commit. Complete files are recognised by their hash and an interrupted file is resumed. (huggingface_hub keeps no
partial file after its process has ended, so its `http_get` writes into ours.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sora_train.codec import CodecConfig
from sora_train.codec.folders import STATE
from sora_train.codec.hub import File, Repository, downloaded_folder, hub_id, look_up
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.storage import atomic_write_text, free_bytes, in_bytes


def download(codec: CodecConfig, to: str, extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Prints a table of what the recipe's keys name on the hub, and fetches it into the folder `to`.

    `extra` has further keys with what they name, such as `{"model.init_from": "owner/name"}`. Returns `{"models":
    folder, "repositories": {name: content of its sora_download.json}}`. Raises UserError before anything is fetched if
    the hub can't be reached, refuses or lacks a file, or the disk is too small; and later if the connection is lost or
    bytes are wrong.
    """
    to = os.path.abspath(to)
    found = look_up(hub_ids({"codec.vae": codec.vae, "codec.text": codec.text, **(extra or {})}), to)
    for repository in found:
        log_files(repository)
    check_disk(found, to)
    result = {repository.name: fetch(repository, downloaded_folder(to, repository.name)) for repository in found}
    if found:
        log.info("\nAll files are complete. For the recipe (or as flags, `--codec.models ...`):")
    for repository in found:
        for key in repository.keys if not repository.revision else ():
            log.info(f"{key}: {repository.name}@{repository.commit}")
    log.info(f"codec.models: {to}" if found else "Nothing to download.")
    return {"models": to, "repositories": result}


def hub_ids(names: dict[str, str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """`{repository: (revision, keys)}` of the names that are hub ids. Raises UserError for two revisions of one."""
    asked: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, name in names.items():
        if name in ("", "builtin") or os.path.isdir(name):
            reason = "comes with sora_train" if name == "builtin" else "is a folder" if name else "is not set"
            log.info(f"{key}: {name + ' ' if name else ''}{reason}, nothing to fetch")
            continue
        repository, revision = hub_id(name, key)
        before, keys = asked.get(repository, ("", ()))
        if before and revision and before != revision:
            raise UserError(
                f"{key} is {name}, but {keys[0]} is {repository}@{before}; one folder holds one revision. Use one",
                code="download",
            )
        asked[repository] = (before or revision, (*keys, key))
    return asked


def log_files(repository: Repository) -> None:
    """A table of a repository's files."""
    revision, keys = repository.revision or "newest", ", ".join(repository.keys)
    log.info(f"\n{repository.name}  {revision} = commit {repository.commit}  ({keys})")
    width = max(len(file.path) for file in repository.files)
    for file in repository.files:
        log.info(f"  {file.path:{width}}  {in_bytes(file.size):>9}  {file.sha256 or f'git {file.blob}'}")


def check_disk(found: list[Repository], to: str) -> None:
    """Logs how many bytes are needed and free. Raises UserError if the disk is too small."""
    total = present = 0
    for repository in found:
        folder = downloaded_folder(to, repository.name)
        for file in repository.files:
            places = (folder / file.path, partial(folder, file))
            total += file.size
            present += min(file.size, max(place.stat().st_size if place.is_file() else 0 for place in places))
    free = free_bytes(to)
    if found:
        log.info(f"\n{in_bytes(total)} in all, {in_bytes(present)} already there; {in_bytes(free)} free in {to}\n")
    if total - present > free:
        raise UserError(
            f"{to} has {in_bytes(free)} free, but {in_bytes(total - present)} are missing. Use a larger disk",
            code="not_writable",
        )


def fetch(repository: Repository, folder: Path) -> dict[str, Any]:
    """Fetches and verifies all files of a repository; returns the content of its `sora_download.json`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads((folder / STATE).read_text(encoding="utf-8")) if (folder / STATE).is_file() else {}
        files = {file.path: {"size": file.size, "sha256": file.sha256} for file in repository.files}
        if before.get("commit") == repository.commit:
            files = before["files"] | files
        for stale in before.get("files", {}).keys() - files.keys():
            (folder / stale).unlink(missing_ok=True)
        state = {"repository": repository.name, "revision": repository.revision, "commit": repository.commit}
        write_state(folder, state | {"complete": False, "files": files})
        for number, file in enumerate(repository.files, 1):
            line = f"{repository.name} {number}/{len(repository.files)} {file.path} {in_bytes(file.size)}"
            complete = file.is_at(folder / file.path)
            log.info(line + (": already there" if complete else ""))
            if not complete:
                fetch_file(repository, file, folder)
        state |= {"complete": True, "files": files}
        write_state(folder, state)
    except OSError as error:
        raise UserError(
            f"{folder} can't be written: {error}. Fix that, or name another folder with --to", code="not_writable"
        ) from None
    return state


def fetch_file(repository: Repository, file: File, folder: Path) -> None:
    """Fetches one file, resumes a partial one, and retries as long as bytes arrive."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    place, part = folder / file.path, partial(folder, file)
    place.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repository.name, file.path, revision=repository.commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a partial compressed answer can't be resumed
    while (have := part.stat().st_size if part.is_file() else 0) < file.size or not have:
        with part.open("ab") as out:
            try:
                http_get(url, out, resume_size=have, headers=headers, expected_size=file.size)
                break
            except Exception as error:  # of whichever HTTP client
                out.flush()
                if (now := part.stat().st_size) <= have:
                    raise UserError(
                        f"{repository.name}: {file.path} was interrupted at {in_bytes(now)} of {in_bytes(file.size)}: "
                        f"{error}. Run the same command again to resume",
                        code="download",
                    ) from None
    if not file.is_at(part):
        part.unlink()
        raise UserError(
            f"{repository.name}: {file.path} arrived with another size or hash than the hub lists, and was removed. "
            "Run the same command again; if that repeats, look for a proxy in between",
            code="download",
        )
    part.replace(place)


def partial(folder: Path, file: File) -> Path:
    """The path of a partial file. It contains the hash, so revisions don't mix."""
    place = folder / file.path
    return place.with_name(f"{place.name}.{(file.sha256 or file.blob)[:12]}.part")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    atomic_write_text(folder / STATE, json.dumps(state, indent=2) + "\n")
