"""The chat template in an adapter's folder, which may come from anyone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxlora.adapters.chat_template import chat_template_of
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    return path


def test_it_is_a_file_of_its_own_or_the_tokenizer_s(path: Path) -> None:
    assert chat_template_of(str(path), None) is None
    (path / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    assert chat_template_of(str(path), None) is None
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    assert chat_template_of(str(path), None) == "{{ 1 }}"
    (path / "chat_template.jinja").write_text("{{ 2 }}")
    assert chat_template_of(str(path), None) == "{{ 2 }}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_it_is_read_from_nowhere_else(path: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"chat_template": "of the host"}')
    (path / name).symlink_to(secret)
    with pytest.raises(AdapterRefusedError, match=f"{name} is a symbolic link out of the"):
        chat_template_of(str(path), None)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path / "chat_template.jinja")
    with pytest.raises(AdapterRefusedError, match="is not a regular file"):
        chat_template_of(str(path), None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"x" * (1 << 20) + b"x", "has 1048577 characters, more than"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        ("tokenizer_config.json", b"[]x", "is not JSON"),
        ("tokenizer_config.json", b"[1]", "holds list, not an object"),
        ("tokenizer_config.json", json.dumps({"chat_template": "y" * (2 << 20)}).encode(), "2097"),
    ],
)
def test_what_is_damaged_or_huge_is_refused(
    path: Path, name: str, content: bytes, message: str
) -> None:
    (path / name).write_bytes(content)
    with pytest.raises(AdapterRefusedError, match=message):
        chat_template_of(str(path), None)


def test_a_folder_without_an_adapter_has_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        chat_template_of(str(tmp_path), None)
