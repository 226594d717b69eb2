#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.11", "click>=8.1", "pyyaml>=6.0"]
# ///
"""agproxy: an OpenAI-compatible gateway in front of Gemini, in one file.

The rooms, in reading order. A room may use the rooms above it, never below.
     1 Tables           protocol words and limits; nothing computed
     2 Errors           every way a request can fail, and who is told what
     3 Config           the accounts file becomes frozen dataclasses
     4 Vocabulary       what a request and an answer are, in nobody's JSON
     5 From the client  OpenAI's bodies become a Request, or a BadRequest that names the field
     6 Model mapping    which Gemini model a name means
     7 Account pool     who is asked next, who rests until when
     8 To Gemini        a Request becomes a generateContent body
     9 From Gemini      bytes become Events: the only stream machine
    10 To the client    Events become OpenAI's chunks and objects
    11 Upstream         HTTP to Gemini, and the one retry loop
    12 Web              auth, routes, handlers
    13 Command line     what a person types
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import importlib
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, assert_never
from urllib.parse import quote

import click


class _Lazy:
    """A module that is imported at its first use, so that --help stays fast."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import asyncio

    import aiohttp
    from aiohttp import web
else:
    asyncio, aiohttp, web = _Lazy("asyncio"), _Lazy("aiohttp"), _Lazy("aiohttp.web")

log = logging.getLogger("agproxy")

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
COOLDOWN_S_DEFAULT = 30.0
ATTEMPTS_MAX = 3
BODY_BYTES_MAX = 64 << 20
CONNECT_S = 10.0
IDLE_S = 300.0
DRAIN_S = 30.0
STOPS_MAX = 4
SIGNATURES_MAX = 20_000
GEMINI_URL = "https://generativelanguage.googleapis.com"

# Accepted by Gemini 3 in place of a thought signature that it did not make.
# Source: https://ai.google.dev/gemini-api/docs/thought-signatures
SIGNATURE_SENTINEL = "skip_thought_signature_validator"

BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"

# ==============================================================================
# 2. Errors
# ==============================================================================
# GatewayError
# ├── BadRequest            the client's mistake, with the field's path
# ├── Unauthorized, ModelNotFound, UnknownUrl, MethodNotAllowed, BodyTooLarge
# ├── PoolExhausted         every account was asked or rests
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

    status: int = 500
    type: str = "server_error"
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


class Unauthorized(GatewayError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class ModelNotFound(GatewayError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class UnknownUrl(GatewayError):
    status = 404
    type = "invalid_request_error"
    default_code = "unknown_url"


class MethodNotAllowed(GatewayError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_supported"


class BodyTooLarge(GatewayError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


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


class PoolExhausted(GatewayError):
    """Nobody could answer: the class of the last refusal, and why each account could not."""

    def __init__(self, message: str, last: UpstreamError, retry_after_s: float | None) -> None:
        super().__init__(message, code=last.code, retry_after_s=retry_after_s)
        self.status, self.type = last.status, last.type


# ==============================================================================
# 3. Config
# ==============================================================================


class ConfigError(Exception):
    """The accounts file, or what stands in its place, cannot be used; the text says where and what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    api_key: str = field(repr=False)
    base_url: str = GEMINI_URL


@dataclass(frozen=True, slots=True)
class Config:
    accounts: tuple[Account, ...]
    host: str = "127.0.0.1"
    port: int = 8045
    auth_mode: str = "auto"
    api_key: str | None = field(default=None, repr=False)
    allow_lan_access: bool = False
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def auth(self) -> str:
        """The effective mode: `auto` asks for a key exactly where the LAN can reach the gateway."""
        if self.auth_mode != "auto":
            return self.auth_mode
        return "all_except_health" if self.allow_lan_access else "off"


SECTIONS = ("proxy", "models", "accounts")
PROXY_KEYS = ("host", "port", "auth_mode", "api_key", "allow_lan_access")
MODELS_KEYS = ("default", "map")
ACCOUNT_KEYS = ("name", "email", "kind", "enabled", "api_key", "base_url")
AUTH_MODES = ("off", "strict", "all_except_health", "auto")


def load_config(text: str, source: str, env: Mapping[str, str]) -> Config:
    """The accounts file as a Config. Raises ConfigError with file:line and the nearest known key."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}:1: the file must hold the keys {', '.join(SECTIONS)}.")
    check_keys(node, SECTIONS, source)
    known = {"proxy": PROXY_KEYS, "models": MODELS_KEYS}
    for key, value in node.value if node else ():
        entries = value.value if key.value == "accounts" else [value]
        for entry in entries:
            check_keys(entry, known.get(key.value, ACCOUNT_KEYS), source)
    proxy, models = data.get("proxy") or {}, data.get("models") or {}
    config = Config(
        accounts=tuple(
            load_account(entry, f"{source}: accounts[{i}]", env)
            for i, entry in enumerate(data.get("accounts") or [])
            if entry.get("enabled", True)
        ),
        default_model=models.get("default"),
        aliases=models.get("map") or {},
        **{key: value for key, value in proxy.items() if value is not None and key != "api_key"},
        api_key=from_environment(proxy["api_key"], f"{source}: proxy.api_key", env) if proxy.get("api_key") else None,
    )
    return checked(config, source)


def check_keys(node: Any, known: Sequence[str], source: str) -> None:
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return
    if node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: expected keys with values here ({', '.join(known)}).")
    for key, _ in node.value:
        if key.value not in known:
            near = difflib.get_close_matches(key.value, known, 1)
            hint = f" ({near[0]}?)" if near else f" (known: {', '.join(known)})"
            raise ConfigError(f"{source}:{key.start_mark.line + 1}: unknown key '{key.value}'{hint}")


def load_account(entry: Mapping[str, Any], where: str, env: Mapping[str, str]) -> Account:
    name = entry.get("name") or entry.get("email")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a `name` or an `email` is needed.")
    if entry.get("kind", "gemini") != "gemini":
        raise ConfigError(f"{where}: kind '{entry['kind']}' is not served; use `kind: gemini`.")
    key = from_environment(entry.get("api_key"), f"{where}.api_key", env)
    return Account(name, key, str(entry.get("base_url") or GEMINI_URL).rstrip("/"))


def from_environment(value: Any, where: str, env: Mapping[str, str]) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: a text is needed: the key itself, ${{NAME}} or env:NAME.")
    match = re.fullmatch(r"\$\{(\w+)\}|env:(\w+)", value)
    if match is None:
        return value
    name = match[1] or match[2]
    if not env.get(name):
        raise ConfigError(f"{where}: the environment variable {name} is not set.")
    return env[name]


def checked(config: Config, source: str) -> Config:
    """The config, or a ConfigError where its values cannot be right or safe."""
    if not isinstance(config.port, int) or not 0 <= config.port <= 65535:
        raise ConfigError(f"{source}: proxy.port must be a number from 0 to 65535.")
    if config.auth_mode not in AUTH_MODES:
        raise ConfigError(f"{source}: proxy.auth_mode must be one of {', '.join(AUTH_MODES)} (quote 'off').")
    if config.auth != "off" and not config.api_key:
        raise ConfigError(f"{source}: proxy.auth_mode asks for a key, but proxy.api_key is not set.")
    if not config.allow_lan_access and config.host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"{source}: host {config.host} is not loopback; set proxy.allow_lan_access: true to allow it."
        )
    names = [account.name for account in config.accounts]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{source}: two accounts are named {doubled.pop()}; give each its own `name`.")
    return config


# ==============================================================================
# 4. Vocabulary
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
# 5. From the client
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
    if match is None or not isinstance(url, str):
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
# 6. Model mapping
# ==============================================================================

# Names that OpenAI clients are set to by default, by what they promise: fast, strong or small.
BUILTIN_ALIASES: Mapping[str, str] = {
    "gpt-4o": "gemini-2.5-flash",
    "*mini*": "gemini-2.5-flash-lite",
    "*nano*": "gemini-2.5-flash-lite",
    "gpt-5*": "gemini-2.5-pro",
    "gpt-*": "gemini-2.5-flash",
    "chatgpt-*": "gemini-2.5-flash",
    "o1*": "gemini-2.5-pro",
    "o3*": "gemini-2.5-pro",
    "o4*": "gemini-2.5-pro",
    "codex*": "gemini-2.5-pro",
    "text-davinci-*": "gemini-2.5-flash",
    "claude-*haiku*": "gemini-2.5-flash-lite",
    "claude-*": "gemini-2.5-pro",
}
STATIC_MODELS = ("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite")


def map_model(name: str, config: Config) -> str:
    """The upstream's name: user exact > user wildcard > built-in > gemini-* as it is > default.

    Raises ModelNotFound with near names.
    """
    bare = re.sub(r"^(models|openai|google)/", "", name)
    for table in (config.aliases, BUILTIN_ALIASES):
        if target := look_up(bare, table):
            return target
    if bare.startswith("gemini-"):
        return bare
    if config.default_model:
        return config.default_model
    near = difflib.get_close_matches(bare, [*config.aliases, *STATIC_MODELS, *BUILTIN_ALIASES], 3, 0.4)
    hint = f" Near names: {', '.join(near)}." if near else ""
    raise ModelNotFound(f"The model '{name}' is not known.{hint} Add it under models.map.", param="model")


def look_up(name: str, table: Mapping[str, str]) -> str | None:
    if name in table:
        return table[name]
    hits = [p for p in table if "*" in p and re.fullmatch(".*".join(map(re.escape, p.split("*"))), name)]
    best = max(hits, key=lambda p: (len(p.replace("*", "")), len(p.split("*")[0])), default=None)
    return table[best] if best is not None else None


VERSION = re.compile(r"gemini-(\d+)(?:\.(\d+))?")
NEWEST = (4, 0)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model can and must do; asked here, never by its name in passing."""

    signatures: bool
    """Refuses a function call in the history that has no thought signature."""


def traits_of(model: str) -> Traits:
    """Traits by the parsed version; a name without one counts as the newest."""
    match = VERSION.search(model)
    version = (int(match[1]), int(match[2] or 0)) if match else NEWEST
    return Traits(signatures=version >= (3, 0))


# ==============================================================================
# 7. Account pool
# ==============================================================================


class AccountPool:
    """Who is asked next, and who rests until when. Told the time; never waits."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self.accounts = tuple(accounts)
        self._next = 0
        self._rests: dict[tuple[str, str], tuple[float, UpstreamError]] = {}

    def acquire(self, model: str, tried: Sequence[Account], now: float) -> Account | None:
        """The next account in turn that is neither tried nor resting for this model, or None."""
        for i in range(len(self.accounts)):
            account = self.accounts[(self._next + i) % len(self.accounts)]
            if account not in tried and self._rests.get((account.name, model), (0.0,))[0] <= now:
                self._next = (self._next + i + 1) % len(self.accounts)
                return account
        return None

    def failed(self, account: Account, model: str, error: UpstreamError, now: float) -> None:
        if error.remedy == "next_account":
            self._rests[account.name, model] = (now + (error.retry_after_s or COOLDOWN_S_DEFAULT), error)

    def exhausted(self, model: str, refusals: Mapping[str, UpstreamError], now: float) -> PoolExhausted:
        """The class of the last refusal, the wait until the soonest account, and the reason of each."""
        rests = {a.name: r for a in self.accounts if (r := self._rests.get((a.name, model))) and r[0] > now}
        reasons = {name: error for name, (_, error) in rests.items()} | dict(refusals)
        if not reasons:
            return PoolExhausted("No account is configured.", Overloaded("no account"), None)
        wait = min((until - now for until, _ in rests.values()), default=None)
        text = "; ".join(f"{name}: {error.message}" for name, error in reasons.items())
        last = list((refusals or reasons).values())[-1]
        return PoolExhausted(f"No account could answer. {text}", last, wait or last.retry_after_s)


class SignatureMemory:
    """Thought signatures by tool-call id, for clients that drop unknown keys; the oldest give way."""

    def __init__(self, size: int = SIGNATURES_MAX) -> None:
        self._size = size
        self._known: dict[str, tuple[str, str]] = {}

    def remember(self, events: Iterable[Event], model: str) -> None:
        for event in events:
            if isinstance(event, PartEnd) and isinstance(event.part, ToolCall) and event.part.signature:
                self._known[event.part.id] = (model, event.part.signature)
        while len(self._known) > self._size:
            del self._known[next(iter(self._known))]

    def recall(self, request: Request, model: str) -> Request:
        """The request with the signatures that this model made put back on its calls."""

        def signed(part: Part) -> Part:
            made_by, signature = self._known.get(part.id, ("", "")) if isinstance(part, ToolCall) else ("", "")
            if not isinstance(part, ToolCall) or part.signature or made_by != model:
                return part
            return replace(part, signature=signature)

        return replace(request, messages=tuple(replace(m, parts=tuple(map(signed, m.parts))) for m in request.messages))


# ==============================================================================
# 8. To Gemini
# ==============================================================================


def build_generate_content(request: Request, traits: Traits) -> dict[str, Any]:
    """The generateContent body for a request.

    Source: https://ai.google.dev/api/generate-content#request-body
    """
    body: dict[str, Any] = {"contents": build_contents(request.messages, traits)}
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


def build_contents(messages: Sequence[Message], traits: Traits) -> list[dict[str, Any]]:
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
        add_turn(contents, role, build_parts(message.parts, traits))
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


def build_parts(parts: Sequence[Part], traits: Traits) -> list[dict[str, Any]]:
    built = [built for part in parts if (built := build_part(part))]
    first_call = next((part for part in built if "functionCall" in part), None)
    if first_call is not None and traits.signatures:
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
# 9. From Gemini
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
# 10. To the client
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
# 11. Upstream
# ==============================================================================


@dataclass(slots=True)
class Trace:
    """What happened to one request, for its headers and its log line."""

    id: str
    route: str
    started: float
    model: str = "-"
    mapped_model: str = ""
    account: str = ""
    attempts: int = 0
    spare: bool = True
    usage: Usage | None = None

    def headers(self) -> dict[str, str]:
        headers = {"X-Request-Id": self.id}
        if self.mapped_model:
            headers |= {"X-Mapped-Model": self.mapped_model, "X-Attempts": str(self.attempts)}
        return headers | ({"X-Account-Email": masked(self.account)} if self.account else {})


def masked(name: str) -> str:
    """An e-mail with its first letter and domain left; any other name as it is."""
    return re.sub(r"^(.)[^@]*@", r"\1***@", name)


class Answer:
    """One answer that has begun: its first events are known, so nobody retries any more."""

    def __init__(self, reader: GeminiReader | None, response: aiohttp.ClientResponse, first: list[Event]) -> None:
        self._reader = reader
        self._response = response
        self._first = first

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events of each read, in order; a broken upstream ends them with Failed."""
        yield self._first
        if self._reader is None:
            return
        try:
            async for data in self._response.content.iter_any():
                if events := self._reader.feed(data):
                    yield events
        except (aiohttp.ClientError, TimeoutError):
            pass  # the reader knows whether the answer was whole
        yield self._reader.close()

    def close(self) -> None:
        self._response.close()


class Upstream:
    """The accounts' Gemini: HTTP, and the one retry loop."""

    def __init__(self, config: Config, pool: AccountPool, session: aiohttp.ClientSession) -> None:
        self._config = config
        self._pool = pool
        self._session = session
        self.signatures = SignatureMemory()

    async def ask(self, request: Request, trace: Trace) -> Answer:
        """An answer that has begun. Raises the error that ended the last attempt, or PoolExhausted."""
        signed = self.signatures.recall(request, trace.mapped_model)
        body = dumps(build_generate_content(signed, traits_of(trace.mapped_model))).encode()
        refusals: dict[str, UpstreamError] = {}
        tried: list[Account] = []
        while trace.attempts < ATTEMPTS_MAX:
            account = self._pool.acquire(trace.mapped_model, tried, time.monotonic())
            if account is None and tried and refusals[tried[-1].name].remedy == "same_account" and trace.spare:
                trace.spare = False
                await asyncio.sleep(random.uniform(0.2, 1.0))
                account = tried[-1]
            if account is None:
                break
            trace.attempts += 1
            trace.account = account.name
            tried.append(account)
            try:
                return await self._attempt(account, trace.mapped_model, body, request.stream)
            except UpstreamError as error:
                if error.remedy == "give_up":
                    raise
                refusals[account.name] = error
                self._pool.failed(account, trace.mapped_model, error, time.monotonic())
        raise self._pool.exhausted(trace.mapped_model, refusals, time.monotonic())

    async def _attempt(self, account: Account, model: str, body: bytes, stream: bool) -> Answer:
        method = "streamGenerateContent?alt=sse" if stream else "generateContent"
        url = f"{account.base_url}/v1beta/models/{quote(model)}:{method}"
        headers = {"x-goog-api-key": account.api_key, "Content-Type": "application/json"}
        try:
            response = await self._session.post(url, data=body, headers=headers)
        except TimeoutError:
            raise UpstreamTimeout("Gemini did not answer in time.") from None
        except aiohttp.ClientError as error:
            raise UpstreamBroken(f"Gemini could not be reached ({type(error).__name__}).") from None
        try:
            return await self._first_events(response, stream)
        except BaseException:
            response.close()
            raise

    async def _first_events(self, response: aiohttp.ClientResponse, stream: bool) -> Answer:
        reader = GeminiReader(lambda: f"call_{secrets.token_hex(12)}")
        try:
            if response.status != 200:
                raise classify_error(response.status, parse_json(await response.read()))
            if not stream:
                events = reader.whole(await response.read())
                return Answer(None, response, unless_failed(events))
            async for data in response.content.iter_any():
                if events := reader.feed(data):
                    break
            else:
                events = reader.close()
        except TimeoutError:
            raise UpstreamTimeout("Gemini sent nothing in time.") from None
        except aiohttp.ClientError:
            raise UpstreamBroken("Gemini broke the connection.") from None
        return Answer(reader, response, unless_failed(events))


def unless_failed(events: list[Event]) -> list[Event]:
    """The events, or the error that is the first of them: the first event decides."""
    if events and isinstance(events[0], Failed):
        raise events[0].error
    return events


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


# ==============================================================================
# 12. Web
# ==============================================================================

ROUTE = re.compile(
    r"(?:/(?:v1|chat/completions|completions|responses|models))*/(?P<route>chat/completions|healthz|models)(?:(?<=models)/(?P<id>.+?))?/?"
)


class Gateway:
    """The handlers, and what outlives a request."""

    def __init__(self, config: Config, upstream: Upstream) -> None:
        self._config = config
        self._upstream = upstream

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Every request: named, let in or not, answered, and told the truth where it fails."""
        trace = Trace(f"req_{secrets.token_hex(12)}", request.path, time.monotonic())
        response: web.StreamResponse | None = None
        try:
            response = await self._route(request, trace)
        except GatewayError as error:
            response = error_response(error, trace)
        except web.HTTPRequestEntityTooLarge:
            response = error_response(BodyTooLarge(f"The body is larger than {BODY_BYTES_MAX} bytes."), trace)
        except Exception:
            log.exception("%s failed", trace.id)
            response = error_response(GatewayError("The gateway failed; its log says why."), trace)
        finally:
            log_line(trace, response.status if response else 499)
        return response

    async def _route(self, request: web.Request, trace: Trace) -> web.StreamResponse:
        match = ROUTE.fullmatch(re.sub("/{2,}", "/", request.path))
        route = match["route"] if match else None
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=trace.headers())
        self._let_in(request.headers, route)
        if route is None:
            raise UnknownUrl(f"Invalid URL ({request.method} {request.path}). The base URL ends in /v1.")
        method = "POST" if route == "chat/completions" else "GET"
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise MethodNotAllowed(f"{request.method} is not served here; use {method}.")
        if route == "healthz":
            return json_response({"status": "ok", "version": __version__}, trace)
        if route == "models":
            return json_response(self._model(match["id"]) if match and match["id"] else self._models(), trace)
        return await self._chat(request, trace)

    def _let_in(self, headers: Mapping[str, str], route: str | None) -> None:
        mode = self._config.auth
        if mode == "off" or (mode == "all_except_health" and route == "healthz"):
            return
        given = [re.sub(r"(?i)^bearer +", "", headers.get("Authorization", "").strip())]
        given += [headers.get(name, "") for name in ("x-api-key", "x-goog-api-key", "api-key")]
        wanted = (self._config.api_key or "").encode()
        right = [hmac.compare_digest(key.encode("utf-8", "replace"), wanted) for key in given]
        if not any(right):
            raise Unauthorized("The API key is missing or wrong. Send proxy.api_key as 'Authorization: Bearer KEY'.")

    def _models(self) -> dict[str, Any]:
        names = [*STATIC_MODELS, *(alias for alias in self._config.aliases if "*" not in alias)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "google"} for name in names]
        return {"object": "list", "data": data}

    def _model(self, name: str) -> dict[str, Any]:
        known = {model["id"]: model for model in self._models()["data"]}
        if name not in known:
            raise ModelNotFound(f"The model '{name}' is not listed; GET /v1/models lists what is.", param="model")
        found: dict[str, Any] = known[name]
        return found

    async def _chat(self, http: web.Request, trace: Trace) -> web.StreamResponse:
        body = parse_json(await http.read())
        if body is None:
            raise BadRequest("The body is not valid JSON.")
        request = parse_chat(body)
        trace.model = request.model
        trace.mapped_model = map_model(request.model, self._config)
        names: dict[str, Any] = {"id": f"chatcmpl-{trace.id[4:]}", "created": int(time.time()), "model": request.model}
        answer = await self._upstream.ask(request, trace)
        try:
            if not request.stream:
                events = [event async for batch in answer.batches() for event in batch]
                self._upstream.signatures.remember(events, trace.mapped_model)
                reply = collect(events)
                trace.usage = reply.usage
                return json_response(render_chat(reply, **names), trace)
            renderer = ChatRenderer(**names, include_usage=request.include_usage)
            return await self._stream(http, trace, answer, renderer)
        finally:
            answer.close()

    async def _stream(
        self, http: web.Request, trace: Trace, answer: Answer, renderer: ChatRenderer
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=trace.headers() | {"Cache-Control": "no-cache"})
        response.content_type = "text/event-stream"
        await response.prepare(http)
        async for events in answer.batches():
            self._upstream.signatures.remember(events, trace.mapped_model)
            if events and isinstance(events[-1], Ended):
                trace.usage = events[-1].usage
            if frames := "".join(map(renderer.render, events)):
                await response.write(frames.encode())
        await response.write_eof()
        return response


def json_response(body: Any, trace: Trace, status: int = 200) -> web.Response:
    return web.Response(
        body=dumps(body).encode(), status=status, content_type="application/json", headers=trace.headers()
    )


def error_response(error: GatewayError, trace: Trace) -> web.Response:
    response = json_response(error_body(error), trace, error.status)
    if error.status in (429, 503):
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s or 1))
    return response


def log_line(trace: Trace, status: int) -> None:
    """One line a finished request; never a prompt, control characters escaped."""
    total_ms = round((time.monotonic() - trace.started) * 1000)
    tokens = f" tokens={trace.usage.prompt}+{trace.usage.completion}" if trace.usage else ""
    fields = (trace.id, trace.route, f"{trace.model} -> {trace.mapped_model}", trace.account or "-")
    text = f"{' '.join(fields)} attempts={trace.attempts} status={status} ms={total_ms}{tokens}"
    log.info("%s", text.encode("unicode_escape").decode())


async def create_app(config: Config) -> web.Application:
    """The gateway as an aiohttp application; its session closes with it."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=IDLE_S)
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(timeout=timeout, connector=connector, cookie_jar=aiohttp.DummyCookieJar())
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    gateway = Gateway(config, Upstream(config, AccountPool(config.accounts), session))
    app.router.add_route("*", "/{tail:.*}", gateway.handle)

    async def close(_: web.Application) -> None:
        await session.close()

    app.on_cleanup.append(close)
    return app


# ==============================================================================
# 13. Command line
# ==============================================================================


def file_fingerprint() -> str:
    """The start of this file's SHA-256, so that a copied file can be told apart."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def find_config(accounts: str | None, env: Mapping[str, str]) -> Config:
    """The config by flag, $AGPROXY_ACCOUNTS, ./accounts.yaml, $XDG_CONFIG_HOME, or one key from the environment."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "agproxy" / "accounts.yaml"
    named = accounts or env.get("AGPROXY_ACCOUNTS")
    path = Path(named) if named else next((p for p in (Path("accounts.yaml"), home) if p.exists()), None)
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        return load_config(text, str(path), env)
    if key := env.get("GEMINI_API_KEY") or env.get("GOOGLE_API_KEY"):
        return Config(accounts=(Account("environment", key),))
    raise ConfigError("No accounts. Give --accounts FILE, write ./accounts.yaml, or set GEMINI_API_KEY.")


class Unusable(click.ClickException):
    """What the user gave cannot be used."""

    exit_code = 2


def configured(accounts: str | None, **flags: Any) -> Config:
    try:
        config = find_config(accounts, os.environ)
        if (port := os.environ.get("AGPROXY_PORT", "")).isdigit():
            config = replace(config, port=int(port))
        return checked(replace(config, **{k: v for k, v in flags.items() if v is not None}), "command line")
    except ConfigError as error:
        raise Unusable(str(error)) from None


@click.group()
@click.version_option(__version__, message=f"agproxy {__version__} (file {file_fingerprint()})")
def main() -> None:
    """An OpenAI-compatible gateway in front of Gemini, in one file."""


@main.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: 8045]")
@click.option("--accounts", help="The accounts file.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def serve(host: str | None, port: int | None, accounts: str | None, log_level: str) -> None:
    """Start the gateway."""
    config = configured(accounts, host=host, port=port)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(message)s", stream=sys.stderr)
    click.echo(
        f"agproxy {__version__}: http://{config.host}:{config.port}/v1, "
        f"{len(config.accounts)} account(s), auth {config.auth}",
        err=True,
    )
    try:
        web.run_app(
            create_app(config),
            host=config.host,
            port=config.port,
            print=None,
            access_log=None,
            handler_cancellation=True,  # aiohttp's default goes on asking Gemini for a client that is gone
            shutdown_timeout=DRAIN_S,
        )
    except OSError as error:
        raise click.ClickException(f"Cannot listen on {config.host}:{config.port}: {error.strerror}.") from None


@main.command()
@click.option("--accounts", help="The accounts file.")
def check(accounts: str | None) -> None:
    """Say what is wrong with the accounts file, or list its accounts with masked secrets."""
    config = configured(accounts)
    width = max([len("account"), *(len(account.name) for account in config.accounts)])
    click.echo(f"{'account':{width}}  key           upstream")
    for account in config.accounts:
        click.echo(f"{account.name:{width}}  {masked_key(account.api_key):12}  {account.base_url}")


def masked_key(key: str) -> str:
    """Enough of a key to tell two apart, too little to use one."""
    return f"{key[:4]}…{key[-2:]}" if len(key) >= 20 else "…"


@main.command("env")
@click.option("--host")
@click.option("--port", type=int)
@click.option("--accounts")
def print_env(host: str | None, port: int | None, accounts: str | None) -> None:
    """Print what a shell needs: eval "$(agproxy env)"."""
    config = configured(accounts, host=host, port=port)
    base = f"http://{config.host}:{config.port}/v1"
    values = {"OPENAI_BASE_URL": base, "OPENAI_API_BASE": base, "OPENAI_API_KEY": config.api_key or "not-needed"}
    for name, value in values.items():
        click.echo(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
