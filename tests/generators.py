"""Random input for the property tests and the fuzzer: valid bodies of clients, Gemini's answers, mutations of any JSON.

Each function takes a `random.Random`; hypothesis brings one of its own, whose choices it can shrink.
"""

import base64
import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Json = Any
MODELS = (
    *("gemini-2.0-flash", "gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3-pro-preview"),
    *("gemini-3-flash-preview", "gemini-3.5-flash", "gemini-3.6-flash", "gemini-3.7-flash", "gemini-4-ultra"),
)
TEXTS = (
    *(
        "hi",
        "",
        "two\nlines",
        " ",
        "ö\u2028\x85😀",
        "\x00\x1f\t",
        "null",
        "[1, 2]",
        '{"a": 1}',
        '{"$ref": "#/a", "b": 2}',
    ),
    *('{"error": "no", "n": [null]}', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud83d"}', '{"a', "```json\n{}\n```"),
    *("data: {}\r\n\r\n", "cut \ud83d", "x" * 300),
)
NAMES = (
    *("f", "get_weather", "mcp.files/read", "mcp_files_read", "1st", "a b", "naïve", "日本語", "-", "a:b", "f.g"),
    *("x" * 64, "y" * 70 + "1", "y" * 70 + "2", "give_final_answer", "f__g"),
)
IDS = ("c1", "c2", "c3", "call_" + "0" * 59, "toolu_" + "1" * 80, "f/ö")
LONG_BASE64 = "TG9u" * 5000
BASE64 = ("AAAA", "aGk=", "aGk", "_-8", "iVBORw0KGgo=", "YWJjZGVm" * 30)
IMAGES = ("image/png", "image/jpeg", "image/jpg", "IMAGE/WEBP", "image/png;name=a.png", "application/octet-stream")
LINKS = ("https://example.org/a.png", "http://example.org/b?c=d#e", "https://youtu.be/abc", "gs://bucket/a.pdf")


def maybe(r: Random, percent: int) -> bool:
    return r.randint(1, 100) > 100 - percent


def some(r: Random, make: Callable[[Random], Any], low: int, high: int) -> list[Any]:
    return [make(r) for _ in range(r.randint(low, high))]


def text(r: Random) -> str:
    return r.choice(TEXTS)


def one_of(*values: Any) -> Callable[[Random], Any]:
    return lambda r: r.choice(values)


# ---- messages


def data_url(r: Random, *mimes: str) -> str:
    return f"data:{r.choice(mimes)};base64,{LONG_BASE64 if maybe(r, 2) else r.choice(BASE64)}"


def image(r: Random) -> Json:
    url = r.choice(LINKS) if maybe(r, 25) else data_url(r, *IMAGES)
    if maybe(r, 25):
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    detail = {"detail": r.choice(("auto", "low", "high"))} if maybe(r, 30) else {}
    return {"type": "image_url", "image_url": url if maybe(r, 20) else {"url": url, **detail}}


def file(r: Random) -> Json:
    if maybe(r, 15):
        return {"type": "input_file", "file_url": r.choice(LINKS)}
    mimes = ("application/pdf", "text/plain", "application/json", "application/octet-stream", "video/mp4", "audio/mpeg")
    data = data_url(r, *mimes) if maybe(r, 70) else r.choice(BASE64)
    spec = {"file_data": data, "filename": r.choice(("a.pdf", "b.TXT", "c", "d.json", "e.mp3"))}
    return {"type": "input_file", **spec} if maybe(r, 30) else {"type": "file", "file": spec}


def audio(r: Random) -> Json:
    return {
        "type": "input_audio",
        "input_audio": {"data": r.choice(BASE64), "format": r.choice(("wav", "mp3", "mpeg", "x-wav"))},
    }


def text_part(r: Random) -> Json:
    return {"type": r.choice(("text", "text", "input_text")), "text": text(r)}


def said_part(r: Random) -> Json:
    if maybe(r, 5):
        return {"type": "tool_use", "id": r.choice(IDS), "name": "f", "input": {"a": text(r)}}
    if maybe(r, 20):
        return {"type": "refusal", "refusal": text(r)}
    return {"type": r.choice(("text", "output_text")), "text": text(r)}


def user_part(r: Random) -> Json:
    if maybe(r, 5):
        return {"type": "tool_result", "tool_use_id": r.choice(IDS), "content": content(r, result_part)}
    return r.choice((text_part, text_part, image, file, audio))(r)


def result_part(r: Random) -> Json:
    return r.choice((text_part, text_part, image))(r)


def content(r: Random, part: Callable[[Random], Json]) -> Json:
    return some(r, part, 0, 3) if maybe(r, 50) else text(r)


def call(r: Random, names: tuple[str, ...]) -> Json:
    made: dict[str, Any] = {"id": r.choice(IDS), "type": "function"}
    if maybe(r, 20):
        return made | {"type": "custom", "custom": {"name": r.choice(names), "input": text(r)}}
    if maybe(r, 25):
        made["extra_content"] = {"google": {"thought_signature": r.choice(BASE64)}}
    return made | {"function": {"name": r.choice(names), "arguments": text(r)}}


def assistant(r: Random, names: tuple[str, ...]) -> Json:
    message: dict[str, Any] = {"role": "assistant"}
    if maybe(r, 70):
        message["content"] = None if maybe(r, 20) else content(r, said_part)
    if maybe(r, 60):
        message["tool_calls"] = [call(r, names) for _ in range(r.randint(0, 3))]
    elif maybe(r, 20):
        message["function_call"] = {"name": r.choice(names), "arguments": text(r)}
    if maybe(r, 10):
        message["images"] = [{"type": "image_url", "image_url": {"url": data_url(r, *IMAGES)}}]
    extras = {"refusal": None, "audio": None, "annotations": [], "reasoning_content": "hm", "name": "n"}
    extras |= {"function_call": message.get("function_call"), "tool_calls": message.get("tool_calls")}
    return message | {key: value for key, value in extras.items() if maybe(r, 8)}


def result(r: Random, _: tuple[str, ...]) -> Json:
    return {"role": "tool", "tool_call_id": r.choice(IDS), "content": content(r, result_part)}


def legacy_result(r: Random, names: tuple[str, ...]) -> Json:
    return {"role": "function", "name": r.choice(names), "content": None if maybe(r, 10) else text(r)}


def user(r: Random, _: tuple[str, ...]) -> Json:
    return {"role": "user", "content": content(r, user_part)} | ({"name": "n"} if maybe(r, 5) else {})


def system(r: Random, _: tuple[str, ...]) -> Json:
    return {"role": r.choice(("system", "developer")), "content": content(r, text_part)}


MESSAGES = (user, user, assistant, assistant, result, result, legacy_result, system)


# ---- JSON Schema


def leaf(r: Random) -> dict[str, Any]:
    kind = r.choice(("string", "number", "integer", "boolean", "null"))
    if kind == "string":
        more = (
            {},
            {"format": "date-time"},
            {"pattern": "^a$", "minLength": 1, "maxLength": 5},
            {"contentEncoding": "base64"},
        )
    elif kind in ("number", "integer"):
        limits = ({"minimum": 0, "maximum": 9.5}, {"exclusiveMinimum": 0, "exclusiveMaximum": 7}, {"multipleOf": 2})
        more = ({}, *limits, {"minimum": 1, "exclusiveMinimum": True})
    else:
        more = ({},)
    return {"type": kind, **r.choice(more)}


def listed(r: Random) -> dict[str, Any]:
    values = r.choice((["a", "b"], ["", "a"], [1, 2], [1.5, None], [None], [True, "x", {"a": 1}], ["a", "a"]))
    made: dict[str, Any] = {"const": values[0]} if maybe(r, 40) else {"enum": values}
    return made | ({"type": r.choice(("string", "integer", ["string", "null"]))} if maybe(r, 50) else {})


def array(r: Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "array"}
    if maybe(r, 60):
        made["items"] = schema(r, depth)
    elif maybe(r, 40):
        made |= {r.choice(("prefixItems", "items")): [schema(r, depth), schema(r, depth)], "additionalItems": False}
    more = ({"minItems": 1}, {"maxItems": 3, "uniqueItems": True}, {"contains": {"type": "string"}}, {"items": False})
    return made | (r.choice(more) if maybe(r, 30) else {})


def object_schema(r: Random, depth: int) -> dict[str, Any]:
    names = ("a", "b", "type", "properties", "$ref", "items", "naïve name", "enum", "required")
    made: dict[str, Any] = {"type": "object"} if maybe(r, 85) else {}
    if maybe(r, 80):
        made["properties"] = {r.choice(names): schema(r, depth) for _ in range(r.randint(0, 3))}
    if maybe(r, 50):
        made["required"] = r.choice((["a"], ["a", "b"], ["nowhere"], [], list(made.get("properties", ()))))
    more = (
        {"additionalProperties": schema(r, depth - 1)},
        {"patternProperties": {"^x-": schema(r, depth - 1)}, "minProperties": 1},
        {"propertyNames": {"pattern": "a"}, "dependentRequired": {"a": ["b"]}},
        {"propertyOrdering": ["a"], "unevaluatedProperties": False},
    )
    return made | (r.choice(more) if maybe(r, 40) else {})


def union(r: Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {r.choice(("anyOf", "oneOf", "allOf")): [schema(r, depth) for _ in range(r.randint(1, 3))]}
    beside = ({"type": "object"}, {"properties": {"a": {"type": "string"}}}, {"not": {"type": "null"}}, {"enum": ["a"]})
    if maybe(r, 30):
        made |= {"if": schema(r, depth - 1), "then": schema(r, depth - 1), "else": False}
    return made | (r.choice(beside) if maybe(r, 30) else {})


def several(r: Random, depth: int) -> dict[str, Any]:
    kinds = r.choice((["string", "null"], ["integer", "string"], ["array", "null"], ["object", "string"], ["null"]))
    return {"type": kinds} | ({"items": schema(r, depth)} if "array" in kinds and maybe(r, 50) else {})


REFS = (
    "#/$defs/A",
    "#/$defs/B",
    "#/definitions/C",
    "#",
    "#/properties/a",
    "#/$defs/a~1b%20c",
    "#/$defs/gone",
    "http://x/y",
)


def reference(r: Random, _: int) -> dict[str, Any]:
    return {"$ref": r.choice(REFS)} | ({"description": "beside"} if maybe(r, 30) else {})


def schema(r: Random, depth: int = 3) -> Json:
    """A JSON Schema of any kind; `depth` bounds what is inside."""
    if depth <= 0 or maybe(r, 15):
        return r.choice((leaf, leaf, lambda _: True, lambda _: {}, lambda _: False))(r)
    shapes = (
        object_schema,
        object_schema,
        array,
        union,
        several,
        reference,
        lambda r, _: listed(r),
        lambda r, _: leaf(r),
    )
    made = r.choice(shapes)(r, depth - 1)
    notes = ({"title": "T"}, {"description": ""}, {"default": None}, {"examples": [1]}, {"deprecated": True})
    return made | (r.choice(notes) if maybe(r, 20) else {})


def tangle(r: Random) -> dict[str, Any]:
    """Definitions that lead to one another and to themselves, through each form of a reference."""
    forms: tuple[Callable[[Json], Json], ...] = (
        lambda ref: ref,
        lambda ref: {"allOf": [ref], "default": None},
        lambda ref: {"anyOf": [ref, {"type": "null"}]},
        lambda ref: {"type": "array", "items": ref},
    )
    names = [f"D{i}" for i in range(r.randint(1, 9))]
    definitions = {
        name: {
            "type": "object",
            "properties": {
                key: r.choice(forms)({"$ref": f"#/$defs/{r.choice(names)}"}) for key in "abcd"[: r.randint(1, 4)]
            },
        }
        for name in names
    }
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/D0"}}, "required": ["a"], "$defs": definitions}


def root_schema(r: Random) -> dict[str, Any]:
    """An object's schema mostly, with the definitions that references inside it lead to."""
    if maybe(r, 8):
        return tangle(r)
    made: dict[str, Any] = object_schema(r, 3) if maybe(r, 80) else r.choice((union, reference, array, several))(r, 2)
    if maybe(r, 50):
        made["$defs"] = {name: schema(r, 2) for name in ("A", "B", "a/b c")}
        made["definitions"] = {"C": schema(r, 2)}
    return made | ({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x"} if maybe(r, 20) else {})


# ---- tools


def function_tool(r: Random, name: str) -> Json:
    spec: dict[str, Any] = {"name": name, "description": text(r), "parameters": root_schema(r), "strict": maybe(r, 50)}
    empty = r.choice((None, {}, {"type": "object"}, {"type": "object", "properties": {}}))
    spec |= {"parameters": empty} if maybe(r, 20) else {}
    spec = {key: value for key, value in spec.items() if key == "name" or maybe(r, 80)}
    if "parameters" in spec and maybe(r, 8):
        return {"type": "function", "input_schema": spec.pop("parameters"), **spec}
    return {"type": "function", **spec} if maybe(r, 25) else {"type": "function", "function": spec}


def custom_tool(r: Random, name: str) -> Json:
    grammar = {"syntax": r.choice(("lark", "regex")), "definition": 'start: "a"'}
    forms = ({"type": "text"}, {"type": "grammar", "grammar": grammar}, {"type": "grammar", **grammar}, None)
    spec = {"name": name, "description": text(r), "format": r.choice(forms)}
    return {"type": "custom", **spec} if maybe(r, 25) else {"type": "custom", "custom": spec}


def tool(r: Random, name: str) -> Json:
    if maybe(r, 6):
        return {"type": "web_search"}
    if maybe(r, 4):
        inner = function_tool(r, name)
        flat = {"type": "function", **inner.get("function", inner)}
        return {"type": "namespace", "name": "n.s", "description": "d", "tools": [flat]}
    return (custom_tool if maybe(r, 20) else function_tool)(r, name)


def bare_name(tool: Json) -> str | None:
    """The name by which a choice can name a tool, if it can."""
    inner = tool.get(tool["type"]) or tool
    return inner.get("name") if tool["type"] in ("function", "custom") else None


def tool_choice(r: Random, tools: list[Json]) -> Json:
    named = [(tool["type"], name) for tool in tools if (name := bare_name(tool))]
    if not named or maybe(r, 40):
        return r.choice(("auto", "none", "required", None))
    kind, name = r.choice(named)
    if maybe(r, 40):
        allowed = [{"type": kind, kind: {"name": name}} for kind, name in r.sample(named, r.randint(1, len(named)))]
        return {"type": "allowed_tools", "allowed_tools": {"mode": r.choice(("auto", "required")), "tools": allowed}}
    return {"type": kind, "name": name} if maybe(r, 20) else {"type": kind, kind: {"name": name}}


def tool_fields(r: Random, names: tuple[str, ...]) -> dict[str, Any]:
    if maybe(r, 10):
        functions = [function_tool(r, name).get("function") or {"name": name} for name in names]
        choice = r.choice(("auto", "none", {"name": functions[0]["name"]}))
        return {"functions": functions} | ({"function_call": choice} if maybe(r, 60) else {})
    tools = [tool(r, r.choice(names)) for _ in range(r.randint(1, 4))] if maybe(r, 65) else []
    made = {"tools": tools} if tools or maybe(r, 30) else {}
    more = {"tool_choice": tool_choice(r, tools), "parallel_tool_calls": maybe(r, 50)}
    return made | {key: value for key, value in more.items() if maybe(r, 45)}


# ---- bodies


def response_format(r: Random) -> Json:
    if maybe(r, 40):
        return {"type": r.choice(("text", "json_object"))}
    more = {"schema": root_schema(r), "strict": maybe(r, 50), "description": "d"}
    spec = {"name": "answer", **{key: value for key, value in more.items() if maybe(r, 75)}}
    return {"type": "json_schema", "json_schema": spec}


def thinking_config(r: Random) -> Json:
    budgets, levels = (-1, 0, 1, 128, 500, 1024, 32768, 10**6), ("minimal", "LOW", "medium", "High")
    made = {"thinking_budget": r.choice(budgets), "thinking_level": r.choice(levels), "include_thoughts": maybe(r, 50)}
    return {"google": {"thinking_config": {key: value for key, value in made.items() if maybe(r, 50)}}}


def stop(r: Random) -> Json:
    return text(r) if maybe(r, 30) else some(r, text, 0, 8)


def fraction(high: float, low: float = 0) -> Callable[[Random], Any]:
    return one_of(low, high, (low + high) / 2, low + 1e-9, high - 0.125)


FIELDS: Mapping[str, Callable[[Random], Any]] = {
    "temperature": fraction(2),
    "top_p": fraction(1),
    "presence_penalty": fraction(2, -2),
    "frequency_penalty": fraction(2, -2),
    "n": one_of(1, 2, 128),
    "stop": stop,
    "seed": one_of(0, 7, -1, 2**31, -(2**63), 2**63 - 1),
    "logprobs": one_of(True, False),
    "top_logprobs": one_of(0, 1, 20),
    "max_tokens": one_of(1, 16, 4096, 10**6, 2**40),
    "max_completion_tokens": one_of(1, 100, 65536, 10**9),
    "response_format": response_format,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"),
    "extra_body": thinking_config,
    "google": lambda r: thinking_config(r)["google"],
    "modalities": one_of(["text"], ["text", "image"], []),
    "image_config": one_of({}, {"aspect_ratio": "16:9"}, {"aspect_ratio": "1:1", "image_size": "2K"}),
    "system": lambda r: content(r, text_part),
    "web_search_options": one_of({}, {"search_context_size": "low"}),
    "stream": one_of(True, False),
    "stream_options": one_of({}, {"include_usage": True}, {"include_obfuscation": False}),
    "logit_bias": one_of({}, {"50256": -100}),
    "verbosity": one_of("low", "high"),
    "prediction": one_of({"type": "content", "content": "x"}),
    "metadata": one_of({}, {"a": "b"}),
    "store": one_of(True, False),
    "user": text,
    "service_tier": one_of("auto", "default"),
    "enable_thinking": one_of(True, False),
    "top_k": one_of(0, 40),
}


def chat_body(r: Random, pool: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A chat body that a client may send, with tools named out of a pool."""
    names = tuple(r.choice(pool) for _ in range(3))
    body: dict[str, Any] = {"model": r.choice(("", "models/", "google/")) + r.choice(MODELS)}
    body["messages"] = [r.choice(MESSAGES)(r, names) for _ in range(r.randint(1, 7))]
    for key, make in FIELDS.items():
        if maybe(r, 12):
            body[key] = None if maybe(r, 10) else make(r)
    return body | tool_fields(r, names)


def response_body(r: Random, pool: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A Responses body: the same wishes as a chat body's, in its own words."""
    chat = chat_body(r, pool)
    body = {key: chat[key] for key in ("model", "temperature", "top_p", "metadata", "store", "tools") if key in chat}
    if body.get("tools"):
        body["tools"] = [flat_custom(tool) for tool in body["tools"]]
    body["input"] = [item for message in chat["messages"] for item in response_items(message)]
    if isinstance(form := chat.get("response_format"), dict):
        spec = {"schema": {"type": "object"}, **form["json_schema"]} if "json_schema" in form else {}
        body["text"] = {"format": {"type": form["type"], **spec}}
    more = {"instructions": text(r), "max_output_tokens": r.choice((16, 10**7)), "parallel_tool_calls": maybe(r, 50)}
    more["reasoning"] = {"effort": r.choice(("none", "low", "high", None)), "summary": r.choice(("auto", None))}
    return body | {key: value for key, value in more.items() if maybe(r, 40)}


def flat_custom(tool: Json) -> Json:
    """A custom tool as Responses has it, any other as it is."""
    if tool["type"] != "custom":
        return tool
    spec = tool.get("custom") or tool
    form = spec["format"] or {"type": "text"}
    return {**spec, "type": "custom", "format": {"type": form["type"], **form.get("grammar", form)}}


def response_items(message: Json) -> list[Json]:
    role = message["role"]
    if role == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}]
    if role == "function":
        output = message["content"] or ""
        return [{"type": "custom_tool_call_output", "call_id": f"call_{message['name']}", "output": output}]
    calls = [response_call(call) for call in message.get("tool_calls") or []]
    if role == "assistant" and not message.get("content"):
        return [{"type": "reasoning", "id": "rs_1", "summary": [], "content": None}, *calls]
    return [{"type": "message", "role": role, "content": message["content"]}, *calls]


def response_call(call: Json) -> Json:
    if call["type"] == "custom":
        return {"type": "custom_tool_call", "call_id": call["id"], **call["custom"]}
    return {"type": "function_call", "call_id": call["id"], **call["function"], "id": None}


def completion_body(r: Random) -> dict[str, Any]:
    """A completions body."""
    chat = chat_body(r)
    shared = ("model", "temperature", "top_p", "stop", "seed", "max_tokens", "presence_penalty", "frequency_penalty")
    body = {key: chat[key] for key in (*shared, "logit_bias", "user", "stream", "stream_options") if key in chat}
    more = {"prompt": some(r, text, 0, 3) if maybe(r, 40) else text(r), "suffix": text(r), "echo": maybe(r, 50)}
    more |= {"n": r.randint(1, 3), "best_of": 3, "logprobs": r.randint(0, 5)}
    return body | {key: value for key, value in more.items() if maybe(r, 50)}


def embedding_body(r: Random) -> dict[str, Any]:
    """An embeddings body."""
    texts = [one or "x" for one in some(r, text, 1, 4)]
    body = {"model": "gemini-embedding-001", "input": texts[0] if maybe(r, 40) else texts}
    more = {"encoding_format": r.choice(("float", "base64")), "dimensions": r.choice((1, 768)), "user": text(r)}
    return body | {key: value for key, value in more.items() if maybe(r, 40)}


# ---- Gemini's answers

ANSWER_TEXTS = tuple(text for text in TEXTS if "\ud83d" not in text)
PCM = base64.b64encode(b"\0\1" * 8).decode()
BLOBS = (
    *(("image/png", "iVBORw0KGgo="), ("image/jpeg", "AAAA"), ("audio/mp3", "aGk="), ("application/pdf", "AAAA")),
    *(("audio/L16;codec=pcm;rate=24000", PCM), ("audio/L16", PCM)),
)


def answer_text(r: Random) -> Json:
    part: dict[str, Any] = {"text": r.choice(ANSWER_TEXTS)}
    part |= {"thought": True} if maybe(r, 25) else {}
    return part | ({"thoughtSignature": r.choice(BASE64)} if maybe(r, 15) else {})


def answer_call(r: Random) -> Json:
    made: dict[str, Any] = {"name": r.choice(NAMES)}
    args = ({}, {"a": 1}, {"input": "free\ntext"}, {"input": 5}, {"a": {"b": [None, "😀\u2028"]}})
    made |= {"args": r.choice(args)} if maybe(r, 80) else {}
    made |= {"id": r.choice(IDS)} if maybe(r, 40) else {}
    return {"functionCall": made} | ({"thoughtSignature": r.choice(BASE64)} if maybe(r, 40) else {})


def answer_blob(r: Random) -> Json:
    mime, data = r.choice(BLOBS)
    return {"inlineData": {"mimeType": mime, "data": data}} | ({"thought": True} if maybe(r, 10) else {})


def answer_code(r: Random) -> Json:
    if maybe(r, 50):
        return {"executableCode": {"language": "PYTHON", "code": "print(1)"}}
    return {"codeExecutionResult": {"outcome": "OUTCOME_OK"} | ({"output": "1\n"} if maybe(r, 70) else {})}


def answer_part(r: Random) -> Json:
    return r.choice((answer_text, answer_text, answer_text, answer_call, answer_call, answer_blob, answer_code))(r)


def grounding(r: Random) -> dict[str, Any]:
    segment = {"startIndex": r.randint(0, 9), "endIndex": r.randint(0, 30), "text": r.choice(ANSWER_TEXTS)}
    segment = {key: value for key, value in segment.items() if maybe(r, 70)}
    if maybe(r, 30):
        return {"citationMetadata": {"citationSources": [segment | {"uri": "https://example.org/"}]}}
    pages = [{"web": {"uri": f"https://example.org/{i}", "title": "T"}} for i in range(r.randint(0, 2))]
    supports = [{"segment": segment, "groundingChunkIndices": [0, 1]}] if maybe(r, 80) else []
    return {"groundingMetadata": {"groundingChunks": pages, "groundingSupports": supports}}


def token_logprobs(r: Random) -> dict[str, Any]:
    token = {"token": r.choice(ANSWER_TEXTS), "logProbability": r.choice((-0.5, 0, -1e30, "-Infinity"))}
    tops = [{"candidates": [token, token]}] if maybe(r, 50) else []
    return {"logprobsResult": {"chosenCandidates": [token], "topCandidates": tops}}


REASONS = ("STOP", "STOP", "STOP", "MAX_TOKENS", "SAFETY", "OTHER", "MALFORMED_FUNCTION_CALL", "SOMETHING_NEW")


def usage(r: Random) -> dict[str, Any]:
    keys = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "cachedContentTokenCount")
    counts = {key: r.randint(0, 99) for key in (*keys, "toolUsePromptTokenCount") if maybe(r, 70)}
    return {"usageMetadata": counts | {"totalTokenCount": sum(counts.values())}}


def candidate_chunks(r: Random, index: int) -> list[Json]:
    """The chunks of one candidate, finished or not."""
    made: list[Json] = []
    for _ in range(r.randint(1, 4)):
        one: dict[str, Any] = {"index": index} if index or maybe(r, 50) else {}
        if maybe(r, 90):
            one["content"] = {"role": "model", "parts": some(r, answer_part, 0, 3)}
        one |= grounding(r) if maybe(r, 12) else {}
        one |= token_logprobs(r) if maybe(r, 12) else {}
        made.append({"candidates": [one]} | (usage(r) if maybe(r, 40) else {}))
    if maybe(r, 92):
        made[-1]["candidates"][0]["finishReason"] = r.choice(REASONS)
    return made


def answer_chunks(r: Random, candidates: int = 1) -> list[Json]:
    """A stream of Gemini's, whole, broken off, blocked or failed."""
    streams = [candidate_chunks(r, index) for index in range(candidates)]
    made: list[Json] = []
    while any(streams):
        made.append(r.choice([stream for stream in streams if stream]).pop(0))
    made += [usage(r)] if maybe(r, 30) else []
    made += [{"promptFeedback": {"blockReason": "SAFETY"}}] if maybe(r, 4) else []
    return made + ([error_answer(r)] if maybe(r, 4) else [])


def error_answer(r: Random) -> Json:
    """An error body of Gemini's."""
    code = r.choice((400, 401, 403, 404, 413, 429, 499, 500, 503, 504))
    messages = ("Please retry in 34.07s.", "API key not valid.", "limit: 0", "exceeds the maximum number of tokens", "")
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": r.choice(("34.07s", "900ms", "3h", ""))}
    quota = {"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}
    error: dict[str, Any] = {"code": code, "message": r.choice(messages), "status": "X", "details": [retry, quota]}
    error = {key: value for key, value in error.items() if maybe(r, 85)}
    if maybe(r, 10):
        error["message"] = json.dumps({"error": dict(error)})
    return [{"error": error}] if maybe(r, 20) else {"error": error}


# ---- mutations

DEEP = "<deep>"
ODD: tuple[Json, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, 10**30, float("nan"), float("inf"), "", "x", "\ud83d", "NaN", "1e999"),
    *([], {}, [[]], [None], {"": {}}, {"a": [{}]}, [1, "x"], "9" * 400, "y" * 5000, DEEP, -(2**70)),
)


def nodes(value: Json) -> list[tuple[Any, Any]]:
    """Each place inside a JSON value: its container and key."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        found += [(here, key) for key in keys]
        todo += [here[key] for key in reversed(keys)]
    return found


def mutated(r: Random, value: Json) -> Json:
    """A copy of a JSON value with one to three places changed."""
    root = [json.loads(json.dumps(value))]
    for _ in range(r.randint(1, 3)):
        if places := nodes(root):
            r.choice(CHANGES)(r, *r.choice(places), places)
    return root[0] if root else None


def replace_node(r: Random, container: Any, key: Any, _: Any) -> None:
    container[key] = json.loads(json.dumps(r.choice(ODD)))


def delete_node(_: Random, container: Any, key: Any, __: Any) -> None:
    del container[key]


def rename_or_repeat(r: Random, container: Any, key: Any, _: Any) -> None:
    if isinstance(container, list):
        container.insert(r.randint(0, len(container)), container[key])
    else:
        container[r.choice(("", "x", f"{key}_", str(key).upper(), *container))] = container.pop(key)


def wrap_node(r: Random, container: Any, key: Any, _: Any) -> None:
    value = container[key]
    container[key] = r.choice(([value], {"value": value}, {str(key): value}, [value] * 3, str(value)))


def graft_node(r: Random, container: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    other, other_key = r.choice(places)
    container[key] = json.loads(json.dumps(other[other_key]))


CHANGES: tuple[Callable[[Random, Any, Any, Any], None], ...] = (
    *(replace_node, replace_node, replace_node, delete_node, rename_or_repeat, wrap_node, graft_node),
)


def json_bytes(r: Random, value: Json) -> bytes:
    """The JSON text of a value, in which DEEP stands for a deep nesting, and which may hold NaN and numbers too large."""
    written = json.dumps(value, ensure_ascii=maybe(r, 50), indent=r.choice((None, None, 1)))
    written = written.replace('"1e999"', "1e999") if maybe(r, 50) else written
    while f'"{DEEP}"' in written:
        depth = r.choice((10, 100, 300, r.randint(700, 1100), 3000))
        opened, closed = r.choice((("[", "]"), ('{"a":', "}")))
        written = written.replace(f'"{DEEP}"', opened * depth + "1" + closed * depth, 1)
    return written.encode("utf-8", "surrogatepass")


def sse_bytes(r: Random, chunks: list[Json]) -> bytes:
    """Chunks as a stream, in which each frame may have an odd form."""
    end = r.choice((b"\r\n\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n"))
    data = b"".join(frame(r, json_bytes(r, chunk)) + end for chunk in chunks)
    return data + (r.choice((b"data: [DONE]\n\n", b"data:", b"{", b"\xff", b": bye\n")) if maybe(r, 10) else b"")


def frame(r: Random, written: bytes) -> bytes:
    if b"\n" in written or maybe(r, 3):
        return written  # bare JSON, as errors in mid-stream may come
    before = (
        b"data: ",
        b"data: ",
        b"data: ",
        b"data:",
        b": note\n\ndata: ",
        b"event: x\nid: 1\ndata: ",
        b"\xef\xbb\xbfdata: ",
    )
    return r.choice(before) + written


def damaged(r: Random, data: bytes) -> bytes:
    """Bytes with a piece flipped, cut, doubled, lost or made invalid UTF-8."""
    at, size = r.randint(0, len(data)), r.randint(1, 20)
    flipped = bytes(byte ^ (1 << r.randint(0, 7)) for byte in data[at : at + 2])
    put = r.choice((flipped, b"", data[at : at + size] * 2, b"\xff\xfe", b"\xed\xa0\xbd", b"\x00", b"\r", b'"', b"{}"))
    return data[:at] if maybe(r, 25) else data[:at] + put + data[at + size :]


def cut(r: Random, data: bytes, pieces: int = 5) -> list[bytes]:
    """The data in pieces, cut anywhere."""
    places = sorted(r.randint(0, len(data)) for _ in range(r.randint(0, pieces)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
