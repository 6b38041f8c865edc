"""One start and one workload, in a process of its own, as a user's next start is.

    python -m tests.jaxlora.start_run \\
        '{"base": "", "adapter": "", "cache": "", "dtype": "float32", "sizes": [1], "workers": 0}'

prints what became of the programs on each number of devices, which functions were traced, and what
was generated, as JSON. With workers these processes lower, as they do where there are kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import jax

from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.engine import lowering_workers, program_pipeline

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True, logprobs=2)


def run(base: str, adapter: str, cache: str, dtype: str, size: int) -> dict[str, Any]:
    """Starts on ``size`` devices and generates for the base and for the adapter."""
    traced: set[str] = set()

    def hear(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            traced.add(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(hear)
    llm = LLM(
        base,
        dtype=dtype,
        tensor_parallel_size=size,
        enable_lora=True,
        max_loras=2,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=16,
        compilation_cache_dir=cache,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    loras = [None, LoRARequest("a", None, adapter)]
    outputs = [
        output
        for params in (GREEDY, SAMPLED)
        for output in llm.generate(PROMPTS, params, lora_request=loras, use_tqdm=False)
    ]
    report = llm.llm_engine.start_report
    assert report is not None
    return {
        "loaded": report.programs.loaded,
        "recognized": report.programs.recognized,
        "compiled": report.programs.compiled,
        "worker_seconds": report.programs.worker_seconds,
        "kernels": report.programs.kernels,
        "traced": sorted(traced),
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "logprobs": [output.outputs[0].cumulative_logprob for output in outputs],
        "compilations": compiled,
        "late": llm.get_metrics()["jaxlora:compilations_total"] - compiled,
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if workers := asked.pop("workers"):
        # Waited for, because there is little to lower.
        mock.patch.object(program_pipeline, "num_workers", return_value=workers).start()
        lowering_workers._MEANWHILE = 0
    results = {}
    for devices in asked.pop("sizes"):
        results[str(devices)] = run(**asked, size=devices)
    sys.stdout.write(json.dumps(results))
