"""Documents: what is written in any of the formats is read back, and what is no document is one sentence."""

import io
import json
import os
import re
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_multi.errors import InputError
from gpt2_multi.files import documents as module
from gpt2_multi.files.documents import documents, find, read
from tests.support.effort import some

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\x85\u2028\ufeff\0é日😀"), max_size=40)

ENDINGS = ["txt", "jsonl", *(["parquet"] if find_spec("pyarrow") else [])]


def lines(rows, field="text"):
    return "".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows))


@settings(max_examples=some(300, 30))
@given(rows=st.lists(TEXT, min_size=1, max_size=6), ascii_only=st.booleans(), chunk=st.integers(1, 7))
def test_what_is_written_is_read(tmp_path_factory, rows, ascii_only, chunk):
    folder = tmp_path_factory.mktemp("documents")
    text = "".join(json.dumps({"text": row}, ensure_ascii=ascii_only) + "\n" for row in rows)
    (folder / "a.jsonl").write_bytes(text.encode())
    assert list(documents([folder / "a.jsonl"])) == rows
    (folder / "b.txt").write_bytes(whole := "x".join(rows).encode() + b"!")
    (found,) = documents([folder / "b.txt"])
    assert found.encode() == whole.removeprefix(b"\xef\xbb\xbf")
    seen = []
    for part in read(find([folder / "b.txt"]).files, seen=seen.append):
        assert "".join(iter(partial(part.read, chunk), "")) == found and sum(seen) == len(whole) and part.read(9) == ""


def test_a_parquet_file_is_read_by_groups_of_rows(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = ["", "é\n日", *map(str, range(1000))]
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"n": list(range(len(rows))), "body": pa.array(rows, kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=300)
    seen: list[int] = []
    assert list(read(find([tmp_path]).files, "body", seen.append)) == rows * 3
    assert sum(seen) == sum(path.stat().st_size for path in tmp_path.iterdir()) and len(seen) == 12
    with pytest.raises(InputError, match=r"0.parquet: expected the field 'text', found 'n', 'body'; name the text by"):
        list(documents([tmp_path]))
    with pytest.raises(InputError, match=r"0.parquet, row 1: expected a text in 'n', found an int; leave the row out"):
        list(documents([tmp_path], "n"))
    whole = (tmp_path / "0.parquet").read_bytes()
    for length in range(1, len(whole), some(97, 1009)):
        (tmp_path / "0.parquet").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"0.parquet: not a whole .parquet \(.*\); fetch or save it again"):
            list(documents([tmp_path / "0.parquet"], "body"))


def test_folders_and_patterns_are_read_in_order(tmp_path):
    for name in ("b/1.txt", "b/2.TXT", "a.jsonl", "c.txt", "b/.hidden/4.txt", ".d.txt", "b/README.md", "[e].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(lines([name]) if name.endswith("jsonl") else name)
    (tmp_path / "b" / "empty.txt").touch()
    assert list(documents([tmp_path])) == ["[e].txt", "a.jsonl", "c.txt", "b/1.txt", "b/2.TXT"]
    assert find([tmp_path]).others == [tmp_path / "b" / "README.md"]
    assert list(documents([tmp_path / "b" / "README.md"])) == ["b/README.md"]  # what is named is a text
    assert list(documents([f"{tmp_path}/**/*.txt", f"{tmp_path}/[e].txt"])) == [
        "[e].txt",
        "b/1.txt",
        "c.txt",
        "[e].txt",
    ]
    named = [tmp_path / "c.txt", tmp_path / "a.jsonl", tmp_path / "c.txt"]
    assert list(documents(named)) == ["c.txt", "a.jsonl", "c.txt"]


def test_standard_input_is_a_text_or_lines(monkeypatch, tmp_path):
    for given_field, data, expected in ((None, "a\nb", ["a\nb"]), ("t", lines(["a", "b"], "t"), ["a", "b"])):
        monkeypatch.setattr(module.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data.encode())))
        assert list(documents(["-"], given_field)) == expected
    monkeypatch.setattr(module.sys, "stdin", None)
    with pytest.raises(InputError, match="-: expected standard input, found it closed; name a file"):
        find(["-"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_a_text_of_unknown_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (file,) = find([tmp_path / "pipe"]).files
    assert file.kind == "text" and file.size is None


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not valid JSON (Expecting value"),
        ("a.jsonl", b"[" * 10**5, "a.jsonl, line 1: not valid JSON ("),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl, line 1: not valid JSON (Exceeds the limit"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', "line 2: expected an object with the field 'text', found a list"),
        ("a.jsonl", b'{"content": "a"}', "line 1: expected the field 'text', found 'content'; name the text by --fiel"),
        ("a.jsonl", b"{}", "line 1: expected the field 'text', found none"),
        ("a.jsonl", b'{"text": null}', "line 1: expected a text in 'text', found a NoneType"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: expected UTF-8, found the byte 0xff (invalid start byte); convert"),
        ("a.txt", b"a\nb\xc3", "a.txt, line 2: expected UTF-8, found the byte 0xc3 (unexpected end of data)"),
        ("a.txt", "a\nb".encode("utf-16"), "a.txt, line 1: expected UTF-8, found the byte 0xff"),
        ("a.txt", b"", "a.txt: the file is empty; leave it out"),
        ("a.json", b"[]", "a.json: expected one object on each line, as in .jsonl, found .json"),
        ("a.bin", b"ab", "a.bin: holds token ids, and texts are wanted"),
    ],
)
def test_what_is_no_document_is_one_sentence(name, data, sentence, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}/.*{re.escape(sentence.removeprefix(name))}"):
        list(documents([tmp_path / name]))


def test_sources_that_are_not_there_are_one_sentence(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"ab")
    (tmp_path / "book.txt").write_text("a")
    with pytest.raises(InputError, match=r"boook.txt: no such file .*; did you mean 'book.txt'\?"):
        find([tmp_path / "boook.txt"])
    with pytest.raises(InputError, match=r"field: .*book.txt has no fields, which .jsonl and .parquet have"):
        find([tmp_path], "body")
    (tmp_path / "book.txt").unlink()
    with pytest.raises(InputError, match=r"found .*train.bin; name files of tokens .* pattern like .*/train\*"):
        find([tmp_path])
    (tmp_path / "train.bin").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: expected .txt, .jsonl or .parquet, found no files; name"):
        find([tmp_path])


def test_a_line_without_an_end_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text(lines(["a"]) + '{"text": "' + "a" * 1000)
    with pytest.raises(InputError, match=r"line 2: is longer than 100 bytes; is it a .jsonl\?"):
        list(documents([tmp_path / "a.jsonl"]))


@settings(max_examples=some(3000, 100))
@given(data=st.binary(max_size=60) | TEXT.map(str.encode), ending=st.sampled_from(ENDINGS))
def test_whatever_a_file_holds_it_is_read_or_one_sentence(tmp_path_factory, data, ending):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{ending}"
    path.write_bytes(data)
    try:
        assert all(isinstance(text, str) for text in documents([path]))
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
