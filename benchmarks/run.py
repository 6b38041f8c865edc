"""The benchmark harness: our engine through its public API, on any device.

    python -m benchmarks.run demo                      the demo's model and adapters
    python -m benchmarks.run decode --shape llama-3.1-8b --slots 8
    python -m benchmarks.run offline --slots 8 64      throughput of each adapter mix
    python -m benchmarks.run offline --slots 16 --adapters 200        more than there are slots
    python -m benchmarks.run peft                      against PEFT's mixed-adapter generate
    python -m benchmarks.run prompts --slots 8         64 prompts of 512 tokens, with and without
    python -m benchmarks.run targets --slots 64        decode and offline, from one engine
    python -m benchmarks.run start --slots 8           cold, and with what is kept
    python -m benchmarks.run sampling --shape tiny     greedy decoding, logprobs, penalties ...
    python -m benchmarks.run stall --shape tiny        latency of others while 64 adapters load
    python -m benchmarks.run swap --shape tiny         an adapter's way to a slot, part by part
    python -m benchmarks.run serving --slots 8         decode over HTTP, beside offline
    python -m benchmarks.run streams --streams 512     the demo's model over HTTP, beside offline

Each prints a table and, with ``--out``, writes JSON with hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse

from benchmarks import adapters, latency, serving, start, targets, throughput
from benchmarks.record import save, table
from benchmarks.workloads import SHAPES

BENCHMARKS = {
    "demo": throughput.demo,
    "decode": latency.decode,
    "offline": throughput.offline,
    "peft": throughput.peft,
    "prompts": throughput.prompts,
    "sampling": latency.sampling,
    "stall": adapters.stall,
    "start": start.start,
    "swap": adapters.swap,
    "serving": serving.serving,
    "streams": serving.streams,
    "targets": targets.targets,
}


def main() -> None:
    """Runs one benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", default="demo", choices=tuple(BENCHMARKS))
    parser.add_argument(
        "--shape",
        default="llama-3.1-8b",
        choices=SHAPES,
        help="the model's; not for demo, peft and streams",
    )
    parser.add_argument(
        "--slots",
        type=int,
        nargs="*",
        default=[8, 64],
        help="decode, offline, prompts, serving, start, targets: max_loras",
    )
    parser.add_argument(
        "--adapters", type=int, help="offline: how many are asked for, if not as many as slots"
    )
    parser.add_argument("--requests", type=int, default=512, help="offline, targets: how many")
    parser.add_argument(
        "--repeats", type=int, default=2, help="prompts, targets: how often each is measured"
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=128,
        help="decode, sampling: leave out larger ones; start: rows",
    )
    parser.add_argument(
        "--streams", type=int, default=128, help="serving, streams: requests at once"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="streams: tokens of each")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="peft: our rows in a step")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        nargs="+",
        default=[2048, 8192],
        help="prompts: most tokens in a step",
    )
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    rows = BENCHMARKS[args.benchmark](args)
    print(table(rows))
    save(args.out, args.benchmark, rows)


if __name__ == "__main__":
    main()
