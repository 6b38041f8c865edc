"""``jaxlora bench``: how fast a model and its adapters are here, without a server."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.cli.arguments import UsageError, add_lora_modules, add_model
from jaxlora.cli.offline import adapters_by_name, start
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxlora.cli.arguments import Commands
    from jaxlora.engine.engine import LLMEngine

_PERCENTILES = (50, 90, 99)
_ABOUT = (
    "Prompts are random tokens and completions have exactly --output-len; with --lora-modules "
    "requests take the base and the adapters in turn. --load-format dummy needs no weights."
)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser("bench", help="measure throughput or latency")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    throughput = _kind(kinds, "throughput", "tokens a second of many requests at once", _throughput)
    throughput.add_argument("--num-prompts", type=int, default=100, help="requests (%(default)s)")
    latency = _kind(kinds, "latency", "seconds that a batch takes, and its tokens", _latency)
    latency.add_argument(
        "--batch-size", type=int, default=8, help="requests of a batch (%(default)s)"
    )
    latency.add_argument("--num-iters", type=int, default=10, help="batches (%(default)s)")
    latency.add_argument(
        "--num-iters-warmup", type=int, default=2, help="batches before those (%(default)s)"
    )


def _kind(
    kinds: Commands, name: str, about: str, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=about, description=f"Prints the {about}. {_ABOUT}")
    add_model(parser)
    add_lora_modules(parser)
    parser.add_argument(
        "--input-len", type=int, default=128, help="tokens of a prompt (%(default)s)"
    )
    parser.add_argument(
        "--output-len", type=int, default=128, help="tokens of a completion (%(default)s)"
    )
    parser.add_argument("--output-json", metavar="FILE", help="also write the numbers here")

    def report(args: argparse.Namespace) -> int:
        numbers = run(args)
        for key, value in numbers.items():
            print(f"{key:<24}{value:,.6g}")
        if args.output_json is not None:
            Path(args.output_json).write_text(json.dumps(numbers) + "\n")
        return 0

    parser.set_defaults(run=report)
    return parser


def _throughput(args: argparse.Namespace) -> dict[str, float]:
    """All requests are there from the start."""
    count = _at_least_one(args, "num_prompts")
    bench = _Bench(args)
    bench.run(1)  # Whatever happens once only.
    seconds = bench.run(count)[-1]
    num_input, num_output = count * args.input_len, count * args.output_len
    return {
        "seconds": seconds,
        "requests_per_s": count / seconds,
        "total_tokens_per_s": (num_input + num_output) / seconds,
        "output_tokens_per_s": num_output / seconds,
    }


def _latency(args: argparse.Namespace) -> dict[str, float]:
    """A batch begins when the one before it has ended; between tokens is between steps' tokens."""
    size, count = _at_least_one(args, "batch_size"), _at_least_one(args, "num_iters")
    bench = _Bench(args)
    for _ in range(args.num_iters_warmup):
        bench.run(size)
    whole, first, between = [], [], []
    for _ in range(count):
        times = bench.run(size)
        whole.append(times[-1])
        first.append(times[0])
        between += [later - earlier for earlier, later in itertools.pairwise(times)]
    numbers = {"batch_mean_s": statistics.mean(whole)}
    for name, values in (("batch", whole), ("first_token", first), ("inter_token", between)):
        numbers |= {f"{name}_p{p}_s": _percentile(values, p) for p in _PERCENTILES if values}
    return numbers


class _Bench:
    """An engine, and requests that are all alike."""

    def __init__(self, args: argparse.Namespace) -> None:
        for name in ("input_len", "output_len"):
            _at_least_one(args, name)
        needed = args.input_len + args.output_len
        if args.max_model_len is not None and args.max_model_len < needed:
            # Completions would be shorter than what is counted.
            raise UsageError(
                f"--max-model-len={args.max_model_len} must be at least --input-len plus "
                f"--output-len, {needed}"
            )
        adapters = adapters_by_name(args)
        args.max_model_len = args.max_model_len or needed
        self._engine: LLMEngine = start(args, adapters).engine
        self._random = random.Random(args.seed)
        self._input_len: int = args.input_len
        self._adapters: Sequence[LoRARequest | None] = (None, *adapters.values())
        self._params = SamplingParams(
            temperature=0,
            max_tokens=args.output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def run(self, count: int) -> list[float]:
        """Seconds from the start to each time at which tokens came, of so many requests."""
        engine = self._engine
        # Other tokens each time, so that no prompt is found in the prefix cache.
        ids = range(engine.vocab_size)
        prompts = [self._random.choices(ids, k=self._input_len) for _ in range(count)]
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            adapter = self._adapters[i % len(self._adapters)]
            engine.add_request(str(i), prompt, self._params, adapter)
        return [seconds - started for seconds in self._times()]

    def _times(self) -> Iterator[float]:
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            for output in outputs:
                if output.error is not None:
                    raise output.error
            if outputs:
                yield time.perf_counter()


def _at_least_one(args: argparse.Namespace, name: str) -> int:
    value: int = getattr(args, name)
    if value < 1:
        raise UsageError(f"--{name.replace('_', '-')}={value} must be at least 1")
    return value


def _percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many percent are not above."""
    ranked = sorted(values)
    return ranked[-(-len(ranked) * percent // 100) - 1]
