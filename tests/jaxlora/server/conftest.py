"""One server process on the tiny model, shared by the files here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.jaxlora.limits import LIMITS
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import SECONDS, Server, serving


@pytest.fixture(scope="session")
def server(
    tiny_model: Path,
    program_cache: Path,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    generation = tmp_path_factory.mktemp("generation")
    (generation / "generation_config.json").write_text('{"max_new_tokens": 250}')
    flags = [
        *("--served-model-name", "base", "alias", "--max-request-bytes", "1000000"),
        *("--max-completion-tokens", "253", "--max-cpu-loras", "2"),
        *("--generation-config", str(generation)),
        *("--lora-modules", f"sql={reference.paths['r8-qv']}"),
        f'{{"name":"json","path":"{reference.paths["r16-all"]}","base_model_name":"other"}}',
    ]
    updating = {"JAXLORA_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(tiny_model, log, program_cache, *LIMITS, *flags, **updating) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client; whatever adapters a test loaded are unloaded after it."""
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        yield client
        for card in client.get("/v1/models").json()["data"]:
            if card["parent"] is not None and card["id"] not in ("sql", "json"):
                reply = client.post("/v1/unload_lora_adapter", json={"lora_name": card["id"]})
                assert reply.status_code == 200


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as each:
        yield each
