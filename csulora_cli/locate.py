"""From what the user typed to a folder on disk: a local path, or a download from the Hub.

A local path wins over a Hub id. huggingface_hub does the cache, the token, offline mode and the endpoint.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

from csulora_cli.errors import HubError, InputError, UsageError
from csulora_cli.files import is_regular
from csulora_cli.text import printable

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.*",
    "adapters.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
)
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
CODE_FILES = ("*.py",)
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.jinja", "chat_template.json",
)  # fmt: skip
# What shapes the prompts and the answers of a model, beside its config and its weights.
RUN_FILES = (*TOKENIZER_FILES, "generation_config.json")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$|^[\w-]+$", re.ASCII)


@dataclass(frozen=True)
class Location:
    """A folder on disk and where it came from.

    Attributes:
        given: what the user typed, without the revision.
        folder: where the files are.
        repo_id: the Hub id, or None for a local folder.
        commit: the commit that was resolved, or None for a local folder.
    """

    given: str
    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """A short name: the last part of the id or of the folder."""
        return self.repo_id.split("/")[-1] if self.repo_id else self.folder.resolve().name

    @property
    def label(self) -> str:
        """What to write into files: the Hub id, or the folder's name (never a path of this machine)."""
        return self.repo_id or self.name


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form org/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", name, re.ASCII) is not None


def public_name(name: str) -> str:
    """A model's name as it may stand in files: a Hub id whole, of a path (also a Windows one) the last part."""
    return name if looks_like_hub_id(name) else PureWindowsPath(name).name


def files_matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The regular files directly in a folder whose names match one of the patterns, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if is_regular(path) and any(fnmatch(path.name, pattern) for pattern in patterns)
    ]


def locate(given: str, files: Sequence[str], revision: str | None = None) -> Location:
    """Find a folder, or fetch the matching files from the Hub.

    Args:
        given: a folder, a file inside it, `org/name` or `org/name@revision`.
        files: patterns of the files to fetch.
        revision: branch, tag or commit, if not in `given`.

    Raises:
        InputError: neither a folder nor a Hub id.
        HubError: not found, no access, or no network.
        UsageError: two different revisions.
    """
    if (folder := _existing_folder(given)) is not None:
        return _local(given, folder, revision)
    repo_id, _, at = given.partition("@")
    if at and revision and at != revision:
        raise UsageError(f"two revisions given: {printable(at)} and {printable(revision)}", "Give one of them.")
    if given.startswith((".", "/", "~")) or not _HUB_ID.match(repo_id):
        raise InputError(
            f"{printable(given)} is neither a folder nor a Hub id",
            "Give an existing folder, or an id like org/name or org/name@revision.",
        )
    return _download(given, repo_id, at or revision or None, files)


def _existing_folder(given: str) -> Path | None:
    """The folder that `given` names, itself or by a file in it; None if there is none.

    Raises:
        InputError: an empty name, or a GGUF file: what lies beside it need not be the same model.
    """
    if not given.strip():
        raise InputError("an empty name is neither a folder nor a Hub id", "Give a folder or an id like org/name.")
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            return path
        if path.is_file() and path.suffix == ".gguf":
            raise InputError(f"{printable(given)} is a GGUF file", "Give the same model or adapter as safetensors.")
        return path.parent if path.is_file() and path.suffix in (".safetensors", ".json") else None
    except (OSError, RuntimeError, ValueError):  # a name too long, no such user, a null character
        return None


def _local(given: str, folder: Path, revision: str | None) -> Location:
    if revision:
        raise UsageError(
            f"--revision {printable(revision)} does not apply to the local folder {printable(given)}",
            "Leave --revision out.",
        )
    return Location(given, folder)


def _download(given: str, repo_id: str, revision: str | None, files: Sequence[str]) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = printable(given)
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except HFValidationError:
        raise InputError(f"{shown} is neither a folder nor a Hub id", "Give an existing folder or org/name.") from None
    except GatedRepoError:
        raise HubError(f"{shown} is gated on the Hub", "Accept its terms there, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{shown} is neither a folder here nor a repository on the Hub",
            "Check the spelling; for a private repository run: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{shown} has no revision {printable(revision)}", "Check the revision on the Hub.") from None
    except LocalEntryNotFoundError:
        raise HubError(
            f"{shown} is no folder here, and the Hub cannot be reached (and nothing of it is in the cache)",
            "Check the path or the network; unset HF_HUB_OFFLINE to go online.",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as problem:
        raise HubError(f"cannot fetch {shown}: {printable(problem)}", "Try again, or give a local folder.") from None
    # A snapshot folder is named after its commit.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Location(given, folder, repo_id, commit)
