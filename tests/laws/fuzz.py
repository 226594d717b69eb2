"""Feeds the translations what nobody promised: damaged answers of Gemini, odd but valid bodies, and broken bodies.

    python tests/laws/fuzz.py [--bodies N] [--requests N] [--wire N] [--seed S] [--case KIND:NUMBER]

Nothing may be raised but the errors that the gateway tells, every byte sent must be strict JSON in UTF-8, and no body
built from a valid request may have a finding of Google's schema check. A failing case is printed with its name, by
which `--case` plays it again. Exit code 1 where anything failed.
"""

import argparse
import functools
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import fuzz_wire
import generators as g
import yaml
from fake_gemini import OWN_OUTPUT, is_meant, validate

import antigravity_proxy as agproxy

ID = "0123456789abcdef01234567"
TOOLS = {
    "f": agproxy.Tool("mcp.files/read", "", None, namespace="n"),
    "give_final_answer": agproxy.Tool(agproxy.ANSWER_TOOL, "", None, answers=True),
    "get_weather": agproxy.Tool("get_weather", "", None, custom=True),
}
ANSWER = [{"candidates": [{"content": {"parts": [{"text": "ok"}]}, "finishReason": "STOP"}]}]


# ---- what must hold


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text that any reader takes: UTF-8, without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is sent, which is not JSON")

    return json.loads(text if isinstance(text, bytes) else agproxy.encoded(text), parse_constant=refuse)


def frames(text: str) -> list[Any]:
    """The JSON of each frame of a stream, without the [DONE] that ends it."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [strict_json(line) for line in lines if line != "[DONE]"]


PART_OF = {
    agproxy.TextDelta: agproxy.Text,
    agproxy.ThinkingDelta: agproxy.Thinking,
    agproxy.ArgumentsDelta: agproxy.ToolCall,
}


class Grammar:
    """What may follow what in an answer's events."""

    def __init__(self) -> None:
        self.open: dict[int, list[Any]] = {}
        self.said: dict[int, int] = {}
        self.finished: set[int] = set()

    def check(self, events: Sequence[agproxy.Event]) -> None:
        assert isinstance(events[-1], agproxy.Ended | agproxy.Failed), "the end is missing"
        assert isinstance(events[0], agproxy.Started) or len(events) == 1, "the start is missing"
        for event in events[1:-1]:
            self.follow(event)
        assert not self.open, "a part stays open"

    def follow(self, event: agproxy.Event) -> None:
        match event:
            case agproxy.Started() | agproxy.Ended() | agproxy.Failed():
                raise AssertionError(f"{event} in the middle")
            case agproxy.PartStart(choice, part):
                assert choice not in self.open | dict.fromkeys(self.finished), "a part inside another"
                self.open[choice] = [type(part)]
            case agproxy.PartEnd(choice, part):
                kind, *texts = self.open.pop(choice)
                assert kind is type(part), "another part ends"
                whole = getattr(part, "arguments", None) or getattr(part, "text", "")
                assert "".join(texts) == whole, "the deltas are not the part"
            case agproxy.Annotated(choice, citations):
                assert choice not in self.finished, "sources of what is finished"
                said = self.said.get(choice, 0)
                assert all(0 <= c.start <= said and 0 <= c.end <= said for c in citations), "sources of no text"
            case agproxy.Finished(choice):
                assert choice not in self.open and choice not in self.finished, "finished too early or twice"
                self.finished.add(choice)
            case _:
                kind = self.open.get(event.choice, [None])[0]
                assert kind is PART_OF[type(event)], f"{type(event).__name__} outside of its part"
                self.open[event.choice].append(event.text)
                self.said[event.choice] = self.said.get(event.choice, 0) + len(event.text) * (kind is agproxy.Text)


FORMS = (agproxy.ChatRenderer, agproxy.CompletionRenderer, agproxy.ResponseRenderer)


def makers(r: Random, bodies: Sequence[Any]) -> list[Callable[[], agproxy.Renderer]]:
    """Makers of a renderer of each form, for a body of each."""
    head = agproxy.Head(ID, 1, "gpt-4o", g.maybe(r, 70), g.maybe(r, 30), now=lambda: 2)
    return [functools.partial(form, head, body) for form, body in zip(FORMS, bodies, strict=True)]


def check_answer(events: list[agproxy.Event], forms: Iterable[Callable[[], agproxy.Renderer]]) -> None:
    """An answer's events are in order, and each form of it can be sent."""
    Grammar().check(events)
    for form in forms:
        frames("".join(map(form().render, events)))
        if isinstance(events[-1], agproxy.Ended):
            strict_json(agproxy.dump_bytes(form().whole(events)))


def findings(body: Any, model: str) -> list[Any]:
    """What Google would refuse in a body, and what the gateway's own must not have either."""
    envelope = {"model": model, "project": "p", "request": body}
    found = validate(body, "GenerateContentRequest", model=model, enable=OWN_OUTPUT)
    found += validate(envelope, "CodeAssistGenerateContentRequest", enable=OWN_OUTPUT)
    return [one for one in found if one.rule not in ("roles_alternate", "empty_text") or not is_meant(body, one)]


def memory() -> agproxy.SignatureMemory:
    made = agproxy.SignatureMemory()
    call, words = agproxy.ToolCall("c1", "f", "{}", "c2ln"), agproxy.Text("hi", agproxy.Signature("c2ln", 0, 1))
    made.remember([call, words], g.MODELS[4])
    return made


def fetched(request: agproxy.Request) -> agproxy.Request:
    """The request with the content of its links, as the gateway fetches it."""
    links = {media.url: media for message in request.messages for media in agproxy.links_in(message.parts)}
    content = {url: replace(media, url="", mime="image/png", data="AAAA") for url, media in links.items()}
    messages = [replace(one, parts=agproxy.with_content(one.parts, content)) for one in request.messages]
    return replace(request, messages=tuple(messages))


def build(request: agproxy.Request, model: str, reduced: bool) -> agproxy.Built:
    """The body that the upstream is sent, at first or after it refused a schema."""
    signed = memory().recall(request, model)
    return agproxy.build_generate_content(signed, agproxy.traits_of(model, {}), reduce_schemas=reduced)


def received(body: Any) -> Any:
    """A body as it comes in by HTTP."""
    return agproxy.parse_body(json.dumps(body).encode())


def check_built(requests: Iterable[agproxy.Request], models: Sequence[str], source: Any) -> None:
    """Each body built from valid requests has no finding, holds all that was said, and can be sent."""
    fetched_ = [fetched(request) for request in requests]
    forms = (False, True)
    built = [(one, model, form, build(one, model, form)) for one in fetched_ for model in models for form in forms]
    found = [f"{model} {form}: {one}" for _, model, form, made in built for one in findings(made.body, model)]
    assert not found, found
    for request, _, _, made in built:
        check_kept(request, made.body)
        for change in request.changes + made.changes:
            assert exists(change.pointer, source), f"no such place: {change}"
        assert len(agproxy.dumps(made.body)) < 200 * len(json.dumps(source)) + 500_000, "the body is huge"
        strict_json(agproxy.dump_bytes(made.body))


def check_kept(request: agproxy.Request, body: Any) -> None:
    """Each text, file and call of the messages is in a body."""
    parts: list[Any] = [part for message in request.messages for part in message.parts]
    parts += [inner for part in parts if isinstance(part, agproxy.ToolResult) for inner in part.parts]
    places = [(key, container[key]) for container, key in g.nodes(body["contents"])]
    keys = [key for key, _ in places]
    assert keys.count("functionCall") == sum(isinstance(part, agproxy.ToolCall) for part in parts), "a call is lost"
    files = keys.count("inlineData") + keys.count("fileData")
    assert files == sum(isinstance(part, agproxy.Media) for part in parts), "a file is lost"
    said = "".join(value for key, value in places if isinstance(value, str) and key != "thoughtSignature")
    results = [value for key, value in places if key == "response"]
    for part in parts:
        if isinstance(part, agproxy.Text):
            assert part.text in said or agproxy.parse_json(part.text) in results, f"a text is lost: {part.text[:40]!r}"


def exists(pointer: str, value: Any) -> bool:
    """Whether a JSON pointer leads to a place in a value."""
    for step in pointer.split("/")[1:]:
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(step)) if step.isdigit() else None
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return False
    return True


def check_embeddings(request: agproxy.EmbeddingRequest) -> Any:
    """The body built from an embeddings request, which has no finding."""
    body = strict_json(agproxy.dump_bytes(agproxy.build_embeddings(request.texts, request.model, request.dimensions)))
    found = validate(body, "BatchEmbedContentsRequest")
    assert not found, found
    return body


# ---- the kinds of cases


class Kind(NamedTuple):
    make: Callable[[Random], Any]
    check: Callable[[Any, Random], None]


@functools.lru_cache
def recorded() -> tuple[Any, ...]:
    """Known streams: the golden cases', and each answer and error among the samples as a stream of one chunk."""
    golden = [yaml.safe_load(path.read_text())["chunks"] for path in sorted((TESTS / "data" / "cases").glob("*.yaml"))]
    samples = json.loads((TESTS / "data" / "gemini_schema" / "samples.json").read_text())
    answers = [[s["body"]] for s in samples if s.get("type", "").endswith(("ContentResponse", "ErrorBody"))]
    return (*golden, *answers)


def make_answer(r: Random) -> list[bytes]:
    """The pieces of a stream, damaged mostly; a stream of one piece without a frame is a whole answer."""
    choices = 1 + 2 * g.maybe(r, 20)
    chunks = r.choice(recorded()) if g.maybe(r, 40) else g.answer_chunks(r, choices)
    chunks = g.mutated(r, chunks) if g.maybe(r, 85) else chunks
    if not isinstance(chunks, list):
        chunks = [chunks]
    if g.maybe(r, 25):
        data = g.json_bytes(r, r.choice(chunks or [None]))
        return [g.damaged(r, data) if g.maybe(r, 20) else data]
    data = g.sse_bytes(r, chunks)
    return g.cut(r, g.damaged(r, data) if g.maybe(r, 40) else data)


def check_pieces(pieces: list[bytes], r: Random) -> None:
    ids, legacy = iter(range(10**6)), g.maybe(r, 15)
    tools = {} if legacy else TOOLS
    reader = agproxy.GeminiReader(lambda: f"call_{next(ids)}", tools, parallel_calls=g.maybe(r, 80))
    if len(pieces) == 1 and pieces[0].startswith((b"{", b"[")):
        events = reader.whole(pieces[0])
    else:
        events = [event for piece in pieces for event in reader.feed(piece)] + reader.close()
    bodies = {"functions": [{}]} if legacy else {}, {"prompt": ["a"] * 200, "echo": g.maybe(r, 30)}, {}
    check_answer(events, makers(r, bodies))


def make_error(r: Random) -> tuple[int, bytes]:
    error = g.error_answer(r) if g.maybe(r, 80) else r.choice(recorded())[-1]
    data = g.json_bytes(r, g.mutated(r, error))
    page = b"<html><title>413</title></html>"
    return r.choice((400, 401, 403, 404, 413, 429, 500, 502, 503, 504, 529, 302)), page if g.maybe(r, 3) else data


def check_error(case: tuple[int, bytes], _: Random) -> None:
    error = agproxy.classify_error(case[0], agproxy.parse_json(case[1]))
    assert isinstance(error, agproxy.UpstreamError) and isinstance(error.message, str)
    assert error.retry_after_s is None or 0 <= error.retry_after_s <= agproxy.RETRY_AFTER_S_MAX
    check_answer([agproxy.Failed(error)], makers(Random(0), [{}] * 3))


def make_embedding_answer(r: Random) -> bytes:
    vectors = [{"values": [r.choice((0, 0.5, -1, 1e-9)) for _ in range(3)]} for _ in range(2)]
    return g.json_bytes(r, g.mutated(r, {"embeddings": vectors, **g.usage(r)}))


def check_embedding_answer(data: bytes, r: Random) -> None:
    answer = agproxy.parse_json(data)
    request = agproxy.EmbeddingRequest("m", ("a", "b"), None, g.maybe(r, 50))
    try:
        vectors = agproxy.read_embeddings(answer if isinstance(answer, dict) else {}, 2)
    except agproxy.UpstreamBroken:
        return
    strict_json(agproxy.dump_bytes(agproxy.render_embeddings(request, vectors, 1)))


def make_file(r: Random) -> str:
    """An accounts file, damaged, or with its values and keys mixed up."""
    text = (TESTS.parent / "accounts.yaml.example").read_text()
    if g.maybe(r, 50):
        return yaml.safe_dump(g.mutated(r, yaml.safe_load(text)), allow_unicode=True)
    data = text.encode()
    for _ in range(r.randint(1, 5)):
        data = g.damaged(r, data)
    return data.decode(errors="replace")


def check_file(text: str, _: Random) -> None:
    env = {"AGPROXY_API_KEY": "planted-key", "GEMINI_API_KEY": "planted-key"}
    try:
        agproxy.load_config(text, "f.yaml", env, Path.read_text)
    except agproxy.ConfigError as error:
        assert all(line.startswith("f.yaml:") for line in str(error).split("\n")), error
        assert "planted-key" not in str(error), error


def check_chat(body: Any, r: Random) -> None:
    check_built(agproxy.parse_chat(received(body)), r.sample(g.MODELS, 3), body)


def check_response(body: Any, r: Random) -> None:
    check_built(agproxy.parse_response(received(body)), r.sample(g.MODELS, 2), body)


def check_completion(body: Any, r: Random) -> None:
    check_built(agproxy.parse_completion(received(body)), r.sample(g.MODELS, 2), body)


def check_embedding(body: Any, _: Random) -> None:
    check_embeddings(agproxy.parse_embeddings(received(body)))


VALID: dict[str, Kind] = {
    "chat": Kind(g.chat_body, check_chat),
    "response": Kind(g.response_body, check_response),
    "completion": Kind(g.completion_body, check_completion),
    "embedding": Kind(g.embedding_body, check_embedding),
}


def make_broken(r: Random) -> tuple[str, str]:
    """A door, and the text of a broken body for it."""
    door = r.choice(("chat", "chat", "chat", "response", "response", "completion", "embedding"))
    body = g.mutated(r, {"body": VALID[door].make(r)})
    return door, g.json_bytes(r, body.get("body") if isinstance(body, dict) else body).decode("utf-8", "surrogatepass")


def check_broken(case: tuple[str, str], r: Random) -> None:
    door, written = case
    try:
        body = agproxy.parse_body(written.encode("utf-8", "surrogatepass"))
        follow_broken(door, body, r)
    except agproxy.GatewayError as error:
        assert error.status in (400, 404) and error.message, f"{error.status} {error.message}"
        strict_json(agproxy.dump_bytes(agproxy.openai_error(error)))


def follow_broken(door: str, body: Any, r: Random) -> None:
    """The road of a body that was taken; a refusal names the field, or the body has none."""
    chat, response, completion = agproxy.DOORS
    parse = {"chat": chat.parse, "response": response.parse, "completion": completion.parse}
    try:
        if door == "embedding":
            return strict_json(
                agproxy.dump_bytes(agproxy.build_embeddings(agproxy.parse_embeddings(body).texts, "m", 1))
            )
        requests = parse[door](body, None)
    except agproxy.BadRequest as error:
        assert error.param or not isinstance(body, dict), f"no param: {error.message}"
        raise
    for request in requests[:2]:
        for reduced in (False, True):
            strict_json(agproxy.dump_bytes(build(request, r.choice(g.MODELS), reduced).body))
    form = makers(r, [body] * 3)[("chat", "completion", "response").index(door)]
    check_answer(agproxy.GeminiReader(lambda: "c", TOOLS).whole(json.dumps(ANSWER[0]).encode()), [form])


BROKEN: dict[str, Kind] = {
    "answer": Kind(make_answer, check_pieces),
    "error": Kind(make_error, check_error),
    "vectors": Kind(make_embedding_answer, check_embedding_answer),
    "body": Kind(make_broken, check_broken),
    "file": Kind(make_file, check_file),
}
KINDS = VALID | BROKEN


# ---- the run


class Run:
    """Counts the cases of each kind, and keeps one example of each distinct failure."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counts: dict[str, int] = {}
        self.failures: dict[str, list[str]] = {}

    def play(self, kind: str, number: int) -> None:
        r = Random(f"{self.seed} {kind} {number}")
        made = KINDS[kind].make(r)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        try:
            KINDS[kind].check(made, r)
        except Exception as error:  # noqa: BLE001  # what escapes is what is looked for
            told = f"{kind}:{number} --seed {self.seed}: {type(error).__name__}: {error!s:.500}\n  {made!r:.4000}"
            self.failures.setdefault(place_of(error), []).append(told)

    def told(self) -> str:
        """Each distinct failure with its shortest example, then the counts."""
        failed = [f"{len(all_)} x {place}\n  {min(all_, key=len)}" for place, all_ in self.failures.items()]
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return "\n".join([*failed, f"{counts}; {sum(map(len, self.failures.values()))} failures (seed {self.seed})"])


def place_of(error: Exception) -> str:
    """Where in the gateway an exception came from, or which promise was broken where."""
    steps = traceback.extract_tb(error.__traceback__)
    inside = [step for step in steps if step.filename == agproxy.__file__]
    if inside and not isinstance(error, AssertionError):
        return f"{type(error).__name__} in {inside[-1].name}: {inside[-1].line}"
    checks = [step.name for step in steps if step.name.startswith("check_")]
    rules = sorted(set(re.findall(r"\[([a-z]\w+)\]", str(error))))
    return f"{type(error).__name__} in {checks[-1]}: {' '.join(rules) or re.sub(r'[0-9]+', 'N', str(error))[:60]}"


SHARES = {
    "answer": 80,
    "error": 15,
    "vectors": 5,
    "body": 30,
    "file": 2,
    "chat": 85,
    "response": 10,
    "completion": 3,
    "embedding": 2,
}


def run(bodies: int, requests: int, seed: int = 0, seconds: float = float("inf")) -> Run:
    """Plays that many damaged answers, broken bodies beside them, and that many valid bodies, each kind in turn."""
    totals = {kind: (requests if kind in VALID else bodies) * share // 100 for kind, share in SHARES.items()}
    made, until = Run(seed), time.monotonic() + seconds
    for step in range(100):
        for kind, total in totals.items():
            for number in range(total * step // 100, total * (step + 1) // 100):
                if time.monotonic() < until:
                    made.play(kind, number)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--bodies", type=int, default=100_000, help="damaged answers of Gemini; broken bodies are added"
    )
    parser.add_argument("--requests", type=int, default=10_000, help="valid bodies")
    parser.add_argument("--wire", type=int, default=0, help="damaged HTTP, of clients and of Gemini, by real sockets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="play one case again, as KIND:NUMBER")
    given = parser.parse_args()
    started = time.monotonic()
    if given.case:
        played = Run(given.seed)
        played.play(given.case.split(":")[0], int(given.case.split(":")[1]))
    elif given.wire:
        told, failures = fuzz_wire.run(given.wire, given.seed)
        sys.stdout.write("\n".join([*failures[:20], told, ""]))
        return 1 if failures else 0
    else:
        played = run(given.bodies, given.requests, given.seed)
    sys.stdout.write(f"{played.told()}\n{time.monotonic() - started:.1f} s\n")
    return 1 if played.failures else 0


if __name__ == "__main__":
    sys.exit(main())
