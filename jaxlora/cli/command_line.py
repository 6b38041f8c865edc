"""Which commands there are, how they are told apart, and how they end.

Each command is a module with ``add(commands)``, which adds its parser and sets ``run``; that takes
the parsed arguments and returns the exit status. It imports what it needs when it runs:
``jaxlora --help`` is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlora import __version__
from jaxlora.cli import adapters, bench, chat, generate, serve
from jaxlora.cli.arguments import UsageError
from jaxlora.cli.interrupts import INTERRUPTED, STATUS
from jaxlora.errors import JaxloraError

_FLAG = re.compile("--[a-z_-]+")
_STDOUT = 1


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the arguments, or those of the process, ask for; what is wrong ends the process."""
    _open_streams()
    return parser().parse_args(map(_dashed, sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Runs a command; returns the process's exit status, 130 if Ctrl-C ended it."""
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except (JaxloraError, UsageError, OSError) as error:
        if not (isinstance(error, BrokenPipeError) and _is_output_unread()):
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
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (adapters, serve, chat, generate, bench):
        command.add(commands)
    return parser


def _is_output_unread() -> bool:
    """Whether who read the output has enough; then what is buffered for it goes nowhere."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


def _open_streams() -> None:
    """A standard stream that was closed is nowhere: libraries write to it without asking, and what
    is opened next would get its number, also in processes that are started."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115  it stays
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does it: what the locale has no letters for ends no command.
        sys.stdout.reconfigure(errors="backslashreplace")


def _dashed(argument: str) -> str:
    """A flag's name with dashes: vLLM takes --max_loras for --max-loras, so do scripts for it."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if _FLAG.fullmatch(flag) else argument
