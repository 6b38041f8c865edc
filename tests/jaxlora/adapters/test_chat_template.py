"""The chat template in an adapter's folder, which may come from anyone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from jaxlora.adapters.chat_template import ChatTemplates, chat_templates_of
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    return path


def test_it_is_a_file_of_its_own_or_the_tokenizer_s(path: Path) -> None:
    assert chat_templates_of(str(path), None) is None
    (path / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    assert chat_templates_of(str(path), None) is None
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    assert chat_templates_of(str(path), None) == ChatTemplates("{{ 1 }}")
    (path / "chat_template.jinja").write_text("{{ 2 }}")
    assert chat_templates_of(str(path), None) == ChatTemplates("{{ 2 }}")


def test_of_several_those_are_taken_that_transformers_takes(path: Path) -> None:
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"x": 0}, merges=[]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = templates
    conversation, tools = [{"role": "user", "content": "hi"}], [{"type": "function"}]
    # Files of their own, then the list that versions before 4.51 saved.
    tokenizer.save_pretrained(path)
    by_files = chat_templates_of(str(path), None)
    shutil.rmtree(path / "additional_chat_templates")
    (path / "chat_template.jinja").unlink()
    named = [{"name": name, "template": text} for name, text in templates.items()]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_templates_of(str(path), None) == by_files is not None
    for given in (None, tools):
        text = tokenizer.apply_chat_template(conversation, tools=given, tokenize=False)
        assert by_files.template_for(given) == f"{{{{ {text} }}}}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "tool_use", "template": "x"}], "none of .* is the default one"),
        ([{"name": "default", "template": 3}], "neither text nor a list"),
        ({"default": "x"}, "neither text nor a list"),
        (["x"], "neither text nor a list"),
    ],
)
def test_what_is_no_template_is_refused(path: Path, template: object, message: str) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(AdapterRefusedError, match=message):
        chat_templates_of(str(path), None)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_it_is_read_from_nowhere_else(path: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"chat_template": "of the host"}')
    (path / name).symlink_to(secret)
    with pytest.raises(AdapterRefusedError, match=f"{name} is a symbolic link out of the"):
        chat_templates_of(str(path), None)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path / "chat_template.jinja")
    with pytest.raises(AdapterRefusedError, match="is not a regular file"):
        chat_templates_of(str(path), None)


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
        chat_templates_of(str(path), None)


def test_a_folder_without_an_adapter_has_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        chat_templates_of(str(tmp_path), None)
