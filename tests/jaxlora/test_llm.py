"""LLM over a simulated device: what it accepts, returns and leaves behind."""

from __future__ import annotations

import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import AdapterNotFoundError, ConfigError, RequestError
from jaxlora.llm import LLM, engine_args
from jaxlora.tokenizer import load_tokenizer
from jaxlora.types import BeamSearchParams, LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import (
    Device,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
    run,
)
from tests.jaxlora.tiny_tokenizer import add_tokenizer, encode

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def make_llm(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[LLM, Device]:
    engine, device = make_engine(**options)
    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda *args, **kwargs: engine)
    return LLM("model", use_tqdm=False), device


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> LLM:
    return make_llm(monkeypatch, max_loras=2, tokenizer=PieceTokenizer(*"abcdefghijklmno"))[0]


def tokens_of(llm: LLM, *args: Any, **options: Any) -> list[list[int]]:
    outputs = llm.generate(*args, use_tqdm=False, **options)
    return [output.outputs[0].token_ids for output in outputs]


def expected(prompt: list[int], params: SamplingParams = GREEDY, name: str = "") -> list[int]:
    return complete(prompt, params, make_adapter(name) if name else None, max_model_len=32)


def test_completions_come_in_the_order_of_their_prompts(llm: LLM) -> None:
    prompts = [[i, i + 1] for i in range(1, 9)]
    params = [SamplingParams(temperature=0, max_tokens=9 - i) for i in range(8)]
    assert tokens_of(llm, prompts, params) == [
        expected(prompt, param) for prompt, param in zip(prompts, params, strict=True)
    ]


def test_threads_are_served_one_after_the_other(llm: LLM) -> None:
    def generate(name: str) -> list[list[int]]:
        lora = LoRARequest(name)
        prompts = [[i, i + 1] for i in range(1, 9)]
        return [
            tokens
            for _ in range(5)
            for tokens in tokens_of(llm, prompts, GREEDY, lora_request=lora)
        ]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(generate, "wxyz"))
    for name, result in zip("wxyz", results, strict=True):
        assert result == [expected([i, i + 1], GREEDY, name) for _ in range(5) for i in range(1, 9)]
    check_nothing_is_held(llm.llm_engine)


def test_one_adapter_for_all_or_one_per_prompt(llm: LLM) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    x, y = LoRARequest("x", 1), LoRARequest("y", 2)
    of_all = tokens_of(llm, prompts, GREEDY, lora_request=x)
    assert of_all == [expected(prompt, name="x") for prompt in prompts]
    each = tokens_of(llm, prompts, GREEDY, lora_request=[x, None, y])
    names = ("x", "", "y")
    assert each == [expected(p, name=name) for p, name in zip(prompts, names, strict=True)]


def test_one_priority_for_all_or_one_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, device = make_llm(monkeypatch, max_num_seqs=1)
    prompts = [[1], [2], [3]]
    same = [expected(prompt) for prompt in prompts]
    assert tokens_of(llm, prompts, GREEDY, priority=[1, 2, 0]) == same
    order = [row.sequence.prompt_token_ids for plan in device.plans for row in plan.rows]
    assert [prompt for prompt, _ in itertools.groupby(order)] == [[3], [1], [2]]
    assert tokens_of(llm, prompts, GREEDY, priority=4) == same
    with pytest.raises(ValueError, match=r"prompts \(3\) and priority \(1\) must be the same"):
        llm.generate(prompts, GREEDY, priority=[1], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("ab", 1),
        ([1, 2], 1),
        ({"prompt": "ab"}, 1),
        ({"prompt_token_ids": [1, 2]}, 1),
        (["ab", "ab"], 2),
        (["ab", [1, 2], {"prompt": "ab"}, {"prompt_token_ids": [1, 2]}], 4),
        ([], 0),
        ((1, 2), 1),
        (np.array([1, 2]), 1),
        (list(np.array([1, 2])), 1),
        ([np.array([1, 2])], 1),
        (np.array([[1, 2], [1, 2]]), 2),
        (iter(["ab", [1, 2]]), 2),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_one_prompt_or_several(llm: LLM, prompts: Any, count: int) -> None:
    assert tokens_of(llm, prompts, GREEDY) == [expected([1, 2])] * count


@pytest.mark.usefixtures("without_types")
def test_what_is_no_prompt_is_refused(llm: LLM) -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match="prompts=None must be a prompt or several"):
        llm.generate(nothing)
    text: Any = b"ab"
    with pytest.raises(RequestError, match="got b'ab': text in bytes must be decoded"):
        llm.generate(text)


@pytest.mark.usefixtures("without_types")
def test_parameters_of_another_kind_are_refused(llm: LLM) -> None:
    search: Any = BeamSearchParams(beam_width=1, max_tokens=1)
    given: Any
    for given in ({"temperature": 0}, search, [search], "greedy"):
        with pytest.raises(ValueError, match=r"sampling_params=.* must be a SamplingParams"):
            llm.generate([[1, 2]], given)
    with pytest.raises(ValueError, match=r"params=.* must be a SamplingParams"):
        llm.llm_engine.add_request("a", [1, 2], search)
    for given in (GREEDY, None):
        with pytest.raises(ValueError, match=r"params=.* must be a BeamSearchParams"):
            llm.beam_search([[1, 2]], given)


@pytest.mark.usefixtures("without_types")
@pytest.mark.parametrize("prompt", [{"prompt": "ab"}, {"prompt_token_ids": [1, 2]}])
def test_what_a_prompt_has_beside_text_and_ids_is_refused_by_name(
    llm: LLM, prompt: dict[str, Any]
) -> None:
    nothing: dict[str, Any] = {"multi_modal_data": None, "mm_processor_kwargs": {}}
    nothing |= {"prompt": None, "prompt_token_ids": None}
    assert tokens_of(llm, [nothing | prompt], GREEDY) == [expected([1, 2])]
    with pytest.raises(RequestError, match="it needs 'prompt' or 'prompt_token_ids'"):
        llm.generate([nothing])
    image: Any = prompt | {"multi_modal_data": {"image": "a"}}
    search = BeamSearchParams(beam_width=1, max_tokens=1)
    for call in (lambda: llm.generate(image), lambda: llm.beam_search(image, search)):
        with pytest.raises(RequestError, match="a prompt has 'multi_modal_data', which is not ser"):
            call()


def test_default_parameters_may_be_changed(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.stop_token_ids = 0.0, 3, [15]
    assert tokens_of(llm, [1, 2], params) == tokens_of(
        llm, [1, 2], SamplingParams(temperature=0, max_tokens=3)
    )
    params.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        llm.generate([1, 2], params)
    check_nothing_is_held(llm.llm_engine)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            ["a", "b", "c"],
            {"lora_request": [None, LoRARequest("x", 1)]},
            r"^The lengths of prompts \(3\) and lora_request \(2\) must be the same.$",
        ),
        (
            "a",
            {"lora_request": []},
            r"^The lengths of prompts \(1\) and lora_request \(0\) must be the same.$",
        ),
        (
            ["a"],
            {"sampling_params": [GREEDY, GREEDY]},
            r"^The lengths of prompts \(1\) and sampling_params \(2\) must be the same.$",
        ),
    ],
)
def test_lists_are_one_per_prompt(
    llm: LLM, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, **options)
    check_nothing_is_held(llm.llm_engine)


def test_a_refusal_leaves_nothing_queued(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt token 99"):
        llm.generate([[1], [2], [99]], GREEDY)
    check_nothing_is_held(llm.llm_engine)
    with pytest.raises(AdapterNotFoundError):
        llm.generate([[1], [2]], GREEDY, lora_request=[None, LoRARequest("missing")])
    check_nothing_is_held(llm.llm_engine)
    assert tokens_of(llm, [[1, 2]], GREEDY) == [expected([1, 2])]


def test_an_id_that_is_in_use_ends_nobody_else(llm: LLM) -> None:
    llm.llm_engine.add_request("1", [1, 2], GREEDY)
    with pytest.raises(ValueError, match="'1' is in use"):
        llm.generate([[1], [2]], GREEDY)
    outputs = run(llm.llm_engine)
    assert {key: o.outputs[0].token_ids for key, o in outputs.items()} == {"1": expected([1, 2])}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_interrupt_leaves_nothing_queued(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, step: int
) -> None:
    llm, device = make_llm(monkeypatch, max_loras=1)

    def fail(plan: Plan) -> None:
        if len(device.plans) == step:
            device.fail = lambda plan: None
            raise error

    device.fail = fail
    adapters = [LoRARequest("x"), LoRARequest("y"), None]
    prompts = [[1, 2], [3], [4]]
    with pytest.raises(type(error)):
        llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=adapters)
    check_nothing_is_held(llm.llm_engine)
    tokens = tokens_of(llm, prompts, GREEDY, lora_request=adapters)
    names = ("x", "y", "")
    assert tokens == [expected(p, name=n) for p, n in zip(prompts, names, strict=True)]


def test_the_progress_bar_counts_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "output tokens/s" in shown
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_adapters_are_managed_through_the_llm(llm: LLM) -> None:
    assert llm.add_lora(LoRARequest("x", 4))
    assert llm.list_loras() == {4}
    assert llm.pin_lora(4)
    assert llm.remove_lora(4)
    assert llm.get_metrics()["jaxlora:adapters_registered"] == 0


def test_without_a_tokenizer_there_is_none_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = make_llm(monkeypatch)
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        llm.get_tokenizer()


def llm_that_chats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LLM:
    (tmp_path / "base").mkdir()
    tokenizer = load_tokenizer(str(add_tokenizer(tmp_path / "base", tmp_path / "model")))
    llm, _ = make_llm(monkeypatch, tokenizer=tokenizer)
    return llm


def test_a_conversation_takes_another_template_and_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm = llm_that_chats(monkeypatch, tmp_path)
    template = (
        "{{ mark }}{% for m in messages %}{{ m.content }}(){% endfor %}"
        "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
        "{% if add_generation_prompt %}+{% endif %}"
    )
    messages = [{"role": "user", "content": "!#"}]
    for options, text in (
        ({}, "!#()+"),
        ({"add_generation_prompt": False}, "!#()"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "!#"),
        ({"tools": [{"name": "%&"}], "chat_template_kwargs": {"mark": "$"}}, "$!#()%&+"),
    ):
        given: Any = options
        (output,) = llm.chat(messages, GREEDY, False, None, chat_template=template, **given)
        assert output.prompt_token_ids == encode(text), text


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "tokenize"])
def test_what_a_template_is_given_by_other_means_is_none_of_its_variables(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm = llm_that_chats(monkeypatch, tmp_path)
    messages = [{"role": "user", "content": "!#"}]
    with pytest.raises(RequestError, match=f"chat_template_kwargs may not have {name}$"):
        llm.chat(messages, GREEDY, False, chat_template_kwargs={name: False})


@pytest.mark.usefixtures("without_types")
def test_a_conversation_may_be_an_iterator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm = llm_that_chats(monkeypatch, tmp_path)
    given: Any = iter([{"role": "user", "content": "!#"}])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (output,) = llm.chat(given, GREEDY, False, chat_template=template)
    assert output.prompt_token_ids == encode("!#")


@pytest.mark.usefixtures("without_types")
def test_what_is_no_conversation_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm = llm_that_chats(monkeypatch, tmp_path)
    given: Any
    for given in ({"role": "user", "content": "!"}, 5, "!", [["!"]]):
        with pytest.raises(RequestError, match="messages must be objects with role and content"):
            llm.chat(given)
    assert llm.chat([]) == []


# Options


def test_options_become_engine_args() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = engine_args(model="m", enable_lora=True, max_loras=3, hbm_utilization=0.5)
    assert args == EngineArgs(model="m", enable_lora=True, max_loras=3, gpu_memory_utilization=0.5)


def test_options_without_meaning_warn() -> None:
    with pytest.warns(UserWarning, match="has no effect here") as caught:
        args = engine_args(model="m", enforce_eager=True, swap_space=4)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "option enforce_eager=True has no effect here",
        "option swap_space=4 has no effect here",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert args == EngineArgs(model="m")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"no option 'max_lora'; options: .*max_loras.*model"):
        engine_args(model="m", max_lora=3)


def test_an_option_is_not_given_under_two_names() -> None:
    with pytest.raises(TypeError, match="hbm_utilization and gpu_memory_utilization are one"):
        engine_args(model="m", hbm_utilization=0.5, gpu_memory_utilization=0.9)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_loras=0 must be at least 1"):
        engine_args(model="m", max_loras=0)
