"""``jaxlora``: the command line. The only code that reads argv and the environment."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlora.cli.interrupts import ending_the_process


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status, 130 if Ctrl-C ended it."""
    # All imports are in here: those above take no time in which Ctrl-C could come.
    with ending_the_process():
        from jaxlora.cli.command_line import parsed, run

        args = parsed(argv)
    return run(args)
