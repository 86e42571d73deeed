"""What every request passes: who may ask, what every answer says besides, and one line of a log for each.

No line has a word of a request or of an answer: method, path, status, numbers of tokens, milliseconds.
"""

from __future__ import annotations

import hmac
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2_multi.app.serve.metrics import Metrics
from gpt2_multi.app.serve.protocol import RequestError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
SECURITY = {  # headers of every answer
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOCAL = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
CLOSE = {"connection": "close"}
OTHER = "other"  # what metrics name any path that is none of the server's
GONE = 499  # the status in the log where the client did not wait, as nginx has it


def answer(refusal: RequestError) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


class Guard:
    """An application behind its guards.

    key: what `Authorization: Bearer` has to bring. Without one, only programs and pages of this machine may ask: the
    Host header has to name it, or a page from elsewhere whose name leads here (DNS rebinding) would be answered.
    paths: those that metrics name. free: those that need no key. log: is given each line.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        paths: Collection[str],
        free: Collection[str],
        key: str | None = None,
        log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.app, self.metrics, self.paths, self.free = app, metrics, paths, free
        self.key, self.log = key, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope.setdefault("state", {})["id"] = name = uuid.uuid4().hex
        start, status = time.monotonic(), GONE

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for header, value in {**SECURITY, "x-request-id": name}.items():
                    headers.setdefault(header, value)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, guarded)
        except RequestError as refusal:
            await answer(refusal)(scope, receive, guarded)
        except Exception as error:  # already answered with status 500
            self.log(f"a bug, {type(error).__name__}; please report it, with GPT2_MULTI_DEBUG=1 set")
            if os.environ.get("GPT2_MULTI_DEBUG") == "1":
                traceback.print_exc()
        finally:
            self._record(scope, status, time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["http_version"] not in ("1.0", "1.1"):
            raise RequestError(505, "expected HTTP/1.1", headers=CLOSE)
        if "content-length" in headers and "transfer-encoding" in headers:  # two servers may see two requests
            raise RequestError(400, "expected Content-Length or Transfer-Encoding, found both", headers=CLOSE)
        if self.key is None:
            _check_local(headers.get("host", ""), headers.get("origin"))
        elif scope["path"] not in self.free:
            _check_key(self.key, headers.get("authorization", ""))

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self.paths else OTHER
        prompt, new = scope["state"].get("tokens", (0, 0))
        shown = scope.get("raw_path", b"").partition(b"?")[0][:60].decode("latin-1")
        place = f"{scope['method'][:10]} {path if path != OTHER else ascii(shown)}"
        self.note(path, status, f"{place} {status} {prompt}+{new} tokens {seconds * 1e3:.0f} ms")

    def note(self, path: str, status: int, words: str) -> None:
        """Count an answer, and write a line about it."""
        self.metrics.requests[path, status] += 1
        self.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}")


def _check_local(host: str, origin: str | None) -> None:
    if not LOCAL.fullmatch(host):
        raise RequestError(403, "the Host header names another machine; ask by 127.0.0.1 or localhost", code="host")
    if origin is not None and origin.partition("://")[2] != host:
        raise RequestError(403, "pages of other sites may not ask this server", code="origin")


def _check_key(key: str, header: str) -> None:
    scheme, _, given = header.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        message = "the API key is missing or wrong; send Authorization: Bearer and the key of --api-key"
        raise RequestError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
