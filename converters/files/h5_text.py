"""Text in the attributes of an HDF5 file, read without the HDF5 library.

The library reads text of any length from heaps whose sizes it believes: a broken heap makes it hang
or crash, which no exception tells. Everything else of a file it checks.

Source: "HDF5 File Format Specification", III.E and IV.A.
"""

from collections.abc import Callable, Iterator
from typing import Any

_CONTINUED, _ATTRIBUTE = 0x10, 0x0C


Heaps = dict[int, dict[int, tuple[int, int]]]


def texts(
    raw: Any, address: int, name: str, count: int, spend: Callable[[int], None]
) -> list[bytes]:
    """The texts of an attribute of the object at an address.

    Args:
        raw: the bytes of the file.
        address: of the object's header.
        name: of the attribute.
        count: how many texts it has.
        spend: is told how many bytes they take, before they are copied.

    Raises:
        ValueError: for a header or heap that is broken, or of a kind that Keras never wrote.
    """
    for kind, start, end in _messages(raw, address):
        if kind != _ATTRIBUTE:
            continue
        version = raw[start]
        sizes = [_number(raw, start + at, 2) for at in (2, 4, 6)]
        at = start + (9 if version == 3 else 8)
        own = bytes(raw[at : at + sizes[0]]).split(b"\0")[0]
        if version not in (1, 2, 3) or own.decode() != name:
            continue
        for size in sizes:  # name, type and shape, which version 1 pads
            at += size + (-size % 8 if version == 1 else 0)
        if at + 16 * count > end:
            raise ValueError(f"the attribute {name} ends before its texts")
        heaps: Heaps = {}
        return [_text(raw, at + 16 * i, heaps, spend) for i in range(count)]
    raise ValueError(f"the attribute {name} is stored in a way that is not read")


def _messages(raw: Any, address: int) -> Iterator[tuple[int, int, int]]:
    """The kind, start and end of each message of an object's header."""
    newer = bytes(raw[address : address + 4]) == b"OHDR"
    blocks: list[tuple[int, int]] = []
    if newer:
        flags = raw[address + 5]
        at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        blocks.append((at + width, at + width + _number(raw, at, width)))
        head = 6 if flags & 4 else 4
    else:
        if raw[address] != 1:
            raise ValueError("an object's header of an unknown version")
        blocks.append((address + 16, address + 16 + _number(raw, address + 8, 4)))
        head = 8
    seen: set[int] = set()
    while blocks:
        at, end = blocks.pop(0)
        if at in seen or end > len(raw):
            raise ValueError("an object's header refers to itself, or out of the file")
        seen.add(at)
        while at + head <= end:
            kind = raw[at] if newer else _number(raw, at, 2)
            size = _number(raw, at + (1 if newer else 2), 2)
            start = at + head
            if start + size > end:
                raise ValueError("a message is larger than its header")
            if kind == _CONTINUED:
                there, length = _number(raw, start, 8), _number(raw, start + 8, 8)
                # A block of the newer kind has a signature and a checksum around its messages.
                blocks.append((there + 4, there + length - 4) if newer else (there, there + length))
            yield kind, start, start + size
            at = start + size


def _text(raw: Any, at: int, heaps: Heaps, spend: Callable[[int], None]) -> bytes:
    """A text: its length, and the address of a heap and the number of an object in it."""
    length, heap, wanted = _number(raw, at, 4), _number(raw, at + 4, 8), _number(raw, at + 12, 4)
    if length == 0:
        return b""
    if heap not in heaps:
        if len(heaps) > 1_000:
            raise ValueError("its texts are in too many heaps")
        heaps[heap] = _objects(raw, heap)
    if wanted not in heaps[heap]:
        raise ValueError("a text is not in its heap")
    start, size = heaps[heap][wanted]
    if length > size or start + length > len(raw):
        raise ValueError("a text is longer than its place in the heap")
    spend(length)
    return bytes(raw[start : start + length])


def _objects(raw: Any, heap: int) -> dict[int, tuple[int, int]]:
    """The number, start and size of each object of a heap."""
    if bytes(raw[heap : heap + 4]) != b"GCOL":
        raise ValueError("a text is in no heap")
    out: dict[int, tuple[int, int]] = {}
    end = min(heap + _number(raw, heap + 8, 8), len(raw))
    here = heap + 16
    while here + 16 <= end:
        index, size = _number(raw, here, 2), _number(raw, here + 8, 8)
        if index == 0:
            break
        out.setdefault(index, (here + 16, size))
        here += 16 + size + -size % 8
    return out


def _number(raw: Any, at: int, width: int) -> int:
    if at < 0 or at + width > len(raw):
        raise ValueError("a number stands outside the file")
    return int.from_bytes(raw[at : at + width], "little")
