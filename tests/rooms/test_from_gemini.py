"""Bytes cut anywhere give the same events, and no answer ends as what it was not."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import DATA, read_yaml
from fake_gemini import error, said, validate

import antigravity_proxy as agproxy


def reader() -> agproxy.GeminiReader:
    return agproxy.GeminiReader(lambda: "call_1")


def sse(*chunks: dict[str, Any]) -> bytes:
    """`list` in a chunk puts it into an array, as some servers do."""
    sent = [[chunk] if "list" in chunk else chunk for chunk in chunks]
    return b"".join(b"data: " + json.dumps(c, ensure_ascii=False).encode() + b"\r\n\r\n" for c in sent)


def parts(*items: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(items)}}
    return {"candidates": [candidate | ({"finishReason": reason} if reason else {})]}


CALL = {"functionCall": {"name": "f", "args": {"a": "\u2028ö"}}, "thoughtSignature": "c2ln"}


@pytest.mark.parametrize(
    ("chunks", "last"),
    [
        (said("x"), "stop"),
        (said("x", reason="MAX_TOKENS"), "length"),
        (said("x", reason="SAFETY"), "content_filter"),
        ([parts(CALL, reason="STOP")], "tool_calls"),
        ([{"candidates": [parts(CALL, reason="STOP")["candidates"][0] | {"groundingMetadata": None}]}], "tool_calls"),
        ([parts(CALL, reason="MAX_TOKENS")], "length"),
        ([{"promptFeedback": {"blockReason": "SAFETY"}}], "content_filter"),
        ([parts(reason="MALFORMED_FUNCTION_CALL")], agproxy.UpstreamBroken),
        ([parts(reason="STOP")], agproxy.UpstreamBroken),
        (said("x", reason=None), agproxy.UpstreamBroken),
        ([error(429, "RESOURCE_EXHAUSTED", "slow")[1]], agproxy.RateLimited),
        ([], agproxy.UpstreamBroken),
    ],
)
def test_how_an_answer_ends(chunks: list[dict[str, Any]], last: Any) -> None:
    r = reader()
    events = r.feed(sse(*chunks)) + r.close()
    if isinstance(last, str):
        assert [e.reason for e in events if isinstance(e, agproxy.Finished)] == [last]
        assert isinstance(events[-1], agproxy.Ended)
    else:
        assert isinstance(events[-1], agproxy.Failed)
        assert isinstance(events[-1].error, last)


@pytest.mark.parametrize(
    ("first", "usage"),
    [
        ({"promptTokenCount": 7, "toolUsePromptTokenCount": "2", "cachedContentTokenCount": 3}, (9, 0, 3, 0)),
        ({"promptTokenCount": 7, "candidatesTokenCount": 1, "thoughtsTokenCount": 4}, (7, 5, 0, 4)),
        ({}, (0, 0, 0, 0)),
        (None, (0, 0, 0, 0)),
        ("none", (0, 0, 0, 0)),
    ],
)
def test_the_start_tells_what_is_counted_by_then(first: Any, usage: tuple[int, ...]) -> None:
    chunks = said("x")
    chunks[0] |= {} if first is None else {"usageMetadata": first}
    chunks[1]["usageMetadata"] = {"promptTokenCount": 100, "candidatesTokenCount": 20}
    data = sse(*chunks)
    for cut in (len(data), *range(1, len(data), 7)):
        r = reader()
        events = r.feed(data[:cut]) + r.feed(data[cut:]) + r.close()
        assert events[0] == agproxy.Started(agproxy.Usage(*usage))
        assert events[-1] == agproxy.Ended(agproxy.Usage(100, 20))


def test_the_key_that_was_sent_is_masked_in_an_error_of_the_stream() -> None:
    r = agproxy.GeminiReader(lambda: "call_1", secret="planted-secret")
    last = r.feed(sse(error(400, "INVALID_ARGUMENT", "Bad key planted-secret.")[1]))[-1]
    assert isinstance(last, agproxy.Failed) and last.error.message == "Bad key …."
    assert last.error.__traceback__ is None, "which would hold the reader"


def test_with_stop_sequences_an_answer_may_be_empty() -> None:
    body = json.dumps(parts(reason="STOP")).encode()
    last = agproxy.GeminiReader(lambda: "call_1", stops=True).whole(body)[-1]
    assert isinstance(last, agproxy.Ended)
    assert isinstance(reader().whole(body)[-1], agproxy.Failed)


def test_a_model_that_is_gone_is_the_field_model_s_fault() -> None:
    assert agproxy.classify_error(404, error(404, "NOT_FOUND", "No such model.")[1]).param == "model"
    assert agproxy.classify_error(400, error(400, "INVALID_ARGUMENT", "Bad.")[1]).param is None


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data: [DONE]"])
def test_openai_s_word_behind_the_end_changes_nothing(end: bytes) -> None:
    r, plain = reader(), reader()
    assert r.feed(sse(*said("x")) + end) + r.close() == plain.feed(sse(*said("x"))) + plain.close()


@pytest.mark.parametrize(
    ("given", "text"), [("a b", "a b"), ({"a": True}, '{"a":true}'), ([1], "[1]"), (None, ""), ("", "")]
)
def test_a_custom_tool_gets_its_text_and_what_is_none_as_json(given: Any, text: str) -> None:
    tool = agproxy.Tool("patch", "", None, custom=True)
    call = {"functionCall": {"name": "patch", "args": {"input": given}}}
    events = agproxy.GeminiReader(lambda: "call_1", {"patch": tool}).whole(json.dumps(parts(call)).encode())
    assert [e.text for e in events if isinstance(e, agproxy.ArgumentsDelta)] == [text]


@pytest.mark.parametrize("cut", [b"", b'data: {"candidates": [{"con', b'{"error": {"code": 503,\n'])
def test_an_answer_that_is_cut_within_a_line_says_why_it_was(cut: bytes) -> None:
    for why in (None, agproxy.UpstreamTimeout("Silence.")):
        r = reader()
        events = r.feed(sse(*said("x", reason=None)) + cut) + r.close(why)
        assert isinstance(events[-1], agproxy.Failed)
        assert ("broke off" if why is None else "Silence.") in events[-1].error.message


def test_an_empty_text_that_only_brings_a_signature_opens_no_part() -> None:
    image, empty = {"inlineData": {"mimeType": "image/png", "data": "iVBO"}}, {"text": "", "thoughtSignature": "c2ln"}
    r = reader()
    events = r.feed(sse(parts(empty), parts(image), parts(empty, reason="STOP"))) + r.close()
    assert [type(e.part) for e in events if isinstance(e, agproxy.PartEnd)] == [agproxy.Media]


def test_a_bare_error_over_several_lines() -> None:
    r = reader()
    text = json.dumps([error(503, "UNAVAILABLE", "overloaded")[1]], indent=1).encode()
    events = r.feed(text) + r.close()
    assert isinstance(events[-1], agproxy.Failed)
    assert isinstance(events[-1].error, agproxy.Overloaded)


QUOTA = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerDay-X"}],
}


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "said"),
    [
        (502, None, agproxy.UpstreamBroken, "upstream_error", "HTTP 502"),  # a front end's HTML
        (413, None, agproxy.TooLarge, "request_too_large", "HTTP 413"),
        (302, None, agproxy.UpstreamBroken, "upstream_error", "redirects"),
        (529, None, agproxy.Overloaded, "server_is_overloaded", "HTTP 529"),
        (403, error(403, "PERMISSION_DENIED", "No.")[1], agproxy.CredentialRefused, "upstream_error", "No."),
        (429, error(429, "RESOURCE_EXHAUSTED", "Slow.", QUOTA)[1], agproxy.QuotaGone, "insufficient_quota", "Slow."),
        (429, [error(429, "RESOURCE_EXHAUSTED", "Slow.")[1]], agproxy.RateLimited, "rate_limit_exceeded", "Slow."),
        (
            400,
            error(400, "INVALID_ARGUMENT", "Unsupported MIME type: x")[1],
            agproxy.FileRefused,
            "invalid_value",
            "",
        ),
        (400, {"error": "invalid_request"}, agproxy.UpstreamRefused, None, "invalid_request"),
        # a word of the client's own, in the path of what is wrong
        (
            400,
            error(400, "INVALID_ARGUMENT", "* properties[billing].items: missing field.\n")[1],
            agproxy.UpstreamRefused,
            None,
            "",
        ),
        (
            400,
            error(400, "FAILED_PRECONDITION", "Please enable billing.")[1],
            agproxy.CredentialRefused,
            "upstream_error",
            "",
        ),
        (500, {"error": {"code": 503, "message": "Busy."}}, agproxy.Overloaded, "server_is_overloaded", "Busy."),
        (
            400,
            error(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens.")[1],
            agproxy.ContextTooLong,
            "context_length_exceeded",
            "(9)",
        ),
        (
            429,
            error(429, "RESOURCE_EXHAUSTED", "The\nquota is used up.\nlimit: 0, model: x")[1],
            agproxy.QuotaGone,
            "insufficient_quota",
            "limit: 0",
        ),
        (504, {"error": []}, agproxy.UpstreamTimeout, "timeout", "HTTP 504"),
    ],
)
def test_what_an_error_body_means(
    status: int, body: Any, kind: type[agproxy.UpstreamError], code: str | None, said: str
) -> None:
    made = agproxy.classify_error(status, body)
    assert (type(made), made.code, said in made.message) == (kind, code, True)


# ---- each error body of the upstreams

NOON = 1768507200.0  # 2026-01-15 in Los Angeles
ERRORS = read_yaml(DATA / "errors.yaml")


@pytest.mark.parametrize("row", ERRORS, ids=[row["about"] for row in ERRORS])
def test_the_class_of_an_error_and_its_wait(row: dict[str, Any]) -> None:
    made = agproxy.classify_error(row["status"], row["body"], row.get("retry_after", ""))
    assert (type(made).__name__, made.scope, made.limit) == (row["class"], row["rests"], row.get("limit"))
    assert row.get("says", "") in made.message
    if made.scope == "nobody":
        assert made.retry_after_s == row.get("wait")
    else:
        assert made.quota == row.get("quota", "model")
        assert agproxy.cooldown_of(made, 0, NOON) == pytest.approx(row["wait"])


def test_the_error_bodies_are_such_as_google_sends() -> None:
    bodies = [row["body"] for row in ERRORS if isinstance(row["body"], dict) and row["about"] != ERRORS[-1]["about"]]
    assert len(bodies) > 25
    assert [validate(body, "ErrorBody") for body in bodies] == [[] for _ in bodies]


def test_without_a_word_the_rest_grows_from_probe_to_probe_up_to_an_hour() -> None:
    slow = agproxy.RateLimited("Slow down.")
    assert [agproxy.cooldown_of(slow, strikes, NOON) for strikes in (0, 1, 2, 10, 2000 // 2)] == [5, 10, 20, 3600, 3600]


def test_a_key_in_an_error_is_masked() -> None:
    told = error(403, "PERMISSION_DENIED", "Consumer 'api_key:AIzaSyD-0123456789abcdef' has been suspended.")[1]
    assert agproxy.classify_error(403, told).message == "Consumer 'api_key:…' has been suspended."


def test_an_error_whose_message_is_nested_deep_is_told_by_its_status() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    made = agproxy.classify_error(503, {"error": {"message": deep}})
    assert (type(made), made.message) == (agproxy.Overloaded, "Gemini answered HTTP 503. Try again.")


class Unshaped(agproxy.GeminiReader):
    """Reads every chunk by the parser."""

    def _parse(self, raw: bytes) -> None:
        self._chunk(self._parsed(raw))


def chunk_like_the_others(r: random.Random) -> dict[str, Any]:
    """Mostly a chunk that only goes on; sometimes one that is different in one place, often only just."""
    part: dict[str, Any] = {"text": r.choice(['a "quoted" \\word\n', "größe \U0001f600", "\u2028", '"text": "', "7"])}
    candidate: dict[str, Any] = {"content": {"parts": [part], "role": "model"}, "index": 0}
    usage: dict[str, Any] = {"promptTokenCount": r.randint(0, 99), "candidatesTokenCount": r.randint(0, 999)}
    made: dict[str, Any] = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": f"m{r.randint(0, 9)}"}
    oddities: list[Callable[[], Any]] = [
        lambda: candidate.update(index=1),
        lambda: candidate.update(finishReason="STOP"),
        lambda: candidate["content"]["parts"].append({"text": "more"}),
        lambda: made["candidates"].append(candidate | {"index": 2}),
        lambda: part.update(thought=True),
        lambda: part.update(thoughtSignature="c2ln"),
        lambda: part.update(text=""),
        lambda: part.update(functionCall=CALL["functionCall"], text=None),
        lambda: usage.update(thoughtsTokenCount=3),
        lambda: made.pop("usageMetadata"),
        lambda: made.update(usageMetadata="none"),
        lambda: made.update(promptFeedback={"blockReason": "SAFETY"}),
        lambda: made.update(modelVersion="ü"),
        lambda: candidate.update(content=None),
        lambda: made["candidates"].insert(0, {"index": 3}),
        lambda: made.update(list=True),
        lambda: made.update(beside={"usageMetadata": made.pop("usageMetadata")}),
        lambda: made.update(error={"code": 503, "message": "overloaded"}),
    ]
    if r.random() < 0.25:
        r.choice(oddities[: None if r.random() < 0.2 else -1])()
    return made


def test_a_chunk_that_goes_on_is_read_as_the_parser_reads_it() -> None:
    taken = 0
    for seed in range(400):
        r = random.Random(seed)
        chunks = [chunk_like_the_others(r) for _ in range(r.randint(1, 40))]
        chunks[-1]["candidates"][0]["finishReason"] = "STOP"
        new, plain = reader(), Unshaped(lambda: "call_1")
        for text in [sse(chunk) for chunk in chunks] + [b"data: {broken\n\n"] * (seed % 9 == 0):
            before = new._unparsed
            assert told(new.feed(text)) == told(plain.feed(text)), f"seed {seed}"
            taken += new._unparsed not in (before, b"")
        assert told(new.close()) == told(plain.close()), f"seed {seed}"
    assert taken > 1000, "hardly a chunk was read without the parser"


def test_bytes_of_half_a_surrogate_pair_do_not_end_a_stream() -> None:
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 4}
    chunks = [chunk | {"usageMetadata": usage} for chunk in said("a", "b", "?", "c")]
    data = sse(*chunks).replace(b'"?"', b'"\xed\xa0\xbd"').replace(b'"model"', b'"\xed\xa0\xbd"', 2)
    r = reader()
    events = r.feed(data) + r.close()
    assert [e.text for e in events if isinstance(e, agproxy.TextDelta)] == ["a", "b", "\ud83d", "c"]
    assert isinstance(events[-1], agproxy.Ended)


def told(events: list[agproxy.Event]) -> list[str]:
    return [str(e.error) if isinstance(e, agproxy.Failed) else repr(e) for e in events]
