"""The two ways to multiply: the same numbers, and which one XLA is left with."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models.layers import matmul


def numbers(num_rows: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(num_rows)
    x, weight = random.standard_normal((num_rows, 24)), random.standard_normal((40, 24))
    return jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)


@pytest.mark.parametrize("num_rows", [1, 2, 16, 64, 65])
def test_with_the_weight_first_a_product_is_the_same(num_rows: int) -> None:
    x, weight = numbers(num_rows)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for weight_first in (False, True):
        y = jax.jit(functools.partial(matmul, weight_first=weight_first))(x, weight)
        assert y.shape == (num_rows, 40)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 64, 65])
@pytest.mark.parametrize("weight_first", [False, True])
def test_the_weight_is_first_in_steps_of_few_rows(num_rows: int, weight_first: bool) -> None:
    given = jax.device_put(numbers(num_rows), jax.devices("cpu")[0])
    program = jax.jit(functools.partial(matmul, weight_first=weight_first))
    text = program.lower(*given).compile().as_text()
    assert text is not None
    # The shape of the product itself, which XLA could have turned round.
    (rows,) = re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", text)
    is_first = rows == "40"
    assert is_first == (weight_first and 2 <= num_rows <= 64)
