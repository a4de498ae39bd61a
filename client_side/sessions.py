"""How a trainer's sessions are opened: on one node, or on the first of several that keep a run going."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from client_side.cutting import Cut
from client_side.durability import Run
from client_side.link import Link, NodeAddress
from client_side.opening import open_session
from client_side.receipts import Receipts
from client_side.route import Route, RouteNews
from client_side.snapshots import Snapshot
from privacy.guard import Guard
from wire.identity import Identity
from wire.recipe import Loss, Optimizer

__all__ = ["Sessions"]

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Sessions:
    """What every session of one trainer has in common.

    Attributes:
        max_rows: the largest micro-batch so far; the next session is opened for so many rows.
        receipts: the run's; ``None`` asks for none.
    """

    cut: Cut
    guard: Guard
    nodes: list[NodeAddress]
    identity: Identity
    optimizer: Optimizer
    loss: Loss
    seed: int
    in_flight: int
    reconnect_s: float
    standby: bool
    max_rows: int = field(default=0, init=False)
    receipts: Receipts | None = field(default=None, init=False)

    def link(self, step: int, tensors: dict[str, torch.Tensor] | None) -> Link:
        """A session on the first node, with ``tensors`` of a snapshot or the middle's as they are now.

        Raises:
            WireError, UnreachableError: the node refuses, or cannot be reached.
        """
        link = self._connect(self.nodes[0], self.reconnect_s, leave_silent=False)
        try:
            self._open(link, step, tensors)
        except BaseException:
            link.close(end_session=False)
            raise
        return link

    def route(self, run: Run) -> Route:
        """A session that moves between the nodes, from the run's latest checkpoint on.

        Raises:
            WireError, UnreachableError: no node takes it.
        """

        def open_on(link: Link, snapshot: Snapshot, tensors: dict[str, torch.Tensor] | None) -> None:
            kept = snapshot.kept if tensors is None else None
            known = None if kept is None else (kept.sha256, kept.bytes)
            self._open(link, snapshot.step, tensors, known, replaces=run.journal.session_on(link.target))
            run.journal.opened(link.target, link.session)

        def tell(news: RouteNews) -> None:
            _log.warning(
                "training goes on at %s after %.1f s (%d frames replayed)", news.after, news.seconds, news.replayed
            )
            took = f"{news.seconds:.2f} s, {news.replayed} frames replayed"
            run.journal.happened(news.step, "moved", f"from {news.before} to {news.after} in {took}: {news.why}")

        route = Route(
            self.nodes,
            connect=self._connect,
            open_on=open_on,
            latest=lambda: run.latest.snapshot,
            load=run.load,
            log=run.log,
            memo=run.memo,
            reconnect_s=self.reconnect_s,
            tell=tell,
        )
        if self.standby:
            run.follow = route.follow
        return route

    def _connect(self, address: NodeAddress, reconnect_s: float, leave_silent: bool) -> Link:  # noqa: FBT001 - as in Route
        return Link(address, self.identity, reconnect_s=reconnect_s, leave_silent=leave_silent)

    def _open(
        self,
        link: Link,
        step: int,
        tensors: dict[str, torch.Tensor] | None,
        kept: tuple[bytes, int] | None = None,
        replaces: bytes = b"",
    ) -> None:
        open_session(
            link,
            self.cut,
            self.guard,
            optimizer=self.optimizer,
            loss=self.loss,
            seed=self.seed,
            max_rows=self.max_rows,
            max_in_flight=self.in_flight,
            first_step=step,
            tensors=tensors,
            kept=kept,
            replaces=replaces,
            receipts=self.receipts,
        )
