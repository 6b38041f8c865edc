"""Slots: who is in one, who must go, who must not; by hand and against a simple model."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registered import Registered
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.errors import AdapterCapacityError, AdapterNotFoundError
from jaxlora.types import LoRARequest
from tests.jaxlora.engine.simulator import Loader, Reader, make_adapter, make_staging
from tests.jaxlora.patience import SECONDS


def make_registry(
    num_slots: int = 2,
    max_adapters: int | None = None,
    max_bytes: int | None = None,
    max_staged: int | None = None,
) -> tuple[AdapterRegistry, Loader]:
    loader = Loader()
    host = HostCache(max_adapters=max_adapters, max_bytes=max_bytes)
    registry = AdapterRegistry(
        num_slots,
        loader,
        staging=make_staging(max_adapters=max_staged),
        host=host,
        fingerprint=loader.fingerprint,
        readers=Reader(),
    )
    return registry, loader


@contextlib.contextmanager
def wanted(registry: AdapterRegistry, entry: Registered) -> Iterator[None]:
    """A sequence waits for an adapter, which is staged if it is on the host."""
    registry.hold(entry)
    registry.start_prefetch()
    yield
    registry.let_go(entry)


def acquire(registry: AdapterRegistry, entry: Registered) -> tuple[int, bool]:
    """The slot, and whether it must be written."""
    with wanted(registry, entry):
        slot, adapter = registry.acquire(entry)
    assert adapter is None or adapter.version == entry.version
    return slot, adapter is not None


def can_acquire(registry: AdapterRegistry, entry: Registered) -> bool:
    with wanted(registry, entry):
        return registry.is_ready(entry) and registry.has_slot_for(entry)


def read(registry: AdapterRegistry) -> list[str]:
    """Reads what is waited for; why some of it could not be."""
    return [str(error) for _, error in failures(registry)]


def failures(registry: AdapterRegistry) -> Sequence[tuple[Registered, Exception]]:
    reader = registry.prefetch._readers
    assert isinstance(reader, Reader)
    registry.start_prefetch()
    reader.run()
    return registry.finish_prefetch()


def of(name: str, content: str, *, load_inplace: bool = False) -> LoRARequest:
    """An adapter in memory only."""
    return LoRARequest.from_tensors(name, {"content": content}, {}, load_inplace=load_inplace)


def use(registry: AdapterRegistry, name: str) -> int | None:
    """Acquires and releases an adapter; the slot it was written to, None if it was there."""
    entry = registry.get(LoRARequest(name))
    slot, must_load = acquire(registry, entry)
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
    assert (entry.name, entry.lora_int_id, entry.version) == ("a", 3, make_adapter("path").version)
    assert loader.loaded == ["a"]


def test_ids_that_were_left_out_are_assigned() -> None:
    registry, _ = make_registry()
    for name, lora_int_id in (("a", None), ("b", 7), ("c", None)):
        registry.add(LoRARequest(name, lora_int_id))
    ids = {name: registry.get(LoRARequest(name)).lora_int_id for name in "abc"}
    assert ids == {"a": 1, "b": 7, "c": 8}
    assert registry.names.ids() == {1, 7, 8}
    # Who still has the id of one that is gone is never given another.
    registry.remove(8)
    registry.add(LoRARequest("d"))
    assert registry.names.ids() == {1, 7, 9}


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
    assert registry.names.ids() == {1}
    assert loader.loaded == ["a"]


def test_an_adapter_that_cannot_be_read_disturbs_nothing() -> None:
    registry, _ = make_registry(1)
    use(registry, "a")
    with pytest.raises(AdapterNotFoundError, match="missing"):
        registry.add(LoRARequest("missing", 9))
    assert registry.names.ids() == {1}
    assert registry.residents() == {0: "a"}
    assert registry.add(LoRARequest("b", 9))


def test_many_are_read_at_once() -> None:
    together = threading.Barrier(4)

    def load(request: LoRARequest) -> Adapter:
        if request.lora_name.startswith("missing"):
            raise AdapterNotFoundError(request.lora_name)
        together.wait(SECONDS)
        return make_adapter(request.lora_name)

    registry = AdapterRegistry(2, load, staging=make_staging())
    registry.add_many([LoRARequest(name) for name in "abcdefgh"])
    assert [entry.name for entry in registry.names.entries()] == list("abcdefgh")
    assert registry.reader.num_loads == 8
    with pytest.raises(AdapterNotFoundError, match="missing"):
        registry.add_many([LoRARequest("missing"), LoRARequest("late")])
    together.abort()
    assert "late" not in registry.names


# Slots


def test_the_least_recently_used_goes_first() -> None:
    registry, _ = make_registry(3)
    assert [use(registry, name) for name in "abc"] == [0, 1, 2]
    assert use(registry, "a") is None
    assert [use(registry, name) for name in "de"] == [1, 2]
    assert registry.residents() == {0: "a", 1: "d", 2: "e"}
    assert registry.slots.num_evictions == 2
    assert use(registry, "b") == 0


def test_recent_is_when_the_last_use_ended() -> None:
    registry, _ = make_registry(2)
    long, short = registry.get(LoRARequest("long")), registry.get(LoRARequest("short"))
    acquire(registry, long)
    acquire(registry, short)
    registry.release(short)
    registry.release(long)
    use(registry, "new")
    assert set(registry.residents().values()) == {"long", "new"}


def test_what_is_in_use_stays() -> None:
    registry, _ = make_registry(1)
    a, b = registry.get(LoRARequest("a")), registry.get(LoRARequest("b"))
    assert can_acquire(registry, a)
    assert acquire(registry, a) == (0, True)
    assert acquire(registry, a) == (0, False)
    for _ in range(2):
        assert can_acquire(registry, a)
        assert not can_acquire(registry, b)
        with pytest.raises(AdapterCapacityError, match=r"'b'.*max_loras=1"):
            acquire(registry, b)
        registry.release(a)
    assert can_acquire(registry, b)
    assert acquire(registry, b) == (0, True)
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


def test_pinning_brings_into_a_slot() -> None:
    registry, loader = make_registry(2, max_adapters=3)
    for name in "abcd":
        registry.add(LoRARequest(name))
    registry.pin(1)
    # It has left the host meanwhile.
    assert registry.has_work
    assert registry.place_pinned() == []
    assert read(registry) == []
    registry.start_prefetch()
    assert [slot for slot, _ in registry.place_pinned()] == [0]
    assert not registry.has_work
    assert loader.loaded == ["a", "b", "c", "d", "a"]
    for name in "cdcd":
        use(registry, name)
    assert registry.residents() == {0: "a", 1: "d"}


def test_a_pin_whose_adapter_is_gone_ends() -> None:
    registry, loader = make_registry(1, max_adapters=2)
    for name in "abc":
        registry.add(LoRARequest(name))
    registry.pin(1)
    loader.written["a"] = None
    assert len(read(registry)) == 1
    assert not registry.names.find("a").pinned
    assert not registry.has_work
    assert use(registry, "c") == 0


def test_pins_may_take_every_slot_that_no_request_asks_for() -> None:
    registry, _ = make_registry(2)
    a, b, c = (registry.get(LoRARequest(name)) for name in "abc")
    registry.pin(1)
    registry.hold(c)
    with pytest.raises(
        AdapterCapacityError,
        match=r"pinning .b.* 1 are pinned.*for 1 others; remove_lora .*raise max_loras",
    ):
        registry.pin(2)
    registry.let_go(c)
    assert registry.pin(2)
    for entry in (a, b):
        registry.check_can_run(entry)
    with pytest.raises(AdapterCapacityError, match=r"'c'.*max_loras=2.* 2 are pinned; remove_lora"):
        registry.check_can_run(c)
    with pytest.raises(AdapterCapacityError, match="pinning 'c' would leave too few slots"):
        registry.pin(3)
    registry.remove(1)
    registry.check_can_run(c)
    with pytest.raises(AdapterNotFoundError, match="no adapter has id 1"):
        registry.pin(1)


def test_the_one_slot_may_be_pinned_when_nobody_else_asks_for_it() -> None:
    registry, _ = make_registry(1)
    registry.get(LoRARequest("a"))
    b = registry.get(LoRARequest("b"))
    registry.hold(b)
    message = (
        "pinning 'a' would leave too few slots: of max_loras=1 slots 0 are in use, 0 are pinned, "
        "and requests ask for 1 others; pin it when those requests have ended, or raise max_loras"
    )
    with pytest.raises(AdapterCapacityError, match=f"^{message}$"):
        registry.pin(1)
    registry.let_go(b)
    assert registry.pin(1)


def test_the_one_slot_is_pinned_and_its_adapter_replaced() -> None:
    """Requests that wait for the old version get the slot before the new one keeps it."""
    registry, _ = make_registry(1)
    old = registry.get(LoRARequest("a"))
    registry.pin(1)
    registry.hold(old)
    registry.add(of("a", "new", load_inplace=True))
    new = registry.get(LoRARequest("a"))
    assert new.pinned
    registry.hold(new)
    registry.start_prefetch()
    assert registry.place_pinned() == []
    assert not registry.has_slot_for(new)
    assert acquire(registry, old) == (0, True)
    registry.release(old)
    registry.let_go(old)
    assert [slot for slot, _ in registry.place_pinned()] == [0]
    assert acquire(registry, new) == (0, False)


def test_removing_drains() -> None:
    registry, _ = make_registry(1)
    old = registry.get(LoRARequest("a", 1, "old"))
    acquire(registry, old)
    assert registry.remove(1)
    assert not registry.remove(1)
    assert registry.names.ids() == set()
    # The name is free at once, the slot when its last user is done.
    new = registry.get(LoRARequest("a", 1, "new"))
    assert new is not old
    assert not can_acquire(registry, new)
    registry.release(old)
    assert acquire(registry, new) == (0, True)
    assert registry.slots.num_evictions == 0


def test_a_request_that_waits_outlives_the_removal_of_its_adapter() -> None:
    registry, _ = make_registry(1)
    entry = registry.get(LoRARequest("a"))
    registry.hold(entry)
    registry.remove(1)
    for first in (True, False):  # Preempted, it stays in its slot.
        assert acquire(registry, entry) == (0, first)
        registry.release(entry)
    assert not can_acquire(registry, registry.get(LoRARequest("b")))
    registry.let_go(entry)
    assert entry.slot is None
    assert acquire(registry, registry.get(LoRARequest("b"))) == (0, True)


def test_emptying_idle_slots() -> None:
    registry, _ = make_registry(3)
    used = registry.get(LoRARequest("used"))
    acquire(registry, used)
    use(registry, "idle")
    registry.slots.vacate_idle()
    assert registry.residents() == {0: "used"}
    assert use(registry, "idle") is not None
    assert acquire(registry, used) == (0, False)


# Versions


def test_new_content_is_a_new_version() -> None:
    registry, loader = make_registry()
    old = registry.get(LoRARequest("a", 4, "path"))
    registry.hold(old)
    assert acquire(registry, old) == (0, True)
    registry.pin(4)
    loader.written["path"] = "new"
    # Requests do not look at the folder, adding does.
    assert registry.get(LoRARequest("a", 4, "path")) is old
    assert registry.add(LoRARequest("a", 4, "path"))
    new = registry.get(LoRARequest("a"))
    assert (new.lora_int_id, new.pinned, old.pinned) == (4, True, False)
    assert (old.version, new.version) == (make_adapter("path").version, make_adapter("new").version)
    assert registry.names.ids() == {4}
    assert acquire(registry, new) == (1, True)
    registry.release(old)
    assert old.slot == 0
    registry.let_go(old)
    assert old.slot is None
    assert registry.residents() == {1: "a"}
    assert len(registry.host) == 1


def test_an_idle_version_frees_its_slot_when_it_is_replaced() -> None:
    registry, _ = make_registry(1)
    use(registry, "a")
    assert registry.add(of("a", "new", load_inplace=True))
    assert registry.residents() == {}
    assert use(registry, "a") == 0
    assert registry.slots.num_evictions == 0


@pytest.mark.parametrize("request_", [LoRARequest("a", None, "copy", load_inplace=True)])
def test_equal_content_is_the_same_version(request_: LoRARequest) -> None:
    registry, loader = make_registry()
    loader.written["copy"] = "here"
    entry = registry.get(LoRARequest("a", None, "here"))
    acquire(registry, entry)
    assert not registry.add(request_)
    assert registry.get(LoRARequest("a")) is entry
    assert entry.request == LoRARequest("a", None, "copy")
    assert not registry.add(of("a", "here", load_inplace=True))
    assert (entry.request.lora_path, entry.in_memory) == ("copy", False)
    # An adapter in memory that is now in a folder can be read there.
    memory = registry.get(of("m", "here"))
    assert memory.in_memory
    assert not registry.add(LoRARequest("m", None, "here", load_inplace=True))
    assert not memory.in_memory


def test_what_cannot_be_read_leaves_the_version_there_is() -> None:
    registry, loader = make_registry()
    entry = registry.get(LoRARequest("a"))
    loader.written["a"] = None
    assert not registry.add(LoRARequest("a"))
    with pytest.raises(AdapterNotFoundError):
        registry.add(LoRARequest("a", load_inplace=True))
    assert registry.get(LoRARequest("a")) is entry
    assert not entry.retired
    assert use(registry, "a") == 0


def test_other_tensors_under_a_name_are_not_taken_for_the_first() -> None:
    registry, _ = make_registry()
    first = of("a", "one")
    entry = registry.get(first)
    assert registry.get(first) is entry
    with pytest.raises(ValueError, match="'a' was not made of these tensors; update_lora it"):
        registry.get(of("a", "two"))
    with pytest.raises(ValueError, match="'a' was made of tensors, the request names 'a folder'"):
        registry.get(LoRARequest("a", None, "a folder"))
    assert registry.add(of("a", "two", load_inplace=True))
    assert registry.get(LoRARequest("a")).version == make_adapter("two").version
    assert registry.get(LoRARequest("a")).request.tensors.tensors == {}  # type: ignore[union-attr]
    with pytest.raises(AdapterNotFoundError, match="no adapter is named 'b'"):
        registry.names.find("b")


# The host's tier


def test_ten_adapters_wait_with_room_for_two() -> None:
    registry, loader = make_registry(3, max_adapters=2)
    entries = [registry.get(LoRARequest(name)) for name in "abcdefghij"]
    assert len(registry.host) == 2
    for entry in entries:
        registry.hold(entry)
    waiting, running = list(entries), []
    while waiting:
        ready = [entry for entry in waiting if can_acquire(registry, entry)]
        for entry in ready:
            if can_acquire(registry, entry):
                assert acquire(registry, entry)[1]
                waiting.remove(entry)
                running.append(entry)
        assert read(registry) == []
        assert len(registry.host) <= 2
        if not ready:
            done = running.pop(0)
            registry.release(done)
            registry.let_go(done)
    assert len(registry.names.ids()) == 10
    # Each once when it was registered, and once more unless it was still there.
    assert loader.loaded[:10] == list("abcdefghij")
    assert len(loader.loaded) == 18


def test_what_waits_for_a_slot_is_kept() -> None:
    registry, loader = make_registry(1, max_adapters=1)
    a = registry.get(LoRARequest("a"))
    registry.hold(a)
    b = registry.get(LoRARequest("b"))
    registry.hold(b)
    assert (registry.host.has(a), registry.host.has(b)) == (True, False)
    assert read(registry) == []
    assert not registry.host.has(b)
    acquire(registry, a)
    assert read(registry) == []
    assert (registry.host.has(a), registry.host.has(b)) == (False, True)
    assert loader.loaded == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("written", "message"),
    [("other", "'b' has changed in 'b'.*load_inplace=True"), (None, "No adapter found for 'b'")],
)
def test_what_changed_since_is_not_served(written: str | None, message: str) -> None:
    registry, loader = make_registry(2, max_adapters=1)
    a, b = registry.get(LoRARequest("a")), registry.get(LoRARequest("b", None, "b"))
    registry.get(LoRARequest("c"))
    loader.written["b"] = written
    registry.hold(b)
    (reason,) = read(registry)
    assert re.search(message, reason, re.DOTALL)
    assert b not in registry.host
    registry.let_go(b)
    # It is registered still, and can be had once its folder is what it was.
    loader.written["b"] = "b"
    registry.hold(b)
    assert read(registry) == []
    assert acquire(registry, b) == (0, True)
    assert a.slot is None


def test_a_read_that_nobody_waits_for_any_more() -> None:
    registry, _ = make_registry(1, max_adapters=1)
    a, b = registry.get(LoRARequest("a")), registry.get(LoRARequest("b"))
    registry.hold(a)
    registry.start_prefetch()
    registry.let_go(a)
    registry.hold(b)
    registry.start_prefetch()
    assert a not in registry.host
    assert read(registry) == []
    assert registry.host.has(b)
    assert not registry.prefetch.is_busy


def test_pinned_and_in_memory_adapters_stay_on_the_host() -> None:
    registry, _ = make_registry(3, max_adapters=3)
    pinned, memory = registry.get(LoRARequest("pinned")), registry.get(of("memory", "m"))
    registry.pin(pinned.lora_int_id)
    for name in "abcd":
        use(registry, name)
        assert registry.host.has(pinned)
        assert registry.host.has(memory)
    with pytest.raises(AdapterCapacityError, match=r"pinning 'd'.*max_cpu_loras=3"):
        registry.pin(registry.get(LoRARequest("d")).lora_int_id)
    with pytest.raises(AdapterCapacityError, match=r"adapter 'n'.*3 adapters.*max_cpu_loras=3"):
        registry.add(of("n", "n"))
    assert "n" not in registry.names._by_name
    # In the place of the old is room for the new.
    assert registry.add(of("memory", "other", load_inplace=True))
    assert registry.remove(registry.get(LoRARequest("memory")).lora_int_id)
    assert registry.add(of("n", "n"))


def test_what_is_in_memory_only_needs_room_at_once() -> None:
    registry, _ = make_registry(1, max_adapters=2)
    for name in "ab":
        registry.hold(registry.get(LoRARequest(name)))
    with pytest.raises(AdapterCapacityError, match="'m', which is in memory only, while others"):
        registry.add(of("m", "m"))
    acquire(registry, registry.get(LoRARequest("a")))
    assert registry.add(of("m", "m"))


def test_the_limit_of_bytes() -> None:
    size = make_adapter("a").num_bytes
    registry, _ = make_registry(2, max_bytes=2 * size)
    for name in "abc":
        use(registry, name)
    assert (len(registry.host), registry.host.num_bytes) == (2, 2 * size)
    tiny, _ = make_registry(2, max_bytes=size - 1)
    with pytest.raises(AdapterCapacityError, match=rf"'a'.*{size} bytes.*max_cpu_lora_gb"):
        tiny.add(LoRARequest("a"))
    assert tiny.names.ids() == set()


class RegistryMachine(RuleBasedStateMachine):
    """The registry against a model: who holds which version, and residents by their last use."""

    names = st.sampled_from("abcde")
    contents = st.sampled_from(["old", "new", "newest"])

    @initialize(
        num_slots=st.integers(1, 3),
        room=st.sampled_from([None, 1, 2, 4]),
        max_staged=st.sampled_from([None, 1, 2]),
    )
    def start(self, num_slots: int, room: int | None, max_staged: int | None) -> None:
        self.registry, self.loader = make_registry(num_slots, room, max_staged=max_staged)
        self.num_slots, self.room, self.max_staged = num_slots, room, max_staged
        self.folders = {name: name for name in "abcde"}
        self.known: dict[str, Registered] = {}
        self.holders: list[Registered] = []
        self.uses: list[Registered] = []
        self.resident: list[Registered] = []
        """Least recently used first."""
        self.pinned: set[str] = set()
        self.in_memory: set[Registered] = set()

    def is_current(self, entry: Registered) -> bool:
        return self.known.get(entry.name) is entry

    def is_pinned(self, entry: Registered) -> bool:
        return self.is_current(entry) and entry.name in self.pinned

    def staged(self) -> list[Registered]:
        """What is staged once there was time for it: the first that are on the host, pinned ones
        before those that are waited for."""
        self.registry.start_prefetch()
        pinned = [e for e in self.registry._pinned if e not in self.resident]
        waiting = [e for e in self.registry._held if e not in self.resident and e not in pinned]
        assert {e.name for e in pinned} <= self.pinned
        assert set(waiting) <= set(self.holders)
        return [e for e in pinned + waiting if self.registry.host.has(e)][: self.max_staged]

    def can_enter(self, entry: Registered) -> bool:
        """A slot can be had for an adapter that has none."""
        if self.is_pinned(entry):
            pinned = sum(map(self.is_pinned, self.resident))
            asked_for = (e for e in self.holders if e not in self.resident)
            if pinned + 1 == self.num_slots and any(not self.is_pinned(e) for e in asked_for):
                return False
        return len(self.resident) < self.num_slots or bool(self.idle())

    def idle(self) -> list[Registered]:
        """Residents that may go."""
        return [
            e
            for e in self.resident
            if e not in self.uses and not self.is_pinned(e) and self.is_current(e)
        ]

    def enter(self, entry: Registered, num_evictions: int) -> None:
        """An adapter got a slot, if need be another's."""
        full = len(self.resident) == self.num_slots
        assert self.registry.slots.num_evictions == num_evictions + full
        if full:
            gone = self.idle()[0]
            assert gone.slot is None
            self.resident.remove(gone)
        self.resident.append(entry)

    def leave(self, entry: Registered) -> None:
        """An entry that is no longer registered, and whom nobody holds, is gone."""
        if entry not in self.holders and not self.is_current(entry) and entry in self.resident:
            self.resident.remove(entry)

    def changed(self, name: str) -> None:
        """A name was registered, or not; its entry is what the registry says, if that is new."""
        old = self.known.get(name)
        new = self.registry.names.find(name)
        assert new is not old
        self.known[name] = new
        if old is not None:
            assert new.lora_int_id == old.lora_int_id
            self.leave(old)

    @rule(name=names, content=contents)
    def write(self, name: str, content: str) -> None:
        self.folders[name] = self.loader.written[name] = content

    @rule(name=names, load_inplace=st.booleans())
    def add(self, name: str, load_inplace: bool) -> None:
        old = self.known.get(name)
        version = make_adapter(self.folders[name]).version
        try:
            is_new = self.registry.add(LoRARequest(name, load_inplace=load_inplace))
        except AdapterCapacityError:
            assert self.room is not None
            assert self.registry.names._by_name.get(name) is old
            return
        was_read = old is None or load_inplace or old not in self.in_memory
        assert is_new is (old is None or (was_read and old.version != version))
        if is_new:
            self.changed(name)
            assert self.known[name].version == version

    @rule(name=names, content=contents)
    def update(self, name: str, content: str) -> None:
        old = self.known.get(name)
        try:
            is_new = self.registry.add(of(name, content, load_inplace=True))
        except AdapterCapacityError:
            assert self.room is not None
            assert self.registry.names._by_name.get(name) is old
            return
        assert is_new is (old is None or old.version != make_adapter(content).version)
        if is_new:
            self.changed(name)
            self.in_memory.add(self.known[name])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def request(self, data: st.DataObject) -> None:
        """A sequence is queued."""
        name = data.draw(st.sampled_from(sorted(self.known)))
        entry = self.registry.get(LoRARequest(name))
        assert entry is self.known[name]
        if len(self.pinned) == self.num_slots and name not in self.pinned:
            with pytest.raises(AdapterCapacityError):
                self.registry.check_can_run(entry)
            return
        self.registry.check_can_run(entry)
        self.registry.hold(entry)
        self.holders.append(entry)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        """A sequence that waits is to run."""
        waiting = list((Counter(self.holders) - Counter(self.uses)).elements())
        if not waiting:
            return
        entry = data.draw(st.sampled_from(waiting))
        was_there = entry in self.resident
        is_ready = was_there or entry in self.staged()
        has_slot = was_there or self.can_enter(entry)
        assert self.registry.is_ready(entry) is is_ready
        assert self.registry.has_slot_for(entry) is has_slot
        if not (is_ready and has_slot):
            return
        evictions = self.registry.slots.num_evictions
        slot, weights = self.registry.acquire(entry)
        assert 0 <= slot < self.num_slots
        assert (weights is None) is was_there
        if not was_there:
            assert weights.version == entry.version
            self.enter(entry, evictions)
        self.uses.append(entry)

    @precondition(lambda self: self.pinned)
    @rule()
    def place_pinned(self) -> None:
        waiting = [e for e in self.staged() if e.pinned]
        evictions = self.registry.slots.num_evictions
        placed = self.registry.place_pinned()
        for entry in waiting:
            if self.can_enter(entry):
                assert (entry.slot, entry.version) in [(slot, w.version) for slot, w in placed]
                full = len(self.resident) == self.num_slots
                if full:
                    self.resident.remove(self.idle()[0])
                    evictions += 1
                self.resident.append(entry)
        assert len(placed) == len([e for e in waiting if e in self.resident])
        assert self.registry.slots.num_evictions == evictions

    @precondition(lambda self: self.uses)
    @rule(data=st.data(), preempted=st.booleans())
    def release(self, data: st.DataObject, preempted: bool) -> None:
        entry = self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1)))
        self.registry.release(entry)
        if entry not in self.uses:
            self.resident.remove(entry)
            self.resident.append(entry)
        if not preempted:
            self.holders.remove(entry)
            self.registry.let_go(entry)
            self.leave(entry)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A sequence that waits ends."""
        waiting = list((Counter(self.holders) - Counter(self.uses)).elements())
        if waiting:
            entry = data.draw(st.sampled_from(waiting))
            self.holders.remove(entry)
            self.registry.let_go(entry)
            self.leave(entry)

    @rule()
    def read(self) -> None:
        wanted = {*self.holders, *(self.known[name] for name in self.pinned)}
        missing = {e for e in wanted if e.slot is None and not self.registry.host.has(e)}
        # A read that has begun goes on when nobody waits for it any more.
        missing.update(self.registry.prefetch._reads.values())
        failed = failures(self.registry)
        for entry, error in failed:
            assert entry in missing
            assert "has changed" in str(error)
            assert make_adapter(self.folders[entry.name]).version != entry.version
            # Who waited for it ends; then there is always a way on for the others.
            if self.is_current(entry):
                self.pinned.discard(entry.name)
            for _ in range(self.holders.count(entry)):
                self.holders.remove(entry)
                self.registry.let_go(entry)
            self.leave(entry)
        waits = [e for e in self.holders if e.slot is None]
        if waits and not self.uses and not failed:
            self.registry.start_prefetch()
            ready = [e for e in self.holders if self.registry.is_ready(e)]
            assert any(self.registry.has_slot_for(e) for e in ready) or self.pinned

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        entry = self.known.pop(name)
        assert self.registry.remove(entry.lora_int_id)
        self.pinned.discard(name)
        self.leave(entry)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        entry = self.known[name]
        others = [e for e in self.holders if e is not entry and not self.is_pinned(e)]
        free = self.num_slots - len(self.pinned)
        has_slot = name in self.pinned or free > 1 or (free == 1 and not others)
        try:
            assert self.registry.pin(entry.lora_int_id)
        except AdapterCapacityError:
            assert not entry.pinned
            assert self.room is not None or not has_slot
        else:
            assert has_slot
            self.pinned.add(name)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        registry = self.registry
        assert registry.names.ids() == {entry.lora_int_id for entry in self.known.values()}
        slots = [entry.slot for entry in self.resident]
        assert None not in slots
        assert len(set(slots)) == len(slots) <= self.num_slots
        assert len(slots) + registry.slots.num_free == self.num_slots
        expected = {e.slot: e.name for e in self.resident if self.is_current(e)}
        assert registry.residents() == expected
        assert set(registry._held) == set(self.holders)
        for entry in {*self.known.values(), *self.holders}:
            assert entry.in_use == self.uses.count(entry)
            assert entry.num_holders == self.holders.count(entry)
            assert (entry.slot is not None) == (entry in self.resident)
            assert entry.retired is not self.is_current(entry)
            assert entry.pinned == self.is_pinned(entry)
            if entry in self.in_memory:
                kept = self.is_current(entry) or entry.slot is None
                assert registry.host.has(entry) or not kept or not entry.in_memory
        on_host = set(registry.host._rooms)
        assert on_host <= {*self.known.values(), *self.holders}
        assert registry.host.num_bytes == sum(e.num_bytes for e in on_host)
        assert self.room is None or len(on_host) <= self.room


RegistryMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
test_any_sequence_of_operations = RegistryMachine.TestCase


def test_a_pinned_adapter_counts_after_a_new_version_was_refused() -> None:
    registry, _ = make_registry(max_adapters=3)
    held = [registry.get(LoRARequest(name)) for name in ("a", "b", "c")]
    assert registry.pin(1)
    for entry in held:
        registry.hold(entry)
    with pytest.raises(AdapterCapacityError, match="no room in host memory for adapter 'a'"):
        registry.add(of("a", "new", load_inplace=True))
    for entry in held:
        registry.let_go(entry)
    assert registry.add(of("x", "x"))
    with pytest.raises(AdapterCapacityError, match="3 adapters of 12 bytes are pinned or in mem"):
        registry.add(of("y", "y"))


def test_who_is_one_of_many_costs_no_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, _ = make_registry(num_slots=4, max_adapters=20)
    for i in range(100):
        registry.add(LoRARequest(str(i), i + 1))
    monkeypatch.setattr(registry.names, "entries", None)
    assert registry.add(of("in memory", "x"))
    assert registry.pin(3)
    assert registry.remove(7)
