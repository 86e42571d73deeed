"""How a server is attacked: what is sent to it byte by byte, what comes back, and whether that is right."""

from __future__ import annotations

import json
import random
import re
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple

SECONDS = 120  # for which an answer is waited
NOTHING = 0  # the status of a connection that ends without an answer


@dataclass(frozen=True)
class Attack:
    """What is sent, and the statuses of which the answer may have one; several where there are several requests.

    ending: what the client does then: "reads", "ends" (its side), "leaves" or "resets".
    """

    sends: Sequence[bytes]
    statuses: Collection[int]
    answers: int = 1
    ending: str = "reads"
    lacks: tuple[str, ...] = ()  # what no header may hold
    later: Collection[int] = ()  # statuses of the answers after the first


Kind = Callable[[random.Random], Attack]


class Shared:
    """A file as a socket, that several answers are read from."""

    def __init__(self, connection: socket.socket) -> None:
        self.file = connection.makefile("rb")
        self.read, self.readline, self.readinto, self.peek = (
            self.file.read, self.file.readline, self.file.readinto, self.file.peek
        )  # fmt: skip

    def makefile(self, mode: str) -> Shared:
        """Itself, which an answer cannot close."""
        return self

    def flush(self) -> None:
        """There is nothing to flush."""

    def close(self) -> None:
        """The next answer comes from here too."""


class Answer(NamedTuple):
    """What came back."""

    status: int = NOTHING
    headers: Message | None = None
    body: bytes = b""


def answers(attack: Attack, address: tuple[str, int]) -> list[Answer]:
    """All that comes back."""
    with socket.create_connection(address, SECONDS) as connection:
        with suppress(ConnectionError):  # it may be answered before all is sent
            for part in attack.sends:
                connection.sendall(part)
        if attack.ending == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if attack.ending in ("leaves", "resets"):
            return [Answer()]
        if attack.ending == "ends":
            connection.shutdown(socket.SHUT_WR)
        shared = Shared(connection)
        return [answer(shared) for _ in range(attack.answers)]


def answer(shared: Shared) -> Answer:
    """The next answer, or that there is none."""
    response = HTTPResponse(shared)  # type: ignore[arg-type]
    try:
        response.begin()
        return Answer(response.status, response.headers, response.read())
    except (HTTPException, ConnectionError):
        return Answer()


def complaint(attack: Attack, found: Sequence[Answer]) -> str | None:
    """What is wrong with the answers, if anything."""
    for place, (status, headers, body) in enumerate(found):
        expected = attack.later if place else attack.statuses
        if status not in expected:
            return f"answer {place + 1}: expected {sorted(expected)}, found {status} {body[:200]!r}"
        if headers is None:
            continue
        if status >= 400 and {"message", "type", "param", "code"} != json.loads(body)["error"].keys():
            return f"no error of OpenAI's form: {body[:200]!r}"
        is_page = headers.get_content_type() == "text/html"
        if headers["x-content-type-options"] != "nosniff" or (is_page and not body.startswith(b"<!doctype html>")):
            return f"what a browser may read as a page: {headers}"
        if any(word in f"{headers}" for word in attack.lacks):
            return f"headers that came from the request: {headers}"
    return None


def attack_all(
    address: tuple[str, int], kinds: Sequence[Kind], count: int, seed: int, threads: int = 8
) -> dict[str, Counter[int]]:
    """Attack a server: how often each kind had each status; AssertionError with the first wrong answers."""
    table: dict[str, Counter[int]] = {}
    wrong: list[str] = []

    def one(number: int) -> tuple[str, int]:
        kind = kinds[number % len(kinds)]
        attack = kind(random.Random(seed * 1_000_003 + number))
        found = answers(attack, address)
        if said := complaint(attack, found):
            wrong.append(f"attack {number}, {kind.__name__}: {said}; it sent {attack.sends[0][:200]!r}")
        return kind.__name__, found[0].status

    with ThreadPoolExecutor(threads) as pool:
        for name, status in pool.map(one, range(count)):
            table.setdefault(name, Counter())[status] += 1
    assert not wrong, f"seed {seed}: {len(wrong)} wrong answers, of which the first:\n" + "\n".join(wrong[:9])
    return table


def crowd(address: tuple[str, int], count: int) -> Counter[int]:
    """Open many connections that say nothing or half of a request, all at once: the status that each got at once."""
    found: Counter[int] = Counter()
    with ExitStack() as open_ones, selectors.DefaultSelector() as waiting:
        for number in range(count):
            connection = open_ones.enter_context(socket.create_connection(address, SECONDS))
            waiting.register(connection, selectors.EVENT_READ)
            with suppress(ConnectionError):
                connection.sendall(b"POST / HTTP/1.1\r\nHo"[: number % 19])
        while ready := waiting.select(0.3):
            for key, _ in ready:
                waiting.unregister(key.fileobj)
                with suppress(ConnectionError):
                    found[_status(key.fileobj.recv(99))] += 1  # type: ignore[union-attr]
    return found


def _status(line: bytes) -> int:
    found = re.match(rb"HTTP/1.1 (\d+)", line)
    return int(found[1]) if found else NOTHING
