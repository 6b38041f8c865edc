"""What an adapter's way into a slot takes of the device, by JAX's own profiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.jaxlora.peft_models import Reference

ROOT = Path(__file__).parents[2]
PARTS = ["weights", "places", "scales"]
"""Arrays that are brought to the device: all matrices are one, and what the others say of each,
where it lies and its scale, takes a dozen bytes."""


def test_an_adapter_is_one_transfer_and_one_dispatch(reference: Reference) -> None:
    """However many matrices it has, and whether they are sent as they were saved or packed."""
    names = ["one-layer", "r8-qv", "r16-all", "r13-rslora", "patterns"]
    asked = {
        "base": reference.base_path,
        "adapters": {name: reference.paths[name] for name in names},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.jaxlora.swap_trace_run", json.dumps(asked)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen.pop("") == [2, ["<lambda>"] * 3]
    assert seen == {name: [len(PARTS), ["jit(_write)"]] for name in names}
