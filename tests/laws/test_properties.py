"""What must hold for any valid body, any cut of a stream and any answer; and a short run of the fuzzer."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from openai_schema import findings as openai_findings

import antigravity_proxy as agproxy

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: it is in the extra `clients`")

import fuzz
import generators as g
from golden import CASES, HEAD, frames, without_null_usage

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
given, st = hypothesis.given, hypothesis.strategies
RANDOM = st.randoms(use_true_random=False)
SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large, hypothesis.HealthCheck.filter_too_much]


def examples(count: int) -> Any:
    """So many examples, always the same ones; a failing one is not shrunk, for that takes minutes."""
    same = {"deadline": None, "derandomize": True, "database": None, "phases": [hypothesis.Phase.generate]}
    return hypothesis.settings(max_examples=count, suppress_health_check=SLOW, **same)


# ---- any valid body


@examples(60)
@given(RANDOM)
def test_any_chat_body_is_one_that_google_takes(r: Random) -> None:
    body = g.chat_body(r)
    hypothesis.note(body)
    fuzz.check_built(agproxy.parse_chat(fuzz.received(body)), g.MODELS, body)


@examples(15)
@given(RANDOM)
def test_any_responses_body_is_one_that_google_takes(r: Random) -> None:
    body = g.response_body(r)
    hypothesis.note(body)
    fuzz.check_built(agproxy.parse_response(fuzz.received(body)), g.MODELS, body)


@examples(15)
@given(RANDOM)
def test_any_completions_body_is_one_that_google_takes(r: Random) -> None:
    body = g.completion_body(r)
    hypothesis.note(body)
    fuzz.check_built(agproxy.parse_completion(fuzz.received(body)), g.MODELS, body)


@examples(15)
@given(RANDOM)
def test_any_embeddings_body_is_one_that_google_takes(r: Random) -> None:
    body = g.embedding_body(r)
    hypothesis.note(body)
    fuzz.check_embeddings(agproxy.parse_embeddings(fuzz.received(body)))


@examples(15)
@given(RANDOM)
def test_long_base64_is_sent_as_it_came(r: Random) -> None:
    """It is cut out of a body before that is parsed, and put back into what is built."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{g.LONG_BASE64}"}}
    told = {"role": "user", "content": [image, {"type": "text", "text": f"see data:image/png;base64,{g.LONG_BASE64}"}]}
    body = g.chat_body(r)
    body["messages"].insert(r.randint(0, len(body["messages"])), told)
    cut, payloads = agproxy.cut_payloads(json.dumps(body).encode(), "0" * 32)
    assert len(payloads) >= 2 and g.LONG_BASE64.encode() not in cut
    built = [
        fuzz.build(agproxy.parse_chat(agproxy.parse_body(data))[0], g.MODELS[2], "gemini").body
        for data in (cut, json.dumps(body).encode())
    ]
    sent, expected = map(agproxy.dump_bytes, built)
    assert agproxy.put_back(sent, payloads) == expected


# ---- any cut


def reader(tools: Any = fuzz.TOOLS) -> agproxy.GeminiReader:
    ids = iter(range(1000))
    return agproxy.GeminiReader(lambda: f"call_{next(ids)}", tools)


def read(pieces: Iterable[bytes]) -> list[Any]:
    """The events of a stream; an error in comparable form."""
    r = reader()
    events = [event for piece in pieces for event in r.feed(piece)] + r.close()
    return [told(event) for event in events]


def told(event: agproxy.Event) -> Any:
    if not isinstance(event, agproxy.Failed):
        return event
    error = event.error
    return type(error).__name__, error.message, error.code, error.retry_after_s


BEFORE = (b"data: ", b"data:", b": note\n\ndata: ", b"event: x\nid: 1\ndata: ")
AFTER = (b"\r\n\r\n", b"\n\n", b"\r\r")


@examples(150)
@given(st.sampled_from(sorted(CASES)), RANDOM)
def test_any_cut_and_framing_of_any_golden_stream_gives_the_same_events(name: str, r: Random) -> None:
    chunks = [agproxy.dumps(chunk).encode() for chunk in CASES[name]["chunks"]]
    framed = b"".join(r.choice(BEFORE) + chunk + r.choice(AFTER) for chunk in chunks)
    assert read(g.cut(r, framed, 20)) == read([b"data: " + chunk + b"\r\n\r\n" for chunk in chunks])


# ---- any answer


# Without the custom tool, whose calls the SDK's accumulator does not know.
FUNCTIONS = {name: tool for name, tool in fuzz.TOOLS.items() if not tool.custom}


def answer(r: Random, candidates: int, tools: Any = FUNCTIONS) -> list[agproxy.Event]:
    """The events of a stream of Gemini's."""
    chunks = g.answer_chunks(r, candidates)
    hypothesis.note(chunks)
    one = reader(tools)
    data = b"".join(b"data: " + agproxy.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    events = one.feed(data) + one.close()
    fuzz.Grammar().check(events)
    return events


def merged(r: Random) -> list[agproxy.Event]:
    """Several answers as one, as the gateway asks for n of them; it does so only where each has begun."""
    answers = [answer(r, 1) for _ in range(r.randint(1, 3))]
    hypothesis.assume(not any(isinstance(events[0], agproxy.Failed) for events in answers))
    streams = [[agproxy.renumbered(event, i) for event in events] for i, events in enumerate(answers)]
    made, usage = [stream.pop(0) for stream in streams], agproxy.Usage()
    while waiting := [stream for stream in streams if stream]:
        match event := r.choice(waiting).pop(0):
            case agproxy.Failed():
                return [*made, event]
            case agproxy.Ended(more):
                usage += more
            case _:
                made.append(event)
    return [*made, agproxy.Ended(usage)]


def sent_frames(renderer: agproxy.Renderer, events: list[agproxy.Event]) -> list[Any]:
    """The frames of a stream but for [DONE]; checks how it ends."""
    sent = frames("".join(map(renderer.render, events)))
    done = sent[-1] == "[DONE]"
    failed = isinstance(events[-1], agproxy.Failed)
    assert done or failed
    if failed and not isinstance(renderer, agproxy.ResponseRenderer):
        assert openai_findings(sent[-1], "ErrorResponse") == []
    assert "[DONE]" not in sent[:-1]
    return sent[:-1] if done else sent


def without_nulls(value: Any) -> Any:
    """A value without what is null or an empty text, which clients cannot tell from what is not there."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: without_nulls(item) for key, item in value.items() if key not in ("parsed", "parsed_arguments")}
    return {key: item for key, item in kept.items() if item not in (None, "")}


def choice_shape(choice: dict[str, Any]) -> Any:
    """A choice as a client understands it."""
    made = without_nulls(choice)
    for call in made["message"].get("tool_calls", []):
        call.pop("index", None)
    return made


def check_chat(events: list[agproxy.Event], body: dict[str, Any]) -> None:
    """The SDK takes the stream, and has at its end what the whole answer says."""
    ended, state = isinstance(events[-1], agproxy.Ended), ChatCompletionStreamState()
    sent = sent_frames(agproxy.ChatRenderer(HEAD, body), events)
    for chunk in sent if ended else sent[:-1]:
        assert openai_findings(chunk, "CreateChatCompletionStreamResponse") == []
        state.handle_chunk(ChatCompletionChunk.construct(**chunk))
    if ended:
        made = agproxy.ChatRenderer(HEAD, body).whole(events)
        assert openai_findings(made, "CreateChatCompletionResponse") == []
        final = state.current_completion_snapshot.model_dump()
        assert [choice_shape(choice) for choice in final["choices"]] == [choice_shape(c) for c in made["choices"]]
        assert without_nulls(final["usage"]) == without_nulls(made["usage"])


@examples(60)
@given(RANDOM)
def test_any_chat_stream_collects_to_the_whole_answer(r: Random) -> None:
    check_chat(merged(r) if g.maybe(r, 50) else answer(r, r.randint(1, 3)), {})


@examples(50)
@given(RANDOM)
def test_any_stream_for_old_functions_collects_to_the_whole_answer(r: Random) -> None:
    check_chat(answer(r, 1, {}), {"functions": [{"name": "f"}]})


@examples(50)
@given(RANDOM)
def test_any_completions_stream_collects_to_the_whole_answer(r: Random) -> None:
    events = merged(r)
    body = r.choice(({}, {"prompt": "p", "n": 3, "echo": True}, {"prompt": ["p", "q", "r"], "echo": True}))
    sent = sent_frames(agproxy.CompletionRenderer(HEAD, body), events)
    if isinstance(events[-1], agproxy.Failed):
        return
    texts: dict[int, list[Any]] = {}
    for chunk in sent:
        for choice in chunk["choices"]:
            one = texts.setdefault(choice["index"], ["", None])
            assert one[1] is None
            texts[choice["index"]] = [one[0] + choice["text"], choice["finish_reason"]]
    made = agproxy.CompletionRenderer(HEAD, body).whole(events)
    assert openai_findings(made, "CreateCompletionResponse") == []
    assert {c["index"]: [c["text"], c["finish_reason"]] for c in made["choices"]} == texts
    assert sent[-1]["usage"] == made["usage"]


@examples(20)
@given(RANDOM)
def test_any_responses_stream_ends_in_the_whole_answer(r: Random) -> None:
    body = fuzz.received(g.response_body(r, ("f", "get_weather", "x" * 64))) if g.maybe(r, 50) else {}
    hypothesis.note(body)
    events = answer(r, 1, fuzz.TOOLS)
    hypothesis.assume(isinstance(events[0], agproxy.Started))
    sent = sent_frames(agproxy.ResponseRenderer(HEAD, body), events)
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    terminal = [event["type"] for event in sent if "response" in event][2:]
    assert terminal == [sent[-1]["type"]] and terminal[0].removeprefix("response.") == sent[-1]["response"]["status"]
    assert [bad for event in sent for bad in openai_findings(without_null_usage(event), "ResponseStreamEvent")] == []
    last = sent[-1]["response"]
    assert [event["item"] for event in sent if event["type"] == "response.output_item.done"] == last["output"]
    if isinstance(events[-1], agproxy.Ended):
        made = agproxy.ResponseRenderer(HEAD, body).whole(events)
        assert len(made.pop("choices")) == 1
        assert made == last
        assert openai_findings(made, "Response") == []


# ---- the fuzzer


def test_nothing_breaks_the_translations() -> None:
    played = fuzz.run(bodies=1200, requests=120, seconds=4)
    assert played.failures == {}, played.told()
