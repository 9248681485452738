"""The application: endpoints, limits, keys, errors."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parallel_core.data.chat import ChatTemplate
from parallel_core.errors import ParallelCoreError
from parallel_core.generate.requests import SamplingParams
from parallel_core.serve.answers import ClientGone
from parallel_core.serve.completions import Completions
from parallel_core.serve.others import Others
from parallel_core.serve.service import Overloaded, Service, Unavailable
from parallel_core.serve.values import Refused

_MOST_DROPPED_BYTES = 1 << 26

_OPEN_PATHS = ("/health", "/")
"""What is answered without a key."""


@dataclass(frozen=True)
class Limits:
    """What a client may send.

    Attributes:
        max_body_bytes: of a request.
        api_key: must come as `Authorization: Bearer KEY`; empty: none is asked for.
    """

    max_body_bytes: int = 1 << 20
    api_key: str = ""


def make_app(
    service: Service,
    model: str,
    template: ChatTemplate | None,
    defaults: SamplingParams,
    limits: Limits,
    bos_token: str | None = None,
) -> ASGIApp:
    """Return the application over a service.

    Args:
        service: the engine.
        model: the name the model goes by.
        template: of chats; None: they are refused.
        defaults: how `/query` and PanGu-Alpha's endpoint continue texts.
        limits: what a client may send.
        bos_token: what the tokenizer's files say a text begins with.
    """
    completions = Completions(service, model, template)
    others = Others(service, defaults, template, bos_token)
    routes = [
        _route("/v1/completions", completions.completions, "POST"),
        _route("/completions", completions.completions, "POST"),
        _route("/v1/chat/completions", completions.chat, "POST"),
        _route("/v1/models", completions.models, "GET"),
        _route("/health", others.health, "GET"),
        _route("/metrics", others.metrics, "GET"),
        _route("/tokenize", others.tokenize, "POST"),
        _route("/detokenize", others.detokenize, "POST"),
        _route("/tokenizer_info", others.tokenizer_info, "GET"),
        _route("/api", others.megatron, "PUT"),
        _route("/query", others.query, "GET"),
        _route("/model/pangu:predict", others.predict, "POST"),
        _route("/model/pangu/version/{version:int}:predict", others.predict, "POST"),
        _route("/", others.page, "GET"),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})
    known = {route.path for route in routes}
    return _Guard(app, service, limits, known)


def _route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str) -> Route:
    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as error:
            return error_response(error.status, str(error), error.parameter, error.code)
        except Overloaded as error:
            return error_response(429, str(error), code="too_many_requests", headers={"Retry-After": "1"})
        except Unavailable as error:
            return error_response(503, str(error))
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)
        except ParallelCoreError as error:
            return error_response(400, str(error))

    return Route(path, run, methods=[method])


def error_response(
    status: int,
    message: str,
    parameter: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    told = {"message": message, "type": kind, "param": parameter, "code": code}
    return JSONResponse({"error": told}, status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return error_response(status, told.get(status, str(error)), headers=headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return error_response(500, f"{type(error).__name__}: an error of the server's own; its log has more")


async def _drop_body(receive: Receive, message: Message | None = None) -> None:
    """Read what is left of a body, within reason: a client that cannot send it all does not read the answer either."""
    read = 0
    while read < _MOST_DROPPED_BYTES:
        if message is not None and (message["type"] != "http.request" or not message.get("more_body")):
            return
        message = await receive()
        read += len(message.get("body", b""))


class _Guard:
    """Counts requests, asks for the key, and reads no more of a body than is allowed."""

    def __init__(self, app: ASGIApp, service: Service, limits: Limits, known: set[str]) -> None:
        self._app, self._service, self._limits, self._known = app, service, limits, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, left = 0, self._limits.max_body_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if left < 0:
                await _drop_body(receive, message)
                raise Refused(self._larger(), 413)
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await _drop_body(receive)
            await (refusal or self._app)(scope, limited, counted)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            counts = self._service.counters.requests
            counts[path, status] = counts.get((path, status), 0) + 1

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            return error_response(413, self._larger(), headers={"Connection": "close"})
        key = self._limits.api_key
        if key and scope["path"] not in _OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                told = "send the server's key: Authorization: Bearer KEY"
                return error_response(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _larger(self) -> str:
        return f"the body is larger than {self._limits.max_body_bytes} bytes; send less"
