"""Slots: who is in one, who must go, who must not; by hand and against a simple model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxlora.adapters.registry import AdapterRegistry, Registered
from jaxlora.errors import AdapterCapacityError, AdapterNotFoundError
from jaxlora.types import LoRARequest
from tests.jaxlora.engine.simulator import Loader


def make_registry(num_slots: int = 2) -> tuple[AdapterRegistry, Loader]:
    loader = Loader()
    return AdapterRegistry(num_slots, loader), loader


def use(registry: AdapterRegistry, name: str) -> int | None:
    """Acquires and releases an adapter; the slot it was written to, None if it was there."""
    entry = registry.get(LoRARequest(name))
    slot, must_load = registry.acquire(entry)
    registry.release(entry)
    return slot if must_load else None


# Names and ids


def test_an_adapter_is_read_once() -> None:
    registry, loader = make_registry()
    assert registry.add(LoRARequest("a", 3, "path"))
    assert not registry.add(LoRARequest("a", 3, "path"))
    # By name alone, as requests may.
    entry = registry.get(LoRARequest("a"))
    assert registry.get(LoRARequest("a", 3)) is entry
    assert (entry.name, entry.lora_int_id, entry.adapter.name) == ("a", 3, "path")
    assert loader.loaded == ["a"]


def test_ids_that_were_left_out_are_assigned() -> None:
    registry, _ = make_registry()
    for name, lora_int_id in (("a", None), ("b", 7), ("c", None)):
        registry.add(LoRARequest(name, lora_int_id))
    ids = {name: registry.get(LoRARequest(name)).lora_int_id for name in "abc"}
    assert ids == {"a": 1, "b": 7, "c": 8}
    assert registry.list() == {1, 7, 8}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (LoRARequest("b", 1), "lora_int_id 1 belongs to adapter 'a'.*'b'"),
        (LoRARequest("a", 2), "'a' has lora_int_id 1, the request says 2"),
        (LoRARequest("a", 1, "elsewhere"), "'a' was loaded from 'here'.*'elsewhere'.*remove_lora"),
        (LoRARequest("a", None, "elsewhere"), "'a' was loaded from 'here'.*'elsewhere'"),
        (LoRARequest("z", 1), "belongs to adapter 'a'.*'z'"),
    ],
)
def test_a_name_or_id_that_is_taken_is_refused(request_: LoRARequest, message: str) -> None:
    registry, loader = make_registry()
    registry.add(LoRARequest("a", 1, "here"))
    with pytest.raises(ValueError, match=message):
        registry.add(request_)
    with pytest.raises(ValueError, match=message):
        registry.get(request_)
    assert registry.list() == {1}
    assert loader.loaded == ["a"]


def test_an_adapter_that_cannot_be_read_disturbs_nothing() -> None:
    registry, _ = make_registry(1)
    use(registry, "a")
    with pytest.raises(AdapterNotFoundError, match="missing"):
        registry.add(LoRARequest("missing", 9))
    assert registry.list() == {1}
    assert registry.residents() == {0: "a"}
    assert registry.add(LoRARequest("b", 9))


# Slots


def test_the_least_recently_used_goes_first() -> None:
    registry, _ = make_registry(3)
    assert [use(registry, name) for name in "abc"] == [0, 1, 2]
    assert use(registry, "a") is None
    assert [use(registry, name) for name in "de"] == [1, 2]
    assert registry.residents() == {0: "a", 1: "d", 2: "e"}
    assert registry.num_evictions == 2
    assert use(registry, "b") == 0


def test_recent_is_when_the_last_use_ended() -> None:
    registry, _ = make_registry(2)
    long, short = registry.get(LoRARequest("long")), registry.get(LoRARequest("short"))
    registry.acquire(long)
    registry.acquire(short)
    registry.release(short)
    registry.release(long)
    use(registry, "new")
    assert set(registry.residents().values()) == {"long", "new"}


def test_what_is_in_use_stays() -> None:
    registry, _ = make_registry(1)
    a, b = registry.get(LoRARequest("a")), registry.get(LoRARequest("b"))
    assert registry.has_slot_for(a)
    assert registry.acquire(a) == (0, True)
    assert registry.acquire(a) == (0, False)
    for _ in range(2):
        assert registry.has_slot_for(a)
        assert not registry.has_slot_for(b)
        with pytest.raises(AdapterCapacityError, match=r"'b'.*max_loras=1"):
            registry.acquire(b)
        registry.release(a)
    assert registry.has_slot_for(b)
    assert registry.acquire(b) == (0, True)
    with pytest.raises(ValueError, match="'a' released more often than acquired"):
        registry.release(a)


def test_what_is_pinned_stays() -> None:
    registry, _ = make_registry(2)
    use(registry, "a")
    assert registry.pin(1)
    assert registry.pin(1)
    for name in "bcbc":
        use(registry, name)
    assert registry.residents() == {0: "a", 1: "c"}


def test_pinning_ahead_of_the_first_use() -> None:
    registry, _ = make_registry(2)
    for name in "abc":
        registry.add(LoRARequest(name))
    registry.pin(3)
    assert registry.residents() == {}
    for name in "cabab":
        use(registry, name)
    assert registry.residents()[0] == "c"


def test_pins_leave_a_slot_for_others() -> None:
    registry, _ = make_registry(2)
    registry.add(LoRARequest("a"))
    registry.add(LoRARequest("b"))
    registry.pin(1)
    with pytest.raises(AdapterCapacityError, match=r"pinning 'b'.*1 of max_loras=2 are pinned"):
        registry.pin(2)
    registry.remove(1)
    assert registry.pin(2)
    with pytest.raises(AdapterNotFoundError, match="no adapter has id 1"):
        registry.pin(1)


def test_removing_drains() -> None:
    registry, _ = make_registry(1)
    old = registry.get(LoRARequest("a", 1, "old"))
    registry.acquire(old)
    assert registry.remove(1)
    assert not registry.remove(1)
    assert registry.list() == set()
    # The name is free at once, the slot when its last user is done.
    new = registry.get(LoRARequest("a", 1, "new"))
    assert new is not old
    assert not registry.has_slot_for(new)
    registry.release(old)
    assert registry.acquire(new) == (0, True)
    assert registry.num_evictions == 0


def test_a_request_that_waits_outlives_the_removal_of_its_adapter() -> None:
    registry, _ = make_registry(1)
    entry = registry.get(LoRARequest("a"))
    registry.remove(1)
    assert registry.acquire(entry) == (0, True)
    registry.release(entry)
    assert entry.slot is None
    assert registry.acquire(registry.get(LoRARequest("b"))) == (0, True)


def test_emptying_idle_slots() -> None:
    registry, _ = make_registry(3)
    used = registry.get(LoRARequest("used"))
    registry.acquire(used)
    use(registry, "idle")
    registry.vacate_idle()
    assert registry.residents() == {0: "used"}
    assert use(registry, "idle") is not None
    assert registry.acquire(used) == (0, False)


class RegistryMachine(RuleBasedStateMachine):
    """The registry against: a set of residents, in order of their last use."""

    names = st.sampled_from("abcde")

    @initialize(num_slots=st.integers(1, 3))
    def start(self, num_slots: int) -> None:
        self.registry, _ = make_registry(num_slots)
        self.num_slots = num_slots
        self.known: dict[str, Registered] = {}
        self.uses: list[Registered] = []
        self.resident: list[Registered] = []
        """Least recently used first."""
        self.pinned: set[str] = set()

    def in_use(self, entry: Registered) -> bool:
        return any(each is entry for each in self.uses)

    def is_pinned(self, entry: Registered) -> bool:
        return self.known.get(entry.name) is entry and entry.name in self.pinned

    @rule(name=names)
    def get(self, name: str) -> None:
        entry = self.registry.get(LoRARequest(name))
        assert self.known.setdefault(name, entry) is entry

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        entry = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        was_there = entry in self.resident
        idle = [e for e in self.resident if not self.in_use(e) and not self.is_pinned(e)]
        full = len(self.resident) == self.num_slots
        possible = was_there or not full or bool(idle)
        assert self.registry.has_slot_for(entry) is possible
        if not possible:
            with pytest.raises(AdapterCapacityError):
                self.registry.acquire(entry)
            return
        evictions = self.registry.num_evictions
        slot, must_load = self.registry.acquire(entry)
        assert must_load is not was_there
        assert 0 <= slot < self.num_slots
        if not was_there and full:
            assert self.registry.num_evictions == evictions + 1
            assert idle[0].slot is None
            self.resident.remove(idle[0])
        else:
            assert self.registry.num_evictions == evictions
        if not was_there:
            self.resident.append(entry)
        self.uses.append(entry)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1)))
        self.registry.release(entry)
        if not self.in_use(entry):
            self.resident.remove(entry)
            if self.known.get(entry.name) is entry:
                self.resident.append(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        entry = self.known.pop(name)
        assert self.registry.remove(entry.lora_int_id)
        self.pinned.discard(name)
        if entry in self.resident and not self.in_use(entry):
            self.resident.remove(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        if name in self.pinned or len(self.pinned) + 1 < self.num_slots:
            assert self.registry.pin(self.known[name].lora_int_id)
            self.pinned.add(name)
        else:
            with pytest.raises(AdapterCapacityError):
                self.registry.pin(self.known[name].lora_int_id)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        assert self.registry.list() == {entry.lora_int_id for entry in self.known.values()}
        slots = [entry.slot for entry in self.resident]
        assert None not in slots
        assert len(set(slots)) == len(slots) <= self.num_slots
        expected = {e.slot: e.name for e in self.resident if self.known.get(e.name) is e}
        assert self.registry.residents() == expected
        for entry in self.known.values():
            assert entry.in_use == sum(each is entry for each in self.uses)
            assert (entry.slot is not None) == (entry in self.resident)


RegistryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_any_sequence_of_operations = RegistryMachine.TestCase
