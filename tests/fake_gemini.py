"""A scripted Gemini: checks every body with Google's structure and answers 400 as Google would."""

import asyncio
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

import antigravity_proxy as agproxy

sys.path.insert(0, str(Path(__file__).parent / "data" / "gemini_schema"))
from check_gemini import validate

# Rules that are warnings for anybody's body, but that the gateway's own must keep.
OWN_OUTPUT = {"p_snake_case", "p_single_for_list", "empty_text", "roles_alternate", "response_mixed", "response_ids"}
Step = list[dict[str, Any]] | tuple[int, dict[str, Any]]


KINDS = ("gemini", "vertex", "cloudcode")


def account_of(kind: str, name: str, url: str, **more: Any) -> agproxy.Account:
    """An account at the fake, whose key, or refresh token, is `key-NAME`."""
    if kind == "gemini":
        return agproxy.Account(name, f"key-{name}", url, **more)
    login = {"client_id": "id", "client_secret": "secret", "refresh_token": f"key-{name}", "token_url": f"{url}/token"}
    project = {"project": "p"} if kind == "vertex" else {}
    return agproxy.Account(name, "", url, kind, **(login | project | more))


def findings(body: Any, model: str, type_: str = "GenerateContentRequest", api: str = "gemini") -> list[Any]:
    """What Google would refuse in a body, and what the gateway's own must not have either.

    Words of the user's may follow results as a content of their own: beside them they are refused by Gemini 3.6.
    A text may be empty where it carries a signature, which must go back where it came from.
    """
    found = validate(body, type_, model=model, enable=OWN_OUTPUT, api=api)
    return [one for one in found if not is_meant(body, one)]


def is_meant(body: Any, finding: Any) -> bool:
    content, part = (int(number) for number in [*re.findall(r"\[(\d+)\]", finding.path), 0, 0][:2])
    if finding.rule == "roles_alternate":
        return "functionResponse" in body["contents"][content - 1]["parts"][0]
    return finding.rule == "empty_text" and "thoughtSignature" in body["contents"][content]["parts"][part]


def error(code: int, status: str, message: str, *details: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return code, {"error": {"code": code, "status": status, "message": message, "details": list(details)}}


def said(*texts: str, reason: str | None = "STOP") -> list[dict[str, Any]]:
    chunks: list[dict[str, Any]] = [
        {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}]} for text in texts
    ]
    if reason:
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7}
        chunks.append({"candidates": [{"finishReason": reason, "index": 0}], "usageMetadata": usage})
    return chunks


def answer(*parts: dict[str, Any], reason: str = "STOP", **more: Any) -> list[dict[str, Any]]:
    """One chunk a part, as Gemini streams them."""
    chunks: list[dict[str, Any]] = [
        {"candidates": [{"content": {"role": "model", "parts": [part]}, "index": 0}]} for part in parts
    ]
    return [*chunks, {"candidates": [{"content": {"role": "model"}, "finishReason": reason, "index": 0, **more}]}]


def call(name: str, **args: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args}}


def whole(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The unary answer that says what the chunks say."""
    answer: dict[str, Any] = {}
    candidates: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        answer |= {key: value for key, value in chunk.items() if key != "candidates"}
        for candidate in chunk.get("candidates", []):
            one = candidates.setdefault(candidate.get("index", 0), {"content": {"role": "model", "parts": []}})
            one["content"]["parts"] += candidate.get("content", {}).get("parts", [])
            earlier = one.get("logprobsResult", {})
            one |= {key: value for key, value in candidate.items() if key != "content"}
            if earlier:
                later = one.get("logprobsResult", {})
                one["logprobsResult"] = {key: earlier.get(key, []) + later.get(key, []) for key in earlier | later}
    return answer | ({"candidates": list(candidates.values())} if candidates else {})


class FakeGemini:
    """Plays `script`, one step a call; `keys` and `bodies` hold what was received.

    With `echo` it repeats the prompt instead; `pause_s` stands between the chunks of a stream, `silence_s` before an answer;
    `go_on` ends all of these pauses at once.
    It is all three upstreams: the Gemini API, Vertex AI and v1internal, and a token endpoint, whose script is `tokens`
    (a refusal, or seconds of silence, a call), and which takes back what is in `revoked`.
    """

    def __init__(self) -> None:
        self.url = ""
        self.echo = False
        self.answer_first_tool = False
        self.beside: dict[str, Any] = {}
        self.pause_s = 0.0
        self.silence_s = 0.0
        self.go_on = asyncio.Event()
        self.date = ""
        self.script: list[Step] = []
        self.keys: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.refused = False  # whether a body was none that Google takes
        self.models: Any = ["gemini-2.5-pro", "gemini-2.5-flash", "gemini-3-pro-preview", "gemini-3-flash-preview"]
        self.tokens: list[tuple[int, Any] | float] = []
        self.revoked: set[str] = set()
        self.forms: list[dict[str, str]] = []
        self.service: dict[str, Any] = {
            "loadCodeAssist": {"currentTier": {"id": "free-tier"}, "cloudaicompanionProject": "p"}
        }
        self.asked: list[str] = []
        self.app = web.Application()
        self.app.router.add_post("/token", self.token)
        vertex = "/v1/projects/p/locations/global/publishers/google/models/{model_and_method:.+}"
        self.app.router.add_post(vertex, self.handle)
        self.app.router.add_route("*", "/v1internal{method:.+}", self.handle_internal)
        self.app.router.add_get("/v1beta/models", self.list_models)
        self.app.router.add_post("/v1beta/models/{model_and_method:.+}", self.handle)

    async def list_models(self, request: web.Request) -> web.Response:
        if isinstance(self.models, tuple):
            return web.json_response(self.models[1], status=self.models[0])
        methods = {"supportedGenerationMethods": ["generateContent", "countTokens", "embedContent"]}
        listed = [{"name": f"models/{name}", **methods} for name in self.models or ["broken"]]
        date = {"Date": self.date} if self.date else {}
        return web.json_response({"models": listed if self.models else 5}, headers=date)

    def embed(self, body: dict[str, Any], model: str) -> web.Response:
        """Vectors that tell the length of each text; like Gemini's shortened ones they are not of length 1."""
        if found := validate(body, "BatchEmbedContentsRequest", model=model):
            return self.refuse(found[0].server)
        texts = ["".join(part["text"] for part in one["content"]["parts"]) for one in body["requests"]]
        return web.json_response({"embeddings": [{"values": [len(text), 2, 1]} for text in texts], **self.beside})

    def count(self, body: dict[str, Any], model: str, api: str) -> web.Response:
        """As many tokens as there are words."""
        body = body.get("generateContentRequest") or body.get("request") or body
        assert body.pop("model", f"models/{model}") == f"models/{model}"
        if found := findings(body, model, api=api):
            return self.refuse(found[0].server)
        texts = [
            part["text"]
            for turn in (*body["contents"], body.get("systemInstruction", {}))
            for part in turn.get("parts", ())
        ]
        return web.json_response({"totalTokens": sum(len(text.split()) for text in texts)})

    async def token(self, request: web.Request) -> web.Response:
        self.forms.append({key: str(value) for key, value in (await request.post()).items()})
        step = self.tokens.pop(0) if self.tokens else 0.0
        if isinstance(step, tuple):
            return web.json_response(step[1], status=step[0])
        await asyncio.sleep(step)
        told = f"{self.forms[-1].get('refresh_token', 'key-service')}:{len(self.forms)}"
        return web.json_response({"access_token": told, "expires_in": "3599", "token_type": "Bearer"})

    async def handle_internal(self, request: web.Request) -> web.StreamResponse:
        method = request.match_info["method"].strip(":/")
        self.asked.append(method)
        if method in self.service and request.headers["Authorization"].removeprefix("Bearer ") in self.revoked:
            return web.json_response(error(401, "UNAUTHENTICATED", "Invalid credentials.")[1], status=401)
        if method in self.service:
            return web.json_response(self.service[method])
        return await self.handle(request)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        api = "gemini" if request.path.startswith("/v1beta/") else "v1internal"
        try:
            body = await request.json()
        except ValueError:
            return self.refuse("Invalid JSON payload received. Expected a string.")
        wrapped = "method" in request.match_info
        model, _, method = request.match_info.get("model_and_method", "").partition(":")
        if wrapped:
            method = request.match_info["method"].strip(":")
            model = body.get("model", "")
            if method != "countTokens" and (refused := validate(body, "CodeAssistGenerateContentRequest")):
                return self.refuse(refused[0].server)
            assert body.get("project", "p") == "p"
            body = body["request"]
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.keys.append(request.headers.get("x-goog-api-key", "") or bearer.split(":")[0])
        if bearer in self.revoked or (api != "gemini" and not bearer):
            return web.json_response(
                error(401, "UNAUTHENTICATED", "Invalid authentication credentials.")[1], status=401
            )
        self.bodies.append(body)
        if method == "batchEmbedContents":
            return self.embed(body, model)
        if method == "countTokens":
            return self.count(body, model, api)
        if found := findings(body, model, api=api):
            return self.refuse(found[0].server)
        step = said(body["contents"][-1]["parts"][0]["text"]) if self.echo else self.script.pop(0)
        if self.answer_first_tool:
            declared = body["tools"][0]["functionDeclarations"][0]["name"]
            step[0]["candidates"][0]["content"]["parts"][0]["functionCall"]["name"] = declared  # type: ignore[index]
        await self.pause(self.silence_s)
        if isinstance(step, tuple):
            return web.json_response(step[1], status=step[0])
        if method == "generateContent":
            return web.json_response(whole(step))
        step = [{"response": chunk, "traceId": "1"} for chunk in step] if wrapped else step
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in step:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n")
            await self.pause(self.pause_s)
        return response

    def refuse(self, why: str) -> web.Response:
        self.refused = True
        return web.json_response(error(400, "INVALID_ARGUMENT", why)[1], status=400)

    async def pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.go_on.wait()
