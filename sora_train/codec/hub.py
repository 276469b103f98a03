"""What the hub says of a repository before a byte of it is fetched: commit, wanted files, their sizes and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sora_train.codec.folders import PARTS, downloaded_folder, wanted_files
from sora_train.errors import UserError

BY_HAND = {
    "codec.vae": "vae/config.json and vae/*.safetensors",
    "codec.text": "text_encoder/*.json, text_encoder/*.safetensors, tokenizer/*.json and, if it is there, "
    "tokenizer/spiece.model",
}


@dataclass(frozen=True)
class File:
    """A file of a repository; `blob` is git's own hash, for those that are not in large-file storage."""

    path: str
    size: int
    sha256: str
    blob: str

    def is_at(self, place: Path) -> bool:
        """Whether the file is there with every byte right; reads all of it."""
        if not place.is_file() or place.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)
        with place.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == (self.sha256 or self.blob)


@dataclass(frozen=True)
class Repository:
    """A repository at a commit: `keys` of the recipe that name it, the revision they ask for ("": the newest)."""

    name: str
    keys: tuple[str, ...]
    revision: str
    commit: str
    files: tuple[File, ...]


def resolve(asked: dict[str, tuple[str, tuple[str, ...]]], to: str) -> list[Repository]:
    """The commit and the wanted files of each repository. UserError where the hub can't be reached or refuses."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    found = []
    for name, (revision, keys) in asked.items():
        where, page = f"{' and '.join(keys)}: {name}", f"{constants.ENDPOINT}/{name}"
        try:
            info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=10)
            found.append(Repository(name, keys, revision, info.sha or "", wanted_of(info.siblings or [], keys, where)))
            get_hf_file_metadata(hf_hub_url(name, found[-1].files[0].path, revision=info.sha), timeout=10)
        except UserError:
            raise
        except GatedRepoError:
            raise UserError(
                f"{where} is gated: accept its terms at {page} with your account, then `hf auth login` or set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise UserError(
                f"{where} is not on the hub, or private: check the name at {page}; for a private repository "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise UserError(f"{where} has no revision {revision!r}; see {page}/commits for those it has") from None
        except Exception as error:  # whichever HTTP client, and whatever is wrong with the network
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise UserError(f"{where}: the hub refuses: {error}") from None
            raise UserError(by_hand(asked, to, constants.ENDPOINT, error)) from None
    return found


def wanted_of(siblings: list[Any], keys: tuple[str, ...], where: str) -> tuple[File, ...]:
    """Files that the keys' networks need; UserError where their weights are only pickled."""
    by_name = {sibling.rfilename: sibling for sibling in siblings}
    wanted: dict[str, None] = {}
    for key in keys:
        files = wanted_files(list(by_name), PARTS.get(key, ("transformer",)))
        if not any(file.endswith(".safetensors") for file in files):
            raise UserError(
                f"{where} has no safetensors for {key}: pickled weights are never loaded; name a repository that has, "
                "or convert them once with `model.save_pretrained(folder)` and name that folder"
            )
        wanted |= dict.fromkeys(files)
    if odd := [file for file in wanted if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts]:
        raise UserError(f"{where} has a file named {odd[0]!r}, which would lie outside its folder")
    return tuple(
        File(file, by_name[file].size, by_name[file].lfs.sha256 if by_name[file].lfs else "", by_name[file].blob_id)
        for file in sorted(wanted)
    )


def by_hand(asked: dict[str, tuple[str, tuple[str, ...]]], to: str, endpoint: str, error: Exception) -> str:
    """What to do where no hub can be reached: a line per network."""
    lines = [f"the hub ({endpoint}) can't be reached: {error}", "Fill these folders by hand, then set codec.models:"]
    for name, (revision, keys) in asked.items():
        for key in keys:
            folder = downloaded_folder(to, name)
            lines.append(
                f"  {key}: {folder}{' (is there)' if folder.is_dir() else ''}: "
                f"{BY_HAND.get(key, 'transformer/*.json and transformer/*.safetensors')} "
                f"(or, where it has no such subfolder, the top level) of {endpoint}/{name}/tree/{revision or 'main'}"
            )
    return "\n".join([*lines, f"codec.models: {to}"])
