"""Offline generation: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import numbers
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from tqdm import tqdm

from jaxlora.checks import require, wrong
from jaxlora.conversation import check_variables
from jaxlora.engine.beam_search import BeamSearch
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError
from jaxlora.interrupts import uninterrupted
from jaxlora.outputs import BeamSearchOutput, RequestOutput
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import (
    BeamSearchParams,
    LoRARequest,
    Prompt,
    RequestOutputKind,
    SamplingParams,
)

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _alone(method: Callable[Concatenate[LLM, _P], _T]) -> Callable[Concatenate[LLM, _P], _T]:
    """A method that waits for what other threads have the engine do, and raises ValueError if that
    is an AsyncLLM's."""

    @functools.wraps(method)
    def call(self: LLM, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._lock:
            self.llm_engine.check_owner()
            return method(self, *args, **kwargs)

    return call


class LLM:
    """One model, with its adapters, for offline use.

    Takes the keywords of :class:`~jaxlora.config.EngineArgs`. ``generate`` returns when every
    prompt has its completion. Threads may share one: their calls are served one after the other
    (:class:`~jaxlora.async_llm.AsyncLLM` serves many at once).
    """

    def __init__(self, model: str, *, use_tqdm: bool = True, **options: Any) -> None:
        self.llm_engine = LLMEngine.from_engine_args(
            engine_args(model=model, **options), use_tqdm=use_tqdm
        )
        self._num_requests = 0
        self._lock = threading.RLock()

    @_alone
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, in their order.

        ``sampling_params`` and ``lora_request``: one for all, or one per prompt (None there is the
        base model). ``priority``: the same, lower values are served first. If anything is refused,
        nothing of the call stays queued. An adapter that was accepted, but cannot be read again
        when its turn comes, ends its own prompts alone: with finish reason "error", and the reason
        in ``error``.
        """
        many = _as_prompts(prompts)
        params = _each("sampling_params", sampling_params, len(many), SamplingParams)
        loras = self._load_inplace(_each("lora_request", lora_request, len(many), LoRARequest))
        self._read_new(loras)
        priorities = _per_prompt("priority", 0 if priority is None else priority, len(many))
        ids = []
        try:
            for prompt, param, lora, place in zip(many, params, loras, priorities, strict=True):
                request_id = str(self._num_requests)
                self._num_requests += 1
                final = dataclasses.replace(
                    param or self.get_default_sampling_params(),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                with uninterrupted():
                    self.llm_engine.add_request(request_id, prompt, final, lora, priority=place)
                    ids.append(request_id)
            return self._run(ids, use_tqdm=use_tqdm)
        except BaseException:
            # Refusals and Ctrl-C alike: the next call starts with an empty queue.
            self.llm_engine.abort_request(ids)
            raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, by a chat template, or the model's.

        ``tools`` and ``chat_template_kwargs``, its own variables, are what the template is given
        besides. With ``continue_final_message`` the answer goes on from the last message.
        """
        variables = chat_template_kwargs or {}
        check_variables(variables)
        given: Any = messages
        one = not isinstance(given, Sequence) or isinstance(next(iter(given), None), Mapping)
        conversations = [given] if one else given
        tokenizer = self.get_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                continue_final_message=continue_final_message,
                tools=tools,
                **variables,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    @_alone
    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest completions of each prompt that a search of this width finds.

        Raises RequestError if prompt and completion exceed the model's length.
        """
        engine = self.llm_engine
        tokens = [engine.token_prompt(prompt) for prompt in _as_prompts(prompts)]
        loras = self._load_inplace(_each("lora_request", lora_request, len(tokens), LoRARequest))
        search = BeamSearch(tokens, params, engine.eos_token_ids, engine.max_model_len)
        with tqdm(
            total=params.max_tokens, desc="Beam search", unit="token", disable=not use_tqdm
        ) as bar:
            for asked in search.steps():
                outputs = self.generate(
                    [prompt for _, prompt in asked],
                    search.sampling_params,
                    lora_request=[loras[i] for i, _ in asked],
                    use_tqdm=False,
                )
                search.take(outputs)
                bar.update()
        return search.found(loras, engine.tokenizer)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError if it was not loaded."""
        if self.llm_engine.tokenizer is None:
            raise ConfigError("the engine was started with skip_tokenizer_init=True")
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self.llm_engine.get_default_sampling_params()

    @_alone
    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges by Prometheus name."""
        return self.llm_engine.get_metrics()

    @_alone
    def reset_prefix_cache(self) -> bool:
        """See :meth:`LLMEngine.reset_prefix_cache`."""
        return self.llm_engine.reset_prefix_cache()

    @_alone
    def add_lora(self, lora_request: LoRARequest) -> bool:
        """See :meth:`LLMEngine.add_lora`."""
        return self.llm_engine.add_lora(lora_request)

    @_alone
    def remove_lora(self, lora_int_id: int, *, wait: bool = False) -> bool:
        """See :meth:`LLMEngine.remove_lora`. Nothing runs between calls, so that the slot and the
        memory are free at once; with ``wait`` also if requests were added to ``llm_engine``: it
        steps until those of the adapter have ended, and drops what it yields meanwhile."""
        versions = self.llm_engine.adapters.versions(lora_int_id) if wait else []
        removed = self.llm_engine.remove_lora(lora_int_id)
        while any(version.num_holders for version in versions):
            self.llm_engine.step()
        return removed

    @_alone
    def list_loras(self) -> set[int]:
        """See :meth:`LLMEngine.list_loras`."""
        return self.llm_engine.list_loras()

    @_alone
    def pin_lora(self, lora_int_id: int, *, wait: bool = False) -> bool:
        """See :meth:`LLMEngine.pin_lora`; it gets its slot when ``generate`` is called next, or
        with ``wait`` before this returns."""
        pinned = self.llm_engine.pin_lora(lora_int_id)
        while wait and not self.llm_engine.adapters.is_placed(lora_int_id):
            self.llm_engine.step()
        return pinned

    @_alone
    def update_lora(
        self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> bool:
        """See :meth:`LLMEngine.update_lora`."""
        return self.llm_engine.update_lora(name, tensors, config)

    def _read_new(self, requests: list[LoRARequest | None]) -> None:
        """Reads adapters that are new, each under the first request that names it."""
        first: dict[str, LoRARequest] = {}
        for each in requests:
            if each is not None:
                first.setdefault(each.lora_name, each)
        new = [each for each in first.values() if not self.llm_engine.adapters.has(each)]
        if new:
            self.llm_engine.add_loras(new)

    def _load_inplace(self, requests: list[LoRARequest | None]) -> list[LoRARequest | None]:
        """Reads again, once each, what is to be loaded in place; the requests without that."""
        inplace = dict.fromkeys(each for each in requests if each is not None and each.load_inplace)
        loaded: dict[LoRARequest | None, LoRARequest] = {}
        for request in inplace:
            self.llm_engine.add_lora(request)
            loaded[request] = dataclasses.replace(request, load_inplace=False)
        return [loaded.get(each, each) for each in requests]

    def _run(self, ids: list[str], *, use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        num_tokens = 0
        with tqdm(
            total=len(ids), desc="Processed prompts", unit="prompt", disable=not use_tqdm
        ) as bar:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    if output.error is not None:
                        logger.error("prompt %s: %s", output.request_id, output.error)
                    if output.finished:
                        finished[output.request_id] = output
                        num_tokens += sum(len(c.token_ids) for c in output.outputs)
                        rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"{rate:.1f} output tokens/s", refresh=False)
                        bar.update()
        return [finished[request_id] for request_id in ids]


def engine_args(**options: Any) -> EngineArgs:
    """EngineArgs from keywords. Raises TypeError with all options for one there is not."""
    if unknown := sorted(options.keys() - inspect.signature(EngineArgs).parameters.keys()):
        known = sorted(field.name for field in dataclasses.fields(EngineArgs))
        raise TypeError(f"LLM() has no option {unknown[0]!r}; options: {', '.join(known)}")
    return EngineArgs(**options)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; several integers, of whichever type, are one."""
    if isinstance(prompts, str | bytes | Mapping):
        return [cast("Prompt", prompts)]
    given: Any = prompts
    if not isinstance(given, Iterable):
        raise wrong("prompts", given, "a prompt or several")
    many = list(given)
    return [cast("Prompt", many)] if many and isinstance(many[0], numbers.Integral) else many


def _each(name: str, value: Any, count: int, kind: type[_T]) -> list[_T | None]:
    """One for each prompt, or None."""
    given = _per_prompt(name, value, count)
    for one in given:
        require(name, one, one is None or isinstance(one, kind), f"a {kind.__name__}")
    return given


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"The lengths of prompts ({count}) and {name} ({len(value)}) must be the same."
        )
    return list(value)
