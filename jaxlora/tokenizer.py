"""Text to token ids and back: encode, chat template, incremental detokenization."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from jaxlora.conversation import as_templates_expect
from jaxlora.errors import ModelLoadError, RequestError
from jaxlora.models.checkpoints import Checkpoint, resolve_model
from jaxlora.models.gguf_checkpoint import GGUFCheckpoint
from jaxlora.models.gguf_tokenizer import build_gguf_tokenizer
from jaxlora.token_bytes import TokenBytes, bytes_by_letter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands for a part of a character in text."""
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_LONG = 4096
"""Characters of a text, or ids, above which Python's lock is given up meanwhile."""
_MAX_THREADS = 8
# An unfinished character is at most three bytes, so three tokens. Many more that end in a
# replacement character are broken text, which no later token mends.
_MAX_HELD = 16


class Tokenizer:
    """A fast tokenizer of Hugging Face with its special ids and chat template. Whatever else is
    asked of it (``pad_token_id``, ``convert_tokens_to_ids``, a call) is that one's, as vLLM's
    scripts expect."""

    hf: PreTrainedTokenizerFast
    """The wrapped tokenizer, for what callers ask of it."""
    bos_token_id: int | None
    eos_token_id: int | None
    vocab_size: int
    """Number of tokens, added ones included (the model's table may be padded beyond it)."""

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self.hf = hf
        hf.backend_tokenizer.no_truncation()
        hf.backend_tokenizer.no_padding()
        # On its own transformers leaves those of the latest call switched on.
        self._backend = copy.deepcopy(hf.backend_tokenizer)
        # What a copy leaves out.
        self._backend.encode_special_tokens = hf.split_special_tokens
        self.bos_token_id, self.eos_token_id = hf.bos_token_id, hf.eos_token_id
        self.vocab_size = len(hf)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_tokens: dict[int, str] = {i: token.content for i, token in added.items()}
        """Text of the tokens beside the vocabulary proper, the special ones among them."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A pickle leaves it out as a copy does.
        self._backend.encode_special_tokens = self.hf.split_special_tokens

    if not TYPE_CHECKING:  # Type checkers are to know what it has itself.

        def __getattr__(self, name: str) -> Any:
            if name == "hf" or name.startswith("__"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self.hf, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        return self.hf(*args, **kwargs)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``, with the BOS and EOS that the tokenizer adds unless told not to.

        Raises RequestError if it is no text: half of a surrogate pair stands for nothing.
        """
        try:
            if len(text) <= _LONG:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Only batches let other threads run meanwhile.
            (encoded,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
            return encoded.ids
        except TypeError as error:
            raise RequestError("the text cannot be encoded as UTF-8") from error

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``, or of one, as it is, without cleaning up spaces; unknown ids have
        none."""
        if not isinstance(ids, Iterable):
            ids = [ids]
        if len(ids) <= _LONG:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """What the vocabulary has under an id, None if nothing."""
        return self._backend.id_to_token(token_id)

    def text_of(self, token_id: int) -> str:
        """What a token adds to a text, a special one too. At the beginning of a text some
        tokenizers take a space off."""
        text = self.decode([*self._digit, token_id], skip_special_tokens=False)
        return text[self._digit_len :]

    def encode_within(self, text: str) -> list[int]:
        """The ids of ``text`` where no space is before it, as within a word or at the beginning of
        a line; none if they depend on what is. Some tokenizers put a space before a whole text."""
        ids = self.encode(f"0{text}", add_special_tokens=False)
        count = len(self._digit)
        return ids[count:] if ids[:count] == self._digit else []

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token is that may end within a character, of a vocabulary that is over bytes or
        falls back to them; None of one that is text."""
        token = self.token(token_id) or ""
        if single := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(single[1], 16)])
        byte_of = bytes_by_letter()
        known = bool(token) and set(token) <= byte_of.keys()
        return bytes(byte_of[letter] for letter in token) if known else None

    def least_tokens(self, text: str) -> int:
        """How many ids :meth:`encode` gives at least, without the work; 0 if that is not known."""
        return 0 if self._token_bytes is None else self._token_bytes.least_tokens(text)

    async def encode_aside(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """:meth:`encode`, for long texts on a thread: the event loop goes on. Texts that wait for a
        thread hold up only each other, and not at all once whoever asked is cancelled."""
        if len(text) <= _LONG:
            return self.encode(text, add_special_tokens)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, self.encode, text, add_special_tokens)

    async def decode_aside(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """:meth:`decode`, for many ids on a thread."""
        if len(ids) <= _LONG:
            return self.decode(ids, skip_special_tokens)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, self.decode, ids, skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[True] = True,
        **kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[False],
        **kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt for ``messages``, as OpenAI's API has them, as ids or as text.

        ``kwargs`` go to transformers and from there to the template (``tools``,
        ``chat_template``, ``continue_final_message``, the template's own variables).
        Raises RequestError if there is no template, for messages that have more than text, or with
        the template's own message if it refuses the messages, or what ``kwargs`` make of it.
        """
        if self.hf.chat_template is None and kwargs.get("chat_template") is None:
            raise RequestError(
                "the tokenizer has no chat template: pass chat_template=, or a plain prompt"
            )
        conversation = as_templates_expect(messages)
        try:
            text = cast(
                "str",
                self.hf.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **kwargs,
                ),
            )
        except Exception as error:  # a template is a program, so it may raise anything
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def stream(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> Detokenizer:
        """Incremental detokenization of one sequence that continues ``prompt_ids``.

        Some tokenizers part all tokens by spaces; without ``spaces_between_special_tokens`` added
        tokens that follow each other are not parted.
        """
        return Detokenizer(
            self,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            prompt_ids=prompt_ids,
        )

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where in the text of ``ids`` that of each begins; parts of a character are all where it
        does."""
        stream = self.stream(skip_special_tokens=False)
        lengths = (len(stream.push([token_id])) for token_id in ids)
        return list(itertools.accumulate(lengths, initial=0))[: len(ids)]

    def visible(self, ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        """The ids that decoding looks at: known ones, special ones only if they are not skipped."""
        hidden = self._special_ids if skip_special_tokens else ()
        known = self._backend.id_to_token
        return [i for i in ids if i not in hidden and known(i) is not None]

    @functools.cached_property
    def _digit(self) -> list[int]:
        """The ids of a text that vocabularies join with nothing but digits."""
        return self.encode("0", add_special_tokens=False)

    @functools.cached_property
    def _digit_len(self) -> int:
        """Characters that these are decoded to."""
        return len(self.decode(self._digit, skip_special_tokens=False))

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "jaxlora-tokens")

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes | None:
        return TokenBytes.of(self._backend)


class Detokenizer:
    """Turns ids into text as they come, so that the pieces add up to the text of all ids.

    A token's text depends on its neighbours (a leading space falls away, a character can span
    tokens), so each step decodes the last piece again and takes what the new ids add to it. Text
    that ends in a replacement character is held back: the next token may complete the character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        prompt_ids: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._joined = {} if spaces_between_special_tokens else tokenizer.added_tokens
        self._last_is_joined = False
        # Ids whose text is out, then ids whose text is not; the former only give context.
        self._ids, self._text = self._context_of(prompt_ids)
        self._num_context = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds ids; returns the text that became final, often one token's, sometimes none."""
        new = ""
        for token_id in self._tokenizer.visible(token_ids, self._skip_special_tokens):
            follows, self._last_is_joined = self._last_is_joined, token_id in self._joined
            if follows and self._last_is_joined:
                new += self.flush() + self._joined[token_id]
                self._ids, self._num_context = [token_id], 1
                self._text = self._decode(self._ids)
                continue
            self._ids.append(token_id)
            text = self._decode(self._ids)
            unfinished = (
                text.endswith(REPLACEMENT) and len(self._ids) <= self._num_context + _MAX_HELD
            )
            if text != self._text and not unfinished:
                new += self._take(text)
        return new

    def flush(self) -> str:
        """Returns the text still held back; an unfinished character is U+FFFD."""
        return self._take(self._decode(self._ids)) if len(self._ids) > self._num_context else ""

    def _take(self, text: str) -> str:
        """What ``text`` adds to the context; the ids that were new are the next context."""
        if text.startswith(self._text):
            new = text[len(self._text) :]
        else:
            # The prompt ended within a character, which is whole now.
            new = text[len(self._text.rstrip(REPLACEMENT)) :]
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids)
        self._text = self._decode(self._ids)
        return new

    def _context_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """An end of the prompt, as short as has text and starts with a character, and its text."""
        num_ids = 8
        while True:
            ids = self._tokenizer.visible(prompt_ids[-num_ids:], self._skip_special_tokens)
            text = self._decode(ids)
            if num_ids >= len(prompt_ids) or (text and not text.startswith(REPLACEMENT)):
                return ids, text
            num_ids *= 2

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(
    source: str | Checkpoint, *, revision: str | None = None, download_dir: str | None = None
) -> Tokenizer:
    """The tokenizer of an open checkpoint, of a directory, of a GGUF file or of a hub id.

    Only fast tokenizers are loaded and no code of a repository is run. Raises ModelLoadError if
    there is no tokenizer, or none of that kind.
    """
    if isinstance(source, str):
        path = resolve_model(source, revision=revision, download_dir=download_dir, weights=False)
        if path.is_file():
            source = GGUFCheckpoint(path)
    else:
        path = source.path
    if isinstance(source, GGUFCheckpoint):
        return Tokenizer(build_gguf_tokenizer(source.metadata, str(path)))
    return Tokenizer(_load_directory(path))


def _load_directory(path: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without any of these transformers makes up a vocabulary of three tokens.
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        raise ModelLoadError(
            f"{path} has no tokenizer ({', '.join(_VOCABULARY_FILES)}): give one as `tokenizer`, "
            "or set skip_tokenizer_init and use token ids"
        )
    try:
        hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # tokenizers has no exceptions of its own, and transformers takes files for what they should be.
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {error}): download "
            "its files again, or give another one as `tokenizer`"
        ) from error
    if not isinstance(hf, PreTrainedTokenizerFast):
        raise ModelLoadError(
            f"the tokenizer in {path} is a {type(hf).__name__}, which is not a fast tokenizer: "
            "convert it to a tokenizer.json"
        )
    return hf
