#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.11", "click>=8.1", "pyyaml>=6.0"]
# ///
"""agproxy: an OpenAI-compatible gateway in front of Gemini, in one file.

The rooms, in reading order. A room may use the rooms above it, never below.
     1 Tables           protocol words and limits; nothing computed
     2 Errors           every way a request can fail, and who is told what
     3 Vocabulary       what a request and an answer are, in nobody's JSON
     4 From the client  OpenAI's bodies become a Request, or a BadRequest that names the field
     5 To Gemini        a Request becomes a generateContent body
     6 From Gemini      bytes become Events: the only stream machine
     7 To the client    Events become OpenAI's chunks and objects
     8 Command line     what a person types
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, ClassVar, Literal, assert_never

import click

__version__ = "0.1.0"

# ==============================================================================
# 1. Tables
# ==============================================================================

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

# Gemini's finish reasons; what is not here counts as "stop" and is an error when nothing was said.
# Source: https://ai.google.dev/api/generate-content#FinishReason
FINISH_REASONS: Mapping[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
}

RETRY_AFTER_S_MAX = 24 * 3600.0  # no wait is believed beyond a day
STOPS_MAX = 4
CHOICES_MAX = 8

# Accepted by Gemini 3 in place of a thought signature that it did not make.
# Source: https://ai.google.dev/gemini-api/docs/thought-signatures
SIGNATURE_SENTINEL = "skip_thought_signature_validator"

BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"

# ==============================================================================
# 2. Errors
# ==============================================================================
# GatewayError
# ├── BadRequest            the client's mistake, with the field's path
# └── UpstreamError         one attempt at Gemini failed
#     ├── UpstreamRefused   Gemini calls the request itself wrong: nobody else would take it
#     ├── RateLimited       this account, for now
#     ├── CredentialRefused this account, until its credentials change
#     ├── Overloaded        not the account's fault
#     ├── UpstreamTimeout   no answer in time
#     └── UpstreamBroken    cut, empty or unreadable

Remedy = Literal["give_up", "next_account", "same_account"]


class GatewayError(Exception):
    """A failure that the client is told about; the class answers status, type, code and remedy."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    remedy: ClassVar[Remedy] = "give_up"
    default_code: ClassVar[str | None] = "server_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    default_code = None


class UpstreamError(GatewayError):
    status = 502
    default_code: ClassVar[str | None] = "upstream_error"


class UpstreamRefused(UpstreamError):
    status = 400
    type = "invalid_request_error"
    default_code: ClassVar[str | None] = None


class ModelGone(UpstreamRefused):
    status = 404
    default_code = "model_not_found"


class RateLimited(UpstreamError):
    status = 429
    type = "rate_limit_error"
    remedy = "next_account"
    default_code = "rate_limit_exceeded"


class CredentialRefused(UpstreamError):
    remedy = "next_account"


class Overloaded(UpstreamError):
    status = 503
    remedy = "same_account"
    default_code = "server_is_overloaded"


class UpstreamTimeout(UpstreamError):
    status = 504
    remedy = "same_account"
    default_code = "timeout"


class UpstreamBroken(UpstreamError):
    remedy = "same_account"


# ==============================================================================
# 3. Vocabulary
# ==============================================================================


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class Thinking:
    text: str
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class Media:
    mime: str
    data: str
    """Base64, as it came."""
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """A JSON text, as the client or the model wrote it."""
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    text: str


Part = Text | Thinking | Media | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["user", "assistant", "tool"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    parameters: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JsonFormat:
    schema: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, whatever API it spoke."""

    model: str
    messages: tuple[Message, ...]
    system: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_format: JsonFormat | None = None
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as OpenAI adds them: completion holds reasoning, prompt holds cached."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The model has begun to answer."""


@dataclass(frozen=True, slots=True)
class PartStart:
    choice: int
    part: Part


@dataclass(frozen=True, slots=True)
class TextDelta:
    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class PartEnd:
    """Repeats the part whole, so that no renderer remembers text."""

    choice: int
    part: Part


@dataclass(frozen=True, slots=True)
class Finished:
    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Ended:
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    error: GatewayError


Event = Started | PartStart | TextDelta | ThinkingDelta | ArgumentsDelta | PartEnd | Finished | Ended | Failed


@dataclass(slots=True)
class Choice:
    parts: list[Part] = field(default_factory=list)
    reason: FinishReason = "stop"


@dataclass(slots=True)
class Reply:
    """A whole answer: what `collect` makes of its events."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Usage = Usage()


def collect(events: Iterable[Event]) -> Reply:
    """The whole answer. Raises the GatewayError of a Failed event."""
    reply = Reply()
    for event in events:
        match event:
            case PartEnd(choice, part):
                reply.choices.setdefault(choice, Choice()).parts.append(part)
            case Finished(choice, reason):
                reply.choices.setdefault(choice, Choice()).reason = reason
            case Ended(usage):
                reply.usage = usage
            case Failed(error):
                raise error
            case Started() | PartStart() | TextDelta() | ThinkingDelta() | ArgumentsDelta():
                pass
            case _:
                assert_never(event)
    return reply


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ==============================================================================
# 4. From the client
# ==============================================================================


class Fields:
    """One JSON object of a body. Null means absent; a wrong type is a BadRequest with the field's path."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{path or 'The body'} must be a JSON object.", code="invalid_type", param=path or None)
        self.value = value
        self.path = path

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, kind: type | tuple[type, ...], word: str) -> Any:
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRequest(f"'{self.at(key)}' must be {word}.", code="invalid_type", param=self.at(key))
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.get(key, str, "a string")
        return value

    def needed_text(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise self.missing(key)
        return value

    def missing(self, key: str) -> BadRequest:
        return BadRequest(f"'{self.at(key)}' is required.", code="missing_required_parameter", param=self.at(key))

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool, "true or false"))

    def number(self, key: str, low: float, high: float) -> float | None:
        value: float | None = self.get(key, (int, float), "a number")
        if value is not None and not low <= value <= high:
            code = "decimal_below_min_value" if value < low else "decimal_above_max_value"
            raise BadRequest(f"'{self.at(key)}' must be from {low} to {high}.", code=code, param=self.at(key))
        return value

    def count(self, key: str) -> int | None:
        value: int | None = self.get(key, int, "a whole number")
        if value is not None and value < 1:
            raise BadRequest(
                f"'{self.at(key)}' must be at least 1.", code="integer_below_min_value", param=self.at(key)
            )
        return value

    def integer(self, key: str) -> int | None:
        value: int | None = self.get(key, int, "a whole number")
        return value

    def object(self, key: str) -> Fields | None:
        value = self.get(key, dict, "an object")
        return None if value is None else Fields(value, self.at(key))

    def objects(self, key: str) -> list[Fields]:
        items = self.get(key, list, "an array") or []
        return [Fields(item, f"{self.at(key)}[{i}]") for i, item in enumerate(items)]


def parse_chat(body: Any) -> Request:
    """A chat completions body. Raises BadRequest."""
    fields = Fields(body)
    messages = fields.objects("messages")
    if not messages:
        raise fields.missing("messages")
    stream_options = fields.object("stream_options")
    tools = tuple(parse_tool(tool) for tool in fields.objects("tools"))
    return Request(
        model=fields.needed_text("model"),
        system=tuple(text for m in messages if m.value.get("role") in ("system", "developer") for text in texts_of(m)),
        messages=tuple(parse_message(m) for m in messages if m.value.get("role") not in ("system", "developer")),
        tools=tools,
        tool_choice=parse_tool_choice(fields, tools),
        max_output_tokens=fields.count("max_completion_tokens") or fields.count("max_tokens"),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        seed=fields.integer("seed"),
        stop=parse_stop(fields),
        json_format=parse_response_format(fields),
        stream=fields.flag("stream"),
        include_usage=bool(stream_options and stream_options.flag("include_usage")),
    )


def parse_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.value.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise BadRequest("'stop' must be a string or an array of strings.", code="invalid_type", param="stop")
    if len(stops) > STOPS_MAX:
        raise BadRequest(f"'stop' holds more than {STOPS_MAX} strings.", code="invalid_value", param="stop")
    return tuple(stop for stop in stops if stop)


def parse_response_format(fields: Fields) -> JsonFormat | None:
    form = fields.object("response_format")
    kind = form and form.text("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return JsonFormat(None)
    if kind == "json_schema":
        spec = form.object("json_schema")
        if spec is None:
            raise form.missing("json_schema")
        schema = spec.object("schema")
        return JsonFormat(schema.value if schema else None)
    raise BadRequest(
        "'response_format.type' must be text, json_object or json_schema.",
        code="invalid_value",
        param="response_format.type",
    )


def parse_tool(tool: Fields) -> Tool:
    """A function tool, nested as chat has it or flat as Responses has it."""
    kind = tool.text("type") or "function"
    if kind != "function":
        raise BadRequest(
            f"Tools of type '{kind}' are not served; use 'function'.", code="invalid_value", param=tool.at("type")
        )
    inner = tool.object("function") or tool
    parameters = inner.object("parameters")
    return Tool(inner.needed_text("name"), inner.text("description") or "", parameters.value if parameters else None)


def parse_tool_choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    value = fields.value.get("tool_choice")
    if not tools or value is None or value == "auto":
        return ToolChoice()
    if value == "none":
        return ToolChoice("none")
    if value == "required":
        return ToolChoice("required")
    name = None
    if isinstance(value, dict):
        choice = Fields(value, "tool_choice")
        name = (choice.object("function") or choice).text("name")
    if name not in {tool.name for tool in tools}:
        raise BadRequest(
            "'tool_choice' must be none, auto, required or name a declared function.",
            code="invalid_value",
            param="tool_choice",
        )
    return ToolChoice("required", (name,))


def parse_message(message: Fields) -> Message:
    role = message.text("role")
    if role == "user":
        parts = tuple(parse_content(message))
        if message.value.get("content") is None:
            raise message.missing("content")
        return Message("user", parts)
    if role == "assistant":
        calls = tuple(parse_call(call) for call in message.objects("tool_calls"))
        return Message("assistant", (*parse_content(message), *calls))
    if role == "tool":
        result = ToolResult(message.needed_text("tool_call_id"), "\n".join(texts_of(message)))
        return Message("tool", (result,))
    raise BadRequest(
        f"'{message.at('role')}' must be system, developer, user, assistant or tool.",
        code="invalid_value",
        param=message.at("role"),
    )


def texts_of(message: Fields) -> list[str]:
    return [part.text for part in parse_content(message) if isinstance(part, Text)]


def parse_content(message: Fields) -> Iterable[Part]:
    content = message.value.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)] if content else []
    return [part for item in message.objects("content") if (part := parse_part(item)) != Text("")]


def parse_part(part: Fields) -> Part:
    kind = part.text("type")
    if kind in ("text", "input_text", "output_text"):
        return Text(part.text("text") or "")
    if kind == "refusal":
        return Text(part.text("refusal") or "")
    if kind in ("image_url", "input_image"):
        return parse_image(part)
    raise BadRequest(f"Content parts of type '{kind}' are not served.", code="invalid_value", param=part.at("type"))


DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[^;,]*)*;base64,", re.ASCII)


def parse_image(part: Fields) -> Media:
    value = part.value.get("image_url")
    url = Fields(value, part.at("image_url")).needed_text("url") if isinstance(value, dict) else value
    match = DATA_URL.match(url) if isinstance(url, str) else None
    if match is None:
        raise invalid_image(part, "must be a data: URL with base64 content")
    data = url[match.end() :]
    payload = data.encode("ascii", "replace").rstrip(b"=")
    if not payload or payload.translate(None, BASE64_ALPHABET) or len(payload) % 4 == 1:
        raise invalid_image(part, "does not hold valid base64")
    return Media(match[1], data)


def invalid_image(part: Fields, what: str) -> BadRequest:
    return BadRequest(f"'{part.at('image_url')}' {what}.", code="invalid_image_url", param=part.at("image_url"))


def parse_call(call: Fields) -> ToolCall:
    function = call.object("function")
    if function is None:
        raise call.missing("function")
    google = ((call.value.get("extra_content") or {}).get("google") or {}) if call.value.get("extra_content") else {}
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    return ToolCall(
        call.needed_text("id"),
        function.needed_text("name"),
        function.text("arguments") or "{}",
        signature if isinstance(signature, str) else None,
    )


# ==============================================================================
# 5. To Gemini
# ==============================================================================


def build_generate_content(request: Request) -> dict[str, Any]:
    """The generateContent body for a request.

    Source: https://ai.google.dev/api/generate-content#request-body
    """
    body: dict[str, Any] = {"contents": build_contents(request.messages)}
    if request.system:
        body["systemInstruction"] = {"parts": [{"text": text} for text in request.system]}
    if request.tools:
        body["tools"] = [{"functionDeclarations": [build_declaration(tool) for tool in request.tools]}]
        body["toolConfig"] = {"functionCallingConfig": build_calling_config(request.tool_choice)}
    if config := build_generation_config(request):
        body["generationConfig"] = config
    return body


def build_declaration(tool: Tool) -> dict[str, Any]:
    declaration: dict[str, Any] = {"name": tool.name, "description": tool.description or tool.name}
    if tool.parameters and tool.parameters.get("properties"):
        declaration["parametersJsonSchema"] = tool.parameters
    return declaration


def build_calling_config(choice: ToolChoice) -> dict[str, Any]:
    config: dict[str, Any] = {"mode": {"auto": "AUTO", "none": "NONE", "required": "ANY"}[choice.mode]}
    if choice.names:
        config["allowedFunctionNames"] = list(choice.names)
    return config


def build_generation_config(request: Request) -> dict[str, Any]:
    config: dict[str, Any] = {
        "temperature": request.temperature,
        "topP": request.top_p,
        "maxOutputTokens": request.max_output_tokens,
        "seed": None if request.seed is None else request.seed & 0x7FFFFFFF,  # Gemini's is an int32
        "stopSequences": list(request.stop) or None,
    }
    if request.json_format is not None:
        config["responseMimeType"] = "application/json"
        config["responseJsonSchema"] = request.json_format.schema
    return {key: value for key, value in config.items() if value is not None}


def build_contents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as Gemini takes them: neighbours of one role merged, and each turn of calls answered by exactly one turn
    of results, in call order, whatever order the client sent.

    Source: https://ai.google.dev/gemini-api/docs/function-calling (seen as 400s otherwise)
    """
    results = {part.call_id: part for m in messages for part in m.parts if isinstance(part, ToolResult)}
    contents: list[dict[str, Any]] = []
    answered: set[str] = set()
    for message in messages:
        calls = [part for part in message.parts if isinstance(part, ToolCall)]
        if message.role == "tool":
            orphans = [p for p in message.parts if isinstance(p, ToolResult) and p.call_id not in answered]
            add_turn(contents, "user", [{"text": orphan.text} for orphan in orphans if orphan.text])
            continue
        role = "model" if message.role == "assistant" else "user"
        add_turn(contents, role, build_parts(message.parts))
        if calls:
            contents.append({"role": "user", "parts": [build_result(call, results.get(call.id)) for call in calls]})
            answered |= {call.id for call in calls}
    return contents


def add_turn(contents: list[dict[str, Any]], role: str, parts: list[dict[str, Any]]) -> None:
    if not parts:
        return
    last = contents[-1] if contents else None
    if last and last["role"] == role and "functionResponse" not in last["parts"][0]:
        last["parts"].extend(parts)
    elif not last and role == "model":
        contents.extend([{"role": "user", "parts": [{"text": "…"}]}, {"role": role, "parts": parts}])
    else:
        contents.append({"role": role, "parts": parts})


def build_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    built = [built for part in parts if (built := build_part(part))]
    first_call = next((part for part in built if "functionCall" in part), None)
    if first_call is not None:
        first_call.setdefault("thoughtSignature", SIGNATURE_SENTINEL)
    return built


def build_part(part: Part) -> dict[str, Any] | None:
    match part:
        case Text(text):
            return {"text": text}
        case Media(mime, data):
            return {"inlineData": {"mimeType": mime, "data": data}}
        case ToolCall(_, name, arguments, signature):
            call: dict[str, Any] = {"functionCall": {"name": name, "args": arguments_object(arguments)}}
            return call | ({"thoughtSignature": signature} if signature else {})
        case Thinking() | ToolResult():
            return None
        case _:
            assert_never(part)


def arguments_object(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except ValueError:
        value = arguments
    return value if isinstance(value, dict) else {"input": value}


def build_result(call: ToolCall, result: ToolResult | None) -> dict[str, Any]:
    text = result.text if result else "(no result was given for this call)"
    return {"functionResponse": {"name": call.name, "response": {"output" if result else "error": text}}}


# ==============================================================================
# 6. From Gemini
# ==============================================================================


class SseSplitter:
    """Bytes of a text/event-stream, cut anywhere, to the JSON texts of its events.

    Lines end at CR, LF or CRLF only: U+2028 may stand inside a JSON string.
    A bare JSON text without `data:` is how an error in mid-stream may come.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._bare = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        return [text for line in lines if (text := self._line(line))]

    def close(self) -> list[bytes]:
        last, self._rest = self._rest, b""
        text = self._line(last)
        return [text] if text else []

    def _line(self, line: bytes) -> bytes:
        if line.startswith(b"data:"):
            return line[5:].strip()
        if not line or (not self._bare and line[:1] not in b"{["):
            return b""
        self._bare += line
        try:
            json.loads(self._bare)
        except ValueError:
            return b""
        text, self._bare = self._bare, b""
        return text


class GeminiReader:
    """Chunks of one answer to Events; knows of no transport and no client.

    `new_id` makes the id of a tool call that came without one.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._splitter = SseSplitter()
        self._open: dict[int, tuple[type[Text | Thinking], list[str]]] = {}
        self._reasons: dict[int, str] = {}
        self._said: set[int] = set()
        self._called: set[int] = set()
        self._usage: dict[str, Any] = {}
        self._events: list[Event] = []
        self._started = False
        self._failed = False

    def feed(self, data: bytes) -> list[Event]:
        """Events of the next bytes of a stream."""
        return self._read(self._splitter.feed(data))

    def close(self) -> list[Event]:
        """Events of the end of the body: the finish, or the truth that there was none."""
        events = self._read(self._splitter.close())
        return events if self._failed else events + self._finish()

    def whole(self, body: bytes) -> list[Event]:
        """Events of an answer that came in one piece: a stream of one chunk."""
        events = self._read([body])
        return events if self._failed else events + self._finish()

    def _read(self, texts: Iterable[bytes]) -> list[Event]:
        for text in texts:
            if self._failed:
                break
            try:
                chunk = json.loads(text)
            except ValueError:
                chunk = None
            self._chunk(chunk[0] if isinstance(chunk, list) and chunk else chunk)
        events, self._events = self._events, []
        return events

    def _chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            return self._fail(UpstreamBroken("Gemini sent something that is not JSON."))
        if "error" in chunk:
            return self._fail(classify_error(502, chunk))
        self._usage = chunk.get("usageMetadata") or self._usage
        if (chunk.get("promptFeedback") or {}).get("blockReason"):
            self._reasons.setdefault(0, "SAFETY")
        for candidate in chunk.get("candidates") or []:
            choice = candidate.get("index") or 0
            for part in (candidate.get("content") or {}).get("parts") or []:
                self._part(choice, part)
            if reason := candidate.get("finishReason"):
                self._reasons[choice] = reason

    def _part(self, choice: int, part: dict[str, Any]) -> None:
        if text := part.get("text"):
            self._text(choice, Thinking if part.get("thought") else Text, text)
        elif call := part.get("functionCall"):
            self._call(choice, call, part.get("thoughtSignature"))
        elif (blob := part.get("inlineData")) and not part.get("thought"):
            self._whole_part(choice, Media(blob.get("mimeType", ""), blob.get("data", "")))

    def _text(self, choice: int, kind: type[Text | Thinking], text: str) -> None:
        current = self._open.get(choice)
        if current is None or current[0] is not kind:
            self._end_part(choice)
            current = self._open[choice] = (kind, [])
            self._emit(PartStart(choice, kind("")))
        current[1].append(text)
        if kind is Text:
            self._said.add(choice)
            self._emit(TextDelta(choice, text))
        else:
            self._emit(ThinkingDelta(choice, text))

    def _call(self, choice: int, call: dict[str, Any], signature: str | None) -> None:
        self._called.add(choice)
        arguments = dumps(call.get("args") or {})
        id_ = call.get("id") or self._new_id()
        self._end_part(choice)
        self._emit(PartStart(choice, ToolCall(id_, call.get("name", ""), "", signature)))
        self._emit(ArgumentsDelta(choice, arguments))
        self._emit(PartEnd(choice, ToolCall(id_, call.get("name", ""), arguments, signature)))

    def _whole_part(self, choice: int, part: Part) -> None:
        self._said.add(choice)
        self._end_part(choice)
        self._emit(PartStart(choice, part))
        self._emit(PartEnd(choice, part))

    def _end_part(self, choice: int) -> None:
        if current := self._open.pop(choice, None):
            self._emit(PartEnd(choice, current[0]("".join(current[1]))))

    def _emit(self, event: Event) -> None:
        if not self._started:
            self._started = True
            self._events.append(Started())
        self._events.append(event)

    def _fail(self, error: GatewayError) -> None:
        self._failed = True
        self._events.append(Failed(error))

    def _finish(self) -> list[Event]:
        unfinished = (self._said | self._called | set(self._open)) - set(self._reasons)
        if unfinished or not self._reasons:
            self._fail(UpstreamBroken("Gemini's answer broke off before its end."))
        for choice, raw in sorted(self._reasons.items()):
            if self._failed:
                break
            self._finish_choice(choice, raw)
        if not self._failed:
            self._emit(Ended(usage_of(self._usage)))
        events, self._events = self._events, []
        return events

    def _finish_choice(self, choice: int, raw: str) -> None:
        self._end_part(choice)
        reason = FINISH_REASONS.get(raw, "stop")
        if reason == "stop" and choice in self._called:
            reason = "tool_calls"
        if reason == "stop" and choice not in self._said:
            return self._fail(UpstreamBroken(f"Gemini's answer is empty (finish reason {raw})."))
        self._emit(Finished(choice, reason))


def usage_of(raw: Mapping[str, Any]) -> Usage:
    def count(key: str) -> int:
        return int(raw.get(key) or 0)

    thoughts = count("thoughtsTokenCount")
    return Usage(
        prompt=count("promptTokenCount") + count("toolUsePromptTokenCount"),
        completion=count("candidatesTokenCount") + thoughts,
        cached=count("cachedContentTokenCount"),
        reasoning=thoughts,
    )


RETRY_TEXT = re.compile(r"retry in ([\d.]+)(ms|s)", re.IGNORECASE)


def classify_error(status: int, body: Any) -> UpstreamError:
    """What an error answer of Gemini means for this account and this request. `body` is its JSON, or None."""
    body = body[0] if isinstance(body, list) and body else body
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    status = int(error.get("code") or status)
    message = str(error.get("message") or f"Gemini answered HTTP {status}.")
    reasons = {detail.get("reason") for detail in error.get("details") or [] if isinstance(detail, dict)}
    if status == 429:
        return RateLimited(message, retry_after_s=retry_after(error))
    if status in (401, 403) or "API_KEY_INVALID" in reasons:
        return CredentialRefused(message)
    if status == 404:
        return ModelGone(message, param="model")
    if status == 400:
        return UpstreamRefused(message)
    if status == 504:
        return UpstreamTimeout(message)
    return Overloaded(message, retry_after_s=retry_after(error)) if status in (503, 529) else UpstreamBroken(message)


def retry_after(error: Mapping[str, Any]) -> float | None:
    """Seconds that Gemini asks to wait, by RetryInfo or by its text; None where it says nothing."""
    for detail in error.get("details") or []:
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and re.fullmatch(r"\d+(\.\d+)?s", delay):
            return min(float(delay[:-1]), RETRY_AFTER_S_MAX)
    if match := RETRY_TEXT.search(str(error.get("message") or "")):
        return min(float(match[1]) / (1000 if match[2] == "ms" else 1), RETRY_AFTER_S_MAX)
    return None


# ==============================================================================
# 7. To the client
# ==============================================================================

DONE = "data: [DONE]\n\n"


def error_body(error: GatewayError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def render_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def render_call(call: ToolCall) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    if call.signature:
        entry["extra_content"] = {"google": {"thought_signature": call.signature}}
    return entry


def render_chat(reply: Reply, *, id: str, created: int, model: str) -> dict[str, Any]:
    """The chat.completion object of a whole answer."""
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_agproxy",
        "choices": [render_choice(index, choice) for index, choice in sorted(reply.choices.items())],
        "usage": render_usage(reply.usage),
    }


def render_choice(index: int, choice: Choice) -> dict[str, Any]:
    text = "".join(part.text for part in choice.parts if isinstance(part, Text))
    thoughts = "".join(part.text for part in choice.parts if isinstance(part, Thinking))
    calls = [render_call(part) for part in choice.parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.reason}


class ChatRenderer:
    """Events to the frames of a chat stream: a translation, not a machine."""

    def __init__(self, *, id: str, created: int, model: str, include_usage: bool = False) -> None:
        self._head = (
            f'data: {{"id":{dumps(id)},"object":"chat.completion.chunk","created":{created},"model":{dumps(model)},'
            '"service_tier":"default","system_fingerprint":"fp_agproxy","choices":['
        )
        self._end = (',"usage":null' if include_usage else "") + "}\n\n"
        self._include_usage = include_usage
        self._calls: dict[int, int] = {}
        self._opened: set[int] = set()

    def render(self, event: Event) -> str:
        match event:
            case TextDelta(choice, text):
                return self._delta(choice, f'{{"content":{encode_basestring(text)}}}')
            case ThinkingDelta(choice, text):
                return self._delta(choice, f'{{"reasoning_content":{encode_basestring(text)}}}')
            case PartStart(choice, ToolCall() as call):
                self._calls[choice] = self._calls.get(choice, -1) + 1
                return self._call(choice, render_call(call))
            case ArgumentsDelta(choice, text):
                return self._call(choice, {"function": {"arguments": text}})
            case Finished(choice, reason):
                return self._delta(choice, "{}", reason)
            case Ended(usage):
                last = f'{self._head}],"usage":{dumps(render_usage(usage))}}}\n\n' if self._include_usage else ""
                return last + DONE
            case Failed(error):
                return f"data: {dumps(error_body(error))}\n\n"
            case Started() | PartStart() | PartEnd():
                return ""
            case _:
                assert_never(event)

    def _call(self, choice: int, entry: dict[str, Any]) -> str:
        return self._delta(choice, dumps({"tool_calls": [{"index": self._calls[choice], **entry}]}))

    def _delta(self, choice: int, delta: str, reason: str | None = None) -> str:
        first = "" if choice in self._opened else self._first(choice)
        finish = f'"{reason}"' if reason else "null"
        frame = f'{{"index":{choice},"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]'
        return f"{first}{self._head}{frame}{self._end}"

    def _first(self, choice: int) -> str:
        self._opened.add(choice)
        return self._delta(choice, '{"role":"assistant","content":"","refusal":null}')


# ==============================================================================
# 8. Command line
# ==============================================================================


def file_fingerprint() -> str:
    """The start of this file's SHA-256, so that a copied file can be told apart."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@click.group()
@click.version_option(message=f"agproxy {__version__} (file {file_fingerprint()})")
def main() -> None:
    """An OpenAI-compatible gateway in front of Gemini, in one file."""


if __name__ == "__main__":
    main()
