"""Texts in, texts out on every backend: generate, stream, score, the pipeline, seeds."""

import functools
import io
import math
from contextlib import redirect_stdout

import numpy as np
import pytest

from gpt2_multi import GPT2Tokenizer, TextStreamer, pipeline, set_seed
from gpt2_multi.app import backends
from gpt2_multi.app.pipeline import pipeline as pipelines
from gpt2_multi.errors import InputError, TokenizerError
from gpt2_multi.files.hub import DEMO

PROMPTS = ["ROMEO:", "What is the matter, my good lord and", "A"]
OPTIONS = {"do_sample": True, "max_new_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's."""
    return GPT2Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def model(backend):
    """The demo on a backend."""
    return loaded(backend.__name__)


@functools.cache
def loaded(name):
    """The demo on a backend, once for all tests; TensorFlow's without XLA, which would compile for longer than all."""
    model = backends.resolve(name).load(DEMO, "cpu")
    if name == "tf":
        from gpt2_multi.tf.generation.decoders import Decoders

        model.__dict__["_decoders"] = dict.fromkeys([True, False], Decoders.of(model, jit=False))
    return model


def first_logits(ids):
    """The demo's logits on the first backend that is installed."""
    name = backends.installed()[0]
    return backends.resolve(name).layers(loaded(name), ids)[-1]


def test_a_text_gives_a_text_and_a_list_a_list(model, tokenizer):
    alone = [model.generate(text, tokenizer=tokenizer, **OPTIONS | {"seed": 3 + i}) for i, text in enumerate(PROMPTS)]
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))
    assert model.generate(PROMPTS, tokenizer=tokenizer, **OPTIONS) == alone
    assert model.generate([], tokenizer=tokenizer) == []
    several = model.generate(PROMPTS[:2], tokenizer=tokenizer, num_return_sequences=2, **OPTIONS)
    assert [len(texts) for texts in several] == [2, 2] and several[0][0] == alone[0]


def test_control_tokens_in_prompts_are_control_tokens_unless_they_are_split(model, tokenizer):
    text, options = "A<|endoftext|>B", {**OPTIONS, "max_new_tokens": 3, "return_dict_in_generate": True}
    strict = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
    for reader in (tokenizer, strict):
        ids = model.generate(text, tokenizer=reader, **options).token_ids
        assert ids[: len(reader(text).input_ids)] == reader(text).input_ids
        assert (reader.eos_token_id in ids[:-3]) == (reader is tokenizer)
        assert (reader.eos_token_id in model.score(text, tokenizer=reader).token_ids) == (reader is tokenizer)
    generator = pipeline("text-generation", model, tokenizer)
    for reading in ({}, {"tokenizer_encode_kwargs": {"split_special_tokens": True}}):
        expected = tokenizer(text, **reading.get("tokenizer_encode_kwargs", {})).input_ids
        (found,) = generator(text, return_tensors=True, max_new_tokens=3, **reading)
        assert found["generated_token_ids"][: len(expected)] == expected


def test_every_backend_writes_the_first_ones_texts(model, tokenizer):
    first = loaded(backends.installed()[0])
    for options in (OPTIONS, {"num_beams": 3, "max_new_tokens": 12}, {"max_new_tokens": 12, "stop_strings": ["e "]}):
        expected = first.generate(PROMPTS, tokenizer=tokenizer, **options)
        assert model.generate(PROMPTS, tokenizer=tokenizer, **options) == expected


def test_pieces_are_the_text_which_is_read_once(model, tokenizer, monkeypatch):
    whole = model.generate(PROMPTS[0], tokenizer=tokenizer, **OPTIONS)
    read, call = [], GPT2Tokenizer.__call__
    monkeypatch.setattr(GPT2Tokenizer, "__call__", lambda self, text: read.append(text) or call(self, text))
    assert PROMPTS[0] + "".join(model.stream(PROMPTS[0], tokenizer=tokenizer, **OPTIONS)) == whole
    assert read == [PROMPTS[0]]


def test_no_piece_ends_within_a_character(model, tokenizer):
    """Two bytes are ruled to follow each other: those of an accented letter."""
    low, high = tokenizer("\u00e9").input_ids
    bias = {low: 1e4, (low, high): 1e5}
    pieces = list(model.stream("caf", tokenizer=tokenizer, logit_bias=bias, max_new_tokens=4, eos_token_id=None))
    assert pieces == ["\u00e9", "\u00e9"]
    cut = model.generate("caf", tokenizer=tokenizer, logit_bias=bias, max_new_tokens=3, eos_token_id=None)
    assert cut == "caf\u00e9\ufffd"


def test_stop_strings_end_a_text(model, tokenizer):
    text = model.generate("ROMEO:", tokenizer=tokenizer, max_new_tokens=40)
    stopped = model.generate("ROMEO:", tokenizer=tokenizer, max_new_tokens=40, stop_strings=["the gr", "never there"])
    assert "the gr" in stopped[-10:] and text.startswith(stopped) and len(stopped) < len(text)


def test_an_empty_prompt_begins_a_text(model, tokenizer):
    start = tokenizer.decode([model.config.bos_token_id])
    assert model.generate("", tokenizer=tokenizer, max_new_tokens=5) in model.generate(
        "", tokenizer=tokenizer, max_new_tokens=9
    ) and start not in model.generate("", tokenizer=tokenizer, max_new_tokens=5)


def test_a_detailed_answer_has_texts_and_ids(model, tokenizer):
    output = model.generate(PROMPTS, tokenizer=tokenizer, return_dict_in_generate=True, **OPTIONS)
    assert output.texts == model.generate(PROMPTS, tokenizer=tokenizer, **OPTIONS)
    assert [tokenizer.decode(ids) for ids in output.token_ids] == output.texts
    assert np.asarray(output.log_probs).shape == (3, 12) and (np.asarray(output.log_probs) <= 0).all()


def test_texts_need_a_tokenizer_and_no_mask(model, tokenizer):
    with pytest.raises(InputError, match="input_ids: found text, which needs a tokenizer; give tokenizer="):
        model.generate("a")
    with pytest.raises(InputError, match="attention_mask: is made by the tokenizer"):
        model.generate("a", np.ones((1, 1)), tokenizer=tokenizer)


def test_scores_are_the_losses(model, tokenizer):
    text = "First Citizen:\nBefore we proceed any further, hear me speak."
    score = model.score(text, tokenizer=tokenizer)
    ids = np.array([[model.config.bos_token_id, *tokenizer(text).input_ids]])
    logits = first_logits(ids)[0, :-1]
    log_z = np.log(np.exp(logits).sum(-1))
    expected = logits[np.arange(len(logits)), ids[0, 1:]] - log_z
    np.testing.assert_allclose(score.log_probs, expected, rtol=2e-4, atol=1e-5)
    assert score.token_ids == tuple(ids[0, 1:]) and math.isclose(score.log_prob, expected.sum(), rel_tol=1e-4)
    assert math.isclose(score.perplexity, math.exp(-expected.mean()), rel_tol=1e-4)


def test_long_texts_are_scored_in_windows(model, tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    ids = [model.config.bos_token_id, *tokenizer(text).input_ids]
    size, stride = model.config.n_positions, 100
    assert len(ids) > 2 * size
    score = model.score(["short", text, ""], tokenizer=tokenizer, stride=stride)[1]
    assert score.token_ids == tuple(ids[1:])
    for place in (1, size - 1, size, size + stride - 1, size + stride, len(ids) - 1):
        start = max(-(-(place + 1 - size) // stride), 0) * stride
        logits = first_logits(np.array([ids[start:place]]))[0, -1]
        expected = logits[ids[place]] - np.log(np.exp(logits).sum())
        assert math.isclose(score.log_probs[place - 1], expected, rel_tol=1e-3, abs_tol=1e-4)


def test_scores_of_little(model, tokenizer):
    assert model.score([], tokenizer=tokenizer) == []
    begun = GPT2Tokenizer.from_pretrained(DEMO, add_bos_token=True)
    assert model.score("a", tokenizer=begun).token_ids == model.score("a", tokenizer=tokenizer).token_ids
    empty = model.score("", tokenizer=tokenizer)
    assert empty.log_prob == 0 and math.isnan(empty.perplexity) and empty.token_ids == ()
    with pytest.raises(InputError, match="stride: expected less than n_positions 256, found 256"):
        model.score("a", tokenizer=tokenizer, stride=256)
    with pytest.raises(InputError, match="texts: expected a text or a list of texts"):
        model.score(3, tokenizer=tokenizer)


def test_pipelines_agree_with_generate_whatever_the_batches(model, tokenizer):
    generator = pipeline("text-generation", model, tokenizer)
    expected = [[{"generated_text": text}] for text in model.generate(PROMPTS, tokenizer=tokenizer, **OPTIONS)]
    assert generator(PROMPTS, **OPTIONS) == expected
    assert generator(PROMPTS, batch_size=2, **OPTIONS) == expected
    assert list(generator((text for text in PROMPTS), batch_size=2, **OPTIONS)) == expected
    assert generator(PROMPTS[0], **OPTIONS) == expected[0]
    short = generator(PROMPTS, return_full_text=False, **OPTIONS)
    assert [
        [{"generated_text": prompt + text["generated_text"]}] for prompt, (text,) in zip(PROMPTS, short, strict=True)
    ] == expected
    ids = generator(PROMPTS, return_tensors=True, **OPTIONS)
    assert [tokenizer.decode(i[0]["generated_token_ids"]) for i in ids] == [e[0]["generated_text"] for e in expected]


def test_max_length_counts_each_prompt(model, tokenizer):
    generator = pipeline("text-generation", model, tokenizer)
    options = {"max_length": 15, "do_sample": True, "seed": 5, "return_tensors": True, "eos_token_id": None}
    together = generator(PROMPTS, **options)
    assert [len(result[0]["generated_token_ids"]) for result in together] == [15, 15, 15]
    assert together[0] == generator(PROMPTS[0], **options)


def test_a_seed_is_used_up_and_set_again(model, tokenizer):
    generator = pipeline("text-generation", model, tokenizer)
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 2}
    assert generator("A", **options) == generator("A", seed=0, **options) == generator("A", **options)
    set_seed(42)
    first, second = generator("A", **options), generator("A", **options)
    assert first == generator("A", seed=42, **options) and second == generator("A", seed=44, **options) != first
    set_seed(42)
    assert model.generate("A", tokenizer=tokenizer, **options) == [result["generated_text"] for result in first]


def test_pipelines_load_what_they_are_given(backend):
    name = backend.__name__
    generator = pipeline("text-generation", str(DEMO), backend=name, device=-1, max_new_tokens=3)
    assert generator.model.__module__.startswith(f"gpt2_multi.{name}")
    assert generator("ROMEO:", do_sample=False) == pipeline(backend=name)("ROMEO:", max_new_tokens=3, do_sample=False)


def test_bad_pipelines_are_one_sentence(model, tokenizer):
    for wrong, error, sentence in [
        ({"task": "fill-mask"}, InputError, 'task: expected "text-generation", the only one'),
        ({"model": model}, InputError, "tokenizer: a model that is loaded already does not know its own"),
        ({"model": model, "dtype": "float16"}, InputError, "model: is loaded already"),
        ({"device": "cuda:7"}, InputError, "device: expected one of cpu, found 'cuda:7'"),
        ({"temprature": 2}, TypeError, "did you mean 'temperature'"),
    ]:
        with pytest.raises(error, match=sentence):
            pipeline(**wrong)
    with pytest.raises(InputError, match="text_inputs: expected a text, found int; give a string"):
        pipeline("text-generation", model, tokenizer)([1], max_new_tokens=1)


def test_tasks_of_a_configuration_are_followed(model, tokenizer):
    own = {"do_sample": True, "max_length": 9, "other": 1, "temperature": None}
    model.config.extra["task_specific_params"] = {"text-generation": own}
    try:
        generator = pipeline("text-generation", model, tokenizer, num_return_sequences=2)
        assert generator.options == {"do_sample": True, "max_length": 9, "num_return_sequences": 2}
        assert [len(row["generated_token_ids"]) for row in generator("A", return_tensors=True)] == [9, 9]
    finally:
        del model.config.extra["task_specific_params"]


# --- tokenizers of another kind --------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = [*LETTERS, *(a + b for a in LETTERS for b in "aeiouy")]


class Plain:
    """A tokenizer of which nothing is there but a call and decode: it has no hash, and fails at an id of its own."""

    __hash__ = None

    def __call__(self, text):
        return {"input_ids": np.array([[1, *map(ord, text)]])}

    def decode(self, ids):
        return "".join("^" if at == 1 else chr(0x21 + at % (94 if at else at)) for at in ids)


def bert(folder):
    """WordPiece, which begins and ends every text with a token of its own."""
    transformers = pytest.importorskip("transformers")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *":.'!", *SYLLABLES, *("##" + part for part in SYLLABLES)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return transformers.BertTokenizer.from_pretrained(folder)


def unigram(_):
    """What SentencePiece makes, with a token for each byte."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("\u2581", -2.0)]
    pieces += [(mark + part, -3.0) for mark in ("", "\u2581") for part in (*SYLLABLES, *":.'!")]
    engine = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=True))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    engine.decoder = tokenizers.decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="</s>", unk_token="<unk>")


def check_foreign(model, foreign, **options):
    """What is read is what its call gives, and a text is what it decodes after the prompt, also in pieces."""
    prompt, options = "the king!", {**OPTIONS, **options}
    ids, row = np.ravel(foreign(prompt)["input_ids"]).tolist(), backends.BACKENDS[pipelines.backend_of(model)]
    whole = row.to_numpy(model.generate(row.to_tensor(model, np.array([ids])), **options))[0].tolist()
    assert whole[: len(ids)] == ids and len(whole) == len(ids) + 12
    new = foreign.decode(whole)[len(foreign.decode(ids)) :]
    assert model.generate([prompt], tokenizer=foreign, **options) == [prompt + new]
    assert "".join(model.stream(prompt, tokenizer=foreign, **options)) == new
    hidden = set(getattr(foreign, "all_special_ids", ()))
    shown, before = (foreign.decode([at for at in row if at not in hidden]) for row in (whole, ids))
    made = pipelines.pipeline("text-generation", model, foreign)(prompt, **options)
    assert made == [{"generated_text": prompt + shown[len(before) :]}]
    assert model.score(prompt, tokenizer=foreign).token_ids[-len(ids) :] == (*ids,)
    stop = new.strip()[4:7]
    stopped = model.generate(prompt, tokenizer=foreign, stop_strings=[stop], **options)
    assert len(stop) == 3 and (prompt + new).startswith(stopped) and stop in stopped[len(prompt) :] != new


def test_all_that_is_asked_of_a_tokenizer_is_a_call_and_decode(model):
    check_foreign(model, Plain())


@pytest.mark.parametrize("make", [bert, unigram])
def test_tokenizers_of_another_kind_read_and_write(make, tmp_path):
    """Tokens of bytes are left out, since those of no character change the text of those before them."""
    foreign = make(tmp_path)
    check_foreign(loaded(backends.installed()[0]), foreign, top_k=0, suppress_tokens=[*range(258), 1023])


def test_a_streamer_takes_them_too(tmp_path):
    foreign = unigram(tmp_path)
    ids = foreign("the \u00e9 is \U0001f600 le").input_ids
    for skipped, expected in ((True, " \U0001f600 le\n"), (False, "the \u00e9 is \U0001f600 le\n")):
        streamer, shown = TextStreamer(foreign, skip_prompt=skipped, skip_special_tokens=True), io.StringIO()
        with redirect_stdout(shown):
            streamer.put(np.array([ids[:7]]))
            for at in (*ids[7:], foreign.eos_token_id):
                streamer.put(np.array([at]))
            streamer.end()
        assert shown.getvalue() == expected


def test_what_cannot_be_done_with_them_is_one_sentence(model, tmp_path):
    foreign = bert(tmp_path)
    with pytest.raises(TokenizerError, match=r"found a BertTokenizer of transformers \(tokenizer\.json: expected"):
        GPT2Tokenizer.from_tokenizer(foreign)
    with pytest.raises(TokenizerError, match="expected one of GPT-2's kind, found a Plain of tests"):
        GPT2Tokenizer.from_tokenizer(Plain())
    with pytest.raises(InputError, match="tokenizer: expected one that can be saved, found a Plain"):
        pipeline("text-generation", model, Plain()).save_pretrained(tmp_path)
    parts = type("Parts", (Plain,), {"decode": lambda self, ids: "".join("\ufffd" for _ in ids)})()
    with pytest.raises(
        InputError, match="stop_strings: '\u00e9' may be spelled in parts of characters, which this tok"
    ):
        model.generate("a", tokenizer=parts, stop_strings=["\u00e9"])
    wrong = type("Wrong", (Plain,), {"__call__": lambda self, text: {"input_ids": ["a"]}})()
    with pytest.raises(InputError, match="tokenizer: expected a call that gives the input_ids of a text, whole"):
        model.generate("a", tokenizer=wrong)


def test_seeds_are_whole_numbers():
    for wrong in (-1, 2**32, 1.5, True, "x"):
        with pytest.raises(InputError, match="seed: expected a whole number from 0 to 2\\*\\*32 - 1, found"):
            set_seed(wrong)
