"""The server's addresses: OpenAI's API for completions, what a monitor asks for, and the page.

Whatever is wrong is answered in OpenAI's form, with the status that says whose fault it is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from enum import Enum
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gpt2_multi.app.serve import metrics, protocol
from gpt2_multi.app.serve.completions import Request, Served
from gpt2_multi.app.serve.guards import CLOSE, GONE, Guard, answer
from gpt2_multi.app.serve.protocol import RETRY, Fields, RequestError

BODY = 1 << 20  # bytes of a request, of which a prompt as long as GPT-2 reads takes a hundredth
BODY_SECONDS = 30.0  # in which all of it has to come
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}  # of the page's files
PAGE = {f"/{file.name}".removesuffix("index.html"): file for file in (files(__package__) / "page").iterdir()}
PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class State(Enum):
    """What a server does."""

    LOADING = "loading"
    READY = "ok"
    DRAINING = "draining"


class Service:
    """A server's model and counts, and whether it takes requests: from `ready` until `drain`."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self.is_draining = False
        self.running = 0  # requests for completions
        self.created = int(time.time())
        self.metrics = metrics.Metrics()
        self.tokenizing = ThreadPoolExecutor(1, "tokenizing")  # one thread, for a tokenizer's cache is for one

    @property
    def state(self) -> State:
        """What it does now."""
        if self.is_draining:
            return State.DRAINING
        return State.READY if self.served else State.LOADING

    @property
    def is_drained(self) -> bool:
        """Whether it drains, and all that was asked is answered."""
        return self.is_draining and not self.running

    def ready(self, served: Served) -> None:
        """Take requests."""
        self.served = served

    def drain(self) -> None:
        """Take no more requests."""
        self.is_draining = True

    def model(self) -> Served:
        """The model, where requests are taken; RequestError otherwise."""
        if self.served is None or self.is_draining:
            raise RequestError(503, f"the server is {self.state.value}; ask again later", headers=RETRY | CLOSE)
        return self.served

    # --- addresses ---------------------------------------------------------------------------------------------------

    async def health(self, call: Call) -> Response:
        """Whether requests are taken."""
        state = self.state
        return JSONResponse({"status": state.value}, 200 if state is State.READY else 503)

    async def counts(self, call: Call) -> Response:
        """What Prometheus reads."""
        now: Mapping[str, int] = self.served.engine.counts if self.served else {}
        gauges = {name: now.get(name, 0) for name in ("waiting", "running")}
        return Response(self.metrics.text(gauges), headers={"content-type": metrics.CONTENT_TYPE})

    async def models(self, call: Call) -> Response:
        """The one model, in a list."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, call: Call) -> Response:
        """The one model, by its name."""
        self.model().check_name(call.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self.model()
        return protocol.model_card(served.name, self.created, served.config.n_positions)

    async def chat(self, call: Call) -> Response:
        """What GPT-2 has not."""
        message = "GPT-2 has no chat; spell it as one text, and use /v1/completions"
        raise RequestError(404, message, "model", "model_not_supported")

    async def completions(self, call: Call) -> Response:
        """Completions, whole or as a stream; called off where the client goes."""
        self.model()
        protocol.check_query(call.query_params)
        given = protocol.read(await body_of(call))
        asked, served = Fields.of(given), self.model()
        jobs = await asyncio.get_running_loop().run_in_executor(self.tokenizing, served.jobs, asked)
        request = Request(self.model(), asked, jobs, f"cmpl-{call.state.id}")
        request.submit()
        self.running += 1
        if asked.stream:
            return Stream(self, request)
        try:
            found = await while_there(call.receive, request.whole())
        finally:
            self.finish(call.scope, request)
        return Response(status_code=GONE) if found is None else JSONResponse(found)

    def finish(self, scope: Scope, request: Request) -> None:
        """Call off what is not done of a request, and count what is."""
        self.running -= 1
        request.cancel()
        scope["state"]["tokens"] = request.prompt_tokens, request.new_tokens
        self.metrics.prompt_tokens += request.prompt_tokens
        self.metrics.new_tokens += request.new_tokens
        self.metrics.seconds.observe(time.monotonic() - request.start)
        if not math.isnan(request.first):
            self.metrics.first_token.observe(request.first)


class Stream(StreamingResponse):
    """A request's answer, piece by piece."""

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__(request.lines(), headers={"x-accel-buffering": "no"}, media_type="text/event-stream")
        self.service, self.request = service, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, until the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.finish(scope, self.request)


async def while_there(receive: Receive, work: Awaitable[Any]) -> Any:
    """What comes of some work, or None where the client goes before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def body_of(call: Call) -> bytes:
    """The body of a request: JSON, not too large, and there in time; RequestError otherwise."""
    _check_kind(call.headers.get("content-type", ""))
    if call.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "expected no Content-Encoding")
    declared = call.headers.get("content-length", "0")
    if len(declared) > 10 or int(declared) > BODY:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in call.stream():
                body += part
                if len(body) > BODY:
                    raise _too_large()
    except TimeoutError:
        raise RequestError(408, "the body did not come in time", headers=CLOSE) from None
    except ClientDisconnect:
        raise RequestError(GONE, "the client is gone") from None
    return bytes(body)


def _check_kind(given: str) -> None:
    """RequestError where a body is no JSON in UTF-8, which alone is JSON: other bytes may be UTF-8 of another text."""
    kind = Message()
    kind["content-type"] = given
    if given.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "expected Content-Type: application/json")
    if kind.get_content_charset("utf-8") not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError(415, "expected a charset of utf-8; send the body in it, and say so or nothing")


def _too_large() -> RequestError:
    return RequestError(413, f"the body has more than {BODY} bytes; ask for less at once")


async def not_done(call: Call, error: Exception) -> Response:
    """What is answered to what no address takes, and for what an address refuses."""
    if isinstance(error, RequestError):
        return answer(error)
    status = error.status_code if isinstance(error, HTTPException) else 500
    place = f"{call.method[:10]} {protocol.shown(call.scope['path'])}"
    messages = {404: f"Invalid URL ({place})", 405: f"Not allowed: {place}", 500: "a bug of the server; see its log"}
    headers = dict(getattr(error, "headers", None) or {})
    return answer(RequestError(status, messages.get(status, "refused"), code=CODES.get(status), headers=headers))


CODES = {404: "unknown_url", 405: "method_not_supported"}


def routes(service: Service) -> list[Route]:
    """Which address does what."""
    return [
        Route("/health", service.health),
        Route("/metrics", service.counts),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        *(Route(path, page(file)) for path, file in PAGE.items()),
    ]


def page(file: Traversable) -> Any:
    """What answers with a file of the page."""
    content, kind = file.read_bytes(), KINDS[PurePath(file.name).suffix]

    async def send(call: Call) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return send


def application(service: Service, key: str | None = None, **options: Any) -> Guard:
    """The whole application, behind its guards; `options` are those of `Guard`."""
    inner = Starlette(routes=routes(service), exception_handlers=dict.fromkeys(ERRORS, not_done))
    inner.router.redirect_slashes = False  # to an address that the Host header names
    return Guard(inner, service.metrics, {*PATHS, *PAGE}, {"/health", *PAGE}, key, **options)


ERRORS = (RequestError, HTTPException, Exception)
