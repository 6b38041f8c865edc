"""Adapters on a hub: huggingface_hub itself, against a hub of a few lines on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest

from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.adapters import sources
from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.sources import fingerprint, resolve
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError
from jaxlora.server.resolvers import is_allowed_repo, is_repo
from tests.jaxlora.awaited import awaited
from tests.jaxlora.patience import SECONDS
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.test_app import app

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub:
    """One repository, "owner/name", whose branches have files; it notes what is fetched."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = {COMMITS[branch]: content for branch, content in files.items()}
        self.fetched: list[str] = []
        self.lost: set[str] = set()
        """Files that are listed, and cannot be fetched."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET; a HEAD has no body."""
        parts = urlsplit(path).path.strip("/").split("/")
        commit = COMMITS.get(parts[-1], parts[-1])
        if parts[:5] == ["api", "models", "owner", "name", "revision"] and commit in self.files:
            siblings = [{"rfilename": n, "size": len(d)} for n, d in self.files[commit].items()]
            info = {"id": "owner/name", "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        if parts[:5] == ["api", "models", "owner", "name", "tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in self.files[commit].items()
            ]
            return 200, {}, json.dumps(tree).encode()
        commit = COMMITS.get(parts[3], parts[3]) if len(parts) > 4 else ""
        if parts[:3] == ["owner", "name", "resolve"] and commit in self.files:
            if parts[4] in self.lost:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            data = self.files[commit]["/".join(parts[4:])]
            return 200, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    many = {f"checkpoint-{i}/optimizer.pt": b"x" for i in range(2000)}
    hub = Hub(
        {
            "main": {CONFIG: b"{}", WEIGHTS: b"w" * 100, "adapter_model.bin": b"p" * 10, **many},
            "v2": {CONFIG: b'{"r": 2}', WEIGHTS: b"v" * 50, "tokenizer_config.json": b"{}"},
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            if "resolve" in self.path and self.command == "GET":
                hub.fetched.append(self.path.rpartition("/")[2])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):  # who asked may have gone
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            """Nothing is said."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub
        server.shutdown()
        thread.join()


def test_only_the_adapters_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert sorted(hub.fetched) == [CONFIG, WEIGHTS]
    assert AdapterFolder(folder).config() == {}
    # Once.
    assert resolve("owner/name", download_dir=str(tmp_path)) == folder
    assert len(hub.fetched) == 2


def test_a_revision_follows_the_id(hub: Hub, tmp_path: Path) -> None:
    for revision in ("v2", COMMITS["v2"]):
        folder = resolve(f"owner/name@{revision}", download_dir=str(tmp_path))
        assert AdapterFolder(folder).config() == {"r": 2}
        assert folder.name == COMMITS["v2"]
    assert "tokenizer_config.json" in hub.fetched
    with pytest.raises(AdapterNotFoundError, match=r"'owner/name@v3'.*the hub said"):
        resolve("owner/name@v3", download_dir=str(tmp_path))
    with pytest.raises(AdapterNotFoundError, match="'owner/other'"):
        resolve("owner/other", download_dir=str(tmp_path))


def test_weights_that_are_too_large_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefusedError, match=r"has 100 bytes.* 99 .*raise max_cpu_lora_gb"):
        resolve("owner/name", download_dir=str(tmp_path), max_bytes=99)
    assert hub.fetched == []


@awaited
async def test_weights_that_are_too_large_are_not_fetched_over_http_either(
    hub: Hub, tmp_path: Path
) -> None:
    def load(request: LoRARequest) -> Adapter:
        resolve(request.lora_path, download_dir=str(tmp_path), max_bytes=99)
        raise AssertionError

    args = EngineArgs(model="base", enable_lora=True, download_dir=str(tmp_path))
    async with app(load=load, engine_args=args) as each:
        reply = await each.load("x", "owner/name")
        assert reply.status_code == 500
        assert "100 bytes, more than the 99" in reply.json()["error"]["message"]
    assert hub.fetched == [CONFIG]


def test_what_was_registered_is_read_again_wherever_its_name_leads_by_now(
    llm: LLM, reference: Reference, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path / "cache")
    paths = [Path(reference.paths[name]) for name in ("r8-qv", "r4-kou", "r16-all")]
    for commit, path in ((COMMITS["main"], paths[0]), ("c" * 40, paths[1])):
        hub.files[commit] = {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    monkeypatch.chdir(paths[2].parent)
    link = tmp_path / "current"
    link.symlink_to(paths[1])
    requests = [
        LoRARequest("hub", None, "owner/name"),
        LoRARequest("here", None, paths[2].name),
        LoRARequest("link", None, str(link)),
    ]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def ask() -> list[list[int]]:
        outputs = llm.generate([[1, 2]] * 3, params, lora_request=requests, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * 3
        return [output.outputs[0].token_ids for output in outputs]

    first = ask()
    for tokens, path in zip(first, (paths[0], paths[2], paths[1]), strict=True):
        reference.check_greedy([1, 2], tokens, path.name)
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    monkeypatch.chdir(tmp_path)
    link.unlink()
    link.symlink_to(paths[0])
    registry = llm.llm_engine.adapters
    registry.slots.vacate_idle()
    for entry in registry.names.entries():
        registry.host.drop(entry)
    assert ask() == first
    # Until somebody says that there is something new.
    assert llm.add_lora(requests[2])
    assert ask() == [first[0], first[1], first[0]]
    llm.add_lora(LoRARequest("new", None, "owner/name"))
    llm.add_lora(LoRARequest("old", None, "owner/name@" + "a" * 40))
    new, old, hub_entry = (registry.names.find(name) for name in ("new", "old", "hub"))
    assert new.version != old.version == hub_entry.version


def test_without_a_hub_what_was_fetched_is_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("owner/name@v2", download_dir=str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name@v2", download_dir=str(tmp_path), max_bytes=100) == folder
    with pytest.raises(AdapterNotFoundError):
        resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)


def test_without_a_hub_a_branch_leads_to_what_was_fetched_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of newer commits."""
    whole = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    monkeypatch.setitem(COMMITS, "main", COMMITS["v2"])
    small = resolve("owner/name", download_dir=str(tmp_path), with_weights=False)
    assert sorted(p.name for p in small.iterdir()) == [CONFIG, "tokenizer_config.json"]
    with pytest.raises(AdapterRefusedError, match="50 bytes, more than the 49"):
        resolve("owner/name", download_dir=str(tmp_path), max_bytes=49)
    hub.lost.add(WEIGHTS)
    with pytest.raises(AdapterNotFoundError, match="the hub said"):
        resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    hub.lost.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name", download_dir=str(tmp_path), max_bytes=100) == whole
    assert (whole / WEIGHTS).read_bytes() == b"w" * 100
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    newer = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name", download_dir=str(tmp_path)) == newer == small


def test_a_hub_that_answers_with_something_else_is_told_of(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one has to log in to a network first."""
    whole = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    monkeypatch.setattr(hub, "answer", lambda path: (200, {}, b"<html>Log in</html>"))
    assert resolve("owner/name", download_dir=str(tmp_path), max_bytes=100) == whole
    with pytest.raises(AdapterNotFoundError, match=r"'owner/name@v2'.*hub said: JSONDecodeErr"):
        resolve("owner/name@v2", download_dir=str(tmp_path), max_bytes=100)


def test_a_hub_that_never_answers_keeps_no_thread(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.1)
    is_over = threading.Event()

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        is_over.wait(SECONDS)
        return 404, {}, b""

    monkeypatch.setattr(hub, "answer", answer)
    try:
        assert resolve("owner/name", download_dir=str(tmp_path), max_bytes=100) == whole
        with pytest.raises(AdapterNotFoundError, match=r"'owner/name@v2'.*hub said: ReadTimeout"):
            resolve("owner/name@v2", download_dir=str(tmp_path), max_bytes=100)
    finally:
        is_over.set()


def test_a_repository_is_not_listed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For that the hub's client would wait for ever, and has no limit to set."""
    answered, listed = hub.answer, []

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        if "/tree/" in path:
            listed.append(path)
        return answered(path)

    monkeypatch.setattr(hub, "answer", answer)
    folder = resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    assert (folder / WEIGHTS).read_bytes() == b"w" * 100
    assert listed == []


def test_a_repository_without_an_adapter_is_told_of(hub: Hub, tmp_path: Path) -> None:
    del hub.files[COMMITS["main"]][CONFIG]
    with pytest.raises(AdapterNotFoundError, match=f"'owner/name': it has no {CONFIG}"):
        resolve("owner/name", download_dir=str(tmp_path), max_bytes=100)
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        ("owner/name@v2", True),
        ("owner/name@../x", False),
        ("owner/../x", False),
        ("/owner/name", False),
        ("name", False),
    ],
)
def test_what_may_be_a_repository(name: str, is_one: bool) -> None:
    assert is_repo(name) is is_one


def test_a_revision_is_allowed_with_its_repository() -> None:
    assert is_allowed_repo("owner/name@v2", ["owner/name"])
    assert not is_allowed_repo("other/name@owner", ["*owner"])


def test_a_file_whose_time_was_set_back_is_another_one(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path)) == ()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes(b"old")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    times = (tmp_path / WEIGHTS).stat()
    time.sleep(0.02)  # more than a tick of the clock that files are stamped with
    (tmp_path / WEIGHTS).write_bytes(b"new")
    os.utime(tmp_path / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == times.st_mtime_ns
    assert fingerprint(str(tmp_path)) != before
