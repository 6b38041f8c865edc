"""What tests and their processes run under: full matmul precision, one compile cache, and no
unexplained skips."""

from __future__ import annotations

import os
import signal
from typing import Any

import hypothesis
import jax
import pytest

NO_ACCELERATOR = "no accelerator"
"""A skip whose reason contains this phrase is the only kind ``--strict-skips`` lets pass."""

PLATFORM_MARKERS = ("gpu", "tpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help=f"fail the run if a test was skipped for any reason but {NO_ACCELERATOR!r}",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("strict_skips"):
        config.pluginmanager.register(StrictSkips(), "strict-skips")
    # A shell starts what it runs in the background with the signal ignored, which children inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile(
        "jaxlora", deadline=None, derandomize=bool(os.environ.get("CI"))
    )
    hypothesis.settings.load_profile("jaxlora")
    # On accelerators the default precision of float32 matmuls is TF32 or bfloat16, too coarse for
    # comparisons with a reference.
    configure("jax_default_matmul_precision", "highest")
    # Most of the suite's time is compilation: keep every program for other tests and the next run.
    cache = config.cache
    if cache is not None:
        configure("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        configure("jax_persistent_cache_min_compile_time_secs", 0)


def configure(name: str, value: Any) -> None:
    """An option of JAX, here and in the processes that tests start."""
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` or ``tpu`` where JAX runs on something else."""
    for item in items:
        for platform in PLATFORM_MARKERS:
            # Asked only for marked tests, so that collecting the others starts no device.
            if item.get_closest_marker(platform) and jax.default_backend() != platform:
                reason = f"{NO_ACCELERATOR}: needs a {platform.upper()}"
                item.add_marker(pytest.mark.skip(reason=reason))


class StrictSkips:
    """Fails a run in which a test or a whole file was skipped though an accelerator would not help.

    A test that is silently skipped proves nothing; only missing hardware excuses it.
    """

    def __init__(self) -> None:
        self.unexplained: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped too, with its own attribute.
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if NO_ACCELERATOR not in reason:
            self.unexplained.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexplained and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexplained:
            terminalreporter.section("skipped without leave", red=True)
            for line in self.unexplained:
                terminalreporter.write_line(line)
            terminalreporter.write_line(
                f"--strict-skips allows a skip only if its reason contains {NO_ACCELERATOR!r}"
            )
