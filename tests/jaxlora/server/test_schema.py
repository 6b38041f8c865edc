"""Requests made up from the OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.jaxlora.server.processes import SECONDS, Server


def test_no_generated_request_is_a_server_error(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--phases", "fuzzing", "--checks", "not_a_server_error"]
    # Loading tells of a bad adapter with 500, as its table says.
    command += ["--max-examples", "10", "--seed", "1", "--exclude-path-regex", "lora_adapter"]
    command += ["--request-timeout", str(SECONDS)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.get("/health").status_code == 200


def test_the_document_has_schemas_and_examples(server: Server) -> None:
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest", "LoadLoRAAdapterRequest"):
        assert schemas[name]["examples"]
    replies = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(replies["200"]["content"]) == {"application/json", "text/event-stream"}
    assert replies["429"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ErrorResponse"
    }
