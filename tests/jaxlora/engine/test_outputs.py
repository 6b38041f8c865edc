"""What a caller sees of a request while it runs: several completions, deltas, only the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.engine.sequence import _begun
from jaxlora.outputs import RequestOutput
from jaxlora.types import RequestOutputKind, SamplingParams
from tests.jaxlora.engine.simulator import (
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    make_engine,
    run,
    saying,
)

LETTERS = PieceTokenizer(*"abcdefgh", "ab", "cd", "~")
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


def stream(**params: Any) -> list[RequestOutput]:
    """Every output of one request, answered "a", "b", "cd", "e"."""
    answer = [LETTERS.pieces.index(piece) for piece in ("a", "b", "cd", "e")]
    engine, _ = make_engine(model=saying(*answer), tokenizer=LETTERS)
    engine.add_request("r", [1], SamplingParams(temperature=0, **params))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize(
    ("kind", "texts", "lengths"),
    [
        (CUMULATIVE, ["a", "ab", "abcd", "abcde", "abcde"], [1, 2, 3, 4, 5]),
        (DELTA, ["a", "b", "cd", "e", ""], [1, 1, 1, 1, 1]),
        (FINAL_ONLY, ["abcde"], [5]),
    ],
)
def test_output_kinds(kind: RequestOutputKind, texts: list[str], lengths: list[int]) -> None:
    outputs = stream(output_kind=kind)
    assert [output.outputs[0].text for output in outputs] == texts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.finished for output in outputs] == [False] * (len(texts) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "stop"


def test_deltas_hold_back_what_a_stop_string_may_take_away() -> None:
    outputs = stream(output_kind=DELTA, stop=["bce", "cde"])
    assert [output.outputs[0].text for output in outputs] == ["a", "", "b", ""]
    assert outputs[-1].outputs[0].stop_reason == "cde"


@given(text=st.text("ab", max_size=12), stop=st.text("ab", min_size=1, max_size=8))
def test_what_a_stop_string_may_take_away_is_found(text: str, stop: str) -> None:
    wanted = max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    assert _begun(stop, text) == wanted


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_several_completions_of_one_prompt(kind: RequestOutputKind) -> None:
    engine, _ = make_engine(max_num_seqs=2)
    params = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True, output_kind=kind)
    engine.add_request("r", [1, 2], params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for output in outputs:
        for each in output.outputs:
            got[each.index] = (
                each.token_ids if kind is not DELTA else got[each.index] + each.token_ids
            )
    for index, tokens in got.items():
        one = SamplingParams(seed=5 + index, max_tokens=6, ignore_eos=True)
        assert tokens == complete([1, 2], one, max_model_len=32)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) == {CUMULATIVE: 12, DELTA: 12, FINAL_ONLY: 1}[kind]
    check_nothing_is_held(engine)


def test_completions_of_one_prompt_differ_without_a_seed() -> None:
    engine, _ = make_engine()
    engine.add_request("r", [1], SamplingParams(n=4, max_tokens=8, ignore_eos=True))
    completions = run(engine)["r"].outputs
    # The simulated model draws on little of the seed.
    assert len({tuple(completion.token_ids) for completion in completions}) > 1


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_aborting_ends_every_completion(kind: RequestOutputKind) -> None:
    engine, _ = make_engine(max_num_seqs=2)
    params = SamplingParams(n=4, max_tokens=4, ignore_eos=True, output_kind=kind)
    engine.add_request("r", [1], params)
    for _ in range(6):
        engine.step()
    (output,) = engine.abort_request("r")
    assert output.finished
    ends = {completion.index: completion.finish_reason for completion in output.outputs}
    assert set(ends.values()) == {"abort", "length"} if kind is not DELTA else {"abort"}
    assert ends[3] == "abort"
    run(engine)
    check_nothing_is_held(engine)
