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
     6 Messages        contents, media, messages and tools, as chat and Responses share them
     7 Chat            chat and completions: fields, parser, renderer
     8 Responses       OpenAI's Responses: fields, parser, renderer
     9 Embeddings      texts to vectors
    10 Models          which Gemini model a name means, and what that can do
    11 Schemas         JSON Schemas as Gemini takes them
    12 To Gemini       a Request becomes a generateContent body
    13 From Gemini     bytes become Events: the only stream machine; Gemini's refusals
    14 Signatures      thought signatures: remembered, sealed
    15 Accounts        who is asked next, who is in cooldown until when
    16 Journal         what is told of a request: headers, the log line, decisions
    17 Store           SQLite on a thread of its own: what outlives the process
    18 Credentials     API keys and tokens: each fetched once for all who wait
    19 Transport       HTTP/1.1: a body goes out, the pieces of an answer come in
    20 Media           linked files, from public addresses only
    21 Wire            calls of an upstream: credential, envelope; the models that it lists
    22 Upstream        what Gemini is asked, and the one retry loop
    23 Kept responses  recall, keep, replay: what outlives its request
    24 Exchanges       the one path of every answer: streamed, whole, in the background
    25 Web             aiohttp.web: middlewares, and the handlers of the doors
    26 Admin           /agproxy/: status, why, pool, reload
    27 Server          the table of routes, the application, the listener
    28 Demo            a small Gemini for --demo; it shares nothing with the rooms that it proves
    29 Command line    what a person types: options, config, log; serve and run
    30 Setup           commands beside a gateway: models, check, explain, login, env
    31 Operator        commands that ask the running gateway: status, pool, why, reload

Words of this file's own:
    door      a front format: its path, fields, parser, renderer and error form
    exchange  one request and its answer, whether streamed, whole or in the background
    event     a piece of an answer, in nobody's JSON
    change    something of a request that could not be carried over as it was
    trait     something that a model can or must do
    question  a call of Gemini that the retry loop makes of one account after another
    decision  one step of the retry loop, as `agproxy why` shows it
    lease     one request's use of an account
    payload   long base64, cut out of a body while that is parsed
    seal      an entry of the signature memory, signed, for a client to carry
"""

from __future__ import annotations

import base64
import difflib
import errno
import functools
import gc
import hashlib
import hmac
import importlib
import io
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
from collections import ChainMap, Counter, defaultdict, deque
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
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from dataclasses import MISSING, dataclass, field, replace
from dataclasses import fields as fields_of
from functools import cache, cached_property, lru_cache, partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from json.encoder import encode_basestring
from math import inf, isfinite, isinf
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    assert_never,
    cast,
    dataclass_transform,
)
from urllib.parse import parse_qs, quote, unquote, urlencode, urljoin, urlsplit

import click

orjson: Any = None  # twice as fast; what it cannot do, the standard library does
with suppress(ImportError):
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
    from aiohttp import StreamReader, web

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
else:
    asyncio, aiohttp, sqlite3 = map(_Lazy, ("asyncio", "aiohttp", "sqlite3"))
    web = _Lazy("aiohttp.web")

T = TypeVar("T")
Answered_co = TypeVar("Answered_co", covariant=True)


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots; the type checker freezes it, for what does it at run time
    doubles the cost of making one.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


log = logging.getLogger("agproxy")

__version__ = "0.1.0"
USER_AGENT = f"agproxy/{__version__}"

# ==============================================================================
# 1. Errors
# ==============================================================================
# GatewayError
# ├── BadRequest            the client's mistake, with the field's path if it is in one
# │   ├── Unauthorized, Forbidden, ModelNotFound, ResponseNotFound, UnknownUrl
# │   └── MethodNotAllowed, BodyTooLarge, BodyTooSlow
# ├── StoreTrouble          stored responses cannot be read or written for now
# ├── PoolExhausted         no account is left to ask: each failed or is in cooldown
# └── UpstreamError         one attempt at Gemini failed
#     ├── UpstreamRefused   Gemini calls the request itself wrong: no account would take it
#     │   ├── ContextTooLong, TooLarge, FileRefused
#     │   ├── ModelGone     this account does not have the model
#     │   ├── SignatureRefused  worth one more attempt without the thought signatures
#     │   └── SchemaRefused     worth one more attempt with reduced schemas
#     ├── RateLimited       a minute's quota of the account or its project is used up
#     │   └── QuotaGone     a day's quota
#     ├── CredentialRefused the account cannot be used, until a probe succeeds
#     │   └── AccountBarred until its owner acts
#     ├── TokenTrouble      no token for this account, for some seconds
#     ├── Overloaded        Gemini's fault, not the account's
#     │   └── Paused        a person wants the account not to be asked
#     ├── UpstreamTimeout   no answer in time
#     ├── Cancelled         the client does not want the answer any more
#     └── UpstreamBroken    cut, empty or unreadable

RETRY_AFTER_S_MAX = 24 * 3600.0  # daily quotas are renewed by then; a longer wait is a mistake
ERROR_CHARS_MAX = 2000  # a message is for people and a log's line, whatever Gemini put into it
TOKEN_RETRY_S = 5.0  # a token endpoint that fails is mostly back by then
# All that looks like a key or a token: Google's, OpenAI's, behind `Bearer`, in a query, before @.
SECRET_FORMS = re.compile(  # each alternative begins with a literal: that is six times as fast
    r"AIza[\w-]{8,}|AQ\.[\w.-]{8,}|ya29\.[\w.-]+|1//[\w-]{20,}|sk-[\w-]{16,}"
    r"|Bearer [\w.~+/=-]{8,}|bearer [\w.~+/=-]{8,}"
    r"|\?key=[^&\s\"']+|&key=[^&\s\"']+|://[^/@\s]+@"
)


class GatewayError(Exception):
    """A failure that a client reads about; its message holds no secret. A class sets what differs
    from its parent's: what clients are sent, and what the retry loop does."""

    status: int = 500
    type: str = "server_error"
    code: str | None = "server_error"
    failed_code: str = "server_error"  # of `response.failed`, which knows few codes
    param: str | None = None  # the path of the field that is to blame
    advice: str = "Try again."
    waits: bool = False  # Retry-After is sent
    retry_helps: bool = True  # else X-Should-Retry: false is sent
    falls_back: bool = False  # another model of models.fallback may answer
    remedy: Literal["give_up", "next_account", "same_account"] = "give_up"

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
        self.code = code or self.code
        self.param = param or self.param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class BadRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    code: str | None = None
    failed_code = "invalid_prompt"


class Unauthorized(BadRequest):
    status = 401
    code = "invalid_api_key"


class Forbidden(BadRequest):
    status = 403
    type = "permission_error"


class ModelNotFound(BadRequest):
    status = 404
    code = "model_not_found"


class ResponseNotFound(BadRequest):
    status = 404


class UnknownUrl(BadRequest):
    status = 404
    code = "unknown_url"


class MethodNotAllowed(BadRequest):
    status = 405
    code = "method_not_supported"


class BodyTooLarge(BadRequest):
    status = 413
    code = "request_too_large"


class BodyTooSlow(BadRequest):
    status = 408
    code = "request_timeout"


class StoreTrouble(GatewayError):
    status = 503
    code = "server_is_overloaded"
    waits = True


class UpstreamError(GatewayError):
    """One attempt failed. In cooldown after it is its `scope`: the whole account, the model on
    this account, or the model in the account's whole project."""

    status = 502
    code: str | None = "upstream_error"
    scope: Literal["nobody", "account", "model", "project"] = "nobody"
    cooldown_s: float = 0.0  # if Gemini names no wait; doubled by each probe that fails
    reset_at: float | None = None  # when the quota is renewed, in seconds since 1970
    quota: str = ""  # the quota that is used up
    limit: int | None = None  # its size
    lasting: int = 0  # of several accounts' errors, one with the lowest number is sent


class Cancelled(UpstreamError):
    code = None


class UpstreamRefused(UpstreamError):
    status = 400
    type = "invalid_request_error"
    code: str | None = None
    failed_code = "invalid_prompt"


class ModelGone(UpstreamRefused):
    status = 404
    code = "model_not_found"
    param = "model"
    falls_back = True
    remedy = "next_account"
    scope = "model"
    cooldown_s = 600.0
    quota = "model"
    lasting = 3
    advice = "Use a name of `agproxy models`, or map it in models.map."


class ContextTooLong(UpstreamRefused):
    code = failed_code = "context_length_exceeded"


class TooLarge(UpstreamRefused):
    status = 413
    code = "request_too_large"


class FileRefused(UpstreamRefused):
    code = "invalid_value"


class SignatureRefused(UpstreamRefused):
    """A thought signature is missing, or another model or project made it."""


class SchemaRefused(UpstreamRefused):
    """Gemini takes less of JSON Schema than it promises: no `required` without its property, no
    `$ref` without its definition.

    Source: https://github.com/google-gemini/gemini-cli/issues/4607, .../13326
    """


class RateLimited(UpstreamError):
    status = 429
    type = "rate_limit_error"
    code = failed_code = "rate_limit_exceeded"
    waits = falls_back = True
    remedy = "next_account"
    scope = "project"
    cooldown_s = 5.0
    quota = "requests"
    advice = "Wait, or add an account of another project."


class QuotaGone(RateLimited):
    """If Gemini names no wait, the cooldown lasts until the next day of its quotas."""

    type = code = failed_code = "insufficient_quota"
    retry_helps = False
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
    cooldown_s = inf
    quota = "barred"
    advice = "Do what it says, change the account's credentials, or run `agproxy pool reset NAME`."


class TokenTrouble(UpstreamError):
    remedy = "next_account"
    scope = "account"
    cooldown_s = TOKEN_RETRY_S
    quota = "token"
    advice = "Check the network and token_url."


class Overloaded(UpstreamError):
    status = 503
    code = "server_is_overloaded"
    waits = falls_back = True
    remedy = "same_account"
    advice = "Try again later, or ask another model."


class Paused(Overloaded):
    scope = "account"
    cooldown_s = inf
    quota = "paused"
    lasting = 1
    advice = "Resume it by `agproxy pool resume NAME`."


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "timeout"
    remedy = "same_account"
    advice = "Try again, or raise proxy.timeouts."


class UpstreamBroken(UpstreamError):
    remedy = "same_account"


class PoolExhausted(GatewayError):
    """No account could answer. The status, type and code are those of the last refusal."""

    def __init__(self, message: str, last: UpstreamError, retry_after_s: float | None) -> None:
        super().__init__(message, code=last.code, param=last.param, retry_after_s=retry_after_s)
        self.status, self.type, self.failed_code = last.status, last.type, last.failed_code
        self.waits, self.falls_back = last.waits, last.falls_back
        self.retry_helps = last.retry_helps


def without_secret(text: str, secret: str) -> str:
    """The text without a key that it repeats. Under 8 characters a key may be a common word."""
    if len(secret) < 8:
        return text
    return text.replace(secret, "…")


# ==============================================================================
# 2. JSON
# ==============================================================================

JsonObject = dict[str, Any]
JsonMap = Mapping[str, Any]  # an object that is only read

BODY_BYTES_MAX = 64 << 20  # three of Gemini's largest requests of 20 MB
LARGE_BYTES = 1 << 20  # bodies from here on are few at a time: each needs several times its size
# Levels of nesting. orjson writes 254 of them, and the standard library at least 500 whoever
# calls it; around a body's levels come those of Gemini's.
DEPTH_MAX = 200
BOM = b"\xef\xbb\xbf"

dumps = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode
"""Compact JSON. Raises ValueError for what JSON has no word for, such as NaN."""


def dump_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError as `dumps` does."""
    if orjson is not None:
        with suppress(TypeError):  # half a surrogate pair, more than 64 bits, 254 levels
            return b"%b" % orjson.dumps(value)  # a copy: its own holds several times what it needs
    return encoded(dumps(value))


def encoded(text: str) -> bytes:
    """The text in UTF-8. Half a surrogate pair becomes '?': some clients cut an emoji in two."""
    return text.encode("utf-8", "replace")


def fast_loads(text: str | bytes, loads: Callable[[str], Any] = json.loads) -> Any:
    """The value of a JSON text, by `loads` if orjson is missing or refuses it.

    Raises ValueError and RecursionError.
    """
    if orjson is not None:
        with suppress(ValueError):
            return orjson.loads(text)
    if isinstance(text, bytes):
        text = text.removeprefix(BOM).decode()
    return loads(text)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, None if it is none."""
    for loads in (fast_loads, json.loads):  # which takes half a surrogate pair in bytes
        with suppress(ValueError, RecursionError):
            return loads(text)
    return None


def finite(number: str) -> float:
    """A number that JSON can hold. Raises ValueError for NaN, and beyond a float's range."""
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"{number} is no JSON number")
    return value


STRICT = json.JSONDecoder(parse_constant=finite, parse_float=finite)


def parse_strict(text: str) -> Any:
    """The value of a JSON text that is sent on. None if it is none, holds a number that JSON cannot
    hold, or is nested deeper than DEPTH_MAX. Keeps all digits of integers, as orjson does not."""
    with suppress(ValueError, RecursionError):
        value = STRICT.decode(text)
        if not is_deep(value):
            return value
    return None


def parse_body(data: bytes) -> Any:
    """The value of a body. Raises BadRequest for what is no strict JSON in UTF-8, and for one that
    is nested deeper than DEPTH_MAX."""
    try:
        body = fast_loads(data, STRICT.decode)
        if is_deep(body):
            raise RecursionError
    except RecursionError:
        raise BadRequest("The body is nested too deep. Send flatter JSON.") from None
    except ValueError as error:
        raise BadRequest(
            f"The body is not valid JSON ({error}). Send a JSON object in UTF-8."
        ) from None
    return body


def is_deep(value: Any) -> bool:
    """True if a JSON value has more than DEPTH_MAX levels. Recursion could not tell for every
    caller: it fails the earlier, the deeper the caller itself is."""
    level = [value]
    for _ in range(DEPTH_MAX):
        inner: list[Any] = []
        for item in level:
            if item.__class__ is dict:
                inner += item.values()
            elif item.__class__ is list:
                inner += item
        if not inner:
            return False
        level = inner
    return not {dict, list}.isdisjoint(map(type, level))


def objects_in(value: Any) -> list[Any]:
    """The objects of a list; none of anything else."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, Mapping)]


def escaped(key: str) -> str:
    """A key in a JSON pointer. Source: https://www.rfc-editor.org/rfc/rfc6901#section-3"""
    return key.replace("~", "~0").replace("/", "~1")


def pointer_of(path: str) -> str:
    """The JSON pointer of a path such as messages[0].content."""
    return "/" + re.sub(r"\[(\d+)\]", r".\1", path).replace(".", "/")


# ---- long base64, which no JSON parser need read

BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"
PAYLOAD_BYTES_MIN = 16 << 10  # below, cutting costs as much as parsing
ENDS_BYTES = 4 << 10  # a multiple of 4


def is_base64(data: str | bytes) -> bool:
    if isinstance(data, str):
        data = encoded(data)
    payload = data.rstrip(b"=")
    return bool(payload) and not payload.translate(None, BASE64_ALPHABET) and len(payload) % 4 != 1


def seems_base64(data: bytes) -> bool:
    """True if both ends are base64, and nothing between could end a JSON string: to read 4 MB
    costs a third of sending them."""
    ends = data[:ENDS_BYTES] + data[-ENDS_BYTES - len(data) % 4 :]
    return data.isascii() and b"\\" not in data and is_base64(ends)


def cut_payloads(
    data: bytes, mark: str, seems: Callable[[bytes], bool] = is_base64
) -> tuple[bytes, dict[str, bytes]]:
    """The body without the long base64 of its data: URLs, and each of these by the text that stands
    in its place: the mark, which must be hexadecimal and unknown to clients, and a number."""
    payloads: dict[str, bytes] = {}
    pieces = []
    at = 0
    while (start := data.find(b";base64,", at) + 8) > 7 and (end := data.find(b'"', start)) >= 0:
        payload = data[start:end]
        pieces.append(data[at:start])
        # Of an octet-stream the content has to tell its type.
        typed = data[start - 20 : start] != b"octet-stream;base64,"
        if len(payload) >= PAYLOAD_BYTES_MIN and typed and seems(payload):
            place = f"{mark}{len(payloads):08d}"
            payloads[place] = payload
            payload = place.encode()
        pieces.append(payload)
        at = end
    return b"".join([*pieces, data[at:]]), payloads


def put_back(body: bytes, payloads: Mapping[str, bytes]) -> bytes:
    """The body with the base64 that was cut out of it."""
    if not payloads:
        return body
    mark = next(iter(payloads))[:-8].encode()
    pieces = re.split(rb"(%b\d{8})" % mark, body)
    return b"".join(payloads.get(piece.decode("latin-1"), piece) for piece in pieces)


# ==============================================================================
# 3. Vocabulary
# ==============================================================================

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ChangeKind = Literal["renamed", "clamped", "emulated", "dropped"]


@value
class Traits:
    """The abilities and duties of a model; by default those of the oldest. Asked through traits_of,
    never by a model's name in passing."""

    thinking: Literal["none", "budget", "level"] = "none"
    thinks: bool = False  # unless asked not to, so that it can show summaries of its thoughts
    can_stop_thinking: bool = False
    budget: tuple[int, int] = (128, 32768)
    levels: tuple[str, ...] = ("LOW", "MEDIUM", "HIGH")
    signatures: bool = False  # refuses calls in the history without thought signatures
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
    """A part of a request, at a JSON pointer, that could not be sent as it was."""

    pointer: str
    kind: ChangeKind
    reason: str


@value
class Citation:
    """A web source of the text from `start` to `end`, in code points of the choice's text; in a
    Text, of that part's."""

    start: int
    end: int
    url: str
    title: str


@value
class Signature:
    """A thought signature, and the bounds of the piece of its text that Gemini signed."""

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
    arguments: str  # a JSON text as the client or the model wrote it; free text if `custom`
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
    parameters: JsonMap | None
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
    schema: JsonMap | None
    source: str = "/response_format"


@value
class ThinkingWish:
    effort: str | None = None
    budget: int | None = None
    show: bool = False  # summaries of the model's thoughts
    source: str = "/reasoning_effort"


@value
class Request:
    """A client's request, in the words of no API."""

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
    logprobs: int | None = None  # alternatives of each token; None: no log probabilities at all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_format: JsonFormat | None = None
    modalities: tuple[str, ...] = ()
    aspect_ratio: str | None = None  # of generated images
    image_size: str | None = None
    thinking: ThinkingWish = ThinkingWish()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    search_source: str = ""
    """JSON pointer of the field that asks for a web search; empty if none is wanted."""
    limit_source: str = "/max_tokens"  # pointers of fields that front formats name differently
    logprobs_source: str = "/logprobs"
    messages_source: str = "/messages"
    changes: tuple[Change, ...] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    """Long base64 that was cut out of the body before it was parsed, by the text in its place."""


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
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.reasoning + other.reasoning,
        )


@value
class Started:
    """The model has begun to answer; `usage` is Gemini's count by then."""

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
    """The sources of a choice's whole text and the searches for them, once, before it finishes."""

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
    logprobs: tuple[JsonMap, ...] = ()  # of each token: token, logprob, alternatives


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
    """One of the alternatives of a whole answer."""

    parts: list[Part] = field(default_factory=list)
    reason: FinishReason = "stop"
    logprobs: tuple[JsonMap, ...] = ()
    citations: tuple[Citation, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


def collect(events: Iterable[Event]) -> tuple[dict[int, Choice], Usage]:
    """The choices of a whole answer by their numbers, and its usage. Raises a Failed event's
    error."""
    choices: dict[int, Choice] = defaultdict(Choice)
    usage = Usage()
    for event in events:
        if isinstance(event, PartEnd):
            choices[event.choice].parts.append(event.part)
        elif isinstance(event, Finished):
            choice = choices[event.choice]
            choice.reason, choice.logprobs = event.reason, event.logprobs
        elif isinstance(event, Annotated):
            choices[event.choice].citations = event.citations
        elif isinstance(event, Ended):
            usage = event.usage
        elif isinstance(event, Failed):
            raise event.error
    return choices, usage


# ==============================================================================
# 4. Config
# ==============================================================================

QUOTAS = ("requests_per_minute", "tokens_per_minute", "requests_per_day", "tokens_per_day")
STRATEGIES = ("affinity", "round_robin", "fill_first")
GEMINI_URL = "https://generativelanguage.googleapis.com"
# A region's Vertex has its own host. Source: https://cloud.google.com/vertex-ai/docs/reference/rest
VERTEX_URL = "https://{}aiplatform.googleapis.com"
CLOUDCODE_URL = "https://cloudcode-pa.googleapis.com"
TOKEN_URL = "https://oauth2.googleapis.com/token"
YAML_NULL, YAML_MAP, YAML_LIST = (f"tag:yaml.org,2002:{tag}" for tag in ("null", "map", "seq"))
Read = Callable[[Path], str]  # the text of a credentials file; raises OSError or UnicodeDecodeError


class ConfigError(Exception):
    """The accounts file, a flag or the environment cannot be used. Each problem is a line with its
    remedy."""


@value
class Node:
    """A YAML node of the accounts file, at a path such as proxy.port. Problems are noted with their
    lines, so that all are shown at once; a method raises ValueError with the end of a sentence that
    begins with the path."""

    yaml: Any
    path: str
    source: str
    env: Mapping[str, str]
    load: Read
    problems: list[str]

    def note(self, problem: str) -> None:
        self.problems.append(f"{self.source}:{self.yaml.start_mark.line + 1}: {problem}")

    def at(self, yaml: Any, step: str) -> Node:
        return replace(self, yaml=yaml, path=f"{self.path}{step}".lstrip("."))

    def read(self, kind: Kind) -> Any:
        """The value of the node; None if a problem was noted."""
        try:
            return kind(self)
        except ValueError as error:
            return self.note(f"'{self.path}' {error}")

    def section(self, kinds: Mapping[str, Kind]) -> JsonObject:
        """The values of a mapping, each read by its kind. A key with null counts as absent."""
        values: JsonObject = {}
        if self.yaml is None or self.yaml.tag == YAML_NULL:
            return values
        if self.yaml.tag != YAML_MAP:
            name = self.path or "the file"
            self.note(f"{name} must hold 'key: value' lines (keys: {', '.join(kinds)}).")
            return values
        for key, yaml in self.yaml.value:
            name, here = key.value, self.at(key, f".{key.value}")
            if not isinstance(name, str):
                here.note("a key must be a word.")
            elif name not in kinds:
                here.note(f"unknown key '{name}' {nearest(name, kinds)}")
            elif name in values:
                here.note(f"'{here.path}' stands here twice; remove one.")
            elif yaml.tag != YAML_NULL:
                found = replace(here, yaml=yaml).read(kinds[name])
                if found is not None:
                    values[name] = found
        return values

    def items(self) -> list[Node]:
        return [self.at(item, f"[{i}]") for i, item in enumerate(self.yaml.value)]

    def text(self) -> str:
        text = self.yaml.value
        if not isinstance(text, str) or not text or not text.isprintable():
            raise ValueError("must be a text without control characters.")
        return text

    def texts(self) -> tuple[str, ...]:
        """The texts of a list, or a single one."""
        if self.yaml.tag != YAML_LIST:
            return (self.text(),)
        return tuple(item.text() for item in self.items())

    def secret(self) -> str:
        """A text, or by `${NAME}` or `env:NAME` the value of an environment variable."""
        text = self.text()
        match = re.fullmatch(r"\$\{(\w+)\}|env:(\w+)", text)
        if not match:
            return text
        name = match[1] or match[2]
        found = self.env.get(name, "").strip()
        if not found:
            needed = f"needs the environment variable {name}, which is not set."
            raise ValueError(f"{needed} Export it first.")
        if not found.isprintable():
            wrong = f"is read from {name}, which holds control characters."
            raise ValueError(f"{wrong} Export it anew.")
        return found


Kind = Callable[[Node], Any]


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or all of them, as a hint in brackets."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"({near[0]}?)" if near else f"(known: {', '.join(known)})"


def read_flag(node: Node) -> bool:
    word = node.text().lower()
    flag = word in ("true", "yes", "on")
    if not flag and word not in ("false", "no", "off"):
        raise ValueError("must be true or false.")
    return flag


def read_path(node: Node) -> str:
    """A file, from where the accounts file stands; ~ is the user's home."""
    path = re.sub(r"^~(?=/)", node.env.get("HOME", "~"), node.secret())
    return str(Path(node.source).parent / path)


def read_number(low: float, high: float, kind: type[int | float] = float) -> Kind:
    def read(node: Node) -> float:
        with suppress(TypeError, ValueError):
            if low <= (number := kind(node.yaml.value)) <= high:
                return number
        raise ValueError(f"must be a {'whole ' * (kind is int)}number from {low} to {high}.")

    return read


def read_word(*words: str) -> Kind:
    def read(node: Node) -> str:
        if node.yaml.value not in words:
            raise ValueError(f"must be one of {', '.join(words)}.")
        return str(node.yaml.value)

    return read


def read_words(*words: str) -> Kind:
    def read(node: Node) -> tuple[str, ...]:
        found = tuple(text.upper() for text in node.texts())
        if not found or not set(found) <= set(words):
            raise ValueError(f"must be some of {', '.join(words)}.")
        return found

    return read


def read_range(node: Node) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9}) (\d{1,9})", " ".join(node.texts()))
    if not match or int(match[1]) > int(match[2]):
        raise ValueError("must be two whole numbers, [least, most].")
    return int(match[1]), int(match[2])


def read_url(node: Node) -> str:
    url = node.secret().rstrip("/")
    labels = host_of(url).split(".")
    if not re.fullmatch(r"https?://\S+", url) or not all(0 < len(label) < 64 for label in labels):
        raise ValueError("must be a URL that begins with http:// or https://.")
    return url


def read_hosts(node: Node) -> tuple[str, ...]:
    """Host names as they are compared with those of URLs: without port, brackets and capitals."""
    texts = node.texts()
    # An IPv6 address without brackets has two colons and more.
    hosts = tuple(host_of("//" + re.sub(r"^(?!\[).*:.*:.*", r"[\g<0>]", text)) for text in texts)
    if not all(hosts) or re.search(r"[/*\s]", "".join(texts)):
        raise ValueError("must be host names without scheme and *, such as box.lan.")
    return hosts


def read_origins(node: Node) -> tuple[str, ...]:
    origins = tuple(origin.rstrip("/").lower() for origin in node.texts())
    if not all(re.fullmatch(r"null|[a-z][\w+.-]*://[^/*\s]+", origin) for origin in origins):
        example = "such as https://chat.example.com"
        raise ValueError(f"must be origins with a scheme and without *, {example}.")
    return origins


def read_store(node: Node) -> str:
    """The place of stored responses: `memory`, `off`, or a file. A bare word is more likely a slip
    than a file's name."""
    place = node.text()
    if not re.search(r"^(memory|off)$|[/\\]", place):
        raise ValueError("must be memory, off or the path of a file, such as ~/agproxy.sqlite3.")
    return place


def read_map(kind: Kind) -> Kind:
    """A mapping with names of the user's as its keys."""

    def read(node: Node) -> JsonObject:
        names = ["NAME"]
        if node.yaml.tag == YAML_MAP:
            names = [key.value for key, _ in node.yaml.value if isinstance(key.value, str)]
        return node.section(dict.fromkeys(names, kind))

    return read


def read_section(kinds: Mapping[str, Kind], make: Callable[..., Any] = dict) -> Kind:
    return lambda node: make(**node.section(kinds))


def setting(read: Kind, default: Any = MISSING, **more: Any) -> Any:
    """A field that the accounts file may set under its name, and the kind that reads it."""
    return field(default=default, metadata={"read": read}, **more)


def keys_of(kind: type[Any]) -> dict[str, Kind]:
    return {key.name: key.metadata["read"] for key in fields_of(kind) if key.metadata}


read_seconds = read_number(0.001, 86400)
# For each model or pattern and each quota, how much a project may use.
read_limits = read_map(read_section(dict.fromkeys(QUOTAS, read_number(1, 1 << 40, int))))
USER_KEYS = ("client_id", "client_secret", "refresh_token")
OAUTH_KEYS = ("credentials", *USER_KEYS, "token_url", "project", "location")
# The keys that an account of each kind cannot have.
FOREIGN_KEYS = {"gemini": OAUTH_KEYS, "vertex": ("api_key",), "cloudcode": ("api_key",)}


@value
class Account:
    name: str
    api_key: str = setting(Node.secret, "", repr=False)
    base_url: str = setting(read_url, GEMINI_URL)
    kind: str = setting(read_word(*FOREIGN_KEYS), "gemini")
    email: str | None = setting(Node.text, None)
    weight: float = setting(read_number(0.01, 1000), 1.0)  # its share of requests
    max_concurrency: int | None = setting(read_number(1, 100000, int), None)
    quota_group: str | None = setting(Node.text, None)  # accounts of one project share its quota
    limits: Mapping[str, Mapping[str, int]] = setting(read_limits, default_factory=dict)
    proxy: str | None = setting(read_url, None, repr=False)
    credentials: str = setting(read_path, "")  # holds the tokens; `agproxy login` makes it
    client_id: str = setting(Node.secret, "")
    client_secret: str = setting(Node.secret, "", repr=False)
    refresh_token: str = setting(Node.secret, "", repr=False)
    service_account: str = field(default="", repr=False)  # the JSON of a service account's file
    token_url: str = setting(read_url, TOKEN_URL)
    project: str = setting(Node.secret, "")
    location: str = setting(Node.text, "global")


ACCOUNT_KEYS = {"name": Node.text, "enabled": read_flag, **keys_of(Account)}


@value
class ClientKey:
    """A key that lets a client in, and the client's name in the log."""

    name: str = setting(Node.text)
    key: str = setting(Node.secret, repr=False)


def secrets_of(owner: Any) -> list[str]:
    """The values of an account or a client's key that are shown to nobody."""
    return [getattr(owner, key.name) or "" for key in fields_of(owner) if not key.repr]


def read_keys(node: Node) -> tuple[ClientKey, ...]:
    """One key, or a list of `{name, key}`."""
    if node.yaml.tag != YAML_LIST:
        return (ClientKey("client", node.secret()),)
    kinds = keys_of(ClientKey)
    keys = [item.section(kinds) for item in node.items()]
    if not all(len(key) == len(kinds) for key in keys):
        raise ValueError("must be one key, or a list of entries with a `name` and a `key` each.")
    return tuple(ClientKey(**key) for key in keys)


@value
class Timeouts:
    connect_s: float = setting(read_seconds, 10.0)
    first_event_s: float = setting(read_seconds, 300.0)
    idle_s: float = setting(read_seconds, 300.0)
    total_s: float | None = setting(read_seconds, None)  # None: as long as it takes
    stall_s: float = setting(read_seconds, 120.0)


@value
class Config:
    accounts: tuple[Account, ...]
    host: str | None = setting(Node.text, None)
    port: int = setting(read_number(0, 65535, int), 8045)
    auth_mode: str = setting(read_word("off", "strict", "all_except_health", "auto"), "auto")
    api_key: tuple[ClientKey, ...] = setting(read_keys, ())
    allow_lan_access: bool = setting(read_flag, False)
    allowed_hosts: tuple[str, ...] = setting(read_hosts, ())
    cors_origins: tuple[str, ...] = setting(read_origins, ())
    show_account: str = setting(read_word("full", "masked", "off"), "masked")
    upstream_proxy: str | None = setting(read_url, None, repr=False)
    strict: bool = setting(read_flag, False)
    strategy: str = setting(read_word(*STRATEGIES), "affinity")
    max_wait_s: float = setting(read_number(0, 3600), 10.0)
    reserve: float = setting(read_number(0, 0.9), 0.0)  # share of each limit that is spared
    max_requests: int = setting(read_number(1, 1 << 20, int), 1000)
    store: str | None = setting(read_store, None)
    fetch_media: bool = setting(read_flag, True)
    media_hosts: tuple[str, ...] = setting(read_hosts, ())
    images_in_text: bool = setting(read_flag, False)
    timeouts: Timeouts = setting(read_section(keys_of(Timeouts), Timeouts), Timeouts())
    heartbeat_s: float = setting(read_number(0, 3600), 15.0)
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    traits: Mapping[str, JsonMap] = field(default_factory=dict)
    demo: bool = False

    @property
    def auth(self) -> str:
        """The effective mode: `auto` asks for a key exactly where the LAN can reach the gateway."""
        if self.auth_mode != "auto":
            return self.auth_mode
        return "all_except_health" if self.allow_lan_access else "off"

    @property
    def bind(self) -> str:
        """The address to listen on. IPv6 may be given in brackets, as in URLs."""
        default = "0.0.0.0" if self.allow_lan_access else "127.0.0.1"
        return (self.host or default).strip("[]").lower()

    @property
    def base_url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.port}/v1"


def read_accounts(node: Node) -> tuple[Account, ...]:
    if node.yaml.tag != YAML_LIST:
        raise ValueError("must be a list: each account begins with '- name: ...'.")
    accounts = {}
    for item in node.items():
        if account := item.read(read_account):
            if account.name in accounts:
                item.note(f"two accounts are named '{account.name}'; give each its own `name`.")
            accounts[account.name] = account
    return tuple(accounts.values())


def read_account(node: Node) -> Account | None:
    """The account; None if it is disabled or a problem was noted."""
    known = len(node.problems)
    given = node.section(ACCOUNT_KEYS)
    if not given.pop("enabled", True):
        del node.problems[known:]  # its variables need not be set
        return None
    if len(node.problems) > known:
        return None
    if not given.setdefault("name", given.get("email")):
        raise ValueError("needs a `name` or an `email`.")
    kind = given.setdefault("kind", "gemini")
    for key in given:
        if key in FOREIGN_KEYS[kind]:
            remedy = "Remove it, or name another kind."
            raise ValueError(f"is of kind {kind}, which has no use for `{key}`. {remedy}")
    if kind != "gemini":
        given.setdefault("base_url", google_url(given))
        find_credentials(node, given)
    elif "api_key" not in given:
        raise ValueError("needs an `api_key`.")
    return Account(**given)


def google_url(given: JsonMap) -> str:
    """The URL of an account's kind and location. Raises ValueError."""
    if given["kind"] == "vertex" and "project" not in given:
        raise ValueError("needs a `project`.")
    region = given.get("location", "global")
    if not re.fullmatch(r"[a-z0-9-]+", region):
        remedy = "Use a region's name such as europe-west1, or global."
        raise ValueError(f"has the location '{region}'. {remedy}")
    if given["kind"] != "vertex":
        return CLOUDCODE_URL
    return VERTEX_URL.format("" if region == "global" else f"{region}-")


def find_credentials(node: Node, given: JsonObject) -> None:
    """Adds to an account what its credentials file holds. Raises ValueError."""
    named = "credentials" in given
    if not named:
        if not given.keys() >= {"client_id", "client_secret"}:
            client = "the `client_id` and `client_secret` of an OAuth client of yours"
            raise ValueError(f"needs `credentials: FILE`, or {client}.")
        if "refresh_token" in given:
            return
        word = re.sub(r"[^\w.@-]", "_", given["name"])
        given["credentials"] = str(Path(node.source).parent / f"{word}.token.json")
    try:
        read_credentials(node.load(Path(given["credentials"])), given)
    except (OSError, UnicodeDecodeError):
        if named:
            raise ValueError(
                f"names {given['credentials']}, which cannot be read. Check `credentials`."
            ) from None


def read_credentials(text: str, given: JsonObject) -> None:
    """Takes over a file as gcloud, the console or `agproxy login` write it. Raises ValueError."""
    found = parse_json(text)
    if not isinstance(found, dict):
        found = {}
    texts = {key: value for key, value in found.items() if isinstance(value, str)}
    if texts.get("type") == "service_account" and texts.keys() >= {"client_email", "private_key"}:
        given["service_account"] = text
        given.setdefault("token_url", texts.get("token_uri", TOKEN_URL))
    elif texts.keys() >= set(USER_KEYS):
        given |= {key: given.get(key) or texts[key] for key in USER_KEYS}
    else:
        wrong = "which is no authorized_user and no service_account file. Make it anew."
        raise ValueError(f"has {given['credentials']}, {wrong}")


TRAIT_KEYS: Mapping[str, Kind] = {
    **{trait.name: read_flag for trait in fields_of(Traits) if trait.type == "bool"},
    "thinking": read_word("none", "budget", "level"),
    "levels": read_words(*(effort.upper() for effort in EFFORTS)),
    "answers": read_words("TEXT", "IMAGE", "AUDIO"),
    "budget": read_range,
    "output_tokens_max": read_number(1, 1 << 30, int),
}
MODELS_KEYS: Mapping[str, Kind] = {
    "default": Node.text,
    "map": read_map(Node.text),
    "fallback": read_map(Node.texts),
    "traits": read_map(read_section(TRAIT_KEYS)),
}
SECTIONS: Mapping[str, Kind] = {
    "proxy": read_section(keys_of(Config)),
    "models": read_section(MODELS_KEYS),
    "accounts": read_accounts,
}


def load_config(
    text: str, source: str, env: Mapping[str, str], load: Read, *, accounts: bool = True
) -> Config:
    """The accounts file as a Config. Raises ConfigError: of each problem a line `file:line: what`.

    Without `accounts` that section is not read, so that its keys need not be there.
    """
    problems: list[str] = []
    kinds = dict(SECTIONS)
    if not accounts:
        kinds["accounts"] = lambda _: ()
    given = Node(compose_yaml(text, source), "", source, env, load, problems).section(kinds)
    names = {"default": "default_model", "map": "aliases"}
    models = {names.get(key, key): value for key, value in given.get("models", {}).items()}
    config = Config(given.get("accounts", ()), **given.get("proxy", {}), **models)
    problems += [f"{source}: {problem}" for problem in config_problems(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def compose_yaml(text: str, source: str) -> Any:
    """The root node of a YAML text, None if it is empty. Raises ConfigError."""
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        place, remedy = f"{source}:{line + 1}", "Mend this line."
    except (ValueError, OverflowError, RecursionError) as error:
        # A character beyond Unicode, or no end of brackets.
        place, problem, remedy = source, error, "Write it anew."
    raise ConfigError(f"{place}: not valid YAML ({problem}). {remedy}")


def config_problems(config: Config) -> list[str]:
    """The problems of values that are each right on their own, but not safe together."""
    if config.allow_lan_access or is_loopback(config.bind):
        return []
    remedy = "set proxy.allow_lan_access: true to allow it."
    return [f"host {config.bind} is reachable from outside; {remedy}"]


@lru_cache(256)
def host_of(url: str) -> str:
    """The host of a URL in lower case, without a final dot; empty if the URL is malformed."""
    with suppress(ValueError):
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # a bad port raises too
        return host.removesuffix(".")
    return ""


@lru_cache(256)
def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ip_address(host.strip("[]")).is_loopback)


def is_public(host: str) -> bool:
    """True for an address of the internet. One that carries another inside counts as that one."""
    address = ip_address(host.strip("[]").partition("%")[0])
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in ip_network("64:ff9b::/96"):  # NAT64
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if address not in ip_network("2000::/3"):  # of IPv6 nothing else is assigned
            return False
    return address.is_global and not address.is_multicast


def is_address(host: str) -> bool:
    try:
        return bool(ip_address(host.strip("[]")))
    except ValueError:
        return False


# ==============================================================================
# 5. Doors
# ==============================================================================

DONE = "data: [DONE]\n\n"

Fate = Literal["mapped", "ignored", "dropped"]
Reader = Callable[["Fields"], JsonObject]
# Of each field: its fate, why, and its JSON type, or the function that reads it and its kin.
Fates = dict[str, tuple[Fate, str, "str | Reader"]]
UNKNOWN: tuple[Fate, str, str] = ("dropped", "unknown field", "")
Parse = Callable[[Any, "Past"], "list[Request]"]
Past = Sequence[Any] | None  # the items of a stored conversation; None where nothing is stored


def openai_error(error: GatewayError) -> JsonObject:
    details = {"message": error.message, "type": error.type}
    return {"error": details | {"param": error.param, "code": error.code}}


@value
class Listed:
    """A model in the list of models."""

    id: str
    owner: str


def openai_models(listed: Sequence[Listed], one: bool) -> JsonObject:
    """The list of models, or the object of the `one` that was asked for by its name."""
    models = [
        {"id": model.id, "object": "model", "created": 0, "owned_by": model.owner}
        for model in listed
    ]
    return models[0] if one else {"object": "list", "data": models}


@value
class Head:
    """The values that all objects of one answer repeat."""

    id: str  # 24 hexadecimal digits; each format puts its own prefix before them
    created: int
    model: str
    include_usage: bool = False
    images_in_text: bool = False  # as Markdown, for clients that look for images nowhere else
    now: Callable[[], float] = float
    seal: Callable[[ToolCall | Text], str] | None = None
    """Encrypts the signature of a signed part, where the client asked to be sent it."""


class Renderer(ABC):
    """Events to one front format: a translation, not a machine."""

    media_type = "text/event-stream"  # of its frames

    @abstractmethod
    def __init__(self, head: Head, body: JsonMap) -> None: ...

    def frames(self, events: Iterable[Event]) -> str:
        """The part of a stream that shows the events of one read."""
        return "".join(map(self.render, events))

    @abstractmethod
    def render(self, event: Event) -> str:
        """The frames of one event, "" where the format has nothing to say."""

    @abstractmethod
    def whole(self, events: Sequence[Event]) -> Any:
        """The object of a whole answer. Raises the GatewayError of a Failed event."""


@value
class Door:
    """Everything that a front format is."""

    path: str
    fields: Fates
    parse: Parse
    renderer: type[Renderer]
    error: Callable[[GatewayError], JsonObject] = openai_error
    models: Callable[[Sequence[Listed], bool], Any] = openai_models
    counts: Callable[[int], Any] | None = None  # the answer to a request to count tokens
    keeps: bool = False  # its answers can be stored and gone on with
    long_field: str = "messages"  # holds the conversation: named where that is too long


# ---- typed fields

MODEL_CHARS_MAX = 512  # a model's name is looked up, logged, and sent on in a URL and in headers
KINDS: Mapping[str, tuple[type, ...]] = {
    "a string": (str,),
    "a number": (int, float),
    "a whole number": (int,),
    "true or false": (bool,),
    "an object": (dict,),
    "an array": (list,),
    "a string or an object": (str, dict),
    "a string or an array of parts": (str, list),
}
RANGE_CODES = {"a number": "decimal", "a whole number": "integer"}


class Fields:
    """One JSON object of a body. Null means absent; a wrong type is a BadRequest with the path."""

    __slots__ = ("changes", "path", "value")

    def __init__(self, value: Any, path: str = "", changes: list[Change] | None = None) -> None:
        if not isinstance(value, dict):
            name = f"'{path}'" if path else "The body"
            raise BadRequest(
                f"{name} is not a JSON object. Send {{...}}.",
                code="invalid_type",
                param=path or None,
            )
        if changes is None:
            changes = []
        self.value = value
        self.path = path
        self.changes = changes  # one list for the whole body

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def change(self, key: str, kind: ChangeKind, reason: str) -> None:
        self.changes.append(Change(pointer_of(self.at(key)), kind, reason))

    # ---- refusals

    def wrong(self, key: str, what: str, remedy: str, code: str = "invalid_value") -> BadRequest:
        if len(what) > ERROR_CHARS_MAX:
            what = f"{what[:ERROR_CHARS_MAX]}…"
        return BadRequest(f"'{self.at(key)}' {what}. {remedy}.", code=code, param=self.at(key))

    def wrong_type(self, key: str, kind: str) -> BadRequest:
        return self.wrong(key, "has the wrong type", f"Send {kind}", "invalid_type")

    def not_served(self, key: str, remedy: str) -> BadRequest:
        return self.wrong(key, f"is '{self.value.get(key)}', which is not served", remedy)

    def refuse(self, key: str, remedy: str) -> None:
        if self.value.get(key) not in (None, ""):
            raise self.wrong(key, "is not served", remedy, "unsupported_parameter")

    def missing(self, key: str) -> NoReturn:
        raise self.wrong(key, "is missing", "Add it", "missing_required_parameter")

    # ---- values

    def get(self, key: str, kind: str) -> Any:
        value = self.value.get(key)
        if value is None or value.__class__ in KINDS[kind]:
            return value
        raise self.wrong_type(key, kind)

    def text(self, key: str) -> str | None:
        value = self.value.get(key)
        if value is None or value.__class__ is str:
            return value
        raise self.wrong_type(key, "a string")

    def needed_text(self, key: str) -> str:
        return self.text(key) or self.missing(key)

    def texts(self, key: str, remedy: str = "Send a string or an array of strings") -> list[str]:
        """The texts of a field that is a string or an array of strings."""
        value = self.value.get(key)
        if value is None:
            return []
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
        raise self.wrong(key, "is neither a string nor an array of strings", remedy, "invalid_type")

    def model(self) -> str:
        name = self.needed_text("model")
        if len(name) > MODEL_CHARS_MAX:
            what = f"has {len(name)} characters"
            raise self.wrong("model", what, f"Send at most {MODEL_CHARS_MAX}")
        return name

    def flag(self, key: str, default: bool = False) -> bool:
        flag: bool | None = self.get(key, "true or false")
        return default if flag is None else flag

    def number(self, key: str, low: float, high: float, kind: str = "a number") -> Any:
        value = self.get(key, kind)
        if value is None or low <= value <= high:
            return value
        code = f"{RANGE_CODES[kind]}_{'below_min' if value < low else 'above_max'}_value"
        limits = f"at least {low}" if isinf(high) else f"from {low} to {high}"
        raise self.wrong(key, f"is {value}", f"Send {kind}, {limits}", code)

    def count(self, key: str, high: float = inf, low: int = 1) -> int | None:
        count: int | None = self.number(key, low, high, "a whole number")
        return count

    def object(self, key: str) -> Fields | None:
        value = self.get(key, "an object")
        if value is None:
            return None
        return Fields(value, self.at(key), self.changes)

    def objects(self, key: str) -> list[Fields]:
        items, path = self.get(key, "an array") or (), self.at(key)
        return [Fields(item, f"{path}[{i}]", self.changes) for i, item in enumerate(items)]


# ---- the fate of each field


def fates(fate: Fate, read: str | Reader = "", /, **reasons: str) -> Fates:
    """Rows for fields with one fate.

    They name what reads the fields, or their JSON type if nothing does.
    """
    return {field: (fate, reason, read) for field, reason in reasons.items()}


mapped = partial(fates, "mapped")
ignored = partial(fates, "ignored")
dropped = partial(fates, "dropped")


def read_fields(fields: Fields, table: Fates) -> JsonObject:
    """The attributes of a Request that the fields of a body name; absent ones cost nothing.

    Each loss becomes a Change. Raises BadRequest.
    """
    attributes: JsonObject = {}
    done = set()
    for key, value in fields.value.items():
        if value is None:
            continue
        fate, reason, read = table.get(key, UNKNOWN)
        if isinstance(read, str):
            if read:
                fields.get(key, read)
        elif read not in done:  # one reader may serve several fields: it is called once
            done.add(read)
            attributes |= read(fields)
        # An empty value asks for nothing, so nothing is lost.
        if fate == "dropped" and value is not False and value not in ([], {}):
            fields.changes.append(Change(f"/{escaped(key)}", "dropped", reason))
    return attributes


# ---- fields of all doors

STOPS_MAX = 5  # Gemini refuses more
CHOICES_MAX = 128  # OpenAI's limit of `n`; each choice is a call of its own
RANGES = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


def read_ranges(fields: Fields) -> JsonObject:
    return {key: fields.number(key, *limits) for key, limits in RANGES.items()}


def read_seed(fields: Fields) -> JsonObject:
    """The seed; Gemini's is a signed number of 32 bits."""
    seed = fields.get("seed", "a whole number")
    if seed != seed & 0x7FFFFFFF:
        fields.change("seed", "clamped", "its lower 31 bits are sent")
    return {"seed": seed & 0x7FFFFFFF}


def read_stop(fields: Fields) -> JsonObject:
    stops = [stop for stop in fields.texts("stop") if stop]
    if len(stops) > STOPS_MAX:  # Continue sends more than OpenAI's 4 to hosts that it does not know
        fields.change("stop", "dropped", f"only the first {STOPS_MAX} are sent")
    return {"stop": tuple(stops[:STOPS_MAX])}


def read_choices(fields: Fields) -> JsonObject:
    return {"n": fields.count("n", CHOICES_MAX)}


def read_stream(fields: Fields) -> JsonObject:
    streamed = {"stream": fields.flag("stream")}
    if options := fields.object("stream_options"):
        streamed["include_usage"] = options.flag("include_usage")
    return streamed


def limit_of(*names: str, low: int = 1) -> Reader:
    """A reader of the limit of output tokens, by the first of these fields that is there. With
    `low` 0 a zero sets no limit."""

    def read(fields: Fields) -> JsonObject:
        name = next(name for name in names if fields.value.get(name) is not None)
        return {
            "max_output_tokens": fields.count(name, low=low) or None,
            "limit_source": f"/{name}",
        }

    return read


def read_parallel(fields: Fields) -> JsonObject:
    return {"parallel_calls": fields.flag("parallel_tool_calls", default=True)}


NOT_HERE = "not served here"
CACHED = "Gemini caches prompts by itself"
SAMPLING_FIELDS = (
    mapped(model="the model in the URL")
    | mapped(
        read_ranges,
        temperature="generationConfig.temperature",
        top_p="generationConfig.topP",
        presence_penalty="generationConfig.presencePenalty",
        frequency_penalty="generationConfig.frequencyPenalty",
    )
    | mapped(read_seed, seed="generationConfig.seed")
    | mapped(read_stop, stop="generationConfig.stopSequences")
    | mapped(read_choices, n="as many upstream calls")
    | mapped(read_stream, stream="streamGenerateContent", stream_options="the usage chunk")
    | dropped("an object", logit_bias="Gemini has no bias by token")
    | ignored("a string", user="no effect on the answer", service_tier="there is one tier")
    | ignored("a string", safety_identifier="no effect on the answer")
    | ignored("a string", prompt_cache_key=CACHED, prompt_cache_retention=CACHED)
    | ignored("an object", prompt_cache_options=CACHED, metadata="no effect on the answer")
    | ignored("true or false", store="no effect on the answer")
)
TOOL_FIELDS = mapped(
    read_parallel, parallel_tool_calls="further calls are left out of the answer"
) | ignored("an object", moderation="Gemini has filters of its own")
TOOLS_REASON = "tools[0].functionDeclarations"
CHOICE_REASON = "toolConfig.functionCallingConfig"
THINKING_REASON = "google.thinking_config"


def parse_thinking(fields: Fields, effort: str | None, source: str, *, show: bool) -> ThinkingWish:
    """The wish for thinking: an effort, or Google's own thinking_config.

    Users of OpenAI's SDKs send that in `extra_body`.
    """
    extra = fields.object("extra_body")
    google = inner_object(extra, "google") if extra else fields.object("google")
    config = inner_object(google, "thinking_config") if google else None
    if config is None:
        return ThinkingWish(effort=effort, show=show, source=source)
    effort = config.text("thinking_level") or effort
    budget = config.get("thinking_budget", "a whole number")
    show = config.flag("include_thoughts", default=show)
    return ThinkingWish(effort, budget, show, pointer_of(config.path))


def inner_object(outer: Fields, key: str) -> Fields | None:
    """The only object that is read inside another; all else in that is lost."""
    for other in outer.value:
        if other != key:
            outer.change(other, "dropped", "unknown field")
    return outer.object(key)


def parse_format(format: Fields | None, *, nested: bool) -> JsonFormat | None:
    """The format of the answer: chat's `response_format`, or `text.format` of Responses.

    In chat's the schema is nested.
    """
    kind = format and format.text("type")
    if format is None or kind == "text":
        return None
    source = pointer_of(format.path)
    if kind == "json_object":
        return JsonFormat(None, source)
    if kind != "json_schema":
        raise format.not_served("type", "Send text, json_object or json_schema")
    if nested:
        format = format.object("json_schema") or format.missing("json_schema")
    return JsonFormat(format.get("schema", "an object"), source)


# ==============================================================================
# 6. Messages
# ==============================================================================

# ---- tools

CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
# Tools that OpenAI itself would run; Codex sends web_search with every request.
HOSTED = (
    "web_search|file_search|code_interpreter|image_generation|computer|local_shell|shell"
    "|apply_patch|tool_search"
)
HOSTED_TOOLS = re.compile(rf"{HOSTED}|web_search\w+|computer\w+|mcp|programmatic_tool_calling")
WEB_SEARCH = re.compile(r"web_search\w*")


def parse_tools(fields: Fields, *, hosted: bool = True) -> tuple[Tool, ...]:
    """The declared tools, each name once; chat's old `functions` are tools too.

    With `hosted`, tools that OpenAI would run itself are passed over; a web search always is.
    """
    tools = [tool for entry in fields.objects("tools") for tool in parse_tool(entry, hosted)]
    tools += map(parse_function, fields.objects("functions"))
    return each_once(fields, tools)


def each_once(fields: Fields, tools: Iterable[Tool]) -> tuple[Tool, ...]:
    """The first tool of each name; Gemini refuses a second one."""
    known: dict[tuple[str | None, str], Tool] = {}
    for tool in tools:
        first = known.setdefault((tool.namespace, tool.name), tool)
        if first is not tool and not tool.source.startswith("past["):
            reason = f"the tool '{tool.name}' is declared twice"
            fields.changes.append(Change(pointer_of(tool.source), "dropped", reason))
    return tuple(known.values())


def parse_tool(entry: Fields, hosted: bool) -> list[Tool]:
    """One entry of `tools`, nested (chat) or flat (Responses); a namespace holds several tools."""
    kind = entry.text("type") or "function"
    if kind == "custom" and "input_schema" not in entry.value:  # else it is Anthropic's
        return [parse_custom(entry)]
    if kind in ("function", "custom"):
        return [parse_function(entry.object("function") or entry)]
    if kind == "namespace":
        name, tools = entry.needed_text("name"), parse_tools(entry, hosted=hosted)
        return [replace(tool, namespace=name) for tool in tools]
    passed_over = HOSTED_TOOLS if hosted else WEB_SEARCH
    if not passed_over.fullmatch(kind):
        raise entry.not_served("type", "Send function, custom or namespace")
    if not kind.startswith("web_search"):
        entry.change("type", "dropped", f"the hosted tool '{kind}' has no counterpart")
    return []


def parse_function(function: Fields) -> Tool:
    key = "input_schema" if "input_schema" in function.value else "parameters"
    return Tool(
        function.needed_text("name"),
        function.text("description") or "",
        function.get(key, "an object"),
        source=function.path,
        schema_key=key,
    )


def parse_custom(entry: Fields) -> Tool:
    """A tool that takes free text: a function of one string, described by its grammar too."""
    tool = entry.object("custom") or entry
    description = tool.text("description") or ""
    if format := tool.object("format"):
        grammar = (format.object("grammar") or format).text("definition")
        if grammar:
            description += f"\nThe input must follow this grammar:\n{grammar}"
    entry.change("type", "emulated", "free text is asked for as a function of one string")
    name = tool.needed_text("name")
    return Tool(name, description, CUSTOM_PARAMETERS, custom=True, source=tool.path)


def search_source(fields: Fields) -> str:
    """The place where a web search is asked for: a hosted tool, or chat's own field."""
    for i, tool in enumerate(fields.get("tools", "an array") or ()):
        if isinstance(tool, dict) and WEB_SEARCH.fullmatch(str(tool.get("type"))):
            return f"/tools/{i}"
    return "/web_search_options" if fields.object("web_search_options") else ""


def parse_tool_choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    """The rule for calls: none, any, or named ones. Objects with a type alone are Anthropic's."""
    key = "tool_choice"
    if fields.value.get(key) is None:
        key = "function_call"
    choice = fields.get(key, "a string or an object")
    if not tools:
        return ToolChoice()
    match choice:
        case None | "auto" | {"type": "auto"}:
            return ToolChoice()
        case "none" | {"type": "none"}:
            return ToolChoice("none")
        case "required" | {"type": "any"}:
            return ToolChoice("required")
        case str():
            raise fields.wrong(
                key,
                f"is '{choice}'",
                "Send none, auto, required or an object that names one of 'tools'",
            )
        case _:
            forced = parse_forced_tool(Fields(choice, key, fields.changes))
    if not forced.names <= {tool.name for tool in tools}:
        raise fields.wrong(key, "names no declared function", "Name one of 'tools'")
    return forced


def parse_forced_tool(choice: Fields) -> ToolChoice:
    """A choice of one tool, or of those that are allowed, by names that may not be declared."""
    kind = choice.text("type") or "function"
    inner = choice.object(kind) or choice
    if kind == "allowed_tools":
        return parse_allowed_tools(inner)
    if HOSTED_TOOLS.fullmatch(kind):
        choice.change("type", "dropped", f"the hosted tool '{kind}' cannot be forced")
        return ToolChoice()
    if kind not in ("function", "custom", "tool"):
        raise choice.not_served("type", "Send function, custom or allowed_tools")
    return ToolChoice("required", frozenset([tool_name(inner)]))


def parse_allowed_tools(allowed: Fields) -> ToolChoice:
    listed = allowed.objects("tools") or [allowed]  # which names no tool, and is refused for that
    own = [tool for tool in listed if not HOSTED_TOOLS.fullmatch(str(tool.value.get("type")))]
    if len(own) < len(listed):
        allowed.change("tools", "dropped", "a hosted tool cannot be chosen")
    if not own:
        return ToolChoice("none")
    mode: Any = allowed.text("mode") or "auto"
    if mode not in ("auto", "required"):
        raise allowed.wrong("mode", f"is '{mode}'", "Send auto or required")
    return ToolChoice(mode, frozenset(map(tool_name, own)))


def tool_name(tool: Fields) -> str:
    return (tool.object("function") or tool.object("custom") or tool).text("name") or ""


# ---- contents

SYSTEM_ROLES = ("system", "developer")
CALL_KEYS = {False: ("function", "arguments"), True: ("custom", "input")}  # by ToolCall.custom
NO_TEXT = Text("")


def texts_of(message: Fields, key: str = "content") -> list[str]:
    """The texts of an instruction."""
    if message.value.get(key) is None:
        message.missing(key)
    return [part.text for part in parse_content(message, parse_words, key)]


def parse_words(part: Fields) -> Text:
    """A part of an instruction, which can be words only."""
    parsed = parse_part(part)
    if isinstance(parsed, Text):
        return parsed
    reason = "Gemini takes instructions in words only"
    part.changes.append(Change(pointer_of(part.path), "dropped", reason))
    return NO_TEXT


def parse_content(
    message: Fields, parse: Callable[[Fields], T], key: str = "content"
) -> list[T | Text]:
    """The parts of a content that is a string or an array; empty texts are left out."""
    content = message.get(key, "a string or an array of parts")
    if isinstance(content, str):
        return [Text(content)] if content else []
    return [part for item in message.objects(key) if (part := parse(item)) != NO_TEXT]


def parse_part(part: Fields) -> Text | Media:
    match part.text("type"):
        case "text" | "input_text" | "output_text":
            return Text(part.text("text") or "")
        case "refusal":
            return Text(part.text("refusal") or "")
        case "encrypted_content":
            part.change("type", "dropped", "only OpenAI can read it")
            return NO_TEXT
        case "image_url" | "input_image":
            return parse_image(part)
        case "input_audio":
            return parse_audio(part.object("input_audio") or part.missing("input_audio"))
        case "file" | "input_file":
            return parse_file(part.object("file") or part)
        case _:
            raise part.not_served("type", "Send text, image_url, input_audio or file")


def render_citation(citation: Citation) -> JsonObject:
    span = {"start_index": citation.start, "end_index": citation.end}
    return span | {"url": citation.url, "title": citation.title}


# ---- media

# Source: https://ai.google.dev/gemini-api/docs/image-understanding, .../audio,
# .../video-understanding, .../document-processing
MEDIA_TYPES = re.compile(
    r"(?a)image/(png|jpeg|webp|heic|heif|gif|avif)|(audio|video|text)/[\w.+-]+|application/pdf"
)
PLAIN_TEXTS = ("json", "xml", "javascript", "x-yaml")
MEDIA_ALIASES = {"image/jpg": "image/jpeg", "audio/x-wav": "audio/wav"} | {
    f"application/{name}": "text/plain" for name in PLAIN_TEXTS
}
AUDIO_FORMATS = ("wav", "mp3", "mpeg", "aac", "aiff", "flac", "ogg")
FILE_TYPES = {  # by the ending of a file's name
    **dict.fromkeys(("", "pdf"), "application/pdf"),
    **dict.fromkeys(("txt", "md", "py", "json"), "text/plain"),
    **dict.fromkeys(("jpg", "jpeg"), "image/jpeg"),
    **{name: f"text/{name}" for name in ("csv", "html", "xml")},
    **{name: f"image/{name}" for name in ("png", "webp")},
    **{name: f"audio/{name}" for name in ("mp3", "wav")},
    "mp4": "video/mp4",
}
IMAGE_TYPES = {"/9j/": "image/jpeg", "UklG": "image/webp", "R0lG": "image/gif"}
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[^;,]{0,100}){0,5};base64,", re.ASCII)
LINK = re.compile(r"(https?|gs)://[^/\s]", re.IGNORECASE)


def parse_image(part: Fields) -> Media:
    part.refuse("file_id", "Send the image as a data: URL")
    image, key = part, "image_url"
    if isinstance(part.value.get(key), dict):
        image, key = part.object(key) or part, "url"
    if image.text("detail") in ("low", "high", "original"):
        image.change("detail", "dropped", "Gemini chooses the resolution itself")
    return parse_url(image, key)


def parse_audio(audio: Fields) -> Media:
    # LangChain sends the end of a MIME type.
    format = audio.needed_text("format").removeprefix("x-")
    if format not in AUDIO_FORMATS:
        raise audio.not_served("format", f"Send one of {', '.join(AUDIO_FORMATS)}")
    return Media(f"audio/{format}", checked_base64(audio, "data", audio.needed_text("data")))


def parse_file(file: Fields) -> Media:
    """A file as data URL, bare base64 with a file name, or URL."""
    file.refuse("file_id", "Send the file's content as file_data")
    if file.value.get("file_url"):
        return parse_url(file, "file_url")
    data = file.needed_text("file_data")
    if data.startswith("data:"):
        return parse_url(file, "file_data")
    mime = checked_type(file, "file_data", media_type_by(file.text("filename") or ""))
    return Media(mime, checked_base64(file, "file_data", data))


def parse_url(part: Fields, key: str) -> Media:
    """Media by URL: the content of a data: URL, or a link to be followed later."""
    url = part.text(key) or ""
    if match := DATA_URL.match(url):
        mime = match[1].lower()
        data = checked_base64(part, key, url[match.end() :])
        if mime == "application/octet-stream":
            mime = image_type(data)
            if key == "file_data":
                mime = media_type_by(part.text("filename") or "")
        return Media(checked_type(part, key, mime), data)
    if LINK.match(url):
        return Media("", "", url=url, path=part.at(key))
    raise part.wrong(
        key,
        "is neither a data: URL with base64 nor an http(s) URL",
        "Send data:image/png;base64,...",
        "invalid_image_url",
    )


def image_type(data: str) -> str:
    """The type of an image by how its base64 begins."""
    return IMAGE_TYPES.get(data[:4], "image/png")


def media_type_by(filename: str) -> str:
    _, dot, ending = filename.rpartition(".")
    return FILE_TYPES.get(dot and ending.lower(), "of an unknown kind")


def checked_type(part: Fields, key: str, mime: str) -> str:
    """The type as Gemini names it. Raises BadRequest for one that it does not read."""
    mime = MEDIA_ALIASES.get(mime, mime)
    if not MEDIA_TYPES.fullmatch(mime):
        remedy = "Send PNG, JPEG, WebP, PDF, text, audio or video"
        raise part.wrong(key, f"is {mime}, which Gemini does not read", remedy, "invalid_image_url")
    return mime


def checked_base64(part: Fields, key: str, data: str) -> str:
    if not is_base64(data):
        raise part.wrong(key, "is not valid base64", "Encode the file anew", "invalid_image_url")
    return data


# ---- messages


def parse_message(message: Fields) -> Message:
    match message.text("role"):
        case "user":
            if message.value.get("content") is None:
                message.missing("content")
            return Message("user", tuple(parse_content(message, parse_block)))
        case "assistant":
            return Message("assistant", tuple(parse_assistant_parts(message)))
        case "tool":
            return parse_result(message, message.needed_text("tool_call_id"))
        case "function":
            return parse_result(message, f"call_{message.needed_text('name')}")
        case role:
            raise message.wrong(
                "role", f"is '{role}'", "Send system, developer, user, assistant or tool"
            )


def parse_result(message: Fields, call_id: str) -> Message:
    return Message("tool", (ToolResult(call_id, tuple(parse_content(message, parse_part))),))


def parse_block(part: Fields) -> Part:
    """A part of a chat message.

    To a model that is named claude-* Cursor sends calls and results in Anthropic's form.
    Source: https://github.com/router-for-me/CLIProxyAPI/pull/3804
    """
    match part.text("type"):
        case "tool_use":
            arguments = dumps(part.get("input", "an object") or {})
            return ToolCall(part.needed_text("id"), part.needed_text("name"), arguments)
        case "tool_result":
            content = tuple(parse_content(part, parse_part))
            return ToolResult(part.needed_text("tool_use_id"), content)
        case "thinking" | "redacted_thinking":
            return Thinking("")
        case _:
            return parse_part(part)


def parse_assistant_parts(message: Fields) -> list[Part]:
    """The texts, images and calls of a model. A client sends images back as it was sent them."""
    parts: list[Part] = []
    for part in parse_content(message, parse_block):
        if isinstance(part, Text) and ";base64," in part.text:
            parts += split_images(part.text)
        else:
            parts.append(part)
    parts += map(parse_part, message.objects("images"))
    parts += map(parse_call, message.objects("tool_calls"))
    if call := message.object("function_call"):
        name = call.needed_text("name")
        parts.append(ToolCall(f"call_{name}", name, call.text("arguments") or ""))
    return parts


MARKDOWN_IMAGE = re.compile(
    r"!\[[^\[\]]{0,100}\]\(data:(image/(?:png|jpeg|webp));base64,([\w+/=-]+)\)", re.ASCII
)


def split_images(text: str) -> list[Text | Media]:
    """A text and its Markdown images: as words these would be a token for every few bytes."""
    parts: list[Text | Media] = []
    end = 0
    for image in MARKDOWN_IMAGE.finditer(text):
        if is_base64(image[2]):
            parts += [Text(text[end : image.start()]), Media(image[1], image[2])]
            end = image.end()
    return [*parts, Text(text[end:])]


def parse_call(call: Fields) -> ToolCall:
    custom = call.text("type") == "custom"
    kind, key = CALL_KEYS[custom]
    inner = call.object(kind) or call.missing(kind)
    id, name = call.needed_text("id"), inner.needed_text("name")
    return ToolCall(id, name, inner.text(key) or "", signature_of(call), custom=custom)


def signature_of(call: Fields) -> str | None:
    """The thought signature where Google's own OpenAI endpoint has it."""
    match call.value.get("extra_content"):
        case {"google": {"thought_signature": str(signature)}} if is_base64(signature):
            return signature
        case _:
            return None


def is_system(message: Fields) -> bool:
    return message.value.get("role") in SYSTEM_ROLES


PLAIN_KEYS = {"role", "content"}


def parse_messages(fields: Fields) -> tuple[tuple[Message, ...], list[str]]:
    """The messages of a chat body, and the instructions among them.

    Plain texts, which are most, cost no call.
    """
    messages = []
    system = []
    for i, item in enumerate(fields.get("messages", "an array") or fields.missing("messages")):
        if item.__class__ is dict and item.keys() == PLAIN_KEYS:
            role, text = item["role"], item["content"]
            if role == "user" and text.__class__ is str and text:
                messages.append(Message("user", (Text(text),)))
                continue
        message = Fields(item, f"messages[{i}]", fields.changes)
        if is_system(message):
            system += texts_of(message)
        else:
            messages.append(parse_message(message))
    return tuple(messages), system


# ==============================================================================
# 7. Chat
# ==============================================================================

FINGERPRINT = "fp_agproxy"
TOP_LOGPROBS_MAX = 20  # OpenAI's limit
COMPLETE_THE_MIDDLE = (
    "Write the text that belongs between the prefix and the suffix. Answer with that text alone, "
    "without repeating either and without Markdown fences."
)
CHAT_THINKING = ThinkingWish(show=True, source="/reasoning_effort")


def read_logprobs(fields: Fields) -> JsonObject:
    """The number of alternatives, by `top_logprobs` alone too; None where none are wanted."""
    alternatives = fields.count("top_logprobs", TOP_LOGPROBS_MAX, low=0) or None
    if fields.flag("logprobs"):
        return {"logprobs": alternatives or 0}
    return {"logprobs": alternatives, "logprobs_source": "/top_logprobs"}


def read_response_format(fields: Fields) -> JsonObject:
    return {"json_format": parse_format(fields.object("response_format"), nested=True)}


def read_effort(fields: Fields) -> JsonObject:
    effort = fields.text("reasoning_effort")
    return {"thinking": parse_thinking(fields, effort, "/reasoning_effort", show=True)}


def read_image_config(fields: Fields) -> JsonObject:
    """Source: https://openrouter.ai/docs/guides/overview/multimodal/image-generation"""
    image = fields.object("image_config") or Fields({})
    return {key: image.text(key) for key in ("aspect_ratio", "image_size")}


def read_modalities(fields: Fields) -> JsonObject:
    fields.refuse("audio", "Leave it out")
    modalities = fields.get("modalities", "an array") or []
    if not all(modality in ("text", "image") for modality in modalities):
        what = "asks for what is not served"
        raise fields.wrong("modalities", what, "Send text, or text and image", "unsupported_value")
    return {"modalities": tuple(modalities)}


def read_chat_tools(fields: Fields) -> JsonObject:
    tools = parse_tools(fields, hosted=False)
    choice = parse_tool_choice(fields, tools)
    return {"tools": tools, "tool_choice": choice, "search_source": search_source(fields)}


CHAT_FIELDS = (
    SAMPLING_FIELDS
    | TOOL_FIELDS
    | mapped(messages="contents and systemInstruction", system="systemInstruction")
    | mapped(
        limit_of("max_completion_tokens", "max_tokens"),
        max_tokens="generationConfig.maxOutputTokens, where max_completion_tokens is not there",
        max_completion_tokens="generationConfig.maxOutputTokens",
    )
    | mapped(
        read_logprobs,
        logprobs="generationConfig.responseLogprobs",
        top_logprobs="generationConfig.logprobs, as far as logprobs are",
    )
    | mapped(
        read_chat_tools,
        tools=TOOLS_REASON,
        functions=TOOLS_REASON,
        tool_choice=CHOICE_REASON,
        function_call=CHOICE_REASON,
        web_search_options="tools[0].googleSearch",
    )
    | mapped(
        read_response_format,
        response_format="generationConfig.responseMimeType and responseJsonSchema",
    )
    | mapped(
        read_effort,
        reasoning_effort="generationConfig.thinkingConfig",
        extra_body=THINKING_REASON,
        google=THINKING_REASON,
    )
    | mapped(
        read_modalities,
        modalities="generationConfig.responseModalities, for images",
        audio="refused",
    )
    | mapped(read_image_config, image_config="generationConfig.imageConfig")
    | dropped("a string", verbosity="Gemini has none; ask for it in the instructions")
    | ignored("an object", prediction="only makes OpenAI's answer faster")
)


def parse_chat(
    body: Any, past: Past = None, *, without_messages: Parse | None = None
) -> list[Request]:
    """The one request of a chat body. Raises BadRequest.

    `without_messages` reads a body that has `input` instead: Cursor sends Responses' bodies to the
    path of chat.
    """
    fields = Fields(body)
    if without_messages and body.get("messages") is None and body.get("input") is not None:
        return without_messages(body, past)
    model = fields.model()
    read: JsonObject = {"thinking": CHAT_THINKING} | read_fields(fields, CHAT_FIELDS)
    messages, system = parse_messages(fields)
    if body.get("system"):  # Anthropic's form, which Cursor sends
        system[:0] = texts_of(fields, "system")
    read["changes"] = tuple(fields.changes)
    return [Request(model, messages, tuple(system), **read)]


# ---- completions


COMPLETION_FIELDS = (
    SAMPLING_FIELDS
    | mapped(prompt="contents, one upstream call each", suffix="an instruction")
    | mapped(limit_of("max_tokens", low=0), max_tokens="generationConfig.maxOutputTokens")
    | mapped("true or false", echo="the prompt before the text")
    | ignored("a whole number", best_of="the first answer is the best")
    | dropped("a whole number", logprobs=NOT_HERE)
    | dropped(top_logprobs=NOT_HERE, extra_body=NOT_HERE, google=NOT_HERE)
)


def parse_completion(body: Any, past: Past = None) -> list[Request]:
    """A completions body: one request a prompt. Raises BadRequest."""
    fields = Fields(body)
    read = read_fields(fields, COMPLETION_FIELDS)
    prompts = parse_prompts(fields, read.get("n", 1))
    system = (COMPLETE_THE_MIDDLE,) if fields.text("suffix") else ()
    read["changes"] = tuple(fields.changes)
    return [
        Request(fields.model(), (Message("user", (Text(prompt),)),), system, **read)
        for prompt in prompts
    ]


def parse_prompts(fields: Fields, n: int) -> list[str]:
    """The prompts, of which each is to be answered `n` times; with the suffix, if there is one."""
    remedy = "Send the text itself; token arrays are not served"
    prompts = fields.texts("prompt", remedy) or [""]
    if len(prompts) * n > CHOICES_MAX:
        what = f"times 'n' is more than {CHOICES_MAX} choices"
        raise fields.wrong("prompt", what, "Send fewer prompts at once")
    suffix = fields.text("suffix")
    if not suffix:
        return prompts
    fields.change("suffix", "emulated", "asked for by an instruction")
    return [f"<prefix>{prompt}</prefix>\n<suffix>{suffix}</suffix>" for prompt in prompts]


# ---- answers


def render_usage(usage: Usage) -> JsonObject:
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


def render_call(call: ToolCall) -> JsonObject:
    kind, key = CALL_KEYS[call.custom]
    function = {"name": call.name, key: call.arguments}
    entry = {"id": call.id, "type": kind, kind: function}
    if call.signature:
        entry["extra_content"] = {"google": {"thought_signature": call.signature}}
    return entry


def render_annotations(citations: Iterable[Citation]) -> list[JsonObject]:
    return [{"type": "url_citation", "url_citation": render_citation(each)} for each in citations]


def render_logprobs(logprobs: Sequence[JsonMap]) -> JsonObject | None:
    return {"content": list(logprobs), "refusal": None} if logprobs else None


Content = PartStart | Delta | Annotated | PartEnd  # the events inside one choice


class ChoiceRenderer(Renderer):
    """The common part of chat and completions.

    A chunk shows one choice; behind them come a chunk for the usage and [DONE], or an error.
    """

    def __init__(self, head: Head, prefix: str, kind: str, **more: str) -> None:
        self._known: JsonObject = {
            "id": f"{prefix}-{head.id}",
            "object": kind,
            "created": head.created,
            "model": head.model,
            **more,
            "system_fingerprint": FINGERPRINT,
        }
        self._reasons: dict[str, str] = {}  # by ours, those that this format names differently
        self._include_usage = head.include_usage
        self._after = '],"usage":null}\n\n' if head.include_usage else "]}\n\n"

    @cached_property
    def _before(self) -> str:
        """The start of a chunk, up to its choices. An answer that is not streamed needs none."""
        return f'data: {dumps(self._known)[:-1]},"choices":['

    def render(self, event: Event) -> str:
        match event:
            case Started():
                return ""
            case Ended() | Failed():
                return self._end(event)
            case Finished():
                return self._render_finish(event)
            case _:
                return self._render_content(event)

    @abstractmethod
    def _render_content(self, event: Content) -> str:
        """The frames of an event inside an answer."""

    @abstractmethod
    def _render_finish(self, event: Finished) -> str: ...

    def _reason(self, reason: FinishReason) -> str:
        return self._reasons.get(reason, reason)

    def _frame(self, entry: str) -> str:
        return f"{self._before}{entry}{self._after}"

    def _end(self, event: Ended | Failed) -> str:
        if isinstance(event, Failed):
            return f"data: {dumps(openai_error(event.error))}\n\n"
        if not self._include_usage:
            return DONE
        return f'{self._before}],"usage":{dumps(render_usage(event.usage))}}}\n\n{DONE}'

    def whole(self, events: Sequence[Event]) -> JsonObject:
        choices, usage = collect(events)
        return {
            **self._known,
            "object": self._known["object"].removesuffix(".chunk"),
            "choices": [self.whole_choice(*each) for each in sorted(choices.items())],
            "usage": render_usage(usage),
        }

    @abstractmethod
    def whole_choice(self, index: int, choice: Choice) -> JsonObject: ...


class ChatRenderer(ChoiceRenderer):
    """Events to the frames of a chat stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: JsonMap) -> None:
        super().__init__(head, "chatcmpl", "chat.completion.chunk", service_tier="default")
        self._id, self._audio_until = head.id, head.created + 3600
        self._images_in_text = head.images_in_text
        # A body with chat's old `functions` is answered in their form.
        self._legacy = bool(body.get("functions")) and not body.get("tools")
        if self._legacy:
            self._reasons = {"tool_calls": "function_call"}
        # Of each choice, its calls and the fields that its media were sent in.
        self._calls: dict[int, list[ToolCall]] = defaultdict(list)
        self._media: dict[int, list[str]] = defaultdict(list)
        # The start of a chunk of text, of each choice that has begun; and the end of all of them.
        self._before_text: list[str] = []
        self._after_text = f'}},"logprobs":null,"finish_reason":null}}{self._after}'

    def frames(self, events: Iterable[Event]) -> str:
        """The frames of one read's events; nine of ten are more text of a choice that has begun."""
        before, after, frames = self._before_text, self._after_text, ""
        for event in events:
            if event.__class__ is TextDelta and event.choice < len(before):
                frames += f"{before[event.choice]}{encode_basestring(event.text)}{after}"
            else:
                frames += self.render(event)
        return frames

    def _render_content(self, event: Content) -> str:
        delta = self._delta(event)
        return self._chunk(event.choice, delta) if delta else ""

    def _render_finish(self, event: Finished) -> str:
        reason, logprobs = self._reason(event.reason), render_logprobs(event.logprobs)
        return self._chunk(event.choice, {}, reason, logprobs)

    def _chunk(
        self,
        choice: int,
        delta: JsonMap,
        finish: str | None = None,
        logprobs: JsonMap | None = None,
    ) -> str:
        frames = ""
        for index in range(len(self._before_text), choice + 1):  # SDKs count choices up
            self._before_text.append(f'{self._before}{{"index":{index},"delta":{{"content":')
            frames += self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        entry = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return frames + self._frame(dumps(entry))

    def _delta(self, event: Content) -> JsonObject:
        """The fields that an event adds to its choice's message."""
        match event:
            case TextDelta(text=text):
                return {"content": text}
            case ThinkingDelta(text=text):
                return {"reasoning_content": text}
            case PartStart(choice, ToolCall() as call):
                self._calls[choice].append(call)
                return self._call_delta(choice, render_call(call))
            case ArgumentsDelta(choice, text):
                kind, key = CALL_KEYS[self._calls[choice][-1].custom]
                return self._call_delta(choice, {kind: {key: text}})
            case PartStart(choice, Media() as media):
                return self._media_delta(choice, media)
            case Annotated(citations=citations) if citations:
                return {"annotations": render_annotations(citations)}
            case PartStart() | PartEnd() | Annotated():
                return {}
            case _:
                assert_never(event)

    def _call_delta(self, choice: int, entry: JsonObject) -> JsonObject:
        index = len(self._calls[choice]) - 1
        if not self._legacy:
            return {"tool_calls": [{"index": index, **entry}]}
        if index:
            return {}  # the old form knows one call an answer
        return {"function_call": entry["function"]}

    def _media_delta(self, choice: int, media: Media) -> JsonObject:
        sent = self._media[choice]
        key, value = self._render_part(media, sent.count("images"))
        if key == "audio" and key in sent:
            return {}  # SDKs would join a second one with the first
        sent.append(key)
        return {key: value}

    def _render_part(self, part: Part, images: int) -> tuple[str, Any]:
        """The field of a message that a part adds to, and what it adds behind so many `images`.

        `audio` is OpenAI's field, `images` that of routers in front of it.
        """
        match part:
            case Text(text):
                return "content", text
            case Thinking(text):
                return "reasoning_content", text
            case ToolCall():
                return "tool_calls", [render_call(part)]
            case Media(mime, data) if mime.startswith("audio/"):
                audio = {"id": f"audio_{self._id}", "expires_at": self._audio_until}
                return "audio", audio | {"transcript": "", "data": data}
            case Media(mime, data) if self._images_in_text:
                return "content", f"![image](data:{mime};base64,{data})"
            case Media(mime, data):
                image = {"url": f"data:{mime};base64,{data}"}
                return "images", [{"type": "image_url", "index": images, "image_url": image}]
            case ToolResult():
                return "content", ""
            case _:
                assert_never(part)

    def whole_choice(self, index: int, choice: Choice) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": "", "refusal": None}
        for part in choice.parts:
            key, value = self._render_part(part, len(message.get("images", ())))
            if key not in message:
                message[key] = value
            elif key != "audio":
                message[key] += value
        if choice.citations:
            message["annotations"] = render_annotations(choice.citations)
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            if self._legacy:
                message["function_call"] = message.pop("tool_calls")[0]["function"]
        return {
            "index": index,
            "message": message,
            "logprobs": render_logprobs(choice.logprobs),
            "finish_reason": self._reason(choice.reason),
        }


class CompletionRenderer(ChoiceRenderer):
    """Events to the frames of a completions stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: JsonMap) -> None:
        super().__init__(head, "cmpl", "text_completion")
        self._reasons = {"tool_calls": "stop"}
        self._echo = Fields(body).texts("prompt") if body.get("echo") else []
        self._n = body.get("n") or 1
        self._echoed: set[int] = set()

    def _render_content(self, event: Content) -> str:
        if not isinstance(event, TextDelta):
            return ""
        return self._text(event.choice, event.text)

    def _render_finish(self, event: Finished) -> str:
        return self._text(event.choice, "", f'"{self._reason(event.reason)}"')

    def _text(self, choice: int, text: str, finish: str = "null") -> str:
        if choice not in self._echoed:
            self._echoed.add(choice)
            text = self._prompt(choice) + text
        start = f'{{"text":{encode_basestring(text)},"index":{choice}'
        return self._frame(f'{start},"logprobs":null,"finish_reason":{finish}}}')

    def _prompt(self, choice: int) -> str:
        """The prompt that a choice echoes: choices are numbered prompt by prompt."""
        return self._echo[choice // self._n] if self._echo else ""

    def whole_choice(self, index: int, choice: Choice) -> JsonObject:
        return {
            "text": self._prompt(index) + choice.text,
            "index": index,
            "logprobs": None,
            "finish_reason": self._reason(choice.reason),
        }


CHAT = Door("/v1/chat/completions", CHAT_FIELDS, parse_chat, ChatRenderer)
COMPLETIONS = Door(
    "/v1/completions",
    COMPLETION_FIELDS,
    parse_completion,
    CompletionRenderer,
    long_field="prompt",
)

# ==============================================================================
# 8. Responses
# ==============================================================================

RESPONSE_THINKING = ThinkingWish(source="/reasoning/effort")


def read_text(fields: Fields) -> JsonObject:
    text = fields.object("text")
    return {"json_format": parse_format(text and text.object("format"), nested=False)}


def check_top_logprobs(fields: Fields) -> JsonObject:
    fields.count("top_logprobs", TOP_LOGPROBS_MAX, low=0)
    return {}


def read_reasoning(fields: Fields) -> JsonObject:
    reasoning = fields.object("reasoning") or Fields({})
    effort = reasoning.text("effort")
    summary = reasoning.text("summary") or reasoning.text("generate_summary")
    return {"thinking": parse_thinking(fields, effort, "/reasoning/effort", show=bool(summary))}


RESPONSE_FIELDS = (
    SAMPLING_FIELDS
    | TOOL_FIELDS
    | mapped(
        input="contents and systemInstruction",
        instructions="systemInstruction",
        previous_response_id="the conversation that is kept, before the input",
        background="answered beside the connection, where responses are kept",
        conversation="refused",
        prompt="refused",
    )
    | mapped(
        limit_of("max_output_tokens", "max_tokens"),
        max_tokens="generationConfig.maxOutputTokens, where max_output_tokens is not there",
        max_output_tokens="generationConfig.maxOutputTokens",
    )
    | mapped(read_text, text="generationConfig.responseMimeType and responseJsonSchema")
    | mapped(
        read_reasoning,
        reasoning="generationConfig.thinkingConfig",
        extra_body=THINKING_REASON,
        google=THINKING_REASON,
    )
    | mapped(tools=TOOLS_REASON, tool_choice=CHOICE_REASON)
    | mapped("true or false", store="the response is kept, for previous_response_id")
    | ignored("a string", truncation="nothing is truncated")
    | ignored(
        "an array",
        include="what there is, is included",
        context_management="nothing is truncated",
    )
    | ignored("a whole number", max_tool_calls="counts hosted tools only")
    | ignored("an object", client_metadata="no effect on the answer")
    | dropped("a whole number", n=NOT_HERE)
    | dropped(check_top_logprobs, logprobs=NOT_HERE, top_logprobs=NOT_HERE)
)


def parse_response(body: Any, past: Past = None) -> list[Request]:
    """The one request of a Responses body. Raises BadRequest."""
    fields = Fields(body)
    refuse_state(fields, keeps=past is not None)
    messages, system, tools = parse_input(fields, past or ())
    choice = parse_tool_choice(fields, tools)
    read: JsonObject = {"thinking": RESPONSE_THINKING} | read_fields(fields, RESPONSE_FIELDS)
    read |= {"messages_source": "/input", "search_source": search_source(fields)}
    read["changes"] = tuple(fields.changes)
    return [Request(fields.model(), messages, system, tools, choice, **read)]


def refuse_state(fields: Fields, *, keeps: bool) -> None:
    """Raises BadRequest for a body that relies on more state than is kept on this side."""
    if fields.text("previous_response_id") and not keeps:
        raise not_kept(fields.value["previous_response_id"])
    for key in ("conversation", "prompt"):
        if fields.value.get(key):
            raise fields.wrong(key, "is not served", "Leave it out", "unsupported_parameter")
    if fields.flag("background") and not (keeps and fields.flag("store", default=True)):
        what, remedy = "needs a response that is kept", "Leave out 'store' and proxy.store: off"
        raise fields.wrong("background", what, remedy, "unsupported_parameter")


def not_kept(id: str) -> BadRequest:
    text = f"'previous_response_id' names '{id}', which is not kept here. Send the whole input."
    return BadRequest(text, code="previous_response_not_found", param="previous_response_id")


# ---- input items

# Items that only a hosted tool makes; in a replayed history they are passed over.
HOSTED_ITEMS = re.compile(
    rf"({HOSTED})_(call|call_output|output)|mcp_\w+|program\w*|(context_)?compaction"
)


def parse_input(
    fields: Fields, past: Sequence[Any]
) -> tuple[tuple[Message, ...], tuple[str, ...], tuple[Tool, ...]]:
    """The messages, instructions and tools of a Responses body. Items can bring tools too."""
    messages = []
    system = []
    added: list[Tool] = []
    if instructions := fields.text("instructions"):
        system.append(instructions)
    for item in input_items(fields, past):
        if item.value.get("type") == "additional_tools":
            added[:0] = parse_tools(item)  # so that of two with one name the newer holds
        elif is_system(item):
            system += texts_of(item)
        elif message := parse_item(item):
            messages.append(message)
    tools = each_once(fields, (*parse_tools(fields), *added))
    return joined(messages), tuple(system), tools


def input_items(fields: Fields, past: Sequence[Any]) -> list[Fields]:
    # The changes of past items were reported when they were new: each has a list of its own.
    items = [Fields(item, f"past[{i}]") for i, item in enumerate(past)]
    value = fields.value.get("input")
    if value is None:
        fields.missing("input")
    if isinstance(value, str):
        return [*items, Fields({"role": "user", "content": value}, "input")]
    return items + fields.objects("input")


def joined(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The messages, neighbours of one role as one; but a user's messages stay apart."""
    groups = itertools.groupby(
        messages, lambda message: (message.role, message.role == "user" and id(message))
    )
    return tuple(
        Message(role, tuple(part for message in group for part in message.parts))
        for (role, _), group in groups
    )


def parse_item(item: Fields) -> Message | None:
    """The message of one input item; None for an item that only a hosted tool can have made."""
    return ITEM_PARSERS.get(item.text("type") or "message", parse_other_item)(item)


def parse_call_item(item: Fields) -> Message:
    custom = item.value["type"] == "custom_tool_call"
    call = ToolCall(
        item.needed_text("call_id"),
        item.needed_text("name"),
        item.text("input" if custom else "arguments") or "",
        namespace=item.text("namespace") or None,
        custom=custom,
    )
    return Message("assistant", (call,))


def parse_output_item(item: Fields) -> Message:
    output = tuple(parse_content(item, parse_part, "output"))
    return Message("tool", (ToolResult(item.needed_text("call_id"), output),))


def parse_agent_message(item: Fields) -> Message:
    """A message between two of Codex's agents."""
    item.change("type", "emulated", "told as the user's words")
    content = parse_content(item, parse_part)
    author = Text(f"Message of the agent {item.needed_text('author')}:")
    return Message("user", (author, *content))


def parse_reasoning_item(item: Fields) -> Message:
    text = "".join(part.text("text") or "" for part in item.objects("summary"))
    return Message("assistant", (Thinking(text, item.text("encrypted_content")),))


def parse_image_item(item: Fields) -> Message | None:
    image = item.text("result")
    if not image:
        return parse_other_item(item)
    media = Media(image_type(image), checked_base64(item, "result", image))
    return Message("assistant", (media,))


def parse_other_item(item: Fields) -> Message | None:
    """Passes over what a hosted tool made. Raises BadRequest for any other item."""
    kind = str(item.text("type"))
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


ITEM_PARSERS: Mapping[str, Callable[[Fields], Message | None]] = {
    "message": parse_message,
    "function_call": parse_call_item,
    "custom_tool_call": parse_call_item,
    "function_call_output": parse_output_item,
    "custom_tool_call_output": parse_output_item,
    "agent_message": parse_agent_message,
    "reasoning": parse_reasoning_item,
    "image_generation_call": parse_image_item,
}


# ---- output items


def render_item(part: Part, id: str, status: str) -> JsonObject | None:
    """A part as an output item; None for a part that no output item can hold."""
    item: JsonObject
    match part:
        case Text():
            item = {"id": f"msg_{id}", "type": "message", "role": "assistant", "status": status}
            return item | {"content": [text_part(part)]}
        case Thinking(text, signature):
            item = {"id": f"rs_{id}", "type": "reasoning"}
            item |= {"summary": [summary_part(text)], "status": status}
            if signature:
                item["encrypted_content"] = signature
            return item
        case ToolCall():
            return render_call_item(part, id, status)
        case Media(mime, data) if mime.startswith("image/"):
            item = {"id": f"ig_{id}", "type": "image_generation_call"}
            return item | {"status": status, "result": data}
        case Media() | ToolResult():
            return None
        case _:
            assert_never(part)


def text_part(text: Text) -> JsonObject:
    annotations = [
        {"type": "url_citation", **render_citation(citation)} for citation in text.citations
    ]
    part = {"type": "output_text", "text": text.text}
    return part | {"annotations": annotations, "logprobs": []}


def summary_part(text: str) -> JsonObject:
    return {"type": "summary_text", "text": text}


def render_call_item(call: ToolCall, id: str, status: str) -> JsonObject:
    prefix, kind, member = "fc", "function_call", "arguments"
    if call.custom:
        prefix, kind, member = "ctc", "custom_tool_call", "input"
    item = {"id": f"{prefix}_{id}", "type": kind, "call_id": call.id, "name": call.name}
    if call.namespace:
        item["namespace"] = call.namespace
    return item | {member: call.arguments, "status": status}


@value
class Filling:
    """The content of an output item as a stream shows it, after the event that opens the item."""

    empty: JsonObject  # the members that are filled, as they stand when the item opens
    deltas: str = ""  # the name of the deltas' events
    place: JsonMap = field(default_factory=dict)  # what each delta repeats
    text: str = ""  # what the deltas add up to
    before: Sequence[tuple[str, JsonMap]] = ()  # the events before the deltas
    after: Sequence[tuple[str, JsonMap]] = ()  # and behind them


def filling_of(item: JsonMap) -> Filling:
    """The filling of an item that is complete; an image is not sent in pieces."""
    match item:
        case {"type": "message", "content": [part]}:
            return text_filling(part)
        case {"type": "reasoning", "summary": [part]}:
            return summary_filling(part)
        case {"type": "reasoning"}:
            return Filling({"summary": []})
        case {"type": "function_call"}:
            return call_filling(item, "function_call_arguments", ("name", "arguments"))
        case {"type": "custom_tool_call"}:
            return call_filling(item, "custom_tool_call_input", ("input",))
        case {"type": "web_search_call"}:
            steps = ("in_progress", "searching", "completed")
            return Filling({}, after=[(f"web_search_call.{step}", {}) for step in steps])
        case _:
            return Filling({"result": None})


def text_filling(part: JsonMap) -> Filling:
    place, text = {"content_index": 0}, part["text"]
    annotations = [
        ("output_text.annotation.added", {**place, "annotation_index": i, "annotation": annotation})
        for i, annotation in enumerate(part["annotations"])
    ]
    done = ("output_text.done", {**place, "text": text, "logprobs": []})
    return Filling(
        {"content": []},
        "output_text",
        {**place, "logprobs": []},
        text,
        before=[("content_part.added", {**place, "part": text_part(Text(""))})],
        after=[*annotations, done, ("content_part.done", {**place, "part": part})],
    )


def summary_filling(part: JsonMap) -> Filling:
    place, text = {"summary_index": 0}, part["text"]
    done = ("reasoning_summary_text.done", {**place, "text": text})
    return Filling(
        {"summary": []},
        "reasoning_summary_text",
        place,
        text,
        before=[("reasoning_summary_part.added", {**place, "part": summary_part("")})],
        after=[done, ("reasoning_summary_part.done", {**place, "part": part})],
    )


def call_filling(item: JsonMap, deltas: str, repeated: Sequence[str]) -> Filling:
    """The filling of a call, whose text is the last of the members that are repeated at its end."""
    member, done = repeated[-1], {key: item[key] for key in repeated}
    return Filling({member: ""}, deltas, text=item[member], after=[(f"{deltas}.done", done)])


# ---- the Response object

UNFINISHED = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
# What a Response object repeats of the body, and what stands there where the body has nothing.
RESPONSE_ECHOES: JsonMap = {
    "max_output_tokens": None,
    "max_tool_calls": None,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "instructions": None,
    "tool_choice": "auto",
    "truncation": "disabled",
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_logprobs": 0,
    "parallel_tool_calls": True,
    "store": True,
    "metadata": {},
}
# The reasons why a response is incomplete; with any other finish reason it is completed.
INCOMPLETE: Mapping[FinishReason, str] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}


def new_response(head: Head, body: JsonMap) -> JsonObject:
    """The Response object of an answer that has not begun: it has every key, and echoes the body.

    Source: https://platform.openai.com/docs/api-reference/responses/object
    """
    reasoning = body.get("reasoning") or {}
    return {
        "id": f"resp_{head.id}",
        "object": "response",
        "status": "in_progress",
        "service_tier": "default",
        **UNFINISHED,
        "created_at": head.created,
        "background": bool(body.get("background")),
        "model": head.model,
        "output": [],
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "text": render_text_settings(body.get("text") or {}),
        "tools": [render_tool(tool) for tool in body.get("tools") or ()],
        **RESPONSE_ECHOES,
        **{key: body[key] for key in RESPONSE_ECHOES if body.get(key) is not None},
    }


def render_text_settings(text: JsonMap) -> JsonObject:
    format = text.get("format") or {"type": "text"}
    if format.get("type") == "json_schema":
        format = {"description": None, **format, "strict": bool(format.get("strict"))}
    return {"format": format, "verbosity": text.get("verbosity") or "medium"}


def render_tool(tool: JsonMap) -> JsonObject:
    """A tool as the Response object repeats it: a function with all its keys, others unchanged."""
    if tool.get("type", "function") != "function":
        return dict(tool)
    inner = tool.get("function") or tool
    known = {key: inner.get(key) for key in ("name", "description", "parameters")}
    return {"type": "function", **known, "strict": bool(inner.get("strict"))}


def render_response_usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def interrupted(response: JsonMap) -> JsonObject:
    """The object of a response that was not over when its gateway stopped."""
    text = "The gateway stopped before this response was over. Ask again."
    return {**response, "status": "failed", "error": {"code": "server_error", "message": text}}


class ResponseRenderer(Renderer):
    """Events to the events of a Responses stream, or to the Response object of a whole answer.

    Source: https://platform.openai.com/docs/api-reference/responses-streaming
    """

    def __init__(self, head: Head, body: JsonMap) -> None:
        self._head = head
        self.response = new_response(head, body)  # as far as the answer has come
        self.signed: list[ToolCall | Text] = []
        self._sequence = 0
        self._item_id = ""  # of the item that is open
        self._before_delta = ""
        self._held: Text | Thinking | None = None  # ended, but not yet shown as such
        self._incomplete: str | None = None
        self._searches: tuple[str, ...] = ()
        self._silent = False  # only the object is wanted

    def whole(self, events: Sequence[Event]) -> JsonObject:
        """The Response object, with `choices` for scripts that read the text where chat has it."""
        choices = ChatRenderer(self._head, {}).whole(events)["choices"][:1]
        self._silent = True
        self.frames(event for event in events if not isinstance(event, Delta))
        return self.response | {"choices": choices}

    def render(self, event: Event) -> str:
        if getattr(event, "choice", 0):
            return ""  # a response has no second choice
        match event:
            case TextDelta(text=text) | ThinkingDelta(text=text) | ArgumentsDelta(text=text):
                return self._delta(text)
            case Started():
                return self.begin("in_progress")
            case PartStart(part=part):
                return self._start_part(part)
            case PartEnd(part=part):
                return self._end_part(part)
            case Annotated(searches=searches):
                self._searches = searches  # the citations stand in the parts
                return ""
            case Finished(reason=reason):
                return self._finish(reason)
            case Ended(usage):
                return self._complete(usage)
            case Failed(error):
                return self._release("incomplete") + self._fail(error)
            case _:
                assert_never(event)

    def begin(self, status: str) -> str:
        """The stream's beginning: first as `queued` if the response waits, then `in_progress`."""
        self.response["status"] = status
        first = "" if self._sequence else self._frame("response.created", response=self.response)
        return first + self._frame(f"response.{status}", response=self.response)

    def replay(self, response: JsonObject, at: int) -> str:
        """The stream of a response that is over; its end has at least the sequence number `at`.

        So a client that has read further in the stream than is kept of it is told the end.
        """
        self.response = {**response, **UNFINISHED, "output": []}
        frames = self.begin("in_progress")
        for item in response["output"]:
            text = filling_of(item).text
            frames += self._open_item(item) + (text and self._delta(text)) + self._done(item)
        self.response, self._sequence = response, max(self._sequence, at)
        return frames + self._end()

    # ---- the response

    def _finish(self, reason: FinishReason) -> str:
        self._incomplete = INCOMPLETE.get(reason)
        frames = self._release("incomplete" if self._incomplete else "completed")
        if self._searches:
            frames += self._search()
        return frames

    def _complete(self, usage: Usage) -> str:
        if self._incomplete:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": self._incomplete}
        else:
            self.response["status"] = "completed"
            self.response["completed_at"] = int(self._head.now())
        self.response["usage"] = render_response_usage(usage)
        return self._end()

    def _fail(self, error: GatewayError) -> str:
        if isinstance(error, Cancelled):
            self.response["status"] = "cancelled"
            return self._end()
        failure = {"code": error.failed_code, "message": error.message}
        self.response |= {"status": "failed", "error": failure}
        nested = openai_error(error)
        flat = {key: nested["error"][key] for key in ("code", "message", "param")}
        return self._frame("error", **flat, **nested) + self._end()

    def _end(self) -> str:
        """The one event that ends a stream; a cancelled response has none of its own."""
        name = self.response["status"].replace("cancelled", "incomplete")
        return self._frame(f"response.{name}", response=self.response) + DONE

    # ---- frames

    def _frame(self, name: str, /, **members: Any) -> str:
        if self._silent:
            return ""
        event = {"type": name, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return f"event: {name}\ndata: {dumps(event)}\n\n"

    def _item_frames(self, events: Iterable[tuple[str, JsonMap]]) -> str:
        place = self._place()
        frames = (self._frame(f"response.{name}", **place, **members) for name, members in events)
        return "".join(frames)

    def _place(self) -> JsonObject:
        return {"item_id": self._item_id, "output_index": len(self.response["output"])}

    def _delta(self, text: str) -> str:
        self._sequence += 1
        return f'{self._before_delta}{self._sequence - 1},"delta":{encode_basestring(text)}}}\n\n'

    # ---- items

    def _next_id(self) -> str:
        return f"{self._head.id}{len(self.response['output']):04x}"

    def _open_item(self, item: JsonObject | None) -> str:
        """The frames that open an item. What its deltas have in common is dumped here, once."""
        if item is None:
            return ""
        self._item_id, filling = item["id"], filling_of(item)
        name = f"response.{filling.deltas}.delta"
        before = dumps({"type": name, **self._place(), **filling.place})[:-1]
        self._before_delta = f'event: {name}\ndata: {before},"sequence_number":'
        frames = self._output_frame("added", item | {"status": "in_progress"} | filling.empty)
        return frames + self._item_frames(filling.before)

    def _done(self, item: JsonObject) -> str:
        frames = self._item_frames(filling_of(item).after) + self._output_frame("done", item)
        self.response["output"].append(item)
        return frames

    def _output_frame(self, name: str, item: JsonMap) -> str:
        index = len(self.response["output"])
        return self._frame(f"response.output_item.{name}", output_index=index, item=item)

    def _start_part(self, part: Part) -> str:
        frames = self._release("completed", part)
        return frames + self._open_item(render_item(part, self._next_id(), "in_progress"))

    def _end_part(self, part: Part) -> str:
        if isinstance(part, Text | Thinking):
            self._held = part  # its status and its signature depend on what follows
            return ""
        return self._finish_part(part, "completed")

    def _finish_part(self, part: Part, status: str) -> str:
        if isinstance(part, ToolCall | Text) and part.signature:
            self.signed.append(part)
        item = render_item(part, self._next_id(), status)
        return self._done(item) if item else ""

    def _release(self, status: str, then: Part | None = None) -> str:
        """The end of the part that was held back, now that its status is known.

        The client gets the signature of a call in the reasoning before it, and that of a text in
        reasoning behind it.
        """
        part, self._held = self._held, None
        sealed = self._seal(then, ToolCall)
        if isinstance(part, Thinking) and sealed:
            part, sealed = replace(part, signature=sealed), ""
        frames = self._finish_part(part, status) if part else ""
        return frames + self._carry(self._seal(part, Text)) + self._carry(sealed)

    def _seal(self, part: Part | None, kind: type[ToolCall | Text]) -> str:
        """The part's signature, sealed for the client; "" if it has none, or none is wanted."""
        if isinstance(part, kind) and part.signature and self._head.seal:
            return self._head.seal(part)
        return ""

    def _carry(self, sealed: str) -> str:
        """A reasoning item without words that carries a sealed signature."""
        if not sealed:
            return ""
        item = {"id": f"rs_{self._next_id()}", "type": "reasoning", "summary": []}
        return self._add(item | {"status": "completed", "encrypted_content": sealed})

    def _search(self) -> str:
        """The web search behind an answer; Gemini reports it only at the answer's end."""
        action = {"type": "search", "query": self._searches[0], "queries": list(self._searches)}
        item = {"id": f"ws_{self._next_id()}", "type": "web_search_call", "status": "completed"}
        return self._add(item | {"action": action})

    def _add(self, item: JsonObject) -> str:
        return self._open_item(item) + self._done(item)


def render_token_count(tokens: int) -> JsonObject:
    return {"object": "response.input_tokens", "input_tokens": tokens}


# ---- input items, as they are kept and listed


def render_input(items: Any, id: str) -> list[JsonObject]:
    """The items of an input, each with a type, an id and a status, and its content as parts."""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    ids = set()
    rendered = [render_input_item(item, f"{id}i{i:04x}") for i, item in enumerate(items)]
    for i, item in enumerate(rendered):
        if item["id"] in ids:  # with two of one id, clients would ask for one page for ever
            item["id"] = f"item_{id}i{i:04x}"
        ids.add(item["id"])
    return rendered


def render_input_item(item: JsonMap, id: str) -> JsonObject:
    kind = item.get("type") or "message"
    rendered = {"status": "completed", **without_nulls(item), "type": kind}
    if not (isinstance(item.get("id"), str) and item["id"]):
        prefix = "msg" if kind == "message" else "item"
        rendered["id"] = f"{prefix}_{id}"
    if kind == "message":
        name = "output_text" if item.get("role") == "assistant" else "input_text"
        rendered["content"] = render_input_parts(item.get("content") or [], name)
    elif isinstance(item.get("output"), list):
        rendered["output"] = render_input_parts(item["output"], "input_text")
    return rendered


def render_input_parts(content: Any, name: str) -> list[JsonObject]:
    if isinstance(content, str):
        content = [{"type": name, "text": content}]
    return [render_input_part(part, name) for part in content]


def render_input_part(part: JsonMap, name: str) -> JsonObject:
    """A part in Responses' form, from that or from chat's."""
    match part:
        case {"type": "text" | "input_text" | "output_text"}:
            lists: JsonObject = {"annotations": [], "logprobs": []}
            first = lists if name == "output_text" else {}
            return first | without_nulls(part) | {"type": name}
        case {"type": "image_url", "image_url": {"url": url} as image}:
            detail = image.get("detail") or "auto"
            return {"type": "input_image", "detail": detail, "image_url": url}
        case {"type": "input_image" | "image_url"}:
            return {**part, "type": "input_image", "detail": part.get("detail") or "auto"}
        case {"type": "file", "file": inner}:
            return {"type": "input_file", **inner}
        case _:
            return dict(part)


def without_nulls(members: JsonMap) -> JsonObject:
    return {key: value for key, value in members.items() if value is not None}


RESPONSES = Door(
    "/v1/responses",
    RESPONSE_FIELDS,
    parse_response,
    ResponseRenderer,
    counts=render_token_count,
    keeps=True,
    long_field="input",
)


# ==============================================================================
# 9. Embeddings
# ==============================================================================

EMBEDDINGS_MAX = 2048  # OpenAI's limit
EMBEDDINGS_REMEDY = (
    "Send a text or texts, not tokens; "
    "for LangChain's Python class set check_embedding_ctx_length=False"
)


def parse_embeddings(body: Any) -> EmbeddingRequest:
    """An embeddings body. Raises BadRequest."""
    fields = Fields(body)
    if fields.value.get("input") is None:
        fields.missing("input")
    fields.text("user")
    texts = fields.texts("input", EMBEDDINGS_REMEDY)
    if not texts or not all(texts):
        raise fields.wrong("input", "holds nothing", EMBEDDINGS_REMEDY, "invalid_type")
    if len(texts) > EMBEDDINGS_MAX:
        raise fields.wrong(
            "input", f"holds {len(texts)} texts", f"Send at most {EMBEDDINGS_MAX} at once"
        )
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise fields.wrong("encoding_format", f"is '{encoding}'", "Send float or base64")
    dimensions = fields.count("dimensions")
    return EmbeddingRequest(fields.model(), tuple(texts), dimensions, encoding == "base64")


def render_embeddings(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], tokens: int
) -> JsonObject:
    """The list of embeddings.

    Base64 is of little-endian float32; OpenAI's SDKs ask for it by default.
    """
    embeddings: Sequence[Any] = vectors
    if request.base64:
        packed = (struct.pack(f"<{len(vector)}f", *vector) for vector in vectors)
        embeddings = [base64.b64encode(floats).decode() for floats in packed]
    data = [
        {"object": "embedding", "index": i, "embedding": embedding}
        for i, embedding in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


# ---- the table of doors


def door_of(body: Any) -> Door:
    """The door that a body is meant for, by the field that holds the conversation."""
    if isinstance(body, dict):
        for door in DOORS:
            if body.get(door.long_field) is not None:
                return door
    return DOORS[0]


def explain_fields(body: JsonMap, table: Fates, changes: Iterable[Change]) -> dict[str, str]:
    """The fate of each field of a body, and of each changed place inside one, by JSON pointer."""
    explained = {}
    for key, value in body.items():
        fate, reason, _ = table.get(key, UNKNOWN)
        if value is None:
            fate, reason = "ignored", "null is as if it were not there"
        explained[f"/{escaped(key)}"] = f"{fate}: {reason}"
    changed: dict[str, str] = {}
    for change in changes:
        text = f"{change.kind}: {change.reason}"
        if change.pointer in changed:
            text = f"{changed[change.pointer]}; {change.reason}"
        changed[change.pointer] = text
    return explained | changed


# In this order, because a Responses body too may have a `prompt`.
CURSOR = partial(parse_chat, without_messages=parse_response)
DOORS = (replace(CHAT, parse=CURSOR), RESPONSES, COMPLETIONS)


# ==============================================================================
# 10. Models
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
# Sources: https://ai.google.dev/gemini-api/docs/thinking, .../models, .../gemini-3; servers'
# refusals
TRAITS: Sequence[tuple[str, tuple[int, int], JsonMap]] = (
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
        {
            "thinking": "level",
            "thinks": True,
            "can_stop_thinking": False,
            "levels": ("MINIMAL", "LOW", "MEDIUM", "HIGH"),
            "budget": (128, 32768),
            "signatures": True,
            "json_with_tools": True,
            "files_in_results": True,
        },
    ),
    (r"-pro", (3, 0), {"levels": ("LOW", "HIGH")}),
    (r"-pro(-preview-customtools)?", (3, 1), {"levels": ("LOW", "MEDIUM", "HIGH")}),
    (r"-pro-image", (3, 0), {"levels": ("LOW", "HIGH")}),
    (r"-flash(-lite)?-image", (3, 1), {"levels": ("MINIMAL", "HIGH")}),
    (r".*", (3, 5), {"call_ids": True}),
    # Source: https://github.com/LibreChat-AI/agents/pull/323
    (r"-flash-lite", (3, 5), {"sampling": False, "prefill": False}),
    (r".*", (3, 6), {"sampling": False, "prefill": False}),
    (r".*", (3, 7), {"levels": ("LOW", "MEDIUM", "HIGH")}),
    (r".*-nano-banana(-.+)?", (3, 7), {"levels": ("MINIMAL", "MEDIUM", "HIGH")}),
)


@value
class Mapped:
    """The upstream's name for a model, and the rule that gave it."""

    model: str
    rule: str
    wished: str | None = None  # the rule's own name, where the upstream lists another one for it


def map_model(name: str, config: Config, listed: Sequence[str] | None) -> Mapped:
    """User exact > user wildcard > built-in > listed > gemini-* as it is > models.default.

    `listed` is None when unknown. Raises ModelNotFound with near names.
    """
    bare = re.sub(r"^(models|openai|google)/", "", name)
    for title, table in (("models.map", config.aliases), ("built-in", BUILTIN_ALIASES)):
        if pattern := look_up(bare, table):
            return find_listed(table[pattern], f"{title} '{pattern}'", listed)
    if bare in (listed or STATIC_MODELS):
        return Mapped(bare, "listed by the upstream")
    if re.fullmatch(r"gemini-[\w.-]+", bare, re.ASCII):
        return find_listed(bare, "a gemini name as it is", listed)
    if config.default_model:
        return find_listed(config.default_model, "models.default", listed)
    known = [*config.aliases, *(listed or STATIC_MODELS), *BUILTIN_ALIASES]
    near = difflib.get_close_matches(bare, known, 3, 0.4)
    hint = f" Near names: {', '.join(near)}." if near else ""
    raise ModelNotFound(
        f"The model '{name}' is not known.{hint}"
        " Use one of GET /v1/models, or map it in models.map.",
        param="model",
    )


def look_up(name: str, table: Iterable[str]) -> str | None:
    """The table's key for a name: itself, else the wildcard that says most of it.

    That is the one with most literal characters, then the one with the longest start.
    """
    if name in table:
        return name
    hits = [pattern for pattern in table if "*" in pattern and wildcard(pattern).fullmatch(name)]
    return max(hits, key=lambda p: (len(p.replace("*", "")), len(p.split("*")[0])), default=None)


@lru_cache(1024)
def wildcard(pattern: str) -> re.Pattern[str]:
    """The expression of a pattern with stars.

    It never tries each way to spread a long name over many stars.
    """
    first, *middle, last = map(re.escape, pattern.split("*"))
    return re.compile(first + "".join(f"(?>.*?{piece})" for piece in middle) + f".*{last}")


VERSION = re.compile(r"gemini-(\d{1,3})(?:\.(\d{1,3}))?")
SUFFIX = re.compile(r"preview|latest|exp|\d{2,4}")


def find_listed(model: str, rule: str, listed: Sequence[str] | None) -> Mapped:
    """A gemini name as the upstream lists it.

    That is itself, the same but for its suffix (-preview, a date, -latest), or its tier's newest.
    """
    if listed is None or model in listed or not model.startswith("gemini-"):
        return Mapped(model, rule)
    bare, tier = without_suffix(model), tier_of(model)
    candidates = [name for name in listed if without_suffix(name) == bare]
    candidates = candidates or [name for name in listed if tier_of(name) == tier]
    if not candidates:
        return Mapped(model, rule)
    newest = max(
        candidates, key=lambda name: (version_of(name), without_suffix(name) == name, name)
    )
    return Mapped(newest, rule, wished=model)


def without_suffix(model: str) -> str:
    """A name without -preview, -latest, -exp and a date at its end."""
    words = model.split("-")
    while len(words) > 1 and SUFFIX.fullmatch(words[-1]):
        words.pop()
    return "-".join(words)


def tier_of(model: str) -> str:
    """A name without version and suffix, with a dash before it: -pro, -flash, -flash-lite, ..."""
    return VERSION.sub("", without_suffix(model))


def version_of(model: str) -> tuple[int, int]:
    """The version in a name; one without it is as new as can be."""
    match = VERSION.search(model)
    return (int(match[1]), int(match[2] or 0)) if match else (4, 0)


def traits_of(model: str, overrides: Mapping[str, JsonMap]) -> Traits:
    """Traits by tier and parsed version, a name without one counting as the newest.

    `overrides` (models.traits) win.
    """
    version, tier = (0, 0), model
    if model.startswith("gemini-"):
        version, tier = version_of(model), tier_of(model)
    values: JsonObject = {}
    for pattern, least, row in TRAITS:
        if version >= least and re.fullmatch(pattern, tier):
            values |= row
    if pattern := look_up(model, overrides) or "":
        values |= overrides[pattern]
    return Traits(**values)


# ==============================================================================
# 11. Schemas
# ==============================================================================

# A function whose schema has none of these words takes no arguments.
Schema = JsonMap
SCHEMA_CONTENT = (
    *("properties", "$ref", "anyOf", "oneOf", "allOf"),
    *("patternProperties", "additionalProperties"),
)
# Words whose values are no schemas, and those whose values are schemas by name.
SCHEMA_DATA = {"const", "default", "enum", "example", "examples", "required"}
SCHEMA_DEFINITIONS = {"$defs", "definitions"}
SCHEMA_MAPS = {"properties", "patternProperties", "dependentSchemas"} | SCHEMA_DEFINITIONS
# Deeper parts are left as they are, for a walk must not exhaust the stack.
LONE_REFS_DEPTH_MAX = 128


def lone_refs(schema: Any, depth: int = 0) -> Any:
    """A JSON Schema with each `$ref` that has company moved into an anyOf of its own.

    Google takes only words with a `$` beside a `$ref`.
    Source: https://ai.google.dev/api/generate-content#GenerationConfig,
    https://github.com/google-gemini/gemini-cli/issues/4758
    """
    if depth > LONE_REFS_DEPTH_MAX:
        return schema
    if isinstance(schema, list):
        return [lone_refs(item, depth + 1) for item in schema]
    # A walk of all tools' schemas would double the time of a request.
    if not isinstance(schema, dict) or not (depth or schema.keys() & SCHEMA_DEFINITIONS):
        return schema
    moved = schema.copy()
    for word, value in schema.items():
        if word in SCHEMA_MAPS and isinstance(value, dict):
            moved[word] = {name: lone_refs(member, depth + 2) for name, member in value.items()}
        elif word not in SCHEMA_DATA:
            moved[word] = lone_refs(value, depth + 1)
    if "$ref" in moved and "anyOf" not in moved and any(word[:1] != "$" for word in moved):
        moved["anyOf"] = [{"$ref": moved.pop("$ref")}]
    return moved


JSON_TYPES = dict(
    zip(
        (str, float, int, bool, list, dict, type(None)),
        ("string", "number", "integer", "boolean", "array", "object", "null"),
        strict=True,
    )
)
IMPLIED_TYPES = {"properties": "object", "items": "array", "prefixItems": "array"}
# Google takes these as JSON Schema has them. It has limits of sizes too, but they are what many
# a schema is refused for. Source: https://github.com/googleapis/python-genai/issues/2170
SCHEMA_WORDS = {"title": str, "description": str, "nullable": bool}
# Words that are translated, or that say nothing of a value.
SCHEMA_HANDLED = {
    *("type", "properties", "required", "items", "default"),
    *("$schema", "$id", "$comment", *SCHEMA_DEFINITIONS),
}
NULL = {"type": "NULL"}
# OpenAI takes ten levels of objects, each of which may be null or stand in a list.
SCHEMA_DEPTH_MAX = 32
# References that are written out again and again would make a body of any size.
SCHEMA_NODES_MAX = 2000
Steps = tuple[str, ...]


@dataclass
class SchemaReduction:
    """Writes a JSON Schema in Google's own form; `losses` are the words that are lost by it.

    A part that has no such form is left out: an object without properties (as a map is), and a
    reference that leads nowhere or back to where it stands. Other references are written out.
    Anything is taken, also what is no schema. Source: https://ai.google.dev/api/caching#Schema
    """

    root: Schema
    losses: set[str] = field(default_factory=set)
    nodes_left: int = SCHEMA_NODES_MAX

    def reduce(self, schema: Any, steps: Steps = ("#",)) -> JsonObject | None:
        """The schema in Google's form, None where it has none."""
        flat, steps = self.flatten(schema, steps)
        if flat is None:
            return None
        types = types_of(flat)
        options = objects_in(flat.pop("anyOf", None)) or objects_in(flat.pop("oneOf", None))
        if len(types) > 1:
            options = options or [{"type": kind} for kind in types]
        if options:
            return one_of(self.reduce({"allOf": [option, flat]}, steps) for option in options)
        if not types:
            self.losses.add("type")
        return self.reduce_typed(flat, [*types, "string"][0], steps)

    def reduce_typed(self, flat: JsonObject, kind: str, steps: Steps) -> JsonObject | None:
        if kind == "null":
            return NULL
        reduced = self.reduce_words(flat, kind)
        if kind == "array":
            items = flat.get("items")
            options = objects_in(flat.get("prefixItems")) + (objects_in(items) or [items])
            item = self.reduce({"anyOf": options}, steps)
            return item and reduced | {"items": item}
        if kind == "object":
            members = self.reduce_members(flat, steps)
            return members and reduced | members
        return reduced

    def flatten(self, schema: Any, steps: Steps) -> tuple[JsonObject | None, Steps]:
        """A schema with what it refers to and its allOf laid under it; None where it is endless.

        `steps` are the references that lead there, and an empty one for each level.
        """
        flat: JsonObject = {}
        layers, reached = objects_in([schema]), [""]
        for layer in map(dict, layers):
            self.nodes_left -= 1
            if self.nodes_left < 0 or len(steps) > SCHEMA_DEPTH_MAX:
                self.losses.add("depth")
                return None, steps
            ref = str(layer.pop("$ref", ""))
            layers += objects_in(layer.pop("allOf", None))
            lay_under(flat, layer)
            if ref in reached:
                continue
            target = find_ref(self.root, ref)
            if target is None or ref in steps:
                self.losses.add("$ref")
                return None, steps
            reached.append(ref)
            layers.append(target)
        return flat, (*steps, *reached)

    def reduce_words(self, flat: JsonObject, kind: str) -> JsonObject:
        """The type and the words that Google has too; of enums it takes those of texts."""
        words: JsonObject = {"type": kind.upper()}
        for word, shape in SCHEMA_WORDS.items():
            if isinstance(flat.get(word), shape):
                words[word] = flat[word]
        texts = [value for value in flat.get("enum", ()) if isinstance(value, str)]
        if kind == "string" and texts and all(texts):
            words["enum"] = list(dict.fromkeys(texts))
        self.losses |= flat.keys() - words.keys() - SCHEMA_HANDLED
        return words

    def reduce_members(self, flat: JsonObject, steps: Steps) -> JsonObject | None:
        """The properties of an object, and which of them are required."""
        properties: JsonObject = {}
        for name, schema in flat.get("properties", {}).items():
            if member := self.reduce(schema, steps):
                properties[name] = member
        if not properties:
            self.losses.add("object")
            return None
        wanted = set(map(str, flat.get("required", ())))
        if wanted - properties.keys():
            self.losses.add("required")
        members: JsonObject = {"properties": properties}
        if required := [name for name in properties if name in wanted]:
            members["required"] = required
        return members


def find_ref(root: Schema, ref: str) -> Schema | None:
    """The schema that a reference inside of `root` leads to."""
    found = root
    try:
        for step in ref.removeprefix("#/").split("/"):
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found[int(name) if isinstance(found, list) else name]
    except (LookupError, TypeError, ValueError):
        return None
    return found if isinstance(found, Mapping) else None


def lay_under(flat: JsonObject, layer: Schema) -> None:
    """Adds to a schema the words that it inherits; its own words win."""
    for word, value in layer.items():
        if word == "const" or (word == "enum" and not isinstance(value, list)):
            flat.setdefault("enum", [value])
        elif word == "required" and isinstance(value, list):
            flat.setdefault(word, []).extend(value)
        elif word == "properties" and isinstance(value, dict):
            members = flat.setdefault(word, {})
            for name, member in value.items():
                members.setdefault(name, member)
        elif word not in ("properties", "required"):
            flat.setdefault(word, value)


def types_of(flat: Schema) -> list[str]:
    """The types that a schema names, or else those that it says something of."""
    named = flat.get("type")
    if not isinstance(named, list):
        named = [named]
    types = [kind for kind in map(str.lower, map(str, named)) if kind in JSON_TYPES.values()]
    types = types or [JSON_TYPES.get(type(value), "string") for value in flat.get("enum", ())]
    types = types or [kind for word, kind in IMPLIED_TYPES.items() if word in flat]
    return list(dict.fromkeys(types))


def one_of(schemas: Iterable[JsonObject | None]) -> JsonObject | None:
    """One schema in Google's form for any of several; null among them is said by `nullable`.

    Vertex refuses a declaration that says anything beside anyOf.
    Source: https://github.com/akitaonrails/ai-memory/issues/735
    """
    options = []
    for schema in filter(None, schemas):
        options += [option for option in schema.get("anyOf", [schema]) if option not in options]
    if len(options) > 1 and NULL in options:
        options = [option | {"nullable": True} for option in options if option != NULL]
    if len(options) > 1:
        return {"anyOf": options}
    return next(iter(options), None)


def join_objects(options: Iterable[JsonObject]) -> JsonObject:
    """One object for a choice among objects, of which no property is required.

    Vertex takes nothing else as a function's parameters.
    Source: https://github.com/BerriAI/litellm/issues/41639
    """
    objects = [option.get("properties", {}) for option in options]
    names = dict.fromkeys(itertools.chain.from_iterable(objects))
    properties = {name: one_of(members.get(name) for members in objects) for name in names}
    return {"type": "OBJECT", "properties": properties}


# ==============================================================================
# 12. To Gemini
# ==============================================================================

# Accepted by Gemini 3 in place of a thought signature that it did not make.
# Source: https://ai.google.dev/gemini-api/docs/thought-signatures
SIGNATURE_SENTINEL = "skip_thought_signature_validator"
# Thoughts alone use up a lower limit: https://github.com/valentinfrlch/ha-llmvision/issues/609
THOUGHTFUL_TOKENS_MIN = 1024
# Source: https://ai.google.dev/gemini-api/docs/openai#thinking
EFFORT_BUDGETS = dict(zip(EFFORTS, (0, 512, 1024, 8192, 24576, 32768, 32768), strict=True))
# Older servers take no longer name; newer ones take 128 characters.
TOOL_NAME_MAX = 64
TOOL_NAME = re.compile(r"[A-Za-z_][\w.:-]*", re.ASCII)
ANSWER_TOOL = "give_final_answer"
# Request's and Gemini's name of a sampling parameter, and the trait of models that take it.
SAMPLING = (
    ("temperature", "temperature", "sampling"),
    ("top_p", "topP", "sampling"),
    ("presence_penalty", "presencePenalty", "penalties"),
    ("frequency_penalty", "frequencyPenalty", "penalties"),
)
CALLING_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
PLACEHOLDER = "…"


@value
class Built:
    """A generateContent body, and how its answer's calls are read back."""

    body: JsonObject
    changes: tuple[Change, ...]  # of what could not be carried into the body as it was
    tools: Mapping[str, Tool]
    """By Gemini's name for them, those whose calls are not simply calls of that name."""


def build_generate_content(
    request: Request, traits: Traits, *, reduce_schemas: bool = False
) -> Built:
    """The body that asks a model with these traits; `reduce_schemas` where it refused JSON Schema.

    Source: https://ai.google.dev/api/generate-content#request-body
    """
    if reduce_schemas:
        traits = replace(traits, json_schema=False)
    changes: list[Change] = []
    tools = ToolBuilder(request, traits, changes)
    config = ConfigBuilder(request, traits, changes).build()
    system = [text for text in request.system if text]
    if request.json_format and tools.tools:
        tools.take_over_json(config, system)
    contents = ContentBuilder(request, traits, changes, tools.name_tool).build()
    body: JsonObject = {"contents": contents}
    if system:
        body["systemInstruction"] = {"parts": [{"text": text} for text in system]}
    if tools.tools or request.search_source:
        body |= tools.build(config)
    if config:
        body["generationConfig"] = config
    renamed = tools.renamed() if tools.tools else {}
    return Built(body, tuple(dict.fromkeys(changes)), renamed)


@dataclass
class Builder:
    """Builds a piece of a body, and adds to `changes` what cannot be carried into it."""

    request: Request
    traits: Traits
    changes: list[Change]

    def change(self, pointer: str, kind: ChangeKind, reason: str) -> None:
        self.changes.append(Change(pointer, kind, reason))

    def reduce_schema(self, schema: JsonMap, source: str) -> JsonObject:
        """A JSON Schema in Google's own form; empty where nothing of it can be said there."""
        reduction = SchemaReduction(schema)
        reduced = reduction.reduce(schema)
        for word in sorted(reduction.losses):
            self.change(source, "dropped", f"Google's Schema has no such '{word}'")
        return reduced or {}


# ---- tools


@dataclass
class ToolBuilder(Builder):
    """Builds the tools, which of them may be called, and the names that Gemini knows them by."""

    names: dict[tuple[str | None, str], str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)  # Gemini's names, for a look-up in no time

    def __post_init__(self) -> None:
        self.tools: list[Tool] = []
        if self.request.tools:
            for tool in self.request.tools:
                self.name_tool(tool.namespace, tool.name, tool.source)
            self.tools = self.choose_tools()

    def name_tool(self, namespace: str | None, name: str, source: str = "") -> str:
        """The tool's own name where Gemini takes it, else a short one that no other tool has."""
        if known := self.names.get((namespace, name)):
            return known
        short = whole = f"{namespace}__{name}" if namespace else name
        if not TOOL_NAME.fullmatch(whole):
            short = re.sub(r"^(?![A-Za-z_])", "_", re.sub(r"[^\w.:-]", "_", whole, flags=re.ASCII))
        if len(short) > TOOL_NAME_MAX or short in self.taken:
            exact = name if namespace is None else f"{namespace}\0{name}"
            digest = hashlib.sha256(encoded(exact)).hexdigest()[:8]
            short = f"{short[: TOOL_NAME_MAX - 9]}_{digest}"
        if short != name and source:
            reason = f"Gemini knows '{whole}' as '{short}'"
            self.change(f"{pointer_of(source)}/name", "renamed", reason)
        self.names[namespace, name] = short
        self.taken.add(short)
        return short

    def renamed(self) -> dict[str, Tool]:
        """The tools of whose calls a reader must know more than their name.

        Without descriptions and schemas, for a stream holds them for long.
        """
        return {
            name: replace(tool, description="", parameters=None)
            for tool in self.tools
            if (name := self.names[tool.namespace, tool.name]) != tool.name
            or tool.namespace
            or tool.custom
            or tool.answers
        }

    def choose_tools(self) -> list[Tool]:
        """The tools to declare: all, or those that an optional choice allows."""
        request, choice = self.request, self.request.tool_choice
        if choice.mode == "none" and request.json_format and not self.traits.json_with_tools:
            return []  # none may be called, and without them the answer can be JSON
        if choice.mode != "auto" or not choice.names:
            return list(request.tools)
        self.change("/tool_choice", "emulated", "only the allowed tools are declared")
        return [tool for tool in request.tools if tool.name in choice.names]

    def take_over_json(self, config: JsonObject, system: list[str]) -> None:
        """Asks for JSON by a tool or an instruction where `config` cannot ask for it beside tools.

        Source: https://ai.google.dev/gemini-api/docs/structured-output (2.x: "Function calling
        with a response mime type: 'application/json' is unsupported"; 3.x refuses it with mode ANY)
        """
        json_format, choice = self.request.json_format, self.request.tool_choice
        assert json_format is not None
        forced = choice.mode == "required"
        if self.traits.json_with_tools and not forced:
            return
        source = json_format.source
        schema = config.pop("responseJsonSchema", None) or config.pop("responseSchema", None)
        del config["responseMimeType"]
        if forced:
            reason = "a call is demanded, so no text can follow the schema"
            self.change(source, "dropped", reason)
        elif schema and schema.get("properties") and choice.mode == "auto":
            self.change(source, "emulated", f"asked for as a call of '{ANSWER_TOOL}'")
            self.add_answer_tool(json_format, source)
        else:
            self.change(source, "emulated", "asked for by an instruction")
            shape = f" {dumps(schema)}" if schema else ""
            system.append(f"Answer with one JSON value alone, without Markdown fences.{shape}")

    def add_answer_tool(self, json_format: JsonFormat, source: str) -> None:
        description = "Give the final answer by calling this, once no other tool is needed."
        self.name_tool("", ANSWER_TOOL)
        tool = Tool(ANSWER_TOOL, description, json_format.schema, "", source=source, answers=True)
        self.tools.append(tool)

    def build(self, config: JsonMap) -> JsonObject:
        """The body's `tools` and `toolConfig`."""
        search = self.request.search_source
        if self.tools:
            if search:
                self.change(search, "dropped", "web search cannot be combined with functions")
            declarations = [self.declare(tool) for tool in self.tools]
            return {
                "tools": [{"functionDeclarations": declarations}],
                "toolConfig": {"functionCallingConfig": self.calling_config()},
            }
        if not search:
            return {}
        if "responseMimeType" in config and not self.traits.json_with_tools:
            reason = "this model cannot search the web where JSON is asked for"
            self.change(search, "dropped", reason)
            return {}
        return {"tools": [{"googleSearch": {}}]}

    def declare(self, tool: Tool) -> JsonObject:
        name = self.names[tool.namespace, tool.name]
        declaration: JsonObject = {"name": name, "description": tool.description or tool.name}
        schema = tool.parameters
        if not schema or not any(schema.get(word) for word in SCHEMA_CONTENT):
            return declaration
        if self.traits.json_schema:
            return declaration | {"parametersJsonSchema": lone_refs(schema)}
        source = tool.source
        if not tool.answers:
            source = f"{pointer_of(tool.source)}/{tool.schema_key}"
        reduced = self.reduce_schema(schema, source)
        if "anyOf" in reduced:
            self.change(source, "dropped", "Vertex takes no 'anyOf' at the root of parameters")
            reduced = join_objects(reduced["anyOf"])
        if reduced.get("properties"):
            declaration["parameters"] = reduced
        return declaration

    def calling_config(self) -> JsonObject:
        choice = self.request.tool_choice
        if self.tools[-1].answers:
            return {"mode": "ANY"}
        config: JsonObject = {"mode": CALLING_MODES[choice.mode]}
        if choice.names and choice.mode == "required":
            config["allowedFunctionNames"] = [
                self.names[tool.namespace, tool.name]
                for tool in self.request.tools
                if tool.name in choice.names
            ]
        return config


# ---- generationConfig


class ConfigBuilder(Builder):
    """Builds the generationConfig."""

    def build(self) -> JsonObject:
        request, thinking = self.request, self.build_thinking()
        config = self.build_sampling()
        if request.seed is not None:
            config["seed"] = request.seed
        if request.stop:
            config["stopSequences"] = list(request.stop)
        if request.modalities or self.traits.answers == ("AUDIO",):
            config["responseModalities"] = self.choose_modalities()
        if request.aspect_ratio or request.image_size:
            config["imageConfig"] = self.build_image_config()
        if request.json_format:
            config |= self.build_json_output(request.json_format)
        if thinking:
            config["thinkingConfig"] = thinking
        if request.max_output_tokens is not None:
            config["maxOutputTokens"] = self.limit_output(request.max_output_tokens, thinking)
        return {key: value for key, value in config.items() if value is not None}

    def build_sampling(self) -> JsonObject:
        config = {}
        for name, word, trait in SAMPLING:
            value = getattr(self.request, name)
            if trait == "penalties":
                value = value or None  # no penalty is taken by all models, if it is not sent
            if value is not None and self.keeps(f"/{name}", getattr(self.traits, trait)):
                config[word] = value
        logprobs, source = self.request.logprobs, self.request.logprobs_source
        if logprobs is not None and self.keeps(source, self.traits.logprobs):
            config |= {"responseLogprobs": True, "logprobs": logprobs or None}
        return config

    def keeps(self, source: str, supported: bool) -> bool:
        if not supported:
            self.change(source, "dropped", "this model does not take it")
        return supported

    def choose_modalities(self) -> list[str] | None:
        """The modalities of the answer, where they are not the model's default."""
        if self.traits.answers == ("AUDIO",):
            return ["AUDIO"]
        if "image" not in self.request.modalities:
            return None
        if "IMAGE" in self.traits.answers:
            return list(self.traits.answers)
        self.change("/modalities", "dropped", "this model makes no images")
        return None

    def build_image_config(self) -> dict[str, str] | None:
        wishes = {"aspectRatio": self.request.aspect_ratio, "imageSize": self.request.image_size}
        config = {key: wish for key, wish in wishes.items() if wish}
        if config and "IMAGE" not in self.traits.answers:
            self.change("/image_config", "dropped", "this model makes no images")
            return None
        return config or None

    def build_json_output(self, json_format: JsonFormat) -> JsonObject:
        config: JsonObject = {"responseMimeType": "application/json"}
        schema = json_format.schema
        if schema and self.traits.json_schema:
            config["responseJsonSchema"] = lone_refs(schema)
        elif schema:
            config["responseSchema"] = self.reduce_schema(schema, json_format.source) or None
        return config

    def limit_output(self, wanted: int, thinking: JsonMap) -> int:
        """The tokens that the client wants to read, and its thoughts, which Gemini counts as well.

        Where nothing is said of thoughts none are added, for the limit bounds the bill too.
        """
        level = thinking.get("thinkingLevel", "none").lower()
        thoughts: int = max(0, thinking.get("thinkingBudget", EFFORT_BUDGETS[level]))
        limit = min(wanted + thoughts, self.traits.output_tokens_max)
        reason = f"raised to {limit}: thoughts count against it"
        if limit < wanted:
            reason = f"the model's limit is {limit}"
        if limit != wanted:
            self.change(self.request.limit_source, "clamped", reason)
        return limit

    def build_thinking(self) -> JsonObject:
        wish, traits = self.choose_wish(), self.traits
        asked = wish.effort is not None or wish.budget is not None
        if traits.thinking == "none":
            if asked:
                self.change(wish.source, "dropped", "this model does not think")
            return {}
        config, thinks = {}, traits.thinks
        if asked:
            build = self.build_level if traits.thinking == "level" else self.build_budget
            config = build(wish)
            thinks = config.get("thinkingBudget") != 0
        if wish.show and thinks:
            config["includeThoughts"] = True
        return config

    def choose_wish(self) -> ThinkingWish:
        """The client's own wish, else little thought before an answer that it wants short."""
        wish, limit, traits = self.request.thinking, self.request.max_output_tokens, self.traits
        if limit is None or limit >= THOUGHTFUL_TOKENS_MIN or not traits.thinks:
            return wish
        if wish.effort is not None or wish.budget is not None:
            return wish
        source = self.request.limit_source
        self.change(source, "clamped", "before so short an answer little is thought")
        # Levels differ from model to model, but all that write texts have the low one.
        effort = "none" if traits.thinking == "budget" else "low"
        return replace(wish, effort=effort, source=source)

    def build_level(self, wish: ThinkingWish) -> JsonObject:
        if wish.effort is None:
            return self.build_budget(wish)  # accepted for compatibility
        wanted = EFFORTS.index(nearest_effort(wish.effort))
        levels = sorted(EFFORTS.index(level.lower()) for level in self.traits.levels)
        level = EFFORTS[next((level for level in levels if level >= wanted), levels[-1])]
        if level != wish.effort.lower():
            self.change(wish.source, "clamped", f"'{wish.effort}' becomes '{level}'")
        return {"thinkingLevel": level.upper()}

    def build_budget(self, wish: ThinkingWish) -> JsonObject:
        wanted, effort = wish.budget, wish.effort
        if wanted is None:
            wanted = EFFORT_BUDGETS[nearest_effort(effort or "")]
        low, high = self.traits.budget
        budget = min(max(wanted, low), high)
        if wanted == -1 or (wanted == 0 and self.traits.can_stop_thinking):
            budget = wanted
        if budget != wanted or (effort is not None and effort.lower() not in EFFORTS):
            self.change(wish.source, "clamped", f"a budget of {budget} tokens")
        return {"thinkingBudget": budget}


def nearest_effort(word: str) -> str:
    if not word:
        return "medium"
    return difflib.get_close_matches(word[:20].lower(), EFFORTS, 1, 0.0)[0]


# ---- contents


@dataclass
class ContentBuilder(Builder):
    """Builds the contents: one for each run of messages of one role.

    Each content of calls is answered by exactly one of results, in the order of the calls,
    whatever order the client sent them in.

    Source: https://ai.google.dev/gemini-api/docs/function-calling (seen as 400s otherwise)
    """

    name_tool: Callable[[str | None, str], str]

    def __post_init__(self) -> None:
        self.results = match_results(self.request.messages)
        self.matched = {id(result) for result in self.results.values()}

    def emulate(self, reason: str) -> None:
        self.change(self.request.messages_source, "emulated", reason)

    def build(self) -> list[JsonObject]:
        contents: list[JsonObject] = []
        for message in self.request.messages:
            parts = self.build_parts(message.parts)
            if message.role == "assistant":
                if self.traits.signatures:
                    self.sign_parts(parts)
                add_content(contents, "model", parts)
            else:
                add_content(contents, "user", parts)
            if calls := [part for part in message.parts if isinstance(part, ToolCall)]:
                contents += self.build_results(calls)
        self.add_last_content(contents)
        return contents

    def add_last_content(self, contents: list[JsonObject]) -> None:
        """Lets the user have the last word where the model demands it, and never sends none."""
        if not contents:
            contents.append(build_content("user", PLACEHOLDER))
        if contents[-1]["role"] == "model" and not self.traits.prefill:
            self.emulate("this model goes on with an answer only when asked to")
            contents.append(build_content("user", "Continue exactly where you stopped."))

    def build_parts(self, parts: Sequence[Part]) -> list[JsonObject]:
        built = []
        for part in parts:
            if part.__class__ is Text and part.signature is None:  # nine of ten
                if part.text:
                    built.append({"text": part.text})
            else:
                built += self.build_part(part)
        return built

    def sign_parts(self, parts: list[JsonObject]) -> None:
        """Adds missing signatures: to the first call, or to all parts of a model of images.

        Source: https://ai.google.dev/gemini-api/docs/gemini-3#thought_signatures
        """
        if "IMAGE" not in self.traits.answers:
            parts = [part for part in parts if "functionCall" in part][:1]
        for part in parts:
            part.setdefault("thoughtSignature", SIGNATURE_SENTINEL)

    def build_part(self, part: Part) -> list[JsonObject]:
        match part:
            case Text(text=text, signature=signature):
                return build_signed(text, signature) if signature else []
            case Media():
                return [build_media(part)]
            case ToolCall():
                return [self.build_call(part)]
            case ToolResult(parts=parts) if id(part) not in self.matched:
                self.emulate("a result without a call is passed on as text")
                return self.build_parts(parts)
            case Thinking() | ToolResult():
                return []
            case _:
                assert_never(part)

    def build_call(self, call: ToolCall) -> JsonObject:
        args = {"input": call.arguments}
        if not call.custom:
            args = arguments_object(call.arguments)
        name = self.name_tool(call.namespace, call.name)
        part: JsonObject = {"functionCall": {"name": name, "args": args}}
        if self.traits.call_ids:
            part["functionCall"]["id"] = call.id
        if call.signature:
            part["thoughtSignature"] = call.signature
        return part

    def build_results(self, calls: Sequence[ToolCall]) -> list[JsonObject]:
        """A content with one functionResponse a call, and one with the files not inside these."""
        responses = []
        files = []
        for call in calls:
            result = self.results.get(id(call))
            if result is None:
                self.emulate("a call without a result is answered with a note that there is none")
            response, others = self.build_result(call, result)
            responses.append({"functionResponse": response})
            files += others
        return [{"role": "user", "parts": parts} for parts in (responses, files) if parts]

    def build_result(
        self, call: ToolCall, result: ToolResult | None
    ) -> tuple[JsonObject, list[JsonObject]]:
        """A call's functionResponse, and its files as parts where they may not stand inside it."""
        name = self.name_tool(call.namespace, call.name)
        response: JsonObject = {"name": name, "response": result_object(result)}
        if self.traits.call_ids:
            response["id"] = call.id
        inside: list[JsonObject] = []
        outside: list[JsonObject] = []
        for part in result.parts if result else ():
            if isinstance(part, Media):
                fits = self.traits.files_in_results and part.data
                (inside if fits else outside).append(build_media(part))
        if inside:
            response["parts"] = inside
        return response, outside


def match_results(messages: Iterable[Message]) -> dict[int, ToolResult]:
    """The result of each call by the call's id().

    A result belongs to the nearest call before it, else to one that has no other result: clients
    use ids again, send results in any order, and some of them before their calls.
    """
    results = {}
    open_calls = defaultdict(list)
    early = []
    for position, message in enumerate(messages):
        for part in message.parts:
            if isinstance(part, ToolCall):
                open_calls[part.id].append((position, part))
            elif isinstance(part, ToolResult):
                if waiting := open_calls[part.call_id]:
                    nearest = max(waiting, key=lambda entry: entry[0])
                    waiting.remove(nearest)
                    results[id(nearest[1])] = part
                else:
                    early.append(part)
    for result in early:
        if waiting := open_calls[result.call_id]:
            results[id(waiting.pop(0)[1])] = result
    return results


def add_content(contents: list[JsonObject], role: str, parts: list[JsonObject]) -> None:
    if not parts:
        return
    if not contents and role == "model":
        contents.append(build_content("user", PLACEHOLDER))
    last = contents[-1] if contents else None
    if last and last["role"] == role and "functionResponse" not in last["parts"][0]:
        last["parts"].extend(parts)
    else:
        contents.append({"role": role, "parts": parts})


def build_content(role: str, text: str) -> JsonObject:
    return {"role": role, "parts": [{"text": text}]}


def build_signed(text: str, signature: Signature) -> list[JsonObject]:
    """A text as Gemini sent it: the signed piece apart from those before and after it."""
    start, end = signature.start, signature.end
    before, after = {"text": text[:start]}, {"text": text[end:]}
    signed = {"text": text[start:end], "thoughtSignature": signature.value}
    return [piece for piece in (before, signed, after) if piece is signed or piece["text"]]


def build_media(media: Media) -> JsonObject:
    if media.url:
        file = {"fileUri": media.url, "mimeType": media.mime}
        return {"fileData": {key: value for key, value in file.items() if value}}
    part: JsonObject = {"inlineData": {"mimeType": media.mime, "data": media.data}}
    if media.signature:
        part["thoughtSignature"] = media.signature
    return part


def arguments_object(arguments: str) -> JsonObject:
    """A call's arguments as the object that Gemini wants; anything else is wrapped into one."""
    value = parse_strict(arguments or "{}")
    if isinstance(value, dict):
        return value
    return {"input": arguments if value is None else value}


def result_object(result: ToolResult | None) -> JsonObject:
    """A tool's answer as an object: a JSON object as it is, anything else as text.

    A `$ref` inside would be read as a reference:
    https://github.com/BerriAI/litellm/issues/38223
    """
    if result is None:
        return {"error": "(no result was given for this call)"}
    text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
    if text.lstrip().startswith("{") and '"$ref"' not in text:
        value = parse_strict(text)
        if isinstance(value, dict):
            return value
    return {"output": text}


def unsigned(part: Part) -> Part:
    return replace(part, signature=None) if isinstance(part, ToolCall | Text) else part


# ---- beside generateContent


def choices_of(request: Request) -> list[Request]:
    """A request for each of `n` choices.

    A seed counts up, for with the same one all choices would be alike.
    """
    seed = request.seed
    if seed is None:
        return [request] * request.n
    return [replace(request, seed=(seed + choice) & 0x7FFFFFFF) for choice in range(request.n)]


def build_embeddings(texts: Sequence[str], model: str, dimensions: int | None) -> JsonObject:
    """Source: https://ai.google.dev/api/embeddings#method:-models.batchembedcontents"""
    options: JsonObject = {"model": f"models/{model}"}
    if dimensions:
        options["outputDimensionality"] = dimensions
    return {"requests": [options | {"content": {"parts": [{"text": text}]}} for text in texts]}


def countable(kind: str, model: str, body: bytes) -> bytes:
    """The body of countTokens for a body of generateContent.

    The Gemini API takes the whole, Vertex words and tools, v1internal contents alone.
    """
    if kind == "gemini":
        return b'{"generateContentRequest":{"model":"models/%b",%b}' % (encoded(model), body[1:])
    whole = json.loads(body)
    if kind == "vertex":
        words = ("contents", "systemInstruction", "tools")
        return dump_bytes({word: whole[word] for word in words if word in whole})
    contents = whole["contents"]
    if "systemInstruction" in whole:
        contents = [{"role": "user", **whole["systemInstruction"]}, *contents]
    return dump_bytes({"request": {"model": f"models/{model}", "contents": contents}})


def refuse_dropped(changes: Iterable[Change]) -> None:
    """Raises BadRequest where something of a request would be lost."""
    lost = [change for change in changes if change.kind == "dropped"]
    if not lost:
        return
    losses = "; ".join(f"{change.pointer}: {change.reason}" for change in lost)
    raise BadRequest(
        f"Not everything can be carried over ({losses})."
        " Leave it out, or allow it by proxy.strict: false.",
        code="unsupported_parameter",
        param=lost[0].pointer.strip("/").replace("/", "."),
    )


# ==============================================================================
# 13. From Gemini
# ==============================================================================

# What is not here counts as "stop", and is an error where nothing was said.
# Source: https://ai.google.dev/api/generate-content#FinishReason
FILTERED = "SAFETY RECITATION LANGUAGE BLOCKLIST PROHIBITED_CONTENT SPII MODEL_ARMOR"
FILTERED_IMAGES = "IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION"
FINISH_REASONS: Mapping[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    **dict.fromkeys(f"{FILTERED} {FILTERED_IMAGES}".split(), "content_filter"),
}
CALLS_MAX = 1000  # a model that repeats its call over and over does not end by itself
CALL_ID_MAX = 64  # OpenAI's own limit
LOGPROB_MIN = -9999.0  # OpenAI's word for "next to impossible"; JSON has no infinity
# What comes of reading JSON that has another form than Gemini promises.
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class SseSplitter:
    """Bytes of a text/event-stream, cut anywhere, to the JSON texts of its events.

    Lines end at CR, LF or CRLF only: U+2028 may stand inside a JSON string.
    An error in mid-stream may come as a bare JSON text without `data:`, over one line or several.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line that is not whole: an image may be many reads
        self._bare: list[bytes] = []  # lines of a JSON text that has no `data:`

    def feed(self, data: bytes) -> list[bytes]:
        lines = data.splitlines()
        piece = b""
        if lines and not data.endswith((b"\n", b"\r")):
            piece = lines.pop()
        if lines and self._pieces:
            lines[0] = b"".join([*self._pieces, lines[0]])
            self._pieces = []
        if piece:
            self._pieces.append(piece)
        texts = []
        for line in lines:
            if line.startswith(b"data: {"):
                texts.append(line[6:])
            elif line and (text := self._text(line)):
                texts.append(text)
        return texts

    def close(self) -> list[bytes]:
        """Returns the texts left at the end, without one that was cut."""
        texts = [*self.feed(b"\n"), b"\n".join(self._bare)]
        return [text for text in texts if text and parse_json(text) is not None]

    def _text(self, line: bytes) -> bytes:
        """The JSON text that a line ends, b"" where it ends none."""
        if line.startswith(b"data:"):  # [DONE] is what some put behind Gemini's own end
            return line[5:].strip().removeprefix(b"[DONE]")
        if not self._bare and line[:1] not in b"{[":
            return b""
        self._bare.append(line)
        if not line.endswith((b"}", b"]")):
            return b""
        text = b"\n".join(self._bare)
        if parse_json(text) is None:
            return b""
        self._bare = []
        return text


@dataclass(slots=True)
class Candidate:
    """The state of one choice while its chunks come."""

    choice: int
    kind: type[Text | Thinking] | None = None  # of the open part, as are `texts` and `signature`
    texts: list[str] = field(default_factory=list)
    signature: Signature | None = None
    earlier_text: str = ""  # of the text parts that ended
    has_content: bool = False
    has_answer: bool = False  # by the answer tool
    calls: int = 0
    reason: str = ""
    pcm: tuple[bytes, ...] = ()
    pcm_rate: int = 24000
    grounding: tuple[JsonMap, ...] = ()
    logprobs: tuple[JsonMap, ...] = ()


class GeminiReader:
    """Chunks of one answer to Events; knows of no transport and no client.

    `new_id` makes the id of a tool call that came without one; `tools` are the declared ones by
    Gemini's name; `secret` is the key that was sent, for an error may repeat it; with `stops`, stop
    sequences were sent: an answer may be empty, for one may be the first that the model says.
    """

    def __init__(
        self,
        new_id: Callable[[], str],
        tools: Mapping[str, Tool] | None = None,
        *,
        parallel_calls: bool = True,
        secret: str = "",
        stops: bool = False,
    ) -> None:
        self._new_id = new_id
        self._tools = tools or {}
        self._calls_max = CALLS_MAX if parallel_calls else 1
        self.signed: list[ToolCall | Text] = []  # the parts that Gemini signed
        self._secret = secret
        self._stops = stops
        self._ids: frozenset[str] = frozenset()
        self._splitter = SseSplitter()
        self._candidates: dict[int, Candidate] = {}
        self._usage: JsonMap = {}
        self._run: TextRun | None = None
        self._unparsed = b""  # the last chunk of the run, the only one whose usage matters
        self._events: list[Event] = []
        self._started = False
        self.error: GatewayError | None = None  # what ended the answer, where it failed

    def feed(self, data: bytes) -> list[Event]:
        """Events of the next bytes of a stream."""
        return self._read(self._splitter.feed(data))

    def close(self, error: UpstreamError | None = None) -> list[Event]:
        """Events of the end of the body: the finish, or `error` or another where there was none."""
        return self._read(self._splitter.close(), last=True, error=error)

    def whole(self, body: bytes) -> list[Event]:
        """Events of an answer that came in one piece: a stream of one chunk."""
        return self._read([body], last=True)

    def _read(
        self, chunks: Iterable[bytes], last: bool = False, error: UpstreamError | None = None
    ) -> list[Event]:
        """Events of chunks, and of the end behind the last; nothing follows a failure."""
        if self.error:
            return []
        try:
            for raw in chunks:
                delta = self._run.delta(raw) if self._run else None
                if delta is None:
                    self._parse(raw)
                    continue
                self._candidates[delta.choice].texts.append(delta.text)
                self._events.append(delta)
                self._unparsed = raw
            if last:
                self._end(error)
        except GatewayError as failure:
            self._fail(failure.with_traceback(None))
        except MISSHAPEN:
            error = UpstreamBroken("Gemini sent something that cannot be understood. Try again.")
            self._fail(error)
        events, self._events = self._events, []
        return events

    def _parse(self, raw: bytes) -> None:
        chunk = self._parsed(raw)
        before = len(self._events)
        self._chunk(chunk)
        self._run = run_of(raw, chunk, self._events[before:])

    def _parsed(self, raw: bytes) -> Any:
        try:
            chunk = fast_loads(raw)
        except (RecursionError, ValueError):
            chunk = parse_json(raw)
        return chunk[0] if isinstance(chunk, list) and chunk else chunk

    def _chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            raise UpstreamBroken("Gemini sent something that is not JSON. Try again.")
        if "error" in chunk:
            raise classify_error(502, chunk)
        usage = chunk.get("usageMetadata")
        if isinstance(usage, dict):
            self._usage, self._unparsed = usage, b""
        if (chunk.get("promptFeedback") or {}).get("blockReason"):
            self._candidate(0).reason = "SAFETY"
        for raw in chunk.get("candidates") or ():
            candidate = self._candidate(raw.get("index") or 0)
            for part in (raw.get("content") or {}).get("parts") or ():
                self._part(candidate, part)
            self._metadata(candidate, raw)

    def _candidate(self, choice: Any) -> Candidate:
        """The state of a choice. Raises ValueError where there can be no such choice."""
        if choice.__class__ is not int or not 0 <= choice < CHOICES_MAX:
            raise ValueError("no such choice")
        candidate = self._candidates.get(choice)
        if candidate is None:
            candidate = self._candidates[choice] = Candidate(choice)
        return candidate

    def _metadata(self, candidate: Candidate, raw: JsonMap) -> None:
        if reason := raw.get("finishReason"):
            candidate.reason = checked_text(reason)
        for key in ("groundingMetadata", "citationMetadata"):
            if metadata := raw.get(key):
                candidate.grounding += (metadata,)
        if result := raw.get("logprobsResult"):
            candidate.logprobs += tuple(logprobs_of(result))

    def _part(self, candidate: Candidate, part: JsonObject) -> None:
        text, signature = part.get("text"), part.get("thoughtSignature")
        if text or (signature and text is not None and candidate.kind is Text):
            kind = Thinking if part.get("thought") else Text
            self._text(candidate, kind, checked_text(text), signature)
        elif call := part.get("functionCall"):
            self._call(candidate, call, signature and checked_text(signature))
        elif (blob := part.get("inlineData")) and not part.get("thought"):
            mime, data = checked_text(blob["mimeType"]), checked_text(blob["data"])
            self._media(candidate, Media(mime, data, signature))
        else:
            self._code(candidate, part)

    def _text(
        self,
        candidate: Candidate,
        kind: type[Text | Thinking],
        text: str,
        signature: str | None = None,
    ) -> None:
        if candidate.kind is not kind:
            self._end_part(candidate)
            candidate.kind = kind
            self._emit(PartStart(candidate.choice, kind("")))
        if signature and kind is Text:
            start = sum(map(len, candidate.texts))
            candidate.signature = Signature(checked_text(signature), start, start + len(text))
        if text:
            candidate.texts.append(text)
            candidate.has_content |= kind is Text
            delta = TextDelta if kind is Text else ThinkingDelta
            self._events.append(delta(candidate.choice, text))

    def _code(self, candidate: Candidate, part: JsonMap) -> None:
        """Shows code that Gemini ran itself, and its output, as text."""
        if code := part.get("executableCode"):
            language, shown = str(code.get("language", "")).lower(), code["code"]
        elif result := part.get("codeExecutionResult"):
            language, shown = "", result.get("output") or ""
        else:
            return
        self._text(candidate, Text, f"\n```{language}\n{checked_text(shown)}\n```\n")

    def _call(self, candidate: Candidate, call: JsonObject, signature: str | None) -> None:
        name = checked_text(call.get("name") or "")
        tool = self._tools.get(name) or Tool(name, "", None)
        args = dict(call.get("args") or {})
        if tool.answers:
            return self._answer(candidate, args)
        candidate.calls += 1
        if candidate.calls > self._calls_max:
            return
        id, arguments, choice = self._id(call.get("id")), arguments_of(tool, args), candidate.choice
        start = ToolCall(id, tool.name, "", signature, tool.namespace, tool.custom)
        end = replace(start, arguments=arguments)
        self._end_part(candidate)
        if signature:
            self.signed.append(end)
        self._emit(
            PartStart(choice, start), ArgumentsDelta(choice, arguments), PartEnd(choice, end)
        )

    def _answer(self, candidate: Candidate, args: JsonObject) -> None:
        """Shows the first call of the answer tool as the JSON text that the client waits for."""
        if not candidate.has_answer:
            candidate.has_answer = True
            self._text(candidate, Text, dumps(args))

    def _id(self, id: Any) -> str:
        """Gemini's own id for a call where it is one that OpenAI's clients take, else a new one."""
        if not isinstance(id, str) or not 0 < len(id) <= CALL_ID_MAX or id in self._ids:
            id = self._new_id()
        self._ids |= {id}
        return str(id)

    def _media(self, candidate: Candidate, media: Media) -> None:
        if not media.mime.lower().startswith("audio/l16"):
            return self._whole_part(candidate, media)
        if rate := re.search(r"rate=([1-9]\d{0,5})", media.mime):
            candidate.pcm_rate = int(rate[1])
        candidate.pcm += (base64.b64decode(media.data),)
        candidate.has_content = True

    def _whole_part(self, candidate: Candidate, part: Part) -> None:
        candidate.has_content = True
        self._end_part(candidate)
        self._emit(PartStart(candidate.choice, part), PartEnd(candidate.choice, part))

    def _end_part(self, candidate: Candidate, citations: tuple[Citation, ...] = ()) -> None:
        text = "".join(candidate.texts)
        if candidate.kind is Text:
            part = Text(text, candidate.signature, citations)
            if candidate.signature:
                self.signed.append(part)
            self._emit(PartEnd(candidate.choice, part))
            candidate.earlier_text += text
        elif candidate.kind is Thinking:
            self._emit(PartEnd(candidate.choice, Thinking(text)))
        candidate.kind, candidate.texts, candidate.signature = None, [], None

    def _emit(self, *events: Event) -> None:
        if not self._started:
            self._started = True
            self._events.append(Started(usage_of(self._usage)))
        self._events += events

    def _fail(self, error: GatewayError) -> None:
        self.error = error
        error.message = without_secret(error.message, self._secret)
        for _, candidate in sorted(self._candidates.items()):
            self._end_part(candidate)
        self._events.append(Failed(error))

    def _end(self, error: UpstreamError | None) -> None:
        candidates = [candidate for _, candidate in sorted(self._candidates.items())]
        if not candidates or not all(candidate.reason for candidate in candidates):
            raise error or UpstreamBroken("Gemini's answer broke off before its end. Try again.")
        for candidate in candidates:
            self._finish(candidate)
        if self._unparsed:
            self._usage = self._parsed(self._unparsed)["usageMetadata"]
        self._emit(Ended(usage_of(self._usage)))

    def _finish(self, candidate: Candidate) -> None:
        """Ends a choice. Raises UpstreamBroken where it is empty without a good reason."""
        reason = FINISH_REASONS.get(candidate.reason, "stop")
        if reason == "stop" and candidate.calls:
            reason = "tool_calls"
        may_be_empty = reason != "stop" or (self._stops and candidate.reason == "STOP")
        if not candidate.has_content and not may_be_empty:
            why = "unknown finish reason"
            if re.fullmatch(r"[A-Z_]{1,40}", candidate.reason):
                why = f"finish reason {candidate.reason}"
            raise UpstreamBroken(f"Gemini's answer is empty ({why}). Try again.")
        if candidate.pcm:
            self._whole_part(candidate, wav(b"".join(candidate.pcm), candidate.pcm_rate))
        self._end_part(candidate, self._annotate(candidate))
        self._emit(Finished(candidate.choice, reason, candidate.logprobs))

    def _annotate(self, candidate: Candidate) -> tuple[Citation, ...]:
        """Emits the sources of the whole text; returns the open part's, counted from its start."""
        if not candidate.grounding:
            return ()
        text, start = candidate.earlier_text, len(candidate.earlier_text)
        if candidate.kind is Text:
            text += "".join(candidate.texts)
        citations = citations_of(text, candidate.grounding)
        searches = dict.fromkeys(
            checked_text(query)
            for metadata in candidate.grounding
            for query in metadata.get("webSearchQueries") or ()
        )
        if citations or searches:
            self._emit(Annotated(candidate.choice, citations, tuple(searches)))
        return tuple(
            replace(citation, start=citation.start - start, end=citation.end - start)
            for citation in citations
            if citation.start >= start
        )


class CloudCodeReader(GeminiReader):
    """Reads the chunks of v1internal, which wraps each as {"response": ...}."""

    def _parsed(self, raw: bytes) -> Any:
        chunk = super()._parsed(raw)
        return chunk.get("response", chunk) if isinstance(chunk, dict) else chunk


def checked_text(value: Any) -> str:
    """The text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text should be")
    return value


def arguments_of(tool: Tool, args: JsonMap) -> str:
    """The arguments as JSON; a custom tool's free text as it is."""
    value: Any = args
    if tool.custom:
        value = args.get("input") or ""
    return value if isinstance(value, str) else dumps(value)


def wav(pcm: bytes, rate: int) -> Media:
    """A file of raw 16-bit mono samples, as Gemini's speech models send them."""
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(pcm)
    return Media("audio/wav", base64.b64encode(file.getvalue()).decode())


def citations_of(text: str, grounding: Sequence[JsonMap]) -> tuple[Citation, ...]:
    """Web sources of a text, each once."""
    raw = encoded(text)
    citations = [
        Citation(*span_of(segment, text, raw), str(page["uri"]), str(page.get("title") or ""))
        for segment, page in sources_of(grounding)
        if page.get("uri")
    ]
    return tuple(dict.fromkeys(citations))


def sources_of(grounding: Sequence[JsonMap]) -> Iterator[tuple[JsonMap, JsonMap]]:
    """Pairs of a segment of the text and the page that it rests on."""
    chunks = [chunk for metadata in grounding for chunk in metadata.get("groundingChunks") or ()]
    for metadata in grounding:
        for support in metadata.get("groundingSupports") or ():
            for i in support.get("groundingChunkIndices") or ():
                if i < len(chunks):
                    yield support.get("segment") or {}, chunks[i].get("web") or {}
        for key in ("citationSources", "citations"):
            for source in metadata.get(key) or ():
                yield source, source


def span_of(segment: JsonMap, text: str, raw: bytes) -> tuple[int, int]:
    """Start and end of a segment of the text in code points.

    Gemini counts bytes of UTF-8 and leaves a zero start out; where it miscounts, its quote tells.
    Source: https://ai.google.dev/api/generate-content#Segment
    """
    marks = (raw[: count_of(segment.get(key))] for key in ("startIndex", "endIndex"))
    start, end = (len(mark.decode(errors="ignore")) for mark in marks)
    quote = segment.get("text")
    if isinstance(quote, str) and quote and text[start:end] != quote and quote in text:
        start = text.index(quote)
        end = start + len(quote)
    return start, end


def logprobs_of(result: JsonMap) -> list[JsonObject]:
    """Token, log probability and alternatives of each token."""
    chosen, tops = result.get("chosenCandidates") or (), result.get("topCandidates") or ()
    return [
        logprob_of(token)
        | {"top_logprobs": [logprob_of(other) for other in top.get("candidates") or ()]}
        for token, top in zip(chosen, itertools.chain(tops, itertools.repeat({})), strict=False)
    ]


def logprob_of(raw: JsonMap) -> JsonObject:
    token = checked_text(raw.get("token") or "")
    logprob = float(raw.get("logProbability") or 0)
    if not LOGPROB_MIN <= logprob < inf:
        logprob = LOGPROB_MIN
    return {"token": token, "logprob": logprob, "bytes": list(encoded(token))}


def count_of(value: Any) -> int:
    """A count that may come as a number or as digits; 0 for anything else."""
    if value.__class__ is int:
        return max(0, value)
    digits = re.match(r"\d{1,15}", str(value))
    return int(digits[0]) if digits else 0


def usage_of(raw: JsonMap) -> Usage:
    # total = prompt + tool use + candidates + thoughts
    # Source: https://ai.google.dev/api/generate-content#UsageMetadata
    names = ("prompt", "toolUsePrompt", "candidates", "thoughts", "cachedContent")
    counts = [count_of(raw.get(f"{name}TokenCount", 0)) for name in names]
    prompt, tool_use, answer, thoughts, cached = counts
    return Usage(prompt + tool_use, answer + thoughts, cached, thoughts)


def read_embeddings(answer: JsonMap, count: int) -> list[list[float]]:
    """The vectors at length 1: Gemini leaves shortened ones as they are. Raises UpstreamBroken."""
    try:
        vectors = [unit_vector(embedding["values"]) for embedding in answer["embeddings"]]
    except MISSHAPEN:
        vectors = []
    if len(vectors) != count:
        raise UpstreamBroken("Gemini sent other vectors than were asked for. Try again.")
    return vectors


def unit_vector(values: Iterable[Any]) -> list[float]:
    """The vector of these values at length 1. Raises ValueError where one is not finite."""
    vector = [float(value) for value in values]
    length = math.hypot(*vector) or 1.0
    if not isfinite(length):
        raise ValueError("a vector has no length")
    if abs(length - 1) < 1e-6:
        return vector
    return [value / length for value in vector]


# ---- chunks that need no parser

DIGITS = b"0123456789"
TEXT_START = re.compile(r'"text"\s*:\s*"')
KEY = re.compile(r'"(\w+)"\s*:')
RUN_KEYS = {"response", "candidates", "content", "parts", "text", "thought", "role", "index"}
USAGE = b'"usageMetadata"'
scan_string: Callable[[str, int], tuple[str, int]]
scan_string = json.decoder.scanstring  # type: ignore[attr-defined]


@value
class TextRun:
    """Chunks that differ in text and counts alone; to compare takes a third of a parser's time."""

    before: str  # up to the text
    after: str  # from the quote behind the text to the usage
    tail: bytes  # the usage and what follows, without digits
    choice: int
    kind: type[TextDelta | ThinkingDelta]

    def delta(self, raw: bytes) -> TextDelta | ThinkingDelta | None:
        """The delta of a chunk that goes on with the run, None for any other."""
        head, _, tail = raw.partition(USAGE)
        try:
            start = head.decode()
            text, end = scan_string(start, len(self.before))
        except ValueError:
            return None
        if not text or not start.startswith(self.before) or start[end:] != self.after:
            return None
        if tail.translate(None, DIGITS) != self.tail:
            return None
        return self.kind(self.choice, text)


def run_of(raw: bytes, chunk: JsonMap, events: Sequence[Event]) -> TextRun | None:
    """The run that a chunk begins, None where it brought more than one text and the usage."""
    if len(events) != 1 or not isinstance(delta := events[0], TextDelta | ThinkingDelta):
        return None
    head, _, tail = raw.partition(USAGE)
    text = head.decode(errors="replace")
    start = TEXT_START.search(text)
    if not start or not isinstance(chunk.get("usageMetadata"), dict):
        return None
    found, end = scan_string(text, start.end())
    before, after = text[: start.end()], text[end:]
    if found != delta.text or not RUN_KEYS.issuperset(KEY.findall(before + after)):
        return None
    return TextRun(before, after, tail.translate(None, DIGITS), delta.choice, type(delta))


# ---- refusals

# The class of an error of Gemini: of the first row whose pattern fits its status and what it says.
# Source of all that name no other: https://ai.google.dev/gemini-api/docs/troubleshooting
BARRED_WORDS = "abus|unusual traffic|terms of service|TOS_VIOLATION|suspended|leaked"
REFUSALS: Sequence[tuple[str, type[UpstreamError]]] = (
    # A day's quota, or one that the tier does not have at all: no wait of seconds helps.
    # Source: https://ai.google.dev/gemini-api/docs/rate-limits; the words in capitals: v1internal
    (r"429 .*(limit: 0\b|PerDay|Daily|QUOTA_EXHAUSTED|INSUFFICIENT_G1_CREDITS)", QuotaGone),
    # The model is full, for whatever account. Source: seen of v1internal with either status
    (r"(429|503) .*(MODEL_CAPACITY_EX|No capacity available)", Overloaded),
    # The owner broke a rule, or the key was found in public; the owner has to act first.
    # Source: seen of v1internal
    (rf"(?i)(403|429) .*({BARRED_WORDS})", AccountBarred),
    (r"403 .*(VALIDATION_REQUIRED|SECURITY_POLICY_VIOLATED)", AccountBarred),
    # Any other quota is a minute's. Source: https://ai.google.dev/gemini-api/docs/rate-limits
    (r"429", RateLimited),
    # Another account may do it. Source: https://cloud.google.com/apis/design/errors
    (r"401|403", CredentialRefused),
    (r"400 .*(API_KEY_INVALID|API key)", CredentialRefused),  # the Gemini API's way to say it
    # The account's country or billing; the blanks keep a client's own `billing` out of it.
    (r"400 .*(User location is not supported|[Bb]illing | billing)", CredentialRefused),
    # The prompt is too long for the model: clients mend it by leaving messages out.
    (r"400 .*(token count.* exceeds|maximum number of tokens)", ContextTooLong),
    (r"400 .*[Cc]ontext (length|window)", ContextTooLong),
    (r"413|400 .*payload size exceeds", TooLarge),  # a front end tells the status alone
    # Source: https://ai.google.dev/gemini-api/docs/thought-signatures
    (r"400 .*[Tt]hought[_ ]?[Ss]ignature", SignatureRefused),
    # Source: https://github.com/google-gemini/gemini-cli/issues/4607
    (r"400 .*([Ss]chema|\$ref)", SchemaRefused),
    (r"400 .*MIME type", FileRefused),  # the model does not read such files
    (r"400", UpstreamRefused),  # any other mistake is one for every account
    (r"404", ModelGone),  # for this account
    (r"408|499|504", UpstreamTimeout),  # a deadline of Gemini's, or of a server before it
    # Statuses above 504 come from proxies. Source: https://docs.anthropic.com/en/api/errors (529)
    (r"503|50[5-9]|5[1-9]|[6-9]", Overloaded),
    (r"", UpstreamBroken),
)
HTTP_HINTS = {
    3: "Check base_url and the network: it redirects.",
    4: "Check base_url.",
    5: "Try again.",
}
# Of v1internal in Go's form: "Your quota will reset after 3h2m1s."
WAIT_TEXT = re.compile(r"(retry|try again|reset) (in|after) ([\d.hms]+[hms])", re.IGNORECASE)


def classify_error(status: int, body: Any, retry_after: str = "") -> UpstreamError:
    """The meaning of an error answer of Gemini with this JSON, if any, and Retry-After header."""
    error = error_of(body)
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    refused = refusal_of(status, error)
    details = details_of(error)
    fields = ChainMap(*details)
    if isinstance(refused, RateLimited):
        tell_quota(refused, details)
    page = fields.get("validation_link") or fields.get("url")
    if page and isinstance(refused, AccountBarred):
        refused.message = f"{refused.message.rstrip('.')}. Visit {page}"
    refused.reset_at = reset_at_of(fields)
    refused.retry_after_s = wait_s_of(refused, fields, retry_after)
    return refused


def error_of(body: Any) -> JsonMap:
    """The error object of an error body: bare, in an array, or as JSON in another one's message."""
    if isinstance(body, list) and body:
        body = body[0]
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    message = error.get("message")
    if isinstance(message, str) and message.lstrip().startswith(("{", "[")):
        return error_of(parse_json(message)) or error
    return error


def refusal_of(status: int, error: JsonMap) -> UpstreamError:
    """The error of the row of REFUSALS that fits."""
    about, message = f"{status} ", error.get("message")
    with suppress(RecursionError):
        about += str(error)
    kind = next(kind for pattern, kind in REFUSALS if re.match(pattern, about))
    hint = f"Gemini answered HTTP {status}. {HTTP_HINTS.get(status // 100, '')}".strip()
    text = message if isinstance(message, str) and message else hint
    return kind(text[:ERROR_CHARS_MAX])


def details_of(error: JsonMap) -> list[JsonObject]:
    """The objects of an error's details and those in them."""
    details = []
    for detail in objects_in(error.get("details")):
        details.append(detail)
        for inner in (detail.get("violations"), [detail.get("metadata")], detail.get("links")):
            details += objects_in(inner)
    return details


def tell_quota(refused: RateLimited, details: Sequence[JsonMap]) -> None:
    """Sets the quota that is used up, a day's before a minute's, and its size."""
    quotas = dict(quota for fields in details if (quota := quota_of(fields)))
    if quotas:
        refused.quota = min(quotas, key=lambda quota: not quota.endswith("day"))
        refused.limit = quotas[refused.quota]
    if isinstance(refused, QuotaGone) and re.search(r"limit: 0\b", refused.message):
        refused.quota, refused.limit = "tier", None


def quota_of(fields: JsonMap) -> tuple[str, int | None] | None:
    """Our name and the size of a quota, by an id such as GenerateRequestsPerDayPerProject."""
    name = fields.get("quotaId") or fields.get("quota_limit")
    if not isinstance(name, str):
        return None
    unit = "tokens" if "Token" in name else "requests"
    per = "day" if re.search("PerDay|Daily", name) else "minute"
    size = count_of(fields.get("quotaValue") or fields.get("quota_limit_value"))
    return f"{unit}_per_{per}", size or None


def reset_at_of(fields: JsonMap) -> float | None:
    """The moment when a quota is new, in seconds since 1970, where no delay until then is told."""
    from datetime import datetime

    if not duration_s(fields.get("quotaResetDelay")):
        with suppress(KeyError, OverflowError, TypeError, ValueError):
            return datetime.fromisoformat(fields["quotaResetTimeStamp"]).timestamp()
    return None


def wait_s_of(refused: UpstreamError, fields: JsonMap, retry_after: str) -> float | None:
    """Seconds to wait as the first of Gemini's words says, None without one."""
    words = [fields.get("quotaResetDelay")]
    if not refused.quota.endswith(("_day", "tier")):  # RetryInfo does not know when their day ends
        text = WAIT_TEXT.search(refused.message)
        words += [fields.get("retryDelay"), f"{retry_after}s", text and text[3]]
    return next((wait for wait in map(duration_s, words) if wait is not None), None)


def duration_s(text: Any) -> float | None:
    """Seconds of a duration such as 34.07s or 3h2m1.2s, at most a day's; None for anything else."""
    if not isinstance(text, str) or not re.fullmatch(r"(\d{1,9}(\.\d+)?(ms|[hms]))+", text):
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    pieces = re.findall(r"([\d.]+)(ms|[hms])", text)
    return min(sum(float(count) * units[unit] for count, unit in pieces), RETRY_AFTER_S_MAX)


# ==============================================================================
# 14. Signatures
# ==============================================================================

# A signature has some 1,000 characters: this many take about 20 MB, and hold a day of several
# agents.
SIGNATURES_MAX = 20_000
# What a sealed entry begins with, to tell it from encrypted reasoning of OpenAI's.
SEAL_VERSION = "agp1."


class SignatureMemory:
    """Thought signatures by tool-call id or by the answer's text; the oldest are forgotten first.

    Clients drop keys that they do not know; so their next request lacks what Gemini wants back.
    """

    def __init__(self, size: int = SIGNATURES_MAX) -> None:
        self._size = size
        self.known: dict[str, tuple[str, Any]] = {}  # the model that signed, and the signature

    def remember(self, parts: Iterable[ToolCall | Text], model: str) -> None:
        """Keeps the signatures of parts that this model signed."""
        self.learn(signature_entry(part, model) for part in parts)

    def learn(self, entries: Iterable[list[Any]]) -> None:
        """Takes in entries made by `signature_entry`."""
        for key, model, signature, *span in entries:
            self.known[key] = (model, Signature(signature, *span) if span else signature)
            if len(self.known) > self._size:
                del self.known[next(iter(self.known))]

    def recall(self, request: Request, model: str) -> Request:
        """The request with the signatures of this model put back, and without other models'."""

        def signed(part: Part) -> Part:
            if not isinstance(part, ToolCall | Text):
                return part
            signer, known = self.known.get(signature_key(part), (model, None))
            signature: Any = None
            if signer == model:
                signature = part.signature or known
            return part if signature is part.signature else replace(part, signature=signature)

        return with_signatures(request, signed)


def signature_key(part: ToolCall | Text) -> str:
    return part.id if isinstance(part, ToolCall) else hashlib.sha256(encoded(part.text)).hexdigest()


def signature_entry(part: ToolCall | Text, model: str) -> list[Any]:
    """A signed part as a JSON entry for the memory, to be learned again later."""
    entry = [signature_key(part), model]
    if isinstance(part.signature, Signature):
        return [*entry, part.signature.value, part.signature.start, part.signature.end]
    return [*entry, part.signature]


def seal_entry(entry: list[Any], secret: bytes) -> str:
    """An entry of the memory for a client to carry; only this gateway reads it, if unchanged."""
    body = encoded(dumps(entry))
    data = hmac.digest(secret, body, "sha256") + body
    return SEAL_VERSION + base64.urlsafe_b64encode(data).decode()


def unseal_entry(text: str, secret: bytes) -> list[Any] | None:
    """The entry that was sealed; None for anything that this gateway did not seal."""
    if not text.startswith(SEAL_VERSION):
        return None
    try:
        data = base64.urlsafe_b64decode(text.removeprefix(SEAL_VERSION))
    except ValueError:
        return None
    tag, body = data[:32], data[32:]
    if not hmac.compare_digest(tag, hmac.digest(secret, body, "sha256")):
        return None
    entry: list[Any] | None = parse_json(body)
    return entry


def with_signatures(request: Request, signed: Callable[[Part], Part]) -> Request:
    """The request with each part of the model's messages replaced by what `signed` makes of it."""
    messages = [
        replace(message, parts=tuple(map(signed, message.parts)))
        if message.role == "assistant"
        else message
        for message in request.messages
    ]
    return replace(request, messages=tuple(messages))


# ==============================================================================
# 15. Accounts
# ==============================================================================

ATTEMPTS_MAX = 3  # of one request: more would only hold the client up
COOLDOWN_S_MAX = 3600.0  # of those that double, so that an account is tried again within the hour
JITTER_S_MAX = 30.0  # of accounts refused at once, the probes are spread over so much time
# A cooldown that ends later than this was begun before the clock was set back, and holds no more.
COOLDOWN_END_S_MAX = RETRY_AFTER_S_MAX + 2 * JITTER_S_MAX
DAY_S_MAX = 25 * 3600.0  # in autumn a day has 25 hours
PROBE_S_MAX = 10.0  # a probe that is silent for longer has no refusal coming: its model thinks
POLL_S = 0.25  # nobody knows when a busy account is free or a probe ends: that is asked so often
STATES_MAX = 2000  # of accounts times models, so that clients that invent names fill no memory
AFFINITY_CHARS = 4000  # of instructions and first message each: enough to tell them apart
HASH_MAX = (1 << 64) - 1
Key = tuple[str, str]  # an owner (an account's name, or "@" and a quota_group), and a model


def next_midnight(now: float) -> float:
    """The time at which a new day of Gemini's quotas begins: midnight in Los Angeles.

    Source: https://ai.google.dev/gemini-api/docs/rate-limits
    """
    local = now + pacific_offset_s(now)
    midnight = (local // 86400 + 1) * 86400
    return midnight - pacific_offset_s(midnight - pacific_offset_s(now))


def pacific_offset_s(now: float) -> float:
    """Seconds by which clocks in Los Angeles are ahead of UTC. The rule of the United States is
    written out here, for not every system knows the time zones."""
    from datetime import UTC, datetime, timedelta

    moment = datetime.fromtimestamp(now, UTC)
    begin = datetime(moment.year, 3, 8, 10, tzinfo=UTC)  # 2 a.m. there, in winter
    end = datetime(moment.year, 11, 1, 9, tzinfo=UTC)  # 2 a.m. there, in summer
    sundays = [day + timedelta(days=6 - day.weekday()) for day in (begin, end)]
    is_summer = sundays[0] <= moment < sundays[1]
    return 3600.0 * (is_summer - 8)


def cooldown_of(error: UpstreamError, strikes: int, now: float) -> float:
    """Seconds of cooldown after a refusal, from a second to a day; infinite for a barred account.

    They last as long as the upstream says, else as the quota's day or minute; else twice as long
    after each strike, a probe that failed.
    """
    if isinf(error.cooldown_s):
        return inf
    if error.reset_at is not None:
        cooldown_s = error.reset_at - now
    elif error.retry_after_s is not None:
        cooldown_s = error.retry_after_s
    elif isinstance(error, QuotaGone):
        cooldown_s = next_midnight(now) - now
    elif error.quota.endswith("_minute"):
        cooldown_s = 60.0
    else:
        cooldown_s = min(error.cooldown_s * 2.0 ** min(strikes, 99), COOLDOWN_S_MAX)
    return min(max(cooldown_s, 1.0), RETRY_AFTER_S_MAX)


@dataclass(eq=False, slots=True)
class PoolEntry:
    """An account's place in the pool."""

    account: Account
    salt: int = field(init=False)
    """An odd number of 64 bits, by which each conversation has an order of accounts of its own."""
    owners: tuple[str, ...] = field(init=False)
    """Whose cooldowns hold it back: the account itself, then its quota_group, if it has one."""
    busy: int = 0
    busy_max: float = field(init=False)
    turn: float = 0.0
    """Grows by 1/weight with each request: by round robin the account with the smallest is next."""

    def __post_init__(self) -> None:
        name = self.account.name
        self.salt = int.from_bytes(hashlib.sha256(encoded(name)).digest()[:8], "big") | 1
        self.adopt(self.account)

    def adopt(self, account: Account) -> None:
        self.account, self.owners = account, (account.name,)
        self.busy_max = account.max_concurrency or inf
        if account.quota_group:
            self.owners += (f"@{account.quota_group}",)

    def project(self, model: str) -> Key:
        """The key of the quota of a model, which all accounts of a quota_group share."""
        return self.owners[-1], model


@dataclass(eq=False, slots=True)
class Lease:
    """One request's use of an account, from the choice until the end of its answer."""

    entry: PoolEntry
    account: Account
    model: str
    begun: float
    limited: bool = False  # some limits are known
    probes: list[Cooldown] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False, slots=True)
class Cooldown:
    """The reason why an account or a project is not asked, and until when. Afterwards one request,
    the probe, is let through: its answer ends the cooldown, its refusal begins a new one."""

    error: UpstreamError
    until: float
    strikes: int = 0  # how many probes in a row have failed
    prober: Lease | None = None

    def holds(self, now: float) -> bool:
        """Tells whether nobody may ask now; the probe on its way keeps the others out too.

        An end that is too far off was set before the clock was put back, and does not count.
        """
        if self.prober is not None and now < self.prober.begun + PROBE_S_MAX:
            return True
        return now < self.until <= now + COOLDOWN_END_S_MAX or isinf(self.until)

    def wait_s(self, now: float) -> float:
        if self is BUSY or self.prober:
            return POLL_S
        return max(self.until - now, 0.0)

    def describe(self, now: float) -> str:
        if self is BUSY:
            return "is busy"
        state = "is in cooldown"
        if self.prober:
            state = "is probed"
        elif self.until < inf:
            state = f"is in cooldown for {self.wait_s(now):.0f} s"
        return f"{state} ({self.error.quota}): {self.error.message}"


BUSY = Cooldown(Overloaded("has max_concurrency requests already"), inf)
UNASKED = Cooldown(RateLimited(f"was not asked, for a request is tried {ATTEMPTS_MAX} times"), 0.0)


class Cooldowns:
    """The cooldowns of each account and project, for one model or for all (the model "")."""

    def __init__(self) -> None:
        self.by_key: dict[Key, dict[str, Cooldown]] = {}  # of each, by quota

    def of(self, entry: PoolEntry, model: str) -> list[Cooldown]:
        """Those of an account and its project; also those that are over and not yet probed."""
        found: list[Cooldown] = []
        for owner in entry.owners:
            for key in ((owner, ""), (owner, model)):
                if key in self.by_key:
                    found += self.by_key[key].values()
        return found

    def longest(self, entry: PoolEntry, model: str, now: float) -> Cooldown | None:
        """The one that ends last of those that keep an account from being asked."""
        longest = None
        for cooldown in self.of(entry, model):
            if cooldown.holds(now) and (longest is None or cooldown.until > longest.until):
                longest = cooldown
        return longest

    def probe(self, lease: Lease, now: float) -> None:
        """Makes a request the probe of each cooldown that is over."""
        for cooldown in self.of(lease.entry, lease.model):
            if not cooldown.holds(now):
                cooldown.prober = lease
                lease.probes.append(cooldown)

    def begin(
        self, key: Key, error: UpstreamError, probes: Sequence[Cooldown], now: float, chance: float
    ) -> None:
        """Begins a cooldown. It ends up to a tenth later by `chance`, from 0 to 1, so that not all
        accounts are probed at once."""
        strikes, not_before = 0, 0.0
        if known := self.by_key.get(key, {}).get(error.quota):
            strikes = known.strikes + (known in probes)
            if known not in probes and known.holds(now):  # of several refusals at once
                not_before = known.until
        cooldown_s = cooldown_of(error, strikes, now)
        until = now + cooldown_s + chance * min(cooldown_s / 10, JITTER_S_MAX)
        self.add(key, Cooldown(error, max(until, not_before), strikes))

    def add(self, key: Key, cooldown: Cooldown) -> None:
        """Adds a cooldown in place of one of the same quota; of too many the first to end goes."""

        def end_of(key: Key) -> float:
            return max(each.until for each in self.by_key[key].values())

        self.by_key.setdefault(key, {})[cooldown.error.quota] = cooldown
        if len(self.by_key) > STATES_MAX:
            del self.by_key[min(self.by_key, key=end_of)]

    def drop(self, is_dropped: Callable[[Key, Cooldown], bool]) -> None:
        left = {
            key: {quota: each for quota, each in cooldowns.items() if not is_dropped(key, each)}
            for key, cooldowns in self.by_key.items()
        }
        self.by_key = {key: cooldowns for key, cooldowns in left.items() if cooldowns}

    def forget(self, owner: str, model: str = "", *, but: str = "") -> None:
        """Ends all of an owner, or those for one model, but not those of the quota `but`."""
        self.drop(
            lambda key, cooldown: (
                key[0] == owner and model in ("", key[1]) and cooldown.error.quota != but
            )
        )


@dataclass(eq=False, slots=True)
class Use:
    """Counts of what an account or a project was asked for one model, and the limits learned."""

    learned: dict[str, int] = field(default_factory=dict)
    minute: int = 0
    day_end: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(QUOTAS, 0))


class Ledger:
    """Counts requests and tokens of each account and project by model, and knows their limits."""

    def __init__(self) -> None:
        self.uses: dict[Key, Use] = {}
        self.day_end = 0.0
        self.has_limits = False  # none at all, which saves most pools the look
        self._given: Callable[[Key], dict[str, int]]

    def adopt(self, entries: Sequence[PoolEntry]) -> None:
        """Takes over the limits of the accounts file; a project has those of all its accounts."""

        @lru_cache(STATES_MAX)
        def given(key: Key) -> dict[str, int]:
            owner, model = key
            limits: dict[str, int] = {}
            for entry in entries:
                table = entry.account.limits
                if owner in entry.owners and (pattern := look_up(model, table)):
                    limits |= table[pattern]
            return limits

        self._given = given
        self.has_limits |= any(entry.account.limits for entry in entries)

    def use(self, key: Key, now: float) -> Use:
        """The counts of this minute and day. A new one is not kept before something is counted."""
        use = self.uses.get(key) or Use()
        if use.minute != (minute := int(now // 60)):
            use.minute = minute
            use.counts |= {"requests_per_minute": 0, "tokens_per_minute": 0}
        if not now < self.day_end <= now + DAY_S_MAX:
            self.day_end = next_midnight(now)
        if use.day_end != self.day_end:
            use.day_end = self.day_end
            use.counts |= {"requests_per_day": 0, "tokens_per_day": 0}
        return use

    def limits(self, key: Key, use: Use) -> dict[str, int]:
        """The limits given, which count more than those learned, and those learned."""
        return use.learned | self._given(key)

    def count(self, lease: Lease, now: float, *, requests: int = 0, tokens: int = 0) -> None:
        for owner in lease.entry.owners:
            key = owner, lease.model
            use = self.uses[key] = self.use(key, now)
            use.counts["requests_per_minute"] += requests
            use.counts["requests_per_day"] += requests
            use.counts["tokens_per_minute"] += tokens
            use.counts["tokens_per_day"] += tokens
        while len(self.uses) > STATES_MAX:
            del self.uses[next(iter(self.uses))]

    def is_near_limit(self, key: Key, now: float, share: float) -> bool:
        """Tells whether more than this share of a limit is used up."""
        use = self.use(key, now)
        return any(use.counts[q] >= limit * share for q, limit in self.limits(key, use).items())

    def learn(self, key: Key, quota: str, limit: int, now: float) -> None:
        self.use(key, now).learned[quota] = limit
        self.has_limits = True

    def unlearn_exceeded(self, key: Key, now: float) -> None:
        """Forgets each learned limit that was exceeded without a refusal."""
        use = self.use(key, now)
        use.learned = {q: limit for q, limit in use.learned.items() if use.counts[q] <= limit}

    def unlearn(self, owners: Collection[str]) -> None:
        for (owner, _), use in self.uses.items():
            if owner in owners:
                use.learned.clear()

    def restore(self, key: Key, today: list[int], learned: Mapping[str, int], now: float) -> None:
        use = self.uses[key] = self.use(key, now)
        use.counts["requests_per_day"], use.counts["tokens_per_day"] = today
        for quota in learned.keys() & set(QUOTAS):
            self.learn(key, quota, learned[quota], now)


def affinity_rank(entry: PoolEntry, key: int) -> float:
    """The place of an account in the order of a conversation, which other accounts do not change.

    Source: https://en.wikipedia.org/wiki/Rendezvous_hashing#Weighted_rendezvous_hash
    """
    share = ((entry.salt * key & HASH_MAX) + 1) / (HASH_MAX + 2)
    return -math.log(share) / entry.account.weight


# The account with the lowest rank is asked first; of equal ones the first of the file.
RANKS: dict[str, Callable[[PoolEntry, int], float]] = {
    "affinity": affinity_rank,
    "round_robin": lambda entry, key: entry.turn,
    "fill_first": lambda entry, key: 0.0,
}
# The kinds of errors whose cooldowns outlive the process; credentials are tried anew.
LASTING = {kind.__name__: kind for kind in (RateLimited, QuotaGone, ModelGone, Paused)}


def exhaustion(why: str, last: UpstreamError, wait_s: float) -> PoolExhausted:
    """The error with its advice and, if an account will ever be free, the wait."""
    message = f"{why} {last.advice}"
    if isinf(wait_s):
        return PoolExhausted(message, last, None)
    if wait_s and last.waits:
        message += f" Please try again in {wait_s:.1f}s."
    return PoolExhausted(message, last, wait_s)


class AccountPool:
    """Chooses the account that is asked next. It is told the time, in seconds since 1970, and the
    chance; it never waits."""

    def __init__(
        self, accounts: Sequence[Account], strategy: str = "affinity", reserve: float = 0.0
    ) -> None:
        self._entries: list[PoolEntry] = []
        self._cooldowns = Cooldowns()
        self._ledger = Ledger()
        self._turn = 0.0  # the last one taken: an account that was away does not catch up
        self.update(accounts, strategy, reserve)

    def update(self, accounts: Sequence[Account], strategy: str, reserve: float) -> None:
        """Takes other accounts in. One that is unchanged keeps its state; one that changed keeps
        nothing but a person's pause; one that is gone, nothing."""
        self.accounts = tuple(accounts)
        self._strategy, self._reserve = strategy, reserve
        known = {entry.account.name: entry for entry in self._entries}
        self._entries = [known.get(account.name) or PoolEntry(account) for account in accounts]
        for entry, account in zip(self._entries, accounts, strict=True):
            if entry.account != account:
                entry.adopt(account)
                self._cooldowns.forget(account.name, but="paused")
                self._ledger.unlearn(entry.owners)
        for name in known.keys() - {account.name for account in accounts}:
            self._cooldowns.forget(name)
            self._ledger.unlearn(known[name].owners)
        self._ledger.adopt(self._entries)

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
        """The best account that is not in `tried`, in cooldown or busy; None where there is none.

        By affinity each `key` has an order of accounts of its own, which other accounts do not
        change. A request that was refused asks `again`: it probes an account only where no other is
        ready. The state of each account is added to `seen`. The lease must be released.
        """
        rank_of, doubt = RANKS[self._strategy], ""
        is_careful = again or self._ledger.has_limits
        ready = []
        for place, entry in enumerate(self._entries):
            if entry.account.name in tried:
                state = "was tried"
            elif obstacle := self._obstacle(entry, model, now):
                state = obstacle.describe(now)
            else:
                if is_careful:
                    doubt = self._doubt(entry, model, now, again)
                state = doubt or "is ready"
                ready.append((doubt != "", rank_of(entry, key), place))
            seen.append((entry.account.name, state))
        if not ready:
            return None
        return self._lease(self._entries[min(ready)[2]], model, now)

    def again(self, entry: PoolEntry, model: str, now: float) -> Lease | None:
        """Another lease of an account; None if it is in cooldown or busy by now."""
        if self._obstacle(entry, model, now):
            return None
        return self._lease(entry, model, now)

    def _lease(self, entry: PoolEntry, model: str, now: float) -> Lease:
        lease = Lease(entry, entry.account, model, now, self._ledger.has_limits)
        if self._cooldowns.by_key:
            self._cooldowns.probe(lease, now)
        entry.busy += 1
        self._turn = max(entry.turn, self._turn)
        entry.turn = self._turn + 1 / entry.account.weight
        self._ledger.count(lease, now, requests=1)
        return lease

    def _obstacle(self, entry: PoolEntry, model: str, now: float) -> Cooldown | None:
        """The reason why an account cannot be asked; None where it can."""
        if self._cooldowns.by_key and (cooldown := self._cooldowns.longest(entry, model, now)):
            return cooldown
        if entry.busy >= entry.busy_max:
            return BUSY
        return None

    def _doubt(self, entry: PoolEntry, model: str, now: float, again: bool) -> str:
        """The reason why an account would perhaps refuse, so that it is asked last; else ""."""
        if self._ledger.is_near_limit(entry.project(model), now, 1 - self._reserve):
            return "is near its limit"
        if again and self._cooldowns.of(entry, model):
            return "is to be probed"
        return ""

    def wait_s(self, model: str, tried: Collection[str], now: float) -> float:
        """Seconds until the first account that is not in `tried` may be asked; else infinite."""
        obstacles = (
            self._obstacle(entry, model, now) or UNASKED
            for entry in self._entries
            if entry.account.name not in tried
        )
        return min((obstacle.wait_s(now) for obstacle in obstacles), default=inf)

    # ---- what came of it

    def succeeded(self, lease: Lease, now: float) -> None:
        """Ends the cooldowns that a begun answer probed; forgets learned limits that it exceeds."""
        if lease.probes:
            self._cooldowns.drop(lambda key, cooldown: cooldown in lease.probes)
            lease.probes.clear()
        if self._ledger.has_limits:
            self._ledger.unlearn_exceeded(lease.entry.project(lease.model), now)

    def failed(self, lease: Lease, error: UpstreamError, now: float, chance: float) -> None:
        """An attempt was refused. Releases the lease; `chance`, from 0 to 1, spreads the probes."""
        self.release(lease, 0, now)
        if error.scope == "nobody" or lease.account is not lease.entry.account:
            return  # a reload may have changed it meanwhile
        name, project = lease.account.name, lease.entry.project(lease.model)
        keys = {"account": (name, ""), "model": (name, lease.model), "project": project}
        self._cooldowns.begin(keys[error.scope], error, lease.probes, now, chance)
        if error.scope == "project" and lease.begun // 60 == now // 60:
            self._ledger.count(lease, now, requests=-1)  # Gemini does not count what it refuses
        if error.limit and error.quota in QUOTAS:
            self._ledger.learn(project, error.quota, error.limit, now)

    def release(self, lease: Lease, tokens: int, now: float) -> None:
        """The end of a request; a probe without a verdict is left to the next one."""
        if lease.ended:
            return
        lease.ended = True
        lease.entry.busy -= 1
        for cooldown in lease.probes:
            if cooldown.prober is lease:
                cooldown.prober = None
        self._ledger.count(lease, now, tokens=tokens)

    def exhausted(
        self, model: str, refusals: Mapping[str, UpstreamError], now: float
    ) -> PoolExhausted:
        """An error of the class of the last refusal, else of the account that is free soonest, with
        the wait for that one and the reason of each.

        A lasting reason (a day's quota, credentials, that there is no such model) is its class only
        where no account is free soon.
        """
        if not self._entries:
            none = Overloaded("no account")
            return PoolExhausted("No account is configured. Add one under accounts.", none, None)
        reasons, waits = self._reasons(model, refusals, now)
        soonest = [reasons[name] for name in sorted(waits, key=waits.__getitem__)]
        error = min([*refusals.values()][::-1] + soonest, key=lambda error: error.lasting)
        why = "; ".join(f"{name}: {each.message.rstrip('.')}" for name, each in reasons.items())
        if not isinstance(error, ModelGone):  # then nobody waits for those without the model
            waits |= {n: inf for n, each in reasons.items() if isinstance(each, ModelGone)}
        return exhaustion(f"No account could answer ({why}).", error, min(waits.values()))

    def _reasons(
        self, model: str, refusals: Mapping[str, UpstreamError], now: float
    ) -> tuple[dict[str, UpstreamError], dict[str, float]]:
        """The reason why each account did not answer, and the seconds until it may."""
        reasons = {}
        waits = {}
        for entry in self._entries:
            name, obstacle = entry.account.name, self._obstacle(entry, model, now) or UNASKED
            reasons[name] = reason = refusals.get(name, obstacle.error)
            waits[name] = obstacle.wait_s(now)
            if name in refusals and reason.scope == "nobody":
                waits[name] = reason.retry_after_s or 1.0
        return reasons, waits

    # ---- what a person sees, and steers

    def steer(self, action: str, name: str, model: str) -> bool:
        """Resets, pauses or resumes an account or one model of it; False if there is none."""
        owners = {entry.account.name: entry.owners for entry in self._entries}.get(name)
        if owners is None:
            return False
        if action == "pause":
            paused = Cooldown(Paused("A person paused it."), inf)
            self._cooldowns.add((name, model), paused)
        elif action == "resume":
            self._cooldowns.drop(
                lambda key, cooldown: key == (name, model) and cooldown.error.quota == "paused"
            )
        else:
            for owner in owners:
                self._cooldowns.forget(owner, model)
            if not model:
                self._ledger.unlearn(owners)
        return True

    def status(self, now: float) -> list[JsonObject]:
        """The state of each account, and its state, counts and limits for each model asked for."""
        return [self._status(entry, now) for entry in self._entries]

    def _status(self, entry: PoolEntry, now: float) -> JsonObject:
        known = (*self._ledger.uses, *self._cooldowns.by_key)
        models = dict.fromkeys(model for owner, model in known if model and owner in entry.owners)
        return {
            "account": entry.account.name,
            "kind": entry.account.kind,
            "quota_group": entry.account.quota_group,
            "in_flight": entry.busy,
            "state": self._state(entry, "", now),
            "models": [self._model_status(entry, model, now) for model in models],
        }

    def _model_status(self, entry: PoolEntry, model: str, now: float) -> JsonObject:
        own = self._ledger.use((entry.account.name, model), now)
        key = entry.project(model)
        limits = self._ledger.limits(key, self._ledger.use(key, now))
        return {
            "model": model,
            "state": self._state(entry, model, now),
            "limits": limits,
        } | own.counts

    def _state(self, entry: PoolEntry, model: str, now: float) -> str:
        if obstacle := self._obstacle(entry, model, now):
            return obstacle.describe(now)
        return "is ready"

    # ---- what outlives the process

    def rows(self) -> dict[str, str]:
        """Texts by name for `restore`: cooldowns of quotas and models, pauses, counts of today."""
        fingerprints = self._fingerprints()
        rows = [*self._cooldown_rows(), *self._use_rows()]
        return {dumps(key): json.dumps([fingerprints.get(key[1]), *value]) for key, value in rows}

    def _cooldown_rows(self) -> Iterable[tuple[list[str], list[Any]]]:
        for (owner, model), cooldowns in self._cooldowns.by_key.items():
            for quota, each in cooldowns.items():
                error = each.error
                if (kind := type(error).__name__) in LASTING:
                    value = [kind, error.message, error.code, each.until, each.strikes]
                    yield ["rest", owner, model, quota], value

    def _use_rows(self) -> Iterable[tuple[list[str], list[Any]]]:
        for (owner, model), use in self._ledger.uses.items():
            if use.day_end == self._ledger.day_end:
                today = [use.counts["requests_per_day"], use.counts["tokens_per_day"]]
                yield ["use", owner, model], [use.day_end, today, use.learned]

    def restore(self, rows: Mapping[str, str], now: float) -> None:
        """Takes back what `rows` gave, unless its day is over. Only a pause outlives the account's
        credentials."""
        fingerprints = self._fingerprints()
        for name, text in rows.items():
            with suppress(LookupError, TypeError, ValueError):  # another version's
                key, (mark, *value) = json.loads(name), json.loads(text)
                if key[3:] == ["paused"] or mark == fingerprints[key[1]]:
                    self._restore_row(key, value, now)

    def _restore_row(self, name: Any, value: Any, now: float) -> None:
        match name, value:
            case ["rest", owner, model, quota], [kind, message, code, until, strikes]:
                error = LASTING[kind](message, code=code)
                error.quota = quota
                self._cooldowns.add((owner, model), Cooldown(error, until, strikes))
            case ["use", owner, model], [day_end, today, learned] if (
                now < day_end <= now + DAY_S_MAX
            ):
                self._ledger.restore((owner, model), today, learned, now)

    def _fingerprints(self) -> dict[str, str]:
        """A fingerprint of each account's credentials, so that a row is not restored for another
        key that came under the same name. A project has its name."""
        marks = {owner: owner for entry in self._entries for owner in entry.owners}
        for one in self.accounts:
            login = f"{one.client_id}\n{one.refresh_token}\n{one.service_account}\n{one.project}"
            marks[one.name] = hashlib.sha256(encoded(f"{one.api_key}\n{login}")).hexdigest()[:8]
        return marks


# ==============================================================================
# 16. Journal
# ==============================================================================

JOURNAL_MAX = 1000  # requests that `agproxy why` can explain: the last minutes of a busy day


@dataclass(slots=True)
class Decision:
    """One choice of the retry loop: the state of each account, the one asked, and its answer."""

    model: str
    seen: list[tuple[str, str]] = field(default_factory=list)
    account: str = ""  # nobody, where none could be asked
    answer: str = ""
    wait_s: float = 0.0  # how long was waited after it


@dataclass(slots=True)
class Trace:
    """The record of one request, for its headers, its log line and `agproxy why`."""

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
    decisions: list[Decision] = field(default_factory=list)
    first_byte: float | None = None
    usage: Usage | None = None
    changes: int = 0  # how many there were: the changes themselves would be too much to keep
    strict: bool = False
    error: str = ""  # the code of the error that broke off a stream

    def ms_until(self, moment: float) -> int:
        return round(1000 * (moment - self.started))


def decisions_of(trace: Trace) -> list[JsonObject]:
    """The decisions in JSON, as an error's body and `agproxy why` show them."""
    return [
        {
            "model": decision.model,
            "considered": dict(decision.seen),
            "chosen": decision.account or None,
            "answer": decision.answer or None,
            "waited_s": round(decision.wait_s, 2),
        }
        for decision in trace.decisions
    ]


class Journal:
    """The last exchanges, for `agproxy why`, and sums over all since the start, for the bill."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Trace, int, float]] = deque(maxlen=JOURNAL_MAX)
        self._requests = self._failed = self._prompt = self._completion = 0
        self._accounts: Counter[str] = Counter()

    def add(self, trace: Trace, status: int, now: float) -> None:
        if trace.model:
            self._requests += 1
            self._failed += status >= 400 or bool(trace.error)
        if trace.account and status < 400:
            self._accounts[trace.account.name] += 1
            if trace.usage:
                self._prompt += trace.usage.prompt
                self._completion += trace.usage.completion
        if trace.decisions:
            self._entries.append((trace, status, now))

    def find(self, id: str) -> JsonObject | None:
        """The log's fields of a request and the decisions of its retry loop; None where it is not
        known.
        """
        for trace, status, ended in self._entries:
            if trace.id == id:
                return log_fields(trace, status, ended) | {"decisions": decisions_of(trace)}
        return None

    def bill(self) -> str:
        accounts = ", ".join(f"{name} {count}" for name, count in self._accounts.items()) or "none"
        tokens = f"{self._prompt} tokens in, {self._completion} out"
        requests = f"{self._requests} request{'s' * (self._requests != 1)}"
        return f"{requests} ({self._failed} failed), {tokens}; accounts: {accounts}"


@lru_cache(1024)
def masked(name: str) -> str:
    """An e-mail with its first letter and domain left; any other name as it is."""
    return re.sub(r"^(.)[^@]*@", r"\1***@", name)


def log_fields(trace: Trace, status: int, now: float) -> JsonObject:
    """The fields of a finished request's log line; never a prompt, never a key."""
    fields = {
        "id": trace.id,
        "client_id": trace.client_id,
        "client": trace.client,
        "route": trace.route,
        "model": trace.model,
        "mapped_model": trace.mapped_model,
        "account": trace.account and trace.account.name,
        "attempts": trace.attempts,
        "status": status,
        "error": trace.error,
        "first_ms": None if trace.first_byte is None else trace.ms_until(trace.first_byte),
        "ms": trace.ms_until(now),
        "tokens": trace.usage and f"{trace.usage.prompt}+{trace.usage.completion}",
    }
    return {key: value for key, value in fields.items() if value not in (None, "")}


def log_text(fields: JsonMap) -> str:
    """The fields as one line; control characters are escaped, so that no client forges a line."""
    others = dict(fields)
    words = [others.pop("id"), others.pop("route")]
    if model := others.pop("model", ""):
        words.append(f"{model} -> {others.pop('mapped_model', '?')}")
    words += [f"{key}={value}" for key, value in others.items()]
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]",
        lambda match: f"\\x{ord(match[0]):02x}",
        " ".join(words),
    )


# ==============================================================================
# 17. Store
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
    told in the log and everything is kept in memory, as without a path. Other programs may read the
    file meanwhile. What was committed outlives a killed process. Source:
    https://www.sqlite.org/wal.html
    """

    def __init__(self, path: Path | None) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.path = path
        self.process = secrets.token_hex(8)  # tells the rows of this process from older ones
        self._thread = ThreadPoolExecutor(1, "agproxy-store")
        self._files = ExitStack()
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
        self._files.enter_context(closing(connection))
        connection.executescript(DATABASE_TABLES)
        return connection

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._files.close)
        self._thread.shutdown()


@contextmanager
def file_held(path: Path) -> Iterator[None]:
    """Holds a file that the gateway of a store holds; in a killed process that ends, too.

    SQLite's lock is the one that all systems have. Raises OSError, and sqlite3.Error.
    """
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    with closing(connection):
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
        """The key that seals what clients carry; each gateway with this file has the same one.

        Without a usable file it is one that lasts as long as the process.
        """

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
        """Stops counting a response as running. If its end was not written, no client finds it."""
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
            with suppress(sqlite3.OperationalError):  # a full disk can be read
                connection.executemany("UPDATE responses SET used = ? WHERE id = ?", unused)
            return found[::-1]

        return await self._database.run(read)

    def _stored(self, id: str, *columns: Any) -> StoredResponse | None:
        """The response of a row; None if its end could not be written."""
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
    """Empties SQLite's journal, so that nothing deleted stays in it.

    It does not wait long for another program that is still reading.
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
            with suppress(TimeoutError):
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
# 18. Credentials
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

    @cached_property
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
        """The header that lets the account in; with a new token if the upstream `refused` this one.

        Raises CredentialRefused, AccountBarred and TokenTrouble.
        """
        if account.kind == "gemini":
            return {"x-goog-api-key": account.api_key}
        key = (account.token_url, account.client_id, account.refresh_token, account.service_account)
        token = self._tokens.setdefault(key, Token())
        renew = partial(self._renew, account, token)
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

    async def _ask_token(self, account: Account, form: Mapping[str, str], wanted: str) -> JsonMap:
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
        find = partial(self._find_project, account, header)
        found = await self._shared.do(("project", account.name), find)
        self._projects[account.name] = found
        return found

    def forget_project(self, account: Account) -> None:
        """Has the account's project asked for anew: after a refusal it may be another one."""
        self._projects.pop(account.name, None)

    async def _find_project(self, account: Account, header: Mapping[str, str]) -> str:
        """Raises CredentialRefused with what keeps the account out."""
        ask = partial(self._ask_service, account, header)
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
    ) -> JsonObject:
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


def no_project(account: Account, answer: JsonMap) -> CredentialRefused:
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
    bypass = environment.proxy_bypass_environment  # type: ignore[attr-defined]
    if not proxy or bypass(parts.netloc, proxies):
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

    Source:
    https://developers.google.com/identity/protocols/oauth2/service-account#authorizingrequests
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


def token_error(account: Account, status: int, answer: JsonMap) -> UpstreamError:
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
# 19. Transport
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

    def __init__(self, loop: asyncio.AbstractEventLoop, timeouts: Timeouts) -> None:
        self.status = 0  # until the head has come
        self.headers: Mapping[str, str] = {}  # by names in lower case
        self._loop = loop
        self._begins_by = loop.time() + timeouts.first_event_s
        self._idle_s = timeouts.idle_s
        self._over = False
        self._error: UpstreamError | None = None

    @abstractmethod
    async def more(self, *, first: bool = False) -> bytes:
        """All that has come since, or b"" at the end. Silence counts only while somebody waits.

        Until something of the body is understood (`first`), it must come within first_event_s of
        the request. Afterwards no silence may last longer than idle_s.
        """

    @abstractmethod
    def abort(self, error: UpstreamError | None = None) -> None:
        """Ends an answer that is not over yet. The error is raised to whoever waits for more."""

    def deadline(self, first: bool) -> float:
        """The moment of the loop's clock until which `more` waits."""
        if first:
            return self._begins_by
        return self._loop.time() + self._idle_s

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
        super().__init__(connection.loop, timeouts)
        self._connection = connection
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False

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
        if not await self._connection.heard(self.deadline(first)):
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


@lru_cache(256)
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


@cache
def tls_context() -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context()


class ProxiedIncoming(Incoming):
    """An answer of aiohttp's client, which pauses by itself."""

    def __init__(self, timeouts: Timeouts, proxy: str | None) -> None:
        super().__init__(asyncio.get_running_loop(), timeouts)
        self._proxy = proxy
        self._response: aiohttp.ClientResponse

    async def head(self, asked: Awaitable[aiohttp.ClientResponse]) -> None:
        """Returns once status and headers are there. Raises as `more`."""
        try:
            async with asyncio.timeout_at(self.deadline(first=True)):
                self._response = await asked
        except TimeoutError:
            raise too_slow(first=True) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise broken_over(self._proxy, error) from None
        self.status, headers = self._response.status, self._response.headers
        self.headers = {name.lower(): value for name, value in headers.items()}

    async def more(self, *, first: bool = False) -> bytes:
        data = b""
        try:
            async with asyncio.timeout_at(self.deadline(first)):
                data = await self._response.content.readany()  # b"" at the end
        except TimeoutError:
            self.abort(too_slow(first))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
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
        """Does what `DirectTransport.send` does. Raises UpstreamTimeout and UpstreamBroken."""
        method = "GET" if body is None else "POST"
        incoming = ProxiedIncoming(self._timeouts, self.proxy)
        sent: JsonObject = {"data": body, "headers": headers, "allow_redirects": False}
        await incoming.head(
            self._session.request(method, self._url + path, proxy=self.proxy, **sent)
        )
        return incoming

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
# 20. Media
# ==============================================================================

MEDIA_BYTES_MAX = 20 << 20
MEDIA_LINKS_MAX = 16
MEDIA_S_MAX = 20.0
REDIRECTS_MAX = 5
# What Gemini itself follows: its Files API, YouTube, and on Vertex a bucket.
PASSED_LINKS = re.compile(
    r"(?i)https://(generativelanguage\.googleapis\.com/v1beta/files/"
    r"|(www\.)?youtube\.com/|youtu\.be/)|gs://"
)


class MediaFetcher:
    """Fetches what requests only link to; no address but a public one is ever asked."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        # imported late
        resolver: Any = PublicResolver(self._may_ask)  # no class of aiohttp's: it is imported late
        connector = aiohttp.TCPConnector(resolver=resolver)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def close(self) -> None:
        if "_session" in self.__dict__:
            await self._session.close()

    async def filled(self, request: Request) -> Request:
        """The request with the content of its links.

        Raises BadRequest with the path of the part.
        """
        links = {part.url: part for message in request.messages for part in links_in(message.parts)}
        if not links:
            return request
        if len(links) > MEDIA_LINKS_MAX:
            raise BadRequest(
                f"There are {len(links)} links to media. Send at most {MEDIA_LINKS_MAX}.",
                code="invalid_value",
            )
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
            # which reads digits of any script
            asked = aiohttp.client.URL(url)  # type: ignore[attr-defined]
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
        # whatever it is asked
        found = await self._resolver.resolve(host, port, family)  # type: ignore[arg-type]
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
# 21. Wire
# ==============================================================================

MODELS_FRESH_S = 3600.0  # new models are seen within an hour
MODELS_RETRY_S = 60.0
MODEL_PAGES_MAX = 100
MODELS_WAIT_S = 3.0  # a chat waits no longer for the list of models


START = secrets.token_hex(8)
# 24 hexadecimal digits that no other start of a gateway gives, at a tenth of what chance costs a
# request.
next_id = (f"{START}{number:08x}" for number in itertools.count(1)).__next__
quoted_model = lru_cache(256)(quote)


# ---- the wire


class Wire:
    """Calls of an account's upstream: its transport, its credential, and the envelope that its kind
    wants.
    """

    def __init__(self, config: Config, credentials: Credentials, *, direct: bool = True) -> None:
        self.credentials = credentials
        self._direct = direct
        self._opened: dict[
            tuple[str, str | None, Timeouts], DirectTransport | ProxiedTransport
        ] = {}
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Goes on with another config; calls that run are finished over the transports of the old
        one.
        """
        self._config = config
        self._transports: dict[tuple[str, str | None], DirectTransport | ProxiedTransport] = {}

    def transport_to(self, account: Account) -> DirectTransport | ProxiedTransport:
        url, timeouts = account.base_url, self._config.timeouts
        proxy = proxy_for(url, account.proxy or self._config.upstream_proxy)
        transport = self._opened.get((url, proxy, timeouts))
        if transport is None and proxy is None and self._direct:
            transport = DirectTransport(url, timeouts)
        elif transport is None:
            transport = ProxiedTransport(url, proxy, timeouts)
        self._transports[url, account.proxy] = self._opened[url, proxy, timeouts] = transport
        return transport

    async def post(self, account: Account, model: str, method: str, body: bytes) -> Incoming:
        """The head of an answer.

        Where a token is refused, that of a second try with a fresh one. Raises UpstreamError.
        """
        known = self._transports.get((account.base_url, account.proxy))
        transport, refused = known or self.transport_to(account), ""
        while True:
            header, project = {"x-goog-api-key": account.api_key}, ""
            if account.kind != "gemini":
                header = await self.credentials.header(account, refused)
                project = await self.credentials.project(account, header)
            path, data = enveloped(account, project, model, method, body)
            headers = {**header, "Content-Type": "application/json", "User-Agent": USER_AGENT}
            incoming = await transport.send(path, headers, data)
            if incoming.status != 401 or account.kind == "gemini" or refused:
                return incoming
            incoming.abort()
            refused = header["Authorization"]

    async def call(self, account: Account, model: str, method: str, body: bytes) -> JsonObject:
        """The object that a method answers. Raises UpstreamError."""
        answer = await json_of(await self.post(account, model, method, body))
        if not isinstance(answer, dict):
            raise UpstreamBroken("Gemini sent something that cannot be understood. Try again.")
        return answer

    async def get(self, account: Account, path: str) -> Incoming:
        headers = {"x-goog-api-key": account.api_key, "User-Agent": USER_AGENT}
        return await self.transport_to(account).send(path, headers, None)

    async def close(self) -> None:
        await self.credentials.close()
        for transport in self._opened.values():
            await transport.close()


def enveloped(
    account: Account, project: str, model: str, method: str, body: bytes
) -> tuple[str, bytes]:
    """The path and the body of a call, as the account's kind of upstream wants them.

    Source: https://ai.google.dev/api/generate-content,
    https://cloud.google.com/vertex-ai/docs/reference/rest
    """
    if account.kind == "gemini":
        return f"/v1beta/models/{quoted_model(model)}:{method}", body
    if account.kind == "vertex":
        place = f"projects/{quote(project)}/locations/{account.location}/publishers/google"
        return f"/v1/{place}/models/{quoted_model(model)}:{method}", body
    if method == "countTokens":
        return f"/v1internal:{method}", body
    envelope = dump_bytes({"model": model, "project": project})
    return f"/v1internal:{method}", b'%b,"request":%b}' % (envelope[:-1], body)


async def json_of(incoming: Incoming) -> Any:
    """The JSON of an answer.

    Raises what a status other than 200 means, and the transport's errors.
    """
    answer = parse_json(await incoming.read())
    if incoming.status != 200:
        raise classify_error(incoming.status, answer, incoming.headers.get("retry-after", ""))
    return answer


# ---- models


class Catalog:
    """The models that the accounts' upstreams list, and which of them a client's name means."""

    def __init__(self, config: Config, wire: Wire) -> None:
        self._wire = wire
        self._shared = Shared()
        self._listed: tuple[str, ...] | None = None
        self._listing: asyncio.Task[None] | None = None
        self._warn_once = lru_cache(1024)(log.warning)
        self.skew_s = 0.0  # seconds by which this machine's clock is ahead of an upstream's
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        self._config = config
        self._fresh_until = 0.0
        self._map = lru_cache(1024)(lambda name, listed: map_model(name, config, listed))
        self.traits_of = lru_cache(lambda model: traits_of(model, config.traits))

    def close(self) -> None:
        self._shared.close()

    async def resolve(self, name: str) -> str:
        """The upstream's name for a model. Raises ModelNotFound."""
        fresh = self._listed is not None and time.monotonic() < self._fresh_until
        mapped = self._map(name, self._listed if fresh else await self.listed())
        if mapped.wished:
            text = "%s is not listed by the upstream; %s is asked instead"
            self._warn_once(text, mapped.wished, mapped.model)
        return mapped.model

    def chain(self, model: str, name: str) -> list[str]:
        """A model, then those that models.fallback names for it, or else for the client's name;
        unknown ones are left out.
        """
        chain = {model: None}
        for other in self._config.fallback.get(model) or self._config.fallback.get(name, ()):
            try:
                chain[self._map(other, self._listed).model] = None
            except ModelNotFound as error:
                self._warn_once("models.fallback: %s", error.message)
        return list(chain)

    async def listed(self) -> tuple[str, ...] | None:
        """The listed models, fetched at the first need and renewed beside the requests; None while
        unknown.
        """
        if time.monotonic() >= self._fresh_until:
            self._fresh_until = time.monotonic() + MODELS_RETRY_S
            self._listing = self._shared.start(("models", id(self._config)), self._list)
        if self._listed is None and self._listing:
            await asyncio.wait({self._listing}, timeout=MODELS_WAIT_S)
        return self._listed

    async def _list(self) -> None:
        """Asks every account, for they may differ in their models.

        If one fails, the models known so far stay listed, for they may be its own.
        """
        config, fresh_s = self._config, MODELS_FRESH_S
        accounts = [account for account in config.accounts if account.kind == "gemini"]
        names: dict[str, None] = {}
        answers = await asyncio.gather(*map(self.models_of, accounts), return_exceptions=True)
        for account, answer in zip(accounts, answers, strict=True):
            if isinstance(answer, tuple):
                names |= dict.fromkeys(answer)
                continue
            log.debug("the models of %s cannot be listed: %s", account.name, answer)
            if not isinstance(answer, CredentialRefused):
                names |= dict.fromkeys(self._listed or ())
                fresh_s = MODELS_RETRY_S
        if names and self._config is config:  # else other accounts may have other ones
            self._listed = tuple(names)
            self._fresh_until = time.monotonic() + fresh_s

    async def models_of(self, account: Account) -> tuple[str, ...]:
        """The models that one account lists. Raises UpstreamError.

        Vertex and v1internal have no list: where they count the tokens of a word, the best known
        models stand for it.
        """
        ask = self._pages_of if account.kind == "gemini" else self._known_of
        try:
            async with asyncio.timeout(self._config.timeouts.connect_s + MODELS_WAIT_S):
                return await ask(account)
        except TimeoutError:
            raise too_slow(first=True) from None
        except MISSHAPEN:
            raise UpstreamBroken(
                "What answers at base_url is not Gemini. Check base_url."
            ) from None

    async def _known_of(self, account: Account) -> tuple[str, ...]:
        model = STATIC_MODELS[1]
        contents = b'{"contents":[{"role":"user","parts":[{"text":"hi"}]}]}'
        body = countable(account.kind, model, contents)
        answer = await self._wire.call(account, model, "countTokens", body)
        return STATIC_MODELS[:3] if answer["totalTokens"] else ()

    async def _pages_of(self, account: Account) -> tuple[str, ...]:
        """Source: https://ai.google.dev/api/models#method:-models.list"""
        names = []
        page = ""
        for _ in range(MODEL_PAGES_MAX):
            path = f"/v1beta/models?pageSize=1000&pageToken={quote(page)}"
            incoming = await self._wire.get(account, path)
            self.skew_s = clock_skew(incoming.headers.get("date"), time.time())
            answer = await json_of(incoming)
            for model in answer["models"]:
                methods = model.get("supportedGenerationMethods", ())
                if {"generateContent", "embedContent"} & set(methods):
                    names.append(model["name"].removeprefix("models/"))
            page = answer.get("nextPageToken") or ""
            if not page:
                break
        return tuple(names)


def clock_skew(date: str | None, now: float) -> float:
    """Seconds by which this machine's clock is ahead of an answer's Date header; 0 without one."""
    from email.utils import parsedate_to_datetime

    try:
        return now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, OverflowError):
        return 0.0


# ==============================================================================
# 22. Upstream
# ==============================================================================

EMBEDDINGS_A_CALL = 100  # Gemini's own limit of batchEmbedContents
RELOAD_CHECK_S = 1.0  # a reload, or a person, is noticed within a second
PAUSE_S = (0.2, 1.0)  # before the same account is asked again, where nobody says how long
Barred = Mapping[str, UpstreamError]


@dataclass(eq=False, slots=True)
class Answer:
    """One answer that has begun, pulled by `async for`: a list of events for each read, until Ended
    or Failed.

    Its first events are known, so nobody retries any more.
    """

    _first: list[Event]
    _incoming: Incoming
    _reader: GeminiReader | None  # None once the answer is read to its end
    signed: Sequence[ToolCall | Text]  # the parts that Gemini signed, so far
    last: Event | None = None
    on_close: Callable[[Event | None], None] | None = None  # is given the last event
    _late: UpstreamError | None = None
    _alarm: asyncio.TimerHandle | None = None

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> list[Event]:
        events, self._first = self._first, []
        while not events and (reader := self._reader):
            data = b""
            try:
                data = await self._incoming.more()
            except UpstreamTimeout as error:
                self._late = self._late or error
            except UpstreamBroken:
                pass  # the reader knows whether the answer was whole
            events = reader.feed(data) if data else reader.close(self._late)
            if not data or reader.error:
                self._reader = None
                if data:
                    self._incoming.abort()  # nobody waits for what is behind an error
        if not events:
            raise StopAsyncIteration
        self.last = events[-1]
        if self._reader is None:
            self.close()  # the account is free as soon as its answer is there
        return events

    @property
    def closed(self) -> bool:
        return self.on_close is None

    def end_within(self, left_s: float) -> None:
        """Lets the answer go on for `left_s` at most; then it is broken off."""
        text = "The answer took longer than proxy.timeouts.total_s. Raise it, or ask for less."
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(left_s, self.break_off, UpstreamTimeout(text))

    def break_off(self, error: UpstreamError) -> None:
        """Ends the answer; unless it was whole, its last event says why."""
        self._late = error
        self._incoming.abort()

    async def whole(self) -> Answer:
        """Reads the answer to its end. Raises the error that it ends with."""
        try:
            events = [event async for some in self for event in some]
        finally:
            self.close()
        if isinstance(self.last, Failed):
            raise self.last.error
        return Answer(events, self._incoming, None, self.signed)

    def close(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        if self._reader:
            self._incoming.abort()  # nobody waits for what is still to come
        if self.on_close:
            over = isinstance(self.last, Ended | Failed)
            self.on_close(self.last if over else None)
            self.on_close = None


class Merged:
    """Several answers as one: choices numbered through, usage added up; the first failure ends them
    all.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._usage = Usage()
        self._reads: dict[asyncio.Task[list[Event]], int] | None = None  # by choice

    def __aiter__(self) -> Merged:
        return self

    async def __anext__(self) -> list[Event]:
        """The events that all answers had meanwhile, under the numbers of their choices."""
        if self._reads is None:
            self._reads = {}
            for choice in range(len(self._answers)):
                self._read(choice)
        if not self._reads:
            raise StopAsyncIteration
        done, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
        events = []
        for task in sorted(done, key=self._reads.__getitem__):
            choice = self._reads.pop(task)
            events += self._renumbered(choice, task.result())
            if events and isinstance(events[-1], Failed):
                self.close()  # else the others would write behind the end
                return events
            if not isinstance(self._answers[choice].last, Ended):
                self._read(choice)
        return events if self._reads else [*events, Ended(self._usage)]

    def _read(self, choice: int) -> None:
        assert self._reads is not None
        self._reads[asyncio.create_task(anext_of(self._answers[choice]))] = choice

    def _renumbered(self, choice: int, events: list[Event]) -> list[Event]:
        if isinstance(events[-1], Ended):
            self._usage += events[-1].usage
            events = events[:-1]
        return [renumbered(event, choice) for event in events]

    @property
    def closed(self) -> bool:
        return all(answer.closed for answer in self._answers)

    @property
    def signed(self) -> list[ToolCall | Text]:
        return [part for answer in self._answers for part in answer.signed]

    def break_off(self, error: UpstreamError) -> None:
        for answer in self._answers:
            answer.break_off(error)

    def close(self) -> None:
        for task in self._reads or ():
            task.cancel()
        self._reads = {}
        for answer in self._answers:
            answer.close()


async def anext_of(answer: Answer) -> list[Event]:
    return await anext(answer)


def renumbered(event: Event, choice: int) -> Event:
    if isinstance(event, Started | Ended | Failed):
        return event
    return replace(event, choice=choice)


def close_answer(asked: asyncio.Task[Answer]) -> None:
    """Ends an answer for which nobody waits any more."""
    if not asked.cancelled() and not asked.exception():
        asked.result().close()


# ---- the retry loop


class Question(Protocol[Answered_co]):
    """A call of Gemini that the retry loop makes of one account after another, whatever its body
    comes from.
    """

    barred: Barred  # accounts that cannot answer it, and why; nobody writes to it

    async def ask(self, lease: Lease) -> Answered_co:
        """Makes one attempt. Raises UpstreamError."""

    def mends(self, error: UpstreamError) -> bool:
        """Changes the body so that the same account may be asked again; false where that cannot
        help.
        """
        return False


@value
class RequestBody:
    """A request's body as one model wants it, and what could not be carried into it."""

    data: bytes
    changes: tuple[Change, ...]
    tools: Mapping[str, Tool]


@dataclass(eq=False)
class Generation(Question[Answer]):
    """The question of a translated request: a body for each model, made at the first need of it."""

    request: Request
    _wire: Wire
    _catalog: Catalog
    _signatures: SignatureMemory
    _trace: Trace
    _bodies: dict[str, RequestBody] = field(default_factory=dict)
    _unsigned: bool = False
    _reduced: bool = False
    barred: Barred = field(default_factory=dict)

    def body_for(self, model: str) -> RequestBody:
        """Builds the body. Raises BadRequest where something is lost that may not be."""
        body = self._bodies.get(model)
        if body is None:
            request = self.request
            if self._signatures.known:
                request = self._signatures.recall(request, model)
            if self._unsigned:
                request = with_signatures(request, unsigned)
            traits = self._catalog.traits_of(model)
            built = build_generate_content(request, traits, reduce_schemas=self._reduced)
            data = dump_bytes(built.body)
            if request.payloads:
                data = put_back(data, request.payloads)
            body = RequestBody(data, request.changes + built.changes, built.tools)
            self._bodies[model] = body
        self._trace.changes = len(body.changes)
        if self._trace.strict:
            refuse_dropped(body.changes)
        return body

    def mends(self, error: UpstreamError) -> bool:
        """Leaves out signatures, or reduces schemas, after a refusal of them: each once."""
        mended = False
        if isinstance(error, SignatureRefused) and not self._unsigned:
            self._unsigned = mended = True
        elif isinstance(error, SchemaRefused) and not self._reduced:
            mended = any(b'JsonSchema":' in body.data for body in self._bodies.values())
            self._reduced = mended
        if mended:
            self._bodies.clear()
        return mended

    async def ask(self, lease: Lease) -> Answer:
        account, request, body = lease.account, self.request, self.body_for(lease.model)
        kind = CloudCodeReader if account.kind == "cloudcode" else GeminiReader
        reader = kind(
            lambda: f"call_{next_id()}",
            body.tools,
            parallel_calls=request.parallel_calls,
            secret=account.api_key,
            stops=bool(request.stop),
        )
        sse = request.stream or account.kind == "cloudcode"  # which refuses others sooner
        method = "streamGenerateContent?alt=sse" if sse else "generateContent"
        incoming = await self._wire.post(account, lease.model, method, body.data)
        try:
            if incoming.status != 200 or not request.stream:
                return await whole_answer(incoming, reader, sse)
            while data := await incoming.more(first=True):
                if events := reader.feed(data):
                    break
            else:
                events = reader.close()
            if isinstance(events[-1], Failed):
                raise events[-1].error
        except BaseException:
            incoming.abort()
            raise
        incoming.headers = {}  # a stream may last long
        return Answer(events, incoming, reader if data else None, reader.signed)


async def whole_answer(incoming: Incoming, reader: GeminiReader, sse: bool) -> Answer:
    """An answer that is not streamed on.

    Raises what its status or its end says, and the transport's errors.
    """
    if incoming.status != 200:
        await json_of(incoming)  # which raises
    body = await incoming.read()
    events = reader.feed(body) + reader.close() if sse else reader.whole(body)
    if isinstance(events[-1], Failed):
        raise events[-1].error
    return Answer(events, incoming, None, reader.signed)


@dataclass(eq=False)
class TokenCount(Question[JsonObject]):
    """The question how many tokens a request is. Source: https://ai.google.dev/api/tokens"""

    _generation: Generation
    _wire: Wire
    barred: Barred = field(default_factory=dict)

    async def ask(self, lease: Lease) -> JsonObject:
        body = self._generation.body_for(lease.model).data
        body = countable(lease.account.kind, lease.model, body)
        return await self._wire.call(lease.account, lease.model, "countTokens", body)


@dataclass(eq=False)
class Embedding(Question[JsonObject]):
    """The question of one batch of texts.

    Source: https://ai.google.dev/api/embeddings#method:-models.batchembedcontents
    """

    _texts: Sequence[str]
    _dimensions: int | None
    _wire: Wire
    barred: Barred

    async def ask(self, lease: Lease) -> JsonObject:
        body = dump_bytes(build_embeddings(self._texts, lease.model, self._dimensions))
        answer = await self._wire.call(lease.account, lease.model, "batchEmbedContents", body)
        usage = answer.get("usageMetadata")
        if not isinstance(usage, dict) or not usage_of(usage).prompt:
            estimate = sum(len(text) // 4 + 1 for text in self._texts)
            answer["usageMetadata"] = {"promptTokenCount": estimate}
        return answer


@dataclass(eq=False, slots=True)
class Attempts:
    """The accounts that one request asks for one model, and how long it waits for them."""

    _pool: AccountPool
    _trace: Trace
    _clock: Clock
    _barred: Barred
    _model: str
    _last: bool  # no other model may answer instead
    patience_s: float
    _tried: set[str]
    _refusals: dict[str, UpstreamError]
    decision: Decision = field(default_factory=lambda: Decision(""))
    _same: PoolEntry | None = None  # may be asked once more
    _mended: bool = False  # its body was changed
    _spare: bool = True  # the one further attempt for a fault that is not the account's is left

    async def lease(self) -> Lease:
        """The next account, once it may be asked. Raises PoolExhausted.

        The same one where the body was mended for it; else an untried one; else, for a fault that
        is not its own, the same one, once; else the soonest of those in cooldown, if that is soon:
        then also one that was refused before.
        """
        self.decision = decision = Decision(self._model)
        self._trace.decisions.append(decision)
        again = len(self._refusals) > len(self._barred)
        while True:
            if not self._mended:
                decision.seen.clear()
                now, seen = self._clock(), decision.seen
                tried, key = self._tried, self._trace.affinity
                if lease := self._pool.acquire(self._model, tried, key, now, seen, again):
                    return lease
            if self._same is None:
                await self._wait_for_any()
            elif lease := await self._again(self._same):
                return lease

    async def _again(self, same: PoolEntry) -> Lease | None:
        if not self._mended:
            self._spare = False
            await self._wait(self._pause_s(self._refusals[same.account.name]))
        self._same, self._mended = None, False
        return self._pool.again(same, self._model, self._clock())

    async def _wait_for_any(self) -> None:
        """Waits for the end of a cooldown, of those that were asked before too.

        Raises PoolExhausted.
        """
        lasting = (name for name in self._tried if self._refusals[name].scope == "nobody")
        self._tried = {*lasting, *self._barred}
        wait_s = self._pool.wait_s(self._model, self._tried, self._clock())
        if wait_s > self.patience_s:
            raise self.exhausted()
        await self._wait(min(wait_s, RELOAD_CHECK_S))

    async def _wait(self, wait_s: float) -> None:
        self.patience_s -= wait_s
        self.decision.wait_s += wait_s
        await asyncio.sleep(wait_s)

    def _pause_s(self, error: UpstreamError) -> float:
        """Seconds before the same account is asked again: as it says, where no other model could
        answer sooner.
        """
        wait_s = error.retry_after_s if self._last else None
        if wait_s is None or wait_s > self.patience_s:
            return random.uniform(*PAUSE_S)
        return wait_s

    def refused(self, lease: Lease, error: UpstreamError, mended: bool) -> None:
        """This request asks the account no more, unless its body was `mended` or the fault was not
        the account's.
        """
        self._refusals[lease.account.name] = error
        self._tried.add(lease.account.name)
        self._mended = mended
        once_more = mended or (error.remedy == "same_account" and self._spare)
        self._same = lease.entry if once_more else None

    def exhausted(self) -> PoolExhausted:
        return self._pool.exhausted(self._model, self._refusals, self._clock())


class Upstream:
    """The accounts' Gemini as the doors see it: answers, vectors, counts, by one retry loop."""

    def __init__(self, config: Config, *, direct: bool = True) -> None:
        self.clock: Clock = time.time
        self.pool = AccountPool(())
        self.signatures = SignatureMemory()
        self.wire = Wire(config, Credentials(config, lambda: self.clock()), direct=direct)
        self.catalog = Catalog(config, self.wire)
        # Set when an account is in cooldown for the rest of a day.
        self.long_cooldown = asyncio.Event()
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Goes on with another config; accounts that are the same keep their state, and what runs
        is finished.
        """
        self._config = config
        self.pool.update(config.accounts, config.strategy, config.reserve)
        for part in (self.wire, self.wire.credentials, self.catalog):
            part.adopt(config)

    async def close(self) -> None:
        self.catalog.close()
        await self.wire.close()

    async def ask(self, requests: Sequence[Request], trace: Trace) -> Answer | Merged:
        """An answer that has begun.

        Raises the error that ended the last attempt, PoolExhausted or UpstreamTimeout.
        """
        if len(requests) == 1 and requests[0].n == 1:
            return await self._begin(requests[0], trace)
        return await self._begin_all([one for each in requests for one in choices_of(each)], trace)

    async def _begin_all(self, requests: Sequence[Request], trace: Trace) -> Merged:
        """The answers to all requests, begun in all of them.

        Raises what the first failed one raised.

        Where an account takes few at once, each is read to its end: it would wait for those that
        wait for its account.
        """
        limits = [account.max_concurrency for account in self.pool.accounts]
        room = asyncio.Semaphore(sum(limit or CHOICES_MAX for limit in limits) or 1)

        async def begin(request: Request) -> Answer:
            async with room:
                answer = await self._begin(replace(request, stream=True), trace)
                return await answer.whole() if any(limits) else answer

        tasks = [asyncio.create_task(begin(request)) for request in requests]
        try:
            return Merged(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
                task.add_done_callback(close_answer)
            raise

    async def _begin(self, request: Request, trace: Trace) -> Answer:
        total_s = self._config.timeouts.total_s
        asked = self._retry(self._generation(request, trace), trace)
        if not total_s:
            return await asked
        try:
            async with asyncio.timeout(total_s):
                answer = await asked
        except TimeoutError:
            raise UpstreamTimeout(
                "No answer began within proxy.timeouts.total_s. Raise it, or try again."
            ) from None
        answer.end_within(total_s - (time.monotonic() - trace.started))
        return answer

    def _generation(self, request: Request, trace: Trace) -> Generation:
        """The question, with its changes counted even where nobody can be asked.

        Raises BadRequest by `strict`.
        """
        generation = Generation(request, self.wire, self.catalog, self.signatures, trace)
        generation.body_for(trace.mapped_model)
        return generation

    async def count(self, request: Request, trace: Trace) -> int:
        """The number of tokens of a request. Raises as `ask`."""
        question = TokenCount(self._generation(request, trace), self.wire)
        return count_of((await self._retry(question, trace)).get("totalTokens"))

    async def embed(self, request: EmbeddingRequest, trace: Trace) -> tuple[list[list[float]], int]:
        """The vectors of the texts, in their order, and how many tokens they took.

        Raises as `ask`.
        """
        vectors: list[list[float]] = []
        tokens, model = 0, trace.mapped_model
        others = [account.name for account in self.pool.accounts if account.kind != "gemini"]
        refusal = ModelGone("makes no embeddings, only accounts of kind gemini do")
        while len(vectors) < len(request.texts):
            texts = request.texts[len(vectors) : len(vectors) + EMBEDDINGS_A_CALL]
            batch = Embedding(texts, request.dimensions, self.wire, dict.fromkeys(others, refusal))
            answer = await self._retry(batch, trace)
            if trace.mapped_model != model and vectors:
                # vectors of two models cannot be compared: all are made anew
                vectors, tokens, model = [], 0, trace.mapped_model
                continue
            model = trace.mapped_model
            vectors += read_embeddings(answer, len(texts))
            tokens += usage_of(answer["usageMetadata"]).prompt
        return vectors, tokens

    # ---- the one retry loop

    async def _retry(self, question: Question[Answered_co], trace: Trace) -> Answered_co:
        """Asks for the model, then for those of models.fallback, while no account can answer for
        one.

        Raises PoolExhausted, or the error that every account would give.
        """
        model, barred = trace.mapped_model, question.barred
        chain, patience_s = [model], self._config.max_wait_s
        if self._config.fallback:
            chain = self.catalog.chain(model, trace.model)
        for trace.mapped_model in chain:
            last = trace.mapped_model == chain[-1]
            attempts = Attempts(
                self.pool,
                trace,
                self.clock,
                barred,
                trace.mapped_model,
                last,
                patience_s,
                set(barred),
                dict(barred),
            )
            try:
                answer = await self._ask_accounts(question, attempts, trace)
            except PoolExhausted as error:
                if last or not error.falls_back:
                    raise
                patience_s = attempts.patience_s
            else:
                if trace.mapped_model != model:
                    trace.changes += 1  # another model answers than the one that was asked for
                return answer
        raise AssertionError("a chain has a last model")

    async def _ask_accounts(
        self, question: Question[Answered_co], attempts: Attempts, trace: Trace
    ) -> Answered_co:
        for number in range(1, ATTEMPTS_MAX + 1):
            lease = await attempts.lease()
            try:
                return await self._attempt(question, lease, attempts.decision, trace)
            except UpstreamError as error:
                mended = number < ATTEMPTS_MAX and question.mends(error)
                if error.remedy == "give_up" and not mended:
                    raise
                # the pool keeps the error, but not its frames, which hold the body
                attempts.refused(lease, error.with_traceback(None), mended)
        raise attempts.exhausted()

    async def _attempt(
        self, question: Question[Answered_co], lease: Lease, decision: Decision, trace: Trace
    ) -> Answered_co:
        """One attempt, and what the pool learns from it. The lease lasts as long as the answer."""
        trace.attempts += 1
        trace.account, decision.account = lease.account, lease.account.name
        try:
            answer = await question.ask(lease)
        except BaseException as error:
            text: object = error
            if isinstance(error, GatewayError):
                secret_words = secrets_of(lease.account)
                text = functools.reduce(without_secret, secret_words, error.message)
                error.message = str(text)
            decision.answer = f"{type(error).__name__}: {text}"
            self._release(lease, error)
            raise
        decision.answer = "answered"
        if lease.probes or lease.limited:
            self.pool.succeeded(lease, self.clock())
        if isinstance(answer, Answer):
            answer.on_close = partial(self._release, lease)
        else:
            usage = answer.get("usageMetadata") if isinstance(answer, dict) else None
            self._release(lease, Ended(usage_of(usage)) if isinstance(usage, dict) else None)
        return answer

    def _release(self, lease: Lease, end: Event | BaseException | None) -> None:
        """Gives the lease back; `end` is an answer's last event, what was raised before it, or
        None.
        """
        error = end.error if isinstance(end, Failed) else end
        now = self.clock()
        if not isinstance(error, UpstreamError):  # all is well, or the client left
            tokens = end.usage.prompt if isinstance(end, Ended) else 0
            return self.pool.release(lease, tokens, now)
        if isinstance(error, CredentialRefused | ModelGone):
            self.wire.credentials.forget_project(lease.account)  # it may be another one by now
        self.pool.failed(lease, error, now, random.random())
        if isinstance(error, QuotaGone):
            self.long_cooldown.set()


# ==============================================================================
# 23. Kept responses
# ==============================================================================

# An item's id, by which the response that it belongs to is found.
ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{24})i?[0-9a-f]{4}")


class KeptResponse:
    """The place of one response in the store: it is written when the answer begins, and when it is
    over.
    """

    __slots__ = (
        "_first_row",
        "_payloads",
        "_state",
        "_store",
        "_trace",
        "frames",
        "id",
        "renderer",
        "saved",
    )

    def __init__(
        self,
        store: ResponseStore,
        renderer: ResponseRenderer,
        payloads: Mapping[str, bytes],
        trace: Trace,
        first_row: Sequence[Any],
    ) -> None:
        self.id: str = renderer.response["id"]
        self.renderer = renderer
        self.saved = False  # whether the last row that was written is what it is by now
        self.frames: list[bytes] = []  # of a background response, all that were rendered
        self._store, self._payloads, self._trace = store, payloads, trace
        self._first_row = first_row  # what only its first row has, until that is written
        self._state: StoredState = "over"

    @property
    def written(self) -> bool:
        """True unless its first row is still to be written; that row may be behind by now."""
        return not self._first_row

    def object(self) -> bytes:
        """The response as far as it is made."""
        return put_back(dump_bytes(self.renderer.response), self._payloads)

    async def save(self, state: StoredState | None = None) -> None:
        """Writes what the response has become; a store that cannot costs nobody an answer."""
        running = self.renderer.response["status"] in ("queued", "in_progress")
        self._state = state or ("running" if running else "over")
        model = self._trace.mapped_model
        signatures = [signature_entry(part, model) for part in self.renderer.signed]
        events = b"" if self._state == "running" else b"".join(self.frames)
        row = (self.object(), dump_bytes(signatures), events)
        first_row, self._first_row = self._first_row, ()
        try:
            await self._store.save(self.id, self._state, row, first_row)
            self.saved = True
        except StoreTrouble as error:
            self._first_row = first_row  # the next save begins anew
            self.saved = False
            log.warning("%s cannot be kept: %s", self.id, error.message)

    async def leave(self) -> None:
        """Gives the response up: one that is still being made is kept as lost."""
        if self._state == "running":
            await self.save("lost")
        self._store.leave(self.id)


class KeptResponses:
    """The responses that conversations go on with, each for the key that it was made for."""

    def __init__(self, store: ResponseStore, signatures: SignatureMemory, *, keeps: bool) -> None:
        self.store = store
        self._signatures = signatures
        self._keeps = keeps

    def place_for(
        self, renderer: ResponseRenderer, body: Any, payloads: Mapping[str, bytes], trace: Trace
    ) -> KeptResponse | None:
        """The place of a new response; None where it is not to be kept."""
        response = renderer.response
        response["store"] = self._keeps and body.get("store") is not False
        if not response["store"]:
            return None
        items = put_back(dump_bytes(render_input(body["input"], trace.id[4:])), payloads)
        first_row = (trace.client, response["previous_response_id"], items)
        return KeptResponse(self.store, renderer, payloads, trace, first_row)

    async def recall(self, body: Any, client: str) -> list[Any] | None:
        """The items that a body goes on with; those that it only names are put into it.

        None where nothing is kept.

        Raises BadRequest.
        """
        if not self._keeps:
            return None
        fields = body if isinstance(body, dict) else {}
        previous, items = fields.get("previous_response_id"), fields.get("input")
        past = []
        if isinstance(previous, str) and previous:
            past = await self._past(previous, client)
        if isinstance(items, list):
            known = {item["id"]: item for item in past if "id" in item}
            for i, item in enumerate(items):
                items[i] = await self._referred(item, known, client)
        return past

    async def _referred(self, item: Any, known: JsonObject, client: str) -> Any:
        """The item that a reference names, where it is kept; else what came."""
        if not isinstance(item, dict) or not is_reference(item):
            return item
        id = str(item.get("id"))
        if id not in known and (match := ITEM_ID.fullmatch(id)):
            response = await self.store.get(f"resp_{match[1]}", client)
            if response:
                known |= {one["id"]: one for one in self._items_of(response)}
        return known.get(id, item)

    async def _past(self, previous: str, client: str) -> list[Any]:
        """The items of a response and of all before it. Raises BadRequest."""
        chain = await self.store.chain(previous, client)
        if not chain:
            raise not_kept(previous)
        if chain[0].previous:
            raise not_kept(chain[0].previous)
        if chain[-1].state == "running":
            text = f"'previous_response_id' names '{previous}', which is not over."
            text += " Wait for its end, or cancel it."
            raise BadRequest(text, code="invalid_value", param="previous_response_id")
        return [item for response in chain for item in self._items_of(response)]

    def _items_of(self, response: StoredResponse) -> list[Any]:
        """The items of one turn, input and output; the signatures of its answer are remembered
        again.
        """
        self._signatures.learn(response.signatures)
        return [*parse_json(response.input), *response.response["output"]]

    async def sealing(
        self, body: Any, request: Request, trace: Trace
    ) -> Callable[[ToolCall | Text], str] | None:
        """Learns the signatures that a client brings back; gives a seal for new ones, where it asks
        for them.
        """
        parts = (part for message in request.messages for part in message.parts)
        carried = [
            part.signature for part in parts if isinstance(part, Thinking) and part.signature
        ]
        wanted = "reasoning.encrypted_content" in (body.get("include") or ())
        if not (wanted or carried):
            return None
        secret = await self.store.secret()
        entries = [unseal_entry(text, secret) for text in carried]
        self._signatures.learn(entry for entry in entries if entry)
        if not wanted:
            return None
        return lambda part: seal_entry(signature_entry(part, trace.mapped_model), secret)


def is_reference(item: JsonMap) -> bool:
    return item.get("type") == "item_reference" or (item.get("type") is None and "role" not in item)


def split_frames(data: bytes) -> list[bytes]:
    """The frames of a Responses stream, each at the place of its sequence number."""
    return [frame + b"\n\n" for frame in data.split(b"\n\n")[:-1]]


def replay_frames(stored: StoredResponse, at: int) -> list[bytes]:
    """The frames of a response that is over, from the one with this sequence number on."""
    if stored.events:
        return split_frames(stored.events)[at:]
    response = stored.response
    head = Head(stored.id, response["created_at"], response["model"])
    frames = split_frames(encoded(ResponseRenderer(head, {}).replay(response, at)))
    return frames[min(at, len(frames) - 2) :]


def numbers_in(query: Mapping[str, str]) -> JsonObject:
    """The fields of a URL's query, with numbers as such."""

    def read(value: str) -> Any:
        return int(value) if re.fullmatch(r"-?\d{1,9}", value, re.ASCII) else value

    return {key: read(value) for key, value in query.items()}


def page_of(items: list[Any], query: Mapping[str, str]) -> JsonObject:
    """A page of a response's input, its last item first unless `order` is asc.

    Raises BadRequest.
    """
    fields = Fields(numbers_in(query))
    limit, order = fields.count("limit", 100) or 20, query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise fields.wrong("order", f"is '{order}'", "Send asc or desc")
    if order == "desc":
        items = items[::-1]
    start = page_start(fields, [item["id"] for item in items], query.get("after"))
    data = items[start : start + limit]
    page = {"object": "list", "data": data, "first_id": "", "last_id": ""}
    if data:
        page |= {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return page | {"has_more": start + limit < len(items)}


def page_start(fields: Fields, ids: Sequence[str], after: str | None) -> int:
    if after is None:
        return 0
    if after not in ids:
        what = f"is '{after}', which is no item of this response"
        raise fields.wrong("after", what, "Send an id of the page before")
    return ids.index(after) + 1


# ==============================================================================
# 24. Exchanges
# ==============================================================================

PAYLOAD_MARK = secrets.token_hex(16)  # is base64 itself, and nobody's text
BACKGROUND_MAX = 64  # responses in the background, each of which holds all its frames
STOPPED = Overloaded("The gateway was stopped before the answer was whole. Ask again in a moment.")

# As Codex, Claude Code and OpenCode send them.
SESSION_HEADERS = (
    *("session_id", "session-id", "x-session-id", "x-session-affinity", "conversation_id"),
)

Render = Callable[[list[Event]], str | bytes]
Send = Callable[[bytes], Awaitable[None]]


@value
class Source:
    """Leads back to the config's file.

    `load` reads it again, or raises ConfigError; `asked` is set to have that done.
    """

    path: Path
    load: Callable[[], Config]
    asked: asyncio.Event


@dataclass(eq=False, slots=True)
class Gateway:
    """Holds what all exchanges share, and knows which of them run."""

    config: Config
    upstream: Upstream
    media: MediaFetcher
    kept: KeptResponses
    doors: Sequence[Door]
    auth: str  # the effective mode of the config
    source: Source | None = None
    journal: Journal = field(default_factory=Journal)
    running: set[Exchange] = field(default_factory=set)
    backgrounds: dict[str, Background] = field(default_factory=dict)  # by the response's id
    draining: bool = False

    async def drain(self, seconds: float) -> None:
        """Lets running answers finish; those that take longer end with an error, told in their
        client's form.
        """
        self.draining = True
        await self._wait(seconds)
        for exchange in [*self.running]:
            exchange.break_off(STOPPED)
        await self._wait(1)
        for exchange in [*self.running]:
            exchange.task.cancel()
        await self._wait(1)

    async def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while tasks := [exchange.task for exchange in self.running if not exchange.task.done()]:
            left_s = until - time.monotonic()
            if left_s <= 0 or not (await asyncio.wait(tasks, timeout=left_s))[0]:
                return
            await asyncio.sleep(0)  # so that those that are done leave


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and its answer, on the same path whether it is streamed, whole or made in the
    background.

    They differ in two calls: `render` makes bytes of events, `send` takes them to where they
    belong.
    """

    gateway: Gateway
    trace: Trace
    door: Door
    task: asyncio.Task[Any]  # is cancelled where the exchange is broken off before its answer
    streamed: bool = False
    payloads: dict[str, bytes] = field(default_factory=dict)
    renderer: Renderer | None = None
    kept: KeptResponse | None = None
    answer: Answer | Merged | None = None
    error: GatewayError | None = None  # by which it was broken off
    follows: bool = False  # it ends with the response that it follows, not before

    # ---- from a body to an answer that has begun

    async def begin(self, data: bytes, headers: Mapping[str, str]) -> Background | None:
        """Begins the answer to a body; a response in the background is made beside this exchange.

        Raises GatewayError.
        """
        gateway, door, trace = self.gateway, self.door, self.trace
        check = is_base64 if door.keeps else seems_base64  # what is kept must be whole
        data, self.payloads = cut_payloads(data, PAYLOAD_MARK, check)
        body = parse_body(data)
        del data
        past = await gateway.kept.recall(body, trace.client) if door.keeps else None
        requests = door.parse(body, past)
        trace.strict = gateway.config.strict or headers.get("x-agproxy-strict") == "1"
        trace.model, self.streamed = requests[0].model, requests[0].stream
        trace.affinity = affinity_of(trace.client, headers, body, requests[0])
        if door.keeps and body.get("background"):
            return await detach(self, requests, body)
        await self.open(requests[0], body)
        await self.ask(requests, body)
        return None

    async def open(self, request: Request, body: Any) -> None:
        """Makes the renderer, and the place in the store where the response is to be kept."""
        config, trace = self.gateway.config, self.trace
        images = config.images_in_text
        created, usage = int(time.time()), request.include_usage
        head = Head(trace.id[4:], created, trace.model, usage, images, time.time)
        if self.door.keeps:
            head = replace(head, seal=await self.gateway.kept.sealing(body, request, trace))
        renderer = self.renderer = self.door.renderer(head, body)
        if isinstance(renderer, ResponseRenderer):
            self.kept = self.gateway.kept.place_for(renderer, body, self.payloads, trace)

    async def ask(self, requests: Sequence[Request], body: Any) -> None:
        """Fetches linked media, maps the model and asks Gemini. Raises GatewayError."""
        upstream, trace = self.gateway.upstream, self.trace
        requests = [await self.gateway.media.filled(request) for request in requests]
        if self.payloads:
            requests = [replace(request, payloads=self.payloads) for request in requests]
        trace.mapped_model = await upstream.catalog.resolve(trace.model)
        try:
            self.answer = await upstream.ask(requests, trace)
        except UpstreamRefused:
            refuse_damaged(self.door, body, self.payloads)
            raise

    def break_off(self, error: UpstreamError) -> None:
        """Ends the exchange in whatever phase it is; its client is told why."""
        if self.answer is not None:
            self.answer.break_off(error)
        elif self.error is None and not self.follows:
            self.error = error
            self.task.cancel()

    # ---- from the answer to whoever waits for it

    async def run(self, render: Render, send: Send) -> None:
        """Takes all events of the answer to where they belong.

        Raises what `render` and `send` raise.
        """
        assert self.answer is not None
        async for events in self.answer:
            await self.deliver(events, render, send)
            del events  # a stream waits long for the next ones

    async def deliver(self, events: list[Event], render: Render, send: Send) -> None:
        """Sends the events of one read; what is kept is written before the client reads that it is
        over.
        """
        data, last, trace = render(events), events[-1], self.trace
        if isinstance(data, str):
            data = data.encode("utf-8", "replace")
        if self.payloads:
            data = put_back(data, self.payloads)
        if isinstance(last, Ended):
            trace.usage = last.usage
        elif isinstance(last, Failed):
            trace.error = last.error.code or last.error.type
        over = isinstance(last, Ended | Failed)
        if over and self.answer and (signed := self.answer.signed):
            self.gateway.upstream.signatures.remember(signed, trace.mapped_model)
        if self.kept and (over or trace.first_byte is None):
            await self.kept.save()
        if trace.first_byte is None:
            trace.first_byte = time.monotonic()
        await send(data)

    async def close(self) -> None:
        if self.answer is not None:
            self.answer.close()
        if self.kept:
            await self.kept.leave()


def affinity_of(client: str, headers: Mapping[str, str], body: JsonMap, request: Request) -> int:
    """A number that the requests of one conversation share: they meet the same account, whose
    prompt cache knows them.

    Without the client's name for the conversation, by its first words.
    """
    names = filter(None, map(headers.get, SESSION_HEADERS))
    session = next(names, None) or body.get("prompt_cache_key")
    if session and isinstance(session, str):
        return zlib.crc32(f"{client}\n{session}".encode("utf-8", "replace"))
    first = request.messages[0].parts if request.messages else ()
    words = "\n".join([getattr(part, "text", "") or getattr(part, "data", "") for part in first])
    # apart, for the instructions may be long and always the same
    system = "\n".join([client, *request.system])[:AFFINITY_CHARS]
    return zlib.crc32((system + words[:AFFINITY_CHARS]).encode("utf-8", "replace"))


def refuse_damaged(door: Door, body: Any, payloads: Mapping[str, bytes]) -> None:
    """Finds out, once Gemini refused a request, whether some of its base64 is damaged.

    Raises BadRequest that names the field.
    """
    for mark, payload in payloads.items():
        if not is_base64(payload):
            door.parse(json.loads(dump_bytes(body).replace(mark.encode(), b"!")), ())


class Background:
    """A response that is made beside every connection; whoever follows it gets its frames."""

    def __init__(self, exchange: Exchange, requests: Sequence[Request], body: Any) -> None:
        assert exchange.kept is not None
        self.exchange, self.kept = exchange, exchange.kept
        self._renderer = self.kept.renderer
        self._shown = 0  # frames that followers may have
        self._over = False
        self._grown = asyncio.Event()
        self._render_queued()
        self.task = exchange.task = asyncio.create_task(self._make(requests, body))

    def _render_queued(self) -> None:
        frames = put_back(encoded(self._renderer.begin("queued")), self.exchange.payloads)
        self.kept.frames += split_frames(frames)
        self._shown = len(self.kept.frames)

    def _render(self, events: list[Event]) -> bytes:
        """Adds the frames of the events; nothing is sent to one client alone."""
        frames = put_back(encoded(self._renderer.frames(events)), self.exchange.payloads)
        self.kept.frames += split_frames(frames)
        return b""

    async def _show(self, _: bytes) -> None:
        """Lets followers have what was rendered."""
        self._shown = len(self.kept.frames)
        self._grown.set()
        self._grown = asyncio.Event()

    async def _make(self, requests: Sequence[Request], body: Any) -> None:
        exchange = self.exchange
        try:
            try:
                await exchange.ask(requests, body)
                await exchange.run(self._render, self._show)
            except GatewayError as failure:
                await exchange.deliver([Failed(failure)], self._render, self._show)
            except asyncio.CancelledError:
                error = exchange.error or STOPPED
                await exchange.deliver([Failed(error)], self._render, self._show)
            self._over = True
            await self._show(b"")
            # Else it would read as running for ever.
            while self.kept.written and not self.kept.saved:
                await asyncio.sleep(DATABASE_BUSY_S)
                await self.kept.save()
        finally:
            await exchange.close()
            await self._show(b"")

    async def end(self) -> None:
        """Waits until the response is over, and kept where it can be."""
        while not (self._over or self.task.done()):
            await self._grown.wait()

    async def follow(self, at: int) -> AsyncIterator[bytes]:
        """The frames from one on, as they come. Raises what kept the response from its end."""
        while True:
            grown = self._grown
            if frames := self.kept.frames[at : self._shown]:
                at += len(frames)
                yield b"".join(frames)
            elif self._over:
                return
            elif self.task.done():
                self.task.result()  # raises: nobody takes a part for the whole
            else:
                await grown.wait()


async def detach(exchange: Exchange, requests: Sequence[Request], body: Any) -> Background:
    """Begins to make a response beside the connection that asked for it; it has a log line of its
    own.

    Raises Overloaded, and StoreTrouble where nobody could ask for it later.
    """
    gateway, request_trace = exchange.gateway, exchange.trace
    if len(gateway.backgrounds) >= BACKGROUND_MAX:
        raise Overloaded(
            f"{BACKGROUND_MAX} responses are made in the background already. Try again later."
        )
    trace = replace(request_trace, decisions=[])
    request_trace.model = ""
    detached = Exchange(gateway, trace, exchange.door, exchange.task)
    detached.payloads, detached.streamed = exchange.payloads, exchange.streamed
    await detached.open(requests[0], body)
    streamed = [replace(request, stream=True) for request in requests]
    background = Background(detached, streamed, body)
    gateway.running.add(detached)
    gateway.backgrounds[background.kept.id] = background
    background.task.add_done_callback(partial(finish_background, background))
    await background.kept.save()
    if not (background.kept.saved or requests[0].stream):  # its stream can be read all the same
        text = "The response cannot be kept, and nobody could ask for it."
        text += " Try again, or leave out 'background'."
        detached.break_off(Cancelled(text))
        raise StoreTrouble(text)
    return background


def finish_background(background: Background, task: asyncio.Task[None]) -> None:
    gateway, exchange = background.exchange.gateway, background.exchange
    error = None if task.cancelled() else task.exception()
    if error:
        log.error("%s failed", exchange.trace.id, exc_info=without_words(error))
    log_exchange(gateway, exchange.trace, 500 if error else 200)
    gateway.running.discard(exchange)
    gateway.backgrounds.pop(background.kept.id, None)


def log_exchange(gateway: Gateway, trace: Trace, status: int) -> None:
    """Keeps what happened for `agproxy why` and the bill, and writes the log line."""
    now = time.monotonic()
    gateway.journal.add(trace, status, now)
    if log.isEnabledFor(logging.INFO):
        fields = log_fields(trace, status, now)
        log.info("%s", log_text(fields), extra={"fields": fields})


def without_words(error: BaseException) -> Any:
    """Keeps where a mistake was made, for the log, but not its words: a client's may be there."""
    text = f"{type(error).__name__}, without its words: they may be a client's"
    return RuntimeError, RuntimeError(text), error.__traceback__


# ==============================================================================
# 25. Web
# ==============================================================================

BODY_S_MAX = 120.0  # a body that trickles longer holds nobody up
HEARTBEAT = b": keep-alive\n\n"  # a comment, which every reader of event streams skips
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
CLOSE: Mapping[str, str] = {"Connection": "close"}
GIVEN_ONCE = ("Host", "Content-Length", "Transfer-Encoding", "Content-Type", "Authorization")
KEY_HEADERS = ("x-api-key", "x-goog-api-key", "api-key")
FOREIGN = re.compile(r"https?:|null$", re.IGNORECASE)  # origins of web pages, not of programs
CLIENT_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
NOT_HTTP = "What came is not HTTP/1.1. Check the client, and that it uses no TLS here."
ASK_FOR_A_KEY = "set proxy.api_key and proxy.auth_mode: strict"

# Base URLs get pasted whole and paths stacked (Kilo Code: /v1/chat/completions/responses): the last
# endpoint wins.
ENDPOINTS = "|".join([door.path.removeprefix("/v1/") for door in DOORS] + ["models", "embeddings"])
STACKED = re.compile(
    rf"(?:/(?:v1|{ENDPOINTS}))*/(?P<endpoint>healthz|responses/input_tokens|{ENDPOINTS})"
    r"(?:(?<=models)/(?P<model>(?s:.+?))"
    r"|(?<=responses)/(?P<id>(?!compact/?$)[^/]+)(?P<part>/input_items|/cancel)?)?/?"
)


@lru_cache(256)
def place_of(path: str) -> tuple[str, str]:
    """The route that a doubled, stacked or bare path means, and its name in the log."""
    match = STACKED.fullmatch(re.sub("/{2,}", "/", path))
    if match is None:
        return path, path
    endpoint, model, id, part = match.groups()
    if endpoint == "healthz":
        return "/healthz", endpoint
    if model:
        return f"/v1/models/{model}", endpoint
    if id:
        return f"/v1/responses/{id}{part or ''}", f"responses/{{id}}{part or ''}"
    return f"/v1/{endpoint}", endpoint


@cache
def gateway_key() -> web.AppKey[Gateway]:
    """The key of an application's gateway, made late: aiohttp is loaded only by what serves."""
    return web.AppKey("gateway", Gateway)


@cache
def exchange_key() -> web.RequestKey[Exchange]:
    return web.RequestKey("exchange", Exchange)


# ---- every request: named, let in or not, told the truth where it fails


async def name_request(
    gateway: Gateway, request: web.Request, handler: Handler
) -> web.StreamResponse:
    """Gives a request its name and its place among those that run; what fails is told in its door's
    form, and logged.
    """
    path, route = place_of(request.path)
    trace = Trace(gateway.config, f"req_{next_id()}", route or "/", time.monotonic())
    trace.affinity = zlib.crc32(trace.id.encode())  # any account, where no prompt cache is known
    client_id = request.headers.get("x-request-id") or request.headers.get("x-client-request-id")
    if client_id and CLIENT_ID.fullmatch(client_id):
        trace.client_id = client_id
    below = [door for door in gateway.doors if f"{path}/".startswith(f"{door.path}/")]
    task: Any = asyncio.current_task()
    exchange = request[exchange_key()] = Exchange(gateway, trace, (below or gateway.doors)[0], task)
    gateway.running.add(exchange)
    status = 499  # where the client is gone
    try:
        response = await handler(request)
        status = response.status
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
        response = error_reply(request, told_of(exchange, error))
        status = response.status
    finally:
        gateway.running.discard(exchange)
        log_exchange(gateway, trace, status)
    return response


def told_of(exchange: Exchange, error: BaseException) -> GatewayError:
    """The error to tell the client. Raises `error` again where the client is gone."""
    match error:
        case GatewayError():
            return error
        case RecursionError():
            return BadRequest("The body is nested too deep. Send flatter JSON.")
        case web.HTTPNotFound():
            return UnknownUrl("Invalid URL: its path is empty. Ask for one that begins with /v1.")
        case asyncio.CancelledError() if exchange.error:
            exchange.task.uncancel()
            return exchange.error
        case asyncio.CancelledError() | ConnectionError():
            raise error
        case _:
            log.error("%s failed", exchange.trace.id, exc_info=without_words(error))
            return GatewayError("The gateway failed. Its log says why; please report it.")


async def let_in(gateway: Gateway, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keeps out whom the config keeps out; finds the handler of a path in another writing."""
    path, _ = place_of(request.path)
    check_client(gateway, request, path)
    if request.method == "OPTIONS":
        return web.Response(status=204, headers=headers_of(request))
    if not path.startswith("/agproxy/"):  # who operates the gateway may ask while it is full
        check_load(gateway)
    if path != request.path:
        return await reroute(request, path)
    return await handler(request)


def check_client(gateway: Gateway, request: web.Request, path: str) -> None:
    """Raises BadRequest for doubled headers, Unauthorized or Forbidden for who may not ask."""
    for name in GIVEN_ONCE:
        if len(request.headers.getall(name, ())) > 1:
            raise BadRequest(f"The header {name} is given twice. Send it once.", headers=CLOSE)
    if gateway.auth == "off":
        guard(gateway.config, request)
    elif request.method != "OPTIONS" and (gateway.auth == "strict" or path != "/healthz"):
        request[exchange_key()].trace.client = client_of(gateway.config, request.headers)


def check_load(gateway: Gateway) -> None:
    """Raises Overloaded while the gateway is being stopped, and beyond proxy.max_requests."""
    if gateway.draining:
        raise Overloaded("The gateway is being stopped. Ask again in a moment.", headers=CLOSE)
    requests_max = gateway.config.max_requests
    if len(gateway.running) - len(gateway.backgrounds) > requests_max:
        raise Overloaded(
            f"The gateway serves {requests_max} requests at once."
            " Try again in a moment, or raise proxy.max_requests."
        )


async def reroute(request: web.Request, path: str) -> web.StreamResponse:
    """Hands a request to the handler of the path that is meant."""
    url = request.rel_url.with_path(path).with_query(request.query)
    again = request.clone(rel_url=url)
    match = await request.app.router.resolve(again)
    match.add_app(request.app)  # `again.app` is read from it
    again._match_info = match  # as aiohttp's own normalize_path_middleware does
    return await match.handler(again)


def guard(config: Config, request: web.Request) -> None:
    """Without a key, keeps out names that were rebound to this address, and the scripts of foreign
    web pages.
    """
    host = host_of(f"//{request.headers.get('host', 'localhost')}")
    literal = config.allow_lan_access and is_address(host)
    if not (is_loopback(host) or literal or host in config.allowed_hosts):
        text = f"The Host '{host}' may not be used without a key."
        text += f" Add it to proxy.allowed_hosts, or {ASK_FOR_A_KEY}."
        raise Forbidden(text, code="host_not_allowed")
    origin = request.headers.get("origin")
    if origin and FOREIGN.match(origin) and not may_call(config, origin):
        text = f"The web page {origin} may not call. Add it to proxy.cors_origins,"
        raise Forbidden(f"{text} or {ASK_FOR_A_KEY}.", code="origin_not_allowed")


def may_call(config: Config, origin: str) -> bool:
    """True for pages of this machine, and those that proxy.cors_origins names."""
    return is_loopback(host_of(origin)) or origin.lower() in config.cors_origins


def client_of(config: Config, headers: Mapping[str, str]) -> str:
    """The name of the key that a request shows. Raises Unauthorized."""
    keys = [re.sub(r"(?i)^bearer +", "", headers.get("authorization", "").strip())]
    keys += [headers.get(name, "") for name in KEY_HEADERS]
    sent = [key.encode("utf-8", "surrogateescape") for key in keys]
    for one in config.api_key:
        if any(hmac.compare_digest(key, one.key.encode()) for key in sent):
            return one.name
    what = "The API key is wrong." if any(keys) else "An API key is missing."
    raise Unauthorized(f"{what} Send a key of proxy.api_key as 'Authorization: Bearer KEY'.")


async def expect_later(request: web.Request) -> None:
    """Sends no 100 Continue yet: a client is asked for its body once its key was checked."""


def cors_headers(gateway: Gateway, request: web.Request, origin: str) -> dict[str, str]:
    """Lets a browser's page read the answer: any page where a key is needed, else those allowed."""
    open_to_all = gateway.auth != "off"
    if not (open_to_all or may_call(gateway.config, origin)):
        return {}
    headers = {"Access-Control-Allow-Origin": "*" if open_to_all else origin, "Vary": "Origin"}
    if request.method != "OPTIONS":
        return headers | {"Access-Control-Expose-Headers": "*"}  # all, for no cookies are allowed
    asked = request.headers.get("access-control-request-headers", "authorization")
    return headers | {
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Max-Age": "600",
        "Access-Control-Allow-Headers": asked,
    }


def headers_of(request: web.Request) -> dict[str, str]:
    """The headers of every answer, without what would end one."""
    exchange = request[exchange_key()]
    trace, config, gateway = exchange.trace, exchange.trace.config, exchange.gateway
    ms = round(1000 * (time.monotonic() - trace.started))
    headers = {"X-Request-Id": trace.id, "openai-processing-ms": str(ms), "Server": "agproxy"}
    if trace.mapped_model:
        headers |= {"X-Mapped-Model": trace.mapped_model, "X-Attempts": str(trace.attempts)}
    if trace.account and config.show_account != "off":
        name = trace.account.email or trace.account.name
        if config.show_account == "masked":
            name = masked(name)
        headers["X-Account-Email"] = name
    if trace.changes:
        headers["X-Agproxy-Changes"] = str(trace.changes)
    if config.demo:
        headers["X-Agproxy-Demo"] = "1"
    if origin := request.headers.get("origin"):
        headers |= cors_headers(gateway, request, origin)
    if not "".join(headers.values()).isprintable():
        for name, value in headers.items():
            headers[name] = "".join(c if c.isprintable() else "?" for c in value)
    return headers


# ---- whole answers


def bytes_reply(
    request: web.Request, body: bytes, status: int = 200, media_type: str = "application/json"
) -> web.Response:
    headers = headers_of(request)
    headers["Content-Type"] = media_type
    return web.Response(body=body, status=status, headers=headers)


def json_reply(request: web.Request, value: Any) -> web.Response:
    return bytes_reply(request, dump_bytes(value))


def error_reply(request: web.Request, error: GatewayError) -> web.Response:
    """An error in the form of the request's door."""
    exchange = request[exchange_key()]
    trace, door = exchange.trace, exchange.door
    if error.code == "context_length_exceeded":
        error.param = door.long_field
    body = door.error(error)
    if error.waits and trace.decisions and isinstance(body.get("error"), dict):
        body["error"]["decisions"] = decisions_of(trace)
    response = bytes_reply(request, dump_bytes(body), error.status)
    response.headers.update(error.headers)
    unsent = "expect" in request.headers and not request.content.is_eof()
    if unsent or "Connection" in error.headers:  # a body that nobody asked for may never come
        response.force_close()
    if error.waits:
        wait_s = error.retry_after_s or 1.0
        response.headers["Retry-After"] = str(math.ceil(wait_s))
        response.headers["Retry-After-Ms"] = str(round(1000 * wait_s))
    if not error.retry_helps:
        response.headers["X-Should-Retry"] = "false"
    return response


async def handle_health(request: web.Request) -> web.StreamResponse:
    return json_reply(request, {"status": "ok", "version": __version__})


async def handle_models(request: web.Request) -> web.StreamResponse:
    exchange = request[exchange_key()]
    return json_reply(request, exchange.door.models(await models_of(exchange.gateway), False))


async def handle_model(request: web.Request) -> web.StreamResponse:
    """One model: a listed one, or any name that the mapping knows. Raises ModelNotFound."""
    exchange = request[exchange_key()]
    name = request.match_info["name"]
    listed = {model.id: model for model in await models_of(exchange.gateway)}
    model = listed.get(name)
    if model is None:
        mapped = await exchange.gateway.upstream.catalog.resolve(name)
        model = replace(listed.get(mapped, Listed(mapped, "google")), id=name)
    return json_reply(request, exchange.door.models([model], True))


async def models_of(gateway: Gateway) -> list[Listed]:
    """The upstream's models, and the names that models.map gives them."""
    listed = await gateway.upstream.catalog.listed() or STATIC_MODELS
    aliases = [name for name in gateway.config.aliases if "*" not in name and name not in listed]
    models = [Listed(name, "google") for name in listed]
    return models + [Listed(name, "agproxy") for name in aliases]


async def handle_embeddings(request: web.Request) -> web.StreamResponse:
    exchange = request[exchange_key()]
    wanted = parse_embeddings(parse_body(await read_body(request)))
    trace, upstream = exchange.trace, exchange.gateway.upstream
    trace.model = wanted.model
    trace.mapped_model = await upstream.catalog.resolve(wanted.model)
    vectors, tokens = await upstream.embed(wanted, trace)
    trace.usage = Usage(prompt=tokens)
    return json_reply(request, render_embeddings(wanted, vectors, tokens))


async def handle_token_count(request: web.Request) -> web.StreamResponse:
    """The number of tokens of a response's input; all of its fields may be missing."""
    exchange = request[exchange_key()]
    gateway, trace, door = exchange.gateway, exchange.trace, exchange.door
    body = parse_body(await read_body(request))
    if isinstance(body, dict):
        fields = {key: value for key, value in body.items() if value is not None}
        # Without a model and a default, a name that the built-in mapping knows.
        body = {"input": [], "model": gateway.config.default_model or "gpt-4o", **fields}
    past = await gateway.kept.recall(body, trace.client)
    wanted = door.parse(body, past or ())[0]
    trace.model = wanted.model
    trace.mapped_model = await gateway.upstream.catalog.resolve(wanted.model)
    tokens = await gateway.upstream.count(await gateway.media.filled(wanted), trace)
    assert door.counts is not None
    return json_reply(request, door.counts(tokens))


async def handle_unknown(request: web.Request) -> web.StreamResponse:
    """Refuses what has no route: by the methods that the path has, else by the base URL that is
    meant.
    """
    allowed = set()
    for resource in request.app.router.resources():
        allowed |= (await resource.resolve(request))[1]
    methods = ", ".join(sorted(allowed - {"*", "HEAD"}))
    if methods:
        raise MethodNotAllowed(
            f"{request.method} is not served at {request.path}. Use {methods}.",
            headers={"Allow": methods},
        )
    base = f"http://{request.headers.get('host', 'localhost')}/v1"
    raise UnknownUrl(f"Invalid URL ({request.method} {request.path}). Set the base URL to {base}.")


# ---- a body


async def read_body(request: web.Request) -> bytes:
    """The body, unpacked. Raises BodyTooLarge, BodyTooSlow, and BadRequest for a broken one."""
    length, content = request.content_length or 0, request.content
    if length > BODY_BYTES_MAX:
        raise too_large()
    expects = request.headers.get("expect", "").lower() == "100-continue"
    if expects and request.version >= (1, 1) and not content.total_bytes:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # so that aiohttp knows that no answer has begun
    if length > LARGE_BYTES:
        keep_buffers()
    if content.is_eof():
        data = content.read_nowait(-1)
    else:
        data = await read_pieces(content)
    packing = request.headers.get("content-encoding", "identity").lower()
    return data if packing == "identity" else unpacked(data, packing)


async def read_pieces(content: StreamReader) -> bytes:
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_S_MAX):
            while piece := await content.readany():
                pieces.append(piece)
                size += len(piece)
                if size > BODY_BYTES_MAX:
                    raise too_large()
    except TimeoutError:
        raise BodyTooSlow(
            f"The body did not come within {BODY_S_MAX:.0f} s. Send it faster, or a smaller one.",
            headers=CLOSE,
        ) from None
    except web.RequestPayloadError:
        raise BadRequest(NOT_HTTP, headers=CLOSE) from None
    return b"".join(pieces)


def too_large(when: str = "") -> BodyTooLarge:
    text = f"The body is larger than {BODY_BYTES_MAX >> 20} MB{when}. Send a smaller one."
    return BodyTooLarge(text)


def unpacked(data: bytes, packing: str) -> bytes:
    """The body as it was before it was packed. Raises BadRequest, BodyTooLarge."""
    if packing not in ("gzip", "x-gzip", "deflate"):
        text = f"Content-Encoding '{packing[:40]}' is not served."
        raise BadRequest(f"{text} Send the body as it is, or packed by gzip.")
    zlib_head = data[:1] == b"\x78" and int.from_bytes(data[:2]) % 31 == 0
    raw = packing == "deflate" and not zlib_head  # as some send it
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


@cache
def keep_buffers() -> None:
    """Keeps glibc from giving the buffers of large bodies back to the system, only to fault them in
    anew each time.

    Done at the first large body, for it takes ten milliseconds of a start.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


# ---- answers of the doors


@dataclass(eq=False, slots=True)
class EventStream:
    """A client's side of a stream.

    Its head waits for the first event or heartbeat, so that what fails before has a status of its
    own.
    """

    _request: web.Request
    _exchange: Exchange
    response: web.StreamResponse | None = None  # once its head went out
    ended: bool = False
    _quiet: bool = True  # nothing was sent since the heartbeat looked
    _beating: asyncio.Task[None] | None = None
    _alarm: asyncio.TimerHandle | None = None

    async def send(self, data: bytes) -> None:
        """Returns once the client has taken most of what was sent.

        Raises ConnectionError where it is gone.
        """
        self._quiet = False
        response = self.response
        if response is None:
            headers = headers_of(self._request) | EVENT_STREAM
            response = self.response = web.StreamResponse(headers=headers)
            if self._request.version < (1, 1):
                response.force_close()  # its end is the connection's
            await response.prepare(self._request)
        if data:
            await response.write(data)
        else:
            self._request.writer.send_headers()

    def start_heartbeat(self) -> None:
        """A heartbeat may begin a stream, and then an error is told in it."""
        seconds = self._exchange.gateway.config.heartbeat_s
        if seconds:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(seconds, self._beat, loop, seconds / 2)

    def _beat(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Looks twice in each `heartbeat_s`, so that a write costs no timer."""
        begun = self.response or (self._exchange.streamed and self._exchange.renderer)
        full = self._request.protocol.writing_paused
        if self._quiet and begun and not full:  # whoever takes nothing needs no heartbeat
            self._beating = loop.create_task(self._send_heartbeat())
        self._quiet = True
        self._alarm = loop.call_later(seconds, self._beat, loop, seconds)

    async def _send_heartbeat(self) -> None:
        with suppress(ConnectionError):
            await self.send(HEARTBEAT)

    async def end(self) -> web.StreamResponse:
        """Ends the stream; one of which nothing was sent ends after its head."""
        if self.response is None:
            await self.send(b"")
        assert self.response is not None
        await self.response.write_eof()
        self.ended = True
        return self.response

    def close(self) -> None:
        """Cuts off a stream that has not come to its end, so that nobody takes a part for the
        whole.
        """
        if self._alarm:
            self._alarm.cancel()
        if self._beating:
            self._beating.cancel()
        if self.response is not None and not self.ended and self._request.transport is not None:
            self._request.transport.abort()


async def handle_door(request: web.Request) -> web.StreamResponse:
    """The answer of every door: streamed, whole, or made in the background."""
    exchange = request[exchange_key()]
    stream = EventStream(request, exchange)
    stream.start_heartbeat()
    try:
        background = await exchange.begin(await read_body(request), request.headers)
        if background:
            return await answer_detached(stream, background, request)
        renderer = exchange.renderer
        assert renderer is not None
        if not exchange.streamed:
            return await answer_whole(exchange, renderer, request)
        await exchange.run(renderer.frames, stream.send)
        return await stream.end()
    except (GatewayError, asyncio.CancelledError) as error:
        if stream.response is None or exchange.renderer is None:
            raise
        # only heartbeats have begun the stream: the error is told in it
        events: list[Event] = [Started(), Failed(told_of(exchange, error))]
        await exchange.deliver(events, exchange.renderer.frames, stream.send)
        return await stream.end()
    finally:
        if exchange.kept or exchange.answer is None or not exchange.answer.closed:
            await exchange.close()
        stream.close()  # which may end this task, too


async def answer_detached(
    stream: EventStream, background: Background, request: web.Request
) -> web.StreamResponse:
    """The answer to a request in the background: the object so far, or its stream."""
    if background.exchange.streamed:
        return await follow(stream, background, 0, request)
    return bytes_reply(request, background.kept.object())


async def follow(
    stream: EventStream, background: Background, at: int, request: web.Request
) -> web.StreamResponse:
    """Sends a background response from its frame `at` on, as it grows; ends with its end."""
    request[exchange_key()].follows = True
    await stream.send(b"")
    async for frames in background.follow(at):
        await stream.send(frames)
    return await stream.end()


async def answer_whole(
    exchange: Exchange, renderer: Renderer, request: web.Request
) -> web.StreamResponse:
    whole = WholeAnswer(renderer)
    await exchange.run(whole.render, whole.keep)
    return bytes_reply(request, whole.body)


class WholeAnswer:
    """All events of an answer, rendered as one object at its end."""

    def __init__(self, renderer: Renderer) -> None:
        self.body = b""
        self._renderer = renderer
        self._events: list[Event] = []

    def render(self, events: list[Event]) -> bytes:
        """The object, once its last event is there. Raises the error of a Failed event."""
        self._events += events
        if not isinstance(events[-1], Ended | Failed):
            return b""
        return dump_bytes(self._renderer.whole(self._events))

    async def keep(self, data: bytes) -> None:
        self.body += data


# ---- responses that are kept


async def stored_for(request: web.Request) -> StoredResponse:
    """The response that a path names. Raises ResponseNotFound, also where another key made it."""
    exchange = request[exchange_key()]
    id = request.match_info["id"]
    stored = await exchange.gateway.kept.store.get(id, exchange.trace.client)
    if stored is None:
        raise ResponseNotFound(
            f"Response with id '{id}' not found. It was not kept here, or not for this key."
        )
    if stored.state == "lost":
        return replace(stored, response=interrupted(stored.response))
    return stored


async def handle_response(request: web.Request) -> web.StreamResponse:
    """A response as it is by now, or by `stream=true` its stream from where the client wants it."""
    exchange = request[exchange_key()]
    stored = await stored_for(request)
    background = exchange.gateway.backgrounds.get(stored.id)
    if request.query.get("stream") == "true":
        return await replay(request, stored, background)
    if background:
        return bytes_reply(request, background.kept.object())
    return json_reply(request, stored.response)


async def replay(
    request: web.Request, stored: StoredResponse, background: Background | None
) -> web.StreamResponse:
    """The stream of a response, from the frame behind `starting_after` on: as it is stored, or as
    it is being made. Raises BadRequest.
    """
    after = Fields(numbers_in(request.query)).count("starting_after", low=0)
    at = 0 if after is None else after + 1
    if background is None:
        if stored.state == "running":
            text = "This response cannot be followed from here"
            raise BadRequest(f"{text}. Ask without 'stream' until it is over.")
        frames = b"".join(replay_frames(stored, at))
        return bytes_reply(request, frames, media_type="text/event-stream")
    if request.method == "HEAD":
        return bytes_reply(request, b"")
    stream = EventStream(request, background.exchange)
    stream.start_heartbeat()
    try:
        return await follow(stream, background, at, request)
    finally:
        stream.close()


async def handle_input_items(request: web.Request) -> web.StreamResponse:
    stored = await stored_for(request)
    return json_reply(request, page_of(parse_json(stored.input), request.query))


async def handle_cancel(request: web.Request) -> web.StreamResponse:
    exchange = request[exchange_key()]
    stored = await stored_for(request)
    if not stored.response["background"]:
        raise BadRequest("Cannot cancel a synchronous response. Close its connection instead.")
    background = await break_off(exchange.gateway, stored.id)
    if background:
        return bytes_reply(request, background.kept.object())
    return json_reply(request, stored.response)


async def handle_delete(request: web.Request) -> web.StreamResponse:
    exchange = request[exchange_key()]
    stored = await stored_for(request)
    await break_off(exchange.gateway, stored.id)
    await exchange.gateway.kept.store.delete(stored.id)
    return json_reply(request, {"id": stored.id, "object": "response", "deleted": True})


async def break_off(gateway: Gateway, id: str) -> Background | None:
    """Ends a response in the background, if there is one; what was said so far stays in it."""
    background = gateway.backgrounds.get(id)
    if background:
        text = "The response was cancelled. Ask again for another."
        background.exchange.break_off(Cancelled(text))
        await background.end()
    return background


# ==============================================================================
# 26. Admin
# ==============================================================================

POOL_ACTIONS = ("reset", "pause", "resume")


def check_operator(request: web.Request) -> Gateway:
    """The gateway, for a client with a key, or where none is needed for a program of this machine.

    Raises Forbidden.
    """
    exchange = request[exchange_key()]
    config = exchange.gateway.config
    here = is_loopback(request.remote or "") or request.remote == config.bind
    if config.auth == "off" and (not here or "origin" in request.headers):
        text = "Only programs on this machine may do that. Call from it,"
        raise Forbidden(f"{text} or {ASK_FOR_A_KEY}.")
    return exchange.gateway


async def handle_status(request: web.Request) -> web.StreamResponse:
    upstream = check_operator(request).upstream
    accounts = upstream.pool.status(upstream.clock())
    return json_reply(request, {"version": __version__, "accounts": accounts})


async def handle_why(request: web.Request) -> web.StreamResponse:
    id = request.match_info["id"]
    known = check_operator(request).journal.find(id)
    if known is None:
        text = f"No request '{id}' is known, of the last {JOURNAL_MAX}."
        raise UnknownUrl(f"{text} Name one by its X-Request-Id.")
    return json_reply(request, known)


async def handle_pool(request: web.Request) -> web.StreamResponse:
    """Resets, pauses or resumes an account or one model of it."""
    upstream = check_operator(request).upstream
    fields = Fields(parse_body(await read_body(request)))
    action, name = fields.needed_text("action"), fields.needed_text("account")
    if action not in POOL_ACTIONS:
        raise fields.wrong("action", f"is '{action}'", f"Send one of {', '.join(POOL_ACTIONS)}")
    model = fields.text("model") or ""
    accounts = upstream.pool.status(upstream.clock())
    known = {row["model"] for account in accounts for row in account["models"]}
    if model and model not in known:
        model = await upstream.catalog.resolve(model)
    if not upstream.pool.steer(action, name, model):
        raise fields.wrong("account", "is no account's name", "Send a name of `agproxy status`")
    return json_reply(request, {"accounts": upstream.pool.status(upstream.clock())})


async def handle_reload(request: web.Request) -> web.StreamResponse:
    gateway = check_operator(request)
    try:
        count = await reload_gateway_config(gateway)
    except ConfigError as error:
        raise BadRequest(
            f"{error}\nThe config stays as it was. Mend that.", code="config_invalid"
        ) from None
    return json_reply(request, {"accounts": count})


async def reload_gateway_config(gateway: Gateway) -> int:
    """Reads the config anew and counts its accounts.

    Raises ConfigError where it is no use, and changes nothing.
    """
    old = gateway.config
    try:
        if gateway.source is None:
            raise ConfigError("This gateway has no accounts file that it could read again.")
        config = await asyncio.to_thread(gateway.source.load)
        if (config.bind, config.port) != (old.bind, old.port):
            raise ConfigError(
                "Where it listens changed (host, port, allow_lan_access). Restart it for that."
            )
        if config.store != old.store:
            raise ConfigError(
                "Where responses are kept changed (proxy.store). Restart it for that."
            )
    except ConfigError as error:
        log.warning("the config stays as it was: %s", error)
        raise
    gateway.config = gateway.media.config = replace(config, host=old.host)
    gateway.auth = config.auth
    gateway.upstream.adopt(gateway.config)
    log.info("the config was read again: %d accounts", len(config.accounts))
    return len(config.accounts)


async def watch_files(gateway: Gateway, source: Source) -> None:
    """Reloads when a file of the config's changes, and when that is asked for."""
    seen = stamps_of(gateway, source)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(RELOAD_CHECK_S):
                await source.asked.wait()
        stamps = stamps_of(gateway, source)
        if source.asked.is_set() or stamps != seen:
            source.asked.clear()
            with suppress(ConfigError):  # told by the log
                await reload_gateway_config(gateway)
                stamps = [stamps[0], *stamps_of(gateway, source)[1:]]
            seen = stamps


def stamps_of(gateway: Gateway, source: Source) -> list[tuple[int, int] | None]:
    """The time at which each file of the config was changed, and its length."""
    credentials = (account.credentials for account in gateway.config.accounts)
    return [stamp_of(path) for path in (str(source.path), *credentials)]


def stamp_of(path: str) -> tuple[int, int] | None:
    """The time and length that a change of the file would change; None where there is no file."""
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_mtime_ns, stat.st_size
    return None


# ==============================================================================
# 27. Server
# ==============================================================================

KEEP_ALIVE_S = 75.0  # for the next request on a connection, and for the whole head of one
LINGER_S = 10.0  # for the rest of a body that nobody reads
UNSENT_BYTES_MAX = 256 << 10  # of a client that is slow; then its answer waits
LINE_BYTES_MAX = 8190  # of the request line, and of a header: room for any key or token
LONG_HEAD = f"The headers are too many, or one is longer than {LINE_BYTES_MAX} bytes. Send fewer."
DRAIN_S = 30.0


def routes(doors: Sequence[Door]) -> list[web.RouteDef]:
    """The table of routes. A path in another writing is brought into this one by `place_of`."""
    get = partial(web.get, expect_handler=expect_later)
    post = partial(web.post, expect_handler=expect_later)
    return [
        get("/healthz", handle_health),
        get("/v1/models", handle_models),
        get("/v1/models/{name:(?s:.+)}", handle_model),
        *(post(door.path, handle_door) for door in doors),
        *(post(f"{door.path}/input_tokens", handle_token_count) for door in doors if door.counts),
        post("/v1/embeddings", handle_embeddings),
        get("/v1/responses/{id}", handle_response),
        get("/v1/responses/{id}/input_items", handle_input_items),
        post("/v1/responses/{id}/cancel", handle_cancel),
        web.delete("/v1/responses/{id}", handle_delete, expect_handler=expect_later),
        get("/agproxy/status", handle_status),
        get("/agproxy/why/{id}", handle_why),
        post("/agproxy/pool", handle_pool),
        post("/agproxy/reload", handle_reload),
        web.route("*", "/{path:(?s:.*)}", handle_unknown, expect_handler=expect_later),
    ]


def create_app(
    config: Config,
    *,
    doors: Sequence[Door] = DOORS,
    source: Source | None = None,
    drain_s: float = 0.0,
    direct: bool = True,
) -> web.Application:
    """The gateway as an aiohttp application; when that stops, running answers have `drain_s` to
    finish.

    Without `direct` upstreams are asked by aiohttp's client, as through a proxy.
    """
    path = None if config.store in (None, "memory", "off") else Path(config.store)
    database = Database(path)
    upstream = Upstream(config, direct=direct)
    kept = KeptResponses(ResponseStore(database), upstream.signatures, keeps=config.store != "off")
    gateway = Gateway(config, upstream, MediaFetcher(config), kept, doors, config.auth)

    async def drain(app: web.Application) -> None:
        await gateway.drain(drain_s)

    layers = [partial(layer, gateway) for layer in (name_request, let_in)]
    app = web.Application(middlewares=[web.middleware(layer) for layer in layers])
    app.add_routes(routes(doors))
    app.on_shutdown.append(drain)
    app.cleanup_ctx.append(partial(live, gateway, database, source))
    app[gateway_key()] = gateway
    return app


async def live(
    gateway: Gateway, database: Database, source: Source | None, app: web.Application
) -> AsyncIterator[None]:
    """Opens what an application needs, and closes it when the application ends."""
    upstream = gateway.upstream
    async with AsyncExitStack() as stack:
        for part in (database, gateway.media, upstream):
            stack.push_async_callback(part.close)
        if source:
            stack.callback(asyncio.create_task(watch_files(gateway, source)).cancel)
            gateway.source = source
        if database.path:
            pool_store = PoolStore(database, upstream.pool)
            if database.path.exists():  # what keeps nothing leaves nothing on disk
                await pool_store.load(upstream.clock())
            stack.push_async_callback(pool_store.save)
            stack.callback(asyncio.create_task(pool_store.keep(upstream.long_cooldown)).cancel)
        yield


# ---- the listener


def refuse_broken_http(reason: str) -> web.Response:
    """An answer outside of every door: no request came that one could read."""
    log.warning("a client was refused: %s", reason)
    body = dump_bytes(openai_error(BadRequest(reason)))
    response = web.Response(body=body, status=400, content_type="application/json")
    response.headers["Server"] = "agproxy"
    response.force_close()
    return response


def connection_class(stall_s: float) -> type[web.RequestHandler]:
    """The class of a client's connection, made here so that nothing loads aiohttp before `serve`.

    It repeats nothing that is not HTTP, and cuts off a client that takes nothing for `stall_s`.
    """

    class Stalling(web.RequestHandler):
        """aiohttp's connection, watched while a client does not take what was written."""

        __slots__ = ("_stall",)

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._stall: asyncio.TimerHandle | None = None
            wire = cast("asyncio.Transport", transport)
            wire.set_write_buffer_limits(UNSENT_BYTES_MAX, UNSENT_BYTES_MAX // 4)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(-1)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_watch()

        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            self._stop_watch()

        def _watch(self, unsent: int) -> None:
            """Cuts the client off if it took nothing since `unsent` bytes were left; else looks
            again after `stall_s`.
            """
            left = self.transport.get_write_buffer_size() if self.transport else unsent
            if left != unsent:
                self._stall = self._loop.call_later(stall_s, self._watch, left)
            elif self.transport:
                self.transport.abort()

        def _stop_watch(self) -> None:
            if self._stall:
                self._stall.cancel()

    return refusing(Stalling)


def refusing(base: type[web.RequestHandler]) -> type[web.RequestHandler]:
    """The class of a connection that answers broken HTTP itself."""

    class ClientConnection(base):  # type: ignore[valid-type,misc]
        __slots__ = ()

        def handle_error(
            self, request: web.BaseRequest, status: int = 500, exc: Any = None, message: Any = None
        ) -> web.StreamResponse:
            """aiohttp would repeat a malformed line to the client and log it, keys and all."""
            if isinstance(exc, ConnectionError):
                raise exc  # the client is gone, which is no mistake
            if status != 400:
                response: web.StreamResponse = super().handle_error(request, status, exc, message)
                return response
            if "Got more than" in str(message) or "Too many" in str(message):  # aiohttp's own words
                return refuse_broken_http(LONG_HEAD)
            return refuse_broken_http(NOT_HTTP)

        def data_received(self, data: bytes) -> None:
            """Fails a body whose framing breaks later: aiohttp would let the reader wait."""
            super().data_received(data)
            request = self._current_request
            if request and self._messages and not request.content.is_eof():
                request.content.set_exception(web.RequestPayloadError("broken framing"))
                request.content.feed_eof()

    return ClientConnection


async def listen(
    app: web.Application,
    host: str,
    port: int,
    stack: AsyncExitStack,
    *,
    stall_s: float = 120.0,
) -> int:
    """Serves until the stack ends, then lets nobody in any more and the app drain; its port.

    Raises OSError.
    """
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    # What runs is finished before connections are closed.
    stack.push_async_callback(runner.shutdown)
    limits: JsonObject = {
        "keepalive_timeout": KEEP_ALIVE_S,
        "lingering_time": LINGER_S,
        "max_line_size": LINE_BYTES_MAX,
        "max_field_size": LINE_BYTES_MAX,
        "auto_decompress": False,  # `unpacked` does it, within bounds
        "access_log": None,
    }
    assert runner.server is not None
    connection = connection_class(stall_s)
    connect = partial(connection, runner.server, loop=loop, **limits)
    listener = await loop.create_server(connect, host, port, backlog=1024)
    stack.callback(listener.close)
    for socket in listener.sockets:
        if sys.platform == "linux":  # a client that takes nothing for so long ends its connection
            socket.setsockopt(6, 18, round(stall_s * 1000))  # IPPROTO_TCP, TCP_USER_TIMEOUT
    return int(listener.sockets[0].getsockname()[1])


# ==============================================================================
# 28. Demo
# ==============================================================================

DemoJson = JsonObject

DEMO_MODELS: Mapping[str, Sequence[str]] = {
    "gemini-embedding-001": ("embedContent", "batchEmbedContents"),
    **dict.fromkeys(
        (
            *("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite"),
            *("gemini-3-pro-preview", "gemini-3-flash-preview"),
        ),
        ("generateContent", "streamGenerateContent", "countTokens"),
    ),
}
DEMO_FAULTS: Mapping[str | None, str] = {  # as Gemini says it
    "429": """{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED",
  "message": "You exceeded your current quota. Please retry in 7s.",
  "details": [
    {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
      {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "quotaValue": "2"}]},
    {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]}}""",
    "503": """{"error": {"code": 503, "status": "UNAVAILABLE",
  "message": "The model is overloaded. Please try again later."}}""",
}
DEMO_BYTES_MAX = 128 << 20  # more than the gateway takes, so that the demo refuses nothing
DEMO_CHUNKS_MAX = 50  # so that the echo of a long prompt is over in half a second too
DEMO_VALUES_MAX = 3072  # as many as Gemini's own embeddings have
DEMO_WORD = re.compile(r"\s*\S+(?:\s+$)?")  # with the space around it: joined they are the text
DEMO_SIGNATURE = "YWdwcm94eS1kZW1v"  # base64 of "agproxy-demo"
DEMO_THOUGHT = {"text": "The demo thinks of nothing: it repeats what it was told.", "thought": True}
DEMO_SCALARS: JsonMap = {"integer": 1, "number": 1.5, "boolean": True, "null": None}
DEMO_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "email": "demo@example.com",
}


def demo_app(fault: str | None) -> web.Application:
    """A small Gemini: the real wire format, answers that follow from the request, no model."""
    app = web.Application(client_max_size=DEMO_BYTES_MAX)
    app.add_routes(
        [
            web.get("/v1beta/models", demo_models),
            web.post("/v1beta/models/{model}:{method}", partial(demo_call, fault)),
            web.route("*", "/{path:.*}", demo_nothing),
        ]
    )
    return app


async def demo_models(request: web.Request) -> web.StreamResponse:
    models = [
        {"name": f"models/{name}", "supportedGenerationMethods": methods}
        for name, methods in DEMO_MODELS.items()
    ]
    return web.json_response({"models": models})


async def demo_nothing(request: web.Request) -> web.StreamResponse:
    return demo_error(404, "NOT_FOUND", f"The demo has no {request.path}.")


def demo_error(code: int, status: str, message: str) -> web.Response:
    error = {"code": code, "status": status, "message": message}
    return web.json_response({"error": error}, status=code)


async def demo_call(fault: str | None, request: web.Request) -> web.StreamResponse:
    model, method = request.match_info["model"], request.match_info["method"]
    if method not in DEMO_MODELS.get(model, ()):
        text = f"models/{model} is not found, or is not supported for {method}."
        return demo_error(404, "NOT_FOUND", text)
    if fault in DEMO_FAULTS:
        return web.json_response(text=DEMO_FAULTS[fault], status=int(fault or 0))
    try:
        messages = demo_messages(method, model, json.loads(await request.read()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        text = f"The demo cannot read this request: {error!r}"
        return demo_error(400, "INVALID_ARGUMENT", text)
    if fault == "cut" or request.query.get("alt") == "sse":
        return await demo_stream(fault, request, messages)
    return web.json_response(messages[0])


async def demo_stream(
    fault: str | None, request: web.Request, messages: list[DemoJson]
) -> web.StreamResponse:
    """Sends the messages one by one; only half of them, and no end, where the fault is "cut"."""
    if fault == "cut":
        messages = messages[: len(messages) // 2]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for message in messages:
        await response.write(f"data: {json.dumps(message)}\r\n\r\n".encode())
        await asyncio.sleep(0.01)
    if fault == "cut" and request.transport:
        request.transport.abort()
    return response


def demo_messages(method: str, model: str, body: DemoJson) -> list[DemoJson]:
    """The chunks of a stream, or the one message that answers another method."""
    if method == "countTokens":
        usage = demo_usage(body.get("generateContentRequest", body), [])
        return [{"totalTokens": usage["totalTokenCount"]}]
    if method == "batchEmbedContents":
        return [{"embeddings": [*map(demo_embedding, body["requests"])]}]
    parts, finish_reason = demo_answer(body)
    usage = demo_usage(body, parts)
    names = {"modelVersion": model, "responseId": "agproxy-demo"}
    groups = [parts]
    if method == "streamGenerateContent":
        groups = [[piece] for part in parts for piece in demo_pieces(part)]
    candidates = [{"content": {"role": "model", "parts": group}, "index": 0} for group in groups]
    candidates[-1]["finishReason"] = finish_reason
    return [{"candidates": [one], "usageMetadata": usage, **names} for one in candidates]


def demo_answer(body: DemoJson) -> tuple[list[DemoJson], str]:
    """The parts of the answer, whole, and its finish reason."""
    heard = [content for content in body["contents"] if content.get("role") != "model"][-1]["parts"]
    prompt = "\n".join(part["text"] for part in heard if "text" in part)
    config = body.get("generationConfig", {})
    thoughts = [DEMO_THOUGHT] * bool(config.get("thinkingConfig", {}).get("includeThoughts"))
    if calls := demo_calls(body, heard, prompt):
        return thoughts + calls, "STOP"
    words = DEMO_WORD.findall(demo_json(config, prompt) or demo_text(body, heard, prompt))
    limit = int(config.get("maxOutputTokens") or len(words))
    answer = {"text": "".join(words[:limit])}
    return [*thoughts, answer], "MAX_TOKENS" if len(words) > limit else "STOP"


def demo_json(config: DemoJson, prompt: str) -> str:
    """An answer as the schema wants it; "" where no JSON is wanted."""
    if config.get("responseMimeType") != "application/json":
        return ""
    value = {"demo": True, "echo": prompt or "demo"}
    if schema := config.get("responseJsonSchema") or config.get("responseSchema"):
        value = demo_value(schema, prompt)
    return json.dumps(value, ensure_ascii=False)


def demo_pieces(part: DemoJson) -> list[DemoJson]:
    """A part as it is streamed: text by a few words, everything else at once."""
    text = part.get("text", "")
    size = max(2, math.ceil(len(text.split()) / DEMO_CHUNKS_MAX))
    pieces = re.findall(rf"(?:\s*\S+){{1,{size}}}(?:\s+$)?", text)
    return [part | {"text": piece} for piece in pieces] or [part]


def demo_calls(body: DemoJson, heard: list[DemoJson], prompt: str) -> list[DemoJson]:
    """A call of each function that the prompt names, or of the first if one is demanded."""
    declared = [f for tool in body.get("tools", ()) for f in tool.get("functionDeclarations", ())]
    functions = {f["name"]: f for f in declared}
    config = body.get("toolConfig", {}).get("functionCallingConfig", {})
    names = config.get("allowedFunctionNames") or list(functions)
    named = [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt)]
    if config.get("mode") == "NONE" or any("functionResponse" in part for part in heard):
        named = []
    if config.get("mode") == "ANY" and not named:
        named = names[:1]
    calls = [demo_function_call(functions[name], prompt) for name in named]
    for call in calls[:1]:  # of parallel calls Gemini signs the first alone
        call["thoughtSignature"] = DEMO_SIGNATURE
    return calls


def demo_function_call(function: DemoJson, prompt: str) -> DemoJson:
    schema = function.get("parametersJsonSchema") or function.get("parameters")
    args = demo_value(schema or {"type": "object"}, prompt)
    return {"functionCall": {"name": function["name"], "args": args}}


def demo_text(body: DemoJson, heard: list[DemoJson], prompt: str) -> str:
    """The request in words, so that a caller sees that nothing got lost on the way."""
    said = ["This is the demo of agproxy; no model was asked."]
    for result in (part["functionResponse"] for part in heard if "functionResponse" in part):
        answer = json.dumps(result["response"], ensure_ascii=False)
        said.append(f"The tool {result['name']} answered: {answer}")
    if prompt:
        said.append(f"You said: {prompt}")
    if files := [part["inlineData"]["mimeType"] for part in heard if "inlineData" in part]:
        kinds = ", ".join(sorted(set(files)))
        said.append(f"(and {len(files)} file{'s' * (len(files) > 1)} of {kinds})")
    system = "\n".join(part["text"] for part in body.get("systemInstruction", {}).get("parts", ()))
    if system:
        said.append(f"(The instructions were: {system})")
    return " ".join(said)


def demo_value(schema: Any, text: str) -> Any:
    """A small value that fits the schema. Raises LookupError where each would contain itself."""
    return DemoValues(schema, text or "demo").fit(schema, frozenset({"#"}))


@dataclass
class DemoValues:
    """Small values that fit the parts of a schema; each free text in them is `text`."""

    root: Any
    text: str

    def fit(self, schema: Any, seen: frozenset[str]) -> Any:
        """A value for a part that was reached by the references `seen`."""
        if not isinstance(schema, dict):
            return self.text
        if ref := schema.get("$ref"):
            if ref in seen:
                raise LookupError(f"{ref} has no end")
            target = functools.reduce(lambda at, key: at[key], ref.split("/")[1:], self.root)
            return self.fit(target, seen | {ref})
        options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        for option in options:
            with suppress(LookupError):  # a linked list ends with its other option, null
                return self.fit(schema | {"anyOf": (), "oneOf": ()} | option, seen)
        if options:
            raise LookupError("no option has an end")
        return self._fit_type(schema, seen)

    def _fit_type(self, schema: DemoJson, seen: frozenset[str]) -> Any:
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type") or ("object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = [*filter("null".__ne__, kind), "null"][0]
        match kind.lower():
            case "object":
                members, names = schema.get("properties", {}), schema.get("required", ())
                return {name: self.fit(members.get(name), seen) for name in names}
            case "array":
                size = demo_size(schema.get("minItems", 1))
                items = schema.get("prefixItems") or [schema.get("items")] * size
                with suppress(LookupError):
                    return [self.fit(item, seen) for item in items]
                return []  # a tree ends where there are no children
            case scalar:
                return self._fit_scalar(scalar, schema)

    def _fit_scalar(self, kind: str, schema: DemoJson) -> Any:
        if kind in ("integer", "number"):
            number = max(DEMO_SCALARS[kind], schema.get("minimum", 1))
            return min(number, schema.get("maximum", number))
        text = DEMO_FORMATS.get(schema.get("format", ""), self.text)
        return DEMO_SCALARS.get(kind, text)


def demo_size(wanted: Any) -> int:
    """The number of values to make, at least one. Raises ValueError where that is too many."""
    if int(wanted) > DEMO_VALUES_MAX:
        raise ValueError(f"{wanted} values are too many")
    return max(1, int(wanted))


def demo_tokens(parts: Iterable[DemoJson]) -> int:
    """Counts each word as a token, also those of a call's JSON, and a file as 258.

    That is what Gemini counts for a small image.
    """
    return sum(
        258 if "inlineData" in part else max(1, len(str(part.get("text", part)).split()))
        for part in parts
    )


def demo_usage(body: DemoJson, said: list[DemoJson]) -> dict[str, int]:
    contents = [*body["contents"], body.get("systemInstruction", {})]
    heard = [part for content in contents for part in content.get("parts", ())]
    counts = {
        "promptTokenCount": demo_tokens(heard),
        "candidatesTokenCount": demo_tokens(part for part in said if "thought" not in part),
        "thoughtsTokenCount": demo_tokens(part for part in said if "thought" in part),
    }
    total = {"totalTokenCount": sum(counts.values())}
    return {name: count for name, count in counts.items() if count} | total


def demo_embedding(request: DemoJson) -> DemoJson:
    """Words by hash, at length 1: texts that share words lie near each other."""
    text = " ".join(part.get("text", "") for part in request["content"]["parts"])
    values = [0.0] * demo_size(request.get("outputDimensionality") or 768)
    for word in re.findall(r"\w+", text.lower()) or [""]:
        values[int(hashlib.sha256(word.encode()).hexdigest(), 16) % len(values)] += 1
    length = math.hypot(*values)
    return {"values": [value / length for value in values]}


# ==============================================================================
# 29. Command line
# ==============================================================================

THREE_WAYS = """\
agproxy serve --demo                       try everything without a key
GEMINI_API_KEY=... agproxy serve           one account from the environment
agproxy serve --accounts accounts.yaml     \
several; write ./accounts.yaml after accounts.yaml.example"""


def file_fingerprint() -> str:
    """The start of this file's SHA-256, so that a copied file can be told apart."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@click.group(invoke_without_command=True, epilog="\b\nThree ways to begin:\n" + THREE_WAYS)
@click.version_option(__version__, message=f"agproxy {__version__} (file {file_fingerprint()})")
@click.pass_context
def main(context: click.Context) -> None:
    """An OpenAI-compatible gateway in front of Gemini, in one file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


FILES = (
    "The accounts file.  [default: $AGPROXY_ACCOUNTS, ./accounts.yaml,"
    " $XDG_CONFIG_HOME/agproxy/accounts.yaml]"
)
accounts_option = click.option("--accounts", metavar="FILE", envvar="AGPROXY_ACCOUNTS", help=FILES)
demo_option = click.option(
    "--demo", is_flag=True, help="Answer from a small Gemini of its own: no key, no network."
)
host_option = click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on.  [default: $AGPROXY_PORT, 8045]",
)


def gateway_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where the gateway is, which a command takes as `where`."""
    return host_option(port_option(accounts_option(command)))


class Unusable(click.ClickException, ConfigError):
    """The user's input cannot be used; the code at the end stands in README's table."""

    exit_code = 2

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{message} [{code}]")


# ---- the config that holds

NO_KEY = """\
Clients must show a key (proxy.auth_mode, proxy.allow_lan_access), but proxy.api_key is not set. \
Paste this fresh one into the accounts file:
proxy:
  api_key: sk-{}"""
read_utf8 = partial(Path.read_text, encoding="utf-8")


def find_file(accounts: str | None) -> Path | None:
    """The accounts file that is named, ./accounts.yaml or $XDG_CONFIG_HOME's; None without one."""
    if accounts:
        return Path(accounts)
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    # of os.path, for the home may not be there, or not for us to see
    places = (Path("accounts.yaml"), Path(os.path.expanduser(home), "agproxy", "accounts.yaml"))
    return next(filter(os.path.exists, places), None)


def load_file(path: Path, with_pool: bool) -> Config:
    """The config of a file. Raises ConfigError."""
    try:
        text = read_utf8(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Name another with --accounts."
    except UnicodeDecodeError:
        problem = "is not UTF-8 text. Save it as UTF-8."
    else:
        return load_config(text, str(path), os.environ, read_utf8, accounts=with_pool)
    raise ConfigError(f"{path}: {problem}")


def load_environment() -> Config:
    """A config of one account, by a key from the environment, or of none. Raises ConfigError."""
    key = (os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY") or "").strip()
    if not key.isprintable():
        raise ConfigError(
            "The key in GEMINI_API_KEY or GOOGLE_API_KEY holds control characters. Export it anew."
        )
    return Config(accounts=(Account("environment", key),) if key else ())


def configured(
    accounts: str | None,
    host: str | None = None,
    port: int | None = None,
    demo: bool = False,
    with_pool: bool = True,
) -> Config:
    """The config that holds: flag > $AGPROXY_PORT > file > default. Raises Unusable."""
    try:
        path = find_file(accounts)
        config = load_file(path, with_pool and not demo) if path else load_environment()
        named = os.environ.get("AGPROXY_PORT") or str(config.port)
        if not re.fullmatch(r"\d{1,5}", named) or int(named) > 65535:
            raise ConfigError(
                f"AGPROXY_PORT is '{named}'. Set it to a number from 0 to 65535, or unset it."
            )
        port = int(named) if port is None else port
        config = replace(config, host=host or config.host, port=port, demo=demo)
        if problems := config_problems(config):
            raise ConfigError("\n".join(problems))
        return config
    except ConfigError as error:
        raise Unusable(
            f"{error}\nMend that; `agproxy check` tries again.", "config_invalid"
        ) from None


def servable(config: Config, with_pool: bool = True) -> Config:
    """The config, if it has the key that clients must show, and accounts where a pool is needed.

    Raises Unusable.
    """
    if config.auth != "off" and not config.api_key:
        raise Unusable(NO_KEY.format(secrets.token_urlsafe(32)), "key_needed")
    if with_pool and not config.accounts and not config.demo:
        raise Unusable(
            f"There is no account to ask. Three ways to go on:\n{THREE_WAYS}", "no_accounts"
        )
    return config


def private_config(accounts: str | None, demo: bool) -> Config:
    """The config of a command that asks the accounts by itself. Raises Unusable."""
    return servable(replace(configured(accounts, demo=demo), auth_mode="off"))


def with_store_path(config: Config) -> Config:
    """The config with its store's full path, where it names none in the user's state folder."""
    if config.store in ("memory", "off"):
        return config
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(config.store or f"{state}/agproxy/state.sqlite3")
    try:
        return replace(config, store=str(path.expanduser()))
    except RuntimeError:
        raise Unusable(
            "There is no such home directory. Set proxy.store to the full path of a file, to"
            " memory, or to off.",
            "config_invalid",
        ) from None


def warn_of_readers(path: Path | None) -> None:
    if path and os.name == "posix" and path.stat().st_mode & 0o077:
        text = f"Warning: others can read the keys in {path}. Close it with: chmod 600 {path}"
        click.echo(text, err=True)


# ---- what it says: texts, tables, the log


def pretty(value: Any) -> str:
    return encoded(json.dumps(value, indent=2, ensure_ascii=False)).decode()


def render_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def banner(config: Config) -> str:
    accounts = f"{len(config.accounts)} ({', '.join(one.name for one in config.accounts)})"
    if config.demo:
        accounts = "the demo; no model is asked"
    auth, key = config.auth, "unused"
    if auth != "off":
        auth, key = f"{auth} ({len(config.api_key)} key(s))", "$KEY"
    urls = (proxy_for(a.base_url, a.proxy or config.upstream_proxy) for a in config.accounts)
    proxies = sorted({re.sub(r"//[^/@]*@", "//", proxy) for proxy in urls if proxy})
    lines = [
        f"agproxy {__version__} listens on {config.bind}:{config.port}",
        f"  base URL  {config.base_url}",
        f"  accounts  {accounts}",
        f"  auth      {auth}",
        f"  default   {config.default_model or 'none: unknown model names are a 404'}",
        f"  at once   {config.max_requests} requests (proxy.max_requests)",
        f"  store     {config.store} (responses; proxy.store)",
        *(f"  proxy     {proxy}" for proxy in proxies),
        f'  export OPENAI_BASE_URL={config.base_url} OPENAI_API_KEY="{key}"',
    ]
    if config.auth == "off" and not is_loopback(config.bind):
        warning = f"anybody on the network can use these accounts; {ASK_FOR_A_KEY}"
        lines.insert(-1, f"  WARNING   {warning}")
    return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields = fields | {"traceback": self.formatException(record.exc_info)}
        moment = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        return dumps({"time": moment, "level": record.levelname.lower(), **fields})


class MaskingHandler(logging.StreamHandler[Any]):
    """Writes no secret, whoever logged it, in whatever form, tracebacks included."""

    _known: Sequence[str] = ()

    def learn(self, config: Config) -> Config:
        """Masks the config's secrets too; the earlier ones stay, for a request may carry them."""
        owners = [*config.accounts, *config.api_key]
        known = itertools.chain.from_iterable(map(secrets_of, owners))
        forms = {form for key in known for form in (key, encode_basestring(key)[1:-1]) if key}
        longest_first = sorted(forms.union(self._known), key=len, reverse=True)
        self._known = longest_first  # one may begin with another
        return config

    def format(self, record: logging.LogRecord) -> str:
        text = SECRET_FORMS.sub("…", super().format(record))
        return functools.reduce(without_secret, self._known, text)


def set_up_logging(level: str, form: str, config: Config) -> MaskingHandler:
    handler = MaskingHandler()
    handler.learn(config)
    text = logging.Formatter("%(asctime)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    return handler


# ---- serve

NO_EXTENSIONS = (
    "Warning: aiohttp's extensions in C are missing, so that each request takes much longer."
    " Install a wheel that has them: pip install --force-reinstall --only-binary aiohttp aiohttp"
)
NO_FILE = "no file is left for another connection; raise ulimit -n, or lower proxy.max_requests"
NO_FILE_S = 10.0  # between two lines that tell the same; asyncio tries up to 1024 times a second


def load_server() -> None:
    """Imports what serves, so that no import holds up the loop later."""
    parser = importlib.import_module("aiohttp.http_parser")
    importlib.import_module("aiohttp.web")
    if parser.HttpRequestParser is parser.HttpRequestParserPy:
        click.echo(NO_EXTENSIONS, err=True)


def raise_file_limit() -> None:
    """Lets this process open as many files as it may."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class LoopErrors:
    """Tells in one line that no further connection can be accepted for now; asyncio tries again."""

    def __init__(self) -> None:
        self._silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: JsonObject) -> None:
        error = context.get("exception")
        if "_start_serving" in str(context.get("handle")):
            return  # asyncio tries a listener again that is closed by now
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self._silent_until:
            self._silent_until = loop.time() + NO_FILE_S
            log.warning(NO_FILE)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs the coroutine, on uvloop where that is installed."""
    factory = None
    with suppress(ImportError):
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


async def run_until_signal(
    config: Config, path: Path | None, load: Callable[[], Config], drain_s: float
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers finish; a second signal kills.

    Raises OSError.
    """
    stop = asyncio.Event()
    on_signals(("SIGTERM", "SIGINT"), lambda _: stop.set())
    source = None
    if path and not config.demo:
        source = Source(path, lambda: with_store_path(load()), asyncio.Event())
    async with AsyncExitStack() as stack:
        config = await with_demo(with_store_path(config), stack)
        await start_serving(config, source, drain_s, stack)
        tell_systemd("READY=1")
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        tell_systemd("STOPPING=1")
        text = f"running answers have {drain_s:g} s, a second signal ends them now"
        click.echo(f"agproxy stops; {text}", err=True)


async def start_serving(
    config: Config, source: Source | None, drain_s: float, stack: AsyncExitStack
) -> None:
    """Listens until the stack ends, and says where. Raises OSError."""
    raise_file_limit()
    asyncio.get_running_loop().set_exception_handler(LoopErrors())
    app = create_app(config, source=source, drain_s=drain_s)
    port = await listen(app, config.bind, config.port, stack, stall_s=config.timeouts.stall_s)
    click.echo(banner(replace(config, port=port)), err=True)
    if source:
        on_signals(("SIGHUP",), lambda _: source.asked.set())
    # else the collector walks the modules again and again: a tenth of what a request costs
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def tell_systemd(state: str) -> None:
    """Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html"""
    if path := os.environ.get("NOTIFY_SOCKET"):
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to, suppress(OSError):
            to.sendto(state.encode(), re.sub("^@", "\0", path))


def on_signals(names: Iterable[str], act: Callable[[int], None]) -> None:
    # Windows has no signal handlers; Ctrl-C ends the loop there
    with suppress(NotImplementedError):
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            asyncio.get_running_loop().add_signal_handler(number, act, number)


async def with_demo(config: Config, stack: AsyncExitStack) -> Config:
    """The config, with the demo's account instead of the file's where the demo is asked for."""
    if not config.demo:
        return config
    fault = os.environ.get("AGPROXY_DEMO_FAULT") or None
    if fault not in (None, "cut", *DEMO_FAULTS):
        raise Unusable(
            f"AGPROXY_DEMO_FAULT is '{fault}'. Set it to 429, 503 or cut, or unset it.",
            "config_invalid",
        )
    port = await listen(demo_app(fault), "127.0.0.1", 0, stack)
    demo = Account("demo", "demo", f"http://127.0.0.1:{port}")
    # without a wait, so that a fault is seen at once
    return replace(config, accounts=(demo,), store="memory", max_wait_s=0)


@main.command()
@gateway_options
@demo_option
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(("debug", "info", "warning", "error")),
)
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
    # so that no reload takes another one, where an editor writes it just then
    where["accounts"] = path and str(path)
    warn_of_readers(path)
    handler = set_up_logging(log_level, log_format, config)
    load_server()
    try:
        run_loop(
            run_until_signal(
                config, path, lambda: handler.learn(servable(configured(**where))), drain_s
            )
        )
    except (OSError, UnicodeError) as error:  # the latter of a name that no host can have
        why = getattr(error, "strerror", "no such name")
        text = f"Cannot listen on {config.bind}:{config.port} ({why})."
        raise Unusable(f"{text} Choose another with --port or --host.", "cannot_listen") from None
    except KeyboardInterrupt:
        pass


# ---- run


def client_environment(config: Config) -> dict[str, str]:
    """The variables by which OpenAI's clients find the gateway."""
    key = config.api_key[0].key if config.api_key else "unused"
    url = config.base_url
    return {"OPENAI_BASE_URL": url, "OPENAI_API_BASE": url, "OPENAI_API_KEY": key}


def child_environment(config: Config) -> dict[str, str]:
    """The environment of a command that is to ask the gateway, and without a proxy."""
    proxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = ",".join(filter(None, (proxied, "127.0.0.1")))
    return {**os.environ, **client_environment(config), "no_proxy": direct, "NO_PROXY": direct}


async def run_command(config: Config, command: Sequence[str]) -> int:
    """Serves one command on a free loopback port with a key of its own. Raises OSError.

    Its exit code, or 128 and the number of the signal that ended it.
    """
    keys = (ClientKey("run", f"sk-{secrets.token_urlsafe(32)}"),)
    config = replace(config, host="127.0.0.1", auth_mode="strict", api_key=keys, store="memory")
    async with AsyncExitStack() as stack:
        config = await with_demo(config, stack)
        app = create_app(config)
        port = await listen(app, "127.0.0.1", 0, stack)
        env = child_environment(replace(config, port=port))
        child = await asyncio.create_subprocess_exec(*command, env=env)
        pass_signals_on(child)
        code = await child.wait()
        click.echo(f"agproxy: {app[gateway_key()].journal.bill()}", err=True)
    return 128 - code if code < 0 else code


def pass_signals_on(child: asyncio.subprocess.Process) -> None:
    """Gives the child the signals that this process gets, as long as it runs."""

    def pass_on(number: int) -> None:
        if child.returncode is None:  # else it has ended, and so does this
            child.send_signal(number)

    on_signals(["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"], pass_on)
    by_terminal = any(map(os.isatty, range(3)))  # then Ctrl-C reaches the child by itself
    on_signals(["SIGINT", "SIGQUIT"], (lambda _: None) if by_terminal else pass_on)


@main.command(context_settings={"allow_interspersed_args": False})
@accounts_option
@demo_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(accounts: str | None, demo: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND with a gateway of its own: a free port, a key for once, the variables set.
    Then print the bill.
    """
    config = private_config(accounts, demo)
    warn_of_readers(find_file(accounts))
    set_up_logging("error", "text", config)
    load_server()
    try:
        sys.exit(asyncio.run(run_command(config, command)))
    except OSError as error:
        raise Unusable(
            f"'{command[0]}' cannot be started ({error.strerror}). Check its name and $PATH.",
            "command_not_started",
        ) from None


# ==============================================================================
# 30. Setup
# ==============================================================================

CLOCK_SKEW_S_MAX = 300.0  # a signed login holds for minutes only; above that it may be refused


async def with_upstream(config: Config, ask: Callable[[Upstream], Awaitable[T]]) -> T:
    """The answer of `ask` to an upstream that is opened for it alone."""
    async with AsyncExitStack() as stack:
        upstream = Upstream(await with_demo(config, stack))
        stack.push_async_callback(upstream.close)
        return await ask(upstream)


@main.command("models")
@accounts_option
@demo_option
@click.argument("name", required=False)
def print_models(accounts: str | None, demo: bool, name: str | None) -> None:
    """List the models that are served, or say what NAME maps to and by which rule."""
    config = private_config(accounts, demo)
    listed = asyncio.run(with_upstream(config, lambda upstream: upstream.catalog.listed()))
    if name is not None:
        return click.echo(explain_mapping(name, config, listed))
    if listed is None:
        text = "The upstream's list cannot be had; `agproxy check --online` says why."
        click.echo(text, err=True)
    aliases = [alias for alias in config.aliases if "*" not in alias]
    click.echo("\n".join(dict.fromkeys([*(listed or STATIC_MODELS), *aliases])))


def explain_mapping(name: str, config: Config, listed: Sequence[str] | None) -> str:
    """The model that a name means, and by which rule. Raises Unusable."""
    try:
        mapped = map_model(name, config, listed)
    except ModelNotFound as error:
        raise Unusable(error.message, "model_not_found") from None
    rule = mapped.rule
    if mapped.wished:
        rule += f"; the upstream does not list {mapped.wished}"
    return f"{name} -> {mapped.model} (by {rule})"


@main.command("check")
@accounts_option
@click.option("--online", is_flag=True, help="Ask each account's upstream, too.")
def check_accounts(accounts: str | None, online: bool) -> None:
    """Say what is wrong with the accounts file, or list its accounts with masked secrets."""
    config = servable(configured(accounts))
    warn_of_readers(find_file(accounts))
    rows = [("account", "kind", "key", "upstream"), *map(describe, config.accounts)]
    if online:
        rows = asyncio.run(with_upstream(config, probe))
    click.echo(render_table(rows))
    if any(account.kind == "cloudcode" for account in config.accounts):
        click.echo(CLOUDCODE_TERMS)
    if "no" in (row[2] for row in rows):
        sys.exit(1)


CLOUDCODE_TERMS = (
    "Google's terms restrict what other programs may do with its consumer logins (kind cloudcode),"
    " and accounts have been closed for it. API keys (kind gemini) are the recommended kind."
)
REMEDIES = {  # Source: https://ai.google.dev/gemini-api/docs/troubleshooting
    "restriction|are blocked": "Let this machine and the Generative Language API pass in the key's"
    " restrictions.",
    "location is not supported": "Use a machine or a proxy (proxy.upstream_proxy) in a region that"
    " Gemini serves.",
    "billing": "Turn on billing for the key's project.",
    "has not been used|is disabled": "Turn on the Generative Language API for the key's project.",
}


def describe(account: Account) -> tuple[str, ...]:
    """An account's row in the table, its credentials masked."""
    credential = f"no login yet: agproxy login {account.name}"
    if account.service_account:
        credential = "service account"
    elif account.kind == "gemini":
        credential = "…"
        if len(account.api_key) >= 20:  # enough of it to tell two apart, too little to use one
            credential = f"{account.api_key[:4]}…{account.api_key[-2:]}"
    elif account.refresh_token:
        credential = "login"
    upstream = re.sub(r"//[^/@]*@", "//…@", account.base_url)
    return account.name, account.kind, credential, upstream


async def probe(upstream: Upstream) -> list[tuple[str, ...]]:
    """The table of what each account's upstream answers, with a remedy where it refuses."""
    rows = [probe_account(upstream, account) for account in upstream.pool.accounts]
    header = ("account", "kind", "reachable", "models", "remedy")
    return [header, *await asyncio.gather(*rows)]


async def probe_account(upstream: Upstream, account: Account) -> tuple[str, ...]:
    names, remedy = (account.name, account.kind), ""
    try:
        listed = await upstream.catalog.models_of(account)
        if not listed:
            remedy = "It lists no model. Check base_url, and what the key may use."
    except UpstreamError as error:
        listed = ()
        remedy = f"{error.message.rstrip('.')}. {remedy_of(error, account.kind)}"
    if abs(upstream.catalog.skew_s) > CLOCK_SKEW_S_MAX:
        clock = f"This machine's clock is off by {upstream.catalog.skew_s:.0f} s."
        remedy = f"{remedy.rstrip()} {clock} Set it by NTP."
    if listed:
        return *names, "yes", str(len(listed)), remedy.strip()
    return *names, "no", "-", remedy.strip()


def remedy_of(error: UpstreamError, kind: str) -> str:
    """Advice for the owner of an account that was refused."""
    if isinstance(error, RateLimited):
        return error.advice
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, error.message, re.IGNORECASE):
            return remedy
    if isinstance(error, CredentialRefused) and kind == "gemini":
        return "Make a new key at https://aistudio.google.com/apikey."
    if ". " in error.message:  # it gives advice itself
        return ""
    return error.advice


@main.command()
@accounts_option
@click.argument("file", type=click.File("rb"))
@click.option("--model", help="As if the body named this model.")
@click.option("--strict", is_flag=True, help="Refuse a body of which something would be dropped.")
def explain(accounts: str | None, file: BinaryIO, model: str | None, strict: bool) -> None:
    """Say what becomes of the request body in FILE (- is standard input),
    without sending anything.
    """
    config = configured(accounts)
    try:
        body = parse_body(file.read())
        if model and isinstance(body, dict):
            body = body | {"model": model}
        door = door_of(body)
        requests = door.parse(body, ())
        mapped = map_model(requests[0].model, config, None)
        traits = traits_of(mapped.model, config.traits)
        built = [build_generate_content(request, traits) for request in requests]
        changes = requests[0].changes + built[0].changes
        if strict:
            refuse_dropped(changes)
    except GatewayError as error:
        raise Unusable(error.message, error.code or "invalid_body") from None
    told: JsonObject = {
        "model": requests[0].model,
        "mapped_model": mapped.model,
        "rule": mapped.rule,
    }
    told |= {
        "fields": explain_fields(body, door.fields, changes),
        "requests": [one.body for one in built],
    }
    click.echo(pretty(told))


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
    """Log in to Google for the account NAME, by its own OAuth client;
    the token is kept beside the accounts file.
    """
    config = configured(accounts)
    account = next((account for account in config.accounts if account.name == name), None)
    if account is None or not account.client_id or not account.credentials.endswith(".token.json"):
        text = (
            f"To log in, '{name}' needs its client_id and client_secret in the accounts file,"
            " and neither credentials nor refresh_token. Mend that."
        )
        raise Unusable(text, "config_invalid")
    try:
        token = asyncio.run(log_in(account, config, paste))
    except UpstreamError as error:
        raise Unusable(error.message, "login_failed") from None
    user = {"type": "authorized_user", **{key: getattr(account, key) for key in USER_KEYS}}
    path = Path(account.credentials)
    try:
        write_private(path, json.dumps(user | {"refresh_token": token}, indent=2))
    except OSError as error:
        raise Unusable(
            f"{path}: cannot be written ({error.strerror}). Mend that, and log in again.",
            "login_failed",
        ) from None
    click.echo(f"The login of {name} is kept in {path}. A running gateway takes it by itself.")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def landing_app(state: str, landed: asyncio.Future[str]) -> web.Application:
    """The page at which a browser's login ends; it hears the code."""

    async def land(request: web.Request) -> web.StreamResponse:
        if request.query.get("state") == state and not landed.done():
            landed.set_result(request.query_string)
        return web.Response(text="agproxy has heard; this page may be closed.")

    app = web.Application()
    app.router.add_get("/{path:.*}", land)
    return app


async def log_in(account: Account, config: Config, paste: bool) -> str:
    """The refresh token that the user grants in a browser. Raises UpstreamError.

    Source: https://developers.google.com/identity/protocols/oauth2/native-app
    """
    state, verifier = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    async with AsyncExitStack() as stack:
        landed = asyncio.get_running_loop().create_future()
        port = 1 if paste else await listen(landing_app(state, landed), "127.0.0.1", 0, stack)
        redirect = f"http://127.0.0.1:{port}/"
        url = login_url(account, redirect, state, verifier)
        click.echo(f"Open this in a browser, and let {account.name} in:\n{url}")
        if paste:  # nothing else waits for the loop, which would keep Ctrl-C from the prompt
            signal.signal(signal.SIGINT, signal.default_int_handler)
            address = click.prompt("The address that the browser ends at (it shows no page)")
            landed.set_result(address.partition("?")[2])
        query = await landed
    code = login_code(f"?{query}", state)
    alone = replace(config, accounts=())
    return await with_upstream(
        alone, lambda upstream: upstream.wire.credentials.redeem(account, code, redirect, verifier)
    )


# ---- env

# A client's name, the place to paste at, and the text. {base}, {root} (without /v1) and the key
# are filled in: {key}, as {word} and {bearer} for a shell, as {json} for the rest.
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
== llm: extra-openai-models.yaml beside the file of `llm logs path`, \
then: llm keys set agproxy --value {word}
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
== cursor: Cursor: Settings > Models > API Keys; \
its servers make the calls, so {root} must be reachable from the internet
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
    if client:
        print_recipe(client, config.base_url, values["OPENAI_API_KEY"])
    elif shell == "json":
        click.echo(pretty(values))
    else:
        click.echo("\n".join(map(SHELLS[shell], values, values.values())))


def print_recipe(client: str, base_url: str, key: str) -> None:
    """Prints what to paste for a client, and on stderr where. Raises Unusable."""
    if client in DOORS_NOT_BUILT:
        raise Unusable(
            f"{DOORS_NOT_BUILT[client]}. Use a client of `agproxy env --help`.", "client_not_served"
        )
    recipe = CLIENTS[client].format(
        base=base_url,
        root=base_url.removesuffix("/v1"),
        key=key,
        word=shlex.quote(key),
        bearer=shlex.quote(f"Authorization: Bearer {key}"),
        json=json.dumps(key),
    )
    place, text = recipe.rstrip().split("\n", 1)
    click.echo(f"# {place}", err=True)
    click.echo(text)


# ==============================================================================
# 31. Operator
# ==============================================================================

NO_GATEWAY = (
    "No gateway answers at http://{}. Start one by `agproxy serve`, or name its --host and --port."
)
STATUS_COUNTS = ("requests_per_minute", "requests_per_day", "tokens_per_day")
STATUS_COLUMNS = (
    *("account", "kind", "model", "in flight"),
    *("requests/min", "requests/day", "tokens/day", "state"),
)


def ask_gateway(where: JsonMap, path: str, data: bytes | None = None) -> Any:
    """The running gateway's answer under /agproxy/, to a POST if there is data. Raises Unusable."""
    from http.client import HTTPConnection, HTTPException

    config = configured(**where, with_pool=False)
    place = urlsplit(config.base_url).netloc
    headers = {}
    if config.api_key:
        headers["Authorization"] = f"Bearer {config.api_key[0].key}".encode()
    gateway = HTTPConnection(place, timeout=10)
    with suppress(OSError, HTTPException), closing(gateway):
        gateway.request("POST" if data else "GET", f"/agproxy/{path}", data, headers)
        response = gateway.getresponse()
        if answer := parse_answer(response.status, response.read()):
            return answer
    raise Unusable(NO_GATEWAY.format(place), "no_gateway")


def parse_answer(status: int, data: bytes) -> Any:
    """A gateway's answer; None from anything else. Raises Unusable for a gateway's error."""
    match parse_json(data):
        case {"error": {"message": message, "code": code}}:
            raise Unusable(str(message), str(code or "server_error"))
        case dict() as answer if status < 400:
            return answer
        case _:
            return None


@main.command("status")
@gateway_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def print_status(as_json: bool, **where: Any) -> None:
    """Show what each account of the running gateway does, which is in cooldown until when and why,
    and what was used.
    """
    status = ask_gateway(where, "status")
    click.echo(pretty(status) if as_json else status_table(status["accounts"]))


def status_table(accounts: Sequence[JsonMap]) -> str:
    """A line an account, and one for each model that it was asked for."""
    rows = [STATUS_COLUMNS]
    for account in accounts:
        state = account["state"]
        if account["quota_group"]:
            state += f"; group {account['quota_group']}"
        names, in_flight = (account["account"], account["kind"]), str(account["in_flight"])
        rows.append((*names, "", in_flight, "", "", "", state))
        for model in account["models"]:
            counts = (used_of(model, quota) for quota in STATUS_COUNTS)
            rows.append(("", "", model["model"], "", *counts, model["state"]))
    return render_table(rows)


def used_of(model: JsonMap, quota: str) -> str:
    if quota in model["limits"]:
        return f"{model[quota]}/{model['limits'][quota]}"
    return str(model[quota])


@main.command("pool")
@gateway_options
@click.argument("action", type=click.Choice(POOL_ACTIONS))
@click.argument("name", metavar="NAME[/MODEL]")
def steer_pool(action: str, name: str, **where: Any) -> None:
    """End the cooldowns of an account of the running gateway, or keep it from being asked, or let
    it be asked again.
    """
    names = [one["account"] for one in ask_gateway(where, "status")["accounts"]]
    # a / may stand in an account's name too
    known = [one for one in names if f"{name}/".startswith(f"{one}/")]
    account = max(known, key=len, default=name.partition("/")[0])
    model = name[len(account) + 1 :]
    order = {"action": action, "account": account, "model": model}
    status = ask_gateway(where, "pool", dump_bytes(order))
    click.echo(status_table(status["accounts"]))


@main.command("why")
@gateway_options
@click.argument("id")
def print_why(id: str, **where: Any) -> None:
    """Say why a request was answered by the account that it was: who was considered, asked, and
    said what.
    """
    summary = ask_gateway(where, f"why/{quote(id, safe='')}")
    decisions = summary.pop("decisions")
    click.echo(" ".join(f"{key}={value}" for key, value in summary.items()))
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
    click.echo(f"{ask_gateway(where, 'reload', b'{}')['accounts']} accounts")


if __name__ == "__main__":
    main()
