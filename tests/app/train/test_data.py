"""The data of a training run: texts become the tokenizer's ids, once, and batches follow from the step."""

import io
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_multi.app.train.data import shards
from gpt2_multi.app.train.data.shards import prepare, reopen
from gpt2_multi.app.train.data.tokens import Tokens, check_vocabulary, divided, open_tokens
from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.errors import CheckpointError, InputError, TokenizerError
from gpt2_multi.files import documents
from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation.rules import shuffled, window_starts
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.effort import THOROUGH, some

DOCUMENTS = ["ROMEO: but soft", "", "what light\n<|endoftext|>", "through yonder window", "breaks? " * 40]


@pytest.fixture
def tokenizer():
    return GPT2Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:3]))
    for number, text in enumerate(DOCUMENTS[3:]):
        (tmp_path / "data" / f"{number}.txt").write_text(text)
    return tmp_path / "data"


def ids_of(tokenizer, texts):
    return [at for text in texts for at in [*tokenizer.encode(text), tokenizer.eos_token_id]]


ORDER = [3, 4, 0, 1, 2]  # of the files' names


@pytest.mark.parametrize("split", [False, True])
def test_documents_become_ids_in_shards(corpus, tokenizer, split, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 50)
    tokenizer.split_special_tokens = split
    tokens = prepare([corpus], tokenizer, tmp_path / "out", workers=1)
    expected = ids_of(tokenizer, [DOCUMENTS[at] for at in ORDER])
    assert tokens[:].tolist() == reopen(tmp_path / "out")[:].tolist() == expected and tokens[:].dtype == np.uint16
    files = sorted((tmp_path / "out").glob("*.bin"))
    assert [open_tokens(file).count for file in files[:-1]] == [50] * (len(expected) // 50)  # llm.c's
    said = json.loads(files[0].read_bytes()[12:1024].rstrip(b"\0"))
    assert said["count"] == 50 and said["dtype"] == "uint16" and said["vocab_size"] == len(tokenizer)
    assert not tokenizer.add_eos_token  # which is the caller's


def test_what_is_passed_over_is_said(corpus, tokenizer, tmp_path, capsys):
    prepare([corpus], tokenizer, tmp_path / "out")
    assert capsys.readouterr().err == ""
    (corpus / "notes.md").write_text("no text")
    prepare([corpus], tokenizer, tmp_path / "out")
    assert capsys.readouterr().err == f"passed over {corpus}/notes.md; name a file itself to have it read\n"
    (corpus / "old.bin").touch()
    prepare([corpus], tokenizer, tmp_path / "out")
    assert capsys.readouterr().err.startswith(f"passed over 2 files that are no texts, such as {corpus}/notes.md; name")


def test_a_large_vocabulary_needs_32_bits(tmp_path):
    vocab = {token: at for at, token in enumerate(byte_characters())} | {"ab": 70_000}
    large = GPT2Tokenizer(vocab, [("a", "b")], eos_token="<end>", bos_token="<end>", unk_token="<end>")
    (tmp_path / "a.txt").write_text("abc")
    tokens = prepare([tmp_path / "a.txt"], large, tmp_path / "out", vocab_size=70_002)
    assert tokens[:].tolist() == [70_000, vocab["c"], large.eos_token_id] and tokens[:].dtype == np.uint32
    with pytest.raises(InputError, match=r"tokenizer: gave the token 70001, .* \(0 to 999\); take the model's"):
        prepare([tmp_path / "a.txt"], large, tmp_path / "out", vocab_size=1000)


def test_equal_data_is_not_encoded_again_and_changed_data_is(corpus, tokenizer, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(shards, "_blocks", lambda *given, real=shards._blocks: made.append(1) or real(*given))

    def again(*sources, by=tokenizer, field=None):
        made.clear()
        found = prepare(sources or [corpus], by, tmp_path / "out", field)[:].tolist()
        return found, len(made)

    first, count = again()
    assert count == 1 and again() == (first, 0) and again(by=GPT2Tokenizer.from_pretrained(DEMO)) == (first, 0)
    (corpus / "0.txt").write_text("other words!!")
    assert again()[1] == 1 and again()[1] == 0
    os.utime(corpus / "0.txt", ns=(1, 1))
    assert again()[1] == 1 and again(str(corpus))[1] == 0 and again(corpus / "0.txt")[1] == 1
    tokenizer.split_special_tokens = True
    assert again()[1] == 1 and again()[1] == 0
    tokenizer.add_tokens(["words"])
    assert again()[1] == 1 and again(field="text")[1] == 1
    (tmp_path / "out" / "tokens-00000.bin").write_bytes(b"short")
    assert again(field="text")[1] == 1
    (tmp_path / "out" / "shards.json").write_text('{"format": 1}')
    assert again(field="text")[1] == 1
    monkeypatch.setattr(documents.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))
    assert again("-") == (ids_of(tokenizer, ["piped"]), 1)
    monkeypatch.setattr(documents.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"other")))
    assert again("-") == (ids_of(tokenizer, ["other"]), 1)


def test_what_is_stopped_on_the_way_is_never_taken_for_whole(corpus, tokenizer, tmp_path, monkeypatch):
    """A kill can come between any two writes: here it does, without anything that cleans up."""
    monkeypatch.setattr(shards, "SHARD", 50)
    expected = prepare([corpus], tokenizer, tmp_path / "whole")[:].tolist()
    writes = [0]

    class Killed(BaseException):
        pass

    def kill_at(place):
        def sync(file):
            writes[0] += 1
            if writes[0] == place:
                raise Killed
            file.flush()

        return sync

    place = 0
    while True:
        place, writes[0] = place + 1, 0
        with monkeypatch.context() as patch:
            patch.setattr(shards, "sync", kill_at(place))
            patch.setattr(shards, "_clear", lambda folder: (folder / "shards.json").unlink(missing_ok=True))
            try:
                prepare([corpus], tokenizer, tmp_path / "out")
                break
            except Killed:
                assert not (tmp_path / "out" / "shards.json").exists()
        assert prepare([corpus], tokenizer, tmp_path / "out")[:].tolist() == expected
        (tmp_path / "out" / "shards.json").unlink()
    assert place > 2 * len(expected) // 50


if THOROUGH:

    def test_a_real_kill_at_any_moment_leaves_nothing_that_is_taken_for_whole(tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("but soft, what light " * 600_000)
        code = f"""from gpt2_multi.app.train.data import shards
from gpt2_multi.files.hub import DEMO
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
shards.SHARD = 100_000
shards.prepare([{str(tmp_path / "a.txt")!r}], GPT2Tokenizer.from_pretrained(DEMO), {str(tmp_path / "out")!r})
"""
        expected = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "whole")[:].tolist()
        for number in range(20):
            with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as child:
                while child.poll() is None and len(list((tmp_path / "out").glob("tokens-*"))) != number + 1:
                    time.sleep(0.001)
                child.kill()
            assert child.returncode == -9 and not (tmp_path / "out" / "shards.json").exists()
        assert prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out")[:].tolist() == expected


def test_what_cannot_be_read_or_written_is_one_sentence_and_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    (corpus / "z.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"z.txt, line 1: expected UTF-8"):
        prepare([corpus], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (corpus / "z.txt").write_text("a" * 3_000_000)
    with pytest.raises(TokenizerError, match=r"z.txt: expected white space"):
        prepare([corpus], tokenizer, tmp_path / "out", workers=1)
    (corpus / "z.txt").unlink()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "sync", full)
    with pytest.raises(CheckpointError, match=r"out: the tokens could not be written \(No space left on device\)"):
        prepare([corpus], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (corpus / "blank.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="the sources have no document"):
        prepare([corpus / "blank.jsonl"], tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="tokenizer: has no eos_token, which ends each document; set it"):
        tokenizer.eos_token = None
        prepare([corpus], tokenizer, tmp_path / "out")


def llm_c(tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.array(tokens, dtype).tobytes()


def npy(tokens, dtype):
    np.save(out := io.BytesIO(), np.array(tokens, dtype))
    return out.getvalue()


IDS = list(range(0, 1000, 7))
FILES = {
    "nanogpt.bin": np.array(IDS, "<u2").tobytes(),
    "llmc.bin": llm_c(IDS),
    "llama.bin": llm_c(IDS, 20240801, 7, "<u4"),
    "fineweb.npy": npy(IDS, "<u2"),
    "wide.npy": npy(IDS, ">i8"),
}


def test_files_of_tokens_are_mapped_where_they_are(tokenizer, tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        tokens = prepare([tmp_path / name], tokenizer, tmp_path / "out")
        assert tokens[:].tolist() == IDS and tokens[3:5].base is not None, name
    tokens = prepare([tmp_path / name for name in FILES], tokenizer, tmp_path / "out")
    assert tokens[:].tolist() == IDS * 5 and not (tmp_path / "out").exists()
    assert Windows(tokens, 9, 4)[3]["input_ids"].dtype == np.int32
    with pytest.raises(InputError, match=r"llama.bin, token 0: 0 .*"):
        check_vocabulary(Tokens([open_tokens(tmp_path / "llama.bin")]), 0)
    with pytest.raises(InputError, match=r"llmc.bin, token 100: 700 is outside the model's vocabulary \(0 to 699\)"):
        check_vocabulary(tokens.part(len(IDS) + 9, len(tokens)), 700)
    (tmp_path / "minus.npy").write_bytes(npy([5, -1], "<i4"))
    with pytest.raises(InputError, match=r"minus.npy, token 1: -1 is outside"):
        prepare([tmp_path / "minus.npy"], tokenizer, tmp_path / "out")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a.txt: is a text beside files of tokens"):
        prepare([tmp_path / "a.txt", tmp_path / "llmc.bin"], tokenizer, tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_is_one_sentence(name, tmp_path):
    whole = FILES[name]
    for length in {1, 7, 127, 1023, 1025, len(whole) - 1} - ({1023} if name != "nanogpt.bin" else set()):
        if length < len(whole):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(
                InputError, match=rf"{name}: (expected \d+ bytes, found {length}|not a whole|expected to)"
            ):
                open_tokens(tmp_path / name)
    (tmp_path / name).write_bytes(whole + b"!")
    with pytest.raises(InputError, match=r"expected \d+ bytes, found \d+"):
        open_tokens(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.bin", llm_c(IDS, 20240326), "expected tokens of llm.c, found a model"),
        ("a.bin", llm_c(IDS, 20240522), "found questions to evaluate with"),
        ("a.bin", llm_c(IDS, 20240520, 9), "found version 9"),
        ("a.npy", npy([1.5], "<f4"), r"expected integers in one row, found float32 of shape \(1,\)"),
        ("a.npy", npy([[1], [2]], "<u2"), r"found uint16 of shape \(2, 1\)"),
    ],
)
def test_what_holds_no_tokens_is_refused(name, data, sentence, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: .*{sentence}"):
        open_tokens(tmp_path / name)


def test_characters_of_nanogpt_are_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(FILES["nanogpt.bin"])
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(InputError, match=r"train.bin: meta.pkl beside it says that its tokens are characters"):
        open_tokens(tmp_path / "train.bin")


@settings(max_examples=some(500, 50))
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    cuts=st.tuples(*[st.integers(-3, 70)] * 4),
)
def test_several_files_are_one_array(tmp_path_factory, sizes, cuts):
    folder, files = tmp_path_factory.mktemp("tokens"), []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.npy"
        np.save(path, np.arange(size, dtype=np.uint16) + 10 * number)
        files.append(open_tokens(path))
    whole, tokens = np.concatenate([np.load(file.path) for file in files]), Tokens(files)
    low, high = sorted(min(max(cut, 0), len(whole)) for cut in cuts[:2])
    assert len(tokens) == len(whole) and tokens[cuts[0] : cuts[1]].tolist() == whole[cuts[0] : cuts[1]].tolist()
    part = tokens.part(low, high)
    assert len(part) == high - low and part[cuts[2] : cuts[3]].tolist() == whole[low:high][cuts[2] : cuts[3]].tolist()
    for place in range(len(part)):
        name, _, at = part.name(place).partition(", token ")
        assert np.load(name)[int(at)] == part[place : place + 1][0]


def test_what_is_held_out_begins_with_a_document(tmp_path):
    def split(ids, fraction):
        np.save(tmp_path / "a.npy", np.array(ids, np.uint16))
        return [len(part) for part in divided(Tokens([open_tokens(tmp_path / "a.npy")]), fraction, 0)]

    ids = np.ones(1000, np.uint16)
    assert split(ids, 0.1) == [900, 100]
    ids[[100, 860, 880, 960]] = 0
    assert split(ids, 0.1) == [881, 119] and split(ids, 0.05) == [961, 39] and split(ids, 0.5) == [500, 500]
    assert split(ids, 0.9) == [101, 899]
    for fraction in (0, 1, 0.0001):
        with pytest.raises(InputError, match=r"val_fraction: .* of 1000 tokens leaves a part without any"):
            split(ids, fraction)


# --- the order --------------------------------------------------------------------------------------------------------


@settings(max_examples=some(300, 40))
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**33))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 1, 1)
def test_the_order_is_a_permutation(count, seed, epoch):
    found = shuffled(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(found), np.arange(count))


def test_the_order_is_known():
    """Whatever the platform: a run that goes on elsewhere sees the same data."""
    assert shuffled(np.arange(8), 10, 3, 0).tolist() == [6, 3, 0, 9, 5, 7, 2, 1]
    assert shuffled(np.arange(3), 10**11, 2**63 + 1, 7).tolist() == [37781544262, 30690660724, 90073068791]
    assert window_starts(10**11, 1024, 2, 1, 10**7).tolist() == [15629586384, 97874477008]


def test_every_order_is_as_likely():
    """Chi-square of the orders of four, and of where a number goes among seventeen."""
    seen = [shuffled(np.arange(4), 4, seed, seed % 5) for seed in range(some(7200, 720))]
    orders, times = np.unique(seen, axis=0, return_counts=True)
    assert len(orders) == 24 and ((times - len(seen) / 24) ** 2 / (len(seen) / 24)).sum() < 60
    places = np.array([shuffled(np.arange(17), 17, 5, epoch) for epoch in range(some(3400, 340))])
    expected = len(places) / 17
    assert all(((np.bincount(column, minlength=17) - expected) ** 2 / expected).sum() < 50 for column in places.T)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(shuffled(np.arange(50), 50, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400
    big = shuffled(np.arange(5000), 10**11, 0, 0)
    assert len(np.unique(big)) == 5000 and abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.05
    assert abs(big.mean() / 10**11 - 0.5) < 0.02


def test_an_epoch_takes_each_window_once_and_any_step_is_the_same_afterwards():
    data = Windows(np.arange(10_000), length=9, batch_size=5, seed=3)
    assert len(data) == (10_000 // 9 - 1) // 5 == 222
    for epoch in range(3):
        seen = np.concatenate([data[len(data) * epoch + i]["input_ids"] for i in range(len(data))])
        assert len(np.unique(seen)) == seen.size == 9990 and np.array_equal(np.diff(seen), np.ones((1110, 8)))
        assert len(np.unique(seen[:, 0] % 9)) == 1  # the cut of this epoch
    again = Windows(np.arange(10_000), length=9, batch_size=5, seed=3)
    assert np.array_equal(again[500]["labels"], data[500]["input_ids"])
    assert not np.array_equal(data[0]["input_ids"], Windows(np.arange(10_000), 9, 5)[0]["input_ids"])


def test_windows_look_at_what_they_are_given():
    for options in ({"length": 0}, {"batch_size": 0}, {"seed": -1}, {"length": 2.5}):
        with pytest.raises(InputError, match=f"{next(iter(options))}: expected a whole number from"):
            Windows(np.arange(50), **{"length": 5, "batch_size": 2, **options})
    with pytest.raises(InputError, match=r"ids: expected at least 54, .* found 30; give a longer text"):
        Windows(np.arange(30), length=9, batch_size=5)
    with pytest.raises(InputError, match="step: expected a whole number from 0, found -1"):
        Windows(np.arange(100), 9, 5)[-1]


class Huge:
    """A hundred billion tokens that are not there."""

    def __len__(self):
        return 10**11

    def __getitem__(self, at):
        return np.arange(at.start, at.stop) % 50_000


def test_a_hundred_billion_tokens_need_no_memory():
    data = Windows(Huge(), length=1024, batch_size=4)
    first = data[20_000_000]["input_ids"][:, 0]
    assert first.shape == (4,) and len(data) == (10**11 // 1024 - 1) // 4
