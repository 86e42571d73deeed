"""What a call of the tokenizer gives: rows, pairs, windows, padding and arrays, as transformers gives them."""

import collections
import copy
import pickle
import warnings

import numpy as np
import pytest

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.encoding import BatchEncoding
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.tokenizer.test_tokenizer import END, TEXTS, small, small_files

# --- calls, against transformers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("peer")
    small(model_max_length=1024).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
    tokenizer.pad_token = END
    return tokenizer


CALLS = [
    {},
    {"padding": True},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"padding": "longest", "pad_to_multiple_of": 8, "padding_side": "left"},
    {"truncation": True, "max_length": 3, "return_offsets_mapping": True},
    {"truncation": True, "max_length": 0},
    {"truncation": True, "max_length": 4, "stride": 2, "return_overflowing_tokens": True, "return_length": True},
    {"return_special_tokens_mask": True, "return_attention_mask": False, "padding": True},
    {"return_token_type_ids": True},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "single"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_calls_give_what_transformers_gives(peer, options, batched, side):
    tokenizer = small()
    tokenizer.truncation_side = peer.truncation_side = side
    for text in [TEXTS] if batched else TEXTS:
        assert dict(tokenizer(text, **options)) == dict(peer(text, **options))


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second", True])
@pytest.mark.parametrize("limit", range(10))
def test_pairs_give_what_transformers_gives(peer, strategy, limit):
    tokenizer, peer.truncation_side = small(), "right"
    options = {"truncation": strategy, "max_length": limit}
    for first, second in (("hello" * 3, "12" * 4), ("12" * 6, "hello"), ("é", "中" * 5), ("the" * 2, "12" * 6)):
        try:
            want = dict(peer(first, second, return_token_type_ids=True, **options))
        except (Exception, BaseException) as error:
            assert "too short" in str(error)
            with pytest.raises(TokenizerError, match="max_length"):
                tokenizer(first, second, **options)
        else:
            assert dict(tokenizer(first, second, return_token_type_ids=True, **options)) == want


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_over_pairs_give_what_transformers_gives(peer, side):
    tokenizer = small(truncation_side=side)
    peer.truncation_side = side
    options = {"max_length": 8, "stride": 2, "return_overflowing_tokens": True, "return_offsets_mapping": True}
    for strategy, first, second in (("only_first", "ab c" * 9, " world"), ("only_second", "hello 12", "x y" * 9)):
        ours = tokenizer([first] * 2, [second] * 2, truncation=strategy, padding=True, **options)
        theirs = peer([first] * 2, [second] * 2, truncation=strategy, padding=True, **options)
        assert dict(ours) == {name: theirs[name] for name in ours}
        assert [ours.sequence_ids(at) for at in range(3)] == [theirs.sequence_ids(at) for at in range(3)]
    with pytest.raises(TokenizerError, match="windows over a pair"):
        tokenizer("ab c" * 9, "d", truncation=True, **options)


def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = small(add_bos_token=True, pad_token="<pad>", additional_special_tokens=["<user>"], model_max_length=77)
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in (transformers.GPT2Tokenizer, transformers.AutoTokenizer):
            theirs = kind.from_pretrained(tmp_path)
            text = "<user> hello<word>中<pad>é"
            assert theirs(text)["input_ids"] == tokenizer(text).input_ids
            assert (theirs.pad_token_id, theirs.model_max_length) == (tokenizer.pad_token_id, 77)
            assert len(theirs) == len(tokenizer)


def test_reads_what_transformers_saved(tmp_path, peer):
    peer.save_pretrained(tmp_path)
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer(text)["input_ids"]
    assert tokenizer.pad_token == END


# --- padding ---------------------------------------------------------------------------------------------------------


def test_what_was_assigned_to_a_tokenizer_of_transformers_is_taken_along(peer):
    """transformers does not save it, and a text of a stranger would get a control token."""
    theirs = copy.deepcopy(peer)
    theirs.split_special_tokens, theirs.padding_side, theirs.truncation_side = True, "left", "left"
    ours = GPT2Tokenizer.from_tokenizer(theirs)
    assert ours.encode(f"a{END}") == theirs.encode(f"a{END}") and len(ours.encode(END)) > 1
    for options in ({"padding": "max_length", "max_length": 9}, {"truncation": True, "max_length": 2}):
        assert ours.encode("aab the world", **options) == theirs.encode("aab the world", **options)
    assert GPT2Tokenizer.from_tokenizer(peer).split_special_tokens is False


def test_padding_without_a_pad_token_takes_the_end_token():
    tokenizer = small()
    encoding = tokenizer(["hello", "the world"], padding=True)
    assert encoding.input_ids[0][-1] == tokenizer.eos_token_id
    assert encoding.attention_mask[0][-1] == 0
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer(["hello", "the world"], padding=True).input_ids[0][-1] == tokenizer.pad_token_id


def test_pad():
    tokenizer = small(padding_side="left")
    rows = [tokenizer("hello"), tokenizer("the world")]
    together = tokenizer(["hello", "the world"], padding=True)
    assert tokenizer.pad(rows) == together
    assert tokenizer.pad(tokenizer(["hello", "the world"])) == together
    assert tokenizer.pad({"input_ids": [np.array([1]), np.array([2, 3])]}, return_tensors="np").input_ids[0, 1] == 1
    assert tokenizer.pad(rows[0], padding="max_length", max_length=3).attention_mask == [0, 0, 1]
    assert len(tokenizer.pad({"input_ids": [1, 2, 3], "other": "x"}, pad_to_multiple_of=4).input_ids) == 4
    with pytest.raises(TokenizerError, match="input_ids"):
        tokenizer.pad({"labels": [1]})


@pytest.mark.parametrize("framework", ["np", "pt", "tf", "jax"])
def test_arrays_of_each_framework(framework):
    pytest.importorskip({"np": "numpy", "pt": "torch", "tf": "tensorflow", "jax": "jax"}[framework])
    tokenizer = small()
    encoding = tokenizer(["hello", "the world"], padding=True, return_tensors=framework)
    assert tuple(encoding.input_ids.shape) == tuple(encoding["attention_mask"].shape)
    assert str(encoding.input_ids.dtype).rpartition(".")[2].strip("<>'") in (
        "int64" if framework in ("np", "pt") else "int32",
        "dtype: 'int32",
    )
    assert tokenizer.batch_decode(encoding.input_ids, skip_special_tokens=True) == ["hello", "the world"]
    assert tuple(tokenizer("hello", return_tensors=framework).input_ids.shape) == (1, 1)
    assert tuple(tokenizer([""], return_tensors=framework).input_ids.shape) == (1, 0)
    with pytest.raises(TokenizerError, match="differ in length"):
        tokenizer(["hello", "the world"], return_tensors=framework)


def test_encodings_move_to_a_device():
    torch = pytest.importorskip("torch")
    encoding = small()("hello", return_tensors="pt").to("meta")
    assert encoding.input_ids.device == torch.device("meta")
    with pytest.raises(TokenizerError, match="return_tensors"):
        small()("hello").to("cpu")
    with pytest.raises(AttributeError, match="not among the entries"):
        encoding.token_type_ids  # noqa: B018


FIELDS = ("ids", "type_ids", "tokens", "offsets", "attention_mask", "special_tokens_mask", "word_ids", "sequence_ids")
OF_TOKENS = ("token_to_chars", "token_to_word", "token_to_sequence")
OF_TEXTS = ("char_to_token", "char_to_word", "word_to_tokens", "word_to_chars")


def answered(method, *places):
    """What a method of an encoding says; None where transformers stumbles over there being nothing."""
    try:
        return method(*places)
    except TypeError:
        return None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"padding": True}, {"truncation": "only_first", "max_length": 12}], ids=str)
@pytest.mark.parametrize("pairs", [None, ["a b", "", "中<word> 12"]], ids=["alone", "pairs"])
def test_encodings_say_what_transformers_says_of_tokens_words_and_characters(tmp_path, options, side, pairs):
    """With bytes inside of characters, an added word, an empty text, and windows over what is cut off."""
    transformers = pytest.importorskip("transformers")
    tokenizer = small(padding_side=side, truncation_side=side, add_bos_token=True, pad_token=END)
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_bos_token = True
    if "max_length" in options:
        options = {**options, "return_overflowing_tokens": True, "stride": 1}
    texts = ["hello €12", "é<word>", " the  👩‍👧 world"]
    ours, theirs = tokenizer(texts, pairs, **options), theirs(texts, pairs, **options)
    assert len(ours.encodings) == len(theirs.encodings) >= 3 and ours.is_fast
    assert (ours.n_sequences, ours[0].n_sequences) == (theirs.n_sequences, theirs[0].n_sequences)
    for row, ids in enumerate(theirs["input_ids"]):
        assert (ours.tokens(row), ours.word_ids(row)) == (theirs.tokens(row), theirs.word_ids(row))
        assert ours.sequence_ids(row) == theirs.sequence_ids(row)
        assert [getattr(ours[row], name) for name in FIELDS] == [getattr(theirs[row], name) for name in FIELDS]
        places = [(name, row, at) for name in OF_TOKENS for at in range(len(ids) + 1)]
        places += [(name, row, at, text) for name in OF_TEXTS for at in range(15) for text in range(ours.n_sequences)]
        for name, *at in places:
            assert answered(getattr(ours, name), *at) == answered(getattr(theirs, name), *at), (name, at)
    assert ours.char_to_token(3) == theirs.char_to_token(3) and ours.word_to_tokens(0) == theirs.word_to_tokens(0)
    assert ours.word_to_tokens(1).start == theirs.word_to_tokens(1).start and len(ours[1:]) == len(theirs[1:])


def test_an_encoding_is_pickled_without_its_tokenizer():
    tokenizer = small()
    encoding = tokenizer("hello world")
    again = pickle.loads(pickle.dumps(encoding))
    assert again == encoding and len(pickle.dumps(encoding)) < 500
    with pytest.raises(TokenizerError, match="no record of words and characters is in a copy of an encoding; ask"):
        again.tokens()
    assert again.encodings is None and not again.is_fast and again.n_sequences == 1
    asked = pickle.loads(pickle.dumps(tokenizer("hello world", return_offsets_mapping=True)))
    assert asked.tokens() == copy.copy(encoding).tokens() == encoding.copy().tokens() == ["hello", "Ġworld"]
    stale = tokenizer("hello")
    tokenizer.add_tokens(["he"])
    with pytest.raises(TokenizerError, match="the tokenizer has changed since it made this encoding"):
        stale.tokens()


def test_encodings_are_made_by_hand_and_become_arrays():
    pytest.importorskip("torch")
    encoding = BatchEncoding(
        {"input_ids": [1, 2], "labels": np.array([3, 4])}, tensor_type="pt", prepend_batch_axis=True
    )
    assert {tuple(value.shape) for value in encoding.values()} == {(1, 2)} and encoding.n_sequences is None
    kept = encoding.input_ids
    assert encoding.convert_to_tensors("pt") is encoding and encoding.input_ids is kept
    assert encoding.convert_to_tensors("np").labels.tolist() == [[3, 4]] and encoding[:0]["labels"].shape == (0, 2)
    with pytest.raises(TokenizerError, match="expected numbers in 'text'"):
        BatchEncoding({"text": ["a"]}, tensor_type="np")


def test_ids_stay_whole_numbers_where_a_dtype_is_given():
    torch = pytest.importorskip("torch")
    encoding = small()("hello", return_tensors="pt").to(torch.float16)
    assert {value.dtype for value in encoding.values()} == {torch.int64}


def test_what_transformers_users_call():
    tokenizer = small()
    expected = tokenizer(["hello", "a"], ["world", "b"])
    assert tokenizer([("hello", "world"), ("a", "b")]) == tokenizer.batch_encode_plus([["hello", "world"], ["a", "b"]])
    assert tokenizer([("hello", "world"), ("a", "b")]).data == expected
    assert tokenizer.encode_plus("hello") == tokenizer("hello")
    column = collections.UserList(["hello", "a"])  # as a column of `datasets` is no list
    assert tokenizer(column, column) == tokenizer(column.data, column.data)
    assert tokenizer(collections.UserList([["a", "b"]]), is_split_into_words=True).input_ids == [
        tokenizer.encode(" a b")
    ]
    assert tokenizer.is_fast and list(tokenizer("hello")) == list(tokenizer.model_input_names)
    assert tokenizer.get_added_vocab() == {END: tokenizer.eos_token_id}


def test_a_call_gives_what_model_input_names_says(tmp_path):
    tokenizer = small(model_input_names=["input_ids", "token_type_ids"])
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, GPT2Tokenizer.from_pretrained(tmp_path)):
        assert list(made("a", "a")) == ["input_ids", "token_type_ids"]
        assert list(made("a", return_attention_mask=True, return_token_type_ids=False)) == [
            "input_ids",
            "attention_mask",
        ]
        assert list(made.pad({"input_ids": [1]})) == ["input_ids"]


def test_the_constructor_takes_a_whole_tokenizer(tmp_path):
    """By transformers' names: `vocab` and `merges`, `tokenizer_file`, `tokenizer_object`."""
    vocab, merges = small_files()
    added = small(add_bos_token=True, pad_token="<pad>")
    added.save_pretrained(tmp_path)
    text = f"hello{END}<pad> world"
    assert GPT2Tokenizer(vocab=vocab, merges=merges).encode(text) == small().encode(text)
    assert GPT2Tokenizer(tokenizer_file=tmp_path / "tokenizer.json").encode(text) == added.encode(text)
    with pytest.raises(TokenizerError, match="for a file there is tokenizer_file"):
        GPT2Tokenizer(tokenizer_object="tokenizer.json")
    with pytest.raises(TokenizerError, match="give both, or tokenizer_file, or call from_pretrained"):
        GPT2Tokenizer(vocab)
    backend = pytest.importorskip("tokenizers") and added.backend_tokenizer
    assert GPT2Tokenizer(tokenizer_object=backend).encode(text) == added.encode(text) == backend.encode(text).ids


def test_what_other_libraries_ask_a_tokenizer(tmp_path):
    """Fingerprints of `datasets` are of what is pickled, which no call may change; a copy of a copy is the same."""
    tokenizer = small(pad_token="<pad>", cls_token="[CLS]", chat_template={"default": "x"})
    before = pickle.dumps(tokenizer)
    tokenizer("hello[CLS] <pad>", return_offsets_mapping=True).tokens()
    assert pickle.dumps(tokenizer) == before == pickle.dumps(copy.deepcopy(tokenizer))
    assert (
        tokenizer.init_kwargs.items() >= {"cls_token": "[CLS]", "errors": "replace", "model_max_length": 1024}.items()
    )
    assert GPT2Tokenizer(*small_files(), **tokenizer.init_kwargs).encode("[CLS]") == tokenizer.encode("[CLS]")
    assert repr(tokenizer).startswith(
        "GPT2Tokenizer(name_or_path='', vocab_size=282, tokens=284, model_max_length=1024"
    )
    assert tokenizer.pad_token_type_id == 0 and "cls_token" in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    assert tokenizer.decode([281, 32], True, False, spaces_between_special_tokens=False) == tokenizer.decode(32)
    backend = pytest.importorskip("tokenizers") and tokenizer.backend_tokenizer
    assert backend.encode("hello[CLS] é").ids == tokenizer.encode("hello[CLS] é")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_cls_and_the_other_tokens_are_in_every_file(tmp_path, name):
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "<pad>"}
    tokenizer = small()
    assert tokenizer.add_special_tokens({**roles, "unk_token": "hello"}) == 4
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    again = GPT2Tokenizer.from_pretrained(tmp_path)
    for role, token in roles.items():
        assert getattr(again, role) == token
        assert getattr(again, f"{role}_id") == getattr(tokenizer, f"{role}_id") == again.encode(f"a{token}")[1]
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.special_tokens_map == tokenizer.special_tokens_map
    theirs.save_pretrained(tmp_path / "theirs")
    assert GPT2Tokenizer.from_pretrained(tmp_path / "theirs").special_tokens_map == tokenizer.special_tokens_map


def test_jax_encodings_move_to_a_device():
    jax = pytest.importorskip("jax")
    device = jax.devices()[0]
    assert small()("hello", return_tensors="jax").to(device).input_ids.devices() == {device}
