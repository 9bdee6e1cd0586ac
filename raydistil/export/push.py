"""push: an export as a repository at the hub, in one commit.

A push is an act and no result, so the configuration has nothing of it. The token is looked for where the hub's own
tools look, and shown nowhere.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from raydistil.errors import ExportError
from raydistil.export import FILES

NAME = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)  # that the hub takes


@dataclass(frozen=True, slots=True)
class Repository:
    """Where an export is pushed to."""

    name: str  # OWNER/NAME
    private: bool


def repository_of(name: str, private: bool) -> Repository:
    """Of `--push`. Raises ExportError for what is no name, and where there is no token: before anything is exported."""
    if not NAME.fullmatch(name):
        raise ExportError(f"--push: expected OWNER/NAME of a repository at the hub, got {name!r}: name one")
    if get_token() is None:
        raise ExportError("--push: expected a token of the hub, found none: run hf auth login, or set HF_TOKEN")
    return Repository(name, private)


def push(folder: Path, to: Repository, message: str) -> str:
    """Commit the files of `folder` to `to`, which is made unless it is there; returns its address.

    Files of other formats that an export before has left there go with the same commit: they would be another model's.
    Raises ExportError for what the hub refuses.
    """
    api = HfApi(token=get_token())
    try:
        api.create_repo(to.name, private=to.private or None, exist_ok=True)
        open_to_all = to.private and not api.model_info(to.name).private
        if not open_to_all:
            api.create_commit(to.name, _operations(api, folder, to.name), commit_message=message)
    except Exception as error:  # the hub client raises dozens of kinds: every one means "not there"
        raise ExportError(
            f"--push: expected {api.endpoint} to take {to.name}, got: {_reason(error)}; the export is whole in {folder}"
        ) from error
    if open_to_all:
        raise ExportError(
            f"--push: expected {to.name} to be private, it is there and open to all: make it private, or leave "
            f"--private out; the export is whole in {folder}"
        )
    return f"{api.endpoint}/{to.name}"


def _operations(api: HfApi, folder: Path, name: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [path for path in api.list_repo_files(name) if _is_ours(path) and path not in files]
    return [
        *(CommitOperationDelete(path) for path in stale),
        *(CommitOperationAdd(path, file) for path, file in files.items()),
    ]


def _is_ours(path: str) -> bool:
    """Whether it is, or is below, what an export makes beside the Hugging Face directory."""
    first = path.partition("/")[0]
    return first in {place.parts[0] for name, place in FILES.items() if name != "hf"}


def _reason(error: BaseException) -> str:
    """The hub's own answer where there is one below `error`, on one line."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HfHubHTTPError):
        found = found.__cause__
    if found is None:
        return " ".join(str(error).split()) or type(error).__name__
    said = found.server_message or ""
    advice = {401: ", check the token", 403: ", check that the token may write there"}.get(
        found.response.status_code, ""
    )
    return f"{found.response.status_code} {found.response.reason_phrase}{said and f' ({said})'}{advice}"
