"""What a start makes of a model's config."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from jaxlora import LLM, SamplingParams
from jaxlora.engine import build
from tests.jaxlora.models.test_llama import tiny_model


@pytest.mark.parametrize(("max_model_len", "window"), [(24, None), (25, 24)])
def test_a_window_that_no_context_exceeds_is_none(
    tmp_path: Path, max_model_len: int, window: int | None
) -> None:
    """Not every kernel of attention has windows."""
    model = tiny_model("mistral window")
    model.save_pretrained(tmp_path)
    with mock.patch.object(
        build, "choose_paged_attention", side_effect=build.choose_paged_attention
    ) as choice:
        llm = LLM(
            str(tmp_path),
            max_model_len=max_model_len,
            max_num_seqs=1,
            max_num_batched_tokens=32,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )
    assert choice.call_args.kwargs["sliding_window"] == window
    prompt, count = [5, 9, 33, 7], max_model_len - 4
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), config)[0, 4:].tolist()
    assert output.outputs[0].token_ids == expected
