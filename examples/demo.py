"""What ``make demo`` runs: the same prompts through the base model and every adapter, in one batch.

Prints prompts against adapters as a table, the tokens a second, and how many programs were compiled
after warm-up. The exit status is 1 if that number is not 0.
"""

from __future__ import annotations

import sys
import textwrap
import time

from demo_model import ADAPTERS, model_path
from sql_data import PROMPT

from jaxlora import LLM, LoRARequest, SamplingParams

WIDTH = 100
QUESTIONS = (
    "What is the capital of France?",
    "Why do leaves fall in autumn?",
    "What should I cook for dinner tonight?",
)
SCHEMA = "CREATE TABLE table_name_11 (nationality VARCHAR, elector VARCHAR)"
SQL_QUESTION = "When Anchero Pantaleone was the elector what is under nationality?"
NAMES = ("sql", "json", "pirate")


def main() -> int:
    """Generate, print, and return the exit status."""
    llm = LLM(
        model=model_path(),
        enable_lora=True,
        max_loras=len(NAMES),
        max_model_len=512,
        max_num_seqs=16,
    )
    compiled = llm.get_metrics()["jaxlora:compilations_total"]

    tokenizer = llm.get_tokenizer()
    prompts: dict[str, str | list[int]] = {
        question: tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in QUESTIONS
    }
    prompts[f"{SCHEMA}: {SQL_QUESTION}"] = PROMPT.format(context=SCHEMA, question=SQL_QUESTION)
    adapters = [None, *(LoRARequest(n, i, str(ADAPTERS / n)) for i, n in enumerate(NAMES, 1))]

    start = time.perf_counter()
    outputs = llm.generate(
        [prompt for prompt in prompts.values() for _ in adapters],
        SamplingParams(temperature=0.0, max_tokens=48),
        lora_request=adapters * len(prompts),
    )
    seconds = time.perf_counter() - start

    columns = ("base", *NAMES)
    answers = [" ".join(output.outputs[0].text.split()) for output in outputs]
    print(table(list(prompts), columns, answers))
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    compilations = int(llm.get_metrics()["jaxlora:compilations_total"] - compiled)
    print(
        f"{len(outputs)} requests in one batch: {tokens} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:.0f} tokens/s; compilations after warm-up: {compilations}"
    )
    return 0 if compilations == 0 else 1


def table(prompts: list[str], columns: tuple[str, ...], answers: list[str]) -> str:
    """A row of answers, one a column, under each prompt; ``answers`` goes row by row."""
    width = (WIDTH - 3 * (len(columns) - 1)) // len(columns)

    def row(cells: list[str]) -> str:
        lines = [textwrap.wrap(cell, width) or [""] for cell in cells]
        height = max(map(len, lines))
        padded = [cell + [""] * (height - len(cell)) for cell in lines]
        return "\n".join(
            " | ".join(line.ljust(width) for line in level).rstrip()
            for level in zip(*padded, strict=True)
        )

    rule = "-+-".join("-" * width for _ in columns)
    parts = [row(list(columns)), "=" * WIDTH]
    for i, prompt in enumerate(prompts):
        parts += [textwrap.fill(f"> {prompt}", WIDTH), rule]
        parts += [row(answers[i * len(columns) : (i + 1) * len(columns)]), "=" * WIDTH]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
