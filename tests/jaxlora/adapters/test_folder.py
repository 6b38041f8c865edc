"""A folder may hold anything: links, pipes, pickles, half a tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxlora.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from jaxlora.adapters.sources import fingerprint, resolve
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError
from jaxlora.server.resolvers import DirectoryResolver


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / CONFIG_FILE).write_text('{"r": 4}')
    (path / WEIGHTS_FILE).write_bytes((7).to_bytes(8, "little") + b"weights")
    return path


def test_a_folder_gives_its_configuration_and_its_weights(path: Path) -> None:
    folder = AdapterFolder(path)
    assert folder.config() == {"r": 4}
    assert folder.weights_file() == path / WEIGHTS_FILE
    assert folder.added_tokens() == {}


@pytest.mark.parametrize("name", ["nowhere", "nul\0byte", "x" * 5000])
def test_a_missing_folder_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter found for"):
        AdapterFolder(tmp_path / name)


def test_a_file_in_place_of_a_folder_is_not_found(path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="No adapter found for"):
        AdapterFolder(path / WEIGHTS_FILE)


def test_a_folder_without_weights_is_not_found(path: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterNotFoundError, match=f"{WEIGHTS_FILE} is not"):
        AdapterFolder(path).weights_file()


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "adapter_model.pt", "adapter_model-00001-of-00002.safetensors"],
)
def test_other_weights_are_refused_with_the_remedy(path: Path, name: str) -> None:
    (path / WEIGHTS_FILE).rename(path / name)
    with pytest.raises(AdapterRefusedError, match=rf"only {name}.*convert.*safetensors"):
        AdapterFolder(path).weights_file()


def test_weights_above_the_limit_are_refused(path: Path) -> None:
    size = (path / WEIGHTS_FILE).stat().st_size
    assert AdapterFolder(path).weights_file(size) == path / WEIGHTS_FILE
    with pytest.raises(
        AdapterRefusedError, match=rf"has {size} bytes.*{size - 1} .*max_cpu_lora_gb"
    ):
        AdapterFolder(path).weights_file(size - 1)


def test_a_header_of_unbounded_size_is_refused(path: Path) -> None:
    (path / WEIGHTS_FILE).write_bytes((5 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterRefusedError, match=r"damaged: its header would have 5242880 bytes"):
        AdapterFolder(path).weights_file()


def test_other_files_are_neither_read_nor_counted(path: Path) -> None:
    for i in range(3000):
        (path / f"checkpoint-{i}.pt").touch()
    assert AdapterFolder(path).weights_file() == path / WEIGHTS_FILE
    (path / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterRefusedError, match="only checkpoint") as refusal:
        AdapterFolder(path).weights_file()
    assert len(str(refusal.value)) < 600


def test_safetensors_are_preferred_to_pickles(path: Path) -> None:
    (path / "adapter_model.bin").write_bytes(b"pickle")
    assert AdapterFolder(path).weights_file() == path / WEIGHTS_FILE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"r": 4', "is not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"r": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b"[1]", "holds list, not an object"),
        (b"null", "holds NoneType, not an object"),
    ],
)
def test_a_configuration_that_is_none_is_refused(path: Path, content: bytes, message: str) -> None:
    (path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterRefusedError, match=rf"{CONFIG_FILE} {message}"):
        AdapterFolder(path).config()


@pytest.mark.parametrize(
    ("name", "most"),
    [(CONFIG_FILE, 1), ("tokenizer_config.json", 8), ("added_tokens.json", 8)],
)
def test_huge_json_is_refused(path: Path, name: str, most: int) -> None:
    (path / name).write_text(json.dumps({"x": "y" * (most << 20)}))
    folder = AdapterFolder(path)
    read = folder.config if name == CONFIG_FILE else folder.added_tokens
    with pytest.raises(AdapterRefusedError, match=rf"{name} is larger than {most} MiB"):
        read()


@pytest.mark.parametrize("count", [3, 5_000])
def test_the_vocabulary_of_a_tokenizer_is_not_looked_at(path: Path, count: int) -> None:
    """Not even decoded: what follows the list of added tokens is no UTF-8."""
    tokens = [{"id": 128_000 + i, "content": f"<|reserved é {i}|>"} for i in range(count)]
    text = json.dumps({"version": "1.0", "added_tokens": tokens}, ensure_ascii=False, indent=2)
    (path / "tokenizer.json").write_bytes(
        text.encode()[:-1] + b', "model": "' + b"\xff" * (9 << 20)
    )
    assert max(AdapterFolder(path).added_tokens()) + 1 == 128_000 + count


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_folder_is_refused(path: Path, name: str) -> None:
    outside = path.parent / "secret"
    (path / name).rename(outside)
    for target in (outside, "../secret", "nowhere/../../secret"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
        with pytest.raises(AdapterRefusedError, match=rf"{name} is a symbolic link out of the ad"):
            read(path)


def read(path: Path) -> None:
    AdapterFolder(path).config()
    AdapterFolder(path).weights_file()


def test_links_inside_the_folder_are_followed(path: Path) -> None:
    (path / WEIGHTS_FILE).rename(path / "weights-v2")
    (path / WEIGHTS_FILE).symlink_to("weights-v2")
    assert AdapterFolder(path).weights_file() == path / "weights-v2"


def test_a_link_to_the_folder_itself_is_followed(path: Path) -> None:
    link = path.parent / "latest"
    link.symlink_to(path)
    read(link)


@pytest.mark.parametrize("subfolder", ["", "sql/v2"])
def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path, subfolder: str) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc" / subfolder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (blobs / f"hash-{name}").write_text("{}")
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"hash-{name}", snapshot))
    read(snapshot)
    # A blob that leads on out of the cache does not.
    (tmp_path / "secret").write_text("{}")
    (blobs / f"hash-{CONFIG_FILE}").unlink()
    (blobs / f"hash-{CONFIG_FILE}").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterRefusedError, match="symbolic link out of"):
        read(snapshot)


@pytest.mark.parametrize("kind", ["folder", "pipe", "ring", "dangling"])
def test_what_is_no_file_is_refused(path: Path, kind: str) -> None:
    file = path / CONFIG_FILE
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":  # which would block a reader for ever
            os.mkfifo(file)
        case "ring":
            file.symlink_to(CONFIG_FILE)
        case "dangling":
            file.symlink_to("nowhere")
    with pytest.raises(AdapterRefusedError, match=f"{CONFIG_FILE} is not a regular file"):
        AdapterFolder(path).config()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<a>": 128, "<b>": 129}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"129": {"content": "<b>"}, "3": {}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 129}, {"id": 2}], "model": {"vocab": {}}}),
    ],
)
def test_added_tokens_are_counted_by_their_largest_id(
    path: Path, name: str, content: object
) -> None:
    (path / name).write_text(json.dumps(content, indent=2))
    assert max(AdapterFolder(path).added_tokens()) == 129


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "{}"),
        ("tokenizer_config.json", '{"model_max_length": 5}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": {"a": 0}}}'),
        ("tokenizer.json", '{"model": {}}'),
    ],
)
def test_a_tokenizer_may_add_no_tokens(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)
    assert AdapterFolder(path).added_tokens() == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "{"),
        ("added_tokens.json", "[1]"),
        ("added_tokens.json", '{"<a>": "x"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("tokenizer_config.json", "3"),
        ("tokenizer.json", '{"added_tokens": [{"content": "<a>"}]}'),
        ("tokenizer.json", '{"added_tokens": [3]}'),
        ("tokenizer.json", '{"added_tokens": 3}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 1}'),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)
    with pytest.raises(AdapterRefusedError, match=r"tokenizer|added_tokens"):
        AdapterFolder(path).added_tokens()


@pytest.fixture
def denied() -> Iterator[Path]:
    """An adapter's folder, none of whose files was given away; nothing is denied to root."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "adapter"
        path.mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE, "tokenizer_config.json"):
            (path / name).write_text("{}")
        Path(root).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield path
        os.seteuid(user)
        path.chmod(0o755)


@contextlib.contextmanager
def as_owner() -> Iterator[None]:
    user = os.geteuid()
    os.seteuid(os.getuid())
    yield
    os.seteuid(user)


def deny(path: Path, mode: int = 0) -> None:
    with as_owner():
        path.chmod(mode)


@pytest.mark.parametrize("mode", [0, 0o111, 0o444])
def test_a_folder_that_may_not_be_read_is_refused_with_the_remedy(denied: Path, mode: int) -> None:
    if mode == 0o111:
        with as_owner():
            (denied / WEIGHTS_FILE).unlink()
    deny(denied, mode)
    with pytest.raises(AdapterRefusedError, match=rf"denied: '{denied}.*must be able to list"):
        AdapterFolder(denied).weights_file()


def test_a_folder_in_one_that_may_not_be_read_is_refused(denied: Path) -> None:
    inner = denied / "inner"
    deny(denied)
    assert fingerprint(str(inner)) == ()
    with pytest.raises(
        AdapterRefusedError, match=rf"lora_path '{inner}' cannot be .* must be able"
    ):
        resolve(str(inner))


def test_files_that_may_not_be_read_are_refused_by_name(denied: Path) -> None:
    folder = AdapterFolder(denied)
    for name, read in (
        (CONFIG_FILE, folder.config),
        (WEIGHTS_FILE, folder.weights_file),
        ("tokenizer_config.json", folder.added_tokens),
    ):
        deny(denied / name)
        with pytest.raises(AdapterRefusedError, match=f"^{name} cannot be read: .* must be able"):
            read()


def test_who_looks_for_adapters_finds_what_may_not_be_read(denied: Path) -> None:
    deny(denied)
    found = asyncio.run(DirectoryResolver(denied.parent).resolve_lora("base", "adapter"))
    assert found is not None
    with pytest.raises(AdapterRefusedError, match="must be able to list"):
        AdapterFolder(Path(found.lora_path))


def test_who_looks_for_adapters_goes_round_in_no_ring(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert asyncio.run(DirectoryResolver(tmp_path).resolve_lora("base", "ring")) is None
