"""OpenAI's API: what is answered, byte by byte where that matters, what is refused, how a server ends."""

import http.client
import json
import math
import socket
import threading
import time
from statistics import mean

import pytest

httpx = pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")

from gpt2_multi.app.serve.engine import Done, Piece, Token
from gpt2_multi.app.serve.protocol import CHECKS, Fields
from gpt2_multi.files.hub import DEMO
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.app.serve.conftest import Puppet, running, served

CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
TOKENIZER = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
PATH = "/v1/completions"
PROMPT = "ROMEO:"


def ask(server, headers=None, **fields):
    return CLIENT.post(server.url + PATH, json=fields, headers=headers, timeout=60)


def good(server, **fields):
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts(server, **fields):
    return [choice["text"] for choice in good(server, **fields)["choices"]]


def error(response, status):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert response.headers["x-content-type-options"] == "nosniff"
    return found


def log_probs(server, ids):
    """Of each id but the first after those before it."""
    import torch

    found = server.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return found[range(len(ids) - 1), ids[1:]].tolist()


def events(response):
    """The objects of a stream, which ends as OpenAI's do."""
    parts = response.content.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# --- what is answered ------------------------------------------------------------------------------------------------


def test_an_answer_has_what_openai_s_has(demo):
    found = good(demo, model="demo", prompt=PROMPT, max_tokens=5, seed=3)
    choice = found["choices"][0]
    assert found["id"].startswith("cmpl-") and found["object"] == "text_completion" and found["model"] == "demo"
    assert found["seed"] == 3 and found["system_fingerprint"] == "fp_1"
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


SAMPLING = [
    {"temperature": 0},
    {"seed": 7},
    {"seed": -1, "temperature": 1.5, "top_p": 0.9},
    {"seed": 2**64 - 1, "top_k": 5},
    {"seed": 1, "min_p": 0.1},
    {"seed": 1, "repetition_penalty": 1.3},
    {"seed": 5, "logit_bias": {"11": 3, "198": -100}},
]


@pytest.mark.parametrize("fields", SAMPLING, ids=str)
def test_a_text_is_that_of_generate(demo, fields):
    options = {"top_k": 0, **fields, "do_sample": True, "seed": fields.get("seed", 0) % 2**64}
    options["logit_bias"] = {int(token): bias for token, bias in fields.get("logit_bias", {}).items()}
    options = {"do_sample": False} if fields.get("temperature") == 0 else options
    expected = demo.model.generate(PROMPT, tokenizer=TOKENIZER, max_new_tokens=12, **options).removeprefix(PROMPT)
    assert texts(demo, prompt=PROMPT, max_tokens=12, **fields) == [expected]


def test_prompts_are_a_text_or_ids_or_lists_of_either(demo):
    rows = [TOKENIZER(text).input_ids for text in (PROMPT, "Hello, my")]
    said = {"max_tokens": 6, "seed": 4}
    one, two = (texts(demo, prompt=given, **said) for given in (PROMPT, [PROMPT, "Hello, my"]))
    assert texts(demo, prompt=rows[0], **said) == one == two[:1]
    assert texts(demo, prompt=rows, **said) == two
    options = {"do_sample": True, "top_k": 0, "seed": 4, "max_new_tokens": 6}
    made = demo.model.generate([PROMPT, "Hello, my"], tokenizer=TOKENIZER, **options)
    assert [PROMPT + two[0], "Hello, my" + two[1]] == made


def test_without_a_prompt_a_text_begins(demo):
    found = good(demo, max_tokens=3)
    assert found["usage"]["prompt_tokens"] == 1
    assert found["seed"] != good(demo, max_tokens=3)["seed"]  # each has its own


def test_no_text_becomes_a_control_token(demo):
    assert good(demo, prompt="<|endoftext|>", max_tokens=0)["usage"]["prompt_tokens"] > 1


def test_n_are_those_of_seeds_that_follow_each_other(demo):
    three = texts(demo, prompt=PROMPT, max_tokens=8, seed=5, n=3)
    assert three == [texts(demo, prompt=PROMPT, max_tokens=8, seed=seed)[0] for seed in (5, 6, 7)]
    assert len({*three}) == 3


def test_the_best_have_the_greatest_mean_log_probability(demo):
    every = good(demo, prompt=[PROMPT, "A"], max_tokens=8, seed=5, n=4, logprobs=0)
    best = good(demo, prompt=[PROMPT, "A"], max_tokens=8, seed=5, n=2, best_of=4)
    expected = []
    for start in (0, 4):
        means = {mean(c["logprobs"]["token_logprobs"]): c["text"] for c in every["choices"][start : start + 4]}
        expected += [means[score] for score in sorted(means, reverse=True)[:2]]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"] == every["usage"]


def test_a_stop_string_ends_a_text_and_is_not_in_it(demo):
    whole = texts(demo, prompt=PROMPT, max_tokens=30, seed=1)[0]
    stop = whole[9:12]
    choice = good(demo, prompt=PROMPT, max_tokens=30, seed=1, stop=["never there", stop])["choices"][0]
    assert choice["text"] == whole[: whole.find(stop)] and choice["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_model(demo):
    found = good(demo, prompt=PROMPT, max_tokens=6, seed=2, temperature=0.7, logprobs=3)["choices"][0]
    logprobs = found["logprobs"]
    ids = TOKENIZER(PROMPT + found["text"]).input_ids
    assert logprobs["tokens"] == [TOKENIZER.decode([token]) for token in ids[2:]]
    assert logprobs["token_logprobs"] == pytest.approx(log_probs(demo, ids)[-6:], abs=1e-4)
    starts = [len(PROMPT + "".join(logprobs["tokens"][:place])) for place in range(6)]
    assert logprobs["text_offset"] == starts  # which OpenAI counts from where the prompt begins
    for token, own, top in zip(*(logprobs[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == own and len(top) in (3, 4)
        assert sorted(top.values(), reverse=True)[:3] == list(top.values())[:3]


def test_an_echo_scores_the_prompt(demo):
    text = "ROMEO: I am here"
    found = good(demo, prompt=text, max_tokens=0, echo=True, logprobs=1)
    choice, logprobs = found["choices"][0], found["choices"][0]["logprobs"]
    assert (choice["text"], choice["finish_reason"], found["usage"]["completion_tokens"]) == (text, "length", 0)
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    assert logprobs["token_logprobs"][1:] == pytest.approx(log_probs(demo, TOKENIZER(text).input_ids), abs=1e-4)
    assert "".join(logprobs["tokens"]) == text and logprobs["text_offset"][0] == 0
    assert texts(demo, prompt=TOKENIZER(text).input_ids, max_tokens=2, seed=1, echo=True)[0].startswith(text)


def test_penalties_lower_what_was_there(demo):
    said = {"prompt": "the the the", "max_tokens": 40, "temperature": 0}
    plain, lower = (texts(demo, **said, presence_penalty=x, frequency_penalty=x)[0] for x in (0, 2))
    assert len({*TOKENIZER(lower).input_ids}) > len({*TOKENIZER(plain).input_ids})


def test_a_stream_is_the_same_text_in_pieces(demo):
    said = {"prompt": [PROMPT, "Hello"], "max_tokens": 7, "seed": 9, "n": 2, "logprobs": 1}
    whole = good(demo, **said)
    response = ask(demo, **said, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, last = events(response)
    assert last["choices"] == [] and last["usage"] == whole["usage"] and last["seed"] == 9
    assert all(part["usage"] is None and part["id"] == last["id"] and len(part["choices"]) == 1 for part in parts)
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        offsets = [x for piece in own if piece["logprobs"] for x in piece["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


def test_a_stream_byte_by_byte(stage, puppet):
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(stage, prompt="a", stream=True, seed=1, max_tokens=2)))
    asking.start()
    puppet.came.acquire()
    puppet.jobs[0].listen(Piece("\u00e9</script>\u2028\U0001f600\n\n", []))
    puppet.jobs[0].listen(Done("stop", 1, 2))
    asking.join()
    head = events(found[0])[0]
    own = f'"id":"{head["id"]}","object":"text_completion","created":{head["created"]},"model":"demo"'
    start = f'data: {{{own},"choices":[{{"index":0,"text":'
    end = ',"system_fingerprint":"fp_1","seed":1}\n\n'
    assert found[0].content.decode() == (
        f'{start}"\u00e9</script>\u2028\U0001f600\\n\\n","logprobs":null,"finish_reason":null}}]{end}'
        f'{start}"","logprobs":null,"finish_reason":"stop"}}]{end}data: [DONE]\n\n'
    )


def test_what_cannot_be_is_a_number_of_json(stage, puppet):
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(stage, prompt="a", logprobs=1)))
    asking.start()
    puppet.came.acquire()
    puppet.jobs[0].listen(Piece("b", [Token(5, "b", -math.inf, [(6, "c", 0.0)], 0)]))
    puppet.jobs[0].listen(Done("stop", 1, 1))
    asking.join()
    assert found[0].json()["choices"][0]["logprobs"]["top_logprobs"] == [{"c": 0.0, "b": -9999.0}]


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG = [
    ({"promt": "a"}, "promt: is no field of this request; did you mean 'prompt'?"),
    ({"prompt": 3}, "prompt: expected a text"),
    ({"prompt": []}, "prompt: expected a text"),
    ({"prompt": ["a", 3]}, "prompt: expected a text"),
    ({"prompt": [[1], []]}, "prompt: expected a text"),
    ({"prompt": [True]}, "prompt: expected a text"),
    ({"prompt": [-1]}, "prompt: expected a text"),
    ({"prompt": [1024]}, "prompt: the id 1024 is outside the vocabulary (0 to 1023)"),
    ({"prompt": ["a"] * 9}, "prompt: 9 completions are more than the 8 that may wait"),
    ({"prompt": ["a"] * 3, "n": 3}, "prompt: 9 completions"),
    ({"max_tokens": -1}, "max_tokens: expected a whole number from 0, found -1"),
    ({"max_tokens": 5.0}, "max_tokens: expected a whole number"),
    ({"max_tokens": True}, "max_tokens: expected a whole number"),
    ({"temperature": 2.1}, "temperature: expected a number from 0 to 2, found 2.1"),
    ({"temperature": "1"}, "temperature: expected a number"),
    ({"top_p": -0.1}, "top_p: expected a number from 0 to 1"),
    ({"n": 0}, "n: expected a whole number from 1 to 128"),
    ({"n": 3, "best_of": 2}, "best_of: expected at least n, which is 3, found 2"),
    ({"best_of": 2, "stream": True}, "best_of: the best are not known before the end"),
    ({"stop": ["a"] * 5}, "stop: expected a text, or a list of up to 4"),
    ({"stop": ""}, "stop: expected a text"),
    ({"stop": ["a" * 1025]}, "stop: expected 1024 bytes in all at most"),
    ({"seed": 2**64}, "seed: expected a whole number from -2**63"),
    ({"seed": 1.5}, "seed: expected a whole number"),
    ({"logprobs": 6}, "logprobs: expected a whole number from 0 to 5"),
    ({"logprobs": True}, "logprobs: expected a whole number"),
    ({"echo": 1}, "echo: expected true or false"),
    ({"logit_bias": {"5": 101}}, "logit_bias: expected an object"),
    ({"logit_bias": {"-5": 1}}, "logit_bias: expected an object"),
    ({"logit_bias": {"05": 1}}, "logit_bias: expected an object"),
    ({"logit_bias": {"1024": 1}}, "logit_bias: expected ids below 1024"),
    ({"presence_penalty": 3}, "presence_penalty: expected a number from -2 to 2"),
    ({"suffix": "b"}, "suffix: GPT-2 only goes on from a prompt"),
    ({"user": 5}, "user: expected a text"),
    ({"stream_options": {"include_usage": True}}, "stream_options: is for streams"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options: expected an object"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options: include_obfuscation"),
    ({"top_k": -1}, "top_k: expected"),
    ({"min_p": 2}, "min_p: expected"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(demo, fields, message):
    found = error(ask(demo, **{"prompt": "a", **fields}), 400)
    assert found["message"].startswith(message) and found["type"] == "invalid_request_error"
    assert found["param"] == message.partition(":")[0]


def test_null_is_not_said_and_a_label_may_be_anything(demo):
    nothing = dict.fromkeys(set(CHECKS) - {"seed", "max_tokens"})
    said, label = {"prompt": "a", "seed": 3, "max_tokens": 2}, {"user": "\u0000 me", "suffix": ""}
    assert texts(demo, **{**nothing, **label, **said}) == texts(demo, **said)


def test_each_field_is_checked_and_has_a_default():
    assert set(CHECKS) == set(Fields.__dataclass_fields__)


def test_what_the_context_cannot_hold_is_refused_as_openai_does(demo):
    found = error(ask(demo, prompt=[5] * 250, max_tokens=7), 400)
    assert found["code"] == "context_length_exceeded" and found["param"] == "prompt"
    assert (
        "maximum context length is 256 tokens, however you requested 257 tokens (250 in the prompt; 7"
        in found["message"]
    )
    assert good(demo, prompt=[5] * 250, max_tokens=6)["usage"]["completion_tokens"] <= 6


BODIES = [
    (b"", "has to be JSON"),
    (b"[]", "has to be a JSON object"),
    (b'{"prompt": "a",}', "has to be JSON"),
    (b'{"temperature": NaN}', "NaN is no number of JSON"),
    (b'{"temperature": -Infinity}', "-Infinity is no number of JSON"),
    (b'{"temperature": 1e999}', "temperature: expected"),
    (b'{"n": 1, "n": 2}', "'n' is there twice"),
    (b'{"logit_bias": {"5": 1, "5": 2}}', "'5' is there twice"),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"\\ud800": 1}', "half of a surrogate pair"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"),
    (b"\xef\xbb\xbf{}", "JSON"),
    (b'{"seed": ' + b"1" * 5000 + b"}", "JSON"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt: expected"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=lambda value: str(value[:30]))
def test_a_body_that_is_not_plain_json_is_refused(demo, body, message):
    response = CLIENT.post(demo.url + PATH, content=body, headers={"content-type": "application/json"})
    assert message in error(response, 400)["message"]


def test_only_json_is_read(demo):
    for headers in (
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": 'application/json; x=utf-8; charset="utf-16"'},
    ):
        error(CLIENT.post(demo.url + PATH, content=b'{"prompt": "a"}', headers=headers), 415)
    good = {"content-type": "Application/JSON; charset=utf-8"}
    assert CLIENT.post(demo.url + PATH, content=b'{"max_tokens": 1}', headers=good, timeout=60).status_code == 200


def test_a_field_in_the_address_is_not_passed_over(demo):
    found = CLIENT.post(f"{demo.url}{PATH}?api-version=1&temperature=0", json={"prompt": "a", "max_tokens": 1})
    assert error(found, 400)["message"] == "temperature: belongs into the body, not into the address"
    assert CLIENT.post(f"{demo.url}{PATH}?api-version=1", json={"max_tokens": 1}, timeout=60).status_code == 200


def test_other_addresses_and_methods_are_refused(demo):
    assert error(CLIENT.get(demo.url + "/v1/engines"), 404)["message"] == "Invalid URL (GET /v1/engines)"
    assert error(CLIENT.get(demo.url + PATH + "/"), 404)["type"] == "invalid_request_error"
    refused = CLIENT.get(demo.url + PATH)
    assert error(refused, 405)["code"] == "method_not_supported" and refused.headers["allow"] == "POST"
    chat = CLIENT.post(demo.url + "/v1/chat/completions", json={"messages": []})
    assert "no chat" in error(chat, 404)["message"]
    assert error(ask(demo, model="gpt-4", prompt="a"), 404)["code"] == "model_not_found"


def test_the_models_are_the_one(demo):
    listed = CLIENT.get(demo.url + "/v1/models").json()
    assert listed == {"object": "list", "data": [CLIENT.get(demo.url + "/v1/models/demo").json()]}
    assert listed["data"][0]["id"] == "demo" and listed["data"][0]["max_model_len"] == 256
    assert error(CLIENT.get(demo.url + "/v1/models/a/b"), 404)["param"] == "model"


def test_the_page_is_served_under_a_strict_policy(demo):
    for path, kind in [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")]:
        response = CLIENT.get(demo.url + path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert response.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in response.headers


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_not_shown(stage):
    with running(served(None), key="sk-\u00a7secret".replace("\u00a7", "")) as server:
        models = server.url + "/v1/models"
        for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "Basic sk-secret"}):
            response = CLIENT.get(models, headers=headers)
            assert error(response, 401)["code"] == "invalid_api_key" and "secret" not in response.text
        assert CLIENT.get(models, headers={"authorization": b"Bearer \xff\xfe"}).status_code == 401
        assert CLIENT.get(server.url + "/metrics").status_code == 401
        anywhere = {"authorization": "Bearer sk-secret", "host": "gpt.example.com"}
        assert CLIENT.get(models, headers=anywhere).status_code == 200
        assert {CLIENT.get(server.url + path).status_code for path in ("/", "/page.js", "/health")} == {200}
        assert not [line for line in server.lines if "secret" in line]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]", "a@127.0.0.1"]
)
def test_a_name_that_leads_here_from_elsewhere_is_refused(demo, host):
    assert error(CLIENT.get(demo.url + "/v1/models", headers={"host": host}), 403)["code"] == "host"


def test_a_page_from_elsewhere_is_refused(demo):
    assert error(ask(demo, headers={"origin": "https://evil.example"}, prompt="a"), 403)["code"] == "origin"
    assert error(ask(demo, headers={"origin": "null"}, prompt="a"), 403)["code"] == "origin"
    own = {"origin": f"http://localhost:{demo.port}", "host": f"localhost:{demo.port}"}
    assert ask(demo, headers=own, prompt="a", max_tokens=1).status_code == 200


# --- many at once, and the end ---------------------------------------------------------------------------------------


def test_a_log_has_no_word_of_a_text(demo):
    demo.begin_lines()
    good(demo, prompt="Wherefore", max_tokens=3, user="Capulet", logit_bias={"1023": -100})
    error(ask(demo, prompt="Wherefore", suffix="Montague"), 400)
    CLIENT.get(demo.url + "/v1/models?Wherefore=Capulet")
    demo.until(lambda: len(demo.lines) == 3)
    assert not [line for line in demo.lines if "Wherefore" in line or "Capulet" in line]
    assert f"POST {PATH} 200" in demo.lines[0] and "+3 tokens" in demo.lines[0] and demo.lines[0].endswith(" ms")


def test_what_is_no_http_is_counted_and_logged_without_a_word_of_it(demo):
    demo.begin_lines()
    counted = demo.service.metrics.requests["other", 400]
    with socket.create_connection(demo.address) as client:
        client.sendall(b"Wherefore art thou\r\n\r\n")
        assert client.recv(99).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert demo.lines[0].endswith(" - 400 this is no request of HTTP/1.1: Bad Request") and len(demo.lines) == 1
    assert demo.service.metrics.requests["other", 400] == counted + 1


def test_no_part_of_an_answer_waits_until_the_client_has_acknowledged_another(demo):
    connection = http.client.HTTPConnection(*demo.address)
    connection.request("GET", "/health")
    connection.getresponse().read()
    sockets = [one.transport.get_extra_info("socket") for one in demo.server.server_state.connections.copy()]
    assert sockets and all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)
    connection.close()


def test_metrics_count_requests_and_tokens(demo):
    def value(name):
        text = CLIENT.get(demo.url + "/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])

    names = ["new_tokens_total", "prompt_tokens_total", "request_seconds_count", "first_token_seconds_count"]
    names.append('requests_total{path="/v1/completions",status="200"}')
    before = [value(f"gpt2_multi_{name}") for name in names]
    good(demo, prompt=PROMPT, max_tokens=5, n=2, seed=1)
    assert [value(f"gpt2_multi_{name}") - old for name, old in zip(names, before, strict=True)] == [10, 2, 1, 1, 1]
    assert value('gpt2_multi_request_seconds_bucket{le="+Inf"}') == value("gpt2_multi_request_seconds_count")


def test_who_finds_no_room_asks_again_and_leaves_nothing_behind(stage, puppet):
    puppet.room = 3
    response = ask(stage, prompt="a", n=4)
    assert error(response, 429) == {
        "message": "too many requests wait; ask again later", "type": "requests", "param": None,
        "code": "rate_limit_exceeded",
    }  # fmt: skip
    assert response.headers["retry-after"] == "1"
    assert puppet.cancelled == puppet.jobs and len(puppet.jobs) == 3 and stage.service.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_is_called_off(stage, puppet, stream):
    body = json.dumps({"prompt": "a", "n": 2, "stream": stream}).encode()
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body)}
    head = "\r\n".join([f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""])
    with socket.create_connection(("127.0.0.1", stage.port)) as client:
        client.sendall(head.encode() + body)
        for _ in range(2):
            puppet.came.acquire()
        puppet.jobs[0].listen(Piece("b", []))
        puppet.jobs[0].listen(Done("stop", 1, 1))
        if stream:
            client.recv(1)
    stage.until(lambda: stage.service.running == 0)
    assert puppet.cancelled[-1] is puppet.jobs[1] and (not stream or puppet.cancelled == puppet.jobs[1:])


@pytest.mark.parametrize(("reason", "status"), [("deadline", 504), ("error", 500), ("cancelled", 503)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_ends_too_early_is_an_error(stage, puppet, reason, status, stream):
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(stage, prompt="a", n=2, stream=stream)))
    asking.start()
    puppet.came.acquire()
    puppet.came.acquire()
    puppet.jobs[0].listen(Piece("b", []))
    puppet.jobs[1].listen(Done(reason, 1, 0))
    asking.join()
    if stream:
        *_, last, end = found[0].text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error" and end == ""
    else:
        assert error(found[0], status)["type"] == "server_error"
        assert found[0].headers["x-should-retry"] == "false"
    stage.until(lambda: puppet.jobs[0] in puppet.cancelled)


def test_each_request_has_a_deadline(stage, puppet):
    with pytest.raises(httpx.ReadTimeout):
        CLIENT.post(stage.url + PATH, json={"prompt": "a"}, timeout=0.5)
    assert time.monotonic() + 30 < puppet.jobs[0].deadline < time.monotonic() + 60


def test_a_server_that_loads_or_ends_says_so():
    with running() as server:
        health = CLIENT.get(server.url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert "loading" in error(ask(server, prompt="a"), 503)["message"]
        puppet = Puppet()
        server.service.ready(served(puppet))
        assert CLIENT.get(server.url + "/health").json() == {"status": "ok"}
        found = []
        asking = threading.Thread(target=lambda: found.append(ask(server, prompt="a", max_tokens=1)))
        asking.start()
        puppet.came.acquire()
        server.server.handle_exit(15, None)
        refused = ask(server, prompt="a")
        assert "draining" in error(refused, 503)["message"] and refused.headers["retry-after"] == "1"
        assert CLIENT.get(server.url + "/health").status_code == 503
        puppet.jobs[0].listen(Piece("b", []))
        puppet.jobs[0].listen(Done("length", 1, 1))
        asking.join()
        assert found[0].json()["choices"][0]["text"] == "b"
        server.thread.join(60)
        assert not server.thread.is_alive()
