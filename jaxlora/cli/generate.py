"""``jaxlora generate``: a file of requests through a model and its adapters, without a server."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from tqdm import tqdm

from jaxlora import checks
from jaxlora.cli.arguments import UsageError, add_lora_modules, add_model
from jaxlora.cli.offline import adapters_by_name, start
from jaxlora.errors import JaxloraError
from jaxlora.outputs import RequestOutput
from jaxlora.structured_outputs import StructuredOutputsParams, of_response_format
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxlora.cli.arguments import Commands
    from jaxlora.engine.engine import LLMEngine

_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {"output_kind"}
_DESCRIPTION = """\
Reads requests as JSON, one a line: "prompt" (text or token ids) or "messages"; "model", the name of
an adapter, if it is not for the base; any sampling parameter, such as "max_tokens", "logprobs" or
"structured_outputs"; and as over HTTP "response_format", "priority" and "return_token_ids". Writes
one line a request as it ends: its "index", its "model", and the "outputs" or an "error", which
concerns that request alone."""
_OTHERS = frozenset(["priority", "response_format", "return_token_ids"])


class _Line(NamedTuple):
    """One request of the input."""

    model: str | None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: dict[str, Any]
    priority: int
    return_token_ids: bool


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "generate", help="answer a file of requests", description=_DESCRIPTION
    )
    add_model(parser)
    add_lora_modules(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines; - is stdin")
    parser.add_argument("--output", default="-", metavar="FILE", help="JSON lines (stdout)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    adapters = adapters_by_name(args)
    # What is wrong with the file is said before the model is loaded.
    lines = list(_read(args.input, adapters))
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if args.output != "-":
            out = stack.enter_context(Path(args.output).open("w", encoding="utf-8"))
        elif isinstance(out, io.TextIOWrapper):
            out.reconfigure(encoding="utf-8")
        engine, templates = start(args, adapters)
        return _answer(engine, lines, adapters, templates, out)


def _read(path: str, adapters: dict[str, LoRARequest]) -> Iterator[_Line]:
    """The requests in a file. Raises UsageError naming the line."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    # Text may have what str.splitlines takes for the end of a line.
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield _parse(json.loads(line), adapters)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error


def _parse(fields: Any, adapters: dict[str, LoRARequest]) -> _Line:
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, not {type(fields).__name__}")
    # As over HTTP, null asks for nothing; but max_tokens is what the model's length leaves then.
    fields = {key: fields[key] for key in fields if fields[key] is not None or key == "max_tokens"}
    model = fields.pop("model", None)
    if model is not None and (not isinstance(model, str) or model not in adapters):
        known = ", ".join(adapters) or "none"
        raise ValueError(f'"model" is {model!r}, which is none of --lora-modules ({known})')
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise ValueError('must have "prompt" or "messages", and not both')
    allowed = _PARAMS | _OTHERS
    unknown = sorted(fields.keys() - allowed)
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(allowed))}")
    priority = checks.integer("priority", fields.pop("priority", 0))
    with_ids = checks.boolean("return_token_ids", fields.pop("return_token_ids", False))
    own, wanted = fields.get("structured_outputs"), fields.pop("response_format", None)
    if isinstance(own, dict):
        fields["structured_outputs"] = StructuredOutputsParams(**own)
    if wanted is not None:
        if own is not None:
            raise ValueError("response_format and structured_outputs exclude each other")
        fields["structured_outputs"] = of_response_format(wanted)
    # The model may recommend another max_tokens, which min_tokens must not exceed.
    SamplingParams(**{"max_tokens": None} | fields)
    return _Line(model, prompt, messages, fields, priority, with_ids)


def _answer(
    engine: LLMEngine,
    lines: list[_Line],
    adapters: dict[str, LoRARequest],
    templates: dict[str, str | None],
    out: TextIO,
) -> int:
    """Runs all requests and writes each as it ends; Ctrl-C leaves what is written. The exit status
    is 1 if any of them failed."""
    failures = 0
    defaults = dataclasses.replace(
        engine.get_default_sampling_params(), output_kind=RequestOutputKind.FINAL_ONLY
    )

    def write(index: int, result: dict[str, Any]) -> None:
        nonlocal failures
        failures += "error" in result
        line = {"index": index, "model": lines[index].model} | result
        print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
        bar.update()

    with tqdm(total=len(lines), desc="Requests", unit="request") as bar:
        for index, line in enumerate(lines):
            try:
                prompt = line.prompt
                if line.messages is not None:
                    if engine.tokenizer is None:
                        raise ValueError('"messages" need a tokenizer')
                    template = templates.get(line.model or "")
                    prompt = engine.tokenizer.apply_chat_template(
                        line.messages, chat_template=template
                    )
                engine.add_request(
                    str(index),
                    prompt,  # type: ignore[arg-type]  # whatever else it is, the engine says
                    dataclasses.replace(defaults, **line.params),
                    None if line.model is None else adapters[line.model],
                    priority=line.priority,
                )
            except (JaxloraError, ValueError) as error:
                write(index, {"error": str(error)})
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index = int(output.request_id)
                    write(index, _result(output, with_ids=lines[index].return_token_ids))
    return 1 if failures else 0


def _result(output: RequestOutput, *, with_ids: bool) -> dict[str, Any]:
    if output.error is not None:
        return {"error": str(output.error)}
    # As over HTTP; what it needs takes longer to import than --help.
    from jaxlora.server.logprobs import prompt_logprobs as by_token

    outputs: list[dict[str, Any]] = []
    for completion in output.outputs:
        outputs.append(
            {
                "text": completion.text,
                "num_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
        )
        if completion.logprobs is not None:
            outputs[-1]["logprobs"] = by_token(completion.logprobs)
        if with_ids:
            outputs[-1]["token_ids"] = completion.token_ids
    result: dict[str, Any] = {"num_prompt_tokens": len(output.prompt_token_ids), "outputs": outputs}
    if with_ids:
        result["prompt_token_ids"] = output.prompt_token_ids
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = by_token(output.prompt_logprobs)
    return result
