from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlora.engine.generation_defaults import generation_defaults
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError, ModelLoadError
from jaxlora.llm import engine_args

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "top_k": None}


def test_the_checkpoints_own() -> None:
    assert EngineArgs(model="m").generation_config == "auto"
    assert generation_defaults("auto", LLAMA) == {"temperature": 0.6, "top_p": 0.9}
    assert generation_defaults("auto", {}) == {}
    assert generation_defaults("vllm", LLAMA) == {}
    assert engine_args(model="m", generation_config="vllm").generation_config == "vllm"


def test_a_folders(tmp_path: Path) -> None:
    config = {"max_new_tokens": 7, "repetition_penalty": 1.1, "top_k": 20, "min_p": 0.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert generation_defaults(str(tmp_path), LLAMA) == {
        "max_tokens": 7,
        "repetition_penalty": 1.1,
        "top_k": 20,
        "min_p": 0.1,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 3.0}, r"temperature=3.0 must be in \[0, 2\]; generation_config='vllm'"),
        ({"top_k": "many"}, "cannot be served"),
    ],
)
def test_what_cannot_be_served_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generation_defaults("auto", config)


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be auto, vllm, or a folder with a generation_con"):
        generation_defaults(str(tmp_path), {})


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "holds list, not a JSON object"), ("{", "is not valid JSON")]
)
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=rf"generation_config\.json {message}"):
        generation_defaults(str(tmp_path), {})
