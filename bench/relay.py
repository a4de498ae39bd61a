"""An emulated link: a TCP relay on loopback that delays and shapes like a wide-area network.

A connection to :attr:`Relay.port` reaches ``target_port`` over a link with a round-trip time and a rate. Each direction
has a serialization clock that all connections share: what arrives at ``now`` begins to leave at ``max(now, free_at)``,
takes ``bytes / rate``, and is delivered half a round trip after its last byte left. What is under way is bounded by
what the link holds plus a queue; beyond that the relay stops reading, so that TCP slows the sender down. A connection
costs its handshake's round trip.

What it is not: the rate is that of the payload (no TCP/IP headers), nothing is lost, and the sender's window is open
from the first byte (no slow start). Figures over it are those of a warm connection on a clean link.

Why a process of its own, one thread, ``select`` and chunks of two milliseconds: the relay shares two cores with an
owner and a node, so it wakes about a thousand times a second for each busy direction; ``select`` waits with
microseconds, ``epoll`` and ``poll`` round up to milliseconds. A busy direction costs 17 % of a core at 1 Gbit/s and 8 %
at 100 Mbit/s. Only the standard library is imported: the process starts in tens of milliseconds.

    python -m bench.relay --target 7700 --rtt-ms 50 --mbit 100
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Self, TextIO, TypeAlias

__all__ = ["Relay", "Traffic"]

QUEUE_S: Final = 0.02  # the queue before the link, as in a router; hides the relay's own late wake-ups from a busy link
CHUNK_S: Final = (
    0.002  # one read takes at most so much of the link's time: finer costs wake-ups (24 % of a core at 1 ms)
)
MIN_CHUNK: Final = 16 * 2**10  # one TLS record
MAX_CHUNK: Final = 256 * 2**10
MIN_HELD: Final = 2 * MIN_CHUNK  # a slow link still takes one chunk while another is under way
MAX_HELD: Final = 64 * 2**20  # 10 Gbit/s at 50 ms
SOCKET_BYTES: Final = 512 * 2**10  # 4 ms of 1 Gbit/s: bridges a late wake-up, small beside what the link itself holds
EARLY_S: Final = 0.0001  # select returns about so late, so what is due within it is delivered at once
POLL_S: Final = 0.001  # how often a cut connection is asked whether its last bytes were acknowledged

_FIN: Final = b""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What came out of the link so far, in bytes; up is from the client to the target."""

    up: int
    down: int
    cpu_s: float


@dataclass(slots=True, eq=False)
class _Link:
    """One direction of the link, shared by all connections."""

    bytes_per_s: float
    delay_s: float
    free_at: float = 0.0
    held: int = 0
    delivered: int = 0
    cut_after: int | None = None
    flight: deque[tuple[float, _End, bytes | None]] = field(default_factory=deque)

    @property
    def chunk(self) -> int:
        return int(min(max(self.bytes_per_s * CHUNK_S, MIN_CHUNK), MAX_CHUNK))

    @property
    def capacity(self) -> int:
        return int(min(max(self.bytes_per_s * (self.delay_s + QUEUE_S), MIN_HELD), MAX_HELD))

    def send(self, end: _End, data: bytes | None, now: float) -> None:
        size = len(data or b"")
        self.free_at = max(now, self.free_at) + size / self.bytes_per_s
        self.held += size
        self.flight.append((self.free_at + self.delay_s, end, data))

    def shift(self, seconds: float) -> None:
        self.free_at += seconds
        self.flight = deque((due + seconds, end, data) for due, end, data in self.flight)

    def admit(self, data: bytes) -> tuple[bytes, bool]:
        """Counts what comes out; says what of it may pass and whether the connection ends there."""
        cut = False
        if self.cut_after is not None:
            data = data[: self.cut_after]
            self.cut_after -= len(data)
            cut = self.cut_after == 0
            if cut:
                self.cut_after = None
        self.delivered += len(data)
        return data, cut


@dataclass(slots=True, eq=False)
class _End:
    """One socket of a connection: what is read here enters ``link``; ``out`` came out of the other one."""

    sock: socket.socket
    link: _Link
    opens_at: float = 0.0
    out: deque[memoryview] = field(default_factory=deque)
    out_bytes: int = 0
    eof_read: bool = False
    fin_due: bool = False
    fin_sent: bool = False
    cutting: bool = False
    dead: bool = False
    other: _End = field(init=False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def wants_data(self) -> bool:
        capacity, chunk = self.link.capacity, self.link.chunk
        return (
            not self.eof_read
            and not self.other.cutting
            and self.link.held + chunk <= capacity
            and self.other.out_bytes + chunk <= capacity
        )

    def read(self, now: float) -> None:
        try:
            data: bytes | None = self.sock.recv(self.link.chunk)
        except BlockingIOError:
            return
        except OSError:  # the reset takes the link's way like any segment
            data = None
        self.eof_read = not data
        self.link.send(self.other, data, now)

    def queue(self, data: bytes) -> None:
        self.out.append(memoryview(data))
        self.out_bytes += len(data)

    def write(self) -> None:
        """Writes what the socket takes.

        Raises:
            OSError: the peer is gone.
        """
        with contextlib.suppress(BlockingIOError):
            while self.out:
                view = self.out[0]
                sent = self.sock.send(view)
                self.out_bytes -= sent
                if sent < len(view):
                    self.out[0] = view[sent:]
                    return
                self.out.popleft()
            if self.fin_due and not self.fin_sent:
                self.fin_sent = True
                self.sock.shutdown(socket.SHUT_WR)

    def drained(self) -> bool:
        """Whether the peer's kernel has all that was queued here: a reset now takes nothing of it back."""
        unsent = struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
        return not self.out and unsent == 0


_Readable: TypeAlias = TextIO | socket.socket | _End


class _Engine:
    """The relay's process: the links, the connections, and the commands that come over stdin."""

    def __init__(self, target_port: int, listen_port: int, rtt_s: float, bytes_per_s: float) -> None:
        self._target = ("127.0.0.1", target_port)
        self._rtt_s = rtt_s
        self._up, self._down = _Link(bytes_per_s, rtt_s / 2), _Link(bytes_per_s, rtt_s / 2)
        self._ends: deque[_End] = deque()
        self._waiting: deque[_End] = deque()  # accepted, in their handshake's round trip
        self._stalled_at: float | None = None
        self._running = True
        self._reserved = _bound(listen_port)  # keeps the port ours while connections are refused
        self.port: int = self._reserved.getsockname()[1]
        self._listener: socket.socket | None = None
        self._listen()

    def run(self, *, controlled: bool) -> None:
        while self._running:
            now = time.monotonic()
            ready, writable = self._wait(now, controlled=controlled)
            now = time.monotonic()
            if sys.stdin in ready:
                self._command(now)
            if self._stalled_at is not None:
                continue
            if self._listener in ready:
                self._accept(now)
            self._open_due(now)
            for end in ready:
                if isinstance(end, _End) and not end.dead:
                    end.read(now)
            self._deliver_due(now + EARLY_S)
            for end in writable:
                self._write(end)
            self._settle()
            self._ends.rotate(1)  # who reads first when room is short changes every time

    def _wait(self, now: float, *, controlled: bool) -> tuple[list[_Readable], list[_End]]:
        readers: list[_Readable] = [sys.stdin] if controlled else []
        if self._stalled_at is not None:
            return select.select(readers, [], [], None)[0], []
        readers += (end for end in self._ends if end.wants_data())
        if self._listener is not None:
            readers.append(self._listener)
        writers = [end for end in self._ends if end.out]
        ready, writable, _ = select.select(readers, writers, [], self._timeout(now))
        return ready, writable

    def _timeout(self, now: float) -> float | None:
        due = [link.flight[0][0] - EARLY_S for link in (self._up, self._down) if link.flight]
        due += [self._waiting[0].opens_at] if self._waiting else []
        due += [now + POLL_S] if any(end.cutting for end in self._ends) else []
        return max(0.0, min(due) - now) if due else None

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)  # accepted sockets inherit it
            self._listener.listen(128)
            self._listener.setblocking(False)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):  # the client gave up before it was accepted
            sock, _ = self._listener.accept() if self._listener else (None, None)
            if sock is not None:
                self._waiting.append(_End(_tuned(sock), self._up, now + self._rtt_s))

    def _open_due(self, now: float) -> None:
        while self._waiting and self._waiting[0].opens_at <= now + EARLY_S:
            client = self._waiting.popleft()
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
            try:
                sock.connect(self._target)
            except OSError:
                sock.close()
                _reset(client.sock)
                continue
            server = _End(_tuned(sock), self._down)
            client.other, server.other = server, client
            self._ends += (client, server)

    def _deliver_due(self, until: float) -> None:
        for link in (self._up, self._down):
            while link.flight and link.flight[0][0] <= until:
                _, end, data = link.flight.popleft()
                link.held -= len(data or b"")
                if end.dead or end.cutting:
                    continue
                if data is None:
                    self._drop(end)
                    continue
                if data == _FIN:
                    end.fin_due = True
                else:
                    passed, end.cutting = link.admit(data)
                    end.queue(passed)
                self._write(end)

    def _write(self, end: _End) -> None:
        if end.dead:
            return
        try:
            end.write()
        except OSError:  # gone: its other side learns it at once, as nothing more can reach it
            self._drop(end)

    def _settle(self) -> None:
        """Ends connections that were cut, and those that both sides have finished."""
        for end in [end for end in self._ends if end.cutting and not end.dead and end.drained()]:
            self._drop(end)
        for end in [end for end in self._ends if end.fin_sent and end.other.fin_sent and not end.dead]:
            self._drop(end, abort=False)

    def _drop(self, end: _End, *, abort: bool = True) -> None:
        for one in (end, end.other):
            if not one.dead:
                one.dead = True
                self._ends.remove(one)
                (_reset if abort else socket.socket.close)(one.sock)

    def _reset_all(self) -> None:
        while self._ends:
            self._drop(self._ends[0])
        while self._waiting:
            _reset(self._waiting.popleft().sock)

    def _resume(self, now: float) -> None:
        if self._stalled_at is not None:
            for link in (self._up, self._down):
                link.shift(now - self._stalled_at)
            self._stalled_at = None

    def _command(self, now: float) -> None:
        words = sys.stdin.readline().split()
        match words:
            case []:  # whoever started the relay is gone
                self._running = False
                return
            case ["stall"]:
                self._stalled_at = self._stalled_at or now
            case ["resume"]:
                self._resume(now)
            case ["reset"]:
                self._reset_all()
            case ["refuse"]:
                self._refuse()
            case ["accept"]:
                self._listen()
            case ["cut_after", way, count]:
                (self._up if way == "up" else self._down).cut_after = int(count)
        cpu_s = time.process_time()
        print(self._up.delivered, self._down.delivered, cpu_s, flush=True)  # noqa: T201  stdout is the control channel


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Relay:
    """A link to ``target_port`` in a process of its own; a context manager.

    Args:
        target_port: where connections go.
        rtt_s: the round-trip time in seconds; half of it each way.
        bits_per_s: the rate of each direction; ``math.inf`` for no limit.

    Example:
        with Relay(7700, rtt_s=0.05, bits_per_s=100e6) as relay:
            train(node=f"127.0.0.1:{relay.port}")
    """

    def __init__(self, target_port: int, rtt_s: float, bits_per_s: float) -> None:
        self._args = ["--target", str(target_port), "--rtt-ms", str(rtt_s * 1e3), "--mbit", str(bits_per_s / 1e6)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        """Starts the process; returns once it listens.

        Raises:
            ChildProcessError: it could not start.
        """
        # By path and with -P: neither the caller's folder nor this one may shadow the standard library.
        command = [sys.executable, "-P", __file__, "--controlled", *self._args]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own file
        self.port = int(self._answer(self._process))
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process and every connection."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def stall(self) -> None:
        """A black hole: connections stay, nothing passes, new ones hang."""
        self._tell("stall")

    def resume(self) -> None:
        """Ends a stall; what was under way goes on from where it was."""
        self._tell("resume")

    def reset(self) -> None:
        """Resets (RST) every connection at both sides; what was under way is lost."""
        self._tell("reset")

    def refuse(self) -> None:
        """Refuses new connections; those that are open stay."""
        self._tell("refuse")

    def accept(self) -> None:
        """Ends :meth:`refuse`."""
        self._tell("accept")

    def cut_after(self, n_bytes: int, *, down: bool = False) -> None:
        """Resets the connection that carries it once exactly ``n_bytes`` more have reached the target.

        Counted over all connections, from client to target (or ``down`` to the client), from now on; 0 cuts whichever
        next has a byte to deliver.
        """
        self._tell(f"cut_after {'down' if down else 'up'} {n_bytes}")

    def traffic(self) -> Traffic:
        """What came out of the link so far, and what the relay's process cost."""
        up, down, cpu_s = self._tell("traffic").split()
        return Traffic(int(up), int(down), float(cpu_s))

    def _tell(self, command: str) -> str:
        process = self._process
        if process is None or process.stdin is None:
            raise ChildProcessError("the relay is not running: use it as a context manager")
        with self._lock:
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
            return self._answer(process)

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise ChildProcessError("the relay died; its standard error says why")
        return line


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.relay", description="A TCP relay with a delay and a rate.")
    parser.add_argument("--target", type=int, required=True, help="port to forward to")
    parser.add_argument("--listen", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--rtt-ms", type=float, default=50.0, help="round-trip time (default: %(default)s)")
    parser.add_argument("--mbit", type=float, default=100.0, help="Mbit/s each way (default: %(default)s)")
    parser.add_argument("--controlled", action="store_true", help="take commands on stdin, end with it")
    args = parser.parse_args()
    if not (args.mbit > 0 and 0 <= args.rtt_ms < math.inf):
        parser.error("--mbit must be above 0 and --rtt-ms at least 0")
    return args


def main() -> None:
    """Runs the relay until its standard input closes (controlled) or a signal ends it."""
    args = _arguments()
    if args.controlled:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's; the relay ends with its stdin
    with contextlib.suppress(PermissionError):  # a wire does not wait for a busy processor; without the right, it may
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    engine = _Engine(args.target, args.listen, args.rtt_ms / 1e3, args.mbit * 1e6 / 8)
    print(engine.port, flush=True)  # noqa: T201  whoever started the relay needs it
    with contextlib.suppress(KeyboardInterrupt):
        engine.run(controlled=args.controlled)


if __name__ == "__main__":
    main()
