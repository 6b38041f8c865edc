"""Adapters that are found by name when they are first asked for."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxlora.types import LoRARequest

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@runtime_checkable
class LoRAResolver(Protocol):
    """Knows where adapters are."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of that name, None if there is none. It is served under that name, whichever
        the request has."""
        ...


class DirectoryResolver:
    """Adapters that are folders of one folder, by the folder's name.

    A name that could lead elsewhere (a separator, a leading dot, a link out of the folder) has no
    adapter.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See :class:`LoRAResolver`."""
        if not _NAME.fullmatch(lora_name):
            return None
        path = await asyncio.to_thread(self._find, lora_name)
        return LoRARequest(lora_name, None, str(path)) if path is not None else None

    def _find(self, lora_name: str) -> Path | None:
        # os.path.realpath, because Path.resolve raises on a ring of links.
        path = Path(os.path.realpath(self._root / lora_name))
        try:
            is_one = path.parent == self._root and (path / "adapter_config.json").is_file()
        except PermissionError:
            is_one = True  # Loading it tells the reason.
        return path if is_one else None


class HubResolver:
    """Adapters that are hub repositories, if their id matches one of some globs."""

    def __init__(self, globs: Sequence[str]) -> None:
        self._globs = tuple(globs)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See :class:`LoRAResolver`."""
        return (
            LoRARequest(lora_name, None, lora_name)
            if is_repo(lora_name) and is_allowed_repo(lora_name, self._globs)
            else None
        )


def is_repo(name: str) -> bool:
    """Whether a name is a hub repository's id, owner/name or owner/name@revision, and could be no
    path of a file."""
    repo, _, revision = name.partition("@")
    parts = repo.split("/")
    names = [*parts, revision] if revision else parts
    return len(parts) == 2 and all(_NAME.fullmatch(part) for part in names)


def is_allowed_repo(name: str, globs: Sequence[str]) -> bool:
    """Whether a repository's id, in any revision, matches one of some globs."""
    repo = name.partition("@")[0]
    return any(fnmatch.fnmatchcase(repo, glob) for glob in globs)
