# ruff: noqa: RUF001
"""Texts on which tokenizers disagree if they disagree anywhere."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "   ",
    "Hello world",
    "  two leading spaces, two trailing  ",
    "tabs\tand\n\nnew lines\r\n\r\n and \u00a0 odd \u2003 spaces\n",
    "I'm sure they'll say it's FINE, DON'T you? We'VE seen 'em",
    "don’t use straight quotes…",
    "0 1 12 123 1234567890 3.14159 1,000,000 0xDEADBEEF 1e-05",
    "Roman Ⅷ, fractions ½⅓, superscript x², Arabic ١٢٣",
    "def f(x: int) -> int:\n    if x:\n        return x**2  # square\n    return {'a': [x]}['a']",
    "SELECT name, COUNT(*) FROM t WHERE a >= 10 AND b != 'x''y' GROUP BY name;",
    '<html><body class="a">&nbsp;</body></html> https://example.org/a?b=c&d=%20#e',
    "Grüße aus Köln, ça va? naïve façade, Škoda",
    "Привет, мир! Γειά σου",
    "日本語のテキストです。 你好，世界！ 안녕하세요",
    "مرحبا بالعالم שלום नमस्ते สวัสดี",
    "😀 👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f 𝕏",
    "control \x00\x01\x7f and \ufffd and private \ue000 and \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!???.....-----=====",
    "MixedCASE camelCaseWords snake_case_words kebab-case-words",
    "line one\nline two\n\n\nline five\n    indented\n\ttabbed\n",
)
DECOMPOSED = "cafe\u0301 A\u030angstro\u0308m \u1100\u1161\u11a8"
"""Text that Unicode normalization form C changes."""
