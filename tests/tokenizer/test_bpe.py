import random
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.bpe import BPE, SHORT, byte_characters, spell, unspell
from gpt2_multi.tokenizer.engine.words import code_point_classes, split_words, windows

Merges = list[tuple[str, str]]


def naive_merge(word: str, merges: Merges) -> list[str]:
    """BPE word for word as defined: the first merge in the table that fits anywhere, at its leftmost place."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    parts = list(word)
    while fitting := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        at = min(fitting)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def engine(merges: Merges, shuffle: random.Random | None = None) -> BPE:
    tokens = list(dict.fromkeys([*byte_characters(), *(left + right for left, right in merges)]))
    if shuffle:
        shuffle.shuffle(tokens)
    return BPE({token: at for at, token in enumerate(tokens)}, merges)


def spelled(bpe: BPE, word: str) -> list[str]:
    tokens = {at: token for token, at in bpe.vocab.items()}
    return [tokens[at] for at in bpe.encode_bytes(word.encode())]


def random_merges(rng: random.Random, size: int) -> Merges:
    tokens, merges = list("abc"), []
    for _ in range(size):
        left, right = rng.choice(tokens), rng.choice(tokens)
        merges.append((left, right))
        tokens.append(left + right)
    return list(dict.fromkeys(merges))


def trained_merges(rng: random.Random, size: int) -> Merges:
    """A table trained as BPE is, on random text: the most frequent pair first."""
    parts, merges = rng.choices("abc", weights=(5, 3, 1), k=400), []
    for _ in range(size):
        pairs = list(pairwise(parts))
        best = max(dict.fromkeys(pairs), key=pairs.count)
        if pairs.count(best) < 2:
            break
        merges.append(best)
        parts = naive_merge_once(parts, best)
    return merges


def naive_merge_once(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = out[-1] + part + "\0"  # may not be joined again in this pass
        else:
            out.append(part)
    return [part.rstrip("\0") for part in out]


@pytest.mark.parametrize("make", [random_merges, trained_merges])
@given(seed=st.integers(0, 2**32))
def test_merging_is_exact_for_any_table(make, seed):
    rng = random.Random(seed)
    merges = make(rng, rng.randint(0, 25))
    bpe = engine(merges, rng)
    for size in (1, 2, 5, 12, SHORT, SHORT + 1, 120):
        word = "".join(rng.choices("abc", k=size))
        assert spelled(bpe, word) == naive_merge(word, merges)
    for token in bpe.vocab:  # whole words take a path of their own
        if set(token) <= set("abc") and len(token) < 100:
            assert spelled(bpe, token) == naive_merge(token, merges)


@pytest.mark.parametrize(
    ("merges", "word"),
    [
        ([("a", "a")], "aaaaa"),
        ([("a", "a"), ("aa", "a")], "aaa"),
        ([("a", "a"), ("a", "aa")], "aaa"),
        ([("a", "a"), ("aa", "aa")], "aaaa"),
        ([("b", "c"), ("a", "b"), ("ab", "c")], "abc"),
        ([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")], "abcabc"),
    ],
)
def test_merging_is_exact_at_overlaps(merges, word):
    for times in (1, 3, 40):
        assert spelled(engine(merges), word * times) == naive_merge(word * times, merges)


def test_a_chain_of_merges_needs_no_stack():
    merges = [("a" * size, "a") for size in range(1, 3000)]
    assert spelled(engine(merges), "ab") == ["a", "b"]
    bpe = engine([*merges, ("b", "b")])
    assert bpe.encode_bytes(b"a" * 3000) == bpe.encode_bytes(b"a" * 2) * 1500


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6, "ab" * 500_000, "a " * 500_000, "é😀" * 100_000, "b\n" * 10**5]
)
def test_a_million_characters(text):
    bpe = engine([("a", "a"), ("aa", "aa"), ("a", "b"), ("ab", "ab"), ("Ġ", "Ġ")])
    tokens = {at: unspell(token) for token, at in bpe.vocab.items()}
    assert b"".join(map(tokens.__getitem__, bpe.encode(text))) == text.encode()


def test_the_number_of_steps_is_linear(monkeypatch):
    """Counts what the heap is asked for, since time depends on the machine."""
    import gpt2_multi.tokenizer.engine.bpe as module

    pops = 0

    def counting(heap):
        nonlocal pops
        pops += 1
        return original(heap)

    original = module.heappop
    monkeypatch.setattr(module, "heappop", counting)
    bpe = engine(trained_merges(random.Random(0), 50))
    for size in (10_000, 20_000):
        pops = 0
        bpe.encode_bytes("".join(random.Random(1).choices("abc", k=size)).encode())
        assert pops < 3 * size


def test_the_cache_is_bounded_and_changes_nothing():
    bpe = engine([("a", "a")])
    small = BPE(bpe.vocab, bpe.merges, cached_words=8)
    text = " ".join("a" * (at % 100) + str(at) for at in range(300)) * 3
    assert small.encode(text) == bpe.encode(text)
    assert len(small._cache) <= 8
    assert len(small._cache._older) <= 8
    assert max(map(len, bpe._cache)) <= 64


def test_byte_spelling_round_trips():
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    assert spell(b" \n") == "ĠĊ"
    assert unspell("two words") == b"two words"


def test_merges_that_the_vocabulary_does_not_hold():
    vocab = {char: at for at, char in enumerate(byte_characters())}
    with pytest.raises(TokenizerError, match=r"merge 0.*makes 'ab', which the vocabulary does not hold"):
        BPE(vocab, [("a", "b")])
    with pytest.raises(TokenizerError, match=r"merge 0.*names 'bc', which is neither a byte nor made"):
        BPE(vocab, [("a", "bc")])


def test_bytes_that_the_vocabulary_does_not_hold():
    assert BPE({"a": 0, "?": 1}, [], unk_id=1).encode("aba") == [0, 1, 0]
    with pytest.raises(TokenizerError, match="no token for the byte 0x62"):
        BPE({"a": 0}, []).encode("aba")


# --- words -----------------------------------------------------------------------------------------------------------


def class_by_point() -> list[str]:
    classes = ["other"] * 0x110000
    for name, ranges in code_point_classes().items():
        for low, high in ranges:
            classes[low : high + 1] = [name] * (high + 1 - low)
    return classes


def test_classes_cover_every_code_point_once():
    assert sum(high + 1 - low for ranges in code_point_classes().values() for low, high in ranges) == 0x110000


def test_words_depend_on_the_pinned_classes_alone():
    """Every code point in a context that tells its class, by both patterns: no library's Unicode version enters."""
    for point, name in enumerate(class_by_point()):
        char = chr(point)
        for tail in ("", "\n😀") if point <= 0xFFFF else ("",):
            found = split_words(f"a{char}\n1{char}\n!{char}{tail}")
            joined = ("a" + char in found, "1" + char in found, "!" + char in found)
            assert joined == (name == "letter", name == "number", name == "other"), hex(point)


@given(st.text(st.sampled_from("ab1! \n\t\u00a0\u3000'sé中😀𝐀𝟎st"), max_size=40))
def test_words_follow_the_rule(text):
    """Against the rule as published, on characters whose class no version of Unicode disputes."""
    regex = pytest.importorskip("regex")
    rule = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert split_words(text) == regex.findall(rule, text)


@given(st.lists(st.sampled_from(["a", " ", "\n", "\t", "word", "'s", "\u3000", "😀"]), max_size=30), st.integers(1, 9))
def test_windows_never_cut_a_word(parts, size):
    text = "".join(parts)
    cut = list(windows(text, size))
    assert "".join(cut) == text
    assert [word for part in cut for word in split_words(part)] == split_words(text)


def test_ascii_text_never_compiles_the_slow_pattern():
    from gpt2_multi.tokenizer.engine.words import full_pattern

    full_pattern.cache_clear()
    assert split_words("It's 12 o'clock, naïve 中") == ["It", "'s", " 12", " o", "'", "clock", ",", " naïve", " 中"]
    assert full_pattern.cache_info().currsize == 0


def test_words_of_the_engine_carry_their_ids():
    bpe = engine([("a", "b")])
    text = "ab ab\n 12"
    words, ids = zip(*bpe.words(text), strict=True)
    assert "".join(words) == text
    assert [at for word in ids for at in word] == bpe.encode(text)
    assert re.sub(r"\s", "", words[1]) == "ab"
