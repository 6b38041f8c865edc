"""``jaxlora``: the command line. The only code that reads argv and the environment.

A command adds its parser in a function of its own and sets ``run``, which takes the parsed
arguments and returns the exit status. It imports what it needs when it runs: ``jaxlora --help`` is
quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxlora.errors import JaxloraError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        status: int = args.run(args)
    except JaxloraError as error:
        print(f"jaxlora: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxlora", description="One model, many LoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_adapters(commands)
    return parser


def _add_adapters(commands: Commands) -> None:
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
    from jaxlora.adapters.inspection import inspect_adapter
    from jaxlora.adapters.sources import resolve
    from jaxlora.models.checkpoints import open_checkpoint

    base = open_checkpoint(args.model) if args.model else None
    found = inspect_adapter(resolve(args.path), base)
    print(found)
    return 1 if found.refusals else 0
