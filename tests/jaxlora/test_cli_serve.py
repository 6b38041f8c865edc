"""Flags and environment as options."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlora.cli import main
from jaxlora.cli.arguments import UsageError
from jaxlora.cli.command_line import parser
from jaxlora.cli.serve import serve_options
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError
from jaxlora.server.options import ServerOptions
from jaxlora.types import LoRARequest


class Resolver:
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return None


RESOLVER = Resolver()
RESOLVING = ("--enable-lora", "--lora-resolver")


def options(*flags: str, **environ: str) -> ServerOptions:
    return serve_options(parser().parse_args(["serve", "model", *flags]), environ)


def test_defaults_are_those_of_the_engine_and_the_server() -> None:
    assert options() == ServerOptions(engine_args=EngineArgs(model="model"))


def test_every_flag_is_an_option(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    flags = f"""--host 127.0.0.1 --port 9 --served-model-name a b --dtype bfloat16
        --max-model-len 64 --max-num-seqs 2 --max-num-batched-tokens 32
        --gpu-memory-utilization 0.5 -tp 1 --seed 3 --tokenizer t --load-format gguf
        --hf-overrides {{"x":1}}
        --api-key k --api-key l n --admin-api-key m --root-path /r --uvicorn-log-level debug
        --enable-lora --max-loras 3 --max-lora-rank 32 --lora-dtype float32
        --lora-target-modules q_proj v_proj --lora-extras dora
        --allowed-origins ["http://x"] --ssl-keyfile key
        --ssl-certfile cert --allowed-lora-path /p --allowed-lora-repo o/* --lora-resolver-dir /d
        --lora-resolver-repo o/x --lora-resolver {__name__}:RESOLVER
        --strict-client-errors --max-request-bytes 5 --max-prompts 6
        --max-logprobs 4 --stream-interval 7 --return-tokens-as-token-ids
        --generation-config vllm
        --max-queued-requests 7 --max-completion-tokens 9
        --shutdown-timeout 8 --revision v --download-dir dd
        --no-enable-prefix-caching --block-size 32 --num-gpu-blocks-override 9
        --compilation-cache-dir c""".split()
    modules = [
        "--lora-modules",
        "x=/x=1",
        "--lora-modules",
        '{"name": "y", "path": "/y", "base_model_name": "b"}',
    ]
    assert options(*flags, *modules, "--chat-template", str(template)) == ServerOptions(
        engine_args=EngineArgs(
            model="model",
            dtype="bfloat16",
            max_model_len=64,
            max_num_seqs=2,
            max_num_batched_tokens=32,
            gpu_memory_utilization=0.5,
            seed=3,
            tokenizer="t",
            load_format="gguf",
            hf_overrides={"x": 1},
            enable_lora=True,
            max_loras=3,
            max_lora_rank=32,
            lora_dtype="float32",
            lora_target_modules=["q_proj", "v_proj"],
            lora_extras=["dora"],
            revision="v",
            generation_config="vllm",
            enable_prefix_caching=False,
            download_dir="dd",
            block_size=32,
            num_gpu_blocks_override=9,
            max_logprobs=4,
            stream_interval=7,
            compilation_cache_dir="c",
        ),
        host="127.0.0.1",
        port=9,
        served_model_names=("a", "b"),
        lora_modules=(
            LoRARequest("x", None, "/x=1"),
            LoRARequest("y", None, "/y", base_model_name="b"),
        ),
        chat_template="{{ messages }}",
        api_keys=("k", "l", "n"),
        admin_api_key="m",
        allowed_lora_paths=(Path("/p"),),
        allowed_lora_repos=("o/*",),
        lora_resolver_dir=Path("/d"),
        lora_resolver_repos=("o/x",),
        lora_resolvers=(RESOLVER,),
        strict_client_errors=True,
        return_tokens_as_token_ids=True,
        max_request_bytes=5,
        max_prompts=6,
        max_queued_requests=7,
        max_completion_tokens=9,
        allowed_origins=("http://x",),
        root_path="/r",
        ssl_keyfile="key",
        ssl_certfile="cert",
        uvicorn_log_level="debug",
        shutdown_timeout=8,
    )


def test_the_environment() -> None:
    assert options(JAXLORA_API_KEY="k").api_keys == ("k",)
    assert options("--api-key", "l", JAXLORA_API_KEY="k").api_keys == ("l",)
    assert options(VLLM_API_KEY="k").api_keys == ("k",)
    assert options(JAXLORA_API_KEY="l", VLLM_API_KEY="k").api_keys == ("l",)
    folder = {"VLLM_LORA_RESOLVER_CACHE_DIR": "/d"}
    assert options("--enable-lora", **folder).lora_resolver_dir == Path("/d")
    assert options(**folder).lora_resolver_dir is None
    for name in ("JAXLORA_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        for value, allowed in (("1", True), ("true", True), ("True", True), ("0", False)):
            given: Any = {name: value}
            assert options("--enable-lora", **given).allow_runtime_lora_updating is allowed
            assert options(**given).allow_runtime_lora_updating is False


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--enable-lora", "--lora-modules", "x"], UsageError, "NAME=PATH"),
        (["--enable-lora", "--lora-modules", '{"name": "x"}'], UsageError, "'path'"),
        (["--enable-lora", "--lora-modules", "{"], UsageError, "cannot be read"),
        (["--lora-modules", "x=y"], UsageError, "needs --enable-lora"),
        (["--tool-call-parser", "hermes"], UsageError, "--tool-call-parser is not served"),
        (["--enable-auto-tool-choice"], UsageError, "--enable-auto-tool-choice is not served"),
        (["--reasoning-parser", "x"], UsageError, "--reasoning-parser is not served"),
        (["--quantization", "awq"], UsageError, "unquantized checkpoint"),
        (["--data-parallel-size", "2"], UsageError, "--data-parallel-size 2 is not served, only 1"),
        (["--kv-cache-dtype", "fp8"], UsageError, "--kv-cache-dtype fp8 is not served, only auto"),
        (["--allowed-origins", "*"], UsageError, "not JSON"),
        (["--allowed-origins", "[1]"], UsageError, "list of strings"),
        ([*RESOLVING, "nowhere:x"], UsageError, "No module named 'nowhere'"),
        ([*RESOLVING, "json:x"], UsageError, "no attribute 'x'"),
        ([*RESOLVING, "json:loads"], UsageError, "no method resolve_lora"),
        (["--lora-resolver-dir", "/"], UsageError, "--lora-resolver-dir needs --enable-lora"),
        (["--lora-resolver-repo", "a/*"], UsageError, "--lora-resolver-repo needs --enable-lora"),
        (["--chat-template", "/nowhere"], UsageError, "--chat-template '/nowhere' cannot be read"),
        (["--chat-template", sys.executable], UsageError, "cannot be read: 'utf-8' codec"),
        (["--served-model-name", "b\udce4se"], ConfigError, "b.udce4se' is no text"),
        (["--dtype", "int8"], ConfigError, "dtype='int8'"),
        (["--api-key", "k", ""], ConfigError, "--api-key must not be empty"),
        (["--admin-api-key", ""], ConfigError, "--admin-api-key must not be empty"),
        (["--api-key", "k "], ConfigError, "nor begin or end with a space"),
        (
            ["--enable-lora", "--lora-modules", '{"name": "x"}'],
            UsageError,
            "has no 'path'",
        ),
    ],
)
def test_flags_that_cannot_be_honoured(
    flags: list[str], error: type[Exception], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=message):
        options(*flags)
    assert main(["serve", "model", *flags]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_what_an_adapter_is_trained_on_is_text(without_types: None) -> None:
    module = '{"name": "x", "path": "y", "base_model_name": 3}'
    with pytest.raises(UsageError, match="base_model_name=3 must be a string"):
        options("--enable-lora", "--lora-modules", module)


def test_what_the_server_needs_besides_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxlora.server.run", raising=False)
    assert main(["serve", "model"]) == 1
    assert "the server needs more: pip install 'jaxlora[serve]' (" in capsys.readouterr().err


def test_a_resolver_s_class_is_enough() -> None:
    (made,) = options(*RESOLVING, f"{__name__}:Resolver").lora_resolvers
    assert isinstance(made, Resolver)


def test_flags_without_an_effect_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        options("--enforce-eager", "--disable-log-requests", "--trust-remote-code")
    assert len(caplog.messages) == 3
    assert "--trust-remote-code has no effect: nothing remote is ever run" in caplog.messages
    with caplog.at_level(logging.WARNING):
        options("--compilation-config", "3", "--kv-cache-dtype", "auto", "--swap-space", "4")
    assert "--compilation-config has no effect: everything is compiled" in caplog.messages
    assert len(caplog.messages) == 5


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500)]
)
def test_lengths_may_have_a_unit_and_flags_underscores(
    text: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options("--max-model-len", text).engine_args.max_model_len == number
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("jaxlora.cli.serve._run", lambda args: seen.append(args) or 0)
    assert main(["serve", "a_b", "--max_num_batched_tokens", text, "--served_model_name=c_d"]) == 0
    (args,) = seen
    assert (args.model, args.max_num_batched_tokens, args.served_model_name) == (
        "a_b",
        number,
        ["c_d"],
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 65536", "--port=65536 must be in"),
        ("--max-request-bytes 0", "--max-request-bytes=0 must be at least 1"),
        ("--max-prompts 0", "--max-prompts=0"),
        ("--max-queued-requests 0", "--max-queued-requests=0"),
        ("--max-completion-tokens 0", "--max-completion-tokens=0"),
        ("--shutdown-timeout nan", "--shutdown-timeout=nan"),
        ("--uvicorn-log-level loud", "must be one of trace, debug"),
        ("--ssl-keyfile x", "--ssl-keyfile=x needs --ssl-certfile"),
        ("--enable-lora --lora-modules x=/a x=/b", "two adapters of the name 'x'"),
        ("--enable-lora --lora-modules a,b=/a", "no comma"),
        ("--enable-lora --lora-modules model=/a", "'model' conflicts with a served base model"),
        (
            "--served-model-name b --enable-lora --lora-modules b=/a",
            "'b' conflicts with a served base model",
        ),
    ],
)
def test_flags_that_make_no_sense_are_told_with_their_value(flags: str, message: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=re.escape(message)):
        options(*flags.split())


def test_a_certificate_may_hold_its_key() -> None:
    assert options("--ssl-certfile", "both.pem").ssl_keyfile is None


def test_every_flag_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    flags = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("options:")[2])[1:]
    assert len(flags) > 50
    # Beside the flag and its value, or on the line below.
    assert [flag for flag in flags if not re.search(r"\S  +\S|\n {20,}\S", flag)] == []
