"""A measurement as data: numbers together with where, when and how they were taken."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "peft", "torch")
SETTINGS = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT")
"""Of the environment: what decides how programs are compiled and launched."""


def circumstances() -> dict[str, Any]:
    """Hardware, versions, commit, date and command of this process."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *_arguments()]
        ),
        "commit": _commit(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": _processor(),
        "versions": versions,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def save(path: str | None, name: str, results: list[dict[str, Any]]) -> None:
    """Writes results and circumstances to ``path`` as JSON; None writes nothing."""
    if path is None:
        return
    record = {"benchmark": name, **circumstances(), "results": results}
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


def load(path: str | None) -> list[dict[str, Any]]:
    """What :func:`save` wrote to ``path`` at this commit; nothing from a tree with changes."""
    if path is None or not Path(path).exists():
        return []
    record = json.loads(Path(path).read_text())
    commit = _commit()
    return record["results"] if record["commit"] == commit and "-dirty" not in commit else []


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _arguments() -> list[str]:
    """Those of the command, files by their names: folders are this machine's."""
    return [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]


def _commit() -> str:
    """The commit, marked where the tree differs from it; outside a checkout, what a file says."""
    root = Path(__file__).resolve().parent.parent
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return describe.stdout.strip() or "unknown (not a checkout)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
