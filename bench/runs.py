"""The two ways to train that are compared everywhere: through a node, and without a cut."""

from __future__ import annotations

import time

import torch

from bench.bare import Topology
from bench.blocks import Contender
from bench.models import LOSS, OPTIMIZER, Batches, Subject
from client_side.callbacks import Callback, Control, StepEnd, TrainState
from client_side.cutting import Cut
from client_side.link import NodeAddress, Traffic
from client_side.spawn import LocalNode
from client_side.trainer import Trainer
from client_side.unsplit import UnsplitTrainer
from privacy.policy import CLEAR

__all__ = ["SplitRun", "addressed", "topology_name", "unsplit"]


class _Clock(Callback):
    """How long the steps of one epoch took, with what lies between them."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_epoch_begin(self, state: TrainState, control: Control) -> None:
        del state, control
        self.began = time.perf_counter()

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        del state, control, end
        self.ended = time.perf_counter()


class _Steps(Trainer):
    """A trainer that leaves the middle where it is: bringing it home is once a run, not once a block."""

    def fetch(self) -> None:
        """Does nothing."""


class SplitRun:
    """A session with a node, trained block by block through :class:`Trainer`, as users do."""

    def __init__(
        self,
        subject: Subject,
        cut: Cut,
        node: LocalNode,
        *,
        micro_batches: int = 1,
        in_flight: int | None = None,
        address: NodeAddress | None = None,
    ) -> None:
        """Connects to nobody yet; ``address`` is for a way to the node that is not the direct one."""
        self._batches, self._rows, self._clock = subject.batches(), subject.batch, _Clock()
        self.steps = 0
        self.trainer = _Steps(
            cut,
            policy=CLEAR,
            node=address or node.address,
            optimizer=OPTIMIZER,
            loss=LOSS,
            micro_batches=micro_batches,
            in_flight=in_flight,
            identity=node.owner,
            callbacks=[self._clock],
        )

    def run(self, steps: int) -> float:
        """Trains so many steps; returns the seconds that they took."""
        self.trainer.fit(_some(self._batches, steps), 1)
        self.steps += steps
        return self._clock.ended - self._clock.began

    def contender(self, name: str) -> Contender:
        """It, under a name."""
        return Contender(name, self.run, self._rows)

    @property
    def bytes_per_step(self) -> Traffic:
        """Tensor bytes of a step, up and down."""
        total, steps = self.trainer.traffic, max(1, self.steps)
        return Traffic(total.up // steps, total.down // steps, total.reconnects)

    def close(self) -> None:
        """Ends the session."""
        self.trainer.close()


def unsplit(subject: Subject, cut: Cut, micro_batches: int = 1) -> Contender:
    """The same loop over the same model in this process alone."""
    trainer = UnsplitTrainer(cut, optimizer=OPTIMIZER, loss=LOSS, micro_batches=micro_batches)
    batches = subject.batches()

    def run(steps: int) -> float:
        loader = _some(batches, steps)
        started = time.perf_counter()
        trainer.fit(loader, 1)
        return time.perf_counter() - started

    return Contender(_unsplit_name(micro_batches), run, subject.batch)


def addressed(node: LocalNode, port: int) -> NodeAddress:
    """``node`` behind another port of this machine; who it must be stays as it is."""
    direct = NodeAddress.parse(node.address)
    return NodeAddress(target=f"localhost:{port}", pin=direct.pin)


def _unsplit_name(micro_batches: int) -> str:
    return "unsplit" if micro_batches == 1 else f"unsplit, {micro_batches} micro-batches"


def _some(batches: Batches, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batches[number % len(batches)] for number in range(steps)]


def topology_name(topology: Topology) -> str:
    """As people write it."""
    return "U-shaped" if topology == "u_shape" else "vanilla"
