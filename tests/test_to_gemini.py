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
    [request] = agproxy.parse_chat({"model": model, "messages": list(messages)})
    body = agproxy.build_generate_content(request, agproxy.traits_of(model, {})).body
    assert findings(body, model) == []
    return body["contents"]


def test_no_two_tools_have_one_name_however_their_namespaces_join() -> None:
    spaced = [("a", "b__c"), ("a__b", "c"), (None, "a__b__c"), (None, "a b__c"), ("a b", "c")]
    tools = tuple(agproxy.Tool(name, "", None, namespace=space) for space, name in spaced)
    built = agproxy.build_generate_content(agproxy.Request("m", (), tools=tools), agproxy.Traits())
    names = [declared["name"] for declared in built.body["tools"][0]["functionDeclarations"]]
    assert len(set(names)) == len(spaced)


def test_what_is_deep_inside_a_schema_is_left_as_it_is() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert agproxy.lone_refs({"$defs": {"a": {}}, "format": deep})["$defs"] == {"a": {}}


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


@pytest.mark.parametrize(("model", "signed"), [("gemini-2.5-flash-image", False), ("gemini-3-pro-image-preview", True)])
def test_what_an_image_model_said_is_signed_where_that_is_checked(model: str, signed: bool) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    asked = {"role": "user", "content": [{"type": "text", "text": "Draw."}, image]}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "Here."}, image]}
    signatures = [
        ["thoughtSignature" in part for part in turn["parts"]] for turn in contents(asked, answered, asked, model=model)
    ]
    assert signatures == [[False, False], [signed, signed], [False, False]]


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
        )[0],
        agproxy.traits_of("gemini-2.5-flash", {}),
    ).body
    assert body["contents"] == [{"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}]
    assert body["systemInstruction"] == {"parts": [{"text": "brief"}]}
