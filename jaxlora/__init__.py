"""One Llama-family base model, many LoRA adapters at once, one compiled decode step."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jaxlora.async_llm import AsyncLLM, AsyncLLMEngine
    from jaxlora.engine.engine import LLMEngine
    from jaxlora.engine_args import AsyncEngineArgs, EngineArgs
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
    from jaxlora.llm import LLM
    from jaxlora.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        Logprob,
        LoRAStatus,
        RequestMetrics,
        RequestOutput,
    )
    from jaxlora.structured_outputs import StructuredOutputsParams
    from jaxlora.types import (
        BeamSearchParams,
        LoRARequest,
        RequestOutputKind,
        SamplingParams,
        TextPrompt,
        TokensPrompt,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterCapacityError",
    "AdapterError",
    "AdapterNotFoundError",
    "AdapterRefusedError",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
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
    "LoRAStatus",
    "Logprob",
    "ModelLoadError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

# Each is imported when it is first used: what needs JAX and transformers takes seconds that the
# command line's help does not need, and the rest a time in which Ctrl-C is a traceback.
_MODULES = {
    "async_llm": ("AsyncLLM", "AsyncLLMEngine"),
    "engine.engine": ("LLMEngine",),
    "engine_args": ("AsyncEngineArgs", "EngineArgs"),
    "llm": ("LLM",),
    "outputs": (
        "BeamSearchOutput",
        "BeamSearchSequence",
        "CompletionOutput",
        "Logprob",
        "LoRAStatus",
        "RequestMetrics",
        "RequestOutput",
    ),
    "structured_outputs": ("StructuredOutputsParams",),
    "types": (
        "BeamSearchParams",
        "LoRARequest",
        "RequestOutputKind",
        "SamplingParams",
        "TextPrompt",
        "TokensPrompt",
    ),
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((each for each, names in _MODULES.items() if name in names), "errors")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except AttributeError as error:
        # Of a dependency whose version does not fit. Python would say that the name is not here.
        raise ImportError(f"{__name__}.{module} cannot be imported: {error}") from error
    globals()[name] = value
    return value
