"""What becomes of every field, part and tool form of OpenAI's request bodies: one row each, with the cases that prove it.

The rows stand in tests/data/fields/*.yaml. A row names its JSON `type` and, by fate, its cases. A case lays `send` over the plain
request of its API (`without` takes fields out of it; `messages`, `content`, `part`, `tools`, `schema` are short for
what they stand for) and says what is to come of it: `body`, `contents`, `absent` and `reduced` of Gemini's body,
`request` of the Request, `answer` of the choice that is rendered for the parts `said`, `changes` by pointer (`at`: one
of the row's fate), `param` and `code` of a refusal. Nothing else may be changed, and Google must take every body.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import DATA, called_from, read_yaml
from fake_gemini import OWN_OUTPUT, findings, is_meant, validate
from openai_schema import components

import antigravity_proxy as agproxy

TABLES: dict[str, Any] = {path.stem: read_yaml(path) for path in sorted((DATA / "fields").glob("*.yaml"))}
FATES = ("mapped", "renamed", "emulated", "clamped", "ignored", "dropped", "refused")
# What a case may say.
SENT = {
    "send",
    "without",
    "model",
    "messages",
    "input",
    "content",
    "part",
    "tools",
    "schema",
    "like",
    "said",
    "root",
    "x",
}
SHOWN = {"body", "contents", "absent", "reduced", "request", "requests", "mapped_model", "answer", "becomes", "lost"}
WORDS = SENT | SHOWN | {"json", "at", "changes", "param", "code"}
HI = [{"role": "user", "content": "hi"}]
PLAIN: dict[str, dict[str, Any]] = {
    "chat": {"model": "gemini-2.5-flash", "messages": HI},
    "completions": {"model": "gemini-2.5-flash", "prompt": "hi"},
    "embeddings": {"model": "gemini-embedding-001", "input": "hi"},
    "responses": {"model": "gemini-2.5-flash", "input": "hi"},
}
API = {"messages": "chat", "tools": "chat", "schemas": "chat", "items": "responses"}
MODELS = ("gemini-2.0-flash", "gemini-2.5-flash", "gemini-3-pro-preview", "gemini-3.6-flash", "gemini-4-ultra")
APIS = ("gemini", "v1internal")
HEAD = agproxy.Head("0123456789abcdef01234567", 1, "gpt-4o", now=lambda: 2)
DOORS = dict(zip(("chat", "responses", "completions"), agproxy.DOORS, strict=True))
# Words that a reduced schema never has, for many a schema is refused for its limits of sizes.
LIMITS = {f"{end}{of}" for end in ("min", "max") for of in ("Items", "Length", "Properties", "imum")} | {"pattern"}
OF_A_TYPE: dict[str, list[Any]] = {
    "string": ["x", ""],
    "integer": [1, 0],
    "number": [1.5],
    "boolean": [True, False],
    "object": [{"x": 1}, {}],
    "array": [[1], []],
}

# ---- what has to have a row

DOCUMENTED = {
    "chat": """model messages max_completion_tokens max_tokens temperature top_p n stop seed presence_penalty
        frequency_penalty logprobs top_logprobs logit_bias user metadata store service_tier safety_identifier
        prompt_cache_key prompt_cache_retention prompt_cache_options verbosity prediction moderation stream
        stream_options tools tool_choice parallel_tool_calls functions function_call response_format reasoning_effort
        modalities audio web_search_options""",
    "messages": """role.system role.developer role.user role.assistant role.tool role.function role.other
        content.string content.array content.empty content.missing part.text part.image_url part.input_audio part.file
        part.input_text part.input_image part.input_file part.output_text part.refusal part.other
        assistant.content assistant.refusal assistant.audio assistant.annotations assistant.reasoning_content
        assistant.reasoning assistant.name assistant.function_call assistant.tool_calls tool_calls.function
        tool_calls.custom tool_calls.arguments tool_calls.extra_content tool.tool_call_id tool.content tool.order
        order.assistant_first order.neighbours order.late_system order.prefill""",
    "tools": """function.nested function.flat function.name function.description function.parameters function.strict
        custom.nested custom.flat custom.text custom.grammar tool_choice.none tool_choice.auto tool_choice.required
        tool_choice.function tool_choice.custom tool_choice.allowed_tools other.types legacy.functions
        legacy.function_call""",
    "schemas": """$schema $id $defs definitions $ref additionalProperties patternProperties const default examples title
        oneOf anyOf allOf not type enum exclusiveMinimum multipleOf pattern format prefixItems items true {}""",
    "completions": """model prompt suffix echo best_of n max_tokens stop logprobs stream stream_options temperature top_p
        presence_penalty frequency_penalty logit_bias seed user""",
    "embeddings": "model input encoding_format dimensions user",
    "responses": """model input instructions previous_response_id conversation store max_output_tokens temperature top_p
        top_logprobs parallel_tool_calls stream text reasoning include tools tool_choice background stream_options
        truncation metadata user safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
        service_tier max_tool_calls context_management moderation client_metadata prompt""",
    "items": """message function_call function_call_output custom_tool_call custom_tool_call_output reasoning
        additional_tools item_reference agent_message compaction hosted other input_image input_file""",
}
IN_THE_MODULE = {name: door.fields for name, door in DOORS.items()}
PUBLISHED = {
    "chat": "CreateChatCompletionRequest",
    "completions": "CreateCompletionRequest",
    "embeddings": "CreateEmbeddingRequest",
    "responses": "CreateResponse",
}


def published(name: str) -> set[str]:
    """The names of a request's fields in OpenAI's own description."""
    schema = components()["schemas"][name]
    bases = [base["$ref"].rpartition("/")[2] for base in schema.get("allOf", ()) if "$ref" in base]
    own = [part.get("properties", {}) for part in (schema, *schema.get("allOf", ()))]
    return {key for properties in own for key in properties}.union(*map(published, bases))


@pytest.mark.parametrize("table", DOCUMENTED)
def test_each_field_has_a_row_and_each_row_a_case(table: str) -> None:
    rows = TABLES[table]["rows"]
    wanted = {*DOCUMENTED[table].split(), *IN_THE_MODULE.get(table, ())}
    wanted |= published(PUBLISHED[table]) if table in PUBLISHED else set()
    assert sorted(wanted - {str(name) for name in rows}) == []
    for name, row in rows.items():
        fates = (
            {"": row} if table == "schemas" else {fate: row[fate] for fate in row.keys() - {"type", "needed", "with"}}
        )
        assert fates, f"{name} has no fate"
        assert fates.keys() <= {"", *FATES}, f"{name} has a fate that there is not"
        assert all(fates.values()), f"{name} has no case"
        unknown = {word for its_cases in fates.values() for case in its_cases for word in case} - WORDS
        assert not unknown, f"{name} has a case with words that say nothing"


# ---- the cases


def sent(table: str, row: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The body that a case sends."""
    body = {**PLAIN[API.get(table, table)], **row.get("with", {}), **case.get("send", {})}
    body |= {"model": case["model"]} if "model" in case else {}
    body |= {key: case[key] for key in ("messages", "input", "tools") if key in case}
    if "content" in case or "part" in case:
        body["messages"] = [{"role": "user", "content": case.get("content", [case.get("part")])}]
    if "schema" in case:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": case["schema"]}}]
    return {key: value for key, value in body.items() if key not in case.get("without", ())}


def parsed(table: str, body: Any) -> Any:
    """The requests of a body, or the one of an embeddings body."""
    api = API.get(table, table)
    return agproxy.parse_embeddings(body) if api == "embeddings" else DOORS[api].parse(body, None)


@cache
def traits_for(model: str) -> agproxy.Traits:
    return agproxy.traits_of(agproxy.map_model(model, agproxy.Config(()), None).model, {})


def built(request: agproxy.Request, model: str | None = None, *, reduced: bool = False) -> agproxy.Built:
    return agproxy.build_generate_content(request, traits_for(model or request.model), reduce_schemas=reduced)


def refused_by_google(request: agproxy.Request) -> dict[str, list[str]]:
    """By model, form of its schemas and API, what Google would not take of the body for it."""
    found = {}
    for model, reduced in itertools.product(MODELS, (False, True)):
        body = built(request, model, reduced=reduced).body
        json.dumps(body, allow_nan=False).encode()
        agproxy.dumps(body).encode()
        for api in APIS:
            wrong = validate(body, "GenerateContentRequest", model=model, api=api, enable=OWN_OUTPUT)
            found[f"{model} {reduced} {api}"] = [str(one) for one in wrong if not is_meant(body, one)]
    return {where: wrong for where, wrong in found.items() if wrong}


def missing(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Where something is not as expected: objects may hold more, lists may not."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        return [
            line
            for key, value in expected.items()
            for line in (
                missing(value, actual[key], f"{path}.{key}") if key in actual else [f"{path}.{key} is missing"]
            )
        ]
    if isinstance(expected, list) and isinstance(actual, list | tuple) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return [line for i, (one, other) in pairs for line in missing(one, other, f"{path}[{i}]")]
    same = expected == actual and isinstance(expected, bool) == isinstance(actual, bool)
    return [] if same else [f"{path} is {actual!r}, not {expected!r}"]


def found_at(value: Any, path: str) -> bool:
    """Whether a body holds something at a path such as generationConfig.seed."""
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value.get(step)
        if value is None:
            return False
    return True


def seen(request: Any) -> dict[str, Any]:
    return {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}


def told(changes: tuple[agproxy.Change, ...]) -> set[tuple[str, str]]:
    assert len(set(changes)) == len(changes), f"told twice: {changes}"
    return {(change.pointer, change.kind) for change in changes}


def answered(table: str, body: Any, request: agproxy.Request, made: agproxy.Built, parts: list[Any]) -> Any:
    """The first choice of what the client is answered when Gemini says these parts."""
    ids = itertools.count(1)
    reader = agproxy.GeminiReader(lambda: f"call_{next(ids)}", made.tools, parallel_calls=request.parallel_calls)
    said = {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}]}
    events = reader.whole(json.dumps(said).encode())
    whole = DOORS[API.get(table, table)].renderer(HEAD, body).whole(events)
    return whole | whole["choices"][0]


def cases(*fates: str, tables: Iterable[str] = TABLES.keys() - {"embeddings", "schemas"}) -> list[Any]:
    return [
        pytest.param(table, row, fate, case, id=f"{table}-{name}-{fate}-{i}")
        for table in sorted(tables)
        for name, row in TABLES[table]["rows"].items()
        for fate in fates
        for i, case in enumerate(row.get(fate, ()))
    ]


@pytest.mark.parametrize(("table", "row", "fate", "case"), cases("refused", tables=TABLES.keys() - {"schemas"}))
def test_what_is_refused(table: str, row: dict[str, Any], fate: str, case: dict[str, Any]) -> None:
    with pytest.raises(agproxy.BadRequest) as refusal:
        parsed(table, sent(table, row, case))
    assert (refusal.value.param, refusal.value.code) == (case["param"], case.get("code", refusal.value.code))


@pytest.mark.parametrize(("table", "row", "fate", "case"), cases(*FATES[:-1]))
def test_what_becomes_of_it(table: str, row: dict[str, Any], fate: str, case: dict[str, Any]) -> None:
    body = sent(table, row, case)
    requests = parsed(table, body)
    request, made = requests[0], built(requests[0])
    expected = set(case.get("changes", {}).items()) | ({(case["at"], fate)} if "at" in case else set())
    assert fate in ("mapped", "ignored") or fate in {kind for _, kind in expected}, "the case does not show the fate"
    assert told(request.changes + made.changes) == expected
    if fate == "ignored":
        plain = sent(table, row, {key: value for key, value in case.items() if key != "send"} | case.get("like", {}))
        assert made.body == built(parsed(table, plain)[0]).body
    assert missing(case.get("body", {}), made.body) == []
    assert missing(case.get("contents", made.body["contents"]), made.body["contents"]) == []
    assert [path for path in case.get("absent", ()) if found_at(made.body, path)] == []
    assert missing(case.get("reduced", {}), built(request, reduced=True).body) == []
    assert missing(case.get("request", {}), seen(request)) == []
    assert len(requests) == case.get("requests", 1)
    if "mapped_model" in case:
        assert agproxy.map_model(request.model, agproxy.Config(()), None).model == case["mapped_model"]
    if "answer" in case:
        assert missing(case["answer"], answered(table, body, request, made, case["said"])) == []
    assert {i: wrong for i, one in enumerate(requests) if (wrong := refused_by_google(one))} == {}


@pytest.mark.parametrize(("table", "row", "fate", "case"), cases(*FATES[:-1], tables=["embeddings"]))
def test_what_becomes_of_it_in_embeddings(table: str, row: dict[str, Any], fate: str, case: dict[str, Any]) -> None:
    request = parsed(table, sent(table, row, case))
    made = agproxy.build_embeddings(request.texts, request.model, request.dimensions)
    assert missing(case.get("body", {}), made) == []
    assert missing(case.get("request", {}), seen(request)) == []
    assert findings(made, request.model, "BatchEmbedContentsRequest") == []
    assert fate != "ignored" or request == parsed(table, PLAIN[table])


# ---- types


def test_a_refusal_repeats_no_more_than_its_start() -> None:
    body = {"model": "m", "messages": [{"role": "x" * 1_000_000, "content": "hi"}]}
    with pytest.raises(agproxy.BadRequest, match="Send system, developer") as refused:
        agproxy.parse_chat(body)
    assert len(refused.value.message) < 2 * agproxy.ERROR_CHARS_MAX


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in PLAIN for name, row in TABLES[table]["rows"].items() if "type" in row],
)
def test_a_wrong_type_is_refused_by_name(table: str, name: str) -> None:
    row = TABLES[table]["rows"][name]
    right = {*row["type"].split(), *(["integer"] if row["type"] == "number" else [])}
    wrong = {}
    for value in (value for kind, values in OF_A_TYPE.items() if kind not in right for value in values):
        try:
            parsed(table, sent(table, row, {"send": {name: value}}))
            wrong[repr(value)] = "is taken"
        except agproxy.BadRequest as refusal:
            if (refusal.param, refusal.code) != (name, "invalid_type"):
                wrong[repr(value)] = f"param {refusal.param}, code {refusal.code}"
    assert wrong == {}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table in PLAIN for name in TABLES[table]["rows"]], ids=str
)
def test_null_is_as_if_it_were_not_there(table: str, name: str) -> None:
    row = TABLES[table]["rows"][name]
    with_null = sent(table, row, {"send": {name: None}})
    if row.get("needed"):
        with pytest.raises(agproxy.BadRequest) as refusal:
            parsed(table, with_null)
        assert (refusal.value.param, refusal.value.code) == (name, "missing_required_parameter")
    else:
        assert parsed(table, with_null) == parsed(table, sent(table, row, {"without": [name]}))


@pytest.mark.parametrize("table", PLAIN)
def test_all_fields_null_are_as_if_none_were_there(table: str) -> None:
    assert parsed(table, dict.fromkeys(TABLES[table]["rows"]) | PLAIN[table]) == parsed(table, PLAIN[table])


# ---- schemas


def with_schema(root: Any) -> agproxy.Request:
    """A request for JSON by a schema, and with a tool whose parameters it describes."""
    function = {"name": "f", "parameters": root}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": root}}
    chat = PLAIN["chat"] | {"tools": [{"type": "function", "function": function}], "response_format": form}
    return agproxy.parse_chat(chat)[0]


def declared(made: agproxy.Built) -> dict[str, Any]:
    declaration: dict[str, Any] = made.body["tools"][0]["functionDeclarations"][0]
    return declaration


def in_a_schema(case: dict[str, Any]) -> Any:
    return case.get("root", {"type": "object", "properties": {"p": case.get("x")}})


def schemas_in(schema: Any) -> Iterable[dict[str, Any]]:
    """A schema in Google's form, and those inside of it."""
    yield schema
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), schema.get("items")]
    for one in filter(None, inner):
        yield from schemas_in(one)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{word}-{i}")
        for word, row in TABLES["schemas"]["rows"].items()
        for i, case in enumerate(row)
    ],
)
def test_a_schema(case: dict[str, Any]) -> None:
    root = in_a_schema(case)
    [request] = agproxy.parse_chat(sent("schemas", {}, {"schema": root}))
    whole = built(request)
    assert (declared(whole).get("parametersJsonSchema"), whole.changes) == (case.get("json", root), ())
    made = built(request, reduced=True)
    reduced = declared(made).get("parameters", {})
    assert [node for node in schemas_in(reduced) if "anyOf" in node and len(node) > 1] == []
    assert [node.keys() & LIMITS for node in schemas_in(reduced) if node.keys() & LIMITS] == []
    becomes = case.get("becomes", {})
    expected = becomes if "root" in case else {"properties": {"p": becomes}}
    assert missing(expected, reduced) == [] or (not becomes and "object" in case.get("lost", ()))
    assert {change.pointer.startswith("/tools/0/function/parameters") for change in made.changes} <= {True}
    reasons = sorted(change.reason for change in made.changes)
    assert [word for word in case.get("lost", ()) if not any(f"'{word}'" in reason for reason in reasons)] == []
    assert len(reasons) == len(case.get("lost", ())) or not case.keys() & {"becomes", "lost"}, reasons
    assert refused_by_google(request) == {}


@pytest.mark.parametrize(
    "root",
    [root for odd in TABLES["schemas"]["odd"] for root in (in_a_schema({"x": odd}), odd)],
    ids=json.dumps,
)
def test_an_odd_schema_never_fails(root: Any) -> None:
    assert refused_by_google(with_schema(root)) == {}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def referring(count: int, *, to: Any) -> dict[str, Any]:
    """A schema of definitions, of which each refers to others twice or more."""
    definitions = {
        f"d{i}": {
            "type": "object",
            "properties": {f"p{j}": {"$ref": f"#/$defs/d{j}"} for j in to(i, count)} | {"x": {}},
        }
        for i in range(count)
    }
    return {"type": "object", "properties": {"p": {"$ref": "#/$defs/d0"}}, "$defs": definitions}


def chain(count: int) -> dict[str, Any]:
    """A schema of definitions, each of which is but the next one."""
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"type": "object", "properties": {"p": {"$ref": "#/$defs/d0"}}, "$defs": links}


@pytest.mark.parametrize(
    "root",
    [
        nested(400),
        nested(400) | {"$defs": {}},
        chain(3000),
        referring(8, to=lambda i, count: range(count)),
        referring(22, to=lambda i, count: range(i + 1, min(i + 3, count))),
    ],
    ids=["deep", "deep with definitions", "chain", "cyclic", "wide"],
)
def test_a_huge_schema_stays_within_bounds(root: Any) -> None:
    for reduced in (False, True):
        assert len(agproxy.dumps(built(with_schema(root), reduced=reduced).body)) < 1_000_000


# ---- odd input


@pytest.mark.parametrize("frames", [0, 400])
@pytest.mark.parametrize("depth", [1, 198, 199, 200, 300, 500, 900, 950, 970, 980, 985, 990, 995, 1000, 100_000])
def test_deep_arguments_and_results_are_sent_as_objects_up_to_200_levels(depth: int, frames: int) -> None:
    """Whoever calls: deeper ones are sent as text."""
    deep = '{"a":' + "[" * depth + "]" * depth + "}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": deep}]
    request = agproxy.parse_chat({"model": "gemini-2.5-flash", "messages": [*HI, *said]})[0]
    sent = called_from(frames, lambda: agproxy.dumps(built(request).body))
    as_object, as_text = f'"args":{deep}', f'"args":{{"input":{json.dumps(deep)}}}'
    assert (as_object in sent, as_text in sent) == (depth < 200, depth >= 200)
    as_object, as_text = f'"response":{deep}', f'"response":{{"output":{json.dumps(deep)}}}'
    assert (as_object in sent, as_text in sent) == (depth < 200, depth >= 200)


@pytest.mark.parametrize(
    "where",
    [
        {"messages": [{"role": "user", "content": "TEXT"}]},
        {"messages": [{"role": "system", "content": "TEXT"}, *HI]},
        {"tools": [{"type": "function", "function": {"name": "TEXT", "description": "TEXT"}}]},
        {"stop": "TEXT"},
    ],
    ids=json.dumps,
)
def test_half_a_surrogate_pair_is_sent_or_refused(where: dict[str, Any]) -> None:
    text = json.dumps(PLAIN["chat"] | where).replace("TEXT", r"\ud800")
    with contextlib.suppress(agproxy.BadRequest):
        assert agproxy.encoded(agproxy.dumps(built(agproxy.parse_chat(agproxy.parse_body(text.encode()))[0]).body))


# ---- explain


def example(table: str, name: str) -> Any:
    """A value of the field that is taken, None where none is."""
    row = TABLES[table]["rows"][name]
    bodies = (sent(table, row, case) for fate in FATES[:-1] for case in row.get(fate, ()))
    return next((body[name] for body in bodies if name in body), None)


def explained(body: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """What `agproxy explain` prints; its `fields` as pairs, so that what stands there twice is seen."""
    none = dict.fromkeys(("GEMINI_API_KEY", "GOOGLE_API_KEY", "AGPROXY_ACCOUNTS", "XDG_CONFIG_HOME", "HOME"))
    run = CliRunner().invoke(agproxy.main, ["explain", "-", *arguments], input=json.dumps(body), env=none)
    assert run.exit_code == 0, run.output
    told: dict[str, Any] = json.loads(run.output)
    pairs = json.loads(run.output, object_pairs_hook=list)
    return told | {"fields": next(value for key, value in pairs if key == "fields")}


def fields_of(told: dict[str, Any]) -> list[str]:
    return sorted(pointer for pointer, _ in told["fields"] if pointer.count("/") == 1)


@pytest.mark.parametrize("table", ["chat", "completions", "responses"])
def test_explain_lists_every_field_once(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = {name: example(table, name) for name in DOCUMENTED[table].split()}
    told = explained(body)
    assert fields_of(told) == sorted(f"/{name}" for name in body)
    assert all(what.split(":")[0] in FATES for _, what in told["fields"])


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        (PLAIN["chat"] | {"a/b": 1, "a.b": 1, "a[0]": 1, "a~b": 1}, ["/a.b", "/a[0]", "/a~0b", "/a~1b"]),
        (PLAIN["responses"] | {"prompt": None}, ["/prompt"]),
        (PLAIN["chat"] | {"prompt": None, "input": None}, ["/input", "/prompt"]),
        (PLAIN["completions"] | {"messages": None, "input": None}, ["/input", "/messages"]),
    ],
    ids=json.dumps,
)
def test_explain_knows_the_body_by_what_it_says(
    body: dict[str, Any], pointers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = explained(body)
    said = "prompt" if body.get("prompt") else "input" if body.get("input") else "messages"
    assert fields_of(told) == sorted(["/model", f"/{said}", *pointers])
    assert told["requests"][0]["contents"] == [{"role": "user", "parts": [{"text": "hi"}]}]


def test_the_longest_lists_are_read_in_time() -> None:
    """Nobody else is served meanwhile: twice as many take twice as long, not four times."""
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    tools = [{"type": "function", "name": f"f{i}"} for i in range(30_000)]
    choice = {"type": "allowed_tools", "mode": "required", "tools": tools}
    began = time.process_time()
    [request] = agproxy.parse_response(
        {"model": "gpt-4o", "input": [item] * 100_000, "tools": tools, "tool_choice": choice}
    )
    assert [len(message.parts) for message in request.messages] == [100_000]
    assert len(built(dataclasses.replace(request, messages=())).body["tools"][0]["functionDeclarations"]) == 30_000
    assert time.process_time() - began < 4
