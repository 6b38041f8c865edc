"""How fast it is, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlora.cli import main
from tests.jaxlora.limits import LIMITS
from tests.jaxlora.peft_models import Reference


@pytest.fixture
def flags(tiny_model: Path, program_cache: Path, reference: Reference, tmp_path: Path) -> list[str]:
    return [
        *(str(tiny_model), "--load-format", "dummy", "--input-len", "12", "--output-len", "6"),
        *("--lora-modules", f"sql={reference.paths['r8-qv']}", *LIMITS),
        *("--compilation-cache-dir", str(program_cache), "--max-model-len", "256"),
        *("--output-json", str(tmp_path / "out.json")),
    ]


def numbers(tmp_path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_throughput(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", *flags, "--num-prompts", "10"]) == 0
    found = numbers(tmp_path)
    assert found["requests_per_s"] == pytest.approx(10 / found["seconds"])
    assert found["output_tokens_per_s"] == pytest.approx(60 / found["seconds"])
    assert found["total_tokens_per_s"] == pytest.approx(180 / found["seconds"])
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["seconds"].replace(",", "")) == pytest.approx(found["seconds"], rel=1e-4)


def test_latency(flags: list[str], tmp_path: Path) -> None:
    some = ["--batch-size", "3", "--num-iters", "4", "--num-iters-warmup", "1"]
    assert main(["bench", "latency", *flags, *some]) == 0
    found = numbers(tmp_path)
    for name in ("batch", "first_token", "inter_token"):
        p50, p90, p99 = (found[f"{name}_p{percent}_s"] for percent in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
    # A batch is its first token and what comes after.
    assert found["first_token_p50_s"] < found["batch_p50_s"]
    assert found["inter_token_p50_s"] < found["batch_p50_s"] / 2


@pytest.mark.parametrize("flag", ["--input-len", "--output-len", "--num-prompts"])
def test_nothing_to_measure_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "/nowhere", flag, "0"]) == 1
    assert f"{flag}=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_completions_that_would_be_cut_short_are_refused(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ["--input-len", "12", "--output-len", "6", "--max-model-len", "17"]
    assert main(["bench", kind, "/nowhere", *lengths]) == 1
    said = capsys.readouterr().err
    assert "--max-model-len=17 must be at least --input-len plus --output-len, 18" in said
