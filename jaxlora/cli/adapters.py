"""``jaxlora adapters``: a look at adapters, without an engine."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from jaxlora.cli.interrupts import ending_the_process

if TYPE_CHECKING:
    from jaxlora.cli.arguments import Commands


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser("adapters", help="look at LoRA adapters")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect",
        help="what an adapter holds, and whether it would be served",
        description="Prints rank, targets, size and norms of a PEFT adapter, and whether it would "
        "be served or why not. The exit status is 1 if it would be refused.",
    )
    inspect.add_argument("path", help="the adapter's folder, or its id on the hub")
    inspect.add_argument(
        "--model",
        help="the base model (folder, .gguf file or hub id): without it shapes are not checked",
    )
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    with ending_the_process():
        from jaxlora.adapters.inspection import inspect_adapter
        from jaxlora.adapters.sources import resolve
        from jaxlora.errors import ModelLoadError
        from jaxlora.models.checkpoints import open_checkpoint
        from jaxlora.tokenizer import load_tokenizer

        base = open_checkpoint(args.model) if args.model else None
        token_of = None
        if base is not None:
            # A model without one is served by token ids, for which nobody's tokenizer matters.
            with contextlib.suppress(ModelLoadError):
                token_of = load_tokenizer(base).token
        found = inspect_adapter(resolve(args.path), base, token_of)
    print(found)
    return 1 if found.refusals else 0
