"""Reads messages of anybody: bounded before they are parsed, and never with a surprise.

A message grows when it is parsed: an empty tensor takes two bytes on the wire and over fifty in memory, a size of one
byte takes eight. So whatever is not the content of a ``bytes`` field is counted first, by walking over the wire format
(https://protobuf.dev/programming-guides/encoding) without building anything, and bounded by :data:`STRUCTURE_BYTES`
(THREATS T02).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

__all__ = ["REJECTED", "SMALL_BYTES", "STRUCTURE_BYTES", "Rejected", "delimited", "parser", "structure_bytes"]

STRUCTURE_BYTES: Final = 64 * 2**10  # 64 tensors cross a cut at most, each with a header of some 100 bytes
#: What is small cannot grow large: at most 15 MB of empty tensors, for as long as the message is read. The walk, which
#: costs a small model's frame as much as its parsing, is for the rest.
SMALL_BYTES: Final = 256 * 2**10
_MAX_DEPTH: Final = 8  # an opening's spec nests three deep

_M = TypeVar("_M", bound=Message)
_FIXED: Final = {1: 8, 5: 4}  # wire types of fixed width
_VARINT: Final = 0
_LENGTH: Final = 2


class Rejected:
    """What stands for a message that could not be read: it has no part of anything."""

    def WhichOneof(self, name: str) -> str:  # noqa: N802 -- as a message has it
        """Never a field of ours."""
        del name
        return "rejected"


REJECTED: Final = Rejected()


def parser(kind: type[_M]) -> Callable[[bytes], _M | Rejected]:
    """A gRPC deserializer for ``kind``; gRPC itself would answer a peer's garbage as a defect of ours."""
    descriptor: Any = kind.DESCRIPTOR  # two classes, one for each implementation of protobuf

    def parse(data: bytes) -> _M | Rejected:
        if len(data) > SMALL_BYTES and structure_bytes(data, descriptor) > STRUCTURE_BYTES:
            return REJECTED
        try:
            return kind.FromString(data)
        except DecodeError:
            return REJECTED

    return parse


def delimited(number: int, parts: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """Field ``number`` of a message, whose content is ``parts``: to be joined, once, with whatever stands beside it.

    protobuf copies what it is given three times over before a message is on its way; a large tensor's bytes are worth
    putting together by hand (https://protobuf.dev/programming-guides/encoding).
    """
    content = list(parts)
    return [_varint_of(number << 3 | _LENGTH) + _varint_of(sum(len(part) for part in content)), *content]


def structure_bytes(data: bytes, descriptor: Descriptor) -> int:
    """How many bytes of ``data`` are not content of ``bytes`` fields; counting stops above :data:`STRUCTURE_BYTES`.

    What is no message at all counts as above it.
    """
    try:
        return _walk(memoryview(data), descriptor, 0, 0)
    except (IndexError, ValueError):
        return STRUCTURE_BYTES + 1


def _walk(data: memoryview, descriptor: Descriptor | None, counted: int, depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise ValueError
    fields: Any = {} if descriptor is None else descriptor.fields_by_number
    at, end = 0, len(data)
    while at < end and counted <= STRUCTURE_BYTES:
        start = at
        tag, at = _varint(data, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, at = _varint(data, at)
        elif wire_type == _LENGTH:
            size, at = _varint(data, at)
            counted += at - start
            start, at = at, at + size
            if at > end:
                raise ValueError
            field = fields.get(tag >> 3)
            if field is not None and field.type == FieldDescriptor.TYPE_BYTES:
                continue
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
                counted = _walk(data[start:at], field.message_type, counted, depth + 1)
                continue
        else:
            at += _FIXED[wire_type] if wire_type in _FIXED else end + 1  # groups are not ours
            if at > end:
                raise ValueError
        counted += at - start
    return counted


def _varint_of(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:  # noqa: PLR2004 -- seven bits a byte
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 -- the continuation bit
            return value, at
        shift += 7
        if shift > 63:  # noqa: PLR2004 -- a varint holds 64 bits
            raise ValueError
