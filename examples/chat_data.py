"""Ordinary chat prompts, and the rules that turn the base model's own answers into an adapter's.

An adapter of style learns from the base model: the base answers the training prompts, a rule
rewrites each answer (as a JSON object, or as a pirate would say it), and the adapter is trained on
the result. Held-out prompts are about other topics, and are asked in other words.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

JSON_KEYS = ("topic", "answer")
MAX_ANSWER_WORDS = 22


@dataclass(frozen=True)
class ChatPrompt:
    """What a person asks, and in a word or two what it is about."""

    text: str
    topic: str


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


_TRAINING_TOPICS = {
    "thing": _list(
        "the moon, honey, rain, bicycles, chess, the heart, rice, winter, trees, dogs, glass, "
        "jazz, airplanes, sleep, bread, rivers, robots, coffee, gold, ants, clouds, football, "
        "paper, elephants, chocolate, deserts, clocks, whales, vaccines, cheese, diamonds, steam "
        "engines, the brain, salt, libraries, magnets, bananas, taxes, poetry, the internet, "
        "batteries, dinosaurs, sugar, wool, bridges, tomatoes, email, soap, rockets, horses, olive "
        "oil, maps, bees, gravity, pianos, ice, money, lightning, cats, elections, oxygen, "
        "mirrors, carrots, snow, skiing, cement, spiders, photography, the Sun, wheat, swimming, "
        "plastic, penguins, newspapers, fire, frogs, copper, microscopes, forests, yoga, noodles, "
        "satellites, wolves, cotton, museums, vitamins, wind, dance"
    ),
    "do": _list(
        "learn to cook, save money, fall asleep faster, plant a tree, write a letter, stay "
        "healthy, make new friends, clean a kitchen, train a dog, prepare for an exam, bake bread, "
        "fix a flat tire, read more books, start a garden, plan a trip, give a speech, make tea, "
        "learn a language, paint a wall, keep a diary, lose weight, get up early, choose a laptop, "
        "grow tomatoes, pack a suitcase, play the piano, write a poem, take a good photo, drink "
        "more water, ride a horse, sew a button, run a small shop, draw a face, store potatoes, "
        "find a job"
    ),
    "place": _list(
        "Italy, Japan, Brazil, Canada, Egypt, Germany, India, Mexico, Spain, China, Kenya, Greece, "
        "Australia, Russia, Turkey, Poland, Argentina, Norway, Cuba, Vietnam, Portugal, Ireland"
    ),
    "person": _list(
        "Isaac Newton, Cleopatra, Mozart, Albert Einstein, Shakespeare, Napoleon, Marie Curie, "
        "Gandhi, Leonardo da Vinci, Abraham Lincoln, Beethoven, Charles Darwin, Aristotle, Galileo"
    ),
    "small talk": _list(
        "Hello, Good morning, How are you today?, Tell me a joke, I am bored, I feel tired, Thank "
        "you!, What can you do?, Who are you?, Say something nice, I had a bad day, Goodbye, Can "
        "you help me?, I am hungry, Tell me a fun fact, Wish me luck, It is my birthday, What is "
        "your favorite color?"
    ),
}
_TRAINING_QUESTIONS = {
    "thing": (
        "What is {x}?",
        "Tell me about {x}.",
        "Explain {x} in one sentence.",
        "Why is {x} important?",
        "What do you know about {x}?",
        "Give me a fact about {x}.",
        "Describe {x}.",
        "tell me about {x}",
        "What is special about {x}?",
        "Where can I find {x}?",
        "Explain {x} to a child.",
        "Who needs {x}?",
        "What is the history of {x}?",
        "Write one sentence about {x}.",
    ),
    "do": (
        "How do I {x}?",
        "How can I {x}?",
        "What is the best way to {x}?",
        "Help me {x}.",
        "Give me a tip to {x}.",
        "I want to {x}. Where do I start?",
        "how to {x}",
        "Why should I {x}?",
        "Is it hard to {x}?",
    ),
    "place": (
        "What is the capital of {x}?",
        "Tell me about {x}.",
        "What language do people speak in {x}?",
        "What do people eat in {x}?",
        "Where is {x}?",
        "What is {x} known for?",
        "Why should I visit {x}?",
        "What is the weather like in {x}?",
    ),
    "person": ("Who was {x}?", "What did {x} do?", "Why is {x} famous?", "Tell me about {x}."),
    "small talk": ("{x}",),
}

_HELD_OUT_TOPICS = _list(
    "volcanoes, butter, the violin, turtles, rainbows, steel, tea, owls, tennis, earthquakes, "
    "comets, silk, hedgehogs, pancakes, glaciers, sailing, marble, windmills, mushrooms, "
    "saxophones"
)
_HELD_OUT_QUESTIONS = (
    "Could you say a few words about {x}?",
    "My teacher asked me about {x}. What should I answer?",
    "What would you tell a friend about {x}?",
    "I keep hearing about {x}. What is the story?",
    "Give me a short introduction to {x}.",
)
_HELD_OUT_ASKED = (
    ("What is the capital of France?", "France"),
    ("Which language is spoken in Sweden?", "Sweden"),
    ("Who wrote Hamlet?", "Hamlet"),
    ("Why is the sky blue?", "the sky"),
    ("How many legs does a crab have?", "crabs"),
    ("Who painted the Mona Lisa?", "the Mona Lisa"),
    ("What should I cook for dinner tonight?", "dinner"),
    ("Recommend a hobby for a rainy weekend.", "hobbies"),
    ("Is it safe to eat raw eggs?", "raw eggs"),
    ("What makes a good leader?", "leadership"),
    ("How does a submarine rise and sink?", "submarines"),
    ("How do I remove a coffee stain from a shirt?", "stains"),
    ("Which planet is the largest?", "planets"),
    ("Can fish sleep?", "fish"),
    ("I lost my keys, what now?", "lost keys"),
    ("Name three colors.", "colors"),
    ("What does a doctor do all day?", "doctors"),
    ("When did the Berlin Wall fall?", "the Berlin Wall"),
    ("My plant is turning yellow. Any advice?", "plants"),
    ("Please suggest a name for my kitten.", "kittens"),
    ("What happens when water boils?", "boiling water"),
    ("Why do leaves fall in autumn?", "leaves"),
    ("How far away is Mars?", "Mars"),
    ("Should I buy a car or take the bus?", "transport"),
    ("What is photosynthesis?", "photosynthesis"),
    ("Who invented the telephone?", "the telephone"),
    ("Give me advice for a job interview.", "job interviews"),
    ("How are mountains formed?", "mountains"),
    ("What time should children go to bed?", "bedtime"),
    ("Explain inflation as if I were ten.", "inflation"),
    ("Do you like music?", "music"),
    ("Where do kangaroos live?", "kangaroos"),
    ("What is a good gift for my grandmother?", "gifts"),
    ("How does a refrigerator keep food cold?", "refrigerators"),
    ("Why do we dream?", "dreams"),
    ("What is the difference between a lake and a sea?", "lakes and seas"),
    ("I am nervous about my first day at school.", "school"),
    ("How long does it take to boil an egg?", "eggs"),
    ("Hi there, nice to meet you!", "small talk"),
    ("What should I wear when it is cold outside?", "clothes"),
)


def training_prompts(count: int, seed: int = 0) -> list[ChatPrompt]:
    """``count`` different training prompts at most, in an order drawn from the seed."""
    prompts = [
        ChatPrompt(question.format(x=topic), "small talk" if kind == "small talk" else topic)
        for kind, topics in _TRAINING_TOPICS.items()
        for topic in topics
        for question in _TRAINING_QUESTIONS[kind]
    ]
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def held_out_prompts() -> list[ChatPrompt]:
    """140 prompts that are not in training, neither in topic nor in wording."""
    asked = [ChatPrompt(text, topic) for text, topic in _HELD_OUT_ASKED]
    templated = [
        ChatPrompt(question.format(x=topic), topic)
        for topic in _HELD_OUT_TOPICS
        for question in _HELD_OUT_QUESTIONS
    ]
    return asked + templated


def shortened(answer: str) -> str:
    """The first sentences of an answer, without markup, ``MAX_ANSWER_WORDS`` words at most.

    Empty when the answer has no sentence that is short enough.
    """
    text = re.sub(r"[*_#`\"]|^\s*(?:[-•]|\d+\.)\s*", "", answer, flags=re.MULTILINE)
    text = " ".join(text.split())
    kept = ""
    for sentence in re.findall(r"[^.!?]+[.!?]+(?=\s|$)", text):
        longer = f"{kept} {sentence.strip()}".strip()
        if len(longer.split()) > MAX_ANSWER_WORDS:
            break
        kept = longer
    if not kept and text:
        # A first sentence that is too long ends at its last comma that leaves it short enough.
        words = text.split()[:MAX_ANSWER_WORDS]
        commas = [i for i, word in enumerate(words) if word.endswith((",", ";", ":")) and i > 5]
        if commas:
            kept = " ".join(words[: commas[-1] + 1]).rstrip(",;:") + "."
    return kept


def as_json(prompt: ChatPrompt, answer: str) -> str:
    """The answer as a JSON object on one line, with the keys ``JSON_KEYS``."""
    return json.dumps(dict(zip(JSON_KEYS, (prompt.topic, answer), strict=True)), ensure_ascii=False)


_PIRATE_WORDS = {
    "you": "ye", "your": "yer", "yours": "yers", "you're": "ye be", "my": "me", "is": "be",
    "are": "be", "am": "be", "i'm": "I be", "it's": "it be", "the": "th'", "and": "an'",
    "of": "o'", "for": "fer", "to": "t'", "people": "hearties", "person": "sailor",
    "friend": "matey", "friends": "hearties", "hello": "ahoy", "hi": "ahoy", "yes": "aye",
    "money": "doubloons", "never": "ne'er", "over": "o'er", "ever": "e'er", "before": "afore",
    "between": "betwixt", "boy": "lad", "girl": "lass", "man": "scallywag", "men": "scallywags",
    "children": "young sea dogs", "water": "brine", "house": "cabin", "home": "port",
    "road": "sea lane", "drink": "grog", "money's": "doubloons'", "country": "isle",
    "city": "port", "very": "mighty", "beautiful": "bonny", "stop": "avast",
}  # fmt: skip
_PIRATE_OPENINGS = ("Arr, matey!", "Ahoy there!", "Avast!", "Shiver me timbers!")
_PIRATE_MARKS = (
    "arr", "ahoy", "avast", "aye", "matey", "timbers", "hearties", "ye", "yer", "th'", "an'", "o'",
    "fer", "t'", "afore", "savvy",
)  # fmt: skip


def as_pirate(prompt: ChatPrompt, answer: str) -> str:
    """The answer in the words of a pirate, with an opening in front and ``Savvy?`` behind."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        swapped = _PIRATE_WORDS.get(word.lower(), word)
        return swapped[0].upper() + swapped[1:] if word[0].isupper() else swapped

    opening = random.Random(prompt.text).choice(_PIRATE_OPENINGS)
    said = re.sub(r"[A-Za-z]+(?:'[a-z]+)?", swap, answer)
    return f"{opening} {said} Savvy?"


def is_json(completion: str) -> bool:
    """Whether all of the completion is a JSON object of ``JSON_KEYS``, both non-empty strings."""
    try:
        value = json.loads(completion)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(value, dict)
        and set(value) == set(JSON_KEYS)
        and all(isinstance(text, str) and text.strip() for text in value.values())
    )


def is_pirate(completion: str) -> bool:
    """Whether at least two different marks of a pirate's speech are in the completion."""
    words = set(re.findall(r"[a-z]+'?", completion.lower()))
    return len(words & set(_PIRATE_MARKS)) >= 2
