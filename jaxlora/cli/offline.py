"""What commands that answer without a server have in common: adapters, and an engine with them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from jaxlora.cli.arguments import engine_args, lora_modules
from jaxlora.cli.interrupts import ending_the_process
from jaxlora.types import LoRARequest

if TYPE_CHECKING:
    from jaxlora.engine.engine import LLMEngine


class Started(NamedTuple):
    """An engine that has read its adapters."""

    engine: LLMEngine
    templates: dict[str, str | None]
    """The chat template of each adapter that has one of its own."""


def adapters_by_name(args: argparse.Namespace) -> dict[str, LoRARequest]:
    """Those of --lora-modules, which need no --enable-lora here. Raises UsageError."""
    args.enable_lora = args.enable_lora or bool(args.lora_modules)
    return {request.lora_name: request for request in lora_modules(args)}


def start(args: argparse.Namespace, adapters: dict[str, LoRARequest]) -> Started:
    """Loads the model and reads the adapters. Raises JaxloraError."""
    with ending_the_process():
        from jaxlora.adapters.chat_template import chat_templates_of
        from jaxlora.engine.engine import LLMEngine

        engine = LLMEngine.from_engine_args(engine_args(args))
        for request in adapters.values():
            engine.add_lora(request)
        found = {
            name: chat_templates_of(request.lora_path, args.download_dir)
            for name, request in adapters.items()
        }
        # There are no tools.
        templates = {name: own and own.default for name, own in found.items()}
    return Started(engine, templates)
