"""Which client of JAX's an engine asks for, before JAX starts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import xla_bridge

from jaxlora.engine.client import ask_for_client

OPTIONS = "jax_pjrt_client_create_options"
TFRT = "use_tfrt_gpu_client"
VARIABLE = "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT"


@pytest.fixture
def before_jax(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX has a plugin for CUDA and has not started."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    before = getattr(jax.config, OPTIONS)
    yield
    jax.config.update(OPTIONS, before)


def asked(given: Any = None, *, num_devices: int = 1, is_claimed: bool = True) -> Any:
    jax.config.update(OPTIONS, given)
    assert ask_for_client(0.8, num_devices=num_devices) is is_claimed
    return getattr(jax.config, OPTIONS)


@pytest.mark.usefixtures("before_jax")
def test_for_one_gpu_it_is_the_one_that_launches_on_a_thread_of_its_own() -> None:
    assert asked() == {"memory_fraction": 0.8, TFRT: True}
    assert asked(num_devices=2) == {"memory_fraction": 0.8}


@pytest.mark.usefixtures("before_jax")
@pytest.mark.parametrize(
    ("variable", "value"),
    [(VARIABLE, "0"), (VARIABLE, "1"), ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")],
)
def test_the_environment_decides(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert asked() == {"memory_fraction": 0.8}


@pytest.mark.usefixtures("before_jax")
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"memory_fraction": 0.8, TFRT: True}),
        ({TFRT: False}, {"memory_fraction": 0.8, TFRT: False}),
        ({"allocator": "bfc"}, {"memory_fraction": 0.8, "allocator": "bfc"}),
    ],
)
def test_what_the_user_told_jax_stays(given: Any, options: dict[str, Any]) -> None:
    assert asked(given) == options
    given = given | {"memory_fraction": 0.5}
    # Of that the engine takes its part.
    assert asked(given, is_claimed=False) == options | {"memory_fraction": 0.5}


@pytest.mark.usefixtures("before_jax")
@pytest.mark.parametrize("given", ["preallocate:false", "no option"])
def test_options_as_text_are_left_to_jax(given: str) -> None:
    assert asked(given, is_claimed=False) == given


def test_only_before_jax_has_started() -> None:
    jax.devices()
    assert not ask_for_client(0.9, num_devices=1)
    code = """
import jax
from jaxlora.engine.client import ask_for_client
assert ask_for_client(0.9, num_devices=1)
jax.devices()
assert not ask_for_client(0.9, num_devices=1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
