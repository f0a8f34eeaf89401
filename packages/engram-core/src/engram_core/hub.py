"""Adapters on the Hugging Face hub: finding them there and publishing them; needs the extra `huggingface`.

An adapter lies in a repository of its own, `owner/name`, as `engram.safetensors` beside its card. The library
huggingface_hub is imported when something is downloaded or sent, and not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engram_core.card import CARD_MARK, is_repo_id, render_card
from engram_core.errors import InputError, one_line, quote, show_text
from engram_core.manifest import is_printable_name
from engram_core.opening import open_any

__all__ = [
    "ADAPTER_FILE",
    "CARD_FILE",
    "Upload",
    "find_adapter",
    "prepare_upload",
    "push_adapter",
    "render_card",
    "send_upload",
]

ADAPTER_FILE = "engram.safetensors"
"""What the adapter is called in a repository."""

CARD_FILE = "README.md"
"""What the hub shows of a repository."""

_FEW = 5
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"
_PICTURES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}


def find_adapter(source: str | os.PathLike[str], *, filename: str | None = None, revision: str | None = None) -> Path:
    """Return the local path of an adapter, downloading it from the hub when it is named by a repository.

    Args:
        source: a path, or the id of a hub repository as text, `owner/name`. What exists here is a path, and so is
            what ends in `.safetensors`.
        filename: file in the repository or local folder; None means `engram.safetensors`.
        revision: branch, tag or commit of the repository.

    Returns:
        The file; in a local folder that holds one, that file. A path that neither exists nor looks like a
        repository is returned as it is: opening it says what is wrong.

    Raises:
        InputError: the repository, its file or its revision is not there or not accessible, or there is neither
            network nor a copy in the cache.
    """
    path = Path(source)
    try:
        if path.is_dir():
            inside = path / (filename or ADAPTER_FILE)
            return inside if inside.is_file() else path
        exists = path.exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        exists = False
    if exists or not isinstance(source, str) or not is_repo_id(source):
        return path
    return _download(source, filename or ADAPTER_FILE, revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What `push_adapter` sends.

    Attributes:
        repo_id: where to.
        files: path in the repository to a local file, or to the content itself.
        identity: of the adapter.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    identity: str

    @property
    def card(self) -> str:
        """The model card."""
        content = self.files[CARD_FILE]
        return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes, by its path in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def prepare_upload(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002 - as the record and the hub call it
    preview: Path | None = None,
    description: str | None = None,
) -> Upload:
    """Check an adapter in full and write its card; needs neither a network nor huggingface_hub.

    Args:
        path: the adapter file.
        repo_id: where it will be, `owner/name`.
        license: licence of the repository; None means the one that all concepts state.
        preview: a picture for the card: PNG, JPEG or WebP.
        description: Markdown for the card.

    Raises:
        InputError: the repository id or the licence is malformed, or the preview is no picture.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    if not is_repo_id(repo_id):
        raise InputError(
            f"{quote(repo_id)} is no repository id; expected OWNER/NAME of letters, digits, '-', '_' and '.', "
            "at most 96 in all, not ending in .safetensors"
        )
    if license is not None and not is_printable_name(license):
        raise InputError(
            f"license is {quote(license)}, expected 1..256 printable characters such as cc-by-4.0; "
            "leave it out to take the concepts' own"
        )
    picture = None if preview is None else f"preview{_picture_suffix(preview)}"
    adapter = open_any(path)
    adapter.check()
    card = render_card(adapter, repo_id=repo_id, license=license, preview=picture, description=description)
    # A surrogate, which only a description can hold, is no UTF-8.
    files: dict[str, Path | bytes] = {ADAPTER_FILE: Path(path), CARD_FILE: card.encode(errors="replace")}
    if preview is not None and picture is not None:
        files[picture] = Path(preview)
    return Upload(repo_id=repo_id, files=MappingProxyType(files), identity=adapter.identity())


def push_adapter(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002 - as the record and the hub call it
    preview: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    description: str | None = None,
    create: bool = True,
    overwrite_card: bool = False,
    note: Callable[[str], None] | None = None,
) -> str:
    """Publish an adapter with its card in one commit, after checking every byte of it.

    Args:
        path: the adapter file.
        repo_id: where to, `owner/name`.
        license: licence of the repository; None means the one that all concepts state.
        preview: a picture for the card: PNG, JPEG or WebP.
        private: only you may see a repository that is created. An existing public one is refused.
        revision: branch to commit to; None means `main`.
        message: of the commit.
        description: Markdown for the card.
        create: create repository and branch where they do not exist.
        overwrite_card: replace a README.md that was written by somebody else; otherwise it stays.
        note: told when such a README.md stayed.

    Returns:
        The commit's address.

    Raises:
        InputError: as for `prepare_upload`; or huggingface_hub is missing, you are not logged in or may not write
            there, the hub cannot be reached, or it refuses the upload.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    upload = prepare_upload(path, repo_id, license=license, preview=preview, description=description)
    return send_upload(
        upload,
        private=private,
        revision=revision,
        message=message,
        create=create,
        overwrite_card=overwrite_card,
        note=note,
    )


def send_upload(
    upload: Upload,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create: bool = True,
    overwrite_card: bool = False,
    note: Callable[[str], None] | None = None,
) -> str:
    """Send what was prepared, in one commit, and return the commit's address; `push_adapter` does both.

    Args:
        upload: what to send.
        private: only you may see a repository that is created. An existing public one is refused.
        revision: branch to commit to; None means `main`.
        message: of the commit.
        create: create repository and branch where they do not exist.
        overwrite_card: replace a README.md that was written by somebody else; otherwise it stays.
        note: told when such a README.md stayed.

    Raises:
        InputError: as for `push_adapter`; or the adapter changed since it was checked.
    """
    repo_id = upload.repo_id
    hub = _import_hub(f"publishing {repo_id}")
    if hub.constants.HF_HUB_OFFLINE:
        raise _explain_push(hub, hub.utils.OfflineModeIsEnabled(), repo_id, revision)
    api = hub.HfApi()
    files = dict(upload.files)
    try:
        additions = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        if additions[0].upload_info.sha256.hex() != upload.identity:
            raise InputError(f"{repo_id}: the adapter changed since it was checked; nothing was sent, try again")
        if create:
            # None leaves the choice to the owner's defaults, which may be private.
            api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and api.repo_info(repo_id).private is False:
            raise InputError(f"{repo_id}: exists and is public; make it private in its settings, or leave out private")
        if create and revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not overwrite_card and not _may_replace_card(hub, api, repo_id, revision):
            additions = [addition for addition in additions if addition.path_in_repo != CARD_FILE]
            if note is not None:
                note(
                    f"{repo_id}: its {CARD_FILE} was not written by engram and stays; overwriting the card replaces it"
                )
        commit = api.create_commit(
            repo_id,
            additions,
            commit_message=message or f"Upload adapter {upload.identity[:12]}",
            revision=revision,
        )
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - each version of the library has network errors of its own
        raise _explain_push(hub, error, repo_id, revision) from None
    return str(commit.commit_url)


def _may_replace_card(hub: Any, api: Any, repo_id: str, revision: str | None) -> bool:
    """Tell whether a repository has no card, or one that was written here."""
    try:
        card = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
    except hub.utils.LocalEntryNotFoundError:  # the hub did not answer
        raise
    except hub.utils.EntryNotFoundError:
        return True
    return CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def _picture_suffix(path: Path) -> str:
    """Return the suffix that fits a picture's content."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"preview {quote(str(path))} cannot be read: {reason}; give a picture") from None
    for magic, suffix in _PICTURES.items():
        if head.startswith(magic):
            return suffix
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return ".webp"
    raise InputError(
        f"preview {quote(str(path))} begins with {head[:8].hex(' ')}; expected a PNG, JPEG or WebP picture"
    )


def _import_hub(purpose: str) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants, utils  # noqa: F401 - as attributes of the package
    except ImportError:
        raise InputError(
            f"{purpose} needs the package 'huggingface_hub'; install engram-core with its extra 'huggingface'"
        ) from None
    return huggingface_hub


def _download(repo_id: str, filename: str, revision: str | None) -> Path:
    hub = _import_hub(f"{repo_id!r} is no path here, and downloading it as a hub repository")
    try:
        return Path(hub.hf_hub_download(repo_id, filename, revision=revision))
    except Exception as error:  # noqa: BLE001 - each version of the library has network errors of its own
        raise _explain_download(hub, error, repo_id, filename, revision) from None


def _explain_download(hub: Any, error: Exception, repo_id: str, filename: str, revision: str | None) -> InputError:
    utils = hub.utils
    at = "" if revision is None else f" at revision {quote(revision)}"
    nowhere = f"{repo_id!r} is no path here, and as a hub repository"
    if isinstance(error, utils.LocalEntryNotFoundError):
        reason = (
            "HF_HUB_OFFLINE is set; unset it, or download the file while online"
            if hub.constants.HF_HUB_OFFLINE
            else "the hub cannot be reached; check the network"
        )
        return InputError(f"{nowhere} its file {quote(filename)}{at} is not in the cache, and {reason}")
    if isinstance(error, utils.GatedRepoError):
        return InputError(
            f"{nowhere} it is gated; ask for access at {hub.constants.ENDPOINT}/{repo_id}, then {_LOG_IN}"
        )
    if isinstance(error, utils.RepositoryNotFoundError):
        return InputError(f"{nowhere} it does not exist or is private; check its name, or {_LOG_IN}")
    if isinstance(error, utils.RevisionNotFoundError):
        return InputError(f"{nowhere} it has no revision {quote(revision)}; name a branch, tag or commit of it")
    if isinstance(error, utils.EntryNotFoundError):
        return InputError(f"{nowhere} it has no file {quote(filename)}{at}; {_list_files(hub, repo_id, revision)}")
    return InputError(
        f"{nowhere} its file {quote(filename)}{at} cannot be downloaded ({_reason(error)}); check network and disk"
    )


def _list_files(hub: Any, repo_id: str, revision: str | None) -> str:
    """Say which other adapters a repository may hold, if it answers."""
    try:
        names = hub.HfApi().list_repo_files(repo_id, revision=revision)
    except Exception:  # noqa: BLE001 - the list is a courtesy
        return "name another one (filename)"
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if not found:
        return "it has no .safetensors file at all; it is no repository of an adapter"
    more = f" and {len(found) - _FEW} more" if len(found) > _FEW else ""
    return f"it has {', '.join(map(quote, found[:_FEW]))}{more}; name one of them (filename)"


def _explain_push(hub: Any, error: Exception, repo_id: str, revision: str | None) -> InputError:
    utils, owner = hub.utils, repo_id.partition("/")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The hub says 401 for a repository that nobody logged in could be told about.
    if isinstance(error, utils.LocalTokenNotFoundError) or status == 401:
        return InputError(f"{repo_id}: you are not logged in, or the token is not valid; {_LOG_IN}")
    if status == 403:
        return InputError(
            f"{repo_id}: the token may not write for {owner!r}; {_LOG_IN} with a token that has write permission there"
        )
    if isinstance(error, utils.OfflineModeIsEnabled):
        return InputError(f"{repo_id}: cannot be published offline; HF_HUB_OFFLINE is set, unset it")
    if isinstance(error, utils.RevisionNotFoundError):
        return InputError(f"{repo_id}: has no revision {quote(revision)}; name a branch of it")
    if isinstance(error, utils.RepositoryNotFoundError):
        return InputError(f"{repo_id}: does not exist, or the token may not see it; create it, or {_LOG_IN}")
    if isinstance(error, ValueError) or (status is not None and status < 500):
        return InputError(f"{repo_id}: the hub refuses the upload ({_reason(error)})")
    return InputError(f"{repo_id}: the hub cannot be reached ({_reason(error)}); check the network and try again")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {show_text(one_line(error))}"
