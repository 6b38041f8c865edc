"""Where LoRA meets a linear layer, and which linears share an input.

A *group* is the linears of one layer that read the same activations. Their base weights are one
matrix, and so are the bank's arrays: ``a[layers, slots, members * r, d_in]`` with member m's rows
at ``m * r``, and ``b[layers, slots, r, d_out]`` with each member's own columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
from jaxtyping import Array, Float, Int32

from jaxlora.config import ModelConfig
from jaxlora.models.extras import GroupVectors, with_vectors
from jaxlora.models.layers import Linear, RMSNorm
from kernels_pallas.lora_linear.op import EarlyKernels, Implementation, ending
from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.slot_write.op import Pair

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""Canonical short names of the linears an adapter may target."""


class Group(NamedTuple):
    """Linears that read the same input, in column order of the fused weight."""

    name: str
    members: tuple[str, ...]
    d_in: int
    splits: tuple[int, ...]
    """Output width of each member."""
    in_axis: str | None
    """Logical axis of the input where devices split it, each with a part of the sum."""
    out_axis: str | None
    """Logical axis of the outputs where devices split them."""
    gated: bool = False
    """Of two members the second goes on, multiplied by SiLU of the first."""
    inner_bias: bool = False
    """A bias of the base is added before the gate or the residual, on the same device."""


def groups(config: ModelConfig, num_devices: int = 1) -> tuple[Group, ...]:
    """The four groups of a decoder layer. Several devices add the residual to the sum of theirs."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    alone = num_devices == 1
    o = Group("o", ("o",), q, (hidden,), in_axis="heads", out_axis=None)
    gate_up = Group("gate_up", ("gate", "up"), hidden, (mlp, mlp), None, "mlp", gated=True)
    down = Group("down", ("down",), mlp, (hidden,), in_axis="mlp", out_axis=None)
    return (
        Group("qkv", ("q", "k", "v"), hidden, (q, kv, kv), in_axis=None, out_axis="heads"),
        o._replace(inner_bias=config.o_bias and alone),
        gate_up._replace(inner_bias=config.mlp_bias),
        down._replace(inner_bias=config.mlp_bias and alone),
    )


def vocabulary_groups(config: ModelConfig) -> tuple[Group, Group]:
    """Token embedding, a linear of one-hot vectors, and output head."""
    vocab, hidden = config.vocab_size, config.hidden_size
    return (
        Group("embed", ("embed",), vocab, (hidden,), in_axis="vocab", out_axis=None),
        Group("lm_head", ("lm_head",), hidden, (vocab,), in_axis=None, out_axis="vocab"),
    )


Bank = dict[str, Pair]
"""Group name -> arrays, of all layers or of some; a group that no adapter may target is absent."""


def num_layers(bank: Bank) -> int:
    """Whose slots are in these arrays; one where there is none."""
    return next((pair.a.shape[0] for pair in bank.values()), 1)


@no_type_check  # leaves are arrays, tracers or, in between, whatever a tree is mapped to
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLora:
    """Everything one layer needs to add its adapters: arrays, this step's batch, the kernel."""

    bank: Bank
    """With this layer's slots among them: to take them out would be a copy."""
    batch: LoraBatch
    """With the place of this layer's slots."""
    kernel: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    gated_kernel: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    """What applies a group's gate at once, if the implementation can."""
    vectors: GroupVectors = dataclasses.field(default_factory=dict)
    """Gains and shifts, in a step that has an adapter with them."""
    vector_slots: Int32[Array, " T"] | None = None
    """Slot of each token whose adapter has them, -1 for the others."""

    def arrays(self, group: Group) -> tuple[jax.Array, jax.Array]:
        """A group's, all layers' slots one after the other."""
        a, b = self.bank[group.name]
        return a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])


@no_type_check  # as above
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedLinear:
    """What runs a step's linears in one piece, with what they share."""

    implementation: Implementation = dataclasses.field(metadata={"static": True})
    shared: Any
    """Of the implementation's making; None in a step without adapters, or that leaves them to
    others."""
    early: EarlyKernels | None = dataclasses.field(default=None, metadata={"static": True})
    """The implementation's, in a program whose kernels begin early."""

    def serves(self, group: Group, num_tokens: int, lora: LayerLora | None) -> bool:
        """Whether it runs the group's linear: not in steps of all sizes, nor with DoRA's vectors,
        nor with a bias that has to be added before the end."""
        num_slots = 0
        if lora is not None and group.name in lora.bank:
            if group.name in lora.vectors:
                return False
            num_slots = lora.batch.ranks.shape[0]
        sized = self.implementation.serves(num_tokens, num_slots=num_slots)
        return sized and not group.inner_bias


def norm_before(
    norm: RMSNorm, x: Float[Array, "T d"], fused: FusedLinear | None
) -> Float[Array, "T d"]:
    """``norm`` of x for a linear, by what lets that begin if it is to begin early."""
    if fused is None or fused.early is None:
        return norm(x)
    return fused.early.norm(x, norm.weight[...], eps=norm.eps)


def linear_with_lora(
    linear: Linear,
    group: Group,
    x: Float[Array, "T d_in"],
    lora: LayerLora | None,
    *,
    fused: FusedLinear | None = None,
    residual: Float[Array, "T d_out"] | None = None,
) -> Float[Array, "T columns"]:
    """The base linear, plus every token's own adapter where one is in the batch; then ``residual``
    is added, or the group's gate applied, which leaves half of the columns.

    ``fused`` is what does all of it at once, where it serves the linear.
    """
    if lora is not None and group.name not in lora.bank:
        lora = None
    if fused is not None and fused.serves(group, x.shape[0], lora):
        a, b = (None, None) if lora is None else lora.arrays(group)
        y = fused.implementation.function(
            x,
            linear.weight[...],
            splits=group.splits,
            a=a,
            b=b,
            batch=None if lora is None else lora.batch,
            residual=residual,
            gated=group.gated,
            shared=None if lora is None else fused.shared,
            # Weights and batch are the program's arguments and constants: no kernel writes them.
            early=True,
        )
        return y if linear.bias is None else y + linear.bias[...]
    has_vectors = lora is not None and group.name in lora.vectors
    if group.gated and lora is not None and lora.gated_kernel is not None and not has_vectors:
        return lora.gated_kernel(linear(x), x, *lora.arrays(group), lora.batch, splits=group.splits)
    return ending(_linear_with_lora(linear, group, x, lora), residual, gated=group.gated)


def _linear_with_lora(
    linear: Linear, group: Group, x: Float[Array, "T d_in"], lora: LayerLora | None
) -> Float[Array, "T d_out"]:
    if lora is None:
        return linear(x)
    if lora.vector_slots is None or group.name not in lora.vectors:
        y = linear(x)
    else:
        y = linear.product(x)
        bias = None if linear.bias is None else linear.bias[...]
        y = with_vectors(y, lora.vectors[group.name], lora.vector_slots, bias=bias)
    return lora.kernel(y, x, *lora.arrays(group), lora.batch, splits=group.splits)
