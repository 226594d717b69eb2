"""Each case file is one answer of Gemini at every stop on its road: chunks, events, and how each front format shows it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from fake_gemini import validate, whole
from golden import CASES, HEAD, frames, in_one, reader, streamed, wire, without_null_usage
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from openai_schema import findings

import antigravity_proxy as agproxy


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = CASES[request.param]
    return found


def shape(event: agproxy.Event) -> list[Any]:
    """An event as the case files write it."""
    name = type(event).__name__
    match event:
        case agproxy.PartStart(choice, part) | agproxy.PartEnd(choice, part):
            return [name, choice, type(part).__name__]
        case agproxy.Finished(choice, reason):
            return [name, choice, reason]
        case agproxy.Annotated(choice, citations):
            return [name, choice, [[c.start, c.end, c.url] for c in citations]]
        case agproxy.Failed(error):
            return [name, error.code]
        case agproxy.Started() | agproxy.Ended():
            return [name]
        case _:
            return [name, event.choice, event.text]


def message_shape(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or []]
    annotations = [one["url_citation"] for one in message.get("annotations") or []]
    told = {
        "reasoning": message.get("reasoning_content"),
        "calls": calls,
        "annotations": [[one["start_index"], one["end_index"], one["url"]] for one in annotations],
        "images": [image["image_url"]["url"] for image in message.get("images") or []],
        "audio": (message.get("audio") or {}).get("data"),
        "logprobs": [
            [one["token"], one["logprob"], [top["token"] for top in one["top_logprobs"]]]
            for one in (choice["logprobs"] or {}).get("content") or []
        ],
    }
    made = {"content": message["content"], "finish": choice["finish_reason"]}
    return made | {key: value for key, value in told.items() if value}


def item_shape(item: dict[str, Any]) -> list[Any]:
    parts = item.get("content") or item.get("summary") or []
    cited = [[a["start_index"], a["end_index"], a["url"]] for part in parts for a in part.get("annotations", [])]
    more = [item[key] for key in ("name", "arguments", "result") if key in item]
    more += item["action"]["queries"] if "action" in item else []
    return [item["type"], *(part["text"] for part in parts), *cited, *more]


def test_the_chunks_are_such_as_gemini_sends(case: dict[str, Any]) -> None:
    answers = [chunk for chunk in case["chunks"] if "error" not in chunk]
    refused = [validate(chunk, "GenerateContentResponse", disable=set(case.get("but", ()))) for chunk in answers]
    assert refused == [[] for _ in answers]


def test_the_events(case: dict[str, Any]) -> None:
    events = streamed(case["chunks"], in_one)
    assert [shape(event) for event in events] == case["events"]
    if usage := case.get("usage"):
        ended = events[-1]
        assert isinstance(ended, agproxy.Ended)
        assert [ended.usage.prompt, ended.usage.completion, ended.usage.cached, ended.usage.reasoning] == usage
    if wait := case.get("retry_after_s"):
        assert isinstance(events[-1], agproxy.Failed)
        assert events[-1].error.retry_after_s == wait


def test_every_cut_gives_the_same_events(case: dict[str, Any]) -> None:
    expected = [shape(event) for event in streamed(case["chunks"], in_one)]
    data = wire(case["chunks"])
    for cut in range(1, len(data)):
        r = reader()
        events = r.feed(data[:cut]) + r.feed(data[cut:]) + r.close()
        assert [shape(event) for event in events] == expected, cut
    one_by_one = streamed(
        case["chunks"], lambda r, data: [e for i in range(len(data)) for e in r.feed(data[i : i + 1])]
    )
    assert [shape(event) for event in one_by_one] == expected


def test_the_answer_in_one_piece_says_the_same(case: dict[str, Any]) -> None:
    events = reader().whole(json.dumps(whole(case["chunks"])).encode())
    if error := case.get("error"):
        assert shape(events[-1]) == ["Failed", error]
    else:
        expected = streamed(case["chunks"], in_one)
        assert agproxy.collect(events) == agproxy.collect(expected)
        assert [e for e in events if isinstance(e, agproxy.Annotated)] == [
            e for e in expected if isinstance(e, agproxy.Annotated)
        ]


def test_chat(case: dict[str, Any]) -> None:
    events = streamed(case["chunks"], in_one)
    renderer = agproxy.ChatRenderer(HEAD, {})
    sent = frames("".join(map(renderer.render, events)))
    if error := case.get("error"):
        assert sent[-1]["error"]["code"] == error
        assert findings(sent[-1], "ErrorResponse") == []
        return
    made = renderer.whole(events)
    assert findings(made, "CreateChatCompletionResponse") == []
    assert [message_shape(choice) for choice in made["choices"]] == case["chat"]
    assert sent.pop() == "[DONE]"
    state = ChatCompletionStreamState()
    for chunk in sent:
        assert findings(chunk, "CreateChatCompletionStreamResponse") == []
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    final = state.current_completion_snapshot.model_dump()
    collected = [message_shape(choice) for choice in final["choices"]]
    assert [one | {"content": one["content"] or ""} for one in collected] == case["chat"]
    assert final["usage"]["total_tokens"] == sum(case["usage"][:2])


def test_completions(case: dict[str, Any]) -> None:
    events = streamed(case["chunks"], in_one)
    sent = frames("".join(map(agproxy.CompletionRenderer(HEAD, {}).render, events)))
    if error := case.get("error"):
        assert sent[-1]["error"]["code"] == error
        return
    made = agproxy.CompletionRenderer(HEAD, {}).whole(events)
    assert findings(made, "CreateCompletionResponse") == []
    assert [[choice["text"], choice["finish_reason"]] for choice in made["choices"]] == case["completions"]
    assert sent.pop() == "[DONE]"
    texts: dict[int, list[Any]] = {}
    for chunk in sent:
        for choice in chunk["choices"]:
            one = texts.setdefault(choice["index"], ["", None])
            texts[choice["index"]] = [one[0] + choice["text"], choice["finish_reason"]]
    assert [texts[index] for index in sorted(texts)] == case["completions"]


def test_responses(case: dict[str, Any]) -> None:
    expected = case["responses"]
    events = streamed(case["chunks"], in_one)
    sent = frames("".join(map(agproxy.ResponseRenderer(HEAD, {}).render, events)))
    assert sent.pop() == "[DONE]"
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    assert [problem for event in sent for problem in findings(without_null_usage(event), "ResponseStreamEvent")] == []
    last = sent[-1]["response"]
    assert (sent[-1]["type"], last["status"]) == (f"response.{expected['status']}", expected["status"])
    assert [item_shape(item) for item in last["output"]] == expected["output"]
    assert (last["incomplete_details"] or {}).get("reason") == expected.get("reason")
    assert [e["item"] for e in sent if e["type"] == "response.output_item.done"] == last["output"]
    if "error" not in case:
        made = agproxy.ResponseRenderer(HEAD, {}).whole(events)
        assert made.pop("choices")[0]["finish_reason"] == case["chat"][0]["finish"]
        assert made == last
        assert findings(made, "Response") == []


@pytest.mark.parametrize(
    ("value", "schema", "said"),
    [
        ({"object": "list"}, "ListModelsResponse", "'data' is a required property"),
        ({"type": "response.output_text.delta", "delta": 5}, "ResponseStreamEvent", "delta"),
        ({"error": {"message": "m", "type": "t", "param": None, "code": 5}}, "ErrorResponse", "code"),
    ],
)
def test_the_published_schema_refuses_what_is_wrong(value: Any, schema: str, said: str) -> None:
    assert any(said in finding for finding in findings(value, schema))


def test_images_are_written_into_the_text_where_that_is_asked_for() -> None:
    head = replace(HEAD, images_in_text=True)
    events = streamed(CASES["inline_image"]["chunks"], in_one)
    wanted = "Here: ![image](data:image/png;base64,aW1hZ2U=)Done."
    message = agproxy.ChatRenderer(head, {}).whole(events)["choices"][0]["message"]
    assert (message["content"], "images" in message) == (wanted, False)
    sent = frames(agproxy.ChatRenderer(head, {}).frames(events))
    deltas = [chunk["choices"][0]["delta"] for chunk in sent[:-1] if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == wanted
