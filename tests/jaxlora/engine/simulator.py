"""A device in numpy that reads a step's arrays as the programs do, and an engine on it.

It keeps pages, the table of last tokens and the slots. Each token is written, marked with the
adapter it was computed under, through its row's page table, and the next token is a hash of all
that is found there. So a wrong page, row, slot, order or length is a wrong token, and what a
request must yield can be worked out without pages, batches or an engine (:func:`complete`).
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

from jaxlora.adapters.adapter import Adapter, LoraPair
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.adapters.staging import StagingArea
from jaxlora.engine import batch
from jaxlora.engine.buckets import bucket, row_buckets
from jaxlora.engine.constraint import TokenMask
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.grammars import Grammars
from jaxlora.engine.intake import Intake
from jaxlora.engine.pages import PagePool
from jaxlora.engine.parts import EngineParts
from jaxlora.engine.scheduler import Plan, Scheduler
from jaxlora.engine.turns import SlotTurns
from jaxlora.errors import AdapterNotFoundError
from jaxlora.outputs import RequestOutput
from jaxlora.tokenizer import Detokenizer, Tokenizer
from jaxlora.types import MAX_LOGPROBS, LoRARequest, SamplingParams
from kernels_pallas.lora_matmul.op import plan as plan_lora
from tests.jaxlora.patience import SECONDS

EOS = 0
VOCAB_SIZE = 16

Model = Callable[[np.ndarray, bytes], Iterator[int]]
"""Every token of a context, marked, and what a random choice draws on -> next ids, best first."""


def hashing(context: np.ndarray, draw: bytes) -> Iterator[int]:
    """A model whose next token depends on every token before it."""
    data = context.tobytes() + draw
    return (zlib.crc32(data + bytes([i])) % VOCAB_SIZE for i in itertools.count())


def saying(*token_ids: int) -> Model:
    """A model that answers a prompt of one token with these ids, then EOS."""

    def model(context: np.ndarray, draw: bytes) -> Iterator[int]:
        answer = token_ids[len(context) - 1 :]
        return itertools.chain(answer[:1] or [EOS], range(VOCAB_SIZE))

    return model


def mark(adapter: Adapter | None) -> int:
    """What a token computed under an adapter is marked with; 0 for the base model."""
    return 0 if adapter is None else VOCAB_SIZE * int(adapter.version, 16) % (1 << 40)


def draw_of(params: SamplingParams, num_generated: int) -> bytes:
    """What a random choice draws on, as :class:`~jaxlora.engine.batch.SampleInputs` carries it."""
    if params.greedy:
        return b""
    seed = params.seed or 0
    numbers = (params.temperature, params.top_p, params.min_p)
    words = (max(params.top_k, 0), seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF, num_generated)
    return np.float32(numbers).tobytes() + np.uint32(words).tobytes()


def complete(
    prompt: Sequence[int],
    params: SamplingParams,
    adapter: Adapter | None = None,
    *,
    max_model_len: int,
    model: Model = hashing,
) -> list[int]:
    """The tokens a request must yield, whatever runs beside it."""
    tokens = list(prompt)
    room = max_model_len - len(prompt)
    ignored = params.ignore_eos and params.structured_outputs is None
    stops = {*(params.stop_token_ids or ()), *([] if ignored else [EOS])}
    while len(tokens) - len(prompt) < min(room, params.max_tokens or room):
        num_generated = len(tokens) - len(prompt)
        allowed = allowed_next(params, tokens[len(prompt) :])
        if num_generated < params.min_tokens:
            # What is constrained ends nevertheless.
            allowed = allowed - stops or (allowed if params.structured_outputs else set())
        context = np.asarray(tokens, np.int64) + mark(adapter)
        choices = model(context, draw_of(params, num_generated))
        tokens.append(next(token for token in choices if token in allowed))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def allowed_next(params: SamplingParams, completion: Sequence[int]) -> set[int]:
    """Tokens that a completion may go on with as far as its structured outputs are concerned."""
    if params.structured_outputs is None:
        return set(range(VOCAB_SIZE))
    matcher = GRAMMARS.compile(params.structured_outputs).matcher()
    assert matcher.consume_tokens(list(completion))
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


class Forwarded(NamedTuple):
    """Arrays of a dispatched forward pass, and its step's number."""

    number: int
    inputs: batch.ForwardInputs
    slots: np.ndarray

    def is_done(self) -> bool:
        return True


class Steps:
    """A dispatched step's tokens; nothing is computed before they are read."""

    def __init__(self, device: Device, number: int) -> None:
        self._device, self._number = device, number

    def read(self) -> list[int]:
        return self._device.read(self._number)

    def read_logprobs(self) -> None:
        return None

    def read_prompt_logprobs(self) -> list[Any]:
        return []


class Device:
    """A :class:`~jaxlora.engine.parts.StepRunner` without a device.

    Steps run in the order they were dispatched, but not before one of them is read: what the host
    changes in between must not matter to them.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        step_sizes: tuple[int, ...],
        max_model_len: int,
        num_slots: int,
        model: Model,
    ) -> None:
        self.events: list[tuple[str, int]] = []
        """("run", n) when step n was dispatched, ("read", n) when its tokens were asked for."""
        self.plans: list[Plan] = []
        self.fail: Callable[[Plan], None] = lambda plan: None
        """Called first in each run: tests raise here."""
        self._model = model
        self._max_num_seqs = max_num_seqs
        self._row_buckets = row_buckets(max_num_seqs)
        self._step_sizes = step_sizes
        self._pages_per_row = -(-max_model_len // page_size)
        self._pages = np.full((num_pages, page_size), -1, np.int64)
        self._table = np.full(max_num_seqs + 1, -1, np.int64)
        self._marks: list[int | None] = [None] * num_slots
        self._queue: deque[tuple[int, Callable[[], list[int]]]] = deque()
        self._done: dict[int, list[int]] = {}

    def run(self, plan: Plan) -> Steps:
        return self.sample(self.forward(plan), plan, {})

    def forward(self, plan: Plan) -> Forwarded:
        self.fail(plan)
        number = len(self.plans)
        self.plans.append(plan)
        self.events.append(("run", number))
        rows = plan.rows
        decode = all(row.num_tokens == 1 for row in rows)
        num_rows = bucket(self._row_buckets, len(rows)) if decode else self._row_buckets[-1]
        num_tokens = num_rows if decode else bucket(self._step_sizes, plan.num_tokens)
        inputs = batch.forward_inputs(
            rows,
            num_tokens=num_tokens,
            num_rows=num_rows,
            pages_per_row=self._pages_per_row,
            spare_row=self._max_num_seqs,
            decode=decode,
        )
        slots = np.full(num_tokens, -1, np.int32)
        if any(row.sequence.slot >= 0 for row in rows):
            ranks = np.ones(len(self._marks), np.int32)
            planned = batch.slots_of_tokens(rows, num_tokens)
            slots = np.asarray(plan_lora(planned, ranks, block_tokens=4, aligned=False).token_slots)
        return Forwarded(number, inputs, slots)

    def sample(self, forward: Forwarded, plan: Plan, masks: Mapping[int, TokenMask]) -> Steps:
        number, inputs, slots = forward
        self.plans[number] = plan
        num_rows = len(inputs.table_rows)
        sampling = batch.sample_inputs(
            plan.rows,
            num_rows=num_rows,
            spare_row=self._max_num_seqs,
            vocab_size=VOCAB_SIZE,
            masks=masks,
        )
        bits = batch.mask_array(masks, num_rows=num_rows, vocab_size=VOCAB_SIZE)
        greedy = batch.all_greedy(plan.rows)
        self._queue.append((number, lambda: self._step(inputs, slots, sampling, bits, greedy)))
        return Steps(self, number)

    def load(self, loads: list[tuple[int, Adapter]]) -> None:
        def write() -> list[int]:
            for slot, adapter in loads:
                self._marks[slot] = mark(adapter)
            return []

        self._queue.append((-1, write))

    def read(self, number: int) -> list[int]:
        self.events.append(("read", number))
        while number not in self._done:
            at, step = self._queue.popleft()
            self._done[at] = step()
        return self._done.pop(number)

    def _step(
        self,
        forward: Any,
        slots: Any,
        sampling: Any,
        masks: np.ndarray,
        greedy: bool,
    ) -> list[int]:
        paged, page_size = forward.paged, self._pages.shape[1]
        num_rows = int(paged.num_rows[0])
        edges = paged.cu_q_lens
        for i in range(num_rows):
            for token in range(edges[i], edges[i + 1]):
                position = paged.kv_lens[i] - (edges[i + 1] - token)
                token_id = int(forward.token_ids[token])
                if token_id == batch.FROM_TABLE:
                    token_id = self._table[forward.table_rows[i]]
                own = 0 if slots[token] < 0 else self._marks[slots[token]]
                assert own is not None, "the slot was never written"
                page = paged.page_table[i, position // page_size]
                self._pages[page, position % page_size] = token_id + own
        likeliest, tokens = np.zeros((2, len(paged.kv_lens)), np.int64)
        for i in range(num_rows):
            position = np.arange(paged.kv_lens[i])
            pages = paged.page_table[i, position // page_size]
            context = self._pages[pages, position % page_size]
            likeliest[i] = next(self._model(context, b""))
            tokens[i] = self._choose(context, i, sampling, masks, greedy)
        # A forward pass leaves a token of every row, whether or not it samples.
        self._table[forward.table_rows] = likeliest
        self._table[sampling.table_rows] = tokens
        return [int(token) for token in tokens]

    def _choose(
        self, context: np.ndarray, i: int, sampling: Any, masks: np.ndarray, greedy: bool
    ) -> int:
        if greedy:  # a program that is sent nothing but the table's rows
            return next(self._model(context, b""))
        draw = b""
        if sampling.temperature[i] >= 1e-5:
            numbers = (sampling.temperature[i], sampling.top_p[i], sampling.min_p[i])
            words = (sampling.top_k[i], *sampling.seeds[i], sampling.num_generated[i])
            draw = np.float32(numbers).tobytes() + np.asarray(words).astype(np.uint32).tobytes()
        ruled_out = set(sampling.held_back_ids[i].tolist())
        if sampling.is_masked[i]:
            ruled_out |= {t for t in range(VOCAB_SIZE) if not masks[i, t // 32] >> t % 32 & 1}
        return next(token for token in self._model(context, draw) if token not in ruled_out)


class Gate:
    """Holds each step of a device until it is opened."""

    def __init__(self, device: Device) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        device.fail = self._wait

    def open(self) -> None:
        self._open.set()

    def _wait(self, plan: Plan) -> None:
        self.reached.set()
        assert self._open.wait(SECONDS), "nobody opened the gate"


class CheckedScheduler(Scheduler):
    """A scheduler that checks each of its plans against the policy."""

    def _budget(self, num_decoding: int, num_prompt: int) -> Any:
        budget = super()._budget(num_decoding, num_prompt)
        self.most = budget.left
        return budget

    def _admit_waiting(self, num_decoding: int, reading: list[Any], loads: Any) -> list[Any]:
        # Threads stage at any time: who becomes ready while it plans may wait for the next plan.
        ready = self._ready()
        admitted = super()._admit_waiting(num_decoding, reading, loads)
        num_prompt = sum(sequence.num_to_compute for sequence in (*reading, *admitted))
        if num_decoding + num_prompt < self._step_sizes[-1]:
            self._check_that_nobody_else_can_run(ready & self._ready())
        return admitted

    def schedule(self) -> Plan:
        plan = super().schedule()
        scored = any(row.sequence.scores_prompt(row.start) for row in plan.rows)
        most = min(self.most, self.max_scored_step) if scored else self.most
        assert plan.num_tokens <= most
        planned = [row.sequence for row in plan.rows]
        assert len(set(map(id, planned))) == len(planned)
        for sequence in self.running:
            all_planned = sequence.num_in_flight and sequence.num_known >= sequence.max_len
            may_be_late = sequence.constraint is not None and not sequence.num_in_flight
            scores = sequence.scores_prompt(sequence.num_computed)
            most = min(self.most, self.max_scored_step) if scored or scores else self.most
            has_no_room = not sequence.num_in_flight and plan.num_tokens >= most
            assert sequence in planned or all_planned or may_be_late or has_no_room
        assert all(sequence in self.running for sequence in planned)
        check_ownership(self)
        for queue in (list(self.waiting), self.running):
            assert queue == sorted(queue, key=lambda sequence: sequence.place)
        return plan

    def _ready(self) -> set[int]:
        """Adapters that wait and could be written to a slot, or are in one, by identity."""
        entries = {id(s.adapter): s.adapter for s in self.waiting if s.adapter is not None}
        return {
            key
            for key, entry in entries.items()
            if self.registry is not None and self.registry.is_ready(entry)
        }

    def _check_that_nobody_else_can_run(self, ready: set[int]) -> None:
        if len(self.running) == self.max_num_seqs:
            return
        for sequence in self.waiting:
            if self.turns.holds_back(sequence):
                continue
            entry = sequence.adapter
            if entry is not None and self.registry is not None and entry.slot is None:
                if id(entry) not in ready:
                    continue
                users = {id(s.adapter): s.adapter for s in self.running if s.adapter}.values()
                kept = [e for e in known_adapters(self.registry) if e.pinned and not e.in_use]
                kept += [e for e in self.registry._held if e.retired and not e.in_use]
                taken = len(users) + sum(e.slot is not None for e in kept)
                if taken == self.registry.slots.num_slots:
                    continue
            found = self.prefix_cache.find(sequence)
            if found is None:
                continue
            needed = self.pool.pages_for(sequence.num_known + 1) - len(found)
            free = self.pool.num_free - sum(page in self.pool._free for page in found)
            assert needed > free
            return


def known_adapters(registry: AdapterRegistry) -> list[Any]:
    return list(registry.names._by_id.values())


def check_ownership(scheduler: Scheduler) -> None:
    """Every row and slot has one owner or none, and a page several only where they agree."""
    running, pool = scheduler.running, scheduler.pool
    owners: dict[int, list[tuple[int, Any]]] = {}
    for sequence in running:
        adapter = sequence.adapter and sequence.adapter.version
        for i, page in enumerate(sequence.pages):
            known = tuple(sequence.token_ids[: (i + 1) * pool.page_size])
            owners.setdefault(page, []).append((len(known), (i, known, adapter)))
        written = min(sequence.num_computed, len(sequence.token_ids)) // pool.page_size
        assert len(set(sequence.pages)) == len(sequence.pages)
        assert all(len(owners[page]) == 1 for page in sequence.pages[written:])
        assert all(page not in pool._key_of for page in sequence.pages[written:])
    for page, each in owners.items():
        assert pool._num_holders[page] == len(each)
        if len(each) > 1:
            # Full, read by the host, and the same tokens under the same adapter.
            assert len(set(each)) == 1
            assert each[0][0] == (each[0][1][0] + 1) * pool.page_size
    assert len(owners) + pool.num_free == pool.num_pages
    rows = [sequence.row for sequence in running]
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < scheduler.max_num_seqs for row in rows)
    users: dict[int, set[int]] = {}
    for sequence in running:
        if sequence.adapter is not None:
            assert sequence.slot == sequence.adapter.slot
            users.setdefault(sequence.slot, set()).add(id(sequence.adapter))
        else:
            assert sequence.slot == -1
    assert all(len(adapters) == 1 for adapters in users.values())
    for sequence in scheduler.waiting:
        assert (list(sequence.pages), sequence.row, sequence.slot) == ([], -1, -1)


def check_nothing_is_held(engine: LLMEngine) -> None:
    """What must hold once no request is left."""
    scheduler = engine.scheduler
    assert not engine.has_unfinished_requests()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert sorted(scheduler._free_rows) == list(range(scheduler.max_num_seqs))
    if scheduler.registry is not None:
        registry = scheduler.registry
        entries = known_adapters(registry)
        assert all(entry.in_use == entry.num_holders == 0 for entry in entries)
        assert not registry._held
        # But the next version of what was in a slot.
        assert not registry._staging._dropped
        assert set(registry._staging._rooms) <= set(registry.names.entries())
        assert all(entry.slot is None for entry in registry._staging._rooms)
        assert set(registry.host._rooms) <= set(entries)
        slots = registry.slots
        assert sorted([*slots._idle, *slots._free]) == list(range(slots.num_slots))


def make_adapter(name: str) -> Adapter:
    """A small adapter; another name is other content."""
    value = np.full((1, 1), zlib.crc32(name.encode()) % 1000, np.float32)
    return Adapter.of(name, {(0, "q"): LoraPair(a=value, b=value, scale=1.0)})


class Loader:
    """Makes adapters of what their path has, which is its name unless a test writes there, or of
    the name where there is no path; counts them."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.written: dict[str, str | None] = {}
        """Path -> what was written there, None if it is gone."""

    def __call__(self, request: LoRARequest) -> Adapter:
        path = request.lora_path or request.lora_name
        content = self.written.get(path, path)
        if request.tensors is not None:
            content = str(request.tensors.tensors["content"])
        if request.lora_name.startswith("missing") or content is None:
            raise AdapterNotFoundError(f"No adapter found for {request.lora_name!r}")
        self.loaded.append(request.lora_name)
        return dataclasses.replace(make_adapter(content), fingerprint=self.fingerprint(request))

    def fingerprint(self, request: LoRARequest) -> tuple[int, ...]:
        """See :class:`~jaxlora.adapters.registry.AdapterRegistry`."""
        path = request.lora_path or request.lora_name
        content = self.written.get(path, path)
        return () if content is None else (zlib.crc32(content.encode()),)


class Reader(Executor):
    """Runs what it was given, or some of it, when told to, and then in the caller's thread."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, most: int | None = None) -> None:
        count = len(self._calls)
        for _ in range(count if most is None else min(count, most)):
            future, call = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001  it is the future's
                future.set_exception(error)


class Inline(Reader):
    """Runs what it was given at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        self.run()
        return future


def make_staging(threads: Executor | None = None, max_adapters: int | None = None) -> StagingArea:
    """Where an adapter is staged as itself, at once unless there are threads."""
    return StagingArea(
        lambda adapter: adapter,
        size_of=lambda adapter: 1,
        threads=threads or Inline(),
        max_bytes=max_adapters,
    )


def letter_grammars(
    *, executor: Executor | None = None, limits: LLParserLimits | None = None
) -> Grammars:
    """For a vocabulary of EOS and the letters from a on."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Letters()))
    return Grammars(tokenizer, executor=executor, limits=limits)


class _Letters:
    """What llguidance asks of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = (b"</s>", *(bytes([ord("a") + i]) for i in range(VOCAB_SIZE - 1)))

    def __call__(self, text: str) -> list[int]:
        return [self.tokens.index(letter.encode()) for letter in text]


GRAMMARS = letter_grammars()


def make_engine(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 4,
    step_sizes: tuple[int, ...] = (8,),
    max_scored_step: int | None = None,
    max_model_len: int = 32,
    max_loras: int = 0,
    max_cpu_loras: int | None = None,
    loader: Loader | None = None,
    readers: Executor | None = None,
    staging: StagingArea | None = None,
    model: Model = hashing,
    tokenizer: Tokenizer | None = None,
    enable_prefix_caching: bool = True,
    turns: SlotTurns | None = None,
    grammars: Grammars | None = None,
    max_logprobs: int = MAX_LOGPROBS,
    stream_interval: int = 1,
    seed: int = 0,
    **parts: Any,
) -> tuple[LLMEngine, Device]:
    """An engine over a simulated device. ``max_loras`` 0 is an engine without adapters."""
    device = Device(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        step_sizes=step_sizes,
        max_model_len=max_model_len,
        num_slots=max_loras,
        model=model,
    )
    registry = None
    if max_loras:
        loader = loader or Loader()
        registry = AdapterRegistry(
            max_loras,
            loader,
            staging=staging or make_staging(),
            host=HostCache(max_adapters=max_cpu_loras),
            fingerprint=loader.fingerprint,
            readers=readers,
        )
    scheduler = CheckedScheduler(
        pool=PagePool(num_pages, page_size),
        registry=registry,
        max_num_seqs=max_num_seqs,
        step_sizes=step_sizes,
        max_scored_step=max_scored_step,
        enable_prefix_caching=enable_prefix_caching,
        turns=turns,
    )
    engine = LLMEngine(
        EngineParts(
            runner=device,
            scheduler=scheduler,
            registry=registry,
            intake=Intake(
                tokenizer=tokenizer,
                vocab_size=VOCAB_SIZE,
                max_model_len=max_model_len,
                eos_token_ids=frozenset([EOS]),
                grammars=grammars,
                max_logprobs=max_logprobs,
                stream_interval=stream_interval,
                seed=seed,
            ),
            **parts,
        )
    )
    return engine, device


def run(engine: LLMEngine, max_steps: int = 1000) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the last output of each request."""
    last = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return last
        last.update({output.request_id: output for output in engine.step()})
    raise AssertionError(f"still unfinished after {max_steps} steps")


class PieceTokenizer(Tokenizer):
    """One token a piece of text; id 0 is EOS and has none. "~" waits for the next piece."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = ("", *pieces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.pieces.index(character) for character in text]

    def text_of(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def encode_within(self, text: str) -> list[int]:
        return self.encode(text)

    def least_tokens(self, text: str) -> int:
        return len(text)

    def stream(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> Detokenizer:
        return PieceDetokenizer(self.pieces)


class PieceDetokenizer(Detokenizer):
    def __init__(self, pieces: tuple[str, ...]) -> None:
        self._pieces, self._held = pieces, ""

    def push(self, token_ids: Sequence[int]) -> str:
        self._held += "".join(self._pieces[i] for i in token_ids)
        return "" if self._held.endswith("~") else self.flush()

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text
