"""Hostile files of Flax and of Keras: trees in msgpack and in HDF5 that lie, lead elsewhere, or have no end."""

import io
import re
import struct

import h5py
import msgpack
import numpy as np
import pytest


def extension(shape, dtype, count, size=None, kind=1):
    body = b"\x93" + shape + msgpack.packb(dtype) + b"\xc6" + struct.pack(">I", count)
    return b"\xc9" + struct.pack(">Ib", len(body) + count if size is None else size, kind) + body + bytes(count)


def chunks(*parts, length=2, order="01"):
    pieces = b"".join(msgpack.packb(n) + part for n, part in zip(order, parts, strict=True))
    start = b"\x81\xa1x\x83" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3\xa5shape\x81\xa10"
    return start + msgpack.packb(length) + b"\xa6chunks\x82" + pieces


def many(count, value):
    """A map of so many equal values."""
    return b"\xdf" + struct.pack(">I", count) + b"".join(msgpack.packb(str(n)) + value for n in range(count))


ONE = extension(b"\x91\1", "float32", 4)
EMPTY = extension(b"\x91\0", "float32", 0)
MSGPACKS = {
    "a map without end": (b"\xdf\xff\xff\xff\xff", "it ends within|not a whole"),
    "maps in maps": (b"\x81\xa1a" * 10**5 + b"\x80", "nested deeper than 32"),
    "an extension that lies": (b"\x81\xa1a" + extension(b"\x91\1", "float32", 4, 2**32 - 1), "4 bytes, which its"),
    "a shape that lies": (b"\x81\xa1a" + extension(b"\x92\xcf" + b"\xff" * 8 + b"\1", "float32", 4), "4 bytes, which"),
    "a negative shape": (b"\x81\xa1a" + extension(b"\x92\xff\xff", "uint8", 1), "not a whole"),
    "a dtype that is none": (b"\x81\xa1a" + extension(b"\x91\1", "complex64", 8), "complex64"),
    "objects": (b"\x81\xa1a" + extension(b"\x91\1", "object", 8), "object"),
    "an extension of another kind": (b"\x81\xa1a" + extension(b"\x91\1", "float32", 4, kind=2), "is not an array"),
    "a long name many times": (b"\x81" + msgpack.packb("a" * 65535) + many(999, EMPTY), "longer than a name"),
    "very many maps": (many(10**5, b"\x80"), "more than 8192 values"),
    "very many arrays": (many(20_000, EMPTY), "more than 8192 values"),
    "a name twice": (b"\x82\xa1a" + ONE + b"\xa1a" + ONE, "is there twice"),
    "more behind it": (b"\x81\xa1a" + ONE + b"\0", "goes on after its end"),
    "chunks of two types": (chunks(ONE, extension(b"\x91\1", "uint8", 1)), "different types"),
    "chunks out of order": (chunks(ONE, ONE, order="10"), "out of order"),
    "chunks that do not fit": (chunks(ONE, ONE, length=2**40), "not a whole"),
    "a string for an array": (b"\x81\xa1a\xa1b", "not a whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", MSGPACKS)
def test_msgpacks(whole, outcome, name):
    data, sentence = MSGPACKS[name]
    found = outcome({**whole("flax-msgpack"), "flax_model.msgpack": data})
    assert re.match(f"CheckpointError: .*({sentence})", found), found


def external_link(file):
    file["x"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(file):
    file["x"] = h5py.SoftLink("/transformer")


def cycle(file):
    file["transformer/again"] = file["transformer"]


def outside(file):
    file.create_dataset("x", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("x", layout)


def bomb(file):
    file.create_dataset("x", (10**8,), "f4", chunks=(10**6,), compression="gzip", fillvalue=0)


def chunked(file):
    file.create_dataset("x", (4,), "f4", chunks=(2,), data=np.zeros(4))


def never_written(file):
    file.create_dataset("x", (10**12,), "f4")


def big_endian(file):
    file.create_dataset("x", (4,), ">f4", data=np.zeros(4))


def compound(file):
    file.create_dataset("x", (4,), [("a", "f4"), ("b", "f4")], data=np.zeros(4, [("a", "f4"), ("b", "f4")]))


def strings(file):
    file.create_dataset("x", (4,), h5py.string_dtype(), data=["a"] * 4)


def long_name(file):
    file.create_dataset("x" * 300, (1,), "f4", data=[0])


def deep(file):
    file.create_dataset("x/" * 900 + "x", (1,), "f4", data=[0])


def missing(file):
    names = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    del file[names[0]]


HDF5 = {
    external_link: "a link is not followed", soft_link: "link, which is not followed", cycle: "is there twice",
    outside: "lies in another file", virtual: "not stored in one piece", bomb: "compressed",
    chunked: "not stored in one piece", never_written: "would lie at bytes", big_endian: "of a type that no weight has",
    compound: "of a type that no weight has", strings: "of a type that no weight has", long_name: "an object named",
    deep: "nested too deeply", missing: "lacks the tensor",
}  # fmt: skip


@pytest.mark.parametrize("damage", HDF5, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("format", ["tf-h5", "keras-weights", "keras-hub"])
def test_hdf5(whole, outcome, format, damage):
    files = whole(format)
    (name,) = [name for name in files if name.endswith(".h5")]
    data = io.BytesIO(files[name])
    with h5py.File(data, "r+") as file:
        file.require_group("transformer")
        damage(file)
    found = outcome({**files, name: data.getvalue()})
    assert re.match(f"CheckpointError: .*({HDF5[damage]})", found), found


def test_hdf5_of_a_newer_layout_says_what_to_do(whole, outcome):
    data = io.BytesIO()
    with h5py.File(data, "w", libver="latest") as file:
        file["x"] = np.zeros(3)
    found = outcome({**whole("tf-h5"), "tf_model.h5": data.getvalue()})
    assert re.match("CheckpointError: .*superblock . is newer than what Keras writes", found), found


def test_hdf5_whose_objects_lie_over_each_other(whole, outcome):
    """Half a megabyte that would be read as six thousand objects of twenty thousand messages each."""
    nodes, heap, objects = 4096, 2048, 300_000
    data = bytearray(500_000)
    data[:96] = whole("tf-h5")["tf_model.h5"][:96]
    data[64:72] = struct.pack("<Q", 1024)  # the root group
    data[1024:1064] = struct.pack("<BxH4xI4xHH4xQQ", 1, 1, 24, 17, 16, 1500, heap)
    data[1500:1532] = struct.pack("<4sBBHQQQ", b"TREE", 0, 0, 1, 0, 0, 0)[:32]
    data[1532:1540] = struct.pack("<Q", nodes)
    data[heap : heap + 32] = struct.pack("<4s4xQQQ", b"HEAP", 16, 0, heap + 64)
    data[heap + 64 : heap + 66] = b"a\0"
    data[nodes : nodes + 8] = struct.pack("<4sBxH", b"SNOD", 1, 6000)
    for i in range(6000):
        struct.pack_into("<QQI", data, nodes + 8 + 40 * i, 0, objects + 16 * i, 0)
        struct.pack_into("<BxH4xI", data, objects + 16 * i, 1, 65535, 100_000)
    found = outcome({**whole("tf-h5"), "tf_model.h5": bytes(data)})
    assert re.match("CheckpointError: .*not a whole HDF5", found), found
