"""What a call of `generate` may bring besides ids, on every backend: each gives what the oracle's plain loop gives."""

import functools
import re

import numpy as np
import pytest

from gpt2_multi import GPT2Config
from gpt2_multi.errors import InputError
from gpt2_multi.model.reference import forward, lm_logits
from gpt2_multi.model.weights import table
from tests.support import adapters, fixtures
from tests.support.plain_loop import WAYS, plain

SMALL = GPT2Config(vocab_size=20, n_positions=40, n_embd=12, n_layer=2, n_head=2, eos_token_id=None, bos_token_id=3)
IDS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [9, 2, 6, 5, 3]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
PROMPTS = [ids[keep == 1].tolist() for ids, keep in zip(IDS, MASK, strict=True)]
GRAPH = {"tf": {"jit_compile": False}}  # XLA would compile for longer than all of it takes
RNG = np.random.default_rng(0)
TABLE = RNG.normal(0, 2, (20, 20))  # what is added to the logits after each id
ALLOWED = RNG.random((20, 20)) < 0.6  # what may follow each id
ENDS = np.arange(20) % 7 == 4  # which ids end a text
NEGATIVE = np.array([[6, 5, 0], [4, 0, 0], [1, 2, 3]]), np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
LED = {"guidance_scale": 1.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of 20 words, a smaller one, and one with two heads."""
    where = tmp_path_factory.mktemp("small")
    for head in ("lm", "double_heads"):
        fixtures.write_model(where / head, SMALL, head)
    fixtures.write_model(where / "assistant", GPT2Config(**{**SMALL.to_dict(), "n_layer": 1}), "lm")
    return where


@pytest.fixture
def name(backend):
    """The backend's name."""
    return backend.__name__


@pytest.fixture
def model(name, folder):
    """The language model on a backend."""
    return load(name, folder / "lm")


@functools.cache
def weights(head="lm"):
    """Its weights."""
    rng = np.random.default_rng(0)
    return {weight.name: fixtures.randomised(weight, rng) for weight in table(SMALL, head)}


def load(name, folder, head="lm"):
    return getattr(adapters, f"{name}_model")(head, folder, "float64")


def logits_of(ids, head="lm", **given):
    """The oracle's logits (V,) after ids."""
    hidden = forward(SMALL, weights(head), np.array([ids]), **given).last_hidden_state[0, -1]
    return lm_logits(SMALL, weights(head), hidden)


def made(model, name, ids=IDS, mask=MASK, **given):
    """The new tokens, in NumPy."""
    tensors = {key: adapters.tensor(name, x) if isinstance(x, np.ndarray) else x for key, x in given.items()}
    rows = [None if x is None else adapters.tensor(name, x) for x in (ids, mask)]
    found = model.generate(*rows, **{"max_new_tokens": 6, **tensors, **GRAPH.get(name, {})})
    return np.asarray(getattr(found, "sequences", found))[:, 0 if ids is None else ids.shape[1] :]


def functions(name):
    """Functions on the backend's tensors, and what they are in NumPy."""
    added, allowed, over = (adapters.by_last(name, table) for table in (TABLE, ALLOWED, ENDS))

    def words(prompt, ids, *length):
        found = allowed(ids, *length, shift=3 * prompt)
        return found.nonzero()[:, 0].tolist() if name == "pt" else found

    return {
        "logits_processor": [
            lambda ids, logits, *length: logits + added(ids, *length),
            lambda ids, x, *length: x * 0.5,
        ],
        "prefix_allowed_tokens_fn": words,
        "stopping_criteria": [lambda ids, scores, *length: over(ids, *length)],
    }


def own(prompt, ids, logits):
    """The same rules in NumPy."""
    allowed = ALLOWED[(ids[-1] + 3 * prompt) % 20]
    return (np.where(allowed, logits, -np.inf) + TABLE[ids[-1]]) * 0.5


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
def test_functions_of_the_caller_and_guidance_act_in_their_place(model, name, way):
    """After our own rules and before those of samples; what is over by a criterion is filled."""
    options = {**WAYS[way], "repetition_penalty": 1.3, **LED}
    found = made(model, name, **functions(name), **options)
    last = [prompt[-1:] for prompt in PROMPTS]
    expected = plain(logits_of, SMALL, PROMPTS, own, lambda ids: ENDS[ids[-1]], last, **options)
    assert found.tolist() == expected.tolist() and len({len(np.trim_zeros(row)) for row in found}) > 1


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"do_sample": True, "typical_p": 0.4, "seed": 7, "top_k": 0}],
    ids=["beams", "typical"],
)
def test_a_prompt_of_its_own_is_what_guidance_leads_away_from(model, name, options):
    negative = [ids[keep == 1].tolist() for ids, keep in zip(*NEGATIVE, strict=True)]
    given = {"negative_prompt_ids": NEGATIVE[0], "negative_prompt_attention_mask": NEGATIVE[1]}
    expected = plain(logits_of, SMALL, PROMPTS, apart=negative, **options, **LED)
    assert made(model, name, **given, **options, **LED).tolist() == expected.tolist()


def test_a_grammar_as_a_processor_gives_texts_of_its_language(model, name):
    """[digit(,digit)*] as an automaton, which is in the state that its last token leads to."""
    spelling = dict(enumerate("0123456789[],"))
    after = {"[": "0123456789", ",": "0123456789", "]": "]", "start": "["} | dict.fromkeys("0123456789", ",]")
    table = np.full((20, 20), -np.inf)
    for token in range(20):
        table[token, [t for t, c in spelling.items() if c in after[spelling.get(token, "start")]]] = 0
    moves = adapters.by_last(name, table)
    ids = np.full((2, 3), 15)
    for options in ({}, {"do_sample": True, "seed": 3}):
        found = made(model, name, ids, None, logits_processor=lambda ids, x, *n: x + moves(ids, *n), **options)
        for row in found:
            assert re.fullmatch(r"\[\d(,\d)*(,|\]*)", "".join(spelling[token] for token in row.tolist()))


def test_embeddings_stand_for_ids(model, name):
    embeds, free = weights()["wte.weight"][IDS], made(model, name)
    assert made(model, name, None, inputs_embeds=embeds).tolist() == free.tolist()
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 2}
    assert made(model, name, inputs_embeds=embeds, **options).tolist() == made(model, name, **options).tolist()
    alone = plain(lambda made: logits_of([9, 2, 6, 5, *made]), SMALL, [[]], repetition_penalty=1.5)
    found = made(model, name, None, MASK[2:], inputs_embeds=embeds[2:], repetition_penalty=1.5)
    assert found.tolist() == alone.tolist()  # no id of the prompt is known


def test_a_new_token_has_the_type_of_the_last(model, name):
    types = np.array([[6, 6, 7, 7, 7], [0, 0, 6, 6, 7], [6, 7, 6, 6, 9]])
    expected = []
    for prompt, kinds, keep in zip(PROMPTS, types, MASK, strict=True):
        kinds = kinds[keep == 1].tolist()

        def typed(ids, kinds=kinds):
            whole = kinds + kinds[-1:] * (len(ids) - len(kinds))
            return logits_of(ids, token_type_ids=np.array([whole]))

        expected += plain(typed, SMALL, [prompt], num_beams=2).tolist()
    assert made(model, name, token_type_ids=types, num_beams=2).tolist() == expected


@pytest.mark.parametrize("mask", [MASK, np.array([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])], ids=["right", "left"])
def test_a_cache_goes_on_without_reading_the_text_again(model, name, mask):
    rows = [adapters.tensor(name, x) for x in (IDS, mask)]
    first = model.generate(*rows, max_new_tokens=4, return_dict_in_generate=True, **GRAPH.get(name, {}))
    said = np.concatenate([np.asarray(first.sequences), IDS[:, 2:4]], 1)
    liked = {int(said[2, 5]): 50.0}  # what followed the 5 that each last row ends with, over the padding between them
    keep = np.concatenate([mask, np.ones((3, 6), int)], 1)
    for options in (
        {"no_repeat_ngram_size": 2, "logit_bias": liked},
        {"do_sample": True, "seed": 2, "num_return_sequences": 2},
    ):
        expected = made(model, name, said, keep, **options)
        found = made(model, name, said, keep, past_key_values=first.past_key_values, **options)
        assert found.tolist() == expected.tolist()
    with pytest.raises(
        InputError, match="past_key_values: holds 8 tokens, and input_ids, which are the whole text, only"
    ):
        made(model, name, said[:, :8], keep[:, :8], past_key_values=first.past_key_values)


def test_no_input_begins_a_text(model, name):
    expected = plain(logits_of, SMALL, [[3]]).tolist()
    assert made(model, name, None, None).tolist() == [[3, *expected[0]]]
    given = {"inputs": adapters.tensor(name, IDS[:1]), "max_new_tokens": 3}
    assert np.asarray(model.generate(**given))[:, 5:].tolist() == plain(logits_of, SMALL, PROMPTS[:1])[:, :3].tolist()
    with pytest.raises(InputError, match="inputs: is another name of input_ids"):
        model.generate(given["inputs"], **given)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(np.asarray(value).tolist())

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_the_prompts_and_then_each_token(model, name):
    recorder = Recorder()
    found = made(model, name, streamer=recorder)
    assert recorder.got == [IDS.tolist(), *found.T.tolist(), "end"]
    recorder.got.clear()
    made(model, name, IDS[:1], None, streamer=recorder, do_sample=True, num_return_sequences=2)
    assert [len(column) for column in recorder.got[:-1]] == [2] * 7  # which a streamer of one text can refuse
    with pytest.raises(InputError, match="streamer: beams are not known before the end"):
        made(model, name, streamer=recorder, num_beams=2)
    with pytest.raises(InputError, match="streamer: 3 texts are made one after the other here"):
        made(model, name, streamer=recorder, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "num_return_sequences": 2}], ids=["one", "two"])
def test_the_inside_of_each_step_is_what_the_whole_text_has(model, name, options):
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    rows = [adapters.tensor(name, x) for x in (IDS, MASK)]
    found = model.generate(*rows, max_new_tokens=4, **wanted, **options, **GRAPH.get(name, {}))
    several = options.get("num_return_sequences", 1)
    mask = np.concatenate([MASK.repeat(several, 0), np.ones((3 * several, 4), int)], 1)
    traced = forward(SMALL, weights(), np.asarray(found.sequences), attention_mask=mask)
    for step in range(4):
        read = slice(0, 5) if step == 0 else slice(4 + step, 5 + step)
        seen = mask[:, read] == 1
        for layer, expected in zip(found.hidden_states[step], traced.hidden_states, strict=True):
            np.testing.assert_allclose(np.asarray(layer)[seen], expected[:, read][seen], atol=1e-9)
        for layer, expected in zip(found.attentions[step], traced.attentions, strict=True):
            assert layer.shape == (3 * several, 2, read.stop - read.start, 5 + step)
            attended = np.asarray(layer).transpose(0, 2, 1, 3)[seen]
            np.testing.assert_allclose(
                attended, expected[:, :, read, : 5 + step].transpose(0, 2, 1, 3)[seen], atol=1e-9
            )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_time_ends_a_text_after_a_token_at_least(model, name, options):
    whole = made(model, name, max_new_tokens=32, **options)
    found = made(model, name, max_new_tokens=32, max_time=0.0, **options)
    assert 1 <= found.shape[1] < 32
    assert made(model, name, max_new_tokens=32, max_time=600.0, **options).tolist() == whole.tolist()


def test_an_assistant_changes_no_token(model, name, folder):
    added = adapters.by_last(name, TABLE)
    rule = lambda ids, logits, *length: logits + added(ids, *length)  # noqa: E731 - compiled once for both ways
    helper = load(name, folder / "assistant")
    for way in ("greedy", "sampled"):
        options = {**WAYS[way], "max_new_tokens": 12, "no_repeat_ngram_size": 3, "logits_processor": rule}
        found = made(model, name, assistant_model=helper, num_assistant_tokens=3, **options)
        assert found.tolist() == made(model, name, **options).tolist(), way
    with pytest.raises(InputError, match="assistant_model: cannot be used with num_beams"):
        made(model, name, assistant_model=helper, num_beams=2)
    with pytest.raises(InputError, match="assistant_model: expected a model that generates, found str"):
        made(model, name, assistant_model="gpt2")


def test_double_heads_go_on_by_their_language_model(name, folder):
    model = load(name, folder / "double_heads", "double_heads")
    expected = plain(functools.partial(logits_of, head="double_heads"), SMALL, PROMPTS, num_beams=2)
    assert made(model, name, num_beams=2).tolist() == expected.tolist()
