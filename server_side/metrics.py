"""What a node tells its operator: Prometheus metrics on ``/metrics``, and whether it takes sessions on ``/healthz``.

Every label comes from a closed set of this code base. No owner, session id or foreign string ever becomes one: they
would name owners to whoever reads the metrics, and let a peer make series without end (THREATS T02).
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from protos import node_pb2
from server_side.table import SessionState
from wire.errors import ConfigError, WireError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["Metrics", "MetricsServer"]

# From a small middle's forward on a GPU to a large one's backward on a CPU.
COMPUTE_BUCKETS_S: Final = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MAX_SCRAPES: Final = 8  # at once; a scraper asks four times a minute, so more are a flood and are hung up on
SCRAPE_TIMEOUT_S: Final = 5.0  # for each read or write of a scrape; THREATS T05

_LAST_PORT: Final = 65535
_POLL_S: Final = 0.1  # how long closing may take

_log = logging.getLogger(__name__)

_PHASES: Final = {
    number: name.removeprefix("PHASE_").lower()
    for name, number in node_pb2.Phase.items()
    if number != node_pb2.PHASE_UNSPECIFIED
}
_OTHER_PHASE: Final = "unspecified"  # whatever else a peer may put into the field


class Metrics:
    """One node's counts, on a registry of their own. Safe to use from any thread."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry()
        on: dict[str, Any] = {"namespace": "cloister_node", "registry": self.registry}
        self._open = Gauge("sessions_open", "Sessions that live on this node now.", **on)
        self._draining = Gauge("draining", "1 while the node takes no new sessions.", **on)
        self._steps = Counter("steps", "Optimizer updates applied.", **on)
        self._received = Counter("received_bytes", "Bytes of messages that came in.", **on)
        self._sent = Counter("sent_bytes", "Bytes of messages that went out.", **on)
        self._resent = Counter("resent_frames", "Frames that came again and were answered from memory.", **on)
        frames = Counter("frames", "Frames answered, by phase.", ["phase"], **on)
        compute = Histogram(
            "compute_seconds", "Time that computing an answer took.", ["phase"], buckets=COMPUTE_BUCKETS_S, **on
        )
        phases = [*_PHASES.values(), _OTHER_PHASE]
        self._frames = {phase: frames.labels(phase=phase) for phase in phases}
        self._compute = {phase: compute.labels(phase=phase) for phase in phases}
        self._refusals = Counter("refusals", "Errors told to peers, by their stable reason.", ["reason"], **on)
        ended = Counter("sessions_ended", "Sessions that ended, by how.", ["how"], **on)
        self._ended: dict[SessionState, Counter] = {
            how: ended.labels(how=how.value) for how in SessionState if how is not SessionState.OPEN
        }

    def session_opened(self) -> None:
        """A session lives on this node from now on."""
        self._open.inc()

    def session_ended(self, how: SessionState) -> None:
        """A session that :meth:`session_opened` counted is gone."""
        self._ended[how].inc()
        self._open.dec()

    def sessions_found_lost(self, count: int) -> None:
        """Sessions of an earlier process, which this one never counted as open, are lost."""
        self._ended[SessionState.LOST].inc(count)

    def frame_answered(self, phase: node_pb2.Phase.ValueType, compute_s: float) -> None:
        """A frame was computed and answered; ``compute_s`` is the time that its computation took."""
        label = _PHASES.get(phase, _OTHER_PHASE)
        self._frames[label].inc()
        self._compute[label].observe(compute_s)

    def frame_resent(self) -> None:
        """A frame came again and was answered from memory."""
        self._resent.inc()

    def step_applied(self) -> None:
        """An optimizer update was applied."""
        self._steps.inc()

    def received(self, count: int) -> None:
        """A message of ``count`` bytes came in."""
        self._received.inc(count)

    def sent(self, count: int) -> None:
        """A message of ``count`` bytes went out."""
        self._sent.inc(count)

    def refused(self, error: WireError) -> None:
        """A peer was told this error."""
        self._refusals.labels(reason=type(error).reason).inc()

    def drain(self) -> None:
        """The node takes no new sessions from now on: ``/healthz`` says so."""
        self._draining.set(1)

    def serve(self, host: str, port: int) -> MetricsServer:
        """Serves ``/metrics`` and ``/healthz`` over plain HTTP from threads of their own.

        There is no authentication: bind to an address that only the operator reaches.

        Args:
            host: An address or name of this machine.
            port: 0 takes a free one.

        Raises:
            ConfigError: Nothing can listen there.
        """
        if not 0 <= port <= _LAST_PORT:  # resolvers take such a port modulo 65536
            raise ConfigError(f"metrics on {host}:{port}: no such port; name one from 0 to {_LAST_PORT}")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            server = _Server(family, address, self._application())
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that no name can be
            raise ConfigError(f"metrics on {host}:{port}: {error}; name a free port of this machine") from error
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="cloister-metrics", daemon=True)
        thread.start()
        return MetricsServer(port=server.server_port, _server=server, _thread=thread)

    def _application(self) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
        metrics = make_wsgi_app(self.registry)

        def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                scraped: Iterable[bytes] = metrics(environ, start_response)
                return scraped
            status, text = HTTPStatus.NOT_FOUND, "see /metrics and /healthz"
            if path == "/healthz":
                draining = bool(self.registry.get_sample_value("cloister_node_draining"))
                status = HTTPStatus.SERVICE_UNAVAILABLE if draining else HTTPStatus.OK
                text = "draining" if draining else "ok"
            start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        return answer


@dataclasses.dataclass(frozen=True, slots=True)
class MetricsServer:
    """A running metrics endpoint."""

    port: int
    _server: _Server
    _thread: threading.Thread

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = SCRAPE_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Says nothing: a line for each scrape would drown the node's own."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 4 * MAX_SCRAPES  # so that a flood is hung up on, not left to wait

    def __init__(
        self,
        family: int,
        address: tuple[Any, ...],
        application: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]],
    ) -> None:
        self.address_family = family
        self._scrapes = threading.BoundedSemaphore(MAX_SCRAPES)
        super().__init__(address[:2], _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Binds without looking up the host's name, which may hang where there is no DNS."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        if not self._scrapes.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started, so none will release
            self._scrapes.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._scrapes.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - as in the base class
        """Drops a broken scrape: the scraper sees it, and asks again."""
        _log.debug("a scrape broke off", exc_info=True)
