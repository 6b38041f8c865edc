"""The engine: requests in, tokens out, one step at a time.

A step plans and dispatches the next batch before it reads the tokens of the one before, so that
the device never waits for the host.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from jaxlora import checks
from jaxlora.adapters.registered import HeldVersion, Registered
from jaxlora.engine.adapter_calls import AdapterCalls
from jaxlora.engine.batch import ScoredChunk
from jaxlora.engine.build import build
from jaxlora.engine.histogram import Histogram
from jaxlora.engine.in_flight import StepInFlight
from jaxlora.engine.intake import cache_salt_of, salted
from jaxlora.engine.logprobs import LogprobArrays, TokenTexts, token_logprobs
from jaxlora.engine.masking import Stuck, has_constraints, run_constrained, wait_for_a_mask
from jaxlora.engine.metrics import TokenMetrics, adapter_metrics, scheduler_metrics
from jaxlora.engine.parts import EngineParts
from jaxlora.engine.programs import CompilationCounter
from jaxlora.engine.request import Request
from jaxlora.engine.sampling import OVERFLOWED
from jaxlora.engine.sequence import Sequence, Status
from jaxlora.engine.slot_deadline import SlotDeadline
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import GenerationError
from jaxlora.interrupts import uninterrupted
from jaxlora.outputs import FinishReason, RequestOutput
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import LoRARequest, Prompt, SamplingParams, TokensPrompt

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.01
"""Longest a step waits for an adapter or a mask when there is nothing else to do."""


class LLMEngine(AdapterCalls):
    """Continuous batching over one model: :meth:`add_request`, then :meth:`step` until done."""

    def __init__(self, parts: EngineParts, compilations: CompilationCounter | None = None) -> None:
        super().__init__(parts.registry, parts.scheduler)
        self._intake = parts.intake
        self._runner = parts.runner
        self.start_report = parts.start_report
        """What the start took; None for an engine that was assembled by hand."""
        self.owner: threading.Thread | None = None
        """The thread that steps it, if nobody else may."""
        self._slot_deadline = SlotDeadline(parts.lora_slot_timeout)
        self._generation_defaults = parts.generation_defaults
        self._requests: dict[str, Request] = {}
        self._in_flight: StepInFlight | None = None
        self._token_texts = TokenTexts(parts.intake.tokenizer)
        self._compilations = compilations
        self._tokens = TokenMetrics()

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, use_tqdm: bool = True) -> LLMEngine:
        """Loads the model, plans memory and compiles everything a step can need."""
        compilations = CompilationCounter()
        return cls(build(args, use_tqdm=use_tqdm), compilations)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
        held: HeldVersion | None = None,
    ) -> None:
        """Queues a request; one of lower ``priority`` value is admitted first. All that share what
        is ``held`` get one version of the adapter, until :meth:`AdapterRegistry.end_hold`.

        Raises RequestError if it can never run, AdapterError if its adapter cannot be served,
        ValueError if the id is no text or in use, the priority is no integer, or the engine is an
        AsyncLLM's.
        """
        self.check_owner()
        checks.require("request_id", request_id, isinstance(request_id, str), "a text")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        priority = checks.integer("priority", priority)
        request = self._intake.request(
            request_id, prompt, params or self.get_default_sampling_params(), lora_request
        )
        if lora_request is not None:
            registry = self.adapters
            adapter = (
                registry.get(lora_request)
                if held is None
                else registry.get_held(lora_request, held)
            )
            registry.check_can_run(adapter)
            for sequence in request.sequences:
                sequence.adapter = adapter
        with uninterrupted():
            self._requests[request_id] = request
            self._tokens.received(len(request.prompt_token_ids))
            for sequence in request.sequences:
                sequence.priority = priority
                self.scheduler.add(sequence)

    def token_prompt(self, prompt: Prompt) -> TokensPrompt:
        """A prompt as its ids, with its salt. Raises RequestError if it is text and there is no
        tokenizer."""
        _, token_ids = self._intake.tokenize(prompt)
        return salted(TokensPrompt(prompt_token_ids=token_ids), cache_salt_of(prompt))

    def compile_grammar(self, params: SamplingParams) -> None:
        """Does ahead what :meth:`add_request` does about structured outputs, which may take 0.1 s:
        any thread may call it while the engine steps. Raises RequestError as it would."""
        self._intake.grammar(params)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, unless the engine was started without."""
        return self._intake.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._intake.vocab_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and completion together."""
        return self._intake.max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a completion."""
        return self._intake.eos_token_ids

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then returns what the one before it yielded.

        Ctrl-C waits for the end of the step. If the step raises, whatever it raises, all requests
        are aborted: what is left of it cannot be continued. Raises ValueError if the engine is an
        AsyncLLM's.
        """
        self.check_owner()
        try:
            with uninterrupted():
                return self._step()
        except BaseException:
            with uninterrupted():
                self._in_flight = None
                self.abort_request(list(self._requests))
                if self._registry is not None:
                    # Their slots may not have been written.
                    self._registry.slots.vacate_idle()
                # Nor their pages.
                self.scheduler.prefix_cache.reset()
            raise

    def check_owner(self) -> None:
        """Raises ValueError if the thread that asks must leave the engine alone."""
        if self.owner not in (None, threading.current_thread()):
            raise ValueError(
                "the engine is an AsyncLLM's, whose thread alone may use it: ask that AsyncLLM, or "
                "shut it down first"
            )

    def has_unfinished_requests(self) -> bool:
        """Requests wait or run, or a step is under way."""
        return bool(self._requests) or self._in_flight is not None

    def has_work(self) -> bool:
        """There is a reason to call :meth:`step`: unfinished requests, or an adapter on its way to
        a slot."""
        is_loading = self._registry is not None and self._registry.has_work
        return is_loading or self.has_unfinished_requests()

    def wake(self) -> None:
        """Ends the wait of a step, or of the next, in which all there is are adapters on their way,
        because there is more to do now: any thread may call it."""
        if self._registry is not None:
            self._registry.prefetch.wake()

    @uninterrupted()
    def abort_request(self, request_id: str | list[str]) -> list[RequestOutput]:
        """Ends requests now and returns their last outputs; ids that are unknown or finished are
        passed over."""
        ids = [request_id] if isinstance(request_id, str) else request_id
        return [self._end(each, "abort") for each in ids if each in self._requests]

    def reset_prefix_cache(self) -> bool:
        """Nothing computed so far is found by later requests; running ones go on. Always True."""
        self.scheduler.prefix_cache.reset()
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**self._generation_defaults)

    def get_default_max_tokens(self) -> int | None:
        """The ``max_new_tokens`` of the model's generation_config.json, None if it says nothing."""
        return self._generation_defaults.get("max_tokens")

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges by Prometheus name."""
        metrics = scheduler_metrics(self.scheduler) | self._tokens.numbers()
        if self._registry is not None:
            metrics |= adapter_metrics(self._registry)
        if self._compilations is not None:
            metrics["jaxlora:compilations_total"] = self._compilations.total
        return metrics

    def get_histograms(self) -> dict[str, Histogram]:
        """Histograms by Prometheus name, as they are now."""
        return self._tokens.histograms()

    def _step(self) -> list[RequestOutput]:
        registry = self._registry
        failed: list[RequestOutput] = []
        if registry is not None:
            registry.start_prefetch(self.scheduler.waiting.places())
            failed = self._end_those_without(registry.finish_prefetch())
        plan = self.scheduler.schedule()
        if plan.loads:
            self._runner.load(plan.loads)
        if registry is not None:
            waiting = self.scheduler.turns.slotless
            overdue = self._slot_deadline.overdue(waiting, registry.slots.num_writes)
            failed += self._end_those_without(
                (entry, registry.no_slot(entry, self._slot_deadline.seconds)) for entry in overdue
            )
            # For what came off the host, or out of the staging area, with this plan.
            registry.start_prefetch(self.scheduler.waiting.places())
        if not plan.rows and self._in_flight is None:
            self._wait_for_threads()
        now = time.monotonic()
        for row in plan.rows:
            if row.sequence.metrics.first_scheduled_time is None:
                row.sequence.metrics.first_scheduled_time = now
        done = self._in_flight
        stuck: Stuck = []
        if has_constraints(plan):
            self._in_flight, stuck = run_constrained(plan, done, self._runner, self.scheduler)
        else:
            self._in_flight = StepInFlight(plan, self._runner.run(plan)) if plan.rows else None
        outputs = [] if done is None else self._update(done)
        for sequence, error in stuck:
            if sequence.finish_reason is None:
                outputs += self._fail(sequence.request_id, error)
        return failed + outputs

    def _wait_for_threads(self) -> None:
        """Sleeps a little, if everyone waits for an adapter or a mask."""
        if self._registry is not None and self._registry.prefetch.is_awaited:
            self._registry.prefetch.wait(_IDLE_WAIT_S)
        elif self.scheduler.running:
            wait_for_a_mask(self.scheduler.running, _IDLE_WAIT_S)

    def _end_those_without(
        self, failures: Iterable[tuple[Registered, Exception]]
    ) -> list[RequestOutput]:
        """Ends the requests of adapters that they cannot have, with the reason."""
        outputs = []
        for failed, error in failures:
            for request in [r for r in self._requests.values() if _needs(r, failed)]:
                outputs += self._fail(request.request_id, error)
        return outputs

    def _fail(self, request_id: str, error: Exception) -> list[RequestOutput]:
        """Ends a request, unless it has ended, because of what concerns nobody else."""
        if request_id not in self._requests:
            return []
        output = self._end(request_id, "error")
        output.error = error
        return [output]

    def _end(self, request_id: str, reason: FinishReason) -> RequestOutput:
        request = self._requests.pop(request_id)
        for sequence in request.sequences:
            # One may have found its end and failed before it was taken out.
            if sequence.status is not Status.FINISHED:
                sequence.finish_reason = reason
                self.scheduler.finish(sequence)
        request.metrics.finished_time = time.monotonic()
        output = request.output()
        assert output is not None, "all of it has ended"
        return output

    def _update(self, step: StepInFlight) -> list[RequestOutput]:
        tokens, logprobs = step.read(), step.pending.read_logprobs()
        now = time.monotonic()
        failed: list[RequestOutput] = []
        for chunk, scores in step.pending.read_prompt_logprobs():
            failed += self._tell_prompt(chunk, scores)
        sampled: list[Sequence] = []
        for i, (row, token) in enumerate(zip(step.plan.rows, tokens, strict=False)):
            sequence = row.sequence
            if not row.samples or sequence.status is Status.FINISHED:
                continue
            if token == OVERFLOWED:
                failed += self._fail(sequence.request_id, _overflowed(sequence))
                continue
            told, wanted = None, sequence.params.logprobs
            try:
                if logprobs is not None and wanted is not None:
                    text_of = self._token_texts.of(sequence.params)
                    told = token_logprobs(logprobs, i, wanted, text_of)
                sequence.append(token, told)
            except Exception as error:  # noqa: BLE001  whose text it is is told, nobody else
                what = f"token {token} could not be turned into text"
                failed += self._fail(sequence.request_id, _undecodable(what, error))
                continue
            sampled.append(sequence)
            if sequence.finish_reason is not None:
                self.scheduler.finish(sequence)
        self._tokens.sampled(sampled, now)
        outputs = []
        # In order of the step, each once, and without those that one of their others ended.
        for request_id in dict.fromkeys(sequence.request_id for sequence in sampled):
            request = self._requests.get(request_id)
            if request is None:
                continue
            output = request.output()
            if output is None:
                continue
            if output.finished:
                request.metrics.finished_time = now
                del self._requests[request_id]
            outputs.append(output)
        return failed + outputs

    def _tell_prompt(self, chunk: ScoredChunk, scores: LogprobArrays) -> list[RequestOutput]:
        """Gives a sequence what was computed of its prompt; what that ended."""
        sequence, wanted = chunk.sequence, chunk.sequence.params.prompt_logprobs
        if sequence.status is Status.FINISHED or wanted is None:
            return []
        text_of = self._token_texts.of(sequence.params)
        try:
            places = range(len(chunk.positions))
            entries = [token_logprobs(scores, place, wanted, text_of) for place in places]
        except Exception as error:  # noqa: BLE001  whose prompt it is is told, nobody else
            what = "a log-probability of the prompt could not be told"
            return self._fail(sequence.request_id, _undecodable(what, error))
        sequence.add_prompt_logprobs(chunk.positions.start, entries)
        return []


def _undecodable(what: str, cause: Exception) -> GenerationError:
    error = GenerationError(f"{what}: {cause!r}")
    error.__cause__ = cause
    return error


def _overflowed(sequence: Sequence) -> GenerationError:
    entry, length = sequence.adapter, len(sequence.token_ids)
    what, remedy = "the model", "and its dtype"
    if entry is not None:
        what, remedy = f"adapter {entry.name!r}", "and its scale (lora_alpha)"
    return GenerationError(
        f"the arithmetic overflowed: after {length} tokens the scores of the next one are NaN; "
        f"check the weights of {what} {remedy}"
    )


def _needs(request: Request, entry: Registered) -> bool:
    return any(s.adapter is entry and s.finish_reason is None for s in request.sequences)
