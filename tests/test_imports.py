"""What importing may do, and what each package may import or read.

The layers inside jaxlora are import-linter's to check (``make lint``); here is what only a running
interpreter or a look at the syntax can tell.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxlora

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels_pallas").rglob("*.py"))
ENGINE = sorted((ROOT / "jaxlora").rglob("*.py"))

PUBLIC = {
    "AsyncEngineArgs",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "EngineDeadError",
    "LLM",
    "LLMEngine",
    "LoRARequest",
    "RequestOutput",
    "SamplingParams",
}
FOREIGN = ("torch", "fastapi", "starlette", "uvicorn")


def run_python(code: str, **env: str) -> str:
    """Runs code in a fresh interpreter, without pytest's import hooks; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def environment_reads(tree: ast.AST) -> Iterator[int]:
    readers = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr in readers:
                yield node.lineno
            case ast.ImportFrom(module="os", names=aliases) if readers & {a.name for a in aliases}:
                yield node.lineno


def test_importing_touches_no_device() -> None:
    # With a platform that does not exist, whatever starts a backend raises.
    output = run_python(
        """
import jax
from jaxlora import *
try:
    jax.devices()
except RuntimeError:
    print("no device was touched")
""",
        JAX_PLATFORMS="nonexistent",
    )
    assert output.strip() == "no device was touched"


def test_importing_needs_neither_torch_nor_a_web_framework() -> None:
    output = run_python(
        f"from jaxlora import *; import sys; print([m for m in {FOREIGN} if m in sys.modules])"
    )
    assert output.strip() == "[]"


def test_the_command_line_waits_for_nothing_it_may_not_need() -> None:
    heavy = ("jax", "numpy", "transformers", "asyncio")
    code = "import jaxlora.cli{}, sys; print([m for m in {} if m in sys.modules])"
    assert run_python(code.format(".command_line", heavy)).strip() == "[]"
    # Nor what takes a time in which Ctrl-C would end it with a traceback.
    assert run_python(code.format("", (*heavy, "typing", "argparse", "tqdm"))).strip() == "[]"


def test_a_dependency_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise AttributeError("module 'jax.new' has no attribute 'thing'")

    monkeypatch.delitem(vars(jaxlora), "LLM", raising=False)
    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(ImportError, match=r"jaxlora\.llm cannot be imported: .*'thing'"):
        from jaxlora import LLM  # noqa: F401


def test_public_names() -> None:
    assert not PUBLIC - set(jaxlora.__all__)
    assert isinstance(jaxlora.__version__, str)


@pytest.mark.parametrize("name", [name for name in jaxlora.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    doc = getattr(jaxlora, name).__doc__
    assert doc, f"jaxlora.{name} has no docstring"
    # A dataclass without one gets its signature.
    assert not doc.startswith(f"{name}("), f"jaxlora.{name} has no docstring of its own"


@pytest.mark.parametrize("path", KERNELS, ids=names)
def test_kernels_import_only_jax_numpy_and_themselves(path: Path) -> None:
    allowed = {"jax", "jaxtyping", "numpy", "kernels_pallas"} | sys.stdlib_module_names
    assert set(imported_packages(ast.parse(path.read_text()))) <= allowed


@pytest.mark.parametrize("path", KERNELS + ENGINE, ids=names)
def test_only_the_cli_reads_the_environment(path: Path) -> None:
    """And what tells programs apart, which XLA's flags do, or must not overrule a variable of
    JAX's."""
    reads = list(environment_reads(ast.parse(path.read_text())))
    may = path.parent == ROOT / "jaxlora" / "cli" or path.name in {"fingerprint.py", "client.py"}
    assert not reads or may, f"{names(path)}, lines {reads}"


def test_environment_reads_are_found() -> None:
    code = "import os\nos.environ['A']\nfrom os import getenv\nos.getenv('A')\nos.path\n"
    assert sorted(environment_reads(ast.parse(code))) == [2, 3, 4]
