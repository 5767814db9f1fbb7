"""Files of the Hub: one by its link, or some of a repository by their patterns."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

# What users may say of a download, as in Diffusers.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_HUB_PREFIXES = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/")


def pop_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of a download out of `kwargs`; those that are None are left to their defaults."""
    given = {name: kwargs.pop(name, None) for name in HUB_ARGUMENTS}
    return {name: value for name, value in given.items() if value is not None}


def resolve_file(path_or_link: str | Path, **hub_arguments: Any) -> Path:
    """
    A local file as it is, or the file behind a link like https://huggingface.co/OWNER/REPOSITORY/blob/main/FILE,
    downloaded or from the cache. A `revision` takes the place of the link's.

    Raises:
        ValueError: the link does not name a file of a repository.
        OSError: the file cannot be downloaded, or is not there.
    """
    for prefix in _HUB_PREFIXES:
        if str(path_or_link).startswith(prefix):
            parts = str(path_or_link).removeprefix(prefix).split("/")
            if len(parts) < 5 or parts[2] not in ("blob", "resolve"):
                raise ValueError(
                    f"{path_or_link!r} has to name a file, like {_HUB_PREFIXES[0]}OWNER/REPOSITORY/blob/main/FILE."
                )
            owner, repository, _, revision, *file = parts
            hub_arguments = {"revision": revision, **hub_arguments}
            try:
                return Path(hf_hub_download(f"{owner}/{repository}", "/".join(file), **hub_arguments))
            except EntryNotFoundError as error:
                raise OSError(f"{path_or_link} cannot be had: {error}") from error
    return Path(path_or_link)


def first_file(repository: str, files: Iterable[str], **hub_arguments: Any) -> str | None:
    """The first of some small files that a repository has, or offline what is cached of it. It is downloaded."""
    for file in files:
        try:
            hf_hub_download(repository, file, **hub_arguments)
            return file
        except LocalEntryNotFoundError:  # the Hub is out of reach, and may be asked many times before that is clear
            hub_arguments["local_files_only"] = True
        except EntryNotFoundError:
            pass
    return None


def download_files(repository: str, patterns: Iterable[str], **hub_arguments: Any) -> Path:
    """The folder of a repository in the cache, with those of its files that one of `patterns` names."""
    return Path(snapshot_download(repository, allow_patterns=list(patterns), **hub_arguments))
