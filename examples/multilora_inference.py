"""Drive the engine request by request: base and adapters mixed, more adapters than slots.

Three adapters share two slots on the device. A request whose adapter has no slot waits until one
falls free; requests without an adapter, or with one that is resident, go on meanwhile.
"""

from __future__ import annotations

from collections import deque

from demo_model import ADAPTERS, model_path
from sql_data import PROMPT

from jaxlora import EngineArgs, LLMEngine, LoRARequest, SamplingParams

Request = tuple[str | list[int], SamplingParams, LoRARequest | None]


def requests(engine: LLMEngine) -> deque[Request]:
    """Prompts, each with its sampling parameters and its adapter, or None for the base model."""
    assert engine.tokenizer is not None  # only skip_tokenizer_init=True leaves it out
    question = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which planet is the largest?"}], add_generation_prompt=True
    )
    sql = PROMPT.format(
        context="CREATE TABLE table_name_11 (nationality VARCHAR, elector VARCHAR)",
        question="When Anchero Pantaleone was the elector what is under nationality?",
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=48)
    warm = SamplingParams(temperature=0.7, seed=7, max_tokens=48)
    json = LoRARequest("json", 1, str(ADAPTERS / "json"))
    pirate = LoRARequest("pirate", 2, str(ADAPTERS / "pirate"))
    text_to_sql = LoRARequest("sql", 3, str(ADAPTERS / "sql"))
    return deque(
        [
            (question, greedy, None),
            (question, greedy, json),
            (question, greedy, pirate),
            (sql, greedy, text_to_sql),
            (question, warm, None),
            (question, warm, pirate),
            (sql, greedy, None),
            (question, warm, json),
        ]
    )


def main() -> None:
    """Add a request before each step while there are any, and print each one that is finished."""
    engine = LLMEngine.from_engine_args(
        EngineArgs(model=model_path(), enable_lora=True, max_loras=2, max_model_len=512)
    )
    waiting = requests(engine)
    request_id = 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params, lora_request = waiting.popleft()
            engine.add_request(str(request_id), prompt, params, lora_request=lora_request)
            request_id += 1
        for output in engine.step():
            if output.finished:
                name = output.lora_request.lora_name if output.lora_request else "base"
                print(f"{output.request_id} {name:>6}: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
