"""Runs over several CPU devices, which only a process of its own can have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_virtual_devices(module: str, asked: Any, *, count: int = 4) -> Any:
    """What ``python -m tests.jaxlora.MODULE`` prints, given what is asked; both are JSON."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }
    command = [sys.executable, "-m", f"tests.jaxlora.{module}", json.dumps(asked)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(done.stdout)
