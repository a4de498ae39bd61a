"""The trainer: fits, evaluates and predicts with a cut model whose middle lives on a node."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import torch

from client_side.callbacks import Callback, Control, EpochEnd, Evaluation, StepEnd, TrainState
from client_side.cutting import Cut
from client_side.inference import evaluation_mode, infer
from client_side.link import RECONNECT_S, Link, NodeAddress, Traffic
from client_side.opening import DEFAULT_IDENTITY, open_session, owner_identity
from client_side.steps import Batch, StepRunner, micro_batches
from wire.errors import ConfigError
from wire.identity import Identity
from wire.optimizers import PartOptimizer
from wire.recipe import SGD, Adam, Loss, LossName, Optimizer
from wire.state import split_state

__all__ = ["Loader", "Trainer"]

_log = logging.getLogger(__name__)

Loader: TypeAlias = Iterable[Sequence[torch.Tensor]]


class Trainer:
    """Trains a :class:`Cut` through a node; exact to the bit, whatever the number of micro-batches in flight.

    A loader yields ``(inputs…, labels)``. The session opens with the first batch and ends with :meth:`close` (or the
    ``with`` block); after :meth:`fit` the model that was cut holds the trained middle.

    Example::

        with cloister.Trainer(cut, node="gpu:7700#sha256:…", optimizer=cloister.SGD(lr=0.1), loss="cross_entropy") as t:
            t.fit(loader, epochs=3)
            print(t.evaluate(test_loader).accuracy)
    """

    def __init__(
        self,
        cut: Cut,
        *,
        node: str | NodeAddress,
        optimizer: Optimizer,
        loss: LossName | Loss = "cross_entropy",
        micro_batches: int = 1,
        in_flight: int | None = None,
        identity: Identity | Path | str = DEFAULT_IDENTITY,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        """Checks its arguments; connects to nobody yet.

        Args:
            cut: from :func:`cloister.cut`.
            node: ``host:port#sha256:…``, or a :class:`NodeAddress`.
            optimizer: trains all three parts, each where it is.
            loss: by name, or a :class:`Loss`.
            micro_batches: slices of each batch; gradients add up over them, exactly.
            in_flight: how many of them may wait for their backward at a time; all of them, unless said otherwise.
            identity: the owner's identity, or its folder (``cloister keys init --role owner``).
            seed: of dropout and its like, on both sides.
            callbacks: see :class:`Callback`.
            reconnect_s: how long a node that is gone is waited for.

        Raises:
            ConfigError: says which argument, and what it must be.
        """
        if not isinstance(optimizer, (SGD, Adam)):
            raise ConfigError(
                f"optimizer {optimizer!r}: use cloister.SGD, cloister.Adam or cloister.AdamW, which travel as data; "
                "both sides build torch's own from them",
            )
        if micro_batches < 1 or (in_flight is not None and not 1 <= in_flight <= micro_batches):
            raise ConfigError("micro_batches: at least 1; in_flight: from 1 to micro_batches")
        self.cut = cut
        self._address = node if isinstance(node, NodeAddress) else NodeAddress.parse(node)
        self._optimizer = optimizer
        self._loss = loss if isinstance(loss, Loss) else Loss(loss)
        self._micro_batches, self._in_flight = micro_batches, in_flight or micro_batches
        self._identity = owner_identity(identity)
        self._seed, self._callbacks, self._reconnect_s = seed, list(callbacks), reconnect_s
        self._link: Link | None = None
        self._runner: StepRunner | None = None
        self._max_rows = 0
        self._closed = False
        self._past_traffic = Traffic(0, 0, 0)
        self._device = next((p.device for p in cut.owner_parameters()), torch.device("cpu"))
        parts = [cut.front] if cut.head is None else [cut.front, cut.head]
        self._optimizers = [PartOptimizer(optimizer, dict(part.named_parameters())) for part in parts]
        self.state = TrainState()

    def __enter__(self) -> Self:
        """The trainer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes the session."""
        self.close()

    @property
    def traffic(self) -> Traffic:
        """Bytes of all sessions so far."""
        return self._past_traffic if self._link is None else self._past_traffic + self._link.traffic

    def fit(self, loader: Loader, epochs: int) -> TrainState:
        """Trains for ``epochs`` passes over ``loader``, then brings the middle home.

        Raises:
            WireError: the node's reason for refusing.
            UnreachableError: the node is gone for longer than ``reconnect_s``.
        """
        control = Control()
        self.state.epochs = self.state.epoch + epochs
        self.state.steps_per_epoch = len(loader) if isinstance(loader, Sized) else None
        self._tell("on_train_begin", control)
        for _ in range(epochs):
            if control.should_training_stop:
                break
            self._epoch(loader, control)
        self.fetch()
        self._tell("on_train_end", control)
        return self.state

    def evaluate(self, loader: Loader) -> Evaluation:
        """Mean loss, and accuracy for losses over classes, in evaluation mode through the node."""
        total, right, rows = 0.0, 0, 0
        labelled = ((tuple(inputs), labels) for *inputs, labels in loader)
        ahead, behind = itertools.tee(labelled)
        with evaluation_mode(self.cut):
            for output, (_, labels) in zip(self._outputs(x for x, _ in ahead), behind, strict=True):
                target = labels.to(output.device)
                # Segmentation has a label for every position, each of which counts.
                count = target.numel() if self._loss.takes_classes else len(target)
                total += self._loss(output, target).item() * count
                rows += count
                if self._loss.takes_classes:
                    right += int((output.argmax(1) == target).sum())
        if not rows:
            raise ConfigError("evaluate: the loader is empty")
        result = Evaluation(total / rows, right / rows if self._loss.takes_classes else None, rows)
        self._tell("on_evaluate", Control(), result)
        return result

    def predict(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The whole model's output for one batch, in evaluation mode through the node."""
        with evaluation_mode(self.cut):
            return next(self._outputs([inputs]))

    def fetch(self) -> None:
        """Brings the middle's tensors home, into the model that was cut."""
        if self._link is None:
            return
        _, tensors = self._link.snapshot()
        self.cut.load_middle(split_state(tensors)[0])

    def close(self) -> None:
        """Ends the session and the connection; the optimizer's state on the node goes with it, so this is the end."""
        self._closed = True
        if self._link is not None:
            self._past_traffic = self.traffic
            self._link.close()
            self._link = self._runner = None

    def _epoch(self, loader: Loader, control: Control) -> None:
        state, started = self.state, time.perf_counter()
        self._tell("on_epoch_begin", control)
        self._train_mode()
        total, rows = 0.0, 0
        for *inputs, labels in loader:
            began = time.perf_counter()
            batch = micro_batches(tuple(inputs), labels, self._micro_batches)
            self._tell("on_step_begin", control)
            runner = self._opened(len(batch[0].labels))
            node_s = runner.node_s
            loss = runner.run(state.global_step, batch)
            count = len(labels)
            total, rows = total + loss * count, rows + count
            state.global_step += 1
            self._tell(
                "on_step_end",
                control,
                StepEnd(
                    state.global_step,
                    loss,
                    count,
                    time.perf_counter() - began,
                    self.traffic,
                    runner.node_s - node_s,
                ),
            )
            if control.should_training_stop:
                break
        if not rows:
            raise ConfigError("the loader yielded no batch: is it empty, or drop_last=True with too large a batch?")
        state.epoch += 1
        mean = total / rows
        state.log_history.append({"epoch": float(state.epoch), "step": float(state.global_step), "loss": mean})
        self._tell("on_epoch_end", control, EpochEnd(state.epoch, mean, rows, time.perf_counter() - started))

    def _opened(self, rows: int) -> StepRunner:
        """The step runner over a session that takes micro-batches of ``rows`` rows: a larger one, if need be."""
        if self._runner is None or rows > self._max_rows:
            small = self._link
            snapshot = None if small is None else small.snapshot(with_optimizer=True)[1]
            self._open(rows, snapshot)
            if small is not None:
                self._past_traffic = self._past_traffic + small.traffic
                small.close()
        if self._runner is None:
            raise ConfigError("the trainer was closed; make a new one")
        return self._runner

    def _open(self, rows: int, tensors: dict[str, torch.Tensor] | None = None) -> Link:
        if self._closed:
            raise ConfigError("the trainer was closed; make a new one")
        link = Link(self._address, self._identity, reconnect_s=self._reconnect_s)
        try:
            open_session(
                link,
                self.cut,
                optimizer=self._optimizer,
                loss=self._loss,
                seed=self._seed,
                max_rows=rows,
                max_in_flight=self._in_flight,
                first_step=self.state.global_step,
                tensors=tensors,
            )
        except BaseException:
            link.close(end_session=False)
            raise
        self._link, self._max_rows = link, rows
        self._runner = StepRunner(
            self.cut,
            link,
            self._loss,
            self._optimizers,
            seed=self._seed,
            in_flight=self._in_flight,
            device=self._device,
        )
        return link

    def _train_mode(self) -> None:
        for part in (self.cut.front, self.cut.head):
            if part is not None:
                part.train()

    def _outputs(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        link = self._link
        if link is None:  # nothing was trained yet: the first batch says how large a session to open
            rest = iter(batches)
            first = next(rest, None)
            if first is None:
                return
            batches = itertools.chain([first], rest)
            link = self._open(len(first[0]))
        yield from infer(self.cut, link, batches, max_rows=self._max_rows, device=self._device)

    def _tell(self, event: str, control: Control, *details: object) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self.state, control, *details)
