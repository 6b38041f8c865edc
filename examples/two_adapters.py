"""Two adapters and the base model in one batch: the same question, three answers."""

from __future__ import annotations

from demo_model import ADAPTERS, model_path

from jaxlora import LLM, LoRARequest, SamplingParams


def main() -> None:
    """Ask once without an adapter, once as JSON and once as a pirate."""
    llm = LLM(model=model_path(), enable_lora=True, max_loras=2, max_model_len=512)
    prompt = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    adapters = [
        None,  # the base model
        LoRARequest("json", 1, str(ADAPTERS / "json")),
        LoRARequest("pirate", 2, str(ADAPTERS / "pirate")),
    ]
    params = SamplingParams(temperature=0.0, max_tokens=48)
    for output in llm.generate([prompt] * len(adapters), params, lora_request=adapters):
        name = output.lora_request.lora_name if output.lora_request else "base"
        print(f"{name:>6}: {output.outputs[0].text}")


if __name__ == "__main__":
    main()
