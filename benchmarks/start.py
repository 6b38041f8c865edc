"""What a start takes: with nothing kept from an earlier one, and with what that one has kept.

Each start is a process of its own, as a user's is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.engines import dummy_engine

_MARK = "start: "


def start(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A cold start and two after it for each of ``--slots``, with room for ``--max-batch`` rows:
    seconds of each phase and of the process, and what became of the programs."""
    rows = []
    for slots in args.slots:
        with tempfile.TemporaryDirectory() as cache:
            for which in ("cold", "second", "third"):
                command = [sys.executable, "-m", "benchmarks.start", args.shape]
                command += [str(slots), str(args.max_batch), cache]
                began = time.perf_counter()
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                (line,) = (li for li in run.stdout.splitlines() if li.startswith(_MARK))
                row = {"slots": slots, "start": which, **json.loads(line.removeprefix(_MARK))}
                rows.append(row | {"process, s": time.perf_counter() - began})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Starts one engine and prints what it took."""
    shape, slots, max_num_seqs, cache = sys.argv[1:]
    with dummy_engine(
        shape,
        slots=int(slots),
        rank=16,
        max_num_seqs=int(max_num_seqs),
        compilation_cache_dir=cache,
    ) as (llm, _):
        report = llm.llm_engine.start_report
        assert report is not None
        programs = report.programs
        processor = time.process_time()
        began = time.perf_counter()
        llm.generate([[1, 2, 3]], use_tqdm=False)
        row = {
            "total, s": report.total,
            **{f"{phase}, s": seconds for phase, seconds in report.seconds.items()},
            "weights meanwhile, s": report.weight_seconds,
            "loaded": programs.loaded,
            "lowered and loaded": programs.recognized,
            "compiled": programs.compiled,
            "loading, thread s": programs.load_seconds,
            "lowering, processor s": programs.lower_seconds,
            "lowering elsewhere, processor s": programs.worker_seconds,
            "kernels": programs.kernels,
            "kernels, thread s": programs.kernel_seconds,
            "XLA, thread s": programs.compile_seconds,
            "writing, thread s": programs.keep_seconds,
            "all threads, processor s": processor,
            "first answer, s": time.perf_counter() - began,
            "KV pages": llm.llm_engine.scheduler.pool.num_pages,
            "compilations": llm.get_metrics()["jaxlora:compilations_total"],
        }
    print(_MARK + json.dumps(row))


if __name__ == "__main__":
    main()
