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
