"""A skip that no missing accelerator explains fails a run, in whichever process it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EXPLAINED = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu() -> None:
    raise AssertionError

def test_anywhere() -> None:
    pass
"""
SKIPPED = """
import pytest

@pytest.mark.skip(reason="another time")
def test_skipped() -> None:
    raise AssertionError
"""
SKIPPED_WHOLE = "import pytest; pytest.importorskip('no_such_module')"


@pytest.mark.parametrize(
    ("processes", "files", "code", "expected"),
    [
        ("0", {"explained": EXPLAINED}, 0, ["1 passed, 1 skipped"]),
        (
            "2",
            {"explained": EXPLAINED, "skipped": SKIPPED, "whole": SKIPPED_WHOLE},
            1,
            [
                "1 passed, 3 skipped",
                "test_skipped.py::test_skipped: Skipped: another time",
                "test_whole.py: Skipped: could not import 'no_such_module'",
            ],
        ),
    ],
)
def test_only_what_an_accelerator_would_help_may_be_skipped(
    processes: str, files: dict[str, str], code: int, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a\n")
    (tmp_path / "conftest.py").write_text("from tests.conftest import *")
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, *"-m pytest --strict-skips --dist loadfile -n".split(), processes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    for each in expected:
        assert each in done.stdout
