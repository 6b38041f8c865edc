"""Where an adapter's files are: a folder on this machine, or a hub repository."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.file_state import file_state, were_only_touched
from jaxlora.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, cannot_be_read, check_size
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError

TOOL_USE_FILE: Final = "additional_chat_templates/tool_use.jinja"
"""Where transformers saves the chat template for tools, if that is another one."""
_WEIGHED: Final = (CONFIG_FILE, WEIGHTS_FILE)
_FETCHED: Final = (
    *_WEIGHED,
    "added_tokens.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    TOOL_USE_FILE,
)
"""What is ever read of an adapter's folder, whatever else is in it."""
_DEFAULT_BRANCH: Final = "main"
_HUB_SECONDS: Final = 10.0
"""In which a hub must begin to answer: its client would wait for ever, and a thread with it that
others want their adapters read by."""
_ATTEMPTS: Final = 3
"""To read files that others touch meanwhile."""


def resolve(
    lora_path: str,
    *,
    download_dir: str | None = None,
    max_bytes: int | None = None,
    with_weights: bool = True,
) -> Path:
    """The local folder of an adapter: ``~`` expanded, an existing path as it is, otherwise a hub
    repository of that id, of which only the adapter's own files are fetched. A revision (branch,
    tag or commit) may follow the id: ``owner/name@revision``. Without ``with_weights`` only the
    small ones are fetched.

    Raises AdapterNotFoundError if there is neither, and AdapterRefusedError if it may not be looked
    for, and before anything is fetched if the weights have more than ``max_bytes``.
    """
    try:
        path = Path(lora_path).expanduser()
        exists = path.exists()
    except PermissionError as error:
        raise cannot_be_read(f"lora_path {lora_path!r}", error) from error
    except (OSError, ValueError, RuntimeError) as error:
        # Too long, with a zero or half a character, or of a user who is not there.
        raise AdapterNotFoundError(f"No adapter found for {lora_path!r}: {error}") from error
    if not lora_path:
        raise AdapterNotFoundError("No adapter found: no path is given")
    if exists:
        return path.absolute()
    if path.is_absolute() or lora_path.startswith(("~", ".")):
        raise AdapterNotFoundError(f"No adapter found for {lora_path!r}: no such folder")
    repo, _, revision = lora_path.partition("@")
    names = [name for name in _FETCHED if with_weights or name != WEIGHTS_FILE]
    try:
        return Path(_fetched(repo, revision, names, download_dir, max_bytes))
    except AdapterRefusedError:
        raise
    except Exception as error:  # its client's own, and those of what it speaks and parses with
        raise AdapterNotFoundError(
            f"No adapter found for {lora_path!r}: no such folder, and the hub said: "
            f"{type(error).__name__}: {error}"
        ) from error


def fingerprint(lora_path: str) -> tuple[int, ...]:
    """The state of an adapter's files, which tells without reading whether they are others now; ()
    for a hub repository and where a file is missing."""
    if not lora_path:
        return ()
    try:
        folder = Path(lora_path).expanduser()
        return tuple(n for name in _WEIGHED for n in file_state((folder / name).stat()))
    except (OSError, ValueError, RuntimeError):
        return ()  # Who reads it finds out why.


def read_unchanged(
    lora_path: str, folder: Path, read: Callable[[], Adapter]
) -> tuple[Adapter, tuple[int, ...]]:
    """What ``read`` makes of an adapter's folder, and the state its files had then, from the
    beginning to the end. Raises AdapterRefusedError if they changed, and what ``read`` raises.

    Where only their inodes did, as when a backup links to them, they are read again.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        state = fingerprint(str(folder))
        try:
            adapter = read()
        except AdapterRefusedError as error:
            now = fingerprint(str(folder))
            if now != state and not were_only_touched(state, now):
                # What was found wrong may be of two versions together.
                raise _changed(lora_path) from error
            if not attempts_left or now == state:
                raise
            continue
        now = fingerprint(str(folder))
        if now == state:
            return adapter, state
        del adapter  # Its memory may do for the next attempt.
        if not were_only_touched(state, now):
            break
    # Its weights may be of one version and its configuration of another.
    raise _changed(lora_path)


def _changed(lora_path: str) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"the adapter in {lora_path!r} was changed while it was read; load it again"
    )


def _fetched(
    repo: str, revision: str, names: list[str], download_dir: str | None, max_bytes: int | None
) -> str:
    """The folder in the cache with those files of a repository."""
    download = partial(
        huggingface_hub.snapshot_download, repo, allow_patterns=names, cache_dir=download_dir
    )
    try:
        commit = _commit_of(repo, revision) or revision
    except Exception as error:  # noqa: BLE001  what was fetched before is there all the same
        try:
            return download(revision=revision or None, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
    if max_bytes is not None:
        _check_download(repo, commit, download_dir, max_bytes)
    folder = download(revision=commit or None)
    if WEIGHTS_FILE in names and commit != revision:
        # Only now the cache notes that the revision leads there: where it leads without a hub,
        # there are weights.
        folder = download(revision=revision or None)
    return folder


def _commit_of(repo: str, revision: str) -> str | None:
    """Where a revision leads, "" being the default branch; None if the hub refuses to say: who
    downloads finds what is in the cache, or the same error. Raises if there is no hub to be
    asked, or none that makes sense."""
    try:
        info = huggingface_hub.HfApi().repo_info(
            repo, revision=revision or _DEFAULT_BRANCH, timeout=_HUB_SECONDS
        )
    except HfHubHTTPError:
        return None
    return info.sha


def _check_download(repo: str, commit: str, download_dir: str | None, max_bytes: int) -> None:
    try:
        files = huggingface_hub.snapshot_download(
            repo,
            revision=commit or None,
            allow_patterns=[WEIGHTS_FILE],
            cache_dir=download_dir,
            dry_run=True,
        )
    except DryRunError:
        return  # There is no hub to be asked: nothing will be fetched either.
    for file in files:
        check_size(file.file_size or 0, max_bytes)
