"""What adapters cost while they come and go: others' latency, swaps, first tokens, new weights."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from benchmarks.engines import dummy_engine
from benchmarks.trace import traced
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.adapters.bank import AdapterBank
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.loop import EngineLoop
from jaxlora.engine.messages import Event
from jaxlora.outputs import RequestOutput

RUNNING, LOADS, SLOTS, RANK = 32, 64, 8, 16
BUSY_SLOTS = 4
"""Adapters of the running requests; the loads have the other slots."""
SECONDS = 600.0


def stall(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time between tokens of 32 running requests: undisturbed, while 64 adapters are loaded into
    slots, while 64 requests come for one resident adapter, and while each brings an adapter."""
    rows = []
    with dummy_engine(args.shape, slots=SLOTS, rank=RANK, max_num_seqs=2 * RUNNING) as (llm, path):
        # As the server does: a collection of all there is would hold up everyone for 0.2 s.
        gc.collect()
        gc.freeze()
        loop = EngineLoop(llm.llm_engine)
        try:
            load = _Loads(loop, path)
            phases: dict[str, Callable[[int], None] | None] = {
                "undisturbed": None,
                "64 loads": load.into_slot,
                "64 requests, adapter resident": load.request_resident,
                "64 requests, each a new adapter": load.request_new,
                "undisturbed, again": None,
            }
            load.request_resident(0)
            for name, work in phases.items():
                gaps, seconds = _gaps(loop, path, work)
                p50, p99 = map(float, np.percentile(gaps, [50, 99]))
                rows.append(
                    {
                        "phase": name,
                        "s": seconds,
                        "gaps": len(gaps),
                        "p50 ms": p50 * 1e3,
                        "p99 ms": p99 * 1e3,
                        "max ms": max(gaps) * 1e3,
                    }
                )
                print(rows[-1], flush=True)
        finally:
            loop.shutdown()
    return rows


class _Loads:
    """Loads of one folder under ever new names, its files dropped from the page cache before."""

    def __init__(self, loop: EngineLoop, path: Path) -> None:
        self._loop, self._path = loop, path
        self._numbers = itertools.count(1000)

    def into_slot(self, index: int) -> None:
        """Read, brought into a slot by a pin, and removed."""
        number = next(self._numbers)
        forget_files(self._path)
        request = LoRARequest(f"load-{number}", number, str(self._path))
        self._loop.add_lora(request).result(SECONDS)
        self._loop.ask(lambda engine: engine.pin_lora(number)).result(SECONDS)
        self._loop.until(lambda engine: engine.adapters.is_placed(number)).result(SECONDS)
        self._loop.ask(lambda engine: engine.remove_lora(number)).result(SECONDS)

    def request_resident(self, index: int) -> None:
        """A request of an adapter that has its slot."""
        self._request(1, LoRARequest("resident", 999, str(self._path)))

    def request_new(self, index: int) -> None:
        """A request that brings its adapter."""
        number = next(self._numbers)
        forget_files(self._path)
        self._request(number, LoRARequest(f"load-{number}", number, str(self._path)))
        self._loop.ask(lambda engine: engine.remove_lora(number)).result(SECONDS)

    def _request(self, number: int, lora: LoRARequest) -> None:
        done: Future[Event] = Future()

        def sink(event: Event) -> None:
            if isinstance(event, Exception):
                done.set_exception(event)
            elif event.finished:
                done.set_result(event)

        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        prompt = [1 + (number + i) % 500 for i in range(16)]
        self._loop.submit(f"{lora.lora_name}-{time.perf_counter()}", prompt, params, lora, sink)
        done.result(SECONDS)


def _gaps(
    loop: EngineLoop, path: Path, work: Callable[[int], None] | None
) -> tuple[list[float], float]:
    """Seconds between tokens of each running request while ``work(0..63)`` is done, four at a time;
    None is 400 tokens of nothing. And how long that took."""
    arrivals: list[list[float]] = [[] for _ in range(RUNNING)]
    errors: list[Exception] = []
    params = SamplingParams(temperature=0.0, max_tokens=1900, ignore_eos=True)
    random = np.random.default_rng(0)

    def sink_of(times: list[float]) -> Callable[[Event], None]:
        def sink(event: Event) -> None:
            times.append(time.perf_counter())
            if isinstance(event, Exception):
                errors.append(event)

        return sink

    ids = [f"running-{time.perf_counter()}-{i}" for i in range(RUNNING)]
    for i, request_id in enumerate(ids):
        number = 1 + i % BUSY_SLOTS
        lora = LoRARequest(f"running-{number}", number, str(path))
        prompt = random.integers(1, 500, 64).tolist()
        loop.submit(request_id, prompt, params, lora, sink_of(arrivals[i]))
    _wait(lambda: min(map(len, arrivals)) >= 16 or bool(errors))
    began = time.perf_counter()
    if work is None:
        aim = max(map(len, arrivals)) + 400
        _wait(lambda: max(map(len, arrivals)) >= aim or bool(errors), SECONDS / 10)
    else:
        with ThreadPoolExecutor(BUSY_SLOTS) as pool:
            list(pool.map(work, range(LOADS)))
    ended = time.perf_counter()
    loop.abort(ids)
    loop.ask(LLMEngine.list_loras).result(SECONDS)
    if errors:
        raise errors[0]
    inside = [[t for t in times if began <= t <= ended] for times in arrivals]
    gaps = [b - a for times in inside for a, b in itertools.pairwise(times)]
    return gaps, ended - began


def _wait(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    until = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < until:
        threading.Event().wait(0.01)


def forget_files(folder: Path) -> None:
    """Drops a folder's files from the page cache, where the file system lets go of them."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def swap(args: argparse.Namespace) -> list[dict[str, Any]]:
    """An adapter's way from the disk into a slot, part by part; the first token of a request by
    where its adapter is; and new weights from memory."""
    with dummy_engine(args.shape, slots=2, rank=RANK, max_num_seqs=4) as (llm, path):
        return [*_parts(llm, path), *_first_tokens(llm, path), *_updates(llm, path)]


def _row(what: str, seconds: list[float], note: str = "") -> dict[str, Any]:
    row = {
        "what": what,
        "median ms": statistics.median(seconds) * 1e3,
        "worst ms": max(seconds) * 1e3,
        "note": note,
    }
    print(row, flush=True)
    return row


def _timed(function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> list[float]:
    """Seconds of each of seven calls."""
    seconds = []
    for _ in range(7):
        before()
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds


def _parts(llm: LLM, path: Path) -> list[dict[str, Any]]:
    engine: Any = llm.llm_engine
    bank: AdapterBank = engine._runner.bank
    request = LoRARequest("part", None, str(path))

    def read() -> Any:
        return engine.adapters.read(request)

    adapter = read()
    packed = bank.pack(adapter)[1].buffer
    size = f"{packed.nbytes / 1e6:.1f} MB"
    with traced() as trace:
        staged = bank.stage(adapter)
        bank.load(0, staged)
        jax.block_until_ready(bank.arrays)

    def transfer() -> None:
        jax.device_put(packed).block_until_ready()

    def write() -> None:
        bank.load(0, staged)
        jax.block_until_ready(bank.arrays)

    return [
        _row("read, check and hash, from disk", _timed(read, lambda: forget_files(path)), size),
        _row("read, check and hash, files cached", _timed(read)),
        _row("pack", _timed(lambda: bank.pack(adapter))),
        _row("pack and transfer", _timed(lambda: bank.stage(adapter)), str(trace)),
        _row("transfer of as many bytes", _timed(transfer)),
        _row("write to a slot: the step's thread", _timed(lambda: bank.load(0, staged), write)),
        _row("write to a slot, to its end", _timed(write)),
    ]


def _first_tokens(llm: LLM, path: Path) -> list[dict[str, Any]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    numbers = itertools.count()

    def ask(lora: LoRARequest | None) -> None:
        # Another prompt each time: the prefix cache is not what is measured.
        number = next(numbers)
        prompt = [1 + (7 * number + i) % 500 for i in range(16)]
        outputs: list[RequestOutput] = llm.generate(
            [prompt], params, lora_request=lora, use_tqdm=False
        )
        if outputs[0].error is not None:
            raise outputs[0].error

    def new() -> LoRARequest:
        return LoRARequest(f"new-{next(numbers)}", None, str(path))

    known = [LoRARequest(f"known-{i}", None, str(path)) for i in range(4)]
    for request in known:
        ask(request)
    turn = itertools.cycle(known)
    return [
        _row("first token, base model", _timed(lambda: ask(None))),
        _row("first token, adapter in a slot", _timed(lambda: ask(known[-1]))),
        _row("first token, adapter on the host", _timed(lambda: ask(next(turn)))),
        _row("first token, new adapter, files cached", _timed(lambda: ask(new()))),
        _row(
            "first token, new adapter on disk",
            _timed(lambda: ask(new()), lambda: forget_files(path)),
        ),
    ]


def _updates(llm: LLM, path: Path) -> list[dict[str, Any]]:
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    llm.add_lora(LoRARequest.from_tensors("policy", tensors, config))
    first = sorted(tensors)[0]
    steps = itertools.count(1)
    device = {name: jax.device_put(array) for name, array in tensors.items()}

    def change() -> None:
        """As a step of training does."""
        step = next(steps)
        tensors[first] = tensors[first] * np.asarray(1 + step / 64, tensors[first].dtype)
        device[first] = jax.device_put(tensors[first])

    def ask() -> None:
        prompt = [1 + (11 * next(steps) + i) % 500 for i in range(16)]
        llm.generate([prompt], params, lora_request=LoRARequest("policy"), use_tqdm=False)

    def update(weights: dict[str, Any]) -> None:
        if not llm.update_lora("policy", weights):
            raise RuntimeError("the weights are those that were there")

    def flip() -> None:
        change()
        update(tensors)

    return [
        _row("update_lora, numpy", _timed(lambda: update(tensors), change)),
        _row("update_lora, arrays on the device", _timed(lambda: update(device), change)),
        _row("first token of a new version", _timed(ask, flip)),
    ]
