"""LangChain's ChatOpenAI over a real socket: tools, structured output, streaming, embeddings."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_gemini import FakeGemini, answer, call, said
from own_listener import OwnListener
from pydantic import BaseModel

import antigravity_proxy as agproxy

langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed (extra: clients)")
pytestmark = pytest.mark.filterwarnings("ignore")  # LangChain's own deprecations


@pytest.fixture
async def settings(gemini: FakeGemini) -> AsyncIterator[dict[str, Any]]:
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),)))
    async with OwnListener(app) as server, openai.DefaultAsyncHttpxClient() as http:
        yield {"base_url": str(server.make_url("/v1")), "api_key": "unused", "http_async_client": http}


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Any:
    return langchain.ChatOpenAI(
        model="gemini-2.5-flash",
        max_retries=0,
        stream_usage=True,
        use_responses_api=request.param,
        output_version="responses/v1" if request.param else None,
        **settings,
    )


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int | None = None


async def test_a_tool_is_called_and_answered(chat: Any, gemini: FakeGemini) -> None:
    gemini.script = [answer(call("Weather", city="Bern")), said("Sunny.")]
    first = await chat.bind_tools([Weather]).ainvoke("weather in Bern?")
    assert [(one["name"], one["args"]) for one in first.tool_calls] == [("Weather", {"city": "Bern"})]
    result = {"role": "tool", "tool_call_id": first.tool_calls[0]["id"], "content": "sun"}
    second = await chat.bind_tools([Weather]).ainvoke([("user", "weather in Bern?"), first, result])
    assert second.text == "Sunny."


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_structured_output(method: str, chat: Any, gemini: FakeGemini) -> None:
    calling = answer(call("Weather", city="Bern", days=2))
    gemini.script = [calling if method == "function_calling" else said('{"city": "Bern", "days": 2}')]
    made = await chat.with_structured_output(Weather, method=method).ainvoke("weather in Bern, as JSON")
    assert made == Weather(city="Bern", days=2)


async def test_a_stream_of_text_and_usage(chat: Any, gemini: FakeGemini) -> None:
    gemini.script = [said("Hel", "lo", " wörld")]
    chunks = [chunk async for chunk in chat.astream("hi")]
    assert "".join(chunk.text for chunk in chunks) == "Hello wörld"
    assert chunks[-1].usage_metadata or any(chunk.usage_metadata for chunk in chunks)


async def test_a_stream_of_tool_calls(chat: Any, gemini: FakeGemini) -> None:
    gemini.script = [answer({"text": "So"}, call("Weather", city="Bern"), call("Weather", city="Basel"))]
    whole: Any = None
    async for chunk in chat.bind_tools([Weather]).astream("weather?"):
        whole = chunk if whole is None else whole + chunk
    assert [one["args"] for one in whole.tool_calls] == [{"city": "Bern"}, {"city": "Basel"}]
    assert whole.text == "So"


async def test_embeddings(settings: dict[str, Any], gemini: FakeGemini) -> None:
    gemini.models = ["gemini-embedding-001"]
    embeddings = langchain.OpenAIEmbeddings(
        model="text-embedding-3-small", check_embedding_ctx_length=False, **settings
    )
    assert len(await embeddings.aembed_documents(["one", "three"])) == 2
