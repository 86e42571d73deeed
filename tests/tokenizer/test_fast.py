import json
import os
import pickle
import random
import sys

import pytest

from gpt2_multi.tokenizer.engine.bpe import BPE, byte_characters
from gpt2_multi.tokenizer.engine.words import code_point_classes
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.shared_data import shared
from tests.tokenizer.test_tokenizer import TEXTS, small_files

gigatoken = pytest.importorskip("gigatoken")

from gpt2_multi.tokenizer.fast import PROBES, GPT2TokenizerFast, _probe, differing_code_points, knows

PIECES = [
    *(
        "a",
        "the",
        "ing",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "'s",
        "'ll",
        "'",
        "1",
        "23",
        "!",
        "é",
        "ü",
        "中文",
        "Ж",
        "\x00",
        "\x1c",
    ),
    *(
        "\x85",
        "\u00a0",
        "\u3000",
        "\u2009",
        "😀",
        "👩‍👩‍👧",
        "\u0301",
        "ǅ",
        "٣",
        "½",
        "𝐀",
        "𝟎",
        "<|endoftext|>",
        "\ufeff",
        "ſ",
        "’s",
    ),
    *("\ud800", "\udfff", "\U00032c6c", "\U0001e100"),
]


def random_text(rng: random.Random) -> str:
    text = "".join(rng.choices(PIECES, k=rng.randint(0, 25)))
    kind = rng.random()
    if kind < 0.02:
        return text * rng.randint(1, 30)
    if kind < 0.03:
        return rng.choice(PIECES) * rng.randint(1, 3000) + text
    if kind < 0.3:
        return text + "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 8)))
    return text


@pytest.fixture(scope="module")
def both():
    folder = shared("vocab", "gpt2")
    return GPT2Tokenizer.from_pretrained(folder), GPT2TokenizerFast.from_pretrained(folder)


def test_ids_are_those_of_gpt2(both):
    fast = both[1]
    for line in shared("fixtures", "tokens.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        assert fast.encode(case["text"], split_special_tokens=True) == case["ids"]
        assert fast.encode(case["text"]) == case.get("ids_special", case["ids"])


def test_the_two_and_tiktoken_agree(both):
    """Random texts; FUZZ_SEED and FUZZ_TEXTS ask for others and for more."""
    slow, fast = both
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FUZZ_SEED={seed}")
    rng, peer = random.Random(seed), tiktoken_peer(slow)
    for _ in range(int(os.environ.get("FUZZ_TEXTS", "3000"))):
        text = random_text(rng)
        assert fast.encode(text) == slow.encode(text), (seed, ascii(text)[:200])
        ids = slow.encode(text, split_special_tokens=True)
        assert fast.encode(text, split_special_tokens=True) == ids, (seed, ascii(text)[:200])
        assert peer is None or peer(text) == ids, (seed, ascii(text)[:200])


def tiktoken_peer(tokenizer):
    try:
        import tiktoken
    except ImportError:
        return None
    ranks = {tokenizer.decode_bytes(at): at for at in range(50256)}
    rule = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("gpt2-here", pat_str=rule, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


@pytest.mark.parametrize("text", [" " * 10**6 + "b", "a" * 10**6, "ab" * 500_000, "\n " * 300_000, "中" * 300_000])
def test_long_runs(both, text):
    slow, fast = both
    assert fast.encode(text, truncation=False) == slow.encode(text, truncation=False)


def test_code_points_in_context(both):
    slow, fast = both
    edges = {
        point + by for ranges in code_point_classes().values() for ends in ranges for point in ends for by in (-1, 0, 1)
    }
    points = [point for point in sorted({*range(0, 0x40000, 16), *edges}) if 0 <= point < 0x110000]
    for start in range(0, len(points), 64):
        text = "".join(f"a{char}b {char}1{char}!{char}\n{char}" for char in map(chr, points[start : start + 64]))
        assert fast.encode(text) == slow.encode(text), hex(points[start])


def test_what_the_engine_classes_differently_is_known():
    """With merges that show every split, the engine and Python differ just where `knows` says that they may."""
    merges = [(probe, char) for probe in PROBES.values() for char in byte_characters()]
    tokens = [*byte_characters(), *(left + right for left, right in merges)]
    python, engine = BPE({token: at for at, token in enumerate(tokens)}, merges), _probe()
    for point in (*range(0, 0x32000, 5), *range(0x32C00, 0x32D00), *range(0xE0000, 0xE0200)):
        char = chr(point)
        if not 0xD800 <= point < 0xE000:
            text = f"\na{char}\n1{char}\n!{char}"
            assert (engine.encode(text).tolist() == python.encode(text)) == knows(char), hex(point)
    assert not knows("\U00050000")


def test_ascii_asks_no_question():
    differing_code_points.cache_clear()
    fast = GPT2TokenizerFast(*small_files())
    fast("hello, world 12 <|endoftext|>")
    assert differing_code_points.cache_info().currsize == 0


def test_the_rest_is_that_of_the_python_tokenizer(tmp_path):
    slow, fast = (
        kind(*small_files(), pad_token="<pad>", add_bos_token=True) for kind in (GPT2Tokenizer, GPT2TokenizerFast)
    )
    options = {"padding": True, "truncation": True, "max_length": 6, "return_offsets_mapping": True}
    assert fast(TEXTS, **options) == slow(TEXTS, **options)
    assert fast(TEXTS, split_special_tokens=True) == slow(TEXTS, split_special_tokens=True) != slow(TEXTS)
    again = pickle.loads(pickle.dumps(fast))
    assert again(TEXTS) == slow(TEXTS)
    fast.save_pretrained(tmp_path)
    assert GPT2TokenizerFast.from_pretrained(tmp_path)(TEXTS) == slow(TEXTS)


def test_other_tables_of_merges():
    """Merges in another order than ids, and one token made by two merges."""
    vocab, _ = small_files()
    tokens = [*list(vocab)[:256], "ab", "bc", "abc", "aa", "aaa"]
    random.Random(0).shuffle(tokens)
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c"), ("a", "a"), ("a", "aa")]
    slow, fast = (
        kind({token: at for at, token in enumerate(tokens)}, merges) for kind in (GPT2Tokenizer, GPT2TokenizerFast)
    )
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abc ", k=rng.randint(1, 60)))
        assert fast.encode(text) == slow.encode(text), text


def test_a_vocabulary_without_some_bytes():
    fast = GPT2TokenizerFast({"a": 0, "?": 1}, [], unk_token="?")
    assert fast.encode("aba") == [0, 1, 0]


def test_without_the_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(ImportError, match=r'pip install "gpt2-multi\[fast\]"'):
        GPT2TokenizerFast(*small_files())
