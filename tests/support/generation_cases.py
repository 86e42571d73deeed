"""Random models, prompts and options for generation, and what the NumPy loop on the oracle makes of them."""

import functools
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.generation import rules
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Row
from gpt2_multi.generation.reference import generate
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.engine.bpe import byte_characters, spell
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support import fixtures
from tests.support.effort import some

MODELS = some(3, 2)
OPTION_SETS = some(102, 34)  # of each model
STOPS = (["\u00e9", "on", "3", "#"], "e", ["a", "th"])
VOCAB = 300
POSITIONS = 40


class Case(NamedTuple):
    """A prompt batch and options."""

    ids: Any  # (B, T)
    mask: Any
    options: dict[str, Any]


class RowsCase(NamedTuple):
    """Logits of rows that each have their own options, and what these make of them; padded on the left."""

    rows: list[Row]
    logits: Any  # (R, V) float64
    ids: Any  # (R, S) int32
    mask: Any  # (R, S) bool, which of the first `length` count
    length: int
    made: Any  # (R, 1) int32, how many of those were made
    processed: Any  # (R, V)
    chosen: Any  # (R,)


class Job(NamedTuple):
    """A prompt among others that come and go."""

    prompt: list[int]
    row: Row
    new: int  # how many tokens are to follow


@functools.cache
def tokenizer() -> GPT2Tokenizer:
    """All bytes, some pairs of letters, and an end token."""
    rng = random.Random(0)
    letters = "etaoinshrdlu "
    pairs = sorted({(spell(a.encode()), spell(b.encode())) for a, b in (rng.choices(letters, k=2) for _ in range(40))})
    tokens = [*byte_characters(), *(a + b for a, b in pairs), "<|endoftext|>"]
    return GPT2Tokenizer({token: i for i, token in enumerate(tokens)}, pairs)


def write(folder: Path, seed: int) -> GPT2Config:
    """A model folder."""
    rng = random.Random(seed)
    heads = rng.choice([2, 3])
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=heads * rng.choice([4, 8]), n_layer=2, n_head=heads,
        activation_function=rng.choice(["gelu_new", "relu"]), tie_word_embeddings=rng.random() < 0.7,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.5, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    fixtures.write_model(folder, config, "lm", seed)
    return config


def draw(seed: int) -> Case:
    """A prompt batch of some rows, padded on either side, and options; what makes shapes is the same for a model."""
    rng, model = random.Random(seed), seed // OPTION_SETS % MODELS
    mode = rng.choice(["greedy", "sample", "sample", "beams", "beam_sample", "lookup", "slide"])
    rows, width, several = [(3, 2, 2), (1, 3, 2), (2, 4, 1)][model]
    options = common(rng, STOPS[model])
    if mode in ("sample", "beam_sample") or (mode == "slide" and rng.random() < 0.5):
        options |= {"do_sample": True, **sampling(rng, rows)}
    if mode in ("beams", "beam_sample"):
        options |= {"num_beams": width, "length_penalty": rng.choice([-1.0, 0.0, 0.8, 1.0, 2.0])}
        options |= {"early_stopping": rng.choice([False, True, "never"])}
    if options.get("num_beams") or mode == "sample":
        options["num_return_sequences"] = several
    if mode == "lookup":
        options |= {"prompt_lookup_num_tokens": width, "max_matching_ngram_size": rng.choice([1, 2, 3])}
    if mode == "slide":
        options |= {"sliding_window": True, "max_new_tokens": 40}
    return Case(*prompts(rng, rows, 60 if mode == "slide" else 14), options)


def prompts(rng: random.Random, rows: int, longest: int) -> tuple[Any, Any]:
    """Ids and a mask that hides some on either side; words are repeated, so that there is something to look up."""
    words = [rng.randrange(VOCAB) for _ in range(8)]
    ids = np.array([[rng.choice(words) for _ in range(longest)] for _ in range(rows)])
    mask = np.ones_like(ids)
    for row in range(rows):
        hidden = rng.randrange(longest - 2)
        left = rng.choice([0, hidden])
        mask[row, :left] = 0
        mask[row, longest - (hidden - left) :] = 0
    return ids, mask


def common(rng: random.Random, stops: Any) -> dict[str, Any]:
    """Options that every way of choosing has."""
    few = functools.partial(rng.sample, range(VOCAB))
    every: dict[str, Any] = {
        "repetition_penalty": rng.choice([0.8, 1.3, 3.0]),
        "no_repeat_ngram_size": rng.choice([1, 2, 3]),
        "bad_words_ids": [[t] for t in few(40)] + [few(2) for _ in range(40)],
        "logit_bias": {t: rng.choice([-3.0, 5.0, -float("inf")]) for t in few(20)},
        "min_new_tokens": rng.choice([2, 6]),
        "min_length": rng.choice([5, 12]),
        "stop_strings": stops,
    }
    options = {name: value for name, value in every.items() if rng.random() < 0.3}
    ends = rng.choice([None, 1, few(20)])
    return options | {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": rng.choice([None, 7])}


def sampling(rng: random.Random, rows: int) -> dict[str, Any]:
    """Options that only sampling has."""
    every = {
        "temperature": rng.choice([0.5, 0.9, 2.0]),
        "top_p": rng.choice([0.3, 0.8, 0.95]),
        "min_p": rng.choice([0.01, 0.1, 0.5]),
        "seed": rng.choice([rng.getrandbits(64), [rng.getrandbits(64) for _ in range(rows)]]),
    }
    return {name: value for name, value in every.items() if rng.random() < 0.5} | {"top_k": rng.choice([0, 1, 5, 50])}


def row(rng: random.Random, vocab_size: int) -> Row:
    """Options of one row among others, of which it has about a third."""
    every: dict[str, Any] = {
        "temperature": rng.choice([0.5, 1.0, 2.0]), "top_k": rng.choice([1, 5, 100]), "top_p": rng.choice([0.3, 0.9]),
        "min_p": rng.choice([0.01, 0.3]), "typical_p": rng.choice([0.3, 0.9]),
        "repetition_penalty": rng.choice([0.8, 1.3]), "no_repeat_ngram_size": rng.choice([1, 2, 3]),
        "min_length": rng.choice([5, 12]), "min_new_tokens": rng.choice([2, 6]), "do_sample": True,
        "logit_bias": {rng.randrange(vocab_size): 2.0, (3, 4): -3.0, (1,): -float("inf")},
    }  # fmt: skip
    options = {name: value for name, value in every.items() if rng.random() < 0.4}
    ends = rng.sample(range(vocab_size), rng.choice([0, 1, 3])) or None
    config = GenerationConfig(**{"top_k": 0, "eos_token_id": ends, **options})
    bias = {rng.randrange(vocab_size): rng.choice([-100.0, 2.0]) for _ in range(rng.choice([0, 0, 3]))}
    return Row(config, rng.getrandbits(64), bias, rng.choice([0.0, 0.5, -1.0]), rng.choice([0.0, 0.0, 0.7]))


def rows_case(seed: int, count: int = 5, vocab_size: int = 160, length: int = 11, room: int = 14) -> RowsCase:
    """Rows with options of their own, and what the specification makes of each alone."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    rows = [row(rng, vocab_size) for _ in range(count)]
    logits = np.round(numbers.normal(0, 3, (count, vocab_size)), 1)  # rounded, so that there are ties and zeros
    ids = numbers.integers(0, 6, (count, room)).astype(np.int32)
    mask = np.arange(room) >= numbers.integers(0, length - 1, (count, 1))
    mask[:, length:] = False
    made = np.minimum(numbers.integers(0, 7, (count, 1)), mask.sum(-1, keepdims=True)).astype(np.int32)
    texts = [each[:length][keep[:length]] for each, keep in zip(ids, mask, strict=True)]
    found = [alone(*given) for given in zip(rows, logits, texts, made[:, 0].tolist(), strict=True)]
    return RowsCase(rows, logits, ids, mask, length, made, *map(np.stack, zip(*found, strict=True)))


def alone(row: Row, logits: Any, ids: Any, made: int) -> tuple[Any, Any]:
    """What a row's options make of logits (V,) after its ids (T,), of which the last were made; and its token."""
    logits = rules.discourage(logits, ids[len(ids) - made :], row.presence, row.frequency)
    logits = rules.add_biases(logits, ids, [((token,), bias) for token, bias in row.bias.items()])
    logits = rules.process(logits, ids, made, row.config)
    noise = rules.gumbel(row.stream, 0, made, np.arange(len(logits))) if row.config.do_sample else 0
    return logits, np.argmax(logits + noise)


def jobs(seed: int, count: int, vocab_size: int, positions: int) -> list[Job]:
    """Prompts, of which some are alike, with their rows, and how many tokens follow, up to the whole context."""
    rng = random.Random(seed)
    first, made = [rng.randrange(vocab_size) for _ in range(positions)], []
    for _ in range(count):
        length = rng.choice([1, 2, 5, 20, positions - 1])
        prompt = first[:length] if rng.random() < 0.4 else [rng.randrange(vocab_size) for _ in range(length)]
        own = row(rng, vocab_size)
        made.append(Job(prompt, Row(own.config, own.stream, own.bias), rng.randint(1, positions - length)))
    return made


def served(slots: Any, given: list[Job], seed: int) -> list[list[int]]:
    """The new tokens of each job, which come and go at random in `Slots`."""
    rng, waiting, there = random.Random(seed), list(enumerate(given)), {}
    made: list[list[int]] = [[] for _ in given]
    while waiting or there:
        while waiting and slots.free and rng.random() < 0.6:
            number, job = waiting.pop(0)
            there[slots.join(job.prompt, job.row)] = number
        step = slots.step()
        for slot, token in zip(step.slots, step.tokens.tolist(), strict=True):
            job, text = given[there[slot]], made[there[slot]]
            text.append(token)
            if len(text) == job.new or token in job.row.config.eos_token_ids:
                slots.leave(slot)
                del there[slot]
    return made


def options_of(job: Job) -> GenerationConfig:
    """The options of a job that is alone, for `generate`."""
    config, biases = job.row.config, [([token], bias) for token, bias in job.row.bias.items()]
    biases += [(list(phrase), bias) for phrase, bias in config.biases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of greedy rows with a temperature
        return config.with_options({"max_new_tokens": job.new, "seed": job.row.stream, "logit_bias": biases})


def made_alone(model: GPT2Config, arrays: Any, job: Job) -> list[int]:
    """The new tokens of a job that is alone, by the specification."""
    config, stops = options_of(job), np.zeros((1, model.vocab_size), np.int32)
    return generate(model, arrays, job.prompt, config, job.row.stream, stops)[0]


@functools.cache
def weights(folder: Path) -> Any:
    """The oracle's weights, in float64."""
    return fixtures.read_weights(folder, GPT2Config.from_json_file(folder / "config.json"), "lm")


@functools.cache
def expected(folder: Path, seed: int) -> Any:
    """The new tokens of each text (B * n, N), filled up, by the loop in NumPy."""
    case, model = draw(seed), GPT2Config.from_json_file(folder / "config.json")
    config = GenerationConfig.of(model).with_options(case.options)
    table = stop_table(config.stops, tokenizer(), VOCAB)
    noise = noise_streams(config.seed or 0, len(case.ids), config.rows)
    rows = [
        made
        for row, (ids, mask) in enumerate(zip(case.ids, case.mask, strict=True))
        for made in generate(model, weights(folder), ids[mask != 0].tolist(), config, noise[row * config.rows], table)
    ]
    width = max(map(len, rows))
    return np.array([row + [config.fill_token_id] * (width - len(row)) for row in rows])
