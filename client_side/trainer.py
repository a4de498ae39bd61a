"""The trainer: fits, evaluates and predicts with a cut model whose middle lives on a node."""

from __future__ import annotations

import itertools
import logging
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from client_side import randomness
from client_side.callbacks import Callback, Control, EpochEnd, Evaluation, StepEnd, TrainState
from client_side.checkpoints import Checkpoint
from client_side.cutting import Cut
from client_side.durability import Checkpoints, Run, holds_run
from client_side.inference import evaluation_mode, infer
from client_side.link import RECONNECT_S, Link, NodeAddress, Traffic, addresses
from client_side.opening import DEFAULT_IDENTITY, initial_state, owner_identity
from client_side.owned import describe_run, owner_tensors, restore_owner
from client_side.passes import Loader, Pass, refuse_persistent_workers
from client_side.receipts import SEGMENT_STEPS, Receipts
from client_side.releases import Releases
from client_side.route import Route
from client_side.sessions import Sessions
from client_side.snapshots import Snapshot
from client_side.steps import Batch, StepRunner, micro_batches
from privacy.dp_sgd import DpGradients
from privacy.guard import Guard
from privacy.hijack import HijackDetector
from privacy.ledger import Ledger
from privacy.policy import CLEAR, DpSgd, GaussianRows, Never, Policy, Rows
from wire.errors import CheckpointError, ConfigError, HijackSuspectedError
from wire.identity import Identity
from wire.optimizers import PartOptimizer
from wire.recipe import SGD, Adam, Loss, LossName, Optimizer
from wire.state import split_state, tensor_digest

__all__ = ["Loader", "Trainer"]

_log = logging.getLogger(__name__)

_SETTLING: Final = 5  # attempts at the last checkpoint; each of them is on a node that was brought to the present

_LINGER_S: Final = 30.0  # for the checkpoint that is being written when a trainer is closed


class Trainer:
    """Trains a :class:`Cut` through a node; exact to the bit, whatever the number of micro-batches in flight.

    A loader yields ``(inputs…, labels)``. The session opens with the first batch and ends with :meth:`close` (or the
    ``with`` block); after :meth:`fit` the model that was cut holds the trained middle.

    Example::

        node, sgd = "gpu:7700#sha256:…", cloister.SGD(lr=0.1)
        with cloister.Trainer(cut, node=node, policy=cloister.CLEAR, optimizer=sgd, loss="cross_entropy") as t:
            t.fit(loader, epochs=3)
            print(t.evaluate(test_loader).accuracy)
    """

    def __init__(
        self,
        cut: Cut,
        *,
        node: str | NodeAddress | Sequence[str | NodeAddress],
        policy: Policy,
        optimizer: Optimizer,
        loss: LossName | Loss = "cross_entropy",
        micro_batches: int = 1,
        in_flight: int | None = None,
        identity: Identity | Path | str = DEFAULT_IDENTITY,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        reconnect_s: float = RECONNECT_S,
        checkpoints: Checkpoints | None = None,
        standby: bool = False,
        ledger: Ledger | None = None,
        data_set: str | None = None,
        units: torch.Tensor | None = None,
        detect_hijacking: bool = True,
        receipts: bool = True,
    ) -> None:
        """Checks its arguments; connects to nobody yet.

        Args:
            cut: from :func:`cloister.cut`.
            node: ``host:port#sha256:…``, or a :class:`NodeAddress`; or several, also as one text with commas: the first
                that takes the session computes, and the others take over when it fails.
            policy: what may leave, and how; ``cloister.CLEAR`` lets everything leave as it is.
            optimizer: trains all three parts, each where it is.
            loss: by name, or a :class:`Loss`.
            micro_batches: slices of each batch; gradients add up over them, exactly.
            in_flight: how many of them may wait for their backward at a time; all of them, unless said otherwise.
            identity: the owner's identity, or its folder (``cloister keys init --role owner``).
            seed: of dropout and its like, on both sides.
            callbacks: see :class:`Callback`.
            reconnect_s: how long a node that is gone (all of them, where there are several) is waited for.
            checkpoints: makes the run one that can be resumed, and moved between nodes; see :class:`Checkpoints`.
            standby: a second node waits at the latest snapshot, so that a move costs no more than a replay.
            ledger: where releases are written down; this user's own, unless said otherwise.
            data_set: what the training data is called in the ledger; its digest, unless said otherwise.
            units: whose each record is, [N] in the data set's order, where the policy's unit is not the record.
            detect_hijacking: stops where the node's gradients look like an attack on a front that learns in the clear.
            receipts: asks nodes that sign what they compute for receipts, and stops where one differs from what was
                exchanged.

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
        self._guard = Guard(policy, ledger or Ledger)
        nodes = addresses(node)
        if len(nodes) > 1 and checkpoints is None:
            raise ConfigError(
                "several nodes: give checkpoints=cloister.Checkpoints(folder=…), from which they take over"
            )
        if standby and len(nodes) == 1:
            raise ConfigError("standby: needs a second node")
        self._plan = checkpoints
        self._run: Run | None = None
        self._route: Route | None = None
        self._owed = False
        self._name = secrets.token_hex(8) if checkpoints is None else str(Path(checkpoints.folder).absolute())[-200:]
        self._releases = Releases(cut, self._guard, run=self._name, data_set=data_set, units=units, seed=seed)
        self._optimizer = optimizer
        self._loss = loss if isinstance(loss, Loss) else Loss(loss)
        self._micro_batches, self._in_flight = micro_batches, in_flight or micro_batches
        self._seed, self._callbacks = seed, list(callbacks)
        self._sessions = Sessions(
            cut=cut,
            guard=self._guard,
            nodes=nodes,
            identity=owner_identity(identity),
            optimizer=optimizer,
            loss=self._loss,
            seed=seed,
            in_flight=self._in_flight,
            reconnect_s=reconnect_s,
            standby=standby,
        )
        self.receipts = Receipts() if receipts else None
        self._sessions.receipts = self.receipts
        self._link: Link | Route | None = None
        self._runner: StepRunner | None = None
        self._closed = False
        self._past_traffic = Traffic(0, 0, 0)
        self._device = next((p.device for p in cut.owner_parameters()), torch.device("cpu"))
        parts = [cut.front] if cut.head is None else [cut.front, cut.head]
        self._optimizers = [PartOptimizer(optimizer, dict(part.named_parameters())) for part in parts]
        self._private = {
            name: DpGradients(part, treatment, name) if part is not None and isinstance(treatment, DpSgd) else None
            for name, part, treatment in (("front", cut.front, policy.front), ("head", cut.head, policy.head))
        }
        learns = any(p.requires_grad for p in cut.front.parameters())
        # What an honest node returns for noised rows looks like an attack; and their noise bounds what an attack gets.
        noised = isinstance(policy.activations, Rows) or isinstance(policy.gradients, GaussianRows)
        self._hijack = HijackDetector() if detect_hijacking and learns and not noised else None
        self._sum, self._rows = 0.0, 0  # of the epoch at hand
        self._pass = Pass()
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

    @property
    def guard(self) -> Guard:
        """The door out: what left, and what it cost."""
        return self._guard

    @property
    def run(self) -> Run | None:
        """The run's folder at work, once :meth:`fit` has begun and where there are ``checkpoints``."""
        return self._run

    def fit(self, loader: Loader, epochs: int, *, resume: bool = False) -> TrainState:
        """Trains for ``epochs`` passes over ``loader``, then brings the middle home.

        Args:
            loader: see the class.
            epochs: with ``resume``, of the whole run.
            resume: goes on with the run that ``checkpoints.folder`` holds; where it holds none, begins it. The numbers
                are those of a run that was never interrupted, to the bit.

        Raises:
            WireError: the node's reason for refusing.
            UnreachableError: the node is gone for longer than ``reconnect_s``.
            CheckpointError: the disk fails; or the folder holds another run, and what differs.
            ConfigError: the folder holds a run, and ``resume`` is not given; or the loader's workers persist.
            ReleaseRefusedError, BudgetSpentError, LedgerError: the policy, the budget or the ledger forbids it.
            HijackSuspectedError: the node's gradients steer the front; the message says where the evidence is.
            ReceiptError: the node signed something else than what was exchanged.
        """
        try:
            return self._fit(loader, epochs, resume=resume)
        except HijackSuspectedError as error:
            if self._hijack is None:
                raise
            folder = Path(tempfile.mkdtemp(prefix="cloister-")) if self._plan is None else Path(self._plan.folder)
            kept = self._hijack.evidence().save(folder.expanduser())
            raise HijackSuspectedError(f"{error}; the evidence is in {kept}") from error

    def _fit(self, loader: Loader, epochs: int, *, resume: bool) -> TrainState:
        control = Control()
        resumed, loader = self._durably(loader, resume=resume)
        self.state.epochs = epochs if resume else self.state.epoch + epochs
        self.state.steps_per_epoch = len(loader) if isinstance(loader, Sized) else None
        self._tell("on_train_begin", control)
        while self.state.epoch < self.state.epochs and not control.should_training_stop:
            self._epoch(loader, control, resumed)
            resumed = None
        if self._run is not None:
            self._run.wait()
        self.fetch()
        self._tell("on_train_end", control)
        return self.state

    def evaluate(self, loader: Loader) -> Evaluation:
        """Mean loss, and accuracy for losses over classes, in evaluation mode through the node.

        Where the policy keeps inference at home, the middle is brought home for it.
        """
        total, right, rows = 0.0, 0, 0
        self._guard.open_inference(self._releases.name_of(loader), self._name)
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
        """The whole model's output for one batch, in evaluation mode through the node (or at home: see the policy)."""
        self._guard.open_inference(None, self._name)
        with evaluation_mode(self.cut):
            return next(self._outputs([inputs]))

    def fetch(self) -> None:
        """Brings the middle's tensors home, into the model that was cut."""
        if self._run is not None and self._run.latest.step == self.state.global_step:
            middle = split_state(self._run.load(self._run.latest.snapshot))[0]
        elif self._link is not None:
            self._take_receipt()
            middle = split_state(self._link.snapshot()[1])[0]
        else:
            return
        if self.receipts is not None and self.receipts.kept:
            self.receipts.check_state(self.state.global_step, {name: tensor_digest(t) for name, t in middle.items()})
        self.cut.load_middle(middle)

    def close(self) -> None:
        """Ends the session and the connection; the optimizer's state on the node goes with it, so this is the end."""
        self._closed = True
        run, self._run = self._run, None
        try:
            if run is not None:
                run.linger(_LINGER_S)
            if self._link is not None:  # with it ends what a node in a black hole would owe for ever
                self._past_traffic = self.traffic
                self._link.close()
                self._link = self._runner = self._route = None
        finally:
            if run is not None:
                run.close()
            self._guard.close()

    def _epoch(self, loader: Loader, control: Control, resumed: Checkpoint | None) -> None:
        state, started, late_s = self.state, time.perf_counter(), 0.0
        self._tell("on_epoch_begin", control)
        self._train_mode()
        self._releases.check_learning()
        if self._guard.begin_pass(state.global_step):
            state.spent = self._guard.spent
        for *inputs, labels in self._pass.batches(
            loader, state.epoch, done=state.batch, resumed=resumed, kept=self._run is not None
        ):
            began = time.perf_counter()
            batch = micro_batches(tuple(inputs), labels, self._micro_batches)
            self._tell("on_step_begin", control)
            runner = self._opened(len(batch[0].labels))
            node_s = runner.node_s
            loss = runner.run(state.global_step, batch)
            count = len(labels)
            self._sum, self._rows = self._sum + loss * count, self._rows + count
            state.global_step += 1
            state.batch += 1
            self._tell(
                "on_step_end",
                control,
                StepEnd(
                    state.global_step,
                    loss,
                    count,
                    time.perf_counter() - began + late_s,
                    self.traffic,
                    runner.node_s - node_s,
                ),
            )
            # After the callbacks: what they draw and write down of a step is there before a checkpoint vouches for it.
            told = time.perf_counter()
            if state.global_step % SEGMENT_STEPS == 0:
                self._take_receipt()
            self._checkpoint_if_due(loader)
            late_s = time.perf_counter() - told  # counts with the step that it delays
            if control.should_training_stop:
                break
        else:
            self._pass.over = True
        if not self._rows:
            raise ConfigError("the loader yielded no batch: is it empty, or drop_last=True with too large a batch?")
        if self._run is not None:
            self._checkpoint(loader)
            if control.should_training_stop or state.epoch + 1 == state.epochs:
                self._settle(loader, self._run)
            if control.should_training_stop:
                self._run.journal.happened(state.global_step, "stopped", "as was asked")
        mean, rows = self._sum / self._rows, self._rows
        state.epoch, state.batch, self._sum, self._rows = state.epoch + 1, 0, 0.0, 0
        state.log_history.append({"epoch": float(state.epoch), "step": float(state.global_step), "loss": mean})
        self._tell("on_epoch_end", control, EpochEnd(state.epoch, mean, rows, time.perf_counter() - started))

    def _durably(self, loader: Loader, *, resume: bool) -> tuple[Checkpoint | None, Loader]:
        """Begins the run in its folder, or finds where it stood; where a table is released, its loader is the run's."""
        if self._plan is None:
            if resume:
                raise ConfigError("resume: give checkpoints=cloister.Checkpoints(folder=…), where the run is kept")
            return None, self._released(loader)
        refuse_persistent_workers(loader)
        if self._run is not None:
            return None, self._released(loader)
        if not resume and holds_run(self._plan.folder):
            raise ConfigError(f"{self._plan.folder} holds a run: go on with it (resume), or take another folder")
        if self._link is not None:  # opened to evaluate what was not trained yet
            self._past_traffic = self.traffic
            self._link.close()
            self._link = self._runner = None
        run = Run(self._plan)
        try:
            self._keep_receipts(Path(self._plan.folder).expanduser() / "receipts.jsonl", resume=resume)
            checkpoint = run.recover(self._what(loader)) if resume else None
            loader = self._released(loader, Path(self._plan.folder).expanduser(), checkpoint)
            if checkpoint is None:
                self._pass.begin = randomness.capture(loader)
                run.begin(self._here(loader), initial_state(self.cut, self._guard))
            else:
                self._restore(checkpoint)
                if not checkpoint.batch:  # before the first epoch: callbacks draw from here on, as they did then
                    randomness.restore(checkpoint.part("now/"), loader)
                    checkpoint = None
        except BaseException:
            run.close()
            raise
        self._run = run
        return checkpoint, loader

    def _released(self, loader: Loader, folder: Path | None = None, resumed: Checkpoint | None = None) -> Loader:
        """Checks the policy before anything leaves; where it releases a table, the loader of that."""
        made = self._releases.loader(loader, folder, resumed)
        self.state.spent = self._guard.spent
        return made

    def _what(self, loader: Loader) -> dict[str, object]:
        policy = self._guard.policy
        return describe_run(
            self.cut,
            self._optimizer,
            self._loss,
            policy,
            # In the clear a run may go on with other data; otherwise what was claimed was claimed for these.
            data_set=None if policy == CLEAR else self._guard.data_set or self._releases.planned_name(loader),
            micro_batches=self._micro_batches,
            seed=self._seed,
        )

    def _here(self, loader: Loader) -> Checkpoint:
        """The owner's part, as it stands now; its snapshot is yet to come."""
        watched = {} if self._hijack is None else self._hijack.state()
        return Checkpoint(
            step=self.state.global_step,
            epoch=self.state.epoch,
            batch=self.state.batch,
            over=self._pass.over,
            loss_sum=self._sum,
            rows=self._rows,
            log_history=list(self.state.log_history),
            run=self._what(loader),
            snapshot=Snapshot(self.state.global_step, {}),
            store="",
            ledger=self._guard.position,
            tensors=owner_tensors(self.cut, self._optimizers)
            | self._pass.tensors(loader)
            | {f"hijack/{name}": tensor for name, tensor in watched.items()},
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        restore_owner(self.cut, self._optimizers, checkpoint)
        self.state.global_step, self.state.epoch, self.state.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        self.state.log_history[:] = checkpoint.log_history
        self._sum, self._rows = checkpoint.loss_sum, checkpoint.rows
        if self._hijack is not None and (watched := checkpoint.part("hijack/")):
            self._hijack.restore(watched)

    def _checkpoint_if_due(self, loader: Loader) -> None:
        run, route = self._run, self._route
        if run is None or route is None or self._plan is None:
            return
        run.check()
        self._owed |= self.state.global_step % self._plan.every == 0
        full = run.log.bytes > self._plan.log_bytes
        leaving = route.leaving
        if full or leaving or (self._owed and not run.busy):
            self._checkpoint(loader)
        if leaving:
            run.wait()
            route.leave()

    def _checkpoint(self, loader: Loader) -> None:
        run, route = self._run, self._route
        if run is None or route is None:
            return
        run.wait()
        if run.latest.step == self.state.global_step:
            return
        self._take_receipt()
        incoming = route.begin_snapshot(known=run.known(), keep=run.plan.keep_on_node)
        if incoming.next_step != self.state.global_step:
            raise CheckpointError(
                f"the node's snapshot is of step {incoming.next_step}, and the run is at {self.state.global_step}"
            )
        self._owed = False
        run.save(self._here(loader), incoming)

    def _settle(self, loader: Loader, run: Run) -> None:
        """Where a run stops its checkpoint counts, though a node die while it is fetched: another one has it, too."""
        for _ in range(_SETTLING):
            run.wait()
            if run.latest.step == self.state.global_step:
                return
            self._checkpoint(loader)
        run.wait()

    def _keep_receipts(self, path: Path, *, resume: bool) -> None:
        if self.receipts is None:
            return
        if not resume:
            path.unlink(missing_ok=True)
        self.receipts = self._sessions.receipts = Receipts(path)

    def _take_receipt(self) -> None:
        if self.receipts is not None and self._link is not None and (signed := self._link.receipt()) is not None:
            self.receipts.take(signed)

    def _opened(self, rows: int) -> StepRunner:
        """The step runner over a session that takes micro-batches of ``rows`` rows: a larger one, if need be."""
        if self._runner is None or rows > self._sessions.max_rows:
            small = self._link
            if isinstance(small, Route):
                self._sessions.max_rows = rows
                small.reopen()
            else:
                self._take_receipt()
                snapshot = None if small is None else small.snapshot(with_optimizer=True)[1]
                self._open(rows, snapshot)
                if small is not None:
                    self._past_traffic = self._past_traffic + small.traffic
                    small.close()
        if self._runner is None:
            raise ConfigError("the trainer was closed; make a new one")
        return self._runner

    def _open(self, rows: int, tensors: dict[str, torch.Tensor] | None = None) -> Link | Route:
        if self._closed:
            raise ConfigError("the trainer was closed; make a new one")
        self._sessions.max_rows = max(rows, self._sessions.max_rows)
        link: Link | Route
        if self._run is None:
            link = self._sessions.link(self.state.global_step, tensors)
        else:
            link = self._route = self._sessions.route(self._run)
        self._link = link
        self._runner = StepRunner(
            self.cut,
            link,
            self._guard,
            self._loss,
            self._optimizers,
            seed=self._seed,
            in_flight=self._in_flight,
            device=self._device,
            dp_front=self._private["front"],
            dp_head=self._private["head"],
            hijack=self._hijack,
        )
        return link

    def _train_mode(self) -> None:
        for part in (self.cut.front, self.cut.head):
            if part is not None:
                part.train()

    def _outputs(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        if isinstance(self._guard.policy.inference, Never):
            yield from self._at_home(batches)
            return
        link = self._link
        if link is None:  # nothing was trained yet: the first batch says how large a session to open
            rest = iter(batches)
            first = next(rest, None)
            if first is None:
                return
            batches = itertools.chain([first], rest)
            link = self._open(len(first[0]))
        yield from infer(self.cut, link, self._guard, batches, max_rows=self._sessions.max_rows, device=self._device)

    def _at_home(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """The whole model here: nothing leaves."""
        self.fetch()
        model = self.cut.reassemble()
        training = model.training
        model.eval()
        try:
            for inputs in batches:
                yield model(*(x.to(self._device) for x in inputs))
        finally:
            model.train(training)

    def _tell(self, event: str, control: Control, *details: object) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self.state, control, *details)
