"""The policy is checked against PEFT's own table of options and its own matching of names."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from jaxlora.adapters import peft_config, peft_patterns
from jaxlora.adapters.peft_config import PeftConfig
from jaxlora.errors import AdapterRefusedError

MODULES = [
    f"model.layers.{layer}.{linear}"
    for layer in (0, 1, 10, 11)
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
] + ["model.embed_tokens", "lm_head"]
Q0 = MODULES[0]

# A value of each option that would change what the adapter computes, and its refusal.
REFUSED: dict[str, tuple[Any, str]] = {
    "peft_type": ("LOHA", "peft_type='LOHA'"),
    "r": (0, "r=0 is not a positive integer"),
    "lora_alpha": (math.nan, "lora_alpha=nan is not a finite number"),
    "use_rslora": (1, "use_rslora=1 is not true or false"),
    "rank_pattern": ({"q_proj": 0}, "rank_pattern="),
    "alpha_pattern": ({"q_proj": math.inf}, "alpha_pattern="),
    "target_modules": ([1], "target_modules="),
    "exclude_modules": (3, "exclude_modules="),
    "layers_to_transform": (["1"], "layers_to_transform="),
    "layers_pattern": ([0], "layers_pattern="),
    "init_lora_weights": (
        "loftq",
        "init_lora_weights='loftq' .*not for LoftQ.*serve the changed base",
    ),
    "use_dora": ("yes", "use_dora='yes' is not true or false"),
    "lora_bias": (1, "lora_bias=1 is not true or false"),
    "ensure_weight_tying": ("no", "ensure_weight_tying='no' is not true or false"),
    "modules_to_save": (
        ["lm_head", "score"],
        r"Unsupported modules_to_save: \['lm_head', 'score'\]",
    ),
    "trainable_token_indices": ({"norm": [1]}, "trainable_token_indices=.* different token ids"),
    "bias": ("all", r"Adapter bias is not supported\. \(bias='all'\)"),
    "fan_in_fan_out": (True, "fan_in_fan_out=True"),
    "layer_replication": ([[0, 2]], "layer_replication="),
    "megatron_config": ({"hidden_size": 64}, "megatron_config="),
    "corda_config": ({}, "corda_config="),
    "alora_invocation_tokens": ([5], "alora_invocation_tokens="),
    "use_bdlora": ({}, "BD-LoRA"),
    "use_qalora": (True, "QA-LoRA"),
    "velora_config": ({}, "VeLoRA"),
    "monteclora_config": ({}, "MonteCLoRA"),
    "arrow_config": ({}, "Arrow"),
    "kasa_config": ({}, "KaSA"),
    "target_parameters": (["mlp.experts.down_proj"], "target_parameters="),
}
# Values of options that are spent once the adapter is trained.
INERT: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "auto_mapping": {"parent_library": "transformers"},
    "peft_version": "99",
    "base_model_name_or_path": "somebody/model",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.5,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_core": "my.core",
    "qalora_group_size": 32,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 1.0},
    "lora_ga_config": {"direction": "ArB2r"},
}


def test_the_table_has_the_options_of_peft_with_their_defaults() -> None:
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert peft_config._OPTIONS.keys() == fields.keys()
    config = peft.LoraConfig()
    for key, option in peft_config._OPTIONS.items():
        # Filled in by PEFT itself, or dropped when it saves.
        if key not in ("peft_version", "runtime_config"):
            assert option.default == getattr(config, key), key


def test_every_option_is_either_refused_for_some_value_or_inert() -> None:
    assert REFUSED.keys() | INERT.keys() == peft_config._OPTIONS.keys()
    assert not REFUSED.keys() & INERT.keys()


def test_the_defaults_of_peft_are_served() -> None:
    config = PeftConfig.from_dict(peft.LoraConfig().to_dict())
    assert config.place([Q0])[Q0] == peft_config.Placement(rank=8, scale=1.0, left_out_by=None)


@pytest.mark.parametrize("key", REFUSED)
def test_an_option_that_changes_the_mathematics_is_refused_by_name(key: str) -> None:
    value, message = REFUSED[key]
    with pytest.raises(AdapterRefusedError, match=message):
        PeftConfig.from_dict({key: value})


def test_spent_options_are_ignored() -> None:
    PeftConfig.from_dict(INERT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", None),
        ("modules_to_save", []),
        ("trainable_token_indices", []),
        ("trainable_token_indices", {}),
        ("layer_replication", False),
        ("rank_pattern", None),
        ("alpha_pattern", None),
        ("layers_pattern", ""),
        ("layers_to_transform", []),
        ("init_lora_weights", False),
        ("init_lora_weights", "Gaussian"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_values_without_an_effect_are_served(key: str, value: Any) -> None:
    PeftConfig.from_dict({key: value})


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_options_that_are_off_are_ignored(value: Any) -> None:
    PeftConfig.from_dict({"use_next_years_lora": value})


@pytest.mark.parametrize("value", [True, 1, "on", [0], {"rank": 1}])
def test_unknown_options_that_are_on_are_refused_by_name(value: Any) -> None:
    with pytest.raises(AdapterRefusedError, match=r"use_next_years_lora=.* does not know"):
        PeftConfig.from_dict({"use_next_years_lora": value})


def test_of_very_many_reasons_some_are_given() -> None:
    with pytest.raises(AdapterRefusedError, match=r"option_19=.* 80 more options are refused"):
        PeftConfig.from_dict({f"option_{i:02}": True for i in range(100)})


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(AdapterRefusedError, match=r"use_dora.*Adapter bias.*pissa"):
        PeftConfig.from_dict({"use_dora": 3, "bias": "all", "init_lora_weights": "pissa"})


@pytest.mark.parametrize(
    "value",
    [
        *([1, 1], [-1], ["1"], [True], 3, "12"),
        *({"lm_head": []}, {"lm_head": 1}, {"embed_tokens": [1], "model.embed_tokens": [2]}),
    ],
    ids=repr,
)
def test_token_indices_that_make_no_sense_are_refused(value: Any) -> None:
    with pytest.raises(AdapterRefusedError, match="trainable_token_indices="):
        PeftConfig.from_dict({"trainable_token_indices": value})


def test_messages_stay_short() -> None:
    with pytest.raises(AdapterRefusedError) as error:
        PeftConfig.from_dict({"modules_to_save": ["x" * 10_000] * 10_000})
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "config",
    [
        {"layers_pattern": "layers"},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    ],
)
def test_combinations_that_peft_rejects_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_"):
        peft.LoraConfig(**config)
    with pytest.raises(AdapterRefusedError, match="as in PEFT"):
        PeftConfig.from_dict(config)


def test_a_pattern_of_layers_may_stand_beside_no_layers_as_in_peft() -> None:
    config: Any = {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": "x"}
    assert check_target_module_exists(peft.LoraConfig(**config), Q0)
    assert PeftConfig.from_dict(config).place([Q0])[Q0].left_out_by is None


def test_a_bias_and_dora_exclude_each_other_as_in_peft() -> None:
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.LoraConfig(lora_bias=True, use_dora=True)
    with pytest.raises(AdapterRefusedError, match="lora_bias and use_dora exclude each other"):
        PeftConfig.from_dict({"lora_bias": True, "use_dora": True})


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    config = {"r": 13, "lora_alpha": 16, "rank_pattern": {"k_proj": 3}}
    k0 = MODULES[1]
    plain = PeftConfig.from_dict(config).place([Q0, k0])
    assert (plain[Q0].scale, plain[k0].scale) == (16 / 13, 16 / 3)
    stable = PeftConfig.from_dict(config | {"use_rslora": True}).place([Q0, k0])
    assert (stable[Q0].scale, stable[k0].scale) == (16 / math.sqrt(13), 16 / math.sqrt(3))
    assert PeftConfig.from_dict(config | {"use_rslora": None}).place([Q0, k0]) == plain


# Pieces of which patterns and names are made that match often, and in more ways than one.
PIECES = (
    r"model|layers|0|1|10|self_attn|mlp|q_proj|k_proj|up_proj|proj|\.|.|.*|.+|.*?|\d+|[qk]|(q|up)|^|$"
    r"|(?:0|1)|(0)?|_proj|\w"
)
patterns = st.lists(
    st.sampled_from([p for p in re.split(r"\|(?![^(]*\))", PIECES) if p]), min_size=1, max_size=5
).map("".join)
names = st.lists(
    st.sampled_from(["q_proj", "proj", "mlp.up_proj", "0.self_attn.q_proj", *MODULES]), max_size=3
)


def is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(patterns.filter(is_regex), st.integers(1, 99), max_size=4))
def test_rank_patterns_match_as_in_peft(ranks: dict[str, int]) -> None:
    placed = PeftConfig.from_dict({"rank_pattern": ranks}).place(MODULES)
    for module in MODULES:
        assert placed[module].rank == ranks.get(get_pattern_key(list(ranks), module), 8)


@settings(max_examples=300, deadline=None)
@given(
    targets=names | patterns.filter(is_regex) | st.just("all-linear"),
    excluded=st.none() | names | patterns.filter(is_regex),
    layers=st.none() | st.sampled_from([0, 1, 10]) | st.lists(st.sampled_from([0, 1, 10])),
    layers_pattern=st.none() | patterns.filter(is_regex) | st.sampled_from(["layers", "blocks"]),
)
def test_modules_are_targeted_as_in_peft(
    targets: Any, excluded: Any, layers: Any, layers_pattern: Any
) -> None:
    if isinstance(targets, str) or layers is None:
        layers = layers_pattern = None
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
    }
    reference: Any = peft.LoraConfig(**config)
    if targets == "all-linear":
        reference.target_modules = set(MODULES[:-2])  # what PEFT makes of it on a model
    for module, placement in PeftConfig.from_dict(config).place(MODULES).items():
        is_target = bool(check_target_module_exists(reference, module))
        assert (placement.left_out_by is None) == is_target, module


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "[", "*", "(?P<idx>a", "a" * 20_000, "(" * 3000),
        # What only the matcher used here would take.
        *(r"q\m", r"\p{L}", r"\Kq", "(?|q|k)", "(?R)?q", "(?<n>q)", "(?P>n)", "(?b)q", "(?e:q)"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with contextlib.suppress(re.error, RecursionError):
        assert len(re.compile(pattern).pattern) > 10_000
    with pytest.raises(AdapterRefusedError, match=r"pattern .*(not a regular expression|at most)"):
        PeftConfig.from_dict({"rank_pattern": {pattern: 4}}).place([Q0])


def test_syntax_that_peft_has_is_taken() -> None:
    escapes = [rf"\{letter}" for letter in "AbBdDsSwWZafnrtv"] + [r"\x71", r"\u0071", r"\.", r"\-"]
    groups = ["(?:q)", "(?=q)", "(?!k)", "(?<=q)_", "(?<!k)_", "(?P<n>q)(?P=n)?", "(?i:Q)", "(?#x)"]
    groups += ["(?>q)", "(q)?(?(1)_|k)", "(?s-i:.)"]
    for pattern in (*escapes, *groups, "q{1}", "q{,2}_", "[^]q]", r"[\]q]"):
        ranks = {pattern: 4, ".*q_proj": 5}
        placed = PeftConfig.from_dict({"rank_pattern": ranks}).place([Q0])
        assert placed[Q0].rank == ranks.get(get_pattern_key(list(ranks), Q0), 8), pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "layers.{i}.self_attn.q_proj",
        "q_proj{e}",
        "(q|k)_proj{s<=2}",
        r"\\{i}",
        r"layers\.[[:digit:]]\.self_attn\.q_proj",
    ],
)
def test_a_pattern_that_peft_reads_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterRefusedError, match=r"pattern .* a brace that begins no count, or"):
        PeftConfig.from_dict({"alpha_pattern": {pattern: 4}}).place([Q0])
    escaped = re.sub(r"(?<!\\)(\\\\)*(?=[{]|\[:)", r"\g<0>\\", pattern)
    ranks = {escaped: 4, r"layers\.0{1}\.self_attn\.q_proj": 5}
    placed = PeftConfig.from_dict({"rank_pattern": ranks}).place([Q0])
    assert placed[Q0].rank == ranks.get(get_pattern_key(list(ranks), Q0), 8) == 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:q?){99999999}",
        "(?:(?:q?){1000}){1000}",
        "(?:" + "q?" * 2000 + "){10}",
        "q{0000000000099999999,}",
        "q{" + "9" * 5000 + "}",
        "q{30}" * 1000,
        "(?:(?:[)]|q?){200}){200}",
        "(?:qqqqqqqqqq(?#(){2}){2000}",
        "(?x:qqqqqqqqqq#(\n){2000}",
    ],
)
def test_a_pattern_that_would_be_compiled_for_long_is_refused(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is one call, which has no limit of time and lets no other thread run."""
    monkeypatch.setattr("regex.compile", None)
    with pytest.raises(AdapterRefusedError, match=r"pattern .* more than the 20000 that are acc"):
        PeftConfig.from_dict({"rank_pattern": {pattern: 4}}).place([Q0])


def test_counts_beside_each_other_are_added_and_only_nested_ones_multiplied() -> None:
    pattern = "|".join(rf"layers\.{i}\d{{2}}\..*" for i in range(9)) + r"|layers\.[(\d]{1,3}\..*"
    ranks = {pattern: 4, ".*q_proj": 5}
    placed = PeftConfig.from_dict({"rank_pattern": ranks}).place([Q0])
    assert placed[Q0].rank == ranks[get_pattern_key(list(ranks), Q0)] == 4


def test_a_pattern_that_would_take_forever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_patterns, "_MATCH_SECONDS", 0.2)
    config = PeftConfig.from_dict({"rank_pattern": {"(?:.|..|...)+[xyz!]": 4}})
    start = time.monotonic()
    with pytest.raises(AdapterRefusedError, match=r"takes too long to match.* 0\.2 s in all"):
        config.place([Q0])
    assert time.monotonic() - start < 10


def test_many_names_and_patterns_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_patterns, "_MATCH_SECONDS", 0.2)
    modules = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(32) for kind in "qkvo"]
    names = [f"x{i}" for i in range(50_000)]
    started = time.process_time()
    placements = PeftConfig.from_dict({"target_modules": [*names, "q_proj"]}).place(modules)
    assert sum(placement.left_out_by is None for placement in placements.values()) == 32
    ranks = dict.fromkeys(names, 4)
    with pytest.raises(AdapterRefusedError, match="takes too long to match"):
        PeftConfig.from_dict({"rank_pattern": ranks}).place(modules)
    assert time.process_time() - started < 5
