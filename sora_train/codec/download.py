"""`sora download`: the frozen networks of a recipe, from the hub into one folder that every machine can read.

One folder a repository, `DIR/owner--name`, with the repository's own paths and a `sora_download.json` that says which
commit it holds. A finished file is known by its hash, a broken-off one goes on where it stopped (huggingface_hub keeps
no partial file once its process has ended, which for 10 GB is too little; so its `http_get` writes into ours).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sora_train.codec import CodecConfig
from sora_train.codec.folders import STATE, downloaded_folder, hub_id
from sora_train.codec.hub import File, Repository, resolve
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.storage import atomic_write_text, free_bytes, in_bytes


def download(codec: CodecConfig, to: str, extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Fetches what the recipe's keys name on the hub into the folder `to`, having printed a table of it first.

    `extra` are further keys and what they name, such as `{"model.init_from": "owner/name"}`; what is `builtin`, empty
    or a local folder is left out. Returns `{"models": folder, "repositories": {name: what its sora_download.json
    says}}`. Raises UserError, before anything is fetched, where the hub can't be reached, refuses, lacks what is asked
    for, or the disk is too small; and where the connection broke for good or bytes came wrong.
    """
    to = os.path.abspath(to)
    asked = hub_ids({"codec.vae": codec.vae, "codec.text": codec.text, **(extra or {})})
    found = resolve(asked, to)
    print_table(found)
    check_disk(found, to)
    result = {repository.name: fetch(repository, downloaded_folder(to, repository.name)) for repository in found}
    if found:
        log.info("\nAll bytes are right. For the recipe (or as flags, `--codec.models ...`):")
    for repository in found:
        for key in repository.keys if not repository.revision else ():
            log.info(f"{key}: {repository.name}@{repository.commit}")
    log.info(f"codec.models: {to}" if found else "Nothing to download.")
    return {"models": to, "repositories": result}


def hub_ids(names: dict[str, str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """`{repository: (revision, keys)}` of what is on the hub; says what is left out. UserError for two revisions."""
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
                f"{key} asks for {name}, {keys[0]} for {repository}@{before}; one folder holds one revision: name one"
            )
        asked[repository] = (before or revision, (*keys, key))
    return asked


def print_table(found: list[Repository]) -> None:
    for repository in found:
        asked_for = repository.revision or "newest"
        log.info(f"\n{repository.name}  {asked_for} = commit {repository.commit}  ({', '.join(repository.keys)})")
        width = max(len(file.path) for file in repository.files)
        for file in repository.files:
            log.info(f"  {file.path:{width}}  {in_bytes(file.size):>9}  {file.sha256 or f'git {file.blob}'}")


def check_disk(found: list[Repository], to: str) -> None:
    """Prints what is to come and what there is room for; UserError where the disk is too small."""
    total = sum(file.size for repository in found for file in repository.files)
    here = 0
    for repository in found:
        folder = downloaded_folder(to, repository.name)
        for file in repository.files:
            places = (folder / file.path, part_of(folder, file))
            here += min(file.size, max(place.stat().st_size if place.is_file() else 0 for place in places))
    free = free_bytes(to)
    if found:
        log.info(f"\n{in_bytes(total)} in all, {in_bytes(here)} of it here already; {in_bytes(free)} free in {to}\n")
    if total - here > free:
        raise UserError(
            f"{to} has {in_bytes(free)} free, {in_bytes(total - here)} are still to come; name a larger disk"
        )


def fetch(repository: Repository, folder: Path) -> dict[str, Any]:
    """All files of a repository, each verified; returns what `sora_download.json` says of them. Raises UserError."""
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
            told = f"{repository.name} {number}/{len(repository.files)} {file.path} {in_bytes(file.size)}"
            if file.is_at(folder / file.path):
                log.info(f"{told}: is here")
                continue
            log.info(told)
            fetch_file(repository, file, folder)
        state |= {"complete": True, "files": files}
        write_state(folder, state)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error}; mend that or name another folder with --to") from None
    return state


def fetch_file(repository: Repository, file: File, folder: Path) -> None:
    """One file, from where an earlier try broke off; it goes on as long as bytes arrive. Raises UserError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    place, part = folder / file.path, part_of(folder, file)
    place.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repository.name, file.path, revision=repository.commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a part of a compressed answer would be of no use
    while (have := part.stat().st_size if part.is_file() else 0) < file.size or not have:
        with part.open("ab") as out:
            try:
                http_get(url, out, resume_size=have, headers=headers, expected_size=file.size)
                break
            except Exception as error:  # whichever HTTP client, and whatever is wrong with the network
                out.flush()
                if (now := part.stat().st_size) <= have:
                    raise UserError(
                        f"{repository.name}: {file.path} broke off at {in_bytes(now)} of {in_bytes(file.size)}: "
                        f"{error}; the same command goes on from there"
                    ) from None
    if not file.is_at(part):
        part.unlink()
        raise UserError(
            f"{repository.name}: the bytes of {file.path} that came are not those that the hub lists (size or hash); "
            "they were removed. Run the same command again, and if that repeats, look for a proxy in between"
        )
    part.replace(place)


def part_of(folder: Path, file: File) -> Path:
    """Where a file grows until it is whole; the hash in its name keeps revisions apart."""
    place = folder / file.path
    return place.with_name(f"{place.name}.{(file.sha256 or file.blob)[:12]}.part")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    atomic_write_text(folder / STATE, json.dumps(state, indent=2) + "\n")
