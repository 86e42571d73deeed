"""Hostile requests are answered rightly, and the server goes on as if there had been none."""

import json
import random
import socket
from contextlib import suppress

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("torch")

from gpt2_multi.app.serve import api, server
from gpt2_multi.app.serve.engine import Piece
from tests.app.serve.attacks.kinds import KINDS, request, spelled
from tests.app.serve.attacks.wire import NOTHING, Attack, Shared, answer, answers, attack_all, crowd
from tests.app.serve.conftest import Puppet, running, served
from tests.conftest import resident
from tests.support.effort import some

GOOD = Attack([request(spelled(prompt="ROMEO:", max_tokens=9, seed=1))], {200})
GROWTH = 300 << 20  # bytes


def choices(demo):
    return json.loads(answers(GOOD, demo.address)[0].body)["choices"]


def test_hostile_requests_have_the_right_status_and_change_nothing(demo):
    seed = random.SystemRandom().randrange(2**32)  # which a failure tells
    before, memory = choices(demo), resident()
    attack_all(demo.address, KINDS, some(1000, 2 * len(KINDS)), seed)
    demo.until(lambda: demo.service.running == 0)
    assert choices(demo) == before
    assert resident() - memory < GROWTH


def test_a_crowd_is_turned_away_and_the_next_is_welcome(demo):
    found = crowd(demo.address, 400)
    assert found[503] > 50 and found.keys() == {503}
    demo.until(lambda: len(demo.server.server_state.connections) == 0)
    assert choices(demo)


@pytest.fixture
def hasty(monkeypatch):
    """A server that waits for nobody."""
    for module, name in ((server, "HEADER_SECONDS"), (api, "BODY_SECONDS"), (server, "STALL_SECONDS")):
        monkeypatch.setattr(module, name, 0.2)
    with running(served(Puppet())) as found:
        yield found


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"", NOTHING),
        (b"POST /v1/comp", 408),
        (request(method="GET", path="/health")[:-2], 408),
        (request(b'{"prompt":', length="99"), 408),
        (request(b"fff\r\n{", "Transfer-Encoding: chunked"), 408),
    ],
)
def test_who_says_one_letter_at_a_time_is_not_waited_for(hasty, start, status):
    with socket.create_connection(hasty.address) as client:
        client.sendall(start)
        for _ in range(9999):
            client.settimeout(0.05)
            with suppress(TimeoutError):
                client.recv(1, socket.MSG_PEEK)
                break
            client.sendall(b"a" if start else b"")
        assert answer(Shared(client)).status == status


def test_who_takes_nothing_is_not_waited_for(hasty):
    puppet = hasty.service.served.engine
    with socket.create_connection(hasty.address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request(spelled(stream=True)))
        puppet.came.acquire()
        for _ in range(200):
            puppet.jobs[0].listen(Piece("x" * 100_000, []))
        hasty.until(lambda: puppet.cancelled)
        assert not hasty.server.server_state.connections
