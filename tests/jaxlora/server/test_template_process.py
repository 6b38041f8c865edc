"""Chat templates that take what they can get."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jaxlora.errors import RequestError
from jaxlora.server.template_process import TemplateProcess
from tests.jaxlora.awaited import awaited

MESSAGES = [{"role": "user", "content": "hi \ud83d"}]
DOUBLED = (
    "{% set a = namespace(x='x') %}{% for i in range(50) %}{% set a.x = a.x ~ a.x %}{% endfor %}"
)


@awaited
async def test_templates_that_take_too_much_are_stopped_and_the_next_one_is_rendered() -> None:
    process = TemplateProcess()

    async def render(template: str, **options: Any) -> tuple[int, str]:
        return await process.render(MESSAGES, {"chat_template": template} | options, 50)

    for template, said in (
        ("{% set n = messages|length + 6 %}{{ n**30000000 }}", "takes more than 2 s"),
        ("{{ 7**30000000 }}", "takes more than 2 s"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        ("{{ ('a' * 3000000000)|length }}", "takes more than 512 MiB of memory"),
        (DOUBLED, "takes more than 512 MiB of memory"),
        ("{{ raise_exception('not you') }}", "the chat template refuses these messages: not you"),
    ):
        with pytest.raises(RequestError, match=said):
            await render(template)
        other = "{{ most }} {{ messages[0].content }} {{ add_generation_prompt }}"
        text = "1 hi \ud83d True"
        assert await render(other, most=1) == (len(text), text)
    assert await render("{{ 'a' * 51 }}") == (51, "")
    with pytest.raises(RequestError) as error:
        await render("{{ raise_exception('x' * 6000000) }}")
    assert len(str(error.value)) == 1000
    # Who is not to blame for its end is answered by another one.
    assert process._process is not None
    process._process.kill()
    assert await render("{{ 'a' * 51 }}") == (51, "")
    await process.close()


@awaited
async def test_whatever_waits_for_the_process_does_not_keep_it_from_ending() -> None:
    process = TemplateProcess()
    options = {"chat_template": "{{ 7**30000000 }}"}
    waiting = [asyncio.ensure_future(process.render(MESSAGES, options, 50)) for _ in range(9)]
    await asyncio.sleep(0)
    await process.close()
    assert process._process is None
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert sum(isinstance(end, asyncio.CancelledError) for end in ends) >= 8
