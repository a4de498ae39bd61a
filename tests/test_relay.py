"""The emulated link does what it claims: delay, rate, order, and the faults that other tests inject with it."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest

from bench.relay import Relay

Handler = Callable[[socket.socket], None]
MBIT = 1e6


class _Server:
    """Accepts on loopback and hands every connection to ``handler`` in a thread."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept)
        self.port: int = self._sock.getsockname()[1]
        self.errors: list[OSError] = []

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._acceptor.join()
        self._sock.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._handler(sock)
            except OSError as error:
                self.errors.append(error)


def _echo(sock: socket.socket) -> None:
    while data := sock.recv(2**18):
        sock.sendall(data)


@contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock


def _ping(sock: socket.socket) -> float:
    started = time.perf_counter()
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    return time.perf_counter() - started


def _pump(sock: socket.socket, total: int) -> None:
    block = memoryview(bytes(2**18))
    left = total
    while left:
        left -= sock.send(block[:left])


def _rate_in(sock: socket.socket, total: int) -> float:
    """Bits per second from the first arrival to the last."""
    buffer = bytearray(2**18)
    left = total - (first := sock.recv_into(buffer))
    started = time.perf_counter()
    while left:
        left -= sock.recv_into(buffer) or left
    return (total - first) * 8 / (time.perf_counter() - started)


def _rates(rtt_s: float, bits_per_s: float, total: int) -> tuple[float, float]:
    """The rates up and down, both directions busy at once."""
    up: list[float] = []

    def both(sock: socket.socket) -> None:
        sender = threading.Thread(target=_pump, args=(sock, total))
        sender.start()
        up.append(_rate_in(sock, total))
        sender.join()

    with _Server(both) as server, Relay(server.port, rtt_s, bits_per_s) as relay, _connected(relay.port) as sock:
        sender = threading.Thread(target=_pump, args=(sock, total))
        sender.start()
        down = _rate_in(sock, total)
        sender.join()
        while not up:
            time.sleep(0.001)
    return up[0], down


@pytest.mark.parametrize(("rtt_s", "bits_per_s"), [(0.01, 1000 * MBIT), (0.05, 100 * MBIT)])
def test_one_byte_there_and_back_takes_the_claimed_round_trip(rtt_s: float, bits_per_s: float) -> None:
    with _Server(_echo) as server, Relay(server.port, rtt_s, bits_per_s) as relay, _connected(relay.port) as sock:
        first = _ping(sock)
        times = [_ping(sock) for _ in range(15)]

    assert rtt_s * 0.95 < min(times) < rtt_s * 1.1 + 0.001
    assert statistics.median(times) < rtt_s * 2, "a busy machine may be late now and then, not as a rule"
    assert first > rtt_s * 1.9, "the handshake's round trip is missing"


@pytest.mark.parametrize(
    ("rtt_s", "bits_per_s", "total", "tolerance"),
    [(0.05, 100 * MBIT, 6_000_000, 0.05), (0.01, 1000 * MBIT, 40_000_000, 0.10)],
)
def test_a_bulk_transfer_runs_at_the_claimed_rate_in_both_directions_at_once(
    rtt_s: float, bits_per_s: float, total: int, tolerance: float
) -> None:
    # A busy machine slows a transfer down, only a broken clock speeds it up: the fastest of a few attempts counts.
    fastest = (0.0, 0.0)
    for _ in range(6):
        if min(fastest) < bits_per_s * (1 - tolerance):
            up, down = _rates(rtt_s, bits_per_s, total)
            fastest = max(up, fastest[0]), max(down, fastest[1])

    assert fastest == pytest.approx((bits_per_s, bits_per_s), rel=tolerance)


def test_connections_share_the_rate_of_the_link_and_its_relay_is_cheap() -> None:
    total, rate = 800_000, 40 * MBIT

    with _Server(_echo) as server, Relay(server.port, 0.02, rate) as relay:
        idle = relay.traffic()
        started = time.perf_counter()
        senders = [threading.Thread(target=_echo_once, args=(relay.port, total)) for _ in range(3)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        took = time.perf_counter() - started
        traffic = relay.traffic()

    assert traffic.up == traffic.down == 3 * total
    assert 3 * total * 8 / rate < took < 1.5 * 3 * total * 8 / rate
    assert traffic.cpu_s - idle.cpu_s < 0.35 * took


def _echo_once(port: int, total: int) -> None:
    with _connected(port) as sock:
        sender = threading.Thread(target=_pump, args=(sock, total))
        sender.start()
        _rate_in(sock, total)
        sender.join()


@pytest.mark.parametrize(("bits_per_s", "total"), [(400 * MBIT, 3_000_001), (math.inf, 20_000_001)])
def test_bytes_arrive_in_order_and_intact_and_the_end_of_the_stream_is_passed_on(bits_per_s: float, total: int) -> None:
    sent = os.urandom(total)

    with _Server(_echo) as server, Relay(server.port, 0.004, bits_per_s) as relay, _connected(relay.port) as sock:
        writer = threading.Thread(target=_send_all, args=(sock, sent))
        writer.start()
        time.sleep(0.2)  # what the kernel does not hold for a late reader waits in the relay
        received = b"".join(iter(lambda: sock.recv(2**16), b""))
        writer.join()

    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


def _send_all(sock: socket.socket, content: bytes) -> None:
    sock.sendall(content)
    sock.shutdown(socket.SHUT_WR)


def test_a_receiver_that_does_not_read_stops_its_own_sender_and_nobody_else() -> None:
    released = threading.Event()

    def deaf(sock: socket.socket) -> None:
        if sock.recv(1) == b"d":
            released.wait(5)
        else:
            sock.sendall(b"x")
            _echo(sock)

    with (
        _Server(deaf) as server,
        Relay(server.port, 0.01, 1000 * MBIT) as relay,
        _connected(relay.port) as stuck,
        _connected(relay.port) as free,
    ):
        stuck.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stuck.sendall(b"d" + bytes(2**26))
        times = [_ping(free) for _ in range(5)]
        passed = relay.traffic().up
        released.set()

    assert statistics.median(times) < 0.05
    assert passed < 2**25


def test_a_sender_gets_no_further_ahead_than_the_link_and_the_kernel_hold() -> None:
    with _Server(_echo) as server, Relay(server.port, 0.01, 10 * MBIT) as relay, _connected(relay.port) as sock:
        sock.settimeout(0.4)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(24 * 2**20))


def test_a_stall_holds_everything_back_and_a_resume_loses_nothing() -> None:
    with _Server(_echo) as server, Relay(server.port, 0.2, 100 * MBIT) as relay, _connected(relay.port) as sock:
        _ping(sock)
        sock.sendall(b"under way")
        relay.stall()
        sock.settimeout(0.4)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        relay.resume()
        sock.settimeout(5)
        started = time.perf_counter()
        received = _exactly(sock, 9)
        took = time.perf_counter() - started
        after = _ping(sock)

    assert received == b"under way"
    assert took > 0.13, "what was under way has to travel the rest of its way"
    assert after < 0.3


def test_a_reset_reaches_both_sides_of_every_connection() -> None:
    with _Server(_echo) as server, Relay(server.port, 0.01, 100 * MBIT) as relay:
        with _connected(relay.port) as one, _connected(relay.port) as two:
            for sock in (one, two):
                _ping(sock)
            relay.reset()
            for sock in (one, two):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
        with _connected(relay.port) as new:
            _ping(new)

    assert [type(error) for error in server.errors[:2]] == [ConnectionResetError] * 2


def test_new_connections_are_refused_until_they_are_accepted_again() -> None:
    with _Server(_echo) as server, Relay(server.port, 0.0, math.inf) as relay, _connected(relay.port) as old:
        _ping(old)
        relay.refuse()
        with pytest.raises(ConnectionRefusedError), _connected(relay.port):
            pass
        _ping(old)
        relay.accept()
        with _connected(relay.port) as new:
            _ping(new)


@pytest.mark.parametrize("n_bytes", [0, 1, 70_001, 1_000_000])
def test_a_cut_lets_exactly_the_claimed_bytes_through_and_then_resets_both_sides(n_bytes: int) -> None:
    content = os.urandom(1_500_000)
    received = bytearray()

    def collect(sock: socket.socket) -> None:
        sock.sendall(sock.recv(1))
        time.sleep(0.1)  # a reset that came too early would take unread bytes back
        while data := sock.recv(2**16):
            received.extend(data)

    with _Server(collect) as server, Relay(server.port, 0.004, 400 * MBIT) as relay:
        with _connected(relay.port) as sock:
            _ping(sock)
            relay.cut_after(n_bytes)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                _send_until_it_breaks(sock, content)
        passed = relay.traffic().up

    assert bytes(received) == content[:n_bytes]
    assert passed == n_bytes + 1
    assert [type(error) for error in server.errors] == [ConnectionResetError]


def _send_until_it_breaks(sock: socket.socket, content: bytes) -> None:
    sock.sendall(content)
    while True:
        time.sleep(0.001)
        sock.sendall(b"x")


def test_the_relay_ends_with_whoever_started_it() -> None:
    with Relay(1, 0.01, 100 * MBIT) as relay:
        process: subprocess.Popen[str] | Any = relay._process

    assert process.wait(1) == 0
    with pytest.raises(ChildProcessError, match="not running"):
        relay.stall()


def test_the_command_line_says_its_port_and_forwards() -> None:
    command = [sys.executable, "-m", "bench.relay", "--rtt-ms", "1", "--mbit", "1000", "--target"]
    with _Server(_echo) as server:
        process = subprocess.Popen([*command, str(server.port)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            with process.stdout, _connected(int(process.stdout.readline())) as sock:
                took = _ping(sock)
        finally:
            process.terminate()
            process.wait()

    assert took < 0.5


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data
