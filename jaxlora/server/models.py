"""The models that are served: the base under its names, and the adapters under theirs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from jaxlora.adapters.chat_template import chat_templates_of
from jaxlora.adapters.sources import resolve
from jaxlora.errors import AdapterError, AdapterNotFoundError, AdapterRefusedError
from jaxlora.server.engine_process import ServedLLM
from jaxlora.server.errors import ApiError
from jaxlora.server.metrics import Metrics
from jaxlora.server.options import MAX_NAME, ServerOptions, problem_of
from jaxlora.server.resolvers import (
    DirectoryResolver,
    HubResolver,
    LoRAResolver,
    is_allowed_repo,
    is_repo,
)
from jaxlora.server.template_pool import AdapterTemplates, TemplatePool
from jaxlora.types import LoRARequest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """An adapter that requests may name."""

    name: str
    lora_int_id: int
    chat_templates: AdapterTemplates | None

    @property
    def by_name(self) -> LoRARequest:
        """What the engine is asked for: it has been loaded, and if it is unloaded before a request
        gets there, nothing may load it again."""
        return LoRARequest(self.name)


class ServedModels:
    """Finds the model a request names; loads and unloads adapters."""

    def __init__(
        self,
        options: ServerOptions,
        llm: ServedLLM,
        metrics: Metrics,
        templates: TemplatePool,
    ) -> None:
        self._options = options
        self._llm = llm
        self._metrics = metrics
        self._templates = templates
        self._adapters: dict[str, ServedAdapter] = {}
        self._names: dict[int, str] = {}
        """Theirs, by id: there may be thousands, and nobody is to look for one among them."""
        path = options.engine_args.model
        self._cards = {name: self._card(name, path, None) for name in options.model_names}
        """Of the base model's names, then of the adapters, in load order."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        resolvers: list[LoRAResolver] = []
        if options.lora_resolver_dir is not None:
            resolvers.append(DirectoryResolver(options.lora_resolver_dir))
        if options.lora_resolver_repos:
            resolvers.append(HubResolver(options.lora_resolver_repos))
        self._resolvers = (*resolvers, *options.lora_resolvers)

    async def load_static(self) -> None:
        """Loads the adapters the server was started with. Raises what the first of them raises."""
        for request in self._options.lora_modules:
            await self._load(request)

    async def find(self, name: str | None) -> tuple[str, ServedAdapter | None]:
        """The name to show and the adapter, None for the base model. Raises ApiError 404."""
        base_names = self._options.model_names
        if name is None or name in base_names:
            return name or base_names[0], None
        lora_name = self._lora_name(name)
        adapter = self._adapters.get(name) or self._adapters.get(lora_name)
        # A resolver's own names may begin like the base's.
        for unknown in dict.fromkeys((lora_name, name)):
            adapter = adapter or await self._resolve(unknown)
        if adapter is None:
            raise ApiError(404, f"The model `{name}` does not exist.", param="model")
        return name, adapter

    def serves(self, adapter: ServedAdapter) -> bool:
        """Whether it, or another of its name, has not been unloaded."""
        return adapter.name in self._adapters

    async def load(self, lora_name: str | None, lora_path: str | None, **fields: Any) -> str:
        """Loads an adapter because a client asked. Raises ApiError as docs/server.md tells."""
        if not lora_name or not lora_path:
            message = "Both 'lora_name' and 'lora_path' must be provided."
            raise ApiError(400, message, kind="InvalidUserInput")
        if lora_name in self._options.model_names:
            message = f"The lora adapter '{lora_name}' conflicts with a served base model."
            raise ApiError(400, message, param="lora_name")
        if problem := problem_of(lora_name):
            raise ApiError(400, problem, kind="InvalidUserInput", param="lora_name")
        if len(fields["base_model_name"] or "") > MAX_NAME:
            message = f"base_model_name must have at most {MAX_NAME} characters"
            raise ApiError(400, message, param="base_model_name")
        request = LoRARequest(lora_name, None, lora_path, **fields)
        async with self._alone(lora_name):
            if lora_name in self._adapters and not request.load_inplace:
                raise ApiError(
                    400,
                    f"The lora adapter '{lora_name}' has already been loaded. If you want to load "
                    "the adapter in place, set 'load_inplace' to True.",
                    kind="InvalidUserInput",
                )
            await asyncio.to_thread(self._check_allowed, lora_path)
            try:
                await self._load(request)
            except AdapterNotFoundError as error:
                message = f"Loading lora {lora_name} failed: No adapter found for {lora_path}"
                raise ApiError(404, message) from error
            except (AdapterError, ValueError) as error:
                status = 400 if self._options.strict_client_errors else 500
                raise ApiError(status, await self._without_paths(error, lora_path)) from error
        return f"Success: LoRA adapter '{lora_name}' added successfully."

    async def unload(self, lora_name: str | None, lora_int_id: int | None) -> str:
        """Unloads an adapter; requests that use it finish. Raises ApiError."""
        if not lora_name and lora_int_id is None:
            message = "'lora_name' needs to be provided to unload a LoRA adapter."
            raise ApiError(400, message, kind="InvalidUserInput")
        by_id = not lora_name
        if not lora_name:
            lora_name = self._names.get(lora_int_id or 0, str(lora_int_id))
        async with self._alone(lora_name):
            adapter = self._adapters.get(lora_name)
            # Another one may have got the name by now.
            if adapter is None or (by_id and adapter.lora_int_id != lora_int_id):
                raise ApiError(404, f"The lora adapter '{lora_name}' cannot be found.")
            del self._adapters[lora_name], self._cards[lora_name]
            self._metrics.unloaded(lora_name)
            if self._forget_id(adapter):
                await self._llm.remove_lora(adapter.lora_int_id)
        return f"Success: LoRA adapter '{lora_name}' removed successfully."

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: the base model's names, then adapters in load order."""
        return list(self._cards.values())

    def card(self, name: str) -> dict[str, Any]:
        """That of the model a request means by a name. Raises ApiError 404."""
        card, lora_name = self._cards.get(name), self._lora_name(name)
        if card is None and lora_name in self._adapters:
            card = {**self._cards[lora_name], "id": name}
        if card is None:
            raise ApiError(404, f"The model `{name}` does not exist.", param="model")
        return card

    def _lora_name(self, name: str) -> str:
        """An adapter's name of ``base:adapter``; any other as it is."""
        # One base name may begin another.
        bases = sorted(self._options.model_names, key=len, reverse=True)
        prefixes = [f"{base}:" for base in bases]
        meant = [name.removeprefix(each) for each in prefixes if name.startswith(each)] or [name]
        return next((each for each in meant if each in self._adapters), meant[0])

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        created = int(time.time())
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "jaxlora",
            "root": _sendable(root),
            "parent": None if parent is None else _sendable(parent),
            "max_model_len": self._llm.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{name}",
                    "object": "model_permission",
                    "created": created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }

    async def _resolve(self, lora_name: str) -> ServedAdapter | None:
        if not self._resolvers or not self._options.engine_args.enable_lora:
            return None
        async with self._alone(lora_name):
            if lora_name in self._adapters:
                return self._adapters[lora_name]
            for resolver in self._resolvers:
                request = await resolver.resolve_lora(self._options.model_names[0], lora_name)
                if request is None:
                    continue
                # It is served as what was asked for, whatever else it may be called.
                request = dataclasses.replace(request, lora_name=lora_name)
                try:
                    return await self._load(request)
                except AdapterNotFoundError:
                    continue
                except (AdapterError, ValueError) as error:
                    reason = await self._without_paths(error, request.lora_path)
                    message = f"The lora adapter '{lora_name}' was found but is refused: {reason}"
                    raise ApiError(400, message, param="model") from error
        return None

    async def _load(self, request: LoRARequest) -> ServedAdapter:
        if problem := problem_of(request.lora_name):
            raise AdapterRefusedError(problem)
        started = time.monotonic()
        # First, so that nothing is left in the engine if it fails.
        own = None
        if request.tensors is None:
            own = await asyncio.to_thread(
                chat_templates_of, request.lora_path, self._options.engine_args.download_dir
            )
        chat_templates = None
        if own is not None:
            self._templates.start()
            chat_templates = AdapterTemplates(own, self._templates)
        await self._llm.add_lora(request)
        lora_int_id = await self._llm.lora_id(request.lora_name)
        if lora_int_id is None:
            raise AdapterNotFoundError(f"{request.lora_name!r} was removed while it was loaded")
        adapter = ServedAdapter(
            name=request.lora_name, lora_int_id=lora_int_id, chat_templates=chat_templates
        )
        if request.lora_name in self._adapters:
            # Loaded in place; the id is another one if something else removed the adapter.
            self._forget_id(self._adapters[request.lora_name])
        self._adapters[request.lora_name] = adapter
        self._names[lora_int_id] = request.lora_name
        parent = request.base_model_name or self._options.model_names[0]
        card = self._card(adapter.name, request.lora_path, parent)
        self._cards[request.lora_name] = card
        seconds = time.monotonic() - started
        self._metrics.loaded(request.lora_name, seconds)
        logger.info("adapter %r loaded in %.3f s", request.lora_name, seconds)
        return adapter

    def _forget_id(self, adapter: ServedAdapter) -> bool:
        """Whether it was the adapter's still: if something else removed that, the id may have been
        given to another one."""
        is_its = self._names.get(adapter.lora_int_id) == adapter.name
        if is_its:
            del self._names[adapter.lora_int_id]
        return is_its

    def _alone(self, lora_name: str) -> asyncio.Lock:
        """One at a time for each name; a lock lives as long as somebody uses it."""
        return self._locks.setdefault(lora_name, asyncio.Lock())

    def _check_allowed(self, lora_path: str) -> None:
        """Raises ApiError unless the adapter's place is among those that are allowed."""
        roots, globs = self._options.allowed_lora_paths, self._options.allowed_lora_repos
        if not roots and not globs:
            return
        try:
            path = Path(lora_path).expanduser()
            if not path.exists() and is_repo(lora_path):
                allowed = is_allowed_repo(lora_path, globs)
            else:
                real = path.resolve()
                allowed = any(real.is_relative_to(root.resolve()) for root in roots)
        except (OSError, ValueError, RuntimeError):
            # Nothing has such a name.
            allowed = False
        if not allowed:
            raise ApiError(
                400,
                f"lora_path {lora_path!r} is outside what --allowed-lora-path and "
                "--allowed-lora-repo allow",
                param="lora_path",
            )

    async def _without_paths(self, error: Exception, lora_path: str) -> str:
        """An error's message with the adapter's place as the client named it."""
        message = str(error)
        try:
            folder = await asyncio.to_thread(
                resolve,
                lora_path,
                download_dir=self._options.engine_args.download_dir,
                with_weights=False,
            )
        except AdapterError:
            return message
        for each in (os.path.realpath(folder), str(folder)):
            message = message.replace(each, lora_path)
        return message


def _sendable(text: str) -> str:
    """A name or a path as it can be sent: of what is no Unicode, as a path may be, the escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
