"""API keys: who may call what."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

ADMIN_PATHS = frozenset(
    """/v1/load_lora_adapter /v1/unload_lora_adapter /load_lora_adapter
    /unload_lora_adapter""".split()
)


class Keys:
    """Compares keys in a time that says nothing about them, not even how long they are."""

    def __init__(self, api_keys: Iterable[str], admin_key: str | None) -> None:
        self._api = [_digest(key.encode()) for key in api_keys]
        self._admin = None if admin_key is None else [_digest(admin_key.encode())]

    def allow(self, path: str, authorization: bytes) -> bool:
        """Whether a request for ``path`` with this Authorization header may go on.

        /v1/* needs an API key if there are any; loading and unloading adapters needs the admin key
        if there is one, else an API key.
        """
        if path in ADMIN_PATHS and self._admin is not None:
            needed = self._admin
        elif path in ADMIN_PATHS or path.startswith("/v1/") or path == "/v1":
            needed = self._api
        else:
            return True
        if not needed:
            return True
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # All of them, so that the time does not tell which one it was.
        matches = [hmac.compare_digest(given, each) for each in needed]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
