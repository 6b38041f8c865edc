"""Chat templates of several adapters at once: a bad one costs its own adapter only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from jaxlora.adapters.chat_template import ChatTemplates
from jaxlora.errors import RequestError
from jaxlora.server import template_process
from jaxlora.server.template_pool import AdapterTemplates, TemplatePool
from tests.jaxlora.awaited import awaited

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GOOD = "{{ messages[0].content }}!"


@contextlib.asynccontextmanager
async def pool() -> AsyncIterator[TemplatePool]:
    made = TemplatePool()
    made.start()
    while made._idle.qsize() < len(made._processes):
        await asyncio.sleep(0.001)
    try:
        yield made
    finally:
        await made.close()


async def chat(adapter: AdapterTemplates) -> str:
    try:
        _, text = await adapter.render([{"role": "user", "content": "hi"}], {"tools": None}, 50)
    except RequestError as error:
        return str(error)
    return text


@awaited
async def test_an_adapter_with_many_slow_chats_leaves_processes_to_others() -> None:
    async with pool() as templates:
        bad, good = (AdapterTemplates(ChatTemplates(text), templates) for text in (ENDLESS, GOOD))
        slow = [asyncio.ensure_future(chat(bad)) for _ in range(9)]
        await asyncio.sleep(0)
        assert await chat(good) == "hi!"
        assert sum(each.done() for each in slow) < 3
        # Who leaves gives up the place in the line.
        for each in slow[1:]:
            each.cancel()
        assert "takes more than 2 s" in await slow[0]
        assert await chat(good) == "hi!"


@awaited
async def test_adapters_that_were_slow_never_have_the_last_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 1.0)
    async with pool() as templates:
        bad = [AdapterTemplates(ChatTemplates(ENDLESS), templates) for _ in range(4)]
        await asyncio.gather(*map(chat, bad))
        good = AdapterTemplates(ChatTemplates(GOOD), templates)
        slow = [asyncio.ensure_future(chat(each)) for each in bad * 4]
        await asyncio.sleep(0)
        for _ in range(8):
            assert await chat(good) == "hi!"
        assert sum(each.done() for each in slow) < 8
        for each in slow:
            each.cancel()


@awaited
async def test_a_chat_whose_client_left_has_its_process_until_it_ends() -> None:
    async with pool() as templates:
        bad = AdapterTemplates(ChatTemplates(ENDLESS), templates)
        slow = asyncio.ensure_future(chat(bad))
        async with templates.process(is_slow=False), templates.process(is_slow=False):
            while templates._idle.qsize():
                await asyncio.sleep(0)
            slow.cancel()
            async with templates.process(is_slow=False) as process:
                assert process.seconds  # It has ended.
