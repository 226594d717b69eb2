"""Bytes cut anywhere give the same events, and no answer ends as what it was not."""

import json
from typing import Any

import pytest
from fake_gemini import error, said

import antigravity_proxy as agproxy


def reader() -> agproxy.GeminiReader:
    return agproxy.GeminiReader(lambda: "call_1")


def sse(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(c, ensure_ascii=False).encode() + b"\r\n\r\n" for c in chunks)


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


def test_a_bare_error_over_several_lines() -> None:
    r = reader()
    text = json.dumps([error(503, "UNAVAILABLE", "overloaded")[1]], indent=1).encode()
    events = r.feed(text) + r.close()
    assert isinstance(events[-1], agproxy.Failed)
    assert isinstance(events[-1].error, agproxy.Overloaded)
