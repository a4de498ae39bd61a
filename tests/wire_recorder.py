"""Every byte between an owner and a node, recorded at the socket and accounted for to the last one.

A relay stands between the two processes and holds the keys of both, so that each side shakes hands with it as with the
other: what it passes on is TLS on either side, and plain HTTP/2 in between. :func:`read` takes a recording apart, down
to the fields of the messages, and :meth:`Wire.sizes` adds up to the number of bytes that were recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import hpack
from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from client_side.spawn import LocalNode
from protos import node_pb2

__all__ = ["Leaf", "Recorder", "Wire", "read"]

UP, DOWN = "up", "down"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER: Final = 9
_GRPC_PREFIX: Final = 5
_DATA, _HEADERS, _GOAWAY, _CONTINUATION = 0x0, 0x1, 0x7, 0x9
_PADDED, _PRIORITY, _END_HEADERS = 0x8, 0x20, 0x4
_CONTROL: Final = {0x2: "priority", 0x3: "reset", 0x4: "settings", 0x6: "ping", _GOAWAY: "goaway", 0x8: "window"}
_METHODS: Final = node_pb2.DESCRIPTOR.services_by_name["Node"].methods_by_name
_NODE: Final = "/cloister.v1.Node/"


@dataclass
class _Connection:
    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


class Recorder:
    """A relay in front of a node; owners that are given its address talk through it.

    Attributes:
        address: what a trainer's ``node`` takes.
    """

    def __init__(self, node: LocalNode) -> None:
        self._port = node.port
        self._inward, self._outward = _contexts(node.identity.folder, node.owner.folder)
        self._connections: list[_Connection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recorder")
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._inward))
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}#{node.address.partition('#')[2]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def recorded(self) -> int:
        """Bytes, both ways, of all connections."""
        return sum(len(c.up) + len(c.down) for c in self._connections)

    def take(self) -> list[tuple[bytes, bytes]]:
        """What every connection carried up and down, and begins anew."""
        taken = [(bytes(c.up), bytes(c.down)) for c in self._connections]
        self._connections.clear()
        return taken

    def _call(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    async def _stop(self) -> None:
        self._server.close()
        ours = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in ours:
            task.cancel()
        await asyncio.gather(*ours, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection()
        self._connections.append(connection)
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.CancelledError):
            there = await asyncio.open_connection("localhost", self._port, ssl=self._outward, server_hostname="node")
            with contextlib.closing(there[1]):
                ways = [_pass_on(reader, there[1], connection.up), _pass_on(there[0], writer, connection.down)]
                await asyncio.wait([asyncio.ensure_future(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
        writer.close()


async def _pass_on(source: asyncio.StreamReader, to: asyncio.StreamWriter, record: bytearray) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await source.read(2**16):
            record += data
            to.write(data)
            await to.drain()


def _contexts(node: Path, owner: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    inward, outward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outward.check_hostname, outward.verify_mode = False, ssl.CERT_NONE
    for context, folder in ((inward, node), (outward, owner)):
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return inward, outward


@dataclass(frozen=True, slots=True)
class Leaf:
    """One field of one message.

    Attributes:
        way: ``up`` or ``down``.
        path: such as ``Train.frame.ciphertexts.words``.
        value: as protobuf has it.
        message: number of the message that it stands in, in the order of the recording.
    """

    way: str
    path: str
    value: Any = field(repr=False)
    message: int


@dataclass
class Wire:
    """A recording, taken apart.

    Attributes:
        messages: each with its way and its method's name.
        leaves: of all messages.
        headers: each with its way, as (name, value).
        odd: what has no place in a conversation of ours.
        total: bytes that were recorded.
    """

    messages: list[tuple[str, str, Message]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    headers: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    total: int = 0
    _counted: Counter[str] = field(default_factory=Counter)

    def sizes(self) -> dict[str, int]:
        """Bytes by what they are: each field of bytes by its path, and framing of three kinds."""
        return dict(self._counted)


def read(recorded: list[tuple[bytes, bytes]]) -> Wire:
    """Takes a recording apart; nothing of it is passed over."""
    wire = Wire()
    for up, down in recorded:
        methods: dict[int, str] = {}
        wire.total += len(up) + len(down)
        if up[: len(_PREFACE)] != _PREFACE:
            if up:
                wire.odd.append(f"a connection that begins with {up[:8]!r}")
            else:  # given up before its owner said a word; the node had begun to greet
                wire._counted["HTTP/2"] += len(down)
            continue
        wire._counted["HTTP/2"] += len(_PREFACE)
        for way, data in ((UP, up[len(_PREFACE) :]), (DOWN, down)):
            _Direction(wire, way, methods).read(data)
    return wire


class _Direction:
    """One way of one connection."""

    def __init__(self, wire: Wire, way: str, methods: dict[int, str]) -> None:
        self._wire, self._way, self._methods = wire, way, methods
        self._decoder = hpack.Decoder()
        self._bodies: dict[int, bytearray] = {}

    def read(self, data: bytes) -> None:
        place = 0
        while place + _FRAME_HEADER <= len(data):
            size, kind, flags = int.from_bytes(data[place : place + 3]), data[place + 3], data[place + 4]
            stream = int.from_bytes(data[place + 5 : place + _FRAME_HEADER])
            payload = data[place + _FRAME_HEADER : place + _FRAME_HEADER + size]
            self._wire._counted["HTTP/2"] += _FRAME_HEADER
            self._frame(kind, flags, stream, payload)
            place += _FRAME_HEADER + size
        if place != len(data):
            self._odd(f"{len(data) - place} bytes that are no frame of HTTP/2")
        for stream, body in self._bodies.items():
            if body:
                self._odd(f"{len(body)} bytes on stream {stream} that are no message")

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA and not flags & _PADDED:
            self._bodies.setdefault(stream, bytearray()).extend(payload)
            self._messages(stream)
            return
        self._wire._counted["HTTP/2"] += len(payload)
        if kind == _HEADERS and not flags & (_PADDED | _PRIORITY) and flags & _END_HEADERS:
            self._headers(stream, payload)
        elif kind not in _CONTROL or (kind == _GOAWAY and len(payload) > 8 and self._way == UP):
            self._odd(f"a frame of kind {kind} and flags {flags}, {len(payload)} bytes")

    def _headers(self, stream: int, payload: bytes) -> None:
        for name, value in self._decoder.decode(payload, raw=True):
            self._wire.headers.append((self._way, bytes(name), bytes(value)))
            if name == b":path":
                self._methods[stream] = bytes(value).decode()

    def _messages(self, stream: int) -> None:
        body, method = self._bodies[stream], self._methods.get(stream, "")
        while len(body) >= _GRPC_PREFIX and len(body) >= _GRPC_PREFIX + int.from_bytes(body[1:_GRPC_PREFIX]):
            size = int.from_bytes(body[1:_GRPC_PREFIX])
            if body[0]:
                self._odd("a compressed message")
            self._wire._counted["gRPC"] += _GRPC_PREFIX
            self._message(method, bytes(body[_GRPC_PREFIX : _GRPC_PREFIX + size]))
            del body[: _GRPC_PREFIX + size]

    def _message(self, path: str, data: bytes) -> None:
        wire, name = self._wire, path.removeprefix(_NODE)
        if name not in _METHODS:
            wire._counted["other services"] += len(data)
            if path != "/grpc.health.v1.Health/Check" or data:
                self._odd(f"a message to {path}")
            return
        described = _METHODS[name].input_type if self._way == UP else _METHODS[name].output_type
        try:
            message = GetMessageClass(described).FromString(data)
        except DecodeError:
            wire._counted["unreadable"] += len(data)
            self._odd(f"a message to {name} that is none")
            return
        # As long as its fields need, and no field that the contract does not name: there is no room beside them.
        if len(message.SerializeToString()) != len(data) or any(_unknown(message)):
            self._odd(f"a message to {name} that holds more than its fields")
        number = len(wire.messages)
        wire.messages.append((self._way, name, message))
        found = list(_leaves(message, name))
        wire.leaves += [Leaf(self._way, at, value, number) for at, value in found]
        inside = Counter[str]()
        for at, value in found:
            if isinstance(value, bytes):
                inside[f"{self._way} {at}"] += len(value)
        wire._counted.update(inside)
        wire._counted["protobuf"] += len(data) - inside.total()

    def _odd(self, what: str) -> None:
        self._wire.odd.append(f"{self._way}: {what}")


def _leaves(message: Message, path: str) -> Iterator[tuple[str, Any]]:
    for described, value in message.ListFields():
        at = f"{path}.{described.name}"
        for item in value if described.is_repeated else [value]:
            if isinstance(item, Message):
                yield from _leaves(item, at)
            else:
                yield at, item


def _unknown(message: Message) -> Iterator[int]:
    yield len(unknown_fields.UnknownFieldSet(message))
    for described, value in message.ListFields():
        if described.message_type is not None:
            for item in value if described.is_repeated else [value]:
                yield from _unknown(item)
