"""`gpt2-multi serve` of the demo model under load: clients that each ask for one text after the other, with options at
random, and how much quicker many at once are served than one. Each text is held against the one that the model makes
alone; one that is lost or another is no figure, but the end.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import OURS, PeerError, Row
from benchmarks.harness.corpus import english, shared
from gpt2_multi.app.backends import BACKENDS, Backend, installed
from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

KINDS: list[dict[str, Any]] = [  # of requests, as often as each other
    {"temperature": 0},
    {"temperature": 1},  # as of OpenAI's API where nothing is said
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40},
]
START_SECONDS = 300.0  # in which XLA compiles, too
SMALL = {"seconds": 1.0, "clients": (1, 2), "texts": 4}


@dataclass(frozen=True)
class Ask:
    """A request, and the text that the model makes of it alone."""

    body: dict[str, Any]
    text: str


@dataclass
class Load:
    """What was answered to so many clients at once."""

    clients: int
    seconds: float
    tokens: int
    took: list[float]  # seconds of each request


def run(
    seconds: float = 30.0,
    clients: Sequence[int] = (1, 8, 64),
    texts: int = 64,
    slots: int = 32,
    who: Sequence[str] = (),
) -> list[Row]:
    """Ask for `texts` different texts, over and over: for so long by the most clients, a fifth of it by fewer."""
    rows = []
    for name in installed():
        backend = BACKENDS[name]
        if not who or any(backend.title.startswith(one) for one in who):
            asks = list(asked(backend, texts))
            with served(name, slots) as port:
                for count in clients:
                    load(port, asks, count, 0, len(asks))  # where XLA compiles
                loads = [
                    load(port, asks, count, seconds if count == max(clients) else seconds / 5) for count in clients
                ]
                rows += table(f"{OURS}, {backend.title}", loads)
    if not rows:
        raise PeerError(f"--who: expected one of {', '.join(row.title for row in BACKENDS.values())}")
    return rows


def table(who: str, loads: Sequence[Load]) -> list[Row]:
    """The figures of a backend."""
    first, rows = loads[0], []
    for one in loads:
        rows.append(Row(f"{one.clients} at once", who, one.tokens / one.seconds, "tokens/s"))
        for share in (50, 95):
            rows.append(Row(f"{one.clients} at once, p{share}", who, percentile(one.took, share) * 1000, "ms"))
        if one is not first:
            times = one.tokens / one.seconds / (first.tokens / first.seconds)
            rows.append(Row(f"{one.clients} at once / {first.clients}", who, times, "times"))
    return rows


def percentile(took: Sequence[float], share: int) -> float:
    """The time in which so many of a hundred requests are answered."""
    return statistics.quantiles(took, n=100, method="inclusive")[share - 1] if len(took) > 1 else took[0]


def asked(backend: Backend, texts: int) -> Iterator[Ask]:
    """Requests: prompts of 2 to 24 words of Shakespeare, 16 to 64 tokens, each kind of options as often."""
    model, tokenizer = backend.load(DEMO, "cpu"), GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
    words, rng = english(shared()).split(), random.Random(0)
    for number in range(texts):
        start, kind = rng.randrange(len(words) - 24), KINDS[number % len(KINDS)]
        ids = tokenizer(" ".join(words[start : start + rng.randint(2, 24)])).input_ids[:128]
        body = {"prompt": ids, "max_tokens": rng.choice([16, 32, 64]), "seed": number, "top_k": 0, "top_p": 1.0, **kind}
        with backend.threads(model):
            text = alone(backend, model, tokenizer, body)
        yield Ask(body, text)


def alone(backend: Backend, model: Any, tokenizer: GPT2Tokenizer, body: dict[str, Any]) -> str:
    """The text that `generate` makes of a request."""
    sampled = {name: body[name] for name in ("temperature", "top_k", "top_p", "seed")} if body["temperature"] else {}
    end = model.generation_config.eos_token_ids
    config = GenerationConfig(
        max_new_tokens=body["max_tokens"], eos_token_id=list(end), do_sample=bool(sampled), **sampled
    )
    ids = backend.to_tensor(model, np.array([body["prompt"]]))
    made = backend.to_numpy(model.generate(ids, generation_config=config))[0, len(body["prompt"]) :].tolist()
    return tokenizer.decode(made[: next((at for at, token in enumerate(made) if token in end), None)])


@contextmanager
def served(name: str, slots: int) -> Iterator[int]:
    """The port of a server of the demo model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gpt2_multi", "serve", "demo", "--backend", name, "--port", str(port)]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [*command, "--slots", str(slots)], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server answers."""
    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise PeerError("the server does not answer; `gpt2-multi serve demo` says why")


def load(port: int, asks: Sequence[Ask], clients: int, seconds: float, least: int = 0) -> Load:
    """Have clients ask for so long, in all at least so often, each for one text after the other."""
    start = time.perf_counter()

    def client(number: int) -> list[tuple[float, int]]:
        connection, rng, found = http.client.HTTPConnection("127.0.0.1", port, timeout=600), random.Random(number), []
        while time.perf_counter() - start < seconds or len(found) * clients < least:
            found.append(answer(connection, rng.choice(asks)))
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = [one for each in pool.map(client, range(clients)) for one in each]
    took = time.perf_counter() - start
    return Load(clients, took, sum(tokens for _, tokens in found), [seconds for seconds, _ in found])


def answer(connection: http.client.HTTPConnection, ask: Ask) -> tuple[float, int]:
    """The seconds and the tokens of a request; PeerError where its text is lost, or not that of the model alone."""
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(ask.body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = json.loads(response.read())
    took = time.perf_counter() - start
    if response.status != http.HTTPStatus.OK:
        raise PeerError(f"a request was answered {response.status}: {said}")
    if (text := said["choices"][0]["text"]) != ask.text:
        raise PeerError(f"seed {ask.body['seed']}: expected {ask.text!r}, found {text!r}")
    return took, said["usage"]["completion_tokens"]
