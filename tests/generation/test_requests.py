"""What a call of `generate` may bring, in NumPy: prompts of every kind, and functions of the caller's own."""

import threading

import numpy as np
import pytest

import gpt2_multi
from gpt2_multi.errors import InputError
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import Request
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.inputs import Facts
from gpt2_multi.model.outputs import GenerateOutput

MODEL = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=7, eos_token_id=None)
IDS = np.array([[0, 0, 11, 12, 13], [0, 21, 22, 0, 0], [0, 31, 32, 33, 0]])
MASK = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])


def request(ids=IDS, mask=MASK, callbacks=None, config=None, model=MODEL, **more):
    config = GenerationConfig.of(model).with_options({"max_new_tokens": 3, **(config or {})})
    return Request.of(config, model, ids, mask, None, callbacks or Callbacks(), **more)


def test_types_and_the_order_follow_the_ids():
    found = request(token_type_ids=IDS + 1)
    assert found.ids.tolist() == [[11, 12, 13], [0, 21, 22], [31, 32, 33]]
    assert np.array_equal(found.types, found.ids + 1)
    assert np.array_equal(np.take_along_axis(IDS, found.order, 1), found.ids)


def test_functions_see_the_columns_that_were_given():
    assert request(callbacks=Callbacks.of(lambda ids, scores: scores)).ids.shape == IDS.shape
    assert request(callbacks=Callbacks.of(streamer=gpt2_multi.TextStreamer(_Bytes()))).ids.shape == (3, 3)


def test_embeddings_stand_for_ids_that_no_rule_knows():
    embeds = Facts.of(np.zeros((3, 5, 8), np.float32))
    alone = request(None, MASK, embeds=embeds)
    assert alone.given.shape == (3, 0) and np.all(alone.ids == 50) and alone.mask.sum() == MASK.sum()
    both = request(embeds=embeds)
    assert both.given.tolist() == IDS.tolist() and both.ids.tolist() == request().ids.tolist()


def test_what_is_in_a_cache_keeps_its_columns():
    mask = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    found = request(IDS[:2], mask, past=3)
    assert found.ids.tolist() == IDS[:2].tolist() and found.past == 3 and found.mask.tolist() == (mask == 1).tolist()


def test_no_input_is_the_token_that_begins_a_text():
    assert request(None, None, batch=2).given.tolist() == [[7], [7]]
    assert request(None, None, config={"bos_token_id": 9}).ids.tolist() == [[9]]


def test_guidance_leads_away_from_the_last_token_or_a_prompt_of_its_own():
    found = request(config={"guidance_scale": 2.0})
    ids, mask = found.negative
    assert ids.tolist() == [[0, 0, 13], [0, 0, 22], [0, 0, 33]] and mask.sum(-1).tolist() == [1, 1, 1]
    long = np.arange(18).reshape(3, 6), np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 5 + [1]])
    found = request(config={"guidance_scale": 2.0}, negative=long)
    ids, mask = found.negative
    assert ids[1, mask[1]].tolist() == [6, 7, 8, 9] and mask[1].tolist() == [False] * 2 + [True] * 4
    assert found.ids.shape == ids.shape == found.order.shape and found.mask.sum(-1).tolist() == [3, 2, 3]
    with pytest.warns(UserWarning, match="negative_prompt_ids changes nothing without guidance_scale"):
        assert request(negative=long).negative is None


EMBEDS = {"ids": None, "embeds": Facts.of(np.zeros((3, 5, 8), np.float32))}
LATE = np.where(MASK == 1, MASK, 0) | [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ids": None, "mask": None, "model": GPT2Config(bos_token_id=None)}, "input_ids: .* bos_token_id None begins"),
        ({"ids": None, "mask": MASK}, r"attention_mask: expected shape \(1, 1\), found \(3, 5\)"),
        ({"embeds": Facts.of(np.zeros((3, 4, 8)))}, r"inputs_embeds: expected shape \(3, 5\), found \(3, 4\)"),
        ({"ids": None, "embeds": Facts.of(IDS)}, r"inputs_embeds: expected shape \(any, any, 8\), found \(3, 5\)"),
        ({**EMBEDS, "config": {"sliding_window": True}}, "inputs_embeds: cannot be used with sliding_window"),
        ({**EMBEDS, "past": 2}, "inputs_embeds: cannot be used with past_key_values"),
        ({"past": 5, "mask": LATE}, "holds 5 tokens, and input_ids, which are the whole text, only 5"),
        ({"past": 2}, "attention_mask: hides the last token of a row, after which a cache cannot go on"),
        ({"token_type_ids": IDS[:, 1:]}, r"token_type_ids: expected shape \(3, 5\), found \(3, 4\)"),
        ({"token_type_ids": IDS + 40}, "token_type_ids: the id 73 is outside the vocabulary"),
        ({"config": {"guidance_scale": 2.0}, "token_type_ids": IDS}, "token_type_ids: cannot be used with guidance"),
        (
            {"config": {"guidance_scale": 2.0}, "negative": (IDS[:1], None)},
            r"negative_prompt_ids: expected shape \(3, any\), found \(1, 5\)",
        ),
        (
            {"config": {"guidance_scale": 2.0}, "negative": (IDS, MASK * 0)},
            "negative_prompt_ids: a row has no token",
        ),
        (
            {"config": {"guidance_scale": 2.0}, "negative": (np.ones((3, 14), int), None)},
            "14 prompt tokens and 3 new ones are more than n_positions 16",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(given, sentence):
    with pytest.raises(InputError, match=sentence):
        request(**given)


def test_callbacks_are_what_can_be_called():
    with pytest.raises(InputError, match="logits_processor: expected a function, found int; give what can be called"):
        Callbacks.of([3])
    with pytest.raises(InputError, match="streamer: expected methods put and end, found list"):
        Callbacks.of(streamer=[])
    streamed = Callbacks.of(streamer=gpt2_multi.TextStreamer(_Bytes()))
    with pytest.raises(InputError, match="streamer: beams are not known before the end"):
        request(callbacks=streamed, config={"num_beams": 2})


def test_equal_functions_are_one_key_and_others_another():
    def first(ids, scores):
        return scores

    class Unhashable:
        __hash__ = None
        __call__ = first

    one, same = Unhashable(), gpt2_multi.LogitsProcessorList([first])
    assert Callbacks.of(first) == Callbacks.of(same) and hash(Callbacks.of(first)) == hash(Callbacks.of(same))
    assert Callbacks.of(one) == Callbacks.of([one]) != Callbacks.of(Unhashable())
    assert Callbacks.of(first) != Callbacks.of(None, first) != Callbacks.of(None, None, first)


def test_lists_call_all_of_their_functions():
    found = gpt2_multi.LogitsProcessorList([lambda ids, x: x + ids, lambda ids, x: x * 2])
    assert found(np.array([1]), np.array([3])) == [8]
    stops = gpt2_multi.StoppingCriteriaList([lambda ids, scores, n: ids == n, lambda ids, scores, n: ids > 4])
    assert stops(np.array([1, 2, 5]), None, 2).tolist() == [False, True, True]


class _Bytes:
    """A tokenizer in which an id is a byte, and 0 a control token."""

    control_ids = (0,)

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode()

    def decode_bytes(self, ids):
        return bytes(ids)


def test_a_streamer_prints_whole_characters(capsys):
    streamer, pieces = gpt2_multi.TextStreamer(_Bytes(), skip_prompt=True, skip_special_tokens=True), "aé😀".encode()
    for _ in range(2):
        streamer.put(np.array([[98, 98]]))
        for byte in pieces + b"\0":
            streamer.put(np.array([byte]))
        streamer.end()
    assert capsys.readouterr().out == "aé😀\n" * 2
    with pytest.raises(InputError, match="streamer: prints one text, found 2 rows"):
        streamer.put(np.zeros((2, 3), int))
    with pytest.raises(TypeError, match="skip_special"):
        gpt2_multi.TextStreamer(_Bytes(), skip_special=True)


def test_another_thread_iterates_over_the_pieces():
    streamer = gpt2_multi.TextIteratorStreamer(_Bytes(), timeout=600)

    def write():
        for part in ([[97]], [0xC3], [0xA9], [0xC3]):
            streamer.put(np.array(part))
        streamer.end()

    threading.Thread(target=write).start()
    assert list(streamer) == ["a", "é", "�"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"penalty_alpha": 0.6}, "penalty_alpha: is not an option here; leave it out, and use do_sample=True with"),
        ({"num_beam_groups": 2}, "num_beam_groups: is not an option here"),
        ({"dola_layers": "high"}, "dola_layers: is not an option here"),
        ({"force_words_ids": [[1]]}, "force_words_ids: .* give a prefix_allowed_tokens_fn"),
        ({"suppress_tokens": 3}, "suppress_tokens: expected a list of ids, or None, found 3"),
        ({"suppress_tokens": [-1]}, "suppress_tokens: expected"),
        ({"sequence_bias": {(1,): 1.0}, "logit_bias": {2: 1.0}}, "sequence_bias: is another name of logit_bias"),
        ({"sequence_bias": [3]}, "logit_bias: expected a mapping"),
    ],
)  # fmt: skip
def test_options_of_transformers_are_refused_by_name(options, sentence):
    with pytest.raises(InputError, match=sentence):
        GenerationConfig().with_options(options)


def test_options_of_transformers_that_change_nothing_are_taken(recwarn):
    options = {"penalty_alpha": None, "num_beam_groups": 1, "use_cache": False, "synced_gpus": True, "top_h": None}
    assert GenerationConfig().with_options(options) == GenerationConfig()
    with pytest.raises(TypeError, match="no option 'num_beam_group'"):
        GenerationConfig().with_options({"num_beam_group": 1})


def test_biases_go_by_two_names():
    made = GenerationConfig(bad_words_ids=[[4, 5]]).with_options
    found = made({"sequence_bias": {(1, 2): 3.0}, "suppress_tokens": [7, 8]})
    assert found.biases == [((1, 2), 3.0), ((4, 5), -np.inf), ((7,), -np.inf), ((8,), -np.inf)]


def test_an_answer_has_the_order_of_transformers():
    output = GenerateOutput(sequences=1, log_probs=2, scores=3, texts=4, past_key_values=5, logits=6, attentions=7)
    assert output.keys() == ["sequences", "scores", "logits", "attentions", "past_key_values", "log_probs", "texts"]
    assert output[1] == 3 and output.to_tuple()[:2] == (1, 3)
