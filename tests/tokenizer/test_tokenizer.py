"""The tokenizer alone: ids and texts, control tokens, offsets, its files, and what is refused."""

import codecs
import json
import pickle
import random
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_multi.errors import InputError, TokenizerError
from gpt2_multi.tokenizer.engine.bpe import byte_characters, spell
from gpt2_multi.tokenizer.files import AddedToken
from gpt2_multi.tokenizer.special import any_of
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.effort import some
from tests.support.shared_data import shared

END = "<|endoftext|>"
WORDS = [" hello", " world", " the", "hello", "é", "中", "😀", "12", "''"]
TEXTS = ["hello world, the world", "", "12 中中 é😀\n\nhello  the", "a", "the <|endoftext|> hello é"]


def small_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary by hand: each word grows byte by byte from the left."""
    merges = []
    for word in (spell(text.encode()) for text in WORDS):
        merges += [(word[:size], word[size]) for size in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = dict.fromkeys([*byte_characters(), *(left + right for left, right in merges), END])
    return {token: at for at, token in enumerate(tokens)}, merges


def small(**options) -> GPT2Tokenizer:
    return GPT2Tokenizer(*small_files(), **options)


def write_small(folder, names=("vocab.json", "merges.txt")):
    vocab, merges = small_files()
    (folder / names[0]).write_text(json.dumps(vocab), "utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer.from_pretrained(shared("vocab", "gpt2"))


# --- ids and texts ---------------------------------------------------------------------------------------------------


def test_ids_are_those_of_gpt2(gpt2):
    for line in shared("fixtures", "tokens.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        text, ids = case["text"], case["ids"]
        assert gpt2.encode(text, split_special_tokens=True) == ids
        assert gpt2.encode(text) == gpt2(text, return_offsets_mapping=True).input_ids == case.get("ids_special", ids)
        assert gpt2.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    tokenizer = small()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_spaces_are_cleaned_up_where_that_is_asked_for():
    tokenizer = small()
    text = "y is ? do n't , it 's  ."
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    cleaned = tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=True)
    assert cleaned == tokenizer.clean_up_tokenization(text) == "y is? don't, it's ."


def test_errors_are_honoured():
    half = small().encode("ü")[:1]
    assert small().decode(half) == "\ufffd"
    assert small(errors="ignore").decode(half) == ""
    assert small().decode_bytes(half) == b"\xc3"
    with pytest.raises(UnicodeDecodeError):
        small(errors="strict").decode(half)


def test_lone_surrogates_are_replaced_and_pairs_joined():
    tokenizer = small()
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83d\ude00")) == "a\ufffdb😀"
    encoding = tokenizer("\udfffé\ud83d\ude00 hello", return_offsets_mapping=True)
    assert encoding.offset_mapping[-2:] == [(2, 4), (4, 10)]
    assert encoding.input_ids == tokenizer.encode("\ufffdé😀 hello")


def test_a_million_characters():
    tokenizer = small()
    for text in ("a" * 10**6, " " * 10**6, "😀" * 250_000, "".join(random.Random(0).choices("abcdefgh ", k=10**6))):
        assert tokenizer.decode(tokenizer.encode(text, truncation=False)) == text


def test_decode_takes_arrays_tuples_and_single_ids():
    tokenizer = small()
    ids = tokenizer.encode("hello world")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(tuple(ids)) == "hello world"
    assert tokenizer.decode(ids[0]) == "hello"
    assert tokenizer.decode(np.int64(ids[0])) == "hello"
    assert tokenizer.batch_decode([ids, ids[:1]], clean_up_tokenization_spaces=False) == ["hello world", "hello"]
    assert tokenizer.batch_decode(np.array([ids, ids])) == ["hello world"] * 2
    numbers = [ids[0], np.int32(ids[1]), np.array(ids[1])]
    assert tokenizer.decode(numbers) == tokenizer.batch_decode([numbers])[0] == "hello world world"
    assert tokenizer.convert_ids_to_tokens(numbers[:2]) == tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "hello world world"


def test_decode_takes_rows_and_cleans_up_as_its_attribute_says():
    """Rows, as transformers 5 takes them; `clean_up_tokenization_spaces`, as one loads with it in transformers 4."""
    tokenizer = small(clean_up_tokenization_spaces=True)
    ids = tokenizer.encode("hello .")
    for rows in ([ids, ids], np.array([ids, ids]), [np.array(ids), tuple(ids)]):
        assert tokenizer.decode(rows) == tokenizer.batch_decode(rows) == ["hello."] * 2
        assert tokenizer.decode(rows, clean_up_tokenization_spaces=False) == ["hello ."] * 2
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("hello .")) == "hello ."
    assert tokenizer.init_kwargs["clean_up_tokenization_spaces"] and not small().clean_up_tokenization_spaces


# --- control tokens --------------------------------------------------------------------------------------------------


def test_a_control_token_is_found_in_a_text_unless_it_is_switched_off():
    tokenizer, strict = small(), small(split_special_tokens=True)
    end, text = tokenizer.eos_token_id, f"hello{END}"
    found, plain = [*tokenizer.encode("hello"), end], strict.encode(text)
    assert tokenizer.encode(text) == tokenizer(text, return_offsets_mapping=True).input_ids == found
    assert end not in plain and tokenizer.decode(plain) == text
    assert tokenizer([text], split_special_tokens=True).input_ids == [plain]
    assert tokenizer.encode(text, allowed_special=set()) == plain
    assert tokenizer.tokenize(text, split_special_tokens=True) == strict.tokenize(text)
    assert strict.encode(text, split_special_tokens=False) == found
    assert strict.encode(text, allowed_special="all") == strict.encode(text, allowed_special={END}) == found
    strict.split_special_tokens = False
    assert strict.encode(text) == found
    with pytest.raises(TokenizerError, match="split_special_tokens: expected one of"):
        small(split_special_tokens="no")
    with pytest.raises(TokenizerError, match="split_special_tokens: expected one of"):
        tokenizer(text, split_special_tokens="no")


def test_a_control_token_may_be_refused():
    tokenizer = small()
    with pytest.raises(TokenizerError, match="at character 5"):
        tokenizer(f"hello{END}", disallowed_special="all")
    assert (
        tokenizer.encode(f"hello{END}", allowed_special={END}, disallowed_special="all")[-1] == tokenizer.eos_token_id
    )
    with pytest.raises(TokenizerError, match="allowed_special: expected some of"):
        tokenizer("hello", allowed_special={"<unheard>"})
    with pytest.raises(TokenizerError, match="allowed_special"):
        tokenizer("hello", allowed_special=END)


def test_added_words_are_always_recognised_and_control_tokens_unless_they_are_split():
    tokenizer = small()
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<word>", "<word>", "hello"]) == 1
    assert tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>"]}) == 2
    assert (len(tokenizer), tokenizer.vocab_size) == (size + 3, size)
    text = "<user> the<word>hello<pad>"
    plain, special = tokenizer.encode(text, split_special_tokens=True), tokenizer.encode(text)
    word, user, pad = tokenizer.convert_tokens_to_ids(["<word>", "<user>", "<pad>"])
    assert word in plain and user not in plain and pad not in plain
    assert [at for at in special if at in (word, user, pad)] == [user, word, pad]
    assert tokenizer.decode(special) == text
    assert tokenizer.decode(special, skip_special_tokens=True) == " the<word>hello"
    assert tokenizer.all_special_tokens == [END, "<pad>", "<user>"]
    assert tokenizer.added_tokens_encoder["<word>"] == word
    assert tokenizer.get_vocab()["<user>"] == user


def test_what_is_known_of_a_token_stays_when_it_gets_a_role(tmp_path):
    tokenizer = small()
    tokenizer.add_tokens([AddedToken("[CLS]", lstrip=True)])
    assert tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"}) == 1
    tokenizer.mask_token = "[CLS]"
    ids = tokenizer.encode("a  [CLS]b[SEP]")
    assert ids[1] == tokenizer.cls_token_id == tokenizer.mask_token_id and ids[3] == tokenizer.sep_token_id
    tokenizer.split_special_tokens = True
    tokenizer.save_pretrained(tmp_path)
    again = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (again.cls_token, again.sep_token, again.split_special_tokens) == ("[CLS]", "[SEP]", True)
    assert again.encode("a  [CLS]b[SEP]", split_special_tokens=False) == ids
    assert GPT2Tokenizer.from_pretrained(tmp_path, split_special_tokens=False).encode("a  [CLS]b[SEP]") == ids


CONTENTS = ["<user>", "<us", "user", ">", "x ", "é", "[CLS]", "hello", "lo w", "<<", "<", " w", "\n\n"]
PIECES = [*CONTENTS, END, *("x", " ", "  ", "\t", "\n", "a", "he", "llo", " world", "1", "中")]
PIECES += ["\u00a0", "\x1c", "\x85", "\u3000"]


@pytest.mark.parametrize("seed", range(some(200, 5)))
def test_tokens_are_found_where_transformers_finds_them(seed, tmp_path):
    """Random tokens of every kind, in random texts, read and split; transformers loads them from the files."""
    transformers = pytest.importorskip("transformers")
    rng, tokenizer = random.Random(seed), small(add_prefix_space=seed % 2 == 1)
    for content in rng.sample(CONTENTS, rng.randint(1, 6)):
        flags = {name: rng.random() < 0.3 for name in ("special", "lstrip", "rstrip", "single_word")}
        tokenizer.add_tokens([AddedToken(content, **flags, normalized=rng.choice([None, True, False]))])
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = GPT2Tokenizer.from_pretrained(tmp_path)
    for _ in range(100):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        for split in (False, True):
            ids = theirs(text, split_special_tokens=split)["input_ids"]
            ours = tokenizer(text, split_special_tokens=split, return_offsets_mapping=True).input_ids
            assert ours == ids == again.encode(text, split_special_tokens=split), (text, split)


def test_added_tokens_may_take_white_space():
    tokenizer = small()
    tokenizer.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    encoding = tokenizer("a  <l> b <r>  c", return_offsets_mapping=True)
    text = [tokenizer.decode(at) for at in encoding.input_ids]
    assert text == ["a", "<l>", " ", "b", " ", "<r>", "c"]
    assert encoding.offset_mapping[1] == (1, 6)


def test_a_control_token_stays_one_whatever_flags_it_is_given():
    tokenizer = small(split_special_tokens=True)
    tokenizer.add_tokens([AddedToken(END, lstrip=True)])
    assert tokenizer.eos_token_id not in tokenizer.encode(f"hello {END}")
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_additional_control_tokens_take_the_place_of_others_or_join_them():
    """As in transformers: those that are replaced are found in texts and skipped as before."""
    tokenizer = small()
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]}) == 2
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<c>"]}) == 1
    assert tokenizer.all_special_tokens == [END, "<c>"] and tokenizer.additional_special_tokens == ["<c>"]
    ids = tokenizer.encode("hello<a>1<c>2")
    assert len(ids) == 5 and tokenizer.decode(ids, skip_special_tokens=True) == "hello12"
    assert len(tokenizer.encode("<a>", split_special_tokens=True)) == 3
    tokenizer.add_special_tokens({"additional_special_tokens": ["<d>"]}, replace_additional_special_tokens=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<c>"]}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    assert tokenizer.extra_special_tokens == ["<c>", "<d>"]
    tokenizer.additional_special_tokens = ["<a>", "hello"]
    assert tokenizer.additional_special_tokens_ids == tokenizer.convert_tokens_to_ids(["<a>", "hello"])
    assert tokenizer.decode(tokenizer.encode("hello1"), skip_special_tokens=True) == "1"
    tokenizer.extra_special_tokens_ids = [tokenizer.convert_tokens_to_ids("<d>")]
    assert pickle.loads(pickle.dumps(tokenizer)).additional_special_tokens == ["<d>"]
    with pytest.raises(TokenizerError, match=r"'<x>'; add_special_tokens\(.'additional_special_tokens': \['<x>'\].\)"):
        tokenizer.additional_special_tokens = ["<d>", "<x>"]
    tokenizer.additional_special_tokens = None
    assert tokenizer.additional_special_tokens == []


def test_added_tokens_come_in_a_list_and_hold_no_lone_surrogate():
    tokenizer = small()
    with pytest.raises(TokenizerError, match="expected a list of tokens"):
        tokenizer.add_special_tokens({"additional_special_tokens": "<x>"})
    for name in ("a\ud800", AddedToken("\udfff")):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.add_tokens([name])


def test_longer_added_words_come_first():
    tokenizer = small()
    tokenizer.add_tokens(["<a", "<a>"])
    assert tokenizer.tokenize("<a><a") == ["<a>", "<a"]


@pytest.mark.parametrize("seed", range(30))
def test_many_added_words_are_found_like_few(seed):
    """They are divided by their first characters, which changes nothing but the time: 5,000 words took 75 times it."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("ab<|.", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 60))]
    text = "".join(rng.choices("ab<|. ", k=200))
    plainly = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
    assert re.compile(any_of(words)).findall(text) == plainly.findall(text)


def test_roles_are_assignable():
    tokenizer = small()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "Ā"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(TokenizerError, match="add_special_tokens"):
        tokenizer.pad_token = "<pad>"
    with pytest.raises(TokenizerError, match="expected some of"):
        tokenizer.add_special_tokens({"class_token": "x"})


def test_arguments_and_methods_of_2019(tmp_path):
    tokenizer = small(pad_token="<pad>", add_bos_token=True)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    text, ids = "hello world", tokenizer.encode("hello world", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    assert tokenizer.encode(text, max_length=5, pad_to_max_length=True) == [bos, *ids, pad, pad]
    assert tokenizer.encode(text, max_length=2, pad_to_max_length=True) == [bos, ids[0]]
    rows = tokenizer.batch_encode_plus([text, "a"], pad_to_max_length=True)["input_ids"]
    assert rows == tokenizer([text, "a"], padding=True).input_ids
    pair = tokenizer.encode_plus(text, text_pair=text, max_length=5, truncation_strategy="only_first")
    assert pair["input_ids"] == tokenizer(text, text, max_length=5, truncation="only_first").input_ids
    assert tokenizer.encode(text, truncation_strategy="do_not_truncate") == [bos, *ids]
    assert tokenizer.num_added_tokens() == 1 and tokenizer.num_added_tokens(pair=True) == 2
    assert tokenizer.build_inputs_with_special_tokens(ids) == tokenizer.encode(text)
    both = tokenizer(text, text, return_token_type_ids=True, return_special_tokens_mask=True)
    assert tokenizer.build_inputs_with_special_tokens(ids, ids) == both.input_ids
    assert tokenizer.create_token_type_ids_from_sequences(ids, ids) == both.token_type_ids
    assert tokenizer.get_special_tokens_mask(ids, ids) == both.special_tokens_mask
    assert (
        tokenizer.get_special_tokens_mask(both.input_ids, already_has_special_tokens=True) == both.special_tokens_mask
    )
    assert (tokenizer.max_len, tokenizer.max_len_single_sentence, tokenizer.max_len_sentences_pair) == (
        1024,
        1023,
        1022,
    )
    (write_small(tmp_path) / "tokenizer_config.json").write_text('{"max_len": 77}')
    assert GPT2Tokenizer.from_pretrained(tmp_path).model_max_length == 77
    assert GPT2Tokenizer.from_pretrained(tmp_path, max_len=88).model_max_length == 88
    assert tokenizer.tokenize("hello", add_prefix_space=True) == tokenizer.tokenize(" hello")
    assert tokenizer([["hello"]], is_split_into_words=True, add_prefix_space=False).input_ids == [
        tokenizer.encode(" hello")
    ]
    assert [tokenizer.decoder[at] for at in tokenizer.encoder.values()] == list(tokenizer.encoder)
    assert bytes(tokenizer.byte_decoder[char] for char in "".join(tokenizer.tokenize("é hello"))) == "é hello".encode()
    assert "".join(map(tokenizer.byte_encoder.get, "é hello".encode())) == "".join(tokenizer.tokenize("é hello"))
    assert list(tokenizer.bpe_ranks) == small_files()[1] and list(tokenizer.bpe_ranks.values())[:2] == [0, 1]


def test_bos_is_added_on_request():
    tokenizer = small(add_bos_token=True)
    bos, ids = tokenizer.bos_token_id, small().encode("hello")
    assert tokenizer.encode("hello") == [bos, *ids]
    assert tokenizer.encode("hello", "hello") == [bos, *ids, bos, *ids]
    assert tokenizer.encode("hello", add_special_tokens=False) == ids
    assert tokenizer("hello", return_special_tokens_mask=True).special_tokens_mask == [1, 0]
    assert (tokenizer.num_special_tokens_to_add(), tokenizer.num_special_tokens_to_add(pair=True)) == (1, 2)
    tokenizer.add_bos_token = False
    assert tokenizer.encode("hello") == ids
    tokenizer.add_bos_token, tokenizer.bos_token = True, None
    with pytest.raises(TokenizerError, match="add_bos_token"):
        tokenizer("hello")


# --- tokens and ids --------------------------------------------------------------------------------------------------


def test_tokens_and_ids():
    tokenizer = small()
    tokens = tokenizer.tokenize("hello world中")
    assert tokens == ["hello", "Ġworld", spell("中".encode())]
    assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(tokens)) == tokens
    assert tokenizer.convert_tokens_to_string(tokens) == "hello world中"
    assert tokenizer.convert_tokens_to_ids("no token") == tokenizer.unk_token_id
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, 0], skip_special_tokens=True) == ["Ā"]
    with pytest.raises(TokenizerError, match="'no token'"):
        tokenizer.convert_tokens_to_string(["no token"])


# --- offsets ---------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("helo wrd\n中é😀1'\ud800<|>"), max_size=30), st.booleans())
def test_offsets_slice_the_users_text(text, prefix):
    tokenizer = small(add_prefix_space=prefix)
    encoding = tokenizer(text, return_offsets_mapping=True)
    assert encoding.input_ids == tokenizer(text).input_ids
    covered = 0
    for at, (start, stop) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        raw, part = tokenizer.decode_bytes(at), text[start:stop].encode("utf-16", "surrogatepass")
        part = part.decode("utf-16", "replace").encode()
        assert raw in part or raw in b" " + part
        assert start <= covered
        covered = max(covered, stop)
    assert covered == len(text)


def test_offsets_of_split_words_count_from_the_word():
    tokenizer = small()
    encoding = tokenizer([["hello", "world12"], ["é"]], is_split_into_words=True, return_offsets_mapping=True)
    assert encoding.word_ids(0) == [0, 1, 1]
    assert encoding.offset_mapping[0] == [(0, 5), (0, 5), (5, 7)]
    assert tokenizer.decode(encoding.input_ids[0]) == " hello world12"
    assert tokenizer(["hello", "world"], is_split_into_words=True).input_ids == tokenizer.encode(" hello world")


def test_word_ids_and_sequence_ids_follow_padding_and_bos():
    tokenizer = small(add_bos_token=True, padding_side="left")
    encoding = tokenizer(
        ["hello", "a"], ["the", " world hello"], padding=True, return_offsets_mapping=True, return_tensors="np"
    )
    assert encoding.input_ids.shape[1] == len(encoding.word_ids(0)) == len(encoding.sequence_ids(1))
    assert encoding.sequence_ids(1) == [None, 0, None, 1, 1]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_both_pairs_of_files(tmp_path, names):
    tokenizer = GPT2Tokenizer.from_pretrained(write_small(tmp_path, names))
    assert [tokenizer.encode(text) for text in TEXTS] == [small().encode(text) for text in TEXTS]


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_files_may_have_been_through_an_editor(tmp_path, names):
    """Byte order marks, ends of lines, tabs, spaces and empty lines mean nothing, nor which version the header says."""
    vocab, merges = (write_small(tmp_path, names) / name for name in names)
    header, *lines = merges.read_text("utf-8").splitlines()
    vocab.write_bytes(codecs.BOM_UTF8 + vocab.read_bytes())
    for text in [
        "\n".join(lines),
        "\r\n".join(["\ufeff#version: 0.4 - trained", *lines, ""]),
        "\n".join(["", f" {header}  ", *(line.replace(" ", "\t") for line in lines), "", " ", ""]),
        "\ufeff" + "\r".join(f" {line}\t" for line in lines),
    ]:
        merges.write_bytes(text.encode())
        assert GPT2Tokenizer.from_pretrained(tmp_path)._bpe.merges == small_files()[1]
    merges.write_text("\n".join([header, "# comment of three", *lines]), "utf-8")
    with pytest.raises(TokenizerError, match=f"{names[1]}, merge 0: expected two tokens"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_lost_merges_are_missed(tmp_path):
    """A pointer of Git LFS, two words a line, and a file that was cut off after its header."""
    vocab, merges = (write_small(tmp_path) / name for name in ("vocab.json", "merges.txt"))
    vocab.write_text(json.dumps(small_files()[0] | {f"ab{number}": 1000 + number for number in range(256)}), "utf-8")
    for text, sentence in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "merges; it is a pointer of Git LFS"),
        ("#version: 0.2\n", r"has no merges, although \d+ tokens are longer than a byte; fetch it again"),
    ]:
        merges.write_text(text, "utf-8")
        with pytest.raises(TokenizerError, match=rf"merges\.txt: .*{sentence}"):
            GPT2Tokenizer.from_pretrained(tmp_path)


def test_saved_tokenizers_come_back(tmp_path):
    tokenizer = small(padding_side="left", add_prefix_space=True, errors="strict", model_max_length=5)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>"]})
    tokenizer.add_tokens([AddedToken("<word>", lstrip=True)])
    paths = tokenizer.save_pretrained(tmp_path / "new")
    names = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names | {"added_tokens.json"}
    assert len(paths) == 6
    for leave_out in ((), ("tokenizer.json",), ("vocab.json",), ("tokenizer_config.json", "special_tokens_map.json")):
        for name in leave_out:
            (tmp_path / "new" / name).unlink()
        again = GPT2Tokenizer.from_pretrained(tmp_path / "new")
        text = "hello  <word> <user>"
        assert again.encode(text, allowed_special={"<user>"}) == tokenizer.encode(text, allowed_special={"<user>"})
        assert again.get_vocab() == tokenizer.get_vocab()
        if "tokenizer_config.json" not in leave_out:
            assert (again.padding_side, again.errors, again.model_max_length) == ("left", "strict", 5)
            assert again.pad_token == "<pad>"
        tokenizer.save_pretrained(tmp_path / "new")


def test_unknown_entries_of_the_config_are_written_back(tmp_path):
    write_small(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x", "pad_token": {"content": "<p>"}}')
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path, padding_side="left")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<p>", "left")
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "x"


def test_tokenizer_json_comes_first(tmp_path):
    write_small(tmp_path)
    other = GPT2Tokenizer({**{char: at for at, char in enumerate(byte_characters())}, END: 256}, [])
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert len(GPT2Tokenizer.from_pretrained(tmp_path).encode("hello")) == 5


def test_save_vocabulary(tmp_path):
    vocab, merges = small().save_vocabulary(tmp_path, "my")
    assert vocab.endswith("my-vocab.json") and merges.endswith("my-merges.txt")
    assert GPT2Tokenizer(vocab, merges).encode("hello world") == small().encode("hello world")


def test_pickling():
    tokenizer = small(pad_token="<pad>")
    tokenizer.add_tokens(["<word>"])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again("hello<word>", padding=True) == tokenizer("hello<word>", padding=True)


def test_importing_takes_no_framework():
    code = "import sys, gpt2_multi.tokenizer.tokenizer; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "regex", "torch", "tensorflow", "jax", "transformers"} & set(eval(loaded))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": -1}, "max_length: expected a whole number of at least 0, found -1"),
        ({"max_length": 2.5, "truncation": True}, "max_length: expected a whole number"),
        ({"padding": "widest"}, "padding: expected one of"),
        ({"truncation": "some"}, "truncation: expected one of"),
        ({"truncation": []}, "truncation: expected one of"),
        ({"truncation": "only_second", "max_length": 0}, "needs a text_pair"),
        ({"padding_side": "top", "padding": True}, "padding_side: expected one of"),
        ({"pad_to_multiple_of": 0, "padding": True}, "pad_to_multiple_of"),
        ({"return_tensors": "mlx"}, "return_tensors: expected one of"),
        (
            {"stride": 3, "max_length": 1, "truncation": True, "return_overflowing_tokens": True},
            "stride: expected less",
        ),
        ({"stride": -1}, "stride"),
        ({"text_pair": ["a"]}, "text_pair: expected one per text"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(TokenizerError, match=message):
        small()("hello world", **options)


def test_padding_to_no_length():
    with pytest.raises(TokenizerError, match="needs one"):
        small(model_max_length=10**30)("hello", padding="max_length")
    with pytest.raises(TokenizerError, match="pad_token or an eos_token"):
        small(eos_token=None)("hello", padding=True)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", None], [["a"]], {"a": 1}])
def test_what_is_not_a_text(text):
    with pytest.raises(TokenizerError, match="text: expected a str"):
        small()(text)


def test_words_that_are_not_split():
    with pytest.raises(TokenizerError, match="expected a list of words"):
        small()("hello world", is_split_into_words=True)


@pytest.mark.parametrize(
    "ids", [[10**9], [-1], ["hello"], [1.5], [1.0], [True], True, 1.0, [[1.5]], np.array([1.0]), [None], 10**9]
)
def test_ids_outside_the_vocabulary(ids):
    for method in (small().decode, small().decode_bytes, small().convert_ids_to_tokens):
        with pytest.raises(TokenizerError, match="ids: expected whole numbers"):
            method(ids)


def test_unknown_arguments_that_resemble_none():
    with pytest.raises(TypeError, match="'zzz'; leave it out"):
        small(zzz=1)


def test_a_tokenizer_is_loaded_as_people_call_it(tmp_path):
    small().save_pretrained(save_directory=tmp_path / "inner")
    tokenizer = GPT2Tokenizer.from_pretrained(
        pretrained_model_name_or_path=tmp_path, subfolder="inner", use_fast=True, trust_remote_code=True, token=None,
        config=None, local_files_only=True, revision="main", padding_side="left", verbose=False,
    )  # fmt: skip
    assert tokenizer("aab").input_ids == small(use_fast=False)("aab").input_ids and tokenizer.padding_side == "left"
    with pytest.raises(InputError, match="gguf_file: expected None, found 'x'; GGUF files are not read"):
        GPT2Tokenizer.from_pretrained(tmp_path / "inner", gguf_file="x")
    with pytest.raises(TypeError, match="did you mean 'padding_side'"):
        GPT2Tokenizer.from_pretrained(tmp_path / "inner", pading_side="left")


def test_a_row_longer_than_max_length_keeps_its_length():
    encoding = small()(["aaaaaa", "a"], padding="max_length", max_length=3, truncation=False)
    assert list(map(len, encoding.input_ids)) == [6, 3]


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'truncation'"):
        small()("hello", truncate=True)
    with pytest.raises(TypeError, match="did you mean 'padding_side'"):
        small(pading_side="left")
    with pytest.raises(TypeError, match="did you mean 'text'"):
        small()("hello", text_=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json: there is no such file"),
        ("vocab.json", "{", "vocab.json: not valid JSON"),
        ("vocab.json", "[" * 10**5, "vocab.json: not valid JSON"),
        ("vocab.json", "[]", "vocab.json: expected a JSON object"),
        ("vocab.json", '{"a": "b"}', "expected a whole number as the id of 'a', found 'b'"),
        ("vocab.json", '{"a": 1, "b": 1}', "expected each id once"),
        ("vocab.json", '{"a": 1}', "merge 0"),
        ("merges.txt", None, "merges.txt: there is no such file"),
        ("merges.txt", "a b c\n", "merges.txt, merge 0: expected two tokens"),
        ("merges.txt", "x yz\n", "merge 0.*names 'yz'"),
        ("merges.txt", "\u0120 \u0121\n", "merge 0.*makes"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"padding_side": "top"}', "padding_side"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"0": {"content": "zz"}}}',
            "'zz': expected an id of its own",
        ),
        ("tokenizer.json", "{}", "tokenizer.json: expected a tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "expected model.type to be 'BPE'"),
        ("tokenizer.json", '{"model": {}, "normalizer": {"type": "NFC"}}', "found no 'merges'"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    write_small(tmp_path)
    path = tmp_path / name
    path.unlink() if content is None else path.write_text(content, "utf-8")
    with pytest.raises(TokenizerError, match=message):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_files_that_are_not_text(tmp_path):
    write_small(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="expected UTF-8"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="found none of them"):
        (tmp_path / "empty").mkdir()
        GPT2Tokenizer.from_pretrained(tmp_path / "empty")
    with pytest.raises(TokenizerError, match="cannot be written"):
        small().save_pretrained(tmp_path / "merges.txt" / "below")
    with pytest.raises(TokenizerError, match="expected a path or the content"):
        GPT2Tokenizer(3, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_record_of_words_is_as_long_as_its_row(side):
    options = {"padding": "max_length", "max_length": 4, "truncation": False, "padding_side": side}
    encoding = small()(["a", "a b c d e f"], return_offsets_mapping=True, **options)
    assert len(encoding.input_ids[0]) == 4 < len(encoding.input_ids[1])
    for row in (0, 1):
        assert len(encoding.word_ids(row)) == len(encoding.sequence_ids(row)) == len(encoding.input_ids[row])
    assert encoding.word_ids(0).count(None) == 3 and (encoding.word_ids(0)[0] is None) == (side == "left")
