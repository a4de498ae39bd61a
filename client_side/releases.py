"""What of a trainer's data may leave: the claim that is made for it, and the table that a policy releases once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from pathlib import Path

import torch

from client_side.checkpoints import Checkpoint
from client_side.cutting import Cut
from client_side.passes import Loader
from client_side.records import (
    collect,
    data_set_of,
    labels_of,
    load_released,
    mixing,
    numbered,
    repeats_no_record,
    save_released,
    table_loader,
)
from client_side.sampling import PoissonLoader
from privacy.guard import Guard, Situation
from privacy.policy import CLEAR, Clear
from privacy.tables import ReleasedTable
from wire.errors import ConfigError, ReleaseRefusedError

__all__ = ["Releases"]


class Releases:
    """One trainer's way through its guard, before a step is taken."""

    def __init__(
        self,
        cut: Cut,
        guard: Guard,
        *,
        run: str,
        data_set: str | None,
        units: torch.Tensor | None,
        seed: int,
    ) -> None:
        """Takes what a claim depends on; see :class:`~client_side.trainer.Trainer`."""
        self._cut, self._guard, self._run = cut, guard, run
        self._data_set, self._units, self._seed = data_set, units, seed
        self._claimed: Loader | None = None
        self._table: ReleasedTable | None = None
        self._labelled = False
        self._digest: str | None = None
        self._learns = (False, False)

    def loader(self, loader: Loader, folder: Path | None, resumed: Checkpoint | None) -> Loader:
        """What to train on: ``loader`` itself, its records without labels, or the table that they are released as.

        Args:
            loader: of the records.
            folder: where the run keeps what it releases once.
            resumed: where the run goes on from; what it released once was paid for.

        Raises:
            ConfigError: the data set has no name, or is another one than before; or a treatment does not fit it.
            ReleaseRefusedError, BudgetSpentError, LedgerError: see :class:`Guard`.
            CheckpointError: the table of a resumed run is damaged or gone.
        """
        if loader is not self._claimed:
            self._claim(loader, resumed)
            self._claimed = loader
        kept = folder if resumed is not None else None
        if self._guard.policy.table is not None:
            return table_loader(self._tabled(loader, folder, kept), loader, self._seed)
        if self._guard.policy.labels_apart and self._cut.head is None:
            unlabelled = numbered(loader)
            self._draw_labels(loader, folder, kept)
            return unlabelled
        return loader

    def _tabled(self, loader: Loader, folder: Path | None, kept: Path | None) -> ReleasedTable:
        if self._table is None and kept is not None:
            tensors = load_released(kept, "rows")
            self._table = ReleasedTable(tensors["rows"], tensors.get("labels"))
            self._guard.adopt(self._table)
        if self._table is None:
            self._table = self._guard.table(collect(self._cut, loader, self._units))
            if folder is not None:
                labels = {} if self._table.labels is None else {"labels": self._table.labels}
                save_released(folder, {"rows": self._table.rows} | labels)
        return self._table

    def _draw_labels(self, loader: Loader, folder: Path | None, kept: Path | None) -> None:
        if self._labelled:
            return
        if kept is not None:
            self._guard.adopt_labels(load_released(kept, "labels")["labels"])
        else:
            labels = self._guard.draw_labels(labels_of(loader))
            if folder is not None:
                save_released(folder, {"labels": labels})
        self._labelled = True

    def name_of(self, loader: object) -> str | None:
        """What a loader's records are called in the ledger: the training data's own name, where they are those."""
        digest = data_set_of(loader, read=False)
        mine = loader is self._claimed or (digest is not None and digest == self._digest)
        return self._guard.data_set if mine and self._guard.data_set is not None else digest

    def planned_name(self, loader: Loader) -> str | None:
        """What the training data will be called: a resumed run's must be the same."""
        return self._data_set or data_set_of(loader, read=self._guard.policy != CLEAR)

    def check_learning(self) -> None:
        """Whether front and head still learn as was claimed.

        Raises:
            ReleaseRefusedError: one of them was unfrozen since.
        """
        if self._guard.policy != CLEAR and self._learning() != self._learns:
            raise ReleaseRefusedError(
                "privacy: the front or the head was frozen or unfrozen since the run began: make a new trainer"
            )

    def _learning(self) -> tuple[bool, bool]:
        front, head = self._cut.front, self._cut.head
        learns = [part is not None and any(p.requires_grad for p in part.parameters()) for part in (front, head)]
        return learns[0], learns[1]

    def _claim(self, loader: Loader, resumed: Checkpoint | None) -> None:
        """Tells the guard what is trained on, and how."""
        policy, known, digest = self._guard.policy, self._guard.data_set, data_set_of(loader, read=False)
        name = self._data_set or digest or self.planned_name(loader)
        other = known not in (None, name) or (self._digest is not None and digest != self._digest)
        if policy != CLEAR and (name is None or other):
            raise ConfigError(
                "privacy: this policy goes with one data set that has a name in the ledger: give a DataLoader over a "
                'data set that can be read in order, or say data_set = "…"; and a new trainer for other data'
            )
        self._learns = self._learning()
        mixes = ""
        if policy != CLEAR and not isinstance(policy.activations, Clear):
            mixes = mixing(self._cut, loader, training=policy.table is None)
        members, most = self._members(loader)
        situation = Situation(
            data_set=name,
            run=self._run,
            content=digest,
            vanilla=self._cut.head is None,
            front_learns=self._learns[0],
            head_learns=self._learns[1],
            once_an_epoch=repeats_no_record(loader),
            members=members,
            most_of_a_unit=most,
            mixes=mixes,
            sampling_rate=loader.rate if isinstance(loader, PoissonLoader) else None,
            steps_per_epoch=len(loader) if isinstance(loader, PoissonLoader) else None,
        )
        self._guard.begin(situation, None if resumed is None else resumed.ledger)
        self._digest = digest

    def _members(self, loader: Loader) -> tuple[int, int]:
        """How many units there are, and how many records the largest has (0 where nobody said whose they are)."""
        data = getattr(loader, "dataset", None)
        count = len(data) if isinstance(data, Sized) else 0
        if self._units is None:
            return (count, 0) if self._guard.policy.unit == "record" else (0, 0)
        units = self._units
        if not isinstance(units, torch.Tensor):
            raise ConfigError(f"privacy.units: a {type(units).__name__}; give a torch tensor, one integer a record")
        if self._guard.policy.unit == "record" and self._guard.policy.claims:
            raise ConfigError(
                'privacy.unit = "record", and units say whose each record is: name what they are, as in unit = '
                '"patient", so that the claim holds for each of them; or leave units out'
            )
        if units.ndim != 1 or units.is_floating_point() or (count and len(units) != count):
            raise ConfigError(
                f"privacy.units: {str(units.dtype).removeprefix('torch.')} {list(units.shape)} for {count} records; "
                "one integer for each of them, in the data set's order"
            )
        of_each = Counter(units.tolist())
        return len(of_each), max(of_each.values(), default=0)
