"""Vocabularies that are learned from texts: GPT-2's order of ids, and those that transformers gives."""

import sys
import warnings

import pytest

from gpt2_multi.errors import TokenizerError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.files import AddedToken
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.shared_data import shared
from tests.tokenizer.test_tokenizer import END, small

pytest.importorskip("tokenizers")

TEXTS = ["hello world, the world é\n", "it's 12 o'clock  in the world", "\nthe 中文 and the world 😀", "", "hello" * 9]


def test_a_vocabulary_is_learned_in_the_order_of_gpt2():
    tokenizer = GPT2Tokenizer.train(TEXTS, 280, pad_token="<pad>", special_tokens=["<user>"], model_max_length=9)
    tokens = list(tokenizer.get_vocab())
    assert tokens[:256] == sorted(byte_characters()) and tokens[-3:] == ["<user>", END, "<pad>"] and len(tokens) == 280
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(280))
    assert (tokenizer.pad_token_id, tokenizer.additional_special_tokens, tokenizer.model_max_length) == (
        279,
        ["<user>"],
        9,
    )
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" world")) < 3


@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefixed"])
def test_files_give_what_their_texts_give(tmp_path, monkeypatch, prefix):
    """Read in parts, with what an editor would take for ends of lines as it is."""
    monkeypatch.setattr("gpt2_multi.tokenizer.engine.texts.CHUNK", 50)
    monkeypatch.setattr("gpt2_multi.tokenizer.engine.texts.SIZE", 20)
    text = "a\r\n b  c\u2028 the\nworld the world " * 40 + "\n\nthe"
    (tmp_path / "a.txt").write_bytes(text.encode())
    learned = [
        GPT2Tokenizer.train([given], 270, add_prefix_space=prefix) for given in (text, tmp_path / "a.txt", [text])
    ]
    assert learned[0].get_vocab() == learned[1].get_vocab() == learned[2].get_vocab()
    assert learned[0]._bpe.merges == learned[1]._bpe.merges


def test_the_vocabulary_of_the_demo_comes_of_its_text():
    text = shared("text", "tinyshakespeare.txt").read_text("utf-8")
    cut = int(len(text) * 0.9)
    learned = GPT2Tokenizer.train([text[: text.find("\n\n", cut) + 2]], 1024)
    demo = GPT2Tokenizer.from_pretrained(DEMO)
    assert list(learned.get_vocab().items()) == list(demo.get_vocab().items())
    assert learned._bpe.merges == demo._bpe.merges


@pytest.mark.parametrize("options", [{}, {"new_special_tokens": ["<new>"], "min_frequency": 2}], ids=str)
def test_a_new_one_of_the_same_kind_is_what_transformers_learns(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    old = small(pad_token="<pad>", add_prefix_space=True, model_max_length=77, padding_side="left", chat_template="x")
    old.add_special_tokens({"additional_special_tokens": [AddedToken("<user>", lstrip=True)]})
    old.add_tokens(["<word>"])
    old.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = theirs.train_new_from_iterator([TEXTS[:2], TEXTS[2:]], 290, **options)
    ours = old.train_new_from_iterator([TEXTS[:2], TEXTS[2:]], 290, **options)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert (ours.pad_token, ours.model_max_length, ours.padding_side, ours.chat_template) == ("<pad>", 77, "left", "x")
    for text in [*TEXTS, "a  <user> the<pad><word>"]:
        assert ours.encode(text) == theirs.encode(text)
    ours.save_pretrained(tmp_path / "new")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert again.encode("hello <user>the world") == ours.encode("hello <user>the world")
    renamed = old.train_new_from_iterator(TEXTS, 290, special_tokens_map={"<pad>": "<fill>"})
    assert renamed.pad_token == "<fill>" and "<pad>" not in renamed.get_vocab() and len(renamed) <= 291


def test_what_cannot_be_learned(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for texts, sentence in {
        "hello": "texts: expected several, found a str; put it in a list",
        (3,): r"texts: expected texts, lists of them or paths of files, found an? int",
        (tmp_path / "none.txt",): r"none.txt: cannot be read \(No such file or directory\); name a readable file",
        (tmp_path / "latin.txt",): "latin.txt: expected UTF-8, found otherwise",
    }.items():
        with pytest.raises(TokenizerError, match=sentence):
            GPT2Tokenizer.train(texts, 300)
    with pytest.raises(TokenizerError, match="vocab_size: expected at least 257, for the bytes and the control tokens"):
        GPT2Tokenizer.train(TEXTS, 256)
    with pytest.raises(TypeError, match="has no argument 'mask_tokens'; did you mean 'mask_token'"):
        GPT2Tokenizer.train(TEXTS, 300, mask_tokens="[MASK]")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'learning a vocabulary needs tokenizers: pip install "gpt2-multi\[train\]"'):
        GPT2Tokenizer.train(TEXTS, 300)
