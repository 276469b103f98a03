"""Repositories on the hub: ids, the files that a network needs, their sizes and hashes, and the hub's refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sora_train.errors import UserError

PARTS = {
    "codec.vae": ("vae",),
    "codec.text": ("text_encoder", "tokenizer"),
    "model.init_from": ("transformer", "scheduler", "model_index.json"),
}
"""Parts of a whole pipeline that hold what a recipe's key names. `sora sample` of the pipeline needs the scheduler."""


@dataclass(frozen=True)
class File:
    """A file of a repository. `blob` is git's hash, for files that are not in large-file storage."""

    path: str
    size: int
    sha256: str
    blob: str

    def is_at(self, place: Path) -> bool:
        """Whether the complete file is at a path; reads all of it."""
        if not place.is_file() or place.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)
        with place.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == (self.sha256 or self.blob)


@dataclass(frozen=True)
class Repository:
    """A repository at a commit: the recipe's `keys` that name it, and their revision ("": the newest)."""

    name: str
    keys: tuple[str, ...]
    revision: str
    commit: str
    files: tuple[File, ...]


def hub_id(name: str, key: str) -> tuple[str, str]:
    """Repository and revision ("" if not given) of `owner/name@revision`. Raises UserError for anything else."""
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{key}: no folder {name!r}. Use `builtin`, an existing folder, or a hub id: `owner/name`", code="weights"
        )
    return repository, revision


def wanted_files(files: list[str], parts: tuple[str, ...]) -> list[str]:
    """The files that a network needs: those in the subfolders `parts`, or in the top level if there are none."""
    inside = [file for file in files if file.split("/")[0] in parts] or [file for file in files if "/" not in file]
    return [file for file in inside if file.endswith((".json", ".safetensors", "spiece.model")) and is_wanted(file)]


def is_wanted(file: str) -> bool:
    return not any(variant in file for variant in (".fp16.", ".fp16-", ".non_ema.", "flax"))


@contextmanager
def refusals(where: str, name: str, revision: str) -> Iterator[None]:
    """Turns the hub's refusals into a UserError with what to do. Network errors pass through."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except GatedRepoError:
        advice = f"is gated. Accept its terms at {page} with your account, then `hf auth login` or set HF_TOKEN"
    except RepositoryNotFoundError:
        advice = f"is not on the hub, or private. Check {page}; if it is private, `hf auth login` or set HF_TOKEN"
    except RevisionNotFoundError:
        advice = f"has no revision {revision!r}. {page}/commits lists those it has"
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise
        advice = f"can't be read: the hub refuses ({error})"
    else:
        return
    raise UserError(f"{where} {advice}", code="download")


def look_up(asked: dict[str, tuple[str, tuple[str, ...]]], to: str) -> list[Repository]:
    """Commit and wanted files of each repository. Raises UserError if the hub refuses or can't be reached."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

    found = []
    for name, (revision, keys) in asked.items():
        where = f"{' and '.join(keys)}: {name}"
        try:
            with refusals(where, name, revision):
                info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=10)
                files = list_files(info.siblings or [], keys, where)
                # The facts of a gated repository are public; its files are not.
                get_hf_file_metadata(hf_hub_url(name, files[0].path, revision=info.sha), timeout=10)
        except UserError:
            raise
        except Exception as error:  # of whichever HTTP client
            raise UserError(by_hand(asked, to, constants.ENDPOINT, error), code="download") from None
        found.append(Repository(name, keys, revision, info.sha or "", files))
    return found


def list_files(siblings: list[Any], keys: tuple[str, ...], where: str) -> tuple[File, ...]:
    """The files that the keys' networks need. Raises UserError if the weights are only pickled."""
    by_name = {sibling.rfilename: sibling for sibling in siblings}
    wanted: set[str] = set()
    for key in keys:
        files = wanted_files(list(by_name), PARTS[key])
        if not any(file.endswith(".safetensors") for file in files):
            raise UserError(
                f"{where} has no safetensors for {key}: pickled weights are never loaded. Name another repository, or "
                "convert the weights once with `model.save_pretrained(folder)` and name that folder",
                code="weights",
            )
        wanted.update(files)
    if odd := [file for file in wanted if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts]:
        raise UserError(f"{where} has a file named {odd[0]!r}, which is outside its folder", code="weights")
    return tuple(
        File(file, by_name[file].size, by_name[file].lfs.sha256 if by_name[file].lfs else "", by_name[file].blob_id)
        for file in sorted(wanted)
    )


def by_hand(asked: dict[str, tuple[str, tuple[str, ...]]], to: str, endpoint: str, error: Exception) -> str:
    """What to copy where if the hub can't be reached: a line per network."""
    lines = [f"the hub ({endpoint}) can't be reached: {error}", "Fill these folders by hand, then set codec.models:"]
    for name, (revision, keys) in asked.items():
        folder = downloaded_folder(to, name)
        for key in keys:
            parts = " and ".join(part if "." in part else f"{part}/" for part in PARTS[key])
            lines.append(
                f"  {key}: {folder}{' (exists)' if folder.is_dir() else ''}: *.json, *.safetensors, spiece.model of "
                f"{parts} (or, without subfolders, of the top level) in {endpoint}/{name}/tree/{revision or 'main'}"
            )
    return "\n".join([*lines, f"codec.models: {to}"])


def downloaded_folder(models: str, repository: str) -> Path:
    return Path(models) / repository.replace("/", "--")
