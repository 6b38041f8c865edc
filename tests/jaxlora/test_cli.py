"""The command line, as a user calls it."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.cli import main
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import started


@pytest.fixture
def dora(extras_reference: Reference, tmp_path: Path) -> Path:
    """A copy of an adapter with DoRA on embedding, head and v_proj."""
    return shutil.copytree(extras_reference.paths["dora-vocabulary"], tmp_path / "dora")


def lines(text: str) -> dict[str, str]:
    """A report's lines by their first word."""
    return {
        word: rest.strip() for word, _, rest in (line.partition(" ") for line in text.splitlines())
    }


def test_a_report_of_an_adapter_that_is_served(
    dora: Path, extras_reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "inspect", str(dora), "--model", extras_reference.base_path]) == 0
    report = lines(capsys.readouterr().out)
    tensors = load_file(dora / "adapter_model.safetensors")
    num_parameters = sum(tensor.size for tensor in tensors.values())
    assert report["rank"] == "13"
    assert report["scale"] == "1.23077"
    assert report["targets"] == "lm_head, embed_tokens, v_proj: 4 modules, 2 layers"
    assert report["parameters"] == f"{num_parameters:,}"
    assert report["bytes"] == f"{4 * num_parameters:,} (float32)"
    assert report["effect"] == "changes the logits"
    assert "lora_extras=['dora', 'embed_tokens', 'lm_head']" in report["needs"]
    assert report["served"] == "by an engine started with what it needs"
    a, b = (tensors[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    rank, scale, norm = report["lm_head"].split()
    assert (rank, scale) == ("13", "1.23077")
    assert float(norm) == pytest.approx(16 / 13 * np.linalg.norm(b @ a), rel=1e-3)


def test_without_a_model_the_report_says_so(dora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "inspect", str(dora)]) == 0
    assert "give the model to check shapes" in lines(capsys.readouterr().out)["served"]


def test_an_adapter_that_changes_nothing_says_so(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(reference.paths["r8-qv"], tmp_path / "silent")
    tensors = load_file(path / "adapter_model.safetensors")
    some = [key for key in tensors if "layers.0" in key and "lora_B" in key]
    for keys, effect in (
        (some, "changes the logits, but 2 modules change nothing"),
        ([key for key in tensors if "lora_B" in key], "none: B, A or the scale is zero in every"),
    ):
        zeros = {key: np.zeros_like(tensors[key]) for key in keys}
        save_file(tensors | zeros, path / "adapter_model.safetensors")
        assert main(["adapters", "inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert effect in lines(out)["effect"]
        assert out.count("(changes nothing)") == len(keys)


def test_a_report_of_a_strangers_names_moves_no_cursor(
    dora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"\x1b[2J\nserved" + "x" * 9999: np.ones(3, np.int8), "y": np.ones(2, np.bool_)}
    save_file(tensors, dora / "adapter_model.safetensors")
    assert main(["adapters", "inspect", str(dora)]) == 1
    out = capsys.readouterr().out
    assert lines(out)["bytes"] == "5 (BOOL, I8)"
    assert r" \x1b[2J\nservedx" in out
    assert "\x1b" not in out
    assert "served" not in lines(out)
    assert len(out) < 1000
    # Nor does what it calls its options, or what safetensors quotes of a header.
    weights, config = dora / "adapter_model.safetensors", dora / "adapter_config.json"
    options = json.loads(config.read_text())
    odd = {f"\x1b[2J\nserved{i}" + "x" * 999: True for i in range(100)}
    header = {"x": {"dtype": "\x1b[2J\nserved" + "x" * 9999, "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    for change in (
        lambda: config.write_text(json.dumps(options | odd)),
        lambda: weights.write_bytes(len(text).to_bytes(8, "little") + text + b"x"),
    ):
        change()
        assert main(["adapters", "inspect", str(dora)]) == 1
        out, error = capsys.readouterr()
        assert r"\x1b[2J\nserved" in out + error
        assert "\x1b" not in out + error
        assert len(out + error) < 8000


def test_what_would_be_refused_is_said_with_every_reason(
    dora: Path, extras_reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dora / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"bias": "all", "init_lora_weights": "pissa"}))
    tensors = load_file(dora / "adapter_model.safetensors")
    save_file(tensors | {"stray": np.ones(1, np.float32)}, dora / "adapter_model.safetensors")
    assert main(["adapters", "inspect", str(dora), "--model", extras_reference.base_path]) == 1
    out = capsys.readouterr().out
    for reason in ("Adapter bias is not supported", "pissa", "nothing in the model has this name"):
        assert reason in out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t | {"model.x": t.popitem()[1]}, "refused"),
        (
            lambda t: {k: v + 1 if "base_layer" in k else v for k, v in t.items()},
            "brings another matrix than the base's",
        ),
        (
            lambda t: {k: v[..., :-1].copy() if "v_proj.lora_A" in k else v for k, v in t.items()},
            "expected [13, 64]",
        ),
    ],
    ids=["name", "copy", "shape"],
)
def test_tensors_are_compared_with_the_model(
    edit: object,
    message: str,
    dora: Path,
    extras_reference: Reference,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(edit)
    file = dora / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    assert main(["adapters", "inspect", str(dora), "--model", extras_reference.base_path]) == 1
    assert message in capsys.readouterr().out


def test_a_tied_matrix_is_compared_under_either_name(
    tied_reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tied_reference.base_path, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    copies = []
    for path in tied_reference.paths.values():
        names = load_file(Path(path) / "adapter_model.safetensors").keys()
        copies += [name for name in names if "base_layer" in name]
        assert main(["adapters", "inspect", str(path), "--model", str(model)]) == 0
        assert "served" in lines(capsys.readouterr().out)
    assert copies


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (
            lambda t: t | {k: v.astype(np.int8) for k, v in t.items() if "v_proj" in k},
            {},
            "must be one of float32, float16, bfloat16: base_model.model.model.layers.0",
        ),
        (lambda t: t, {"use_dora": False}, "use_dora=False, but the adapter has a lora_magnitude"),
        (lambda t: t, {"target_modules": ["v_proj"]}, "its target_modules leaves their modules"),
        (
            lambda t: {k: v + np.nan if "v_proj.lora_B" in k else v for k, v in t.items()},
            {},
            "weights contain NaN or Inf: model.layers.0.self_attn.v_proj",
        ),
        (lambda t: t, {"r": 8}, "does not fit its own ranks (r, rank_pattern): base_model.model"),
        (
            lambda t: {k: v[None] if "magnitude" in k else v for k, v in t.items()},
            {},
            "expected [any]",
        ),
        (
            lambda t: {"lm_head.weight": np.ones((4, 4), np.float32)},
            {"modules_to_save": ["lm_head"]},
            "The adapter has no LoRA tensors.",
        ),
    ],
    ids=["dtype", "switch", "left out", "NaN", "rank", "dimensions", "no LoRA"],
)
def test_what_needs_no_model_is_refused_without_one(
    edit: Callable[[Any], Any],
    options: dict[str, Any],
    message: str,
    dora: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | options))
    file = dora / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    assert main(["adapters", "inspect", str(dora)]) == 1
    report = lines(capsys.readouterr().out)
    assert message in report["refused"]
    # What was not looked at is not said to have no effect.
    assert ("effect" in report) == ("targets" in report)


def test_what_a_tie_comes_to_is_left_open_without_a_model_and_the_rest_is_not(
    tied_reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(tied_reference.paths["one-for-both"], tmp_path / "tied")
    config = json.loads((path / "adapter_config.json").read_text())
    assert main(["adapters", "inspect", str(path)]) == 0
    served = lines(capsys.readouterr().out)["served"]
    assert served.endswith("give the model to check shapes and what ensure_weight_tying comes to")
    for wrong, message in (
        ({"r": 8}, "does not fit its own ranks"),
        ({"exclude_modules": ["k_proj"]}, "its exclude_modules leaves their modules out"),
    ):
        (path / "adapter_config.json").write_text(json.dumps(config | wrong))
        for model in ([], ["--model", tied_reference.base_path]):
            assert main(["adapters", "inspect", str(path), *model]) == 1
            assert message in lines(capsys.readouterr().out)["refused"]


@pytest.mark.parametrize(
    ("reaches", "needs"),
    [(3e4, None), (1e5, "a dtype other than float16 (A, or B"), (3.395e38, "float16 and bfloat16")],
)
def test_a_dtype_that_cannot_hold_the_adapter_is_named(
    reaches: float,
    needs: str | None,
    reference: Reference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = shutil.copytree(reference.paths["r8-qv"], tmp_path / "large")
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][0, 0] = reaches / 2  # Its scale is 2.
    save_file(tensors, path / "adapter_model.safetensors")
    for model in ([], ["--model", reference.base_path]):
        assert main(["adapters", "inspect", str(path), *model]) == 0
        found = lines(capsys.readouterr().out)["needs"]
        assert needs in found if needs else "dtype" not in found


def test_a_scale_that_is_too_large_for_any_dtype_is_refused(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(reference.paths["r8-qv"], tmp_path / "large")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3e38, "r": 8}))
    tensors = load_file(path / "adapter_model.safetensors")
    tensors = {key: tensor + 100 for key, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    assert main(["adapters", "inspect", str(path)]) == 1
    assert "scale is beyond float32" in lines(capsys.readouterr().out)["refused"]


def test_what_the_locale_has_no_letters_for_is_escaped(
    dora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["adapters", "inspect", str(dora.rename(dora.with_name("dor\u00e4")))]) == 0
    assert rb"dor\xe4" in printed.getvalue()


def test_errors_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "inspect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxlora: No adapter found for")


def test_a_damaged_file_is_an_error(dora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["adapters", "inspect", str(dora)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_other_methods_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft.LoHaConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    save_file({"hada_w1_a": np.ones((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    assert main(["adapters", "inspect", str(tmp_path)]) == 1
    assert "peft_type='LOHA' is not served" in capsys.readouterr().out


def test_the_module_runs_as_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxlora", "adapters", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("jaxlora", run_name="__main__")
    assert exit.value.code == 0
    assert "inspect" in capsys.readouterr().out


def test_who_reads_the_output_may_stop(reference: Reference) -> None:
    command = [sys.executable, "-m", "jaxlora", "adapters", "inspect", reference.paths["r8-qv"]]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_breaks_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        raise BrokenPipeError("of a download")

    monkeypatch.setattr("jaxlora.cli.adapters._inspect", run)
    assert main(["adapters", "inspect", "x"]) == 1
    assert capsys.readouterr().err == "jaxlora: of a download\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"{jaxlora.__version__}\n"


@pytest.mark.parametrize("stdout", ["pipe", "closed"])
def test_ctrl_c_during_the_first_import_says_one_line(tmp_path: Path, stdout: str) -> None:
    # What the command line needs first, as it is on a machine whose disk is slow.
    module = "import os, time\nos.write(2, b'imported')\ntime.sleep(600)\n"
    (tmp_path / "argparse.py").write_text(module)
    code = "import sys; from jaxlora.cli import main; sys.exit(main(['--version']))"
    if stdout == "closed":
        code = f"import sys; sys.stdout = None; {code}"
    path = os.pathsep.join([str(tmp_path), str(Path(jaxlora.__file__).parents[1])])
    with started(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.read(8) == b"imported"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
    assert (process.returncode, told) == (130, b"\njaxlora: interrupted\n")


def test_a_process_ends_with_its_test_if_that_is_interrupted() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        started([sys.executable, "-c", "import time; time.sleep(60)"]) as process,
    ):
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL
