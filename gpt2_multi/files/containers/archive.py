"""The members of a zip archive, none of them compressed, mapped from it.

Format: PKWARE, "APPNOTE.TXT", sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end).
The module zipfile makes far more of a directory than its bytes, and raises much that is no ValueError.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt2_multi.files.arrays import MOST, Array, chunks, release, tensor

START = b"PK\x03\x04"
ZIP64 = 1  # the extra field of lengths beyond 4 GB
_BYTE = np.dtype(np.uint8)


class Member(NamedTuple):
    """Where the header of a member lies, how long its bytes are, and their checksum."""

    name: str
    header: int
    size: int
    checksum: int


def members(data: Array) -> dict[str, Member]:
    """What an archive holds, by name."""
    count, size, start = _end(data)
    directory = _take(data, start, size, "its directory")
    if count > MOST:
        raise ValueError(f"it has {count} members; no GPT-2 has as many")
    found = {member.name: member for member in _entries(directory, count)}
    if sum(member.size for member in found.values()) > len(data):
        raise ValueError("its members are larger than it is")
    return found


def member(data: Array, entry: Member) -> Array:
    """The bytes of a member, whose checksum is right."""
    signature, name, extra = struct.unpack("<4s22xHH", _take(data, entry.header, 30, "a header"))
    if signature != START:
        raise ValueError(f"{entry.name} is not where the archive says")
    found = tensor(data, entry.header + 30 + name + extra, _BYTE, (entry.size,), entry.name)
    checksum = 0
    for piece in chunks(found, _BYTE, entry.name):
        checksum = zlib.crc32(piece.data, checksum)
    release(found)
    if checksum != entry.checksum:
        raise ValueError(f"{entry.name} was changed: its checksum is wrong")
    return found


def _take(data: Array, start: int, size: int, what: str) -> bytes:
    return bytes(tensor(data, start, _BYTE, (size,), what))


def _end(data: Array) -> tuple[int, int, int]:
    """How many members the directory has, how long it is and where it begins."""
    signature, count, size, start = struct.unpack("<4s6xHII2x", _take(data, len(data) - 22, 22, "its end"))
    if signature != b"PK\x05\x06":
        raise ValueError("it does not end as an archive does")
    if count != 0xFFFF and 0xFFFFFFFF not in (size, start):
        return count, size, start
    (place,) = struct.unpack("<8xQ4x", _take(data, len(data) - 42, 20, "its end"))
    numbers: tuple[int, int, int] = struct.unpack("<32xQQQ", _take(data, place, 56, "its end"))
    return numbers


def _entries(directory: bytes, count: int) -> Iterator[Member]:
    place = 0
    for _ in range(count):
        head = struct.unpack_from("<4s4xHH4xIIIHHH8xI", directory, place)
        signature, flags, method, checksum, packed, size, name, extra, comment, header = head
        names = directory[place + 46 : place + 46 + name + extra]
        spelled = names[:name].decode()
        if signature != b"PK\x01\x02" or flags & 1 or method:
            raise ValueError(f"{spelled} is compressed or encrypted, as torch.save never writes it")
        packed, size, header = _wide(names[name:], packed, size, header)
        if packed != size:
            raise ValueError(f"{spelled} has {packed} bytes for {size}")
        yield Member(spelled, header, size, checksum)
        place += 46 + name + extra + comment


def _wide(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """The lengths of a member, from the extra fields where they are beyond 4 GB."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == ZIP64:
            wide = iter(struct.unpack(f"<{length // 8}Q", extra[place + 4 : place + 4 + length // 8 * 8]))
            size, packed, header = (next(wide, n) if n == 0xFFFFFFFF else n for n in (size, packed, header))
        place += 4 + length
    return packed, size, header
