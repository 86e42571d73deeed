"""Texts of any size: their ids block by block are those of the whole texts, whoever encodes them."""

import io
import os
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine import texts as reading
from gpt2_multi.tokenizer.engine.bpe import byte_characters, spell
from gpt2_multi.tokenizer.files import AddedToken, Parts, Steps
from gpt2_multi.tokenizer.streaming import blocks, workers
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.effort import some

PIECES = [
    *(
        "a",
        "the",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'",
        "'ll",
        "12",
        "!",
        "é",
        "日本",
        "。",
        "\u3000",
        "\x1c",
        "\x85",
    ),
    *("😀", "𝐀", "\u0301", "\ufeff", "\u088f", "\U00032c6c", "<|endoftext|>", "<|end", "oftext|>", "<x>", "a b", " c"),
]
WORDS = [
    *(AddedToken("<x>", lstrip=True, rstrip=True), AddedToken("a b"), AddedToken(" c", single_word=True)),
    *(AddedToken("the", single_word=True), AddedToken("\n!\n"), AddedToken("12 ", special=True)),
]


def kinds():
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return [GPT2Tokenizer]
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast

    return [GPT2Tokenizer, GPT2TokenizerFast]


def made(kind=GPT2Tokenizer, is_plain=True):
    """A tokenizer that joins any two bytes of a word, so that its ids show where words end."""
    used = [spell(bytes([byte])) for byte in sorted({*"".join(PIECES).encode()})]
    merges = [*product(used, used)]
    tokens = [*byte_characters(), *map("".join, merges), "<|endoftext|>"]
    tokenizer = kind({token: at for at, token in enumerate(tokens)}, merges)
    if not is_plain:
        tokenizer.add_prefix_space = tokenizer.add_eos_token = True
        tokenizer.add_tokens(WORDS)
    return tokenizer


ALL = {(kind.__name__, is_plain): made(kind, is_plain) for kind, is_plain in product(kinds(), (True, False))}


def in_parts(size, chunk):
    """Blocks of so many characters, of files that are read in so many bytes."""
    return (
        patch.object(reading, "SIZE", size),
        patch.object(blocks, "SIZE", size),
        patch.object(reading, "CHUNK", chunk),
    )


def whole(found):
    return np.concatenate(list(found)).tolist()


@pytest.mark.parametrize("name", ALL, ids=str)
@settings(max_examples=some(2000, 60))
@given(st.lists(st.sampled_from(PIECES), max_size=24), st.integers(1, 9), st.integers(1, 9))
def test_ids_are_those_of_the_whole_text(name, pieces, size, chunk):
    tokenizer, text = ALL[name], "".join(pieces)
    of_parts, of_blocks, of_chunks = in_parts(size, chunk)
    with of_parts, of_blocks, of_chunks:
        for split in (None, True):
            ids = tokenizer.encode(text, split_special_tokens=split)
            options = {"split_special_tokens": split, "workers": 1}
            assert whole(tokenizer.encode_stream(io.BytesIO(text.encode()), **options)) == ids
            assert whole(tokenizer.encode_stream([text, *pieces], **options)) == [
                *ids,
                *(at for piece in pieces for at in tokenizer.encode(piece, split_special_tokens=split)),
            ]


def test_files_of_every_kind(tmp_path):
    tokenizer, text = made(), "the 日本 a\r\n" * 9
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    ids = tokenizer.encode(text)
    with path.open("rb") as raw, path.open(encoding="utf-8", newline="") as as_text:
        for source in (path, raw, [as_text], [text], (part for part in [text])):
            assert whole(tokenizer.encode_stream(source)) == ids
    halves = "ab\ud83d\ude00c\ud83d"  # as files open with surrogates that pass have them
    with patch.object(reading, "CHUNK", 3):
        assert whole(tokenizer.encode_stream(io.StringIO(halves))) == tokenizer.encode(halves)
    (found,) = tokenizer.encode_stream([path, "", path], add_special_tokens=False)
    assert found.tolist() == ids * 2 and found.dtype == np.uint16
    assert list(tokenizer.encode_stream([])) == [] and next(tokenizer.encode_stream([""])).tolist() == []
    large = GPT2Tokenizer({char: at + (1 << 16) for at, char in enumerate(byte_characters())}, [])
    assert whole(large.encode_stream(["ab"])) == large.encode("ab") == [65633, 65634]


def test_a_tokenizer_with_steps_of_its_own_reads_texts_whole():
    """NFC joins a letter with the mark after it, and a space is put before the text alone."""
    steps = Steps('[{"type": "NFC"}, {"type": "Prepend", "prepend": " "}]')
    vocab, merges = ALL["GPT2Tokenizer", True].encoder, ALL["GPT2Tokenizer", True]._bpe.merges
    tokenizer, text = GPT2Tokenizer(vocab, merges, parts=Parts(steps)), "e\u0301 a\n" * 20
    for context in in_parts(3, 4):
        context.start()
    try:
        assert whole(tokenizer.encode_stream(io.BytesIO(text.encode()))) == tokenizer.encode(text)
    finally:
        patch.stopall()


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path, chunk):
    (tmp_path / "a.txt").write_bytes("日本 a\n日本".encode() + b"\xff ab")
    (tmp_path / "cut.txt").write_bytes("日本 a".encode() + b"\xe6\x97")
    with in_parts(2, chunk)[2]:
        with pytest.raises(TokenizerError, match=r"a.txt: expected UTF-8, found otherwise at byte 15 \(invalid start"):
            list(ALL["GPT2Tokenizer", True].encode_stream(tmp_path / "a.txt"))
        with pytest.raises(TokenizerError, match=r"cut.txt: .* at byte 8 \(unexpected end of data\)"):
            list(ALL["GPT2Tokenizer", True].encode_stream([tmp_path / "cut.txt"]))


def test_a_text_that_cannot_be_cut_is_refused_before_it_fills_the_memory():
    class Endless(io.RawIOBase):
        name, given = "endless.txt", 0

        def read(self, size=-1):
            self.given += size
            assert self.given < 5 << 20
            return b"a" * size

    sentence = r"endless.txt: expected white space, or a change .* in 1048576 characters from character 524288 on"
    with pytest.raises(TokenizerError, match=sentence):
        list(ALL["GPT2Tokenizer", True].encode_stream(Endless()))


def test_what_cannot_be_streamed(tmp_path):
    tokenizer = ALL["GPT2Tokenizer", True]
    for source, sentence in {
        "a.txt": "texts: expected several, found a str; put a text in a list, and the name of a file in pathlib.Path",
        (3,): r"texts: expected texts, paths \(pathlib.Path\) or open files, found an int at 0",
        (tmp_path / "none.txt",): r"none.txt: cannot be read \(No such file or directory\); name a readable file",
    }.items():
        with pytest.raises(TokenizerError, match=sentence):
            list(tokenizer.encode_stream(source))
    with pytest.raises(TokenizerError, match="workers: expected a whole number of at least 1, found 0"):
        tokenizer.encode_stream(["a"], workers=0)

    class Own(GPT2Tokenizer):
        def encode(self, text, **options):
            return super().encode(text.lower(), **options)

    with pytest.raises(TokenizerError, match="found a class with its own encode; call that"):
        Own(tokenizer.encoder, tokenizer._bpe.merges).encode_stream(["a"])


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts."""
    found, start = [], workers._started
    monkeypatch.setattr(workers, "_started", lambda: found.append(start()) or found[-1])
    return found


def test_processes_give_the_same_in_the_same_order_and_end(started, capfd):
    tokenizer, texts = ALL["GPT2Tokenizer", False], ["the 日本\n" * 50, "", "\ud800 12 <x> a b" * 40] * 5
    ids = [at for text in texts for at in tokenizer.encode(text)]
    with in_parts(100, 9)[0], in_parts(100, 9)[1]:
        assert whole(tokenizer.encode_stream(texts, workers=2)) == ids
        stopped = tokenizer.encode_stream(texts, workers=2)
        next(stopped)
        stopped.close()
    assert len(started) == 4 and all(process.poll() is not None for process in started)
    assert capfd.readouterr() == ("", "")


def test_a_process_that_ends_or_fails_is_one_sentence(started):
    """os._exit ends it with the status that is its block; of int it is one that is no number."""
    with pytest.raises(TokenizerError, match=r"a process that encodes ended \(exit status 3\); call again, with fewer"):
        list(workers.encoded(iter([3, 3, 3]), os._exit, False, 2))
    with pytest.raises(TokenizerError, match=r"cannot encode with this tokenizer \(ValueError: .*workers=1 encodes in"):
        list(workers.encoded(iter(["1", "x", "2"]), int, False, 2))
    assert len(started) == 4 and all(process.poll() is not None for process in started)


def test_threads_give_the_same_in_the_same_order(started):
    for number in (1, 3):
        assert list(workers.encoded(iter("12345"), int, True, number)) == [1, 2, 3, 4, 5]
    assert not started
