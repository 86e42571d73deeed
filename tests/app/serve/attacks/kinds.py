"""Hostile requests, each drawn from a generator of random numbers, and the statuses that answer them rightly."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.app.serve.attacks.wire import NOTHING, Attack, Kind

PATH = "/v1/completions"
MARKUP = (
    "<script>alert(1)</script>", "\n\ndata: [DONE]\n\n", '"}]}<img src=x onerror=alert(1)>', "{{7*7}}${7*7}",
    "\x00\x1b[2J",
)  # fmt: skip
WRONG: tuple[Any, ...] = ({}, [[]], [{}], [None], {"a": {}}, -(10**30), 1e300, [[[1]]], [5])  # no field may be so


def request(body: bytes = b"", *lines: str, method: str = "POST", path: str = PATH, **more: str) -> bytes:
    """A request as bytes; lines are added to the head, a Host where they have none, and what a body needs.

    more: another `length` than the body's, another `kind` than json.
    """
    names = {line.partition(":")[0].strip().lower() for line in lines}
    head = [f"{method} {path} HTTP/1.1", *(["Host: localhost"] if "host" not in names else [])]
    if method == "POST":
        head.append(f"Content-Type: application/{more.get('kind', 'json')}")
        if "length" in more or "transfer-encoding" not in names:
            head.append(f"Content-Length: {more.get('length', len(body))}")
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def spelled(**fields: Any) -> bytes:
    """A body of JSON."""
    return json.dumps({"prompt": "a", "max_tokens": 2, **fields}).encode()


def chunks(body: bytes, size: int) -> bytes:
    """A body in chunks."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# --- fields ----------------------------------------------------------------------------------------------------------


def wrong_value(rng: random.Random) -> Attack:
    fields = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "best_of",
        "logprobs",
        "echo",
        "stream",
        "seed",
        "min_p",
        "user",
    )
    return Attack([request(spelled(**{rng.choice(fields): rng.choice(WRONG)}))], {400})


def wrong_prompt(rng: random.Random) -> Attack:
    prompts: tuple[Any, ...] = (
        3, {}, [], [[]], [1.5], [-1], [10**9], ["a", 1], [[1], "a"], ["a"] * 9999, [[5] * 9000], "a " * 9000,
        "a" * 900_000, [True], [[[1]]],
    )  # fmt: skip
    return Attack([request(spelled(prompt=rng.choice(prompts)))], {400})


def unknown_field(rng: random.Random) -> Attack:
    names = ("promt", "messages", "__proto__", "constructor", "", "\u202e", "a" * 5000, "temperature ", "N")
    return Attack([request(spelled(**{rng.choice(names): rng.choice(WRONG)}))], {400})


def too_many(rng: random.Random) -> Attack:
    wanted = (
        {"n": 128, "prompt": ["a"] * 100},
        {"n": 129},
        {"best_of": 10**9},
        {"n": 2, "best_of": 1},
        {"max_tokens": 10**6},
    )
    return Attack([request(spelled(**rng.choice(wanted)))], {400})


def markup(rng: random.Random) -> Attack:
    text, stream = rng.choice(MARKUP), rng.random() < 0.5
    return Attack([request(spelled(prompt=text, echo=True, stream=stream, user=text, stop=["<", "\n\n"]))], {200})


def markup_refused(rng: random.Random) -> Attack:
    text = rng.choice(MARKUP)
    fields: tuple[dict[str, Any], ...] = ({"model": text}, {text: 1}, {"suffix": text}, {"stop": [text] * 9})
    return Attack([request(spelled(**rng.choice(fields)))], {400, 404})


# --- bodies ----------------------------------------------------------------------------------------------------------


def deep(rng: random.Random) -> Attack:
    depth, (start, end) = rng.choice((30, 400, 5000, 200_000)), rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return Attack([request(b'{"prompt":' + start * depth + b"1" + end * depth + b"}")], {400, 413})


def not_json(rng: random.Random) -> Attack:
    bodies = (
        b"", b"{", b"nul", b"'a'", b'{"a":1,}', b"[]", b'"a"', b"1", b"\x00", b'{"temperature":NaN}', b'{"n":Infinity}',
        b'{"temperature":1e999}', b'{"n":1,"n":2}', b'{"seed":' + b"9" * 9000 + b"}", b'{"prompt":"\xff"}',
        b'{"prompt":"\xc0\x80"}', b'{"prompt":"\\ud83d"}', b'{"prompt":"\\udc00\\ud800"}', b'{"\\ud800":1}',
        "{}".encode("utf-16"), b"\xef\xbb\xbf{}", b'{"prompt":"a\nb"}', rng.randbytes(999),
        b"{" + b",".join(b'"%d":1' % i for i in range(9999)) + b"}",
        b"{" + b",".join(b'"%d":1' % (i % 9998) for i in range(9999)) + b"}",
    )  # fmt: skip
    return Attack([request(rng.choice(bodies))], {400})


def wrong_kind(rng: random.Random) -> Attack:
    if rng.random() < 0.3:
        return Attack([request(spelled(), "Content-Encoding: gzip")], {415})
    return Attack(
        [request(spelled(), kind=rng.choice(("xml", "x-www-form-urlencoded", "json5", "", "json/../html")))], {415}
    )


def too_large(rng: random.Random) -> Attack:
    return Attack([request(b"{", length=str(rng.choice((2 << 20, 10**9, 10**15)))), b" " * 4096], {413})


def too_large_in_chunks(rng: random.Random) -> Attack:
    body = chunks(b" " * rng.choice((1 << 20, 3 << 20)) + b"{}", rng.choice((4096, 60_000)))
    return Attack([request(body, "Transfer-Encoding: chunked")], {413})


def too_large_expected(rng: random.Random) -> Attack:
    return Attack([request(b"", "Expect: 100-continue", length=str(10**8))], {413})


def wrong_length(rng: random.Random) -> Attack:
    lengths = ("-1", "+5", "0x10", "1e3", "five", "5, 6", " ", "5 5", "9" * 400)
    return Attack([request(spelled(), length=rng.choice(lengths))], {400})


def wrong_chunks(rng: random.Random) -> Attack:
    bodies = (
        b"fffffffffffffffffffff\r\n", b"-1\r\n", b"zz\r\n", b"5\r\nabcdefgh\r\n", b"5;" + b"x" * 99_999, b"\r\n",
        b"2\r\n{}X\r\n",
    )  # fmt: skip
    return Attack([request(rng.choice(bodies), "Transfer-Encoding: chunked")], {400, 431})


def smuggling(rng: random.Random) -> Attack:
    lines = (
        ("Transfer-Encoding: chunked", "Content-Length: 5"), ("Transfer-Encoding: identity",),
        ("Transfer-Encoding: xchunked",), ("Transfer-Encoding: chunked, identity",), ("Transfer-Encoding : chunked",),
        ("Content-Length: 3", "Content-Length: 4"), ("Transfer-Encoding:\x0bchunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    )  # fmt: skip
    return Attack([request(b"0\r\n\r\n" + request(method="GET", path="/health"), *rng.choice(lines))], {400, 501})


# --- heads -----------------------------------------------------------------------------------------------------------


def wrong_head(rng: random.Random) -> Attack:
    heads = (
        b"GET /\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500), b"\r\r\n\n \r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"G\x00T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n",
        rng.randbytes(300) + b"\r\n\r\n",
    )  # fmt: skip
    return Attack([rng.choice(heads)], {400, 505, NOTHING}, ending="ends")


def many_headers(rng: random.Random) -> Attack:
    lines = [f"X-{i}: {'y' * rng.choice((1, 50))}" for i in range(rng.choice((500, 5000, 50_000)))]
    return Attack([request(spelled(), *lines)], {200, 431})  # what comes in one piece is read in one


def long_address(rng: random.Random) -> Attack:
    paths = ("/" + "a" * 300_000, "/?" + "b=1&" * 9000, "/v1/models/" + "%41" * 5000)
    return Attack([request(method="GET", path=rng.choice(paths))], {200, 404, 431})


def strange_address(rng: random.Random) -> Attack:
    paths = (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/..%2f..%2fapi.py", "/%00", "//evil.example/",
        "/%0d%0aSet-Cookie:%20a=b", "/v1/models/%3Cscript%3E", "/v1/../v1/models2", "/page.js/", "/%ff%fe", "/api.py",
        "http://evil.example/x", "/.git/config", "/index.html/../x",
    )  # fmt: skip
    return Attack([request(method="GET", path=rng.choice(paths))], {404}, lacks=("Set-Cookie", "evil"))


def wrong_method(rng: random.Random) -> Attack:
    methods = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get")
    return Attack([request(method=rng.choice(methods))], {405})


def other_host(rng: random.Random) -> Attack:
    hosts = (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "[::2]",
        "0.0.0.0",
    )
    path = rng.choice(("/", "/v1/models", PATH, "/metrics", "/health"))
    return Attack([request(spelled(), f"Host: {rng.choice(hosts)}", path=path)], {403})


def other_origin(rng: random.Random) -> Attack:
    origins = ("https://evil.example", "null", "http://localhost.evil.example", "file://", "http://127.0.0.1:1")
    return Attack([request(spelled(), f"Origin: {rng.choice(origins)}")], {403})


def upgrade(rng: random.Random) -> Attack:
    web = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    way = rng.choice((web, ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")))
    return Attack([request(b"", *way, method="GET", path=rng.choice(("/", "/ws")))], {200, 404})


def old(rng: random.Random) -> Attack:
    heads = (b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n")
    return Attack([rng.choice(heads)], {200, 403})


# --- connections -----------------------------------------------------------------------------------------------------


def pipelined(rng: random.Random) -> Attack:
    count = rng.randrange(2, 30)
    each = rng.choice((request(method="GET", path="/health"), request(spelled(n=0)), request(spelled(max_tokens=1))))
    return Attack([each * count], {200, 400}, count, later={200, 400})


def pipelined_with_garbage(rng: random.Random) -> Attack:
    return Attack([request(method="GET", path="/health") + b"\x00\x01 garbage\r\n\r\n"], {200}, 2, later={400})


def half(rng: random.Random) -> Attack:
    whole = request(spelled(max_tokens=50))
    return Attack([whole[: rng.randrange(1, len(whole) - 1)]], {NOTHING}, ending="ends")


def half_closed(rng: random.Random) -> Attack:
    return Attack([request(spelled(max_tokens=50, stream=rng.random() < 0.5))], {NOTHING, 200}, ending="ends")


def leaves(rng: random.Random) -> Attack:
    whole = request(spelled(max_tokens=200, n=4, stream=rng.random() < 0.5))
    return Attack([whole], {NOTHING}, ending=rng.choice(("leaves", "resets")))


KINDS: tuple[Kind, ...] = (
    wrong_value, wrong_prompt, unknown_field, too_many, markup, markup_refused, deep, not_json, wrong_kind, too_large,
    too_large_in_chunks, too_large_expected, wrong_length, wrong_chunks, smuggling, wrong_head, many_headers,
    long_address, strange_address, wrong_method, other_host, other_origin, upgrade, old, pipelined,
    pipelined_with_garbage, half, half_closed, leaves,
)  # fmt: skip
