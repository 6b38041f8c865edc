"""One Llama-family base model, many LoRA adapters at once, one compiled decode step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxlora.config import AsyncEngineArgs, EngineArgs
from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
    ConfigError,
    ConstraintError,
    EngineDeadError,
    GenerationError,
    JaxloraError,
    ModelLoadError,
    RequestError,
)
from jaxlora.structured_outputs import StructuredOutputsParams
from jaxlora.types import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    LoRARequest,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

if TYPE_CHECKING:
    from jaxlora.async_llm import AsyncLLM
    from jaxlora.engine.engine import LLMEngine
    from jaxlora.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterCapacityError",
    "AdapterError",
    "AdapterNotFoundError",
    "AdapterRefusedError",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ConfigError",
    "ConstraintError",
    "EngineArgs",
    "EngineDeadError",
    "GenerationError",
    "JaxloraError",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "ModelLoadError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

# These import JAX and transformers, which takes seconds that the command line's help does not need.
_IMPORTED_WHEN_USED = {
    "AsyncLLM": "jaxlora.async_llm",
    "LLM": "jaxlora.llm",
    "LLMEngine": "jaxlora.engine.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_IMPORTED_WHEN_USED[name]), name)
    globals()[name] = value
    return value
