"""One served process, as a user starts it, through the real openai package over HTTP."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from conftest import HELLO, scripted_gemini, sdk, serving, write_accounts
from fake_gemini import FakeGemini, error, said

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[FakeGemini, str]]:
    """A gateway's base URL, and the Gemini behind it."""
    folder = tmp_path_factory.mktemp("served")
    async with scripted_gemini() as gemini, serving(folder) as serve:
        process = await serve("--accounts", write_accounts(folder, gemini), "--port", "0", "--log-level", "error")
        yield gemini, await process.wait_for(r"base URL +(\S+)")


@pytest_asyncio.fixture(loop_scope="module")
async def ai(served: tuple[FakeGemini, str]) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of the gateway, none of whose accounts rests."""
    url = served[1].removesuffix("/v1")
    async with aiohttp.ClientSession(url, raise_for_status=True) as session:
        for name in ("a", "b"):
            await (await session.post("/agproxy/pool", json={"action": "reset", "account": name})).read()
    async with sdk(served[1]) as client:
        yield client


@pytest.fixture
def gemini(served: tuple[FakeGemini, str]) -> FakeGemini:
    """The Gemini behind the gateway, which has heard nothing yet."""
    fake = served[0]
    fake.script, fake.keys, fake.bodies, fake.echo = [], [], [], False
    return fake


async def test_chat_and_its_headers(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("Hel", "lo")]
    raw = await ai.chat.completions.with_raw_response.create(**HELLO)
    assert raw.headers["X-Mapped-Model"] == "gemini-2.5-flash"
    assert re.fullmatch(r"req_[0-9a-f]{24}", raw.headers["x-request-id"])
    answer = raw.parse()
    assert (answer.choices[0].message.content, answer.model) == ("Hello", "gpt-4o")


async def test_a_stream_is_collected_by_the_sdk(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("Hel", "lo")]
    async with ai.chat.completions.stream(**HELLO, stream_options={"include_usage": True}) as stream:
        answer = await stream.get_final_completion()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7


async def test_two_choices_are_two_calls(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("x"), said("x")]
    async with ai.chat.completions.stream(**HELLO, n=2) as stream:
        answer = await stream.get_final_completion()
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "x", "stop"),
        (1, "x", "stop"),
    ]


async def test_responses_by_the_sdk(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("Hel", "lo"), said("Hel", "lo", reason="MAX_TOKENS")]
    answer = await ai.responses.create(model="gpt-4o", input="hi", instructions="Be brief.")
    assert answer.output_text == "Hello"
    assert gemini.bodies[0]["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    async with ai.responses.stream(model="gpt-4o", input=[{"role": "user", "content": "hi"}]) as stream:
        types = [event.type async for event in stream]
        last = await stream.get_final_response() if types[-1] == "response.completed" else None
    assert (types[0], types[-1], last) == ("response.created", "response.incomplete", None)


async def test_completions_by_the_sdk(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("x") for _ in range(4)]
    answer = await ai.completions.create(model="gpt-3.5-turbo-instruct", prompt=["a", "b"], n=2, echo=True)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ax"), (1, "ax"), (2, "bx"), (3, "bx")]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([error(400, "INVALID_ARGUMENT", "No.")], openai.BadRequestError),
        ([error(404, "NOT_FOUND", "No such model.")] * 2, openai.NotFoundError),
        ([error(429, "RESOURCE_EXHAUSTED", "Slow down.")] * 2, openai.RateLimitError),
        ([error(401, "UNAUTHENTICATED", "Who?")] * 2, openai.InternalServerError),
        ([error(503, "UNAVAILABLE", "Overloaded.")] * 3, openai.InternalServerError),
    ],
)
async def test_each_failure_is_the_sdks_own_class(
    steps: list[Any], expected: type[openai.APIStatusError], ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = steps
    with pytest.raises(expected):
        await ai.chat.completions.create(**HELLO)
    assert gemini.script == []


async def test_fifty_at_once_are_not_mixed(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.echo = True

    async def ask(number: int) -> str | None:
        messages: Any = [{"role": "user", "content": f"n{number}"}]
        stream = await ai.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(ask(number) for number in range(50)))
    assert answers == [f"n{number}" for number in range(50)]


async def test_the_first_account_is_limited_and_the_second_answers(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Slow down."), said("b")]
    raw = await ai.chat.completions.with_raw_response.create(**HELLO)
    assert (raw.headers["X-Attempts"], raw.headers["X-Account-Email"]) == ("2", "b")
    assert gemini.keys == ["key-a", "key-b"]
