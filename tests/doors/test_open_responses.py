"""Each golden answer as a Responses stream and object, against types that nobody here wrote: OpenAI's package, strictly
and by its own accumulator, and Open Responses, the open specification of the same API."""

import json
from typing import Any

import pytest
from golden import CASES, HEAD, frames, in_one, streamed
from openai._types import NOT_GIVEN
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

import antigravity_proxy as agproxy

pytest.importorskip("openresponses_types", reason="the package openresponses-types is not there")
from open_responses import open_findings, open_findings_of

BODY: dict[str, Any] = {
    "instructions": "Be brief.",
    "tools": [{"type": "function", "name": "ls"}],
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"a": "b"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def sent(case: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    seal = (lambda part: "sealed") if body else None
    renderer = agproxy.ResponseRenderer(agproxy.replace(HEAD, seal=seal), body)
    *events, done = frames(renderer.frames(streamed(case["chunks"], in_one)))
    assert done == "[DONE]"
    return events


@pytest.mark.parametrize("body", [{}, BODY], ids=["plain", "with fields"])
@pytest.mark.parametrize("name", CASES)
def test_every_event_is_one_of_theirs(name: str, body: dict[str, Any]) -> None:
    events = sent(CASES[name], body)
    for event in events:
        EVENT.validate_json(json.dumps(event), strict=True)
        assert open_findings(event) == [], event
    assert [event["type"] in ENDS for event in events] == [False] * (len(events) - 1) + [True]


def without_parsed(value: Any) -> Any:
    """What the SDK collected, without what it adds."""
    if isinstance(value, list):
        return [without_parsed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_parsed(item) for key, item in value.items() if not key.startswith("parsed")}


ENDS = ("response.completed", "response.incomplete", "response.failed")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["responses"]["status"] == "completed"])
def test_the_sdk_makes_of_the_events_what_they_end_with(name: str) -> None:
    events = sent(CASES[name], BODY)
    state: Any = ResponseStreamState(input_tools=NOT_GIVEN, text_format=NOT_GIVEN)
    for event in events:
        state.handle_event(EVENT.validate_python(event))
    made = state._completed_response
    assert made is not None
    assert without_parsed([item.to_dict() for item in made.output]) == events[-1]["response"]["output"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "error" not in case])
def test_the_object_is_one_of_theirs(name: str) -> None:
    renderer = agproxy.ResponseRenderer(HEAD, BODY)
    made = renderer.whole(streamed(CASES[name]["chunks"], in_one))
    assert open_findings_of(made) == []
    Response.model_validate_json(json.dumps(made), strict=True)


def test_the_types_refuse_what_is_wrong() -> None:
    event = sent(CASES["two_tool_calls"], {})[-1]
    for key in ("status", "tools", "usage", "completed_at", "store", "top_logprobs"):
        broken = event | {"response": {k: v for k, v in event["response"].items() if k != key}}
        assert open_findings(broken) != [], key
    with pytest.raises(ValidationError):
        EVENT.validate_json(json.dumps({key: value for key, value in event.items() if key != "sequence_number"}))
