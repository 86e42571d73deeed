"""`gpt2-multi serve`: what it refuses before it loads anything, what it prints, and how a signal ends it."""

import importlib.util
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from click.testing import CliRunner

httpx = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")

from gpt2_multi.app import cli
from gpt2_multi.app.serve import command
from gpt2_multi.app.serve.engine import Done
from tests.app.serve.conftest import Puppet, served
from tests.support.effort import THOROUGH


class Idle(Puppet):
    """A puppet that ends."""

    def stop(self, drain):
        assert not drain


def run(*args, **environment):
    return CliRunner().invoke(cli.main, ["serve", *map(str, args)], env=environment)


def refusal(*args, code=1, **environment):
    result = run(*args, **environment)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.output
    return result.stderr.removeprefix("gpt2-multi: ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com"])
def test_who_is_reached_from_elsewhere_needs_a_key(host):
    assert refusal("--host", host, code=2).startswith(f"--host {host} is reached from elsewhere; give an --api-key")


@pytest.mark.parametrize("key", ["", " sk-1", "sk-\u00e9", "sk-\n"])
def test_a_key_is_what_a_header_can_bring_and_is_not_printed(key):
    found = refusal("--host", "0.0.0.0", GPT2_MULTI_API_KEY=key, code=2)
    assert "sk-" not in found and ("--api-key: expected printable ASCII" in found or not key)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal("--port", port).startswith(f"--host 127.0.0.1 --port {port}: Address already in use; choose")


def test_what_cannot_be_loaded_ends_it(tmp_path):
    assert refusal(tmp_path, "--port", 0).startswith(f"{tmp_path}: expected tokenizer.json")
    assert refusal("--device", "tpu", "--port", 0).startswith("device: PyTorch has")


def test_without_its_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal() == 'serve needs starlette and uvicorn: pip install "gpt2-multi[serve]"\n'


def test_a_signal_lets_requests_finish_and_refuses_others(monkeypatch):
    """In this process, whose main thread serves; another one asks."""
    puppet, addresses, found = Idle(), queue.Queue(), {}
    address_of = command._address
    monkeypatch.setattr(command.Plan, "load", lambda plan: served(puppet))
    monkeypatch.setattr(
        command, "_address", lambda listener: addresses.put(address_of(listener)) or address_of(listener)
    )

    def post(name):
        found[name] = httpx.post(f"{addresses.url}/v1/completions", json={"prompt": "a"}, timeout=60)

    def ask():
        addresses.url = addresses.get()
        first = threading.Thread(target=post, args=("first",))
        first.start()
        puppet.came.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(9999):
            if httpx.get(f"{addresses.url}/health").status_code == 503:
                break
        post("second")
        puppet.jobs[0].listen(Done("stop", 1, 0))
        first.join()

    asking = threading.Thread(target=ask)
    asking.start()
    result = run("--port", 0)
    asking.join()
    assert (result.exit_code, found["first"].status_code, found["second"].status_code) == (0, 200, 503)
    assert f"A page to write in: {addresses.url}/\n" in result.stdout
    assert f"curl {addresses.url}/v1/completions" in result.stdout and "Authorization" not in result.stdout
    assert "POST /v1/completions 503" in result.stderr


if THOROUGH:

    @pytest.mark.parametrize("framework", ["pt", "flax", "tf"])
    def test_a_second_signal_ends_it_at_once(framework):
        serve = [sys.executable, "-m", "gpt2_multi", "serve", "--port", "0", "--backend", framework]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
            said = {"prompt": "a", "max_tokens": 250, "n": 128, "stream": True}  # for seconds
            with suppress(httpx.RemoteProtocolError, httpx.ReadError):
                with httpx.stream("POST", f"{url}/v1/completions", json=said, timeout=300) as response:
                    lines = response.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    while httpx.get(f"{url}/health").status_code != 503:
                        pass
                    process.send_signal(signal.SIGTERM)
                    list(lines)
            assert process.wait(300) == -signal.SIGTERM
