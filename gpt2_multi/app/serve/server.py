"""The server below the application: connections that do not wait for ever, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from http import HTTPStatus
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2_multi.app.serve.api import BODY_SECONDS, Service
from gpt2_multi.app.serve.guards import OTHER, SECURITY, Guard
from gpt2_multi.app.serve.protocol import RETRY, RequestError

HEADERS = 16 << 10  # bytes of a request before its body
HEADER_SECONDS = 10.0  # in which they have to come
SLACK_SECONDS = 5.0  # after the application gave up waiting for a body
STALL_SECONDS = 30.0  # in which a client has to take some of what waits for it
KEPT_SECONDS = 5  # that a connection without a request stays open
SPARE = 256  # connections beside those of requests that run or wait


class Connection(H11Protocol):
    """A connection whose client has to send and to take within limits of time, or loses it."""

    _arrives: Any = None  # which part of a request is waited for, and until when
    _patience: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, unless there are too many connections."""
        super().connection_made(transport)
        # asyncio does so only for sockets that were made with the number of TCP, which `create_server` does not give.
        # Else a body waits until the client has acknowledged its headers, for which it takes its time: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if len(self.connections) > (self.limit_concurrency or sys.maxsize):
            self._refuse(RequestError(503, "too many connections; ask again later", headers=RETRY))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Time each part of a request from when the one before it was there."""
        part = self.conn.their_state
        if part is self._arrives or self.transport.is_closing():
            return
        self._arrives = part
        if self._patience is not None:
            self._patience.cancel()
        seconds = {h11.IDLE: HEADER_SECONDS, h11.SEND_BODY: BODY_SECONDS + SLACK_SECONDS}.get(part)
        self._patience = None if seconds is None else self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:
            self._refuse(RequestError(408, "the request did not come in time"))
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, while the error that says so is handled."""
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(RequestError(hint, f"this is no request of HTTP/1.1: {HTTPStatus(hint).phrase}"))

    def _refuse(self, refusal: RequestError) -> None:
        """Refuse what the application never sees, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            return self.transport.abort()
        body = json.dumps(refusal.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}" for name, value in {**headers, **SECURITY, **refusal.headers}.items()]
        status = HTTPStatus(refusal.status)
        cast(Guard, self.app).note(OTHER, refusal.status, f"- {refusal.status} {refusal}")
        self.transport.write("\r\n".join([f"HTTP/1.1 {status} {status.phrase}", *lines, "", ""]).encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """Wait, but not for ever, for a client that takes nothing."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nothing comes on, even if its client has not taken all."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limits."""
        for timer in (self._patience, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """A server that ends when all that was asked is answered; told to a second time, it ends at once."""

    def __init__(self, app: Guard, service: Service, rows: int) -> None:
        """rows: how many completions may run or wait at once."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=rows + SPARE,
                timeout_keep_alive=KEPT_SECONDS,
                timeout_graceful_shutdown=int(BODY_SECONDS),
                h11_max_incomplete_event_size=HEADERS,
            )
        )
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let requests finish, the first time."""
        if self.service.is_draining:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; asked ten times a second."""
        return await super().on_tick(counter) or self.service.is_drained
