"""One Llama-family base model, many LoRA adapters at once, one compiled decode step."""

from jaxlora.async_llm import AsyncLLM
from jaxlora.config import AsyncEngineArgs, EngineArgs
from jaxlora.engine.engine import LLMEngine
from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
    ConfigError,
    EngineDeadError,
    GenerationError,
    JaxloraError,
    ModelLoadError,
    RequestError,
)
from jaxlora.llm import LLM
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
