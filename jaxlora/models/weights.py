"""From checkpoint tensors to the model's arrays: one name table, nothing missing or left over.

Tensors arrive one at a time under Hugging Face names, are moved to the device as they are, and are
fused (q, k, v; gate, up) and cast there, so the host never holds more than one of them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jaxlora.checks import some
from jaxlora.config import ModelConfig
from jaxlora.errors import ModelLoadError
from jaxlora.models.llama import Llama
from jaxlora.parallel import Axes, Devices, shard

Path = tuple[Any, ...]
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old checkpoints carry and that follow from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class Place(NamedTuple):
    """Where a checkpoint tensor goes: a parameter, and which of its stacked parts it is."""

    path: Path
    part: int
    num_parts: int
    shape: tuple[int, ...]


def name_table(config: ModelConfig) -> dict[str, Place]:
    """Hugging Face tensor name -> place, for every tensor the configuration calls for."""
    hidden, mlp, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.kv_size,
    )
    table = {
        _EMBEDDING: Place(("embedding",), 0, 1, (config.vocab_size, hidden)),
        "model.norm.weight": Place(("norm", "weight"), 0, 1, (hidden,)),
    }
    if not config.tie_word_embeddings:
        table[_HEAD] = Place(("lm_head", "weight"), 0, 1, (config.vocab_size, hidden))

    def linears(at: Path, prefix: str, names: dict[str, int], d_in: int, bias: bool) -> None:
        for part, (name, d_out) in enumerate(names.items()):
            tensor = f"{prefix}.{name}"
            table[f"{tensor}.weight"] = Place((*at, "weight"), part, len(names), (d_out, d_in))
            if bias:
                table[f"{tensor}.bias"] = Place((*at, "bias"), part, len(names), (d_out,))

    for i in range(config.num_layers):
        at, hf = ("layers", i), f"model.layers.{i}"
        attention, feed_forward = f"{hf}.self_attn", f"{hf}.mlp"
        qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        linears((*at, "qkv"), attention, qkv, hidden, config.qkv_bias)
        linears((*at, "o"), attention, {"o_proj": hidden}, q, config.o_bias)
        gate_up = {"gate_proj": mlp, "up_proj": mlp}
        linears((*at, "gate_up"), feed_forward, gate_up, hidden, config.mlp_bias)
        linears((*at, "down"), feed_forward, {"down_proj": hidden}, mlp, config.mlp_bias)
        norms = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
        for name, ours in norms.items():
            table[f"{hf}.{name}.weight"] = Place((*at, ours, "weight"), 0, 1, (hidden,))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                place = Place((*at, name, "weight"), 0, 1, (config.head_dim,))
                table[f"{attention}.{name}.weight"] = place
    return table


def vocabulary_tensors(config: ModelConfig, target: str) -> tuple[str, ...]:
    """The names under which a checkpoint may have the matrix of "embed" or "lm_head": that of a
    tied model under either, or both."""
    if config.tie_word_embeddings:
        return _EMBEDDING, _HEAD
    return (_HEAD,) if target == "lm_head" else (_EMBEDDING,)


def num_weights(config: ModelConfig) -> int:
    """Number of scalars a checkpoint of this configuration has."""
    return sum(math.prod(place.shape) for place in name_table(config).values())


def load_weights(
    config: ModelConfig,
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: jnp.dtype,
    devices: Devices,
    progress: Callable[[int], object] = lambda size: None,
) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    """Builds the model's graph and state from checkpoint tensors, cast to ``dtype``.

    The graph is that of one device, the state that of all. ``progress`` is told the size of each
    tensor, in scalars. Of a tied model either matrix will do. Raises ModelLoadError naming tensors
    that are missing, left over, given twice or of the wrong shape, and a head that should be tied
    and is not the embedding.
    """
    table = name_table(config)
    table |= dict.fromkeys(vocabulary_tensors(config, "embed"), table[_EMBEDDING])
    parts: dict[Path, dict[int, jax.Array]] = {}
    arrays: dict[Path, jax.Array] = {}
    left_over: list[str] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        place = table.get(name)
        if place is None:
            if not _DERIVED.fullmatch(name):
                left_over.append(name)
            continue
        if name in seen:
            raise ModelLoadError(f"tensor {name} is in the checkpoint twice")
        if tensor.shape != place.shape:
            raise _misshapen(config, name, tensor.shape, place)
        seen.add(name)
        gathered = parts.setdefault(place.path, {})
        gathered[place.part] = jnp.asarray(tensor)
        if place.path not in arrays:
            progress(tensor.size)
        if len(gathered) == place.num_parts:
            ordered = [gathered[i] for i in range(place.num_parts)]
            axes = _axes(place.path, len(place.shape))
            array = devices.put(_fuse(ordered, dtype, axes, devices.count), axes)
            known = arrays.get(place.path)
            if known is not None and not jnp.array_equal(known, array, equal_nan=True):
                raise _not_tied()
            arrays[place.path] = array
            del parts[place.path]
    missing = [name for name in table if name not in seen and table[name].path not in arrays]
    for what, names in (("lacks", missing), ("has left-over", left_over)):
        if names:
            raise ModelLoadError(f"the checkpoint {what} tensors {some(names)}")
    return _assemble(config, dtype, devices, lambda path, like: arrays.pop(path))


def dummy_weights(
    config: ModelConfig, dtype: jnp.dtype, devices: Devices, seed: int
) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    """Random weights (normal, deviation 0.02; norms 1), made on the devices: to measure speed."""
    key = jax.random.key(seed)
    counter = iter(range(1 << 30))

    def value(path: Path, like: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-2:-1] and str(path[-2]).endswith("norm"):
            return devices.put(jnp.ones(like.shape, dtype))
        key_here = jax.random.fold_in(key, next(counter))
        return _dummy_maker(like.shape, like.dtype, like.sharding)(key_here)

    return _assemble(config, dtype, devices, value)


def weight_shapes(
    config: ModelConfig, dtype: jnp.dtype, devices: Devices
) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    """The model's graph, and shapes in the place of its arrays."""
    return _assemble(config, dtype, devices, lambda path, like: like)


@functools.cache
def _dummy_maker(
    shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    def make(key: jax.Array) -> jax.Array:
        return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def _misshapen(
    config: ModelConfig, name: str, shape: tuple[int, ...], place: Place
) -> ModelLoadError:
    if name == _HEAD and config.tie_word_embeddings:
        return _not_tied()
    return ModelLoadError(
        f"tensor {name} has shape {list(shape)}, the configuration needs {list(place.shape)}"
    )


def _not_tied() -> ModelLoadError:
    # transformers 5 takes both matrices then, earlier versions the embedding.
    return ModelLoadError(
        f"tie_word_embeddings is true, but {_HEAD} is another matrix than {_EMBEDDING}: serve it "
        "with hf_overrides={'tie_word_embeddings': False}, or remove it from the checkpoint"
    )


def _axes(path: Path, num_dimensions: int) -> Axes:
    """Logical axes of a parameter."""
    if path == ("embedding",) or path[0] == "lm_head":
        return ("vocab", "hidden")
    name = path[-2]
    if name in ("qkv", "gate_up"):
        outputs = "heads" if name == "qkv" else "mlp"
        return (outputs, "hidden")[:num_dimensions]
    if name in ("o", "down"):
        # The devices' products are summed, so only one of them may add the bias.
        inputs = "heads" if name == "o" else "mlp"
        return ("hidden", inputs) if num_dimensions == 2 else ("device",)
    return (None,) * num_dimensions


def _fuse(parts: list[jax.Array], dtype: jnp.dtype, axes: Axes, num_devices: int) -> jax.Array:
    """One parameter of a group's members: device by device, each with its part of every member."""
    cast = [part.astype(dtype) for part in parts]
    if axes == ("device",):
        return jnp.pad(cast[0], (0, (num_devices - 1) * len(cast[0])))
    if len(cast) == 1:
        return cast[0]
    if num_devices > 1:
        cast = [jnp.split(part, num_devices)[n] for n in range(num_devices) for part in cast]
    return jnp.concatenate(cast, axis=0)


def _assemble(
    config: ModelConfig,
    dtype: jnp.dtype,
    devices: Devices,
    value: Callable[[Path, jax.ShapeDtypeStruct], Any],
) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
    """Fills the model's abstract state, leaf by leaf."""
    local = shard(config, devices.count)
    weight_first = devices.platform == "cpu"
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Llama(local, dtype, devices.count, weight_first=weight_first))
    )
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        part = leaf.get_value()
        axes = _axes(path, len(part.shape))
        whole = jax.ShapeDtypeStruct(
            devices.whole_shape(part.shape, axes), part.dtype, sharding=devices.sharding(axes)
        )
        filled.append((path, leaf.replace(value(path, whole))))
    return graph, nnx.from_flat_state(filled)
