"""A server in a thread: of the demo model, or of an engine that a test speaks for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.checkpoint import read_config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

NAME = "demo"


class Puppet:
    """An engine that does nothing by itself: a test says to its jobs what it wants them to hear."""

    def __init__(self, room=8):
        self.room, self.jobs, self.cancelled = room, [], []
        self.came = threading.Semaphore(0)

    def submit(self, job):
        from gpt2_multi.app.serve.engine import Full

        if len(self.jobs) - len(self.cancelled) >= self.room:
            raise Full("there is no room")
        self.jobs.append(job)
        self.came.release()
        return Strings(self, job)

    @property
    def counts(self):
        return {"waiting": 0, "running": len(self.jobs), "tokens": 0}


class Strings:
    """What cancels a job."""

    def __init__(self, puppet, job):
        self.puppet, self.job = puppet, job

    def cancel(self):
        self.puppet.cancelled.append(self.job)


def served(engine, **more):
    """What a server is given, of the demo model's shape."""
    from gpt2_multi.app.serve.completions import Served

    tokenizer = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
    own = {"config": read_config(DEMO), "generation": GenerationConfig(eos_token_id=1023), "fingerprint": "fp_1"}
    return Served(NAME, engine, tokenizer, **{**own, "capacity": 8, "timeout": 60, **more})


class Running:
    """A server that runs."""

    def __init__(self, service, server, port, lines, thread):
        self.service, self.server, self.port, self.lines, self.thread = service, server, port, lines, thread
        self.address, self.url = ("127.0.0.1", port), f"http://127.0.0.1:{port}"

    def until(self, is_so):
        """Wait until something is so."""
        for _ in range(6000):
            if is_so():
                return
            time.sleep(0.01)
        raise AssertionError("it does not come")

    def begin_lines(self):
        """Begin the log anew when all that was asked is logged: an answer is there a moment before its line."""
        self.until(lambda: not self.server.server_state.tasks)
        self.lines.clear()


@contextmanager
def running(found=None, key=None, rows=40) -> Iterator[Running]:
    """A server of what is served, or one that loads, until the end of the block."""
    import socket

    from gpt2_multi.app.serve.api import Service, application
    from gpt2_multi.app.serve.server import Server

    service, lines = Service(), []
    if found is not None:
        service.ready(found)
    server = Server(application(service, key, log=lines.append), service, rows)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield Running(service, server, listener.getsockname()[1], lines, thread)
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def demo():
    """The demo model on PyTorch, behind its engine and a server."""
    from gpt2_multi.app import backends
    from gpt2_multi.app.serve.engine import Engine

    model = backends.resolve("pt").load(DEMO, "cpu")
    tokenizer = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
    engine = Engine(model, tokenizer, slots=8, waiting=8).start()
    with running(served(engine)) as server:
        server.model = model
        yield server
    engine.stop(drain=False)


@pytest.fixture(scope="module")
def stage():
    """A server whose engine a test speaks for, in the place of `puppet`."""
    with running(served(Puppet())) as server:
        yield server


@pytest.fixture
def puppet(stage):
    """An engine without jobs."""
    from dataclasses import replace

    puppet = Puppet()
    stage.service.ready(replace(stage.service.served, engine=puppet))
    return puppet
