"""The release guard: the only way from the owner to the wire.

Frames, inference batches and openings take :class:`Released` tensors, and nobody but a :class:`Guard` makes those. A
guard applies the policy's treatment, and has the ledger write down what it costs before it hands the bytes out. What
was released once (a table's rows, a frame that is sent again) costs nothing a second time.

The laws: what a run sends is what its guard released, byte for byte; and the ledger is never behind.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from privacy.accounting import Gaussian, PrivacySpent, Unbounded
from privacy.claims import Claim, claim_of
from privacy.ledger import Budget, Ledger, Position, Release
from privacy.mechanisms import Noise, noisy_rows
from privacy.policy import (
    Clear,
    DpSgd,
    GaussianRows,
    Included,
    Never,
    Policy,
    RandomizedLabels,
    Rows,
    holes,
    treatment_name,
)
from privacy.tables import (
    Records,
    ReleasedTable,
    check_labels,
    check_records,
    label_releases,
    make_labels,
    make_table,
    plan_table,
)
from wire.errors import ConfigError, ReleaseRefusedError

__all__ = ["Guard", "Released", "Situation", "fresh_releases"]

_log = logging.getLogger(__name__)
_SEAL: Final = object()


@dataclass(frozen=True, slots=True, eq=False)
class Released:
    """A tensor that may leave. Only a guard makes one."""

    tensor: Tensor = field(repr=False)
    kind: str
    seal: object = field(repr=False)

    def __post_init__(self) -> None:
        """Raises: ReleaseRefusedError where somebody else made it."""
        if self.seal is not _SEAL:
            raise ReleaseRefusedError("only the release guard lets tensors leave")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a run is, as far as its claim depends on it.

    Attributes:
        data_set: the digest of the training data, or the name that it was given; ``None`` where it has neither, which
            goes with a policy in the clear alone.
        run: the run's own name.
        content: the digest of the training data, where that is known.
        vanilla: whether labels go to the node.
        front_learns: whether the front has parameters that train.
        head_learns: the same of the head.
        once_an_epoch: whether every record comes at most once in each epoch.
        members: how many units there are, or records, where each is its own; 0 where that cannot be told.
        most_of_a_unit: how many records the unit with the most has; 0 where nobody said whose they are.
        mixes: why one record's row or the front's state depends on other records; empty where they do not.
    """

    data_set: str | None
    run: str
    content: str | None = None
    vanilla: bool
    front_learns: bool
    head_learns: bool
    once_an_epoch: bool
    members: int = 0
    most_of_a_unit: int = 0
    mixes: str = ""


class Guard:
    """One run's door. For one thread, but for :attr:`spent` and :attr:`sent`."""

    def __init__(self, policy: Policy, ledger: Ledger | Callable[[], Ledger] | None) -> None:
        """Nothing has left yet.

        Args:
            policy: what may leave, and how.
            ledger: where it is accounted, or what opens that when it is first needed; only a policy that lets
                everything leave in the clear goes without.

        Raises:
            ConfigError: no ledger for a policy that claims anything.
        """
        if ledger is None and (policy.claims or not isinstance(policy.activations, Clear)):
            raise ConfigError("privacy: this policy needs a ledger, in which its releases are written down")
        self.policy, self._books = policy, ledger
        self._own: Ledger | None = None
        self._noise = Noise()
        self._situation: Situation | None = None
        self._table: ReleasedTable | None = None
        self._labels: Tensor | None = None
        self._inferred: set[str] = set()
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}

    @property
    def _ledger(self) -> Ledger | None:
        if self._books is None or isinstance(self._books, Ledger):
            return self._books
        if self._own is None:
            self._own = self._books()
        return self._own

    @property
    def tabled(self) -> bool:
        """Whether the run is trained from a table that was released once."""
        return self._table is not None

    @property
    def sent(self) -> dict[str, int]:
        """Bytes handed out so far, by kind; what is sent again counts again."""
        with self._lock:
            return dict(self._sent)

    @property
    def spent(self) -> PrivacySpent | None:
        """What all runs on this data set spent together; ``None`` before :meth:`begin`, or without a ledger."""
        if self._situation is None or self._situation.data_set is None or self._ledger is None:
            return None
        policy = self.policy
        return self._ledger.spent(
            self._situation.data_set, delta=policy.delta, relation=policy.relation, unit=policy.unit
        )

    @property
    def claim(self) -> Claim | None:
        """What may be said of the data set now; ``None`` as for :attr:`spent`."""
        if self.data_set is None or self._ledger is None:
            return None
        policy, entries = self.policy, self._ledger.entries(self.data_set)
        return claim_of(entries, delta=policy.delta, relation=policy.relation, unit=policy.unit)

    @property
    def releases(self) -> dict[str, int]:
        """How many releases of each kind the ledger holds of the data set, those of other runs included."""
        if self.data_set is None or self._ledger is None:
            return {}
        return dict(Counter(entry.kind for entry in self._ledger.entries(self.data_set)))

    @property
    def ledger(self) -> str | None:
        """Where releases are written down, for people; ``None`` before :meth:`begin`, or without one."""
        return None if self.data_set is None or self._ledger is None else self._ledger.name

    @property
    def position(self) -> Position | None:
        """Of the ledger now; a checkpoint keeps it."""
        return None if self.data_set is None or self._ledger is None else self._ledger.position()

    def close(self) -> None:
        """Lets go of a ledger that the guard opened itself."""
        if self._own is not None:
            self._own.close()

    def begin(self, situation: Situation, known: Position | None = None) -> None:
        """Checks the policy against the run, before anything leaves.

        Args:
            situation: what the run is.
            known: the ledger's position that a resumed run's checkpoint names.

        Raises:
            ReleaseRefusedError: an ε is asked for that would not hold, and why.
            BudgetSpentError: nothing is left.
            LedgerError: the ledger has forgotten what it held.
            ConfigError: the data goes by another name there.
        """
        policy = self.policy
        if situation.vanilla and isinstance(policy.labels, Never):
            raise ReleaseRefusedError(
                'privacy: labels = "never", and the node computes the loss: give the cut a head (U-shape), or labels a '
                "treatment"
            )
        found = holes(
            policy,
            vanilla=situation.vanilla,
            front_learns=situation.front_learns,
            head_learns=situation.head_learns,
        )
        found += [situation.mixes] if situation.mixes else []
        if found and policy.claims:
            raise ReleaseRefusedError(f"privacy: no finite ε would hold, because {'; and '.join(found)}")
        self._check_units(situation)
        if known is not None and self._ledger is not None:
            self._ledger.check(known)
        if situation.data_set is not None and self._ledger is not None:
            self._ledger.check_name(situation.data_set, situation.content)
        self._situation = situation
        if found:
            releases = [Release(kind="activations", treatment="clear", event=Unbounded(reason=r)) for r in found]
            self._spend(releases, unbounded=True)

    def _check_units(self, situation: Situation) -> None:
        """What is noised anew in every epoch is noised for so many records of a unit; a table bounds them itself."""
        policy, most = self.policy, situation.most_of_a_unit
        if policy.claims and situation.members * policy.delta >= 1:
            raise ConfigError(
                f"privacy: delta = {policy.delta:g}, and there are {situation.members} {policy.unit}s: such a δ allows "
                "one of them to be shown to all; take one far below 1 over their number"
            )
        if fresh_kinds(policy) and not situation.once_an_epoch:
            raise ReleaseRefusedError(
                "privacy: this loader may give a record more than once in an epoch, which is accounted for once: give "
                "a DataLoader with shuffle=True, or with cloister.SeededSampler, and no batch_sampler"
            )
        if policy.unit == "record" or not fresh_kinds(policy):
            return
        if not most:
            raise ConfigError(
                f'privacy.unit = "{policy.unit}": say whose each record is (units = "module:function" in [privacy], or '
                "units=… of the Trainer); without, a claim would hold per record only"
            )
        if most > policy.records_per_unit:
            raise ReleaseRefusedError(
                f"privacy: one {policy.unit} has {most} records, and what is noised anew in every epoch is accounted "
                f"for {policy.records_per_unit} of them: leave records out of the data set, or raise records_per_unit"
            )

    @property
    def data_set(self) -> str | None:
        """What the training data is called in the ledger, once :meth:`begin` was called."""
        return None if self._situation is None else self._situation.data_set

    def open_inference(self, data_set: str | None, run: str) -> None:
        """Before records are evaluated or predicted through the node: they leave in the clear, or not at all."""
        if isinstance(self.policy.inference, Clear) and self.policy.claims:
            raise ReleaseRefusedError(
                "privacy: no finite ε would hold, because evaluation and prediction send activations in the clear"
            )
        if isinstance(self.policy.inference, Clear) and data_set is not None and data_set not in self._inferred:
            self._inferred.add(data_set)
            if self._ledger is not None:
                data_set = self._ledger.name_of(data_set) or data_set
                event = Unbounded(reason="evaluation and prediction send activations in the clear")
                release = Release(kind="inference", treatment="clear", event=event)
                self._ledger.spend(data_set, run, [release], unit=self._unit_of(data_set))

    def table(self, records: Records) -> ReleasedTable:
        """Releases a table once, from which the run is trained.

        Raises:
            BudgetSpentError, ConfigError, NonFiniteError: see :mod:`privacy.tables`.
        """
        situation, ledger = self._begun(), self._ledger
        if ledger is None or situation.data_set is None:
            raise ConfigError("privacy: a table needs a ledger, and a data set that has a name in it")
        before = tuple(entry.event for entry in ledger.entries(situation.data_set))
        plan = plan_table(self.policy, self._budget(), before)
        check_records(self.policy, plan, records)
        self._spend(plan.releases)
        self._table = make_table(self.policy, plan, records, self._noise)
        return self._table

    def adopt(self, table: ReleasedTable) -> None:
        """Takes a table that this run released before it was interrupted: it costs nothing again."""
        self._table = table

    def draw_labels(self, labels: Tensor) -> Tensor:
        """Randomizes the labels of all records once, where the policy keeps them apart from its rows.

        Args:
            labels: int64 ``[N]``, in the data set's order.

        Returns:
            what may leave from now on, for the run to keep.

        Raises:
            BudgetSpentError, ConfigError: see :mod:`privacy.tables`.
        """
        check_labels(self.policy, labels)
        self._spend(label_releases(self.policy))
        self._labels = make_labels(self.policy, labels, self._noise)
        return self._labels

    def adopt_labels(self, labels: Tensor) -> None:
        """Takes labels that this run drew before it was interrupted: they cost nothing again."""
        self._labels = labels

    def begin_pass(self, step: int) -> bool:
        """Before the first byte of a pass over the records: charges what it releases anew; returns whether it did.

        A pass that goes on with an epoch, in this process or another, is charged like any: it may draw anew, and from
        records that left before.
        """
        releases = fresh_releases(self.policy, step=step)
        if releases:
            self._spend(releases)
        return bool(releases)

    def activations(self, tensors: Sequence[Tensor]) -> tuple[Released, ...]:
        """Smashed data of training records."""
        treatment = self.policy.activations
        if isinstance(treatment, Clear):
            return self._out("activations", tensors)
        if isinstance(treatment, Rows) and not treatment.once:
            return self._out("activations", self._noised(tensors, treatment.clip, treatment.noise))
        raise ReleaseRefusedError("privacy: with this policy, activations leave in a table, once, or not at all")

    def rows(self, indices: Tensor) -> Released:
        """Names rows of the released table, which the node keeps."""
        self._released()
        return self._out("rows", [indices])[0]

    def labels(self, labels: Tensor) -> Released:
        """Labels for the node's loss; where they were drawn once, ``labels`` are indices of records."""
        if isinstance(self.policy.labels, Clear):
            return self._out("labels", [labels])[0]
        if self._labels is not None:
            return self._out("labels", [self._labels[labels]])[0]
        raise ReleaseRefusedError("privacy: with this policy, labels leave in a table, randomized once, or not at all")

    def gradients(self, tensors: Sequence[Tensor | None]) -> list[Released | None]:
        """Gradients at the middle's outputs (U-shape); ``None`` stays ``None``."""
        treatment = self.policy.gradients
        there = [t for t in tensors if t is not None]
        if isinstance(treatment, GaussianRows):
            there = self._noised(there, treatment.clip, treatment.noise)
        elif not isinstance(treatment, Clear) and self._table is None:
            raise ReleaseRefusedError(
                "privacy: with this policy, output gradients leave only where a table was trained"
            )
        released = iter(self._out("gradients", there))
        return [None if t is None else next(released) for t in tensors]

    def inference(self, tensors: Sequence[Tensor]) -> tuple[Released, ...]:
        """Activations of records that are evaluated, or predicted."""
        if isinstance(self.policy.inference, Clear):
            return self._out("inference", tensors)
        raise ReleaseRefusedError(
            'privacy: with this policy, evaluation and prediction stay at home; inference = "clear" lets activations go'
        )

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Released]:
        """What a session begins with: the middle's tensors as before any training, or as a node sent them; a table."""
        released = self._out("weights", list(tensors.values()))
        return dict(zip(tensors, released, strict=True))

    def kept_rows(self) -> dict[str, Tensor]:
        """The table for the node to keep (through :meth:`weights`), by name; empty where there is none."""
        table = self._table
        if table is None:
            return {}
        found = {"0": table.rows}
        # A table's labels are as noised as its rows, unless the policy lets them leave in the clear.
        may = isinstance(self.policy.labels, Clear | Included | RandomizedLabels)
        if table.labels is not None and may and self._begun().vanilla:
            found["labels"] = table.labels
        return found

    def _noised(self, tensors: Sequence[Tensor], clip: float, noise: float | None) -> list[Tensor]:
        """Clipped and noised, all of one record's tensors together; gradients pass as if there were no noise."""
        if not tensors:
            return []
        if any(not t.is_floating_point() for t in tensors):
            raise ReleaseRefusedError("privacy: only tensors of floating point can be noised")
        flat = torch.cat([t.flatten(1) for t in tensors], dim=1)
        made = noisy_rows(flat.detach(), clip=clip, sigma=clip * (noise or 0.0), noise=self._noise)
        through = flat + (made.to(flat.dtype) - flat.detach()) if flat.requires_grad else made.to(flat.dtype)
        parts = torch.split(through, [t[0].numel() for t in tensors], dim=1)
        return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def _unit_of(self, data_set: str) -> str:
        """An infinite ε holds per any unit: it joins whatever the data set's ledger is kept for."""
        entries = [] if self._ledger is None else self._ledger.entries(data_set)
        return entries[0].unit if entries else self.policy.unit

    def _spend(self, releases: Sequence[Release], *, unbounded: bool = False) -> None:
        situation = self._begun()
        if situation.data_set is None or self._ledger is None:
            return
        budget = self._budget() if self.policy.claims else None
        unit = self._unit_of(situation.data_set) if unbounded else self.policy.unit
        self._ledger.spend(
            situation.data_set, situation.run, releases, unit=unit, budget=budget, content=situation.content
        )

    def _budget(self) -> Budget:
        return Budget(self.policy.epsilon, self.policy.delta, self.policy.relation)

    def _begun(self) -> Situation:
        if self._situation is None:
            raise ReleaseRefusedError("privacy: the run has not begun; nothing may leave before")
        return self._situation

    def _released(self) -> ReleasedTable:
        if self._table is None:
            raise ReleaseRefusedError("privacy: no table was released yet")
        return self._table

    def _out(self, kind: str, tensors: Sequence[Tensor]) -> tuple[Released, ...]:
        with self._lock:
            self._sent[kind] = self._sent.get(kind, 0) + sum(t.nbytes for t in tensors)
        return tuple(Released(t, kind, _SEAL) for t in tensors)


def fresh_kinds(policy: Policy) -> dict[str, Rows | GaussianRows | DpSgd]:
    """What a policy noises anew in every epoch, by kind."""
    found = {kind: getattr(policy, kind) for kind in ("activations", "gradients", "front", "head")}
    return {
        kind: treatment
        for kind, treatment in found.items()
        if isinstance(treatment, Rows | GaussianRows | DpSgd) and treatment is not policy.table
    }


def fresh_releases(policy: Policy, *, epochs: int = 1, step: int = 0) -> list[Release]:
    """What a policy releases anew in each epoch, for so many of them.

    There is no amplification by sampling: the node sees which record takes part.

    Raises:
        ConfigError: a treatment without its noise.
    """
    found = []
    for kind, treatment in fresh_kinds(policy).items():
        if treatment.noise is None:
            raise ConfigError(f"privacy.{kind}: what is noised anew in every epoch needs a noise; see privacy plan")
        # A unit's records leave in rows of their own (square root), but add up in one gradient.
        reach = policy.records_per_unit
        factor = float(reach) if isinstance(treatment, DpSgd) else reach**0.5
        event = Gaussian(sensitivity=factor, sensitivity_replace=2 * factor, noise=treatment.noise, count=epochs)
        found.append(Release(kind=kind, treatment=treatment_name(kind, treatment), event=event, step=step))
    return found
