"""Faults that a hostile reading of generation found, on every backend; each was there once."""

import copy
import math
import pickle

import numpy as np
import pytest

from gpt2_multi import GenerationConfig, GPT2Config, GPT2Tokenizer, pipeline, set_seed
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation import request
from gpt2_multi.generation.stopping import automaton, stop_table
from tests.support import adapters, fixtures
from tests.support import generation_cases as cases

SMALL = GPT2Config(vocab_size=20, n_positions=24, n_embd=12, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of 20 words."""
    where = tmp_path_factory.mktemp("small")
    fixtures.write_model(where, SMALL, "lm")
    return where


@pytest.fixture
def model(backend, folder):
    """It on a backend."""
    return getattr(adapters, f"{backend.__name__}_model")("lm", folder, "float64")


@pytest.fixture
def ids(backend):
    """A prompt as the backend takes it."""
    array = np.array([[3, 1, 4]])
    if backend.__name__ != "pt":
        return array
    import torch

    return torch.from_numpy(array)


def new(found):
    return np.asarray(found)[:, 3:].tolist()


def test_a_configuration_of_the_caller_keeps_the_model_s_end(model, ids, monkeypatch):
    free = new(model.generate(ids, max_new_tokens=5))[0]
    ending = model.generation_config.with_options({"eos_token_id": free[1], "pad_token_id": 19})
    monkeypatch.setattr(model, "generation_config", ending)
    own = GenerationConfig(max_new_tokens=5)
    assert new(model.generate(ids, generation_config=own))[0] == free[: free.index(free[1]) + 1]
    assert new(model.generate(ids, generation_config=own, eos_token_id=None))[0] == free
    assert new(model.generate(ids, generation_config=GenerationConfig(max_new_tokens=5, eos_token_id=[])))[0] == free
    with pytest.raises(InputError, match="generation_config: expected a GenerationConfig, found a dict"):
        model.generate(ids, generation_config={})


def test_beams_that_cannot_be_found_are_filling(model, ids):
    words = [[token] for token in range(20) if token != 7]
    options = {
        "bad_words_ids": words,
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 3,
        "pad_token_id": 9,
    }
    assert new(model.generate(ids, **options)) == [[7, 7, 7], [9, 9, 9], [9, 9, 9]]
    output = model.generate(ids, return_dict_in_generate=True, **options)
    assert np.asarray(output.sequences_scores).tolist()[1:] == [-math.inf] * 2
    assert (np.asarray(output.beam_indices)[1:] == -1).all() and (np.asarray(output.log_probs)[1:] == 0).all()


def test_nothing_is_not_a_prompt(model):
    with pytest.raises(InputError, match="input_ids: expected ids or texts, found None"):
        model.generate(None)


def test_tokenizers_are_looked_at_before_anything_is_made(model):
    for call in (model.generate, model.stream, model.score):
        with pytest.raises(InputError, match=r"tokenizer: expected a GPT2Tokenizer, or .* found the text 'gpt2'"):
            call("abc", tokenizer="gpt2")
    with pytest.raises(InputError, match="text: expected a text, found list"):
        model.stream(["abc"], tokenizer=cases.tokenizer())
    with pytest.raises(InputError, match="num_return_sequences: one text is streamed"):
        model.stream("abc", tokenizer=cases.tokenizer(), do_sample=True, num_return_sequences=2)


def test_ids_that_the_tokenizer_does_not_know_have_no_text(backend, tmp_path):
    fixtures.write_model(tmp_path, SMALL.replace(vocab_size=1040), "lm")
    model = getattr(adapters, f"{backend.__name__}_model")("lm", tmp_path, "float32")
    tokenizer = GPT2Tokenizer.from_pretrained(DEMO)
    options = {"tokenizer": tokenizer, "logit_bias": {1030: 1e9}, "max_new_tokens": 2, "stop_strings": "x"}
    assert model.generate("ab", **options) == "ab" and list(model.stream("ab", **options)) == []
    assert model.generate(["a", "a b c"], tokenizer=tokenizer, pad_token_id=5000, max_new_tokens=1)


def test_long_stop_strings_are_prepared_at_once():
    assert automaton([b"qxz" * 300, b"abc" * 40]).shape == (900 + 119, 256)  # this took minutes
    with pytest.raises(InputError, match="stop_strings: 2000 bytes in all are more than 1024"):
        stop_table(["x" * 2000], cases.tokenizer(), cases.VOCAB)
    assert stop_table(["\ud800"], cases.tokenizer(), cases.VOCAB).shape[1] == cases.VOCAB


def test_numpy_s_numbers_are_python_s(tmp_path):
    config = GenerationConfig(
        do_sample=np.True_, seed=np.uint64(2**64 - 1), max_new_tokens=np.int64(5), temperature=np.float32(0.5),
        eos_token_id=[np.int64(3)], logit_bias={np.int64(4): np.float64(1.0)},
    )  # fmt: skip
    assert config.seed == 2**64 - 1 and type(config.max_new_tokens) is int and config.do_sample is True
    config.save_pretrained(tmp_path / "new" / "folder")
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    set_seed(np.int64(7))
    assert request._next == 7
    request._next = None


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5: 1e39}}, {"length_penalty": 1000.0}, {"eos_token_id": 2**70}, {"pad_token_id": 2**70},
        {"min_length": 2**70}, {"temperature": 10**400}, {"repetition_penalty": 10**400}, {"logit_bias": {5: 10**400}},
        {"temperature": np.complex64(1 + 1j)}, {"cache_implementation": [1, 2]}, {"early_stopping": [1, 2]},
        {"early_stopping": 1},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_one_sentence(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))}: expected"):
        GenerationConfig(**options)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    GenerationConfig(top_k=None, eos_token_id=[], logit_bias={5: 1.0}).save_pretrained(tmp_path)
    read = GenerationConfig.of_folder(tmp_path, GPT2Config(eos_token_id=9), {})
    assert read.top_k == 0 and read.eos_token_ids == () and read.bad_words_ids is None


def test_options_of_a_file_that_are_not_here_are_named_unless_they_are_off(tmp_path, recwarn):
    path = tmp_path / "generation_config.json"
    path.write_text('{"guidance_scale": 1.0, "num_beam_groups": 1, "typical_p": 1.0, "eos_token_id": -1, "x": 1}')
    assert GenerationConfig.of_folder(tmp_path, SMALL, {}).eos_token_ids == () and not recwarn.list
    path.write_text('{"penalty_alpha": 0.6, "forced_eos_token_id": 0}')
    with pytest.warns(UserWarning, match="penalty_alpha, forced_eos_token_id is not an option here"):
        GenerationConfig.of_folder(tmp_path, SMALL, {})


class Dataset:
    """As PyTorch has them: a length and items, and no end of them."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return "ab"[i % 2]


def test_pipelines_read_datasets_and_refuse_what_they_would_ignore():
    pytest.importorskip("torch")
    from gpt2_multi.pt import GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(DEMO), GPT2Tokenizer.from_pretrained(DEMO)
    generator = pipeline("text-generation", model, tokenizer, num_return_sequences=2, max_new_tokens=1)
    assert len(list(generator(Dataset(), do_sample=True))) == 2
    assert len(generator("a", do_sample=True, generation_config=GenerationConfig(top_k=3))) == 2
    for given, options, sentence in [
        (["a", "b"], {"seed": [1, 2, 3]}, "seed: expected one number, or one for each of 2 texts, found 3"),
        ((x for x in "ab"), {"seed": [1]}, "seed: expected one number, or one for each of 2 texts, found 1"),
        ("a", {"return_dict_in_generate": True}, "return_dict_in_generate: a pipeline gives texts"),
        ("a", {"return_tensors": "pt"}, "return_tensors: expected True or False, found 'pt'"),
        (5, {}, "text_inputs: expected a text, or what yields texts, found int"),
    ]:
        with pytest.raises(InputError, match=sentence):
            list(generator(given, do_sample=True, **options))
    for wrong in ({"model": model, "dtype": "float16"}, {"model": 5}):
        with pytest.raises(InputError, match="model: "):
            pipeline(tokenizer=tokenizer, **wrong)


def test_a_score_is_one_of_the_whole_model_and_never_overflows():
    pytest.importorskip("torch")
    from gpt2_multi.generation.scoring import TextScore
    from gpt2_multi.pt import GPT2LMHeadModel

    trained, tokenizer = GPT2LMHeadModel.from_pretrained(DEMO), GPT2Tokenizer.from_pretrained(DEMO)
    expected = trained.score("to be or not", tokenizer=tokenizer).log_prob
    assert trained.train().score("to be or not", tokenizer=tokenizer).log_prob == expected and trained.training
    assert TextScore((1,), np.array([-1e4])).perplexity == math.inf
