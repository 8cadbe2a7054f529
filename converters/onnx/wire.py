"""The bytes of a protobuf message of which some fields get others, and all else stays: unknown
fields, their order, and how numbers are spelled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Chunk = bytes | memoryview
# By the number of a field and its place among those of that number, None for one that stands there
# once: what is made of its bytes, or edits of the message that it is.
Edits = Mapping[tuple[int, int | None], Any]
_VARINT, _FIXED64, _BYTES, _START, _END, _FIXED32 = range(6)


def edited(data: memoryview, edits: Edits) -> list[Chunk]:
    """A message in pieces, with the edits of its fields."""
    out: list[Chunk] = []
    done, counts, used = 0, dict[int, int](), set[tuple[int, int | None]]()
    for number, at, begin, end in fields(data):
        place = counts.get(number, 0)
        counts[number] = place + 1
        key = (number, place) if (number, place) in edits else (number, None)
        if key not in edits:
            continue
        if key in used:
            raise ValueError(f"field {number} stands there twice")
        used.add(key)
        edit: Any = edits[key]
        body = data[begin:end]
        new = edit(body) if callable(edit) else edited(body, edit)
        size = sum(map(len, new))
        out.append(data[done:at])
        out.append(data[at:begin] if size == end - begin else header(number, size))
        out += new
        done = end
    if used != set(edits):
        raise ValueError("a field that is to be changed is missing")
    return [*out, data[done:]]


def without(data: memoryview, number: int, new: Sequence[Chunk]) -> list[Chunk]:
    """A message whose fields of that number are one, whose bytes are ``new``."""
    out: list[Chunk] = []
    done, first = 0, True
    for found, at, begin, end in fields(data):
        if found != number:
            continue
        out.append(data[done:at])
        if first:
            size = sum(map(len, new))
            same = size == end - begin and data[at] & 7 == _BYTES
            out += [data[at:begin] if same else header(number, size), *new]
        done, first = end, False
    return [*out, data[done:]]


def header(number: int, size: int) -> bytes:
    """What stands before the bytes of a field."""
    return _varint(number << 3 | _BYTES) + _varint(size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def fields(data: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, where it begins, and where its value begins and ends."""
    at = 0
    while at < len(data):
        tag, begin = _read(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            size, begin = _read(data, begin)
            end = begin + size
        else:
            end = _SKIP[kind](data, begin) if kind in _SKIP else len(data) + 1
        if end > len(data) or not number:
            raise ValueError("it is no protobuf message")
        yield number, at, begin, end
        at = end


def _read(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is no protobuf message")


def _group(data: memoryview, at: int) -> int:
    """The end of a group, as protobuf's first version has messages."""
    depth = 1
    while depth:
        tag, at = _read(data, at)
        kind = tag & 7
        if kind in (_START, _END):
            depth += 1 if kind == _START else -1
        elif kind == _BYTES:
            size, at = _read(data, at)
            at += size
        else:
            at = _SKIP[kind](data, at)
    return at


_SKIP: dict[int, Callable[[memoryview, int], int]] = {
    _VARINT: lambda data, at: _read(data, at)[1],
    _FIXED64: lambda data, at: at + 8,
    _START: _group,
    _FIXED32: lambda data, at: at + 4,
}
