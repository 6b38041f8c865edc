"""What requests look like on the wire: OpenAI's fields and vLLM's further ones.

Unknown fields are ignored. A known field that is not served is refused by name, unless its value is
the one that changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jaxlora.server.errors import ApiError
from jaxlora.structured_outputs import StructuredOutputsParams, of_response_format
from jaxlora.types import (
    MAX_BEAM_WIDTH,
    MAX_SALT_CHARACTERS,
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
)

_GIVEN = """temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed
    stop stop_token_ids allowed_token_ids bad_words logit_bias prompt_logprobs""".split()
"""Fields that the engine has under the same name; without a value its own default counts."""
_ALWAYS = """n min_tokens ignore_eos include_stop_str_in_output skip_special_tokens
    spaces_between_special_tokens""".split()
_NOT_OF_BEAMS = """presence_penalty frequency_penalty repetition_penalty stop stop_token_ids
    allowed_token_ids bad_words logit_bias prompt_logprobs min_tokens response_format
    structured_outputs""".split()
_GUIDED = "guided_json guided_regex guided_choice guided_grammar structural_tag".split()
_UNSERVED = {
    **dict.fromkeys(_GUIDED, ": use structured_outputs"),
    "functions": ": use tools",
    "prompt_embeds": ": give the prompt as text or token ids",
    "logits_processors": "",
    "logprob_token_ids": "",
    "thinking_token_budget": "",
    "repetition_detection": "",
    "watermarking": "",
}
"""Fields that OpenAI or vLLM have or had, and what to use instead."""
_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""What they may hold without asking for anything."""


def _must_be(what: str) -> WrapValidator:
    """One message for all that a value has not, whichever form it was meant to have."""

    def check(given: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(given)
        except ValidationError:
            raise PydanticCustomError("form", "must be {what}", {"what": what}) from None

    return WrapValidator(check)


_MOST_TEXTS = 1 << 16
_MOST_IDS = 1 << 18
"""Far more than are served, but no more than are looked at in no time: a body has room for
millions."""

# Of a long list only the first error is told.
_FIRST = Field(fail_fast=True)
_Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], _FIRST]
_Ids = Annotated[list[_Token], Field(fail_fast=True, max_length=_MOST_IDS)]
_Biases = Annotated[dict[str, float], Field(fail_fast=True, max_length=_MOST_IDS)]
_Strings = Annotated[list[str], Field(fail_fast=True, max_length=_MOST_TEXTS)]
_Objects = Annotated[list[dict[str, Any]], _FIRST]
_Parts = Annotated[list[str | dict[str, Any]], Field(fail_fast=True, max_length=_MOST_TEXTS)]
_Prompts = Annotated[list[StrictStr], _FIRST] | _Tokens | Annotated[list[_Tokens], _FIRST]


class _Fields(BaseModel):
    """A field that is null has its default, as in OpenAI's API: many clients send them all."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name in needed}


class StreamOptions(_Fields):
    """What a stream carries beside its tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    """A JSON schema and what it is called."""

    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class Structure(BaseModel):
    """A part of a text that is JSON between two given strings."""

    begin: str
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    end: str


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for JSON, and vLLM's for JSON within a text."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Annotated[list[Structure], _FIRST] | None = None
    triggers: _Strings | None = None


_ANY_TEXT = ResponseFormat(type="text")
_PLAIN = SamplingParams()


class StructuredOutputs(_Fields):
    """vLLM's way to say what the text must be like: exactly one of the first six."""

    model_config = ConfigDict(extra="forbid")

    json_: str | dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: _Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class _Generate(_Fields):
    """Fields that completions and chat share."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, instead in _UNSERVED.items():
                # Not 0, which may ask for something.
                if given.get(name) is not False and given.get(name) not in _NOTHING:
                    raise ApiError(400, f"{name} is not supported{instead}", param=name)
        return given

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="The base model's name or an adapter's.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[
        str | _Strings | None, _must_be(f"text or a list of at most {_MOST_TEXTS} texts")
    ] = None
    stop_token_ids: _Ids | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    logit_bias: Annotated[
        _Biases | None, _must_be(f"an object of at most {_MOST_IDS} token ids and numbers")
    ] = None
    allowed_token_ids: _Ids | None = None
    bad_words: _Strings | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    request_id: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    user: str | None = None

    unsupported: ClassVar[tuple[str, ...]] = ()

    def sampling_params(
        self,
        defaults: SamplingParams,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        max_logprobs: int,
    ) -> SamplingParams | BeamSearchParams:
        """The engine's parameters, whose option ``max_logprobs`` is. Raises ApiError for what it
        does not serve, ValueError for a value out of range."""
        self._refuse()
        if self.use_beam_search:
            return self._beam_search_params(max_tokens, max_logprobs)
        given = {name: getattr(self, name) for name in _GIVEN if getattr(self, name) is not None}
        given |= {name: getattr(self, name) for name in _ALWAYS}
        return dataclasses.replace(
            defaults,
            max_tokens=max_tokens,
            logprobs=logprobs,
            structured_outputs=self._structured(),
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
            **given,
        )

    def _refuse(self) -> None:
        """Raises ApiError for what is not served whatever the engine may do."""
        if self.stream and self.prompt_logprobs is not None:
            message = "prompt_logprobs cannot be streamed"
            raise ApiError(400, message, param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            message = "stream_options can only be given when stream is true"
            raise ApiError(400, message, param="stream_options")
        for name in self.unsupported:
            if self._says(name):
                raise ApiError(400, f"{name} is not supported", param=name)

    def _says(self, name: str) -> bool:
        """Whether a field asks for anything."""
        return getattr(self, name) not in (*_NOTHING, _ANY_TEXT, getattr(_PLAIN, name, None))

    def _beam_search_params(self, max_tokens: int | None, max_logprobs: int) -> BeamSearchParams:
        for name in _NOT_OF_BEAMS:
            if self._says(name):
                raise ApiError(400, f"{name} cannot be used with use_beam_search", param=name)
        if max_tokens is None:
            raise ApiError(400, "use_beam_search needs max_tokens", param="max_tokens")
        # The engine has other names for both limits than the client.
        widest, remedy = MAX_BEAM_WIDTH, ""
        if 0 <= max_logprobs // 2 < widest:
            widest = max_logprobs // 2
            remedy = f", or start the server with more than --max-logprobs={max_logprobs}"
        if self.n > widest:
            message = f"n={self.n} must be at most {widest} with use_beam_search: ask for fewer"
            raise ApiError(400, message + remedy, param="n")
        return BeamSearchParams(
            beam_width=self.n,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
        )

    def _structured(self) -> StructuredOutputsParams | None:
        wanted, own = self.response_format, self.structured_outputs
        if wanted is None or wanted.type == "text":
            return None if own is None else StructuredOutputsParams(**own.model_dump(by_alias=True))
        if own is not None:
            message = "response_format and structured_outputs exclude each other"
            raise ApiError(400, message, param="response_format")
        return of_response_format(wanted.model_dump(by_alias=True, exclude_unset=True))


class CompletionRequest(_Generate):
    """POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "sql", "prompt": "How many users are there?", "max_tokens": 32}]
        }
    )

    max_tokens: Annotated[int, Field(ge=0, description="0 with echo only.")] | None = None
    prompt: Annotated[
        StrictStr | _Prompts,
        _must_be("text, token ids, or a list of texts or of lists of token ids"),
    ]
    echo: StrictBool = False
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    unsupported: ClassVar[tuple[str, ...]] = ("suffix", "best_of")

    def _says(self, name: str) -> bool:
        # The best of as many as are returned is all of them.
        return super()._says(name) and not (name == "best_of" and self.best_of == self.n)


class ChatMessage(BaseModel):
    """One message; its further fields reach the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Annotated[
        str | _Parts | None, _must_be(f"text or a list of at most {_MOST_TEXTS} parts")
    ] = None


class Templated(_Fields):
    """What a chat template is told besides the messages."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: _Objects | None = None
    reasoning_effort: str | None = None
    tools: _Objects | None = None

    def template_variables(self) -> dict[str, Any]:
        """The template's own variables. Raises ApiError if it is the request's own."""
        if self.chat_template is not None:
            raise ApiError(400, "chat_template is not supported", param="chat_template")
        variables: dict[str, Any] = {}
        if self.documents is not None:
            variables["documents"] = self.documents
        effort = self.reasoning_effort
        if effort is not None:
            # Templates know one or the other.
            variables |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return variables | (self.chat_template_kwargs or {})


class ChatCompletionRequest(Templated, _Generate):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "sql", "messages": [{"role": "user", "content": "Hello"}], "seed": 1}
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    echo: bool = False
    add_special_tokens: bool = False
    tool_choice: str | dict[str, Any] | None = None

    def _refuse(self) -> None:
        super()._refuse()
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs can only be given when logprobs is true"
            raise ApiError(400, message, param="top_logprobs")
        if self.tool_choice not in (None, "auto", "none"):
            message = (
                f"tool_choice={self.tool_choice!r} is not supported: tools reach the chat template "
                "and the text is returned as it is"
            )
            raise ApiError(400, message, param="tool_choice")


class TokenizeRequest(Templated):
    """POST /tokenize: a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], _FIRST] | None = None
    add_special_tokens: bool | None = Field(None, description="True for a prompt.")
    return_token_strs: bool = False


class DetokenizeRequest(_Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: _Tokens


class LoadLoRAAdapterRequest(_Fields):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "sql", "lora_path": "adapters/sql"}]}
    )

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadLoRAAdapterRequest(_Fields):
    """POST /v1/unload_lora_adapter."""

    lora_name: str | None = None
    lora_int_id: int | None = None
