"""The openai-agents SDK over a real socket: a tool, a handoff of the result, a stream, and a conversation by id."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_gemini import FakeGemini, answer, call, said
from own_listener import OwnListener
from pydantic import BaseModel

import antigravity_proxy as agproxy

agents = pytest.importorskip("agents", reason="openai-agents is not installed (extra: clients)")
pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own deprecations


@pytest.fixture
async def model(gemini: FakeGemini) -> AsyncIterator[Any]:
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),)))
    agents.set_tracing_disabled(True)
    async with OwnListener(app) as server:
        base_url = str(server.make_url("/v1"))
        async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
            yield agents.OpenAIResponsesModel(model="gemini-3-pro-preview", openai_client=client)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sun in {city}"


class Report(BaseModel):
    city: str
    sunny: bool


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_agent_calls_a_tool_and_reports(stream: bool, model: Any, gemini: FakeGemini) -> None:
    signed = call("weather", city="Bern") | {"thoughtSignature": "c2ln"}
    gemini.script = [answer({"text": "I ask.", "thought": True}, signed), said('{"city": "Bern", ', '"sunny": true}')]
    settings = agents.ModelSettings(
        reasoning={"effort": "low", "summary": "auto"}, store=False, response_include=["reasoning.encrypted_content"]
    )
    agent = agents.Agent(
        name="Reporter",
        instructions="Be brief.",
        model=model,
        model_settings=settings,
        tools=[agents.function_tool(weather)],
        output_type=Report,
    )
    if stream:
        result = agents.Runner.run_streamed(agent, "weather in Bern?")
        kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        assert {"tool_called", "tool_output", "message_output_created", "reasoning_item_created"} <= set(kinds)
    else:
        result = await agents.Runner.run(agent, "weather in Bern?")
    assert result.final_output == Report(city="Bern", sunny=True)
    turns = gemini.bodies[1]["contents"]
    assert turns[1]["parts"][0]["thoughtSignature"] == "c2ln"
    assert turns[2]["parts"][0]["functionResponse"]["response"] == {"output": "sun in Bern"}


async def test_a_conversation_goes_on_by_id(model: Any, gemini: FakeGemini) -> None:
    gemini.script = [said("one"), said("two")]
    agent = agents.Agent(name="Talker", model=model)
    first = await agents.Runner.run(agent, "first")
    second = await agents.Runner.run(agent, "second", previous_response_id=first.last_response_id)
    assert second.final_output == "two"
    assert [turn["parts"][0]["text"] for turn in gemini.bodies[1]["contents"]] == ["first", "one", "second"]
