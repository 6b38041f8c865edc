"""The engine's parts as counters and gauges, by Prometheus name."""

from __future__ import annotations

from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.scheduler import Scheduler


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
        "jaxlora:adapters_registered": len(registry.names.ids()),
        "jaxlora:adapters_resident": len(registry.residents()),
        "jaxlora:adapter_evictions_total": registry.slots.num_evictions,
        "jaxlora:adapters_on_host": len(registry.host),
        "jaxlora:adapter_host_bytes": registry.host.num_bytes,
        "jaxlora:adapter_staged_bytes": registry.prefetch.staging.num_bytes,
        "jaxlora:adapter_writes_total": registry.slots.num_writes,
        "jaxlora:adapter_loads_total": registry.num_loads,
        "jaxlora:adapter_load_seconds_total": registry.load_seconds,
    }
