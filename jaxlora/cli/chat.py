"""``jaxlora chat``: a conversation with a model and its adapters in the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlora.cli.arguments import UsageError, add_lora_modules, add_model
from jaxlora.cli.offline import adapters_by_name, start
from jaxlora.errors import JaxloraError
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxlora.cli.arguments import Commands
    from jaxlora.engine.engine import LLMEngine

_BASE = "base"
_HELP = """\
/adapter NAME   answer with this adapter from now on; /adapter alone, with the base model
/reset          forget the conversation
/quit           the end, as Ctrl-D
Ctrl-C stops an answer."""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model and its adapters",
        description=f"Loads a model and answers in the terminal.\n\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_lora_modules(parser)
    parser.add_argument("--adapter", metavar="NAME", help="the one of --lora-modules to begin with")
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer (what fits)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (as the model recommends)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # One conversation: fewer programs, and a quicker start.
    args.max_num_seqs = args.max_num_seqs or 1
    adapters = adapters_by_name(args)
    if args.adapter is not None and args.adapter not in adapters:
        raise UsageError(f"--adapter {args.adapter!r} is none of --lora-modules")
    wanted: dict[str, Any] = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        wanted["temperature"] = args.temperature
    try:
        SamplingParams(**wanted)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("_", "-", 1)) from error
    engine, templates = start(args, adapters)
    defaults = engine.get_default_sampling_params()
    params = dataclasses.replace(defaults, output_kind=RequestOutputKind.DELTA, **wanted)
    return _Chat(engine, params, adapters, templates, args.system, args.adapter).run()


class _Chat:
    """One conversation; which adapter answers may change on the way."""

    def __init__(
        self,
        engine: LLMEngine,
        params: SamplingParams,
        adapters: Mapping[str, LoRARequest],
        templates: Mapping[str, str | None],
        system: str | None,
        adapter: str | None,
    ) -> None:
        self._engine, self._params = engine, params
        self._adapters, self._templates = adapters, templates
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
        self._adapter = adapter
        """None for the base model."""
        self._num_answers = 0

    def run(self) -> int:
        """Reads and answers until the end of the input."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A line that is no text is refused as any question, and the conversation goes on.
            sys.stdin.reconfigure(errors="surrogateescape")
        print("/help says what there is beside questions.")
        while True:
            try:
                line = input(f"{self._adapter or _BASE}> ").strip()
                if line == "/quit":
                    return 0
                if line.startswith("/"):
                    self._obey(*line.split())
                elif line:
                    self._answer(line)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                # Also what was to stop an answer that has just ended.
                print()

    def _obey(self, command: str, *names: str) -> None:
        if command == "/reset" and not names:
            self._messages = list(self._first)
        elif command == "/adapter" and not names:
            self._adapter = None
        elif command == "/adapter" and len(names) == 1 and names[0] in self._adapters:
            self._adapter = names[0]
        else:
            print(f"{_HELP}\nAdapters: {', '.join(self._adapters) or 'none'}")

    def _answer(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}]
        try:
            text = self._generate(asked)
        except (JaxloraError, ValueError) as error:
            print(f"jaxlora: {error}")
            return
        print()
        self._messages = [*asked, {"role": "assistant", "content": text}]

    def _generate(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Prints the answer as it comes; what there is of it when Ctrl-C stops it."""
        engine, template = self._engine, self._templates.get(self._adapter or "")
        assert engine.tokenizer is not None
        self._num_answers += 1
        request_id = f"answer-{self._num_answers}"
        adapter = self._adapters[self._adapter] if self._adapter is not None else None
        text = ""
        try:
            prompt = engine.tokenizer.apply_chat_template(messages, chat_template=template)
            engine.add_request(request_id, prompt, self._params, adapter)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
                    for completion in output.outputs:
                        text += completion.text
                        print(completion.text, end="", flush=True)
        except KeyboardInterrupt:
            engine.abort_request(request_id)
        return text
