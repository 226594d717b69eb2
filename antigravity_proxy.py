#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4", "click>=8.1", "pyyaml>=6.0"]
# ///
"""agproxy: an OpenAI-compatible gateway in front of Gemini, in one file.

The rooms, in reading order. A room may use the rooms above it, never below.
     1 Errors          every way a request can fail, and who is told what
     2 JSON            texts to values and back; long base64 kept apart
     3 Vocabulary      what a request and an answer are, in nobody's JSON
     4 Config          the accounts file becomes frozen dataclasses
     5 Doors           what the front formats share: a door, typed fields, renderers
     6 Chat            chat and completions: fields, parser, renderer
     7 Responses       OpenAI's Responses: fields, parser, renderer
     8 Embeddings      texts to vectors
     9 Models          which Gemini model a name means, and what that can do
    10 To Gemini       a Request becomes a generateContent body
    11 From Gemini     bytes become Events: the only stream machine; Gemini's refusals
    12 Signatures      thought signatures: remembered, sealed
    13 Accounts        who is asked next, who is in cooldown until when
    14 Journal         what is told of a request: headers, the log line, decisions
    15 Store           SQLite on a thread of its own: what outlives the process
    16 Credentials     API keys and tokens: each fetched once for all who wait
    17 Transport       HTTP/1.1: a body goes out, the pieces of an answer come in
    18 Upstream        what Gemini is asked, and the one retry loop
    19 Media           linked files, from public addresses only
    20 Kept responses  recall, keep, background, replay
    21 Web             aiohttp.web: auth, routes, handlers
    22 Demo            a small Gemini for --demo; it shares nothing with the rooms that it proves
    23 Command line    what a person types
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import functools
import gc
import hashlib
import hmac
import importlib
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import signal
import struct
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from json.encoder import encode_basestring
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Literal,
    NoReturn,
    TypeVar,
    assert_never,
    dataclass_transform,
)
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

import click

orjson: Any = None  # twice as fast; what it cannot do, the standard library does
with contextlib.suppress(ImportError):
    orjson = importlib.import_module("orjson")


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
    import sqlite3
    import ssl

    import aiohttp
else:
    asyncio, aiohttp, sqlite3 = map(_Lazy, ("asyncio", "aiohttp", "sqlite3"))

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots; the type checker freezes it, for what does it at run time doubles the cost of making one."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


log = logging.getLogger("agproxy")

__version__ = "0.1.0"
USER_AGENT = f"agproxy/{__version__}"

# ==============================================================================
# 1. Errors
# ==============================================================================
# GatewayError
# ├── BadRequest            the client's mistake, with the field's path where it is in one
# │   ├── Unauthorized, Forbidden, ModelNotFound, ResponseNotFound, UnknownUrl
# │   └── MethodNotAllowed, BodyTooLarge, BodyTooSlow
# ├── StoreTrouble          what is kept cannot be read or written for now
# ├── PoolExhausted         every account was asked or rests
# └── UpstreamError         one attempt at Gemini failed
#     ├── UpstreamRefused   Gemini calls the request itself wrong: nobody else would take it
#     │   ├── TooLarge
#     │   ├── ModelGone     this account does not have the model
#     │   ├── SignatureRefused  worth one more try without the thought signatures
#     │   └── SchemaRefused     the same, with schemas in Google's own subset
#     ├── RateLimited       this account or its project, for now
#     │   └── QuotaGone     the same, for the day
#     ├── CredentialRefused this account, until a try succeeds
#     │   └── AccountBarred this account, until its owner acts
#     ├── TokenTrouble      no token for this account, for some seconds
#     ├── Overloaded        not the account's fault
#     │   └── Paused        its owner wants it not to be asked
#     ├── UpstreamTimeout   no answer in time
#     ├── Cancelled         the client did not want the rest
#     └── UpstreamBroken    cut, empty or unreadable

RETRY_AFTER_S_MAX = 24 * 3600.0  # no wait is believed beyond a day
ERROR_CHARS_MAX = 2000
TOKEN_RETRY_S = 5.0
# What looks like a key or a token, whoever says it: Google's, OpenAI's, behind `Bearer`, in a query, before an @.
SECRET_FORMS = re.compile(  # each way to begin is a literal, which makes it six times as fast
    r"AIza[\w-]{8,}|AQ\.[\w.-]{8,}|ya29\.[\w.-]+|1//[\w-]{20,}|sk-[\w-]{16,}|Bearer [\w.~+/=-]{8,}|bearer [\w.~+/=-]{8,}"
    r"|\?key=[^&\s\"']+|&key=[^&\s\"']+|://[^/@\s]+@"
)
Remedy = Literal["give_up", "next_account", "same_account"]


class GatewayError(Exception):
    """A failure that the client is told about; the class answers status, type, code and remedy. It tells no secret."""

    status: int = 500
    type: str = "server_error"
    default_code: str = "server_error"
    remedy: Remedy = "give_up"
    advice: str = "Try again."
    waits: bool = False  # Retry-After is told
    falls_back: bool = False  # another model of models.fallback may answer

    def __init_subclass__(
        cls, *, status: int = 0, type: str = "", code: str | None = None, **flags: bool
    ) -> None:
        """What clients read stands beside the class's name, where its parent says otherwise; the code "" is null."""
        cls.status, cls.type = status or cls.status, type or cls.type
        cls.waits, cls.falls_back = (
            flags.get("waits", cls.waits),
            flags.get("falls_back", cls.falls_back),
        )
        cls.default_code = cls.default_code if code is None else code

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = SECRET_FORMS.sub("…", message)
        super().__init__(self.message)
        self.code = code or self.default_code or None
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class BadRequest(GatewayError, status=400, type="invalid_request_error", code=""): ...


class Unauthorized(BadRequest, status=401, code="invalid_api_key"): ...


class Forbidden(BadRequest, status=403, type="permission_error"): ...


class ModelNotFound(BadRequest, status=404, code="model_not_found"): ...


class ResponseNotFound(BadRequest, status=404): ...


class StoreTrouble(GatewayError, status=503, code="server_is_overloaded", waits=True): ...


class UnknownUrl(BadRequest, status=404, code="unknown_url"): ...


class MethodNotAllowed(BadRequest, status=405, code="method_not_supported"): ...


class BodyTooLarge(BadRequest, status=413, code="request_too_large"): ...


class BodyTooSlow(BadRequest, status=408, code="request_timeout"): ...


class UpstreamError(GatewayError, status=502, code="upstream_error"):
    """One attempt failed. Who `rests` after it: the whole account, or for this model the account, or all of its project."""

    scope: Literal["nobody", "account", "model", "project"] = "nobody"
    cooldown_s: float = (
        0.0  # where the upstream does not say; twice as long after each probe that fails
    )
    reset_at: float | None = (
        None  # when the upstream says that the quota is new, in seconds since 1970
    )
    quota: str = ""  # what kind of quota is used up
    limit: int | None = None  # how large that quota is
    lasting: int = 0  # of several accounts' refusals a client is told one with the least


class Cancelled(UpstreamError, code=""): ...


class UpstreamRefused(UpstreamError, status=400, type="invalid_request_error", code=""): ...


class ModelGone(UpstreamRefused, status=404, code="model_not_found", falls_back=True):
    remedy = "next_account"
    scope = "model"
    cooldown_s = 600.0
    quota = "model"
    lasting = 3
    advice = "Use a name of `agproxy models`, or map it in models.map."


class TooLarge(UpstreamRefused, status=413, code="request_too_large"): ...


class SignatureRefused(UpstreamRefused):
    """A thought signature is missing, or another model or project made it."""


class SchemaRefused(UpstreamRefused):
    """Gemini takes less of JSON Schema than it says: no `required` without its property, no `$ref` to what is not there.

    Source: https://github.com/google-gemini/gemini-cli/issues/4607, .../13326
    """


class RateLimited(
    UpstreamError,
    status=429,
    type="rate_limit_error",
    code="rate_limit_exceeded",
    waits=True,
    falls_back=True,
):
    remedy = "next_account"
    scope = "project"
    cooldown_s = 5.0
    quota = "requests"
    advice = "Wait, or add an account of another project."


class QuotaGone(RateLimited, type="insufficient_quota", code="insufficient_quota"):
    """Without a word of the upstream's, until the new day of its quotas begins."""

    quota = "day"
    lasting = 1
    advice = "Wait for the new day, turn on billing, or add an account of another project."


class CredentialRefused(UpstreamError):
    remedy = "next_account"
    scope = "account"
    cooldown_s = 60.0
    quota = "credentials"
    lasting = 2
    advice = "Check the keys with `agproxy check --online`."


class AccountBarred(CredentialRefused):
    cooldown_s = math.inf
    quota = "barred"
    advice = "Do what it says, change the account's credentials, or run `agproxy pool reset NAME`."


class TokenTrouble(UpstreamError):
    remedy = "next_account"
    scope = "account"
    cooldown_s = TOKEN_RETRY_S
    quota = "token"
    advice = "Check the network and token_url."


class Overloaded(
    UpstreamError, status=503, code="server_is_overloaded", waits=True, falls_back=True
):
    remedy = "same_account"
    advice = "Try again later, or ask another model."


class Paused(Overloaded):
    scope = "account"
    cooldown_s = math.inf
    quota = "paused"
    lasting = 1
    advice = "Resume it by `agproxy pool resume NAME`."


class UpstreamTimeout(UpstreamError, status=504, code="timeout"):
    remedy = "same_account"
    advice = "Try again, or raise proxy.timeouts."


class UpstreamBroken(UpstreamError):
    remedy = "same_account"


def without_secret(text: str, secret: str) -> str:
    """The text without a key that somebody repeats in it; one so short that it is a word would be no key."""
    return text.replace(secret, "…") if len(secret) >= 8 else text


class PoolExhausted(GatewayError):
    """Nobody could answer: the class of the last refusal, and why each account could not."""

    def __init__(self, message: str, last: UpstreamError, retry_after_s: float | None) -> None:
        super().__init__(message, code=last.code, param=last.param, retry_after_s=retry_after_s)
        self.status, self.type = last.status, last.type
        self.waits, self.falls_back = last.waits, last.falls_back


# ==============================================================================
# 2. JSON
# ==============================================================================

BODY_BYTES_MAX = 64 << 20
LARGE_BYTES = 1 << 20
BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"


def dumps(value: Any) -> str:
    """Compact JSON. Raises ValueError for what JSON has no word for, such as NaN."""
    return "".join(json_pieces(value, 0))


def json_encoder() -> Callable[[Any, int], Iterable[str]]:
    """The library's encoder, made once: its `encode` makes one a call, which costs more than a small text itself."""
    one = json.JSONEncoder(
        ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
    )
    make: Any = getattr(importlib.import_module("json.encoder"), "c_make_encoder", None)
    if make is None:  # in a Python that is not CPython
        return lambda value, _: one.iterencode(value)
    made: Callable[[Any, int], Iterable[str]] = make(
        None, one.default, encode_basestring, None, ":", ",", False, False, False
    )
    return made


json_pieces = json_encoder()


def dump_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError as `dumps`, and BadRequest for what is nested too deep."""
    if orjson is not None:
        with contextlib.suppress(
            TypeError
        ):  # half a surrogate pair, a number of more than 64 bits, 254 levels
            return b"%b" % orjson.dumps(value)  # which holds several times what it needs
    try:
        return encoded(dumps(value))
    except RecursionError:
        raise BadRequest("The body is nested too deep. Send flatter JSON.") from None


def encoded(text: str) -> bytes:
    """The text in UTF-8; half a surrogate pair, as clients send it that cut an emoji in two, becomes '?'."""
    return text.encode("utf-8", "replace")


def fast_loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for some texts that json.loads takes."""
    if orjson is not None:
        return orjson.loads(text)
    if isinstance(text, bytes):
        text = (
            text.decode()
        )  # json.loads would guess the encoding first, which costs as much as the parsing
    try:
        value, end = scan_json(text, 0)
    except StopIteration:
        raise ValueError("no JSON value") from None
    if end != len(text) and text[end:].strip():
        raise ValueError("something follows the value")
    return value


scan_json: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, None where it is none."""
    for read in (fast_loads, json.loads):
        with contextlib.suppress(ValueError, RecursionError):
            return read(text)
    return None


def parse_strict(text: str) -> Any:
    """The same for a text that is sent on: None also where it holds NaN or a number that is none in JSON, or is deep."""
    if not ODD_NUMBER.search(text):
        return parse_json(text)
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    return None


ODD_NUMBER = re.compile(
    r"NaN|Infinity|[eE]\+?\d{3}|\d{17}"
)  # which is none, or which orjson would round


def escaped(key: str) -> str:
    """A key as a JSON pointer has it. Source: https://www.rfc-editor.org/rfc/rfc6901#section-3"""
    return key.replace("~", "~0").replace("/", "~1")


def pointer_of(path: str) -> str:
    """The JSON pointer of a path such as messages[0].content."""
    return "/" + re.sub(r"\[(\d+)\]", r".\1", path).replace(".", "/")


LOOKED_AT = 4 << 10  # bytes; a multiple of 4


def is_base64(data: str | bytes) -> bool:
    payload = (data.encode("ascii", "replace") if isinstance(data, str) else data).rstrip(b"=")
    return bool(payload) and not payload.translate(None, BASE64_ALPHABET) and len(payload) % 4 != 1


def seems_base64(data: bytes) -> bool:
    """The same by its ends alone, where nothing in it could end a JSON string: to read 4 MB costs a third of sending them."""
    ends = data[:LOOKED_AT] + data[-LOOKED_AT - len(data) % 4 :]
    return data.isascii() and b"\\" not in data and is_base64(ends)


def objects_in(value: Any) -> list[Any]:
    """The objects of a list; of anything else none."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def with_payloads(body: bytes, payloads: Mapping[str, bytes]) -> bytes:
    """The body with the base64 that was cut out of it."""
    if not payloads:
        return body
    first = next(iter(payloads))
    pattern = re.compile(b"(%b)" % re.sub(rb"\d{8}$", rb"\\d{8}", first.encode()))
    return b"".join(payloads.get(piece.decode("latin-1"), piece) for piece in pattern.split(body))


def finite(number: str) -> float:
    """A number that JSON can hold. Raises ValueError for NaN, and for one beyond a float's range."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no JSON number")
    return value


LOOKED_THROUGH_MAX = 64 << 10
BOM = b"\xef\xbb\xbf"
BODY_DECODER = json.JSONDecoder(parse_constant=finite, parse_float=finite)
PAYLOAD_BYTES_MIN = 16 << 10
PAYLOAD_MARK = secrets.token_hex(16)  # is base64 itself, and nobody's text


def cut_payloads(
    data: bytes, seems: Callable[[bytes], bool] = is_base64
) -> tuple[bytes, dict[str, bytes]]:
    """The body without the base64 of its data: URLs, and what was cut out: no JSON parser need read megabytes of it."""
    payloads: dict[str, bytes] = {}
    pieces = []
    at = 0
    while (start := data.find(b";base64,", at) + 8) > 7 and (end := data.find(b'"', start)) >= 0:
        payload = data[start:end]
        pieces.append(data[at:start])
        typed = (
            data[start - 20 : start] != b"octet-stream;base64,"
        )  # else its content has to tell what it is
        if len(payload) >= PAYLOAD_BYTES_MIN and typed and seems(payload):
            payloads[f"{PAYLOAD_MARK}{len(payloads):08d}"] = payload
            payload = next(reversed(payloads)).encode()
        pieces.append(payload)
        at = end
    return b"".join([*pieces, data[at:]]) if payloads else data, payloads


def parse_body(data: bytes) -> Any:
    """A JSON body. Raises BadRequest, also for NaN, for bytes that are not UTF-8, and for one nested too deep.

    That a field is given twice is seen in bodies of common size; to look through a large one would cost a tenth of all.
    """
    try:
        body = load_body(data)
        if len(data) <= LOOKED_THROUGH_MAX and not surely_single(data, body):
            json.loads(data, object_pairs_hook=object_of)
    except RecursionError:
        raise BadRequest("The body is nested too deep. Send flatter JSON.") from None
    except ValueError as error:
        raise BadRequest(
            f"The body is not valid JSON ({error}). Send a JSON object in UTF-8."
        ) from None
    return body


def load_body(data: bytes) -> Any:
    if orjson is not None:
        with contextlib.suppress(
            ValueError
        ):  # what it refuses is told by the standard library, or taken
            return orjson.loads(data)
    return BODY_DECODER.decode(data.removeprefix(BOM).decode())


def surely_single(data: bytes, body: Any) -> bool:
    """Whether no object of a body has two fields of one name: each has its colon, and there are no more than fields."""
    found, fields = [body], 0
    for value in found:  # which grows
        if value.__class__ is dict:
            fields += len(value)
            found += value.values()
        elif value.__class__ is list:
            found += value
    apart = b" :" in data or b"\n:" in data or b"\r:" in data or b"\t:" in data
    return data.count(b'":') == fields and not apart


def object_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields. Raises BadRequest where two have one name: some programs take the first, some the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:MODEL_CHARS_MAX]
        raise BadRequest(
            f"'{twice}' is given twice in one object. Send it once.",
            code="invalid_value",
            param=twice,
        )
    return made


# ==============================================================================
# 3. Vocabulary
# ==============================================================================

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ChangeKind = Literal["renamed", "clamped", "emulated", "dropped"]


@value
class Traits:
    """What a model can and must do, by default the oldest; asked through traits_of, never by its name in passing."""

    thinking: Literal["none", "budget", "level"] = "none"
    thinks: bool = (
        False  # unless it is told not to, so that summaries of its thoughts can be asked for
    )
    can_stop_thinking: bool = False
    budget: tuple[int, int] = (128, 32768)
    levels: tuple[str, ...] = ("LOW", "MEDIUM", "HIGH")
    signatures: bool = False  # refuses a function call in the history that has no thought signature
    call_ids: bool = False  # gives its function calls ids, and wants them back
    sampling: bool = True
    penalties: bool = True
    logprobs: bool = True
    json_schema: bool = False  # takes standard JSON Schema; without it, Google's subset
    json_with_tools: bool = False
    files_in_results: bool = False
    prefill: bool = True  # continues an answer that the last turn begins
    answers: tuple[str, ...] = ("TEXT",)
    output_tokens_max: int = 8192


@value
class Change:
    """Something of a request that could not be carried over as it was, at a JSON pointer."""

    pointer: str
    kind: ChangeKind
    reason: str


@value
class Citation:
    """A web source of the text from `start` to `end`, counted in code points of the choice's text, or of its part."""

    start: int
    end: int
    url: str
    title: str


@value
class Signature:
    """A thought signature, and from where to where in its text the piece stands that Gemini signed."""

    value: str
    start: int
    end: int


@value
class Text:
    text: str
    signature: Signature | None = None
    citations: tuple[Citation, ...] = ()


@value
class Thinking:
    text: str
    signature: str | None = None


@value
class Media:
    mime: str
    data: str  # base64, as it came
    signature: str | None = None
    url: str = ""  # where the content is, while `data` is empty
    path: str = ""


@value
class ToolCall:
    id: str
    name: str
    arguments: str  # a JSON text, as the client or the model wrote it; of a custom tool the free text itself
    signature: str | None = None
    namespace: str | None = None
    custom: bool = False


@value
class ToolResult:
    call_id: str
    parts: tuple[Text | Media, ...]


Part = Text | Thinking | Media | ToolCall | ToolResult


@value
class Message:
    role: Literal["user", "assistant", "tool"]
    parts: tuple[Part, ...]


@value
class Tool:
    name: str
    description: str
    parameters: Mapping[str, Any] | None
    namespace: str | None = None
    custom: bool = False  # takes free text instead of an object
    answers: bool = False  # not the client's: its argument is the final answer
    source: str = ""  # where in the body it stands, such as tools[0].function
    schema_key: str = "parameters"


@value
class ToolChoice:
    mode: Literal["auto", "none", "required"] = "auto"
    names: frozenset[str] = frozenset()


@value
class JsonFormat:
    schema: Mapping[str, Any] | None


@value
class ThinkingWish:
    effort: str | None = None
    budget: int | None = None
    show: bool = False  # wants to see summaries of the model's thoughts
    source: str = "/reasoning_effort"


@value
class Request:
    """What a client asks for, whatever API it spoke."""

    model: str
    messages: tuple[Message, ...]
    system: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_calls: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = (
        None  # how many alternatives a token; 0 is none, None is no log probabilities at all
    )
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_format: JsonFormat | None = None
    modalities: tuple[str, ...] = ()
    aspect_ratio: str | None = None  # of images that are made, as is their size
    image_size: str | None = None
    thinking: ThinkingWish = ThinkingWish()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    """JSON pointers of what the front formats name differently; `search` stands here where a web search is wished."""
    changes: tuple[Change, ...] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    """Long base64 that was cut out of the body before it was parsed, by what stands in its place."""


@value
class EmbeddingRequest:
    model: str
    texts: tuple[str, ...]
    dimensions: int | None = None
    base64: bool = False


@value
class Usage:
    """Token counts as OpenAI adds them: completion holds reasoning, prompt holds cached."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        prompt, completion = self.prompt + other.prompt, self.completion + other.completion
        return Usage(
            prompt, completion, self.cached + other.cached, self.reasoning + other.reasoning
        )


@value
class Started:
    """The model has begun to answer; `usage` is what Gemini counted by then."""

    usage: Usage = Usage()


@value
class PartStart:
    choice: int
    part: Part


@value
class TextDelta:
    choice: int
    text: str


@value
class ThinkingDelta:
    choice: int
    text: str


@value
class ArgumentsDelta:
    choice: int
    text: str


@value
class Annotated:
    """The sources of a choice's whole text and what was searched for, all at once, before it is finished."""

    choice: int
    citations: tuple[Citation, ...]
    searches: tuple[str, ...] = ()


@value
class PartEnd:
    """Repeats the part whole, so that no renderer remembers text."""

    choice: int
    part: Part


@value
class Finished:
    choice: int
    reason: FinishReason
    logprobs: tuple[
        Mapping[str, Any], ...
    ] = ()  # of each token: token, logprob and alternatives, where given


@value
class Ended:
    usage: Usage


@value
class Failed:
    error: GatewayError


Delta = TextDelta | ThinkingDelta | ArgumentsDelta
Event = Started | PartStart | Delta | Annotated | PartEnd | Finished | Ended | Failed


@dataclass(slots=True)
class Choice:
    parts: list[Part] = field(default_factory=list)
    reason: FinishReason = "stop"
    logprobs: tuple[Mapping[str, Any], ...] = ()
    citations: tuple[Citation, ...] = ()
    searches: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(slots=True)
class Reply:
    """A whole answer: what `collect` makes of its events."""

    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    usage: Usage = field(default_factory=Usage)


def collect(events: Iterable[Event]) -> Reply:
    """The whole answer. Raises the GatewayError of a Failed event."""
    reply = Reply()
    for event in events:
        if isinstance(event, PartEnd):
            reply.choices[event.choice].parts.append(event.part)
        elif isinstance(event, Finished):
            made = reply.choices[event.choice]
            made.reason, made.logprobs = event.reason, event.logprobs
        elif isinstance(event, Annotated):
            made = reply.choices[event.choice]
            made.citations, made.searches = event.citations, event.searches
        elif isinstance(event, Ended):
            reply.usage = event.usage
        elif isinstance(event, Failed):
            raise event.error
    return reply


# ==============================================================================
# 4. Config
# ==============================================================================

QUOTAS = ("requests_per_minute", "tokens_per_minute", "requests_per_day", "tokens_per_day")
STRATEGIES = ("affinity", "round_robin", "fill_first")
GEMINI_URL = "https://generativelanguage.googleapis.com"
# A region's Vertex has a host of its own. Source: https://cloud.google.com/vertex-ai/docs/reference/rest
VERTEX_URL = "https://{}aiplatform.googleapis.com"
CLOUDCODE_URL = "https://cloudcode-pa.googleapis.com"
TOKEN_URL = "https://oauth2.googleapis.com/token"
Read = Callable[[Path], str]  # the text of a credentials file; raises OSError or UnicodeDecodeError


class ConfigError(Exception):
    """What the accounts file, a flag or the environment says cannot be used: one line a problem, with the remedy."""


@dataclass(slots=True)
class ConfigFile:
    """The YAML nodes of one accounts file. What is wrong is collected with its line, so that all of it is told at once."""

    source: str
    env: Mapping[str, str]
    read: Read
    problems: list[str] = field(default_factory=list)

    def note(self, node: Any, problem: str) -> None:
        self.problems.append(f"{self.source}:{node.start_mark.line + 1}: {problem}")

    def value(self, kind: Kind, node: Any, where: str) -> Any:
        """The value of a node; None where a problem was noted."""
        try:
            return kind(self, node, where)
        except ValueError as error:
            return self.note(node, f"'{where}' {error}")

    def section(self, node: Any, path: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """The values given in a mapping, each read by its kind; null is as if the key were not there."""
        values: dict[str, Any] = {}
        if node is None or node.tag == YAML_NULL:
            return values
        if node.tag != YAML_MAP:
            self.note(
                node,
                f"{path or 'the file'} must hold 'key: value' lines (keys: {', '.join(kinds)}).",
            )
            return values
        for key, value in node.value:
            if not isinstance(key.value, str):
                self.note(key, "a key must be a word.")
                continue
            where = f"{path}.{key.value}".lstrip(".")
            if key.value not in kinds:
                self.note(key, f"unknown key '{key.value}' {nearest(key.value, kinds)}")
            elif key.value in values:
                self.note(key, f"'{where}' stands here twice; remove one.")
            elif (
                value.tag != YAML_NULL
                and (read := self.value(kinds[key.value], value, where)) is not None
            ):
                values[key.value] = read
        return values


Kind = Callable[[ConfigFile, Any, str], Any]
"""Reads one YAML node. Raises ValueError with the end of the sentence that begins with the key."""
YAML_NULL, YAML_MAP, YAML_LIST = (f"tag:yaml.org,2002:{tag}" for tag in ("null", "map", "seq"))


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or all of them, as a hint in brackets."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"({near[0]}?)" if near else f"(known: {', '.join(known)})"


def read_text(file: ConfigFile, node: Any, where: str) -> str:
    if not isinstance(node.value, str) or not node.value or not node.value.isprintable():
        raise ValueError("must be a text without control characters.")
    return node.value


def read_secret(file: ConfigFile, node: Any, where: str) -> str:
    """A text, or by `${NAME}` or `env:NAME` the value of an environment variable."""
    value = read_text(file, node, where)
    if not (match := re.fullmatch(r"\$\{(\w+)\}|env:(\w+)", value)):
        return value
    name = match[1] or match[2]
    found = file.env.get(name, "").strip()
    if not found:
        raise ValueError(
            f"needs the environment variable {name}, which is not set. Export it first."
        )
    if not found.isprintable():
        raise ValueError(f"is read from {name}, which holds control characters. Export it anew.")
    return found


def read_flag(file: ConfigFile, node: Any, where: str) -> bool:
    value = read_text(file, node, where).lower()
    if value not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError("must be true or false.")
    return value in ("true", "yes", "on")


def read_path(file: ConfigFile, node: Any, where: str) -> str:
    """A file, from where the accounts file stands; ~ is the user's home."""
    value = re.sub(r"^~(?=/)", file.env.get("HOME", "~"), read_secret(file, node, where))
    return str(Path(file.source).parent / value)


def read_number(low: float, high: float, kind: type[int | float] = float) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> float:
        with contextlib.suppress(TypeError, ValueError):
            if low <= (value := kind(node.value)) <= high:
                return value
        raise ValueError(f"must be a {'whole ' * (kind is int)}number from {low} to {high}.")

    return read


def read_word(*words: str) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> str:
        if node.value not in words:
            raise ValueError(f"must be one of {', '.join(words)}.")
        return str(node.value)

    return read


def read_texts(file: ConfigFile, node: Any, where: str) -> tuple[str, ...]:
    nodes = node.value if node.tag == YAML_LIST else [node]
    return tuple(read_text(file, item, where) for item in nodes)


def read_words(*words: str) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> tuple[str, ...]:
        found = tuple(text.upper() for text in read_texts(file, node, where))
        if not found or not set(found) <= set(words):
            raise ValueError(f"must be some of {', '.join(words)}.")
        return found

    return read


def read_range(file: ConfigFile, node: Any, where: str) -> tuple[int, int]:
    ends = read_texts(file, node, where)
    if (
        len(ends) != 2
        or not all(re.fullmatch(r"\d{1,9}", end) for end in ends)
        or int(ends[0]) > int(ends[1])
    ):
        raise ValueError("must be two whole numbers, [least, most].")
    return int(ends[0]), int(ends[1])


def read_url(file: ConfigFile, node: Any, where: str) -> str:
    value = read_secret(file, node, where).rstrip("/")
    labels = host_of(value).split(".")
    if not re.fullmatch(r"https?://\S+", value) or not all(0 < len(label) < 64 for label in labels):
        raise ValueError("must be a URL that begins with http:// or https://.")
    return value


def read_hosts(file: ConfigFile, node: Any, where: str) -> tuple[str, ...]:
    """Host names as they are compared with those of URLs: without port, brackets and capitals."""
    given = read_texts(file, node, where)
    hosts = tuple(
        host_of(f"//[{host}]" if host.count(":") > 1 and host[0] != "[" else f"//{host}")
        for host in given
    )
    if not all(hosts) or any(re.search(r"[/*\s]", host) for host in given):
        raise ValueError("must be host names without scheme and *, such as box.lan.")
    return hosts


def read_origins(file: ConfigFile, node: Any, where: str) -> tuple[str, ...]:
    origins = tuple(origin.rstrip("/").lower() for origin in read_texts(file, node, where))
    if not all(re.fullmatch(r"null|[a-z][\w+.-]*://[^/*\s]+", origin) for origin in origins):
        raise ValueError(
            "must be origins with a scheme and without *, such as https://chat.example.com."
        )
    return origins


def read_store(file: ConfigFile, node: Any, where: str) -> str:
    """Where responses are kept: `memory`, `off`, or a file; a bare word is more likely a slip than a file's name."""
    value = read_text(file, node, where)
    if value not in ("memory", "off") and not re.search(r"[/\\]", value):
        raise ValueError("must be memory, off or the path of a file, such as ~/agproxy.sqlite3.")
    return value


def read_map(kind: Kind) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> dict[str, Any]:
        names = (
            [key.value for key, _ in node.value if isinstance(key.value, str)]
            if node.tag == YAML_MAP
            else ["NAME"]
        )
        return file.section(node, where, dict.fromkeys(names, kind))

    return read


def read_section(kinds: Mapping[str, Kind], make: Callable[..., Any] = dict) -> Kind:
    return lambda file, node, where: make(**file.section(node, where, kinds))


def setting(read: Kind, **more: Any) -> Any:
    """A field that the accounts file may give under its name, and how it is read there."""
    return field(metadata={"read": read}, **more)


def keys_of(kind: type[Any]) -> dict[str, Kind]:
    return {one.name: one.metadata["read"] for one in fields_of(kind) if one.metadata}


read_seconds = read_number(0.001, 86400)
# By model or pattern, and by quota, what a project may be asked.
read_limits = read_map(read_section(dict.fromkeys(QUOTAS, read_number(1, 1 << 40, int))))


@value
class Account:
    name: str
    api_key: str = setting(read_secret, default="", repr=False)
    base_url: str = setting(read_url, default=GEMINI_URL)
    kind: str = setting(read_word("gemini", "vertex", "cloudcode"), default="gemini")
    email: str | None = setting(read_text, default=None)
    weight: float = setting(
        read_number(0.01, 1000), default=1.0
    )  # by how much more it is asked than one of weight 1
    max_concurrency: int | None = setting(read_number(1, 100000, int), default=None)
    quota_group: str | None = setting(
        read_text, default=None
    )  # accounts of one Google project share its quota
    limits: Mapping[str, Mapping[str, int]] = setting(read_limits, default_factory=dict)
    proxy: str | None = setting(read_url, default=None, repr=False)
    credentials: str = setting(
        read_path, default=""
    )  # holds the tokens; `agproxy login` makes it if none is named
    client_id: str = setting(read_secret, default="")
    client_secret: str = setting(read_secret, default="", repr=False)
    refresh_token: str = setting(read_secret, default="", repr=False)
    service_account: str = field(default="", repr=False)  # the JSON of a service account's file
    token_url: str = setting(read_url, default=TOKEN_URL)
    project: str = setting(read_secret, default="")
    location: str = setting(read_text, default="global")


ACCOUNT_KEYS = {"name": read_text, "enabled": read_flag, **keys_of(Account)}
USER_KEYS = ("client_id", "client_secret", "refresh_token")
OAUTH_KEYS = ("credentials", *USER_KEYS, "token_url", "project", "location")


@value
class ClientKey:
    """A key that lets a client in, and the name by which the log knows that client."""

    name: str = setting(read_text)
    key: str = setting(read_secret, repr=False)


def secrets_of(owner: Any) -> list[str]:
    """What of an account or a client's key is shown to nobody."""
    return [getattr(owner, one.name) or "" for one in fields_of(owner) if not one.repr]


def read_keys(file: ConfigFile, node: Any, where: str) -> tuple[ClientKey, ...]:
    """One key, or a list of `{name, key}`."""
    if node.tag != YAML_LIST:
        return (ClientKey("client", read_secret(file, node, where)),)
    keys = keys_of(ClientKey)
    found = [file.section(item, f"{where}[{i}]", keys) for i, item in enumerate(node.value)]
    if not all(len(one) == len(keys) for one in found):
        raise ValueError("must be one key, or a list of entries with a `name` and a `key` each.")
    return tuple(ClientKey(**one) for one in found)


@value
class Timeouts:
    connect_s: float = setting(read_seconds, default=10.0)
    first_event_s: float = setting(read_seconds, default=300.0)
    idle_s: float = setting(read_seconds, default=300.0)
    total_s: float | None = setting(read_seconds, default=None)  # None: as long as it takes
    stall_s: float = setting(read_seconds, default=120.0)


@value
class Config:
    accounts: tuple[Account, ...]
    host: str | None = setting(read_text, default=None)
    port: int = setting(read_number(0, 65535, int), default=8045)
    auth_mode: str = setting(
        read_word("off", "strict", "all_except_health", "auto"), default="auto"
    )
    api_key: tuple[ClientKey, ...] = setting(read_keys, default=())
    allow_lan_access: bool = setting(read_flag, default=False)
    allowed_hosts: tuple[str, ...] = setting(read_hosts, default=())
    cors_origins: tuple[str, ...] = setting(read_origins, default=())
    show_account: str = setting(read_word("full", "masked", "off"), default="masked")
    upstream_proxy: str | None = setting(read_url, default=None, repr=False)
    strict: bool = setting(read_flag, default=False)
    strategy: str = setting(read_word(*STRATEGIES), default="affinity")
    max_wait_s: float = setting(read_number(0, 3600), default=10.0)
    reserve: float = setting(
        read_number(0, 0.9), default=0.0
    )  # share of each limit left alone while others can answer
    store: str | None = setting(read_store, default=None)
    fetch_media: bool = setting(read_flag, default=True)
    media_hosts: tuple[str, ...] = setting(read_hosts, default=())
    images_in_text: bool = setting(read_flag, default=False)
    timeouts: Timeouts = setting(read_section(keys_of(Timeouts), Timeouts), default=Timeouts())
    heartbeat_s: float = setting(read_number(0, 3600), default=15.0)
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    traits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    demo: bool = False

    @property
    def auth(self) -> str:
        """The effective mode: `auto` asks for a key exactly where the LAN can reach the gateway."""
        fitting = "all_except_health" if self.allow_lan_access else "off"
        return fitting if self.auth_mode == "auto" else self.auth_mode

    @property
    def bind(self) -> str:
        """The address to listen on; one of IPv6 may be given in brackets, as URLs have it."""
        return (
            (self.host or ("0.0.0.0" if self.allow_lan_access else "127.0.0.1")).strip("[]").lower()
        )

    @property
    def base_url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"


def read_accounts(file: ConfigFile, node: Any, where: str) -> tuple[Account, ...]:
    if node.tag != YAML_LIST:
        raise ValueError("must be a list: each account begins with '- name: ...'.")
    accounts: dict[str, Account] = {}
    for i, item in enumerate(node.value):
        if account := file.value(read_account, item, f"{where}[{i}]"):
            if account.name in accounts:
                file.note(
                    item, f"two accounts are named '{account.name}'; give each its own `name`."
                )
            accounts[account.name] = account
    return tuple(accounts.values())


def read_account(file: ConfigFile, node: Any, where: str) -> Account | None:
    """The account; None where it is disabled or a problem was noted."""
    known = len(file.problems)
    given = file.section(node, where, ACCOUNT_KEYS)
    if not given.pop("enabled", True):
        del file.problems[known:]  # its variables need not be set
        return None
    if len(file.problems) > known:
        return None
    if not given.setdefault("name", given.get("email")):
        raise ValueError("needs a `name` or an `email`.")
    kind = given.setdefault("kind", "gemini")
    if strange := [
        key for key in given if key in (OAUTH_KEYS if kind == "gemini" else ("api_key",))
    ]:
        raise ValueError(
            f"is of kind {kind}, which has no use for `{strange[0]}`. Remove it, or name another kind."
        )
    if kind != "gemini":
        add_login(file, given, kind)
    elif "api_key" not in given:
        raise ValueError("needs an `api_key`.")
    return Account(**given)


def add_login(file: ConfigFile, given: dict[str, Any], kind: str) -> None:
    """Fills in what the kind of the account implies and what its credentials file holds. Raises ValueError."""
    if kind == "vertex" and not given.get("project"):
        raise ValueError("needs a `project`.")
    region = given.get("location", "global")
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise ValueError(
            f"has the location '{region}'. Use a region's name such as europe-west1, or global."
        )
    vertex = VERTEX_URL.format("" if region == "global" else f"{region}-")
    given.setdefault("base_url", vertex if kind == "vertex" else CLOUDCODE_URL)
    named = "credentials" in given
    if not named and not (given.get("client_id") and given.get("client_secret")):
        client = "the `client_id` and `client_secret` of an OAuth client of yours"
        raise ValueError(f"needs `credentials: FILE`, or {client}.")
    if not named and not given.get("refresh_token"):
        word = re.sub(r"[^\w.@-]", "_", given["name"])
        given["credentials"] = str(Path(file.source).parent / f"{word}.token.json")
    try:
        if "credentials" in given:
            read_credentials(file.read(Path(given["credentials"])), given)
    except (OSError, UnicodeDecodeError):
        if named:
            raise ValueError(
                f"names {given['credentials']}, which cannot be read. Check `credentials`."
            ) from None


def read_credentials(text: str, given: dict[str, Any]) -> None:
    """Takes over what stands in a file as gcloud, the console or `agproxy login` write it. Raises ValueError."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    texts = (
        {key: value for key, value in found.items() if isinstance(value, str)}
        if isinstance(found, dict)
        else {}
    )
    if texts.get("type") == "service_account" and texts.keys() >= {"client_email", "private_key"}:
        given["service_account"] = text
        given.setdefault("token_url", texts.get("token_uri", TOKEN_URL))
    elif texts.keys() >= set(USER_KEYS):
        given |= {key: given.get(key) or texts[key] for key in USER_KEYS}
    else:
        name = given["credentials"]
        raise ValueError(
            f"has {name}, which is no authorized_user and no service_account file. Make it anew."
        )


TRAIT_KEYS: Mapping[str, Kind] = {
    **{name.name: read_flag for name in fields_of(Traits) if name.type == "bool"},
    "thinking": read_word("none", "budget", "level"),
    "levels": read_words(*(effort.upper() for effort in EFFORTS)),
    "answers": read_words("TEXT", "IMAGE", "AUDIO"),
    "budget": read_range,
    "output_tokens_max": read_number(1, 1 << 30, int),
}
MODELS_KEYS: Mapping[str, Kind] = {
    "default": read_text,
    "map": read_map(read_text),
    "fallback": read_map(read_texts),
    "traits": read_map(read_section(TRAIT_KEYS)),
}
SECTIONS: Mapping[str, Kind] = {
    "proxy": read_section(keys_of(Config)),
    "models": read_section(MODELS_KEYS),
    "accounts": read_accounts,
}


def load_config(
    text: str, source: str, env: Mapping[str, str], read: Read, *, accounts: bool = True
) -> Config:
    """The accounts file as a Config. Raises ConfigError with a line `file:line: what` for each problem.

    Without `accounts` that section is not read, so that its keys need not be there.
    """
    import yaml

    file = ConfigFile(source, env, read)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise ConfigError(
            f"{source}:{line + 1}: not valid YAML ({problem}). Mend this line."
        ) from None
    except (
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # a character beyond Unicode; no end of brackets
        raise ConfigError(f"{source}: not valid YAML ({error}). Write it anew.") from None
    given = file.section(
        node, "", SECTIONS if accounts else {**SECTIONS, "accounts": lambda *_: ()}
    )
    proxy, models = given.get("proxy", {}), given.get("models", {})
    renamed = {"default": "default_model", "map": "aliases"}
    chosen = {renamed.get(key, key): value for key, value in models.items()}
    config = Config(given.get("accounts", ()), **proxy, **chosen)
    problems = [*file.problems, *(f"{source}: {problem}" for problem in config_problems(config))]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def config_problems(config: Config) -> list[str]:
    """What cannot be right or safe in values that are each right on their own."""
    if config.allow_lan_access or is_loopback(config.bind):
        return []
    return [
        f"host {config.bind} is reachable from outside; set proxy.allow_lan_access: true to allow it."
    ]


@functools.lru_cache(256)
def host_of(url: str) -> str:
    """The host of a URL in lower case, without a final dot; nothing where it is malformed."""
    try:
        parts = urlsplit(url)
        return (
            (parts.hostname or "").removesuffix(".")
            if parts.port is None or parts.port >= 0
            else ""
        )
    except ValueError:
        return ""


@functools.lru_cache(256)
def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ip_address(host.strip("[]")).is_loopback)


def is_public(host: str) -> bool:
    """Whether an address belongs to the internet; one that carries another inside counts as that one."""
    address = ip_address(host.strip("[]").partition("%")[0])
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in ip_network("64:ff9b::/96"):  # NAT64
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    given_out = isinstance(address, IPv4Address) or address in ip_network(
        "2000::/3"
    )  # of IPv6 nothing else is
    return given_out and address.is_global and not address.is_multicast


def is_address(host: str) -> bool:
    try:
        return bool(ip_address(host.strip("[]")))
    except ValueError:
        return False


# ==============================================================================
# 5. Doors
# ==============================================================================

STOPS_MAX = 5  # of Gemini
CHOICES_MAX = 128
MODEL_CHARS_MAX = 512
CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
# Source: https://ai.google.dev/gemini-api/docs/image-understanding, .../audio, .../video-understanding, .../document-processing
MEDIA_TYPES = re.compile(
    r"(?a)image/(png|jpeg|webp|heic|heif|gif|avif)|(audio|video|text)/[\w.+-]+|application/pdf"
)
MEDIA_ALIASES = {"image/jpg": "image/jpeg", "audio/x-wav": "audio/wav"} | dict.fromkeys(
    ("application/json", "application/xml", "application/javascript", "application/x-yaml"),
    "text/plain",
)
AUDIO_FORMATS = ("wav", "mp3", "mpeg", "aac", "aiff", "flac", "ogg")
FILE_TYPES = {
    **dict.fromkeys(("", "pdf"), "application/pdf"),
    **dict.fromkeys(("txt", "md", "py", "json"), "text/plain"),
    **dict.fromkeys(("jpg", "jpeg"), "image/jpeg"),
    **{name: f"text/{name}" for name in ("csv", "html", "xml")},
} | {
    "png": "image/png",
    "webp": "image/webp",
    "mp3": "audio/mp3",
    "wav": "audio/wav",
    "mp4": "video/mp4",
}
# What becomes of each field of a body: carried over, known to have no effect here, or lost.
Fates = Mapping[str, tuple[Literal["mapped", "ignored", "dropped"], str]]
SAMPLING_FIELDS: Fates = {
    "model": ("mapped", "the model in the URL"),
    "temperature": ("mapped", "generationConfig.temperature"),
    "top_p": ("mapped", "generationConfig.topP"),
    "presence_penalty": ("mapped", "generationConfig.presencePenalty"),
    "frequency_penalty": ("mapped", "generationConfig.frequencyPenalty"),
    "seed": ("mapped", "generationConfig.seed"),
    "stop": ("mapped", "generationConfig.stopSequences"),
    "n": ("mapped", "as many upstream calls"),
    "logprobs": ("mapped", "generationConfig.responseLogprobs"),
    "top_logprobs": ("mapped", "generationConfig.logprobs, as far as logprobs are"),
    "stream": ("mapped", "streamGenerateContent"),
    "stream_options": ("mapped", "the usage chunk"),
    "max_tokens": (
        "mapped",
        "generationConfig.maxOutputTokens, where max_completion_tokens is not there",
    ),
    "logit_bias": ("dropped", "Gemini has no bias by token"),
    "user": ("ignored", "who asks has no effect on the answer"),
    "service_tier": ("ignored", "there is one tier"),
    **dict.fromkeys(
        ("metadata", "store", "safety_identifier"), ("ignored", "no effect on the answer")
    ),
    "prompt_cache_key": ("ignored", "Gemini caches prompts by itself"),
    "prompt_cache_retention": ("ignored", "Gemini caches prompts by itself"),
    "prompt_cache_options": ("ignored", "Gemini caches prompts by itself"),
    **dict.fromkeys(("extra_body", "google"), ("mapped", "google.thinking_config")),
}
TOOL_FIELDS: Fates = {
    "tools": ("mapped", "tools[0].functionDeclarations"),
    "tool_choice": ("mapped", "toolConfig.functionCallingConfig"),
    "parallel_tool_calls": ("mapped", "further calls are left out of the answer"),
    "moderation": ("ignored", "Gemini has filters of its own"),
}
# Fields that nothing reads are of the right type all the same.
UNREAD_FIELDS: Mapping[str, tuple[Collection[type], str]] = {
    **dict.fromkeys(
        ("logit_bias", "metadata", "prompt_cache_options", "moderation"), ((dict,), "an object")
    ),
    **dict.fromkeys(("prediction", "client_metadata"), ((dict,), "an object")),
    **dict.fromkeys(
        ("user", "service_tier", "safety_identifier", "truncation", "verbosity"),
        ((str,), "a string"),
    ),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), ((str,), "a string")),
    **dict.fromkeys(("include", "context_management"), ((list,), "an array")),
    **dict.fromkeys(("best_of", "max_tool_calls"), ((int,), "a whole number")),
    **dict.fromkeys(("store", "echo"), ((bool,), "true or false")),
}
# Tools that OpenAI itself would run; Codex sends web_search with every request.
HOSTED = "web_search|file_search|code_interpreter|image_generation|computer|local_shell|shell|apply_patch|tool_search"
HOSTED_TOOLS = re.compile(rf"{HOSTED}|web_search\w+|computer\w+|mcp|programmatic_tool_calling")
WEB_SEARCH = re.compile(r"web_search\w*")
# Responses input items that only such a tool makes; in a replayed history they are passed over.
HOSTED_ITEMS = re.compile(
    rf"({HOSTED})_(call|call_output|output)|mcp_\w+|program\w*|(context_)?compaction"
)


class Fields:
    """One JSON object of a body. Null means absent; a wrong type is a BadRequest with the field's path."""

    def __init__(self, value: Any, path: str = "", changes: list[Change] | None = None) -> None:
        if not isinstance(value, dict):
            what = f"'{path}'" if path else "The body"
            raise BadRequest(
                f"{what} is not a JSON object. Send {{...}}.",
                code="invalid_type",
                param=path or None,
            )
        self.value = value
        self.path = path
        self.changes: list[Change] = (
            [] if changes is None else changes
        )  # one list for the whole body

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def change(self, key: str, kind: ChangeKind, reason: str) -> None:
        self.changes.append(Change(pointer_of(self.at(key)), kind, reason))

    def get(self, key: str, kinds: Collection[type], word: str) -> Any:
        value = self.value.get(key)
        if value is None or value.__class__ in kinds:
            return value
        raise self.wrong(key, "has the wrong type", f"Send {word}", "invalid_type")

    def text(self, key: str) -> str | None:
        value: str | None = self.value.get(key)
        return (
            value if value is None or value.__class__ is str else self.get(key, (str,), "a string")
        )

    def needed_text(self, key: str) -> str:
        return self.text(key) or self.missing(key)

    def model(self) -> str:
        """The model's name: it is looked up, logged, and sent on in a URL and in headers."""
        name = self.needed_text("model")
        if len(name) > MODEL_CHARS_MAX:
            raise self.wrong(
                "model", f"has {len(name)} characters", f"Send at most {MODEL_CHARS_MAX}"
            )
        return name

    def missing(self, key: str) -> NoReturn:
        raise self.wrong(key, "is missing", "Add it", "missing_required_parameter")

    def wrong(self, key: str, what: str, remedy: str, code: str = "invalid_value") -> BadRequest:
        """The refusal of a field: what is wrong with it, and what to do."""
        what = what if len(what) <= ERROR_CHARS_MAX else f"{what[:ERROR_CHARS_MAX]}…"
        return BadRequest(f"'{self.at(key)}' {what}. {remedy}.", code=code, param=self.at(key))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, (bool,), "true or false") if key in self.value else None
        return default if value is None else bool(value)

    def number(self, key: str, low: float, high: float) -> float | None:
        value: float | None = self.get(key, (int, float), "a number") if key in self.value else None
        if value is not None and not low <= value <= high:
            code = "decimal_below_min_value" if value < low else "decimal_above_max_value"
            raise self.wrong(key, f"is {value}", f"Send a number from {low} to {high}", code)
        return value

    def count(self, key: str, high: float = math.inf, low: int = 1) -> int | None:
        value: int | None = self.get(key, (int,), "a whole number") if key in self.value else None
        if value is not None and not low <= value <= high:
            code = "integer_below_min_value" if value < low else "integer_above_max_value"
            limits = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise self.wrong(key, f"is {value}", f"Send a whole number, {limits}", code)
        return value

    def object(self, key: str) -> Fields | None:
        value = self.get(key, (dict,), "an object") if key in self.value else None
        return None if value is None else Fields(value, self.at(key), self.changes)

    def objects(self, key: str) -> list[Fields]:
        items, path = self.get(key, (list,), "an array") or (), self.at(key)
        return [Fields(item, f"{path}[{i}]", self.changes) for i, item in enumerate(items)]


SYSTEM_ROLES = ("system", "developer")


def with_changes(request: Request, fields: Fields, table: Fates) -> Request:
    """The request, with what its body holds that cannot be served. Raises BadRequest for a wrong type."""
    for key, value in fields.value.items():
        fate, reason = table.get(key, ("dropped", "unknown field"))
        if key in UNREAD_FIELDS and key in table:
            fields.get(key, *UNREAD_FIELDS[key])
        if fate == "dropped" and value is not False and value not in (None, [], {}):
            fields.changes.append(Change(f"/{escaped(key)}", "dropped", reason))
    return replace(request, changes=tuple(fields.changes)) if fields.changes else request


def explain_fields(
    body: Mapping[str, Any], table: Fates, changes: Iterable[Change]
) -> dict[str, str]:
    """What becomes of each field of a body, and of each place inside one that was changed, by JSON pointer."""
    told: dict[str, str] = {}
    for change in changes:
        before = f"{told[change.pointer]}; " if change.pointer in told else f"{change.kind}: "
        told[change.pointer] = before + change.reason
    fields = {
        f"/{escaped(key)}": ": ".join(table.get(key, ("dropped", "unknown field"))) for key in body
    }
    absent = {
        f"/{escaped(key)}": "ignored: null is as if it were not there"
        for key in body
        if body[key] is None
    }
    return fields | absent | told


def parse_sampling(fields: Fields) -> dict[str, Any]:
    """The fields that chat, completions and Responses share."""
    stream_options = fields.object("stream_options")
    return {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "seed": parse_seed(fields),
        "stop": parse_stop(fields),
        "n": fields.count("n", CHOICES_MAX) or 1,
        "stream": fields.flag("stream"),
        "include_usage": bool(stream_options and stream_options.flag("include_usage")),
    }


def parse_seed(fields: Fields) -> int | None:
    """The seed; Gemini's has 32 bits."""
    seed: int | None = fields.get("seed", (int,), "a whole number")
    if seed is not None and seed != seed & 0x7FFFFFFF:
        fields.change("seed", "clamped", "its lower 31 bits are sent")
    return None if seed is None else seed & 0x7FFFFFFF


def parse_thinking(fields: Fields, effort: str | None, source: str, *, show: bool) -> ThinkingWish:
    """The wish for thinking: an effort, or Google's own thinking_config, which its SDK users send in `extra_body`."""
    extra = fields.object("extra_body")
    google = (extra or fields).object("google")
    config = google.object("thinking_config") if google else None
    for inner, read in ((extra, "google"), (google, "thinking_config")):
        for key in inner.value if inner else ():
            if key != read and inner:
                inner.change(key, "dropped", "unknown field")
    if config is None:
        return ThinkingWish(effort=effort, show=show, source=source)
    effort = config.text("thinking_level") or effort
    budget = config.get("thinking_budget", (int,), "a whole number")
    return ThinkingWish(
        effort, budget, config.flag("include_thoughts", default=show), pointer_of(config.path)
    )


def parse_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.value.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.wrong(
            "stop", "has the wrong type", "Send a string or an array of strings", "invalid_type"
        )
    stops = [stop for stop in stops if stop]
    if len(stops) > STOPS_MAX:  # Continue sends more than OpenAI's 4 to hosts that it does not know
        fields.change("stop", "dropped", f"only the first {STOPS_MAX} are sent")
    return tuple(stops[:STOPS_MAX])


def parse_format(form: Fields | None, *, nested: bool) -> JsonFormat | None:
    """`response_format` of chat, where the schema is nested, or `text.format` of Responses, where it is not."""
    kind = form and form.text("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return JsonFormat(None)
    if kind == "json_schema":
        spec = (form.object("json_schema") or form.missing("json_schema")) if nested else form
        return JsonFormat(spec.get("schema", (dict,), "an object"))
    raise form.wrong(
        "type", f"is '{kind}', which is not served", "Send text, json_object or json_schema"
    )


def parse_tools(fields: Fields, *, hosted: bool = True) -> tuple[Tool, ...]:
    """The declared tools, each name once: chat's and Responses' forms, and chat's old `functions`.

    `hosted` tells whether tools that OpenAI would run itself are passed over; a web search always is taken.
    """
    if fields.value.get("tools") is None and fields.value.get("functions") is None:
        return ()
    declared = [tool for entry in fields.objects("tools") for tool in parse_tool(entry, hosted)]
    return each_once(
        fields, [*declared, *(parse_function(entry) for entry in fields.objects("functions"))]
    )


def each_once(fields: Fields, tools: Iterable[Tool]) -> tuple[Tool, ...]:
    """The first tool of each name; Gemini refuses a second one."""
    known: dict[tuple[str | None, str], Tool] = {}
    for tool in tools:
        if known.setdefault(
            (tool.namespace, tool.name), tool
        ) is not tool and not tool.source.startswith("past["):
            pointer = pointer_of(tool.source)
            fields.changes.append(
                Change(pointer, "dropped", f"the tool '{tool.name}' is declared twice")
            )
    return tuple(known.values())


def parse_tool(entry: Fields, hosted: bool) -> list[Tool]:
    """One entry of `tools`, nested as chat has it or flat as Responses has it; a namespace holds several."""
    kind = entry.text("type") or "function"
    if kind in ("function", "custom"):
        kind = "function" if "input_schema" in entry.value else kind
        inner = entry.object(kind) or entry
        return [parse_custom(entry, inner) if kind == "custom" else parse_function(inner)]
    if kind == "namespace":
        name = entry.needed_text("name")
        return [
            replace(tool, namespace=name)
            for one in entry.objects("tools")
            for tool in parse_tool(one, hosted)
        ]
    if not (HOSTED_TOOLS if hosted else WEB_SEARCH).fullmatch(kind):
        raise entry.wrong(
            "type", f"is '{kind}', which is not served", "Send function, custom or namespace"
        )
    if not kind.startswith("web_search"):
        entry.change("type", "dropped", f"the hosted tool '{kind}' has no counterpart")
    return []


def parse_function(inner: Fields) -> Tool:
    key = "input_schema" if "input_schema" in inner.value else "parameters"
    schema, description = inner.get(key, (dict,), "an object"), inner.text("description") or ""
    return Tool(inner.needed_text("name"), description, schema, source=inner.path, schema_key=key)


def parse_custom(entry: Fields, inner: Fields) -> Tool:
    """A tool that takes free text: declared as a function of one string, its grammar told in the description."""
    form = inner.object("format")
    grammar = (form.object("grammar") or form).text("definition") if form else None
    description = inner.text("description") or ""
    if grammar:
        description += f"\nThe input must follow this grammar:\n{grammar}"
    entry.change("type", "emulated", "free text is asked for as a function of one string")
    return Tool(
        inner.needed_text("name"), description, CUSTOM_PARAMETERS, custom=True, source=inner.path
    )


def search_source(fields: Fields) -> dict[str, str]:
    """Where a web search is asked for, if it is: as a hosted tool, or by chat's own field."""
    asked = fields.object("web_search_options") is not None
    for i, tool in enumerate(fields.get("tools", (list,), "an array") or ()):
        if isinstance(tool, dict) and WEB_SEARCH.fullmatch(str(tool.get("type"))):
            return {"search": f"/tools/{i}"}
    return {"search": "/web_search_options"} if asked else {}


def parse_tool_choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    key = "tool_choice" if fields.value.get("tool_choice") is not None else "function_call"
    value = fields.get(key, (str, dict), "a string or an object")
    if isinstance(value, dict) and value.get("type") in (
        "auto",
        "any",
        "none",
    ):  # Anthropic's form, as in parse_block
        value = "required" if value["type"] == "any" else value["type"]
    if not tools or value is None or value == "auto":
        return ToolChoice()
    if value in ("none", "required"):
        return ToolChoice(value)
    if isinstance(value, str):
        raise fields.wrong(
            key, f"is '{value}'", "Send none, auto, required or an object that names one of 'tools'"
        )
    choice = Fields(value, key, fields.changes)
    kind = choice.text("type") or "function"
    if HOSTED_TOOLS.fullmatch(kind):
        choice.change("type", "dropped", f"the hosted tool '{kind}' cannot be forced")
        return ToolChoice()
    if kind not in ("function", "custom", "tool", "allowed_tools"):
        raise choice.wrong(
            "type", f"is '{kind}', which is not served", "Send function, custom or allowed_tools"
        )
    spec = choice.object(kind) or choice
    listed = spec.objects("tools") if kind == "allowed_tools" else [spec]
    named = [one for one in listed if not HOSTED_TOOLS.fullmatch(str(one.value.get("type")))]
    if len(named) < len(listed):
        spec.change("tools", "dropped", "a hosted tool cannot be chosen")
        if not named:
            return ToolChoice("none")
    names = [(one.object("function") or one.object("custom") or one).text("name") for one in named]
    if not names or not set(names) <= {tool.name for tool in tools}:
        raise fields.wrong(key, "names no declared function", "Name one of 'tools'")
    mode: Any = spec.text("mode") or "auto" if kind == "allowed_tools" else "required"
    if mode not in ("auto", "required"):
        raise spec.wrong("mode", f"is '{mode}'", "Send auto or required")
    return ToolChoice(mode, frozenset(map(str, names)))


def parse_message(message: Fields) -> Message:
    role = message.text("role")
    if role == "user":
        if message.value.get("content") is None:
            message.missing("content")
        return Message("user", tuple(parse_content(message, parse_block)))
    if role == "assistant":
        calls = [parse_call(call) for call in message.objects("tool_calls")]
        if legacy := message.object("function_call"):
            name = legacy.needed_text("name")
            calls.append(ToolCall(f"call_{name}", name, legacy.text("arguments") or ""))
        return Message("assistant", (*parse_said(message), *calls))
    if role in ("tool", "function"):
        id = (
            message.needed_text("tool_call_id")
            if role == "tool"
            else f"call_{message.needed_text('name')}"
        )
        return Message("tool", (ToolResult(id, tuple(parse_content(message, parse_part))),))
    raise message.wrong("role", f"is '{role}'", "Send system, developer, user, assistant or tool")


def texts_of(message: Fields, key: str = "content") -> list[str]:
    """The words of an instruction; Gemini takes no others."""
    if message.value.get(key) is None:
        message.missing(key)
    if isinstance(message.value[key], str):
        return [message.value[key]]
    parts = [parse_part(part) for part in message.objects(key)]
    for i, part in enumerate(parts):
        if isinstance(part, Media):
            message.change(f"{key}[{i}]", "dropped", "Gemini takes instructions in words only")
    return [part.text for part in parts if isinstance(part, Text)]


def parse_content(
    message: Fields, parse: Callable[[Fields], T], key: str = "content"
) -> list[T | Text]:
    """The parts of a content that is a string or an array; empty texts are left out."""
    content = message.value.get(key)
    if isinstance(content, str):
        return [Text(content)] if content else []
    if content is not None and not isinstance(content, list):
        raise message.wrong(
            key, "has the wrong type", "Send a string or an array of parts", "invalid_type"
        )
    return [part for item in message.objects(key) if (part := parse(item)) != Text("")]


def parse_block(part: Fields) -> Part:
    """A part of a chat message; to a model that is named claude-* Cursor sends calls and results in Anthropic's form.

    Source: https://github.com/router-for-me/CLIProxyAPI/pull/3804
    """
    kind = part.text("type")
    if kind == "tool_use":
        arguments = part.get("input", (dict,), "an object") or {}
        return ToolCall(part.needed_text("id"), part.needed_text("name"), dumps(arguments))
    if kind == "tool_result":
        return ToolResult(part.needed_text("tool_use_id"), tuple(parse_content(part, parse_part)))
    return Thinking("") if kind in ("thinking", "redacted_thinking") else parse_part(part)


DRAWN = re.compile(
    r"!\[[^\[\]]{0,100}\]\(data:(image/(?:png|jpeg|webp));base64,([\w+/=-]+)\)", re.ASCII
)


def parse_said(message: Fields) -> list[Part]:
    """What a model said, and the images that it made, which a client sends back as it got them: in `images` or the text."""
    said: list[Part] = []
    for part in parse_content(message, parse_block):
        said += undrawn(part.text) if isinstance(part, Text) and ";base64," in part.text else [part]
    return (
        [*said, *map(parse_part, message.objects("images"))] if "images" in message.value else said
    )


def undrawn(text: str) -> list[Text | Media]:
    """A text and the images that stand in it as Markdown: as words they would be a token for every few bytes."""
    first, *rest = DRAWN.split(text)
    drawn = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
    if not all(is_base64(data) for _, data, _ in drawn):
        return [Text(text)]
    return [
        Text(first),
        *(part for mime, data, after in drawn for part in (Media(mime, data), Text(after))),
    ]


def parse_part(part: Fields) -> Text | Media:
    kind = part.text("type")
    if kind in ("text", "input_text", "output_text"):
        return Text(part.text("text") or "")
    if kind == "refusal":
        return Text(part.text("refusal") or "")
    if kind == "encrypted_content":
        part.change("type", "dropped", "only OpenAI can read it")
        return Text("")
    if kind in ("image_url", "input_image"):
        return parse_image(part)
    if kind == "input_audio":
        audio = part.object("input_audio") or part.missing("input_audio")
        form = audio.needed_text("format").removeprefix(
            "x-"
        )  # LangChain's is the end of a MIME type
        if form not in AUDIO_FORMATS:
            raise audio.wrong(
                "format",
                f"is '{form}', which is not served",
                f"Send one of {', '.join(AUDIO_FORMATS)}",
            )
        return Media(f"audio/{form}", checked_base64(audio, "data", audio.needed_text("data")))
    if kind in ("file", "input_file"):
        return parse_file(part.object("file") or part)
    raise part.wrong(
        "type", f"is '{kind}', which is not served", "Send text, image_url, input_audio or file"
    )


DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[^;,]{0,100}){0,5};base64,", re.ASCII)


def parse_image(part: Fields) -> Media:
    if part.value.get("file_id"):
        raise part.wrong(
            "file_id", "is not served", "Send the image as a data: URL", "unsupported_parameter"
        )
    inner = part.object("image_url") if isinstance(part.value.get("image_url"), dict) else None
    if (inner or part).text("detail") in ("low", "high", "original"):
        (inner or part).change("detail", "dropped", "Gemini chooses the resolution itself")
    if inner:
        return parse_url(inner, "url", inner.value.get("url"))
    return parse_url(part, "image_url", part.text("image_url"))


def parse_file(file: Fields) -> Media:
    """A file as data URL, bare base64 with a file name, or URL."""
    if file.value.get("file_id"):
        raise file.wrong(
            "file_id",
            "is not served",
            "Send the file's content as file_data",
            "unsupported_parameter",
        )
    if file.value.get("file_url"):
        return parse_url(file, "file_url", file.text("file_url"))
    data = file.needed_text("file_data")
    if data.startswith("data:"):
        return parse_url(file, "file_data", data)
    mime = checked_type(file, "file_data", media_type_by(file.text("filename") or ""))
    return Media(mime, checked_base64(file, "file_data", data))


def image_type(data: str) -> str:
    """The type of an image by how its base64 begins."""
    return {"/9j/": "image/jpeg", "UklG": "image/webp", "R0lG": "image/gif"}.get(
        data[:4], "image/png"
    )


def media_type_by(filename: str) -> str:
    return FILE_TYPES.get(
        filename.rpartition(".")[2].lower() if "." in filename else "", "of an unknown kind"
    )


def checked_type(part: Fields, key: str, mime: str) -> str:
    """The type as Gemini names it. Raises BadRequest for one that it does not read."""
    mime = MEDIA_ALIASES.get(mime, mime)
    if not MEDIA_TYPES.fullmatch(mime):
        remedy = "Send PNG, JPEG, WebP, PDF, text, audio or video"
        raise part.wrong(key, f"is {mime}, which Gemini does not read", remedy, "invalid_image_url")
    return mime


def parse_url(part: Fields, key: str, url: Any) -> Media:
    """Media by URL: the content of a data: URL, or a link to be followed later."""
    if isinstance(url, str) and (match := DATA_URL.match(url)):
        mime = match[1].lower()
        data = checked_base64(part, key, url[match.end() :])
        if mime == "application/octet-stream":
            mime = (
                media_type_by(part.text("filename") or "")
                if key == "file_data"
                else image_type(data)
            )
        return Media(checked_type(part, key, mime), data)
    if isinstance(url, str) and re.match(r"(https?|gs)://[^/\s]", url, re.IGNORECASE):
        return Media("", "", url=url, path=part.at(key))
    what = "is neither a data: URL with base64 nor an http(s) URL"
    raise part.wrong(key, what, "Send data:image/png;base64,...", "invalid_image_url")


def checked_base64(part: Fields, key: str, data: str) -> str:
    if not is_base64(data):
        raise part.wrong(key, "is not valid base64", "Encode the file anew", "invalid_image_url")
    return data


def parse_call(call: Fields) -> ToolCall:
    custom = call.text("type") == "custom"
    kind = "custom" if custom else "function"
    inner = call.object(kind) or call.missing(kind)
    extra = call.value.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    if not (isinstance(signature, str) and is_base64(signature)):
        signature = None
    text = inner.text("input" if custom else "arguments") or ""
    return ToolCall(
        call.needed_text("id"), inner.needed_text("name"), text, signature, custom=custom
    )


DONE = "data: [DONE]\n\n"
FINGERPRINT = "fp_agproxy"


def openai_error(error: GatewayError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def render_citation(citation: Citation) -> dict[str, Any]:
    span = {"start_index": citation.start, "end_index": citation.end}
    return span | {"url": citation.url, "title": citation.title}


@value
class Head:
    """What the objects of one answer repeat."""

    id: str  # 24 hexadecimal digits; each form puts its own prefix before them
    created: int
    model: str
    include_usage: bool = False
    images_in_text: bool = (
        False  # generated images are Markdown in the text, for clients that know no other place
    )
    now: Callable[[], float] = float
    seal: Callable[[ToolCall | Text], str] | None = None
    """How a signed part's signature is given to the client, where it asked for that."""


class Renderer(ABC):
    """Events to one front format: a translation, not a machine."""

    media_type = "text/event-stream"  # of its frames

    @abstractmethod
    def __init__(self, head: Head, body: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def frames(self, events: Iterable[Event]) -> str:
        """What a stream shows of the events of one read."""

    @abstractmethod
    def whole(self, events: Sequence[Event]) -> Any:
        """The object of a whole answer. Raises the GatewayError of a Failed event."""


# ==============================================================================
# 6. Chat
# ==============================================================================

CHAT_FIELDS: Fates = {
    **SAMPLING_FIELDS,
    **TOOL_FIELDS,
    "messages": ("mapped", "contents and systemInstruction"),
    "system": ("mapped", "systemInstruction"),
    "max_completion_tokens": ("mapped", "generationConfig.maxOutputTokens"),
    "functions": ("mapped", "tools[0].functionDeclarations"),
    "function_call": ("mapped", "toolConfig.functionCallingConfig"),
    "response_format": ("mapped", "generationConfig.responseMimeType and responseJsonSchema"),
    "reasoning_effort": ("mapped", "generationConfig.thinkingConfig"),
    "modalities": ("mapped", "generationConfig.responseModalities, for images"),
    "image_config": ("mapped", "generationConfig.imageConfig"),
    "audio": ("mapped", "refused"),
    "web_search_options": ("mapped", "tools[0].googleSearch"),
    "verbosity": ("dropped", "Gemini has no verbosity; ask for it in the instructions"),
    "prediction": ("ignored", "only makes OpenAI's answer faster"),
}
COMPLETION_FIELDS: Fates = {
    **SAMPLING_FIELDS,
    "prompt": ("mapped", "contents, one upstream call each"),
    "suffix": ("mapped", "an instruction"),
    "echo": ("mapped", "the prompt before the text"),
    "best_of": ("ignored", "the first answer is the best"),
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "extra_body", "google"), ("dropped", "not served here")
    ),
}


def parse_chat(body: Any) -> Request:
    """A chat body; `input` instead of `messages` is read as Responses, for Cursor sends it here. Raises BadRequest."""
    fields = Fields(body)
    if fields.value.get("messages") is None and fields.value.get("input") is not None:
        return parse_response(body)
    messages = fields.objects("messages") or fields.missing("messages")
    tools = parse_tools(fields, hosted=False)
    limit = (
        "max_tokens" if fields.count("max_completion_tokens") is None else "max_completion_tokens"
    )
    alternatives = fields.count("top_logprobs", 20, low=0)
    system = texts_of(fields, "system") if fields.value.get("system") else []
    request = Request(
        model=fields.model(),
        system=(
            *system,
            *(
                text
                for m in messages
                if m.value.get("role") in SYSTEM_ROLES
                for text in texts_of(m)
            ),
        ),
        messages=tuple(
            parse_message(m) for m in messages if m.value.get("role") not in SYSTEM_ROLES
        ),
        tools=tools,
        tool_choice=parse_tool_choice(fields, tools),
        parallel_calls=fields.flag("parallel_tool_calls", default=True),
        max_output_tokens=fields.count(limit),
        logprobs=(alternatives or 0) if fields.flag("logprobs") or alternatives else None,
        json_format=parse_format(fields.object("response_format"), nested=True),
        modalities=parse_modalities(fields),
        thinking=parse_thinking(
            fields, fields.text("reasoning_effort"), "/reasoning_effort", show=True
        ),
        sources={"max_output_tokens": f"/{limit}", "json_format": "/response_format"}
        | search_source(fields)
        | ({} if fields.flag("logprobs") else {"logprobs": "top_logprobs"}),
        **parse_images(fields),
        **parse_sampling(fields),
    )
    return with_changes(request, fields, CHAT_FIELDS)


def parse_modalities(fields: Fields) -> tuple[str, ...]:
    if fields.value.get("audio") is not None:
        raise fields.wrong("audio", "is not served", "Leave it out", "unsupported_parameter")
    wished = fields.get("modalities", (list,), "an array") or []
    if not all(one in ("text", "image") for one in wished):
        what = "asks for what is not served"
        raise fields.wrong("modalities", what, "Send text, or text and image", "unsupported_value")
    return tuple(wished)


def parse_images(fields: Fields) -> dict[str, Any]:
    """The form of images to be made. Source: https://openrouter.ai/docs/guides/overview/multimodal/image-generation"""
    config = fields.object("image_config")
    return {key: config.text(key) for key in ("aspect_ratio", "image_size")} if config else {}


def parse_completion(body: Any) -> list[Request]:
    """A completions body: one request a prompt. Raises BadRequest."""
    fields = Fields(body)
    suffix = fields.text("suffix")
    shared = Request(
        model=fields.model(),
        messages=(),
        system=(COMPLETE_THE_MIDDLE,) if suffix else (),
        max_output_tokens=fields.count("max_tokens", low=0) or None,
        sources={"max_output_tokens": "/max_tokens"},
        **parse_sampling(fields),
    )
    fields.count("logprobs", low=0)
    if suffix:
        fields.change("suffix", "emulated", "asked for by an instruction")
    shared = with_changes(shared, fields, COMPLETION_FIELDS)
    prompts = parse_prompts(fields)
    if len(prompts) * shared.n > CHOICES_MAX:
        raise fields.wrong(
            "prompt", f"times 'n' is more than {CHOICES_MAX} choices", "Send fewer prompts at once"
        )
    wholes = [
        f"<prefix>{prompt}</prefix>\n<suffix>{suffix}</suffix>" if suffix else prompt
        for prompt in prompts
    ]
    return [replace(shared, messages=(Message("user", (Text(whole),)),)) for whole in wholes]


COMPLETE_THE_MIDDLE = (
    "Write the text that belongs between the prefix and the suffix. Answer with that text alone, without repeating "
    "either and without Markdown fences."
)


def parse_prompts(fields: Fields) -> list[str]:
    value = fields.value.get("prompt")
    prompts = (
        value if isinstance(value, list) and value else [""] if value in (None, []) else [value]
    )
    if not all(isinstance(prompt, str) for prompt in prompts):
        what = "is neither a string nor an array of strings; token arrays are not served"
        raise fields.wrong("prompt", what, "Send the text itself", "invalid_type")
    return [str(prompt) for prompt in prompts]


PREDICTED = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}


def render_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": 0,
            **PREDICTED,
        },
    }


def render_call(call: ToolCall) -> dict[str, Any]:
    kind, what = ("custom", "input") if call.custom else ("function", "arguments")
    entry: dict[str, Any] = {
        "id": call.id,
        "type": kind,
        kind: {"name": call.name, what: call.arguments},
    }
    if call.signature:
        entry["extra_content"] = {"google": {"thought_signature": call.signature}}
    return entry


def render_media(media: Media, index: int, head: Head) -> tuple[str, Any]:
    """Where in a message or delta generated media stand: `audio` as OpenAI has it, else `images` as its routers do."""
    if media.mime.startswith("audio/"):
        about = {"id": f"audio_{head.id}", "expires_at": head.created + 3600, "transcript": ""}
        return "audio", about | {"data": media.data}
    url = f"data:{media.mime};base64,{media.data}"
    if head.images_in_text:
        return "content", f"![image]({url})"
    return "images", [{"type": "image_url", "index": index, "image_url": {"url": url}}]


def chat_annotations(citations: Iterable[Citation]) -> list[dict[str, Any]]:
    return [
        {"type": "url_citation", "url_citation": render_citation(citation)}
        for citation in citations
    ]


def render_logprobs(logprobs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    return {"content": list(logprobs), "refusal": None} if logprobs else None


class Frames:
    """What the chunks of chat and completions have in common: head, tail, usage chunk, error, [DONE]."""

    def __init__(self, known: Mapping[str, Any], head: Head) -> None:
        self.head = f'data: {dumps(known)[:-1]},"choices":['
        self.tail = (',"usage":null' if head.include_usage else "") + "}\n\n"
        self._include_usage = head.include_usage

    def choice(self, entry: str) -> str:
        return f"{self.head}{entry}]{self.tail}"

    def last(self, end: Ended | Failed) -> str:
        if isinstance(end, Failed):
            return f"data: {dumps(openai_error(end.error))}\n\n"
        usage = (
            f'{self.head}],"usage":{dumps(render_usage(end.usage))}}}\n\n'
            if self._include_usage
            else ""
        )
        return usage + DONE


class ChatRenderer(Renderer):
    """Events to the frames of a chat stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        self._head = head
        self._legacy = bool(body.get("functions")) and not body.get("tools")
        self._calls: dict[int, int] = {}
        self._media: dict[int, list[str]] = {}  # of each choice, where it got media
        self._custom = False
        self._before_text: dict[
            int, str
        ] = {}  # of each choice that has begun, how a chunk of its text begins
        self._after_text = ""

    def _known(self, kind: str) -> dict[str, Any]:
        head = self._head
        known = {
            "id": f"chatcmpl-{head.id}",
            "object": kind,
            "created": head.created,
            "model": head.model,
        }
        return {**known, "service_tier": "default", "system_fingerprint": FINGERPRINT}

    @functools.cached_property
    def _frames(self) -> Frames:
        return Frames(self._known("chat.completion.chunk"), self._head)

    def frames(self, events: Iterable[Event]) -> str:
        """The frames of the events of one read; nine of ten are more text of a choice that has begun."""
        begun, frames = self._before_text, ""
        for event in events:
            if event.__class__ is TextDelta and event.choice in begun:
                frames += f"{begun[event.choice]}{encode_basestring(event.text)}{self._after_text}"
            else:
                frames += self.render(event)
        return frames

    def render(self, event: Event) -> str:
        match event:
            case TextDelta(choice, text):
                return self._delta(choice, f'{{"content":{encode_basestring(text)}}}')
            case ThinkingDelta(choice, text):
                return self._delta(choice, f'{{"reasoning_content":{encode_basestring(text)}}}')
            case PartStart(choice, ToolCall() as call):
                return self._start_call(choice, call)
            case ArgumentsDelta(choice, text):
                entry = (
                    {"custom": {"input": text}}
                    if self._custom
                    else {"function": {"arguments": text}}
                )
                return self._call(choice, entry)
            case PartStart(choice, Media() as media):
                return self._image(choice, media)
            case Annotated(choice, citations):
                return (
                    self._delta(choice, dumps({"annotations": chat_annotations(citations)}))
                    if citations
                    else ""
                )
            case Finished(choice, reason, logprobs):
                return self._delta(
                    choice, "{}", f'"{self._reason(reason)}"', dumps(render_logprobs(logprobs))
                )
            case Ended() | Failed():
                return self._frames.last(event)
            case Started() | PartStart() | PartEnd():
                return ""
            case _:
                assert_never(event)

    def _reason(self, reason: FinishReason) -> str:
        return "function_call" if self._legacy and reason == "tool_calls" else reason

    def _start_call(self, choice: int, call: ToolCall) -> str:
        self._calls[choice] = self._calls.get(choice, -1) + 1
        self._custom = call.custom
        return self._call(choice, render_call(call))

    def _call(self, choice: int, entry: dict[str, Any]) -> str:
        index = self._calls[choice]
        if self._legacy:  # which knows one call an answer
            return (
                self._delta(choice, dumps({"function_call": entry["function"]}))
                if index == 0
                else ""
            )
        return self._delta(choice, dumps({"tool_calls": [{"index": index, **entry}]}))

    def _image(self, choice: int, media: Media) -> str:
        given = self._media.setdefault(choice, [])
        key, told = render_media(media, given.count("images"), self._head)
        if key == "audio" and key in given:
            return ""  # SDKs would join a second one with the first
        given.append(key)
        return self._delta(choice, dumps({key: told}))

    def _delta(self, choice: int, delta: str, finish: str = "null", logprobs: str = "null") -> str:
        first = "" if choice in self._before_text else self._open(choice)
        frame = (
            f'{{"index":{choice},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
        )
        return first + self._frames.choice(frame)

    def _open(self, choice: int) -> str:
        """The first chunk of a choice, after those of the choices before it: SDKs count them up."""
        new = [each for each in range(choice + 1) if each not in self._before_text]
        self._after_text = f'}},"logprobs":null,"finish_reason":null}}]{self._frames.tail}'
        for each in new:
            self._before_text[each] = f'{self._frames.head}{{"index":{each},"delta":{{"content":'
        return "".join(
            self._delta(each, '{"role":"assistant","content":"","refusal":null}') for each in new
        )

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        reply = collect(events)
        choices = [
            self.whole_choice(index, choice) for index, choice in sorted(reply.choices.items())
        ]
        return {
            **self._known("chat.completion"),
            "choices": choices,
            "usage": render_usage(reply.usage),
        }

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        calls: list[dict[str, Any]] = []
        for part in choice.parts:
            match part:
                case Text(text):
                    message["content"] += text
                case Thinking(text):
                    message["reasoning_content"] = message.get("reasoning_content", "") + text
                case ToolCall():
                    calls.append(render_call(part))
                case Media():
                    key, told = render_media(part, len(message.get("images", ())), self._head)
                    if key not in message:
                        message[key] = told
                    elif key != "audio":
                        message[key] += told
                case ToolResult():
                    pass
        if choice.citations:
            message["annotations"] = chat_annotations(choice.citations)
        if calls:
            message |= (
                {"function_call": calls[0]["function"]} if self._legacy else {"tool_calls": calls}
            )
            message["content"] = message["content"] or None
        logprobs, reason = render_logprobs(choice.logprobs), self._reason(choice.reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


class CompletionRenderer(Renderer):
    """Events to the frames of a completions stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        prompts = body.get("prompt") or ""
        self._echo = (
            (prompts if isinstance(prompts, list) else [prompts]) if body.get("echo") else []
        )
        self._n = body.get("n") or 1
        about = {"object": "text_completion", "created": head.created, "model": head.model}
        self._known = {"id": f"cmpl-{head.id}", **about, "system_fingerprint": FINGERPRINT}
        self._frames = Frames(self._known, head)
        self._opened: set[int] = set()

    def frames(self, events: Iterable[Event]) -> str:
        return "".join(map(self.render, events))

    def render(self, event: Event) -> str:
        match event:
            case TextDelta(choice, text):
                return self._text(choice, text)
            case Finished(choice, reason):
                return self._text(choice, "", '"stop"' if reason == "tool_calls" else f'"{reason}"')
            case Ended() | Failed():
                return self._frames.last(event)
            case (
                Started()
                | PartStart()
                | PartEnd()
                | ThinkingDelta()
                | ArgumentsDelta()
                | Annotated()
            ):
                return ""
            case _:
                assert_never(event)

    def _text(self, choice: int, text: str, finish: str = "null") -> str:
        if choice not in self._opened:
            self._opened.add(choice)
            text = self._prompt(choice) + text
        entry = f'{{"text":{encode_basestring(text)},"index":{choice},"logprobs":null,"finish_reason":{finish}}}'
        return self._frames.choice(entry)

    def _prompt(self, choice: int) -> str:
        """The prompt that a choice echoes: choices are numbered prompt by prompt."""
        return self._echo[choice // self._n] if self._echo else ""

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        reply = collect(events)
        choices = [
            self._whole_choice(index, choice) for index, choice in sorted(reply.choices.items())
        ]
        return {**self._known, "choices": choices, "usage": render_usage(reply.usage)}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        reason = "stop" if choice.reason == "tool_calls" else choice.reason
        return {
            "text": self._prompt(index) + choice.text,
            "index": index,
            "logprobs": None,
            "finish_reason": reason,
        }


# ==============================================================================
# 7. Responses
# ==============================================================================

RESPONSE_FIELDS: Fates = {
    **SAMPLING_FIELDS,
    **TOOL_FIELDS,
    "input": ("mapped", "contents and systemInstruction"),
    "instructions": ("mapped", "systemInstruction"),
    "max_output_tokens": ("mapped", "generationConfig.maxOutputTokens"),
    "text": ("mapped", "generationConfig.responseMimeType and responseJsonSchema"),
    "reasoning": ("mapped", "generationConfig.thinkingConfig"),
    "include": ("ignored", "what there is, is included"),
    **dict.fromkeys(("truncation", "context_management"), ("ignored", "nothing is truncated")),
    "max_tool_calls": ("ignored", "counts hosted tools only"),
    "client_metadata": ("ignored", "no effect on the answer"),
    "store": ("mapped", "the response is kept, for previous_response_id"),
    "previous_response_id": ("mapped", "the conversation that is kept, before the input"),
    "background": ("mapped", "answered beside the connection, where responses are kept"),
    **dict.fromkeys(("conversation", "prompt"), ("mapped", "refused")),
    **dict.fromkeys(("n", "logprobs", "top_logprobs"), ("dropped", "not served here")),
}


def read_body(body: Any) -> tuple[list[Request], Fates]:
    """The requests of a body of any of the three APIs, and its table of fields. Raises BadRequest."""
    given = (
        {key for key, value in body.items() if value is not None}
        if isinstance(body, dict)
        else set()
    )
    if "prompt" in given and not given & {"messages", "input"}:
        return parse_completion(body), COMPLETION_FIELDS
    if "input" in given and "messages" not in given:
        return [parse_response(body, ())], RESPONSE_FIELDS
    return [parse_chat(body)], CHAT_FIELDS


def parse_response(body: Any, past: Sequence[Any] | None = None) -> Request:
    """A Responses body, after the items that it goes on with, or None where none are kept. Raises BadRequest."""
    fields = Fields(body)
    refuse_state(fields, kept=past is not None)
    messages, system, more_tools = parse_input(fields, past or ())
    tools = each_once(fields, (*parse_tools(fields), *more_tools))
    text, reasoning = fields.object("text"), fields.object("reasoning")
    instructions = fields.text("instructions")
    effort = reasoning.text("effort") if reasoning else None
    summary = (
        (reasoning.text("summary") or reasoning.text("generate_summary")) if reasoning else None
    )
    limit = "max_output_tokens" if fields.count("max_output_tokens") is not None else "max_tokens"
    fields.count("top_logprobs", 20, low=0)
    request = Request(
        model=fields.model(),
        system=(*([instructions] if instructions else []), *system),
        messages=messages,
        tools=tools,
        tool_choice=parse_tool_choice(fields, tools),
        parallel_calls=fields.flag("parallel_tool_calls", default=True),
        max_output_tokens=fields.count(limit),
        json_format=parse_format(text and text.object("format"), nested=False),
        thinking=parse_thinking(fields, effort, "/reasoning/effort", show=bool(summary)),
        sources={
            "max_output_tokens": f"/{limit}",
            "json_format": "/text/format",
            "messages": "/input",
        }
        | search_source(fields),
        **parse_sampling(fields) | {"n": 1},
    )
    return with_changes(request, fields, RESPONSE_FIELDS)


def refuse_state(fields: Fields, *, kept: bool) -> None:
    """What asks for more to be kept on this side than is."""
    if fields.text("previous_response_id") and not kept:
        raise not_kept(fields.value["previous_response_id"])
    for key in ("conversation", "prompt"):
        if fields.value.get(key):
            raise fields.wrong(key, "is not served", "Leave it out", "unsupported_parameter")
    if fields.flag("background") and not (kept and fields.flag("store", default=True)):
        what = "needs a response that is kept"
        raise fields.wrong(
            "background", what, "Leave out 'store' and proxy.store: off", "unsupported_parameter"
        )


def not_kept(id: str) -> BadRequest:
    text = f"'previous_response_id' names '{id}', which is not kept here. Send the whole input."
    return BadRequest(text, code="previous_response_not_found", param="previous_response_id")


def parse_input(
    fields: Fields, past: Sequence[Any]
) -> tuple[tuple[Message, ...], tuple[str, ...], tuple[Tool, ...]]:
    """The messages of a Responses input, neighbours of one role merged; its system texts; its additional tools."""
    value = fields.value.get("input")
    if value is None:
        fields.missing("input")
    given = (
        [Fields({"role": "user", "content": value}, "input")]
        if isinstance(value, str)
        else fields.objects("input")
    )
    turns: list[tuple[Any, list[Part]]] = []
    system: list[str] = []
    tools: list[Tool] = []
    known = [
        Fields(item, f"past[{i}]") for i, item in enumerate(past)
    ]  # whose changes are not told again
    for item in (*known, *given):
        if item.value.get("type") == "additional_tools":
            tools[:0] = parse_tools(item)  # so that of two with one name the newer holds
        elif item.value.get("role") in SYSTEM_ROLES:
            system += texts_of(item)
        elif message := parse_item(item):
            if not turns or not turns[-1][0] == message.role != "user":
                turns.append((message.role, []))
            turns[-1][1].extend(message.parts)
    return tuple(Message(role, tuple(parts)) for role, parts in turns), tuple(system), tuple(tools)


def parse_item(item: Fields) -> Message | None:
    """One input item; None for what only a hosted tool could have made."""
    kind = item.text("type") or "message"
    if kind == "message":
        return parse_message(item)
    if kind in ("function_call", "custom_tool_call"):
        custom = kind == "custom_tool_call"
        text = item.text("input" if custom else "arguments") or ""
        names = (item.needed_text("call_id"), item.needed_text("name"))
        return Message(
            "assistant",
            (ToolCall(*names, text, namespace=item.text("namespace") or None, custom=custom),),
        )
    if kind in ("function_call_output", "custom_tool_call_output"):
        output = tuple(parse_content(item, parse_part, "output"))
        return Message("tool", (ToolResult(item.needed_text("call_id"), output),))
    if kind == "agent_message":  # by which Codex's agents talk to each other
        item.change("type", "emulated", "told as the user's words")
        said = parse_content(item, parse_part)
        return Message("user", (Text(f"Message of the agent {item.needed_text('author')}:"), *said))
    if kind == "reasoning":
        text = "".join(part.text("text") or "" for part in item.objects("summary"))
        return Message("assistant", (Thinking(text, item.text("encrypted_content")),))
    if kind == "image_generation_call" and (image := item.text("result")):
        return Message(
            "assistant", (Media(image_type(image), checked_base64(item, "result", image)),)
        )
    if HOSTED_ITEMS.fullmatch(kind):
        item.change("type", "dropped", f"a replayed {kind} has no counterpart")
        return None
    if kind == "item_reference":
        raise item.wrong("id", "names an item that is not kept here", "Send the item itself")
    raise item.wrong(
        "type",
        f"is '{kind}', which is not served",
        "Send message, function_call or function_call_output",
    )


RESPONSE_BEGUN: Mapping[str, Any] = {
    "object": "response",
    "status": "in_progress",
    "service_tier": "default",
} | (dict.fromkeys(("completed_at", "error", "incomplete_details", "usage")))
# What a Response repeats of the body, and what stands there instead where the body has nothing.
RESPONSE_ECHOES: Mapping[str, Any] = (
    dict.fromkeys(
        ("max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key")
    )
    | {
        "safety_identifier": None,
        "instructions": None,
        "tool_choice": "auto",
        "truncation": "disabled",
    }
    | {
        "temperature": 1.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
    }
    | {"parallel_tool_calls": True, "store": True, "metadata": {}}
)
# Like invalid_prompt these end a turn of Codex's, which sends it again at any other code of response.failed.
# Source: https://github.com/openai/codex/blob/main/codex-rs/codex-api/src/sse/responses.rs
FINAL_CODES = ("context_length_exceeded", "insufficient_quota")


class ResponseRenderer(Renderer):
    """Events to the events of a Responses stream, or the Response object of a whole answer.

    Source: https://platform.openai.com/docs/api-reference/responses-streaming
    """

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        self._head = head
        self.response = response_template(head, body)  # the object, as far as it is made
        self.signed: list[ToolCall | Text] = []
        self._sequence = 0
        self._item: dict[str, Any] = {}
        self._before_delta = ""
        self._held: Text | Thinking | None = None
        self._reason: FinishReason = "stop"
        self._searches: tuple[str, ...] = ()
        self._quiet = False  # makes the object alone

    def frames(self, events: Iterable[Event]) -> str:
        return "".join(map(self.render, events))

    def render(self, event: Event) -> str:
        if getattr(event, "choice", 0):
            return ""  # a response has no second choice
        match event:
            case TextDelta(text=text) | ThinkingDelta(text=text) | ArgumentsDelta(text=text):
                return self._delta(text)
            case Started():
                return self.begin("in_progress")
            case PartStart(part=part):
                return self._release("completed", part) + self._open(
                    self._render_item(part, "in_progress")
                )
            case PartEnd(part=Text() | Thinking() as part):
                self._held = part  # how it is to be told, only what follows tells
                return ""
            case PartEnd(part=part):
                return self._done_part(part, "completed")
            case Annotated(searches=searches):
                self._searches = searches  # what stands in a part is told with the part
                return ""
            case Finished(reason=reason):
                self._reason = reason
                status = "completed" if reason in ("stop", "tool_calls") else "incomplete"
                return self._release(status) + (self._search() if self._searches else "")
            case Ended(usage):
                return self._end(usage)
            case Failed(error):
                return self._release("incomplete") + self._failed(error)
            case _:
                assert_never(event)

    def begin(self, status: str) -> str:
        """What opens a stream: first, where it waits, as `queued`, then as `in_progress`."""
        self.response["status"] = status
        first = "" if self._sequence else self._frame("created", {"response": self.response})
        return first + self._frame(status, {"response": self.response})

    def replay(self, response: dict[str, Any], at: int) -> str:
        """The stream of a response that is over; its end stands behind what the client has, whatever that was."""
        self.response = response | dict.fromkeys(
            ("usage", "completed_at", "error", "incomplete_details")
        )
        self.response["output"] = []
        frames = self.begin("in_progress")
        for item in response["output"]:
            *_, text = delta_form(item)
            frames += self._open(item) + (self._delta(text) if text else "") + self._done(item)
        self.response, self._sequence = response, max(self._sequence, at)
        return frames + self._last()

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The Response object, with `choices` beside it for scripts that read the text where chat has it."""
        reply = collect(events)
        self._quiet = True
        choice = reply.choices.get(0, Choice())
        parts = [event(0, part) for part in choice.parts for event in (PartStart, PartEnd)]
        searched = Annotated(0, choice.citations, choice.searches)
        self.frames([*parts, searched, Finished(0, choice.reason), Ended(reply.usage)])
        return self.response | {"choices": [ChatRenderer(self._head, {}).whole_choice(0, choice)]}

    # ---- frames

    def _frame(self, kind: str, more: Mapping[str, Any]) -> str:
        if self._quiet:
            return ""
        name = "error" if kind == "error" else f"response.{kind}"
        event = {"type": name, "sequence_number": self._sequence, **more}
        self._sequence += 1
        return f"event: {name}\ndata: {dumps(event)}\n\n"

    def _end(self, usage: Usage) -> str:
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._reason)
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": cut} if cut else None
        self.response["completed_at"] = None if cut else int(self._head.now())
        self.response["usage"] = render_response_usage(usage)
        return self._last()

    def _failed(self, error: GatewayError) -> str:
        if isinstance(error, Cancelled):
            self.response["status"] = "cancelled"
            return self._last()
        told = openai_error(error)["error"]
        flat = {key: told[key] for key in ("code", "message", "param")}
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        if error.status == 429:
            code = "rate_limit_exceeded"
        if error.code in FINAL_CODES:
            code = error.code
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._frame("error", flat | {"error": told}) + self._last()

    def _last(self) -> str:
        """The one event that ends a stream; there is none of its own for a cancelled one."""
        kind = self.response["status"].replace("cancelled", "incomplete")
        return self._frame(kind, {"response": self.response}) + DONE

    # ---- items

    def _place(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Where in the output an event belongs."""
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]), **more}

    def _render_item(self, part: Part, status: str) -> dict[str, Any] | None:
        number = len(self.response["output"])
        return render_item(part, f"{self._head.id}{number:04x}", status)

    def _open(self, item: dict[str, Any] | None) -> str:
        if item is None or self._quiet:
            return ""
        self._item = item
        name, place, empty, _ = delta_form(item)
        more: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
        before = dumps({"type": f"response.{name}.delta", **self._place(place), **more})[:-1]
        self._before_delta = f'event: response.{name}.delta\ndata: {before},"sequence_number":'
        added = {
            "output_index": len(self.response["output"]),
            "item": item | {"status": "in_progress"} | empty,
        }
        frames = self._frame("output_item.added", added)
        if name == "output_text":
            frames += self._frame(
                "content_part.added", self._place(place | {"part": text_part(Text(""))})
            )
        if name == "reasoning_summary_text" and item["summary"]:
            frames += self._frame(
                "reasoning_summary_part.added", self._place(place | {"part": summary_part("")})
            )
        return frames

    def _delta(self, text: str) -> str:
        self._sequence += 1
        return f'{self._before_delta}{self._sequence - 1},"delta":{encode_basestring(text)}}}\n\n'

    def _release(self, status: str, then: Part | None = None) -> str:
        """The part whose end was held back, now that its status is known.

        A call's signature goes to the client in the reasoning before it, a text's in one behind it.
        """
        part, self._held = self._held, None
        sealed = None
        if isinstance(then, ToolCall) and then.signature and self._head.seal:
            sealed = self._head.seal(then)
        if isinstance(part, Thinking) and sealed:
            part, sealed = replace(part, signature=sealed), None
        frames = self._done_part(part, status) if part else ""
        if isinstance(part, Text) and part.signature and self._head.seal:
            frames += self._carry(self._head.seal(part))
        return frames + (self._carry(sealed) if sealed else "")

    def _carry(self, sealed: str) -> str:
        """A reasoning item that says nothing, but brings a signature back."""
        item = (self._render_item(Thinking("", sealed), "completed") or {}) | {"summary": []}
        return self._open(item) + self._done(item)

    def _search(self) -> str:
        """The search behind an answer, of which Gemini tells only at its end."""
        action = {"type": "search", "query": self._searches[0], "queries": list(self._searches)}
        id = f"ws_{self._head.id}{len(self.response['output']):04x}"
        item = {"id": id, "type": "web_search_call", "status": "completed", "action": action}
        return self._open(item) + self._done(item)

    def _done_part(self, part: Part, status: str) -> str:
        if isinstance(part, ToolCall | Text) and part.signature:
            self.signed.append(part)
        item = self._render_item(part, status)
        return "" if item is None else self._done(item)

    def _done(self, item: dict[str, Any]) -> str:
        frames = "" if self._quiet else self._close(item)
        frames += self._frame(
            "output_item.done", {"output_index": len(self.response["output"]), "item": item}
        )
        self.response["output"].append(item)
        return frames

    def _close(self, item: dict[str, Any]) -> str:
        """What ends the inner of an item."""
        name, place, _, text = delta_form(item)
        match item:
            case {"content": [part]}:
                annotations = enumerate(part["annotations"])
                places = (
                    {"content_index": 0, "annotation_index": i, "annotation": one}
                    for i, one in annotations
                )
                frames = "".join(
                    self._frame("output_text.annotation.added", self._place(at)) for at in places
                )
                frames += self._frame(
                    "output_text.done", self._place(place | {"text": text, "logprobs": []})
                )
                return frames + self._frame(
                    "content_part.done", self._place(place | {"part": part})
                )
            case {"summary": [part]}:
                frames = self._frame(f"{name}.done", self._place(place | {"text": text}))
                return frames + self._frame(
                    "reasoning_summary_part.done", self._place(place | {"part": part})
                )
            case {"input": _}:
                return self._frame(f"{name}.done", self._place({"input": text}))
            case {"arguments": _}:
                return self._frame(
                    f"{name}.done", self._place({"name": item["name"], "arguments": text})
                )
            case {"type": "web_search_call"}:
                steps = ("in_progress", "searching", "completed")
                return "".join(
                    self._frame(f"web_search_call.{step}", self._place({})) for step in steps
                )
            case _:
                return ""


def response_template(head: Head, body: Mapping[str, Any]) -> dict[str, Any]:
    """The Response object of an answer that has not begun: every key is there, what was asked for is echoed.

    Source: https://platform.openai.com/docs/api-reference/responses/object
    """
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    form = text.get("format") or {"type": "text"}
    if form.get("type") == "json_schema":
        form = {"description": None, **form, "strict": bool(form.get("strict"))}
    return {
        "id": f"resp_{head.id}",
        **RESPONSE_BEGUN,
        "created_at": head.created,
        "background": bool(body.get("background")),
        "model": head.model,
        "output": [],
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "text": {"format": form, "verbosity": text.get("verbosity") or "medium"},
        "tools": [render_tool(tool) for tool in body.get("tools") or []],
        **{
            key: default if body.get(key) is None else body[key]
            for key, default in RESPONSE_ECHOES.items()
        },
    }


def render_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as the Response object repeats it: a function with all its keys, any other as it came."""
    if tool.get("type", "function") != "function":
        return dict(tool)
    inner = tool.get("function") or tool
    told = {key: inner.get(key) for key in ("name", "description", "parameters")}
    return {"type": "function", **told, "strict": bool(inner.get("strict"))}


def render_item(part: Part, id: str, status: str) -> dict[str, Any] | None:
    """A part as an output item; None for what has no item."""
    match part:
        case Text():
            message = {"id": f"msg_{id}", "type": "message", "role": "assistant", "status": status}
            return message | {"content": [text_part(part)]}
        case Thinking(text, signature):
            sealed = {"encrypted_content": signature} if signature else {}
            return {
                "id": f"rs_{id}",
                "type": "reasoning",
                "summary": [summary_part(text)],
                "status": status,
                **sealed,
            }
        case ToolCall(call_id, name, arguments, namespace=namespace, custom=custom):
            about = {"call_id": call_id, "name": name} | (
                {"namespace": namespace} if namespace else {}
            )
            if custom:
                return {
                    "id": f"ctc_{id}",
                    "type": "custom_tool_call",
                    **about,
                    "input": arguments,
                    "status": status,
                }
            return {
                "id": f"fc_{id}",
                "type": "function_call",
                **about,
                "arguments": arguments,
                "status": status,
            }
        case Media(mime, data) if mime.startswith("image/"):
            return {
                "id": f"ig_{id}",
                "type": "image_generation_call",
                "status": status,
                "result": data,
            }
        case Media() | ToolResult():
            return None
        case _:
            assert_never(part)


def delta_form(item: Mapping[str, Any]) -> tuple[str, dict[str, int], dict[str, Any], str]:
    """The name of an item's deltas, their place in it, what it lacks when it opens, and what they add up to."""
    match item:
        case {"type": "message", "content": [{"text": text}]}:
            return "output_text", {"content_index": 0}, {"content": []}, text
        case {"type": "reasoning", "summary": summary}:
            text = summary[0]["text"] if summary else ""
            return "reasoning_summary_text", {"summary_index": 0}, {"summary": []}, text
        case {"type": "function_call", "arguments": text}:
            return "function_call_arguments", {}, {"arguments": ""}, text
        case {"type": "custom_tool_call", "input": text}:
            return "custom_tool_call_input", {}, {"input": ""}, text
        case {"type": "image_generation_call"}:
            return "", {}, {"result": None}, ""
        case _:
            return "", {}, {}, ""


def text_part(part: Text) -> dict[str, Any]:
    annotations = [
        {"type": "url_citation", **render_citation(citation)} for citation in part.citations
    ]
    return {"type": "output_text", "text": part.text, "annotations": annotations, "logprobs": []}


def summary_part(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def render_response_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def render_input(items: Any, id: str) -> list[dict[str, Any]]:
    """A Responses input as it is kept and listed: each item with its type, an id and a status, contents as parts."""
    given = [{"role": "user", "content": items}] if isinstance(items, str) else items
    made = [render_input_item(item, f"{id}i{number:04x}") for number, item in enumerate(given)]
    names: set[str] = set()
    for number, item in enumerate(made):
        if item["id"] in names:  # else a page that ends here would be sent again and again
            item["id"] = f"item_{id}i{number:04x}"
        names.add(item["id"])
    return made


def render_input_item(item: Mapping[str, Any], id: str) -> dict[str, Any]:
    kind = item.get("type") or "message"
    prefix = "msg" if kind == "message" else "item"
    known = {key: value for key, value in item.items() if value is not None}
    named = isinstance(known.get("id"), str) and known["id"]
    made = {"status": "completed", **known, "type": kind, "id": named or f"{prefix}_{id}"}
    if kind == "message":
        name = "output_text" if item.get("role") == "assistant" else "input_text"
        content = item.get("content") or []
        parts = [{"type": name, "text": content}] if isinstance(content, str) else content
        made["content"] = [render_input_part(part, name) for part in parts]
    elif isinstance(item.get("output"), list):
        made["output"] = [render_input_part(part, "input_text") for part in item["output"]]
    return made


def render_input_part(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part as Responses has it, though chat's parts are taken too."""
    match part:
        case {"type": "text" | "input_text" | "output_text"}:
            known = {key: value for key, value in part.items() if value is not None}
            return {
                **({"annotations": [], "logprobs": []} if name == "output_text" else {}),
                **known,
                "type": name,
            }
        case {"type": "image_url", "image_url": {"url": _} as image}:
            return {
                "type": "input_image",
                "detail": image.get("detail") or "auto",
                "image_url": image["url"],
            }
        case {"type": "input_image" | "image_url"}:
            return {**part, "type": "input_image", "detail": part.get("detail") or "auto"}
        case {"type": "file", "file": inner}:
            return {"type": "input_file", **inner}
        case _:
            return dict(part)


# ==============================================================================
# 8. Embeddings
# ==============================================================================

EMBEDDINGS_MAX = 2048


def parse_embeddings(body: Any) -> EmbeddingRequest:
    """An embeddings body. Raises BadRequest."""
    fields = Fields(body)
    value = fields.value.get("input")
    if value is None:
        fields.missing("input")
    fields.text("user")
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        remedy = "Send a text or texts; for LangChain's Python class set check_embedding_ctx_length=False"
        what = "is empty or not made of strings; token arrays are not served"
        raise fields.wrong("input", what, remedy, "invalid_type")
    if len(texts) > EMBEDDINGS_MAX:
        raise fields.wrong(
            "input", f"holds {len(texts)} texts", f"Send at most {EMBEDDINGS_MAX} at once"
        )
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", f"is '{form}'", "Send float or base64")
    return EmbeddingRequest(
        fields.model(), tuple(map(str, texts)), fields.count("dimensions"), form == "base64"
    )


def render_embeddings(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], tokens: int
) -> dict[str, Any]:
    """The list of embeddings; base64 is of little-endian float32, as OpenAI's SDKs ask for it by default."""

    def shown(vector: Sequence[float]) -> Any:
        return (
            base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            if request.base64
            else vector
        )

    data = [
        {"object": "embedding", "index": i, "embedding": shown(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


# ==============================================================================
# 9. Models
# ==============================================================================

# Names that OpenAI clients are set to by default, by what they promise: fast, strong or small.
BUILTIN_ALIASES: Mapping[str, str] = {
    **dict.fromkeys(
        ("gpt-4o", "gpt-*", "chatgpt-*", "davinci-*", "text-davinci-*"), "gemini-2.5-flash"
    ),
    **dict.fromkeys(
        ("gpt-*mini*", "gpt-*nano*", "gpt-5*nano*", "babbage-*"), "gemini-2.5-flash-lite"
    ),
    **dict.fromkeys(("gpt-5*", "o1*", "o3*", "o4*", "codex*", "claude-*"), "gemini-2.5-pro"),
    **dict.fromkeys(
        ("gpt-5*mini*", "o1-mini*", "o3-mini*", "o4-mini*", "codex*mini*"), "gemini-2.5-flash"
    ),
    **dict.fromkeys(("claude-*haiku*", "claude-instant*"), "gemini-2.5-flash-lite"),
    "text-embedding-*": "gemini-embedding-001",
}
# What is served while the upstream's own list cannot be had.
STATIC_MODELS = (
    "gemini-2.5-pro",
    "gemini-2.5-flash",
    "gemini-2.5-flash-lite",
    "gemini-embedding-001",
)
# Rows are laid over one another: those whose tier and least version (major, minor) fit a model.
# Sources: https://ai.google.dev/gemini-api/docs/thinking, .../models, .../gemini-3; refusals as servers gave them
TRAITS: Sequence[tuple[str, tuple[int, int], Mapping[str, Any]]] = (
    (r".*", (2, 0), {"json_schema": True}),
    (r".*", (2, 5), {"penalties": False, "logprobs": False, "output_tokens_max": 65535}),
    (
        r".*-(image|nano-banana)(-.+)?",
        (0, 0),
        {"answers": ("TEXT", "IMAGE"), "output_tokens_max": 32768},
    ),
    (r".*-tts", (0, 0), {"answers": ("AUDIO",), "output_tokens_max": 16384}),
    (r"-pro", (2, 5), {"thinking": "budget", "thinks": True, "budget": (128, 32768)}),
    (
        r"-flash",
        (2, 5),
        {"thinking": "budget", "thinks": True, "budget": (0, 24576), "can_stop_thinking": True},
    ),
    (
        r"-flash-lite",
        (2, 5),
        {"thinking": "budget", "budget": (512, 24576), "can_stop_thinking": True},
    ),
    (
        r".*",
        (3, 0),
        {"thinking": "level", "thinks": True, "can_stop_thinking": False, "budget": (128, 32768)},
    ),
    (r".*", (3, 0), {"signatures": True, "json_with_tools": True, "files_in_results": True}),
    (r".*", (3, 0), {"levels": ("MINIMAL", "LOW", "MEDIUM", "HIGH")}),
    (r"-pro", (3, 0), {"levels": ("LOW", "HIGH")}),
    (r"-pro(-preview-customtools)?", (3, 1), {"levels": ("LOW", "MEDIUM", "HIGH")}),
    (r"-pro-image", (3, 0), {"levels": ("LOW", "HIGH")}),
    (r"-flash(-lite)?-image", (3, 1), {"levels": ("MINIMAL", "HIGH")}),
    (r".*", (3, 5), {"call_ids": True}),
    (
        r"-flash-lite",
        (3, 5),
        {"sampling": False, "prefill": False},
    ),  # https://github.com/LibreChat-AI/agents/pull/323
    (r".*", (3, 6), {"sampling": False, "prefill": False}),
    (r".*", (3, 7), {"levels": ("LOW", "MEDIUM", "HIGH")}),
    (r".*-nano-banana(-.+)?", (3, 7), {"levels": ("MINIMAL", "MEDIUM", "HIGH")}),
)


@value
class Mapped:
    """The upstream's name for a model, and by which rule."""

    model: str
    rule: str
    wished: str | None = None  # what the rule said, where the upstream lists another name for it


def map_model(name: str, config: Config, listed: Sequence[str] | None) -> Mapped:
    """User exact > user wildcard > built-in > listed > gemini-* as it is > models.default. `listed` is None when unknown.

    Raises ModelNotFound with near names.
    """
    bare = re.sub(r"^(models|openai|google)/", "", name)
    for title, table in (("models.map", config.aliases), ("built-in", BUILTIN_ALIASES)):
        if pattern := look_up(bare, table):
            return settled(table[pattern], f"{title} '{pattern}'", listed)
    if bare in (listed or STATIC_MODELS):
        return Mapped(bare, "listed by the upstream")
    if re.fullmatch(r"gemini-[\w.-]+", bare, re.ASCII):
        return settled(bare, "a gemini name as it is", listed)
    if config.default_model:
        return settled(config.default_model, "models.default", listed)
    near = difflib.get_close_matches(
        bare, [*config.aliases, *(listed or STATIC_MODELS), *BUILTIN_ALIASES], 3, 0.4
    )
    hint = f" Near names: {', '.join(near)}." if near else ""
    raise ModelNotFound(
        f"The model '{name}' is not known.{hint} Use one of GET /v1/models, or map it in models.map.",
        param="model",
    )


def look_up(name: str, table: Iterable[str]) -> str | None:
    """The table's key for a name: itself, else the wildcard with most literal characters, then the longest start."""
    if name in table:
        return name
    hits = [pattern for pattern in table if "*" in pattern and wildcard(pattern).fullmatch(name)]
    return max(hits, key=lambda p: (len(p.replace("*", "")), len(p.split("*")[0])), default=None)


@functools.lru_cache(1024)
def wildcard(pattern: str) -> re.Pattern[str]:
    """What a pattern with stars matches, without trying each way to spread a long name over many stars."""
    first, *middle, last = map(re.escape, pattern.split("*"))
    return re.compile(first + "".join(f"(?>.*?{piece})" for piece in middle) + f".*{last}")


VERSION = re.compile(r"gemini-(\d+)(?:\.(\d+))?")
SUFFIX = re.compile(r"(-preview|-latest|-exp|-\d{2,4})+$")


def settled(model: str, rule: str, listed: Sequence[str] | None) -> Mapped:
    """A gemini name as the upstream lists it: itself, itself but for -preview, a date or -latest, or its tier's newest."""
    if listed is None or model in listed or not model.startswith("gemini-"):
        return Mapped(model, rule)
    twins = [name for name in listed if SUFFIX.sub("", name) == SUFFIX.sub("", model)]
    tier = [name for name in listed if tier_of(name) == tier_of(model)]
    best = max(
        twins or tier,
        key=lambda name: (version_of(name), not SUFFIX.search(name), name),
        default=None,
    )
    return Mapped(best, rule, wished=model) if best else Mapped(model, rule)


def tier_of(model: str) -> str:
    """What is left of a name without version and suffix: pro, flash, flash-lite, ..."""
    return VERSION.sub("", SUFFIX.sub("", model))


def version_of(model: str) -> tuple[int, int]:
    match = VERSION.search(model)
    return (int(match[1]), int(match[2] or 0)) if match else (4, 0)  # the newest


def traits_of(model: str, overrides: Mapping[str, Mapping[str, Any]]) -> Traits:
    """Traits by tier and parsed version, a name without one counting as the newest; `overrides` (models.traits) win."""
    version, tier = (
        (version_of(model), tier_of(model)) if model.startswith("gemini-") else ((0, 0), model)
    )
    values: dict[str, Any] = {}
    for pattern, least, row in TRAITS:
        if version >= least and re.fullmatch(pattern, tier):
            values |= row
    if given := look_up(model, overrides):
        values |= overrides[given]
    return Traits(**values)


# ==============================================================================
# 10. To Gemini
# ==============================================================================

# Accepted by Gemini 3 in place of a thought signature that it did not make.
# Source: https://ai.google.dev/gemini-api/docs/thought-signatures
SIGNATURE_SENTINEL = "skip_thought_signature_validator"
# A limit below is used up by thoughts alone: https://github.com/valentinfrlch/ha-llmvision/issues/609
THOUGHTFUL_TOKENS_MIN = 1024
# Source: https://ai.google.dev/gemini-api/docs/openai#thinking
EFFORT_BUDGETS = dict(zip(EFFORTS, (0, 512, 1024, 8192, 24576, 32768, 32768), strict=True))
TOOL_NAME_MAX = 64
TOOL_NAME = re.compile(r"[A-Za-z_][\w.:-]*", re.ASCII)
ANSWER_TOOL = "give_final_answer"
# Google's Schema has these words as JSON Schema has them, of these types; the handled ones are translated.
SCHEMA_WORDS: Mapping[str, Any] = {
    **dict.fromkeys(("title", "description", "format", "pattern"), str),
    **dict.fromkeys(("default", "example"), object),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), int
    ),
    **dict.fromkeys(("minimum", "maximum"), (int, float)),
    "nullable": bool,
    "propertyOrdering": list,
}
SCHEMA_HANDLED = {
    *(
        "type",
        "enum",
        "const",
        "items",
        "properties",
        "required",
        "exclusiveMinimum",
        "exclusiveMaximum",
    ),
    *("anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "$schema", "$id"),
}
SCHEMA_DATA = {"const", "default", "enum", "examples"}  # whose values are no schemas
# Without any of these a function takes no arguments.
SCHEMA_CONTENT = (
    "properties",
    "$ref",
    "anyOf",
    "oneOf",
    "allOf",
    "patternProperties",
    "additionalProperties",
)
SCHEMA_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")
JSON_TYPES = dict(zip((str, float, int, bool, list, dict, type(None)), SCHEMA_TYPES, strict=True))
SCHEMA_DEPTH_MAX = 32
SCHEMA_NODES_MAX = 2000
Dialect = Literal["gemini", "vertex"]
Refs = tuple[str, ...]  # of a schema, on the way to the part that is read
PLACEHOLDER = "…"


@value
class Built:
    """A generateContent body, what could not be carried into it, and how its answer's calls are read back."""

    body: dict[str, Any]
    changes: tuple[Change, ...]
    tools: Mapping[str, Tool]
    """By the name that Gemini knows them by, those whose calls are not simply calls of that name."""


def build_generate_content(request: Request, traits: Traits, dialect: Dialect = "gemini") -> Built:
    """Source: https://ai.google.dev/api/generate-content#request-body"""
    return Builder(request, traits, dialect).build()


class Builder:
    """Builds one body; `changes` grows as it goes."""

    def __init__(self, request: Request, traits: Traits, dialect: Dialect) -> None:
        self.request = request
        self.traits = traits
        self.messages = request.sources.get("messages", "/messages")
        self.limit_source = request.sources.get("max_output_tokens", "/max_tokens")
        self.takes_json_schema = traits.json_schema and dialect == "gemini"
        self.changes: list[Change] = []
        self.names: dict[tuple[str | None, str], str] = {}
        self.taken: set[str] = set()
        self.answered: set[int] = set()  # by id(), the results that stand behind their calls

    def build(self) -> Built:
        request = self.request
        for tool in request.tools:
            self.name(tool.namespace, tool.name, tool.source)
        tools = self.tools()
        config = self.generation_config()
        system = [text for text in request.system if text]
        if answer := self.answer_by_tool(config, system, tools):
            self.name(answer.namespace, answer.name)
            tools.append(answer)
        body: dict[str, Any] = {"contents": self.contents()}
        if system:
            body["systemInstruction"] = {"parts": [{"text": text} for text in system]}
        if tools:
            body["tools"] = [{"functionDeclarations": [self.declaration(tool) for tool in tools]}]
            body["toolConfig"] = {"functionCallingConfig": self.calling_config(answer)}
        self.search(body, config)
        if config:
            body["generationConfig"] = config
        return Built(body, tuple(dict.fromkeys(self.changes)), self.renamed(tools))

    def change(self, pointer: str, kind: ChangeKind, reason: str) -> None:
        self.changes.append(Change(pointer, kind, reason))

    # ---- tools

    def name(self, namespace: str | None, name: str, source: str = "") -> str:
        """The name that Gemini takes for a tool: its own where it may, else a short one that is never another's."""
        if known := self.names.get((namespace, name)):
            return known
        made = whole = f"{namespace}__{name}" if namespace else name
        if not TOOL_NAME.fullmatch(whole):
            made = re.sub(r"^(?![A-Za-z_])", "_", re.sub(r"[^\w.:-]", "_", whole, flags=re.ASCII))
        if len(made) > TOOL_NAME_MAX or made in self.taken:
            exact = encoded(name if namespace is None else f"{namespace}\0{name}")
            made = f"{made[: TOOL_NAME_MAX - 9]}_{hashlib.sha256(exact).hexdigest()[:8]}"
        if made != name and source:
            self.change(
                f"{pointer_of(source)}/name", "renamed", f"Gemini knows '{whole}' as '{made}'"
            )
        self.names[namespace, name] = made
        self.taken.add(made)
        return made

    def renamed(self, tools: Iterable[Tool]) -> dict[str, Tool]:
        """The tools of whose calls a reader must know more than their name; a stream holds them for long."""
        named = [(self.names[tool.namespace, tool.name], tool) for tool in tools]
        odd = [(n, t) for n, t in named if n != t.name or t.namespace or t.custom or t.answers]
        return {name: replace(tool, description="", parameters=None) for name, tool in odd}

    def tools(self) -> list[Tool]:
        """The tools to declare: all, or those that an optional choice allows."""
        choice = self.request.tool_choice
        if choice.mode == "none" and self.request.json_format and not self.traits.json_with_tools:
            return []  # none may be called, and without them the answer can be JSON
        if choice.mode != "auto" or not choice.names:
            return list(self.request.tools)
        self.change("/tool_choice", "emulated", "only the allowed tools are declared")
        return [tool for tool in self.request.tools if tool.name in choice.names]

    def declaration(self, tool: Tool) -> dict[str, Any]:
        name = self.names[tool.namespace, tool.name]
        declaration: dict[str, Any] = {"name": name, "description": tool.description or tool.name}
        schema = tool.parameters
        if not schema or not any(schema.get(key) for key in SCHEMA_CONTENT):
            return declaration
        if self.takes_json_schema:
            return declaration | {"parametersJsonSchema": lone_refs(schema)}
        source = tool.source if tool.answers else f"{pointer_of(tool.source)}/{tool.schema_key}"
        reduced = SchemaReducer(schema, source, self.changes).reduce(schema) or {}
        return declaration | (
            {"parameters": reduced} if reduced.keys() & {"properties", "anyOf"} else {}
        )

    def calling_config(self, answer: Tool | None) -> dict[str, Any]:
        choice = self.request.tool_choice
        if answer is not None and choice.mode == "auto":
            return {"mode": "ANY"}
        config: dict[str, Any] = {
            "mode": {"auto": "AUTO", "none": "NONE", "required": "ANY"}[choice.mode]
        }
        if choice.names and choice.mode == "required":
            named = [tool for tool in self.request.tools if tool.name in choice.names]
            config["allowedFunctionNames"] = [
                self.name(tool.namespace, tool.name) for tool in named
            ]
        return config

    def search(self, body: dict[str, Any], config: Mapping[str, Any]) -> None:
        source = self.request.sources.get("search")
        if not source:
            return
        if "tools" in body:
            self.change(source, "dropped", "web search cannot be combined with functions")
        elif "responseMimeType" in config and not self.traits.json_with_tools:
            self.change(
                source, "dropped", "this model cannot search the web where JSON is asked for"
            )
        else:
            body["tools"] = [{"googleSearch": {}}]

    def answer_by_tool(
        self, config: dict[str, Any], system: list[str], tools: Sequence[Tool]
    ) -> Tool | None:
        """Where JSON cannot be asked for beside tools: a further tool that takes the answer, or an instruction.

        Source: https://ai.google.dev/gemini-api/docs/structured-output (2.x: "Function calling with a response mime
        type: 'application/json' is unsupported"; 3.x refuses it with mode ANY)
        """
        request, source = self.request, self.request.sources.get("json_format", "/response_format")
        forced = request.tool_choice.mode == "required"
        if not request.json_format or not tools or (self.traits.json_with_tools and not forced):
            return None
        schema = config.pop("responseJsonSchema", None) or config.pop("responseSchema", None)
        del config["responseMimeType"]
        if forced:
            self.change(source, "dropped", "a call is demanded, so no text can follow the schema")
            return None
        if schema and schema.get("properties") and request.tool_choice.mode == "auto":
            self.change(source, "emulated", f"asked for as a call of '{ANSWER_TOOL}'")
            text = "Give the final answer by calling this, once no other tool is needed."
            return Tool(
                ANSWER_TOOL,
                text,
                request.json_format.schema,
                namespace="",
                source=source,
                answers=True,
            )
        self.change(source, "emulated", "asked for by an instruction")
        told = f" {dumps(schema)}" if schema else ""
        system.append(f"Answer with one JSON value alone, without Markdown fences.{told}")
        return None

    # ---- generationConfig

    def generation_config(self) -> dict[str, Any]:
        request, traits = self.request, self.traits
        config: dict[str, Any] = {
            "temperature": self.sampled("temperature", request.temperature, traits.sampling),
            "topP": self.sampled("top_p", request.top_p, traits.sampling),
            "presencePenalty": self.sampled(
                "presence_penalty", request.presence_penalty or None, traits.penalties
            ),
            "frequencyPenalty": self.sampled(
                "frequency_penalty", request.frequency_penalty or None, traits.penalties
            ),
            "seed": request.seed,
            "stopSequences": list(request.stop) or None,
            "responseModalities": self.modalities(),
            "imageConfig": self.image_config(),
        }
        field = request.sources.get("logprobs", "logprobs")
        if self.sampled(field, request.logprobs, traits.logprobs) is not None:
            config |= {"responseLogprobs": True, "logprobs": request.logprobs or None}
        if request.json_format is not None:
            config |= self.json_output(request.json_format)
        thinking = self.thinking()
        config["thinkingConfig"] = thinking or None
        config["maxOutputTokens"] = self.output_limit(thinking)
        return {key: value for key, value in config.items() if value is not None}

    def sampled(self, field: str, value: float | None, served: bool) -> float | None:
        if value is None or served:
            return value
        self.change(f"/{field}", "dropped", "this model does not take it")
        return None

    def modalities(self) -> list[str] | None:
        """What the answer is made of, where that is not the model's default."""
        if self.traits.answers == ("AUDIO",):
            return ["AUDIO"]
        if "image" not in self.request.modalities:
            return None
        if "IMAGE" in self.traits.answers:
            return list(self.traits.answers)
        self.change("/modalities", "dropped", "this model makes no images")
        return None

    def image_config(self) -> dict[str, str] | None:
        ratio, size = self.request.aspect_ratio, self.request.image_size
        if not (ratio or size):
            return None
        if "IMAGE" not in self.traits.answers:
            self.change("/image_config", "dropped", "this model makes no images")
            return None
        return ({"aspectRatio": ratio} if ratio else {}) | ({"imageSize": size} if size else {})

    def json_output(self, form: JsonFormat) -> dict[str, Any]:
        config: dict[str, Any] = {"responseMimeType": "application/json"}
        if form.schema and self.takes_json_schema:
            config["responseJsonSchema"] = lone_refs(form.schema)
        elif form.schema:
            source = self.request.sources.get("json_format", "/response_format")
            reduced = SchemaReducer(form.schema, source, self.changes).reduce(form.schema) or {}
            if reduced and (reduced.get("type") != "OBJECT" or "properties" in reduced):
                config["responseSchema"] = reduced
        return config

    def thoughts_max(self, thinking: Mapping[str, Any]) -> int:
        """How many tokens the thoughts shall take; 0 where nothing is said of them, for the limit bounds the bill too."""
        level: str = thinking.get("thinkingLevel", "none")
        budget: int = thinking.get("thinkingBudget", EFFORT_BUDGETS[level.lower()])
        return max(0, budget)

    def output_limit(self, thinking: Mapping[str, Any]) -> int | None:
        """Gemini counts thoughts against the limit, so that they are added to what the client wants to read."""
        wanted = self.request.max_output_tokens
        if wanted is None:
            return None
        limit = min(wanted + self.thoughts_max(thinking), self.traits.output_tokens_max)
        if limit < wanted:
            self.change(self.limit_source, "clamped", f"the model's limit is {limit}")
        elif limit > wanted:
            self.change(
                self.limit_source, "clamped", f"raised to {limit}: thoughts count against it"
            )
        return limit

    def thinking(self) -> dict[str, Any]:
        wish, traits = self.wish(), self.traits
        asked = wish.effort is not None or wish.budget is not None
        if traits.thinking == "none":
            if asked:
                self.change(wish.source, "dropped", "this model does not think")
            return {}
        by = self.level if traits.thinking == "level" else self.budget
        config: dict[str, Any] = by(wish) if asked else {}
        quiet = config.get("thinkingBudget") == 0 if config else not traits.thinks
        return config | ({"includeThoughts": True} if wish.show and not quiet else {})

    def wish(self) -> ThinkingWish:
        """What shall be thought: what the client says, else little before an answer that it wants short."""
        wish, limit = self.request.thinking, self.request.max_output_tokens
        if limit is None or limit >= THOUGHTFUL_TOKENS_MIN or not self.traits.thinks:
            return wish
        if wish.effort is not None or wish.budget is not None:
            return wish
        self.change(self.limit_source, "clamped", "before so short an answer little is thought")
        least = (
            "none" if self.traits.thinking == "budget" else "low"
        )  # which all models of words have
        return replace(wish, effort=least, source=self.limit_source)

    def level(self, wish: ThinkingWish) -> dict[str, Any]:
        if wish.effort is None:
            return self.budget(wish)  # accepted for compatibility
        wanted = effort_of(wish.effort)
        ladder = sorted(EFFORTS.index(level.lower()) for level in self.traits.levels)
        rung = next((rung for rung in ladder if rung >= EFFORTS.index(wanted)), ladder[-1])
        if EFFORTS[rung] != wish.effort.lower():
            self.change(wish.source, "clamped", f"'{wish.effort}' becomes '{EFFORTS[rung]}'")
        return {"thinkingLevel": EFFORTS[rung].upper()}

    def budget(self, wish: ThinkingWish) -> dict[str, Any]:
        low, high = self.traits.budget
        wanted = (
            wish.budget if wish.budget is not None else EFFORT_BUDGETS[effort_of(wish.effort or "")]
        )
        may_stop = wanted == 0 and self.traits.can_stop_thinking
        budget = wanted if wanted == -1 or may_stop else min(max(wanted, low), high)
        if budget != wanted or (
            wish.effort is not None and wish.effort.lower() not in EFFORT_BUDGETS
        ):
            self.change(wish.source, "clamped", f"a budget of {budget} tokens")
        return {"thinkingBudget": budget}

    # ---- contents

    def contents(self) -> list[dict[str, Any]]:
        """Turns as Gemini takes them: neighbours of one role merged, and each turn of calls answered by exactly one turn
        of results, in call order, whatever order the client sent.

        Source: https://ai.google.dev/gemini-api/docs/function-calling (seen as 400s otherwise)
        """
        answers = matched_results(self.request.messages)
        self.answered = {id(result) for result in answers.values()}
        contents: list[dict[str, Any]] = []
        for message in self.request.messages:
            role, said = (
                ("model" if message.role == "assistant" else "user"),
                self.parts(message.parts),
            )
            add_turn(
                contents,
                role,
                self.signed(said) if role == "model" and self.traits.signatures else said,
            )
            if calls := [part for part in message.parts if isinstance(part, ToolCall)]:
                contents += self.results(calls, [answers.get(id(call)) for call in calls])
        self.end(contents)
        return contents

    def end(self, contents: list[dict[str, Any]]) -> None:
        """Makes the last turn the user's where the model demands it, and never sends no turn at all."""
        if not contents:
            contents.append({"role": "user", "parts": [{"text": PLACEHOLDER}]})
        if contents[-1]["role"] == "model" and not self.traits.prefill:
            self.change(
                self.messages, "emulated", "this model goes on with an answer only when asked to"
            )
            contents.append(
                {"role": "user", "parts": [{"text": "Continue exactly where you stopped."}]}
            )

    def parts(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        built: list[dict[str, Any]] = []
        for part in parts:
            if part.__class__ is Text and part.text and part.signature is None:  # nine of ten
                built.append({"text": part.text})
            else:
                built += self.part(part)
        return built

    def signed(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a model said, with a signature where it misses one: on the first call, or, makes it images, on all.

        Source: https://ai.google.dev/gemini-api/docs/gemini-3#thought_signatures
        """
        calls = (part for part in parts if "functionCall" in part)
        for part in parts if "IMAGE" in self.traits.answers else itertools.islice(calls, 1):
            part.setdefault("thoughtSignature", SIGNATURE_SENTINEL)
        return parts

    def part(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Text(text, signature):
                return text_parts(text, signature) if text or signature else []
            case Media():
                return [media_part(part)]
            case ToolCall(call_id, name, arguments, signature, namespace, custom):
                args = {"input": arguments} if custom else arguments_object(arguments)
                call: dict[str, Any] = {"name": self.name(namespace, name), "args": args}
                call |= {"id": call_id} if self.traits.call_ids else {}
                return [
                    {"functionCall": call} | ({"thoughtSignature": signature} if signature else {})
                ]
            case ToolResult(parts=parts) if id(part) not in self.answered:
                self.change(
                    self.messages, "emulated", "a result without a call is passed on as text"
                )
                return self.parts(parts)
            case Thinking() | ToolResult():
                return []
            case _:
                assert_never(part)

    def results(
        self, calls: Sequence[ToolCall], results: Sequence[ToolResult | None]
    ) -> list[dict[str, Any]]:
        """A turn of one functionResponse a call; files inside it where the model takes them there, else a turn behind."""
        made: list[dict[str, Any]] = []
        files: list[dict[str, Any]] = []
        if None in results:
            self.change(
                self.messages,
                "emulated",
                "a call without a result is answered with a note that there is none",
            )
        for call, result in zip(calls, results, strict=True):
            response: dict[str, Any] = {
                "name": self.name(call.namespace, call.name),
                "response": result_object(result),
            }
            response |= {"id": call.id} if self.traits.call_ids else {}
            media = [part for part in result.parts if isinstance(part, Media)] if result else []
            inside = [
                media_part(part) for part in media if part.data and self.traits.files_in_results
            ]
            response |= {"parts": inside} if inside else {}
            files += [media_part(part) for part in media if not (part.data and inside)]
            made.append({"functionResponse": response})
        return [{"role": "user", "parts": parts} for parts in (made, files) if parts]


def matched_results(messages: Iterable[Message]) -> dict[int, ToolResult]:
    """The result of each call, by the call's id(): that of the nearest call before it, else of one that waits in vain.

    Clients use ids again, send results in any order, and some before their calls.
    """
    answers: dict[int, ToolResult] = {}
    open_calls: dict[str, list[tuple[int, ToolCall]]] = {}
    early: list[ToolResult] = []
    for position, message in enumerate(messages):
        for part in message.parts:
            if isinstance(part, ToolCall):
                open_calls.setdefault(part.id, []).append((position, part))
            elif isinstance(part, ToolResult) and (waiting := open_calls.get(part.call_id)):
                nearest = next(one for one in waiting if one[0] == waiting[-1][0])
                waiting.remove(nearest)
                answers[id(nearest[1])] = part
            elif isinstance(part, ToolResult):
                early.append(part)
    for result in early:
        if waiting := open_calls.get(result.call_id):
            answers[id(waiting.pop(0)[1])] = result
    return answers


def add_turn(contents: list[dict[str, Any]], role: str, parts: list[dict[str, Any]]) -> None:
    if not parts:
        return
    last = contents[-1] if contents else None
    if last and last["role"] == role and "functionResponse" not in last["parts"][0]:
        last["parts"].extend(parts)
    elif not last and role == "model":
        contents.extend(
            [{"role": "user", "parts": [{"text": PLACEHOLDER}]}, {"role": role, "parts": parts}]
        )
    else:
        contents.append({"role": role, "parts": parts})


def text_parts(text: str, signature: Signature | None) -> list[dict[str, Any]]:
    """A text as Gemini sent it: the signed piece apart from what stood before and after it."""
    if signature is None:
        return [{"text": text}]
    before, signed, after = (
        text[: signature.start],
        text[signature.start : signature.end],
        text[signature.end :],
    )
    around = [[{"text": piece}] if piece else [] for piece in (before, after)]
    return [*around[0], {"text": signed, "thoughtSignature": signature.value}, *around[1]]


def media_part(media: Media) -> dict[str, Any]:
    if media.url:
        return {
            "fileData": {"fileUri": media.url} | ({"mimeType": media.mime} if media.mime else {})
        }
    data: dict[str, Any] = {"inlineData": {"mimeType": media.mime, "data": media.data}}
    return data | ({"thoughtSignature": media.signature} if media.signature else {})


def arguments_object(arguments: str) -> dict[str, Any]:
    """A call's arguments as the object that Gemini wants; what is no object is kept inside one."""
    value = parse_strict(arguments or "{}")
    return value if isinstance(value, dict) else {"input": arguments if value is None else value}


def result_object(result: ToolResult | None) -> dict[str, Any]:
    """A tool's answer as an object: a JSON object as it is, anything else as text.

    A `$ref` inside would be read as a reference: https://github.com/BerriAI/litellm/issues/38223
    """
    if result is None:
        return {"error": "(no result was given for this call)"}
    text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
    value = parse_strict(text) if text.lstrip().startswith("{") and '"$ref"' not in text else None
    return value if isinstance(value, dict) else {"output": text}


def effort_of(word: str) -> str:
    """The nearest known effort."""
    near = difflib.get_close_matches(word[:20].lower(), EFFORTS, 1, 0.0)
    return near[0] if word else "medium"


def choices_of(request: Request) -> list[Request]:
    """A request for each of `n` choices; a seed counts up, for with the same one they would be the same."""
    if request.seed is None:
        return [request] * request.n
    return [
        replace(request, seed=(request.seed + choice) & 0x7FFFFFFF) for choice in range(request.n)
    ]


def build_embeddings(texts: Sequence[str], model: str, dimensions: int | None) -> dict[str, Any]:
    """Source: https://ai.google.dev/api/embeddings#method:-models.batchembedcontents"""
    about: dict[str, Any] = {"model": f"models/{model}"} | (
        {"outputDimensionality": dimensions} if dimensions else {}
    )
    return {"requests": [about | {"content": {"parts": [{"text": text}]}} for text in texts]}


def lone_refs(schema: Any, depth: int = 0) -> Any:
    """A JSON Schema with each `$ref` that has company in an anyOf of its own: Google takes only `$` keys beside one.

    Source: https://ai.google.dev/api/generate-content#GenerationConfig, https://github.com/google-gemini/gemini-cli/issues/4758
    """
    if depth > 4 * SCHEMA_DEPTH_MAX or not isinstance(schema, list | dict):
        return schema
    if isinstance(schema, list):
        return [lone_refs(one, depth + 1) for one in schema]
    if not depth and not schema.keys() & {"$defs", "definitions"}:
        return schema  # there is nothing to refer to
    made = {
        key: value if key in SCHEMA_DATA else lone_refs(value, depth + 1)
        for key, value in schema.items()
    }
    if (
        isinstance(made.get("$ref"), str)
        and "anyOf" not in made
        and any(key[:1] != "$" for key in made)
    ):
        made["anyOf"] = [{"$ref": made.pop("$ref")}]
    return made


class SchemaReducer:
    """JSON Schema to Google's Schema subset: references inlined with cycles cut, unions as anyOf, the rest reported.

    Takes anything, also what is no schema at all. Source: https://ai.google.dev/api/caching#Schema
    """

    def __init__(self, root: Mapping[str, Any], pointer: str, changes: list[Change]) -> None:
        self.root = root
        self.pointer = pointer
        self.changes = changes
        self.lost: set[str] = set()
        self.left = SCHEMA_NODES_MAX

    def report(self, key: str) -> None:
        if key not in self.lost:
            self.lost.add(key)
            self.changes.append(
                Change(
                    self.pointer, "dropped", f"the schema's '{key}' is not known to this upstream"
                )
            )

    def reduce(self, schema: Any, seen: Refs = (), depth: int = 0) -> dict[str, Any] | None:
        """The reduced schema; None where it would contain itself, or is too deep or too large."""
        self.left -= 1
        if self.left < 0 or depth > SCHEMA_DEPTH_MAX:
            self.report("depth")
            return None
        if not isinstance(schema, Mapping):
            return {"type": "STRING"}
        resolved = self.resolved(schema, seen)
        if resolved is None:
            return None
        schema, seen = resolved
        made = self.words(schema)
        for key in schema.keys() - SCHEMA_WORDS.keys() - SCHEMA_HANDLED:
            self.report(key)
        kinds = self.kinds(schema)
        if union := self.union(schema, kinds):
            options = [self.reduce(option, seen, depth + 1) for option in union]
            return one_of(made, [option for option in options if option])
        if len(kinds) > 1:
            return one_of(made, [self.shaped({}, schema, kind, seen, depth + 1) for kind in kinds])
        return self.shaped(made, schema, kinds[0] if kinds else "string", seen, depth)

    # ---- references and allOf

    def resolved(
        self, schema: Mapping[str, Any], seen: Refs, depth: int = 0
    ) -> tuple[dict[str, Any], Refs] | None:
        """The schema with what it refers to and its allOf laid into it; None where that has no end or is not there."""
        if depth > SCHEMA_DEPTH_MAX:
            self.report("depth")
            return None
        whole = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        if "$ref" in schema:
            ref = str(schema["$ref"])
            target = self.target(ref)
            if target is None or ref in seen:
                self.report("$ref")
                return None if ref in seen else (whole, seen)
            inner = self.resolved(target, (*seen, ref), depth + 1)
            if inner is None:
                return None
            lay_under(whole, inner[0])
            seen = inner[1]
        for part in objects_in(schema.get("allOf")):
            if (inner := self.resolved(part, seen, depth + 1)) is not None:
                lay_under(whole, inner[0])
                seen = inner[1]
        return whole, seen

    def target(self, ref: str) -> Mapping[str, Any] | None:
        found: Any = self.root
        if not re.match(r"#($|/)", ref):
            return None
        for step in ref.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else None

    # ---- one schema

    def words(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """What the subset has under the same name, where it has the right type."""
        made = {
            key: value for key, value in schema.items() if key in SCHEMA_WORDS and value is not None
        }
        for key, value in list(made.items()):
            kind = SCHEMA_WORDS[key]
            wrong = not isinstance(value, kind) or (
                isinstance(value, bool) and kind is not bool and kind is not object
            )
            if (
                wrong
                or (kind is int and not 0 <= value < 1 << 31)
                or (kind is list and not texts_only(value))
            ):
                del made[key]
                self.report(key)
        return made

    def kinds(self, schema: Mapping[str, Any]) -> list[str]:
        """The types that a schema names or implies; "null" is the last one."""
        given = schema.get("type")
        named = [str(kind).lower() for kind in (given if isinstance(given, list) else [given])]
        kinds = [kind for kind in named if kind in SCHEMA_TYPES]
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if not kinds and isinstance(values, list):
            kinds = [JSON_TYPES.get(type(value), "string") for value in values]
        if not kinds:
            kinds = ["object"] if "properties" in schema else ["array"] if "items" in schema else []
        if isinstance(values, list) and None in values:
            kinds.append("null")
        return sorted(dict.fromkeys(kinds), key="null".__eq__)

    def union(self, schema: Mapping[str, Any], kinds: Sequence[str]) -> list[Any]:
        """The options of a schema that is nothing but a choice among them; beside a type of its own they are lost."""
        unions = {key: schema[key] for key in ("anyOf", "oneOf") if objects_in(schema.get(key))}
        plain = kinds not in ([], ["object"]) or schema.get("properties")
        for key in list(unions)[0 if plain else 1 :]:
            self.report(key)
        return [] if plain or not unions else objects_in(next(iter(unions.values())))

    def shaped(
        self, made: dict[str, Any], schema: Mapping[str, Any], kind: str, seen: Refs, depth: int
    ) -> dict[str, Any]:
        """The schema as one of its types."""
        if kind == "null":
            return {"type": "NULL"}
        made["type"] = kind.upper()
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            texts = [value for value in values if value is not None]
            if texts_only(texts) and kind == "string":
                made |= {"enum": texts} if texts else {}
            else:
                self.report("const" if "const" in schema else "enum")
        if kind == "array":
            items = schema.get("items")
            if isinstance(items, list):
                self.report("items")
            made["items"] = self.reduce(items, seen, depth + 1) or {"type": "STRING"}
        elif kind == "object":
            made |= self.members(schema, seen, depth)
        self.limits(schema, made, kind)
        return made

    def members(self, schema: Mapping[str, Any], seen: Refs, depth: int) -> dict[str, Any]:
        given = schema.get("properties")
        inner = given.items() if isinstance(given, Mapping) else ()
        properties = {
            str(name): made for name, one in inner if (made := self.reduce(one, seen, depth + 1))
        }
        names = schema.get("required")
        required = [
            name for name in (names if isinstance(names, list) else ()) if texts_only([name])
        ]
        required = [name for name in dict.fromkeys(required) if name in properties]
        if not properties and depth:
            properties = {
                "_": {"type": "STRING", "nullable": True}
            }  # an object without properties is refused
        return (
            {"properties": properties} | ({"required": required} if required else {})
            if properties
            else {}
        )

    def limits(self, schema: Mapping[str, Any], made: dict[str, Any], kind: str) -> None:
        """Exclusive limits, where whole numbers let them be said otherwise; true is how draft 4 marked a plain one."""
        for key, plain, step in (
            ("exclusiveMinimum", "minimum", 1),
            ("exclusiveMaximum", "maximum", -1),
        ):
            limit = made.get(plain) if schema.get(key) is True else schema.get(key)
            if limit is None or schema.get(key) is False:
                continue
            if kind != "integer" or isinstance(limit, bool) or not isinstance(limit, int | float):
                self.report(key)
                continue
            nearest = (math.floor(limit) if step > 0 else math.ceil(limit)) + step
            made[plain] = (max if step > 0 else min)(nearest, made.get(plain, nearest))


def lay_under(whole: dict[str, Any], inner: Mapping[str, Any]) -> None:
    """Adds what a schema inherits to what it says itself."""
    for key, value in inner.items():
        own = whole.get(key)
        if key == "properties" and isinstance(value, Mapping) and isinstance(own, Mapping):
            whole[key] = {**value, **own}
        elif key == "required" and isinstance(value, list) and isinstance(own, list):
            whole[key] = [*own, *value]
        else:
            whole.setdefault(key, value)


def one_of(made: dict[str, Any], options: list[dict[str, Any]]) -> dict[str, Any]:
    """A schema that is one of several; null among them is said by `nullable`.

    Vertex refuses a declaration that says anything beside anyOf: https://github.com/akitaonrails/ai-memory/issues/735
    """
    options = [one for option in options for one in option.get("anyOf", [option])]
    plain = [option for option in options if option.get("type") != "NULL"]
    if plain and len(plain) < len(options):
        made["nullable"] = True
    if len(plain) > 1:
        return {"anyOf": [made | option for option in plain]}
    return (plain or options or [{"type": "STRING"}])[0] | made


def texts_only(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def countable(kind: str, model: str, body: bytes) -> bytes:
    """What countTokens takes of a body: the Gemini API the whole, the others words and tools, v1internal turns alone."""
    if kind == "gemini":
        return b'{"generateContentRequest":{"model":"models/%b",%b}' % (encoded(model), body[1:])
    whole = json.loads(body)
    if kind == "vertex":
        return dump_bytes(
            {key: whole[key] for key in ("contents", "systemInstruction", "tools") if key in whole}
        )
    system = (
        [{"role": "user", **whole["systemInstruction"]}] if "systemInstruction" in whole else []
    )
    return dump_bytes(
        {"request": {"model": f"models/{model}", "contents": [*system, *whole["contents"]]}}
    )


def unsigned(part: Part) -> Part:
    return replace(part, signature=None) if isinstance(part, ToolCall | Text) else part


def refuse_dropped(changes: Iterable[Change]) -> None:
    """Raises BadRequest where something of a request would be lost."""
    lost = [change for change in changes if change.kind == "dropped"]
    if lost:
        told = "; ".join(f"{change.pointer}: {change.reason}" for change in lost)
        text = f"Not everything can be carried over ({told}). Leave it out, or allow it by proxy.strict: false."
        raise BadRequest(
            text, code="unsupported_parameter", param=lost[0].pointer.strip("/").replace("/", ".")
        )


# ==============================================================================
# 11. From Gemini
# ==============================================================================

# Gemini's finish reasons; what is not here counts as "stop" and is an error when nothing was said.
# Source: https://ai.google.dev/api/generate-content#FinishReason
FINISH_REASONS: Mapping[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    **dict.fromkeys(
        ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"),
        "content_filter",
    ),
    **dict.fromkeys(
        ("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "MODEL_ARMOR"),
        "content_filter",
    ),
}
CALLS_MAX = 1000
CALL_ID_MAX = 64  # OpenAI's own limit
# What an error body of Gemini means: the first row whose statuses and pattern fit it. What fits none is broken, or
# overloaded where the status is no known one (529 comes from proxies).
# Source: https://ai.google.dev/gemini-api/docs/troubleshooting; the texts as servers gave them
REFUSALS: Sequence[tuple[Sequence[int], str, type[UpstreamError], str | None]] = (
    ((429,), r"limit: 0\b|PerDay|Daily|QUOTA_EXHAUSTED|INSUFFICIENT_G1_CREDITS", QuotaGone, None),
    ((429, 503), r"MODEL_CAPACITY_EX|No capacity available", Overloaded, None),
    (
        (403, 429),
        r"(?i)abus|unusual traffic|terms of service|TOS_VIOLATION|suspended|leaked",
        AccountBarred,
        None,
    ),
    ((403,), r"VALIDATION_REQUIRED|SECURITY_POLICY_VIOLATED", AccountBarred, None),
    ((429,), "", RateLimited, None),
    ((401, 403), "", CredentialRefused, None),
    (
        (400,),
        r"API_KEY_INVALID|API key|User location is not supported|[Bb]illing | billing",
        CredentialRefused,
        None,
    ),
    (
        (400,),
        r"token count.* exceeds|maximum number of tokens",
        UpstreamRefused,
        "context_length_exceeded",
    ),
    ((400,), r"[Cc]ontext (length|window)", UpstreamRefused, "context_length_exceeded"),
    ((400, 413), r"payload size exceeds", TooLarge, None),
    ((413,), "", TooLarge, None),
    ((400,), r"[Tt]hought[_ ]?[Ss]ignature", SignatureRefused, None),
    ((400,), r"[Ss]chema|\$ref", SchemaRefused, None),
    ((400,), r"MIME type", UpstreamRefused, "invalid_value"),
    ((400,), "", UpstreamRefused, None),
    ((404,), "", ModelGone, None),
    ((408, 499, 504), "", UpstreamTimeout, None),
    ((503,), "", Overloaded, None),
)
# What comes of reading JSON that has another form than Gemini promises.
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
DIGITS = b"0123456789"
TEXT_START = re.compile(r'"text"\s*:\s*"')
# Of v1internal in Go's form: "Your quota will reset after 3h2m1s."
WAIT_TEXT = re.compile(
    r"(?:retry|try again|reset) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[hms]))+)", re.IGNORECASE
)
HTTP_HINTS = {
    3: "Check base_url and the network: it redirects.",
    4: "Check base_url.",
    5: "Try again.",
}
LOGPROB_MIN = -9999.0  # OpenAI's word for "next to impossible"; JSON has no infinity
scan_string: Callable[[str, int], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]


class SseSplitter:
    """Bytes of a text/event-stream, cut anywhere, to the JSON texts of its events.

    Lines end at CR, LF or CRLF only: U+2028 may stand inside a JSON string.
    A bare JSON text without `data:`, over one line or several, is how an error in mid-stream may come.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._bare: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        lines = data.splitlines()
        rest = lines.pop() if lines and not data.endswith((b"\n", b"\r")) else b""
        if lines and self._rest:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest = []
        if rest:
            self._rest.append(
                rest
            )  # joined once its line is whole: an image may be one line of many reads
        texts = []
        for line in lines:
            if line.startswith(b"data: {"):
                texts.append(line[6:])
            elif line and (text := self._line(line)):
                texts.append(text)
        return texts

    def close(self) -> list[bytes]:
        """What is left at the end; of what was cut nobody can tell more than that it was."""
        line, self._rest = b"".join(self._rest), []
        left = (self._line(line) if line else b"", b"\n".join(self._bare))
        return [text for text in left if text and parse_json(text) is not None]

    def _line(self, line: bytes) -> bytes:
        if line.startswith(b"data:"):
            return (
                line[5:].strip().removeprefix(b"[DONE]")
            )  # which some put behind Gemini's own end
        if not (self._bare or line[:1] in b"{["):
            return b""
        self._bare.append(line)
        whole = b"\n".join(self._bare) if line.endswith((b"}", b"]")) else b""
        if not whole or parse_json(whole) is None:
            return b""
        self._bare = []
        return whole


@dataclass(slots=True)
class Candidate:
    """What is known of one choice while its chunks come."""

    number: int
    kind: type[Text | Thinking] | None = (
        None  # of the part that is open, as are its texts and signature
    )
    texts: list[str] = field(default_factory=list)
    signature: Signature | None = None
    before: str = ""  # the text of the parts that ended
    said: bool = False
    calls: int = 0
    answered: bool = False  # has given its answer by the answer tool
    reason: str = ""
    pcm: tuple[bytes, ...] = ()
    pcm_rate: int = 24000
    grounding: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()


@value
class Shape:
    """How a chunk looks that holds nothing but more of a text; the next one mostly differs in text and counts alone."""

    before: str  # up to the text
    after: str  # from the quote behind the text to the usage
    rest: bytes  # the usage and what follows, without digits
    choice: int
    candidate: Candidate
    kind: type[TextDelta | ThinkingDelta]


def shape_of(
    raw: bytes, chunk: Any, events: Sequence[Event], candidates: Mapping[int, Candidate]
) -> Shape | None:
    """The shape of a chunk, where `events`, all that came of it, are one delta and nothing else was told."""
    if len(events) != 1 or not isinstance(delta := events[0], TextDelta | ThinkingDelta):
        return None
    (one, *others), counts = chunk["candidates"], chunk.get("usageMetadata")
    if others or not one.keys() <= {"content", "index"} or not isinstance(counts, dict):
        return None
    (part, *others), text = one["content"]["parts"], raw.decode()
    start = TEXT_START.search(text)
    if others or not part.keys() <= {"text", "thought"} or not start:
        return None
    said, end = scan_string(text, start.end())
    usage = text.find('"usageMetadata"', end)
    if said != delta.text or usage < 0 or not text[usage:].isascii():
        return None
    rest = raw[usage - len(text) :].translate(None, DIGITS)
    return Shape(
        text[: start.end()],
        text[end:usage],
        rest,
        delta.choice,
        candidates[delta.choice],
        type(delta),
    )


class GeminiReader:
    """Chunks of one answer to Events; knows of no transport and no client.

    `new_id` makes the id of a tool call that came without one; `tools` are the declared ones by Gemini's name.
    """

    def __init__(
        self,
        new_id: Callable[[], str],
        tools: Mapping[str, Tool] | None = None,
        *,
        parallel_calls: bool = True,
    ) -> None:
        self.secret = ""  # the key that was sent: an error may repeat it
        self.stops = (
            False  # whether stop sequences were sent: one may be the first that the model says
        )
        self._new_id = new_id
        self._tools = tools or {}
        self._calls_max = CALLS_MAX if parallel_calls else 1
        self._ids: frozenset[str] = frozenset()
        self._splitter = SseSplitter()
        self._candidates: dict[int, Candidate] = {}
        self._usage: Mapping[str, Any] = {}
        self._uncounted = b""  # the last chunk whose usage was not read yet
        self._shape: Shape | None = None
        self._events: list[Event] = []
        self._started = False
        self.error: GatewayError | None = None  # what ended the answer, where it failed

    def feed(self, data: bytes) -> list[Event]:
        """Events of the next bytes of a stream."""
        return self._chunks(self._splitter.feed(data))

    def close(self, error: UpstreamError | None = None) -> list[Event]:
        """Events of the end of the body: the finish, or the truth that there was none, and by which `error`."""
        return self._chunks(self._splitter.close(), last=True, error=error)

    def whole(self, body: bytes) -> list[Event]:
        """Events of an answer that came in one piece: a stream of one chunk."""
        return self._chunks([body], last=True)

    def _chunks(
        self, texts: Iterable[bytes], last: bool = False, error: UpstreamError | None = None
    ) -> list[Event]:
        """Events of chunks, and of the end behind the `last`; an answer of another form than Gemini promises has failed."""
        try:
            for text in texts:
                if self.error:
                    break
                if self._shape is None or not self._more(self._shape, text):
                    self._other(text)
            if last and not self.error:
                self._end(error)
        except MISSHAPEN:
            self._fail(
                UpstreamBroken("Gemini sent something that cannot be understood. Try again.")
            )
        events, self._events = self._events, []
        return events

    def _more(self, shape: Shape, raw: bytes) -> bool:
        """Reads a chunk that only goes on as the one before did, without a parser; false where it is another."""
        try:
            text = raw.decode()
            said, end = scan_string(text, len(shape.before))
        except ValueError:
            return False
        rest = end + len(shape.after)
        like = text.startswith(shape.before) and text.startswith(shape.after, end)
        if not like or not said or raw[rest - len(text) :].translate(None, DIGITS) != shape.rest:
            return False
        shape.candidate.texts.append(said)
        self._events.append(shape.kind(shape.choice, said))
        self._uncounted = raw
        return True

    def _other(self, raw: bytes) -> None:
        chunk = self._parsed(raw)
        before = len(self._events)
        self._chunk(chunk)
        self._shape = shape_of(raw, chunk, self._events[before:], self._candidates)
        if self._shape:
            self._usage, self._uncounted = {}, raw  # which is smaller

    def _parsed(self, raw: bytes) -> Any:
        try:
            chunk = fast_loads(raw)
        except (ValueError, RecursionError):
            chunk = parse_json(raw)
        return chunk[0] if isinstance(chunk, list) and chunk else chunk

    def _chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            return self._fail(UpstreamBroken("Gemini sent something that is not JSON. Try again."))
        if "error" in chunk:
            return self._fail(classify_error(502, chunk))
        usage = chunk.get("usageMetadata")
        if isinstance(usage, dict):
            self._usage, self._uncounted = usage, b""
        if "promptFeedback" in chunk and (chunk["promptFeedback"] or {}).get("blockReason"):
            self._candidate(0).reason = "SAFETY"
        for raw in chunk.get("candidates") or ():
            choice = raw.get("index") or 0
            if choice.__class__ is not int or not 0 <= choice < CHOICES_MAX:
                raise ValueError("no such choice")
            candidate = self._candidates.get(choice) or self._candidate(choice)
            for part in (raw.get("content") or {}).get("parts") or ():
                text = part.get("text")
                if text.__class__ is str and text and len(part) == 1 and candidate.kind is Text:
                    candidate.texts.append(text)  # nine of ten parts are just more of a text
                    self._events.append(TextDelta(choice, text))
                else:
                    self._part(candidate, part)
            if (
                len(raw) > 2 or "index" not in raw or "content" not in raw
            ):  # most chunks have these two alone
                self._about(candidate, raw)

    def _candidate(self, choice: int) -> Candidate:
        return self._candidates.setdefault(choice, Candidate(choice))

    def _about(self, candidate: Candidate, raw: Mapping[str, Any]) -> None:
        """What is told of a candidate beside its content."""
        if reason := raw.get("finishReason"):
            candidate.reason = checked_text(reason)
        for key in ("groundingMetadata", "citationMetadata"):
            if about := raw.get(key):
                candidate.grounding += (about,)
        if result := raw.get("logprobsResult"):
            candidate.logprobs += tuple(logprobs_of(result))

    def _part(self, candidate: Candidate, part: dict[str, Any]) -> None:
        text, signature = part.get("text"), part.get("thoughtSignature")
        if text or (signature and text is not None and candidate.kind is Text):
            self._text(
                candidate, Thinking if part.get("thought") else Text, checked_text(text), signature
            )
        elif call := part.get("functionCall"):
            self._call(candidate, call, signature and checked_text(signature))
        elif (blob := part.get("inlineData")) and not part.get("thought"):
            self._media(
                candidate,
                Media(checked_text(blob["mimeType"]), checked_text(blob["data"]), signature),
            )
        elif code := part.get("executableCode"):
            language = str(code.get("language", "")).lower()
            self._text(candidate, Text, f"\n```{language}\n{checked_text(code['code'])}\n```\n")
        elif result := part.get("codeExecutionResult"):
            self._text(candidate, Text, f"\n```\n{checked_text(result.get('output') or '')}\n```\n")

    def _text(
        self,
        candidate: Candidate,
        kind: type[Text | Thinking],
        text: str,
        signature: str | None = None,
    ) -> None:
        choice = candidate.number
        if candidate.kind is not kind:
            self._end_part(candidate)
            candidate.kind = kind
            self._emit(PartStart(choice, kind("")))
        if signature and kind is Text:
            start = sum(map(len, candidate.texts))
            candidate.signature = Signature(checked_text(signature), start, start + len(text))
        if text:
            candidate.texts.append(text)
            candidate.said = candidate.said or kind is Text
            self._events.append(
                TextDelta(choice, text) if kind is Text else ThinkingDelta(choice, text)
            )

    def _call(self, candidate: Candidate, call: dict[str, Any], signature: str | None) -> None:
        name = checked_text(call.get("name") or "")
        tool = self._tools.get(name) or Tool(name, "", None)
        args = dict(call.get("args") or {})
        if (
            tool.answers
        ):  # the JSON that was asked for, as the text that the client waits for; only the first
            if not candidate.answered:
                candidate.answered = True
                self._text(candidate, Text, dumps(args))
            return
        candidate.calls += 1
        if candidate.calls > self._calls_max:
            return
        given = (args.get("input") or "") if tool.custom else args
        arguments = given if isinstance(given, str) else dumps(given)
        made = ToolCall(
            self._id(call.get("id")), tool.name, arguments, signature, tool.namespace, tool.custom
        )
        self._end_part(candidate)
        self._emit(PartStart(candidate.number, replace(made, arguments="")))
        self._emit(ArgumentsDelta(candidate.number, arguments))
        self._emit(PartEnd(candidate.number, made))

    def _id(self, given: Any) -> str:
        """Gemini's own id for a call where it is one that OpenAI's clients take, else a new one."""
        usable = isinstance(given, str) and 0 < len(given) <= CALL_ID_MAX and given not in self._ids
        made: str = given if usable else self._new_id()
        self._ids |= {made}
        return made

    def _media(self, candidate: Candidate, media: Media) -> None:
        if media.mime.lower().startswith("audio/l16"):
            rate = re.search(r"rate=(\d{1,6})", media.mime)
            candidate.pcm_rate = int(rate[1]) if rate else candidate.pcm_rate
            candidate.pcm += (base64.b64decode(media.data),)
            candidate.said = True
        else:
            self._whole_part(candidate, media)

    def _whole_part(self, candidate: Candidate, part: Part) -> None:
        candidate.said = True
        self._end_part(candidate)
        self._emit(PartStart(candidate.number, part))
        self._emit(PartEnd(candidate.number, part))

    def _end_part(self, candidate: Candidate, citations: tuple[Citation, ...] = ()) -> None:
        if candidate.kind is None:
            return
        text = "".join(candidate.texts)
        if candidate.kind is Text:
            self._emit(PartEnd(candidate.number, Text(text, candidate.signature, citations)))
            candidate.before += text
        else:
            self._emit(PartEnd(candidate.number, Thinking(text)))
        candidate.kind, candidate.texts, candidate.signature = None, [], None

    def _emit(self, event: Event) -> None:
        if not self._started:
            self._started = True
            self._events.append(Started())
        self._events.append(event)

    def _fail(self, error: GatewayError) -> None:
        self.error = error
        error.message = without_secret(error.message, self.secret)
        for _, candidate in sorted(self._candidates.items()):
            self._end_part(candidate)
        self._events.append(Failed(error))

    def _end(self, error: UpstreamError | None) -> None:
        """What is left to be told, once, at the end."""
        if not self._candidates or not all(
            candidate.reason for candidate in self._candidates.values()
        ):
            self._fail(
                error or UpstreamBroken("Gemini's answer broke off before its end. Try again.")
            )
        for _, candidate in sorted(self._candidates.items()):
            if not self.error:
                self._finish_choice(candidate)
        if not self.error:
            last = self._parsed(self._uncounted) if self._uncounted else {}
            self._emit(Ended(usage_of(last.get("usageMetadata") or self._usage)))

    def _finish_choice(self, candidate: Candidate) -> None:
        reason = FINISH_REASONS.get(candidate.reason, "stop")
        if reason == "stop" and candidate.calls:
            reason = "tool_calls"
        if (
            reason == "stop"
            and not candidate.said
            and not (self.stops and candidate.reason == "STOP")
        ):
            known = re.fullmatch(r"[A-Z_]{1,40}", candidate.reason)
            why = f"finish reason {candidate.reason}" if known else "unknown finish reason"
            return self._fail(UpstreamBroken(f"Gemini's answer is empty ({why}). Try again."))
        if candidate.pcm:
            self._whole_part(candidate, wav(b"".join(candidate.pcm), candidate.pcm_rate))
        self._end_part(candidate, self._annotate(candidate) if candidate.grounding else ())
        self._emit(Finished(candidate.number, reason, candidate.logprobs))

    def _annotate(self, candidate: Candidate) -> tuple[Citation, ...]:
        """Tells what the whole text rests on; the citations of the part that is open, counted in it."""
        spoken = candidate.before + ("".join(candidate.texts) if candidate.kind is Text else "")
        citations = citations_of(spoken, candidate.grounding)
        queries = [
            query for about in candidate.grounding for query in about.get("webSearchQueries") or ()
        ]
        if citations or queries:
            self._emit(
                Annotated(
                    candidate.number, citations, tuple(dict.fromkeys(map(checked_text, queries)))
                )
            )
        before = len(candidate.before)
        return tuple(
            replace(c, start=c.start - before, end=c.end - before)
            for c in citations
            if c.start >= before
        )


class CloudCodeReader(GeminiReader):
    """The same of v1internal, which wraps each chunk as {"response": ...}."""

    def _parsed(self, raw: bytes) -> Any:
        chunk = super()._parsed(raw)
        return chunk.get("response", chunk) if isinstance(chunk, dict) else chunk


def checked_text(value: Any) -> str:
    """The text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text should be")
    return value


def wav(pcm: bytes, rate: int) -> Media:
    """Raw 16-bit mono samples, as Gemini's speech models send them, with the header that players need."""
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(pcm), b"WAVEfmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", len(pcm))  # fmt: skip
    return Media("audio/wav", base64.b64encode(head + pcm).decode())


def citations_of(text: str, grounding: Sequence[Mapping[str, Any]]) -> tuple[Citation, ...]:
    """Web sources of a text. Gemini counts UTF-8 bytes and leaves a zero start out; ours are code points.

    Source: https://ai.google.dev/api/generate-content#Segment
    """
    raw = encoded(text)

    def span(segment: Mapping[str, Any]) -> tuple[int, int]:
        marks = (raw[: count_of(segment.get(key))] for key in ("startIndex", "endIndex"))
        start, end = (len(mark.decode(errors="ignore")) for mark in marks)
        quoted = segment.get("text")
        if isinstance(quoted, str) and quoted and text[start:end] != quoted and quoted in text:
            start = text.index(quoted)
            end = start + len(quoted)
        return start, end

    found: list[tuple[tuple[int, int], Mapping[str, Any]]] = []
    pages = [
        (chunk.get("web") or {})
        for about in grounding
        for chunk in about.get("groundingChunks") or ()
    ]
    for about in grounding:
        for support in about.get("groundingSupports") or ():
            at = span(support.get("segment") or {})
            found += [
                (at, pages[i]) for i in support.get("groundingChunkIndices") or () if i < len(pages)
            ]
        found += [
            (span(one), one)
            for one in (*(about.get("citationSources") or ()), *(about.get("citations") or ()))
        ]
    cited = [(at, page) for at, page in found if page.get("uri")]
    return tuple(
        dict.fromkeys(
            Citation(*at, str(page["uri"]), str(page.get("title") or "")) for at, page in cited
        )
    )


def logprobs_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each token: token, logprob and its alternatives."""
    tops = result.get("topCandidates") or ()
    chosen = [logprob_of(one) for one in result.get("chosenCandidates") or ()]
    for i, one in enumerate(chosen):
        one["top_logprobs"] = (
            [logprob_of(top) for top in tops[i].get("candidates") or ()] if i < len(tops) else []
        )
    return chosen


def logprob_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    token = checked_text(raw.get("token") or "")
    logprob = float(raw.get("logProbability") or 0)
    logprob = max(logprob, LOGPROB_MIN) if math.isfinite(logprob) else LOGPROB_MIN
    return {"token": token, "logprob": logprob, "bytes": list(encoded(token))}


def count_of(value: Any) -> int:
    """A count that may come as a number or as digits; 0 for anything else."""
    if value.__class__ is int or value is None:
        return max(0, value or 0)
    digits = re.match(r"\d{1,15}", str(value))
    return int(digits[0]) if digits else 0


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Source: https://ai.google.dev/api/generate-content#UsageMetadata (total = prompt + tool use + candidates + thoughts)"""
    prompt = count_of(raw.get("promptTokenCount")) + count_of(raw.get("toolUsePromptTokenCount"))
    cached, thoughts = (
        count_of(raw.get("cachedContentTokenCount")),
        count_of(raw.get("thoughtsTokenCount")),
    )
    return Usage(
        prompt, count_of(raw.get("candidatesTokenCount")) + thoughts, cached, reasoning=thoughts
    )


def read_embeddings(answer: Mapping[str, Any], count: int) -> list[list[float]]:
    """The vectors, each of length 1: Gemini leaves shortened ones as they are. Raises UpstreamBroken."""
    try:
        vectors = [[float(value) for value in one["values"]] for one in answer["embeddings"]]
        norms = [math.hypot(*vector) or 1.0 for vector in vectors]
    except (ArithmeticError, LookupError, TypeError, ValueError):
        vectors, norms = [], []
    if len(vectors) != count or not all(map(math.isfinite, norms)):
        raise UpstreamBroken("Gemini sent other vectors than were asked for. Try again.")
    pairs = zip(vectors, norms, strict=True)
    return [
        vector if abs(norm - 1) < 1e-6 else [v / norm for v in vector] for vector, norm in pairs
    ]


def classify_error(status: int, body: Any, retry_after: str = "") -> UpstreamError:
    """What an error answer of Gemini means for this account and this request.

    `body` is its JSON, or None; `retry_after` the header of that name. The class comes first, then the wait.
    """
    error = error_of(body)
    told = error.get("code")
    status = told if isinstance(told, int) and 400 <= told < 600 else status
    message = str(
        error.get("message")
        or f"Gemini answered HTTP {status}. {HTTP_HINTS.get(status // 100, '')}".strip()
    )
    everything = ""
    with contextlib.suppress(RecursionError):
        everything = str(error)
    meant = (row[2:] for row in REFUSALS if status in row[0] and re.search(row[1], everything))
    kind, code = next(meant, (Overloaded if status > 504 else UpstreamBroken, None))
    made = kind(message[:ERROR_CHARS_MAX], code=code, param="model" if kind is ModelGone else None)
    return with_wait(made, error, retry_after)


def error_of(body: Any) -> Mapping[str, Any]:
    """The error object of an error body: bare, in an array, or as JSON inside another error's message."""
    body = body[0] if isinstance(body, list) and body else body
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    message = error.get("message")
    inner = (
        parse_json(message)
        if isinstance(message, str) and message.lstrip()[:1] in ("{", "[")
        else None
    )
    return error_of(inner) or error


def with_wait(made: UpstreamError, error: Mapping[str, Any], retry_after: str) -> UpstreamError:
    """The error with the quota that it speaks of, the wait that is asked for and the page to visit, by its details."""
    about: dict[str, Any] = {}
    quotas: dict[str, int | None] = {}
    for detail in objects_in(error.get("details")):
        for part in (
            detail,
            *objects_in([detail.get("metadata")]),
            *objects_in(detail.get("links"))[:1],
        ):
            about |= part
        for violation in objects_in(detail.get("violations")):
            quotas |= quota_of(violation, "quotaId", "quotaValue")
    quotas |= quota_of(about, "quota_limit", "quota_limit_value")
    if isinstance(made, RateLimited) and quotas:
        made.quota = min(quotas, key=lambda quota: not quota.endswith("day"))
        made.limit = quotas[made.quota]
    if re.search(r"limit: 0\b", made.message) and isinstance(made, QuotaGone):
        made.quota, made.limit = "tier", None
    if isinstance(made, AccountBarred) and (
        page := about.get("validation_link") or about.get("url")
    ):
        made.message = f"{made.message.rstrip('.')}. Visit {page}"
    waits = [duration_s(about.get("quotaResetDelay"))]
    if not waits[0] and isinstance(reset := about.get("quotaResetTimeStamp"), str):
        from datetime import datetime

        with contextlib.suppress(ValueError, OverflowError):
            made.reset_at = datetime.fromisoformat(reset).timestamp()
    if (
        not made.quota.endswith("_day") and made.quota != "tier"
    ):  # these are known better than RetryInfo tells
        text = WAIT_TEXT.search(made.message)
        waits += [
            duration_s(about.get("retryDelay")),
            duration_s(f"{retry_after}s"),
            duration_s(text and text[1]),
        ]
    made.retry_after_s = next((wait for wait in waits if wait is not None), None)
    return made


def quota_of(about: Mapping[str, Any], id: str, value: str) -> dict[str, int | None]:
    """The quota that an id such as GenerateRequestsPerDayPerProjectPerModel-FreeTier names, and its size."""
    name = about.get(id)
    if not isinstance(name, str):
        return {}
    per = "day" if re.search("PerDay|Daily", name) else "minute"
    return {
        f"{'tokens' if 'Token' in name else 'requests'}_per_{per}": count_of(about.get(value))
        or None
    }


def duration_s(text: Any) -> float | None:
    """Seconds of a duration such as 34.07s, 900ms or 3h2m1.2s; at most a day's; None for anything else."""
    if not isinstance(text, str) or not re.fullmatch(r"(\d{1,9}(\.\d+)?(ms|[hms]))+", text):
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    total = sum(
        float(count) * units[unit] for count, unit in re.findall(r"([\d.]+)(ms|[hms])", text)
    )
    return min(total, RETRY_AFTER_S_MAX)


# ==============================================================================
# 12. Signatures
# ==============================================================================

SIGNATURES_MAX = 20_000
SEAL_VERSION = "agp1."


class SignatureMemory:
    """Thought signatures by tool-call id or by the answer's text, for clients that drop unknown keys; the oldest give way."""

    def __init__(self, size: int = SIGNATURES_MAX) -> None:
        self._size = size
        self._known: dict[str, tuple[str, Any]] = {}

    def remember(self, events: Iterable[Event], model: str) -> None:
        for event in events:
            if (
                isinstance(event, PartEnd)
                and isinstance(event.part, ToolCall | Text)
                and event.part.signature
            ):
                self._known[signature_key(event.part)] = (model, event.part.signature)
                self._forget()

    def learn(self, entries: Iterable[list[Any]]) -> None:
        """Takes in what `signature_entry` told of earlier answers."""
        for key, model, value, *span in entries:
            self._known[key] = (model, Signature(value, *span) if span else value)
        self._forget()

    def _forget(self) -> None:
        while len(self._known) > self._size:
            del self._known[next(iter(self._known))]

    def recall(self, request: Request, model: str) -> Request:
        """The request with the signatures that this model made put back, and without those of other models."""
        if not self._known:
            return request

        def signed(part: Part) -> Part:
            if not isinstance(part, ToolCall | Text):
                return part
            made_by, signature = self._known.get(signature_key(part), (model, None))
            kept: Any = (part.signature or signature) if made_by == model else None
            return part if kept is part.signature else replace(part, signature=kept)

        return with_signatures(request, signed)


def signature_key(part: ToolCall | Text) -> str:
    return part.id if isinstance(part, ToolCall) else hashlib.sha256(encoded(part.text)).hexdigest()


def signature_entry(part: ToolCall | Text, model: str) -> list[Any]:
    """What the memory knows of a signed part, as JSON."""
    signature = part.signature
    told = (
        [signature.value, signature.start, signature.end]
        if isinstance(signature, Signature)
        else [signature]
    )
    return [signature_key(part), model, *told]


def seal(entry: list[Any], secret: bytes) -> str:
    """An entry of the memory as a client carries it: of no effect once it is changed, or where another gateway made it."""
    body = encoded(dumps(entry))
    return (
        SEAL_VERSION + base64.urlsafe_b64encode(hmac.digest(secret, body, "sha256") + body).decode()
    )


def unseal(text: str, secret: bytes) -> list[Any] | None:
    """The entry that was sealed; None for anything that this gateway did not seal."""
    try:
        data = base64.urlsafe_b64decode(text.removeprefix(SEAL_VERSION))
    except ValueError:
        return None
    tag, body = data[:32], data[32:]
    genuine = text.startswith(SEAL_VERSION) and hmac.compare_digest(
        tag, hmac.digest(secret, body, "sha256")
    )
    entry: list[Any] | None = parse_json(body) if genuine else None
    return entry


def with_signatures(request: Request, signed: Callable[[Part], Part]) -> Request:
    """The request with the parts of its answers changed."""
    messages = [
        replace(m, parts=tuple(map(signed, m.parts))) if m.role == "assistant" else m
        for m in request.messages
    ]
    return replace(request, messages=tuple(messages))


# ==============================================================================
# 13. Accounts
# ==============================================================================

COOLDOWN_S_MAX = 3600.0
JITTER_S_MAX = 30.0
COOLDOWN_END_S_MAX = RETRY_AFTER_S_MAX + JITTER_S_MAX
DAY_S_MAX = 25 * 3600.0
PROBE_S_MAX = 10.0  # who is silent for longer thinks, for a refusal comes at once
POLL_S = 0.25
TWINS_MIN = 3
STATES_MAX = 2000  # of accounts times models
SAID_CHARS = 4000  # of a system prompt, and of the first message, by which a conversation is known
ATTEMPTS_MAX = 3
RESTING = {kind.__name__: kind for kind in (RateLimited, QuotaGone, ModelGone, Paused)}
UNASKED = RateLimited(f"was not asked, for a request is tried {ATTEMPTS_MAX} times")


def next_midnight(now: float) -> float:
    """When a new day of Gemini's quotas begins: at midnight in Los Angeles.

    Source: https://ai.google.dev/gemini-api/docs/rate-limits
    """
    local = now + pacific_offset_s(now)
    midnight = (local // 86400 + 1) * 86400
    return midnight - pacific_offset_s(midnight - pacific_offset_s(now))


def pacific_offset_s(now: float) -> float:
    """Seconds that clocks in Los Angeles are ahead of UTC, by the United States' rule: not each system knows its zone."""
    from datetime import UTC, datetime, timedelta

    moment = datetime.fromtimestamp(now, UTC)
    march, november = (
        datetime(moment.year, *of, tzinfo=UTC) for of in ((3, 8, 10), (11, 1, 9))
    )  # 2 a.m. there
    begin, end = (
        day + timedelta(days=(6 - day.weekday()) % 7) for day in (march, november)
    )  # Sundays
    return -7 * 3600.0 if begin <= moment < end else -8 * 3600.0


def rest_of(error: UpstreamError, strikes: int, now: float) -> float:
    """Seconds of rest after a refusal: as the upstream says, else until the quota is new, else longer each time.

    No wait is believed beyond a day, and none is shorter than a second.
    """
    if math.isinf(error.cooldown_s):
        return math.inf
    if error.reset_at is not None or error.retry_after_s is not None:
        cooldown_s = error.retry_after_s if error.reset_at is None else error.reset_at - now
    elif isinstance(error, QuotaGone):
        cooldown_s = next_midnight(now) - now
    else:
        cooldown_s = (
            60.0
            if error.quota.endswith("_minute")
            else min(error.cooldown_s * 2.0**strikes, COOLDOWN_S_MAX)
        )
    return min(max(cooldown_s or 0.0, 1.0), RETRY_AFTER_S_MAX)


@dataclass(eq=False, slots=True)
class PoolEntry:
    """An account's place in the pool."""

    account: Account
    salt: int  # an odd number of 64 bits
    owners: tuple[str, ...]  # whose rests hold it back: its own, and those of its quota_group
    busy: int = 0
    turn: float = 0.0
    twins: set[str] = field(default_factory=set)
    """Accounts that seem to share its project: they were refused whenever it was."""


@dataclass(eq=False, slots=True)
class Cooldown:
    """Why an account or a project is not asked, and until when. Afterwards one probe finds out, which ends it or not."""

    error: UpstreamError
    until: float
    strikes: int = 0  # how many probes in a row have failed
    span: tuple[float, float] = (0.0, 0.0)
    """From when until when the upstream surely refuses: the last tenth may be the way of the answer."""
    prober: Lease | None = None

    def holds(self, now: float) -> bool:
        """A rest of more than a day is none: the clock was set back."""
        probed = self.prober is not None and now < self.prober.begun + PROBE_S_MAX
        return probed or now < self.until <= now + COOLDOWN_END_S_MAX or math.isinf(self.until)

    def told(self, now: float) -> str:
        until = "" if math.isinf(self.until) else f" for {max(self.until - now, 0):.0f} s"
        return f"{'is probed' if self.prober else f'rests{until}'} ({self.error.quota}): {self.error.message}"


@dataclass(eq=False, slots=True)
class Lease:
    """One request's use of an account, from the choice until the end of its answer."""

    entry: PoolEntry
    account: Account
    model: str
    begun: float
    probes: list[Cooldown] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False, slots=True)
class Use:
    """What an account or a project was asked for one model, this minute and this day, and how much it may be."""

    given: Mapping[str, int]
    learned: dict[str, int] = field(default_factory=dict)
    minute: int = 0
    day: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * len(QUOTAS))

    def at(self, now: float, day: float) -> list[int]:
        """The counts, in the order of QUOTAS, of this minute and of the day that ends at `day`."""
        if (minute := int(now // 60)) != self.minute:
            self.minute, self.counts[:2] = minute, (0, 0)
        if day != self.day:
            self.day, self.counts[2:] = day, (0, 0)
        return self.counts

    @property
    def limits(self) -> dict[str, int]:
        return {**self.learned, **self.given}

    def reached(self, now: float, day: float, share: float = 1.0) -> list[str]:
        """The quotas of which more than this share is used up."""
        limits = self.limits
        used = zip(QUOTAS, self.at(now, day), strict=True) if limits else ()
        return [
            quota for quota, count in used if quota in limits and count >= limits[quota] * share
        ]


class AccountPool:
    """Who is asked next, and who rests until when. Told the time, in seconds since 1970, and the chance; never waits."""

    def __init__(
        self, accounts: Sequence[Account], strategy: str = "affinity", reserve: float = 0.0
    ) -> None:
        self._seats: list[PoolEntry] = []
        self._rests: dict[tuple[str, str], dict[str, Cooldown]] = {}
        self._uses: dict[tuple[str, str], Use] = {}
        self._together: dict[tuple[str, str], int] = {}
        self._floor = 0.0
        self._day = 0.0
        self._limited = False  # whether any limit was given or learned
        self.update(accounts, strategy, reserve)

    def update(self, accounts: Sequence[Account], strategy: str, reserve: float) -> None:
        """Takes other accounts in; who is unchanged keeps its state, who changed keeps only what a person paused."""
        self.accounts = tuple(accounts)
        self._strategy, self._reserve = strategy, reserve
        known = {seat.account.name: seat for seat in self._seats}
        self._seats = []
        for account in accounts:
            owners = (
                (account.name, f"@{account.quota_group}")
                if account.quota_group
                else (account.name,)
            )
            salt = int.from_bytes(hashlib.sha256(encoded(account.name)).digest()[:8], "big") | 1
            seat = known.pop(account.name, None) or PoolEntry(account, salt, owners)
            if seat.account != account:
                self._forget(account.name, "", spare=("paused",))
                seat.account, seat.owners = account, owners
                known[account.name] = seat  # beside those that are gone
            self._seats.append(seat)
        for name in known.keys() - {account.name for account in accounts}:
            self._forget(name, "")
        self._unlearn(known)
        for (owner, model), use in self._uses.items():
            use.given = self._given(owner, model)
        self._limited = any(use.limits for use in self._uses.values())

    def _unlearn(self, changed: Mapping[str, PoolEntry]) -> None:
        """What refusals taught of limits and twins is not so of an account that is gone, another one by now, or reset."""
        owners = {owner for seat in changed.values() for owner in seat.owners}
        for (owner, _), use in self._uses.items():
            use.learned = {} if owner in owners else use.learned
        self._together = {
            pair: times for pair, times in self._together.items() if changed.keys().isdisjoint(pair)
        }
        for seat in self._seats:
            seat.twins = set() if seat.account.name in changed else seat.twins - changed.keys()

    # ---- the choice

    def acquire(
        self,
        model: str,
        tried: Collection[str],
        key: int,
        now: float,
        seen: list[tuple[str, str]],
        again: bool = False,
    ) -> Lease | None:
        """The best account by the strategy that is not in `tried`, does not rest and is not busy; None where there is none.

        Who was refused asks `again`, and probes nobody where another is ready. By affinity each `key` has an order of its
        own, which other accounts do not change. What is known of each account goes into `seen`. The lease must be released.
        Source: https://en.wikipedia.org/wiki/Rendezvous_hashing#Weighted_rendezvous_hash
        """
        self._begin_day(now)
        best, best_doubted, best_rank = None, True, math.inf
        strategy, limited, floor, log = self._strategy, self._limited, self._floor, math.log
        for seat in self._seats:
            account = seat.account
            if account.name in tried:
                state = "was tried"
            elif not (
                state := self._state(seat, model, now)
                if self._rests or account.max_concurrency
                else ""
            ):
                doubtful = limited or seat.twins or (again and self._rests)
                rank, doubt = 0.0, self._doubt(seat, model, now, again) if doubtful else ""
                if strategy == "affinity":
                    rank = (
                        -log(((seat.salt * key & 0xFFFFFFFFFFFFFFFF) + 1) / 0x10000000000000001)
                        / account.weight
                    )
                elif strategy == "round_robin":
                    rank = max(seat.turn, floor)
                state = doubt or "is ready"
                if (doubt != "", rank) < (best_doubted, best_rank):
                    best, best_doubted, best_rank = seat, doubt != "", rank
            seen.append((account.name, state))
        return self._lease(best, model, now) if best else None

    def _begin_day(self, now: float) -> None:
        self._day = self._day if now < self._day <= now + DAY_S_MAX else next_midnight(now)

    def again(self, seat: PoolEntry, model: str, now: float) -> Lease | None:
        """The same account once more, unless it rests or is busy by now."""
        return None if self._state(seat, model, now) else self._lease(seat, model, now)

    def _lease(self, seat: PoolEntry, model: str, now: float) -> Lease:
        """A lease of this account; it probes each rest that is over."""
        lease = Lease(seat, seat.account, model, now)
        for rest in self._rests_of(seat, model):
            if not rest.holds(now):
                rest.prober = lease
                lease.probes.append(rest)
        seat.busy += 1
        if self._strategy == "round_robin":
            self._floor = max(seat.turn, self._floor)
            seat.turn = self._floor + 1 / seat.account.weight
        self._count(lease, 0, 1, now)
        return lease

    def _state(self, seat: PoolEntry, model: str, now: float) -> str:
        """Why an account cannot be asked; nothing where it can."""
        if seat.account.max_concurrency and seat.busy >= seat.account.max_concurrency:
            return "is busy"
        held = (
            [rest for rest in self._rests_of(seat, model) if rest.holds(now)] if self._rests else ()
        )
        return max(held, key=lambda rest: rest.until).told(now) if held else ""

    def _rests_of(self, seat: PoolEntry, model: str) -> list[Cooldown]:
        found: list[Cooldown] = []
        for owner in seat.owners:
            for of in ("", model):
                if rests := self._rests.get((owner, of)):
                    found += rests.values()
        return found

    def _doubt(self, seat: PoolEntry, model: str, now: float, again: bool) -> str:
        """Why it would perhaps refuse, so that it is asked last; nothing where it would not."""
        use = self._uses.get((seat.owners[-1], model))
        if use is not None and use.reached(now, self._day, 1 - self._reserve):
            return "is near its limit"
        if any(self._has_no_quota(twin, model, now) for twin in seat.twins):
            return "seems to share a project that rests"
        return "is to be probed" if again and self._rests_of(seat, model) else ""

    def _has_no_quota(self, name: str, model: str, at: float) -> bool:
        rests = self._rests.get((name, model), {})
        return any(
            quota in QUOTAS and rest.span[0] <= at < rest.span[1] for quota, rest in rests.items()
        )

    def wait_s(self, model: str, tried: Collection[str], now: float) -> float:
        """Seconds until the first account that is not in `tried` may be asked; infinite where none will be."""
        waits = [math.inf]
        for seat in self._seats:
            if seat.account.name not in tried:
                rests = [rest for rest in self._rests_of(seat, model) if rest.holds(now)]
                unknown = any(rest.prober for rest in rests) or (
                    not rests and self._state(seat, model, now)
                )
                waits.append(
                    max([POLL_S if unknown else 0.0, *(rest.until - now for rest in rests)])
                )
        return min(waits)

    # ---- what came of it

    def succeeded(self, lease: Lease, now: float) -> None:
        """An answer has begun: what was probed is over, and what was thought of limits and twins is not so."""
        for rest in lease.probes:
            for rests in self._rests.values():
                if rests.get(rest.error.quota) is rest:
                    del rests[rest.error.quota]
        self._rests = (
            {key: rests for key, rests in self._rests.items() if rests}
            if lease.probes
            else self._rests
        )
        lease.probes.clear()
        use = self._uses.get((lease.entry.owners[-1], lease.model))
        if use is not None and use.learned:
            for quota in use.reached(now, self._day, 1.0001):  # more than there is was not refused
                use.learned.pop(quota, None)
        if self._together:
            for other in self._seats:
                if self._has_no_quota(other.account.name, lease.model, lease.begun):
                    self._met(lease.entry, other, refused=False)

    def failed(self, lease: Lease, error: UpstreamError, now: float, chance: float) -> None:
        """An attempt was refused; `chance`, from 0 to 1, spreads the ends of the rests. Releases the lease."""
        seat, probes = lease.entry, lease.probes
        self.release(lease, 0, now)
        if (
            error.scope == "nobody" or lease.account is not seat.account
        ):  # whose file was changed meanwhile
            return
        owner = seat.owners[-1] if error.scope == "project" else seat.account.name
        rests = self._rests.setdefault((owner, "" if error.scope == "account" else lease.model), {})
        known = rests.get(error.quota)
        strikes = (known.strikes + (known in probes)) if known else 0
        cooldown_s = rest_of(error, strikes, now)
        end = now + cooldown_s + chance * min(cooldown_s / 10, JITTER_S_MAX)
        until = end if math.isinf(end) else min(end, now + COOLDOWN_END_S_MAX)
        if known and known not in probes and known.holds(now):
            until = max(until, known.until)  # of several refusals at once
        rests[error.quota] = Cooldown(error, until, strikes, (now, now + cooldown_s * 0.9))
        if error.scope == "project" and lease.begun // 60 == now // 60:
            self._count(lease, 0, -1, now)
        if error.quota in QUOTAS:
            self._learn(lease, error, now)
        if len(self._rests) > STATES_MAX:  # those that end last stay
            held = [
                one
                for one in self._rests.items()
                if any(rest.holds(now) for rest in one[1].values())
            ]
            held.sort(key=lambda one: max(rest.until for rest in one[1].values()))
            self._rests = dict(held[-STATES_MAX:])

    def _learn(self, lease: Lease, error: UpstreamError, now: float) -> None:
        """From a quota's refusal: how large it is and, where its own requests do not explain it, who seems to share it."""
        if error.limit:
            self._limited = True
            use = self._uses[lease.entry.owners[-1], lease.model]
            use.learned[error.quota] = error.limit
            if error.quota in use.reached(now, self._day):
                return
        for other in self._seats:
            alone = (
                other is not lease.entry
                and not other.account.quota_group
                and not lease.account.quota_group
            )
            if alone and self._has_no_quota(other.account.name, lease.model, now):
                self._met(lease.entry, other, refused=True)

    def _met(self, one: PoolEntry, other: PoolEntry, *, refused: bool) -> None:
        """One was asked while the other one's quota was used up."""
        a, b = sorted((one.account.name, other.account.name))
        times = self._together[a, b] = self._together.get((a, b), 0) + 1 if refused else 0
        for seat, name in ((one, other.account.name), (other, one.account.name)):
            (seat.twins.add if times >= TWINS_MIN else seat.twins.discard)(name)

    def release(self, lease: Lease, tokens: int, now: float) -> None:
        """The end of a request; a probe without a verdict is left to the next one."""
        if not lease.ended:
            lease.ended = True
            lease.entry.busy -= 1
            for rest in lease.probes:
                rest.prober = None if rest.prober is lease else rest.prober
            self._count(lease, 1, tokens, now)

    def _count(self, lease: Lease, quota: int, count: int, now: float) -> None:
        """Counts requests (0) or tokens (1)."""
        for owner in lease.entry.owners:
            use = self._uses.get((owner, lease.model)) or self._new_use(owner, lease.model)
            counts = use.at(now, self._day)
            counts[quota] += count
            counts[quota + 2] += count

    def _new_use(self, owner: str, model: str) -> Use:
        use = self._uses[owner, model] = Use(self._given(owner, model))
        self._limited |= bool(use.given)
        if len(self._uses) > STATES_MAX:
            del self._uses[next(iter(self._uses))]
        return use

    def _given(self, owner: str, model: str) -> dict[str, int]:
        """The limits that the file gives an account; a project has those of all its accounts."""
        limits = [seat.account.limits for seat in self._seats if owner in seat.owners]
        return {
            quota: size
            for each in limits
            if (key := look_up(model, each))
            for quota, size in each[key].items()
        }

    def exhausted(
        self, model: str, refusals: Mapping[str, UpstreamError], now: float
    ) -> PoolExhausted:
        """The class of the last refusal, else of the soonest account; the wait until that one; the reason of each.

        What lasts (a day's quota, credentials, that there is no such model) is the class only where no account is soon free.
        """
        if not self._seats:
            return PoolExhausted(
                "No account is configured. Add one under accounts.", Overloaded("no account"), None
            )
        reasons: list[tuple[float, str, UpstreamError]] = []
        for seat in self._seats:
            name, rests = (
                seat.account.name,
                [rest for rest in self._rests_of(seat, model) if rest.holds(now)],
            )
            last = max(rests, key=lambda rest: rest.until, default=None)
            idle = (
                UNASKED
                if not self._state(seat, model, now)
                else Overloaded("has max_concurrency requests already")
            )
            error = refusals.get(name) or (last.error if last else idle)
            reasons.append((last.until if last else math.inf, name, error))
        why = "; ".join(f"{name}: {error.message.rstrip('.')}" for _, name, error in reasons)
        errors = list(refusals.values())[::-1] + [
            one[2] for one in sorted(reasons, key=lambda one: one[0])
        ]
        error = min(errors, key=lambda error: error.lasting)
        gone = (
            {name for _, name, each in reasons if isinstance(each, ModelGone)}
            if error.status != 404
            else set()
        )
        told = {
            name: each.retry_after_s or 1.0
            for name, each in refusals.items()
            if each.scope == "nobody"
        }
        soonest = min([self.wait_s(model, gone | told.keys(), now), *told.values()])
        wait = soonest if soonest < math.inf else None
        again = f" Please try again in {wait:.1f}s." if wait and error.waits else ""
        return PoolExhausted(f"No account could answer ({why}). {error.advice}{again}", error, wait)

    # ---- what a person sees, and steers

    def steer(self, action: str, name: str, model: str) -> bool:
        """Resets, pauses or resumes an account, or one model of it; False where there is no such account."""
        seat = next((seat for seat in self._seats if seat.account.name == name), None)
        if seat is None:
            return False
        if action == "pause":
            self._rests.setdefault((name, model), {})["paused"] = Cooldown(
                Paused("A person paused it."), math.inf
            )
        elif action == "resume":
            self._rests.get((name, model), {}).pop("paused", None)
        else:
            for owner in seat.owners:
                self._forget(owner, model)
            self._unlearn({} if model else {name: seat})
        return True

    def _forget(self, owner: str, model: str, spare: Collection[str] = ()) -> None:
        """Ends the rests of an account or a project, for one model or for all."""
        for (whose, of), rests in self._rests.items():
            if whose == owner and model in ("", of):
                for quota in rests.keys() - set(spare):
                    del rests[quota]

    def status(self, now: float) -> list[dict[str, Any]]:
        """Of each account what it is, does and may do, and the same for each model that it was asked for."""
        told = []
        self._begin_day(now)
        for seat in self._seats:
            account = seat.account
            models = [
                model
                for owner, model in (*self._uses, *self._rests)
                if owner in seat.owners and model
            ]
            about: dict[str, Any] = {
                "account": account.name,
                "kind": account.kind,
                "quota_group": account.quota_group,
            }
            about |= {"seems_to_share_with": sorted(seat.twins), "in_flight": seat.busy}
            about["state"] = self._state(seat, "", now) or "is ready"
            told.append(
                about
                | {
                    "models": [
                        self._model_status(seat, model, now) for model in dict.fromkeys(models)
                    ]
                }
            )
        return told

    def _model_status(self, seat: PoolEntry, model: str, now: float) -> dict[str, Any]:
        use = self._uses.get((seat.account.name, model)) or Use({})
        limits = (self._uses.get((seat.owners[-1], model)) or use).limits
        about = {
            "model": model,
            "state": self._state(seat, model, now) or "is ready",
            "limits": limits,
        }
        return about | dict(zip(QUOTAS, use.at(now, self._day), strict=True))

    # ---- what outlives the process

    def rows(self) -> dict[str, str]:
        """The rests of quotas, models and paused accounts and what was used today, as texts by name for `restore`."""
        rows, marks = {}, self._marks()
        for (owner, model), rests in self._rests.items():
            for quota, rest in rests.items():
                if (kind := type(rest.error).__name__) in RESTING:
                    mark = "" if quota == "paused" else marks.get(owner)
                    about = [
                        mark,
                        kind,
                        rest.error.message,
                        rest.error.code,
                        rest.until,
                        rest.strikes,
                    ]
                    rows[dumps(["rest", owner, model, quota])] = json.dumps(
                        about
                    )  # which may be infinite
        for (owner, model), use in self._uses.items():
            if use.day == self._day:
                rows[dumps(["use", owner, model])] = dumps(
                    [marks.get(owner), use.day, use.counts[2:], use.learned]
                )
        return rows

    def restore(self, rows: Mapping[str, str], now: float) -> None:
        """Takes back what `rows` gave, unless its time is over or the account is another one by now."""
        self._begin_day(now)
        marks = self._marks()
        for name, text in rows.items():
            with contextlib.suppress(LookupError, TypeError, ValueError):  # another version's
                mark, *value = json.loads(text)
                if mark == "" or mark == marks[json.loads(name)[1]]:
                    self._restore_row(json.loads(name), value, now)

    def _marks(self) -> dict[str, str]:
        """By which each account is known again: not its name alone, for it may get another key while nothing runs."""
        marks = {owner: owner for seat in self._seats for owner in seat.owners}
        for one in self.accounts:
            login = f"{one.client_id}\n{one.refresh_token}\n{one.service_account}\n{one.project}"
            marks[one.name] = hashlib.sha256(encoded(f"{one.api_key}\n{login}")).hexdigest()[:8]
        return marks

    def _restore_row(self, name: Any, value: Any, now: float) -> None:
        table, owner, model, *more = name
        if table == "rest":
            kind, message, code, until, strikes = value
            error = RESTING[kind](message, code=code)
            error.quota = more[0]
            self._rests.setdefault((owner, model), {})[error.quota] = Cooldown(
                error, until, strikes
            )
        elif value[0] == self._day:
            use = self._new_use(owner, model)
            use.at(now, self._day)
            use.counts[2:], use.learned = value[1:]
            self._limited |= bool(use.learned)


def affinity_of(client: str, session: str, request: Request) -> int:
    """A number that the requests of one conversation share: they meet the same account, whose prompt cache knows them.

    Without the client's name for the session, by what was said first.
    """
    if session:
        return zlib.crc32(encoded(f"{client}\n{session}"))
    said = []
    for part in request.messages[0].parts if request.messages else ():
        said.append(
            part.text if isinstance(part, Text) else part.data if isinstance(part, Media) else ""
        )
    tool = "\n".join([client, *request.system])[
        :SAID_CHARS
    ]  # apart, for it may be long and always the same
    return zlib.crc32(encoded(tool + "\n".join(said)[:SAID_CHARS]))


# ==============================================================================
# 14. Journal
# ==============================================================================

JOURNAL_MAX = 1000


@dataclass(slots=True)
class Step:
    """One step of the retry loop: what was known of each account, who was asked, and what came of it."""

    model: str
    seen: list[tuple[str, str]] = field(default_factory=list)
    account: str = ""  # nobody, where none could be asked
    answer: str = ""
    wait_s: float = 0.0  # how long was waited after it


@dataclass(slots=True)
class Trace:
    """What happened to one request, for its headers, its log line and `agproxy why`."""

    config: Config
    id: str
    route: str
    started: float
    client_id: str = ""  # the client's own name for the request, where it gave a sane one
    client: str = ""  # the name of the key that let the client in
    model: str = ""
    mapped_model: str = ""
    account: Account | None = None
    attempts: int = 0
    affinity: int = 0
    steps: list[Step] = field(default_factory=list)
    first_byte: float | None = None
    usage: Usage | None = None
    changes: int = 0  # how many there were; the journal keeps a thousand requests
    strict: bool = False
    error: str = ""  # the code of the error that broke off a stream

    def headers(self, now: float) -> dict[str, str]:
        headers = {
            "X-Request-Id": self.id,
            "openai-processing-ms": str(round(1000 * (now - self.started))),
        }
        if self.mapped_model:
            headers |= {"X-Mapped-Model": self.mapped_model, "X-Attempts": str(self.attempts)}
        if self.account and self.config.show_account != "off":
            shown = self.account.email or self.account.name
            headers["X-Account-Email"] = (
                shown if self.config.show_account == "full" else masked(shown)
            )
        if self.changes:
            headers["X-Agproxy-Changes"] = str(self.changes)
        return headers | ({"X-Agproxy-Demo": "1"} if self.config.demo else {})


def decisions_of(trace: Trace) -> list[dict[str, Any]]:
    return [
        {"model": step.model, "considered": dict(step.seen)}
        | {
            "chosen": step.account or None,
            "answer": step.answer or None,
            "waited_s": round(step.wait_s, 2),
        }
        for step in trace.steps
    ]


@dataclass(slots=True)
class Tally:
    """What a gateway did since it was started."""

    requests: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    accounts: dict[str, int] = field(default_factory=dict)

    def add(self, trace: Trace, status: int) -> None:
        if trace.model:
            self.requests += 1
            self.failed += status >= 400 or bool(trace.error)
        if trace.account and status < 400:
            self.usage += trace.usage or Usage()
            self.accounts[trace.account.name] = self.accounts.get(trace.account.name, 0) + 1

    def bill(self) -> str:
        accounts = ", ".join(f"{name} {count}" for name, count in self.accounts.items()) or "none"
        tokens = f"{self.usage.prompt} tokens in, {self.usage.completion} out"
        requests = f"{self.requests} request{'s' * (self.requests != 1)}"
        return f"{requests} ({self.failed} failed), {tokens}; accounts: {accounts}"


@functools.lru_cache(1024)
def masked(name: str) -> str:
    """An e-mail with its first letter and domain left; any other name as it is."""
    return re.sub(r"^(.)[^@]*@", r"\1***@", name)


def log_fields(trace: Trace, status: int, now: float) -> dict[str, Any]:
    """What the log says of a finished request; never a prompt, never a key."""
    fields = {
        name: getattr(trace, name)
        for name in ("id", "client_id", "client", "route", "model", "mapped_model")
    }
    fields |= {"account": trace.account and trace.account.name, "attempts": trace.attempts}
    fields |= {"status": status, "error": trace.error}
    for name, at in (("first_ms", trace.first_byte), ("ms", now)):
        fields[name] = None if at is None else round(1000 * (at - trace.started))
    fields["tokens"] = trace.usage and f"{trace.usage.prompt}+{trace.usage.completion}"
    return {key: value for key, value in fields.items() if value not in (None, "")}


def log_text(fields: Mapping[str, Any]) -> str:
    """The fields as one line; a control character of a client's is escaped, so that none forges a line."""
    rest = dict(fields)
    words = [rest.pop("id"), rest.pop("route")]
    if model := rest.pop("model", ""):
        words.append(f"{model} -> {rest.pop('mapped_model', '?')}")
    words += [f"{key}={value}" for key, value in rest.items()]
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]",
        lambda match: f"\\x{ord(match[0]):02x}",
        " ".join(words),
    )


# ==============================================================================
# 15. Store
# ==============================================================================

POOL_SAVE_S = 5.0  # what a killed process forgets of its counts
DATABASE_BUSY_S = 5.0  # SQLite's own default; a program that reads a backup takes less
RESPONSES_MAX = 10_000
RESPONSES_BYTES_MAX = 256 << 20  # of a disk
RESPONSES_MEMORY_MAX = 64 << 20  # of memory, where there is no file
RESPONSES_AGE_S = 30 * 24 * 3600.0  # since they were last used, as OpenAI keeps them
USED_S = 24 * 3600.0  # how exactly it is known when a response was used
SWEEP_SAVES = 100  # a sweep reads all sizes; so often it costs next to nothing

# Of `responses`, `keeper` names the process that still writes one. It is null where the response
# is over, and "" where nobody goes on with it. The tables are those of 0.1.0.
DATABASE_TABLES = """
PRAGMA auto_vacuum = FULL; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, client TEXT, previous TEXT, input BLOB, response BLOB, signatures BLOB,
    events BLOB, keeper TEXT, used REAL);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
CREATE TABLE IF NOT EXISTS pool (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
INSERT_SECRET = "INSERT OR IGNORE INTO secrets VALUES ('seal', ?)"
SELECT_SECRET = "SELECT value FROM secrets WHERE name = 'seal'"
INSERT_RESPONSE = "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
UPDATE_RESPONSE = """UPDATE responses
    SET response = ?, signatures = ?, events = ?, keeper = ?, used = ?
    WHERE id = ? AND keeper = ?"""
SELECT_RESPONSE = """SELECT used, id, previous, input, response, signatures, events, keeper
    FROM responses WHERE id = ? AND client = ?"""
SWEEP_RESPONSES = """DELETE FROM responses WHERE id IN (
    SELECT id FROM (
        SELECT id, used, row_number() OVER latest AS number,
            sum(length(input) + length(response) + length(events)) OVER latest AS size
        FROM responses WINDOW latest AS (ORDER BY used DESC, id))
    WHERE number > ? OR size > ? OR used < ?) AND keeper IS NOT ?"""

StoredState = Literal["over", "running", "lost"]
Clock = Callable[[], float]


class Database:
    """One SQLite file, used by a thread of its own, so that the event loop never waits for a disk.

    It is opened at its first use. Where another gateway uses it, or it cannot be opened, that is
    told in the log and everything is kept in memory, as without a path. Other programs may read
    the file meanwhile. What was committed outlives a killed process. Source: https://www.sqlite.org/wal.html
    """

    def __init__(self, path: Path | None) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.path = path
        self.process = secrets.token_hex(8)  # tells the rows of this process from older ones
        self._thread = ThreadPoolExecutor(1, "agproxy-store")
        self._files = contextlib.ExitStack()
        self._connection: sqlite3.Connection | None = None
        self._busy_until = 0.0

    async def run(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `step`, in a transaction that is committed then. Raises StoreTrouble.

        The step is done even where nobody waits for it any more.
        """
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._transact, step)
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        return await asyncio.shield(done)

    def _transact(self, step: Callable[[sqlite3.Connection], T]) -> T:
        if time.monotonic() < self._busy_until:  # else all would wait, one after the other
            raise StoreTrouble("The store is busy. Try again in some seconds.")
        try:
            self._connection = self._connection or self._open()
            with self._connection as connection:
                return step(connection)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
                self._busy_until = time.monotonic() + DATABASE_BUSY_S
            raise StoreTrouble(
                f"The store cannot be used ({error}). Try again, or look at proxy.store."
            ) from None

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return self._connect(":memory:")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.enter_context(file_held(self.path.with_name(f"{self.path.name}.lock")))
            for left in self.path.parent.glob(f"{self.path.name}.*.life"):
                left.unlink()  # by 0.1.0
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # for nobody else to read
            return self._connect(self.path)
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "%s cannot be used (%s); until the next start everything is kept in memory",
                self.path,
                error,
            )
            self._files.close()
            self.path = None
            return self._connect(":memory:")

    def _connect(self, path: Path | str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=DATABASE_BUSY_S, check_same_thread=False)
        self._files.enter_context(contextlib.closing(connection))
        connection.executescript(DATABASE_TABLES)
        return connection

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._files.close)
        self._thread.shutdown()


@contextlib.contextmanager
def file_held(path: Path) -> Iterator[None]:
    """Holds a file that the gateway of a store holds; in a killed process that ends, too.

    SQLite's lock is the one that all systems have. Raises OSError, and sqlite3.Error.
    """
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    with contextlib.closing(connection):
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # it would be left behind
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise OSError("another gateway uses it") from None
            raise
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@value
class StoredResponse:
    """One response as it is kept, in JSON that means nothing here."""

    id: str
    previous: str | None
    input: bytes  # as it was saved, for it may be long and is seldom read
    response: Any
    signatures: Any
    events: bytes
    state: StoredState  # lost: it was running in a process that ended


class ResponseStore:
    """The responses that are kept, bounded in number, size and age.

    Those least lately used give way. Each belongs to a client, by the name of its key, and nobody
    else is told of it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._secret, self._spare = b"", secrets.token_bytes(32)
        self._saves = self._unswept = 0  # how many, and how many bytes since the last sweep
        self._running: set[str] = set()  # of those that are written as running

    async def secret(self) -> bytes:
        """The key for what clients carry for all gateways that ever have this file."""

        def read(connection: sqlite3.Connection) -> bytes:
            connection.execute(INSERT_SECRET, (secrets.token_bytes(32),))
            return bytes(connection.execute(SELECT_SECRET).fetchone()[0])

        try:
            self._secret = self._secret or await self._database.run(read)
        except StoreTrouble as error:
            log.warning("signatures that clients carry are of use for now only: %s", error.message)
            return self._spare
        return self._secret

    async def save(
        self, id: str, state: StoredState, texts: Sequence[bytes], first: Sequence[Any] = ()
    ) -> None:
        """Writes a response, its signatures and its events, which are the `texts`.

        A new one comes with its client, previous id and input as `first`. Without them one that
        runs is written, unless it was deleted meanwhile. Raises StoreTrouble.
        """
        if state == "running":
            self._running.add(id)
        keeper = {"running": self._database.process, "over": None, "lost": ""}[state]

        def write(connection: sqlite3.Connection) -> None:
            response, signatures, events = texts
            values = (response, signatures, zlib.compress(events, 1), keeper, time.time())
            if first:
                connection.execute(INSERT_RESPONSE, (id, *first, *values))
            else:
                connection.execute(UPDATE_RESPONSE, (*values, id, self._database.process))
            self._unswept += sum(len(text or "") for text in (*texts, *first))
            self._sweep(connection)

        await self._database.run(write)

    def leave(self, id: str) -> None:
        """Nobody goes on with a response. Where its end could not be written, it is not told."""
        self._running.discard(id)

    def _sweep(self, connection: sqlite3.Connection) -> None:
        """Forgets what is too much or too old, now and then; what runs is spared."""
        self._saves += 1
        bytes_max = RESPONSES_BYTES_MAX if self._database.path else RESPONSES_MEMORY_MAX
        if self._saves % SWEEP_SAVES == 1 or self._unswept > bytes_max // 16:
            self._unswept = 0
            oldest = time.time() - RESPONSES_AGE_S
            limits = (RESPONSES_MAX, bytes_max, oldest, self._database.process)
            connection.execute(SWEEP_RESPONSES, limits)

    async def get(self, id: str, client: str) -> StoredResponse | None:
        return next(iter(await self.chain(id, client, 1)), None)

    async def chain(
        self, id: str, client: str, length_max: int = RESPONSES_MAX
    ) -> list[StoredResponse]:
        """A response and all that it goes on with, the first one first.

        It begins later where one is not kept any more. Raises StoreTrouble.
        """

        def read(connection: sqlite3.Connection) -> list[StoredResponse]:
            found: list[StoredResponse] = []
            now, unused = time.time(), []
            wanted: str | None = encoded(id).decode()  # a lone surrogate is in no id
            while wanted and len(found) < length_max:
                row = connection.execute(SELECT_RESPONSE, (wanted, client)).fetchone()
                if row is None or (response := self._stored(*row[1:])) is None:
                    break
                found.append(response)
                if row[0] < now - USED_S:
                    unused.append((now, wanted))
                wanted = response.previous
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk can be read
                connection.executemany("UPDATE responses SET used = ? WHERE id = ?", unused)
            return found[::-1]

        return await self._database.run(read)

    def _stored(self, id: str, *columns: Any) -> StoredResponse | None:
        """None for a response whose end could not be written."""
        previous, input, response, signatures, events, keeper = columns
        states: dict[str | None, StoredState] = {None: "over", self._database.process: "running"}
        state = states.get(keeper, "lost")
        if state == "running" and id not in self._running:
            return None
        parsed = (parse_json(response), parse_json(signatures), zlib.decompress(events))
        return StoredResponse(id, previous, input, *parsed, state)

    async def delete(self, id: str) -> None:
        """Raises StoreTrouble."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM responses WHERE id = ?", (id,))

        await self._database.run(delete)
        await self._database.run(empty_journal)


def empty_journal(connection: sqlite3.Connection) -> None:
    """The journal holds nothing deleted then, unless another program goes on reading it.

    Nobody waits for such a program.
    """
    pragmas = (
        "busy_timeout = 100",
        "wal_checkpoint(TRUNCATE)",
        f"busy_timeout = {1000 * DATABASE_BUSY_S:.0f}",
    )
    for pragma in pragmas:  # each is read to its end, or no other program can commit
        connection.execute(f"PRAGMA {pragma}").fetchall()


@dataclass(slots=True)
class PoolStore:
    """The state of the account pool beyond the process, of which changed rows are written.

    They are written every few seconds, and at once when an account goes into cooldown for long.
    Without its file the pool still serves.
    """

    _database: Database
    _pool: AccountPool
    _written: dict[str, str] = field(default_factory=dict)

    async def load(self, now: float) -> None:
        """Rows of accounts that are not in the config stay in the file."""

        def read(connection: sqlite3.Connection) -> dict[str, str]:
            return dict(connection.execute("SELECT name, value FROM pool"))

        texts = await self._run(read) or {}
        self._pool.restore(texts, now)
        known = self._pool.rows()
        self._written = {name: text for name, text in texts.items() if name in known}

    async def keep(self, urgent: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POOL_SAVE_S):
                    await urgent.wait()
            urgent.clear()
            await self.save()

    async def save(self) -> None:
        rows = self._pool.rows()
        changed = rows.items() - self._written.items()
        gone = self._written.keys() - rows.keys()

        def write(connection: sqlite3.Connection) -> bool:
            connection.executemany("INSERT OR REPLACE INTO pool VALUES (?, ?)", changed)
            connection.executemany("DELETE FROM pool WHERE name = ?", [(name,) for name in gone])
            return True

        if changed or gone:
            self._written = rows if await self._run(write) else self._written

    async def _run(self, step: Callable[[sqlite3.Connection], T]) -> T | None:
        try:
            return await self._database.run(step)
        except StoreTrouble as error:
            log.warning("the pool's state cannot be kept: %s", error.message)
            return None


# ==============================================================================
# 16. Credentials
# ==============================================================================

LOGIN_URL = "https://accounts.google.com/o/oauth2/v2/auth"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
TOKEN_S_MAX = 10.0  # for a token, or a step on the way to a project; a request waits for it
TOKEN_AHEAD_S = 240.0  # Google's own libraries renew a token about as long before its end
TOKEN_S = 3600  # how long a token is good where nobody says, and an assertion at most
ONBOARD_POLLS_MAX = 12  # a minute in all; Google's own client waits as long
ONBOARD_POLL_S = 5.0
CODE_ASSIST_CLIENT = {
    "metadata": {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED"}
}
OAUTH_CLIENT_ERRORS = (
    "invalid_client",
    "unauthorized_client",
    "invalid_request",
    "unsupported_grant_type",
    "invalid_scope",
)


@dataclass(slots=True)
class Token:
    """An account's token, and the refresh token where a newer one came than the config has."""

    header: str = ""
    until: float = 0.0
    refresh_token: str = ""
    tried: float = 0.0  # when it was last asked for


class Shared:
    """Work that is done once for all who want its result at the same time.

    A waiter who leaves does not end it for the others.
    """

    def __init__(self) -> None:
        self._tasks: dict[Any, asyncio.Task[Any]] = {}

    async def do(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await asyncio.shield(self.start(key, work))

    def start(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda _: self._tasks.pop(key))
            # its error counts as seen, though nobody may wait for it
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()


class Credentials:
    """The header that lets each account in, and the project that a cloudcode account works in."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._clock = clock
        self._tokens: dict[tuple[str, ...], Token] = {}
        self._projects: dict[str, str] = {}
        self._shared = Shared()
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Goes on with another config. Tokens stay good; projects are asked for anew."""
        self._config = config
        self._projects.clear()

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:
        return open_session(self._config.timeouts)

    async def close(self) -> None:
        self._shared.close()
        if "_session" in self.__dict__:
            await self._session.close()

    async def _call(self, account: Account, method: str, url: str, **sent: Any) -> tuple[int, Any]:
        """Status and JSON of an answer. Raises aiohttp.ClientError and OSError."""
        proxy = proxy_for(url, account.proxy or self._config.upstream_proxy)
        asked = self._session.request(method, url, proxy=proxy, allow_redirects=False, **sent)
        async with asyncio.timeout(TOKEN_S_MAX), asked as response:
            return response.status, parse_json(await response.read())

    # ---- tokens

    async def header(self, account: Account, refused: str = "") -> dict[str, str]:
        """`refused` is a token that the upstream did not take.

        Raises CredentialRefused, AccountBarred and TokenTrouble.
        """
        if account.kind == "gemini":
            return {"x-goog-api-key": account.api_key}
        key = (account.token_url, account.client_id, account.refresh_token, account.service_account)
        token = self._tokens.setdefault(key, Token())
        renew = functools.partial(self._renew, account, token)
        left_s = token.until - self._clock()
        if left_s <= 0 or token.header == refused:
            await self._shared.do(key, renew)
        elif left_s < TOKEN_AHEAD_S and self._clock() > token.tried + TOKEN_RETRY_S:
            self._shared.start(key, renew)  # nobody waits for it
        return {"Authorization": token.header}

    async def _renew(self, account: Account, token: Token) -> None:
        """Source: https://developers.google.com/identity/protocols/oauth2/web-server#offline"""
        now = token.tried = self._clock()
        form = {
            "grant_type": "refresh_token",
            "refresh_token": token.refresh_token or account.refresh_token,
            "client_id": account.client_id,
            "client_secret": account.client_secret,
        }
        if account.service_account:
            grant = "urn:ietf:params:oauth:grant-type:jwt-bearer"
            form = {"grant_type": grant, "assertion": signed_assertion(account, now)}
        elif not form["refresh_token"]:
            raise AccountBarred(
                f"{account.name} has no login yet. Run `agproxy login {account.name}`."
            )
        answer = await self._ask_token(account, form, "access_token")
        token.header = f"Bearer {answer['access_token']}"
        token.until = now + (count_of(answer.get("expires_in")) or TOKEN_S)
        token.refresh_token = str(answer.get("refresh_token") or token.refresh_token)

    async def redeem(self, account: Account, code: str, redirect: str, verifier: str) -> str:
        """The refresh token that a login was granted. Raises UpstreamError."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect,
            "code_verifier": verifier,
            "client_id": account.client_id,
            "client_secret": account.client_secret,
        }
        return str((await self._ask_token(account, form, "refresh_token"))["refresh_token"])

    async def _ask_token(
        self, account: Account, form: Mapping[str, str], wanted: str
    ) -> Mapping[str, Any]:
        try:
            status, answer = await self._call(account, "POST", account.token_url, data=form)
        except (aiohttp.ClientError, OSError):  # a TimeoutError is an OSError
            raise TokenTrouble(
                "The token endpoint could not be reached in time. Check the network and token_url.",
                retry_after_s=TOKEN_RETRY_S,
            ) from None
        fields = answer if isinstance(answer, dict) else {}
        if status != 200 or not isinstance(fields.get(wanted), str):
            raise token_error(account, status, fields)
        return fields

    # ---- projects

    async def project(self, account: Account, header: Mapping[str, str]) -> str:
        """The project that calls for an account name.

        A cloudcode account without one in the config has the one that the service names for it,
        never another. Raises UpstreamError.
        """
        known = account.project or self._projects.get(account.name)
        if known or account.kind != "cloudcode":
            return known or ""
        find = functools.partial(self._find_project, account, header)
        found = await self._shared.do(("project", account.name), find)
        self._projects[account.name] = found
        return found

    def forget_project(self, account: Account) -> None:
        """After a refusal: it may be another one by now."""
        self._projects.pop(account.name, None)

    async def _find_project(self, account: Account, header: Mapping[str, str]) -> str:
        """Raises CredentialRefused with what keeps the account out."""
        ask = functools.partial(self._ask_service, account, header)
        try:
            answer = await ask(":loadCodeAssist", CODE_ASSIST_CLIENT)
            project = answer.get("cloudaicompanionProject")
            tiers = [tier for tier in answer.get("allowedTiers") or () if tier.get("isDefault")]
            if not project and tiers and not answer.get("currentTier"):
                answer = await self._onboard(ask, tiers[0].get("id"))
                response = answer.get("response") or {}
                project = (response.get("cloudaicompanionProject") or {}).get("id")
            if not isinstance(project, str) or not project:
                raise no_project(account, answer)
        except (AttributeError, TypeError):
            raise UpstreamBroken(
                "What answers at base_url is not Code Assist. Check base_url."
            ) from None
        return project

    async def _onboard(self, ask: Callable[..., Awaitable[Any]], tier: Any) -> Any:
        """A user's first login, as Google's own clients do it: the service makes a project."""
        answer = await ask(":onboardUser", {"tierId": tier, **CODE_ASSIST_CLIENT})
        for _ in range(ONBOARD_POLLS_MAX):
            if answer.get("done"):
                break
            await asyncio.sleep(ONBOARD_POLL_S)
            answer = await ask(f"/{answer.get('name')}", None)
        return answer

    async def _ask_service(
        self, account: Account, header: Mapping[str, str], path: str, body: Any
    ) -> dict[str, Any]:
        """A call without a body is a GET. Raises UpstreamError."""
        method = "GET" if body is None else "POST"
        url = f"{account.base_url}/v1internal{path}"
        try:
            status, answer = await self._call(account, method, url, json=body, headers=header)
            if status == 401:
                header = await self.header(account, header["Authorization"])
                status, answer = await self._call(account, method, url, json=body, headers=header)
        except TimeoutError:
            raise UpstreamTimeout(
                "Code Assist did not name a project in time. Try again."
            ) from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamBroken(
                "Code Assist could not be reached. "
                "Check the network, base_url and whether a proxy is needed."
            ) from None
        if status != 200 or not isinstance(answer, dict):
            raise classify_error(status, answer)
        return answer


def no_project(account: Account, answer: Mapping[str, Any]) -> CredentialRefused:
    """The error for an account without a project, with the reasons that the service tells."""
    fields = ("reasonCode", "reasonMessage", "validationUrl", "message")
    refusals = (*(answer.get("ineligibleTiers") or ()), answer.get("error") or {})
    reasons = [" ".join(str(one[key]) for key in fields if one.get(key)) for one in refusals]
    why = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
    return CredentialRefused(
        f"The service has no project for {account.name}{why}. Set its `project`."
    )


def open_session(wait: Timeouts) -> aiohttp.ClientSession:
    """A session of aiohttp's client with a connection for each request."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=wait.connect_s),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def proxy_for(url: str, own: str | None) -> str | None:
    """The proxy to a URL: the configured one, else the environment's unless NO_PROXY excepts it.

    There is none to loopback.
    """
    import urllib.request as environment

    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return None
    if own:
        return own
    proxies = environment.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or environment.proxy_bypass_environment(parts.netloc, proxies):  # type: ignore[attr-defined]
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def login_url(account: Account, redirect: str, state: str, verifier: str) -> str:
    """The page where a user lets the account in.

    Source: https://www.rfc-editor.org/rfc/rfc7636#section-4
    """
    digest = hashlib.sha256(verifier.encode()).digest()
    query = {
        "client_id": account.client_id,
        "redirect_uri": redirect,
        "response_type": "code",
        "scope": SCOPE,
        "state": state,
        "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
        "code_challenge_method": "S256",
        "access_type": "offline",
        "prompt": "consent",
    }
    return f"{LOGIN_URL}?{urlencode(query)}"


def login_code(address: str, state: str) -> str:
    """The code in the address that a login ends at. Raises CredentialRefused."""
    query = parse_qs(address.strip().partition("#")[0].partition("?")[2])
    if query.get("state") != [state] or "code" not in query:
        why = "; ".join(query.get("error", ["it is not the address of this login"]))
        raise CredentialRefused(f"That address grants nothing ({why}). Begin again.")
    return query["code"][0]


def signed_assertion(account: Account, now: float) -> str:
    """A service account's word that it is itself. Raises CredentialRefused.

    Source: https://developers.google.com/identity/protocols/oauth2/service-account#authorizingrequests
    """
    try:
        crypt, jwt = (importlib.import_module(f"google.auth.{name}") for name in ("crypt", "jwt"))
    except ImportError:
        raise CredentialRefused(
            "A service account needs google-auth. Run `pip install google-auth`."
        ) from None
    key = json.loads(account.service_account)
    claims = {
        "iss": key["client_email"],
        "scope": SCOPE,
        "aud": account.token_url,
        "iat": int(now),
        "exp": int(now) + TOKEN_S,
    }
    try:
        signer = crypt.RSASigner.from_service_account_info(key)
        return bytes(jwt.encode(signer, claims)).decode()
    except ValueError:
        raise CredentialRefused(
            f"The private key in {account.credentials} is none. Make a new one."
        ) from None


def token_error(account: Account, status: int, answer: Mapping[str, Any]) -> UpstreamError:
    """The error for a token endpoint's refusal. Only invalid_grant is for good.

    Source: https://www.rfc-editor.org/rfc/rfc6749#section-5.2
    """
    code = why = str(answer.get("error") or f"HTTP {status}")
    if answer.get("error_description"):
        why = f"{code}: {answer['error_description']}"
    if code == "invalid_grant":
        return AccountBarred(
            f"The login of {account.name} is no longer good ({why}). "
            f"Run `agproxy login {account.name}`, or renew its credentials."
        )
    if code in OAUTH_CLIENT_ERRORS:
        return CredentialRefused(
            f"The token endpoint refuses the OAuth client ({why}). "
            "Check client_id and client_secret."
        )
    return TokenTrouble(
        f"The token endpoint fails ({why}). Try again.", retry_after_s=TOKEN_RETRY_S
    )


# ==============================================================================
# 17. Transport
# ==============================================================================

HEAD_BYTES_MAX = 64 << 10  # a server sends a few KiB; more is not the head of an answer
CHUNK_LINE_MAX = 4096  # a chunk's size has a few digits, and nobody sends long extensions
JOINED_BYTES_MAX = 64 << 10  # up to here a copy is cheaper than a second packet
UNREAD_BYTES_MAX = 256 << 10  # what the answer to a slow client may hold in memory
HAPPY_EYEBALLS_S = 0.25  # Source: https://www.rfc-editor.org/rfc/rfc8305#section-8


class Incoming(ABC):
    """An answer whose head is there, and whose body is pulled.

    `more` and `read` raise UpstreamTimeout and UpstreamBroken, and nothing foreign.
    """

    status: int
    headers: Mapping[str, str]  # by names in lower case

    @abstractmethod
    async def more(self, *, first: bool = False) -> bytes:
        """All that has come since, or b"" at the end. Silence counts only while somebody waits.

        Until something of the body is understood (`first`), it must come within first_event_s of
        the request. Afterwards no silence may last longer than idle_s.
        """

    @abstractmethod
    def abort(self, error: UpstreamError | None = None) -> None:
        """Ends an answer that is not over yet. The error is raised to whoever waits for more."""

    async def read(self) -> bytes:
        """The whole body, within first_event_s. Where the reader is cancelled, the answer ends."""
        pieces = []
        try:
            while data := await self.more(first=True):
                pieces.append(data)
        finally:
            self.abort()
        return b"".join(pieces)


def too_slow(first: bool) -> UpstreamTimeout:
    """The error of an answer that does not begin, or does not go on."""
    if first:
        return UpstreamTimeout("Gemini did not answer in time. Try again, or raise proxy.timeouts.")
    return UpstreamTimeout(
        "Gemini fell silent in the middle of its answer. Try again, or raise proxy.timeouts.idle_s."
    )


def broken_by(cause: BaseException, where: str = "Gemini") -> UpstreamBroken:
    """The error of a connection that was not made, or broke. It names no URL."""
    import socket  # both are loaded: asyncio needs them
    import ssl

    if isinstance(cause, ssl.SSLError):
        text = "Gemini's TLS certificate was refused. Check this machine's clock and SSL_CERT_FILE."
    elif isinstance(cause, socket.gaierror):
        text = "Gemini's host name could not be resolved. Check DNS and base_url."
    elif isinstance(cause, ConnectionError) and not isinstance(cause, ConnectionRefusedError):
        text = f"{where} broke the connection before an answer began. Try again."
    else:
        text = (
            "Gemini could not be reached. "
            "Check the network, base_url and whether a proxy is needed."
        )
    return UpstreamBroken(text)


class Unframer:
    """Bytes of an HTTP/1.1 body, cut anywhere, without their framing.

    Raises ValueError, also for broken gzip.
    Source: https://www.rfc-editor.org/rfc/rfc9112#section-7.1
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._until_close = not self._chunked and "content-length" not in headers
        self._left = 0  # of the body, or of the current chunk and the line end behind it
        if not self._chunked:
            self._left = int(headers.get("content-length", 0))
        self._line = b""  # the beginning of a line that was cut
        self._trailers = False  # the last chunk was there; lines up to an empty one follow
        self._unpack: Callable[[bytes], bytes] | None = None
        if headers.get("content-encoding", "") in ("gzip", "x-gzip", "deflate"):
            self._unpack = zlib.decompressobj(wbits=47).decompress
        self.done = not self._chunked and not self._until_close and self._left == 0
        self.behind = b""  # what came behind a chunked body

    def feed(self, data: bytes) -> bytes:
        if self._chunked:
            data = self._unchunk(data)
        elif not self._until_close:
            self._left -= len(data)
            self.done = self._left == 0
            if self._left < 0:
                raise ValueError("more than Content-Length")
        if self._unpack is None:
            return data
        try:
            return self._unpack(data)
        except zlib.error as error:
            raise ValueError("broken compression") from error

    def close(self) -> bool:
        """The connection ended. False where the body was cut off."""
        return self.done or self._until_close

    def _unchunk(self, data: bytes) -> bytes:
        data, at = self._line + data, self._left
        self._line, size = b"", len(data)
        pieces = [data[: at - 2]] if at > 2 else []
        while at < size and not self._trailers:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._keep_line(data[at:])
                break
            length = int(data[at:end].partition(b";")[0], 16)
            if length < 0:
                raise ValueError("negative chunk size")
            if length == 0:
                self._trailers, at = True, end + 2
            else:
                pieces.append(data[end + 2 : end + 2 + length])
                at = end + 4 + length
        self._left = max(0, at - size)
        if self._trailers:
            self._skip_trailers(data[at:])
        return b"".join(pieces)

    def _skip_trailers(self, data: bytes) -> None:
        while not self.done:
            line, end, data = data.partition(b"\r\n")
            if not end:
                return self._keep_line(line)
            self.done = not line
        self.behind = data

    def _keep_line(self, line: bytes) -> None:
        if len(line) > CHUNK_LINE_MAX:
            raise ValueError("endless line")
        self._line = line


class DirectIncoming(Incoming):
    """An answer on a connection of our own. It reads on until UNREAD_BYTES_MAX are not pulled."""

    def __init__(self, connection: Connection, timeouts: Timeouts) -> None:
        self.status = 0  # until the head has come
        self.headers = {}
        self._connection = connection
        self._begins_by = connection.loop.time() + timeouts.first_event_s
        self._idle_s = timeouts.idle_s
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._over = False
        self._error: UpstreamError | None = None

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, headers
        self._connection.wake()

    def push(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread += len(data)
        if self._unread > UNREAD_BYTES_MAX and not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()
        self._connection.wake()

    def end(self, error: UpstreamError | None = None) -> None:
        """The body is over, or with an error it was cut off."""
        if not self._over:
            self._over, self._error = True, error
            self._connection.wake()

    def resume(self) -> None:
        if self._paused and not self._over:
            self._paused = False
            self._connection.transport.resume_reading()

    async def head(self) -> None:
        """Returns once status and headers are there. Raises as `more`."""
        while not self.status and not self._over:
            await self._wait(first=True)
        if not self.status:
            raise self._error or broken_by(ConnectionError())

    async def more(self, *, first: bool = False) -> bytes:
        while not self._pieces and not self._over:
            await self._wait(first)
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        self.resume()
        if self._error and not data:
            raise self._error
        return data

    async def _wait(self, first: bool) -> None:
        moment = self._begins_by
        if not first:
            moment = self._connection.loop.time() + self._idle_s
        if not await self._connection.heard(moment):
            self.abort(too_slow(first))

    def abort(self, error: UpstreamError | None = None) -> None:
        if not self._over:
            self.end(error)
            self._connection.transport.abort()


class Connection:
    """One connection to an upstream, for one exchange after another; it is asyncio's protocol.

    Source: https://www.rfc-editor.org/rfc/rfc9112
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, idle: list[Connection], timeouts: Timeouts
    ) -> None:
        self.loop = loop
        self.silent = True  # nothing came back in this exchange yet
        self._idle = idle
        self._timeouts = timeouts
        self._head = b""
        self._incoming: DirectIncoming | None = None
        self._keep = True
        self._waiter: asyncio.Future[bool] | None = None
        self._moment = 0.0  # until which the waiter waits
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, head: bytes, body: bytes) -> Incoming:
        """Sends a request and waits for the head of its answer.

        Raises UpstreamTimeout and UpstreamBroken; where `silent` then holds, nothing was heard.
        """
        self.silent = True
        if self.transport.is_closing():
            raise broken_by(ConnectionError())
        self._incoming = incoming = DirectIncoming(self, self._timeouts)
        if len(body) < JOINED_BYTES_MAX:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        try:
            await incoming.head()
        except BaseException:
            incoming.abort()
            raise
        return incoming

    # ---- waiting

    async def heard(self, moment: float) -> bool:
        """Returns once something came, or false once that moment of the loop's clock has come."""
        self._moment = moment
        waiter: asyncio.Future[bool] = self.loop.create_future()
        self._waiter = waiter
        if self._timer is None or self._timer.when() > moment:
            self._set_timer()
        return await waiter

    def wake(self, heard: bool = True) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(heard)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._moment, self._ring)

    def _ring(self) -> None:
        """Each piece puts the moment off, so that one timer lasts for many of them."""
        self._timer = None
        if self._waiter is not None and self.loop.time() < self._moment:
            self._set_timer()
        else:
            self.wake(False)

    # ---- asyncio's protocol

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.silent = False
        incoming = self._incoming
        if incoming is None:
            return self.transport.abort()  # nothing was asked
        try:
            while data and not incoming.status:
                data = self._read_head(incoming, data)
            if incoming.status:
                if body := self._unframer.feed(data):
                    incoming.push(body)
                if self._unframer.done:
                    self._end(incoming)
        except (ValueError, IndexError):
            incoming.abort(broken_by(ConnectionError("what came is not HTTP")))

    def _read_head(self, incoming: DirectIncoming, data: bytes) -> bytes:
        """Reads status and headers, and returns what follows. Raises ValueError, IndexError."""
        head, found, body = (self._head + data).partition(b"\r\n\r\n")
        if not found:
            self._head = head
            if len(head) > HEAD_BYTES_MAX:
                raise ValueError("endless head")
            return b""
        self._head = b""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status = first.split(" ", 2)[:2]
        if status.startswith("1"):
            return body  # 100 Continue, 103 Early Hints: the answer is still to come
        headers = dict(map(known_field, lines))
        if status in ("204", "304"):
            headers["content-length"] = "0"
        self._keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        self._unframer = Unframer(headers)
        incoming.begin(int(status), headers)
        return body

    def _end(self, incoming: DirectIncoming) -> None:
        """The answer is whole; the connection may serve another one. Raises ValueError."""
        if self._unframer.behind:
            raise ValueError("something behind the last chunk")
        incoming.resume()  # the next answer comes here, whoever reads this one late
        self._incoming = None
        if self._keep and not self.transport.is_closing():
            self._idle.append(self)
        else:
            self.transport.close()
        incoming.end()

    def eof_received(self) -> None:
        """Nothing to do: asyncio closes the transport and calls connection_lost."""

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        if (incoming := self._incoming) is not None:
            self._incoming = None
            if incoming.status and error is None and self._unframer.close():
                incoming.end()
            else:
                incoming.end(broken_by(error or ConnectionError()))
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        """Nothing to do: asyncio keeps what the socket does not take yet of a body."""

    def resume_writing(self) -> None: ...


@functools.lru_cache(256)
def known_field(line: str) -> tuple[str, str]:
    """Name and value of an answer's header; most lines are those of the last answer."""
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


class DirectTransport:
    """Requests to one upstream over connections of our own, which are used again.

    No task and no queue stands between its socket and the client's.
    """

    proxy: None = None

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self._url = urlsplit(url)
        self._netloc = self._url.netloc.rpartition("@")[2]
        self._timeouts = timeouts
        self._idle: list[Connection] = []

    async def send(self, path: str, headers: Mapping[str, str], body: bytes | None) -> Incoming:
        """The answer to a POST, or without a body to a GET, once its head is there.

        Raises UpstreamTimeout and UpstreamBroken.
        """
        head = self._render_head(path, headers, body)
        while self._idle:
            connection = self._idle.pop()
            try:
                return await connection.exchange(head, body or b"")
            except UpstreamBroken:
                if not connection.silent:
                    raise  # else it was closed in the meantime
        connection = await self._connect()
        return await connection.exchange(head, body or b"")

    def _render_head(self, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        first = f"GET {self._url.path}{path} HTTP/1.1\r\n"
        if body is not None:
            first = f"POST {self._url.path}{path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        more = f"Host: {self._netloc}\r\nAccept-Encoding: gzip, deflate\r\n{lines}\r\n"
        return (first + more).encode()

    async def _connect(self) -> Connection:
        """Raises UpstreamBroken."""
        loop = asyncio.get_running_loop()
        protocol: Any = Connection(loop, self._idle, self._timeouts)  # asyncio's class comes late
        tls = tls_context() if self._url.scheme == "https" else None
        host, port = self._url.hostname or "", self._url.port or (443 if tls else 80)
        several: Any = {}
        if isinstance(loop, asyncio.BaseEventLoop) and not is_address(host):  # uvloop cannot
            several["happy_eyeballs_delay"] = HAPPY_EYEBALLS_S
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                await loop.create_connection(lambda: protocol, host, port, ssl=tls, **several)
        except (OSError, UnicodeError) as error:  # a timeout, too; and the name in http://a..b
            raise broken_by(error) from None
        return protocol  # type: ignore[no-any-return]

    async def close(self) -> None:
        for connection in list(self._idle):
            connection.transport.abort()


@functools.cache
def tls_context() -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context()


class ProxiedIncoming(Incoming):
    """An answer of aiohttp's client, which pauses by itself."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        begins_by: float,
        idle_s: float,
        proxy: str | None,
    ) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response
        self._begins_by, self._idle_s, self._proxy = begins_by, idle_s, proxy
        self._over = False
        self._error: UpstreamError | None = None

    async def more(self, *, first: bool = False) -> bytes:
        moment = self._begins_by
        if not first:
            moment = asyncio.get_running_loop().time() + self._idle_s
        data = b""
        try:
            async with asyncio.timeout_at(moment):
                data = await self._response.content.readany()  # b"" at the end
        except TimeoutError:
            self.abort(too_slow(first))
        except (aiohttp.ClientError, OSError) as error:
            self.abort(broken_over(self._proxy, error))
        if self._error and not data:
            raise self._error
        return data

    def abort(self, error: UpstreamError | None = None) -> None:
        if not self._over:
            self._over, self._error = True, error
            self._response.close()


class ProxiedTransport:
    """Requests through a proxy by aiohttp's client, over a connection for each."""

    def __init__(self, url: str, proxy: str | None, timeouts: Timeouts) -> None:
        self.proxy = proxy
        self._url = url
        self._timeouts = timeouts
        self._session = open_session(timeouts)

    async def send(self, path: str, headers: Mapping[str, str], body: bytes | None) -> Incoming:
        """As a DirectTransport's."""
        method = "GET" if body is None else "POST"
        begins_by = asyncio.get_running_loop().time() + self._timeouts.first_event_s
        asked = self._session.request(
            method,
            self._url + path,
            data=body,
            headers=headers,
            proxy=self.proxy,
            allow_redirects=False,
        )
        try:
            async with asyncio.timeout_at(begins_by):
                response = await asked
        except TimeoutError:
            raise too_slow(first=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise broken_over(self.proxy, error) from None
        return ProxiedIncoming(response, begins_by, self._timeouts.idle_s, self.proxy)

    async def close(self) -> None:
        await self._session.close()


def broken_over(proxy: str | None, error: Exception) -> UpstreamBroken:
    """The error for one of aiohttp's."""
    at_proxy = proxy is not None and getattr(error, "host", "") == host_of(proxy)
    of_proxy = (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)
    if at_proxy or isinstance(error, of_proxy):
        return UpstreamBroken(
            "The proxy to Gemini could not be used. Check proxy.upstream_proxy or HTTPS_PROXY."
        )
    cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    if not isinstance(cause, OSError):
        cause = ConnectionError()  # an answer that was cut or is not HTTP
    return broken_by(cause, "The proxy or Gemini" if proxy else "Gemini")


# ==============================================================================
# 18. Upstream
# ==============================================================================

RELOAD_CHECK_S = 1.0
MODELS_FRESH_S = 3600.0
MODELS_RETRY_S = 60.0
MODEL_PAGES_MAX = 100
MODELS_WAIT_S = 3.0  # a chat waits no longer for the list of models
EMBEDDINGS_A_CALL = 100
Attempt = Callable[[Lease], Awaitable[T]]
Mends = Callable[[UpstreamError], bool] | None
Barred = Mapping[str, UpstreamError]
NUMBERS = (secrets.token_hex(8), itertools.count(1))
quoted_model = functools.lru_cache(256)(quote)
WISHED = "%s is not listed by the upstream; %s is asked instead"


class Answer:
    """One answer that has begun: its first events are known, so nobody retries any more.

    Raises the error that they end with: nobody has seen them yet.
    """

    def __init__(self, first: list[Event], incoming: Incoming, reader: GeminiReader | None) -> None:
        if first and isinstance(first[-1], Failed):
            raise first[-1].error
        self.first = first
        self.last: Event | None = first[-1] if first and reader is None else None
        self.on_close: Callable[[Event | None], None] | None = None
        """Told at the end what the last event was, None where the client left before it."""
        self._incoming = incoming
        self._reader = reader
        self._late: UpstreamError | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._running = asyncio.Event()
        self._running.set()

    def end_by(self, seconds: float) -> None:
        """Breaks the answer off when it lasts longer."""
        error = UpstreamTimeout(
            "The answer took longer than proxy.timeouts.total_s. Raise it, or ask for less."
        )
        self._alarm = asyncio.get_running_loop().call_later(seconds, self.break_off, error)

    def break_off(self, error: UpstreamError) -> None:
        """Ends the answer; unless it was whole, its last event says why."""
        self._late = error
        self._incoming.abort()
        self._running.set()

    async def flow(self, sink: Callable[[list[Event]], None]) -> list[Event]:
        """Hands the events of each read to the sink as they come; those that end the answer are returned."""
        reader, self.first = self._reader, []
        if reader is None:
            return []
        failed: list[Event] = []

        try:
            while not failed and (data := await self._more()):
                events = reader.feed(data)
                if reader.error:
                    failed = events
                    self._incoming.abort()  # nobody waits for what is behind
                elif events:
                    sink(events)
        except UpstreamTimeout as error:
            self._late = self._late or error
        except UpstreamBroken:
            pass  # the reader knows whether the answer was whole
        events = failed or reader.close(self._late)
        self.last = events[-1] if events else None
        return events

    async def whole(self) -> Answer:
        """The same answer, read to its end. Raises the error that it ends with."""
        try:
            events = list(self.first)
            events += await self.flow(events.extend)
        finally:
            self.close()
        return Answer(events, self._incoming, None)

    async def _more(self) -> bytes:
        await self._running.wait()
        return await self._incoming.more()

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def close(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._incoming.abort()
        if self.on_close:
            self.on_close(self.last)
            self.on_close = None


class Merged:
    """Several answers as one: choices numbered through, usage added up; the first failure ends them all."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._usage = Usage()
        self.first = [
            event
            for choice, answer in enumerate(answers)
            for event in self._relay(choice, answer.first)
        ]
        self._tasks: list[asyncio.Task[list[Event]]] = []

    def _relay(self, choice: int, events: list[Event]) -> list[Event]:
        """The events under the number of their choice; the usage that ends them is kept for the end of all."""
        if events and isinstance(events[-1], Ended):
            self._usage += events[-1].usage
            events = events[:-1]
        return [renumbered(event, choice) for event in events]

    async def flow(self, sink: Callable[[list[Event]], None]) -> list[Event]:
        """As an Answer's; the events come interleaved."""

        async def relay(choice: int, answer: Answer) -> list[Event]:
            last = await answer.flow(lambda events: sink(self._relay(choice, events)))
            return self._relay(choice, last)

        self.first = []
        self._tasks = [
            asyncio.create_task(relay(choice, answer))
            for choice, answer in enumerate(self._answers)
        ]
        for done in asyncio.as_completed(self._tasks):
            events = await done
            if events and isinstance(events[-1], Failed):
                self.close()  # else the others would write behind the end
                return events
            sink(events)
        return [Ended(self._usage)]

    def break_off(self, error: UpstreamError) -> None:
        for answer in self._answers:
            answer.break_off(error)

    def pause(self) -> None:
        for answer in self._answers:
            answer.pause()

    def resume(self) -> None:
        for answer in self._answers:
            answer.resume()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            answer.close()


def close_answer(asked: asyncio.Task[Answer]) -> None:
    """Nobody waits for it any more."""
    if not asked.cancelled() and not asked.exception():
        asked.result().close()


def renumbered(event: Event, choice: int) -> Event:
    return event if isinstance(event, Started | Ended | Failed) else replace(event, choice=choice)


class Upstream:
    """The accounts' Gemini: HTTP, the list of models, and the one retry loop."""

    direct = True  # False: by aiohttp's client also where there is no proxy

    def __init__(self, config: Config) -> None:
        self.clock: Clock = time.time
        self.pool = AccountPool(())
        self.credentials = Credentials(config, lambda: self.clock())
        self._opened: dict[
            tuple[str, str | None, Timeouts], DirectTransport | ProxiedTransport
        ] = {}
        self._transports: dict[tuple[str, str | None], DirectTransport | ProxiedTransport] = {}
        self._shared = Shared()
        self._models: tuple[str, ...] | None = None
        self._listing: asyncio.Task[None] | None = None
        self._tell_once = functools.lru_cache(1024)(log.warning)
        self.rested = asyncio.Event()  # set when an account was sent to rest for long
        self.signatures = SignatureMemory()
        self.skew_s = 0.0
        self.media = MediaFetcher(config)
        self._config = config
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Goes on with another config. What runs is finished by the old one; accounts that are the same keep their state."""
        self.pool.update(config.accounts, config.strategy, config.reserve)
        self._transports.clear()
        self._config = self.media.config = config
        self.credentials.adopt(config)
        self._models_until = 0.0
        self._map_model = functools.lru_cache(1024)(
            lambda name, listed: map_model(name, config, listed)
        )
        self._traits_of = functools.lru_cache(lambda model: traits_of(model, config.traits))

    def _to(self, account: Account) -> DirectTransport | ProxiedTransport:
        """The transport to an account's upstream."""
        transport = self._transports.get((account.base_url, account.proxy))
        if transport is None:
            url, wait = account.base_url, self._config.timeouts
            proxy = proxy_for(url, account.proxy or self._config.upstream_proxy)
            if (transport := self._opened.get((url, proxy, wait))) is None:
                direct = proxy is None and self.direct
                transport = (
                    DirectTransport(url, wait) if direct else ProxiedTransport(url, proxy, wait)
                )
            self._transports[url, account.proxy] = self._opened[url, proxy, wait] = transport
        return transport

    async def close(self) -> None:
        self._shared.close()
        for opened in (*self._opened.values(), self.credentials, self.media):
            await opened.close()

    # ---- models

    async def resolve(self, name: str) -> str:
        """The upstream's name for a model. Raises ModelNotFound."""
        known = self._models is not None and time.monotonic() < self._models_until
        mapped = self._map_model(name, self._models if known else await self.models())
        if mapped.wished:
            self._tell_once(WISHED, mapped.wished, mapped.model)
        return mapped.model

    async def models(self) -> tuple[str, ...] | None:
        """What the upstream lists, fetched at the first need and renewed beside the requests; None while unknown."""
        if time.monotonic() >= self._models_until:
            self._models_until = time.monotonic() + MODELS_RETRY_S
            self._listing = self._shared.start(("models", id(self._config)), self._list_models)
        if self._models is None and self._listing:
            await asyncio.wait({self._listing}, timeout=MODELS_WAIT_S)
        return self._models

    async def _list_models(self) -> None:
        """What any account lists: they may differ in the models that they have. One that fails may have had some of them."""
        config, listed_s = self._config, MODELS_FRESH_S
        asked = [account for account in config.accounts if account.kind == "gemini"]
        listed: dict[str, None] = {}
        answers = await asyncio.gather(*map(self.models_of, asked), return_exceptions=True)
        for account, found in zip(asked, answers, strict=True):
            if isinstance(found, tuple):
                listed |= dict.fromkeys(found)
            else:
                log.debug("the models of %s cannot be listed: %s", account.name, found)
                if not isinstance(found, CredentialRefused):
                    listed |= dict.fromkeys(self._models or ())
                    listed_s = MODELS_RETRY_S
        if listed and self._config is config:  # else other accounts may have other ones
            self._models = tuple(listed)
            self._models_until = time.monotonic() + listed_s

    async def models_of(self, account: Account) -> tuple[str, ...]:
        """What one account's upstream lists; of those that list none, the best known, if it takes a word. Raises UpstreamError."""
        try:
            async with asyncio.timeout(self._config.timeouts.connect_s + MODELS_WAIT_S):
                return await (
                    self._pages_of(account) if account.kind == "gemini" else self._known_of(account)
                )
        except TimeoutError:
            raise too_slow(first=True) from None
        except MISSHAPEN:
            raise UpstreamBroken(
                "What answers at base_url is not Gemini. Check base_url."
            ) from None

    async def _known_of(self, account: Account) -> tuple[str, ...]:
        """Neither Vertex nor v1internal has a list; counting the tokens of a word proves the credentials for nothing."""
        model = STATIC_MODELS[1]
        body = countable(
            account.kind, model, b'{"contents":[{"role":"user","parts":[{"text":"hi"}]}]}'
        )
        answer = await json_of(await self._post(account, model, "countTokens", body))
        return STATIC_MODELS[:3] if answer["totalTokens"] else ()

    async def _pages_of(self, account: Account) -> tuple[str, ...]:
        """Source: https://ai.google.dev/api/models#method:-models.list"""
        names: list[str] = []
        page = ""
        for _ in range(MODEL_PAGES_MAX):
            path = f"/v1beta/models?pageSize=1000&pageToken={quote(page)}"
            headers = {"x-goog-api-key": account.api_key, "User-Agent": USER_AGENT}
            incoming = await self._to(account).send(path, headers, None)
            self.skew_s = clock_skew(incoming.headers.get("date"), time.time())
            answer = await json_of(incoming)
            for model in answer["models"]:
                if {"generateContent", "embedContent"} & set(
                    model.get("supportedGenerationMethods", ())
                ):
                    names.append(model["name"].removeprefix("models/"))
            page = answer.get("nextPageToken") or ""
            if not page:
                break
        return tuple(names)

    # ---- answers

    async def ask_all(self, requests: Sequence[Request], trace: Trace) -> Merged:
        """The answers to all requests as one, begun in all of them. Raises what the first failed one raised.

        Where an account takes few at once, each is read to its end: it would wait for those that wait for its account.
        """
        limits = [account.max_concurrency for account in self.pool.accounts]
        room = asyncio.Semaphore(sum(limit or CHOICES_MAX for limit in limits) or 1)

        async def begin(request: Request) -> Answer:
            async with room:
                answer = await self.ask(request, trace, sse=True)
                return await answer.whole() if any(limits) else answer

        tasks = [asyncio.create_task(begin(request)) for request in requests]
        try:
            return Merged(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
                task.add_done_callback(close_answer)
            raise

    async def ask(self, request: Request, trace: Trace, *, sse: bool) -> Answer:
        """An answer that has begun. Raises the error that ended the last attempt, PoolExhausted or UpstreamTimeout."""
        generation = Generation(request, sse, self.signatures.recall, self._traits_of)
        if self.pool.accounts:  # so that what is said of it is told even where nobody can be asked
            self._tell_changes(generation.form(trace.mapped_model, self.pool.accounts[0]), trace)
        total_s = self._config.timeouts.total_s
        asked = self._retry(
            trace, functools.partial(self._generate, generation, trace), generation.mends, {}
        )
        if not total_s:
            return await asked
        try:
            async with asyncio.timeout(total_s):
                answer = await asked
        except TimeoutError:
            raise UpstreamTimeout(
                "No answer began within proxy.timeouts.total_s. Raise it, or try again."
            ) from None
        answer.end_by(total_s - (time.monotonic() - trace.started))
        return answer

    async def embed(self, request: EmbeddingRequest, trace: Trace) -> tuple[list[list[float]], int]:
        """The vectors of the texts, in their order, and how many tokens they took. Raises as `ask`."""
        vectors: list[list[float]] = []
        tokens, model = 0, trace.mapped_model
        others = [account.name for account in self.pool.accounts if account.kind != "gemini"]
        barred = dict.fromkeys(
            others, ModelGone("makes no embeddings, only accounts of kind gemini do")
        )
        while len(vectors) < len(request.texts):
            texts = request.texts[len(vectors) : len(vectors) + EMBEDDINGS_A_CALL]
            answer = await self._retry(
                trace, functools.partial(self._batch_embed, request, texts), None, barred
            )
            if (
                trace.mapped_model != model and vectors
            ):  # those of two models cannot be compared: all are made anew
                vectors, tokens, model = [], 0, trace.mapped_model
                continue
            model = trace.mapped_model
            vectors += read_embeddings(answer, len(texts))
            tokens += usage_of(answer["usageMetadata"]).prompt
        return vectors, tokens

    async def _retry(self, trace: Trace, attempt: Attempt[T], mends: Mends, barred: Barred) -> T:
        """The one retry loop: over the model and those that `models.fallback` names, while nobody can answer for one.

        Raises PoolExhausted, or the error that every account would give. Who is `barred` is not asked, for the reason given
        there; what `mends` changed the body for is tried on the same account.
        """
        asked = trace.mapped_model
        chain = self._chain(asked, trace.model)
        turn = Attempts(self.pool, trace, barred, self._config.max_wait_s, self.clock)
        for model in chain:
            trace.mapped_model = model
            turn.begin(model, last=model == chain[-1])
            try:
                answer = await self._ask(turn, trace, attempt, mends)
            except PoolExhausted as error:
                if model == chain[-1] or not error.falls_back:
                    raise
            else:
                if model != asked:
                    trace.changes += 1  # no account could answer for the model that was asked for
                return answer
        raise AssertionError("a chain has a last model")

    def _chain(self, asked: str, name: str) -> list[str]:
        """A model, and those that are asked instead: by its own name, else by the client's. Who is unknown is passed over."""
        chain = {asked: None}
        for model in self._config.fallback.get(asked) or self._config.fallback.get(name, ()):
            try:
                chain[self._map_model(model, self._models).model] = None
            except ModelNotFound as error:
                self._tell_once("models.fallback: %s", error.message)
        return list(chain)

    async def _ask(self, turn: Attempts, trace: Trace, attempt: Attempt[T], mends: Mends) -> T:
        for number in range(1, ATTEMPTS_MAX + 1):
            lease = await turn.lease()
            try:
                return await self._try(lease, trace, attempt, turn.step)
            except UpstreamError as error:
                mended = mends is not None and number < ATTEMPTS_MAX and mends(error)
                if error.remedy == "give_up" and not mended:
                    raise
                turn.refused(
                    lease, error.with_traceback(None), mended
                )  # the pool keeps it, but not its frames' body
        raise turn.exhausted()

    async def _try(self, lease: Lease, trace: Trace, attempt: Attempt[T], step: Step) -> T:
        """One attempt, and what the pool learns from it. The lease lasts as long as the answer."""
        trace.attempts += 1
        trace.account, step.account = lease.account, lease.account.name
        try:
            result = await attempt(lease)
        except BaseException as error:
            told: object = error
            if isinstance(error, GatewayError):
                told = error.message = functools.reduce(
                    without_secret, secrets_of(lease.account), error.message
                )
            step.answer = f"{type(error).__name__}: {told}"
            self._ended(lease, error)
            raise
        step.answer = "answered"
        self.pool.succeeded(lease, self.clock())
        if isinstance(result, Answer):
            result.on_close = functools.partial(self._ended, lease)
        else:
            told = result.get("usageMetadata") if isinstance(result, dict) else None
            self._ended(lease, Ended(usage_of(told)) if isinstance(told, dict) else None)
        return result

    def _ended(self, lease: Lease, by: Event | BaseException | None) -> None:
        """Gives the lease back: `by` an answer's last event, what was raised before it, or nothing of either."""
        error = by.error if isinstance(by, Failed) else by
        if not isinstance(
            error, UpstreamError
        ):  # all is well, the client left, or what it sent cannot be used
            return self.pool.release(
                lease, by.usage.prompt if isinstance(by, Ended) else 0, self.clock()
            )
        if isinstance(error, CredentialRefused | ModelGone):
            self.credentials.forget_project(lease.account)
        self.pool.failed(lease, error, self.clock(), random.random())
        if isinstance(error, QuotaGone):
            self.rested.set()

    def _tell_changes(self, form: RequestBody, trace: Trace) -> None:
        """Raises BadRequest where something is lost that may not be."""
        trace.changes = len(form.changes)
        if trace.strict:
            refuse_dropped(form.changes)

    async def _generate(self, generation: Generation, trace: Trace, lease: Lease) -> Answer:
        account = lease.account
        form = generation.form(lease.model, account)
        self._tell_changes(form, trace)
        sse = (
            generation.sse or account.kind == "cloudcode"
        )  # which refuses what is not streamed sooner
        method = "streamGenerateContent?alt=sse" if sse else "generateContent"
        incoming = await self._post(account, lease.model, method, form.body)
        try:
            return await first_events(
                incoming, generation.reader(form, account), sse, generation.sse
            )
        except BaseException:
            incoming.abort()
            raise

    async def count(self, request: Request, trace: Trace) -> int:
        """How many tokens a request is. Raises as `ask`. Source: https://ai.google.dev/api/tokens"""
        generation = Generation(request, False, self.signatures.recall, self._traits_of)

        async def attempt(lease: Lease) -> dict[str, Any]:
            form = generation.form(lease.model, lease.account)
            return await self._unary(
                lease, "countTokens", countable(lease.account.kind, lease.model, form.body)
            )

        answer = await self._retry(trace, attempt, None, {})
        return count_of(answer.get("totalTokens"))

    async def _batch_embed(
        self, request: EmbeddingRequest, texts: Sequence[str], lease: Lease
    ) -> dict[str, Any]:
        """Source: https://ai.google.dev/api/embeddings#method:-models.batchembedcontents"""
        body = dump_bytes(build_embeddings(texts, lease.model, request.dimensions))
        answer = await self._unary(lease, "batchEmbedContents", body)
        told = answer.get("usageMetadata")
        if not isinstance(told, dict) or not usage_of(told).prompt:
            answer["usageMetadata"] = {
                "promptTokenCount": sum(len(text) // 4 + 1 for text in texts)
            }
        return answer

    async def _unary(self, lease: Lease, method: str, body: bytes) -> dict[str, Any]:
        answer = await json_of(await self._post(lease.account, lease.model, method, body))
        if not isinstance(answer, dict):
            raise UpstreamBroken("Gemini sent something that cannot be understood. Try again.")
        return answer

    # ---- the wire

    async def _post(self, account: Account, model: str, method: str, body: bytes) -> Incoming:
        """The head of an answer; where a token is refused, that of a second try with a fresh one."""
        transport, refused = self._to(account), ""
        while True:
            header = await self.credentials.header(account, refused)
            project = await self.credentials.project(account, header)
            path, sent = enveloped(account, project, model, method, body)
            about = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
            incoming = await transport.send(path, header | about, sent)
            if incoming.status != 401 or account.kind == "gemini" or refused:
                return incoming
            incoming.abort()
            refused = header["Authorization"]


def enveloped(
    account: Account, project: str, model: str, method: str, body: bytes
) -> tuple[str, bytes]:
    """The path and the body of a call, as the account's kind of upstream wants them.

    Source: https://ai.google.dev/api/generate-content, https://cloud.google.com/vertex-ai/docs/reference/rest
    """
    if account.kind == "gemini":
        return f"/v1beta/models/{quoted_model(model)}:{method}", body
    if account.kind == "vertex":
        place = f"projects/{quote(project)}/locations/{account.location}/publishers/google"
        return f"/v1/{place}/models/{quoted_model(model)}:{method}", body
    if method == "countTokens":
        return f"/v1internal:{method}", body
    about = dump_bytes({"model": model, "project": project})
    return f"/v1internal:{method}", b'%b,"request":%b}' % (about[:-1], body)


class Attempts:
    """Whom one request asks for one model after another, and how long it waits for them in all."""

    def __init__(
        self, pool: AccountPool, trace: Trace, barred: Barred, patience_s: float, clock: Clock
    ) -> None:
        self._pool, self._trace, self._barred = pool, trace, barred
        self._patience_s, self._clock = patience_s, clock

    def begin(self, model: str, *, last: bool) -> None:
        self._model, self._last, self._tried = model, last, set(self._barred)
        self._refusals: dict[str, UpstreamError] = dict(self._barred)
        self._same: PoolEntry | None = None
        self._mended = False
        self._spare = True

    async def lease(self) -> Lease:
        """The next account, once it may be asked. Raises PoolExhausted.

        The same one where the body was mended for it; else an untried one; else, for a fault that is not its own, the
        same one, once; else the soonest of those that rest, if that is soon: then also one that was refused before.
        """
        self.step = step = Step(self._model)
        self._trace.steps.append(step)
        while True:
            step.seen.clear()
            key, now = self._trace.affinity, self._clock()
            again = len(self._refusals) > len(self._barred)
            if not self._mended and (
                lease := self._pool.acquire(self._model, self._tried, key, now, step.seen, again)
            ):
                return lease
            if same := self._same:
                if not self._mended:
                    self._spare = False
                    await self._wait(self._pause_s(self._refusals[same.account.name]))
                self._same, self._mended = None, False
                if lease := self._pool.again(same, self._model, self._clock()):
                    return lease
                continue
            lasting = (name for name in self._tried if self._refusals[name].scope == "nobody")
            self._tried = {*lasting, *self._barred}
            wait_s = self._pool.wait_s(self._model, self._tried, self._clock())
            if wait_s > self._patience_s:
                raise self.exhausted()
            await self._wait(
                min(wait_s, RELOAD_CHECK_S)
            )  # by then a reload, or a person, may have ended the rest

    async def _wait(self, wait_s: float) -> None:
        self._patience_s -= wait_s
        self.step.wait_s += wait_s
        await asyncio.sleep(wait_s)

    def _pause_s(self, error: UpstreamError) -> float:
        """Before the same account is asked again: as long as it says, where no other model could answer sooner."""
        told_s = error.retry_after_s if self._last else None
        return random.uniform(0.2, 1.0) if told_s is None or told_s > self._patience_s else told_s

    def refused(self, lease: Lease, error: UpstreamError, mended: bool) -> None:
        """The account is not asked again by this request, unless its body was `mended` or the fault was not its own."""
        self._refusals[lease.account.name] = error
        self._tried.add(lease.account.name)
        self._mended = mended
        self._same = (
            lease.entry if mended or (error.remedy == "same_account" and self._spare) else None
        )

    def exhausted(self) -> PoolExhausted:
        return self._pool.exhausted(self._model, self._refusals, self._clock())


@value
class RequestBody:
    """A request's body as one model and one dialect want it, and what could not be carried into it."""

    body: bytes
    changes: tuple[Change, ...]
    tools: Mapping[str, Tool]


def next_id() -> str:
    """24 hexadecimal digits that no other start of a gateway gives, at a tenth of what chance costs a request."""
    return f"{NUMBERS[0]}{next(NUMBERS[1]):08x}"


@dataclass(slots=True)
class Generation:
    """One answer to be had: its forms, each made at the first need of it, and the readers of what comes."""

    request: Request
    sse: bool
    recall: Callable[[Request, str], Request]
    traits_of: Callable[[str], Traits]
    unsigned: bool = False
    reduced: bool = False
    forms: dict[tuple[str, Dialect], RequestBody] = field(default_factory=dict)

    def form(self, model: str, account: Account) -> RequestBody:
        dialect: Dialect = "gemini" if account.kind == "gemini" else "vertex"
        form = self.forms.get((model, dialect))
        if form is None:
            signed = self.recall(self.request, model)
            request = with_signatures(signed, unsigned) if self.unsigned else signed
            traits = self.traits_of(model)
            traits = replace(traits, json_schema=False) if self.reduced else traits
            built = build_generate_content(request, traits, dialect)
            body = with_payloads(dump_bytes(built.body), request.payloads)
            form = self.forms[model, dialect] = RequestBody(
                body, request.changes + built.changes, built.tools
            )
        return form

    def mends(self, error: UpstreamError) -> bool:
        """Whether the body was changed so that the same account may be asked again: each thing once."""
        mended = False
        if isinstance(error, SignatureRefused) and not self.unsigned:
            self.unsigned = mended = True
        elif isinstance(error, SchemaRefused) and not self.reduced:
            self.reduced = mended = any(
                b'JsonSchema":' in form.body for form in self.forms.values()
            )
        if mended:
            self.forms.clear()
        return mended

    def reader(self, form: RequestBody, account: Account) -> GeminiReader:
        kind = CloudCodeReader if account.kind == "cloudcode" else GeminiReader
        made = kind(
            lambda: f"call_{next_id()}", form.tools, parallel_calls=self.request.parallel_calls
        )
        made.secret, made.stops = account.api_key, bool(self.request.stop)
        return made


async def json_of(incoming: Incoming) -> Any:
    """What an answer says. Raises what a status other than 200 means, and the transport's errors."""
    answer = parse_json(await incoming.read())
    if incoming.status != 200:
        raise classify_error(incoming.status, answer, incoming.headers.get("retry-after", ""))
    return answer


async def first_events(
    incoming: Incoming, reader: GeminiReader, sse: bool, streamed: bool
) -> Answer:
    """The answer with its first events, or with all of them where it is not `streamed` on.

    Raises what the status or the first event says, and the transport's errors.
    """
    if incoming.status != 200:
        await json_of(incoming)  # which raises
    if not streamed:
        body = await incoming.read()
        events = reader.feed(body) + reader.close() if sse else reader.whole(body)
        return Answer(events, incoming, None)
    while data := await incoming.more(first=True):
        if events := reader.feed(data):
            return Answer(events, incoming, reader)
    return Answer(reader.close(), incoming, None)


def clock_skew(date: str | None, now: float) -> float:
    """Seconds by which this machine's clock is ahead of an answer's Date header; 0 without one."""
    from email.utils import parsedate_to_datetime

    try:
        return now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, OverflowError):
        return 0.0


# ==============================================================================
# 19. Media
# ==============================================================================

MEDIA_BYTES_MAX = 20 << 20
MEDIA_LINKS_MAX = 16
MEDIA_S_MAX = 20.0
REDIRECTS_MAX = 5
# What Gemini itself follows: its Files API, YouTube, and on Vertex a bucket.
PASSED_LINKS = re.compile(
    r"(?i)https://(generativelanguage\.googleapis\.com/v1beta/files/|(www\.)?youtube\.com/|youtu\.be/)|gs://"
)


class MediaFetcher:
    """Fetches what requests only link to; no address but a public one is ever asked."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=PublicResolver(self._may_ask))  # type: ignore[arg-type]  # imported late
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def close(self) -> None:
        if "_session" in self.__dict__:
            await self._session.close()

    async def filled(self, request: Request) -> Request:
        """The request with the content of its links. Raises BadRequest with the path of the part."""
        links = {part.url: part for message in request.messages for part in links_in(message.parts)}
        if not links:
            return request
        if len(links) > MEDIA_LINKS_MAX:
            text = f"There are {len(links)} links to media. Send at most {MEDIA_LINKS_MAX}."
            raise BadRequest(text, code="invalid_value")
        tasks = [asyncio.create_task(self._fetch_in_time(media)) for media in links.values()]
        try:
            content = dict(zip(links, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()  # after the first that fails nobody wants the others
        messages = [
            replace(message, parts=with_content(message.parts, content))
            for message in request.messages
        ]
        return replace(request, messages=tuple(messages))

    async def _fetch_in_time(self, media: Media) -> Media:
        if not self.config.fetch_media:
            raise self._refused(media, "is a link, and proxy.fetch_media is off")
        try:
            async with asyncio.timeout(MEDIA_S_MAX):
                return await self._fetch(media)
        except TimeoutError:
            raise self._refused(media, f"did not come within {MEDIA_S_MAX:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise self._refused(media, "could not be fetched") from None

    async def _fetch(self, media: Media) -> Media:
        url = media.url
        for _ in range(REDIRECTS_MAX + 1):
            asked = aiohttp.client.URL(url)  # type: ignore[attr-defined]  # which reads digits of any script
            host = asked.raw_host or ""
            if is_address(host) and not self._may_ask(host, host):
                raise self._refused(
                    media,
                    "leads to a private address; name its host in proxy.media_hosts to allow it",
                )
            async with self._session.get(asked, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status != 200:
                    raise self._refused(media, f"answered HTTP {response.status}")
                return await self._content(media, response)
        raise self._refused(media, f"was redirected more than {REDIRECTS_MAX} times")

    async def _content(self, media: Media, response: aiohttp.ClientResponse) -> Media:
        mime = MEDIA_ALIASES.get(response.content_type, response.content_type)
        if mime == "application/octet-stream":
            mime = media_type_by(urlsplit(media.url).path)
        if not MEDIA_TYPES.fullmatch(mime):
            raise self._refused(media, f"is of type {mime}, which Gemini does not read")
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > MEDIA_BYTES_MAX:
                raise self._refused(media, f"is larger than {MEDIA_BYTES_MAX >> 20} MB")
        return replace(media, url="", mime=mime, data=base64.b64encode(data).decode())

    def _refused(self, media: Media, what: str) -> BadRequest:
        text = f"'{media.path}' {what}. Send the content itself as a data: URL."
        return BadRequest(text, code="invalid_image_url", param=media.path)

    def _may_ask(self, host: str, address: str) -> bool:
        return host in self.config.media_hosts or is_public(address)


class PublicResolver:
    """Resolves names as aiohttp's own resolver does, and keeps the addresses that may be asked."""

    def __init__(self, may_ask: Callable[[str, str], bool]) -> None:
        self._may_ask = may_ask
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[Any]:
        found = await self._resolver.resolve(host, port, family)  # type: ignore[arg-type]  # whatever it is asked
        if not all(self._may_ask(host, one["host"]) for one in found):
            raise OSError(f"{host} leads to a private address")
        return list(found)

    async def close(self) -> None:
        await self._resolver.close()


def links_in(parts: Iterable[Part]) -> Iterable[Media]:
    """The media that are to be fetched, also inside tool results."""
    for part in parts:
        if isinstance(part, ToolResult):
            yield from links_in(part.parts)
        elif isinstance(part, Media) and part.url and not PASSED_LINKS.match(part.url):
            yield part


def with_content(parts: Iterable[Part], content: Mapping[str, Media]) -> tuple[Any, ...]:
    """The parts with the content of their links."""
    made: list[Any] = []
    for part in parts:
        if isinstance(part, ToolResult):
            made.append(replace(part, parts=with_content(part.parts, content)))
        else:
            made.append(content.get(part.url, part) if isinstance(part, Media) else part)
    return tuple(made)


# ==============================================================================
# 20. Kept responses
# ==============================================================================

JOBS_MAX = 64


def interrupted(response: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a response that was not over when the gateway stopped making it."""
    text = "The gateway stopped before this response was over. Ask again."
    return {**response, "status": "failed", "error": {"code": "server_error", "message": text}}


@dataclass(slots=True)
class Kept:
    """The place of one response in the store: it is written when the answer begins, and when it is over."""

    id: str
    renderer: ResponseRenderer
    payloads: Mapping[str, bytes]
    _store: ResponseStore
    _model: Callable[[], str]
    given: Sequence[Any]  # what only its first row has, until that is written
    _state: StoredState = "over"

    def object(self) -> bytes:
        """The response as far as it is made."""
        return with_payloads(dump_bytes(self.renderer.response), self.payloads)

    async def save(self, state: StoredState | None = None, events: bytes = b"") -> bool:
        """Writes what the response has become, and whether it could; a disk that refuses costs nobody an answer."""
        running = self.renderer.response["status"] in ("queued", "in_progress")
        self._state = state or ("running" if running else "over")
        signatures = [signature_entry(part, self._model()) for part in self.renderer.signed]
        given, self.given = self.given, ()
        try:
            await self._store.save(
                self.id, self._state, (self.object(), dump_bytes(signatures), events), given
            )
            return True
        except StoreTrouble as error:
            self.given = given  # the next save begins anew
            log.warning("%s cannot be kept: %s", self.id, error.message)
            return False

    async def leave(self) -> None:
        """Tells the store that nobody goes on with a response that has begun."""
        if self._state == "running":
            await self.save("lost")
        self._store.leave(self.id)


class Job:
    """A response that is made beside every connection; its frames are kept for whoever follows it."""

    def __init__(
        self,
        kept: Kept,
        upstream: Upstream,
        request: Request,
        trace: Trace,
        running: dict[Any, Any],
    ) -> None:
        self.kept, self.trace, self._upstream, self._running = kept, trace, upstream, running
        self._frames = split_frames(
            with_payloads(encoded(kept.renderer.begin("queued")), kept.payloads)
        )
        self._whole = False
        self._grown = asyncio.Event()
        self.task = asyncio.create_task(self._make(request))
        self.task.add_done_callback(lambda _: self._add([]))
        running[self.task] = None

    def _render(self, events: list[Event]) -> list[bytes]:
        self._upstream.signatures.remember(events, self.trace.mapped_model)
        return split_frames(
            with_payloads(encoded(self.kept.renderer.frames(events)), self.kept.payloads)
        )

    async def _make(self, request: Request) -> None:
        try:
            last = await self._ask(request, lambda events: self._add(self._render(events)))
            if last and isinstance(last[-1], Ended):
                self.trace.usage = last[-1].usage
            elif last and isinstance(last[-1], Failed):
                self.trace.error = last[-1].error.code or last[-1].error.type
            frames = self._render(last)
            events = b"".join([*self._frames, *frames])
            saved, self._whole = await self.kept.save(events=events), True
            self._add(frames)
            while not saved and not self.kept.given:  # else it would read as running for ever
                await asyncio.sleep(DATABASE_BUSY_S)
                saved = await self.kept.save(events=events)
        finally:
            await self.kept.leave()

    async def _ask(self, request: Request, sink: Callable[[list[Event]], None]) -> list[Event]:
        """Hands the events to the sink as they come; those that end the answer, in whatever way, are returned."""
        try:
            with Unbegun(self._running, self.task):
                answer = await self._upstream.ask(request, self.trace, sse=True)
            with contextlib.closing(answer):
                self._running[self.task] = answer
                sink(answer.first)
                return await answer.flow(sink)
        except GatewayError as error:
            return [Failed(error)]
        except asyncio.CancelledError:
            return [Failed(STOPPED)]

    def _add(self, frames: list[bytes]) -> None:
        self._frames += frames
        self._grown.set()
        self._grown = asyncio.Event()

    async def end(self) -> None:
        """Waits until the response is over, and kept where it can be."""
        while not (self._whole or self.task.done()):
            await self._grown.wait()

    async def follow(self, at: int) -> AsyncIterator[bytes]:
        """The frames from one on, as they come."""
        while True:
            grown = self._grown
            if new := self._frames[at:]:
                at += len(new)
                yield b"".join(new)
            elif self._whole:
                return
            elif self.task.done():
                self.task.result()  # raises what kept it from its end: nobody takes a part for the whole
            else:
                await grown.wait()


def split_frames(data: bytes) -> list[bytes]:
    """The frames of a Responses stream, each at the place of its sequence number."""
    return [frame + b"\n\n" for frame in data.split(b"\n\n")[:-1]]


def is_reference(item: Mapping[str, Any]) -> bool:
    return item.get("type") == "item_reference" or (item.get("type") is None and "role" not in item)


# How items are named that are kept, by the response that they belong to.
ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{24})i?[0-9a-f]{4}")


def numbers_in(query: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a URL's query, with numbers as such."""
    return {
        key: int(value) if re.fullmatch(r"-?\d{1,9}", value, re.ASCII) else value
        for key, value in query.items()
    }


def page_of(items: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of a response's input, its last item first unless it is asked for otherwise. Raises BadRequest."""
    fields = Fields(numbers_in(query))
    limit, order, after = (
        fields.count("limit", 100) or 20,
        query.get("order", "desc"),
        query.get("after"),
    )
    if order not in ("asc", "desc"):
        raise fields.wrong("order", f"is '{order}'", "Send asc or desc")
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise fields.wrong(
            "after",
            f"is '{after}', which is no item of this response",
            "Send an id of the page before",
        )
    start = ids.index(after) + 1 if after else 0
    data, shown = items[start : start + limit], ids[start : start + limit] or [""]
    more = start + limit < len(items)
    return {
        "object": "list",
        "data": data,
        "first_id": shown[0],
        "last_id": shown[-1],
        "has_more": more,
    }


# ==============================================================================
# 21. Web
# ==============================================================================

DRAIN_S = 30.0
BODY_S_MAX = 120.0  # a body that trickles longer holds nobody up
LINGER_S = 10.0  # for the rest of a body that nobody reads
KEEP_ALIVE_S = 75.0  # for the next request on a connection, and for the whole head of one
FILES_KEPT = 64  # for what is not a request: listeners, the log, idle connections
UNSENT_BYTES_MAX = 256 << 10
HEARTBEAT = b": keep-alive\n\n"  # a comment, which every reader of event streams skips
REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([^\x00-\x20\x7f]+) HTTP/1\.([01])")
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
GIVEN_ONCE = ("host", "content-length", "transfer-encoding", "content-type", "authorization")
CLOSE: Mapping[str, str] = {"Connection": "close"}


def parse_head(data: bytes) -> tuple[str, str, bool, dict[str, str]]:
    """Method, target, whether it is HTTP/1.1, and the headers by names in lower case. Raises ValueError.

    Stricter than it must be: what two programs may read in two ways is no request.
    Source: https://www.rfc-editor.org/rfc/rfc9112#section-11.2
    """
    first, *lines = data.decode("utf-8", "surrogateescape").split("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if line is None:
        raise ValueError("no request line")
    headers: dict[str, str] = {}
    for one in lines:
        name, value = known_header(one) if len(one) < HEADER_KNOWN_MAX else parse_header(one)
        if name in headers:
            if name in GIVEN_ONCE:
                raise ValueError(f"more than one {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if "host" not in headers and line[3] == "1":
        raise ValueError("no host")
    return line[1], line[2], line[3] == "1", headers


def parse_header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    name = name.lower()
    if not colon or not HEADER_NAME.fullmatch(name) or CONTROLS.search(value):
        raise ValueError("an odd header line")
    return name, value.strip(" \t")


HEADER_KNOWN_MAX = 200
known_header = functools.lru_cache(256)(
    parse_header
)  # a client's lines are mostly those of its last request


def body_length(new: bool, headers: Mapping[str, str]) -> int:
    """How many bytes of body follow a head, -1 where it comes in chunks. Raises ValueError."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length", "0")
    if coding is not None:
        if coding.lower() != "chunked" or "content-length" in headers or not new:
            raise ValueError("a transfer-encoding other than chunked alone")
        return -1
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise ValueError("an odd content-length")
    return int(length)


@dataclass(slots=True)
class HttpResponse:
    """An answer that is not streamed."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class StrictUnframer:
    """Bytes of an HTTP/1.1 body, cut anywhere, without their framing. Raises ValueError, also for broken gzip.

    Source: https://www.rfc-editor.org/rfc/rfc9112#section-7.1
    """

    def __init__(self, headers: Mapping[str, str], *, strict: bool = True) -> None:
        self._strict = strict
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._until_close = not self._chunked and "content-length" not in headers
        self._left = 0 if self._chunked else int(headers.get("content-length", 0))
        """Of the body, or of the current chunk and the line end behind it."""
        self._line = b""
        self._trailers = False
        packed = headers.get("content-encoding", "") in ("gzip", "x-gzip", "deflate")
        self._unpack = zlib.decompressobj(wbits=47).decompress if packed else None
        self.done = not self._chunked and not self._until_close and self._left == 0
        self.behind = b""  # what came behind the last chunk

    def feed(self, data: bytes) -> bytes:
        if self._chunked:
            data = self._unchunk(data)
        elif not self._until_close:
            if len(data) > self._left:
                raise ValueError("more than Content-Length")
            self._left -= len(data)
            self.done = self._left == 0
        try:
            return self._unpack(data) if self._unpack else data
        except zlib.error as error:
            raise ValueError("broken compression") from error

    def close(self) -> bool:
        """The connection ended: whether the body is whole."""
        return self.done or self._until_close

    def _unchunk(self, data: bytes) -> bytes:
        if self._line:
            data, self._line = self._line + data, b""
        pieces, at, size = [], 0, len(data)
        while at < size and not self.done:
            if not self._left:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._line = data[at:]
                    break
                self._left = self._after_size(data[at:end])
                at = end + 2
            stop = at + self._left
            if self._strict and not b"\r\n".endswith(
                data[max(at, stop - 2) : stop], 0, 2 - max(0, stop - size)
            ):
                raise ValueError("no line end behind a chunk")
            if self._left > 2:
                pieces.append(data[at : stop - 2])  # as far as it came
            self._left, at = (0, stop) if stop <= size else (stop - size, size)
        if len(self._line) > CHUNK_LINE_MAX:
            raise ValueError("endless chunk size")
        self.behind = data[at:] if self.done else b""
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _after_size(self, line: bytes) -> int:
        """How many bytes follow a chunk's size line: the chunk, and the line end behind it."""
        if self._trailers:
            self.done = not line
            return 0
        digits = line if b";" not in line else line.partition(b";")[0]
        if self._strict and not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
            raise ValueError("an odd chunk size")
        size = int(digits, 16)
        if size > 0:
            return size + 2
        if size < 0:
            raise ValueError("negative chunk size")
        self._trailers = True
        return 0


class HttpRequest:
    """One request of a client, and the way back to it. Raises ValueError for a head that is not HTTP/1.1."""

    __slots__ = (
        *(
            "method",
            "path",
            "headers",
            "close",
            "begun",
            "ended",
            "whole",
            "source",
            "task",
            "quiet",
        ),
        *(
            "_query",
            "_new",
            "_connection",
            "_left",
            "_chunks",
            "_pieces",
            "_size",
            "_come",
            "_error",
        ),
    )

    def __init__(self, connection: ClientConnection, head: bytes) -> None:
        self.method, target, self._new, self.headers = parse_head(head)
        path, _, self._query = target.partition("?")
        self.path = unquote(path if path.startswith("/") else urlsplit(path).path or path)
        said = self.headers.get("connection", "").lower()
        self.close = "close" in said or not (self._new or "keep-alive" in said)
        self.begun = self.ended = False  # whether the head of the answer went out, and its end
        self.quiet = True  # nothing was written since somebody looked
        self.task: asyncio.Task[None] | None = None  # who answers it
        self.source: Answer | Merged | None = (
            None  # which pauses while the client does not take what was written
        )
        self._connection = connection
        self._left = body_length(self._new, self.headers)
        self._chunks = StrictUnframer({"transfer-encoding": "chunked"}) if self._left < 0 else None
        self.whole = self._left == 0  # whether all of the body is there
        self._pieces: list[bytes] = []
        self._size = 0
        self._come: asyncio.Future[None] | None = None
        self._error: GatewayError | None = None

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self._query, keep_blank_values=True))

    @property
    def remote(self) -> str:
        return str((self._connection.transport.get_extra_info("peername") or [""])[0])

    # ---- its body

    def feed(self, data: bytes) -> bytes:
        """Takes in what is of the body; returns what is behind it. Raises ValueError."""
        if self._chunks:
            piece = self._chunks.feed(data)
            rest, self.whole = self._chunks.behind, self._chunks.done
        else:
            piece, rest = (
                (data, b"") if len(data) <= self._left else (data[: self._left], data[self._left :])
            )
            self._left -= len(piece)
            self.whole = self._left == 0
        if not self.begun:  # else nobody will read it
            self._size += len(piece)
            self._pieces.append(piece)
        if self._size > BODY_BYTES_MAX:
            self._pieces.clear()
        if self.whole or self._size > BODY_BYTES_MAX:
            self._wake()
        return rest

    def fail(self, error: GatewayError) -> None:
        """The body cannot be read to its end; what its reader is told."""
        self._error, self.whole, self.close = error, True, True
        self._wake()

    def _wake(self) -> None:
        if self._come and not self._come.done():
            self._come.set_result(None)

    async def read(self) -> bytes:
        """The body, unpacked, once. Raises BodyTooLarge, BodyTooSlow, and BadRequest for a broken one."""
        if self._left > BODY_BYTES_MAX:
            raise too_large()
        if not self.whole:
            if (
                self._new
                and self.headers.get("expect", "").lower() == "100-continue"
                and not self._size
            ):
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if max(self._left, self._size) > LARGE_BYTES:
                keep_buffers()
            await self._rest_of_body(BODY_S_MAX)
        if self._error or self._size > BODY_BYTES_MAX:
            raise self._error or too_large()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        packing = self.headers.get("content-encoding", "identity").lower()
        return data if packing == "identity" else unpacked(data, packing)

    async def _rest_of_body(self, seconds: float) -> None:
        """Until the body is there or is too large. Raises BodyTooSlow."""
        self._come = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._come
        except TimeoutError:
            text = (
                f"The body did not come within {seconds:.0f} s. Send it faster, or a smaller one."
            )
            raise BodyTooSlow(text, headers=CLOSE) from None

    async def discard(self) -> None:
        """Takes the rest of a body that nobody reads, or the client would not hear the answer before it has sent all."""
        self.close, self._size = True, 0
        with contextlib.suppress(BodyTooSlow):
            await self._rest_of_body(LINGER_S)

    # ---- its answer

    def send(self, response: HttpResponse) -> None:
        """The whole answer. A HEAD's has no body."""
        self.begun = self.ended = True
        self.close |= response.headers.pop("Connection", "") == "close" or not self.whole
        length = {} if response.status == 204 else {"Content-Length": str(len(response.body))}
        head = self._render_head(response.status, response.headers | length)
        self._connection.transport.write(head if self.method == "HEAD" else head + response.body)

    def begin(self, headers: Mapping[str, str], data: bytes) -> None:
        """The head of an answer of unknown length, and what is there of its body."""
        self.begun, self.quiet = True, False
        self.headers = {}  # a stream may last long
        self.close |= not (self._new and self.whole)
        framing = {"Transfer-Encoding": "chunked"} if self._new else {}
        self._connection.transport.write(
            self._render_head(200, {**headers, **framing}) + self._framed(data)
        )

    def write(self, data: bytes) -> None:
        """A piece of the body; whoever is gone gets nothing."""
        self.quiet, transport = False, self._connection.transport
        if data and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._new else data)

    def end(self, data: bytes) -> None:
        """The last piece."""
        self.ended = True
        if not self.gone:
            self._connection.transport.write(
                self._framed(data) + (b"0\r\n\r\n" if self._new else b"")
            )

    @property
    def gone(self) -> bool:
        return self._connection.transport.is_closing()

    @property
    def full(self) -> bool:
        """Whether the client has yet to take what was written before anything else is."""
        return self._connection.room is not None

    async def taken(self) -> None:
        """Returns once the client has taken most of what was written."""
        if self._connection.room:
            await self._connection.room

    def abort(self) -> None:
        """Cuts the connection, so that nobody takes a part for the whole."""
        self._connection.transport.abort()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self._new else data

    def _render_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        keep = CLOSE if self.close else {} if self._new else {"Connection": "keep-alive"}
        return render_head(status, {**keep, **headers})


def render_head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [
        f"{name}: {value if value.isprintable() else printable(value)}\r\n"
        for name, value in headers.items()
    ]
    first = f"HTTP/1.1 {status} {reason_of(status)}\r\nDate: {http_date(int(time.time()))}\r\n"
    return encoded(f"{first}{''.join(lines)}\r\n")


def printable(value: str) -> str:
    """A header's value without what would end it."""
    return "".join(c if c.isprintable() else "?" for c in value)


@functools.cache
def reason_of(status: int) -> str:
    from http import HTTPStatus

    return HTTPStatus(status).phrase if status != 499 else "Client Closed Request"


@functools.lru_cache(1)
def http_date(now: int) -> str:
    """Source: https://www.rfc-editor.org/rfc/rfc9110#section-5.6.7"""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))


def too_large(when: str = "") -> BodyTooLarge:
    return BodyTooLarge(
        f"The body is larger than {BODY_BYTES_MAX >> 20} MB{when}. Send a smaller one."
    )


def unpacked(data: bytes, packing: str) -> bytes:
    """The body as it was before it was packed. Raises BadRequest, BodyTooLarge."""
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise BadRequest(
            f"Content-Encoding '{packing[:40]}' is not served. Send the body as it is, or packed by gzip."
        )
    raw = packing == "deflate" and not (
        data[:1] == b"\x78" and int.from_bytes(data[:2]) % 31 == 0
    )  # as some send it
    unpack = zlib.decompressobj(-15 if raw else 47)
    try:
        body = unpack.decompress(data, BODY_BYTES_MAX + 1)
    except zlib.error:
        body = b""
    if len(body) > BODY_BYTES_MAX:
        raise too_large(" when unpacked")
    if not unpack.eof or unpack.unused_data:
        raise BadRequest(
            "The body cannot be unpacked as its Content-Encoding says. Send it as it is.",
            headers=CLOSE,
        )
    return body


@functools.cache
def keep_buffers() -> None:
    """Keeps glibc from giving the buffers of large bodies back to the system, only to fault them in anew each time.

    Done at the first large body, for it takes ten milliseconds of a start.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


class App:
    """Who answers: `handle` raises nothing, `drain` lets running answers finish, `close` ends the rest."""

    async def handle(self, http: HttpRequest) -> HttpResponse:
        raise NotImplementedError

    async def drain(self) -> None: ...
    async def close(self) -> None: ...


class Server:
    """What the connections of one listener share: who answers, and how many there may be."""

    def __init__(self, app: App, connections_max: float, stall_s: float) -> None:
        self.app, self.connections_max, self.stall_s = app, connections_max, stall_s
        self.connections: set[ClientConnection] = set()
        self.loop = asyncio.get_running_loop()
        self._sweep()

    def _sweep(self) -> None:
        """Closes the connections on which no whole head came for too long; one timer for them all."""
        for connection in [*self.connections]:
            if self.loop.time() - connection.since > KEEP_ALIVE_S:
                connection.transport.close()
        self._alarm = self.loop.call_later(KEEP_ALIVE_S / 8, self._sweep)

    async def close(self) -> None:
        """Ends all connections; what was written has a second to be taken."""
        self._alarm.cancel()
        for connection in [*self.connections]:
            connection.transport.close()
        until = self.loop.time() + 1
        while self.connections and self.loop.time() < until:
            await asyncio.sleep(0.005)
        for connection in [*self.connections]:
            connection.transport.abort()


class ClientConnection:
    """A client's connection, one request after another; asyncio's transport calls it as its protocol."""

    __slots__ = ("_deaf", "_request", "_rest", "_server", "_stall", "room", "since", "transport")

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rest = b""  # what came and belongs to no request yet
        self._request: HttpRequest | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.since = (
            server.loop.time()
        )  # when it was made, or its last request was over; never while there is one
        self._deaf = False
        self.room: asyncio.Future[None] | None = (
            None  # done once most of what was written is taken; None where it is
        )

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(UNSENT_BYTES_MAX, UNSENT_BYTES_MAX // 4)
        self._server.connections.add(self)
        if len(self._server.connections) > self._server.connections_max:
            text = "As many connections are open as open files allow. Close some, or raise their limit (ulimit -n)."
            self._refuse(Overloaded(text))
            transport.close()

    def data_received(self, data: bytes) -> None:
        request = self._request
        if self._deaf:
            return
        if request and not request.whole:
            try:
                data = request.feed(data)
            except ValueError as error:
                self._deaf = True
                return request.fail(not_http(error))
        if data:
            self._rest = self._rest + data if self._rest else data
            if not request:
                self._next()
            elif len(self._rest) > HEAD_BYTES_MAX:
                self.transport.pause_reading()

    def _next(self) -> None:
        """Begins the next request once its head is there."""
        self._rest = self._rest.lstrip(b"\r\n")
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if len(head) > HEAD_BYTES_MAX:
            return self._refuse(
                BadRequest(f"The head is larger than {HEAD_BYTES_MAX >> 10} KiB. Send less of it.")
            )
        if not found and head[:1].isalpha() | (not head):
            return  # there is more to come
        try:
            request = HttpRequest(self, head)
            self._rest = rest if request.whole else request.feed(rest)
        except ValueError as error:
            return self._refuse(not_http(error))
        self._request, self.since = request, math.inf
        request.task = self._server.loop.create_task(self._serve(request))

    async def _serve(self, request: HttpRequest) -> None:
        try:
            response = await self._server.app.handle(request)
            if not request.begun:
                request.send(response)
            if not request.whole:
                await request.discard()
            await (
                request.taken()
            )  # or requests in a row of a client that reads nothing would fill the memory
        except BaseException:
            self.transport.abort()
            raise
        self._request = request.task = None
        self.since = self._server.loop.time()
        if request.close:
            self.transport.close()
        elif self._rest and not self.transport.is_closing():
            self.transport.resume_reading()
            self._next()

    def _refuse(self, error: GatewayError) -> None:
        """The last answer of a connection; what still comes is not heard."""
        self._deaf = True
        body = dump_bytes(openai_error(error))
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **CLOSE}
        self.transport.write(render_head(error.status, headers) + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._server.loop.call_later(1, self.transport.close)

    def eof_received(self) -> None:
        """Nothing to do: asyncio closes the transport and calls connection_lost."""

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        if self._stall:
            self._stall.cancel()
        if (
            self._request and self._request.task
        ):  # nobody is asked any more for a client that is gone
            self._request.task.cancel()

    # ---- a client that is slow

    def pause_writing(self) -> None:
        self.room = self._server.loop.create_future()
        self._watch(-1)
        if self._request and self._request.source:
            self._request.source.pause()

    def resume_writing(self) -> None:
        if self._stall:
            self._stall.cancel()
        if self.room and not self.room.done():
            self.room.set_result(None)
        self.room = None
        if self._request and self._request.source:
            self._request.source.resume()

    def _watch(self, unsent: int) -> None:
        """Cuts off who has taken nothing for `stall_s`."""
        left = self.transport.get_write_buffer_size()
        if left == unsent:
            return self.transport.abort()
        self._stall = self._server.loop.call_later(self._server.stall_s, self._watch, left)


def not_http(error: ValueError) -> BadRequest:
    return BadRequest(
        f"What came is not HTTP/1.1 ({error}). Check the client, and that it uses no TLS here."
    )


async def listen(
    app: App,
    host: str,
    port: int,
    stack: contextlib.AsyncExitStack,
    open_max: float = math.inf,
    stall_s: float = 120.0,
) -> int:
    """Serves until the stack ends, then first lets nobody in any more; the port that it listens on. Raises OSError."""
    server = Server(app, open_max, stall_s)
    connect: Any = functools.partial(
        ClientConnection, server
    )  # no class of asyncio's, so that --help does not load it
    stack.push_async_callback(app.close)
    listener = await server.loop.create_server(connect, host, port, backlog=1024)
    stack.push_async_callback(server.close)
    stack.push_async_callback(app.drain)
    stack.callback(listener.close)
    for socket in listener.sockets:
        if (
            sys.platform == "linux"
        ):  # what a client does not take for so long ends its connection, streams or not
            socket.setsockopt(6, 18, round(stall_s * 1000))  # IPPROTO_TCP, TCP_USER_TIMEOUT
    return int(listener.sockets[0].getsockname()[1])


DOORS: Mapping[str, tuple[Callable[[Any], Request | list[Request]], type[Renderer]]] = {
    "chat/completions": (parse_chat, ChatRenderer),
    "completions": (parse_completion, CompletionRenderer),
    "responses": (parse_response, ResponseRenderer),
}
STORED = "responses/{id}"
METHODS = {
    **dict.fromkeys(("healthz", "models", f"{STORED}/input_items"), "GET"),
    **dict.fromkeys((*DOORS, "embeddings", "responses/input_tokens", f"{STORED}/cancel"), "POST"),
    STORED: "GET, DELETE",
}
ENDPOINTS = f"models|embeddings|{'|'.join(DOORS)}"
# Base URLs get pasted whole and paths stacked (Kilo Code: /v1/chat/completions/responses): the last endpoint wins.
ROUTE = re.compile(
    rf"(?:/(?:v1|{ENDPOINTS}))*/(?P<route>healthz|responses/input_tokens|{ENDPOINTS})"
    r"(?:(?<=models)/(?P<id>(?s:.+?))|(?<=responses)/(?P<stored>(?!compact/?$)[^/]+)(?P<part>/input_items|/cancel)?)?/?"
)


@functools.lru_cache(256)
def match_route(path: str) -> tuple[str, re.Match[str] | None]:
    """The route of a path, the path itself where it has none; and what is named in it."""
    match = ROUTE.fullmatch(re.sub("/{2,}", "/", path))
    if match and match["stored"]:
        return STORED + (match["part"] or ""), match
    return match["route"] if match else path, match


CLIENT_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
ADMIN = re.compile(r"/agproxy/(?P<what>status|why|pool|reload)(?:/(?P<id>[\w.:-]+))?")
POOL_ACTIONS = ("reset", "pause", "resume")


@value
class Source:
    """Where the config came from: `load` reads it again, or raises ConfigError; `asked` is set to have that done."""

    path: Path
    load: Callable[[], Config]
    asked: asyncio.Event


def stamp_of(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        about = os.stat(path)
        return about.st_mtime_ns, about.st_size
    return None


@dataclass(eq=False, repr=False)
class Gateway(App):
    _config: Config
    _upstream: Upstream
    _store: ResponseStore
    _running_max: float
    _source: Source | None
    _drain_s: float
    tally: Tally = field(default_factory=Tally)
    _journal: deque[tuple[Trace, int, float]] = field(
        default_factory=lambda: deque(maxlen=JOURNAL_MAX)
    )
    at_end: contextlib.AsyncExitStack = field(
        default_factory=contextlib.AsyncExitStack
    )  # done by close()
    _jobs: dict[str, Job] = field(default_factory=dict)
    _running: dict[Any, Unbegun | Answer | Merged | None] = field(
        default_factory=dict
    )  # by a request's or job's task
    _draining: bool = False

    async def drain(self) -> None:
        """Lets running answers finish; those that take longer end with an error, told in their client's form."""
        self._draining = True
        await self._wait(self._drain_s)
        for answer in [*self._running.values()]:
            if answer:
                answer.break_off(STOPPED)
        await self._wait(1)
        for task in self._running:
            task.cancel()
        await self._wait(1)

    async def _wait(self, seconds: float) -> None:
        if self._running:
            await asyncio.wait([*self._running], timeout=seconds)

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.at_end.aclose()

    async def handle(self, http: HttpRequest) -> HttpResponse:
        """Every request: named, let in or not, answered, and told the truth where it fails."""
        trace = Trace(self._config, f"req_{next_id()}", http.path, time.monotonic())
        given = http.headers.get("x-request-id") or http.headers.get("x-client-request-id") or ""
        trace.client_id = given if CLIENT_ID.fullmatch(given) else ""
        response: HttpResponse | None = None
        self._running[http.task] = None
        try:
            found = self._route(http, trace)
            response = found if isinstance(found, HttpResponse) else await found
        except GatewayError as error:
            if error.code == "context_length_exceeded":
                error.param = "input" if trace.route == "responses" else "messages"
            response = error_response(error, trace)
        except RecursionError:
            response = error_response(
                BadRequest("The body is nested too deep. Send flatter JSON."), trace
            )
        except Exception as error:
            log.error("%s failed", trace.id, exc_info=without_words(error))
            response = error_response(
                GatewayError("The gateway failed. Its log says why; please report it."), trace
            )
        finally:
            del self._running[http.task]
            self._tell(trace, response.status if response else 499)
        response.headers |= self._cors(http)
        return response

    def _tell(self, trace: Trace, status: int) -> None:
        """What happened, for the log, the bill and `agproxy why`."""
        self.tally.add(trace, status)
        if trace.steps:
            self._journal.append((trace, status, time.monotonic()))
        if log.isEnabledFor(logging.INFO):
            fields = log_fields(trace, status, time.monotonic())
            log.info("%s", log_text(fields), extra={"fields": fields})

    def _route(
        self, http: HttpRequest, trace: Trace
    ) -> HttpResponse | Coroutine[Any, Any, HttpResponse]:
        """The answer, or who gives it. Raises GatewayError for whom is not let in."""
        route, match = match_route(http.path)
        trace.route = route
        self._guard(http)
        if http.method == "OPTIONS":
            return HttpResponse(status=204, headers=trace.headers(time.monotonic()))
        self._let_in(http.headers, trace)
        if admin := ADMIN.fullmatch(http.path):
            return self._tell_json(self._administer(http, admin["what"], admin["id"] or ""), trace)
        if match is None:
            base = f"http://{http.headers.get('host', 'localhost')}/v1"
            raise UnknownUrl(
                f"Invalid URL ({http.method} {http.path}). Set the base URL to {base}."
            )
        if ("GET" if http.method == "HEAD" else http.method) not in METHODS[route].split(", "):
            text = f"{http.method} is not served at /v1/{route}. Use {METHODS[route]}."
            raise MethodNotAllowed(text, headers={"Allow": METHODS[route]})
        if self._draining:
            raise Overloaded("The gateway is being stopped. Ask again in a moment.", headers=CLOSE)
        if len(self._running) - len(self._jobs) > self._running_max:
            text = f"The gateway serves {self._running_max} requests at once, as its limit of open files allows."
            raise Overloaded(f"{text} Try again later, or raise it (ulimit -n).")
        if route == "healthz":
            return json_response({"status": "ok", "version": __version__}, trace)
        if route == "models":
            return self._tell_json(self._models(match["id"]), trace)
        if route in ("embeddings", "responses/input_tokens"):
            return self._serve_whole(http, trace)
        if route.startswith(STORED):
            return self._serve_stored(http, trace, match["stored"])
        return self._answer(http, trace)

    async def _tell_json(self, told: Awaitable[Any], trace: Trace) -> HttpResponse:
        return json_response(await told, trace)

    async def _serve_whole(self, http: HttpRequest, trace: Trace) -> HttpResponse:
        work = self._embed if trace.route == "embeddings" else self._count
        trace.affinity = zlib.crc32(
            trace.id.encode()
        )  # no prompt cache knows them: any account by its weight
        with Unbegun(self._running, http.task):
            return await work(parse_body(await http.read()), trace)

    async def _administer(self, http: HttpRequest, what: str, id: str) -> Any:
        """What `agproxy status`, `why`, `pool` and `reload` ask: with a key, or where none is needed from this machine."""
        here = is_loopback(http.remote) or http.remote == self._config.bind
        if self._config.auth == "off" and (not here or "origin" in http.headers):
            raise Forbidden(
                f"Only programs on this machine may do that. Call from it, or {ASK_FOR_A_KEY}."
            )
        if http.method != (method := "POST" if what in ("pool", "reload") else "GET"):
            raise MethodNotAllowed(
                f"{http.method} is not served here. Use {method}.", headers={"Allow": method}
            )
        now = self._upstream.clock()
        if what == "status":
            return {"version": __version__, "accounts": self._upstream.pool.status(now)}
        if what == "why":
            for trace, status, ended in self._journal:
                if trace.id == id:
                    return log_fields(trace, status, ended) | {"decisions": decisions_of(trace)}
            raise UnknownUrl(
                f"No request '{id}' is known, of the last {JOURNAL_MAX}. Name one by its X-Request-Id."
            )
        if what == "reload":
            try:
                return {"accounts": await self.reload()}
            except ConfigError as error:
                raise BadRequest(
                    f"{error}\nThe config stays as it was. Mend that.", code="config_invalid"
                ) from None
        fields = Fields(parse_body(await http.read()))
        action, name = fields.needed_text("action"), fields.needed_text("account")
        if action not in POOL_ACTIONS:
            raise fields.wrong("action", f"is '{action}'", f"Send one of {', '.join(POOL_ACTIONS)}")
        model = fields.text("model") or ""
        known = {row["model"] for one in self._upstream.pool.status(now) for row in one["models"]}
        model = await self._upstream.resolve(model) if model and model not in known else model
        if not self._upstream.pool.steer(action, name, model):
            raise fields.wrong("account", "is no account's name", "Send a name of `agproxy status`")
        return {"accounts": self._upstream.pool.status(now)}

    async def reload(self) -> int:
        """Reads the config anew and counts its accounts. Raises ConfigError where it is no use, and changes nothing."""
        try:
            if self._source is None:
                raise ConfigError("This gateway has no accounts file that it could read again.")
            config = await asyncio.to_thread(self._source.load)
            if (config.bind, config.port) != (self._config.bind, self._config.port):
                raise ConfigError(
                    "Where it listens changed (host, port, allow_lan_access). Restart it for that."
                )
            if config.store != self._config.store:
                raise ConfigError(
                    "Where responses are kept changed (proxy.store). Restart it for that."
                )
        except ConfigError as error:
            log.warning("the config stays as it was: %s", error)
            raise
        self._config = replace(config, host=self._config.host)
        self._upstream.adopt(self._config)
        log.info("the config was read again: %d accounts", len(config.accounts))
        return len(config.accounts)

    async def watch(self, source: Source) -> None:
        """Reloads when a file of the config's changes, and when that is asked for."""
        seen = self._stamps(source)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_CHECK_S):
                    await source.asked.wait()
            now = self._stamps(source)
            if source.asked.is_set() or now != seen:
                source.asked.clear()
                with contextlib.suppress(ConfigError):  # told by the log
                    await self.reload()
                    now = [now[0], *self._stamps(source)[1:]]
                seen = now

    def _stamps(self, source: Source) -> list[tuple[int, int] | None]:
        """When each file of the config's was changed, and how long it is."""
        return [
            stamp_of(path)
            for path in (str(source.path), *(a.credentials for a in self._config.accounts))
        ]

    def _let_in(self, headers: Mapping[str, str], trace: Trace) -> None:
        mode = self._config.auth
        if mode == "off" or (mode == "all_except_health" and trace.route == "healthz"):
            return
        given = [re.sub(r"(?i)^bearer +", "", headers.get("authorization", "").strip())]
        given += [headers.get(name, "") for name in ("x-api-key", "x-goog-api-key", "api-key")]
        sent = [key.encode("utf-8", "surrogateescape") for key in given]
        right = [
            one.name
            for one in self._config.api_key
            for key in sent
            if hmac.compare_digest(key, one.key.encode())
        ]
        if not right:
            what = "The API key is wrong." if any(given) else "An API key is missing."
            raise Unauthorized(
                f"{what} Send a key of proxy.api_key as 'Authorization: Bearer KEY'."
            )
        trace.client = right[0]

    def _guard(self, http: HttpRequest) -> None:
        """Without a key, keeps out names that were rebound to this address, and the scripts of foreign web pages."""
        if self._config.auth != "off":
            return
        host = host_of(f"//{http.headers.get('host', 'localhost')}")
        literal = self._config.allow_lan_access and is_address(host)
        if not (is_loopback(host) or literal or host in self._config.allowed_hosts):
            text = f"The Host '{host}' may not be used without a key."
            raise Forbidden(
                f"{text} Add it to proxy.allowed_hosts, or {ASK_FOR_A_KEY}.",
                code="host_not_allowed",
            )
        origin = http.headers.get("origin")
        if (
            origin
            and re.match(r"https?:|null$", origin, re.IGNORECASE)
            and not self._is_allowed(origin)
        ):
            text = f"The web page {origin} may not call. Add it to proxy.cors_origins, or {ASK_FOR_A_KEY}."
            raise Forbidden(text, code="origin_not_allowed")

    def _is_allowed(self, origin: str) -> bool:
        return is_loopback(host_of(origin)) or origin.lower() in self._config.cors_origins

    def _cors(self, http: HttpRequest) -> dict[str, str]:
        """What lets a browser's page read the answer: any page where a key is needed, else those allowed."""
        origin = http.headers.get("origin")
        if origin is None or (self._config.auth == "off" and not self._is_allowed(origin)):
            return {}
        headers = {
            "Access-Control-Allow-Origin": "*" if self._config.auth != "off" else origin,
            "Vary": "Origin",
        }
        if http.method != "OPTIONS":
            return headers | {
                "Access-Control-Expose-Headers": "*"
            }  # all, for no cookies are allowed
        asked = http.headers.get("access-control-request-headers", "authorization")
        headers |= {
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Max-Age": "600",
        }
        return headers | {"Access-Control-Allow-Headers": asked}

    async def _models(self, name: str | None) -> dict[str, Any]:
        listed = await self._upstream.models() or STATIC_MODELS
        aliases = [
            alias for alias in self._config.aliases if "*" not in alias and alias not in listed
        ]
        owners = dict.fromkeys(listed, "google") | dict.fromkeys(aliases, "agproxy")
        if name:
            owners = {
                name: owners.get(name) or owners.get(await self._upstream.resolve(name), "google")
            }
        data = [
            {"id": id, "object": "model", "created": 0, "owned_by": owner}
            for id, owner in owners.items()
        ]
        return data[0] if name else {"object": "list", "data": data}

    async def _embed(self, body: Any, trace: Trace) -> HttpResponse:
        request = parse_embeddings(body)
        trace.model = request.model
        trace.mapped_model = await self._upstream.resolve(request.model)
        vectors, tokens = await self._upstream.embed(request, trace)
        trace.usage = Usage(prompt=tokens)
        return json_response(render_embeddings(request, vectors, tokens), trace)

    async def _answer(self, http: HttpRequest, trace: Trace) -> HttpResponse:
        client = self._client(http, trace)
        try:
            with Unbegun(self._running, http.task):
                begun = await self._begin(http, trace, client)
            if isinstance(begun, Job):
                return (
                    await client.copy(begun.follow(0))
                    if client.held
                    else bytes_response(begun.kept.object(), trace)
                )
            self._running[http.task] = http.source = begun.answer
            try:
                return await (
                    self._stream(http, client, trace, begun)
                    if client.held
                    else self._whole(trace, begun)
                )
            finally:
                begun.answer.close()
                if begun.kept:
                    await begun.kept.leave()
        except GatewayError as error:
            if not http.begun:
                raise
            trace.error = error.code or error.type
            return client.fail(error)
        finally:
            client.close()

    def _client(self, http: HttpRequest, trace: Trace) -> ClientStream:
        return ClientStream(
            http,
            self._config.heartbeat_s,
            lambda: trace.headers(time.monotonic()) | self._cors(http),
        )

    async def _begin(self, http: HttpRequest, trace: Trace, client: ClientStream) -> Begun | Job:
        """The answer that has begun and what renders it; the request's own data are let go before a long stream."""
        requests, renderer, body, payloads = await self._parse(http, trace)
        first = requests[0]
        if first.stream:
            client.hold(renderer)
        requests = [await self._upstream.media.filled(one) for one in requests]
        if payloads:
            requests = [replace(one, payloads=payloads) for one in requests]
        trace.mapped_model = await self._upstream.resolve(first.model)
        trace.affinity = affinity_of(trace.client, session_of(http.headers, body), first)
        kept = (
            self._keep(renderer, body, payloads, trace)
            if isinstance(renderer, ResponseRenderer)
            else None
        )
        if kept and body.get("background"):
            return await self._detach(requests[0], kept, trace)
        try:
            return Begun(await self._ask(requests, trace), renderer, payloads, kept)
        except UpstreamRefused:
            refuse_damaged(DOORS[trace.route][0], body, payloads)
            raise

    async def _ask(self, requests: Sequence[Request], trace: Trace) -> Answer | Merged:
        first = requests[0]
        if len(requests) == 1 and first.n == 1:
            return await self._upstream.ask(first, trace, sse=first.stream)
        return await self._upstream.ask_all(
            [choice for one in requests for choice in choices_of(one)], trace
        )

    async def _parse(
        self, http: HttpRequest, trace: Trace
    ) -> tuple[list[Request], Renderer, Any, dict[str, bytes]]:
        """The requests of a body, what renders their answer, and the body without long base64, which is apart."""
        parse, form = DOORS[trace.route]
        data = await http.read()
        seems = (
            is_base64 if form is ResponseRenderer else seems_base64
        )  # what is kept must be whole
        data, payloads = (data, {}) if trace.route == "completions" else cut_payloads(data, seems)
        body = parse_body(data)
        keeps = form is ResponseRenderer and self._config.store != "off"
        past = await self._recall(body, trace) if keeps else None
        parsed = parse(body) if past is None else parse_response(body, past)
        requests = parsed if isinstance(parsed, list) else [parsed]
        trace.strict = self._config.strict or http.headers.get("x-agproxy-strict") == "1"
        trace.model = requests[0].model
        sealing = (
            await self._sealing(body, requests[0], trace) if form is ResponseRenderer else None
        )
        told = (requests[0].include_usage, self._config.images_in_text, time.time, sealing)
        head = Head(trace.id[4:], int(time.time()), trace.model, *told)
        return requests, form(head, body), body, payloads

    async def _sealing(
        self, body: Any, request: Request, trace: Trace
    ) -> Callable[[ToolCall | Text], str] | None:
        """Learns the signatures that a client brings back; how it is given new ones, where it asks for them."""
        carried = [
            part.signature
            for message in request.messages
            for part in message.parts
            if type(part) is Thinking
        ]
        wanted = "reasoning.encrypted_content" in (body.get("include") or ())
        if not (wanted or any(carried)):
            return None
        secret = await self._store.secret()
        self._upstream.signatures.learn(
            entry for text in carried if (entry := unseal(text or "", secret))
        )
        return (
            (lambda part: seal(signature_entry(part, self._model_of(trace)), secret))
            if wanted
            else None
        )

    def _model_of(self, trace: Trace) -> str:
        """The model that answers a request, or makes its response in the background."""
        job = self._jobs.get(f"resp_{trace.id[4:]}")
        return (job.trace if job else trace).mapped_model

    def _keep(
        self, renderer: ResponseRenderer, body: Any, payloads: Mapping[str, bytes], trace: Trace
    ) -> Kept | None:
        """The place of a new response in the store; None where it is not to be kept."""
        response = renderer.response
        response["store"] = self._config.store != "off" and body.get("store") is not False
        if not response["store"]:
            return None
        given = with_payloads(dump_bytes(render_input(body["input"], trace.id[4:])), payloads)
        about = (trace.client, response["previous_response_id"], given)
        return Kept(
            response["id"], renderer, payloads, self._store, lambda: self._model_of(trace), about
        )

    async def _detach(self, request: Request, kept: Kept, trace: Trace) -> Job:
        """Begins to make a response beside the connection that asked for it; it has a log line of its own."""
        if len(self._jobs) >= JOBS_MAX:
            raise Overloaded(
                f"{JOBS_MAX} responses are made in the background already. Try again later."
            )
        made = replace(trace, steps=[])
        trace.model = trace.mapped_model = ""
        job = self._jobs[kept.id] = Job(kept, self._upstream, request, made, self._running)

        def over(task: asyncio.Task[None]) -> None:
            if error := None if task.cancelled() else task.exception():
                log.error("%s failed", made.id, exc_info=without_words(error))
            self._tell(made, 500 if error else 200)
            del self._jobs[kept.id], self._running[task]

        job.task.add_done_callback(over)
        if not await kept.save() and not request.stream:  # who reads its stream has it all the same
            text = "The response cannot be kept, and nobody could ask for it. Try again, or leave out 'background'."
            if answer := self._running.get(job.task):
                answer.break_off(Cancelled(text))
            raise StoreTrouble(text)
        return job

    async def _recall(self, body: Any, trace: Trace) -> list[Any]:
        """The items that a body goes on with; those that it only names are put into it. Raises BadRequest."""
        given = body if isinstance(body, dict) else {}
        previous, items = given.get("previous_response_id"), given.get("input")
        past = await self._past(previous, trace) if isinstance(previous, str) and previous else []
        known: dict[str, Any] = {item["id"]: item for item in past if "id" in item}
        for i, item in enumerate(items if isinstance(items, list) else ()):
            id = str(item.get("id")) if isinstance(item, dict) and is_reference(item) else ""
            if id not in known and (match := ITEM_ID.fullmatch(id)):
                turn = await self._store.get(f"resp_{match[1]}", trace.client)
                known |= {one["id"]: one for one in (self._items_of(turn) if turn else ())}
            if id in known:
                items[i] = known[id]  # type: ignore[index]  # a list, for it has an item
        return past

    async def _past(self, previous: str, trace: Trace) -> list[Any]:
        """The items of a response and of all before it. Raises BadRequest."""
        chain = await self._store.chain(previous, trace.client)
        if not chain or chain[0].previous:
            raise not_kept(chain[0].previous or "" if chain else previous)
        if chain[-1].state == "running":
            text = f"'previous_response_id' names '{previous}', which is not over. Wait for its end, or cancel it."
            raise BadRequest(text, code="invalid_value", param="previous_response_id")
        return [item for one in chain for item in self._items_of(one)]

    def _items_of(self, one: StoredResponse) -> list[Any]:
        """What was said in one turn; the signatures of its answer are remembered again."""
        self._upstream.signatures.learn(one.signatures)
        return [*parse_json(one.input), *one.response["output"]]

    async def _whole(self, trace: Trace, begun: Begun) -> HttpResponse:
        events = list(begun.answer.first)
        events.extend(await begun.answer.flow(events.extend))
        self._upstream.signatures.remember(events, trace.mapped_model)
        reply = collect(events)
        trace.usage = reply.usage
        trace.first_byte = time.monotonic()
        whole = with_payloads(dump_bytes(begun.renderer.whole(events)), begun.payloads)
        if begun.kept:
            await begun.kept.save()
        return bytes_response(whole, trace)

    async def _stream(
        self, http: HttpRequest, client: ClientStream, trace: Trace, begun: Begun
    ) -> HttpResponse:
        def render(events: list[Event]) -> bytes:
            self._upstream.signatures.remember(events, trace.mapped_model)
            frames = encoded(begun.renderer.frames(events))
            return with_payloads(frames, begun.payloads) if begun.payloads else frames

        frames = render(begun.answer.first)
        if begun.kept:
            await begun.kept.save()
        trace.first_byte = time.monotonic()
        client.write(frames)
        del frames  # a stream may last long
        last = await begun.answer.flow(lambda events: http.write(render(events)))
        if last and isinstance(last[-1], Ended):
            trace.usage = last[-1].usage
        elif last and isinstance(last[-1], Failed):
            trace.error = last[-1].error.code or last[-1].error.type
        frames = render(last)
        if begun.kept:
            await begun.kept.save()  # before the client reads that it is over
        return client.end(frames)

    # ---- kept responses

    async def _count(self, body: Any, trace: Trace) -> HttpResponse:
        """How many tokens the input of a response would be; all of its fields may be missing."""
        if isinstance(body, dict):
            given = {key: value for key, value in body.items() if value is not None}
            body = {"input": [], "model": self._config.default_model or "gpt-4o", **given}
        request = parse_response(body, await self._recall(body, trace))
        trace.model = request.model
        trace.mapped_model = await self._upstream.resolve(request.model)
        tokens = await self._upstream.count(await self._upstream.media.filled(request), trace)
        return json_response({"object": "response.input_tokens", "input_tokens": tokens}, trace)

    async def _serve_stored(self, http: HttpRequest, trace: Trace, id: str) -> HttpResponse:
        """What is asked of a response that is kept. Raises ResponseNotFound."""
        one = await self._store.get(id, trace.client)
        if one is None:
            raise ResponseNotFound(
                f"Response with id '{id}' not found. It was not kept here, or not for this key."
            )
        if one.state == "lost":
            one = replace(one, response=interrupted(one.response))
        job = self._jobs.get(id)
        if trace.route.endswith("/input_items"):
            return json_response(page_of(parse_json(one.input), http.query), trace)
        if http.method == "POST" and not one.response["background"]:
            raise BadRequest("Cannot cancel a synchronous response. Close its connection instead.")
        if http.method == "POST" and one.state == "running" and not job:
            raise BadRequest("Another gateway makes this response. Cancel it there.")
        if http.method in ("POST", "DELETE") and job:
            if answer := self._running[job.task]:  # what was said so far stays in the response
                answer.break_off(Cancelled("The response was cancelled. Ask again for another."))
            await job.end()
        if http.method == "DELETE":
            await self._store.delete(id)
            return json_response({"id": id, "object": "response", "deleted": True}, trace)
        if http.query.get("stream") == "true":
            return await self._replay(http, trace, one, job)
        return (
            bytes_response(job.kept.object(), trace) if job else json_response(one.response, trace)
        )

    async def _replay(
        self, http: HttpRequest, trace: Trace, one: StoredResponse, job: Job | None
    ) -> HttpResponse:
        """The stream of a response from where the client wants it, and what is still to come of it."""
        after = Fields(numbers_in(http.query)).count("starting_after", low=0)
        at = 0 if after is None else after + 1
        if job:
            if http.method == "HEAD":
                return bytes_response(b"", trace)
            with contextlib.closing(self._client(http, trace)) as client:
                client.hold(job.kept.renderer)
                return await client.copy(job.follow(at))
        if one.state == "running":
            raise BadRequest(
                "This response cannot be followed from here. Ask without 'stream' until it is over."
            )
        head = Head(one.id, one.response["created_at"], one.response["model"])
        frames = split_frames(
            one.events or encoded(ResponseRenderer(head, {}).replay(one.response, at))
        )
        first = at if one.events else min(at, len(frames) - 2)
        return bytes_response(b"".join(frames[first:]), trace, kind="text/event-stream")


@dataclass(slots=True)
class Unbegun:
    """While an answer has not begun: what breaks it off is raised as an error, so that the client is told."""

    running: dict[Any, Any]
    task: Any
    error: GatewayError | None = None

    def __enter__(self) -> None:
        self.running[self.task] = self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.running[self.task] = None
        if self.error and isinstance(error, asyncio.CancelledError):
            raise self.error from None

    def break_off(self, error: UpstreamError) -> None:
        if self.error is None:
            self.error = error
            self.task.cancel()


@value
class Begun:
    """An answer that has begun, and what makes bytes of it."""

    answer: Answer | Merged
    renderer: Renderer
    payloads: Mapping[str, bytes]
    kept: Kept | None


def session_of(headers: Mapping[str, str], body: Mapping[str, Any]) -> str:
    """The client's own name for a conversation, where it gives one."""
    given = next(filter(None, map(headers.get, SESSION_HEADERS)), None) or body.get(
        "prompt_cache_key"
    )
    return given if isinstance(given, str) else ""


# As Codex, Claude Code and OpenCode send them.
SESSION_HEADERS = (
    "session_id",
    "session-id",
    "x-session-id",
    "x-session-affinity",
    "conversation_id",
)


@dataclass(slots=True)
class ClientStream:
    """A client's side of a stream: one write a read.

    Its head is held until the first event or the first heartbeat, so that what fails before has a status of its own.
    """

    _http: HttpRequest
    _beat_s: float
    _headers: Callable[[], dict[str, str]]
    held: Renderer | None = None  # what makes the stream; None where the answer is not to be one
    _alarm: asyncio.TimerHandle | None = None

    def hold(self, renderer: Renderer) -> None:
        """From now on a heartbeat may begin the stream, and then an error is told in it."""
        self.held = renderer
        if self._beat_s:
            self._alarm = asyncio.get_running_loop().call_later(self._beat_s, self._beat)

    def write(self, data: bytes) -> None:
        if self._http.begun:
            self._http.write(data)
        else:
            self._http.begin(
                {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                | self._headers(),
                data,
            )

    def end(self, data: bytes) -> HttpResponse:
        if not self._http.begun:
            self.write(b"")
        self._http.end(data)
        return HttpResponse(status=499 if self._http.gone else 200)

    async def copy(self, frames: AsyncIterator[bytes]) -> HttpResponse:
        """Sends frames as they come, as slowly as the client takes them."""
        self.write(b"")
        async for data in frames:
            self.write(data)
            await self._http.taken()
        return self.end(b"")

    def fail(self, error: GatewayError) -> HttpResponse:
        """Ends a stream that only heartbeats have begun."""
        assert self.held
        return self.end(encoded(self.held.frames([Started(), Failed(error)])))

    def close(self) -> None:
        """Also cuts off what did not come to its end, so that nobody takes it for whole."""
        if self._http.begun and not self._http.ended:
            self._http.abort()
        if self._alarm:
            self._alarm.cancel()

    def _beat(self) -> None:
        """Looks twice in each `heartbeat_s`, so that a write costs no timer and not even the time.

        Who does not take what there is needs none, and is cut off where that does not shrink.
        """
        if not self._http.quiet:
            self._http.quiet = True
        elif not self._http.full:
            self.write(HEARTBEAT)
        self._alarm = asyncio.get_running_loop().call_later(self._beat_s / 2, self._beat)


STOPPED = Overloaded("The gateway was stopped before the answer was whole. Ask again in a moment.")
ASK_FOR_A_KEY = "set proxy.api_key and proxy.auth_mode: strict"


def refuse_damaged(parse: Callable[[Any], Any], body: Any, payloads: Mapping[str, bytes]) -> None:
    """Raises BadRequest, by the field's name, where what only seemed base64 is none: Gemini refused the request."""
    for mark, payload in payloads.items():
        if not is_base64(payload):
            parse(json.loads(dump_bytes(body).replace(mark.encode(), b"!")))


def without_words(error: BaseException) -> Any:
    """What the log may tell of a mistake: where it was made."""
    told = RuntimeError(f"{type(error).__name__}, without its words: they may be a client's")
    return RuntimeError, told, error.__traceback__


def json_response(body: Any, trace: Trace, status: int = 200) -> HttpResponse:
    return bytes_response(dump_bytes(body), trace, status)


def bytes_response(
    body: bytes, trace: Trace, status: int = 200, kind: str = "application/json"
) -> HttpResponse:
    return HttpResponse(body, status, {"Content-Type": kind} | trace.headers(time.monotonic()))


def error_response(error: GatewayError, trace: Trace) -> HttpResponse:
    body = openai_error(error)
    if trace.steps and error.waits:
        body["error"]["decisions"] = decisions_of(trace)
    response = json_response(body, trace, error.status)
    response.headers |= error.headers
    if error.waits:
        wait_s = error.retry_after_s or 1.0
        response.headers |= {
            "Retry-After": str(math.ceil(wait_s)),
            "Retry-After-Ms": str(round(1000 * wait_s)),
        }
    if error.code == "insufficient_quota":
        response.headers["X-Should-Retry"] = "false"
    return response


async def create_app(
    config: Config,
    running_max: float = math.inf,
    source: Source | None = None,
    drain_s: float = 0.0,
) -> Gateway:
    """The gateway, to be listened for; when that ends, running answers have `drain_s` to finish."""
    upstream = Upstream(config)
    database = Database(None if config.store in (None, "memory", "off") else Path(config.store))
    gateway = Gateway(config, upstream, ResponseStore(database), running_max, source, drain_s)
    gateway.at_end.push_async_callback(database.close)
    gateway.at_end.push_async_callback(upstream.close)
    if source:
        gateway.at_end.callback(asyncio.create_task(gateway.watch(source)).cancel)
    if database.path:
        rests = PoolStore(database, upstream.pool)
        if database.path.exists():
            await rests.load(upstream.clock())
        gateway.at_end.push_async_callback(rests.save)
        gateway.at_end.callback(asyncio.create_task(rests.keep(upstream.rested)).cancel)
    return gateway


# ==============================================================================
# 22. Demo
# ==============================================================================

DEMO_CHAT = ("generateContent", "countTokens")
DEMO_MODELS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite"), DEMO_CHAT),
    **dict.fromkeys(("gemini-3-pro-preview", "gemini-3-flash-preview"), DEMO_CHAT),
    "gemini-embedding-001": ("embedContent", "batchEmbedContents"),
}
DEMO_FAULTS = {
    "429": (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota. Please retry in 7s."),
    "503": (503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
}
DEMO_QUOTA = {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "quotaValue": "2"}
DEMO_429_DETAILS = (
    {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [DEMO_QUOTA]},
    {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"},
)
DEMO_CHUNKS_MAX = 50  # so that the echo of a long prompt is over in half a second too
DEMO_WORD = re.compile(
    r"\s*\S+(?:\s+$)?"
)  # with the space around it: joined, words are the text again
DEMO_SIGNATURE = "YWdwcm94eS1kZW1v"  # base64 of "agproxy-demo"
DEMO_THOUGHT = {"text": "The demo thinks of nothing: it repeats what it was told.", "thought": True}
DEMO_SCHEMA = {
    "properties": {"demo": {"const": True}, "echo": {"type": "string"}},
    "required": ["demo", "echo"],
}
DEMO_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "email": "demo@example.com",
}


@value
class Demo(App):
    """A small Gemini: the real wire format, answers that follow from the request alone, no model."""

    fault: str | None

    async def handle(self, http: HttpRequest) -> HttpResponse:
        place, _, name = http.path.partition("/v1beta/models")
        if place or name.startswith("/") != (http.method == "POST"):
            return demo_error(404, "NOT_FOUND", f"The demo has no {http.path}.")
        if name:
            return await self._call(http, *name[1:].partition(":")[::2])
        models = (
            {"name": f"models/{name}", "supportedGenerationMethods": DEMO_MODELS[name]}
            for name in DEMO_MODELS
        )
        return demo_json({"models": list(models)})

    async def _call(self, http: HttpRequest, model: str, method: str) -> HttpResponse:
        streams = method == "streamGenerateContent"
        if ("generateContent" if streams else method) not in DEMO_MODELS.get(model, ()):
            return demo_error(
                404, "NOT_FOUND", f"models/{model} is not found, or is not supported for {method}."
            )
        if self.fault in DEMO_FAULTS:
            return demo_error(*DEMO_FAULTS[self.fault])
        try:
            answers = demo_answers(method, model, json.loads(await http.read()))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return demo_error(
                400, "INVALID_ARGUMENT", f"The demo cannot read this request: {error!r}"
            )
        if streams and http.query.get("alt") == "sse":
            return await self._stream(http, answers)
        if self.fault == "cut":
            http.abort()
        return demo_json(answers if streams else answers[0])

    async def _stream(self, http: HttpRequest, chunks: list[dict[str, Any]]) -> HttpResponse:
        http.begin({"Content-Type": "text/event-stream"}, b"")
        for chunk in chunks[: len(chunks) // 2] if self.fault == "cut" else chunks:
            http.write(f"data: {json.dumps(chunk)}\r\n\r\n".encode())
            await asyncio.sleep(0.01)
        if self.fault == "cut":
            http.abort()
        http.end(b"")
        return HttpResponse()


def demo_json(body: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(json.dumps(body).encode(), status, {"Content-Type": "application/json"})


def demo_error(code: int, status: str, message: str) -> HttpResponse:
    details = {"details": DEMO_429_DETAILS} if code == 429 else {}
    return demo_json(
        {"error": {"code": code, "message": message, "status": status, **details}}, code
    )


def demo_answers(method: str, model: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a method answers: the chunks of a stream, else one message."""
    if method == "countTokens":
        return [
            {
                "totalTokens": demo_usage(body.get("generateContentRequest", body), [])[
                    "promptTokenCount"
                ]
            }
        ]
    if method == "embedContent":
        return [{"embedding": demo_embedding(body)}]
    if method == "batchEmbedContents":
        return [{"embeddings": [demo_embedding(request) for request in body["requests"]]}]
    parts, finish_reason = demo_parts(body)
    about = {
        "usageMetadata": demo_usage(body, parts),
        "modelVersion": model,
        "responseId": "agproxy-demo",
    }
    groups = (
        [parts]
        if method == "generateContent"
        else [[piece] for part in parts for piece in demo_pieces(part)]
    )
    candidates: list[dict[str, Any]] = [
        {"content": {"role": "model", "parts": group}, "index": 0} for group in groups
    ]
    candidates[-1]["finishReason"] = finish_reason
    return [{"candidates": [candidate], **about} for candidate in candidates]


def demo_parts(body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The answer, whole, and its finish reason."""
    heard = [content for content in body["contents"] if content.get("role") != "model"][-1]["parts"]
    prompt = "\n".join(part["text"] for part in heard if "text" in part)
    config = body.get("generationConfig", {})
    thoughts = [DEMO_THOUGHT] if config.get("thinkingConfig", {}).get("includeThoughts") else []
    if calls := demo_calls(body, heard, prompt):
        return [*thoughts, *calls], "STOP"
    text = demo_text(body, heard, prompt)
    if config.get("responseMimeType") == "application/json":
        schema = config.get("responseJsonSchema") or config.get("responseSchema") or DEMO_SCHEMA
        text = json.dumps(demo_value(schema, schema, prompt or "demo"), ensure_ascii=False)
    words = DEMO_WORD.findall(text)
    limit = int(config.get("maxOutputTokens") or len(words))
    return [*thoughts, {"text": "".join(words[:limit])}], "MAX_TOKENS" if len(
        words
    ) > limit else "STOP"


def demo_pieces(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part as it is streamed: text by a few words, everything else at once."""
    words = DEMO_WORD.findall(part.get("text", ""))
    size = max(2, math.ceil(len(words) / DEMO_CHUNKS_MAX))
    return [part | {"text": "".join(words[i : i + size])} for i in range(0, len(words), size)] or [
        part
    ]


def demo_calls(
    body: dict[str, Any], heard: list[dict[str, Any]], prompt: str
) -> list[dict[str, Any]]:
    """A call of each declared function that the prompt names, or of the first where one is demanded."""
    tools = [f for tool in body.get("tools", []) for f in tool.get("functionDeclarations", [])]
    schemas = {
        f["name"]: f.get("parametersJsonSchema") or f.get("parameters") or {"type": "object"}
        for f in tools
    }
    config = body.get("toolConfig", {}).get("functionCallingConfig", {})
    allowed = config.get("allowedFunctionNames") or list(schemas)
    answered = config.get("mode") == "NONE" or any("functionResponse" in part for part in heard)
    named = [
        name
        for name in allowed
        if not answered and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt)
    ]
    if config.get("mode") == "ANY":
        named = named or allowed[:1]
    args = {name: demo_value(schemas[name], schemas[name], prompt or "demo") for name in named}
    calls: list[dict[str, Any]] = [
        {"functionCall": {"name": name, "args": args[name]}} for name in args
    ]
    return [call | {"thoughtSignature": DEMO_SIGNATURE} for call in calls[:1]] + calls[
        1:
    ]  # parallel: only the first


def demo_text(body: dict[str, Any], heard: list[dict[str, Any]], prompt: str) -> str:
    """What was understood, so that a caller sees that nothing got lost on the way."""
    results = [part["functionResponse"] for part in heard if "functionResponse" in part]
    files = [part["inlineData"]["mimeType"] for part in heard if "inlineData" in part]
    system = "\n".join(part["text"] for part in body.get("systemInstruction", {}).get("parts", []))
    said = ["This is the demo of agproxy; no model was asked."]
    said += [
        f"The tool {r['name']} answered: {json.dumps(r['response'], ensure_ascii=False)}"
        for r in results
    ]
    said += [f"You said: {prompt}"] if prompt else []
    said += (
        [f"(and {len(files)} file{'s' * (len(files) > 1)} of {', '.join(sorted(set(files)))})"]
        if files
        else []
    )
    return " ".join([*said, f"(The instructions were: {system})"] if system else said)


def demo_value(schema: Any, root: Any, prompt: str, seen: frozenset[str] = frozenset({"#"})) -> Any:
    """A small value that fits a schema; LookupError where every one would contain itself."""
    if not isinstance(schema, dict):
        return prompt
    if ref := schema.get("$ref"):
        if ref in seen:
            raise LookupError(f"{ref} has no end")
        meant = functools.reduce(lambda at, key: at[key], ref.split("/")[1:], root)
        return demo_value(meant, root, prompt, seen | {ref})
    options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    for option in options:
        with contextlib.suppress(LookupError):  # a linked list ends with its other option, null
            return demo_value(schema | {"anyOf": (), "oneOf": ()} | option, root, prompt, seen)
    if options:
        raise LookupError("no option has an end")
    return demo_plain_value(schema, root, prompt, seen)


def demo_plain_value(schema: dict[str, Any], root: Any, prompt: str, seen: frozenset[str]) -> Any:
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kinds = schema.get("type") or ("object" if "properties" in schema else "string")
    kind = (
        kinds
        if isinstance(kinds, str)
        else next((kind for kind in kinds if kind != "null"), "null")
    )
    match kind.lower():
        case "object":
            properties = schema.get("properties", {})
            return {
                name: demo_value(properties.get(name), root, prompt, seen)
                for name in schema.get("required", ())
            }
        case "array":
            items = schema.get("prefixItems") or [schema.get("items")] * demo_size(
                schema.get("minItems", 1)
            )
            with contextlib.suppress(LookupError):
                return [demo_value(item, root, prompt, seen) for item in items]
            return []  # a tree ends where there are no children
        case "integer" | "number" as kind:
            number = max(1 if kind == "integer" else 1.5, schema.get("minimum", 1))
            return min(number, schema.get("maximum", number))
        case kind:
            return {"boolean": True, "null": None}.get(
                kind, DEMO_FORMATS.get(schema.get("format", ""), prompt)
            )


def demo_size(wanted: Any) -> int:
    """How many values to make, one at least. Raises ValueError for more than Gemini's own embeddings have."""
    if int(wanted) > 3072:
        raise ValueError(f"{wanted} values are too many")
    return max(1, int(wanted))


def demo_tokens(parts: Iterable[dict[str, Any]]) -> int:
    """Words, for tokens; a file counts as the 258 that Gemini takes for a small image."""
    return sum(
        258 if "inlineData" in part else max(1, len(str(part.get("text", part)).split()))
        for part in parts
    )


def demo_usage(body: dict[str, Any], said: list[dict[str, Any]]) -> dict[str, int]:
    contents = [*body["contents"], body.get("systemInstruction", {})]
    counts = {
        "promptTokenCount": demo_tokens(
            part for content in contents for part in content.get("parts", [])
        ),
        "candidatesTokenCount": demo_tokens(part for part in said if "thought" not in part),
        "thoughtsTokenCount": demo_tokens(part for part in said if "thought" in part),
    }
    return {key: count for key, count in counts.items() if count} | {
        "totalTokenCount": sum(counts.values())
    }


def demo_embedding(request: dict[str, Any]) -> dict[str, Any]:
    """Words by hash, at length 1: texts that share words lie near each other."""
    text = " ".join(part.get("text", "") for part in request["content"]["parts"])
    values = [0.0] * demo_size(request.get("outputDimensionality") or 768)
    for word in re.findall(r"\w+", text.lower()) or [""]:
        values[int(hashlib.sha256(word.encode()).hexdigest(), 16) % len(values)] += 1
    length = math.hypot(*values)
    return {"values": [value / length for value in values]}


# ==============================================================================
# 23. Command line
# ==============================================================================

CLOCK_SKEW_S_MAX = 300.0
THREE_WAYS = """\
agproxy serve --demo                       try everything without a key
GEMINI_API_KEY=... agproxy serve           one account from the environment
agproxy serve --accounts accounts.yaml     several; write ./accounts.yaml after accounts.yaml.example"""
# What a person pastes for each client: its name, where, and the text. {base}, {root} (without /v1) and the
# key are filled in: {key}, as {word} and {bearer} for a shell, as {json} for the rest.
RECIPES = """
== curl: a shell
curl {base}/chat/completions -H {bearer} -H 'Content-Type: application/json' \\
  -d '{{"model": "gpt-4o", "messages": [{{"role": "user", "content": "hello"}}]}}'
== aider: a shell
aider --model openai/gpt-4o --openai-api-base {base} --openai-api-key {word}
== codex: ~/.codex/config.toml, then: export OPENAI_API_KEY={word}
model = "gpt-5.5"
model_provider = "agproxy"

[model_providers.agproxy]
name = "agproxy"
base_url = "{base}"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
== llm: extra-openai-models.yaml beside the file of `llm logs path`, then: llm keys set agproxy --value {word}
- model_id: agproxy
  model_name: gpt-4o
  api_base: "{base}"
  api_key_name: agproxy
== langchain: Python
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="gpt-4o", base_url="{base}", api_key={json})
== opencode: opencode.json in the project, then: opencode run -m agproxy/gpt-4o hello
{{
  "$schema": "https://opencode.ai/config.json",
  "provider": {{
    "agproxy": {{
      "npm": "@ai-sdk/openai-compatible",
      "options": {{"baseURL": "{base}", "apiKey": {json}}},
      "models": {{"gpt-4o": {{}}}}
    }}
  }}
}}
== continue: ~/.continue/config.yaml
name: agproxy
version: 0.0.1
schema: v1
models:
  - name: agproxy
    provider: openai
    model: gpt-4o
    apiBase: {base}
    apiKey: {json}
    roles: [chat, edit, apply, autocomplete]
== cline: Cline, Roo or Kilo: Settings > API Provider > OpenAI Compatible
Base URL: {base}
API Key: {key}
Model ID: gpt-4o
== cursor: Cursor: Settings > Models > API Keys; its servers make the calls, so {root} must be reachable from the internet
OpenAI API Key: {key}
Override OpenAI Base URL: {base}
"""
CLIENTS = dict(recipe.split(": ", 1) for recipe in RECIPES.split("\n== ")[1:])
DOORS_NOT_BUILT = {
    "claude-code": "Claude Code speaks Anthropic's /v1/messages, which agproxy does not serve"
}
SHELLS: Mapping[str, Callable[[str, str], str]] = {
    "sh": lambda name, value: f"export {name}={shlex.quote(value)}",
    "fish": lambda name, value: "set -gx {} '{}'".format(name, re.sub(r"(['\\])", r"\\\1", value)),
    "powershell": lambda name, value: "$env:{} = '{}'".format(name, value.replace("'", "''")),
}


def file_fingerprint() -> str:
    """The start of this file's SHA-256, so that a copied file can be told apart."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


read_utf8 = functools.partial(Path.read_text, encoding="utf-8")


def find_file(accounts: str | None) -> Path | None:
    """The accounts file that is named, ./accounts.yaml or $XDG_CONFIG_HOME's; None where there is none."""
    if accounts:
        return Path(accounts)
    home = os.path.expanduser(
        os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    )  # maybe not there, or not for us to see
    return next(
        filter(os.path.exists, (Path("accounts.yaml"), Path(home, "agproxy", "accounts.yaml"))),
        None,
    )


def find_config(accounts: str | None, with_pool: bool) -> Config:
    """The file's config; without a file, one account by a key from the environment, or none."""
    path = find_file(accounts)
    if path is None:
        key = (os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY") or "").strip()
        if not key.isprintable():
            raise ConfigError(
                "The key in GEMINI_API_KEY or GOOGLE_API_KEY holds control characters. Export it anew."
            )
        return Config(accounts=(Account("environment", key),) if key else ())
    try:
        text = read_utf8(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Name another with --accounts."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from None
    return load_config(text, str(path), os.environ, read_utf8, accounts=with_pool)


class Unusable(click.ClickException, ConfigError):
    """What the user gave cannot be used; the code at the end stands in README's table."""

    exit_code = 2

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{message} [{code}]")


def configured(
    accounts: str | None,
    host: str | None = None,
    port: int | None = None,
    demo: bool = False,
    with_pool: bool = True,
) -> Config:
    """The config that holds: flag > $AGPROXY_PORT > file > default. Raises Unusable."""
    try:
        config = find_config(accounts, with_pool and not demo)
        named = os.environ.get("AGPROXY_PORT") or str(config.port)
        if not re.fullmatch(r"\d{1,5}", named) or int(named) > 65535:
            raise ConfigError(
                f"AGPROXY_PORT is '{named}'. Set it to a number from 0 to 65535, or unset it."
            )
        config = replace(
            config, host=host or config.host, port=int(named) if port is None else port, demo=demo
        )
        if problems := config_problems(config):
            raise ConfigError("\n".join(problems))
        return config
    except ConfigError as error:
        raise Unusable(
            f"{error}\nMend that; `agproxy check` tries again.", "config_invalid"
        ) from None


def servable(config: Config, with_pool: bool = True) -> Config:
    """The config, if it has the key that clients must show, and accounts where a pool is needed. Raises Unusable."""
    if config.auth != "off" and not config.api_key:
        text = "Clients must show a key (proxy.auth_mode, proxy.allow_lan_access), but proxy.api_key is not set."
        fresh = f"Paste this fresh one into the accounts file:\nproxy:\n  api_key: sk-{secrets.token_urlsafe(32)}"
        raise Unusable(f"{text} {fresh}", "key_needed")
    if with_pool and not config.accounts and not config.demo:
        raise Unusable(
            f"There is no account to ask. Three ways to go on:\n{THREE_WAYS}", "no_accounts"
        )
    return config


def pretty(value: Any) -> str:
    return encoded(json.dumps(value, indent=2, ensure_ascii=False)).decode()


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            told = told | {"traceback": self.formatException(record.exc_info)}
        moment = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        return dumps({"time": moment, "level": record.levelname.lower(), **told})


class MaskingHandler(logging.StreamHandler[Any]):
    """Writes no secret, whoever logged it, in whatever form, tracebacks included."""

    _known: Sequence[str] = ()

    def learn(self, config: Config) -> Config:
        """The config, once its secrets are masked too; the earlier ones stay, for a request may still carry them."""
        owners: list[Any] = [*config.accounts, *config.api_key]
        known = itertools.chain.from_iterable(map(secrets_of, owners))
        forms = {form for key in known for form in (key, encode_basestring(key)[1:-1]) if key}
        self._known = sorted(
            forms.union(self._known), key=len, reverse=True
        )  # one may begin with another
        return config

    def format(self, record: logging.LogRecord) -> str:
        return functools.reduce(
            without_secret, self._known, SECRET_FORMS.sub("…", super().format(record))
        )


def set_up_logging(level: str, form: str, config: Config) -> MaskingHandler:
    handler = MaskingHandler()
    handler.learn(config)
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    return handler


def banner(config: Config, running_max: float) -> str:
    proxies = (
        proxy_for(account.base_url, account.proxy or config.upstream_proxy)
        for account in config.accounts
    )
    without_users = sorted({re.sub(r"//[^/@]*@", "//", proxy) for proxy in proxies if proxy})
    names = ", ".join(account.name for account in config.accounts)
    open_to_all = config.auth == "off" and not is_loopback(config.bind)
    lines = [
        f"agproxy {__version__} listens on {config.bind}:{config.port}",
        f"  base URL  {config.base_url}",
        f"  accounts  {'the demo; no model is asked' if config.demo else f'{len(config.accounts)} ({names})'}",
        f"  auth      {config.auth}"
        + (f" ({len(config.api_key)} key(s))" if config.auth != "off" else ""),
        f"  default   {config.default_model or 'none: unknown model names are a 404'}",
        f"  at once   {running_max} requests, as open files allow",
        f"  store     {config.store} (responses; proxy.store)",
        *(f"  proxy     {proxy}" for proxy in without_users),
        *(
            [f"  WARNING   anybody on the network can use these accounts; {ASK_FOR_A_KEY}"]
            if open_to_all
            else []
        ),
        f'  export OPENAI_BASE_URL={config.base_url} OPENAI_API_KEY="{"$KEY" if config.auth != "off" else "unused"}"',
    ]
    return "\n".join(lines)


def stored(config: Config) -> Config:
    """The config with the place where responses are kept: where it says, else with the user's other state."""
    if config.store in ("memory", "off"):
        return config
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return replace(
            config, store=str(Path(config.store or f"{state}/agproxy/state.sqlite3").expanduser())
        )
    except RuntimeError:
        text = "There is no such home directory. Set proxy.store to the full path of a file, to memory, or to off."
        raise Unusable(text, "config_invalid") from None


def raise_file_limit() -> float:
    """Lets this process open as many files as it may; how many requests, of two sockets and an idle one each, that is."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return math.inf
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else max(1, (soft - FILES_KEPT) // 3)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs the coroutine, on uvloop where that is installed."""
    factory = None
    with contextlib.suppress(ImportError):
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


async def run_until_signal(
    config: Config, path: Path | None, load: Callable[[], Config], drain_s: float
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers finish; a second signal kills. Raises OSError."""
    stop = asyncio.Event()
    on_signals(("SIGTERM", "SIGINT"), lambda _: stop.set())
    source = (
        Source(path, lambda: stored(load()), asyncio.Event()) if path and not config.demo else None
    )
    async with contextlib.AsyncExitStack() as stack:
        config = await with_demo(stored(config), stack)
        running_max = raise_file_limit()
        app = await create_app(config, running_max, source, drain_s)
        port = await listen(
            app, config.bind, config.port, stack, 2 * running_max, config.timeouts.stall_s
        )
        click.echo(banner(replace(config, port=port), running_max), err=True)
        if source:
            on_signals(("SIGHUP",), lambda _: source.asked.set())
        gc.freeze()  # else the collector walks the modules again and again: a tenth of what a request costs
        gc.set_threshold(10_000, 20, 20)
        tell_systemd("READY=1")
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        tell_systemd("STOPPING=1")
        click.echo(
            f"agproxy stops; running answers have {drain_s:g} s, a second signal ends them now",
            err=True,
        )


def tell_systemd(state: str) -> None:
    """Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html"""
    if path := os.environ.get("NOTIFY_SOCKET"):
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to, contextlib.suppress(OSError):
            to.sendto(state.encode(), re.sub("^@", "\0", path))


def on_signals(names: Iterable[str], act: Callable[[int], None]) -> None:
    with contextlib.suppress(
        NotImplementedError
    ):  # Windows has no signal handlers; Ctrl-C ends the loop there
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            asyncio.get_running_loop().add_signal_handler(number, act, number)


async def with_demo(config: Config, stack: contextlib.AsyncExitStack) -> Config:
    """The config, with the demo's account instead of the file's where the demo is asked for."""
    if not config.demo:
        return config
    fault = os.environ.get("AGPROXY_DEMO_FAULT") or None
    if fault not in (None, "cut", *DEMO_FAULTS):
        raise Unusable(
            f"AGPROXY_DEMO_FAULT is '{fault}'. Set it to 429, 503 or cut, or unset it.",
            "config_invalid",
        )
    port = await listen(Demo(fault), "127.0.0.1", 0, stack)
    demo = Account("demo", "demo", f"http://127.0.0.1:{port}")
    return replace(
        config, accounts=(demo,), store="memory", max_wait_s=0
    )  # so that a fault is seen at once


async def run_command(config: Config, command: Sequence[str]) -> int:
    """Serves one command on a free loopback port with a key of its own; its exit code. Raises OSError."""
    keys = (ClientKey("run", f"sk-{secrets.token_urlsafe(32)}"),)
    config = replace(
        config, host="127.0.0.1", port=0, auth_mode="strict", api_key=keys, store="memory"
    )
    async with contextlib.AsyncExitStack() as stack:
        config = await with_demo(config, stack)
        app = await create_app(config)
        port = await listen(app, "127.0.0.1", 0, stack)
        direct = ",".join(
            filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"))
        )
        env = {
            **os.environ,
            **client_environment(replace(config, port=port)),
            "no_proxy": direct,
            "NO_PROXY": direct,
        }
        child = await asyncio.create_subprocess_exec(*command, env=env)
        by_terminal = any(map(os.isatty, range(3)))  # then Ctrl-C reaches the child by itself

        def pass_on(number: int) -> None:
            if child.returncode is None:  # else it has ended, and so does this
                child.send_signal(number)

        on_signals(["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"], pass_on)
        on_signals(["SIGINT", "SIGQUIT"], (lambda _: None) if by_terminal else pass_on)
        code = await child.wait()
        click.echo(f"agproxy: {app.tally.bill()}", err=True)
    return 128 - code if code < 0 else code


def client_environment(config: Config) -> dict[str, str]:
    """The variables by which OpenAI's clients find the gateway."""
    key = config.api_key[0].key if config.api_key else "unused"
    return {
        "OPENAI_BASE_URL": config.base_url,
        "OPENAI_API_BASE": config.base_url,
        "OPENAI_API_KEY": key,
    }


@click.group(invoke_without_command=True, epilog="\b\nThree ways to begin:\n" + THREE_WAYS)
@click.version_option(__version__, message=f"agproxy {__version__} (file {file_fingerprint()})")
@click.pass_context
def main(context: click.Context) -> None:
    """An OpenAI-compatible gateway in front of Gemini, in one file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


FILES = "The accounts file.  [default: $AGPROXY_ACCOUNTS, ./accounts.yaml, $XDG_CONFIG_HOME/agproxy/accounts.yaml]"
accounts_option = click.option("--accounts", metavar="FILE", envvar="AGPROXY_ACCOUNTS", help=FILES)
demo_option = click.option(
    "--demo", is_flag=True, help="Answer from a small Gemini of its own: no key, no network."
)
LOG_LEVELS = ("debug", "info", "warning", "error")


def gateway_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where the gateway is, which a command takes as `where`."""
    ports = click.IntRange(0, 65535)
    port = click.option(
        "--port", type=ports, help="Port to listen on.  [default: $AGPROXY_PORT, 8045]"
    )
    return click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")(
        port(accounts_option(command))
    )


@main.command()
@gateway_options
@demo_option
@click.option("--log-level", default="info", show_default=True, type=click.Choice(LOG_LEVELS))
@click.option(
    "--log-format", default="text", show_default=True, type=click.Choice(["text", "json"])
)
@click.option(
    "--drain-s",
    default=DRAIN_S,
    show_default=True,
    type=click.FloatRange(0),
    help="For running answers.",
)
def serve(demo: bool, log_level: str, log_format: str, drain_s: float, **where: Any) -> None:
    """Start the gateway."""
    path = find_file(where["accounts"])
    config = servable(configured(**where, demo=demo))
    where["accounts"] = path and str(
        path
    )  # so that no reload takes another one, where an editor writes it just then
    warn_of_readers(path)
    log_handler = set_up_logging(log_level, log_format, config)
    try:
        run_loop(
            run_until_signal(
                config, path, lambda: log_handler.learn(servable(configured(**where))), drain_s
            )
        )
    except (OSError, UnicodeError) as error:  # the latter of a name that no host can have
        why = getattr(error, "strerror", "no such name")
        text = f"Cannot listen on {config.bind}:{config.port} ({why}). Choose another with --port or --host."
        raise Unusable(text, "cannot_listen") from None
    except KeyboardInterrupt:
        pass


def warn_of_readers(path: Path | None) -> None:
    if path and os.name == "posix" and path.stat().st_mode & 0o077:
        click.echo(
            f"Warning: others can read the keys in {path}. Close it with: chmod 600 {path}",
            err=True,
        )


@main.command(context_settings={"allow_interspersed_args": False})
@accounts_option
@demo_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(accounts: str | None, demo: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND with a gateway of its own: a free port, a key for once, the variables set. Then print the bill."""
    config = servable(replace(configured(accounts, demo=demo), auth_mode="off"))
    warn_of_readers(find_file(accounts))
    set_up_logging("error", "text", config)
    try:
        sys.exit(asyncio.run(run_command(config, command)))
    except OSError as error:
        text = f"'{command[0]}' cannot be started ({error.strerror}). Check its name and $PATH."
        raise Unusable(text, "command_not_started") from None


@main.command("models")
@accounts_option
@demo_option
@click.argument("name", required=False)
def print_models(accounts: str | None, demo: bool, name: str | None) -> None:
    """List the models that are served, or say what NAME maps to and by which rule."""
    config = servable(replace(configured(accounts, demo=demo), auth_mode="off"))
    listed = asyncio.run(with_upstream(config, Upstream.models))
    if name is None:
        if listed is None:
            click.echo(
                "The upstream's list cannot be had; `agproxy check --online` says why.", err=True
            )
        aliases = [alias for alias in config.aliases if "*" not in alias]
        click.echo("\n".join(dict.fromkeys([*(listed or STATIC_MODELS), *aliases])))
        return
    try:
        mapped = map_model(name, config, listed)
    except ModelNotFound as error:
        raise Unusable(error.message, "model_not_found") from None
    instead = f"; the upstream does not list {mapped.wished}" if mapped.wished else ""
    click.echo(f"{name} -> {mapped.model} (by {mapped.rule}{instead})")


async def with_upstream(config: Config, ask: Callable[[Upstream], Awaitable[T]]) -> T:
    """What `ask` learns from an upstream that is opened for it alone."""
    async with contextlib.AsyncExitStack() as stack:
        upstream = Upstream(await with_demo(config, stack))
        stack.push_async_callback(upstream.close)
        return await ask(upstream)


@main.command()
@accounts_option
@click.option("--online", is_flag=True, help="Ask each account's upstream, too.")
def check(accounts: str | None, online: bool) -> None:
    """Say what is wrong with the accounts file, or list its accounts with masked secrets."""
    config = servable(configured(accounts))
    warn_of_readers(find_file(accounts))
    columns: tuple[str, ...] = ("reachable", "models", "remedy") if online else ("key", "upstream")
    found = (
        asyncio.run(with_upstream(config, probe))
        if online
        else [*map(told_offline, config.accounts)]
    )
    rows = [
        (account.name, account.kind, *more)
        for account, more in zip(config.accounts, found, strict=True)
    ]
    click.echo(render_table([("account", "kind", *columns), *rows]))
    if any(account.kind == "cloudcode" for account in config.accounts):
        text = "Google's terms restrict what other programs may do with its consumer logins (kind cloudcode)"
        click.echo(
            f"{text}, and accounts have been closed for it. API keys (kind gemini) are the recommended kind."
        )
    if any(row[0] == "no" for row in found):
        sys.exit(1)


def told_offline(account: Account) -> tuple[str, ...]:
    told = "login" if account.refresh_token else f"no login yet: agproxy login {account.name}"
    if account.service_account:
        told = "service account"
    elif account.kind == "gemini":
        key = account.api_key  # enough of it to tell two apart, too little to use one
        told = f"{key[:4]}…{key[-2:]}" if len(key) >= 20 else "…"
    return told, re.sub(r"//[^/@]*@", "//…@", account.base_url)


def render_table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


async def probe(upstream: Upstream) -> Sequence[tuple[str, ...]]:
    """Of each account: whether its upstream answers, with how many models, and what to do where it does not."""
    return await asyncio.gather(
        *(probe_account(upstream, account) for account in upstream.pool.accounts)
    )


async def probe_account(upstream: Upstream, account: Account) -> tuple[str, str, str]:
    listed: Sequence[str] = ()
    told = "It lists no model. Check base_url, and what the key may use."
    try:
        listed = await upstream.models_of(account)
    except UpstreamError as error:
        told = f"{error.message.rstrip('.')}. {remedy_of(error, account.kind)}".rstrip()
    skewed = f"This machine's clock is off by {upstream.skew_s:.0f} s. Set it by NTP."
    late = skewed if abs(upstream.skew_s) > CLOCK_SKEW_S_MAX else ""
    return ("yes", str(len(listed)), late) if listed else ("no", "-", f"{told} {late}".rstrip())


def remedy_of(error: UpstreamError, kind: str) -> str:
    """What the owner of an account can do about a refusal. Texts: https://ai.google.dev/gemini-api/docs/troubleshooting"""
    if isinstance(error, RateLimited):
        return error.advice
    remedies = {
        "restriction|are blocked": "Let this machine and the Generative Language API pass in the key's restrictions.",
        "location is not supported": "Use a machine or a proxy (proxy.upstream_proxy) in a region that Gemini serves.",
        "billing": "Attempts on billing for the key's project.",
        "has not been used|is disabled": "Attempts on the Generative Language API for the key's project.",
    }
    found = (
        remedy for text, remedy in remedies.items() if re.search(text, error.message, re.IGNORECASE)
    )
    new_key = "Make a new key at https://aistudio.google.com/apikey."
    refused_key = isinstance(error, CredentialRefused) and kind == "gemini"
    return next(found, new_key if refused_key else "" if ". " in error.message else error.advice)


@main.command()
@accounts_option
@click.argument("file", type=click.File("rb"))
@click.option("--model", help="As if the body named this model.")
@click.option(
    "--kind",
    default="gemini",
    show_default=True,
    type=click.Choice(["gemini", "vertex"]),
    help="Asked upstream.",
)
@click.option("--strict", is_flag=True, help="Refuse a body of which something would be dropped.")
def explain(
    accounts: str | None, file: BinaryIO, model: str | None, kind: Dialect, strict: bool
) -> None:
    """Say what becomes of the request body in FILE (- is standard input), without sending anything."""
    config = configured(accounts)
    try:
        body = parse_body(file.read())
        requests, table = read_body(
            body | {"model": model} if model and isinstance(body, dict) else body
        )
        mapped = map_model(requests[0].model, config, None)
        traits = traits_of(mapped.model, config.traits)
        built = [build_generate_content(request, traits, kind) for request in requests]
        changes = requests[0].changes + built[0].changes
        if strict:
            refuse_dropped(changes)
    except GatewayError as error:
        raise Unusable(error.message, error.code or "invalid_body") from None
    told: dict[str, Any] = {
        "model": requests[0].model,
        "mapped_model": mapped.model,
        "rule": mapped.rule,
    }
    told |= {
        "fields": explain_fields(body, table, changes),
        "requests": [one.body for one in built],
    }
    click.echo(pretty(told))


# ---- the running gateway


def ask_gateway(where: Mapping[str, Any], path: str, body: Any = None) -> Any:
    """What the running gateway answers under /agproxy/. Raises Unusable."""
    from http.client import HTTPConnection, HTTPException

    config = configured(**where, with_pool=False)
    place = urlsplit(config.base_url).netloc
    headers = (
        {"Authorization": f"Bearer {config.api_key[0].key}".encode()} if config.api_key else {}
    )
    method, data = ("GET", None) if body is None else ("POST", dump_bytes(body))
    answer: Any = None
    with (
        contextlib.suppress(OSError, HTTPException),
        contextlib.closing(HTTPConnection(place, timeout=10)) as gateway,
    ):
        gateway.request(method, f"/agproxy/{path}", data, headers)
        response = gateway.getresponse()
        answer = parse_json(response.read())
    if not isinstance(answer, dict):  # also where something else listens
        text = f"No gateway answers at http://{place}. Start one by `agproxy serve`, or name its --host and --port."
        raise Unusable(text, "no_gateway")
    if response.status >= 400:
        told = error_of(answer)
        code = str(told.get("code") or "server_error")
        raise Unusable(str(told.get("message") or response.reason), code)
    return answer


@main.command("status")
@gateway_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def print_status(as_json: bool, **where: Any) -> None:
    """Show what each account of the running gateway does, who rests until when and why, and what was used."""
    told = ask_gateway(where, "status")
    click.echo(pretty(told) if as_json else status_table(told["accounts"]))


def status_table(accounts: Sequence[Mapping[str, Any]]) -> str:
    """A line an account, and one for each model that it was asked for."""
    quotas = ("requests_per_minute", "requests_per_day", "tokens_per_day")
    rows = [
        (
            "account",
            "kind",
            "model",
            "in flight",
            "requests/min",
            "requests/day",
            "tokens/day",
            "state",
        )
    ]
    for one in accounts:
        shared = [f"group {one['quota_group']}"] if one["quota_group"] else []
        shared += (
            [f"seems to share with {', '.join(one['seems_to_share_with'])}"]
            if one["seems_to_share_with"]
            else []
        )
        about = (one["account"], one["kind"], "", str(one["in_flight"]), "", "", "")
        rows.append((*about, "; ".join([one["state"], *shared])))
        for model in one["models"]:
            counts = (
                f"{model[q]}/{model['limits'][q]}" if q in model["limits"] else str(model[q])
                for q in quotas
            )
            rows.append(("", "", model["model"], "", *counts, model["state"]))
    return render_table(rows)


@main.command("pool")
@gateway_options
@click.argument("action", type=click.Choice(POOL_ACTIONS))
@click.argument("name", metavar="NAME[/MODEL]")
def steer_pool(action: str, name: str, **where: Any) -> None:
    """End the rests of an account of the running gateway, or keep it from being asked, or let it be asked again."""
    known = [
        one["account"] for one in ask_gateway(where, "status")["accounts"]
    ]  # in whose names a / may be
    account = max(
        (one for one in known if f"{name}/".startswith(f"{one}/")),
        key=len,
        default=name.partition("/")[0],
    )
    model = name[len(account) + 1 :]
    told = ask_gateway(where, "pool", {"action": action, "account": account, "model": model})
    click.echo(status_table(told["accounts"]))


@main.command("why")
@gateway_options
@click.argument("id")
def print_why(id: str, **where: Any) -> None:
    """Say why a request was answered by the account that it was: who was considered, asked, and said what."""
    told = ask_gateway(where, f"why/{quote(id, safe='')}")
    decisions = told.pop("decisions")
    click.echo(" ".join(f"{key}={value}" for key, value in told.items()))
    for number, step in enumerate(decisions, 1):
        waited = f" after {step['waited_s']} s" if step["waited_s"] else ""
        answered = f"{step['chosen'] or 'nobody'} -> {step['answer'] or 'not asked'}"
        click.echo(f"{number}. {step['model']}{waited}: {answered}")
        for account, state in step["considered"].items():
            click.echo(f"   {account} {state}")


@main.command("reload")
@gateway_options
def reload_gateway(**where: Any) -> None:
    """Have the running gateway read its accounts file again."""
    click.echo(f"{ask_gateway(where, 'reload', {})['accounts']} accounts")


# ---- login


@main.command("login")
@accounts_option
@click.option(
    "--paste",
    is_flag=True,
    help="For a machine without a browser: paste the address that one ends at.",
)
@click.argument("name")
def log_in_account(accounts: str | None, paste: bool, name: str) -> None:
    """Log in to Google for the account NAME, by its own OAuth client; the token is kept beside the accounts file."""
    config = configured(accounts)
    account = next((account for account in config.accounts if account.name == name), None)
    if account is None or not account.client_id or not account.credentials.endswith(".token.json"):
        text = "needs its client_id and client_secret in the accounts file, and neither credentials nor refresh_token"
        raise Unusable(f"To log in, '{name}' {text}. Mend that.", "config_invalid")
    try:
        token = asyncio.run(log_in(account, config, paste))
    except UpstreamError as error:
        raise Unusable(error.message, "login_failed") from None
    path = Path(account.credentials)
    about = {
        "type": "authorized_user",
        **{key: getattr(account, key) for key in USER_KEYS},
        "refresh_token": token,
    }
    try:
        write_private(path, json.dumps(about, indent=2))
    except OSError as error:
        text = f"{path}: cannot be written ({error.strerror}). Mend that, and log in again."
        raise Unusable(text, "login_failed") from None
    click.echo(f"The login of {name} is kept in {path}. A running gateway takes it by itself.")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(
        os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    made.replace(path)


@value
class Landing(App):
    state: str
    come: asyncio.Future[str]

    async def handle(self, http: HttpRequest) -> HttpResponse:
        if http.query.get("state") == self.state and not self.come.done():
            self.come.set_result(f"?{urlencode(http.query)}")
        return HttpResponse(
            b"agproxy has heard; this page may be closed.", 200, {"Content-Type": "text/plain"}
        )


async def log_in(account: Account, config: Config, paste: bool) -> str:
    """The refresh token that the user grants in a browser. Raises UpstreamError.

    Source: https://developers.google.com/identity/protocols/oauth2/native-app
    """
    state, verifier = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    async with contextlib.AsyncExitStack() as stack:
        come: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        port = 1 if paste else await listen(Landing(state, come), "127.0.0.1", 0, stack)
        redirect = f"http://127.0.0.1:{port}/"
        url = login_url(account, redirect, state, verifier)
        click.echo(f"Open this in a browser, and let {account.name} in:\n{url}")
        if paste:  # nothing else waits for the loop, which would keep Ctrl-C from the prompt
            signal.signal(signal.SIGINT, signal.default_int_handler)
            come.set_result(click.prompt("The address that the browser ends at (it shows no page)"))
        answer = await come
    code = login_code(f"?{answer.partition('?')[2]}", state)
    alone = replace(config, accounts=())
    return await with_upstream(
        alone, lambda upstream: upstream.credentials.redeem(account, code, redirect, verifier)
    )


@main.command("env")
@gateway_options
@click.option("--shell", default="sh", show_default=True, type=click.Choice([*SHELLS, "json"]))
@click.option(
    "--client",
    type=click.Choice([*CLIENTS, *DOORS_NOT_BUILT]),
    help="Print what to paste for this client.",
)
def print_env(shell: str, client: str | None, **where: Any) -> None:
    """Print what a shell needs: eval "$(agproxy env)", or what a client's settings need."""
    config = servable(configured(**where, with_pool=False), with_pool=False)
    values = client_environment(config)
    if client in DOORS_NOT_BUILT:
        raise Unusable(
            f"{DOORS_NOT_BUILT[client]}. Use a client of `agproxy env --help`.", "client_not_served"
        )
    if client:
        key = values["OPENAI_API_KEY"]
        filled = {"base": config.base_url, "root": config.base_url.removesuffix("/v1"), "key": key}
        header = f"Authorization: Bearer {key}"
        filled |= {"word": shlex.quote(key), "bearer": shlex.quote(header), "json": json.dumps(key)}
        place, text = CLIENTS[client].format(**filled).rstrip().split("\n", 1)
        click.echo(f"# {place}", err=True)
        click.echo(text)
    elif shell == "json":
        click.echo(pretty(values))
    else:
        click.echo("\n".join(SHELLS[shell](name, value) for name, value in values.items()))


if __name__ == "__main__":
    main()
