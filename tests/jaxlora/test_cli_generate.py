"""A file of requests from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlora.cli import main
from tests.jaxlora.limits import LIMITS
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import started
from tests.jaxlora.tiny_tokenizer import encode

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, lines: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return str(path)


def test_requests_are_answered_each_for_itself(
    tiny_model: Path, program_cache: Path, reference: Reference, tmp_path: Path
) -> None:
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    requests = [
        {"prompt": "hello you"} | greedy,
        {"prompt": encode("hello you"), "model": "sql"} | greedy,
        {"prompt": "x" * 999} | greedy,
        {"messages": [{"role": "user", "content": "hi"}], "model": "sql", "n": 2, "seed": 3},
        {"prompt": [10**6]} | greedy,
        {"prompt": "hello", "structured_outputs": {"choice": ["yes", "no"]}},
        {"prompt": [8, 3], "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 2} | greedy,
        {"prompt": [8, 3], "return_token_ids": True} | greedy,
        {"prompt": "{", "response_format": {"type": "json_object"}, "max_tokens": 100, "seed": 1},
    ]
    out = tmp_path / "out.jsonl"
    command = ["generate", str(tiny_model), "--input", write_lines(tmp_path / "in", requests)]
    command += ["--output", str(out), "--lora-modules", f"sql={reference.paths['r8-qv']}"]
    command += ["--compilation-cache-dir", str(program_cache), *LIMITS]
    assert main(command) == 1  # two of them were refused
    lines = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["index"])
    assert [line["index"] for line in lines] == list(range(9))
    models = [None, "sql", None, "sql", *[None] * 5]
    assert [line["model"] for line in lines] == models
    for line, adapter in ((lines[0], None), (lines[1], "r8-qv")):
        (output,) = line["outputs"]
        assert line["num_prompt_tokens"] == len(encode("hello you"))
        assert (output["num_tokens"], output["finish_reason"]) == (8, "length")
        reference.check_greedy(encode("hello you"), encode(output["text"]), adapter)
    assert "max_model_len" in lines[2]["error"]
    assert len(lines[3]["outputs"]) == 2
    assert "error" in lines[4]
    assert lines[5]["outputs"][0]["text"] in ("yes", "no")
    assert len(lines[6]["outputs"][0]["logprobs"]) == 8
    first, second = lines[6]["prompt_logprobs"]
    assert first is None
    assert second["3"].keys() == {"logprob", "rank", "decoded_token"}
    assert lines[7]["prompt_token_ids"] == [8, 3]
    (with_ids,) = lines[7]["outputs"]
    assert with_ids["token_ids"] == encode(with_ids["text"])
    assert len(with_ids["token_ids"]) == 8
    assert "token_ids" not in lines[6]["outputs"][0]
    assert lines[8]["outputs"][0]["text"].lstrip()[0] == "{"


def test_requests_of_lower_priority_value_go_first(
    tiny_model: Path, program_cache: Path, tmp_path: Path
) -> None:
    alike = {"prompt": "a", "max_tokens": 4, "ignore_eos": True}
    # More of them than rows.
    requests = [alike | {"priority": 20 - i} for i in range(20)]
    out = tmp_path / "out.jsonl"
    command = ["generate", str(tiny_model), "--input", write_lines(tmp_path / "in", requests)]
    command += ["--output", str(out), "--compilation-cache-dir", str(program_cache), *LIMITS]
    assert main(command) == 0
    ended = [json.loads(line)["index"] for line in out.read_text().splitlines()]
    assert set(ended[:6]) == set(range(14, 20))


def test_lines_are_asked_and_answered_in_utf_8_as_the_model_recommends(
    tiny_model: Path, program_cache: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 24}))
    requests = [
        {"prompt": "hi", "min_tokens": 20, "ignore_eos": True, "temperature": None, "seed": None},
        {"prompt": "hi", "min_tokens": 25},
        {"prompt": "hi", "structured_outputs": {"choice": ["\u00e9"]}},
        {"prompt": "hi", "max_tokens": None, "ignore_eos": True},
    ]
    command = [sys.executable, "-m", "jaxlora", "generate", str(model)]
    command += ["--input", write_lines(tmp_path / "in", requests)]
    command += ["--compilation-cache-dir", str(program_cache), *LIMITS]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 1  # two of them were refused
    lines = sorted(map(json.loads, done.stdout.splitlines()), key=lambda line: line["index"])
    (first,), (last,) = lines[0]["outputs"], lines[3]["outputs"]
    assert (first["num_tokens"], first["finish_reason"]) == (24, "length")
    assert "min_tokens=25 must be in [0, 24]" in lines[1]["error"]
    assert "choice '\u00e9' cannot be written" in lines[2]["error"]
    assert "\u00e9".encode() in done.stdout
    assert last["num_tokens"] > 200  # as far as the model's length goes


def test_ctrl_c_keeps_what_is_written_and_says_one_line(
    tiny_model: Path, program_cache: Path, tmp_path: Path
) -> None:
    requests = [{"prompt": "hello", "max_tokens": 8 + 40 * (i % 2)} for i in range(2000)]
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "jaxlora", "generate", str(tiny_model), "--output", str(out)]
    command += ["--input", write_lines(tmp_path / "in", requests)]
    command += ["--compilation-cache-dir", str(program_cache), *LIMITS]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with started(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not (out.exists() and out.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert told.endswith("\njaxlora: interrupted\n")
    assert "Traceback" not in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert 3 < len(lines) < len(requests)
    assert all(line["outputs"] for line in lines)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "x", "model": "y"}, "'y', which is none of --lora-modules (none)"),
        ({"prompt": "x", "model": ["y"]}, "['y'], which is none of --lora-modules (none)"),
        ({"prompt": "x", "messages": []}, "not both"),
        ({"max_tokens": 3}, '"prompt" or "messages"'),
        ({"prompt": "x", "max_token": 3}, "unknown: max_token; known:"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "structured_outputs": {"regexp": "a"}}, "argument 'regexp'"),
        ({"prompt": "x", "structured_outputs": {"choice": []}}, "choice=[] must be"),
        ({"prompt": "x", "priority": 1.5}, "priority=1.5 must be an integer"),
        ({"prompt": "x", "ignore_eos": "false"}, "ignore_eos='false' must be true or false"),
        ({"prompt": "x", "return_token_ids": 1}, "return_token_ids=1 must be true or false"),
        (
            {"prompt": "x", "response_format": {"type": "xml"}},
            "response_format={'type': 'xml'} must be",
        ),
        (
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "must be given with json_schema.s",
        ),
        (
            {
                "prompt": "x",
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "response_format and structured_outputs exclude each other",
        ),
        ([1], "must be a JSON object, not list"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_a_line_that_makes_no_sense_is_told_before_anything_is_loaded(
    line: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "in", [{"prompt": "fine"}, line])
    assert main(["generate", "/nowhere", "--input", path]) == 1
    told = capsys.readouterr().err
    assert f"{path}, line 2: " in told
    assert said in told


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000])
def test_a_line_that_cannot_be_read_is_told(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first line is one, whatever str.splitlines says.
    (tmp_path / "in").write_bytes('{"prompt": "a\u2028b\x85"}\n'.encode() + line)
    assert main(["generate", "/nowhere", "--input", str(tmp_path / "in")]) == 1
    assert f"{tmp_path / 'in'}, line 2: " in capsys.readouterr().err
