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
    11 Monitoring       what is told of a request: headers and the log line
    12 Upstream         HTTP to Gemini, and the one retry loop
    13 Web              auth, routes, handlers
    14 Demo             a small Gemini for --demo; it shares nothing with the rooms that it proves
    15 Command line     what a person types
"""

from __future__ import annotations

import contextlib
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
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from json.encoder import encode_basestring
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, assert_never
from urllib.parse import quote, urlsplit

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
DRAIN_S = 30.0
MODELS_FRESH_S = 3600.0
MODELS_RETRY_S = 60.0
MODELS_WAIT_S = 3.0  # a chat waits no longer for the list of models
CLOCK_SKEW_S_MAX = 300.0
STOPS_MAX = 4
CHOICES_MAX = 128
SIGNATURES_MAX = 20_000
GEMINI_URL = "https://generativelanguage.googleapis.com"

# Accepted by Gemini 3 in place of a thought signature that it did not make.
# Source: https://ai.google.dev/gemini-api/docs/thought-signatures
SIGNATURE_SENTINEL = "skip_thought_signature_validator"

# Names that OpenAI clients are set to by default, by what they promise: fast, strong or small.
BUILTIN_ALIASES: Mapping[str, str] = {
    "gpt-4o": "gemini-2.5-flash",
    "gpt-*mini*": "gemini-2.5-flash-lite",
    "gpt-*nano*": "gemini-2.5-flash-lite",
    "gpt-5*": "gemini-2.5-pro",
    "gpt-5*mini*": "gemini-2.5-flash",
    "gpt-5*nano*": "gemini-2.5-flash-lite",
    "gpt-*": "gemini-2.5-flash",
    "chatgpt-*": "gemini-2.5-flash",
    "o1*": "gemini-2.5-pro",
    "o3*": "gemini-2.5-pro",
    "o4*": "gemini-2.5-pro",
    "o1-mini*": "gemini-2.5-flash",
    "o3-mini*": "gemini-2.5-flash",
    "o4-mini*": "gemini-2.5-flash",
    "codex*": "gemini-2.5-pro",
    "codex*mini*": "gemini-2.5-flash",
    "davinci-*": "gemini-2.5-flash",
    "babbage-*": "gemini-2.5-flash-lite",
    "text-davinci-*": "gemini-2.5-flash",
    "claude-*": "gemini-2.5-pro",
    "claude-*haiku*": "gemini-2.5-flash-lite",
    "claude-instant*": "gemini-2.5-flash-lite",
    "text-embedding-*": "gemini-embedding-001",
}
# What is served while the upstream's own list cannot be had.
STATIC_MODELS = ("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-embedding-001")

# Responses input items that only a hosted tool makes; in a replayed history they are passed over.
HOSTED_ITEMS = re.compile(
    r"reasoning|compaction|(web_search|file_search|image_generation|code_interpreter|local_shell|shell|apply_patch"
    r"|computer|tool_search)_(call|call_output|output)|mcp_\w+|program\w*"
)
# Tools that OpenAI itself would run; Codex sends web_search with every request.
HOSTED_TOOLS = re.compile(
    r"web_search\w*|file_search|code_interpreter|image_generation|mcp|computer\w*|local_shell|shell|apply_patch"
    r"|tool_search|programmatic_tool_calling"
)

BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"

# ==============================================================================
# 2. Errors
# ==============================================================================
# GatewayError
# ├── BadRequest            the client's mistake, with the field's path
# ├── Unauthorized, Forbidden, ModelNotFound, UnknownUrl, MethodNotAllowed, BodyTooLarge
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
    advice: ClassVar[str] = "Try again."

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class BadRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    default_code = None


class Unauthorized(GatewayError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(GatewayError):
    status = 403
    type = "permission_error"
    default_code = "permission_denied"


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
    advice = "Wait, or add an account of another project."


class CredentialRefused(UpstreamError):
    remedy = "next_account"
    advice = "Check the keys with `agproxy check --online`."


class Overloaded(UpstreamError):
    status = 503
    remedy = "same_account"
    default_code = "server_is_overloaded"
    advice = "Try again later, or ask another model."


class UpstreamTimeout(UpstreamError):
    status = 504
    remedy = "same_account"
    default_code = "timeout"
    advice = "Try again, or raise proxy.timeouts."


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
    """What the accounts file, a flag or the environment says cannot be used: one line a problem, with the remedy."""


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    api_key: str = field(repr=False)
    base_url: str = GEMINI_URL
    kind: str = "gemini"
    email: str | None = None


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A key that lets a client in, and the name by which the log knows that client."""

    name: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect_s: float = 10.0
    first_event_s: float = 300.0
    idle_s: float = 300.0
    total_s: float | None = None
    """None: as long as it takes."""


@dataclass(frozen=True, slots=True)
class Config:
    accounts: tuple[Account, ...]
    host: str | None = None
    port: int = 8045
    auth_mode: str = "auto"
    api_key: tuple[ClientKey, ...] = ()
    allow_lan_access: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    show_account: str = "masked"
    upstream_proxy: str | None = field(default=None, repr=False)
    strict: bool = False
    max_wait_s: float = 10.0
    store: str | None = None
    timeouts: Timeouts = Timeouts()
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    traits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    """Keys that were read and checked, but have no effect yet."""
    demo: bool = False

    @property
    def auth(self) -> str:
        """The effective mode: `auto` asks for a key exactly where the LAN can reach the gateway."""
        if self.auth_mode != "auto":
            return self.auth_mode
        return "all_except_health" if self.allow_lan_access else "off"

    @property
    def bind(self) -> str:
        """The address to listen on."""
        return self.host or ("0.0.0.0" if self.allow_lan_access else "127.0.0.1")

    @property
    def base_url(self) -> str:
        """What a client on this machine is set to."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.bind, self.bind)
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.port}/v1"


class ConfigFile:
    """The YAML nodes of one accounts file. What is wrong is collected with its line, so that all of it is told at once."""

    def __init__(self, source: str, env: Mapping[str, str]) -> None:
        self.source = source
        self.env = env
        self.problems: list[str] = []
        self.unused: list[str] = []

    def at(self, node: Any, text: str) -> str:
        return f"{self.source}:{node.start_mark.line + 1}: {text}"

    def section(self, node: Any, path: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """The values given in a mapping, each read by its kind; null is as if the key were not there."""
        values: dict[str, Any] = {}
        for key, value in self.pairs(node, path or "the file", kinds):
            where = f"{path}.{key.value}".lstrip(".")
            if key.value not in kinds:
                self.problems.append(self.at(key, f"unknown key '{key.value}' {nearest(key.value, kinds)}"))
            elif key.value in values:
                self.problems.append(self.at(key, f"'{where}' stands here twice; remove one."))
            elif value.tag != YAML_NULL:
                if where in NOT_USED_YET:
                    self.unused.append(self.at(key, f"'{where}' is not used yet."))
                try:
                    values[key.value] = kinds[key.value](self, value, where)
                except ValueError as error:
                    self.problems.append(self.at(value, f"'{where}' {error}"))
        return values

    def pairs(self, node: Any, path: str, known: Iterable[str]) -> list[tuple[Any, Any]]:
        if node is None or node.tag == YAML_NULL:
            return []
        if node.tag != YAML_MAP:
            self.problems.append(self.at(node, f"{path} must hold 'key: value' lines (keys: {', '.join(known)})."))
            return []
        pairs: list[tuple[Any, Any]] = node.value
        return pairs


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
    match = re.fullmatch(r"\$\{(\w+)\}|env:(\w+)", value)
    if match and not file.env.get(match[1] or match[2]):
        raise ValueError(f"needs the environment variable {match[1] or match[2]}, which is not set. Export it first.")
    return file.env[match[1] or match[2]] if match else value


def read_flag(file: ConfigFile, node: Any, where: str) -> bool:
    value = read_text(file, node, where).lower()
    if value not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError("must be true or false.")
    return value in ("true", "yes", "on")


def read_number(low: float, high: float, kind: type[int | float] = float) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> float:
        try:
            value = kind(node.value)
        except (TypeError, ValueError):
            value = kind(low - 1)
        if not low <= value <= high:
            raise ValueError(f"must be a {'whole ' * (kind is int)}number from {low} to {high}.")
        return value

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


def read_url(file: ConfigFile, node: Any, where: str) -> str:
    value = read_secret(file, node, where).rstrip("/")
    if not re.match(r"https?://[^/\s]+", value):
        raise ValueError("must be a URL that begins with http:// or https://.")
    return value


def read_map(kind: Kind) -> Kind:
    def read(file: ConfigFile, node: Any, where: str) -> dict[str, Any]:
        pairs = file.pairs(node, where, ["NAME"])
        return {str(key.value): kind(file, value, f"{where}.{key.value}") for key, value in pairs}

    return read


def read_section(kinds: Mapping[str, Kind]) -> Kind:
    return lambda file, node, where: file.section(node, where, kinds)


def read_keys(file: ConfigFile, node: Any, where: str) -> tuple[ClientKey, ...]:
    """One key, or a list of `{name, key}`."""
    if node.tag != YAML_LIST:
        return (ClientKey("client", read_secret(file, node, where)),)
    given = [file.section(item, f"{where}[{i}]", CLIENT_KEY_KEYS) for i, item in enumerate(node.value)]
    if not all(len(one) == len(CLIENT_KEY_KEYS) for one in given):
        raise ValueError("must be one key, or a list of entries with a `name` and a `key` each.")
    return tuple(ClientKey(**one) for one in given)


def read_accounts(file: ConfigFile, node: Any, where: str) -> tuple[Account, ...]:
    if node.tag != YAML_LIST:
        raise ValueError("must be a list: each account begins with '- name: ...'.")
    accounts = [read_account(file, item, f"{where}[{i}]") for i, item in enumerate(node.value)]
    return tuple(account for account in accounts if account)


def read_account(file: ConfigFile, node: Any, where: str) -> Account | None:
    """The account; None where it is disabled or a problem was noted."""
    if any(key.value == "enabled" and value.value == "false" for key, value in file.pairs(node, where, ACCOUNT_KEYS)):
        return None
    known = len(file.problems)
    given = file.section(node, where, ACCOUNT_KEYS)
    given.pop("enabled", None)
    given.setdefault("name", given.get("email"))
    for key, remedy in (("name", "a `name` or an `email`"), ("api_key", "an `api_key`")):
        if not given.get(key) and len(file.problems) == known:
            file.problems.append(file.at(node, f"'{where}' needs {remedy}."))
    return Account(**given) if len(file.problems) == known else None


CLIENT_KEY_KEYS: Mapping[str, Kind] = {"name": read_text, "key": read_secret}
TIMEOUT_KEYS: Mapping[str, Kind] = dict.fromkeys(
    ("connect_s", "first_event_s", "idle_s", "total_s"), read_number(0.001, 86400)
)
TRAIT_KEYS: Mapping[str, Kind] = {"thinks": read_flag, "signatures": read_flag}
PROXY_KEYS: Mapping[str, Kind] = {
    "host": read_text,
    "port": read_number(0, 65535, int),
    "auth_mode": read_word("off", "strict", "all_except_health", "auto"),
    "api_key": read_keys,
    "allow_lan_access": read_flag,
    "allowed_hosts": read_texts,
    "cors_origins": read_texts,
    "show_account": read_word("full", "masked", "off"),
    "upstream_proxy": read_url,
    "strict": read_flag,
    "max_wait_s": read_number(0, 3600),
    "store": read_text,
    "timeouts": read_section(TIMEOUT_KEYS),
}
MODELS_KEYS: Mapping[str, Kind] = {
    "default": read_text,
    "map": read_map(read_text),
    "fallback": read_map(read_texts),
    "traits": read_map(read_section(TRAIT_KEYS)),
}
ACCOUNT_KEYS: Mapping[str, Kind] = {
    "name": read_text,
    "email": read_text,
    "kind": read_word("gemini"),
    "enabled": read_flag,
    "api_key": read_secret,
    "base_url": read_url,
}
SECTIONS: Mapping[str, Kind] = {
    "proxy": read_section(PROXY_KEYS),
    "models": read_section(MODELS_KEYS),
    "accounts": read_accounts,
}
NOT_USED_YET = {"proxy.strict", "proxy.max_wait_s", "proxy.store"} | {"models.fallback"}


def load_config(text: str, source: str, env: Mapping[str, str]) -> Config:
    """The accounts file as a Config. Raises ConfigError with a line `file:line: what` for each problem."""
    import yaml

    file = ConfigFile(source, env)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source}{line}: not valid YAML ({getattr(error, 'problem', error)}). Mend this line."
        ) from None
    given = file.section(node, "", SECTIONS)
    proxy, models = given.get("proxy", {}), given.get("models", {})
    timeouts = Timeouts(**proxy.pop("timeouts", {}))
    renamed = {"default": "default_model", "map": "aliases"}
    chosen = {renamed.get(key, key): value for key, value in models.items()}
    config = Config(given.get("accounts", ()), **proxy, **chosen, timeouts=timeouts, unused=tuple(file.unused))
    problems = [*file.problems, *(f"{source}: {problem}" for problem in config_problems(config))]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def config_problems(config: Config) -> list[str]:
    """What cannot be right or safe in values that are each right on their own."""
    names = [account.name for account in config.accounts]
    problems = [
        f"two accounts are named '{name}'; give each its own `name`."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if not config.allow_lan_access and not is_loopback(config.bind):
        problems.append(f"host {config.bind} is reachable from outside; set proxy.allow_lan_access: true to allow it.")
    return problems


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ip_address(host.strip("[]")).is_loopback)


def is_address(host: str) -> bool:
    """Whether a host is a literal address and not a name."""
    try:
        return bool(ip_address(host.strip("[]")))
    except ValueError:
        return False


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
    thoughts: bool = False
    """Wants to see summaries of the model's thoughts."""
    n: int = 1
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
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

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


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
            what = f"'{path}'" if path else "The body"
            raise BadRequest(f"{what} is not a JSON object. Send {{...}}.", code="invalid_type", param=path or None)
        self.value = value
        self.path = path

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, kind: type | tuple[type, ...], word: str) -> Any:
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, "has the wrong type", f"Send {word}", "invalid_type")
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
        return self.wrong(key, "is missing", "Add it", "missing_required_parameter")

    def wrong(self, key: str, what: str, remedy: str, code: str = "invalid_value") -> BadRequest:
        """The refusal of a field: what is wrong with it, and what to do."""
        return BadRequest(f"'{self.at(key)}' {what}. {remedy}.", code=code, param=self.at(key))

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool, "true or false"))

    def number(self, key: str, low: float, high: float) -> float | None:
        value: float | None = self.get(key, (int, float), "a number")
        if value is not None and not low <= value <= high:
            code = "decimal_below_min_value" if value < low else "decimal_above_max_value"
            raise self.wrong(key, f"is {value}", f"Send a number from {low} to {high}", code)
        return value

    def count(self, key: str, high: float = math.inf) -> int | None:
        value: int | None = self.get(key, int, "a whole number")
        if value is not None and not 1 <= value <= high:
            code = "integer_below_min_value" if value < 1 else "integer_above_max_value"
            limits = "at least 1" if math.isinf(high) else f"from 1 to {high}"
            raise self.wrong(key, f"is {value}", f"Send a whole number, {limits}", code)
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
    """A chat completions body; one with `input` instead of `messages` is read as Responses, for Cursor sends it here.

    Raises BadRequest.
    """
    fields = Fields(body)
    if fields.value.get("messages") is None and fields.value.get("input") is not None:
        return replace(parse_response(body), **parse_sampling(fields))
    messages = fields.objects("messages")
    if not messages:
        raise fields.missing("messages")
    tools = tuple(parse_tool(tool) for tool in fields.objects("tools"))
    return Request(
        model=fields.needed_text("model"),
        system=tuple(text for m in messages if m.value.get("role") in ("system", "developer") for text in texts_of(m)),
        messages=tuple(parse_message(m) for m in messages if m.value.get("role") not in ("system", "developer")),
        tools=tools,
        tool_choice=parse_tool_choice(fields, tools),
        max_output_tokens=fields.count("max_completion_tokens") or fields.count("max_tokens"),
        json_format=parse_format(fields.object("response_format"), nested=True),
        thoughts=True,
        **parse_sampling(fields),
    )


def parse_sampling(fields: Fields) -> dict[str, Any]:
    """The fields that chat, completions and (but for `n`, `stop` and `seed`) Responses share."""
    stream_options = fields.object("stream_options")
    return {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "seed": fields.integer("seed"),
        "stop": parse_stop(fields),
        "n": fields.count("n", CHOICES_MAX) or 1,
        "stream": fields.flag("stream"),
        "include_usage": bool(stream_options and stream_options.flag("include_usage")),
    }


def parse_completion(body: Any) -> list[Request]:
    """A completions body: one request a prompt. Raises BadRequest."""
    fields = Fields(body)
    suffix = fields.text("suffix")
    shared = Request(
        model=fields.needed_text("model"),
        messages=(),
        system=(COMPLETE_THE_MIDDLE,) if suffix else (),
        max_output_tokens=fields.count("max_tokens"),
        **parse_sampling(fields),
    )
    prompts = parse_prompts(fields)
    if len(prompts) * shared.n > CHOICES_MAX:
        raise fields.wrong("prompt", f"times 'n' is more than {CHOICES_MAX} choices", "Send fewer prompts at once")
    wholes = [f"<prefix>{prompt}</prefix>\n<suffix>{suffix}</suffix>" if suffix else prompt for prompt in prompts]
    return [replace(shared, messages=(Message("user", (Text(whole),)),)) for whole in wholes]


COMPLETE_THE_MIDDLE = (
    "Write the text that belongs between the prefix and the suffix. Answer with that text alone, without repeating "
    "either and without Markdown fences."
)


def parse_prompts(fields: Fields) -> list[str]:
    value = fields.value.get("prompt")
    prompts = value if isinstance(value, list) and value else [value or ""]
    if not all(isinstance(prompt, str) for prompt in prompts):
        what = "is neither a string nor an array of strings; token arrays are not served"
        raise fields.wrong("prompt", what, "Send the text itself", "invalid_type")
    return prompts


def parse_response(body: Any) -> Request:
    """A Responses body. Raises BadRequest."""
    fields = Fields(body)
    refuse_state(fields)
    messages, system = parse_input(fields)
    tools = tuple(parse_tool(tool) for tool in fields.objects("tools") if not is_hosted(tool))
    text, reasoning = fields.object("text"), fields.object("reasoning")
    instructions = fields.text("instructions")
    return Request(
        model=fields.needed_text("model"),
        system=(*([instructions] if instructions else []), *system),
        messages=messages,
        tools=tools,
        tool_choice=parse_tool_choice(fields, tools),
        max_output_tokens=fields.count("max_output_tokens"),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        json_format=parse_format(text and text.object("format"), nested=False),
        thoughts=bool(reasoning and reasoning.text("summary")),
        stream=fields.flag("stream"),
    )


def refuse_state(fields: Fields) -> None:
    """What asks for an answer kept on this side, which is not served."""
    if fields.text("previous_response_id"):
        what = f"names '{fields.value['previous_response_id']}', which is not kept here"
        raise fields.wrong("previous_response_id", what, "Send the whole input", "previous_response_not_found")
    for key in ("background", "conversation", "prompt"):
        if fields.value.get(key):
            raise fields.wrong(key, "is not served", "Leave it out", "unsupported_parameter")


def parse_input(fields: Fields) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The messages of a Responses input, neighbours of one role merged, and its system texts."""
    value = fields.value.get("input")
    if isinstance(value, str):
        return (Message("user", (Text(value),)),), ()
    if value is None:
        raise fields.missing("input")
    messages: list[Message] = []
    system: list[str] = []
    for item in fields.objects("input"):
        if item.value.get("role") in ("system", "developer"):
            system += texts_of(item)
        elif message := parse_item(item):
            joined = messages and messages[-1].role == message.role != "user"
            parts = messages.pop().parts if joined else ()
            messages.append(replace(message, parts=parts + message.parts))
    return tuple(messages), tuple(system)


def parse_item(item: Fields) -> Message | None:
    """One input item; None for what only a hosted tool could have made."""
    kind = item.text("type") or "message"
    if kind == "message":
        return parse_message(item)
    if kind == "function_call":
        call = ToolCall(item.needed_text("call_id"), item.needed_text("name"), item.text("arguments") or "{}")
        return Message("assistant", (call,))
    if kind == "function_call_output":
        return Message("tool", (ToolResult(item.needed_text("call_id"), "\n".join(texts_of(item, "output"))),))
    if HOSTED_ITEMS.fullmatch(kind):
        return None
    raise item.wrong("type", f"is '{kind}', which is not served", "Send message, function_call or function_call_output")


def is_hosted(tool: Fields) -> bool:
    return HOSTED_TOOLS.fullmatch(tool.text("type") or "") is not None


def parse_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.value.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.wrong("stop", "has the wrong type", "Send a string or an array of strings", "invalid_type")
    if len(stops) > STOPS_MAX:
        raise fields.wrong("stop", f"holds {len(stops)} strings", f"Send at most {STOPS_MAX}")
    return tuple(stop for stop in stops if stop)


def parse_format(form: Fields | None, *, nested: bool) -> JsonFormat | None:
    """`response_format` of chat, where the schema is nested, or `text.format` of Responses, where it is not."""
    kind = form and form.text("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return JsonFormat(None)
    if kind == "json_schema":
        spec = form.object("json_schema") if nested else form
        if spec is None:
            raise form.missing("json_schema")
        schema = spec.object("schema")
        return JsonFormat(schema.value if schema else None)
    raise form.wrong("type", f"is '{kind}', which is not served", "Send text, json_object or json_schema")


def parse_tool(tool: Fields) -> Tool:
    """A function tool, nested as chat has it or flat as Responses has it."""
    kind = tool.text("type") or "function"
    if kind != "function":
        raise tool.wrong("type", f"is '{kind}', which is not served", "Send 'function'")
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
        what = "names no declared function"
        raise fields.wrong("tool_choice", what, "Send none, auto, required or the name of one of 'tools'")
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
    raise message.wrong("role", f"is '{role}'", "Send system, developer, user, assistant or tool")


def texts_of(message: Fields, key: str = "content") -> list[str]:
    return [part.text for part in parse_content(message, key) if isinstance(part, Text)]


def parse_content(message: Fields, key: str = "content") -> list[Part]:
    content = message.value.get(key)
    if isinstance(content, str):
        return [Text(content)] if content else []
    return [part for item in message.objects(key) if (part := parse_part(item)) != Text("")]


def parse_part(part: Fields) -> Part:
    kind = part.text("type")
    if kind in ("text", "input_text", "output_text"):
        return Text(part.text("text") or "")
    if kind == "refusal":
        return Text(part.text("refusal") or "")
    if kind in ("image_url", "input_image"):
        return parse_image(part)
    raise part.wrong("type", f"is '{kind}', which is not served", "Send text or image_url")


DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[^;,]*)*;base64,", re.ASCII)


def parse_image(part: Fields) -> Media:
    value = part.value.get("image_url")
    url = Fields(value, part.at("image_url")).needed_text("url") if isinstance(value, dict) else value
    match = DATA_URL.match(url) if isinstance(url, str) else None
    if match is None or not isinstance(url, str):
        raise part.wrong("image_url", "is no data: URL", "Send data:image/png;base64,...", "invalid_image_url")
    data = url[match.end() :]
    payload = data.encode("ascii", "replace").rstrip(b"=")
    if not payload or payload.translate(None, BASE64_ALPHABET) or len(payload) % 4 == 1:
        raise part.wrong("image_url", "is not valid base64", "Encode the file anew", "invalid_image_url")
    return Media(match[1], data)


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


@dataclass(frozen=True, slots=True)
class Mapped:
    """The upstream's name for a model, and by which rule."""

    model: str
    rule: str
    wished: str | None = None
    """What the rule said, where the upstream lists another name for it."""


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
    near = difflib.get_close_matches(bare, [*config.aliases, *(listed or STATIC_MODELS), *BUILTIN_ALIASES], 3, 0.4)
    hint = f" Near names: {', '.join(near)}." if near else ""
    raise ModelNotFound(
        f"The model '{name}' is not known.{hint} Use one of GET /v1/models, or map it in models.map.", param="model"
    )


def look_up(name: str, table: Iterable[str]) -> str | None:
    """The table's key for a name: itself, else the wildcard with most literal characters, then the longest start."""
    if name in table:
        return name
    hits = [p for p in table if "*" in p and re.fullmatch(".*".join(map(re.escape, p.split("*"))), name)]
    return max(hits, key=lambda p: (len(p.replace("*", "")), len(p.split("*")[0])), default=None)


VERSION = re.compile(r"gemini-(\d+)(?:\.(\d+))?")
SUFFIX = re.compile(r"(-preview|-latest|-exp|-\d{2,4})+$")
NEWEST = (4, 0)


def settled(model: str, rule: str, listed: Sequence[str] | None) -> Mapped:
    """A gemini name as the upstream lists it: itself, itself but for -preview, a date or -latest, or its tier's newest."""
    if listed is None or model in listed or not model.startswith("gemini-"):
        return Mapped(model, rule)
    twins = [name for name in listed if SUFFIX.sub("", name) == SUFFIX.sub("", model)]
    tier = [name for name in listed if tier_of(name) == tier_of(model)]
    best = max(twins or tier, key=lambda name: (version_of(name), not SUFFIX.search(name), name), default=None)
    return Mapped(best, rule, wished=model) if best else Mapped(model, rule)


def tier_of(model: str) -> str:
    """What is left of a name without version and suffix: pro, flash, flash-lite, ..."""
    return VERSION.sub("", SUFFIX.sub("", model))


def version_of(model: str) -> tuple[int, int]:
    match = VERSION.search(model)
    return (int(match[1]), int(match[2] or 0)) if match else NEWEST


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model can and must do; asked here, never by its name in passing."""

    thinks: bool
    """Thinks unless it is told not to, so that summaries of its thoughts can be asked for."""

    signatures: bool
    """Refuses a function call in the history that has no thought signature."""


def traits_of(model: str, overrides: Mapping[str, Mapping[str, Any]]) -> Traits:
    """Traits by the parsed version, a name without one counting as the newest; `overrides` (models.traits) beat them."""
    version = version_of(model)
    quiet = version < (2, 5) or (version == (2, 5) and tier_of(model) not in ("-pro", "-flash"))
    traits = Traits(thinks=model.startswith("gemini-") and not quiet, signatures=version >= (3, 0))
    pattern = look_up(model, overrides)
    return replace(traits, **overrides[pattern]) if pattern else traits


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
            return PoolExhausted("No account is configured. Add one under accounts.", Overloaded("no account"), None)
        wait = min((until - now for until, _ in rests.values()), default=None)
        text = "; ".join(f"{name}: {error.message.rstrip('.')}" for name, error in reasons.items())
        last = list((refusals or reasons).values())[-1]
        wait = wait or last.retry_after_s
        again = f" Please try again in {wait:.1f}s." if wait and last.status in (429, 503) else ""
        return PoolExhausted(f"No account could answer ({text}). {last.advice}{again}", last, wait)


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
    if config := build_generation_config(request, traits):
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


def build_generation_config(request: Request, traits: Traits) -> dict[str, Any]:
    config: dict[str, Any] = {
        "temperature": request.temperature,
        "topP": request.top_p,
        "maxOutputTokens": request.max_output_tokens,
        "seed": None if request.seed is None else request.seed & 0x7FFFFFFF,  # Gemini's is an int32
        "stopSequences": list(request.stop) or None,
        "thinkingConfig": {"includeThoughts": True} if request.thoughts and traits.thinks else None,
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

    def close(self, error: UpstreamError | None = None) -> list[Event]:
        """Events of the end of the body: the finish, or the truth that there was none, and by which `error`."""
        events = self._read(self._splitter.close())
        return events if self._failed else events + self._finish(error)

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
        for choice in sorted(self._open):
            self._end_part(choice)
        self._events.append(Failed(error))

    def _finish(self, error: UpstreamError | None = None) -> list[Event]:
        unfinished = (self._said | self._called | set(self._open)) - set(self._reasons)
        if unfinished or not self._reasons:
            self._fail(error or UpstreamBroken("Gemini's answer broke off before its end. Try again."))
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
FINGERPRINT = "fp_agproxy"


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


def render_choice(index: int, choice: Choice) -> dict[str, Any]:
    thoughts = "".join(part.text for part in choice.parts if isinstance(part, Thinking))
    calls = [render_call(part) for part in choice.parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.reason}


@dataclass(frozen=True, slots=True)
class Head:
    """What the objects of one answer repeat."""

    id: str
    """24 hexadecimal digits; each form puts its own prefix before them."""
    created: int
    model: str
    include_usage: bool = False
    now: Callable[[], float] = float


class Frames:
    """What the chunks of chat and completions have in common: head, tail, usage chunk, error, [DONE]."""

    def __init__(self, id: str, kind: str, head: Head, more: Mapping[str, Any]) -> None:
        known = {"id": id, "object": kind, "created": head.created, "model": head.model, **more}
        self.head = f'data: {dumps(known)[:-1]},"choices":['
        self.tail = (',"usage":null' if head.include_usage else "") + "}\n\n"
        self._include_usage = head.include_usage

    def choice(self, entry: str) -> str:
        return f"{self.head}{entry}]{self.tail}"

    def last(self, end: Ended | Failed) -> str:
        if isinstance(end, Failed):
            return f"data: {dumps(error_body(end.error))}\n\n"
        usage = f'{self.head}],"usage":{dumps(render_usage(end.usage))}}}\n\n' if self._include_usage else ""
        return usage + DONE


class ChatRenderer:
    """Events to the frames of a chat stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        self._about = {"service_tier": "default", "system_fingerprint": FINGERPRINT}
        self._frames = Frames(f"chatcmpl-{head.id}", "chat.completion.chunk", head, self._about)
        self._head = head
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
                return self._delta(choice, "{}", f'"{reason}"')
            case Ended() | Failed():
                return self._frames.last(event)
            case Started() | PartStart() | PartEnd():
                return ""
            case _:
                assert_never(event)

    def _call(self, choice: int, entry: dict[str, Any]) -> str:
        return self._delta(choice, dumps({"tool_calls": [{"index": self._calls[choice], **entry}]}))

    def _delta(self, choice: int, delta: str, finish: str = "null") -> str:
        first = "" if choice in self._opened else self._first(choice)
        frame = f'{{"index":{choice},"delta":{delta},"logprobs":null,"finish_reason":{finish}}}'
        return first + self._frames.choice(frame)

    def _first(self, choice: int) -> str:
        self._opened.add(choice)
        return self._delta(choice, '{"role":"assistant","content":"","refusal":null}')

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The chat.completion object."""
        return {
            "id": f"chatcmpl-{self._head.id}",
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            **self._about,
            "choices": [render_choice(index, choice) for index, choice in sorted(reply.choices.items())],
            "usage": render_usage(reply.usage),
        }


class CompletionRenderer:
    """Events to the frames of a completions stream, or the object of a whole answer."""

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        prompts = body.get("prompt") or ""
        self._echo = (prompts if isinstance(prompts, list) else [prompts]) if body.get("echo") else []
        self._n = body.get("n") or 1
        self._frames = Frames(f"cmpl-{head.id}", "text_completion", head, {"system_fingerprint": FINGERPRINT})
        self._head = head
        self._opened: set[int] = set()

    def render(self, event: Event) -> str:
        match event:
            case TextDelta(choice, text):
                return self._text(choice, text)
            case Finished(choice, reason):
                return self._text(choice, "", "stop" if reason == "tool_calls" else reason)
            case Ended() | Failed():
                return self._frames.last(event)
            case Started() | PartStart() | PartEnd() | ThinkingDelta() | ArgumentsDelta():
                return ""
            case _:
                assert_never(event)

    def _text(self, choice: int, text: str, reason: str | None = None) -> str:
        if choice not in self._opened:
            self._opened.add(choice)
            text = self._prompt(choice) + text
        finish = f'"{reason}"' if reason else "null"
        entry = f'{{"text":{encode_basestring(text)},"index":{choice},"logprobs":null,"finish_reason":{finish}}}'
        return self._frames.choice(entry)

    def _prompt(self, choice: int) -> str:
        """The prompt that a choice echoes: choices are numbered prompt by prompt."""
        return self._echo[choice // self._n] if self._echo else ""

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The text_completion object."""
        choices = [
            {
                "text": self._prompt(index) + choice.text,
                "index": index,
                "logprobs": None,
                "finish_reason": "stop" if choice.reason == "tool_calls" else choice.reason,
            }
            for index, choice in sorted(reply.choices.items())
        ]
        return {
            "id": f"cmpl-{self._head.id}",
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": render_usage(reply.usage),
        }


class ResponseRenderer:
    """Events to the events of a Responses stream, or the Response object of a whole answer.

    Source: https://platform.openai.com/docs/api-reference/responses-streaming
    """

    def __init__(self, head: Head, body: Mapping[str, Any]) -> None:
        self._head = head
        self._response = response_template(head, body)
        self._sequence = 0
        self._item: dict[str, Any] = {}
        self._before_delta = ""
        self._held: Text | None = None
        self._reason: FinishReason = "stop"

    def render(self, event: Event) -> str:
        match event:
            case TextDelta(text=text) | ThinkingDelta(text=text) | ArgumentsDelta(text=text):
                return self._delta(text)
            case Started():
                begun = {"response": self._response}
                return self._frame("created", begun) + self._frame("in_progress", begun)
            case PartStart(part=part):
                return self._release("completed") + self._open(part)
            case PartEnd(part=Text() as part):
                self._held = part  # whether it is complete or cut off, only what follows tells
                return ""
            case PartEnd(part=part):
                return self._done(part, "completed")
            case Finished(reason=reason):
                self._reason = reason
                return self._release("completed" if reason in ("stop", "tool_calls") else "incomplete")
            case Ended(usage):
                return self._end(usage)
            case Failed(error):
                return self._release("incomplete") + self._failed(error)
            case _:
                assert_never(event)

    def _frame(self, kind: str, more: Mapping[str, Any]) -> str:
        name = f"response.{kind}"
        event = {"type": name, "sequence_number": self._sequence, **more}
        self._sequence += 1
        return f"event: {name}\ndata: {dumps(event)}\n\n"

    def _place(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Where in the output an event belongs."""
        return {"item_id": self._item["id"], "output_index": len(self._response["output"]), **more}

    def _open(self, part: Part) -> str:
        opened = self._render_item(part, "in_progress")
        if opened is None:
            return ""
        self._item = opened
        name, place, empty = delta_form(part)
        more: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
        before = dumps({"type": f"response.{name}.delta", **self._place(place), **more})[:-1]
        self._before_delta = f'event: response.{name}.delta\ndata: {before},"sequence_number":'
        added = {"output_index": len(self._response["output"]), "item": self._item | empty}
        frames = self._frame("output_item.added", added)
        if name == "output_text":
            frames += self._frame("content_part.added", self._place(place | {"part": text_part("")}))
        if name == "reasoning_summary_text":
            frames += self._frame("reasoning_summary_part.added", self._place(place | {"part": summary_part("")}))
        return frames

    def _delta(self, text: str) -> str:
        self._sequence += 1
        return f'{self._before_delta}{self._sequence - 1},"delta":{encode_basestring(text)}}}\n\n'

    def _release(self, status: str) -> str:
        """The text part whose end was held back, now that its status is known."""
        part, self._held = self._held, None
        return self._done(part, status) if part else ""

    def _done(self, part: Part, status: str) -> str:
        item = self._render_item(part, status)
        if item is None:
            return ""
        name, place, _ = delta_form(part)
        frames = ""
        match part:
            case Text(text):
                frames += self._frame("output_text.done", self._place(place | {"text": text, "logprobs": []}))
                frames += self._frame("content_part.done", self._place(place | {"part": text_part(text)}))
            case Thinking(text):
                frames += self._frame(f"{name}.done", self._place(place | {"text": text}))
                frames += self._frame("reasoning_summary_part.done", self._place(place | {"part": summary_part(text)}))
            case ToolCall(name=function, arguments=arguments):
                more = {"name": function, "arguments": arguments}
                frames += self._frame(f"{name}.done", self._place(more))
            case Media() | ToolResult():
                pass
        frames += self._frame("output_item.done", {"output_index": len(self._response["output"]), "item": item})
        self._response["output"].append(item)
        return frames

    def _render_item(self, part: Part, status: str) -> dict[str, Any] | None:
        number = len(self._response["output"])
        return render_item(part, f"{self._head.id}{number:04x}", status)

    def _end(self, usage: Usage) -> str:
        self._conclude(self._reason, usage)
        return self._frame(self._response["status"], {"response": self._response}) + DONE

    def _conclude(self, reason: FinishReason, usage: Usage) -> None:
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason)
        self._response["status"] = "incomplete" if cut else "completed"
        self._response["incomplete_details"] = {"reason": cut} if cut else None
        self._response["completed_at"] = None if cut else int(self._head.now())
        self._response["usage"] = render_response_usage(usage)

    def _failed(self, error: GatewayError) -> str:
        told = error_body(error)["error"]
        flat = {key: told[key] for key in ("code", "message", "param")}
        event = {"type": "error", "sequence_number": self._sequence, **flat, "error": told}
        self._sequence += 1
        code = "rate_limit_exceeded" if isinstance(error, RateLimited) else "server_error"
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return f"event: error\ndata: {dumps(event)}\n\n" + self._frame("failed", {"response": self._response}) + DONE

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The Response object, with `choices` beside it for scripts that read the text where chat has it."""
        choice = reply.choices.get(0, Choice())
        self._conclude(choice.reason, reply.usage)
        for i, part in enumerate(choice.parts):
            cut = self._response["status"] == "incomplete" and i == len(choice.parts) - 1
            if item := self._render_item(part, "incomplete" if cut else "completed"):
                self._response["output"].append(item)
        return self._response | {"choices": [render_choice(0, choice)]}


def response_template(head: Head, body: Mapping[str, Any]) -> dict[str, Any]:
    """The Response object of an answer that has not begun: every key is there, what was asked for is echoed.

    Source: https://platform.openai.com/docs/api-reference/responses/object
    """
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    defaults: dict[str, Any] = {
        "max_output_tokens": None,
        "max_tool_calls": None,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "safety_identifier": None,
        "store": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "tool_choice": "auto",
        "top_logprobs": 0,
        "truncation": "disabled",
        "metadata": {},
        "instructions": None,
    }
    echoed = {key: default if body.get(key) is None else body[key] for key, default in defaults.items()}
    return {
        "id": f"resp_{head.id}",
        "object": "response",
        "created_at": head.created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": head.model,
        "output": [],
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tools": [render_tool(tool) for tool in body.get("tools") or []],
        "usage": None,
        **echoed,
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
        case Text(text):
            message = {"id": f"msg_{id}", "type": "message", "role": "assistant", "status": status}
            return message | {"content": [text_part(text)]}
        case Thinking(text):
            return {"id": f"rs_{id}", "type": "reasoning", "summary": [summary_part(text)], "status": status}
        case ToolCall(call_id, name, arguments):
            call = {"id": f"fc_{id}", "type": "function_call", "call_id": call_id, "name": name}
            return call | {"arguments": arguments, "status": status}
        case Media() | ToolResult():
            return None
        case _:
            assert_never(part)


def delta_form(part: Part) -> tuple[str, dict[str, int], dict[str, Any]]:
    """The name of a part's deltas, their place in the item, and what the item lacks when it opens."""
    if isinstance(part, Text):
        return "output_text", {"content_index": 0}, {"content": []}
    if isinstance(part, Thinking):
        return "reasoning_summary_text", {"summary_index": 0}, {"summary": []}
    return "function_call_arguments", {}, {"arguments": ""}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


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


Renderer = ChatRenderer | CompletionRenderer | ResponseRenderer


# ==============================================================================
# 11. Monitoring
# ==============================================================================


@dataclass(slots=True)
class Trace:
    """What happened to one request, for its headers and its log line."""

    config: Config
    id: str
    route: str
    started: float
    client_id: str = ""
    """The client's own name for the request, where it gave a sane one."""
    client: str = ""
    """The name of the key that let the client in."""
    model: str = ""
    mapped_model: str = ""
    account: Account | None = None
    attempts: int = 0
    first_byte: float | None = None
    usage: Usage | None = None

    def headers(self, now: float) -> dict[str, str]:
        headers = {"X-Request-Id": self.id, "openai-processing-ms": str(milliseconds(now - self.started))}
        if self.mapped_model:
            headers |= {"X-Mapped-Model": self.mapped_model, "X-Attempts": str(self.attempts)}
        if self.account and self.config.show_account != "off":
            shown = self.account.email or self.account.name
            headers["X-Account-Email"] = shown if self.config.show_account == "full" else masked(shown)
        return headers | ({"X-Agproxy-Demo": "1"} if self.config.demo else {})


@dataclass(slots=True)
class Tally:
    """What a gateway did since it was started."""

    requests: int = 0
    failed: int = 0
    usage: Usage = Usage()
    accounts: dict[str, int] = field(default_factory=dict)

    def add(self, trace: Trace, status: int) -> None:
        if trace.model:
            self.requests += 1
            self.failed += status >= 400
        if trace.account and status < 400:
            self.usage += trace.usage or Usage()
            self.accounts[trace.account.name] = self.accounts.get(trace.account.name, 0) + 1

    def bill(self) -> str:
        accounts = ", ".join(f"{name} {count}" for name, count in self.accounts.items()) or "none"
        tokens = f"{self.usage.prompt} tokens in, {self.usage.completion} out"
        return f"{self.requests} requests ({self.failed} failed), {tokens}; accounts: {accounts}"


def masked(name: str) -> str:
    """An e-mail with its first letter and domain left; any other name as it is."""
    return re.sub(r"^(.)[^@]*@", r"\1***@", name)


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def log_fields(trace: Trace, status: int, now: float) -> dict[str, Any]:
    """What the log says of a finished request; never a prompt, never a key."""
    first = trace.first_byte
    fields = {
        "id": trace.id,
        "client_id": trace.client_id,
        "client": trace.client,
        "route": trace.route,
        "model": trace.model,
        "mapped_model": trace.mapped_model,
        "account": trace.account.name if trace.account else "",
        "attempts": trace.attempts,
        "status": status,
        "first_ms": None if first is None else milliseconds(first - trace.started),
        "ms": milliseconds(now - trace.started),
        "tokens": trace.usage and f"{trace.usage.prompt}+{trace.usage.completion}",
    }
    return {key: value for key, value in fields.items() if value not in (None, "")}


def log_text(fields: Mapping[str, Any]) -> str:
    """The fields as one line; a control character of a client's is escaped, so that none forges a line."""
    rest = dict(fields)
    words = [rest.pop("id"), rest.pop("route")]
    if model := rest.pop("model", ""):
        words.append(f"{model} -> {rest.pop('mapped_model', '?')}")
    words += [f"{key}={value}" for key, value in rest.items()]
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: f"\\x{ord(match[0]):02x}", " ".join(words))


# ==============================================================================
# 12. Upstream
# ==============================================================================


class Answer:
    """One answer that has begun: its first events are known, so nobody retries any more."""

    def __init__(self, reader: GeminiReader | None, response: aiohttp.ClientResponse, first: list[Event]) -> None:
        self._reader = reader
        self._response = response
        self._first = first
        self._late: UpstreamTimeout | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def end_by(self, seconds: float) -> None:
        """Breaks the answer off when it lasts longer."""
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._late = UpstreamTimeout("The answer took longer than proxy.timeouts.total_s. Raise it, or ask for less.")
        self._response.close()

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events of each read, in order; a broken upstream ends them with Failed."""
        yield self._first
        if self._reader is None:
            return
        error: UpstreamError | None = None
        try:
            async for data in self._response.content.iter_any():
                if events := self._reader.feed(data):
                    yield events
        except TimeoutError:
            error = UpstreamTimeout(
                "Gemini fell silent in the middle of its answer. Try again, or raise proxy.timeouts.idle_s."
            )
        except aiohttp.ClientError:
            pass  # the reader knows whether the answer was whole
        yield self._reader.close(self._late or error)

    def close(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._response.close()


class Merged:
    """Several answers as one: choices numbered through, usage added up; the first failure ends them all."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._tasks: dict[asyncio.Future[list[Event] | None], int] = {}

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events of all answers as they come; the first of choice 0 stand before any other's."""
        streams = [answer.batches() for answer in self._answers]
        self._tasks = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
        usage = Usage()
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for choice, task in sorted((self._tasks.pop(task), task) for task in done):
                events = task.result()
                if events is None:
                    continue
                self._tasks[asyncio.ensure_future(anext(streams[choice], None))] = choice
                if events and isinstance(events[-1], Ended):
                    usage += events[-1].usage
                    events = events[:-1]
                yield [renumbered(event, choice) for event in events]
                if events and isinstance(events[-1], Failed):
                    return
        yield [Ended(usage)]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            answer.close()


def renumbered(event: Event, choice: int) -> Event:
    return event if isinstance(event, Started | Ended | Failed) else replace(event, choice=choice)


class Upstream:
    """The accounts' Gemini: HTTP, the list of models, and the one retry loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pool = AccountPool(config.accounts)
        self._session = open_session(config.timeouts)
        self._proxies = {account.base_url: proxy_for(account.base_url, config) for account in config.accounts}
        self._models: tuple[str, ...] | None = None
        self._models_until = 0.0
        self._listing: asyncio.Task[None] | None = None
        self._told: set[str] = set()
        self.signatures = SignatureMemory()
        self.skew_s = 0.0

    async def close(self) -> None:
        if self._listing:
            self._listing.cancel()
        await self._session.close()

    # ---- models

    async def resolve(self, name: str) -> str:
        """The upstream's name for a model. Raises ModelNotFound."""
        mapped = map_model(name, self._config, await self.models())
        if mapped.wished and mapped.wished not in self._told:
            self._told.add(mapped.wished)
            log.warning("%s is not listed by the upstream; %s is asked instead", mapped.wished, mapped.model)
        return mapped.model

    async def models(self) -> tuple[str, ...] | None:
        """What the upstream lists, fetched at the first need and renewed beside the requests; None while unknown."""
        if time.monotonic() >= self._models_until and (self._listing is None or self._listing.done()):
            self._listing = asyncio.create_task(self._list_models())
        if self._models is None and self._listing:
            await asyncio.wait({self._listing}, timeout=MODELS_WAIT_S)
        return self._models

    async def _list_models(self) -> None:
        self._models_until = time.monotonic() + MODELS_RETRY_S
        for account in self._pool.accounts:
            try:
                self._models = await self.models_of(account)
            except UpstreamError as error:
                log.debug("the models of %s cannot be listed: %s", account.name, error.message)
            else:
                self._models_until = time.monotonic() + MODELS_FRESH_S
                return

    async def models_of(self, account: Account) -> tuple[str, ...]:
        """What one account's upstream lists. Raises UpstreamError."""
        try:
            async with asyncio.timeout(self._config.timeouts.connect_s + MODELS_WAIT_S):
                return await self._pages_of(account)
        except TimeoutError:
            raise UpstreamTimeout(
                "Gemini did not answer in time. Check the network and whether a proxy is needed."
            ) from None
        except aiohttp.ClientError as error:
            raise UpstreamBroken(connection_problem(error)) from None
        except (ValueError, KeyError, TypeError):
            raise UpstreamBroken("What answers at base_url is not Gemini. Check base_url.") from None

    async def _pages_of(self, account: Account) -> tuple[str, ...]:
        """Source: https://ai.google.dev/api/models#method:-models.list"""
        names: list[str] = []
        page = ""
        while True:
            url = f"{account.base_url}/v1beta/models?pageSize=1000&pageToken={quote(page)}"
            headers = {"x-goog-api-key": account.api_key}
            async with self._session.get(url, headers=headers, proxy=self._proxies[account.base_url]) as response:
                self.skew_s = clock_skew(response.headers.get("Date"), time.time())
                if response.status != 200:
                    raise classify_error(response.status, parse_json(await response.read()))
                answer = await response.json(content_type=None)
            for model in answer["models"]:
                if {"generateContent", "embedContent"} & set(model.get("supportedGenerationMethods", ())):
                    names.append(model["name"].removeprefix("models/"))
            page = answer.get("nextPageToken") or ""
            if not page:
                return tuple(names)

    # ---- answers

    async def ask_all(self, requests: Sequence[Request], trace: Trace) -> Answer | Merged:
        """The answers to all requests as one, begun in all of them. Raises what the first failed one raised."""
        if len(requests) == 1:
            return await self.ask(requests[0], trace, sse=requests[0].stream)
        tasks = [asyncio.create_task(self.ask(request, trace, sse=True)) for request in requests]
        try:
            return Merged(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(done, Answer):
                    done.close()
            raise

    async def ask(self, request: Request, trace: Trace, *, sse: bool) -> Answer:
        """An answer that has begun. Raises the error that ended the last attempt, PoolExhausted or UpstreamTimeout."""
        signed = self.signatures.recall(request, trace.mapped_model)
        traits = traits_of(trace.mapped_model, self._config.traits)
        body = dumps(build_generate_content(signed, traits)).encode()
        total_s = self._config.timeouts.total_s
        try:
            async with asyncio.timeout(total_s):
                answer = await self._retry(trace, body, sse)
        except TimeoutError:
            raise UpstreamTimeout("No answer began within proxy.timeouts.total_s. Raise it, or try again.") from None
        if total_s:
            answer.end_by(total_s - (time.monotonic() - trace.started))
        return answer

    async def _retry(self, trace: Trace, body: bytes, sse: bool) -> Answer:
        """The one retry loop: an untried account first; once, after a pause, the same one for a fault not its own."""
        refusals: dict[str, UpstreamError] = {}
        tried: list[Account] = []
        spare = True
        while len(tried) < ATTEMPTS_MAX:
            account = self._pool.acquire(trace.mapped_model, tried, time.monotonic())
            if account is None and tried and spare and refusals[tried[-1].name].remedy == "same_account":
                spare = False
                await asyncio.sleep(random.uniform(0.2, 1.0))
                account = tried[-1]
            if account is None:
                break
            tried.append(account)
            trace.attempts += 1
            trace.account = account
            try:
                return await self._attempt(account, trace.mapped_model, body, sse)
            except UpstreamError as error:
                if error.remedy == "give_up":
                    raise
                refusals[account.name] = error
                self._pool.failed(account, trace.mapped_model, error, time.monotonic())
        raise self._pool.exhausted(trace.mapped_model, refusals, time.monotonic())

    async def _attempt(self, account: Account, model: str, body: bytes, sse: bool) -> Answer:
        method = "streamGenerateContent?alt=sse" if sse else "generateContent"
        url = f"{account.base_url}/v1beta/models/{quote(model)}:{method}"
        headers = {"x-goog-api-key": account.api_key, "Content-Type": "application/json"}
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self._config.timeouts.first_event_s):
                proxy = self._proxies[account.base_url]
                response = await self._session.post(url, data=body, headers=headers, proxy=proxy)
                return await first_events(response, sse)
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, TimeoutError):
                raise UpstreamTimeout("Gemini did not answer in time.") from None
            if isinstance(error, aiohttp.ClientError):
                raise UpstreamBroken(connection_problem(error)) from None
            raise


def open_session(wait: Timeouts) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=wait.connect_s, sock_read=wait.idle_s)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=timeout, connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def first_events(response: aiohttp.ClientResponse, sse: bool) -> Answer:
    """The answer with its first events. Raises what the status or the first event says, and aiohttp's errors."""
    if response.status != 200:
        raise classify_error(response.status, parse_json(await response.read()))
    reader = GeminiReader(lambda: f"call_{secrets.token_hex(12)}")
    if not sse:
        return Answer(None, response, unless_failed(reader.whole(await response.read())))
    async for data in response.content.iter_any():
        if events := reader.feed(data):
            break
    else:
        events = reader.close()
    return Answer(reader, response, unless_failed(events))


def unless_failed(events: list[Event]) -> list[Event]:
    """The events, or the error that is the first of them: the first event decides."""
    if events and isinstance(events[0], Failed):
        raise events[0].error
    return events


def clock_skew(date: str | None, now: float) -> float:
    """Seconds by which this machine's clock is ahead of an answer's Date header; 0 without one."""
    from email.utils import parsedate_to_datetime

    try:
        return now - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return 0.0


def connection_problem(error: aiohttp.ClientError) -> str:
    """What went wrong on the way to Gemini, and what to do, without its URL."""
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        return "The proxy to Gemini could not be used. Check proxy.upstream_proxy or HTTPS_PROXY."
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "Gemini's TLS certificate was refused. Check this machine's clock and SSL_CERT_FILE."
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "Gemini's host name could not be resolved. Check DNS and base_url."
    if isinstance(error, aiohttp.ClientConnectorError):
        return "Gemini could not be reached. Check the network, base_url and whether a proxy is needed."
    return "Gemini broke the connection before its answer began. Try again."


def proxy_for(url: str, config: Config) -> str | None:
    """The proxy to an upstream: the file's, else the environment's unless NO_PROXY excepts it; to loopback none."""
    import urllib.request as environment

    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return None
    if config.upstream_proxy:
        return config.upstream_proxy
    proxies = environment.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or environment.proxy_bypass_environment(parts.netloc, proxies):  # type: ignore[attr-defined]
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


# ==============================================================================
# 13. Web
# ==============================================================================

DOORS: Mapping[str, tuple[Callable[[Any], Request | list[Request]], type[Renderer]]] = {
    "chat/completions": (parse_chat, ChatRenderer),
    "completions": (parse_completion, CompletionRenderer),
    "responses": (parse_response, ResponseRenderer),
}
METHODS = {"healthz": "GET", "models": "GET"} | dict.fromkeys(DOORS, "POST")
# Base URLs get pasted whole and paths stacked (Kilo Code: /v1/chat/completions/responses): the last endpoint wins.
ROUTE = re.compile(
    rf"(?:/(?:v1|models|{'|'.join(DOORS)}))*/(?P<route>{'|'.join(METHODS)})(?:(?<=models)/(?P<id>.+?))?/?"
)


class Gateway:
    """The handlers."""

    def __init__(self, config: Config, upstream: Upstream, tally: Tally) -> None:
        self._config = config
        self._upstream = upstream
        self._tally = tally

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Every request: named, let in or not, answered, and told the truth where it fails."""
        trace = Trace(self._config, f"req_{secrets.token_hex(12)}", http.path, time.monotonic())
        given = http.headers.get("X-Request-Id") or http.headers.get("X-Client-Request-Id") or ""
        trace.client_id = given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else ""
        response: web.StreamResponse | None = None
        try:
            response = await self._route(http, trace)
        except GatewayError as error:
            response = error_response(error, trace)
        except web.HTTPRequestEntityTooLarge:
            response = error_response(
                BodyTooLarge(f"The body is larger than {BODY_BYTES_MAX >> 20} MB. Send a smaller one."), trace
            )
        except Exception:
            log.exception("%s failed", trace.id)
            response = error_response(GatewayError("The gateway failed. Its log says why; please report it."), trace)
        finally:
            status = response.status if response else 499
            self._tally.add(trace, status)
            fields = log_fields(trace, status, time.monotonic())
            log.info("%s", log_text(fields), extra={"fields": fields})
        if not response.prepared:
            response.headers.update(self._cors(http))
        return response

    async def _route(self, http: web.Request, trace: Trace) -> web.StreamResponse:
        match = ROUTE.fullmatch(re.sub("/{2,}", "/", http.path))
        trace.route = route = match["route"] if match else http.path
        self._guard(http)
        if http.method == "OPTIONS":
            return web.Response(status=204, headers=trace.headers(time.monotonic()))
        self._let_in(http.headers, trace)
        if match is None:
            base = f"{http.scheme}://{http.host}/v1"
            raise UnknownUrl(f"Invalid URL ({http.method} {http.path}). Set the base URL to {base}.")
        if http.method != METHODS[route] and (http.method, METHODS[route]) != ("HEAD", "GET"):
            text = f"{http.method} is not served at /v1/{route}. Use {METHODS[route]}."
            raise MethodNotAllowed(text, headers={"Allow": METHODS[route]})
        if route == "healthz":
            return json_response({"status": "ok", "version": __version__}, trace)
        if route == "models":
            return json_response(await self._models(match["id"]), trace)
        return await self._answer(http, trace)

    def _let_in(self, headers: Mapping[str, str], trace: Trace) -> None:
        mode = self._config.auth
        if mode == "off" or (mode == "all_except_health" and trace.route == "healthz"):
            return
        given = [re.sub(r"(?i)^bearer +", "", headers.get("Authorization", "").strip())]
        given += [headers.get(name, "") for name in ("x-api-key", "x-goog-api-key", "api-key")]
        sent = [key.encode("utf-8", "surrogateescape") for key in given]
        right = [
            known.name for known in self._config.api_key for key in sent if hmac.compare_digest(key, known.key.encode())
        ]
        if not right:
            what = "The API key is wrong." if any(given) else "An API key is missing."
            raise Unauthorized(f"{what} Send a key of proxy.api_key as 'Authorization: Bearer KEY'.")
        trace.client = right[0]

    def _guard(self, http: web.Request) -> None:
        """Without a key, keeps out names that were rebound to this address, and the scripts of foreign web pages."""
        if self._config.auth != "off":
            return
        host = urlsplit(f"//{http.headers.get('Host', 'localhost')}").hostname or ""
        literal = self._config.allow_lan_access and is_address(host)
        if not (is_loopback(host) or literal or host in self._config.allowed_hosts):
            text = (
                f"The Host '{host}' may not be used without a key. Add it to proxy.allowed_hosts, or set proxy.api_key."
            )
            raise Forbidden(text, code="host_not_allowed")
        origin = http.headers.get("Origin", "")
        if origin.startswith(("http://", "https://")) and not self._is_allowed(origin):
            text = f"The web page {origin} may not call. Add it to proxy.cors_origins, or set proxy.api_key."
            raise Forbidden(text, code="origin_not_allowed")

    def _is_allowed(self, origin: str) -> bool:
        return is_loopback(urlsplit(origin).hostname or "") or origin in self._config.cors_origins

    def _cors(self, http: web.Request) -> dict[str, str]:
        """What lets a browser's page read the answer: any page where a key is needed, else those allowed."""
        origin = http.headers.get("Origin")
        if origin is None or (self._config.auth == "off" and not self._is_allowed(origin)):
            return {}
        headers = {"Access-Control-Allow-Origin": "*" if self._config.auth != "off" else origin, "Vary": "Origin"}
        if http.method != "OPTIONS":
            return headers | {"Access-Control-Expose-Headers": EXPOSED_HEADERS}
        return headers | {
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": http.headers.get("Access-Control-Request-Headers", "authorization"),
            "Access-Control-Max-Age": "600",
        }

    async def _models(self, name: str | None) -> dict[str, Any]:
        """The list of models, or the one that is named."""
        listed = await self._upstream.models() or STATIC_MODELS
        aliases = [alias for alias in self._config.aliases if "*" not in alias and alias not in listed]
        owners = dict.fromkeys(listed, "google") | dict.fromkeys(aliases, "agproxy")
        data = [{"id": id, "object": "model", "created": 0, "owned_by": owner} for id, owner in owners.items()]
        if name is None:
            return {"object": "list", "data": data}
        if name in owners:
            return {"id": name, "object": "model", "created": 0, "owned_by": owners[name]}
        mapped = await self._upstream.resolve(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": owners.get(mapped, "google")}

    async def _answer(self, http: web.Request, trace: Trace) -> web.StreamResponse:
        body = parse_body(await http.read())
        parse, form = DOORS[trace.route]
        parsed = parse(body)
        prompts = parsed if isinstance(parsed, list) else [parsed]
        first = prompts[0]
        trace.model = first.model
        trace.mapped_model = await self._upstream.resolve(first.model)
        head = Head(trace.id[4:], int(time.time()), first.model, first.include_usage, time.time)
        renderer = form(head, body)
        answer = await self._upstream.ask_all([prompt for prompt in prompts for _ in range(first.n)], trace)
        try:
            if first.stream:
                return await self._stream(http, trace, answer, renderer)
            return await self._whole(trace, answer, renderer)
        finally:
            answer.close()

    async def _whole(self, trace: Trace, answer: Answer | Merged, renderer: Renderer) -> web.Response:
        events = [event async for batch in answer.batches() for event in batch]
        self._upstream.signatures.remember(events, trace.mapped_model)
        reply = collect(events)
        trace.usage = reply.usage
        trace.first_byte = time.monotonic()
        return json_response(renderer.whole(reply), trace)

    async def _stream(
        self, http: web.Request, trace: Trace, answer: Answer | Merged, renderer: Renderer
    ) -> web.StreamResponse:
        headers = trace.headers(time.monotonic()) | self._cors(http) | {"Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        response.content_type = "text/event-stream"
        await response.prepare(http)
        trace.first_byte = time.monotonic()
        async for events in answer.batches():
            self._upstream.signatures.remember(events, trace.mapped_model)
            if events and isinstance(events[-1], Ended):
                trace.usage = events[-1].usage
            if frames := "".join(map(renderer.render, events)):
                await response.write(frames.encode())
        await response.write_eof()
        return response


EXPOSED_HEADERS = "X-Request-Id, X-Mapped-Model, X-Account-Email, X-Attempts, X-Agproxy-Demo, Retry-After"


def parse_body(data: bytes) -> Any:
    """A JSON body. Raises BadRequest, also for NaN, for bytes that are not UTF-8, and for one nested too deep."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except RecursionError:
        raise BadRequest("The body is nested too deep. Send flatter JSON.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON ({error}). Send a JSON object in UTF-8.") from None


def json_response(body: Any, trace: Trace, status: int = 200) -> web.Response:
    headers = trace.headers(time.monotonic())
    return web.Response(body=dumps(body).encode(), status=status, content_type="application/json", headers=headers)


def error_response(error: GatewayError, trace: Trace) -> web.Response:
    response = json_response(error_body(error), trace, error.status)
    response.headers.update(error.headers)
    if error.status in (429, 503):
        wait_s = error.retry_after_s or 1.0
        response.headers["Retry-After"] = str(math.ceil(wait_s))
        response.headers["Retry-After-Ms"] = str(milliseconds(wait_s))
    return response


async def create_app(config: Config, tally: Tally | None = None) -> web.Application:
    """The gateway as an aiohttp application; what it opened closes with it."""
    upstream = Upstream(config)
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.router.add_route("*", "/{tail:.*}", Gateway(config, upstream, tally or Tally()).handle)

    async def close(_: web.Application) -> None:
        await upstream.close()

    app.on_cleanup.append(close)
    return app


# ==============================================================================
# 14. Demo
# ==============================================================================

DEMO_MODELS = ("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3-pro-preview")
DEMO_FAULTS = {
    "429": (429, "RESOURCE_EXHAUSTED", "The demo was told to refuse (AGPROXY_DEMO_FAULT=429). Please retry in 7s."),
    "503": (503, "UNAVAILABLE", "The demo was told to be overloaded (AGPROXY_DEMO_FAULT=503)."),
}
DEMO_SAMPLES = {"integer": 1, "number": 1.5, "boolean": True, "null": None}


class Demo:
    """A small Gemini: the real wire format, deterministic answers, no model."""

    def __init__(self, fault: str | None) -> None:
        self._fault = fault

    async def list_models(self, _: web.Request) -> web.Response:
        methods = ["generateContent", "countTokens"]
        models = [{"name": f"models/{name}", "supportedGenerationMethods": methods} for name in DEMO_MODELS]
        return web.json_response({"models": models})

    async def generate(self, http: web.Request) -> web.StreamResponse:
        model, _, method = http.match_info["call"].partition(":")
        if model not in DEMO_MODELS or method not in ("generateContent", "streamGenerateContent"):
            return demo_error(404, "NOT_FOUND", f"models/{model} is not found, or is not supported for {method}.")
        if self._fault in DEMO_FAULTS:
            return demo_error(*DEMO_FAULTS[self._fault])
        body = await http.json()
        chunks = demo_chunks(body, model)
        if self._fault == "cut":
            chunks = chunks[: len(chunks) // 2]
        if method == "generateContent":
            return await self._whole(http, chunks)
        return await self._stream(http, chunks)

    async def _whole(self, http: web.Request, chunks: list[dict[str, Any]]) -> web.Response:
        if self._fault == "cut" and http.transport:
            http.transport.abort()
            return web.Response()
        parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
        last = chunks[-1]["candidates"][0] | {"content": {"role": "model", "parts": parts}}
        return web.json_response(chunks[-1] | {"candidates": [last]})

    async def _stream(self, http: web.Request, chunks: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for chunk in chunks:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n")
            await asyncio.sleep(0.01)
        if self._fault == "cut" and http.transport:
            http.transport.abort()
        return response


def demo_error(code: int, status: str, message: str) -> web.Response:
    error: dict[str, Any] = {"code": code, "status": status, "message": message}
    if code == 429:
        error["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]
    return web.json_response({"error": error}, status=code)


def demo_chunks(body: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """The answer as Gemini would send it: parts in chunks, usage in each, the finish reason in the last."""
    config = body.get("generationConfig", {})
    prompt = demo_prompt(body)
    parts = demo_calls(body, prompt) or demo_text(body, config, prompt)
    limit = config.get("maxOutputTokens", len(parts))
    thoughts = [{"text": "The demo thinks about what was said.", "thought": True}]
    said = (thoughts if config.get("thinkingConfig", {}).get("includeThoughts") else []) + parts[:limit]
    usage = {
        "promptTokenCount": max(1, len(json.dumps(body["contents"])) // 4),
        "candidatesTokenCount": len(parts[:limit]),
        "thoughtsTokenCount": 7 if said[0].get("thought") else 0,
    }
    usage["totalTokenCount"] = sum(usage.values())
    candidates = [{"content": {"role": "model", "parts": [part]}, "index": 0} for part in said]
    candidates[-1]["finishReason"] = "STOP" if limit >= len(parts) else "MAX_TOKENS"
    about = {"usageMetadata": usage, "modelVersion": model, "responseId": "demo"}
    return [{"candidates": [candidate], **about} for candidate in candidates]


def demo_prompt(body: dict[str, Any]) -> str:
    """The last thing that the user said."""
    said = [content for content in body["contents"] if content.get("role") != "model"]
    return "\n".join(part["text"] for content in said[-1:] for part in content["parts"] if "text" in part)


def demo_calls(body: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """A call of each declared function that the prompt names, or of the first where one is demanded."""
    declared = {f["name"]: f for tool in body.get("tools", []) for f in tool.get("functionDeclarations", [])}
    config = body.get("toolConfig", {}).get("functionCallingConfig", {})
    answered = "functionResponse" in body["contents"][-1]["parts"][0]
    named = [name for name in declared if name in prompt and not answered]
    if config.get("mode") == "ANY" and not named:
        named = (config.get("allowedFunctionNames") or list(declared))[:1]
    if config.get("mode") == "NONE":
        return []
    schemas = {name: declared[name].get("parametersJsonSchema") or declared[name].get("parameters") for name in named}
    calls: list[dict[str, Any]] = [
        {"functionCall": {"name": name, "args": demo_value(schema, schema, prompt) if schema else {}}}
        for name, schema in schemas.items()
    ]
    return [calls[0] | {"thoughtSignature": "YWdwcm94eS1kZW1v"}, *calls[1:]] if calls else []


def demo_text(body: dict[str, Any], config: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """The answer's words, one part each: JSON where it is asked for, else what was understood."""
    if config.get("responseMimeType") == "application/json":
        schema = config.get("responseJsonSchema") or config.get("responseSchema")
        value = demo_value(schema, schema, prompt) if schema else {"demo": True, "echo": prompt}
        text = json.dumps(value, ensure_ascii=False)
    else:
        parts = body["contents"][-1]["parts"]
        results = [part["functionResponse"] for part in parts if "functionResponse" in part]
        files = [part["inlineData"]["mimeType"] for part in parts if "inlineData" in part]
        system = " ".join(part["text"] for part in body.get("systemInstruction", {}).get("parts", []))
        text = "This is the demo of agproxy; no model was asked."
        text += f" You said: {prompt[:200]}" if prompt and not results else ""
        text += "".join(f" The tool {result['name']} answered: {json.dumps(result['response'])}" for result in results)
        text += f" With it came: {', '.join(files)}." if files else ""
        text += f" The instructions were: {system[:200]}" if system else ""
    return [{"text": word} for word in re.findall(r"\s*\S+|\s+$", text)]


def demo_value(schema: Any, root: Any, prompt: str) -> Any:
    """A small value that fits a JSON schema."""
    if not isinstance(schema, dict):
        return prompt
    if "$ref" in schema:
        return demo_value(root.get("$defs", {}).get(schema["$ref"].split("/")[-1]), root, prompt)
    for key in ("const", "enum", "anyOf", "oneOf"):
        if key in schema:
            value = schema[key] if key == "const" else schema[key][0]
            return value if key in ("const", "enum") else demo_value(value, root, prompt)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = str(kind[0] if isinstance(kind, list) else kind).lower()
    if kind == "object":
        properties = schema.get("properties", {})
        wanted = schema.get("required") or properties
        return {name: demo_value(properties.get(name, {}), root, prompt) for name in wanted}
    if kind == "array":
        return [demo_value(schema.get("items", {}), root, prompt)]
    return DEMO_SAMPLES.get(kind, prompt)


def create_demo(fault: str | None) -> web.Application:
    """The demo as an application of its own; `fault` (429, 503 or cut) makes it fail as Gemini does."""
    demo = Demo(fault)
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.router.add_get("/v1beta/models", demo.list_models)
    app.router.add_post("/v1beta/models/{call}", demo.generate)
    return app


# ==============================================================================
# 15. Command line
# ==============================================================================

THREE_WAYS = """\
agproxy serve --demo                       try everything without a key
GEMINI_API_KEY=... agproxy serve           one account from the environment
agproxy serve --accounts accounts.yaml     several; write ./accounts.yaml after accounts.yaml.example"""

# What a person pastes for each client: where, and the text. {base}, {key} and {root} (without /v1) are filled in.
CLIENTS: Mapping[str, tuple[str, str]] = {
    "curl": (
        "a shell",
        """\
curl {base}/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "gpt-4o", "messages": [{{"role": "user", "content": "hello"}}]}}'""",
    ),
    "aider": ("a shell", "aider --model openai/gpt-4o --openai-api-base {base} --openai-api-key {key}"),
    "codex": (
        "~/.codex/config.toml, then: export OPENAI_API_KEY={key}",
        """\
model = "gpt-5"
model_provider = "agproxy"

[model_providers.agproxy]
name = "agproxy"
base_url = "{base}"
wire_api = "responses"
env_key = "OPENAI_API_KEY\"""",
    ),
    "llm": (
        'extra-openai-models.yaml beside the file of `llm logs path`, then: llm keys set agproxy --value "{key}"',
        """\
- model_id: agproxy
  model_name: gpt-4o
  api_base: "{base}"
  api_key_name: agproxy""",
    ),
    "langchain": (
        "Python",
        """\
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="gpt-4o", base_url="{base}", api_key="{key}")""",
    ),
    "opencode": (
        "opencode.json in the project, then: opencode run -m agproxy/gpt-4o hello",
        """\
{{
  "$schema": "https://opencode.ai/config.json",
  "provider": {{
    "agproxy": {{
      "npm": "@ai-sdk/openai-compatible",
      "options": {{"baseURL": "{base}", "apiKey": "{key}"}},
      "models": {{"gpt-4o": {{}}}}
    }}
  }}
}}""",
    ),
    "continue": (
        "~/.continue/config.yaml",
        """\
name: agproxy
version: 0.0.1
schema: v1
models:
  - name: agproxy
    provider: openai
    model: gpt-4o
    apiBase: {base}
    apiKey: {key}
    roles: [chat, edit, apply, autocomplete]""",
    ),
    "cline": (
        "Cline, Roo or Kilo: Settings > API Provider > OpenAI Compatible",
        """\
Base URL: {base}
API Key: {key}
Model ID: gpt-4o""",
    ),
    "cursor": (
        "Cursor: Settings > Models > API Keys; its servers make the calls, so {root} must be reachable from the internet",
        """\
OpenAI API Key: {key}
Override OpenAI Base URL: {base}""",
    ),
}
DOORS_NOT_BUILT = {"claude-code": "Claude Code speaks Anthropic's /v1/messages, which agproxy does not serve"}
SHELLS: Mapping[str, Callable[[str, str], str]] = {
    "sh": lambda name, value: f"export {name}={shlex.quote(value)}",
    "fish": lambda name, value: "set -gx {} '{}'".format(name, re.sub(r"(['\\])", r"\\\1", value)),
    "powershell": lambda name, value: "$env:{} = '{}'".format(name, value.replace("'", "''")),
}


def file_fingerprint() -> str:
    """The start of this file's SHA-256, so that a copied file can be told apart."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def find_file(accounts: str | None, env: Mapping[str, str]) -> Path | None:
    """The accounts file by flag, $AGPROXY_ACCOUNTS, ./accounts.yaml or $XDG_CONFIG_HOME; None where there is none."""
    if named := accounts or env.get("AGPROXY_ACCOUNTS"):
        return Path(named)
    home = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "agproxy" / "accounts.yaml"
    return next((path for path in (Path("accounts.yaml"), home) if path.exists()), None)


def find_config(accounts: str | None, env: Mapping[str, str]) -> Config:
    """The file's config; without a file, one account by a key from the environment, or none."""
    path = find_file(accounts, env)
    if path is None:
        key = env.get("GEMINI_API_KEY") or env.get("GOOGLE_API_KEY")
        return Config(accounts=(Account("environment", key),) if key else ())
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name another with --accounts.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from None
    return load_config(text, str(path), env)


class Unusable(click.ClickException):
    """What the user gave cannot be used; the code at the end stands in README's table."""

    exit_code = 2

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{message} [{code}]")


def configured(accounts: str | None, host: str | None = None, port: int | None = None, demo: bool = False) -> Config:
    """The config that holds: flag > $AGPROXY_PORT > file > default. Raises Unusable."""
    try:
        config = find_config(accounts, os.environ)
        if named := os.environ.get("AGPROXY_PORT"):
            if not named.isdecimal() or int(named) > 65535:
                raise ConfigError(f"AGPROXY_PORT is '{named}'. Set it to a number from 0 to 65535, or unset it.")
            config = replace(config, port=int(named))
        config = replace(config, host=host or config.host, port=config.port if port is None else port, demo=demo)
        if problems := config_problems(config):
            raise ConfigError("\n".join(problems))
        return config
    except ConfigError as error:
        raise Unusable(f"{error}\nMend that; `agproxy check` tries again.", "config_invalid") from None


def servable(config: Config) -> Config:
    """The config, if a gateway can be started with it. Raises Unusable."""
    if config.auth != "off" and not config.api_key:
        raise Unusable(
            "Clients must show a key (proxy.auth_mode, proxy.allow_lan_access), but proxy.api_key is not set. "
            f"Paste this fresh one into the accounts file:\nproxy:\n  api_key: {fresh_key()}",
            "key_needed",
        )
    if not config.accounts and not config.demo:
        raise Unusable(f"There is no account to ask. Three ways to go on:\n{THREE_WAYS}", "no_accounts")
    return config


def fresh_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            told = told | {"traceback": self.formatException(record.exc_info)}
        moment = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        return dumps({"time": moment, "level": record.levelname.lower(), **told})


def set_up_logging(level: str, form: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def banner(config: Config) -> str:
    """What a person needs to know at the start."""
    proxies = {without_credentials(p) for a in config.accounts if (p := proxy_for(a.base_url, config))}
    names = ", ".join(account.name for account in config.accounts)
    open_to_all = config.auth == "off" and not is_loopback(config.bind)
    lines = [
        f"agproxy {__version__} listens on {config.bind}:{config.port}",
        f"  base URL  {config.base_url}",
        f"  accounts  {'the demo; no model is asked' if config.demo else f'{len(config.accounts)} ({names})'}",
        f"  auth      {config.auth}" + (f" ({len(config.api_key)} key(s))" if config.auth != "off" else ""),
        f"  default   {config.default_model or 'none: unknown model names are a 404'}",
        *(f"  proxy     {proxy}" for proxy in sorted(proxies)),
        *(["  WARNING   anybody on the network can use these accounts; set proxy.api_key"] if open_to_all else []),
        f'  export OPENAI_BASE_URL={config.base_url} OPENAI_API_KEY="{"$KEY" if config.auth != "off" else "unused"}"',
    ]
    return "\n".join(lines)


def without_credentials(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


async def run_until_signal(config: Config) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers finish, bounded by DRAIN_S. Raises OSError."""
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        config = await with_demo(config, stack)
        port = await listen(await create_app(config), config.bind, config.port, stack)
        click.echo(banner(replace(config, port=port)), err=True)
        on_signals((signal.SIGTERM, signal.SIGINT), lambda _: stop.set())
        await stop.wait()


def on_signals(numbers: Iterable[signal.Signals], act: Callable[[signal.Signals], None]) -> None:
    with contextlib.suppress(NotImplementedError):  # Windows has no signal handlers; Ctrl-C ends the loop there
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, act, number)


async def with_demo(config: Config, stack: contextlib.AsyncExitStack) -> Config:
    """The config, with the demo's account instead of the file's where the demo is asked for."""
    if not config.demo:
        return config
    port = await listen(create_demo(os.environ.get("AGPROXY_DEMO_FAULT")), "127.0.0.1", 0, stack)
    return replace(config, accounts=(Account("demo", "demo", f"http://127.0.0.1:{port}"),))


async def run_command(config: Config, command: Sequence[str]) -> int:
    """Serves one command on a free loopback port with a key of its own; its exit code. Raises OSError."""
    key, tally = fresh_key(), Tally()
    config = replace(config, host="127.0.0.1", port=0, auth_mode="strict", api_key=(ClientKey("run", key),))
    async with contextlib.AsyncExitStack() as stack:
        config = await with_demo(config, stack)
        port = await listen(await create_app(config, tally), "127.0.0.1", 0, stack)
        env = {**os.environ, **client_environment(replace(config, port=port))}
        child = await asyncio.create_subprocess_exec(*command, env=env)
        by_terminal = sys.stdin is not None and sys.stdin.isatty()  # then Ctrl-C reaches the child by itself
        on_signals([signal.SIGTERM, signal.SIGHUP], child.send_signal)
        on_signals([signal.SIGINT], (lambda _: None) if by_terminal else child.send_signal)
        code = await child.wait()
        click.echo(f"agproxy: {tally.bill()}", err=True)
    return 128 - code if code < 0 else code


def client_environment(config: Config) -> dict[str, str]:
    """The variables by which OpenAI's clients find the gateway."""
    key = config.api_key[0].key if config.api_key else "unused"
    return {"OPENAI_BASE_URL": config.base_url, "OPENAI_API_BASE": config.base_url, "OPENAI_API_KEY": key}


async def listen(app: web.Application, host: str, port: int, stack: contextlib.AsyncExitStack) -> int:
    """Serves an application until the stack ends; the port that it listens on."""
    # aiohttp's default, no cancellation, would go on asking Gemini for a client that is gone
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host, port).start()
    address: tuple[str, int] = runner.addresses[0]
    return address[1]


@click.group(invoke_without_command=True, epilog="\b\nThree ways to begin:\n" + THREE_WAYS)
@click.version_option(__version__, message=f"agproxy {__version__} (file {file_fingerprint()})")
@click.pass_context
def main(context: click.Context) -> None:
    """An OpenAI-compatible gateway in front of Gemini, in one file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


accounts_option = click.option(
    "--accounts",
    metavar="FILE",
    help="The accounts file.  [default: $AGPROXY_ACCOUNTS, ./accounts.yaml, $XDG_CONFIG_HOME/agproxy/accounts.yaml]",
)
host_option = click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
port_option = click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on.  [default: $AGPROXY_PORT, 8045]"
)


demo_option = click.option("--demo", is_flag=True, help="Answer from a small Gemini of its own: no key, no network.")


@main.command()
@host_option
@port_option
@accounts_option
@demo_option
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]))
def serve(
    host: str | None, port: int | None, accounts: str | None, demo: bool, log_level: str, log_format: str
) -> None:
    """Start the gateway."""
    config = servable(configured(accounts, host, port, demo))
    warn_of_readers(find_file(accounts, os.environ))
    set_up_logging(log_level, log_format)
    try:
        asyncio.run(run_until_signal(config))
    except OSError as error:
        text = f"Cannot listen on {config.bind}:{config.port} ({error.strerror}). Choose another port with --port."
        raise Unusable(text, "cannot_listen") from None
    except KeyboardInterrupt:
        pass


def warn_of_readers(path: Path | None) -> None:
    if path and os.name == "posix" and path.stat().st_mode & 0o077:
        click.echo(f"Warning: others can read the keys in {path}. Close it with: chmod 600 {path}", err=True)


@main.command(context_settings={"ignore_unknown_options": True})
@accounts_option
@demo_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(accounts: str | None, demo: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND with a gateway of its own: a free port, a key for once, the variables set. Then print the bill."""
    config = servable(replace(configured(accounts, demo=demo), auth_mode="off"))
    set_up_logging("error", "text")
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
    listed = asyncio.run(list_models(config))
    if name is None:
        for known in (*(listed or STATIC_MODELS), *(alias for alias in config.aliases if "*" not in alias)):
            click.echo(known)
        return
    try:
        mapped = map_model(name, config, listed)
    except ModelNotFound as error:
        raise Unusable(error.message, "model_not_found") from None
    instead = f"; the upstream does not list {mapped.wished}" if mapped.wished else ""
    click.echo(f"{name} -> {mapped.model} (by {mapped.rule}{instead})")


async def list_models(config: Config) -> tuple[str, ...] | None:
    async with contextlib.AsyncExitStack() as stack:
        upstream = Upstream(await with_demo(config, stack))
        stack.push_async_callback(upstream.close)
        return await upstream.models()


@main.command()
@accounts_option
@click.option("--online", is_flag=True, help="Ask each account's upstream, too.")
def check(accounts: str | None, online: bool) -> None:
    """Say what is wrong with the accounts file, or list its accounts with masked secrets."""
    config = servable(replace(configured(accounts), auth_mode="off"))
    warn_of_readers(find_file(accounts, os.environ))
    found: Sequence[tuple[str, ...]]
    found = asyncio.run(probe(config)) if online else [(masked_key(a.api_key), a.base_url) for a in config.accounts]
    rows: list[tuple[str, ...]] = [("account", "kind", *(ONLINE_COLUMNS if online else ("key", "upstream")))]
    rows += [(account.name, account.kind, *more) for account, more in zip(config.accounts, found, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in config.unused:
        click.echo(line)
    if any(row[0] == "no" for row in found):
        sys.exit(1)


ONLINE_COLUMNS = ("reachable", "models", "remedy")


async def probe(config: Config) -> Sequence[tuple[str, ...]]:
    """Of each account: whether its upstream answers, with how many models, and what to do where it does not."""
    upstream = Upstream(config)
    try:
        return [await probe_account(upstream, account) for account in config.accounts]
    finally:
        await upstream.close()


async def probe_account(upstream: Upstream, account: Account) -> tuple[str, str, str]:
    try:
        listed = await upstream.models_of(account)
    except UpstreamError as error:
        return "no", "-", f"{error.message.rstrip('.')}. {remedy_of(error)}".rstrip()
    skew_s = upstream.skew_s
    late = f"This machine's clock is off by {skew_s:.0f} s. Set it by NTP." if abs(skew_s) > CLOCK_SKEW_S_MAX else ""
    return "yes", str(len(listed)), late


def remedy_of(error: UpstreamError) -> str:
    """What the owner of an account can do about a refusal. Texts: https://ai.google.dev/gemini-api/docs/troubleshooting"""
    remedies = {
        "location is not supported": "Use a machine or a proxy (proxy.upstream_proxy) in a region that Gemini serves.",
        "billing": "Turn on billing for the key's project.",
        "has not been used|is disabled": "Turn on the Generative Language API for the key's project.",
        "API key|unregistered callers|credentials|PERMISSION": "Make a new key at https://aistudio.google.com/apikey.",
    }
    found = (remedy for text, remedy in remedies.items() if re.search(text, error.message, re.IGNORECASE))
    return next(found, "" if ". " in error.message else error.advice)


def masked_key(key: str) -> str:
    """Enough of a key to tell two apart, too little to use one."""
    return f"{key[:4]}…{key[-2:]}" if len(key) >= 20 else "…"


@main.command("env")
@host_option
@port_option
@accounts_option
@click.option("--shell", default="sh", show_default=True, type=click.Choice([*SHELLS, "json"]))
@click.option("--client", type=click.Choice([*CLIENTS, *DOORS_NOT_BUILT]), help="Print what to paste for this client.")
def print_env(host: str | None, port: int | None, accounts: str | None, shell: str, client: str | None) -> None:
    """Print what a shell needs: eval "$(agproxy env)", or what a client's settings need."""
    config = configured(accounts, host, port)
    values = client_environment(config)
    if client in DOORS_NOT_BUILT:
        raise Unusable(f"{DOORS_NOT_BUILT[client]}. Use a client of `agproxy env --help`.", "client_not_served")
    if client:
        filled = {"base": config.base_url, "root": config.base_url.removesuffix("/v1"), "key": values["OPENAI_API_KEY"]}
        where, text = (text.format(**filled) for text in CLIENTS[client])
        click.echo(f"# {where}", err=True)
        click.echo(text)
    elif shell == "json":
        click.echo(json.dumps(values, indent=2))
    else:
        click.echo("\n".join(SHELLS[shell](name, value) for name, value in values.items()))


if __name__ == "__main__":
    main()
