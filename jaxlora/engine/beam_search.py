"""Beam search over the engine: each step completes every live beam by one token.

The engine knows nothing of it, and the search nothing of the engine: it is a generator, which asks
for the likeliest next tokens of many prompts and is sent them, by whatever kind of caller.
"""

from __future__ import annotations

from collections.abc import Collection, Generator

from jaxlora.errors import RequestError
from jaxlora.outputs import BeamSearchSequence, RequestOutput
from jaxlora.types import BeamSearchParams, RequestOutputKind, SamplingParams

Asked = tuple[list[tuple[int, list[int]]], SamplingParams]
"""(Prompt index, tokens) of each beam, and how one more token is to be sampled."""
Found = list[list[BeamSearchSequence]]


def beam_search(
    prompts: list[list[int]],
    params: BeamSearchParams,
    eos_token_ids: Collection[int],
    max_model_len: int,
) -> Generator[Asked, list[RequestOutput], Found]:
    """Returns the ``beam_width`` best sequences of each prompt, best first; asks for tokens and is
    sent an output for each beam.

    Raises RequestError if a prompt and its completion exceed the model's length, and what ended one
    of those that were asked for.
    """
    for prompt in prompts:
        if len(prompt) + params.max_tokens > max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, which with max_tokens={params.max_tokens} "
                f"is more than max_model_len={max_model_len}"
            )
    step = SamplingParams(
        temperature=params.temperature,
        max_tokens=1,
        logprobs=2 * params.beam_width,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    eos = frozenset(eos_token_ids)

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in eos)
        return beam.cum_logprob / max(length, 1) ** params.length_penalty

    live = [[BeamSearchSequence(tokens=list(prompt))] for prompt in prompts]
    ended: list[list[BeamSearchSequence]] = [[] for _ in prompts]
    for _ in range(params.max_tokens):
        asked = [(i, beam) for i, beams in enumerate(live) for beam in beams]
        if not asked:
            break
        outputs = yield [(i, beam.tokens) for i, beam in asked], step
        grown: list[list[BeamSearchSequence]] = [[] for _ in prompts]
        for (i, beam), output in zip(asked, outputs, strict=True):
            for new in _continued(beam, output):
                ends = new.tokens[-1] in eos and not params.ignore_eos
                new.finish_reason = "stop" if ends else None
                (ended if ends else grown)[i].append(new)
        live = [sorted(beams, key=score, reverse=True)[: params.beam_width] for beams in grown]
    for beams in live:
        for beam in beams:
            beam.finish_reason = "length"
    return [
        sorted(done + beams, key=score, reverse=True)[: params.beam_width]
        for done, beams in zip(ended, live, strict=True)
    ]


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
