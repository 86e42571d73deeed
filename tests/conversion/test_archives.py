"""Hostile files of torch.save: pickles that would run code or take for ever, and archives that lie."""

import pickle
import re
import struct
import zipfile

import pytest

from tests.support.damage import unzipped, zipped


def short(text):
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def text(value):
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def pickled(*parts):
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + b"".join(parts) + pickle.STOP


RUN = b"cos\nsystem\n"
TOUCH = text("touch ran")
LAUGHS = pickle.NONE + b"".join(pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + b"\x86" for i in range(200))
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1"
LONG = pickle.LONG1 + b"\xff" + b"\x7f" * 255
SHAPE = pickle.MARK + LONG + (pickle.BINPUT + b"\1") + (pickle.BINGET + b"\1") * 20000 + pickle.TUPLE + b"q\0"
COLLIDING = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9000))
PICKLES = {
    "a call": (RUN + TOUCH + b"\x85R", "what os system would make, which is not run"),
    "a call of a name on the stack": (short("os") + short("system") + b"\x93" + TOUCH + b"\x85R", "what os system wou"),
    "a call for a value": (short("x") + RUN + TOUCH + b"\x85Rs", "found 'x' with what os system would make"),
    "an instance": (b"(" + TOUCH + b"ios\nsystem\n", r"does what no checkpoint does \(INST\)"),
    "an object": (b"(" + RUN + TOUCH + b"o", r"does what no checkpoint does \(OBJ\)"),
    "a new object": (RUN + TOUCH + b"\x85\x81", "what os system would make, which is not run"),
    "a new object of no class": (TOUCH + TOUCH + b"\x85\x81", "an object of what is no class"),
    "what is called is none": (TOUCH + TOUCH + b"\x85R", "calls what is no name"),
    "a new object with names": (RUN + TOUCH + b"\x85}\x92", r"does what no checkpoint does \(NEWOBJ_EX\)"),
    "a state that is set": (short("x") + RUN + b"}" + short("__setstate__") + RUN + b"sb" + b"s", "holds|expected"),
    "an extension": (b"\x82\1", r"does what no checkpoint does \(EXT1\)"),
    "a persistent name": (b"Pos\n", r"does what no checkpoint does \(PERSID\)"),
    "a memo that is not there": (pickle.LONG_BINGET + b"\xff" * 4, "not a whole file of torch.save"),
    "a huge memo index": (short("x") + b"K\1" + pickle.LONG_BINPUT + b"\xff" * 4 + b"s", "found 'x' with another"),
    "tuples of tuples for a key": (LAUGHS + b"K\1s", "found a tuple with another value"),
    "tuples of tuples for pairs": (b"ccollections\nOrderedDict\n" + b"(" + LAUGHS + b"lR", "which|calls|does"),
    "tuples of tuples for a value": (short("x") + LAUGHS + b"s", "found 'x' with another value"),
    "marks": (pickle.MARK * 400_000, "longer than that of any GPT-2"),
    "no mark": (b"t", "a mark that is not there"),
    "lists": (b"]" * 400_000, "longer than that of any GPT-2"),
    "long names": (text("a" * 99_000) + b"q\0" + (b"h\0h\0\x93") * 20_000, "a name that is none, or longer than any"),
    "tuples of tuples for a name": (LAUGHS + LAUGHS + b"\x93", "a name that is none"),
    "a long shape many times": (SHAPE + (TENSOR + b"((" + STORAGE + b"tQK\0h\0h\0tR") * 500, "a tensor that is none"),
    "keys that collide": (b"(" + COLLIDING + b"u", "it has 9000 tensors"),
    "an order that is not there": (b"(" + b"K\1" * 9 + b"tR", "not a whole"),
    "a length that lies": (pickle.BINUNICODE8 + b"\xff" * 8, "not a whole"),
    "many arguments": (b"(" + b"N" * 99 + b"tq\0ccollections\nOrderedDict\nh\0R", "no list of arguments"),
    "a long persistent identity": (b"(" + STORAGE + b"N" * 50_000 + b"t" + b"q\0" + b"h\0Q" * 5, "not a whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("format", ["pytorch", "nanogpt"])
def test_pickles(whole, outcome, tmp_path, monkeypatch, format, name):
    monkeypatch.chdir(tmp_path)
    body, sentence = PICKLES[name]
    files = whole(format)
    (file,) = [file for file in files if file.endswith((".bin", ".pt"))]
    members = unzipped(files[file])
    for data in (zipped({**members, "archive/data.pkl": pickled(body)}), pickled(body)):
        found = outcome({**files, file: data})
        assert found.startswith("CheckpointError: "), found
    assert not (tmp_path / "ran").exists() and not (tmp_path / "case" / "ran").exists()
    found = outcome({**files, file: zipped({**members, "archive/data.pkl": pickled(body)})})
    assert re.search(sentence if format == "pytorch" else "", found), found


def test_what_stands_beside_a_state_dict_is_not_run(whole, outcome, tmp_path, monkeypatch):
    """Trainers save objects of their classes: they stay names, wherever they are, and the model opens."""
    monkeypatch.chdir(tmp_path)
    files = whole("nanogpt")
    (file,) = [file for file in files if file.endswith(".pt")]
    members = unzipped(files[file])
    call = RUN + TOUCH + b"\x85R"
    made = RUN + TOUCH + b"\x85\x81}" + short("x") + call + b"sb"
    odd = short("odd") + b"}" + call + b"K\1s" + LAUGHS + b"K\1s" + b"NK\1s" + b"s"
    twice = b"}" + short("a") + b"h\xf0s" + short("b") + b"h\xf0s" + b"q\xf00"
    deep = b"}q\xf00" + twice * 60 + short("deep") + b"h\xf0s"
    extra = short("run") + call + b"s" + short("made") + made + b"s" + odd + deep + short("laughs") + LAUGHS + b"s"
    members["archive/data.pkl"] = members["archive/data.pkl"][:-1] + extra + pickle.STOP
    for data in (files[file], zipped(members)):
        assert outcome({**files, file: data}) == "opened"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "case" / "ran").exists()


def patched(data, signature, place, form, *values):
    """An archive with numbers changed in its first header of a kind."""
    start = data.index(signature) + place
    new = struct.pack(form, *values)
    return data[:start] + new + data[start + len(new) :]


def deflated(data):
    members = unzipped(data)
    return zipped({**members, "archive/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)


def overlapping(data):
    """Every member is the first one's bytes."""
    return re.sub(rb"(?s)(PK\x01\x02.{38}).{4}", rb"\g<1>\0\0\0\0", data)


def many(data):
    start = data.index(b"PK\1\2")
    entry = data[start : start + 46].replace(b"\0\0\0\0\0\0", b"\0\0\0\0\0\0")[:28] + bytes(18)
    body = data[:start] + entry * 20_000
    end = struct.pack("<4s4xHHII2x", b"PK\5\6", 20_000, 20_000, len(entry) * 20_000, start)
    return body + end


WIDE = 2**32 - 1
ARCHIVES = {
    "compressed": (deflated, "compressed or encrypted"),
    "members over each other": (overlapping, "not a whole"),
    "a size that lies": (lambda d: patched(d, b"PK\1\2", 20, "<II", 2**31, 2**31), "larger than it is"),
    "zip64 without its sizes": (lambda d: patched(d, b"PK\1\2", 20, "<II", *[2**32 - 1] * 2), "larger than it is"),
    "a zip64 end that is not there": (lambda d: patched(d, b"PK\5\6", 10, "<HII", 2**16 - 1, WIDE, WIDE), "not a"),
    "an offset that lies": (lambda d: patched(d, b"PK\1\2", 42, "<I", 2**32 - 2), "would lie at bytes"),
    "a directory outside": (lambda d: patched(d, b"PK\5\6", 12, "<II", 2**31, 2**31), "its directory would lie"),
    "a count that lies": (lambda d: patched(d, b"PK\5\6", 10, "<H", 9999), "not a whole"),
    "very many members": (many, "20000 members"),
    "encrypted": (lambda d: patched(d, b"PK\1\2", 8, "<H", 1), "compressed or encrypted"),
    "no pickle": (lambda d: zipped({"archive/data": b""}), "0 pickles"),
    "two pickles": (lambda d: zipped({**unzipped(d), "x/data.pkl": b"."}), "2 pickles"),
    "the other byte order": (lambda d: zipped({**unzipped(d), "archive/byteorder": b"big"}), "other byte order"),
    "a number changed": (lambda d: d[:5000] + bytes([d[5000] ^ 1]) + d[5001:], "checksum is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(whole, outcome, name):
    damage, sentence = ARCHIVES[name]
    files = whole("pytorch")
    found = outcome({**files, "pytorch_model.bin": damage(files["pytorch_model.bin"])})
    assert re.match(f"CheckpointError: .*({sentence})", found), found


def test_an_archive_with_the_end_of_zip64_opens(whole, outcome):
    files = whole("pytorch")
    data = files["pytorch_model.bin"]
    count, size, start = struct.unpack("<HII", data[-12:-2])
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    assert outcome({**files, "pytorch_model.bin": data[:-22] + end}) == "opened"
