"""Adapters that change, fall out of memory and break beside live traffic, on the tiny engine."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxlora import LLM, AdapterError, AsyncLLM, LoRARequest, SamplingParams
from jaxlora.adapters import tensors as tensors_module
from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.loop import EngineLoop
from jaxlora.errors import AdapterCapacityError, AdapterRefusedError
from tests.jaxlora.lender import Lender
from tests.jaxlora.peft_models import Reference, prompts

Tensors = dict[str, np.ndarray]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
(PROMPT,) = prompts(1, seed=11)


def load(path: str) -> tuple[Tensors, dict[str, Any]]:
    folder = Path(path)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def save(path: Path, tensors: Tensors, config: dict[str, Any]) -> str:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return str(path)


def scaled(tensors: Tensors, factor: float) -> Tensors:
    return {key: array * np.float32(factor) for key, array in tensors.items()}


def ask(llm: LLM, request: LoRARequest | None, params: SamplingParams = GREEDY) -> list[int]:
    (output,) = llm.generate([PROMPT], params, lora_request=request, use_tqdm=False)
    assert output.error is None
    return output.outputs[0].token_ids


def registry_of(llm: LLM) -> AdapterRegistry:
    return llm.llm_engine.adapters


@pytest.fixture
def host(llm: LLM) -> Iterator[HostCache]:
    """The host tier; the limits a test sets end with it."""
    host = registry_of(llm).host
    limits = host.max_adapters, host.max_bytes
    yield host
    host.max_adapters, host.max_bytes = limits


def test_tensors_serve_as_their_folder_does(llm: LLM, reference: Reference) -> None:
    for name in ("r8-qv", "patterns", "r13-rslora"):
        tensors, config = load(reference.paths[name])
        folder = ask(llm, LoRARequest(name, None, reference.paths[name]))
        reference.check_greedy(PROMPT, folder, name)
        made = LoRARequest.from_tensors(f"{name}-made", tensors, config)
        assert ask(llm, made) == folder
        on_device = {key: jnp.asarray(array) for key, array in tensors.items()}
        assert not llm.update_lora(f"{name}-made", on_device)
        assert not llm.update_lora(name, tensors)
        assert ask(llm, made) == folder


def test_weights_that_are_given_again_serve_as_they_did(llm: LLM, reference: Reference) -> None:
    tensors, config = load(reference.paths["r8-qv"])

    def given() -> LoRARequest:
        return LoRARequest.from_tensors("a", tensors, config, load_inplace=True)

    first = given()
    expected = ask(llm, first)
    assert ask(llm, given()) == expected
    assert ask(llm, LoRARequest("a", None, reference.paths["r8-qv"], load_inplace=True)) == expected
    assert ask(llm, given()) == expected
    served = AsyncLLM(llm.llm_engine)

    async def online() -> list[int]:
        stream = served.generate(PROMPT, GREEDY, "x", lora_request=given())
        return [output async for output in stream][-1].outputs[0].token_ids

    assert asyncio.run(online()) == expected
    served.shutdown()
    # Who has the first ones asks for what is there still.
    assert ask(llm, dataclasses.replace(first, load_inplace=False)) == expected
    assert llm.update_lora("a", scaled(tensors, 2))
    with pytest.raises(ValueError, match="'a' was not made of these tensors"):
        ask(llm, dataclasses.replace(first, load_inplace=False))


def test_equal_weights_bring_their_configuration(llm: LLM, reference: Reference) -> None:
    tensors, config = load(reference.paths["r8-qv"])
    some = {key: array for key, array in tensors.items() if "q_proj" in key}
    scaled_v = config | {"alpha_pattern": {"v_proj": 80}}
    expected = ask(llm, LoRARequest.from_tensors("expected", tensors, scaled_v))
    assert llm.add_lora(LoRARequest.from_tensors("grows", some, config))
    again = LoRARequest.from_tensors("grows", some, scaled_v, load_inplace=True)
    assert not llm.add_lora(again)
    assert llm.update_lora("grows", tensors)
    assert ask(llm, LoRARequest("grows")) == expected
    assert ask(llm, LoRARequest.from_tensors("else", tensors, config)) != expected


def test_what_is_no_adapter_is_refused(llm: LLM, reference: Reference) -> None:
    tensors, config = load(reference.paths["r8-qv"])
    key = sorted(tensors)[0]
    masked: Any = np.ma.masked_array(tensors[key], tensors[key] > 0)
    with pytest.raises(AdapterRefusedError, match=r"q_proj\.lora_A\.weight is a .*MaskedArray"):
        llm.add_lora(LoRARequest.from_tensors("masked", tensors | {key: masked}, config))
    donated = jnp.asarray(tensors[key])
    donated.delete()
    with pytest.raises(AdapterRefusedError, match=r"q_proj\.lora_A\.weight was deleted"):
        llm.add_lora(LoRARequest.from_tensors("donated", tensors | {key: donated}, config))
    random: Any = jax.random.split(jax.random.key(0), tensors[key].shape)
    with pytest.raises(AdapterRefusedError, match=r"q_proj\.lora_A\.weight is key<fry>"):
        llm.add_lora(LoRARequest.from_tensors("random", tensors | {key: random}, config))
    for option in ("bias", "trainable_token_indices", "some_config"):
        odd = config | {option: np.array([1, 2])}
        with pytest.raises(AdapterRefusedError, match=rf"{option}=array\(\[1, 2\]\)"):
            llm.add_lora(LoRARequest.from_tensors("odd", tensors, odd))
    assert not llm.list_loras()


@pytest.mark.usefixtures("without_types")
def test_what_is_no_request_is_refused_by_name(llm: LLM, reference: Reference) -> None:
    name: Any = "r8-qv"
    for wrong in (name, {"lora_name": name}, [name]):
        with pytest.raises(ValueError, match=r"lora_request=.*r8-qv.* must be a LoRARequest"):
            llm.generate([PROMPT], GREEDY, lora_request=wrong, use_tqdm=False)
    with pytest.raises(ValueError, match="lora_request='r8-qv' must be a LoRARequest"):
        llm.add_lora(name)
    assert llm.add_lora(LoRARequest(name, None, reference.paths[name]))
    for call in (llm.remove_lora, llm.pin_lora):
        with pytest.raises(ValueError, match="lora_int_id='r8-qv' must be an integer"):
            call(name)
    assert len(llm.list_loras()) == 1


def test_of_many_in_place_under_one_name_the_last_stays(llm: LLM, reference: Reference) -> None:
    paths = [reference.paths[name] for name in ("r8-qv", "r1-all", "r4-kou", "r16-all")]
    many = [LoRARequest("a", None, path, load_inplace=True) for path in paths]
    with pytest.raises(ValueError, match=rf"'a' was loaded from '{paths[-1]}'.* '{paths[0]}'"):
        llm.generate([PROMPT] * 4, GREEDY, lora_request=many, use_tqdm=False)
    reference.check_greedy(PROMPT, ask(llm, LoRARequest("a")), "r16-all")


def test_replacing_beside_a_stream_changes_none_of_its_tokens(
    llm: LLM, reference: Reference
) -> None:
    tensors, config = load(reference.paths["r16-all"])
    versions = [scaled(tensors, 1 + step / 4) for step in range(12)]
    alone = [ask(llm, LoRARequest.from_tensors(f"v{i}", v, config)) for i, v in enumerate(versions)]
    assert len(set(map(tuple, alone))) > 6
    compilations = llm.get_metrics()["jaxlora:compilations_total"]

    engine = llm.llm_engine
    engine.add_lora(LoRARequest("live", None, reference.paths["r16-all"]))
    got: dict[str, list[int]] = {}
    for i, version in enumerate(versions):
        assert engine.update_lora("live", version) is (i > 0)
        engine.add_request(str(i), PROMPT, GREEDY, LoRARequest("live"))
        for _ in range(5):
            got |= {o.request_id: o.outputs[0].token_ids for o in engine.step()}
    while engine.has_unfinished_requests():
        got |= {o.request_id: o.outputs[0].token_ids for o in engine.step()}
    assert [got[str(i)] for i in range(12)] == alone
    assert llm.get_metrics()["jaxlora:compilations_total"] == compilations


def test_waiting_for_a_pin_and_for_a_removal(llm: LLM, reference: Reference) -> None:
    request = LoRARequest("held", None, reference.paths["r8-qv"])
    slots = registry_of(llm).slots
    assert llm.add_lora(request)
    (lora_int_id,) = llm.list_loras()
    free = slots.num_free
    assert llm.pin_lora(lora_int_id, wait=True)
    assert slots.num_free == free - 1
    llm.llm_engine.add_request("running", PROMPT, GREEDY, request)
    assert llm.remove_lora(lora_int_id, wait=True)
    assert slots.num_free == free
    assert not llm.remove_lora(lora_int_id, wait=True)


def test_ten_adapters_with_room_for_two(
    llm: LLM, host: HostCache, reference: Reference, tmp_path: Path
) -> None:
    tensors, config = load(reference.paths["r8-qv"])
    requests = [
        LoRARequest(f"ten-{i}", None, save(tmp_path / str(i), scaled(tensors, 1 + i / 3), config))
        for i in range(10)
    ]
    alone = [ask(llm, request) for request in requests]
    for lora_int_id in llm.list_loras():
        llm.remove_lora(lora_int_id)
    host.max_adapters = 2
    for request in requests:
        llm.add_lora(request)
    assert len(llm.list_loras()) == 10
    before = llm.get_metrics()
    for _ in range(2):
        outputs = llm.generate([PROMPT] * 10, GREEDY, lora_request=requests, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == alone
        assert len(host) <= 2
    after = llm.get_metrics()
    assert after["jaxlora:adapter_loads_total"] > before["jaxlora:adapter_loads_total"]
    assert after["jaxlora:adapter_host_bytes"] == host.num_bytes > 0
    assert after["jaxlora:compilations_total"] == before["jaxlora:compilations_total"]


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lie(folder: Path) -> None:
    """The header promises more than there is."""
    file = folder / "adapter_model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])


def change(alter: Callable[[Tensors, str], None]) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        tensors, config = load(str(folder))
        alter(tensors, sorted(tensors)[0])
        save(folder, tensors, config)

    return fault


def poison(tensors: Tensors, key: str) -> None:
    tensors[key] = np.full_like(tensors[key], np.nan)


def shorten(tensors: Tensors, key: str) -> None:
    tensors[key] = tensors[key][:, :-1].copy()


def lose(tensors: Tensors, key: str) -> None:
    del tensors[key]


FAULTS: tuple[Callable[[Path], None], ...] = (
    truncate,
    lie,
    change(poison),
    change(shorten),
    change(lose),
    shutil.rmtree,
)
"""Ways for a folder to be broken when it is read."""


class BrokenWhileRead:
    """Breaks a folder once this thread has read its weights' header: it is gone when they are read,
    or they shrink before that, or while they are read, or it gets another configuration. Others
    may read the folder at the same time, but two that broke it would break each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read, self._preadv = tensors_module._headers, os.preadv
        self._folders: dict[str, Path] = {}
        """By what happens to it."""
        self._thread = threading.get_ident()
        monkeypatch.setattr(tensors_module, "_headers", self._headers)
        monkeypatch.setattr(os, "preadv", self._read_piece)

    @property
    def faults(self) -> tuple[Callable[[Path], None], ...]:
        kinds = ("vanish", "shrink", "cut", "configure")
        return tuple(functools.partial(self._folders.__setitem__, kind) for kind in kinds)

    def stop(self) -> None:
        self._folders.clear()

    def _folder(self, kind: str) -> Path | None:
        return self._folders.get(kind) if threading.get_ident() == self._thread else None

    def _headers(self, text: Any) -> Any:
        headers, file = self._read(text), text.path
        if file.parent == self._folder("vanish"):
            shutil.rmtree(file.parent)
        if file.parent == self._folder("shrink"):
            os.truncate(file, file.stat().st_size // 2)
        if file.parent == self._folder("configure"):
            # That of the next version, which is being saved.
            config_file = file.parent / "adapter_config.json"
            config_file.write_text(json.dumps(load(str(file.parent))[1] | {"lora_alpha": 99}))
        return headers

    def _read_piece(self, number: int, buffers: Any, at: int) -> int:
        folder = self._folder("cut")
        file = folder and folder / "adapter_model.safetensors"
        if file and os.path.samestat(os.fstat(number), file.stat()):
            os.truncate(file, at + 10)
        return self._preadv(number, buffers, at)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("touch", ["link", "chmod"])
def test_who_touches_a_folder_while_it_is_read_changes_nothing(
    llm: LLM,
    lender: Lender,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    touch: str,
    file: str,
) -> None:
    """As a backup does that links to files, or who lets others read them; not without end."""
    path = Path(save(tmp_path / "a", *load(reference.paths["r8-qv"])))
    read, numbers, most = os.preadv, itertools.count(), 2

    def read_piece(descriptor: int, buffers: Any, at: int) -> int:
        number = next(numbers)
        if number < most:
            time.sleep(0.02)  # What the clock of files may stand still.
            if touch == "link":
                os.link(path / file, tmp_path / f"{number}")
            else:
                (path / file).chmod(0o600 + number % 2)
        return read(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", read_piece)
    request = LoRARequest("a", None, str(path))
    assert llm.add_lora(request)
    assert next(numbers) == 3
    reference.check_greedy(PROMPT, ask(llm, request), "r8-qv")
    # What is known as it is now is not read again.
    assert not llm.add_lora(request)
    assert next(numbers) == 4
    most = 1000
    llm.remove_lora(*llm.list_loras())
    lender.check_lent(0)
    with pytest.raises(AdapterRefusedError, match="was changed while it was read"):
        llm.add_lora(request)
    assert next(numbers) == 8
    lender.check_lent(0)


def test_who_replaces_a_folder_while_it_is_read_is_told_so(
    llm: LLM, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what of one version does not fit the other."""
    tensors, config = load(reference.paths["r8-qv"])
    path = Path(save(tmp_path / "a", tensors, config))
    weights_file = AdapterFolder.weights_file

    def replace_first(self: AdapterFolder, max_bytes: int | None = None) -> Path:
        save(path, {key: array for key, array in tensors.items() if "lora_A" in key}, config)
        return weights_file(self, max_bytes)

    monkeypatch.setattr(AdapterFolder, "weights_file", replace_first)
    with pytest.raises(AdapterRefusedError, match="was changed while it was read"):
        llm.add_lora(LoRARequest("a", None, str(path)))
    monkeypatch.undo()
    with pytest.raises(AdapterRefusedError, match="lora_A without lora_B"):
        llm.add_lora(LoRARequest("a", None, str(path)))


class Traffic:
    """Requests that begin again as soon as they end, each of them with the tokens it must have."""

    def __init__(self, llm: LLM, loras: list[LoRARequest | None]) -> None:
        self.engine, self.loras = llm.llm_engine, loras
        self.right = [ask(llm, lora) for lora in loras]
        self.num_done = self.num_errors = 0
        for at in range(len(loras)):
            self.start(at)

    def start(self, at: int) -> None:
        self.engine.add_request(f"{at}-{self.num_done}", PROMPT, GREEDY, self.loras[at])

    def step(self) -> None:
        for output in self.engine.step():
            at = output.request_id.rpartition("-")[0]
            if not output.finished:
                continue
            if not at.isdigit():
                self.num_errors += output.error is not None
                continue
            assert output.error is None
            assert output.outputs[0].token_ids == self.right[int(at)]
            self.num_done += 1
            self.start(int(at))

    def end(self) -> None:
        ids = [f"{at}-{i}" for at in range(len(self.loras)) for i in range(self.num_done + 1)]
        self.engine.abort_request(ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def version_of(llm: LLM, name: str) -> str | None:
    found = (e.version for e in registry_of(llm).names.entries() if e.name == name)
    return next(found, None)


def counts_of(llm: LLM) -> dict[str, float]:
    """What loads and faults must not change."""
    names = """jaxlora:compilations_total jaxlora:adapters_registered jaxlora:adapters_on_host
    jaxlora:adapter_host_bytes jaxlora:adapters_resident vllm:kv_cache_usage_perc""".split()
    metrics, registry = llm.get_metrics(), registry_of(llm)
    slots = {"free": registry.slots.num_free, "idle": registry.slots.num_idle}
    return {name: metrics[name] for name in names} | slots


def test_memory_is_used_again(
    llm: LLM, lender: Lender, host: HostCache, reference: Reference
) -> None:
    tensors, config = load(reference.paths["r16-all"])
    alone = ask(llm, LoRARequest.from_tensors("alone", tensors, config))
    llm.add_lora(LoRARequest("folder", None, reference.paths["r16-all"]))
    block = host.num_bytes // 2
    num_made = lender.num_made
    for step in range(2, 7):
        # New versions in the place of old ones.
        assert llm.update_lora("alone", scaled(tensors, step))
        assert ask(llm, LoRARequest("alone")) != alone
        lender.check_lent(2 * block)
    for lora_int_id in llm.list_loras():
        llm.remove_lora(lora_int_id)
    lender.check_lent(0)
    # And of adapters that make room for others.
    host.max_adapters = 1
    for number in range(12):
        request = LoRARequest(f"{number % 6}", None, reference.paths["r16-all"])
        assert ask(llm, request) == alone
        lender.check_lent(block)
    # One that is new is read before the one whose place it takes is gone, which a thread may still
    # hold.
    assert lender.num_made <= num_made + 2


def test_who_keeps_an_error_keeps_no_memory(
    llm: LLM,
    lender: Lender,
    host: HostCache,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, config = load(reference.paths["r4-kou"])
    reading = BrokenWhileRead(monkeypatch)
    refusals: list[BaseException | None] = []
    gc.disable()
    try:
        for number, fault in enumerate((*FAULTS, *reading.faults)):
            folder = tmp_path / str(number)
            path = save(folder, tensors, config)
            fault(folder)
            with pytest.raises(AdapterError) as refusal:
                llm.add_lora(LoRARequest(f"{number}", None, path))
            reading.stop()
            refusals.append(refusal.value)
            lender.check_lent(0)

        # Nor where a transfer fails when the weights have been brought.
        def full(*args: Any) -> jax.Array:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        request = LoRARequest("whole", None, save(tmp_path / "whole", tensors, config))
        llm.add_lora(request)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_put", full)
            (output,) = llm.generate([PROMPT], GREEDY, lora_request=request, use_tqdm=False)
        assert "RESOURCE_EXHAUSTED" in str(output.error)
        llm.remove_lora(*llm.list_loras())
        lender.check_lent(0)
        # Nor where it was read and there is no room for it.
        host.max_bytes = 1
        loop = EngineLoop(llm.llm_engine)
        reply = loop.add_lora(LoRARequest.from_tensors("large", tensors, config))
        refusals.append(reply.exception(60))
        loop.shutdown()
        assert isinstance(refusals[-1], AdapterCapacityError)
        lender.check_lent(0)
    finally:
        gc.enable()
    assert len(refusals) == 11


def test_faults_beside_live_traffic(
    llm: LLM,
    host: HostCache,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """500 loads, replacements and removals, half of them broken, while three requests run."""
    engine, registry = llm.llm_engine, registry_of(llm)
    paths = reference.paths
    loras = [LoRARequest(name, None, paths[name]) for name in ("r8-qv", "r16-all")]
    traffic = Traffic(llm, [*loras, None])
    before = counts_of(llm)
    tensors, config = load(paths["r4-kou"])
    few = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    host.max_adapters = 4
    random = np.random.default_rng(0)
    reading = BrokenWhileRead(monkeypatch)
    faults = (*FAULTS, *reading.faults)
    num_refused = 0
    for i in range(500):
        name = f"victim-{random.integers(4)}"
        path = save(tmp_path / name, scaled(tensors, 1 + i / 100), config)
        request, version = LoRARequest(name, None, path, load_inplace=True), version_of(llm, name)
        if random.random() < 0.5:
            faults[num_refused % len(faults)](tmp_path / name)
            with pytest.raises(AdapterError):
                engine.add_lora(request)
            reading.stop()
            assert version_of(llm, name) == version
            num_refused += 1
        else:
            assert engine.add_lora(request)
            assert version_of(llm, name) not in (None, version)
        if version_of(llm, name) is not None:
            engine.add_request(f"{name}-{i}", PROMPT[:4], few, LoRARequest(name))
            if random.random() < 0.2:
                engine.remove_lora(registry.names.find(name).lora_int_id)
        traffic.step()
    assert min(num_refused, traffic.num_done, traffic.num_errors) > 5
    traffic.end()
    for entry in registry.names.entries():
        if entry.name.startswith("victim"):
            engine.remove_lora(entry.lora_int_id)
    # What is in a slot need not be on the host as well: it may have made room.
    registry.slots.vacate_idle()
    assert [ask(llm, lora) for lora in traffic.loras] == traffic.right
    assert counts_of(llm) == before
    assert not registry._held
