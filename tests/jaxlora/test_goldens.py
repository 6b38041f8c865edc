"""What PEFT answered once, with every kind of adapter that is served; see goldens/generate.py.

Other tests compare with PEFT itself, as it is now. These need neither PEFT nor torch, and notice if
PEFT changes what it saves.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.engine_args import LORA_EXTRAS

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_every_kind_of_adapter_answers_as_peft_did(base: str) -> None:
    record = json.loads((GOLDENS / base / "goldens.json").read_text())
    llm = LLM(
        str(GOLDENS / base / "base"),
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        lora_extras=LORA_EXTRAS,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    answers = record["answers"]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    outputs = llm.generate(
        [answer["prompt"] for answer in answers.values()],
        params,
        lora_request=[
            None if name == "base" else LoRARequest(name, None, str(GOLDENS / base / name))
            for name in answers
        ],
        use_tqdm=False,
    )
    for (name, answer), output in zip(answers.items(), outputs, strict=True):
        (completion,) = output.outputs
        assert output.error is None
        assert completion.token_ids == answer["tokens"], name
        assert completion.logprobs is not None
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        got = [entries[token].logprob for entries, token in pairs]
        np.testing.assert_allclose(got, answer["logprobs"], atol=2e-5, rtol=2e-5, err_msg=name)
    assert len({tuple(answer["tokens"]) for answer in answers.values()}) > len(answers) / 2
