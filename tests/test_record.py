"""What a benchmark writes of its circumstances."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.record import save


def test_the_command_names_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "result.json")
    argv = ["/anywhere/benchmarks/step.py", "--rows", "1", "64", "--out", path, "--model", "a/b"]
    monkeypatch.setattr(sys, "argv", argv)
    save(path, "step", [{"ms": 1.5}])
    record = json.loads(Path(path).read_text())
    assert record["command"] == (
        "python -m benchmarks.step --rows 1 64 --out result.json --model a/b"
    )
    assert (record["benchmark"], record["results"]) == ("step", [{"ms": 1.5}])


def test_the_settings_that_decide_how_programs_run_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT", "0")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    save(str(tmp_path / "result.json"), "step", [])
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["settings"] == {"XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": "0"}
