"""The kinds of damage that `conversion_fuzz` does to the files of a checkpoint, each a function of a generator."""

import io
import json
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from google_crc32c import extend

from gpt2_multi.files.containers.tf_bundle import masked

Files = dict[str, bytes]
Places = dict[str, list[int]]
Damage = Callable[[random.Random, Files, Places], None]

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)
VALUES: list[Any] = [
    0, 1, -1, 2, 3, 10**6, 10**9, 2**63, 10**400, 1.5, float("nan"), float("inf"), 1e308, -1e-300, None, True, False,
    "", "2", "../x", "/etc/passwd", "a" * 10**5, "\x00", "\ud800", [], {}, [1], ["GPT2Model"],
    ["TFGPT2ForQuestionAnswering"], [[]] * 50, {"0": [0]}, {"9" * 5000: "x"}, {"a": 1}, "float16", "gelu",
]  # fmt: skip
KEYS = (
    "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size", "num_labels", "id2label", "label2id",
    "pruned_heads", "architectures", "dtype", "torch_dtype", "add_cross_attention", "tie_word_embeddings", "n_ctx",
    "layer_norm_epsilon", "resid_pdrop", "model_type", "eos_token_id", "summary_type", "n_vocab", "weight_map",
    "class_name", "config", "gpt2_config", "other",
)  # fmt: skip


def fitting(files: Files) -> list[Damage]:
    """The kinds of damage that can be done to these files."""
    found = [truncate, flip, flip, number, number, number, splice, swap, lose, confuse]
    if any(name.endswith(".json") for name in files):
        found += [setting, setting]
    if any(name.endswith(".index.json") for name in files):
        found += [misplace] * 3
    if _zips(files):
        found += [repickle, reprogram, rezip] * 2
    if any(name.endswith(".ckpt.index") for name in files):
        found += [reindex] * 5
    if any(data.startswith(LLMC) for data in files.values()):
        found += [rehead] * 5
    return found


def _pick(rng: random.Random, files: Files, pattern: str = "") -> str:
    """A file, a large one rather than a small one."""
    names = [name for name in files if re.search(pattern, name) and files[name]] or list(files)
    return rng.choices(names, [1 + 3 * (not name.endswith(".json")) for name in names])[0]


def _place(rng: random.Random, data: bytes, places: list[int]) -> int:
    """A place that is no tensor's, as a rule, or near the beginning or the end."""
    if places and rng.random() < 0.9:
        return min(rng.choice(places), len(data) - 1)
    return rng.randrange(len(data))


def truncate(rng: random.Random, files: Files, places: Places) -> None:
    """Cut a file off."""
    name = _pick(rng, files)
    files[name] = files[name][: _place(rng, files[name], places.get(name, [])) if files[name] else 0]


def flip(rng: random.Random, files: Files, places: Places) -> None:
    """Change single bits or bytes."""
    name = _pick(rng, files)
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 2, 5, 20))) if data else ():
        place = _place(rng, data, places.get(name, []))
        data[place] = data[place] ^ 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(256)
    files[name] = bytes(data)


def number(rng: random.Random, files: Files, places: Places) -> None:
    """Overwrite a number with one that lies."""
    name = _pick(rng, files, r"(?<!\.json)$")
    data, width = bytearray(files[name]), rng.choice((1, 2, 4, 8))
    if len(data) < 16:
        return
    place = min(_place(rng, data, places.get(name, [])), len(data) - 8)
    place -= rng.choice((0, place % width))
    value = rng.choice((*NUMBERS, len(data), len(data) - 1, rng.randrange(len(data)), place))
    data[place : place + width] = (value % 256**width).to_bytes(width, rng.choice(("little", "little", "big")))
    files[name] = bytes(data)


def splice(rng: random.Random, files: Files, places: Places) -> None:
    """Copy a part of a file over, or in between, another part."""
    name = _pick(rng, files)
    data = files[name]
    if data:
        start, to = (_place(rng, data, places.get(name, [])) for _ in range(2))
        part = data[start : start + rng.choice((1, 8, 16, 40, 100, 1000))] * rng.choice((1, 1, 1, 2, 300))
        files[name] = data[:to] + part + data[to + rng.choice((0, len(part))) :]


def swap(rng: random.Random, files: Files, places: Places) -> None:
    """Let two files change places, or copy one."""
    one, other = (rng.choice(list(files)) for _ in range(2))
    files[one], files[other] = files[other], rng.choice((files[one], files[other]))


def lose(rng: random.Random, files: Files, places: Places) -> None:
    """Leave a file out, or empty."""
    name = rng.choice(list(files))
    if len(files) > 1 and rng.random() < 0.5:
        del files[name]
    else:
        files[name] = b""


def confuse(rng: random.Random, files: Files, places: Places) -> None:
    """Put NaN, infinities or noise among the numbers."""
    name = _pick(rng, files, r"(?<!\.json)$")
    data = bytearray(files[name])
    for _ in range(5) if len(data) > 16 else ():
        place = rng.randrange(len(data) - 4)
        data[place : place + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 1e38)))
    files[name] = bytes(data)


def _value(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        deep: Any = 0
        for _ in range(rng.choice((10, 200, 400, 900))):
            deep = rng.choice(([deep], {"a": deep}))
        return deep
    return rng.choice(VALUES)


def setting(rng: random.Random, files: Files, places: Places) -> None:
    """Give a setting of a JSON file an absurd value, or take it out."""
    name = rng.choice([name for name in files if name.endswith(".json")] or list(files))
    try:
        found = json.loads(files[name])
    except ValueError:
        return
    inner = found.get("config", found) if isinstance(found, dict) and rng.random() < 0.7 else found
    if isinstance(inner, dict):
        for _ in range(rng.choice((1, 1, 2, 4))):
            key = rng.choice(list(inner) or ["x"]) if rng.random() < 0.6 else rng.choice(KEYS)
            if rng.random() < 0.15:
                inner.pop(key, None)
            else:
                inner[key] = _value(rng)
    files[name] = json.dumps(found).encode("utf-8", "surrogatepass")


def misplace(rng: random.Random, files: Files, places: Places) -> None:
    """Let an index of shards name what is not there, or not to be read."""
    for name in [name for name in files if name.endswith(".index.json")]:
        try:
            found = json.loads(files[name])
            wanted = found["weight_map"]
            for key in rng.sample(sorted(wanted), min(len(wanted), rng.choice((1, 2, 100)))):
                wanted[key] = rng.choice(
                    ("../x", "/etc/passwd", name, "config.json", ".", "", "..", "a/b", "a\0b", "\ud800", "~",
                     "x" * 300, 5, None, rng.choice(list(files)))
                )  # fmt: skip
            if rng.random() < 0.3:
                wanted[rng.choice(("x", "", "\ud800", "x" * 10**5))] = rng.choice(list(files))
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
        files[name] = json.dumps(found).encode()


def _zips(files: Files) -> list[str]:
    return [name for name, data in files.items() if data.startswith(b"PK\3\4")]


def unzipped(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except Exception:
        return {}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def repickle(rng: random.Random, files: Files, places: Places) -> None:
    """Damage the pickle of an archive, and make the checksums right."""
    for name in rng.sample(_zips(files), min(1, len(_zips(files)))):
        members = unzipped(files[name])
        for member in [member for member in members if member.endswith("data.pkl")]:
            inner = {member: members[member]}
            rng.choice((flip, flip, number, splice, truncate))(rng, inner, {})
            members[member] = inner[member]
        files[name] = zipped(members)


ARGUMENTS: dict[bytes, Callable[[random.Random], bytes]] = {
    pickle.GLOBAL: lambda rng: rng.choice(
        (b"os\nsystem\n", b"builtins\neval\n", b"collections\nOrderedDict\n", b"torch._utils\n_rebuild_tensor_v2\n",
         b"torch\nFloatStorage\n", b"torch._utils\n_rebuild_parameter\n")
    ),
    pickle.INST: lambda rng: b"os\nsystem\n",
    pickle.BINUNICODE: lambda rng: _text(rng),
    pickle.SHORT_BINUNICODE: lambda rng: b"\x02os",
    pickle.BINPUT: lambda rng: bytes([rng.randrange(8)]),
    pickle.BINGET: lambda rng: bytes([rng.randrange(8)]),
    pickle.LONG_BINPUT: lambda rng: struct.pack("<I", rng.choice((0, 7, 2**32 - 1))),
    pickle.LONG_BINGET: lambda rng: struct.pack("<I", rng.choice((0, 7, 2**32 - 1))),
    pickle.BININT: lambda rng: struct.pack("<i", rng.choice((0, 1, -1, 2**31 - 1, 13, 8))),
    pickle.BININT1: lambda rng: bytes([rng.randrange(256)]),
    pickle.LONG1: lambda rng: b"\xff" + bytes(254) + b"\x7f",
    pickle.LONG4: lambda rng: struct.pack("<i", rng.choice((-1, 4, 2**31 - 1))) + b"\1\1\1\1",
    pickle.BINBYTES8: lambda rng: struct.pack("<Q", rng.choice((0, 2**63, 2**64 - 1))),
    pickle.BINUNICODE8: lambda rng: struct.pack("<Q", rng.choice((0, 2**63, 2**64 - 1))),
    pickle.FRAME: lambda rng: struct.pack("<Q", 2**63),
    pickle.BINFLOAT: lambda rng: struct.pack(">d", float("nan")),
    pickle.PROTO: lambda rng: bytes([rng.randrange(7)]),
    pickle.EXT1: lambda rng: b"\1",
    pickle.PERSID: lambda rng: b"storage\n",
    pickle.INT: lambda rng: rng.choice((b"1\n", b"9" * 5000 + b"\n", b"x\n")),
    pickle.UNICODE: lambda rng: b"os\n",
}  # fmt: skip
PLAIN = [getattr(pickle, name) for name in (
    "MARK", "STOP", "POP", "POP_MARK", "DUP", "NONE", "REDUCE", "APPEND", "APPENDS", "BUILD", "DICT", "EMPTY_DICT",
    "LIST", "EMPTY_LIST", "OBJ", "SETITEM", "SETITEMS", "TUPLE", "EMPTY_TUPLE", "NEWOBJ", "NEWOBJ_EX", "TUPLE1",
    "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE", "STACK_GLOBAL", "MEMOIZE", "EMPTY_SET", "ADDITEMS", "FROZENSET",
    "BINPERSID",
)]  # fmt: skip


def _text(rng: random.Random) -> bytes:
    text = rng.choice(
        (b"storage", b"cpu", b"0", b"model", b"model_args", b"touch ran", b"os system", b"\xff\xfe", b"x" * 999)
    )
    return struct.pack("<I", rng.choice((len(text), len(text), len(text), 2**32 - 1))) + text


def program(rng: random.Random) -> bytes:
    """A pickle of random opcodes, most of which have what they take."""
    out = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for _ in range(rng.choice((3, 10, 30, 100))):
        opcode = rng.choice((*PLAIN, *ARGUMENTS))
        out += [opcode, ARGUMENTS.get(opcode, lambda rng: b"")(rng)] * rng.choice((1, 1, 1, 2, 50))
    return b"".join(out) + rng.choice((pickle.SETITEMS, b"")) + pickle.STOP


def reprogram(rng: random.Random, files: Files, places: Places) -> None:
    """Put random opcodes in the place of a pickle, or into it."""
    for name in rng.sample(_zips(files), min(1, len(_zips(files)))):
        members = unzipped(files[name])
        for member in [member for member in members if member.endswith("data.pkl")]:
            old, new = members[member], program(rng)
            place = rng.randrange(2, len(old)) if len(old) > 2 else 0
            members[member] = rng.choice((new, old[:place] + new[4:-2] + old[place:], new[:-1] + old, old[:-1] + new))
        files[name] = rng.choice((zipped(members), *[data for m, data in members.items() if m.endswith(".pkl")][:1]))


def rezip(rng: random.Random, files: Files, places: Places) -> None:
    """Make an archive that is none of torch.save: compressed, without members, with a lie in a header."""
    for name in rng.sample(_zips(files), min(1, len(_zips(files)))):
        members = unzipped(files[name])
        if rng.random() < 0.3 and members:
            del members[rng.choice(list(members))]
        if rng.random() < 0.3 and members:
            members[rng.choice(list(members))] = bytes(rng.choice((0, 1, 10**6)))
        data = bytearray(zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))))
        for signature in rng.sample((b"PK\1\2", b"PK\3\4", b"PK\5\6"), rng.randrange(3)):
            starts = [found.start() for found in re.finditer(re.escape(signature), data)]
            if starts:
                place = rng.choice(starts) + rng.randrange(4, 46)
                data[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        files[name] = bytes(data)


LLMC = struct.pack("<i", 20240326)


def rehead(rng: random.Random, files: Files, places: Places) -> None:
    """Let some of the eight numbers of a header of llm.c lie, and cut the file to what they say or not."""
    for name in [name for name, data in files.items() if data.startswith(LLMC) and len(data) >= 1024]:
        header = list(struct.unpack_from("<8i", files[name]))
        for _ in range(rng.choice((1, 1, 2, 3))):
            near = rng.choice(header) + rng.choice((-1, 0, 1))
            header[rng.randrange(8)] = rng.choice((*[n for n in NUMBERS if n < 2**31], near, -1, -(2**31)))
        end = rng.choice((len(files[name]), rng.randrange(32, len(files[name]))))
        files[name] = struct.pack("<8i", *[min(n, 2**31 - 1) for n in header]) + files[name][32:end]


def reindex(rng: random.Random, files: Files, places: Places) -> None:
    """Damage the index of a TensorFlow checkpoint, and make the checksums of its blocks right."""
    for name in [name for name in files if name.endswith(".ckpt.index")]:
        inner = {name: files[name]}
        rng.choice((flip, flip, number, varint))(rng, inner, {})
        files[name] = sealed(files[name], inner[name])


def varint(rng: random.Random, files: Files, places: Places) -> None:
    """Overwrite some bytes with a number of protocol buffers that lies."""
    for name, data in files.items():
        place, value = rng.randrange(len(data) or 1), rng.choice((*NUMBERS, len(data)))
        packed = bytes(
            value >> shift & 127 | (128 if value >> shift + 7 else 0) for shift in range(0, value.bit_length() or 1, 7)
        )
        files[name] = data[:place] + packed + data[place + len(packed) :]


def sealed(old: bytes, new: bytes) -> bytes:
    """`new` with the footer of `old` and with checksums that are right for the blocks of `old`."""
    if len(old) < 60 or len(new) != len(old):
        return new
    data = bytearray(new[:-48] + old[-48:])
    for start, size in blocks(old):
        if start + size + 5 <= len(data):
            checksum = masked(extend(0, bytes(data[start : start + size + 1])))
            data[start + size + 1 : start + size + 5] = struct.pack("<I", checksum)
    return bytes(data)


def blocks(data: bytes) -> list[tuple[int, int]]:
    """Where the blocks of an index begin, and how long they are: they follow each other, with five bytes between."""
    found, start = [], 0
    for place in range(1, len(data) - 52):
        checksum = struct.pack("<I", masked(extend(0, data[start : place + 1])))
        if data[place] == 0 and data[place + 1 : place + 5] == checksum:
            found.append((start, place - start))
            start = place + 5
    return found
