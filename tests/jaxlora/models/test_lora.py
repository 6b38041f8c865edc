"""Where a linear's adapters are added, and what is asked of an implementation that also gates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.models.extras import Vectors
from jaxlora.models.layers import Linear
from jaxlora.models.lora import Group, LayerLora, linear_with_lora
from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import plan
from kernels_pallas.slot_write.op import Pair

GATE_UP = Group("gate_up", ("gate", "up"), 16, (24, 24), None, "mlp", gated=True)
SLOTS = np.array([-1, 2, 2, 2, 0, -1], np.int32)


class Gating:
    """An implementation that gates, by formula, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y: jax.Array, *rest: Any, splits: tuple[int, ...]) -> jax.Array:
        self.calls += 1
        z = reference.lora_matmul(y, *rest, splits=splits)
        return z[:, : splits[0]] * jax.nn.sigmoid(z[:, : splits[0]]) * z[:, splits[0] :]


def layer(gating: Gating | None) -> LayerLora:
    keys = jax.random.split(jax.random.key(1), 2)
    pair = Pair(jax.random.normal(keys[0], (3, 2 * 8, 16)), jax.random.normal(keys[1], (3, 8, 48)))
    ranks = np.array([8, 0, 3], np.int32)
    batch = jax.device_put(plan(SLOTS, ranks, block_tokens=4, aligned=False))
    return LayerLora({"gate_up": pair}, batch, reference.lora_matmul, gating)


def linear(*, bias: bool) -> Linear:
    made = Linear(16, 48, bias=bias, dtype=jnp.dtype(jnp.float32))
    keys = jax.random.split(jax.random.key(2), 2)
    made.weight = nnx.Param(jax.random.normal(keys[0], (48, 16)))
    if bias:
        made.bias = nnx.Param(jax.random.normal(keys[1], (48,)))
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_is_left_to_an_implementation_that_has_it(bias: bool) -> None:
    x = jax.random.normal(jax.random.key(3), (6, 16))
    gating = Gating()
    together = linear_with_lora(linear(bias=bias), GATE_UP, x, layer(gating))
    assert gating.calls == 1
    apart = linear_with_lora(linear(bias=bias), GATE_UP, x, layer(None))
    assert together.shape == (6, 24)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


def test_vectors_and_linears_without_adapters_are_gated_by_xla() -> None:
    x = jax.random.normal(jax.random.key(3), (6, 16))
    gating = Gating()
    lora = layer(gating)
    lora.vectors["gate_up"] = Vectors(gain=jnp.full((3, 48), 2.0), shift=None)
    linear_with_lora(linear(bias=True), GATE_UP, x, lora)
    linear_with_lora(linear(bias=True), GATE_UP, x, None)
    del lora.bank["gate_up"]
    linear_with_lora(linear(bias=True), GATE_UP, x, lora)
    assert gating.calls == 0
