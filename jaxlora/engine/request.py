"""One request inside the engine: its sequences, and what its caller sees of them."""

from __future__ import annotations

import dataclasses

from jaxlora.engine.sequence import Sequence
from jaxlora.outputs import RequestMetrics, RequestOutput, TokenLogprobs
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt with its completions, ``params.n`` of them, each a sequence of its own."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    lora_request: LoRARequest | None
    sequences: list[Sequence]
    stream_interval: int = 1
    """Tokens that a completion must have more for its caller to be shown it again."""
    _shown_prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """All completions have ended."""
        return None not in [sequence.finish_reason for sequence in self.sequences]

    def output(self) -> RequestOutput | None:
        """What the caller is shown now, by the request's output kind; None for nothing yet."""
        kind = self.params.output_kind
        finished = self.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        news = [each for each in self.sequences if each.has_news(self.stream_interval)]
        if not news and not finished:
            return None
        if kind is RequestOutputKind.DELTA:
            completions = [sequence.completion(only_news=True) for sequence in news]
        else:
            completions = [sequence.completion() for sequence in self.sequences]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=completions,
            finished=finished,
            metrics=self.metrics,
            lora_request=self.lora_request,
            prompt_logprobs=self._prompt_logprobs(only_news=kind is RequestOutputKind.DELTA),
            num_cached_tokens=self.sequences[0].num_cached_tokens,
        )

    def _prompt_logprobs(self, *, only_news: bool) -> list[TokenLogprobs | None] | None:
        """None before all are there: several completions need not wait for the first one's."""
        first, shown = self.sequences[0], self._shown_prompt_logprobs
        if self.params.prompt_logprobs is None or first.misses_prompt_logprobs:
            return None
        if shown is None:
            shown = self._shown_prompt_logprobs = list(first.prompt_logprobs)
        elif only_news:
            return None
        return shown
