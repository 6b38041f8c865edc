"""The process that renders the chat templates of adapters, see :mod:`template_process`.

A frame, either way, is the length of what follows in eight bytes, and JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlora.errors import RequestError
from jaxlora.tokenizer import Tokenizer

MAX_BYTES = 512 << 20
"""Memory that rendering may take."""
_MAX_MESSAGE = 1000
"""Characters of what a template says when it refuses."""
_MAX_SECONDS = 60
"""What is left of a process that nobody waits for any more."""


def main() -> None:
    """Answers until there is no more to read."""
    _limit_memory()
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=empty)  # type: ignore[no-untyped-call]
    )
    answers = sys.stdout.buffer
    # Whatever else is printed is no answer.
    sys.stdout = sys.stderr
    answer: dict[str, Any] = {}
    while True:
        data = json.dumps(answer).encode()
        answers.write(len(data).to_bytes(8) + data)
        answers.flush()
        size = sys.stdin.buffer.read(8)
        if not size:
            return
        asked = json.loads(sys.stdin.buffer.read(int.from_bytes(size)))
        signal.alarm(_MAX_SECONDS)
        answer = _answer(tokenizer, **asked)
        signal.alarm(0)


def _answer(
    tokenizer: Tokenizer, messages: list[Any], most: int, options: dict[str, Any]
) -> dict[str, Any]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except RequestError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"stopped": f"it takes more than {MAX_BYTES >> 20} MiB of memory"}
        return {"refused": str(error)[:_MAX_MESSAGE]}
    return {"length": len(text), "text": text if len(text) <= most else ""}


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():  # Elsewhere no limit counts.
        pages = int(statm.read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
