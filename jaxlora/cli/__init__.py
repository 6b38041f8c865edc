"""``jaxlora``: the command line. The only code that reads argv and the environment.

Each command is a module with ``add(commands)``, which adds its parser and sets ``run``; that takes
the parsed arguments and returns the exit status. It imports what it needs when it runs:
``jaxlora --help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxlora.cli import adapters, chat, generate, serve
from jaxlora.cli.arguments import UsageError
from jaxlora.errors import JaxloraError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        status: int = args.run(args)
    except (JaxloraError, UsageError, OSError) as error:
        print(f"jaxlora: {error}", file=sys.stderr)
        return 1
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="jaxlora", description="One model, many LoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (adapters, serve, chat, generate):
        command.add(commands)
    return parser
