"""``jaxlora``: the command line. The only code that reads argv and the environment.

Each command is a module with ``add(commands)``, which adds its parser and sets ``run``; that takes
the parsed arguments and returns the exit status. It imports what it needs when it runs:
``jaxlora --help`` is quick.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from jaxlora.cli import adapters, bench, chat, generate, serve
from jaxlora.cli.arguments import UsageError
from jaxlora.cli.interrupts import INTERRUPTED, STATUS
from jaxlora.errors import JaxloraError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status, 130 if Ctrl-C ended it."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        status: int = args.run(args)
    except (JaxloraError, UsageError, OSError) as error:
        print(f"jaxlora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # One that is impatient with the end of the process gets no traceback either.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(INTERRUPTED, file=sys.stderr)
        return STATUS
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="jaxlora", description="One model, many LoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (adapters, serve, chat, generate, bench):
        command.add(commands)
    return parser
