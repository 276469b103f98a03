"""The folder of a frozen network: embedded, named by the recipe, filled by `sora download`, or in the hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sora_train.codec import BUILTIN
from sora_train.errors import UserError

PARTS = {"codec.vae": ("vae",), "codec.text": ("text_encoder", "tokenizer")}
"""Subfolders of a whole pipeline that hold what a key of the recipe names."""
STATE = "sora_download.json"
"""What `sora download` leaves beside a network's files: which repository and revision they are."""


def find_folder(name: str, key: str, parts: tuple[str, ...], models: str = "") -> Path:
    """The local folder of the network that the recipe's `key` names: `builtin`, a folder, or a hub id.

    A hub id is looked for in the folder `models` first. Of a hub repository only the first of the subfolders `parts`
    that is there is fetched, or else its top level. Raises UserError, with what to do, where nothing can be had.
    """
    if name == "builtin":
        folder = BUILTIN / key.rpartition(".")[2]
        if not folder.is_dir():
            raise UserError(f"{key}: the embedded network is missing ({folder}); reinstall sora_train or name a folder")
        return folder
    if os.path.isdir(name):
        return Path(name)
    repository, revision = hub_id(name, key)
    if models:
        if not os.path.isdir(models):
            raise UserError(f"codec.models: no folder {models!r}; fill it with `sora download RECIPE --to {models}`")
        folder = downloaded_folder(models, repository)
        if folder.is_dir():
            check_state(folder, name, revision, key, models)
            return folder
    return _from_hub(repository, revision, key, parts)


def hub_id(name: str, key: str) -> tuple[str, str]:
    """Repository and revision ("" where none is named) of `owner/name@revision`; UserError where it is none."""
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{key}: no folder {name!r}; give `builtin`, an existing folder, or a hub id such as `owner/name`"
        )
    return repository, revision


def downloaded_folder(models: str, repository: str) -> Path:
    return Path(models) / repository.replace("/", "--")


def check_state(folder: Path, name: str, revision: str, key: str, models: str) -> None:
    """UserError where `sora download` left another revision in the folder, or broke off; one filled by hand passes."""
    if not (folder / STATE).is_file():
        return
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not state["complete"]:
        raise UserError(f"{key}: `sora download` broke off in {folder}; run it again with `--to {models}`")
    commit = state["commit"]
    if revision not in ("", state["revision"]) and not (len(revision) >= 7 and commit.startswith(revision)):
        raise UserError(
            f"{key} asks for {name}, but {folder} holds {state['revision'] or 'the newest of its day'} (commit "
            f"{commit}); run `sora download` again with `--to {models}`, or set {key} to "
            f"{state['repository']}@{commit}"
        )


def wanted_files(files: list[str], parts: tuple[str, ...]) -> list[str]:
    """Of a repository's files those of the subfolders `parts`, or else of its top level, that a network needs."""
    inside = [file for file in files if file.split("/")[0] in parts] or [file for file in files if "/" not in file]
    return [file for file in inside if file.endswith((".json", ".safetensors", "spiece.model")) and is_wanted(file)]


def is_wanted(file: str) -> bool:
    return not any(variant in file for variant in (".fp16.", ".fp16-", ".non_ema.", "flax"))


def _from_hub(repository: str, revision: str, key: str, parts: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repository, revision=revision or None, timeout=10)
        wanted = wanted_files([sibling.rfilename for sibling in info.siblings or ()], parts)
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: the hub has no repository {repository!r} that you may read; use `builtin` or a folder"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{key}: the hub's {repository!r} has no revision {revision!r}; name another") from None
    except Exception as error:  # whichever HTTP client the hub's library is on, and whatever is wrong with the network
        try:
            return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        except Exception:
            places = " and ".join(f"`{part}/`" for part in parts)
            raise UserError(
                f"{key}: {repository!r} is neither a folder nor in the local cache, and the hub can't be reached "
                f"({error}); where it can, `sora download RECIPE --to DIR` fills a folder for `codec.models: DIR`, or "
                f"download the repository (of a whole pipeline only {places}) and set {key} to its folder, or use "
                "`builtin`"
            ) from None
