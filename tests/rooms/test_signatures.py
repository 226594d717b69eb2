"""Thought signatures: remembered by the gateway, or sealed and carried by a client."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fake_gemini import FakeGemini, said
from golden import without_null_usage
from kept import GEMINI_3, TOOL, Start, ask, ask_stream, fetch, starter
from openai_schema import findings

import antigravity_proxy as agproxy

M = "gemini-2.5-flash"


def test_signatures_are_put_back_for_the_model_that_made_them_and_the_oldest_give_way() -> None:
    memory = agproxy.SignatureMemory(size=2)
    for id in ("one", "two", "three"):
        memory.remember([agproxy.ToolCall(id, "f", "{}", f"sig-{id}")], M)
    calls = tuple(agproxy.ToolCall(id, "f", "{}") for id in ("one", "two", "three"))
    request = agproxy.Request("m", (agproxy.Message("assistant", calls),))

    def recalled(model: str) -> list[str | None]:
        return [p.signature for p in memory.recall(request, model).messages[0].parts if isinstance(p, agproxy.ToolCall)]

    assert recalled(M) == [None, "sig-two", "sig-three"]
    assert recalled("gemini-9") == [None, None, None]


# ---- signatures that a client carries


@pytest.fixture
def start(gemini: FakeGemini, aiohttp_client: Any) -> Start:
    return starter(gemini, aiohttp_client)


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start(max_wait_s=0)


def signed_call(signature: str = "c2ln") -> list[dict[str, Any]]:
    call = {"functionCall": {"name": "ls", "args": {"path": "/"}}, "thoughtSignature": signature}
    parts = [{"text": "Let me see.", "thought": True}, call]
    return [{"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}]}]


SEALED: dict[str, Any] = {
    "model": GEMINI_3,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "tools": [TOOL],
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("thinks", [False, True])
async def test_a_client_carries_the_signatures(
    thinks: bool, stream: bool, start: Start, gemini: FakeGemini, tmp_path: Path
) -> None:
    store = str(tmp_path / "s")
    client = await start(store=store)
    step = signed_call()
    if not thinks:
        del step[0]["candidates"][0]["content"]["parts"][0]
    gemini.script = [step, said("done")]
    made = (await ask_stream(client, **SEALED))[-2]["response"] if stream else await ask(client, **SEALED)
    assert [item["type"] for item in made["output"]] == ["reasoning", "function_call"]
    assert [part["text"] for part in made["output"][0]["summary"]] == (["Let me see."] if thinks else [])
    await client.close()
    client = await start(store=store)  # a gateway that remembers nothing
    result = {"type": "function_call_output", "call_id": made["output"][1]["call_id"], "output": "a b"}
    sent = [{"role": "user", "content": "list"}, *made["output"], result]
    await ask(client, **SEALED, input=sent)
    assert gemini.bodies[1]["contents"][1]["parts"][0]["thoughtSignature"] == "c2ln"


async def test_a_client_that_carries_needs_no_store_that_can_be_written(
    start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "DATABASE_BUSY_S", 0.1)
    client = await start(store=str(tmp_path / "s"))
    gemini.script = [said("one"), signed_call(), said("done")]
    await ask(client)
    with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        made = await ask(client, **SEALED)
        result = {"type": "function_call_output", "call_id": made["output"][1]["call_id"], "output": "a b"}
        await ask(client, **SEALED, input=[{"role": "user", "content": "list"}, *made["output"], result])
    assert gemini.bodies[2]["contents"][1]["parts"][0]["thoughtSignature"] == "c2ln"


@pytest.mark.parametrize("carried", [False, True], ids=["kept here", "carried"])
async def test_the_signatures_of_a_background_response_are_those_of_its_model(
    carried: bool, start: Start, gemini: FakeGemini, tmp_path: Path
) -> None:
    store = str(tmp_path / "s")
    client = await start(store=store)
    gemini.script = [signed_call(), said("done")]
    asked = SEALED | {"store": True, "background": True, "include": SEALED["include"] if carried else []}
    made = await ask(client, **asked)
    while made["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.01)
        made = (await fetch(client, made["id"]))[1]
    await client.close()
    client = await start(store=store)  # a gateway that remembers nothing
    result = {"type": "function_call_output", "call_id": made["output"][1]["call_id"], "output": "a b"}
    sent = [{"role": "user", "content": "list"}, *made["output"], result]
    more = {"input": sent} if carried else {"input": [result], "previous_response_id": made["id"]}
    await ask(client, **SEALED | more)
    assert gemini.bodies[1]["contents"][1]["parts"][0]["thoughtSignature"] == "c2ln"


@pytest.mark.parametrize("change", ["another gateway", "changed", "foreign"])
async def test_what_was_not_sealed_here_is_passed_over(change: str, start: Start, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script = [signed_call(), said("done")]
    made = await ask(client, **SEALED)
    sealed = made["output"][0]["encrypted_content"]
    assert sealed.startswith("agp1.")
    if change == "foreign":
        made["output"][0]["encrypted_content"] = "gAAAAABo-not-ours"
    elif change == "changed":
        made["output"][0]["encrypted_content"] = sealed[:60] + ("A" if sealed[60] != "A" else "B") + sealed[61:]
    client = await start()  # another key, for it keeps everything in memory
    result = {"type": "function_call_output", "call_id": made["output"][1]["call_id"], "output": "a b"}
    done = await ask(client, **SEALED, input=[{"role": "user", "content": "list"}, *made["output"], result])
    assert done["status"] == "completed"
    assert gemini.bodies[1]["contents"][1]["parts"][0]["thoughtSignature"] == agproxy.SIGNATURE_SENTINEL


async def test_a_thought_without_words_is_whole_too(client: TestClient, gemini: FakeGemini) -> None:
    step = signed_call()
    step[0]["candidates"][0]["content"]["parts"][0] = {"text": "", "thought": True, "thoughtSignature": "eA=="}
    gemini.script = [step]
    events = await ask_stream(client, **SEALED)
    kinds = [event["type"] for event in events[:-1]]
    assert kinds.count("response.reasoning_summary_part.added") == kinds.count("response.reasoning_summary_part.done")
    assert [
        problem for event in events[:-1] for problem in findings(without_null_usage(event), "ResponseStreamEvent")
    ] == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_texts_signature_stands_behind_it(
    stream: bool, start: Start, gemini: FakeGemini, tmp_path: Path
) -> None:
    store = str(tmp_path / "s")
    client = await start(store=store)
    parts = [{"text": "Hello"}, {"text": "", "thoughtSignature": "c2ln"}]
    gemini.script = [[{"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}]}], said("done")]
    made = (await ask_stream(client, **SEALED))[-2]["response"] if stream else await ask(client, **SEALED)
    assert [item["type"] for item in made["output"]] == ["message", "reasoning"]
    await client.close()
    client = await start(store=store)
    again = {"role": "user", "content": "more"}
    await ask(client, **SEALED, input=[{"role": "user", "content": "hi"}, *made["output"], again])
    assert gemini.bodies[1]["contents"][1]["parts"] == [{"text": "Hello"}, {"text": "", "thoughtSignature": "c2ln"}]
