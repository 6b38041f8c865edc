"""How a model's name becomes a checkpoint: a directory, a GGUF file, a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

from jaxlora.errors import ConfigError, ModelLoadError
from jaxlora.models.checkpoints import Checkpoint, open_checkpoint
from jaxlora.models.gguf_checkpoint import GGUFCheckpoint
from jaxlora.models.safetensors_checkpoint import SafetensorsCheckpoint
from tests.jaxlora.models.gguf_files import metadata_of, write_gguf


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.zeros(1, np.float32)}, path / "model.safetensors")
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    embedding = {
        "token_embd.weight": (np.zeros((32, 256), np.float32), gguf.GGMLQuantizationType.F32)
    }
    return write_gguf(tmp_path / "model.gguf", "llama", metadata_of("llama"), embedding)


@pytest.mark.parametrize("model", ["~no-such-user-here/x", "/" + "x" * 5000], ids=["user", "long"])
def test_a_path_that_cannot_be_one_is_refused(model: str) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot be read: .*; give the path of a model"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_a_model_that_may_not_be_read_is_refused(
    directory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is denied to root, so it is said for the system."""
    denied = str(directory / name)

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).startswith(denied):
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *args, **options)

    opens = Path.stat if not name else Path.open
    monkeypatch.setattr(Path, opens.__name__, refuse)
    with pytest.raises(ModelLoadError, match=r"Permission denied: .*"):
        open_checkpoint(str(directory)).hf_config()


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_directory(directory: Path, load_format: Any) -> None:
    checkpoint = open_checkpoint(str(directory), load_format=load_format)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == directory
    assert [name for name, _ in checkpoint.tensors()] == ["a"]


@pytest.mark.parametrize("load_format", ["auto", "gguf", "dummy"])
def test_a_gguf_file(gguf_file: Path, load_format: Any) -> None:
    checkpoint = open_checkpoint(str(gguf_file), load_format=load_format)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == gguf_file


def test_dummy_needs_a_config_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(directory), load_format="dummy")
    assert checkpoint.hf_config() == {"model_type": "llama"}
    with pytest.raises(ModelLoadError, match="has neither"):
        open_checkpoint(str(directory))


def test_a_home_directory_is_expanded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory.parent))
    assert open_checkpoint("~/model").path == directory


def test_what_is_neither_is_refused(directory: Path, gguf_file: Path) -> None:
    for model, load_format, message in (
        (directory, "gguf", "is a directory, but load_format is 'gguf'"),
        (gguf_file, "safetensors", "is a GGUF file, but load_format is 'safetensors'"),
        (directory / "config.json", "auto", "is a file, but not a .gguf one"),
        (directory / "absent", "auto", "does not exist and is not a hub id"),
        ("name", "auto", "does not exist and is not a hub id"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            open_checkpoint(str(model), load_format=load_format)
    with pytest.raises(ConfigError, match="revision='main' applies to hub ids"):
        open_checkpoint(str(directory), revision="main")


def test_a_hub_id_downloads_what_is_needed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        calls.append({"repo": repo, **kwargs})
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/model-1.0", revision="v1", download_dir="cache")
    open_checkpoint("org/model-1.0", load_format="dummy")

    assert checkpoint.path == directory
    patterns = [call.pop("allow_patterns") for call in calls]
    assert calls == [
        {"repo": "org/model-1.0", "revision": "v1", "cache_dir": "cache"},
        {"repo": "org/model-1.0", "revision": None, "cache_dir": None},
    ]
    assert {"config.json", "tokenizer.json", "model-*.safetensors"} <= set(patterns[0])
    assert not any("safetensors" in pattern for pattern in patterns[1])


def test_a_gguf_file_on_the_hub(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def hf_hub_download(repo: str, file: str, **kwargs: Any) -> str:
        calls.append((repo, file, kwargs))
        return str(gguf_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    checkpoint = open_checkpoint("org/model-GGUF/sub/model.Q4_K.gguf", revision="v1")
    assert isinstance(checkpoint, GGUFCheckpoint)
    expected = {"revision": "v1", "cache_dir": None}
    assert calls == [("org/model-GGUF", "sub/model.Q4_K.gguf", expected)]


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelLoadError, match=r"org/model .* no connection\. Check the spelling"):
        open_checkpoint("org/model")
