"""How a model is shared out, and that shapes stand for arrays faithfully."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlora.config import ModelConfig
from jaxlora.errors import ConfigError
from jaxlora.parallel import MESH_AXES, TENSOR, Devices, ShapesOnly, shard, spec, specs_of
from tests.jaxlora.tiny_config import TINY

CONFIG = ModelConfig.from_hf(
    TINY
    | {"vocab_size": 96, "hidden_size": 72, "intermediate_size": 48}
    | {"num_attention_heads": 12, "num_key_value_heads": 4}
)


def test_each_device_has_a_smaller_model_of_the_same_kind() -> None:
    part = shard(CONFIG, 4)
    assert (part.num_heads, part.num_kv_heads, part.head_dim) == (3, 1, 6)
    assert (part.intermediate_size, part.vocab_size, part.hidden_size) == (12, 24, 72)
    assert shard(CONFIG, 1) == CONFIG


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (3, "tensor_parallel_size=3 does not divide the model's num_key_value_heads=4"),
        (8, "tensor_parallel_size=8 does not divide the model's num_attention_heads=12"),
    ],
)
def test_a_size_that_cannot_be_shared_is_refused_by_name(count: int, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        shard(CONFIG, count)
    assert str(refusal.value) == f"{said}; it may be 1, 2, 4"


def test_axes_are_where_the_table_says() -> None:
    assert spec(("vocab", "hidden")) == PartitionSpec(TENSOR, None)
    assert spec((None, None, "kv_heads", None)) == PartitionSpec(None, None, TENSOR, None)
    with pytest.raises(KeyError):
        spec(("rows",))
    assert set(MESH_AXES.values()) == {TENSOR, None}


def test_shapes_stand_for_the_arrays_of_a_real_start() -> None:
    devices, shapes = Devices.first(1), ShapesOnly.of(jax.devices()[:1])
    for axes in ((None, "mlp"), ("device", None), (None, None)):
        real = devices.zeros((3, 5), jnp.bfloat16, axes)
        stand_in = shapes.zeros((3, 5), jnp.bfloat16, axes)
        assert (real.shape, real.dtype) == (stand_in.shape, stand_in.dtype)
        assert real.sharding == stand_in.sharding
    tree = {"a": np.ones((2, 3), np.float32), "b": [np.zeros(4, np.int32)]}
    assert specs_of(shapes.put(tree)) == specs_of(devices.put(tree))
    # What is on the host will be on every device.
    assert specs_of(tree) == {"a": PartitionSpec(), "b": [PartitionSpec()]}
