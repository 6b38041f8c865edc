"""Over HTTP: the same requests as streams from `jaxlora serve` and as one offline call.

The offline engine and the server run one after the other, each in a process of its own, with the
same options. The load generator is this process: plain sockets, so that it costs little.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.engines import random_adapter, random_tokenizer
from benchmarks.workloads import SHAPES, Decode
from examples.demo_model import ADAPTERS, model_path

START_SECONDS = 1200
_WARM_UP = [1]
"""Tokens that each request asks for before anything is timed: adapters are in, prompts cached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that are sent all at once, greedy."""

    model: str
    options: dict[str, Any]
    """The engine's, as LLM takes them and, as flags, the server."""
    adapters: dict[str, str]
    """Name -> path."""
    names: Sequence[str | None]
    """The adapter of each request."""
    prompts: list[list[int]]
    lengths: Sequence[Sequence[int]]
    """How many tokens each request asks for; all are timed with each of these."""
    repeats: int = 1
    """How often each is timed."""


def serving(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Workload W: time per output token of a batch, as `decode` takes it."""
    slots = args.slots[0]
    workload = Decode(slots=slots, adapters=slots, batch=args.streams)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        random_tokenizer(Path(folder), SHAPES[args.shape]["vocab_size"])
        path = random_adapter(Path(folder), SHAPES[args.shape], workload.rank)
        names = [f"adapter-{i % workload.adapters}" for i in range(workload.batch)]
        random = np.random.default_rng(0)
        load = Load(
            model=folder,
            options={
                "load_format": "dummy",
                "enable_lora": True,
                "max_loras": slots,
                "max_lora_rank": workload.rank,
                "max_model_len": 2048,
                "max_num_seqs": max(workload.batch, 8),
            },
            adapters={name: str(path) for name in sorted(set(names))},
            names=names,
            prompts=random.integers(1, 500, (workload.batch, workload.prompt_len)).tolist(),
            lengths=[[new] * workload.batch for new in (workload.short, workload.long)],
            repeats=7,
        )
        rows = []
        for name, times, cpu in _both(load):
            short, long = np.median(times, axis=1)
            row = {
                "path": name,
                "workload": workload.name,
                "TPOT ms": 1e3 * float(long - short) / (workload.long - workload.short),
                # How far the runs of each length are apart says how much that means.
                "spread s": [round(float(np.ptp(each)), 3) for each in times],
            }
            rows.append(row | cpu)
        return rows


def streams(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Many streams at once from the demo's model and adapters: output tokens a second.

    They are of various lengths, so that requests come and go in both engines alike; of one length,
    those that are queued at once would also go on in step.
    """
    adapters = {path.name: str(path) for path in sorted(ADAPTERS.iterdir()) if path.is_dir()}
    names = [None, *adapters]
    random = np.random.default_rng(0)
    new = random.integers(1, 2 * args.new_tokens, args.streams).tolist()
    load = Load(
        model=model_path(),
        options={"enable_lora": True, "max_loras": len(adapters), "max_model_len": 1024},
        adapters=adapters,
        names=[names[i % len(names)] for i in range(args.streams)],
        prompts=random.integers(100, 40000, (args.streams, 16)).tolist(),
        lengths=[new],
    )
    return [
        {
            "path": name,
            "streams": args.streams,
            "output tok/s": sum(new) / times[0][0],
            **cpu,
        }
        for name, times, cpu in _both(load)
    ]


Times = list[list[float]]
"""Seconds for each of a load's lengths, of each repeat."""


def _both(load: Load) -> Iterator[tuple[str, Times, dict[str, float | None]]]:
    """Path, seconds, and the CPU time of a token, of all processes and of the server's event
    loop."""
    context = multiprocessing.get_context("spawn")
    num_tokens = load.repeats * sum(map(sum, load.lengths))
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        offline, process = pool.submit(_offline, load).result()
    print(f"offline: {offline}", flush=True)
    yield "offline", offline, _per_token(num_tokens, process, None)
    with _server(load) as (port, server):

        def send(new: Sequence[int]) -> float:
            return asyncio.run(_send_all(load, port, new))

        send(_WARM_UP * len(load.prompts))
        # The engine has a process of its own.
        family = [server.pid, *(each.pid for each in psutil.Process(server.pid).children())]
        began = sum(map(_cpu_seconds, family)), _main_thread_seconds(server.pid)
        http = _timed(load, send)
        process = sum(map(_cpu_seconds, family)) - began[0]
        loop = _main_thread_seconds(server.pid) - began[1]
    print(f"http: {http}", flush=True)
    yield "http", http, _per_token(num_tokens, process, loop)


def _per_token(num_tokens: int, process: float, loop: float | None) -> dict[str, float | None]:
    return {
        "CPU us/token": 1e6 * process / num_tokens,
        "event loop us/token": None if loop is None else 1e6 * loop / num_tokens,
        # Well above the number of cores, the machine had other work and times mean little.
        "load average": os.getloadavg()[0],
    }


def _timed(load: Load, seconds: Callable[[Sequence[int]], float]) -> Times:
    times: Times = [[] for _ in load.lengths]
    for _ in range(load.repeats):
        for each, new in zip(times, load.lengths, strict=True):
            each.append(seconds(new))
    return times


def _offline(load: Load) -> tuple[Times, float]:
    """In a process of its own: seconds, and its CPU time."""
    from jaxlora import LLM, LoRARequest, SamplingParams

    llm = LLM(load.model, **load.options)

    loras = [LoRARequest(name, None, load.adapters[name]) if name else None for name in load.names]

    def generate(new: Sequence[int]) -> float:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in new]
        began = time.perf_counter()
        llm.generate(load.prompts, params, lora_request=loras, use_tqdm=False)
        return time.perf_counter() - began

    generate(_WARM_UP * len(load.prompts))
    began = _cpu_seconds(os.getpid())
    times = _timed(load, generate)
    return times, _cpu_seconds(os.getpid()) - began


@contextlib.contextmanager
def _server(load: Load) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server that is ready: its port and its process."""
    command = [sys.executable, "-m", "jaxlora", "serve", load.model, "--port", "0"]
    command += ["--host", "127.0.0.1", "--served-model-name", "base"]
    for name, value in load.options.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in load.adapters.items())]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stderr=file, text=True, env=os.environ | {"PYTHONPATH": path}
            )
        try:
            end = time.monotonic() + START_SECONDS
            while " ready: " not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.2)
            found = re.search(r"listening on \S+:(\d+)", log.read_text())
            assert found is not None
            yield int(found[1]), process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def _send_all(load: Load, port: int, new: Sequence[int]) -> float:
    """Seconds from the first request to the last token of all."""
    bodies = [
        json.dumps(
            {
                "model": name or "base",
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for name, prompt, num_tokens in zip(load.names, load.prompts, new, strict=True)
    ]
    began = time.perf_counter()
    counts = await asyncio.gather(*(_send(port, body) for body in bodies))
    seconds = time.perf_counter() - began
    if counts != list(new):
        raise RuntimeError(f"streams of {new} tokens had {counts}")
    return seconds


async def _send(port: int, body: bytes) -> int:
    """Reads one stream to its end; the number of its tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n")
    writer.write(body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode())
    tail = b""
    while piece := await reader.read(1 << 16):
        tail = (tail + piece)[-1024:]
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', tail)
    if found is None or b"data: [DONE]" not in tail:
        raise RuntimeError(f"a stream ended with {tail.decode()}")
    return int(found[1])


def _main_thread_seconds(pid: int) -> float:
    """CPU time of a process's main thread, which runs the server's event loop."""
    return _cpu_seconds(pid, f"task/{pid}/")


def _cpu_seconds(pid: int, part: str = "") -> float:
    fields = Path(f"/proc/{pid}/{part}stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
