"""Structured outputs of the demo model: what they are like, and that its neighbours go on."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import tokenizers
import transformers

from examples.demo_model import ADAPTERS
from jaxlora import LLM, LoRARequest, RequestError, SamplingParams, StructuredOutputsParams
from jaxlora.engine.grammars import Grammars
from jaxlora.tokenizer import Tokenizer
from tests.jaxlora.tiny_config import TINY
from tests.jaxlora.tiny_tokenizer import CHARACTERS, SPECIAL, add_tokenizer, encode

NUM_SCHEMAS = 72
# Left to itself, so small a model may go on with spaces for ever.
_SPACES: list[dict[str, Any]] = [
    {"disable_any_whitespace": True},
    {"whitespace_pattern": "[ \\n]?"},
    {"disable_any_whitespace": True},
]
_WORDS = "name age city tags price is_open items score kind note".split()


def value_schema(random: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose values are short, so that a model of few parameters comes to their end."""
    kinds = "integer string enum boolean null pattern const decimal".split()
    kinds += ["object", "array", "anyOf"] * (depth > 0)
    match random.choice(kinds):
        case "integer":
            low = random.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 2000)}
        case "string":
            return {"type": "string", "maxLength": random.randint(1, 8)}
        case "pattern":
            return {
                "type": "string",
                "pattern": random.choice(["^[A-Z]{2}[0-9]{3}$", "^(a|bc)d?$"]),
            }
        case "enum":
            return {"enum": random.sample(["red", "ü", 'a"b', 3, None, "green tea"], 3)}
        case "const":
            return {"const": random.choice([1, "x y", False])}
        case "decimal":
            return {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 0.5}
        case "anyOf":
            return {"anyOf": [value_schema(random, 0), value_schema(random, 0)]}
        case "array":
            most = random.randint(1, 2)
            items = value_schema(random, depth - 1)
            return {"type": "array", "items": items, "minItems": most - 1, "maxItems": most}
        case "object":
            return object_schema(random, depth - 1)
        case kind:
            return {"type": kind}


def object_schema(random: random.Random, depth: int) -> dict[str, Any]:
    names = random.sample(_WORDS, random.randint(1, 2))
    return {
        "type": "object",
        "properties": {name: value_schema(random, depth) for name in names},
        "required": names[: random.randint(1, len(names))],
        "additionalProperties": False,
    }


def schemas(count: int) -> list[dict[str, Any]]:
    made = []
    for seed in range(count):
        one = object_schema(random.Random(seed), 1 + (seed % 8 == 0))
        if seed % 4 == 0:
            one = {"$defs": {"it": one}, "type": "array", "items": {"$ref": "#/$defs/it"}}
            one |= {"minItems": 1, "maxItems": 2}
        made.append(one)
    return made


def structured(**constraint: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**constraint)


@pytest.fixture(scope="module")
def adapters() -> list[LoRARequest | None]:
    folders = sorted(folder for folder in ADAPTERS.iterdir() if folder.is_dir())
    return [None, *(LoRARequest(folder.name, lora_path=str(folder)) for folder in folders)]


def test_json_of_many_schemas(smollm2: LLM, adapters: list[LoRARequest | None]) -> None:
    """Greedy and not, under every adapter and none, with space between tokens and without."""
    wanted = schemas(NUM_SCHEMAS)
    params = [
        SamplingParams(
            temperature=0.0 if i % 2 else 0.7,
            seed=i,
            max_tokens=200,
            structured_outputs=structured(json=schema, **_SPACES[i % 3]),
        )
        for i, schema in enumerate(wanted)
    ]
    compilations = smollm2.get_metrics()["jaxlora:compilations_total"]
    outputs = smollm2.generate(
        ["JSON: "] * len(wanted),
        params,
        lora_request=[adapters[i % len(adapters)] for i in range(len(wanted))],
        use_tqdm=False,
    )
    assert smollm2.get_metrics()["jaxlora:compilations_total"] == compilations
    for schema, output in zip(wanted, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.finish_reason == "stop", completion
        jsonschema_rs.validate(schema, json.loads(completion.text))
    assert len({output.outputs[0].text for output in outputs}) > NUM_SCHEMAS / 2


KINDS: list[tuple[StructuredOutputsParams, str]] = [
    (structured(regex=r"[A-Z][a-z]{2,8} [0-9]{2}"), r"[A-Z][a-z]{2,8} [0-9]{2}"),
    (structured(choice=["yes", "no", "né😀"]), "yes|no|né😀"),
    (structured(grammar='start: "(" start ")" | /[a-c]{1,3}/'), r"\(*[abc]{1,3}\)*"),
    (structured(grammar='root ::= "SELECT " col\ncol ::= "name" | "age"'), "SELECT (name|age)"),
    (structured(json={"enum": ["a b", 7]}), '"a b"|7'),
]


def test_every_kind_in_one_batch_with_adapters_and_free_neighbours(
    smollm2: LLM, adapters: list[LoRARequest | None]
) -> None:
    prompts, params, loras = [], [], []
    for i, (constraint, _) in enumerate(KINDS):
        for constrained in (constraint, None):
            prompts.append(f"Question {i}: who are you?")
            params.append(
                SamplingParams(
                    temperature=0.0 if i % 2 else 1.0,
                    seed=i,
                    max_tokens=24,
                    structured_outputs=constrained,
                )
            )
            loras.append(adapters[i % len(adapters)])
    together = smollm2.generate(prompts, params, lora_request=loras, use_tqdm=False)
    for (_, pattern), output in zip(KINDS, together[::2], strict=True):
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch(pattern, output.outputs[0].text)
    free = smollm2.generate(prompts[1::2], params[1::2], lora_request=loras[1::2], use_tqdm=False)
    for output, among in zip(free, together[1::2], strict=True):
        assert output.outputs[0].token_ids == among.outputs[0].token_ids
    for i in range(0, len(prompts), 2):
        (alone,) = smollm2.generate(prompts[i], params[i], lora_request=loras[i], use_tqdm=False)
        assert alone.outputs[0].token_ids == together[i].outputs[0].token_ids


class Late(ThreadPoolExecutor):
    """Makes masks once a step went on without one, and those after it late, too."""

    def __init__(self) -> None:
        super().__init__()
        self.was_late = threading.Event()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        def call() -> Any:
            self.was_late.wait(10)
            time.sleep(0.15)
            return fn(*args, **kwargs)

        return super().submit(call)


def test_late_masks_change_no_token(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they leave pages in which others find what was never said."""
    prompt = (
        "Name two colours, a light one and a dark one, then a long word, as in riddles of old: "
    )
    constraint = structured(regex="(red|green|blue) (or|and) (black|white) [a-z]{24}")
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    next_ones = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    slow = SamplingParams(temperature=0, structured_outputs=constraint)
    (alone,) = smollm2.generate(prompt, slow, use_tqdm=False)
    grammars = smollm2.llm_engine._intake.grammars
    scheduler = smollm2.llm_engine.scheduler
    postpone = scheduler.postpone
    smollm2.reset_prefix_cache()
    with Late() as executor:
        monkeypatch.setattr(grammars, "executor", executor)
        monkeypatch.setattr(
            scheduler, "postpone", lambda *args: (executor.was_late.set(), postpone(*args))[1]
        )
        late, _ = smollm2.generate([prompt, "Once"], [slow, free], use_tqdm=False)
        monkeypatch.undo()
    assert executor.was_late.is_set()
    assert late.outputs[0].token_ids == alone.outputs[0].token_ids
    whole = late.prompt_token_ids + late.outputs[0].token_ids
    (found,) = smollm2.generate([whole], next_ones, use_tqdm=False)
    assert found.num_cached_tokens > len(late.prompt_token_ids)
    smollm2.reset_prefix_cache()
    (computed,) = smollm2.generate([whole], next_ones, use_tqdm=False)
    assert found.outputs[0].token_ids == computed.outputs[0].token_ids


def test_a_structural_tag_begins_with_its_trigger(smollm2: LLM) -> None:
    """Of text, of a special token, and in text that has none; the triggers are made likely."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    pattern = r'f>{\s*"n"\s*:\s*(1|22)\s*}</f>'
    tokenizer = smollm2.get_tokenizer()
    texts = []
    for trigger in ("<", "<|im_start|>"):
        tag = {"begin": f"{trigger}f>", "schema": schema, "end": "</f>"}
        (token,) = tokenizer.encode(trigger, add_special_tokens=False)
        for bias in (100.0, -100.0):
            params = SamplingParams(
                temperature=0,
                max_tokens=60,
                logit_bias={token: bias},
                skip_special_tokens=False,
                structured_outputs=structured(
                    structural_tag={"structures": [tag], "triggers": [trigger]}
                ),
            )
            (output,) = smollm2.generate(["Call f: "], params, use_tqdm=False)
            texts.append(output.outputs[0].text)
    lesser, no_lesser, special, no_special = texts
    for text, trigger in ((lesser, "<"), (special, "<|im_start|>")):
        begin, *calls = text.split(f"{trigger}f>")
        assert not begin
        assert len(calls) > 1
        # The last one may be cut off.
        assert all(re.fullmatch(pattern, f"f>{call}") for call in calls[:-1])
    assert "f>{" not in no_lesser + no_special
    assert min(map(len, (no_lesser, no_special))) > 20


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        ({"choice": ["<|im_end|>"]}, "<|im_end|>"),
        ({"choice": ["a<|im_start|>b"]}, "a<|im_start|>b"),
        ({"regex": r"<\|im_end\|>"}, "<|im_end|>"),
        ({"regex": "<repo_name>x"}, "<repo_name>x"),
        ({"json": {"const": "<|im_end|>"}}, '"<|im_end|>"'),
        ({"json": r'{"const": "\u003c|im_end|>"}'}, '"<|im_end|>"'),
        ({"grammar": '%llguidance {}\nstart: "<repo_name>"'}, "<repo_name>"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_special_token_is_called_is_text(
    smollm2: LLM, constraint: dict[str, Any], text: str, temperature: float
) -> None:
    params = SamplingParams(
        structured_outputs=structured(**constraint), temperature=temperature, max_tokens=40, seed=2
    )
    (output,) = smollm2.generate("Answer: ", params, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.finish_reason == "stop"
    assert completion.text == text


def test_it_goes_with_the_other_parameters(smollm2: LLM) -> None:
    choice = structured(choice=["red", "green", "blue"])
    params = [
        SamplingParams(structured_outputs=choice, temperature=0, min_tokens=10),
        SamplingParams(structured_outputs=choice, temperature=0, detokenize=False),
        SamplingParams(structured_outputs=choice, temperature=0, bad_words=["red", "blue"]),
        SamplingParams(structured_outputs=choice, temperature=0, logprobs=1, stop="e"),
        SamplingParams(structured_outputs=choice, n=3, seed=1),
        SamplingParams(structured_outputs=choice, temperature=0, max_tokens=1),
    ]
    min_tokens, ids, bad, stop, many, cut = smollm2.generate(
        ["The colour is "] * len(params), params, use_tqdm=False
    )
    texts = ("red", "green", "blue")
    assert min_tokens.outputs[0].text in texts
    assert min_tokens.outputs[0].finish_reason == "stop"
    assert ids.outputs[0].text == ""
    assert ids.outputs[0].token_ids == min_tokens.outputs[0].token_ids
    assert bad.outputs[0].text == "green"
    assert stop.outputs[0].stop_reason == "e"
    # Log-probabilities are the model's own: the likeliest token need not be one that was allowed.
    first = (stop.outputs[0].logprobs or [])[0]
    assert {entry.rank for entry in first.values()} >= {1}
    assert all(completion.text in texts for completion in many.outputs)
    assert cut.outputs[0].finish_reason == "length"


def test_a_bad_schema_costs_nobody_else_anything(smollm2: LLM) -> None:
    bad = SamplingParams(structured_outputs=structured(json={"type": "strin"}))
    with pytest.raises(RequestError, match=r"structured_outputs: .*strin"):
        smollm2.generate(["a", "b"], [SamplingParams(), bad], use_tqdm=False)
    assert not smollm2.llm_engine.has_unfinished_requests()


def test_a_choice_may_be_among_very_many(smollm2: LLM) -> None:
    names = [f"name{i}" for i in range(30_001)]
    params = SamplingParams(structured_outputs=structured(choice=names), temperature=1, seed=1)
    for output in smollm2.generate(["A name: "] * 4, params, use_tqdm=False):
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].text in names


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        # A byte that the demo model has no token for, and half a character.
        ({"choice": ["yes", "n\x04"]}, r"choice 'n\x04' cannot be written: .* tokens for '\x04'"),
        ({"choice": ["\ud800"]}, r"choice '\ud800' cannot be written: .* tokens for '\ud800'"),
        ({"regex": "\x04"}, r"regex='\x04': the tokenizer has no token for what must come next"),
    ],
)
def test_what_no_token_can_write_is_refused_by_name(
    smollm2: LLM, constraint: dict[str, Any], said: str
) -> None:
    params = SamplingParams(structured_outputs=structured(**constraint))
    with pytest.raises(RequestError, match="structured_outputs: " + said.replace("\\", r"\\")):
        smollm2.generate("a", params, use_tqdm=False)


def test_what_no_token_can_write_further_on_ends_its_request(smollm2: LLM) -> None:
    params = SamplingParams(structured_outputs=structured(regex="a\x04"))
    (output,) = smollm2.generate("a", params, use_tqdm=False)
    assert r"regex='a\x04': the tokenizer has no token for what must" in str(output.error)


def test_it_needs_a_tokenizer(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=structured(regex="a"))
    with pytest.raises(RequestError, match=r"structured_outputs needs a tokenizer.*skip_tokeniz"):
        llm.generate([[1, 2]], params, use_tqdm=False)


def test_an_added_token_is_a_trigger_and_what_it_is_called_is_text() -> None:
    letters = ["<", ">", "a", "b", *string.digits, *'{}":', "\u0120", "</s>"]
    model = tokenizers.models.BPE({each: i for i, each in enumerate(letters)}, merges=[])
    words = tokenizers.Tokenizer(model)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["</s>"])
    words.add_tokens([tokenizers.AddedToken("<ab>", special=False)])
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=words))
    eos, added = len(letters) - 1, len(letters)
    grammars = Grammars.of(tokenizer, vocab_size=added + 1, eos_token_ids=frozenset([eos]))
    tag = {"begin": "<ab>", "schema": {"type": "object"}, "end": ""}
    tags = structured(structural_tag={"structures": [tag], "triggers": ["<ab>"]})
    assert grammars.compile(tags).matcher().validate_tokens([added, letters.index("{")]) == 2
    spelled = [*map(letters.index, "a<ab>b"), eos]
    choice = grammars.compile(structured(choice=["a<ab>b"])).matcher()
    for token in spelled:
        choice.compute_bitmask()  # which is when a text is forced
        assert choice.consume_token(token), choice.get_error()


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([1], "cannot be served with this tokenizer: .*decoder"),
        ([], "eos_token_id among the 2 ids .*hf_overrides"),
    ],
)
def test_a_tokenizer_that_is_not_known_or_has_no_end_refuses_them(
    ends: list[int], said: str
) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    grammars = Grammars.of(Tokenizer(hf), vocab_size=2, eos_token_ids=frozenset(ends))
    with pytest.raises(RequestError, match=said):
        grammars.compile(structured(regex="a"))


@pytest.fixture(scope="module")
def more_tokens(tmp_path_factory: pytest.TempPathFactory, program_cache: Path) -> LLM:
    """A model whose tokenizer was given tokens that it has no rows for."""
    base = tmp_path_factory.mktemp("base")
    (base / "config.json").write_text(json.dumps(TINY | {"vocab_size": len(CHARACTERS + SPECIAL)}))
    model = add_tokenizer(base, tmp_path_factory.mktemp("more") / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.add_tokens(["yes", *(f"word{i}" for i in range(64))])
    tokenizer.save(str(model / "tokenizer.json"))
    return LLM(
        str(model),
        load_format="dummy",
        max_num_seqs=2,
        max_num_batched_tokens=32,
        compilation_cache_dir=str(program_cache),
        use_tqdm=False,
    )


def test_tokens_that_the_model_does_not_have_are_not_written(more_tokens: LLM) -> None:
    said = ["yes", "word63", "no"]
    constraints = [{"choice": ["yes"]}, {"regex": "word63"}, {"regex": "yes|no"}]
    params = [
        # Also as bad words: there they are what is not written anyway.
        SamplingParams(
            max_tokens=8, bad_words=["yes", "word62"], structured_outputs=structured(**each)
        )
        for each in constraints
    ]
    params[2].logit_bias = {encode("n")[0]: 100.0}
    outputs = more_tokens.generate(["a"] * 3, params, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == said
    pad = SamplingParams(structured_outputs=structured(grammar="start: <pad>"))
    with pytest.raises(RequestError, match="<pad>"):
        more_tokens.generate("a", pad, use_tqdm=False)
