"""The adapter bank: what a slot holds after a load, and what a load leaves alone."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.adapters import pieces
from jaxlora.adapters.adapter import TARGETS, Adapter, LoraPair, target_shape
from jaxlora.adapters.bank import AdapterBank, rank_buckets
from jaxlora.config import ModelConfig
from jaxlora.engine.lowering import Program
from jaxlora.engine.programs import CompilationCounter, compile_all
from jaxlora.errors import AdapterCapacityError, ConfigError, forget_frames
from jaxlora.models.lora import num_layers
from jaxlora.parallel import Devices
from kernels_pallas.lora_matmul.reference import IMPLEMENTATION
from kernels_pallas.slot_write import reference as slot_write
from kernels_pallas.slot_write.op import ABSENT
from kernels_pallas.slot_write.op import Implementation as SlotWrite
from tests.jaxlora.lender import Lender
from tests.jaxlora.tiny_config import TINY

CONFIG = ModelConfig.from_hf(TINY | {"hidden_size": 24, "intermediate_size": 40})
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
SLOTS = 3
DEVICES = Devices.first(1)


def make_bank(
    dtype: jnp.dtype = FLOAT32,
    max_rank: int = 40,
    modules: tuple[str, ...] = TARGETS,
    *,
    stacked: bool = True,
    writer: SlotWrite = slot_write.IMPLEMENTATION,
    piece_bytes: int = 1 << 20,
    lender: Lender | None = None,
) -> AdapterBank:
    """An empty bank, its writes compiled, with NaN wherever nothing was written, and in the memory
    that adapters are packed in."""
    bank = AdapterBank(
        CONFIG,
        DEVICES,
        kernel=IMPLEMENTATION._replace(stacked=stacked),
        writer=writer,
        num_slots=SLOTS,
        max_rank=max_rank,
        dtype=dtype,
        modules=modules,
        allocate=(lender or Lender()).blocks.take,
        piece_bytes=piece_bytes,
    )
    writes = bank.programs()
    programs = {str(kind): Program(*write, donated=(0,)) for kind, write in writes.items()}
    compiled, _ = compile_all(programs, DEVICES, use_tqdm=False)
    bank.use_programs({kind: compiled[str(kind)] for kind in writes})
    bank.arrays = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), bank.arrays)
    return bank


@pytest.fixture(scope="module")
def banks() -> dict[str, AdapterBank]:
    """One with all layers in one array, and one with an array for each, to which adapters come in
    many pieces."""
    return {
        "float32": make_bank(),
        "bfloat16": make_bank(BFLOAT16, stacked=False, piece_bytes=1000),
    }


def make_adapter(
    ranks: Mapping[tuple[int, str], int], seed: int = 0, saved: str = "float32"
) -> Adapter:
    """Pairs of these ranks, with a scale that no 16-bit type holds."""
    random = np.random.default_rng(seed)
    modules = {}
    for (layer, target), rank in ranks.items():
        d_in, d_out = target_shape(CONFIG, target)
        modules[layer, target] = LoraPair(
            a=random.standard_normal((rank, d_in)).astype(jnp.dtype(saved)),
            b=random.standard_normal((d_out, rank)).astype(jnp.dtype(saved)),
            scale=1.0 / 3.0 + layer,
        )
    return Adapter.of("adapter", modules)


def everywhere(rank: int) -> dict[tuple[int, str], int]:
    return {(layer, target): rank for layer in range(2) for target in TARGETS}


def put(bank: AdapterBank, slot: int, adapter: Adapter) -> None:
    bank.load(slot, bank.stage(adapter))


def host(bank: AdapterBank) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Of each layer."""
    return [
        {name: (np.array(pair.a[layer]), np.array(pair.b[layer])) for name, pair in part.items()}
        for part in bank.arrays
        for layer in range(num_layers(part))
    ]


def assert_holds(bank: AdapterBank, slot: int, adapter: Adapter) -> None:
    """Up to the adapter's rank a slot is the adapter's pairs, and zero where it has none."""
    assert bank.ranks[slot] == adapter.rank
    for layer, arrays in enumerate(host(bank)):
        for group in bank.groups:
            a, b = arrays[group.name]
            column = 0
            for m, (member, width) in enumerate(zip(group.members, group.splits, strict=True)):
                expected_a = np.zeros((adapter.rank, group.d_in), bank.dtype)
                expected_b = np.zeros((adapter.rank, width), bank.dtype)
                pair = adapter.modules.get((layer, member))
                if pair is not None:
                    expected_a[: pair.rank] = pair.a
                    expected_b[: pair.rank] = pair.b.T.astype(np.float32) * np.float32(pair.scale)
                rows = a[slot, m * bank.max_rank :][: adapter.rank]
                np.testing.assert_array_equal(rows, expected_a)
                above = slice(adapter.rank, -(-adapter.rank // 16) * 16)
                assert not a[slot, m * bank.max_rank :][above].any()
                assert not b[slot, above].any()
                columns = slice(column, column + width)
                np.testing.assert_array_equal(b[slot, : adapter.rank, columns], expected_b)
                column += width


def bits(bank: AdapterBank, slot: int) -> list[bytes]:
    return [np.asarray(leaf[:, slot]).tobytes() for leaf in jax.tree.leaves(bank.arrays)]


def test_ranks_are_rounded_up_to_whole_tiles() -> None:
    assert rank_buckets(16) == (8, 16)
    assert rank_buckets(32) == (8, 16, 32)
    assert rank_buckets(48) == (8, 16, 32, 48)
    assert rank_buckets(64) == (8, 16, 32, 64)


@pytest.mark.parametrize(
    ("dtype", "saved"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float16"),
    ],
)
@pytest.mark.parametrize("rank", [1, 16, 17, 32, 40])
@pytest.mark.parametrize("slot", range(SLOTS))
def test_a_slot_holds_the_adapter_and_the_others_what_they_held(
    banks: dict[str, AdapterBank], dtype: str, saved: str, rank: int, slot: int
) -> None:
    bank = banks[dtype]
    others = [other for other in range(SLOTS) if other != slot]
    before = [bits(bank, other) for other in others]
    adapter = make_adapter(everywhere(rank), rank + slot, saved)
    put(bank, slot, adapter)
    assert_holds(bank, slot, adapter)
    assert [bits(bank, other) for other in others] == before


def test_a_smaller_adapter_leaves_nothing_of_a_larger_one(banks: dict[str, AdapterBank]) -> None:
    """Modules of lesser rank, and modules it does not have, are zero up to its own rank."""
    bank = banks["float32"]
    put(bank, 1, make_adapter(everywhere(40)))
    adapter = make_adapter({(0, "q"): 3, (0, "v"): 20, (1, "up"): 7, (1, "down"): 1})
    put(bank, 1, adapter)
    assert_holds(bank, 1, adapter)


def test_the_scale_is_folded_in_before_rounding(banks: dict[str, AdapterBank]) -> None:
    """Rounding B and the scale apart would err twice: here they differ in most places."""
    bank = banks["bfloat16"]
    adapter = make_adapter(everywhere(8))
    put(bank, 0, adapter)
    pair = adapter.modules[0, "o"]
    apart = pair.b.T.astype(BFLOAT16) * np.asarray(pair.scale, BFLOAT16)
    held = host(bank)[0]["o"][1][0, :8]
    assert (held != apart).mean() > 0.2


def test_an_adapter_is_sent_as_it_was_saved(banks: dict[str, AdapterBank]) -> None:
    """Arithmetic is the device's: in the bank's dtype an adapter takes half of what it takes in
    float32, and little more than its tensors."""
    bank = banks["bfloat16"]
    sizes = {}
    for saved in ("bfloat16", "float32"):
        adapter = make_adapter(everywhere(16), saved=saved)
        staged = bank.stage(adapter)
        assert {piece.dtype for piece in staged.packed.buffer} == {jnp.dtype(saved)}
        sizes[saved] = sum(piece.nbytes for piece in staged.packed.buffer)
        assert bank.staged_bytes(adapter) == sizes[saved] == adapter.num_bytes
        assert max(piece.nbytes for piece in staged.packed.buffer) <= 1000
        assert len(staged.packed.buffer) == -(-sizes[saved] // 1000)
    assert 2 * max(sizes.values()) <= bank.staging_bytes
    # A write puts the pieces together first.
    assert bank.reserved_bytes - bank.staging_bytes >= max(sizes.values())
    assert banks["float32"].reserved_bytes == banks["float32"].staging_bytes


def in_one_block(adapter: Adapter, *, behind: int = 0) -> Adapter:
    """As files are read: the same arrays side by side, in an order of their own, ``behind`` so many
    elements of something else."""
    arrays = [array for pair in adapter.modules.values() for array in (pair.b, pair.a)][::-1]
    block = np.concatenate(
        [np.zeros(behind, arrays[0].dtype), *(array.reshape(-1) for array in arrays)]
    )
    end, modules = block.size, {}
    for key, pair in adapter.modules.items():
        a_at = end - pair.b.size - pair.a.size
        modules[key] = dataclasses.replace(
            pair,
            a=block[a_at : a_at + pair.a.size].reshape(pair.a.shape),
            b=block[end - pair.b.size : end].reshape(pair.b.shape),
            at=(a_at, end - pair.b.size),
        )
        end = a_at
    assert end == behind
    return Adapter.of(adapter.name, modules, blocks=[block])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "copied"),
    [
        (everywhere(16), False),
        (everywhere(8), False),
        (everywhere(32), False),
        ({(1, "k"): 16, (0, "down"): 16}, True),
        (everywhere(3), True),
        (everywhere(16) | {(0, "q"): 32}, True),
    ],
    ids=["16", "8", "32", "few", "smallest", "mixed"],
)
def test_a_block_is_sent_as_it_is(
    banks: dict[str, AdapterBank],
    dtype: str,
    ranks: dict[tuple[int, str], int],
    copied: bool,
) -> None:
    bank = banks[dtype]
    apart = make_adapter(ranks, seed=7, saved=dtype)
    together = in_one_block(apart)
    _, packed = bank.pack(together)
    assert np.shares_memory(packed.buffer, together.blocks[0]) is not copied
    put(bank, 0, make_adapter(everywhere(40), seed=8))
    put(bank, 0, together)
    put(bank, 1, make_adapter(everywhere(40), seed=8))
    put(bank, 1, apart)
    assert_holds(bank, 0, together)
    assert bits(bank, 0) == bits(bank, 1)


class Alike:
    """What adapters have in common."""


@pytest.mark.parametrize("ranks", [everywhere(16), everywhere(16) | {(0, "q"): 32}])
def test_adapters_that_lie_alike_share_what_a_write_is_told(
    ranks: dict[tuple[int, str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a block, or packed matrix by matrix."""
    bank, alike = make_bank(), Alike()
    first, second = (
        dataclasses.replace(in_one_block(make_adapter(ranks, seed=seed)), alike=alike)
        for seed in (1, 2)
    )
    put(bank, 0, first)
    with monkeypatch.context() as patch:
        patch.setattr(bank, "_scales", None)
        patch.setattr(bank, "_places_as_saved", None)
        put(bank, 1, second)
    assert_holds(bank, 0, first)
    assert_holds(bank, 1, second)
    # By one with other scales nothing is taken over, and nothing is kept for none.
    scaled = {key: dataclasses.replace(pair, scale=7.0) for key, pair in second.modules.items()}
    other = Adapter.of("other", scaled, blocks=second.blocks, alike=Alike())
    put(bank, 0, other)
    assert_holds(bank, 0, other)
    del alike, first, second, other
    gc.collect()
    assert not bank._tables


@pytest.mark.parametrize(("dtype", "saved"), [("bfloat16", "float16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("cut", [True, False])
def test_a_block_of_another_dtype_is_converted_in_few_pieces(
    banks: dict[str, AdapterBank],
    dtype: str,
    saved: str,
    cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its matrices stay where they are in it."""
    if cut:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 10)
        monkeypatch.setattr(pieces, "num_threads", lambda: 3)
    bank = banks[dtype]
    adapter = in_one_block(make_adapter(everywhere(16), seed=7, saved=saved))
    _, packed = bank.pack(adapter)
    assert packed.buffer.dtype == FLOAT32
    np.testing.assert_array_equal(packed.buffer, adapter.blocks[0].astype(np.float32))
    for (layer, target), pair in adapter.modules.items():
        assert tuple(packed.places[layer, bank._numbers[target]]) == pair.at
    put(bank, 0, make_adapter(everywhere(40), seed=8))
    put(bank, 0, adapter)
    assert_holds(bank, 0, adapter)


@pytest.mark.parametrize(("alignment", "moved"), [(4, False), (8, True)])
def test_matrices_are_moved_where_the_write_wants_them(alignment: int, moved: bool) -> None:
    writer = slot_write.IMPLEMENTATION._replace(alignment=alignment)
    bank = make_bank(max_rank=32, writer=writer)
    ranks = everywhere(16)
    del ranks[1, "k"]
    adapter = in_one_block(make_adapter(ranks, seed=7), behind=1)
    _, packed = bank.pack(adapter)
    assert (tuple(packed.places[0, 0]) != adapter.modules[0, "q"].at) is moved
    assert not (packed.places[packed.places != ABSENT] * 4 % alignment).any()
    put(bank, 0, adapter)
    assert_holds(bank, 0, adapter)


def test_what_places_cannot_count_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_lora_rank=4194304 has \d{10} elements.*2147483647"):
        make_bank(max_rank=1 << 22)


def test_a_device_without_room_says_so(
    banks: dict[str, AdapterBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    adapter = make_adapter(everywhere(16))
    monkeypatch.setattr(jax, "device_put", full)
    message = rf"'adapter' of {banks['float32'].staged_bytes(adapter)} bytes.*RESOURCE_EXHAUSTED"
    with pytest.raises(AdapterCapacityError, match=message):
        banks["float32"].stage(adapter)


def test_a_transfer_that_fails_half_way_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = Lender()
    bank = make_bank(BFLOAT16, piece_bytes=1000, lender=lender)
    adapter = make_adapter(everywhere(16), saved="bfloat16")
    put_parts, pieces = Devices.put_parts, itertools.count()

    def full(devices: Devices, parts: np.ndarray) -> jax.Array:
        if next(pieces) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return put_parts(devices, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Devices, "put_parts", full)
        with pytest.raises(AdapterCapacityError, match="RESOURCE_EXHAUSTED") as refusal:
            bank.stage(adapter)
    assert next(pieces) == 3
    forget_frames(refusal.value)
    lender.check_lent(0)
    put(bank, 0, adapter)
    assert_holds(bank, 0, adapter)


@pytest.mark.parametrize(("kind", "rank"), [("float32", 40), ("bfloat16", 33)])
def test_the_largest_adapter_takes_as_much_memory_as_is_said(
    kind: str, rank: int, banks: dict[str, AdapterBank]
) -> None:
    bank = banks[kind]
    _, packed = bank.pack(make_adapter(everywhere(rank), saved=kind))
    assert packed.buffer.nbytes == bank.packed_bytes


def test_groups_that_no_adapter_may_target_take_no_memory() -> None:
    bank = make_bank(max_rank=16, modules=("q", "down"))
    assert [group.name for group in bank.groups] == ["qkv", "down"]
    assert [set(part) for part in bank.arrays] == [{"qkv", "down"}]
    # As where only the embedding may be targeted, say.
    without = make_bank(max_rank=16, modules=())
    assert (without.num_bytes, without.packed_bytes) == (0, 0)
    put(without, 1, make_adapter({}))
    assert without.ranks[1] == 0
    columns = CONFIG.q_size + 2 * CONFIG.kv_size
    sizes = 16 * (3 * 24 + columns) + 16 * (40 + 24)
    assert bank.num_bytes == 2 * SLOTS * sizes * 4
    adapter = make_adapter({(1, "q"): 5, (0, "down"): 9})
    put(bank, 2, adapter)
    assert_holds(bank, 2, adapter)


def test_a_load_neither_compiles_nor_disturbs_a_step_under_way(
    banks: dict[str, AdapterBank],
) -> None:
    bank = banks["float32"]
    ranks, arrays = bank.ranks, bank.arrays
    held = ranks.copy()
    adapter = make_adapter(everywhere(int(held[0]) % 40 + 1))
    compilations = CompilationCounter()
    put(bank, 0, adapter)
    assert compilations.total == 0
    # The step's own array, which a transfer may still be reading.
    np.testing.assert_array_equal(ranks, held)
    assert bank.ranks[0] != held[0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arrays))


def test_ranks_are_padded_with_zeros_to_a_multiple_of_16(banks: dict[str, AdapterBank]) -> None:
    # The decode kernel contracts 16 ranks at a time, without a mask.
    bank = banks["bfloat16"]
    put(bank, 1, make_adapter(everywhere(32), seed=1))
    put(bank, 1, make_adapter(everywhere(21), seed=2))
    for arrays in host(bank):
        for group in bank.groups:
            a, b = (array.astype(np.float32) for array in arrays[group.name])
            for m in range(len(group.members)):
                padding = slice(m * bank.max_rank + 21, m * bank.max_rank + 32)
                assert not a[1, padding].any()
            assert not b[1, 21:32].any()
