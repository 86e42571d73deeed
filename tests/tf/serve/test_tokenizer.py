"""TFGPT2Tokenizer: the ids of GPT2Tokenizer in the graph, for every text; and back."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import keras

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.errors import InputError, TokenizerError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.tf import TFGPT2LMHeadModel, TFGPT2Tokenizer
from gpt2_multi.tf.serve.encoding import by_bytes
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.engine.words import code_point_classes, repair
from gpt2_multi.tokenizer.fast import GPT2TokenizerFast
from gpt2_multi.tokenizer.files import AddedToken
from tests.support import shared_data
from tests.support.effort import some
from tests.tokenizer.test_parts import described, digits_of, text_of, written

NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF))]


@pytest.fixture(scope="module")
def demo():
    """The demo's tokenizer in Python."""
    return GPT2Tokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def ragged(demo):
    """The same in the graph, without padding."""
    return TFGPT2Tokenizer.from_tokenizer(demo, padding=None)


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's own tokenizer, in Python and in the graph."""
    python = GPT2Tokenizer.from_pretrained(shared_data.shared("vocab", "gpt2"))
    return python, TFGPT2Tokenizer.from_tokenizer(python, padding=None)


def ids(layer, texts):
    return layer(tf.constant([repair(text).encode() for text in texts]))["input_ids"].to_list()


def mismatches(python, layer, texts):
    return [text for text, found in zip(texts, ids(layer, texts), strict=True) if found != python(text).input_ids]


def test_recorded_texts_have_their_ids(gpt2):
    lines = shared_data.shared("fixtures", "tokens.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    python, layer = gpt2
    assert ids(layer, [row["text"] for row in rows]) == [row.get("ids_special", row["ids"]) for row in rows]
    split = TFGPT2Tokenizer.from_tokenizer(python, padding=None, split_special_tokens=True)
    assert ids(split, [row["text"] for row in rows]) == [row["ids"] for row in rows]


def test_every_code_point_in_context(demo, ragged):
    """Of the planes that hold nothing, or what is private, `nox -s thorough` alone has every one."""
    every = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, some(1, 32))]
    every = [chr(point) for point in sorted({*every, *range(0xE0000, 0xF0000), *NONCHARACTERS})]
    texts = ["".join(f"a{c} {c}{c}1" for c in every[at : at + 512]) for at in range(0, len(every), 512)]
    assert mismatches(demo, ragged, texts) == []


def test_a_real_text(gpt2):
    text = shared_data.shared("text", "tinyshakespeare.txt").read_text("utf-8")
    python, layer = gpt2
    assert mismatches(python, layer, [text[:300_000], *text[300_000:].split("\n")]) == []


def fuzzed(rng):
    """A text of what is hard: white space, contractions, rare letters, long runs, control tokens."""
    classes = code_point_classes()
    point = lambda name: chr(rng.randint(*rng.choice(classes[name])))  # noqa: E731
    parts = [
        lambda: rng.choice([" ", "  ", "\n", "\t", "\u00a0", "\u2009", "\u3000", "\x1c", "\u0085", "\r\n"]),
        lambda: rng.choice(["'s", "'t", "'re", "'ve", "'ll", "'d", "'m", "'", "''", "'S", "\u2019s", "'r"]),
        lambda: "".join(rng.choices("etaoinshrdlucmf", k=rng.randint(1, 12))),
        lambda: rng.choice("etao ") * rng.randint(1, 40),
        lambda: str(rng.randrange(10**6)),
        lambda: point(rng.choice(["letter", "number", "space", "other"])),
        lambda: rng.choice(["<|endoftext|>", "<|endoftext", "|>", "<|", chr(rng.choice(NONCHARACTERS)), "\x00"]),
    ]
    text = "".join(rng.choice(parts)() for _ in range(rng.randint(0, 12)))
    return repair(text)


def test_random_texts_have_the_ids_of_the_tokenizer_in_python(demo, ragged):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(some(20, 10)):
        assert mismatches(demo, ragged, [fuzzed(rng) for _ in range(1000)]) == [], f"seed {seed}"


ADDED = ["<user>", "<us", "user>", "[CLS]", " the", "'s", "a  ", "et", "<|", "\n\n", "\u00e9", "\U0001f468\u200d", "12"]


def with_tokens(rng, tokens):
    """A text of what is hard, with added tokens in it, and parts of them."""
    pieces = [fuzzed(rng) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.randint(0, 4)):
        token = rng.choice(tokens)
        pieces.insert(rng.randint(0, len(pieces)), token[: rng.choice([len(token), rng.randint(1, len(token))])])
    return "".join(pieces)


def test_random_texts_with_added_tokens_have_the_same_ids_in_all_tokenizers(tmp_path):
    """The one in Python, in the graph, the compiled one, and that of the library `tokenizers`, where they are there.

    Control tokens in texts are found, and split; with a space before a text and without. 20,000 texts where everything
    is tried; FUZZ_SEED asks for others.
    """
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    print(f"FUZZ_SEED={seed}")
    rng = random.Random(seed)
    for at in range(some(20, 2)):
        python = GPT2Tokenizer.from_pretrained("demo", add_prefix_space=at % 2 == 1)
        for content in rng.sample(ADDED, rng.randint(1, 8)):
            normalized = rng.choice([None, True, False])
            python.add_tokens([AddedToken(content, special=rng.random() < 0.5, normalized=normalized)])
        python.save_pretrained(tmp_path)
        tokens = list(python.get_added_vocab())
        texts = [with_tokens(rng, tokens) for _ in range(1000)]
        for split in (False, True):
            expected = [python.encode(text, split_special_tokens=split) for text in texts]
            layer = TFGPT2Tokenizer.from_tokenizer(python, padding=None, split_special_tokens=split)
            others = {"graph": ids(layer, texts), **of_others(tmp_path, texts, split)}
            for name, found in others.items():
                for text, ours, theirs in zip(texts, expected, found, strict=True):
                    assert ours == theirs, (seed, name, split, ascii(text))


def of_others(folder, texts, split):
    """The ids of texts by the libraries that are installed."""
    found = {}
    if find_spec("gigatoken"):
        fast = GPT2TokenizerFast.from_pretrained(folder, split_special_tokens=split)
        found["gigatoken"] = fast(texts).input_ids
    if find_spec("tokenizers"):
        from tokenizers import Tokenizer

        theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs.encode_special_tokens = split
        found["tokenizers"] = [row.ids for row in theirs.encode_batch(texts)]
    return found


def test_bytes_that_are_no_text_become_what_python_makes_of_them(demo, ragged):
    rng = random.Random(5)
    rows = [
        bytes(
            rng.choices(
                [0x41, 0x20, 0x80, 0xBF, 0xC0, 0xC3, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0x90, 0xFF], k=8
            )
        )
        for _ in range(2000)
    ]
    found = ragged(tf.constant(rows))["input_ids"].to_list()
    assert found == [demo(row.decode("utf-8", "replace")).input_ids for row in rows]


def test_noncharacters_are_spelled_byte_by_byte():
    points = [ord(c) for c in "a\u00e9\u20ac\U0001f600"] + NONCHARACTERS
    words = tf.RaggedTensor.from_row_splits(points, [0, 2, 4, len(points)])
    expected = ["".join(map(chr, points[a:b])).encode() for a, b in ((0, 2), (2, 4), (4, len(points)))]
    assert by_bytes(words).numpy().tolist() == expected


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "a b" * 10**5, "'" * 10**5])
def test_long_runs(demo, ragged, text):
    assert mismatches(demo, ragged, [text]) == []


def test_long_words_of_random_letters(demo, ragged):
    rng = random.Random(3)
    assert mismatches(demo, ragged, ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=10**5))]) == []


def test_control_tokens_are_found_unless_they_are_split(demo):
    texts = ["a<|endoftext|> b<|endoftext|><|endoftext|>", "", "<|endoftext|>"]
    for options in ({}, {"split_special_tokens": True}):
        layer = TFGPT2Tokenizer.from_tokenizer(demo, padding=None, **options)
        assert ids(layer, texts) == [demo(text, **options).input_ids for text in texts]
    strict = GPT2Tokenizer.from_pretrained(DEMO, split_special_tokens=True)
    layer = TFGPT2Tokenizer.from_tokenizer(strict, padding=None, allowed_special="all")
    assert ids(TFGPT2Tokenizer.from_config(layer.get_config()), texts) == [demo(text).input_ids for text in texts]


@pytest.mark.parametrize("seed", range(some(60, 1)))
def test_tokens_are_found_where_python_finds_them(seed):
    """Random tokens, special ones and others, normalized or not, in random texts, read and split."""
    rng, python = random.Random(seed), GPT2Tokenizer.from_pretrained(DEMO)
    contents = ["<user>", "<us", "user", ">", " x", "x ", "é", "[CLS]", "\n", "hello", "lo w", "<<", "<"]
    pieces = [*contents, "<|endoftext|>", "x", " ", "a", "he", "llo", " world", "1", "中", "\x85"]
    for content in rng.sample(contents, rng.randint(3, 8)):
        normalized = rng.choice([None, True, False])
        python.add_tokens([AddedToken(content, special=rng.random() < 0.5, normalized=normalized)])
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(500)]
    for split in (False, True):
        python.split_special_tokens = split
        assert mismatches(python, TFGPT2Tokenizer.from_tokenizer(python, padding=None), texts) == []


def test_parts_of_a_tokenizer_json_are_those_of_the_tokenizer_in_python(tmp_path):
    """Random ones that a graph can have, also from the configuration; the others are refused by name."""
    for seed in range(some(60, 3)):
        rng = random.Random(seed)
        python = GPT2Tokenizer.from_pretrained(written(tmp_path, described(rng, [], digits_of)))
        layer = TFGPT2Tokenizer.from_tokenizer(python, padding=None)
        assert mismatches(python, layer, [text_of(rng) for _ in range(200)]) == []
    config, texts = json.loads(json.dumps(layer.get_config())), ["hello the 12", ""]
    cut = TFGPT2Tokenizer.from_config({**config, "padding": "longest", "max_length": 4})(texts)["input_ids"]
    assert cut.numpy().tolist() == python(texts, truncation=True, max_length=4, padding=True).input_ids
    data = described(random.Random(1), [{"type": "NFC"}], digits_of)
    for name, data["normalizer"] in (("NFC", {"type": "NFC"}), ("Lowercase", {"type": "Lowercase"})):
        python = GPT2Tokenizer.from_pretrained(written(tmp_path, data))
        with pytest.raises(TokenizerError, match=f"tokenizer: {name} of its tokenizer.json is not there in a graph"):
            TFGPT2Tokenizer.from_tokenizer(python)


def test_scripts_for_transformers_run(demo, tmp_path):
    """Merges as lines, `max_length` of a call, the pad token that is set later, and what `to_tensor` gives them."""
    lines = [" ".join(pair) for pair in demo._bpe.merges]
    layer, texts = TFGPT2Tokenizer(demo._vocab, lines), ["hello world", "hi", ""]
    rows = demo(texts).input_ids
    output = layer(texts)
    dense = [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]
    assert output["input_ids"].to_tensor().numpy().tolist() == dense
    assert output["attention_mask"].to_tensor().numpy().tolist() == [[int(at > 0) for at in row] for row in dense]
    graph = tf.function(lambda given: layer(given)["input_ids"].to_tensor(default_value=-1))
    assert graph(tf.constant(texts))[1].numpy().tolist() == [at or -1 for at in dense[1]]
    layer.pad_token_id = 7
    wide = layer(texts, max_length=3)
    assert wide["input_ids"].numpy().tolist() == [(row + [7] * 3)[:3] for row in rows]
    assert wide["attention_mask"].numpy().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    demo.save_pretrained(tmp_path / "inner")
    given = {"subfolder": "inner", "use_fast": True, "trust_remote_code": True, "max_length": 6, "pad_token_id": 5}
    both = TFGPT2Tokenizer.from_pretrained(pretrained_model_name_or_path=tmp_path, **given)
    assert both(texts)["input_ids"].shape == (3, 6) and both.max_length == 6
    assert both.get_config()["padding"] == "max_length"
    assert TFGPT2Tokenizer(demo._vocab, lines, max_length=6).get_config()["padding"] == "longest"
    with pytest.raises(TokenizerError, match="max_length: expected a whole number of at least 1, found 0"):
        layer(texts, max_length=0)


def test_added_words_the_longest_first_and_from_the_left():
    demo = GPT2Tokenizer.from_pretrained(DEMO)
    demo.add_tokens(["foo", "foobar", "barb", " x "])
    layer = TFGPT2Tokenizer.from_tokenizer(demo, padding=None)
    texts = ["foobarb", "a foo barbarb", "foofoobar x  x b", "barbarb", " foo", "food"]
    assert mismatches(demo, layer, texts) == []


def test_a_table_with_two_merges_of_one_token():
    vocab = {
        **{char: at for at, char in enumerate(byte_characters())},
        "ab": 256,
        "bc": 257,
        "abc": 258,
        "<|endoftext|>": 259,
    }
    python = GPT2Tokenizer(vocab, [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])
    layer = TFGPT2Tokenizer.from_tokenizer(python, padding=None)
    rng = random.Random(1)
    assert mismatches(python, layer, ["".join(rng.choices("abc ", k=30)) for _ in range(300)]) == []


TEXTS = ["Hello there", "", "a much longer text than the others, I think"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding, length", [("longest", None), ("longest", 5), ("max_length", 9), ("max_length", 30)])
@pytest.mark.parametrize("bos", [False, True])
def test_rows_are_cut_and_filled_as_in_python(demo, side, padding, length, bos):
    options = {"padding_side": side, "truncation_side": side, "add_bos_token": bos}
    layer = TFGPT2Tokenizer.from_tokenizer(demo, max_length=length, padding=padding, **options)
    python = GPT2Tokenizer.from_pretrained(DEMO, pad_token="<|endoftext|>", **options)
    expected = python(TEXTS, padding=padding, truncation=length is not None, max_length=length, return_tensors="np")
    found = layer(TEXTS)
    for name in ("input_ids", "attention_mask"):
        assert found[name].dtype == tf.int32 and np.array_equal(found[name], expected[name]), name


def test_little_is_encoded_too(demo, ragged):
    assert ragged([])["input_ids"].shape[0] == 0 and ragged(["", ""])["input_ids"].to_list() == [[], []]
    layer = TFGPT2Tokenizer.from_tokenizer(demo)
    assert layer(tf.constant([], tf.string))["input_ids"].shape == (0, 0)
    assert layer(["", ""])["input_ids"].shape == (2, 0)
    assert layer("Hello there")["input_ids"].numpy().tolist() == demo("Hello there").input_ids
    assert layer([["a"], ["b c"]])["input_ids"].shape[0] == 2


def test_a_space_may_be_put_before(demo):
    layer = TFGPT2Tokenizer.from_tokenizer(demo, padding=None, add_prefix_space=True)
    python = GPT2Tokenizer.from_pretrained(DEMO, add_prefix_space=True)
    assert mismatches(python, layer, ["a", " a", "", "\n", "\x1ca", "\u00e9", "\U0001f600 b", "\u3000x"]) == []


def test_datasets_graphs_and_files_give_the_same(demo, tmp_path):
    layer = TFGPT2Tokenizer.from_tokenizer(demo, max_length=12, padding="max_length")
    expected = layer(TEXTS)["input_ids"].numpy()
    mapped = tf.data.Dataset.from_tensor_slices(TEXTS).batch(3).map(layer)
    assert np.array_equal(next(iter(mapped))["input_ids"], expected)
    graph = tf.function(lambda texts: layer(texts)["input_ids"], input_signature=[tf.TensorSpec([None], tf.string)])
    assert np.array_equal(graph(tf.constant(TEXTS)), expected)
    inputs = keras.Input(shape=(), dtype="string")
    model = keras.Model(inputs, layer(inputs)["input_ids"])
    assert np.array_equal(model(tf.constant(TEXTS)), expected)
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.models.load_model(tmp_path / "model.keras")(tf.constant(TEXTS)), expected)
    again = TFGPT2Tokenizer.from_config(layer.get_config())
    assert np.array_equal(again(TEXTS)["input_ids"], expected)


def test_a_saved_model_needs_tensorflow_alone(demo, ragged, tmp_path):
    root = tf.Module()
    root.tokenizer = ragged
    signature = [tf.TensorSpec([None], tf.string)]
    root.encode = tf.function(lambda texts: ragged.encode(texts).to_tensor(-1), input_signature=signature)
    root.decode = tf.function(ragged.detokenize, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    tf.saved_model.save(root, str(tmp_path / "saved"))
    code = (
        "import sys; sys.modules['gpt2_multi'] = None; import tensorflow as tf\n"
        "model = tf.saved_model.load(sys.argv[1]); ids = model.encode(tf.constant([sys.argv[2]]))\n"
        "print(ids.numpy()[0].tolist()); print(model.decode(ids).numpy()[0].decode())"
    )
    text = "It's a caf\u00e9, isn't it?"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), text], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(demo(text).input_ids), text]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # in Keras' savers
def test_a_functional_model_is_trained_from_raw_strings(demo, tmp_path):
    layer = TFGPT2Tokenizer.from_tokenizer(demo, max_length=12, padding="max_length")
    texts = tf.constant(["What say you, my lord?", "I say nothing, my good friend."] * 8)
    ids, mask = (layer(texts)[name] for name in ("input_ids", "attention_mask"))
    targets = tf.where(mask[:, 1:] == 1, ids[:, 1:], -100)

    def trained(inputs, batch, given):
        """The losses of a model from strings or from ids to logits, and the model."""
        body = TFGPT2LMHeadModel.from_pretrained("demo", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        logits = body(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model = keras.Model(inputs, logits[:, :-1])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
        model.compile(keras.optimizers.AdamW(1e-4), loss=loss)
        return model.fit(given, targets, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"], model

    strings = keras.Input(shape=(), dtype="string")
    losses, model = trained(strings, layer(strings), texts)
    inputs = {name: keras.Input((12,), dtype="int32", name=name) for name in ("input_ids", "attention_mask")}
    same, _ = trained(inputs, inputs, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    assert losses[2] < 0.5 * losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again(texts), model(texts))


def test_ids_become_texts(demo, ragged):
    rng = random.Random(9)
    texts = [fuzzed(rng) for _ in range(200)]
    rows = ragged(tf.constant([text.encode() for text in texts]))["input_ids"]
    assert [raw.decode() for raw in ragged.detokenize(rows).numpy()] == texts
    some = [[rng.randrange(len(demo)) for _ in range(9)] for _ in range(300)]
    assert [raw.decode() for raw in ragged.detokenize(some).numpy()] == [demo.decode(row) for row in some]
    hidden = [demo.decode(row, skip_special_tokens=True) for row in some]
    assert [raw.decode() for raw in ragged.detokenize(some, skip_special_tokens=True).numpy()] == hidden
    assert ragged.id_to_bytes([0, 5, 10**6]).numpy().tolist() == [demo.decode_bytes([0]), demo.decode_bytes([5]), b""]


def test_rows_that_may_be_longer_than_the_padding_stay_whole(demo):
    options = {"max_length": 5, "padding": "max_length", "truncation": False, "add_bos_token": True}
    texts = ["xyz q", "x", "a longer text than five tokens"]
    for side in ("left", "right"):
        python = GPT2Tokenizer.from_pretrained(DEMO, padding_side=side, add_bos_token=True)
        rows = python(texts).input_ids
        width = max(map(len, rows))
        filled = [[1023] * (width - len(row)) for row in rows]
        expected = [fill + row if side == "left" else row + fill for row, fill in zip(rows, filled, strict=True)]
        found = TFGPT2Tokenizer.from_tokenizer(demo, padding_side=side, **options)(texts)
        assert found["input_ids"].numpy().tolist() == expected
        assert found["attention_mask"].numpy().sum(1).tolist() == list(map(len, rows))
        assert TFGPT2Tokenizer.from_tokenizer(demo, padding_side=side, **options)(["x"])["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_with_several_merges_are_made_by_the_first_that_fits(seed):
    rng, symbols, merges = random.Random(seed), ["a", "b"], []
    while len(merges) < 25:
        pair = rng.choice(symbols), rng.choice(symbols)
        if pair not in merges and len("".join(pair)) < 6:
            merges.append(pair)
            symbols = list(dict.fromkeys([*symbols, "".join(pair)]))
    assert len(symbols) < 2 + len(merges)  # some are made twice
    vocab = {token: at for at, token in enumerate(dict.fromkeys([*byte_characters(), *symbols]))}
    python = GPT2Tokenizer(vocab, merges, unk_token=None, bos_token=None, eos_token=None)
    texts = ["aba" * 3000, *("".join(rng.choices("ab", k=rng.randrange(40))) for _ in range(500))]
    found = TFGPT2Tokenizer.from_tokenizer(python, padding=None)(texts)["input_ids"].to_list()
    assert found == [python(text).input_ids for text in texts]


def test_a_tokenizer_may_have_no_merges_and_many_added_words():
    bare = GPT2Tokenizer({char: at for at, char in enumerate(byte_characters())}, [])
    assert TFGPT2Tokenizer.from_tokenizer(bare)(["abc"])["input_ids"].numpy().tolist() == [[97, 98, 99]]
    python, rng = GPT2Tokenizer.from_pretrained(DEMO), random.Random(5)
    words = ["".join(rng.choices("<ab> \u00e9", k=rng.randrange(1, 7))) for _ in range(500)]
    python.add_tokens(words)
    texts = ["".join(rng.choices([*words, "a", "<", " b", "\u00e9", "x"], k=rng.randrange(12))) for _ in range(1000)]
    found = TFGPT2Tokenizer.from_tokenizer(python, padding=None)(texts)["input_ids"].to_list()
    assert found == [python(text).input_ids for text in texts]


def test_the_unknown_token_may_be_changed():
    characters = [char for char in byte_characters() if char != "c"]
    vocab = {token: at for at, token in enumerate([*characters, "ab", "<unk>", "<other>"])}
    python = GPT2Tokenizer(vocab, [("a", "b")], unk_token="<unk>", bos_token=None, eos_token=None)
    assert python("abca").input_ids == [255, 256, 97]
    python.unk_token = "<other>"
    assert python("abca").input_ids == [255, 257, 97]
    assert TFGPT2Tokenizer.from_tokenizer(python)(["abca"])["input_ids"].numpy().tolist() == [[255, 257, 97]]


def test_inputs_of_every_kind_are_taken_or_refused(demo, ragged):
    for given in (["a\ud800b"], np.array(["a\ufffdb"]), [b"a\xffb"], tf.constant(["a\ufffdb"])):
        assert ragged(given)["input_ids"].to_list() == [demo("a\ufffdb").input_ids]
    assert ragged([])["input_ids"].to_list() == [] and ragged.detokenize([]).numpy() == b""
    assert ragged.detokenize(tf.constant([2**32 + 40], tf.int64)).numpy() == b""
    columns = tf.function(
        lambda texts: ragged(texts)["input_ids"], input_signature=[tf.TensorSpec([None, None], tf.string)]
    )
    assert columns(tf.constant([["a"], ["b"]])).to_list() == [[64], [65]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected one text in each row"):
        columns(tf.constant([["a", "b"]]))
    for given in ([1, 2], tf.ragged.constant([["a"], ["b", "c"]]), 3):
        with pytest.raises(TokenizerError, match="inputs: expected texts"):
            ragged(given)
    with pytest.raises(TokenizerError, match="ids: expected whole numbers"):
        ragged.detokenize([40.7])


def test_one_of_transformers_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    GPT2Tokenizer.from_pretrained(DEMO, add_bos_token=True).save_pretrained(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    found = TFGPT2Tokenizer.from_tokenizer(theirs)(["The king of Naples"])
    assert found["input_ids"].numpy().tolist() == [
        GPT2Tokenizer.from_pretrained(tmp_path)("The king of Naples").input_ids
    ]


def test_bad_input_is_one_sentence(demo):
    flagged, big = GPT2Tokenizer.from_pretrained(DEMO), GPT2Tokenizer.from_pretrained(DEMO)
    flagged.add_special_tokens({"pad_token": AddedToken("<pad>", True, True, True)})
    with pytest.raises(TokenizerError, match="lstrip, rstrip and single_word are not there"):
        TFGPT2Tokenizer.from_tokenizer(flagged)
    assert TFGPT2Tokenizer.from_tokenizer(flagged, split_special_tokens=True)("<pad>")  # which does not look for it
    big._register(AddedToken("<big>"), 2**31)
    with pytest.raises(TokenizerError, match="vocab: expected an id below"):
        TFGPT2Tokenizer.from_tokenizer(big)
    with pytest.raises(InputError, match="tokenizer: expected a GPT2Tokenizer"):
        TFGPT2Tokenizer.from_tokenizer("demo")
    for options, sentence in [
        ({"padding": "max_length"}, 'padding: "max_length" needs max_length'),
        ({"padding": "both"}, "padding: expected"),
        ({"padding_side": "up"}, "padding_side: expected"),
        ({"max_length": 0}, "max_length: expected"),
        ({"truncation": "no"}, "truncation: expected"),
        ({"pad_token_id": 2**40}, "pad_token_id: expected an id below"),
        ({"pad_token_id": "x"}, "pad_token_id: expected a whole number"),
        ({"allowed_special": ["x"]}, "allowed_special: expected some of"),
        ({"split_special_tokens": "no"}, "split_special_tokens: expected one of"),
    ]:
        with pytest.raises(TokenizerError, match=sentence):
            TFGPT2Tokenizer.from_tokenizer(demo, **options)
    with pytest.raises(TokenizerError, match="inputs: expected a text or texts"):
        TFGPT2Tokenizer.from_tokenizer(demo)([["a", "b"]])
