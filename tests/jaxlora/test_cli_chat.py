"""A conversation in the terminal, with a process as a user has it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlora.cli import main
from jaxlora.cli.chat import _Chat
from jaxlora.tokenizer import load_tokenizer
from jaxlora.types import SamplingParams
from tests.jaxlora.engine.simulator import make_engine
from tests.jaxlora.limits import LIMITS
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import started
from tests.jaxlora.tiny_tokenizer import CHARACTERS, add_tokenizer, encode

ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """What is typed and what is printed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def read_until(self, end: str) -> str:
        """What is printed up to the next ``end``, which is left out."""
        text = ""
        while not text.endswith(end):
            text += self.read(1)
        return text.removesuffix(end)

    def read(self, count: int) -> str:
        assert self.process.stdout is not None
        piece = self.process.stdout.read(count)
        assert piece, "the process has ended"
        return piece.decode()

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()


def tokens(text: str) -> list[int]:
    """The ids of messages as the template writes them."""
    ids = []
    for message in text.split("<s>")[1:]:
        ids += [len(CHARACTERS), *encode(message)]
    return ids


def test_a_conversation(tiny_model: Path, program_cache: Path, reference: Reference) -> None:
    command = [sys.executable, "-m", "jaxlora", "chat", str(tiny_model), "--temperature", "0"]
    command += ["--lora-modules", f"sql={reference.paths['r8-qv']}", "--max-tokens", "60"]
    command += ["--compilation-cache-dir", str(program_cache), *LIMITS, "--system", "be brief"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with started(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        terminal = Terminal(process)
        assert terminal.read_until("base> ") == "/help says what there is beside questions.\n"
        # The adapter goes on with what the base model was asked and said.
        said = "<s>system: be brief "
        for name, adapter in (("base", None), ("sql", "r8-qv")):
            if adapter is not None:
                terminal.type("/adapter sql")
                terminal.read_until("sql> ")
            terminal.type("hello")
            answer = terminal.read_until(f"\n{name}> ")
            said += "<s>user: hello "
            prompt = tokens(said) + encode("assistant: ")
            reference.check_greedy(prompt, encode(answer), adapter)
            said += f"<s>assistant: {answer} "
        terminal.type("/nonsense")
        assert "Adapters: sql\n" in terminal.read_until("sql> ")
        terminal.type("x" * 300)
        assert "max_model_len=256" in terminal.read_until("sql> ")

        # Ctrl-C ends an answer and nothing else. The machine may be too busy to notice in time.
        terminal.type("/reset")
        terminal.read_until("sql> ")
        terminal.type("hello")
        whole = terminal.read_until("\nsql> ")
        for _ in range(20):
            terminal.type("/reset")
            terminal.read_until("sql> ")
            terminal.type("hello")
            first = terminal.read(1)
            process.send_signal(signal.SIGINT)
            answer = (first + terminal.read_until("\nsql> ")).removesuffix("\n")
            # There is another prompt if it came after the answer.
            terminal.type("/nonsense")
            terminal.read_until("Adapters: sql\nsql> ")
            assert whole.startswith(answer)
            if answer != whole:
                break
        else:
            pytest.fail("no answer was cut")
        terminal.type("/quit")
        assert process.wait(300) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens=0 must be at least 1"),
        (["--temperature", "9"], "--temperature=9.0 must be in [0, 2]"),
    ],
)
def test_what_no_answer_can_be_like_is_said_before_the_model_is_loaded(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "/nowhere", *flags]) == 1
    assert capsys.readouterr().err == f"jaxlora: {said}\n"


def test_ctrl_c_while_the_model_is_loaded_ends_the_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "jaxlora", "chat", str(tiny_model)]
    # One that is empty, so that there is something to compile.
    command += ["--compilation-cache-dir", str(tmp_path)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with started(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        told = process.stderr.read(1)  # a bar
        process.send_signal(signal.SIGINT)
        told += process.stderr.read()
        assert process.wait(300) == 130
    assert told.endswith(b"\njaxlora: interrupted\n")
    assert b"Traceback" not in told


def test_ctrl_c_as_an_answer_ends_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: _Chat, question: str) -> None:
        raise KeyboardInterrupt

    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(_Chat, "_answer", interrupted)
    engine, _ = make_engine()
    assert _Chat(engine, SamplingParams(), {}, {}, None, None).run() == 0
    assert next(lines, None) is None


def test_a_line_that_is_no_text_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    tokenizer = load_tokenizer(str(add_tokenizer(tmp_path / "base", tmp_path / "model")))
    engine, _ = make_engine(tokenizer=tokenizer)
    lines = io.BytesIO(b"caf\xe9\n/nonsense\n/quit\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    assert _Chat(engine, SamplingParams(), {}, {}, None, None).run() == 0
    said = capsys.readouterr().out
    assert "jaxlora: the text cannot be encoded as UTF-8\n" in said
    assert "Adapters: none\n" in said


def test_an_adapter_that_was_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "/nowhere", "--adapter", "x"]) == 1
    assert "--adapter 'x' is none of --lora-modules" in capsys.readouterr().err
