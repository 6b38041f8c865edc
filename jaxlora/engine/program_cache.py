"""Executables on disk: what a start has compiled, the next one loads as it is.

JAX's persistent cache keeps what XLA makes of a program, and to find it the program is traced and
lowered again, which takes most of a start. Here a program is found by what it is made of
(:mod:`jaxlora.engine.fingerprint`). Where our source has changed it is lowered, and then found by
what it was lowered to, if that is the same.

An executable holds pickled Python, so whoever can write to the folder can run code in this process:
it is made for its owner alone, and one that others may write to is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import stat
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxlora.engine.fingerprint import (
    SOURCES,
    UnknownInputError,
    described,
    described_arguments,
    surroundings,
)
from jaxlora.parallel import Devices

logger = logging.getLogger(__name__)

_FOLDER = "executables"
_UNUSED_DAYS = 30
"""An executable that no start has loaded for so long is deleted."""


class ProgramCache:
    """The executables of one folder, for programs on these devices; any thread may use it."""

    def __init__(self, folder: Path, devices: Devices) -> None:
        self._folder = folder
        self._devices = devices.all
        self._surroundings = surroundings(self._devices)

    @classmethod
    def configured(cls, devices: Devices) -> ProgramCache | None:
        """The one in JAX's own cache directory; None where that is off or others may write to
        it."""
        directory = jax.config.values["jax_compilation_cache_dir"]
        if not directory or not jax.config.values["jax_enable_compilation_cache"]:
            return None
        if "://" in directory:
            logger.info("executables are kept in local folders only, not in %s", directory)
            return None
        folder = Path(directory) / _FOLDER
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            logger.warning("executables are not kept: %s", error)
            return None
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            logger.warning(
                "executables in %s are neither loaded nor kept: they can run any code, and the "
                "folder is not one that this user alone may write to (chmod 700, or delete it)",
                folder,
            )
            return None
        return cls(folder, devices)

    def by_content(self, name: str, made_of: Any, arguments: Any) -> Path | None:
        """What leads to the executable of a program that is made of these values and called with
        such arguments; None, and why in the log, where they do not tell it from others."""
        try:
            content = described(made_of), described_arguments(arguments)
        except UnknownInputError as error:
            logger.info("%s is compiled at every start: %s", name, error)
            return None
        return self._path(name, (name, SOURCES, content))

    def by_lowered(
        self, name: str, lowered: jax.stages.Lowered, arguments: Any, options: Mapping[str, str]
    ) -> Path:
        """Where the executable of a lowered program is or would be, compiled with these options of
        XLA."""
        results = repr(jax.tree.leaves(lowered.out_info)), str(lowered.out_tree)
        content = described_arguments(arguments), results, lowered.as_text(), dict(options)
        return self._path(f"{name} lowered", content)

    def load(self, path: Path) -> Any | None:
        """An executable, ready to be called; None where there is none that can be used."""
        packed = self._read(path)
        if packed is None:
            return None
        try:
            executable, in_tree, out_tree = pickle.loads(zlib.decompress(packed))
            loaded = serialize_executable.deserialize_and_load(
                executable, in_tree, out_tree, execution_devices=self._devices
            )
        except Exception as error:  # noqa: BLE001 - unpickling may raise anything
            logger.warning("%s does not load, and its program is compiled again: %s", path, error)
            _delete(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return loaded

    def keep(self, path: Path, executable: jax.stages.Compiled) -> None:
        """Writes an executable that was compiled by this process; one that cannot be written is
        logged. (One that JAX's cache had is not to be written: XLA:CPU would leave out parts.)"""
        try:
            packed = zlib.compress(pickle.dumps(serialize_executable.serialize(executable)), 1)
        except Exception as error:  # noqa: BLE001 - what cannot be kept can be run all the same
            logger.warning("%s cannot be kept: %s", path.name, error)
            return
        self._write(path, packed)

    def follow(self, link: Path) -> Path | None:
        """Where the executable is that a program's content leads to, if it was ever compiled."""
        name = self._read(link)
        if name is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(link)
        return self._folder / name.decode()

    def link(self, link: Path, path: Path) -> None:
        """Makes a program's content lead to its executable."""
        self._write(link, path.name.encode())

    def delete_unused(self) -> None:
        """Deletes what no start has loaded for 30 days, and what one that was killed left."""
        oldest = time.time() - _UNUSED_DAYS * 86400
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)

    def _path(self, name: str, key: Any) -> Path:
        digest = hashlib.sha256(repr((self._surroundings, key)).encode()).hexdigest()
        return self._folder / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{digest}"

    def _read(self, path: Path) -> bytes | None:
        """The content of a file; None if there is none, or it is not what was written there."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("an executable could not be read, and is compiled again: %s", error)
            return None
        seal, payload = content[:32], content[32:]
        if seal != _seal(path, payload):
            logger.warning("%s is damaged; its program is compiled again", path)
            _delete(path)
            return None
        return payload

    def _write(self, path: Path, payload: bytes) -> None:
        """Writes a file, whole or not at all."""
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_bytes(_seal(path, payload) + payload)
            temporary.replace(path)
        except OSError as error:
            logger.warning("%s could not be kept: %s", path, error)
            _delete(temporary)


def _seal(path: Path, payload: bytes) -> bytes:
    """A hash of the content under its name, so that no other's is taken for it."""
    return hashlib.sha256(path.name.encode() + payload).digest()


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
