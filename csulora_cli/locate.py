"""From what the user typed to a folder on disk: a local path, or a download from the Hub.

A local path wins over a Hub id. huggingface_hub does the cache, the token, offline mode and the endpoint.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

from csulora_cli.errors import HostError, HubError, InputError, UsageError
from csulora_cli.files import is_regular
from csulora_cli.text import printable, some

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
_GGUF = ".gguf"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
# Files that stand for the whole folder: they are what is read there.
_NAMES_FOLDER = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|adapters\.safetensors"
    r"|config\.json|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors"
)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$|^[\w-]+$", re.ASCII)


@dataclass(frozen=True)
class Location:
    """A folder on disk and where it came from.

    Attributes:
        given: what the user typed, without the revision.
        folder: where the files are.
        repo_id: the Hub id, or None for a local folder.
        commit: the commit that was resolved, or None for a local folder.
        gguf: the file in the folder that is all of the model, if that is a GGUF file; else None.
    """

    given: str
    folder: Path
    repo_id: str | None = None
    commit: str | None = None
    gguf: str | None = None

    @property
    def name(self) -> str:
        """A short name: the last part of the id, or the name of the GGUF file or of the folder."""
        if self.gguf and not self.repo_id:
            return self.gguf.removesuffix(_GGUF)
        return self.repo_id.split("/")[-1] if self.repo_id else self.folder.resolve().name

    @property
    def label(self) -> str:
        """What to write into files: the Hub id, or the file's or folder's name (never a path of this machine)."""
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


def files_of(location: Location, patterns: Sequence[str]) -> list[Path]:
    """The files of a location that are read: its GGUF file, or those whose names match one of the patterns."""
    if location.gguf is not None:
        return [location.folder / location.gguf]
    return files_matching(location.folder, patterns)


def locate_model(given: str, files: Sequence[str], role: str) -> Location:
    """Like `locate`, for a model, which may also be a GGUF file: named, or all that a place has of weights.

    Args:
        given: as in `locate`, or a GGUF file: a path, or `org/name/file.gguf`, with `@revision` behind it or without.
        files: patterns of the files to fetch.
        role: what to call it in messages ("host", "unaligned model").

    Raises:
        HostError: a place has several GGUF files and nothing else.
        InputError: neither a folder nor a Hub id.
        HubError: not found, no access, or no network.
    """
    if (file := _gguf_file(given)) is not None:
        return Location(given, file.parent, gguf=file.name)
    whole, _, revision = given.partition("@")
    repo_id, _, name = whole.rpartition("/")
    if name.endswith(_GGUF) and looks_like_hub_id(repo_id):
        return _with_gguf(_download(given, repo_id, revision or None, [name]), name)
    location = locate(given, files)
    if any(is_regular(location.folder / weights) for weights in _SAFETENSORS):
        return location
    names = _gguf_names(location)
    if len(names) > 1:
        raise HostError(
            f"the {role} {printable(given)} has {len(names)} GGUF files and no safetensors: {some(names)}",
            f"Name one of them: {printable(whole.rstrip('/'))}/{printable(names[0])}",
        )
    if names and location.repo_id is not None:
        location = _download(given, location.repo_id, location.commit, [*files, *names])
    return _with_gguf(location, names[0]) if names else location


def _gguf_file(given: str) -> Path | None:
    """The GGUF file here that `given` names; None if there is none."""
    try:
        path = Path(given).expanduser()
        return path if path.suffix == _GGUF and is_regular(path) else None
    except (RuntimeError, ValueError):  # no such user, a null character
        return None


def _with_gguf(location: Location, name: str) -> Location:
    if not is_regular(location.folder / name):
        raise HubError(f"{printable(location.given)} is not in its repository", "Check the file's name on the Hub.")
    return replace(location, gguf=name)


def _gguf_names(location: Location) -> list[str]:
    """The GGUF files of a folder or a repository, sorted; without the Hub those that are in the cache."""
    from huggingface_hub import HfApi, constants

    names = [path.name for path in location.folder.iterdir() if is_regular(path)]
    if location.repo_id is not None and not constants.HF_HUB_OFFLINE:
        try:
            names = HfApi().list_repo_files(location.repo_id, revision=location.commit)
        except Exception as problem:  # httpx's own errors or those of requests, by version of huggingface_hub
            if not any(name.endswith(_GGUF) for name in names):
                raise HubError(
                    f"cannot list the files of {printable(location.given)}: {printable(problem)}",
                    "Try again, or give a local folder.",
                ) from None
    return sorted(name for name in names if name.endswith(_GGUF) and "/" not in name)


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
        InputError: an empty name, or a file of another kind or name than those that are read: what lies beside it need
            not be the same model or adapter.
    """
    if not given.strip():
        raise InputError("an empty name is neither a folder nor a Hub id", "Give a folder or an id like org/name.")
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            return path
        if path.is_file() and path.suffix == ".gguf":
            raise InputError(f"{printable(given)} is a GGUF file", "Give the same model or adapter as safetensors.")
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            if not _NAMES_FOLDER.fullmatch(path.name):
                raise InputError(
                    f"{printable(given)} is not a file that csulora reads by itself",
                    "Give the folder of a model or an adapter. To use other weights, put them into a folder of their "
                    "own under the usual name (adapter_model.safetensors, model.safetensors), with their config.",
                )
            return path.parent
        return None
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
