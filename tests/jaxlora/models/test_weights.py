"""Loading: nothing missing, nothing left over, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.config import ModelConfig
from jaxlora.errors import ModelLoadError
from jaxlora.models.weights import dummy_weights, load_weights, name_table, num_weights
from jaxlora.parallel import Devices
from tests.jaxlora.tiny_config import TINY

CONFIG = ModelConfig.from_hf(
    TINY
    | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    | {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT32 = jnp.dtype("float32")
DEVICES = Devices.first(1)


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=place.shape).astype(np.float32)
        for name, place in name_table(CONFIG).items()
    }


def test_members_of_a_group_are_fused_in_order() -> None:
    given = tensors()
    model = nnx.merge(*load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES))
    prefix = "model.layers.1.self_attn."
    for part in ("weight", "bias"):
        expected = np.concatenate([given[f"{prefix}{m}_proj.{part}"] for m in "qkv"])
        np.testing.assert_array_equal(getattr(model.layers[1].qkv, part)[...], expected)
    assert num_weights(CONFIG) == sum(t.size for t in given.values())


def test_order_does_not_matter_and_dtype_is_cast() -> None:
    given = tensors()
    backwards = reversed(list(given.items()))
    _, state = load_weights(CONFIG, backwards, jnp.dtype("bfloat16"), DEVICES)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}


def test_missing_tensors_are_named() -> None:
    given = tensors()
    del given["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ModelLoadError, match=r"lacks tensors model\.layers\.0\.mlp\.up_proj"):
        load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


def test_left_over_tensors_are_named_five_at_most() -> None:
    given = tensors() | {f"extra.{i}": np.zeros(1, np.float32) for i in range(7)}
    with pytest.raises(ModelLoadError, match=r"left-over tensors extra\.0, .*and 2 more"):
        load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


def test_wrong_shapes_are_refused_with_both() -> None:
    given = tensors() | {"model.norm.weight": np.zeros(3, np.float32)}
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has shape \[3\].*\[16\]"):
        load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


def test_a_tensor_given_twice_is_refused() -> None:
    given = [*tensors().items(), ("model.norm.weight", np.zeros(16, np.float32))]
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight is in the checkpoint twice"):
        load_weights(CONFIG, iter(given), FLOAT32, DEVICES)


def test_derived_buffers_are_passed_over() -> None:
    given = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


@pytest.mark.parametrize("stored", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD], [HEAD, EMBEDDING]])
def test_a_tied_matrix_is_stored_under_either_name_or_both(stored: list[str]) -> None:
    given = tensors()
    matrix = given.pop(EMBEDDING)
    given = dict.fromkeys(stored, matrix) | given
    model = nnx.merge(*load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES))
    np.testing.assert_array_equal(model.embedding[...], matrix)


def test_a_tied_matrix_that_is_stored_nowhere_is_missing() -> None:
    given = tensors()
    del given[EMBEDDING]
    with pytest.raises(ModelLoadError, match=r"lacks tensors model\.embed_tokens\.weight"):
        load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


@pytest.mark.parametrize("change", [lambda matrix: np.roll(matrix, 1), lambda matrix: matrix[1:]])
def test_a_head_that_should_be_tied_and_is_another_matrix_is_refused(
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    given = tensors()
    given[HEAD] = change(given[EMBEDDING])
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight is another .*embeddings': False"):
        load_weights(CONFIG, iter(given.items()), FLOAT32, DEVICES)


def test_tensors_are_asked_for_one_at_a_time() -> None:
    """The loader holds no tensor of the source once it asks for the next."""
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []

    def source() -> Iterator[tuple[str, np.ndarray]]:
        for name, place in name_table(CONFIG).items():
            # Of another dtype than the model, so that the device cannot share the memory.
            tensor = np.zeros(place.shape, np.float16)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 1

    load_weights(CONFIG, source(), FLOAT32, DEVICES)


def test_dummy_weights_are_random_with_unit_norms() -> None:
    model = nnx.merge(*dummy_weights(CONFIG, FLOAT32, DEVICES, seed=0))
    np.testing.assert_array_equal(model.norm.weight[...], 1)
    first, second = model.layers[0].o.weight[...], model.layers[1].o.weight[...]
    assert 0.01 < float(jnp.std(first)) < 0.03
    assert not jnp.array_equal(first, second)
