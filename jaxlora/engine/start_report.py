"""What a start took, phase by phase."""

from __future__ import annotations

import time

from jaxlora.engine.program_report import ProgramReport


class StartReport:
    """Seconds of each phase of a start, and what became of the programs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By phase, in order."""
        self.weight_seconds = 0.0
        """That loading weights took, beside other phases."""
        self.programs = ProgramReport()
        self._began = self._last = time.perf_counter()

    def note(self, phase: str) -> None:
        """Ends a phase that began when the last one ended."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the beginning to the last phase's end."""
        return self._last - self._began

    def __str__(self) -> str:
        """For logs."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return (
            f"started in {self.total:.1f} s: {phases} (meanwhile weights {self.weight_seconds:.1f})"
        )
