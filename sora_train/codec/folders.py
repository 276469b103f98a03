"""The folder of a frozen network: built in, named by the recipe, filled by `sora download`, or in the hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sora_train.codec import BUILTIN
from sora_train.codec.hub import downloaded_folder, hub_id, refusals, wanted_files
from sora_train.errors import UserError

STATE = "sora_download.json"
"""The file in which `sora download` records the repository and revision of a folder."""


def find_folder(name: str, key: str, parts: tuple[str, ...], models: str = "") -> Path:
    """The local folder of the network that the recipe's `key` names: `builtin`, a folder or a hub id.

    A hub id is looked up in the folder `models` first. Of a hub repository only the subfolders `parts` are fetched, or
    else its top level. Raises UserError, with what to do, if the network can't be found.
    """
    if name == "builtin":
        folder = BUILTIN / key.rpartition(".")[2]
        if not folder.is_dir():
            raise UserError(f"{key}: the built-in network is missing ({folder}). Reinstall sora_train", code="package")
        return folder
    if os.path.isdir(name):
        return Path(name)
    repository, revision = hub_id(name, key)
    if models:
        if not os.path.isdir(models):
            raise UserError(
                f"codec.models: no folder {models!r}. Fill it with `sora download RECIPE --to {models}`", code="paths"
            )
        folder = downloaded_folder(models, repository)
        if folder.is_dir():
            check_state(folder, name, revision, key, models)
            return folder
    return _from_hub(repository, revision, key, parts)


def check_state(folder: Path, name: str, revision: str, key: str, models: str) -> None:
    """Raises UserError if `sora download` left the folder incomplete, or with another revision."""
    if not (folder / STATE).is_file():
        return  # filled by hand
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not state["complete"]:
        raise UserError(
            f"{key}: `sora download` was interrupted in {folder}. Run it again with `--to {models}`", code="download"
        )
    commit = state["commit"]
    if revision not in ("", state["revision"]) and not (len(revision) >= 7 and commit.startswith(revision)):
        raise UserError(
            f"{key} is {name}, but {folder} holds {state['revision'] or 'the newest revision of its day'} (commit "
            f"{commit}). Run `sora download` again with `--to {models}`, or set {key} to "
            f"{state['repository']}@{commit}",
            code="download",
        )


def _from_hub(repository: str, revision: str, key: str, parts: tuple[str, ...]) -> Path:
    """The folder in the hub library's cache, filled from the hub if it can be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        with refusals(f"{key}: {repository}", repository, revision):
            info = HfApi().model_info(repository, revision=revision or None, timeout=10)
            wanted = wanted_files([sibling.rfilename for sibling in info.siblings or ()], parts)
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # of whichever HTTP client
        try:
            return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        except Exception:
            raise UserError(
                f"{key}: {repository!r} is neither a folder nor in the local cache, and the hub can't be reached "
                f"({error}). On a machine that reaches it, run `sora download RECIPE --to DIR` and set codec.models: "
                f"DIR; or download the repository and set {key} to its folder; or use `builtin`",
                code="download",
            ) from None
