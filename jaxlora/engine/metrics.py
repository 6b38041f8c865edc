"""What the engine counts and times, and its parts as counters and gauges, by Prometheus name."""

from __future__ import annotations

from collections import Counter

from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.histogram import Histogram
from jaxlora.engine.scheduler import Scheduler
from jaxlora.engine.sequence import Sequence

INTER_TOKEN = "vllm:inter_token_latency_seconds"
PER_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Bounds of vLLM's histograms of times that a token takes."""


class TokenMetrics:
    """Counts tokens, and times those of each completion from one to the next."""

    def __init__(self) -> None:
        self._num_prompt = 0
        self._num_sampled = 0
        self._inter_token = Histogram(PER_TOKEN_SECONDS)

    def received(self, num_tokens: int) -> None:
        """A prompt came in."""
        self._num_prompt += num_tokens

    def sampled(self, sequences: list[Sequence], now: float) -> None:
        """Each has one more token, which was read ``now``."""
        self._num_sampled += len(sequences)
        # Few distinct times: those who had a token in the same step before had it at once.
        before = Counter(sequence.last_token_time for sequence in sequences)
        for then, times in before.items():
            if then is not None:
                self._inter_token.observe(now - then, times)
        for sequence in sequences:
            sequence.last_token_time = now
            if sequence.metrics.first_token_time is None:
                sequence.metrics.first_token_time = now

    def numbers(self) -> dict[str, float]:
        """Counters."""
        return {
            "vllm:prompt_tokens": self._num_prompt,
            "vllm:generation_tokens": self._num_sampled,
            f"{INTER_TOKEN}_sum": self._inter_token.sum,
            f"{INTER_TOKEN}_count": self._inter_token.count,
        }

    def histograms(self) -> dict[str, Histogram]:
        """Copies."""
        return {INTER_TOKEN: self._inter_token.copy()}


def scheduler_metrics(scheduler: Scheduler) -> dict[str, float]:
    """Who runs and waits, and what of the pages is in use and found again."""
    pool, prefix_cache = scheduler.pool, scheduler.prefix_cache
    return {
        "vllm:num_requests_running": len(scheduler.running),
        "vllm:num_requests_waiting": len(scheduler.waiting),
        "vllm:kv_cache_usage_perc": 1 - pool.num_free / pool.num_pages,
        "vllm:prefix_cache_queries": prefix_cache.num_queried_tokens,
        "vllm:prefix_cache_hits": prefix_cache.num_hit_tokens,
        "vllm:num_preemptions": scheduler.num_preemptions,
    }


def adapter_metrics(registry: AdapterRegistry) -> dict[str, float]:
    """Which adapters there are, in which tier, and how they come and go."""
    return {
        "jaxlora:adapters_registered": len(registry.names),
        "jaxlora:adapters_resident": len(registry.residents()),
        "jaxlora:adapter_evictions_total": registry.slots.num_evictions,
        "jaxlora:adapters_on_host": len(registry.host),
        "jaxlora:adapter_host_bytes": registry.host.num_bytes,
        "jaxlora:adapter_staged_bytes": registry.prefetch.staging.num_bytes,
        "jaxlora:adapter_writes_total": registry.slots.num_writes,
        "jaxlora:adapter_loads_total": registry.reader.num_loads,
        "jaxlora:adapter_load_seconds_total": registry.reader.load_seconds,
    }
