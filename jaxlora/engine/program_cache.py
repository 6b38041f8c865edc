"""Executables on disk: what a start has compiled, the next one loads as it is.

JAX's persistent cache keeps what XLA makes of a program, and to find it the program is traced and
lowered again, which takes most of a start. Here an executable is found by what the program is made
of (:mod:`jaxlora.engine.fingerprint`).

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
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxlora.engine.fingerprint import (
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
        self._devices = devices.mesh.devices.flatten().tolist()
        self._surroundings = hashlib.sha256(repr(surroundings(self._devices)).encode()).digest()

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

    def path(self, name: str, made_of: Any, arguments: Any) -> Path | None:
        """Where the executable of a program is or would be that is made of these values and called
        with such arguments; None, and why in the log, where they do not tell it from others."""
        try:
            content = described(made_of), described_arguments(arguments)
        except UnknownInputError as error:
            logger.info("%s is compiled at every start: %s", name, error)
            return None
        key = hashlib.sha256(self._surroundings + repr((name, content)).encode()).hexdigest()
        return self._folder / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{key}"

    def load(self, path: Path) -> Any | None:
        """An executable, ready to be called; None where there is none that can be used."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("an executable could not be read, and is compiled again: %s", error)
            return None
        digest, packed = content[:32], content[32:]
        if digest != _digest(path, packed):
            logger.warning("%s is damaged; its program is compiled again", path)
            return None
        try:
            executable, in_tree, out_tree = pickle.loads(zlib.decompress(packed))
            loaded = serialize_executable.deserialize_and_load(
                executable, in_tree, out_tree, execution_devices=self._devices
            )
        except Exception as error:  # noqa: BLE001 - unpickling may raise anything
            logger.warning("%s does not load, and its program is compiled again: %s", path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return loaded

    def keep(self, path: Path, executable: jax.stages.Compiled) -> None:
        """Writes an executable, whole or not at all; one that cannot be written is logged."""
        try:
            packed = zlib.compress(pickle.dumps(serialize_executable.serialize(executable)), 1)
        except Exception as error:  # noqa: BLE001 - what cannot be kept can be run all the same
            logger.warning("%s cannot be kept: %s", path.name, error)
            return
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_bytes(_digest(path, packed) + packed)
            temporary.replace(path)
        except OSError as error:
            logger.warning("%s could not be kept: %s", path, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def delete_unused(self) -> None:
        """Deletes what no start has loaded for 30 days, and what one that was killed left."""
        oldest = time.time() - _UNUSED_DAYS * 86400
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)


def _digest(path: Path, packed: bytes) -> bytes:
    """Of the content under its name, so that no other's is taken for it."""
    return hashlib.sha256(path.name.encode() + packed).digest()
