"""The benchmark's correctness: every workload once, and the checks that it relies on. Never a ratio."""

import json
from dataclasses import replace
from typing import Any

import pytest
from load import Check, ResponseReader, order_faults
from report import AGAIN, AGPROXY, YARDSTICK, Row
from workloads import WORKLOADS, Target, answers, event_bytes, texts

STREAM = replace(next(workload for workload in WORKLOADS if workload.name == "burst-1"), chunks=4)


@pytest.mark.at_the_end("bench/bench.py", "--quick", "--json", "figures.json")
def test_every_workload_is_answered_whole_and_in_order(beside: dict[str, Any]) -> None:
    ended = beside["bench/bench.py"].result(timeout=120)
    assert ended.code == 0, ended.said
    figures = json.loads((ended.folder / "figures.json").read_text())
    assert {row["workload"] for row in figures["rows"]} == {workload.name for workload in WORKLOADS}
    assert not any(figures["faults"].values())


@pytest.mark.parametrize(
    ("numbers", "faults"),
    [
        ([0, 1, 2, 3], {}),
        ([0, 1, 3], {"lost": 1}),
        ([0, 1, 1, 2, 3], {"doubled": 1}),
        ([0, 2, 1, 3], {"reordered": 1}),
        ([], {"lost": 4}),
    ],
)
def test_lost_doubled_and_reordered_chunks_are_counted(numbers: list[int], faults: dict[str, int]) -> None:
    assert order_faults(numbers, 4) == faults
    assert gemini_faults([event_bytes(STREAM)[number] for number in numbers])["lost"] == faults.get("lost", 0)


def gemini_faults(events: list[bytes], cut: int = 0) -> dict[str, int]:
    data = b"".join(event + b"\r\n\r\n" for event in events)
    check = Check(STREAM, "gemini")
    for piece in (data[:cut], data[cut:]):
        check.feed(piece)
    return check.close(200)


def test_an_answer_cut_anywhere_is_right() -> None:
    for cut in range(len(b"".join(event_bytes(STREAM))) + 16):
        assert not gemini_faults(list(event_bytes(STREAM)), cut)


def openai_event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("spoil", "faults"),
    [
        (lambda events: events, {}),
        (lambda events: events[:-1], {"errors": 1}),
        (lambda events: [*events[:-2], events[-1]], {"errors": 1}),
        (lambda events: [*events, events[-1]], {"errors": 1}),
        (lambda events: [*events[:2], *events[3:]], {"lost": 1}),
        (lambda events: [*events[:2], events[1], *events[2:]], {"doubled": 1}),
        (lambda events: [*events[:2], openai_event("<2> something else"), *events[3:]], {"errors": 1, "lost": 1}),
        (lambda events: [*events[:2], b'data: {"error": {"message": "no"}}\n\n', *events[2:]], {"errors": 1}),
    ],
)
def test_a_spoilt_openai_stream_is_noticed(spoil, faults) -> None:  # type: ignore[no-untyped-def]
    events = [*(openai_event(text) for text in texts(STREAM)), openai_event("", "stop"), b"data: [DONE]\n\n"]
    check = Check(STREAM, "openai")
    check.feed(b"".join(spoil(events)))
    assert check.close(200) == faults


def test_a_response_cut_anywhere_is_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for response in (
        head + b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello!",
    ):
        for cut in range(len(response) + 1):
            reader = ResponseReader()
            assert reader.feed(response[:cut]) + reader.feed(response[cut:]) == b"hello!"
            assert (reader.status, reader.ended) == (200, True)


def test_a_whole_answer_is_checked() -> None:
    whole = next(workload for workload in WORKLOADS if workload.name == "chat-1")
    check = Check(whole, "gemini")
    check.feed(json.dumps(next(answers(whole))).encode())
    assert not check.close(200)
    assert Check(whole, "gemini").close(500) == {"errors": 1}


def row(agproxy: list[float], again: list[float]) -> Row:
    target = Target("cpu", "µs/chunk", must=2.0, aim=1.15)
    return Row(STREAM, target, {YARDSTICK: [1.0] * len(again), AGPROXY: agproxy, AGAIN: again})


@pytest.mark.parametrize(
    ("agproxy", "again", "verdict"),
    [
        ([1.5, 1.6, 1.4], [1.0, 1.1, 1.0], "held"),
        ([0.9, 1.0, 1.0], [1.0, 1.1, 1.0], "held, aim too"),
        ([2.5, 2.4, 2.6], [1.0, 1.1, 1.0], "missed"),
        ([2.1, 2.1, 1.9], [1.0, 1.3, 0.9], "below noise"),
        ([2.1] * 7, [1.0, 1.2, *[1.0] * 4, 0.9], "below noise"),
        ([2.1] * 9, [1.0, 1.2, *[1.0] * 6, 0.9], "missed"),  # nine of them bear an odd one at each end
    ],
)
def test_no_verdict_is_given_below_the_noise(agproxy: list[float], again: list[float], verdict: str) -> None:
    assert row(agproxy, again).verdict() == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [(1.0, 1.0, "held"), (3.8, 1.0, "piled up"), (1.0, 3.8, "held")]
)
def test_chunks_that_piled_up_hold_no_must(ours: float, theirs: float, verdict: str) -> None:
    paced = row([1.5, 1.6, 1.4], [1.0, 1.1, 1.0])
    paced.workload = replace(paced.workload, pause_ms=50)
    paced.together = {AGPROXY: [ours], YARDSTICK: [theirs]}
    assert paced.verdict() == verdict
