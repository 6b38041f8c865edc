"""Beam search over the engine: each step completes every live beam by one token.

The engine knows nothing of it, and the search nothing of the engine: it says what is to be
completed, and takes the outputs, by whatever kind of caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from jaxlora.checks import require
from jaxlora.errors import RequestError
from jaxlora.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import (
    BeamSearchParams,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    TokensPrompt,
)


class BeamSearch:
    """The ``beam_width`` best sequences of each prompt. Raises RequestError if a prompt and its
    completion exceed the model's length."""

    def __init__(
        self,
        prompts: Sequence[TokensPrompt],
        params: BeamSearchParams,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        require("params", params, isinstance(params, BeamSearchParams), "a BeamSearchParams")
        starts = [prompt["prompt_token_ids"] for prompt in prompts]
        for tokens in starts:
            if len(tokens) + params.max_tokens > max_model_len:
                raise RequestError(
                    f"the prompt has {len(tokens)} tokens, which with "
                    f"max_tokens={params.max_tokens} is more than max_model_len={max_model_len}"
                )
        self.sampling_params = SamplingParams(
            temperature=params.temperature,
            max_tokens=1,
            logprobs=2 * params.beam_width,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        """How what is asked for is to be completed."""
        self._prompts = prompts
        self._params = params
        self._eos = frozenset(eos_token_ids)
        self._live = [[BeamSearchSequence(tokens=list(tokens))] for tokens in starts]
        self._ended: list[list[BeamSearchSequence]] = [[] for _ in prompts]

    def steps(self) -> Iterator[list[tuple[int, TokensPrompt]]]:
        """What is asked for, step by step: each live beam as a prompt, and the index of the prompt
        that it began with. :meth:`take` the outputs before the next step."""
        for _ in range(self._params.max_tokens):
            asked: list[tuple[int, TokensPrompt]] = [
                (i, {**self._prompts[i], "prompt_token_ids": beam.tokens})
                for i, beam in self._beams()
            ]
            if not asked:
                break
            yield asked

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """Goes on with the outputs of a step, in its order. Raises what ended one of them."""
        grown: list[list[BeamSearchSequence]] = [[] for _ in self._prompts]
        for (i, beam), output in zip(self._beams(), outputs, strict=True):
            for new in _continued(beam, output):
                ends = new.tokens[-1] in self._eos and not self._params.ignore_eos
                new.finish_reason = "stop" if ends else None
                (self._ended if ends else grown)[i].append(new)
        self._live = [self._best(beams) for beams in grown]

    def found(
        self, lora_requests: Sequence[LoRARequest | None], tokenizer: Tokenizer | None
    ) -> list[BeamSearchOutput]:
        """The sequences of each prompt, best first, once no step is left."""
        found = []
        for ended, live, lora_request in zip(self._ended, self._live, lora_requests, strict=True):
            sequences = self._best(ended + live)
            for sequence in sequences:
                sequence.finish_reason = sequence.finish_reason or "length"
                sequence.lora_request = lora_request
                if tokenizer is not None:
                    sequence.text = tokenizer.decode(sequence.tokens)
            found.append(BeamSearchOutput(sequences=sequences))
        return found

    def _beams(self) -> list[tuple[int, BeamSearchSequence]]:
        return [(i, beam) for i, beams in enumerate(self._live) for beam in beams]

    def _best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(beams, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in self._eos)
        return beam.cum_logprob / max(length, 1) ** self._params.length_penalty


def _continued(beam: BeamSearchSequence, output: RequestOutput) -> list[BeamSearchSequence]:
    """The beam with each of the tokens that the step tells of. Raises what ended the step."""
    if output.error is not None:
        raise output.error
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    (told,) = logprobs
    return [
        BeamSearchSequence(
            tokens=[*beam.tokens, token],
            logprobs=[*beam.logprobs, told],
            cum_logprob=beam.cum_logprob + logprob.logprob,
        )
        for token, logprob in told.items()
    ]
