"""The golden cases (data/cases/*.yaml), and what reads them: chunks, the bytes of a stream, events, a stream's frames."""

import json
from collections.abc import Callable
from typing import Any

from conftest import DATA, read_yaml

import antigravity_proxy as agproxy

CASES = {path.stem: read_yaml(path) for path in sorted((DATA / "cases").glob("*.yaml"))}
HEAD = agproxy.Head("0123456789abcdef01234567", 1, "gpt-4o", include_usage=True, now=lambda: 2)


def reader() -> agproxy.GeminiReader:
    ids = iter(range(1000))
    return agproxy.GeminiReader(lambda: f"call_{next(ids)}")


def wire(chunks: list[Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\r\n\r\n" for chunk in chunks)


def streamed(
    chunks: list[Any], feed: Callable[[agproxy.GeminiReader, bytes], list[agproxy.Event]]
) -> list[agproxy.Event]:
    r = reader()
    return feed(r, wire(chunks)) + r.close()


def in_one(r: agproxy.GeminiReader, data: bytes) -> list[agproxy.Event]:
    return r.feed(data)


def frames(text: str) -> list[Any]:
    """The JSON of each frame of a stream, and its last word."""
    return [
        line.removeprefix("data: ") if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
        for frame in text.split("\n\n")
        for line in frame.split("\n")
        if line.startswith("data: ")
    ]


def without_null_usage(event: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends `usage: null` until the end, which its own schema does not allow."""
    response = event.get("response")
    if response is None or response["usage"] is not None:
        return event
    return event | {"response": {key: value for key, value in response.items() if key != "usage"}}
