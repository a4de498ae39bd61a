"""The node as a process: configuration, start, drain, stop."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import torch
from grpc_health.v1 import health, health_pb2

from protos import node_pb2
from server_side.accounts import Limits
from server_side.callers import CALLS_PER_OWNER
from server_side.handlers import health_handler, node_handler
from server_side.keeper import Keeper
from server_side.kept import KeptSnapshots
from server_side.metrics import Metrics, MetricsServer
from server_side.service import NodeService
from server_side.signing import NodeSigner
from server_side.table import SessionTable
from wire.channels import server_credentials, server_options
from wire.errors import ConfigError, StorageError
from wire.identity import Identity
from wire.interpreter import warm_up
from wire.trust import Trust

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

__all__ = ["NodeConfig", "RunningNode", "pick_device", "start_node"]

_log = logging.getLogger(__name__)

SERVICE: Final = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name
_STREAMS_PER_SESSION: Final = 3  # training, evaluation, a snapshot; threads are made when they are needed
_SPARE_THREADS: Final = 4 * CALLS_PER_OWNER  # for the other calls of four owners who take all that they may


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What a node needs to run.

    Attributes:
        listen: ``host:port``; port 0 takes a free one.
        state_dir: the node's own folder: kept snapshots, and its session table unless ``database`` says otherwise.
        database: SQLAlchemy URL of the session table; ``None`` is SQLite in ``state_dir``.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        idle_s: a session that hears nothing for so long ends.
        metrics: ``host:port`` for Prometheus, or ``None``.
        signer: the identity's key, with which receipts are signed; ``None`` gives none.
    """

    listen: str
    identity: Identity
    trust: Trust
    state_dir: Path
    database: str | None = None
    device: str = "auto"
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    idle_s: float = 3600.0
    metrics: str | None = None
    version: str = ""
    signer: LocalAccount | None = field(default=None, repr=False)


def pick_device(wanted: str) -> torch.device:
    """The torch device that ``wanted`` names.

    Raises:
        ConfigError: this machine has no such device.
    """
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r}: use auto, cpu or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r}: use auto, cpu or cuda:N")
    return device


class RunningNode:
    """A node that serves."""

    def __init__(self, config: NodeConfig) -> None:
        """Opens the table, binds the port and serves; see :func:`start_node`."""
        self.device = pick_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # Exactness across runs and machines of one class: the same kernels every time.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        self._metrics = Metrics()
        self._table = SessionTable(config.database or _sqlite(config.state_dir))
        self._keeper = Keeper(
            fingerprint=config.identity.fingerprint,
            table=self._table,
            kept=KeptSnapshots(config.state_dir / "snapshots"),
            limits=config.limits,
            metrics=self._metrics,
            device=self.device,
            idle_s=config.idle_s,
            signer=_signer(config, self.device),
        )
        self._service = NodeService(self._keeper, config.trust, config.version)
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(
                _STREAMS_PER_SESSION * config.limits.sessions + _SPARE_THREADS,
                thread_name_prefix="cloister-stream",
            ),
            options=server_options(max_message_bytes=config.limits.message_bytes),
        )
        self._server.add_generic_rpc_handlers(
            (node_handler(self._service), health_handler(self._health, self._keeper.callers)),
        )
        credentials = server_credentials(config.identity, config.trust)
        try:
            self.port: int = self._server.add_secure_port(config.listen, credentials)
        except RuntimeError as error:
            self._keeper.stop()
            self._table.close()
            raise ConfigError(f"cannot listen on {config.listen}: in use, or not an address of this machine") from error
        self.metrics_server: MetricsServer | None = None
        if config.metrics is not None:
            self.metrics_server = self._metrics.serve(*_address(config.metrics))
        self._server.start()
        threading.Thread(target=warm_up, name="cloister-warm-up", daemon=True).start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def drain(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Takes no new sessions, waits for those that live until ``seconds`` are over or ``hurry`` is set."""
        self._service.draining = True
        self._metrics.drain()
        self._health.enter_graceful_shutdown()
        waiter = hurry or threading.Event()
        waited = 0.0
        while len(self._keeper) and waited < seconds and not waiter.wait(0.1):
            waited += 0.1

    def stop(self, grace_s: float = 2.0) -> None:
        """Lets frames in work finish for ``grace_s``, then ends everything."""
        self._service.draining = True
        stopped = self._server.stop(grace_s)
        self._keeper.stop()
        stopped.wait()
        if self.metrics_server is not None:
            self.metrics_server.close()
        self._table.close()

    @property
    def sessions(self) -> int:
        """Live sessions."""
        return len(self._keeper)


def start_node(config: NodeConfig) -> RunningNode:
    """Starts a node in this process.

    Raises:
        ConfigError: the address, the device or the database cannot be had.
        StorageError: the session table cannot be opened.
    """
    return RunningNode(config)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"metrics on {text!r}: write host:port, such as 127.0.0.1:9100")
    return host.strip("[]"), int(port)


def _signer(config: NodeConfig, device: torch.device) -> NodeSigner | None:
    if config.signer is None:
        return None
    return NodeSigner(config.signer, fingerprint=config.identity.fingerprint, device=device, version=config.version)


def _sqlite(state_dir: Path) -> str:
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"the state folder {state_dir} cannot be made: {error.strerror}") from error
    return f"sqlite:///{state_dir / 'node.db'}"
