"""What Gemini is sent, as data, and that Google's structure takes it."""

from typing import Any

import pytest
from fake_gemini import findings

import antigravity_proxy as agproxy

CALLS = {
    "role": "assistant",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "not json"}},
    ],
}


def contents(*messages: dict[str, Any], model: str = "gemini-3-pro-preview") -> list[dict[str, Any]]:
    request = agproxy.parse_chat({"model": model, "messages": list(messages)})
    body = agproxy.build_generate_content(request, agproxy.traits_of(model, {})).body
    assert findings(body, model) == []
    return body["contents"]


def test_results_stand_after_their_calls_in_call_order() -> None:
    made = contents(
        {"role": "user", "content": "go"},
        CALLS,
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "user", "content": "and?"},
    )
    responses = [part["functionResponse"] for part in made[2]["parts"]]
    assert [r["name"] for r in responses] == ["f", "g"]
    assert [r["response"] for r in responses] == [{"output": "one"}, {"output": "two"}]
    assert [p["functionCall"]["args"] for p in made[1]["parts"]] == [{"a": 1}, {"input": "not json"}]


def test_a_missing_result_is_said_and_an_orphan_becomes_text() -> None:
    made = contents(
        {"role": "user", "content": "go"}, CALLS, {"role": "tool", "tool_call_id": "lost", "content": "orphan"}
    )
    assert "error" in made[2]["parts"][0]["functionResponse"]["response"]
    assert made[3]["parts"] == [{"text": "orphan"}]


@pytest.mark.parametrize(("model", "signed"), [("gemini-2.5-pro", False), ("gemini-3-flash-preview", True)])
def test_the_sentinel_goes_only_where_a_signature_is_needed(model: str, signed: bool) -> None:
    made = contents({"role": "user", "content": "go"}, CALLS, {"role": "user", "content": "on"}, model=model)
    assert ["thoughtSignature" in part for part in made[1]["parts"]] == [signed, False]


def test_neighbours_of_one_role_are_one_turn_and_system_stands_apart() -> None:
    body = agproxy.build_generate_content(
        agproxy.parse_chat(
            {
                "model": "gemini-2.5-flash",
                "messages": [
                    {"role": "developer", "content": "brief"},
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": [{"type": "text", "text": "b"}]},
                ],
            }
        ),
        agproxy.traits_of("gemini-2.5-flash", {}),
    ).body
    assert body["contents"] == [{"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}]
    assert body["systemInstruction"] == {"parts": [{"text": "brief"}]}
