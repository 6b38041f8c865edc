"""Generate with one model, offline: a text to complete, and a question to answer."""

from __future__ import annotations

from demo_model import model_path

from jaxlora import LLM, SamplingParams


def main() -> None:
    """Complete two texts in one batch, then answer a question by the model's chat template."""
    llm = LLM(model=model_path(), max_model_len=512)

    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=32)
    for output in llm.generate(["My favourite season is", "Once upon a time"], params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

    question = {"role": "user", "content": "What is the capital of France?"}
    [answer] = llm.chat([question], SamplingParams(temperature=0.0, max_tokens=32))
    print(f"{question['content']!r} -> {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main()
