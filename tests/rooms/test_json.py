"""JSON texts to values and back: one depth and one reading for all, whoever calls."""

import json
from typing import Any

import pytest
from conftest import called_from

import antigravity_proxy as agproxy


@pytest.fixture(params=["orjson", "json"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "json":
        monkeypatch.setattr(agproxy, "orjson", None)
    elif agproxy.orjson is None:
        pytest.skip("orjson is not installed")


@pytest.mark.parametrize("frames", [0, 400])
@pytest.mark.parametrize("depth", [1, 200, 201, 300, 900, 990, 1000, 100_000])
@pytest.mark.parametrize(
    ("start", "end"), [("[", "]"), ('[[],{"a":"["},', "]"), ('{"a":', "}"), ('{"b":[1],"a":', "}")]
)
def test_a_text_of_up_to_200_levels_is_read(start: str, end: str, depth: int, frames: int) -> None:
    text = f"{start * (depth - 1)}[]{end * (depth - 1)}"
    value = called_from(frames, lambda: agproxy.parse_strict(text))
    if depth <= 200:
        assert called_from(frames, lambda: agproxy.dump_bytes(agproxy.parse_body(text.encode()))) == text.encode()
        assert called_from(frames, lambda: agproxy.dumps(value)) == text
        return
    assert value is None
    with pytest.raises(agproxy.BadRequest, match="nested too deep"):
        called_from(frames, lambda: agproxy.parse_body(text.encode()))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "{", "", "x", "[1] 2"])
def test_what_is_no_strict_json_is_not_sent_on(text: str) -> None:
    assert agproxy.parse_strict(text) is None
    with pytest.raises(agproxy.BadRequest, match="not valid JSON"):
        agproxy.parse_body(text.encode())


@pytest.mark.parametrize("text", ["12345678901234567890123", '"\\ud83d"', "1.5e300", ' {"a": [1, null]}'])
def test_strict_json_keeps_every_digit_and_half_a_surrogate_pair(text: str) -> None:
    assert agproxy.parse_strict(text) == json.loads(text)
    assert json.loads(agproxy.dump_bytes(json.loads(text))) == json.loads(text.replace("\\ud83d", "?"))


TWICE = [
    ('{"model": "a", "messages": [], "model": "b"}', {"model": "b", "messages": []}),
    ('{"model" : "a", "mod\\u0065l": "b", "x" :1}', {"model": "b", "x": 1}),
    ('\ufeff{"model":"m","n"\n:1,"n"\t:2}', {"model": "m", "n": 2}),
]


@pytest.mark.parametrize(("body", "value"), TWICE)
def test_of_a_field_that_is_given_twice_the_last_counts(body: str, value: Any) -> None:
    assert agproxy.parse_body(body.encode()) == value


@pytest.mark.parametrize("said", ['"model": "a"', "a : b", '{"a":1,"a":2}', "\n:", '\\":'])
def test_what_only_looks_like_a_field_in_a_text_is_none(said: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": said}]}
    for separators in ((",", ":"), (", ", " : ")):
        assert agproxy.parse_body(json.dumps(body, separators=separators).encode()) == body


def test_base64_that_was_cut_out_is_put_back_and_a_mark_of_another_stays() -> None:
    long, mark = "QUJD" * 5000, "a" * 32
    body = json.dumps(
        {"a": f"data:image/png;base64,{long}", "b": "data:x;base64,QQ==", "c": f"{mark}00000001"}
    ).encode()
    cut, payloads = agproxy.cut_payloads(body, mark)
    assert (len(cut) < 200, payloads) == (True, {f"{mark}00000000": long.encode()})
    assert agproxy.put_back(cut, payloads) == body
    assert agproxy.put_back(cut, {}) == cut
