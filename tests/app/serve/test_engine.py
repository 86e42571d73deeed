"""The engine: what a text is, and when it ends, whoever else is there and whatever goes wrong."""

import random
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2_multi.app import backends
from gpt2_multi.app.serve import engine as engines
from gpt2_multi.app.serve.engine import Done, Engine, Full, Job, Piece
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import PromptScore, Step
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

TOKENIZER = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
END = 1023


class Scripted:
    """Slots whose rows say, after their prompt, what their text is by bytes; a step waits for `turns`."""

    def __init__(self, count):
        self.rows, self.count, self.names, self.turns = {}, count, 0, None
        self.is_broken = False

    @property
    def free(self):
        return self.count - len(self.rows)

    def join(self, ids, row):
        self.names += 1
        self.rows[self.names] = [*SAID[tuple(ids)]], row
        return self.names

    def leave(self, slot):
        del self.rows[slot]

    def step(self):
        if self.turns is not None:
            self.turns.acquire()
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("out of memory")
        tokens = np.array([said.pop(0) if said else 0 for said, _ in self.rows.values()], np.int64)
        likeliest = np.tile([5, 6, 7], (len(tokens), 1))
        return Step(list(self.rows), tokens, -tokens.astype(np.float32), likeliest, -likeliest.astype(np.float32))

    def score(self, ids, top):
        log_probs = -np.array(ids[1:], np.float32)
        likeliest = np.tile(np.arange(top), (len(log_probs), 1))
        return PromptScore(log_probs, likeliest, -likeliest.astype(np.float32))


SAID: dict = {}


class Heard(list):
    """What a job says."""

    def __init__(self):
        super().__init__()
        self.is_over = threading.Event()

    def __call__(self, event):
        self.append(event)
        if isinstance(event, Done):
            self.is_over.set()

    def wait(self):
        assert self.is_over.wait(60)
        assert sum(isinstance(event, Done) for event in self) == 1 and isinstance(self[-1], Done)
        return self

    @property
    def pieces(self):
        return [event.text for event in self.wait() if isinstance(event, Piece)]

    @property
    def text(self):
        return "".join(self.pieces)

    @property
    def tokens(self):
        return [token for event in self.wait() if isinstance(event, Piece) for token in event.tokens]

    @property
    def reason(self):
        return self.wait()[-1].reason


@pytest.fixture
def scripted(monkeypatch):
    """An engine of scripted rows, and its slots."""
    made = []

    def slots(model, count):
        made.append(Scripted(count))
        return made[-1]

    monkeypatch.setattr(engines.backends, "of", lambda model: SimpleNamespace(slots=slots, threads=nullcontext))
    model = SimpleNamespace(config=GPT2Config(vocab_size=1024, n_positions=256))
    engine = Engine(model, TOKENIZER, slots=2, waiting=3)
    yield engine, made
    engine.stop(drain=False)


def ask(engine, prompt, said=(), new=20, **more):
    """What a job says whose text is given by bytes, or by ids."""
    config = GenerationConfig(max_new_tokens=new, eos_token_id=END, **more.pop("options", {}))
    SAID[tuple(prompt)] = [*(TOKENIZER(said).input_ids if isinstance(said, str) else said)]
    heard = Heard()
    heard.ticket = engine.submit(Job(ids=tuple(prompt), config=config, listen=heard, **more))
    return heard


def byte_ids(text):
    """Ids of which each is one byte."""
    of = {TOKENIZER.decode_bytes([token]): token for token in range(1023)}
    return [of[bytes([byte])] for byte in text.encode()]


def test_a_text_comes_in_whole_characters(scripted):
    engine, _ = scripted
    text = "h\u00e9llo \U0001f600!"
    heard = ask(engine, [1], [*byte_ids(text), END])
    engine.start()
    assert heard.pieces == list(text) and heard[-1] == Done("stop", 1, len(text.encode()) + 1)


def test_a_character_that_is_never_whole_is_one_sign(scripted):
    engine, _ = scripted
    engine.start()
    heard = ask(engine, [1], [*byte_ids("a\u00e9")[:-1], END])
    assert heard.pieces == ["a", "\ufffd"]
    assert ask(engine, [1], byte_ids("\U0001f600"), new=3).text == "\ufffd"


@pytest.mark.parametrize("seed", range(12))
def test_a_text_ends_before_the_first_stop_string(scripted, seed):
    """And a piece waits only while a stop string may begin with it."""
    engine, _ = scripted
    engine.start()
    rng = random.Random(seed)
    said = "".join(rng.choices("ab\u00e9", k=40))
    stops = tuple("".join(rng.choices("ab\u00e9", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 4)))
    heard = ask(engine, [1], [*byte_ids(said), END], new=400, stop=stops[1:], options={"stop_strings": stops[0]})
    whole = next((said[:end] for end in range(len(said) + 1) if said[:end].endswith(stops)), None)
    shown = said if whole is None else whole[: min(whole.find(stop) for stop in stops if stop in whole)]
    assert heard.text == shown and heard.reason == "stop"
    assert heard[-1].new_tokens == (len(said.encode()) + 1 if whole is None else len(whole.encode()))
    begun = [
        end - max(n for n in range(end + 1) if not n or any(stop.startswith(said[end - n : end]) for stop in stops))
        for end in range(1, len(said) + 1 if whole is None else len(whole))
    ]
    given = np.cumsum([len(piece) for piece in heard.pieces]).tolist()
    assert set(given) | {len(shown), 0} == {*begun, len(shown), 0}


def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not(scripted):
    engine, _ = scripted
    engine.start()
    heard = ask(engine, [1], [*byte_ids("xaabaay"), END], stop=("aabb", "ay!"))
    assert heard.pieces == ["x", "aab", "a", "ay"]
    assert ask(engine, [1], byte_ids("xaa"), new=3, stop=("aab",)).pieces == ["x", "aa"]


def test_log_probabilities_come_with_the_text_that_tokens_begin_in(scripted):
    engine, _ = scripted
    engine.start()
    said = byte_ids("a\u00e9bc")
    heard = ask(engine, [1], [*said, *byte_ids("d")], stop=("c",), logprobs=2, options={"top_k": 3})
    assert heard.text == "a\u00e9b"
    assert [(token.text, token.offset) for token in heard.tokens] == [
        ("a", 0), ("bytes:\\xc3", 1), ("bytes:\\xa9", 1), ("b", 2),
    ]  # fmt: skip
    assert [token.id for token in heard.tokens] == said[:4]
    assert [token.log_prob for token in heard.tokens] == [-token.id for token in heard.tokens]
    assert [[(id, p) for id, _, p in token.top] for token in heard.tokens] == [[(5, -5.0), (6, -6.0)]] * 4
    for event in heard:
        assert not isinstance(event, Piece) or event.text or event.tokens


def test_a_prompt_is_echoed_with_what_it_scores(scripted):
    engine, _ = scripted
    engine.start()
    prompt = byte_ids("\u00e9a")
    heard = ask(engine, prompt, byte_ids("b"), new=1, echo=True, logprobs=1, stop=("a",))
    assert heard.text == "\u00e9ab"
    assert [token.log_prob for token in heard.tokens] == [None, -prompt[1], -prompt[2], -byte_ids("b")[0]]
    assert [token.offset for token in heard.tokens] == [0, 0, 1, 2]
    assert [len(token.top) for token in heard.tokens] == [0, 1, 1, 1]
    only = ask(engine, prompt, new=0, echo=True)
    assert (only.text, only.reason, only.tokens) == ("\u00e9a", "length", [])


def test_nothing_is_compiled_between_jobs_that_follow_each_other(scripted, monkeypatch):
    calls, are_warm = [], threading.Event()

    def warm(slots):
        calls.append(len(calls))
        if len(calls) == 3:
            are_warm.set()
        return len(calls) < 3

    monkeypatch.setattr(Scripted, "warm", warm, raising=False)
    monkeypatch.setattr(engines, "PAUSE", 600.0)
    engine, _ = scripted
    engine.start()
    assert are_warm.wait(60)
    for number in range(5):
        assert ask(engine, [number], "abc", new=1).reason == "length"
    engine.stop()
    assert len(calls) == 3


def test_who_writes_gets_a_token_between_two_prompts_that_are_scored(scripted, monkeypatch):
    engine, made = scripted
    before = []  # each score, how many tokens were made
    score = Scripted.score
    monkeypatch.setattr(Scripted, "score", lambda *given: before.append(engine.counts["tokens"]) or score(*given))
    monkeypatch.setattr(engines, "SCORED", 3)
    writer = ask(engine, [1], new=5)
    short, long = ([ask(engine, [5] * length, new=0, echo=True, logprobs=1)] for length in (2, 9))
    engine.most = 9
    more = [ask(engine, [6] * 9, new=0, echo=True, logprobs=1) for _ in range(2)]
    engine.start()
    assert {one.reason for one in [writer, *short, *long, *more]} == {"length"}
    assert before == [0, 0, 1, 2] and made


def test_as_many_wait_as_may(scripted):
    engine, _ = scripted
    heard = [ask(engine, [i]) for i in range(3)]
    with pytest.raises(Full):
        ask(engine, [4])
    assert engine.counts == {"waiting": 3, "running": 0, "tokens": 0}
    engine.start()
    assert [one.reason for one in heard] == ["length"] * 3 and engine.counts["tokens"] == 60
    engine.stop()
    with pytest.raises(Full):
        ask(engine, [5])


def test_who_is_called_off_or_late_goes_running_or_waiting(scripted):
    engine, _ = scripted
    engine.most, engine._slots = 9, (slots := backends.of(None).slots(None, 2))
    slots.turns = threading.Semaphore(0)
    running = [ask(engine, [1]), ask(engine, [2], deadline=time.monotonic() + 0.2)]
    waiting = [ask(engine, [3]), ask(engine, [4], deadline=time.monotonic() - 1), ask(engine, [5], new=3)]
    engine.start()
    running[0].ticket.cancel()
    waiting[0].ticket.cancel()
    time.sleep(0.3)
    slots.turns.release(100)
    assert [one.reason for one in running] == ["cancelled", "deadline"]
    assert [one.reason for one in waiting] == ["cancelled", "deadline", "length"]
    assert not slots.rows


def test_what_fails_is_the_end_of_those_it_concerns_alone(scripted, caplog):
    engine, made = scripted
    engine.start()
    assert ask(engine, [1], "abc", new=2).reason == "length"

    def fails(event):
        raise OSError("nobody listens")

    deaf = engine.submit(Job(ids=(1,), config=GenerationConfig(), listen=fails))
    assert ask(engine, [1], "abc", new=5).reason == "length" and deaf.job.ids == (1,)
    made[0].is_broken = True
    assert ask(engine, [1], new=5).reason == "error"
    assert ask(engine, [1], "abc", new=2).text == TOKENIZER.decode(TOKENIZER("abc").input_ids[:2])
    assert len(made) == 2
    with pytest.raises(InputError, match="num_beams"):
        ask(engine, [1], options={"num_beams": 2})
    with pytest.raises(InputError, match="vocabulary"):
        ask(engine, [1024])


@pytest.mark.parametrize("drain", [True, False])
def test_the_end_waits_for_those_who_are_there_or_calls_them_off(scripted, drain):
    engine, _ = scripted
    heard = [ask(engine, [i], new=50) for i in range(3)]
    if drain:
        engine.start()
        engine.stop()
    else:
        for one in heard:
            one.ticket.cancel()
        engine.start()
        engine.stop(drain=False)
    assert [one.reason for one in heard] == ["length" if drain else "cancelled"] * 3
    assert not engine._thread.is_alive()


@pytest.mark.parametrize("name", ["pt"])
def test_what_a_job_gets_does_not_depend_on_who_else_is_there(name):
    """Options at random, who comes and goes at random; each text is that of `generate` with its seed alone."""
    row = backends.BACKENDS[name]
    pytest.importorskip(row.framework)
    model, rng = row.load(DEMO, "cpu"), random.Random(3)
    engine, heard = Engine(model, TOKENIZER, slots=4).start(), []
    for number in range(10):
        prompt = TOKENIZER(
            " ".join(rng.choices(["The", "cat", "sat", "on", "a", "mat"], k=rng.randint(1, 9)))
        ).input_ids
        options = {"top_k": rng.choice([0, 20]), "temperature": rng.choice([0.7, 1.0]), "top_p": rng.choice([0.8, 1.0])}
        options = {**options, "do_sample": True} if number % 3 else {}
        config = GenerationConfig(max_new_tokens=rng.randint(1, 16), seed=number, eos_token_id=END, **options)
        heard.append((one := Heard(), prompt, config))
        engine.submit(Job(ids=tuple(prompt), config=config, listen=one, row=number % 2))
    for number, (one, prompt, config) in enumerate(heard):
        given = row.to_tensor(model, np.array([prompt]))
        config.seed += number % 2
        ids = row.to_numpy(model.generate(given, generation_config=config, **row.one_text))[0, len(prompt) :].tolist()
        assert one.text == TOKENIZER.decode(ids[: ids.index(END)] if END in ids else ids)
    engine.stop()
