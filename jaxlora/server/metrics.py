"""Prometheus metrics: vLLM's names, so that its dashboards and gateways work, and ours by adapter.

Counters and histograms of requests are kept here as they end; what concerns tokens and the present
is asked of the engine when the page is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxlora.engine.histogram import Histogram as EngineHistogram
from jaxlora.engine.metrics import INTER_TOKEN, PER_TOKEN_SECONDS
from jaxlora.outputs import FinishReason, LoRAStatus, RequestOutput
from jaxlora.types import LoRARequest

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
_BASE = ""
"""The adapter label of requests to the base model."""
_MOST_GONE = 1000
"""Adapters that are told of after they were unloaded: names may come and go for as long as a server
lives."""

_GAUGES = {
    "vllm:num_requests_running": "Sequences in the running batch.",
    "vllm:num_requests_waiting": "Sequences that wait to be run.",
    "vllm:kv_cache_usage_perc": "Share of the KV pages that is in use, 0 to 1.",
    "jaxlora:adapters_registered": "Adapters that requests may name.",
    "jaxlora:adapters_resident": "Adapters in a slot of the device.",
    "jaxlora:adapters_on_host": "Copies of adapters in host memory.",
    "jaxlora:adapter_host_bytes": "Bytes of those copies.",
    "jaxlora:adapter_staged_bytes": "Bytes of adapters on the device that wait for a slot.",
}
_HISTOGRAMS = {INTER_TOKEN: "From a token of a completion to the next."}
_COUNTERS = {
    "vllm:num_preemptions": "Sequences that gave their pages back to be computed again.",
    "vllm:prompt_tokens": "Prompt tokens received.",
    "vllm:generation_tokens": "Tokens sampled.",
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "jaxlora:adapter_evictions": "Adapters that lost their slot to another.",
    "jaxlora:adapter_writes": "Adapters written to a slot.",
    "jaxlora:compilations": "Programs compiled since start; constant once the server is ready.",
}


@dataclasses.dataclass(kw_only=True)
class Snapshot:
    """What the engine says of itself."""

    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    histograms: Mapping[str, EngineHistogram] = dataclasses.field(default_factory=dict)
    adapters: Sequence[LoRAStatus] = ()


class Metrics:
    """The metrics of one server."""

    def __init__(self, model_name: str, *, max_loras: int | None) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name, max_loras)
        self._registry.register(self._engine)
        self._model_name = model_name
        self._success = self._counter(
            "vllm:request_success", "Requests that ended, by reason.", "finished_reason"
        )
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time for each token after the first, by request.",
            PER_TOKEN_SECONDS,
        )
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", _REQUEST
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token.", _REQUEST
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _REQUEST
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds",
            "From the first step to the last token.",
            _REQUEST,
        )
        self._prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens, by request.", _TOKENS
        )
        self._generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Sampled tokens, by request.", _TOKENS
        )
        self._by_adapter_requests = self._counter(
            "jaxlora:requests", "Requests that ended, by adapter.", "adapter", "finished_reason"
        )
        self._by_adapter_prompt = self._counter(
            "jaxlora:prompt_tokens", "Prompt tokens of ended requests, by adapter.", "adapter"
        )
        self._by_adapter_generation = self._counter(
            "jaxlora:generation_tokens", "Sampled tokens of ended requests, by adapter.", "adapter"
        )
        self._by_adapter_ttft = Histogram(
            "jaxlora:time_to_first_token_seconds",
            "From arrival to the first token, by adapter.",
            ["model_name", "adapter"],
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self._loads = self._counter("jaxlora:adapter_loads", "Adapters read.", "adapter")
        self._load_seconds = self._histogram(
            "jaxlora:adapter_load_seconds", "To find, read and check an adapter.", _FIRST_TOKEN
        )
        self._gone: dict[str, None] = {}
        """Adapters that were unloaded, in that order."""

    def ended(self, lora_request: LoRARequest | None, reasons: Iterable[str]) -> None:
        """Notes why the completions of a request ended."""
        name = lora_request.lora_name if lora_request else _BASE
        for reason in reasons:
            self._success.labels(self._model_name, reason).inc()
            self._by_adapter_requests.labels(self._model_name, name, reason).inc()

    def finished(self, output: RequestOutput, num_tokens: int, reasons: Sequence[str]) -> None:
        """Notes a request that ended after ``num_tokens`` tokens over all its completions."""
        name = output.lora_request.lora_name if output.lora_request else _BASE
        times, num_prompt = output.metrics, len(output.prompt_token_ids)
        self.ended(output.lora_request, reasons)
        self._by_adapter_prompt.labels(self._model_name, name).inc(num_prompt)
        self._by_adapter_generation.labels(self._model_name, name).inc(num_tokens)
        self._prompt_tokens.observe(num_prompt)
        self._generation_tokens.observe(num_tokens)
        start, first, last = (
            times.first_scheduled_time,
            times.first_token_time,
            times.finished_time,
        )
        if start is None or first is None or last is None:
            return
        self._queue.observe(start - times.arrival_time)
        self._prefill.observe(first - start)
        self._decode.observe(last - first)
        self._inference.observe(last - start)
        self._e2e.observe(last - times.arrival_time)
        self._ttft.observe(first - times.arrival_time)
        self._by_adapter_ttft.labels(self._model_name, name).observe(first - times.arrival_time)
        # Completions of one prompt run side by side.
        num_later = num_tokens / max(len(reasons), 1) - 1
        if num_later > 0:
            self._tpot.observe((last - first) / num_later)

    def loaded(self, lora_name: str, seconds: float) -> None:
        """Notes that an adapter was loaded."""
        self._gone.pop(lora_name, None)
        self._loads.labels(self._model_name, lora_name).inc()
        self._load_seconds.observe(seconds)

    def unloaded(self, lora_name: str) -> None:
        """Notes that an adapter was unloaded. Of those that are gone longest, nothing is told any
        more."""
        self._gone[lora_name] = None
        if len(self._gone) <= _MOST_GONE:
            return
        name = next(iter(self._gone))
        del self._gone[name]
        for reason in get_args(FinishReason):
            self._by_adapter_requests.remove(self._model_name, name, reason)
        for metric in (
            self._by_adapter_prompt,
            self._by_adapter_generation,
            self._by_adapter_ttft,
            self._loads,
        ):
            metric.remove(self._model_name, name)

    def page(self, snapshot: Snapshot) -> bytes:
        """The metrics as Prometheus text: with thousands of adapters 0.1 s of work, so any thread
        may make it."""
        self._engine.snapshot = snapshot
        return generate_latest(self._registry)

    def set_cache(self, *, block_size: int, num_blocks: int) -> None:
        """What the KV cache turned out to be."""
        self._engine.cache = (block_size, num_blocks)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, what, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """The engine's own numbers, and which adapters are where."""

    def __init__(self, model_name: str, max_loras: int | None) -> None:
        self._model_name = model_name
        self._max_loras = max_loras
        self.snapshot = Snapshot()
        self.cache: tuple[int, int] | None = None

    def collect(self) -> Iterable[Metric]:
        snapshot = self.snapshot
        numbers = snapshot.numbers
        labels = [self._model_name]
        for name, what in _GAUGES.items():
            if name in numbers:
                gauge = GaugeMetricFamily(name, what, labels=["model_name"])
                gauge.add_metric(labels, numbers[name])
                yield gauge
        for name, what in _COUNTERS.items():
            value = numbers.get(name, numbers.get(f"{name}_total"))
            if value is not None:
                counter = CounterMetricFamily(name, what, labels=["model_name"])
                counter.add_metric(labels, value)
                yield counter
        for name, histogram in snapshot.histograms.items():
            counts = itertools.accumulate(histogram.counts)
            bounds = [*map(str, histogram.bounds[:-1]), "+Inf"]
            family = HistogramMetricFamily(name, _HISTOGRAMS[name], labels=["model_name"])
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), histogram.sum)
            yield family
        if self.cache is not None:
            block_size, num_blocks = self.cache
            cache = GaugeMetricFamily(
                "vllm:cache_config_info",
                "The KV cache.",
                labels=["block_size", "num_gpu_blocks"],
            )
            cache.add_metric([str(block_size), str(num_blocks)], 1.0)
            yield cache
        if self._max_loras is not None:
            yield from self._adapters(snapshot.adapters, self._max_loras)

    def _adapters(self, adapters: Sequence[LoRAStatus], max_loras: int) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are ready, and adapters that requests wait for; the value is a time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        ready = ",".join(a.lora_name for a in adapters if a.tier == "device")
        waiting = ",".join(a.lora_name for a in adapters if a.waiting)
        info.add_metric([str(max_loras), ready, waiting], time.time())
        yield info
        residency = GaugeMetricFamily(
            "jaxlora:adapter_residency",
            "1 for each adapter, where it is.",
            labels=["model_name", "adapter", "tier", "pinned", "rank"],
        )
        for each in adapters:
            pinned = "true" if each.pinned else "false"
            residency.add_metric(
                [self._model_name, each.lora_name, each.tier, pinned, str(each.rank)], 1.0
            )
        yield residency
