"""Where an adapter's files are: a folder on this machine, or a hub repository."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.file_state import file_state, were_only_touched
from jaxlora.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, cannot_be_read, check_size
from jaxlora.errors import AdapterError, AdapterNotFoundError, AdapterRefusedError

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
        return _fetched(repo, revision, names, download_dir, max_bytes)
    except AdapterError:
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
) -> Path:
    """The folder in the cache with those files of a repository.

    Not as a snapshot: for that the hub's client lists the repository, and waits for ever.
    """
    try:
        info = huggingface_hub.HfApi().model_info(
            repo, revision=revision or _DEFAULT_BRANCH, timeout=_HUB_SECONDS
        )
    except RevisionNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  what was fetched before is there all the same
        try:
            folder = huggingface_hub.snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=names,
                cache_dir=download_dir,
                local_files_only=True,
            )
            return Path(folder)
        except LocalEntryNotFoundError:
            raise error from None
    there = {file.rfilename for file in info.siblings or ()}
    if CONFIG_FILE not in there:
        raise AdapterNotFoundError(f"No adapter found for {repo!r}: it has no {CONFIG_FILE}")
    names = [name for name in names if name in there]
    options: Any = {"cache_dir": download_dir, "etag_timeout": _HUB_SECONDS}
    fetch = partial(huggingface_hub.hf_hub_download, repo, **options)
    if WEIGHTS_FILE in names and max_bytes is not None:
        weights = huggingface_hub.hf_hub_download(
            repo, WEIGHTS_FILE, revision=info.sha, dry_run=True, **options
        )
        check_size(weights.file_size or 0, max_bytes)
    with ThreadPoolExecutor(len(names)) as pool:
        paths = list(pool.map(partial(fetch, revision=info.sha), names))
        if WEIGHTS_FILE in names and info.sha != revision:
            # Only now the cache notes that the revision leads there: where it leads without a hub,
            # there are weights.
            paths = list(pool.map(partial(fetch, revision=revision or _DEFAULT_BRANCH), names))
    return Path(paths[names.index(CONFIG_FILE)]).parent
