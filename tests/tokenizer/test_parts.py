"""What only a tokenizer.json can say: it is done as the library that writes such files does it, or refused by name."""

import json
import random
import warnings

import pytest

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.errors import TokenizerError
from tests.support.effort import some
from tests.tokenizer.test_tokenizer import END, WORDS, small_files

OUTSIDE = ("<s>", "</s>", "[CLS]", "[SEP]")
PIECES = [*WORDS, "HELLO", "e\u0301", "\ufb01", "\u212a", "\u017f", "\u0130", "\u03a3", "\u0663", "\u2167", "\u00bd"]
PIECES += [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\u3000",
    "'s",
    "'LL",
    "zzz",
    " zzz",
    "1",
    "<user>",
    "<USER>",
    END,
    "<s>",
    ".",
    "!?",
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NORMALIZERS = [
    *({"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")),
    {"type": "Prepend", "prepend": "_"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": False},
]
PATTERNS = [{"Regex": CL100K}, {"Regex": r"\p{N}{1,3}"}, {"Regex": r"\s+"}, {"Regex": "[a-z]+|\\S"}, {"String": "l"}]
BEHAVIORS = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def vocabulary():
    """The small one, with tokens that no merges make."""
    vocab, merges = small_files()
    for token in (*OUTSIDE, "\u0120zzz", "HEL"):
        vocab[token] = len(vocab)
    return vocab, merges


def level(rng):
    """ByteLevel in one of its ways."""
    return {"type": "ByteLevel", **{name: rng.random() < 0.5 for name in ("add_prefix_space", "trim_offsets")}}


def digits_of(rng):
    """Digits cut apart."""
    return {"type": "Digits", "individual_digits": rng.random() < 0.5}


def cut_of(rng):
    """A cut in one of its ways."""
    if rng.random() < 0.4:
        return digits_of(rng)
    pattern, behavior = rng.choice(PATTERNS), rng.choice(BEHAVIORS)
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": rng.random() < 0.4}


def processor_of(rng, vocab):
    """A post-processor: one of the four that add tokens, alone or after ByteLevel, or ByteLevel alone, or none."""
    ids = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (END, "</s>")}
    begin, end, mark = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (END, "</s>", END))
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    cls, sep = ([token, vocab[token]] for token in ("[CLS]", "[SEP]"))
    found = rng.choice(
        [
            None,
            level(rng),
            {**level(rng), "type": "RobertaProcessing", "cls": cls, "sep": sep},
            {"type": "BertProcessing", "cls": cls, "sep": sep},
            {
                "type": "TemplateProcessing", "special_tokens": ids, "single": [begin, first, end],
                "pair": [begin, first, mark, second, end],
            },
            {
                "type": "TemplateProcessing", "special_tokens": {END: ids[END]}, "single": [first, mark],
                "pair": [first, mark, second, {"SpecialToken": {"id": END, "type_id": 1}}],
            },
        ]
    )  # fmt: skip
    is_wrapped = found and found["type"] != "ByteLevel" and rng.random() < 0.4
    return {"type": "Sequence", "processors": [level(rng), found]} if is_wrapped else found


def described(rng, normalizers=NORMALIZERS, cut=cut_of):
    """A tokenizer.json of random parts."""
    vocab, merges = vocabulary()
    tokens = {**{token: vocab[token] for token in (*OUTSIDE, END)}, "<user>": len(vocab)}
    added = [
        {"id": at, "content": token, "special": token != "<user>", "normalized": token == "<user>"}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, at in sorted(tokens.items(), key=lambda item: item[1])
    ]
    steps = rng.sample(normalizers, min(rng.choice([0, 0, 1, 2]), len(normalizers)))
    bytes_level = {**level(rng), "use_regex": rng.random() < 0.75}
    cuts = [cut(rng) for _ in range(rng.choice([0, 1, 1]))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, bytes_level]} if cuts else bytes_level,
        "post_processor": processor_of(rng, vocab), "decoder": level(rng),
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": rng.random() < 0.3, "vocab": vocab, "merges": merges},
    }  # fmt: skip


def text_of(rng):
    """Some pieces, of which one or the other means something to a part."""
    return "".join(rng.choices(PIECES, k=rng.randint(0, 8)))


def written(folder, data):
    """The folder with this tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    return folder


@pytest.mark.parametrize("seed", range(some(500, 12)))
def test_parts_do_what_they_do_in_the_library_that_writes_them(seed, tmp_path):
    """Random parts together, read, and read again after we saved them, by us and by the other two."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    rng = random.Random(seed)
    written(tmp_path, described(rng))
    theirs, ours = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json"), GPT2Tokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    again = GPT2Tokenizer.from_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    shown, engine = ("special_tokens_mask", "token_type_ids"), ours.backend_tokenizer
    for _ in range(30):
        text, pair = text_of(rng), text_of(rng) or "a"
        for given in ((text,), (text, pair)):
            row = theirs.encode(*given)
            found = ours(*given, return_token_type_ids=True, return_special_tokens_mask=True)
            assert found.input_ids == row.ids == again.encode(*given) == saved(*given)["input_ids"], given
            assert engine.encode(*given).ids == row.ids
            assert [found[name] for name in shown] == [row.special_tokens_mask, row.type_ids], given
        bare = ours.encode(text, add_special_tokens=False)
        assert ours.build_inputs_with_special_tokens(bare) == ours.encode(text)


def test_the_fast_tokenizer_reads_the_same(tmp_path):
    pytest.importorskip("gigatoken")
    from gpt2_multi import GPT2TokenizerFast

    for seed in range(some(100, 10)):
        rng = random.Random(seed)
        written(tmp_path, described(rng))
        plain, fast = (kind.from_pretrained(tmp_path) for kind in (GPT2Tokenizer, GPT2TokenizerFast))
        for text in (text_of(rng) for _ in range(30)):
            assert fast.encode(text) == plain.encode(text)


@pytest.mark.parametrize("name", ["RobertaProcessing", "ByteLevel"])
def test_spans_lose_their_spaces_where_the_file_says_so(name, tmp_path):
    tokenizers, rng = pytest.importorskip("tokenizers"), random.Random(3)
    tokens = {key: [token, vocabulary()[0][token]] for key, token in (("cls", "<s>"), ("sep", "</s>"))}
    tokens = tokens if name == "RobertaProcessing" else {}
    for prefix in (False, True):
        data = described(rng, normalizers=[{"type": "Lowercase"}], cut=digits_of)
        data["post_processor"] = {"type": name, "trim_offsets": True, "add_prefix_space": prefix, **tokens}
        written(tmp_path, data)
        theirs = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
        ours = GPT2Tokenizer.from_pretrained(tmp_path)
        for text in (text_of(rng).replace("\u0130", "I") for _ in range(100)):
            assert ours(text, return_offsets_mapping=True).offset_mapping == theirs.encode(text).offsets, text


def test_a_text_that_is_changed_before_it_is_read_has_no_offsets(tmp_path):
    data = described(random.Random(0), normalizers=[])
    written(tmp_path, {**data, "normalizer": {"type": "NFC"}})
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer("\u00e9", return_offsets_mapping=True).offset_mapping
    with pytest.raises(TokenizerError, match="return_offsets_mapping: expected a text that NFC of tokenizer"):
        tokenizer("e\u0301", return_offsets_mapping=True)
    words = ["cafe\u0301", "de\u0301ja"]
    joined = "".join(f" {word}" for word in words)
    assert tokenizer(words, is_split_into_words=True).input_ids == tokenizer(joined).input_ids


def test_begin_and_end_are_settings_where_settings_can_say_it(tmp_path):
    """Then they win over the file, as in transformers 5; where they cannot, the two may not disagree."""
    tokens = {name: {"id": name, "ids": [vocabulary()[0][name]], "tokens": [name]} for name in ("<s>", "</s>")}
    row = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*row, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    begins = {"type": "TemplateProcessing", "single": row, "pair": pair, "special_tokens": tokens}
    cls, sep = ([name, tokens[name]["ids"][0]] for name in ("<s>", "</s>"))
    bert = {"type": "BertProcessing", "cls": cls, "sep": sep}
    data = described(random.Random(0), normalizers=[])
    written(tmp_path, {**data, "post_processor": begins})
    first = tokens["<s>"]["ids"][0]
    for options, expected in (({}, True), ({"add_bos_token": False}, False), ({"bos_token": END}, True)):
        tokenizer = GPT2Tokenizer.from_pretrained(tmp_path, **options)
        assert (tokenizer.encode("hello")[0] == first) == expected
        assert tokenizer.add_bos_token == (expected and not options)
    written(tmp_path, {**data, "post_processor": bert})
    with pytest.raises(TokenizerError, match="add_bos_token: is False, and the post_processor of tokenizer"):
        GPT2Tokenizer.from_pretrained(tmp_path, add_bos_token=False)
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    tokenizer.add_bos_token = True
    with pytest.raises(TokenizerError, match="add_bos_token, add_eos_token: expected False, since the post_processor"):
        tokenizer("hello")


def test_what_a_trainer_would_not_do_is_not_learned(tmp_path):
    tokenizer = GPT2Tokenizer.from_pretrained(written(tmp_path, described(random.Random(5), NORMALIZERS[:1] * 2)))
    with pytest.raises(TokenizerError, match="train_new_from_iterator: expected GPT-2's own normalizer, pre_tokenizer"):
        tokenizer.train_new_from_iterator(["a b"], 300)


def test_padding_and_truncation_are_the_calls_own(tmp_path):
    """As in transformers, which takes their sides and the pad token; the library beneath does both unasked."""
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    data = {**described(random.Random(1), []), "padding": {**padding, "pad_type_id": 0, "pad_token": "</s>"}}
    data["truncation"] = {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = GPT2Tokenizer.from_pretrained(written(tmp_path, data))
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side) == ("</s>", "left", "left")
    assert len(tokenizer("hello the hello")["input_ids"]) > 2


def test_what_stands_for_a_byte_that_is_not_there_is_the_models_own(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    data = described(random.Random(1), normalizers=[], cut=digits_of)
    del data["model"]["vocab"]["q"]
    data["model"]["unk_token"] = "</s>"
    written(tmp_path, data)
    expected = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json").encode("a q").ids
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.encode("a q") == GPT2Tokenizer.from_pretrained(tmp_path).encode("a q") == expected


@pytest.mark.parametrize(
    ("place", "part", "sentence"),
    [
        ("normalizer", {"type": "StripAccents"}, "expected a normalizer that is known here, found 'StripAccents'"),
        ("pre_tokenizer", None, "expected pre_tokenizer.type to be 'ByteLevel', found None"),
        ("pre_tokenizer", {"type": "Metaspace"}, "expected pre_tokenizer.type to be 'ByteLevel', found 'Metaspace'"),
        ("pre_tokenizer", ["Whitespace"], "expected a pre_tokenizer that is known here, found 'Whitespace'"),
        ("pre_tokenizer", r"\p{Han}+", "expected a regular expression that means the same here, found '.*Han"),
        ("pre_tokenizer", r"^a", r"expected a regular expression that means the same here, found '\^a'"),
        ("pre_tokenizer", "(a+)+b", r"expected a regular expression that means the same here, found '\)\+b'"),
        ("pre_tokenizer", "[a--b]", "expected a regular expression that means the same here, found '--b"),
        ("normalizer", {"type": "Prepend", "prepend": 3}, "expected a text in a part of tokenizer.json, found 3"),
        ("pre_tokenizer", "[a", r"expected a regular expression that means the same here, found 'unterminated"),
        ("post_processor", {"type": "TemplateProcessing", "single": 3}, "expected a tokenizer.json of a GPT-2 tok"),
        ("post_processor", {"type": "Other"}, "expected a post_processor that is known here, found 'Other'"),
        ("post_processor", {"type": "BertProcessing", "cls": ["a", 9**9], "sep": ["b", 1]}, "found the id 387420489"),
        ("decoder", {"type": "WordPiece"}, "expected decoder.type to be 'ByteLevel', found 'WordPiece'"),
        ("model", {"type": "Unigram"}, "expected model.type to be 'BPE', found 'Unigram'.*transformers' AutoTokenizer"),
        ("model", {"dropout": 0.1}, "expected model.dropout to be None, found '0.1'"),
        ("model", {"end_of_word_suffix": "</w>"}, "expected model.end_of_word_suffix to be None, found '</w>'"),
    ],
)  # fmt: skip
def test_what_is_not_known_here_is_refused_by_name(place, part, sentence, tmp_path):
    data = described(random.Random(0))
    if place == "pre_tokenizer" and not isinstance(part, dict | None):
        split = {"type": "Split", "pattern": {"Regex": part}, "behavior": "Isolated", "invert": False}
        cut = {"type": part[0]} if isinstance(part, list) else split
        part = {"type": "Sequence", "pretokenizers": [cut, {"type": "ByteLevel", "add_prefix_space": False}]}
    data[place] = {**data["model"], **part} if place == "model" else part
    with pytest.raises(TokenizerError, match=f"tokenizer.json: .*{sentence}"):
        GPT2Tokenizer.from_pretrained(written(tmp_path, data))
